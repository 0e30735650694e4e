"""A store in PostgreSQL, for several application nodes at once. The tables: `tables.py` and `sql/`.

Every batch of writes is one transaction. New messages, by far the most of what is written, lock the logs that they go
to; anything else locks the store, so that conditions of a commit hold between all nodes. Both locks end with the
transaction.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import TypeVar, cast

from ...config import StorageConfig
from ...errors import ConfigurationError, DurabilityError, StorageError, UnavailableError
from ..base import Snapshot
from ..commits import Commits
from ..contents import Contents
from ..database import DatabaseBackend, fail
from ..gathered import Gathered, Known, messages_of
from ..rows import Repeated
from ..rules import check_key
from ..states import Session
from ..turn import Turn
from ..writer import Job

try:
    from .contents import PostgresContents
    from .listening import Listening
    from .session import PostgresSession
    from .target import Target
    from .words import PostgresWords
except ImportError as error:
    raise ConfigurationError(
        f"PostgreSQL needs the extra `postgres` ({error}).", hint="pip install 'flatfile-chat-database[postgres]'"
    ) from error

T = TypeVar("T")

_PATIENCE_MILLISECONDS = 1000


class PostgresBackend(DatabaseBackend):
    """A database, or one schema of it, that `storage_url` names."""

    def __init__(self, config: StorageConfig) -> None:
        super().__init__(config)
        self._target = Target(config)
        self._streams = Turn(config.database_pool_size)
        self._deriving = Turn()
        self._lookout = Listening(self._waking, self._target, config.watch_poll_seconds)

    def __repr__(self) -> str:
        return f"<PostgresBackend {self._target.name!r}{' closed' if self._closed else ''}>"

    def _connect(self, *, to_write: bool) -> PostgresSession:
        return PostgresSession(self._target, to_write=to_write)

    def contents(self, connection: Session) -> PostgresContents:
        return PostgresContents(cast("PostgresSession", connection), self._tables)

    # --- reading -------------------------------------------------------------------------------------

    def _look(self, work: Callable[[Contents | None], T], *, several: bool = False) -> T:
        connection = self.take()
        if connection is None:
            return work(None)
        try:
            return connection.look(lambda: work(self.contents(connection)), several=several)
        finally:
            self.give_back(connection)

    def take(self) -> PostgresSession | None:
        try:
            connection = cast("PostgresSession", self._free.pop())
        except IndexError:
            connection = self._connect(to_write=False)
        if self._target.is_store:
            return connection
        try:
            if connection.sees_store():
                return connection
        except BaseException:
            connection.close()
            raise
        self._free.append(connection)
        return None

    async def _stream(self, begin: Callable[[Contents | None], Iterator[T]]) -> AsyncGenerator[T, None]:
        async with self._held_connection(), aclosing(super()._stream(begin)) as items:
            async for item in items:
                yield item

    async def is_behind(self) -> bool:
        return await self.read_by(lambda contents: contents is not None and contents.is_in_recovery())

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Snapshot]:
        async with self._held_connection(), super().snapshot() as snapshot:
            yield snapshot

    @asynccontextmanager
    async def _held_connection(self) -> AsyncIterator[None]:
        """Be one of those who hold a connection for long; wait until they are not too many."""
        try:
            async with asyncio.timeout(self.config.lock_timeout_seconds):
                await self._streams.__aenter__()
        except TimeoutError:
            raise UnavailableError(
                f"{self._target.name}: {self.config.database_pool_size} streams are being read already.",
                hint="Read them to their ends or close them, or raise database_pool_size.",
            ) from None
        try:
            yield
        finally:
            await self._streams.__aexit__(None, None, None)

    # --- words ---------------------------------------------------------------------------------------

    def words(self) -> PostgresWords:
        return PostgresWords(self)

    async def read_by(self, work: Callable[[PostgresContents | None], T]) -> T:
        """Do work on one state of the store; None stands for a store that is not there."""
        return await self._in_thread(lambda contents: work(cast("PostgresContents | None", contents)))

    def stream_by(self, begin: Callable[[PostgresContents | None], Iterator[T]]) -> AsyncGenerator[T, None]:
        """Yield what an iterator yields, all of it from one state of the store."""
        return self._stream(lambda contents: begin(cast("PostgresContents | None", contents)))

    async def write_beside(self, work: Callable[[PostgresSession], T]) -> T:
        """Write, in one transaction beside those of messages, what is derived from them.

        One at a time, on a connection and in a thread that no reader waits for.

        Raises:
            UnavailableError: The store is locked, as by another node's long write; nobody has to wait for its end.
        """
        self._threads()  # which are not there when the store is closed

        def write() -> T:
            connection = self._connect(to_write=True)
            try:
                connection.execute(f"SET lock_timeout = {_PATIENCE_MILLISECONDS}")
                connection.begin_adding()
                done = work(connection)
                connection.commit()
                return done
            finally:
                connection.close()  # which ends a transaction that was not committed

        async with self._deriving:
            return await asyncio.to_thread(write)

    # --- writing -------------------------------------------------------------------------------------

    async def load(self, items: Sequence[tuple[str, bytes]]) -> None:
        for key, _ in items:
            check_key(key)
        await self._commit([partial(_load, items)])

    def _run(self, jobs: Sequence[Job]) -> None:
        if not self._run_messages(jobs):
            super()._run(jobs)

    def _run_messages(self, jobs: Sequence[Job]) -> bool:
        """Do jobs of a few new messages each, beside other nodes; return False, having done nothing, if one is not."""
        if not all(messages_of(job) for job in jobs):
            return False
        connection = self._begin(jobs, lambda connection: cast("PostgresSession", connection).begin_adding())
        if connection is None:
            return True
        try:
            contents = self.contents(connection)
            known = Known()
            _learn(contents, known, jobs, lock=True)
            gathered = Gathered(contents, known)
            if all(gathered.take(job) for job in jobs):
                gathered.flush()
                contents.note_changes()
                connection.commit()
                self._count(jobs)
                return True
        except DurabilityError as error:
            self._count(jobs)
            fail(jobs, error)
            return True
        except (StorageError, Repeated):
            pass  # each is going to be looked at by itself, and told what is wrong with it
        except BaseException:
            self._roll_back()  # or others would wait for its locks
            raise
        self._roll_back()
        return False

    def _prepare(self, contents: Contents, jobs: Sequence[Job]) -> None:
        _learn(cast("PostgresContents", contents), self._known, jobs, lock=False)


def _learn(contents: PostgresContents, known: Known, jobs: Sequence[Job], *, lock: bool) -> None:
    """Learn in one statement what new messages have to know of the store."""
    found = [messages for job in jobs if (messages := messages_of(job))]
    if found:
        owners = {require.key for require, _ in found}
        contents.know(known, owners, {append.key for _, append in found}, lock=lock)


def _load(items: Sequence[tuple[str, bytes]], commits: Commits) -> None:
    cast("PostgresContents", commits.contents).load(items)
