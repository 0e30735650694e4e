"""A store in one SQLite file, for whoever wants SQL on a single machine. The tables: `tables.py` and `sql/`."""

from __future__ import annotations

import copy
import ctypes
import math
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import resources
from typing import Any

from ..addresses import absolute
from ..config import StorageConfig
from ..errors import ConfigurationError, DurabilityError, IntegrityError, StorageError, UnavailableError
from .arriving import REPEATED, fits, preparing, transaction
from .contents import Contents
from .database import DatabaseBackend, fail
from .gathered import tell
from .lookout import TICK_SECONDS, Lookout, Watch
from .notes import note_after
from .rows import Repeated
from .staged import StagedRows, go_straight
from .states import Session
from .waking import Waking
from .writer import Job

MIGRATIONS = ("sqlite_0001.sql",)
"""In the order in which they are run; the number of those that were is the file's `user_version`."""

APPLICATION_ID = 0x63686174
"""Of the file format (https://www.sqlite.org/fileformat.html), so that a foreign database is not taken for a store."""

_CHECKPOINT_PAGES = 4000
"""Of the WAL, which are then put in their places: 16 MB, four times SQLite's own choice, for pages come again in it."""
_CACHE_KIB = 16_000
"""Of the connection that writes: messages that arrived, with their indexes, and the leaves that they are moved to."""

OLDEST = (3, 37, 0)
"""Version of SQLite: the first with tables that take no value of another type."""

_AGAIN_SECONDS = 0.01
"""After which a file that somebody holds is tried again."""
_ASKED_SECONDS = 0.02
"""How often SQLite is asked whether another connection wrote."""
_MOST_FAULTS = 100
_NOT_WRITTEN = ("SQLITE_FULL", "SQLITE_IOERR_WRITE")
"""Errors of a COMMIT whose last frame, which is what counts, cannot be in the WAL."""
_NOT_BEGUN = ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_PROTOCOL")
"""Errors of a statement that waited for others in vain."""
_BEFORE_COMMIT = (
    *_NOT_WRITTEN,
    "SQLITE_CANTOPEN",
    "SQLITE_CONSTRAINT",
    "SQLITE_CORRUPT",
    "SQLITE_ERROR",
    "SQLITE_MISMATCH",
    "SQLITE_NOTADB",
    "SQLITE_READONLY",
)
"""How errors begin that a statement which is a transaction has before its COMMIT, or where that was not written.

`SQLITE_CORRUPT` may come from the index of the WAL as well, behind the last frame; the next attempt writes over that.
"""
_CHECKED_SECONDS = 0.01
"""For which it is believed that the file is still the same."""
_CHANGED_TABLES = ("no such table", "no such column", "no such index", "table ", "malformed JSON", "cannot modify")
"""How errors begin that tell of tables which somebody has changed."""
_HINTS = {
    "BUSY": "Another program holds it.",
    "LOCKED": "Another program holds it.",
    "FULL": "Make room on the disk; nothing was changed.",
    "READONLY": "Its folder has to be writable, too.",
    "CANTOPEN": "Its folder has to be there and writable, for SQLite keeps two files beside it.",
}


