"""S3 servers and clients that are killed, cut off and restarted, and several nodes on one store."""

import asyncio
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from flatfile_chat_database import Message, StorageManager
from flatfile_chat_database.check import check
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.errors import NotFoundError, StorageError
from flatfile_chat_database.testing.case import fresh_processes

from . import kills, s3
from .load import Load
from .servers import ceph_server

pytestmark = pytest.mark.slow

SESSIONS = 3


def config_of(url: str, folder: Path, **settings: Any) -> StorageConfig:
    return StorageConfig(storage_url=url, search_index_path=str(folder), **settings)


async def test_a_server_that_is_killed_under_load_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    s3.let_in()
    with ceph_server(durable=True) as server:
        s3.make_bucket(server, s3.BUCKET)
        config = config_of(s3.url_of(server), tmp_path, object_store_retries=1, object_store_timeout_seconds=5)
        async with StorageManager(config) as storage:
            load = Load(storage)
            await load.prepare()
            tasks = [asyncio.ensure_future(load.run(writer)) for writer in load.acknowledged]
            for _ in range(int(os.environ.get("CHATDB_TEST_SERVER_KILLS", "1"))):
                await load.more(150)
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)
            await load.more(150)
            load.is_over = True
            await asyncio.gather(*tasks)
            assert load.refused + load.unknown
            await load.verify()
        async with StorageManager(config) as storage:
            assert (await check(storage.backend)).clean


def test_a_killed_process_loses_no_acknowledged_message(tmp_path: Path) -> None:
    url = s3.empty_store().replace("?", "/STORE?")
    report = kills.run(tmp_path, kills=int(os.environ.get("CHATDB_TEST_KILLS", "6")), seed=1, each=60, kind=url)
    print(report)
    assert report.problems == []
    assert report.acknowledged > 6


