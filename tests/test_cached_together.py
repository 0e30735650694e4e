"""Several nodes with one cache, used at random and under load, while the cache is flushed, killed and cut off."""

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from flatfile_chat_database import Message, StorageConfig, StorageManager
from flatfile_chat_database.backends.cached import CachedBackend
from flatfile_chat_database.backends.cached.roll import Phase
from flatfile_chat_database.backends.cached.server import Unusable
from flatfile_chat_database.backends.changes import Append, Change, Move, Put, RemoveTree, Truncate
from flatfile_chat_database.backends.memory import MemoryBackend
from flatfile_chat_database.testing.case import line

from .servers import RedisServer, redis_server
from .test_machine import SETTINGS

LEASE = 0.03
_NODES = 3
_PLACES = ("users/ann/s", "users/ann/t", "users/bob/s")
_PLACE = st.sampled_from(_PLACES)
_NODE = st.integers(0, _NODES - 1)


class NodesMachine(RuleBasedStateMachine):
    """Nodes on one store with one cache: what any of them reads is what the store has."""

    cache: RedisServer

    def __init__(self) -> None:
        super().__init__()
        self.cache.call("FLUSHALL")
        self._loop = asyncio.Runner()
        config = StorageConfig(cache_lease_seconds=LEASE, cache_timeout_seconds=1.0)
        self._store = MemoryBackend(config)
        self._nodes = [CachedBackend(config, self._store, self.cache.url) for _ in range(_NODES)]
        self._written = 0
        for node in self._nodes:
            self._loop.run(node.open())
        self._loop.run(self._open())

    async def _open(self) -> None:
        await self._nodes[0].write("first", b"")
        async with asyncio.timeout(20):
            while self._nodes[0]._roll.known.phase is not Phase.OPEN:
                await self._nodes[0].read("first")
                await asyncio.sleep(0.002)
        for node in self._nodes:
            await node._roll.read()
            await asyncio.to_thread(node._server.look)

    def teardown(self) -> None:
        for node in self._nodes:
            self._loop.run(node.close())
        self._loop.close()

    @rule(
        node=_NODE,
        place=_PLACE,
        other=_PLACE,
        how=st.sampled_from(["put", "append", "append", "pop", "move", "remove"]),
    )
    def write(self, node: int, place: str, other: str, how: str) -> None:
        self._written += 1
        document, log = f"{place}/session.json", f"{place}/messages.jsonl"
        changes: dict[str, Change] = {
            "put": Put(document, b"%d" % self._written),
            "append": Append(log, (line(f"m{self._written}"),)),
            "pop": Truncate(log, 1),
            "move": Move(place, f"system/trash/t{self._written}/{place}"),
            "remove": RemoveTree(other),
        }
        self._loop.run(self._nodes[node].commit([changes[how]]))

    @rule(node=_NODE, again=st.integers(1, 2))
    def look(self, node: int, again: int) -> None:
        async def all_of(backend: Any) -> list[Any]:
            found: list[Any] = []
            for place in _PLACES:
                log = f"{place}/messages.jsonl"
                found += [await backend.read(f"{place}/session.json"), await backend.read_log(log, -2)]
                found += [await backend.read_log(log, 0, 2), await backend.count_log(log)]
            documents = [f"{place}/session.json" for place in _PLACES]
            found += [await backend.read_many(documents)]
            found += [await backend.newest_records([f"{place}/messages.jsonl" for place in _PLACES])]
            return found

        for _ in range(again):
            assert self._loop.run(all_of(self._nodes[node])) == self._loop.run(all_of(self._store))

    @rule()
    def flush(self) -> None:
        self.cache.call("FLUSHALL")

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        for key in self.cache.call("KEYS", "*"):
            if data.draw(st.booleans()):
                self.cache.call("DEL", key)

    @rule(node=_NODE)
    def cut_off(self, node: int) -> None:
        server: Any = self._nodes[node]._server

        def fail(*_: object, **__: object) -> Any:
            raise Unusable("cut off")

        async def fail_at_once(*_: object) -> Any:
            fail()

        server.call = server.call_many = server.ask = fail
        server.ask_at_once = fail_at_once
        server.look = lambda: ""

    @rule(node=_NODE)
    def reach_again(self, node: int) -> None:
        server: Any = self._nodes[node]._server
        for name in ("call", "call_many", "ask", "ask_at_once", "look"):
            vars(server).pop(name, None)

    @rule()
    def start_again(self) -> None:
        self.cache.kill()
        self.cache.start()

    @rule()
    def time_passes(self) -> None:
        self._loop.run(asyncio.sleep(2 * LEASE))


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.mark.parametrize("examples", [5, pytest.param(25, marks=pytest.mark.slow)])
def test_nodes_read_what_the_store_has_whatever_happens_to_the_cache(server: RedisServer, examples: int) -> None:
    kind = type("Machine", (NodesMachine,), {"cache": server})
    run_state_machine_as_test(kind, settings=settings(SETTINGS, max_examples=examples))


