"""Which of two stores is the first one, and how that changes while others write.

Each store has a document of its state: an epoch, and a phase. In the first store the phase is "open", and a mark stands
beside it that every write requires to be there. In the second it is "moved", and stands beside another mark, which
everything that is copied there requires. To switch, the phase becomes "closed" and the mark goes, so nobody can write;
when the other store has everything, the phase becomes "moved", which is the decision, and then the other store opens
with the next epoch, and is not copied to any more. Each step is one commit on the condition that the state is as the
step before left it, so whoever dies between two of them leaves what others go on from, and whoever comes late with what
was right before the switch changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from .. import codec
from ..errors import ConflictError, IntegrityError, StorageError, UnavailableError
from ..layout import Layout
from .base import StorageBackend
from .changes import ABSENT, Change, Delete, Put
from .rules import version_of

CLOSED_SECONDS = 60.0
"""After which a switch that has come to nothing is undone by whoever wants to write."""

_MARK = b"{}\n"


@dataclass(frozen=True, slots=True)
class State:
    """What a store says of itself."""

    epoch: int
    phase: str
    """"open", "closed" or "moved"."""
    until: float
    """When "closed": seconds since 1970 after which it may be opened again."""
    version: str


class Sides:
    """Two stores, and what each says."""

    def __init__(self, layout: Layout, stores: Sequence[StorageBackend]) -> None:
        self.stores = stores
        self._key = layout.mirror_state
        self.open_key = layout.mirror_open
        self.second_key = layout.mirror_second
        self._records = layout.mirror_records

    async def state(self, side: int) -> State | None:
        """Return what a store says, None if nothing.

        Raises:
            IntegrityError: It cannot be understood.
        """
        store = self.stores[side]
        await store.open()
        data = await store.read(self._key)
        if data is None:
            return None
        found = codec.decode_object(data, self._key)
        epoch, phase, until = found.get("epoch"), found.get("phase"), found.get("until", 0)
        if not isinstance(epoch, int) or phase not in ("open", "closed", "moved") or not isinstance(until, int | float):
            raise IntegrityError(f"{self._key} does not say which store is the first.", key=self._key)
        return State(epoch, str(phase), float(until), version_of(data))

    async def first(self, guess: int) -> tuple[int, State | None]:
        """Return which store is the first one, 0 or 1, and its state; None if nothing was written yet.

        If the store `guess` says that it is, the other one is not asked.

        Raises:
            StorageError: It cannot be told, for a store is out of reach.
        """
        states: dict[int, State | None] = {}
        problem: StorageError | None = None
        for side in (guess, 1 - guess):
            try:
                states[side] = await self.state(side)
            except StorageError as error:
                problem = error
                continue
            state = states[side]
            if state is not None and state.phase != "moved":
                return side, state
        if problem is not None:
            raise problem
        decided = {state.epoch: side for side, state in states.items() if state is not None}
        if not decided:
            return 0, None
        epoch = max(decided)
        side = 1 - decided[epoch]
        await self.make_open(side, epoch + 1)
        return side, await self.state(side)

    async def begin(self) -> None:
        """Make the second store one that may be copied to, and open the first.

        Raises:
            StorageError: One of the two is out of reach.
        """
        with suppress(ConflictError):  # somebody else is at it
            await self._put(1, {"epoch": 0, "phase": "moved"}, None, [Put(self.second_key, _MARK)])
        await self.make_open(0, 1)

    async def make_open(self, side: int, epoch: int) -> None:
        """Open a store with an epoch, unless it has that already; at first all that it holds is recorded as lacking."""
        state = await self.state(side)
        if state is not None and state.epoch >= epoch:
            return
        more: list[Change] = [Put(self.open_key, _MARK), Delete(self.second_key)]
        if epoch == 1:
            more.append(Put(f"{self._records}/first.json", b'{"keys":[""]}\n'))
        with suppress(ConflictError):  # somebody else did
            await self._put(side, {"epoch": epoch, "phase": "open"}, state, more)

    async def close(self, side: int, state: State) -> State:
        """Let nobody write any more, for a while.

        Raises:
            ConflictError: The state is another by now.
        """
        until = time.time() + CLOSED_SECONDS
        closed = {"epoch": state.epoch, "phase": "closed", "until": until}
        version = await self._put(side, closed, state, [Delete(self.open_key)])
        return State(state.epoch, "closed", until, version)

    async def reopen(self, side: int, closed: State) -> None:
        """Undo `close`; do nothing if somebody else went on from there."""
        with suppress(ConflictError):
            await self._put(side, {"epoch": closed.epoch, "phase": "open"}, closed, [Put(self.open_key, _MARK)])

    async def move(self, side: int, closed: State) -> None:
        """Decide that the other store is the first one, and open it.

        Raises:
            ConflictError: It took so long that somebody has opened this one again.
        """
        more = [Put(self.second_key, _MARK)]  # with the decision, not before it
        await self._put(side, {"epoch": closed.epoch, "phase": "moved"}, closed, more)
        await self.make_open(1 - side, closed.epoch + 1)

    async def _put(self, side: int, content: dict[str, object], before: State | None, more: Sequence[Change]) -> str:
        put = Put(self._key, codec.encode_document(content), ABSENT if before is None else before.version)
        return str((await self.stores[side].commit([put, *more]))[0])


def unreachable(error: StorageError) -> UnavailableError:
    """Return the error for work that needs both stores."""
    return UnavailableError(
        f"The second store cannot be used now: {error.message}", hint="Both have to be in reach for this; try again."
    )
