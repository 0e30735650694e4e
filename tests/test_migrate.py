"""Copying whole stores between backends: everything, resumable, and over nobody's data."""

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from flatfile_chat_database import Message, SituationalContext, StorageConfig, StorageManager
from flatfile_chat_database.backends.base import StorageBackend
from flatfile_chat_database.backends.changes import Delete, Put
from flatfile_chat_database.backends.opening import open_backend
from flatfile_chat_database.cli import cli
from flatfile_chat_database.errors import ConfigurationError, ConflictError, NotFoundError, UnavailableError
from flatfile_chat_database.layout import Layout
from flatfile_chat_database.testing.case import line
from flatfile_chat_database.transfer import migrate as module
from flatfile_chat_database.transfer import putting
from flatfile_chat_database.transfer.migrate import MigrationReport, migrate

pytestmark = pytest.mark.slow  # nothing in it depends on the version of Python

LAYOUT = Layout(StorageConfig())
KEY = LAYOUT.key("store")
LOG = LAYOUT.key("messages", user_id="ada", session_id="s")
TORN = LAYOUT.key("messages", user_id="ada", session_id="torn")


@asynccontextmanager
async def opened(url: str, **settings: Any) -> AsyncIterator[StorageBackend]:
    backend = open_backend(StorageConfig(storage_url=url, **settings))
    await backend.open()
    try:
        yield backend
    finally:
        await backend.close()


async def fill(backend: StorageBackend) -> None:
    """Make a store that has some of everything, damage too."""
    storage = StorageManager(backend.config, backend=backend)
    await storage.create_user("ada", {"motto": "a\0b"})
    await storage.create_user("Bob/é")
    session = await storage.create_session("ada", "A title")
    for number in range(30):
        await storage.add_message("ada", session, Message("user", f"number {number}\0" + "x" * 40 * number))
    await storage.save_document("ada", session, "a.txt", b"\0\xff bytes")
    await storage.update_context("ada", session, SituationalContext("about", confidence=0.9))
    gone = await storage.create_session("ada", "goes to the trash")
    await storage.add_message("ada", gone, Message("user", "deleted"))
    await storage.delete_session("ada", gone)
    await storage.save_persona("p", {"name": "P"})
    panel = await storage.create_panel("round", ["p"])
    await storage.add_panel_message(panel, Message("p", "said"))
    await storage.save_panel_insight(panel, {"insight": "this"})
    await backend.append(LOG, line("m0") + b"no message\n" + line("m1"))
    await backend.commit([Put(TORN, line("m0") + b'{"id": "half'), Put("users/eve/profile.json", b"not JSON")])
    await backend.commit([Put("users/eve/notes.bin", b"\0" * 100), Put("stray", b"")])
    await backend.set_aside("stray", "for no reason")


async def contents(backend: StorageBackend) -> dict[str, bytes | None]:
    keys = await backend.list_keys("")
    return dict(zip(keys, await backend.read_many(keys), strict=True))


KINDS = ("file", "sqlite", "memory")


def url(kind: str, path: Path) -> str:
    return "memory:" if kind == "memory" else f"{kind}:{path}"


@pytest.fixture
async def source(tmp_path: Path) -> AsyncIterator[StorageBackend]:
    async with opened(f"file:{tmp_path / 'source'}") as backend:
        await fill(backend)
        yield backend


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("of", KINDS)
async def test_everything_is_copied_byte_for_byte(of: str, to: str, tmp_path: Path) -> None:
    async with opened(url(of, tmp_path / "one")) as one, opened(url(to, tmp_path / "other")) as other:
        await fill(one)
        seen: list[tuple[int, int]] = []
        report = await migrate(one, other, progress=lambda done, total: seen.append((done, total)))
        before = await contents(one)
        assert await contents(other) == before
        assert report.finished
        assert (report.copied, report.found.keys) == (len(before) - 1, len(before) - 1)
        assert report.found.counts["messages"] == 30 + 3 + 1
        assert report.found.counts["users"] == 3
        assert report.found.counts["panel messages"] == report.found.counts["insights"] == 1
        assert report.found.counts["quarantined"] == 2
        assert report.found.counts["in the trash"] == 2
        assert report.found.bytes == sum(len(data or b"") for key, data in before.items() if key != KEY)
        assert report.found.damaged == {
            LOG: "line 2 is no message",
            TORN: "it ends in half a line",
            "users/eve/profile.json": "it is no JSON object",
        }
        steps = (3 if of == "memory" else 2) * report.found.keys
        assert seen[0][0] == 0
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1][0] == steps
        storage = StorageManager(other.config, backend=other)
        assert len(await storage.list_trash()) == 1
        again = await migrate(one, other)
        assert (again.finished, again.equal, again.copied) == (True, report.found.keys, 0)


