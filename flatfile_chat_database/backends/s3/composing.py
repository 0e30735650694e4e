"""Making heads: which bytes of a content go into parts, and which stay in the head."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from ... import codec
from ...errors import StorageError
from ...models import new_id
from .contents import Contents, Log
from .forms import PART_BYTES, Head, Manifest, Part, cut, read_head, write_head, write_part

logger = logging.getLogger("flatfile_chat_database")

KEPT_RECORDS = 110
"""The newest of a log stay in its head, and so many are repeated in a segment, so that a page takes few requests."""
KEPT_BYTES = 256 << 10
"""Not more than this of them."""
_FULL = 2
"""A head that has so many times as much is cut down to that."""
_JOINED_BYTES = 1 << 20
"""A smaller last part is made anew with what comes behind it."""
PLAIN_BYTES = 256 << 10
"""More bytes than these are not kept in the head of what is no log."""
_LAST = 64
"""So many things are removed when the store is closed; `verify` removes others."""
_LINGER_SECONDS = 60
"""So long a part that nothing needs any more stays, for whoever is reading it."""


class Garbage:
    """What is to be removed: a little later, for somebody may be reading it, or ask for it."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._waiting: deque[tuple[float, Callable[[], None]]] = deque()
        self._lock = threading.Lock()

    def later(self, parts: Iterable[Part]) -> None:
        """Remove parts that no head names any more, but not yet."""
        paths = [self._contents.places.part(part.name) for part in parts]
        if paths:
            self._add(lambda: self._contents.objects.delete(paths))

    def drop(self, generation: str) -> None:
        """Remove the segments of a log that is replaced, but not yet."""
        self._add(lambda: self._drop(generation))

    def _drop(self, generation: str) -> None:
        objects = self._contents.objects
        for run in list(objects.listed(self._contents.places.log(generation))):
            objects.delete([each.path for each in run])

    def _add(self, work: Callable[[], None]) -> None:
        with self._lock:
            self._waiting.append((time.monotonic() + _LINGER_SECONDS, work))

    def remove(self, *, late: bool = False) -> float | None:
        """Remove one thing that has waited long enough; return in how many seconds there is more.

        With `late` it must have waited twice as long: whoever has no time for it should have by then.
        """
        with self._lock:
            if not self._waiting:
                return None
            more = self._waiting[0][0] - time.monotonic() + (_LINGER_SECONDS if late else 0)
            if more > 0:
                return more
            _, work = self._waiting.popleft()
        self._do(work)
        return 0.0

    def empty(self) -> None:
        """Remove what waits, however short it has, unless there is very much."""
        for _ in range(_LAST):
            with self._lock:
                if not self._waiting:
                    return
                _, work = self._waiting.popleft()
            self._do(work)

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except StorageError as error:  # `verify` finds what is left
            logger.warning("%s: what is not needed any more is still there: %s", self._contents.objects.name, error)


class Composer:
    """Makes heads of contents. The parts that it makes are garbage unless the head comes into its place."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self.made: list[Part] = []

    def plain(self, data: bytes) -> bytes:
        """Return a head for what is no log."""
        if len(data) <= PLAIN_BYTES:
            return write_head(None, data)
        pieces = [data[start : start + PART_BYTES] for start in range(0, len(data), PART_BYTES)]
        return write_head(Manifest("bytes", parts=self._contents.objects.together(self.piece, pieces)), b"")

    def log(
        self,
        key: str,
        data: bytes,
        kept: Sequence[Part] = (),
        *,
        generation: str = "",
        through: int = 0,
        puts: Sequence[str] = (),
    ) -> bytes:
        """Return a head for whole lines of a log, of a new generation unless one is named.

        Args:
            key: Of the log, for messages.
            data: What comes behind the parts that are kept.
            kept: Parts that stay as they are, but that the last one may be made anew.
            generation: Of a log that only grows.
            through: The last segment that is in it.
            puts: The ids of the segments that went into it.
        """
        parts, rest = list(kept), _newest(data)
        older = data[: len(data) - len(rest)]
        if older:
            if parts and parts[-1].index and parts[-1].size + len(older) <= _JOINED_BYTES:
                older = self._contents.part(key, parts.pop()) + older
            parts += self.parts(older)
        return write_head(Manifest("log", generation or new_id(), parts, through, list(puts)), rest)

    def parts(self, data: bytes) -> list[Part]:
        """Put whole lines into parts."""
        return self._contents.objects.together(self._put_lines, cut(data, PART_BYTES))

    def any(self, key: str, data: bytes) -> bytes:
        """Return a head for bytes, which may be a log."""
        if len(data) <= PLAIN_BYTES or codec.line_id(data[: data.find(b"\n")]) is None:
            return self.plain(data)
        end = data.rfind(b"\n") + 1
        raw = self.log(key, data[:end])
        if end == len(data):
            return raw
        head = read_head(raw, "")  # half a line is in no part, and such a log does not go on before it is mended
        return write_head(Manifest("bytes", parts=head.parts), head.rest + data[end:])

    def piece(self, data: bytes | bytearray) -> Part:
        """Put bytes into a part. They must not change any more."""
        part = Part(new_id(), len(data))
        self.made.append(part)
        self._contents.objects.put(self._contents.places.part(part.name), data)
        return part

    def _put_lines(self, data: bytes) -> Part:
        part, stored = write_part(new_id(), data)
        self.made.append(part)
        self._contents.objects.put(self._contents.places.part(part.name), stored)
        return part


def _newest(data: bytes) -> bytes:
    """Return as much of the end of a log as stays in its head."""
    if len(data) <= _FULL * KEPT_BYTES and data.count(b"\n") <= _FULL * KEPT_RECORDS:
        return data
    return newest_lines(data, KEPT_RECORDS, KEPT_BYTES)


def newest_lines(data: bytes, count: int, size: int) -> bytes:
    """Return the last whole lines, so many at most, and no more bytes than these."""
    start = len(data)
    for _ in range(count):
        before = data.rfind(b"\n", 0, start - 1) + 1 if start else 0
        if len(data) - before > size or before == start:
            break
        start = before
    return data[start:]


def folded(composer: Composer, log: Log, *, same: bool) -> bytes:
    """Return a head that has in it what is in a log's segments.

    Args:
        composer: Makes it.
        log: The log, which may go on meanwhile if the generation is the same.
        same: Whether the generation stays.
    """
    return composer.log(
        log.key,
        log.recent,
        log.head.parts,
        generation=log.generation if same else "",
        through=log.last if same else 0,
        puts=log.puts,
    )


def parts_of(*heads: Head | None) -> dict[str, Part]:
    """Return the parts of heads by name."""
    return {part.name: part for head in heads if head is not None for part in head.parts}
