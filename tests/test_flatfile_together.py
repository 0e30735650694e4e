"""Several handles on one flat-file store, failing and dying at the worst moment: found in review, kept as tests."""

import asyncio
import errno
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from flatfile_chat_database import StorageConfig
from flatfile_chat_database.backends.changes import ABSENT, Append, Edit, Move, Outcome, Put, Quota, Truncate
from flatfile_chat_database.backends.flatfile import FlatfileBackend
from flatfile_chat_database.backends.flatfile.lock import Mark
from flatfile_chat_database.errors import (
    ClosedError,
    ConflictError,
    DurabilityError,
    StorageLimitExceeded,
    UnavailableError,
    ValidationError,
)
from flatfile_chat_database.testing.faults import FaultyFiles

from .test_flatfile import DOCUMENT, LOG, ids, line

Open = Callable[..., FlatfileBackend]


@pytest.fixture
async def opened(store_path: Path) -> AsyncIterator[Open]:
    """Return a function that makes backends on one folder; all are closed."""
    made: list[FlatfileBackend] = []

    def make(files: FaultyFiles | None = None, **overrides: object) -> FlatfileBackend:
        backend = FlatfileBackend(StorageConfig(**overrides), store_path, files=files)  # type: ignore[arg-type]
        made.append(backend)
        return backend

    yield make
    for backend in made:
        await backend.close()


async def append(backend: FlatfileBackend, *names: str, size: int = 10, key: str = LOG) -> list[Outcome]:
    return await backend.commit([Append(key, tuple(line(name, "x" * size) for name in names))])


class Watching(FaultyFiles):
    """System calls that remember which files were synced."""

    def __init__(self) -> None:
        super().__init__()
        self.synced: list[str] = []

    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        self.synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def sync_folder(self, path: str) -> None:
        super().sync_folder(path)
        self.synced.append(path)


# --- what one handle does to a log and another does not know yet ---------------------------------------------


async def test_a_pop_by_another_handle_and_a_longer_message_do_not_make_a_retry_write_twice(opened: Open) -> None:
    one, other = opened(), opened()
    await one.open()
    await other.open()
    await append(one, "m1", "m2")
    await other.commit([Truncate(LOG, 1)])
    await append(other, "m3", size=500)
    await append(one, "m3", size=500)
    assert await ids(one) == ["m1", "m3"]


async def test_a_handle_that_dies_after_a_pop_costs_no_other_handle_a_message(opened: Open, store_path: Path) -> None:
    one, other = opened(), opened()
    await one.open()
    await other.open()
    await append(one, "m1")
    await append(one, "m2")
    await other.commit([Truncate(LOG, 1)])
    with (store_path / LOG).open("ab") as file:  # and now it dies in the middle of a long message
        file.write(line("m3", "x" * 5000)[:4096])
    await append(one, "m4")
    fresh = opened()
    await fresh.open()
    assert await ids(fresh) == ["m1", "m4"]
    assert [problem.kind for problem in await fresh.verify()] == []


async def test_a_stream_never_mixes_two_messages_when_the_log_is_cut_and_grows_again(opened: Open) -> None:
    backend = opened()
    await backend.open()
    await append(backend, "m1")
    await backend.commit([Append(LOG, (line("m2", "A" * 300_000),))])
    seen = []
    async for run in backend.stream_log(LOG, strict=True):
        seen += run
        if len(seen) == 1:
            await backend.commit([Truncate(LOG, 1)])
            await backend.commit([Append(LOG, (line("m3", "B" * 300_000),))])
    assert seen == [line("m1", "x" * 10)[:-1], line("m2", "A" * 300_000)[:-1]]


