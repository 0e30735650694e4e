"""One state of a database, read by several calls: streams and snapshots."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Generic, Protocol, TypeVar

from ..errors import ClosedError
from .base import Snapshot, StorageBackend
from .contents import PIECE_BYTES, Contents
from .readers import Readers
from .rows import Connection
from .rules import check_key, not_found

T = TypeVar("T")

_SIZED_AT_ONCE = 1000
"""Keys of a snapshot."""


class Session(Connection, Protocol):
    """A connection with its transactions.

    What the database cannot do is raised as UnavailableError, damage as IntegrityError.
    """

    def begin_reading(self) -> None:
        """Begin a transaction that sees one state of the store."""

    def begin_writing(self) -> bool:
        """Begin a transaction that no other writer comes into; return whether others may have written since."""

    def commit(self) -> None:
        """End the transaction; what it wrote is durable.

        Raises:
            DurabilityError: It is not known whether it is.
        """

    def roll_back(self) -> None:
        """End the transaction; it changed nothing."""

    def close(self) -> None:
        """Let go of the connection."""

    def faults(self) -> list[str]:
        """Return what the database itself finds wrong with the store."""
        ...


class Medium(Protocol):
    """A backend's connections to read with."""

    def take(self) -> Session | None:
        """Return one; None if there is no store."""

    def give_back(self, connection: Session) -> None:
        """End its transaction, and let others have it."""

    def contents(self, connection: Session) -> Contents:
        """Return what is in the store, as its transaction sees it."""
        ...


class Stream(Generic[T]):
    """An iterator over one state of the store, with the connection that sees it; used by one thread at a time."""

    def __init__(self, backend: Medium, begin: Callable[[Contents | None], Iterator[T]]) -> None:
        self._backend = backend
        self._begin = begin
        self._connection: Session | None = None
        self._items: Iterator[T] | None = None
        self._has_ended = False
        self._state = threading.Lock()  # a caller who is cancelled ends it while a thread may still be at it

    def next(self) -> list[T]:
        """Return the next item, or nothing behind the last."""
        with self._state:
            if self._has_ended:
                return []
            if self._items is None:
                self._connection = self._backend.take()
                if self._connection is not None:
                    self._connection.begin_reading()
                connection = self._connection
                self._items = self._begin(None if connection is None else self._backend.contents(connection))
            return list(islice(self._items, 1))

    def end(self) -> None:
        """Let go of the connection."""
        with self._state:
            self._has_ended = True
            if isinstance(self._items, Generator):
                self._items.close()
            if self._connection is not None:
                self._backend.give_back(self._connection)
                self._connection = None


class Reading:
    """The bytes at a key, read piece by piece; used by one thread at a time."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._pieces: Iterator[bytes] | None = None

    def next(self, contents: Contents | None) -> bytes:
        """Return the next of them; empty behind the last.

        Raises:
            NotFoundError: There are none.
        """
        if self._pieces is None:
            self._pieces = blob(self._key, contents)
        return next(self._pieces, b"")

    def close(self) -> None:
        """Let go of what the database holds for it."""
        if isinstance(self._pieces, Generator):
            self._pieces.close()


class State:
    """One state of the store, seen by a connection of its own; every method blocks."""

    def __init__(self, backend: Medium) -> None:
        self._backend = backend
        self._connection: Session | None = None
        self._has_ended = False
        self._lock = threading.Lock()  # a caller who is cancelled ends it while a thread may still be at it
        self._begun: set[Reading] = set()

    def begin(self) -> None:
        """Take the state of now."""
        with self._lock:
            self._connection = None if self._has_ended else self._backend.take()
            if self._connection is not None:
                self._connection.begin_reading()
                self._backend.contents(self._connection).exists("-")  # only what is read first begins some of them

    def end(self) -> None:
        """Let go of the connection."""
        with self._lock:
            self._has_ended = True
            connection, self._connection = self._connection, None
            while self._begun:
                self._begun.pop().close()
            if connection is not None:
                self._backend.give_back(connection)

    def look(self, work: Callable[[Contents | None], T]) -> T:
        """Do something with what is in the store."""
        with self._lock:
            if self._has_ended:
                raise ClosedError("The snapshot has ended.")
            return work(self._contents())

    def read_on(self, reading: Reading) -> bytes:
        """Return the next bytes of a key, empty at the end; several may be read in turn."""
        with self._lock:
            if self._has_ended:
                raise ClosedError("The snapshot has ended.")
            self._begun.add(reading)
            return reading.next(self._contents())

    def stop_reading(self, reading: Reading) -> None:
        """Let go of what reading a key holds."""
        with self._lock:
            if reading in self._begun:
                self._begun.remove(reading)
                reading.close()

    def _contents(self) -> Contents | None:
        return None if self._connection is None else self._backend.contents(self._connection)


class DatabaseSnapshot(Snapshot):
    """A transaction that only reads."""

    def __init__(self, backend: StorageBackend, threads: Callable[[], Readers], state: State) -> None:
        super().__init__(backend)
        self._threads = threads
        self._state = state

    async def sized(self, prefix: str = "") -> AsyncIterator[list[tuple[str, int]]]:
        after = ""
        while run := await self._look(partial(_sized_keys, prefix, after)):
            yield run
            after = run[-1][0]

    async def read(self, key: str) -> AsyncIterator[bytes]:
        reading = Reading(check_key(key))
        try:
            while data := await self._threads().run(partial(self._state.read_on, reading)):
                yield data
        finally:
            with suppress(ClosedError):  # then all of it was let go of
                await asyncio.shield(self._threads().run(partial(self._state.stop_reading, reading)))

    async def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        return await self._look(lambda contents: contents.read_many(keys) if contents else [None] * len(keys))

    async def _look(self, work: Callable[[Contents | None], T]) -> T:
        return await self._threads().run(lambda: self._state.look(work))


def _sized_keys(prefix: str, after: str, contents: Contents | None) -> list[tuple[str, int]]:
    return contents.sized_keys(prefix, after, _SIZED_AT_ONCE) if contents else []


def blob(key: str, contents: Contents | None) -> Iterator[bytes]:
    """Begin to read the bytes at a key piece by piece.

    Raises:
        NotFoundError: There are none.
    """
    place = None if contents is None else contents.place(key)
    if contents is None or place is None:
        raise not_found(f"The file {key}", key)
    return _together(contents.pieces_of(key, place))


def _together(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield as many pieces at a time as make a hop to a thread worth while: a log comes line by line."""
    gathered = bytearray()
    for piece in pieces:
        gathered += piece
        if len(gathered) >= PIECE_BYTES:
            yield bytes(gathered)
            gathered.clear()
    if gathered:
        yield bytes(gathered)
