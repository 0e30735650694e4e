"""The server of a cache, Redis or Valkey: connections for threads, and for how long it is left alone when it fails."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar, cast

import redis
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, Connection, SSLConnection, parse_url
from redis.retry import Retry

from ...addresses import without_password
from ...errors import ConfigurationError
from ..base import logger
from .entries import SCRIPTS
from .roll import clock
from .wire import Refused, Wire

T = TypeVar("T")

FORMS = "redis://host:6379/0, rediss://host:6379/0 or unix:///path/to/socket"
"""How the URL of a cache is written."""

_CONNECT_SECONDS = 1.0
_GREETING_SECONDS = 5.0
"""In which a server has to have said what it is."""
_MOST_AT_ONCE = 4
"""Connections that event loops use at the same time; the others are for threads."""
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
_QUOTED = re.compile(r"""[`"*$]|\sb?'|, with args""")
"""Where a server, or the client, begins to repeat what was said to it: the password, if it knows no HELLO."""
_SECTIONS = ("server", "replication")
"""Of what a server says of itself."""
_WRITES = ("DEL", "chatdb:-")
"""Changes nothing, and is refused by whoever may not write."""


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

    def which(self, seconds: float) -> str:
        """Return which run of the server this leads to by now, likewise."""
        return _run_of(self._wire.ask([("INFO", section) for section in _SECTIONS], seconds))

    def ask(self, commands: Sequence[tuple[Any, ...]], seconds: float) -> list[Any]:
        """Send commands and return their answers, likewise; None for one that does not suit what is there.

        Connections stay when a server is made a replica, and get what the other one has; it writes nothing more.
        """
        return self._answers(self._wire.ask([*commands, _WRITES], seconds))

    def say(self, commands: Sequence[tuple[Any, ...]]) -> bool:
        """Send commands without waiting, for `answers`; return False if the line is of no more use."""
        return self._wire.say([*commands, _WRITES])

    async def answers(self, count: int, seconds: float) -> list[Any]:
        """Return the answers to so many commands that were sent, as `ask` does."""
        try:
            async with asyncio.timeout(seconds):
                return self._answers(await self._wire.answers(count + 1))
        except TimeoutError:
            late = self._wire.answers_by_now(count + 1)  # it may have been the loop that was slow
            if late is None:
                raise TimeoutError(f"it did not answer within {seconds:g} s") from None
            return self._answers(late)

    def _answers(self, said: list[Any]) -> list[Any]:
        *answers, writes = said
        if isinstance(writes, Refused):
            raise writes
        return [None if isinstance(answer, Refused) else answer for answer in answers]

    def close(self) -> None:
        """End it."""
        self._connection.disconnect()


class Server:
    """A server by its URL. Every method blocks that is no coroutine; it may be used by several threads and loops."""

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
            self._is_encrypted = issubclass(self._kind, SSLConnection)
            self._kind(**self._settings)  # connects to nothing, but looks at what it was given
        except (ValueError, TypeError, redis.RedisError):
            raise ConfigurationError(
                f"The URL of the cache cannot be understood: {self._shown!r}.", hint=f"Write {FORMS}."
            ) from None  # its words may have the password in them
        self._free: deque[Line] = deque()
        self._permits = deque(range(_MOST_AT_ONCE))
        self._state = threading.Lock()
        self._pause = _PAUSE_SECONDS[0]
        self._again = 0.0
        self._trying = False
        self._silent_until = 0.0
        self._closed = False
        self._problem = ""
        self.run = ""
        """The run that was last connected to; "" if none was, or it has failed since."""
        self._checked = float("-inf")
        """When it last said which run it is."""

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

    def call_many(
        self, run: str, script: str, calls: Sequence[tuple[list[str], list[Any]]], seconds: float
    ) -> list[Any]:
        """Run a script several times, with keys and arguments, in one message; return the answers, None for a refusal.

        Raises:
            Unusable: As `call` does.
        """
        name = _HASHES[script]
        commands = [("EVALSHA", name, len(keys), *keys, *arguments) for keys, arguments in calls]
        return self._with(run, lambda line: line.ask(commands, seconds))

    def ask(self, run: str, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Send commands to a run of the server, and return their answers; None for one that does not suit.

        Raises:
            Unusable: As `call` does.
        """
        return self._with(run, lambda line: line.ask(commands, self._seconds))

    async def ask_at_once(self, run: str, commands: Sequence[tuple[Any, ...]]) -> list[Any] | None:
        """Do as `ask` does without a thread; None if that is not possible now.

        Raises:
            Unusable: As `ask` does.
        """
        if self._problem or self._is_encrypted:  # for TLS a loop does not wait
            return None
        try:
            permit = self._permits.pop()
        except IndexError:
            return None
        try:
            line = self._free_line(run)
            if line is None:
                return None
            if not line.say(commands):
                line.close()
                return None
            return await self._answers(line, len(commands))
        finally:
            self._permits.append(permit)

    async def _answers(self, line: Line, count: int) -> list[Any]:
        begun = time.monotonic()
        try:
            answers = await line.answers(count, self._seconds)
        except Exception as error:
            self._failed(line, error, begun)
            raise Unusable(self._problem) from error
        except BaseException:
            line.close()  # there is an answer on its way that nobody reads
            raise
        self._works(line)
        return answers

    def _with(self, run: str, work: Callable[[Line], T]) -> T:
        with self._state:
            if is_trial := bool(self._problem):
                if not self.is_up:
                    raise Unusable(self._problem)
                self._trying = True  # the others wait for what comes of it
        begun = time.monotonic()
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
            self._failed(line, error, begun, is_trial=is_trial)
            raise Unusable(self._problem) from error
        self._works(line)
        return answer

    def look(self) -> str:
        """Connect if need be, and return which run the server is; "" if it is out of reach."""
        begun = time.monotonic()
        try:
            line = self._connect()
        except Exception as error:
            self._failed(None, error, begun)
            return ""
        self._works(line)
        return line.run

    def is_unchecked(self, seconds: float) -> bool:
        """Tell whether it has not said for so many seconds which run it is."""
        return clock() - self._checked >= seconds

    def check(self, seconds: float = _CONNECT_SECONDS) -> None:
        """Ask on a connection that there is, and wait for so long, which run the server is; if another, end all."""
        run, begun, now = self.run, time.monotonic(), clock()
        if not run or self._problem:
            return
        line = None
        try:
            line = self._take(run)
            if line.which(seconds) != line.run:
                raise ValueError("it has been made a replica meanwhile, and has what another server had")
        except Exception as error:
            self._failed(line, error, begun)
        else:
            self._checked = now
            self._works(line)

    def subscribe(self, run: str, channel: str) -> Any:
        """Return a connection that gets what is published on a run of the server.

        Raises:
            OSError, redis.RedisError, ValueError: The server is out of reach, or another one.
        """
        connection, found = self._connected()
        try:
            if found != run:
                raise ValueError("it is another server, or has been started again")
            connection.send_command("SUBSCRIBE", channel)
        except BaseException:
            connection.disconnect()
            raise
        return connection

    def close(self) -> None:
        """End all connections; those in use as soon as they are free."""
        self._closed = True
        self._end_free()

    def _end_free(self) -> None:
        while self._free:
            with suppress(IndexError):  # somebody has just taken it
                self._free.pop().close()

    def _take(self, run: str) -> Line:
        return self._free_line(run) or self._connect()

    def _free_line(self, run: str) -> Line | None:
        """Return a connection to a run that nobody uses; None if there is none."""
        while self._free:
            try:
                line = self._free.pop()
            except IndexError:
                break
            if line.run == run:
                return line
            line.close()
        return None

    def _connect(self) -> Line:
        begun = clock()
        connection, run = self._connected()
        self.run, self._checked = run, begun
        return Line(connection, run)

    def _connected(self) -> tuple[Any, str]:
        """Return a new connection of the client, and which run of the server it leads to."""
        connection = self._kind(**self._settings)
        # The client waits anew for each piece of an answer, so one that never ends would hold this thread for ever.
        limit = threading.Timer(_GREETING_SECONDS, connection.disconnect)
        limit.daemon = True
        limit.start()
        try:
            connection.connect()
            for script in SCRIPTS:
                connection.send_command("SCRIPT", "LOAD", script)
            for section in _SECTIONS:
                connection.send_command("INFO", section)
            for script in SCRIPTS:
                if connection.read_response(disable_decoding=True).decode() != _HASHES[script]:
                    raise ValueError("it does not keep scripts")
            run = _run_of([connection.read_response(disable_decoding=True) for _ in _SECTIONS])
        except BaseException:
            connection.disconnect()
            raise
        finally:
            limit.cancel()
        return connection, run

    def _failed(self, line: Line | None, error: Exception, begun: float, *, is_trial: bool = False) -> None:
        """Leave it alone for a moment, because of what was begun at a moment and has failed."""
        if line is not None:
            line.close()
        with self._state:
            now = time.monotonic()
            # What was begun before others had failed says nothing new.
            if is_trial or not self._problem or begun >= self._again:
                self._pause = min(2 * self._pause, _PAUSE_SECONDS[1]) if self._problem else _PAUSE_SECONDS[0]
                self._again = now + self._pause
            if is_trial:
                self._trying = False
            self._problem = self._said(error)
            if now >= self._silent_until:
                logger.warning("the cache %s cannot be used now, and is tried again (%s)", self._shown, self._problem)
                self._silent_until = now + _SILENT_SECONDS
            self.run = ""
        self._end_free()  # the others are not better, and hold what they were to say

    def _said(self, error: Exception) -> str:
        """Return what an error says, without what it quotes and without the password."""
        text = _QUOTED.split(str(error), maxsplit=1)[0]
        if secret := self._settings.get("password") or self._settings.get("username"):
            text = text.replace(secret, "***")
        return f"{type(error).__name__}: {text}"[:200].rstrip()

    def _works(self, line: Line | None) -> None:
        if line is not None:
            self._free.append(line)
        if self._closed:
            self._end_free()
        with self._state:
            self._problem, self._trying = "", False


def _run_of(sections: Sequence[Any]) -> str:
    """Return which run a server is, of what it says of itself.

    The id of its data is part of it: a replica keeps its own, and has what another server had.

    Raises:
        ValueError: It is none that can be used.
    """
    found: dict[str, str] = {}
    for text in sections:
        if not isinstance(text, bytes):
            raise ValueError("it does not say what it is")
        lines = (line.partition(":") for line in text.decode(errors="replace").splitlines())
        found |= {name: value.strip() for name, _, value in lines}
    if found.get("redis_mode", found.get("server_mode")) == "cluster":
        raise ValueError("it is no single server, but a cluster")
    if found.get("role") != "master":
        raise ValueError("it is a replica of another server")
    if not found.get("run_id") or not found.get("master_replid"):
        raise ValueError("it does not say which run it is: INFO has no run_id and master_replid")
    return f"{found['run_id']}:{found['master_replid']}"
