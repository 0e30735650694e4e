"""Looking whether every object of a store is there and as it was written, and whether there are others."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from ...config import StorageConfig
from ...errors import IntegrityError
from ...layout import Layout, Shape
from ...models import Problem
from .committing import Committer
from .contents import Contents, Log
from .planning import Mend

_ABANDONED = timedelta(hours=1)
"""What is at no key for so long is not being written any more."""


class Verifier:
    """Looks at a whole store. Its methods block."""

    def __init__(self, contents: Contents, committer: Committer, config: StorageConfig) -> None:
        self._contents = contents
        self._objects = contents.objects
        self._places = contents.places
        self._committer = committer
        self._layout = Layout(config)
        self._torn: list[str] = []

    def problems(self, *, fix: bool) -> list[Problem]:
        """Return what is wrong, but for logs that end in half a line; repair it with `fix`."""
        found: list[Problem] = []
        for path in self._committer.unfinished():
            done = fix and self._committer.finish(path)
            text = "A change of several keys that is not ended."
            found.append(Problem("unfinished-commit", path, text, fixed=done, harmless=True))
        others = self._others()  # before the heads, so that what is made meanwhile is not taken for left over
        used: set[str] = set()
        for run in self._contents.listed(""):
            for problem in self._objects.together(lambda key: self._look(key, used), [each.path for each in run]):
                found += problem
        left = sorted(path for path in others if path not in used)
        if fix:
            self._objects.delete(left)
        found += [
            Problem("leftover", path, "An object that belongs to nothing.", fixed=fix, harmless=True) for path in left
        ]
        return found

    def torn(self) -> list[str]:
        """Return the logs that end in half a line, as `problems` has met them."""
        return sorted(self._torn)

    def mend(self, key: str) -> Mend:
        """Return the change that sets half a line aside."""
        return Mend(key)

    def _look(self, key: str, used: set[str]) -> list[Problem]:
        try:
            return self._contents.look(key, lambda log: [] if log is None else self._judge(key, log, used))
        except IntegrityError as error:
            return [Problem("damaged-object", key, error.message)]

    def _judge(self, key: str, log: Log, used: set[str]) -> list[Problem]:
        used |= {self._places.part(part.name) for part in log.head.parts}
        if log.head.is_log:
            used |= {self._places.segment(log.generation, number) for number in [log.through, *log.numbers]}
        for part in log.head.parts:
            there = self._objects.head(self._places.part(part.name))
            if there is None or there.size != part.size + part.index:
                self._contents.part(key, part)  # which says what is wrong with it
                return [Problem("damaged-object", key, f"{self._places.part(part.name)} has another size.")]
        for number in log.numbers:
            log.segment(number)
        place = self._layout.parse(key)
        if place is not None and place.entry.shape is Shape.LOG:
            recent = log.recent
            if recent and not recent.endswith(b"\n"):
                self._torn.append(key)
        return []

    def _others(self) -> list[str]:
        """Return the objects that are no heads and were made long ago."""
        limit = datetime.now(UTC) - _ABANDONED
        folders = (self._places.parts, self._places.segments, self._places.probes)
        return [
            each.path
            for folder in folders
            for run in self._objects.listed(folder)
            for each in run
            if each.modified < limit
        ]
