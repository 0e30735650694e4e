"""The contract of a storage backend.

A backend knows three shapes of data and nothing of chats: documents (bytes replaced whole), logs (lines appended) and
blobs (bytes streamed). Whoever implements the six abstract methods has a working backend for one process; everything
else has a default built on those six, which a backend overrides for speed or for a stronger promise, and then declares
the capability that names the promise.

The docstrings below and those of `changes.py` are the contract, and `testing/contract.py` quotes them sentence by
sentence.

Keys are relative paths: `/`-separated segments, none of them empty, `.` or `..`, without control characters,
backslashes and lone surrogates. Any other key raises ValidationError.

A medium that cannot be read or written raises UnavailableError; what cannot be read is never reported as absent.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from enum import StrEnum
from typing import TypeVar, cast

import msgspec

from .. import codec
from ..config import StorageConfig
from ..errors import (
    ConflictError,
    NotFoundError,
)
from ..models import Problem
from .changes import (
    ABSENT,
    ANY,
    Absent,
    Append,
    Change,
    Delete,
    Edit,
    Move,
    Outcome,
    Put,
    Quota,
    RemoveTree,
    Require,
    Truncate,
)
from .rules import (
    check_change,
    check_edit,
    check_key,
    check_maximum,
    check_quota,
    check_version,
    exists_already,
    good_lines,
    kept_and_dropped,
    mended,
    new_lines,
    not_found,
    quarantine_keys,
    version_of,
)
from .turn import Turn, to_the_end
from .wording import Words

logger = logging.getLogger("flatfile_chat_database")


T = TypeVar("T")

_SIZED_AT_ONCE = 256  # keys, whose bytes are read to know how many they are
_DECODED_AT_ONCE = 200  # more lines are decoded in a thread: on the event loop they would hold everybody up


class Capability(StrEnum):
    """A promise beyond the six methods; the contract suite runs the cases of those that are declared."""

    PERSISTENT = "persistent"
    """What returned is there after `close` and a new `open`, and after the process was killed."""
    PROCESSES = "processes"
    """Several processes may have the store open; conditions of a commit hold between all of them."""
    ATOMIC_APPEND = "atomic-append"
    """The records of one Append are there all or none, also after the process was killed."""
    STREAMED_BLOBS = "streamed-blobs"
    """Blobs are read and written in chunks; memory does not grow with their size."""
    EXTENTS = "extents"
    """Logs can be read by offsets, and what changed since a moment can be told: what a derived index needs."""
    SNAPSHOTS = "snapshots"
    """`snapshot` shows one state of the store, whatever is written meanwhile by whichever process."""


class Changes(msgspec.Struct, frozen=True):
    """What changed in a store since a cursor."""

    cursor: str
    """Of now, to ask again with."""
    keys: frozenset[str] | None
    """Keys that may have changed; those of moved and removed folders too. None: it is not known, all may have."""


class LogPart(msgspec.Struct, frozen=True):
    """Whole lines of a log, by offsets, which grow from line to line; of bytes or of lines, as it suits the backend."""

    identity: str
    """Of the bytes before: a log that only grew keeps it; one that was rewritten has another."""
    start: int
    """Offset of the first line."""
    end: int
    """Offset behind the last line: that of the next one."""
    lines: list[tuple[int, bytes]]
    """Offset and line, without its newline, of every line that is a record, and maybe of some that are none."""
    more: bool
    """Whether there are whole lines behind `end`."""


class Snapshot:
    """One state of a store, to be read as a whole; used by one task at a time. This one reads what is there now."""

    def __init__(self, backend: StorageBackend) -> None:
        self._backend = backend

    async def keys(self, prefix: str = "") -> AsyncIterator[list[str]]:
        """Yield all keys that begin with `prefix` in runs, sorted by code point."""
        async with aclosing(cast("AsyncGenerator[list[tuple[str, int]]]", self.sized(prefix))) as runs:
            async for run in runs:
                yield [key for key, _ in run]

    async def sized(self, prefix: str = "") -> AsyncIterator[list[tuple[str, int]]]:
        """Yield the same with the number of bytes at each key."""
        keys = await self._backend.list_keys(prefix)
        for start in range(0, len(keys), _SIZED_AT_ONCE):
            run = keys[start : start + _SIZED_AT_ONCE]
            datas = await self._backend.read_many(run)
            yield [(key, len(data)) for key, data in zip(run, datas, strict=True) if data is not None]

    async def read(self, key: str) -> AsyncIterator[bytes]:
        """Yield the bytes at `key` in chunks; raise NotFoundError before the first if there are none.

        Several keys may be read in turn, and none has to be read to its end.
        """
        async with aclosing(cast("AsyncGenerator[bytes]", self._backend.read_blob(key))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the bytes at each key, in the order of `keys`; None for one that is absent."""
        return await self._backend.read_many(keys)


