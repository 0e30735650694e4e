"""Making changes durable on files, one batch at a time, under the store's lock.

A document is replaced by the full sequence: write a temporary neighbour, sync it, rename it, sync the folder. A new log
is made the same way; an existing one takes one `write` of whole lines and a sync. Names of new folders are synced up to
the root. Syncs of logs and folders are shared by the whole batch, and nobody is answered before all of them are done.

What a dead process left behind is mended before the log it concerns is touched: half a line at its end is set aside,
and a batch of lines that was not finished is taken back (its beginning is noted in the lock file while it is written).

The engine is synchronous and belongs to one thread; `writer.py` runs it. Only `exists` and `read`, which keep no state,
are for every thread.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ... import codec
from ...config import StorageConfig
from ...errors import DurabilityError, StorageError, StorageLimitExceeded, UnavailableError, ValidationError
from ...layout import Layout
from ...models import new_id
from ..base import (
    ANY,
    Absent,
    Append,
    Change,
    Delete,
    Edit,
    Move,
    Outcome,
    Put,
    Quota,
    RemoveTree,
    Require,
    Truncate,
    check_edit,
    check_maximum,
    check_quota,
    check_version,
    exists_already,
    kept_and_dropped,
    new_lines,
    not_found,
    quarantine_keys,
    version_of,
)
from .batches import Batch, Batches
from .files import Files
from .folders import Folders
from .lock import StoreLock
from .logs import LogReader
from .openlogs import OpenLog, OpenLogs
from .oserrors import mapped
from .tree import Item, Tree

logger = logging.getLogger("flatfile_chat_database")

_COPY_BYTES = 1 << 20
_SYNCERS = 16
"""On ext4, 100 files took 24 ms one after the other, 7 ms from 8 threads and 5 ms from 16 (see docs/decisions)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Internal change: give a finished temporary file its name, or remove it if that is taken. Outcome: which."""

    temporary: str
    key: str


@dataclass(frozen=True, slots=True)
class Extend:
    """Internal change: append bytes that are whole lines, whatever they say."""

    key: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Mend:
    """Internal change: set aside half a line at the end of a log. Outcome: whether there was one."""

    key: str


EngineChange = Change | Place | Extend | Mend


@dataclass(slots=True)
class Job:
    """The changes of one commit, and what came of them."""

    changes: Sequence[EngineChange]
    outcomes: list[Outcome] | None = None
    error: Exception | None = None


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
        self.lock = StoreLock(
            files,
            self._folders,
            root,
            self._layout.lock,
            timeout_seconds=config.lock_timeout_seconds,
            allow_network=config.allow_network_file_system,
        )
        self.batches = Batches(files, self.tree, self._layout, self.lock)
        self._syncers: ThreadPoolExecutor | None = None
        self._broken: str | None = None
        self._changed = False  # whether the job at work has changed anything that others can see

    @property
    def open_files(self) -> int:
        """The number of descriptors that are kept between jobs."""
        return len(self._logs) + self.lock.is_open

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
                self._take_back_unfinished()
        except Exception as error:
            for job in jobs:
                job.error = _again(error)
        else:
            for job in jobs:
                try:
                    if self._logs.is_full:
                        self._settle()
                    if self._broken is not None:
                        raise self._refusal()
                    job.outcomes = self._run_job(job.changes)
                except Exception as error:
                    job.error = error
            if not self._sync():
                for job in jobs:
                    job.error = job.error or self._outcome_unknown()
        finally:
            self.lock.release()

    def _refusal(self) -> DurabilityError:
        return DurabilityError(
            f"An earlier write could not be made durable ({self._broken}); nothing was changed.",
            hint="Reopen the store and look which messages are there.",
        )

    def _run_job(self, changes: Sequence[EngineChange]) -> list[Outcome]:
        """Check all, write all new bytes beside their places, then put them there."""
        staged: dict[int, str] = {}
        outcomes: list[Outcome] = []
        self._changed = False
        try:
            for change in changes:
                with mapped(_key_of(change)):
                    self._check(change)
            # Staging ends at the first change that may take the folder of a later one away, and what was written there.
            ahead = next((i for i, change in enumerate(changes) if isinstance(change, Move | RemoveTree)), len(changes))
            for index, change in enumerate(changes[:ahead]):
                self._stage(index, change, staged)
            for index, change in enumerate(changes):
                if index >= ahead:
                    self._stage(index, change, staged)
                with mapped(_key_of(change)):
                    outcomes.append(self._apply(change, staged.get(index)))
                staged.pop(index, None)
        except UnavailableError as error:
            if not self._changed:
                raise
            raise DurabilityError(
                f"The change may have been made in part. {error.message}",
                key=error.key,
                hint="Look whether it is there, and run `chatdb check`.",
            ) from error
        finally:
            for temporary in staged.values():
                with contextlib.suppress(OSError):
                    self._files.remove(temporary)
        return outcomes

    def close(self) -> None:
        """Let go of all descriptors and threads."""
        self.let_go()
        if self._syncers is not None:
            self._syncers.shutdown(wait=False)

    def let_go(self) -> None:
        """Close all descriptors and touch nothing else: a forked child has locks of threads that it does not have."""
        self._logs.forget_below("")
        self.lock.close()

    def _sync(self) -> bool:
        """Make durable what the jobs so far have changed; return whether that worked.

        One-shot: after a failed sync the system may call the pages clean, so a second try would prove nothing. The
        engine is broken then and takes no further job.
        """
        if self._broken is not None:
            return False
        try:
            self._together([*self._logs.take_unsynced(), *self._folders.take_unsynced()])
            self._logs.evict()
            self.batches.end()
        except Exception as error:
            self._break(error)
            return False
        return True

    def _together(self, syncs: Sequence[Callable[[], None]]) -> None:
        """Sync files at the same time: one commit of the file system's journal then serves many of them."""
        if self._syncers is None and len(syncs) > 1:
            self._syncers = ThreadPoolExecutor(_SYNCERS, thread_name_prefix="chatdb-sync")
        waiting = []
        # A share for each thread, not a task for each file: the threads would only fight for the interpreter.
        for share in (syncs[first::_SYNCERS] for first in range(min(_SYNCERS, len(syncs)))):
            try:
                if self._syncers is None or len(syncs) == 1:
                    _call_all(share)
                else:
                    waiting.append(self._syncers.submit(_call_all, share))
            except RuntimeError:  # the interpreter is ending, and starts no thread any more
                _call_all(share)
        for done in waiting:
            done.result()

    def _break(self, error: Exception) -> None:
        """Take no further job: it is not known any more what is durable."""
        self._broken = getattr(error, "strerror", None) or str(error)
        self._logs.forget_below("")

    def _settle(self) -> None:
        """Make all appends so far durable, before their files change in another way or are closed."""
        if (self._logs.has_unsynced or self.batches.open) and not self._sync():
            raise self._outcome_unknown()

    def _outcome_unknown(self) -> DurabilityError:
        return DurabilityError(
            f"{DurabilityError.__doc__} ({self._broken})", hint="Reopen the store and look whether it is there."
        )

    def _take_back_unfinished(self) -> None:
        """Undo the batches that a process which died had begun; none of them was acknowledged."""
        for batch in self.batches.unfinished():
            log = self._logs.look(batch.key)
            if log is not None:
                self._cut(batch.key, log, batch.size, "a batch of messages whose writer died before its end")
        if self.batches.open and not self._sync():
            raise self._outcome_unknown()

    # --- checking conditions -------------------------------------------------------------------------

    def _check(self, change: EngineChange) -> None:
        match change:
            case Require(key, what):
                if not self.exists(key):
                    raise not_found(what, key)
            case Quota(folder):
                try:
                    check_quota(change, self._folders.inside(folder))
                except StorageLimitExceeded:  # count again, without the folders that a failed creation left empty
                    names = self.tree.folders(folder)
                    check_quota(change, [name for name in names if self.tree.keys(f"{folder}/{name}/".lstrip("/"))])
            case Put(key, _, expected):
                if expected is not ANY:
                    check_version(key, self.read(key), expected)
            case Append(key):
                log = self._logs.look(key)
                added = new_lines(change, lambda record_id: self._logs.find(log, record_id))
                check_maximum(change, log.count if log is not None else 0, added)
            case Edit(key, record_id):
                self._mend(key)
                check_edit(change, self._strict_find(key, record_id))
            case Truncate(key, count):
                self._mend(key)
                self._dropped(key, count)
            case Move(source, target):
                with contextlib.suppress(FileNotFoundError):
                    self._files.status(self.tree.path(source))  # unreadable is not absent
                self._check_absent(target)
            case Absent(key):
                self._check_absent(key)
            case Extend(key, data):
                if not data.endswith(b"\n"):
                    raise ValidationError("What is appended must end in a newline.", key=key)
            case Delete() | RemoveTree() | Place() | Mend():
                pass

    def _check_absent(self, key: str) -> None:
        with contextlib.suppress(NotADirectoryError):  # nothing is below a file
            if self.exists(key) or self.tree.holds_files(key):
                raise exists_already(key)

    def exists(self, key: str) -> bool:
        """Return whether there is a file at `key`."""
        try:
            return self._files.status(self.tree.path(key)).kind == "file"
        except FileNotFoundError:
            return False

    def read(self, key: str) -> bytes | None:
        """Return a file's bytes, or None if it is absent or a folder."""
        try:
            descriptor = self._files.open_to_read(self.tree.path(key))
        except FileNotFoundError:
            return None
        try:
            status = self._files.status_of(descriptor)
            if status.kind == "folder":
                return None
            if status.kind != "file":
                raise UnavailableError(f"{key} is neither a file nor a folder.", key=key)
            pieces: list[bytes] = []
            size = 0
            while piece := self._files.read(descriptor, max(status.size - size, 0) + 1, size):
                pieces.append(piece)
                size += len(piece)
            return b"".join(pieces)
        finally:
            self._files.close(descriptor)

    # --- changing ------------------------------------------------------------------------------------

    def _stage(self, index: int, change: EngineChange, staged: dict[int, str]) -> None:
        """Write the new bytes of a change to a durable temporary file and note its path under `index`."""
        with mapped(_key_of(change)):
            match change:
                case Put(key, data):
                    staged[index] = self._write_temporary(key, [data])
                case Append(key, lines) if lines and not self.exists(key):
                    staged[index] = self._write_temporary(key, new_lines(change, lambda _: None))
                case Extend(key, data) if not self.exists(key):
                    staged[index] = self._write_temporary(key, [data])
                case Edit(key):
                    staged[index] = self._write_temporary(key, self._edited(change))
                case Truncate(key, count):
                    size, dropped = self._dropped(key, count)
                    if dropped:
                        staged[index] = self._write_temporary(key, self._beginning(key, size))

    def _apply(self, change: EngineChange, staged: str | None) -> Outcome:
        if not isinstance(change, Append | Extend | Require | Quota | Absent):
            self._settle()
        match change:
            case Put(key, data) if staged is not None:
                self._install(staged, key)
                return version_of(data)
            case Append() | Extend():
                return self._append(change, staged)
            case Edit(key) if staged is not None:
                self._install(staged, key)
            case Delete(key):
                return self._delete(key)
            case Truncate(key, count):
                dropped = self._dropped(key, count)[1]
                if staged is not None:
                    self._install(staged, key)
                return dropped
            case Move(source, target):
                return self._move(source, target)
            case RemoveTree(folder):
                return self._remove_tree(folder)
            case Place(temporary, key):
                return self._place(temporary, key)
            case Mend(key):
                return self._mend(key)
        return None

    def temporary(self, key: str) -> str:
        """Return a new path for unfinished bytes beside `key`."""
        folder = key.rpartition("/")[0]
        return f"{self.tree.path(folder)}/.{new_id()}{self._config.atomic_write_temp_suffix}"

    def _write_temporary(self, key: str, pieces: Iterable[bytes]) -> str:
        folder = key.rpartition("/")[0]
        self._folders.make(folder)
        path = self.temporary(key)
        try:
            descriptor = self._files.create(path)
        except FileNotFoundError:  # another process cleaned the empty folder away
            self._folders.forget()
            self._folders.make(folder)
            descriptor = self._files.create(path)
        try:
            try:
                for piece in pieces:
                    self._write_all(descriptor, piece)
                self._files.sync(descriptor)
            finally:
                self._files.close(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                self._files.remove(path)
            raise
        return path

    def _write_all(self, descriptor: int, data: bytes) -> None:
        rest = memoryview(data)
        while rest:  # a full disk, a limit or a signal takes a part; the next write says which
            rest = rest[self._files.write(descriptor, rest) :]

    def _install(self, temporary: str, key: str) -> None:
        self._logs.forget(key)
        self._files.rename(temporary, self.tree.path(key))
        self._changed = True
        self._folders.changed(key.rpartition("/")[0])

    def _place(self, temporary: str, key: str) -> bool:
        if self.exists(key):
            self._files.remove(temporary)
            return False
        self._folders.make(key.rpartition("/")[0])
        self._install(temporary, key)
        return True

    def _delete(self, key: str) -> bool:
        if not self.exists(key):
            return False
        self._logs.forget(key)
        self._files.remove(self.tree.path(key))
        self._changed = True
        self._folders.changed(key.rpartition("/")[0])
        self._folders.emptied(key)
        return True

    def _move(self, source: str, target: str) -> bool:
        try:
            self._files.status(self.tree.path(source))
        except FileNotFoundError:
            return False
        self._folders.make(target.rpartition("/")[0])
        with contextlib.suppress(FileNotFoundError):
            if self._files.status(self.tree.path(target)).kind == "folder":
                self.tree.remove(Item(target, "folder"))  # empty folders and leftovers only; see _check
        self._logs.forget_below(source)
        self._folders.forget(source)
        self._files.rename(self.tree.path(source), self.tree.path(target))
        self._changed = True
        self._folders.changed(source.rpartition("/")[0])
        self._folders.changed(target.rpartition("/")[0])
        self._folders.emptied(source)
        return True

    def _remove_tree(self, folder: str) -> list[str]:
        keys = self.tree.keys(f"{folder}/")
        try:
            if self._files.status(self.tree.path(folder)).kind != "folder":
                return []
        except FileNotFoundError:
            return []
        # Renamed first, so that a process that dies here leaves no half of it behind under its name.
        doomed = self.temporary(folder)
        self._logs.forget_below(folder)
        self._folders.forget(folder)
        self._files.rename(self.tree.path(folder), doomed)
        self._changed = True
        try:
            self._files.sync_folder(self.tree.path(folder.rpartition("/")[0]))
        except OSError as error:
            self._break(error)
            raise
        self.tree.remove(Item(doomed[len(self._root) + 1 :], "folder"))
        self._folders.changed(folder.rpartition("/")[0])
        self._folders.emptied(folder)
        return keys

    # --- logs ----------------------------------------------------------------------------------------

    def _append(self, change: Append | Extend, staged: str | None) -> Outcome:
        key = change.key
        if staged is not None:
            self._install(staged, key)
            return len(new_lines(change, lambda _: None)) if isinstance(change, Append) else True
        self._mend(key)
        log = self._logs.look(key)
        if isinstance(change, Extend):
            lines = [change.data]
        else:
            lines = new_lines(change, lambda record_id: self._logs.find(log, record_id))
        if log is not None and lines:
            size = log.status.size
            self._folders.make(key.rpartition("/")[0])
            data = b"".join(lines)
            if len(lines) > 1 or isinstance(change, Extend):
                self.batches.begin(Batch(key, log.status.inode, size, len(data)))
            try:
                self._write_all(log.descriptor, data)
            except OSError as error:
                try:
                    self._files.truncate(log.descriptor, size)
                except OSError:
                    self._break(error)  # a part of the lines stays; the note of a batch stays too
                    raise self._outcome_unknown() from error
                raise
            if isinstance(change, Extend):
                self._logs.changed(key, log)
            else:
                self._logs.appended(key, log, lines)
        return True if isinstance(change, Extend) else len(lines)

    def _mend(self, key: str) -> bool:
        """Set aside half a line at the end of a log, so that what is appended stands alone.

        A whole message that only lacks its newline, as an editor leaves it, gets one.
        """
        log = self._logs.look(key)
        if log is None or log.learned == log.status.size:
            return False
        size = log.status.size - log.learned
        tail = self._files.read(log.descriptor, size, log.learned) if size <= codec.MAX_LINE_BYTES else b""
        if codec.line_id(tail) is not None:
            self._write_all(log.descriptor, b"\n")
            self._logs.changed(key, log)
        else:
            self._cut(key, log, log.learned, "half a line at the end of the log")
        return True

    def _cut(self, key: str, log: OpenLog, size: int, reason: str) -> None:
        """Cut a log to `size` bytes, after the rest is kept in the quarantine with a note of where it was."""
        note_key, bytes_key = quarantine_keys(self._config)
        note = {"key": key, "reason": reason, "offset": size, "size": log.status.size - size}
        rest = (
            self._files.read(log.descriptor, min(_COPY_BYTES, log.status.size - offset), offset)
            for offset in range(size, log.status.size, _COPY_BYTES)
        )
        for target, pieces in ((note_key, iter([codec.encode_document(note)])), (bytes_key, rest)):
            temporary = self._write_temporary(target, pieces)
            self._files.rename(temporary, self.tree.path(target))
        self._files.sync_folder(self.tree.path(target.rpartition("/")[0]))
        logger.warning("%s: %s at byte %d is set aside as %s", key, reason, size, bytes_key)
        self._files.truncate(log.descriptor, size)
        self._logs.forget(key)
        again = self._logs.look(key)
        if again is not None:
            self._logs.changed(key, again)

    def _beginning(self, key: str, size: int) -> Iterator[bytes]:
        """Yield the first `size` bytes of a log."""
        descriptor = self._files.open_to_read(self.tree.path(key))
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
        return LogReader(self._files, self.tree.path(key), key, block=self._config.jsonl_read_buffer_size, strict=True)

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


def _call_all(works: Sequence[Callable[[], None]]) -> None:
    for work in works:
        work()


def _again(error: Exception) -> Exception:
    """Return an error of its own for each of several callers, for a traceback grows with each raise."""
    return copy.copy(error) if isinstance(error, StorageError) else error


def _key_of(change: EngineChange) -> str:
    match change:
        case Move(source):
            return source
        case Quota(folder) | RemoveTree(folder):
            return folder
        case _:
            return change.key
