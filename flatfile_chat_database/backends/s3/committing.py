"""Making commits: what `planning.py` says is to be done, done wholly or not at all.

One key is changed by one put on a condition. Several are locked first, and decided by their intent (`locking.py`). A
log whose lines stay is closed before that by a seal, so that what was read of it is all of it.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence

from ...config import StorageConfig
from ...errors import DurabilityError, StorageError, StorageLimitExceeded, UnavailableError
from .. import rules
from ..changes import Change, Outcome, RemoveTree
from .appending import Appender
from .composing import Composer, Garbage, parts_of
from .contents import LARGE_BYTES, Contents, Log, Stale
from .faults import after_writing
from .forms import Head, Part, read_head
from .planning import Adopt, Mend, Plan, Step, Withdraw

logger = logging.getLogger("flatfile_chat_database")

_TURNS = 40
"""How often a commit begins anew while others write what it writes."""
_LOCKED_AT_ONCE = 64
"""A tree with more keys is removed key by key: there is no need to see all of it or nothing."""
_LARGE_BYTES = 3 * LARGE_BYTES // 8
"""A lock has the old and the new head in it, as text: it must not be large itself."""
_PAUSE_SECONDS = 0.01


class Changed(Exception):
    """Somebody else replaced a head that was looked at."""


class Committer:
    """Makes commits. Used by the writer's thread only."""

    def __init__(self, contents: Contents, appender: Appender, config: StorageConfig, garbage: Garbage) -> None:
        self._contents = contents
        self._objects = contents.objects
        self._locks = contents.locks
        self._appender = appender
        self._config = config
        self._garbage = garbage
        self._known: dict[str, Head | None] = {}

    def begin(self) -> None:
        """Begin a batch: what is looked at from now on need not be looked at again, for its callers wait for all of it.

        Nothing is replaced on the ground of that alone.
        """
        self._known.clear()

    def commit(self, changes: Sequence[Change | Adopt | Mend | Withdraw]) -> list[Outcome]:
        """Make a commit; return the outcome of each change.

        Raises:
            StorageError: A condition does not hold, or it could not be done; nothing is changed.
            DurabilityError: It is not known whether it was done.
        """
        sealed: dict[str, None] = {}
        given = [part for change in changes if isinstance(change, Adopt) for part in change.parts]
        error: StorageError | None = None
        for turn in range(_TURNS):
            if turn:
                time.sleep(random.uniform(0, _PAUSE_SECONDS * turn))
            plan = Plan(self._contents, self._config, self._known)
            try:
                plan.prepare(changes)
                for change in changes:
                    plan.check(change)
                outcomes = [plan.apply(change) for change in changes]
                for log in plan.still():
                    sealed[log.key] = None
                    self._seal(log)
                steps = plan.steps()
                if len(steps) > 1 and self._have_parts(steps):
                    raise Changed
                if len(steps) > _LOCKED_AT_ONCE and _only_removes(changes, steps):
                    steps = self._remove(steps, plan)
                elif steps:
                    self._do(steps, plan)
                self._clean(steps, plan.composer.made)
            except (Changed, Stale) as reason:
                self._known.clear()
                self._garbage.later(plan.composer.made)
                error = reason.error if isinstance(reason, Stale) else None
                continue
            except DurabilityError:  # a head may name the parts that were made
                self._known.clear()
                raise
            except BaseException as reason:
                if isinstance(reason, UnavailableError):
                    self._known.clear()
                self._garbage.later([*plan.composer.made, *given])
                self._open_again(sealed)
                raise
            self._garbage.later(plan.unneeded)
            return outcomes
        self._garbage.later(given)
        self._open_again(sealed)
        raise error or UnavailableError("Others change the same keys all the time.", hint="Retry.")

    def _seal(self, log: Log) -> None:
        """Keep a log from going on; it is then what was looked at."""
        try:
            if not log.is_sealed and not self._appender.seal(log):
                raise Changed
        except DurabilityError as error:  # a seal that may be there changes nothing
            raise UnavailableError(f"{log.key} cannot be closed. {error.message}", hint="Retry.") from None

    def _open_again(self, sealed: dict[str, None]) -> None:
        for key in sealed:
            try:
                self._appender.reopen_now(key)
            except StorageError as error:  # the next one who appends does it
                logger.warning("%s is left closed: %s", key, error)

    # --- steps ---------------------------------------------------------------------------------------

    def _do(self, steps: Sequence[Step], plan: Plan) -> None:
        for step in steps:
            self._known.pop(step.key, None)
            self._appender.forget(step.key)
        # What others may build on at once, as on a session, is not shown before it is known that it stays.
        if len(steps) == 1 and not (plan.trees or plan.quotas or _free(steps, plan)):
            self._step(steps[0], plan)
        else:
            self._do_together(steps, plan)

    def _holds(self, steps: Sequence[Step], plan: Plan) -> bool:
        """Tell whether the conditions on other keys hold still, and nothing new is in folders that are emptied.

        Asked once the keys are locked, or made: whoever empties a folder has then met the new key in it, or is met here
        by his lock.
        """
        own = frozenset(step.key for step in steps)
        asked = sorted((plan.required - own) | _free(steps, plan))
        for key, head in zip(asked, self._objects.together(self._locks.settled, asked), strict=True):
            if (head is not None and head.is_there) != (key in plan.required):
                return False
        if not all(own.issuperset(self._contents.keys(f"{folder}/")) for folder in plan.trees | plan.targets):
            return False
        made = frozenset(step.key for step in steps if _makes(step))
        try:
            for quota in plan.quotas:
                rules.check_quota(quota, self._contents.live_folders(quota.folder, own, made))
        except StorageLimitExceeded:
            return False
        return True

    def _have_parts(self, steps: Sequence[Step]) -> bool:
        """Put large objects, which only others put there, into parts, for a lock holds the whole head; tell of any."""
        is_large = False
        for step in steps:
            head = step.head
            if head is None or head.manifest or head.is_damaged or len(head.raw) <= _LARGE_BYTES:
                continue
            is_large, composer = True, Composer(self._contents)
            if self._objects.replace(step.key, composer.any(step.key, head.raw), head.etag) is None:
                self._garbage.later(composer.made)
        return is_large

    def _step(self, step: Step, plan: Plan) -> None:
        if step.after is None:
            if step.head is not None and not self._locks.remove(step.key, step.head.etag):
                raise Changed
            return
        if step.head is None:
            etag = self._objects.create(step.key, step.after)
        else:
            etag = self._objects.replace(step.key, step.after, step.head.etag)
        if etag is None:
            raise Changed
        is_new = _makes(step)
        with after_writing():
            # If it cannot be taken back, somebody has met it, and changed it or taken it along.
            if is_new and not self._holds([step], plan) and self._locks.remove(step.key, etag):
                raise Changed

    def _do_together(self, steps: Sequence[Step], plan: Plan) -> None:
        keys = [step.key for step in steps]
        name, intent, etag = self._locks.begin(keys)
        failures = self._objects.together(lambda step: self._lock(step, name), steps)
        try:
            is_done = not any(failures) and self._holds(steps, plan)
            is_done = is_done and self._locks.decide(name, intent, etag, "done")
        except DurabilityError:
            raise
        except StorageError as error:
            failures, is_done = [error], False
        if not is_done:
            self._undo(name, keys)
            raise next((each for each in failures if isinstance(each, StorageError)), Changed())
        try:
            self._locks.end(name, keys, is_done=True)
        except StorageError as error:  # it is decided, and whoever comes next ends it
            logger.warning("%s: a commit is made, but not ended: %s", self._objects.name, error)

    def _lock(self, step: Step, name: str) -> Changed | StorageError | None:
        try:
            is_locked = self._locks.lock(step.key, name, step.head, step.after) is not None
        except DurabilityError as error:  # it may be locked, which does no harm, for the commit is not made
            return UnavailableError(error.message)
        except StorageError as error:
            return error
        return None if is_locked else Changed()

    def _undo(self, name: str, keys: Sequence[str]) -> None:
        """Take a commit back that cannot be made; what cannot be told now is found out by whoever meets it."""
        try:
            self._locks.give_up(name)
        except StorageError as error:
            logger.warning("%s: a commit that is not made is not ended: %s", self._objects.name, error)

    def _remove(self, steps: Sequence[Step], plan: Plan) -> list[Step]:
        """Remove many keys, one by one, and what others make in their folders meanwhile; return what was removed.

        What is moved away meanwhile is not: its parts are the mover's.
        """
        removed: list[Step] = []

        def remove(step: Step) -> None:
            head = step.head
            for _ in range(_TURNS):
                if head is None or not head.is_there:
                    return
                if self._locks.remove(step.key, head.etag):
                    removed.append(Step(step.key, head, None))
                    return
                head = self._locks.settled(step.key)
            raise UnavailableError(f"{step.key} is changed faster than it can be removed.", key=step.key, hint="Retry.")

        left = list(steps)
        with after_writing():
            for _ in range(_TURNS):
                for step in left:
                    self._known.pop(step.key, None)
                    self._appender.forget(step.key)
                # Whoever dies at this can remove it again, for the owner is there until nothing else is.
                self._objects.together(remove, [step for step in left if step.key not in plan.required])
                self._objects.together(remove, [step for step in left if step.key in plan.required])
                keys = [key for folder in plan.trees for key in self._contents.keys(f"{folder}/")]
                if not keys:
                    return removed
                heads = self._objects.together(self._locks.settled, keys)
                left = [Step(key, head, None) for key, head in zip(keys, heads, strict=True)]
            raise UnavailableError("Others fill the same folder all the time.", hint="Retry.")

    def _clean(self, steps: Sequence[Step], made: Sequence[Part]) -> None:
        """Have removed what nothing refers to any more, of what was there and of what was made."""
        kept: dict[str, Part] = {}
        for step in steps:
            if step.after is not None:
                kept |= parts_of(read_head(step.after, ""))
        self._garbage.later(part for part in made if part.name not in kept)
        for step in steps:
            if step.head is not None:
                self._garbage.later(part for name, part in parts_of(step.head).items() if name not in kept)
                if step.head.is_log:
                    self._garbage.drop(step.head.generation)


def _free(steps: Sequence[Step], plan: Plan) -> set[str]:
    """Return the keys that must stay absent, but for folders that are filled: there others are met at their keys."""
    return {key for key in plan.absent if not any(f"{step.key}/".startswith(f"{key}/") for step in steps)}


def _makes(step: Step) -> bool:
    return step.after is not None and (step.head is None or not step.head.is_there)


def _only_removes(changes: Sequence[object], steps: Sequence[Step]) -> bool:
    return any(isinstance(change, RemoveTree) for change in changes) and all(step.after is None for step in steps)
