"""Folding the journal into the files: what it did becomes durable in its place, and then the journal goes.

One at a time in a store, whoever does it: of a sync that fails the system tells one process, and another's sync of the
same file would succeed. Whoever finds older segments left over, and can have the lock, does their steps again first.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence

from ...errors import IntegrityError, StorageError
from ...layout import Layout
from .files import Files
from .folders import Folders
from .journal import Journal, Past, keys_of
from .lock import LockFile
from .syncs import Syncs

logger = logging.getLogger("flatfile_chat_database")


class Checkpoint:
    """Makes durable what old segments did, and removes them."""

    def __init__(
        self,
        files: Files,
        folders: Folders,
        root: str,
        layout: Layout,
        journal: Journal,
        syncs: Syncs,
        *,
        timeout_seconds: float,
        settle: Callable[[], None],
    ) -> None:
        """Call `settle` before segments are removed: their mark must be durable, or one of before would be believed."""
        self._settle = settle
        self._files = files
        self._layout = layout
        self._journal = journal
        self._syncs = syncs
        self._lock = LockFile(files, folders, root, layout.checkpoint_lock, timeout_seconds=timeout_seconds)
        self._thread: threading.Thread | None = None

    def try_take(self) -> bool:
        """Take the lock of whoever folds, if nobody has it; the store's lock is held."""
        return self._thread_has_ended() and self._lock.try_take()

    def take(self) -> None:
        """Wait for the lock of whoever folds. That one needs no other lock to end."""
        self.wait()
        self._lock.take()

    def release(self) -> None:
        """Let others fold."""
        self._lock.release()

    def let_go(self) -> None:
        """Close the lock file."""
        self._lock.close()

    def wait(self) -> None:
        """Wait for what `start` began."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def start(self, numbers: Sequence[int]) -> None:
        """Fold segments in another thread, which lets go of the lock that is held now."""
        self._thread = threading.Thread(target=self._run, args=(numbers,), name="chatdb-checkpoint", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the interpreter is ending, or has no more threads: it is done by the next
            self._thread = None
            self._lock.release()

    def _run(self, numbers: Sequence[int]) -> None:
        try:
            self.fold(numbers)
        except (OSError, StorageError) as error:
            logger.warning("%s: it could not be folded into the files, and stays (%s)", self._layout.journal, error)
        finally:
            self._lock.release()

    def _thread_has_ended(self) -> bool:
        if self._thread is not None and self._thread.is_alive():
            return False
        self._thread = None
        return True

    def fold(self, numbers: Sequence[int], moved: Iterable[str] = ()) -> None:
        """Make durable what segments did, and folders that were moved; then remove the segments.

        Raises:
            OSError: Something could not be made durable; the segments stay.
        """
        written: set[str] = set(moved)
        pasts = [self._past(number, written) for number in numbers]
        self._syncs.files(written, {key for past in pasts for key in past.keys})
        self._journal.remember(pasts)
        self._settle()
        self._journal.remove(numbers)
        self._files.count("checkpoints")

    def _past(self, number: int, written: set[str]) -> Past:
        """Return what is to be known of a segment that goes; add the keys whose bytes may be on no disk yet.

        Those of finished files are: they were made durable before the journal gave them their names.
        """
        segment = self._journal.open(number)
        try:
            keys: set[str] = set()
            end = segment.start
            for end, steps in segment.headers(segment.start):  # noqa: B007 - the last one is wanted
                keys |= keys_of(steps)
                written.update(step.key for step in steps if step.op in ("put", "append", "move"))
            segment.end = end
            if segment.has_more():
                raise IntegrityError(
                    f"{segment.key}: the batch at byte {end} cannot be read.",
                    key=segment.key,
                    hint="Open the store again: it is done again then, or says what is wrong.",
                )
            return Past(segment.id, end, sorted(keys))
        finally:
            segment.close()
