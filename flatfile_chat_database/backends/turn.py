"""Turns that coroutines take one after the other, whichever threads and event loops they run on, and finish."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class Turn:
    """`async with turn:` holds it, one at a time or as many as it has places; who waits longest is next.

    `asyncio.Lock` belongs to one event loop, and `threading.Lock` would block a loop while another one holds it.
    """

    def __init__(self, places: int = 1) -> None:
        self._guard = threading.Lock()  # held for a few instructions only
        self._free = places
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __aenter__(self) -> None:
        with self._guard:
            if self._free:
                self._free -= 1
                return
            mine = asyncio.get_running_loop().create_future()
            self._waiting.append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            with self._guard:
                given = mine not in self._waiting
                if not given:
                    self._waiting.remove(mine)
            if given:
                self._pass_on()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pass_on()

    def _pass_on(self) -> None:
        with self._guard:
            while self._waiting:
                heir = self._waiting.popleft()
                # A loop that is closed has forgotten its coroutines; the turn goes to the one after.
                with contextlib.suppress(RuntimeError):
                    heir.get_loop().call_soon_threadsafe(_wake, heir)
                    return
            self._free += 1


def _wake(heir: asyncio.Future[None]) -> None:
    if not heir.done():
        heir.set_result(None)


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its end, also when the caller is cancelled meanwhile; then be cancelled."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # looked at; the caller has no use for it any more
        raise
