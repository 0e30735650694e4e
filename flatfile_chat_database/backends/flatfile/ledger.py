"""Where the journal of a store ends, who goes on there, and when it is folded into the files.

The mark in the lock file says up to where the journal has been done. Whoever takes the lock compares it with what it
knows: another process may have gone on, or begun a new segment, or died before it had done what it wrote. Everything
here that changes something happens under the store's lock.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections.abc import Callable, Iterable, Sequence

from ...config import StorageConfig
from ...errors import DurabilityError, StorageError
from ...layout import Layout
from ...models import new_id
from .checkpoint import Checkpoint
from .files import Files
from .folders import Folders
from .history import History
from .journal import Batch, Journal, Segment, Step
from .lock import Mark, Presence, StoreLock
from .recovery import Recovery
from .replay import Replay
from .syncs import Syncs
from .tree import Tree
from .wholes import Wholes

logger = logging.getLogger("flatfile_chat_database")

_FLUSH_SECONDS = 0.5
"""At the level `normal`: how long what was answered waits for its flush, at most; the disk may take as long again."""


class Ledger:
    """The journal of one open store, and its locks."""

    def __init__(
        self,
        config: StorageConfig,
        root: str,
        files: Files,
        tree: Tree,
        folders: Folders,
        syncs: Syncs,
        wholes: Wholes,
        *,
        forget: Callable[[], None],
        others_wrote: Callable[[], None],
    ) -> None:
        """Call `forget` when what is known of logs may be wrong, and `others_wrote` when another process wrote."""
        self._config = config
        self._files = files
        self._layout = Layout(config)
        self._syncs = syncs
        self._forget = forget
        self._others_wrote = others_wrote
        timeout = config.lock_timeout_seconds
        self.lock = StoreLock(
            files,
            folders,
            root,
            self._layout.lock,
            timeout_seconds=timeout,
            allow_network=config.allow_network_file_system,
        )
        self._presence = Presence(files, folders, root, self._layout.presence, timeout_seconds=timeout)
        self._journal = Journal(files, tree, folders, self._layout, syncs)
        self._recovery = Recovery(files, tree, folders, self._journal, syncs, wholes, settle=self._settle_at)
        self._checkpoint = Checkpoint(
            files, folders, root, self._layout, self._journal, syncs, timeout_seconds=timeout, settle=self.lock.sync
        )
        self.history = History(self._journal, self.lock)
        self.broken: str | None = None
        """Why it is not known any more what is durable, so that nothing more is written."""
        self.is_behind = False
        """Whether there are batches that were committed under this hold of the lock and could not be done."""
        self._untold: DurabilityError | None = None
        self._mark: Mark | None = None
        self._unflushed_since: float | None = None
        self._oldest: float | None = None  # when the segment took its first batch

    @property
    def key(self) -> str:
        """The folder of the journal."""
        return self._layout.journal

    @property
    def open_files(self) -> int:
        """The number of descriptors that are kept."""
        return self.lock.is_open + self._presence.is_open + (self._journal.current is not None)

    def replay(self, batches: Iterable[Batch]) -> Replay:
        """Return what does batches, however much of them is done."""
        self._forget()
        return self._recovery.replay(batches)

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
                self.let_go()  # nobody may write with it, and then nobody would close it
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
            if self.broken is None and self._presence.joined:
                self._close()
            elif self._untold is not None:
                raise self._untold
        except DurabilityError:
            raise
        except (OSError, StorageError) as error:
            logger.warning("%s: it stays for the next to open the store (%s)", self._layout.journal, error)
        finally:
            self.let_go()

    def _close(self) -> None:
        self.lock.take()
        try:
            self._look_around()
            self.flush()
            if self._presence.is_alone():  # then whoever comes after a sync that failed does all of it again
                self._checkpoint.take()
                self._checkpoint.fold(self._old())
        finally:
            self._presence.leave()  # before the lock goes: who comes now must be alone, and do again what failed here
            self.lock.release()

    def let_go(self) -> None:
        """Close all descriptors and touch nothing else: a forked child has locks of threads that it does not have."""
        self._forget()
        self._set_segment(None)
        self._presence.leave()
        self._checkpoint.let_go()
        self.lock.close()

    def idle(self) -> float | None:
        """Do what is due while there are no jobs; return in how many seconds to come again, None for never."""
        if self.broken is not None:
            return None
        now = time.monotonic()
        if self._unflushed_since is not None:
            left = self._unflushed_since + _FLUSH_SECONDS - now
            if left > 0:
                return left
            try:
                self.flush()
            except DurabilityError as error:  # whoever writes next is told, or whoever closes the store
                self._untold = error
                return None
        if self._oldest is None:
            return None
        left = self._oldest + self._config.journal_max_age_seconds - now
        if left > 0:
            return left
        self._start_checkpoint()
        return self._config.journal_max_age_seconds

    # --- before a batch ------------------------------------------------------------------------------

    def prepare(self) -> None:
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
        self.is_behind = False

    def catch_up(self) -> None:
        """Do what could not be done, before anything is planned on what it leaves."""
        self._look_around()

    def _adopt(self, mark: Mark | None) -> None:
        """Go on where the last writer stopped."""
        self._others_wrote()
        current = self._journal.current
        if mark is not None and current is not None and current.id == mark.segment and not current.is_gone():
            current.end = mark.applied
        else:
            segment = None if mark is None else self._journal.find(mark.segment)
            numbers = self._journal.numbers() if segment is None else []
            if segment is None and numbers:
                segment = self._journal.open(numbers[-1])  # the mark is lost, so all of it may have to be done
                self._syncs.folders_of([segment.key])  # and its maker may have died before its name was durable
            elif segment is not None and mark is not None:
                segment.end = mark.applied
                if self._config.durability == "full":  # then the first batch can say so
                    self._syncs.file(segment.descriptor)
                    segment.synced = mark.applied
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
        segment.end, start = batches[-1].end, segment.end
        segment.cut()  # what stands behind them was never committed
        segment.end = start
        if segment.synced < batches[-1].end:
            fresh, end = self._go_on_in(batches)
        else:
            fresh, end = segment, batches[-1].end
        self._others_wrote()
        replay = self.replay(batches)
        replay.run()
        fresh.end = end
        if replay.is_structural:
            self.end_structural(fresh, replay.keys)
        else:
            self.move_mark(fresh)
            self._oldest = time.monotonic()

    def _go_on_in(self, batches: Sequence[Batch]) -> tuple[Segment, int]:
        """Begin a segment with copies of batches that are still to be done; return it, and where they end."""
        self._flush_all()  # what comes next must not be durable before what came before it
        fresh = self._journal.create(batches)
        end, fresh.end = fresh.end, fresh.start
        self._set_segment(fresh)
        self.move_mark(fresh)
        return fresh, end

    def _recover(self) -> None:
        """Do all of the journal again, if there is any: nobody else is at work."""
        self._set_segment(None)
        self._forget()
        numbers = self._journal.numbers()
        if numbers:
            self._recovery.run(numbers)

    # --- folding the journal into the files ----------------------------------------------------------

    def checkpoint_if_due(self) -> None:
        """Begin to fold the journal if it has grown to its size."""
        segment = self._journal.current
        if segment is None or self.broken is not None or self.is_behind:
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
        except DurabilityError as error:
            self._untold = error
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
        except DurabilityError as error:  # of what was answered before: whoever closes the store is told
            self._untold = error
        except (OSError, StorageError) as error:
            logger.warning("%s: it cannot be folded into the files now (%s)", self._layout.journal, error)

    def _roll(self) -> list[int]:
        """Begin a new segment; return the numbers of the older ones.

        They are there until they are folded, which tells whoever finds them that it was begun and not ended.
        """
        old = self._old()
        self._go_on_in([])
        return old

    def _old(self) -> list[int]:
        """Return the numbers of the segments that there are, fit to be folded."""
        numbers = self._journal.numbers()
        if len(numbers) > 1:
            # Somebody began to fold and did not end, perhaps for a sync that failed: what looks done may be on no disk.
            self._forget()
            self._recovery.redo(numbers)
        return numbers

    def fold(self, moved: Iterable[str] = ()) -> None:
        """Fold all of the journal into the files now; `moved` are folders to make durable as well."""
        self._checkpoint.take()
        try:
            try:
                old = self._roll()
            except OSError as error:
                if not is_full(error):
                    raise
                self._fold_in_no_room()
                return
            self._checkpoint.fold(old, moved)
        finally:
            self._checkpoint.release()

    def _fold_in_no_room(self) -> None:
        """Fold the journal where there is no room for a new segment, which would tell others that it was begun."""
        old = self._journal.numbers()
        self._forget()
        self._recovery.redo(old)
        self._mark = Mark(new_id(), 0)  # of no segment, so that nobody goes on in one that is gone
        self.lock.write_mark(self._mark)
        self._checkpoint.fold(old)
        self._set_segment(None)

    def stop_before(self, segment: Segment) -> None:
        """Leave what is committed to whoever writes next: the mark stays before it, so it is done first."""
        self.is_behind = True
        self._forget()
        with contextlib.suppress(OSError):
            segment.cut()  # what is reserved may be the room that the files lack
        segment.end = segment.start if self._mark is None else self._mark.applied

    def has_finished(self, segment: Segment) -> bool:
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

    def commit(self, steps: Sequence[Step], payload: bytes) -> Segment:
        """Commit steps; where there is no room for them, use that of the journal, which is not needed any more."""
        try:
            return self.write(steps, payload)
        except OSError as error:
            if not is_full(error):
                raise
            self.fold()
            return self.write(steps, payload, ahead=False)

    def write(self, steps: Sequence[Step], payload: bytes, *, ahead: bool = True) -> Segment:
        """Commit steps: when this returns they are in the journal, and durable if that is wanted."""
        segment = self._journal.current
        if segment is None:
            segment = self._journal.create()
            self._set_segment(segment)
            self.move_mark(segment)
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

    def _settle_at(self, segment: Segment) -> None:
        self.move_mark(segment)
        self.lock.sync()

    def move_mark(self, segment: Segment) -> None:
        """Say in the lock file that all is done up to the end of a segment."""
        mark = Mark(segment.id, segment.end)
        self.lock.write_mark(mark)
        self._mark = mark

    def flush(self) -> None:
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

    def end_structural(self, segment: Segment, keys: Iterable[str]) -> None:
        """Fold a segment whose batch moved and removed folders.

        Its mark moves when that is done, so whoever comes after a death in between does it again before anything else:
        done behind later changes, it would move and remove what is new.
        """
        self._checkpoint.take()
        try:
            self._checkpoint.fold(self._journal.numbers(), keys)
        finally:
            self._checkpoint.release()
        self.move_mark(segment)
        self._set_segment(None)

    def _flush_all(self) -> None:
        """Make the segment durable, whoever wrote to it."""
        if self._unflushed_since is not None:
            self.flush()
        elif self._journal.current is not None:
            try:
                self._syncs.file(self._journal.current.descriptor)
            except OSError as error:  # not of what this process wrote, which it has flushed
                logger.warning("%s: what another process wrote may not be durable (%s)", self.key, error)

    # --- errors --------------------------------------------------------------------------------------

    def _break(self, error: Exception) -> None:
        """Take no further job: it is not known any more what is durable.

        One-shot: after a failed sync the system may call the pages clean, so a second try would prove nothing.
        """
        self.broken = getattr(error, "strerror", None) or str(error)
        self._checkpoint.wait()  # it must not fold beside whoever comes now
        self._forget()
        self._set_segment(None)
        self._presence.leave()  # so that whoever opens the store now looks at what is really on disk

    def refusal(self) -> DurabilityError:
        """Return the error for a write after the store broke."""
        return DurabilityError(
            f"An earlier write could not be made durable ({self.broken}); nothing was changed.",
            hint="Reopen the store and look which messages are there.",
        )

    def _outcome_unknown(self) -> DurabilityError:
        return DurabilityError(
            f"{DurabilityError.__doc__} ({self.broken})", hint="Reopen the store and look whether it is there."
        )

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
            self._recovery.salvage()
            return True
        finally:
            self.let_go()


def is_full(error: Exception) -> bool:
    """Tell whether a change failed for lack of room."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
