"""A backend whose medium is a database: the contract's async methods over `contents.py`.

Reading is done in a few threads with a connection each, every method in one transaction that sees one state. Writing is
done by one thread (`writer.py`), so that all that is written at once shares a transaction and its flush.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, Protocol, TypeVar, cast

from ..config import StorageConfig
from ..errors import ClosedError, DurabilityError, StorageError, UnavailableError
from ..layout import Layout
from ..models import Problem, new_id
from . import forks
from .base import Capability, Changes, StorageBackend
from .changes import Change, Delete, Outcome, Put
from .contents import PIECE_BYTES, Connection, Contents, check_lines
from .gathered import Gathered, Known, Repeated
from .readers import Readers
from .rules import check_change, check_key, good_lines, not_found
from .tables import Tables
from .writer import Job, Writer

logger = logging.getLogger("flatfile_chat_database")

T = TypeVar("T")

_of_parents: list[Session | None] = []
"""Connections that came with a fork. Never closed here: that would say goodbye to the database for the parent."""

_READERS = 4
_ABANDONED_SECONDS = 3600
"""What is at no key for so long is not being written any more."""


class Session(Connection, Protocol):
    """A connection with its transactions. What it cannot do it raises as UnavailableError."""

    def begin_reading(self) -> None:
        """Begin a transaction that sees one state of the store."""

    def begin_writing(self) -> bool:
        """Begin a transaction that no other writer comes into; return whether others may have written since."""

    def commit(self) -> None:
        """End the transaction; what it wrote is durable.

        Raises:
            DurabilityError: It is not known whether it is.
        """

    def roll_back(self) -> None:
        """End the transaction; it changed nothing."""

    def close(self) -> None:
        """Let go of the connection."""


class _Extend:
    """Append whole lines, whatever they say."""

    def __init__(self, key: str, data: bytes) -> None:
        self.key, self.data = key, data


class _Mend:
    """Set aside half a line at the end of a log."""

    def __init__(self, key: str) -> None:
        self.key = key


class _Adopt:
    """Put bytes that are kept already at a key. Outcome: whether it was free."""

    def __init__(self, key: str, pieces: str, size: int, version: str) -> None:
        self.key, self.pieces, self.size, self.version = key, pieces, size, version


class _Keep:
    """Keep a piece of what is not at a key yet."""

    def __init__(self, pieces: str, number: int, data: bytes) -> None:
        self.pieces, self.number, self.data = pieces, number, data


class _Drop:
    """Drop what was kept and came to nothing."""

    def __init__(self, pieces: str) -> None:
        self.pieces = pieces


class DatabaseBackend(StorageBackend):
    """Everything but how to connect."""

    capabilities = frozenset(
        {Capability.PERSISTENT, Capability.PROCESSES, Capability.ATOMIC_APPEND, Capability.STREAMED_BLOBS}
    )

    def __init__(self, config: StorageConfig) -> None:
        super().__init__(config)
        self._tables = Tables(Layout(config))
        self._free: list[Session] = []
        self._writing: Session | None = None
        self._known = Known()
        self._writer = Writer(self._run, lambda: None, self._end_writing)
        self._readers: Readers | None = None
        self._state = threading.Lock()
        self._forked = False
        self._closed = False
        self._counters = {"batches": 0, "commits": 0}

    @abstractmethod
    def _connect(self, *, to_write: bool) -> Session | None:
        """Return a new connection to a store that fits this version; None if there is no store and none is made."""

    # --- life ----------------------------------------------------------------------------------------

    async def open(self) -> None:
        with self._state:
            if self._closed:
                raise ClosedError("The store is closed.", hint="Open a new StorageManager.")
            if self._readers is None:
                self._readers = Readers(_READERS)
                forks.remember(self)
        await self._in_thread(lambda contents: None)

    async def close(self) -> None:
        with self._state:
            first, self._closed = not self._closed, True
        if first and not self._forked:
            await asyncio.sleep(0)  # what was submitted in this turn is handed over first
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, self._close))

    def _close(self) -> None:
        self._writer.close()
        if self._readers is not None:
            self._readers.close()
        while self._free:
            self._free.pop().close()

    def statistics(self) -> dict[str, int]:
        return dict(self._counters)

    def _threads(self) -> Readers:
        if self._closed:
            raise ClosedError("The store is closed.", hint="Open a new StorageManager.")
        if self._forked:
            raise ClosedError(
                "The store was opened before a fork.", hint="Open a new StorageManager in the child process."
            )
        if self._readers is None:
            raise ClosedError("The store is not open yet.", hint="Call open() first.")
        return self._readers

    def let_go_after_fork(self) -> None:
        """In a forked child: the threads are gone, and the connections are the parent's."""
        self._forked = True
        self._state = threading.Lock()
        _of_parents.extend(self._free)
        _of_parents.append(self._writing)
        self._free, self._writing = [], None

    # --- reading -------------------------------------------------------------------------------------

    async def _in_thread(self, work: Callable[[Contents | None], T]) -> T:
        """Do `work` on one state of the store, in a thread; None stands for a store that is not there."""
        return await self._threads().run(lambda: self._look(work))

    def _look(self, work: Callable[[Contents | None], T]) -> T:
        connection = self._take()
        if connection is None:
            return work(None)
        try:
            connection.begin_reading()
            try:
                result = work(Contents(connection, self._tables, self.config))
            finally:
                connection.roll_back()
        except UnavailableError:
            connection.close()
            raise
        except BaseException:
            self._free.append(connection)
            raise
        self._free.append(connection)
        return result

    def _take(self) -> Session | None:
        try:
            return self._free.pop()
        except IndexError:
            return self._connect(to_write=False)

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
        return await self._in_thread(lambda contents: [contents.read(key) if contents else None for key in keys])

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

        def page(contents: Contents | None) -> list[T]:
            lines = contents.records(key, start, stop, strict=strict) if contents else []
            many: Callable[[list[bytes]], list[T] | None] | None = getattr(decode, "many", None)
            if many is not None and (made := many(lines)) is not None:
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
        return await self._in_thread(lambda contents: [contents.newest(key) if contents else None for key in keys])

    async def stream_log(self, key: str, *, strict: bool = False) -> AsyncIterator[list[bytes]]:
        check_key(key)
        start = 0
        while (run := await self._in_thread(partial(_run_of, key, start))) is not None:
            if not run:
                return
            yield run
            start += len(run)
        rest, offset = b"", 0
        async with aclosing(cast("AsyncGenerator[bytes]", self.read_blob(key))) as pieces:
            async for piece in pieces:
                end = piece.rfind(b"\n") + 1
                whole, rest = rest + piece[:end], piece[end:] if end else rest + piece
                if end and (lines := good_lines(key, whole, strict=strict, newline=False, offset=offset)):
                    yield lines
                offset += len(whole) if end else 0

    # --- blobs ---------------------------------------------------------------------------------------

    async def write_blob(self, key: str, chunks: AsyncIterator[bytes]) -> bool:
        check_key(key)
        if await self.exists(key):
            return False
        from hashlib import blake2b

        pieces, number, size, hashed = new_id(), 0, 0, blake2b(digest_size=16)
        held = bytearray()
        is_handed_over = False
        try:
            async for chunk in chunks:
                held += chunk
                while len(held) >= PIECE_BYTES:
                    piece = bytes(held[:PIECE_BYTES])
                    del held[:PIECE_BYTES]
                    await self._commit([_Keep(pieces, number, piece)])
                    hashed.update(piece)
                    number, size = number + 1, size + len(piece)
            hashed.update(held)
            last = _Keep(pieces, number, bytes(held))
            is_handed_over = True
            adopt = _Adopt(key, pieces, size + len(held), hashed.hexdigest())
            return bool((await self._commit([last, adopt] if held else [adopt]))[-1])
        except BaseException as error:
            # What was handed over whole is the writer's, whatever becomes of the caller.
            is_undone = isinstance(error, StorageError) and not isinstance(error, DurabilityError)
            if number and (is_undone or not is_handed_over):
                with suppress(StorageError):
                    await asyncio.shield(self._commit([_Drop(pieces)]))
            raise

    async def read_blob(self, key: str) -> AsyncIterator[bytes]:
        check_key(key)
        threads = self._threads()
        connection = await threads.run(self._take)
        if connection is None:
            raise not_found(f"The file {key}", key)

        def first() -> Iterator[bytes]:
            connection.begin_reading()
            contents = Contents(connection, self._tables, self.config)
            place = contents.place(key)
            if place is None:
                raise not_found(f"The file {key}", key)
            return contents.pieces(place) if place.kind == "pieces" else iter([contents.read(key) or b""])

        def end() -> None:
            if isinstance(pieces, Generator):
                pieces.close()
            connection.roll_back()
            if self._closed:
                connection.close()
            else:
                self._free.append(connection)

        pieces: Iterator[bytes] = iter(())
        try:
            pieces = await threads.run(first)
            while (piece := await threads.run(lambda: next(pieces, None))) is not None:
                yield piece
        finally:
            await asyncio.shield(self._later(end))

    def _later(self, work: Callable[[], None]) -> asyncio.Future[None]:
        try:
            return self._threads().run(work)
        except ClosedError:
            return asyncio.get_running_loop().run_in_executor(None, work)

    # --- writing -------------------------------------------------------------------------------------

    async def write(self, key: str, data: bytes) -> bool:
        await self.commit([Put(key, bytes(data))])
        return True

    async def append(self, key: str, data: bytes) -> bool:
        check_lines(check_key(key), data)
        await self._commit([_Extend(key, bytes(data))])
        return True

    async def delete(self, key: str) -> bool:
        return bool((await self.commit([Delete(key)]))[0])

    async def commit(self, changes: Sequence[Change]) -> list[Outcome]:
        for change in changes:
            check_change(change)
        return await self._commit(changes)

    def _commit(self, changes: Sequence[Any]) -> asyncio.Future[list[Outcome]]:
        self._threads()
        return self._writer.submit(changes)

    def _run(self, jobs: Sequence[Job]) -> None:
        """Do jobs in one transaction; in the writer's thread."""
        self._counters["batches"] += 1
        self._counters["commits"] += len(jobs)
        try:
            try:
                self._run_together(jobs)
            except Repeated:
                self._run_together(jobs, gathers=False)
        except DurabilityError as error:
            self._fail(jobs, error)
        except StorageError as error:
            if len(jobs) == 1:
                self._fail(jobs, error)
                return
            for job in jobs:  # one of them may be what the database cannot do
                self._run([job])

    def _run_together(self, jobs: Sequence[Job], *, gathers: bool = True) -> None:
        for job in jobs:
            job.outcomes = job.error = None
        connection = self._writing
        if connection is None:
            connection = self._writing = self._connect(to_write=True)
        if connection is None:
            raise UnavailableError("There is no store to write to.")
        if connection.begin_writing():
            self._known.forget()
        try:
            contents = Contents(connection, self._tables, self.config)
            gathered = Gathered(contents, self._known)
            for job in jobs:
                if gathers and gathered.take(job):
                    continue
                gathered.flush()
                self._known.forget()
                self._run_one(contents, job)
            gathered.flush()
        except BaseException:
            self._known.forget()
            connection.roll_back()
            raise
        try:
            connection.commit()
        except BaseException:
            self._known.forget()
            raise

    def _run_one(self, contents: Contents, job: Job) -> None:
        """Do a job; what is raised here ends the transaction, for part of it may be done."""
        try:
            for change in job.changes:
                if isinstance(change, Change):
                    contents.check(change)
        except UnavailableError:
            raise
        except StorageError as error:
            job.error = error
        else:
            job.outcomes = [self._make(contents, change) for change in job.changes]

    @staticmethod
    def _make(contents: Contents, change: Any) -> Outcome:
        match change:
            case _Extend():
                contents.extend(change.key, change.data)
                return None
            case _Mend():
                contents.open_log(change.key)
                return None
            case _Keep():
                contents.add_pieces(change.pieces, change.number, [change.data])
                return None
            case _Drop():
                contents.drop_pieces(change.pieces)
                return None
            case _Adopt():
                return contents.adopt(change.key, change.pieces, change.size, change.version)
            case _:
                return contents.apply(change)

    @staticmethod
    def _fail(jobs: Sequence[Job], error: StorageError) -> None:
        for job in jobs:
            job.outcomes, job.error = None, type(error)(error.message, key=error.key, hint=error.hint)

    def _end_writing(self) -> None:
        if self._writing is not None:
            self._writing.close()

    # --- maintenance ---------------------------------------------------------------------------------

    async def changes(self, cursor: str | None) -> Changes:
        self._threads()
        return await super().changes(cursor)

    async def obstacles(self, *, fix: bool = False) -> list[Problem]:
        self._threads()
        return []

    async def verify(self, *, fix: bool = False) -> list[Problem]:
        torn, leftovers = await self._in_thread(
            lambda contents: (contents.torn_logs(), contents.leftovers()) if contents else ([], [])
        )
        problems = []
        for key in torn:
            if fix:
                await self._commit([_Mend(key)])
            problems.append(Problem("torn-tail", key, "The log ends in half a line.", fixed=fix))
        for pieces in leftovers:
            if _age(pieces) > _ABANDONED_SECONDS:
                if fix:
                    await self._commit([_Drop(pieces)])
                problems.append(
                    Problem("leftover", pieces, "An upload that came to nothing.", fixed=fix, harmless=True)
                )
        return problems


def _run_of(key: str, start: int, contents: Contents | None) -> list[bytes] | None:
    return [] if contents is None else contents.run(key, start)


def _age(pieces: str) -> float:
    """Return how many seconds ago an id was made: it begins with the time (RFC 9562, section 5.7)."""
    return time.time() - int(pieces.replace("-", "")[:12], 16) / 1000
