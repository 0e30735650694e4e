"""Reading JSONL logs by blocks: forwards, backwards, past damage, never past the last newline.

A reader takes no lock and repairs nothing: half a line at the end is what a writer at work looks like.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from typing import NamedTuple, TypeVar, cast

from ... import codec
from ..rules import report_bad_line
from .files import Files, FileStatus

T = TypeVar("T")

Many = Callable[[list[bytes]], list[T] | None]
"""What `many` of a decoder is."""

_LARGEST_BLOCK = 1 << 20
_LARGEST_STREAMED = 1 << 18
"""A caller decodes one block of a stream at a time, between turns of its event loop."""
_LARGEST_PAGE = 1 << 22
"""Bytes of lines that are read at once to be returned together."""
_LIKELY_LINE = 256
"""Bytes; longer lines cost one more read, very long ones two or three."""
_LARGE_LINE = 1 << 15
_DECODED_AT_ONCE = 64
"""Lines of a stream, in less than a turn of an event loop may take."""


class Block(NamedTuple):
    """Neighbouring lines of a log."""

    offset: int
    end: int
    """The offset behind the newline of the last line."""
    lines: list[bytes] | None
    """None stands for one line that is too long to keep."""

    @property
    def is_light(self) -> bool:
        """Whether no line takes long to decode."""
        return self.end - self.offset <= _LARGE_LINE or max(map(len, self.lines or (b"",))) <= _LARGE_LINE


class LogReader:
    """One log as it is when it is first read: later appends are not seen, later rewrites do not disturb.

    What stands behind the last newline is no line yet. An absent log reads as empty.

    `decode` of the methods returns what the caller wants of a line, or None for one that is no record. It is called
    once a line, unless it has `many`; see `StorageBackend.read_log_as`.
    """

    def __init__(
        self,
        files: Files,
        path: str,
        key: str,
        *,
        block: int,
        strict: bool = False,
    ) -> None:
        """Read the log at `path` by blocks of at least `block` bytes; the first read opens it."""
        self.files = files
        self.path = path
        self.key = key
        self.strict = strict
        self.block = min(block, codec.MAX_LINE_BYTES)  # so that only a line that ends a block later can be too long
        self._opened: tuple[int, FileStatus] | None = None
        self._end: int | None = None
        self._lock = threading.Lock()
        self._ended = False
        self._blocks: Iterator[Block] | None = None

    def close(self) -> None:
        with self._lock:  # a cancelled caller may have left `next_block` at work in another thread
            self._ended = True
            self._blocks = None  # it refers to this object, which would wait for the garbage collector
            opened, self._opened = self._opened, None
            if opened is not None:
                self.files.close(opened[0])

    def next_block(self) -> Block | None:
        """Return the next of `blocks`, or None at the end."""
        with self._lock:
            if self._ended:
                return None
            if self._blocks is None:
                self._blocks = self.blocks(_LARGEST_STREAMED)
            return next(self._blocks, None)

    def __enter__(self) -> LogReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> tuple[int, FileStatus] | None:
        """Open the log once; return its descriptor and its status then, or None if it is absent."""
        if self._opened is None:
            try:
                descriptor = self.files.open_to_read(self.path)
            except FileNotFoundError:
                return None
            status = self.files.status_of(descriptor)
            self._opened = descriptor, status
            if status.kind != "file":
                raise IsADirectoryError(errno.EISDIR, "Is no file", self.key)
        return self._opened

    def end(self) -> int:
        """Return the offset behind the last newline."""
        if self._end is None:
            opened = self.open()
            if opened is None:
                return 0
            self._end = end_of_lines(self.files, opened[0], opened[1].size)
        return self._end

    def between(self, start: int, end: int, block: int, largest: int = _LARGEST_BLOCK) -> Iterator[Block]:
        """Yield the lines between two offsets."""
        opened = self.open()
        return scan_blocks(self.files, opened[0], start, end, block, largest) if opened else iter(())

    def at_once(self, start: int, end: int) -> list[bytes] | None:
        """Return the lines between two offsets, each with its newline, for the `many` of a decoder; None if it is much.

        That is one read and nothing else, where blocks take as long again as the read.
        """
        opened = self.open()
        if opened is None:
            return []
        if end - start > min(_LARGEST_PAGE, codec.MAX_LINE_BYTES):  # no line in less can be too long
            return None
        # `split` looks at each byte by itself, which takes three times as long.
        lines = BytesIO(self.files.read(opened[0], end - start, start)).readlines()
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        return lines

    def blocks(self, largest: int = _LARGEST_BLOCK) -> Iterator[Block]:
        """Yield all lines, oldest first."""
        yield from self.between(0, self.end(), self.block, largest)

    def decoded(self, block: Block, decode: Callable[[bytes], T | None]) -> Iterator[T]:
        """Yield what `decode` returns for the records of a block; what is none of them and not blank is reported."""
        offset, _, lines = block
        if lines is None:
            report_bad_line(self.key, offset, strict=self.strict)
            return
        many: Many[T] | None = getattr(decode, "many", None)
        for start in range(0, len(lines), _DECODED_AT_ONCE):
            some = lines[start : start + _DECODED_AT_ONCE]
            records = None if many is None else many(some)
            if records is not None:
                yield from records
                continue
            for index, line in enumerate(some, start):
                record = decode(line)
                if record is not None:
                    yield record
                else:
                    self._report(offset, lines, index)

    def _report(self, offset: int, lines: list[bytes], index: int) -> None:
        """Report one of the lines from `offset` on, which is no record, unless it is blank."""
        if lines[index].strip():
            report_bad_line(self.key, offset + index + sum(map(len, lines[:index])), strict=self.strict)

    def take(self, offset: int, lines: list[bytes], decode: Callable[[bytes], T | None]) -> list[T]:
        """Return the same as `decoded` for neighbouring lines, faster where no line is bad."""
        many: Many[T] | None = getattr(decode, "many", None)
        if many is not None and (found := many(lines)) is not None:
            return found
        records = list(map(decode, lines))
        if None not in records:
            return cast("list[T]", records)
        for index in (index for index, record in enumerate(records) if record is None):
            self._report(offset, lines, index)
        return [record for record in records if record is not None]

    def runs(self) -> Iterator[list[bytes]]:
        """Yield the records oldest first, as many at a time as a block holds."""
        for block in self.blocks():
            if records := list(self.decoded(block, codec.record_line)):
                yield records

    def forward(self, blocks: Iterable[Block], count: int | None, decode: Callable[[bytes], T | None]) -> list[T]:
        """Return the first `count` records of blocks (None: all), and look at no line behind them."""
        found: list[T] = []
        for offset, _, lines in blocks:
            if lines is None:
                report_bad_line(self.key, offset, strict=self.strict)
            while lines and (count is None or len(found) < count):
                some, lines = (lines, []) if count is None else split_at(lines, count - len(found))
                found += self.take(offset, some, decode)
                offset += len(some) + sum(map(len, some)) if lines else 0
            if len(found) == count:
                break
        return found

    def newest(self, count: int, decode: Callable[[bytes], T | None]) -> list[T]:
        """Return the last `count` records, oldest first, without reading what stands before them."""
        many: Many[T] | None = getattr(decode, "many", None)
        if many is not None and (last := self._last(count)) is not None and (made := many(last)) is not None:
            return made
        found: list[T] = []
        for offset, _, lines in self._blocks_backward(count):
            if lines is None:
                report_bad_line(self.key, offset, strict=self.strict)
            while lines and len(found) < count:
                lines, some = split_at(lines, len(found) - count)
                begin = offset + len(lines) + sum(map(len, lines)) if lines else offset
                found = self.take(begin, some, decode) + found
            if len(found) == count:
                break
        return found

    def _last(self, count: int) -> list[bytes] | None:
        """Return the last `count` lines as `at_once` does."""
        opened = self.open()
        if opened is None or count <= 0:
            return []
        size = opened[1].size
        block = max(self.block, count * _LIKELY_LINE)
        while (lines := self.at_once(max(0, size - block), size)) is not None:
            if block >= size or len(lines) > count:  # the first one may be half a line
                return lines[-count:]
            if len(lines) < 2:  # lines so long are read as fast one by one
                return None
            # Now it is known how long they are. To read it all again takes no longer than to put it together.
            block = max(2 * block, block * (count + 1) // len(lines) * 5 // 4)
        return None

    def backward(self, count: int) -> list[tuple[int, bytes]]:
        """Return the lines of the last `count` records with their offsets, newest first."""
        found: list[tuple[int, bytes]] = []
        for offset, end, lines in self._blocks_backward(count):
            if lines is None:
                report_bad_line(self.key, offset, strict=self.strict)
            for line in reversed(lines or ()):
                end -= len(line) + 1
                if codec.line_id(line) is not None:
                    found.append((end, line))
                    if len(found) == count:
                        return found
                elif line.strip():
                    report_bad_line(self.key, end, strict=self.strict)
        return found

    def _blocks_backward(self, count: int) -> Iterator[Block]:
        """Yield all lines, the last block first; it is so large that it likely holds `count` lines."""
        opened = self.open()
        if opened is None or count <= 0:
            return
        block = max(self.block, min(count * _LIKELY_LINE, _LARGEST_BLOCK))
        last_read = self._read_end(opened[0], opened[1].size, block)
        end = self.end()
        if end == 0:
            return
        position = end - 1  # the newline of the last line
        rest: bytes | None = b""  # the end of a line whose beginning is not read yet; None if it is too long
        while True:
            if last_read is not None:
                (start, data), last_read = last_read, None
            else:
                start = max(0, position - block)
                data = self.files.read(opened[0], position - start, start)
            if len(data) < position - start:
                return  # the file was truncated meanwhile
            block = min(block * 2, _LARGEST_BLOCK)
            *lines, last = data.rsplit(b"\n", min(count, _LARGEST_BLOCK))
            rest = None if rest is None or len(last) + len(rest) > codec.MAX_LINE_BYTES else last + rest
            if not lines and start > 0:
                position = start
                continue
            whole, rest, last_offset = rest, b"", start + len(data) - len(last)
            # What stands before the first newline found may be half a line, or several lines.
            ended = start == 0 and len(lines) < min(count, _LARGEST_BLOCK)
            position = start if ended else start + len(lines.pop(0))
            begin = position if ended else position + 1
            if whole is None:
                yield Block(last_offset, end, None)
            else:
                lines.append(whole)
            if lines:
                yield Block(begin, end if whole is not None else last_offset, lines)
            if ended:
                return
            end = begin

    def _read_end(self, descriptor: int, size: int, block: int) -> tuple[int, bytes] | None:
        """Find `end` and the bytes before its newline, with their offset, in one read; None if that does not do."""
        if self._end is not None:
            return None
        start = max(0, size - block)
        data = self.files.read(descriptor, size - start, start)
        cut = data.rfind(b"\n")
        if cut < 0:
            return None
        self._end = start + cut + 1
        return start, data[:cut]


def split_at(lines: list[bytes], index: int) -> tuple[list[bytes], list[bytes]]:
    """Return the lines before an index and the others."""
    return lines[:index], lines[index:]


def end_of_lines(files: Files, descriptor: int, size: int) -> int:
    """Return the offset behind the last newline among the first `size` bytes."""
    block = 1  # most logs end in one
    while size > 0:
        start = max(0, size - block)
        cut = files.read(descriptor, size - start, start).rfind(b"\n")
        if cut >= 0:
            return start + cut + 1
        size, block = start, 1 << 16
    return 0


def scan_blocks(
    files: Files, descriptor: int, start: int, end: int, block: int, largest: int = _LARGEST_BLOCK
) -> Iterator[Block]:
    """Yield the complete lines between two offsets, a block at a time.

    Blocks begin at `block` bytes and double up to `largest`. A line longer than `codec.MAX_LINE_BYTES` comes as None.
    """
    offset = start  # of the line that `rest` begins
    rest = b""
    skipping = False  # inside a line that is too long to keep
    position = start
    while position < end:
        data = files.read(descriptor, min(block, end - position), position)
        if not data:
            return  # the file was truncated meanwhile
        position += len(data)
        block = min(block * 2, max(largest, block))
        *lines, tail = data.split(b"\n")
        if not lines:
            if skipping or len(rest) + len(data) > codec.MAX_LINE_BYTES:
                rest, skipping = b"", True
            else:
                rest += data
            continue
        if skipping or len(rest) + len(lines[0]) > codec.MAX_LINE_BYTES:
            end_of_first = position - len(data) + len(lines.pop(0)) + 1
            yield Block(offset, end_of_first, None)
            offset = end_of_first
        else:
            lines[0] = rest + lines[0]
        end_of_last = position - len(tail)
        if lines:
            yield Block(offset, end_of_last, lines)
        offset, rest, skipping = end_of_last, tail, False


def scan_lines(
    files: Files, descriptor: int, start: int, end: int, block: int
) -> Iterator[list[tuple[int, int, bytes | None]]]:
    """Yield what `scan_blocks` does, with each line its offset and the offset of the next."""
    for offset, behind, lines in scan_blocks(files, descriptor, start, end, block):
        run: list[tuple[int, int, bytes | None]] = [] if lines is not None else [(offset, behind, None)]
        for line in lines or ():
            run.append((offset, offset + len(line) + 1, line))
            offset += len(line) + 1
        yield run
