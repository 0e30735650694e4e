"""How far each backend goes: the same questions to stores of growing size, and more and more nodes on one server.

Long, so it is run by its name alone: `python -m benchmarks scaling`. docs/scaling.md is about what it prints.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatfile_chat_database import Message, StorageConfig, StorageManager
from flatfile_chat_database.codec import encode_document
from flatfile_chat_database.layout import Layout
from flatfile_chat_database.models import format_timestamp
from tests.servers import PostgresServer, is_postgres_installed, postgres_replica, postgres_server

from .corpus import ROLES, Texts
from .machine import work_folder
from .ours import BEGAN, configuration, lines
from .processes import Workers, verify
from .result import Result, median, percentile
from .rounds import ROUNDS, settle

SIZES = (10_000, 100_000, 1_000_000)
PER_SESSION, SESSIONS_PER_USER = 20, 1_000
WRITERS, MESSAGES = 100, 50
NODES = (1, 2, 4)
TARGET = 100_000_000
"""Messages that somebody may want to know about; what was measured is so much smaller."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A store that grows."""

    name: str
    config: StorageConfig
    size: Callable[[], int]
    """Bytes on the disk."""


def run(*, quick: bool) -> Result:
    """Measure messages a second, and milliseconds from call to return."""
    if not is_postgres_installed():
        raise SystemExit("PostgreSQL is not installed: `make servers` installs it.")
    sizes = (100, 300) if quick else SIZES
    rows: list[dict[str, Any]] = []
    with work_folder() as folder, postgres_server(durable=True) as server:
        for place in _places(folder, server):
            rows += asyncio.run(_grow(place, sizes, quick=quick))
    with work_folder() as folder:
        rows += _nodes(folder, quick=quick)
    largest = sizes[-1]
    return Result(
        "scaling",
        f"stores of up to {largest:,} messages, {PER_SESSION} in a session and {SESSIONS_PER_USER:,} sessions a user",
        rows,
        notes=[
            f"the largest point measured: {largest:,} messages; {TARGET:,} would be {TARGET // largest:,} times as "
            "many, and whatever is said of them is extrapolated by that factor",
            f"append: {WRITERS} sessions at once, each awaiting its own; list: 50 of a user's sessions; page: the "
            "newest 100 of a random session; search: a word, newest first; medians, and what 99 % of the pages do not "
            "exceed",
            "server and nodes share this machine's cores, so more nodes measure how they get along, not more machines",
        ],
    )


def _places(folder: Path, server: PostgresServer) -> Iterator[_Place]:
    def of_files(*names: str) -> Callable[[], int]:
        return lambda: sum(_bytes(folder / name) for name in names)

    yield _Place("files", configuration(folder / "files"), of_files("files"))
    url = f"sqlite:{folder}/chats.sqlite3"
    yield _Place("SQLite", configuration(folder, url=url), of_files("chats.sqlite3", "chats.sqlite3-wal"))
    server.sql("CREATE DATABASE grows")
    yield _Place(
        "PostgreSQL",
        configuration(folder, url=server.url("grows")),
        lambda: int(server.sql("SELECT pg_database_size('grows')")),
    )


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_blocks * 512
    return sum(_bytes(Path(entry.path)) for entry in os.scandir(path)) if path.exists() else 0


