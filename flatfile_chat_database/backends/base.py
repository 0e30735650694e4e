"""The contract of a storage backend.

A backend knows three shapes of data and nothing of chats: documents (bytes replaced whole), logs (lines appended) and
blobs (bytes streamed). Whoever implements the six abstract methods has a working backend for one process; everything
else has a default built on those six, which a backend overrides for speed or for a stronger promise, and then declares
the capability that names the promise.

The docstrings below are the contract, and `testing/contract.py` quotes them sentence by sentence.

Keys are relative paths: `/`-separated segments, none of them empty, `.` or `..`, without control characters,
backslashes and lone surrogates. Any other key raises ValidationError.

A medium that cannot be read or written raises UnavailableError; what cannot be read is never reported as absent.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import aclosing
from enum import Enum, StrEnum
from functools import lru_cache
from typing import Final, TypeVar, cast

import msgspec

from .. import codec
from ..config import StorageConfig
from ..errors import (
    ConfigurationError,
    ConflictError,
    IntegrityError,
    NotFoundError,
    StorageLimitExceeded,
    ValidationError,
)
from ..layout import Layout
from ..models import Problem, new_id
from .turn import Turn, to_the_end

logger = logging.getLogger("flatfile_chat_database")

_KEY_SEGMENT = r"(?!\.\.?(/|\Z))[^/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]+"
_KEY = re.compile(f"{_KEY_SEGMENT}(/{_KEY_SEGMENT})*")


T = TypeVar("T")

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
    """Logs can be read by byte offsets, and what changed since a moment can be told: what a derived index needs."""


class _Any(Enum):
    ANY = "any"


class _Absent(Enum):
    ABSENT = "absent"


ANY: Final = _Any.ANY
"""No condition on what a document holds now."""
ABSENT: Final = _Absent.ABSENT
"""The document must not exist."""


class Require(msgspec.Struct, frozen=True):
    """Condition: the document `key` exists; otherwise NotFoundError saying that `what` does not exist."""

    key: str
    what: str


class Absent(msgspec.Struct, frozen=True):
    """Condition: nothing is at or below `key`; otherwise ConflictError."""

    key: str


class Quota(msgspec.Struct, frozen=True):
    """Condition: `folder` has fewer than `maximum` folders in it besides those named in `ignoring`.

    They are those that `list_folders` returns. Otherwise StorageLimitExceeded with `limit_name`. Counted before the
    commit changes anything.
    """

    folder: str
    maximum: int
    limit_name: str
    ignoring: frozenset[str] = frozenset()


class Put(msgspec.Struct, frozen=True):
    """Replace a document whole. Condition: its version is `expected`; otherwise ConflictError.

    Outcome: the new version.
    """

    key: str
    data: bytes
    expected: str | _Any | _Absent = ANY


class Delete(msgspec.Struct, frozen=True):
    """Remove one document, log or blob. Outcome: whether it was there."""

    key: str


class Append(msgspec.Struct, frozen=True):
    """Append records to a log, in order, one line each; a log that is absent begins with them.

    A record whose id the log holds already (or an earlier record of this Append) is passed over when both are the same
    message. Conditions: no such record is a different message, otherwise ValidationError; the log would not hold more
    than `maximum` records, otherwise StorageLimitExceeded with `limit_name`.
    Outcome: how many records were added.
    """

    key: str
    lines: tuple[bytes, ...]
    maximum: int | None = None
    limit_name: str = ""
    ids: tuple[str, ...] = ()
    """The ids of the lines, for a caller who knows them; else they are read from the lines."""


class Edit(msgspec.Struct, frozen=True):
    """Replace the record `record_id` of a log in its place, or drop it when `line` is None.

    Conditions: the log holds the record, otherwise NotFoundError; the record's line is `expected`, otherwise
    ConflictError; every line of the log is a record or blank, otherwise IntegrityError, for what cannot be read must
    not be rewritten. Outcome: None.
    """

    key: str
    record_id: str
    expected: bytes
    line: bytes | None


class Truncate(msgspec.Struct, frozen=True):
    """Drop the newest `count` records of a log, or all when None.

    Condition: every line that goes is a record or blank, otherwise IntegrityError.
    Outcome: the dropped lines, oldest first; empty for a log that is empty or absent.
    """

    key: str
    count: int | None = None


class Move(msgspec.Struct, frozen=True):
    """Move the key `source`, or everything below the folder `source`, to `target`.

    Condition: nothing is at or below `target`, otherwise ConflictError. Outcome: whether there was anything to move.
    """

    source: str
    target: str


class RemoveTree(msgspec.Struct, frozen=True):
    """Remove everything below a folder. Outcome: the keys that were removed, sorted."""

    folder: str


class Changes(msgspec.Struct, frozen=True):
    """What changed in a store since a cursor."""

    cursor: str
    """Of now, to ask again with."""
    keys: frozenset[str] | None
    """Keys that may have changed; those of moved and removed folders too. None: it is not known, all may have."""


class LogPart(msgspec.Struct, frozen=True):
    """Whole lines of a log, by byte offsets."""

    identity: str
    """Of the bytes before: a log that only grew keeps it; one that was rewritten has another."""
    start: int
    """Offset of the first line."""
    end: int
    """Offset behind the newline of the last line."""
    lines: list[tuple[int, bytes]]
    """Offset and line, without its newline, of every line that is a record, and maybe of some that are none."""
    more: bool
    """Whether there are whole lines behind `end`."""


Change = Require | Absent | Quota | Put | Delete | Append | Edit | Truncate | Move | RemoveTree
Outcome = None | bool | int | str | list[bytes] | list[str]


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

    # --- life ----------------------------------------------------------------------------------------

    async def open(self) -> None:  # noqa: B027 - a backend without resources has nothing to do
        """Make ready for use. Calling it again does nothing. Creates nothing on the medium."""

    async def close(self) -> None:  # noqa: B027 - the same
        """Finish what was begun and let go of every resource. Calling it again does nothing.

        Where the backend overrides this, every other method but `statistics` then raises ClosedError.
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
        `codec.MAX_LINE_BYTES`: it returns what `decode` makes of each, or None to get them one by one.
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

    # --- what a derived index needs (Capability.EXTENTS) ---------------------------------------------

    async def changes(self, cursor: str | None) -> Changes:
        """Return which keys may have changed since `cursor`, by whichever process, and the cursor of now.

        Only changes that were made through a backend count, not edits by hand. A cursor that is None, or too old, or of
        another store, gives no keys but None.
        """
        return Changes("", None)

    async def stamps(self, keys: Sequence[str]) -> list[str | None]:
        """Return for each key, in the order of `keys`, a text that is another one when its bytes are changed.

        None stands for a key that is absent.
        """
        return [None if data is None else version_of(data) for data in await self.read_many(keys)]

    async def read_log_part(self, key: str, identity: str | None, start: int) -> LogPart | None:
        """Return the whole lines of a log from byte offset `start`, or None if it is absent.

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
        """Return the bytes of each place (key, offset, length), in order; None where there are not so many."""
        datas = {key: await self.read(key) for key in {key for key, _, _ in places}}
        found: list[bytes | None] = []
        for key, offset, length in places:
            piece = (datas[key] or b"")[offset : offset + length]
            found.append(piece if len(piece) == length else None)
        return found

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


# --- rules that every backend shares -------------------------------------------------------------------


@lru_cache(maxsize=16384)
def check_key(key: str) -> str:
    """Return `key` if it is one; see the module's docstring.

    Raises:
        ValidationError: It is not.
    """
    if not _KEY.fullmatch(key):
        raise ValidationError(
            f"{ascii(key)[:200]} is no key.", hint="Keys are relative paths without empty, '.' and '..' segments."
        )
    return key


def check_change(change: Change) -> None:
    """Check what a change names and carries, whatever the store holds.

    Raises:
        ValidationError: A key is none, or a line is not exactly one line.
    """
    kind = type(change)
    if kind is Require:  # this and the next are those of every message
        check_key(cast("Require", change).key)
        return
    if kind is Append:
        append = cast("Append", change)
        check_key(append.key)
        if append.ids and len(append.ids) != len(append.lines):
            raise ValidationError("An Append has an id for every line, or none.", key=append.key)
        for line in append.lines:
            _check_line(append.key, line)
        return
    keys: tuple[str, ...]
    match change:
        case Move(source, target):
            keys = source, target
        case Quota(folder):
            keys = (folder,) if folder else ()
        case RemoveTree(folder):
            keys = (folder,)
        case Edit(key):
            keys = (key,)
            if change.line is not None:
                _check_line(key, change.line)
        case _:
            keys = (change.key,)
    for key in keys:
        check_key(key)


def _check_line(key: str, line: bytes) -> None:
    if len(line) < 2 or line.find(b"\n") != len(line) - 1:
        raise ValidationError("A record must be one line that ends in a newline.", key=key)


def version_of(data: bytes) -> str:
    """Return the version of a document that holds `data`: a hash of its bytes, so it survives a copy."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def check_version(key: str, data: bytes | None, expected: str | _Any | _Absent) -> None:
    """Raise ConflictError unless a document that holds `data` (None: is absent) is as expected."""
    if expected is ABSENT:
        if data is not None:
            raise exists_already(key)
    elif expected is not ANY and (data is None or version_of(data) != expected):
        raise ConflictError(
            f"{key} has changed since it was read.", key=key, hint="Read it again and repeat the change."
        )


