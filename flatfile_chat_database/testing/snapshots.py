"""Cases of the contract: the store as a whole, shown and filled."""

from __future__ import annotations

import asyncio
from multiprocessing.connection import Connection

import pytest

from ..backends.base import Capability, Snapshot, StorageBackend
from ..backends.changes import Append, Change, Delete, Edit, Move, Put, RemoveTree, Truncate
from ..errors import ConflictError, NotFoundError, ValidationError
from .case import LOG, BackendCase, all_of, chunks, leaves_damage, line, lines, needs, other_process
from .sentences import says

_NOTES = tuple(f"users/ann/note-{number}.json" for number in range(3))


async def contents(shown: Snapshot, prefix: str = "") -> dict[str, bytes]:
    """Return all that a snapshot shows, read key by key."""
    found = {}
    for run in await all_of(shown.keys(prefix)):
        for key in run:
            found[key] = b"".join(await all_of(shown.read(key)))
    return found


async def _fill(store: StorageBackend) -> None:
    await store.write("users/ann/user.json", b'{"a": 1}\n')
    await store.write("users-2", b"beside the folder\n")
    await store.commit([Append(LOG, lines(3))])
    await store.write_blob("users/ann/chat/documents/a.bin", chunks(b"\x00\xff" * 50_000, b"end"))
    await store.write("empty", b"")
    await store.write("users/张/user.json", b"{}\n")


async def _count_together(case: BackendCase, store: StorageBackend, there: Connection) -> None:
    """Put one number into three documents and a log, again and again, until told to stop."""
    number = 0
    while not there.poll():
        number += 1
        puts = [Put(key, b"%d\n" % number) for key in _NOTES]
        await store.commit([*puts, Append(LOG, (line(f"n{number}"),))])
        there.send(number)
    there.send(None)


