"""Several nodes with one cache: what was acknowledged is seen by all of them, whatever happens to the cache."""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from flatfile_chat_database import StorageConfig
from flatfile_chat_database.backends.cached import CachedBackend, entries, marks, roll
from flatfile_chat_database.backends.cached.roll import Phase
from flatfile_chat_database.backends.changes import Append, Change, Edit, Move, Outcome, Put, RemoveTree, Truncate
from flatfile_chat_database.backends.memory import MemoryBackend
from flatfile_chat_database.errors import ConflictError, DurabilityError, UnavailableError
from flatfile_chat_database.layout import Layout
from flatfile_chat_database.testing.case import LOG, bare, line, lines

from .servers import RedisServer, redis_server

pytestmark = pytest.mark.slow

OWN = Layout(StorageConfig()).cache_state
KEY = "users/ann/profile.json"
PATIENCE = 20.0
FAST: dict[str, Any] = {"cache_lease_seconds": 0.05, "cache_timeout_seconds": 1.0}
"""A lease that tests need not wait long for, and a server that is never late for being on a busy machine."""


async def until(is_so: Callable[[], bool]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(PATIENCE):
        while not is_so():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.002)


async def until_open(node: CachedBackend, epoch: int = 1) -> None:
    """Use a node until it has opened the cache."""
    async with asyncio.timeout(PATIENCE):
        while node._roll.known.phase is not Phase.OPEN or node._roll.known.epoch < epoch:
            await node.read("anything")
            await asyncio.sleep(0.002)


