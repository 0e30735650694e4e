"""What is in a store, as its objects say: heads, logs and lists of keys.

What is read may be replaced meanwhile by whichever process, and objects that a manifest named are then gone. Whoever
meets that begins anew with the head (`Stale`); if the head is still the same, an object is missing.
"""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain, islice
from typing import TypeVar

from ... import codec
from ...config import StorageConfig
from ...errors import IntegrityError, UnavailableError
from .. import rules
from ..base import LogPart
from .forms import (
    GOING_BYTES,
    GONE,
    MAGIC,
    Head,
    Index,
    Part,
    Places,
    Segment,
    damaged,
    digest_of,
    hash_of,
    number_of,
    read_index,
    read_segment,
)
from .locking import Locks
from .objects import Listed, Objects

T = TypeVar("T")

_TURNS = 12
"""How often reading begins anew while others write."""
_LOOKED_AT_ONCE = 1 << 20
"""Bytes of a log that a part for an index has at most, but for a line that is longer."""
_GONE_ETAG = hashlib.md5(GONE, usedforsecurity=False).hexdigest()
"""Of what stands for nothing, where a server makes ETags as most do."""
KEPT_PUTS = 400
"""Ids of puts that a head remembers, for those who ask late whether theirs is in it."""
LARGE_BYTES = 2 << 20
"""Heads are smaller, locked ones as well, unless somebody else put them there."""
_INDEXES = 512
"""Indexes of parts that are remembered."""


class Stale(Exception):
    """An object that a head named is gone: either the head is replaced, or this is what is wrong."""

    def __init__(self, error: IntegrityError) -> None:
        self.error = error
        super().__init__(str(error))


