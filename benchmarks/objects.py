"""A store in an object store: callers that share puts, pages of a long log, what a chat costs in requests and bytes.

The server is Ceph with its objects in memory, on this machine, so a request takes a few milliseconds less than over a
network. Run by its name alone, in the environment of the tests: `python -m benchmarks objects`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from flatfile_chat_database import Message, StorageManager
from flatfile_chat_database.backends.base import StorageBackend
from flatfile_chat_database.codec import encode_message

from .corpus import ROLES, Texts
from .machine import work_folder
from .ours import USER, configuration
from .result import Bar, Result, Table, median
from .rounds import interleave, timed

CALLERS, EACH = 100, 20
"""Callers that append to one log, and messages of each in a round."""
ALONE = 200
"""Messages of a round that have a put each."""
LONG, SHORT, PAGE = 100_000, 1_000, 100
TIMES = 50
"""Pages of a round."""
_BUCKET = "benchmark"
_KINDS = {"written": ("puts", "lists"), "read": ("gets", "heads"), "removed": ("deletes",)}
"""Requests by what they cost: to write and list costs about ten times as much as to read, to remove nothing."""


def run(*, quick: bool) -> Result:
    """Measure messages a second, milliseconds from call to return, and requests."""
    if shutil.which("radosgw") is None:
        raise SystemExit("Ceph is not installed: `make servers` installs it.")
    from tests import s3  # which needs the extra
    from tests.servers import ceph_server

    with work_folder() as folder, ceph_server() as server:
        os.environ |= server.environment
        s3.make_bucket(server, _BUCKET)
        return asyncio.run(_measure(folder, quick=quick))


async def _measure(folder: Path, *, quick: bool) -> Result:
    table = Table()
    await _append(folder, table, quick=quick)
    await _read(folder, table, quick=quick)
    await _use(folder, table)
    return Result(
        "objects",
        f"a store in Ceph: {CALLERS} callers of one log, pages of {PAGE} messages, and requests",
        table.rows,
        table.beyond,
        [
            "one put per message: objects with increasing numbers, each created on the condition that it is not there",
            "requests that write or list / read / remove, and bytes to and from the server, of one call each",
        ],
        missing=table.missing,
    )


async def _open(folder: Path, prefix: str) -> StorageManager:
    config = configuration(folder / "unused", url=f"s3://{_BUCKET}/{prefix}")
    config.search_index_path = str(folder / "index")
    storage = StorageManager(config)
    await storage.create_user(USER)
    return storage


# --- appending -------------------------------------------------------------------------------------------


async def _append(folder: Path, table: Table, *, quick: bool) -> None:
    """Append from many callers, each awaiting its own, beside a put for each message."""
    import obstore
    from obstore.store import S3Store

    storage = await _open(folder, "appending")
    session = await storage.create_session(USER, session_id="busy")
    alone = S3Store(_BUCKET, client_options={"allow_http": True})
    texts, numbers = Texts(), itertools.count()
    each, count = (2, 20) if quick else (EACH, ALONE)

    async def say(said: list[str]) -> None:
        for text in said:
            await storage.add_message(USER, session, Message("user", text))

    async def ours() -> float:
        said = [texts.take(each) for _ in range(CALLERS)]
        with timed() as watch:
            await asyncio.gather(*(say(some) for some in said))
        return CALLERS * each / watch.seconds

    async def theirs() -> float:
        said = [encode_message(Message("user", text)) for text in texts.take(count)]

        def put() -> None:
            for line in said:
                obstore.put(alone, f"alone/{next(numbers):012d}", line, mode="create", use_multipart=False)

        with timed() as watch:
            await asyncio.to_thread(put)
        return count / watch.seconds

    rates = await interleave({"ours": ours, "theirs": theirs}, quick=quick)
    what = f"{CALLERS} callers append to one log"
    table.compare(what, "messages/s", rates["ours"], "one put per message", rates["theirs"], Bar(least=20))
    await storage.close()


# --- reading ---------------------------------------------------------------------------------------------


async def _read(folder: Path, table: Table, *, quick: bool) -> None:
    """Read pages of a long and of a short log, which are folded."""
    long, times = (2_000, 5) if quick else (LONG, TIMES)
    storage, texts = await _open(folder, "reading"), Texts(1)
    for name, size in (("long", long), ("short", SHORT)):
        await storage.create_session(USER, session_id=name)
        for start in range(0, size, 5_000):
            some = texts.take(min(5_000, size - start))
            await storage.add_messages(USER, name, [Message(ROLES[n % 2], text) for n, text in enumerate(some)])
    await storage.close()

    storage = await _open(folder, "reading")
    backend = storage.backend
    for number in range(5):
        await storage.add_message(USER, "long", Message("user", f"one more, {number}"))
        spent = await _requests(backend, lambda: storage.page_messages(USER, "long", limit=PAGE))
        table.measure(f"newest page of {long:,}, {number + 1} appended", "requests", [spent], Bar(most=3))
    numbers = random.Random(1)

    def pages(name: str, size: int) -> Callable[[], Awaitable[float]]:
        async def read() -> float:
            found = []
            for _ in range(times):
                began = time.perf_counter()
                page = await storage.get_messages(USER, name, PAGE, numbers.randrange(size - PAGE))
                found.append((time.perf_counter() - began) * 1000)
                assert len(page) == PAGE
            return median(found)

        return read

    figures = await interleave({"long": pages("long", long), "short": pages("short", SHORT)}, quick=quick)
    what = f"page at a random place of {long:,}"
    table.relate(what, "ms", figures["long"], f"the same of {SHORT:,}", figures["short"], Bar(most=1.5))
    await storage.close()


async def _requests(backend: StorageBackend, call: Callable[[], Awaitable[object]]) -> float:
    before = backend.statistics()
    await call()
    after = backend.statistics()
    return sum(after[kind] - before[kind] for kinds in _KINDS.values() for kind in kinds)


# --- what a chat costs -----------------------------------------------------------------------------------


async def _use(folder: Path, table: Table) -> None:
    """Do what an application does, and count."""
    storage, texts = await _open(folder, "using"), Texts(2)
    sessions = [await storage.create_session(USER, f"chat {number}") for number in range(20)]
    for session in sessions:
        await storage.add_messages(
            USER, session, [Message(ROLES[n % 2], text) for n, text in enumerate(texts.take(30))]
        )
    session = sessions[0]
    await storage.add_message(USER, session, Message("user", "warm"))
    await storage.search_messages(USER, "warm")

    async def talk() -> None:
        for number, text in enumerate(texts.take(100)):
            await storage.add_message(USER, session, Message(ROLES[number % 2], text))

    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "create a session": lambda: storage.create_session(USER, "new"),
        "add a message": lambda: storage.add_message(USER, session, Message("user", next(texts))),
        "add 100 messages, one by one": talk,
        "the newest page": lambda: storage.page_messages(USER, session, limit=PAGE),
        "list 20 sessions": lambda: storage.list_sessions(USER, 20),
        "search 20 sessions": lambda: storage.search_messages(USER, "warm"),
        "save a document of 1 MB": lambda: storage.save_document(USER, session, "a.txt", b"x" * 1_000_000),
        "read it": lambda: storage.get_document(USER, session, "a.txt"),
        "change a message": lambda: _change(storage, session),
        "delete a session": lambda: storage.delete_session(USER, session),
    }
    for what, call in calls.items():
        before = storage.backend.statistics()
        await call()
        after = storage.backend.statistics()
        spent = {name: after[name] - before[name] for name in before}
        requests = " / ".join(str(sum(spent[kind] for kind in kinds)) for kinds in _KINDS.values())
        sizes = f"{spent['bytes_out'] / 1000:,.1f} kB out, {spent['bytes_in'] / 1000:,.1f} kB in"
        table.measure(f"{what}: {requests}; {sizes}", "requests", [_total(spent)])
    await storage.close()


def _total(spent: dict[str, int]) -> float:
    return float(sum(spent[kind] for kinds in _KINDS.values() for kind in kinds))


async def _change(storage: StorageManager, session: str) -> None:
    [message] = await storage.get_messages(USER, session, 1, -1)
    await storage.update_message(USER, session, message.id, {"content": "changed"})
