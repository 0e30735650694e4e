"""Watching: each new message once and in order, from a cursor, whatever happens to the log and to whoever watches."""

import asyncio
import gc
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Hashable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from flatfile_chat_database import (
    BEGINNING,
    Arrival,
    ClosedError,
    ConflictError,
    Message,
    PlaceLostError,
    StorageConfig,
    StorageManager,
    UnavailableError,
    ValidationError,
)
from flatfile_chat_database.backends import lookout
from flatfile_chat_database.backends.lookout import Lookout
from flatfile_chat_database.backends.threaded import ThreadedBackend
from flatfile_chat_database.backends.waking import Waking
from flatfile_chat_database.records import following, watching
from flatfile_chat_database.records.cursors import CHECKS, START, Spot, check_of, decode, encode, name_of, scope_of
from flatfile_chat_database.records.following import LogFollowing, UserFollowing
from flatfile_chat_database.records.messages import session_log
from flatfile_chat_database.records.watching import Watch

from .conftest import MakeStorage

USER = "ada"

T = TypeVar("T")


@pytest.fixture
async def session(storage: StorageManager) -> str:
    """Make a session of `ada` with the messages m0 to m9."""
    await storage.create_user(USER)
    session_id = await storage.create_session(USER, session_id="chat")
    await add(storage, session_id, *(f"m{n}" for n in range(10)))
    return session_id


async def add(storage: StorageManager, session_id: str, *names: str) -> None:
    await storage.add_messages(USER, session_id, [Message("user", name, id=name) for name in names])


async def take(watch: Watch, count: int) -> list[Arrival]:
    """Return the next messages that are delivered."""
    return [await asyncio.wait_for(anext(watch), 60) for _ in range(count)]


class Alone:
    """Looks that are shared with nobody."""

    def __init__(self, storage: StorageManager) -> None:
        self._backend = storage.backend

    async def read(self, key: str, start: int, stop: int) -> list[bytes]:
        return await self._backend.read_log(key, start, stop)

    async def once(self, what: Hashable, look: Callable[[], Awaitable[T]]) -> T:
        return await look()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody wait long for the second look at a place that is lost."""
    monkeypatch.setattr(following, "_LOST_SECONDS", 0.001)


@pytest.fixture
def unreminded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody look who was not woken."""
    monkeypatch.setattr(watching, "_LOOK_ANYWAY_SECONDS", 3600.0)
    monkeypatch.setattr(watching, "_LOOK_AT_ALL_SECONDS", 3600.0)


def ids(arrivals: list[Arrival]) -> list[str]:
    return [arrival.message.id for arrival in arrivals]


def names(start: int, stop: int) -> list[str]:
    return [f"m{number}" for number in range(start, stop)]


