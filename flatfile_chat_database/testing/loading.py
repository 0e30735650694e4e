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

    @needs(Capability.EXTENTS)
    async def test_what_was_loaded_has_changed(self) -> None:
        backend = await self.open()
        await backend.write("a", b"x")
        cursor = (await backend.changes(None)).cursor
        await backend.load(_items(40))
        keys = (await backend.changes(cursor)).keys
        assert keys is None or keys >= {key for key, _ in _items(40)}
