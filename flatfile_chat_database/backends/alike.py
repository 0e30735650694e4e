"""Making what is at a key in one store the same as in another, by looking at both; whoever else writes meanwhile.

Several processes may do so at once, and the store that is copied may change at any moment. So whoever changed the
second store looks again, and is done only when nothing was to be changed: one who was late with an older state finds
that out.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from typing import cast
from weakref import WeakValueDictionary

from .. import codec
from ..errors import ConflictError, NotFoundError, StorageError, UnavailableError, ValidationError
from ..layout import Layout, Shape
from ..models import new_id
from .base import LogPart, Snapshot, StorageBackend
from .changes import ABSENT, Append, Change, Delete, Move, Put, Require
from .rules import version_of

_ATTEMPTS = 50
_PATIENCE = 4
"""So often both have to be equal before less will do, as for a log to which somebody adds without a rest."""
_BY_LINE = 2
"""So often it is tried to append what a large log has more; then it is copied whole, as bytes."""
_HELD_BYTES = 1 << 20
"""What is larger is compared and copied in chunks."""
_REMEMBERED = 10_000


class Alike:
    """Copies keys from `first` to `second`; used by one event loop."""

    def __init__(self, layout: Layout, first: StorageBackend, second: StorageBackend) -> None:
        self._layout = layout
        self.first = first
        self.second = second
        self._staging = f"{layout.mirror_second}/staged"  # whoever renews the mark removes it
        self._ends: dict[str, tuple[str, int]] = {}
        """Logs that were equal: their identity, and up to where."""
        self._put: set[str] = set()
        """Keys that were copied whole, and not yet seen to be equal."""
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """Of keys that somebody is at: what one remembers would not be so any more when another one changes it."""

    async def make(self, key: str, mark: Require) -> bool:
        """Make the second store have what the first has at a key, on the condition that a mark is there.

        Return whether both were equal then. If not, the second has what was there when this was called, or what came
        later; somebody changes it all the time, and it has to be looked at again.

        Raises:
            NotFoundError: The mark is gone.
            StorageError: One of the two cannot be read or written.
        """
        async with self._turns.setdefault(key, asyncio.Lock()):
            return await self._make(key, mark)

    async def _make(self, key: str, mark: Require) -> bool:
        self._put.discard(key)
        size = 0
        for attempt in range(_ATTEMPTS):
            if await self._grow(key, mark) or await self._compare(key, mark, by_line=attempt < _BY_LINE):
                return True
            if attempt == 0:
                size = await self.size(key)
            elif attempt >= _PATIENCE and (key in self._put or await self.holds(key, size)):
                return False
        raise UnavailableError(f"{key} changes too often to be copied now.", key=key)

    def forget(self) -> None:
        """Forget which logs were equal: somebody else may have begun to make one anew, and not come to an end."""
        self._ends.clear()

    async def is_equal(self, key: str) -> bool:
        """Tell whether both stores have the same at a key."""
        return await self._compare(key, None)

    async def size(self, key: str) -> int:
        """Return how many bytes a log of the first store has; 0 for anything else."""
        if await self._end_of(key) is None:
            return 0
        try:
            async with aclosing(_chunks(self.first, key)) as chunks:
                return sum([len(chunk) async for chunk in chunks])
        except NotFoundError:
            return 0

    async def holds(self, key: str, size: int) -> bool:
        """Tell whether the second store has that much of a log of the first, or more, and nothing else."""
        return size > 0 and (await _same_chunks(self.first, self.second, key))[0] >= size

    # --- logs that have grown ------------------------------------------------------------------------

    async def _grow(self, key: str, mark: Require) -> bool:
        """Append the new messages of a log that was equal up to some place; return False if it has to be compared."""
        known = self._ends.pop(key, None)
        return known is not None and await self._continue(key, mark, *known)

    async def _continue(self, key: str, mark: Require, identity: str, start: int, skipped: int = 0) -> bool:
        """Append what a log has behind an offset, and some bytes more, in portions."""
        while True:
            part = await self.first.read_log_part(key, identity, start)
            if part is None or part.identity != identity or part.start != start or not _is_gapless(part):
                return False
            lines = [line + b"\n" for _, line in part.lines]
            while lines and skipped:
                skipped -= len(lines.pop(0))
            if skipped < 0 or not await self._append(key, mark, lines, identity, part.end):
                return False
            if not part.more:
                self._remember(key, identity, part.end)
                return True
            start = part.end

    async def _append(self, key: str, mark: Require, lines: Sequence[bytes], identity: str, end: int) -> bool:
        """Append lines that the first store has up to `end`; return False if the log has to be compared."""
        if any(codec.line_id(line[:-1]) is None for line in lines):
            return False
        if lines:
            try:
                added = (await self.second.commit([mark, Append(key, tuple(lines))]))[1]
            except ValidationError:
                return False  # another message has the id, as it can be in a log but not become
            if added != len(lines):
                return False  # one is in it twice, or somebody else is at it
            now = await self.first.read_log_part(key, identity, end)
            if now is None or now.identity != identity or now.start != end:
                return False  # what was appended may be gone from it by now
        return True

    def _remember(self, key: str, identity: str, end: int) -> None:
        self._ends.pop(key, None)
        if len(self._ends) >= _REMEMBERED:
            del self._ends[next(iter(self._ends))]
        self._ends[key] = identity, end

    async def _end_of(self, key: str) -> tuple[str, int] | None:
        """Return the identity of a log in the first store, and where it ends; None if it is none, or absent."""
        place = self._layout.parse(self._layout.origin(key))
        if place is None or place.entry.shape is not Shape.LOG:
            return None
        identity, end = None, 0
        while (part := await self.first.read_log_part(key, identity, end)) is not None:
            identity, end = part.identity, part.end
            if not part.more:
                return identity, end
        return None

    # --- anything ------------------------------------------------------------------------------------

    async def _compare(self, key: str, mark: Require | None, *, by_line: bool = True) -> bool:
        """Return whether both are equal; if not, and there is a mark, change the second so that they should be then."""
        # The second store first: so a log that goes on growing has in the first what it has in the second, and more.
        other = await _held(self.second, key)
        end = await self._end_of(key)
        one = await _held(self.first, key)
        if one is None or other is None:
            return await self._compare_large(key, mark, end if by_line else None)
        mine, theirs = one[0], other[0]
        if mine == theirs:
            if end is not None and mine is not None and mine.endswith(b"\n"):
                self._remember(key, *end)  # if it has grown since, lines are appended that are there, and noticed
            return True
        if mark is None:
            return False
        if by_line and end and mine is not None and theirs is not None and _is_beginning(theirs, mine):
            lines = [line + b"\n" for line in mine[len(theirs) : -1].split(b"\n")]
            if await self._append(key, mark, lines, *end):
                self._remember(key, *end)
                return True
            other = await _held(self.second, key)
            if other is None:
                return False
            theirs = other[0]
        expected = ABSENT if theirs is None else version_of(theirs)
        changes: list[Change] = [
            Put(key, b"" if mine is None else mine, expected),
            *([Delete(key)] if mine is None else []),
        ]
        with suppress(ConflictError):  # somebody else is at it
            await self.second.commit([mark, *changes])
            self._put.add(key)
        return False

    async def _compare_large(self, key: str, mark: Require | None, end: tuple[str, int] | None) -> bool:
        was_there = await self.second.exists(key)  # or it would be what somebody else begins to copy now
        same, is_all = await _same_chunks(self.first, self.second, key)
        if is_all or mark is None:
            if is_all and end is not None:
                self._remember(key, *end)
            return is_all
        if end is not None:
            is_anew = not same and was_there
            if is_anew:
                await self.second.commit([mark, Delete(key)])
            is_done = await self._continue(key, mark, end[0], 0, skipped=same)
            if is_anew:  # others may have gone on with what was removed
                self._ends.pop(key, None)
            return is_done and not is_anew
        # Beside its key first: so it gets there on the same condition as everything else.
        staged = f"{self._staging}/{new_id()}"
        try:
            await self.second.write_blob(staged, self.first.read_blob(key))
            with suppress(ConflictError):  # somebody else is at it
                await self.second.commit([mark, Delete(key)])
                await self.second.commit([mark, Move(staged, key)])
                self._put.add(key)
        except NotFoundError as error:
            if error.key != key:
                raise
            await self.second.commit([mark, Delete(key)])  # it is gone from the first
        finally:
            with suppress(StorageError):
                await self.second.delete(staged)
        return False


def _is_gapless(part: LogPart) -> bool:
    """Tell whether a part holds every line between its offsets, which may be of bytes or of lines."""
    ends = [*(offset for offset, _ in part.lines[1:]), part.end]
    if not part.lines or part.lines[0][0] != part.start:
        return not part.lines and part.start == part.end
    sizes = [end - offset for (offset, _), end in zip(part.lines, ends, strict=True)]
    return sizes == [1] * len(sizes) or sizes == [len(line) + 1 for _, line in part.lines]


def _is_beginning(old: bytes, new: bytes) -> bool:
    """Tell whether a log can be had from another by appending whole lines."""
    return len(old) < len(new) and new.startswith(old) and old[-1:] in (b"", b"\n") and new.endswith(b"\n")


async def _held(backend: StorageBackend, key: str) -> tuple[bytes | None] | None:
    """Return the bytes at a key, (None,) if it is absent, None if they are too many to be held."""
    gathered = bytearray()
    try:
        async with aclosing(_chunks(backend, key)) as chunks:
            async for chunk in chunks:
                gathered += chunk
                if len(gathered) > _HELD_BYTES:
                    return None
    except NotFoundError:
        return (None,)
    except UnavailableError:
        if await backend.exists(key):
            raise
        return (None,)  # a folder of files, which is no key
    return (bytes(gathered),)


async def _same_chunks(one: StorageBackend, other: StorageBackend, key: str) -> tuple[int, bool]:
    """Return how many bytes `other` has if they begin those of `one`, else 0; and whether it has all."""
    same = 0
    try:
        async with aclosing(_chunks(one, key)) as mine, aclosing(_chunks(other, key)) as theirs:
            left, right = b"", b""
            while True:
                right = right or await anext(theirs, b"")  # first: the other one may have more by then, and not less
                left = left or await anext(mine, b"")
                size = min(len(left), len(right))
                if not size:
                    return (0 if right else same), left == right
                if left[:size] != right[:size]:
                    return 0, False
                left, right = left[size:], right[size:]
                same += size
    except NotFoundError:
        return 0, False


async def _chunks(backend: StorageBackend, key: str) -> AsyncGenerator[bytes, None]:
    async with aclosing(cast("AsyncGenerator[bytes]", backend.read_blob(key))) as chunks:
        async for chunk in chunks:
            if chunk:
                yield chunk


async def keys_below(one: StorageBackend, other: StorageBackend, prefix: str) -> AsyncIterator[list[str]]:
    """Yield the keys that begin with a text in either of two stores, in runs.

    They are listed before the first is yielded: no store has to keep a state for as long as the caller takes. What
    changes meanwhile is recorded, and looked at again.
    """
    async with one.still() as mine, other.still() as theirs:
        runs = [await asyncio.to_thread(_packed, run) async for run in _merged(mine, theirs, prefix)]
    for packed in runs:
        yield zlib.decompress(packed).decode().split("\n")


def _packed(keys: Sequence[str]) -> bytes:
    return zlib.compress("\n".join(keys).encode(), 1)  # a tenth, as far as one begins like another


async def _merged(mine: Snapshot, theirs: Snapshot, prefix: str) -> AsyncIterator[list[str]]:
    runs = aclosing(cast("AsyncGenerator[list[str]]", mine.keys(prefix)))
    others = aclosing(cast("AsyncGenerator[list[str]]", theirs.keys(prefix)))
    async with runs as left, others as right:
        first, second = await anext(left, None), await anext(right, None)
        while first is not None or second is not None:
            last = min(run[-1] for run in (first, second) if run is not None)
            yield sorted({key for run in (first, second) for key in run or () if key <= last})
            if first is not None:
                first = [key for key in first if key > last] or await anext(left, None)
            if second is not None:
                second = [key for key in second if key > last] or await anext(right, None)
