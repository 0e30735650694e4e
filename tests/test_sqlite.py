"""The SQLite backend: the contract, looked at with SQL, and what only it does."""

import asyncio
import re
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from flatfile_chat_database import Message, StorageManager
from flatfile_chat_database.backends import arriving, sqlite, staged
from flatfile_chat_database.backends import sql as scripts
from flatfile_chat_database.backends.base import Capability, StorageBackend
from flatfile_chat_database.backends.changes import Append, Put, Require
from flatfile_chat_database.backends.rules import version_of
from flatfile_chat_database.backends.sqlite import SqliteBackend
from flatfile_chat_database.backends.tables import Tables
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.errors import ConfigurationError, IntegrityError, NotFoundError, UnavailableError
from flatfile_chat_database.layout import Layout
from flatfile_chat_database.models import new_id
from flatfile_chat_database.testing.case import LOG, fresh_processes, line
from flatfile_chat_database.testing.contract import BackendContract

from .backdoors import records_of

SCRIPT = Path(scripts.__path__[0], "sqlite_0001.sql")
TABLES = Tables(Layout(StorageConfig()))


@pytest.mark.slow
class TestSqlite(BackendContract):
    """One file, looked at with SQL of the tests' own."""

    capabilities = frozenset(
        {
            Capability.PERSISTENT,
            Capability.PROCESSES,
            Capability.ATOMIC_APPEND,
            Capability.STREAMED_BLOBS,
            Capability.SNAPSHOTS,
            Capability.EXTENTS,
        }
    )

    @pytest.fixture(autouse=True)
    def medium(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = tmp_path / "store" / "chats.sqlite3"
        monkeypatch.setattr(arriving, "_MOST", 3)  # messages are moved all the time
        monkeypatch.setattr(staged, "_MANY", 4)

    def make_backend(self, config: StorageConfig) -> StorageBackend:
        return SqliteBackend(config, str(self.path))

    def _connect(self) -> sqlite3.Connection:
        fresh = not self.path.exists()
        self.path.parent.mkdir(exist_ok=True)
        connection = sqlite3.connect(self.path, isolation_level=None)
        if fresh:
            connection.executescript(SCRIPT.read_text("utf-8"))
            connection.executescript(f"PRAGMA application_id = {0x63686174}; PRAGMA user_version = 1;")
        return connection

    def peek(self, key: str) -> bytes | None:
        if not self.path.exists():
            return None
        connection = self._connect()
        try:
            found = connection.execute("SELECT place, id FROM entries WHERE key = ?", (key,)).fetchone()
            if found is None:
                return None
            if found[0] == "pieces":
                rows = connection.execute("SELECT data FROM pieces WHERE id = ? ORDER BY number", found[1:])
                return b"".join(data for (data,) in rows)
            spot = TABLES.log(key) if found[0] == "log" else TABLES.document(key)
            assert spot is not None
            where = " AND ".join(f"{name} = ?" for name in spot.table.ids)
            order = " ORDER BY position" if found[0] == "log" else ""
            rows = connection.execute(f"SELECT body FROM {spot.table.name} WHERE {where}{order}", spot.ids)
            end = b"\n" if found[0] == "log" else b""
            return b"".join(body.encode() + end for (body,) in rows)
        finally:
            connection.close()

    def poke(self, key: str, data: bytes) -> None:
        connection = self._connect()
        records = records_of(data) if key.endswith(".jsonl") else None
        if records is None:
            cut = ((f"poked {key}", at, data[at : at + 100_000]) for at in range(0, len(data), 100_000))
            connection.executemany("INSERT INTO pieces VALUES (?, ?, ?)", cut)
            row = (key, "pieces", len(data), f"poked {key}")
        else:
            lines = data.decode().split("\n")
            spot = TABLES.log(key)
            columns = ", ".join(("key", *(name for name in spot.table.ids if name != "key")))
            values = (key, *(value for value in spot.ids if value != key))
            marks = ", ".join("?" * len(values))
            log = connection.execute(f"INSERT INTO logs ({columns}) VALUES ({marks})", values).lastrowid or 0
            rows = [((log << 32) + n, record["id"], lines[n]) for n, record in enumerate(records)]
            half = len(rows) // 2  # as if the others had come later
            connection.executemany("INSERT INTO records (place, id, body) VALUES (?, ?, ?)", rows[:half])
            connection.executemany("INSERT INTO arrivals (place, id, body) VALUES (?, ?, ?)", rows[half:])
            row = (key, "log", None, f"poked {key}")  # type: ignore[assignment]
        connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?)", row)
        connection.close()

    def peek_keys(self) -> list[str]:
        if not self.path.exists():
            return []
        connection = self._connect()
        try:
            return [key for (key,) in connection.execute("SELECT key FROM entries")]
        finally:
            connection.close()

    def is_untouched(self) -> bool:
        return not self.path.parent.exists()


