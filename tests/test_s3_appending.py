"""What an append to a log in S3 requires, which is looked at behind its put; the bucket is in memory.

Another node removes it at every moment. What comes of that is what could come of it if nothing were done at the same
time, as a store in memory shows.
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from obstore.store import MemoryStore

from flatfile_chat_database.backends.base import StorageBackend
from flatfile_chat_database.backends.changes import (
    Append,
    Change,
    Delete,
    Edit,
    Move,
    Put,
    RemoveTree,
    Require,
    Truncate,
)
from flatfile_chat_database.backends.memory import MemoryBackend
from flatfile_chat_database.backends.s3 import S3Backend, appending, committing
from flatfile_chat_database.backends.s3.objects import Objects
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.errors import ConflictError, DurabilityError, NotFoundError, UnavailableError
from flatfile_chat_database.testing.case import LOG, bare, ids, line, lines

from .s3_nodes import Meeting, check_whole, memory, nodes, paths

OWNER = Require("users/ann/chat/session.json", "It")


@pytest.fixture(autouse=True)
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """The medium of one test."""
    return memory(monkeypatch, tmp_path)


class Order:
    """The requests of one node, and which of those that are made at the same time comes first."""

    def __init__(self, patches: pytest.MonkeyPatch, node: S3Backend, *, is_reversed: bool = False) -> None:
        self.requests: list[str] = []
        at_once = Objects.at_once

        def in_order(objects: Objects, looks: Sequence[Callable[[], Any]]) -> list[Any]:
            if objects is not node._objects:
                return at_once(objects, looks)
            done = [look() for look in (reversed(looks) if is_reversed else looks)]
            return done[::-1] if is_reversed else done

        patches.setattr(Objects, "at_once", in_order)
        for method in ("create", "head", "get"):
            patches.setattr(Objects, method, self._noted(getattr(Objects, method), node, method))

    def _noted(self, original: Any, node: S3Backend, method: str) -> Any:
        def request(objects: Objects, path: str, *arguments: Any, **more: Any) -> Any:
            if objects is node._objects:
                self.requests.append(f"{method} {path.rpartition('/')[2]}")
            return original(objects, path, *arguments, **more)

        return request


async def _warm(a: StorageBackend) -> None:
    """Let a node have seen a log and what its appends require."""
    await a.commit([Put(OWNER.key, b"{}"), Append(LOG, lines(1))])
    await a.commit([OWNER, Append(LOG, lines(1, 1))])


async def test_an_append_to_a_log_that_is_known_looks_behind_its_put_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(2) as (a, b):
        await _warm(a)
        order = Order(monkeypatch, a)
        await asyncio.gather(*(a.commit([OWNER, Append(LOG, lines(1, 2 + number))]) for number in range(3)))
        assert order.requests == ["create 000000000002", "head messages.jsonl", "get session.json"]
        await a.commit([Put(OWNER.key, b"{}"), Put("other.json", b"{}")])
        order.requests.clear()
        await a.commit([OWNER, Append(LOG, lines(1, 5))])
        looks = ["head messages.jsonl", "get session.json"]
        assert order.requests == ["get session.json", "create 000000000003", *looks], "it looked before as well"
        await b.commit([Edit(LOG, "m0", lines(1)[0], line("m0", "new"))])
        assert await a.commit([OWNER, Append(LOG, lines(1, 6))]) == [None, 1]
        await a.delete(OWNER.key)
        puts = a.statistics()["puts"]
        with pytest.raises(NotFoundError, match="It does not exist"):
            await a.commit([OWNER, Append(LOG, lines(1, 7))])
        assert a.statistics()["puts"] == puts, "who has removed it himself puts nothing"
        assert ids(await b.read_log(LOG)) == [f"m{number}" for number in range(7)]


MOMENTS = {
    "before the put": ("create", "/segments/"),
    "before the log is looked at": ("head", LOG),
    "before its owner is looked at": ("get", OWNER.key),
}
TREE = "users/ann/chat"
EDIT = Edit(LOG, "m0", lines(1)[0], line("m0", "new"))
REMOVALS: dict[str, list[list[Change]]] = {
    "the owner": [[Delete(OWNER.key)]],
    "the owner and something else": [[Delete(OWNER.key), Put("state.json", b"closed")]],
    "the owner, and the log is edited": [[Delete(OWNER.key)], [EDIT]],
    "the owner, which comes again": [[Delete(OWNER.key)], [Put(OWNER.key, b"{}")]],
    "all of it": [[RemoveTree(TREE)]],
    "all of it, and it is made anew": [[RemoveTree(TREE)], [Put(OWNER.key, b"{}"), Append(LOG, lines(2))]],
    "to another place": [[Move(TREE, "trash/1")]],
    "to another place, and back": [[Move(TREE, "trash/1")], [Move("trash/1", TREE)]],
}


async def _state(store: StorageBackend) -> dict[str, bytes]:
    keys = await store.list_keys("")
    return {key: data for key, data in zip(keys, await store.read_many(keys), strict=True) if data is not None}


async def _history(store: StorageBackend, removals: list[list[Change]], place: int) -> tuple[object, ...]:
    """Append between commits, nothing at the same time; return what came of it, and what was there after each."""
    await _warm(store)
    seen = []
    for changes in removals[:place]:
        await store.commit(changes)
        seen.append(await _state(store))
    [result] = await asyncio.gather(store.commit([OWNER, Append(LOG, lines(1, 2))]), return_exceptions=True)
    for changes in removals[place:]:
        await store.commit(changes)
        seen.append(await _state(store))
    return type(result), seen, await _state(store)


@pytest.mark.slow
@pytest.mark.parametrize("is_reversed", [False, True])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("what", REMOVALS)
async def test_what_an_append_requires_is_removed_meanwhile(
    monkeypatch: pytest.MonkeyPatch, what: str, moment: str, is_reversed: bool
) -> None:
    removals = REMOVALS[what]
    possible = [await _history(MemoryBackend(StorageConfig()), removals, place) for place in range(len(removals) + 1)]
    for at_once in (64, 1):  # also a tree that is removed key by key
        monkeypatch.setattr(committing, "_LOCKED_AT_ONCE", at_once)
        async with nodes(2) as (a, b):
            await _warm(a)
            seen: list[dict[str, bytes]] = []

            async def remove(b: S3Backend = b, seen: list[dict[str, bytes]] = seen) -> None:
                for changes in removals:
                    await b.commit(changes)
                    seen.append(await _state(b))

            with monkeypatch.context() as patches:
                Order(patches, a, is_reversed=is_reversed)
                meeting = Meeting(patches, a, *MOMENTS[moment]).then(remove)
                [result] = await asyncio.gather(a.commit([OWNER, Append(LOG, lines(1, 2))]), return_exceptions=True)
            assert meeting.happened
            left = await _state(b)
            if isinstance(result, NotFoundError):  # then it may have been there for a moment
                assert (NotFoundError, left) in [(kind, after) for kind, _, after in possible]
            else:
                assert (type(result), seen, left) in possible
            await check_whole(b)
            await b.commit([Delete(key) for key in left])


async def test_an_append_that_requires_what_is_gone_takes_out_its_own_lines_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with nodes(2) as (a, b):
        await _warm(a)
        await a.commit([Put("other.json", b"{}")])
        other = Require("other.json", "The other")
        await a.commit([other, Append(LOG, lines(1, 2))])
        both = (line("both"), line("own"))
        meeting = Meeting(monkeypatch, a, "create", "/segments/").then(lambda: b.delete("other.json"))
        work = [
            a.commit([other, Append(LOG, both)]),
            a.commit([OWNER, Append(LOG, (line("fine"),))]),
            a.commit([OWNER, Append(LOG, both[:1])]),
            a.commit([other, Append(LOG, lines(1))]),
            a.append(LOG, line("raw")),
        ]
        results = await asyncio.gather(*work, return_exceptions=True)
        assert meeting.happened
        assert [type(each) for each in results] == [NotFoundError, list, list, NotFoundError, bool]
        assert ids(await b.read_log(LOG)) == ["m0", "m1", "m2", "both", "fine", "raw"]
        assert await a.commit([OWNER, Append(LOG, (line("own"),))]) == [None, 1]
        await check_whole(b)


@pytest.mark.parametrize(("method", "words"), [("head", LOG), ("get", OWNER.key), ("replace", LOG)])
async def test_it_is_said_that_the_outcome_is_unknown_if_looking_behind_the_put_fails(
    monkeypatch: pytest.MonkeyPatch, method: str, words: str
) -> None:
    async with nodes(2) as (a, b):
        await _warm(a)
        original = getattr(Objects, method)

        def refuse(objects: Objects, path: str, *arguments: Any, **more: Any) -> Any:
            if objects is a._objects and path == words:
                raise UnavailableError("away")
            return original(objects, path, *arguments, **more)

        with monkeypatch.context() as patches:
            if method == "replace":  # what is to be taken out again cannot be
                Meeting(patches, a, "create", "/segments/").then(lambda: b.delete(OWNER.key))
            patches.setattr(Objects, method, refuse)
            with pytest.raises(DurabilityError, match="away"):
                await a.commit([OWNER, Append(LOG, lines(1, 2))])
        await b.write(OWNER.key, b"{}")
        assert await a.commit([OWNER, Append(LOG, lines(1, 2))]) == [None, 0]
        assert ids(await b.read_log(LOG)) == ["m0", "m1", "m2"]
        await check_whole(b)


async def test_what_is_appended_to_a_log_that_went_long_ago_leaves_nothing(bucket: MemoryStore) -> None:
    async with nodes(1) as (a,):
        await _warm(a)
        async with nodes(1) as (b,):
            await b.commit([RemoveTree(TREE)])
        assert paths(bucket) == []
        with pytest.raises(NotFoundError):
            await a.commit([OWNER, Append(LOG, lines(1, 2))])
    assert [path for path in paths(bucket) if "/probes/" not in path] == []


async def test_who_folds_a_log_reads_nothing_that_he_has_written_or_read_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large = [tuple(line(f"{number}-{each}", "x" * 100) for each in range(150)) for number in range(8)]
    async with nodes(2) as (a, b):
        await a.commit([Append(LOG, lines(1))])
        for number, some in enumerate(large):
            await (b if number == 3 else a).commit([Append(LOG, some)])
        with monkeypatch.context() as patches:
            order = Order(patches, a)
            assert await asyncio.to_thread(a._appender.fold, LOG)
        assert [each for each in order.requests if each.startswith("get")] == ["get messages.jsonl"]
        assert await b.read_log(LOG, strict=True) == bare([*lines(1), *(each for some in large for each in some)])
        assert await b.commit([Append(LOG, lines(1, 1))]) == [1]
        await check_whole(b)


async def test_of_a_log_no_more_than_some_of_what_was_appended_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appending, "_HELD_BYTES", 5000)
    async with nodes(2) as (a, b):
        written = [line(f"m{number}", "x" * 700) for number in range(30)]
        for each in written:
            await a.commit([Append(LOG, (each,))])
            held = [len(lines) for _, lines in a._appender._tails[LOG].window] if LOG in a._appender._tails else []
            assert sum(held) <= 5000
        await a.commit([Append(LOG, (line("large", "x" * 9000),))])
        assert await asyncio.to_thread(a._appender.fold, LOG)
        assert await b.read_log(LOG, strict=True) == bare([*written, line("large", "x" * 9000)])
        await check_whole(b)


async def test_an_append_of_which_others_met_a_part_is_not_told_as_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was taken out by somebody else meanwhile was there: "nothing was changed" would not be true."""
    async with nodes(2) as (a, b):
        await a.commit([Put(OWNER.key, b"{}"), Append(LOG, lines(1))])
        await a.commit([OWNER, Append(LOG, (line("before"),))])
        taken: list[object] = []

        async def truncate() -> None:
            taken.extend(await b.commit([Truncate(LOG, 1)]))

        async def remove() -> None:
            await b.delete(OWNER.key)
            meeting.then(truncate)  # before the seal, behind which the rest is taken out

        meeting = Meeting(monkeypatch, a, "create", "/segments/").then(remove)
        with pytest.raises(DurabilityError):
            await a.commit([OWNER, Append(LOG, (line("one"), line("two")))])
        assert meeting.happened == 2
        assert taken == [bare([line("two")])]
        assert ids(await b.read_log(LOG)) == ["m0", "before"]
        await check_whole(b)


async def test_what_comes_where_a_tree_is_moved_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is empty when it is looked at; then somebody appends there."""
    async with nodes(2) as (a, b):
        await a.commit([Put(OWNER.key, b"{}"), Append(LOG, lines(1))])
        target = "users/ann/other"
        log = target + LOG.removeprefix("users/ann/chat")
        meeting = Meeting(monkeypatch, a, "listed", "users/ann/chat").then(lambda: b.commit([Append(log, lines(3))]))
        with pytest.raises(ConflictError):
            await a.commit([OWNER, Move("users/ann/chat", target)])
        assert meeting.happened == 1
        assert len(await b.read_log(log)) == 3
        assert len(await b.read_log(LOG)) == 1
        assert await b.exists(OWNER.key)
        await check_whole(b)
