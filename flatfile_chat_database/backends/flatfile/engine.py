"""Making changes durable on files, one batch at a time, under the store's lock.

A document is replaced by the full sequence: write a temporary neighbour, sync it, rename it, sync the folder. A new log
is made the same way; an existing one takes one `write` of whole lines and a sync. Names of new folders are synced up to
the root. Syncs of logs and folders are shared by the whole batch, and nobody is answered before all of them are done.

What a dead process left behind is mended before the log it concerns is touched: half a line at its end is set aside, and
a batch of lines that was not finished is taken back (its beginning is noted in the lock file while it is written).

The engine is synchronous and belongs to one thread; `writer.py` runs it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ... import codec
from ...config import StorageConfig
from ...errors import (
    ConfigurationError,
    DurabilityError,
    UnavailableError,
    ValidationError,
)
from ...layout import Layout
from ...models import new_id
from ..base import (
    ANY,
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
    version_of,
)
from .files import Files, FileStatus
from .logs import LogReader, open_log, scan_lines
from .tree import Item, Tree

logger = logging.getLogger("flatfile_chat_database")

_NETWORK_FILE_SYSTEMS = frozenset(
    ("nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "ceph", "glusterfs", "lustre", "gpfs")
    + ("fuse.sshfs", "fuse.glusterfs", "fuse.s3fs")
)
_REMEMBERED_IDS = 2_000_000
"""Ids of messages kept in memory over all logs, to know a message that comes again."""
_COPY_BYTES = 1 << 20

_HINTS = {
    errno.ENOSPC: "Free some space; nothing that was acknowledged is lost.",
    errno.EDQUOT: "Free some space or raise the quota; nothing that was acknowledged is lost.",
    errno.EROFS: "The file system is read-only.",
    errno.EACCES: "Give this user access to the store's folder.",
    errno.EPERM: "Give this user access to the store's folder.",
    errno.ENOTDIR: "A file stands where a folder should be.",
    errno.EISDIR: "A folder stands where a file should be.",
    errno.ELOOP: "Symbolic links in a store are not followed.",
    errno.EMFILE: "Raise the limit of open files, or lower max_open_files.",
    errno.ENFILE: "The system has too many open files.",
    errno.ENAMETOOLONG: "Use shorter names, or a store closer to the root of the file system.",
}


@contextlib.contextmanager
def mapped(key: str | None = None) -> Iterator[None]:
    """Turn the system's errors into UnavailableError, keeping the cause."""
    try:
        yield
    except OSError as error:
        place = f"{key}: " if key else ""
        raise UnavailableError(
            f"{place}{error.strerror or error}.", key=key, hint=_HINTS.get(error.errno or 0)
        ) from error


@dataclass(frozen=True, slots=True)
class Place:
    """Internal change: give a finished temporary file its name. Outcome: False, and it is gone, if the name is taken."""

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


@dataclass(slots=True)
class _Log:
    """What the engine knows of a log as of a size and time of change."""

    descriptor: int
    status: FileStatus
    learned: int = 0
    """The end of the last whole line that was taken in."""
    offsets: dict[int, int] = field(default_factory=dict)
    """Hash of a record's id to the offset of its line."""
    count: int = 0


@dataclass(slots=True)
class _Unsynced:
    """What must be made durable before anybody is answered."""

    logs: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)
    marked: bool = False


