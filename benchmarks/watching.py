"""From the acknowledgement of a message to its delivery, with 100 watchers, written by this process and by another one.

The server is one of the tests' own, on this machine and disk, with its durable settings on.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

from flatfile_chat_database import Message, StorageManager
from tests.servers import is_postgres_installed, postgres_server, redis_server

from .machine import work_folder
from .ours import USER, configuration, names
from .result import Bar, Result, Table, percentile
from .rounds import ROUNDS, settle

WATCHERS = 100
MESSAGES = 100
"""For each round."""
PAUSE = 0.02
"""Seconds between two messages, so that each is a batch of its own."""
BAR = Bar(most=50)


def run(*, quick: bool) -> Result:
    """Measure milliseconds; every watcher must get every message once and in order."""
    if not is_postgres_installed() or shutil.which("redis-server") is None:
        raise SystemExit("PostgreSQL or Redis is not installed: `make servers` installs both.")
    table = Table()
    rounds: dict[str, list[float]] = {}
    watchers, messages, times = (10, 5, 1) if quick else (WATCHERS, MESSAGES, ROUNDS)
    with work_folder() as folder, postgres_server(durable=True) as server, redis_server() as cache:
        cached = f"cached:?store={quote(f'file:{folder}/cached', safe='')}&cache={quote(cache.url, safe='')}"
        for place, url, bar in (
            ("files", f"file:{folder}/store", BAR),
            ("PostgreSQL", server.url(), BAR),
            ("SQLite", f"sqlite:{folder}/chats.db", BAR),
            ("files behind Redis", cached, BAR),
        ):
            for sessions in (1, watchers):
                for writer in ("own process", "another process"):
                    what = f"{place}, {watchers} watchers of {sessions} session{'s' * (sessions > 1)}, {writer}"
                    measured = asyncio.run(
                        _measure(folder, url, what, watchers, sessions, messages, times, writer, quick=quick)
                    )
                    medians, tails = zip(*measured, strict=True)
                    table.measure(f"{what}: p50", "ms", medians, bar)
                    table.measure(f"{what}: p99", "ms", tails)
                    rounds[what] = list(medians)
    return Result(
        "watching",
        f"a message every {PAUSE * 1000:g} ms, {messages} a round; each watcher got each message of its session once "
        "and in order",
        table.rows,
        table.beyond,
        [],
        rounds,
    )


async def _measure(
    folder: Path,
    url: str,
    what: str,
    watchers: int,
    sessions: int,
    messages: int,
    rounds: int,
    writer: str,
    *,
    quick: bool,
) -> list[tuple[float, float]]:
    """Return the median and the 99th percentile of each round."""
    user = f"{USER} {what}"
    async with StorageManager(configuration(folder, url=url)) as storage:
        await storage.create_user(user)
        for session in names(sessions):
            await storage.create_session(user, session_id=session)
        arrived: list[list[tuple[str, float]]] = [[] for _ in range(watchers)]

        async def watch(number: int, begun: asyncio.Event) -> None:
            async with storage.watch_session(user, names(sessions)[number % sessions]) as watching:
                begun.set()
                async for arrival in watching:
                    arrived[number].append((arrival.message.id, time.monotonic()))

        begun = [asyncio.Event() for _ in range(watchers)]
        tasks = [asyncio.ensure_future(watch(number, begun[number])) for number in range(watchers)]
        await asyncio.gather(*(each.wait() for each in begun))
        await asyncio.sleep(0 if quick else 1)  # what looks out is up by then
        figures = []
        for number in range(rounds + (not quick)):
            settle(quick=quick)
            for each in arrived:
                each.clear()
            if writer == "own process":
                written = await _write(storage, user, sessions, messages, number)
            else:
                written = await _write_elsewhere(folder, url, user, sessions, messages, number)
            delays = await _delays(written, arrived, names(sessions))
            if number or quick:  # the first one was to warm up
                figures.append((percentile(delays, 0.5), percentile(delays, 0.99)))
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return figures


async def _delays(
    written: list[tuple[str, str, float]], arrived: list[list[tuple[str, float]]], sessions: list[str]
) -> list[float]:
    """Wait until all is there; return the milliseconds that each message took to each watcher."""
    delays = []
    for number, each in enumerate(arrived):
        wanted = [(name, at) for session, name, at in written if session == sessions[number % len(sessions)]]
        async with asyncio.timeout(60):
            while len(each) < len(wanted):  # noqa: ASYNC110 - it was measured by then
                await asyncio.sleep(0.01)
        if [name for name, _ in each] != [name for name, _ in wanted]:
            raise AssertionError(f"watcher {number} got {each}, and not {wanted}")
        delays += [max(0.0, 1000 * (got - at)) for (_, got), (_, at) in zip(each, wanted, strict=True)]
    return delays


async def _write(
    storage: StorageManager, user: str, sessions: int, messages: int, round_: int
) -> list[tuple[str, str, float]]:
    """Write messages; return the session and the id of each, and when it was acknowledged, by the system's clock."""
    chance = random.Random(round_)
    written = []
    for number in range(messages):
        session, name = chance.choice(names(sessions)), f"{round_}-{number}"
        await storage.add_message(user, session, Message("user", "what people say to each other " * 10, id=name))
        written.append((session, name, time.monotonic()))
        await asyncio.sleep(PAUSE)
    return written


async def _write_elsewhere(
    folder: Path, url: str, user: str, sessions: int, messages: int, round_: int
) -> list[tuple[str, str, float]]:
    arguments = [str(folder), url, user, str(sessions), str(messages), str(round_)]
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", __name__, *arguments, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    return [(session, name, at) for session, name, at in json.loads(output)]


async def main(folder: str, url: str, user: str, sessions: str, messages: str, round_: str) -> None:
    """Be the other process."""
    async with StorageManager(configuration(Path(folder), url=url)) as storage:
        print(json.dumps(await _write(storage, user, int(sessions), int(messages), int(round_))))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
