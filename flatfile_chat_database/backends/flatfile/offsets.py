"""Where the records of logs are: a sparse table in memory for each large log that is read by position or by id.

Positions count good records, so only a look at every line can tell them. A table keeps what that look found: one offset
for every 16 records, and the first and last id, by code point, of every 1,024, which leave but one place to look for an
id that was made by a clock. A table grows with its log, and is thrown away when the log is another file, shorter, or
edited in another way than by appending. Whatever it says, lines are read from the file, and a page that does not hold
what it should is read again without it.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import accumulate, compress
from typing import NamedTuple, TypeVar

import msgspec

from ... import codec
from ..rules import report_bad_line
from .files import FileStatus
from .logs import Block, LogReader, Many, split_at

T = TypeVar("T")

STRIDE = 16
"""Records between two offsets."""
ZONE = 1024
"""Records that share a range of ids."""
SMALL_BYTES = 1 << 16
"""A log up to this size is read whole instead."""
_TOTAL_BYTES = 32 << 20
_TABLE_BYTES = 8192
"""What a table takes besides its entries, about."""
_TAIL_BYTES = 4096
_COMPARED = 40
"""Characters of an id that a zone keeps."""
_ZONE_BYTES = 300
_BLOCK_BYTES = 1 << 20
_MARKS = ZONE // STRIDE
_SETTLED_NANOSECONDS = 1_000_000_000
"""A file that changed later than this may change again without another time of change."""

_quoted = msgspec.json.Encoder().encode


class _Zone(NamedTuple):
    """What is known of the ids of neighbouring records."""

    lowest: str
    highest: str
    plain: bool
    """Whether every line begins with its id as we write it."""

    def with_another(self, other: _Zone) -> _Zone:
        lowest, highest = min(self.lowest, other.lowest), max(self.highest, other.highest)
        return _Zone(lowest, highest, self.plain and other.plain)


class _Stretch(NamedTuple):
    """Bytes of a log that hold the records from a position on, whole lines."""

    begin: int
    end: int
    position: int
    even: bool
    """Whether every line up to the next mark is a record."""


class Table:
    """What is known of one log up to an offset."""

    def __init__(self, status: FileStatus) -> None:
        self.first_bad: tuple[int, int] | None = None
        """Offset of the first damaged line, and how many records stand before it."""
        self._lock = threading.Lock()
        self._status = status
        self._count = 0
        self._marks = array("Q", [0])  # the offsets behind the first 0, 16, 32 … records
        self._uneven = bytearray(1)  # whether other lines than records stand between a mark and the next
        self._zones: list[_Zone] = []
        self._open_zone: _Zone | None = None
        self._end = (0, b"")  # with the bytes before it

    def size(self) -> int:
        """Return about how many bytes the table takes."""
        return _TABLE_BYTES + 9 * len(self._marks) + _ZONE_BYTES * len(self._zones)

    def fits(self, log: LogReader, descriptor: int, status: FileStatus) -> bool:
        """Tell whether the log may only have grown since the table was last looked at."""
        end, tail = self._end
        if status.size < end:  # another reader opened it later and saw more of it
            status = log.files.status_of(descriptor)
        known = self._status
        if not known.is_same_file(status) or status.size < end:
            return False
        if known.size == status.size:
            if known.modified != status.modified:
                return False
            if time.time_ns() - status.modified > _SETTLED_NANOSECONDS:
                return True
        if log.files.read(descriptor, len(tail), end - len(tail)) != tail:
            return False
        self._status = status
        return True

    def grow(self, log: LogReader, stop: int | None) -> int:
        """Take in lines until there are `stop` records or the log ends; return the number of records."""
        opened = log.open()
        while opened is not None and (stop is None or self._count < stop):
            with self._lock:  # for a block at a time, so that another reader goes on from there
                block = next(log.between(self._end[0], log.end(), _BLOCK_BYTES), None)
                if block is None:
                    break
                self._take(log, block)
                start = max(0, block.end - _TAIL_BYTES)
                self._end = block.end, log.files.read(opened[0], block.end - start, start)
        return self._count

    def _take(self, log: LogReader, block: Block) -> None:
        offset, _, lines = block
        ids = [codec.line_id(line) for line in lines or ()]
        ends = list(accumulate((len(line) + 1 for line in lines or ()), initial=offset))
        others: list[tuple[int, int, bool]] = []
        if lines is None:
            others.append((offset, self._count, True))
        elif None in ids:
            position = self._count
            for place, line, record_id in zip(ends, lines, ids, strict=False):
                if record_id is not None:
                    position += 1
                else:
                    others.append((place, position, bool(line.strip())))
            is_record = [record_id is not None for record_id in ids]
            lines, ends = list(compress(lines, is_record)), [offset, *compress(ends[1:], is_record)]
        self._marks.extend(ends[STRIDE - self._count % STRIDE :: STRIDE])
        self._uneven.extend(bytes(len(self._marks) - len(self._uneven)))
        for place, position, damaged in others:
            self._uneven[position // STRIDE] = True
            if damaged:
                self.first_bad = self.first_bad or (place, position)
                if not log.strict:
                    report_bad_line(log.key, place, strict=False)
        self._take_ids([record_id for record_id in ids if record_id is not None], lines or [])

    def _take_ids(self, ids: list[str], lines: list[bytes]) -> None:
        start = 0
        while start < len(ids):
            stop = start + ZONE - self._count % ZONE
            some = ids[start:stop]
            plain = all(map(bytes.startswith, lines[start:stop], map(_beginning, some)))
            zone = _Zone(min(some)[:_COMPARED], max(some)[:_COMPARED], plain)
            self._open_zone = zone if self._open_zone is None else self._open_zone.with_another(zone)
            self._count += len(some)
            if self._count % ZONE == 0:
                self._zones.append(self._open_zone)
                self._open_zone = None
            start = stop

    def stretch(self, start: int, stop: int) -> _Stretch:
        """Return where the records from `start` to `stop` are, which the table must have grown over."""
        with self._lock:
            first, behind = start // STRIDE, -(-stop // STRIDE)
            end = self._marks[behind] if behind < len(self._marks) else self._end[0]
            return _Stretch(self._marks[first], end, first * STRIDE, not self._uneven[first])

    def candidates(self, record_id: str) -> list[tuple[_Stretch, bool]]:
        """Return where a record may be, first place first, and whether its line must begin with its id there."""
        record_id = record_id[:_COMPARED]
        found = []
        with self._lock:
            zones = [*self._zones, *([self._open_zone] if self._open_zone is not None else ())]
            for number, (lowest, highest, plain) in enumerate(zones):
                if lowest <= record_id <= highest:
                    first, behind = number * _MARKS, (number + 1) * _MARKS
                    end = self._marks[behind] if behind < len(self._marks) else self._end[0]
                    even = not any(self._uneven[first:behind])
                    found.append((_Stretch(self._marks[first], end, number * ZONE, even), plain))
        return found


class Offsets:
    """The tables of the logs that were read last; for any thread."""

    def __init__(self, total_bytes: int = _TOTAL_BYTES) -> None:
        """Keep tables of about `total_bytes` together."""
        self._total_bytes = total_bytes
        self._tables: OrderedDict[str, tuple[Table, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def size(self) -> int:
        """Return about how many bytes all tables take."""
        return self._bytes

    def count(self, log: LogReader) -> int:
        """Return the number of records of a log."""
        table = self._table(log)
        if table is None:
            return sum(len(run) for run in log.runs())
        count = table.grow(log, None)
        self._keep(log.path, table)
        return count

    def page(self, log: LogReader, start: int, stop: int | None, decode: Callable[[bytes], T | None]) -> list[T]:
        """Return the records from position `start` up to `stop`; negative ones count from the end."""
        if start < 0 and (stop is None or stop < 0):
            return log.newest(-start, decode)[:stop]
        if start < 0 or (stop is not None and stop < 0):
            start, stop, _ = slice(start, stop).indices(self.count(log))
        if stop is not None and stop <= start:
            return []
        table = self._table(log) if start > 0 else None
        if table is None:
            return log.forward(log.blocks(), stop, decode)[start:]
        count = table.grow(log, stop)
        self._keep(log.path, table)
        stop = count if stop is None else min(stop, count)
        if log.strict and table.first_bad is not None and table.first_bad[1] < stop:
            report_bad_line(log.key, table.first_bad[0], strict=True)
        if stop <= start:
            return []
        stretch = table.stretch(start, stop)
        many: Many[T] | None = getattr(decode, "many", None)
        if many is not None and stretch.even and (lines := log.at_once(stretch.begin, stretch.end)) is not None:
            made = many(lines[start - stretch.position : stop - stretch.position])
            if made is not None and len(made) == stop - start:
                return made
        from_ = start if stretch.even else stretch.position  # among other lines, records must be counted
        found = log.forward(_blocks(log, stretch, from_), stop - from_, decode)
        if len(found) == stop - from_:
            return found[start - from_ :]
        self.forget(log.path)  # somebody changed it in a way that does not show
        return log.forward(log.blocks(), stop, decode)[start:]

    def find(self, log: LogReader, record_id: str) -> tuple[int, bytes] | None:
        """Return the position and the line of a record, or None."""
        table = self._table(log)
        if table is None:
            lines = (line for run in log.runs() for line in run)
            return next(((at, line) for at, line in enumerate(lines) if codec.line_id(line) == record_id), None)
        table.grow(log, None)
        self._keep(log.path, table)
        beginning = _beginning(record_id)
        for stretch, plain in table.candidates(record_id):
            position = stretch.position
            for block in log.between(stretch.begin, stretch.end, _BLOCK_BYTES):
                for line in block.lines or ():
                    if (not plain or line.startswith(beginning)) and codec.line_id(line) == record_id:
                        return position, line
                    position += stretch.even or codec.line_id(line) is not None
        return None

    def forget(self, path: str) -> None:
        """Drop the table of a log."""
        with self._lock:
            _, size = self._tables.pop(path, (None, 0))
            self._bytes -= size

    def _table(self, log: LogReader) -> Table | None:
        """Return the table of a log, a new one if there is none that fits; None for a log that is small or absent."""
        opened = log.open()
        if opened is None or opened[1].size <= SMALL_BYTES:
            return None
        known = self._tables.get(log.path)
        if known is not None and known[0].fits(log, *opened):
            return known[0]
        table = Table(opened[1])
        self._keep(log.path, table)  # so that another reader does not make it too
        return table

    def _keep(self, path: str, table: Table) -> None:
        size = table.size()
        with self._lock:
            self._bytes += size - self._tables.pop(path, (table, 0))[1]
            self._tables[path] = table, size
            while self._bytes > self._total_bytes:
                _, (_, dropped) = self._tables.popitem(last=False)
                self._bytes -= dropped


def _blocks(log: LogReader, stretch: _Stretch, start: int) -> Iterator[Block]:
    """Yield the blocks of an even stretch from position `start` on."""
    skipped = start - stretch.position
    size = min(stretch.end - stretch.begin, _BLOCK_BYTES)
    for block in log.between(stretch.begin, stretch.end, size):
        if skipped and block.lines is not None:  # they are records: no need to look
            passed, lines = split_at(block.lines, skipped)
            skipped -= len(passed)
            block = Block(block.offset + len(passed) + sum(map(len, passed)), block.end, lines)
        yield block


def _beginning(record_id: str) -> bytes:
    """Return the beginning of a line that we wrote, up to and including the id."""
    return b'{"id":' + _quoted(record_id)
