"""Cases of the contract: blobs."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator

import pytest

from ..backends.base import Capability, StorageBackend
from ..backends.changes import Append, Delete, Put
from ..errors import NotFoundError, StorageError, ValidationError
from .case import BackendCase, all_of, chunks, largest_file, lines, needs
from .sentences import says

BLOB = "users/ann/chat/documents/report.pdf"


async def content(store: StorageBackend, key: str = BLOB) -> bytes:
    """Read a blob whole."""
    return b"".join(await all_of(store.read_blob(key)))


class BlobCases(BackendCase):
    """Blobs."""

    @says("StorageBackend.write_blob", "Write a blob from its chunks.")
    @says(
        "StorageBackend.read_blob",
        "Yield a blob's bytes in chunks; raise NotFoundError before the first if there is none.",
    )
    async def test_a_blob_comes_back_as_it_was_given(self) -> None:
        store = await self.open()
        shapes = {
            "none": (),
            "empty": (b"", b""),
            "small": (b"a", b"", b"b\n", b"\0\xff"),
            "large": tuple(bytes([number]) * 70_000 for number in range(40)),
            "huge chunk": (b"x" * 3_000_001,),
        }
        for name, pieces in shapes.items():
            assert await store.write_blob(f"b/{name}", chunks(*pieces)) is True
            assert await content(store, f"b/{name}") == b"".join(pieces)
            assert self.peek(f"b/{name}") == b"".join(pieces)
        assert await store.read("b/small") == b"ab\n\0\xff", "a blob is bytes at a key like all others"
        assert sorted(self.peek_keys()) == sorted(f"b/{name}" for name in shapes)

    @says(
        "StorageBackend.read_blob",
        "Yield a blob's bytes in chunks; raise NotFoundError before the first if there is none.",
    )
    async def test_a_blob_that_is_absent_is_an_error(self) -> None:
        self.poke("b/c", b"")
        store = await self.open()
        for absent in (BLOB, "b/d"):
            with pytest.raises(NotFoundError) as error:
                await anext(store.read_blob(absent))
            assert error.value.key == absent

    @says("StorageBackend.write_blob", "Return False, and change nothing, if something is at `key` already.")
    async def test_a_blob_is_never_overwritten(self) -> None:
        store = await self.open()
        await store.write_blob("b/blob", chunks(b"first"))
        await store.commit([Put("b/document", b"first"), Append("b/log", lines(1))])
        before = self.contents()
        for key in before:
            assert await store.write_blob(key, chunks(b"second")) is False
            assert await store.write_blob(key, chunks()) is False
        assert self.contents() == before

    @says("StorageBackend.write_blob", "Return False, and change nothing, if something is at `key` already.")
    async def test_of_writers_at_once_one_wins(self) -> None:
        store = await self.open()
        pieces = [str(number).encode() * 300_000 for number in range(8)]
        results = await asyncio.gather(*(store.write_blob(BLOB, chunks(piece, piece)) for piece in pieces))
        assert sorted(results) == [False] * 7 + [True]
        assert self.contents() == {BLOB: pieces[results.index(True)] * 2}

    @says(
        "StorageBackend.write_blob",
        "The blob is there whole or not at all: an error in `chunks` is raised as it is and leaves nothing behind.",
    )
    @pytest.mark.parametrize("after", [0, 1, 50])
    async def test_an_error_in_the_chunks_leaves_nothing_behind(self, after: int) -> None:
        store = await self.open()
        error = ZeroDivisionError("the caller's own")

        async def failing() -> AsyncIterator[bytes]:
            for _ in range(after):
                yield b"x" * 100_000
            raise error

        with pytest.raises(ZeroDivisionError) as caught:
            await store.write_blob(BLOB, failing())
        assert caught.value is error
        assert not await store.exists(BLOB)
        assert self.contents() == {}
        assert await store.write_blob(BLOB, chunks(b"again")) is True

    @says(
        "StorageBackend.write_blob",
        "The blob is there whole or not at all: an error in `chunks` is raised as it is and leaves nothing behind.",
    )
    async def test_a_blob_that_is_being_written_is_not_there_yet(self) -> None:
        store = await self.open()

        async def looking() -> AsyncIterator[bytes]:
            for _ in range(30):
                assert not await store.exists(BLOB)
                assert await store.list_keys("") == []
                yield b"x" * 100_000

        assert await store.write_blob(BLOB, looking())
        assert await content(store) == b"x" * 3_000_000

    @says(
        "StorageBackend.write_blob",
        "The blob is there whole or not at all: an error in `chunks` is raised as it is and leaves nothing behind.",
    )
    async def test_a_cancelled_blob_is_there_whole_or_not_at_all(self) -> None:
        store = await self.open()

        async def slow() -> AsyncIterator[bytes]:
            for _ in range(10):
                await asyncio.sleep(0)
                yield b"x" * 200_000

        for pauses in range(0, 60, 2):
            key = f"b/{pauses}"
            task = asyncio.ensure_future(store.write_blob(key, slow()))
            for _ in range(pauses):
                await asyncio.sleep(0.0002)
            task.cancel()
            await asyncio.wait([task])
            await store.write("later", b"")
            assert self.peek(key) in (None, b"x" * 2_000_000)
        for key in self.peek_keys():
            await store.delete(key)

    @says(
        "StorageBackend.write_blob",
        "The blob is there whole or not at all: an error in `chunks` is raised as it is and leaves nothing behind.",
    )
    async def test_a_blob_that_does_not_fit_on_the_medium_leaves_nothing_behind(self) -> None:
        store = await self.open()
        with largest_file(1 << 20):
            try:
                await store.write_blob(BLOB, chunks(*[b"x" * 100_000] * 30))
            except StorageError:
                assert self.contents() == {}
                assert await store.write_blob(BLOB, chunks(b"small"))

    @says(
        "StorageBackend.read_blob",
        "The chunks are those of one whole write, also when the blob is replaced or removed meanwhile.",
    )
    @pytest.mark.parametrize("change", ["replace", "remove"])
    async def test_a_blob_that_goes_while_it_is_read_is_read_to_its_end(self, change: str) -> None:
        store = await self.open()
        await store.write_blob(BLOB, chunks(*[b"1" * 100_000] * 30))
        stream = store.read_blob(BLOB)
        read = [await anext(stream)]
        await store.commit([Delete(BLOB)])
        if change == "replace":
            await store.write_blob(BLOB, chunks(*[b"2" * 100_000] * 40))
        read += await all_of(stream)
        assert b"".join(read) == b"1" * 3_000_000

    @says(
        "StorageBackend.read_blob",
        "Yield a blob's bytes in chunks; raise NotFoundError before the first if there is none.",
    )
    async def test_reading_a_blob_may_be_left_early(self) -> None:
        store = await self.open()
        await store.write_blob(BLOB, chunks(*[b"1" * 100_000] * 30))
        stream = store.read_blob(BLOB)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        assert await store.delete(BLOB)

    @needs(Capability.STREAMED_BLOBS)
    @says("Capability.STREAMED_BLOBS", "Blobs are read and written in chunks; memory does not grow with their size.")
    async def test_a_large_blob_takes_little_memory(self) -> None:
        store = await self.open()
        piece = bytes(range(256)) * 256

        async def many() -> AsyncIterator[bytes]:
            for _ in range(1024):
                yield piece

        size = 0
        tracemalloc.start()
        try:
            await store.write_blob(BLOB, many())
            async for chunk in store.read_blob(BLOB):
                size += len(chunk)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert size == 1024 * len(piece)
        assert peak < size / 8

    @says(
        "StorageBackend.set_aside",
        "Move what is at `key` to the quarantine, with a note of the reason; return its new key.",
    )
    async def test_what_is_set_aside_is_kept_with_a_note(self) -> None:
        store = await self.open()
        data = b"\x00 damaged \xff"
        await store.write("a/b", data)
        await store.write("a/c", b"beside")
        target = await store.set_aside("a/b", "a reason to remember")
        contents = self.contents()
        assert contents.pop("a/c") == b"beside"
        assert contents.pop(target) == data
        assert await store.read(target) == data
        [(note, text)] = contents.items()
        assert note.rpartition("/")[0] == target.rpartition("/")[0]
        assert b'"a/b"' in (text or b"")
        assert b"a reason to remember" in (text or b"")
        await store.write("a/b", data)
        assert await store.set_aside("a/b", "again") != target
        with pytest.raises(ValidationError):
            await store.set_aside("../b", "no key")
