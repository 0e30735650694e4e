"""What nodes with one cache have to agree on, and what a slow, demoted or forgotten one must not do to the others."""

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from flatfile_chat_database import StorageConfig, codec
from flatfile_chat_database.backends import sides
from flatfile_chat_database.backends.cached import CachedBackend, entries, marks, news, roll, server, shelf
from flatfile_chat_database.backends.cached.roll import Phase, Roll, Word
from flatfile_chat_database.backends.cached.server import Server
from flatfile_chat_database.backends.cached.wire import Refused, Wire
from flatfile_chat_database.backends.changes import Append, Change, Outcome, Put
from flatfile_chat_database.backends.flatfile import FlatfileBackend
from flatfile_chat_database.backends.memory import MemoryBackend
from flatfile_chat_database.backends.mirrored import MirroredBackend
from flatfile_chat_database.backends.postgres import PostgresBackend
from flatfile_chat_database.backends.writer import Job
from flatfile_chat_database.errors import (
    ClosedError,
    ConfigurationError,
    DurabilityError,
    StorageError,
    UnavailableError,
)
from flatfile_chat_database.testing.case import LOG, lines

from .servers import RedisServer, postgres_replica, postgres_server, redis_server
from .test_cached_nodes import (
    FAST,
    KEY,
    OWN,
    PATIENCE,
    Gate,
    Nodes,
    Store,
    cut_off,
    fall_asleep,
    hits,
    nodes,
    put,
    until,
    until_open,
)

pytestmark = pytest.mark.slow  # nothing in it depends on the version of Python, and a sample uses the cache


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll, "UNUSED_SECONDS", 0.1)


@pytest.fixture(scope="module")
def running() -> Iterator[RedisServer]:
    with redis_server() as own:
        yield own


@pytest.fixture
def cache(running: RedisServer) -> RedisServer:
    running.call("FLUSHALL")
    return running


async def ready(*all_nodes: CachedBackend) -> None:
    """Have the first node open the cache, and all of them know it."""
    await all_nodes[0].write("first", b"1")
    await until_open(all_nodes[0])
    for node in all_nodes:
        await node._roll.read()
        await asyncio.to_thread(node._server.look)


# --- leases --------------------------------------------------------------------------------------------------


async def test_nobody_believes_for_long_that_there_is_no_cache(cache: RedisServer) -> None:
    made = Nodes(cache.url)
    try:
        one, other = await made.add(), await made.add()
        made.config = StorageConfig(**FAST | {"cache_lease_seconds": 8.0})
        slow = await made.add()
        await made.store.write(KEY, b"old")
        assert await slow.read(KEY) == b"old"  # and it knows of no cache
        await ready(one, other)
        assert await other.read(KEY) == b"old"
        await put(other)
        await slow.write(KEY, b"new")
        assert await other.read(KEY) == b"new"
    finally:
        await made.close()


async def test_nobody_uses_the_cache_for_longer_than_its_opener_said(
    cache: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Nodes(cache.url)
    try:
        one = await made.add()
        made.config = StorageConfig(**FAST | {"cache_lease_seconds": 8.0})
        slow = await made.add()
        await ready(one, slow)
        await one.write(KEY, b"old")
        assert await slow.read(KEY) == b"old"
        await put(slow)
        await fall_asleep(slow)
        await slow._roll.read()
        before = hits(slow)
        assert await slow.read(KEY) == b"old"
        assert hits(slow) == before + 1
        cut_off(one, monkeypatch)
        await one.write(KEY, b"new")
        assert await slow.read(KEY) == b"new"
    finally:
        await made.close()


async def test_a_writer_waits_for_those_with_the_longest_lease(
    cache: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Nodes(cache.url, cache_lease_seconds=0.6)
    try:
        slow = await made.add()
        made.config = StorageConfig(**FAST)
        fast = await made.add()
        await ready(slow, fast)
        await fast.write(KEY, b"old")
        assert await slow.read(KEY) == b"old"
        await put(slow)
        await fall_asleep(slow)
        await slow._roll.read()
        cut_off(fast, monkeypatch)
        write = asyncio.ensure_future(fast.write(KEY, b"new"))
        while (known := slow._roll.now()) is not None and known.phase is Phase.OPEN:
            assert not write.done(), "somebody may still take the old from the cache"
            await asyncio.sleep(0.005)
        await write
        assert await slow.read(KEY) == b"new"
    finally:
        await made.close()


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("cache_lease_seconds", 0, "at least 0.01"),
        ("cache_lease_seconds", 10.5, "at most 10"),
        ("cache_timeout_seconds", 0, "at least 0.001"),
    ],
)
def test_times_that_cannot_work_are_refused(name: str, value: float, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} must be {problem}"):
        StorageConfig(**{name: value})  # type: ignore[arg-type]  # mypy takes the name for every field


