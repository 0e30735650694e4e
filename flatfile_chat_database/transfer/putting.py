"""Putting into a store what another one has, with a mark before it: what `migrate.py` writes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Final, cast

from ..backends.base import Snapshot, StorageBackend
from ..backends.changes import ANY, Delete, Put
from ..errors import ConflictError, NotFoundError
from ..layout import Layout
from ..models import new_id
from .tally import Content, under_way

BATCH_BYTES: Final = 4 << 20
"""So much is written at a time."""
_BATCH_KEYS: Final = 2048
_AT_ONCE: Final = 2
"""Batches: the files of one are written while another one gets its names."""
_PART_BYTES: Final = 1 << 20
"""Of a log that is too large to be held, about so much is written at a time."""


@dataclass(slots=True)
class Look:
    """A key of the source, and what the target has there."""

    content: Content
    data: bytes | None
    """The bytes; None if they are too many to be held."""
    state: str = "absent"
    """Of the target's: "absent", "equal", "beginning" of what the source's log has, or "other"."""
    old: Content | None = None
    """What the target has, unless it is absent or equal."""
    version: str | None = None
    """Of what the target has, if it could be held."""


class Putting:
    """Puts bytes into the target, a few batches while the next is gathered."""

    def __init__(self, target: StorageBackend, layout: Layout, source: Snapshot) -> None:
        self._target = target
        self._layout = layout
        self._source = source
        self._items: list[tuple[str, bytes]] = []
        self._marks: list[bytes] = []
        self._size = 0
        self._at_work: deque[asyncio.Task[None]] = deque()

    async def copy(self, look: Look) -> None:
        """Put what the target has not."""
        if look.data is None:
            await self._put_large(look.content, None)
            return
        self._items.append((look.content.key, look.data))
        self._marks.append(look.content.mark)
        self._size += len(look.data)
        if self._size >= BATCH_BYTES or len(self._items) >= _BATCH_KEYS:
            await self._hand_over()

    async def go_on(self, look: Look) -> None:
        """Append what the target's log lacks."""
        assert look.old is not None
        if look.data is None:
            await self._put_large(look.content, look.old)
            return
        await self._mark(look.content.mark)
        await self._target.append(look.content.key, look.data[look.old.size :])

    async def _put_large(self, content: Content, old: Content | None) -> None:
        """Put what is too large to be held, behind what the target has of it already.

        A source that is written may give other bytes now than were looked at, or none any more. So what is there is the
        migration's own, whatever it is, until it is known what was put.
        """
        key = content.key
        mark = await self._mark(under_way(key))
        put = Content(None, key) if old is None else old
        with suppress(NotFoundError):  # it has gone from a source that is written, which is found at the end
            if content.is_log and not content.damage:
                await self._put_lines(put, is_there=old is not None)
            elif not await self._target.write_blob(key, self._passing(put)):
                raise ConflictError(f"Something is at {key} already.", key=key)
        await self._target.commit([Put(self._new_mark(), put.mark), Delete(mark)])

    async def _passing(self, put: Content) -> AsyncGenerator[bytes]:
        async with aclosing(cast("AsyncGenerator[bytes]", self._source.read(put.key))) as chunks:
            async for chunk in chunks:
                put.feed(chunk)
                yield chunk

    async def _put_lines(self, put: Content, *, is_there: bool) -> None:
        """Put a log line by line, so that a database keeps it in rows."""
        held, skip = bytearray(), put.size
        async with aclosing(cast("AsyncGenerator[bytes]", self._source.read(put.key))) as chunks:
            async for chunk in chunks:
                held += chunk[skip:]
                skip -= min(skip, len(chunk))
                end = held.rfind(b"\n") + 1
                if end >= _PART_BYTES:
                    await self._put_part(put, bytes(held[:end]), is_there=is_there)
                    del held[:end]
                    is_there = True
        if end := held.rfind(b"\n") + 1:  # half a line behind it is being written to the source
            await self._put_part(put, bytes(held[:end]), is_there=is_there)

    async def _put_part(self, put: Content, lines: bytes, *, is_there: bool) -> None:
        if is_there:
            await self._target.append(put.key, lines)
        else:
            await self._target.load([(put.key, lines)])
        put.feed(lines)

    async def replace(self, look: Look) -> None:
        """Put what the source has in the place of what the migration had put there."""
        if look.data is not None:
            await self._mark(look.content.mark)
            expected = ANY if look.version is None else look.version
            await self._target.commit([Put(look.content.key, look.data, expected)])
            return
        await self._target.delete(look.content.key)
        await self._put_large(look.content, None)

    async def finish(self) -> None:
        """Write what is left."""
        await self._hand_over()
        await self._wait(0)

    async def stop(self) -> None:
        """Wait for what is being written, whatever comes of it."""
        if self._at_work:
            ended, _ = await asyncio.wait(self._at_work)
            for task in ended:  # the first error was raised; of the others asyncio would complain
                if not task.cancelled():
                    task.exception()

    async def _mark(self, mark: bytes) -> str:
        key = self._new_mark()
        await self._target.write(key, mark)
        return key

    def _new_mark(self) -> str:
        return f"{self._layout.migration}/{new_id()}"

    async def _hand_over(self) -> None:
        await self._wait(_AT_ONCE - 1)
        if self._items:
            self._at_work.append(asyncio.ensure_future(self._load(self._items, b"".join(self._marks))))
        self._items, self._marks, self._size = [], [], 0

    async def _wait(self, left: int) -> None:
        """Wait until no more batches than so many are being written."""
        while len(self._at_work) > left:
            await self._at_work.popleft()

    async def _load(self, items: Sequence[tuple[str, bytes]], marks: bytes) -> None:
        await self._target.load([(self._new_mark(), marks)])
        await self._target.load(items)
