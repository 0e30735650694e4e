"""One thread for the blocking work of one transfer, so that its steps come one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class Thread:
    """Runs functions in its thread, in the order in which they are handed over."""

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self._executor = executor

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Return what `work` returns."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, partial(work, *arguments))

    async def finish(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do the same to the end, also when the caller is cancelled."""
        return await asyncio.shield(self.run(work, *arguments))


@asynccontextmanager
async def one_thread() -> AsyncIterator[Thread]:
    """Give a thread, which ends with the context, once it has done what was handed over."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="chatdb-transfer")
    try:
        yield Thread(executor)
    finally:
        executor.shutdown(wait=False)
