"""The flat-file engine below the contract: what stands on disk, half lines, batches, descriptors, the lock, forks."""

import asyncio
import errno
import fcntl
import json
import os
import stat
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from flatfile_chat_database import codec
from flatfile_chat_database.backends.changes import ABSENT, Append, Change, Edit, Move, Put, RemoveTree, Truncate
from flatfile_chat_database.backends.flatfile import FlatfileBackend
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.errors import (
    ClosedError,
    ConfigurationError,
    DurabilityError,
    IntegrityError,
    UnavailableError,
    ValidationError,
)
from flatfile_chat_database.models import Message
from flatfile_chat_database.testing.faults import FaultyFiles

LOG = "users/ada/s/messages.jsonl"
DOCUMENT = "users/ada/profile.json"


def line(message_id: str, content: str = "text") -> bytes:
    """Return a message's line, newline included."""
    return codec.encode_message(Message("user", content, id=message_id, timestamp="2026-01-01T00:00:00.000000+00:00"))


Open = Callable[..., FlatfileBackend]


@pytest.fixture
async def opened(store_path: Path) -> AsyncIterator[Open]:
    """Return a function that makes opened-on-first-await backends on one folder; all are closed."""
    made: list[FlatfileBackend] = []

    def make(files: FaultyFiles | None = None, **overrides: object) -> FlatfileBackend:
        config = StorageConfig(**overrides)  # type: ignore[arg-type]
        backend = FlatfileBackend(config, store_path, files=files)
        made.append(backend)
        return backend

    yield make
    for backend in made:
        await backend.close()


async def ids(backend: FlatfileBackend, key: str = LOG) -> list[str]:
    return [str(codec.line_id(record)) for record in await backend.read_log(key)]


# --- what stands on disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0, 0o077, 0o777])
async def test_files_and_folders_are_private_from_their_creation_whatever_the_umask(
    opened: Open, store_path: Path, umask: int
) -> None:
    if umask == 0o777 and os.geteuid() != 0:
        umask = 0o177  # only root can go on in folders that nobody may enter
    created: list[tuple[str, int]] = []

    class Watched(FaultyFiles):
        def create(self, path: str) -> int:
            descriptor = super().create(path)
            created.append((path, stat.S_IMODE(os.fstat(descriptor).st_mode)))
            return descriptor

        def make_folder(self, path: str) -> None:
            super().make_folder(path)
            created.append((path, stat.S_IMODE(os.stat(path).st_mode)))

    backend = opened(Watched())
    await backend.open()
    before = os.umask(umask)
    try:
        await backend.commit([Put(DOCUMENT, b"{}"), Append(LOG, (line("a"),))])

        async def chunks() -> AsyncIterator[bytes]:
            yield b"bytes"

        await backend.write_blob("users/ada/s/documents/a.txt", chunks())
    finally:
        os.umask(before)
    assert len(created) >= 8
    for path, mode in created:
        assert mode & 0o077 == 0, f"{path} was made with mode {mode:o}"
    assert stat.S_IMODE((store_path / "system/lock").stat().st_mode) & 0o077 == 0


async def test_a_document_is_written_beside_its_place_with_the_configured_suffix_and_renamed(
    opened: Open, store_path: Path
) -> None:
    seen: list[tuple[str, str]] = []

    class Watched(FaultyFiles):
        def rename(self, source: str, target: str) -> None:
            seen.append((source, target))
            super().rename(source, target)

    backend = opened(Watched(), atomic_write_temp_suffix=".new")
    await backend.open()
    await backend.write(DOCUMENT, b"{}")
    [source] = [source for source, target in seen if target == str(store_path / DOCUMENT)]
    assert Path(source).parent == (store_path / DOCUMENT).parent
    assert Path(source).name.startswith(".") and source.endswith(".new")


async def test_appends_of_many_callers_in_one_turn_share_one_sync(opened: Open) -> None:
    backend = opened()
    await backend.open()
    await backend.commit([Append(LOG, (line("first"),))])
    before = backend.statistics()
    await asyncio.gather(*(backend.commit([Append(LOG, (line(f"{n}"),))]) for n in range(100)))
    after = backend.statistics()
    assert after["batches"] - before["batches"] == 1
    assert after["syncs"] - before["syncs"] <= 2
    assert await ids(backend) == ["first", *(f"{n}" for n in range(100))]


