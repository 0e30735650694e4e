"""Reading from the cache, and putting there what was read from the store, in a few threads."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Generic, TypeVar

from ...config import StorageConfig
from ...errors import ClosedError
from ..base import logger
from ..readers import Readers
from .entries import CLEAR, FILL, LOOK, MARKED, MOST_FIELDS, OWNER_LIVES, Damaged, Names
from .roll import Word
from .server import Server, Unusable

T = TypeVar("T")

_AT_ONCE = 64
"""Keys in one message."""
_BYTES_AT_ONCE = 1_048_576
"""Of answers in one message."""
_MOST_WAITING = 16_777_216
"""Bytes of answers that wait to be put; what comes then is not kept."""
_EACH = 1024
"""Bytes that an answer is counted as, beside its own."""
_AT_HAND = 65_536
"""Bytes of answers that are taken apart without a thread."""
_UNCHECKED_LEASES = 2
"""For which the run of the server is believed."""
_PUT_PATIENCE = 4
"""Times as long as a reader waits."""


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


@dataclass(frozen=True, slots=True)
class Fill:
    """An answer that was read from the store."""

    place: Place | None
    field: str
    pack: Callable[[str], bytes]
    """Makes the value of the name of the hash."""
    size: int
    """About how many bytes it has."""


class _Question:
    """What a caller waits to be told by a thread."""

    __slots__ = ("fields", "is_over", "keys", "names", "said", "server", "unchecked", "until")

    def __init__(self, names: Names, word: Word, keys: Sequence[str], fields: Sequence[str], until: float) -> None:
        self.names = names
        self.server = word.server
        self.unchecked = _UNCHECKED_LEASES * word.lease
        """Seconds for which it is believed which run of the server answers."""
        self.keys = keys
        self.fields = fields
        self.until = until
        """The time of the event loop at which the caller goes on without."""
        self.said: list[Any] | None = None
        """The answers to the first message, if it was asked already."""
        self.is_over = False

    def some(self, start: int) -> Sequence[str]:
        """Return the keys of the message that begins with a key."""
        return self.keys[start : start + _AT_ONCE]

    def owners(self, start: int) -> list[str]:
        """Return the names of their owners."""
        return list(dict.fromkeys(map(self.names.owner, self.some(start))))

    def commands(self, start: int) -> list[tuple[Any, ...]]:
        """Return what the message says."""
        # The hashes first: what is bound to the generations that come after was so before.
        commands: list[tuple[Any, ...]] = [
            ("HMGET", self.names.key(key), "g", "s", *self.fields) for key in self.some(start)
        ]
        commands += [("HGET", name, "g") for name in (*self.owners(start), self.names.store)]
        return commands

    def known(self, start: int, said: list[Any]) -> list[list[Any] | None]:
        """Return for each key its generation, what it is bound to, and the fields; None if that has to be made."""
        keys, store = self.some(start), said[-1]
        bounds = dict(zip(self.owners(start), said[len(keys) : -1], strict=True))
        answers: list[list[Any] | None] = said[: len(keys)]
        for at, (key, answer) in enumerate(zip(keys, answers, strict=True)):
            bound = bounds[self.names.owner(key)]
            if not store or not bound or not answer or answer[1] != store + bound or answer[0] == MARKED:
                answers[at] = None
        return answers


class Shelf:
    """The cache, for readers."""

    def __init__(self, config: StorageConfig, server: Server, readers: Readers) -> None:
        self._server = server
        self._readers = readers
        self._fillers = Readers(1)  # nobody who reads waits for what is put
        self._state = threading.Lock()
        self._waiting = 0
        self._seconds = config.cache_timeout_seconds
        self._largest = config.cache_entry_max_bytes
        self._connecting = False
        self._names = Names("")
        self._life = max(1, int(config.cache_entry_seconds * 1000))
        self.counters = {"cache_hits": 0, "cache_misses": 0, "cache_fills": 0, "cache_damaged": 0, "cache_late": 0}

    async def look(self, word: Word, keys: Sequence[str], fields: Sequence[str], take: Take[T]) -> list[Seen[T]]:
        """Return what the cache has of each key, within `cache_timeout_seconds`."""
        names = self._names
        if not names.are_of(word.cache, word.opening):
            names = self._names = Names(word.cache, word.opening)
        until = asyncio.get_running_loop().time() + self._seconds
        question = _Question(names, word, keys, fields, until)
        try:
            seen = await self._look_at_once(question, take) or await self._look_in_thread(question, take)
        except Unusable:
            seen = [Seen(MISSING, None)] * len(keys)
        hits = sum(each.value is not MISSING for each in seen)
        self.counters["cache_hits"] += hits
        self.counters["cache_misses"] += len(seen) - hits
        return seen

    async def _look_at_once(self, question: _Question, take: Take[T]) -> list[Seen[T]] | None:
        """Look without a thread, which would take as long as the server does; None if there is more to it."""
        if len(question.keys) > _AT_ONCE or self._server.is_unchecked(question.unchecked):
            return None
        try:
            said = await self._server.ask_at_once(question.server, question.commands(0))
        except Unusable as error:
            self.counters["cache_late"] += isinstance(error.__cause__, TimeoutError)
            raise
        if said is None:
            return None
        question.said = said
        try:
            answers = question.known(0, said)
            if None in answers or sum(len(value) for answer in answers for value in answer or () if value) > _AT_HAND:
                return None
            return [
                self._taken(question, key, answer, take)
                for key, answer in zip(question.keys, answers, strict=True)
                if answer
            ]
        except (TypeError, ValueError, LookupError):  # it is damaged, or no answer of ours: the thread finds out
            return None

    async def _look_in_thread(self, question: _Question, take: Take[T]) -> list[Seen[T]]:
        try:
            future = self._readers.run(lambda: self._look(question, take))
        except ClosedError:  # between the last look at whether it is closed and now
            return [Seen(MISSING, None)] * len(question.keys)
        timer = future.get_loop().call_at(question.until, self._give_up, future, len(question.keys))
        try:
            return await future
        finally:
            timer.cancel()
            question.is_over = True

    def _give_up(self, future: asyncio.Future[list[Seen[T]]], count: int) -> None:
        """Let a caller go on to the store; the thread finds out by itself that nobody waits."""
        if not future.done():
            self.counters["cache_late"] += 1
            future.set_result([Seen(MISSING, None)] * count)

    def put(self, fills: Sequence[Fill]) -> None:
        """Put answers, each unless somebody has written meanwhile; nobody waits for it.

        The cache may be slower than the store, so what waits to be put has a bound, and what is more is left.
        """
        kept = [fill for fill in fills if fill.place is not None and fill.size <= self._largest]
        if not kept or not self._server.is_up:
            return
        size = sum(fill.size + _EACH for fill in kept)
        with self._state:
            if self._waiting and self._waiting + size > _MOST_WAITING:
                return
            self._waiting += size
        try:
            _ = self._fillers.run(lambda: self._put_counted(kept, size))
        except ClosedError:
            self._done(size)

    @property
    def is_putting(self) -> bool:
        """Whether something waits to be put, or is being put."""
        return self._waiting > 0

    def close(self) -> None:
        """Put what was handed over, and end; blocks."""
        self._fillers.close()

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

    def _look(self, question: _Question, take: Take[T]) -> list[Seen[T]]:
        # Who keeps looking which run it is sleeps while nobody reads, and connections stay when a server is made a
        # replica, gets what another one had, and is promoted.
        if self._server.is_unchecked(question.unchecked):
            self._server.check(self._seconds)
        seen: list[Seen[T]] = []
        for start in range(0, len(question.keys), _AT_ONCE):
            if question.is_over:  # nobody wants it any more, and others wait for this thread
                return seen
            try:
                answers = self._answers(question, start)
                found = [
                    self._seen(question, key, answer, take)
                    for key, answer in zip(question.some(start), answers, strict=True)
                ]
            except (Unusable, TypeError, ValueError, LookupError):  # the last three: it is no answer of ours
                seen += [Seen(MISSING, None)] * (len(question.keys) - len(seen))
                break
            seen += found
        return seen

    def _answers(self, question: _Question, start: int) -> list[list[Any] | None]:
        """Return for each key its generation, what it is bound to, and the fields; None if it is being written."""
        names, server, fields, keys = question.names, question.server, question.fields, question.some(start)
        said, question.said = question.said, None
        answers = question.known(start, said or self._server.ask(server, question.commands(start)))
        missing = [at for at, answer in enumerate(answers) if answer is None]
        if missing:
            hashes = [name for at in missing for name in (names.owner(keys[at]), names.key(keys[at]))]
            settings = [os.urandom(8).hex(), self._life, OWNER_LIVES * self._life, *fields]
            made = self._server.call(server, LOOK, [names.store, *hashes], settings)
            for at, answer in zip(missing, made, strict=True):
                answers[at] = answer
        return answers

    def _seen(self, question: _Question, key: str, answer: list[Any] | None, take: Take[T]) -> Seen[T]:
        if not answer:  # it is being written
            return Seen(MISSING, None)
        try:
            return self._taken(question, key, answer, take)
        except Damaged:
            name = question.names.key(key)
            self.counters["cache_damaged"] += 1
            logger.warning("the cache has something damaged or foreign at %r, which is removed", name)
            with suppress(Unusable):
                self._server.call(question.server, CLEAR, [name], ["", "", ""])
            return Seen(MISSING, None)

    def _taken(self, question: _Question, key: str, answer: list[Any], take: Take[T]) -> Seen[T]:
        if len(answer) < 2:
            raise ValueError("it is no answer of ours")
        generation, bound, *values = answer
        place = Place(question.names, question.server, key, generation, bound)
        return Seen(take(place.name, values or [None] * len(question.fields)), place)

    def _put_counted(self, fills: Sequence[Fill], size: int) -> None:
        try:
            self._put(fills)
        finally:
            self._done(size)

    def _done(self, size: int) -> None:
        with self._state:
            self._waiting -= size

    def _put(self, fills: Sequence[Fill]) -> None:
        seconds = _PUT_PATIENCE * self._seconds
        calls: list[tuple[list[str], list[object]]] = []
        size = 0
        with suppress(Unusable):
            for number, fill in enumerate(fills, 1):
                place = fill.place
                assert place is not None
                value = fill.pack(place.name)
                names = [place.names.store, place.names.owner(place.key), place.name]
                calls.append((names, [place.generation, place.bound, MOST_FIELDS, fill.field, value]))
                size += len(value)
                if len(calls) == _AT_ONCE or size >= _BYTES_AT_ONCE or number == len(fills):
                    put = self._server.call_many(place.server, FILL, calls, seconds)
                    self.counters["cache_fills"] += sum(map(bool, put))
                    calls, size = [], 0