def exists_already(key: str) -> ConflictError:
    """Return the error for a target that is taken."""
    return ConflictError(f"Something is at {key} already.", key=key)


def not_found(what: str, key: str) -> NotFoundError:
    """Return the error for something that is absent."""
    return NotFoundError(f"{what} does not exist.", key=key)


def check_quota(quota: Quota, folders: Collection[str], coming: Collection[str] = ()) -> None:
    """Raise StorageLimitExceeded if a folder with these folders in it, and those to come, is full."""
    count = len(folders) + sum(name not in folders for name in coming)
    count -= sum(name in folders or name in coming for name in quota.ignoring)
    if count >= quota.maximum:
        raise StorageLimitExceeded(limit_name=quota.limit_name, limit=quota.maximum, value=count + 1, key=quota.folder)


def new_lines(append: Append, find: Callable[[str], bytes | None]) -> list[bytes]:
    """Return the lines of an Append that its log does not hold yet.

    Args:
        append: The change.
        find: Returns the log's line with an id, or None.

    Raises:
        ValidationError: The log, or the Append itself, has another message under the same id.
    """
    added: dict[str, bytes] = {}
    for record_id, line in zip(append.ids or map(codec.written_id, append.lines), append.lines, strict=True):
        existing = added.get(record_id) or find(record_id)
        if existing is None:
            added[record_id] = line
        elif not codec.same_message(existing, line):
            raise ValidationError(
                f"Another message has the id {record_id!r} already.",
                key=append.key,
                hint="Use a new id, or update_message to change it.",
            )
    return list(added.values())


