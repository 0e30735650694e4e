"""A file system in memory behind the one seam.

    disk = Disk()
    disk.make_folders("/data")
    one, other = SimulatedFiles(disk), SimulatedFiles(disk)  # two processes, with descriptors and locks of their own
    backend = FlatfileBackend(config, "/data/store", files=one)
    ...
    one.kill()  # kill -9: what was written stays in the cache, locks are let go

It behaves as a local file system of Linux does, errors included (a test compares both), but for what the seam cannot
reach: symbolic links, owners, several names of one file.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable
from typing import ClassVar

from ..backends.flatfile.files import PRIVATE_FILE, PRIVATE_FOLDER, FileKind, Files, FileStatus
from .disk import ROOT, Disk, Left, Node, Open, Renamed, Resized, Synced, Write

_DEVICE = 64
_FOLDER_BYTES = 4096
_LONGEST_NAME = 255
_LONGEST_PATH = 4096
_TICK_NANOSECONDS = 1_000_000
_FIRST_DESCRIPTOR = 3


class Killed(BaseException):
    """Raised by every call of a process that was killed; no handler of errors may stop it."""


Hook = Callable[["SimulatedFiles", str], None]
"""Called before a system call with its name. It may raise OSError, kill the process, or let another one work."""


class SimulatedFiles(Files):
    """The system calls of one process on a `Disk`."""

    CHANGING: ClassVar[frozenset[str]] = frozenset(
        [
            *("create", "create_to_append", "open_lock", "write", "write_at", "reserve", "truncate", "sync", "rename"),
            *("remove", "make_folder", "remove_folder", "sync_folder", "drop_cache", "close"),
            *("try_lock", "try_share", "unlock"),
        ]
    )
    """Calls that change something for others; a hook that looks at these alone sees every step of a process."""

    def __init__(self, disk: Disk) -> None:
        super().__init__()
        self.disk = disk
        self.before: Hook | None = None
        self.syncs = 0
        """How many syncs were tried, of files and of folders."""
        self.failing_syncs: frozenset[int] = frozenset()
        """Which of them, counted from 1, fail with EIO and lose what they should have made durable."""
        self._descriptors: dict[int, Open] = {}
        self._next = _FIRST_DESCRIPTOR
        self._dead = False

    def count(self, name: str, number: int = 1) -> None:
        self.counters[name] += number

    def kill(self) -> None:
        """Die as by kill -9: nothing that was written is undone, locks and descriptors are let go."""
        self._dead = True
        for opened in self._descriptors.values():
            self.disk.unlock(opened)
        self._descriptors.clear()

    def _call(self, name: str) -> None:
        if self.before is not None and not self._dead:
            self.before(self, name)
        if self._dead:
            raise Killed(name)

    # --- paths -----------------------------------------------------------------------------------------

    def _find(self, path: str) -> int:
        nodes = self.disk.nodes
        number = ROOT
        for name in _names(path):
            found = nodes[number].entries.get(name)
            if found is None:
                if nodes[number].kind != "folder":
                    raise _error(errno.ENOTDIR, path)
                raise _error(errno.ENAMETOOLONG if len(os.fsencode(name)) > _LONGEST_NAME else errno.ENOENT, path)
            number = found
        return number

    def _parent(self, path: str) -> tuple[int, str, int | None]:
        """Return the folder that a path's last name is in, that name, and the number behind it if there is one."""
        above, _, name = path.rstrip("/").rpartition("/")
        folder = self._find(above)
        node = self.disk.nodes[folder]
        if node.kind != "folder":
            raise _error(errno.ENOTDIR, path)
        return folder, name, node.entries.get(name)

    def _check_length(self, name: str, path: str) -> None:
        if len(os.fsencode(name)) > _LONGEST_NAME:
            raise _error(errno.ENAMETOOLONG, path)

    def _describe(self, number: int, *, writing: bool = False, appending: bool = False) -> int:
        descriptor = self._next
        self._next += 1
        self._descriptors[descriptor] = Open(number, writing=writing, appending=appending)
        return descriptor

    def _opened(self, descriptor: int) -> Open:
        opened = self._descriptors.get(descriptor)
        if opened is None:
            raise _error(errno.EBADF)
        return opened

    def _opened_to_write(self, descriptor: int) -> Open:
        opened = self._opened(descriptor)
        if not opened.writing:
            raise _error(errno.EBADF)
        return opened

    # --- descriptors -----------------------------------------------------------------------------------

    def open_to_read(self, path: str) -> int:
        self._call("open_to_read")
        return self._describe(self._find(path))

    def open_to_append(self, path: str) -> int:
        self._call("open_to_append")
        return self._describe(self._find_file(path), writing=True, appending=True)

    def open_to_change(self, path: str) -> int:
        self._call("open_to_change")
        return self._describe(self._find_file(path), writing=True)

    def _find_file(self, path: str) -> int:
        number = self._find(path)
        if self.disk.nodes[number].kind == "folder":
            raise _error(errno.EISDIR, path)
        return number

    def create(self, path: str) -> int:
        self._call("create")
        return self._create(path)

    def _create(self, path: str) -> int:
        folder, name, found = self._parent(path)
        self._check_length(name, path)
        if found is not None or not name:
            raise _error(errno.EEXIST, path)
        return self._describe(self.disk.make("file", PRIVATE_FILE, folder, name), writing=True)

    def create_to_append(self, path: str) -> int:
        self._call("create_to_append")
        descriptor = self._create(path)
        self._opened(descriptor).appending = True
        return descriptor

    def open_lock(self, path: str) -> int:
        self._call("open_lock")
        folder, name, found = self._parent(path)
        self._check_length(name, path)
        if found is None and name:
            self.disk.make("file", PRIVATE_FILE, folder, name)
        return self._describe(self._find_file(path), writing=True)

    def close(self, descriptor: int) -> None:
        self._call("close")
        self.disk.unlock(self._opened(descriptor))
        del self._descriptors[descriptor]

    def read(self, descriptor: int, size: int, offset: int) -> bytes:
        self._call("read")
        node = self.disk.nodes[self._opened(descriptor).node]
        if offset < 0:
            raise _error(errno.EINVAL)
        if node.kind == "folder":
            raise _error(errno.EISDIR)
        end = min(offset + size, node.size)
        data = node.data[offset:end]
        data += bytes(max(end - max(offset, len(node.data)), 0))
        self.count("bytes_read", len(data))
        return data

    def write(self, descriptor: int, data: bytes | memoryview) -> int:
        self._call("write")
        opened = self._opened_to_write(descriptor)
        offset = self.disk.nodes[opened.node].size if opened.appending else opened.position
        opened.position = offset + len(data)
        return self._write(opened, data, offset)

    def write_at(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        self._call("write_at")
        if offset < 0:
            raise _error(errno.EINVAL)
        opened = self._opened_to_write(descriptor)
        if opened.appending:  # as Linux does, though POSIX says otherwise
            offset = self.disk.nodes[opened.node].size
        return self._write(opened, data, offset)

    def _write(self, opened: Open, data: bytes | memoryview, offset: int) -> int:
        if len(data):
            self.disk.do(Write(opened.node, offset, bytes(data), self.disk.moment))
        self.count("bytes_written", len(data))
        return len(data)

    def reserve(self, descriptor: int, offset: int, size: int) -> None:
        self._call("reserve")
        if offset < 0 or size <= 0:
            raise _error(errno.EINVAL)
        opened = self._opened_to_write(descriptor)
        if offset + size > self.disk.nodes[opened.node].size:
            self.disk.do(Resized(opened.node, offset + size, True, self.disk.moment))

    def drop_cache(self, descriptor: int) -> None:
        self._call("drop_cache")
        self.disk.drop_cache(self._opened(descriptor).node)

    def truncate(self, descriptor: int, size: int) -> None:
        self._call("truncate")
        opened = self._opened(descriptor)
        if size < 0 or not opened.writing:
            raise _error(errno.EINVAL)
        self.disk.do(Resized(opened.node, size, False, self.disk.moment))

    def sync(self, descriptor: int) -> None:
        self._call("sync")
        self.count("syncs")
        self._sync(self._opened(descriptor).node)

    def _sync(self, number: int) -> None:
        self.syncs += 1
        failed = self.syncs in self.failing_syncs
        self.disk.log.append(Synced(number, failed))
        if failed:
            raise _error(errno.EIO)

    def sync_file_system(self, descriptor: int) -> bool:
        self._call("sync_file_system")
        self._opened(descriptor)
        self.count("syncs")
        self.syncs += 1
        failed = self.syncs in self.failing_syncs
        self.disk.log += [Synced(number, failed) for number in self.disk.nodes]
        if failed:
            raise _error(errno.EIO)
        return True

    def status_of(self, descriptor: int) -> FileStatus:
        self._call("status_of")
        return self._status(self._opened(descriptor).node)

    def try_lock(self, descriptor: int) -> bool:
        self._call("try_lock")
        return self.disk.lock(self._opened(descriptor), exclusive=True)

    def try_share(self, descriptor: int) -> bool:
        self._call("try_share")
        return self.disk.lock(self._opened(descriptor), exclusive=False)

    def unlock(self, descriptor: int) -> None:
        self._call("unlock")
        self.disk.unlock(self._opened(descriptor))

    # --- names -----------------------------------------------------------------------------------------

    def status(self, path: str) -> FileStatus:
        self._call("status")
        return self._status(self._find(path))

    def stamp(self, path: str) -> tuple[int, int, int, int]:
        self._call("stamp")
        status = self._status(self._find(path))
        return status.device, status.inode, status.size, status.modified

    def measure(self, path: str) -> tuple[int, int, int]:
        self._call("measure")
        status = self._status(self._find(path))
        return status.device, status.inode, status.size

    def stamp_of(self, descriptor: int) -> tuple[int, int, int, int]:
        self._call("stamp_of")
        status = self._status(self._opened(descriptor).node)
        return status.device, status.inode, status.size, status.modified

    def _status(self, number: int) -> FileStatus:
        node = self.disk.nodes[number]
        links = 1
        if node.kind == "folder":
            links = 2 + sum(self.disk.nodes[inner].kind == "folder" for inner in node.entries.values())
        return FileStatus(
            kind=node.kind,
            device=_DEVICE,
            inode=number,
            size=_FOLDER_BYTES if node.kind == "folder" else node.size,
            modified=node.modified * _TICK_NANOSECONDS,
            mode=node.mode,
            links=links,
        )

    def rename(self, source: str, target: str) -> None:
        self._call("rename")
        nodes = self.disk.nodes
        folder, name, number = self._parent(source)
        into, new, replaced = self._parent(target)
        if not name or not new:
            raise _error(errno.EBUSY, source)
        self._check_length(name, source)
        if number is None:
            raise _error(errno.ENOENT, source)
        self._check_length(new, target)
        if f"{target.rstrip('/')}/".startswith(f"{source.rstrip('/')}/") and replaced != number:
            raise _error(errno.EINVAL, source)
        if replaced == number:
            return
        if replaced is not None:
            if f"{source.rstrip('/')}/".startswith(f"{target.rstrip('/')}/"):
                raise _error(errno.ENOTEMPTY, source)
            if nodes[number].kind == "folder" and nodes[replaced].kind != "folder":
                raise _error(errno.ENOTDIR, source)
            if nodes[number].kind != "folder" and nodes[replaced].kind == "folder":
                raise _error(errno.EISDIR, source)
            if nodes[replaced].entries:
                raise _error(errno.ENOTEMPTY, source)
        self.disk.do(Renamed(folder, name, into, new, number, self.disk.moment))

    def remove(self, path: str) -> None:
        self._call("remove")
        folder, name, number = self._parent(path)
        self._check_length(name, path)
        if number is None and name:
            raise _error(errno.ENOENT, path)
        if number is None or self.disk.nodes[number].kind == "folder":
            raise _error(errno.EISDIR, path)
        self.disk.do(Left(folder, name, number, self.disk.moment))

    def make_folder(self, path: str) -> None:
        self._call("make_folder")
        folder, name, number = self._parent(path)
        self._check_length(name, path)
        if number is not None or not name:
            raise _error(errno.EEXIST, path)
        self.disk.make("folder", PRIVATE_FOLDER, folder, name)

    def remove_folder(self, path: str) -> None:
        self._call("remove_folder")
        folder, name, number = self._parent(path)
        if not name:
            raise _error(errno.EBUSY, path)
        self._check_length(name, path)
        if number is None:
            raise _error(errno.ENOENT, path)
        if self.disk.nodes[number].kind != "folder":
            raise _error(errno.ENOTDIR, path)
        if self.disk.nodes[number].entries:
            raise _error(errno.ENOTEMPTY, path)
        self.disk.do(Left(folder, name, number, self.disk.moment))

    def sync_folder(self, path: str) -> None:
        self._call("sync_folder")
        number = self._find(path)
        if self.disk.nodes[number].kind != "folder":
            raise _error(errno.ENOTDIR, path)
        self.count("syncs")
        self._sync(number)

    def set_mode(self, path: str, mode: int) -> None:
        self._call("set_mode")
        number = self._find(path)
        node = self.disk.nodes[number]
        # Durable at once: nothing that is stored hangs on it.
        self.disk.nodes[number] = Node(node.kind, mode, node.modified, node.data, node.size, node.entries)

    def list_folder(self, path: str) -> list[tuple[str, FileKind]]:
        self._call("list_folder")
        node = self.disk.nodes[self._find(path)]
        if node.kind != "folder":
            raise _error(errno.ENOTDIR, path)
        return [(name, self.disk.nodes[number].kind) for name, number in node.entries.items()]

    def file_system(self, path: str) -> str:
        return "ext4"


@functools.lru_cache(maxsize=4096)
def _names(path: str) -> tuple[str, ...]:
    """Return the names in a path; stores ask for the same ones over and over."""
    if len(path) > _LONGEST_NAME and len(os.fsencode(path)) >= _LONGEST_PATH:
        raise _error(errno.ENAMETOOLONG, path)
    return tuple(name for name in path.split("/") if name)


def _error(code: int, path: str | None = None) -> OSError:
    return OSError(code, os.strerror(code)) if path is None else OSError(code, os.strerror(code), path)
