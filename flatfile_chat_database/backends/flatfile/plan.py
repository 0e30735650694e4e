"""What the commits of a batch come to: their conditions checked, their steps listed, nothing of it done yet.

A condition is checked against the files and against what the commits before it in the batch are going to do. Where that
takes more than a look at which documents come and go, the batch has to be done first: `Later` says so.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple, cast

from ... import codec
from ...errors import StorageLimitExceeded, UnavailableError
from ..changes import ANY, Absent, Append, Delete, Edit, Move, Outcome, Put, Quota, RemoveTree, Require, Truncate
from ..rules import (
    check_edit,
    check_lines,
    check_maximum,
    check_quota,
    check_version,
    exists_already,
    kept_and_dropped,
    new_lines,
    not_found,
    version_of,
)
from ..writer import Job
from .drafts import Draft
from .files import Files
from .folders import Folders
from .jobs import EngineChange, Extend, Mend, Place, key_of
from .logs import LogReader
from .openlogs import OpenLog, OpenLogs
from .oserrors import unavailable
from .tree import Tree

_LARGEST_PUT = 1 << 20
"""A larger document is written beside its place at once, not into the journal."""
_COPY_BYTES = 1 << 20
_STEP_BYTES = 200
"""What a step takes in the journal besides, about."""


class Later(Exception):
    """What is planned so far has to be done before this."""


class Mixed(Exception):
    """A job changes one file in two ways; each change has to be done by itself."""


class Known:
    """Documents that were there a moment ago, so that not every message looks for its session.

    Emptied when another process has written and when something is removed; who removes a document by hand is noticed
    after a second.
    """

    SECONDS = 1.0

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self._until = 0.0

    def begin(self) -> None:
        """Forget what is not known from just now; called before each batch."""
        now = time.monotonic()
        if now >= self._until:
            self.keys.clear()
            self._until = now + self.SECONDS


class _Lines(NamedTuple):
    """What an Append adds to a log."""

    log: OpenLog
    lines: Sequence[bytes]
    ids: Sequence[str]


class Plan:
    """The steps of a batch."""

    def __init__(
        self,
        files: Files,
        tree: Tree,
        folders: Folders,
        logs: OpenLogs,
        *,
        block: int,
        known: Known,
        stage: Callable[[str, Iterator[bytes]], str],
        mend: Callable[[str], bool],
    ) -> None:
        """Write finished files beside their places with `stage`; mend ends of logs with `mend`.

        `stage` returns the path of the file; `mend` is called when nothing is planned.
        """
        self._files = files
        self._tree = tree
        self._folders = folders
        self._logs = logs
        self._block = block
        self._stage = stage
        self._mend = mend
        self.jobs: list[Job] = []
        self.drafts: list[Draft] = []
        self.size = 0
        self._known = known
        self._planned: set[str] = set()  # keys that the plan makes or removes
        self._exists: dict[str, bool] = {}  # what is known of keys, once the plan is done
        self._inside: dict[str, set[str]] = {}  # folders to come, by their parent
        self._appended: set[str] = set()
        self._removes = False

    def check(self, job: Job) -> dict[int, _Lines]:
        """Check a job's conditions; return what is to be appended by each of its changes, by index."""
        found: dict[int, _Lines] = {}
        change: EngineChange | None = None
        try:
            for index, change in enumerate(job.changes):
                kind = type(change)
                if kind is Append:
                    found[index] = self._check_append(cast("Append", change))
                elif kind is Require:
                    self._require(cast("Require", change))
                else:
                    self._check(change)
        except OSError as error:
            raise unavailable(error, None if change is None else key_of(change)) from error
        return found

    def add(self, job: Job, *, checked: bool = False) -> None:
        """Check a job's conditions, unless that is done, and list its steps; if it raises, nothing of it is planned.

        Raises:
            Later: The plan has to be done first.
            Mixed: Each change of the job has to be done by itself.
            StorageError: A condition does not hold, or the medium fails; nothing has changed.
        """
        first = len(self.drafts)
        change: EngineChange | None = None
        try:
            found = {} if checked else self.check(job)
            outcomes: list[Outcome] = []
            seen: list[str] = []
            for index, change in enumerate(job.changes):
                kind = type(change)
                if kind is Require:
                    outcomes.append(None)
                    continue
                key = key_of(change)
                if kind is Append:
                    fresh = None if key in seen else found.get(index)
                    outcomes.append(self._append(cast("Append", change), fresh))
                else:
                    outcomes.append(self._draft(change, seen))
                seen.append(key)
        except OSError as error:
            self._withdraw(first)
            raise unavailable(error, None if change is None else key_of(change)) from error
        except BaseException:
            self._withdraw(first)
            raise
        for draft in self.drafts[first:]:
            draft.job = job
        job.outcomes = outcomes
        self.jobs.append(job)

    def add_message(self, job: Job) -> bool:
        """Plan the commonest of all jobs, a new message for a log that there is; return False if it is another.

        The same as `add`, in a few steps: each of them is taken for every message.
        """
        if len(job.changes) != 2:
            return False
        require, append = job.changes
        if type(require) is not Require or type(append) is not Append or len(append.ids) != 1:
            return False
        key = append.key
        is_first = key not in self._appended
        if is_first and key in self._planned:
            return False
        try:
            log = self._logs.look(key)
            if log.identity is None or log.half or (append.maximum is not None and log.count >= append.maximum):
                return False
        except OSError as error:
            raise unavailable(error, key) from error
        if require.key not in self._known.keys:
            try:
                self._require(require)
            except OSError as error:
                raise unavailable(error, require.key) from error
            self._known.keys.add(require.key)
        at = log.learned
        line = append.lines[0]
        if not self._logs.expect_new(log, append.ids[0], line):
            return False
        self.drafts.append(Draft("append", key, append.lines, at, job=job))
        self.size += len(line) + len(key) + _STEP_BYTES
        if is_first:  # what it is in is there already
            self._appended.add(key)
            self._planned.add(key)
        job.outcomes = [None, 1]
        self.jobs.append(job)
        return True

    def discard(self, in_doubt: bool = False) -> None:
        """Remove what was made beside its place, and forget what was to come: the plan is not done.

        Unless that is in doubt: then it may be needed when the store is opened again.
        """
        self._known.keys.clear()  # some of them were only to come
        for draft in self.drafts:
            if draft.op == "append":
                self._logs.forget(draft.key)
            elif draft.staged and not in_doubt:
                with contextlib.suppress(OSError):
                    self._files.remove(self._tree.path(draft.source))

    def jobs_of(self, keys: Collection[str]) -> list[Job]:
        """Return the jobs that have a step on one of the keys."""
        jobs = {id(draft.job): draft.job for draft in self.drafts if draft.job is not None and draft.key in keys}
        return list(jobs.values())

    def _withdraw(self, first: int) -> None:
        if first == len(self.drafts):
            return
        for draft in self.drafts[first:]:
            self.size -= sum(map(len, draft.pieces)) + len(draft.key) + len(draft.source) + _STEP_BYTES
            if draft.op == "append":
                self._forget(draft.key)
            elif draft.staged:
                with contextlib.suppress(OSError):
                    self._files.remove(self._tree.path(draft.source))
        del self.drafts[first:]
        self._recount()

    def _forget(self, key: str) -> None:
        """Forget what is to come of a log, and plan the lines of earlier jobs again."""
        self._logs.forget(key)
        earlier = [draft for draft in self.drafts if draft.key == key and draft.op == "append"]
        if earlier and self._appended and key in self._appended:
            log = self._logs.look(key)
            for draft in earlier:
                self._logs.expect(log, draft.pieces, [codec.line_id(line) for line in draft.pieces])

    def _recount(self) -> None:
        self._exists.clear()
        self._planned.clear()
        self._inside.clear()
        self._appended.clear()
        self._removes = False
        for draft in self.drafts:
            self._note(draft)

    def _note(self, draft: Draft) -> None:
        """Take in what a draft makes and removes."""
        key = draft.key
        if draft.op == "delete":
            self._known.keys.clear()
            self._exists[key] = False
            self._planned.add(key)
            self._removes = True
            return
        if draft.op == "append":
            if key in self._appended:
                return
            self._appended.add(key)
        self._planned.add(key)
        self._exists[key] = True
        folder, _, _ = key.rpartition("/")
        while folder:
            parent, _, name = folder.rpartition("/")
            beside = self._inside.setdefault(parent, set())
            if name in beside:
                break
            beside.add(name)
            folder = parent

    # --- checking conditions -------------------------------------------------------------------------

    def _require(self, change: Require) -> None:
        key = change.key
        known = self._exists.get(key)
        if known is None:
            known = self.exists(key)
            if known:  # as it stays until the plan is done
                self._exists[key] = True
        if not known:
            raise not_found(change.what, key)

    def _check_append(self, change: Append) -> _Lines:
        key = change.key
        if key not in self._appended:
            if key in self._planned:
                raise Later
            self._refuse_kin(key)
        log = self._look(key)
        found = self._new(change, log)
        check_maximum(change, log.count, found.lines)
        return found

    def _new(self, change: Append, log: OpenLog) -> _Lines:
        """Return what of an Append its log does not hold yet."""
        lines = change.lines
        ids: Sequence[str] = change.ids or [codec.written_id(line) for line in lines]
        if len(lines) == 1 and hash(ids[0]) not in log.offsets:
            return _Lines(log, lines, ids)
        lines = tuple(new_lines(change, lambda record_id: self._logs.find(change.key, log, record_id)))
        return _Lines(log, lines, ids if len(lines) == len(ids) else [codec.written_id(line) for line in lines])

    def _check(self, change: EngineChange) -> None:
        match change:
            case Put(key, _, expected):
                if key in self._planned:
                    raise Later
                self._refuse_kin(key)
                if expected is not ANY:
                    check_version(key, self.read(key), expected)
            case Quota(folder):
                self._check_quota(change, folder)
            case Absent(key):
                self._check_absent(key)
            case Edit(key, record_id):
                self._settle(key)
                check_edit(change, self._strict_find(key, record_id))
            case Truncate(key, count):
                self._settle(key)
                self._dropped(key, count)
            case Move(source, target):
                with contextlib.suppress(FileNotFoundError):
                    self._files.status(self._tree.path(source))  # unreadable is not absent
                self._check_absent(target)
            case Extend(key, data):
                check_lines(key, data)
                if key not in self._appended:
                    if key in self._planned:
                        raise Later
                    self._refuse_kin(key)
            case Delete(key) | Place(_, key) | Mend(key):
                if key in self._planned:
                    raise Later
                if isinstance(change, Place) and change.loaded:
                    self._refuse_kin(key)
                    if self.exists(key):
                        raise exists_already(key)
            case Require():
                self._require(change)
            case Append():
                self._check_append(change)
            case RemoveTree():
                pass

    def _check_quota(self, quota: Quota, folder: str) -> None:
        coming = self._inside.get(folder, set())
        try:
            check_quota(quota, self._folders.inside(folder), coming)
        except StorageLimitExceeded:  # count again, without the folders that a failed creation left empty
            check_quota(quota, self._folders.filled(folder), coming)

    def _check_absent(self, key: str) -> None:
        if self._removes:
            raise Later
        parent, _, name = key.rpartition("/")
        if name in self._inside.get(parent, ()) or self._exists.get(key):
            raise exists_already(key)
        with contextlib.suppress(NotADirectoryError):  # nothing is below a file
            if self.exists(key) or self._tree.holds_files(key):
                raise exists_already(key)

    def _look(self, key: str) -> OpenLog:
        """Return a log whose end is whole."""
        log = self._logs.look(key)
        if log.half:
            self._settle(key)
            log = self._logs.look(key)
        return log

    def _settle(self, key: str) -> None:
        """See that a log is as it was planned to be, and mend its end, before it is looked at as a whole."""
        if key in self._planned:
            raise Later
        if self._logs.look(key).half:
            if self.drafts:
                raise Later
            self._mend(key)

    # --- listing steps -------------------------------------------------------------------------------

    def _append(self, change: Append, found: _Lines | None) -> int:
        key = change.key
        if found is None:
            found = self._new(change, self._look_again(key))
        if found.lines:
            at = found.log.learned
            self._logs.expect(found.log, found.lines, found.ids)
            self._plan(Draft("append", key, found.lines, at))
        return len(found.lines)

    def _draft(self, change: EngineChange, seen: Collection[str]) -> Outcome:
        """List the steps of a change; `seen` are the keys that the job has changed before."""
        match change:
            case Put(key, data):
                if key in seen:
                    raise Mixed
                self._put(key, data)
                return version_of(data)
            case Delete(key):
                if key in seen:
                    raise Mixed
                size = self._size(key)
                if size is not None:
                    self._plan(Draft("delete", key, before=size))
                return size is not None
            case Edit(key):
                if key in seen:
                    raise Mixed
                self._install(key, self._edited(change))
            case Truncate(key, count):
                if key in seen:
                    raise Mixed
                size, dropped = self._dropped(key, count)
                if dropped:
                    self._install(key, self._beginning(key, size))
                return list(dropped)
            case Place(temporary, key, True):
                self._refuse_folder(key)
                self._plan_install(temporary, key, None, staged=True)
                return True
            case Place(temporary, key):
                return self._place(temporary, key)
            case Extend(key, data):
                log = self._look_again(key)
                at = log.learned
                pieces = [line + b"\n" for line in data.split(b"\n")[:-1]]
                self._logs.expect(log, pieces, [codec.line_id(line[:-1]) for line in pieces])
                self._plan(Draft("append", key, pieces, at=at))
                return True
            case Mend(key):
                half = self._logs.look(key).half > 0
                self._settle(key)
                return half
        return None

    def _plan(self, draft: Draft) -> None:
        if draft.op != "delete":
            # Made before the commit, for a folder that cannot be made is an error of this job alone.
            self._folders.make(draft.key.rpartition("/")[0])
        self.drafts.append(draft)
        self.size += sum(map(len, draft.pieces)) + len(draft.key) + len(draft.source) + _STEP_BYTES
        self._note(draft)

    def _look_again(self, key: str) -> OpenLog:
        if key not in self._appended and key in self._planned:
            raise Mixed
        return self._look(key)

    def _put(self, key: str, data: bytes) -> None:
        if len(data) > _LARGEST_PUT:
            self._install(key, iter([data]))
            return
        old = self.read(key)
        if old is None:
            self._refuse_folder(key)
        self._plan(Draft("put", key, [data], was=None if old is None else version_of(old)))

    def _refuse_folder(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self._files.status(self._tree.path(key)).kind == "folder":
                raise IsADirectoryError(errno.EISDIR, "Is a folder", key)

    def _refuse_kin(self, key: str) -> None:
        """Put off what makes a file below or above one that the plan makes: one of the two cannot be done."""
        parent, _, name = key.rpartition("/")
        if name in self._inside.get(parent, ()):
            raise Later
        while parent:
            if parent in self._planned:
                raise Later
            parent = parent.rpartition("/")[0]

    def _install(self, key: str, pieces: Iterator[bytes]) -> None:
        size = self._size(key)
        if size is None:
            self._refuse_folder(key)
        self._plan_install(self._stage(key, pieces), key, size, staged=True)

    def _plan_install(self, path: str, key: str, size: int | None, *, staged: bool) -> None:
        length = self._files.status(path).size
        source = path[len(self._tree.path("")) + 1 :]
        before = -1 if size is None else size
        self._plan(Draft("install", key, at=length, source=source, before=before, staged=staged))

    def _place(self, temporary: str, key: str) -> bool:
        if self.exists(key):
            self._files.remove(temporary)
            return False
        self._refuse_folder(key)
        self._plan_install(temporary, key, None, staged=False)
        return True

    # --- files ---------------------------------------------------------------------------------------

    def exists(self, key: str) -> bool:
        """Return whether there is a file at `key`."""
        return exists(self._files, self._tree, key)

    def read(self, key: str) -> bytes | None:
        """Return a file's bytes, or None if it is absent or a folder."""
        return read(self._files, self._tree, key)

    def _size(self, key: str) -> int | None:
        try:
            status = self._files.status(self._tree.path(key))
        except FileNotFoundError:
            return None
        return status.size if status.kind == "file" else None

    def _beginning(self, key: str, size: int) -> Iterator[bytes]:
        """Yield the first `size` bytes of a log."""
        descriptor = self._files.open_to_read(self._tree.path(key))
        try:
            for offset in range(0, size, _COPY_BYTES):
                yield self._files.read(descriptor, min(_COPY_BYTES, size - offset), offset)
        finally:
            self._files.close(descriptor)

    def _dropped(self, key: str, count: int | None) -> tuple[int, list[bytes]]:
        """Return the size that a log has after a Truncate, and the records that go."""
        if count == 0 or not self.exists(key):
            return 0, []
        if count is None:
            kept, dropped = kept_and_dropped(key, self.read(key) or b"", None)
            return len(kept), dropped
        with self._reader(key) as reader:
            found = reader.backward(count)
        return (found[-1][0] if found else 0), [line for _, line in reversed(found)]

    def _reader(self, key: str) -> LogReader:
        return LogReader(self._files, self._tree.path(key), key, block=self._block, strict=True)

    def _strict_find(self, key: str, record_id: str) -> bytes | None:
        """Return a record's line after reading every line of the log, none of which may be damaged."""
        found = None
        with self._reader(key) as reader:
            for run in reader.runs():
                for line in run:
                    if found is None and codec.line_id(line) == record_id:
                        found = line
        return found

    def _edited(self, edit: Edit) -> Iterator[bytes]:
        """Yield the log's new bytes; the check has read all of it strictly."""
        with self._reader(edit.key) as reader:
            for run in reader.runs():
                new: list[bytes] = []
                for line in run:
                    if codec.line_id(line) != edit.record_id:
                        new.append(line + b"\n")
                    elif edit.line is not None:
                        new.append(edit.line)
                yield b"".join(new)


def exists(files: Files, tree: Tree, key: str) -> bool:
    """Return whether there is a file at `key`."""
    try:
        return files.status(tree.path(key)).kind == "file"
    except FileNotFoundError:
        return False


def read(files: Files, tree: Tree, key: str) -> bytes | None:
    """Return a file's bytes, or None if it is absent or a folder."""
    try:
        descriptor = files.open_to_read(tree.path(key))
    except FileNotFoundError:
        return None
    try:
        status = files.status_of(descriptor)
        if status.kind == "folder":
            return None
        if status.kind != "file":
            raise UnavailableError(f"{key} is neither a file nor a folder.", key=key)
        pieces: list[bytes] = []
        size = 0
        while piece := files.read(descriptor, max(status.size - size, 0) + 1, size):
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces)
    finally:
        files.close(descriptor)
