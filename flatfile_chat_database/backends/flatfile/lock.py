"""The store's lock file: who holds it may write, and what it holds says which batch of lines is being written.

The file is made at the first write and never removed or stolen; the kernel lets go of the lock when its holder dies.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass

from ... import codec
from ...errors import ConfigurationError, UnavailableError
from .files import Files
from .folders import Folders

NETWORK_FILE_SYSTEMS = frozenset(
    ("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "glusterfs", "lustre", "gpfs", "fuse.sshfs", "fuse.s3fs")
)
_FIRST_PAUSE_SECONDS = 0.0002
_LONGEST_PAUSE_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Mark:
    """A batch of lines that is being appended: taking it back means cutting the log to `size` bytes."""

    key: str
    size: int


class StoreLock:
    """The exclusive, advisory lock on a store, between threads, handles and processes of one host."""

    def __init__(
        self, files: Files, folders: Folders, root: str, key: str, *, timeout_seconds: float, allow_network: bool
    ) -> None:
        """Lock the file `key` of the store in the folder `root`."""
        self._files = files
        self._folders = folders
        self._root = root
        self._key = key
        self._path = f"{root}/{key}"
        self._timeout = timeout_seconds
        self._allow_network = allow_network
        self._descriptor: int | None = None
        self._marked = False

    @property
    def key(self) -> str:
        """Where the lock file is, relative to the store."""
        return self._key

    @property
    def is_open(self) -> bool:
        """Whether a descriptor is kept."""
        return self._descriptor is not None

    def take(self) -> None:
        """Wait for the lock.

        Raises:
            UnavailableError: Somebody else has held it for the whole timeout.
            ConfigurationError: The store is on a network file system.
        """
        deadline = time.monotonic() + self._timeout
        pause = _FIRST_PAUSE_SECONDS
        while True:
            if self._descriptor is None:
                self._refuse_network_file_system()
                self._folders.make(self._key.rpartition("/")[0])
                self._descriptor = self._files.open_lock(self._path)
            if self._files.try_lock(self._descriptor):
                if self._has_its_name():
                    return
                self.close()  # somebody replaced the file, and a lock on the old one excludes nobody
                self._folders.forget()
                continue
            if time.monotonic() >= deadline:
                raise UnavailableError(
                    f"Another process has held the lock of the store for {self._timeout} s.",
                    key=self._key,
                    hint="Look which process has it (lsof), or raise lock_timeout_seconds.",
                )
            time.sleep(pause * (0.5 + random.random()))
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    def release(self) -> None:
        """Let others write."""
        if self._descriptor is not None:
            self._files.unlock(self._descriptor)

    def close(self) -> None:
        """Let go of the descriptor."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            self._files.close(descriptor)

    # --- marks ---------------------------------------------------------------------------------------

    @property
    def is_marked(self) -> bool:
        """Whether this holder has noted a batch and not cleared it yet."""
        return self._marked

    def mark(self, mark: Mark) -> None:
        """Note durably where a batch of lines begins."""
        descriptor = self._held()
        self._marked = True
        note = json.dumps({"key": mark.key, "size": mark.size}).encode() + b"\n"
        while note:
            note = note[self._files.write(descriptor, note) :]
        self._files.sync(descriptor)

    def clear_marks(self) -> None:
        """Forget all batches durably."""
        descriptor = self._held()
        self._files.truncate(descriptor, 0)
        self._files.sync(descriptor)
        self._marked = False

    def marks(self) -> list[Mark]:
        """Return the batches that a process noted and did not clear, for it died.

        Raises:
            IntegrityError: The lock file holds something else.
        """
        notes = self._files.read(self._held(), 1 << 20, 0)
        found = []
        for line in notes.split(b"\n")[:-1]:  # half a note was never followed by its batch
            note = codec.decode_object(line, self._key)
            found.append(codec.decode_as(Mark, note, self._key))
        self._marked = self._marked or bool(notes)
        return found

    def noted(self) -> bool:
        """Return, without the lock, whether there is a batch of a process at work or of a dead one."""
        try:
            return self._files.status(self._path).size > 0
        except FileNotFoundError:
            return False

    # -------------------------------------------------------------------------------------------------

    def _held(self) -> int:
        if self._descriptor is None:
            raise UnavailableError("The store's lock is not held.", key=self._key)
        return self._descriptor

    def _has_its_name(self) -> bool:
        try:
            named = self._files.status(self._path)
        except FileNotFoundError:
            return False
        return named.is_same_file(self._files.status_of(self._held()))

    def _refuse_network_file_system(self) -> None:
        if self._allow_network:
            return
        place = self._root
        while True:
            try:
                self._files.status(place)
                break
            except FileNotFoundError:
                place = place.rpartition("/")[0] or "/"
        kind = self._files.file_system(place)
        if kind in NETWORK_FILE_SYSTEMS:
            raise ConfigurationError(
                f"The store {self._root!r} is on a network file system ({kind}), whose locks cannot be trusted.",
                hint="Use a local disk, or set allow_network_file_system if only one host writes.",
            )