@pytest.fixture(autouse=True)
def nobody_waits_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all times that are no settings be as short as the lease of these tests."""
    monkeypatch.setattr(roll, "UNUSED_SECONDS", FAST["cache_lease_seconds"])
    monkeypatch.setattr(roll, "MOST_LEASE_SECONDS", 0.5)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """A Redis for the tests that do not harm it."""
    with redis_server() as running:
        yield running


@pytest.fixture
def cache(server: RedisServer) -> RedisServer:
    server.call("FLUSHALL")
    return server


class Store(MemoryBackend):
    """A store that all nodes share, whose reads and writes can be held."""

    def __init__(self, config: StorageConfig) -> None:
        super().__init__(config)
        self.holding: dict[str, Gate] = {}
        self.reads = 0

    async def _held(self, name: str) -> None:
        gate = self.holding.pop(name, None)
        if gate is not None:
            gate.came.set()
            await gate.go.wait()

    async def read(self, key: str) -> bytes | None:
        data = await super().read(key)
        if key != OWN:
            self.reads += 1
            await self._held("read")  # with what was there before
        return data

    async def commit(self, changes: Sequence[Change]) -> list[Outcome]:
        if all(getattr(change, "key", "") == OWN for change in changes):
            await self._held("word")
            return await super().commit(changes)
        await self._held("before commit")
        outcomes = await super().commit(changes)
        await self._held("after commit")
        return outcomes

    def hold(self, name: str) -> "Gate":
        gate = self.holding[name] = Gate()
        return gate


class Gate:
    """Where a call is held."""

    def __init__(self) -> None:
        self.came = asyncio.Event()
        self.go = asyncio.Event()


class Nodes:
    """Nodes on one store with one cache."""

    def __init__(self, url: str, **overrides: Any) -> None:
        self.config = StorageConfig(**FAST | overrides)
        self.store = Store(self.config)
        self.url = url
        self.all: list[CachedBackend] = []

    async def add(self, url: str = "") -> CachedBackend:
        node = CachedBackend(self.config, self.store, url or self.url)
        await node.open()
        self.all.append(node)
        return node

    async def opened(self, node: CachedBackend) -> None:
        """Have a node open the cache, and all know it."""
        await node.write("first", b"1")
        await until_open(node)
        for other in self.all:
            await other._roll.read()
            await asyncio.to_thread(other._server.look)

    async def close(self) -> None:
        for node in self.all:
            await node.close()


@asynccontextmanager
async def nodes(url: str, count: int = 2, **overrides: Any) -> AsyncIterator[tuple[Any, ...]]:
    """Nodes with an open cache, and the store."""
    made = Nodes(url, **overrides)
    try:
        for _ in range(count):
            await made.add()
        await made.opened(made.all[0])
        yield made, *made.all
    finally:
        await made.close()


def hits(node: CachedBackend) -> int:
    return node.statistics()["cache_hits"]


async def put(node: CachedBackend) -> None:
    """Wait until what was read is in the cache."""
    async with asyncio.timeout(PATIENCE):
        while node._shelf.is_putting:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


READS: dict[str, Callable[[CachedBackend], Awaitable[Any]]] = {
    "read": lambda node: node.read(KEY),
    "read_many": lambda node: node.read_many([KEY, "absent"]),
    "newest page": lambda node: node.read_log(LOG, -2),
    "first page": lambda node: node.read_log(LOG, 0, 2),
    "whole log": lambda node: node.read_log(LOG),
    "decoded": lambda node: node.read_log_as(LOG, lambda line: line[:20], -2),
    "count": lambda node: node.count_log(LOG),
    "newest": lambda node: node.newest_records([LOG, "absent"]),
}


@pytest.mark.parametrize("name", READS)
async def test_what_was_read_once_comes_from_the_cache(cache: RedisServer, name: str) -> None:
    async with nodes(cache.url) as (made, one, other):
        await one.commit([Put(KEY, b"1"), Append(LOG, lines(5))])
        first = await READS[name](one)
        assert first == await READS[name](made.store)
        await put(one)
        reads, before = made.store.reads, hits(other)
        assert await READS[name](other) == first
        assert hits(other) > before
        assert made.store.reads == reads


async def test_a_whole_log_answers_every_question_about_it(cache: RedisServer) -> None:
    async with nodes(cache.url) as (made, one, other):
        await one.commit([Append(LOG, lines(5))])
        await one.read_log(LOG, -100)  # more than there are
        await put(one)
        reads = made.store.reads
        everything = bare(lines(5))
        for start, stop in ((0, None), (0, 2), (1, 3), (-2, None), (-4, -1), (7, 9), (3, 1), (-9, -7)):
            assert await other.read_log(LOG, start, stop) == everything[start:stop]
        assert await other.count_log(LOG) == 5
        assert await other.newest_records([LOG]) == everything[-1:]
        assert made.store.reads == reads


CHANGES: dict[str, Sequence[Change]] = {
    "put": [Put(KEY, b"new"), Append(LOG, lines(1, 5))],
    "edit": [Edit(LOG, "m4", line("m4", "message 4"), line("m4", "new"))],
    "drop": [Edit(LOG, "m0", line("m0", "message 0"), None)],
    "pop": [Truncate(LOG, 1)],
    "move": [Move("users/ann", "system/trash/t/users/ann")],
    "move and back": [Move("users/ann/chat", "users/ann/other"), Append(LOG, lines(1, 9))],
    "remove": [RemoveTree("users/ann")],
    "remove all": [RemoveTree("users")],
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("change", CHANGES)
async def test_a_reader_who_is_late_brings_nothing_old_back(cache: RedisServer, name: str, change: str) -> None:
    async with nodes(cache.url) as (made, one, other):
        await one.commit([Put(KEY, b"old"), Append(LOG, lines(5))])
        gate = made.store.hold("read")
        late = asyncio.ensure_future(READS[name](other))
        await gate.came.wait()
        await one.commit(CHANGES[change])
        gate.go.set()
        await late
        await put(other)
        assert await READS[name](other) == await READS[name](one) == await READS[name](made.store)


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("change", CHANGES)
async def test_nobody_sees_the_old_after_the_new(cache: RedisServer, name: str, change: str) -> None:
    async with nodes(cache.url, 3) as (made, one, other, third):
        await one.commit([Put(KEY, b"old"), Append(LOG, lines(5))])
        await READS[name](other)
        await put(other)
        gate = made.store.hold("after commit")
        write = asyncio.ensure_future(one.commit(CHANGES[change]))
        await gate.came.wait()  # it is in the store, and not acknowledged
        new = await READS[name](made.store)
        assert await READS[name](third) == new
        await put(third)
        assert await READS[name](other) == new
        gate.go.set()
        await write
        assert await READS[name](other) == new


async def test_a_writer_that_dies_before_it_drops_leaves_nothing_old(
    cache: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "MARK_MILLISECONDS", 300)
    async with nodes(cache.url) as (made, one, other):
        await one.write(KEY, b"old")
        assert await other.read(KEY) == b"old"
        await put(other)
        gate = made.store.hold("after commit")
        write = asyncio.ensure_future(one.write(KEY, b"new"))
        await gate.came.wait()
        # That is where it stays: as if the process were dead.
        for _ in range(3):
            assert await other.read(KEY) == b"new"
            await put(other)
        before = hits(other)
        async with asyncio.timeout(PATIENCE):  # and when it is dead for sure, the key is cached again
            while hits(other) == before:
                assert await other.read(KEY) == b"new"
                await put(other)
        gate.go.set()
        await write


async def test_who_has_done_removes_no_mark_of_another(cache: RedisServer) -> None:
    async with nodes(cache.url, 3) as (made, one, other, third):
        await one.write(KEY, b"0")
        first = made.store.hold("before commit")
        slow = asyncio.ensure_future(one.write(KEY, b"1"))
        await first.came.wait()
        await other.write(KEY, b"2")
        assert await third.read(KEY) == b"2"
        await put(third)
        first.go.set()
        await slow
        assert await third.read(KEY) == b"1"


@pytest.mark.parametrize("name", READS)
async def test_a_flush_between_looking_and_putting_brings_nothing_old_back(cache: RedisServer, name: str) -> None:
    async with nodes(cache.url) as (made, one, other):
        await one.commit([Put(KEY, b"old"), Append(LOG, lines(5))])
        gate = made.store.hold("read")
        late = asyncio.ensure_future(READS[name](other))
        await gate.came.wait()
        cache.call("FLUSHALL")
        await one.commit(CHANGES["put"])
        await READS[name](one)  # which has made a generation of its own by now
        gate.go.set()
        await late
        await put(other)
        assert await READS[name](other) == await READS[name](made.store)


async def test_what_fails_changes_nothing_and_leaves_no_mark(cache: RedisServer) -> None:
    async with nodes(cache.url) as (_made, one, other):
        await one.write(KEY, b"old")
        with pytest.raises(ConflictError):
            await other.commit([Put(KEY, b"new", "another version")])
        assert await one.read(KEY) == b"old"
        await put(one)
        before = hits(other)
        assert await other.read(KEY) == b"old"
        assert hits(other) == before + 1


# --- a cache that cannot be reached --------------------------------------------------------------------


def cut_off(node: CachedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a node reach the cache no more, while the others go on."""
    from flatfile_chat_database.backends.cached import server as module

    def fail(*_: object, **__: object) -> Any:
        raise module.Unusable("cut off")

    async def fail_at_once(*_: object) -> Any:
        fail()

    for name in ("call", "call_many", "ask"):
        monkeypatch.setattr(node._server, name, fail)
    monkeypatch.setattr(node._server, "ask_at_once", fail_at_once)
    monkeypatch.setattr(node._server, "look", lambda: "")


