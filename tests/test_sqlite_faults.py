"""What may happen to the file of a SQLite store: nothing is lost in silence, and every error names the file."""

import asyncio
import os
import random
import shutil
import sqlite3
import sys
from pathlib import Path

import pytest

from flatfile_chat_database import Message, StorageConfig, StorageManager
from flatfile_chat_database.backends.changes import Append
from flatfile_chat_database.backends.sqlite import SqliteBackend
from flatfile_chat_database.check import check
from flatfile_chat_database.errors import (
    ConfigurationError,
    DurabilityError,
    IntegrityError,
    StorageError,
    UnavailableError,
)
from flatfile_chat_database.testing.case import LOG, line

from .test_sqlite import opened, path, sql

__all__ = ["path"]

PAGE = 4096


async def fill(path: Path, sessions: int = 6, messages: int = 100) -> None:
    async with opened(path) as store, StorageManager(backend=store) as storage:
        await storage.create_user("ada")
        for number in range(sessions):
            await storage.create_session("ada", session_id=f"s{number}")
            for start in range(0, messages, 10):
                some = [Message("user", f"{n} " + "word " * 40, id=f"m{n}") for n in range(start, start + 10)]
                await storage.add_messages("ada", f"s{number}", some)


# --- removed and replaced --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", "-wal"])
@pytest.mark.parametrize("replaced", [False, True])
async def test_a_file_that_is_removed_or_replaced_under_an_open_store_is_noticed(
    path: Path, suffix: str, replaced: bool
) -> None:
    async with opened(path) as store:
        await store.commit([Append(LOG, (line("m0"),))])
        changed = Path(f"{path}{suffix}")
        kept = path.with_name("kept")
        shutil.move(changed, kept)
        if replaced:
            shutil.copy(kept, changed)
        for call in (store.commit([Append(LOG, (line("m1"),))]), store.write("a/b", b"1"), store.read(LOG)):
            with pytest.raises(UnavailableError, match=f"{changed.name} was removed or replaced"):
                await call
        shutil.move(kept, changed)
        assert await store.commit([Append(LOG, (line("m1"),))]) == [1]
        assert await store.read(LOG) == line("m0") + line("m1")


