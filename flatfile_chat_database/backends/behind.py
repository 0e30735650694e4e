"""The durable record of what the second of two stores may lack, kept in the first.

A key is recorded before it is changed, in a document that every change of it then requires to be there, so a document
can be removed at any moment, by anybody: who relied on it is told and records the key anew. Documents are never
rewritten. A key that is changed again and again is recorded once, until it has been quiet for a moment.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable

from .. import codec
from ..errors import IntegrityError
from ..models import new_id
from .base import StorageBackend
from .changes import Change, Delete, Put, Require
from .turn import Turn

_QUIET_SECONDS = 0.5
_MOST_KEYS = 500


class Record:
    """One document of the record, and how it is used in this process."""

    __slots__ = ("key", "names", "used", "users")

    def __init__(self, key: str, names: frozenset[str]) -> None:
        self.key = key
        self.names = names
        self.users = 0
        """Changes under way that rely on it."""
        self.used = time.monotonic()


class Behind:
    """What this process has recorded, and what of it is still to be copied; for every thread."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._turn = Turn()
        self._records: dict[str, Record] = {}
        self._where: dict[str, Record] = {}
        self._waiting: set[str] = set()
        self._dirty: dict[str, None] = {}
        self._copying: set[str] = set()

    @property
    def count(self) -> int:
        """How many keys and folders are still to be copied."""
        with self._lock:
            return len(self._dirty) + len(self._copying)

    # --- writing -------------------------------------------------------------------------------------

    async def cover(self, first: StorageBackend, names: Collection[str], conditions: Iterable[Change]) -> list[Record]:
        """Return records that hold all names, writing one to `first` if there is none; `release` them afterwards.

        Raises:
            NotFoundError: One of `conditions` does not hold.
        """
        with self._lock:
            self._waiting.update(name for name in names if name not in self._where)
        while True:
            if (found := self._take(names)) is not None:
                return found
            async with self._turn:
                with self._lock:
                    self._waiting.update(name for name in names if name not in self._where)
                    batch = frozenset(list(self._waiting)[:_MOST_KEYS]) if self._waiting else frozenset()
                    self._waiting -= batch
                if batch:
                    key = f"{self.folder}/{new_id()}.json"
                    await first.commit([*conditions, Put(key, codec.encode_document({"keys": sorted(batch)}))])
                    record = Record(key, batch)
                    with self._lock:
                        self._records[key] = record
                        self._where.update(dict.fromkeys(batch, record))

    def _take(self, names: Collection[str]) -> list[Record] | None:
        with self._lock:
            if any(name not in self._where for name in names):
                return None
            found = {self._where[name].key: self._where[name] for name in names}
            for record in found.values():
                record.users += 1
            return list(found.values())

    def release(self, records: Iterable[Record], changed: Iterable[str]) -> None:
        """Let go of records; what was changed is to be copied."""
        now = time.monotonic()
        with self._lock:
            self._dirty.update(dict.fromkeys(changed))
            for record in records:
                record.users -= 1
                record.used = now

    def forget(self, key: str | None = None) -> None:
        """Forget a record that is gone, or all of them."""
        with self._lock:
            for record in [each for each in self._records.values() if key is None or each.key == key]:
                self._drop(record)

    def _drop(self, record: Record) -> None:
        self._records.pop(record.key, None)
        for name in record.names:
            if self._where.get(name) is record:
                del self._where[name]

    # --- copying -------------------------------------------------------------------------------------

    def next(self, most: int) -> list[str]:
        """Return some names that are to be copied."""
        with self._lock:
            found = list(self._dirty)[:most]
            for name in found:
                del self._dirty[name]
            self._copying.update(found)
            return found

    def copied(self, names: Iterable[str], *, missed: Iterable[str] = ()) -> None:
        """Note that names were copied, or are to be copied later."""
        with self._lock:
            self._copying.difference_update(names)
            self._dirty.update(dict.fromkeys(missed))

    def retire(self, *, at_once: bool = False) -> list[str]:
        """Return the keys of records that nobody needs any more, and forget them; they can be removed."""
        now = time.monotonic()
        with self._lock:
            busy = self._dirty.keys() | self._copying
            done = [
                record
                for record in self._records.values()
                if not record.users
                and (at_once or now - record.used > _QUIET_SECONDS)
                and busy.isdisjoint(record.names)
            ]
            for record in done:
                self._drop(record)
            return [record.key for record in done]

    def others(self, keys: Iterable[str]) -> list[str]:
        """Return those keys of records that are not this process's."""
        with self._lock:
            return [key for key in keys if key not in self._records]


def names_in(data: bytes | None, key: str) -> list[str]:
    """Return the names in a record; a damaged one may have held any, so everything is to be looked at."""
    if data is None:
        return []
    try:
        return [str(name) for name in codec.decode_object(data, key)["keys"]]
    except (IntegrityError, KeyError, TypeError):
        return [""]


def removal(keys: Iterable[str]) -> list[Change]:
    """Return the changes that remove records."""
    return [Delete(key) for key in keys]


def requirements(records: Iterable[Record]) -> list[Change]:
    """Return the conditions that records are there."""
    return [Require(record.key, "The record of what the other store lacks") for record in records]
