"""The journal: its format, what recovery makes of it, and what it makes of a journal that is damaged or not ours."""

import asyncio
import contextlib
import errno
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from flatfile_chat_database import Message, StorageConfig, StorageManager
from flatfile_chat_database.backends.changes import ANY, Append, Delete, Edit, Move, Put, RemoveTree, Truncate
from flatfile_chat_database.backends.flatfile import FlatfileBackend
from flatfile_chat_database.backends.flatfile.lock import Mark
from flatfile_chat_database.check import check
from flatfile_chat_database.errors import DurabilityError, IntegrityError, UnavailableError
from flatfile_chat_database.testing.faults import FaultyFiles

from .test_flatfile import DOCUMENT, LOG, ids, line

Open = Callable[..., FlatfileBackend]
OTHER = "users/ada/t/messages.jsonl"


@pytest.fixture
async def opened(store_path: Path) -> AsyncIterator[Open]:
    """Return a function that makes backends on one folder, or another; all are closed."""
    made: list[FlatfileBackend] = []

    def make(files: FaultyFiles | None = None, root: Path | None = None, **overrides: object) -> FlatfileBackend:
        backend = FlatfileBackend(StorageConfig(**overrides), root or store_path, files=files)  # type: ignore[arg-type]
        made.append(backend)
        return backend

    yield make
    for backend in made:
        await backend.close()


async def started(make: Open, *arguments: object, **overrides: object) -> FlatfileBackend:
    backend = make(*arguments, **overrides)
    await backend.open()
    return backend


async def append(backend: FlatfileBackend, *names: str, key: str = LOG, size: int = 10) -> None:
    await backend.commit([Append(key, tuple(line(name, name[-1] * size) for name in names))])


def segments(store: Path) -> list[Path]:
    return sorted((store / "system/journal").glob("0*.jsonl"))


def batches(path: Path) -> list[dict[str, object]]:
    """Return the lines that list steps, read as a person would."""
    return [json.loads(each) for each in path.read_bytes().split(b"\n") if each.startswith(b'{"crc"')]


def copy(store: Path, name: str = "copy") -> Path:
    """Copy a store at work, as `cp -r` would."""
    target = store.parent / name
    shutil.copytree(store, target)
    return target


def quarantined(store: Path) -> list[tuple[str, bytes]]:
    """Return the key and the bytes of everything that was set aside."""
    notes = [(path, json.loads(path.read_bytes())) for path in sorted((store / "system/quarantine").glob("*.json"))]
    return [(note["key"], path.with_suffix(".bin").read_bytes()) for path, note in notes]


# --- what it looks like ----------------------------------------------------------------------------------


async def test_a_person_can_read_the_journal(opened: Open, store_path: Path) -> None:
    backend = await started(opened)
    await append(backend, "a", "b")
    await backend.commit([Put(DOCUMENT, b'{"name": "Ada"}\n'), Append(LOG, (line("c"),))])
    [segment] = segments(store_path)
    text = segment.read_bytes().rstrip(b"\0")
    assert json.loads(text.split(b"\n")[0]).keys() == {"format", "segment"}
    assert line("a", "a" * 10) + line("b", "b" * 10) in text
    first, second = batches(segment)
    size = len(line("a", "a" * 10) * 2)
    assert first["steps"] == [{"op": "append", "key": LOG, "bytes": size}]
    assert second["steps"] == [
        {"op": "put", "key": DOCUMENT, "bytes": 16},
        {"op": "append", "key": LOG, "bytes": len(line("c")), "at": size},
    ]


async def test_a_store_that_is_closed_has_no_journal(opened: Open, store_path: Path) -> None:
    backend = await started(opened)
    await append(backend, "a")
    assert len(segments(store_path)) == 1
    await backend.close()
    assert segments(store_path) == []


async def test_the_journal_stays_while_another_store_is_open(opened: Open, store_path: Path) -> None:
    one, other = await started(opened), await started(opened)
    await append(one, "a")
    await append(other, "b")
    await one.close()
    assert len(segments(store_path)) == 1
    await append(other, "c")
    await other.close()
    assert segments(store_path) == []
    assert await ids(await started(opened)) == ["a", "b", "c"]


