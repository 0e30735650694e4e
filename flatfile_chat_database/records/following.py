"""What is new in a log, or in those of a user, since a place that a cursor names.

What was delivered is known by the place behind it and by the ids of the newest messages before that. When those are not
where they were, for messages before the place were removed, the place is looked for; whoever cannot find it says so.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Hashable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Protocol, TypeVar

from ..errors import PlaceLostError
from ..models import BEGINNING, Arrival
from .cursors import CHECKS, FULL_SPOTS, START, Spot, check_of, decode, encode, name_of, scope_of
from .messages import LogName, Messages, session_log
from .store import Store, called

PAGE = 64
"""Messages that are read at once; who is slow to take them holds so many."""
_NEAR = 256
"""So many messages before a place are looked through first when it is not where it was."""
_RUN = 512
_GONE = 1_000
"""Sessions that are not there, but may come back out of the trash: so many are remembered."""
_STEPS = 256
"""So many places are kept as what changed from one to the next one, and as many more as there are sessions."""
_LOST_SECONDS = 0.2
"""After so long a time a place that was not found is looked for again."""

T = TypeVar("T")


class Looks(Protocol):
    """How logs are looked at: those who want the same at the same time may share a look."""

    async def read(self, key: str, start: int, stop: int) -> list[bytes]:
        """Return the records of a log from one position up to another one."""

    async def once(self, what: Hashable, look: Callable[[], Awaitable[T]]) -> T:
        """Return what `look` returns, or that of another who looks at the same; it is to be left as it is."""


class Following(ABC):
    """What has been delivered of something, and what comes next."""

    def __init__(self, store: Store, messages: Messages, names: Sequence[str], key: str) -> None:
        """Follow what `names` name, whose messages are at or below `key`."""
        self.key = key
        self._store = store
        self._messages = messages
        self._names = tuple(names)
        self._store_id = ""
        self._scope = b""

    async def begin(self, looks: Looks, cursor: str | None, last: int) -> None:
        """Go on from a cursor, or with what comes from now on; look at logs by `looks`.

        Raises:
            ValidationError: It is no cursor of this.
        """
        self._looks = looks
        await self._learn_scope()
        if cursor is None:
            await self._begin_now(last)
        elif cursor == BEGINNING:
            self._begin_from({})
        else:
            unmade = scope_of("", *self._names)
            self._begin_from(decode(cursor, self._scope, unmade, named=self._is_named))

    def go_on(self, looks: Looks) -> None:
        """Go on after a pause, in another event loop maybe; look at logs by `looks`."""
        self._looks = looks
        self.note(None)

    async def _learn_scope(self) -> None:
        """Learn for which store cursors are, unless that is known; nobody may have made it yet."""
        if not self._store_id:
            self._store_id = await self._store.identity()
            self._scope = scope_of(self._store_id, *self._names)

    _is_named = False

    @abstractmethod
    async def _begin_now(self, last: int) -> None:
        """Begin behind what is there now, but for the newest `last` messages of a single log."""

    @abstractmethod
    def _begin_from(self, spots: Mapping[bytes, Spot]) -> None:
        """Begin where a cursor says."""

    @abstractmethod
    def note(self, changed: Collection[str] | None) -> None:
        """Note that something may be new: at these keys, or anywhere."""

    @property
    @abstractmethod
    def has_more(self) -> bool:
        """Whether something may be new that was not looked at yet, as far as it was noted."""

    @abstractmethod
    async def more(self) -> list[Arrival]:
        """Return some of what comes next, and take it as delivered; nothing if there is nothing new.

        Raises:
            PlaceLostError: Nothing that was delivered last is in a log any more.
        """

    @abstractmethod
    def place(self) -> Callable[[], str]:
        """Return what makes the cursor behind what was returned so far."""

    async def _next_lines(self, log: LogName, spot: Spot, lost: Callable[[], str]) -> tuple[Spot, list[bytes]]:
        """Return the place where `spot` is now, and some records behind it; `lost` is the cursor for an error."""
        backend = await self._store.reading()
        key = self._store.layout.key(log.entry, **log.names)
        was_lost = False
        while True:
            if spot.position is not None:
                lines = await self._looks.read(key, max(spot.position - 1, 0), spot.position + PAGE)
                if lines:  # so it was made, and cursors of it have to say so
                    await self._learn_scope()
                if not spot.checks:
                    return spot, lines
                if lines and check_of(lines[0]) == spot.checks[0]:
                    return spot, lines[1:]
            found = await self._find(key, spot)
            if found is not None:
                spot = found
                continue
            owner = self._store.require(log.owner, **log.names)
            if not await backend.count_log(key) and not await backend.exists(owner.key):
                return spot, []  # deleted: it may come back, and then it goes on there
            if was_lost:
                raise PlaceLostError(
                    f"{called(log.owner, **log.names)} does not hold what was delivered of it last: "
                    "it was cleared, cut or made anew.",
                    cursor=lost(),
                    key=key,
                )
            was_lost = True
            await asyncio.sleep(_LOST_SECONDS)  # it may just come back, or be on its way to where it is read

    async def _find(self, key: str, spot: Spot) -> Spot | None:
        """Return the place behind the newest message that is known by its check, or None if there is none."""
        if spot.position is not None:
            found = await self._find_between(key, max(0, spot.position - _NEAR), spot.position, spot)
            if found is not None:
                return found
        stop = await (await self._store.reading()).count_log(key)
        while stop > 0:
            start = max(0, stop - _RUN)
            found = await self._find_between(key, start, stop, spot)
            if found is not None:
                return found
            stop = start
        return None

    async def _find_between(self, key: str, start: int, stop: int, spot: Spot) -> Spot | None:
        """Return the place behind the last record of a stretch that one of the checks is of."""
        first = max(0, start - CHECKS + 1)  # so that there are all checks of the place, too
        checks = list(map(check_of, await self._looks.read(key, first, stop)))
        for end in range(len(checks), start - first, -1):
            if checks[end - 1] in spot.checks:
                return Spot(first + end, tuple(reversed(checks[max(0, end - CHECKS) : end])))
        return None


class LogFollowing(Following):
    """What is new in one log."""

    def __init__(self, store: Store, messages: Messages, log: LogName) -> None:
        self._log = log
        key = store.layout.key(log.entry, **log.names)
        super().__init__(store, messages, (log.entry, *log.ids), key)
        self._decode = messages.decoder(key, strict=False)
        self._session = None if log.is_panel else log.ids[1]
        self._panel = log.ids[0] if log.is_panel else None
        self._spot = START
        self._may_be_new = True

    async def _begin_now(self, last: int) -> None:
        self._spot = await newest_spot(self._store, self._looks, self._log, last)

    def _begin_from(self, spots: Mapping[bytes, Spot]) -> None:
        self._spot = spots.get(b"", START)

    def note(self, changed: Collection[str] | None) -> None:
        self._may_be_new = True

    @property
    def has_more(self) -> bool:
        return self._may_be_new

    async def more(self) -> list[Arrival]:
        self._may_be_new = True
        self._spot, lines = await self._next_lines(self._log, self._spot, lambda: BEGINNING)
        self._may_be_new = len(lines) >= PAGE
        arrivals = []
        for line in lines:
            self._spot = self._spot.behind(line)
            message = self._decode(line)
            if message is not None:
                place = partial(encode, self._scope, {b"": self._spot})
                arrivals.append(Arrival(message, self._session, self._panel, place))
        return arrivals

    def place(self) -> Callable[[], str]:
        return partial(encode, self._scope, {b"": self._spot})


class UserFollowing(Following):
    """What is new in the sessions of a user, whichever there are."""

    _is_named = True

    def __init__(self, store: Store, messages: Messages, user_id: str) -> None:
        super().__init__(store, messages, ("user", user_id), store.layout.folder("user", user_id=user_id))
        self._user = user_id
        self._spots: dict[bytes, Spot] = {}  # those of the newest messages last, without those at the start
        self._trail = _Trail({})
        self._new: dict[str, None] = {}  # sessions that have to be looked at, in this order
        self._all = True

    async def _begin_now(self, last: int) -> None:
        self._begin_from(await self._looks.once(("now", self._user), self._newest_spots))

    async def _newest_spots(self) -> Mapping[bytes, Spot]:
        """Return the places behind all messages there are."""
        newest = [(session, line) for session, line in await self._newest() if line is not None]
        newest.sort(key=lambda item: self._time_of(*item))
        spots = {}
        for number, (session, line) in enumerate(newest):
            spot = Spot(None, (check_of(line),))
            if number >= len(newest) - FULL_SPOTS:  # where a message is the likeliest to be taken back
                spot = await newest_spot(self._store, self._looks, session_log(self._user, session), 0)
            if spot != START:
                spots[name_of(session)] = spot
        return spots

    def _key(self, session: str) -> str:
        return self._store.layout.key("messages", user_id=self._user, session_id=session)

    def _time_of(self, session: str, line: bytes) -> str:
        message = self._messages.decoder(self._key(session), strict=False)(line)
        return "" if message is None else message.timestamp

    def _begin_from(self, spots: Mapping[bytes, Spot]) -> None:
        self._spots = dict(spots)
        self._trail = _Trail(spots)

    def note(self, changed: Collection[str] | None) -> None:
        for key in changed or ():
            place = self._store.layout.parse(key)
            if place is None:  # a folder that was moved or removed, maybe
                changed = None
            elif place.entry.name == "messages" and place.names["user_id"] == self._user:
                self._new[place.names["session_id"]] = None
        self._all = self._all or changed is None

    @property
    def has_more(self) -> bool:
        return self._all or bool(self._new)

    async def more(self) -> list[Arrival]:
        if self._all:
            await self._look_at_all()
        while self._new:
            session = next(iter(self._new))
            if arrivals := await self._more_of(session):
                return arrivals
        return []

    async def _look_at_all(self) -> None:
        """Note every session whose newest message was not delivered."""
        self._all = False
        try:
            found = await self._looks.once(("newest", self._user), self._newest)
        except BaseException:
            self._all = True
            raise
        there = set()
        for session, line in found:
            name = name_of(session)
            there.add(name)
            checks = self._spots.get(name, START).checks
            if (line is not None or checks) and (line is None or checks[:1] != (check_of(line),)):
                self._new[session] = None
        gone = [name for name in self._spots if name not in there]
        if len(gone) > _GONE:
            forgotten = set(gone[:-_GONE])
            self._begin_from({name: spot for name, spot in self._spots.items() if name not in forgotten})

    async def _newest(self) -> list[tuple[str, bytes | None]]:
        """Return the sessions there are, and the newest record of each."""
        backend = await self._store.reading()
        sessions = await self._store.ids("session", user_id=self._user)
        return list(zip(sessions, await backend.newest_records(list(map(self._key, sessions))), strict=True))

    async def _more_of(self, session: str) -> list[Arrival]:
        name = name_of(session)
        log = session_log(self._user, session)
        del self._new[session]  # and whatever is told of it meanwhile notes it again
        try:
            before = self._spots.get(name, START)
            spot, lines = await self._next_lines(log, before, lambda: self._without(name))
        except BaseException:
            self._new[session] = None
            raise
        if len(lines) >= PAGE:
            self._new[session] = None
        if not lines:
            if spot != before:
                self._stand(name, spot)
            return []
        decode_line = self._messages.decoder(self._key(session), strict=False)
        arrivals = []
        for line in lines:
            spot = spot.behind(line)
            self._stand(name, spot)
            message = decode_line(line)
            if message is not None:
                arrivals.append(Arrival(message, session, None, self.place()))
        return arrivals

    def _stand(self, name: bytes, spot: Spot) -> None:
        """Be at this place of a session from now on."""
        if len(self._trail.steps) >= _STEPS + len(self._spots):
            self._trail = _Trail(self._spots.copy())
        _step(self._spots, name, spot)
        self._trail.steps.append((name, spot))

    def _without(self, name: bytes) -> str:
        """Return the cursor that begins a session anew."""
        return encode(self._scope, {other: spot for other, spot in self._spots.items() if other != name})

    def place(self) -> Callable[[], str]:
        return partial(self._trail.cursor, self._scope, len(self._trail.steps))


class _Trail:
    """The places of a user's sessions, one after the other, which the cursors of many messages share.

    There may be thousands of sessions: the places behind a message are gathered only when its cursor is asked for.
    """

    __slots__ = ("_begin", "steps")

    def __init__(self, begin: Mapping[bytes, Spot]) -> None:
        """Begin with places that nobody changes any more."""
        self._begin = begin
        self.steps: list[tuple[bytes, Spot]] = []
        """What became another place of which session; only added to."""

    def cursor(self, scope: bytes, count: int) -> str:
        """Return the cursor behind so many steps."""
        spots = dict(self._begin)
        for name, spot in islice(self.steps, count):
            _step(spots, name, spot)
        return encode(scope, spots)


def _step(spots: dict[bytes, Spot], name: bytes, spot: Spot) -> None:
    """Change a place, and make it the last one."""
    spots.pop(name, None)
    spots[name] = spot


async def newest_spot(store: Store, looks: Looks, log: LogName, last: int) -> Spot:
    """Return the place behind all messages of a log but for the newest `last`."""
    backend = await store.reading()
    key = store.layout.key(log.entry, **log.names)
    while True:
        position = max(0, await backend.count_log(key) - last)
        start = max(0, position - CHECKS)
        lines = await looks.read(key, start, position)
        if len(lines) == position - start:  # else some were removed meanwhile
            return Spot(position, tuple(map(check_of, reversed(lines))))
