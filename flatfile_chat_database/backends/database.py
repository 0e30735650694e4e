"""A backend whose medium is a database: the contract's async methods over `contents.py`.

Reading is done in a few threads with a connection each, every method in one transaction that sees one state. Writing is
done by one thread (`writer.py`), so that all that is written at once shares a transaction and its flush.
"""

from __future__ import annotations

import asyncio
import copy
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from typing import TypeVar

from ..config import StorageConfig
from ..errors import DurabilityError, StorageError, UnavailableError
from ..layout import Layout
from ..models import Problem, new_id
from .base import Capability, Changes, LogPart, Snapshot
from .changes import Change
from .commits import Commits
from .contents import PIECE_BYTES, Contents
from .gathered import Gathered, Known
from .rows import LogRows, Repeated
from .rules import check_key, check_lines
from .states import DatabaseSnapshot, Session, State, Stream, blob
from .tables import Tables
from .threaded import ThreadedBackend
from .writer import Job

T = TypeVar("T")

_of_parents: list[Session | None] = []
"""Connections that came with a fork. Never closed here: that would say goodbye to the database for the parent."""

_ABANDONED_SECONDS = 3600
"""What is at no key for so long is not being written any more."""


class DatabaseBackend(ThreadedBackend):
    """Everything but how to connect."""

    capabilities = frozenset(
        {
            Capability.PERSISTENT,
            Capability.PROCESSES,
            Capability.ATOMIC_APPEND,
            Capability.STREAMED_BLOBS,
            Capability.SNAPSHOTS,
            Capability.EXTENTS,
        }
    )

    def __init__(self, config: StorageConfig, *, beside_loop: bool = False) -> None:
        """Write in transactions; `beside_loop` is that of `Writer`."""
        super().__init__(config, self._run, lambda: None, self._end_writing, beside_loop=beside_loop)
        self._tables = Tables(Layout(config))
        self._free: list[Session] = []
        self._writing: Session | None = None
        self._known = Known()
        self._is_alone = False
        """Whether nobody else had written between the last two transactions."""
        self._counters = {"batches": 0, "commits": 0}

    @abstractmethod
    def _connect(self, *, to_write: bool) -> Session | None:
        """Return a new connection to a store that fits this version; None if there is no store and none is made."""

    # --- life ----------------------------------------------------------------------------------------

    async def open(self) -> None:
        await super().open()
        await self._in_thread(lambda contents: None)

    def _close(self) -> None:
        super()._close()
        while self._free:
            self._free.pop().close()

    def let_go_after_fork(self) -> None:
        super().let_go_after_fork()
        _of_parents.extend(self._free)
        _of_parents.append(self._writing)
        self._free, self._writing = [], None

    def statistics(self) -> dict[str, int]:
        return dict(self._counters)

    # --- reading -------------------------------------------------------------------------------------

    async def _in_thread(self, work: Callable[[Contents | None], T], *, several: bool = False) -> T:
        """Do `work` on one state of the store, in a thread; None stands for a store that is not there.

        `several` says that it is going to take several statements.
        """
        return await self._threads().run(lambda: self._look(work, several=several))

    def _look(self, work: Callable[[Contents | None], T], *, several: bool = False) -> T:
        connection = self.take()
        if connection is None:
            return work(None)
        try:
            connection.begin_reading()
            return work(self.contents(connection))
        finally:
            self.give_back(connection)

    def take(self) -> Session | None:
        """Return a connection to read with; None if there is no store."""
        try:
            return self._free.pop()
        except IndexError:
            return self._connect(to_write=False)

    def give_back(self, connection: Session) -> None:
        """End a transaction that only read, and let others have its connection."""
        try:
            connection.roll_back()
        except StorageError:  # nothing was lost by it, but it is of no use any more
            connection.close()
            return
        if self._closed:
            connection.close()
        else:
            self._free.append(connection)

    def contents(self, connection: Session) -> Contents:
        """Return what is in the store, as the connection's transaction sees it."""
        return Contents(connection, self._tables, LogRows(connection, self._tables))

    async def _stream(self, begin: Callable[[Contents | None], Iterator[T]]) -> AsyncGenerator[T, None]:
        """Yield what an iterator yields in a thread, all of it from one state of the store."""
        threads = self._threads()
        stream = Stream(self, begin)
        try:
            while found := await threads.run(stream.next):
                yield found[0]
        finally:
            await asyncio.shield(self._later(stream.end))

    async def read(self, key: str) -> bytes | None:
        check_key(key)
        return await self._in_thread(lambda contents: contents.read(key) if contents else None)

    async def exists(self, key: str) -> bool:
        check_key(key)
        return await self._in_thread(lambda contents: contents is not None and contents.exists(key))

    async def list_keys(self, prefix: str) -> list[str]:
        return await self._in_thread(lambda contents: contents.keys(prefix) if contents else [])

    async def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        for key in keys:
            check_key(key)
        return await self._in_thread(
            lambda contents: contents.read_many(keys) if contents else [None] * len(keys), several=True
        )

    async def list_children(self, folder: str) -> list[str]:
        if folder:
            check_key(folder)
        return await self._in_thread(lambda contents: contents.children(folder) if contents else [])

    async def list_folders(self, folder: str) -> list[str]:
        if folder:
            check_key(folder)
        return await self._in_thread(lambda contents: contents.children(folder, folders_only=True) if contents else [])

    async def read_log(self, key: str, start: int = 0, stop: int | None = None, *, strict: bool = False) -> list[bytes]:
        check_key(key)
        return await self._in_thread(
            lambda contents: contents.records(key, start, stop, strict=strict) if contents else []
        )

    async def read_log_as(
        self,
        key: str,
        decode: Callable[[bytes], T | None],
        start: int = 0,
        stop: int | None = None,
        *,
        strict: bool = False,
    ) -> list[T]:
        check_key(key)

        many: Callable[[list[bytes]], list[T] | None] | None = getattr(decode, "many", None)
        made: list[T] | None = None

        def is_made(lines: list[bytes]) -> bool:
            nonlocal made
            made = None if many is None else many(lines)
            return made is not None

        def page(contents: Contents | None) -> list[T]:
            lines = contents.records(key, start, stop, strict=strict, judged=is_made) if contents else []
            if made is not None:
                return made
            return [record for line in lines if (record := decode(line)) is not None]

        return await self._in_thread(page)

    async def count_log(self, key: str) -> int:
        check_key(key)
        return await self._in_thread(lambda contents: contents.count(key) if contents else 0)

    async def find_record(self, key: str, record_id: str) -> tuple[int, bytes] | None:
        check_key(key)
        return await self._in_thread(lambda contents: contents.find(key, record_id) if contents else None)

    async def newest_records(self, keys: Sequence[str]) -> list[bytes | None]:
        for key in keys:
            check_key(key)
        return await self._in_thread(
            lambda contents: contents.newest(keys) if contents else [None] * len(keys), several=True
        )

    async def read_folders(self, folder: str, document: str, log: str) -> list[tuple[str, bytes | None, bytes | None]]:
        for key in (*[folder] * bool(folder), document, log):
            check_key(key)

        def look(contents: Contents | None) -> list[tuple[str, bytes | None, bytes | None]]:
            if contents is None:
                return []
            children = contents.children(folder, folders_only=True)
            places = [f"{folder}/{child}" if folder else child for child in children]
            documents = contents.read_many([f"{place}/{document}" for place in places])
            records = contents.newest([f"{place}/{log}" for place in places])
            return list(zip(children, documents, records, strict=True))

        return await self._in_thread(look, several=True)

    async def stream_log(self, key: str, *, strict: bool = False) -> AsyncIterator[list[bytes]]:
        check_key(key)
        runs = self._stream(lambda contents: contents.runs(key, strict=strict) if contents else iter(()))
        async with aclosing(runs):
            async for run in runs:
                yield run

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Snapshot]:
        threads = self._threads()
        state = State(self)
        try:
            await threads.run(state.begin)
            yield DatabaseSnapshot(self, self._threads, state)
        finally:
            await asyncio.shield(self._later(state.end))

    # --- what a derived index needs ------------------------------------------------------------------

    async def changes(self, cursor: str | None) -> Changes:
        return await self._in_thread(
            lambda contents: contents.changes(cursor) if contents else Changes("", None), several=cursor is not None
        )

    async def stamps(self, keys: Sequence[str]) -> list[str | None]:
        for key in keys:
            check_key(key)
        return await self._in_thread(
            lambda contents: contents.stamps(keys) if contents else [None] * len(keys), several=True
        )

    async def read_log_part(self, key: str, identity: str | None, start: int) -> LogPart | None:
        check_key(key)
        return await self._in_thread(
            lambda contents: contents.log_part(key, identity, start) if contents else None, several=True
        )

    async def read_log_at(self, places: Sequence[tuple[str, int, int]]) -> list[bytes | None]:
        for key, _, _ in places:
            check_key(key)
        return await self._in_thread(
            lambda contents: contents.log_places(places) if contents else [None] * len(places), several=True
        )

    # --- blobs ---------------------------------------------------------------------------------------

    async def read_blob(self, key: str) -> AsyncIterator[bytes]:
        check_key(key)
        pieces = self._stream(partial(blob, key))
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def write_blob(self, key: str, chunks: AsyncIterator[bytes]) -> bool:
        check_key(key)
        if await self.exists(key):
            return False
        pieces, number, size = new_id(), 0, 0
        held = bytearray()
        is_handed_over = False
        try:
            async for chunk in chunks:
                held += chunk
                size += len(chunk)
                while len(held) >= PIECE_BYTES:
                    await self._commit([partial(_keep, pieces, number, bytes(held[:PIECE_BYTES]))])
                    del held[:PIECE_BYTES]
                    number += 1
            is_handed_over = True
            last = [partial(_keep, pieces, number, bytes(held))] if held else []
            return bool((await self._commit([*last, partial(_adopt, key, pieces, size)]))[-1])
        except BaseException as error:
            # What was handed over whole is the writer's, whatever becomes of the caller. What cannot be dropped now,
            # for the store is closed or the disk full, `verify` finds.
            is_undone = isinstance(error, StorageError) and not isinstance(error, DurabilityError)
            if number and (is_undone or not is_handed_over):
                with suppress(StorageError):
                    await asyncio.shield(self._commit([partial(_drop, pieces)]))
            raise

    # --- writing -------------------------------------------------------------------------------------

    async def append(self, key: str, data: bytes) -> bool:
        check_lines(check_key(key), data)
        await self._commit([partial(_extend, key, bytes(data))])
        return True

    def _run(self, jobs: Sequence[Job]) -> None:
        """Do jobs in one transaction; in the writer's thread."""
        self._count(jobs)
        for gathers in (True, False):
            connection = self._begin(jobs)
            if connection is None:
                return
            try:
                self._run_together(connection, jobs, gathers=gathers)
            except DurabilityError as error:
                fail(jobs, error)
            except Repeated:  # somebody sends a message again, so each commit is looked at by itself
                continue
            except StorageError:
                self._run_one_by_one(jobs)
            return

    def _count(self, jobs: Sequence[Job]) -> None:
        self._counters["batches"] += 1
        self._counters["commits"] += len(jobs)

    def _run_one_by_one(self, jobs: Sequence[Job]) -> None:
        """Do jobs that could not be done together: one of them may be what the database cannot do."""
        for number, job in enumerate(jobs):
            connection = self._begin(jobs[number:])
            if connection is None:
                return
            try:
                self._run_together(connection, [job], gathers=False)
            except StorageError as error:
                fail([job], error)

    def _begin(
        self, jobs: Sequence[Job], begin: Callable[[Session], bool] = lambda connection: connection.begin_writing()
    ) -> Session | None:
        """Begin a transaction for jobs; if none can begin, tell all of them, and return None.

        Not each by itself: every one of them would wait as long for a file that somebody holds.
        """
        try:
            connection = self._writing = self._writing or self._connect(to_write=True)
            if connection is None:
                raise UnavailableError("There is no store to write to.")
            self._is_alone = not begin(connection)
            if not self._is_alone:
                self._known.forget()
        except StorageError as error:
            self._roll_back()
            fail(jobs, error)
            return None
        except BaseException:
            self._forget_and_roll_back()
            raise
        return connection

    def _run_together(self, connection: Session, jobs: Sequence[Job], *, gathers: bool) -> None:
        for job in jobs:
            job.outcomes = job.error = None
        try:
            commits = Commits(self.contents(connection), self.config)
            gathered = Gathered(commits.contents, self._known)
            if gathers:
                self._prepare(commits.contents, jobs)
            for job in jobs:
                if gathers and gathered.take(job):
                    continue
                gathered.flush()
                self._known.forget()
                _run_one(commits, job)
            gathered.flush()
            note = commits.contents.note_changes()
            connection.commit()
            self._known.note = note or self._known.note
        except BaseException:
            self._forget_and_roll_back()
            raise

    def _prepare(self, contents: Contents, jobs: Sequence[Job]) -> None:
        """Learn what these jobs are going to ask, where one statement is faster than one for each of them."""

    def _roll_back(self) -> None:
        if self._writing is not None:
            try:
                self._writing.roll_back()
            except Exception:  # what is wrong is being told already; the next one is new
                self._end_writing()

    def _forget_and_roll_back(self) -> None:
        self._known.forget()
        self._roll_back()

    def _end_writing(self) -> None:
        connection, self._writing = self._writing, None
        if connection is not None:
            connection.close()

    # --- maintenance ---------------------------------------------------------------------------------

    def _find_faults(self) -> list[tuple[str, str]]:
        connection = self.take()
        if connection is None:
            return []
        try:
            connection.begin_reading()
            faults = [("", text) for text in connection.faults()]
            return faults or self.contents(connection).contradictions()
        finally:
            self.give_back(connection)

    async def obstacles(self, *, fix: bool = False) -> list[Problem]:
        self._threads()
        return []

    async def verify(self, *, fix: bool = False) -> list[Problem]:
        problems = [
            Problem("damaged-database", key, text) for key, text in await self._threads().run(self._find_faults)
        ]
        torn, leftovers = await self._in_thread(
            lambda contents: (contents.torn_logs(), contents.leftovers()) if contents else ([], [])
        )
        for key in torn:
            if fix:
                await self._commit([partial(_mend, key)])
            problems.append(Problem("torn-tail", key, "The log ends in half a line.", fixed=fix))
        for pieces in leftovers:
            if _age(pieces) > _ABANDONED_SECONDS:
                if fix:
                    await self._commit([partial(_drop, pieces)])
                problems.append(
                    Problem("leftover", pieces, "An upload that came to nothing.", fixed=fix, harmless=True)
                )
        return problems