class Engine:
    """Applies jobs to the files of one store."""

    def __init__(self, config: StorageConfig, root: str, files: Files) -> None:
        self._config = config
        self._files = files
        self._root = root
        self._layout = Layout(config)
        self._suffix = config.atomic_write_temp_suffix
        self.tree = Tree(files, root, self._layout, self._suffix)
        self._lock: int | None = None
        self._logs: OrderedDict[str, _Log] = OrderedDict()
        self._remembered = 0
        self._known_folders: set[str] = set()
        self._counts: dict[str, tuple[FileStatus, list[str]]] = {}
        self._broken: str | None = None
        self._unsynced = _Unsynced()

    @property
    def open_files(self) -> int:
        """The number of descriptors that are kept between jobs."""
        return len(self._logs) + (self._lock is not None)

    # --- running jobs --------------------------------------------------------------------------------

    def run(self, jobs: Sequence[Job]) -> None:
        """Do the jobs in order and fill in what came of each. Raises nothing."""
        self._files.counters["batches"] += 1
        self._files.counters["commits"] += len(jobs)
        try:
            if self._broken is not None:
                raise DurabilityError(
                    f"An earlier write could not be made durable ({self._broken}).",
                    hint="Reopen the store and look which messages are there.",
                )
            with mapped():
                self._take_lock()
        except Exception as error:
            for job in jobs:
                job.error = error
            return
        try:
            self._run_locked(jobs)
        finally:
            if self._lock is not None:
                self._files.unlock(self._lock)

    def _run_locked(self, jobs: Sequence[Job]) -> None:
        try:
            with mapped(self._layout.lock):
                self._take_back_unfinished()
        except Exception as error:
            for job in jobs:
                job.error = error
            return
        for job in jobs:
            try:
                job.outcomes = self._run_job(job.changes)
            except Exception as error:
                job.error = error
        self._sync()
        if self._broken is not None:
            for job in jobs:
                if job.error is None:
                    job.error = self._outcome_unknown()

    def _run_job(self, changes: Sequence[EngineChange]) -> list[Outcome]:
        """Check all, write all new bytes beside their places, then put them there."""
        staged: dict[int, str] = {}
        changed = False
        try:
            for change in changes:
                with mapped(_key_of(change)):
                    self._check(change)
            for index, change in enumerate(changes):
                with mapped(_key_of(change)):
                    temporary = self._stage(change)
                if temporary is not None:
                    staged[index] = temporary
            outcomes: list[Outcome] = []
            for index, change in enumerate(changes):
                with mapped(_key_of(change)):
                    outcomes.append(self._apply(change, staged.get(index)))
                staged.pop(index, None)
                changed = changed or not isinstance(change, Require | Quota)
        except UnavailableError as error:
            if not changed:
                raise
            raise DurabilityError(f"Only a part of the change was made. {error.message}", key=error.key) from error
        finally:
            for temporary in staged.values():
                with contextlib.suppress(OSError):
                    self._files.remove(temporary)
        return outcomes

    def close(self) -> None:
        """Let go of all descriptors."""
        self._forget_logs()
        if self._lock is not None:
            self._files.close(self._lock)
            self._lock = None

    # --- the lock ------------------------------------------------------------------------------------

    def _take_lock(self) -> None:
        """Take the store's lock, made at the first write and never removed."""
        path = self.tree.path(self._layout.lock)
        deadline = time.monotonic() + self._config.lock_timeout_seconds
        pause = 0.0002
        while True:
            if self._lock is None:
                self._refuse_network_file_system()
                self._make_folder(self._layout.lock.rpartition("/")[0])
                self._lock = self._files.open_lock(path)
            if self._files.try_lock(self._lock):
                if self._is_the_lock_file(path):
                    return
                self._files.close(self._lock)  # somebody replaced the file; a lock on the old one excludes nobody
                self._lock = None
                self._known_folders.clear()
                continue
            if time.monotonic() >= deadline:
                raise UnavailableError(
                    f"Another process has held the lock of the store for {self._config.lock_timeout_seconds} s.",
                    key=self._layout.lock,
                    hint="Look which process has it (lsof), or raise lock_timeout_seconds.",
                )
            time.sleep(pause * (0.5 + random.random()))
            pause = min(pause * 2, 0.005)

    def _is_the_lock_file(self, path: str) -> bool:
        try:
            return _same_file(self._files.status(path), self._files.status_of(self._locked()))
        except FileNotFoundError:
            return False

    def _refuse_network_file_system(self) -> None:
        if self._config.allow_network_file_system:
            return
        place = self._root
        while True:
            try:
                self._files.status(place)
                break
            except FileNotFoundError:
                place = place.rpartition("/")[0] or "/"
        kind = self._files.file_system(place)
        if kind in _NETWORK_FILE_SYSTEMS:
            raise ConfigurationError(
                f"The store {self._root!r} is on a network file system ({kind}), whose locks cannot be trusted.",
                hint="Use a local disk, or set allow_network_file_system if only one host writes.",
            )

    # --- a batch of lines is all or nothing ------------------------------------------------------------

    def _mark(self, key: str, size: int) -> None:
        """Note durably where a batch of lines begins, so that half of it can be taken back."""
        lock = self._locked()
        self._write_all(lock, json.dumps({"key": key, "size": size}).encode() + b"\n")
        self._files.sync(lock)
        self._unsynced.marked = True

    def _clear_marks(self) -> None:
        lock = self._locked()
        self._files.truncate(lock, 0)
        self._files.sync(lock)

    def _take_back_unfinished(self) -> None:
        """Undo the batches that a process which died had begun; none of them was acknowledged."""
        lock = self._locked()
        notes = self._files.read(lock, 1 << 20, 0)
        if not notes:
            return
        for line in notes.split(b"\n")[:-1]:
            note = codec.decode_object(line, self._layout.lock)
            key, size = str(note["key"]), int(note["size"])
            try:
                descriptor = self._files.open_to_append(self.tree.path(key))
            except FileNotFoundError:
                continue
            try:
                if self._files.status_of(descriptor).size > size:
                    logger.warning("%s: a batch of messages that was never finished is taken back", key)
                    self._files.truncate(descriptor, size)
                    self._files.sync(descriptor)
            finally:
                self._files.close(descriptor)
        self._clear_marks()

    def has_unfinished(self) -> bool:
        """Return whether the lock file notes a batch, of a process at work or of a dead one."""
        try:
            return self._files.status(self.tree.path(self._layout.lock)).size > 0
        except FileNotFoundError:
            return False

    def _locked(self) -> int:
        if self._lock is None:
            raise UnavailableError("The store's lock is not held.", key=self._layout.lock)
        return self._lock

    # --- syncing -------------------------------------------------------------------------------------

    def _sync(self) -> None:
        """Make durable what the jobs so far have changed.

        One-shot: after a failed sync the system may call the pages clean, so a second try would prove nothing. The
        engine is broken then and takes no further job.
        """
        unsynced, self._unsynced = self._unsynced, _Unsynced()
        try:
            for key in sorted(unsynced.logs):
                log = self._logs.get(key)
                if log is not None:
                    self._files.sync(log.descriptor)
            for folder in sorted(unsynced.folders):
                with contextlib.suppress(FileNotFoundError):  # removed later in the same batch
                    self._files.sync_folder(self.tree.path(folder))
            if unsynced.marked:
                self._clear_marks()
        except OSError as error:
            self._broken = error.strerror or str(error)
            self._forget_logs()
        else:
            self._evict()

    def _settle(self) -> None:
        """Finish the batches of lines before their files change in another way, for taking them back cuts a file."""
        if self._unsynced.marked:
            self._sync()
            if self._broken is not None:
                raise self._outcome_unknown()

    def _outcome_unknown(self) -> DurabilityError:
        return DurabilityError(
            f"{DurabilityError.__doc__} ({self._broken})", hint="Reopen the store and look whether it is there."
        )

    def _make_folder(self, folder: str) -> None:
        """Make a folder and its parents; see that their names become durable, whoever made them."""
        if folder in self._known_folders:
            return
        if folder:
            parent = folder.rpartition("/")[0]
            self._make_folder(parent)
            known = self._children_if_known(parent)
            try:
                self._files.make_folder(self.tree.path(folder))
            except FileExistsError:
                if self._files.status(self.tree.path(folder)).kind != "folder":
                    raise NotADirectoryError(errno.ENOTDIR, "Not a directory", folder) from None
            except FileNotFoundError:  # the parent is gone, though it was there before
                self._known_folders.clear()
                self._make_folder(folder)
                return
            else:
                if known is not None:
                    status = self._files.status(self.tree.path(parent))
                    self._counts[parent] = (status, [*known, folder.rpartition("/")[2]])
            self._unsynced.folders.add(parent)
        else:
            self._make_root()
        if len(self._known_folders) > 100_000:
            self._known_folders.clear()
        self._known_folders.add(folder)

    def _make_root(self) -> None:
        """Make the store's own folder and sync each new name on the way."""
        missing: list[str] = []
        place = self._root
        while place not in ("", "/"):
            try:
                if self._files.status(place).kind == "file":
                    raise NotADirectoryError(errno.ENOTDIR, "Not a directory", place)
                break
            except FileNotFoundError:
                missing.append(place)
                place = place.rpartition("/")[0]
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                self._files.make_folder(folder)
            self._files.sync_folder(folder.rpartition("/")[0] or "/")

    def _clean_up(self, key: str) -> None:
        """Remove the folders that a removal left empty, if the configuration says so."""
        if not self._config.auto_cleanup_empty_directories:
            return
        folder = key.rpartition("/")[0]
        while folder:
            try:
                self._files.remove_folder(self.tree.path(folder))
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                    raise
                if error.errno != errno.ENOENT:
                    return
            self._known_folders.discard(folder)
            self._unsynced.folders.discard(folder)
            folder = folder.rpartition("/")[0]
            self._unsynced.folders.add(folder)

    # --- checking conditions -------------------------------------------------------------------------

    def _check(self, change: EngineChange) -> None:
        match change:
            case Require(key, what):
                if not self.exists(key):
                    raise not_found(what, key)
            case Quota(folder):
                check_quota(change, self._children(folder))
            case Put(key, _, expected):
                if expected is not ANY:
                    check_version(key, self.read(key), expected)
            case Append(key):
                log = self._log(key)
                added = new_lines(change, lambda record_id: self._find(key, log, record_id))
                check_maximum(change, log.count if log is not None else 0, added)
            case Edit(key, record_id):
                self._mend(key)
                check_edit(change, self._strict_find(key, record_id))
            case Truncate(key, count):
                self._mend(key)
                self._dropped(key, count)
            case Move(_, target):
                if self.exists(target) or self.tree.keys(f"{target}/"):
                    raise exists_already(target)
            case Extend(key, data):
                if not data.endswith(b"\n"):
                    raise ValidationError("What is appended must end in a newline.", key=key)
            case Delete() | RemoveTree() | Place() | Mend():
                pass

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
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        finally:
            self._files.close(descriptor)

    def _children(self, folder: str) -> list[str]:
        """Return a folder's children; remembered until the folder changes, for a quota counts them often."""
        known = self._children_if_known(folder)
        if known is None:
            known = self.tree.children(folder)
            with contextlib.suppress(FileNotFoundError):
                self._counts[folder] = (self._files.status(self.tree.path(folder)), known)
            while len(self._counts) > 100:
                del self._counts[next(iter(self._counts))]
        return known

    def _children_if_known(self, folder: str) -> list[str] | None:
        if folder not in self._counts:
            return None
        status, names = self._counts[folder]
        try:
            return names if self._files.status(self.tree.path(folder)) == status else None
        except FileNotFoundError:
            return None

    # --- changing ------------------------------------------------------------------------------------

    def _stage(self, change: EngineChange) -> str | None:
        """Write the new bytes of a change to a durable temporary file; return its path."""
        match change:
            case Put(key, data):
                return self._write_temporary(key, [data])
            case Append(key, lines) if lines and key not in self._logs and not self.exists(key):
                return self._write_temporary(key, new_lines(change, lambda _: None))
            case Extend(key, data) if not self.exists(key):
                return self._write_temporary(key, [data])
            case Edit(key):
                return self._write_temporary(key, self._edited(change))
        return None

    def _apply(self, change: EngineChange, staged: str | None) -> Outcome:
        if isinstance(change, Edit | Truncate | Delete | Move | RemoveTree):
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
                return self._truncate(key, count)
            case Move(source, target):
                return self._move(source, target)
            case RemoveTree(folder):
                return self._remove_tree(folder)
            case Place(temporary, key):
                if self.exists(key):
                    self._files.remove(temporary)
                    return False
                self._make_folder(key.rpartition("/")[0])
                self._install(temporary, key)
                return True
            case Mend(key):
                return self._mend(key)
        return None

    def temporary(self, key: str) -> str:
        """Return a new path for unfinished bytes beside `key`."""
        return self.tree.path(f"{key.rpartition('/')[0]}/.{new_id()}{self._suffix}".lstrip("/"))

    def _write_temporary(self, key: str, pieces: Sequence[bytes] | Iterator[bytes]) -> str:
        self._make_folder(key.rpartition("/")[0])
        path = self.temporary(key)
        try:
            descriptor = self._files.create(path)
        except FileNotFoundError:  # another process cleaned the empty folder away
            self._known_folders.clear()
            self._make_folder(key.rpartition("/")[0])
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

    def _install(self, temporary: str, key: str) -> None:
        self._forget_log(key)
        self._files.rename(temporary, self.tree.path(key))
        self._unsynced.folders.add(key.rpartition("/")[0])

    def _delete(self, key: str) -> bool:
        if not self.exists(key):
            return False
        self._forget_log(key)
        self._files.remove(self.tree.path(key))
        self._unsynced.folders.add(key.rpartition("/")[0])
        self._clean_up(key)
        return True

    def _move(self, source: str, target: str) -> bool:
        try:
            self._files.status(self.tree.path(source))
        except FileNotFoundError:
            return False
        self._make_folder(target.rpartition("/")[0])
        with contextlib.suppress(FileNotFoundError):
            if self._files.status(self.tree.path(target)).kind == "folder":
                self.tree.remove(Item(target, "folder"))  # it holds no key; see _check
        self._forget_below(source)
        self._files.rename(self.tree.path(source), self.tree.path(target))
        self._unsynced.folders |= {source.rpartition("/")[0], target.rpartition("/")[0]}
        self._clean_up(source)
        return True

    def _remove_tree(self, folder: str) -> list[str]:
        keys = self.tree.keys(f"{folder}/")
        try:
            self._files.status(self.tree.path(folder))
        except FileNotFoundError:
            return keys
        # Renamed first, so that a process that dies here leaves no half of it behind under its name.
        doomed = self.temporary(folder)
        self._forget_below(folder)
        self._files.rename(self.tree.path(folder), doomed)
        self._files.sync_folder(self.tree.path(folder.rpartition("/")[0]))
        self.tree.remove(Item(doomed[len(self._root) + 1 :], "folder"))
        self._unsynced.folders.add(folder.rpartition("/")[0])
        self._clean_up(folder)
        return keys

    # --- logs ----------------------------------------------------------------------------------------

    def _log(self, key: str) -> _Log | None:
        """Return what is known of a log after looking for what others did to it, or None if it is absent."""
        path = self.tree.path(key)
        known = self._logs.get(key)
        try:
            status = self._files.status(path)
        except FileNotFoundError:
            self._forget_log(key)
            return None
        if status.kind != "file":
            raise IsADirectoryError(errno.EISDIR, "Is no file", path)
        if known is None or not _is_grown(known.status, status):
            self._forget_log(key)
            descriptor = self._files.open_to_append(path)
            known = self._logs[key] = _Log(descriptor, status)
        self._logs.move_to_end(key)
        self._learn(known, status)
        return known

    def _learn(self, log: _Log, status: FileStatus) -> None:
        """Take in the whole lines that were added since the log was last looked at."""
        for run in scan_lines(self._files, log.descriptor, log.learned, status.size, _COPY_BYTES):
            for offset, end, line in run:
                record_id = codec.line_id(line) if line is not None else None
                if record_id is not None:
                    self._remember(log, record_id, offset)
                log.learned = end
        log.status = status

    def _remember(self, log: _Log, record_id: str, offset: int) -> None:
        log.count += 1
        if hash(record_id) not in log.offsets:
            log.offsets[hash(record_id)] = offset
            self._remembered += 1

    def _find(self, key: str, log: _Log | None, record_id: str) -> bytes | None:
        """Return the line of a record, or None."""
        offset = log.offsets.get(hash(record_id)) if log is not None else None
        if log is None or offset is None:
            return None
        line = self._line_at(log, offset)
        if codec.line_id(line) == record_id:
            return line
        # Two ids with one hash: look at every line.
        for run in scan_lines(self._files, log.descriptor, 0, log.status.size, _COPY_BYTES):
            for _, _, other in run:
                if other is not None and codec.line_id(other) == record_id:
                    return other
        return None

    def _line_at(self, log: _Log, offset: int) -> bytes:
        size = 4096
        while True:
            data = self._files.read(log.descriptor, size, offset)
            line, newline, _ = data.partition(b"\n")
            if newline or len(data) < size:
                return line
            size *= 4

    def _append(self, change: Append | Extend, staged: str | None) -> Outcome:
        key = change.key
        if staged is not None:
            self._install(staged, key)
            return len(new_lines(change, lambda _: None)) if isinstance(change, Append) else True
        self._mend(key)
        log = self._log(key)
        if isinstance(change, Extend):
            lines = [change.data]
        else:
            lines = new_lines(change, lambda record_id: self._find(key, log, record_id))
        if log is None or not lines:
            return len(lines) if isinstance(change, Append) else True
        size = log.status.size
        self._make_folder(key.rpartition("/")[0])
        if len(lines) > 1 or lines[0].count(b"\n") > 1:
            self._mark(key, size)
        try:
            self._write_all(log.descriptor, b"".join(lines))
        except OSError:
            self._files.truncate(log.descriptor, size)
            raise
        self._unsynced.logs.add(key)
        if isinstance(change, Extend):
            return True  # the next look at the log takes its lines in
        for line in lines:
            self._remember(log, codec.written_id(line), log.learned)
            log.learned += len(line)
        log.status = self._files.status_of(log.descriptor)
        return len(lines)

    def _mend(self, key: str) -> bool:
        """Set aside half a line at the end of a log, so that what is appended stands alone.

        A whole message that only lacks its newline, as an editor leaves it, gets one.
        """
        log = self._log(key)
        if log is None or log.learned == log.status.size:
            return False
        size = log.status.size - log.learned
        tail = self._files.read(log.descriptor, size, log.learned) if size <= codec.MAX_LINE_BYTES else b""
        if codec.line_id(tail) is not None:
            self._write_all(log.descriptor, b"\n")
        else:
            self._quarantine(key, log, "half a line at the end of the log")
            self._files.truncate(log.descriptor, log.learned)
        self._unsynced.logs.add(key)
        self._learn(log, self._files.status_of(log.descriptor))
        return True

    def _quarantine(self, key: str, log: _Log, reason: str) -> None:
        """Keep the bytes of a log that are not understood, from its last whole line on, with a note."""
        item = new_id()
        note = {"key": key, "offset": log.learned, "size": log.status.size - log.learned, "reason": reason}
        rest = (
            self._files.read(log.descriptor, min(_COPY_BYTES, log.status.size - offset), offset)
            for offset in range(log.learned, log.status.size, _COPY_BYTES)
        )
        for name, pieces in ((f"{item}.json", iter([codec.encode_document(note)])), (f"{item}.bin", rest)):
            target = self._layout.key("quarantine", item=name)
            self._install(self._write_temporary(target, pieces), target)
            self._files.sync_folder(self.tree.path(target.rpartition("/")[0]))
        logger.warning("%s: %s at byte %d is set aside as %s.bin", key, reason, log.learned, item)

    def _truncate(self, key: str, count: int | None) -> list[bytes]:
        kept, dropped = self._dropped(key, count)
        log = self._log(key)
        if log is None or not dropped:
            return dropped
        descriptor = self._files.open_to_append(self.tree.path(key))
        try:
            self._files.truncate(descriptor, kept)
            self._files.sync(descriptor)
        finally:
            self._files.close(descriptor)
        self._forget_log(key)
        return dropped

    def _dropped(self, key: str, count: int | None) -> tuple[int, list[bytes]]:
        """Return the size that a log has after a Truncate, and the records that go."""
        if count == 0 or not self.exists(key):
            return 0, []
        if count is None:
            data = self.read(key) or b""
            kept, dropped = kept_and_dropped(key, data, None)
            return len(kept), dropped
        with self._reader(key) as reader:
            found = reader.backward(count)
        return (found[-1][0] if found else 0), [line for _, line in reversed(found)]

    def _reader(self, key: str) -> LogReader:
        return open_log(self._files, self.tree.path(key), key, block=self._config.jsonl_read_buffer_size, strict=True)

    def _strict_find(self, key: str, record_id: str) -> bytes | None:
        """Return a record's line after reading every line of the log, none of which may be damaged."""
        found = None
        if self.exists(key):
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

    # --- bookkeeping ---------------------------------------------------------------------------------

    def _write_all(self, descriptor: int, data: bytes) -> None:
        taken = self._files.write(descriptor, data)
        if taken < len(data):  # a full disk, a limit or a signal; the next write says which
            rest = memoryview(data)[taken:]
            while rest:
                rest = rest[self._files.write(descriptor, rest) :]

    def _forget_log(self, key: str) -> None:
        log = self._logs.pop(key, None)
        if log is not None:
            self._remembered -= len(log.offsets)
            self._files.close(log.descriptor)

    def _forget_below(self, folder: str) -> None:
        for key in [key for key in self._logs if key == folder or key.startswith(f"{folder}/")]:
            self._forget_log(key)
        self._known_folders = {
            known for known in self._known_folders if known != folder and not known.startswith(f"{folder}/")
        }

    def _forget_logs(self) -> None:
        for key in list(self._logs):
            self._forget_log(key)

    def _evict(self) -> None:
        """Keep the number of descriptors and of remembered ids within bounds, oldest first."""
        while self._logs and (
            len(self._logs) > max(1, self._config.max_open_files) or self._remembered > _REMEMBERED_IDS
        ):
            self._forget_log(next(iter(self._logs)))


def _same_file(one: FileStatus, other: FileStatus) -> bool:
    return (one.device, one.inode) == (other.device, other.inode)


def _is_grown(known: FileStatus, status: FileStatus) -> bool:
    """Tell whether a log may have been appended to since it was known, but not edited in another way."""
    if not _same_file(known, status) or status.size < known.size:
        return False
    return status.size > known.size or status.modified == known.modified


def _key_of(change: EngineChange) -> str:
    match change:
        case Move(source):
            return source
        case Quota(folder) | RemoveTree(folder):
            return folder
        case _:
            return change.key