async def fall_asleep(node: CachedBackend) -> None:
    """Have a node believe what it knows now for as long as it may."""
    await node.read(KEY)
    keeper = node._keeper
    assert keeper is not None
    await asyncio.to_thread(keeper.stop)


async def test_a_writer_that_is_cut_off_is_seen_by_those_who_are_not(
    cache: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes(cache.url, cache_lease_seconds=0.4) as (made, one, other):
        await one.write(KEY, b"old")
        assert await other.read(KEY) == b"old"
        await put(other)
        await fall_asleep(other)
        await other._roll.read()
        before = hits(other)
        cut_off(one, monkeypatch)
        write = asyncio.ensure_future(one.write(KEY, b"new"))
        while (known := other._roll.now()) is not None and known.phase is Phase.OPEN:
            assert not write.done(), "somebody may still take the old from the cache"
            await other.read(KEY)
            await asyncio.sleep(0.005)
        assert hits(other) > before
        await write
        assert await other.read(KEY) == b"new"
        assert made.store._data[OWN].find(b'"open"') < 0


async def test_a_write_waits_once_and_then_no_more(cache: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(cache.url) as (_made, one, other):
        cut_off(one, monkeypatch)
        await one.write(KEY, b"1")
        waited: list[float] = []
        monkeypatch.setattr(one._roll, "wait_until_settled", lambda: waited.append(1.0))
        await until(lambda: one._roll.known.phase is Phase.CLOSED)
        for number in range(20):
            await one.write(KEY, b"%d" % number)
        assert waited == []
        assert await other.read(KEY) == b"19"


async def test_the_store_is_told_before_what_the_cache_cannot_be_told(
    cache: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes(cache.url) as (made, one, _):
        cut_off(one, monkeypatch)
        gate = made.store.hold("before commit")
        write = asyncio.ensure_future(one.write(KEY, b"new"))
        await gate.came.wait()
        assert b"closing" in made.store._data[OWN] or b"closed" in made.store._data[OWN]
        gate.go.set()
        await write


async def test_what_is_lost_after_the_commit_is_told_as_well(
    cache: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes(cache.url, cache_lease_seconds=0.3) as (made, one, other):
        await one.write(KEY, b"old")
        gate = made.store.hold("after commit")
        write = asyncio.ensure_future(one.write(KEY, b"new"))
        await gate.came.wait()
        cut_off(one, monkeypatch)
        await fall_asleep(other)
        await other._roll.read()
        cache.call("FLUSHALL")  # and the mark is lost
        monkeypatch.setitem(made.store._data, KEY, b"old")  # what another reader had read before, say
        assert await other.read(KEY) == b"old"
        await put(other)
        made.store._data[KEY] = b"new"
        gate.go.set()
        while (known := other._roll.now()) is not None and known.phase is Phase.OPEN:
            assert not write.done(), "somebody may still take the old from the cache"
            await asyncio.sleep(0.005)
        await write
        assert await other.read(KEY) == b"new"


async def test_a_write_that_nobody_can_be_told_of_says_so(cache: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(cache.url) as (made, one, _):
        gate = made.store.hold("after commit")
        write = asyncio.ensure_future(one.write(KEY, b"new"))
        await gate.came.wait()
        cut_off(one, monkeypatch)

        async def fail(_: object, __: object) -> None:
            raise UnavailableError("It is down.")

        monkeypatch.setattr(one._roll, "give_up", fail)
        gate.go.set()
        with pytest.raises(DurabilityError, match="It is written, but for 300 seconds"):
            await write


async def test_a_cache_that_is_reached_again_is_used_again(
    cache: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes(cache.url) as (_made, one, other):
        await one.write(KEY, b"old")
        assert await other.read(KEY) == b"old"
        await put(other)
        with monkeypatch.context() as cut:
            cut_off(one, cut)
            await one.write(KEY, b"new")
        await until_open(one)
        await other._roll.read()
        assert other._roll.known.epoch == 2
        for _ in range(2):
            assert await other.read(KEY) == b"new"
            await put(other)
        assert hits(other) == 1
        assert "the cache is given up until it can be used again" in caplog.text


async def test_nobody_uses_a_cache_before_all_who_write_know_of_it(cache: RedisServer) -> None:
    made = Nodes(cache.url, cache_lease_seconds=0.3)
    try:
        one, other = await made.add(), await made.add()
        await made.store.write(KEY, b"old")
        assert await other.read(KEY) == b"old"
        word = await other.word()
        assert word is not None and word.phase is Phase.CLOSED
        await one.write("first", b"1")
        while b'"open"' not in made.store._data.get(OWN, b""):
            known = other._roll.now()
            # As long as it believes that there is no cache, nobody may put anything there.
            assert hits(one) == one.statistics()["cache_misses"] == 0
            assert await one.read(KEY) == b"old"
            await asyncio.sleep(0.01)
            del known
        assert other._roll.now() is None or other._roll.known.phase is not Phase.CLOSED
    finally:
        await made.close()


async def test_two_nodes_with_two_servers_give_the_cache_up_and_see_all(cache: RedisServer) -> None:
    with redis_server() as another:
        made = Nodes(cache.url)
        try:
            one, other = await made.add(), await made.add(another.url)
            await made.opened(one)
            await one.write(KEY, b"old")
            for _ in range(2):
                assert await one.read(KEY) == await other.read(KEY) == b"old"
                await put(one)
            assert hits(one) > 0
            assert hits(other) == 0, "it has another server"
            await other.write(KEY, b"new")
            assert await one.read(KEY) == b"new"
            for number in range(40):
                writer, reader = (one, other) if number % 2 else (other, one)
                await writer.write(KEY, b"%d" % number)
                for node in (reader, writer):
                    assert await node.read(KEY) == b"%d" % number
                    await put(node)
                    assert await node.read(KEY) == b"%d" % number
                await asyncio.sleep(0.01)
        finally:
            await made.close()


# --- servers that die, hang and forget ------------------------------------------------------------------


async def test_a_server_that_hangs_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    with redis_server() as own:
        async with nodes(own.url, cache_timeout_seconds=0.05) as (_made, one, other):
            await one.write(KEY, b"old")
            assert await other.read(KEY) == b"old"
            await put(other)
            own.send_signal(signal.SIGSTOP)
            try:
                assert await other.read(KEY) == b"old"
                assert other.statistics()["cache_late"] + bool(other._server.problem) > 0
                await one.write(KEY, b"new")
                assert await other.read(KEY) == b"new"
            finally:
                own.send_signal(signal.SIGCONT)
            await until_open(one)
            for _ in range(2):
                assert await one.read(KEY) == b"new"
                await put(one)
            assert hits(one) > 0
    assert "cannot be used now, and is tried again" in caplog.text


async def test_a_server_that_is_started_again_with_an_old_file_brings_nothing_old_back() -> None:
    with redis_server(settings=("--dbfilename", "old.rdb")) as own:
        async with nodes(own.url) as (made, one, other):
            await one.write(KEY, b"old")
            assert await other.read(KEY) == b"old"
            await put(other)
            own.call("SAVE")
            await one.write(KEY, b"new")
            own.kill()
            own.start()
            word = made.all[0]._roll.known
            names = entries.Names(word.cache, word.opening)
            assert own.call("HGET", names.key(KEY), "d") is not None, "the old is there"
            assert await other.read(KEY) == b"new"
            await one.write("other", b"1")
            assert await other.read(KEY) == b"new"
            await until_open(one)
            assert one._roll.known.epoch == 2
            await other._roll.read()
            await asyncio.to_thread(other._server.look)
            for _ in range(2):
                assert await other.read(KEY) == b"new"
                await put(other)
            assert hits(other) == 1


async def test_a_dead_server_is_left_alone_and_every_answer_comes_from_the_store(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with redis_server() as own:
        async with nodes(own.url) as (made, one, other):
            await one.commit([Put(KEY, b"old"), Append(LOG, lines(5))])
            own.kill()
            for name, read in READS.items():
                assert await read(other) == await read(made.store), name
            await one.commit(CHANGES["put"])
            for name, read in READS.items():
                assert await read(other) == await read(made.store), name
    assert len([record for record in caplog.records if "cannot be used now" in record.message]) <= 3


async def test_a_store_is_opened_and_used_where_no_server_is(tmp_path_factory: pytest.TempPathFactory) -> None:
    made = Nodes(f"unix://{tmp_path_factory.mktemp('none')}/socket")
    try:
        one = await made.add()
        await one.write(KEY, b"1")
        assert await one.read(KEY) == b"1"
        assert OWN not in made.store._data, "there is no cache that anybody could use"
    finally:
        await made.close()


# --- what the store says ---------------------------------------------------------------------------------


async def test_who_only_reads_writes_nothing(cache: RedisServer) -> None:
    made = Nodes(cache.url)
    try:
        one = await made.add()
        await made.store.write(KEY, b"1")
        for _ in range(5):
            assert await one.read(KEY) == b"1"
            await asyncio.sleep(2 * FAST["cache_lease_seconds"])
        assert list(made.store._data) == [KEY]
    finally:
        await made.close()


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b'{"phase":"ajar","epoch":1,"cache":"c","server":"s"}', None])
async def test_a_word_that_is_damaged_or_gone_closes_the_cache(
    cache: RedisServer, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes(cache.url) as (made, one, other):
        await one.write(KEY, b"old")
        assert await other.read(KEY) == b"old"
        await put(other)
        with made.store._lock:
            if damage is None:
                await made.store.delete(OWN)
            else:
                await MemoryBackend.write(made.store, OWN, damage)
        word = await other._roll.read()
        assert word.phase in (Phase.CLOSING, Phase.CLOSED)
        await one.write(KEY, b"new")
        assert await other.read(KEY) == b"new"
        if damage is not None and word.phase is Phase.CLOSING:
            assert "does not say whether the cache may be used" in caplog.text
        await until_open(one)
        await other._roll.read()
        for _ in range(2):
            assert await other.read(KEY) == b"new"
            await put(other)


async def test_the_word_is_not_among_the_keys(cache: RedisServer) -> None:
    async with nodes(cache.url) as (made, one, _):
        await one.write("system/config.json", b"{}")
        assert OWN in await made.store.list_keys("")
        assert OWN not in await one.list_keys("")
        assert await one.list_children("system") == ["config.json"]
        async with one.snapshot() as shown:
            assert OWN not in [key async for run in shown.keys() for key in run]  # noqa: SIM118 - no dictionary
        changed = await one.changes(None)
        assert changed.keys is None or OWN not in changed.keys


# --- what is in the cache ---------------------------------------------------------------------------------


def hash_of(node: CachedBackend, key: str) -> str:
    word = node._roll.known
    return entries.Names(word.cache, word.opening).key(key)


DAMAGE: dict[str, Callable[[RedisServer, str], object]] = {
    "cut off": lambda own, name: own.call("HSET", name, "d", own.call("HGET", name, "d")[:-1]),
    "a bit": lambda own, name: own.call("HSET", name, "d", own.call("HGET", name, "d")[:-1] + b"0"),
    "empty": lambda own, name: own.call("HSET", name, "d", ""),
    "foreign": lambda own, name: own.call("HSET", name, "d", "old"),
    "of another key": lambda own, name: own.call("HSET", name, "d", entries.pack_document("another", b"old")),
    "of another kind": lambda own, name: own.call("HSET", name, "d", entries.pack_count(name, 1)),
    "lines": lambda own, name: own.call("HSET", name, "d", entries.pack_records(name, "d", [b"old"])),
    "a string": lambda own, name: (own.call("DEL", name), own.call("SET", name, "old")),
    "a list": lambda own, name: (own.call("DEL", name), own.call("LPUSH", name, "old")),
    "a hash": lambda own, name: (own.call("DEL", name), own.call("HSET", name, "d", "old")),
    "no generation": lambda own, name: own.call("HDEL", name, "g"),
    "another generation": lambda own, name: own.call("HSET", name, "g", "x", "s", "y"),
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_what_is_damaged_or_foreign_is_recognised_and_removed(
    cache: RedisServer, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes(cache.url) as (_made, one, other):
        await one.write(KEY, b"right")
        assert await one.read(KEY) == b"right"
        await put(one)
        DAMAGE[damage](cache, hash_of(one, KEY))
        for _ in range(3):
            assert await other.read(KEY) == b"right"
            await put(other)
        assert hits(other) > 0, "it is cached again"
        assert other._server.problem == ""


@pytest.mark.parametrize("kind", ["SET", "LPUSH"])
async def test_owners_that_are_foreign_are_replaced(cache: RedisServer, kind: str) -> None:
    async with nodes(cache.url) as (_made, one, other):
        await one.write(KEY, b"right")
        word = one._roll.known
        names = entries.Names(word.cache, word.opening)
        for name in (names.store, names.owner(KEY)):
            cache.call("DEL", name)
            cache.call(kind, name, "x")
        for _ in range(3):
            assert await other.read(KEY) == b"right"
            await put(other)
        assert hits(other) > 0
        await one.commit([RemoveTree("users/ann")])
        assert await other.read(KEY) is None


async def test_what_is_large_is_not_kept(cache: RedisServer) -> None:
    async with nodes(cache.url, cache_entry_max_bytes=100) as (_made, one, _other):
        await one.commit([Put(KEY, b"x" * 101), Put("small", b"x" * 100), Append(LOG, lines(5))])
        for _ in range(2):
            for key in (KEY, "small"):
                await one.read(key)
            await one.read_log(LOG)
            await put(one)
        assert hits(one) == 1
        assert cache.call("HGET", hash_of(one, KEY), "d") is None


async def test_what_is_kept_has_an_end(cache: RedisServer) -> None:
    async with nodes(cache.url, cache_entry_seconds=77) as (_made, one, _other):
        await one.write(KEY, b"1")
        await one.read(KEY)
        await put(one)
        keys = cache.call("KEYS", "*")
        assert hash_of(one, KEY).encode() in keys
        assert all(0 < cache.call("PTTL", key) <= entries.OWNER_LIVES * 77_000 for key in keys)
        assert 70_000 < cache.call("PTTL", hash_of(one, KEY)) <= 77_000


async def test_a_hash_has_no_more_than_so_many_answers(cache: RedisServer) -> None:
    async with nodes(cache.url) as (_made, one, _):
        await one.commit([Append(LOG, lines(90))])
        for start in range(60):
            assert await one.read_log(LOG, start, start + 2) == bare(lines(90))[start : start + 2]
        await put(one)
        assert cache.call("HLEN", hash_of(one, LOG)) == entries.MOST_FIELDS


async def test_what_is_changed_past_the_cache_is_seen_when_its_time_is_over(cache: RedisServer) -> None:
    async with nodes(cache.url, cache_entry_seconds=0.2) as (made, one, _):
        await one.write(KEY, b"old")
        await one.read(KEY)
        await put(one)
        await made.store.write(KEY, b"new")
        async with asyncio.timeout(PATIENCE):
            while await one.read(KEY) != b"new":  # noqa: ASYNC110 - time has to pass
                await asyncio.sleep(0.01)


async def test_several_stores_share_a_server(cache: RedisServer) -> None:
    async with nodes(cache.url, 1) as (_first, one), nodes(cache.url, 1) as (_second, other):
        for number in range(2):
            await one.write(KEY, b"one %d" % number)
            await other.write(KEY, b"other %d" % number)
            for _ in range(2):
                assert await one.read(KEY) == b"one %d" % number
                assert await other.read(KEY) == b"other %d" % number
                await put(one)
                await put(other)
        assert hits(one) == hits(other) == 2


async def test_many_keys_at_once_are_marked_by_their_owners(cache: RedisServer) -> None:
    async with nodes(cache.url) as (_made, one, other):
        keys = [f"users/u{number}/profile.json" for number in range(300)]
        assert await other.read_many(keys) == [None] * 300
        await put(other)
        await one.load([(key, b"1") for key in keys])
        assert await other.read_many(keys) == [b"1"] * 300
        await put(other)
        before = hits(other)
        assert await other.read_many(keys) == [b"1"] * 300
        assert hits(other) == before + 300


async def test_damage_is_not_hidden_from_whoever_is_strict(
    cache: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes(cache.url) as (_made, one, _):
        await one.write(LOG, lines(1)[0] + b"damage\n" + lines(1, 1)[0])
        with caplog.at_level(logging.WARNING):
            assert await one.read_log(LOG) == bare(lines(2))
        assert "is no message" in caplog.text
        await put(one)
        with pytest.raises(Exception, match="is no message"):
            await one.read_log(LOG, strict=True)


def test_the_clock_goes_on_while_the_machine_sleeps() -> None:
    import time

    assert abs(roll.clock() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 5


# --- who waits for what others write ------------------------------------------------------------------------


async def heard(node: CachedBackend) -> None:
    """Wait until a node hears what others write."""
    async with asyncio.timeout(PATIENCE):
        while not node._news.is_heard:
            await node.wait_for_change(["nothing"], 0.01)


async def test_who_waits_is_woken_by_what_another_node_writes(
    cache: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes(cache.url) as (made, one, other):
        await heard(other)

        async def never(*_: object) -> None:
            raise AssertionError("the store is asked")

        monkeypatch.setattr(made.store, "wait_for_change", never)
        waits = {
            key: asyncio.ensure_future(other.wait_for_change([key], 600)) for key in (LOG, "users/ann", "", "other")
        }
        await asyncio.sleep(0)
        await one.commit([Append(LOG, lines(1))])
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(waits[key] for key in (LOG, "users/ann", "")))
        assert not waits["other"].done()
        await one.commit([RemoveTree("other")])
        async with asyncio.timeout(PATIENCE):
            await waits["other"]
        mine = asyncio.ensure_future(other.wait_for_change([LOG], 600))
        await asyncio.sleep(0)
        await other.commit([Append(LOG, lines(1, 1))])
        async with asyncio.timeout(PATIENCE):
            await mine


async def test_who_waits_goes_on_when_the_server_dies() -> None:
    with redis_server() as own:
        async with nodes(own.url) as (_, one, other):
            await heard(other)
            waiting = asyncio.ensure_future(other.wait_for_change([LOG], 600))
            await asyncio.sleep(0)
            own.kill()
            async with asyncio.timeout(PATIENCE):
                await waiting
                waiting = asyncio.ensure_future(other.wait_for_change([LOG], 600))
                await asyncio.sleep(0)
                await one.commit([Append(LOG, lines(1))])
                await waiting
