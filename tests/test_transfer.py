"""Backups, exports, restores and imports of whole stores."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from flatfile_chat_database.backends.base import StorageBackend
from flatfile_chat_database.backends.changes import ABSENT, Append, Put
from flatfile_chat_database.backends.memory import MemoryBackend
from flatfile_chat_database.backends.opening import open_backend
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.errors import (
    ConfigurationError,
    ConflictError,
    IntegrityError,
    NotFoundError,
    UnavailableError,
    ValidationError,
)
from flatfile_chat_database.layout import Layout
from flatfile_chat_database.models import Message, SituationalContext
from flatfile_chat_database.storage import StorageManager
from flatfile_chat_database.testing.case import fresh_processes
from flatfile_chat_database.transfer import Limits, backup, export_store, import_archive, packing, restore
from flatfile_chat_database.transfer.reading import Reader
from flatfile_chat_database.transfer.staging import NewFolder

from . import postgres
from .archives import FILES, LOG, SESSION, USER, Draft, document, gz, message
from .conftest import problems

pytestmark = pytest.mark.slow  # nothing in it depends on the version of Python

LAYOUT = Layout(StorageConfig())
OWN = LAYOUT.key("store")

Config = Callable[[str], StorageConfig]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Return a configuration for `sqlite:name` or a folder of some name."""

    def of(name: str) -> StorageConfig:
        kind, colon, rest = name.partition(":")
        if colon:
            return StorageConfig(storage_url=f"{kind}:{tmp_path}/{rest}")
        return StorageConfig(storage_base_path=str(tmp_path / name))

    return of


async def fill(storage: StorageManager) -> None:
    """Make something of every kind, in every place."""
    long = "Ein sehr langer Name, der in keinen Kopf passt" * 2
    for user in ("ada", "Bob / 张三", long):
        await storage.create_user(user, {"likes": "\x00 and 张"})
        for number in range(2):
            session = await storage.create_session(user, f"chat {number}", session_id=f"Chat {number}")
            messages = [Message("user", f"{n} \x00 \u2028 拙政园", id=f"m{n}") for n in range(10)]
            await storage.add_messages(user, session, messages)
        await storage.save_document(user, session, "Report.TXT", b"\x00\xff" * 2000)
        await storage.save_document(user, session, "large.csv", os.urandom(5_000_000))
        await storage.update_document_analysis(user, session, "Report.TXT", {"summary": "noise"})
        context = SituationalContext(summary="s", key_points=["k"], entities={}, confidence=0.9)
        await storage.update_context(user, session, context)
        await storage.save_context_snapshot(user, session, context)
        await storage.save_persona("tutor", {"name": "Tutor"}, user)
    await storage.save_persona("critic", {"name": "Critic"})
    panel = await storage.create_panel("debate", ["critic"])
    await storage.add_panel_message(panel, Message("critic", "no"))
    await storage.save_panel_insight(panel, {"text": "yes"})
    await storage.delete_session("ada", "Chat 0")
    await storage.delete_document("Bob / 张三", "Chat 1", "Report.TXT")
    await storage.backend.write(f"{LAYOUT.quarantine}/1.json", b'{"key": "x"}\n')
    await storage.backend.write(f"{LAYOUT.quarantine}/1.bin", b"\xff")


async def contents(backend: StorageBackend) -> dict[str, bytes]:
    await backend.open()
    found = {}
    async with backend.snapshot() as shown:
        async for run in shown.keys():
            for key, data in zip(run, await shown.read_many(run), strict=True):
                assert data is not None
                found[key] = data
    return found


async def contents_of(config: StorageConfig) -> dict[str, bytes]:
    backend = open_backend(config)
    try:
        return await contents(backend)
    finally:
        await backend.close()


def living(found: dict[str, bytes]) -> dict[str, bytes]:
    trash, quarantine = f"{LAYOUT.trash}/", f"{LAYOUT.quarantine}/"
    return {key: data for key, data in found.items() if not key.startswith((trash, quarantine))}


