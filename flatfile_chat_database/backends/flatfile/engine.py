"""Making changes durable on files, one batch at a time, under the store's lock.

The life of a batch: what a dead process left unfinished is finished; conditions are checked and steps listed
(`plan.py`); the steps are written to the journal and flushed, which is the commit; they are done to the files, not
flushed; the mark in the lock file moves behind them; everybody is answered. Nothing is visible before it is durable,
and no file changes before the journal can do the change again.

When the journal has grown, it is folded into the files (`checkpoint.py`). Whoever finds journal and nobody else at
work does all of it again (`replay.py`), whatever the files look like.

The engine is synchronous and belongs to one thread; `writer.py` runs it. For others are only what stands under "for
every thread", the tree, and what the ledger says is.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence

from ... import codec
from ...config import StorageConfig
from ...errors import DurabilityError, StorageError
from ...layout import Layout
from ..changes import Move, Outcome, RemoveTree
from ..writer import Job
from .drafts import steps_of
from .files import Files
from .folders import Folders
from .jobs import EngineChange, Hold, is_structural, key_of
from .journal import Batch, Step
from .ledger import Ledger, is_full
from .loading import Loading
from .openlogs import OpenLogs
from .oserrors import mapped, told
from .plan import Known, Later, Mixed, Plan, exists, read
from .syncs import Syncs
from .tree import Tree
from .wholes import Wholes

logger = logging.getLogger("flatfile_chat_database")

_LARGEST_BATCH_BYTES = 8 << 20
_FEW_JOBS = 32
"""So few that a shorter flush for all is worth a longer look for each."""


class Engine:
    """Applies jobs to the files of one store."""

    def __init__(self, config: StorageConfig, root: str, files: Files) -> None:
        self._config = config
        self._files = files
        self._root = root
        self._layout = Layout(config)
        self.tree = Tree(files, root, self._layout, config.atomic_write_temp_suffix)
        self._folders = Folders(files, self.tree, clean_up=config.auto_cleanup_empty_directories)
        self._logs = OpenLogs(files, self.tree, self._folders, maximum=config.max_open_files)
        self._syncs = Syncs(files, self.tree)
        self._wholes = Wholes(config, files, self.tree, self._folders, self._syncs)
        self._known = Known()
        self.failure: DurabilityError | None = None
        """What nobody could be told before the store was closed."""
        self.ledger = Ledger(
            config,
            root,
            files,
            self.tree,
            self._folders,
            self._syncs,
            self._wholes,
            forget=lambda: self._logs.forget_below(""),
            others_wrote=self._known.keys.clear,
        )

    @property
    def open_files(self) -> int:
        """The number of descriptors that are kept between jobs."""
        return len(self._logs) + self.ledger.open_files

    def open(self) -> None:
        """Do again what the journal says if nobody is at work on the store; do nothing if there is no journal.

        Raises:
            IntegrityError: The journal is damaged, or of another format.
        """
        self.ledger.open()

    def idle(self) -> float | None:
        """Do what is due while there are no jobs; return in how many seconds to come again, None for never."""
        return self.ledger.idle()

    def close(self) -> None:
        """Fold the journal into the files if nobody else is at work; let go of everything."""
        try:
            self.ledger.close()
        except DurabilityError as error:
            self.failure = error
        finally:
            self.let_go()
            self._syncs.close()

    def let_go(self) -> None:
        """Close all descriptors and touch nothing else: a forked child has locks of threads that it does not have."""
        self._logs.forget_below("")
        self.ledger.let_go()

    # --- running jobs --------------------------------------------------------------------------------

    def run(self, jobs: Sequence[Job]) -> None:
        """Do the jobs in order and fill in what came of each."""
        self._files.count("batches")
        self._files.count("commits", len(jobs))
        try:
            if self.ledger.broken is not None:
                raise self.ledger.refusal()
            self.ledger.lock.take()
            self.ledger.prepare()
        except Exception as error:
            for job in jobs:
                job.error = _again(told(error, self.ledger.lock.key))
        else:
            try:
                self._run(jobs)
            except BaseException:
                self._logs.forget_below("")  # lines may be to come that never will
                raise
            self._logs.evict()
            self.ledger.checkpoint_if_due()
        finally:
            self.ledger.lock.release()

    def _run(self, jobs: Sequence[Job]) -> None:
        self._known.begin()
        self._logs.avoids_times = len(jobs) <= _FEW_JOBS
        plan = self._plan()
        for job in jobs:
            try:
                if self.ledger.is_behind:
                    self.ledger.catch_up()
                if not plan.add_message(job):
                    plan = self._add(job, plan)
            except Exception as error:
                job.error = told(error, self.ledger.key)
            if plan.size > _LARGEST_BATCH_BYTES:
                self._commit(plan)
                plan = self._plan()
        self._commit(plan)

    def _add(self, job: Job, plan: Plan) -> Plan:
        """Add a job to a plan; if what is planned has to be done first, do it, and return the plan to go on with."""
        if self.ledger.broken is not None:
            raise self.ledger.refusal()
        if not is_structural(job):
            try:
                plan.add(job)
            except (Later, Mixed):
                pass
            else:
                return plan
        self._commit(plan)
        plan = self._plan()
        try:
            if self.ledger.broken is not None:
                raise self.ledger.refusal()
            if self.ledger.is_behind:
                self.ledger.catch_up()
            if is_structural(job):
                self._run_structural(job)
            else:
                self._run_alone(job, plan)
        except Exception as error:
            job.error = told(error, self.ledger.key)
        return plan

    def _run_alone(self, job: Job, plan: Plan) -> None:
        """Plan a job with nothing before it; if it changes a file in two ways, do one change after the other."""
        try:
            plan.add(job)
        except (Later, Mixed):
            plan.check(job)
            self._run_changes(job)

    def _run_changes(self, job: Job) -> None:
        """Do the changes of a job, whose conditions hold, one by one."""
        outcomes: list[Outcome] = []
        for number, change in enumerate(job.changes):
            part = Job([change])
            if is_structural(part):
                self._run_structural(part, checked=True)
            else:
                plan = self._plan()
                plan.add(part, checked=True)
                self._commit(plan)
            if part.error is not None:
                raise part.error if number == 0 else _in_part(part.error)
            outcomes += part.outcomes or []
        job.outcomes = outcomes

    def _plan(self) -> Plan:
        return Plan(
            self._files,
            self.tree,
            self._folders,
            self._logs,
            block=self._config.jsonl_read_buffer_size,
            known=self._known,
            stage=self._wholes.stage,
            mend=self._mend,
        )

    def _commit(self, plan: Plan) -> None:
        """Write a plan to the journal, flush it, and do it. Whatever happens, every job of it has an answer."""
        if not plan.drafts:
            return
        steps, parts = steps_of(plan.drafts)
        try:
            if self.ledger.broken is not None:
                raise self.ledger.refusal()
            # The bytes of a blob are durable, but a file without a name is found by nobody after a power cut.
            if blobs := [draft.source for draft in plan.drafts if draft.op == "install" and not draft.staged]:
                self._syncs.folders_of(blobs)
            segment = self.ledger.commit(steps, b"".join(parts))
            if self._config.durability == "normal" and any(step.op == "install" for step in steps):
                self.ledger.flush()  # or the file might be durable without what the journal did to that before it
        except Exception as error:
            plan.discard(isinstance(error, DurabilityError))
            for job in plan.jobs:
                job.outcomes, job.error = None, _again(told(error, self.ledger.key))
            return
        done = 0
        self._folders.were_filled()
        try:
            for step, data in zip(steps, parts, strict=True):
                if step.op == "append":
                    self._logs.append(step.key, data)
                else:
                    self._apply(step, data)
                done += 1
        except Exception as error:
            self.ledger.stop_before(segment)
            if is_full(error) and self.ledger.has_finished(segment):
                return
            for job in plan.jobs_of({step.key for step in steps[done:]}):
                job.outcomes, job.error = None, _later(told(error, steps[done].key))
            return
        self._files.count("bytes_written", sum(step.bytes for step in steps if step.op == "append"))
        try:
            self.ledger.move_mark(segment)
        except (OSError, StorageError) as error:  # whoever reads the old mark, or none, does the batch once more
            logger.warning("%s: it does not say how far the journal is done (%s)", self.ledger.lock.key, error)

    # --- jobs that move and remove folders -------------------------------------------------------------

    def _run_structural(self, job: Job, *, checked: bool = False) -> None:
        """Do a job that is alone in the journal, so that no older step is ever done to what it leaves.

        All that is in the journal is folded into the files first, and its own steps are afterwards.
        """
        if isinstance(job.changes[0], Hold):
            job.changes[0].work()
            job.outcomes = [None]
            return
        plan = self._plan()
        if not checked:
            plan.check(job)
        if not _is_simple(job):
            self._run_changes(job)
            return
        self._known.keys.clear()
        structural: list[Step] = []
        rest = Job([change for change in job.changes if not isinstance(change, Move | RemoveTree)])
        found: dict[int, Outcome] = {}
        for index, change in enumerate(job.changes):
            with mapped(key_of(change)):
                step, outcome = self._structural_step(change)
            found[index] = outcome
            if step is not None:
                structural.append(step)
        try:
            plan.add(rest, checked=True)
        except Mixed:
            self._run_changes(job)
            return
        others = iter(rest.outcomes or [])
        outcomes = [
            found[index] if isinstance(change, Move | RemoveTree) else next(others)
            for index, change in enumerate(job.changes)
        ]
        if structural or plan.drafts:
            steps, parts = steps_of(plan.drafts)
            payload = b"".join(parts)
            try:
                with mapped(self.ledger.key):
                    self.ledger.fold()
                    segment = self.ledger.write([*structural, *steps], payload, ahead=False)
                    if self._config.durability == "normal":
                        self.ledger.flush()
            except BaseException as error:
                plan.discard(isinstance(error, DurabilityError))
                raise
            try:
                with mapped(key_of(job.changes[-1])):
                    replay = self.ledger.replay([Batch(0, 0, 0, [*structural, *steps], payload)])
                    replay.run()
                    self.ledger.end_structural(segment, replay.keys)
            except Exception as error:
                self.ledger.stop_before(segment)
                raise _later(error) from error
        job.outcomes = outcomes

    def _structural_step(self, change: EngineChange) -> tuple[Step | None, Outcome]:
        """Return the step of a Move or RemoveTree, None if there is nothing to do, and its outcome."""
        match change:
            case Move(source, target):
                try:
                    self._files.status(self.tree.path(source))
                except FileNotFoundError:
                    return None, False
                return Step("move", target, source=source), True
            case RemoveTree(folder):
                try:
                    if self._files.status(self.tree.path(folder)).kind != "folder":
                        return None, []
                except FileNotFoundError:
                    return None, []
                doomed = self.tree.temporary(folder)[len(self._root) + 1 :]
                return Step("remove", folder, source=doomed), list(self.tree.keys(f"{folder}/"))
            case _:
                return None, None

    # --- doing steps ---------------------------------------------------------------------------------

    def _apply(self, step: Step, data: bytes) -> None:
        """Do a step that is no append for the first time, right after it was planned."""
        match step.op:
            case "put":
                self._logs.forget(step.key)
                self._wholes.put(step.key, data)
            case "install":
                self._logs.forget(step.key)
                self._folders.make(step.key.rpartition("/")[0])
                self._files.rename(self.tree.path(step.source), self.tree.path(step.key))
            case "delete":
                self._logs.forget(step.key)
                with contextlib.suppress(FileNotFoundError):
                    self._files.remove(self.tree.path(step.key))
                self._folders.emptied(step.key)

    def _mend(self, key: str) -> bool:
        """Set aside half a line at the end of a log, so that what is appended stands alone.

        A whole message that only lacks its newline, as an editor leaves it, gets one.
        """
        log = self._logs.look(key)
        half, size = log.half, log.size
        if half == 0:
            return False
        tail = b""
        if half <= codec.MAX_LINE_BYTES:
            descriptor = self._files.open_to_read(self.tree.path(key))
            try:
                tail = self._files.read(descriptor, half, size - half)
            finally:
                self._files.close(descriptor)
        if codec.line_id(tail) is not None:
            segment = self.ledger.write([Step("append", key, 1, size)], b"\n", ahead=False)
            self._logs.append(key, b"\n")
            self.ledger.move_mark(segment)
        else:
            self._cut(key, size - half, size)
        self._logs.forget(key)
        return True

    def _cut(self, key: str, start: int, size: int) -> None:
        descriptor = self._files.open_to_change(self.tree.path(key))
        try:
            pieces: Iterator[bytes] = (
                self._files.read(descriptor, min(1 << 20, size - offset), offset)
                for offset in range(start, size, 1 << 20)
            )
            self._wholes.set_aside(key, pieces, "half a line at the end of the log", start)
            self._files.truncate(descriptor, start)
            self._syncs.file(descriptor)  # or a power cut would bring it back under what is appended now
        finally:
            self._files.close(descriptor)

    # --- for every thread ----------------------------------------------------------------------------

    def loading(self) -> Loading:
        """Return what writes many files at once."""
        return Loading(self._files, self.tree, self._syncs)

    def exists(self, key: str) -> bool:
        """Return whether there is a file at `key`."""
        return exists(self._files, self.tree, key)

    def read(self, key: str) -> bytes | None:
        """Return a file's bytes, or None if it is absent or a folder."""
        return read(self._files, self.tree, key)


