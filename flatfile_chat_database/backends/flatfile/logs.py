"""Reading JSONL logs by blocks: forwards, backwards, past damage, never past the last newline.

A reader takes no lock and repairs nothing: half a line at the end is what a writer at work looks like.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator

from ... import codec
from ..base import report_bad_line
from .files import Files

_LARGEST_BLOCK = 1 << 20


class LogReader:
    """One log as it is when it is first read: later appends are not seen, later rewrites do not disturb.

    What stands behind the last newline is no line yet, and what stands behind `limit` belongs to a batch that is being
    written. An absent log reads as empty.
    """

    def __init__(
        self,
        files: Files,
        path: str,
        key: str,
        *,
        block: int,
        strict: bool = False,
        limit: Callable[[], int | None] = lambda: None,
    ) -> None:
        """Read the log at `path` by blocks of at least `block` bytes; the first read opens it."""
        self._files = files
        self._path = path
        self._key = key
        self._block = block
        self._strict = strict
        self._limit = limit
        self._descriptor: int | None = None
        self._size = 0
        self._lock = threading.Lock()
        self._ended = False
        self._runs = self.runs()

    def close(self) -> None:
        with self._lock:  # a cancelled caller may have left `next_run` at work in another thread
            self._ended = True
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is not None:
                self._files.close(descriptor)

    def next_run(self) -> list[bytes] | None:
        """Return the next of `runs`, or None at the end."""
        with self._lock:
            return next(self._runs, None) if not self._ended else None

    def __enter__(self) -> LogReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> int | None:
        """Open the log once; return its descriptor, or None if it is absent."""
        if self._descriptor is None:
            try:
                self._descriptor = self._files.open_to_read(self._path)
            except FileNotFoundError:
                return None
            status = self._files.status_of(self._descriptor)
            if status.kind != "file":
                raise IsADirectoryError(errno.EISDIR, "Is no file", self._key)
            limit = self._limit()
            size = status.size if limit is None else min(limit, status.size)
            self._size = end_of_lines(self._files, self._descriptor, size)
        return self._descriptor

    def runs(self) -> Iterator[list[bytes]]:
        """Yield the records oldest first, as many at a time as a block holds."""
        descriptor = self._open()
        if descriptor is None:
            return
        for run in scan_lines(self._files, descriptor, 0, self._size, self._block):
            records = [line for offset, _, line in run if line is not None and self._is_record(offset, line)]
            for offset, _, line in run:
                if line is None:
                    report_bad_line(self._key, offset, strict=self._strict)
            if records:
                yield records

    def forward(self, start: int, stop: int | None) -> list[bytes]:
        """Return the records from position `start` up to `stop`."""
        found: list[bytes] = []
        position = 0
        for run in self.runs():
            if position + len(run) > start:
                found += run[max(0, start - position) : None if stop is None else max(0, stop - position)]
            position += len(run)
            if stop is not None and position >= stop:
                break
        return found

    def newest(self, count: int) -> list[bytes]:
        """Return the last `count` records, oldest first, without reading what stands before them."""
        return [line for _, line in self.backward(count)][::-1]

    def backward(self, count: int) -> list[tuple[int, bytes]]:
        """Return the last `count` records with their offsets, newest first."""
        found: list[tuple[int, bytes]] = []
        if count > 0:
            for offset, line in self._lines_backward():
                if line is None:
                    report_bad_line(self._key, offset, strict=self._strict)
                elif self._is_record(offset, line):
                    found.append((offset, line))
                    if len(found) == count:
                        break
        return found

    def _lines_backward(self) -> Iterator[tuple[int, bytes | None]]:
        """Yield the lines with their offsets, last one first; None for one that is too long to keep."""
        descriptor = self._open()
        if descriptor is None or self._size == 0:
            return
        end = self._size
        block = self._block
        rest: bytes | None = b""  # the end of a line whose beginning is not read yet; None if it is too long
        while end > 0:
            size = min(block, end)
            block = min(block * 2, _LARGEST_BLOCK)
            end -= size
            data = self._files.read(descriptor, size, end)
            if end + size == self._size:
                data = data[:-1]  # the newline of the last line
            *whole, last = data.split(b"\n")
            rest = None if rest is None or len(last) + len(rest) > codec.MAX_LINE_BYTES else last + rest
            if whole:
                offset = end + len(data) - len(last)
                yield offset, rest
                for line in reversed(whole[1:]):
                    offset -= len(line) + 1
                    yield offset, line
                rest = whole[0]
        yield 0, rest

    def _is_record(self, offset: int, line: bytes) -> bool:
        if codec.line_id(line) is not None:
            return True
        if line.strip():
            report_bad_line(self._key, offset, strict=self._strict)
        return False


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


def scan_lines(
    files: Files, descriptor: int, start: int, end: int, block: int
) -> Iterator[list[tuple[int, int, bytes | None]]]:
    """Yield the complete lines between two offsets, a block at a time: offset, offset of the next line, line.

    Blocks begin at `block` bytes and double up to 1 MiB. A line longer than `codec.MAX_LINE_BYTES` comes as None.
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
        block = min(block * 2, _LARGEST_BLOCK)
        head, newline, tail = data.rpartition(b"\n")
        if not newline:
            if skipping or len(rest) + len(data) > codec.MAX_LINE_BYTES:
                rest, skipping = b"", True
            else:
                rest += data
            continue
        run: list[tuple[int, int, bytes | None]] = []
        first, *others = (rest + head).split(b"\n")
        line_start = position - len(tail)  # behind the last newline of this block
        for line in reversed(others):
            line_start -= len(line) + 1
            run.append((line_start, line_start + len(line) + 1, line))
        run.append((offset, line_start, None if skipping or len(first) > codec.MAX_LINE_BYTES else first))
        run.reverse()
        yield run
        offset, rest, skipping = position - len(tail), tail, False