# --- half lines ------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_cut_at_every_byte_a_log_keeps_its_whole_records_and_the_next_append_stands_alone(
    opened: Open, store_path: Path
) -> None:
    path = store_path / LOG
    whole = line("a", "one") + line("b", "two € \U0001f600")
    last = line("c", "three")
    path.parent.mkdir(parents=True)
    for cut in range(len(last) + 1):
        path.write_bytes(whole + last[:cut])
        backend = opened()
        await backend.open()
        assert (await ids(backend))[:2] == ["a", "b"]
        await backend.commit([Append(LOG, (line("d", "next"),))])
        kept = ["c"] if cut >= len(last) - 1 else []
        assert await ids(backend) == ["a", "b", *kept, "d"]
        aside = [key for key in await backend.list_keys("system/quarantine/") if key.endswith(".bin")]
        if 0 < cut < len(last) - 1:
            [key] = aside
            assert await backend.read(key) == last[:cut]
            note = json.loads(await backend.read(key.replace(".bin", ".json")) or b"")
            assert note["key"] == LOG and note["offset"] == len(whole) and note["size"] == cut
        else:
            assert aside == []
        await backend.commit([RemoveTree("system/quarantine")])
        await backend.close()


async def test_an_append_may_bring_the_ids_of_its_lines(opened: Open) -> None:
    backend = opened()
    await backend.open()
    assert await backend.commit([Append(LOG, (line("a"), line("b")), ids=("a", "b"))]) == [2]
    assert await backend.commit([Append(LOG, (line("b"), line("c"), line("c")), ids=("b", "c", "c"))]) == [1]
    with pytest.raises(ValidationError, match="'a' already"):
        await backend.commit([Append(LOG, (line("a", "other"),), ids=("a",))])
    with pytest.raises(ValidationError, match="an id for every line"):
        await backend.commit([Append(LOG, (line("d"), line("e")), ids=("d",))])
    assert await ids(backend) == ["a", "b", "c"]


async def test_nul_bytes_at_the_end_are_set_aside_like_any_half_line(opened: Open, store_path: Path) -> None:
    path = store_path / LOG
    path.parent.mkdir(parents=True)
    path.write_bytes(line("a") + b"\0" * 5000)
    backend = opened()
    await backend.open()
    await backend.commit([Append(LOG, (line("b"),))])
    assert path.read_bytes() == line("a") + line("b")


async def test_half_a_line_is_not_lost_by_a_rewrite_or_a_pop(opened: Open, store_path: Path) -> None:
    path = store_path / LOG
    path.parent.mkdir(parents=True)
    backend = opened()
    await backend.open()
    changes: list[Change] = [Edit(LOG, "a", line("a"), line("a", "new")), Truncate(LOG, 1), Truncate(LOG)]
    for number, change in enumerate(changes):
        path.write_bytes(line("a") + line("b") + b'{"id":"half')
        await backend.commit([change])
        aside = [key for key in await backend.list_keys("system/quarantine/") if key.endswith(".bin")]
        assert len(aside) == number + 1
        assert await backend.read(aside[-1]) == b'{"id":"half'