# --- there and back ------------------------------------------------------------------------------------


async def test_a_store_moves_through_every_backend_and_comes_back_the_same(config: Config, tmp_path: Path) -> None:
    async with StorageManager(config("files")) as storage:
        await fill(storage)
        before = await contents(storage.backend)
        report = await backup(storage, tmp_path / "1.tar.zst")
    assert report.files == len(before) and report.bytes == sum(map(len, before.values()))
    assert report.counts["trash"] == 5 and report.counts["quarantine"] == 2 and report.left_out.count == 0
    kinds = {entry.name for entry in LAYOUT} - set(report.counts)
    assert kinds == set(), f"the test makes none of {kinds}"

    assert (await restore(tmp_path / "1.tar.zst", config("sqlite:a.db"))).clean
    assert await contents_of(config("sqlite:a.db")) == before
    sqlite = open_backend(config("sqlite:a.db"))
    await sqlite.open()
    await backup(sqlite, tmp_path / "2.tar.gz")
    await export_store(sqlite, tmp_path / "export")
    await export_store(sqlite, tmp_path / "export.tar.gz")
    await sqlite.close()

    memory = MemoryBackend(StorageConfig())
    restored = await restore(tmp_path / "2.tar.gz", memory)
    assert restored.files == len(before) and restored.counts == report.counts
    assert await contents(memory) == before
    await backup(memory, tmp_path / "3.tar.zst")
    assert (await restore(tmp_path / "3.tar.zst", config("deep/down/files"))).clean
    assert await contents_of(config("deep/down/files")) == before

    for name in ("export", "export.tar.gz"):
        backend = open_backend(config(f"from {name}"))
        await backend.open()
        added = await import_archive(backend, tmp_path / name)
        assert (added.added, added.already_there, added.left_out) == (len(living(before)) - 1, 0, 0)
        assert added.differing.count == 0
        found = await contents(backend)
        assert found.pop(OWN) != before[OWN], "it is another store"
        assert found | {OWN: before[OWN]} == living(before)
        assert await problems(backend) == []
        again = await import_archive(backend, tmp_path / "1.tar.zst")
        assert (again.added, again.continued, again.differing.count) == (0, 0, 0)
        assert again.left_out == 7, "trash and quarantine"
        await backend.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "ending"), [("restored and exported", "tar.zst"), ("imported and backed up", "tar.gz")]
)
async def test_a_store_goes_through_postgresql_and_comes_back_byte_for_byte(
    how: str, ending: str, config: Config, tmp_path: Path
) -> None:
    async with StorageManager(config("files")) as storage:
        await fill(storage)
        before = await contents(storage.backend)
        await backup(storage, tmp_path / f"1.{ending}")
        await export_store(storage, tmp_path / "1")
    database = StorageConfig(storage_url=postgres.fresh_schema())
    if how == "restored and exported":
        assert (await restore(tmp_path / f"1.{ending}", database)).clean
        assert await contents_of(database) == before
    else:
        await take(database, tmp_path / "1")
    backend = open_backend(database)
    await backend.open()
    assert await problems(backend) == []
    if how == "restored and exported":
        await export_store(backend, tmp_path / f"2.{ending}")
    else:
        await backup(backend, tmp_path / f"2.{ending}")
    await backend.close()

    await take(config("back"), tmp_path / f"2.{ending}")
    found = await contents_of(config("back"))
    assert found.pop(OWN) != before[OWN], "it is another store"
    assert found | {OWN: before[OWN]} == living(before)


async def take(config: StorageConfig, source: Path) -> None:
    """Import an archive into a store that is not there yet."""
    backend = open_backend(config)
    await backend.open()
    added = await import_archive(backend, source)
    assert (added.already_there, added.differing.count) == (0, 0)
    await backend.close()