# --- what only a database does ---------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chats.sqlite3"


@asynccontextmanager
async def opened(path: Path, **settings: Any) -> AsyncIterator[SqliteBackend]:
    backend = SqliteBackend(StorageConfig(**settings), str(path))
    await backend.open()
    try:
        yield backend
    finally:
        await backend.close()


async def sql(path: Path, *statements: str) -> list[tuple[Any, ...]]:
    """Run statements as another program does; return the rows of the last."""

    def run() -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(path)
        try:
            rows = [connection.execute(statement).fetchall() for statement in statements][-1]
            connection.commit()
            return rows
        finally:
            connection.close()

    return await asyncio.to_thread(run)


async def test_people_can_ask_in_sql(path: Path) -> None:
    async with opened(path) as store, StorageManager(backend=store) as storage:
        await storage.create_user("ada")
        session = await storage.create_session("ada", "A title")
        for role in ("user", "assistant", "user"):
            await storage.add_message("ada", session, Message(role, "a\0b\\u0000\\"))
        assert await sql(path, "SELECT role, count(*) FROM messages GROUP BY role") == [("assistant", 1), ("user", 2)]
        assert await sql(path, "SELECT DISTINCT content FROM messages") == [("a\ufffdb\\u0000\\",)]
        assert await sql(path, "SELECT title FROM sessions") == [("A title",)]
        assert [message.content for message in await storage.get_messages("ada", session)] == ["a\0b\\u0000\\"] * 3


async def test_a_file_that_somebody_holds_is_waited_for_once_and_not_by_each(path: Path) -> None:
    async with opened(path, lock_timeout_seconds=0.5) as store:
        await store.commit([Append(LOG, (line("m0"),))])
        other = await asyncio.to_thread(sqlite3.connect, path, isolation_level=None, check_same_thread=False)
        await asyncio.to_thread(other.execute, "BEGIN IMMEDIATE")
        attempts = 0
        real = store._writing
        assert real is not None
        begin = real.begin_writing

        def counted() -> bool:
            nonlocal attempts
            attempts += 1
            return begin()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(real, "begin_writing", counted)
            work = [store.commit([Append(LOG, (line(f"n{number}"),))]) for number in range(20)]
            results = await asyncio.gather(*work, return_exceptions=True)
        assert [type(result) for result in results] == [UnavailableError] * 20
        assert len({id(result) for result in results}) == 20
        assert attempts == 1
        await asyncio.to_thread(other.close)
        assert await store.commit([Append(LOG, (line("late"),))]) == [1]
        assert store.statistics()["commits"] == 22


async def test_a_file_that_is_not_in_wal_mode_yet_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    waits = 0

    def wait() -> None:
        nonlocal waits
        waits += 1
        if waits == 3:
            other.execute("ROLLBACK")

    monkeypatch.setattr(sqlite, "_wait", wait)
    other.execute("BEGIN IMMEDIATE")
    async with opened(path) as store:
        assert await store.write("a", b"1")
        assert waits == 3
        assert await store.read("a") == b"1"
    other.close()


