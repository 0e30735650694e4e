"""The server of a cache, Redis or Valkey: connections for threads, and for how long it is left alone when it fails."""

from __future__ import annotations

import hashlib
import inspect
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import redis
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, Connection, parse_url
from redis.retry import Retry

from ...config import without_password
from ...errors import ConfigurationError
from ..base import logger
from .entries import SCRIPTS
from .wire import Refused, Wire

T = TypeVar("T")

FORMS = "redis://host:6379/0, rediss://host:6379/0 or unix:///path/to/socket"
"""How the URL of a cache is written."""

_CONNECT_SECONDS = 1.0
_PAUSE_SECONDS = (0.1, 5.0)
"""For which a server that has failed is left alone: at first, and at most."""
_SILENT_SECONDS = 60.0
"""In which it is not said again that it fails."""
_NAMELESS: dict[str, Any] = dict.fromkeys(
    ["driver_info"]
    if "driver_info" in inspect.signature(AbstractConnection).parameters
    else ["lib_name", "lib_version"]
)
"""The client does not tell the server its name: it would look for its version on the disk, and ask twice more."""
_HASHES = {script: hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest() for script in SCRIPTS}


class Unusable(Exception):
    """The cache cannot be used now; the store can."""


class Line:
    """A connection to one run of a server; used by one thread at a time."""

    def __init__(self, connection: Any, run: str) -> None:
        self._connection = connection
        self._wire = Wire(connection._sock)
        self.run = run

    def call(self, script: str, keys: list[str], arguments: list[Any], seconds: float) -> Any:
        """Run a script and return its answer, within so many seconds."""
        [answer] = self._wire.ask([("EVALSHA", _HASHES[script], len(keys), *keys, *arguments)], seconds)
        if isinstance(answer, Refused):
            raise answer
        return answer

    def ask(self, commands: Sequence[tuple[Any, ...]], seconds: float) -> list[Any]:
        """Send commands and return their answers, likewise; None for one that does not suit what is there."""
        answers = self._wire.ask(commands, seconds)
        return [None if isinstance(answer, Refused) else answer for answer in answers]

    def close(self) -> None:
        """End it."""
        self._connection.disconnect()


class Server:
    """A server by its URL. Every method blocks but the properties; it may be used by several threads."""

    def __init__(self, url: str, seconds: float) -> None:
        """Prepare for a server; connect to nothing yet.

        Raises:
            ConfigurationError: It is no URL of one.
        """
        self._seconds = seconds
        self._shown = without_password(url)
        try:
            self._settings = dict(cast("Any", parse_url)(url))
            self._settings |= {
                "protocol": 3,
                "decode_responses": False,
                "retry": Retry(NoBackoff(), 0),  # the client's own retries take seconds
                "socket_connect_timeout": _CONNECT_SECONDS,
                "socket_timeout": _CONNECT_SECONDS,
                "health_check_interval": 0,
                **_NAMELESS,
            }
            self._kind: Any = self._settings.pop("connection_class", Connection)
            self._kind(**self._settings)  # connects to nothing, but looks at what it was given
        except (ValueError, TypeError, redis.RedisError):
            raise ConfigurationError(
                f"The URL of the cache cannot be understood: {self._shown!r}.", hint=f"Write {FORMS}."
            ) from None  # its words may have the password in them
        self._free: deque[Line] = deque()
        self._state = threading.Lock()
        self._pause = _PAUSE_SECONDS[0]
        self._again = 0.0
        self._trying = False
        self._silent_until = 0.0
        self._problem = ""
        self.run = ""
        """The run that was last connected to; "" if none was, or it has failed since."""

    def __repr__(self) -> str:
        return f"<Server {self._shown!r}>"

    @property
    def is_up(self) -> bool:
        """Whether it is worth a try."""
        return not self._problem or (not self._trying and time.monotonic() >= self._again)

    @property
    def problem(self) -> str:
        """Why it is left alone; "" if it is not."""
        return self._problem

    def call(self, run: str, script: str, keys: list[str], arguments: list[Any], seconds: float | None = None) -> Any:
        """Run a script on a run of the server, and return its answer.

        Raises:
            Unusable: It did not answer in time, is out of reach, or is another run by now.
        """
        patience = self._seconds if seconds is None else seconds
        return self._with(run, lambda line: line.call(script, keys, arguments, patience))

    def ask(self, run: str, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Send commands to a run of the server, and return their answers; None for one that does not suit.

        Raises:
            Unusable: As `call` does.
        """
        return self._with(run, lambda line: line.ask(commands, self._seconds))

    def _with(self, run: str, work: Callable[[Line], T]) -> T:
        with self._state:
            if self._problem:
                if not self.is_up:
                    raise Unusable(self._problem)
                self._trying = True  # the others wait for what comes of it
        line = None
        try:
            line = self._take(run)
            if line.run != run:
                raise Unusable("the server has been started again, or is another one")
            answer = work(line)
        except Unusable:
            self._works(line)
            raise
        except Exception as error:  # whatever it is, nobody has to do without the store for it
            self._failed(line, error)
            raise Unusable(self._problem) from error
        self._works(line)
        return answer

    def look(self) -> str:
        """Connect if need be, and return which run the server is; "" if it is out of reach."""
        try:
            line = self._connect()
        except Exception as error:
            self._failed(None, error)
            return ""
        self._works(line)
        return line.run

    def subscribe(self, channel: str) -> Any:
        """Return a connection that gets what is published.

        Raises:
            OSError, redis.RedisError: The server is out of reach.
        """
        connection = self._kind(**self._settings)
        connection.connect()
        connection.send_command("SUBSCRIBE", channel)
        return connection

    def close(self) -> None:
        """End all connections that are not in use."""
        while self._free:
            self._free.pop().close()

    def _take(self, run: str) -> Line:
        while self._free:
            try:
                line = self._free.pop()
            except IndexError:
                break
            if line.run == run:
                return line
            line.close()
        return self._connect()

    def _connect(self) -> Line:
        connection = self._kind(**self._settings)
        try:
            connection.connect()
            for script in SCRIPTS:
                connection.send_command("SCRIPT", "LOAD", script)
            connection.send_command("INFO", "server")
            for script in SCRIPTS:
                if connection.read_response(disable_decoding=True).decode() != _HASHES[script]:
                    raise ValueError("it does not keep scripts")
            found = _read_info(connection.read_response(disable_decoding=True))
        except BaseException:
            connection.disconnect()
            raise
        run = found.get("run_id", "")
        if not run or found.get("redis_mode", found.get("server_mode")) == "cluster":
            connection.disconnect()
            raise ValueError("it is no single server, but a cluster")
        self.run = run
        return Line(connection, run)

    def _failed(self, line: Line | None, error: Exception) -> None:
        if line is not None:
            line.close()
        with self._state:
            now = time.monotonic()
            self._pause = min(2 * self._pause, _PAUSE_SECONDS[1]) if self._problem else _PAUSE_SECONDS[0]
            if now >= self._silent_until:
                logger.warning("the cache %s cannot be used now, and is tried again (%s)", self._shown, _said(error))
                self._silent_until = now + _SILENT_SECONDS
            self._problem = _said(error)
            self._again = now + self._pause
            self._trying = False
            self.run = ""
        self.close()  # the others are not better, and hold what they were to say

    def _works(self, line: Line | None) -> None:
        if line is not None:
            self._free.append(line)
        with self._state:
            self._problem, self._trying = "", False


def _read_info(text: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in text.decode(errors="replace").splitlines())
    return {name: value.strip() for name, _, value in lines}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]
