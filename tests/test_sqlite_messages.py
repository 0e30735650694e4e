"""New messages in SQLite, each batch by one statement: the same answers as by several, and nothing overlooked."""

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from flatfile_chat_database import Message, StorageManager
from flatfile_chat_database.backends import arriving, contents, sqlite, staged
from flatfile_chat_database.backends.notes import note_after
from flatfile_chat_database.backends.rows import Fresh
from flatfile_chat_database.backends.sqlite import SqliteBackend, SqliteSession
from flatfile_chat_database.codec import encode_message
from flatfile_chat_database.errors import (
    DurabilityError,
    NotFoundError,
    StorageError,
    StorageLimitExceeded,
    UnavailableError,
    ValidationError,
)

from .test_sqlite import opened, path, sql

__all__ = ["path"]

BEGUN = ["first", "known"]
KEY = "users/ada/{}/messages.jsonl"


@asynccontextmanager
async def chatting(
    path: Path, sessions: int = 3, **settings: Any
) -> AsyncIterator[tuple[SqliteBackend, StorageManager]]:
    """Open a store whose sessions `s0` … have two messages each, and are known to the writer."""
    async with opened(path, **settings) as store, StorageManager(backend=store) as storage:
        await storage.create_user("ada")
        for number in range(sessions):
            await storage.create_session("ada", session_id=f"s{number}")
        await say(storage, "first", sessions)
        await say(storage, "known", sessions)
        yield store, storage


async def say(storage: StorageManager, what: str, sessions: int = 3) -> None:
    """Add a message to each session, all at once."""
    work = (
        storage.add_message("ada", f"s{number}", Message("user", what, id=f"{what} {number}"))
        for number in range(sessions)
    )
    await asyncio.gather(*work)


async def said(storage: StorageManager, session: str = "s0") -> list[str]:
    return [message.content async for message in storage.stream_messages("ada", session)]


