"""Each backend beside the flat files on the same work, and PostgreSQL beside others who keep chats in it.

The server is one of the tests' own, on this machine and disk, with its durable settings on.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

from flatfile_chat_database import Message, StorageManager
from tests.servers import PostgresServer, is_postgres_installed, postgres_server

from .appending import race
from .corpus import ROLES, Texts, vocabulary
from .machine import work_folder
from .ours import OURS, USER, Ours, configuration
from .peers import SERVED, Contestant, open_served
from .result import Bar, Result, Table, median
from .rounds import Contest, interleave, timed

SESSIONS = 100
MESSAGES = 100
"""For each session and round."""
RAW, OPENAI, ADK = SERVED
FEWER = {RAW: 20, OPENAI: 5, ADK: 2}
"""Whose round would take too long has so many."""
BARS = {RAW: Bar(least=3), OPENAI: Bar(least=5)}

FILES, SQLITE, POSTGRES = "flat files", "SQLite", "PostgreSQL"
_LISTED, _LOG = 1_000, 20_000
"""Sessions of a user, and messages of one session."""
_SHORT, _LONG, _FILLED = 1_000, 1_000_000, 20_000
"""Messages of a short log, of a long one, and of those that are written at a time."""
FLAT = Bar(most=1.5)


def run(*, quick: bool) -> Result:
    """Measure messages a second, and milliseconds from call to return."""
    if not is_postgres_installed():
        raise SystemExit("PostgreSQL is not installed: `make servers` installs it.")
    with work_folder() as folder, postgres_server(durable=True) as server:
        return asyncio.run(_measure(folder, server, quick=quick))


async def _measure(folder: Path, server: PostgresServer, *, quick: bool) -> Result:
    table = Table()
    sessions, messages = (10, 5) if quick else (SESSIONS, MESSAGES)
    rates, notes = await _append(folder, server, table, sessions, messages, quick=quick)
    await _use(folder, server, table, quick=quick)
    await _page(folder, server, table, quick=quick)
    return Result(
        "databases",
        f"{sessions} sessions at once on PostgreSQL, and the same work on each backend",
        table.rows,
        table.beyond,
        notes,
        rates,
        {f"{OURS} on {POSTGRES}" if name == OURS else name: median(values) for name, values in rates.items()},
        table.missing,
    )


async def _append(
    folder: Path, server: PostgresServer, table: Table, sessions: int, messages: int, *, quick: bool
) -> tuple[dict[str, list[float]], list[str]]:
    """Append to many sessions at once, each awaiting its own appends, beside the peers on the same server."""
    server.sql("CREATE DATABASE ours")
    ours = Ours(folder / "ours", sessions, url=server.url("ours"))
    await ours.create()
    contestants: dict[str, Contestant] = {OURS: ours}
    for number, name in enumerate(SERVED):
        server.sql(f"CREATE DATABASE peer{number}")
        peer = open_served(name, folder, sessions, server.url(f"peer{number}"))
        if peer is not None:
            contestants[name] = peer
    rates, notes = await race(contestants, sessions, messages, FEWER, quick=quick)
    for name in SERVED:
        table.compare(
            f"{sessions} sessions at once on {POSTGRES}",
            "messages/s",
            rates[OURS],
            name,
            rates.get(name),
            BARS.get(name),
        )
    return rates, notes


# --- the same work on each backend ---------------------------------------------------------------------


async def _use(folder: Path, server: PostgresServer, table: Table, *, quick: bool) -> None:
    """Do what an application does on each backend in turn; the flat files are what the others are compared with."""
    server.sql("CREATE DATABASE used")
    urls = {FILES: "", SQLITE: f"sqlite:{folder}/used.sqlite3", POSTGRES: server.url("used")}
    listed, log, rounds = (30, 200, 2) if quick else (_LISTED, _LOG, 5)
    async with AsyncExitStack() as stack:
        stores = {}
        for name, url in urls.items():
            config = configuration(folder / "used", url=url)
            stores[name] = await stack.enter_async_context(StorageManager(config))
            await _fill(stores[name], listed, log)
        for what, unit, work in _works(listed, log, times=3 if quick else 50):
            figures = await interleave(
                {name: _contest(store, work) for name, store in stores.items()}, quick=quick, rounds=rounds
            )
            for name in (SQLITE, POSTGRES):
                table.compare(
                    f"{what}, {name}", unit, figures[name], FILES, figures[FILES], lower_is_better=unit == "ms"
                )


async def _page(folder: Path, server: PostgresServer, table: Table, *, quick: bool) -> None:
    """Read pages from a long log and from a short one of the same store."""
    server.sql("CREATE DATABASE paged")
    long, times = (2 * _SHORT, 5) if quick else (_LONG, 100)
    numbers = random.Random(3)
    for name, url in ((SQLITE, f"sqlite:{folder}/paged.sqlite3"), (POSTGRES, server.url("paged"))):
        async with StorageManager(configuration(folder / "paged", url=url)) as store:
            await store.create_user(USER)
            for size in (_SHORT, long):
                await _fill_log(store, str(size), size)

            def newest(size: int, store: StorageManager = store) -> Contest:
                return lambda: _median_ms(times, lambda: store.get_messages(USER, str(size), 100, -100))

            def page(size: int, store: StorageManager = store) -> Contest:
                return lambda: _median_ms(
                    times, lambda: store.get_messages(USER, str(size), 100, numbers.randrange(size - 100))
                )

            for what, contest in (("newest page of 100", newest), ("page of 100 at a random place", page)):
                figures = await interleave(
                    {str(size): contest(size) for size in (_SHORT, long)}, quick=quick, rounds=2 if quick else 5
                )
                table.relate(
                    f"{what} of {long:,}, {name}",
                    "ms",
                    figures[str(long)],
                    f"the same of {_SHORT:,}",
                    figures[str(_SHORT)],
                    FLAT,
                )


async def _fill(storage: StorageManager, listed: int, log: int) -> None:
    texts = Texts()
    await storage.create_user(USER)
    for number in range(listed):
        name = await storage.create_session(USER, session_id=f"listed-{number}")
        await storage.add_messages(USER, name, [Message(ROLES[n % 2], next(texts)) for n in range(4)])
    await _fill_log(storage, "long", log)


async def _fill_log(storage: StorageManager, session: str, size: int) -> None:
    texts = Texts()
    await storage.create_session(USER, session_id=session)
    for start in range(0, size, _FILLED):
        some = [Message(ROLES[n % 2], next(texts)) for n in range(min(_FILLED, size - start))]
        await storage.add_messages(USER, session, some)


Work = Callable[[StorageManager], Awaitable[float]]


def _contest(store: StorageManager, work: Work) -> Contest:
    return lambda: work(store)


def _works(listed: int, log: int, times: int) -> list[tuple[str, str, Work]]:
    """Return what is done, the unit of its figure, and how."""
    numbers, texts = random.Random(1), Texts(2)
    words = vocabulary()[200:]

    async def append(store: StorageManager) -> float:
        said = [texts.take(times) for _ in range(min(100, listed))]
        with timed() as watch:
            await asyncio.gather(*(_say(store, f"listed-{number}", lines) for number, lines in enumerate(said)))
        return len(said) * times / watch.seconds

    async def say(store: StorageManager) -> float:
        with timed() as watch:
            await _say(store, "listed-0", texts.take(times))
        return times / watch.seconds

    async def newest(store: StorageManager) -> float:
        return await _median_ms(times, lambda: store.get_messages(USER, "long", 100, -100))

    async def page(store: StorageManager) -> float:
        return await _median_ms(times, lambda: store.get_messages(USER, "long", 100, numbers.randrange(log - 100)))

    async def sessions(store: StorageManager) -> float:
        return await _median_ms(times, lambda: store.list_sessions(USER, 50))

    async def search(store: StorageManager) -> float:
        return await _median_ms(times, lambda: store.search(numbers.choice(words), user_id=USER, limit=20))

    return [
        ("100 sessions at once", "messages/s", append),
        ("one session", "messages/s", say),
        ("newest page of 100", "ms", newest),
        (f"page of 100 of {log:,}", "ms", page),
        (f"list 50 of {listed:,}", "ms", sessions),
        (f"search {4 * listed + log:,} messages", "ms", search),
    ]


async def _say(store: StorageManager, session: str, texts: list[str]) -> None:
    for number, text in enumerate(texts):
        await store.add_message(USER, session, Message(ROLES[number % 2], text))


async def _median_ms(times: int, call: Callable[[], Awaitable[object]]) -> float:
    found = []
    for _ in range(times):
        began = time.perf_counter()
        await call()
        found.append((time.perf_counter() - began) * 1000)
    return median(found)
