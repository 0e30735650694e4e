"""Files that are written whole: beside their place first, then renamed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable

from ... import codec
from ...config import StorageConfig
from ..rules import quarantine_keys
from .files import Files
from .folders import Folders
from .syncs import Syncs
from .tree import Tree

logger = logging.getLogger("flatfile_chat_database")


class Wholes:
    """Writes documents, finished files, and what is set aside."""

    def __init__(self, config: StorageConfig, files: Files, tree: Tree, folders: Folders, syncs: Syncs) -> None:
        self._config = config
        self._files = files
        self._tree = tree
        self._folders = folders
        self._syncs = syncs

    def put(self, key: str, data: bytes) -> None:
        """Replace a document: whoever reads it sees the old one or the new one. The journal makes it durable."""
        path = self._tree.temporary(key)
        # At the level `normal` the journal may be lost, and then the old document must not be lost with it.
        self._write(key, path, [data], sync=self._config.durability == "normal")
        self._files.rename(path, self._tree.path(key))

    def stage(self, key: str, pieces: Iterable[bytes]) -> str:
        """Write a finished file beside a key, durable with its name; return its path."""
        path = self._tree.temporary(key)
        self._write(key, path, pieces, sync=True)
        self._syncs.folders_of([key])
        return path

    def set_aside(self, key: str, pieces: Iterable[bytes], reason: str, offset: int) -> None:
        """Keep bytes in the quarantine, durable, with a note of where they were."""
        note_key, bytes_key = quarantine_keys(self._config)
        self._keep(bytes_key, pieces)
        size = self._files.status(self._tree.path(bytes_key)).size
        note = {"key": key, "reason": reason, "offset": offset, "size": size}
        self._keep(note_key, [codec.encode_document(note)])
        logger.warning("%s: %s; set aside as %s", key, reason, bytes_key)

    def _keep(self, key: str, pieces: Iterable[bytes]) -> None:
        self._files.rename(self.stage(key, pieces), self._tree.path(key))
        self._syncs.folders_of([key])

    def _write(self, key: str, path: str, pieces: Iterable[bytes], *, sync: bool) -> None:
        descriptor = self._folders.fill(key.rpartition("/")[0], lambda: self._files.create(path))
        try:
            try:
                for piece in pieces:
                    self._files.write_all(descriptor, piece)
                if sync:
                    self._syncs.file(descriptor)
            finally:
                self._files.close(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                self._files.remove(path)
            raise
