"""Reading ahead: the next run is fetched while the last one is written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import TypeVar

T = TypeVar("T")


async def ahead(items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Yield what a generator yields, which goes on meanwhile."""
    queue: asyncio.Queue[tuple[T] | BaseException | None] = asyncio.Queue(1)

    async def produce() -> None:
        try:
            async with aclosing(items):
                async for item in items:
                    await queue.put((item,))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    task = asyncio.ensure_future(produce())
    try:
        while (found := await queue.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found[0]
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