async def test_two_handles_mix_every_change_of_a_log_and_no_message_is_lost_or_doubled(opened: Open) -> None:
    handles = [opened(max_open_files=1), opened()]
    for handle in handles:
        await handle.open()
    await append(handles[0], "0-base")
    alive = {"0-base"}
    for number in range(150):
        one, other = handles[number % 2], handles[1 - number % 2]
        kind = number % 5
        if kind == 0:
            await asyncio.gather(append(one, f"{number}-a", size=number), append(other, f"{number}-b", size=5 * number))
            alive |= {f"{number}-a", f"{number}-b"}
        elif kind == 1:
            await append(one, f"{number}-c", f"{number}-d", size=200)
            alive |= {f"{number}-c", f"{number}-d"}
        elif kind == 2:
            last = (await ids(other))[-1]
            await other.commit([Truncate(LOG, 1)])
            alive.remove(last)
        elif kind == 3:
            first = (await one.read_log(LOG, 0, 1))[0]
            name = (await ids(one))[0]
            await one.commit([Edit(LOG, name, first, line(name, "y" * number))])
        else:
            name = (await ids(other))[-1]
            [kept] = await other.read_log(LOG, -1)
            assert await one.commit([Append(LOG, (kept + b"\n",))]) == [0]  # a retry
        found = await ids(one)
        assert len(found) == len(set(found)) and set(found) == alive
    assert await handles[0].verify() == []


# --- what is answered is durable -----------------------------------------------------------------------------


async def test_a_log_that_is_appended_to_and_moved_in_one_turn_is_synced_first(opened: Open, store_path: Path) -> None:
    files = Watching()
    backend = opened(files)
    await backend.open()
    await append(backend, "a")
    files.synced.clear()
    await asyncio.gather(append(backend, "b"), backend.commit([Move("users/ada/s", "system/trash/t/users/ada/s")]))
    assert str(store_path / LOG) in files.synced
    assert await ids(backend, "system/trash/t/" + LOG) == ["a", "b"]
    broken = FaultyFiles()
    other = opened(broken)
    await other.open()
    await append(other, "a", key="users/ada/t/messages.jsonl")
    broken.fail(1, errno.EIO, names=["sync"], forever=True)
    results = await asyncio.gather(
        append(other, "b", key="users/ada/t/messages.jsonl"),
        other.commit([Move("users/ada/t", "system/trash/u/users/ada/t")]),
        return_exceptions=True,
    )
    assert all(isinstance(result, DurabilityError) for result in results)


async def test_already_there_is_answered_only_when_it_is_durable(opened: Open, store_path: Path) -> None:
    files = FaultyFiles()
    first = opened(files)
    await first.open()
    await append(first, "a")
    files.fail(1, errno.EIO, names=["sync"])
    with pytest.raises(DurabilityError):
        await append(first, "b")
    watching = Watching()
    again = opened(watching)
    await again.open()
    assert await append(again, "b") == [0]
    assert any("/system/journal/" in path for path in watching.synced)
    watching.synced.clear()
    assert await append(again, "b") == [0]
    assert watching.synced == []  # it is known to be durable by now


async def test_a_batch_that_can_neither_be_finished_nor_cut_is_not_there(opened: Open) -> None:
    files = FaultyFiles()
    backend = opened(files)
    await backend.open()
    await append(backend, "a")

    def refuse(descriptor: int, size: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    files.shorten(1, errno.ENOSPC)  # of the journal
    files.truncate = refuse  # type: ignore[method-assign]
    with pytest.raises(UnavailableError):
        await append(backend, "b", "c", size=2000)
    again = opened()
    await again.open()
    await append(again, "z")
    assert await ids(again) == ["a", "z"]


# --- the lock file is no authority -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"4711\n",
        b"{}\n",
        b"01a214e5-6da5-77c3-84e3-8e965aa8e152 99999999 00000000\n",
        Mark("01a214e5-6da5-77c3-84e3-8e965aa8e152", 99_999_999).encode(),
        b"\xff\x00\n",
        b"x" * 5000,
    ],
)
async def test_a_lock_file_that_holds_anything_harms_nothing_and_stops_nobody(
    opened: Open, store_path: Path, content: bytes
) -> None:
    backend = opened()
    await backend.open()
    await backend.commit([Put(DOCUMENT, b"{}"), Append(LOG, (line("a"), line("b")))])
    (store_path / "system/lock").write_bytes(content)
    assert await ids(backend) == ["a", "b"]
    await append(backend, "c")
    other = opened()
    await other.open()
    await append(other, "d")
    await append(backend, "e")
    assert await ids(backend) == ["a", "b", "c", "d", "e"]
    assert await backend.read(DOCUMENT) == b"{}"
    assert not list(store_path.glob("system/quarantine/*"))


