"""A document's content on its way in and out: where it comes from, its size and hash, and its compression."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import stat
import threading
import zlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeVar

from ..errors import ConflictError, IntegrityError, StorageLimitExceeded, ValidationError

GZIP = "gzip"
"""The name of the one compression there is. On disk, do not change."""

BLOCK_BYTES = 262_144
"""Content passes through in blocks of about this size, however it was cut before."""

_IN_PLACE_BYTES = 32_768  # hashing this takes less time than a thread's hand-over
_GZIP_WINDOW = 31  # zlib's way to say: gzip, with the largest window

T = TypeVar("T")


class Incoming:
    """The content of one document that is being saved.

    Use it with `async with`; `prepare` it, then run through `blocks` once for each try to write it.
    """

    def __init__(self, content: object, *, maximum: int, threshold: int) -> None:
        """Look at the kind of the content; read nothing yet.

        Args:
            content: Bytes, a path, or an async iterable of bytes.
            maximum: `max_document_size_bytes`.
            threshold: Content of at least this many bytes is compressed; 0 compresses none.

        Raises:
            ValidationError: It is something else.
        """
        self._maximum = maximum
        self._threshold = threshold
        self._file: str | bytes | None = None
        self._head: list[bytes] = []
        self._rest: AsyncGenerator[bytes, None] | None = None
        self._begun = False
        self.compression = ""
        """`GZIP` or nothing; known after `prepare`."""
        self.size = 0
        """Bytes of the content as it was given; known when `blocks` has run through."""
        self.sha256 = ""
        """Of the content as it was given; known when `blocks` has run through."""
        if isinstance(content, bytes | bytearray | memoryview):
            self._head = [bytes(content)]
        elif isinstance(content, os.PathLike):
            self._file = os.fspath(content)
        elif isinstance(content, AsyncIterable):
            self._rest = _regrouped(content)
        else:
            raise ValidationError(
                f"content must be bytes, a path or an async iterable of bytes, not {type(content).__name__}.",
                hint="Pass text.encode() to save text, or pathlib.Path(…) to save a file."
                if isinstance(content, str)
                else "Read it into bytes, or pass a pathlib.Path.",
            )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rest is not None:
            await self._rest.aclose()

    @property
    def repeatable(self) -> bool:
        """Whether `blocks` can run through again; known after `prepare`."""
        return self._rest is None

    async def prepare(self) -> None:
        """Read as much as it takes to choose the compression.

        Raises:
            ValidationError: The file cannot be read, or the iterable yields something else than bytes.
            StorageLimitExceeded: It is certain already that the content is too large.
        """
        if self._file is not None:
            size = await asyncio.to_thread(_size_of_file, self._file)
        else:
            size = sum(map(len, self._head))
            # A stream that ends soon is kept whole, so that it can be written as often as bytes can.
            while self._rest is not None and size < max(self._threshold, BLOCK_BYTES):
                block = await anext(self._rest, None)
                if block is None:
                    self._rest = None
                else:
                    self._head.append(block)
                    size += len(block)
                    self._check_size(size)
        self._check_size(size)
        if 0 < self._threshold <= size:
            self.compression = GZIP

    async def blocks(self) -> AsyncGenerator[bytes, None]:
        """Yield the bytes that are to be stored.

        Raises:
            StorageLimitExceeded: There are more than the configuration allows.
            ConflictError: This is the second time, and the content is not `repeatable`.
        """
        if self._begun and not self.repeatable:
            raise ConflictError(
                "Another file took the name on disk while this one was uploaded.",
                hint="Send it again: its stream can be read only once.",
            )
        self._begun = True
        digest = hashlib.sha256()
        squeeze = zlib.compressobj(wbits=_GZIP_WINDOW) if self.compression else None

        def take(block: bytes) -> bytes:
            digest.update(block)
            return block if squeeze is None else squeeze.compress(block)

        size = 0
        async with aclosing(self._given()) as given:
            async for block in given:
                size += len(block)
                self._check_size(size)
                taken = await _aside(take, block)
                if taken:
                    yield taken
        if squeeze is not None:
            yield await asyncio.to_thread(squeeze.flush)
        self.size, self.sha256 = size, digest.hexdigest()

    async def _given(self) -> AsyncGenerator[bytes, None]:
        """Yield the content in blocks, as it was given."""
        if self._file is not None:
            file = _File(self._file)
            try:
                while block := await asyncio.to_thread(file.read):
                    yield block
            finally:
                await asyncio.to_thread(file.close)
            return
        for whole in self._head:
            for block in _pieces(whole):
                yield block
        if self._rest is not None:
            self._head = []
            async for block in self._rest:
                yield block

    def _check_size(self, size: int) -> None:
        if size > self._maximum:
            raise StorageLimitExceeded(limit_name="max_document_size_bytes", limit=self._maximum, value=size)


async def close(chunks: AsyncIterator[bytes]) -> None:
    """Let go of a blob that is not read to its end."""
    if isinstance(chunks, AsyncGenerator):
        await chunks.aclose()


async def outgoing(
    chunks: AsyncIterator[bytes],
    key: str,
    *,
    size: int | None,
    sha256: str | None,
    compression: str,
    first: bytes = b"",
) -> AsyncGenerator[bytes, None]:
    """Yield content as it was given from the chunks of its blob, in memory that does not grow with its size.

    Args:
        chunks: What is stored.
        key: Where, for errors.
        size: How many bytes were given; never more than these are yielded, whatever the blob expands to. None if that
            is not known.
        sha256: Their hash; None passes over that check.
        compression: `GZIP` or nothing.
        first: What was taken from `chunks` already.

    Raises:
        IntegrityError: The blob is not what was given. The size and the hash are known to be wrong only at the end.
    """
    digest = hashlib.sha256()
    expand = zlib.decompressobj(wbits=_GZIP_WINDOW) if compression else None

    def give(chunk: bytes) -> bytes:
        block = chunk if expand is None else expand.decompress(chunk, BLOCK_BYTES)
        if sha256 is not None:
            digest.update(block)
        return block

    count = 0
    try:
        async for piece in _cut(first, chunks):
            more = True
            while more:
                block = await _aside(give, piece)
                count += len(block)
                if size is not None and count > size:
                    raise _damaged(key, f"it is longer than the {size} bytes that were saved")
                if block:
                    yield block
                if expand is None:
                    break
                if expand.unused_data:
                    raise _damaged(key, "there is more behind the end of its compressed content")
                piece = expand.unconsumed_tail
                more = bool(piece) or len(block) == BLOCK_BYTES
    except zlib.error as error:
        raise _damaged(key, f"its compressed content cannot be read ({error})") from error
    finally:
        await close(chunks)
    if expand is not None and not expand.eof:
        raise _damaged(key, "its compressed content has no end")
    if size is not None and count < size:
        raise _damaged(key, f"it has {count} bytes, but {size} were saved")
    if sha256 is not None and digest.hexdigest() != sha256:
        raise _damaged(key, "its SHA-256 is not that of what was saved")


async def _cut(first: bytes, rest: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Yield the chunks of a blob in pieces that do not take long to work on."""
    for piece in _pieces(first):
        yield piece
    async for chunk in rest:
        for piece in _pieces(chunk):
            yield piece


