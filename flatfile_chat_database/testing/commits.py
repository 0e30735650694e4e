"""Cases of the contract: commits as a whole."""

from __future__ import annotations

import asyncio
import itertools
import re

import pytest

from ..backends.base import StorageBackend
from ..backends.changes import (
    ABSENT,
    Absent,
    Append,
    Change,
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
    StorageError,
    StorageLimitExceeded,
    UnavailableError,
    ValidationError,
)
from .case import LOG, BackendCase, bare, largest_file, leaves_damage, line, lines
from .sentences import says

MISSING: tuple[tuple[Change, type[StorageError]], ...] = (
    (Require("absent", "It"), NotFoundError),
    (Absent("a/b"), ConflictError),
    (Absent("full"), ConflictError),
    (Quota("rooms", 2, "max_things"), StorageLimitExceeded),
    (Put("a/b", b"new", ABSENT), ConflictError),
    (Put("a/b", b"new", version_of(b"other")), ConflictError),
    (Put("absent", b"new", version_of(b"")), ConflictError),
    (Append("log", (line("m0", "other"),)), ValidationError),
    (Append("log", (line("new"), line("new", "other"))), ValidationError),
    (Append("log", lines(2, 2), maximum=3, limit_name="max_records"), StorageLimitExceeded),
    (Edit("log", "absent", line("absent"), None), NotFoundError),
    (Edit("absent", "m0", line("m0"), None), NotFoundError),
    (Edit("log", "m0", line("m0", "other"), None), ConflictError),
    (Edit("damaged", "m0", lines(1)[0], None), IntegrityError),
    (Truncate("damaged", 2), IntegrityError),
    (Truncate("damaged"), IntegrityError),
    (Move("a", "full"), ConflictError),
    (Move("a", "full/0"), ConflictError),
)
"""Changes whose condition does not hold in `_fill`'s store, and the error of each."""


async def _fill(store: StorageBackend) -> None:
    await store.write("a/b", b"old")
    await store.write("full/0", b"x")
    await store.write("full/1", b"x")
    await store.write("rooms/0/x", b"x")
    await store.write("rooms/1/x", b"x")
    await store.append("log", b"".join(lines(2)))
    await store.append("damaged", lines(1)[0] + b"bad\n" + lines(2)[1])


async def increment(store: StorageBackend, key: str) -> None:
    """Add one to the number in a document, however often somebody else comes between."""
    while True:
        data = await store.read(key)
        new = str(int(data or b"0") + 1).encode()
        try:
            await store.commit([Put(key, new, ABSENT if data is None else version_of(data))])
        except ConflictError:
            continue
        return


