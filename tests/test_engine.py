"""The engine by itself, without its thread: several jobs in one run, among which something fails."""

import asyncio
import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue

import pytest

from flatfile_chat_database import StorageConfig
from flatfile_chat_database.backends.changes import ABSENT, Append, Edit, Put, Require
from flatfile_chat_database.backends.flatfile.engine import Engine
from flatfile_chat_database.backends.flatfile.files import Files
from flatfile_chat_database.backends.flatfile.jobs import Extend, Mend, key_of
from flatfile_chat_database.backends.flatfile.journal import Step
from flatfile_chat_database.backends.flatfile.untimed import Statx
from flatfile_chat_database.backends.writer import Job, Writer
from flatfile_chat_database.errors import DurabilityError, NotFoundError, UnavailableError

OWNER, LOG, OTHER, DOCUMENT = "users/s.json", "users/a.jsonl", "users/b.jsonl", "users/d.json"


class Failing(Files):
    """System calls of which one fails on files whose paths end in a text."""

    call, end, times = "", "", 0

    def fail(self, call: str, end: str, times: int = 1) -> None:
        self.call, self.end, self.times = call, end, times

    def _look(self, call: str, descriptor: int) -> None:
        if call == self.call and self.times and os.readlink(f"/proc/self/fd/{descriptor}").endswith(self.end):
            self.times -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def write(self, descriptor: int, data: bytes | memoryview) -> int:
        self._look("write", descriptor)
        return super().write(descriptor, data)

    def write_at(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        self._look("write_at", descriptor)
        return super().write_at(descriptor, data, offset)

    def sync(self, descriptor: int) -> None:
        self._look("sync", descriptor)
        super().sync(descriptor)


Start = Callable[..., Engine]


@pytest.fixture
def files() -> Failing:
    return Failing()


@pytest.fixture
def start(tmp_path: Path, files: Failing) -> Iterator[Start]:
    """Return what opens an engine on one store."""
    engines: list[Engine] = []

    def make(**settings: object) -> Engine:
        config = StorageConfig(storage_base_path=str(tmp_path), **settings)  # type: ignore[arg-type]
        engines.append(Engine(config, str(tmp_path), files))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def line(name: str, content: str = "") -> bytes:
    text = f'"id":"{name}","role":"user","content":"{content}","timestamp":"2026-01-01T00:00:00+00:00"'
    return b'{%s,"attachments":[],"metadata":{}}\n' % text.encode()


def message(log: str, name: str) -> Job:
    return Job([Require(OWNER, "The session"), Append(log, (line(name),), None, "", (name,))])


def put(key: str, data: bytes = b"{}") -> Job:
    return Job([Put(key, data)])


def run(engine: Engine, *jobs: Job) -> list[Job]:
    engine.run(jobs)
    return list(jobs)


def names(path: Path, key: str) -> list[str]:
    return [text.split('"')[3] for text in (path / key).read_text().splitlines()]


def test_what_could_not_be_done_is_done_before_what_comes_next_in_the_same_run(
    start: Start, files: Failing, tmp_path: Path
) -> None:
    engine = start()
    run(engine, put(OWNER), message(LOG, "a0"), message(OTHER, "b0"))
    files.fail("write", OTHER)
    done, failed, first, second = run(
        engine, message(LOG, "a1"), message(OTHER, "b1"), put(DOCUMENT, b"1"), put(DOCUMENT, b"2")
    )
    assert done.error is None
    assert isinstance(failed.error, DurabilityError)
    assert isinstance(first.error, DurabilityError)
    assert second.error is None
    journal = b"".join(path.read_bytes() for path in (tmp_path / "system/journal").iterdir())
    assert all(f'"{name}"'.encode() in journal for name in ("a1", "b1"))
    assert (names(tmp_path, LOG), names(tmp_path, OTHER)) == (["a0", "a1"], ["b0", "b1"])
    assert (tmp_path / DOCUMENT).read_bytes() == b"2"


def test_while_it_cannot_be_done_the_rest_of_the_run_is_refused(start: Start, files: Failing, tmp_path: Path) -> None:
    engine = start()
    run(engine, put(OWNER), message(LOG, "a0"))
    files.fail("write", LOG, times=1)
    appended, one, two = message(LOG, "a1"), put(DOCUMENT, b"1"), put(DOCUMENT, b"2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.ledger, "catch_up", lambda: files.sync(-1))  # no such descriptor
        run(engine, appended, one, two)
    assert isinstance(appended.error, DurabilityError)
    assert isinstance(two.error, UnavailableError)
    run(engine, message(LOG, "a2"))
    assert names(tmp_path, LOG) == ["a0", "a1", "a2"]
    assert (tmp_path / DOCUMENT).read_bytes() == b"1"


def test_a_mark_that_cannot_be_written_costs_nobody_anything(
    start: Start, files: Failing, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = start()
    run(engine, put(OWNER), message(LOG, "a0"))
    files.fail("write_at", "lock")
    jobs = run(engine, message(LOG, "a1"), put(DOCUMENT, b"1"), put(DOCUMENT, b"2"), message(LOG, "a2"))
    assert [job.error for job in jobs] == [None] * 4
    assert "does not say how far the journal is done" in caplog.text
    run(engine, message(LOG, "a3"))
    assert names(tmp_path, LOG) == ["a0", "a1", "a2", "a3"]
    assert (tmp_path / DOCUMENT).read_bytes() == b"2"


def test_a_document_whose_commit_failed_is_not_taken_for_there(start: Start, files: Failing) -> None:
    engine = start()
    run(engine, Job([Append(LOG, (line("a0"),))]))
    files.fail("write_at", ".jsonl")
    refused = run(engine, Job([Put(OWNER, b"{}", ABSENT)]), message(LOG, "a1"))
    assert [type(job.error) for job in refused] == [UnavailableError, UnavailableError]
    (late,) = run(engine, message(LOG, "a2"))
    assert isinstance(late.error, NotFoundError)


def test_a_document_that_a_dead_process_removed_is_not_taken_for_there(start: Start) -> None:
    engine, other = start(), start()
    run(other, put(OWNER))
    run(engine, message(LOG, "a0"))
    run(engine, message(LOG, "a1"))
    other.ledger.lock.take()
    other.ledger.prepare()
    other.ledger.commit([Step("delete", OWNER, before=2)], b"")
    other.let_go()  # it dies
    (late,) = run(engine, message(LOG, "a2"))
    assert isinstance(late.error, NotFoundError)


def test_a_log_of_the_same_inode_may_be_another_one(
    start: Start, files: Failing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stamp", "stamp_of", "measure"):  # as where each new file gets the inode that the last one left
        real = getattr(files, name)
        monkeypatch.setattr(files, name, lambda place, real=real: (real(place)[0], 1, *real(place)[2:]))
    engine, other = start(max_open_files=1), start()
    run(engine, Job([Append(LOG, (line("0", "long" * 100),), None, "", ("0",))]))
    run(engine, Job([Append(OTHER, (line("b0"),))]))  # which takes the only descriptor
    run(other, Job([Edit(LOG, "0", line("0", "long" * 100), line("0", "short"))]))
    run(other, Job([Append(LOG, (line("n"), line("m"), line("o"), line("p"), line("q")))]))
    (again,) = run(engine, Job([Append(LOG, (line("n"),), None, "", ("n",))]))
    assert again.outcomes == [0]
    assert names(tmp_path, LOG) == ["0", "n", "m", "o", "p", "q"]


def test_a_log_that_was_edited_in_its_place_is_learned_anew(start: Start, tmp_path: Path) -> None:
    engine = start()
    run(engine, Job([Append(LOG, (line("0"), line("1")), None, "", ("0", "1"))]))
    (tmp_path / LOG).write_bytes(line("0") + line("by hand") + line("1") + line("2"))
    twice, new = run(
        engine,
        Job([Append(LOG, (line("by hand"),), None, "", ("by hand",))]),
        Job([Append(LOG, (line("3"),), None, "", ("3",))]),
    )
    assert (twice.outcomes, new.outcomes) == ([0], [1])
    assert names(tmp_path, LOG) == ["0", "by hand", "1", "2", "3"]


@pytest.mark.parametrize("size", [10, 2 << 20])
def test_a_document_where_a_folder_is_harms_nobody_else(start: Start, tmp_path: Path, size: int) -> None:
    engine = start()
    run(engine, put("users/x/s.json"))
    wrong, right = run(engine, put("users/x", b"0" * size), put(DOCUMENT))
    assert isinstance(wrong.error, UnavailableError)
    assert right.error is None
    assert not (tmp_path / "system/quarantine").exists()


def test_lines_below_a_document_of_the_same_run_harm_only_themselves(start: Start, tmp_path: Path) -> None:
    engine = start()
    document, below = run(engine, put("users/p"), Job([Extend("users/p/q.jsonl", line("1"))]))
    assert document.error is None
    assert isinstance(below.error, UnavailableError)
    assert (tmp_path / "users/p").read_bytes() == b"{}"


def test_a_flush_that_fails_when_a_fold_begins_is_told_when_the_store_is_closed(start: Start, files: Failing) -> None:
    engine = start(durability="normal", journal_max_bytes=4096)
    (written,) = run(engine, put(OWNER))
    files.fail("sync", ".jsonl", times=100)
    (large,) = run(engine, put(DOCUMENT, b"0" * 8192))
    assert (written.error, large.error) == (None, None)
    engine.close()
    assert isinstance(engine.failure, DurabilityError)


def test_no_time_of_a_log_is_asked_for_while_messages_are_added(start: Start, files: Failing) -> None:
    """Each write after such a question changes the inode, for which the next flush has to wait."""
    engine = start()
    run(engine, put(OWNER), message(LOG, "a0"))
    run(engine, message(LOG, "a1"))
    asked: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "stamp", asked.append)
        patch.setattr(files, "stamp_of", asked.append)
        patch.setattr(files, "status", asked.append)
        for number in range(100):
            (job,) = run(engine, message(LOG, f"b{number}"))
            assert job.error is None
    assert asked == []


def test_times_are_asked_for_where_many_lines_share_a_flush(start: Start, files: Failing) -> None:
    engine = start()
    run(engine, put(OWNER), message(LOG, "a0"))
    run(engine, message(LOG, "a1"))
    asked: list[str] = []
    real = files.stamp

    def stamp(path: str) -> tuple[int, int, int, int]:
        asked.append(path)
        return real(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "stamp", stamp)
        jobs = run(engine, *(message(LOG, f"b{number}") for number in range(40)))
    assert all(job.error is None for job in jobs)
    assert asked == [engine.tree.path(LOG)]


def test_what_could_not_be_done_is_not_written_over(start: Start, files: Failing, tmp_path: Path) -> None:
    engine, other = start(), start()
    run(other, put(OWNER), message(LOG, "a0"), message(OTHER, "b0"))
    run(engine, message(LOG, "a1"))
    files.fail("write", OTHER)
    (undone,) = run(other, message(OTHER, "b1"))
    assert isinstance(undone.error, DurabilityError)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.ledger, "_finish", lambda segment: files.sync(-1))  # no such descriptor
        (refused,) = run(engine, message(LOG, "a2"))
    assert isinstance(refused.error, UnavailableError)
    (late,) = run(engine, message(LOG, "a3"))
    assert late.error is None
    assert (names(tmp_path, LOG), names(tmp_path, OTHER)) == (["a0", "a1", "a3"], ["b0", "b1"])


# --- the thread that writes ------------------------------------------------------------------------------


async def test_a_caller_who_is_long_alone_waits_for_no_turn_of_the_loop() -> None:
    seen: SimpleQueue[list[int]] = SimpleQueue()

    def do(jobs: Sequence[Job]) -> None:
        seen.put([int(key_of(change)) for job in jobs for change in job.changes])
        for job in jobs:
            job.outcomes = []

    writer = Writer(do, lambda: None, lambda: None)
    try:
        for number in range(20):
            future = writer.submit([Mend(str(number))])
            if number >= 8:
                assert seen.get(timeout=60) == [number], "the loop has not turned yet"
            await future
            if number < 8:
                assert seen.get_nowait() == [number]
        for _ in range(3):
            await asyncio.gather(*(writer.submit([Mend(str(number))]) for number in range(5)))
        batches = [seen.get_nowait() for _ in range(seen.qsize())]
        assert [number for batch in batches for number in batch] == [0, 1, 2, 3, 4] * 3
        assert batches[-1] == [0, 1, 2, 3, 4], "where several come in a turn, they go together"
    finally:
        await asyncio.to_thread(writer.close)


class Halves:
    """A writer of work that needs no lock, and the batches that it did."""

    def __init__(self, *, beside_loop: bool = True) -> None:
        self.batches: list[list[str]] = []
        self.writer = Writer(self._do, lambda: None, lambda: None, beside_loop=beside_loop)

    def _do(self, jobs: Sequence[Job]) -> None:
        self.batches.append([key_of(change) for job in jobs for change in job.changes])
        for job in jobs:
            job.outcomes = []

    async def turn(self, count: int, seconds: float = 0.0) -> list[int]:
        """Submit many jobs in one turn, after a batch that took so long; return the sizes of the batches."""
        for caller in self.writer._callers.values():
            caller.writing = seconds
        self.batches.clear()
        await asyncio.gather(*(self.writer.submit([Mend(str(number))]) for number in range(count)))
        done = [key for batch in self.batches for key in batch]
        assert done == [str(number) for number in range(count)], "each once, and in their order"
        return [len(batch) for batch in self.batches]


async def test_callers_who_all_wait_are_answered_by_halves() -> None:
    halves = Halves()
    try:
        assert await halves.turn(100) == [100], "the first: how long it takes is not known yet"
        assert await halves.turn(100) == [50, 50]
        assert await halves.turn(101) == [50, 51]
        assert await halves.turn(63) == [63], "too few to be worth a flush more"
        assert await halves.turn(100, seconds=60.0) == [100], "to write takes longer than to make"
        assert await halves.turn(3000) == [1024, 476, 1024, 476]
    finally:
        await asyncio.to_thread(halves.writer.close)


async def test_work_that_holds_the_lock_is_not_halved() -> None:
    halves = Halves(beside_loop=False)
    try:
        for _ in range(3):
            assert await halves.turn(100) == [100]
    finally:
        await asyncio.to_thread(halves.writer.close)


async def test_with_halves_each_call_is_done_once() -> None:
    halves, rounds = Halves(), 20
    try:

        async def call(number: int) -> None:
            for _ in range(rounds):
                await halves.writer.submit([Mend(str(number))])

        await halves.turn(100)
        await halves.turn(1)
        halves.batches.clear()
        next(iter(halves.writer._callers.values())).writing = 0.0
        await asyncio.gather(*(call(number) for number in range(100)))
        assert len(halves.batches[0]) == 50
        done = Counter(key for batch in halves.batches for key in batch)
        assert done == {str(number): rounds for number in range(100)}
    finally:
        await asyncio.to_thread(halves.writer.close)


async def test_a_closed_event_loop_is_forgotten() -> None:
    def do(jobs: Sequence[Job]) -> None:
        for job in jobs:
            job.outcomes = []

    async def once(writer: Writer) -> None:
        await writer.submit([])

    writer = Writer(do, lambda: None, lambda: None)
    try:
        for _ in range(5):
            await asyncio.to_thread(asyncio.run, once(writer))
        assert len(writer._callers) == 1
    finally:
        await asyncio.to_thread(writer.close)


# --- looking at files ------------------------------------------------------------------------------------


def test_a_file_is_measured_the_same_with_and_without_its_times(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    measure = Statx()
    for path in (str(tmp_path), f"{tmp_path}/file", f"{tmp_path}/link", "/dev/null", "/proc/self/status"):
        assert measure(path) == Files().stamp(path)[:3]
    with pytest.raises(FileNotFoundError, match="absent"):
        measure(f"{tmp_path}/absent")
    with pytest.raises(NotADirectoryError):
        measure(f"{tmp_path}/file/below")


def test_a_file_is_measured_where_the_system_has_no_such_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Statx) -> None:
        raise AttributeError("statx")

    monkeypatch.setattr(Statx, "__init__", missing)
    files = Files()
    assert {files.measure(str(tmp_path)) for _ in range(200)} == {files.stamp(str(tmp_path))[:3]}