async def test_a_journal_that_has_grown_is_folded_while_the_store_is_at_work(opened: Open, store_path: Path) -> None:
    backend = await started(opened, journal_max_bytes=20_000)
    names = [f"m{number}" for number in range(400)]
    for name in names:
        await append(backend, name)
    await asyncio.sleep(0.2)
    assert backend.statistics()["checkpoints"] >= 2
    assert sum(path.stat().st_size for path in segments(store_path)) < 200_000
    assert await ids(backend) == names


# --- recovery ------------------------------------------------------------------------------------------


async def test_what_the_files_lost_comes_back_from_the_journal(opened: Open, store_path: Path) -> None:
    backend = await started(opened)
    await append(backend, "a")
    await backend.close()
    backend = await started(opened)
    size = (store_path / LOG).stat().st_size
    await append(backend, "b", "c")
    await append(backend, "x", key=OTHER)
    await backend.commit([Put(DOCUMENT, b'{"version": 1}')])
    await backend.commit([Put(DOCUMENT, b'{"version": 2}')])
    crashed = copy(store_path)
    os.truncate(crashed / LOG, size + 50)
    (crashed / OTHER).unlink()
    (crashed / DOCUMENT).write_bytes(b'{"version": 1}')
    again = await started(opened, root=crashed)
    assert await ids(again) == ["a", "b", "c"]
    assert await ids(again, OTHER) == ["x"]
    assert await again.read(DOCUMENT) == b'{"version": 2}'
    assert segments(crashed) == [] and quarantined(crashed) == []
    assert await again.verify() == []


async def test_data_that_the_disk_filled_with_nuls_comes_back(opened: Open, store_path: Path) -> None:
    backend = await started(opened)
    await append(backend, "a", "b", size=3000)
    await backend.commit([Put(DOCUMENT, b'{"version": 1}')])
    crashed = copy(store_path)
    whole = (crashed / LOG).read_bytes()
    (crashed / LOG).write_bytes(whole[:2048] + bytes(2048) + whole[4096:])
    (crashed / DOCUMENT).write_bytes(bytes(14))
    again = await started(opened, root=crashed)
    assert await ids(again) == ["a", "b"]
    assert await again.read(DOCUMENT) == b'{"version": 1}'
    assert quarantined(crashed) == []


@pytest.mark.slow
async def test_a_batch_that_was_being_written_is_not_there_and_leaves_nothing(opened: Open, store_path: Path) -> None:
    backend = await started(opened)
    await append(backend, "a")
    end = int((store_path / "system/lock").read_text().split()[1])
    await backend.commit([Put(DOCUMENT, b"{}"), Append(LOG, (line("b"), line("c")))])
    [segment] = segments(store_path)
    whole = segment.read_bytes()
    size = int((store_path / "system/lock").read_text().split()[1]) - end
    for cut in range(1, size):
        crashed = copy(store_path, f"cut{cut}")
        (crashed / segment.relative_to(store_path)).write_bytes(whole[: end + cut])
        (crashed / DOCUMENT).unlink()
        os.truncate(crashed / LOG, len(line("a", "a" * 10)))
        again = await started(opened, root=crashed)
        assert await ids(again) == ["a"] and await again.read(DOCUMENT) is None, cut
        await again.close()
        shutil.rmtree(crashed)


async def test_what_a_dead_process_committed_is_done_by_the_next_writer_beside_a_live_one(
    opened: Open, store_path: Path
) -> None:
    living = await started(opened)
    await append(living, "a")
    mark = (store_path / "system/lock").read_bytes()
    size = (store_path / LOG).stat().st_size
    await append(living, "b", "c")
    (store_path / "system/lock").write_bytes(mark)  # as if who wrote them had died before doing them
    os.truncate(store_path / LOG, size + 30)
    other = await started(opened)
    await append(other, "d")
    assert await ids(living) == ["a", "b", "c", "d"]
    await append(living, "e")
    assert await ids(other) == ["a", "b", "c", "d", "e"]


async def test_a_dead_process_that_nobody_followed_is_harmless_and_repaired_by_check(
    opened: Open, store_path: Path
) -> None:
    living = await started(opened)
    await append(living, "a")
    mark = (store_path / "system/lock").read_bytes()
    size = (store_path / LOG).stat().st_size
    await append(living, "b")
    (store_path / "system/lock").write_bytes(mark)
    os.truncate(store_path / LOG, size)
    other = await started(opened)
    [problem] = await other.verify()
    assert (problem.kind, problem.harmless, problem.fixed) == ("unfinished-batch", True, False)
    [problem] = await other.verify(fix=True)
    assert problem.fixed
    assert await other.verify() == []
    assert await ids(other) == ["a", "b"]


