"""A store with Redis in front of it beside the same store alone: pages, documents, and what a write costs.

All servers are on this machine, and Ceph keeps its objects in memory: over a network a store is farther away. Run by
its name alone, in the environment of the tests: `python -m benchmarks caching`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from flatfile_chat_database import Message, StorageManager

from .corpus import ROLES, Texts
from .machine import work_folder
from .ours import USER, configuration
from .result import Bar, Result, Table, median
from .rounds import interleave

if TYPE_CHECKING:
    from tests.servers import RedisServer

LONG, PAGE, TIMES = 10_000, 100, 100
"""Messages of the log, of a page, and calls of a round."""
FILES, POSTGRES, S3 = "files", "PostgreSQL", "S3"
_BUCKET = "caching"
_PATIENCE_SECONDS = 60
_CHAT = 20
_COUNTED = {
    "total_commands_processed": ("commands to the cache", "commands", 1.0),
    "total_net_input_bytes": ("to it", "kB", 0.001),
    "total_net_output_bytes": ("from it", "kB", 0.001),
}
"""What the server counts, and as what."""


def run(*, quick: bool) -> Result:
    """Measure milliseconds from call to return."""
    if shutil.which("redis-server") is None or shutil.which("radosgw") is None:
        raise SystemExit("Redis or Ceph is not installed: `make servers` installs both.")
    from tests import s3  # which needs the extra
    from tests.servers import ceph_server, postgres_server, redis_server

    with ExitStack() as servers:
        folder = servers.enter_context(work_folder())
        cache = servers.enter_context(redis_server())
        ceph = servers.enter_context(ceph_server())
        os.environ |= ceph.environment
        s3.make_bucket(ceph, _BUCKET)
        stores = {
            FILES: f"file:{folder}/store",
            POSTGRES: servers.enter_context(postgres_server(durable=True)).url(),
            S3: f"s3://{_BUCKET}/store",
        }
        return asyncio.run(_measure(folder, stores, cache, quick=quick))


async def _measure(folder: Path, stores: dict[str, str], cache: RedisServer, *, quick: bool) -> Result:
    table, hits = Table(), []
    for name, url in stores.items():
        hits.append(await _compare(folder / name, table, name, url, cache.url, quick=quick))
    await _use(folder / "use", table, cache, quick=quick)
    return Result(
        "caching",
        f"Redis in front of a store: pages of {PAGE} messages, a session, one message",
        table.rows,
        table.beyond,
        [
            *(f"answers of the cache, of {asked:,} questions: {share:.1%}" for asked, share in hits),
            "a chat: what the cache's server counts, with the keeper's questions",
        ],
        missing=table.missing,
    )


async def _compare(folder: Path, table: Table, name: str, url: str, cache: str, *, quick: bool) -> tuple[int, float]:
    """Do the same on a store alone and with the cache in front of it."""
    times, size = (5, 500) if quick else (TIMES, LONG)
    alone = await _open(folder / "alone", url)
    await alone.create_user(USER)
    session = await alone.create_session(USER, session_id="chat")
    texts = Texts()
    for start in range(0, size, 5_000):
        some = texts.take(min(5_000, size - start))
        await alone.add_messages(USER, session, [Message(ROLES[n % 2], text) for n, text in enumerate(some)])
    cached = await _open(folder / "cached", f"cached:?store={quote(url, safe='')}&cache={quote(cache, safe='')}")
    await _until_used(cached, session)

    async def write(storage: StorageManager) -> None:
        await storage.add_message(USER, session, Message("user", next(texts)))

    calls: dict[str, Callable[[StorageManager], Awaitable[object]]] = {
        "the newest page": lambda storage: storage.get_messages(USER, session, PAGE, -PAGE),
        "a session": lambda storage: storage.get_session(USER, session),
        "one message added": write,
    }
    bars = {(FILES, "the newest page"): Bar(most=1.5)}
    for what, call in calls.items():
        figures = await interleave(
            {"alone": _timed(alone, call, times), "cached": _timed(cached, call, times)}, quick=quick
        )
        if (name, what) == (S3, "the newest page"):
            pages = figures["cached"], f"{name} alone", figures["alone"], Bar(least=5)
            table.compare(f"{what}, Redis in front of {name}", "ms", *pages, lower_is_better=True)
        else:
            others = figures["cached"], f"{name} alone", figures["alone"], bars.get((name, what))
            table.relate(f"{what}, Redis in front of {name}", "ms", *others)
    found = cached.backend.statistics()
    asked = found["cache_hits"] + found["cache_misses"]
    await cached.close()
    await alone.close()
    return asked, found["cache_hits"] / asked


async def _use(folder: Path, table: Table, cache: RedisServer, *, quick: bool) -> None:
    """Have chats as an application does, and count what the cache is asked and told for each."""
    storage = await _open(
        folder, f"cached:?store={quote(f'file:{folder}/store', safe='')}&cache={quote(cache.url, safe='')}"
    )
    await storage.create_user(USER)
    await _until_used(storage, await storage.create_session(USER))
    texts, chats = Texts(), 2 if quick else 50

    def counted() -> dict[str, int]:
        found = (line.partition(":") for line in cache.call("INFO", "stats").decode().splitlines())
        return {name: int(value) for name, _, value in found if name in _COUNTED}

    before = await asyncio.to_thread(counted)
    for number in range(chats):
        session = await storage.create_session(USER, f"chat {number}")
        for at, text in enumerate(texts.take(_CHAT)):
            await storage.add_message(USER, session, Message(ROLES[at % 2], text))
            if at % 4 == 3:
                await storage.get_messages(USER, session, PAGE, -PAGE)
                await storage.get_session(USER, session)
    after = await asyncio.to_thread(counted)
    for name, (what, unit, factor) in _COUNTED.items():
        table.measure(
            f"a chat of {_CHAT} messages, read {_CHAT // 4} times: {what}",
            unit,
            [(after[name] - before[name]) / chats * factor],
        )
    await storage.close()


async def _open(folder: Path, url: str) -> StorageManager:
    config = configuration(folder, url=url)
    config.search_index_path = str(folder / "index")
    return StorageManager(config)


async def _until_used(cached: StorageManager, session: str) -> None:
    """Wait until the cache is open, which takes two leases after the first write."""
    await cached.update_user_profile(USER, {"seen": True})
    end = time.monotonic() + _PATIENCE_SECONDS
    while not cached.backend.statistics()["cache_hits"]:
        assert time.monotonic() < end, "the cache is not opened"
        await cached.get_messages(USER, session, 1, -1)
        await asyncio.sleep(0.01)


def _timed(
    storage: StorageManager, call: Callable[[StorageManager], Awaitable[object]], times: int
) -> Callable[[], Awaitable[float]]:
    """Return what measures the median of several calls, in milliseconds."""

    async def measure() -> float:
        found = []
        for _ in range(times):
            began = time.perf_counter()
            await call(storage)
            found.append((time.perf_counter() - began) * 1000)
        return median(found)

    return measure