async def test_an_export_is_a_store_and_its_hashes_are_those_of_sha256sum(config: Config, tmp_path: Path) -> None:
    async with StorageManager(config("files")) as storage:
        await fill(storage)
        before = await contents(storage.backend)
        await export_store(storage, tmp_path / "export")
    sums = subprocess.run(
        "sha256sum --check --strict checksums/*", shell=True, cwd=tmp_path / "export", capture_output=True, check=True
    )
    assert sums.stdout.count(b": OK\n") == len(living(before))
    assert await contents_of(config("export/store")) == living(before)
    mode = {path.stat().st_mode & 0o077 for path in (tmp_path / "export").rglob("*")}
    assert mode == {0}, "others may read it"


async def test_an_export_of_a_user_has_nothing_of_others(config: Config, tmp_path: Path) -> None:
    async with StorageManager(config("files")) as storage:
        await fill(storage)
        before = await contents(storage.backend)
        await export_store(storage, tmp_path / "bob.tar.gz", user_id="Bob / 张三")
        with pytest.raises(NotFoundError, match="'eve'"):
            await export_store(storage, tmp_path / "eve", user_id="eve")
        with pytest.raises(ValidationError):
            await export_store(storage, tmp_path / "eve", user_id="")
    memory = MemoryBackend(StorageConfig())
    await import_archive(memory, tmp_path / "bob.tar.gz")
    folder = LAYOUT.folder("user", user_id="Bob / 张三")
    found = await contents(memory)
    del found[OWN]
    assert found == {key: data for key, data in before.items() if key.startswith(f"{folder}/")}
    assert await problems(memory) == []
    assert not (tmp_path / "eve").exists()


@pytest.mark.parametrize("name", ["sqlite:a.db", "files"])
async def test_a_large_log_is_kept_as_the_backend_keeps_one(name: str, config: Config, tmp_path: Path) -> None:
    lines = [message(number, "x" * 50_000) for number in range(200)]
    memory = MemoryBackend(StorageConfig())
    await memory.load([*FILES.items()])
    await memory.write(LOG, b"".join(lines))
    damaged = LAYOUT.key("messages", user_id="eve", session_id="bad")
    await memory.write(LAYOUT.key("session", user_id="eve", session_id="bad"), document(id="bad", user_id="eve"))
    await memory.write(damaged, b"".join(lines) + b"no message\n" + b"half")
    await backup(memory, tmp_path / "backup.tar.zst")
    report = await restore(tmp_path / "backup.tar.zst", config(name))
    assert not report.clean and {"bad-line"} <= {problem.kind for problem in report.problems}
    assert await contents_of(config(name)) == await contents(memory)
    async with StorageManager(config(name)) as storage:
        assert await storage.count_messages("eve", "chat") == 200
        assert await storage.message_exists("eve", "chat", "m199")
        await storage.add_message("eve", "chat", Message("user", "one more"))
        assert await storage.count_messages("eve", "chat") == 201


# --- formats -------------------------------------------------------------------------------------------


@pytest.fixture
async def small() -> MemoryBackend:
    """A small store."""
    backend = MemoryBackend(StorageConfig())
    await backend.load([*FILES.items()])
    return backend


@pytest.mark.parametrize(
    ("name", "wanted", "expected"),
    [
        ("a.tar.zst", None, "tar.zst"), ("a.tzst", None, "tar.zst"), ("a.tar.gz", None, "tar.gz"),
        ("a.tgz", None, "tar.gz"), ("a", None, "tar.zst"), ("a.gz", "tar.gz", "tar.gz"), ("a", "tar.gz", "tar.gz"),
    ],
)  # fmt: skip
async def test_the_ending_says_how_a_backup_is_packed(
    name: str, wanted: str | None, expected: str, small: MemoryBackend, tmp_path: Path
) -> None:
    report = await backup(small, tmp_path / name, format=wanted)
    data = (tmp_path / name).read_bytes()
    assert report.format == expected == packing.packing_of(data)
    assert report.size == len(data)


