"""The PostgreSQL backend: the contract, looked at with SQL, and what only it does."""

import asyncio
import logging
import socket
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing
from typing import Any
from urllib.parse import quote, unquote

import psycopg
import pytest

from flatfile_chat_database import Message, StorageManager
from flatfile_chat_database.backends.base import Capability, StorageBackend
from flatfile_chat_database.backends.changes import Append, Put, Quota, Require
from flatfile_chat_database.backends.gathered import Gathered
from flatfile_chat_database.backends.opening import open_backend
from flatfile_chat_database.backends.postgres import PostgresBackend, contents
from flatfile_chat_database.backends.postgres.session import PostgresSession
from flatfile_chat_database.backends.postgres.target import Target, warned
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
from flatfile_chat_database.records import listing
from flatfile_chat_database.testing.case import LOG, bare, ids, line
from flatfile_chat_database.testing.contract import BackendContract

from . import postgres

pytestmark = pytest.mark.slow


class TestPostgres(BackendContract):
    """The tables of one database, looked at with SQL of the tests' own."""

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
    def medium(self) -> None:
        self.url = postgres.empty_store()

    def make_backend(self, config: StorageConfig) -> StorageBackend:
        config.storage_url = self.url
        return PostgresBackend(config)

    def peek(self, key: str) -> bytes | None:
        return postgres.peek(self.url, key)

    def poke(self, key: str, data: bytes) -> None:
        postgres.poke(self.url, key, data)

    def peek_keys(self) -> list[str]:
        return postgres.peek_keys(self.url)


# --- what only a server does -------------------------------------------------------------------------------


KEY = "users/ada/profile.json"


def config_of(url: str, **settings: Any) -> StorageConfig:
    return StorageConfig(storage_url=url, **settings)


@asynccontextmanager
async def opened(url: str, **settings: Any) -> AsyncIterator[PostgresBackend]:
    backend = PostgresBackend(config_of(url, **settings))
    await backend.open()
    try:
        yield backend
    finally:
        await backend.close()


@pytest.fixture
def url() -> str:
    return postgres.empty_store()


async def test_people_can_ask_in_sql(url: str) -> None:
    async with StorageManager(config_of(url)) as storage:
        await storage.create_user("ada")
        session = await storage.create_session("ada", "Tea")
        await storage.add_messages("ada", session, [Message("user", "100 % \0?"), Message("assistant", "%s")])
        assert [message.content for message in await storage.get_messages("ada", session)] == ["100 % \0?", "%s"]
        assert [found.title for found in await storage.list_sessions("ada")] == ["Tea"]
    asked = postgres.server().sql("SELECT role, count(*) FROM messages GROUP BY role ORDER BY role")
    assert asked == "assistant|1\nuser|1"
    assert postgres.sql(url, "SELECT content FROM messages ORDER BY position") == [("100 % \ufffd?",), ("%s",)]


async def test_opening_and_reading_make_nothing() -> None:
    url = postgres.fresh_schema()
    async with opened(url) as store, opened(url) as other:
        assert await store.list_keys("") == [] and await store.read(KEY) is None
        assert [run async for run in store.stream_log(LOG)] == []
        assert postgres.sql(url, "SELECT count(*) FROM pg_class WHERE relnamespace = current_schema()::regnamespace")
        await other.write(KEY, b"{}")
        assert await store.read(KEY) == b"{}", "the store that somebody made meanwhile is found"


async def test_two_schemas_are_two_stores(url: str) -> None:
    async with opened(postgres.fresh_schema()) as one, opened(postgres.fresh_schema()) as two, opened(url) as third:
        await one.write(KEY, b"{}")
        assert await two.list_keys("") == await third.list_keys("") == []


async def test_many_nodes_make_the_tables_once() -> None:
    url = postgres.fresh_schema()
    nodes = [PostgresBackend(config_of(url)) for _ in range(6)]
    for node in nodes:
        await node.open()
    await asyncio.gather(*(node.write(f"users/u{number}/profile.json", b"{}") for number, node in enumerate(nodes)))
    for node in nodes:
        assert len(await node.list_keys("")) == len(nodes)
        await node.close()


