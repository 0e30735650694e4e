"""Making changes durable on files, one batch at a time, under the store's lock.

The life of a batch: what a dead process left unfinished is finished; conditions are checked and steps listed
(`plan.py`); the steps are written to the journal and flushed, which is the commit; they are done to the files, not
flushed; the mark in the lock file moves behind them; everybody is answered. Nothing is visible before it is durable,
and no file changes before the journal can do the change again.

When the journal has grown, it is folded into the files (`checkpoint.py`). Whoever finds journal and nobody else at
work does all of it again (`replay.py`), whatever the files look like.

The engine is synchronous and belongs to one thread; `writer.py` runs it. Only what stands under "for every
thread" and `history` are for others.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import logging
import time
from collections.abc import Iterable, Iterator, Sequence

from ... import codec
from ...config import StorageConfig
from ...errors import DurabilityError, StorageError
from ...layout import Layout
from ..base import Move, Outcome, RemoveTree
from .checkpoint import Checkpoint
from .files import Files
from .folders import Folders
from .history import History
from .journal import Batch, Journal, Segment, Step
from .lock import Mark, Presence, StoreLock
from .openlogs import OpenLogs
from .oserrors import mapped, unavailable
from .plan import EngineChange, Extend, Job, Known, Later, Mend, Mixed, Place, Plan, exists, key_of, read, steps_of
from .recovery import Recovery
from .syncs import Syncs
from .tree import Tree
from .wholes import Wholes

__all__ = ["Engine", "EngineChange", "Extend", "Job", "Mend", "Place"]

logger = logging.getLogger("flatfile_chat_database")

_LARGEST_BATCH_BYTES = 8 << 20
_FLUSH_SECONDS = 0.5
"""At the level `normal`: how long what was answered waits for its flush, at most; the disk may take as long again."""


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
        self._syncs = Syncs(files, self.tree, wanted=config.durability != "os")
        self._journal = Journal(files, self.tree, self._folders, self._layout, self._syncs)
        timeout = config.lock_timeout_seconds
        self.lock = StoreLock(
            files,
            self._folders,
            root,
            self._layout.lock,
            timeout_seconds=timeout,
            allow_network=config.allow_network_file_system,
        )
        self._wholes = Wholes(config, files, self.tree, self._folders, self._syncs)
        self._recovery = Recovery(files, self.tree, self._folders, self._journal, self._syncs, self._wholes)
        self._presence = Presence(files, self._folders, root, self._layout.presence, timeout_seconds=timeout)
        self._checkpoint = Checkpoint(
            files, self._folders, root, self._layout, self._journal, self._syncs, timeout_seconds=timeout
        )
        self.history = History(self._journal, self.lock)
        self._known = Known()
        self._mark: Mark | None = None
        self._unflushed_since: float | None = None
        self._oldest: float | None = None  # when the segment took its first batch
        self._broken: str | None = None

    @property
    def open_files(self) -> int:
        """The number of descriptors that are kept between jobs."""
        return len(self._logs) + self.lock.is_open + self._presence.is_open + (self._journal.current is not None)

    # --- opening and closing -------------------------------------------------------------------------

    def open(self) -> None:
        """Do again what the journal says if nobody is at work on the store; do nothing if there is no journal.

        Raises:
            IntegrityError: The journal is damaged, or of another format.
        """
        if not self._journal.numbers():
            return
        try:
            self.lock.take()
            try:
                if self._presence.join():
                    self._recover()
            finally:
                self._presence.leave()
                self.lock.release()
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            # Whoever cannot write cannot mend either. What is not in the files yet is in the journal.
            logger.warning(
                "%s: the last changes may be missing, for the journal cannot be done again here (%s); "
                "open the store once where it can be written",
                self._layout.journal,
                error.strerror or error,
            )

    def close(self) -> None:
        """Fold the journal into the files if nobody else is at work; let go of everything."""
        try:
            self._checkpoint.wait()
            if self._broken is None and self._presence.joined:
                self._close()
        except (OSError, StorageError) as error:
            logger.warning("%s: it stays for the next to open the store (%s)", self._layout.journal, error)
        finally:
            self.let_go()
            self._syncs.close()

    def _close(self) -> None:
        self.lock.take()
        try:
            self._look_around()
            self._flush()
            if self._presence.is_alone():  # then whoever comes after a sync that failed does all of it again
                self._checkpoint.take()
                self._checkpoint.fold(self._old())
        finally:
            self.lock.release()

    def let_go(self) -> None:
        """Close all descriptors and touch nothing else: a forked child has locks of threads that it does not have."""
        self._logs.forget_below("")
        self._set_segment(None)
        self._presence.leave()
        self._checkpoint.let_go()
        self.lock.close()

    def idle(self) -> float | None:
        """Do what is due while there are no jobs; return in how many seconds to come again, None for never."""
        if self._broken is not None:
            return None
        now = time.monotonic()
        if self._unflushed_since is not None:
            left = self._unflushed_since + _FLUSH_SECONDS - now
            if left > 0:
                return left
            try:
                self._flush()
            except DurabilityError:  # whoever writes next is told
                return None
        if self._oldest is None:
            return None
        left = self._oldest + self._config.journal_max_age_seconds - now
        if left > 0:
            return left
        self._start_checkpoint()
        return self._config.journal_max_age_seconds

    # --- running jobs --------------------------------------------------------------------------------

    def run(self, jobs: Sequence[Job]) -> None:
        """Do the jobs in order and fill in what came of each."""
        self._files.count("batches")
        self._files.count("commits", len(jobs))
        try:
            with mapped(self._layout.lock):
                if self._broken is not None:
                    raise self._refusal()
                self.lock.take()
                self._prepare()
        except Exception as error:
            for job in jobs:
                job.error = _again(error)
        else:
            self._run(jobs)
            self._logs.evict()
            self._checkpoint_if_due()
        finally:
            self.lock.release()

    def _run(self, jobs: Sequence[Job]) -> None:
        self._known.begin()
        plan = self._plan()
        for job in jobs:
            try:
                if self._broken is not None:
                    raise self._refusal()
                if job.is_structural:
                    self._commit(plan)
                    plan = self._plan()
                    if self._broken is not None:
                        raise self._refusal()
                    self._run_structural(job)
                    continue
                try:
                    plan.add(job)
                except (Later, Mixed):
                    self._commit(plan)
                    plan = self._plan()
                    if self._broken is not None:
                        raise self._refusal() from None
                    self._run_alone(job, plan)
                if plan.size > _LARGEST_BATCH_BYTES:
                    self._commit(plan)
                    plan = self._plan()
            except Exception as error:
                job.error = error
        self._commit(plan)

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
            if part.is_structural:
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
        payload = b"".join(parts)
        try:
            with mapped(self._layout.journal):
                # The bytes of a blob are durable, but a file without a name is found by nobody after a power cut.
                self._syncs.folders_of(
                    draft.source for draft in plan.drafts if draft.op == "install" and not draft.staged
                )
                segment = self._write_or_make_room(steps, payload)
                if self._config.durability == "normal" and any(step.op == "install" for step in steps):
                    self._flush()  # or the file might be durable without what the journal did to the one before it
        except Exception as error:
            plan.discard()
            for job in plan.jobs:
                job.outcomes, job.error = None, _again(error)
            return
        done = 0
        try:
            for step, data in zip(steps, parts, strict=True):
                if step.op == "append":
                    self._logs.append(step.key, data)
                else:
                    self._apply(step, data)
                done += 1
        except Exception as error:
            self._stop_before(segment)
            if _is_full(error) and self._has_finished(segment):
                return
            if isinstance(error, OSError):
                error = unavailable(error, steps[done].key)
            for job in plan.jobs_of({step.key for step in steps[done:]}):
                job.outcomes, job.error = None, self._later(error)
        else:
            self._move_mark(segment)

    def _stop_before(self, segment: Segment) -> None:
        """Leave what is committed to whoever writes next: the mark stays before it, so it is done first."""
        self._logs.forget_below("")
        with contextlib.suppress(OSError):
            segment.cut()  # what is reserved may be the room that the files lack
        segment.end = segment.start if self._mark is None else self._mark.applied

    def _has_finished(self, segment: Segment) -> bool:
        """Try to do what is committed once more, with the room that the journal takes for what was done before."""
        try:
            batches = list(segment.batches(segment.end))
            self._checkpoint.take()
            try:
                old = self._old()
                self._go_on_in(batches)
                self._checkpoint.fold(old)
            finally:
                self._checkpoint.release()
            self._look_around()
        except (OSError, StorageError):
            return False
        return True

    def _write_or_make_room(self, steps: Sequence[Step], payload: bytes) -> Segment:
        """Commit steps; where there is no room for them, use that of the journal, which is not needed any more."""
        try:
            return self._write(steps, payload)
        except OSError as error:
            if not _is_full(error):
                raise
            self._fold()
            return self._write(steps, payload, ahead=False)

    def _write(self, steps: Sequence[Step], payload: bytes, *, ahead: bool = True) -> Segment:
        """Commit steps: when this returns they are in the journal, and durable if that is wanted."""
        segment = self._journal.current
        if segment is None:
            segment = self._journal.create()
            self._set_segment(segment)
            self._move_mark(segment)
        size = segment.write(steps, payload, ahead=ahead)
        if self._config.durability == "full":
            try:
                self._syncs.file(segment.descriptor)
            except OSError as error:
                self._break(error)
                raise self._outcome_unknown() from error
            segment.synced = segment.end + size
        elif self._unflushed_since is None:
            self._unflushed_since = time.monotonic()
        if self._oldest is None:
            self._oldest = time.monotonic()
        segment.end += size
        return segment

    def _move_mark(self, segment: Segment) -> None:
        self._mark = Mark(segment.id, segment.end)
        self.lock.write_mark(self._mark)

    def _flush(self) -> None:
        """Make durable what was answered before it was."""
        if self._unflushed_since is not None and self._journal.current is not None:
            end = self._journal.current.end
            try:
                self._syncs.file(self._journal.current.descriptor)
            except OSError as error:
                self._break(error)
                raise self._outcome_unknown() from error
            self._journal.current.synced = end
        self._unflushed_since = None

    # --- errors --------------------------------------------------------------------------------------

    def _break(self, error: Exception) -> None:
        """Take no further job: it is not known any more what is durable.

        One-shot: after a failed sync the system may call the pages clean, so a second try would prove nothing.
        """
        self._broken = getattr(error, "strerror", None) or str(error)
        self._logs.forget_below("")
        self._set_segment(None)
        self._presence.leave()  # so that whoever opens the store now looks at what is really on disk

    def _refusal(self) -> DurabilityError:
        return DurabilityError(
            f"An earlier write could not be made durable ({self._broken}); nothing was changed.",
            hint="Reopen the store and look which messages are there.",
        )

    def _outcome_unknown(self) -> DurabilityError:
        return DurabilityError(
            f"{DurabilityError.__doc__} ({self._broken})", hint="Reopen the store and look whether it is there."
        )

    def _later(self, error: Exception) -> DurabilityError:
        text = error.message if isinstance(error, StorageError) else str(error)
        return DurabilityError(
            f"The change is in the journal, but not in its place yet. {text}",
            key=getattr(error, "key", None),
            hint="It is done before the next write, once the medium allows it.",
        )

    # --- before a batch ------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Be present, and see that all that is in the journal has been done."""
        if not self._presence.joined:
            try:
                if self._presence.join():
                    self._recover()
                    self._presence.share()
            except BaseException:
                self._presence.leave()
                raise
            self._mark = None
        self._look_around()

    def _look_around(self) -> None:
        """Take in what other processes wrote, and finish what a dead one did not."""
        mark = self.lock.read_mark()
        if mark is None or mark != self._mark:
            self._adopt(mark)
        segment = self._journal.current
        if segment is not None and segment.has_more():
            self._finish(segment)

    def _adopt(self, mark: Mark | None) -> None:
        """Go on where the last writer stopped."""
        self._known.keys.clear()
        current = self._journal.current
        if mark is not None and current is not None and current.id == mark.segment and not current.is_gone():
            current.end = mark.applied
        else:
            segment = None if mark is None else self._journal.find(mark.segment)
            numbers = self._journal.numbers() if segment is None else []
            if segment is None and numbers:
                segment = self._journal.open(numbers[-1])  # the mark is lost, so all of it may have to be done
                self._syncs.folders_of([segment.key])  # and its maker may have died before its name was durable
                self._syncs.folders_of([segment.key])  # and its maker may have died before its name was durable
            elif segment is not None and mark is not None:
                segment.end = mark.applied
            self._set_segment(segment)
        self._mark = mark

    def _set_segment(self, segment: Segment | None) -> None:
        if self._journal.current is not None:
            self._journal.current.close()
        self._journal.current = segment
        self._unflushed_since = None
        self._oldest = None

    def _finish(self, segment: Segment) -> None:
        """Do what a process committed and did not finish, or began to commit.

        Its flush may have failed, and only the dead were told; so what it wrote is written anew to a segment that is
        durable before any of it is done. What this process has flushed by itself need not be.
        """
        batches = list(segment.batches(segment.end))
        if not batches:
            segment.cut()
            return
        if segment.synced < batches[-1].end:
            fresh, end = self._go_on_in(batches)
        else:
            fresh, end = segment, batches[-1].end
        self._logs.forget_below("")
        replay = self._recovery.replay(batches)
        replay.run()
        fresh.end = end
        if replay.is_structural:
            self._end_structural(fresh, replay.keys)
        else:
            self._move_mark(fresh)
            self._oldest = time.monotonic()

    def _go_on_in(self, batches: Sequence[Batch]) -> tuple[Segment, int]:
        """Begin a segment with copies of batches that are still to be done; return it, and where they end."""
        fresh = self._journal.create(batches)
        end, fresh.end = fresh.end, fresh.start
        self._set_segment(fresh)
        self._move_mark(fresh)
        return fresh, end

    def _recover(self) -> None:
        """Do all of the journal again, if there is any: nobody else is at work."""
        self._set_segment(None)
        self._logs.forget_below("")
        numbers = self._journal.numbers()
        if numbers:
            self._move_mark(self._recovery.run(numbers))

    # --- folding the journal into the files ----------------------------------------------------------

    def _checkpoint_if_due(self) -> None:
        segment = self._journal.current
        if segment is None or self._broken is not None:
            return
        if segment.end >= self._config.journal_max_bytes:
            self._start_checkpoint_locked()

    def _start_checkpoint(self) -> None:
        """Begin to fold the journal, while there is nothing else to do."""
        try:
            self.lock.take()
            try:
                self._look_around()
                self._start_checkpoint_locked()
            finally:
                self.lock.release()
        except (OSError, StorageError) as error:
            logger.warning("%s: it cannot be folded into the files now (%s)", self._layout.journal, error)

    def _start_checkpoint_locked(self) -> None:
        """Go on in a new segment, and fold the old ones into the files in another thread, if nobody does so."""
        try:
            if not self._checkpoint.try_take():
                return
            try:
                old = self._roll()
            except BaseException:
                self._checkpoint.release()
                raise
            self._checkpoint.start(old)
        except (OSError, StorageError) as error:
            logger.warning("%s: it cannot be folded into the files now (%s)", self._layout.journal, error)

    def _roll(self) -> list[int]:
        """Begin a new segment; return the numbers of the older ones.

        They are there until they are folded, which tells whoever finds them that it was begun and not ended.
        """
        self._flush()  # what comes next must not be durable before what came before it
        old = self._old()
        self._go_on_in([])
        return old

    def _old(self) -> list[int]:
        """Return the numbers of the segments that there are, fit to be folded."""
        numbers = self._journal.numbers()
        if len(numbers) > 1:
            # Somebody began to fold and did not end, perhaps for a sync that failed: what looks done may be on no disk.
            self._logs.forget_below("")
            self._recovery.redo(numbers)
        return numbers

    def _fold(self, moved: Iterable[str] = ()) -> None:
        """Fold all of the journal into the files now; `moved` are folders to make durable as well."""
        self._checkpoint.take()
        try:
            self._checkpoint.fold(self._roll(), moved)
        finally:
            self._checkpoint.release()

    # --- jobs that move and remove folders -------------------------------------------------------------

    def _run_structural(self, job: Job, *, checked: bool = False) -> None:
        """Do a job that is alone in the journal, so that no older step is ever done to what it leaves.

        All that is in the journal is folded into the files first, and its own steps are afterwards.
        """
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
                with mapped(self._layout.journal):
                    self._fold()
                    segment = self._write([*structural, *steps], payload)
                    if self._config.durability == "normal":
                        self._flush()
            except BaseException:
                plan.discard()
                raise
            try:
                with mapped(key_of(job.changes[-1])):
                    self._logs.forget_below("")
                    replay = self._recovery.replay([Batch(0, 0, 0, [*structural, *steps], payload)])
                    replay.run()
                    self._end_structural(segment, replay.keys)
            except Exception as error:
                self._stop_before(segment)
                raise self._later(error) from error
        job.outcomes = outcomes

    def _end_structural(self, segment: Segment, keys: Iterable[str]) -> None:
        """Fold a segment whose batch moved and removed folders.

        Its mark moves when that is done, so whoever comes after a death in between does it again before anything else:
        done behind later changes, it would move and remove what is new.
        """
        self._checkpoint.take()
        try:
            self._checkpoint.fold(self._journal.numbers(), keys)
        finally:
            self._checkpoint.release()
        self._move_mark(segment)
        self._set_segment(None)

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
            segment = self._write([Step("append", key, 1, size)], b"\n")
            self._logs.append(key, b"\n")
            self._move_mark(segment)
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

    def exists(self, key: str) -> bool:
        """Return whether there is a file at `key`."""
        return exists(self._files, self.tree, key)

    def read(self, key: str) -> bytes | None:
        """Return a file's bytes, or None if it is absent or a folder."""
        return read(self._files, self.tree, key)

    @property
    def journal_key(self) -> str:
        """The folder of the journal."""
        return self._layout.journal

    def has_unfinished(self) -> bool:
        """Tell whether there is something in the journal that has not been done, and nobody is at work on it."""
        with self.lock.glance() as mark:
            segment = None if mark is None else self._journal.find(mark.segment)
            if mark is None or segment is None:
                return False
            try:
                segment.end = mark.applied
                return segment.has_more()
            finally:
                segment.close()

    # --- a damaged journal ---------------------------------------------------------------------------

    def damage(self) -> list[tuple[str, str]]:
        """Return what hinders the journal from being done again: the file, and what is wrong with it."""
        return self._recovery.damage()

    def salvage(self) -> bool:
        """Do again what can be read of a damaged journal, and set it aside; return whether nobody was in the way."""
        self.lock.take()
        try:
            if not self._presence.join():
                return False
            self._move_mark(self._recovery.salvage())
            return True
        finally:
            self._presence.leave()
            self.lock.release()


def _is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


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