async def test_without_zstandard_a_backup_is_gzip_and_the_extra_is_named(
    small: MemoryBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await backup(small, tmp_path / "made before.tar.zst")
    monkeypatch.setattr(packing, "zstd_or_none", lambda: None)
    assert (await backup(small, tmp_path / "a")).format == "tar.gz"
    extra = r"flatfile-chat-database\[zstd\]"
    for attempt in (backup(small, tmp_path / "b.tar.zst"), restore(tmp_path / "made before.tar.zst", StorageConfig())):
        with pytest.raises(ConfigurationError, match=extra):
            await attempt
    assert sorted(os.listdir(tmp_path)) == ["a", "made before.tar.zst"]


async def test_a_format_that_there_is_not_is_refused(small: MemoryBackend, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'zip'"):
        await backup(small, tmp_path / "a", format="zip")
    with pytest.raises(ConfigurationError, match="A backup is one file"):
        await backup(small, tmp_path / "a", format="folder")
    with pytest.raises(ConfigurationError, match="'tar'"):
        await export_store(small, tmp_path / "a", format="tar")
    assert os.listdir(tmp_path) == []


async def test_any_tar_reads_a_backup(config: Config, tmp_path: Path) -> None:
    async with StorageManager(config("files")) as storage:
        await fill(storage)
        before = await contents(storage.backend)
        await backup(storage, tmp_path / "backup.tar.gz")
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-xzf", "../backup.tar.gz"], cwd=tmp_path / "out", check=True)
    assert (await restore(tmp_path / "out", config("restored"))).clean
    assert await contents_of(config("restored")) == before


# --- what is refused -----------------------------------------------------------------------------------


async def test_nothing_is_overwritten(small: MemoryBackend, config: Config, tmp_path: Path) -> None:
    await backup(small, tmp_path / "backup", format="tar.gz")
    await export_store(small, tmp_path / "export")
    before = (tmp_path / "backup").read_bytes()
    for target in ("backup", "export"):
        with pytest.raises(ConflictError, match=target):
            await backup(small, tmp_path / target, format="tar.gz")
        with pytest.raises(ConflictError, match=target):
            await export_store(small, tmp_path / target, format="folder")
    assert (tmp_path / "backup").read_bytes() == before
    for name in ("files", "sqlite:a.db"):
        await restore(tmp_path / "backup", config(name))
        with pytest.raises(ConflictError, match="nothing was changed"):
            await restore(tmp_path / "backup", config(name))
    with pytest.raises(ConflictError, match="not empty"):
        await restore(tmp_path / "backup", small)
    (tmp_path / "b.db-wal").write_bytes(b"of another database")
    with pytest.raises(ConflictError, match=r"b\.db-wal"):
        await restore(tmp_path / "backup", config("sqlite:b.db"))
    assert await contents(small) == FILES
    assert sorted(os.listdir(tmp_path)) == ["a.db", "b.db-wal", "backup", "export", "files"]


async def test_an_empty_folder_is_a_place_to_restore_to(small: MemoryBackend, config: Config, tmp_path: Path) -> None:
    await backup(small, tmp_path / "backup.tar.gz")
    (tmp_path / "files").mkdir()
    await restore(tmp_path / "backup.tar.gz", config("files"))
    assert await contents_of(config("files")) == FILES


async def test_what_is_no_store_is_not_written_to_an_archive(config: Config, tmp_path: Path) -> None:
    for name in ("absent", "sqlite:absent.db"):
        async with StorageManager(config(name)) as storage:
            with pytest.raises(NotFoundError, match="no chat store"):
                await backup(storage, tmp_path / "backup")
    assert os.listdir(tmp_path) == []


async def test_an_export_is_not_restored_and_other_names_are_refused(small: MemoryBackend, tmp_path: Path) -> None:
    await export_store(small, tmp_path / "export")
    await backup(small, tmp_path / "backup")
    with pytest.raises(ConfigurationError, match="Use `import`"):
        await restore(tmp_path / "export", MemoryBackend(StorageConfig()))
    other = MemoryBackend(StorageConfig(messages_filename="talk.jsonl"))
    for attempt in (restore(tmp_path / "backup", other), import_archive(other, tmp_path / "backup")):
        with pytest.raises(ConfigurationError, match="Set messages_filename"):
            await attempt
    assert await contents(other) == {}


async def test_what_no_store_has_is_left_out_and_told(small: MemoryBackend, tmp_path: Path) -> None:
    await small.write("notes.txt", b"mine")
    report = await backup(small, tmp_path / "backup")
    assert (report.left_out.count, report.left_out.examples) == (1, ["notes.txt"])
    memory = MemoryBackend(StorageConfig())
    await restore(tmp_path / "backup", memory)
    assert await contents(memory) == FILES


async def test_a_file_of_another_size_than_the_store_says_is_no_backup(
    small: MemoryBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def longer(*_: object) -> list[bytes]:
        return [data + b"x" for data in FILES.values()]

    monkeypatch.setattr("flatfile_chat_database.backends.base.Snapshot.read_many", longer)
    with pytest.raises(IntegrityError, match="does not have the"):
        await backup(small, tmp_path / "backup")
    assert os.listdir(tmp_path) == []


async def test_a_backup_that_cannot_be_read_again_is_none(
    small: MemoryBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = packing.Packer.write

    def flip(self: packing.Packer, data: bytes) -> None:
        write(self, data.replace(b"message 3", b"massage 3"))

    monkeypatch.setattr(packing.Packer, "write", flip)
    with pytest.raises(IntegrityError, match=r"messages\.jsonl.*damaged"):
        await backup(small, tmp_path / "backup")
    assert os.listdir(tmp_path) == []


# --- importing -----------------------------------------------------------------------------------------


def write(tmp_path: Path, *changed: tuple[str, bytes], name: str = "archive", **counts: int) -> Path:
    """Write an archive with some files more, or others."""
    files = FILES | dict(changed)
    path = tmp_path / name
    path.write_bytes(Draft(files=list(files.items()), counts=Draft().counts | counts).packed())
    return path


async def test_an_import_continues_what_has_grown(small: MemoryBackend, tmp_path: Path) -> None:
    longer = FILES[LOG] + message(5) + message(6)
    path = write(tmp_path, (LOG, longer))
    dry = await import_archive(small, path, dry_run=True)
    assert await contents(small) == FILES
    report = await import_archive(small, path)
    assert (report.added, report.continued, report.already_there, report.differing.count) == (0, 1, 2, 0)
    assert (dry.added, dry.continued, dry.already_there) == (0, 1, 2) and dry.dry_run
    assert (await contents(small))[LOG] == longer
    report = await import_archive(small, write(tmp_path))
    assert (report.continued, report.already_there, report.differing.count) == (0, 3, 0), "the store has more"
    assert (await contents(small))[LOG] == longer


async def test_an_import_leaves_and_tells_what_differs(small: MemoryBackend, tmp_path: Path) -> None:
    context = LAYOUT.key("context", user_id="eve", session_id="chat")
    path = write(
        tmp_path,
        (USER, document(other=True)),
        (LOG, message(9)),
        (context, document(summary="of another chat")),
        context=1,
    )
    report = await import_archive(small, path)
    assert report.differing.examples == [USER, LOG, context], "a context does not belong to another chat"
    assert (report.added, report.already_there) == (0, 1)
    assert await contents(small) == FILES


async def test_documents_are_imported_together_or_not_at_all(small: MemoryBackend, tmp_path: Path) -> None:
    names = {"user_id": "eve", "session_id": "chat"}
    listed, one = LAYOUT.key("documents", **names), LAYOUT.key("document", document="a.txt", **names)
    path = write(tmp_path, (listed, document(a=1)), (one, b"theirs"), documents=1, document=1)
    await small.write(one, b"mine")
    report = await import_archive(small, path)
    assert sorted(report.differing.examples) == [one, listed]
    await small.delete(one)
    await small.write(listed, document(a=2))
    report = await import_archive(small, path)
    assert sorted(report.differing.examples) == [one, listed]
    await small.delete(listed)
    report = await import_archive(small, path)
    assert (report.added, report.differing.count) == (2, 0)


@pytest.mark.parametrize("size", [100, 6_000_000])
async def test_a_large_file_is_compared_as_a_small_one(size: int, small: MemoryBackend, tmp_path: Path) -> None:
    lines = [message(number, "y" * (size // 5)) for number in range(5, 10)]
    longer = FILES[LOG] + b"".join(lines)
    await small.write(LOG, FILES[LOG] + lines[0])
    path = write(tmp_path, (LOG, longer))
    assert (await import_archive(small, path)).continued == 1
    assert (await contents(small))[LOG] == longer
    assert (await import_archive(small, path)).already_there == 3
    await small.append(LOG, message(99))
    assert (await import_archive(small, path)).already_there == 3
    await small.write(LOG, longer[:-1])
    report = await import_archive(small, path)
    assert (report.continued, report.differing.examples) == (0, [LOG]), "half a line is nothing to go on from"
    await small.delete(LOG)
    assert (await import_archive(small, path)).added == 1
    assert (await contents(small))[LOG] == longer


async def test_an_import_that_meets_another_writer_looks_again(
    small: MemoryBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = MemoryBackend(StorageConfig())
    read_many = memory.read_many

    async def then_write(keys: Any) -> list[bytes | None]:
        found = await read_many(keys)
        if USER in keys and not await memory.exists(USER):
            await memory.commit([Put(USER, document(theirs=True), ABSENT)])
        return found

    monkeypatch.setattr(memory, "read_many", then_write)
    report = await import_archive(memory, write(tmp_path))
    assert (report.added, report.differing.examples) == (2, [USER])
    assert await memory.read(USER) == document(theirs=True)


# --- interrupted ---------------------------------------------------------------------------------------


async def test_a_restore_in_place_that_fails_leaves_the_store_empty(tmp_path: Path) -> None:
    memory = MemoryBackend(StorageConfig())
    path = tmp_path / "archive"
    path.write_bytes(gz(Draft().tar().replace(b"message 4", b"massage 4")))
    with pytest.raises(IntegrityError, match="damaged"):
        await restore(path, memory)
    assert await contents(memory) == {}


async def test_a_restore_in_place_takes_over_from_one_that_died(small: MemoryBackend, tmp_path: Path) -> None:
    await backup(small, tmp_path / "backup")
    memory = MemoryBackend(StorageConfig())
    half = [(LAYOUT.restoring, b"{}\n"), (USER, b"half"), (f"{LAYOUT.quarantine}/1.bin", b"x")]
    await memory.load(half)
    await restore(tmp_path / "backup", memory)
    assert await contents(memory) == FILES
    await memory.write(LAYOUT.restoring, b"{}\n")
    with pytest.raises(ConflictError):
        await restore(tmp_path / "backup", memory)
    assert (await contents(memory)).items() >= FILES.items(), "it was a store"


async def test_two_do_not_write_to_one_place(small: MemoryBackend, config: Config, tmp_path: Path) -> None:
    await backup(small, tmp_path / "backup")
    new = await asyncio.to_thread(NewFolder, str(tmp_path / "files"))
    try:
        with pytest.raises(UnavailableError, match="at this moment"):
            await restore(tmp_path / "backup", config("files"))
    finally:
        await asyncio.to_thread(new.close)
    assert os.listdir(tmp_path) == ["backup"]
    await restore(tmp_path / "backup", config("files"))


async def test_whoever_is_cancelled_leaves_nothing(small: MemoryBackend, config: Config, tmp_path: Path) -> None:
    await small.load([(LAYOUT.key("session", user_id="eve", session_id=f"s{n}"), FILES[SESSION]) for n in range(2000)])
    await backup(small, tmp_path / "kept")
    memory = MemoryBackend(StorageConfig())
    begun: list[asyncio.Task[Any]] = []

    def cancel(*_: object) -> None:
        begun[0].cancel()

    for attempt in (
        backup(small, tmp_path / "b", progress=cancel),
        export_store(small, tmp_path / "e", progress=cancel),
        restore(tmp_path / "kept", config("files"), progress=cancel),
        restore(tmp_path / "kept", config("sqlite:a.db"), progress=cancel),
        restore(tmp_path / "kept", memory, progress=cancel),
    ):
        begun[:] = [asyncio.ensure_future(attempt)]
        with pytest.raises(asyncio.CancelledError):
            await begun[0]
        assert os.listdir(tmp_path) == ["kept"]
    assert await contents(memory) == {}


DYING = """
import asyncio, os, signal, sys
from flatfile_chat_database import StorageConfig, StorageManager
from flatfile_chat_database.backends.opening import open_backend
from flatfile_chat_database.transfer import backup, export_store, import_archive, restore

what, where, store, left = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
config = StorageConfig(storage_url=store)

def count(*_):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

async def main():
    if what == "restore":
        await restore(where, config, progress=count)
        return
    async with StorageManager(config) as storage:
        if what == "import":
            await import_archive(storage, where, progress=count)
        elif what == "backup":
            await backup(storage, where, progress=count)
        else:
            await export_store(storage, where, progress=count)

asyncio.run(main())
"""


def die(what: str, where: Path, store: str, steps: int) -> bool:
    """Do something in a process that is killed at a step; return whether it came so far."""
    ended = subprocess.run([sys.executable, "-c", DYING, what, str(where), store, str(steps)], check=False)
    assert ended.returncode in (0, -signal.SIGKILL)
    return ended.returncode != 0


@pytest.mark.parametrize("kind", ["file", "sqlite"])
@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 3])
async def test_whoever_is_killed_leaves_nothing_harmful_and_doing_it_again_works(
    kind: str, steps: int, config: Config, tmp_path: Path
) -> None:
    source = config(f"{kind}:source")
    memory = MemoryBackend(StorageConfig())
    await memory.load([*FILES.items()])
    for number in range(2):
        names = {"user_id": "eve", "session_id": f"s{number}"}
        session = FILES[SESSION].replace(b'"chat"', f'"s{number}"'.encode())
        log = b"".join(message(n, "x" * 100_000) for n in range(50))
        await memory.load([(LAYOUT.key("session", **names), session), (LAYOUT.key("messages", **names), log)])
    before = await contents(memory)
    await backup(memory, tmp_path / "kept.tar.gz")
    await restore(tmp_path / "kept.tar.gz", source)

    target = f"{kind}:{tmp_path}/target"
    assert die("restore", tmp_path / "kept.tar.gz", target, steps)
    assert not (tmp_path / "target").exists()
    assert (await restore(tmp_path / "kept.tar.gz", config(f"{kind}:target"))).clean
    assert await contents_of(config(f"{kind}:target")) == before

    for what, name in (("backup", "b.tar.gz"), ("export", "e")):
        assert die(what, tmp_path / name, source.storage_url, steps)
        assert not (tmp_path / name).exists()
        async with StorageManager(source) as storage:
            assert await problems(storage.backend) == []
            if what == "backup":
                await backup(storage, tmp_path / name)
            else:
                await export_store(storage, tmp_path / name)

    assert die("import", tmp_path / "e", f"{kind}:{tmp_path}/other", 1 + steps)
    async with StorageManager(config(f"{kind}:other")) as storage:
        assert await problems(storage.backend) == []
        await import_archive(storage, tmp_path / "e")
        found = await contents(storage.backend)
    assert found | {OWN: before[OWN]} == before
    unfinished = [name for name in os.listdir(tmp_path) if "unfinished" in name]
    assert unfinished == []


# --- while others write --------------------------------------------------------------------------------


def _write(config: StorageConfig, user: str, there: Connection) -> None:
    asyncio.run(_write_on(config, user, there))


async def _write_on(config: StorageConfig, user: str, there: Connection) -> None:
    """Write one number to two documents and a log, as one commit, until told to stop."""
    backend = open_backend(config)
    await backend.open()
    one, other = (LAYOUT.key("persona", user_id=user, persona_id=name) for name in ("one", "other"))
    log = LAYOUT.key("messages", user_id=user, session_id="chat")
    number = 0
    while not there.poll():
        number += 1
        data = document(id="x", number=number)
        await backend.commit([Put(one, data), Put(other, data), Append(log, (message(number),))])
        there.send(number)
    there.send(None)
    await backend.close()


@pytest.mark.parametrize("kind", ["file", "sqlite"])
async def test_a_backup_holds_whole_commits_and_all_that_was_acknowledged(
    kind: str, config: Config, tmp_path: Path
) -> None:
    store = config(f"{kind}:store")
    async with StorageManager(store) as storage:
        await storage.create_user("ann")
    starting = fresh_processes()
    writers = []
    for user in ("ann", "ben"):
        here, there = starting.Pipe()
        process = starting.Process(target=_write, args=(store, user, there))
        process.start()
        writers.append((user, process, here))
    try:
        acknowledged = {user: await asyncio.to_thread(here.recv) for user, _, here in writers}
        async with StorageManager(store, read_only=True) as storage:
            for number in range(4):
                for user, _, here in writers:
                    while here.poll():
                        acknowledged[user] = here.recv()
                await backup(storage, tmp_path / f"{number}.tar.gz")
                memory = MemoryBackend(StorageConfig())
                await restore(tmp_path / f"{number}.tar.gz", memory)
                found = await contents(memory)
                for user, _, _ in writers:
                    one, other = (LAYOUT.key("persona", user_id=user, persona_id=name) for name in ("one", "other"))
                    lines = found[LAYOUT.key("messages", user_id=user, session_id="chat")].splitlines(keepends=True)
                    assert found[one] == found[other] == document(id="x", number=len(lines))
                    assert lines == [message(n + 1) for n in range(len(lines))]
                    assert len(lines) >= acknowledged[user]
    finally:
        for _, process, here in writers:
            here.send("stop")
            while await asyncio.to_thread(here.recv) is not None:
                pass
            process.join(60)
            assert process.exitcode == 0


# --- how far it is -------------------------------------------------------------------------------------


async def test_progress_goes_from_nothing_to_all(small: MemoryBackend, tmp_path: Path) -> None:
    size = sum(map(len, FILES.values()))
    seen: list[tuple[int, int | None, int]] = []

    def note(*step: Any) -> None:
        seen.append(step)

    await backup(small, tmp_path / "b", progress=note)
    assert seen[-1] == (2 * size, 2 * size, 4)
    await export_store(small, tmp_path / "e", progress=note)
    assert seen[-1] == (size, size, 4)
    memory = MemoryBackend(StorageConfig())
    await restore(tmp_path / "b", memory, progress=note)
    assert seen[-1] == (size, size, 4)
    await import_archive(memory, tmp_path / "e", progress=note)
    assert seen[-1] == (2 * size, 2 * size, 4)
    assert all(done <= (total or 0) for done, total, _ in seen)


def test_an_archive_too_large_for_the_disk_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    with Reader(path, StorageConfig(), Limits()) as reader:
        reader.require_room(str(tmp_path / "not" / "there"))
        status = os.statvfs(tmp_path)
        none = os.statvfs_result([*status[:4], 0, *status[5:]])
        monkeypatch.setattr(os, "statvfs", lambda path: none)
        with pytest.raises(UnavailableError, match="has room for 0"):
            reader.require_room(str(tmp_path))
