"""Carrying to the second of two stores what the first has, so that nothing is lost whoever dies or is slow.

Three things make it so. *Records*: a key is carried only while a record of this process names it in the first store,
from before it is looked at until both were seen to be equal; so the last one who changed a key in either store has a
record of it until it has looked again, and what no record names is equal. *The mark*: every change of the second store
requires the mark, which was read before the record was seen to be there. *The fence*: the mark is renewed after a
record was taken from somebody, after a copy failed in a way that leaves open whether it arrives, and after the first
store was closed for a switch; only then are the keys looked at. So a copy that was begun before, by whoever is slow or
dead by now, has either arrived and is seen, or is refused for ever; and whoever begins anew finds its record gone and
writes another, or sees the store as it stays. A switch therefore has to look at no more than the records name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ..errors import DurabilityError, NotFoundError, StorageError, UnavailableError
from ..layout import Layout
from .alike import Alike, keys_below
from .behind import Behind, Record, names_in, removal, requirements
from .changes import Change, Require
from .sides import Sides
from .writers import Writers

AT_ONCE = 16
"""So many keys are copied at the same time."""
_ATTEMPTS = 20


class Carrier:
    """Carries from one side to the other; used by one event loop, until the stores are switched."""

    def __init__(self, layout: Layout, sides: Sides, side: int, behind: Behind, writers: Writers) -> None:
        """Carry from the store `side`."""
        self.first, self.second = sides.stores[side], sides.stores[1 - side]
        self.layout = layout
        self._sides = sides
        self._to = 1 - side
        self._behind = behind
        self._writers = writers
        self.alike = Alike(layout, self.first, self.second)
        self._mark: Require | None = None
        self._checked: set[str] = set()
        self._turn = asyncio.Lock()

    # --- under which conditions ----------------------------------------------------------------------

    async def renew(self) -> None:
        """Refuse whatever was begun before."""
        self._behind.fail()
        await self._permission()

    async def _permission(self) -> Require:
        """Return the mark of now; what was not renewed yet is, first."""
        if self._behind.to_renew:
            self._use(await self._behind.renewing(lambda: self._sides.renew(self._to)))
        if self._mark is None:
            self._use(await self._sides.mark(self._to))
        assert self._mark is not None
        return self._mark

    def _use(self, mark: Require) -> None:
        self._mark = mark
        self._checked.clear()  # a record may have been taken since
        self.alike.forget()

    async def _covered(self, names: Sequence[str], conditions: Sequence[Change]) -> list[Record]:
        """Return records of this process that name all, and were there after the mark was."""
        while True:
            records = await self._behind.cover(self.first, names, conditions)
            try:
                new = [record.key for record in records if record.key not in self._checked]
                there = await self.first.read_many(new)
            except BaseException:
                self._behind.release(records, ())
                raise
            gone = [key for key, data in zip(new, there, strict=True) if data is None]
            if not gone:
                self._checked.update(new)
                return records
            self._behind.release(records, ())
            for key in gone:
                self._behind.forget(key)

    # --- carrying ------------------------------------------------------------------------------------

    async def carry(self, names: Sequence[str], conditions: Sequence[Change] | None = None) -> list[str]:
        """Make the second store have what the first has at keys, and below folders, which end in a slash.

        Return keys that somebody changes all the time, so that what came last may be missing; they stay recorded.

        Raises:
            StorageError: One of the two stores cannot be used; the names are to be copied again.
            NotFoundError: They are switched, or about to be.
        """
        work = _Work(names, [self._sides.is_open] if conditions is None else conditions)
        missed = list(names)
        try:
            await self._allowed(work)
            results = await asyncio.gather(*(self._copy(name, work) for name in names), return_exceptions=True)
            errors = {
                name: result for name, result in zip(names, results, strict=True) if isinstance(result, BaseException)
            }
            missed = list(errors)
            for error in errors.values():
                raise error
            return work.restless
        except BaseException as error:
            if not isinstance(error, StorageError) or isinstance(error, UnavailableError | DurabilityError):
                self._behind.fail()
            raise
        finally:
            self._behind.release(work.records, [*missed, *work.restless])

    async def _copy(self, name: str, work: _Work) -> None:
        if name and not name.endswith("/"):
            await self._make(name, work)
            return
        async for run in keys_below(self.first, self.second, name):
            for at in range(0, len(run), AT_ONCE):
                part = [key for key in run[at : at + AT_ONCE] if not self.layout.is_of_mirror(key)]
                results = await asyncio.gather(*(self._make(key, work) for key in part), return_exceptions=True)
                for error in results:
                    if error is not None:
                        raise error

    async def _make(self, key: str, work: _Work) -> None:
        for _ in range(_ATTEMPTS):
            mark = await self._allowed(work)
            try:
                if not await self.alike.make(key, mark):
                    work.records += await self._covered([key], work.conditions)  # what names it may be a folder
                    work.restless.append(key)
                return
            except NotFoundError as error:
                if not self._sides.is_refusal(error):
                    raise
            if self._mark is mark:
                self._mark = None
        raise UnavailableError(f"{key} cannot be copied now: others begin again and again.", key=key)

    async def _allowed(self, work: _Work) -> Require:
        """Return the mark, once the records were seen to be there under it."""
        if work.mark is not None and work.mark is self._mark:
            return work.mark
        async with self._turn:
            mark = await self._permission()
            work.records += await self._covered(work.names, work.conditions)
            work.mark = mark
            return mark

    # --- what records name ---------------------------------------------------------------------------

    async def drain(self, conditions: Sequence[Change] | None = None) -> tuple[list[str], list[str]]:
        """Carry all that the records of now name, whose ever they are; return the records' keys, and restless ones."""
        keys, names = await self.recorded()
        restless: list[str] = []
        for at in range(0, len(names), AT_ONCE):
            part = names[at : at + AT_ONCE]
            self._behind.take(part)
            try:
                restless += await self.carry(part, conditions)
            except BaseException:
                self._behind.copied(part, missed=part)
                raise
            self._behind.copied(part)
        return keys, restless

    async def recorded(self) -> tuple[list[str], list[str]]:
        """Return the keys of all records, and what they name."""
        listed = await self._writers.listed(self.first)
        keys = [key for kept in listed.values() for key in kept.records]
        names: dict[str, None] = {}
        for key in keys:
            names.update(dict.fromkeys(names_in(await self.first.read(key), key)))
        return keys, list(names)

    async def take_over(self, *, at_once: bool = False) -> None:
        """Record anew what writers who have left have recorded, or all others, and remove their records.

        A writer that still uses one is told, and records its keys anew as well.
        """
        listed = await self._writers.listed(self.first)
        left = await self._writers.left(self.first, listed)
        for writer, kept in listed.items():
            if writer in left or (at_once and writer != self._writers.me):
                for key in kept.records:
                    await self._take(key)
            if writer in left:
                await self.first.commit([self._sides.is_open, *self._writers.removal(writer)])
        if self._behind.to_renew:
            async with self._turn:
                await self._permission()

    async def _take(self, key: str) -> None:
        names = names_in(await self.first.read(key), key)
        conditions: list[Change] = [self._sides.is_open]
        records = await self._behind.cover(self.first, names, conditions)
        own = requirements(records)
        try:
            await self.first.commit([*conditions, Require(key, "The record"), *own, *removal([key])])
        except NotFoundError as error:  # somebody else has taken it, or one of this process's
            self._behind.release(records, ())
            if error.key in [record.key for record in records]:
                self._behind.forget(error.key)
            if error.key == self._sides.open_key:
                raise
        except BaseException:
            self._behind.hold(records, names)
            raise
        else:
            self._behind.hold(records, names)

    async def wait_for_busy(self, conditions: Sequence[Change]) -> None:
        """Wait until nobody does anything in the first store that has no conditions."""
        pause = 0.01
        while True:
            listed = await self._writers.listed(self.first)
            busy = {writer for writer, kept in listed.items() if kept.busy}
            for writer in set(await self._writers.left(self.first, listed)) & busy:
                await self.first.commit([*conditions, *self._writers.removal(writer)])
                busy.discard(writer)
            if not busy:
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.5)


class _Work:
    """What is carried together."""

    def __init__(self, names: Sequence[str], conditions: Sequence[Change]) -> None:
        self.names = names
        self.conditions = conditions
        self.records: list[Record] = []
        self.restless: list[str] = []
        self.mark: Require | None = None
        """Under which the records were seen to be there."""
