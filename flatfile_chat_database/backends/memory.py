"""A store in dictionaries: the reference that other backends are tested against, and a quick store for tests."""

from __future__ import annotations

import bisect
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from ..config import StorageConfig
from ..errors import ClosedError
from ..models import Problem
from .base import Capability, Changes, Snapshot, StorageBackend
from .changes import Change, Outcome
from .rules import check_key, check_lines, half_set_aside, mended
from .waking import Waking


class MemoryBackend(StorageBackend):
    """The six methods on one dictionary; everything else is the contract's default.

    None of its methods ever waits, so one thread lock around a whole commit makes it safe for several threads and
    event loops. What it holds is gone with the object.
    """

    capabilities = frozenset({Capability.SNAPSHOTS})

    def __init__(self, config: StorageConfig) -> None:
        super().__init__(config)
        self._data: dict[str, bytes] = {}
        self._keys: list[str] = []  # sorted
        self._lock = threading.RLock()
        self._waking = Waking()
        self._closed = False

    def __repr__(self) -> str:
        return f"<MemoryBackend keys={len(self._data)}{' closed' if self._closed else ''}>"

    async def read(self, key: str) -> bytes | None:
        return self._opened().get(check_key(key))

    async def write(self, key: str, data: bytes) -> bool:
        with self._lock:
            stored = self._opened()
            if check_key(key) not in stored:
                bisect.insort(self._keys, key)
            stored[key] = bytes(data)
        self._waking.tell((key,))
        return True

    async def append(self, key: str, data: bytes) -> bool:
        check_lines(key, data)
        with self._lock:
            before, half = mended(self._opened().get(check_key(key), b""))
            if half:
                for place, kept in half_set_aside(self.config, key, len(before), half).items():
                    await self.write(place, kept)
            return await self.write(key, before + data)

    async def delete(self, key: str) -> bool:
        with self._lock:
            if self._opened().pop(check_key(key), None) is None:
                return False
            del self._keys[bisect.bisect_left(self._keys, key)]
        self._waking.tell((key,))
        return True

    async def exists(self, key: str) -> bool:
        return check_key(key) in self._opened()

    async def list_keys(self, prefix: str) -> list[str]:
        with self._lock:
            self._opened()
            start = bisect.bisect_left(self._keys, prefix)
            found = []
            for key in self._keys[start:]:
                if not key.startswith(prefix):
                    break
                found.append(key)
            return found

    async def commit(self, changes: Sequence[Change]) -> list[Outcome]:
        with self._lock:
            self._opened()
            for change in changes:
                await self._check(change)
            return await self._apply_all(changes)

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Snapshot]:
        still = MemoryBackend(self.config)
        with self._lock:
            still._data, still._keys = dict(self._opened()), list(self._keys)
        yield Snapshot(still)

    async def changes(self, cursor: str | None) -> Changes:
        self._opened()
        return await super().changes(cursor)

    async def wait_for_change(self, keys: Sequence[str] | frozenset[str], seconds: float) -> None:
        await self._waking.wait(keys, seconds)

    async def obstacles(self, *, fix: bool = False) -> list[Problem]:
        self._opened()
        return []

    async def verify(self, *, fix: bool = False) -> list[Problem]:
        self._opened()
        return []

    async def open(self) -> None:
        self._opened()

    async def close(self) -> None:
        self._closed = True
        self._waking.close()

    def _opened(self) -> dict[str, bytes]:
        if self._closed:
            raise ClosedError("The store is closed.", hint="Open a new StorageManager.")
        return self._data
