"""What a review of the store in S3 has found: orders that are rare, each shown once; the bucket is in memory."""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import MemoryStore

from flatfile_chat_database.backends.changes import (
    ABSENT,
    Absent,
    Append,
    Change,
    Delete,
    Edit,
    Move,
    Put,
    Quota,
    RemoveTree,
    Require,
    Truncate,
)
from flatfile_chat_database.backends.s3 import (
    S3Backend,
    appending,
    committing,
    composing,
    locking,
    objects,
    verifying,
)
from flatfile_chat_database.backends.s3.objects import Objects
from flatfile_chat_database.errors import (
    ConflictError,
    DurabilityError,
    IntegrityError,
    NotFoundError,
    StorageLimitExceeded,
    UnavailableError,
)
from flatfile_chat_database.testing.case import LOG, all_of, bare, ids, line, lines

from .s3_bucket import Bucket
from .s3_nodes import Chaos, Meeting, check_whole, memory, nodes, paths

OWNER = Require("users/ann/chat/session.json", "It")
CHAT = "users/ann/chat"


@pytest.fixture(autouse=True)
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """The medium of one test."""
    return memory(monkeypatch, tmp_path)


class Away:
    """Requests of a node that fail from some moment on."""

    def __init__(self, patches: pytest.MonkeyPatch, node: S3Backend, *methods: str) -> None:
        self.is_on = False
        for method in methods:
            patches.setattr(Objects, method, self._failing(getattr(Objects, method), node))

    def _failing(self, original: Any, node: S3Backend) -> Any:
        def request(objects: Objects, *arguments: Any, **more: Any) -> Any:
            if self.is_on and objects is node._objects:
                raise UnavailableError("away")
            return original(objects, *arguments, **more)

        return request


async def _abandon(patches: pytest.MonkeyPatch, node: S3Backend, changes: Sequence[Change], *, decided: bool) -> None:
    """Have a node die between locking and the end of a commit."""
    original = locking.Locks.decide

    def die(locks: locking.Locks, *arguments: Any) -> bool:
        if locks is not node._contents.locks:
            return original(locks, *arguments)
        if decided:
            original(locks, *arguments)
        raise SystemError

    with patches.context() as some:
        some.setattr(locking.Locks, "decide", die)
        with pytest.raises(DurabilityError):
            await node.commit(changes)


# --- what is said to the caller ------------------------------------------------------------------------------