async def test_every_change_is_done_again_from_the_journal(opened: Open, store_path: Path) -> None:
    backend = await started(opened)
    await append(backend, "a", "b", "c", "d")
    await backend.commit([Put("users/ada/personas/p.json", b"{}")])
    await backend.close()
    before = copy(store_path, "before")
    backend = await started(opened)
    await backend.commit([Edit(LOG, "b", line("b", "b" * 10), line("b", "changed"))])
    await append(backend, "e")
    await backend.commit([Truncate(LOG, 1)])
    await append(backend, "f", "g")
    await backend.commit([Delete("users/ada/personas/p.json")])
    await backend.commit([Put("users/ada/personas/q.json", b"{}"), Put(DOCUMENT, b"{}", ANY)])
    after = {path.relative_to(store_path): path.read_bytes() for path in store_path.glob("users/**/*.json*")}
    # The files of before, with the journal of after, and what it has made ready beside its place.
    crashed = copy(before, "crashed")
    shutil.rmtree(crashed / "system")
    shutil.copytree(store_path / "system", crashed / "system")
    again = await started(opened, root=crashed)
    assert {key for key, _ in quarantined(crashed)} == {LOG}  # its edits are in files that were not copied
    assert await again.read("users/ada/personas/p.json") is None
    assert await again.read(DOCUMENT) == b"{}"
    whole = copy(store_path, "whole")
    again = await started(opened, root=whole)
    assert {path.relative_to(whole): path.read_bytes() for path in whole.glob("users/**/*.json*")} == after


async def test_folders_that_were_moved_and_removed_stay_so(opened: Open, store_path: Path) -> None:
    backend = await started(opened)
    await append(backend, "a")
    await append(backend, "x", key=OTHER)
    await backend.commit([Move("users/ada/s", "system/trash/one/users/ada/s")])
    await append(backend, "b")  # the same session, made anew
    await backend.commit([RemoveTree("users/ada/t")])
    again = await started(opened, root=copy(store_path))
    assert await ids(again) == ["b"]
    assert await ids(again, "system/trash/one/" + LOG) == ["a"]
    assert await again.list_keys("users/ada/t/") == []


# --- a journal that does not fit the files ---------------------------------------------------------------


async def crashed_store(opened: Open, store_path: Path) -> Path:
    """Return a copy of a store at work, whose journal has two messages and a document."""
    backend = await started(opened)
    await append(backend, "a")
    await backend.commit([Put(DOCUMENT, b'{"version": 0}')])
    await backend.close()
    backend = await started(opened)
    await append(backend, "b", "c")
    await backend.commit([Put(DOCUMENT, b'{"version": 1}')])
    return copy(store_path)


async def test_files_that_are_newer_than_the_journal_stay_as_they_are(opened: Open, store_path: Path) -> None:
    crashed = await crashed_store(opened, store_path)
    newer = line("a", "a" * 10) + line("b", "B" * 10) + line("c", "C" * 10) + line("d")
    (crashed / LOG).write_bytes(newer)
    (crashed / DOCUMENT).write_bytes(b'{"version": 9}')
    again = await started(opened, root=crashed)
    assert (crashed / LOG).read_bytes() == newer
    assert await again.read(DOCUMENT) == b'{"version": 9}'
    assert quarantined(crashed) == [
        (LOG, line("b", "b" * 10) + line("c", "c" * 10)),
        (DOCUMENT, b'{"version": 1}'),
    ]
    assert {problem.kind for problem in await check(again)} == {"missing-session", "damaged-document", "quarantined"}


async def test_files_that_are_newer_and_only_grew_need_no_quarantine(opened: Open, store_path: Path) -> None:
    crashed = await crashed_store(opened, store_path)
    with (crashed / LOG).open("ab") as file:
        file.write(line("d"))
    again = await started(opened, root=crashed)
    assert await ids(again) == ["a", "b", "c", "d"]
    assert quarantined(crashed) == []


async def test_files_that_are_older_than_the_journal_stay_as_they_are(opened: Open, store_path: Path) -> None:
    crashed = await crashed_store(opened, store_path)
    (crashed / LOG).write_bytes(line("a")[:-1])
    (crashed / DOCUMENT).write_bytes(b'{"version": -1}')
    again = await started(opened, root=crashed)
    assert (crashed / LOG).read_bytes() == line("a")[:-1]
    assert await again.read(DOCUMENT) == b'{"version": -1}'
    assert [key for key, _ in quarantined(crashed)] == [LOG, DOCUMENT]


