"""The file of a derived index: one SQLite database a user, which anybody may delete at any moment.

A file comes into being whole: it is built under another name, locked so that one process at a time does it, and then
gets its name. So what stands under the name was complete once, and SQLite's write-ahead log keeps it so. A process
that still has the file of before open notices by its inode.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar
from urllib.parse import quote

from .catalogue import Page
from .texts import Totals

T = TypeVar("T")

BUSY_SECONDS: Final = 0.5
"""How long a query waits for another program that has the index locked, before it reads the files instead."""

_CACHE_KIB = 65_536
_SETTINGS = (f"cache_size=-{_CACHE_KIB}", "synchronous=NORMAL", "temp_store=FILE")

_CATALOGUE = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value ANY) WITHOUT ROWID, STRICT;
CREATE TABLE sessions (session_id TEXT PRIMARY KEY, updated INTEGER, damaged INTEGER) WITHOUT ROWID, STRICT;
CREATE INDEX sessions_by_time ON sessions (updated, session_id) WHERE NOT damaged;
CREATE INDEX damaged_sessions ON sessions (session_id) WHERE damaged;
"""
_TEXTS = """
CREATE TABLE logs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, session_id TEXT UNIQUE, identity TEXT, last INTEGER, last_hash TEXT,
    messages INTEGER, tokens INTEGER, log_stamp TEXT, context_stamp TEXT, has_documents INTEGER
) STRICT;
CREATE TABLE messages (
    id INTEGER PRIMARY KEY, session INTEGER, position INTEGER, offset INTEGER, length INTEGER, moment INTEGER,
    role TEXT, highest INTEGER, tokens INTEGER, text TEXT
) STRICT;
CREATE INDEX late_messages ON messages (id) WHERE NOT highest;
CREATE TABLE notes (
    id INTEGER PRIMARY KEY, session INTEGER, kind TEXT, filename TEXT, moment INTEGER, tokens INTEGER, text TEXT
) STRICT;
CREATE INDEX notes_by_session ON notes (session);
CREATE VIRTUAL TABLE words USING fts5 (text, content='', tokenize='ascii', columnsize=0);
CREATE VIRTUAL TABLE note_words USING fts5 (text, content='', tokenize='ascii', columnsize=0);
"""
if sqlite3.sqlite_version_info < (3, 37):  # which does not know it; whoever reads a row looks at its types anyhow
    _CATALOGUE, _TEXTS = (each.replace(", STRICT", "").replace(" STRICT", "") for each in (_CATALOGUE, _TEXTS))
SESSION_INDEX: Final = "CREATE INDEX IF NOT EXISTS messages_by_session ON messages (session)"
"""Made when messages are first taken out again, which most indexes never see, for it makes every build slower."""

_DAMAGE = frozenset({sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_MISMATCH})


class IndexUnusable(Exception):
    """The index cannot answer now; the files can. `str()` says why."""


class IndexAbsent(IndexUnusable):
    """There is no index, or none that this version can use; it can be built."""


class IndexDamaged(IndexAbsent):
    """What is there is no whole index; another can be built in its place."""


