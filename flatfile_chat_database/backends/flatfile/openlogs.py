"""What the writer knows of the logs it appends to: where each record is, and an open descriptor for some.

That is how a message that comes again is recognised, and half a line at the end. Others may write to the same files, so
each look at a log begins by comparing it with what is known. What is about to be appended counts as there already: if
it comes to nothing, the log has to be forgotten.
"""

from __future__ import annotations

import contextlib
import errno
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from ... import codec
from .files import Files
from .folders import Folders
from .logs import scan_lines
from .tree import Tree

_REMEMBERED_IDS = 2_000_000
"""Over all logs; beyond that the logs that were used least recently are forgotten and read anew when needed."""
_SCAN_BYTES = 1 << 20
_TAIL_BYTES = 200


@dataclass(slots=True)
class OpenLog:
    """One log as it was seen or left last, and what is to be appended to it."""

    path: str
    identity: tuple[int, int] | None = None
    """Device and inode; None while it is absent."""
    size: int = 0
    """Of the file, without what is to come."""
    changed: int | None = None
    """When, as the file system has it; None if the last change was ours, for when that was is not known then."""
    is_fresh: bool = False
    """Whether nobody has looked at it since the last change, which was ours."""
    descriptor: int | None = None
    learned: int = 0
    """The end of the last whole line that was taken in, lines to come included."""
    count: int = 0
    offsets: dict[int, int] = field(default_factory=dict)
    """Hash of a record's id to the offset of its line; the line tells whether it is the one."""
    tail: bytes = b""
    """What stands before `learned` without the lines to come, or the end of it."""
    coming: list[bytes] = field(default_factory=list)
    """Lines to come, in order."""

    @property
    def half(self) -> int:
        """Bytes of half a line at the end."""
        return 0 if self.coming else self.size - self.learned


