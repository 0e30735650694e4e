"""Nodes of one store in S3 that meet at chosen requests, die at any, and lose answers; the bucket is in memory.

What no server is needed for is shown here, in every order that matters; `test_s3.py` shows that a server does the same.
"""

import asyncio
import itertools
import random
import socket
import threading
from collections.abc import AsyncIterator, Awaitable
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import MemoryStore

from flatfile_chat_database.backends.changes import (
    ABSENT,
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
from flatfile_chat_database.backends.rules import version_of
from flatfile_chat_database.backends.s3 import S3Backend, appending, composing, faults, locking, verifying
from flatfile_chat_database.backends.s3.contents import Contents
from flatfile_chat_database.backends.s3.objects import Objects
from flatfile_chat_database.backends.s3.target import Target, target_of
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.errors import (
    ConfigurationError,
    ConflictError,
    DurabilityError,
    IntegrityError,
    NotFoundError,
    StorageError,
    StorageLimitExceeded,
    UnavailableError,
)
from flatfile_chat_database.testing.case import LOG, all_of, bare, ids, line, lines

from .s3_nodes import Chaos, Meeting, check_whole, memory, nodes, paths

pytestmark = pytest.mark.slow  # nothing in it depends on the version of Python, and a sample uses S3

OWNER = Require("users/ann/chat/session.json", "It")
OWN = "system/objects/"


@pytest.fixture(autouse=True)
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """The medium of one test."""
    return memory(monkeypatch, tmp_path)


# --- logs that are folded, closed and opened again -----------------------------------------------------------


async def test_a_fold_of_a_log_that_was_made_anew_removes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(3) as (a, b, c):
        for number in range(4):
            await a.commit([Append(LOG, lines(1, number))])
        await b.commit([Edit(LOG, "m0", lines(1)[0], line("m0", "new"))])
        meeting = Meeting(monkeypatch, a, "listed", "/segments/").then(lambda: b.commit([Append(LOG, lines(1, 10))]))
        await asyncio.to_thread(a._appender.fold, LOG)
        await b.commit([Append(LOG, lines(1, 11))])
        assert ids(await c.read_log(LOG)) == ["m0", "m1", "m2", "m3", *["m10"] * meeting.happened, "m11"]
        await check_whole(c)


async def test_a_log_that_is_open_again_is_not_opened_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(3) as (a, b, c):
        for number in range(2):
            await a.commit([Append(LOG, lines(1, number))])
        await asyncio.to_thread(a._contents.look, LOG, lambda log: log and a._appender.seal(log))
        await asyncio.to_thread(b._appender.tail, LOG)
        await a.commit([Append(LOG, lines(1, 2))])  # which opens it again
        meeting = Meeting(monkeypatch, b, "replace", LOG).then(lambda: a.commit([Append(LOG, lines(1, 3))]))
        await asyncio.to_thread(b._appender.reopen_now, LOG)
        assert not meeting.happened
        await a.commit([Append(LOG, lines(1, 3))])
        assert await c.read_log(LOG) == bare(lines(4))


async def test_a_fold_whose_answer_is_lost_removes_no_part_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(2) as (a, b):
        await a.commit([Append(LOG, lines(1))])
        await a.commit([Append(LOG, tuple(line(f"b{number}", "x" * 500) for number in range(1500)))])
        send = Objects._send
        lost: list[str] = []
        loop = asyncio.get_running_loop()

        def lose(objects: Objects, path: str, data: bytes, mode: Any, token: str) -> str:
            made = send(objects, path, data, mode, token)
            if objects is a._objects and path == LOG and not lost:
                lost.append(path)
                asyncio.run_coroutine_threadsafe(b.commit([Append(LOG, lines(1, 1))]), loop).result()
                b._appender.fold(LOG)
                raise OSError("timed out")
            return made

        monkeypatch.setattr(Objects, "_send", lose)
        with pytest.raises(DurabilityError):
            await asyncio.to_thread(a._appender.fold, LOG)
    async with nodes(1) as (c,):  # when what was not needed is gone
        assert await c.count_log(LOG) == len(await c.read_log(LOG, strict=True)) == 1502
        await check_whole(c)


async def test_a_log_that_cannot_be_folded_keeps_no_other_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appending, "_FOLDED_AFTER", 2)
    fold = appending.Appender.fold

    def refuse(appender: appending.Appender, key: str) -> bool:
        if key == "a.jsonl":
            raise IntegrityError("It is damaged.")
        return fold(appender, key)

    monkeypatch.setattr(appending.Appender, "fold", refuse)
    async with nodes(1) as (a,):
        for number in range(12):
            for key in ("a.jsonl", "b.jsonl"):
                assert await a.commit([Append(key, lines(1, number))]) == [1]
            await asyncio.to_thread(a._appender.fold_one)
            await asyncio.to_thread(a._appender.fold_one)
        assert a._appender._tails["b.jsonl"].through > 6