async def test_a_reader_neither_reports_nor_repairs_the_unterminated_end(
    opened: Open, store_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = store_path / LOG
    path.parent.mkdir(parents=True)
    path.write_bytes(line("a") + line("b")[:-5])
    backend = opened()
    await backend.open()
    assert await ids(backend) == ["a"]
    assert [record async for run in backend.stream_log(LOG, strict=True) for record in run] == [line("a")[:-1]]
    assert await backend.read_log(LOG, -5, strict=True) == [line("a")[:-1]]
    assert caplog.records == []
    assert path.read_bytes() == line("a") + line("b")[:-5]


async def test_lines_longer_than_any_message_are_passed_over_without_being_held(
    opened: Open, store_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = store_path / LOG
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.write(line("a"))
        file.write(line("big", "x" * 50_000_000))
        file.write(line("b"))
    backend = opened()
    await backend.open()
    assert await ids(backend) == ["a", "b"]
    assert await backend.read_log(LOG, -2) == [line("a")[:-1], line("b")[:-1]]
    assert await backend.count_log(LOG) == 2
    assert "no message" in caplog.text
    with pytest.raises(IntegrityError, match=f"byte {len(line('a'))}"):
        await backend.read_log(LOG, strict=True)
    await backend.commit([Append(LOG, (line("c"), line("b")))])
    assert await ids(backend) == ["a", "b", "c"]


@pytest.mark.parametrize("block", [1, 7, 64, 8192, 1 << 20])
async def test_every_block_size_reads_the_same_records(opened: Open, store_path: Path, block: int) -> None:
    path = store_path / LOG
    path.parent.mkdir(parents=True)
    texts = ["", "x" * 10, "\n\u2028é" * 5, "y" * 3000, "终"]
    good = [line(str(number), texts[number % 5]) for number in range(60)]
    path.write_bytes(b"\n".join([b"".join(good[:20]) + b"not json", b"", b"".join(good[20:]) + b'{"half']))
    backend = opened(jsonl_read_buffer_size=block)
    await backend.open()
    records = [record[:-1] for record in good]
    assert await backend.read_log(LOG) == records
    for start, stop in [(0, 5), (18, 25), (59, 70), (-1, None), (-45, None), (-45, -30), (5, -5), (-5, 58), (70, None)]:
        assert await backend.read_log(LOG, start, stop) == records[start:stop], (start, stop)
    assert await backend.find_record(LOG, "33") == (33, records[33])
    assert await backend.newest_records([LOG, "users/none/messages.jsonl"]) == [records[-1], None]


@pytest.mark.parametrize("good", [0, 1, 30])
@pytest.mark.parametrize("half", [0, 1, 399, 5_000, 200_000])
async def test_half_a_line_of_any_length_hides_no_newest_record(
    opened: Open, store_path: Path, good: int, half: int
) -> None:
    path = store_path / LOG
    path.parent.mkdir(parents=True)
    lines = [line(str(number)) for number in range(good)]
    path.write_bytes(b"".join([*lines, b"x" * half]))
    backend = opened()
    await backend.open()
    for count in (1, 2, 29, 30, 31):
        assert await backend.read_log(LOG, -count) == [each[:-1] for each in lines[-count:]]


@pytest.mark.parametrize("bad", [b"not json\n", line("bad").replace(b"2026-", b"year-")])
async def test_a_strict_stream_yields_all_that_stands_before_the_damage(
    opened: Open, store_path: Path, bad: bytes
) -> None:
    path = store_path / LOG
    path.parent.mkdir(parents=True)
    lines = [line(str(number)) for number in range(200)]
    path.write_bytes(b"".join([*lines[:150], bad, *lines[150:]]))

    def doubt(message: Message) -> None:
        raise IntegrityError(f"{message.timestamp} is no time")

    backend = opened()
    await backend.open()
    found: list[str] = []
    with pytest.raises(IntegrityError):
        async for run in backend.stream_log_as(LOG, codec.MessageDecoder(doubt), strict=True):
            for message in run:
                found.append(message.id)  # noqa: PERF401 - what came before the error is the subject
    assert found == [str(number) for number in range(150)]


# --- batches of lines --------------------------------------------------------------------------------------


async def test_a_batch_and_a_rewrite_in_one_turn_do_not_meet(opened: Open) -> None:
    backend = opened()
    await backend.open()
    await backend.commit([Append(LOG, (line("a"), line("b")))])
    await asyncio.gather(
        backend.commit([Append(LOG, (line("c"), line("d")))]),
        backend.commit([Edit(LOG, "a", line("a"), line("a", "longer " * 50))]),
        backend.commit([Append(LOG, (line("e"), line("f")))]),
        backend.commit([Truncate(LOG, 1)]),
    )
    assert await ids(backend) == ["a", "b", "c", "d", "e"]
    assert await backend.verify() == []


# --- failing calls -----------------------------------------------------------------------------------------


async def test_a_failed_sync_makes_the_outcome_unknown_and_ends_all_writing(opened: Open) -> None:
    files = FaultyFiles()
    backend = opened(files)
    await backend.open()
    await backend.commit([Append(LOG, (line("a"),))])
    files.fail(1, errno.EIO, names=["sync"])
    results = await asyncio.gather(
        *(backend.commit([Append(LOG, (line(f"b{n}"),))]) for n in range(3)), return_exceptions=True
    )
    assert all(isinstance(result, DurabilityError) for result in results)
    files.watch()
    with pytest.raises(DurabilityError, match="could not be made durable"):
        await backend.write(DOCUMENT, b"{}")
    assert (await ids(backend))[0] == "a"  # reading goes on
    again = opened()
    await again.open()
    await again.commit([Append(LOG, (line("c"),))])
    assert await ids(again) == ["a", "b0", "b1", "b2", "c"]


async def test_a_disk_that_fills_up_takes_the_line_back_and_takes_writes_again_when_there_is_room(
    opened: Open, store_path: Path
) -> None:
    files = FaultyFiles()
    backend = opened(files)
    await backend.open()
    await backend.commit([Append(LOG, (line("a"),))])
    for message in (line("b"), line("c", "x" * 50_000)):
        before = (store_path / LOG).read_bytes()
        files.fail(1, errno.ENOSPC, names=["write_at"], forever=True)  # of the journal
        with pytest.raises(UnavailableError, match="No space left"):
            await backend.commit([Append(LOG, (message,))])
        assert (store_path / LOG).read_bytes() == before
    files.watch()
    await backend.commit([Append(LOG, (line("d"),))])
    assert await ids(backend) == ["a", "d"]


async def test_what_the_journal_took_and_the_log_did_not_is_done_before_the_next_write(
    opened: Open, store_path: Path
) -> None:
    files = FaultyFiles()
    backend = opened(files)
    await backend.open()
    await backend.commit([Append(LOG, (line("a"),))])
    files.fail(1, errno.ENOSPC, names=["write"], forever=True)  # of the log
    with pytest.raises(DurabilityError, match=r"in the journal, but not in its place yet.*No space left"):
        await backend.commit([Append(LOG, (line("b", "x" * 50_000),))])
    assert await ids(backend) == ["a"]
    files.fail(1, errno.ENOSPC, names=["write", "write_at"], forever=True)
    with pytest.raises(UnavailableError, match="No space left"):
        await backend.write(DOCUMENT, b"{}")
    files.watch()
    await backend.commit([Append(LOG, (line("c"),))])
    assert await ids(backend) == ["a", "b", "c"]


async def test_a_disk_that_is_full_of_journal_has_room(opened: Open, store_path: Path) -> None:
    files = FaultyFiles()
    backend = opened(files)
    await backend.open()
    await backend.commit([Append(LOG, (line("a"),))])
    files.shorten(1, errno.ENOSPC)  # of the journal
    await backend.commit([Append(LOG, (line("b"),))])
    files.shorten(2, errno.ENOSPC)  # of the log, half of which is written
    await backend.commit([Append(LOG, (line("c"),))])
    files.watch()
    assert await ids(backend) == ["a", "b", "c"]
    assert backend.statistics()["checkpoints"] == 2
    assert [problem.kind for problem in await backend.verify()] == []


async def test_a_short_write_is_finished(opened: Open) -> None:
    files = FaultyFiles()
    backend = opened(files)
    await backend.open()
    await backend.commit([Append(LOG, (line("a"),))])
    files.shorten(1)
    await backend.commit([Append(LOG, (line("b", "x" * 10_000),))])
    assert await ids(backend) == ["a", "b"]


async def test_what_cannot_be_read_is_an_error_and_never_absent(opened: Open) -> None:
    files = FaultyFiles()
    backend = opened(files)
    await backend.open()
    await backend.commit([Put(DOCUMENT, b"{}"), Append(LOG, (line("a"),))])
    for error in (errno.EIO, errno.EACCES, errno.EMFILE):
        for name in ("open_to_read", "read", "status_of"):
            files.fail(1, error, names=[name], forever=True)
            with pytest.raises(UnavailableError):
                await backend.read(DOCUMENT)
            with pytest.raises(UnavailableError):
                await backend.read_log(LOG)
            with pytest.raises(UnavailableError):
                await backend.read_log(LOG, -1)
            with pytest.raises(UnavailableError):
                await backend.count_log(LOG)
        files.fail(1, error, names=["status"], forever=True)
        with pytest.raises(UnavailableError):
            await backend.exists(DOCUMENT)
        files.fail(1, error, names=["list_folder"], forever=True)
        with pytest.raises(UnavailableError):
            await backend.list_keys("")
        with pytest.raises(UnavailableError):
            await backend.list_children("users")
    files.watch()
    assert await backend.read(DOCUMENT) == b"{}"


# --- descriptors, lock, threads ----------------------------------------------------------------------------


async def test_descriptors_kept_open_are_bounded(opened: Open) -> None:
    backend = opened(max_open_files=5)
    await backend.open()
    for number in range(20):
        await backend.commit([Append(f"users/ada/s{number}/messages.jsonl", (line("a"),))])
        await backend.commit([Append(f"users/ada/s{number}/messages.jsonl", (line("b"),))])
    assert backend.statistics()["open_files"] <= 8  # and the lock, the presence and the journal
    for number in range(20):
        await backend.commit([Append(f"users/ada/s{number}/messages.jsonl", (line("a"), line("c")))])
        assert await ids(backend, f"users/ada/s{number}/messages.jsonl") == ["a", "b", "c"]


async def test_a_log_that_another_program_replaced_or_edited_is_looked_at_again(opened: Open, store_path: Path) -> None:
    backend = opened()
    await backend.open()
    await backend.commit([Append(LOG, (line("a"), line("b")))])
    path = store_path / LOG
    edited = store_path / "edited"
    edited.write_bytes(line("b") + line("x"))
    os.replace(edited, path)
    await backend.commit([Append(LOG, (line("a"), line("x")))])
    assert await ids(backend) == ["b", "x", "a"]
    with path.open("ab") as file:
        file.write(line("hand"))
    await backend.commit([Append(LOG, (line("hand"), line("y")))])
    assert await ids(backend) == ["b", "x", "a", "hand", "y"]
    path.unlink()
    await backend.commit([Append(LOG, (line("z"),))])
    assert await ids(backend) == ["z"]


async def test_waiting_for_the_lock_ends_with_an_error_that_names_it(opened: Open, store_path: Path) -> None:
    backend = opened(lock_timeout_seconds=0.05)
    await backend.open()
    await backend.write(DOCUMENT, b"1")
    descriptor = os.open(store_path / "system/lock", os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(UnavailableError, match=r"system/lock|lock of the store"):
            await backend.write(DOCUMENT, b"2")
        assert await backend.read(DOCUMENT) == b"1"
    finally:
        os.close(descriptor)
    await backend.write(DOCUMENT, b"3")


async def test_a_lock_file_that_was_removed_is_made_again_and_excludes_all(opened: Open, store_path: Path) -> None:
    one, other = opened(), opened()
    await one.open()
    await other.open()
    await one.write(DOCUMENT, b"0")
    await other.write(DOCUMENT, b"1")
    (store_path / "system/lock").unlink()
    await asyncio.gather(*(backend.append(LOG, line(f"{n}")) for n in range(20) for backend in (one, other)))
    assert len(await ids(one)) == 40
    assert (store_path / "system/lock").exists()


async def test_a_lock_file_that_is_a_symbolic_link_is_refused(opened: Open, store_path: Path) -> None:
    (store_path / "system").mkdir(parents=True)
    target = store_path.parent / "victim"
    target.write_text("precious")
    (store_path / "system/lock").symlink_to(target)
    backend = opened()
    await backend.open()
    with pytest.raises(UnavailableError):
        await backend.write(DOCUMENT, b"1")
    assert target.read_text() == "precious"


async def test_a_network_file_system_is_refused_unless_allowed(opened: Open) -> None:
    class OnNfs(FaultyFiles):
        def file_system(self, path: str) -> str:
            return "nfs4"

    backend = opened(OnNfs())
    await backend.open()
    with pytest.raises(ConfigurationError, match="allow_network_file_system"):
        await backend.write(DOCUMENT, b"1")
    allowed = opened(OnNfs(), allow_network_file_system=True)
    await allowed.open()
    assert await allowed.write(DOCUMENT, b"1")


def test_the_file_system_of_a_path_is_known(tmp_path: Path) -> None:
    assert FaultyFiles().file_system(str(tmp_path)) not in ("", "nfs")


async def test_one_backend_serves_several_threads_with_loops_of_their_own(opened: Open) -> None:
    backend = opened()
    await backend.open()
    errors: list[BaseException] = []

    def work(name: str) -> None:
        async def appends() -> None:
            for number in range(50):
                await backend.commit([Append(LOG, (line(f"{name}{number}"),))])

        try:
            asyncio.run(appends())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert errors == []
    found = await ids(backend)
    for name in "abcd":
        assert [record for record in found if record[0] == name] == [f"{name}{number}" for number in range(50)]


# --- ends --------------------------------------------------------------------------------------------------


async def test_cancelling_a_write_leaves_it_whole_or_undone_and_in_order(opened: Open) -> None:
    backend = opened()
    await backend.open()
    await backend.commit([Append(LOG, (line("start"),))])
    for number in range(100):
        task = asyncio.ensure_future(backend.commit([Append(LOG, (line(f"c{number}"), line(f"d{number}")))]))
        for _ in range(number % 7):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await backend.commit([Append(LOG, (line(f"e{number}"),))])
    found = await ids(backend)
    for number in range(100):
        both = {f"c{number}", f"d{number}"} & set(found)
        assert len(both) in (0, 2)
        if both:
            at = found.index(f"c{number}")
            assert found[at : at + 3] == [f"c{number}", f"d{number}", f"e{number}"]
    assert await backend.verify() == []


async def test_a_blob_whose_caller_is_cancelled_leaves_no_temporary_file(opened: Open, store_path: Path) -> None:
    backend = opened()
    await backend.open()

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield b"x" * 200_000
            await asyncio.sleep(0)

    for pause in range(20):
        task = asyncio.ensure_future(backend.write_blob(f"users/ada/s/documents/{pause}.bin", chunks()))
        await asyncio.sleep(pause / 1000)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await backend.close()
    for path in (store_path / "users/ada/s/documents").iterdir():
        assert not path.name.startswith(".")
        assert path.stat().st_size == 10_000_000


async def test_closing_finishes_what_was_submitted_and_refuses_the_rest(opened: Open) -> None:
    backend = opened()
    await backend.open()
    writes = [asyncio.ensure_future(backend.commit([Append(LOG, (line(f"{n}"),))])) for n in range(10)]
    await asyncio.sleep(0)
    await backend.close()
    assert all(result == [1] for result in await asyncio.gather(*writes))
    with pytest.raises(ClosedError):
        await backend.read(DOCUMENT)
    await backend.close()


def test_a_store_that_is_forgotten_without_closing_ends_its_thread(store_path: Path) -> None:
    async def use() -> None:
        backend = FlatfileBackend(StorageConfig(), store_path)
        await backend.open()
        await backend.write(DOCUMENT, b"{}")

    asyncio.run(use())
    import gc

    gc.collect()
    for _ in range(500):
        if not any(thread.name == "chatdb-writer" for thread in threading.enumerate()):
            return
        threading.Event().wait(0.01)
    pytest.fail("the writer thread is still there")


async def test_an_opened_store_raises_in_a_forked_child_whose_parent_goes_on(opened: Open, store_path: Path) -> None:
    backend = opened()
    await backend.open()
    await backend.write(DOCUMENT, b"1")

    def fork() -> tuple[int, str]:
        reading, writing = os.pipe()
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that forking beside threads is risky is the subject
            child = os.fork()
        if child == 0:
            answer = "no error"
            try:
                coroutine = backend.write(DOCUMENT, b"child")
                coroutine.send(None)
            except ClosedError as error:
                answer = str(error)
            except BaseException as error:
                answer = repr(error)
            os.write(writing, answer.encode())
            # Descriptors that the child kept would show here.
            inherited = [os.readlink(f"/proc/self/fd/{number}") for number in _descriptors()]
            os.write(writing, json.dumps(["lock" for path in inherited if path.endswith("system/lock")]).encode())
            os._exit(0)
        os.close(writing)
        text = b""
        while piece := os.read(reading, 4096):
            text += piece
        os.close(reading)
        return os.waitpid(child, 0)[1], text.decode()

    status, text = await asyncio.to_thread(fork)
    assert status == 0
    assert "before a fork" in text
    assert text.endswith("[]"), text
    await backend.write(DOCUMENT, b"2")
    assert (store_path / DOCUMENT).read_bytes() == b"2"


def _descriptors() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
        except OSError:
            continue
        found.append(int(name))
    return found


async def test_moving_and_removing_leave_no_empty_folders_unless_configured(opened: Open, store_path: Path) -> None:
    for clean in (True, False):
        backend = opened(auto_cleanup_empty_directories=clean)
        await backend.open()
        await backend.commit([Put("users/ada/personas/p.json", b"{}", ABSENT)])
        await backend.commit([Move("users/ada/personas/p.json", "personas_global/p.json")])
        await backend.delete("personas_global/p.json")
        assert (store_path / "users").exists() is not clean
        assert (store_path / "personas_global").exists() is not clean
        await backend.close()