async def test_a_file_that_is_held_for_too_long_is_told(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    async with opened(path, lock_timeout_seconds=0.1) as store:
        with pytest.raises(UnavailableError, match="Another program holds it"):
            await store.write("a", b"1")
        other.execute("ROLLBACK")
        assert await store.write("a", b"1")
    other.close()


def make(path: str, number: int, ready: Barrier) -> None:
    async def run() -> None:
        store = SqliteBackend(StorageConfig(lock_timeout_seconds=60), path)
        await store.open()
        ready.wait()
        await store.write(f"by {number}", b"x")
        await store.close()

    asyncio.run(run())


@pytest.mark.slow
async def test_many_processes_make_one_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    starting = fresh_processes()
    ready = starting.Barrier(4)
    processes = [starting.Process(target=make, args=(str(path), number, ready)) for number in range(4)]
    for process in processes:
        await asyncio.to_thread(process.start)
    for process in processes:
        await asyncio.to_thread(process.join)
    assert [process.exitcode for process in processes] == [0] * 4
    async with opened(path) as store:
        assert await store.list_keys("") == [f"by {number}" for number in range(4)]


async def test_a_stream_sees_one_state_of_a_log_that_becomes_another(path: Path) -> None:
    async with opened(path) as store:
        lines = tuple(line(f"m{number}", "x" * 1000) for number in range(1000))
        await store.commit([Append(LOG, lines)])
        seen: list[bytes] = []
        async for run in store.stream_log(LOG):
            if not seen:
                await store.append(LOG, b"no message\n")  # from now on it is kept as bytes
                await store.commit([Append(LOG, (line("late"),))])
            seen += run
        assert seen == [each[:-1] for each in lines]
        assert await store.count_log(LOG) == 1001


async def test_lines_longer_than_a_piece_come_whole_from_a_damaged_log(path: Path) -> None:
    async with opened(path) as store:
        long = line("long", "x" * 3_000_000)
        await store.append(LOG, line("m0") + b"no message\n" + long + line("m1"))
        assert [run for runs in [run async for run in store.stream_log(LOG)] for run in runs] == [
            each[:-1] for each in (line("m0"), long, line("m1"))
        ]


async def test_a_message_sent_again_among_others_is_stored_once(path: Path) -> None:
    async with opened(path) as store:
        owner = Require("users/ann/chat/session.json", "The session")
        await store.write(owner.key, b"{}")
        await store.commit([Append(LOG, (line("m0"),))])
        work = [store.commit([owner, Append(LOG, (line(name),), ids=(name,))]) for name in ("m0", "m1", "m2", "m1")]
        work.append(store.commit([Require("absent", "It"), Append(LOG, (line("m9"),), ids=("m9",))]))
        results = await asyncio.gather(*work, return_exceptions=True)
        assert results[:4] == [[None, 0], [None, 1], [None, 1], [None, 0]]
        assert isinstance(results[4], NotFoundError)
        assert await store.count_log(LOG) == 3
        assert store.statistics()["commits"] == 7


async def test_messages_of_one_call_are_looked_for_together(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    execute = sqlite.SqliteSession.execute

    def noted(session: sqlite.SqliteSession, statement: str, parameters: Any = ()) -> list[tuple[Any, ...]]:
        asked.append(statement)
        return execute(session, statement, parameters)

    monkeypatch.setattr(sqlite.SqliteSession, "execute", noted)
    async with opened(path) as store:
        lines = [line(f"m{at}\n'") for at in range(450)]
        # Some where they arrive, some in their place.
        for some in (lines[:400], lines[400:410]):
            assert await store.commit([Append(LOG, tuple(some))]) == [len(some)]
        asked.clear()
        assert await store.commit([Append(LOG, tuple(lines))]) == [40]
        assert len(asked) < len(lines) / 10


@pytest.mark.parametrize("statement", ["DELETE FROM users", "UPDATE users SET user_id = 'eve'"])
async def test_a_row_that_is_gone_is_damage_and_not_absence(path: Path, statement: str) -> None:
    key = "users/ada/profile.json"
    async with opened(path) as store:
        await store.write(key, b"{}\n")
        await sql(path, statement)
        with pytest.raises(IntegrityError, match=r"profile\.json is in the table `entries`"):
            await store.read(key)
        with pytest.raises(IntegrityError):
            await store.commit([Put(key, b"{}", version_of(b"{}\n"))])
        assert await store.write(key, b"{}\n"), "writing it anew mends it"
        assert await store.read(key) == b"{}\n"


async def test_a_row_that_is_missing_in_a_log_is_damage(path: Path) -> None:
    async with opened(path) as store:
        await store.commit([Append(LOG, tuple(line(f"m{number}") for number in range(5)))])
        await sql(path, "DELETE FROM arrivals WHERE place % 65536 = 2")
        assert len(await store.read_log(LOG, 3)) == 2, "what is there can be read"
        for read in (store.read_log(LOG), store.read(LOG), store.read_log(LOG, -3)):
            with pytest.raises(IntegrityError, match="position 2 is missing"):
                await read


async def test_what_an_upload_left_behind_is_removed_later(path: Path) -> None:
    async with opened(path) as store:
        await store.write("a/b", b"x")
        fresh = new_id()
        await sql(path, *(f"INSERT INTO pieces VALUES ('{name}', 0, x'00')" for name in (OLD, fresh, "no id of ours")))
        found = {problem.key for problem in await store.verify(fix=True)}
        assert found == {OLD, "no id of ours"}
        assert await sql(path, "SELECT count(*) FROM pieces") == [(2,)], "one of them may be under way"


OLD = "01000000-0000-7000-8000-000000000000"
"""An id of 2004."""


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + bytes(84)])
async def test_a_file_that_is_no_database_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises((IntegrityError, ConfigurationError)):
        async with opened(path):
            pass
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("statement", "why"),
    [("CREATE TABLE x (a)", "no chat store"), ("PRAGMA user_version = 7", "no chat store")],
)
async def test_a_foreign_database_is_refused(path: Path, statement: str, why: str) -> None:
    await sql(path, statement)
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match=why):
        async with opened(path):
            pass
    assert path.read_bytes() == before