async def test_an_id_with_a_character_that_the_database_cannot_hold_is_kept(url: str) -> None:
    odd = line("a\0b", "x\0y")
    async with opened(url) as store:
        await store.commit([Append(LOG, (line("m0"),))])
        await store.commit([Append(LOG, (odd, line("m1")), ids=("a\0b", "m1"))])
        assert await store.read_log(LOG) == bare([line("m0"), odd, line("m1")])
        assert await store.find_record(LOG, "a\0b") == (1, odd[:-1])
        assert await store.find_record(LOG, "\ud800") is None
        assert await store.list_keys("users/\0") == []


@pytest.mark.parametrize("how", ["one by one", "together"])
async def test_new_messages_are_gathered_and_repeated_ones_are_not(url: str, how: str) -> None:
    owner = Require("users/ann/chat/session.json", "It")
    async with opened(url) as store:
        await store.commit([Put(owner.key, b"{}"), Append(LOG, (line("m0"),))])
        again = [Append(LOG, (line(name),), ids=(name,)) for name in ("m0", "m1", "m2", "m1")]
        if how == "together":
            added = await asyncio.gather(*(store.commit([owner, append]) for append in again))
        else:
            added = [await store.commit([owner, append]) for append in again]
        assert added == [[None, 0], [None, 1], [None, 1], [None, 0]]
        absent = store.commit([Require("absent", "It"), Append(LOG, (line("m9"),), ids=("m9",))])
        full = store.commit([owner, Append(LOG, (line("m9"),), 3, "the limit", ids=("m9",))])
        results = await asyncio.gather(absent, full, return_exceptions=True)
        assert [type(result) for result in results] == [NotFoundError, StorageLimitExceeded]
        assert await store.read_log(LOG) == bare([line("m0"), line("m1"), line("m2")])