@pytest.mark.parametrize("lease", [None, 0, -1, 11, "1"])
async def test_a_word_without_a_lease_that_can_be_believed_closes_the_cache(
    cache: RedisServer, lease: object, caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes(cache.url, 1) as (made, one):
        await fall_asleep(one)
        found = json.loads(made.store._data[OWN]) | {"lease": lease}
        await MemoryBackend.write(made.store, OWN, json.dumps(found).encode())
        assert (await one._roll.read()).phase is Phase.CLOSING
    assert "does not say whether the cache may be used" in caplog.text


async def test_a_store_that_is_down_is_asked_once_for_all_who_wait() -> None:
    config = StorageConfig(**FAST)
    asked: list[Gate] = []

    class Down(MemoryBackend):
        async def read(self, key: str) -> bytes | None:
            asked.append(Gate())
            await asked[-1].go.wait()
            raise UnavailableError("It is down.")

    known = Roll(Down(config), OWN, 0.05)
    waiting = [asyncio.ensure_future(known.at(roll.clock())) for _ in range(20)]
    await until(lambda: bool(asked))
    late = asyncio.ensure_future(known.at(roll.clock()))  # who came after it had begun, and is not answered by it
    asked[0].go.set()
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(each) for each in found} == {UnavailableError}
    await until(lambda: len(asked) > 1)
    asked[1].go.set()
    with pytest.raises(UnavailableError):
        await late
    assert len(asked) == 2


# --- openings ------------------------------------------------------------------------------------------------


async def test_no_opening_comes_again_after_an_old_word_was_put_back() -> None:
    store = MemoryBackend(StorageConfig())
    known = Roll(store, OWN, 0.05)
    closed = await known.change(await known.change(Word(Phase.CLOSED), Phase.OPENING, server="s"), Phase.CLOSED)
    kept = store._data[OWN]
    first = await known.change(closed, Phase.OPENING, server="s")
    await store.write(OWN, kept)
    second = await known.change(await known.read(), Phase.OPENING, server="s")
    assert (first.epoch, first.cache) == (second.epoch, second.cache)
    assert entries.Names(first.cache, first.opening).key(KEY) != entries.Names(second.cache, second.opening).key(KEY)


# --- servers that are replicas --------------------------------------------------------------------------------


def replicable() -> AbstractContextManager[RedisServer]:
    """A server with a port, which gives its data to a replica at once."""
    return redis_server(port=True, settings=("--repl-diskless-sync-delay", "0"))


async def follow(replica: RedisServer, master: RedisServer) -> None:
    replica.call("REPLICAOF", "127.0.0.1", str(master.port))
    await until(lambda: b"master_link_status:up" in replica.call("INFO", "replication"))


async def test_a_master_that_is_made_a_replica_brings_nothing_old_back() -> None:
    with replicable() as first, replicable() as second:
        await follow(second, first)  # before: the first replica makes a master's data another one's
        async with nodes(first.url, cache_lease_seconds=0.3) as (made, one, other):
            await one.write(KEY, b"old")
            assert await other.read(KEY) == b"old"
            await put(other)
            word = one._roll.known
            name = entries.Names(word.cache, word.opening).key(KEY)
            await until(lambda: second.call("HGET", name, "d") is not None)
            second.call("REPLICAOF", "NO", "ONE")
            await one.write(KEY, b"new")
            assert await other.read(KEY) == b"new"
            await put(other)
            for node in (one, other):
                await fall_asleep(node)  # and does not look at the server any more
                await node._roll.read()
            await follow(first, second)
            assert first.call("HGET", name, "d") is not None, "the old is there again"
            for node in (one, other):
                assert await node.read(KEY) == b"new"
                assert await asyncio.to_thread(node._server.look) == ""
                assert "replica" in node._server.problem
            assert made.store._data[KEY] == b"new"


