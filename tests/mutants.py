"""Protocols that are known to be wrong, as small patches of the seam or of the engine: a step goes missing."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

from flatfile_chat_database.backends.flatfile.checkpoint import Checkpoint
from flatfile_chat_database.backends.flatfile.drafts import steps_of
from flatfile_chat_database.backends.flatfile.engine import Engine
from flatfile_chat_database.backends.flatfile.journal import Journal, Segment
from flatfile_chat_database.backends.flatfile.ledger import Ledger
from flatfile_chat_database.backends.flatfile.recovery import Recovery
from flatfile_chat_database.backends.flatfile.syncs import Syncs
from flatfile_chat_database.testing.simulated import SimulatedFiles


class TruncatesInPlace(SimulatedFiles):
    """A document that is there already is emptied and written again."""

    def rename(self, source: str, target: str) -> None:
        try:
            status = self.status(target)
        except FileNotFoundError:
            status = None
        if status is None or status.kind != "file":
            super().rename(source, target)
            return
        finished, descriptor = self.open_to_read(source), self.open_to_change(target)
        self.truncate(descriptor, 0)
        self.write_at(descriptor, self.read(finished, 1 << 24, 0), 0)
        self.sync(descriptor)
        self.close(finished)
        self.close(descriptor)
        self.remove(source)


class _Watching(SimulatedFiles):
    """Knows how each descriptor was opened."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.created: set[int] = set()
        self.changed: set[int] = set()

    def create(self, path: str) -> int:
        descriptor = super().create(path)
        self.created.add(descriptor)
        return descriptor

    def open_to_append(self, path: str) -> int:
        descriptor = super().open_to_append(path)
        self.changed.add(descriptor)
        return descriptor

    def open_to_change(self, path: str) -> int:
        descriptor = super().open_to_change(path)
        self.changed.add(descriptor)
        return descriptor


class RenamesWithoutSync(_Watching):
    """What a new file holds is not flushed before it gets its name."""

    def sync(self, descriptor: int) -> None:
        if descriptor not in self.created:
            super().sync(descriptor)


class AppendsWithoutSync(_Watching):
    """What is added to a file is not flushed."""

    def sync(self, descriptor: int) -> None:
        if descriptor not in self.changed:
            super().sync(descriptor)


class NeverSyncsFolders(SimulatedFiles):
    """No name is flushed."""

    def sync_folder(self, path: str) -> None:
        return None


class NeverSyncsParents(SimulatedFiles):
    """The names of new folders are not flushed."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._parents: set[str] = set()

    def make_folder(self, path: str) -> None:
        super().make_folder(path)
        self._parents.add(path.rpartition("/")[0] or "/")

    def sync_folder(self, path: str) -> None:
        if path not in self._parents:
            super().sync_folder(path)


class ForgetsFolderOfNewLog(SimulatedFiles):
    """The name of a new log is not flushed."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._folders: set[str] = set()

    def create_to_append(self, path: str) -> int:
        self._note(path)
        return super().create_to_append(path)

    def rename(self, source: str, target: str) -> None:
        self._note(target)
        super().rename(source, target)

    def _note(self, path: str) -> None:
        if path.endswith(".jsonl") and "/journal/" not in path:
            self._folders.add(path.rpartition("/")[0])

    def sync_folder(self, path: str) -> None:
        if path not in self._folders:
            super().sync_folder(path)


SEAM: dict[str, type[SimulatedFiles]] = {
    "truncate in place": TruncatesInPlace,
    "rename without fsync": RenamesWithoutSync,
    "no directory sync": NeverSyncsFolders,
    "no parent-directory sync after mkdir": NeverSyncsParents,
    "append without fsync": AppendsWithoutSync,
    "no directory sync after creating the log": ForgetsFolderOfNewLog,
}
"""The six of reliability.md, M8."""


# --- rules of the journal ------------------------------------------------------------------------------


@contextlib.contextmanager
def data_before_journal() -> Iterator[None]:
    """Files are changed before the journal can do the change again."""

    def commit(engine: Any, plan: Any) -> None:
        if plan.drafts:
            steps, parts = steps_of(plan.drafts)
            for step, data in zip(steps, parts, strict=True):
                if step.op == "append":
                    engine._logs.append(step.key, data)
                else:
                    engine._apply(step, data)
            engine.ledger.move_mark(engine.ledger.write(steps, b"".join(parts)))

    with mock.patch.object(Engine, "_commit", commit):
        yield


