"""Commands and answers on a socket that the client has connected.

The client's own reading of an answer takes several times as long as the server does. What is read here is RESP as Redis
and Valkey speak it: https://redis.io/docs/latest/develop/reference/protocol-spec/.
"""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

_BUFFER = 65_536
"""Bytes to begin with."""
_LARGEST_BUFFER = 1_048_576
"""A larger one is not kept for the next answers."""
_DEEPEST = 8
_BULK = ord("$")


class Refused(ValueError):
    """The server answers with an error."""


class _Incomplete(Exception):
    """There is more to come."""


class Wire:
    """One conversation; used by one thread or task at a time."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)  # an event loop waits for it, or a thread as long as it wants
        self._socket = connected
        self._ready = select.poll()
        self._heard: list[Any] = []
        self._use(bytearray(_BUFFER))
        self._at = self._end = 0
        self._until = 0.0

    def ask(self, commands: Sequence[tuple[Any, ...]], seconds: float) -> list[Any]:
        """Send commands and return their answers, a `Refused` for one that the server refuses.

        Raises:
            OSError: It took longer, or the connection has ended.
            ValueError: It is no answer.
        """
        self._until = time.monotonic() + seconds
        unsent = memoryview(_message(commands))
        while unsent:
            unsent = unsent[self._patiently(self._socket.send, unsent, select.POLLOUT) :]
        while not self._hear(len(commands)):
            self._take_in(self._patiently(self._socket.recv_into, self._room(), select.POLLIN))
        return self._all_of_it()

    # --- in an event loop ----------------------------------------------------------------------------

    def say(self, commands: Sequence[tuple[Any, ...]]) -> bool:
        """Send commands without waiting; return False if not all went, and then this is of no more use."""
        message = _message(commands)
        try:
            return self._socket.send(message) == len(message)
        except OSError:  # that it would have to wait is one, too
            return False

    async def answers(self, count: int) -> list[Any]:
        """Wait for the answers to so many commands that were said; raises what `ask` raises."""
        loop = asyncio.get_running_loop()
        while not self._hear(count):
            self._take_in(await loop.sock_recv_into(self._socket, self._room()))
        return self._all_of_it()

    def answers_by_now(self, count: int) -> list[Any] | None:
        """Return them if they are there, without waiting."""
        with suppress(BlockingIOError):
            while not self._hear(count):
                self._take_in(self._socket.recv_into(self._room()))
            return self._all_of_it()
        return None

    # --- reading answers -----------------------------------------------------------------------------

    def _hear(self, count: int) -> bool:
        """Read what is there; return whether so many answers are."""
        while len(self._heard) < count:
            at = self._at
            try:
                self._heard.append(self._read())
            except _Incomplete:
                self._at = at
                return False
        return True

    def _all_of_it(self) -> list[Any]:
        if self._at != self._end:
            raise ValueError("the server says more than it was asked")
        heard, self._heard = self._heard, []
        self._at = self._end = 0
        if len(self._buffer) > _LARGEST_BUFFER:
            self._use(bytearray(_BUFFER))
        return heard

    def _use(self, buffer: bytearray) -> None:
        self._buffer = buffer
        self._view = memoryview(buffer)

    def _read(self, depth: int = 0) -> Any:
        start, end = self._line()
        if self._buffer[start] == _BULK:
            size = int(self._view[start + 1 : end])
            return None if size < 0 else self._bytes(size)
        kind, rest = self._buffer[start : start + 1], bytes(self._view[start + 1 : end])
        match kind:
            case b"*" | b"~" if depth < _DEEPEST:
                return None if rest == b"-1" else [self._read(depth + 1) for _ in range(int(rest))]
            case b":":
                return int(rest)
            case b"_":
                return None
            case b"=":
                return self._bytes(int(rest))
            case b"+":
                return rest
            case b"#":
                return rest == b"t"
            case b"-":
                return Refused(rest.decode(errors="replace"))
        raise ValueError("the server does not speak as Redis does")

    def _line(self) -> tuple[int, int]:
        """Go on to the next line; return where it starts and ends."""
        end = self._buffer.find(b"\r\n", self._at, self._end)
        if end < 0:
            raise _Incomplete
        start, self._at = self._at, end + 2
        return start, end

    def _bytes(self, count: int) -> bytes:
        start, end = self._at, self._at + count
        if self._end < end + 2:
            raise _Incomplete
        self._at = end + 2
        return bytes(self._view[start:end])

    # --- the socket ----------------------------------------------------------------------------------

    def _room(self) -> memoryview:
        """Return where the next bytes go: making room for each piece anew takes as long as receiving it."""
        if self._end == len(self._buffer):
            self._use(self._buffer + bytes(self._end))
        return self._view[self._end :]

    def _take_in(self, received: int) -> None:
        if not received:
            raise ConnectionError("the server has ended the connection")
        self._end += received

    def _patiently(self, work: Callable[[memoryview], int], data: memoryview, event: int) -> int:
        """Do work on the socket as soon as it does not have to wait, which it does for an event of it."""
        while True:
            left = self._until - time.monotonic()
            if left < 0:  # each piece may have come in time
                raise TimeoutError("the server does not answer in time")
            try:
                return work(data)
            except BlockingIOError:
                wanted = event
            except ssl.SSLWantReadError:
                wanted = select.POLLIN
            except ssl.SSLWantWriteError:
                wanted = select.POLLOUT
            self._ready.register(self._socket, wanted)
            self._ready.poll(left * 1000)


def _message(commands: Sequence[tuple[Any, ...]]) -> bytes:
    return b"".join(map(_packed, commands))


def _packed(words: tuple[Any, ...]) -> bytes:
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        data = word if isinstance(word, bytes) else str(word).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)
