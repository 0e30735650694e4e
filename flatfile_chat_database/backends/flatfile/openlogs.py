"""What the writer knows of the logs it appends to: an open descriptor and where each record is.

That is how a message that comes again is recognised, and half a line at the end. Others may write to the same files, so
each look at a log begins by comparing it with what is known.
"""

from __future__ import annotations

import errno
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from ... import codec
from .files import Files, FileStatus
from .folders import Folders
from .logs import scan_lines
from .tree import Tree

_REMEMBERED_IDS = 2_000_000
"""Over all logs; beyond that the logs that were used least recently are closed and read anew when needed."""
_SCAN_BYTES = 1 << 20


@dataclass(slots=True)
class OpenLog:
    """One log, as of a size and time of change."""

    descriptor: int
    status: FileStatus
    learned: int = 0
    """The end of the last whole line that was taken in."""
    count: int = 0
    offsets: dict[int, int] = field(default_factory=dict)
    """Hash of a record's id to the offset of its line; the line tells whether it is the one."""


class OpenLogs:
    """A bounded number of open logs by key, least recently used first."""

    def __init__(self, files: Files, tree: Tree, folders: Folders, *, maximum: int) -> None:
        self._files = files
        self._tree = tree
        self._folders = folders
        self._maximum = maximum
        self._logs: OrderedDict[str, OpenLog] = OrderedDict()
        self._remembered = 0
        self._unsynced: set[str] = set()

    def __len__(self) -> int:
        return len(self._logs)

    def look(self, key: str) -> OpenLog | None:
        """Return a log after taking in what others did to it, or None if it is absent."""
        path = self._tree.path(key)
        log = self._logs.get(key)
        try:
            status = self._files.status(path)
        except FileNotFoundError:
            self.forget(key)
            return None
        if status.kind != "file":
            raise IsADirectoryError(errno.EISDIR, "Is no file", path)
        if log is None or not _is_grown(log.status, status):
            self.forget(key)
            log = self._logs[key] = OpenLog(self._files.open_to_append(path), status)
            self._unsynced.add(key)  # its writer may have died before it was durable, name and all
            self._folders.changed(key.rpartition("/")[0])
        self._logs.move_to_end(key)
        self._learn(key, log, status)
        return log

    def find(self, log: OpenLog | None, record_id: str) -> bytes | None:
        """Return the line of a record, without its newline, or None."""
        offset = log.offsets.get(hash(record_id)) if log is not None else None
        if log is None or offset is None:
            return None
        line = self._line_at(log, offset)
        if codec.line_id(line) == record_id:
            return line
        # Two ids have one hash: look at every line.
        for run in scan_lines(self._files, log.descriptor, 0, log.learned, _SCAN_BYTES):
            for _, _, other in run:
                if other is not None and codec.line_id(other) == record_id:
                    return other
        return None

    def appended(self, key: str, log: OpenLog, lines: list[bytes]) -> None:
        """Take in lines that were just written at the end of a log, and have it synced."""
        for line in lines:
            self._remember(log, codec.written_id(line), log.learned)
            log.learned += len(line)
        log.status = self._files.status_of(log.descriptor)
        self._unsynced.add(key)

    def changed(self, key: str, log: OpenLog) -> None:
        """Take in what was done to the end of a log in another way, and have it synced."""
        self._unsynced.add(key)
        self._learn(key, log, self._files.status_of(log.descriptor))

    def take_unsynced(self) -> list[Callable[[], None]]:
        """Return what makes durable what was appended since the last call."""
        unsynced, self._unsynced = self._unsynced, set()
        return [partial(self._files.sync, self._logs[key].descriptor) for key in sorted(unsynced) if key in self._logs]

    @property
    def has_unsynced(self) -> bool:
        """Whether something that was appended or taken in is not durable yet."""
        return bool(self._unsynced)

    @property
    def is_full(self) -> bool:
        """Whether logs are to be closed before further ones are opened."""
        return len(self._logs) > self._maximum or (len(self._logs) > 1 and self._remembered > _REMEMBERED_IDS)

    def evict(self) -> None:
        """Close what is too much; all must be durable."""
        while self.is_full:
            self.forget(next(iter(self._logs)))

    def forget(self, key: str) -> None:
        """Close a log."""
        log = self._logs.pop(key, None)
        if log is not None:
            self._remembered -= len(log.offsets)
            self._files.close(log.descriptor)

    def forget_below(self, folder: str) -> None:
        """Close the log `folder` and all logs below that folder; "" stands for all."""
        for key in [key for key in self._logs if not folder or key == folder or key.startswith(f"{folder}/")]:
            self.forget(key)

    def _learn(self, key: str, log: OpenLog, status: FileStatus) -> None:
        """Take in the whole lines that are new; they must be durable before anybody is told that they are there."""
        if status.size > log.learned:
            self._unsynced.add(key)
        for run in scan_lines(self._files, log.descriptor, log.learned, status.size, _SCAN_BYTES):
            for offset, end, line in run:
                record_id = codec.line_id(line) if line is not None else None
                if record_id is not None:
                    self._remember(log, record_id, offset)
                log.learned = end
        log.status = status

    def _remember(self, log: OpenLog, record_id: str, offset: int) -> None:
        log.count += 1
        if log.offsets.setdefault(hash(record_id), offset) == offset:
            self._remembered += 1

    def _line_at(self, log: OpenLog, offset: int) -> bytes:
        size = 4096
        while True:
            data = self._files.read(log.descriptor, size, offset)
            line, newline, _ = data.partition(b"\n")
            if newline or len(data) < size:
                return line
            size *= 4


def _is_grown(known: FileStatus, status: FileStatus) -> bool:
    """Tell whether a log may have been appended to since it was known, but not edited in another way."""
    if not known.is_same_file(status) or status.size < known.size:
        return False
    return status.size > known.size or status.modified == known.modified
