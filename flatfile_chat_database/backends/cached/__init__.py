"""A store with a cache in front of it: Redis or Valkey, which several nodes share.

What is read often is kept there: documents, pages of logs and how many records they have. What is written goes to the
store alone, and what the cache had of it is dropped. The store is the truth; the cache may be dead, slow, flushed or
started again at any moment, which costs speed alone.

Who reads after a write was acknowledged sees it, on every node. Why:

1. A write marks its keys in the cache, commits, and then drops what the cache has under them (`entries.py`,
   `marks.py`). It is acknowledged after that. Whatever a reader takes from the cache later was put there after the
   drop, on the condition that the key's generation was the same before the store was read: so the store was read after
   the drop, or the generation would be gone. Generations are random, so none comes again after a flush, eviction or
   expiry. The mark before the commit is for a writer that dies between commit and drop, and so that no reader sees the
   new and then the old while the write is under way: unless a flush or an eviction takes the mark away before.
2. A write that cannot reach the cache has the store say that nobody may use it (`roll.py`), and is acknowledged when
   nobody does: who uses the cache has looked whether it may within the last `cache_lease_seconds`. If it knew before
   the commit, the store says so before the commit. That wait is the only one, and the next writes have none.
3. The store also says which run of the server it is. A server that was started again, with what an old file of it has,
   or a replica in its place, or another server by a slip of the configuration, is another run, and not used until the
   store says so, under names that nothing old has.

So a node may be cut off from the cache while the others are not, and nothing is stale. Writers that know nothing of the
cache (another tool, a hand edit, a manager with the URL of the store alone) drop nothing there: what they change is
seen after `cache_entry_seconds` at the latest.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

from ... import codec
from ...config import StorageConfig
from ...errors import (
    ClosedError,
    ConfigurationError,
    ConflictError,
    DurabilityError,
    IntegrityError,
    NotFoundError,
    StorageError,
    UnavailableError,
    ValidationError,
)
from ...layout import Layout
from ...models import Problem
from .. import forks
from ..base import Changes, LogPart, Snapshot, StorageBackend
from ..behind import touched
from ..changes import Change, Delete, Outcome, Put
from ..readers import Readers
from ..rules import check_change, check_key, check_lines
from ..shown import Shown, ended
from ..turn import to_the_end
from ..waking import Waking
from ..wording import Words
from .entries import (
    COUNT,
    DOCUMENT,
    WHOLE,
    WithLine,
    decoded,
    is_whole,
    pack_count,
    pack_document,
    pack_records,
    page_field,
    unpack_count,
    unpack_decoded,
    unpack_document,
    unpack_records,
)
from .roll import Phase, Roll, Word, clock, is_same

try:
    from .keeper import Keeper
    from .marks import Mark, Marks
    from .news import News, places
    from .server import Server
    from .shelf import MISSING, Fill, Missing, Place, Seen, Shelf, Take
except ImportError as error:
    raise ConfigurationError(
        f"A cache needs the extra `redis` ({error}).", hint="pip install 'flatfile-chat-database[redis]'"
    ) from error

T = TypeVar("T")

_THREADS = 4
_NOTHING_CHANGED = (
    ConflictError,
    ConfigurationError,
    IntegrityError,
    NotFoundError,
    UnavailableError,
    ValidationError,
)
"""Errors of the store after which nothing is written, now or later."""
_ANYTHING = ("/",)
"""What is touched when it cannot be told."""


class CachedBackend(StorageBackend):
    """A backend with a cache in front of it."""

    def __init__(self, config: StorageConfig, store: StorageBackend, url: str) -> None:
        """Put the cache at `url` in front of `store`.

        Raises:
            ConfigurationError: It is no URL of a server.
        """
        super().__init__(config)
        self.capabilities = store.capabilities
        self.layout = Layout(config)
        self._store = store
        if isinstance(root := getattr(store, "root", None), str):
            self.root = root
        self._url = url
        self._roll = Roll(store, self.layout.cache_state, config.cache_lease_seconds)
        self._closed = False
        self._usable = False
        """Whether it is open, and this is the process that has opened it."""
        self._make()

    def _make(self) -> None:
        """Make what belongs to this process alone."""
        seconds, use = self.config.cache_timeout_seconds, weakref.WeakMethod(self._use)
        self._server = Server(self._url, seconds)
        self._readers = Readers(_THREADS)
        self._shelf = Shelf(self.config, self._server, self._readers)
        self._marks = Marks(self._server, seconds)
        self._waking = Waking()
        # The threads hold no reference to this object, and end when it is forgotten without `close`.
        self._news = News(self._server, self._waking, lambda: method() if (method := use()) else None)
        self._forgotten = [weakref.finalize(self, self._news.let_go)]
        self._keeper: Keeper | None = None
        self._state = threading.Lock()
        self._idle = threading.Condition(self._state)
        self._under_way: set[object] = set()

    def __repr__(self) -> str:
        return f"<CachedBackend {self._store!r} {self._server!r}{' closed' if self._closed else ''}>"

    # --- life ----------------------------------------------------------------------------------------

    async def open(self) -> None:
        await self._store.open()
        if not self._usable and not self._closed:
            forks.remember(self)
            self._usable = True

    async def close(self) -> None:
        with self._state:
            self._closed, self._usable = True, False
            keeper, self._keeper = self._keeper, None
        self._waking.close()
        await asyncio.to_thread(self._finish, keeper)
        await self._store.close()

    def _finish(self, keeper: Keeper | None) -> None:
        """Wait for what was begun, and end the threads; blocks."""
        with self._idle:
            self._idle.wait_for(lambda: not self._under_way)
        for finalizer in self._forgotten:
            finalizer.detach()
        if keeper is not None:
            keeper.stop()
        self._news.stop()
        self._marks.close()
        self._readers.close()
        self._shelf.close()
        self._server.close()

    def let_go_after_fork(self) -> None:
        """In a forked child: the connections, the threads and what is under way are the parent's."""
        self._usable = False
        for finalizer in self._forgotten:
            finalizer.detach()
        self._make()

    def statistics(self) -> dict[str, int]:
        return {**self._store.statistics(), **self._shelf.counters}

    @property
    def store(self) -> StorageBackend:
        """The store behind the cache."""
        return self._store

    @property
    def uncached(self) -> StorageBackend:
        return self._store.uncached

    async def is_behind(self) -> bool:
        return await self._store.is_behind()

    @property
    def origin(self) -> str:
        return self._store.origin

    # --- what the store says of the cache ------------------------------------------------------------

    async def word(self) -> Word | None:
        """Return what the store says of its cache; None if it cannot be asked, or this is not open."""
        if not self._usable:
            return None
        word, now = self._roll.now(), clock()
        keeper = self._keeper
        if keeper is not None:
            keeper.used = now
        if word is None:
            if keeper is not None:
                keeper.wake()  # it has been asleep
            try:
                word = await self._roll.at(now)
            except StorageError:  # whatever is done next says so
                return None
        if keeper is None and word.phase is not Phase.CLOSED:
            self._keep()
        return word

    def _keep(self) -> Keeper | None:
        """Return the keeper, begun if need be; None if this is not open any more, or it cannot be begun."""
        with self._state:
            if self._keeper is None and self._usable:
                with suppress(OSError, RuntimeError):  # no thread or descriptor is left now: the next call tries again
                    self._keeper = Keeper(self._roll, self._server, self._readers)
                    self._forgotten.append(weakref.finalize(self, self._keeper.let_go))
            return self._keeper

    # --- writing -------------------------------------------------------------------------------------

    async def commit(self, changes: Sequence[Change]) -> list[Outcome]:
        for change in changes:
            check_change(change)
        return await self._to_the_end(touched(changes), lambda: self._store.commit(changes))

    async def write(self, key: str, data: bytes) -> bool:
        await self.commit([Put(key, bytes(data))])
        return True

    async def delete(self, key: str) -> bool:
        return bool((await self.commit([Delete(key)]))[0])

    async def append(self, key: str, data: bytes) -> bool:
        check_lines(check_key(key), data)
        return await self._to_the_end([key], lambda: self._store.append(key, data))

    async def load(self, items: Sequence[tuple[str, bytes]]) -> None:
        await self._to_the_end([check_key(key) for key, _ in items], lambda: self._store.load(items))

    async def write_blob(self, key: str, chunks: AsyncIterator[bytes]) -> bool:
        names = [check_key(key)]
        # Not to the end: whoever gives up while it is being sent wants it to stop.
        with self._begun(names) as is_seen:
            if not is_seen:
                return await self._store.write_blob(key, chunks)
            return await self._write(names, lambda: self._store.write_blob(key, chunks))

    async def set_aside(self, key: str, reason: str) -> str:
        return await self._to_the_end(_ANYTHING, lambda: self._store.set_aside(key, reason))

    async def obstacles(self, *, fix: bool = False) -> list[Problem]:
        if not fix:
            return await self._store.obstacles()
        return await self._to_the_end(_ANYTHING, lambda: self._store.obstacles(fix=True))

    async def verify(self, *, fix: bool = False) -> list[Problem]:
        if not fix:
            return await self._store.verify()
        return await self._to_the_end(_ANYTHING, lambda: self._store.verify(fix=True))

    async def _to_the_end(self, names: Sequence[str], work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        with self._begun(names) as is_seen:
            return await to_the_end(self._write(names, work) if is_seen else work())

    @contextmanager
    def _begun(self, names: Sequence[str]) -> Iterator[bool]:
        """Let `close` wait for a write of keys and folders; show whether the cache has to do with it.

        Raises:
            ClosedError: It is closed, or being closed.
        """
        token = object()
        with self._state:
            if self._closed:
                raise ClosedError("The store is closed.", hint="Open a new StorageManager.")
            if is_seen := bool(names) and self._usable:
                self._under_way.add(token)
        try:
            yield is_seen
        finally:
            with self._idle:
                self._under_way.discard(token)
                self._idle.notify_all()

    async def _write(self, names: Sequence[str], work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do work on the store that changes keys and folders; return when no reader takes what was before."""
        keeper = self._keeper or self._keep()
        word = await self.word()
        mark: Mark | None = None
        if word is not None and word.is_written:
            mark = self._marks.mark(word, names)
            if not await self._marks.begin(mark):
                await self._roll.give_up(word, self._server.problem or "it did not answer in time")
                # First: or one would read what is written from the store, and a later one the old from the cache.
                await self._roll.wait_until_settled()
        try:
            result = await work()
        except _NOTHING_CHANGED:
            if mark is not None:
                await to_the_end(self._marks.end(mark))
            raise
        # After any other error it may be done, or be done later: the mark stays as long as marks do.
        await to_the_end(self._make_seen(names, mark, clock()))
        self._waking.tell(places(names))
        if keeper is not None and not keeper.writes:
            keeper.writes = True
            keeper.wake()
        return result

    async def _make_seen(self, names: Sequence[str], mark: Mark | None, done: float) -> None:
        """Return when no reader takes from the cache what was before a write that was done at a moment."""
        while True:
            try:
                word = await self._roll.at(done)
                if word.is_behind:
                    word = await self._roll.read()  # it was, and has been promoted since
                    if word.is_behind:
                        raise UnavailableError(
                            "The store is a replica that may be behind, and was written all the same."
                        )
                if not word.is_written:
                    if word.phase is Phase.CLOSING:
                        await self._roll.wait_until_settled()
                    return
                if mark is None or not is_same(mark.word, word):
                    mark = self._marks.mark(word, names)
                if await self._marks.end(mark):
                    return
                await self._roll.give_up(word, self._server.problem or "it did not answer in time")
            except StorageError as error:
                raise DurabilityError(
                    f"It is written, but for {self.config.cache_entry_seconds:g} seconds those who read through the "
                    f"cache may not see it: neither could the cache be reached nor the store be told ({error.message})"
                ) from error

    # --- reading, with the cache ---------------------------------------------------------------------

    async def _look(self, keys: Sequence[str], fields: Sequence[str], take: Take[T]) -> list[Seen[T]] | None:
        """Return what the cache has of keys; None if it may not be used, or cannot."""
        word = await self.word()
        if word is None or word.phase is not Phase.OPEN or not self._server.is_up:
            return None
        if self._server.run != word.server:
            self._shelf.connect()  # nobody waits for it
            return None
        return await self._shelf.look(word, keys, fields, take)

    async def read(self, key: str) -> bytes | None:
        check_key(key)
        seen = await self._look([key], [DOCUMENT], _document)
        if seen is None:
            return await self._store.read(key)
        if not isinstance(seen[0].value, Missing):
            return seen[0].value[0]
        data = await self._store.read(key)
        self._shelf.put([_document_fill(seen[0].place, data)])
        return data

    async def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        for key in keys:
            check_key(key)
        seen = await self._look(keys, [DOCUMENT], _document) if keys else None
        if seen is None:
            return await self._store.read_many(keys)
        missing = [at for at, each in enumerate(seen) if each.value is MISSING]
        found = [None if isinstance(each.value, Missing) else each.value[0] for each in seen]
        if missing:
            for at, data in zip(missing, await self._store.read_many([keys[at] for at in missing]), strict=True):
                found[at] = data
            self._shelf.put([_document_fill(seen[at].place, found[at]) for at in missing])
        return found

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
        if strict:  # which is about what the store has
            return await self._store.read_log_as(key, decode, start, stop, strict=True)
        field = page_field(start, stop)

        def take(name: str, values: list[object]) -> list[T] | Missing:
            if values[0] is not None:
                return unpack_decoded(name, field, values[0], decode)
            if values[1] is not None:
                return decoded(unpack_records(name, WHOLE, values[1])[start:stop], decode)
            return MISSING

        seen = await self._look([key], [field, WHOLE], take)
        if seen is None:
            return await self._store.read_log_as(key, decode, start, stop)
        if not isinstance(seen[0].value, Missing):
            return seen[0].value
        if seen[0].place is None:
            return await self._store.read_log_as(key, decode, start, stop)
        found = await self._store.read_log_as(key, WithLine(decode), start, stop)
        self._shelf.put([_records_fill(seen[0].place, start, stop, [line for line, _ in found])])
        return [made for _, made in found]

    async def count_log(self, key: str) -> int:
        check_key(key)

        def take(name: str, values: list[object]) -> int | Missing:
            if values[0] is not None:
                return unpack_count(name, values[0])
            return MISSING if values[1] is None else len(unpack_records(name, WHOLE, values[1]))

        seen = await self._look([key], [COUNT, WHOLE], take)
        if seen is None:
            return await self._store.count_log(key)
        if not isinstance(seen[0].value, Missing):
            return seen[0].value
        count = await self._store.count_log(key)
        self._shelf.put([Fill(seen[0].place, COUNT, lambda name: pack_count(name, count), 0)])
        return count

    async def newest_records(self, keys: Sequence[str]) -> list[bytes | None]:
        for key in keys:
            check_key(key)
        field = page_field(-1, None)

        def take(name: str, values: list[object]) -> list[bytes] | Missing:
            for known, value in zip((field, WHOLE), values, strict=True):
                if value is not None:
                    return unpack_records(name, known, value)[-1:]
            return MISSING

        seen = await self._look(keys, [field, WHOLE], take) if keys else None
        if seen is None:
            return await self._store.newest_records(keys)
        missing = [at for at, each in enumerate(seen) if each.value is MISSING]
        found = [None if isinstance(each.value, Missing) or not each.value else each.value[0] for each in seen]
        if missing:
            lines = await self._store.newest_records([keys[at] for at in missing])
            for at, line in zip(missing, lines, strict=True):
                found[at] = line
            kept = zip(missing, lines, strict=True)
            self._shelf.put([_records_fill(seen[at].place, -1, None, [line] if line else []) for at, line in kept])
        return found

    # --- reading, from the store ---------------------------------------------------------------------

    async def exists(self, key: str) -> bool:
        return await self._store.exists(key)

    async def list_keys(self, prefix: str) -> list[str]:
        return [key for key in await self._store.list_keys(prefix) if key != self._roll.key]

    async def list_children(self, folder: str) -> list[str]:
        return await self._shown(folder, await self._store.list_children(folder))

    async def list_folders(self, folder: str) -> list[str]:
        return await self._shown(folder, await self._store.list_folders(folder))

    async def _shown(self, folder: str, children: list[str]) -> list[str]:
        """Return children but the document of the cache, and a folder that has nothing else in it."""
        own, _, name = self._roll.key.rpartition("/")
        if folder == own:
            return [child for child in children if child != name]
        if not folder and own in children and await self._store.list_children(own) == [name]:
            return [child for child in children if child != own]
        return children

    async def read_folders(self, folder: str, document: str, log: str) -> list[tuple[str, bytes | None, bytes | None]]:
        if not folder:  # where the document of the cache is not to be seen
            return await super().read_folders(folder, document, log)
        return await self._store.read_folders(folder, document, log)

    async def stream_log(self, key: str, *, strict: bool = False) -> AsyncIterator[list[bytes]]:
        async with ended(self._store.stream_log(key, strict=strict)) as runs:
            async for run in runs:
                yield run

    async def stream_log_as(
        self, key: str, decode: Callable[[bytes], T | None], *, strict: bool = False
    ) -> AsyncIterator[Iterable[T]]:
        async with ended(self._store.stream_log_as(key, decode, strict=strict)) as runs:
            async for run in runs:
                yield run

    async def find_record(self, key: str, record_id: str) -> tuple[int, bytes] | None:
        return await self._store.find_record(key, record_id)

    def index_folder(self) -> str | None:
        return self._store.index_folder()

    async def changes(self, cursor: str | None) -> Changes:
        found = await self._store.changes(cursor)
        if found.keys is None:
            return found
        return Changes(found.cursor, found.keys - {self._roll.key})

    async def wait_for_change(self, keys: Sequence[str] | frozenset[str], seconds: float) -> None:
        if self._usable:
            self._news.listen(self._roll.known)
        if self._usable and self._news.is_heard:
            await self._waking.wait(keys, seconds, self._longest_wait)
        else:
            await self._store.wait_for_change(keys, seconds)

    def _longest_wait(self) -> float:
        """Return for how long somebody who waits by now may wait for what others tell."""
        if not self._news.is_heard:  # nobody tells any more, and who waited before has been woken
            return 0.0
        return self.config.cache_entry_seconds  # what is written past the cache is seen as late as by those who read

    def _use(self) -> Word | None:
        """Keep the word of the cache fresh for those who wait; return that of the cache all who write tell."""
        word, keeper = self._roll.now(), self._keeper or self._keep()
        if keeper is not None:
            keeper.used = clock()
            if word is None:
                keeper.wake()
        return word if word is not None and word.phase is Phase.OPEN else None

    async def stamps(self, keys: Sequence[str]) -> list[str | None]:
        return await self._store.stamps(keys)

    async def read_log_part(self, key: str, identity: str | None, start: int) -> LogPart | None:
        return await self._store.read_log_part(key, identity, start)

    async def read_log_at(self, places: Sequence[tuple[str, int, int]]) -> list[bytes | None]:
        return await self._store.read_log_at(places)

    def words(self) -> Words | None:
        return self._store.words()

    async def read_blob(self, key: str) -> AsyncIterator[bytes]:
        async with ended(self._store.read_blob(key)) as chunks:
            async for chunk in chunks:
                yield chunk

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Snapshot]:
        async with self._store.snapshot() as shown:
            yield Shown(self, shown, self._roll.key.__eq__)

    @asynccontextmanager
    async def still(self) -> AsyncIterator[Snapshot]:
        async with self._store.still() as shown:
            yield Shown(self, shown, self._roll.key.__eq__)


def _document(name: str, values: list[object]) -> tuple[bytes | None] | Missing:
    return MISSING if values[0] is None else (unpack_document(name, values[0]),)


def _document_fill(place: Place | None, data: bytes | None) -> Fill:
    return Fill(place, DOCUMENT, lambda name: pack_document(name, data), len(data or b""))


def _records_fill(place: Place | None, start: int, stop: int | None, lines: list[bytes]) -> Fill:
    field = WHOLE if is_whole(start, stop, len(lines)) else page_field(start, stop)
    return Fill(place, field, lambda name: pack_records(name, field, lines), sum(map(len, lines)) + len(lines))
