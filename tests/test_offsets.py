"""The sparse table of a large log: whatever happened to the file, pages, counts and ids are those of its lines."""

import logging
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatfile_chat_database import codec
from flatfile_chat_database.backends.flatfile import offsets
from flatfile_chat_database.backends.flatfile.files import Files
from flatfile_chat_database.backends.flatfile.logs import LogReader
from flatfile_chat_database.backends.flatfile.offsets import Offsets
from flatfile_chat_database.backends.rules import good_lines
from flatfile_chat_database.errors import IntegrityError
from flatfile_chat_database.models import Message

KEY = "users/ada/s/messages.jsonl"
BAD = [b"not json\n", b"{}\n", b'{"id":"x"}\n', b"\0\0\0\n", b"\xff\n", b'{"id":"","role":"u"}\n']
BLANK = [b"\n", b"  \n", b"\t\r\n"]


def line(message_id: str, content: str = "text") -> bytes:
    return codec.encode_message(Message("user", content, id=message_id, timestamp="2026-01-01T00:00:00+00:00"))


def by_hand(message_id: str) -> bytes:
    """Return a line that no program of ours would write, its id escaped."""
    escaped = "".join(f"\\u{ord(character):04x}" for character in message_id)
    return f' {{"role": "user", "content": "", "timestamp": "t", "id" : "{escaped}"}}\n'.encode()


class Counted(Files):
    """Files that know how many bytes were read from them."""

    @property
    def bytes_read(self) -> int:
        return self.counters["bytes_read"]


class Together:
    """What makes records of many lines at once, as `codec.MessageDecoder` does."""

    def __call__(self, line: bytes) -> bytes | None:
        return codec.record_line(line)

    def many(self, lines: list[bytes]) -> list[bytes] | None:
        bare = [line.removesuffix(b"\n") for line in lines]
        return None if None in map(codec.line_id, bare) else bare


class Reading:
    """What the backend does with tables, on one file."""

    def __init__(self, path: Path, table_bytes: int = 1 << 20) -> None:
        self.path = path
        self.files = Counted()
        self.offsets = Offsets(table_bytes)

    def open(self, path: Path | None = None, *, strict: bool = False) -> LogReader:
        return LogReader(self.files, str(path or self.path), KEY, block=64, strict=strict)

    def page(
        self,
        start: int,
        stop: int | None,
        *,
        strict: bool = False,
        decode: Callable[[bytes], bytes | None] = codec.record_line,
    ) -> list[bytes]:
        with self.open(strict=strict) as log:
            return self.offsets.page(log, start, stop, decode)

    def count(self) -> int:
        with self.open() as log:
            return self.offsets.count(log)

    def find(self, record_id: str) -> tuple[int, bytes] | None:
        with self.open() as log:
            return self.offsets.find(log, record_id)

    def agrees(self, *pages: tuple[int, int | None]) -> None:
        """Fail unless everything is as in a list of the file's good lines."""
        expected = good_lines(KEY, self.path.read_bytes(), newline=False)
        for start, stop in pages:
            assert self.page(start, stop) == expected[start:stop], (start, stop)
            assert self.page(start, stop, decode=Together()) == expected[start:stop], (start, stop)
        assert self.count() == len(expected)
        for record_id in {str(codec.line_id(line)) for line in (*expected[:3], *expected[-3:], *expected[::97])}:
            position, found = self.find(record_id) or (-1, b"")
            assert codec.line_id(found) == record_id
            assert [codec.line_id(line) for line in expected].index(record_id) == position
        assert self.find("nowhere") is None