class StorageBackend(ABC):
    """Documents, logs and blobs by key. See the module's docstring for keys and errors."""

    capabilities: frozenset[Capability] = frozenset()

    def __init__(self, config: StorageConfig) -> None:
        """Remember the configuration; do no I/O."""
        self.config = config
        self._turn = Turn()

    # --- the six -------------------------------------------------------------------------------------

    @abstractmethod
    async def read(self, key: str) -> bytes | None:
        """Return the bytes at `key`, or None if there are none.

        The bytes are those of one whole write, never a mixture.
        """

    @abstractmethod
    async def write(self, key: str, data: bytes) -> bool:
        """Replace the bytes at `key` whole, or create them. Return True.

        A reader sees the old bytes or the new ones. When an error is raised the old bytes are there.
        """

    @abstractmethod
    async def append(self, key: str, data: bytes) -> bool:
        """Append whole lines to the log at `key`, or create it. Return True.

        `data` must end in a newline, otherwise ValidationError. Appends of several callers never mix.
        If the log ends in half a line, that half is set aside first, so the new lines stand alone. A whole message that
        lacks only its newline, as an editor may leave it, gets one instead.
        """

    @abstractmethod
    async def delete(self, key: str) -> bool:
        """Remove what is at `key`. Return whether there was anything."""

    @abstractmethod
    async def exists(self, key: str) -> bool:
        """Return whether there are bytes at `key`. A folder is no key."""

    @abstractmethod
    async def list_keys(self, prefix: str) -> list[str]:
        """Return all keys that begin with the text `prefix`, sorted by code point; "" lists every key.

        A backend's own files (locks, temporary files) are not among them.
        """

    @property
    def uncached(self) -> StorageBackend:
        """The store itself, for whoever keeps what was read: another one where this is a cache in front of it."""
        return self

    async def is_behind(self) -> bool:
        """Return whether this is a replica, which shows later than another server what that one has."""
        return False

    @property
    def origin(self) -> str:
        """Which of two stores is read from, as far as is known here: another text after a switch; "" of one alone."""
        return ""

    # --- life ----------------------------------------------------------------------------------------

    async def open(self) -> None:  # noqa: B027 - a backend without resources has nothing to do
        """Make ready for use. Calling it again does nothing. Creates nothing on the medium."""

    async def close(self) -> None:  # noqa: B027 - the same
        """Finish what was begun and let go of every resource. Calling it again does nothing.

        Where the backend overrides this, all methods but `statistics`, `index_folder`, `words` and `is_behind` then
        raise ClosedError.
        """

    def statistics(self) -> dict[str, int]:
        """Return counters since `open`, by name; which there are is the backend's choice."""
        return {}

    # --- documents -----------------------------------------------------------------------------------

    async def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return what `read` would for each key, in the order of `keys`."""
        return [await self.read(key) for key in keys]

    async def list_children(self, folder: str) -> list[str]:
        """Return the segments that follow `folder` in the keys below it, without repetition, sorted by code point.

        "" is the store itself. A folder that is absent has no children. An empty folder that the medium keeps may be
        among the children.
        """
        start = f"{folder}/" if folder else ""
        return sorted({key[len(start) :].partition("/")[0] for key in await self.list_keys(start)})

    async def list_folders(self, folder: str) -> list[str]:
        """Return those children of `folder` that have keys below them, sorted by code point.

        "" is the store itself. A folder that is absent has none. A child that is a key is not among them. An empty
        folder that the medium keeps may be.
        """
        start = f"{folder}/" if folder else ""
        parts = (key[len(start) :].partition("/") for key in await self.list_keys(start))
        return sorted({child for child, slash, _ in parts if slash})

    # --- changes -------------------------------------------------------------------------------------

    async def commit(self, changes: Sequence[Change]) -> list[Outcome]:
        """Make several changes as one: check every condition in the given order, then apply all in that order.

        Return the outcome of each change (None for conditions). No other commit comes between the check and the
        change, so reading, deciding and committing with a version loses no update. When a condition fails its error is
        raised and nothing has changed. When this returns, everything in it survives whatever the backend's capabilities
        promise to survive. Cancelling the caller never tears a commit: it happens wholly or not at all.
        """
        async with self._turn:
            for change in changes:
                await self._check(change)
            return await to_the_end(self._apply_all(changes))

    async def _check(self, change: Change) -> None:
        """Raise the error of a condition that does not hold (default, on the six methods)."""
        check_change(change)
        match change:
            case Require(key, what):
                if not await self.exists(key):
                    raise not_found(what, key)
            case Quota(folder):
                check_quota(change, await self.list_folders(folder))
            case Put(key, _, expected):
                if expected is not ANY:
                    check_version(key, await self.read(key), expected)
            case Append(key):
                lines = good_lines(key, mended(await self.read(key) or b"")[0])
                by_id = {codec.written_id(line): line for line in lines}
                check_maximum(change, len(lines), new_lines(change, by_id.get))
            case Edit(key):
                lines = good_lines(key, mended(await self.read(key) or b"")[0], strict=True)
                check_edit(change, next((line for line in lines if codec.written_id(line) == change.record_id), None))
            case Truncate(key, count):
                kept_and_dropped(key, mended(await self.read(key) or b"")[0], count)
            case Absent(target) | Move(_, target):
                if await self.exists(target) or await self.list_keys(f"{target}/"):
                    raise exists_already(target)
            case Delete() | RemoveTree():
                pass

    async def _apply_all(self, changes: Sequence[Change]) -> list[Outcome]:
        return [await self._apply(change) for change in changes]

    async def _apply(self, change: Change) -> Outcome:
        """Make one change whose condition was checked (default, on the six methods)."""
        match change:
            case Put(key, data):
                await self.write(key, data)
                return version_of(data)
            case Delete(key):
                return await self.delete(key)
            case Append(key):
                before = good_lines(key, mended(await self.read(key) or b"")[0])
                added = new_lines(change, {codec.written_id(line): line for line in before}.get)
                if added:
                    await self.append(key, b"".join(added))
                return len(added)
            case Edit(key, record_id, _, line):
                data, half = mended(await self.read(key) or b"")
                new = [line if codec.written_id(old) == record_id else old for old in good_lines(key, data)]
                await self.write(key, b"".join(kept for kept in new if kept is not None) + half)
                return None
            case Truncate(key, count):
                data, half = mended(await self.read(key) or b"")
                kept, dropped = kept_and_dropped(key, data, count)
                if dropped:
                    await self.write(key, kept + half)
                return dropped
            case Move(source, target):
                keys = await self.list_keys(f"{source}/") + [source] * await self.exists(source)
                for key in keys:
                    await self.write(target + key[len(source) :], await self.read(key) or b"")
                for key in keys:
                    await self.delete(key)
                return bool(keys)
            case RemoveTree(folder):
                keys = await self.list_keys(f"{folder}/")
                for key in keys:
                    await self.delete(key)
                return keys
            case Require() | Absent() | Quota():
                return None

    # --- all of it -----------------------------------------------------------------------------------

    async def load(self, items: Sequence[tuple[str, bytes]]) -> None:
        """Put bytes at several keys where nothing is, logs among them, as one commit.

        It means a `Put` with ABSENT for each, and may be faster: it is how a store is filled from another one.
        """
        await self.commit([Put(key, data, ABSENT) for key, data in items])

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Snapshot]:
        """Show one state of the store for as long as the context lasts; others may go on writing meanwhile.

        What was acknowledged before is in it, and every commit is in it wholly or not at all. This default shows the
        state of now only as long as nobody writes.
        """
        yield Snapshot(self)

    @asynccontextmanager
    async def still(self) -> AsyncIterator[Snapshot]:
        """Show a store that nobody writes to while the context lasts, as the caller knows.

        It is what `snapshot` shows, and may cost less.
        """
        async with self.snapshot() as shown:
            yield shown

    # --- logs ----------------------------------------------------------------------------------------

    async def read_log(self, key: str, start: int = 0, stop: int | None = None, *, strict: bool = False) -> list[bytes]:
        """Return the records of a log from position `start` up to, not including, `stop`, oldest first.

        Positions count good records from 0; negative ones count from the end, as in a slice of a list. Records are
        lines without their newline. An absent log has no records. Half a line at the end is no record yet. A line that
        is no message is passed over and reported by a warning with its place; with `strict` it raises IntegrityError.
        """
        return good_lines(key, await self.read(key) or b"", strict=strict, newline=False)[start:stop]

    async def stream_log(self, key: str, *, strict: bool = False) -> AsyncIterator[list[bytes]]:
        """Yield the records of a log in runs, oldest first; damage is treated as by `read_log`.

        Memory does not grow with the log where the backend overrides this. Records appended meanwhile may or may not
        come.
        """
        lines = await self.read_log(key, strict=strict)
        if lines:
            yield lines

    async def read_log_as(
        self,
        key: str,
        decode: Callable[[bytes], T | None],
        start: int = 0,
        stop: int | None = None,
        *,
        strict: bool = False,
    ) -> list[T]:
        """Return what `decode` makes of the records that `read_log` returns.

        `decode` makes None of a line that is no message. It may be called in any thread, and for further lines. Where
        it has a method `many`, that may be called with a list of lines instead, none of them longer than
        `codec.MAX_LINE_BYTES`: it returns what `decode` makes of each, or None to get them one by one. These lines may
        have their newlines.
        """
        lines = await self.read_log(key, start, stop, strict=strict)
        if len(lines) <= _DECODED_AT_ONCE:
            return _decoded(lines, decode)
        return await asyncio.to_thread(_decoded, lines, decode)

    async def stream_log_as(
        self, key: str, decode: Callable[[bytes], T | None], *, strict: bool = False
    ) -> AsyncIterator[Iterable[T]]:
        """Yield what `decode` makes of the runs that `stream_log` yields.

        A run is made while it is iterated over; it is to be used up before the next.
        """
        async with aclosing(cast("AsyncGenerator[list[bytes]]", self.stream_log(key, strict=strict))) as runs:
            async for run in runs:
                yield (record for line in run if (record := decode(line)) is not None)

    async def count_log(self, key: str) -> int:
        """Return the number of records of a log; 0 if it is absent."""
        return len(await self.read_log(key))

    async def find_record(self, key: str, record_id: str) -> tuple[int, bytes] | None:
        """Return the position and the line of the record `record_id`, or None."""
        for position, line in enumerate(await self.read_log(key)):
            if codec.line_id(line) == record_id:
                return position, line
        return None

    async def newest_records(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the newest record of each log, in the order of `keys`; None for one without records."""
        pages = [await self.read_log(key, -1) for key in keys]
        return [page[-1] if page else None for page in pages]

    async def read_folders(self, folder: str, document: str, log: str) -> list[tuple[str, bytes | None, bytes | None]]:
        """Return for each child that `list_folders` returns: the child, its document and the newest record of its log.

        They are what `read_many` and `newest_records` return for the keys `document` and `log` in that child.
        """
        children = await self.list_folders(folder)
        places = [f"{folder}/{child}" if folder else child for child in children]
        documents = await self.read_many([f"{place}/{document}" for place in places])
        records = await self.newest_records([f"{place}/{log}" for place in places])
        return list(zip(children, documents, records, strict=True))

    # --- what watching and a derived index need (Capability.EXTENTS) ---------------------------------

    def index_folder(self) -> str | None:
        """Return the folder for derived indexes of this store, there or not; None if it has no place for them."""
        return None

    async def changes(self, cursor: str | None) -> Changes:
        """Return which keys may have changed since `cursor`, by whichever process, and the cursor of now.

        Only changes that were made through a backend count, not edits by hand. A cursor that is None, or too old, or of
        another store, gives no keys but None.
        """
        return Changes("", None)

    async def wait_for_change(self, keys: Sequence[str] | frozenset[str], seconds: float) -> None:
        """Return when something at or below one of `keys` may have changed since the waiting began, or after `seconds`.

        "" is the store itself. It may return early, and for no reason, so whoever waits looks what there is, and waits
        again. So that nothing comes in between, the waiting begins before the look: in a task that has run once.
        Changes by other processes count as well; where nothing tells of them, it returns after `watch_poll_seconds`,
        or a little later where a look is paid for. A backend that has its own method wakes at once whoever waits by the
        handle that changes something; this one only polls.
        Any number may wait at once, in several threads and event loops; a backend that is closed meanwhile wakes them.
        """
        await asyncio.sleep(min(seconds, self.config.watch_poll_seconds))

    async def stamps(self, keys: Sequence[str]) -> list[str | None]:
        """Return for each key, in the order of `keys`, a text that is another one when its bytes are changed.

        None stands for a key that is absent.
        """
        return [None if data is None else version_of(data) for data in await self.read_many(keys)]

    async def read_log_part(self, key: str, identity: str | None, start: int) -> LogPart | None:
        """Return the whole lines of a log from offset `start`, which is 0 or of a line, or None if it is absent.

        If the log's identity is not `identity`, or it is shorter than `start`, the part begins at 0. A part is bounded
        in size; `more` tells whether to go on from its `end`. Bad lines may be in it: whoever decodes them notices.
        """
        data = await self.read(key)
        if data is None:
            return None
        found = version_of(data)  # no telling whether it only grew
        start = start if found == identity and start <= len(data) else 0
        end = data.rfind(b"\n") + 1
        lines, offset = [], start
        for line in data[start:end].split(b"\n")[:-1]:
            lines.append((offset, line))
            offset += len(line) + 1
        return LogPart(found, start, max(start, end), lines, more=False)

    async def read_log_at(self, places: Sequence[tuple[str, int, int]]) -> list[bytes | None]:
        """Return the bytes of each place (key, offset, length), in order; None where there are not so many.

        Offsets are those of `read_log_part`, lengths those of its lines.
        """
        datas = {key: await self.read(key) for key in {key for key, _, _ in places}}
        found: list[bytes | None] = []
        for key, offset, length in places:
            piece = (datas[key] or b"")[offset : offset + length]
            found.append(piece if len(piece) == length else None)
        return found

    # --- searching -----------------------------------------------------------------------------------

    def words(self) -> Words | None:
        """Return what keeps words of records, for a search of the backend's own; None if nothing does."""
        return None

    # --- blobs ---------------------------------------------------------------------------------------

    async def write_blob(self, key: str, chunks: AsyncIterator[bytes]) -> bool:
        """Write a blob from its chunks. Return False, and change nothing, if something is at `key` already.

        The blob is there whole or not at all: an error in `chunks` is raised as it is and leaves nothing behind.
        """
        data = b"".join([chunk async for chunk in chunks])
        try:
            await self.commit([Put(key, data, ABSENT)])
        except ConflictError:
            return False
        return True

    async def read_blob(self, key: str) -> AsyncIterator[bytes]:
        """Yield a blob's bytes in chunks; raise NotFoundError before the first if there is none.

        The chunks are those of one whole write, also when the blob is replaced or removed meanwhile.
        """
        data = await self.read(key)
        if data is None:
            raise NotFoundError(f"There is no file at {key}.", key=key)
        yield data

    # --- maintenance ---------------------------------------------------------------------------------

    async def set_aside(self, key: str, reason: str) -> str:
        """Move what is at `key` to the quarantine, with a note of the reason; return its new key."""
        check_key(key)
        note, target = quarantine_keys(self.config)
        await self.commit([Put(note, codec.encode_document({"key": key, "reason": reason})), Move(key, target)])
        return target

    async def obstacles(self, *, fix: bool = False) -> list[Problem]:
        """Return what hinders an open store from being read and written; repair it with `fix`.

        While there is any that is not fixed, every method that reads or writes raises IntegrityError.
        """
        return []

    async def verify(self, *, fix: bool = False) -> list[Problem]:
        """Return what does not fit below the map: leftovers, half lines, foreign files; repair it with `fix`.

        Looks at the medium, not at the meaning of keys; `check.check` does that.
        """
        return []


def _decoded(lines: Iterable[bytes], decode: Callable[[bytes], T | None]) -> list[T]:
    return [record for line in lines if (record := decode(line)) is not None]
