"""Microsoft Agent Framework: one FileHistoryProvider, with one JSONL file a session."""

from __future__ import annotations

import warnings
from pathlib import Path

from agent_framework import FileHistoryProvider, Message

from .contestant import Contestant


class AgentFramework(Contestant):
    """`FileHistoryProvider(folder)` and `save_messages`, which reads the whole file each time."""

    durability = "no flush"

    def __init__(self, folder: Path, sessions: int) -> None:
        super().__init__(folder, sessions)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # that it is experimental
            self._provider = FileHistoryProvider(folder)

    async def append(self, session: int, role: str, text: str) -> None:
        """Save one message."""
        await self._provider.save_messages(f"session-{session}", [Message(role, [text])])

    async def count(self) -> int:
        """Count the messages of each session."""
        return sum([len(await self._provider.get_messages(f"session-{number}")) for number in range(self.sessions)])
