"""Watching: new messages as they come, in whichever process they are written.

What is new is read from the logs themselves (`following.py`); here is who waits for it. All who watch in one event loop
share one task, which waits for the backend to say that something may have changed, asks it once what, and wakes those
whom it concerns. Those who stand at the same place share the look at it, too.

Whoever is slow holds its place and one page of messages. Between two messages a watch is nothing but an entry in a set,
which goes with the object; the task goes with the last one.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from ..backends.waking import Interest, Touched
from ..errors import ClosedError, StorageError, UnavailableError, ValidationError
from ..models import Arrival
from .following import Following, LogFollowing, UserFollowing
from .messages import LogName, Messages
from .store import Store

logger = logging.getLogger("flatfile_chat_database")

_LOOK_ANYWAY_SECONDS = 5.0
"""After so long a time each log is looked at, whether or not anything was told: a person may have edited it."""
_LOOK_AT_ALL_SECONDS = 60.0
"""The same for all sessions of a user."""
_MOST_KEYS = 1_000
"""That are remembered for one who is slow, until all there is has to be looked at."""


class Ticket:
    """One who watches, as long as it does."""

    def __init__(self, interest: Interest, patience: float) -> None:
        self.interest = interest
        self.woken = asyncio.Event()
        self.error: Exception | None = None
        """Why it is not woken any more."""
        self._changed: set[str] | None = None  # None: anything
        self._patience = patience
        self._looked = time.monotonic()

    def tell(self, touched: Touched | None) -> None:
        """Say what changed; None: anything may have."""
        if touched is None:
            self._changed = None
        elif not self.interest.is_touched(touched):
            return
        elif self._changed is not None:
            self._changed |= touched.keys
            if len(self._changed) > _MOST_KEYS:
                self._changed = None
        self.woken.set()

    def remind(self, now: float) -> None:
        """Have it look once in a while, though nothing was told."""
        if now - self._looked >= self._patience:
            self.tell(None)

    def take(self) -> set[str] | None:
        """Return what was told, and begin anew."""
        self.woken.clear()
        changed, self._changed = self._changed, set()
        if changed is None:
            self._looked = time.monotonic()
        return changed

    def end(self, error: Exception) -> None:
        """Wake it for the last time, and say why."""
        self.error = error
        self.woken.set()


class Hub:
    """All who watch in one event loop, and the task that wakes them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._tickets: set[Ticket] = set()
        self._task: asyncio.Task[None] | None = None
        self._came = asyncio.Event()
        self._readings: dict[tuple[str, int, int], asyncio.Future[list[bytes]]] = {}

    def enter(self, ticket: Ticket) -> None:
        """Wake it from now on."""
        self._tickets.add(ticket)
        self._came.set()
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._wake_all(), name="chatdb-watch")

    def leave(self, ticket: Ticket) -> None:
        """Wake it no more."""
        self._tickets.discard(ticket)
        if not self._tickets and self._task is not None:
            self._task.cancel()
            self._task = None

    def leave_from_anywhere(self, ticket: Ticket) -> None:
        """Do the same in any thread, as when an object is forgotten."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self.leave, ticket)

    def end_from_anywhere(self) -> None:
        """Tell everybody that the store is closed."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._end)

    async def end(self) -> None:
        """Do the same, in its own event loop, and wait for the task."""
        task = self._task
        self._end()
        if task is not None:
            await asyncio.wait([task])

    def _end(self, because: Exception | None = None) -> None:
        for ticket in list(self._tickets):
            ticket.end(because or _closed())
            self.leave(ticket)

    @property
    def is_over(self) -> bool:
        """Whether its event loop is closed."""
        return self._loop.is_closed()

    # --- waking --------------------------------------------------------------------------------------

    async def _wake_all(self) -> None:
        """Wake everybody whom a change concerns."""
        cursor: str | None = None
        waiting: asyncio.Task[None] | None = None
        try:
            while True:
                try:
                    self._came.clear()
                    before, waiting = waiting, await self._begin_waiting()
                    if before is not None:  # after the next one began, or nobody would look out in between
                        before.cancel()
                    cursor = await self._tell_all(cursor)
                    await self._until_done_or_somebody_comes(waiting)
                except ClosedError:
                    raise
                except StorageError:  # each finds out by itself what is wrong
                    self._tell(None)
                    await asyncio.sleep(self._store.config.watch_poll_seconds)
        except ClosedError:
            self._end()
        except Exception as error:
            logger.exception("Nobody is woken any more who watches %r", self._store.backend)
            self._end(error)
        finally:
            if waiting is not None:
                waiting.cancel()

    async def _begin_waiting(self) -> asyncio.Task[None]:
        """Wait for a change of anything that somebody watches, from now on."""
        backend = await self._store.reading()
        keys = frozenset(key for ticket in self._tickets for key in ticket.interest.keys)
        task = self._loop.create_task(backend.wait_for_change(keys, _LOOK_ANYWAY_SECONDS), name="chatdb-wait")
        task.add_done_callback(_retrieved)
        try:
            await asyncio.sleep(0)
        except BaseException:
            task.cancel()
            raise
        return task

    async def _until_done_or_somebody_comes(self, waiting: asyncio.Task[None]) -> None:
        came = self._loop.create_task(self._came.wait(), name="chatdb-came")
        try:
            await asyncio.wait([waiting, came], return_when=asyncio.FIRST_COMPLETED)
        finally:
            came.cancel()
        if waiting.done():
            waiting.result()

    async def _tell_all(self, cursor: str | None) -> str:
        """Ask the backend once what changed, and tell everybody; return the place to ask from the next time."""
        changes = await (await self._store.reading()).changes(cursor)
        self._tell(None if changes.keys is None else Touched(changes.keys))
        return changes.cursor

    def _tell(self, touched: Touched | None) -> None:
        now = time.monotonic()
        for ticket in self._tickets:
            if touched is None or touched.keys:
                ticket.tell(touched)
            ticket.remind(now)

    # --- reading -------------------------------------------------------------------------------------

    async def read(self, key: str, start: int, stop: int) -> list[bytes]:
        """Return records of a log; those who want the same in one turn of the loop get it from one look."""
        wanted = (key, start, stop)
        reading = self._readings.get(wanted)
        if reading is None:
            reading = self._readings[wanted] = self._loop.create_task(self._read(wanted), name="chatdb-look")
            reading.add_done_callback(_retrieved)
        return await asyncio.shield(reading)

    async def _read(self, wanted: tuple[str, int, int]) -> list[bytes]:
        del self._readings[wanted]  # whoever comes from now on may want what is newer than what is read here
        return await (await self._store.reading()).read_log(*wanted)


