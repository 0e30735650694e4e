"""LangChain: one FileChatMessageHistory, which is one JSON file, a conversation."""

from __future__ import annotations

import warnings
from pathlib import Path

from .contestant import Contestant

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # the package says that it is no longer looked after
    from langchain_community.chat_message_histories import FileChatMessageHistory
    from langchain_core.messages import AIMessage, HumanMessage


class LangChain(Contestant):
    """`FileChatMessageHistory(path)` and `aadd_messages`, which reads and writes the whole file each time."""

    durability = "no flush"

    def __init__(self, folder: Path, sessions: int) -> None:
        super().__init__(folder, sessions)
        self._histories = [FileChatMessageHistory(str(folder / f"session-{number}.json")) for number in range(sessions)]

    async def append(self, session: int, role: str, text: str) -> None:
        """Add one message."""
        message = HumanMessage(content=text) if role == "user" else AIMessage(content=text)
        await self._histories[session].aadd_messages([message])

    async def count(self) -> int:
        """Count the messages of each file."""
        return sum(len(history.messages) for history in self._histories)