async def settled(condition: Callable[[], bool]) -> None:
    """Wait for something that is about to be so."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - what is waited for knows no event of ours
            await asyncio.sleep(0.01)


def watching_tasks() -> list[str]:
    """Return the tasks and threads that are there because somebody watches."""
    tasks = [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("chatdb")]
    return tasks + [thread.name for thread in threading.enumerate() if thread.name == "chatdb-lookout"]


# --- where it begins -----------------------------------------------------------------------------------


async def test_it_begins_with_what_comes(storage: StorageManager, session: str) -> None:
    async with storage.watch_session(USER, session) as watch:
        await add(storage, session, "n1", "n2")
        first, second = await take(watch, 2)
        await add(storage, session, "n3")
        [third] = await take(watch, 1)
    assert ids([first, second, third]) == ["n1", "n2", "n3"]
    assert (first.session_id, first.panel_id, first.message.content) == (session, None, "n1")


@pytest.mark.parametrize(
    ("last", "expected"), [(1, names(9, 10)), (4, names(6, 10)), (10, names(0, 10)), (99, names(0, 10))]
)
async def test_it_begins_with_the_last_messages_if_these_are_wanted(
    storage: StorageManager, session: str, last: int, expected: list[str]
) -> None:
    watch = storage.watch_session(USER, session, last=last)
    assert ids(await take(watch, len(expected))) == expected
    await add(storage, session, "n1")
    assert ids(await take(watch, 1)) == ["n1"]


async def test_it_goes_on_behind_every_cursor(storage: StorageManager, session: str, make_storage: MakeStorage) -> None:
    arrivals = await take(storage.watch_session(USER, session, cursor=BEGINNING), 10)
    assert ids(arrivals) == names(0, 10)
    other = make_storage()
    await add(other, session, "n")
    for number, arrival in enumerate(arrivals):
        assert len(arrival.cursor) < 100 and arrival.cursor.isprintable()
        watch = other.watch_session(USER, session, cursor=arrival.cursor)
        assert ids(await take(watch, 10 - number)) == [*names(number + 1, 10), "n"]


async def test_a_watch_that_delivered_nothing_has_a_cursor(storage: StorageManager, session: str) -> None:
    watch = storage.watch_session(USER, session)
    assert storage.watch_session(USER, session).cursor is None
    async with watch:
        cursor = watch.cursor
    assert cursor is not None
    await add(storage, session, "n1")
    again = storage.watch_session(USER, session, cursor=cursor)
    assert again.cursor == cursor
    [arrival] = await take(again, 1)
    assert arrival.message.id == "n1" and again.cursor == arrival.cursor


async def test_the_cursor_of_a_watch_is_behind_what_was_delivered_and_not_behind_what_was_read(
    storage: StorageManager, session: str
) -> None:
    watch = storage.watch_session(USER, session, cursor=BEGINNING)
    for number in range(10):
        [arrival] = await take(watch, 1)
        assert watch.cursor == arrival.cursor
        assert ids(await take(storage.watch_session(USER, session, cursor=watch.cursor), 9 - number)) == names(
            number + 1, 10
        )


async def test_what_is_not_there_yet_is_waited_for(make_storage: MakeStorage) -> None:
    reader, writer = make_storage(read_only=True, watch_poll_seconds=0.02), make_storage()
    one = reader.watch_session(USER, "chat")
    every = reader.watch_user(USER)
    cursors = []
    for watch in (one, every):
        async with asyncio.timeout(60):
            await watch.__aenter__()
        cursors.append(watch.cursor)
    await writer.create_user(USER)
    await writer.create_session(USER, session_id="chat")
    await add(writer, "chat", "m0", "m1")
    for watch in (one, every):
        assert ids(await take(watch, 2)) == ["m0", "m1"]
    assert ids(await take(reader.watch_session(USER, "chat", cursor=cursors[0]), 2)) == ["m0", "m1"]
    assert ids(await take(reader.watch_user(USER, cursor=cursors[1]), 2)) == ["m0", "m1"]


async def test_what_came_to_a_watch_that_began_before_the_store_can_be_gone_on_from(make_storage: MakeStorage) -> None:
    reader, writer = make_storage(read_only=True, watch_poll_seconds=0.02), make_storage()
    one, every = reader.watch_session(USER, "chat"), reader.watch_user(USER)
    async with one, every:
        await writer.create_user(USER)
        await writer.create_session(USER, session_id="chat")
        await add(writer, "chat", "m0", "m1")
        cursors = [[arrival.cursor for arrival in await take(watch, 2)] for watch in (one, every)]
        for watch, its in zip((one, every), cursors, strict=True):
            assert watch.cursor == its[1]
    for number, expected in enumerate((["m1", "m2"], ["m2"])):
        if not number:
            await add(writer, "chat", "m2")
        assert ids(await take(writer.watch_session(USER, "chat", cursor=cursors[0][number]), len(expected))) == expected
        assert ids(await take(writer.watch_user(USER, cursor=cursors[1][number]), len(expected))) == expected


async def test_a_panel_is_watched_like_a_session(storage: StorageManager) -> None:
    panel = await storage.create_panel("debate", ["critic"])
    await storage.add_panel_message(panel, Message("critic", "one", id="m0"))
    async with storage.watch_panel(panel, last=1) as watch:
        await storage.add_panel_message(panel, Message("critic", "two", id="m1"))
        arrivals = await take(watch, 2)
    assert ids(arrivals) == ["m0", "m1"]
    assert (arrivals[0].session_id, arrivals[0].panel_id) == (None, panel)
    assert ids(await take(storage.watch_panel(panel, cursor=arrivals[0].cursor), 1)) == ["m1"]


# --- what happens to the log ---------------------------------------------------------------------------


@pytest.mark.parametrize("is_away", [False, True], ids=["watching", "away"])
@pytest.mark.parametrize("of_all", [False, True], ids=["session", "user"])
async def test_changes_before_the_cursor_repeat_and_skip_nothing(
    storage: StorageManager, session: str, *, is_away: bool, of_all: bool
) -> None:
    def begin(cursor: str | None) -> Watch:
        if of_all:
            return storage.watch_user(USER, cursor=cursor)
        return storage.watch_session(USER, session, cursor=cursor)

    watch = begin(None)
    await watch.__aenter__()
    last = 0

    async def expect(*new: str) -> None:
        nonlocal watch, last
        last += 1
        if is_away:
            await watch.aclose()
        await add(storage, session, *new, f"end{last}")
        if is_away:
            watch = begin(watch.cursor)
        assert ids(await take(watch, len(new) + 1)) == [*new, f"end{last}"]

    await expect("n1", "n2")
    await storage.delete_message(USER, session, "m3")
    await expect("n3")
    await storage.update_message(USER, session, "n3", {"content": "another"})
    await storage.update_message(USER, session, "m0", {"content": "another"})
    await expect()
    for name in ("m0", "m1", "n1", "n2"):
        await storage.delete_message(USER, session, name)
    await expect("n4")
    for _ in range(3):
        await storage.pop_message(USER, session)
    await expect("n5", "n6")
    await storage.delete_message(USER, session, "end6")
    await expect()
    await storage.pop_message(USER, session)
    await expect()


async def test_the_answer_that_is_made_anew_comes_also_to_who_began_just_now(
    storage: StorageManager, session: str
) -> None:
    for watch in (storage.watch_session(USER, session), storage.watch_user(USER)):
        async with watch:
            newest = await storage.pop_message(USER, session)
            assert newest is not None
            await add(storage, session, f"{newest.id}x")
            assert ids(await take(watch, 1)) == [f"{newest.id}x"]


@pytest.mark.parametrize("is_away", [False, True], ids=["watching", "away"])
@pytest.mark.parametrize("what", ["cleared", "cleared and filled", "cut", "made anew"])
async def test_a_log_whose_place_is_lost_says_so_and_begins_again(
    storage: StorageManager, session: str, what: str, *, is_away: bool
) -> None:
    await add(storage, session, *names(10, 20))
    watch = storage.watch_session(USER, session, cursor=BEGINNING)
    await take(watch, 20)
    if is_away:
        await watch.aclose()
    left = []
    if what == "cut":
        left = names(0, 20 - CHECKS)
        for _ in range(CHECKS):
            await storage.pop_message(USER, session)
        await add(storage, session, "n1")
        left.append("n1")
    elif what == "made anew":
        await storage.delete_session(USER, session)
        await storage.create_session(USER, session_id=session)
    else:
        await storage.clear_messages(USER, session)
    if what == "cleared and filled":
        left = [f"n{number}" for number in range(30)]
        await add(storage, session, *left)
    if is_away:
        watch = storage.watch_session(USER, session, cursor=watch.cursor)
    for _ in range(2):  # asked again it says the same
        with pytest.raises(PlaceLostError, match="cleared, cut or made anew") as lost:
            await take(watch, 1)
        assert "'chat' of user 'ada'" in str(lost.value) and lost.value.key == "users/ada/chat/messages.jsonl"
    again = storage.watch_session(USER, session, cursor=lost.value.cursor)
    await add(storage, session, "end")
    assert ids(await take(again, len(left) + 1)) == [*left, "end"]


async def test_one_session_that_is_lost_does_not_begin_the_others_again(storage: StorageManager, session: str) -> None:
    await storage.create_session(USER, session_id="other")
    await add(storage, "other", "o1", "o2")
    watch = storage.watch_user(USER, cursor=BEGINNING)
    assert sorted(ids(await take(watch, 12))) == sorted([*names(0, 10), "o1", "o2"])
    await storage.clear_messages(USER, session)
    await add(storage, session, "n1")
    with pytest.raises(PlaceLostError, match="'chat'") as lost:
        await take(watch, 1)
    again = storage.watch_user(USER, cursor=lost.value.cursor)
    assert ids(await take(again, 1)) == ["n1"]
    await add(storage, "other", "o3")
    assert ids(await take(again, 1)) == ["o3"]


async def test_a_message_that_is_taken_back_and_added_again_hides_none_before_it(
    storage: StorageManager, session: str
) -> None:
    watches = [storage.watch_session(USER, session), storage.watch_user(USER)]
    for watch in watches:
        async with watch:
            pass
    await storage.pop_message(USER, session)
    await add(storage, session, "n1", "m9", "n2")
    for again in (
        storage.watch_session(USER, session, cursor=watches[0].cursor),
        storage.watch_user(USER, cursor=watches[1].cursor),
    ):
        assert ids(await take(again, 3)) == ["n1", "m9", "n2"]


@pytest.mark.parametrize("removed", range(1, 12))
async def test_a_place_that_was_found_again_has_all_its_checks(
    storage: StorageManager, session: str, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    monkeypatch.setattr(following, "_NEAR", 4)
    monkeypatch.setattr(following, "_RUN", 3)
    await add(storage, session, *names(10, 30))
    follower = LogFollowing(storage._store, storage._messages, session_log(USER, session))
    await follower.begin(Alone(storage), None, 0)
    for number in range(removed):
        await storage.delete_message(USER, session, f"m{number}")
    assert await follower.more() == []
    assert follower._spot.position == 30 - removed and len(follower._spot.checks) == CHECKS


async def test_a_place_that_is_not_found_is_looked_for_once_more(
    storage: StorageManager, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with storage.watch_session(USER, session) as watch:
        real, is_late = storage.backend.read_log, True

        async def late(key: str, start: int = 0, stop: int | None = None, *, strict: bool = False) -> list[bytes]:
            return [] if is_late else await real(key, start, stop, strict=strict)

        async def arrive(seconds: float) -> None:
            nonlocal is_late
            is_late = False

        monkeypatch.setattr(storage.backend, "read_log", late)
        monkeypatch.setattr(asyncio, "sleep", arrive)
        try:
            await add(storage, session, "n1")
            assert (await anext(watch)).message.id == "n1"
        finally:
            monkeypatch.undo()


async def test_a_session_that_is_deleted_and_restored_goes_on_where_it_was(
    storage: StorageManager, session: str
) -> None:
    one, every = storage.watch_session(USER, session), storage.watch_user(USER)
    async with one, every:
        await add(storage, session, "n1")
        for watch in (one, every):
            assert ids(await take(watch, 1)) == ["n1"]
        await add(storage, session, "n2")
        await storage.delete_session(USER, session)
        await storage.create_session(USER, session_id="other")
        await add(storage, "other", "o1")
        arrived = await take(every, 1)  # n2 if that was seen before it was deleted
        if ids(arrived) == ["n2"]:
            arrived = await take(every, 1)
            expected = ["n3"]
        else:
            expected = ["n2", "n3"]
        assert ids(arrived) == ["o1"]
        [entry] = await storage.list_trash()
        await storage.undelete(entry.id)
        await add(storage, session, "n3")
        assert ids(await take(every, len(expected))) == expected
        assert ids(await take(one, 2)) == ["n2", "n3"]
    again = storage.watch_user(USER, cursor=arrived[0].cursor)
    assert ids(await take(again, len(expected))) == expected


async def test_what_is_new_among_many_sessions_comes_once(storage: StorageManager, session: str) -> None:
    sessions = [await storage.create_session(USER, session_id=f"s{number}") for number in range(40)]
    for number, each in enumerate(sessions):
        await add(storage, each, *(f"a{number}-{n}" for n in range(3)))
    watch = storage.watch_user(USER)
    async with watch:
        chosen = random.Random(7)
        wanted: dict[str, list[str]] = {}
        got: dict[str, list[str]] = {}
        for round_ in range(5):
            count = 0
            for each in chosen.sample(sessions, 10):
                new = [f"{each}-{round_}-{n}" for n in range(chosen.randrange(1, 4))]
                await add(storage, each, *new)
                wanted.setdefault(each, []).extend(new)
                count += len(new)
            for arrival in await take(watch, count):
                got.setdefault(str(arrival.session_id), []).append(arrival.message.id)
            cursor = watch.cursor
            await watch.aclose()
            watch = storage.watch_user(USER, cursor=cursor)
    assert got == wanted


async def test_a_damaged_line_is_passed_over(flat_storage: MakeStorage, store_path: Path, caplog: Any) -> None:
    storage = flat_storage()
    await storage.create_user(USER)
    await storage.create_session(USER, session_id="chat")
    await add(storage, "chat", *names(0, 3))
    log = store_path / "users/ada/chat/messages.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([lines[0], b"no message\n", *lines[1:]]))
    arrivals = await take(storage.watch_session(USER, "chat", cursor=BEGINNING), 3)
    assert ids(arrivals) == names(0, 3)
    assert "messages.jsonl" in caplog.text
    log.write_bytes(b"".join(lines))
    for number in range(3):
        watch = storage.watch_session(USER, "chat", cursor=arrivals[number].cursor)
        await add(storage, "chat", f"n{number}")
        assert ids(await take(watch, 1)) == [[*names(0, 3), "n0"][number + 1]]


@pytest.mark.damage
async def test_what_a_person_writes_into_a_file_comes_too(
    flat_storage: MakeStorage, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "_LOOK_ANYWAY_SECONDS", 0.05)
    storage = flat_storage()
    await storage.create_user(USER)
    await storage.create_session(USER, session_id="chat")
    await add(storage, "chat", "m0")
    async with storage.watch_session(USER, "chat") as watch:
        log = store_path / "users/ada/chat/messages.jsonl"
        log.write_bytes(log.read_bytes() + log.read_bytes().replace(b'"m0"', b'"m1"'))
        assert ids(await take(watch, 1)) == ["m1"]


# --- every order of changes ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
async def test_after_any_changes_what_was_not_delivered_comes_next(storage: StorageManager, seed: int) -> None:
    """A log, and a cursor that is stored and read again, against a list of names and a set of those delivered."""
    await storage.create_user(USER)
    await storage.create_session(USER, session_id="chat")
    chance = random.Random(seed)
    steps = (
        150 if type(storage.backend).__name__ in ("MemoryBackend", "FlatfileBackend") else 40
    )  # those of a server take time
    log: list[str] = []
    delivered: list[str] = []
    count = losses = 0
    cursor: str | None = BEGINNING

    async def begin(cursor: str) -> LogFollowing:
        found = LogFollowing(storage._store, storage._messages, session_log(USER, "chat"))
        await found.begin(Alone(storage), cursor, 0)
        return found

    follower = await begin(BEGINNING)
    for _ in range(steps):
        step = chance.random()
        if step < 0.55 or not log:
            new = [f"m{number}" for number in range(count, count + chance.choice((1, 1, 2, 70)))]
            count += len(new)
            await add(storage, "chat", *new)
            log += new
        elif step < 0.75:
            for _ in range(chance.choice((1, 1, 2, 9))):
                if log:
                    name = log.pop(chance.randrange(max(0, len(log) - 12), len(log)))
                    await storage.delete_message(USER, "chat", name)
        elif step < 0.9:
            for _ in range(min(len(log), chance.choice((1, 1, 2, CHECKS)))):
                await storage.pop_message(USER, "chat")
                log.pop()
        elif step < 0.92:
            await storage.clear_messages(USER, "chat")
            log.clear()
        else:
            cursor = follower.place()()
            follower = await begin(cursor)
        if chance.random() < 0.5:
            continue
        try:
            while arrivals := await follower.more():
                assert not set(ids(arrivals)) & set(delivered)
                delivered += ids(arrivals)
        except PlaceLostError as lost:
            assert not set(delivered[-CHECKS:]) & set(log), "the place can be found"
            losses += 1
            follower = await begin(lost.cursor)
            delivered.clear()
        else:
            assert [name for name in log if name not in delivered] == []
            assert [name for name in delivered if name in log] == log
    assert losses < 20


# --- who watches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_all", [False, True], ids=["session", "user"])
async def test_a_hundred_watchers_get_each_message_once_and_in_order_and_share_the_looks(
    storage: StorageManager, session: str, monkeypatch: pytest.MonkeyPatch, *, of_all: bool
) -> None:
    backend, looks = storage.backend, {"changes": 0, "read_log": 0, "wait_for_change": 0}

    def counting(name: str) -> None:
        real = getattr(backend, name)

        def call(*arguments: Any, **named: Any) -> Any:
            looks[name] += 1
            return real(*arguments, **named)

        monkeypatch.setattr(backend, name, call)

    watches = [storage.watch_user(USER) if of_all else storage.watch_session(USER, session) for _ in range(100)]
    for watch in watches:
        await watch.__aenter__()
    for name in looks:
        counting(name)
    readers = [asyncio.ensure_future(take(watch, 30)) for watch in watches]
    for number in range(10):
        await add(storage, session, *(f"n{number}-{n}" for n in range(3)))
    for reader in readers:
        assert ids(await reader) == [f"n{number}-{n}" for number in range(10) for n in range(3)]
    assert looks["changes"] < 200 and looks["wait_for_change"] < 200 and looks["read_log"] < 600, looks


async def test_several_event_loops_watch_one_store(storage: StorageManager, session: str) -> None:
    begun = threading.Barrier(4)

    async def watch() -> list[str]:
        async with storage.watch_session(USER, session) as watch:
            await asyncio.to_thread(begun.wait, 60)
            return ids(await take(watch, 5))

    elsewhere = [asyncio.ensure_future(asyncio.to_thread(asyncio.run, watch())) for _ in range(3)]
    await asyncio.to_thread(begun.wait, 60)
    for number in range(5):
        await add(storage, session, f"n{number}")
    for each in elsewhere:
        assert await each == [f"n{number}" for number in range(5)]


async def test_a_watch_that_one_event_loop_left_goes_on_in_another(storage: StorageManager, session: str) -> None:
    watches = [storage.watch_session(USER, session, cursor=BEGINNING), storage.watch_user(USER, cursor=BEGINNING)]
    for watch in watches:
        assert ids(await take(watch, 3)) == names(0, 3)

    async def elsewhere(watch: Watch, count: int, waits: threading.Event) -> list[str]:
        got = ids(await take(watch, count))
        waiting = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)
        waits.set()
        return [*got, (await waiting).message.id]

    for name, watch in zip(("one", "every"), watches, strict=True):
        for number, expected in enumerate((names(3, 10), [])):
            waits = threading.Event()
            there = asyncio.ensure_future(asyncio.to_thread(asyncio.run, elsewhere(watch, len(expected), waits)))
            assert await asyncio.to_thread(waits.wait, 60)
            with pytest.raises(ConflictError, match="in another event loop"):
                await anext(watch)
            await add(storage, session, f"{name}{number}")
            assert await there == [*expected, f"{name}{number}"]
        await add(storage, session, f"{name}2")
        assert ids(await take(watch, 1)) == [f"{name}2"]
        for number in range(3):
            await storage.delete_message(USER, session, f"{name}{number}")


async def test_what_is_closed_in_another_event_loop_is_over(storage: StorageManager, session: str) -> None:
    async with nothing_left():
        watch = storage.watch_session(USER, session)
        waiting = asyncio.ensure_future(_all(watch))
        await settled(lambda: watch.cursor is not None)
        await asyncio.to_thread(asyncio.run, watch.aclose())
        assert await waiting == []


async def test_who_is_slow_holds_no_more_than_a_page(storage: StorageManager, session: str) -> None:
    watch = storage.watch_session(USER, session)
    async with watch:
        await add(storage, session, *(f"n{number}" for number in range(5 * following.PAGE)))
        for number in range(5 * following.PAGE):
            [arrival] = await take(watch, 1)
            assert arrival.message.id == f"n{number}"
            assert len(watch._page) < following.PAGE


@asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    yield
    gc.collect()
    await settled(lambda: watching_tasks() == [])


async def test_a_loop_that_is_left_leaves_nothing(storage: StorageManager, session: str) -> None:
    async with nothing_left():
        async for arrival in storage.watch_session(USER, session, cursor=BEGINNING):
            assert watching_tasks()
            if arrival.message.id == "m3":
                break
    async with nothing_left():
        with pytest.raises(ZeroDivisionError):
            async for _ in storage.watch_user(USER, cursor=BEGINNING):
                raise ZeroDivisionError
    async with nothing_left(), storage.watch_session(USER, session):
        pass


async def test_who_waits_is_told_that_the_watch_was_closed(storage: StorageManager, session: str) -> None:
    async with nothing_left():
        watch = storage.watch_session(USER, session)
        waiting = asyncio.ensure_future(_all(watch))
        await settled(lambda: watch.cursor is not None)
        await watch.aclose()
        assert await waiting == []
        await watch.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(watch)
        with pytest.raises(ClosedError, match="watch is over"):
            await watch.__aenter__()


@pytest.mark.parametrize("of_all", [False, True], ids=["session", "user"])
async def test_nothing_comes_after_it_was_closed_while_it_looked(
    storage: StorageManager, session: str, monkeypatch: pytest.MonkeyPatch, *, of_all: bool
) -> None:
    watch = storage.watch_user(USER, cursor=BEGINNING) if of_all else storage.watch_session(USER, session, last=5)
    looks, goes_on, real = asyncio.Event(), asyncio.Event(), storage.backend.read_log

    async def held(*arguments: Any, **named: Any) -> list[bytes]:
        looks.set()
        await goes_on.wait()
        return await real(*arguments, **named)

    monkeypatch.setattr(storage.backend, "read_log", held)
    async with nothing_left():
        waiting = asyncio.ensure_future(_all(watch))
        await looks.wait()
        await watch.aclose()
        goes_on.set()
        assert await waiting == []


async def _all(watch: Watch) -> list[str]:
    return [arrival.message.id async for arrival in watch]


async def test_cancelling_costs_no_message(storage: StorageManager, session: str) -> None:
    async with nothing_left():
        watch = storage.watch_session(USER, session)
        for number in range(20):
            waiting = asyncio.ensure_future(anext(watch))
            for _ in range(number):
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
        async with watch:
            await add(storage, session, "n1")
            got: list[str] = []
            while not got:
                try:
                    async with asyncio.timeout(0.001):
                        got.append((await anext(watch)).message.id)
                except TimeoutError:
                    continue
            assert got == ["n1"]


@pytest.mark.parametrize("of_all", [False, True], ids=["session", "user"])
async def test_closing_the_store_ends_every_watch(storage: StorageManager, session: str, *, of_all: bool) -> None:
    async with nothing_left():
        watch = storage.watch_user(USER) if of_all else storage.watch_session(USER, session)
        waiting = asyncio.ensure_future(anext(watch))
        other_loop = asyncio.ensure_future(asyncio.to_thread(asyncio.run, _one(storage.watch_session(USER, session))))
        await settled(lambda: watch.cursor is not None)
        await settled(lambda: len(storage._watching._hubs) == 2)
        await storage.close()
        for each in (waiting, other_loop):
            with pytest.raises(ClosedError):
                await each
        for again in (watch, storage.watch_session(USER, session)):
            with pytest.raises(ClosedError):
                await anext(again)


async def _one(watch: Watch) -> Arrival:
    return await anext(watch)


async def test_an_outage_is_borne_for_a_while(
    make_storage: MakeStorage, storage: StorageManager, session: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    other = make_storage(watch_poll_seconds=0.01)
    is_down = False
    for name in ("read_log", "changes", "newest_records", "wait_for_change"):
        real = getattr(other.backend, name)

        async def call(*arguments: Any, _real: Callable[..., Coroutine[Any, Any, Any]] = real, **named: Any) -> Any:
            if is_down:
                raise UnavailableError("The server is being restarted.")
            return await _real(*arguments, **named)

        monkeypatch.setattr(other.backend, name, call)
    one, every = other.watch_session(USER, session), other.watch_user(USER)
    async with one, every:
        waiting = [asyncio.ensure_future(take(watch, 2)) for watch in (one, every)]
        is_down = True
        await add(storage, session, "n1")
        await settled(lambda: "cannot be read at the moment" in caplog.text)
        is_down = False
        await add(storage, session, "n2")
        for each in waiting:
            assert ids(await each) == ["n1", "n2"]
        is_down = True
        other.config.lock_timeout_seconds = 0
        await add(storage, session, "n3")
        with pytest.raises(UnavailableError, match="restarted"):
            await take(one, 1)
        is_down = False
        assert ids(await take(one, 1)) == ["n3"]


async def test_an_outage_at_the_beginning_is_borne_too(
    make_storage: MakeStorage, storage: StorageManager, session: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    other = make_storage(watch_poll_seconds=3600, lock_timeout_seconds=0)
    failures = 3

    async def look() -> str:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise UnavailableError("The server is being restarted.")
        return storage._store.store_id

    monkeypatch.setattr(other._store, "identity", look)
    watch = other.watch_session(USER, session, last=1)
    with pytest.raises(UnavailableError, match="restarted"):
        await anext(watch)
    other.config.lock_timeout_seconds, other.config.watch_poll_seconds = 60, 0.01
    assert ids(await take(watch, 1)) == ["m9"]
    assert failures == -1 and "cannot be read at the moment" in caplog.text and "can be read again" in caplog.text


async def test_an_unexpected_error_reaches_who_watches(
    storage: StorageManager, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(cursor: str | None) -> None:
        raise ZeroDivisionError

    watch = storage.watch_session(USER, session)
    with monkeypatch.context() as broken:
        broken.setattr(storage.backend, "changes", fail)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await take(watch, 1)
    await add(storage, session, "n1")  # while nobody wakes it
    assert ids(await take(watch, 1)) == ["n1"]


async def test_who_waits_is_told_when_what_wakes_it_is_cancelled(storage: StorageManager, session: str) -> None:
    async with nothing_left(), storage.watch_session(USER, session) as watch, storage.watch_user(USER) as every:
        waiting = [asyncio.ensure_future(anext(each)) for each in (watch, every)]
        await asyncio.sleep(0)
        for task in asyncio.all_tasks():
            if task.get_name().startswith("chatdb"):
                task.cancel()
        for reader in waiting:
            with pytest.raises(UnavailableError, match="was cancelled"):
                await reader
        await add(storage, session, "n1")
        for each in (watch, every):
            assert ids(await take(each, 1)) == ["n1"]


async def test_a_shared_look_that_somebody_cancels_is_begun_again(storage: StorageManager, session: str) -> None:
    async with storage.watch_session(USER, session):
        hub = storage._watching.hub()
        key = "users/ada/chat/messages.jsonl"
        first = asyncio.ensure_future(hub.read(key, 0, 1))
        await asyncio.sleep(0)
        [look] = [task for task in asyncio.all_tasks() if task.get_name() == "chatdb-look"]
        look.cancel()
        assert len(await first) == len(await hub.read(key, 0, 1)) == 1


@pytest.mark.usefixtures("unreminded")
async def test_of_many_who_watch_a_change_wakes_those_whom_it_concerns(
    make_storage: MakeStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = make_storage()
    if type(storage.backend).__name__ == "MemoryBackend":
        return  # it does not say what changed
    told: list[str] = []
    real = watching.Ticket.tell

    def tell(ticket: watching.Ticket, key: str | None) -> None:
        assert key is not None and (key.startswith(ticket.key) or ticket.key.startswith(key)), (ticket.key, key)
        told.append(ticket.key)
        real(ticket, key)

    sessions = [f"s{number}" for number in range(50)]
    for user in (USER, "eve"):
        await storage.create_user(user)
        for name in sessions:
            await storage.create_session(user, session_id=name)
    watches = [storage.watch_session(USER, name) for name in sessions]
    watches += [storage.watch_session("eve", "s7"), storage.watch_user(USER), storage.watch_user("eve")]
    for watch in watches:
        await watch.__aenter__()
    await add(storage, "s7", "m0")
    for watch in (watches[7], watches[-2]):
        await take(watch, 1)  # and the first question what changed, which has no answer, was asked
    monkeypatch.setattr(watching.Ticket, "tell", tell)
    await add(storage, "s7", "m1")
    for watch in (watches[7], watches[-2]):
        assert ids(await take(watch, 1)) == ["m1"]
    await storage.delete_session(USER, "s8")
    await settled(lambda: {"users/ada/s8/messages.jsonl", "users/ada/s7/messages.jsonl", "users/ada"} <= set(told))
    users = {"users/ada", "users/eve"}  # what was made before may be told again
    assert set(told) - users == {"users/ada/s7/messages.jsonl", "users/ada/s8/messages.jsonl"}
    for watch in watches:
        await watch.aclose()
    await settled(lambda: not storage._watching.hub()._tickets and not storage._watching.hub()._inside)


async def test_those_who_wait_for_a_user_look_at_all_sessions_together(
    storage: StorageManager, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, real = 0, storage.backend.newest_records

    async def newest_records(keys: Sequence[str]) -> list[bytes | None]:
        nonlocal looks
        looks += 1
        return await real(keys)

    monkeypatch.setattr(storage.backend, "newest_records", newest_records)
    watches = [storage.watch_user(USER) for _ in range(20)]
    await asyncio.gather(*(watch.__aenter__() for watch in watches))
    assert looks == 1
    waiting = [asyncio.ensure_future(anext(watch)) for watch in watches]
    await settled(lambda: looks >= 2)  # an announcement that comes late makes it look once more
    await add(storage, session, "n1")
    for each in waiting:
        assert (await each).message.id == "n1"
    assert looks < 10, "not one for each"


def test_reminders_of_one_log_come_together_and_those_of_others_at_other_times() -> None:
    async def reminded() -> dict[str, set[float]]:
        hub = watching.Hub(None)  # type: ignore[arg-type]
        times: dict[str, set[float]] = {}
        for _ in range(10):
            for key in ("a", "b", "c", "d"):
                ticket = watching.Ticket(key, 5.0)
                hub._remind_later(ticket)
                assert ticket.reminder is not None
                assert 0 < ticket.reminder.when() - asyncio.get_running_loop().time() <= 5
                times.setdefault(key, set()).add(ticket.reminder.when() % 5)
                ticket.reminder.cancel()
        return times

    times = asyncio.run(reminded())
    assert len({round(each.pop(), 3) for each in times.values()}) > 1


async def test_a_cursor_of_each_of_many_arrivals_is_behind_it_and_they_share_what_they_hold(
    storage: StorageManager, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_STEPS", 3)
    chance = random.Random(3)
    for number in range(12):
        await storage.create_session(USER, session_id=f"s{number}")
    written = [f"n{number}" for number in range(60)]
    async with storage.watch_user(USER) as watch:
        arrivals = []
        for name in written:
            await add(storage, f"s{chance.randrange(12)}", name)
            arrivals += await take(watch, 1)
    assert ids(arrivals) == written
    trails = {id(arrival.place.func.__self__) for arrival in arrivals}  # type: ignore[attr-defined]
    assert 3 <= len(trails) <= 20
    for number in range(0, 60, 7):
        again = storage.watch_user(USER, cursor=arrivals[number].cursor)
        assert sorted(ids(await take(again, 59 - number))) == sorted(written[number + 1 :])
        await again.aclose()


@pytest.mark.usefixtures("unreminded")
async def test_writes_of_this_process_wake_who_watches_without_polling(make_storage: MakeStorage) -> None:
    storage = make_storage(watch_poll_seconds=3600)
    await storage.create_user(USER)
    await storage.create_session(USER, session_id="chat")
    async with storage.watch_session(USER, "chat") as one, storage.watch_user(USER) as every:
        await add(storage, "chat", "m0")  # and whatever looks once at the beginning has looked
        for watch in (one, every):
            await take(watch, 1)
        for number in range(20):
            await add(storage, "chat", f"n{number}")
            for watch in (one, every):
                assert ids(await take(watch, 1)) == [f"n{number}"]


async def test_somebody_looks_out_as_soon_as_anybody_waits(
    make_storage: MakeStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make_storage().backend
    if not isinstance(backend, ThreadedBackend):
        return
    await backend.open()
    its, awaited = backend._lookout, []
    assert its is not None
    real = its.begin

    def begin() -> bool:
        awaited.append(backend._waking.is_awaited)
        return real()

    monkeypatch.setattr(its, "begin", begin)
    await backend.wait_for_change([""], 0.01)
    assert awaited == [True], "or it might end before"


def test_nobody_ends_a_lookout_that_somebody_has_just_begun() -> None:
    answers = [False, True]  # who waits comes in between

    class LookedAt(Waking):
        @property
        def is_awaited(self) -> bool:
            return answers.pop(0) if len(answers) > 1 else answers[0]

    class Nothing(Lookout):
        def look_out(self, watch: lookout.Watch) -> None:
            watch.ended.wait(60)

    nothing = Nothing(LookedAt())
    nothing.begin()
    watch = nothing._watch
    assert watch is not None
    watch.awaited = -1e9
    assert nothing.goes_on(watch)
    answers[:] = [False]
    assert not nothing.goes_on(watch)
    nothing.join()


# --- cursors -------------------------------------------------------------------------------------------


async def test_a_cursor_of_something_else_is_refused(storage: StorageManager, session: str, tmp_path: Path) -> None:
    await storage.create_session(USER, session_id="other")
    await storage.create_user("eve")
    panel = await storage.create_panel("debate", ["critic"], panel_id="chat")
    [arrival] = await take(storage.watch_session(USER, session, cursor=BEGINNING), 1)
    [of_user] = await take(storage.watch_user(USER, cursor=BEGINNING), 1)
    config = StorageConfig(storage_base_path=str(tmp_path / "elsewhere"))
    async with StorageManager(config) as elsewhere:
        await elsewhere.create_user(USER)
        await elsewhere.create_session(USER, session_id=session)
        for watch in (
            storage.watch_session(USER, "other", cursor=arrival.cursor),
            storage.watch_session("eve", session, cursor=arrival.cursor),
            storage.watch_panel(panel, cursor=arrival.cursor),
            storage.watch_user(USER, cursor=arrival.cursor),
            storage.watch_session(USER, session, cursor=of_user.cursor),
            storage.watch_user("eve", cursor=of_user.cursor),
            elsewhere.watch_session(USER, session, cursor=arrival.cursor),
            elsewhere.watch_user(USER, cursor=of_user.cursor),
        ):
            for _ in range(2):
                with pytest.raises(ValidationError, match="of another store, or of another user, session or panel"):
                    await take(watch, 1)
    await settled(lambda: watching_tasks() == [])


async def test_no_text_that_is_no_cursor_is_taken_for_one(storage: StorageManager, session: str) -> None:
    [*_, arrival] = await take(storage.watch_session(USER, session, cursor=BEGINNING), 10)
    [*_, of_user] = await take(storage.watch_user(USER, cursor=BEGINNING), 10)
    chance = random.Random(11)

    def watch(good: str, text: str) -> Watch:
        if good == arrival.cursor:
            return storage.watch_session(USER, session, cursor=text)
        return storage.watch_user(USER, cursor=text)

    for good in (arrival.cursor, of_user.cursor):
        bad = ["", " ", "x", "=", "\0", "é", "beginning ", "BEGINNING", good + "A", good + "=", f" {good}", good * 2]
        bad += [good[:length] for length in range(len(good))]
        bad += [good.swapcase(), good[::-1], "A" * 5_000_000, "_" * 1000, "\ud800"]
        for _ in range(300):
            place = chance.randrange(len(good))
            bad.append(good[:place] + chance.choice("ABCxyz019-_") + good[place + 1 :])
        for text in set(bad) - {good}:
            with pytest.raises(ValidationError, match="cursor is"):
                await anext(watch(good, text))
    for wrong in (1, b"x", [arrival.cursor]):
        with pytest.raises(ValidationError, match="cursor must be a string"):
            storage.watch_session(USER, session, cursor=wrong)  # type: ignore[arg-type]
    for last in (-1, 1.5, True, "1"):
        with pytest.raises(ValidationError, match="last must be"):
            storage.watch_session(USER, session, last=last)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="cannot both"):
        storage.watch_session(USER, session, last=1, cursor=arrival.cursor)
    for user in ("", "a\nb"):
        with pytest.raises(ValidationError, match="user_id"):
            storage.watch_user(user)


async def test_a_cursor_that_somebody_forged_well_delivers_or_says_that_the_place_is_lost(
    storage: StorageManager, session: str
) -> None:
    await storage.create_session(USER, session_id="other")
    store_id = storage._store.store_id
    chance = random.Random(13)
    for _ in range(60):
        checks = tuple(chance.randbytes(5) for _ in range(chance.randrange(1, CHECKS + 1)))
        position = chance.choice((None, 1, 9, 10, 11, 1000, 2**31, 2**45))
        spots = {b"": Spot(position, checks)}
        cursor = encode(scope_of(store_id, "messages", USER, session), spots)
        with pytest.raises(PlaceLostError):
            await take(storage.watch_session(USER, session, cursor=cursor), 1)
        named = {name_of(session): Spot(position, checks), chance.randbytes(6): Spot(position, checks)}
        cursor = encode(scope_of(store_id, "user", USER), named)
        with pytest.raises(PlaceLostError):
            await take(storage.watch_user(USER, cursor=cursor), 1)
    cursor = encode(scope_of(store_id, "messages", USER, session), {b"": Spot(2**60, (b"12345",))})
    with pytest.raises(ValidationError):
        await take(storage.watch_session(USER, session, cursor=cursor), 1)


def test_cursors_are_read_as_they_were_written() -> None:
    scope, unmade = scope_of("store", "user", "ada"), scope_of("", "user", "ada")
    chance = random.Random(17)
    for count in (0, 1, 2, 40, 1000):
        spots = {}
        for number in range(count):
            checks = tuple(chance.randbytes(5) for _ in range(chance.randrange(1, CHECKS + 1)))
            spots[name_of(f"s{number}")] = Spot(chance.choice((None, 1, 127, 128, 100_000)), checks)
        text = encode(scope, spots)
        found = decode(text, scope, unmade, named=True)
        assert list(found) == list(spots)
        for number, (name, spot) in enumerate(spots.items()):
            full = number >= count - 32
            assert found[name] == (spot if full else Spot(spot.position, spot.checks[:1]))
        assert len(text) <= 20 * count + 32 * 7 * 7 + 40, "it is as long as docs/watching.md says"
    assert decode(encode(unmade, {b"": START}), scope, unmade, named=False) == {b"": START}
    with pytest.raises(ValidationError):
        decode(encode(unmade, {b"": Spot(1, (b"12345",))}), scope, unmade, named=False)


def test_the_format_of_cursors_stays() -> None:
    scope = scope_of("0198c0de-0000-7000-8000-000000000001", "messages", "ada", "chat")
    spot = Spot(300, (check_of(b'{"id":"m1","role":"user"}'), check_of(b'{"id":"m0","role":"user"}')))
    assert encode(scope, {b"": spot}) == "AUm5XUo4FgGtAgJj3_xx0eyCNUa3GCkvkQ"


async def test_sessions_that_are_gone_are_forgotten_when_they_are_too_many(
    storage: StorageManager, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_GONE", 3)
    follower = UserFollowing(storage._store, storage._messages, USER)
    await follower.begin(Alone(storage), BEGINNING, 0)
    for number in range(10):
        gone = await storage.create_session(USER, session_id=f"s{number}")
        await add(storage, gone, f"g{number}")
        follower.note(None)
        while await follower.more():
            pass
        await storage.delete_session(USER, gone)
    follower.note(None)
    assert await follower.more() == []
    assert list(follower._spots) == [name_of(name) for name in ("chat", "s7", "s8", "s9")]
