"""Cases of the contract: waiting for a change."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence

import pytest

from ..backends.base import StorageBackend
from ..backends.changes import Append, Delete, Move, Put, RemoveTree
from ..errors import ClosedError
from .case import LOG, BackendCase, lines
from .sentences import says

_LONG = 3600.0
"""Seconds that nobody waits who is woken."""
_PATIENCE = 60.0
"""Seconds in which whoever is woken has long been so."""


async def begun(store: StorageBackend, *keys: str) -> asyncio.Task[None]:
    """Begin to wait in a task that has run once."""
    task = asyncio.ensure_future(store.wait_for_change(keys, _LONG))
    await asyncio.sleep(0)
    return task


async def waits_until(store: StorageBackend, keys: Sequence[str], is_there: Callable[[], Awaitable[bool]]) -> None:
    """Wait, as the contract says how, for something that comes."""
    while True:
        waiting = await begun(store, *keys)
        if await is_there():
            waiting.cancel()
            await asyncio.wait([waiting])
            return
        await waiting


class WaitingCases(BackendCase):
    """Whoever waits learns of every change in the end."""

    @says(
        "StorageBackend.wait_for_change",
        "Return when something at or below one of `keys` may have changed since the waiting began, or after `seconds`.",
        '"" is the store itself.',
        "A backend that has its own method wakes at once whoever waits by the handle that changes something; this one "
        "only polls.",
    )
    async def test_a_change_wakes_who_waits_for_it(self) -> None:
        store = await self.open(watch_poll_seconds=_LONG)
        if type(store).wait_for_change is StorageBackend.wait_for_change:  # which does nothing but poll
            store = await self.open()
        await store.write("a/b/c", b"1")
        for change in (
            Append(LOG, lines(1)), Put("a/b/c", b"2"), Move("a/b", "a/d"), Move("a/d", "a/b"), Delete("a/b/c"),
            RemoveTree("users"),
        ):  # fmt: skip
            own = "users/ann" if isinstance(change, Append | RemoveTree) else "a/b"
            waiting = [await begun(store, own), await begun(store, ""), await begun(store, "elsewhere", own)]
            await store.commit([change])
            await asyncio.wait_for(asyncio.gather(*waiting), _PATIENCE)
        for seconds in (0, 0.01, 1e-9):
            await asyncio.wait_for(store.wait_for_change(["a"], seconds), _PATIENCE)

    @says(
        "StorageBackend.wait_for_change",
        "It may return early, and for no reason, so whoever waits looks what there is, and waits again.",
        "So that nothing comes in between, the waiting begins before the look: in a task that has run once.",
        "Changes by other processes count as well; where nothing tells of them, it returns after `watch_poll_seconds`, "
        "or a little later where a look is paid for.",
    )
    async def test_whoever_waits_and_looks_misses_nothing(self) -> None:
        store, other = await self.open(), await self.open()
        for number in range(8):

            async def is_there(wanted: int = number) -> bool:
                return await store.count_log(LOG) > wanted

            waiting = asyncio.ensure_future(waits_until(store, [LOG], is_there))
            await (store, other)[number % 2].commit([Append(LOG, lines(1, number))])
            await asyncio.wait_for(waiting, _PATIENCE)

    @says(
        "StorageBackend.wait_for_change",
        "Any number may wait at once, in several threads and event loops; a backend that is closed meanwhile wakes "
        "them.",
    )
    async def test_any_number_may_wait_at_once(self) -> None:
        store = await self.open()
        await store.commit([Append(LOG, lines(1))])

        async def wait() -> None:
            async def is_there() -> bool:
                return await store.count_log(LOG) > 1

            await asyncio.gather(*(waits_until(store, [LOG], is_there) for _ in range(20)))

        async def loop_of_its_own() -> None:
            await asyncio.to_thread(asyncio.run, wait())

        everybody = asyncio.gather(loop_of_its_own(), loop_of_its_own(), wait())
        await store.commit([Append(LOG, lines(1, 1))])
        await asyncio.wait_for(everybody, _PATIENCE)

        waiting, has_begun = [await begun(store, LOG), await begun(store, "")], threading.Event()

        async def wait_elsewhere() -> None:
            task = await begun(store, LOG)
            has_begun.set()
            await task

        elsewhere = asyncio.ensure_future(asyncio.to_thread(asyncio.run, wait_elsewhere()))
        await asyncio.to_thread(has_begun.wait, 60)
        await store.close()
        results = await asyncio.wait_for(asyncio.gather(*waiting, elsewhere, return_exceptions=True), _PATIENCE)
        assert all(result is None or isinstance(result, ClosedError) for result in results), results

    async def test_who_stops_waiting_leaves_the_others(self) -> None:
        store = await self.open()
        await store.commit([Append(LOG, lines(1))])
        one, other = await begun(store, LOG), await begun(store, LOG)
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        await store.commit([Append(LOG, lines(1, 1))])
        await asyncio.wait_for(other, _PATIENCE)