async def test_a_hand_edit_after_a_crash_is_never_overwritten(opened: Open, store_path: Path) -> None:
    crashed = await crashed_store(opened, store_path)
    edited = (crashed / LOG).read_bytes().replace(b"cccc", b"edit")
    (crashed / LOG).write_bytes(edited)
    shutil.rmtree(crashed / "users/ada/s" / "none", ignore_errors=True)
    (crashed / DOCUMENT).unlink()
    again = await started(opened, root=crashed)
    assert (crashed / LOG).read_bytes() == edited
    assert await again.read(DOCUMENT) is None
    assert [key for key, _ in quarantined(crashed)] == [LOG, DOCUMENT]


# --- a journal that cannot be read -----------------------------------------------------------------------


async def expect_stopped(backend: FlatfileBackend, match: str) -> None:
    """Fail unless nothing can be read or written, with an error that says why."""
    await backend.open()
    for work in (
        lambda: backend.read(DOCUMENT),
        lambda: backend.write(DOCUMENT, b"{}"),
        lambda: backend.read_log(LOG),
        lambda: backend.list_keys(""),
        lambda: backend.commit([Append(LOG, (line("z"),))]),
    ):
        with pytest.raises(IntegrityError, match=match) as caught:
            await work()
        assert caught.value.hint


async def test_damage_in_the_middle_stops_everything_until_a_person_decides(opened: Open, store_path: Path) -> None:
    backend = await started(opened)
    for name in ("a", "b", "c"):
        await append(backend, name)
    crashed = copy(store_path)
    (crashed / LOG).unlink()
    [segment] = segments(crashed)
    data = segment.read_bytes()
    segment.write_bytes(data.replace(b"bbbbbbbbbb", b"bbbbXbbbbb"))
    before = {path: path.read_bytes() for path in crashed.rglob("*") if path.is_file()}
    stopped = opened(root=crashed)
    await expect_stopped(stopped, "damaged, and there are later ones")
    report = await check(stopped)
    assert [(problem.kind, problem.fixed) for problem in report] == [("damaged-journal", False)]
    assert not report.clean
    assert {path: path.read_bytes() for path in crashed.rglob("*") if path.is_file()} == before
    report = await check(stopped, fix=True)
    assert ("damaged-journal", True) in [(problem.kind, problem.fixed) for problem in report]
    assert report.clean, str(report)
    assert await ids(stopped) == ["a"]  # what came behind the damage does not fit without it
    kept = b"".join(data for _, data in quarantined(crashed))
    assert b"bbbbXbbbbb" in kept and b"cccccccccc" in kept
    await append(stopped, "d")
    assert await ids(stopped) == ["a", "d"]


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b'{"format":2,"segment":"x"}\n', "has format 2 of the journal; this version reads 1"),
        (b"", "is no segment of a journal"),
        (b"hello\n", "is no segment of a journal"),
        (b'{"format":"1"}\n', "is no segment of a journal"),
        (b"\0" * 5000, "is no segment of a journal"),
    ],
)
async def test_a_segment_of_another_format_stops_everything(
    opened: Open, store_path: Path, header: bytes, match: str
) -> None:
    backend = await started(opened)
    await append(backend, "a")
    crashed = copy(store_path)
    [segment] = segments(crashed)
    segment.write_bytes(header + segment.read_bytes().split(b"\n", 1)[1].rstrip(b"\0"))
    stopped = opened(root=crashed)
    await expect_stopped(stopped, match)
    report = await check(stopped, fix=True)
    assert report.clean, str(report)
    assert await ids(stopped) == ["a"]


async def test_a_journal_that_may_not_be_read_is_an_error_and_not_an_empty_one(opened: Open, store_path: Path) -> None:
    backend = await started(opened)
    await append(backend, "a")
    crashed = copy(store_path)
    files = FaultyFiles()
    files.fail(1, errno.EIO, names=["read"], forever=True)
    broken = opened(files, root=crashed)
    with pytest.raises(Exception, match="Input/output error"):
        await broken.open()
    files.watch([])
    await broken.open()
    assert await ids(broken) == ["a"]


