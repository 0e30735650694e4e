"""Appending to logs: what is known of a log from append to append, and how many callers share one put.

What is appended becomes a segment, an object that is created under the number behind the last one. Nobody else can have
made one there, so what is known of the log was all of it. Only then is the head looked at again: if it is still of
this generation, the segment is part of the log, whatever happens next. If it is not, somebody has made the log anew
meanwhile, and it is done again there, unless what replaced the log has taken the segment in.

At the same time it is looked whether that is there which the callers require, so it was there when the segment was
made. It is looked at before as well, unless it was there the last time: then a put that comes to nothing is rare. If it
has gone meanwhile, and the log has not, what was put is taken out again (`Ask.refusal`).
"""

from __future__ import annotations

import logging
import random
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec

from ... import codec
from ...config import StorageConfig
from ...errors import ConflictError, DurabilityError, IntegrityError, NotFoundError, StorageError, UnavailableError
from .. import rules
from ..changes import Append, Require
from ..writer import Job
from .composing import KEPT_BYTES, KEPT_RECORDS, Composer, Garbage, folded, newest_lines, parts_of
from .contents import Contents, Log, Stale
from .faults import after_writing, unknown
from .forms import Head, Segment, hash_of, look_at, read_head, read_segment, seal, write_segment

logger = logging.getLogger("flatfile_chat_database")

_TURNS = 50
"""How often an append begins anew while others change the log."""
_IN_A_ROW = 3
"""So often without a pause."""
_PAUSE_SECONDS = 0.002
"""Times the number of the turn, at most."""
_FOLDED_AFTER = 64
"""So many segments are folded into the head when there is time."""
_FOLDED_AT_ONCE = 512
"""So many are, whether or not there is time."""
_FOLDED_BYTES = 4 << 20
_HELD_BYTES = 2 * _FOLDED_BYTES
"""Of the newest segments of a log, at most, but for one that is larger."""
_KNOWN_RECORDS = 1 << 20
"""Ids that are remembered, of all logs together."""
_SEEN = 1 << 14
"""Keys that are remembered as being there."""
_SEALED_SECONDS = 1.0
"""So long whoever closed a log has to replace it; then another one opens it again."""
_LOOK = "Read whether the message is there, then send it again under its id."
_LOOKS = 20
"""How often it is looked meanwhile."""


class Extend(msgspec.Struct, frozen=True):
    """Append whole lines, whatever they are."""

    key: str
    data: bytes


class Ask(msgspec.Struct, eq=False):
    """One append of a caller, and what came of it."""

    change: Append | Extend
    job: Job
    requires: Sequence[Require] = ()
    """What has to be there as well."""
    error: StorageError | None = None
    refusal: StorageError | None = None
    """Why its lines, which were put, are to be taken out again."""
    added: int = 0
    lines: Sequence[bytes] = ()
    """Those that are new."""


