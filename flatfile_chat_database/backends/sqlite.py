"""A store in one SQLite file, for whoever wants SQL on a single machine. The tables: `tables.py` and `sql/`."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import Any

from ..config import StorageConfig, absolute
from ..errors import ConfigurationError, DurabilityError, IntegrityError, StorageError, UnavailableError
from .contents import Contents
from .database import DatabaseBackend
from .staged import StagedRows
from .states import Session

MIGRATIONS = ("sqlite_0001.sql",)
"""In the order in which they are run; the number of those that were is the file's `user_version`."""

APPLICATION_ID = 0x63686174
"""Of the file format (https://www.sqlite.org/fileformat.html), so that a foreign database is not taken for a store."""

_CHECKPOINT_PAGES = 4000
"""Of the WAL, which are then put in their places: 16 MB, four times SQLite's own choice, for pages come again in it."""
_CACHE_KIB = 16_000
"""Of the connection that writes: messages that arrived, with their indexes, and the leaves that they are moved to."""


class SqliteBackend(DatabaseBackend):
    """One file in WAL mode; each batch of writes is one transaction, flushed before it is acknowledged."""

    def __init__(self, config: StorageConfig, path: str) -> None:
        """Keep the store in the file at `path`."""
        super().__init__(config)
        self.path = absolute(path)

    def __repr__(self) -> str:
        return f"<SqliteBackend {self.path!r}{' closed' if self._closed else ''}>"

    def index_folder(self) -> str:
        return f"{self.path}-index"

    def _connect(self, *, to_write: bool) -> SqliteSession | None:
        if not to_write and not os.path.exists(self.path):
            return None
        session = SqliteSession(self.path, timeout=self.config.lock_timeout_seconds, to_write=to_write)
        if session.version:
            return session
        session.close()
        return None  # somebody makes it at this moment

    def contents(self, connection: Session) -> Contents:
        return Contents(connection, self._tables, StagedRows(connection, self._tables))


class SqliteSession:
    """A connection to the file; used by one thread at a time."""

    position_of = "instr"
    size_of_body = "length(CAST(body AS BLOB))"

    def __init__(self, path: str, *, timeout: float, to_write: bool) -> None:
        """Open the file; to write, make it and bring its tables up to date.

        Raises:
            ConfigurationError: It is no store, or one of a newer version.
            UnavailableError: It cannot be opened.
        """
        self._path = path
        self._seen = -1
        self.version = 0
        """How many migrations the file has seen."""
        with self._mapped():
            if to_write:
                os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._connection = sqlite3.connect(
                path, timeout=timeout, isolation_level=None, check_same_thread=False, cached_statements=256
            )
        try:
            with self._mapped():
                if to_write:
                    self._prepare()
                else:
                    self._connection.execute("PRAGMA query_only = ON")
                    self._connection.execute("BEGIN")  # or the answers might be from before and after its making
                    self.version = self._check()
                    self._connection.execute("ROLLBACK")
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        connection = self._connection
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
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
            raise self._told(error) from error

    def change(self, statement: str, parameters: Sequence[object]) -> int:
        try:
            return self._connection.execute(statement, parameters).rowcount
        except sqlite3.Error as error:
            raise self._told(error) from error

    def run_for(self, statement: str, rows: Iterable[Sequence[object]]) -> int:
        try:
            return max(0, self._connection.executemany(statement, rows).rowcount)
        except sqlite3.Error as error:
            raise self._told(error) from error

    def stream(self, statement: str, parameters: Sequence[object]) -> Iterator[tuple[Any, ...]]:
        try:
            yield from self._connection.execute(statement, parameters)
        except sqlite3.Error as error:
            raise self._told(error) from error

    def _told(self, error: sqlite3.Error) -> StorageError:
        """Return the error of the contract for one of SQLite's."""
        if getattr(error, "sqlite_errorname", "").startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            return IntegrityError(f"{self._path} is damaged: {error}.", hint="Restore it from a backup.")
        hint = "Another program holds it." if "locked" in str(error) else None
        return UnavailableError(f"{self._path}: {error}.", hint=hint)

    # --- transactions --------------------------------------------------------------------------------

    def begin_reading(self) -> None:
        self.execute("BEGIN")

    def begin_writing(self) -> bool:
        self.execute("BEGIN IMMEDIATE")
        [(seen,)] = self.execute("PRAGMA data_version")  # another number when another connection has written
        others, self._seen = bool(seen != self._seen), seen
        return others

    def commit(self) -> None:
        try:
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise DurabilityError(f"{DurabilityError.__doc__} ({error})") from error

    def roll_back(self) -> None:
        if self._connection.in_transaction:
            self.execute("ROLLBACK")

    def close(self) -> None:
        self._connection.close()


def _statements(script: str) -> Iterator[str]:
    """Yield the statements of a script; each begins a line and ends one."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