class Counted:
    """How many transactions of one statement there were, and how many of several."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at_once = self.others = 0
        at_once, begin = SqliteSession.run_transaction, SqliteSession.begin_writing

        def counted(session: SqliteSession, *arguments: Any) -> bool:
            self.at_once += 1
            return at_once(session, *arguments)

        def begun(session: SqliteSession) -> bool:
            self.others += 1
            return begin(session)

        monkeypatch.setattr(SqliteSession, "run_transaction", counted)
        monkeypatch.setattr(SqliteSession, "begin_writing", begun)

    def take(self) -> tuple[int, int]:
        found = self.at_once, self.others
        self.at_once = self.others = 0
        return found


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


async def test_messages_of_sessions_that_are_known_are_one_statement(path: Path, counted: Counted) -> None:
    async with chatting(path) as (store, storage):
        counted.take()
        before = store.statistics()["commits"]
        for number in range(5):
            await say(storage, f"n{number}")
        assert counted.take() == (5, 0)
        assert store.statistics()["commits"] == before + 15
        for session in ("s0", "s1", "s2"):
            assert await said(storage, session) == [*BEGUN, *(f"n{number}" for number in range(5))]
        notes = await sql(path, "SELECT number, bytes, keys FROM changes ORDER BY number")
        assert [number for number, _, _ in notes] == list(range(1, len(notes) + 1))
        total = 0
        for _, size, keys in notes:
            total += len(keys)
            assert size == total
        assert notes[-1][2] == "\n".join(KEY.format(f"s{number}") for number in range(3))


async def test_several_messages_of_one_session_keep_their_order(path: Path, counted: Counted) -> None:
    async with chatting(path) as (_, storage):
        counted.take()
        for turn in range(3):
            work = [
                storage.add_message("ada", f"s{number % 2}", Message("user", f"{turn} {number}"))
                for number in range(20)
            ]
            await asyncio.gather(*work)
        assert counted.take() == (3, 0)
        for session in (0, 1):
            own = [f"{turn} {number}" for turn in range(3) for number in range(session, 20, 2)]
            assert await said(storage, f"s{session}") == [*BEGUN, *own]


async def test_a_few_messages_of_one_call_are_in_the_statement_too(path: Path, counted: Counted) -> None:
    async with chatting(path, max_messages_per_session=9) as (_, storage):
        counted.take()
        pair = [Message("user", "question"), Message("assistant", "answer")]
        # All in one turn of the loop, so one batch.
        results = await asyncio.gather(
            storage.add_messages("ada", "s0", pair),
            storage.add_messages("ada", "s1", pair),
            *(storage.add_message("ada", f"s{number}", Message("user", "one")) for number in range(3)),
        )
        assert list(results) == [2, 2, True, True, True]
        assert counted.take() == (1, 0)
        assert await said(storage, "s1") == [*BEGUN, "question", "answer", "one"]
        # Some of them are there already, one comes twice, and one call has more than there is room for.
        more = [*pair, Message("user", "more", id="more"), Message("user", "more", id="more")]
        assert await storage.add_messages("ada", "s0", more) == 1
        many = storage.add_messages("ada", "s1", [Message("user", str(number)) for number in range(5)])
        full, added = await asyncio.gather(many, storage.add_messages("ada", "s2", pair), return_exceptions=True)
        assert isinstance(full, StorageLimitExceeded) and added == 2
        assert await said(storage, "s0") == [*BEGUN, "question", "answer", "one", "more"]
        assert await said(storage, "s1") == [*BEGUN, "question", "answer", "one"]


@pytest.mark.parametrize("limit", ["messages", "bytes"])
async def test_more_messages_than_a_statement_takes_are_several(
    path: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(arriving, "_FEW", 2)
    monkeypatch.setattr(arriving, "_STEP", 5)
    async with chatting(path) as (_, storage):
        one = len(encode_message(Message("user", "1 0")))
        monkeypatch.setattr(arriving, *(("MOST_ADDED", 7) if limit == "messages" else ("MOST_BYTES", 7 * one)))
        counted.take()
        expected = list(BEGUN)
        for number in range(1, 6):
            some = [Message("user", f"{number} {at}") for at in range(number)]
            expected += [message.content for message in some]
            work = (storage.add_messages("ada", f"s{session}", some) for session in range(3))
            assert await asyncio.gather(*work) == [number] * 3
        assert counted.take() == (2, 3), "of 3 and 6 messages one each, and of 9, 12 and 15 several"
        for session in range(3):
            assert await said(storage, f"s{session}") == expected


def test_there_are_few_different_statements() -> None:
    kinds = (arriving.adding, lambda messages: arriving.transaction(1, messages, note_after(0, 0, ["a"])))
    for kind in kinds:
        texts = set()
        for count in range(1, arriving.MOST_ADDED + 1):
            text, values = kind([Fresh("key", at, "id", b"{}\n") for at in range(count)])
            assert text.count("?") == len(values)
            texts.add(text)
        assert len(texts) < 100


async def test_a_message_sent_again_does_not_make_a_transaction_of_each_commit(path: Path, counted: Counted) -> None:
    async with chatting(path, 20) as (_, storage):
        pairs = [[Message("user", "a", id=f"a{n}"), Message("user", "b", id=f"b{n}")] for n in range(20)]
        await storage.add_messages("ada", "s7", pairs[7][:1])
        await say(storage, "more", 20)
        counted.take()
        work = (storage.add_messages("ada", f"s{number}", pair) for number, pair in enumerate(pairs))
        assert await asyncio.gather(*work) == [1 if number == 7 else 2 for number in range(20)]
        assert counted.take() == (1, 2), "at once, together, and each looked at by itself in one transaction"


async def test_many_messages_of_one_session_go_to_their_place(path: Path, counted: Counted) -> None:
    count = 2 * staged._MANY  # of which a half may be done by itself
    async with chatting(path) as (_, storage):
        counted.take()
        await asyncio.gather(*(storage.add_message("ada", "s0", Message("user", str(at))) for at in range(count)))
        assert counted.take()[0] == 0
        log = "(SELECT log FROM logs WHERE session_id = 's0')"
        assert await sql(path, f"SELECT count(*) FROM records WHERE place >> 32 = {log}") == [(count + 2,)]
        assert await said(storage) == [*BEGUN, *map(str, range(count))]


async def test_arrivals_are_moved_by_the_same_statement(
    path: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arriving, "_MOST", 10)
    async with chatting(path) as (_, storage):
        counted.take()
        for number in range(20):
            await say(storage, f"n{number}")
            [(arrived,)] = await sql(path, "SELECT count(*) FROM arrivals")
            assert arrived <= 10
        assert counted.take() == (20, 0)
        assert await said(storage) == [*BEGUN, *(f"n{number}" for number in range(20))]


async def test_notes_are_forgotten_in_the_long_run(
    path: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "REMEMBERED_BYTES", 1000)
    async with chatting(path, 1) as (_, storage):
        counted.take()
        for number in range(300):
            await storage.add_message("ada", "s0", Message("user", str(number)))
        at_once, others = counted.take()
        assert (at_once, others) == (299, 1)
        assert (await sql(path, "SELECT min(number), count(*) FROM changes"))[0][0] > 200


# --- what is not that simple -----------------------------------------------------------------------------


async def test_messages_sent_again_are_stored_once(path: Path) -> None:
    async with chatting(path) as (_, storage):
        await say(storage, "first")
        await asyncio.gather(say(storage, "second"), say(storage, "first"), say(storage, "second"))
        assert await said(storage) == [*BEGUN, "second"]
        with pytest.raises(ValidationError):
            await storage.add_message("ada", "s0", Message("user", "another", id="second 0"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(staged, "_MANY", 1)  # all of them in their place
            await storage.add_messages("ada", "s0", [Message("user", str(number)) for number in range(5)])
        assert await sql(path, "SELECT count(*) FROM records") == [(8,)]
        await say(storage, "second")
        await say(storage, "third")
        assert await said(storage) == [*BEGUN, "second", "0", "1", "2", "3", "4", "third"]


async def test_a_session_that_is_full_refuses_and_the_others_do_not(path: Path) -> None:
    async with chatting(path, 2, max_messages_per_session=5) as (_, storage):
        for number in range(2):
            await say(storage, f"n{number}", 2)
        work = [storage.add_message("ada", f"s{number // 3}", Message("user", f"m{number}")) for number in range(4)]
        results = await asyncio.gather(*work, return_exceptions=True)
        assert results[0] is True and results[3] is True
        assert all(isinstance(result, StorageLimitExceeded) for result in results[1:3])
        assert await said(storage, "s0") == [*BEGUN, "n0", "n1", "m0"]
        assert await said(storage, "s1") == [*BEGUN, "n0", "n1", "m3"]


@pytest.mark.parametrize("moved", [False, True])
async def test_what_another_connection_wrote_is_seen(path: Path, counted: Counted, moved: bool) -> None:
    async with chatting(path) as (_, storage), opened(path) as other, StorageManager(backend=other) as others:
        for number in range(4):
            await say(storage, f"a{number}")
            if moved:
                await sql(path, "INSERT INTO records SELECT place, id, body FROM arrivals", "DELETE FROM arrivals")
            await say(others, f"b{number}")
        expected = [*BEGUN, *(f"{who}{number}" for number in range(4) for who in "ab")]
        assert await said(storage) == await said(others) == expected
        counted.take()
        await say(storage, "c")
        await say(storage, "d")
        assert counted.take() == (0, 2), "step by step as long as others write"
        await say(storage, "e")
        assert counted.take() == (1, 0)
        await others.delete_session("ada", "s1")
        counted.take()
        results = await asyncio.gather(
            *(storage.add_message("ada", f"s{number}", Message("user", "late")) for number in range(3)),
            return_exceptions=True,
        )
        assert results[0] is True and isinstance(results[1], NotFoundError) and results[2] is True
        assert counted.take() == (1, 1), "the statement was refused, and the batch done step by step"


async def test_a_session_deleted_with_sql_is_seen(path: Path) -> None:
    async with chatting(path) as (_, storage):
        await say(storage, "second")
        await sql(path, "DELETE FROM entries WHERE key = 'users/ada/s0/session.json'", "DELETE FROM sessions")
        with pytest.raises(NotFoundError):
            await storage.add_message("ada", "s0", Message("user", "late"))


async def test_a_log_that_lost_its_row_is_no_success(path: Path) -> None:
    async with chatting(path) as (store, storage):
        assert store._writing is not None
        # On the writer's own connection, which does not tell of what it wrote itself.
        await asyncio.to_thread(store._writing.execute, "DELETE FROM logs WHERE session_id = 's0'")
        with pytest.raises(StorageError):
            await storage.add_message("ada", "s0", Message("user", "lost"))
        assert await storage.add_message("ada", "s1", Message("user", "kept"))
        assert await said(storage, "s1") == [*BEGUN, "kept"]


# --- faults ----------------------------------------------------------------------------------------------


async def test_a_file_that_somebody_holds_is_waited_for_once(path: Path, counted: Counted) -> None:
    async with chatting(path, 20, lock_timeout_seconds=0.3) as (_, storage):
        holder = await asyncio.to_thread(sqlite3.connect, path, isolation_level=None, check_same_thread=False)
        await asyncio.to_thread(holder.execute, "BEGIN IMMEDIATE")
        counted.take()
        work = [storage.add_message("ada", f"s{number}", Message("user", "held")) for number in range(20)]
        results = await asyncio.gather(*work, return_exceptions=True)
        assert [type(result) for result in results] == [UnavailableError] * 20
        assert all("Another program holds it" in str(result) for result in results)
        assert counted.take() == (1, 0)
        await asyncio.to_thread(holder.close)
        await say(storage, "late", 20)
        assert await said(storage) == [*BEGUN, "late"]


@pytest.mark.parametrize("suffix", ["", "-wal"])
async def test_a_file_that_was_removed_is_noticed_before(
    path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_CHECKED_SECONDS", -1)
    async with chatting(path) as (_, storage):
        await say(storage, "second")
        os.rename(f"{path}{suffix}", path.with_name("elsewhere"))
        with pytest.raises(UnavailableError, match="was removed or replaced"):
            await storage.add_message("ada", "s0", Message("user", "lost"))
        os.rename(path.with_name("elsewhere"), f"{path}{suffix}")
        await say(storage, "third")
        assert await said(storage) == [*BEGUN, "second", "third"]


async def test_a_file_that_is_removed_meanwhile_is_no_success(path: Path, counted: Counted) -> None:
    async with chatting(path) as (store, storage):
        counted.take()
        session = store._writing
        assert isinstance(session, SqliteSession)
        session._connection.set_trace_callback(lambda _: os.rename(path, path.with_name("elsewhere")))
        with pytest.raises(DurabilityError, match="was removed or replaced"):
            await storage.add_message("ada", "s0", Message("user", "lost"))
        assert counted.take() == (1, 0)
        session._connection.set_trace_callback(None)
        os.rename(path.with_name("elsewhere"), path)
        with pytest.raises(UnavailableError, match="takes no more writes"):
            await storage.add_message("ada", "s0", Message("user", "later"))


class Failing:
    """A connection whose next statement fails with one of SQLite's errors, after it was run or before."""

    def __init__(self, connection: sqlite3.Connection, name: str, *, runs: bool) -> None:
        self._connection, self._name, self._runs = connection, name, runs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, statement: str, parameters: Any = ()) -> sqlite3.Cursor:
        failing, self._name = self._name, ""
        if self._runs or not failing:
            done = self._connection.execute(statement, parameters)
        if failing == "MemoryError":
            raise MemoryError
        if failing:
            error = sqlite3.OperationalError("as a bad disk does")
            error.sqlite_errorname = failing
            raise error
        return done


