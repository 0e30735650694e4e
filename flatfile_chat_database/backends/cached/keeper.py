"""The thread that keeps fresh what a node knows of the cache, and opens and closes it as its turn comes.

It works as long as the store is used. Only a node that has written goes on to another phase: nodes that only read may
not be allowed to write, and have no part in what the phases are for.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

from ...errors import StorageError
from ..base import logger
from ..readers import Readers
from .roll import Phase, Roll, Word, clock
from .server import Server

_IDLE_LEASES = 8
"""After so many leases without use it sleeps until there is some."""
_PAUSE_LEASES = (2, 120)
"""After which a cache that was closed is opened again: at first, and at most, if it is closed soon again and again."""
_SOON_LEASES = 120


class Keeper:
    """The thread, with an event loop of its own."""

    def __init__(self, roll: Roll, server: Server, readers: Readers) -> None:
        """Begin.

        Raises:
            OSError, RuntimeError: There are no more threads or descriptors, or the interpreter is ending.
        """
        self._roll = roll
        self._server = server
        self._readers = readers
        self.used = clock()
        """When the store was last used."""
        self.writes = False
        """Whether this node has written."""
        self._checked = clock()
        self._pause = _PAUSE_LEASES[0]
        self._opened = float("-inf")
        self._closed: float | None = None
        self._ends = False
        self._loop = asyncio.new_event_loop()
        self._awake = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="chatdb-cache", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            self._loop.close()
            raise

    def wake(self) -> None:
        """Say that there is something to do."""
        with suppress(RuntimeError):  # its loop has ended
            self._loop.call_soon_threadsafe(self._awake.set)

    def let_go(self) -> None:
        """End it soon."""
        self._ends = True
        self.wake()

    def stop(self) -> None:
        """End it; blocks."""
        self.let_go()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._live())
        finally:
            self._loop.close()

    async def _live(self) -> None:
        while not self._ends:
            try:
                await self._look()
            except StorageError:
                pass  # whoever reads or writes is told
            except Exception:
                logger.exception("the keeper of the cache failed, and goes on")
            is_idle = clock() - self.used > _IDLE_LEASES * self._roll.lease
            with suppress(TimeoutError):
                async with asyncio.timeout(None if is_idle and not self._is_between else self._roll.believing / 3):
                    await self._awake.wait()
            self._awake.clear()

    @property
    def _is_between(self) -> bool:
        return self.writes and self._roll.known.phase in (Phase.OPENING, Phase.CLOSING)

    async def _look(self) -> None:
        if self._roll.is_older(self._roll.believing / 2) or self._is_between:
            await self._roll.read()
        if self._roll.known.is_written and clock() - self._checked >= self._roll.believing:
            self._checked = clock()
            await self._readers.run(self._server.check)
        if not self.writes:
            return
        word, roll = self._roll.known, self._roll
        if word.is_written and self._server.run not in ("", word.server):
            # What knows that run only may still be in use somewhere, so nobody may use it any more.
            await roll.give_up(word, "the server has been started again, or others use another one")
        elif word.phase is Phase.CLOSED and not word.is_behind:
            await self._open(word)
        elif clock() >= roll.settled_at and word.phase is Phase.OPENING:
            await roll.change(word, Phase.OPEN)
        elif clock() >= roll.settled_at and word.phase is Phase.CLOSING:
            await roll.change(word, Phase.CLOSED)

    async def _open(self, word: Word) -> None:
        """Open the cache, unless it was closed a moment ago or the server is out of reach."""
        now, lease = clock(), self._roll.lease
        if word.epoch and self._closed is None:
            again = now - self._opened < _SOON_LEASES * lease
            self._pause = min(2 * self._pause, _PAUSE_LEASES[1]) if again else _PAUSE_LEASES[0]
            self._closed = now
        if self._closed is not None and now - self._closed < self._pause * lease:
            return
        run = await self._readers.run(self._server.look) if self._server.is_up else ""
        if run:
            await self._roll.change(word, Phase.OPENING, server=run)
            self._opened, self._closed = clock(), None