class Tail:
    """What is known of a log that goes on: that of its newest segment, for which nobody else can have made the next."""

    def __init__(self, contents: Contents, log: Log) -> None:
        assert log.head.manifest is not None
        self.head = log.head
        self.generation = log.generation
        self.through = log.through
        self.number = log.numbers[-1] if log.numbers else log.through
        newest = log.newest
        self.last_put = log.last_put
        self.is_sealed = log.is_sealed
        self.not_folded = 0
        """The number of the segment at which folding was tried last."""
        self.is_lost = False
        """Whether it turned out that the log goes on elsewhere."""
        self.end = log.end
        self.records = 0
        self.ids: set[int] = set()
        """Hashes of the ids of all records."""
        for index in contents.objects.together(lambda part: contents.index(log.key, part), log.head.parts):
            self._know(index.hashes())
        self._know(look_at(log.recent).hashes)
        self.window: deque[tuple[Segment, bytes]] = deque([newest] if newest is not None else [])
        """The newest segments, which are not read again when they are repeated or folded."""
        self._held = len(newest[1]) if newest is not None else 0

    def _know(self, hashes: Sequence[int]) -> None:
        self.records += len(hashes)
        self.ids.update(hashes)

    def segment(self, put: str, lines: bytes, records: int) -> bytes:
        """Return the object for the next segment."""
        repeated: list[tuple[Segment, bytes]] = []
        size, count, more = len(lines), records, b""
        for segment, held in reversed(self.window):
            if count >= KEPT_RECORDS:
                break
            if size + len(held) > KEPT_BYTES or count + segment.records > KEPT_RECORDS:
                # Some of its lines are as good, but count for no segment.
                more = newest_lines(held, KEPT_RECORDS - count, KEPT_BYTES - size)
                break
            repeated.insert(0, (segment, held))
            size, count = size + len(held), count + segment.records
        before = b"".join([more, *(held for _, held in repeated)])
        older = look_at(more).records + sum(segment.records for segment, _ in repeated)
        segment = Segment(
            puts=[*(each for segment, _ in repeated for each in segment.puts), put],
            at=self.end - len(before),
            first=self.records - older,
            records=records + older,
            own_at=len(before),
            own_records=records,
            digest="",
            previous=self.last_put,
        )
        return write_segment(segment, before + lines)

    def grow(self, put: str, lines: bytes, hashes: Sequence[int]) -> None:
        """Take note of a segment that was made, and of the records in its lines, by the hashes of their ids."""
        count = len(hashes)
        own = Segment([put], self.end, self.records, count, 0, count, digest="", previous=self.last_put)
        self.window.append((own, lines))
        self._know(hashes)
        self.number += 1
        self.last_put = put
        self.end += len(lines)
        self._held += len(lines)
        while len(self.window) > KEPT_RECORDS or (self._held > _HELD_BYTES and len(self.window) > 1):
            self._held -= len(self.window.popleft()[1])

    def numbered(self) -> dict[int, tuple[Segment, bytes]]:
        """Return the newest segments by number, with the lines that are known of each; its own at least."""
        return {self.number - before: each for before, each in enumerate(reversed(self.window))}


