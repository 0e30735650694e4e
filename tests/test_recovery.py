"""What the journal has to make good, found in review: power cuts at bad moments, levels that mix, files in the way."""

import asyncio
import contextlib
import errno
import os
from pathlib import Path

import pytest

from flatfile_chat_database import Message, StorageConfig, StorageManager
from flatfile_chat_database.backends.changes import Move, Put
from flatfile_chat_database.backends.flatfile import FlatfileBackend
from flatfile_chat_database.errors import DurabilityError, IntegrityError, StorageError, ValidationError
from flatfile_chat_database.testing.faults import FaultyFiles

from .test_flatfile import DOCUMENT, LOG, ids
from .test_journal import OTHER, Open, append, batches, copy, opened, quarantined, segments, started

__all__ = ["opened"]  # a fixture

BIG = b"0" * (2 << 20)


class Synced(FaultyFiles):
    """System calls that remember which files were synced."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: list[str] = []

    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        self.paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))


# --- a power cut that takes what was not flushed to the files ---------------------------------------------


@pytest.mark.parametrize(
    ("before", "writes", "left"),
    [
        (None, [BIG, b"small"], BIG),  # a large one is not in the journal itself
        (b"first", [BIG, b"small"], b"first"),
        (b"a longer one", [b"short"], b"a longer one"),
        (None, [b"one", b"two"], b"one"),
        (None, [b"one", b"two"], None),
    ],
)
async def test_a_document_is_the_last_one_that_was_acknowledged(
    opened: Open, store_path: Path, before: bytes | None, writes: list[bytes], left: bytes | None
) -> None:
    if before is not None:
        backend = await started(opened)
        await backend.write(DOCUMENT, before)
        await backend.close()
    backend = await started(opened)
    for data in writes:
        await backend.write(DOCUMENT, data)
    crashed = copy(store_path)
    (crashed / DOCUMENT).unlink()
    if left is not None:
        (crashed / DOCUMENT).write_bytes(left)
    again = await started(opened, root=crashed)
    assert await again.read(DOCUMENT) == writes[-1]
    assert quarantined(crashed) == []


async def test_a_document_that_was_changed_and_deleted_stays_deleted(opened: Open, store_path: Path) -> None:
    backend = await started(opened)
    await backend.write(DOCUMENT, b"0" * 100)
    await backend.close()
    backend = await started(opened)
    await backend.write(DOCUMENT, b"1" * 50)
    await backend.delete(DOCUMENT)
    crashed = copy(store_path)
    (crashed / DOCUMENT).parent.mkdir(parents=True, exist_ok=True)
    (crashed / DOCUMENT).write_bytes(b"0" * 100)
    again = await started(opened, root=crashed)
    assert await again.read(DOCUMENT) is None


async def test_a_document_edited_by_hand_between_two_writes_is_the_second(opened: Open, store_path: Path) -> None:
    backend = await started(opened)
    await backend.write(DOCUMENT, b"v1")
    (store_path / DOCUMENT).write_bytes(b"by hand")
    await backend.write(DOCUMENT, b"v2")
    crashed = copy(store_path)
    (crashed / DOCUMENT).write_bytes(b"by hand")
    again = await started(opened, root=crashed)
    assert await again.read(DOCUMENT) == b"v2"
    assert quarantined(crashed) == []


async def test_half_of_a_commit_is_never_there_after_a_flush_that_failed(opened: Open, store_path: Path) -> None:
    files = FaultyFiles()
    backend = await started(opened, files)
    await backend.commit([Put("a", b"old"), Put("b", b"old")])
    files.fail(3, errno.EIO, names=["sync", "sync_folder"])
    calls = 0
    while calls < 12:
        calls += 1
        files.fail(calls, errno.EIO, names=["sync"])
        with contextlib.suppress(StorageError):
            await backend.commit([Put("a", b"new"), Put("b", BIG)])
            break
        again = await started(opened)
        found = await again.read("a"), await again.read("b")
        assert found in ((b"old", b"old"), (b"new", BIG)), calls
        await again.close()
        backend = await started(opened, files)
        files.watch([])
        await backend.commit([Put("a", b"old"), Put("b", b"old")])


# --- levels that mix --------------------------------------------------------------------------------------


async def test_a_process_at_the_level_os_syncs_what_one_at_full_acknowledged(opened: Open, store_path: Path) -> None:
    full = await started(opened)
    await append(full, "a")
    files = Synced()
    lazy = await started(opened, files, durability="os", journal_max_bytes=2000)
    for number in range(30):
        await append(lazy, f"x{number}", key=OTHER)
    await asyncio.sleep(0.2)
    assert lazy.statistics()["checkpoints"] > 0
    assert str(store_path / LOG) in files.paths
    crashed = copy(store_path)
    is_named = any(batches(segment) for segment in segments(crashed))  # not if all of it had just been folded
    files = Synced()
    again = await started(opened, files, crashed, durability="os")
    assert await ids(again) == ["a"]
    assert str(crashed / OTHER) in files.paths or not is_named


async def test_at_normal_whoever_closes_a_store_is_told_that_the_last_flush_failed(opened: Open) -> None:
    files = FaultyFiles()
    backend = await started(opened, files, durability="normal")
    await append(backend, "a")
    await append(backend, "b")
    files.fail(1, errno.EIO, names=["sync"], forever=True)
    with pytest.raises(DurabilityError, match="Input/output error"):
        await backend.close()
    await backend.close()  # again does nothing


async def test_at_normal_a_flush_that_failed_while_nobody_wrote_is_told_at_closing(opened: Open) -> None:
    files = FaultyFiles()
    backend = await started(opened, files, durability="normal")
    await append(backend, "a")
    files.fail(1, errno.EIO, names=["sync"])
    await asyncio.sleep(0.9)
    files.watch([])
    with pytest.raises(DurabilityError):
        await backend.close()


# --- files in the way ---------------------------------------------------------------------------------------


async def test_a_file_that_cannot_be_written_stops_no_other(opened: Open, store_path: Path) -> None:
    class Forbidding(FaultyFiles):
        forbidden = False

        def create(self, path: str) -> int:
            if self.forbidden and "/users/a/" in path:
                raise OSError(errno.EACCES, "Permission denied")
            return super().create(path)

    files = Forbidding()
    backend = await started(opened, files)
    await backend.write("users/a/profile.json", b"{}")
    files.forbidden = True
    with pytest.raises(DurabilityError, match="Permission denied"):
        await backend.write("users/a/profile.json", b'{"new": 1}')
    await backend.write("users/b/profile.json", b"{}")
    assert await backend.read("users/b/profile.json") == b"{}"
    assert quarantined(store_path) == [("users/a/profile.json", b'{"new": 1}')]


async def test_a_file_and_one_below_it_written_at_once_cost_nobody_else_anything(opened: Open) -> None:
    backend = await started(opened)
    results = await asyncio.gather(backend.write("a", b"1"), backend.write("a/b", b"2"), return_exceptions=True)
    assert results[0] is True and isinstance(results[1], StorageError)
    results = await asyncio.gather(backend.write("c/d", b"1"), backend.write("c", b"2"), return_exceptions=True)
    assert results[0] is True and isinstance(results[1], StorageError)
    assert await backend.write("other", b"3")
    await backend.close()
    again = await started(opened)
    assert [await again.read(key) for key in ("a", "c/d", "other")] == [b"1", b"1", b"3"]


@pytest.mark.slow
async def test_a_commit_of_too_many_steps_is_refused_and_changes_nothing(opened: Open) -> None:
    backend = await started(opened)
    key = "/".join(["x" * 100] * 8)
    with pytest.raises(ValidationError, match="too much for one commit"):
        await backend.commit([Put(f"{key}/{number}", b"1") for number in range(12_000)])
    assert await backend.list_keys("") == []
    assert await backend.write("other", b"3")


@pytest.mark.parametrize("way", ["folder", "huge", "garbage"])
async def test_a_history_that_cannot_be_kept_stops_no_fold(opened: Open, store_path: Path, way: str) -> None:
    backend = await started(opened)
    await append(backend, "a")
    cursor = (await backend.changes(None)).cursor
    await backend.close()
    history = store_path / "system/journal/history.jsonl"
    history.unlink()
    if way == "folder":
        history.mkdir()
    else:
        history.write_bytes(b"\0" * 40_000_000 if way == "huge" else b"\xff\n{}\n")
    backend = await started(opened)
    await append(backend, "b")
    await backend.commit([Move("users/ada/s", "system/trash/t/s")])
    await backend.close()
    assert segments(store_path) == []
    again = await started(opened)
    assert (await again.changes(cursor)).keys is None


# --- what changed, after a power cut ------------------------------------------------------------------------


async def test_a_mark_and_a_history_of_before_a_power_cut_never_hide_a_change(tmp_path: Path) -> None:
    root = tmp_path / "store"
    config = StorageConfig(storage_base_path=str(root), max_sessions_per_user=10_000)
    async with StorageManager(config) as storage:
        await storage.create_user("ada")
        for number in range(250):
            await storage.create_session("ada", session_id=f"s{number}")
        await storage.add_message("ada", "s1", Message("user", "hello"))
        assert len(await storage.list_sessions("ada", 1000)) == 250
    synced: dict[str, bytes] = {}

    class Remembering(FaultyFiles):
        def sync(self, descriptor: int) -> None:
            super().sync(descriptor)
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            synced[path] = Path(path).read_bytes()

    names = ("system/lock", "system/journal/history.jsonl")
    before = {name: (root / name).read_bytes() for name in names}
    async with StorageManager(config, backend=FlatfileBackend(config, root, files=Remembering())) as storage:
        await storage.create_session("ada", session_id="newest")
        await storage.add_message("ada", "newest", Message("user", "newest of all"))
        await storage.backend.close()
    for name in names:  # the power goes: what was not synced is as before
        (root / name).write_bytes(synced.get(str(root / name), before[name]))
    async with StorageManager(config) as storage:
        assert (await storage.list_sessions("ada", 1))[0].id == "newest"
        assert len(await storage.search_messages("ada", "newest")) == 1


# --- a journal of a hostile hand ------------------------------------------------------------------------------


async def test_a_batch_of_negative_size_ends_the_journal(opened: Open, store_path: Path) -> None:
    backend = await started(opened)
    await append(backend, "a")
    cursor = (await backend.changes(None)).cursor
    await append(backend, "b")
    [segment] = segments(store_path)
    data = segment.read_bytes()
    end = int((store_path / "system/lock").read_text().split()[1])
    evil = b'{"crc":"00000000","bytes":-60,"synced":0,"steps":[]}\n'
    segment.write_bytes(data[: int(cursor.rpartition(":")[2])] + evil + b"\0" * (end + 1000))
    assert (await asyncio.wait_for(backend.changes(cursor), 5)).keys in (frozenset(), None)


async def test_text_that_looks_like_a_journal_is_read_only_once_or_twice(opened: Open, store_path: Path) -> None:
    backend = await started(opened)
    await append(backend, "a")
    text = b'{"crc":"12345678","bytes":1,"synced":0,"steps":[]}' * 18_000
    await backend.write("users/x", text)
    crashed = copy(store_path)
    [segment] = segments(crashed)
    data = segment.read_bytes().rstrip(b"\0")
    segment.write_bytes(data[:-5])  # torn
    again = await started(opened, root=crashed)
    assert await ids(again) == ["a"]
    assert again.statistics()["bytes_read"] < 20 * len(data)


async def test_damage_to_the_last_batch_of_another_process_is_damage(opened: Open, store_path: Path) -> None:
    one, other = await started(opened), await started(opened)
    await append(one, "a", size=100)
    await append(other, "b", size=100)
    crashed = copy(store_path)
    [segment] = segments(crashed)
    segment.write_bytes(segment.read_bytes().replace(b"a" * 100, b"a" * 50 + b"X" + b"a" * 49))
    stopped = opened(root=crashed)
    await stopped.open()
    with pytest.raises(IntegrityError):
        await ids(stopped)


# --- a fold that fails while another process comes ----------------------------------------------------------


async def test_whoever_comes_when_a_fold_at_closing_failed_does_it_all_again(opened: Open, store_path: Path) -> None:
    class Failing(FaultyFiles):
        def sync(self, descriptor: int) -> None:
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith("messages.jsonl"):
                raise OSError(errno.EIO, "Input/output error")
            super().sync(descriptor)

    backend = await started(opened, Failing())
    await append(backend, "a")
    waiting = opened()

    async def come() -> None:
        await waiting.open()
        await append(waiting, "b")

    await asyncio.gather(backend.close(), come())
    assert await ids(waiting) == ["a", "b"]
    assert waiting.statistics().get("recoveries", 0) + (len(segments(store_path)) == 1) >= 1
