"""The lock files of a store. The kernel lets go of a lock when its holder dies; no file is removed or stolen.

- `StoreLock`: who holds it may write. Its file holds the mark: up to where the journal has been done to the files.
- `Presence`: every store that may write shares it, so whoever can have it alone is alone.
- `LockFile` itself: who holds that of `checkpoint.py` folds the journal into the files.
"""

from __future__ import annotations

import contextlib
import random
import time
import zlib
from collections.abc import Callable, Iterator

import msgspec

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
_MARK_BYTES = 256
_FIRST_PAUSE_SECONDS = 0.0001
_LONGEST_PAUSE_SECONDS = 0.002


class Mark(msgspec.Struct, frozen=True):
    """Up to where the journal has been done to the files."""

    segment: str
    applied: int

    def encode(self) -> bytes:
        """Return it as the lock file has it: with a checksum, for anybody may have written to that file."""
        text = f"{self.segment} {self.applied}".encode()
        return b"%s %08x\n" % (text, zlib.crc32(text))

    @classmethod
    def decode(cls, data: bytes) -> Mark | None:
        """Return the mark in the bytes of a lock file, or None if there is none."""
        text, _, crc = data.partition(b"\n")[0].rpartition(b" ")
        if not text or crc != b"%08x" % zlib.crc32(text):
            return None
        segment, _, applied = text.decode(errors="replace").partition(" ")
        return cls(segment, int(applied)) if applied.isdecimal() else None


class LockFile:
    """A file that is locked as a whole, between threads, handles and processes of one host."""

    def __init__(self, files: Files, folders: Folders, root: str, key: str, *, timeout_seconds: float) -> None:
        """Lock the file `key` of the store in the folder `root`."""
        self._files = files
        self._folders = folders
        self._path = f"{root}/{key}"
        self._timeout = timeout_seconds
        self._descriptor: int | None = None
        self._identity: tuple[int, int] | None = None
        self.key = key

    @property
    def is_open(self) -> bool:
        """Whether a descriptor is kept."""
        return self._descriptor is not None

    def take(self) -> None:
        """Wait for the lock.

        Raises:
            UnavailableError: Somebody else has held it for the whole timeout.
        """
        self._wait(self.try_take)

    def try_take(self) -> bool:
        """Take the lock if nobody holds or shares it."""
        return self._try(self._files.try_lock)

    def _try(self, lock: Callable[[int], bool]) -> bool:
        while True:
            if self._descriptor is None:
                self._open()
            descriptor = self._held()
            if not lock(descriptor):
                return False
            if self._has_its_name():
                return True
            self.close()  # somebody replaced the file, and a lock on the old one excludes nobody
            self._folders.forget()

    def _wait(self, attempt: Callable[[], bool]) -> None:
        if attempt():
            return
        deadline = time.monotonic() + self._timeout
        pause = _FIRST_PAUSE_SECONDS
        while not attempt():
            if time.monotonic() >= deadline:
                raise UnavailableError(
                    f"Another process has held the lock of the store for {self._timeout} s.",
                    key=self.key,
                    hint="Look which process has it (lsof), or raise lock_timeout_seconds.",
                )
            time.sleep(pause * (0.5 + random.random()))
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    def release(self) -> None:
        """Let others have it."""
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

    def _open(self) -> None:
        self._folders.make(self.key.rpartition("/")[0])
        self._descriptor = self._files.open_lock(self._path)
        self._identity = self._files.stamp_of(self._descriptor)[:2]

    def _held(self) -> int:
        if self._descriptor is None:
            raise UnavailableError("The store's lock is not held.", key=self.key)
        return self._descriptor

    def _has_its_name(self) -> bool:
        try:
            return self._files.measure(self._path)[:2] == self._identity
        except FileNotFoundError:
            return False


class StoreLock(LockFile):
    """The lock that every writer takes, and the mark in its file."""

    def __init__(
        self, files: Files, folders: Folders, root: str, key: str, *, timeout_seconds: float, allow_network: bool
    ) -> None:
        """Refuse a network file system, where locks cannot be trusted, unless `allow_network`."""
        super().__init__(files, folders, root, key, timeout_seconds=timeout_seconds)
        self._root = root
        self._allow_network = allow_network
        self._known: tuple[bytes, Mark | None] = b"", None  # what was read or written last

    def read_mark(self) -> Mark | None:
        """Return the mark; None if the file holds none. The lock must be held."""
        data = self._files.read(self._held(), _MARK_BYTES, 0)
        known, mark = self._known
        if data != known:
            mark = Mark.decode(data)
            self._known = data, mark
        return mark

    def write_mark(self, mark: Mark) -> None:
        """Replace the mark. It is not flushed: while there is journal, after a power cut all of it is done again."""
        data = mark.encode()
        if self._files.write_at(self._held(), data, 0) != len(data):
            raise UnavailableError("The lock file could not be written whole.", key=self.key)
        self._known = data, mark

    def sync(self) -> None:
        """Make the mark durable, before what it would be compared with is gone; for any thread."""
        descriptor = self._files.open_to_read(self._path)
        try:
            self._files.sync(descriptor)
        finally:
            self._files.close(descriptor)

    @contextlib.contextmanager
    def glance(self) -> Iterator[Mark | None]:
        """Hold the lock, and give the mark, if nobody else holds it right now; for any thread."""
        try:
            descriptor = self._files.open_to_read(self._path)
        except FileNotFoundError:
            yield None
            return
        try:
            free = self._files.try_lock(descriptor)
            yield Mark.decode(self._files.read(descriptor, _MARK_BYTES, 0)) if free else None
        finally:
            self._files.close(descriptor)

    def peek(self) -> Mark | None:
        """Return the mark without taking the lock; it may be about to move."""
        try:
            descriptor = self._files.open_to_read(self._path)
        except FileNotFoundError:
            return None
        try:
            return Mark.decode(self._files.read(descriptor, _MARK_BYTES, 0))
        finally:
            self._files.close(descriptor)

    def _open(self) -> None:
        self._refuse_network_file_system()
        super()._open()

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


class Presence(LockFile):
    """What every store that writes shares. Joined and left under the store's lock, so no two can both be first."""

    joined = False

    def join(self) -> bool:
        """Be present; return whether nobody else was. Then it is held alone until `share`."""
        alone = self.try_take()
        if not alone:
            self.share()
        self.joined = True
        return alone

    def share(self) -> None:
        """Let others be present too."""
        self._wait(lambda: self._try(self._files.try_share))

    def is_alone(self) -> bool:
        """Tell whether nobody else is present; if so it is held alone until `share` or `leave`."""
        alone = self.try_take()
        if not alone:
            self.share()  # a lock that could not be changed into another one is lost (flock(2))
        return alone

    def leave(self) -> None:
        """Be present no more."""
        self.joined = False
        self.close()