@contextmanager
def tables_of_everything() -> Iterator[None]:
    """Keep tables of logs of any size, with entries so near that a few lines need several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offsets, "SMALL_BYTES", 0)
        patch.setattr(offsets, "STRIDE", 4)
        patch.setattr(offsets, "ZONE", 16)
        patch.setattr(offsets, "_MARKS", 4)
        patch.setattr(offsets, "_BLOCK_BYTES", 300)
        patch.setattr(offsets, "_TAIL_BYTES", 200)
        yield


@pytest.fixture
def tables() -> Iterator[None]:
    """Run a test in `tables_of_everything`."""
    with tables_of_everything():
        yield


PAGES: list[tuple[int, int | None]] = [
    (0, None), (0, 1), (3, 9), (4, 8), (15, 17), (40, 41), (95, 300), (300, 400), (7, 7), (9, 3), (-1, None), (-30, -4),
    (-500, -90), (5, -5), (-5, 98), (1, None), (10**30, None), (1, 10**30), (-(10**30), None),
]  # fmt: skip


def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "flatfile_chat_database")


# --- the same as the lines -----------------------------------------------------------------------------

pieces = st.lists(
    st.one_of(
        st.integers(0, 60).map(lambda n: line(f"{n:03}")),
        st.uuids().map(lambda n: line(str(n), "long " * 30)),
        st.integers(0, 60).map(lambda n: by_hand(f"{n:03}")),
        st.sampled_from(BAD + BLANK),
    ),
    max_size=80,
)


@pytest.mark.slow
@given(
    st.lists(st.tuples(pieces, st.sampled_from(["append", "append", "rewrite", "cut", "in place"])), max_size=4),
    st.lists(st.tuples(st.integers(-90, 200), st.none() | st.integers(-90, 200)), min_size=1, max_size=4),
    st.sampled_from([b"", b'{"half', b"\0\0"]),
)
@settings(max_examples=150)
def test_any_slice_of_any_log_is_that_of_a_list_whatever_was_done_to_it(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[list[bytes], str]],
    pages: list[tuple[int, int | None]],
    half: bytes,
) -> None:
    logging.disable(logging.WARNING)
    path = tmp_path_factory.mktemp("log") / "messages.jsonl"
    path.write_bytes(b"".join(line(f"{n:03}") for n in range(20)))
    reading = Reading(path)
    moment = 1_000_000_000
    try:
        with tables_of_everything():
            for lines, how in steps:
                change(path, lines, how, half)
                moment += 1_000_000_000
                os.utime(path, ns=(moment, moment))  # a tick of the clock between one edit by hand and the next
                reading.agrees(*pages)
                reading.agrees(*pages)
    finally:
        logging.disable(logging.NOTSET)


def change(path: Path, lines: list[bytes], how: str, half: bytes) -> None:
    whole = path.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    if how == "append":
        path.write_bytes(whole + b"".join(lines) + half)
    elif how == "rewrite":
        other = path.with_suffix(".new")
        other.write_bytes(b"".join(lines) + whole + half)
        other.rename(path)
    elif how == "cut":
        kept = whole.splitlines(keepends=True)
        path.write_bytes(b"".join(kept[: len(kept) // 2] + lines))
    else:
        path.write_bytes(b"".join(lines) + whole[: len(whole) // 2] + half)


@pytest.mark.usefixtures("tables")
def test_positions_count_neither_bad_lines_nor_blank_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quiet(caplog)
    path = tmp_path / "log"
    chance = random.Random(7)
    parts = [line(f"{n:03}", "x" * chance.randrange(90)) for n in range(100)]
    for _ in range(60):
        parts.insert(chance.randrange(len(parts)), chance.choice(BAD + BLANK))
    path.write_bytes(b"".join(parts) + b'{"half')
    Reading(path).agrees(*PAGES)


@pytest.mark.usefixtures("tables")
def test_a_line_longer_than_any_message_is_no_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(caplog)
    monkeypatch.setattr(codec, "MAX_LINE_BYTES", 400)
    path = tmp_path / "log"
    parts = [line(f"{n:03}") for n in range(100)]
    for place in (0, 16, 17, 50, 103):
        parts.insert(place, line("huge", "x" * 5000))
    path.write_bytes(b"".join(parts))
    Reading(path).agrees(*PAGES)


@pytest.mark.usefixtures("tables")
def test_a_log_that_grows_is_read_from_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(line(f"{n:04}") for n in range(2000)))
    reading = Reading(path)
    assert reading.count() == 2000
    before = reading.files.bytes_read
    with path.open("ab") as file:
        file.write(line("2000"))
    assert reading.count() == 2001
    assert reading.page(1999, None) == [line("1999")[:-1], line("2000")[:-1]]
    assert reading.find("2000") == (2000, line("2000")[:-1])
    assert reading.files.bytes_read - before < 10_000
    with path.open("ab") as file:
        file.write(b'{"half')
    reading.agrees((1998, None))
    with path.open("ab") as file:
        file.write(b'" is damage\n' + line("2001"))
    reading.agrees(*PAGES, (1998, None), (2001, 2002))


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: lines[:50],
        lambda lines: [],
        lambda lines: [*lines[:10], line("new"), *lines[10:]],
        lambda lines: [*lines[:99], line("new")],
        lambda lines: [*lines[:90], *(line(f"n{n:02}", "longer") for n in range(20))],
        lambda lines: [*lines[:10], b"x" * (len(lines[10]) - 1) + b"\n", *lines[11:]],
        lambda lines: [line("same")[:-1].ljust(len(lines[0]) - 1)[: len(lines[0]) - 1] + b"\n", *lines[1:]],
        lambda lines: list(reversed(lines)),
    ],
    ids=["cut", "cleared", "inserted", "last replaced", "end replaced", "damaged", "same size", "reversed"],
)
@pytest.mark.parametrize("renamed", [True, False], ids=["renamed", "in place"])
def test_a_log_that_was_edited_is_looked_at_anew(
    tmp_path: Path, edit: Callable[[list[bytes]], list[bytes]], *, renamed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    quiet(caplog)
    path = tmp_path / "log"
    lines = [line(f"{n:03}") for n in range(100)]
    path.write_bytes(b"".join(lines))
    os.utime(path, (1_000_000_000, 1_000_000_000))
    reading = Reading(path)
    reading.agrees(*PAGES)
    target = tmp_path / "new" if renamed else path
    target.write_bytes(b"".join(edit(lines)))
    target.replace(path)
    reading.agrees(*PAGES)


@pytest.mark.usefixtures("tables")
def test_what_was_taken_back_and_written_anew_within_a_tick_of_the_clock_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = [line(f"{n:03}") for n in range(100)]
    path.write_bytes(b"".join(lines))
    reading = Reading(path)
    moment = path.stat().st_mtime_ns
    reading.agrees(*PAGES)
    path.write_bytes(b"".join([*lines[:99], line("new")]))
    os.utime(path, ns=(moment, moment))
    reading.agrees(*PAGES)


@pytest.mark.usefixtures("tables")
def test_an_edit_that_shows_in_no_way_but_its_damage_is_met_and_the_page_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quiet(caplog)
    path = tmp_path / "log"
    lines = [line(f"{n:03}") for n in range(100)]
    path.write_bytes(b"".join(lines))
    os.utime(path, (1_000_000_000, 1_000_000_000))
    reading = Reading(path)
    reading.agrees(*PAGES)
    lines[41] = b"x" * (len(lines[41]) - 1) + b"\n"
    path.write_bytes(b"".join(lines))
    os.utime(path, (1_000_000_000, 1_000_000_000))
    assert reading.page(40, 44) == [lines[number][:-1] for number in (40, 42, 43, 44)]
    reading.agrees(*PAGES)


@pytest.mark.usefixtures("tables")
def test_strict_reading_tells_of_the_first_damage_before_the_end_of_the_page(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quiet(caplog)
    path = tmp_path / "log"
    lines = [line(f"{n:03}") for n in range(100)]
    path.write_bytes(b"".join([*lines[:30], b"\n", *lines[30:50], b"not json\n", *lines[50:]]))
    reading = Reading(path)
    for _ in range(2):
        assert reading.page(20, 50, strict=True) == [line[:-1] for line in lines[20:50]]
        for page in ((50, 51), (20, 51), (80, 90), (1, None)):
            with pytest.raises(IntegrityError, match=f"byte {sum(map(len, lines[:50])) + 1} "):
                reading.page(*page, strict=True)
        assert reading.page(-50, None, strict=True) == [line[:-1] for line in lines[50:]]
        assert reading.page(80, 90) == [line[:-1] for line in lines[80:90]]


@pytest.mark.usefixtures("tables")
def test_damage_is_reported_with_its_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log"
    lines = [line(f"{n:03}") for n in range(100)]
    path.write_bytes(b"".join([*lines[:50], b"\n", b"not json\n", *lines[50:]]))
    reading = Reading(path)
    place = f"{KEY}: the line at byte {sum(map(len, lines[:50])) + 1} is no message; it is passed over"
    for page in ((40, 60), (49, 51), (-60, None), (-51, -40), (0, None), (0, 51)):
        caplog.clear()
        reading.page(*page)
        assert place in caplog.messages, page
    for page in ((60, 70), (1, 40), (-40, None), (0, 50)):
        caplog.clear()
        reading.page(*page)
        assert caplog.messages == [], page


# --- finding -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tables")
def test_of_two_records_with_one_id_the_first_is_found(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(
        b"".join(line(f"{n:03}") for n in range(50)) + line("007", "twin") + by_hand("200") + line("200", "twin")
    )
    reading = Reading(path)
    for _ in range(2):
        assert reading.find("007") == (7, line("007")[:-1])
        assert reading.find("200") == (51, by_hand("200")[:-1])


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("name", ['quo"te', "back\\slash", "张三", "é", "x" * 512, "x" * 39 + "🙂b", "id"])
def test_an_id_is_found_however_it_is_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(line(f"{name}{n:03}"[-512:], f'"id":"{name}"') for n in range(40)))
    reading = Reading(path)
    reading.agrees((3, 9))
    with path.open("ab") as file:
        file.write(line(name) if len(name) > 3 else by_hand(name))
    position, found = reading.find(name) or (-1, b"")
    assert codec.line_id(found) == name
    assert position == (40 if len(name) < 512 else position)


def test_a_recent_or_absent_id_is_found_without_reading_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(line(f"{n:06}") for n in range(20_000)))
    reading = Reading(path)
    assert reading.count() == 20_000
    before = reading.files.bytes_read
    assert reading.find("019990") == (19_990, line("019990")[:-1])
    assert reading.find("000001") == (1, line("000001")[:-1])
    assert reading.find("1") is None
    assert reading.files.bytes_read - before < 400_000


# --- cost ----------------------------------------------------------------------------------------------


def test_a_page_in_the_middle_reads_little_more_than_itself(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(line(f"{n:06}") for n in range(20_000)))
    expected = good_lines(KEY, path.read_bytes(), newline=False)
    for decode in (codec.record_line, Together()):
        reading = Reading(path)
        assert reading.page(-100, None, decode=decode) == expected[-100:]
        assert reading.files.bytes_read < 50_000
        assert reading.offsets.size() == 0, "the newest page needs no table"
        assert reading.page(15_000, 15_100, decode=decode) == expected[15_000:15_100]
        before = reading.files.bytes_read
        assert reading.page(9_003, 9_103, decode=decode) == expected[9_003:9_103]
        assert reading.files.bytes_read - before < 20_000


@pytest.mark.parametrize("size", [0, 300, 3000, 30_000])
@pytest.mark.parametrize("half", [b"", b'{"half', b"x" * 100_000])
def test_the_newest_page_of_long_lines_is_whole_and_reads_little_more_than_itself(
    tmp_path: Path, size: int, half: bytes
) -> None:
    path = tmp_path / "log"
    chance = random.Random(size)
    lines = [line(f"{n:06}", "x" * chance.randrange(size, 2 * size + 1)) for n in range(600)]
    path.write_bytes(b"".join(lines) + half)
    for count in (1, 2, 10, 100):
        reading = Reading(path)
        page = [record.removesuffix(b"\n") for record in lines[-count:]]
        assert reading.page(-count, None, decode=Together()) == page
        assert reading.files.bytes_read < 50_000 + 5 * len(half) + 5 * sum(map(len, page))


def test_a_small_log_has_no_table(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(line(f"{n:03}") for n in range(300)))
    reading = Reading(path)
    reading.agrees(*PAGES)
    assert reading.offsets.size() == 0


@pytest.mark.usefixtures("tables")
def test_the_memory_of_all_tables_is_bounded_and_that_used_last_stays(tmp_path: Path) -> None:
    reading = Reading(tmp_path / "0", table_bytes=50_000)
    for number in range(40):
        path = tmp_path / str(number)
        path.write_bytes(b"".join(line(f"{n:03}") for n in range(200)))
        with reading.open(path) as log:
            assert reading.offsets.count(log) == 200
        assert reading.offsets.size() <= 50_000
    assert reading.offsets.size() > 0
    before = reading.files.bytes_read
    with reading.open(path) as log:
        assert reading.offsets.count(log) == 200
    assert reading.files.bytes_read - before < 1_000
    reading.agrees(*PAGES)


@pytest.mark.usefixtures("tables")
def test_readers_at_once_see_one_log_while_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(line(f"{n:04}") for n in range(200)))
    reading = Reading(path)
    ended = threading.Event()

    def read(seed: int) -> None:
        chance = random.Random(seed)
        while not ended.is_set():
            known = reading.count()
            start = chance.randrange(known)
            assert [codec.line_id(record) for record in reading.page(start, start + 30)][: known - start] == [
                f"{n:04}" for n in range(start, min(known, start + 30))
            ]
            assert (reading.find(f"{start:04}") or (-1,))[0] == start

    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(read, seed) for seed in range(4)]
        with path.open("ab", buffering=0) as file:
            for n in range(200, 1500):
                whole = line(f"{n:04}")
                file.write(whole[:20])
                file.write(whole[20:])
        ended.set()
        for each in waiting:
            each.result()
    reading.agrees(*PAGES)
