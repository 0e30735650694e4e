"""Reading from the cache, and putting there what was read from the store, in a few threads."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Generic, TypeVar

from ...config import StorageConfig
from ...errors import ClosedError
from ..base import logger
from ..readers import Readers
from .entries import CLEAR, FILL, LOOK, MARKED, MOST_FIELDS, OWNER_MILLISECONDS, Damaged, Names
from .roll import Word
from .server import Server, Unusable

T = TypeVar("T")

_AT_ONCE = 64
"""Keys in one message."""


class Missing(Enum):
    MISSING = "missing"


MISSING: Final = Missing.MISSING
"""The cache does not know."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an answer may be put as long as nobody has written meanwhile."""

    names: Names
    server: str
    key: str
    generation: bytes
    bound: bytes

    @property
    def name(self) -> str:
        """The name of the hash."""
        return self.names.key(self.key)


@dataclass(frozen=True, slots=True)
class Seen(Generic[T]):
    """What the cache has of a key."""

    value: T | Missing
    place: Place | None
    """None if it is being written, or the cache could not be asked."""


Take = Callable[[str, list[object]], T | Missing]
"""Makes an answer of the name of a hash and its fields, each None if it is not there."""


class _Wait(Generic[T]):
    """A caller that waits for a thread to ask the cache."""

    __slots__ = ("begun", "timer")

    def __init__(self) -> None:
        self.begun = False
        self.timer: asyncio.TimerHandle

    def begin(self, work: Callable[[], list[Seen[T]]]) -> list[Seen[T]]:
        """Do the work in a thread."""
        self.begun = True
        return work()


class Shelf:
    """The cache, for readers."""

    def __init__(self, config: StorageConfig, server: Server, readers: Readers) -> None:
        self._server = server
        self._readers = readers
        self._seconds = config.cache_timeout_seconds
        self._largest = config.cache_entry_max_bytes
        self._connecting = False
        self._life = max(1, int(config.cache_entry_seconds * 1000))
        self.counters = {"cache_hits": 0, "cache_misses": 0, "cache_fills": 0, "cache_damaged": 0, "cache_late": 0}

    async def look(self, word: Word, keys: Sequence[str], fields: Sequence[str], take: Take[T]) -> list[Seen[T]]:
        """Return what the cache has of each key, within `cache_timeout_seconds`."""
        wait: _Wait[T] = _Wait()
        try:
            future = self._readers.run(lambda: wait.begin(lambda: self._look(word, keys, fields, take)))
        except ClosedError:  # between the last look at whether it is closed and now
            return [Seen(MISSING, None)] * len(keys)
        wait.timer = future.get_loop().call_later(self._seconds, self._give_up, future, len(keys), wait)
        try:
            seen = await future
        finally:
            wait.timer.cancel()
        hits = sum(each.value is not MISSING for each in seen)
        self.counters["cache_hits"] += hits
        self.counters["cache_misses"] += len(seen) - hits
        return seen

    def _give_up(self, future: asyncio.Future[list[Seen[T]]], count: int, wait: _Wait[T]) -> None:
        """Let a caller go on to the store; the thread finds out by itself that nobody waits."""
        if future.done():
            return
        if not wait.begun and self._server.is_up:  # it waits for a thread, and so would the store
            wait.timer = future.get_loop().call_later(self._seconds, self._give_up, future, count, wait)
            return
        self.counters["cache_late"] += 1
        future.set_result([Seen(MISSING, None)] * count)

    def put(self, place: Place | None, field: str, pack: Callable[[str], bytes], size: int) -> None:
        """Put an answer of about so many bytes, unless somebody has written meanwhile; nobody waits for it."""
        if place is not None and size <= self._largest and self._server.is_up:
            with suppress(ClosedError):
                _ = self._readers.run(lambda: self._put(place, field, pack(place.name)))

    def connect(self) -> None:
        """Connect to the server, one caller at a time; nobody waits for it."""
        if not self._connecting and not self._server.run:
            self._connecting = True
            with suppress(ClosedError):
                _ = self._readers.run(self._connect)

    # --- in a thread ---------------------------------------------------------------------------------

    def _connect(self) -> None:
        try:
            self._server.look()
        finally:
            self._connecting = False

    def _look(self, word: Word, keys: Sequence[str], fields: Sequence[str], take: Take[T]) -> list[Seen[T]]:
        names = Names(word.cache, word.epoch)
        seen: list[Seen[T]] = []
        for start in range(0, len(keys), _AT_ONCE):
            some = keys[start : start + _AT_ONCE]
            try:
                answers = self._answers(names, word.server, some, fields)
            except (Unusable, TypeError, ValueError):  # the last two: it is no answer of ours
                seen += [Seen(MISSING, None)] * (len(keys) - len(seen))
                break
            for key, answer in zip(some, answers, strict=True):
                seen.append(self._seen(names, word.server, key, answer, fields, take))
        return seen

    def _answers(self, names: Names, server: str, keys: Sequence[str], fields: Sequence[str]) -> list[list[Any] | None]:
        """Return for each key its generation, what it is bound to, and the fields; None if it is being written."""
        owners = list(dict.fromkeys(map(names.owner, keys)))
        # The hashes first: what is bound to the generations that come after was so before.
        commands: list[tuple[Any, ...]] = [("HMGET", names.key(key), "g", "s", *fields) for key in keys]
        commands += [("HGET", name, "g") for name in (*owners, names.store)]
        *answers, store = self._server.ask(server, commands)
        known = dict(zip(owners, answers[len(keys) :], strict=True))
        del answers[len(keys) :]
        for at, key in enumerate(keys):
            bound = known[names.owner(key)]
            if not store or not bound or not answers[at] or answers[at][1] != store + bound or answers[at][0] == MARKED:
                answers[at] = None
        missing = [at for at, answer in enumerate(answers) if answer is None]
        if missing:
            hashes = [name for at in missing for name in (names.owner(keys[at]), names.key(keys[at]))]
            settings = [os.urandom(8).hex(), self._life, OWNER_MILLISECONDS, *fields]
            made = self._server.call(server, LOOK, [names.store, *hashes], settings)
            for at, answer in zip(missing, made, strict=True):
                answers[at] = answer
        return answers

    def _seen(
        self, names: Names, server: str, key: str, answer: list[Any] | None, fields: Sequence[str], take: Take[T]
    ) -> Seen[T]:
        if not answer:  # it is being written
            return Seen(MISSING, None)
        generation, bound, *values = answer
        place = Place(names, server, key, generation, bound)
        try:
            return Seen(take(place.name, values or [None] * len(fields)), place)
        except Damaged:
            self.counters["cache_damaged"] += 1
            logger.warning("the cache has something damaged or foreign at %r, which is removed", place.name)
            with suppress(Unusable):
                self._server.call(server, CLEAR, [place.name], ["", "", ""])
            return Seen(MISSING, None)

    def _put(self, place: Place, field: str, value: bytes) -> None:
        names = [place.names.store, place.names.owner(place.key), place.name]
        with suppress(Unusable):
            self.counters["cache_fills"] += bool(
                self._server.call(place.server, FILL, names, [place.generation, place.bound, MOST_FIELDS, field, value])
            )
