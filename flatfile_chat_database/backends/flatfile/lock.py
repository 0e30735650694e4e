"""The store's lock file: who holds its lock may write. What it may hold besides is a note; see `batches.py`.

The file is made at the first write and never removed or stolen; the kernel lets go of the lock when its holder dies.
"""

from __future__ import annotations

import random
import time

from ...errors import ConfigurationError, UnavailableError
from .files import Files
from .folders import Folders

NETWORK_FILE_SYSTEMS = frozenset(
    (
        *("nfs", "nfs4", "cifs", "smb3", "smb2", "smbfs", "afs", "ceph", "glusterfs", "lustre", "gpfs", "beegfs"),
        *("davfs", "fuse.sshfs", "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse", "fuse.glusterfs", "fuse.cephfs"),
        *("fuse.juicefs", "fuse.davfs2", "fuse.ceph-fuse", "fuse.goofys", "fuse.blobfuse2"),
    )
)
_NOTES_BYTES = 1 << 20
_FIRST_PAUSE_SECONDS = 0.0002
_LONGEST_PAUSE_SECONDS = 0.005


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
            try:
                self._files.unlock(self._descriptor)
            except OSError:
                self.close()  # which lets go of the lock as well

    def close(self) -> None:
        """Let go of the descriptor."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            self._files.close(descriptor)

    # --- notes ---------------------------------------------------------------------------------------

    def note(self, text: bytes) -> None:
        """Write a line to the lock file durably; the file is as before if that fails."""
        descriptor = self._held()
        size = self._files.status_of(descriptor).size
        try:
            rest = memoryview(text)
            while rest:
                rest = rest[self._files.write(descriptor, rest) :]
            self._files.sync(descriptor)
        except OSError:
            self._files.truncate(descriptor, size)
            raise

    def clear_notes(self) -> None:
        """Empty the lock file durably."""
        descriptor = self._held()
        self._files.truncate(descriptor, 0)
        self._files.sync(descriptor)

    def notes(self) -> bytes:
        """Return what the lock file holds."""
        return self._files.read(self._held(), _NOTES_BYTES, 0)

    def peek(self) -> bytes:
        """Return what the lock file holds without taking the lock."""
        try:
            if self._files.status(self._path).size == 0:
                return b""
            descriptor = self._files.open_to_read(self._path)
        except FileNotFoundError:
            return b""
        try:
            return self._files.read(descriptor, _NOTES_BYTES, 0)
        finally:
            self._files.close(descriptor)

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
