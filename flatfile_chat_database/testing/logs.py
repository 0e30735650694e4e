"""Cases of the contract: reading and appending to logs."""

from __future__ import annotations

import asyncio
import logging
import tracemalloc

import pytest

from .. import codec
from ..backends.base import Capability, StorageBackend
from ..backends.changes import Append, Change, Edit, Put, Truncate
from ..backends.memory import MemoryBackend
from ..backends.mirrored import MirroredBackend
from ..errors import IntegrityError, ValidationError
from .case import LOG, BackendCase, all_of, bare, ids, leaves_damage, line, lines
from .sentences import says

TAIL = "users/ann/chat/tail.jsonl"

DAMAGE = (
    b"not json",
    b"{}",
    b"[]",
    b"null",
    b'"text"',
    b'{"id":"x"}',
    b'{"id":"","role":"user","content":"","timestamp":""}',
    b'{"id":"x","role":"","content":"","timestamp":""}',
    b'{"id":7,"role":"user","content":"","timestamp":""}',
    line("cut off")[:-9],
    line("glued")[:-1] + line("together")[:-1],
    b"\x00" * 100,
    b"\xff\xfe\xfa",
    b"\x80" * 10 + line("bytes before")[:-1],
    b"[" * 100_000,
)
"""Lines that are no message."""

BLANK = (b"", b" ", b"\t", b"   \r")


async def whole(store: StorageBackend, key: str, *, strict: bool = False) -> list[bytes]:
    """Read a log in the two ways, which must agree."""
    records = await store.read_log(key, strict=strict)
    runs = await all_of(store.stream_log(key, strict=strict))
    assert [record for run in runs for record in run] == records
    return records