async def test_a_file_that_is_removed_while_it_is_written_is_no_success(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(path) as store:
        await store.commit([Append(LOG, (line("m0"),))])
        session = store._writing
        assert session is not None
        begin = session.begin_writing

        def begin_and_lose() -> bool:
            begun = begin()
            os.rename(path, path.with_name("elsewhere"))
            return begun

        monkeypatch.setattr(session, "begin_writing", begin_and_lose)
        with pytest.raises(DurabilityError, match="removed or replaced"):
            await store.commit([Append(LOG, (line("m1"),))])
        monkeypatch.setattr(session, "begin_writing", begin)
        os.rename(path.with_name("elsewhere"), path)
        with pytest.raises(UnavailableError, match="takes no more writes"):
            await store.commit([Append(LOG, (line("m2"),))])
    async with opened(path) as store:
        assert await store.commit([Append(LOG, (line("m2"),))]) == [1]


# --- damaged ---------------------------------------------------------------------------------------------


def flip(path: Path, seed: int) -> None:
    """Put garbage somewhere into some pages behind the first."""
    pick = random.Random(seed)
    data = bytearray(path.read_bytes())
    for _ in range(4):
        start = pick.randrange(1, len(data) // PAGE) * PAGE + pick.choice((0, 0, 8, pick.randrange(PAGE - 64)))
        data[start : start + 60] = pick.randbytes(60)
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
async def test_a_damaged_file_gives_errors_of_the_library_and_takes_no_more_writes(path: Path, seed: int) -> None:
    await fill(path)
    flip(path, seed)
    store = SqliteBackend(StorageConfig(), str(path))
    storage = StorageManager(backend=store)
    try:
        await store.open()
        assert not (await check(store)).clean
        for number in range(6):
            try:
                async for _ in storage.stream_messages("ada", f"s{number}", strict=True):
                    pass
                await storage.add_message("ada", f"s{number}", Message("user", "more"))
            except IntegrityError:
                if store._file.fault is not None:
                    with pytest.raises(IntegrityError, match="Nothing more is written"):
                        await storage.create_user(f"new{number}")
    except IntegrityError as error:
        assert path.name in str(error)
    finally:
        await storage.close()
        await store.close()


async def test_a_store_found_damaged_is_closed_without_a_checkpoint(path: Path) -> None:
    await fill(path)
    async with opened(path) as store:
        await store.commit([Append(LOG, tuple(line(f"m{n}") for n in range(50)))])
        wal = Path(f"{path}-wal")
        before = wal.read_bytes()
        assert before
        data = bytearray(path.read_bytes())
        data[PAGE:] = random.Random(1).randbytes(len(data) - PAGE)
        path.write_bytes(data)  # of the same inode, as a bad disk does
        while store._free:
            store._free.pop().close()  # they remember pages
        with pytest.raises(IntegrityError, match=r"chats.*damaged|Nothing more is written"):
            for number in range(6):
                await store.read(f"users/ada/s{number}/messages.jsonl")
        with pytest.raises(IntegrityError, match="Nothing more is written"):
            await store.write("a/b", b"1")
    assert wal.read_bytes() == before
    assert path.read_bytes() == data


@pytest.mark.parametrize("pages", [0.3, 0.9])
async def test_a_file_that_was_cut_off_is_damage(path: Path, pages: float) -> None:
    await fill(path)
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * pages) // PAGE * PAGE)
    store = SqliteBackend(StorageConfig(), str(path))
    with pytest.raises(IntegrityError, match=path.name):
        await store.open()
        assert not (await check(store)).clean
        for number in range(6):
            await store.read(f"users/ada/s{number}/messages.jsonl")
    await store.close()


async def test_an_index_of_connections_that_is_gone_is_made_again(path: Path) -> None:
    await fill(path, 1, 10)
    process = await asyncio.create_subprocess_exec(
        "python3",
        "-c",
        "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1]);"
        "c.execute(\"INSERT INTO pieces VALUES ('x', 0, x'00')\"); c.commit(); os._exit(0)",
        str(path),
    )
    assert await process.wait() == 0
    Path(f"{path}-shm").unlink()
    async with opened(path) as store:
        assert await store.count_log("users/ada/s0/messages.jsonl") == 10
        assert (await sql(path, "SELECT count(*) FROM pieces WHERE id = 'x'")) == [(1,)]


# --- full, read-only, held -------------------------------------------------------------------------------


async def test_a_full_disk_changes_nothing_and_passes(path: Path) -> None:
    async with opened(path) as store:
        await store.commit([Append(LOG, (line("m0"),))])
        session = store._writing
        assert session is not None
        [(pages,)] = await asyncio.to_thread(session.execute, "PRAGMA page_count")
        await asyncio.to_thread(session.execute, f"PRAGMA max_page_count = {pages + 2}")
        big = tuple(line(f"big{n}", "x" * 5000) for n in range(20))
        results = await asyncio.gather(
            store.commit([Append(LOG, big)]), store.commit([Append(LOG, (line("m1"),))]), return_exceptions=True
        )
        assert isinstance(results[0], UnavailableError) and results[1] == [1]
        assert path.name in str(results[0]) and results[0].hint is not None and "room" in results[0].hint
        assert await store.read(LOG) == line("m0") + line("m1")
        await asyncio.to_thread(session.execute, "PRAGMA max_page_count = 1073741823")
        assert await store.commit([Append(LOG, big)]) == [20]


async def test_where_no_file_can_be_made_the_error_says_where() -> None:
    store = SqliteBackend(StorageConfig(), "/proc/self/chats.sqlite3")
    await store.open()
    assert await store.read("a") is None
    with pytest.raises(UnavailableError, match=r"/proc/self/chats\.sqlite3"):
        await store.write("a", b"1")
    await store.close()


# --- changed by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE sessions DROP COLUMN title",
        "ALTER TABLE sessions RENAME TO others",
        "DROP TABLE arrivals",
        "ALTER TABLE entries RENAME COLUMN place TO spot",
    ],
)
async def test_tables_that_were_changed_are_damage(path: Path, statement: str) -> None:
    await fill(path, 1, 10)
    if "arrivals" in statement or "sessions" in statement:
        views = ("messages", "panel_messages", "lines")
        await sql(path, *(f"DROP VIEW {view}" for view in views))
    await sql(path, statement)
    with pytest.raises(IntegrityError, match=f"{path.name} has not the tables"):
        async with opened(path) as store, StorageManager(backend=store) as storage:
            await storage.create_session("ada", session_id="new")
            await storage.get_messages("ada", "s0")


async def test_values_of_another_type_are_refused_by_the_tables(path: Path) -> None:
    await fill(path, 1, 10)
    for statement in (
        "UPDATE records SET body = x'00'",
        "UPDATE arrivals SET body = x'00'",
        "UPDATE users SET body = 7.5",
    ):
        try:
            await sql(path, statement)
        except sqlite3.IntegrityError:
            continue
        assert await sql(path, "SELECT DISTINCT typeof(body) FROM messages UNION SELECT typeof(body) FROM users") == [
            ("text",)
        ]