class SqliteBackend(DatabaseBackend):
    """One file in WAL mode; each batch of writes is one transaction, flushed before it is acknowledged."""

    def __init__(self, config: StorageConfig, path: str) -> None:
        """Keep the store in the file at `path`."""
        super().__init__(config, beside_loop=True)
        self.path = absolute(path)
        self._file = File(self.path)
        self._lookout = DataVersion(self._waking, lambda: self._connect(to_write=False))

    def __repr__(self) -> str:
        return f"<SqliteBackend {self.path!r}{' closed' if self._closed else ''}>"

    def index_folder(self) -> str:
        return f"{self.path}-index"

    def _connect(self, *, to_write: bool) -> SqliteSession | None:
        if not to_write and not os.path.exists(self.path):
            self._file.check()
            return None
        session = SqliteSession(self._file, timeout=self.config.lock_timeout_seconds, to_write=to_write)
        if session.version:
            return session
        session.close()
        return None  # somebody makes it at this moment

    def contents(self, connection: Session) -> Contents:
        return Contents(connection, self._tables, StagedRows(connection, self._tables))

    def _run(self, jobs: Sequence[Job]) -> None:
        if not self._run_at_once(jobs):
            super()._run(jobs)

    def _run_at_once(self, jobs: Sequence[Job]) -> bool:
        """Do jobs of a few new messages each by one statement; return False, having done nothing, if that cannot be.

        A statement runs without Python's lock from its beginning until it is flushed, and the event loop goes on
        meanwhile. Behind each of several the writer would wait until the loop has nothing to do. Beside other processes
        that write it would wait for them in vain, find that they wrote, and wait again.
        """
        session, known = self._writing, self._known
        if not self._is_alone or known.note is None or not isinstance(session, SqliteSession):
            return False
        messages = known.fresh(jobs)
        if messages is None or not fits(messages) or go_straight(messages):
            return False
        note = note_after(known.note.number, known.note.bytes, {message.key for message in messages})
        if note.sweeps:
            return False
        try:
            is_done = session.run_transaction(*transaction(session.seen, messages, note))
        except StorageError as error:
            self._forget_and_roll_back()
            fail(jobs, error)
        except BaseException:
            self._forget_and_roll_back()
            raise
        else:
            if not is_done:
                return False
            known.wrote(messages, note)
            tell(jobs)
        self._count(jobs)
        return True


class DataVersion(Lookout):
    """Notices what other connections write: SQLite tells of it only when it is asked, which takes some microseconds."""

    def __init__(self, waking: Waking, connect: Callable[[], SqliteSession | None]) -> None:
        super().__init__(waking)
        self._connect = connect

    def look_out(self, watch: Watch) -> None:
        while self.goes_on(watch):
            session = None
            try:
                session = self._connect()
            except StorageError as error:  # readers have the same, and say so
                self.missed(watch, error)
            if session is not None:
                try:
                    self._ask(session, watch)
                except StorageError as error:
                    self.missed(watch, error)
                finally:
                    session.close()
            watch.ended.wait(TICK_SECONDS)

    def _ask(self, session: SqliteSession, watch: Watch) -> None:
        seen: object = None
        while self.goes_on(watch):
            [(version,)] = session.execute("PRAGMA data_version")
            if version != seen:  # also the first time: nothing was noticed before
                seen = version
                self.noticed(watch)
            watch.ended.wait(_ASKED_SECONDS)


