"""What a scenario asks of a way to store messages."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from ..corpus import ROLES

Texts = Sequence[Sequence[str]]
"""What is said in each session."""


class Contestant(ABC):
    """One long-lived object that stores the messages of some sessions.

    It is given a role and a text for each message and makes from them whatever it stores; that is part of the time.
    """

    def __init__(self, folder: Path, sessions: int) -> None:
        self.folder = folder
        self.sessions = sessions

    @property
    @abstractmethod
    def durability(self) -> str:
        """Say what has happened to a message when its append returns."""

    @abstractmethod
    async def append(self, session: int, role: str, text: str) -> None:
        """Append one message to a session."""

    async def append_all(self, texts: Texts) -> None:
        """Append to all sessions at once, each awaiting its own appends."""
        await asyncio.gather(*(self._append_each(session, texts[session]) for session in range(len(texts))))

    async def _append_each(self, session: int, texts: Sequence[str]) -> None:
        for number, text in enumerate(texts):
            await self.append(session, ROLES[number % 2], text)

    @abstractmethod
    async def count(self) -> int:
        """Return how many messages are stored, by reading them."""

    async def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Let go of what is open."""