async def test_a_server_that_was_a_replica_meanwhile_is_another_one() -> None:
    with replicable() as first, replicable() as second:
        async with nodes(first.url, 1) as (_made, one):
            await follow(first, second)
            first.call("REPLICAOF", "NO", "ONE")  # before anybody has looked: its connections have stayed
            async with asyncio.timeout(PATIENCE):
                while one._roll.known.epoch < 2:
                    await one.read(KEY)
                    await asyncio.sleep(0.005)
            assert one._server.run.startswith(one._roll.known.server[:40])


async def test_a_server_that_was_a_replica_while_nobody_read_brings_nothing_old_back() -> None:
    with replicable() as first, replicable() as second:
        await follow(second, first)
        async with nodes(first.url) as (_made, one, other):
            await one.write(KEY, b"old")
            assert await other.read(KEY) == b"old"
            await put(other)
            word = one._roll.known
            name = entries.Names(word.cache, word.opening).key(KEY)
            await until(lambda: second.call("HGET", name, "d") is not None)
            second.call("REPLICAOF", "NO", "ONE")
            await one.write(KEY, b"new")
            for node in (one, other):
                await fall_asleep(node)
            await follow(first, second)
            first.call("REPLICAOF", "NO", "ONE")
            assert first.call("HGET", name, "d") is not None, "the old is there again"
            other._server._checked -= 60  # as long as nobody has looked
            assert await other.read(KEY) == b"new"


def test_a_server_that_does_not_say_which_run_it_is_is_not_taken_for_a_cluster() -> None:
    with pytest.raises(ValueError, match="has no run_id and master_replid"):
        server._run_of([b"redis_version:1\r\n", b"role:master\r\n"])
    with pytest.raises(ValueError, match="but a cluster"):
        server._run_of([b"redis_mode:cluster\r\nrun_id:a\r\n", b"role:master\r\nmaster_replid:b\r\n"])
    assert server._run_of([b"run_id:a\r\n", b"role:master\r\nmaster_replid:b\r\n"]) == "a:b"


# --- stores that are replicas ---------------------------------------------------------------------------------


class Lagging(Store):
    """A store that shows what was there before, as long as it is told to."""

    def __init__(self, config: StorageConfig, primary: MemoryBackend) -> None:
        super().__init__(config)
        self._data, self._keys = primary._data, primary._keys
        self.old: dict[str, bytes] | None = None

    async def is_behind(self) -> bool:
        return self.old is not None

    async def read(self, key: str) -> bytes | None:
        return await super().read(key) if self.old is None else self.old.get(key)


async def test_a_node_whose_store_may_be_behind_puts_nothing_old_into_the_cache(cache: RedisServer) -> None:
    async with nodes(cache.url, 1) as (made, one):
        behind = Lagging(made.config, made.store)
        reader = CachedBackend(made.config, behind, cache.url)
        await reader.open()
        try:
            await one.write(KEY, b"old")
            behind.old = dict(made.store._data)
            await one.write(KEY, b"new")
            await reader._roll.read()
            await asyncio.to_thread(reader._server.look)
            assert await reader.read(KEY) == b"old"  # it is a replica
            await put(reader)
            assert await one.read(KEY) == b"new"
            await put(one)
            assert await reader.read(KEY) == b"old"
            assert hits(reader) == reader.statistics()["cache_fills"] == 0
            # It is promoted, and writes before it has looked again.
            assert await one.read(KEY) == b"new"
            await fall_asleep_behind(reader)
            behind.old = None
            await reader.write(KEY, b"newest")
            assert await one.read(KEY) == b"newest"
        finally:
            await reader.close()


async def fall_asleep_behind(node: CachedBackend) -> None:
    node._roll.lease = 30.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roll, "UNUSED_SECONDS", 30.0)
        await node._roll.read()


@pytest.mark.slow
async def test_a_replica_of_postgres_is_behind_until_it_is_promoted() -> None:
    with postgres_server(durable=True) as primary, postgres_replica(primary, "second", durable=True) as replica:
        backends = [PostgresBackend(StorageConfig(storage_url=each.url())) for each in (primary, replica)]
        for backend in backends:
            await backend.open()
        try:
            await backends[0].write(KEY, b"1")
            async with asyncio.timeout(PATIENCE):
                while await backends[1].read(KEY) is None:  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.05)
            assert [await backend.is_behind() for backend in backends] == [False, True]
            primary.stop()
            replica.promote()
            assert not await backends[1].is_behind()
        finally:
            for backend in backends:
                await backend.close()