class IndexFile:
    """The index of one user; any thread may use it, one at a time."""

    def __init__(self, path: str, fingerprint: str, *, read_only: bool) -> None:
        """Name an index that may not exist; nothing is opened.

        Args:
            path: Where it is.
            fingerprint: What a usable index was made with.
            read_only: Never create or change a file.
        """
        self.path = path
        self.fingerprint = fingerprint
        self.read_only = read_only
        self.seen: str | None = None
        """The cursor up to which all changes were taken in, which may be later than the one in the file."""
        self.listed: str | None = None
        """The same of the catalogue."""
        self.pages: dict[tuple[int | None, int], Page] = {}
        """Pages of the catalogue, by limit and offset, as of that cursor."""
        self.generation = 0
        """Grows when the file turns out to be another one, so that nothing known of it counts any more."""
        self.counts: dict[str, tuple[int, int, int]] = {}
        """How many messages hold a term, by its expression: see `matches.py`."""
        self.totals: tuple[object, Totals] | None = None
        """How many texts and tokens there are, after what makes it so."""
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None
        self._retired = False

    def __repr__(self) -> str:
        return f"<IndexFile {self.path!r}{' open' if self._connection is not None else ''}>"

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Give a connection on which nothing changes meanwhile.

        Raises:
            IndexUnusable: It cannot be read now.
        """
        with self._lock, self._mapped():
            connection = self._open()
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                if self._retired:
                    self.close()
            if self.read_only:
                self._close_unchanged()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Give a connection whose changes are made as one when the block ends without an error.

        Raises:
            IndexUnusable: It cannot be written now.
        """
        if self.read_only:
            raise IndexUnusable("the store was opened read-only")
        with self._lock, self._mapped():
            connection = self._open()
            connection.execute("BEGIN IMMEDIATE")
            try:
                if self._is_replaced():
                    raise IndexUnusable("it was replaced meanwhile")
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            finally:
                if self._retired:
                    self.close()

    def retire(self) -> None:
        """Close the file; whoever still has this object opens it and closes it again."""
        with self._lock:
            self._retired = True
            self.close()

    def close(self) -> None:
        """Close the file; it opens again when it is needed."""
        with self._lock:
            connection, self._connection, self._inode = self._connection, None, None
            if connection is not None:
                with contextlib.suppress(sqlite3.Error):
                    connection.close()

    def remove(self) -> None:
        """Delete the index, an unfinished one too."""
        with self._lock:
            self.close()
            self.forget()
            # The unfinished one first: whoever is at it either has given it its name by then, or never can.
            _remove(f"{self.path}.new")
            _remove(self.path)
            with contextlib.suppress(IndexUnusable, FileNotFoundError):
                _unlock(self.path, _lock(self.path))  # that of a process that died

    def forget(self) -> None:
        """Forget what is remembered of the file's contents."""
        self.generation += 1
        self.seen = self.listed = None
        self.counts.clear()
        self.totals = None
        self.pages.clear()

    def _is_replaced(self) -> bool:
        return _inode(self.path) != self._inode

    def _open(self) -> sqlite3.Connection:
        inode = _inode(self.path)
        if self._connection is not None and inode == self._inode:
            return self._connection
        self.close()
        self.forget()
        if inode is None:
            raise IndexAbsent("there is none")
        mode = "rw"
        if self.read_only:
            # A write-ahead log of others has to be read with them; without one, nothing must be created beside it.
            mode = "ro" if os.path.exists(_companions(self.path)[0]) else "ro&immutable=1"
        connection = _connect(self.path, mode)
        try:
            found = dict(connection.execute("SELECT name, value FROM meta WHERE name = 'fingerprint'"))
            if found.get("fingerprint") != self.fingerprint:
                raise IndexAbsent("it was made by another version or with other settings")
        except BaseException:
            connection.close()
            raise
        if _inode(self.path) != inode:
            connection.close()
            raise IndexUnusable("it was replaced meanwhile")
        self._connection, self._inode = connection, inode
        return connection

    def _close_unchanged(self) -> None:
        """Close after a read without locks, and fail if somebody may have written meanwhile."""
        inode = self._inode
        self.close()
        if _inode(self.path) != inode:
            raise IndexUnusable("it was replaced meanwhile")

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            self.close()
            self.forget()
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
            if code in _DAMAGE:
                raise IndexDamaged(f"it is damaged: {error}") from error
            raise IndexUnusable(str(error)) from error
        except OSError as error:
            self.close()
            raise IndexUnusable(error.strerror or str(error)) from error
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            self.close()
            self.forget()
            raise IndexDamaged(f"it holds what no index does: {error}") from error


class CatalogueInMemory(IndexFile):
    """The catalogue of one user where a store has no place for files: never absent, and empty when it was closed."""

    def __init__(self) -> None:
        super().__init__("in memory", "", read_only=False)

    def close(self) -> None:
        with self._lock:
            super().close()
            self.forget()

    def remove(self) -> None:
        self.close()

    def _is_replaced(self) -> bool:
        return False

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            connection.executescript(_CATALOGUE)
            self._connection = connection
        return self._connection

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            with super()._mapped():
                yield
        except IndexAbsent as error:  # or a file would be built in its place
            raise IndexUnusable(str(error)) from error


