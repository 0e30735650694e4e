"""Commands and answers on a socket that the client has connected.

The client's own reading of an answer takes several times as long as the server does. What is read here is RESP as Redis
and Valkey speak it: https://redis.io/docs/latest/develop/reference/protocol-spec/.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Any

_BUFFER = 65_536
"""Bytes to begin with."""
_LARGEST_BUFFER = 1_048_576
"""A larger one is not kept for the next answers."""
_DEEPEST = 8
_BULK = ord("$")


class Refused(ValueError):
    """The server answers with an error."""


class Wire:
    """One conversation; used by one thread at a time."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._use(bytearray(_BUFFER))
        self._at = self._end = 0
        self._until = 0.0
        self._seconds: float | None = None

    def ask(self, commands: Sequence[tuple[Any, ...]], seconds: float) -> list[Any]:
        """Send commands and return their answers, a `Refused` for one that the server refuses.

        Raises:
            OSError: It took longer, or the connection has ended.
            ValueError: It is no answer.
        """
        self._until = time.monotonic() + seconds
        if seconds != self._seconds:
            self._socket.settimeout(seconds)
            self._seconds = seconds
        self._socket.sendall(b"".join(map(_packed, commands)))
        answers = [self._read() for _ in commands]
        if self._at != self._end:
            raise ValueError("the server says more than it was asked")
        self._at = self._end = 0
        if len(self._buffer) > _LARGEST_BUFFER:
            self._use(bytearray(_BUFFER))
        return answers

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
        while (end := self._buffer.find(b"\r\n", self._at, self._end)) < 0:
            self._receive()
        start, self._at = self._at, end + 2
        return start, end

    def _bytes(self, count: int) -> bytes:
        start, end = self._at, self._at + count
        while self._end < end + 2:
            self._receive()
        self._at = end + 2
        return bytes(self._view[start:end])

    def _receive(self) -> None:
        """Receive some bytes more."""
        if time.monotonic() > self._until:  # each piece may have come in time
            raise TimeoutError("the server does not answer in time")
        if self._end == len(self._buffer):
            self._use(self._buffer + bytes(self._end))
        # Into what is there: making room for each piece anew takes as long as receiving it.
        received = self._socket.recv_into(self._view[self._end :])
        if not received:
            raise ConnectionError("the server has ended the connection")
        self._end += received


def _packed(words: tuple[Any, ...]) -> bytes:
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        data = word if isinstance(word, bytes) else str(word).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)
