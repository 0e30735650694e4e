"""Where a store in PostgreSQL is: a database and a schema of it, and what is set in every session there."""

from __future__ import annotations

import logging
import re
from importlib import resources
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from ...addresses import without_password
from ...config import StorageConfig
from ...errors import ConfigurationError, IntegrityError
from .. import sql as scripts

logger = logging.getLogger("flatfile_chat_database")

MIGRATIONS = ("postgres_0001.sql",)
"""In the order in which they are run; the number of those that were is the `version` in the table `chat_store`."""

MADE_BY = "flatfile_chat_database"
"""In the table `chat_store`, so that tables of somebody else are not taken for a store."""

warned: set[str] = set()
"""Databases of whose server it was said already that it does not flush."""

_LOCK = 0x63686174 << 32
"""Advisory locks of stores are this and the number of the schema."""
_STREAM_SECONDS = 3600
"""So long a stream may wait for its reader, with a transaction open."""
_TABLE = re.compile(r"^CREATE TABLE (\w+) \((.*?)^\)", re.MULTILINE | re.DOTALL)
_OF_MESSAGES = re.compile(r"^CREATE TABLE (messages|panel_messages) \(\s+(\w+) .*?^\);", re.MULTILINE | re.DOTALL)
"""The tables of messages, with their first column: the owner, with which each of their keys begins."""
_COLUMN = re.compile(r"^    ([a-z_]+) [A-Z]", re.MULTILINE)

Connection = psycopg.Connection[tuple[Any, ...]]


class Target:
    """A database and a schema of it."""

    def __init__(self, config: StorageConfig) -> None:
        """Read the URL; do no I/O.

        Raises:
            ConfigurationError: It is none that PostgreSQL understands.
        """
        self._config = config
        self.name = without_password(config.storage_url)
        """What to call it in messages."""
        self.parameters = _parameters(config, self.name)
        self.password: str | None = self.parameters.get("password")
        self.commit_seconds = config.database_timeout_seconds or None
        """How long a COMMIT may take; the server has no limit for that itself. None: as long as it likes."""
        self.is_store = False
        """Whether there is a store, as far as is known; it never goes away again."""

    def prepare(self, connection: Connection, *, to_write: bool) -> int:
        """Make a new connection ready; to write, make the tables or bring them up to date. Return the store's lock.

        Raises:
            ConfigurationError: The database cannot hold a store, or holds something else.
            IntegrityError: A table is not as it was made.
        """
        config = self._config
        # A writer whose node is gone must not keep the others waiting for longer than they wait.
        patience = config.lock_timeout_seconds / 2 if to_write else _STREAM_SECONDS
        [(schema, number, encoding, flushes, synchronous, *_)] = connection.execute(
            """
            SELECT current_schema(), (SELECT oid FROM pg_namespace WHERE nspname = current_schema()),
                current_setting('server_encoding'), current_setting('fsync'), current_setting('synchronous_commit'),
                set_config('statement_timeout', %s, false), set_config('lock_timeout', %s, false),
                set_config('idle_in_transaction_session_timeout', %s, false),
                set_config('default_transaction_read_only', %s, false),
                set_config('default_transaction_isolation', 'read committed', false),
                set_config('enable_incremental_sort', 'off', false)
            """,
            (
                _milliseconds(config.database_timeout_seconds),
                _milliseconds(config.lock_timeout_seconds or 0.001),
                _milliseconds(max(1, patience)),
                "off" if to_write else "on",
            ),
        )
        if schema is None:
            raise ConfigurationError(f"{self.name}: no schema of the search_path exists.", hint="CREATE SCHEMA it.")
        if encoding != "UTF8":
            raise ConfigurationError(
                f"{self.name}: the database's encoding is {encoding}.", hint="Make one with ENCODING 'UTF8'."
            )
        if flushes == "off" and self.name not in warned:
            warned.add(self.name)
            logger.warning("%s: the server runs with fsync off; a power failure there can damage the store", self.name)
        if to_write:
            if config.durability != "full":
                connection.execute("SET synchronous_commit = off")
            elif synchronous == "off":
                connection.execute("SET synchronous_commit = on")
        lock = _LOCK | int(number)
        if to_write:
            self._migrate(connection, lock)
        elif not self.is_store:
            self.look(connection)
        return lock

    # --- tables --------------------------------------------------------------------------------------

    def look(self, connection: Connection) -> bool:
        """Look whether there is a store now, and tell."""
        self.is_store = self._version(connection) > 0
        return self.is_store

    def _migrate(self, connection: Connection, lock: int) -> None:
        if self.is_store:
            return
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (lock,))
            version = self._version(connection)
            for number in range(version, len(MIGRATIONS)):
                script = _script(number)
                connection.execute(_partitioned(script, self._config.database_partitions) if not number else script)
            if not version:
                connection.execute("INSERT INTO chat_store VALUES (%s, %s)", (len(MIGRATIONS), MADE_BY))
            elif version < len(MIGRATIONS):
                connection.execute("UPDATE chat_store SET version = %s", (len(MIGRATIONS),))
        self.is_store = True

    def _version(self, connection: Connection) -> int:
        """Return how many migrations the store has seen; 0 if there is none."""
        there: dict[str, set[str]] = {}
        for table, column in connection.execute(
            """
            SELECT relname, attname FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid
            WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema())
                AND relkind IN ('r', 'p', 'v', 'm', 'f') AND attnum > 0 AND NOT attisdropped
            """
        ):
            there.setdefault(table, set()).add(column)
        ours = _tables()
        marker = there.get("chat_store", set())
        if not marker >= ours["chat_store"]:
            taken = sorted(ours.keys() & there.keys())
            if taken:
                raise ConfigurationError(
                    f"{self.name} has a table {taken[0]!r}, but is no chat store.",
                    hint="Choose another database, or another schema with ?options=-csearch_path%3Dname.",
                )
            return 0
        rows = connection.execute("SELECT version, made_by FROM chat_store").fetchall()
        if len(rows) != 1 or rows[0][1] != MADE_BY:
            raise ConfigurationError(
                f"{self.name} has a table 'chat_store' of somebody else.", hint="Choose another database or schema."
            )
        version = int(rows[0][0])
        if version > len(MIGRATIONS):
            raise ConfigurationError(
                f"{self.name} has version {version} of the tables; this version knows {len(MIGRATIONS)}.",
                hint="Install a newer flatfile_chat_database.",
            )
        if version == len(MIGRATIONS):
            for table, columns in ours.items():
                missing = sorted(columns - there.get(table, set()))
                if missing:
                    raise IntegrityError(
                        f"{self.name}: the table {table!r} lacks {', '.join(missing)}.",
                        hint="Restore it from a backup.",
                    )
        return version


