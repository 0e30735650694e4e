"""Copying to the second of two stores what it lacks, in a thread, so that nobody waits for it."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from typing import Protocol

from ..errors import NotFoundError
from ..layout import Layout
from .alike import Alike
from .base import StorageBackend, logger
from .behind import Behind, removal

LOOK_SECONDS = 1.0
"""So often it is looked whether another process has switched, and whether one has left records behind."""
AT_ONCE = 16
"""So many keys are copied at the same time."""
_RETRY_SECONDS = (0.1, 5.0)
"""After an error of the second store: at first, and at most."""
_GOODBYE_SECONDS = 5.0
"""How long the second store may catch up when the store is closed."""


class Mirror(Protocol):
    """The two stores, as whoever copies sees them."""

    layout: Layout
    behind: Behind
    problem: str
    """Why the second store cannot be used now; "" if it can."""

    @property
    def first(self) -> StorageBackend: ...

    @property
    def second(self) -> StorageBackend: ...

    async def look(self) -> None:
        """Look which store is the first one."""

    async def take_over(self, seen: set[str]) -> set[str]:
        """Record anew what others have left; return all records of others."""

    async def copy(self, alike: Alike, name: str) -> None:
        """Copy what is at a key, or below a folder."""


class Copying:
    """The thread, with an event loop of its own."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._loop = asyncio.new_event_loop()
        self._awake = asyncio.Event()
        self._until: float | None = None
        self._looked = 0.0
        self._left: set[str] = set()
        self._alike: Alike | None = None
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
            self._loop.run_until_complete(self._work())
        finally:
            self._loop.close()

    async def _work(self) -> None:
        mirror, pause = self._mirror, _RETRY_SECONDS[0]
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS / 2):
                    await self._awake.wait()
            self._awake.clear()
            is_last = self._until is not None
            try:
                await self._copy_some()
                if gone := mirror.behind.retire(at_once=is_last):
                    await mirror.first.commit(removal(gone))
                pause = _RETRY_SECONDS[0]
                if mirror.problem:
                    logger.warning("the second store is in use again, and gets what it lacks")
                    mirror.problem = ""
            except Exception as error:
                if isinstance(error, NotFoundError) and error.key == mirror.layout.mirror_second:
                    self._looked = 0.0  # it is the first store by now
                else:
                    if not mirror.problem:
                        logger.warning("the second store cannot be used now, and gets what it lacks later (%s)", error)
                    mirror.problem = str(error) or type(error).__name__
                if not is_last:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, _RETRY_SECONDS[1])
            if is_last and (mirror.problem or not mirror.behind.count or time.monotonic() > (self._until or 0)):
                return
            if mirror.behind.count or self._until is not None:
                self._awake.set()

    async def _copy_some(self) -> None:
        mirror = self._mirror
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            await mirror.look()
            self._left = await mirror.take_over(self._left)
        if self._alike is None or self._alike.first is not mirror.first:
            await mirror.second.open()
            self._alike = Alike(mirror.layout, mirror.first, mirror.second)
        names = mirror.behind.next(AT_ONCE)
        work = (mirror.copy(self._alike, name) for name in names)
        results = await asyncio.gather(*work, return_exceptions=True)
        missed = [name for name, result in zip(names, results, strict=True) if result is not None]
        mirror.behind.copied(names, missed=missed)
        for result in results:
            if isinstance(result, BaseException):
                raise result
