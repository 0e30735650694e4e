"""Python's own `sqlite3` in WAL mode, one transaction a message: what a careful person writes by hand."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path

from flatfile_chat_database import Message
from flatfile_chat_database.codec import encode_message

from ..corpus import ROLES
from .contestant import Contestant, Texts

SCHEMA = """
CREATE TABLE messages (
    session_id TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (session_id, sequence)
) WITHOUT ROWID
"""
"""Clustered by session, so that a page is one range of one tree."""

INSERT = "INSERT INTO messages VALUES (?, ?, ?)"


def connect(path: Path, synchronous: str = "FULL") -> sqlite3.Connection:
    """Open a database in which each statement is a transaction of its own."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    return connection


class Raw(Contestant):
    """One connection in a plain loop, without asyncio: nothing of Python's is faster."""

    synchronous = "FULL"

    def __init__(self, folder: Path, sessions: int) -> None:
        super().__init__(folder, sessions)
        self._connection = connect(folder / "messages.db", self.synchronous)
        self._connection.execute(SCHEMA)
        self._names = [f"session-{number}" for number in range(sessions)]
        self._counts = [0] * sessions

    @property
    def durability(self) -> str:
        """Say what the database says."""
        (mode,) = self._connection.execute("PRAGMA journal_mode").fetchone()
        (level,) = self._connection.execute("PRAGMA synchronous").fetchone()
        flush = "each commit flushed" if level >= 2 else "flushed only now and then"
        return f"{mode.upper()}, synchronous={('OFF', 'NORMAL', 'FULL', 'EXTRA')[level]}, one transaction each: {flush}"

    def insert(self, session: int, role: str, text: str) -> None:
        """Insert one message, the same bytes as ours."""
        sequence = self._counts[session]
        self._counts[session] = sequence + 1
        body = encode_message(Message(role, text)).decode()
        self._connection.execute(INSERT, (self._names[session], sequence, body))

    async def append(self, session: int, role: str, text: str) -> None:
        """Insert one message."""
        self.insert(session, role, text)

    async def append_all(self, texts: Texts) -> None:
        """Insert the first message of every session, then the second …"""
        for number in range(len(texts[0])):
            for session, own in enumerate(texts):
                self.insert(session, ROLES[number % 2], own[number])

    async def count(self) -> int:
        """Count the rows."""
        (count,) = self._connection.execute("SELECT count(*) FROM messages").fetchone()
        return int(count)

    async def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class RawNormal(Raw):
    """The same, as fast as it gets with a promise: the newest messages may be lost with the power."""

    synchronous = "NORMAL"


class Threaded(Raw):
    """The same in an application of asyncio: each insert in the default executor, so that the loop goes on."""

    def __init__(self, folder: Path, sessions: int) -> None:
        super().__init__(folder, sessions)
        self._lock = threading.Lock()

    def insert(self, session: int, role: str, text: str) -> None:
        """Insert one message; one thread at a time, since they share the connection."""
        with self._lock:
            super().insert(session, role, text)

    async def append(self, session: int, role: str, text: str) -> None:
        """Insert one message in a thread."""
        await asyncio.to_thread(self.insert, session, role, text)

    async def append_all(self, texts: Texts) -> None:
        """Append to all sessions at once, each awaiting its own appends."""
        await Contestant.append_all(self, texts)
