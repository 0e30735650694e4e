"""Cases of the contract: many keys at once, into a store and out of it."""

from __future__ import annotations

import pytest

from ..backends.base import Capability
from ..errors import ConflictError, ValidationError
from .case import LOG, BackendCase, bare, lines, needs
from .sentences import says


def _items(count: int) -> list[tuple[str, bytes]]:
    return [(f"users/ann/chat {number}/session.json", b'{"n": %d}\n' % number) for number in range(count)]


class LoadCases(BackendCase):
    @says(
        "StorageBackend.load",
        "Put bytes at several keys where nothing is, logs among them, as one commit.",
        "It means a `Put` with ABSENT for each, and may be faster: it is how a store is filled from another one.",
    )
    @pytest.mark.parametrize("count", [3, 300])
    async def test_loading_puts_all_of_it(self, count: int) -> None:
        backend = await self.open()
        await backend.write("beside", b"x")
        more = [(LOG, b"".join(lines(20))), ("users/ann/torn/messages.jsonl", b"half"), ("empty", b""), ("a/b", b"\0")]
        loaded = dict(_items(count) + more)
        await backend.load(list(loaded.items()))
        assert self.contents() == loaded | {"beside": b"x"}
        assert await backend.read_log(LOG, 5, 7) == bare(lines(2, 5))
        assert await backend.append(LOG, lines(1, 20)[0])
        assert await backend.count_log(LOG) == 21
        await backend.delete("users/ann/torn/messages.jsonl")
        await backend.load([])

    @pytest.mark.parametrize("count", [3, 300])
    async def test_loading_where_something_is_changes_nothing(self, count: int) -> None:
        backend = await self.open()
        items = _items(count)
        await backend.write(items[-1][0], b"mine")
        with pytest.raises(ConflictError):
            await backend.load(items)
        with pytest.raises(ValidationError):
            await backend.load([*items[:-1], ("../out", b"")])
        assert self.contents() == {items[-1][0]: b"mine"}

    @needs(Capability.PERSISTENT)
    async def test_what_was_loaded_and_changed_is_there_afterwards(self) -> None:
        backend = await self.open()
        items = dict(_items(40))
        await backend.load(list(items.items()))
        first, second, third, *_ = items
        await backend.write(first, b"{}")
        await backend.delete(second)
        await backend.delete(third)
        await backend.load(list(_items(40)[2:3]))
        await backend.close()
        again = await self.open()
        assert await again.read_many([first, second, third]) == [b"{}", None, items[third]]
        assert len(await again.list_keys("")) == 39

    @says(
        "StorageBackend.still",
        "Show a store that nobody writes to while the context lasts, as the caller knows.",
        "It is what `snapshot` shows, and may cost less.",
    )
    async def test_a_store_at_rest_shows_what_a_snapshot_shows(self) -> None:
        backend = await self.open()
        async with backend.still() as shown:
            assert [run async for run in shown.sized()] == []
        await backend.load([*_items(30), ("a/b", b"1"), ("a-b", b"2"), ("a0", b"3"), ("a/b.c/d", b"4"), ("b", b"")])
        await backend.append(LOG, lines(1)[0])
        async with backend.still() as one, backend.snapshot() as other:
            for prefix in ("", "a", "a/", "a/b", "users/ann/chat 1", "users/", "none", "b"):
                sized = [each async for run in one.sized(prefix) for each in run]
                assert sized == [each async for run in other.sized(prefix) for each in run]
                keys = [key for key, _ in sized]
                assert keys == await backend.list_keys(prefix)
                assert keys == [key async for run in one.keys(prefix) for key in run]
                assert await one.read_many(keys) == await other.read_many(keys)
            assert [chunk async for chunk in one.read(LOG)] == [lines(1)[0]]

    @needs(Capability.EXTENTS)
    async def test_what_was_loaded_has_changed(self) -> None:
        backend = await self.open()
        await backend.write("a", b"x")
        cursor = (await backend.changes(None)).cursor
        await backend.load(_items(40))
        keys = (await backend.changes(cursor)).keys
        assert keys is None or keys >= {key for key, _ in _items(40)}