class LogCases(BackendCase):
    """Reading and appending to logs."""

    # --- append --------------------------------------------------------------------------------------

    @says("StorageBackend.append", "Append whole lines to the log at `key`, or create it.", "Return True.")
    async def test_appending_adds_at_the_end(self) -> None:
        store = await self.open()
        assert await store.append(LOG, line("m0")) is True
        assert await store.append(LOG, line("m1") + line("m2")) is True
        assert self.contents() == {LOG: line("m0") + line("m1") + line("m2")}
        await store.append("raw", b"any\x00bytes\xff\n\n")
        await store.append("raw", b"\n")
        assert self.peek("raw") == b"any\x00bytes\xff\n\n\n"

    @says("StorageBackend.append", "`data` must end in a newline, otherwise ValidationError.")
    async def test_half_a_line_is_not_appended(self) -> None:
        store = await self.open()
        await store.append(LOG, line("m0"))
        for data in (b"", b"x", b"x\ny", line("m1")[:-1], b"\n\r"):
            with pytest.raises(ValidationError):
                await store.append(LOG, data)
            with pytest.raises(ValidationError):
                await store.append(TAIL, data)
        assert self.contents() == {LOG: line("m0")}

    @says("StorageBackend.append", "Appends of several callers never mix.")
    async def test_appends_of_several_callers_never_mix(self) -> None:
        store = await self.open()
        several = Capability.PROCESSES in self.capabilities  # one handle a process is all that the others promise
        handles = [store, await self.open() if several else store]
        batches = {
            f"{caller}-{turn}": b"".join(
                line(f"{caller}-{turn}-{part}", str(caller) * (100 + 5_000 * (caller % 3))) for part in range(3)
            )
            for caller in range(12)
            for turn in range(4)
        }

        async def call(caller: int) -> None:
            for turn in range(4):
                await handles[caller % 2].append(LOG, batches[f"{caller}-{turn}"])

        await asyncio.gather(*(call(caller) for caller in range(12)))
        rest = self.peek(LOG) or b""
        order = []
        while rest:
            name = next(name for name, batch in batches.items() if rest.startswith(batch))
            order.append(name)
            rest = rest[len(batches[name]) :]
        assert sorted(order) == sorted(batches)
        for caller in range(12):
            assert [name for name in order if name.startswith(f"{caller}-")] == [f"{caller}-{n}" for n in range(4)]

    @says(
        "StorageBackend.append",
        "If the log ends in half a line, that half is set aside first, so the new lines stand alone.",
    )
    @pytest.mark.parametrize("half", [line("m2")[:-2], line("m2")[:20], b"\x00" * 50, b"{", b"x" * 300_000])
    @pytest.mark.parametrize("before", [b"", b"".join(lines(2))], ids=["first", "later"])
    async def test_half_a_line_never_touches_what_is_appended(self, half: bytes, before: bytes) -> None:
        self.poke(LOG, before + half)
        self.poke(TAIL, before + half)
        store = await self.open()
        await store.append(LOG, line("m3"))
        await store.commit([Append(TAIL, (line("m3"),))])
        assert self.peek(LOG) == self.peek(TAIL) == before + line("m3")
        set_aside = [data for key, data in self.contents().items() if key not in (LOG, TAIL)]
        assert sum(data == half for data in set_aside) == 2

    @says(
        "StorageBackend.append",
        "A whole message that lacks only its newline, as an editor may leave it, gets one instead.",
    )
    async def test_a_message_without_a_newline_is_completed(self) -> None:
        by_hand = b'{"id": "m1", "role": "user", "content": "", "timestamp": "2026-01-31T12:00:00Z"}'
        keys = [LOG, TAIL, "edit", "truncate"]
        for key in keys:
            self.poke(key, lines(1)[0] + by_hand)
        store = await self.open()
        await store.append(LOG, line("m2"))
        changes: list[Change] = [Append(TAIL, (line("m1"), line("m2"))), Edit("edit", "m1", by_hand, line("m1", "new"))]
        assert await store.commit([*changes, Truncate("truncate", 1)]) == [1, None, [by_hand]]
        assert self.peek(LOG) == self.peek(TAIL) == lines(1)[0] + by_hand + b"\n" + line("m2")
        assert self.peek("edit") == lines(1)[0] + line("m1", "new")
        assert await store.read_log("truncate") == bare(lines(1))
        assert sorted(self.peek_keys()) == sorted(keys)

    # --- read_log ------------------------------------------------------------------------------------

    @says(
        "StorageBackend.read_log",
        "Return the records of a log from position `start` up to, not including, `stop`, oldest first.",
        "Positions count good records from 0; negative ones count from the end, as in a slice of a list.",
        "Records are lines without their newline.",
    )
    @leaves_damage
    @pytest.mark.parametrize("damaged", [False, True], ids=["whole", "damaged"])
    async def test_positions_are_those_of_a_slice(self, damaged: bool) -> None:
        written = list(lines(5))
        data = b"".join(written)
        if damaged:
            data = b"\n".join([b"bad", written[0] + b" \n" + written[1] + b"{}", written[2] + written[3], b"\n[]"])
            data = b"\n" + data + b"\n" + written[4] + b"\x00\n" + b'{"id":"m5","role"'
        self.poke(LOG, data)
        store = await self.open(jsonl_read_buffer_size=64)
        edges = [*range(-7, 8), 2**40, -(2**40)]
        for start in edges:
            for stop in [None, *edges]:
                assert await store.read_log(LOG, start, stop) == bare(written)[start:stop], (start, stop)

    @says("StorageBackend.read_log", "An absent log has no records.")
    @says("StorageBackend.count_log", "Return the number of records of a log; 0 if it is absent.")
    async def test_a_log_that_is_absent_or_empty_has_no_records(self) -> None:
        self.poke(LOG, b"")
        store = await self.open()
        for key in (LOG, TAIL):
            assert await whole(store, key) == await whole(store, key, strict=True) == []
            assert await store.read_log(key, -3) == await store.read_log(key, 3, 7) == []
            assert await store.count_log(key) == 0
            assert await store.find_record(key, "m0") is None
            assert await store.newest_records([key]) == [None]

    @leaves_damage
    @says("StorageBackend.read_log", "Half a line at the end is no record yet.")
    @pytest.mark.parametrize("half", [line("m2")[:-1], line("m2")[:20], b" ", b"\x00" * 50])
    async def test_half_a_line_at_the_end_is_no_record_and_no_damage(
        self, half: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.poke(LOG, b"".join(lines(2)) + half)
        store = await self.open()
        assert await whole(store, LOG, strict=True) == bare(lines(2))
        assert await store.count_log(LOG) == 2
        assert await store.find_record(LOG, "m2") is None
        assert await store.newest_records([LOG]) == bare([line("m1", "message 1")])
        assert await store.read_log(LOG, -1) == bare([line("m1", "message 1")])
        assert caplog.records == []
        assert self.peek(LOG) == b"".join(lines(2)) + half, "a reader repairs nothing"

    @leaves_damage
    @says(
        "StorageBackend.read_log",
        "A line that is no message is passed over and reported by a warning with its place; with `strict` it raises "
        "IntegrityError.",
    )
    @pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "between", "last"])
    @pytest.mark.parametrize("bad", DAMAGE, ids=[ascii(bad[:20]) for bad in DAMAGE])
    async def test_a_bad_line_is_reported_and_hides_nothing(
        self, bad: bytes, place: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        good = lines(2)
        data = b"".join([*good[:place], bad + b"\n", *good[place:]])
        self.poke(LOG, data)
        store = await self.open()
        assert await store.read_log(LOG) == bare(good)
        warning = next(record for record in caplog.records if record.levelno == logging.WARNING)
        assert LOG in warning.getMessage()
        assert str(data.index(bad + b"\n")) in warning.getMessage()
        assert await whole(store, LOG) == bare(good)
        assert await store.count_log(LOG) == 2
        assert await store.find_record(LOG, "m1") == (1, bare(good)[1])
        assert await store.newest_records([LOG]) == [bare(good)[1]]
        with pytest.raises(IntegrityError) as error:
            await store.read_log(LOG, strict=True)
        assert error.value.key == LOG
        with pytest.raises(IntegrityError):
            await all_of(store.stream_log(LOG, strict=True))
        assert self.peek(LOG) == data, "a reader repairs nothing"

    @leaves_damage
    @says(
        "StorageBackend.read_log",
        "Positions count good records from 0; negative ones count from the end, as in a slice of a list.",
    )
    async def test_blank_lines_are_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        good = lines(3)
        blank = b"".join(b + b"\n" for b in BLANK)
        self.poke(LOG, blank + blank.join(good) + blank)
        store = await self.open()
        assert await whole(store, LOG, strict=True) == bare(good)
        assert await store.read_log(LOG, -1, strict=True) == bare(good[-1:])
        assert await store.count_log(LOG) == 3
        assert caplog.records == []

    @leaves_damage
    @says("StorageBackend.read_log", "Records are lines without their newline.")
    async def test_only_a_newline_ends_a_line(self) -> None:
        odd = [line("m0", "\u2028\u2029\x85\x0b\x0c\x1c\r\0"), line("m1", "𐍈 \u2028")]
        by_hand = b' { "role" : "user", "content":"x", "timestamp":"2026-01-31T12:00:00Z", "id" : "m2" }\r\n'
        self.poke(LOG, b"".join([*odd, by_hand]))
        store = await self.open()
        assert await whole(store, LOG, strict=True) == bare([*odd, by_hand])
        assert await store.find_record(LOG, "m2") == (2, by_hand[:-1])

    @says(
        "StorageBackend.read_log",
        "Return the records of a log from position `start` up to, not including, `stop`, oldest first.",
    )
    @pytest.mark.parametrize("block", [1, 7, 100, 8192, 1 << 20])
    async def test_lines_longer_and_shorter_than_a_block_come_whole(self, block: int) -> None:
        sizes = [0, 1, block - 100, block - 99, block, 3 * block, 0, 20_000, 5]
        written = [line(f"m{n}", "é" * max(0, min(size, 300_000))) for n, size in enumerate(sizes)]
        if block == 1:
            written = [line(f"m{n}", "é" * n) for n in range(5)]
        self.poke(LOG, b"".join(written))
        store = await self.open(jsonl_read_buffer_size=block)
        assert await whole(store, LOG) == bare(written)
        for position in range(len(written)):
            assert await store.read_log(LOG, position, position + 1) == bare(written[position : position + 1])
            assert await store.read_log(LOG, position - len(written)) == bare(written[position:])

    # --- the other readers ---------------------------------------------------------------------------

    @leaves_damage
    @says("StorageBackend.read_log_as", "Return what `decode` makes of the records that `read_log` returns.")
    @says("StorageBackend.stream_log_as", "Yield what `decode` makes of the runs that `stream_log` yields.")
    @says("StorageBackend.read_log_as", "`decode` makes None of a line that is no message.")
    @says("StorageBackend.read_log_as", "It may be called in any thread, and for further lines.")
    async def test_records_are_decoded_as_they_are_read(self, caplog: pytest.LogCaptureFixture) -> None:
        good = lines(700)
        self.poke(LOG, b"".join([*good[:300], b"not json\n", b"\n", *good[300:], b'{"half']))
        store = await self.open()

        def decode(record: bytes) -> tuple[str, int] | None:
            found = codec.line_id(record)
            return None if found is None else (found, len(record))

        expected = [decode(record) for record in bare(good)]
        for start, stop in ((0, None), (0, 2), (299, 301), (-3, None), (-450, -390), (5, -5), (900, None)):
            assert await store.read_log_as(LOG, decode, start, stop) == expected[start:stop]
        place = f"{LOG}: the line at byte {sum(map(len, good[:300]))} is no message"
        assert place in caplog.text
        assert [record async for run in store.stream_log_as(LOG, decode) for record in run] == expected
        with pytest.raises(IntegrityError, match=r"the line at byte \d+ is no message"):
            await store.read_log_as(LOG, decode, strict=True)
        with pytest.raises(IntegrityError, match=r"the line at byte \d+ is no message"):
            [record async for run in store.stream_log_as(LOG, decode, strict=True) for record in run]
        assert await store.read_log_as("no/log", decode) == []

        def refuse(record: bytes) -> bytes:
            raise IntegrityError("as decode raises it")

        with pytest.raises(IntegrityError, match="as decode raises it"):
            await store.read_log_as(LOG, refuse, 1, 2)
        with pytest.raises(IntegrityError, match="as decode raises it"):
            [record async for run in store.stream_log_as(LOG, refuse) for record in run]

    @leaves_damage
    @says(
        "StorageBackend.read_log_as",
        "Where it has a method `many`, that may be called with a list of lines instead, none of them longer than "
        "`codec.MAX_LINE_BYTES`: it returns what `decode` makes of each, or None to get them one by one.",
    )
    @says("StorageBackend.read_log_as", "These lines may have their newlines.")
    async def test_a_decoder_of_many_lines_makes_the_same_records(self, caplog: pytest.LogCaptureFixture) -> None:
        good = lines(700)
        self.poke(LOG, b"".join([*good[:300], b"not json\n", b"\n", *good[300:], b"{half"]))
        store = await self.open()

        class Decoder:
            def __call__(self, record: bytes) -> str | None:
                return codec.line_id(record)

            def many(self, records: list[bytes]) -> list[str] | None:
                assert all(len(record) <= codec.MAX_LINE_BYTES for record in records)
                assert not any(b"\n" in record.removesuffix(b"\n") for record in records)
                found = [name for record in records if (name := codec.line_id(record)) is not None]
                return found if len(found) == len(records) else None

        expected = [codec.line_id(record) for record in bare(good)]
        for start, stop in ((0, None), (0, 2), (290, 310), (-3, None), (-450, -390), (5, -5), (900, None)):
            assert await store.read_log_as(LOG, Decoder(), start, stop) == expected[start:stop]
        place = f"{LOG}: the line at byte {sum(map(len, good[:300]))} is no message"
        assert place in caplog.text
        assert [record async for run in store.stream_log_as(LOG, Decoder()) for record in run] == expected
        with pytest.raises(IntegrityError, match=r"the line at byte \d+ is no message"):
            await store.read_log_as(LOG, Decoder(), strict=True)
        with pytest.raises(IntegrityError, match=r"the line at byte \d+ is no message"):
            [record async for run in store.stream_log_as(LOG, Decoder(), strict=True) for record in run]

    @says(
        "StorageBackend.stream_log_as", "A run is made while it is iterated over; it is to be used up before the next."
    )
    async def test_a_run_of_decoded_records_is_made_while_it_is_iterated_over(self) -> None:
        self.poke(LOG, b"".join(lines(50)))
        store = await self.open()
        made: list[bytes] = []

        def decode(record: bytes) -> bytes:
            made.append(record)
            return record

        async for run in store.stream_log_as(LOG, decode):
            for count, record in enumerate(run, start=len(made) + 1):
                assert made[count - 1 :] == [record]
        assert made == bare(lines(50))

    @says("StorageBackend.stream_log", "Memory does not grow with the log where the backend overrides this.")
    async def test_a_stream_takes_no_more_memory_for_a_longer_log(self) -> None:
        piece = b"".join(line(f"m{n}", "x" * 1000) for n in range(1000))
        self.poke(LOG, piece * 24)
        store = await self.open()
        reader = store.first if isinstance(store, MirroredBackend) else store.uncached
        overrides = type(reader).stream_log not in (StorageBackend.stream_log, MemoryBackend.stream_log)
        count = 0
        tracemalloc.start()
        try:
            async for run in store.stream_log(LOG):
                count += len(run)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert count == 24_000
        if overrides:
            assert peak < len(piece) * 24 / 3

    @says(
        "StorageBackend.stream_log",
        "Yield the records of a log in runs, oldest first; damage is treated as by `read_log`.",
        "Records appended meanwhile may or may not come.",
    )
    async def test_a_stream_beside_appends_yields_a_prefix(self) -> None:
        store = await self.open()
        written = list(lines(50))
        await store.append(LOG, b"".join(written))
        seen: list[bytes] = []
        async for run in store.stream_log(LOG):
            assert run
            seen += run
            if len(written) < 60:
                written.append(line(f"later {len(written)}"))
                await store.append(LOG, written[-1])
        assert len(seen) >= 50
        assert seen == bare(written)[: len(seen)]

    @says(
        "StorageBackend.stream_log",
        "Yield the records of a log in runs, oldest first; damage is treated as by `read_log`.",
    )
    async def test_a_stream_may_be_left_early(self) -> None:
        store = await self.open(jsonl_read_buffer_size=64)
        await store.append(LOG, b"".join(lines(100)))
        stream = store.stream_log(LOG)
        assert await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        assert await store.count_log(LOG) == 100

    @says("StorageBackend.find_record", "Return the position and the line of the record `record_id`, or None.")
    async def test_a_record_is_found_by_its_id(self) -> None:
        store = await self.open()
        odd = [line("Ünï"), line('quo"te\\'), line("m1 "), line("张三")]
        written = [*lines(20), *odd]
        await store.append(LOG, b"".join(written))
        for position, name in enumerate(ids(bare(written))):
            assert name is not None
            assert await store.find_record(LOG, name) == (position, bare(written)[position])
        for absent in ("m", "m20", "M1", "", "message 1", "Unï"):
            assert await store.find_record(LOG, absent) is None

    @says(
        "StorageBackend.newest_records",
        "Return the newest record of each log, in the order of `keys`; None for one without records.",
    )
    async def test_newest_records_come_in_the_order_asked_for(self) -> None:
        self.poke("a/1", b"".join(lines(3)))
        self.poke("a/2", b"")
        self.poke("a/3", line("long", "x" * 100_000) + b"\n \n")
        self.poke("a/4", b"\n\n")
        store = await self.open()
        newest = bare([lines(3)[2], line("long", "x" * 100_000)])
        expected = [newest[1], newest[0], None, None, None, newest[0]]
        assert await store.newest_records(["a/3", "a/1", "a/2", "a/4", "a/5", "a/1"]) == expected
        assert await store.newest_records([]) == []

    @says(
        "StorageBackend.read_folders",
        "Return for each child that `list_folders` returns: the child, its document and the newest record of its log.",
        "They are what `read_many` and `newest_records` return for the keys `document` and `log` in that child.",
    )
    async def test_folders_come_with_their_document_and_their_newest_record(self) -> None:
        store = await self.open()
        await store.commit([Put("a/1/d.json", b"1"), Append("a/1/l.jsonl", (line("m0"), line("m1")))])
        await store.commit([Put("a/2/d.json", b"2")])
        await store.commit([Append("a/3/l.jsonl", (line("m3"),)), Put("a/stray", b"no folder")])
        for folder, start in (("a", "a/"), ("", "")):
            children = await store.list_folders(folder)
            documents = await store.read_many([f"{start}{child}/d.json" for child in children])
            records = await store.newest_records([f"{start}{child}/l.jsonl" for child in children])
            found = await store.read_folders(folder, "d.json", "l.jsonl")
            assert found == list(zip(children, documents, records, strict=True))
        assert [child for child, _, _ in await store.read_folders("a", "d.json", "l.jsonl")] == ["1", "2", "3"]
        assert await store.read_folders("absent", "d.json", "l.jsonl") == []

    @leaves_damage
    @says(
        "Edit",
        "Replace the record `record_id` of a log in its place, or drop it when `line` is None.",
    )
    @says("Truncate", "Drop the newest `count` records of a log, or all when None.")
    async def test_half_a_line_is_not_lost_when_the_rest_is_rewritten(self) -> None:
        half = b'{"id":"m3","role":"us'
        for key in (LOG, TAIL):
            self.poke(key, b"".join(lines(3)) + half)
        store = await self.open()
        await store.commit([Edit(LOG, "m0", lines(1)[0], line("m0", "changed"))])
        await store.commit([Truncate(TAIL, 1)])
        assert await store.read_log(LOG) == bare([line("m0", "changed"), *lines(2, 1)])
        assert await store.read_log(TAIL) == bare(lines(2))
        assert sum((data or b"").endswith(half) for data in self.contents().values()) == 2
