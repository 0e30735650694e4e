"""Which keys changed since a moment, told from the journal: what it still holds, and what is known of what it held.

A cursor names a place in the journal: a segment by its id, and an offset. Reading takes no lock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ...errors import IntegrityError
from ..base import Changes
from .journal import Journal, keys_of
from .lock import Mark, StoreLock


class History:
    """What changed since a cursor."""

    def __init__(self, journal: Journal, lock: StoreLock) -> None:
        self._journal = journal
        self._lock = lock

    def changes(self, cursor: str | None) -> Changes:
        """See `StorageBackend.changes`."""
        now = self._lock.peek()
        if now is None:
            return Changes("", None)
        here = f"{now.segment}:{now.applied}"
        if cursor == here:
            return Changes(here, frozenset())
        since = _parse(cursor)
        if since is None:
            return Changes(here, None)
        try:
            return Changes(here, self._between(since, now))
        except (FileNotFoundError, IntegrityError):  # folded away while we looked
            return Changes(here, None)

    def _between(self, since: Mark, now: Mark) -> frozenset[str] | None:
        """Return the keys that changed between two places; None if that cannot be told."""
        keys: set[str] = set()
        found = False
        live = list(self._live(since, now))  # before the list of those that are gone: one of them may join it meanwhile
        known = {segment for segment, _, _ in live}
        if since.segment not in known:
            for past in self._journal.pasts():
                if past.segment == since.segment:
                    if since.applied > past.end:
                        return None
                    found = True
                if found and past.segment not in known:
                    keys.update(past.keys)
        for segment, end, changed in live:
            if segment == since.segment:
                if since.applied > end:
                    return None
                found = True
            if found:
                keys |= changed
        return frozenset(keys) if found else None

    def _live(self, since: Mark, now: Mark) -> Iterator[tuple[str, int, set[str]]]:
        """Yield the id, end and changed keys of each segment that there is, oldest first."""
        for number in self._journal.numbers():
            with contextlib.suppress(FileNotFoundError):
                segment = self._journal.open(number)
                try:
                    stop = now.applied if segment.id == now.segment else None
                    end = since.applied if segment.id == since.segment else segment.start
                    keys: set[str] = set()
                    for end, steps in segment.headers(end, stop):  # noqa: B007, B020 - the last one is wanted
                        keys |= keys_of(steps)
                    # Behind the end nothing can be told apart, so a cursor from there is too new to be true.
                    yield segment.id, end if stop is None else stop, keys
                finally:
                    segment.close()
                if segment.id == now.segment:
                    return


def _parse(cursor: str | None) -> Mark | None:
    segment, _, applied = (cursor or "").partition(":")
    return Mark(segment, int(applied)) if segment and applied.isdecimal() else None
