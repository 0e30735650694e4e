"""A store at rest, shown as its files are: what a snapshot shows, without a second name for each file."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice

from ..base import Snapshot, StorageBackend
from ..readers import InThread
from ..rules import check_key
from .files import Files
from .oserrors import mapped
from .plan import read
from .tree import Tree

_KEYS_AT_ONCE = 1000


class Still(Snapshot):
    """The files as they are; memory does not grow with their number, but for that in one folder."""

    def __init__(self, backend: StorageBackend, files: Files, tree: Tree, in_thread: InThread) -> None:
        super().__init__(backend)
        self._files = files
        self._tree = tree
        self._in_thread = in_thread

    async def sized(self, prefix: str = "") -> AsyncIterator[list[tuple[str, int]]]:
        found = self._sized(prefix)
        while run := await self._in_thread(partial(_next, found)):
            yield run

    def _sized(self, prefix: str) -> Iterator[tuple[str, int]]:
        for key in self._tree.keys_in_order(prefix):
            with suppress(FileNotFoundError):  # somebody writes after all
                yield key, self._files.measure(self._tree.path(key))[2]

    async def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        for key in keys:
            check_key(key)
        return await self._in_thread(lambda: [self._read(key) for key in keys])

    def _read(self, key: str) -> bytes | None:
        with mapped(key):
            return read(self._files, self._tree, key)


def _next(found: Iterator[tuple[str, int]]) -> list[tuple[str, int]]:
    with mapped():
        return list(islice(found, _KEYS_AT_ONCE))
