"""Cases of the contract: what a derived index needs."""

from __future__ import annotations

from pathlib import Path

from .. import codec
from ..backends.base import Capability, LogPart, StorageBackend
from ..backends.changes import Append, Delete, Edit, Move, Put, Truncate
from .case import LOG, BackendCase, bare, leaves_damage, line, lines, needs
from .sentences import says

OTHER = "users/ann/other/messages.jsonl"


async def parts(store: StorageBackend, identity: str | None = None, start: int = 0) -> list[LogPart]:
    """Read a log part by part to its end."""
    found = []
    while (part := await store.read_log_part(LOG, identity, start)) is not None:
        found.append(part)
        if not part.more:
            break
        assert part.end > start, "the parts do not get on"
        identity, start = part.identity, part.end
    return found


class ExtentCases(BackendCase):
    """Stamps, parts of logs, and what changed since a moment."""

    # --- changes -------------------------------------------------------------------------------------

    @needs(Capability.EXTENTS)
    @says(
        "Capability.EXTENTS",
        "Logs can be read by offsets, and what changed since a moment can be told: what a derived index needs.",
    )
    @says(
        "StorageBackend.changes",
        "Return which keys may have changed since `cursor`, by whichever process, and the cursor of now.",
    )
    async def test_what_changed_since_a_cursor_is_told(self) -> None:
        store = await self.open()
        other = await self.open()
        await store.commit([Put("a/1", b"1"), Append(LOG, lines(2))])
        cursor = (await store.changes(None)).cursor
        await store.commit([Put("a/2", b"2"), Append(LOG, lines(1, 2))])
        await other.commit([Append(OTHER, lines(1)), Delete("a/1")])
        await other.commit([Move("a", "b")])
        changes = await store.changes(cursor)
        assert changes.keys is None or {"a/1", "a/2", LOG, OTHER, "a", "b"} <= changes.keys
        later = await store.changes(changes.cursor)
        assert later.keys is None or later.keys == frozenset()

    @says(
        "StorageBackend.changes",
        "Only changes that were made through a backend count, not edits by hand.",
        "A cursor that is None, or too old, or of another store, gives no keys but None.",
    )
    async def test_without_a_cursor_all_may_have_changed(self) -> None:
        self.poke("a/1", b"by hand")
        store = await self.open()
        assert (await store.changes(None)).keys is None
        assert (await store.changes("of another store")).keys is None
        assert (await store.changes("")).keys is None

    @says(
        "StorageBackend.words",
        "Return what keeps words of records, for a search of the backend's own; None if nothing does.",
    )
    async def test_words_are_kept_of_records_that_are_there(self) -> None:
        store = await self.open()
        await store.commit([Append(LOG, lines(3))])
        words = store.words()
        if words is not None:
            [behind] = (await words.behind("1", "users/ann", None)).behind
            assert (behind.key, behind.kept, behind.can_be_kept) == (LOG, 0, True)

    @says(
        "StorageBackend.index_folder",
        "Return the folder for derived indexes of this store, there or not; None if it has no place for them.",
    )
    async def test_what_is_in_the_folder_of_indexes_is_no_key(self) -> None:
        store = await self.open()
        await store.write("a/1", b"1")
        folder = store.index_folder()
        if folder is not None:
            assert Path(folder).is_absolute()
            Path(folder).mkdir(parents=True, exist_ok=True)
            Path(folder, "index").write_bytes(b"derived")
            assert Path((await self.open()).index_folder() or "") == Path(folder)
            assert await store.list_keys("") == ["a/1"]
            assert [problem for problem in await store.verify() if not problem.harmless] == []

    # --- stamps --------------------------------------------------------------------------------------

    @says(
        "StorageBackend.stamps",
        "Return for each key, in the order of `keys`, a text that is another one when its bytes are changed.",
        "None stands for a key that is absent.",
    )
    async def test_a_stamp_is_another_one_when_bytes_change(self) -> None:
        store = await self.open()
        assert await store.stamps([]) == []
        await store.commit([Put("a/1", b"one"), Append(LOG, lines(2))])
        keys = ["a/2", "a/1", LOG, "a", "a/1/x"]
        seen: list[set[str | None]] = [set(), set()]
        for number in range(20):
            await store.commit([Put("a/1", b"%03d" % number), Append(LOG, lines(1, 2 + number))])
            absent, document, log, _, below = await store.stamps(keys)
            assert absent is None and below is None
            assert document is not None and log is not None
            for before, stamp in zip(seen, (document, log), strict=True):
                assert stamp not in before
                before.add(stamp)

    # --- read_log_part -------------------------------------------------------------------------------

    @says(
        "StorageBackend.read_log_part",
        "Return the whole lines of a log from offset `start`, which is 0 or of a line, or None if it is absent.",
        "A part is bounded in size; `more` tells whether to go on from its `end`.",
    )
    async def test_a_log_is_read_part_by_part(self) -> None:
        store = await self.open()
        assert await store.read_log_part(LOG, None, 0) is None
        written = [*lines(3), line("long", "x" * 900_000), line("longer", "y" * 1_500_000), *lines(3, 3)]
        self.poke(LOG, b"".join(written))
        found = await parts(store)
        assert [each for part in found for _, each in part.lines] == bare(written)
        offset = 0
        for part in found:
            assert part.start == offset == part.lines[0][0]
            offsets = [*(place for place, _ in part.lines), part.end]
            assert offsets == sorted(set(offsets))
            offset = part.end
        assert not found[-1].more
        identity = found[-1].identity
        again = await store.read_log_part(LOG, identity, offset)
        assert again is not None
        assert (again.start, again.end, again.lines, again.more) == (offset, offset, [], False)
        last = found[-1].lines[-1][0]
        assert [each for part in await parts(store, identity, last) for _, each in part.lines] == bare(written[-1:])

    @needs(Capability.EXTENTS)
    @says(
        "StorageBackend.read_log_part",
        "If the log's identity is not `identity`, or it is shorter than `start`, the part begins at 0.",
    )
    async def test_a_log_that_grew_goes_on_and_one_that_was_rewritten_begins_anew(self) -> None:
        store = await self.open()
        await store.commit([Append(LOG, lines(3))])
        [part] = await parts(store)
        await store.commit([Append(LOG, lines(2, 3))])
        [grown] = await parts(store, part.identity, part.end)
        assert (grown.identity, grown.start) == (part.identity, part.end)
        assert [each for _, each in grown.lines] == bare(lines(2, 3))
        known = {grown.identity}
        old = lines(1)[0]
        for turn in range(6):  # a file system gives the number of a removed file out again
            new = line("m0", f"rewrite {turn}")
            await store.commit([Edit(LOG, "m0", old, new)])
            old = new
            [rewritten] = await parts(store, grown.identity, grown.end)
            assert rewritten.start == 0
            assert rewritten.identity not in known
            known.add(rewritten.identity)
        await store.commit([Truncate(LOG, 2)])
        [shorter] = await parts(store, rewritten.identity, rewritten.end)
        assert shorter.start == 0 and len(shorter.lines) == 3
        [beyond] = await parts(store, shorter.identity, shorter.end + 1)
        assert beyond.start == 0 and len(beyond.lines) == 3

    @leaves_damage
    @says("StorageBackend.read_log_part", "Bad lines may be in it: whoever decodes them notices.")
    async def test_bad_lines_keep_no_good_ones_away(self) -> None:
        good = lines(2)
        self.poke(LOG, b"bad\n" + good[0] + b"\n{}\n" + good[1] + b'{"id":"half')
        store = await self.open()
        [part] = await parts(store)
        records = [(offset, each) for offset, each in part.lines if codec.line_id(each) is not None]
        assert records == [(4, good[0][:-1]), (4 + len(good[0]) + 4, good[1][:-1])]
        assert part.end == 4 + len(good[0]) + 4 + len(good[1])
        assert not part.more

    # --- read_log_at ---------------------------------------------------------------------------------

    @says("StorageBackend.read_log_at", "Offsets are those of `read_log_part`, lengths those of its lines.")
    async def test_lines_are_read_where_parts_had_them(self) -> None:
        store = await self.open()
        await store.commit([Append(LOG, lines(20)), Append(OTHER, lines(3))])
        [part] = await parts(store)
        places = [(LOG, offset, len(each)) for offset, each in part.lines]
        assert await store.read_log_at(places[::-1]) == bare(lines(20))[::-1]
        offset, length = places[5][1:]
        wrong = [(LOG, offset, length - 1), (OTHER, part.end, 1), (LOG, part.end, 1), places[5]]
        assert (await store.read_log_at(wrong))[1:] == [None, None, bare(lines(20))[5]]

    @leaves_damage
    @says(
        "StorageBackend.read_log_at",
        "Return the bytes of each place (key, offset, length), in order; None where there are not so many.",
    )
    async def test_places_of_logs_are_read_in_order(self) -> None:
        store = await self.open()
        self.poke(LOG, b"0123456789")
        self.poke(OTHER, b"abc")
        places = [(OTHER, 1, 2), (LOG, 0, 10), (LOG, 5, 6), (OTHER, 0, 1), ("absent", 0, 1), (LOG, 3, 2), (LOG, 20, 1)]
        assert await store.read_log_at(places) == [b"bc", b"0123456789", None, b"a", None, b"34", None]
        assert await store.read_log_at([]) == []
