"""Putting into a store what another one has, with a mark before it: what `migrate.py` writes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Final, cast

from ..backends.base import Snapshot, StorageBackend
from ..backends.changes import ANY, Put
from ..errors import ConflictError, NotFoundError
from ..layout import Layout
from ..models import new_id
from .tally import Content

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
            await self._mark(look)
            with suppress(NotFoundError):  # it has gone from a source that is written, which is found at the end
                await self._copy_large(look.content)
            return
        self._items.append((look.content.key, look.data))
        self._marks.append(look.content.mark)
        self._size += len(look.data)
        if self._size >= BATCH_BYTES or len(self._items) >= _BATCH_KEYS:
            await self._hand_over()

    async def _copy_large(self, content: Content) -> None:
        key = content.key
        if content.is_log and not content.damage:
            await self._put_lines(key, 0)
        elif not await self._target.write_blob(key, self._source.read(key)):
            raise ConflictError(f"Something is at {key} already.", key=key)

    async def go_on(self, look: Look) -> None:
        """Append what the target's log lacks."""
        assert look.old is not None
        await self._mark(look)
        skip = look.old.size
        if look.data is not None:
            await self._target.append(look.content.key, look.data[skip:])
            return
        await self._put_lines(look.content.key, skip)

    async def _put_lines(self, key: str, skip: int) -> None:
        """Put a log line by line, so that a database keeps it in rows; the target has so many bytes of it already."""
        held, is_there = bytearray(), skip > 0
        async with aclosing(cast("AsyncGenerator[bytes]", self._source.read(key))) as chunks:
            async for chunk in chunks:
                held += chunk[skip:]
                skip -= min(skip, len(chunk))
                end = held.rfind(b"\n") + 1
                if end >= _PART_BYTES:
                    await self._put_part(key, bytes(held[:end]), is_there=is_there)
                    del held[:end]
                    is_there = True
        if end := held.rfind(b"\n") + 1:  # half a line behind it is being written to the source
            await self._put_part(key, bytes(held[:end]), is_there=is_there)

    async def _put_part(self, key: str, lines: bytes, *, is_there: bool) -> None:
        if is_there:
            await self._target.append(key, lines)
        else:
            await self._target.load([(key, lines)])

    async def replace(self, look: Look) -> None:
        """Put what the source has in the place of what the migration had put there."""
        await self._mark(look)
        if look.data is not None:
            expected = ANY if look.version is None else look.version
            await self._target.commit([Put(look.content.key, look.data, expected)])
            return
        await self._target.delete(look.content.key)
        await self.copy(look)

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

    async def _mark(self, look: Look) -> None:
        await self._target.write(f"{self._layout.migration}/{new_id()}", look.content.mark)

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
        await self._target.load([(f"{self._layout.migration}/{new_id()}", marks)])
        await self._target.load(items)