class Appender:
    """Appends to logs. Used by the writer's thread, and by others for different logs."""

    def __init__(self, contents: Contents, config: StorageConfig, garbage: Garbage) -> None:
        self._contents = contents
        self._objects = contents.objects
        self._places = contents.places
        self._config = config
        self._garbage = garbage
        self._tails: OrderedDict[str, Tail] = OrderedDict()
        self._seen: set[str] = set()
        """Keys that appends require, and that were there the last time."""

    # --- what is known -------------------------------------------------------------------------------

    def tail(self, key: str) -> Tail | None:
        """Return what is known of a log; None if it is absent, or does not go on in segments."""
        known = self._tails.get(key)
        if known is None:
            known = self._contents.look(
                key, lambda log: Tail(self._contents, log) if log is not None and log.head.is_log else None
            )
            if known is not None:
                self._tails[key] = known
        else:
            self._tails.move_to_end(key)
        return known

    def forget(self, key: str) -> None:
        """Forget what is known of a key."""
        self._tails.pop(key, None)
        self._seen.discard(key)

    def tidy(self) -> None:
        """Forget what was not used for long, when too much is known."""
        total = sum(len(tail.ids) + 64 for tail in self._tails.values())
        while total > _KNOWN_RECORDS and len(self._tails) > 1:
            total -= len(self._tails.popitem(last=False)[1].ids) + 64
        if len(self._seen) > _SEEN:
            self._seen.clear()

    def _line(self, key: str, record_id: str) -> bytes | None:
        found = self._contents.look(key, lambda log: None if log is None else log.find(record_id))
        return None if found is None else found[1]

    # --- what callers require ------------------------------------------------------------------------

    def _there(self, asks: Sequence[Ask]) -> dict[str, bool | StorageError]:
        """Look whether what appends require is there; what cannot be told is told as its error."""
        keys = _required(asks)
        found = self._objects.at_once([partial(self._is_there, key) for key in keys])
        return dict(zip(keys, found, strict=True))

    def _is_there(self, key: str) -> bool | StorageError:
        """Tell whether something is at a key, and nobody is about to remove it."""
        try:
            head = self._contents.locks.settled(key)
        except StorageError as error:
            return error
        found = head is not None and head.is_there
        (self._seen.add if found else self._seen.discard)(key)
        return found

    def _able(self, asks: Sequence[Ask]) -> list[Ask]:
        """Return the appends for which all is there that they require; fill in the error of the others."""
        there = self._there(asks)
        for ask in asks:
            ask.error, ask.added = _refusal(ask, there), 0
        return [ask for ask in asks if ask.error is None]

    def _refuse(self, asks: Sequence[Ask], there: dict[str, bool | StorageError]) -> None:
        """Fill in what becomes of appends that were put, if what they require is not there."""
        if all(found is True for found in there.values()):
            return
        for ask in asks:
            refusal = _refusal(ask, there)
            if refusal is None:
                continue
            if not ask.lines:
                ask.error = refusal
            elif isinstance(refusal, NotFoundError | IntegrityError):
                ask.refusal = refusal
            else:
                ask.error = unknown(refusal)

    # --- appending -----------------------------------------------------------------------------------

    def add(self, key: str, asks: Sequence[Ask]) -> None:
        """Append for several callers with one put; fill in what came of each.

        Raises:
            StorageError: None of it was done, or it is not known whether it was.
        """
        is_sure = key in self._tails and self._seen.issuperset(_required(asks))
        for turn in range(_TURNS):
            if not is_sure:  # what the callers require may not be there, or have gone with the log
                asks = self._able(asks)
                if not asks:
                    return
            is_sure = False
            if turn > _IN_A_ROW:
                time.sleep(random.uniform(0, _PAUSE_SECONDS * turn))
            tail = self.tail(key)
            if tail is None:
                if self._begin(key, asks):
                    return
            elif tail.head.is_locked:
                self._contents.locks.settled(key)
            elif tail.is_sealed:
                with suppress(DurabilityError):  # it is looked at again
                    self._reopen(key)
            elif self._go_on(key, tail, asks):
                return
            elif self._catch_up(key, tail):
                is_sure = True
                continue
            self.forget(key)
        raise UnavailableError(f"{key} is changed faster than it can be appended to.", key=key, hint="Retry.")

    def _decide(
        self, key: str, asks: Sequence[Ask], before: dict[str, bytes] | None, tail: Tail | None
    ) -> tuple[bytes, Sequence[int]]:
        """Look which lines of each are new; return all of them, and the hashes of the ids of their records."""
        staged: dict[str, bytes] = {}
        hashes: dict[str, int] = {}

        def find(record_id: str) -> bytes | None:
            line = staged.get(record_id)
            if line is not None or tail is None:
                return line or (before or {}).get(record_id)
            found = hashes[record_id] = hash_of(record_id)
            return self._line(key, record_id) if found in tail.ids else None

        count = tail.records if tail is not None else len(before or {})
        pieces: list[bytes] = []
        are_known = tail is not None
        for ask in asks:
            ask.error, ask.added, ask.lines = None, 0, ()
            change = ask.change
            if isinstance(change, Extend):
                are_known = False
                pieces.append(change.data)
                for line in rules.good_lines(key, change.data) if len(asks) > 1 else ():
                    staged.setdefault(codec.written_id(line), line)
                    count += 1
                continue
            try:
                new = rules.new_records(change, find)
                rules.check_maximum(change, count, new)
            except StorageError as error:
                ask.error = error
                continue
            are_known = are_known and bool(change.ids)
            ask.lines, ask.added = list(new.values()), len(new)
            count += ask.added
            staged.update(new)
            pieces += ask.lines
        data = b"".join(pieces)
        return data, [hashes[each] for each in staged] if are_known else look_at(data).hashes

    def _begin(self, key: str, asks: Sequence[Ask]) -> bool:
        """Append to what is absent, or does not go on in segments yet; return False if somebody else changed it."""
        head = self._contents.locks.settled(key)
        if head is not None and head.is_log:
            return False
        try:
            content = b"" if head is None or not head.is_there else Log(self._contents, key, head).content()
        except Stale as stale:
            if head == self._contents.locks.settled(key):
                raise stale.error from None
            return False
        whole, half = rules.mended(content)
        before = {codec.written_id(line): line for line in reversed(rules.good_lines(key, whole))}
        lines, _ = self._decide(key, asks, before, None)
        if not lines:
            return True
        if half:
            for place, data in rules.half_set_aside(self._config, key, len(whole), half).items():
                if self._objects.create(place, data) is None:
                    raise ConflictError(f"Something is at {place} already.", key=place)
        composer = Composer(self._contents)
        raw = composer.log(key, whole + lines)
        if head is None:
            etag = self._objects.create(key, raw)
        else:
            etag = self._objects.replace(key, raw, head.etag)
        self._garbage.later(composer.made if etag is None else parts_of(head).values())
        if etag is None:
            return False
        self._refuse(asks, self._there(asks))
        return True

    def _go_on(self, key: str, tail: Tail, asks: Sequence[Ask]) -> bool:
        lines, hashes = self._decide(key, asks, None, tail)
        if not lines:
            is_current, there = self._look_again(key, tail, tail.number + 1, asks)
            self._refuse(asks, there)
            return is_current
        if not self._put(tail, lines, hashes):
            return False
        put = tail.last_put
        with after_writing():
            is_current, there = self._look_again(key, tail, tail.number, asks)
            if not is_current:
                tail.is_lost = True
                if not self._was_taken_in(key, tail, put):
                    return False
        self._refuse(asks, there)
        if not is_current:
            self.forget(key)
        elif tail.number - tail.through >= _FOLDED_AT_ONCE:
            self._fold_or_not(key)
        return True

    def _look_again(
        self, key: str, tail: Tail, number: int, asks: Sequence[Ask]
    ) -> tuple[bool, dict[str, bool | StorageError]]:
        """Tell whether a log is still what is known of it, and whether what appends require is there."""
        required = _required(asks)
        looks: list[Callable[[], Any]] = [partial(self._is_current, key, tail, number)]
        looks += [partial(self._is_there, each) for each in required]
        is_current, *there = self._objects.at_once(looks)
        return is_current, dict(zip(required, there, strict=True))

    def _put(self, tail: Tail, lines: bytes, hashes: Sequence[int]) -> bool:
        """Create the next segment of a log; return False if somebody else has."""
        put = secrets.token_hex(8)
        data = tail.segment(put, lines, len(hashes))
        path = self._places.segment(tail.generation, tail.number + 1)
        if self._objects.create(path, data, is_final=True) is None:
            return False
        tail.grow(put, lines, hashes)
        return True

    def _catch_up(self, key: str, tail: Tail) -> bool:
        """Take note of the segments that others made; return False if there are none, or the log does not go on."""
        before = tail.number
        while not tail.is_lost:
            path = self._places.segment(tail.generation, tail.number + 1)
            found = self._objects.get(path)
            if found is None:
                # Whoever is late may have made one under a number that was folded; but then that one was, too.
                return tail.number > before and self._is_current(key, tail, before + 1)
            segment, lines = read_segment(key, path, found.data)
            if segment.is_seal or segment.at + segment.own_at != tail.end:
                return False
            own = lines[segment.own_at :]
            tail.grow(segment.puts[-1], own, look_at(own).hashes)
        return False

    def seal(self, log: Log) -> bool:
        """Keep a log from going on; return False if it has gone on meanwhile, or is replaced, and is to be read again.

        Its next segment is then a seal. Whoever appends does so in less time than reading a log takes, so what is in
        the way is only passed.
        """
        self.forget(log.key)
        known, previous = log.last, log.last_put
        for number in range(known + 1, known + _TURNS):
            path = self._places.segment(log.generation, number)
            if self._objects.create(path, seal(previous), is_final=True) is not None:
                return number == known + 1
            found = self._objects.get(path)
            if found is None:
                return False
            segment, _ = read_segment(log.key, path, found.data)
            if segment.is_seal:
                return False
            previous = segment.puts[-1]
        return False

    def _is_current(self, key: str, tail: Tail, number: int) -> bool:
        """Tell whether a log is still that of which something is known, and this segment not in its head yet."""
        there = self._objects.head(key)
        if there is None:
            return False
        if there.etag == tail.head.etag:
            return number > tail.through
        head = self._contents.head(key)
        manifest = head.manifest if head is not None else None
        if head is None or manifest is None or manifest.generation != tail.generation:
            return False
        if manifest.through >= number:
            return False
        if not head.is_locked:  # a lock stays the same when what it stands for is decided
            tail.head = head
        tail.through = manifest.through
        return True

    def _was_taken_in(self, key: str, tail: Tail, put: str) -> bool:
        """Tell whether the segment that was made last is in what replaced the log.

        It is if the new head knows its put, or if it stands before the seal of the log, for then whoever closed the log
        has read it.
        """
        head = self._contents.head(key)
        if head is not None and head.manifest is not None:
            if put in head.manifest.puts:
                return True
            if head.manifest.generation == tail.generation:
                return False
        number, last = tail.number + 1, put
        while (found := self._objects.get(path := self._places.segment(tail.generation, number))) is not None:
            segment, _ = read_segment(key, path, found.data)
            if segment.previous != last:
                break  # this one, or that, was made under a number that was folded long ago
            if segment.is_seal:
                return True
            number, last = number + 1, segment.puts[-1]
        if number == tail.number + 1 and self._objects.head(self._places.segment(tail.generation, tail.number)) is None:
            raise DurabilityError(f"{key} was made anew, and what it was is removed already.", key=key, hint=_LOOK)
        self._garbage.drop(tail.generation)  # whoever replaced the log may have removed its segments long ago
        return False

    # --- folding -------------------------------------------------------------------------------------

    def fold_one(self) -> bool:
        """Fold a log that has grown; return False if there is none."""
        for key, tail in list(self._tails.items()):
            folded_end = sum(part.size for part in tail.head.parts) + len(tail.head.rest)
            count = tail.number - max(tail.through, tail.not_folded)
            if count >= _FOLDED_AFTER or (count > 0 and tail.end - folded_end > _FOLDED_BYTES):
                self._fold_or_not(key)
                return True
        return False

    def _fold_or_not(self, key: str) -> None:
        """Fold a log; if that fails now it is tried again when it has grown once more."""
        tail = self._tails[key]
        tail.not_folded = tail.number
        try:
            self.fold(key)
        except StorageError as error:
            logger.warning("%s is not folded: %s", key, error)

    def fold(self, key: str) -> bool:
        """Fold what is in a log's segments into its head; return False if there is nothing, or somebody else does."""
        tail = self.tail(key)
        if tail is None:
            return False
        done = self._refold(key, tail.generation, {} if tail.is_sealed else tail.numbered())
        if done is None or done.manifest is None:
            self.forget(key)
        elif tail.number >= done.manifest.through:
            tail.head, tail.through = done, done.manifest.through
        else:
            self.forget(key)  # others have gone on
        return done is not None

    def _refold(
        self, key: str, generation: str | None, known: Mapping[int, tuple[Segment, bytes]] | None = None
    ) -> Head | None:
        """Replace a log's head by one with all segments in it; None if that is not to be done, or somebody else did.

        With its generation the log goes on meanwhile; without, it is closed, and goes on in another one.
        """
        composer = Composer(self._contents)
        found: list[Log] = []

        def make(log: Log | None) -> bytes | None:
            self._garbage.later(composer.made)
            composer.made = []
            if log is None or not log.head.is_log or log.head.is_locked:
                return None
            if known is not None and log.generation == generation:
                log.known.update(known)
            if not log.is_sealed if generation is None else (log.generation != generation or log.last == log.through):
                return None
            found[:] = [log]
            return folded(composer, log, same=generation is not None)

        raw = self._contents.look(key, make)
        if raw is None:
            return None
        [log] = found
        etag = self._objects.replace(key, raw, log.head.etag)  # if it is not known whether it is done, nothing goes
        if etag is None:
            self._garbage.later(composer.made)
            return None
        head = read_head(raw, etag)
        kept = parts_of(head)
        self._garbage.later(part for part in log.head.parts if part.name not in kept)
        if generation is None:
            self._garbage.drop(log.generation)
        else:
            self._drop_segments(generation, log.last)
        return head

    def _drop_segments(self, generation: str, before: int) -> None:
        """Remove the segments of a log before a number."""
        if before > 1:
            until = self._places.segment(generation, before - 1)
            for run in list(self._objects.listed(self._places.log(generation), "", until)):
                self._objects.delete([each.path for each in run])

    def _reopen(self, key: str) -> None:
        """Go on with a log that somebody closed to replace it, once he has had time to."""
        sealed = self._tails.pop(key)
        for _ in range(_LOOKS):
            there = self._objects.head(key)
            if there is None or there.etag != sealed.head.etag:
                break
            time.sleep(_SEALED_SECONDS / _LOOKS)
        self.reopen_now(key)

    def reopen_now(self, key: str) -> None:
        """Go on at once with a log, if it is closed and nobody has replaced it."""
        self.forget(key)
        head = self._contents.locks.settled(key)
        if head is not None and head.is_log:
            self._refold(key, None)


def _required(asks: Sequence[Ask]) -> list[str]:
    """Return the keys that appends require."""
    return sorted({require.key for ask in asks for require in ask.requires})


def _refusal(ask: Ask, there: dict[str, bool | StorageError]) -> StorageError | None:
    """Return the error of an append that requires what is not there."""
    for require in ask.requires:
        found = there[require.key]
        if found is not True:
            return found if isinstance(found, StorageError) else rules.not_found(require.what, require.key)
    return None