@pytest.mark.parametrize("is_first", [True, False])
async def test_of_an_append_that_may_be_there_nobody_says_that_it_is_not(
    monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    async with nodes(2) as (a, b):
        await a.commit([Put(OWNER.key, b"{}")])
        if not is_first:
            await a.commit([OWNER, Append(LOG, lines(1))])
        away = Away(monkeypatch, a, "get", "head")
        create = Objects.create

        def lose_the_way(objects: Objects, path: str, *arguments: Any, **more: Any) -> Any:
            made = create(objects, path, *arguments, **more)
            away.is_on |= objects is a._objects
            return made

        monkeypatch.setattr(Objects, "create", lose_the_way)
        with pytest.raises(DurabilityError):
            await a.commit([OWNER, Append(LOG, (line("new"),))])
        assert ids(await b.read_log(LOG))[-1] == "new"
        away.is_on = False


async def test_of_a_commit_that_is_not_begun_nobody_says_that_it_may_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(2) as (a, b):
        await a.commit([Append(LOG, lines(3)), Put("k", b"1")])
        send, lost = Objects._send, ["/segments/", "/intents/"]

        def lose(objects: Objects, path: str, data: bytes, *rest: Any) -> str:
            made = send(objects, path, data, *rest)
            if objects is a._objects and lost and lost[0] in path:
                raise OSError("operation timed out")
            return made

        def blind(*arguments: Any) -> Any:
            raise UnavailableError("away")

        monkeypatch.setattr(Objects, "_send", lose)
        monkeypatch.setattr(Objects, "_own", blind)
        for _ in range(2):
            with pytest.raises(UnavailableError):  # and no DurabilityError
                await a.commit([Truncate(LOG, 1), Put("k", b"2")])
            lost.pop(0)
        assert await b.count_log(LOG) == 3 and await b.read("k") == b"1"
        assert len((await a.commit([Truncate(LOG, 1), Put("k", b"2")]))[0]) == 1  # type: ignore[arg-type]
        await check_whole(b)


# --- removing trees ------------------------------------------------------------------------------------------


async def test_what_is_moved_away_while_its_large_tree_is_removed_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(2) as (a, b):
        await a.commit([Put(f"{CHAT}/{number}", b"x") for number in range(70)])
        await a.write(f"{CHAT}/blob", b"y" * 400_000)
        meeting = Meeting(monkeypatch, a, "replace", f"{CHAT}/blob").then(lambda: b.commit([Move(CHAT, "trash/1")]))
        await a.commit([RemoveTree(CHAT)])
        assert meeting.happened
        await asyncio.to_thread(a._garbage.empty)
        assert await b.list_keys("users/") == []
        assert await b.read("trash/1/blob") == b"y" * 400_000
        await check_whole(b)


@pytest.mark.parametrize("many", [0, 70])
async def test_what_is_made_in_a_tree_before_its_owner_is_removed_goes_with_it(
    monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    async with nodes(2) as (a, b):
        await a.commit([Put(OWNER.key, b"{}"), *(Put(f"{CHAT}/{number}", b"x") for number in range(many))])
        made: list[object] = []

        async def make() -> None:
            made.extend(await b.commit([OWNER, Append(LOG, lines(1))]))

        meeting = Meeting(monkeypatch, a, "replace", OWNER.key).then(make)
        results = await asyncio.gather(a.commit([OWNER, RemoveTree(CHAT)]), return_exceptions=True)
        assert meeting.happened and made == [None, 1]
        assert not isinstance(results[0], BaseException), results
        assert await b.list_keys("users/") == []


async def test_a_large_tree_whose_removal_is_broken_off_can_be_removed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(2) as (a, b):
        await a.commit([Put(OWNER.key, b"{}"), *(Put(f"{CHAT}/{number}", b"x") for number in range(70))])
        away = Away(monkeypatch, a, "replace")
        meeting = Meeting(monkeypatch, a, "delete_once", f"{CHAT}/69").then(lambda: _turn(away, is_on=True))
        with pytest.raises(DurabilityError):
            await a.commit([OWNER, RemoveTree(CHAT)])
        assert meeting.happened and 0 < len(await b.list_keys("users/")) < 71
        await b.commit([OWNER, RemoveTree(CHAT)])
        assert await b.list_keys("users/") == []


async def _turn(away: Away, *, is_on: bool) -> None:
    away.is_on = is_on


async def test_a_log_that_two_begin_in_a_session_that_is_gone_goes_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(3) as (a, b, c):
        await a.commit([Put(OWNER.key, b"{}"), Put(f"{CHAT}/more.json", b"{}")])

        async def remove_and_append() -> None:
            await c.commit([OWNER, RemoveTree(CHAT)])

        async def go_on() -> None:
            """What B does that has seen the owner before."""
            monkeypatch.setattr(appending.Appender, "_able", lambda appender, asks: asks)
            with pytest.raises(NotFoundError):
                await b.commit([OWNER, Append(LOG, lines(1, 1))])

        first = Meeting(monkeypatch, a, "create", LOG).then(remove_and_append)
        second = Meeting(monkeypatch, a, "replace", LOG).then(go_on)  # when it takes its log back
        with pytest.raises(NotFoundError):
            await a.commit([OWNER, Append(LOG, lines(1))])
        assert first.happened and second.happened
        assert await c.list_keys("users/") == []


# --- what a dead process leaves ------------------------------------------------------------------------------


async def test_a_move_whose_process_died_keeps_nobody_from_moving_there(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(2) as (a, b):
        await a.commit([Put("trash/1/a", b"1"), Put("trash/1/b", b"2")])
        await _abandon(monkeypatch, a, [Move("trash/1", CHAT)], decided=False)
        assert await b.commit([Move("trash/1", CHAT)]) == [True]
        assert await b.read_many([f"{CHAT}/a", f"{CHAT}/b"]) == [b"1", b"2"]


async def test_sessions_whose_making_was_given_up_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    quota = Quota("users/ann", 1, "max")
    async with nodes(2) as (a, b):
        await _abandon(monkeypatch, a, [Put("users/ann/1/s", b"1"), Put("users/ann/1/t", b"1"), quota], decided=False)
        await b.commit([Put("users/ann/2/s", b"1", ABSENT), quota])


async def test_a_large_document_is_never_taken_for_its_lock(
    bucket: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    obstore.put(bucket, "d/large", b"x" * 1_900_000)
    async with nodes(2) as (a, b):
        await _abandon(monkeypatch, a, [Move("d", "e"), Put("f", b"1")], decided=False)
        assert b"".join(await all_of(b.read_blob("d/large"))) == b"x" * 1_900_000
        assert not await b.exists("e/large")


async def test_a_large_log_that_is_cut_into_parts_while_it_is_read_is_read_whole(
    bucket: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"".join(line(f"b{number}", "x" * 900) for number in range(3000))
    obstore.put(bucket, LOG, data)
    async with nodes(2) as (a, b):
        meeting = Meeting(monkeypatch, a, "stream", LOG).then(lambda: b.commit([Append(LOG, lines(1))]))
        found = b"".join(await all_of(a.read_blob(LOG)))
        assert meeting.happened and found == data + lines(1)[0]


async def test_what_a_lock_stands_for_changes_its_stamp_when_it_is_decided(
    bucket: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    obstore.put(bucket, "l.jsonl", lines(1)[0])
    async with nodes(2) as (a, b):
        seen: list[Any] = []
        original = locking.Locks.decide

        def look_and_die(locks: locking.Locks, *arguments: Any) -> bool:
            seen.append((b._contents.stamp("l.jsonl"), b._contents.look("l.jsonl", lambda log: log and log.identity)))
            original(locks, *arguments)
            raise SystemError

        with monkeypatch.context() as patches:
            patches.setattr(locking.Locks, "decide", look_and_die)
            with pytest.raises(DurabilityError):
                await a.commit([Put("l.jsonl", b"{}"), Put("k", b"1")])
        assert await b.read("l.jsonl") == b"{}"
        seen.append((b._contents.stamp("l.jsonl"), b._contents.look("l.jsonl", lambda log: log and log.identity)))
        assert seen[0][0] != seen[1][0] and seen[0][1] != seen[1][1]


async def test_a_lock_that_came_too_late_is_taken_away_by_a_repair(bucket: MemoryStore) -> None:
    from flatfile_chat_database.backends.s3.forms import locked

    obstore.put(bucket, "k", locked("nobody", None, b"x"))
    async with nodes(1) as (a,):
        assert await a.read("k") is None
        await a.verify(fix=True)
        assert await a.list_keys("") == []


# --- limits between nodes ------------------------------------------------------------------------------------


async def test_of_two_who_make_the_last_session_of_a_limit_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    quota = Quota("users/ann", 2, "max")
    async with nodes(2) as (a, b):
        await a.commit([Put("users/ann/1/s", b"1", ABSENT), quota])
        other: list[Change] = [Put("users/ann/3/s", b"1", ABSENT), quota]
        meeting = Meeting(monkeypatch, a, "create", "users/ann/2/s").then(lambda: b.commit(other))

        async def build_on_it() -> None:
            with pytest.raises(NotFoundError):
                await b.commit([Require("users/ann/2/s", "It"), Append("users/ann/2/l", lines(1))])

        going = Meeting(monkeypatch, a, "replace", "users/ann/2/s").then(build_on_it)
        with pytest.raises(StorageLimitExceeded):
            await a.commit([Put("users/ann/2/s", b"1", ABSENT), quota])
        assert meeting.happened and going.happened
        assert await b.list_keys("") == ["users/ann/1/s", "users/ann/3/s"]
        await b.commit([Delete("users/ann/3/s")])
        both = [Put(f"users/ann/{number}/s", b"2") for number in (1, 2)]
        await a.commit([*both, Put("users/ann/2/t", b"1"), quota])
        assert await b.read("users/ann/1/s") == b"2", "nobody waits for his own locks"


async def test_of_two_who_each_want_the_other_to_be_absent_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(2) as (a, b):
        meeting = Meeting(monkeypatch, a, "create", "note").then(lambda: b.commit([Put("store", b"1"), Absent("note")]))
        with pytest.raises(ConflictError):
            await a.commit([Put("note", b"1"), Absent("store")])
        assert meeting.happened and await a.list_keys("") == ["store"]


async def test_nothing_is_moved_into_a_folder_that_is_filled_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(2) as (a, b):
        await a.commit([Put("d/1", b"1")])
        meeting = Meeting(monkeypatch, a, "create", "/intents/").then(lambda: b.write("e/2", b"2"))
        with pytest.raises(ConflictError):
            await a.commit([Move("d", "e")])
        assert meeting.happened and await a.list_keys("") == ["d/1", "e/2"]


async def test_a_head_that_is_damaged_keeps_nobody_from_removing_it(bucket: MemoryStore) -> None:
    async with nodes(1) as (a,):
        for key in ("k", f"{CHAT}/damaged", f"{CHAT}/session.json"):
            obstore.put(bucket, key, b'{"chatdb":"log"')
        assert await a.commit([Move(CHAT, "trash/1")]) == [True]
        for key in ("k", "trash/1/damaged"):
            with pytest.raises(IntegrityError, match="remove it"):
                await a.read(key)
            with pytest.raises(IntegrityError, match="remove it"):
                await a.commit([Append(key, lines(1))])
        assert [problem.key for problem in await a.verify(fix=True)] == ["k", "trash/1/damaged", "trash/1/session.json"]
        assert await a.commit([RemoveTree("trash")]) == [["trash/1/damaged", "trash/1/session.json"]]
        assert await a.write("k", b"1") and await a.read("k") == b"1" and await a.delete("k")
        assert await a.list_keys("") == [] and await a.verify() == []


# --- blobs ---------------------------------------------------------------------------------------------------


async def _pieces(count: int, error: Exception | None = None) -> AsyncIterator[bytes]:
    for number in range(count):
        yield bytes([number]) * 1_000_000
    if error is not None:
        raise error


async def test_a_piece_of_a_blob_that_does_not_arrive_is_sent_again(
    bucket: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes(1) as (a,):
        await a.write("w", b"1")
        send, lost = Objects._send, 0

        def lose(objects: Objects, path: str, *rest: Any) -> str:
            nonlocal lost
            lost += "/parts/" in path
            if "/parts/" in path and lost == 2:
                raise OSError("operation timed out")
            return send(objects, path, *rest)

        monkeypatch.setattr(Objects, "_send", lose)
        assert await a.write_blob("blob", _pieces(9)) and lost == 3
        assert b"".join(await all_of(a.read_blob("blob"))) == b"".join(await all_of(_pieces(9)))
        assert not await a.write_blob("blob", _pieces(9)) and lost == 3
        with pytest.raises(ZeroDivisionError):
            await a.write_blob("other", _pieces(9, ZeroDivisionError()))
        await asyncio.to_thread(a._garbage.empty)
        assert len([path for path in paths(bucket) if "/parts/" in path]) == 2
        await check_whole(a)


async def test_what_nobody_needs_goes_also_while_nobody_has_time(
    bucket: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(S3Backend, "_idle", lambda backend: None)
    monkeypatch.setattr(composing, "_LINGER_SECONDS", 0)
    async with nodes(1) as (a,):
        for number in range(5):
            await a.write("doc", bytes([number]) * 400_000)
        assert len([path for path in paths(bucket) if "/parts/" in path]) == 1


# --- appends that meet a removal -----------------------------------------------------------------------------


async def test_an_append_whose_log_is_gone_with_all_that_was_known_of_it_is_not_denied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with nodes(2) as (a, b):
        await a.commit([Put(OWNER.key, b"{}"), Append(LOG, lines(1))])
        await a.commit([OWNER, Append(LOG, lines(1, 1))])

        async def move() -> None:
            await b.commit([OWNER, Move(CHAT, "trash/1")])
            await asyncio.to_thread(b._garbage.empty)

        meeting = Meeting(monkeypatch, a, "head", LOG).then(move)
        with pytest.raises(DurabilityError):
            await a.commit([OWNER, Append(LOG, lines(1, 2))])
        assert meeting.happened and ids(await b.read_log("trash/1/messages.jsonl")) == ["m0", "m1", "m2"]


async def test_an_append_to_half_a_log_whose_parts_go_meanwhile_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    whole_log = b"".join(line(f"b{number}", "x" * 500) for number in range(1500))
    async with nodes(2) as (a, b):
        await a.commit([Put(LOG, whole_log + b'{"half', ABSENT)])

        async def replace() -> None:
            await b.commit([Put(LOG, lines(1)[0])])
            await asyncio.to_thread(b._garbage.empty)

        meeting = Meeting(monkeypatch, a, "get_range", "/parts/").then(replace)
        assert await a.commit([Append(LOG, lines(1, 1))]) == [1]
        assert meeting.happened and await b.read_log(LOG) == bare(lines(2))


# --- many nodes at random, with sessions that come and go ----------------------------------------------------


class Users:
    """Nodes that make, delete, bring back and purge the same few sessions, and write to them."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.may_be_there: set[str] = set()
        self.acknowledged: set[str] = set()
        self.numbers = itertools.count()

    async def work(self, chaos: Chaos) -> None:
        """Be one node after another, as they die."""
        for _ in range(3):
            async with nodes(1) as (store,):
                for _ in range(30):
                    try:
                        await self._step(store)
                    except (ConflictError, NotFoundError, StorageLimitExceeded):
                        pass
                    except (UnavailableError, DurabilityError) as error:
                        assert "writer failed" not in str(error)
                        if store._objects in chaos.dead:
                            break

    async def _step(self, store: S3Backend) -> None:
        name, number = self.dice.choice("abcd"), next(self.numbers)
        chat, trash = f"users/ann/{name}", f"trash/{name}"
        owner, log = Require(f"{chat}/session.json", "It"), f"{chat}/log.jsonl"
        match self.dice.randrange(12):
            case 0 | 1 | 2 | 3:
                self.may_be_there.add(f"m{number}")
                try:
                    await store.commit([owner, Append(log, (line(f"m{number}"),))])
                except (NotFoundError, ConflictError, UnavailableError):  # which say that nothing was changed
                    self.may_be_there.remove(f"m{number}")
                    raise
                self.acknowledged.add(f"m{number}")
            case 4 | 5:
                made = Put(owner.key, b"%d" % number, ABSENT)
                await store.commit([made, Absent(chat), Quota("users/ann", 3, "max")])
            case 6:
                size = self.dice.choice([10, 400_000])
                await store.commit([owner, Put(f"{chat}/doc{number % 3}", b"x" * size)])
            case 7:
                await store.commit([owner, RemoveTree(chat)])
            case 8:
                await store.commit([owner, Move(chat, trash)])
            case 9:
                folders = await store.list_folders("users/ann")
                if len(folders) < 3:
                    await store.commit([Require(f"{trash}/session.json", "It"), Move(trash, chat)])
            case 10:
                await store.commit([RemoveTree(trash)])
            case _:
                page = await store.read_log(log, 0, 1)
                if page:
                    first = str(ids(page)[0])
                    await store.commit([owner, Edit(log, first, page[0], line(first, f"edited {number}"))])


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
async def test_sessions_that_come_and_go_keep_what_is_theirs(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(appending, "_FOLDED_AFTER", 4)
    monkeypatch.setattr(composing, "KEPT_RECORDS", 3)
    monkeypatch.setattr(composing, "_LINGER_SECONDS", 0.3)
    monkeypatch.setattr(committing, "_LOCKED_AT_ONCE", 2 if seed % 2 else 64)
    monkeypatch.setattr(objects, "obstore", Bucket())
    chaos, users = Chaos(monkeypatch, seed), Users(seed)
    await asyncio.gather(*(users.work(chaos) for _ in range(4)))
    chaos.is_over = True
    monkeypatch.setattr(verifying, "_ABANDONED", timedelta(seconds=-60))
    async with nodes(1) as (store,):
        await store.verify(fix=True)
        assert await store.verify() == []
        keys = await store.list_keys("")
        assert None not in await store.read_many(keys)
        there: list[str] = []
        for key in (key for key in keys if key.endswith("log.jsonl")):
            found = [str(each) for each in ids(await store.read_log(key))]
            there += found
            if f"{key.rpartition('/')[0]}/session.json" not in keys:
                assert not users.acknowledged.intersection(found), "an acknowledged message is in no session"
        assert len(set(there)) == len(there), "a message is there twice"
        assert set(there) <= users.may_be_there, "a message is there of which an error said that it is not"
