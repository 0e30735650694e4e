"""Google's Agent Development Kit: a DatabaseSessionService, one session of it a conversation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.adk.events import Event
from google.adk.sessions import DatabaseSessionService
from google.genai.types import Content, Part

from .contestant import Contestant

APP, USER = "benchmark", "user"


class GoogleADK(Contestant):
    """`append_event` on a session that the service made, as its documentation has it."""

    durability = "as the server's: each commit flushed"

    def __init__(self, folder: Path, sessions: int, url: str) -> None:
        super().__init__(folder, sessions)
        self._service = DatabaseSessionService(db_url=url.replace("postgresql:", "postgresql+asyncpg:", 1))
        self._open: dict[int, Any] = {}

    async def append(self, session: int, role: str, text: str) -> None:
        """Add one event."""
        opened = self._open.get(session)
        if opened is None:
            opened = self._open[session] = await self._service.create_session(
                app_name=APP, user_id=USER, session_id=f"session-{session}"
            )
        author = "user" if role == "user" else "model"
        await self._service.append_event(
            opened, Event(author=author, content=Content(role=author, parts=[Part(text=text)]))
        )

    async def count(self) -> int:
        """Count the events of each session."""
        count = 0
        for session in self._open:
            stored = await self._service.get_session(app_name=APP, user_id=USER, session_id=f"session-{session}")
            count += len(stored.events) if stored is not None else 0
        return count

    async def close(self) -> None:
        """Close the engine."""
        await self._service.close()