def _retrieved(task: asyncio.Future[Any]) -> None:
    """Look at what became of a task; whoever cares was told by other ways."""
    if not task.cancelled():
        task.exception()


class Watching:
    """The watches of a store, with a hub for each event loop."""

    def __init__(self, store: Store, messages: Messages) -> None:
        self._store = store
        self._messages = messages
        self._hubs: dict[asyncio.AbstractEventLoop, Hub] = {}
        self.closed = False

    def log(self, log: LogName, cursor: str | None, last: int) -> Watch:
        """Watch a log."""
        return Watch(self, LogFollowing(self._store, self._messages, log), _LOOK_ANYWAY_SECONDS, cursor, last)

    def user(self, user_id: str, cursor: str | None) -> Watch:
        """Watch all logs of a user."""
        return Watch(self, UserFollowing(self._store, self._messages, user_id), _LOOK_AT_ALL_SECONDS, cursor, 0)

    @property
    def store(self) -> Store:
        """What is watched."""
        return self._store

    def hub(self) -> Hub:
        """Return the hub of this event loop."""
        if self.closed:
            raise _closed()
        loop = asyncio.get_running_loop()
        hub = self._hubs.get(loop)
        if hub is None:
            for other, its in list(self._hubs.items()):  # a copy: other threads add theirs
                if its.is_over:
                    self._hubs.pop(other, None)
            hub = self._hubs[loop] = Hub(self._store)
        return hub

    async def close(self) -> None:
        """End every watch, in whichever event loop it is."""
        self.closed = True
        own = self._hubs.pop(asyncio.get_running_loop(), None)
        for hub in list(self._hubs.values()):
            hub.end_from_anywhere()
        if own is not None:
            await own.end()


