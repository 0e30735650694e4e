"""What a derived index asks of files: whether one has changed, and pieces of logs by byte offset."""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence

from ...models import new_id
from ..base import LogPart
from .files import Files
from .logs import end_of_lines, scan_lines

_PART_BYTES = 1 << 20
_SETTLED_NANOSECONDS = 1_000_000_000


def stamp(files: Files, path: str) -> str | None:
    """Return the stamp of the file at `path`, or None if there is none.

    A file that changed only just now may change again within the same tick of the file system's clock, so its stamp
    equals no other.
    """
    try:
        device, inode, size, modified = files.stamp(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    settled = time.time_ns() - modified > _SETTLED_NANOSECONDS
    return f"{device}:{inode}:{size}:{modified}" + ("" if settled else f":{new_id()}")


def read_part(files: Files, path: str, key: str, identity: str | None, start: int) -> LogPart | None:
    """Return whole lines of the log at `path`; see `StorageBackend.read_log_part`."""
    try:
        descriptor = files.open_to_read(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        status = files.status_of(descriptor)
        if status.kind != "file":
            raise IsADirectoryError(errno.EISDIR, "Is no file", key)
        # An inode alone may be that of an earlier file, given out again.
        found = f"{status.device}:{status.inode}:{files.generation(descriptor)}"
        size = end_of_lines(files, descriptor, status.size)
        if found != identity or start > size:
            start = 0
        run = next(scan_lines(files, descriptor, start, size, _PART_BYTES), [])
        lines = [(offset, line) for offset, _, line in run if line is not None]
        end = run[-1][1] if run else start
        return LogPart(found, start, end, lines, more=end < size)
    finally:
        files.close(descriptor)


def read_places(files: Files, places: Sequence[tuple[str, str, int, int]]) -> list[bytes | None]:
    """Return the bytes of each place (path, key, offset, length); None where there are not so many."""
    found: list[bytes | None] = [None] * len(places)
    order = sorted(range(len(places)), key=lambda number: places[number][0])  # each file is opened once
    opened: str | None = None
    descriptor = -1
    try:
        for number in order:
            path, _, offset, length = places[number]
            if path != opened:
                if descriptor >= 0:
                    files.close(descriptor)
                descriptor, opened = -1, path
                try:
                    descriptor = files.open_to_read(path)
                    if files.status_of(descriptor).kind != "file":
                        files.close(descriptor)
                        descriptor = -1
                except (FileNotFoundError, NotADirectoryError):
                    pass
            if descriptor >= 0:
                piece = files.read(descriptor, length, offset)
                found[number] = piece if len(piece) == length else None
    finally:
        if descriptor >= 0:
            files.close(descriptor)
    return found
