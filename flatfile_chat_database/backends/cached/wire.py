"""Commands and answers on a socket that the client has connected.

The client's own reading of an answer takes several times as long as the server does. What is read here is RESP as Redis
and Valkey speak it: https://redis.io/docs/latest/develop/reference/protocol-spec/.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Any

_RECEIVED = 262_144
_DEEPEST = 8


class Refused(ValueError):
    """The server answers with an error."""


class Wire:
    """One conversation; used by one thread at a time."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._buffer = bytearray()
        self._at = 0
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
        if self._at != len(self._buffer):
            raise ValueError("the server says more than it was asked")
        self._buffer.clear()
        self._at = 0
        return answers

    def _read(self, depth: int = 0) -> Any:
        line = self._line()
        kind, rest = line[:1], line[1:]
        match kind:
            case b"$" | b"=":
                return None if rest == b"-1" else self._bytes(int(rest))
            case b"*" | b"~" if depth < _DEEPEST:
                return None if rest == b"-1" else [self._read(depth + 1) for _ in range(int(rest))]
            case b"_":
                return None
            case b":":
                return int(rest)
            case b"+":
                return rest
            case b"#":
                return rest == b"t"
            case b"-":
                return Refused(rest.decode(errors="replace"))
        raise ValueError("the server does not speak as Redis does")

    def _line(self) -> bytes:
        end = self._buffer.find(b"\r\n", self._at)
        while end < 0:
            self._receive()
            end = self._buffer.find(b"\r\n", self._at)
        line = bytes(self._buffer[self._at : end])
        self._at = end + 2
        return line

    def _bytes(self, count: int) -> bytes:
        start, end = self._at, self._at + count
        while len(self._buffer) < end + 2:
            self._receive()
        self._at = end + 2
        with memoryview(self._buffer) as view:
            return bytes(view[start:end])

    def _receive(self) -> None:
        if time.monotonic() > self._until:  # each piece may have come in time
            raise TimeoutError("the server does not answer in time")
        received = self._socket.recv(_RECEIVED)
        if not received:
            raise ConnectionError("the server has ended the connection")
        self._buffer += received


def _packed(words: tuple[Any, ...]) -> bytes:
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        data = word if isinstance(word, bytes) else str(word).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)
