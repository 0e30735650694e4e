"""Noticing what other nodes write: each transaction notifies the store's channel, and one connection listens to it."""

from __future__ import annotations

import psycopg

from ...errors import StorageError
from ..lookout import TICK_SECONDS, Lookout, Watch
from ..waking import Waking
from .session import PostgresSession
from .target import Target


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
                except psycopg.errors.FeatureNotSupported:  # a replica, which nobody can notify
                    return
                except (psycopg.Error, StorageError) as error:
                    self.missed(watch, error)
                finally:
                    session.close()
            watch.ended.wait(self._poll_seconds)

    def _listen(self, session: PostgresSession, watch: Watch) -> None:
        session.listen()
        self.noticed(watch)  # nothing was noticed before
        while self.goes_on(watch):
            if session.is_notified(TICK_SECONDS):
                self.noticed(watch)
