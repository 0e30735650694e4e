"""A file system in memory behind the one seam, which remembers every change and what was made durable.

    disk = Disk()
    disk.make_folders("/store")
    one, other = disk.process(), disk.process()     # two processes, each with descriptors and locks of its own
    backend = FlatfileBackend(config, "/store", files=one)
    ...
    one.kill()                                      # kill -9: what was written stays in the cache, locks are let go

It behaves as a local file system of Linux does, errors included (a test compares both), but for what the seam cannot
reach: symbolic links, owners, several names of one file. `disk.log` holds the effects of all calls in order;
`crashes.py` derives from it what a power loss may leave.

Nodes are never changed in place, so a snapshot of a disk is a copy of one dictionary.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from typing import ClassVar

import msgspec

from ..backends.flatfile.files import PRIVATE_FILE, PRIVATE_FOLDER, FileKind, Files, FileStatus

ROOT = 1
"""The number of the folder "/"."""
_DEVICE = 64
_FOLDER_BYTES = 4096
_LONGEST_NAME = 255
_LONGEST_PATH = 4096
_TICK_NANOSECONDS = 1_000_000
_FIRST_DESCRIPTOR = 3


class Killed(BaseException):
    """Raised by every call of a process that was killed; no handler of errors may stop it."""


# --- what is on a disk ---------------------------------------------------------------------------------


class Node(msgspec.Struct, frozen=True):
    """A file or a folder."""

    kind: FileKind
    mode: int
    modified: int
    """Effects before the last change."""
    data: bytes = b""
    """Of a file; what is missing up to `size` reads as NULs, so reserved room costs nothing."""
    size: int = 0
    entries: Mapping[str, int] = {}
    """Of a folder: the number of the node behind each name."""

    def content(self) -> bytes:
        """Return all bytes of a file."""
        return self.data + bytes(self.size - len(self.data))


Nodes = dict[int, Node]
"""A disk, or a state of one: nodes by number."""

Choice = tuple[int, int, bool]
"""Which part of a write reached the disk: from a byte up to another one, and whether the size counts all of it."""


def whole(effect: Effect) -> Choice:
    """Return the choice of an effect that reached the disk completely."""
    return (0, len(effect.data), True) if isinstance(effect, Write) else (0, 0, True)


class Made(msgspec.Struct, frozen=True):
    """A node came to be. It is not to be found before an `Entered`, so nothing depends on whether it is durable."""

    node: int
    kind: FileKind
    mode: int
    moment: int

    def apply(self, nodes: Nodes, choice: Choice) -> None:
        nodes[self.node] = Node(self.kind, self.mode, self.moment)


class Write(msgspec.Struct, frozen=True):
    """Bytes were written into a file, which grew if they reach behind its end."""

    node: int
    offset: int
    data: bytes
    moment: int

    def apply(self, nodes: Nodes, choice: Choice) -> None:
        start, stop, grown = choice
        node = nodes[self.node]
        data, size = node.data, node.size
        if stop > start:
            begin, end = self.offset + start, self.offset + stop
            if len(data) < begin:
                data += bytes(begin - len(data))
            data = data[:begin] + self.data[start:stop] + data[end:]
            size = max(size, end)
        if grown:
            size = max(size, self.offset + len(self.data))
        nodes[self.node] = Node(node.kind, node.mode, self.moment, data, size)


class Resized(msgspec.Struct, frozen=True):
    """A file was cut, or grew by NULs."""

    node: int
    size: int
    reserving: bool
    """It may only grow: room was reserved."""
    moment: int

    def apply(self, nodes: Nodes, choice: Choice) -> None:
        node = nodes[self.node]
        size = max(self.size, node.size) if self.reserving else self.size
        if choice[2]:
            nodes[self.node] = Node(node.kind, node.mode, self.moment, node.data[:size], size)


class Entered(msgspec.Struct, frozen=True):
    """A folder got a name for a new node."""

    folder: int
    name: str
    node: int
    moment: int

    def apply(self, nodes: Nodes, choice: Choice) -> None:
        if choice[2]:
            _rename_in(nodes, self.folder, {self.name: self.node}, self.moment)


class Left(msgspec.Struct, frozen=True):
    """A name was taken away: of a file, or of an empty folder."""

    folder: int
    name: str
    node: int
    moment: int

    def apply(self, nodes: Nodes, choice: Choice) -> None:
        if choice[2] and nodes[self.folder].entries.get(self.name) == self.node:
            _rename_in(nodes, self.folder, {self.name: None}, self.moment)


class Renamed(msgspec.Struct, frozen=True):
    """A node got another name, which replaces what had it. Both happen or neither does."""

    folder: int
    name: str
    target: int
    """The folder of the new name."""
    new: str
    node: int
    moment: int

    def apply(self, nodes: Nodes, choice: Choice) -> None:
        if choice[2]:
            if nodes[self.folder].entries.get(self.name) == self.node:
                _rename_in(nodes, self.folder, {self.name: None}, self.moment)
            _rename_in(nodes, self.target, {self.new: self.node}, self.moment)


def _rename_in(nodes: Nodes, folder: int, names: Mapping[str, int | None], moment: int) -> None:
    node = nodes[folder]
    entries = {name: number for name, number in {**node.entries, **names}.items() if number is not None}
    nodes[folder] = Node(node.kind, node.mode, moment, entries=entries)


class Synced(msgspec.Struct, frozen=True):
    """The bytes and the size of a file, or the names in a folder, were made durable; or an attempt failed."""

    node: int
    failed: bool = False


class Dropped(msgspec.Struct, frozen=True):
    """The cache of a file was dropped: what a failed sync left behind is read as it is on the disk."""

    node: int


Effect = Made | Write | Resized | Entered | Left | Renamed
Event = Effect | Synced | Dropped


def touches(effect: Effect) -> tuple[int, ...]:
    """Return the nodes of which any, when it is synced, makes an effect durable."""
    match effect:
        case Write(node=node) | Resized(node=node):
            return (node,)
        case Entered(folder=folder) | Left(folder=folder):
            return (folder,)
        case Renamed(folder=folder, target=target):
            return folder, target
    return ()


class Disk:
    """A disk and its cache: what running processes see, and the log of how it came to be."""

    def __init__(self, nodes: Nodes | None = None) -> None:
        """Begin with a state, all of it durable; with an empty disk by default."""
        self.initial: Nodes = dict(nodes) if nodes is not None else {ROOT: Node("folder", PRIVATE_FOLDER, 0)}
        self.nodes: Nodes = dict(self.initial)
        self.log: list[Event] = []
        self._first = max(node.modified for node in self.nodes.values()) + 1
        self._next = max(self.nodes) + 1
        self._locks: dict[int, dict[_Open, bool]] = {}

    def process(self) -> SimulatedFiles:
        """Return the system calls of another process."""
        return SimulatedFiles(self)

    def make_folders(self, path: str) -> None:
        """Make durable folders, as they were before any process began."""
        place = ROOT
        for name in filter(None, path.split("/")):
            if name not in self.nodes[place].entries:
                self.nodes[self._next] = Node("folder", PRIVATE_FOLDER, 0)
                _rename_in(self.nodes, place, {name: self._next}, 0)
                self._next += 1
            place = self.nodes[place].entries[name]
        self.initial = dict(self.nodes)

    def paths(self) -> dict[str, Node]:
        """Return everything that has a path, by path."""
        return paths_of(self.nodes)

    def make(self, kind: FileKind, mode: int, folder: int, name: str) -> int:
        """Make a node with a name; return its number."""
        number = self._next
        self._next += 1
        self.do(Made(number, kind, mode, self.moment))
        self.do(Entered(folder, name, number, self.moment))
        return number

    @property
    def moment(self) -> int:
        """The time, which goes on with each effect."""
        return self._first + len(self.log)

    def do(self, effect: Effect) -> None:
        """Let an effect happen, and remember it."""
        effect.apply(self.nodes, whole(effect))
        self.log.append(effect)

    def drop_cache(self, number: int) -> None:
        """Let running processes read from a file what a failed sync has left of it."""
        lost = lost_by_failed_syncs(self.log)
        if not any(number in touches(self.effect(index)) for index in lost):
            return
        self.log.append(Dropped(number))
        nodes = {number: self.initial.get(number, Node("file", PRIVATE_FILE, 0))}
        for index, event in enumerate(self.log):
            if isinstance(event, Write | Resized) and event.node == number:
                event.apply(nodes, (0, 0, True) if index in lost and isinstance(event, Write) else whole(event))
        self.nodes[number] = nodes[number]

    def effect(self, index: int) -> Effect:
        """Return an effect of the log."""
        event = self.log[index]
        if isinstance(event, Synced | Dropped):
            raise TypeError(f"{event} is no effect")
        return event

    def lock(self, opened: _Open, *, exclusive: bool) -> bool:
        """Take the lock of an open file, as `flock` does: what it had before is let go, also if that fails."""
        holders = self._locks.setdefault(opened.node, {})
        if holders.get(opened) is exclusive:
            return True
        holders.pop(opened, None)
        if any(exclusive or other for other in holders.values()):
            return False
        holders[opened] = exclusive
        return True

    def unlock(self, opened: _Open) -> None:
        """Let go of the lock of an open file, if it has one."""
        self._locks.get(opened.node, {}).pop(opened, None)


def lost_by_failed_syncs(log: list[Event]) -> set[int]:
    """Return the effects that the system believes to be on disk, though a sync of theirs failed."""
    pending: set[int] = set()
    lost: set[int] = set()
    for index, event in enumerate(log):
        if isinstance(event, Synced):
            reached = {other for other in pending if event.node in touches(_effect(log[other]))}
            pending -= reached
            if event.failed:
                lost |= reached
        elif not isinstance(event, Dropped):
            pending.add(index)
    return lost


def _effect(event: Event) -> Effect:
    if isinstance(event, Synced | Dropped):
        raise TypeError(f"{event} is no effect")
    return event


def paths_of(nodes: Nodes) -> dict[str, Node]:
    """Return everything that can be reached from the root, by path."""
    found: dict[str, Node] = {}
    waiting = [("", nodes[ROOT])]
    while waiting:
        path, folder = waiting.pop()
        for name, number in folder.entries.items():
            node = found[f"{path}/{name}"] = nodes[number]
            if node.kind == "folder":
                waiting.append((f"{path}/{name}", node))
    return found


# --- what a process sees -------------------------------------------------------------------------------


class _Open:
    """An open file description."""

    __slots__ = ("appending", "node", "position", "writing")

    def __init__(self, node: int, *, writing: bool, appending: bool) -> None:
        self.node = node
        self.writing = writing
        self.appending = appending
        self.position = 0


Hook = Callable[["SimulatedFiles", str], None]
"""Called before a system call with its name. It may raise OSError, kill the process, or let another one work."""


class SimulatedFiles(Files):
    """The system calls of one process on a `Disk`."""

    CHANGING: ClassVar[frozenset[str]] = frozenset(
        ("create", "open_lock", "write", "write_at", "reserve", "truncate", "sync", "rename", "remove", "make_folder")
        + ("remove_folder", "sync_folder", "drop_cache", "try_lock", "try_share", "unlock", "close")
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
        self._descriptors: dict[int, _Open] = {}
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
        if len(path) > _LONGEST_NAME and len(os.fsencode(path)) >= _LONGEST_PATH:
            raise _error(errno.ENAMETOOLONG, path)
        for name in path.split("/"):
            if not name:
                continue
            node = nodes[number]
            if node.kind != "folder":
                raise _error(errno.ENOTDIR, path)
            found = node.entries.get(name)
            if found is None:
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
        self._descriptors[descriptor] = _Open(number, writing=writing, appending=appending)
        return descriptor

    def _opened(self, descriptor: int) -> _Open:
        opened = self._descriptors.get(descriptor)
        if opened is None:
            raise _error(errno.EBADF)
        return opened

    def _opened_to_write(self, descriptor: int) -> _Open:
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
        folder, name, found = self._parent(path)
        self._check_length(name, path)
        if found is not None or not name:
            raise _error(errno.EEXIST, path)
        return self._describe(self.disk.make("file", PRIVATE_FILE, folder, name), writing=True)

    def open_lock(self, path: str) -> int:
        self._call("open_lock")
        folder, name, found = self._parent(path)
        self._check_length(name, path)
        if found is None and name:
            found = self.disk.make("file", PRIVATE_FILE, folder, name)
        return self._describe(self._find_file(path), writing=True, appending=True)

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

    def _write(self, opened: _Open, data: bytes | memoryview, offset: int) -> int:
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


def _error(code: int, path: str | None = None) -> OSError:
    return OSError(code, os.strerror(code)) if path is None else OSError(code, os.strerror(code), path)
