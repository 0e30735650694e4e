"""One thread for the blocking work of one transfer, so that its steps come one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing
from functools import partial
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class _Closable(Protocol):
    def close(self) -> Any: ...


Opened = TypeVar("Opened", bound=_Closable)


class Thread:
    """Runs functions in its thread, in the order in which they are handed over."""

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self._executor = executor
        self._opened = ExitStack()

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Return what `work` returns."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, partial(work, *arguments))

    async def opened(self, work: Callable[..., Opened], *arguments: Any) -> Opened:
        """Return what `work` returns, which is closed at the end, also when the caller is cancelled meanwhile."""
        return await self.run(lambda: self._opened.enter_context(closing(work(*arguments))))

    async def end(self) -> None:
        """Close what was opened, the last one first, once all is done that was handed over."""
        await asyncio.shield(self.run(self._opened.close))


@asynccontextmanager
async def one_thread() -> AsyncIterator[Thread]:
    """Give a thread, which ends with the context."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="chatdb-transfer")
    thread = Thread(executor)
    try:
        yield thread
    finally:
        try:
            await thread.end()
        finally:
            executor.shutdown(wait=False)