async def _grow(place: _Place, sizes: tuple[int, ...], *, quick: bool) -> list[dict[str, Any]]:
    rows = []
    texts, numbers = Texts(), random.Random(1)
    async with StorageManager(place.config) as storage:
        users = 0
        stored = 0
        for size in sizes:
            began, before = time.perf_counter(), stored
            while stored < size:
                sessions = min(SESSIONS_PER_USER, (size - stored) // PER_SESSION) or 1
                await _load(storage, place.config, f"user-{users}", sessions, texts)
                users += 1
                stored += sessions * PER_SESSION
            loaded = (stored - before) / (time.perf_counter() - began)
            settle(quick=quick)
            appended, count = await _append(storage, users, numbers, texts, quick=quick)
            stored += count
            times = 10 if quick else 300

            def page(count: int = users) -> Awaitable[object]:
                user = f"user-{numbers.randrange(count)}"
                return storage.get_messages(user, "s0", 100, -100)

            pages = await _times(times, page)
            await storage.list_sessions("user-0", 50)
            lists = await _times(times // 5, lambda: storage.list_sessions("user-0", 50))
            await storage.search("nothing", user_id="user-0")  # what is derived is made
            finds = await _times(times // 5, lambda: storage.search(next(texts).split()[0], user_id="user-0", limit=20))
            rows.append(
                {
                    "store": place.name,
                    "messages": size,
                    "nodes": 1,
                    "loaded/s": loaded,
                    "appended/s": appended,
                    "page ms": median(pages),
                    "p99": percentile(pages, 0.99),
                    "list ms": median(lists),
                    "search ms": median(finds),
                    "bytes a message": place.size() / stored,
                }
            )
    return rows


async def _load(storage: StorageManager, config: StorageConfig, user: str, sessions: int, texts: Texts) -> None:
    """Make a user with sessions, as `chatdb migrate` does it."""
    layout = Layout(config)
    stamp = format_timestamp(BEGAN)
    dates = {"created_at": stamp, "updated_at": stamp}
    await storage.create_user(user)
    items: list[tuple[str, bytes]] = []
    for number in range(sessions):
        name = f"s{number}"
        document = encode_document({"id": name, "user_id": user, "title": "", **dates, "metadata": {}})
        items.append((layout.key("session", user_id=user, session_id=name), document))
        log = b"".join(lines(texts.take(PER_SESSION)))
        items.append((layout.key("messages", user_id=user, session_id=name), log))
        if len(items) >= 2_000:
            await storage.backend.load(items)
            items = []
    if items:
        await storage.backend.load(items)


async def _append(
    storage: StorageManager, users: int, numbers: random.Random, texts: Texts, *, quick: bool
) -> tuple[float, int]:
    """Append to sessions of many users at once; return the rate, and how many messages it were."""
    writers, messages, rounds = (5, 2, 1) if quick else (WRITERS, MESSAGES, ROUNDS)
    chosen = [(f"user-{numbers.randrange(users)}", f"s{number % 5}") for number in range(writers)]

    async def write(user: str, session: str, said: list[str]) -> None:
        for number, text in enumerate(said):
            await storage.add_message(user, session, Message(ROLES[number % 2], text))

    rates = []
    for number in range(rounds + 1):
        said = [texts.take(messages) for _ in chosen]
        began = time.perf_counter()
        await asyncio.gather(*(write(*whose, some) for whose, some in zip(chosen, said, strict=True)))
        if number:  # the first one was to warm up
            rates.append(writers * messages / (time.perf_counter() - began))
    return median(rates), writers * messages * (rounds + 1)


async def _times(times: int, call: Callable[[], Awaitable[object]]) -> list[float]:
    found = []
    for _ in range(times):
        began = time.perf_counter()
        await call()
        found.append((time.perf_counter() - began) * 1000)
    return found


# --- nodes ---------------------------------------------------------------------------------------------


def _nodes(folder: Path, *, quick: bool) -> list[dict[str, Any]]:
    """Have more and more processes write through one server, alone and with a synchronous replica."""
    sessions, messages, rounds = (3, 3, 1) if quick else (WRITERS, MESSAGES, ROUNDS)
    rows = []
    for with_replica in (False, True):
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(postgres_server(durable=True))
            if with_replica:
                stack.enter_context(postgres_replica(server, "second", durable=True))
                server.sql("ALTER SYSTEM SET synchronous_standby_names = 'second'")
                server.sql("SELECT pg_reload_conf()")
            for nodes in NODES[:2] if quick else NODES:
                database = f"nodes{nodes}"
                server.sql(f"CREATE DATABASE {database}")
                rates = []
                with Workers(folder, nodes, sessions, messages, server.url(database)) as workers:
                    for number in range(rounds + 1):
                        settle(quick=quick)
                        rate = workers.append()
                        if number:
                            rates.append(rate)
                asyncio.run(verify(folder, nodes, sessions, messages * (rounds + 1), server.url(database)))
                rows.append(
                    {
                        "store": "PostgreSQL and a synchronous replica" if with_replica else "PostgreSQL",
                        "messages": nodes * sessions * messages * (rounds + 1),
                        "nodes": nodes,
                        "loaded/s": None,
                        "appended/s": median(rates),
                        "page ms": None,
                        "p99": None,
                        "list ms": None,
                        "search ms": None,
                        "bytes a message": None,
                    }
                )
    return rows
