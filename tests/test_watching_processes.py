"""Watching what other processes write, with deaths on either side: nothing is left out and nothing comes twice."""

import asyncio
import json
import random
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from flatfile_chat_database import BEGINNING, Arrival, Message, StorageConfig, StorageManager
from flatfile_chat_database.records import watching
from flatfile_chat_database.records.watching import Watch

from . import postgres
from .servers import PostgresServer, postgres_server

pytestmark = pytest.mark.slow

USER, SESSIONS = "ada", ["s0", "s1", "s2"]

WRITER = """
import asyncio, random, sys
from flatfile_chat_database import Message, StorageConfig, StorageManager

async def main(url, name, count):
    chance = random.Random(name)
    async with StorageManager(StorageConfig(storage_url=url, lock_timeout_seconds=60)) as storage:
        number = 0
        while number < int(count):
            size = chance.choice((1, 1, 1, 3))
            new = [Message("user", "x" * chance.randrange(300), id=f"{name}-{number + n}") for n in range(size)]
            await storage.add_messages("ada", chance.choice(["s0", "s1", "s2"]), new)
            number += size
            print(number, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""

WATCHER = """
import asyncio, json, sys
from flatfile_chat_database import StorageConfig, StorageManager

async def main(url, cursor):
    async with StorageManager(StorageConfig(storage_url=url), read_only=True) as storage:
        async for arrival in storage.watch_user("ada", cursor=cursor):
            print(json.dumps([arrival.session_id, arrival.message.id, arrival.cursor]), flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


def program(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)


@pytest.fixture(params=["file", "sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty store."""
    if request.param == "postgres":
        return postgres.empty_store()
    return f"{request.param}:{tmp_path}/store"


@asynccontextmanager
async def filled(url: str, **settings: Any) -> AsyncIterator[StorageManager]:
    """Open a store with three empty sessions."""
    async with StorageManager(StorageConfig(storage_url=url, **settings)) as storage:
        await storage.create_user(USER)
        for session in SESSIONS:
            await storage.create_session(USER, session_id=session)
        yield storage


async def logs(storage: StorageManager) -> dict[str, list[str]]:
    """Return the ids of all messages, by session."""
    return {session: [message.id async for message in storage.stream_messages(USER, session)] for session in SESSIONS}


async def take(watch: Watch, count: int) -> dict[str, list[str]]:
    """Return the ids of the next messages, by session."""
    got: dict[str, list[str]] = {session: [] for session in SESSIONS}
    async with asyncio.timeout(120):
        for _ in range(count):
            arrival: Arrival = await anext(watch)
            got[str(arrival.session_id)].append(arrival.message.id)
    return got


async def test_what_other_processes_write_comes_once_and_in_order(url: str) -> None:
    async with filled(url) as storage, storage.watch_user(USER) as every, storage.watch_session(USER, "s1") as one:
        writers = [program(WRITER, url, f"w{number}", "60") for number in range(2)]
        reading = asyncio.ensure_future(take(every, 120))
        for writer in writers:
            assert await asyncio.to_thread(writer.wait, 120) == 0
            assert writer.stdout is not None
            writer.stdout.close()
        there = await logs(storage)
        count = sum(map(len, there.values()))
        got = await reading
        more = await take(every, count - 120)
        assert {session: got[session] + more[session] for session in SESSIONS} == there
        assert (await take(one, len(there["s1"])))["s1"] == there["s1"]


async def test_the_end_of_a_writer_with_kill_9_leaves_nothing_out(url: str) -> None:
    chance = random.Random(5)
    async with filled(url) as storage, storage.watch_user(USER) as watch:
        got: dict[str, list[str]] = {session: [] for session in SESSIONS}

        async def gather() -> None:
            async for arrival in watch:
                got[str(arrival.session_id)].append(arrival.message.id)

        gathering = asyncio.ensure_future(gather())
        for number in range(4):
            writer = program(WRITER, url, f"w{number}", "100000")
            assert writer.stdout is not None
            for _ in range(chance.randrange(5, 40)):
                await asyncio.to_thread(writer.stdout.readline)
            writer.send_signal(signal.SIGKILL)
            await asyncio.to_thread(writer.wait)
            writer.stdout.close()
        await storage.add_message(USER, "s0", Message("user", "end", id="end"))  # after what the last one left is done
        there = await logs(storage)
        async with asyncio.timeout(60):
            while got != there:  # noqa: ASYNC110 - the other task is about to have it
                await asyncio.sleep(0.02)
        gathering.cancel()
        await asyncio.wait([gathering])
        print(f"4 writers killed, {sum(map(len, got.values()))} messages delivered once and in order")


async def test_a_watcher_that_is_killed_goes_on_where_its_last_whole_line_says(url: str) -> None:
    chance = random.Random(6)
    async with filled(url) as storage:
        writer = program(WRITER, url, "w", "400")
        assert writer.stdout is not None
        drain = threading.Thread(target=writer.stdout.read)
        drain.start()
        cursor = BEGINNING
        got: dict[str, list[str]] = {session: [] for session in SESSIONS}

        def watch_a_while(lines: int) -> Iterator[str]:
            watcher = program(WATCHER, url, cursor)
            assert watcher.stdout is not None
            for _ in range(lines):
                yield watcher.stdout.readline()
            watcher.send_signal(signal.SIGKILL)
            yield from watcher.stdout.read().splitlines(keepends=True)
            watcher.wait()
            watcher.stdout.close()

        for _ in range(4):
            for line in await asyncio.to_thread(list, watch_a_while(chance.randrange(1, 60))):
                if line.endswith("\n"):
                    session, name, cursor = json.loads(line)
                    got[session].append(name)
        assert await asyncio.to_thread(writer.wait, 120) == 0
        drain.join()
        writer.stdout.close()
        there = await logs(storage)
        missing = sum(map(len, there.values())) - sum(map(len, got.values()))
        print(f"watcher killed 4 times: {sum(map(len, got.values()))} messages before, {missing} after the last cursor")
        rest = await take(storage.watch_user(USER, cursor=cursor), missing)
        assert {session: got[session] + rest[session] for session in SESSIONS} == there


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """Return a server to be restarted."""
    with postgres_server() as server:
        yield server


@pytest.mark.parametrize("how", ["stopped", "killed"])
async def test_a_server_may_be_restarted_while_it_is_watched(
    own_server: PostgresServer, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    schema = f"watch_{how}"
    own_server.sql(f"CREATE SCHEMA {schema}")
    url = own_server.url(options=f"-csearch_path%3D{schema}")
    async with filled(url, watch_poll_seconds=0.1) as storage, storage.watch_user(USER) as watch:
        await storage.add_message(USER, "s0", Message("user", "x", id="m0"))
        assert (await take(watch, 1))["s0"] == ["m0"]
        waiting = asyncio.ensure_future(take(watch, 20))
        for number in range(2):
            await asyncio.to_thread(own_server.stop if how == "stopped" else own_server.kill)
            await asyncio.to_thread(own_server.start)
            async with StorageManager(StorageConfig(storage_url=url)) as other:
                for n in range(10):
                    await other.add_message(USER, "s0", Message("user", "x", id=f"n{number}-{n}"))
        assert (await waiting)["s0"] == [f"n{number}-{n}" for number in range(2) for n in range(10)]


@pytest.fixture
def unreminded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody look who was not woken."""
    monkeypatch.setattr(watching, "_LOOK_ANYWAY_SECONDS", 3600.0)
    monkeypatch.setattr(watching, "_LOOK_AT_ALL_SECONDS", 3600.0)


@pytest.mark.usefixtures("unreminded")
async def test_a_notification_is_heard_without_polling() -> None:
    url = postgres.empty_store()
    async with (
        filled(url, watch_poll_seconds=3600) as storage,
        storage.watch_session(USER, "s0") as watch,
        StorageManager(StorageConfig(storage_url=url)) as other,
    ):
        await _hears_without_polling(storage, watch, other)


@pytest.mark.usefixtures("unreminded")
@pytest.mark.parametrize("scheme", ["file", "sqlite"])
async def test_what_another_process_leaves_in_a_file_is_seen_without_polling(scheme: str, tmp_path: Path) -> None:
    url = f"{scheme}:{tmp_path}/store"
    async with (
        filled(url, watch_poll_seconds=3600) as storage,
        storage.watch_session(USER, "s0") as watch,
        StorageManager(StorageConfig(storage_url=url)) as other,
    ):
        await _hears_without_polling(storage, watch, other)


async def _hears_without_polling(storage: StorageManager, watch: Watch, other: StorageManager) -> None:
    """Two handles know nothing of each other: what one writes is told to the other one by the medium or not at all."""
    lookout = vars(storage.backend)["_lookout"]
    waiting = asyncio.ensure_future(take(watch, 1))
    async with asyncio.timeout(60):
        while lookout._watch is None or not lookout._watch.is_up:  # noqa: ASYNC110 - a thread is about to say so
            await asyncio.sleep(0.01)
    for number in range(10):
        await other.add_message(USER, "s0", Message("user", "x", id=f"m{number}"))
        assert (await waiting)["s0"] == [f"m{number}"]
        waiting = asyncio.ensure_future(take(watch, 1))
    waiting.cancel()
    await asyncio.wait([waiting])


async def test_without_watchfiles_it_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    url = f"file:{tmp_path}/store"
    async with (
        filled(url, watch_poll_seconds=0.02) as storage,
        storage.watch_session(USER, "s0") as watch,
        StorageManager(StorageConfig(storage_url=url)) as other,
    ):
        for number in range(5):
            await other.add_message(USER, "s0", Message("user", "x", id=f"m{number}"))
            assert (await take(watch, 1))["s0"] == [f"m{number}"]


async def test_a_store_of_files_that_is_taken_away_and_put_back_is_watched_again(tmp_path: Path) -> None:
    url = f"file:{tmp_path}/store"
    config = StorageConfig(storage_url=url, watch_poll_seconds=0.02)
    async with (
        StorageManager(config, read_only=True) as storage,
        storage.watch_session(USER, "s0") as watch,
    ):
        async with filled(url) as other:
            await other.add_message(USER, "s0", Message("user", "x", id="m0"))
            assert (await take(watch, 1))["s0"] == ["m0"]
        (tmp_path / "store").rename(tmp_path / "away")
        async with asyncio.timeout(60):
            while await storage.session_exists(USER, "s0") or vars(storage.backend)["_lookout"]._watch.is_up:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        waiting = asyncio.ensure_future(take(watch, 1))
        (tmp_path / "away").rename(tmp_path / "store")
        async with StorageManager(StorageConfig(storage_url=url)) as other:
            await other.add_message(USER, "s0", Message("user", "x", id="m1"))
            assert (await waiting)["s0"] == ["m1"]
