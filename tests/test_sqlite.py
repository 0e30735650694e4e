"""The SQLite backend: the contract, looked at with SQL, and what only it does."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from flatfile_chat_database.backends import sql
from flatfile_chat_database.backends.base import Capability, StorageBackend
from flatfile_chat_database.backends.rules import version_of
from flatfile_chat_database.backends.sqlite import SqliteBackend
from flatfile_chat_database.backends.tables import Tables
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.layout import Layout
from flatfile_chat_database.testing.contract import BackendContract

SCRIPT = Path(sql.__path__[0], "sqlite_0001.sql")
TABLES = Tables(Layout(StorageConfig()))


@pytest.mark.slow
class TestSqlite(BackendContract):
    """One file, looked at with SQL of the tests' own."""

    capabilities = frozenset(
        {Capability.PERSISTENT, Capability.PROCESSES, Capability.ATOMIC_APPEND, Capability.STREAMED_BLOBS}
    )

    @pytest.fixture(autouse=True)
    def medium(self, tmp_path: Path) -> None:
        self.path = tmp_path / "store" / "chats.sqlite3"

    def make_backend(self, config: StorageConfig) -> StorageBackend:
        return SqliteBackend(config, str(self.path))

    def _connect(self) -> sqlite3.Connection:
        fresh = not self.path.exists()
        self.path.parent.mkdir(exist_ok=True)
        connection = sqlite3.connect(self.path, isolation_level=None)
        if fresh:
            connection.executescript(SCRIPT.read_text("utf-8"))
            connection.executescript(f"PRAGMA application_id = {0x63686174}; PRAGMA user_version = 1;")
        return connection

    def peek(self, key: str) -> bytes | None:
        if not self.path.exists():
            return None
        connection = self._connect()
        try:
            found = connection.execute("SELECT place, pieces FROM entries WHERE key = ?", (key,)).fetchone()
            if found is None:
                return None
            if found[0] == "pieces":
                rows = connection.execute("SELECT data FROM pieces WHERE id = ? ORDER BY number", found[1:])
                return b"".join(data for (data,) in rows)
            spot = TABLES.log(key) if found[0] == "log" else TABLES.document(key)
            assert spot is not None
            where = " AND ".join(f"{name} = ?" for name in spot.table.ids)
            order = " ORDER BY position" if found[0] == "log" else ""
            rows = connection.execute(f"SELECT body FROM {spot.table.name} WHERE {where}{order}", spot.ids)
            end = b"\n" if found[0] == "log" else b""
            return b"".join(body.encode() + end for (body,) in rows)
        finally:
            connection.close()

    def poke(self, key: str, data: bytes) -> None:
        connection = self._connect()
        records = _records(data) if key.endswith(".jsonl") else None
        if records is None:
            cut = ((f"poked {key}", at, data[at : at + 100_000]) for at in range(0, len(data), 100_000))
            connection.executemany("INSERT INTO pieces VALUES (?, ?, ?)", cut)
            row = (key, "pieces", len(data), version_of(data), 0, f"poked {key}")
        else:
            lines = data.decode().split("\n")
            rows = [(*TABLES.log(key).ids, n, record["id"], lines[n]) for n, record in enumerate(records)]
            spot = TABLES.log(key)
            columns = ", ".join((*spot.table.ids, "position", "id", "body"))
            marks = ", ".join("?" * (len(spot.ids) + 3))
            connection.executemany(f"INSERT INTO {spot.table.name} ({columns}) VALUES ({marks})", rows)
            row = (key, "log", len(data), None, len(records), None)  # type: ignore[assignment]
        connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", row)
        connection.close()

    def peek_keys(self) -> list[str]:
        if not self.path.exists():
            return []
        connection = self._connect()
        try:
            return [key for (key,) in connection.execute("SELECT key FROM entries")]
        finally:
            connection.close()

    def is_untouched(self) -> bool:
        return not self.path.parent.exists()


def _records(data: bytes) -> list[dict[str, Any]] | None:
    """Return the messages of a log that has nothing else in it."""
    try:
        records = [json.loads(line) for line in data.splitlines()]
        whole = data.endswith(b"\n") and all(
            isinstance(record["id"], str) and record["id"] and record["role"] for record in records
        )
        return records if whole and len({record["id"] for record in records}) == len(records) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
