"""The floor: what the operating system takes for the same bytes, without a library, asyncio or a check of anything."""

from __future__ import annotations

import os
from pathlib import Path

from flatfile_chat_database import Message
from flatfile_chat_database.codec import encode_message

from ..corpus import ROLES
from .contestant import Contestant, Texts


class SystemCalls(Contestant):
    """A line for each session to one journal, one flush of it, then each line to its own file; and again."""

    durability = "one flush a batch of one line for each session"

    def __init__(self, folder: Path, sessions: int) -> None:
        super().__init__(folder, sessions)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._journal = os.open(folder / "journal", flags, 0o600)
        self._logs = [os.open(folder / f"session-{number}.jsonl", flags, 0o600) for number in range(sessions)]
        self._batches: list[list[bytes]] = []

    def prepare(self, texts: Texts) -> None:
        """Make the bytes beforehand: they are no part of what system calls take."""
        self._batches = [
            [encode_message(Message(ROLES[number % 2], own[number])) for own in texts]
            for number in range(len(texts[0]))
        ]

    async def append(self, session: int, role: str, text: str) -> None:
        """Append one message by itself."""
        self._write([(self._logs[session], encode_message(Message(role, text)))])

    async def append_all(self, texts: Texts) -> None:
        """Write what was prepared."""
        for batch in self._batches:
            self._write(list(zip(self._logs, batch, strict=True)))

    def _write(self, batch: list[tuple[int, bytes]]) -> None:
        os.write(self._journal, b"".join([line for _, line in batch]))
        os.fdatasync(self._journal)
        for log, line in batch:
            os.write(log, line)

    async def count(self) -> int:
        """Count the lines of each file."""
        return sum(path.read_bytes().count(b"\n") for path in self.folder.glob("session-*.jsonl"))

    async def close(self) -> None:
        """Close the files."""
        for descriptor in (self._journal, *self._logs):
            os.close(descriptor)
