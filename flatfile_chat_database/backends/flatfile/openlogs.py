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

Stamp = tuple[int, int, int, int]
"""Device, inode, size and time of change of a file."""


@dataclass(slots=True)
class OpenLog:
    """One log, as of a stamp, and what is to be appended to it."""

    stamp: Stamp | None
    """None while it is absent."""
    learned: int = 0
    """The end of the last whole line that was taken in, lines to come included."""
    count: int = 0
    offsets: dict[int, int] = field(default_factory=dict)
    """Hash of a record's id to the offset of its line; the line tells whether it is the one."""
    coming: list[bytes] = field(default_factory=list)
    """Lines to come, in order."""
    is_ours: bool = False
    """Whether the last change was ours; when it was made is not known then."""

    @property
    def size(self) -> int:
        """Of the file, without what is to come."""
        return self.stamp[2] if self.stamp is not None else 0

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
        self._descriptors: OrderedDict[str, tuple[int, Stamp]] = OrderedDict()
        self._remembered = 0

    def __len__(self) -> int:
        return len(self._descriptors)

    def look(self, key: str) -> OpenLog:
        """Return a log after taking in what others did to it. With lines to come, it is what it was with the first."""
        log = self._logs.get(key)
        if log is not None and log.coming:
            return log
        path = self._tree.path(key)
        try:
            stamp: Stamp | None = self._files.stamp(path)
        except FileNotFoundError:
            stamp = None
        if log is not None:
            known = log.stamp
            if known == stamp or (log.is_ours and stamp is not None and known is not None and known[:3] == stamp[:3]):
                log.stamp, log.is_ours = stamp, False
                self._logs.move_to_end(key)
                return log
        if stamp is not None and self._files.status(path).kind != "file":
            raise IsADirectoryError(errno.EISDIR, "Is no file", path)
        if log is None or not _is_grown(log.stamp, stamp):
            self.forget(key)
            log = self._logs[key] = OpenLog(stamp)
        self._logs.move_to_end(key)
        log.stamp, log.is_ours = stamp, False
        if stamp is not None:
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
        if log.stamp is not None:
            for run in scan_lines(self._files, self._descriptor(key), 0, log.size, _SCAN_BYTES):
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
        known = self._descriptors.get(key)
        if known is not None and log is not None and log.stamp is not None and log.stamp[1] == known[1][1]:
            descriptor = known[0]
        else:
            descriptor = self._descriptor(key, create=True)
        size = len(data)
        begin = log.size if log is not None else self._files.stamp_of(descriptor)[2]
        try:
            done = self._files.write(descriptor, data)
            while done < size:  # a full disk, a limit or a signal takes a part; the next write says which
                done += self._files.write(descriptor, memoryview(data)[done:])
        except OSError:
            with contextlib.suppress(OSError):
                self._files.truncate(descriptor, begin)
            raise
        if log is None:
            return
        log.coming.clear()
        if log.stamp is None:
            log.stamp = self._files.stamp_of(descriptor)
            if log.size != log.learned:  # another program wrote as well
                self.forget(key)
        else:
            device, inode, before, moment = log.stamp
            log.stamp, log.is_ours = (device, inode, before + size, moment), True

    def forget(self, key: str) -> None:
        """Forget a log."""
        log = self._logs.pop(key, None)
        if log is not None:
            self._remembered -= len(log.offsets)
        known = self._descriptors.pop(key, None)
        if known is not None:
            self._files.close(known[0])

    def forget_below(self, folder: str) -> None:
        """Forget the log `folder` and all logs below that folder; "" stands for all."""
        for key in [*self._logs, *self._descriptors]:
            if not folder or key == folder or key.startswith(f"{folder}/"):
                self.forget(key)

    def evict(self) -> None:
        """Forget what is too much; nothing must be to come."""
        while len(self._logs) > 1 and self._remembered > _REMEMBERED_IDS:
            self.forget(next(iter(self._logs)))

    # --- descriptors ---------------------------------------------------------------------------------

    def _descriptor(self, key: str, *, create: bool = False) -> int:
        """Return an open descriptor of the file that has the log's name now."""
        path = self._tree.path(key)
        known = self._descriptors.get(key)
        if known is not None:
            log = self._logs.get(key)
            if log is not None and log.stamp is not None and log.stamp[:2] == known[1][:2]:
                self._descriptors.move_to_end(key)
                return known[0]
            self._files.close(self._descriptors.pop(key)[0])
        while len(self._descriptors) >= self._maximum:
            _, (oldest, _) = self._descriptors.popitem(last=False)
            self._files.close(oldest)
        try:
            descriptor = self._files.open_to_append(path)
        except FileNotFoundError:
            if not create:
                raise
            descriptor = self._create(key, path)
        self._descriptors[key] = descriptor, self._files.stamp_of(descriptor)
        return descriptor

    def _create(self, key: str, path: str) -> int:
        folder = key.rpartition("/")[0]
        self._folders.make(folder)
        try:
            return self._files.create_to_append(path)
        except FileNotFoundError:  # another process cleaned the empty folder away
            self._folders.forget()
            self._folders.make(folder)
            return self._files.create_to_append(path)

    # --- records -------------------------------------------------------------------------------------

    def _learn(self, key: str, log: OpenLog) -> None:
        """Take in the whole lines that are new."""
        for run in scan_lines(self._files, self._descriptor(key), log.learned, log.size, _SCAN_BYTES):
            for offset, end, line in run:
                record_id = codec.line_id(line) if line is not None else None
                if record_id is not None:
                    self._remember(log, record_id, offset)
                log.learned = end

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
            data = self._files.read(self._descriptor(key), size, offset)
            line, newline, _ = data.partition(b"\n")
            if newline or len(data) < size:
                return line
            size *= 4


def _is_grown(known: Stamp | None, stamp: Stamp | None) -> bool:
    """Tell whether a log may have been appended to since it was known, but not edited in another way."""
    if known is None or stamp is None or known[:2] != stamp[:2]:
        return False
    return stamp[2] > known[2]
