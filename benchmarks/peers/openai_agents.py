"""OpenAI Agents SDK: one SQLiteSession a conversation, all in one database file."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from agents import SQLiteSession

from .contestant import Contestant


class OpenAIAgents(Contestant):
    """`SQLiteSession("user_123", "conversations.db")` and `add_items`, as its documentation has it."""

    def __init__(self, folder: Path, sessions: int) -> None:
        super().__init__(folder, sessions)
        self._path = folder / "conversations.db"
        self._sessions = [SQLiteSession(f"session-{number}", self._path) for number in range(sessions)]

    @property
    def durability(self) -> str:
        """Say what a connection of its kind has: it sets WAL and leaves `synchronous` as it is."""
        connection = sqlite3.connect(self._path)
        (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
        (level,) = connection.execute("PRAGMA synchronous").fetchone()
        connection.close()
        flush = "each commit flushed" if level >= 2 else "flushed only now and then"
        return f"{mode.upper()}, synchronous={('OFF', 'NORMAL', 'FULL', 'EXTRA')[level]}: {flush}"

    async def append(self, session: int, role: str, text: str) -> None:
        """Add one item."""
        await self._sessions[session].add_items([{"role": role, "content": text}])

    async def count(self) -> int:
        """Count the items of each session."""
        return sum([len(await session.get_items()) for session in self._sessions])

    async def close(self) -> None:
        """Close the sessions."""
        for session in self._sessions:
            session.close()