async def test_where_nobody_may_write_a_journal_is_mentioned_and_reading_goes_on(
    opened: Open, store_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = await started(opened)
    await append(backend, "a")
    crashed = copy(store_path)
    files = FaultyFiles()
    files.fail(1, errno.EROFS, names=["open_lock"], forever=True)
    reader = await started(opened, files, root=crashed)
    assert await ids(reader) == ["a"]
    assert "the last changes may be missing" in caplog.text


async def test_a_journal_of_a_hostile_hand_names_no_file_outside(opened: Open, store_path: Path) -> None:
    from flatfile_chat_database.backends.flatfile.journal import Step, encode_batch

    victim = store_path.parent / "victim.txt"
    victim.write_text("precious")
    backend = await started(opened)
    await append(backend, "a")
    crashed = copy(store_path)
    [segment] = segments(crashed)
    import zlib

    head = segment.read_bytes().split(b"\n")[0]
    for step in (
        Step("put", "../victim.txt", 4),
        Step("append", "/etc/passwd", 4),
        Step("move", "users/x", source="../victim.txt"),
        Step("install", "users/x", at=4, source="users/../../victim.txt"),
        Step("put", "system/lock", 4),
        Step("put", "system/journal/00000009.jsonl", 4),
    ):
        data = b"evil" if step.bytes else b""
        segment.write_bytes(head + b"\n" + encode_batch(zlib.crc32(head), 0, [step], data))
        again = await started(opened, root=crashed)
        assert await ids(again) == ["a"]
        await again.close()
        segment.parent.mkdir(exist_ok=True)
    assert victim.read_text() == "precious"
    assert not (crashed / "users/x").exists()


# --- flushes that fail -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("durability", ["full", "normal"])
async def test_whichever_flush_fails_nothing_that_was_acknowledged_is_lost(
    opened: Open, store_path: Path, durability: str, code: int
) -> None:
    for call in range(1, 30):
        root = store_path.parent / f"store{call}"
        files = FaultyFiles()
        backend = await started(opened, files, root=root, durability=durability, journal_max_bytes=500)
        files.fail(call, code, names=["sync", "sync_folder"])
        acknowledged = []
        for number in range(8):
            name = f"m{number}"
            try:
                await append(backend, name)
            except DurabilityError:
                break
            except Exception as error:
                assert "error" in str(error) or "space" in str(error)
                continue
            acknowledged.append(name)
        with contextlib.suppress(DurabilityError):  # which is how what was not flushed is told
            await backend.close()
        again = await started(opened, root=root)
        found = await ids(again)
        assert [name for name in found if name in acknowledged] == acknowledged, call
        assert len(found) <= len(acknowledged) + 8
        await append(again, "last")
        assert await again.verify() == []
        await again.close()


async def test_after_a_fold_that_failed_the_next_one_of_any_process_writes_everything_again(
    opened: Open, store_path: Path
) -> None:
    class Failing(FaultyFiles):
        def sync(self, descriptor: int) -> None:
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith("messages.jsonl"):
                raise OSError(errno.EIO, "Input/output error")
            super().sync(descriptor)

    class Watching(FaultyFiles):
        def __init__(self) -> None:
            super().__init__()
            self.written: list[str] = []

        def write_at(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
            self.written.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            return super().write_at(descriptor, data, offset)

    watching = Watching()
    failing, other = await started(opened, Failing()), await started(opened, watching)
    await append(failing, "a", "b")
    await append(other, "c")
    with pytest.raises(UnavailableError, match="Input/output error"):
        await failing.commit([Move("users/ada/s", "system/trash/t/s")])
    assert len(segments(store_path)) == 2
    watching.written.clear()
    await other.commit([Move("users/ada/s", "system/trash/t/s")])
    assert str(store_path / LOG) in watching.written  # for the system may hold in memory what is on no disk
    assert segments(store_path) == []
    assert await ids(other, "system/trash/t/s/messages.jsonl") == ["a", "b", "c"]


# --- levels ----------------------------------------------------------------------------------------------


async def test_at_normal_what_is_answered_is_flushed_soon_and_nobody_waits_for_it(
    opened: Open, store_path: Path
) -> None:
    backend = await started(opened, durability="normal")
    await append(backend, "a")
    before = backend.statistics()["syncs"]
    for number in range(50):
        await append(backend, f"b{number}")
    assert backend.statistics()["syncs"] == before
    await asyncio.sleep(1.2)
    assert backend.statistics()["syncs"] == before + 1
    await asyncio.sleep(0.7)
    assert backend.statistics()["syncs"] == before + 1


async def test_a_message_at_full_costs_one_flush(opened: Open) -> None:
    backend = await started(opened)
    await append(backend, "a")
    before = backend.statistics()["syncs"]
    for number in range(10):
        await append(backend, f"b{number}")
    assert backend.statistics()["syncs"] == before + 10


# --- what changed ----------------------------------------------------------------------------------------


async def test_changes_tell_what_any_process_wrote_since(opened: Open, store_path: Path) -> None:
    one, other = await started(opened), await started(opened)
    assert (await one.changes(None)).keys is None
    await append(one, "a")
    start = (await one.changes(None)).cursor
    assert (await other.changes(start)).keys == frozenset()
    await append(other, "x", key=OTHER)
    await one.commit([Put(DOCUMENT, b"{}")])
    found = await one.changes(start)
    assert found.keys == frozenset({OTHER, DOCUMENT})
    assert (await one.changes(found.cursor)).keys == frozenset()
    await one.close()
    await other.close()
    again = await started(opened)
    assert (await again.changes(found.cursor)).keys == frozenset()
    assert (await again.changes(start)).keys == frozenset(
        {LOG, OTHER, DOCUMENT}
    )  # a closed segment is known as a whole
    await append(again, "y", key=OTHER)
    assert OTHER in ((await again.changes(found.cursor)).keys or ())
    await again.commit([Move("users/ada/t", "users/ada/u")])
    assert {OTHER, "users/ada/t", "users/ada/u"} <= ((await again.changes(found.cursor)).keys or frozenset())


async def test_changes_outlive_checkpoints_and_crashes(opened: Open, store_path: Path) -> None:
    backend = await started(opened, journal_max_bytes=1000)
    await append(backend, "a")
    cursor = (await backend.changes(None)).cursor
    keys = set()
    for number in range(40):
        keys.add(f"users/ada/s{number}/messages.jsonl")
        await append(backend, "a", key=f"users/ada/s{number}/messages.jsonl")
    await asyncio.sleep(0.2)
    assert keys <= ((await backend.changes(cursor)).keys or frozenset())
    crashed = copy(store_path)
    again = await started(opened, root=crashed)
    assert keys <= ((await again.changes(cursor)).keys or frozenset())


@pytest.mark.parametrize("cursor", ["", "x", "x:1", ":5", "x:-1", "\0", "x:99999999999999999999"])
async def test_a_cursor_of_nowhere_means_that_anything_may_have_changed(opened: Open, cursor: str) -> None:
    backend = await started(opened)
    await append(backend, "a")
    assert (await backend.changes(cursor)).keys is None


async def test_without_its_history_a_cursor_of_a_folded_segment_tells_nothing(opened: Open, store_path: Path) -> None:
    backend = await started(opened)
    await append(backend, "a")
    cursor = (await backend.changes(None)).cursor
    await append(backend, "b")
    await backend.close()
    (store_path / "system/journal/history.jsonl").write_bytes(b'{"torn":\n')
    again = await started(opened)
    assert (await again.changes(cursor)).keys is None


def test_a_mark_is_read_back_and_nothing_else_is_one() -> None:
    for mark in (Mark("a-b", 0), Mark("x", 12345)):
        assert Mark.decode(mark.encode() + b"rest of a longer one") == mark
        assert Mark.decode(mark.encode()[:-2]) is None
    for data in (b"", b"\n", b"a 1 00000000\n", b"\xff" * 20):
        assert Mark.decode(data) is None


# --- as people use it ------------------------------------------------------------------------------------


async def test_copied_while_it_is_written_a_store_opens_with_all_that_was_acknowledged(tmp_path: Path) -> None:
    root = tmp_path / "store"
    async with StorageManager(StorageConfig(storage_base_path=str(root))) as storage:
        await storage.create_user("ada")
        await storage.create_session("ada", session_id="s")
        await storage.add_message("ada", "s", Message("user", "one"))
        shutil.copytree(root, tmp_path / "copy")
    async with StorageManager(StorageConfig(storage_base_path=str(tmp_path / "copy")), read_only=True) as storage:
        assert [message.content for message in await storage.get_messages("ada", "s")] == ["one"]
