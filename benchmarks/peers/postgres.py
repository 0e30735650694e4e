"""psycopg by itself: one connection, an INSERT and a COMMIT for each message."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from pathlib import Path

import psycopg

from .contestant import Contestant

SCHEMA = """
CREATE TABLE messages (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    session integer NOT NULL, id text NOT NULL, role text NOT NULL, content text NOT NULL, body text NOT NULL
);
CREATE INDEX messages_of_session ON messages (session, number);
"""


class Raw(Contestant):
    """What somebody writes who needs no library."""

    def __init__(self, folder: Path, sessions: int, url: str) -> None:
        super().__init__(folder, sessions)
        self._connection = psycopg.connect(url)
        self._connection.execute(SCHEMA)
        self._connection.commit()

    @property
    def durability(self) -> str:
        """Say what the server does at a commit."""
        return durability(self._connection)

    async def append(self, session: int, role: str, text: str) -> None:
        """Add one row."""
        name, moment = str(uuid.uuid4()), datetime.now(UTC).isoformat()
        body = json.dumps({"id": name, "role": role, "content": text, "timestamp": moment})
        self._connection.execute(
            "INSERT INTO messages (session, id, role, content, body) VALUES (%s, %s, %s, %s, %s)",
            (session, name, role, text, body),
        )
        self._connection.commit()

    async def count(self) -> int:
        """Count the rows."""
        [count] = self._connection.execute("SELECT count(*) FROM messages").fetchall()
        return int(count[0])

    async def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def durability(connection: psycopg.Connection) -> str:
    """Say what the server of a connection does at a commit."""
    values = {}
    for name in ("fsync", "synchronous_commit"):
        [[values[name]]] = connection.execute(f"SHOW {name}").fetchall()
    flush = "each commit flushed" if set(values.values()) == {"on"} else "commits are not all flushed"
    return ", ".join(f"{name}={value}" for name, value in values.items()) + f": {flush}"