# --- threads, descriptors, memory --------------------------------------------------------------------------------


async def test_cancelled_reads_leave_no_descriptor_open(opened: Open, store_path: Path) -> None:
    backend = opened()
    await backend.open()
    await append(backend, "a")

    async def chunks() -> AsyncIterator[bytes]:
        yield b"bytes"

    await backend.write_blob("users/ada/s/documents/a.txt", chunks())
    before = len(os.listdir("/proc/self/fd"))

    async def read() -> None:
        async for _ in backend.stream_log(LOG):
            pass
        async for _ in backend.read_blob("users/ada/s/documents/a.txt"):
            pass

    for number in range(200):
        task = asyncio.ensure_future(read())
        for _ in range(number % 4):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await backend.close()
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_more_logs_in_one_turn_than_descriptors_are_written_in_parts(opened: Open) -> None:
    opening = 0
    most = 0

    class Counting(FaultyFiles):
        def open_to_append(self, path: str) -> int:
            nonlocal opening, most
            opening += 1
            most = max(most, opening)
            return super().open_to_append(path)

        def close(self, descriptor: int) -> None:
            nonlocal opening
            opening -= 1
            super().close(descriptor)

    backend = opened(Counting(), max_open_files=5)
    await backend.open()
    keys = [f"users/ada/s{number}/messages.jsonl" for number in range(60)]
    await asyncio.gather(*(append(backend, "a", key=key) for key in keys))
    opening = most = 0
    await asyncio.gather(*(append(backend, "b", key=key) for key in keys))
    assert most <= 7
    for key in keys:
        assert await ids(backend, key) == ["a", "b"]


async def test_the_newest_page_of_a_log_with_an_endless_line_takes_little_memory(
    opened: Open, store_path: Path
) -> None:
    import tracemalloc

    (store_path / LOG).parent.mkdir(parents=True)
    with (store_path / LOG).open("wb") as file:
        file.write(line("a"))
        for _ in range(60):
            file.write(b"\0" * 1_000_000)
        file.write(b"\n" + line("b") + b"\0" * 40_000_000)
    backend = opened()
    await backend.open()
    tracemalloc.start()
    try:
        assert await backend.read_log(LOG, -2) == [line("a")[:-1], line("b")[:-1]]
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_a_store_that_is_used_while_the_interpreter_ends_answers(tmp_path: Path) -> None:
    program = f"""
import asyncio, threading, time
from flatfile_chat_database import Message, StorageManager, StorageConfig
storage = StorageManager(StorageConfig(storage_base_path={str(tmp_path / "store")!r}))

async def prepare():
    await storage.create_user("a")
    for name in "st":
        await storage.create_session("a", session_id=name)
        await storage.add_message("a", name, Message("user", "before"))

def late():
    time.sleep(0.3)
    async def write():
        await asyncio.gather(*(storage.backend.append(f"users/a/{{name}}/messages.jsonl", b"{{}}\\n") for name in "st"))
    try:
        asyncio.run(asyncio.wait_for(write(), 10))
        print("answered")
    except Exception as error:
        print(type(error).__name__)

asyncio.run(prepare())
threading.Thread(target=late, daemon=False).start()
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert finished.stdout.strip() in ("answered", "ClosedError", "DurabilityError"), finished.stderr


def test_writing_and_reading_at_the_very_end_of_the_interpreter_are_refused_and_do_not_hang(tmp_path: Path) -> None:
    program = f"""
import asyncio, atexit
loop = asyncio.new_event_loop()

def save():
    async def attempts():
        for attempt in (storage.add_message("a", "s", Message("user", "late")), storage.get_messages("a", "s")):
            try:
                await asyncio.wait_for(attempt, 10)
            except Exception as error:
                print(type(error).__name__)
    loop.run_until_complete(attempts())

atexit.register(save)  # before the library has registered anything, so it comes last
from flatfile_chat_database import Message, StorageManager, StorageConfig
storage = StorageManager(StorageConfig(storage_base_path={str(tmp_path / "store")!r}))