class Watch:
    """New messages, each once and in the order of its log: `async for arrival in watch`.

    It begins with the first message that is asked for, or with `async with`. Leave it by `break`, `aclose` or the end
    of `async with`. An error, or a cancellation, costs no message: the same watch can be asked again.
    """

    def __init__(
        self,
        watching: Watching,
        following: Following,
        patience: float,
        cursor: str | None,
        last: int,
    ) -> None:
        if cursor is not None and not isinstance(cursor, str):
            raise ValidationError(f"cursor must be a string, not {type(cursor).__name__}.")
        if type(last) is not int or last < 0:
            raise ValidationError(f"last must be a whole number, at least 0, and not {last!r:.80}.")
        if cursor is not None and last:
            raise ValidationError("cursor and last cannot both be given.", hint="A cursor says where to begin.")
        self._watching = watching
        self._patience = patience
        self._cursor = cursor
        self._last = last
        self._hub: Hub | None = None
        self._following = following
        self._ticket: Ticket | None = None
        self._page: deque[Arrival] = deque()
        self._place: Callable[[], str] | None = None
        self._turn = asyncio.Lock()
        self._is_over = False
        self._failing_since: float | None = None

    def __repr__(self) -> str:
        state = "over" if self._is_over else "begun" if self._place is not None else "to begin"
        return f"<Watch of {', '.join(sorted(self._following.interest.keys))}: {state}>"

    @property
    def cursor(self) -> str | None:
        """Text to store: with it the same method goes on behind what was delivered.

        None before it has begun, if it begins with what comes.
        """
        return self._cursor if self._place is None else self._place()

    def __aiter__(self) -> Self:
        return self

    async def __aenter__(self) -> Self:
        async with self._turn:
            await self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def __anext__(self) -> Arrival:
        """Return the next message; wait until there is one.

        Raises:
            PlaceLostError: What was delivered last is not in its log any more; the error's cursor begins that log anew.
            ValidationError: The cursor is none, or is of something else.
            UnavailableError: The medium has been out of reach for `lock_timeout_seconds`.
            ClosedError: The store is closed.
        """
        async with self._turn:
            while not self._page:
                if self._is_over:
                    raise StopAsyncIteration
                ticket = await self._begin()
                if ticket.error is not None:
                    raise ticket.error
                if ticket.woken.is_set() or self._following.has_more:
                    await self._look(ticket)
                else:
                    await ticket.woken.wait()
            arrival = self._page.popleft()
            self._place = arrival.place
            return arrival

    async def aclose(self) -> None:
        """End it; whoever waits for its next message is told that there is none."""
        self._is_over = True
        self._page.clear()
        if self._ticket is not None:
            self._ticket.woken.set()
            if self._hub is not None:
                self._hub.leave(self._ticket)

    async def _begin(self) -> Ticket:
        if self._is_over:
            raise ClosedError("The watch is over.", hint="Watch again, from its cursor.")
        if self._ticket is not None:
            return self._ticket
        hub = self._hub = self._watching.hub()
        ticket = self._ticket = Ticket(self._following.interest, self._patience)
        hub.enter(ticket)  # before the look, so that nothing comes in between
        try:
            await self._following.begin(hub.read, self._cursor, self._last)
        except BaseException:
            self._ticket = None
            hub.leave(ticket)
            raise
        self._place = self._following.place()
        weakref.finalize(self, hub.leave_from_anywhere, ticket).atexit = False
        return ticket

    async def _look(self, ticket: Ticket) -> None:
        """Look what is new."""
        self._following.note(ticket.take())
        try:
            self._page.extend(await self._following.more())
        except UnavailableError as error:
            await self._bear_with(error)
            return
        if self._failing_since is not None:
            self._failing_since = None
            logger.warning("%r: it can be read again", self)
        if not self._page:
            self._place = self._following.place()

    async def _bear_with(self, error: UnavailableError) -> None:
        """Try again later what a server that is being restarted, for instance, did not answer."""
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
            logger.warning("%r: it cannot be read at the moment: %s", self, error)
        config = self._watching.store.config
        if now - self._failing_since >= config.lock_timeout_seconds:
            self._failing_since = None
            raise error
        await asyncio.sleep(config.watch_poll_seconds)


def _closed() -> ClosedError:
    return ClosedError("The store is closed.", hint="Open a new StorageManager.")
