"""Reading JSONL logs by blocks: forwards, backwards, past damage, never past the last newline.

A reader takes no lock and repairs nothing: half a line at the end is what a writer at work looks like.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator

from ... import codec
from ..base import report_bad_line
from .files import Files

_LARGEST_BLOCK = 1 << 20


class LogReader:
    """One open log as it was when it was opened: later appends are not seen, later rewrites do not disturb."""

    def __init__(self, files: Files, descriptor: int | None, key: str, *, block: int, strict: bool = False) -> None:
        """Read from `descriptor` (None: nothing), which the reader closes, by blocks of at least `block` bytes."""
        self._files = files
        self._descriptor = descriptor
        self._key = key
        self._block = block
        self._strict = strict
        self._size = 0
        self._lock = threading.Lock()
        self._runs = self.runs()
        if descriptor is not None:
            status = files.status_of(descriptor)
            if status.kind != "file":
                raise IsADirectoryError(errno.EISDIR, "Is no file", key)
            self._size = status.size

    def close(self) -> None:
        with self._lock:  # a cancelled caller may have left `next_run` at work in another thread
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is not None:
                self._files.close(descriptor)

    def next_run(self) -> list[bytes] | None:
        """Return the next of `runs`, or None at the end."""
        with self._lock:
            return next(self._runs, None) if self._descriptor is not None else None

    def __enter__(self) -> LogReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def runs(self) -> Iterator[list[bytes]]:
        """Yield the records oldest first, as many at a time as a block holds."""
        if self._descriptor is None:
            return
        for run in scan_lines(self._files, self._descriptor, 0, self._size, self._block):
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
        if self._descriptor is None:
            return found
        end = self._size  # what is known of the file begins here
        rest = b""  # bytes from `end` on, up to the line that was taken last
        block = self._block
        started = False  # whether the last newline was seen; what stands behind it is no line yet
        while len(found) < count and (end > 0 or (started and rest)):
            size = min(block, end)
            block = min(block * 2, _LARGEST_BLOCK)
            end -= size
            rest = self._files.read(self._descriptor, size, end) + rest
            if not started:
                cut = rest.rfind(b"\n")
                if cut < 0:
                    continue
                rest, started = rest[:cut], True
            lines = rest.split(b"\n")
            rest = lines.pop(0) if end > 0 else b""
            offset = end + (len(rest) + 1 if end > 0 else 0) + sum(len(line) + 1 for line in lines)
            for line in reversed(lines):
                offset -= len(line) + 1
                if self._is_record(offset, line):
                    found.append((offset, line))
                    if len(found) == count:
                        break
            if end == 0:
                break
        return found

    def _is_record(self, offset: int, line: bytes) -> bool:
        if codec.line_id(line) is not None:
            return True
        if line.strip():
            report_bad_line(self._key, offset, strict=self._strict)
        return False


def open_log(files: Files, path: str, key: str, *, block: int, strict: bool = False) -> LogReader:
    """Open a log to read; an absent one reads as empty."""
    try:
        descriptor = files.open_to_read(path)
    except FileNotFoundError:
        return LogReader(files, None, key, block=block, strict=strict)
    try:
        return LogReader(files, descriptor, key, block=block, strict=strict)
    except BaseException:
        files.close(descriptor)
        raise


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