class OpenLogs:
    """Logs by key, those used least recently first."""

    def __init__(self, files: Files, tree: Tree, folders: Folders, *, maximum: int) -> None:
        """Keep at most `maximum` descriptors open."""
        self._files = files
        self._tree = tree
        self._folders = folders
        self._maximum = maximum
        self._logs: OrderedDict[str, OpenLog] = OrderedDict()
        self._opened: dict[str, OpenLog] = {}  # those opened first come first
        self._remembered = 0
        self.avoids_times = True
        """Whether logs are looked at without their times if possible: that takes longer, and the next flush less."""

    def __len__(self) -> int:
        return len(self._opened)

    def look(self, key: str) -> OpenLog:
        """Return a log after taking in what others did to it. With lines to come, it is what it was with the first."""
        log = self._logs.get(key)
        if log is None:
            return self._look_anew(key, None)
        if log.coming:
            return log
        if self._is_another(log):
            return self._look_anew(key, log)
        self._logs.move_to_end(key)
        return log

    def _is_another(self, log: OpenLog) -> bool:
        is_fresh, log.is_fresh = log.is_fresh, False
        try:
            if is_fresh and self.avoids_times:  # there is no time to compare with
                device, inode, size = self._files.measure(log.path)
            else:
                device, inode, size, changed = self._files.stamp(log.path)
                if log.changed is not None and changed != log.changed:
                    return True
                log.changed = changed
        except FileNotFoundError:
            return log.identity is not None
        return size != log.size or (device, inode) != log.identity

    def _look_anew(self, key: str, log: OpenLog | None) -> OpenLog:
        """Look at a log that is another one than what is known of it; where it only grew, that stays known."""
        path = self._tree.path(key)
        try:
            device, inode, size, changed = self._files.stamp(path)
        except FileNotFoundError:
            self.forget(key)
            log = self._logs[key] = OpenLog(path)
            return log
        if self._files.status(path).kind != "file":
            raise IsADirectoryError(errno.EISDIR, "Is no file", path)
        identity = device, inode
        if log is None or log.identity != identity or size <= log.size or not self._is_grown(key, log):
            self.forget(key)
            log = self._logs[key] = OpenLog(path, identity)
        self._logs.move_to_end(key)
        log.size, log.changed = size, changed
        self._learn(key, log)
        return log

    def find(self, key: str, log: OpenLog, record_id: str) -> bytes | None:
        """Return the line of a record, without its newline, or None."""
        offset = log.offsets.get(hash(record_id))
        if offset is None:
            return None
        line = self._line_at(key, log, offset)
        if codec.line_id(line) == record_id:
            return line
        # Two ids have one hash: look at every line.
        for other in log.coming:
            if codec.line_id(other) == record_id:
                return other.removesuffix(b"\n")
        if log.identity is not None:
            for run in scan_lines(self._files, self._descriptor(key, log), 0, log.size, _SCAN_BYTES):
                for _, _, other_line in run:
                    if other_line is not None and codec.line_id(other_line) == record_id:
                        return other_line
        return None

    def expect(self, log: OpenLog, lines: Sequence[bytes], ids: Sequence[str | None]) -> None:
        """Take in lines that are to be appended; None stands for one that is no record."""
        for line, record_id in zip(lines, ids, strict=True):
            if record_id is not None:
                self._remember(log, record_id, log.learned)
            log.learned += len(line)
        log.coming += lines

    def expect_new(self, log: OpenLog, record_id: str, line: bytes) -> bool:
        """Take in a line that is to be appended, unless there may be a record with its id; return whether it was."""
        offset = log.learned
        if log.offsets.setdefault(hash(record_id), offset) != offset:
            return False
        self._remembered += 1
        log.count += 1
        log.learned += len(line)
        log.coming.append(line)
        return True

    def append(self, key: str, data: bytes) -> None:
        """Write lines at the end of a log, which is made if it is absent.

        Raises:
            OSError: They could not be written, or only in part.
        """
        log = self._logs.get(key)
        if log is None:  # forgotten since it was planned, and looked at when it is needed again
            self._append_unknown(key, data)
            return
        descriptor = log.descriptor
        if descriptor is None:
            descriptor = self._descriptor(key, log, create=True)
        self._write(descriptor, data, log.size)
        log.coming.clear()
        log.tail = data[-_TAIL_BYTES:]
        if log.identity is not None:
            log.size += len(data)
            log.changed = None
            log.is_fresh = True
        else:
            device, inode, log.size, log.changed = self._files.stamp_of(descriptor)
            log.identity = device, inode
            if log.size != log.learned:  # another program wrote as well
                self.forget(key)

    def _append_unknown(self, key: str, data: bytes) -> None:
        descriptor = self._open_or_create(key, self._tree.path(key))
        try:
            self._write(descriptor, data, self._files.stamp_of(descriptor)[2])
        finally:
            self._files.close(descriptor)

    def _write(self, descriptor: int, data: bytes, size: int) -> None:
        """Write at the end of a file of some size: all or nothing, as far as that can be done."""
        try:
            done = self._files.write(descriptor, data)
            while done < len(data):  # a full disk, a limit or a signal takes a part; the next write says which
                done += self._files.write(descriptor, memoryview(data)[done:])
        except OSError:
            with contextlib.suppress(OSError):
                self._files.truncate(descriptor, size)
            raise

    def forget(self, key: str) -> None:
        """Forget a log."""
        log = self._logs.pop(key, None)
        if log is not None:
            self._remembered -= len(log.offsets)
            self._close(key, log)

    def forget_below(self, folder: str) -> None:
        """Forget the log `folder` and all logs below that folder; "" stands for all."""
        for key in list(self._logs):
            if not folder or key == folder or key.startswith(f"{folder}/"):
                self.forget(key)

    def evict(self) -> None:
        """Forget what is too much; nothing must be to come."""
        while len(self._logs) > 1 and self._remembered > _REMEMBERED_IDS:
            self.forget(next(iter(self._logs)))

    # --- descriptors ---------------------------------------------------------------------------------

    def _descriptor(self, key: str, log: OpenLog, *, create: bool = False) -> int:
        """Return an open descriptor of the file that has the log's name now."""
        if log.descriptor is None:
            while len(self._opened) >= self._maximum:
                self._close(*next(iter(self._opened.items())))
            log.descriptor = self._open_or_create(key, log.path) if create else self._files.open_to_append(log.path)
            self._opened[key] = log
        return log.descriptor

    def _close(self, key: str, log: OpenLog) -> None:
        descriptor, log.descriptor = log.descriptor, None
        if descriptor is not None:
            del self._opened[key]
            self._files.close(descriptor)

    def _open_or_create(self, key: str, path: str) -> int:
        try:
            return self._files.open_to_append(path)
        except FileNotFoundError:
            return self._create(key, path)

    def _create(self, key: str, path: str) -> int:
        return self._folders.fill(key.rpartition("/")[0], lambda: self._files.create_to_append(path))

    # --- records -------------------------------------------------------------------------------------

    def _learn(self, key: str, log: OpenLog) -> None:
        """Take in the whole lines that are new."""
        for run in scan_lines(self._files, self._descriptor(key, log), log.learned, log.size, _SCAN_BYTES):
            for offset, end, line in run:
                record_id = codec.line_id(line) if line is not None else None
                if record_id is not None:
                    self._remember(log, record_id, offset)
                log.learned = end
        start = max(0, log.learned - _TAIL_BYTES)
        log.tail = self._files.read(self._descriptor(key, log), log.learned - start, start)

    def _is_grown(self, key: str, log: OpenLog) -> bool:
        """Tell whether what is known of a log that is larger now is still there, as far as its end tells.

        The same inode does not: it may have been edited in its place, or be another file's since it was closed.
        """
        return self._files.read(self._descriptor(key, log), len(log.tail), log.learned - len(log.tail)) == log.tail

    def _remember(self, log: OpenLog, record_id: str, offset: int) -> None:
        log.count += 1
        if log.offsets.setdefault(hash(record_id), offset) == offset:
            self._remembered += 1

    def _line_at(self, key: str, log: OpenLog, offset: int) -> bytes:
        if offset >= log.size:  # to come
            place = log.learned - sum(map(len, log.coming))
            for line in log.coming:
                if place == offset:
                    return line.removesuffix(b"\n")
                place += len(line)
        size = 4096
        while True:
            data = self._files.read(self._descriptor(key, log), size, offset)
            line, newline, _ = data.partition(b"\n")
            if newline or len(data) < size:
                return line
            size *= 4