class File:
    """The file of an open store: which one it is, and what was found wrong with it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fault: StorageError | None = None
        """Why nothing may be written any more."""
        self._identities: dict[str, tuple[int, int]] = {}

    def check(self, *, begins: bool = False) -> None:
        """Notice that the file, or the WAL beside it, is not the one that this store began with.

        Raises:
            UnavailableError: It was removed or replaced, so what is written to it is lost.
        """
        for path in (self.path, f"{self.path}-wal"):
            known = self._identities.get(path)
            if known is None and not begins:
                continue
            try:
                status = os.stat(path)
                found = (status.st_dev, status.st_ino)
            except FileNotFoundError:
                if known is None:
                    continue
                found = (-1, -1)
            except OSError as error:
                raise UnavailableError(f"{path}: {error.strerror}.") from error
            if found != self._identities.setdefault(path, found):
                raise UnavailableError(
                    f"{path} was removed or replaced while the store was open.",
                    hint="Put it back, or close the store and open it again.",
                )


_never_closed: list[sqlite3.Connection] = []
"""Connections to damaged files: closing the last one would write its WAL into the file."""


class SqliteSession:
    """A connection to the file; used by one thread at a time."""

    position_of = "instr"
    size_of_body = "length(CAST(body AS BLOB))"
    size_of_data = "length(data)"

    def __init__(self, file: File, *, timeout: float, to_write: bool) -> None:
        """Open the file; to write, make it and bring its tables up to date.

        Raises:
            ConfigurationError: It is no store, or one of a newer version.
            UnavailableError: It cannot be opened.
        """
        if sqlite3.sqlite_version_info < OLDEST:
            raise ConfigurationError(
                f"A store in SQLite needs SQLite {'.'.join(map(str, OLDEST))}; this is {sqlite3.sqlite_version}."
            )
        self._file = file
        self._path = path = file.path
        self.seen = -1
        """The number with which SQLite tells whether another connection has written, as of the last transaction."""
        self._checked = -math.inf
        self.version = 0
        """How many migrations the file has seen."""
        file.check()
        with self._mapped():
            if to_write:
                os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
                with suppress(FileExistsError):
                    # Never of a file that is there: to close it would end every lock of this process on it.
                    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            self._connection = sqlite3.connect(
                path, timeout=timeout, isolation_level=None, check_same_thread=False, cached_statements=256
            )
        try:
            with self._mapped():
                self._patiently(self._prepare if to_write else self._look, timeout)
            file.check(begins=self.version > 0)
        except BaseException:
            self.close()
            raise

    def _patiently(self, work: Callable[[], None], timeout: float) -> None:
        """Do work again while somebody holds the file, until the time is over.

        SQLite itself does not wait where a file that is not in WAL mode yet is being made one that is.
        """
        end = time.monotonic() + timeout
        while True:
            try:
                work()
                return
            except sqlite3.OperationalError as error:
                is_held = getattr(error, "sqlite_errorname", "").startswith("SQLITE_BUSY")
                if not is_held or time.monotonic() >= end:
                    raise
            self.roll_back()
            _wait()

    def _look(self) -> None:
        """Make ready to read."""
        self._connection.execute("PRAGMA query_only = ON")
        self._connection.execute("BEGIN")  # or the answers might be from before and after its making
        self.version = self._check()
        self._connection.execute("ROLLBACK")

    def _prepare(self) -> None:
        """Make ready to write."""
        connection = self._connection
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON")  # for a purge; without it what was removed stays in the file
        connection.execute("PRAGMA temp_store = MEMORY")  # of what a statement can be taken back with
        connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        connection.execute("BEGIN IMMEDIATE")
        try:
            self.version = len(MIGRATIONS)
            for number in range(self._check(), len(MIGRATIONS)):
                script = resources.files(__package__).joinpath("sql", MIGRATIONS[number]).read_text("utf-8")
                for statement in _statements(script):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {number + 1}")
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute("COMMIT")
        except BaseException:
            self.roll_back()
            raise
        for statement in _statements(preparing()):
            connection.execute(statement)

    def _check(self) -> int:
        """Return the number of migrations that the file has seen."""
        [(kind,)] = self._connection.execute("PRAGMA application_id").fetchall()
        [(version,)] = self._connection.execute("PRAGMA user_version").fetchall()
        [(tables,)] = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
        if kind != APPLICATION_ID and (tables or version):
            raise ConfigurationError(f"{self._path} is a database, but no chat store.", hint="Choose another file.")
        if version > len(MIGRATIONS):
            raise ConfigurationError(
                f"{self._path} has version {version} of the tables; this version knows {len(MIGRATIONS)}.",
                hint="Install a newer flatfile_chat_database.",
            )
        return int(version)

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._told(error) from error
        except OSError as error:
            raise UnavailableError(f"{self._path}: {error.strerror}.") from error

    # --- statements ----------------------------------------------------------------------------------

    def execute(self, statement: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        try:
            return self._connection.execute(statement, parameters).fetchall()
        except sqlite3.Error as error:
            if str(error) == REPEATED:
                raise Repeated from error
            raise self._told(error) from error

    def run_for(self, statement: str, rows: Iterable[Sequence[object]]) -> int:
        try:
            return max(0, self._connection.executemany(statement, rows).rowcount)
        except sqlite3.Error as error:
            raise self._told(error) from error

    def stream(self, statement: str, parameters: Sequence[object]) -> Iterator[tuple[Any, ...]]:
        try:
            for row in self._connection.execute(statement, parameters):  # noqa: UP028 - that closes the cursor, too late
                yield row
        except sqlite3.Error as error:
            raise self._told(error) from error

    def _told(self, error: sqlite3.Error) -> StorageError:
        """Return the error of the contract for one of SQLite's."""
        name, text = getattr(error, "sqlite_errorname", ""), str(error)
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or "not a database" in text:
            # What is written now might make it worse, and so might putting the WAL in its place. Whether it ever was a
            # file of SQLite cannot be told from a beginning that is damaged.
            self._file.fault = IntegrityError(
                f"{self._path} is damaged: {error}. Nothing more is written to it.",
                hint="If it was a store, close it, keep a copy of the file and of its -wal, and restore a backup; if "
                "it never was one, name another file.",
            )
            return copy.copy(self._file.fault)
        if text.startswith(_CHANGED_TABLES) or name.startswith(("SQLITE_CONSTRAINT", "SQLITE_MISMATCH")):
            return IntegrityError(
                f"{self._path} has not the tables of a chat store any more: {error}.", hint="Restore it from a backup."
            )
        if "decode to UTF-8" in text:
            return IntegrityError(f"{self._path} holds a text that is none: {error}.", hint="Restore it from a backup.")
        if os.path.isdir(self._path):
            return ConfigurationError(
                f"{self._path} is a folder, and a store of SQLite is a file.",
                hint=f"Name a file in it, as sqlite:{self._path}/chats.db; a store of files is file:{self._path}.",
            )
        return UnavailableError(
            f"{self._path}: {text.rstrip('.')}.", hint=_HINTS.get(name.partition("_")[2].partition("_")[0])
        )

    # --- transactions --------------------------------------------------------------------------------

    def begin_reading(self) -> None:
        self._file.check()
        self.execute("BEGIN")

    def begin_writing(self) -> bool:
        self._file.check()
        if self._file.fault is not None:
            raise copy.copy(self._file.fault)
        self.execute("BEGIN IMMEDIATE")
        [(seen,)] = self.execute("PRAGMA data_version")  # another number when another connection has written
        others, self.seen = bool(seen != self.seen), seen
        return others

    def run_transaction(self, statement: str, parameters: Sequence[object]) -> bool:
        """Run a statement that is a transaction of its own, durable when it ends.

        Returns:
            False if it changed nothing, for it met what has to be looked at more closely.

        Raises:
            UnavailableError: Somebody holds the file.
            DurabilityError: It is not known whether it is durable.
        """
        if self._file.fault is not None or self._connection.in_transaction:
            return False
        # Not before each: asking the system gives Python's lock away, and the loop may keep it for long.
        if time.monotonic() - self._checked > _CHECKED_SECONDS:
            self._file.check()
        try:
            self._connection.execute(statement, parameters)
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "")
            if name.startswith(_NOT_BEGUN):
                raise self._told(error) from error
            if name.startswith(_BEFORE_COMMIT):
                self.roll_back()
                return False
            raise self._unknown(error) from error
        except MemoryError as error:
            raise self._unknown(error) from error
        try:
            self._file.check()
        except UnavailableError as error:
            raise self._unknown(error) from error
        self._checked = time.monotonic()
        return True

    def commit(self) -> None:
        try:
            self._connection.execute("COMMIT")
            self._file.check()  # or it went into a file that nobody will find
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorname", "") in _NOT_WRITTEN:
                raise self._told(error) from error
            raise self._unknown(error) from error
        except UnavailableError as error:
            raise self._unknown(error) from error

    def _unknown(self, error: Exception) -> DurabilityError:
        """Return the error for a transaction of which nobody knows, and let no other begin."""
        self._file.fault = UnavailableError(
            f"{self._path} takes no more writes: an earlier one failed ({error}).",
            hint="Open the store again, and write anew what was in doubt.",
        )
        return DurabilityError(f"{DurabilityError.__doc__} ({error})")

    def roll_back(self) -> None:
        if self._connection.in_transaction:
            self.execute("ROLLBACK")

    def close(self) -> None:
        is_held_back = isinstance(self._file.fault, IntegrityError) and os.path.exists(f"{self._path}-wal")
        if not is_held_back:
            self._connection.close()
            return
        with suppress(sqlite3.Error):
            self._connection.rollback()
        _never_closed.append(self._connection)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))  # not even when the interpreter ends

    # --- maintenance ---------------------------------------------------------------------------------

    def faults(self) -> list[str]:
        """Return what SQLite finds wrong with the file."""
        return [text for (text,) in self.execute(f"PRAGMA integrity_check({_MOST_FAULTS})") if text != "ok"]


def _wait() -> None:
    time.sleep(_AGAIN_SECONDS)


def _statements(script: str) -> Iterator[str]:
    """Yield the statements of a script; each begins a line and ends one."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