@pytest.mark.parametrize("name", ["SQLITE_IOERR_FSYNC", "SQLITE_IOERR", "MemoryError", ""])
@pytest.mark.parametrize("runs", [False, True])
async def test_an_error_that_may_be_of_the_flush_leaves_it_in_doubt(path: Path, name: str, runs: bool) -> None:
    async with chatting(path) as (store, storage):
        session = store._writing
        assert isinstance(session, SqliteSession)
        real = session._connection
        session._connection = Failing(real, name or "OF_A_LATER_VERSION", runs=runs)  # type: ignore[assignment]
        results = await asyncio.gather(
            *(storage.add_message("ada", f"s{number}", Message("user", "?")) for number in range(3)),
            return_exceptions=True,
        )
        assert [type(result) for result in results] == [DurabilityError] * 3
        with pytest.raises(UnavailableError, match="takes no more writes"):
            await storage.add_message("ada", "s0", Message("user", "later"))
        assert await said(storage) == ([*BEGUN, "?"] if runs else BEGUN)


async def test_no_message_is_acknowledged_in_a_transaction_that_somebody_left_open(path: Path) -> None:
    async with chatting(path) as (store, storage):
        session = store._writing
        assert isinstance(session, SqliteSession)
        real = session.begin_writing

        def run_out_of_memory() -> bool:
            real()
            raise MemoryError

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(session, "begin_writing", run_out_of_memory)
            with pytest.raises(DurabilityError):
                await storage.create_user("eve")
        for number in range(3):
            await say(storage, f"n{number}")
            assert await sql(path, "SELECT count(*) FROM messages WHERE session_id = 's0'") == [(3 + number,)]
        await asyncio.to_thread(session.execute, "BEGIN IMMEDIATE")
        with pytest.raises(UnavailableError):
            await storage.add_message("ada", "s0", Message("user", "refused"))
        await say(storage, "last")
        await storage.create_user("eve")
        assert await said(storage) == [*BEGUN, "n0", "n1", "n2", "last"]


