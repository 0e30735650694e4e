"""OpenAI Agents SDK: one SQLAlchemySession a conversation, all on one engine of asyncpg."""

from __future__ import annotations

from pathlib import Path

from agents.extensions.memory import SQLAlchemySession
from sqlalchemy.ext.asyncio import create_async_engine

from .contestant import Contestant


class OpenAISQLAlchemy(Contestant):
    """An engine that the application has already, as its documentation has it for production."""

    durability = "as the server's: each commit flushed"

    def __init__(self, folder: Path, sessions: int, url: str) -> None:
        super().__init__(folder, sessions)
        self._engine = create_async_engine(url.replace("postgresql:", "postgresql+asyncpg:", 1))
        self._sessions = [
            SQLAlchemySession(f"session-{number}", engine=self._engine, create_tables=True)
            for number in range(sessions)
        ]

    async def append(self, session: int, role: str, text: str) -> None:
        """Add one item."""
        await self._sessions[session].add_items([{"role": role, "content": text}])

    async def count(self) -> int:
        """Count the items of each session."""
        return sum([len(await session.get_items()) for session in self._sessions])

    async def close(self) -> None:
        """Close the engine."""
        await self._engine.dispose()
