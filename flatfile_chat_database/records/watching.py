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
import math
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Hashable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from ..backends.waking import Interest, folders_above
from ..errors import ClosedError, ConflictError, StorageError, UnavailableError, ValidationError
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
_ROUND_SECONDS = 0.002
"""What changes meanwhile is told of together."""
_SOON = 1e-6
"""A reminder that comes this part of its time too soon is no reason for another one."""

T = TypeVar("T")


class Ticket:
    """One who watches what is at or below a key, as long as it does."""

    def __init__(self, key: str, patience: float) -> None:
        """Be reminded every `patience` seconds."""
        self.key = key
        self.patience = patience
        self.woken = asyncio.Event()
        self.error: Exception | None = None
        """Why it is not woken any more."""
        self.reminder: asyncio.TimerHandle | None = None
        self._changed: set[str] | None = None  # None: anything

    def tell(self, key: str | None) -> None:
        """Say what changed; None: anything may have."""
        if key is None:
            self._changed = None
        elif self._changed is not None:
            self._changed.add(key)
            if len(self._changed) > _MOST_KEYS:
                self._changed = None
        self.woken.set()

    def take(self) -> set[str] | None:
        """Return what was told, and begin anew."""
        self.woken.clear()
        changed, self._changed = self._changed, set()
        return changed

    def end(self, error: Exception) -> None:
        """Wake it for the last time, and say why."""
        self.error = error
        self.woken.set()


class Hub:
    """All who watch in one event loop, and the task that wakes them.

    Tickets are found by their keys, so what a change costs depends on how many it concerns.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._tickets: dict[str, set[Ticket]] = {}  # by what they watch
        self._inside: dict[str, set[Ticket]] = {}  # by the folders that is in
        self._interest: Interest | None = None  # None if the keys are other ones than those that are waited for
        self._task: asyncio.Task[None] | None = None
        self._came = asyncio.Event()
        self._looks: dict[Hashable, asyncio.Task[Any]] = {}

    def enter(self, ticket: Ticket) -> None:
        """Wake it from now on."""
        if ticket.key not in self._tickets:
            self._interest = None
            self._came.set()
        self._tickets.setdefault(ticket.key, set()).add(ticket)
        for folder in folders_above(ticket.key):
            self._inside.setdefault(folder, set()).add(ticket)
        self._remind_later(ticket)
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._wake_all(), name="chatdb-watch")

    def leave(self, ticket: Ticket) -> None:
        """Wake it no more."""
        if ticket.reminder is not None:
            ticket.reminder.cancel()
        if _discard(self._tickets, ticket.key, ticket):
            self._interest = None
        for folder in folders_above(ticket.key):
            _discard(self._inside, folder, ticket)
        if not self._tickets and self._task is not None:
            self._task.cancel()
            self._task = None

    def dismiss(self, ticket: Ticket) -> None:
        """Wake it for the last time, soon, so that it notices by itself that it is over; in any thread and at any time.

        An object may be forgotten in the middle of anything.
        """
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._dismiss, ticket)

    def _dismiss(self, ticket: Ticket) -> None:
        ticket.woken.set()
        self.leave(ticket)

    def end_from_anywhere(self) -> None:
        """Tell everybody that the store is closed."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._end, _closed())

    async def end(self) -> None:
        """Do the same, in its own event loop, and wait for the task."""
        task = self._task
        self._end(_closed())
        if task is not None:
            await asyncio.wait([task])

    def _end(self, because: Exception) -> None:
        for ticket in self._everybody():
            ticket.end(because)
            self.leave(ticket)

    def _everybody(self) -> list[Ticket]:
        return [ticket for tickets in self._tickets.values() for ticket in tickets]

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
                began = self._loop.time()
                try:
                    self._came.clear()
                    before, waiting = waiting, await self._begin_waiting()
                    if before is not None:  # after the next one began, or nobody would look out in between
                        before.cancel()
                    cursor = await self._tell_all(cursor)
                    await self._until_done_or_somebody_comes(waiting)
                    await asyncio.sleep(began + _ROUND_SECONDS - self._loop.time())
                except ClosedError:
                    raise
                except StorageError:  # each finds out by itself what is wrong
                    self._tell(None)
                    await asyncio.sleep(self._store.config.watch_poll_seconds)
        except ClosedError:
            self._end(_closed())
        except asyncio.CancelledError:
            if self._task is asyncio.current_task():  # by somebody who has no business with it
                self._end(UnavailableError("What wakes who watches was cancelled.", hint="Ask the watch again."))
            raise
        except Exception as error:
            logger.exception("Nobody is woken any more who watches %r", self._store.backend)
            self._end(error)
        finally:
            if waiting is not None:
                waiting.cancel()

    async def _begin_waiting(self) -> asyncio.Task[None]:
        """Wait for a change of anything that somebody watches, from now on."""
        backend = await self._store.reading()
        if self._interest is None:
            self._interest = Interest(self._tickets)
        waiting = backend.wait_for_change(self._interest, _LOOK_ANYWAY_SECONDS)
        task = self._loop.create_task(waiting, name="chatdb-wait")
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
        self._tell(changes.keys)
        return changes.cursor

    def _tell(self, keys: Collection[str] | None) -> None:
        """Tell everybody whom changes of these keys and folders concern; None: of anything."""
        if keys is None:
            for ticket in self._everybody():
                ticket.tell(None)
            return
        for key in keys:
            for place in (key, *folders_above(key)):
                for ticket in self._tickets.get(place, ()):
                    ticket.tell(key)
            for ticket in self._inside.get(key, ()):
                ticket.tell(key)

    def _remind_later(self, ticket: Ticket) -> None:
        """Have it look once in a while, though nothing was told.

        Those of the same key do it at the same time, so that they share the look, and those of others at other times.
        """
        phase = hash(ticket.key) % 1000 / 1000
        turns = math.floor(self._loop.time() / ticket.patience - phase + _SOON) + 1
        ticket.reminder = self._loop.call_at((turns + phase) * ticket.patience, self._remind, ticket)

    def _remind(self, ticket: Ticket) -> None:
        ticket.tell(None)
        self._remind_later(ticket)

    # --- looking -------------------------------------------------------------------------------------

    async def read(self, key: str, start: int, stop: int) -> list[bytes]:
        """Return records of a log; those who want the same in one turn of the loop get it from one look."""

        async def look() -> list[bytes]:
            return await (await self._store.reading()).read_log(key, start, stop)

        return await self.once((key, start, stop), look)

    async def once(self, what: Hashable, look: Callable[[], Awaitable[T]]) -> T:
        """Look at something; those who want the same in one turn of the loop share the look."""
        while True:
            task: asyncio.Task[T] | None = self._looks.get(what)
            if task is None:
                task = self._looks[what] = self._loop.create_task(self._look(what, look), name="chatdb-look")
                task.add_done_callback(partial(self._looked, what))
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                asking = asyncio.current_task()
                if not task.cancelled() or asking is None or asking.cancelling():
                    raise  # whoever asks is cancelled, not the look

    async def _look(self, what: Hashable, look: Callable[[], Awaitable[T]]) -> T:
        del self._looks[what]  # whoever comes from now on may want what is newer than what is found here
        return await look()

    def _looked(self, what: Hashable, task: asyncio.Task[Any]) -> None:
        if self._looks.get(what) is task:  # it was cancelled before it began
            del self._looks[what]
        _retrieved(task)