def _later(error: Exception) -> DurabilityError:
    text = error.message if isinstance(error, StorageError) else str(error)
    return DurabilityError(
        f"The change is in the journal, but not in its place yet. {text}",
        key=getattr(error, "key", None),
        hint="It is done before the next write, once the medium allows it.",
    )


def _is_simple(job: Job) -> bool:
    """Tell whether the folders that a job moves or removes are none of each other's, and no other change is in them."""
    places: list[str] = []
    keys: list[str] = []
    for change in job.changes:
        match change:
            case Move(source, target):
                places += [source, target]
            case RemoveTree(folder):
                places.append(folder)
            case _:
                keys.append(key_of(change))
    pairs = [(one, other) for one in places for other in [*places, *keys] if one is not other]
    return not any(other == one or other.startswith(f"{one}/") for one, other in pairs)


def _in_part(error: Exception) -> Exception:
    """Return the error of a later change of a job: those before it are done."""
    if isinstance(error, DurabilityError) or not isinstance(error, StorageError):
        return error
    return DurabilityError(f"The change was made in part. {error.message}", key=error.key, hint="Run `chatdb check`.")


def _again(error: Exception) -> Exception:
    """Return an error of its own for each of several callers, for a traceback grows with each raise."""
    return copy.copy(error) if isinstance(error, StorageError) else error