def test_a_forked_child_is_told(tmp_path: Path) -> None:
    program = (
        "import asyncio, os, sys\n"
        "from flatfile_chat_database import StorageConfig, StorageManager\n"
        "async def use(name):\n"
        "    config = StorageConfig(storage_url=sys.argv[1], search_index_path=sys.argv[2])\n"
        "    async with StorageManager(config) as storage:\n"
        "        print(await storage.create_user(name), flush=True)\n"
        "asyncio.run(use('a'))\n"
        "if os.fork() == 0:\n"
        "    try: asyncio.run(use('b'))\n"
        "    except Exception as error: print(type(error).__name__, error, flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
    )
    command = [sys.executable, "-c", program, s3.empty_store(), str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("True\nConfigurationError") and "forked" in done.stdout


# --- several nodes -----------------------------------------------------------------------------------------


def test_nodes_that_write_to_the_same_logs_lose_nothing_of_each_other(tmp_path: Path) -> None:
    url, nodes, each = s3.empty_store(), 3, 24
    asyncio.run(_prepare(url, tmp_path))
    context = fresh_processes()
    pipes, processes = [], []
    for node in range(nodes):
        here, there = context.Pipe()
        processes.append(context.Process(target=_node, args=(url, str(tmp_path), node, each, there)))
        processes[-1].start()
        pipes.append(here)
    try:
        answers = [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.join(60)
            process.kill()
    acknowledged: dict[str, list[str]] = {f"s{session}": [] for session in range(SESSIONS)}
    popped: list[str] = []
    seen: list[tuple[str, list[str]]] = []
    for node, (said, took, looks) in enumerate(answers):
        for session, names in said.items():
            assert names == [f"{node}-{session}-{number}" for number in range(each)]
            acknowledged[session] += names
        popped += took
        seen += looks
    asyncio.run(_verify(url, tmp_path, acknowledged, popped, seen))


async def _prepare(url: str, folder: Path) -> None:
    async with StorageManager(config_of(url, folder)) as storage:
        await storage.create_user("ada")
        for session in range(SESSIONS):
            await storage.create_session("ada", session_id=f"s{session}")


def _node(url: str, folder: str, node: int, each: int, there: Connection) -> None:
    s3.let_in()
    there.send(asyncio.run(_write(url, Path(folder, f"node{node}"), node, each)))


async def _write(
    url: str, folder: Path, node: int, each: int
) -> tuple[dict[str, list[str]], list[str], list[tuple[str, list[str]]]]:
    """Write to all sessions at once, take messages out of the first one, and look at the others."""
    said: dict[str, list[str]] = {}
    popped: list[str] = []
    seen: list[tuple[str, list[str]]] = []
    async with StorageManager(config_of(url, folder)) as storage:

        async def say(session: str) -> None:
            for number in range(each):
                message = Message("user", "text", id=f"{node}-{session}-{number}")
                await storage.add_message("ada", session, message)
                said.setdefault(session, []).append(message.id)

        async def pop() -> None:
            for _ in range(each // 4):
                taken = await storage.pop_message("ada", "s0")
                popped.extend([taken.id] if taken is not None else [])

        async def look() -> None:
            before: dict[str, int] = {}
            for turn in range(each // 2):
                session = f"s{1 + turn % 2}"
                page = await storage.get_messages("ada", session, 10_000)
                assert len(page) >= before.get(session, 0), "a reader goes back"
                before[session] = len(page)
                seen.append((session, [message.id for message in page]))

        await asyncio.gather(*(say(f"s{session}") for session in range(SESSIONS)), pop(), look())
    return said, popped, seen


async def _verify(
    url: str,
    folder: Path,
    acknowledged: dict[str, list[str]],
    popped: list[str],
    seen: list[tuple[str, list[str]]],
) -> None:
    async with StorageManager(config_of(url, folder)) as storage:
        for session, names in acknowledged.items():
            found = [message.id for message in await storage.get_messages("ada", session, 10_000)]
            gone = popped if session == "s0" else []
            assert sorted([*found, *gone]) == sorted(names), "each is there once, or was given to one who took it"
            for node in range(len(names)):
                mine = [name for name in found if name.startswith(f"{node}-")]
                assert mine == sorted(mine, key=lambda name: int(name.rpartition("-")[2]))
            for where, page in seen:
                if where == session:
                    assert page == found[: len(page)], "a read is no prefix of what is there in the end"
        assert (await check(storage.backend)).problems == []


async def test_of_two_nodes_that_make_and_delete_the_same_things_one_does_it(tmp_path: Path) -> None:
    url = s3.empty_store()
    one, two = (StorageManager(config_of(url, tmp_path / name)) for name in ("one", "two"))
    async with one, two:
        assert sorted(await asyncio.gather(one.create_user("ada"), two.create_user("ada"))) == [False, True]
        made = await asyncio.gather(*(node.create_session("ada", "t") for node in (one, two) * 5))
        assert len(set(made)) == 10
        await asyncio.gather(*(node.save_persona("p", {"name": "p"}) for node in (one, two)))
        panels = await asyncio.gather(*(node.create_panel("t", ["p"]) for node in (one, two) * 3))
        assert len(set(panels)) == 6
        for session in made[:4]:
            results = await asyncio.gather(
                *(node.delete_session("ada", session) for node in (one, two)), return_exceptions=True
            )
            assert [each for each in results if isinstance(each, BaseException)] == []
            assert sum(bool(each) for each in results) >= 1
        assert len(await one.list_sessions("ada")) == 6
        await asyncio.gather(*(node.update_user_profile("ada", {name: 1}) for node, name in ((one, "a"), (two, "b"))))
        assert await one.get_user_profile("ada") == {"a": 1, "b": 1}
        assert [problem for problem in (await check(one.backend)).problems if not problem.harmless] == []


async def test_a_session_that_is_deleted_while_others_write_to_it_is_gone_or_whole(tmp_path: Path) -> None:
    url = s3.empty_store()
    one, two = (StorageManager(config_of(url, tmp_path / name)) for name in ("one", "two"))
    async with one, two:
        await one.create_user("ada")
        session = await one.create_session("ada")
        acknowledged: list[str] = []

        async def say() -> None:
            try:
                for number in range(500):
                    await one.add_message("ada", session, Message("user", "text", id=f"m{number}"))
                    acknowledged.append(f"m{number}")
            except (NotFoundError, StorageError):
                return

        async def delete() -> None:
            await asyncio.sleep(0.1)
            assert await two.delete_session("ada", session)

        await asyncio.gather(say(), delete())
        [entry] = await two.list_trash()
        await two.undelete(entry.id)
        found = [message.id for message in await one.get_messages("ada", session, 10_000)]
        assert acknowledged == found[: len(acknowledged)] and len(found) <= len(acknowledged) + 1