class Contents:
    """Reads a store. Its methods block; they may be called in any thread."""

    def __init__(self, objects: Objects, config: StorageConfig) -> None:
        self.objects = objects
        self.config = config
        self.places = Places(config)
        self.locks = Locks(objects, self.places)
        self._indexes: OrderedDict[str, Index] = OrderedDict()
        self._lock = threading.Lock()

    # --- heads ---------------------------------------------------------------------------------------

    def head(self, key: str) -> Head | None:
        """Return what is at a key; None if there is nothing."""
        found = self.locks.at(key)
        return found if found is not None and found.is_there else None

    def look(self, key: str, work: Callable[[Log | None], T]) -> T:
        """Do some work with what is at a key; None stands for nothing.

        Raises:
            IntegrityError: A part of it is missing or damaged.
            UnavailableError: It was replaced again and again meanwhile.
        """
        before = None
        for _ in range(_TURNS):
            head = self.head(key)
            try:
                return work(None if head is None else Log(self, key, head))
            except Stale as stale:
                if head is not None and head.version == before:
                    raise stale.error from None
                before = head.version if head is not None else None
        raise UnavailableError(f"{key} is changed faster than it can be read.", key=key, hint="Retry.")

    def read(self, key: str) -> bytes | None:
        """Return the bytes at a key."""
        return self.look(key, lambda log: None if log is None else log.content())

    def exists(self, key: str) -> bool:
        """Tell whether there are bytes at a key, however many."""
        found = self.objects.head(key)
        return found is not None and (found.size > LARGE_BYTES or self.head(key) is not None)

    def is_gone(self, found: Listed) -> bool:
        """Tell of an object in a list whether it stands for nothing."""
        if found.size == len(GONE) and found.etag.strip('"') == _GONE_ETAG:
            return True
        try:
            return found.size in (len(GONE), GOING_BYTES) and self.head(found.path) is None
        except IntegrityError:  # whoever reads it is told
            return False

    def runs(self, key: str, *, strict: bool) -> Iterator[list[bytes]]:
        """Yield the records of a log in runs."""
        large = self._large(key, _LOOKED_AT_ONCE)
        if large is not None:
            yield from self._plain_runs(key, large, strict=strict)
        else:
            yield from self._followed(key, self.look(key, self._begun(lambda log: log.runs(strict=strict))))

    def chunks(self, key: str, size: int) -> Iterator[bytes]:
        """Yield the bytes at a key in chunks; at least one, which may be empty, if there is anything."""
        large = self._large(key, size)
        if large is not None:
            yield from large
        else:
            yield from self._followed(key, self.look(key, self._begun(lambda log: log.chunks(size))))

    @staticmethod
    def _followed(key: str, items: Iterator[T]) -> Iterator[T]:
        """Yield items; a part that goes away meanwhile stays a minute, so this reader is very slow."""
        try:
            yield from items
        except Stale:
            raise UnavailableError(f"{key} was replaced while it was read.", key=key, hint="Read it again.") from None

    @staticmethod
    def _begun(begin: Callable[[Log], Iterator[T]]) -> Callable[[Log | None], Iterator[T]]:
        """Have the first item of an iterator made at once, so that it is made of what is there now."""

        def work(log: Log | None) -> Iterator[T]:
            items = begin(log) if log is not None else iter(())
            first = list(islice(items, 1))
            return chain(first, items)

        return work

    def _large(self, key: str, size: int) -> Iterator[bytes] | None:
        """Return chunks of the bytes themselves, if they are there, and more than should be held at once."""
        for _ in range(_TURNS):
            found = self.objects.head(key)
            if found is None or found.size <= LARGE_BYTES:
                return None
            chunks = self.objects.stream(key, size, found.etag)
            if chunks is None:
                continue
            first = next(chunks, b"")
            if first.startswith(MAGIC):  # nor is a head with very many parts, or its lock, taken for bytes
                return None
            return chain([first], chunks)
        raise UnavailableError(f"{key} is changed faster than it can be read.", key=key, hint="Retry.")

    def _plain_runs(self, key: str, chunks: Iterator[bytes], *, strict: bool) -> Iterator[list[bytes]]:
        held, offset = b"", 0
        for chunk in chunks:
            held += chunk
            end = held.rfind(b"\n") + 1
            run = rules.good_lines(key, held[:end], strict=strict, newline=False, offset=offset)
            held, offset = held[end:], offset + end
            if run:
                yield run

    def stamp(self, key: str) -> str | None:
        """Return a text that is another one when the bytes at a key are changed; None if there are none."""
        return self.look(key, lambda log: None if log is None else log.stamp())

    def read_at(self, places: Sequence[tuple[str, int, int]]) -> list[bytes | None]:
        """Return the bytes at each place (key, offset, length); None where there are not so many."""
        wanted: dict[str, list[tuple[int, int]]] = {}
        for key, offset, length in places:
            wanted.setdefault(key, []).append((offset, length))

        def read(key: str) -> dict[tuple[str, int, int], bytes | None]:
            return self.look(
                key,
                lambda log: {
                    (key, offset, length): None if log is None else log.place(offset, length)
                    for offset, length in wanted[key]
                },
            )

        found: dict[tuple[str, int, int], bytes | None] = {}
        for some in self.objects.together(read, list(wanted)):
            found |= some
        return [found[place] for place in places]

    # --- lists ---------------------------------------------------------------------------------------

    def listed(self, prefix: str) -> Iterator[list[Listed]]:
        """Yield the heads whose keys begin with a text in runs, sorted by code point."""
        if rules.begins_no_key(prefix) or prefix.startswith("/"):
            return
        folder = prefix.rpartition("/")[0]
        own = f"{self.places.own}/"
        after = prefix[:-1] if len(prefix) > len(folder) + 1 else ""  # sorts before all that begin with it
        while True:
            for run in self.objects.listed(folder, after, f"{prefix}\U0010ffff" if prefix else None):
                if any(each.path.startswith(own) for each in run):
                    yield self._keys([each for each in run if each.path < own], prefix)
                    break
                yield self._keys(run, prefix)
            else:
                return
            after = f"{own}\U0010ffff"  # behind all of them, which may be many

    def _keys(self, run: Sequence[Listed], prefix: str) -> list[Listed]:
        return [each for each in run if each.path.startswith(prefix) and not self.is_gone(each)]

    def keys(self, prefix: str) -> list[str]:
        """Return the keys that begin with a text, sorted."""
        return [each.path for run in self.listed(prefix) for each in run]

    def live_folders(
        self, folder: str, own: frozenset[str] = frozenset(), made: frozenset[str] = frozenset()
    ) -> list[str]:
        """Return the folders in a folder that have keys below them, which takes longer than `children`.

        What others are about to make is waited for, or given up. Whoever asks may have locked keys that are his own;
        those that were made by it do not count.
        """
        prefix = f"{folder}/" if folder else ""
        keys = set(self.keys(prefix)) - made
        for key in (keys & self.locks.keys()) - own:
            head = self.locks.settled(key)
            if head is None or not head.is_there:
                keys.remove(key)
        parts = (key[len(prefix) :].partition("/") for key in keys)
        return sorted({name for name, slash, _ in parts if slash})

    def children(self, folder: str, *, folders_only: bool = False) -> list[str]:
        """Return the segments that follow a folder, sorted; those of folders, or of keys as well."""
        folders, objects = self.objects.children(folder)
        found = set(folders)
        if not folders_only:
            found |= {each.path for each in objects if not self.is_gone(each)}
        found.discard(self.places.own)
        start = len(folder) + 1 if folder else 0
        names = {path.rstrip("/")[start:] for path in found}
        return sorted(name for name in names if name)

    # --- objects that logs are made of ---------------------------------------------------------------

    def index(self, key: str, part: Part) -> Index:
        """Return the index of a part."""
        with self._lock:
            known = self._indexes.get(part.name)
            if known is not None:
                self._indexes.move_to_end(part.name)
                return known
        path = self.places.part(part.name)
        data = self.objects.get_range(path, part.size, part.index)
        if data is None:
            raise Stale(damaged(key, path, "is missing"))
        index = read_index(key, path, data)
        with self._lock:
            self._indexes[part.name] = index
            while len(self._indexes) > _INDEXES:
                self._indexes.popitem(last=False)
        return index

    def part(self, key: str, part: Part, start: int = 0, end: int | None = None) -> bytes:
        """Return bytes of a part."""
        path = self.places.part(part.name)
        length = (part.size if end is None else min(end, part.size)) - start
        data = self.objects.get_range(path, start, length)
        if data is None:
            raise Stale(damaged(key, path, "is missing"))
        if len(data) != length:
            raise damaged(key, path, "is shorter than it was")
        if length == part.size and part.digest and part.digest != digest_of(data):
            raise damaged(key, path, "is not as it was written")
        return data

    def segment(self, key: str, generation: str, number: int) -> tuple[Segment, bytes]:
        """Return a segment of a log."""
        path = self.places.segment(generation, number)
        found = self.objects.get(path)
        if found is None:
            raise Stale(damaged(key, path, "is missing"))
        return read_segment(key, path, found.data)


