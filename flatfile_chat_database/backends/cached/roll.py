"""What the store itself says of its cache: whether it may be used, and which run of which server it is.

A node that cannot reach the cache cannot tell the others through it, and they may reach it. So the word is with the
store, in one document, which only changes by compare-and-set:

    closed  --> opening --> open --> closing --> closed
    nobody       all who write      nobody may   nobody
    uses it      drop there what    use it any   uses it
                 they change        more

What a node has read of the document holds for a lease, counted from before it began to read, on its own clock. Nodes
may be set to different leases, so the document says how long anybody may believe that there is a cache; that there is
none is believed for half a second at most, for no document may be what says so. A phase that others may not know of
yet, opening and closing, lasts until the one who sees it has seen it for as long as anybody may believe the one before,
and an eighth more, so that clocks may run at different speeds. So:

- Nobody uses the cache before everybody who writes knows that it is used: they drop what they change there.
- Who cannot drop something says "closing", and waits for a lease: then nobody uses the cache any more.
- Between two epochs with a cache nobody uses one for longer than a lease, so what one node thinks and what the next one
  thinks are never two caches at once.

A store that may be behind others of its kind, a replica, cannot tell what they may believe: there is no cache for it.
Of two stores that are switched (`sides.py`), the one that becomes the first says "closing": some read the other one for
a moment, and may put into the cache what is old. Who knows of the switch believes nothing that the other one has said.

Nothing depends on clocks that agree, only on clocks that run: the one that is used goes on while a machine sleeps.
"""

from __future__ import annotations

import asyncio
import copy
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum

from ... import codec
from ...config import MOST_LEASE_SECONDS
from ...errors import ConflictError, IntegrityError, StorageError
from ...models import new_id
from ..base import StorageBackend, logger
from ..changes import ABSENT, Put
from ..rules import version_of
from ..turn import Turn

UNUSED_SECONDS = 0.5
"""How long anybody may believe that there is no cache."""


class Phase(StrEnum):
    """What a store says of its cache; see above."""

    CLOSED = "closed"
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"


@dataclass(frozen=True, slots=True)
class Word:
    """What a store says of its cache."""

    phase: Phase
    epoch: int = 0
    """Grows each time a cache is opened."""
    nonce: str = ""
    """Random each time a cache is opened: a document that was restored begins no epoch that there was before."""
    cache: str = ""
    """The id of the store's cache: several stores may share a server."""
    server: str = ""
    """The run of the server, which is another one after a restart."""
    lease: float = 0.0
    """Seconds for which anybody may believe that the cache is used."""
    version: str | None = None
    """Of the document; None if there is none."""
    is_behind: bool = False
    """Whether the store may be behind others, so that it cannot tell."""
    origin: str = ""
    """Which of two stores has said so, as this node knows it."""

    @property
    def opening(self) -> str:
        """What this opening of the cache is called, as part of the names in it."""
        return f"{self.epoch}-{self.nonce}"

    @property
    def is_written(self) -> bool:
        """Whether those who write have to drop there what they change."""
        return self.phase in (Phase.OPENING, Phase.OPEN)


def is_same(word: Word, other: Word) -> bool:
    """Tell whether two words are of the same opening of the same cache, whatever their phases."""
    return (word.cache, word.opening, word.is_behind) == (other.cache, other.opening, other.is_behind)


_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def clock() -> float:
    """Return seconds that go on while the machine sleeps."""
    return time.clock_gettime(_CLOCK)