async def prepare():
    await storage.create_user("a")
    await storage.create_session("a", session_id="s")
    await storage.add_message("a", "s", Message("user", "before"))

loop.run_until_complete(prepare())
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert finished.stdout.split() == ["ClosedError", "ClosedError"], finished.stderr


async def test_when_no_thread_can_be_started_the_caller_is_told(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = opened()
    await backend.open()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="start new thread"):
            await asyncio.wait_for(backend.write(DOCUMENT, b"1"), 5)
    assert await backend.write(DOCUMENT, b"2")


async def test_closing_goes_on_when_its_caller_is_cancelled(opened: Open) -> None:
    backend = opened()
    await backend.open()
    await backend.write(DOCUMENT, b"1")
    task = asyncio.ensure_future(backend.close())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await backend.close()
    assert backend.statistics()["open_files"] == 0
    with pytest.raises(ClosedError):
        await backend.read(DOCUMENT)


# --- conditions ----------------------------------------------------------------------------------------------


async def test_creations_that_failed_take_no_room_in_a_quota(opened: Open, store_path: Path) -> None:
    files = FaultyFiles()
    backend = opened(files)
    await backend.open()
    await backend.write(DOCUMENT, b"{}")
    quota = Quota("users/ada", 2, "max_sessions_per_user", frozenset({"profile.json"}))
    for number in range(3):
        (store_path / f"users/ada/left{number}").mkdir()
        files.fail(1, errno.ENOSPC, names=["write_at"], forever=True)
        with pytest.raises(UnavailableError):
            await backend.commit([quota, Put(f"users/ada/failed{number}/session.json", b"{}", ABSENT)])
    files.watch([])
    for number in range(2):
        await backend.commit([quota, Put(f"users/ada/s{number}/session.json", b"{}", ABSENT)])
    with pytest.raises(StorageLimitExceeded):
        await backend.commit([quota, Put("users/ada/s2/session.json", b"{}", ABSENT)])


async def test_a_move_destroys_nothing_that_stands_in_its_place(opened: Open, store_path: Path) -> None:
    backend = opened()
    await backend.open()
    await backend.write("system/trash/t/users/ada/s/session.json", b"{}")
    place = store_path / "users/ada/s"
    (place / "empty").mkdir(parents=True)
    odd = place / "back\\slash.txt"
    odd.write_text("no key, but somebody's")
    with pytest.raises(ConflictError):
        await backend.commit([Move("system/trash/t/users/ada/s", "users/ada/s")])
    assert odd.read_text() == "no key, but somebody's"
    odd.unlink()
    assert await backend.commit([Move("system/trash/t/users/ada/s", "users/ada/s")]) == [True]


async def test_no_prefix_lists_what_is_outside_the_store(opened: Open, store_path: Path) -> None:
    backend = opened()
    await backend.open()
    await backend.write(DOCUMENT, b"{}")
    (store_path.parent / "outside.txt").write_text("x")
    for prefix in ("../", "../out", "users/../../", "/", "./", "users//"):
        assert await backend.list_keys(prefix) == []


@pytest.mark.parametrize("bad", [b"{}", b"{}\n{}\n", b"\n", b"", b"{}\n\n"])
async def test_a_record_is_one_line(opened: Open, bad: bytes) -> None:
    backend = opened()
    await backend.open()
    await append(backend, "a")
    with pytest.raises(ValidationError, match="one line"):
        await backend.commit([Append(LOG, (bad,))])
    with pytest.raises(ValidationError, match="one line"):
        await backend.commit([Edit(LOG, "a", line("a", "x" * 10), bad)])
    assert await ids(backend) == ["a"]


async def test_a_log_that_is_a_folder_costs_a_list_no_other_log(
    opened: Open, store_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = opened()
    await backend.open()
    await append(backend, "a")
    (store_path / "users/ada/odd/messages.jsonl").mkdir(parents=True)
    newest = await backend.newest_records([LOG, "users/ada/odd/messages.jsonl"])
    assert newest == [line("a", "x" * 10)[:-1], None]
    assert "odd/messages.jsonl is no file" in caplog.text