class Build:
    """A new index in the making, for the one process that has it locked.

    The lock is on a file beside: closing any descriptor of a file takes the locks from it that SQLite has there.
    """

    def __init__(self, file: IndexFile) -> None:
        """Begin one.

        Raises:
            IndexUnusable: Another process is at it, or nothing can be written there.
        """
        if file.read_only:
            raise IndexUnusable("the store was opened read-only")
        self._file = file
        self._place = f"{file.path}.new"
        self._at_work = threading.Lock()
        self._ended = False
        try:
            os.makedirs(os.path.dirname(file.path), mode=0o700, exist_ok=True)
            self._lock = _lock(file.path)
        except OSError as error:
            raise IndexUnusable(error.strerror or str(error)) from error
        try:
            _remove(self._place)  # what a process that died had done so far
            os.close(os.open(self._place, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            self._inode = _inode(self._place)
            self.connection = _connect(self._place, "rw", journal="OFF")
        except (OSError, sqlite3.Error) as error:
            _unlock(file.path, self._lock)
            raise IndexUnusable(str(error)) from error
        try:
            self.connection.executescript(_CATALOGUE + _TEXTS)
            self.connection.execute("INSERT INTO meta VALUES ('fingerprint', ?)", (file.fingerprint,))
            self.connection.execute("BEGIN")
        except BaseException as error:
            self.abandon()
            if isinstance(error, sqlite3.Error):
                raise IndexUnusable(str(error)) from error
            raise

    def work(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do something with the connection, unless it was abandoned; nothing else happens to it meanwhile.

        Raises:
            IndexUnusable: It was abandoned, or cannot be written.
        """
        with self._at_work:
            if self._ended:
                raise IndexUnusable("it was abandoned")
            try:
                return work(*arguments)
            except sqlite3.Error as error:
                raise IndexUnusable(str(error)) from error

    def install(self) -> None:
        """Give the finished index its name, in place of any that is there; abandon it where that fails.

        Raises:
            IndexUnusable: It cannot be written, or was removed.
        """
        try:
            self.work(self._install)
        except OSError as error:
            raise IndexUnusable(error.strerror or str(error)) from error
        finally:
            self.abandon()

    def _install(self) -> None:
        path = self._file.path
        self.connection.execute("COMMIT")
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.close()
        descriptor = os.open(self._place, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)  # before anybody can have it open by its name
        if _inode(self._place) != self._inode:
            raise IndexUnusable("it was removed meanwhile")
        # The old name goes first, so that nobody opens the old file after its write-ahead log is gone: SQLite would
        # take a log that is left for one of the new file.
        _remove(path)
        os.rename(self._place, path)

    def abandon(self) -> None:
        """Remove what was made so far, and let others build; nothing happens where it has ended."""
        with self._at_work:
            if self._ended:
                return
            self._ended = True
            with contextlib.suppress(sqlite3.Error):
                self.connection.close()
            with contextlib.suppress(OSError):
                _remove(self._place)
            _unlock(self._file.path, self._lock)


def _lock(path: str) -> int:
    """Return the descriptor of the lock under which an index is built.

    Raises:
        IndexUnusable: Another process has it, or another thread.
    """
    place = f"{path}.lock"
    descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.fstat(descriptor)
        if _inode(place) != (status.st_dev, status.st_ino):  # who had it has just removed it
            raise BlockingIOError
    except BlockingIOError as error:
        os.close(descriptor)
        raise IndexUnusable("another process is building it") from error
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _unlock(path: str, descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.unlink(f"{path}.lock")
    os.close(descriptor)


def _remove(path: str) -> None:
    """Remove a database with what SQLite has beside it."""
    for name in (path, *_companions(path)):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _connect(path: str, mode: str, *, journal: str | None = None) -> sqlite3.Connection:
    # The lock of IndexFile keeps threads apart; the module's own check would bind a connection to one of them.
    connection = sqlite3.connect(
        f"file:{quote(path)}?mode={mode}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        timeout=BUSY_SECONDS,
        cached_statements=64,
    )
    try:
        for setting in _SETTINGS if journal is None else (*_SETTINGS, f"journal_mode={journal}", "synchronous=OFF"):
            connection.execute(f"PRAGMA {setting}")
    except BaseException:
        connection.close()
        raise
    return connection


def _inode(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _companions(path: str) -> tuple[str, str]:
    """Return the names that SQLite makes of a database's."""
    return f"{path}-wal", f"{path}-shm"
