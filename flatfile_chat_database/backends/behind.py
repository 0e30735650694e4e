"""The durable record of what the second of two stores may lack, kept in the first.

A key is recorded before it is changed, in a document that every change of it then requires to be there, so a document
can be removed at any moment, by anybody: who relied on it is told and records the key anew. Documents are never
rewritten. A key that is changed again and again is recorded once, until it has been quiet for a moment.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from typing import TypeVar

from .. import codec
from ..errors import IntegrityError
from ..models import new_id
from .base import StorageBackend
from .changes import Change, Delete, Move, Put, Quota, RemoveTree, Require
from .turn import Turn

T = TypeVar("T")

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
        self._held: list[tuple[list[Record], list[str]]] = []
        self._unneeded: dict[str, None] = {}
        self._failures = 0
        self._renewed = 0
        self._pauses = 0

    @property
    def count(self) -> int:
        """How many keys and folders are still to be copied."""
        with self._lock:
            return len(self._dirty) + len(self._copying) + sum(len(names) for _, names in self._held)

    # --- writing -------------------------------------------------------------------------------------

    async def cover(self, first: StorageBackend, names: Collection[str], conditions: Iterable[Change]) -> list[Record]:
        """Return records that hold all names, writing one to `first` if there is none; `release` them afterwards.

        Raises:
            NotFoundError: One of `conditions` does not hold.
        """
        held: dict[str, Record] = {}
        try:
            while missing := self._take(names, held):
                async with self._turn:
                    with self._lock:
                        self._waiting.update(name for name in missing if name not in self._where)
                        batch = frozenset(list(self._waiting)[:_MOST_KEYS])
                        self._waiting -= batch
                    if batch:
                        key = f"{self.folder}/{new_id()}.json"
                        await first.commit([*conditions, Put(key, codec.encode_document({"keys": sorted(batch)}))])
                        record = Record(key, batch)
                        record.users = 1  # from now on, for the rest may take long
                        held[key] = record
                        with self._lock:
                            self._records[key] = record
                            self._where.update(dict.fromkeys(batch, record))
        except BaseException:
            self.release(held.values(), ())
            raise
        with self._lock:
            needed = {self._where[name].key for name in names if name in self._where}
        self.release([record for key, record in held.items() if key not in needed], ())
        return [record for key, record in held.items() if key in needed]

    def _take(self, names: Iterable[str], held: dict[str, Record]) -> list[str]:
        """Hold the records that there are; return the names that are in none."""
        with self._lock:
            for name in names:
                record = self._where.get(name)
                if record is not None and record.key not in held:
                    record.users += 1
                    held[record.key] = record
            missing = [name for name in names if name not in self._where]
            self._waiting.update(missing)
            return missing

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
        """Return some names that are to be copied; none while somebody else copies."""
        with self._lock:
            found = [] if self._pauses else list(self._dirty)[:most]
            for name in found:
                del self._dirty[name]
            self._copying.update(found)
            return found

    @property
    def has_work(self) -> bool:
        """Whether `next` returns anything."""
        with self._lock:
            return bool(self._dirty) and not self._pauses

    def take(self, names: Iterable[str]) -> None:
        """Note that names are copied by somebody who was not told by `next`."""
        with self._lock:
            for name in names:
                self._dirty.pop(name, None)
                self._copying.add(name)

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Let `next` return nothing, and wait until what it returned is copied."""
        with self._lock:
            self._pauses += 1
        try:
            while self._copying:  # noqa: ASYNC110 - it is another thread that copies
                await asyncio.sleep(0.01)
            yield
        finally:
            with self._lock:
                self._pauses -= 1

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
            self._unneeded.update(dict.fromkeys(record.key for record in done))
            return list(self._unneeded)

    def dispose(self, key: str) -> None:
        """Let a document be removed with the next records."""
        with self._lock:
            self._unneeded[key] = None

    def removed(self, keys: Iterable[str]) -> None:
        """Note that what `retire` returned is gone."""
        with self._lock:
            for key in keys:
                self._unneeded.pop(key, None)

    @property
    def is_empty(self) -> bool:
        """Whether this process has no records."""
        with self._lock:
            return not self._records

    # --- renewing the mark of the second store -------------------------------------------------------

    def hold(self, records: list[Record], names: list[str]) -> None:
        """Keep records, whose names may be copied only when the mark has been renewed."""
        with self._lock:
            self._held.append((records, names))

    def fail(self) -> None:
        """Note that it is not known what has become of a copy: the mark is to be renewed before the next one."""
        with self._lock:
            self._failures += 1

    @property
    def to_renew(self) -> bool:
        """Whether the mark is to be renewed."""
        with self._lock:
            return bool(self._held) or self._failures > self._renewed

    async def renewing(self, renew: Callable[[], Awaitable[T]]) -> T:
        """Renew the mark, and let what waited for it be copied."""
        with self._lock:
            held, failures = list(self._held), self._failures
        result = await renew()
        with self._lock:
            self._renewed = max(self._renewed, failures)
            held = [each for each in held if each in self._held]  # another one may have been at it too
            self._held = [each for each in self._held if each not in held]
        for records, names in held:
            self.release(records, names)
        return result


def touched(changes: Iterable[Change]) -> list[str]:
    """Return the keys that changes may change, and folders, which end in a slash."""
    names: dict[str, None] = {}
    for change in changes:
        match change:
            case Move(source, target):
                names.update(dict.fromkeys([source, f"{source}/", target, f"{target}/"]))
            case RemoveTree(folder):
                names[f"{folder}/"] = None
            case Quota() | Require():
                pass
            case _:
                names[change.key] = None
    return list(names)


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
