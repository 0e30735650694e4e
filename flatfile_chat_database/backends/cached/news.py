"""What others write, as the cache tells: one subscription for all in this process who wait for a change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from ..base import logger
from ..waking import Waking
from .entries import Names
from .roll import Phase, Word, is_same
from .server import Server

_TICK_SECONDS = 1.0
"""After which a silent server is asked whether it is there, and is gone if it is silent for as long again."""
_IDLE_TICKS = 10
"""In which nobody waits, and the subscription ends."""


class News:
    """The thread that listens, as long as somebody waits."""

    def __init__(self, server: Server, waking: Waking, use: Callable[[], Word | None]) -> None:
        """Wake by `waking`; `use` keeps the word of the cache fresh, and returns that of the cache all who write tell.

        The thread holds `use`, so it must not hold what is closed when it is forgotten.
        """
        self._server = server
        self._waking = waking
        self._use = use
        self._state = threading.Lock()
        self._thread: threading.Thread | None = None
        self._connection: Any = None
        self._wanted: Word | None = None
        """The cache that is to be listened to."""
        self._heard: Word | None = None
        """The cache that is listened to, once the server has said so."""
        self._ends = False

    @property
    def is_heard(self) -> bool:
        """Whether everything that is written is heard of."""
        heard = self._heard
        return heard is not None and self._is_used(heard)

    def _is_used(self, heard: Word) -> bool:
        """Tell whether all who write tell this opening of the cache, which is one of one run of a server."""
        word = self._use()
        return word is not None and is_same(word, heard)

    def listen(self, word: Word) -> None:
        """Begin to listen to what is written to a store, by what it says of its cache."""
        if word.phase is not Phase.OPEN:
            return
        with self._state:
            self._wanted = word  # the thread that listens to another one ends
            if self._thread is None and not self._ends:
                self._thread = threading.Thread(target=self._run, args=(word,), name="chatdb-news", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # there are no more threads: whoever waits has the store look
                    self._thread = None

    def let_go(self) -> None:
        """End it soon."""
        self._ends = True

    def stop(self) -> None:
        """End it; blocks."""
        with self._state:
            self._ends = True
            thread, connection = self._thread, self._connection
        if connection is not None:
            with suppress(Exception):  # it may be ending by itself
                connection.disconnect()
        if thread is not None:
            thread.join()

    # --- in the thread -------------------------------------------------------------------------------

    def _run(self, word: Word) -> None:
        try:
            self._connection = self._server.subscribe(word.server, Names(word.cache).channel)
            if not self._ends:
                self._listen(self._connection, word)
        except Exception as error:  # whoever waits then has the store look
            if not self._ends:
                logger.info("the cache does not tell what is written (%s)", type(error).__name__)
        finally:
            self._heard = None
            with self._state:
                connection, self._connection, self._thread = self._connection, None, None
            if connection is not None:
                with suppress(Exception):
                    connection.disconnect()
            self._waking.tell(None)  # who waits begins again, and somebody listens again

    def _listen(self, connection: Any, word: Word) -> None:
        silent = idle = 0
        while not self._ends and self._wanted is not None and is_same(self._wanted, word):
            if connection.can_read(timeout=_TICK_SECONDS):
                self._take(word, connection.read_response(push_request=True, disable_decoding=True))
                silent = 0
                continue
            idle = 0 if self._waking.is_awaited else idle + 1
            if silent > 1 or idle > _IDLE_TICKS:
                return
            silent += 1
            connection.send_command("PING")
            if not self._is_used(word):
                self._waking.tell(None)

    def _take(self, word: Word, answer: Any) -> None:
        if not isinstance(answer, list):  # it is there
            return
        if answer[0] == b"subscribe":
            self._heard = word
        elif answer[0] == b"message":
            self._waking.tell(places(answer[2].decode(errors="replace").split("\n")))


def places(touched: Iterable[str]) -> list[str] | None:
    """Return keys and folders without the slashes at their ends; None if one of them is the store itself."""
    found = [name.removesuffix("/") for name in touched]
    return None if "" in found else found
