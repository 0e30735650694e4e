"""A disk in memory which remembers every change and what was made durable.

Nodes are never changed in place, so a snapshot of a disk is a copy of one dictionary. `Disk.log` holds the effects of
all calls in order; `crashes.py` derives from it what a power loss may leave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from ..backends.flatfile.files import PRIVATE_FILE, PRIVATE_FOLDER, FileKind

ROOT = 1
"""The number of the folder "/"."""


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


class Open:
    """An open file description."""

    __slots__ = ("appending", "node", "position", "writing")

    def __init__(self, node: int, *, writing: bool, appending: bool) -> None:
        self.node = node
        self.writing = writing
        self.appending = appending
        self.position = 0


class Disk:
    """A disk and its cache: what running processes see, and the log of how it came to be."""

    def __init__(self, nodes: Nodes | None = None) -> None:
        """Begin with a state, all of it durable; with an empty disk by default."""
        self.initial: Nodes = dict(nodes) if nodes is not None else {ROOT: Node("folder", PRIVATE_FOLDER, 0)}
        self.nodes: Nodes = dict(self.initial)
        self.log: list[Event] = []
        self._first = max(node.modified for node in self.nodes.values()) + 1
        self._next = max(self.nodes) + 1
        self._locks: dict[int, dict[Open, bool]] = {}

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

    def lock(self, opened: Open, *, exclusive: bool) -> bool:
        """Take the lock of an open file, as `flock` does: what it had before is let go, also if that fails."""
        holders = self._locks.setdefault(opened.node, {})
        if holders.get(opened) is exclusive:
            return True
        holders.pop(opened, None)
        if any(exclusive or other for other in holders.values()):
            return False
        holders[opened] = exclusive
        return True

    def unlock(self, opened: Open) -> None:
        """Let go of the lock of an open file, if it has one."""
        self._locks.get(opened.node, {}).pop(opened, None)


def lost_by_failed_syncs(log: Sequence[Event]) -> set[int]:
    """Return the effects that the system believes to be on disk, though a sync of theirs failed."""
    pending: set[int] = set()
    lost: set[int] = set()
    for index, event in enumerate(log):
        if isinstance(event, Synced):
            reached = {other for other in pending if event.node in touches(_effect(log[other]))}
            # Of names nothing is lost: they pass through the file system's own journal, which stops it if it fails.
            if event.failed:
                lost |= {other for other in reached if isinstance(log[other], Write | Resized)}
                reached &= lost
            pending -= reached
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
