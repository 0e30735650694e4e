"""The flat-file backend: the contract's async methods over the engine, the tree and the log readers."""

from __future__ import annotations

import asyncio
import copy
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import TypeVar

from ... import codec
from ...addresses import absolute
from ...config import StorageConfig
from ...errors import ConfigurationError, DurabilityError, IntegrityError, StorageError, UnavailableError
from ...layout import Layout
from ...models import Problem
from ..base import Capability, Changes, LogPart, Snapshot, logger
from ..readers import Readers
from ..rules import check_key, check_lines, not_found
from ..threaded import ThreadedBackend
from .blobs import WRITE_BYTES, BlobReader, BlobWriter
from .engine import Engine
from .extents import read_part, read_places, stamp
from .files import Files
from .jobs import Extend, Hold, Mend, Place
from .loading import FEW
from .logs import Block, LogReader
from .lookout import LockLookout
from .memo import Memo
from .offsets import Offsets
from .oserrors import mapped
from .still import Still

T = TypeVar("T")

_READERS = 4


class FlatfileBackend(ThreadedBackend):
    """Files in a folder, safe for several threads and processes of one host.

    Reading takes no lock: documents are replaced whole, and a log is read up to its last newline.
    """

    capabilities = frozenset(
        {
            Capability.PERSISTENT,
            Capability.PROCESSES,
            Capability.ATOMIC_APPEND,
            Capability.STREAMED_BLOBS,
            Capability.EXTENTS,
            Capability.SNAPSHOTS,
        }
    )

    def __init__(self, config: StorageConfig, root: str | os.PathLike[str], *, files: Files | None = None) -> None:
        """Keep the store in the folder `root`; `files` replaces the system calls in tests."""
        self._files = files or Files()
        self.root = absolute(os.fspath(root))
        self._engine = Engine(config, self.root, self._files)
        super().__init__(config, self._engine.run, self._engine.idle, self._engine.close)
        if not config.allow_network_file_system:  # the system tells only what this host writes
            self._lookout = LockLookout(self._waking, self._files, self.root, Layout(config))
        self._tree = self._engine.tree
        self._documents = Memo(self._files)
        self._newest = Memo(self._files)
        self._offsets = Offsets()
        self._opening = threading.Lock()
        self._recovered = False
        self._obstacle: IntegrityError | None = None

    def __repr__(self) -> str:
        state = " closed" if self._closed else "" if self._readers is not None else " unopened"
        return f"<FlatfileBackend {self.root!r}{state}>"

    # --- life ----------------------------------------------------------------------------------------

    async def open(self) -> None:
        await super().open()
        if not self._recovered:
            await self._threads().run(self._recover)

    def _recover(self) -> None:
        """Do again what a dead process left in the journal; what cannot be done is said by every other method."""
        with self._opening:
            if self._recovered:
                return
            try:
                with mapped(self._engine.ledger.key):
                    self._engine.open()
            except IntegrityError as error:
                self._obstacle = error
            except UnavailableError as error:
                if isinstance(error.__cause__, NotADirectoryError) and self._is_file():
                    raise ConfigurationError(
                        f"{self.root} is a file, and a store of files is a folder.",
                        hint=f"A store in one file of SQLite is sqlite:{self.root}.",
                    ) from error
                raise
            self._recovered = True

    def _is_file(self) -> bool:
        try:
            return self._files.status(self.root).kind == "file"
        except OSError:
            return False

    def _close(self) -> None:
        super()._close()
        if self._engine.failure is not None:
            raise self._engine.failure

    def statistics(self) -> dict[str, int]:
        return {**self._files.counters, "open_files": self._engine.open_files}

    def _check_open(self) -> Readers:
        threads = super()._check_open()
        if self._obstacle is not None:
            raise copy.copy(self._obstacle)
        return threads

    def let_go_after_fork(self) -> None:
        super().let_go_after_fork()
        self._opening = threading.Lock()
        self._engine.let_go()

    def _in_thread(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Do blocking work, one hop for a whole operation."""
        return self._check_open().run(work)

    # --- the six -------------------------------------------------------------------------------------

    async def read(self, key: str) -> bytes | None:
        check_key(key)
        return await self._in_thread(lambda: self._read(key))

    async def append(self, key: str, data: bytes) -> bool:
        check_lines(check_key(key), data)
        await self._commit([Extend(key, bytes(data))])
        return True

    async def exists(self, key: str) -> bool:
        check_key(key)

        def look() -> bool:
            with mapped(key):
                return self._engine.exists(key)

        return await self._in_thread(look)

    async def list_keys(self, prefix: str) -> list[str]:
        def look() -> list[str]:
            with mapped(prefix):
                return self._tree.keys(prefix)

        return await self._in_thread(look)

    # --- documents and changes -----------------------------------------------------------------------

    async def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        for key in keys:
            check_key(key)

        return await self._in_thread(lambda: [self._read_kept(key) for key in keys])

    def _read_kept(self, key: str) -> bytes | None:
        with mapped(key):
            return self._documents.get(self._tree.path(key), lambda: self._engine.read(key))

    async def list_children(self, folder: str) -> list[str]:
        if folder:
            check_key(folder)

        def look() -> list[str]:
            with mapped(folder):
                return self._tree.children(folder)

        return await self._in_thread(look)

    async def list_folders(self, folder: str) -> list[str]:
        if folder:
            check_key(folder)

        def look() -> list[str]:
            with mapped(folder):
                return self._tree.folders(folder)

        return await self._in_thread(look)

    def _read(self, key: str) -> bytes | None:
        with mapped(key):
            return self._engine.read(key)

    async def load(self, items: Sequence[tuple[str, bytes]]) -> None:
        if len(items) <= FEW:
            await super().load(items)
            return
        for key, _ in items:
            check_key(key)
        await self._commit([])  # makes the store's folder
        loading = self._engine.loading()

        def write() -> None:
            with mapped():
                loading.write(items)

        try:
            await self._in_thread(write)
        except BaseException:
            await asyncio.shield(self._later(loading.discard))
            raise
        try:
            await self._commit(loading.places)
        except DurabilityError:  # they may be needed when the store is opened again
            raise
        except StorageError:
            await asyncio.shield(self._later(loading.discard))
            raise

    # --- logs ----------------------------------------------------------------------------------------

    async def read_log(self, key: str, start: int = 0, stop: int | None = None, *, strict: bool = False) -> list[bytes]:
        return await self.read_log_as(key, codec.record_line, start, stop, strict=strict)

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

        def page() -> list[T]:
            with mapped(key), self._open_log(key, strict=strict) as log:
                return self._offsets.page(log, start, stop, decode)

        return await self._in_thread(page)

    async def stream_log(self, key: str, *, strict: bool = False) -> AsyncIterator[list[bytes]]:
        runs = self._stream(key, lambda log, block: list(log.decoded(block, codec.record_line)), strict=strict)
        async with aclosing(runs):
            async for run in runs:
                if run:
                    yield run

    async def stream_log_as(
        self, key: str, decode: Callable[[bytes], T | None], *, strict: bool = False
    ) -> AsyncIterator[Iterable[T]]:
        def run(log: LogReader, block: Block) -> Iterable[T]:
            records = log.decoded(block, decode)
            # Decoding large lines one by one would hold the event loop up.
            return records if block.is_light else list(records)

        async with aclosing(self._stream(key, run, strict=strict)) as runs:
            async for records in runs:
                yield records

    async def _stream(
        self, key: str, work: Callable[[LogReader, Block], T], *, strict: bool
    ) -> AsyncGenerator[T, None]:
        """Yield what `work` makes of the blocks of a log in a reader's thread."""
        check_key(key)

        def following() -> tuple[T] | None:
            with mapped(key):
                block = log.next_block()
                return None if block is None else (work(log, block),)

        log = self._open_log(key, strict=strict)
        try:
            while made := await self._in_thread(following):
                yield made[0]
        finally:
            await asyncio.shield(self._later(log.close))

    async def count_log(self, key: str) -> int:
        check_key(key)

        def count() -> int:
            with mapped(key), self._open_log(key) as log:
                return self._offsets.count(log)

        return await self._in_thread(count)

    async def find_record(self, key: str, record_id: str) -> tuple[int, bytes] | None:
        check_key(key)

        def find() -> tuple[int, bytes] | None:
            with mapped(key), self._open_log(key) as log:
                return self._offsets.find(log, record_id)

        return await self._in_thread(find)

    async def newest_records(self, keys: Sequence[str]) -> list[bytes | None]:
        for key in keys:
            check_key(key)

        return await self._in_thread(lambda: [self._newest_kept(key) for key in keys])

    def _newest_kept(self, key: str) -> bytes | None:
        def read() -> bytes | None:
            with self._open_log(key) as log:
                return next(iter(log.newest(1, codec.record_line)), None)

        try:
            with mapped(key):
                return self._newest.get(self._tree.path(key), read)
        except UnavailableError as error:
            if not isinstance(error.__cause__, IsADirectoryError):
                raise
            logger.warning("%s is no file; it is passed over", key)
            return None

    async def read_folders(self, folder: str, document: str, log: str) -> list[tuple[str, bytes | None, bytes | None]]:
        if folder:
            check_key(folder)
        check_key(f"{document}/{log}")

        def read() -> list[tuple[str, bytes | None, bytes | None]]:
            with mapped(folder):
                children = self._tree.folders(folder)
            start = f"{folder}/" if folder else ""
            return [
                (
                    child,
                    self._read_kept(f"{start}{child}/{document}"),
                    self._newest_kept(f"{start}{child}/{log}"),
                )
                for child in children
            ]

        return await self._in_thread(read)

    def _open_log(self, key: str, *, strict: bool = False) -> LogReader:
        return LogReader(
            self._files,
            self._tree.path(key),
            key,
            block=self.config.jsonl_read_buffer_size,
            strict=strict,
        )

    # --- what a derived index needs ------------------------------------------------------------------

    def index_folder(self) -> str:
        return os.path.join(self.root, Layout(self.config).index)

    async def changes(self, cursor: str | None) -> Changes:
        def look() -> Changes:
            with mapped(self._engine.ledger.key):
                return self._engine.ledger.history.changes(cursor)

        return await self._in_thread(look)

    async def stamps(self, keys: Sequence[str]) -> list[str | None]:
        for key in keys:
            check_key(key)

        def look() -> list[str | None]:
            with mapped():
                return [stamp(self._files, self._tree.path(key)) for key in keys]

        return await self._in_thread(look)

    async def read_log_part(self, key: str, identity: str | None, start: int) -> LogPart | None:
        check_key(key)

        def read() -> LogPart | None:
            with mapped(key):
                return read_part(self._files, self._tree.path(key), key, identity, start)

        return await self._in_thread(read)

    async def read_log_at(self, places: Sequence[tuple[str, int, int]]) -> list[bytes | None]:
        for key, _, _ in places:
            check_key(key)

        def read() -> list[bytes | None]:
            with mapped():
                paths = [(self._tree.path(key), key, offset, length) for key, offset, length in places]
                return read_places(self._files, paths)

        return await self._in_thread(read)

    # --- blobs ---------------------------------------------------------------------------------------

    async def write_blob(self, key: str, chunks: AsyncIterator[bytes]) -> bool:
        check_key(key)
        if await self.exists(key):
            return False
        blob = BlobWriter(self._files, self._tree.temporary(key))

        def step(work: Callable[[], None]) -> None:
            with mapped(key):
                work()

        try:
            await self._in_thread(partial(step, blob.start))
            gathered = bytearray()
            async for chunk in chunks:
                gathered += chunk
                if len(gathered) >= WRITE_BYTES:
                    await self._in_thread(partial(step, partial(blob.write, bytes(gathered))))
                    gathered.clear()
            await self._in_thread(partial(step, partial(blob.write, bytes(gathered))))
            await self._in_thread(partial(step, blob.finish))
        except BaseException:
            await asyncio.shield(self._later(blob.discard))
            raise
        try:
            return bool((await self._commit([Place(blob.path, key)]))[0])
        except DurabilityError:  # it may be needed when the store is opened again
            raise
        except StorageError:
            await asyncio.shield(self._later(blob.discard))
            raise

    async def read_blob(self, key: str) -> AsyncIterator[bytes]:
        check_key(key)

        def following() -> bytes:
            with mapped(key):
                try:
                    return blob.read()
                except FileNotFoundError:
                    raise not_found(f"The file {key}", key) from None

        blob = BlobReader(self._files, self._tree.path(key))
        try:
            while data := await self._in_thread(following):
                yield data
        finally:
            await asyncio.shield(self._later(blob.close))

    # --- all of it -----------------------------------------------------------------------------------

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Snapshot]:
        from .snapshots import FlatfileSnapshot, Frozen  # it loads SQLite, for which no other work need wait

        threads = self._check_open()
        frozen = Frozen(self._files, self._tree, self._engine.ledger.history)

        def begin() -> bool:
            with mapped():
                return frozen.begin()

        try:
            if await threads.run(begin):
                await self._commit([Hold(frozen.settle)])
                yield FlatfileSnapshot(self, frozen, self._in_thread)
            else:
                yield Snapshot(self)
        finally:
            await asyncio.shield(self._later(frozen.end))

    @asynccontextmanager
    async def still(self) -> AsyncIterator[Snapshot]:
        self._check_open()
        yield Still(self, self._files, self._tree, self._in_thread)

    # --- maintenance ---------------------------------------------------------------------------------

    async def obstacles(self, *, fix: bool = False) -> list[Problem]:
        threads = self._threads()
        if self._obstacle is None:
            return []

        def look() -> list[Problem]:
            with self._opening, mapped(self._engine.ledger.key):
                if self._obstacle is None:
                    return []
                found = self._engine.ledger.damage()
                fixed = fix and self._engine.ledger.salvage()
                if fixed:
                    self._obstacle = None
                return [Problem("damaged-journal", key, detail, fixed=fixed) for key, detail in found]

        return await threads.run(look)

    async def verify(self, *, fix: bool = False) -> list[Problem]:
        def look() -> tuple[list[Problem], list[str], bool]:
            with mapped():
                problems = list(self._tree.problems(fix=fix))
                torn = []
                for key in self._tree.logs():
                    try:
                        if self._ends_in_half(key):
                            torn.append(key)
                    except OSError as error:
                        problems.append(Problem("unreadable", key, f"The log cannot be read: {error.strerror}."))
                return problems, torn, self._engine.ledger.has_unfinished()

        problems, torn, unfinished = await self._in_thread(look)
        if torn:  # a writer at work looks the same for a moment
            await asyncio.sleep(0.05)
            _, still, unfinished = await self._in_thread(look)
            torn = [key for key in torn if key in still]
        if unfinished:
            if fix:
                await self._commit([])  # taking the lock does it
            detail = "A process died before it had done what it wrote to the journal; the next write does it."
            problems.append(Problem("unfinished-batch", self._engine.ledger.key, detail, fixed=fix, harmless=True))
        for key in torn:
            if fix:
                await self._commit([Mend(key)])
            problems.append(Problem("torn-tail", key, "The log ends in half a line.", fixed=fix))
        return problems

    def _ends_in_half(self, key: str) -> bool:
        try:
            descriptor = self._files.open_to_read(self._tree.path(key))
        except FileNotFoundError:
            return False
        try:
            size = self._files.status_of(descriptor).size
            return size > 0 and self._files.read(descriptor, 1, size - 1) != b"\n"
        finally:
            self._files.close(descriptor)