def check_maximum(append: Append, count: int, added: Sequence[bytes]) -> None:
    """Raise StorageLimitExceeded if a log of `count` records would grow over its maximum."""
    if append.maximum is not None and added and count + len(added) > append.maximum:
        raise StorageLimitExceeded(
            limit_name=append.limit_name, limit=append.maximum, value=count + len(added), key=append.key
        )


def check_edit(edit: Edit, line: bytes | None) -> None:
    """Raise the error of an Edit whose record now has this line (None: is not there)."""
    if line is None:
        raise not_found(f"The message {edit.record_id!r}", edit.key)
    if line.rstrip(b"\n") != edit.expected.rstrip(b"\n"):
        raise ConflictError(
            f"The message {edit.record_id!r} has changed since it was read.",
            key=edit.key,
            hint="Read it again and repeat the change.",
        )


def good_lines(key: str, data: bytes, *, strict: bool = False, newline: bool = True) -> list[bytes]:
    """Return the lines of a log that are records; see `StorageBackend.read_log` for the others.

    Lines keep their newline unless `newline` is False.
    """
    lines = []
    offset = 0
    for line in data.split(b"\n")[:-1]:
        if codec.line_id(line) is not None:
            lines.append(line + b"\n" if newline else line)
        elif line.strip():
            report_bad_line(key, offset, strict=strict)
        offset += len(line) + 1
    return lines