@contextlib.contextmanager
def apply_before_flush() -> Iterator[None]:
    """The journal is written first, but flushed after the files are changed."""
    move, file = Ledger.move_mark, Syncs.file

    def move_mark(ledger: Any, segment: Segment, **how: Any) -> None:
        if segment is ledger._journal.current:
            file(ledger._syncs, segment.descriptor)
        move(ledger, segment, **how)

    def write(ledger: Any, steps: Any, payload: bytes, **how: Any) -> Segment:
        with mock.patch.object(Syncs, "file", lambda *_: None):
            return original(ledger, steps, payload, **how)

    original = Ledger.write
    with mock.patch.object(Ledger, "write", write), mock.patch.object(Ledger, "move_mark", move_mark):
        yield


@contextlib.contextmanager
def dead_peers_records_dropped() -> Iterator[None]:
    """What a dead process committed is written over, whether it was done or not."""
    with mock.patch.object(Ledger, "_finish", lambda _, segment: segment.cut()):
        yield


@contextlib.contextmanager
def dead_peers_records_not_written_again() -> Iterator[None]:
    """What a dead process wrote is done from where it stands, though the flush of it may have failed."""
    original = Ledger._finish

    def finish(ledger: Any, segment: Segment) -> None:
        segment.synced = 1 << 60
        original(ledger, segment)

    with mock.patch.object(Ledger, "_finish", finish):
        yield


@contextlib.contextmanager
def recovery_without_flush() -> Iterator[None]:
    """What recovery did is not flushed before the journal goes."""
    original = Recovery.run

    def run(recovery: Any, numbers: Any) -> Any:
        with mock.patch.object(Syncs, "files", lambda *_: None):
            return original(recovery, numbers)

    with mock.patch.object(Recovery, "run", run):
        yield


@contextlib.contextmanager
def segment_name_not_durable() -> Iterator[None]:
    """A new segment takes batches before its name is flushed."""
    original = Journal.create

    def create(journal: Any, *arguments: Any) -> Segment:
        with mock.patch.object(Syncs, "folders_of", lambda *_: None):
            return original(journal, *arguments)

    with mock.patch.object(Journal, "create", create):
        yield


@contextlib.contextmanager
def only_the_nearest_folder() -> Iterator[None]:
    """Of the folders up to the root only the one that a file is in is flushed."""

    def folders_of(syncs: Syncs, keys: Iterable[str]) -> None:
        for folder in sorted({key.rpartition("/")[0] for key in keys}):
            syncs.folder(folder)

    with mock.patch.object(Syncs, "folders_of", folders_of):
        yield


@contextlib.contextmanager
def several_checkpoints_at_a_time() -> Iterator[None]:
    """Whoever folds does not ask whether somebody else does."""
    real = Checkpoint.take

    def take(checkpoint: Any) -> bool:
        real(checkpoint)  # which opens the file of the lock
        checkpoint._lock.release()
        return True

    def attempt(checkpoint: Any) -> bool:
        return bool(checkpoint._thread_has_ended()) and take(checkpoint)

    with mock.patch.object(Checkpoint, "take", take), mock.patch.object(Checkpoint, "try_take", attempt):
        yield


@contextlib.contextmanager
def structural_changes_without_the_lock() -> Iterator[None]:
    """A folder is moved while others may write to what is in it."""
    original = Engine._run_structural

    def run(engine: Any, job: Any, **how: Any) -> None:
        engine.ledger.lock.release()
        try:
            original(engine, job, **how)
        finally:
            engine.ledger.lock.take()

    with mock.patch.object(Engine, "_run_structural", run):
        yield


@contextlib.contextmanager
def recovery_from_the_mark() -> Iterator[None]:
    """Recovery believes the mark, as if the machine had not been started anew since it was written."""
    original = Ledger._recover

    def recover(ledger: Any) -> None:
        mark = ledger.lock.read_mark()
        numbers = ledger._journal.numbers()
        segment = None if mark is None else ledger._journal.find(mark.segment)
        if mark is None or segment is None or numbers != [segment.number]:
            original(ledger)
            return
        segment.end = mark.applied
        done = not segment.has_more()
        segment.close()
        if done:
            ledger.fold()
        else:
            original(ledger)

    with mock.patch.object(Ledger, "_recover", recover):
        yield


RULES: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "journal before data": data_before_journal,
    "flush before apply": apply_before_flush,
    "finishing a dead peer's records first": dead_peers_records_dropped,
    "writing them again before flushing": dead_peers_records_not_written_again,
    "flushing in recovery": recovery_without_flush,
    "durable segment names": segment_name_not_durable,
    "folders up to the root": only_the_nearest_folder,
    "one checkpoint at a time": several_checkpoints_at_a_time,
    "structural changes under the lock": structural_changes_without_the_lock,
    "replay without a boot-id shortcut": recovery_from_the_mark,
}
"""The ten of architecture.md, 5, each left out."""
