"""A fault layer under the flat-file backend: the n-th system call fails, writes come out short.

`FaultyFiles` takes the place of the one seam to the operating system, `backends.flatfile.files.Files`:

    files = FaultyFiles()
    backend = FlatfileBackend(config, root, files=files)
    files.fail(call=3, error=errno.ENOSPC)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from ..backends.flatfile.files import Files

CHANGING = (
    "create",
    "create_to_append",
    "open_lock",
    "write",
    "write_at",
    "reserve",
    "truncate",
    "sync",
    "rename",
    "remove",
    "make_folder",
    "remove_folder",
    "sync_folder",
    "sync_file_system",
)
"""The calls that change the medium; a sweep fails each in turn."""
READING = (
    "open_to_read",
    "open_to_append",
    "open_to_change",
    "read",
    "status",
    "status_of",
    "stamp",
    "stamp_of",
    "measure",
    "list_folder",
)
_WRITING = ("write", "write_at")


class FaultyFiles(Files):
    """System calls of which chosen ones fail before they do anything."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        """The names of the watched calls since the last `fail`, `shorten` or `watch`."""
        self._names: frozenset[str] = frozenset()
        self._at = 0
        self._error = 0
        self._forever = False
        self._half = False

    def watch(self, names: Iterable[str] = CHANGING) -> None:
        """Count calls from now on; fail none."""
        self._names, self._at, self._half, self.calls = frozenset(names), 0, False, []

    def fail(self, call: int, error: int, *, names: Iterable[str] = CHANGING, forever: bool = False) -> None:
        """Fail a call from now on with `error`.

        Args:
            call: Which of the calls in `names`, counted from 1.
            error: An errno.
            names: The calls that count.
            forever: Fail all later calls in `names` as well.
        """
        self.watch(names)
        self._at, self._error, self._forever = call, error, forever

    def shorten(self, call: int, error: int | None = None) -> None:
        """Let a write take only half of its bytes; with `error`, fail the next one, as a disk that fills up does."""
        self.watch(_WRITING)
        self._at, self._error, self._forever, self._half = call, error or 0, False, True

    def _fails(self, name: str) -> bool:
        """Count a call; tell whether it is the one."""
        if name not in self._names:
            return False
        self.calls.append(name)
        count = len(self.calls)
        return self._at > 0 and (count == self._at or (self._forever and count > self._at))

    def write(self, descriptor: int, data: bytes | memoryview) -> int:
        return super().write(descriptor, self._shortened("write", data))

    def write_at(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        return super().write_at(descriptor, self._shortened("write_at", data), offset)

    def _shortened(self, name: str, data: bytes | memoryview) -> bytes | memoryview:
        """Count a write; return what of its data it takes."""
        if not self._half or name not in self._names:
            self._raise_if(name)
            return data
        self.calls.append(name)
        if len(self.calls) == self._at:
            return data[: max(1, len(data) // 2)]
        if len(self.calls) == self._at + 1 and self._error:
            raise OSError(self._error, os.strerror(self._error))
        return data

    def _raise_if(self, name: str) -> None:
        if self._fails(name):
            raise OSError(self._error, os.strerror(self._error))


def _failing(name: str) -> Callable[..., Any]:
    def call(self: FaultyFiles, *arguments: Any) -> Any:
        self._raise_if(name)
        return getattr(Files, name)(self, *arguments)

    call.__name__ = name
    return call


for _name in (*CHANGING, *READING):
    if _name not in _WRITING:
        setattr(FaultyFiles, _name, _failing(_name))
