"""What PostgreSQL's errors mean for a caller. No message has a password in it."""

from __future__ import annotations

import re

import psycopg
from psycopg import errors

from ...errors import ConfigurationError, IntegrityError, StorageError, UnavailableError, ValidationError

_ENDED = (errors.AdminShutdown, errors.CrashShutdown, errors.CannotConnectNow, errors.IdleInTransactionSessionTimeout)
_DAMAGE = (errors.UndefinedTable, errors.UndefinedColumn, errors.DatatypeMismatch, errors.IntegrityError)
_DENIED = re.compile(r"permission denied for (\w+)")
_PRIVILEGES = {
    "database": "CONNECT on the database",
    "schema": "USAGE and CREATE on the schema (USAGE is enough once the tables are there)",
    "table": "SELECT, INSERT, UPDATE and DELETE on all tables of the schema (SELECT is enough to read)",
}
_TABLE = re.compile(r"\b(?:FROM|JOIN|INTO|UPDATE|COPY) (\w+)")


def is_lost(error: psycopg.Error) -> bool:
    """Tell whether an error ends the connection, or comes from there being none any more."""
    if isinstance(error, _ENDED) or (error.sqlstate or "").startswith("08"):
        return True
    return isinstance(error, psycopg.OperationalError) and error.sqlstate is None


def told(error: psycopg.Error, place: str, statement: str = "") -> StorageError:
    """Return the error of the contract for what a statement failed with; `place` is what to call the database."""
    text = f"{place}: {_first_line(error)}"
    match error:
        case errors.DiskFull():
            return UnavailableError(f"{text} The server's disk is full.", hint="Free space there, then retry.")
        case errors.ReadOnlySqlTransaction():
            return UnavailableError(
                f"{text} The server takes no writes; it may be a replica.",
                hint="Name the primary; with several hosts add target_session_attrs=read-write to the URL.",
            )
        case errors.InsufficientPrivilege():
            return ConfigurationError(text, hint=f"Grant the user of the URL {_missing(text)}, or name another one.")
        case errors.LockNotAvailable():
            return UnavailableError(
                f"{text} Another writer held the store.", hint="Retry, or raise lock_timeout_seconds."
            )
        case errors.QueryCanceled():
            return UnavailableError(text, hint="Retry, or raise database_timeout_seconds.")
        case errors.ProgramLimitExceeded():
            return ValidationError(f"{text} A key or an id is too long for the database.", hint="Use shorter names.")
        case _ if isinstance(error, _DAMAGE):
            tables = ", ".join(sorted(set(_TABLE.findall(statement)))) or "unknown"
            return IntegrityError(
                f"{text} The table ({tables}) is not as this library made it.", hint="Restore it from a backup."
            )
        case errors.DataCorrupted() | errors.IndexCorrupted():
            return IntegrityError(f"{text} The database is damaged.", hint="Restore it from a backup.")
    if is_lost(error):
        return UnavailableError(f"{text} The connection to the server is lost.", hint="Retry when it is back.")
    return UnavailableError(text)


def not_connected(error: psycopg.Error, place: str, password: str | None) -> StorageError:
    """Return the error of the contract for a connection that was not made.

    What the server says of it has no code, so its words decide.
    """
    text = " ".join(str(error).split())
    if password:
        text = text.replace(password, "***")
    text = f"{place} cannot be connected to: {ended(text)}"
    if error.sqlstate == "28P01" or "password" in str(error) or "authentication" in str(error):
        return ConfigurationError(text, hint="Check the user and the password.")
    if "does not exist" in str(error) and "FATAL" in str(error):
        return ConfigurationError(text, hint="Make the database (createdb) or the user, or name another one.")
    if "no pg_hba.conf entry" in str(error):
        return ConfigurationError(text, hint="Have the server let this host and user in.")
    if "too many clients" in str(error) or "connection slots" in str(error):
        return UnavailableError(text, hint="Lower database_pool_size, or raise max_connections of the server.")
    if "server is not in" in str(error) or "server is in" in str(error) or "session is" in str(error):
        return UnavailableError(text, hint="None of the hosts is of the kind that the URL asks for.")
    return UnavailableError(text, hint="Check the host and the port, and whether the server runs.")


def _missing(text: str) -> str:
    """Return the privileges whose lack an error tells of."""
    found = _DENIED.search(text)
    return _PRIVILEGES.get(found[1], "the rights") if found else "the rights"


def _first_line(error: psycopg.Error) -> str:
    # Not the lines after it: they show values, and values are what people said.
    text = (error.diag.message_primary or str(error).partition("\n")[0]).strip()
    return ended(text)


def ended(text: str) -> str:
    """Return a sentence of somebody else's with a mark at its end."""
    return text if text.endswith((".", "?", "!")) else f"{text}."