# --- two stores behind one cache ------------------------------------------------------------------------------


class Cut(MemoryBackend):
    """A store that can be out of reach of whoever writes."""

    is_cut = False

    async def commit(self, changes: Sequence[Change]) -> list[Outcome]:
        if self.is_cut:
            raise UnavailableError("It is out of reach.")
        return await super().commit(changes)


async def test_who_reads_the_other_store_after_a_switch_leaves_nothing_old(
    cache: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sides, "LAG_SECONDS", 0.1)
    config = StorageConfig(**FAST)
    stores = [Cut(config), Cut(config)]
    one, other = [CachedBackend(config, MirroredBackend(config, *stores), cache.url) for _ in range(2)]
    try:
        for node in (one, other):
            await node.open()
        await ready(one, other)
        await one.write(KEY, b"0")
        for number in (1, 2):  # and back
            mirror, behind = one.store, other.store
            assert isinstance(mirror, MirroredBackend) and isinstance(behind, MirroredBackend)
            monkeypatch.setattr(behind, "_looked", behind._looked + 60)
            await mirror.switch()
            first, second = stores if number % 2 == 0 else reversed(stores)
            second.is_cut = True  # it gets what it lacks later
            await one.write(KEY, b"%d" % number)
            assert second._data[KEY] == b"%d" % (number - 1)
            await other._roll.read()
            before = hits(other)
            for _ in range(2):  # it has not looked yet which is the first
                assert await other.read(KEY) == b"%d" % (number - 1)
                await put(other)
            assert hits(other) > before
            await behind.look()
            await other._roll.read()
            assert await one.read(KEY) == await other.read(KEY) == first._data[KEY] == b"%d" % number
            second.is_cut = False
            await until_open(one, number + 1)
            await other._roll.read()
            for node in (one, other):
                assert await node.read(KEY) == b"%d" % number
                await put(node)
    finally:
        for node in (one, other):
            await node.close()


@pytest.mark.parametrize("said", [b"{}", b'{"phase":"open","lease":"long"}', b"damaged"])
async def test_a_word_that_nobody_understands_is_no_obstacle_to_a_switch(said: bytes) -> None:
    config = StorageConfig()
    stores = [MemoryBackend(config), MemoryBackend(config)]
    mirror = MirroredBackend(config, *stores)
    await mirror.open()
    await mirror.write(OWN, said)
    assert await mirror.switch() == 1
    assert stores[1]._data[OWN] == said
    await mirror.close()


async def test_a_store_that_becomes_the_first_says_that_its_cache_is_given_up() -> None:
    config = StorageConfig()
    stores = [MemoryBackend(config), MemoryBackend(config)]
    first = Roll(stores[0], OWN, 0.05)  # before they were mirrored
    said = await first.change(await first.change(Word(Phase.CLOSED), Phase.OPENING, server="s"), Phase.OPEN)
    mirror = MirroredBackend(config, *stores)
    await mirror.open()
    known = Roll(mirror, OWN, 0.05)
    await mirror.write(KEY, b"1")
    assert (await known.read()).phase is Phase.OPEN
    await mirror.switch()
    assert known.now() is None, "it is what the other store has said"
    word = await known.read()
    assert word.phase is Phase.CLOSING and word.opening == said.opening
    assert word.lease == 0.05 + sides.LAG_SECONDS
    await mirror.stop()
    assert OWN not in stores[0]._data, "a store by itself, whose writers do not know the cache"
    await mirror.close()


# --- writes that end otherwise ---------------------------------------------------------------------------------


async def test_no_write_begins_while_a_node_is_closed(cache: RedisServer) -> None:
    async with nodes(cache.url) as (made, one, other):
        await one.write(KEY, b"old")
        gate = made.store.hold("before commit")
        slow = asyncio.ensure_future(one.write("slow", b"1"))
        await gate.came.wait()
        closing = asyncio.ensure_future(one.close())
        await until(lambda: one._closed)
        with pytest.raises(ClosedError):
            await one.write(KEY, b"new")
        assert await other.read(KEY) == made.store._data[KEY] == b"old"
        gate.go.set()
        await slow
        await closing