async def test_an_append_is_done_although_the_fold_behind_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appending, "_FOLDED_AT_ONCE", 2)

    def refuse(appender: appending.Appender, key: str) -> bool:
        raise UnavailableError("away")

    monkeypatch.setattr(appending.Appender, "fold", refuse)
    async with nodes(1) as (a,):
        for number in range(5):
            assert await a.commit([Append(LOG, lines(1, number))]) == [1]
        assert await a.read_log(LOG) == bare(lines(5))


# --- appenders who are slow ----------------------------------------------------------------------------------


async def test_a_message_that_is_taken_out_before_its_appender_has_looked_is_not_there_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with nodes(2) as (a, b):
        for number in range(2):
            await a.commit([Append(LOG, lines(1, number))])
        popped: list[object] = []

        async def pop() -> None:
            popped.extend(await b.commit([Truncate(LOG, 1)]))

        meeting = Meeting(monkeypatch, a, "head", LOG).then(pop)
        assert await a.commit([Append(LOG, lines(1, 2))]) == [1]
        assert meeting.happened and popped == [bare(lines(1, 2))]
        assert await b.read_log(LOG) == bare(lines(2))
        await check_whole(b)


async def test_lines_whose_log_is_edited_before_their_appender_has_looked_are_there_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with nodes(2) as (a, b):
        await a.commit([Append(LOG, lines(1))])
        await a.append(LOG, line("m1"))
        edit = Edit(LOG, "m0", lines(1)[0], line("m0", "new"))
        meeting = Meeting(monkeypatch, a, "head", LOG).then(lambda: b.commit([edit]))
        assert await a.append(LOG, line("raw"))
        assert meeting.happened
        assert ids(await b.read_log(LOG)) == ["m0", "m1", "raw"]


async def test_a_message_that_moves_away_with_its_log_is_not_in_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(2) as (a, b):
        await a.commit([Put(OWNER.key, b"{}"), Append(LOG, lines(1))])
        await a.commit([OWNER, Append(LOG, lines(1, 1))])
        move = Move("users/ann/chat", "trash/chat")
        meeting = Meeting(monkeypatch, a, "head", LOG).then(lambda: b.commit([OWNER, move]))
        assert await a.commit([OWNER, Append(LOG, lines(1, 2))]) == [None, 1]
        assert meeting.happened
        assert await b.read_log("trash/chat/messages.jsonl") == bare(lines(3))
        assert not await b.exists(LOG)
        with pytest.raises(NotFoundError):
            await a.commit([OWNER, Append(LOG, lines(1, 3))])


async def test_segments_of_those_who_are_late_mislead_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(3) as (a, b, c):
        for number in range(2):
            await a.commit([Append(LOG, lines(1, number))])
        for node in (b, c):
            await asyncio.to_thread(node._appender.tail, LOG)
        for number in range(2, 4):
            await a.commit([Append(LOG, lines(1, number))])
        await asyncio.to_thread(a._appender.fold, LOG)
        seen: list[list[str | None]] = []

        async def meet() -> None:
            await c.commit([Append(LOG, (line("c0"),))])
            seen.append(ids(await a.read_log(LOG, -4)))
            seen.append(ids(await a.read_log(LOG)))

        meeting = Meeting(monkeypatch, b, "head", LOG).then(meet)
        await b.commit([Append(LOG, (line("b0"),))])
        assert meeting.happened
        assert seen == [["m1", "m2", "m3", "c0"], ["m0", "m1", "m2", "m3", "c0"]]
        assert ids(await a.read_log(LOG, -5)) == ["m1", "m2", "m3", "c0", "b0"]
        await check_whole(a)


# --- commits of several keys ---------------------------------------------------------------------------------

BEFORE = {"a": b"old", "c": b"old", "d/1": b"moved", "d/l.jsonl": b"".join(lines(2)), LOG: b"".join(lines(2))}
AFTER = {"a": b"new", "b": b"new", "e/1": b"moved", "e/l.jsonl": b"".join(lines(2)), LOG: b"".join(lines(3))}
CHANGES: list[Change] = [
    Put("a", b"new", version_of(b"old")),
    Put("b", b"new", ABSENT),
    Delete("c"),
    Move("d", "e"),
    Append(LOG, lines(1, 2)),
]


async def _fill(store: S3Backend) -> None:
    for key, data in BEFORE.items():
        if key.endswith(".jsonl"):
            await store.commit([Append(key, lines(1))])
            await store.commit([Append(key, lines(1, 1))])
        else:
            await store.write(key, data)


async def _contents(store: S3Backend) -> dict[str, bytes]:
    keys = [key for key in {**BEFORE, **AFTER} if await store.exists(key)]
    return {key: data for key in keys if (data := await store.read(key)) is not None}


class Died(Exception):
    """What nobody handles."""


