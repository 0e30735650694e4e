"""What whoever wraps a store shows of it: its iterators, ended with whoever reads them, and its snapshots."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar, cast

from .base import Snapshot, StorageBackend

T = TypeVar("T")


def ended(items: AsyncIterator[T]) -> aclosing[AsyncGenerator[T, None]]:
    """Return a context that ends a store's iterator with whoever reads it, at once and not when it is forgotten."""
    return aclosing(cast("AsyncGenerator[T, None]", items))


class Shown(Snapshot):
    """A snapshot without what a mirror or a cache keeps for itself."""

    def __init__(self, backend: StorageBackend, shown: Snapshot, is_own: Callable[[str], bool]) -> None:
        """Leave out the keys of `shown` that `is_own` is true of."""
        super().__init__(backend)
        self._shown = shown
        self._is_own = is_own

    async def sized(self, prefix: str = "") -> AsyncIterator[list[tuple[str, int]]]:
        async with ended(self._shown.sized(prefix)) as runs:
            async for run in runs:
                if kept := [each for each in run if not self._is_own(each[0])]:
                    yield kept

    async def read(self, key: str) -> AsyncIterator[bytes]:
        async with ended(self._shown.read(key)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        return await self._shown.read_many(keys)