async def test_a_write_that_is_cancelled_before_it_begins_is_not_waited_for() -> None:
    made = Nodes("unix:///nowhere/socket")
    one = await made.add()
    write = asyncio.ensure_future(one.write(KEY, b"1"))
    await asyncio.sleep(0)  # it is a task of its own now, which has not begun
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()  # as a loop does that ends
    await asyncio.wait([write])
    assert not one._under_way  # which `close` waits for
    await made.close()


class Unknown(Store):
    """A store that does not know what came of a write, which is done later."""

    def __init__(self, config: StorageConfig) -> None:
        super().__init__(config)
        self.late: list[Sequence[Change]] = []
        self.is_late = False

    async def commit(self, changes: Sequence[Change]) -> list[Outcome]:
        if self.is_late:
            self.late.append(changes)
            raise DurabilityError
        return await super().commit(changes)


async def test_what_was_written_without_anybody_knowing_is_seen(cache: RedisServer) -> None:
    made = Nodes(cache.url)
    made.store = store = Unknown(made.config)
    try:
        one, other = await made.add(), await made.add()
        await ready(one, other)
        await one.write(KEY, b"old")
        store.is_late = True
        with pytest.raises(DurabilityError):
            await one.write(KEY, b"new")
        store.is_late = False
        for _ in range(2):
            assert await other.read(KEY) == b"old"
            await put(other)
        await store.commit(store.late[0])
        assert await other.read(KEY) == b"new"
        await one.write(KEY, b"newest")  # and who knows what came of it removes no mark of who does not
        assert await other.read(KEY) == b"newest"
    finally:
        await made.close()


# --- a cache that is slow --------------------------------------------------------------------------------------


