"""Noticing what other processes write: each batch ends with the mark in the lock file, so that file is all to watch."""

from __future__ import annotations

import os
from contextlib import closing

from ...layout import Layout
from ..lookout import TICK_SECONDS, Lookout, Watch
from ..waking import Waking
from .files import Files

_GATHERED_MILLISECONDS = 20
"""Changes that come on end are told of together, so often."""
_STEP_MILLISECONDS = 5
"""So long after a change it is told of, if none comes on end."""


class LockLookout(Lookout):
    """Has watchfiles watch the folder of the lock file."""

    def __init__(self, waking: Waking, files: Files, root: str, layout: Layout) -> None:
        super().__init__(waking)
        self._files = files
        self._folder = f"{root}/{layout.system}"
        self._name = os.path.basename(layout.lock)

    def look_out(self, watch: Watch) -> None:
        try:
            from watchfiles import watch as changes
        except ImportError:  # the extra `watch` is not installed: whoever waits polls
            return
        while self.goes_on(watch):
            if self._is_there():
                told = changes(
                    self._folder,
                    watch_filter=lambda _, path: os.path.basename(path) == self._name,
                    debounce=_GATHERED_MILLISECONDS,
                    step=_STEP_MILLISECONDS,
                    rust_timeout=round(1000 * TICK_SECONDS),
                    yield_on_timeout=True,
                    stop_event=watch.ended,
                    raise_interrupt=False,
                    recursive=False,
                )
                with closing(told):
                    for found in told:
                        if found or not watch.is_up:  # it is up now, but was not before
                            self.noticed(watch)
                        if not self.goes_on(watch) or not self._is_there():
                            break
                self.missed(watch, f"{self._folder} is gone")
            watch.ended.wait(TICK_SECONDS)

    def _is_there(self) -> bool:
        try:
            return self._files.status(self._folder).kind == "folder"
        except OSError:
            return False
