"""A connection to PostgreSQL with its transactions, made anew when the server went away meanwhile."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Any, TypeVar

import psycopg
from psycopg import errors, pq
from psycopg.errors import error_from_result

from ...errors import DurabilityError, StorageError, UnavailableError
from .faults import is_lost, not_connected, told
from .target import Target

T = TypeVar("T")

_AT_ONCE = 128
"""Rows of a stream that are fetched at once, at most: each may be a message of the largest size."""
_BYTES = 1 << 21
"""Of rows that are fetched at once, about."""

_LISTENERS = 0x63686174
"""First half of the key of a lock."""

_translated: dict[str, str] = {}


class Several(Exception):
    """Work that was to be one statement needs another one."""


class PostgresSession:
    """A connection; used by one thread at a time."""

    position_of = "strpos"
    size_of_body = "octet_length(body)"
    size_of_data = "octet_length(data)"

    def __init__(self, target: Target, *, to_write: bool) -> None:
        """Connect.

        Raises:
            ConfigurationError: The server does not let us in, or it cannot hold a store.
            UnavailableError: There is no server, or it refuses.
        """
        self._target = target
        self._to_write = to_write
        self._is_alone = self._has_asked = False
        self._cursors = count()
        self._error: StorageError | None = None  # that ended the transaction
        self._connection = self._connect()

    def _connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        target = self._target
        try:
            connection = psycopg.connect(**target.parameters, autocommit=True)
        except psycopg.Error as error:
            refused = not_connected(error, target.name, target.password)
        else:
            try:
                self.lock = target.prepare(connection, to_write=self._to_write)
            except psycopg.Error as error:
                connection.close()
                raise told(error, target.name) from error
            except BaseException:
                connection.close()
                raise
            return connection
        raise refused  # out of reach of psycopg's own error, which may repeat what the URL says

    @property
    def is_lost(self) -> bool:
        """Whether the server, or the way to it, went away."""
        return self._connection.closed

    def sees_store(self) -> bool:
        """Look whether there is a store by now; on a new connection if this one is lost."""
        if not self.is_lost:
            try:
                return self._target.look(self._connection)
            except psycopg.Error as error:
                found = self._told(error, "")
                if not self.is_lost:
                    raise found from error
        self._connection = self._connect()  # which looks
        return self._target.is_store

    def close(self) -> None:
        self._connection.close()

    def faults(self) -> list[str]:
        return []  # a server with checksums tells of damage by itself, when it reads

    # --- statements ----------------------------------------------------------------------------------

    def execute(self, statement: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        if self._is_alone:
            if self._has_asked:
                raise Several
            self._has_asked = True
        try:
            cursor = self._connection.execute(_translate(statement), parameters)
            return cursor.fetchall() if cursor.description else []
        except psycopg.Error as error:
            raise self._told(error, statement) from error

    def run_for(self, statement: str, rows: Iterable[Sequence[object]]) -> int:
        try:
            with self._connection.cursor() as cursor:
                if isinstance(rows, list) and len(rows) == 1:  # half the time of a pipeline
                    cursor.execute(_translate(statement), rows[0])
                else:
                    cursor.executemany(_translate(statement), rows)
                return max(0, cursor.rowcount)
        except psycopg.Error as error:
            raise self._told(error, statement) from error

    def stream(self, statement: str, parameters: Sequence[object]) -> Iterator[tuple[Any, ...]]:
        if self._is_alone:
            raise Several
        try:
            name = f"chatdb{next(self._cursors)}"  # several are read in turn
            with self._connection.cursor(name=name, scrollable=False) as cursor:
                cursor.execute(_translate(statement), parameters)
                wanted = 1
                while rows := cursor.fetchmany(wanted):
                    yield from rows
                    size = sum(len(value) for row in rows for value in row if isinstance(value, str | bytes))
                    wanted = max(1, min(4 * wanted, _AT_ONCE, _BYTES * len(rows) // (size + 1)))
        except psycopg.Error as error:
            raise self._told(error, statement) from error

    def copy(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> bool:
        """Add rows to a table in bulk; return False, and let the transaction fail, if one is there already."""

        def write(copy: psycopg.Copy) -> None:
            for row in rows:
                copy.write_row(row)

        return self._copy(table, columns, write)

    def copy_text(self, table: str, columns: Sequence[str], text: bytes) -> bool:
        """Do the same with rows that are written already as COPY reads them."""
        return self._copy(table, columns, lambda copy: copy.write(text))

    def _copy(self, table: str, columns: Sequence[str], write: Callable[[psycopg.Copy], None]) -> bool:
        statement = f"COPY {table} ({', '.join(columns)}) FROM STDIN"
        try:
            with self._connection.cursor() as cursor, cursor.copy(statement) as copy:
                write(copy)
        except errors.UniqueViolation as error:
            self._told(error, statement)
            return False
        except psycopg.Error as error:
            raise self._told(error, statement) from error
        return True

    def _told(self, error: psycopg.Error, statement: str) -> StorageError:
        found = told(error, self._target.name, statement)
        if is_lost(error):
            self._connection.close()
        if self._error is None or not isinstance(error, errors.InFailedSqlTransaction):
            self._error = found
        return found

    # --- notifications -------------------------------------------------------------------------------

    @property
    def channel(self) -> str:
        """What is notified of changes of this store; those of other schemas have other ones."""
        return f"chatdb_{self.lock}"

    @property
    def listeners(self) -> tuple[int, int]:
        """The lock that everybody who listens shares, so that whoever writes can tell whether anybody does."""
        return _LISTENERS, self.lock & 0x7FFFFFFF

    def listen(self) -> None:
        """Be notified of changes from now on, but for those of transactions that are under way."""
        self._connection.execute(f"LISTEN {self.channel}", prepare=False)
        self._connection.execute("SELECT pg_advisory_lock_shared(%s, %s)", self.listeners, prepare=False)

    def is_notified(self, seconds: float) -> bool:
        """Wait for a notification, or so long; return whether there was one.

        Raises:
            psycopg.Error: The connection is lost.
        """
        connection = self._connection.pgconn
        poll = select.poll()  # no limit on the number of a descriptor, as `select` has
        poll.register(connection.socket, select.POLLIN)
        if poll.poll(1000 * seconds):
            connection.consume_input()
        if connection.status != pq.ConnStatus.OK:
            raise psycopg.OperationalError("the connection is lost")
        found = False
        while connection.notifies() is not None:
            found = True
        return found

    # --- transactions --------------------------------------------------------------------------------

    def look(self, work: Callable[[], T], *, several: bool = False) -> T:
        """Do work that only reads, on one state of the store; it may be done several times.

        Most work is one statement. That needs no transaction, which would take three times as many trips to the
        server; only when it asks for a second one it is begun again, in a transaction. Work that is known to take
        `several` begins in one.
        """
        for is_last in (False, True):
            try:
                return self._look_once(work, several)
            except UnavailableError:
                if is_last or not self.is_lost:
                    raise
            finally:
                self._is_alone = False
            self._connection = self._connect()
        raise AssertionError  # the last one returned or raised

    def _look_once(self, work: Callable[[], T], several: bool) -> T:
        self._is_alone, self._has_asked = not several, False
        try:
            if not several:
                return work()
        except Several:
            self._is_alone = False
        self.begin_reading()
        return work()

    def begin_reading(self) -> None:
        self._begin("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")

    def begin_writing(self) -> bool:
        self._begin(f"BEGIN; SELECT pg_advisory_xact_lock({self.lock})")
        return True

    def begin_adding(self) -> bool:
        """Begin a transaction beside others of its kind, that adds messages to logs which it locks one by one."""
        self._begin(f"BEGIN; SELECT pg_advisory_xact_lock_shared({self.lock})")
        return True

    def _begin(self, statement: str) -> None:
        """Begin a transaction; on a new connection if this one is lost, as all are when the server was restarted."""
        self._error = None
        if not self.is_lost:
            try:
                self._connection.execute(statement, prepare=False)
                return
            except psycopg.Error as error:
                found = self._told(error, "")
                if not self.is_lost:
                    raise found from error
        self._connection = self._connect()
        self._error = None
        try:
            self._connection.execute(statement, prepare=False)
        except psycopg.Error as error:
            raise self._told(error, "") from error

    def commit(self) -> None:
        warnings: list[str] = []

        def note(diagnostic: psycopg.errors.Diagnostic) -> None:
            if diagnostic.severity_nonlocalized == "WARNING":
                warnings.append(diagnostic.message_primary or "")

        if self.is_lost:  # it was lost before, so nothing of it is there
            raise self._error or UnavailableError(f"{self._target.name}: The connection to the server is lost.")
        self._connection.add_notice_handler(note)
        try:
            result = self._send_commit()
        except psycopg.Error as error:
            self._connection.close()
            raise self._unknown("the connection is lost") from error
        finally:
            self._connection.remove_notice_handler(note)
        if result is None:
            self._connection.close()
            raise self._unknown("the server did not answer in time; see database_timeout_seconds")
        if result.status == pq.ExecStatus.COMMAND_OK and result.command_status == b"COMMIT":
            if warnings:  # it is on this server, but a standby that was to have it may not have it
                raise self._unknown("; ".join(warnings))
            return
        if result.status == pq.ExecStatus.COMMAND_OK:  # ROLLBACK: an error had ended the transaction already
            raise self._error or UnavailableError(f"{self._target.name}: The transaction was rolled back.")
        refused = error_from_result(result)
        if is_lost(refused):
            self._connection.close()
            raise self._unknown(f"the server ended: {refused.sqlstate}")
        raise self._told(refused, "")  # the server says that it did not

    def _send_commit(self) -> pq.abc.PGresult | None:
        """Say COMMIT; return what the server answers, or None if it does not, even when it is told to give up.

        It may wait for a standby, and PostgreSQL's own limits do not apply to that.
        """
        connection = self._connection.pgconn
        connection.send_query(b"COMMIT")
        connection.flush()  # a few bytes to a connection that has nothing else to say
        poll = select.poll()  # no limit on the number of a descriptor, as `select` has
        poll.register(connection.socket, select.POLLIN)
        seconds = self._target.commit_seconds
        for is_last in (False, True):
            end = None if seconds is None else time.monotonic() + seconds
            while True:
                left = None if end is None else 1000 * (end - time.monotonic())
                if connection.is_busy() and (left is None or left > 0) and poll.poll(left):
                    connection.consume_input()
                if not connection.is_busy():
                    result = connection.get_result()
                    while connection.get_result() is not None:
                        pass
                    return result
                if left is not None and left <= 0:
                    break
            if not is_last:
                self._connection.cancel_safe(timeout=5)
        return None

    def _unknown(self, why: str) -> DurabilityError:
        return DurabilityError(f"{DurabilityError.__doc__} ({self._target.name}: {why})")

    def roll_back(self) -> None:
        connection = self._connection
        if connection.closed or connection.info.transaction_status == pq.TransactionStatus.IDLE:
            return
        try:
            connection.execute("ROLLBACK", prepare=False)
        except psycopg.Error as error:
            connection.close()
            if not is_lost(error):
                raise self._told(error, "") from error


def _translate(statement: str) -> Any:
    """Return a statement with psycopg's placeholders in the place of `?`."""
    found = _translated.get(statement)
    if found is None:
        if len(_translated) >= 1024:
            _translated.clear()
        found = _translated[statement] = statement.replace("%", "%%").replace("?", "%s")
    return found