@pytest.mark.parametrize("name", ["SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_CORRUPT_INDEX", "SQLITE_ERROR"])
async def test_an_error_from_before_the_commit_is_looked_at_step_by_step(path: Path, name: str) -> None:
    async with chatting(path) as (store, storage):
        session = store._writing
        assert isinstance(session, SqliteSession)
        session._connection = Failing(session._connection, name, runs=False)  # type: ignore[assignment]
        await say(storage, "second")
        assert await said(storage) == [*BEGUN, "second"]


async def test_a_full_disk_refuses_what_finds_no_room(path: Path) -> None:
    async with chatting(path) as (store, storage):
        session = store._writing
        assert session is not None
        [(pages,)] = await asyncio.to_thread(session.execute, "PRAGMA page_count")
        await asyncio.to_thread(session.execute, f"PRAGMA max_page_count = {pages + 2}")
        results = await asyncio.gather(
            storage.add_message("ada", "s0", Message("user", "x" * 100_000)),
            storage.add_message("ada", "s1", Message("user", "short")),
            return_exceptions=True,
        )
        assert isinstance(results[0], UnavailableError) and results[1] is True
        await asyncio.to_thread(session.execute, "PRAGMA max_page_count = 1073741823")
        await say(storage, "second")
        assert await said(storage) == [*BEGUN, "second"]
        assert await said(storage, "s1") == [*BEGUN, "short", "second"]