def _decoded(lines: Iterable[bytes], decode: Callable[[bytes], T | None]) -> list[T]:
    return [record for line in lines if (record := decode(line)) is not None]


def report_bad_line(key: str, offset: int, *, strict: bool) -> None:
    """Warn of a line that is no record, or raise IntegrityError when `strict`."""
    text = f"{key}: the line at byte {offset} is no message"
    if strict:
        raise IntegrityError(f"{text}.", key=key, hint="Run `chatdb check` to see all damage.")
    logger.warning("%s; it is passed over", text)


def quarantine_keys(config: StorageConfig) -> tuple[str, str]:
    """Return new keys for a note on something that is set aside, and for its bytes."""
    layout, item = Layout(config), new_id()
    return layout.key("quarantine", item=f"{item}.json"), layout.key("quarantine", item=f"{item}.bin")


def mended(data: bytes) -> tuple[bytes, bytes]:
    """Split a log into its whole lines and half a line at its end; see `StorageBackend.append`."""
    end = data.rfind(b"\n") + 1
    if codec.line_id(data[end:]) is not None:
        return data + b"\n", b""
    return data[:end], data[end:]


def kept_and_dropped(key: str, data: bytes, count: int | None) -> tuple[bytes, list[bytes]]:
    """Split a log's bytes for a Truncate: what stays, and the records that go, oldest first, without newlines."""
    lines = data.split(b"\n")[:-1]
    dropped: list[bytes] = []
    while lines and (count is None or len(dropped) < count):
        line = lines.pop()
        if codec.line_id(line) is not None:
            dropped.append(line)
        elif line.strip():
            report_bad_line(key, len(b"\n".join([*lines, b""])), strict=True)
    return b"".join(line + b"\n" for line in lines), dropped[::-1]


# --- which backend -------------------------------------------------------------------------------------


def open_backend(config: StorageConfig) -> StorageBackend:
    """Make the backend that the configuration names; do no I/O.

    `storage_url` is empty (files under `storage_base_path`), `file:relative`, `file:/absolute`, or `memory:`; the path
    is percent-decoded.

    Raises:
        ConfigurationError: The URL's scheme is unknown or its form is wrong.
    """
    from urllib.parse import unquote  # half of what it imports is of no use to a store

    scheme, colon, rest = config.storage_url.partition(":")
    if not config.storage_url:
        return _make("flatfile", "FlatfileBackend", config, config.storage_base_path)
    path = unquote(rest)
    if path.startswith("///"):  # file:///absolute, as browsers write it
        path = path[2:]
    if colon and scheme == "file" and path and not path.startswith("//") and "\0" not in path:
        return _make("flatfile", "FlatfileBackend", config, path)
    if colon and scheme == "memory" and not rest:
        return _make("memory", "MemoryBackend", config)
    raise ConfigurationError(
        f"storage_url with the scheme {scheme[:20]!r} names no backend.",
        hint="Use file:relative/path, file:/absolute/path or memory:.",
    )


def _make(module: str, name: str, *arguments: object) -> StorageBackend:
    kind = getattr(importlib.import_module(f".{module}", __package__), name)
    return cast("StorageBackend", kind(*arguments))