async def test_a_store_of_a_newer_version_is_refused(path: Path) -> None:
    async with opened(path) as store:
        await store.write("a", b"x")
    await sql(path, "PRAGMA user_version = 99")
    with pytest.raises(ConfigurationError, match="version 99 of the tables"):
        async with opened(path):
            pass


_ADD = re.findall("INSERT INTO arrivals .*? DO NOTHING", arriving.preparing(), re.DOTALL)


@pytest.mark.parametrize(
    "statement", [re.sub(r"NEW\.\w+", "?", _ADD[0]), staged._FIND, staged._LINES_OF.format("?, ?")]
)
async def test_an_id_that_many_logs_have_is_looked_for_in_one(path: Path, statement: str) -> None:
    """Ids such as "1" and "2" are in every chat of some applications."""
    async with opened(path) as backend:
        await backend.append(LOG, line("m0"))
    with closing(sqlite3.connect(path)) as connection:
        plan = connection.execute(f"EXPLAIN QUERY PLAN {statement}", [None] * statement.count("?")).fetchall()
    by_id = [detail for *_, detail in plan if "_by_id" in detail]
    assert by_id and all(detail.endswith("(id=? AND <expr>=?)") for detail in by_id), plan


async def test_what_was_purged_is_overwritten_in_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arriving, "_MOST", 5)  # some messages were moved
    secrets = [f"secret-{number}-".encode() * 40 for number in range(12)]
    async with opened(path) as store, StorageManager(backend=store) as storage:
        await storage.create_user("ada")
        for session in ("kept", "purged"):
            await storage.create_session("ada", session_id=session)
        for number, secret in enumerate(secrets):
            await storage.add_message("ada", "purged", Message("user", secret.decode()))
            await storage.add_message("ada", "kept", Message("user", f"kept {number}"))
        await storage.save_document("ada", "purged", "paper.txt", b"secret-paper" * 100)
    assert all(secret in path.read_bytes() for secret in (*secrets, b"secret-paper"))
    async with opened(path) as store, StorageManager(backend=store) as storage:
        await storage.delete_session("ada", "purged")
        await storage.purge(user_id="ada", session_id="purged")
        assert len(await storage.get_messages("ada", "kept")) == len(secrets)
    assert not Path(f"{path}-wal").exists()
    data = path.read_bytes()
    assert b"kept 11" in data and b"secret-" not in data
