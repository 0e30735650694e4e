"""A page of 100 from a log of 1,000,000 messages and from one of 1,000, beside SQLite with an index."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from flatfile_chat_database import Message, StorageManager
from flatfile_chat_database.backends.readers import Readers
from flatfile_chat_database.codec import MessageDecoder

from .corpus import Texts
from .machine import work_folder
from .ours import USER, configuration, create_logs, lines
from .peers.sqlite import INSERT, SCHEMA, connect
from .result import Bar, Result, Table, median
from .rounds import ROUNDS, settle

LONG, SHORT, PAGE = 1_000_000, 1_000, 100
CALLS, SECONDS = 300, 3.0
"""A round, whichever ends it; its figure is the median of its calls."""

AS_FAST = Bar(least=1.0)
FLAT = Bar(most=1.3)

Read = Callable[[], Awaitable[list[Message]]]

NEWEST = "SELECT body FROM messages WHERE session_id = ? ORDER BY sequence DESC LIMIT ?"
RANGE = "SELECT body FROM messages WHERE session_id = ? AND sequence >= ? AND sequence < ? ORDER BY sequence"


def run(*, quick: bool) -> Result:
    """Measure milliseconds from call to return of one caller."""
    with work_folder() as folder:
        return asyncio.run(_measure(folder, quick=quick))


async def _measure(folder: Path, *, quick: bool) -> Result:
    long, calls, rounds = (5_000, 20, 1) if quick else (LONG, CALLS, ROUNDS)
    texts = Texts()
    short_texts, long_texts = texts.take(SHORT), texts.take(long)
    await create_logs(folder / "ours", {"short": short_texts, "long": long_texts})
    database = _Database(folder / "messages.db")
    database.fill("short", short_texts)
    database.fill("long", long_texts)
    del short_texts, long_texts
    async with StorageManager(configuration(folder / "ours")) as storage:
        places = _Places()
        reads: dict[str, Read] = {}
        for name, size in (("long", long), ("short", SHORT)):
            reads[f"newest of {name}, ours"] = _newest(storage, name)
            reads[f"newest of {name}, SQLite"] = database.newest(name)
            reads[f"random of {name}, ours"] = _random(storage, name, places, size)
            reads[f"random of {name}, SQLite"] = database.random(name, places, size)
        await _verify(reads, places)
        times = await _interleave(reads, places, calls, rounds, quick=quick)
    database.close()
    first = [await _first(folder / "ours", long) for _ in range(rounds)]
    peer = "SQLite with an index"
    table = Table()
    for kind, what in (("newest", "newest page"), ("random", "page at a random place")):
        ours, theirs = (times[f"{kind} of long, {whose}"] for whose in ("ours", "SQLite"))
        short, short_theirs = (times[f"{kind} of short, {whose}"] for whose in ("ours", "SQLite"))
        table.compare(f"{what} of {long:,}", "ms", ours, peer, theirs, AS_FAST, lower_is_better=True)
        table.compare(f"{what} of {SHORT:,}", "ms", short, peer, short_theirs, lower_is_better=True)
        table.relate(f"{what} of {long:,}", "ms", ours, f"the same of {SHORT:,}", short, FLAT)
    table.measure(f"first page at a random place of {long:,} after opening", "ms", first)
    return Result(
        "paging",
        f"pages of {PAGE} messages from a log of {long:,}, one call at a time, {calls} calls a round",
        table.rows,
        table.beyond,
        [
            "SQLite: rows clustered by session and sequence, read in a thread and decoded by this package's own means",
            "the first call at a random place finds out where the lines are; it is measured by itself, in the last row",
        ],
        times | {"first page": first},
    )


class _Places:
    """Where pages begin: the same places for everybody."""

    def __init__(self) -> None:
        self._numbers = random.Random(1)

    def restart(self, seed: int) -> None:
        self._numbers = random.Random(seed)

    def next(self, size: int) -> int:
        return self._numbers.randrange(size - PAGE)


def _newest(storage: StorageManager, session: str) -> Read:
    async def read() -> list[Message]:
        return (await storage.page_messages(USER, session, limit=PAGE)).messages

    return read


def _random(storage: StorageManager, session: str, places: _Places, size: int) -> Read:
    async def read() -> list[Message]:
        return await storage.get_messages(USER, session, PAGE, places.next(size))

    return read


class _Database:
    """The same lines in SQLite."""

    def __init__(self, path: Path) -> None:
        self._connection: sqlite3.Connection = connect(path)
        self._connection.execute(SCHEMA)
        self._connection.text_factory = bytes  # what the decoder takes, without a detour over str
        self._readers = Readers(1)
        self._decoder = MessageDecoder(_refuse)

    def fill(self, session: str, texts: list[str]) -> None:
        self._connection.execute("BEGIN")
        rows = ((session, number, line.decode()) for number, line in enumerate(lines(texts)))
        self._connection.executemany(INSERT, rows)
        self._connection.execute("COMMIT")
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def newest(self, session: str) -> Read:
        async def read() -> list[Message]:
            return await self._readers.run(lambda: self._select(NEWEST, (session, PAGE), newest_first=True))

        return read

    def random(self, session: str, places: _Places, size: int) -> Read:
        async def read() -> list[Message]:
            start = places.next(size)
            return await self._readers.run(lambda: self._select(RANGE, (session, start, start + PAGE)))

        return read

    def _select(self, statement: str, values: tuple[str | int, ...], *, newest_first: bool = False) -> list[Message]:
        rows = self._connection.execute(statement, values).fetchall()
        if newest_first:
            rows.reverse()
        # The very decoder that our pages go through, which looks at the timestamps as well.
        messages = self._decoder.many([body for (body,) in rows])
        if messages is None:
            raise SystemExit("A message in SQLite is none.")
        return messages

    def close(self) -> None:
        self._readers.close()
        self._connection.close()


def _refuse(message: Message) -> None:
    raise SystemExit(f"The message {message.id} has an unusual timestamp.")


async def _verify(reads: dict[str, Read], places: _Places) -> None:
    """See that both return the same messages; it also warms them up."""
    for name, read in reads.items():
        if name.endswith("ours"):
            places.restart(0)
            ours = await read()
            places.restart(0)
            if await reads[name.replace("ours", "SQLite")]() != ours or len(ours) != PAGE:
                raise SystemExit(f"{name}: the page is not the same as SQLite's.")


async def _first(folder: Path, size: int) -> float:
    """Return the milliseconds of the first page at a random place of a store that was just opened."""
    async with StorageManager(configuration(folder)) as storage:
        await storage.page_messages(USER, "long", limit=PAGE)
        began = time.perf_counter()
        await storage.get_messages(USER, "long", PAGE, size // 2)
        return (time.perf_counter() - began) * 1000


async def _interleave(
    reads: dict[str, Read], places: _Places, calls: int, rounds: int, *, quick: bool
) -> dict[str, list[float]]:
    figures: dict[str, list[float]] = {name: [] for name in reads}
    for number in range(rounds + 1):
        settle(quick=quick)
        for name, read in reads.items():
            places.restart(number)
            times: list[float] = []
            end = time.perf_counter() + SECONDS
            while len(times) < calls and time.perf_counter() < end:
                began = time.perf_counter()
                await read()
                times.append((time.perf_counter() - began) * 1000)
            if number:  # the first one was to warm up
                figures[name].append(median(times))
    return figures