@pytest.mark.parametrize("to", KINDS)
async def test_large_things_are_streamed(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RUN_BYTES", 1000)
    monkeypatch.setattr(putting, "_PART_BYTES", 1000)
    monkeypatch.setattr(putting, "_BATCH_KEYS", 3)
    async with opened(f"file:{tmp_path / 'one'}") as one, opened(url(to, tmp_path / "other")) as other:
        await fill(one)
        await migrate(one, other, dry_run=True)
        assert await contents(other) == {}
        report = await migrate(one, other)
        assert report.finished
        assert await contents(other) == await contents(one)


async def test_a_log_that_is_too_large_to_be_held_has_rows_in_a_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RUN_BYTES", 1000)
    monkeypatch.setattr(putting, "_PART_BYTES", 1000)
    async with opened(f"file:{tmp_path / 'one'}") as one, opened(f"sqlite:{tmp_path / 'other'}") as other:
        await fill(one)
        assert (await migrate(one, other)).finished
        assert await contents(other) == await contents(one)
        with closing(sqlite3.connect(tmp_path / "other")) as connection:
            asked = "SELECT count(*) FROM messages WHERE user_id = 'ada' AND content LIKE 'number %'"
            assert connection.execute(asked).fetchall() == [(30,)]


async def test_a_dry_run_writes_nothing(source: StorageBackend, tmp_path: Path) -> None:
    for kind in ("file", "sqlite"):
        place = tmp_path / "target" / kind
        async with opened(f"{kind}:{place}") as target:
            report = await migrate(source, target, dry_run=True)
            assert (report.finished, report.copied) == (False, report.found.keys)
    assert not (tmp_path / "target").exists()


async def test_an_interrupted_migration_is_no_store_and_goes_on_where_it_was(
    source: StorageBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(putting, "_BATCH_KEYS", 5)
    async with opened(f"file:{tmp_path / 'target'}") as target:
        load, count = target.load, 0

        async def fail(items: Any) -> None:
            nonlocal count
            count += 1
            if count > 4:
                raise UnavailableError("no more room")
            await load(items)

        monkeypatch.setattr(target, "load", fail)
        with pytest.raises(UnavailableError, match="no more room"):
            await migrate(source, target)
        monkeypatch.undo()
        storage = StorageManager(target.config, backend=target)
        with pytest.raises(ConfigurationError, match=r"not finished\. Run `chatdb migrate` again"):
            await storage.create_user("eve")
        async with opened(f"file:{tmp_path / 'third'}") as third:
            with pytest.raises(ConfigurationError, match="not finished"):
                await migrate(target, third)
        report = await migrate(source, target, dry_run=True)
        assert (report.equal, report.copied) == (10, report.found.keys - 10)
        report = await migrate(source, target)
        assert (report.finished, report.equal, report.copied) == (True, 10, report.found.keys - 10)
        assert await contents(target) == await contents(source)


async def test_a_store_that_was_opened_before_the_migration_cannot_be_made_during_it(
    source: StorageBackend, tmp_path: Path
) -> None:
    async with opened(f"file:{tmp_path / 'target'}") as target:
        storage = StorageManager(target.config, backend=target)
        assert await storage.list_users() == []
        await target.write(LAYOUT.migration_note, b"{}")
        with pytest.raises(ConfigurationError, match="not finished"):
            await storage.create_user("eve")
        assert await target.list_keys("") == [LAYOUT.migration_note]


async def test_what_changes_meanwhile_is_counted_and_copied_by_the_next_run(
    source: StorageBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = StorageManager(source.config, backend=source)
    compare = module._Migration._compare
    await source.commit([Put("users/eve/large.bin", b"x")])

    async def meanwhile(self: Any, copied: Any) -> None:
        session = (await storage.list_sessions("ada"))[0].id
        await storage.add_message("ada", session, Message("user", "late"))  # a log that has grown
        await storage.update_user_profile("ada", {"motto": "another"})
        await storage.create_user("late")
        await source.delete("users/eve/notes.bin")
        await source.write(TORN, line("m0") + line("m1"))  # of a torn log
        await compare(self, copied)

    async with opened(f"sqlite:{tmp_path / 'target'}") as target:
        monkeypatch.setattr(module._Migration, "_compare", meanwhile)
        report = await migrate(source, target)
        monkeypatch.undo()
        assert not report.finished
        assert (report.changed, report.differing.count) == (5, 0)
        report = await migrate(source, target)
        assert (report.finished, report.copied, report.continued, report.removed) == (True, 1, 1, 1)
        assert report.replaced == 2
        assert await contents(target) == await contents(source)


@pytest.mark.parametrize("large", [True, False])
async def test_a_source_that_is_written_without_a_pause_is_copied_when_it_rests(
    large: bool, source: StorageBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(module, "_RUN_BYTES", 300)
        monkeypatch.setattr(putting, "_PART_BYTES", 300)
    storage = StorageManager(source.config, backend=source)
    sessions = [session.id for session in await storage.list_sessions("ada")]
    rounds, rests = 0, False

    async def write() -> None:
        nonlocal rounds
        while not rests:
            rounds += 1
            for session in sessions:
                await storage.add_message("ada", session, Message("user", f"round {rounds}"))
            passing = await storage.create_session("ada", "passes")
            await storage.add_messages("ada", passing, [Message("user", "x" * 100)] * 20)
            await storage.delete_session("ada", passing)
            await source.write(LOG, line("m0") * (rounds % 7))

    async with opened(f"sqlite:{tmp_path / 'target'}") as target:
        writer = asyncio.create_task(write())
        reports = [await migrate(source, target) for _ in range(4)]
        rests = True
        await writer
        assert rounds > 4
        assert not any(report.finished for report in reports)
        assert all(report.changed and not report.differing and not report.foreign for report in reports)
        assert (await migrate(source, target)).finished
        assert await contents(target) == await contents(source)


@pytest.mark.parametrize("of", ["log", "blob"])
@pytest.mark.parametrize("dies", [False, True])
async def test_what_is_too_large_to_be_held_may_change_between_two_looks(
    dies: bool, of: str, source: StorageBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = LOG if of == "log" else "users/eve/notes.bin"
    await source.commit([Put(key, line("m0") * 20)])
    monkeypatch.setattr(module, "_RUN_BYTES", 300)
    monkeypatch.setattr(putting, "_PART_BYTES", 300)
    put_large = putting.Putting._put_large

    async def late(self: Any, content: Any, old: Any) -> None:
        if content.key != key:
            await put_large(self, content, old)
            return
        await source.commit([Put(key, line("m1") * 20)])
        if dies:
            monkeypatch.setattr(target, "commit", dying(target.commit))
        try:
            await put_large(self, content, old)
        finally:
            await source.commit([Put(key, line("m2") * 20)])

    async with opened(f"sqlite:{tmp_path / 'target'}") as target:
        monkeypatch.setattr(putting.Putting, "_put_large", late)
        if dies:
            with pytest.raises(UnavailableError):
                await migrate(source, target)
        else:
            report = await migrate(source, target)
            assert (report.finished, report.changed, report.foreign.count) == (False, 1, 0)
        monkeypatch.undo()
        report = await migrate(source, target)
        assert (report.finished, report.replaced, report.foreign.count) == (True, 1, 0)
        assert await contents(target) == await contents(source)


def dying(commit: Any) -> Any:
    """Return a commit that fails where it is to be noted what was put."""

    async def once(changes: Any) -> Any:
        if any(isinstance(change, Delete) for change in changes):
            raise UnavailableError("It has gone.")
        return await commit(changes)

    return once


async def test_a_large_log_that_was_empty_is_gone_on_with(
    source: StorageBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RUN_BYTES", 300)
    await source.commit([Put(LOG, b"")])
    compare = module._Migration._compare

    async def meanwhile(self: Any, copied: Any) -> None:
        await source.commit([Put(LOG, line("m0") * 20)])
        await compare(self, copied)

    async with opened(f"sqlite:{tmp_path / 'target'}") as target:
        with monkeypatch.context() as patched:
            patched.setattr(module._Migration, "_compare", meanwhile)
            assert not (await migrate(source, target)).finished
        report = await migrate(source, target)
        assert (report.finished, report.continued) == (True, 1)
        assert await target.read(LOG) == line("m0") * 20


async def test_what_somebody_else_put_there_is_reported_and_left(
    source: StorageBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = LAYOUT.key("user", user_id="ada")
    compare = module._Migration._compare

    async def meanwhile(self: Any, copied: Any) -> None:
        await target.write(profile, b'{"by": "hand"}')
        await target.write("users/new", b"mine")
        await target.delete(TORN)
        await compare(self, copied)

    async with opened(f"file:{tmp_path / 'target'}") as target:
        monkeypatch.setattr(module._Migration, "_compare", meanwhile)
        report = await migrate(source, target)
        monkeypatch.undo()
        assert not report.finished
        assert report.changed == 0
        assert sorted(report.differing.first) == sorted([profile, "users/new", TORN])
        report = await migrate(source, target)
        assert not report.finished
        assert sorted(report.foreign.first) == sorted([profile, "users/new"])
        assert await target.read(profile) == b'{"by": "hand"}'
        assert await target.read("users/new") == b"mine"
        for key in report.foreign.first:
            await target.delete(key)
        assert (await migrate(source, target)).finished
        assert await contents(target) == await contents(source)


async def test_a_finished_copy_that_is_in_use_is_not_touched(source: StorageBackend, tmp_path: Path) -> None:
    async with opened(f"file:{tmp_path / 'target'}") as target:
        await migrate(source, target)
        await StorageManager(target.config, backend=target).create_user("new")
        before = await contents(target)
        with pytest.raises(ConflictError, match="finished copy"):
            await migrate(source, target)
        assert await contents(target) == before


async def test_targets_that_hold_something_are_refused(source: StorageBackend, tmp_path: Path) -> None:
    async with opened(f"file:{tmp_path / 'target'}") as target:
        await target.write("anything", b"x")
        with pytest.raises(ConflictError, match="not empty"):
            await migrate(source, target)
        await target.delete("anything")
        await target.write(LAYOUT.migration_note, b'{"store_id": "another"}')
        with pytest.raises(ConflictError, match="Another store is being copied"):
            await migrate(source, target)
        await target.delete(LAYOUT.migration_note)
        await StorageManager(target.config, backend=target).create_user("ada")
        with pytest.raises(ConflictError, match="another store"):
            await migrate(source, target)


async def test_the_same_store_is_refused_by_whatever_name(source: StorageBackend, tmp_path: Path) -> None:
    os.symlink(tmp_path / "source", tmp_path / "link")
    before = await contents(source)
    with pytest.raises(ConfigurationError, match="same store"):
        await migrate(source, source)
    async with opened(f"file:{tmp_path / 'link'}") as target:
        with pytest.raises(ConfigurationError, match="same store"):
            await migrate(source, target)
    for inside in (f"file:{tmp_path / 'source' / 'users' / 'new'}", f"sqlite:{tmp_path / 'source' / 'new.db'}"):
        async with opened(inside) as target:
            with pytest.raises(ConfigurationError, match="lies in the source's folder"):
                await migrate(source, target)
    async with opened(f"file:{tmp_path}") as target:
        with pytest.raises(ConfigurationError, match="lies in the target's folder"):
            await migrate(source, target)
    assert await contents(source) == before


async def test_what_is_no_store_or_has_other_names_is_refused(source: StorageBackend, tmp_path: Path) -> None:
    async with opened(f"file:{tmp_path / 'empty'}") as empty, opened("memory:", messages_filename="m.jsonl") as other:
        with pytest.raises(NotFoundError, match="no chat store"):
            await migrate(empty, other.__class__(empty.config))
        with pytest.raises(ConfigurationError, match="messages_filename is"):
            await migrate(source, other)


# --- killed ----------------------------------------------------------------------------------------------

PROGRAM = """
import asyncio, sys
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.backends.opening import open_backend
from flatfile_chat_database.transfer import migrate as module, putting

putting._BATCH_KEYS, module._RUN_BYTES, putting.BATCH_BYTES, putting._PART_BYTES = 40, 2000, 20_000, 3000

async def main():
    one, other = (open_backend(StorageConfig(storage_url=url)) for url in sys.argv[1:])
    await one.open()
    print("begun", flush=True)
    report = await module.migrate(one, other)
    await one.close()
    await other.close()
    print("finished" if report.finished else report, flush=True)

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("to", ["file", "sqlite"])
async def test_a_migration_that_is_killed_again_and_again_comes_to_its_end(to: str, tmp_path: Path) -> None:
    dice = random.Random(7)
    async with opened(f"file:{tmp_path / 'source'}") as source:
        await fill(source)
        items = []
        for number in range(400):
            place = {"user_id": "ada", "session_id": f"session {number}"}
            items.append((LAYOUT.key("session", **place), b'{"n": %d}\n' % number))
            count = 40 if number % 50 == 0 else 2
            log = b"".join(line(f"m{each}", "x" * 60) for each in range(count))
            items.append((LAYOUT.key("messages", **place), log))
        await source.load(items)
        before = await contents(source)
    target = f"{to}:{tmp_path / 'target'}"
    kills = 0
    while True:
        program = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, f"file:{tmp_path / 'source'}", target], stdout=subprocess.PIPE, text=True
        )
        assert program.stdout is not None
        assert await asyncio.to_thread(program.stdout.readline) == "begun\n"
        try:
            answer = await asyncio.to_thread(program.communicate, None, dice.uniform(0.01, 0.3) * (1 + kills / 4))
        except subprocess.TimeoutExpired:
            program.send_signal(signal.SIGKILL)
            await asyncio.to_thread(program.communicate)
            kills += 1
        else:
            assert answer[0] == "finished\n"
            break
    assert kills >= 3
    async with opened(target) as other:
        assert await contents(other) == before


@pytest.mark.slow
async def test_memory_does_not_grow_with_the_store(tmp_path: Path) -> None:
    program = """
import asyncio, sys
from flatfile_chat_database.backends.opening import open_backend
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.transfer.migrate import migrate

async def main():
    one, other = (open_backend(StorageConfig(storage_url=url)) for url in sys.argv[1:])
    async def zeros():
        for _ in range(160):
            yield bytes(1 << 20)
    await one.open()
    await one.write("system/config.json", CONFIG)
    await one.write_blob("users/ada/large.bin", zeros())
    for number in range(40):
        await one.load([(f"users/u{number}/f{each}", bytes(100_000)) for each in range(30)])
    before = peak()
    assert (await migrate(one, other)).finished
    await one.close()
    await other.close()
    print(before, peak())

def peak():  # not by getrusage, whose figure counts the process that this one was forked from
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM:"))

CONFIG = b'{"format_version": 1, "store_id": "x", "names": {}}'
asyncio.run(main())
"""
    urls = [f"file:{tmp_path / 'one'}", f"file:{tmp_path / 'other'}"]
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program, *urls], check=True, capture_output=True, text=True
    )
    before, peak = map(int, done.stdout.split())
    assert peak < 200, f"{before} MB before, {peak} MB at the end"


# --- the command -------------------------------------------------------------------------------------------


def chatdb(*arguments: str) -> Any:
    return CliRunner().invoke(cli, arguments, prog_name="chatdb")


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    one, other = str(tmp_path / "one"), f"sqlite:{tmp_path / 'other'}"

    async def prepare() -> None:
        async with opened(f"file:{one}") as backend:
            await fill(backend)

    asyncio.run(prepare())
    result = chatdb("migrate", one, other, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "would be copied: " in result.output
    result = chatdb("migrate", one, other)
    assert result.exit_code == 0, result.output
    assert "Complete, and compared: SHA-256 of all " in result.output
    assert "Damaged in the source, and copied as they are: 3." in result.output
    assert "users                        3" in result.output
    result = chatdb("--json", "migrate", one, other)
    assert result.exit_code == 0
    assert '"finished": true' in result.output
    result = chatdb("migrate", one, one)
    assert result.exit_code == 1
    assert "same store" in result.output
    result = chatdb("migrate", str(tmp_path / "nothing"), str(tmp_path / "third"))
    assert result.exit_code == 1
    assert "The source is no chat store" in result.output
    assert not (tmp_path / "third").exists()


def test_the_command_fails_when_something_is_in_the_way(tmp_path: Path) -> None:
    one, other = f"file:{tmp_path / 'one'}", f"file:{tmp_path / 'other'}"

    async def prepare() -> None:
        async with opened(one) as source, opened(other) as target:
            await fill(source)
            await target.write(LAYOUT.migration_note, b'{"store_id": "%s"}' % (await store_id(source)).encode())
            await target.write("users/\u202eeve", b"mine")

    asyncio.run(prepare())
    result = chatdb("migrate", one, other)
    assert result.exit_code == 1
    assert "Something else is in the target, and was left as it is: 1 keys.\n  users/\\u202eeve\n" in result.output


async def store_id(backend: StorageBackend) -> str:
    storage = StorageManager(backend.config, backend=backend)
    await storage.count_users()
    return storage._store.store_id


def test_a_report_starts_empty() -> None:
    report = MigrationReport("x", dry_run=False)
    assert (report.changed, report.finished, report.found.keys) == (0, False, 0)