def _discard(tickets: dict[str, set[Ticket]], key: str, ticket: Ticket) -> bool:
    """Remove a ticket; return whether it was the last one there."""
    there = tickets.get(key)
    if there is None:
        return False
    there.discard(ticket)
    if there:
        return False
    del tickets[key]
    return True


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
    of `async with`. An error, or a cancellation, costs no message: the same watch can be asked again, also in another
    event loop.
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
        self._following = following
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn = asyncio.Lock()
        self._ticket: Ticket | None = None
        self._dismiss: Callable[[], object] = _nothing
        self._page: deque[Arrival] = deque()
        self._place: Callable[[], str] | None = None
        self._is_over = False
        self._failing_since: float | None = None

    def __repr__(self) -> str:
        state = "over" if self._is_over else "begun" if self._place is not None else "to begin"
        return f"<Watch of {self._following.key}: {state}>"

    @property
    def cursor(self) -> str | None:
        """Text to store: with it the same method goes on behind what was delivered.

        None before it has begun, if it begins with what comes.
        """
        return self._cursor if self._place is None else self._place()

    def __aiter__(self) -> Self:
        return self

    async def __aenter__(self) -> Self:
        async with self._in_turn():
            if await self._begin() is None:
                raise ClosedError("The watch is over.", hint="Watch again, from its cursor.")
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
            ConflictError: In another event loop somebody waits for it.
            ClosedError: The store is closed.
        """
        async with self._in_turn():
            while not self._page:
                ticket = await self._begin()
                if ticket is None:
                    break
                if ticket.woken.is_set() or self._following.has_more:
                    await self._look(ticket)
                else:
                    await ticket.woken.wait()
            if self._is_over:
                self._page.clear()
                raise StopAsyncIteration
            arrival = self._page.popleft()
            self._place = arrival.place
            return arrival

    async def aclose(self) -> None:
        """End it; whoever waits for its next message is told that there is none."""
        self._is_over = True
        self._page.clear()
        self._dismiss()

    def _in_turn(self) -> asyncio.Lock:
        """Return what makes those who ask wait for each other; in another event loop than before it goes on in that."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None and self._turn.locked() and not self._loop.is_closed():
                raise ConflictError(
                    f"{self!r} is waited for in another event loop.", hint="Have a watch of its own in each event loop."
                )
            self._dismiss()
            self._ticket, self._turn, self._loop = None, asyncio.Lock(), loop
        return self._turn

    async def _begin(self) -> Ticket | None:
        """Return what wakes it, once it has begun; None if it is over."""
        ticket = self._ticket
        while ticket is None and not self._is_over:
            try:
                ticket = await self._enter()
            except UnavailableError as error:
                await self._bear_with(error)
        if self._is_over or ticket is None:
            return None
        if ticket.error is not None:
            self._ticket = None  # asked again, it goes on
            raise ticket.error
        return ticket

    async def _enter(self) -> Ticket:
        hub = self._watching.hub()
        ticket = self._ticket = Ticket(self._following.key, self._patience)
        hub.enter(ticket)  # before the look, so that nothing comes in between
        self._dismiss = leaving = weakref.finalize(self, hub.dismiss, ticket)
        leaving.atexit = False
        try:
            if self._place is None:
                await self._following.begin(hub, self._cursor, self._last)
                self._place = self._following.place()
            else:
                self._following.go_on(hub)
        except BaseException:
            self._ticket = None
            self._dismiss()
            raise
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
        rest = self._failing_since + config.lock_timeout_seconds - now
        if rest <= 0:
            self._failing_since = None
            raise error
        await asyncio.sleep(min(rest, config.watch_poll_seconds))


def _nothing() -> None:
    """Do what is to be done at the end of what has not begun."""


def _closed() -> ClosedError:
    return ClosedError("The store is closed.", hint="Open a new StorageManager.")
