"""Small results of reading files, kept until the files change: listing a thousand sessions reads none of them twice.

A result counts as long as device, inode, size and time of change of its file are as they were before it was read. That
of a file which changed only just now is not kept, for the file might change again within the same tick of the file
system's clock (the "racily clean" entries of git's index).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from .files import Files

_LARGEST_BYTES = 4096
_TOTAL_BYTES = 32 << 20
_ENTRY_BYTES = 500
"""What an entry takes besides its value, about."""
_SETTLED_NANOSECONDS = 1_000_000_000


class Memo:
    """Values by path; for any thread."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._values: dict[str, tuple[tuple[int, int, int, int], bytes | None]] = {}
        self._size = 0

    def get(self, path: str, load: Callable[[], bytes | None]) -> bytes | None:
        """Return what `load` reads from the file at `path`, or read then and unchanged since."""
        try:
            stamp = self._files.stamp(path)
        except FileNotFoundError:
            return load()
        known = self._values.get(path)
        if known is not None and known[0] == stamp:
            return known[1]
        value = load()
        if time.time_ns() - stamp[3] > _SETTLED_NANOSECONDS and len(value or b"") <= _LARGEST_BYTES:
            self._size += _ENTRY_BYTES + len(value or b"")
            if self._size > _TOTAL_BYTES:  # rare enough to begin anew, which needs no order of use
                self._values.clear()
                self._size = 0
            self._values[path] = (stamp, value)
        return value