def _script(number: int) -> str:
    return resources.files(scripts).joinpath(MIGRATIONS[number]).read_text("utf-8")


def _partitioned(script: str, partitions: int) -> str:
    """Return the script that makes the tables, with those of messages in partitions by a hash of their owner."""
    if not partitions:
        return script

    def parted(made: re.Match[str]) -> str:
        table, owner = made[1], made[2]
        parts = "".join(
            f"\nCREATE TABLE {table}_{number} PARTITION OF {table} "
            f"FOR VALUES WITH (MODULUS {partitions}, REMAINDER {number});"
            for number in range(partitions)
        )
        return f"{made[0][:-1]} PARTITION BY HASH ({owner});{parts}"

    return _OF_MESSAGES.sub(parted, script)


def _tables() -> dict[str, set[str]]:
    """Return the columns of each table that the scripts make."""
    made: dict[str, set[str]] = {}
    for number in range(len(MIGRATIONS)):
        for table, columns in _TABLE.findall(_script(number)):
            made[table] = set(_COLUMN.findall(columns))
    return made


def _refuse_unescaped(url: str) -> None:
    """Refuse a URL in which a password would be taken for something else, and then be shown as that.

    PostgreSQL's own reading of it ends a password at its first `@`, and sooner at `/` or `?`.
    """
    authority, _, rest = url.partition("://")[2].partition("?")[0].partition("/")
    hosts = authority.rpartition("@")[2] if authority.count("@") < 2 else authority
    # Of an address in brackets only what follows them can be a port.
    ports = [host.rpartition("]")[2].partition(":")[2] for host in hosts.split(",")]
    if "@" in hosts or "@" in rest or not all(re.fullmatch("[0-9]*", port) for port in ports):
        raise ConfigurationError(
            "storage_url is no URL that PostgreSQL understands: behind the user, host and port it goes on otherwise.",
            hint="Write postgresql://user:password@host:port/database, and percent-encode what is special in names and "
            "passwords: @ is %40, / is %2F, : is %3A, ? is %3F, # is %23, % is %25.",
        )


def _parameters(config: StorageConfig, name: str) -> dict[str, Any]:
    problem = None
    _refuse_unescaped(config.storage_url)
    try:
        given: dict[str, Any] = dict(conninfo_to_dict(config.storage_url))
    except psycopg.Error as error:
        # Its text may quote the password, so only the name of a parameter is taken out of it.
        found = re.search(r'URI query parameter: "(\w+)"', str(error))
        is_name = found is not None and "@" not in config.storage_url.partition("?")[2]  # or of a password
        problem = f" There is no parameter {found[1]!r}." if found is not None and is_name else ""
    if problem is not None:
        raise ConfigurationError(
            f"storage_url is no URL that PostgreSQL understands: {name}.{problem}",
            hint="Write postgresql://user@host/database, and percent-encode what is special in names and passwords.",
        )
    limit = config.database_connect_timeout_seconds
    silence = max(1, round(config.database_timeout_seconds)) if config.database_timeout_seconds else 0
    ours = {
        "client_encoding": "utf8",
        "application_name": "chatdb",
        "connect_timeout": max(2, round(limit)) if limit else 0,
    }
    if silence:  # a server that is gone without a word is noticed as soon as one that is slow
        ours |= {
            "keepalives_idle": max(1, silence // 2),
            "keepalives_interval": max(1, silence // 6),
            "keepalives_count": 3,
            "tcp_user_timeout": 1000 * silence,
        }
    return ours | given | {"client_encoding": "utf8"}


def _milliseconds(seconds: float) -> str:
    return f"{max(1, min(round(1000 * seconds), 2**31 - 1)) if seconds else 0}ms"