class Roll:
    """The document, as far as this node knows it. It may be used by several threads and event loops."""

    def __init__(self, store: StorageBackend, key: str, lease: float) -> None:
        """Keep it at a key of a store; what was read of it holds for `lease` seconds."""
        self._store = store
        self.key = key
        self.lease = lease
        self._state = threading.Lock()
        self._turn = Turn()
        self._word = Word(Phase.CLOSED)
        self._begun = float("-inf")
        """When the reading began that the word is of."""
        self._first_seen = float("-inf")
        """When this node had surely seen this phase of this epoch, for the first time."""
        self._failed: tuple[float, StorageError] | None = None
        """When the last reading began that failed, and how."""

    @property
    def believing(self) -> float:
        """Seconds for which what was read last holds."""
        return min(self.lease, self._word.lease if self._word.is_written else UNUSED_SECONDS)

    @property
    def settling(self) -> float:
        """Seconds after which everybody knows what this node has just seen."""
        unused = UNUSED_SECONDS if self._word.phase is Phase.OPENING else 0.0
        return max(self._word.lease, unused) * 9 / 8

    @property
    def known(self) -> Word:
        """What was read last, however long ago."""
        return self._word

    @property
    def settled_at(self) -> float:
        """When everybody knows the phase that this node has seen."""
        return self._first_seen + self.settling

    def now(self) -> Word | None:
        """Return the word if it still holds."""
        return self._word if self._held_at(clock()) else None

    def _held_at(self, moment: float) -> bool:
        """Tell whether the word held at a moment, or was read after it, and of the store that is read from now."""
        return moment - self._begun < self.believing and self._word.origin == self._store.origin

    def is_older(self, seconds: float) -> bool:
        """Tell whether the last reading began longer ago."""
        return clock() - self._begun > seconds

    async def at(self, moment: float) -> Word:
        """Return a word that held at a moment or was read after it; read it if need be.

        Raises:
            StorageError: The store cannot be read.
        """
        if not self._held_at(moment):
            async with self._turn:  # one of many callers reads for all
                if not self._held_at(moment):
                    if self._failed is not None and self._failed[0] >= moment:  # and fails for all
                        raise copy.copy(self._failed[1])
                    await self.read()
        return self._word

    async def read(self) -> Word:
        """Read the document now.

        Raises:
            StorageError: The store cannot be read.
        """
        begun, origin = clock(), self._store.origin
        try:
            is_behind = await self._store.is_behind()
            data = None if is_behind else await self._store.read(self.key)
        except StorageError as error:
            self._failed = (begun, error)
            raise
        ended = clock()
        with self._state:
            if begun >= self._begun:
                word = Word(Phase.CLOSED, is_behind=True) if is_behind else self._understood(data)
                if not is_same(word, self._word) or word.phase is not self._word.phase:
                    # What is as it was before this node was made is nothing that others do not know.
                    is_new = self._begun > float("-inf") or word.phase in (Phase.OPENING, Phase.CLOSING)
                    self._first_seen = ended if is_new else float("-inf")
                self._word, self._begun = replace(word, origin=origin), begun
            return self._word

    def _understood(self, data: bytes | None) -> Word:
        if data is None:
            # It may have been removed while others believe what it said, for as long as that was.
            is_new = self._word.version is not None
            return Word(Phase.CLOSING, lease=MOST_LEASE_SECONDS) if is_new else replace(self._word, is_behind=False)
        version = version_of(data)
        try:
            found = codec.decode_object(data, self.key)
            texts = [found[name] for name in ("nonce", "cache", "server")]
            phase, epoch, lease = Phase(found["phase"]), found["epoch"], found["lease"]
            is_lease = isinstance(lease, int | float) and 0 < lease <= MOST_LEASE_SECONDS
            if is_lease and isinstance(epoch, int) and all(isinstance(text, str) for text in texts):
                nonce, cache, server = texts
                return Word(phase, epoch, nonce, cache, server, lease, version)
        except (KeyError, ValueError, IntegrityError):
            pass
        if self._word.version != version:
            logger.warning("%s does not say whether the cache may be used, so it is not used", self.key)
        return Word(Phase.CLOSING, lease=MOST_LEASE_SECONDS, version=version)

    async def change(self, word: Word, phase: Phase, *, server: str | None = None) -> Word:
        """Go on from a word to the next phase, unless somebody else has; return what it is then.

        Raises:
            StorageError: The store cannot be written or read.
        """
        opens = phase is Phase.OPENING
        content = {
            "about": "whether a cache in front of this store may be used; nobody may remove this while it is in use",
            "phase": phase.value,
            "epoch": word.epoch + opens,
            "nonce": os.urandom(8).hex() if opens else word.nonce,
            "cache": word.cache or new_id(),
            "server": word.server if server is None else server,
            "lease": self.lease if opens else word.lease,
        }
        expected = ABSENT if word.version is None else word.version
        with suppress(ConflictError):  # somebody else was first
            await self._store.commit([Put(self.key, codec.encode_document(content), expected)])
        return await self.read()

    async def give_up(self, word: Word, reason: str) -> None:
        """Say that nobody may use the cache any more, if it is still that epoch.

        Raises:
            StorageError: The store cannot be written or read; others may go on using the cache.
        """
        async with self._turn:
            now = await self.read()
            while now.is_written and is_same(now, word):
                logger.warning("the cache is given up until it can be used again, after a write: %s", reason)
                now = await self.change(now, Phase.CLOSING)

    async def wait_until_settled(self) -> None:
        """Wait until everybody knows the phase that this node has seen."""
        await asyncio.sleep(max(0.0, self.settled_at - clock()))
