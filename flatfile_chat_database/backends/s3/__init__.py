"""A store in a bucket of S3, or of anything that speaks as S3 does. How bytes stand in objects: `forms.py`.

Reading is done in a few threads, and begins with the object at the key. Writing is done by one thread (`writer.py`):
messages that come at the same time go to each log in one put. Every other process may write as well: nothing is
replaced but on the condition that it is what was looked at.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import aclosing, suppress
from itertools import islice
from typing import Generic, TypeVar, cast

from ... import codec
from ...addresses import absolute
from ...config import StorageConfig
from ...errors import ConfigurationError, ConflictError, DurabilityError, NotFoundError, StorageError
from ...models import Problem
from ..base import Capability, Changes, LogPart
from ..changes import ABSENT, Append, Put, Require
from ..rules import check_key, check_lines
from ..threaded import ThreadedBackend
from ..writer import Job

try:
    from .appending import Appender, Ask, Extend
    from .committing import Committer
    from .composing import PLAIN_BYTES, Composer, Garbage
    from .contents import Contents, Log
    from .faults import after_writing, unknown
    from .forms import PART_BYTES
    from .objects import Objects
    from .planning import Adopt, Withdraw
    from .target import target_of
    from .verifying import Verifier
except ImportError as error:
    raise ConfigurationError(
        f"S3 needs the extra `s3` ({error}).", hint="pip install 'flatfile-chat-database[s3]'"
    ) from error

T = TypeVar("T")

_CHUNK_BYTES = 1 << 20
"""In which blobs are read."""
_POLL_SECONDS = 1.0
"""How often whoever waits looks at the soonest: each look is paid for."""


class S3Backend(ThreadedBackend):
    """A bucket, or a prefix of it, that `storage_url` names."""

    capabilities = frozenset(
        {
            Capability.PERSISTENT,
            Capability.PROCESSES,
            Capability.ATOMIC_APPEND,
            Capability.STREAMED_BLOBS,
            Capability.EXTENTS,
        }
    )

    def __init__(self, config: StorageConfig) -> None:
        super().__init__(config, self._run, self._idle, self._end)
        self._target = target_of(config)
        self._objects = Objects(self._target, config.object_store_retries, "")
        self._contents = Contents(self._objects, config)
        self._objects.probes = self._contents.places.probes
        self._garbage = Garbage(self._contents)
        self._appender = Appender(self._contents, config, self._garbage)
        self._committer = Committer(self._contents, self._appender, config, self._garbage)
        self._is_ready = False

    def __repr__(self) -> str:
        return f"<S3Backend {self._target.name!r}{' closed' if self._closed else ''}>"

    def statistics(self) -> dict[str, int]:
        return dict(self._objects.counters)

    def index_folder(self) -> str:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        return os.path.join(absolute(home), "flatfile_chat_database", self._target.identity)

    # --- life ----------------------------------------------------------------------------------------

    async def open(self) -> None:
        await super().open()
        if not self._is_ready:
            await self._threads().run(self._finish_others)
            self._is_ready = True

    def _finish_others(self) -> None:
        """Look whether the store answers, and finish what processes that died began."""
        locks = self._contents.locks
        for name in locks.names():
            with suppress(StorageError):  # who may only read cannot; one that is damaged `verify` tells of
                locks.finish(name)

    def _close(self) -> None:
        super()._close()
        self._objects.close()

    def _end(self) -> None:
        with suppress(StorageError):  # `verify` finds what is left, and the next one who writes folds
            while self._appender.fold_one():
                pass
        self._garbage.empty()

    # --- reading -------------------------------------------------------------------------------------

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await self._check_open().run(work)

    async def _look(self, key: str, work: Callable[[Log | None], T]) -> T:
        check_key(key)
        return await self._in_thread(lambda: self._contents.look(key, work))

    async def read(self, key: str) -> bytes | None:
        check_key(key)
        return await self._in_thread(lambda: self._contents.read(key))

    async def exists(self, key: str) -> bool:
        check_key(key)
        return await self._in_thread(lambda: self._contents.exists(key))

    async def list_keys(self, prefix: str) -> list[str]:
        return await self._in_thread(lambda: self._contents.keys(prefix))

    async def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        for key in keys:
            check_key(key)
        return await self._in_thread(lambda: self._objects.together(self._contents.read, keys))

    async def list_children(self, folder: str) -> list[str]:
        return await self._children(folder, folders_only=False)

    async def list_folders(self, folder: str) -> list[str]:
        return await self._children(folder, folders_only=True)

    async def _children(self, folder: str, *, folders_only: bool) -> list[str]:
        if folder:
            check_key(folder)
        return await self._in_thread(lambda: self._contents.children(folder, folders_only=folders_only))

    async def read_log(self, key: str, start: int = 0, stop: int | None = None, *, strict: bool = False) -> list[bytes]:
        return await self._look(key, lambda log: log.records(start, stop, strict=strict) if log else [])

    async def read_log_as(
        self,
        key: str,
        decode: Callable[[bytes], T | None],
        start: int = 0,
        stop: int | None = None,
        *,
        strict: bool = False,
    ) -> list[T]:
        many: Callable[[list[bytes]], list[T] | None] | None = getattr(decode, "many", None)

        def page(log: Log | None) -> list[T]:
            lines = log.records(start, stop, strict=strict) if log else []
            made = many(lines) if many is not None else None
            return [record for line in lines if (record := decode(line)) is not None] if made is None else made

        return await self._look(key, page)

    async def count_log(self, key: str) -> int:
        return await self._look(key, lambda log: log.count() if log else 0)

    async def find_record(self, key: str, record_id: str) -> tuple[int, bytes] | None:
        return await self._look(key, lambda log: log.find(record_id) if log else None)

    async def newest_records(self, keys: Sequence[str]) -> list[bytes | None]:
        for key in keys:
            check_key(key)
        return await self._in_thread(lambda: self._objects.together(self._newest, keys))

    def _newest(self, key: str) -> bytes | None:
        found = self._contents.look(key, lambda log: log.records(-1, None) if log else [])
        return found[-1] if found else None

    async def read_folders(self, folder: str, document: str, log: str) -> list[tuple[str, bytes | None, bytes | None]]:
        for key in (*[folder] * bool(folder), document, log):
            check_key(key)

        def look() -> list[tuple[str, bytes | None, bytes | None]]:
            children = self._contents.children(folder, folders_only=True)
            places = [f"{folder}/{child}" if folder else child for child in children]
            documents = self._objects.together(self._contents.read, [f"{place}/{document}" for place in places])
            records = self._objects.together(self._newest, [f"{place}/{log}" for place in places])
            return list(zip(children, documents, records, strict=True))

        return await self._in_thread(look)

    async def stream_log(self, key: str, *, strict: bool = False) -> AsyncIterator[list[bytes]]:
        check_key(key)
        runs = self._stream(lambda: self._contents.runs(key, strict=strict))
        async with aclosing(runs):
            async for run in runs:
                yield run

    async def read_blob(self, key: str) -> AsyncIterator[bytes]:
        check_key(key)
        chunks = self._stream(lambda: self._contents.chunks(key, _CHUNK_BYTES))
        is_there = False
        async with aclosing(chunks):
            async for chunk in chunks:
                is_there = True
                if chunk:
                    yield chunk
        if not is_there:
            raise NotFoundError(f"There is no file at {key}.", key=key)

    async def _stream(self, begin: Callable[[], Iterator[T]]) -> AsyncGenerator[T, None]:
        """Yield what an iterator yields in a thread."""
        threads, stream = self._check_open(), _Stream(begin)
        try:
            while found := await threads.run(stream.next):
                yield found[0]
        finally:
            await asyncio.shield(self._later(stream.end))

    # --- what watching and a derived index need ------------------------------------------------------

    @property
    def _poll_seconds(self) -> float:
        return max(_POLL_SECONDS, super()._poll_seconds)

    async def changes(self, cursor: str | None) -> Changes:
        self._check_open()
        return Changes("", None)

    async def stamps(self, keys: Sequence[str]) -> list[str | None]:
        for key in keys:
            check_key(key)
        return await self._in_thread(lambda: self._objects.together(self._contents.stamp, keys))

    async def read_log_part(self, key: str, identity: str | None, start: int) -> LogPart | None:
        return await self._look(key, lambda log: log.log_part(identity, start) if log else None)

    async def read_log_at(self, places: Sequence[tuple[str, int, int]]) -> list[bytes | None]:
        for key, _, _ in places:
            check_key(key)
        return await self._in_thread(lambda: self._contents.read_at(places))

    # --- writing -------------------------------------------------------------------------------------

    async def append(self, key: str, data: bytes) -> bool:
        check_lines(check_key(key), data)
        await self._commit([Extend(key, bytes(data))])
        return True

    async def write_blob(self, key: str, chunks: AsyncIterator[bytes]) -> bool:
        check_key(key)
        if await self.exists(key):
            return False
        composer, held = Composer(self._contents), [bytearray()]

        def send() -> None:
            composer.piece(held.pop())  # taken out: the thread remembers what it was given until it is given more

        try:
            async for chunk in chunks:
                held[0] += chunk
                if len(held[0]) >= PART_BYTES:
                    await self._in_thread(send)
                    held.append(bytearray())
            if held[0] and (composer.made or len(held[0]) > PLAIN_BYTES):
                await self._in_thread(send)
        except BaseException:
            self._garbage.later(composer.made)
            raise
        # From here on the parts are the commit's, whatever becomes of the caller.
        return await self._adopted(Adopt(key, composer.made) if composer.made else Put(key, bytes(held[0]), ABSENT))

    async def _adopted(self, change: Put | Adopt) -> bool:
        try:
            [outcome] = await self._commit([change])
        except ConflictError:
            return False
        return bool(outcome)

    def _run(self, jobs: Sequence[Job]) -> None:
        """Do jobs in their order; in the writer's thread. Appends that follow each other share puts."""
        gathered: dict[str, list[Ask]] = {}
        self._committer.begin()
        for job in jobs:
            ask = _append_of(job)
            if ask is None or any(require.key in gathered for require in ask.requires):
                self._flush(gathered)
            if ask is None:
                self._run_one(job)
            else:
                gathered.setdefault(ask.change.key, []).append(ask)
        self._flush(gathered)
        self._appender.tidy()
        self._garbage.remove(late=True)

    def _run_one(self, job: Job) -> None:
        try:
            job.outcomes = self._committer.commit(job.changes)
        except StorageError as error:
            job.error = error

    def _flush(self, gathered: dict[str, list[Ask]]) -> None:
        """Do the appends that were gathered, those of several logs at once."""
        if not gathered:
            return
        self._committer.begin()
        self._objects.together(self._append, list(gathered.items()))
        for key, asks in gathered.items():
            if any(ask.refusal for ask in asks):
                self._withdraw(key, asks)
        gathered.clear()

    def _append(self, work: tuple[str, list[Ask]]) -> None:
        key, asks = work
        failure: StorageError | None = None
        try:
            self._appender.add(key, asks)
        except StorageError as error:
            self._appender.forget(key)
            failure = error
        for ask in asks:
            ask.job.error = ask.error or failure
            ask.job.outcomes = [*[None] * len(ask.requires), ask.added if isinstance(ask.change, Append) else None]

    def _withdraw(self, key: str, asks: Sequence[Ask]) -> None:
        """Take out of a log what was put although what it requires had gone.

        What is not there has gone along with what it requires, and was there before that. If only some of an append is,
        others have met it: it cannot be said that nothing was changed.
        """
        needed = {each for ask in asks if not ask.refusal for each in _ids(ask)}
        refused = [ask for ask in asks if ask.refusal]
        lines = frozenset(line for ask in refused for line in ask.lines if codec.written_id(line) not in needed)
        try:
            with after_writing():
                outcomes = self._committer.commit([Withdraw(key, lines)])
        except DurabilityError as error:
            for ask in refused:
                ask.job.error = error
            return
        taken = set(cast("list[bytes]", outcomes[0]))
        for ask in refused:
            left = lines.intersection(ask.lines) - taken
            if not taken.isdisjoint(ask.lines):
                ask.job.error = unknown(ask.refusal) if left and ask.refusal else ask.refusal

    def _idle(self) -> float | None:
        """Fold logs that have grown, and remove what nobody needs; return when there is more to do."""
        return 0.0 if self._appender.fold_one() else self._garbage.remove()

    # --- maintenance ---------------------------------------------------------------------------------

    async def obstacles(self, *, fix: bool = False) -> list[Problem]:
        self._check_open()
        return []

    async def verify(self, *, fix: bool = False) -> list[Problem]:
        verifier = Verifier(self._contents, self.config)
        problems = await self._in_thread(lambda: verifier.problems(fix=fix))
        for key in await self._in_thread(verifier.torn):
            if fix:
                await self._commit([verifier.mend(key)])
            problems.append(Problem("torn-tail", key, "The log ends in half a line.", fixed=fix))
        return problems