async def test_bodies_that_are_no_json_are_reported_and_hide_no_others(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await fill(path, 1, 10)
    await sql(
        path,
        "UPDATE arrivals SET body = 'no json' WHERE id = 'm4'",
        "UPDATE records SET body = 'no json' WHERE id = 'm4'",
        "UPDATE sessions SET body = 'none either'",
    )
    async with opened(path) as store, StorageManager(backend=store) as storage:
        key = "users/ada/s0/messages.jsonl"
        assert len(await storage.get_messages("ada", "s0")) == 9
        assert f"{key}: the row at position 4 is no message; it is passed over" in caplog.text
        for call in (
            storage.get_messages("ada", "s0", strict=True),
            store.read_log(key, strict=True),
            storage.get_session("ada", "s0"),
        ):
            with pytest.raises(IntegrityError, match="users/ada/s0"):
                await call
        assert len(await store.read_log(key)) == 9
        found = {(problem.kind, problem.key) for problem in await check(store)}
        assert found == {("bad-line", key), ("damaged-document", "users/ada/s0/session.json")}


async def test_check_tells_of_rows_that_contradict_each_other(path: Path) -> None:
    await fill(path, 3, 10)
    async with opened(path) as store:
        await store.write("users/ada/s0/documents/a.txt", b"text")
    await sql(
        path,
        "DELETE FROM arrivals WHERE id = 'm4' AND place >> 32 = (SELECT min(log) FROM logs)",
        "DELETE FROM records WHERE id = 'm4' AND place >> 32 = (SELECT min(log) FROM logs)",
        "DELETE FROM sessions WHERE session_id = 's1'",
        "INSERT INTO users VALUES ('eve', '', '', '{}')",
        "UPDATE pieces SET data = x'00' WHERE id = (SELECT id FROM entries WHERE key LIKE '%a.txt')",
    )
    async with opened(path) as store:
        problems = {problem.key: problem for problem in await store.verify()}
        assert set(problems) == {
            "users/ada/s0/messages.jsonl",
            "users/ada/s1/session.json",
            "users/eve/profile.json",
            "users/ada/s0/documents/a.txt",
        }
        assert {problem.kind for problem in problems.values()} == {"damaged-database"}
        assert "position 4 is missing" in problems["users/ada/s0/messages.jsonl"].detail
        with pytest.raises(IntegrityError, match=r"a\.txt has 4 bytes"):
            await store.read("users/ada/s0/documents/a.txt")
        for fix in (False, True):
            report = await check(store, fix=fix)
            found = {problem.key for problem in report if problem.kind == "damaged-database"}
            assert found == set(problems) and not report.clean
            assert report.counts["messages"] == 20, "the logs that are whole"


async def test_damage_in_a_log_is_one_line_of_text(path: Path) -> None:
    await fill(path, 1, 10)
    await sql(path, *(f"DELETE FROM {table} WHERE id = 'm4'" for table in ("arrivals", "records")))
    for command in (("check",), ("show", "ada", "s0"), ("backup", str(path.with_name("backup.tar.gz")))):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "flatfile_chat_database", "--store", f"sqlite:{path}", *command,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        output, errors = await process.communicate()
        assert process.returncode == 1
        assert b"Traceback" not in errors and b"position 4 is missing" in output + errors


async def test_rows_that_lost_their_log_are_told_and_become_no_other_logs(path: Path) -> None:
    await fill(path, 1, 10)
    await sql(
        path,
        "INSERT INTO records SELECT (900 << 32) + place, id, body FROM records LIMIT 3",
        "INSERT INTO records VALUES (901 << 32, 'r', '{}')",
        "INSERT INTO arrivals (place, id, body) VALUES (902 << 32, 'a', '{}')",
    )
    async with opened(path) as store:
        before = [problem.detail for problem in await store.verify()]
        assert [text for text in before if "902" in text] == [
            "There are 1 messages of log 902, which is not in `logs`."
        ]
        assert any("901" in text for text in before)
        await store.commit([Append("new/messages.jsonl", (line("m0"),))])
        assert await store.read_log("new/messages.jsonl") == [line("m0")[:-1]]
        assert await sql(path, "SELECT log FROM logs WHERE key = 'new/messages.jsonl'") == [(903,)]


async def test_errors_are_those_of_the_library(path: Path) -> None:
    """A directory in the file's place, a file in its folder's place."""
    path.mkdir()
    for place in (path, path / "chats.sqlite3" / "x"):
        if place != path:
            (path / "chats.sqlite3").write_bytes(b"")
        store = SqliteBackend(StorageConfig(), str(place))
        with pytest.raises((StorageError, ConfigurationError), match="chats"):
            await store.open()
            await store.write("a", b"1")
        await store.close()