class SnapshotCases(BackendCase):
    """One state of a store, and filling a store from one."""

    @says("StorageBackend.snapshot", "This default shows the state of now only as long as nobody writes.")
    @says("Snapshot.keys", "Yield all keys that begin with `prefix` in runs, sorted by code point.")
    @says("Snapshot.sized", "Yield the same with the number of bytes at each key.")
    @says(
        "Snapshot.read", "Yield the bytes at `key` in chunks; raise NotFoundError before the first if there are none."
    )
    @says(
        "Snapshot.read_many",
        "Return the bytes at each key, in the order of `keys`; None for one that is absent.",
    )
    async def test_a_snapshot_shows_all_of_a_store_that_rests(self) -> None:
        store = await self.open()
        await _fill(store)
        async with store.snapshot() as shown:
            found = await contents(shown)
            assert found == self.contents()
            assert list(found) == sorted(found)
            sized = [each for run in await all_of(shown.sized()) for each in run]
            assert sized == [(key, len(data)) for key, data in found.items()]
            assert await contents(shown, "users/") == {
                key: data for key, data in found.items() if key.startswith("users/")
            }
            assert await contents(shown, "no") == {}
            assert await shown.read_many(["empty", "absent", "users-2"]) == [b"", None, b"beside the folder\n"]
            with pytest.raises(NotFoundError):
                await all_of(shown.read("absent"))
        assert self.contents() == found, "a snapshot leaves nothing behind"

    @says("Snapshot.read", "Several keys may be read in turn, and none has to be read to its end.")
    async def test_keys_of_a_snapshot_are_read_in_turn(self) -> None:
        store = await self.open()
        datas = {f"blob {number}": bytes([number]) * ((3 << 20) + number) for number in range(3)}
        for key, data in datas.items():
            await store.write_blob(key, chunks(data))
        await store.commit([Append(LOG, lines(1000))])
        async with store.snapshot() as shown:
            begun = [aiter(shown.read(key)) for key in datas]
            first = [await anext(chunk) for chunk in begun]
            assert await shown.read_many([*datas, LOG]) == [*datas.values(), b"".join(lines(1000))]
            rest = [b"".join(await all_of(chunk)) for chunk in begun[1:]]
            assert [a + b for a, b in zip(first[1:], rest, strict=True)] == list(datas.values())[1:]
            assert b"".join(await all_of(shown.read(LOG))) == b"".join(lines(1000))
            await begun[0].aclose()  # type: ignore[attr-defined]
            assert await contents(shown) == self.contents()

    async def test_a_snapshot_of_no_store_is_empty_and_makes_none(self) -> None:
        store = await self.open()
        async with store.snapshot() as shown:
            assert await contents(shown) == {}
        assert self.is_untouched()

    @leaves_damage
    async def test_a_snapshot_keeps_half_a_line_as_it_is(self) -> None:
        torn = b"".join(lines(2)) + b'{"id": "m2", "ro'
        self.poke(LOG, torn)
        store = await self.open()
        await store.write("beside", b"it")
        async with store.snapshot() as shown:
            if Capability.SNAPSHOTS in self.capabilities:
                await store.append(LOG, b"".join(lines(2, 5)))
            assert (await contents(shown))[LOG] == torn

    @needs(Capability.SNAPSHOTS)
    @says(
        "Capability.SNAPSHOTS",
        "`snapshot` shows one state of the store, whatever is written meanwhile by whichever process.",
    )
    @says(
        "StorageBackend.snapshot",
        "Show one state of the store for as long as the context lasts; others may go on writing meanwhile.",
    )
    @pytest.mark.parametrize(
        "change",
        [
            Put("users/ann/user.json", b"new\n"),
            Put("users/ann/new.json", b"new\n"),
            Delete("users/ann/chat/documents/a.bin"),
            Append(LOG, (line("m9"),)),
            Append("users/ann/new/messages.jsonl", (line("m9"),)),
            Edit(LOG, "m1", lines(3)[1], line("m1", "edited")),
            Edit(LOG, "m1", lines(3)[1], None),
            Truncate(LOG, 1),
            Truncate(LOG),
            Move("users/ann", "trash/1/users/ann"),
            RemoveTree("users"),
        ],
        ids=lambda change: type(change).__name__,
    )
    async def test_a_snapshot_does_not_change(self, change: Change) -> None:
        store = await self.open()
        await _fill(store)
        before = self.contents()
        async with store.snapshot() as shown:
            keys = [key for run in await all_of(shown.keys()) for key in run]
            await store.commit([change])
            await store.commit([Append(LOG, (line("later"),))])
            assert keys == sorted(before)
            assert await contents(shown) == before
            async with store.snapshot() as second:
                assert await contents(second) == self.contents()
        async with store.snapshot() as third:
            assert await contents(third) == self.contents()

    @needs(Capability.SNAPSHOTS, Capability.PROCESSES)
    @says(
        "StorageBackend.snapshot",
        "What was acknowledged before is in it, and every commit is in it wholly or not at all.",
    )
    async def test_a_snapshot_holds_whole_commits_of_other_processes(self) -> None:
        store = await self.open()
        await _fill(store)
        with other_process(self, _count_together) as (_, there):
            acknowledged = await asyncio.to_thread(there.recv)
            for _ in range(5):
                while there.poll():
                    acknowledged = there.recv()
                async with store.snapshot() as shown:
                    while there.poll():  # it went on meanwhile
                        there.recv()
                    found = await contents(shown)
                numbers = {int(found[key]) for key in _NOTES}
                assert len(numbers) == 1, f"a commit is there in part: {numbers}"
                (number,) = numbers
                assert number >= acknowledged
                assert found[LOG] == b"".join([*lines(3), *(line(f"n{each}") for each in range(1, number + 1))])
            there.send("stop")
            while await asyncio.to_thread(there.recv) is not None:
                pass

    # --- filling -------------------------------------------------------------------------------------

    @says("StorageBackend.load", "Put bytes at several keys where nothing is, logs among them, as one commit.")
    @says(
        "StorageBackend.load",
        "It means a `Put` with ABSENT for each, and may be faster: it is how a store is filled from another one.",
    )
    async def test_loading_puts_bytes_where_nothing_is(self) -> None:
        store = await self.open()
        items = [("users/ann/user.json", b"{}\n"), (LOG, b"".join(lines(3))), ("empty", b""), ("a", b"\x00")]
        await store.load(items)
        assert self.contents() == dict(items)
        assert await store.count_log(LOG) == 3
        await store.append(LOG, lines(1, 3)[0])
        assert self.peek(LOG) == b"".join(lines(4))
        before = self.contents()
        for taken in ([("new", b"1"), ("a", b"2")], [(LOG, b""), ("new", b"1")]):
            with pytest.raises(ConflictError):
                await store.load(taken)
        with pytest.raises(ValidationError):
            await store.load([("new", b"1"), ("../new", b"2")])
        await store.load([])
        assert self.contents() == before
