"""Making what is at a key in one store the same as in another, by looking at both; whoever else writes meanwhile.

Several processes may do so at once, and the store that is copied may change at any moment. So whoever changed the
second store looks again, and is done only when nothing was to be changed: one who was late with an older state finds
that out.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from typing import cast

from .. import codec
from ..errors import ConflictError, NotFoundError, UnavailableError
from ..layout import Layout, Shape
from .base import StorageBackend
from .changes import ABSENT, Append, Delete, Put, Require
from .rules import version_of

_ATTEMPTS = 50
_HELD_BYTES = 1 << 20
"""What is larger is compared and copied in chunks."""
_REMEMBERED = 10_000


class Alike:
    """Copies keys from `first` to `second`; used by one event loop."""

    def __init__(self, layout: Layout, first: StorageBackend, second: StorageBackend) -> None:
        self._layout = layout
        self.first = first
        self.second = second
        self._may = Require(layout.mirror_second, "The permission to copy to this store")
        self._ends: dict[str, tuple[str, int]] = {}
        """Logs that were equal: their identity, and up to where."""

    async def make(self, key: str) -> None:
        """Make the second store have what the first has at a key.

        Raises:
            StorageError: One of the two cannot be read or written.
        """
        for _ in range(_ATTEMPTS):
            if await self._grow(key) or await self._compare(key, fix=True):
                return
        raise UnavailableError(f"{key} changes too often to be copied now.", key=key)

    async def is_equal(self, key: str) -> bool:
        """Tell whether both stores have the same at a key."""
        return await self._compare(key, fix=False)

    # --- logs that have grown ------------------------------------------------------------------------

    async def _grow(self, key: str) -> bool:
        """Append the new messages of a log that was equal up to some place; return False if it has to be compared."""
        known = self._ends.pop(key, None)
        if known is None:
            return False
        identity, start = known
        while True:
            part = await self.first.read_log_part(key, identity, start)
            if part is None or part.identity != identity or part.start != start:
                return False
            lines = [line + b"\n" for _, line in part.lines]
            if sum(map(len, lines)) != part.end - start or not await self._append(key, lines, identity, part.end):
                return False
            if not part.more:
                return True
            start = part.end

    async def _append(self, key: str, lines: Sequence[bytes], identity: str, end: int) -> bool:
        """Append lines that the first store has up to `end`; return False if the log has to be compared."""
        if any(codec.line_id(line[:-1]) is None for line in lines):
            return False
        if lines:
            # Another process may be at it too; messages that are there already are passed over.
            await self.second.commit([self._may, Append(key, tuple(lines))])
            now = await self.first.read_log_part(key, identity, end)
            if now is None or now.identity != identity or now.start != end:
                return False  # what was appended may be gone from it by now
        self._remember(key, identity, end)
        return True

    def _remember(self, key: str, identity: str, end: int) -> None:
        if len(self._ends) >= _REMEMBERED:
            del self._ends[next(iter(self._ends))]
        self._ends[key] = identity, end

    def _is_log(self, key: str) -> bool:
        place = self._layout.parse(self._layout.origin(key))
        return place is not None and place.entry.shape is Shape.LOG

    # --- anything ------------------------------------------------------------------------------------

    async def _compare(self, key: str, *, fix: bool) -> bool:
        """Return whether both are equal; if not, and `fix`, change the second store so that they should be then."""
        # The second store first: so a log that goes on growing has in the first what it has in the second, and more.
        other = await _held(self.second, key)
        part = await self.first.read_log_part(key, None, 0) if self._is_log(key) else None
        one = await _held(self.first, key)
        if one is None or other is None:
            return await self._compare_large(key, None if part is None else part.identity, fix=fix)
        mine, theirs = one[0], other[0]
        if mine == theirs:
            if part is not None and mine is not None and mine.endswith(b"\n"):
                self._remember(key, part.identity, len(mine))
            return True
        if not fix:
            return False
        if part is not None and mine is not None and theirs is not None and _is_beginning(theirs, mine):
            lines = [line + b"\n" for line in mine[len(theirs) : -1].split(b"\n")]
            if await self._append(key, lines, part.identity, len(mine)):
                return True
        expected = ABSENT if theirs is None else version_of(theirs)
        with suppress(ConflictError):  # somebody else is at it
            await self.second.commit([self._may, Delete(key) if mine is None else Put(key, mine, expected)])
        return False

    async def _compare_large(self, key: str, identity: str | None, *, fix: bool) -> bool:
        same, is_all = await _same_chunks(self.first, self.second, key)
        if is_all:
            return True
        if fix and identity is not None and same:
            self._remember(key, identity, same)
            if await self._grow(key):
                return True
        if fix:
            await self.second.commit([self._may, Delete(key)])
            with suppress(NotFoundError):  # gone from the first meanwhile
                await self.second.write_blob(key, self.first.read_blob(key))
        return False


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
    return (bytes(gathered),)


async def _same_chunks(one: StorageBackend, other: StorageBackend, key: str) -> tuple[int, bool]:
    """Return how many bytes `other` has if they begin those of `one`, else 0; and whether it has all."""
    same = 0
    try:
        async with aclosing(_chunks(one, key)) as mine, aclosing(_chunks(other, key)) as theirs:
            left, right = b"", b""
            while True:
                left = left or await anext(mine, b"")
                right = right or await anext(theirs, b"")
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
    """Yield the keys that begin with a text in either of two stores, in runs."""
    async with one.still() as mine, other.still() as theirs:  # what changes meanwhile is recorded, and looked at again
        runs = aclosing(cast("AsyncGenerator[list[str]]", mine.keys(prefix)))
        others = aclosing(cast("AsyncGenerator[list[str]]", theirs.keys(prefix)))
        async with runs as left, others as right:
            first, second = await anext(left, None), await anext(right, None)
            while first is not None or second is not None:
                last = min(run[-1] for run in (first, second) if run is not None)
                found = {key for run in (first, second) for key in run or () if key <= last}
                yield sorted(found)
                if first is not None:
                    first = [key for key in first if key > last] or await anext(left, None)
                if second is not None:
                    second = [key for key in second if key > last] or await anext(right, None)
