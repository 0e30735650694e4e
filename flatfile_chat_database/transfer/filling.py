"""Putting files of an archive into a backend: small ones together, large ones in pieces."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator
from typing import BinaryIO, Final

from .. import codec
from ..backends.base import StorageBackend
from ..errors import ConflictError
from ..layout import Shape
from .reading import Item
from .thread import Thread

BATCH_BYTES: Final = 4 << 20
BATCH: Final = 512
"""Files that are put into a store as one commit, at most."""
_PIECE_BYTES: Final = 1 << 20


def batches(items: Iterator[Item]) -> Generator[list[Item]]:
    """Yield items in runs, a large one by itself. Blocks."""
    batch: list[Item] = []
    size = 0
    for item in items:
        if item.data is None:
            if batch:
                yield batch
            yield [item]  # before the next is asked for, which closes its file
            batch, size = [], 0
            continue
        batch.append(item)
        size += item.size
        if size >= BATCH_BYTES or len(batch) >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


async def put_large(backend: StorageBackend, item: Item, file: BinaryIO, thread: Thread) -> None:
    """Put a large file where nothing is.

    A log goes in line by line, so that a database keeps it in rows; other files, and logs with lines that are no
    messages, go in as the bytes they are.

    Raises:
        ConflictError: Something is there.
    """
    if item.sight.shape is Shape.LOG and await thread.run(_is_clean, file):
        lines = whole_lines(file)
        await backend.load([(item.key, await thread.run(next, lines, b""))])
        while piece := await thread.run(next, lines, b""):
            await backend.append(item.key, piece)
    elif not await backend.write_blob(item.key, pieces(file, thread)):
        raise ConflictError(f"There is something at {item.key} already.", key=item.key)


async def pieces(file: BinaryIO, thread: Thread) -> AsyncIterator[bytes]:
    """Yield the rest of a file."""
    while piece := await thread.run(file.read, _PIECE_BYTES):
        yield piece


def whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the rest of a file in pieces that end with a line. Blocks."""
    while piece := file.read(_PIECE_BYTES):
        yield piece if piece.endswith(b"\n") else piece + file.readline()


def _is_clean(file: BinaryIO) -> bool:
    """Tell whether every line of a log is a message; leave the file at its beginning."""
    try:
        return all(
            line.endswith(b"\n") and codec.line_id(line[:-1]) is not None
            for line in iter(lambda: file.readline(codec.MAX_LINE_BYTES + 2), b"")
        )
    finally:
        file.seek(0)