def _run_one(commits: Commits, job: Job) -> None:
    """Do a job; what is raised here ends the transaction, for part of it may be done."""
    try:
        for change in job.changes:
            if isinstance(change, Change):
                commits.check(change)
    except UnavailableError:
        raise
    except StorageError as error:
        job.error = error
    else:
        job.outcomes = [
            commits.apply(change) if isinstance(change, Change) else change(commits) for change in job.changes
        ]


def fail(jobs: Sequence[Job], error: StorageError) -> None:
    """Tell the callers of all these jobs that they failed."""
    for job in jobs:  # an error of its own for each, for a traceback grows with each raise
        job.outcomes, job.error = None, copy.copy(error)


# --- what jobs hold beside the changes of the contract -------------------------------------------------


def _extend(key: str, data: bytes, commits: Commits) -> None:
    commits.extend(key, data)


def _mend(key: str, commits: Commits) -> None:
    commits.open_log(key)


def _keep(pieces: str, number: int, data: bytes, commits: Commits) -> None:
    commits.contents.add_pieces(pieces, number, [data])


def _drop(pieces: str, commits: Commits) -> None:
    commits.contents.drop_pieces(pieces)


def _adopt(key: str, pieces: str, size: int, commits: Commits) -> bool:
    return commits.contents.adopt(key, pieces, size)


def _age(pieces: str) -> float:
    """Return how many seconds ago an id was made: it begins with the time (RFC 9562, section 5.7)."""
    try:
        return time.time() - int(pieces.replace("-", "")[:12], 16) / 1000
    except ValueError:  # it is none of ours
        return _ABANDONED_SECONDS + 1
