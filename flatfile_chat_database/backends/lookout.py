"""A thread that looks out for what other processes write to a store, as long as anybody waits for it."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod

from .waking import Waking

logger = logging.getLogger("flatfile_chat_database")


class Watch:
    """One life of the thread."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.is_up = False
        """Whether a change would be noticed."""


class Lookout(ABC):
    """Starts and ends the thread; how to look out is the heir's."""

    def __init__(self, waking: Waking) -> None:
        """Wake those who wait in `waking`."""
        self.waking = waking
        self._watch: Watch | None = None
        self._threads: set[threading.Thread] = set()
        self._guard = threading.Lock()

    @abstractmethod
    def look_out(self, watch: Watch) -> None:
        """Look out until `watch` has ended; blocks. Set `is_up` and wake everybody once changes are noticed."""

    def wake_up(self, watch: Watch) -> None:  # noqa: B027 - an heir that looks at `ended` often enough needs no more
        """Have `look_out` notice that `watch` has ended; called from any thread."""

    def begin(self) -> bool:
        """Look out from now on, if nobody does; return whether changes are noticed already."""
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
            watch, self._watch = self._watch, None
        if watch is not None:
            watch.ended.set()
            self.wake_up(watch)

    def join(self) -> None:
        """End it, and wait for the thread. Blocks."""
        self.end()
        for thread in list(self._threads):
            thread.join()

    def _run(self, watch: Watch) -> None:
        try:
            self.look_out(watch)
        except Exception:  # whoever waits polls from now on
            logger.exception("Nobody tells any more what other processes write; it is looked for instead")
            watch.ended.wait()  # and this is not tried again and again
        finally:
            watch.is_up = False
            self._threads.discard(threading.current_thread())