class Death:
    """The end of a node at its n-th request that writes."""

    def __init__(self, patches: pytest.MonkeyPatch, node: S3Backend, at: int, *, is_done: bool) -> None:
        self.count = 0
        self.is_over = False
        """Whether what is left of it may go in peace."""
        for method in ("_send", "delete", "delete_once"):
            original = getattr(Objects, method)
            patches.setattr(Objects, method, self._dying(original, node, at, is_done=is_done))

    def _dying(self, original: Any, node: S3Backend, at: int, *, is_done: bool) -> Any:
        def request(objects: Objects, *arguments: Any, **more: Any) -> Any:
            if objects is not node._objects:
                return original(objects, *arguments, **more)
            self.count += 1
            if self.count > at or (self.count == at and not is_done):
                raise UnavailableError("dead") if self.is_over else Died
            made = original(objects, *arguments, **more)
            if self.count == at:
                raise UnavailableError("dead") if self.is_over else Died
            return made

        return request


@pytest.mark.parametrize("is_done", [pytest.param(True, marks=pytest.mark.slow), False])
async def test_a_commit_whose_process_dies_at_any_request_is_there_or_not(
    monkeypatch: pytest.MonkeyPatch, is_done: bool
) -> None:
    outcomes = []
    for at in range(1, 100):
        bucket = MemoryStore()
        with monkeypatch.context() as patches:
            patches.setattr(Target, "client", lambda self, bucket=bucket, **_: bucket)
            async with nodes(2) as (a, b):
                await _fill(a)
                death = Death(patches, a, at, is_done=is_done)
                try:
                    await a.commit(CHANGES)
                except StorageError:
                    outcomes.append("died")
                else:
                    outcomes.append("done")
                death.is_over = True
                found = await _contents(b)
                assert found in (BEFORE, AFTER), at
                assert found == AFTER or outcomes[-1] == "died"
                async with nodes(1) as (c,):
                    assert await _contents(c) == found, "opening changes nothing that was seen"
                    for key in sorted({**BEFORE, **AFTER}):
                        if key.endswith(".jsonl"):
                            await c.commit([Append(key, (line("later"),))])
                        else:
                            await c.write(key, b"later")
                    assert await b.read("a") == b"later"
                    assert (await b.read_log(LOG))[-1] == line("later")[:-1]
                    assert await b.count_log(LOG) == (4 if found == AFTER else 3)
                    await c.verify(fix=True)
                    await check_whole(c)
            if death.count < at:
                break
    assert at > 15 and outcomes[0] == "died" and outcomes[-1] == "done"


async def test_a_commit_that_loses_any_answer_is_there_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for at in range(1, 100):
        bucket, count = MemoryStore(), 0
        with monkeypatch.context() as patches:
            patches.setattr(Target, "client", lambda self, bucket=bucket, **_: bucket)
            patches.setattr(Objects, "_pause", staticmethod(lambda attempt: None))
            async with nodes(2) as (a, b):
                await _fill(a)
                send = Objects._send

                def lose(objects: Objects, path: str, data: bytes, mode: Any, token: str) -> str:
                    nonlocal count
                    made = send(objects, path, data, mode, token)  # noqa: B023 - it is gone with the turn
                    count += objects is a._objects
                    if objects is a._objects and count == at:  # noqa: B023
                        raise OSError("operation timed out")
                    return made

                patches.setattr(Objects, "_send", lose)
                await a.commit(CHANGES)
                assert await _contents(b) == await _contents(a) == AFTER
                await check_whole(b)
        if count < at:
            break
    assert at > 10


async def test_a_commit_that_nobody_ends_is_told_and_given_up_when_it_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(2) as (a, b):
        await _fill(a)

        def die(*arguments: Any) -> bool:
            raise Died

        with monkeypatch.context() as patches:
            patches.setattr(locking.Locks, "decide", die)
            with pytest.raises(DurabilityError):
                await a.commit(CHANGES)
        found = await b.verify(fix=True)
        assert [(problem.kind, problem.fixed, problem.harmless) for problem in found] == [
            ("unfinished-commit", False, True)
        ]
        assert await _contents(b) == BEFORE
        monkeypatch.setattr(verifying, "_ABANDONED", timedelta(seconds=-60))
        assert ("unfinished-commit", True) in [(problem.kind, problem.fixed) for problem in await b.verify(fix=True)]
        assert await b.verify() == []
        assert await _contents(b) == BEFORE
        assert await b.list_keys("") == sorted(BEFORE)


async def test_opening_a_store_leaves_commits_that_are_under_way_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(1) as (a,):
        await a.commit([Put("a", b"1"), Put("b", b"1")])

        async def meet() -> None:
            async with nodes(1) as (c,):
                assert await c.read_many(["a", "b"]) == [b"1", b"1"]

        meeting = Meeting(monkeypatch, a, "replace", "/intents/").then(meet)
        await a.commit([Put("a", b"2"), Put("b", b"2")])
        await a.commit([Put("b", b"3")])
        assert meeting.happened and await a.read_many(["a", "b"]) == [b"2", b"3"]


