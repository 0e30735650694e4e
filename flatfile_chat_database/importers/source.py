"""The file that is imported, line by line."""

from __future__ import annotations

import gzip
import os
import stat
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

from .report import Part, Skip

MAX_LINE_BYTES = 64 * 1024 * 1024
"""Longer lines are skipped unread: one of them must not be able to fill the memory."""

_GZIP_MAGIC = b"\x1f\x8b"


class Source:
    """The lines of a file, plain or gzip, whatever its name says."""

    def __init__(self, path: str | os.PathLike[str], *, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        """Open the file.

        Raises:
            OSError: It cannot be opened or read.
        """
        self._file = open(path, "rb")  # noqa: SIM115 - closed by `close`
        try:
            status = os.fstat(self._file.fileno())
            self.size = status.st_size if stat.S_ISREG(status.st_mode) else None
            """Bytes in the file; None if it is a pipe."""
            zipped = self._file.peek(len(_GZIP_MAGIC)).startswith(_GZIP_MAGIC)
            self._stream = cast("BinaryIO", gzip.GzipFile(fileobj=self._file)) if zipped else self._file
        except BaseException:
            self._file.close()
            raise
        self._max_line_bytes = max_line_bytes

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        self._stream.close()
        self._file.close()

    def position(self) -> int:
        """Return how many bytes of the file have been read; 0 for a pipe."""
        return 0 if self.size is None else self._file.tell()

    def lines(self) -> Iterator[tuple[int, bytes | Skip]]:
        """Yield each line with its number and without its newline; a Skip for one that cannot be had.

        Only a newline ends a line: U+2028 and the like are legal inside JSON.
        """
        number = 0
        while True:
            number += 1
            try:
                line = self._stream.readline(self._max_line_bytes + 1)
                if len(line) > self._max_line_bytes and not line.endswith(b"\n"):
                    yield number, self._pass_over(number)
                    continue
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                reason = "the compressed file is damaged from here on"
                yield number, Skip(number, Part.LINE, reason, str(error))
                return
            if not line:
                return
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            yield number, line.removesuffix(b"\n").removesuffix(b"\r")

    def _pass_over(self, number: int) -> Skip:
        size = self._max_line_bytes + 1
        while rest := self._stream.readline(1024 * 1024):
            size += len(rest)
            if rest.endswith(b"\n"):
                break
        reason = f"the line is longer than {self._max_line_bytes:,} bytes"
        return Skip(number, Part.LINE, reason, f"{size:,} bytes")