class CommitCases(BackendCase):
    """Commits as a whole."""

    @says(
        "StorageBackend.commit",
        "Make several changes as one: check every condition in the given order, then apply all in that order.",
        "Return the outcome of each change (None for conditions).",
    )
    async def test_a_commit_returns_an_outcome_for_each_change(self) -> None:
        store = await self.open()
        await _fill(store)
        changes: list[Change] = [
            Require("a/b", "It"),
            Absent("absent"),
            Quota("rooms", 3, "max_things"),
            Put("a/c", b"1"),
            Delete("full/1"),
            Delete("absent"),
            Append("log", lines(2, 2)),
            Edit("other", "m0", lines(1)[0], None),
            Truncate("third", 1),
            Move("full", "moved"),
            Move("absent", "nowhere"),
            RemoveTree("tree"),
        ]
        await store.append("other", b"".join(lines(2)))
        await store.append("third", b"".join(lines(2)))
        await store.write("tree/x", b"")
        assert await store.commit(changes) == [
            None, None, None, version_of(b"1"), True, False, 2, None, bare(lines(1, 1)), True, False, ["tree/x"],
        ]  # fmt: skip
        damaged = lines(1)[0] + b"bad\n" + lines(2)[1]
        assert self.contents() == {
            "a/b": b"old",
            "a/c": b"1",
            "log": b"".join(lines(4)),
            "other": lines(1, 1)[0],
            "third": lines(1)[0],
            "moved/0": b"x",
            "rooms/0/x": b"x",
            "rooms/1/x": b"x",
            "damaged": damaged,
        }
        assert await store.commit([]) == []

    @leaves_damage
    @says("StorageBackend.commit", "When a condition fails its error is raised and nothing has changed.")
    @pytest.mark.parametrize(
        ("failing", "error"), MISSING, ids=[re.sub(r"\W+", " ", repr(change)[:40]) for change, _ in MISSING]
    )
    async def test_a_commit_with_a_condition_that_fails_changes_nothing(
        self, failing: Change, error: type[StorageError]
    ) -> None:
        store = await self.open()
        await _fill(store)
        before = self.contents()
        others: list[Change] = [
            Put("new/document", b"x"),
            Append("new/log", lines(1)),
            Delete("full/0"),
            Truncate("log", 1),
            RemoveTree("full"),
            Put("a/b", b"changed"),
        ]
        for changes in ([failing, *others], [*others, failing], [*others[:3], failing, *others[3:]]):
            with pytest.raises(error) as caught:
                await store.commit(changes)
            assert type(caught.value) is error
            assert self.contents() == before

    @says("StorageBackend.commit", "When a condition fails its error is raised and nothing has changed.")
    async def test_a_commit_with_a_key_that_is_none_changes_nothing(self) -> None:
        store = await self.open()
        for bad in (Put("../b", b"x"), Delete("a//b"), Move("a", "b\\c"), RemoveTree(".."), Append("", lines(1))):
            with pytest.raises(ValidationError):
                await store.commit([Put("a", b"x"), bad])
        assert self.contents() == {}

    @leaves_damage
    @says(
        "StorageBackend.commit",
        "Make several changes as one: check every condition in the given order, then apply all in that order.",
    )
    async def test_of_several_conditions_that_fail_the_first_one_speaks(self) -> None:
        store = await self.open()
        await _fill(store)
        for (first, error), (second, _) in itertools.permutations(MISSING, 2):
            with pytest.raises(StorageError) as caught:
                await store.commit([first, second])
            assert type(caught.value) is error, (first, second)

    @says(
        "StorageBackend.commit",
        "Make several changes as one: check every condition in the given order, then apply all in that order.",
    )
    async def test_changes_are_applied_in_the_given_order(self) -> None:
        store = await self.open()
        await store.write("a/b", b"1")
        await store.commit([Move("a", "b"), Put("a/b", b"2")])
        assert self.contents() == {"a/b": b"2", "b/b": b"1"}
        assert await store.commit([RemoveTree("a"), Put("a/c", b"3"), Delete("b/b")]) == [
            ["a/b"],
            version_of(b"3"),
            True,
        ]
        assert self.contents() == {"a/c": b"3"}

    @says(
        "StorageBackend.commit",
        "No other commit comes between the check and the change, so reading, deciding and committing with a version "
        "loses no update.",
    )
    async def test_a_hundred_committers_at_once_lose_no_update(self) -> None:
        store = await self.open()
        await asyncio.gather(*(increment(store, "a/count") for _ in range(100)))
        assert self.peek("a/count") == b"100"

    @says(
        "StorageBackend.commit",
        "No other commit comes between the check and the change, so reading, deciding and committing with a version "
        "loses no update.",
    )
    async def test_of_many_creators_one_wins(self) -> None:
        store = await self.open()
        creators = [store.commit([Put("a/b", str(number).encode(), ABSENT)]) for number in range(30)]
        results = await asyncio.gather(*creators, return_exceptions=True)
        assert sum(isinstance(result, ConflictError) for result in results) == 29
        winner = next(number for number, result in enumerate(results) if isinstance(result, list))
        assert self.peek("a/b") == str(winner).encode()

    @says("StorageBackend.commit", "When a condition fails its error is raised and nothing has changed.")
    async def test_commits_that_fail_beside_others_harm_nobody(self) -> None:
        store = await self.open()
        await store.write("taken", b"")
        work = [
            store.commit([Append(LOG, (line(f"m{number}"),)), *([Put("taken", b"x", ABSENT)] * (number % 2))])
            for number in range(40)
        ]
        results = await asyncio.gather(*work, return_exceptions=True)
        assert [isinstance(result, ConflictError) for result in results] == [bool(n % 2) for n in range(40)]
        assert sorted(await store.read_log(LOG)) == sorted(bare([line(f"m{n}") for n in range(0, 40, 2)]))

    async def test_a_line_that_is_no_text_harms_no_others(self) -> None:
        store = await self.open()
        await store.commit([Put("owner", b"x"), Append(LOG, lines(2))])
        owner, first = Require("owner", "It"), lines(2)[0]
        bad = line("bad", "x").replace(b"x", b"\xff")
        work = [
            store.commit([owner, Append(LOG, (line("m7"),), ids=("m7",))]),
            store.commit([owner, Append(LOG, (bad,), ids=("bad",))]),
            store.commit([owner, Append(LOG, (line("m8"),), ids=("m8",))]),
            store.commit([Edit(LOG, "m0", first, bad)]),
        ]
        results = await asyncio.gather(*work, return_exceptions=True)
        assert [type(result) for result in results] == [list, ValidationError, list, ValidationError]
        assert await store.read_log(LOG) == bare([*lines(2), line("m7"), line("m8")])
        with pytest.raises(ValidationError, match="surrogate"):
            await store.commit([owner, Append(LOG, (line("m9"),), ids=("\ud800",))])
        with pytest.raises(NotFoundError):
            await store.commit([Edit(LOG, "\ud800", first, None)])
        assert await store.find_record(LOG, "\ud800") is None

    @leaves_damage
    @says("StorageBackend.commit", "When a condition fails its error is raised and nothing has changed.")
    async def test_a_commit_that_the_medium_refuses_changes_nothing(self) -> None:
        if not self.break_folder("broken"):
            return
        store = await self.open()
        await _fill(store)
        before = self.contents()
        for broken in (Put("broken/a", b"x"), Append("broken/a", lines(1)), Move("a", "broken/b")):
            with pytest.raises(UnavailableError):
                await store.commit([Put("new", b"x"), Put("a/b", b"y"), broken])
            assert self.contents() == before

    @says(
        "StorageBackend.commit",
        "Make several changes as one: check every condition in the given order, then apply all in that order.",
    )
    async def test_a_change_that_does_not_fit_on_the_medium_changes_nothing(self) -> None:
        store = await self.open()
        await _fill(store)
        await store.delete("damaged")
        before = self.contents()
        long = line("long", "x" * (2 << 20))
        for big in (Put("a/b", long), Append("log", (line("m9"), long)), Append("new", (long,))):
            with largest_file(1 << 20):
                try:
                    await store.commit([big])
                except StorageError:
                    assert self.contents() == before
                else:
                    return  # this medium has no such limit
        assert await store.commit([Append("log", lines(1, 2))]) == [1], "the store goes on"

    @says(
        "StorageBackend.commit",
        "Cancelling the caller never tears a commit: it happens wholly or not at all.",
    )
    async def test_a_cancelled_commit_happens_wholly_or_not_at_all(self) -> None:
        store = await self.open()
        for pauses in [*range(40), None]:
            name = f"case {pauses}"
            changes: list[Change] = [Put(f"{name}/a", b"1"), Append(f"{name}/log", lines(3)), Put(f"{name}/b", b"2")]
            task = asyncio.ensure_future(store.commit(changes))
            for _ in range(pauses or 0):
                await asyncio.sleep(0)
            if pauses is None:
                await asyncio.sleep(0.002)
            task.cancel()
            await asyncio.wait([task])
            await store.write("later", b"")  # what the caller left behind comes before what is asked for later
            there = sorted(key for key in self.peek_keys() if key.startswith(f"{name}/"))
            assert there in ([], [f"{name}/a", f"{name}/b", f"{name}/log"])
            if there:
                assert self.peek(f"{name}/log") == b"".join(lines(3))
            elif not task.cancelled():
                pytest.fail("the commit returned and nothing is there")

    @says(
        "StorageBackend.commit",
        "Cancelling the caller never tears a commit: it happens wholly or not at all.",
    )
    async def test_cancelling_some_of_many_callers_harms_nobody_else(self) -> None:
        store = await self.open()
        tasks = [asyncio.ensure_future(store.commit([Append(LOG, (line(f"m{n}"),))])) for n in range(60)]
        for number, task in enumerate(tasks):
            if number % 3 == 0:
                await asyncio.sleep(0)
                task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await store.write("later", b"")
        there = await store.read_log(LOG)
        assert len(set(there)) == len(there)
        for number, result in enumerate(results):
            if not isinstance(result, BaseException):
                assert line(f"m{number}")[:-1] in there
