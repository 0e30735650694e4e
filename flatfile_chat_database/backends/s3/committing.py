"""Commits of several keys: an intent says all of it before anything is done, so that whoever comes later can finish it.

An intent is an object with the steps of one commit. Each of them replaces one head by another on the condition that it
is still the first, so it is no matter how often they are done, and by whom. If one cannot be done, for somebody was
faster, those that were done are undone, and the commit begins anew. Last of all the intent goes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import msgspec

from ...config import StorageConfig
from ...errors import DurabilityError, StorageError, UnavailableError
from ...models import new_id
from ..changes import Append, Change, Outcome
from .appending import Appender, Ask
from .composing import Garbage, parts_of
from .contents import Contents, Log, Stale
from .forms import Head, Part, moving, read_head
from .planning import Adopt, Mend, Plan, Step

logger = logging.getLogger("flatfile_chat_database")

_TURNS = 24
"""How often a commit begins anew while others write what it writes."""


class Changed(Exception):
    """Somebody else replaced a head that was looked at."""


class Intent(msgspec.Struct):
    """The steps of a commit."""

    steps: list[Step]
    is_undone: bool = False
    """Whether they are to be taken back."""
    finisher: str = ""
    """Who does it, if not he who began."""


_decoder = msgspec.json.Decoder(Intent)
_encoder = msgspec.json.Encoder()
Todo = Sequence[tuple[Step, Head | None]]


def _phase(step: Step, head: Head | None) -> int:
    """Return when a step is done: what is moved is there twice rather than not at all, and a log goes after its owner.

    So whoever finds a log gone that he appends to finds its owner gone as well.
    """
    return 0 if step.after is not None else 2 if head is not None and head.is_log else 1


class Committer:
    """Makes commits. Used by the writer's thread only."""

    def __init__(self, contents: Contents, appender: Appender, config: StorageConfig, garbage: Garbage) -> None:
        self._contents = contents
        self._objects = contents.objects
        self._places = contents.places
        self._appender = appender
        self._config = config
        self._garbage = garbage
        self._known: dict[str, Head | None] = {}

    def begin(self) -> None:
        """Begin a batch: what is looked at from now on need not be looked at again, for its callers wait for all of it.

        Nothing is replaced on the ground of that alone.
        """
        self._known.clear()

    def commit(self, changes: Sequence[Change | Adopt | Mend]) -> list[Outcome]:
        """Make a commit; return the outcome of each change.

        Raises:
            StorageError: A condition does not hold, or it could not be done; nothing is changed.
            DurabilityError: It is not known whether it was done.
        """
        sealed: dict[str, None] = {}
        error: StorageError | None = None
        for turn in range(_TURNS):
            if turn:
                time.sleep(min(0.02 * turn, 0.2))
            plan = Plan(self._contents, self._appender, self._config, self._known)
            try:
                plan.prepare(changes)
                for change in changes:
                    plan.check(change)
                outcomes = [plan.apply(change) for change in changes]
                for log in plan.still():
                    sealed[log.key] = None
                    self._seal(log)
                self._do(plan.steps())
            except (Changed, Stale) as reason:
                self._known.clear()
                self._garbage.later(time.monotonic(), plan.composer.made)
                error = reason.error if isinstance(reason, Stale) else None
                continue
            except BaseException as reason:
                if isinstance(reason, DurabilityError | UnavailableError):
                    self._known.clear()
                if not isinstance(reason, DurabilityError):
                    self._garbage.later(time.monotonic(), plan.composer.made)
                self._open_again(sealed)
                raise
            return outcomes
        self._open_again(sealed)
        raise error or UnavailableError("Others change the same keys all the time.", hint="Retry.")

    def _seal(self, log: Log) -> None:
        """Keep a log from going on; it is then what was looked at."""
        if not log.is_sealed and not self._appender.seal(log):
            raise Changed

    def _open_again(self, sealed: dict[str, None]) -> None:
        for key in sealed:
            try:
                self._appender.reopen_now(key)
            except StorageError as error:  # the next one who appends does it
                logger.warning("%s is left closed: %s", key, error)

    # --- steps ---------------------------------------------------------------------------------------

    def _do(self, todo: Todo) -> None:
        if not todo:
            return
        for step, _ in todo:
            self._known.pop(step.key, None)
            if step.lines is None:
                self._appender.forget(step.key)
        if len(todo) == 1:
            self._step(*todo[0])
        else:
            self._do_together(todo)
        self._clean(todo)

    def _do_together(self, todo: Todo) -> None:
        intent = Intent([step for step, _ in todo])
        path = f"{self._places.intents}/{new_id()}"
        etag = self._objects.create(path, _encoder.encode(intent))
        if etag is None:
            raise Changed
        heads = [each for each in todo if each[0].lines is None]
        failures: list[Exception | None] = []
        for phase in range(3):
            if not any(failures):
                failures += self._objects.together(self._try, [each for each in heads if _phase(*each) == phase])
        unknown = next((failure for failure in failures if isinstance(failure, StorageError)), None)
        if any(failures):
            intent.is_undone = True
            etag = self._objects.replace(path, _encoder.encode(intent), etag)
            if etag is None:
                raise DurabilityError(  # of which nothing comes but where it was very slow
                    "Another process ends this commit. The outcome of the write is unknown.",
                    hint="Read whether it is there, then retry.",
                )
            self._take_back([step for step, _ in heads])
            self._objects.delete([path])
            raise unknown or Changed
        for step, _ in todo:
            if step.lines is not None:
                self._append(step)
        self._objects.delete([path])

    def _try(self, each: tuple[Step, Head | None]) -> Exception | None:
        try:
            self._step(*each)
        except (Changed, StorageError) as error:
            return error
        return None

    def _step(self, step: Step, head: Head | None) -> None:
        if step.lines is not None:
            self._append(step)
        elif step.after is None:
            self._remove(step, head)
        elif head is None:
            if self._objects.create(step.key, step.after) is None:
                self._contents.clear(step.key)
                raise Changed
        elif self._objects.replace(step.key, step.after, head.etag) is None:
            raise Changed

    def _remove(self, step: Step, head: Head | None) -> None:
        if step.is_moved and head is not None:
            marker = moving(new_id())
            if self._objects.replace(step.key, marker, head.etag) is None:
                found = self._objects.get(step.key)
                if found is not None and read_head(step.key, found.data, found.etag) is not None:
                    raise Changed
        self._objects.delete([step.key])

    def _append(self, step: Step) -> None:
        ask = Ask(Append(step.key, tuple(step.lines or ())))
        self._appender.add(step.key, [ask])
        if ask.error is not None:
            logger.warning("%s: a message of a commit is there already in another form: %s", step.key, ask.error)

    def _take_back(self, steps: Sequence[Step]) -> None:
        for step in reversed(steps):
            found = self._objects.get(step.key)
            there = None if found is None else found.data
            if found is not None and read_head(step.key, found.data, found.etag) is None:
                there, step = None, Step(step.key, step.before)
                if step.before is not None:
                    self._objects.replace(step.key, step.before, found.etag)
                    continue
            if there != step.after or step.before == step.after:
                continue
            if step.before is None:
                self._objects.delete([step.key])
            elif found is None:
                self._objects.create(step.key, step.before)
            else:
                self._objects.replace(step.key, step.before, found.etag)

    def _clean(self, todo: Todo) -> None:
        """Remove what nothing refers to any more; what cannot be removed now is found by `verify`."""
        kept: dict[str, Part] = {}
        for step, _ in todo:
            if step.after is not None:
                kept |= parts_of(read_head(step.key, step.after, ""))
        try:
            for step, head in todo:
                if head is None or step.lines is not None:
                    continue
                parts = (part for name, part in parts_of(head).items() if name not in kept)
                self._garbage.later(time.monotonic(), parts)
                if head.is_log and head.manifest is not None:
                    self._appender.drop_segments(head.manifest.generation)
        except StorageError as error:
            logger.warning("%s: what is not needed any more is still there: %s", self._objects.name, error)

    # --- what others left ----------------------------------------------------------------------------

    def unfinished(self) -> list[str]:
        """Return the intents of commits that are under way, or whose process died."""
        return [each.path for run in self._objects.listed(self._places.intents) for each in run]

    def finish(self, path: str) -> bool:
        """Finish what a process began; return False if somebody else does."""
        found = self._objects.get(path)
        if found is None:
            return False
        intent = _decoder.decode(found.data)
        intent.finisher = new_id()
        if self._objects.replace(path, _encoder.encode(intent), found.etag) is None:
            return False
        steps = [step for step in intent.steps if step.lines is None]
        if intent.is_undone or not all(self._redo(step) for step in steps):
            self._take_back(steps)
        else:
            for step in intent.steps:
                if step.lines is not None:
                    self._append(step)
        self._objects.delete([path])
        return True

    def _redo(self, step: Step) -> bool:
        """Do a step unless it is done; return False if it cannot be done any more."""
        found = self._objects.get(step.key)
        there = None if found is None else found.data
        head = None if found is None else read_head(step.key, found.data, found.etag)
        if there == step.after:
            return True
        if found is not None and head is None and step.is_moved:
            self._objects.delete([step.key])
            return True
        if there != step.before:
            return False
        try:
            self._step(step, head)
        except Changed:
            return False
        return True


__all__ = ["Changed", "Committer"]