async def test_whoever_waits_for_a_slow_cache_goes_on_whether_it_was_asked_or_not(
    cache: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes(cache.url, 1) as (_made, one):
        keys = [f"users/u{number}/profile.json" for number in range(20)]
        await one.load([(key, b"1") for key in keys])
        go, asked, answers = threading.Event(), [], one._shelf._answers

        def slow(question: Any, start: int) -> Any:
            asked.append(question)
            assert go.wait(PATIENCE)
            return answers(question, start)

        monkeypatch.setattr(one._shelf, "_answers", slow)
        monkeypatch.setattr(one._shelf, "_seconds", 0.05)
        try:
            async with asyncio.timeout(PATIENCE):
                assert await asyncio.gather(*map(one.read, keys)) == [b"1"] * 20
            assert one.statistics()["cache_late"] == 20
        finally:
            go.set()
        before = one.statistics()["cache_late"]
        monkeypatch.setattr(one._shelf, "_seconds", 5.0)
        assert await one.read(keys[0]) == b"1"
        assert one.statistics()["cache_late"] == before
        assert len(asked) <= 5, "nobody waited for the others any more"


async def test_what_waits_to_be_put_has_a_bound(cache: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "_MOST_WAITING", 5 * (shelf._EACH + 1))
    async with nodes(cache.url, 1) as (_made, one):
        keys = [f"users/u{number}/profile.json" for number in range(9)]
        await one.load([(key, b"1") for key in keys])
        go, calls, call_many = threading.Event(), [], one._server.call_many

        def slow(run: str, script: str, some: Any, seconds: float) -> Any:
            assert go.wait(PATIENCE)
            calls.append(len(some))
            return call_many(run, script, some, seconds)

        monkeypatch.setattr(one._server, "call_many", slow)
        try:
            assert await one.read_many(keys[:3]) == [b"1"] * 3
            for key in keys[3:]:
                assert await one.read(key) == b"1"
        finally:
            go.set()
        await put(one)
        assert calls == [3, 1, 1], "those of one call in one message, and no more than may wait"
        assert one.statistics()["cache_fills"] == 5
        before = hits(one)
        assert await one.read_many(keys) == [b"1"] * 9
        assert hits(one) == before + 5


def test_threads_that_fail_at_once_make_one_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    dead = Server("unix:///nowhere/socket", 0.01)
    for _ in range(4):  # begun before the first had failed
        dead._failed(None, OSError("it is gone"), begun=100.0)
    assert dead._pause == server._PAUSE_SECONDS[0]
    now[0] += 1
    dead._failed(None, OSError("it is gone"), begun=now[0])
    assert dead._pause == 2 * server._PAUSE_SECONDS[0]


async def test_an_answer_that_is_too_short_is_none(cache: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(cache.url, 1) as (_made, one):
        await one.write(KEY, b"1")
        shown: list[Any] = [b"g"]

        async def short(_run: str, commands: Sequence[Any]) -> list[Any]:
            return [shown, *[b"x"] * (len(commands) - 1)]

        monkeypatch.setattr(one._server, "ask_at_once", short)
        assert await one.read(KEY) == b"1"
        shown *= 3  # bound to something else
        monkeypatch.setattr(one._server, "call", lambda *_: [[b"g"]])
        assert await one.read(KEY) == b"1"


class Counting:
    """In the place of a server: what it is asked, and when it begins to fail."""

    problem = ""
    is_up = True

    def __init__(self, fails_after: int) -> None:
        self.asked: list[int] = []
        self._fails_after = fails_after

    def call(self, _run: str, _script: str, keys: list[str], _arguments: list[Any], _seconds: float) -> None:
        if len(self.asked) == self._fails_after:
            raise server.Unusable
        self.asked.append(len(keys))

    def look(self) -> str:
        return ""


@pytest.mark.parametrize(("fails_after", "done"), [(9, 5), (1, 2), (0, 0)])
def test_many_writes_are_marked_in_messages_that_hold_no_server_up(fails_after: int, done: int) -> None:
    counting: Any = Counting(fails_after)
    some = marks.Marks(counting, 1.0)
    word = Word(Phase.OPEN, server="run")
    sizes = [100, 156, 1, 200, 100]
    jobs = [Job([some.mark(word, [f"users/u{number}/k" for number in range(size)])]) for size in sizes]
    some._run(jobs)
    assert counting.asked == [256, 201, 100][:fails_after]
    assert [job.outcomes for job in jobs] == [[at < done] for at in range(5)]


async def test_a_node_without_threads_of_its_own_reads_and_writes_the_store(
    cache: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes(cache.url) as (made, one, _other):
        node = await made.add()
        start = threading.Thread.start

        def none_left(thread: threading.Thread) -> None:
            if thread.name in ("chatdb-cache", "chatdb-news"):
                raise RuntimeError("can't start new thread")
            start(thread)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", none_left)
            await node.write(KEY, b"1")
            assert await node.read(KEY) == await one.read(KEY) == b"1"
            await node.wait_for_change([KEY], 0.001)
            assert node._keeper is node._news._thread is None
        await node.write(KEY, b"2")
        assert await one.read(KEY) == b"2"
        assert node._keeper is not None


# --- memory ----------------------------------------------------------------------------------------------------


async def test_owners_end_soon_after_what_they_own(cache: RedisServer) -> None:
    async with nodes(cache.url, 1, cache_entry_seconds=77) as (_made, one):
        await one.commit([Append(LOG, lines(3))])
        await one.read_log(LOG)
        await put(one)
        word = one._roll.known
        names = entries.Names(word.cache, word.opening)
        for name in (names.store, names.owner(LOG)):
            assert 77_000 < cache.call("PTTL", name) <= 154_000
            cache.call("PEXPIRE", name, "80000")
        await one.read(LOG.replace("messages.jsonl", "session.json"))  # what it does not have, of the same owner
        for name in (names.store, names.owner(LOG)):
            assert cache.call("PTTL", name) > 80_000


# --- forks, and nodes that are forgotten -----------------------------------------------------------------------


async def test_a_child_that_was_forked_during_a_write_can_close(cache: RedisServer) -> None:
    async with nodes(cache.url) as (made, one, other):
        gate = made.store.hold("before commit")
        write = asyncio.ensure_future(one.write(KEY, b"1"))
        await gate.came.wait()
        assert await asyncio.to_thread(os.waitstatus_to_exitcode, forked(one)) == 0
        gate.go.set()
        await write
        await until_open(one)
        assert await one.read(KEY) == await other.read(KEY) == b"1"


def forked(node: CachedBackend) -> int:
    """Close a node in a forked child; return the status that it ends with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that forking beside threads is risky is the subject
        child = os.fork()
    if child == 0:
        signal.alarm(20)  # which ends it, if it hangs
        status = 1
        try:
            asyncio._set_running_loop(None)
            gc.collect()  # what is the parent's must not be ended with what is forgotten here
            with contextlib.suppress(ClosedError):
                asyncio.run(node.commit([Put("forked", b"")]))
            asyncio.run(node.close())
            status = 1 if node._under_way else 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


async def test_a_child_that_was_forked_leaves_the_connections_of_its_parent_alone(
    cache: RedisServer, tmp_path: Path
) -> None:
    config = StorageConfig(**FAST)
    node = CachedBackend(config, FlatfileBackend(config, tmp_path / "store"), cache.url)
    await node.open()
    try:
        await ready(node)
        await node.read(KEY)
        await put(node)
        await listen(node)
        lines, listening = set(node._server._free), node._news._connection
        assert await asyncio.to_thread(os.waitstatus_to_exitcode, forked(node)) == 0
        before = hits(node)
        assert await node.read(KEY) is None
        assert hits(node) == before + 1
        assert lines & set(node._server._free), "they have stayed"
        assert node._news._connection is listening is not None
    finally:
        await node.close()


async def test_a_read_that_ends_after_the_node_was_closed_leaves_no_connection(cache: RedisServer) -> None:
    async with nodes(cache.url, 1) as (_made, one):
        line = one._server._take(one._roll.known.server)
        await one.close()
        one._server._works(line)
        assert not one._server._free
        assert line._connection._sock is None


async def test_a_node_that_is_forgotten_ends_its_threads(cache: RedisServer) -> None:
    before = threading.enumerate()  # those of another test may end meanwhile

    def names() -> set[str]:
        return {thread.name for thread in threading.enumerate() if thread not in before}

    store = MemoryBackend(StorageConfig(**FAST))
    node = CachedBackend(store.config, store, cache.url)
    await node.open()
    await ready(node)
    async with asyncio.timeout(PATIENCE):
        while not node._news.is_heard:
            await node.wait_for_change(["nothing"], 0.01)
    assert {"chatdb-cache", "chatdb-news"} <= names()
    del node
    gc.collect()
    await until(lambda: not any(name.startswith("chatdb-") for name in names()))


# --- news --------------------------------------------------------------------------------------------------------


async def test_who_waits_hears_of_the_cache_that_is_used_by_now(
    cache: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(news, "_IDLE_TICKS", 10_000)  # in this test nobody waits all the time
    async with nodes(cache.url) as (made, one, other):
        await listen(other)
        before = other._roll.known.cache
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(roll, "MOST_LEASE_SECONDS", 0.1)
            await MemoryBackend.write(made.store, OWN, b"{}")
            assert not await closed_to_news(other)
            await one.write(KEY, b"1")
            async with asyncio.timeout(PATIENCE):
                while one._roll.known.cache == before or one._roll.known.phase is not Phase.OPEN:
                    await one.read(KEY)
                    await asyncio.sleep(0.005)
        await listen(other)
        assert other._news._heard is not None
        assert other._news._heard.cache == one._roll.known.cache
        waiting = asyncio.ensure_future(other.wait_for_change([KEY], 600))
        await asyncio.sleep(0)
        await one.write(KEY, b"2")
        async with asyncio.timeout(PATIENCE):
            await waiting


async def listen(node: CachedBackend) -> None:
    """Wait until a node hears what others write to the cache that is used."""
    async with asyncio.timeout(PATIENCE):
        while not node._news.is_heard:
            await node.wait_for_change(["nothing"], 0.01)


async def closed_to_news(node: CachedBackend) -> bool:
    await node._roll.read()
    return node._news.is_heard


@pytest.mark.parametrize("phase", [Phase.OPENING, Phase.CLOSING, Phase.CLOSED])
async def test_nobody_hears_everything_unless_the_cache_is_open(cache: RedisServer, phase: Phase) -> None:
    async with nodes(cache.url, 1) as (made, one):
        await listen(one)
        await fall_asleep(one)
        found = json.loads(made.store._data[OWN]) | {"phase": phase.value, "lease": 9}
        await MemoryBackend.write(made.store, OWN, json.dumps(found).encode())
        await one._roll.read()
        assert not one._news.is_heard


async def test_nobody_waits_for_what_another_server_tells(cache: RedisServer) -> None:
    with redis_server() as another:
        made = Nodes(cache.url)
        try:
            one, other = await made.add(), await made.add(another.url)
            await ready(one)
            await other._roll.read()
            waiting = asyncio.ensure_future(other.wait_for_change([KEY], 600))
            await until(lambda: other._news._thread is None or other._news._heard is not None)
            assert not other._news.is_heard
            await one.write(KEY, b"1")
            async with asyncio.timeout(PATIENCE):
                await waiting
        finally:
            await made.close()


async def test_who_begins_to_wait_when_nobody_tells_any_more_does_not(
    cache: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes(cache.url, 1) as (_made, one):
        heard = [True, False]  # it ends between the look and the waiting
        monkeypatch.setattr(news.News, "is_heard", property(lambda _: heard.pop(0)))
        async with asyncio.timeout(PATIENCE):
            await one.wait_for_change([KEY], 600)


# --- how answers are read ----------------------------------------------------------------------------------------


def message(number: int, timestamp: str = "2026-11-26T10:00:00Z") -> bytes:
    return b'{"id":"m%d","role":"user","content":"x","timestamp":"%b"}' % (number, timestamp.encode())


@pytest.mark.parametrize(
    "some",
    [
        [],
        [message(0)],
        [message(number) for number in range(5)],
        [message(0), message(1, "yesterday")],
        [message(0), b"no json", message(1)],
        [message(0), b",".join([message(1), message(2)])],
        [message(0), b"", message(1)],
    ],
)
def test_records_are_decoded_at_once_as_one_by_one(some: list[bytes]) -> None:
    def decoder() -> codec.MessageDecoder:
        return codec.MessageDecoder(lambda _: None)

    value = entries.pack_records("name", "w", some)
    assert entries.unpack_records("name", "w", value) == some
    one_by_one = outcome(lambda: entries.decoded(some, decoder().__call__))
    assert outcome(lambda: entries.unpack_decoded("name", "w", value, decoder())) == one_by_one


def outcome(read: Callable[[], list[Any]]) -> Any:
    try:
        return read()
    except StorageError as error:
        return type(error)


def test_answers_come_in_pieces_of_any_size() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        large = b"x" * 200_000
        said = b"*3\r\n$200000\r\n%b\r\n$-1\r\n:7\r\n+OK\r\n-ERR no\r\n" % large

        def say() -> None:
            for start in range(0, len(said), 777):
                theirs.sendall(said[start : start + 777])

        speaking = threading.Thread(target=say)
        speaking.start()
        answers = Wire(ours).ask([("one",), ("two",), ("three",)], PATIENCE)
        speaking.join()
    assert answers[:2] == [[large, None, 7], b"OK"]
    assert isinstance(answers[2], Refused)


@pytest.mark.parametrize("said", [b"hello\r\n", b"\r\n", b"$x\r\n", b":1\r\n:2\r\n"])
def test_what_is_no_answer_is_refused(said: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(said)
        with pytest.raises(ValueError):
            Wire(ours).ask([("one",)], PATIENCE)


async def test_a_question_needs_no_thread() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        wire = Wire(ours)
        assert wire.say([("one",), ("two",)])
        assert theirs.recv(1000) == b"*1\r\n$3\r\none\r\n*1\r\n$3\r\ntwo\r\n"
        answering = asyncio.ensure_future(wire.answers(2))
        for piece in (b":1", b"\r\n$100000\r\n", b"x" * 99_999, b"x\r\n"):
            assert not answering.done()
            theirs.sendall(piece)
            for _ in range(5):
                await asyncio.sleep(0)
        assert await answering == [1, b"x" * 100_000]
        assert wire.say([("three",)])
        assert wire.answers_by_now(1) is None
        theirs.sendall(b"+OK\r\n")
        assert wire.answers_by_now(1) == [b"OK"]
        assert not wire.say([(bytes(10_000_000),)])  # more than goes without waiting


def test_a_question_of_any_size_is_sent_while_the_server_reads() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        heard = bytearray()

        def listen() -> None:
            while not heard.endswith(b"end\r\n"):
                heard.extend(theirs.recv(100_000))
            theirs.sendall(b"+OK\r\n")

        listening = threading.Thread(target=listen)
        listening.start()
        assert Wire(ours).ask([("one", bytes(3_000_000), "end")], PATIENCE) == [b"OK"]
        listening.join()
        assert len(heard) > 3_000_000


async def test_a_question_that_nobody_waits_for_any_more_leaves_no_answer_behind(cache: RedisServer) -> None:
    async with nodes(cache.url, 1) as (_made, one):
        await one.write(KEY, b"1")
        await put(one)
        asking = asyncio.ensure_future(one.read(KEY))
        await asyncio.sleep(0)  # it is sent, and its answer on the way
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        for _ in range(10):
            assert await one.read(KEY) == b"1"
        assert not one._server.problem
