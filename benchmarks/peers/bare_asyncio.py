"""What asyncio and the system calls of durable appends take without a store: nothing is checked, and nothing is safe.

It does for a message what the store cannot do without: a task that awaits each of its appends, the line of a message,
one flush in a thread for all that was handed over meanwhile, into room that was reserved, and one write for each file.
"""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from queue import Empty, SimpleQueue

from flatfile_chat_database import Message
from flatfile_chat_database.codec import encode_message

from .contestant import Contestant

Waiting = list[tuple[int, bytes, "asyncio.Future[None]"]]

_RESERVED = 1 << 20


class BareAsyncio(Contestant):
    """A thread that writes the lines of a turn to a journal, flushes it, and appends them to their files."""

    durability = "one flush for all that was handed over in a turn of the loop"

    def __init__(self, folder: Path, sessions: int) -> None:
        super().__init__(folder, sessions)
        flags = os.O_WRONLY | os.O_CREAT
        self._journal = os.open(folder / "journal", flags, 0o600)
        self._logs = [
            os.open(folder / f"session-{number}.jsonl", flags | os.O_APPEND, 0o600) for number in range(sessions)
        ]
        self._end = self._reserved = 0
        self._turn: Waiting = []
        self._queue: SimpleQueue[tuple[asyncio.AbstractEventLoop, Waiting] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
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

    def _work(self) -> None:
        while (batch := self._queue.get()) is not None:
            loop, waiting = batch
            try:
                while (more := self._queue.get_nowait()) is not None:
                    waiting += more[1]
                self._queue.put(None)
            except Empty:
                pass
            error: OSError | None = None
            try:
                self._write(waiting)
            except OSError as failed:
                error = failed
            loop.call_soon_threadsafe(_answer, waiting, error)

    def _write(self, waiting: Waiting) -> None:
        data = b"".join([line for _, line, _ in waiting])
        if self._end + len(data) > self._reserved:
            os.posix_fallocate(self._journal, self._reserved, len(data) + _RESERVED)
            self._reserved += len(data) + _RESERVED
        os.pwrite(self._journal, data, self._end)
        os.fdatasync(self._journal)
        self._end += len(data)
        own: dict[int, list[bytes]] = {}
        for session, line, _ in waiting:
            own.setdefault(session, []).append(line)
        for session, lines in own.items():
            os.write(self._logs[session], b"".join(lines))

    async def count(self) -> int:
        """Count the lines of each file."""
        return sum(path.read_bytes().count(b"\n") for path in self.folder.glob("session-*.jsonl"))

    async def close(self) -> None:
        """End the thread and close the files."""
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        for descriptor in (self._journal, *self._logs):
            os.close(descriptor)


def _answer(waiting: Waiting, error: OSError | None) -> None:
    for _, _, future in waiting:
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(None)
