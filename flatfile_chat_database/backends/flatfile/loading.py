"""Filling a store: many whole files, written beside their places and made durable together, then named in one commit.

The journal gets their names only, and as the new files have their bytes on disk already, doing it again is a rename.
Syncing 2,000 files one by one takes half a second and more; one sync of the file system takes as long as its bytes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

from .files import Files
from .jobs import Place
from .syncs import Syncs
from .tree import Tree

FEW = 16
"""So few keys are put through the journal: that takes one flush, and a sync of the file system concerns everybody's."""


class Loading:
    """Finished files that have no names yet; every method blocks."""

    def __init__(self, files: Files, tree: Tree, syncs: Syncs) -> None:
        self._files = files
        self._tree = tree
        self._syncs = syncs
        self._lock = threading.Lock()
        self._discarded = False
        self._folder = ""
        self.places: list[Place] = []
        """What gives each file its name."""

    def write(self, items: Sequence[tuple[str, bytes]]) -> None:
        """Write the bytes of each key beside its place; when this returns they are durable, with these names.

        The store's folder is there.
        """
        with self._lock:
            if self._discarded:
                return
            root = self._files.open_to_read(self._tree.path(""))  # first: what fails from now on is told by its sync
            try:
                for key, data in items:
                    path = self._tree.temporary(key)
                    self.places.append(Place(path, key, loaded=True))
                    self._write(path, data)
                if not self._files.sync_file_system(root):
                    start = len(self._tree.path("")) + 1
                    self._syncs.files(place.temporary[start:] for place in self.places)
            finally:
                self._files.close(root)

    def discard(self) -> None:
        """Remove the files that have no other name by now; waits for a write that a caller did not wait for."""
        with self._lock:
            self._discarded = True
            for place in self.places:
                with contextlib.suppress(OSError):
                    self._files.remove(place.temporary)

    def _write(self, path: str, data: bytes) -> None:
        folder = path.rpartition("/")[0]
        if folder != self._folder:  # to be told that it is missing takes longer than to be told that it is there
            make_folders(self._files, folder)
            self._folder = folder
        descriptor = self._files.create(path)
        try:
            self._files.write_all(descriptor, data)
        finally:
            self._files.close(descriptor)


def make_folders(files: Files, path: str) -> None:
    """Make a folder and those above it that are missing; their names become durable with that of what is in them."""
    try:
        files.make_folder(path)
    except FileNotFoundError:
        make_folders(files, path.rpartition("/")[0])
        make_folders(files, path)
    except FileExistsError:
        return