async def test_what_could_not_be_ended_is_ended_later_and_takes_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(1) as (a,):
        await a.commit([Put("d/s.json", b"1"), Append("d/m.jsonl", lines(3))])
        with monkeypatch.context() as patches:

            def refuse(objects: Objects, some: Any) -> None:
                raise UnavailableError("away")

            patches.setattr(Objects, "delete", refuse)
            assert await a.commit([Move("d", "e")]) == [True]
        assert await a.commit([Append("e/m.jsonl", lines(2, 3))]) == [2]
        await a.write("e/s.json", b"2")
        async with nodes(1) as (c,):
            assert await c.list_keys("") == ["e/m.jsonl", "e/s.json"]
            assert await c.read("e/s.json") == b"2" and await c.count_log("e/m.jsonl") == 5
            assert await c.verify() == []


async def test_a_commit_that_loses_brings_nothing_back_that_the_winner_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(2) as (a, b):
        version = str((await a.commit([Put("meta", b"1"), Put("blob", b"x")]))[0])
        wins: list[Change] = [Put("meta", b"2", version), Delete("blob")]
        meeting = Meeting(monkeypatch, b, "create", "/intents/").then(lambda: a.commit(wins))
        with pytest.raises(ConflictError):
            await b.commit([Put("meta", b"3", version), Delete("blob")])
        assert meeting.happened
        assert await a.read_many(["meta", "blob"]) == [b"2", None]
        await check_whole(a)


async def test_of_two_who_move_the_same_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(2) as (a, b):
        await a.commit([Put(OWNER.key, b"1"), Append(LOG, lines(3))])
        first: list[Change] = [OWNER, Move("users/ann/chat", "trash/1")]
        meeting = Meeting(monkeypatch, b, "create", "/intents/").then(lambda: a.commit(first))
        with pytest.raises(NotFoundError):
            await b.commit([OWNER, Move("users/ann/chat", "trash/2")])
        assert meeting.happened
        assert await a.list_keys("") == ["trash/1/messages.jsonl", "trash/1/session.json"]


async def test_a_move_that_meets_a_change_takes_it_along_or_comes_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(2) as (a, b):
        await a.commit([Put(OWNER.key, b"1"), Append(LOG, lines(3))])
        await a.commit([Append(LOG, lines(2, 3))])

        async def meet() -> None:
            await b.commit([Put(OWNER.key, b"2", version_of(b"1"))])
            await b.commit([OWNER, Append(LOG, lines(1, 5))])

        meeting = Meeting(monkeypatch, a, "create", "/intents/").then(meet)
        assert await a.commit([OWNER, Move("users/ann/chat", "trash/1")]) == [None, True]
        assert meeting.happened
        assert await b.read("trash/1/session.json") == b"2"
        assert await b.read_log("trash/1/messages.jsonl") == bare(lines(6))
        assert await b.list_keys("users/") == []
        await check_whole(b)


async def test_what_is_made_where_something_is_just_moved_away_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(2) as (a, b):
        await a.write("k", b"1")
        going = Meeting(monkeypatch, a, "delete_once", "k").then(lambda: _soon(b.commit([Put("k", b"2", ABSENT)])))
        await a.commit([Move("k", "t")])
        for task in _tasks:
            await task
        assert going.happened and await b.read_many(["k", "t"]) == [b"2", b"1"]
        going.then(lambda: _soon(b.commit([Append("k", lines(1))])))
        assert await a.delete("k")
        for task in _tasks:
            await task
        assert going.happened == 2 and await a.read_log("k") == bare(lines(1))


