"""The one seam to the operating system: every system call of the flat-file backend is made here.

`Files` is what tests replace to lose power, tear writes or fail the n-th call. It decides nothing: what to call, in
which order and what an error means is the engine's business. All methods raise OSError as the system gives it.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Literal

import msgspec

FileKind = Literal["file", "folder", "link", "other"]

PRIVATE_FILE = 0o600
PRIVATE_FOLDER = 0o700

_GET_GENERATION = 0x80007601 | struct.calcsize("l") << 16
"""FS_IOC_GETVERSION, _IOR('v', 1, long), of linux/fs.h."""

_COMMON = os.O_CLOEXEC | os.O_NOFOLLOW

_FEW_MEASURES = 64
"""As many are taken with `os.lstat`: what is better takes ten milliseconds to load, and has to pay for that."""


class FileStatus(msgspec.Struct, frozen=True):
    """What the file system knows of a path or descriptor."""

    kind: FileKind
    device: int
    inode: int
    size: int
    """Bytes."""
    modified: int
    """Nanoseconds since the epoch."""
    mode: int
    """Permission bits."""
    links: int

    def is_same_file(self, other: FileStatus) -> bool:
        """Tell whether both stand for one file, whatever its names."""
        return (self.device, self.inode) == (other.device, other.inode)


class Files:
    """System calls on the local file system, counted in `counters`."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter(bytes_read=0, bytes_written=0, syncs=0)
        self._counting = threading.Lock()
        self._measured = 0
        self._measure: Callable[[str], tuple[int, int, int]] | None = None
        self._sync_all: Callable[[int], bool] | None = None

    def count(self, name: str, number: int = 1) -> None:
        """Add to a counter; any thread may."""
        with self._counting:
            self.counters[name] += number

    # --- descriptors ---------------------------------------------------------------------------------

    def open_to_read(self, path: str) -> int:
        """Open an existing file; never follows a symbolic link in the last place, never waits for a pipe."""
        return _above_standard(os.open(path, os.O_RDONLY | os.O_NONBLOCK | _COMMON))

    def open_to_append(self, path: str) -> int:
        """Open an existing file for reading and for appending."""
        return _above_standard(os.open(path, os.O_RDWR | os.O_APPEND | os.O_NONBLOCK | _COMMON))

    def open_to_change(self, path: str) -> int:
        """Open an existing file for reading and for writing at offsets."""
        return _above_standard(os.open(path, os.O_RDWR | os.O_NONBLOCK | _COMMON))

    def create(self, path: str) -> int:
        """Create a private file that must not exist."""
        return _above_standard(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _COMMON, PRIVATE_FILE))

    def create_to_append(self, path: str) -> int:
        """Create a private file that must not exist, for reading and for appending."""
        return _above_standard(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | _COMMON, PRIVATE_FILE))

    def open_lock(self, path: str) -> int:
        """Open a private lock file for reading and writing, creating it if it is absent."""
        return _above_standard(os.open(path, os.O_RDWR | os.O_CREAT | _COMMON, PRIVATE_FILE))

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def read(self, descriptor: int, size: int, offset: int) -> bytes:
        """Read up to `size` bytes at `offset`; fewer only at the end of the file."""
        data = os.pread(descriptor, size, offset)
        self.count("bytes_read", len(data))
        return data

    def write(self, descriptor: int, data: bytes | memoryview) -> int:
        """Write at the end (files open for appending) or at the position; return how many bytes were taken.

        Whoever writes counts them: one by one is dear where lines are written to many logs.
        """
        return os.write(descriptor, data)

    def write_at(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        """Write at an offset (files not open for appending); return how many bytes were taken."""
        return os.pwrite(descriptor, data, offset)

    def write_all(self, descriptor: int, data: bytes) -> None:
        """Write all of `data` at the end or at the position."""
        rest = memoryview(data)
        while rest:
            rest = rest[self.write(descriptor, rest) :]
        self.count("bytes_written", len(data))

    def write_all_at(self, descriptor: int, data: bytes, offset: int) -> None:
        """Write all of `data` at an offset."""
        done = self.write_at(descriptor, data, offset)
        while done < len(data):
            done += self.write_at(descriptor, memoryview(data)[done:], offset + done)
        self.count("bytes_written", len(data))

    def reserve(self, descriptor: int, offset: int, size: int) -> None:
        """Make room on the medium for `size` bytes from `offset`; what was not there reads as NULs."""
        os.posix_fallocate(descriptor, offset, size)

    def drop_cache(self, descriptor: int) -> None:
        """Forget what the system keeps of a file in memory and is on disk, so that reading tells what is on disk."""
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def truncate(self, descriptor: int, size: int) -> None:
        os.ftruncate(descriptor, size)

    def sync(self, descriptor: int) -> None:
        """Make a file's bytes and size durable."""
        self.count("syncs")
        os.fdatasync(descriptor)

    def sync_file_system(self, descriptor: int) -> bool:
        """Make durable what was written to the file system of an open file since that was opened.

        Return False, having done nothing, where the system cannot, or would not tell of an error.
        """
        if self._sync_all is None:
            self._sync_all = _syncfs()
        if not self._sync_all(descriptor):
            return False
        self.count("syncs")
        return True

    def status_of(self, descriptor: int) -> FileStatus:
        return _status(os.fstat(descriptor))

    def generation(self, descriptor: int) -> int:
        """Return what tells a file from an earlier one of the same inode; 0 where the file system does not know."""
        try:
            return int.from_bytes(fcntl.ioctl(descriptor, _GET_GENERATION, bytes(8))[:4], sys.byteorder)
        except OSError:
            return 0

    def try_lock(self, descriptor: int) -> bool:
        """Take the exclusive advisory lock of an open file; return False if another holds it."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def try_share(self, descriptor: int) -> bool:
        """Take the shared advisory lock of an open file instead of any it has; return False if that is exclusive."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(self, descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)

    # --- names ---------------------------------------------------------------------------------------

    def status(self, path: str) -> FileStatus:
        """Return the status of a path itself, not of what a symbolic link points to."""
        return _status(os.lstat(path))

    def stamp(self, path: str) -> tuple[int, int, int, int]:
        """Return device, inode, size and time of change of a path itself: what tells whether a file is another now."""
        result = os.lstat(path)
        return result.st_dev, result.st_ino, result.st_size, result.st_mtime_ns

    def stamp_of(self, descriptor: int) -> tuple[int, int, int, int]:
        """Return the same of an open file."""
        result = os.fstat(descriptor)
        return result.st_dev, result.st_ino, result.st_size, result.st_mtime_ns

    def measure(self, path: str) -> tuple[int, int, int]:
        """Return device, inode and size of a path itself, without asking for its times if the system allows it.

        Asking for them would make the next flush after a write to it longer; see `untimed.py`.
        """
        if self._measure is None:
            self._measured += 1
            if self._measured > _FEW_MEASURES:
                self._measure = _measure_without_times()
            return _measure_with_times(path)
        return self._measure(path)

    def rename(self, source: str, target: str) -> None:
        """Give a file or folder another name, replacing a file of that name."""
        os.rename(source, target)

    def link(self, path: str, name: str) -> None:
        """Give a file one more name, which must be free; a symbolic link is not followed."""
        os.link(path, name, follow_symlinks=False)

    def remove(self, path: str) -> None:
        os.unlink(path)

    def make_folder(self, path: str) -> None:
        """Create a private folder that must not exist."""
        os.mkdir(path, PRIVATE_FOLDER)

    def remove_folder(self, path: str) -> None:
        """Remove an empty folder."""
        os.rmdir(path)

    def sync_folder(self, path: str) -> None:
        """Make the names in a folder durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.count("syncs")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def set_mode(self, path: str, mode: int) -> None:
        os.chmod(path, mode)

    def list_folder(self, path: str) -> list[tuple[str, FileKind]]:
        """Return the names in a folder with the kind of each, in no order."""
        with os.scandir(path) as entries:
            return [(entry.name, _entry_kind(entry)) for entry in entries]

    def file_system(self, path: str) -> str:
        """Return the type of the file system that holds an existing path, such as "ext4"; "" if unknown."""
        place = os.path.realpath(path)
        best, kind = "", ""
        try:
            with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
                for line in lines:
                    before, _, after = line.partition(" - ")
                    mount = before.split(" ")[4].replace("\\040", " ")
                    inside = place == mount or place.startswith(mount.rstrip("/") + "/")
                    if inside and len(mount) >= len(best):
                        best, kind = mount, after.split(" ")[0]
        except FileNotFoundError:
            return ""
        return kind


def _above_standard(descriptor: int) -> int:
    """Keep data out of descriptors 0 to 2, where a stray print would land in it."""
    if descriptor > 2:
        return descriptor
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(descriptor)


def _status(result: os.stat_result) -> FileStatus:
    mode = result.st_mode
    if stat.S_ISREG(mode):
        kind: FileKind = "file"
    elif stat.S_ISDIR(mode):
        kind = "folder"
    else:
        kind = "link" if stat.S_ISLNK(mode) else "other"
    return FileStatus(
        kind=kind,
        device=result.st_dev,
        inode=result.st_ino,
        size=result.st_size,
        modified=result.st_mtime_ns,
        mode=stat.S_IMODE(mode),
        links=result.st_nlink,
    )


def _entry_kind(entry: os.DirEntry[str]) -> FileKind:
    if entry.is_symlink():
        return "link"
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    return "file" if entry.is_file(follow_symlinks=False) else "other"


def _measure_without_times() -> Callable[[str], tuple[int, int, int]]:
    try:
        from .untimed import Statx  # it loads ctypes, for which a script of a few writes need not wait

        measure = Statx()
        measure("/")
        return measure
    except Exception:  # a Python without ctypes, another system, a sandbox, no memory left: it is only slower
        return _measure_with_times


def _measure_with_times(path: str) -> tuple[int, int, int]:
    result = os.lstat(path)
    return result.st_dev, result.st_ino, result.st_size


def _syncfs() -> Callable[[int], bool]:
    """Return the call that Python does not have; one that does nothing where there is none to rely on.

    Before Linux 5.8 it told of no error (syncfs(2)).
    """
    try:
        import ctypes

        release = tuple(int(number) for number in os.uname().release.split("-")[0].split(".")[:2])
        call = ctypes.CDLL(None, use_errno=True).syncfs if release >= (5, 8) else None
    except Exception:  # a Python without ctypes, another system: it is only slower
        call = None
    if call is None:
        return lambda descriptor: False

    def sync(descriptor: int) -> bool:
        if call(descriptor) != 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        return True

    return sync
