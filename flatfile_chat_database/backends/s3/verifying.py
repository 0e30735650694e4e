"""Looking whether every object of a store is there and as it was written, and whether there are others."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

from ...config import StorageConfig
from ...errors import IntegrityError
from ...layout import Layout, Shape
from ...models import Problem
from .contents import Contents, Log
from .forms import Manifest, number_of, read_head
from .objects import Listed
from .planning import Mend

_ABANDONED = timedelta(hours=1)
"""What is at no key for so long is not being written any more."""


class Used:
    """What the heads of a store refer to."""

    def __init__(self) -> None:
        self.parts: set[str] = set()
        self.logs: dict[str, int] = {}
        """The last segment that is in the head, by generation."""
        self.has_unread = False
        """Whether there is a head that cannot be read, which may refer to anything."""
        self._lock = threading.Lock()

    def add(self, manifest: Manifest) -> None:
        """Take note of what a manifest refers to."""
        with self._lock:
            self.parts |= {part.name for part in manifest.parts}
            if manifest.chatdb == "log":
                before = self.logs.get(manifest.generation, manifest.through)
                self.logs[manifest.generation] = min(before, manifest.through)

    def needs(self, path: str) -> bool:
        """Tell whether a part or a segment is referred to."""
        folder, _, name = path.rpartition("/")
        through = self.logs.get(folder.rpartition("/")[2])
        return name in self.parts or (through is not None and number_of(path) >= through)


class Verifier:
    """Looks at a whole store. Its methods block."""

    def __init__(self, contents: Contents, config: StorageConfig) -> None:
        self._contents = contents
        self._objects = contents.objects
        self._places = contents.places
        self._layout = Layout(config)
        self._torn: list[str] = []
        self._locked: dict[str, str] = {}
        """The intents of keys that are locked."""

    def problems(self, *, fix: bool) -> list[Problem]:
        """Return what is wrong, but for logs that end in half a line; repair it with `fix`."""
        limit = (self._objects.now() if fix else datetime.now(UTC)) - _ABANDONED
        found = self._unfinished(limit, fix=fix)
        others = self._others(limit)  # before the heads, so that what is made meanwhile is not taken for left over
        used = Used()
        for run in self._contents.listed(""):
            for problems in self._objects.together(lambda key: self._look(key, used), [each.path for each in run]):
                found += problems
        left = [each.path for each in others if not used.needs(each.path)]
        is_safe = not used.has_unread and not any(problem.kind == "damaged-object" for problem in found)
        if fix and left and is_safe:
            again = Used()  # what was moved meanwhile may have been met nowhere
            for run in self._objects.listed(""):
                keys = [each.path for each in run if not self._places.is_own(each.path)]
                self._objects.together(lambda key: self._note(key, again), keys)
            left = [path for path in left if not again.needs(path)]
            is_safe = not again.has_unread
            if is_safe:
                self._objects.delete(left)
        fixed = fix and is_safe
        found += [
            Problem("leftover", path, "An object that belongs to nothing.", fixed=fixed, harmless=True) for path in left
        ]
        if fix:
            self._objects.together(self._unlock, sorted(self._locked))
            self._bury(limit)
        return found

    def _unlock(self, key: str) -> None:
        """Take away a lock that came too late: its commit is ended."""
        if self._contents.locks.intent(self._locked[key]) is None:
            self._contents.locks.settled(key)

    def torn(self) -> list[str]:
        """Return the logs that end in half a line, as `problems` has met them."""
        return sorted(self._torn)

    def mend(self, key: str) -> Mend:
        """Return the change that sets half a line aside."""
        return Mend(key)

    def _unfinished(self, limit: datetime, *, fix: bool) -> list[Problem]:
        """Return the commits that are not ended; end them if their processes died, or they are decided."""
        found = []
        locks = self._contents.locks
        for run in self._objects.listed(self._places.intents):
            for each in run:
                name = each.path.rpartition("/")[2]
                try:
                    locks.intent(name)
                    done = fix and (locks.give_up(name) if each.modified < limit else locks.finish(name))
                except IntegrityError as error:
                    found.append(Problem("damaged-object", each.path, error.message))
                else:
                    text = "A change of several keys that is not ended."
                    found.append(Problem("unfinished-commit", each.path, text, fixed=done, harmless=True))
        return found

    def _look(self, key: str, used: Used) -> list[Problem]:
        self._note(key, used)
        try:
            return self._contents.look(key, lambda log: [] if log is None else self._judge(key, log, used))
        except IntegrityError as error:
            return [Problem("damaged-object", key, error.message)]

    def _note(self, key: str, used: Used) -> None:
        """Take note of what the head at a key refers to, and both heads of one that is locked."""
        found = self._objects.get(key)
        if found is None:
            return
        head = read_head(found.data, found.etag)
        manifest = head.manifest
        if manifest is not None and manifest.chatdb == "locked":
            self._locked[key] = manifest.intent
        inner = (manifest.old, manifest.new) if manifest is not None else ()
        for each in (head, *(read_head(raw, "") for raw in inner if raw is not None)):
            used.has_unread |= each.is_damaged
            if each.manifest is not None:
                used.add(each.manifest)

    def _judge(self, key: str, log: Log, used: Used) -> list[Problem]:
        if log.head.manifest is not None:
            used.add(log.head.manifest)
        for part in log.head.parts:
            there = self._objects.head(self._places.part(part.name))
            if there is None or there.size != part.size + part.index or part.digest:
                self._contents.part(key, part)  # which says what is wrong with it
            if there is not None and there.size != part.size + part.index:
                return [Problem("damaged-object", key, f"{self._places.part(part.name)} has another size.")]
            if part.index:
                self._contents.index(key, part)
        for number in log.numbers:
            log.segment(number)
        place = self._layout.parse(key)
        if place is not None and place.entry.shape is Shape.LOG:
            recent = log.recent
            if recent and not recent.endswith(b"\n"):
                self._torn.append(key)
        return []

    def _others(self, limit: datetime) -> list[Listed]:
        """Return the objects that are no heads and were made long ago."""
        folders = (self._places.parts, self._places.segments, self._places.probes)
        return [
            each for folder in folders for run in self._objects.listed(folder) for each in run if each.modified < limit
        ]

    def _bury(self, limit: datetime) -> None:
        """Remove heads that have stood for nothing for long."""
        for run in list(self._objects.listed("")):
            old = (each for each in run if each.modified < limit and not self._places.is_own(each.path))
            gone = [each.path for each in old if self._contents.is_gone(each)]
            self._objects.together(self._contents.locks.bury, gone)
