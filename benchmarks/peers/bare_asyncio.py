"""The limit: asyncio and the system calls of a durable append, without a library and without a check of anything.

What it takes beside the floor is the price of a task for each session that awaits each of its appends, and of one
thread that writes. No store with this interface can be faster in this language; the messages it keeps are not safe.
"""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from queue import SimpleQueue

from flatfile_chat_database import Message
from flatfile_chat_database.codec import encode_message

from .contestant import Contestant

Waiting = list[tuple[int, bytes, "asyncio.Future[None]"]]


class BareAsyncio(Contestant):
    """A thread that writes the lines of one turn of the loop to a journal, flushes it, and appends each to its file."""

    durability = "one flush for all that was handed over in a turn of the loop"

    def __init__(self, folder: Path, sessions: int) -> None:
        super().__init__(folder, sessions)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._journal = os.open(folder / "journal", flags, 0o600)
        self._logs = [os.open(folder / f"session-{number}.jsonl", flags, 0o600) for number in range(sessions)]
        self._turn: Waiting = []
        self._queue: SimpleQueue[tuple[asyncio.AbstractEventLoop, Waiting] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    async def append(self, session: int, role: str, text: str) -> None:
        """Append one message."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        if not self._turn:
            loop.call_soon(self._hand_over, loop)
        self._turn.append((session, encode_message(Message(role, text)), future))
        await future

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        self._queue.put((loop, self._turn))
        self._turn = []

    def _write(self) -> None:
        while (batch := self._queue.get()) is not None:
            loop, waiting = batch
            os.write(self._journal, b"".join([line for _, line, _ in waiting]))
            os.fdatasync(self._journal)
            for session, line, _ in waiting:
                os.write(self._logs[session], line)
            loop.call_soon_threadsafe(_answer, waiting)

    async def count(self) -> int:
        """Count the lines of each file."""
        return sum(path.read_bytes().count(b"\n") for path in self.folder.glob("session-*.jsonl"))

    async def close(self) -> None:
        """End the thread and close the files."""
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        for descriptor in (self._journal, *self._logs):
            os.close(descriptor)


def _answer(waiting: Waiting) -> None:
    for _, _, future in waiting:
        future.set_result(None)
