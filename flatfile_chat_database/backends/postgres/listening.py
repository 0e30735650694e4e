"""Noticing what other nodes write: each transaction notifies the store's channel, and one connection listens to it."""

from __future__ import annotations

import time

import psycopg

from ...errors import StorageError
from ..lookout import TICK_SECONDS, Lookout, Watch
from ..waking import Waking
from .session import PostgresSession
from .target import Target

_SETTLED_SECONDS = 1.0
"""So long whoever waits polls: transactions that began when nobody listened notify nobody."""


class Listening(Lookout):
    """Listens; after the server went away it connects again and again, and whoever waits polls meanwhile."""

    def __init__(self, waking: Waking, target: Target, poll_seconds: float) -> None:
        super().__init__(waking)
        self._target = target
        self._poll_seconds = poll_seconds

    def look_out(self, watch: Watch) -> None:
        while self.goes_on(watch):
            try:
                session = PostgresSession(self._target, to_write=False)
            except StorageError as error:  # readers have the same, and say so
                self.missed(watch, error)
            else:
                try:
                    self._listen(session, watch)
                except psycopg.errors.ReadOnlySqlTransaction:  # a replica, which nobody can notify
                    return
                except (psycopg.Error, StorageError) as error:
                    self.missed(watch, error)
                finally:
                    session.close()
            watch.ended.wait(self._poll_seconds)

    def _listen(self, session: PostgresSession, watch: Watch) -> None:
        session.listen()
        settled = time.monotonic() + _SETTLED_SECONDS
        while self.goes_on(watch):
            heard = session.is_notified(TICK_SECONDS)
            if time.monotonic() < settled:
                self.tell()
            elif heard or not watch.is_up:
                self.noticed(watch)
