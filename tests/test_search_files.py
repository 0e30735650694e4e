"""The files of the derived index: where they are, what may happen to them, and who else may be at them."""

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import random
import signal
import sqlite3
import stat
import threading
import time
import unicodedata
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from flatfile_chat_database.backends.base import LogPart
from flatfile_chat_database.backends.flatfile import FlatfileBackend
from flatfile_chat_database.check import check
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.errors import NotFoundError, UnavailableError
from flatfile_chat_database.models import Message, SituationalContext
from flatfile_chat_database.records import indexing
from flatfile_chat_database.search import database
from flatfile_chat_database.search.intake import Intake
from flatfile_chat_database.storage import StorageManager
from flatfile_chat_database.testing.case import fresh_processes

from .conftest import MakeStorage
from .recording import RecordingBackend
from .test_search_index import scan, shown, sizes


def index_of(root: Path, user: str = "ada") -> Path:
    return root / "system/index" / f"{user}.sqlite3"


async def fill(storage: StorageManager, sessions: int = 3, messages: int = 5) -> None:
    await storage.create_user("ada")
    for number in range(sessions):
        await storage.create_session("ada", session_id=f"s{number}")
        await storage.add_messages("ada", f"s{number}", [Message("user", f"word x{n}") for n in range(messages)])


async def expect_found(storage: StorageManager, query: str = "word") -> None:
    """Fail unless the index (or what stands in for it) finds what reading finds."""
    with sizes(-1, 0):
        for order in ("time", "relevance"):
            arguments = {"user_id": "ada", "order": order, "limit": 10_000}
            found = await storage.search(query, **arguments)  # type: ignore[arg-type]
            assert found
            assert shown(found) == shown(await scan(storage, query, arguments))


def expect_warning(caplog: pytest.LogCaptureFixture, text: str) -> None:
    warnings = [record.getMessage() for record in caplog.records if "is not used" in record.getMessage()]
    assert [text in warning for warning in warnings] == [True], f"said once, and why: {warnings}"
    caplog.clear()


# --- where they are ------------------------------------------------------------------------------------


async def test_a_short_history_and_few_sessions_have_no_index(make_storage: MakeStorage, store_path: Path) -> None:
    storage = make_storage()
    await fill(storage)
    await storage.search("word", user_id="ada")
    await storage.search("word", user_id="ada", order="relevance")
    await storage.list_sessions("ada")
    await storage.list_sessions("ada")
    assert not (store_path / "system/index").exists()