class Log:
    """What is at a key, at one moment. Bytes and documents are logs as well that do not go on."""

    def __init__(self, contents: Contents, key: str, head: Head) -> None:
        head.check(key)
        self.key = key
        self.head = head
        self._contents = contents
        self._starts = [0, *accumulate(part.size for part in head.parts)]
        self._firsts = [0, *accumulate(part.records for part in head.parts)]
        self._numbers: list[int] | None = None
        self.known: dict[int, tuple[Segment, bytes]] = {}
        """Segments by number that need not be read."""
        self._recent: bytes | None = None

    @property
    def identity(self) -> str:
        """Of the bytes before: a log that only grew keeps it."""
        return self.generation if self.head.is_log else f"bytes {self.head.version}"

    @property
    def generation(self) -> str:
        """Of a log that may go on."""
        return self.head.generation

    @property
    def through(self) -> int:
        """The number of the last segment in the head."""
        return self.head.manifest.through if self.head.manifest is not None else 0

    # --- segments ------------------------------------------------------------------------------------

    @property
    def numbers(self) -> list[int]:
        """The numbers of the segments that are not in the head."""
        if self._numbers is None:
            self._numbers = self._list() if self.head.is_log else []
        return self._numbers

    def _list(self) -> list[int]:
        contents, generation, through = self._contents, self.generation, self.through
        folder = contents.places.log(generation)
        after = contents.places.segment(generation, through - 1) if through else ""
        listed = (number_of(each.path) for run in contents.objects.listed(folder, after) for each in run)
        found = [number for number in listed if number]
        for expected, number in enumerate(found, start=through or 1):
            if number != expected:
                raise Stale(damaged(self.key, contents.places.segment(generation, expected), "is missing"))
        if not found:
            if through:
                raise Stale(damaged(self.key, contents.places.segment(generation, through), "is missing"))
            # Either it has none yet, or the head is replaced and they are removed.
            now = contents.objects.head(self.key)
            if now is None or now.etag != self.head.etag:
                raise Stale(damaged(self.key, folder, "is missing"))
        return [number for number in found if number > through]

    def segment(self, number: int) -> tuple[Segment, bytes]:
        """Return a segment and its lines."""
        if number not in self.known:
            self.known[number] = self._contents.segment(self.key, self.generation, number)
        return self.known[number]

    @property
    def last(self) -> int:
        """The number of the last segment with lines, which may be in the head."""
        last = self.numbers[-1] if self.numbers else self.through
        while last > self.through and self.segment(last)[0].is_seal:
            last -= 1
        return last

    @property
    def is_sealed(self) -> bool:
        """Whether the log goes on in no further segment."""
        return bool(self.numbers) and self.last < self.numbers[-1]

    @property
    def newest(self) -> tuple[Segment, bytes] | None:
        """The last segment, if there is one that is not in the head."""
        return self.segment(self.last) if self.last > self.through else None

    @property
    def puts(self) -> list[str]:
        """The ids of the puts that made it what it is, the last ones of them."""
        before = self.head.manifest.puts if self.head.manifest is not None else []
        return [*before, *(put for _, segment, _ in self.chain() for put in segment.puts)][-KEPT_PUTS:]

    @property
    def last_put(self) -> str:
        """The id of the put of the last segment; empty if there was none."""
        if self.newest is not None:
            return self.newest[0].puts[-1]
        puts = self.head.manifest.puts if self.head.manifest is not None else []
        return puts[-1] if puts and self.through else ""

    def chain(self) -> list[tuple[int, Segment, bytes]]:
        """Return as many segments, with their numbers, as hold all that is not in the head."""
        found: list[tuple[int, Segment, bytes]] = []
        number = self.last
        while number > self.through:
            segment, lines = self.segment(number)
            found.insert(0, (number, segment, lines))
            if not segment.puts or len(segment.puts) > number:
                path = self._contents.places.segment(self.generation, number)
                raise damaged(self.key, path, "does not fit what is before it")
            number -= len(segment.puts)
        return found

    @property
    def recent(self) -> bytes:
        """What comes behind the parts."""
        if self._recent is None:
            found, end = [self.head.rest], self._starts[-1] + len(self.head.rest)
            for number, segment, lines in self.chain():
                if segment.at > end or segment.at + len(lines) < end:
                    path = self._contents.places.segment(self.generation, number)
                    raise damaged(self.key, path, "does not fit what is before it")
                found.append(lines[end - segment.at :])
                end = segment.at + len(lines)
            self._recent = b"".join(found)
        return self._recent

    @property
    def recent_at(self) -> int:
        """The offset of `recent`."""
        return self._starts[-1]

    @property
    def recent_first(self) -> int:
        """The position of the first record in `recent`."""
        return self._firsts[-1]

    # --- bytes ---------------------------------------------------------------------------------------

    def content(self) -> bytes:
        """Return all bytes."""
        if not self.head.parts:
            return self.recent
        parts = self._contents.objects.together(lambda part: self._contents.part(self.key, part), self.head.parts)
        return b"".join([*parts, self.recent])

    def piece(self, start: int, length: int) -> bytes:
        """Return bytes from an offset on, as many as asked for unless the end or the end of a part comes before."""
        if start >= self.recent_at:
            return self.recent[start - self.recent_at : start - self.recent_at + length]
        number = bisect_right(self._starts, start) - 1
        inside = start - self._starts[number]
        return self._contents.part(self.key, self.head.parts[number], inside, inside + length)

    def place(self, offset: int, length: int) -> bytes | None:
        """Return so many bytes at an offset; None if there are not so many."""
        found = b""
        while len(found) < length:
            more = self.piece(offset + len(found), length - len(found))
            if not more:
                return None
            found += more
        return found

    @property
    def end(self) -> int:
        """How many bytes there are."""
        return self.recent_at + len(self.recent)

    def chunks(self, size: int) -> Iterator[bytes]:
        """Yield all bytes in chunks; an empty one if there are none."""
        recent = self.recent  # first, for it may be gone when the parts are read
        for part in self.head.parts:
            chunks = self._contents.objects.stream(self._contents.places.part(part.name), size)
            if chunks is None:
                raise Stale(damaged(self.key, self._contents.places.part(part.name), "is missing"))
            left = part.size
            for chunk in chunks:
                yield chunk[:left]
                left -= min(left, len(chunk))
                if not left:
                    break
            if left:
                raise damaged(self.key, self._contents.places.part(part.name), "is shorter than it was")
        yield recent

    # --- records -------------------------------------------------------------------------------------

    def _good(self, data: bytes, at: int, *, strict: bool) -> list[bytes]:
        return rules.good_lines(self.key, data, strict=strict, newline=False, offset=at)

    def count(self) -> int:
        """Return how many records there are."""
        if not self.is_indexed:
            return sum(map(len, self.runs()))
        newest = self.newest
        if newest is not None:
            return newest[0].first + newest[0].records
        return self.recent_first + len(self._good(self.head.rest, self.recent_at, strict=False))

    def records(self, start: int, stop: int | None, *, strict: bool = False) -> list[bytes]:
        """Return the records of a slice."""
        if start == 0 and stop is None:
            return [record for run in self.runs(strict=strict) for record in run]
        if not self.is_indexed:
            return [record for run in self.runs(strict=strict) for record in run][start:stop]
        if start < 0 or stop is None or not 0 <= stop <= self.recent_first:
            if not self.head.is_log and not self.head.parts:
                return self._good(self.recent, 0, strict=strict)[start:stop]
            start, stop, _ = slice(start, stop).indices(self.count())
        if start >= stop:
            return []
        newest = self.newest if stop > self.recent_first else None
        if newest is not None and start >= newest[0].first:
            segment, lines = newest
            return self._good(lines, segment.at, strict=strict)[start - segment.first : stop - segment.first]
        found: list[bytes] = []
        if start < self.recent_first:
            found = self._in_parts(start, min(stop, self.recent_first), strict=strict)
        if stop > self.recent_first:
            recent = self._good(self.recent, self.recent_at, strict=strict)
            found += recent[max(0, start - self.recent_first) : stop - self.recent_first]
        return found

    def _in_parts(self, start: int, stop: int, *, strict: bool) -> list[bytes]:
        found: list[bytes] = []
        number = bisect_right(self._firsts, start) - 1
        while start < stop:
            part, first = self.head.parts[number], self._firsts[number]
            end = min(stop, self._firsts[number + 1])
            if part.records:
                index = self._contents.index(self.key, part)
                block, behind = (start - first) // index.every, -(-(end - first) // index.every)
                low = index.offsets[block] if block else 0
                high = index.offsets[behind] if behind < len(index.offsets) else part.size
                data = self._contents.part(self.key, part, low, high)
                good = self._good(data, self._starts[number] + low, strict=strict)
                skipped = start - first - block * index.every
                found += good[skipped : skipped + end - start]
            start = end
            number += 1
        return found

    def runs(self, *, strict: bool = False) -> Iterator[list[bytes]]:
        """Yield all records in runs."""
        recent = self.recent  # first, for it may be gone when the parts are read
        held, offset = b"", 0
        for part in [*self.head.parts, None]:
            held += recent if part is None else self._contents.part(self.key, part)
            end = held.rfind(b"\n") + 1
            run = self._good(held[:end], offset, strict=strict)
            held, offset = held[end:], offset + end
            if run:
                yield run

    @property
    def is_indexed(self) -> bool:
        """Whether it is known where the records are that are not in the head."""
        return all(part.index for part in self.head.parts)

    def find(self, record_id: str) -> tuple[int, bytes] | None:
        """Return the position and the line of a record."""
        if not self.is_indexed:
            lines = (record for run in self.runs() for record in run)
            return next(((at, line) for at, line in enumerate(lines) if codec.line_id(line) == record_id), None)
        wanted = hash_of(record_id)
        first = 0
        for part in self.head.parts:
            hashes = self._contents.index(self.key, part).hashes() if part.records else ()
            for position, each in enumerate(hashes):
                if each == wanted:
                    [line] = self._in_parts(first + position, first + position + 1, strict=False)
                    if codec.line_id(line) == record_id:
                        return first + position, line
            first += part.records
        for position, line in enumerate(self._good(self.recent, self.recent_at, strict=False)):
            if codec.line_id(line) == record_id:
                return first + position, line
        return None

    # --- what a derived index needs ------------------------------------------------------------------

    def stamp(self) -> str:
        """Return a text that is another one when the bytes are changed."""
        return f"{self.head.version} {self.numbers[-1]}" if self.numbers else self.head.version

    def log_part(self, identity: str | None, start: int) -> LogPart:
        """Return whole lines from an offset on; see `StorageBackend.read_log_part`."""
        if identity != self.identity or start > self.end:
            start = 0
        data, length = b"", _LOOKED_AT_ONCE
        while b"\n" not in data and start + len(data) < self.end:
            data += self.piece(start + len(data), length)
        end = data.rfind(b"\n") + 1
        lines, offset = [], start
        for line in data[:end].split(b"\n")[:-1]:
            lines.append((offset, line))
            offset += len(line) + 1
        is_more = self.place_of_newline(offset) if end else False
        return LogPart(self.identity, start, offset, lines, more=is_more)

    def place_of_newline(self, offset: int) -> bool:
        """Tell whether there is a whole line behind an offset."""
        if offset < self.recent_at:
            return True
        return b"\n" in self.recent[offset - self.recent_at :]
