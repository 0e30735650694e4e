"""Copying to the second of two stores what it lacks, in a thread, so that nobody waits for it."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from contextlib import suppress
from typing import Protocol

from ..errors import NotFoundError, StorageError
from .base import StorageBackend, logger
from .behind import Behind, removal
from .carrier import AT_ONCE, Carrier
from .writers import BEAT_SECONDS

LOOK_SECONDS = 1.0
"""So often it is looked whether another process has switched, and whether one has left records behind."""
_RETRY_SECONDS = (0.1, 5.0)
"""After an error of the second store: at first, and at most."""
_GOODBYE_SECONDS = 5.0
"""How long the second store may catch up when the store is closed."""


class Mirror(Protocol):
    """The two stores, as whoever copies sees them."""

    behind: Behind
    problem: str
    """Why the second store cannot be used now; "" if it can."""

    @property
    def first(self) -> StorageBackend: ...

    @property
    def second(self) -> StorageBackend: ...

    async def look(self) -> None:
        """Look which store is the first one."""

    def carrier(self) -> Carrier:
        """Return what carries from the first store to the second, in this event loop."""

    def is_switching(self, error: BaseException) -> bool:
        """Tell whether an error says that the stores are switched, or about to be."""

    async def beat(self) -> None:
        """Show the others that this process is there."""

    async def say_goodbye(self) -> None:
        """Take that back."""


class Copying:
    """The thread, with an event loop of its own."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._loop = asyncio.new_event_loop()
        self._awake = asyncio.Event()
        self._until: float | None = None
        self._looked = 0.0
        self._carrier: Carrier | None = None
        self._thread = threading.Thread(target=self._run, name="chatdb-mirror", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Say that there is something to be copied."""
        with suppress(RuntimeError):  # its loop has ended
            self._loop.call_soon_threadsafe(self._awake.set)

    def stop(self) -> None:
        """Copy what is left, for a while, and end; blocks."""
        self._until = time.monotonic() + _GOODBYE_SECONDS
        self.wake()
        self._thread.join(2 * _GOODBYE_SECONDS)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._live())
        finally:
            self._loop.close()

    async def _live(self) -> None:
        beating = asyncio.ensure_future(self._beat())  # beside the copying, which may take long
        try:
            await self._work()
        finally:
            beating.cancel()
            with suppress(asyncio.CancelledError):
                await beating
            with suppress(StorageError):  # it is of no use to anybody any more
                await self._mirror.say_goodbye()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            with suppress(StorageError):  # whoever writes is told
                await self._mirror.beat()

    async def _work(self) -> None:
        mirror, pause = self._mirror, _RETRY_SECONDS[0]
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS / 2):
                    await self._awake.wait()
            self._awake.clear()
            is_last, restless = self._until is not None, 0
            try:
                restless = await self._copy_some()
                if gone := mirror.behind.retire(at_once=is_last):
                    await mirror.first.commit(removal(gone))
                    mirror.behind.removed(gone)
                pause = _RETRY_SECONDS[0]
                if mirror.problem:
                    logger.warning("the second store is in use again, and gets what it lacks")
                    mirror.problem = ""
            except Exception as error:
                if isinstance(error, NotFoundError) and mirror.is_switching(error):
                    self._looked = 0.0
                else:
                    if not mirror.problem and time.monotonic() < (self._until or math.inf):  # later they are closed
                        text = "the second store cannot be used now, and gets what it lacks later (%s)"
                        logger.warning(text, error, exc_info=not isinstance(error, StorageError))
                    mirror.problem = str(error) or type(error).__name__
                if not is_last:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, _RETRY_SECONDS[1])
            # What others change all the time they have recorded as well.
            is_done = mirror.behind.count <= restless or time.monotonic() > (self._until or 0)
            if is_last and (mirror.problem or is_done):
                return
            if restless and not is_last:
                await asyncio.sleep(_RETRY_SECONDS[0])  # somebody else copies it too, and two are in each other's way
            if mirror.behind.has_work or self._until is not None:
                self._awake.set()

    async def _copy_some(self) -> int:
        """Copy what is next; return how many keys of it change all the time."""
        mirror, is_due = self._mirror, False
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            await mirror.look()
            is_due = True
        if self._carrier is None or self._carrier.first is not mirror.first:
            await mirror.second.open()
            self._carrier = mirror.carrier()
        if is_due:
            await self._carrier.take_over()
        names = mirror.behind.next(AT_ONCE)
        try:
            restless = await self._carrier.carry(names)
        except BaseException:
            mirror.behind.copied(names, missed=names)
            raise
        mirror.behind.copied(names)
        return len(restless)