async def test_a_long_history_gets_an_index_that_is_no_key(
    flat_storage: MakeStorage, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = flat_storage()
    await fill(storage, 3, 700)
    keys = await storage.backend.list_keys("")
    await expect_found(storage)
    path = index_of(store_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert {stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()} == {0o600}
    assert await storage.backend.list_keys("") == keys
    assert "index" not in await storage.backend.list_children("system")
    assert "index" not in await storage.backend.list_folders("system")
    assert (await check(storage.backend)).problems == []
    assert storage.statistics()["index_builds"] == 1
    assert storage.statistics()["index_fallbacks"] == 0


async def test_search_index_path_says_where_they_are(
    flat_storage: MakeStorage, store_path: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "indexes"
    storage = flat_storage(search_index_path=str(elsewhere))
    await fill(storage)
    await expect_found(storage)
    assert not (store_path / "system/index").exists()
    assert [path.name for path in elsewhere.glob("*/*.sqlite3")] == ["ada.sqlite3"]
    other = StorageManager(StorageConfig(storage_base_path=str(tmp_path / "other"), search_index_path=str(elsewhere)))
    await other.create_user("ada")
    await other.create_session("ada", session_id="s")
    await other.add_message("ada", "s", Message("user", "another word"))
    await expect_found(other)
    assert len(list(elsewhere.glob("*/*.sqlite3"))) == 2, "two stores share the folder, not the file"
    await other.close()
    await expect_found(storage)


async def test_a_store_opened_read_only_makes_no_index_and_uses_one_that_is_there(
    flat_storage: MakeStorage, store_path: Path
) -> None:
    storage = flat_storage()
    await fill(storage)
    reader = flat_storage(read_only=True)
    await expect_found(reader)
    assert not (store_path / "system/index").exists()
    with pytest.raises(UnavailableError, match="read-only"):
        await reader.reindex("ada")
    await storage.reindex("ada")
    await storage.close()
    before = sorted(path.name for path in index_of(store_path).parent.iterdir())
    assert before == ["ada.sqlite3"]
    await expect_found(reader)
    assert sorted(path.name for path in index_of(store_path).parent.iterdir()) == before


# --- what may happen to them ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["deleted", "empty", "garbage", "cut", "a page", "folder", "log"])
async def test_an_index_that_was_harmed_answers_rightly(
    flat_storage: MakeStorage, store_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    storage = flat_storage()
    await fill(storage, 3, 400)
    await expect_found(storage)
    await storage.close()
    path = index_of(store_path)
    data = path.read_bytes()
    if harm == "deleted":
        path.unlink()
    elif harm == "folder":
        path.unlink()
        path.mkdir()
    elif harm == "log":
        path.with_name("ada.sqlite3-wal").write_bytes(b"no write-ahead log" * 300)
    else:
        changed = {
            "empty": b"",
            "garbage": random.Random(1).randbytes(20_000),
            "cut": data[: len(data) // 2],
            "a page": data[: 4096 * 3] + random.Random(2).randbytes(4096 * 5) + data[4096 * 8 :],
        }
        path.write_bytes(changed[harm])
    again = flat_storage()
    await expect_found(again)
    await again.add_message("ada", "s1", Message("user", "one more word"))
    await expect_found(again)
    if harm in ("garbage", "empty", "folder"):
        assert any("is not used" in record.getMessage() for record in caplog.records)
        assert again.statistics()["index_fallbacks"] >= 1


WRONG = [
    ("meta", "cursor", 5),
    ("meta", "version", "x"),
    ("meta", "deletions", "x"),
    ("meta", "peak", "no json"),
    ("meta", "peak", 7),
    ("meta", "peak", "[1, 2]"),
    ("meta", "listed", 5),
    ("meta", "listed_version", "x"),
    ("messages", "offset", "q"),
    ("messages", "offset", -5),
    ("messages", "offset", 2**62),
    ("messages", "length", 2**62),
    ("messages", "length", -1),
    ("messages", "length", None),
    ("messages", "moment", "x"),
    ("messages", "moment", b"x"),
    ("messages", "session", 99),
    ("messages", "position", "x"),
    ("messages", "tokens", "x"),
    ("messages", "text", 5),
    ("messages", "text", None),
    ("messages", "role", 5),
    ("logs", "last", "q"),
    ("logs", "last", -5),
    ("logs", "messages", "x"),
    ("logs", "tokens", "x"),
    ("logs", "session_id", 5),
    ("logs", "identity", 5),
    ("sessions", "updated", "x"),
    ("sessions", "session_id", 5),
    ("notes", "moment", "x"),
    ("notes", "filename", 5),
    ("notes", "text", 5),
]


def put_wrong(path: Path, table: str, column: str, value: object) -> None:
    """Put into an index what its tables refuse, as a disk or another program may."""

    def declare(old: str, new: str) -> None:
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("PRAGMA writable_schema=ON")
            connection.execute("UPDATE sqlite_master SET sql = replace(sql, ?, ?) WHERE name = ?", (old, new, table))

    with contextlib.closing(sqlite3.connect(path)) as connection:
        [schema] = connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", (table,)).fetchone()
    loose = schema.replace(", STRICT", "").replace(" STRICT", "").replace(" INTEGER", "").replace(" TEXT", "")
    loose = (
        loose.replace(" PRIMARY KEY", " INTEGER PRIMARY KEY", 1) if table in ("logs", "messages", "notes") else loose
    )
    declare(schema, loose)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        if table == "meta":
            done = connection.execute("UPDATE meta SET value = ? WHERE name = ?", (value, column))
            assert done.rowcount == 1
        else:
            limit = "WHERE session_id = 's1'" if "session_id" in (column,) else ""
            done = connection.execute(f"UPDATE {table} SET {column} = ? {limit}", (value,))
            assert done.rowcount > 0
    declare(loose, schema)


@pytest.mark.slow
@pytest.mark.parametrize(("table", "column", "value"), WRONG)
@pytest.mark.parametrize("telling", [True, False])
async def test_wrong_values_in_an_index_give_right_answers(
    store_path: Path,
    caplog: pytest.LogCaptureFixture,
    table: str,
    column: str,
    value: object,
    telling: bool,
) -> None:
    def backend() -> FlatfileBackend:
        return (RecordingBackend if telling else FlatfileBackend)(
            StorageConfig(storage_base_path=str(store_path)), store_path
        )

    first = backend()
    storage = StorageManager(backend=first)
    await fill(storage)
    await storage.update_context("ada", "s0", SituationalContext("a word more"))
    await storage.reindex("ada")
    with sizes(-1, 0):
        for _ in range(3):
            await storage.list_sessions("ada")
    await storage.close()
    put_wrong(index_of(store_path), table, column, value)
    again = StorageManager(backend=first)
    with sizes(-1, 0):
        listed = await again.list_sessions("ada")
        assert sorted(each.id for each in listed) == ["s0", "s1", "s2"]
        assert await again.count_sessions("ada") == 3
    await expect_found(again)
    await again.add_message("ada", "s1", Message("user", "one more word"))
    await expect_found(again)
    await expect_found(again, "word more")
    before = again.statistics()["index_builds"]
    await expect_found(again)
    assert again.statistics()["index_builds"] == before, "it was built once"
    with sizes(-1, 0):
        assert len(await again.list_sessions("ada")) == 3
    await again.close()
    await first.close()


@pytest.mark.parametrize("reason", ["format", "unicode", "settings"])
async def test_an_index_of_another_kind_is_built_anew(
    flat_storage: MakeStorage, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    storage = flat_storage()
    await fill(storage)
    await storage.reindex("ada")
    await storage.close()
    if reason == "format":
        monkeypatch.setattr(indexing, "FORMAT", "0")
    elif reason == "unicode":
        monkeypatch.setattr(unicodedata, "unidata_version", "99.0")
    again = flat_storage(search_include_metadata=reason == "settings")
    await expect_found(again)
    assert again.statistics()["index_builds"] == 1


async def test_an_index_that_another_program_has_locked_is_done_without(
    flat_storage: MakeStorage,
    store_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    storage = flat_storage()
    await fill(storage)
    await expect_found(storage)
    other = sqlite3.connect(index_of(store_path), isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        await storage.add_message("ada", "s1", Message("user", "a later word"))
        await expect_found(storage, "later")
        expect_warning(caplog, "locked")
        await expect_found(storage, "later")
        assert not [record for record in caplog.records if "is not used" in record.getMessage()], "said once"
    finally:
        other.close()
    await expect_found(storage, "later")


async def test_an_index_that_another_process_is_building_is_not_waited_for(
    flat_storage: MakeStorage, store_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = flat_storage()
    await fill(storage)
    folder = index_of(store_path).parent
    folder.mkdir(mode=0o700)
    descriptor = os.open(folder / "ada.sqlite3.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    await expect_found(storage)
    expect_warning(caplog, "another process is building it")
    with pytest.raises(UnavailableError, match="another process is building it"):
        await storage.reindex("ada")
    os.close(descriptor)  # it died, and left what it had begun
    await expect_found(storage)
    assert index_of(store_path).exists()


async def test_where_no_index_can_be_written_search_reads(
    flat_storage: MakeStorage, store_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = flat_storage()
    await fill(storage)
    (store_path / "system/index").write_bytes(b"")  # no folder can be made here, not even by root
    with sizes(-1, 0):
        assert len(await storage.search("word", user_id="ada")) == 15
        assert len(await storage.list_sessions("ada")) == 3
        assert len(await storage.list_sessions("ada")) == 3
    assert "is not used: File exists. The files are read instead." in caplog.text
    (store_path / "system/index").unlink()


# --- what changes while it is read ---------------------------------------------------------------------


@pytest.mark.parametrize("built", [False, True])
async def test_a_log_that_is_edited_between_two_of_its_parts_is_found_once(
    flat_storage: MakeStorage, store_path: Path, monkeypatch: pytest.MonkeyPatch, built: bool
) -> None:
    storage = flat_storage()
    await fill(storage, 1)
    if built:
        await storage.reindex("ada")
    long = "x" * 30_000
    await storage.add_messages("ada", "s0", [Message("user", f"word {n} {long}") for n in range(50)])
    log = store_path / "users/ada/s0/messages.jsonl"
    read, parts = storage.backend.read_log_part, 0

    def edit() -> None:
        beside = log.with_suffix(".new")
        beside.write_bytes(log.read_bytes())
        beside.rename(log)

    async def read_part(key: str, identity: str | None, start: int) -> LogPart | None:
        nonlocal parts
        parts += 1
        if parts == 2:
            await asyncio.to_thread(edit)
        return await read(key, identity, start)

    monkeypatch.setattr(storage.backend, "read_log_part", read_part)
    await expect_found(storage)
    assert parts >= 3, "it was read in parts, and from the start again"


async def test_a_cancelled_search_lets_others_build(
    flat_storage: MakeStorage, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = flat_storage()
    await fill(storage)
    await storage.search("word", user_id="ada")
    started, go_on = threading.Event(), threading.Event()
    connect = database._connect

    def slow(*arguments: Any, **more: Any) -> sqlite3.Connection:
        started.set()
        go_on.wait(10)
        return connect(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(database, "_connect", slow)
        with sizes(-1, 0):
            task = asyncio.create_task(storage.search("word", user_id="ada"))
            await asyncio.to_thread(started.wait, 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        go_on.set()
    folder = index_of(store_path).parent
    for _ in range(500):
        if not list(folder.iterdir()):
            break
        await asyncio.sleep(0.01)
    assert list(folder.iterdir()) == []
    await storage.reindex("ada")
    await expect_found(storage)


@pytest.mark.parametrize("listing", [True, False])
async def test_a_build_that_cannot_be_installed_lets_others_build(
    flat_storage: MakeStorage, store_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, listing: bool
) -> None:
    storage = flat_storage()
    await fill(storage)

    def full(source: str, target: str) -> None:
        if source.endswith(".sqlite3.new"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    rename = os.rename
    with monkeypatch.context() as patch, sizes(-1, 0):
        patch.setattr(os, "rename", full)
        if listing:
            for _ in range(3):
                assert len(await storage.list_sessions("ada")) == 3
        else:
            assert len(await storage.search("word", user_id="ada")) == 15
    expect_warning(caplog, "No space left")
    assert list(index_of(store_path).parent.iterdir()) == []
    await storage.reindex("ada")
    await expect_found(storage)


async def test_a_search_cancelled_while_it_takes_in_waits_for_its_thread(
    flat_storage: MakeStorage, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = flat_storage()
    await fill(storage)
    started = threading.Event()
    take = Intake.take
    errors: list[BaseException] = []

    def slow(self: Intake, pieces: Any) -> None:
        started.set()
        time.sleep(0.3)
        try:
            take(self, pieces)
        except BaseException as error:
            errors.append(error)
            raise

    monkeypatch.setattr(Intake, "take", slow)
    task = asyncio.create_task(storage.reindex("ada"))
    await asyncio.to_thread(started.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert errors == []
    assert list(index_of(store_path).parent.iterdir()) == []


async def test_an_index_that_is_used_while_the_store_is_closed_is_closed(flat_storage: MakeStorage) -> None:
    storage = flat_storage()
    await fill(storage)
    await storage.reindex("ada")
    file = await storage._indexing.file("ada")
    assert file is not None
    await storage._indexing.close()

    def use() -> None:
        with file.reading() as connection:
            assert connection.execute("SELECT count(*) FROM messages").fetchone() == (15,)
        assert not repr(file).endswith(" open>")
        with file.writing():
            pass

    await asyncio.to_thread(use)
    assert not repr(file).endswith(" open>")
    await expect_found(storage)
    assert not repr(await storage._indexing.file("ada")).endswith(" open>")


@pytest.mark.parametrize("way", ["search", "list"])
async def test_a_user_who_is_deleted_while_an_index_is_built_has_none(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    backend = RecordingBackend(StorageConfig(storage_base_path=str(store_path)), store_path)
    storage = StorageManager(backend=backend)
    await fill(storage)
    deleted = False

    async def delete() -> None:
        nonlocal deleted
        if not deleted:
            deleted = True
            await storage.delete_user("ada")

    with sizes(-1, 0):
        if way == "search":
            lines = indexing._Gathering._lines

            async def slowly(*arguments: Any) -> AsyncIterator[bool]:
                async for each in lines(*arguments):
                    yield each
                await delete()

            monkeypatch.setattr(indexing._Gathering, "_lines", slowly)
            await storage.search("word", user_id="ada")
        else:
            keep = storage._listing.keep
            await storage.list_sessions("ada")

            async def late(*arguments: Any) -> None:
                await delete()
                await keep(*arguments)

            monkeypatch.setattr(storage._listing, "keep", late)
            await storage.list_sessions("ada")
    assert deleted
    folder = index_of(store_path).parent
    assert not folder.exists() or list(folder.iterdir()) == []
    await storage.close()
    await backend.close()


# --- deleting for good ---------------------------------------------------------------------------------


async def test_what_is_purged_is_in_no_index_any_more(flat_storage: MakeStorage, store_path: Path) -> None:
    storage = flat_storage()
    await fill(storage)
    await storage.add_message("ada", "s1", Message("user", "sesquipedalian"))
    folder = index_of(store_path).parent

    def mentioned() -> bool:
        return any(b"sesquipedalian" in path.read_bytes() for path in folder.iterdir())

    await expect_found(storage, "sesquipedalian")
    assert mentioned()
    await storage.purge(user_id="ada", session_id="s1")
    assert not mentioned()
    await expect_found(storage)
    assert not mentioned()
    await storage.delete_session("ada", "s2")
    [entry] = await storage.list_trash()
    await expect_found(storage)
    await storage.purge(trash_id=entry.id)
    assert list(folder.iterdir()) == []
    await expect_found(storage)
    await storage.delete_user("ada")
    assert list(folder.iterdir()) == []


async def test_reindex_builds_those_that_are_there_or_asked_for(flat_storage: MakeStorage, store_path: Path) -> None:
    storage = flat_storage()
    await fill(storage)
    await storage.create_user("bob")
    assert await storage.reindex() == 0
    seen: list[tuple[str, int, int]] = []
    assert await storage.reindex("ada", progress=lambda *done: seen.append(done)) == 1
    assert seen[-1] == ("ada", 3, 3)
    assert await storage.reindex() == 1
    with pytest.raises(NotFoundError, match="nobody"):
        await storage.reindex("nobody")
    assert not index_of(store_path, "bob").exists()


async def test_a_store_that_cannot_have_indexes_says_so() -> None:
    storage = StorageManager(StorageConfig(storage_url="memory:"))
    await storage.create_user("ada")
    with pytest.raises(UnavailableError, match="no search indexes"):
        await storage.reindex("ada")
    await storage.close()


# --- other processes -----------------------------------------------------------------------------------


def _search_in_a_loop(root: str, seed: int, until: float) -> None:
    async def run() -> None:
        pick = random.Random(seed)
        config = StorageConfig(storage_base_path=root)
        storage = StorageManager(config)
        with sizes(-1, 0):
            number = 0
            while time.time() < until:
                number += 1
                name = f"s{pick.randint(0, 2)}"
                message = Message("user", f"word p{seed}n{number}")
                await storage.add_message("ada", name, message)
                found = await storage.search(f"p{seed}n{number}", user_id="ada")
                assert len(found) == 1, found
                if pick.random() < 0.2:
                    await storage.delete_message("ada", name, message.id)  # its own: the last one may be another's
        await storage.close()

    asyncio.run(run())


@pytest.mark.slow
async def test_two_processes_may_use_one_index(flat_storage: MakeStorage) -> None:
    storage = flat_storage()
    await fill(storage)
    await storage.reindex("ada")
    context = fresh_processes()
    root = str(storage.base_path)
    processes = [context.Process(target=_search_in_a_loop, args=(root, n, time.time() + 6)) for n in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        await asyncio.to_thread(process.join, 60)
        assert process.exitcode == 0
    await expect_found(storage)
    await expect_found(flat_storage())


def _index_until_killed(root: str) -> None:
    async def run() -> None:
        storage = StorageManager(StorageConfig(storage_base_path=root))
        number = 0
        with sizes(-1, 0):
            while True:
                number += 1
                if number % 7 == 0:
                    await storage.reindex("ada")
                await storage.add_messages("ada", "s1", [Message("user", f"word k{number}") for _ in range(50)])
                await storage.search(f"k{number}", user_id="ada")
                if number % 5 == 0:
                    await storage.clear_messages("ada", "s1")

    asyncio.run(run())


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
async def test_a_process_killed_while_it_indexes_leaves_right_answers(flat_storage: MakeStorage, seed: int) -> None:
    storage = flat_storage()
    await fill(storage)
    process = fresh_processes().Process(target=_index_until_killed, args=(str(storage.base_path),))
    process.start()
    await asyncio.sleep(0.3 + random.Random(seed).random())
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    await asyncio.to_thread(process.join)
    await storage.add_message("ada", "s0", Message("user", "one more word"))
    await expect_found(storage)
    assert (await check(storage.backend)).clean


# --- lists ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["a file", "memory"])
async def test_a_list_by_the_catalogue_shows_every_change(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    backend = RecordingBackend(StorageConfig(storage_base_path=str(store_path)), store_path)
    if place == "memory":
        monkeypatch.setattr(backend, "index_folder", lambda: None)
    storage, other = StorageManager(backend=backend), StorageManager(backend=backend)

    async def expect_listed(**arguments: Any) -> None:
        everything = await storage.list_sessions("ada", 1000, strict=True)
        start = arguments.get("offset", 0)
        for each in (storage, other):
            assert await each.list_sessions("ada", 2, **arguments) == everything[start : start + 2]
            assert await each.count_sessions("ada") == len(everything)

    with sizes(10**9, 0):
        await fill(storage, 6)
        for _ in range(3):
            await expect_listed()
        assert index_of(store_path).exists() == (place == "a file")
        await other.create_session("ada", session_id="later")
        await expect_listed()
        await storage.add_message("ada", "s2", Message("user", "x"))
        await expect_listed()
        await expect_listed(offset=3)
        await other.update_session("ada", "s4", {"title": "New"})
        await expect_listed()
        await storage.delete_session("ada", "s4")
        await expect_listed()
        [entry] = await storage.list_trash()
        await storage.undelete(entry.id)
        await expect_listed()
        document = store_path / "users/ada/s0/session.json"
        document.write_bytes(document.read_bytes().replace(b'"title": ""', b'"title": "By hand"'))
        assert "By hand" in [each.title for each in await storage.list_sessions("ada", 10)]
        (store_path / "users/ada/s2/messages.jsonl").unlink()
        await expect_listed()
        index_of(store_path).unlink(missing_ok=place == "memory")
        await expect_listed()
    await storage.close()
    await other.close()
    await backend.close()


async def test_a_store_without_a_place_for_indexes_is_listed_from_memory(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = RecordingBackend(StorageConfig(storage_base_path=str(store_path)), store_path)
    monkeypatch.setattr(backend, "index_folder", lambda: None)
    monkeypatch.setattr(indexing, "_IN_MEMORY", 2)
    everything = []
    read_folders = backend.read_folders

    async def noted(folder: str, document: str, log: str) -> list[tuple[str, bytes | None, bytes | None]]:
        everything.append(folder)
        return await read_folders(folder, document, log)

    monkeypatch.setattr(backend, "read_folders", noted)
    storage = StorageManager(backend=backend)
    reader = StorageManager(backend=backend, read_only=True)
    with sizes(10**9, 0):
        await fill(storage, 4)
        for user in ("bob", "eve"):
            await storage.create_user(user)
            await storage.create_session(user, session_id="s")
        for each in (storage, reader):
            for _ in range(2):  # the first one finds out how many there are, the second one keeps them
                await each.list_sessions("ada")
            everything.clear()
            assert [found.id for found in await each.list_sessions("ada", 2)] == ["s3", "s2"]
            assert await each.count_sessions("ada") == 4
            assert everything == [], "what is not shown is not read"
        for user in ("bob", "eve") * 2:
            await storage.list_sessions(user)
        assert everything.count("users/ada") == 0
        await storage.list_sessions("ada")
        assert everything.count("users/ada") == 1, "so many users are remembered and not more"
        await storage.list_sessions("ada")
        assert await storage.delete_user("ada")
        assert await storage.list_sessions("ada") == []
        assert await storage.count_sessions("ada") == 0
    await storage.close()
    await reader.close()
    await backend.close()


async def test_a_list_that_was_read_before_a_change_is_not_kept(store_path: Path) -> None:
    backend = RecordingBackend(StorageConfig(storage_base_path=str(store_path)), store_path)
    storage, slow = StorageManager(backend=backend), StorageManager(backend=backend)
    with sizes(10**9, 0), pytest.MonkeyPatch.context() as patch:
        await fill(storage, 3)
        for _ in range(3):
            await storage.list_sessions("ada")

        async def no_page(*arguments: Any) -> None:
            return None

        patch.setattr(slow._listing, "page", no_page)
        await slow.list_sessions("ada")
        keep = slow._listing.keep

        async def late(*arguments: Any) -> None:
            await storage.create_session("ada", session_id="later")
            assert "later" in [each.id for each in await storage.list_sessions("ada")]
            await keep(*arguments)

        patch.setattr(slow._listing, "keep", late)
        slow._listing._large["ada"] = True
        file = await slow._indexing.file("ada")
        assert file is not None
        file.listed = None
        await slow.list_sessions("ada")
        assert "later" in [each.id for each in await storage.list_sessions("ada")]
        assert await storage.count_sessions("ada") == 4
    await storage.close()
    await slow.close()
    await backend.close()


@pytest.mark.damage
async def test_a_damaged_session_is_passed_over_with_a_warning_and_counts(
    store_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = RecordingBackend(StorageConfig(storage_base_path=str(store_path)), store_path)
    storage = StorageManager(backend=backend)
    with sizes(10**9, 0):
        await fill(storage, 6)
        for _ in range(3):
            await storage.list_sessions("ada")
        await backend.write("users/ada/s3/session.json", b"{}")
        for _ in range(3):
            caplog.clear()
            assert len(await storage.list_sessions("ada")) == 5
            assert "users/ada/s3/session.json" in caplog.text
            assert await storage.count_sessions("ada") == 6
    await storage.close()
    await backend.close()


async def test_small_users_are_listed_without_a_catalogue(flat_storage: MakeStorage, store_path: Path) -> None:
    storage = flat_storage(max_sessions_per_user=10_000)
    await fill(storage, indexing.SMALL_SESSIONS - 1, 1)
    for _ in range(3):
        assert len(await storage.list_sessions("ada", 1000)) == indexing.SMALL_SESSIONS - 1
    assert not (store_path / "system/index").exists()


async def test_lists_do_not_log(flat_storage: MakeStorage, caplog: pytest.LogCaptureFixture) -> None:
    storage = flat_storage()
    await fill(storage)
    with sizes(-1, 0):
        for _ in range(3):
            await storage.list_sessions("ada")
            await storage.search("word", user_id="ada")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