def _pieces(whole: bytes) -> Iterator[bytes]:
    return (whole[start : start + BLOCK_BYTES] for start in range(0, len(whole), BLOCK_BYTES))


def _damaged(key: str, problem: str) -> IntegrityError:
    return IntegrityError(
        f"The file at {key} is damaged: {problem}.", key=key, hint="Save it again, or restore a backup."
    )


async def _aside(work: Callable[[bytes], T], block: bytes) -> T:
    """Do work on a block where it does not hold up the event loop."""
    if len(block) <= _IN_PLACE_BYTES:
        return work(block)
    return await asyncio.to_thread(work, block)


async def _regrouped(chunks: AsyncIterable[Any]) -> AsyncGenerator[bytes, None]:
    """Yield the same bytes in blocks: a stream of single bytes costs little, and one of a giant chunk no second copy.

    Raises:
        ValidationError: A chunk is not bytes.
    """
    gathered = bytearray()
    async for chunk in chunks:
        if not isinstance(chunk, bytes | bytearray | memoryview):
            raise ValidationError(
                f"content yielded a {type(chunk).__name__}, not bytes.", hint="Encode text before it is saved."
            )
        for piece in _pieces(bytes(chunk)):
            gathered += piece
            if len(gathered) >= BLOCK_BYTES:
                yield bytes(gathered)
                gathered.clear()
    if gathered:
        yield bytes(gathered)


# --- the caller's file: plain functions, called in threads ---------------------------------------------


def _unreadable(path: str | bytes, problem: object) -> ValidationError:
    return ValidationError(
        f"content: the file {path!r} cannot be read: {problem}.", hint="Pass the path of a plain file."
    )


def _size_of_file(path: str | bytes) -> int:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # a NUL in the path is a ValueError
        raise _unreadable(path, getattr(error, "strerror", None) or error) from error
    # Opening a pipe or a device may wait for ever, in a thread that nothing can stop.
    if not stat.S_ISREG(status.st_mode):
        raise _unreadable(path, "it is no plain file")
    return status.st_size


class _File:
    """A file that is opened by the first read. Closing it waits for a read that a cancelled caller left running."""

    def __init__(self, path: str | bytes) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._file: io.FileIO | None = None
        self._closed = False

    def read(self) -> bytes:
        with self._lock:
            if self._closed:
                return b""
            try:
                if self._file is None:
                    self._file = io.FileIO(self._path)
                return self._file.read(BLOCK_BYTES)
            except OSError as error:
                raise _unreadable(self._path, error.strerror) from error

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._file is not None:
                self._file.close()