class _Stream(Generic[T]):
    """An iterator that threads use one after the other; a caller who is cancelled ends it while one may be at it."""

    def __init__(self, begin: Callable[[], Iterator[T]]) -> None:
        self._begin = begin
        self._items: Iterator[T] | None = None
        self._has_ended = False
        self._state = threading.Lock()

    def next(self) -> list[T]:
        """Return the next item, or nothing behind the last."""
        with self._state:
            if self._has_ended:
                return []
            if self._items is None:
                self._items = self._begin()
            return list(islice(self._items, 1))

    def end(self) -> None:
        """Let go of what it holds."""
        with self._state:
            self._has_ended = True
            if isinstance(self._items, Generator):
                self._items.close()


_APPENDS = (Append, Extend)


def _append_of(job: Job) -> Ask | None:
    """Return the append of a commit of one append and maybe what it requires; None if it is another kind of commit."""
    changes = job.changes
    if not changes or type(changes[-1]) not in _APPENDS:
        return None
    requires = changes[:-1]
    for each in requires:
        if type(each) is not Require:
            return None
    return Ask(changes[-1], job, requires)


def _ids(ask: Ask) -> Iterable[str]:
    """Return the ids of what an append holds, as far as it could be there already."""
    change = ask.change
    return (change.ids or map(codec.written_id, change.lines)) if isinstance(change, Append) else ()