async def test_what_was_not_removed_to_its_end_is_in_nobodys_way(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(2) as (a, b):
        await a.commit([Put("d/1", b"x"), Put("d/2", b"x"), Put("d/3", b"x")])

        def refuse(objects: Objects, path: str) -> None:
            raise UnavailableError("away")

        with monkeypatch.context() as patches:
            patches.setattr(Objects, "delete_once", refuse)
            assert await a.commit([RemoveTree("d")]) == [["d/1", "d/2", "d/3"]]
        assert await b.list_keys("") == [] and await b.read("d/1") is None
        await b.commit([Put("d/1", b"y", ABSENT)])
        assert await b.commit([Append("d/2", lines(1))]) == [1]
        assert await a.list_keys("") == ["d/1", "d/2"]
        monkeypatch.setattr(verifying, "_ABANDONED", timedelta(seconds=-60))
        assert await b.verify(fix=True) == []
        assert await b.list_children("d") == ["1", "2"]


_tasks: list["asyncio.Future[Any]"] = []


async def _soon(work: Awaitable[Any]) -> None:
    _tasks[:] = [asyncio.ensure_future(work)]
    await asyncio.sleep(0.05)


DELETIONS: dict[str, Change] = {"move": Move("users/ann/chat", "trash/1"), "remove": RemoveTree("users/ann/chat")}


@pytest.mark.parametrize("how", DELETIONS)
@pytest.mark.parametrize("words", ["/intents/", OWNER.key, LOG])
@pytest.mark.parametrize("method", ["create", "replace"])
async def test_nothing_is_made_in_a_session_that_is_deleted_meanwhile(
    monkeypatch: pytest.MonkeyPatch, how: str, words: str, method: str
) -> None:
    makes: dict[str, list[Change]] = {
        "the first message": [OWNER, Append("users/ann/chat/messages.jsonl", lines(1))],
        "a document": [OWNER, Put("users/ann/chat/new.json", b"x")],
        "two documents": [OWNER, Put("users/ann/chat/new.json", b"x"), Put("users/ann/chat/two.json", b"x")],
    }
    for what, changes in makes.items():
        async with nodes(2) as (a, b):
            await a.commit([Put(OWNER.key, b"{}"), Put("users/ann/chat/more.json", b"{}")])
            answers: list[object] = []

            async def meet(b: S3Backend = b, changes: list[Change] = changes, answers: list[object] = answers) -> None:
                task = asyncio.ensure_future(b.commit(changes))
                await asyncio.wait([task], timeout=0.05)  # it may have to wait for the end of the other one
                answers.append(task)

            with monkeypatch.context() as patches:
                meeting = Meeting(patches, a, method, words).then(meet)
                deleted = await asyncio.gather(a.commit([OWNER, DELETIONS[how]]), return_exceptions=True)
                results = await asyncio.gather(*answers, return_exceptions=True)  # type: ignore[call-overload]
            left = await a.list_keys("users/")
            if isinstance(deleted[0], BaseException):
                assert isinstance(deleted[0], StorageError)
            elif meeting.happened:
                assert left == [], (what, results)
                moved = await a.list_keys("trash/")
                is_made = not isinstance(results[0], BaseException)
                assert is_made == any(key.endswith(("messages.jsonl", "new.json")) for key in moved) or how == "remove"
            await a.commit([RemoveTree("users"), RemoveTree("trash")])
            await check_whole(a)


async def test_conditions_of_an_append_in_a_commit_are_those_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(2) as (a, b):
        await a.commit([Append(LOG, lines(5), 5, "max")])
        await asyncio.to_thread(a._appender.tail, LOG)
        await b.commit([Truncate(LOG, None)])
        assert (await a.commit([Put("s", b"1"), Append(LOG, lines(1), 5, "max")]))[1] == 1
        dup = Append(LOG, (line("dup", "other"),))
        meeting = Meeting(monkeypatch, a, "create", "/intents/").then(lambda: b.commit([dup]))
        with pytest.raises(StorageError, match="dup"):
            await a.commit([Put("s", b"2"), Append(LOG, (line("dup", "mine"),), 3, "max")])
        assert meeting.happened and await a.read("s") == b"1"
        with pytest.raises(StorageLimitExceeded):
            await a.commit([Put("s", b"2"), Append(LOG, lines(3, 5), 3, "max")])
        assert ids(await b.read_log(LOG)) == ["m0", "dup"]


async def test_a_large_tree_is_removed_and_what_others_make_there_meanwhile_as_well() -> None:
    async with nodes(2) as (a, b):
        for number in range(150):
            await a.write(f"t/{number:03d}", b"x")
        await a.commit([Append("t/log", lines(3))])
        [removed] = await b.commit([RemoveTree("t")])
        assert isinstance(removed, list) and len(removed) == 151
        assert await a.list_keys("") == []
        assert await a.list_folders("") in ([], ["t"])
        await check_whole(a)
    async with nodes(1) as (c,):
        assert await c.list_folders("") == []


# --- many nodes at random ------------------------------------------------------------------------------------


class Crowd:
    """Several nodes that append, take out, edit and move the same logs, and count in two documents at once."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.acknowledged: set[str] = set()
        self.unknown: set[str] = set()
        self.taken: list[str] = []
        self.may_be_taken = 0
        self.counted = self.may_be_counted = 0
        self.numbers = itertools.count()

    async def work(self, chaos: Chaos) -> None:
        """Be one node after another, as they die."""
        for _ in range(3):
            async with nodes(1) as (store,):
                for _ in range(25):
                    try:
                        await self._step(store)
                    except (ConflictError, NotFoundError):
                        pass
                    except (UnavailableError, DurabilityError):
                        if store._objects in chaos.dead:
                            break

    async def _step(self, store: S3Backend) -> None:
        home, away = self.dice.sample(["home", "away"], 2)
        log, owner = f"{home}/chat/log.jsonl", Require(f"{home}/chat/owner", "It")
        match self.dice.randrange(10):
            case 0 | 1 | 2 | 3 | 4:
                names = [f"n{next(self.numbers)}" for _ in range(self.dice.choice([1, 1, 3]))]
                self.unknown |= set(names)
                try:
                    await store.commit([owner, Append(log, tuple(line(name) for name in names))])
                except (NotFoundError, ConflictError, UnavailableError):  # which say that nothing was changed
                    self.unknown -= set(names)
                    raise
                self.acknowledged |= set(names)
            case 5:
                self.may_be_taken += 1
                [taken] = await store.commit([Truncate(log, 1)])
                self.may_be_taken -= 1
                assert isinstance(taken, list)
                self.taken += [str(each) for each in ids([each for each in taken if isinstance(each, bytes)])]
            case 6:
                page = await store.read_log(log, 0, 1)
                if page:
                    name = str(ids(page)[0])
                    await store.commit([Edit(log, name, page[0], line(name, f"edited {next(self.numbers)}"))])
            case 7:
                await store.commit([owner, Move(f"{home}/chat", f"{away}/chat")])
            case _:
                one, two = await store.read_many(["one", "two"])
                assert one is not None and two is not None
                more = str(int(one) + 1).encode()
                self.may_be_counted += 1
                try:
                    await store.commit([Put("one", more, version_of(one)), Put("two", more, version_of(one))])
                except ConflictError:
                    self.may_be_counted -= 1
                    raise
                self.counted += 1
                self.may_be_counted -= 1


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 12))])
async def test_a_crowd_loses_nothing_and_does_nothing_twice(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(appending, "_FOLDED_AFTER", 4)
    monkeypatch.setattr(composing, "KEPT_RECORDS", 3)
    monkeypatch.setattr(composing, "_LINGER_SECONDS", 0.3)
    async with nodes(1) as (a,):
        await a.commit([Put("home/chat/owner", b"{}"), Put("one", b"0"), Put("two", b"0")])
    chaos, crowd = Chaos(monkeypatch, seed), Crowd(seed)
    await asyncio.gather(*(crowd.work(chaos) for _ in range(4)))
    chaos.is_over = True
    async with nodes(1) as (store,):
        await store.verify(fix=True)
        found = [each for side in ("home", "away") for each in ids(await store.read_log(f"{side}/chat/log.jsonl"))]
        there = [str(each) for each in found]
        assert len(set(there)) == len(there), "a message is there twice"
        assert len(set(crowd.taken)) == len(crowd.taken) and not set(crowd.taken) & set(there)
        lost = crowd.acknowledged - set(there) - set(crowd.taken)
        assert len(lost) <= crowd.may_be_taken, f"lost: {sorted(lost)}"
        assert set(there) | set(crowd.taken) <= crowd.unknown
        owners = [side for side in ("home", "away") if await store.exists(f"{side}/chat/owner")]
        assert len(owners) == 1
        one, two = await store.read_many(["one", "two"])
        assert one == two and crowd.counted <= int(one or 0) <= crowd.counted + crowd.may_be_counted
        await store.commit([Put("one", b"x"), Put("two", b"x")])
        await check_whole(store)


# --- parts, blobs and what is left over ----------------------------------------------------------------------


async def test_a_put_that_arrives_late_finds_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[tuple[Any, ...]] = []
    async with nodes(1) as (a,):
        await a.write("x", b"1")
        send = Objects._send

        def lose(objects: Objects, path: str, *rest: Any) -> str:
            if path == "doc":
                late.append((path, *rest))
                raise OSError("operation timed out" if len(late) == 1 else "tcp connect error")
            return send(objects, path, *rest)

        with monkeypatch.context() as patches:
            patches.setattr(Objects, "_send", lose)
            patches.setattr(Objects, "_pause", staticmethod(lambda attempt: None))
            with pytest.raises(DurabilityError):
                await a.commit([Put("doc", b"y" * 400_000)])
        await asyncio.to_thread(send, a._objects, *late[0])
    async with nodes(1) as (c,):
        assert await c.read("doc") == b"y" * 400_000


async def test_a_blob_whose_caller_leaves_is_there_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(1) as (a,):
        await a.write("w", b"1")
        reached, loop = asyncio.Event(), asyncio.get_running_loop()

        async def leave() -> None:
            reached.set()
            task.cancel()
            await asyncio.sleep(0)

        Meeting(monkeypatch, a, "create", "blob").then(leave)
        task = loop.create_task(a.write_blob("blob", _many(30)))
        await reached.wait()
        await asyncio.wait([task])
        await a.write("w", b"2")
        there = await a.exists("blob")
    async with nodes(1) as (c,):
        assert await c.exists("blob") is there
        if there:
            assert len(b"".join(await all_of(c.read_blob("blob")))) == 3_000_000


async def _many(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x" * 100_000


async def test_a_reader_who_leaves_while_a_chunk_comes_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(1) as (a,):
        await a.write("doc", b"y" * 9_000_000)
        chunks, loop, reached = Objects._chunks, asyncio.get_running_loop(), asyncio.Event()
        go = threading.Event()

        def slow(objects: Objects, *arguments: Any) -> Any:
            for chunk in chunks(objects, *arguments):
                loop.call_soon_threadsafe(reached.set)
                go.wait(5)
                yield chunk

        monkeypatch.setattr(Objects, "_chunks", slow)
        task = loop.create_task(all_of(a.read_blob("doc")))
        await reached.wait()
        task.cancel()
        loop.call_later(0.05, go.set)
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("what", ["segment", "manifest"])
async def test_a_repair_removes_nothing_while_something_is_damaged(
    bucket: MemoryStore, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(verifying, "_ABANDONED", timedelta(seconds=-60))
    async with nodes(2) as (a, b):
        await a.write("doc", b"y" * 9_000_000)
        await a.commit([Append(LOG, lines(1))])
        for number in range(1, 6):
            await a.commit([Append(LOG, tuple(line(f"m{number}-{each}") for each in range(120)))])
        if what == "segment":
            obstore.delete(bucket, [path for path in paths(bucket) if "/segments/" in path][2])
        else:
            obstore.put(bucket, "doc", b'{"chatdb":"bytes", damaged')
        before = paths(bucket)
        found = await b.verify(fix=True)
        assert [problem.kind for problem in found if not problem.harmless] == ["damaged-object"]
        assert not any(problem.fixed for problem in found)
        assert paths(bucket) == before


async def test_a_repair_removes_nothing_that_is_moved_meanwhile(
    bucket: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "_ABANDONED", timedelta(seconds=-60))
    monkeypatch.setattr(composing, "KEPT_RECORDS", 10)
    listed, loop = Contents.listed, asyncio.get_running_loop()
    async with nodes(2) as (a, b):
        await a.commit([Put(OWNER.key, b"{}"), Append(LOG, tuple(line(f"a{number}") for number in range(500)))])
        await a.commit([Append(LOG, (line("last"),))])
        await asyncio.to_thread(a._appender.fold, LOG)
        await a.write("blob", b"x" * 400_000)

        def moving(contents: Contents, prefix: str) -> Any:
            if contents is not b._contents or prefix:
                yield from listed(contents, prefix)
                return
            yield [each for run in listed(contents, "system/") for each in run]
            move = a.commit([Move("users/ann", "system/trash/1/users/ann")])
            asyncio.run_coroutine_threadsafe(move, loop).result()
            yield [each for run in listed(contents, "users/") for each in run]
            yield [each for run in listed(contents, "blob") for each in run]

        with monkeypatch.context() as patches:
            patches.setattr(Contents, "listed", moving)
            await b.verify(fix=True)
        assert await b.count_log(f"system/trash/1/{LOG}") == len(await b.read_log(f"system/trash/1/{LOG}")) == 501
        assert await b.read("blob") == b"x" * 400_000
        await check_whole(b)


async def test_an_intent_that_is_damaged_is_told_and_hinders_nobody(bucket: MemoryStore) -> None:
    obstore.put(bucket, f"{OWN}intents/x", b"junk")
    async with nodes(1) as (a,):
        assert await a.write("k", b"1")
        [problem] = await a.verify()
        assert (problem.kind, problem.key) == ("damaged-object", f"{OWN}intents/x")


async def test_bytes_of_a_part_that_are_others_are_noticed(bucket: MemoryStore) -> None:
    async with nodes(1) as (a,):
        await a.commit([Append(LOG, tuple(line(f"m{number}") for number in range(500)))])
        await a.commit([Append(LOG, (line("last"),))])
        await asyncio.to_thread(a._appender.fold, LOG)
        part = next(path for path in paths(bucket) if "/parts/" in path)
        data = bytes(obstore.get(bucket, part).bytes())
        obstore.put(bucket, part, data.replace(b'"m7"', b'"n7"'))
        with pytest.raises(IntegrityError, match=part):
            await a.read(LOG)
        assert [problem.kind for problem in await a.verify()] == ["damaged-object"]


async def test_logs_that_somebody_else_wrote_are_read_whatever_their_size() -> None:
    whole = b"".join(line(f"b{number}", "x" * 500) for number in range(1500))
    async with nodes(1) as (a,):
        for key, data in ((LOG, whole + b'{"half'), ("other/free.jsonl", whole), ("small.jsonl", whole[:5000])):
            await a.commit([Put(key, data, ABSENT)])
            expected = bare([each + b"\n" for each in data.split(b"\n")[:-1]])
            assert await a.count_log(key) == len(expected)
            assert await a.read_log(key) == expected and await a.read_log(key, -5) == expected[-5:]
            assert await a.read_log(key, 3, 7) == expected[3:7]
            assert [each for run in await all_of(a.stream_log(key)) for each in run] == expected
            assert await a.find_record(key, "b3") == (3, expected[3])
            assert await a.read(key) == data
        assert await a.commit([Append(LOG, lines(1))]) == [1]
        assert await a.read(LOG) == whole + lines(1)[0]
        await a.commit([Put("lines of no log", (b"x" * 9999 + b"\n") * 40)])
        assert await a.read_log("lines of no log") == []
        await check_whole(a)


async def test_a_record_is_changed_where_it_is_and_the_other_parts_stay(bucket: MemoryStore) -> None:
    written = [line(f"m{number}", "x" * 900) for number in range(12_000)]
    async with nodes(2) as (a, b):
        for start in range(0, 12_000, 3000):
            await a.commit([Append(LOG, tuple(written[start : start + 3000]))])
        await asyncio.to_thread(a._appender.fold, LOG)
        await a.commit([Append(LOG, (line("tail"),))])
        written.append(line("tail"))
        for number in (0, 5000, 11_800, 11_950, 12_000):
            before, sent = set(paths(bucket)), a.statistics()["bytes_out"]
            name = ids([written[number]])[0]
            new = line(str(name), f"changed {number}")
            assert await a.commit([Edit(LOG, str(name), written[number], new)]) == [None]
            written[number] = new
            assert a.statistics()["bytes_out"] - sent < 5 << 20
            assert len([path for path in set(paths(bucket)) - before if "/parts/" in path]) <= 2
        await a.commit([Edit(LOG, "m7", written[7], None)])
        del written[7]
        assert await b.read_log(LOG, strict=True) == bare(written)
        assert await b.read_log(LOG, 5990, 6010) == bare(written[5990:6010])
        assert await b.find_record(LOG, "m9000") == (8999, written[8999][:-1])
        with pytest.raises(ConflictError):
            await a.commit([Edit(LOG, "m9", line("m9", "as it was not"), None)])
        with pytest.raises(NotFoundError):
            await a.commit([Edit(LOG, "m7", line("m7"), None)])
        await check_whole(b)


async def test_a_part_that_goes_while_it_is_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(1) as (a,):
        await a.write("doc", b"y" * 9_000_000)
        stream = a.read_blob("doc")
        assert await anext(stream)
        await a.delete("doc")
        await asyncio.to_thread(a._garbage.empty)
        with pytest.raises(UnavailableError, match="while it was read"):
            await all_of(stream)


async def test_large_objects_that_others_put_there_are_moved(bucket: MemoryStore) -> None:
    data = b"".join(line(f"b{number}", "x" * 900) for number in range(4000))
    obstore.put(bucket, "d/large", data)
    obstore.put(bucket, "d/other", b"x" * 3_000_000)
    async with nodes(1) as (a,):
        assert await a.exists("d/large")
        assert await a.commit([Move("d", "e"), Put("f", b"1")]) == [True, version_of(b"1")]
        assert await a.read("e/large") == data and await a.count_log("e/large") == 4000
        assert await a.read("e/other") == b"x" * 3_000_000
        await check_whole(a)


# --- what a client says of its failures ----------------------------------------------------------------------


class _Answers(BaseHTTPRequestHandler):
    """A server that has nothing, whatever it is asked for."""

    def do_GET(self) -> None:
        self._say(416 if self.headers.get("Range") else 404, b"<Error><Code>NoSuchBucket</Code></Error>")

    def do_HEAD(self) -> None:
        self._say(404, b"")

    def _say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


def test_failures_are_told_apart_whatever_the_key_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"s3://bucket/x?endpoint=http://127.0.0.1:{silent.getsockname()[1]}"
        client = target_of(StorageConfig(storage_url=url, object_store_timeout_seconds=0.2)).client()
        for key in ("a", "users/ConnectError/a", "users/credential/a", "dns error", "169.254.169.254"):
            with pytest.raises(Exception) as caught:
                obstore.put(client, key, b"1", mode="create", use_multipart=False)
            assert faults.was_sent(caught.value), key
            assert "in time" in str(faults.told(caught.value, "place")), key
    with pytest.raises(Exception) as caught:
        obstore.put(client, "a", b"1", mode="create", use_multipart=False)
    assert not faults.was_sent(caught.value)


def test_a_bucket_that_is_gone_is_not_taken_for_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"s3://bucket/x?endpoint=http://127.0.0.1:{server.server_port}"
        objects = Objects(target_of(StorageConfig(storage_url=url)), 0, "probes")
        with pytest.raises(ConfigurationError, match="does not exist"):
            objects.head("a")
        with pytest.raises(ConfigurationError, match="does not exist"):
            objects.get("a")
        assert objects.get_range("a", 10, 5) == b"", "there is nothing so far behind"
    finally:
        server.shutdown()
        server.server_close()
