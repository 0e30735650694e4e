"""Which of two stores is the first one, and how that changes while others write.

Each store has a document of its state: an epoch, and a phase. In the first store the phase is "open", and a mark stands
beside it that every write requires to be there. In the second it is "moved", and names another mark, which everything
that is copied there requires. To switch, the phase becomes "closed" and the mark goes, so nobody can write; when the
other store has everything, the phase becomes "moved", which is the decision, and then the other store opens with the
next epoch, and is not copied to any more. Each step is one commit on the condition that the state is as the step before
left it, so whoever dies between two of them leaves what others go on from.

The mark of the second store never has the name of an earlier one, and can be renewed: from then on whatever was looked
at before is refused there, however late it comes. `carrier.py` says when that has to be done, and why it is enough.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from .. import codec
from ..config import MOST_LEASE_SECONDS
from ..errors import ConfigurationError, ConflictError, IntegrityError, NotFoundError, StorageError, UnavailableError
from ..layout import Layout
from ..models import new_id
from .base import StorageBackend
from .changes import ABSENT, Change, Delete, Put, RemoveTree, Require
from .places import is_copy, refuse_nested, same_store
from .rules import not_found, version_of
from .writers import everything

CLOSED_SECONDS = 60.0
"""After which a switch that has come to nothing is undone by whoever wants to write."""

LAG_SECONDS = 2.0
"""After a switch nobody reads for so long from the store that was the first one."""
_MARK = b"{}\n"
_MAY_COPY = "The permission to copy to this store"
_NAMES = ("first store", "second store")


@dataclass(frozen=True, slots=True)
class State:
    """What a store says of itself."""

    epoch: int
    phase: str
    """"open", "closed" or "moved"."""
    until: float
    """When "closed": seconds since 1970 after which it may be opened again."""
    version: str
    mark: str = ""
    """When "moved": the name of the mark."""


class Sides:
    """Two stores, and what each says."""

    def __init__(self, layout: Layout, stores: Sequence[StorageBackend]) -> None:
        self.stores = stores
        self._layout = layout
        self._key = layout.mirror_state
        self.open_key = layout.mirror_open
        self._marks = layout.mirror_second
        self._writers = layout.mirror_writers
        self._cache = layout.cache_state

    @property
    def is_open(self) -> Change:
        """The condition that the first store is open."""
        return Require(self.open_key, "The permission to write to this store")

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
        return State(epoch, str(phase), float(until), version_of(data), str(found.get("mark", "")))

    async def first(self, guess: int) -> tuple[int, State | None]:
        """Return which store is the first one, 0 or 1, and its state; None if nothing was written yet.

        If the store `guess` says that it is, the other one is not asked.

        Raises:
            ConfigurationError: One was left for a store that is not the other one.
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
        if states.get(side) is None:
            await self._require_kept(side)
        await self.make_open(side, epoch + 1)
        return side, await self.state(side)

    async def begin(self) -> None:
        """Make the second store one that may be copied to, and open the first.

        Raises:
            ConfigurationError: They are one store, or the second one is another store; nothing has changed.
            StorageError: One of the two is out of reach.
        """
        await self.require_copy(1)
        with suppress(ConflictError):  # somebody else is at it
            mark = await self._put_second(1, 0, None)
            state = await self.state(0)
            if state is not None and state.mark == mark:  # two names of one server, for instance
                await self.stores[1].commit([RemoveTree(self._layout.mirror)])
                raise same_store(_NAMES)
        await self.make_open(0, 1)

    async def require_copy(self, side: int) -> None:
        """Refuse a second store that is no copy of the first one, for what is in it would be replaced.

        Raises:
            ConfigurationError: It is another store, or holds something else, or has the place of the first one.
            StorageError: One of the two is out of reach.
        """
        first, second = self.stores[1 - side], self.stores[side]
        await asyncio.to_thread(refuse_nested, first, second, _NAMES)
        await second.open()
        await first.open()
        # The second one before the first, which has whatever others copy meanwhile.
        theirs = await self._own_file(second)
        ours = await self._own_file(first)
        if theirs is not None:
            if is_copy(ours, theirs):
                return
        elif not await self._holds_something(second) or await self.state(side) is not None:
            return  # empty, or it is being filled
        elif ours is None and await self._holds_something(first):
            return  # no stores of a StorageManager: nothing tells what they are
        raise ConfigurationError(
            "The second store is not empty, and is no copy of the first one. Nothing was changed.",
            hint="Look whether `from` and `to` are the right way round, or name an empty place.",
        )

    async def _require_kept(self, side: int) -> None:
        """Refuse a store that says nothing where the other one says that it was left for it, unless that may be so.

        Raises:
            ConfigurationError: It is another store, or empty; what the other one has would be replaced.
        """
        kept, left = [await self._own_file(self.stores[each]) for each in (side, 1 - side)]
        if kept is left is None or is_copy(kept, left):
            return
        raise ConfigurationError(
            f"The {_NAMES[1 - side]} was left for another one when a mirror was switched or stopped, and the "
            f"{_NAMES[side]} is not that one. Nothing was changed.",
            hint="Name the store that was kept, or copy the one that was left to an empty place by `chatdb migrate`.",
        )

    async def _own_file(self, store: StorageBackend) -> bytes | None:
        return await store.read(self._layout.key("store"))

    async def _holds_something(self, store: StorageBackend) -> bool:
        """Tell whether there is more in a store than what a mirror or a cache keeps there."""
        system = self._layout.system
        if [child for child in await store.list_children("") if child != system]:
            return True
        children = await store.list_children(system)
        return any(not self._layout.is_of_front(f"{system}/{child}") for child in children)

    async def make_open(self, side: int, epoch: int) -> None:
        """Open a store with an epoch, unless it has that already.

        A store that says nothing may have been written past the record: everything in it is recorded as lacking.
        """
        state = await self.state(side)
        if state is not None and state.epoch >= epoch:
            return
        more: list[Change] = [Put(self.open_key, _MARK), RemoveTree(self._marks)]
        if state is None:
            more.append(everything(self._writers))
        if epoch > 1 and (cache := await self.stores[side].read(self._cache)) is not None:
            more.append(Put(self._cache, _closing(cache, self._cache)))
        with suppress(ConflictError):  # somebody else did
            await self._put(side, {"epoch": epoch, "phase": "open"}, state, more)

    # --- copying to the second -----------------------------------------------------------------------

    async def mark(self, side: int) -> Require:
        """Return the condition under which the second store may be copied to.

        Raises:
            NotFoundError: It is not the second one; `is_refusal` tells.
            ConfigurationError: It is another store.
        """
        state = await self.state(side)
        if state is None:
            # It said what it is once, or never did. The first store may have been written alone since.
            await self.require_copy(side)
            opened = await self.state(1 - side)
            await self.stores[1 - side].commit([self.is_open, everything(self._writers)])
            with suppress(ConflictError):  # somebody else is at it
                await self._put_second(side, 0 if opened is None else opened.epoch - 1, None)
            state = await self.state(side)
        if state is None or state.phase != "moved":
            raise not_found(_MAY_COPY, self._marks)
        return self._require(state.mark) if state.mark else await self.renew(side)

    async def renew(self, side: int) -> Require:
        """Refuse all that was begun under an earlier mark of the second store, and return the new one.

        Raises:
            NotFoundError: It is not the second one.
        """
        state = await self.state(side)
        if state is None:
            return await self.mark(side)
        if state.phase != "moved":
            raise not_found(_MAY_COPY, self._marks)
        try:
            return self._require(await self._put_second(side, state.epoch, state))
        except ConflictError:  # somebody else has renewed it after this was called, or switched
            return await self.mark(side)

    def is_refusal(self, error: BaseException) -> bool:
        """Tell whether an error says that the mark is not there any more."""
        key = getattr(error, "key", None) or ""
        return isinstance(error, NotFoundError) and (key == self._marks or key.startswith(f"{self._marks}/"))

    def _require(self, mark: str) -> Require:
        return Require(f"{self._marks}/{mark}.json", _MAY_COPY)

    async def _put_second(self, side: int, epoch: int, before: State | None, more: Sequence[Change] = ()) -> str:
        mark = new_id()
        put = Put(self._require(mark).key, _MARK)
        await self._put(
            side, {"epoch": epoch, "phase": "moved", "mark": mark}, before, [RemoveTree(self._marks), put, *more]
        )
        return mark

    # --- switching -----------------------------------------------------------------------------------

    async def close(self, side: int, state: State) -> State:
        """Let nobody write any more, for a while.

        Raises:
            ConflictError: The state is another by now.
        """
        until = time.time() + CLOSED_SECONDS
        closed = _closed(state.epoch, until)
        version = await self._put(side, closed, state, [Delete(self.open_key)])
        return State(state.epoch, "closed", until, version)

    async def reopen(self, side: int, closed: State) -> None:
        """Undo `close`; do nothing if somebody else went on from there."""
        with suppress(ConflictError):
            await self._put(side, {"epoch": closed.epoch, "phase": "open"}, closed, [Put(self.open_key, _MARK)])

    def still_closed(self, closed: State) -> Change:
        """Return the condition that nobody has gone on from `close`."""
        return Put(self._key, codec.encode_document(_closed(closed.epoch, closed.until)), closed.version)

    async def move(self, side: int, closed: State, more: Sequence[Change] = ()) -> None:
        """Decide that the other store is the first one, with further changes; `make_open` is to follow.

        Raises:
            ConflictError: It took so long that somebody has opened this one again.
        """
        await self._put_second(side, closed.epoch, closed, more)

    # --- ending --------------------------------------------------------------------------------------

    async def leave(self, side: int) -> None:
        """Leave nothing in a store, now the second for good, but that the other one is the first.

        A process that was forgotten and still has the URL of both then goes on with the right one. Without it, it would
        begin anew, and replace by what was then what has been written since.
        """
        state = await self.state(side)
        parts: list[Change] = [RemoveTree(self._marks), RemoveTree(self._writers), Delete(self.open_key)]
        if state is not None:
            put = Put(self._key, codec.encode_document({"epoch": state.epoch, "phase": "moved"}), state.version)
            parts.insert(0, put)
        await self.stores[side].commit([*parts, Delete(self._cache)])

    async def _put(self, side: int, content: dict[str, object], before: State | None, more: Sequence[Change]) -> str:
        put = Put(self._key, codec.encode_document(content), ABSENT if before is None else before.version)
        return str((await self.stores[side].commit([put, *more]))[0])


def _closed(epoch: int, until: float) -> dict[str, object]:
    return {"epoch": epoch, "phase": "closed", "until": until}


def unreachable(error: StorageError) -> UnavailableError:
    """Return the error for work that needs both stores."""
    return UnavailableError(
        f"The second store cannot be used now: {error.message}", hint="Both have to be in reach for this; try again."
    )


def _closing(cache: bytes, key: str) -> bytes:
    """Return what a store says of the cache in front of it (`cached/roll.py`), but that nobody may use it any more."""
    try:
        found = codec.decode_object(cache, key)
        lease = min(float(found["lease"]) + LAG_SECONDS, MOST_LEASE_SECONDS)
    except (IntegrityError, KeyError, TypeError, ValueError):
        return cache  # it is not used, for nobody understands it
    return codec.encode_document(found | {"phase": "closing", "lease": lease})
