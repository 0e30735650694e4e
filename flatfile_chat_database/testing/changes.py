"""Cases of the contract: each kind of change."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from ..backends.changes import (
    ABSENT,
    ANY,
    Absent,
    Append,
    Delete,
    Edit,
    Move,
    Put,
    Quota,
    RemoveTree,
    Require,
    Truncate,
)
from ..backends.rules import version_of
from ..errors import (
    ConflictError,
    IntegrityError,
    NotFoundError,
    StorageLimitExceeded,
    ValidationError,
)
from .case import LOG, BackendCase, bare, chunks, leaves_damage, line, lines
from .sentences import says


class ChangeCases(BackendCase):
    """Each kind of change."""

    # --- conditions ----------------------------------------------------------------------------------

    @says("Require", "Condition: the document `key` exists; otherwise NotFoundError saying that `what` does not exist.")
    async def test_what_is_required_must_be_there(self) -> None:
        store = await self.open()
        await store.write("a/b", b"")
        assert await store.commit([Require("a/b", "The user 'ann'"), Put("c", b"")]) == [None, version_of(b"")]
        for absent in ("a", "a/c", "x/y"):
            with pytest.raises(NotFoundError, match=r"^The user 'ann' does not exist") as error:
                await store.commit([Require(absent, "The user 'ann'")])
            assert error.value.key == absent

    @says("Absent", "Condition: nothing is at or below `key`; otherwise ConflictError.")
    async def test_what_must_be_absent_is_neither_a_key_nor_a_folder_with_keys(self) -> None:
        store = await self.open()
        await store.write("a/b/c", b"")
        assert await store.commit([Absent("a/b/d"), Absent("a/b/d/x"), Absent("b"), Put("d", b"")]) == [
            None, None, None, version_of(b""),
        ]  # fmt: skip
        for taken in ("a", "a/b", "a/b/c"):
            with pytest.raises(ConflictError) as error:
                await store.commit([Absent(taken), Put("e", b"")])
            assert error.value.key == taken
        assert set(self.peek_keys()) == {"a/b/c", "d"}
        await store.commit([RemoveTree("a")])
        await store.commit([Absent("a")])

    @says(
        "Quota",
        "Condition: `folder` has fewer than `maximum` folders in it besides those named in `ignoring`.",
        "They are those that `list_folders` returns.",
        "Otherwise StorageLimitExceeded with `limit_name`.",
    )
    async def test_a_folder_has_room_or_not(self) -> None:
        store = await self.open()
        for key in ("f/a/1/x", "f/a/2/x", "f/b/x", "f/c/x", "f/d/e/f", "f/key", "f/other key", "g/h/x"):
            await store.write(key, b"")
        for folder, count in (("f", 4), ("g", 1), ("absent", 0), ("f/a", 2), ("f/b", 0)):
            await store.commit([Quota(folder, count + 1, "max_things")])
            for maximum in range(count + 1):
                with pytest.raises(StorageLimitExceeded, match="max_things") as error:
                    await store.commit([Quota(folder, maximum, "max_things")])
                assert (error.value.limit_name, error.value.limit) == ("max_things", maximum)
        await store.commit([Quota("f", 3, "max_things", frozenset({"b", "c", "x"}))])
        with pytest.raises(StorageLimitExceeded):
            await store.commit([Quota("f", 2, "max_things", frozenset({"b", "c", "x"}))])

    @says("Quota", "Counted before the commit changes anything.")
    async def test_a_quota_does_not_see_its_own_commit(self) -> None:
        store = await self.open()
        quota = Quota("f", 2, "max_things")
        await store.commit([Put("f/1/x", b""), Put("f/2/x", b""), Put("f/3/x", b""), quota])
        with pytest.raises(StorageLimitExceeded):
            await store.commit([RemoveTree("f"), quota])
        assert len(self.peek_keys()) == 3

    @says("Quota", "Condition: `folder` has fewer than `maximum` folders in it besides those named in `ignoring`.")
    async def test_creators_at_once_do_not_overfill_a_folder(self) -> None:
        store = await self.open()
        work = [store.commit([Quota("f", 7, "max_things"), Put(f"f/{n}/x", b"", ABSENT)]) for n in range(20)]
        results = await asyncio.gather(*work, return_exceptions=True)
        assert sum(isinstance(result, StorageLimitExceeded) for result in results) == 13
        assert len(self.peek_keys()) == 7

    @says("Quota", "Condition: `folder` has fewer than `maximum` folders in it besides those named in `ignoring`.")
    async def test_an_emptied_folder_can_be_filled_again(self) -> None:
        store = await self.open()
        for number in itertools.islice(itertools.cycle(range(3)), 9):
            await store.commit([Quota("f", 1, "max_things"), Put(f"f/{number}/x", b"x", ABSENT)])
            await store.delete(f"f/{number}/x")
        assert self.contents() == {}

    # --- Put and Delete ------------------------------------------------------------------------------

    @says("Put", "Replace a document whole.", "Outcome: the new version.")
    @says("Put", "Condition: its version is `expected`; otherwise ConflictError.")
    @says("ANY", "No condition on what a document holds now.")
    @says("ABSENT", "The document must not exist.")
    async def test_a_document_is_put_on_its_condition(self) -> None:
        store = await self.open()
        [first] = await store.commit([Put("a/b", b"long first", ABSENT)])
        [second] = await store.commit([Put("a/b", b"2nd", str(first))])
        assert isinstance(first, str)
        assert isinstance(second, str)
        assert first != second
        for stale in (first, ABSENT, "", "no version"):
            with pytest.raises(ConflictError) as error:
                await store.commit([Put("a/b", b"x", stale)])
            assert error.value.key == "a/b"
            with pytest.raises(ConflictError):
                await store.commit([Put("a/c", b"x", second)])
        assert await store.commit([Put("a/b", b"3", ANY), Put("a/c", b"3", ANY)]) == [version_of(b"3")] * 2
        assert self.contents() == {"a/b": b"3", "a/c": b"3"}

    @says("Put", "Outcome: the new version.")
    async def test_a_version_is_that_of_the_bytes(self) -> None:
        store = await self.open()
        outcomes = await store.commit([Put("a/b", b"1"), Put("a/c", b"1"), Put("a/d", b"2")])
        assert outcomes == [version_of(b"1"), version_of(b"1"), version_of(b"2")]

    @says("Delete", "Remove one document, log or blob.", "Outcome: whether it was there.")
    async def test_each_shape_can_be_deleted(self) -> None:
        store = await self.open()
        await store.write("a/document", b"x")
        await store.append("a/log", b"".join(lines(2)))
        await store.write_blob("a/blob", chunks(b"x"))
        deletes = [Delete("a/document"), Delete("a/log"), Delete("a/blob"), Delete("a/none"), Delete("a")]
        assert await store.commit(deletes) == [True, True, True, False, False]
        assert self.contents() == {}
        assert await store.read_log("a/log") == []
        assert await store.commit([Append("a/log", lines(1))]) == [1], "what was forgotten is new again"
        assert self.contents() == {"a/log": lines(1)[0]}

    # --- Append --------------------------------------------------------------------------------------

    @says("Append", "Append records to a log, in order, one line each; a log that is absent begins with them.")
    @says("Append", "Outcome: how many records were added.")
    async def test_records_are_appended_in_order(self) -> None:
        store = await self.open()
        assert await store.commit([Append(LOG, lines(3))]) == [3]
        assert await store.commit([Append(LOG, lines(2, 3))]) == [2]
        assert await store.commit([Append(LOG, ())]) == [0]
        assert self.contents() == {LOG: b"".join(lines(5))}

    @says(
        "Append",
        "A record whose id the log holds already (or an earlier record of this Append) is passed over when both are "
        "the same message.",
    )
    async def test_the_same_message_again_adds_nothing(self) -> None:
        store = await self.open()
        await store.commit([Append(LOG, lines(3))])
        written = b"".join(lines(3))
        assert await store.commit([Append(LOG, lines(3))]) == [0]
        assert await store.commit([Append(LOG, lines(5, 1))]) == [3]
        written += b"".join(lines(3, 3))
        later = line("m0", "message 0", timestamp="2030-01-01T00:00:00.000000+00:00")
        assert await store.commit([Append(LOG, (later, line("new"), later, line("new")))]) == [1]
        written += line("new")
        assert self.peek(LOG) == written
        hand = b'{"role":"user", "content":"x", "timestamp":"2026-01-31T12:00:00Z", "id":"by \\u0068and"}\n'
        await store.append(LOG, hand)
        assert await store.commit([Append(LOG, (line("by hand", "x"),))]) == [0]
        assert self.peek(LOG) == written + hand

    @says(
        "Append",
        "A record whose id the log holds already (or an earlier record of this Append) is passed over when both are "
        "the same message.",
    )
    async def test_the_same_message_from_many_callers_is_there_once(self) -> None:
        store = await self.open()
        work = [store.commit([Append(LOG, (line(f"m{n % 5}"),))]) for n in range(50)]
        assert sum(int(str(outcome)) for [outcome] in await asyncio.gather(*work)) == 5
        assert len(await store.read_log(LOG)) == 5

    @says(
        "Append",
        "Conditions: no such record is a different message, otherwise ValidationError; the log would not hold more "
        "than `maximum` records, otherwise StorageLimitExceeded with `limit_name`.",
    )
    async def test_another_message_under_the_same_id_is_refused(self) -> None:
        store = await self.open()
        await store.commit([Append(LOG, lines(2))])
        different = [
            line("m0", "other"),
            line("m0", "message 0", parent_id="m1"),
            line("m0", "message 0", metadata={"a": 1}),
            line("m0", "message 0", attachments=["a"]),
        ]
        for other in different:
            with pytest.raises(ValidationError, match="m0"):
                await store.commit([Append(LOG, (line("new"), other))])
        with pytest.raises(ValidationError, match="new"):
            await store.commit([Append(LOG, (line("new"), line("new", "other")))])
        assert self.contents() == {LOG: b"".join(lines(2))}

    @says(
        "Append",
        "Conditions: no such record is a different message, otherwise ValidationError; the log would not hold more "
        "than `maximum` records, otherwise StorageLimitExceeded with `limit_name`.",
    )
    async def test_a_log_takes_its_maximum_and_no_more(self) -> None:
        store = await self.open()
        await store.commit([Append(LOG, lines(3), 3, "max_records")])
        with pytest.raises(StorageLimitExceeded, match="max_records") as error:
            await store.commit([Append(LOG, lines(1, 3), 3, "max_records")])
        assert (error.value.limit, error.value.limit_name, error.value.value) == (3, "max_records", 4)
        assert await store.commit([Append(LOG, lines(3), 3, "max_records")]) == [0], "nothing would be added"
        assert await store.commit([Append(LOG, lines(3), 2, "max_records")]) == [0]
        with pytest.raises(StorageLimitExceeded):
            await store.commit([Append("other", lines(1), 0, "max_records")])
        await store.append(LOG, b"bad\n\n \n")
        with pytest.raises(StorageLimitExceeded):
            await store.commit([Append(LOG, lines(2, 2), 3, "max_records")])
        assert await store.commit([Append(LOG, lines(2, 2), 4, "max_records")]) == [1]
        assert self.contents() == {LOG: b"".join(lines(3)) + b"bad\n\n \n" + lines(1, 3)[0]}
        await store.write(LOG, b"".join(lines(4)))

    @says("Append", "Append records to a log, in order, one line each; a log that is absent begins with them.")
    async def test_appends_follow_every_other_change_of_a_log(self) -> None:
        store, written = await self.open(), b"".join(lines(4))
        await store.commit([Append(LOG, lines(4))])
        await store.commit([Edit(LOG, "m0", lines(1)[0], line("m0", "much longer than it was before"))])
        assert await store.commit([Append(LOG, (line("m0", "much longer than it was before"),))]) == [0]
        await store.commit([Edit(LOG, "m1", lines(1, 1)[0], None)])
        assert await store.commit([Append(LOG, lines(1, 1))]) == [1]
        await store.commit([Truncate(LOG, 1)])
        assert await store.commit([Append(LOG, lines(1, 1))]) == [1]
        await store.commit([Move(LOG, "moved")])
        assert await store.commit([Append(LOG, lines(1, 1))]) == [1]
        await store.write(LOG, written)
        assert await store.commit([Append(LOG, lines(5))]) == [1]
        await store.commit([RemoveTree("users")])
        await store.commit([Append(LOG, lines(1))])
        await store.commit([Truncate(LOG)])
        assert await store.commit([Append(LOG, (line("m0", "other"),))]) == [1]
        assert self.peek(LOG) == line("m0", "other")

    # --- Edit ----------------------------------------------------------------------------------------

    @says("Edit", "Replace the record `record_id` of a log in its place, or drop it when `line` is None.")
    @says("Edit", "Outcome: None.")
    async def test_a_record_is_replaced_in_its_place_or_dropped(self) -> None:
        store = await self.open()
        await store.commit([Append(LOG, lines(4))])
        new = line("m1", "new", metadata={"long": "x" * 1000})
        assert await store.commit([Edit(LOG, "m1", lines(2)[1], new)]) == [None]
        assert self.peek(LOG) == lines(1)[0] + new + b"".join(lines(2, 2))
        assert await store.commit([Edit(LOG, "m1", new[:-1], line("m1"))]) == [None]
        for number in (2, 0, 3):
            assert await store.commit([Edit(LOG, f"m{number}", lines(4)[number], None)]) == [None]
        assert await store.read_log(LOG) == bare([line("m1")])
        await store.commit([Edit(LOG, "m1", line("m1"), None)])
        assert await store.read_log(LOG) == []

    @leaves_damage
    @says(
        "Edit",
        "Conditions: the log holds the record, otherwise NotFoundError; the record's line is `expected`, otherwise "
        "ConflictError; every line of the log is a record or blank, otherwise IntegrityError, for what cannot be read "
        "must not be rewritten.",
    )
    async def test_an_edit_wants_the_record_as_it_was_read_in_a_whole_log(self) -> None:
        store = await self.open()
        await store.commit([Append(LOG, lines(2))])
        with pytest.raises(NotFoundError, match="m2"):
            await store.commit([Edit(LOG, "m2", lines(3)[2], None)])
        with pytest.raises(NotFoundError):
            await store.commit([Edit("absent", "m0", lines(1)[0], None)])
        with pytest.raises(ConflictError, match="m0"):
            await store.commit([Edit(LOG, "m0", line("m0", "as it was before"), line("m0", "new"))])
        assert self.contents() == {LOG: b"".join(lines(2))}
        await store.append(LOG, b" \n\n")
        await store.commit([Edit(LOG, "m0", lines(1)[0], line("m0", "new"))])
        assert await store.read_log(LOG) == bare([line("m0", "new"), lines(2)[1]])
        await store.append(LOG, b"bad\n")
        before = self.contents()
        for changed in (line("m1", "new"), None):
            with pytest.raises(IntegrityError) as error:
                await store.commit([Edit(LOG, "m1", lines(2)[1], changed)])
            assert error.value.key == LOG
        assert self.contents() == before

    @says(
        "Edit",
        "Conditions: the log holds the record, otherwise NotFoundError; the record's line is `expected`, otherwise "
        "ConflictError; every line of the log is a record or blank, otherwise IntegrityError, for what cannot be read "
        "must not be rewritten.",
    )
    async def test_of_editors_at_once_one_wins_and_no_append_is_lost(self) -> None:
        store = await self.open()
        await store.commit([Append(LOG, lines(1))])
        edits = [store.commit([Edit(LOG, "m0", lines(1)[0], line("m0", f"by {n}"))]) for n in range(10)]
        appends = [store.commit([Append(LOG, (line(f"new {n}"),))]) for n in range(10)]
        results = await asyncio.gather(*edits, *appends, return_exceptions=True)
        assert sum(isinstance(result, ConflictError) for result in results[:10]) == 9
        assert sum(isinstance(result, BaseException) for result in results) == 9
        assert len(await store.read_log(LOG)) == 11

    # --- Truncate ------------------------------------------------------------------------------------

    @says("Truncate", "Drop the newest `count` records of a log, or all when None.")
    @says("Truncate", "Outcome: the dropped lines, oldest first; empty for a log that is empty or absent.")
    async def test_the_newest_records_are_dropped(self) -> None:
        store = await self.open()
        await store.commit([Append(LOG, lines(6))])
        assert await store.commit([Truncate(LOG, 0)]) == [[]]
        assert await store.commit([Truncate(LOG, 1)]) == [bare(lines(1, 5))]
        assert await store.commit([Truncate(LOG, 2)]) == [bare(lines(2, 3))]
        assert self.peek(LOG) == b"".join(lines(3))
        assert await store.commit([Truncate(LOG, 7)]) == [bare(lines(3))]
        assert await store.commit([Truncate(LOG, 1)]) == await store.commit([Truncate(LOG)]) == [[]]
        assert await store.commit([Truncate("absent", 1)]) == await store.commit([Truncate("absent")]) == [[]]
        await store.commit([Append(LOG, lines(4))])
        assert await store.commit([Truncate(LOG)]) == [bare(lines(4))]
        assert await store.read_log(LOG) == []

    @leaves_damage
    @says("Truncate", "Condition: every line that goes is a record or blank, otherwise IntegrityError.")
    async def test_a_line_that_is_no_message_is_not_dropped(self) -> None:
        old, new = lines(2), lines(2, 2)
        data = old[0] + b"bad\n" + old[1] + b"\n \n" + new[0] + b"\n" + new[1] + b"\n"
        self.poke(LOG, data)
        store = await self.open()
        for count in (4, 5, None):
            with pytest.raises(IntegrityError) as error:
                await store.commit([Truncate(LOG, count)])
            assert error.value.key == LOG
        assert self.contents() == {LOG: data}
        assert await store.commit([Truncate(LOG, 2)]) == [bare(new)]
        assert await store.commit([Truncate(LOG, 1)]) == [bare(old[1:])]
        assert (self.peek(LOG) or b"").startswith(old[0] + b"bad\n")
        with pytest.raises(IntegrityError):
            await store.commit([Truncate(LOG, 1)])
        assert await store.read_log(LOG) == bare(old[:1])

    @says("Truncate", "Outcome: the dropped lines, oldest first; empty for a log that is empty or absent.")
    async def test_poppers_at_once_each_get_another_record(self) -> None:
        store = await self.open()
        await store.commit([Append(LOG, lines(30))])
        popped = await asyncio.gather(*(store.commit([Truncate(LOG, 1)]) for _ in range(40)))
        records = [record for [dropped] in popped if isinstance(dropped, list) for record in dropped]
        assert sorted(map(str, records)) == sorted(map(str, bare(lines(30))))

    # --- Move and RemoveTree -------------------------------------------------------------------------

    @says("Move", "Move the key `source`, or everything below the folder `source`, to `target`.")
    @says("Move", "Outcome: whether there was anything to move.")
    async def test_a_key_or_a_folder_moves(self) -> None:
        store = await self.open()
        for key in ("f/a", "f/g/b", "f/g/h/c", "fa", "f-b/x"):
            await store.write(key, key.encode())
        assert await store.commit([Move("f", "t/r/ash")]) == [True]
        expected: dict[str, bytes | None] = {
            "t/r/ash/a": b"f/a", "t/r/ash/g/b": b"f/g/b", "t/r/ash/g/h/c": b"f/g/h/c", "fa": b"fa", "f-b/x": b"f-b/x",
        }  # fmt: skip
        assert self.contents() == expected
        assert await store.commit([Move("t/r/ash/g/b", "f/g/b")]) == [True]
        assert self.peek("f/g/b") == b"f/g/b"
        assert await store.commit([Move("t/r/ash", "f2"), Move("f2/g", "t/r/g")]) == [True, True]
        assert self.peek("t/r/g/h/c") == b"f/g/h/c"
        before = self.contents()
        assert await store.commit([Move("absent", "new"), Move("f2/x", "new")]) == [False, False]
        assert self.contents() == before

    @says("Move", "Condition: nothing is at or below `target`, otherwise ConflictError.")
    async def test_nothing_is_moved_onto_something(self) -> None:
        store = await self.open()
        for key in ("f/a", "g/a", "h"):
            await store.write(key, key.encode())
        before = self.contents()
        for source, target in (("f", "g"), ("f", "h"), ("f/a", "g"), ("f/a", "h"), ("f", "f"), ("absent", "g")):
            with pytest.raises(ConflictError) as error:
                await store.commit([Move(source, target)])
            assert error.value.key == target
        assert self.contents() == before
        assert await store.commit([Move("f", "g/b")]) == [True]
        assert await store.commit([Delete("g/a"), Delete("g/b/a")]) == [True, True]
        await store.write("f/a", b"")
        assert await store.commit([Move("f", "g")]) == [True], "an emptied folder is nothing"

    @says("RemoveTree", "Remove everything below a folder.", "Outcome: the keys that were removed, sorted.")
    async def test_a_tree_is_removed_with_everything_in_it(self) -> None:
        store = await self.open()
        tree = ["f/z", "f/a/b", "f/a-b", "f/a/c/d", "f/🙂", "f/\ufffd", "f/log"]
        for key in [*tree, "fa", "f-b/x", "g/f/x"]:
            await store.append(key, lines(1)[0])
        assert await store.commit([RemoveTree("f")]) == [sorted(tree)]
        assert sorted(self.peek_keys()) == ["f-b/x", "fa", "g/f/x"]
        assert await store.commit([RemoveTree("f"), RemoveTree("absent")]) == [[], []]
        assert sorted(self.peek_keys()) == ["f-b/x", "fa", "g/f/x"]