# --- processes, under load ---------------------------------------------------------------------------------

SECONDS = 6.0

_NODE_PROGRAM = """
import asyncio, json, sys, time
from flatfile_chat_database import Message, StorageConfig, StorageManager
from flatfile_chat_database.errors import StorageError

name, url, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])

async def main():
    storage = StorageManager(StorageConfig(storage_url=url, cache_lease_seconds=0.1, cache_timeout_seconds=0.1))
    end, number = time.monotonic() + seconds, 0

    async def write():
        nonlocal number
        while time.monotonic() < end:
            number += 1
            began = time.monotonic()
            await storage.add_message("ada", "s", Message("user", "x", id=f"{name}-{number}"))
            print(json.dumps(["w", f"{name}-{number}", began, time.monotonic()]), flush=True)
            await asyncio.sleep(0.03)

    async def read():
        while time.monotonic() < end:
            began = time.monotonic()
            page = await storage.get_messages("ada", "s", 5, -5)
            count = await storage.count_messages("ada", "s")
            print(json.dumps(["r", [m.id for m in page], began, time.monotonic(), count]), flush=True)
            await asyncio.sleep(0.001)

    await asyncio.gather(write(), read(), read())
    print(json.dumps(["s", storage.backend.statistics()]), flush=True)
    await storage.close()

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["redis", "valkey"])
async def test_two_processes_agree_while_the_server_is_harmed(kind: str, tmp_path: Path) -> None:
    with redis_server(kind=kind) as own:
        url = f"cached:?store={quote(f'file:{tmp_path}/store', safe='')}&cache={quote(own.url, safe='')}"
        async with StorageManager(StorageConfig(storage_url=url)) as storage:
            await storage.create_user("ada")
            await storage.create_session("ada", session_id="s")
        processes = [
            await asyncio.create_subprocess_exec(
                sys.executable, "-c", _NODE_PROGRAM, name, url, str(SECONDS), stdout=subprocess.PIPE
            )
            for name in ("one", "other")
        ]
        outputs = asyncio.gather(*(process.communicate() for process in processes))
        harms = asyncio.ensure_future(_harm(own))
        texts = await outputs
        harm, forgotten = await harms
        assert [process.returncode for process in processes] == [0, 0]
        async with StorageManager(StorageConfig(storage_url=f"file:{tmp_path}/store")) as storage:
            log = [message.id async for message in storage.stream_messages("ada", "s")]
    events = [json.loads(text) for output, _ in texts for text in output.splitlines()]
    check(log, events, forgotten)
    hits = sum(event[1]["cache_hits"] for event in events if event[0] == "s")
    assert hits > 0
    kinds = Counter(event[0] for event in events)
    print(f"{kind}: {dict(harm)}; {kinds['w']} messages added, {kinds['r']} pages and counts read, {hits} hits")


async def test_a_flush_while_a_message_is_written_hides_nothing_that_is_acknowledged(tmp_path: Path) -> None:
    with redis_server() as own:
        url = f"cached:?store={quote(f'file:{tmp_path}/store', safe='')}&cache={quote(own.url, safe='')}"
        config = StorageConfig(storage_url=url, cache_lease_seconds=LEASE, cache_timeout_seconds=0.1)
        async with StorageManager(config) as one, StorageManager(config) as other:
            await one.create_user("ada")
            await one.create_session("ada", session_id="s")
            while not other.backend.statistics()["cache_hits"]:
                await other.count_messages("ada", "s")
                await asyncio.sleep(0.01)
            backend: Any = one.backend
            commit = backend._store.commit

            async def flushed(changes: Sequence[Change]) -> Any:
                await asyncio.to_thread(own.call, "FLUSHALL")  # and with it the mark
                assert await other.count_messages("ada", "s") == 0  # which the cache keeps
                return await commit(changes)

            backend._store.commit = flushed
            await one.add_message("ada", "s", Message("user", "x", id="m"))
            assert await other.count_messages("ada", "s") == 1
            assert [message.id for message in await other.get_messages("ada", "s")] == ["m"]


async def _harm(own: RedisServer) -> tuple[Counter[str], list[tuple[float, float]]]:
    """Flush, stop, kill and start the server until the load is over; return how often, and when it forgot all."""
    harm: Counter[str] = Counter()
    forgotten: list[tuple[float, float]] = []
    chance, end = random.Random(5), time.monotonic() + SECONDS - 1
    await asyncio.sleep(1)
    while time.monotonic() < end:
        harm[how := chance.choice(["flush", "flush", "flush", "stop", "kill"])] += 1
        began = time.monotonic()
        match how:
            case "flush":
                await asyncio.to_thread(own.call, "FLUSHALL")
                forgotten.append((began, time.monotonic()))
            case "stop":
                own.send_signal(signal.SIGSTOP)
                await asyncio.sleep(0.2)
                own.send_signal(signal.SIGCONT)
            case _:
                await asyncio.to_thread(own.kill)
                await asyncio.sleep(chance.random() / 3)
                await asyncio.to_thread(own.start)
                forgotten.append((began, time.monotonic()))
                await asyncio.sleep(1.5)  # until it is used again
        await asyncio.sleep(chance.random() / 2)
    return harm, forgotten


def check(log: list[str], events: list[Any], forgotten: Sequence[tuple[float, float]] = ()) -> None:
    """Check the four laws of a log that several append to; times are of one clock.

    A cache that forgets all while a message is written forgets that it is, too: until it is acknowledged, that message
    may be seen by one who reads the store, and then not by one who is told by the cache.
    """
    place = {message_id: number for number, message_id in enumerate(log)}
    assert len(place) == len(log), "a message is there twice"
    writes = [(place[event[1]], event[2], event[3]) for event in events if event[0] == "w"]
    assert len(writes) > 20
    reads = [event for event in events if event[0] == "r"]
    # What was acknowledged before something else was begun is before it.
    _in_order([(at, began, ended) for at, began, ended in writes], strict=True)
    unmarked = {
        message_id
        for _, message_id, began, ended in (event for event in events if event[0] == "w")
        if any(began <= behind and before <= ended for before, behind in forgotten)
    }
    # A page is a piece of the log, and ends no earlier than what was acknowledged before it was asked for.
    ends, seen = [], []
    for _, page, began, ended, count in reads:
        sure = max((place[message_id] for message_id in page if message_id not in unmarked), default=-1)
        if page:
            first = place[page[0]]
            assert log[first : first + len(page)] == page, "a page is no piece of the log"
            ends.append((first + len(page) - 1, began, ended))
            seen.append((sure, began, ended))
        assert count > sure, "the count went back behind the page"
    done = sorted((ended, at) for at, _, ended in writes)
    for at, began, _ in ends:
        acknowledged = [where for when, where in done if when < began]
        assert at >= max(acknowledged, default=-1), "what was acknowledged is not seen"
    for _, _, began, _, count in reads:
        assert count > max((at for when, at in done if when < began), default=-1), (
            "the count lacks what was acknowledged"
        )
    _in_order(ends, seen, strict=False)


def _in_order(
    spans: list[tuple[int, float, float]], before: list[tuple[int, float, float]] | None = None, *, strict: bool
) -> None:
    """Check that what ended before something else began has a place before it, or the same."""
    newest, finished = -1, sorted((ended, at) for at, _, ended in (spans if before is None else before))
    number = 0
    for at, began, _ in sorted(spans, key=lambda span: span[1]):
        while number < len(finished) and finished[number][0] < began:
            newest = max(newest, finished[number][1])
            number += 1
        assert at > newest if strict else at >= newest, f"somebody went back: {at} after {newest}, begun at {began}"


def test_the_check_finds_what_is_wrong() -> None:
    log = [f"a-{number}" for number in range(30)]
    good = [["w", message_id, float(number), number + 0.5] for number, message_id in enumerate(log)]
    check(log, [*good, ["r", log[10:15], 14.6, 14.7, 15]])
    for bad in (
        ["r", log[9:14], 14.6, 14.7, 15],
        ["r", [log[10], log[12]], 12.6, 12.7, 13],
        ["r", log[10:15], 14.6, 14.7, 14],
    ):
        with pytest.raises(AssertionError):
            check(log, [*good, bad])
    with pytest.raises(AssertionError, match="twice"):
        check([*log, log[0]], good)
    with pytest.raises(AssertionError, match="went back"):
        check(log, [*good[:24], ["r", log[20:25], 24.6, 24.7, 25], ["r", log[19:24], 24.8, 24.9, 25]])
    with pytest.raises(AssertionError, match="is not seen"):
        check(log, [*good, ["r", log[19:24], 24.8, 24.9, 25]])
    early = ["r", log[11:16], 15.1, 15.2, 15]  # it sees what is written until 15.5, and its count does not
    with pytest.raises(AssertionError, match="the count went back"):
        check(log, [*good, early])
    check(log, [*good, early], [(15.05, 15.06)])
    with pytest.raises(AssertionError, match="the count went back"):
        check(log, [*good, early], [(14.6, 14.7)])