async def test_messages_of_one_call_are_looked_for_by_no_statement_each(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = noting_statements(monkeypatch)
    counts = []
    odd = "\n'\\,{}\" NULL"  # an id may hold whatever a list of PostgreSQL takes for something else
    async with opened(url) as store:
        for number in (3, 300):
            lines = [line(f"m{at}-{number}") for at in range(number)]
            assert await store.commit([Append(LOG, tuple(lines))]) == [number]
            asked.clear()
            assert await store.commit([Append(LOG, (*lines, line(f"{odd}{number}")))]) == [1]
            counts.append(len(asked))
            assert await store.commit([Append(LOG, (line(f"{odd}{number}"), *lines))]) == [0]
    assert counts[0] == counts[1]


async def test_a_page_reads_nothing_else_while_the_server_has_no_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    url = postgres.fresh_schema()
    asked = noting_statements(monkeypatch)
    async with StorageManager(config_of(url)) as storage:
        await storage.create_user("ada")
        session = await storage.create_session("ada")
        postgres.sql(url, *(f"ALTER TABLE {name} SET (autovacuum_enabled = off)" for name in ("messages", "entries")))
        # Long ids, so that their index has a level more and seems dearer than the other one.
        said = [Message("user", str(number), id=f"{'m' * 250}{number}") for number in range(1000)]
        await storage.add_messages("ada", session, said)
        assert postgres.sql(url, "SELECT reltuples FROM pg_class WHERE oid = 'messages'::regclass") == [(-1,)]
        found = await storage.get_messages("ada", session, 1000)
        [log] = [key for key in await storage.backend.list_keys("") if key.endswith("messages.jsonl")]
        asks: list[Callable[[], Awaitable[object]]] = [
            lambda: storage.get_messages("ada", session, 10, 0),
            lambda: storage.get_messages("ada", session, 10, 500),
            lambda: storage.get_messages("ada", session, 10, -10),
            lambda: storage.get_message("ada", session, found[500].id),
            lambda: storage.page_messages("ada", session, limit=10, before=found[500].id),
            lambda: storage.add_messages("ada", session, found[500:510]),
            lambda: storage.backend.read_log_at([(log, at, 10) for at in range(500, 510)]),
        ]
        explaining = await asyncio.to_thread(PostgresSession, Target(config_of(url)), to_write=False)
        with closing(explaining):
            for ask in asks:
                asked.clear()
                await ask()
                of_messages = [each for each in asked if "FROM messages" in each[0]]
                plans = [await asyncio.to_thread(most_rows, explaining, *each) for each in of_messages]
                assert plans and max(plans) <= 11  # a page looks whether there is more


async def test_a_list_reads_what_it_shows_and_what_another_node_changed(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "SMALL_SESSIONS", 0)
    async with StorageManager(config_of(url)) as storage, StorageManager(config_of(url)) as node:
        await node.create_user("ada")
        for number in range(5):
            await node.create_session("ada", session_id=f"s{number}")
        for _ in range(2):
            await storage.list_sessions("ada")
        asked = noting_statements(monkeypatch)
        assert [found.id for found in await storage.list_sessions("ada", 1)] == ["s4"]
        assert {key for _, values in asked for key in str(values).split("'") if key.endswith("session.json")} == {
            "users/ada/s4/session.json"
        }
        await node.add_message("ada", "s1", Message("user", "Hello"))
        await node.delete_session("ada", "s4")
        assert [found.id for found in await storage.list_sessions("ada", 2)] == ["s1", "s3"]
        assert await storage.count_sessions("ada") == 4


def noting_statements(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Return what is going to hold every statement that a session runs, with its parameters."""
    asked: list[tuple[str, Any]] = []
    execute = PostgresSession.execute

    def noted(session: PostgresSession, statement: str, parameters: Any = ()) -> list[tuple[Any, ...]]:
        asked.append((statement, parameters))
        return execute(session, statement, parameters)

    monkeypatch.setattr(PostgresSession, "execute", noted)
    return asked


def most_rows(session: PostgresSession, statement: str, parameters: Any) -> int:
    """Run a statement; return how many rows the step of its plan read that read the most."""

    def steps(plan: dict[str, Any]) -> Iterator[int]:
        yield plan["Actual Loops"] * (
            plan["Actual Rows"] + sum(count for name, count in plan.items() if name.startswith("Rows Removed"))
        )
        for below in plan.get("Plans", ()):
            yield from steps(below)

    [([found],)] = session.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters)
    return max(steps(found["Plan"]))


async def test_loading_is_putting_where_nothing_is(url: str) -> None:
    log = line("m0") + line("m1")
    items = [
        (KEY, b'{"created_at": "2026"}'),
        (LOG, log),
        ("users/ann/chat2/messages.jsonl", log + b"half"),
        ("users/ann/chat/documents/x", bytes(3_000_000)),
        ("system/trash/x/messages.jsonl", log),
        ("empty", b""),
    ]
    async with opened(url) as store:
        await store.load(items)
        assert [await store.read(key) for key, _ in items] == [data for _, data in items]
        assert await store.find_record(LOG, "m1") == (1, line("m1")[:-1])
        assert postgres.sql(url, "SELECT user_id, created_at FROM users") == [("ada", "2026")]
        for taken in ([("new", b"x"), items[0]], [("new", b"x"), ("new", b"x")]):
            with pytest.raises(ConflictError):
                await store.load(taken)
        assert await store.read("new") is None
        await store.load([])


async def test_what_copy_reads_as_something_else_is_loaded_as_it_is(url: str) -> None:
    texts = ["plain", "\\", "\\N", "\\.", "a\tb", "a\nb", "\r", "a\0b", "\x1e\x7f", "ü 🐘", ""]
    lines = [line(f"m{number}", text) for number, text in enumerate(texts)]
    lines.append(b'{"id": "t",\t"role":"user", "content":"tab","timestamp":"now"}\r\n')
    lines += [line(f"n{number}", "more than are put in one text") for number in range(100)]
    odd = b'{"id":"x","role":"user","content":"c","timestamp":"t","other":"\xff"}\n'  # no UTF-8, which is passed over
    items = [
        (LOG, b"".join(lines)),
        ("users/ann/chat2/messages.jsonl", lines[0] + lines[-1]),
        ("users/ann/chat3/messages.jsonl", b""),
        ("users/ann/chat4/messages.jsonl", odd),
        ("system/trash/x/messages.jsonl", b"".join(lines)),
        (KEY, b'{"created_at": "\\\\N\\t\\u0000"}\t\r\n'),
    ]
    async with opened(url) as store:
        await store.load(items)
        assert await store.read_many([key for key, _ in items]) == [data for _, data in items]
        assert await store.read_many(["users/ann/chat3/messages.jsonl", "absent", KEY]) == [b"", None, items[-1][1]]
        async with store.snapshot() as snapshot:
            sizes = {key: size async for run in snapshot.sized() for key, size in run}
        assert sizes == {key: len(data) for key, data in items}
        shown = postgres.sql(url, "SELECT content FROM messages WHERE session_id = 'chat' ORDER BY position")
        assert [text for (text,) in shown[: len(texts)]] == [text.replace("\0", "\ufffd") for text in texts]
        assert postgres.sql(url, "SELECT created_at FROM users") == [("\\N\t\ufffd",)]


async def test_a_stream_sees_one_state_and_little_memory_of_it(url: str) -> None:
    wide = line("wide", "x" * 1_000_000)
    async with opened(url) as store, opened(url) as other:
        await store.commit([Append(LOG, tuple(line(f"m{number}") for number in range(1000)))])
        runs = store.stream_log(LOG)
        seen = await anext(runs)
        await other.delete(LOG)
        await other.commit([Append(LOG, tuple(line(f"n{number}", "x" * 1_000_000) for number in range(4)))])
        async for run in runs:
            seen += run
        assert ids(seen) == [f"m{number}" for number in range(1000)]
        assert [len(run) async for run in other.stream_log(LOG)] == [1] * 4
        assert len(wide) > 1_000_000


async def test_streams_wait_for_a_connection_and_say_so_when_none_comes(url: str) -> None:
    async with opened(url, database_pool_size=2, lock_timeout_seconds=0.2) as store:
        await store.commit([Append(LOG, tuple(line(f"m{number}") for number in range(1000)))])
        held = [store.stream_log(LOG) for _ in range(3)]
        await anext(held[0])
        await anext(held[1])
        with pytest.raises(UnavailableError, match="database_pool_size"):
            await anext(held[2])
        assert await store.count_log(LOG) == 1000, "everything else goes on"
        waits = asyncio.ensure_future(anext(store.stream_log(LOG)))
        await held[0].aclose()  # type: ignore[attr-defined]
        assert len(await waits) > 1
        await held[1].aclose()  # type: ignore[attr-defined]


async def test_a_caller_who_is_cancelled_leaves_everything_in_order(url: str) -> None:
    async with opened(url, database_pool_size=1) as store:
        await store.commit([Append(LOG, tuple(line(f"m{number}") for number in range(1000)))])
        for turns in range(12):

            async def stream() -> None:
                async for _ in store.stream_log(LOG):
                    await asyncio.sleep(0)

            tasks = [asyncio.ensure_future(work) for work in (stream(), store.read(LOG), store.write(KEY, b"{}"))]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert sum([len(run) async for run in store.stream_log(LOG)]) == 1000
        assert await store.write(KEY, b"{}")


async def test_waiting_for_another_writer_ends(url: str) -> None:
    async with opened(url, lock_timeout_seconds=0.1) as store:
        await store.write(KEY, b"{}")
        [(number,)] = postgres.sql(url, "SELECT 'public'::regnamespace::oid::bigint")
        postgres.sql(url, "BEGIN", f"SELECT pg_advisory_xact_lock({(0x63686174 << 32) + number})")
        try:
            with pytest.raises(UnavailableError, match="lock_timeout_seconds"):
                await store.write(KEY, b"[]")
            assert await store.read(KEY) == b"{}", "readers wait for nobody"
        finally:
            postgres.sql(url, "ROLLBACK")
        assert await store.write(KEY, b"{}")


@pytest.mark.parametrize("level", ["repeatable%5C%20read", "serializable"])
async def test_writers_see_what_others_wrote_whatever_level_the_database_has(level: str) -> None:
    url = f"{postgres.fresh_schema()}%20-cdefault_transaction_isolation%3D{level}"
    assert postgres.sql(url, "SHOW default_transaction_isolation") != [("read committed",)]
    async with opened(url) as store:
        await store.write(KEY, b"{}")
        [(number,)] = postgres.sql(url, "SELECT current_schema()::regnamespace::oid::bigint")
        postgres.sql(url, "BEGIN", f"SELECT pg_advisory_xact_lock({(0x63686174 << 32) + number})")
        commit = asyncio.ensure_future(store.commit([Quota("many", 1, "the limit"), Put("many/b/x", b"{}")]))

        def wait() -> None:
            while not postgres.sql(url, "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"):
                pass

        await asyncio.to_thread(wait)
        postgres.sql(url, "INSERT INTO entries VALUES ('many/a/x', 'pieces', 0, 'x')", "COMMIT")
        with pytest.raises(StorageLimitExceeded):
            await commit


async def test_an_error_of_any_kind_leaves_no_transaction_open(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Require("users/ann/chat/session.json", "It")

    def fail(self: Gathered) -> None:
        raise RuntimeError("a secret")

    async with opened(url) as store:
        await store.commit([Put(owner.key, b"{}"), Append(LOG, (line("m0"),))])
        with monkeypatch.context() as patch:
            patch.setattr(Gathered, "flush", fail)
            with pytest.raises(DurabilityError, match="RuntimeError") as caught:
                await store.commit([owner, Append(LOG, (line("m1"),), ids=("m1",))])
            assert "secret" not in str(caught.value)
        assert postgres.sql(url, "SELECT state FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'") == []
        assert await store.commit([owner, Append(LOG, (line("m1"),), ids=("m1",))]) == [None, 1]


async def test_a_message_that_is_none_harms_no_others(url: str) -> None:
    owner = Require("users/ann/chat/session.json", "It")
    async with opened(url) as store:
        await store.commit([Put(owner.key, b"{}"), Append(LOG, (line("m0"),))])
        bad = b'{"id": "bad"}\n'
        work = [store.commit([owner, Append(LOG, (each,), ids=("x",))]) for each in (line("x"), bad)]
        results = await asyncio.gather(*work, return_exceptions=True)
        assert results[0] == [None, 1] and isinstance(results[1], StorageError)
        assert await store.count_log(LOG) == 2


async def test_a_statement_that_takes_too_long_ends() -> None:
    url = postgres.fresh_schema()
    async with opened(url, database_timeout_seconds=0.2) as store:
        await store.write(KEY, b"{}")
        postgres.sql(
            url,
            "ALTER TABLE users RENAME TO slow",
            "CREATE VIEW users AS SELECT slow.* FROM slow, pg_sleep(60)",
        )
        with pytest.raises(UnavailableError, match="database_timeout_seconds"):
            await store.read(KEY)
        assert await store.exists(KEY)


async def test_what_a_transaction_changed_that_ends_late_is_told(url: str) -> None:
    note = "INSERT INTO changes VALUES (pg_current_xact_id(), gen_random_uuid()::text, '{}')"
    other = psycopg.connect(url)
    async with opened(url) as store:
        await store.write("first", b"x")
        other.execute(note.format("late"))  # its number is smaller than that of the next one
        await store.write("second", b"x")
        changes = await store.changes((await store.changes(None)).cursor)
        assert changes.keys == frozenset()
        await store.write("third", b"x")
        changes = await store.changes(changes.cursor)
        assert changes.keys == frozenset({"third"})
        changes = await store.changes(changes.cursor)
        assert changes.keys == frozenset(), "told once, however long another one takes"
        other.commit()
        changes = await store.changes(changes.cursor)
        assert changes.keys == frozenset({"late"})
        assert (await store.changes(changes.cursor)).keys == frozenset()
    other.close()


async def test_a_cursor_from_before_what_was_forgotten_is_none(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_SWEEP", 1)
    monkeypatch.setattr(contents, "_REMEMBERED_CHANGES", 1)
    note = "INSERT INTO changes VALUES (pg_current_xact_id(), gen_random_uuid()::text, 'late')"
    other = psycopg.connect(url)
    async with opened(url) as store:
        await store.write("first", b"x")
        other.execute(note)  # its number is smaller than that of the next one
        await store.write("second", b"x")
        early = await store.changes(None)
        other.commit()
        await store.write("third", b"x")
        assert postgres.sql(url, "SELECT keys FROM changes WHERE keys <> '' ORDER BY transaction") == [
            ("second",),
            ("third",),
        ], "late is forgotten"
        assert (await store.changes(early.cursor)).keys is None
        now = await store.changes(None)
        await store.write("fourth", b"x")
        assert (await store.changes(now.cursor)).keys == frozenset({"fourth"})
    other.close()


async def test_a_cursor_of_a_store_that_was_put_back_is_none(url: str) -> None:
    async with opened(url) as store:
        await store.write("first", b"x")
        await store.write("second", b"x")
        cursor = (await store.changes(None)).cursor
        server, _, seen = cursor.split(" ")
        for wrong in ("", ":", "1:2", "1:2:3,", "1:2:x", "1:2:-3", "1:2:3:4", "٣:4:", f"1:2:{'9' * 30}", "1 :2:3"):
            assert (await store.changes(f"{server} {wrong} {seen}")).keys is None
        postgres.sql(url, "DELETE FROM changes WHERE keys = 'second'")
        assert (await store.changes(cursor)).keys is None
        for odd in ("", "x", "1 2 3", cursor.replace(" ", " x"), cursor.replace(" ", " 9999999999999999999999")):
            assert (await store.changes(odd)).keys is None


# --- what is wrong with a database -----------------------------------------------------------------------


async def test_a_store_of_a_newer_version_is_refused() -> None:
    url = postgres.fresh_schema()
    async with opened(url) as store:
        await store.write(KEY, b"{}")
    postgres.sql(url, "UPDATE chat_store SET version = 99")
    with pytest.raises(ConfigurationError, match="version 99 of the tables"):
        async with opened(url):
            pass


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("CREATE TABLE messages (id integer)", "has a table 'messages', but is no chat store"),
        ("CREATE VIEW users AS SELECT 1 AS x", "has a table 'users', but is no chat store"),
        ("CREATE TABLE chat_store (x integer)", "has a table 'chat_store', but is no chat store"),
        ("CREATE TABLE chat_store AS SELECT 1 AS version, 'me' AS made_by", "'chat_store' of somebody else"),
    ],
)
async def test_tables_of_somebody_else_are_left_alone(statement: str, why: str) -> None:
    url = postgres.fresh_schema()
    postgres.sql(url, statement)
    with pytest.raises(ConfigurationError, match=why):
        async with opened(url):
            pass
    there = "SELECT count(*) FROM pg_class WHERE relnamespace = current_schema()::regnamespace"
    assert postgres.sql(url, there) == [(1,)]


async def test_other_tables_do_no_harm() -> None:
    url = postgres.fresh_schema()
    postgres.sql(url, "CREATE TABLE invoices (id integer)")
    async with opened(url) as store:
        assert await store.write(KEY, b"{}")


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("ALTER TABLE messages DROP COLUMN body", "'messages' lacks body"),
        ("DROP TABLE panels", "'panels' lacks body, created_at, panel_id, type"),
        ("ALTER TABLE entries RENAME COLUMN size TO length", "'entries' lacks size"),
    ],
)
async def test_a_table_that_was_tampered_with_is_named(statement: str, why: str) -> None:
    url = postgres.fresh_schema()
    async with opened(url) as store:
        await store.write(KEY, b"{}")
        await store.commit([Append(LOG, (line("m0"),))])
        postgres.sql(url, statement)
        with pytest.raises(IntegrityError, match=why):
            async with opened(url):
                pass


async def test_a_table_that_is_tampered_with_while_the_store_is_open_is_named() -> None:
    url = postgres.fresh_schema()
    async with opened(url) as store:
        await store.write(KEY, b"{}")
        postgres.sql(url, "ALTER TABLE users DROP COLUMN body")
        with pytest.raises(IntegrityError, match="users"):
            await store.read(KEY)
        with pytest.raises(IntegrityError, match="users"):
            await store.write(KEY, b'{"a": 1}')
        assert await store.write("other", b"x"), "the rest is as it was"


async def test_a_row_that_is_gone_is_damage_and_not_absence(url: str) -> None:
    async with opened(url) as store:
        await store.write(KEY, b"{}\n")
        postgres.sql(url, "DELETE FROM users")
        with pytest.raises(IntegrityError, match=r"profile\.json is in the table `entries`"):
            await store.read(KEY)
        assert await store.write(KEY, b"{}\n"), "writing it anew mends it"
        await store.commit([Append(LOG, tuple(line(f"m{number}") for number in range(5)))])
        postgres.sql(url, "DELETE FROM messages WHERE position = 2")
        assert len(await store.read_log(LOG, 3)) == 2, "what is there can be read"
        several = store.read_many([KEY, LOG])
        for read in (store.read_log(LOG), store.read(LOG), several, store.read_log(LOG, -3), store.read_log(LOG, 0, 3)):
            with pytest.raises(IntegrityError, match="position 2 is missing"):
                await read


async def test_a_database_of_another_encoding_is_refused() -> None:
    server = postgres.server()
    server.sql("CREATE DATABASE latin ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    with pytest.raises(ConfigurationError, match="encoding is LATIN1"):
        async with opened(server.url("latin")):
            pass


async def test_a_schema_that_is_absent_is_told() -> None:
    with pytest.raises(ConfigurationError, match="no schema of the search_path"):
        async with opened(postgres.server().url(options="-csearch_path%3Dnowhere")):
            pass


async def test_a_user_without_the_rights_is_told(url: str) -> None:
    server = postgres.server()
    async with opened(postgres.fresh_schema()) as store:
        await store.write(KEY, b"{}")
        if not server.sql("SELECT 1 FROM pg_roles WHERE rolname = 'guest'"):
            server.sql("CREATE ROLE guest LOGIN")
        postgres.sql(
            store.config.storage_url,
            "DO $$BEGIN EXECUTE 'GRANT USAGE ON SCHEMA ' || current_schema() || ' TO guest'; END$$",
        )
        with pytest.raises(ConfigurationError, match=r"for table .* Grant .* SELECT, INSERT, UPDATE and DELETE on all"):
            async with opened(store.config.storage_url.replace("postgres@", "guest@")):
                pass
        postgres.sql(store.config.storage_url, "GRANT SELECT ON chat_store TO guest")
        async with opened(store.config.storage_url.replace("postgres@", "guest@")) as guest:
            with pytest.raises(ConfigurationError, match=r"permission denied for table .* Grant"):
                await guest.read(KEY)
            with pytest.raises(ConfigurationError, match=r"permission denied for table .* Grant"):
                await guest.write(KEY, b"{}")


async def test_a_user_who_may_not_make_tables_is_told_the_privilege() -> None:
    server = postgres.server()
    if not server.sql("SELECT 1 FROM pg_roles WHERE rolname = 'guest'"):
        server.sql("CREATE ROLE guest LOGIN")
    url = postgres.fresh_schema()
    schema = url.rpartition("%3D")[2]
    server.sql(f"GRANT USAGE ON SCHEMA {schema} TO guest")
    async with opened(url.replace("postgres@", "guest@")) as guest:
        with pytest.raises(
            ConfigurationError, match=rf"permission denied for schema {schema}\. Grant .* USAGE and CREATE"
        ):
            await guest.write(KEY, b"{}")
    server.sql(f"GRANT CREATE ON SCHEMA {schema} TO guest")
    async with opened(url.replace("postgres@", "guest@")) as guest:
        await guest.write(KEY, b"{}")


async def test_the_privileges_that_are_named_are_enough() -> None:
    server = postgres.server()
    if not server.sql("SELECT 1 FROM pg_roles WHERE rolname = 'guest'"):
        server.sql("CREATE ROLE guest LOGIN")
    url = postgres.fresh_schema()
    schema = url.rpartition("%3D")[2]
    async with opened(url) as store:
        await store.write(KEY, b"{}")
    server.sql(f"GRANT USAGE ON SCHEMA {schema} TO guest")
    server.sql(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO guest")
    async with StorageManager(config_of(url.replace("postgres@", "guest@"))) as storage:
        await storage.create_user("bob")
        session = await storage.create_session("bob", "x")
        await storage.add_message("bob", session, Message("user", "word"))
        assert len(await storage.search_messages("bob", "word")) == 1
        await storage.delete_session("bob", session)
    server.sql(f"REVOKE INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} FROM guest")
    async with StorageManager(config_of(url.replace("postgres@", "guest@")), read_only=True) as storage:
        assert [user.user_id for user in await storage.list_users()] == ["bob"]


async def test_a_server_that_does_not_flush_is_told_once(url: str, caplog: pytest.LogCaptureFixture) -> None:
    warned.discard(url)
    for _ in range(2):
        async with opened(url) as store:
            await store.write(KEY, b"{}")
    assert [record.getMessage() for record in caplog.records if "fsync" in record.getMessage()] == [
        f"{url}: the server runs with fsync off; a power failure there can damage the store"
    ]


@pytest.mark.parametrize(
    ("durability", "given", "set_to"),
    [("full", "off", "on"), ("full", "remote_apply", "remote_apply"), ("normal", "on", "off"), ("os", "on", "off")],
)
def test_commits_wait_for_the_disk_as_the_durability_says(url: str, durability: str, given: str, set_to: str) -> None:
    target = Target(config_of(f"{url}?options=-csynchronous_commit%3D{given}", durability=durability))
    session = PostgresSession(target, to_write=True)
    assert session.execute("SHOW synchronous_commit") == [(set_to,)]
    session.close()


# --- a server that cannot be reached -----------------------------------------------------------------------

SECRET = "hunter2/@:x"
QUOTED = "hunter2%2F%40%3Ax"


@pytest.fixture
def keyed() -> str:
    """The URL of a user who needs a password."""
    server = postgres.server()
    hba = server.data / "pg_hba.conf"
    if "keyed" not in hba.read_text():
        hba.write_text("host all keyed 127.0.0.1/32 scram-sha-256\n" + hba.read_text())
        server.sql(f"CREATE ROLE keyed LOGIN SUPERUSER PASSWORD '{SECRET}'")
        server.sql("SELECT pg_reload_conf()")
    return server.url().replace("postgres@", f"keyed:{QUOTED}@")


@pytest.mark.parametrize(
    ("change", "kind", "why"),
    [
        (("hunter2", "hunter3"), ConfigurationError, "password authentication failed"),
        (("/postgres", "/nowhere"), ConfigurationError, "does not exist"),
        (("keyed:", "nobody:"), ConfigurationError, "does not exist"),
        (("127.0.0.1", "no-such-host.invalid"), UnavailableError, "cannot be connected to"),
        (("127.0.0.1:", "127.0.0.1:1,127.0.0.1:2"), UnavailableError, "cannot be connected to"),
        (("/postgres", "/postgres?target_session_attrs=standby"), UnavailableError, "None of the hosts"),
        (("/postgres", "/postgres?nosuch=1"), ConfigurationError, "no parameter 'nosuch'"),
        (("hunter2", "hunter2%zz"), ConfigurationError, "no URL that PostgreSQL understands"),
        (("127.0.0.1:", "[127.0.0.1:"), ConfigurationError, "no URL that PostgreSQL understands"),
        (("/postgres", "/postgres?port=x&"), (ConfigurationError, UnavailableError), "postgresql://"),
    ],
)
async def test_what_is_wrong_with_a_url_is_told_without_its_password(
    keyed: str, change: tuple[str, str], kind: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(kind, match=why) as caught:
        async with StorageManager(config_of(keyed.replace(*change), database_connect_timeout_seconds=2)):
            pass
    told = "".join(traceback.format_exception(caught.value)) + caplog.text + repr(vars(caught.value))
    assert "hunter" not in told and "%zz" not in told
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "password",
    [
        "hunter@zwei", "hunter/zwei", "hunter?zwei", "hunter?zwei=1", "hunter@b@zwei", "hunter:b@zwei", "hunter%zwei",
        "hunter/b@zwei", "b@hunter,zwei", "hunter%zwei@x", "@hunter", "hunter@[zwei", "hunter?a=b&zwei=@x",
    ],
)  # fmt: skip
def test_a_password_that_is_not_escaped_is_refused_unseen(password: str, caplog: pytest.LogCaptureFixture) -> None:
    url = f"postgresql://heim:{password}@127.0.0.1:1/chats"
    with pytest.raises(ConfigurationError, match="percent-encode") as caught:
        open_backend(StorageConfig(storage_url=url))
    told = "".join(traceback.format_exception(caught.value)) + caplog.text + repr(vars(caught.value))
    assert "hunter" not in told and "zwei" not in told


@pytest.mark.parametrize(
    "password", ["sec#ret", "sec:ret", "sec ret", "sec&ret=", "", *map(quote, ["s@c", "s/:?#% c"])]
)
async def test_no_error_of_a_connection_shows_the_password(password: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    url = f"postgresql://heim:{quote(unquote(password), safe=':#&=')}@127.0.0.1:1/chats"
    with pytest.raises(UnavailableError, match="Connection refused") as caught:
        async with opened(url, database_connect_timeout_seconds=2):
            pass
    told = str(caught.value) + caplog.text + repr(open_backend(StorageConfig(storage_url=url)))
    assert not password or (password not in told and unquote(password) not in told)
    assert "?. " not in str(caught.value)


async def test_nothing_shows_the_password(keyed: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    storage = StorageManager(config_of(keyed))
    async with storage:
        await storage.create_user("ada")
        assert "keyed:***@127.0.0.1" in repr(storage)
        shown = repr(storage) + repr(storage.backend) + repr(storage.config) + caplog.text
        with pytest.raises(IntegrityError) as caught:
            postgres.sql(keyed, "DELETE FROM users")
            await storage.get_user("ada")
        shown += "".join(traceback.format_exception(caught.value))
    assert "hunter" not in shown


async def test_a_host_that_does_not_answer_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        url = f"postgresql://ada@127.0.0.1:{silent.getsockname()[1]}/x"
        with pytest.raises(UnavailableError, match="timeout"):
            async with opened(url, database_connect_timeout_seconds=1):
                pass
