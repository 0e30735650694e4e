"""The life of a backend that works in threads: a few that read (`readers.py`), one that writes (`writer.py`)."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ..config import StorageConfig
from ..errors import ClosedError
from . import forks
from .base import StorageBackend
from .changes import Change, Delete, Move, Outcome, Put, Quota, RemoveTree
from .lookout import Lookout
from .readers import Readers
from .rules import check_change
from .waking import Waking
from .writer import Job, Writer

_READERS = 4


class ThreadedBackend(StorageBackend):
    """Opening, closing, forks, and what is written through the writer. What is done in the threads is the heir's."""

    def __init__(
        self,
        config: StorageConfig,
        run: Callable[[Sequence[Job]], None],
        idle: Callable[[], float | None],
        end: Callable[[], None],
        *,
        beside_loop: bool = False,
    ) -> None:
        """Write by `run`, `idle` and `end`, and `beside_loop`; see `Writer`."""
        super().__init__(config)
        self._waking = Waking()
        self._lookout: Lookout | None = None
        self._writer = Writer(_telling(self._waking, run), idle, end, beside_loop=beside_loop)
        self._readers: Readers | None = None
        self._state = threading.Lock()
        self._forked = False  # told by the hook of `forks.py`, for asking the system each time is slow
        self._closed = False
        self._closing: asyncio.Future[None] | None = None

    # --- life ----------------------------------------------------------------------------------------

    async def open(self) -> None:
        with self._state:
            if self._closed:
                raise ClosedError("The store is closed.", hint="Open a new StorageManager.")
            if self._readers is None:
                self._readers = Readers(_READERS)
                forks.remember(self)

    async def close(self) -> None:
        with self._state:
            first, self._closed = not self._closed, True
        if first and not self._forked:
            self._waking.close()
            if self._lookout is not None:
                self._lookout.end()
        if first and self._readers is not None and not self._forked:
            self._closing = asyncio.ensure_future(self._finish())
        if self._closing is not None and self._closing.get_loop() is asyncio.get_running_loop():
            if first:
                await asyncio.shield(self._closing)  # a caller that is cancelled does not stop it half-way
            else:
                await asyncio.wait([self._closing])

    async def _finish(self) -> None:
        await asyncio.sleep(0)  # what was submitted in this turn is handed over first
        await asyncio.get_running_loop().run_in_executor(None, self._close)

    def _close(self) -> None:
        """End the threads after what was handed over; blocks."""
        self._writer.close()
        if self._lookout is not None:
            self._lookout.join()
        if self._readers is not None:
            self._readers.close()

    def let_go_after_fork(self) -> None:
        """In a forked child: the threads are gone, and what is open is the parent's."""
        self._forked = True
        self._state = threading.Lock()
        self._waking = Waking()

    def _threads(self) -> Readers:
        """Return the reading threads of a store that is open."""
        if self._closed:
            raise ClosedError("The store is closed.", hint="Open a new StorageManager.")
        if self._forked:
            raise ClosedError(
                "The store was opened before a fork.", hint="Open a new StorageManager in the child process."
            )
        if self._readers is None:
            raise ClosedError("The store is not open yet.", hint="Call open() first.")
        return self._readers

    def _check_open(self) -> Readers:
        """Return the reading threads of a store that can be used."""
        return self._threads()

    def _later(self, work: Callable[[], None]) -> asyncio.Future[None]:
        """Do a last bit of blocking work, whether or not the caller waits for it, also after `close`."""
        try:
            return self._check_open().run(work)
        except ClosedError:
            return asyncio.get_running_loop().run_in_executor(None, work)

    # --- waiting -------------------------------------------------------------------------------------

    @property
    def _poll_seconds(self) -> float:
        """After which whoever waits looks, where nothing tells what other processes write."""
        return self.config.watch_poll_seconds

    async def wait_for_change(self, keys: Sequence[str] | frozenset[str], seconds: float) -> None:
        self._threads()
        try:
            await self._waking.wait(keys, seconds, self._begin_to_look_out)
        except asyncio.CancelledError:
            if self._lookout is not None:
                self._lookout.end_unless_awaited()
            raise

    def _begin_to_look_out(self) -> float:
        """Have somebody look out for what other processes write; return after how many seconds to look anyway."""
        return math.inf if self._lookout is not None and self._lookout.begin() else self._poll_seconds

    # --- writing -------------------------------------------------------------------------------------

    def _commit(self, changes: Sequence[Any]) -> Awaitable[list[Outcome]]:
        """Hand over changes, those of the contract or the heir's own."""
        self._check_open()
        return self._writer.submit(changes)

    async def commit(self, changes: Sequence[Change]) -> list[Outcome]:
        for change in changes:
            check_change(change)
        return await self._commit(changes)

    async def write(self, key: str, data: bytes) -> bool:
        await self.commit([Put(key, bytes(data))])
        return True

    async def delete(self, key: str) -> bool:
        return bool((await self.commit([Delete(key)]))[0])


def _telling(waking: Waking, run: Callable[[Sequence[Job]], None]) -> Callable[[Sequence[Job]], None]:
    """Return what does jobs with `run` and then wakes those who wait for what they changed."""

    def run_and_tell(jobs: Sequence[Job]) -> None:
        try:
            run(jobs)
        finally:
            if waking.is_awaited:
                waking.tell(_changed(jobs))

    return run_and_tell


def _changed(jobs: Sequence[Job]) -> set[str] | None:
    """Return the keys and folders that jobs may have changed; None if that is not known."""
    keys: set[str] = set()
    for job in jobs:
        for change in job.changes:
            if isinstance(change, Move):
                keys.update((change.source, change.target))
            elif isinstance(change, RemoveTree):
                keys.add(change.folder)
            elif isinstance(key := getattr(change, "key", None), str):
                keys.add(key)  # also of a condition: it costs no more than a look
            elif not isinstance(change, Quota):
                return None
    return keys
