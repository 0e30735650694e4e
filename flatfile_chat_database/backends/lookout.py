"""A thread that looks out for what other processes write to a store, as long as anybody waits for it."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod

from .waking import Waking

logger = logging.getLogger("flatfile_chat_database")

TICK_SECONDS = 0.2
"""How often the thread looks whether it is still wanted."""
_IDLE_SECONDS = 1.0
"""After so long a time without anybody who waits, it is not."""


class Watch:
    """One life of the thread."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.is_up = False
        """Whether a change would be noticed."""
        self.awaited = time.monotonic()
        """When somebody waited last."""


class Lookout(ABC):
    """Starts and ends the thread; how to look out is the heir's."""

    def __init__(self, waking: Waking) -> None:
        """Wake those who wait in `waking`."""
        self._waking = waking
        self._watch: Watch | None = None
        self._threads: set[threading.Thread] = set()
        self._guard = threading.Lock()

    @abstractmethod
    def look_out(self, watch: Watch) -> None:
        """Look out while `goes_on`, and call `noticed` for each change; blocks. Return if that is not possible."""

    def begin(self) -> bool:
        """Look out from now on, if nobody does; return whether changes are noticed already.

        Whoever begins is one of those who wait already, or it might end again at once.
        """
        with self._guard:
            if self._watch is None:
                watch = self._watch = Watch()
                thread = threading.Thread(target=self._run, args=(watch,), name="chatdb-lookout", daemon=True)
                self._threads.add(thread)
                thread.start()
            return self._watch.is_up

    def end(self) -> None:
        """Look out no more; does not wait for the thread, which is about to end."""
        with self._guard:
            if self._watch is not None:
                self._watch.ended.set()
            self._watch = None

    def end_unless_awaited(self, watch: Watch | None = None) -> None:
        """Look out no more if nobody waits; with a `watch` only if it is still this one."""
        with self._guard:  # so that nobody begins in between
            if self._watch is not None and watch in (None, self._watch) and not self._waking.is_awaited:
                self._watch.ended.set()
                self._watch = None

    def join(self) -> None:
        """End it, and wait for the thread. Blocks."""
        self.end()
        for thread in list(self._threads):
            thread.join()

    def goes_on(self, watch: Watch) -> bool:
        """Tell whether it is still wanted."""
        now = time.monotonic()
        if self._waking.is_awaited:
            watch.awaited = now
        elif now - watch.awaited > _IDLE_SECONDS:
            self.end_unless_awaited(watch)
        return not watch.ended.is_set()

    def noticed(self, watch: Watch) -> None:
        """Wake everybody, for something changed, or something may have before it could be noticed."""
        watch.is_up = True
        self.tell()

    def tell(self) -> None:
        """Wake everybody."""
        self._waking.tell(None)

    def missed(self, watch: Watch, why: object) -> None:
        """Say that changes are not noticed at the moment: whoever waits polls until they are."""
        if watch.is_up and not watch.ended.is_set():
            logger.warning("Nobody tells at the moment what other processes write (%s); it is looked for instead", why)
        watch.is_up = False
        self._waking.tell(None)

    def _run(self, watch: Watch) -> None:
        try:
            self.look_out(watch)
        except Exception as error:
            logger.warning("Nobody tells what other processes write (%s); it is looked for instead", error)
        finally:
            watch.is_up = False
            self._waking.tell(None)
            self._threads.discard(threading.current_thread())
