"""Who waits for a change of a store, in whichever threads and event loops, and is woken by it.

A backend whose changes pass through it wakes those who wait for one of their keys; what tells of the changes of other
processes knows no keys, and wakes everybody.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from typing import Self

from ..errors import ClosedError


class Interest(frozenset[str]):
    """Keys that somebody cares for, with all that is below them.

    Who waits again and again for the same ones, and for many, hands over the same one, so that it is made once.
    """

    above: frozenset[str]
    """The folders that they are in."""

    def __new__(cls, keys: Iterable[str]) -> Self:
        self = super().__new__(cls, keys)
        self.above = frozenset(folder for key in self for folder in folders_above(key))
        return self

    def is_touched(self, changed: Touched) -> bool:
        """Whether one of the changed keys is at or below one of these, or a folder that one of these is in."""
        return "" in self or not (self.isdisjoint(changed.around) and self.above.isdisjoint(changed.keys))


class Touched:
    """Keys and folders that changed, as many who care for others ask of them."""

    __slots__ = ("around", "keys")

    def __init__(self, keys: Collection[str]) -> None:
        self.keys = frozenset(keys)
        self.around = self.keys.union(folder for key in keys for folder in folders_above(key))


class _Sleeper:
    """Somebody who waits."""

    __slots__ = ("future", "interest")

    def __init__(self, interest: Interest) -> None:
        self.interest = interest
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def wake(self) -> None:
        with suppress(RuntimeError):  # its loop is closed, and has forgotten it
            self.future.get_loop().call_soon_threadsafe(_end, self.future)


class Waking:
    """Those who wait for a change of one open store."""

    def __init__(self) -> None:
        self._guard = threading.Lock()  # held for a few instructions only
        self._sleepers: set[_Sleeper] = set()
        self._closed = False

    @property
    def is_awaited(self) -> bool:
        """Whether anybody waits."""
        return bool(self._sleepers)

    async def wait(self, keys: Collection[str], seconds: float, begin: Callable[[], float] | None = None) -> None:
        """Wait until one of `keys`, or something below it, is told to have changed, or for so many seconds.

        `begin` is called once this is one of those who wait, and returns how many seconds it may be at most.

        Raises:
            ClosedError: The store is closed, or was closed meanwhile.
        """
        sleeper = _Sleeper(keys if isinstance(keys, Interest) else Interest(keys))
        with self._guard:
            self._check_open()
            self._sleepers.add(sleeper)
        try:
            if begin is not None:
                seconds = min(seconds, begin())
            await asyncio.wait([sleeper.future], timeout=seconds)
        finally:
            with self._guard:
                self._sleepers.discard(sleeper)
        self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("The store is closed.", hint="Open a new StorageManager.")

    def tell(self, changed: Collection[str] | None) -> None:
        """Wake those who wait for one of these keys, or everybody; from any thread."""
        if not self._sleepers:
            return
        touched = None if changed is None else Touched(changed)
        with self._guard:
            woken = [sleeper for sleeper in self._sleepers if touched is None or sleeper.interest.is_touched(touched)]
            self._sleepers.difference_update(woken)
        for sleeper in woken:
            sleeper.wake()

    def close(self) -> None:
        """Wake everybody, and let nobody wait any more."""
        with self._guard:
            self._closed = True
        self.tell(None)


def folders_above(key: str) -> Iterator[str]:
    """Yield the folders that a key or folder is in, the innermost first, without the store itself."""
    end = key.rfind("/")
    while end > 0:
        yield key[:end]
        end = key.rfind("/", 0, end)


def _end(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
