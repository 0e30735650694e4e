"""Keeping the derived indexes of users up to date with the files, and doing without where that cannot be done.

An index notes the cursor up to which it has taken in the changes of the store. Whoever wants an answer asks the backend
what changed since, takes that in, and only then looks. Where the backend cannot tell, the stamps of everything are
compared. What was changed by hand behind the library's back is found when a row that it concerns is returned, and by
`reindex`.

Two processes may bring one index up to date at the same time: each reads the files without holding the index, and its
changes count only if the index is still as it was when it began. The other one begins again, from where the first got.
"""

from __future__ import annotations

import asyncio
import os
import threading
import unicodedata
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, TypeVar

import msgspec

from ..backends.base import Capability, Changes
from ..backends.readers import Readers
from ..errors import UnavailableError
from ..layout import escape
from ..models import HitKind
from ..search.texts import Lines, Log, Meta, Note, Notes, line_hash
from . import searched
from .documents import Documents
from .store import Store, logger

if TYPE_CHECKING:
    import sqlite3

    from ..search.database import Build, IndexFile
    from ..search.intake import Intake

FORMAT: Final = "3"
"""Of an index; one of another format is built anew."""

SMALL_SESSIONS: Final = 200
"""Users with fewer sessions get no catalogue: listing them from their files is quick."""
SMALL_TEXTS: Final = 2000
"""Histories of fewer texts are searched by reading them."""

T = TypeVar("T")

_OPEN = 32
_IN_MEMORY = 256
"""Users whose catalogues are kept in memory, some 140 KiB for 1,000 sessions."""
_READERS = 32
"""Threads, started when they are needed; some of them may wait for an index that somebody else is writing."""
_BATCH_BYTES = 8 << 20
_SESSIONS_AT_A_TIME = 256
_ATTEMPTS = 5

Part = Literal["messages", "context", "analyses"]
_ALL: Final[frozenset[Part]] = frozenset(("messages", "context", "analyses"))

Progress = Callable[[int, int], None]
"""Is told how many of how many sessions were taken in."""


class Task(msgspec.Struct):
    """What of a session may have to be taken in."""

    parts: set[Part]
    log_stamp: str | None = None
    context_stamp: str | None = None
    reset: bool = False
    """Whether what was taken in is known to be wrong."""


class Indexing:
    """The indexes of a store's users."""

    def __init__(self, store: Store, documents: Documents) -> None:
        self._store = store
        self._documents = documents
        self._files: dict[str, IndexFile] = {}
        self._in_memory: dict[str, IndexFile] = {}
        self._told: set[str] = set()
        # Not the threads of the backend: who waits for an index that is locked must not keep others from the files.
        self._readers = Readers(_READERS)
        self._closed = False
        self.counters = dict.fromkeys(("index_builds", "index_updates", "index_fallbacks"), 0)

    # --- which file ----------------------------------------------------------------------------------

    async def file(self, user_id: str) -> IndexFile | None:
        """Return the index of a user, there or not; None if the store can have none."""
        folder = await self._folder()
        if folder is None:
            return None
        file = self._files.get(user_id)
        if file is None:
            from ..search.database import IndexFile  # brings in sqlite3

            path = os.path.join(folder, self._store.layout.index_name(user_id))
            if len(self._files) >= _OPEN:
                oldest = self._files.pop(next(iter(self._files)))
                await asyncio.to_thread(oldest.retire)
            file = IndexFile(path, self._fingerprint(), read_only=self._store.read_only)
            if self._closed:
                await asyncio.to_thread(file.retire)
        else:
            del self._files[user_id]
        self._files[user_id] = file  # at the end: the one that was used last
        return file

    async def catalogue(self, user_id: str) -> IndexFile | None:
        """Return what holds a user's catalogue: the index, or memory where a store has no place for files."""
        file = await self.file(user_id)
        if file is not None or Capability.EXTENTS not in (await self._store.reading()).capabilities:
            return file
        from ..search.database import CatalogueInMemory

        file = self._in_memory.pop(user_id, None) or CatalogueInMemory()
        self._in_memory[user_id] = file  # at the end: the one that was used last
        if len(self._in_memory) > _IN_MEMORY:
            oldest = self._in_memory.pop(next(iter(self._in_memory)))
            await asyncio.to_thread(oldest.retire)
        if self._closed:
            await asyncio.to_thread(file.retire)
        return file

    async def _folder(self) -> str | None:
        backend = await self._store.reading()
        if Capability.EXTENTS not in backend.capabilities:
            return None
        elsewhere = self._store.config.search_index_path
        if elsewhere:
            store = escape(self._store.store_id)
            return os.path.join(elsewhere, store) if store else None
        return backend.index_folder()

    def _fingerprint(self) -> str:
        config = self._store.config
        searched = f"{config.search_include_message_content:d}{config.search_include_metadata:d}"
        return f"{FORMAT} unicode={unicodedata.unidata_version} searched={searched} store={self._store.store_id}"

    async def is_possible(self, user_id: str) -> bool:
        """Return whether a user has an index or can get one."""
        if await self._folder() is None:
            return False
        return not self._store.read_only or await self.exists(user_id)

    async def exists(self, user_id: str) -> bool:
        """Return whether a user has an index."""
        folder = await self._folder()
        if folder is None:
            return False
        known = self._files.get(user_id)
        if known is not None and known.seen is not None:  # it was, a moment ago; whoever uses it looks again
            return True
        path = os.path.join(folder, self._store.layout.index_name(user_id))
        return await asyncio.to_thread(os.path.exists, path)

    async def remove(self, user_id: str) -> None:
        """Delete the index of a user, so that nothing that was in it can be read any more."""
        if (kept := self._in_memory.pop(user_id, None)) is not None:
            await asyncio.to_thread(kept.retire)
        folder = await self._folder()
        if folder is None:
            return
        path = os.path.join(folder, self._store.layout.index_name(user_id))
        # One that is being built counts, too: it may hold what is gone by now.
        names = [path, f"{path}.new", f"{path}.lock"]
        if await asyncio.to_thread(lambda: any(map(os.path.lexists, names))):
            file = await self.file(user_id)
            if file is not None:
                await asyncio.to_thread(file.remove)

    async def close(self) -> None:
        """Close every index; what is still at work with one closes it when it has done."""
        self._closed = True
        files = [*self._files.values(), *self._in_memory.values()]
        self._files, self._in_memory = {}, {}
        await asyncio.to_thread(self._retire, files)

    def _retire(self, files: Iterable[IndexFile]) -> None:
        for file in files:
            file.retire()
        self._readers.close()

    def look(self, work: Callable[[], T]) -> Awaitable[T]:
        """Look into an index in a thread that takes less time to get to than one of the loop's."""
        return asyncio.to_thread(work) if self._closed else self._readers.run(work)

    # --- doing without -------------------------------------------------------------------------------

    def fall_back(self, file: IndexFile, reason: object) -> None:
        """Note that the files answer instead of an index; say so once for each reason."""
        self.counters["index_fallbacks"] += 1
        text = f"The index {file.path} is not used: {reason}. The files are read instead."
        if text not in self._told:
            if len(self._told) >= 1000:
                self._told.clear()
            self._told.add(text)
            logger.warning("%s", text)

    # --- the full text -------------------------------------------------------------------------------

    async def current(self, user_id: str) -> IndexFile | None:
        """Return a user's index after bringing its full text up to date; None if the files have to answer.

        One that is damaged or outdated is built anew. None that is absent is built; see `build`.
        """
        from ..search.database import IndexAbsent, IndexDamaged, IndexUnusable

        if not await self.exists(user_id):
            return None
        file = await self.file(user_id)
        if file is None:
            return None
        try:
            for _ in range(_ATTEMPTS):
                if await self._catch_up(user_id, file):
                    return file
            raise IndexUnusable("other processes are at it all the time")
        except IndexAbsent as error:
            if isinstance(error, IndexDamaged):
                self.fall_back(file, error)
            return None if self._store.read_only else await self.build(user_id)
        except IndexUnusable as error:
            self.fall_back(file, error)
            return None

    async def _catch_up(self, user_id: str, file: IndexFile) -> bool:
        """Take in what changed; return False if another came before, or the index has no full text."""
        from ..search.database import IndexAbsent, IndexUnusable
        from ..search.rows import read_logs, read_meta

        backend = await self._store.reading()
        if file.seen is not None:
            generation = file.generation
            changes = await backend.changes(file.seen)
            if changes.cursor and self._concerning(user_id, changes) == {} and file.generation == generation:
                file.seen = changes.cursor
                return True

        def look(session_ids: Collection[str] | None) -> tuple[Meta, dict[str, Log]]:
            with file.reading() as connection:
                return read_meta(connection), read_logs(connection, session_ids)

        meta, _ = await asyncio.to_thread(look, ())
        if not meta.text:
            if self._store.read_only:
                raise IndexUnusable("it has no full text")
            raise IndexAbsent("it has no full text yet")
        changes = await backend.changes(meta.cursor)
        concerned = self._concerning(user_id, changes)
        _, logs = await asyncio.to_thread(look, concerned)
        if concerned is None:
            tasks = await self._compare(user_id, logs)
        else:
            tasks = {session_id: Task(set(parts)) for session_id, parts in concerned.items()}
        if tasks and not await self._take_in(user_id, file, meta, logs, tasks, changes.cursor):
            return False
        if changes.cursor:
            file.seen = changes.cursor
        return True

    def _concerning(self, user_id: str, changes: Changes) -> dict[str, set[Part]] | None:
        """Return which parts of which sessions of a user changed; None: any may have."""
        if changes.keys is None:
            return None
        layout = self._store.layout
        folder = layout.parent("session", user_id=user_id)
        start = f"{folder}/"
        found: dict[str, set[Part]] = {}
        for key in changes.keys:
            if not key.startswith(start):
                if start.startswith(f"{key}/"):
                    return None
                continue
            child, _, rest = key[len(start) :].partition("/")
            session_id = layout.parse_child("session", child)
            if session_id is None or rest == layout.leaf("session"):
                continue
            parts = found.setdefault(session_id, set())
            if not rest:
                parts |= _ALL
            elif rest == layout.leaf("messages"):
                parts.add("messages")
            elif rest == layout.leaf("context"):
                parts.add("context")
            elif rest.partition("/")[0] == self._store.config.document_storage_subdirectory_name:
                parts.add("analyses")
        return {session_id: parts for session_id, parts in found.items() if parts}

    async def _compare(self, user_id: str, logs: Mapping[str, Log]) -> dict[str, Task]:
        """Return what may have changed by the stamps of everything."""
        layout = self._store.layout
        backend = await self._store.reading()
        ids = await self._store.ids("session", user_id=user_id)
        tasks: dict[str, Task] = {}
        for start in range(0, len(ids), _SESSIONS_AT_A_TIME):
            some = ids[start : start + _SESSIONS_AT_A_TIME]
            keys = [
                layout.key(entry, user_id=user_id, session_id=session_id)
                for session_id in some
                for entry in ("messages", "context", "documents")
            ]
            stamps = await backend.stamps(keys)
            for number, session_id in enumerate(some):
                log_stamp, context_stamp, documents_stamp = stamps[3 * number : 3 * number + 3]
                known = logs.get(session_id)
                parts: set[Part] = set()
                if known is None:
                    grown = log_stamp is not None
                else:
                    grown = known.log_stamp != log_stamp or (known.log_stamp is None and known.messages > 0)
                if grown:
                    parts.add("messages")
                if context_stamp != (None if known is None else known.context_stamp):
                    parts.add("context")
                if documents_stamp is not None or (known is not None and known.has_documents):
                    parts.add("analyses")  # one may have changed without the other files
                if parts:
                    tasks[session_id] = Task(parts, log_stamp, context_stamp)
        tasks |= {session_id: Task(set(_ALL)) for session_id in logs.keys() - set(ids)}
        return tasks

    async def _take_in(
        self,
        user_id: str,
        file: IndexFile,
        meta: Meta,
        logs: Mapping[str, Log],
        tasks: Mapping[str, Task],
        cursor: str,
    ) -> bool:
        """Bring an index up to date; return False if another process came before."""
        from ..search.rows import read_meta, write_meta

        version = meta.version

        def write(pieces: list[Lines | Notes], gone: Sequence[str], ended: bool) -> bool:
            with file.writing() as connection:
                if read_meta(connection).version != version:
                    return False
                intake = self._intake(connection)
                intake.take(pieces)
                intake.drop(gone)
                if ended and cursor:
                    write_meta(connection, cursor=cursor)
                write_meta(connection, version=version + 1)
            return True

        gather = _Gathering(self._store, self._documents, user_id, logs, tasks)
        self.counters["index_updates"] += 1
        async for pieces, gone in gather.batches():
            if not await asyncio.to_thread(write, pieces, gone, False):
                return False
            version += 1
        return await asyncio.to_thread(write, gather.rest, gather.gone, True)

    def _intake(self, connection: sqlite3.Connection, *, fresh: bool = False) -> Intake:
        from ..search.intake import Intake

        config = self._store.config
        return Intake(
            connection,
            content=config.search_include_message_content,
            metadata=config.search_include_metadata,
            fresh=fresh,
        )

    async def doubt(self, user_id: str, file: IndexFile, session_ids: Iterable[str]) -> bool:
        """Take sessions in anew, for a row of theirs was not what the files say; return False if it did not work."""
        from ..search.database import IndexUnusable
        from ..search.rows import read_logs, read_meta

        wanted = sorted(set(session_ids))

        def look() -> tuple[Meta, dict[str, Log]]:
            with file.reading() as connection:
                return read_meta(connection), read_logs(connection, wanted)

        try:
            meta, logs = await asyncio.to_thread(look)
            tasks = {session_id: Task(set(_ALL), reset=True) for session_id in wanted}
            return await self._take_in(user_id, file, meta, logs, tasks, "")
        except IndexUnusable as error:
            self.fall_back(file, error)
            return False

    async def build(self, user_id: str) -> IndexFile | None:
        """Build a user's index anew; None if that cannot be done."""
        from ..search.database import IndexUnusable

        file = await self.file(user_id)
        if file is None:
            return None
        try:
            await self._build(user_id, file, None)
        except IndexUnusable as error:
            self.fall_back(file, error)
            return None
        return file

    async def rebuild(self, user_id: str, progress: Callable[[str, int, int], None] | None) -> None:
        """Build a user's index anew.

        Raises:
            UnavailableError: That cannot be done.
        """
        from ..search.database import IndexUnusable

        file = await self.file(user_id)
        if file is None:
            raise UnavailableError("This store has no search indexes.", hint="A store of files has.")
        try:
            await self._build(user_id, file, None if progress is None else partial(progress, user_id))
        except IndexUnusable as error:
            raise UnavailableError(f"The index {file.path} cannot be built: {error}.") from error

    async def _build(self, user_id: str, file: IndexFile, progress: Progress | None) -> None:
        from ..search.rows import write_meta

        async with building(file) as build:
            backend = await self._store.reading()
            cursor = (await backend.changes(None)).cursor
            intake = await asyncio.to_thread(build.work, partial(self._intake, build.connection, fresh=True))
            tasks = await self._compare(user_id, {})
            gather = _Gathering(self._store, self._documents, user_id, {}, tasks, progress)
            async for pieces, _ in gather.batches():
                await asyncio.to_thread(build.work, intake.take, pieces)

            def finish() -> None:
                intake.take(gather.rest)
                intake.finish()
                write_meta(build.connection, version=0)
                if cursor:
                    write_meta(build.connection, cursor=cursor)

            await asyncio.to_thread(build.work, finish)
            await asyncio.to_thread(build.install)
        self.counters["index_builds"] += 1
        await asyncio.to_thread(file.close)
        file.forget()
        if cursor:
            file.seen = cursor


@asynccontextmanager
async def building(file: IndexFile) -> AsyncIterator[Build]:
    """Begin to build an index, and abandon it if it is not installed at the end, for whatever reason.

    Raises:
        IndexUnusable: It cannot be built.
    """
    from ..search.database import Build

    lock = threading.Lock()
    builds: list[Build] = []
    wanted = True

    def begin() -> Build:
        build = Build(file)
        with lock:
            builds.append(build)
            unwanted = not wanted
        if unwanted:  # who waited for it was cancelled, and a thread cannot be
            build.abandon()
        return build

    def end() -> None:
        nonlocal wanted
        with lock:
            wanted = False
        for build in builds:
            build.abandon()

    try:
        yield await asyncio.to_thread(begin)
    finally:
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, end))


class _Gathering:
    """Reads what is to be taken in, as little at a time as a transaction should hold."""

    def __init__(
        self,
        store: Store,
        documents: Documents,
        user_id: str,
        logs: Mapping[str, Log],
        tasks: Mapping[str, Task],
        progress: Progress | None = None,
    ) -> None:
        self._store = store
        self._documents = documents
        self._user_id = user_id
        self._logs = logs
        self._tasks = tasks
        self._progress = progress
        self._size = 0
        self.rest: list[Lines | Notes] = []
        """What came after the last batch."""
        self.gone: list[str] = []
        """Sessions of which nothing is left."""

    async def batches(self) -> AsyncIterator[tuple[list[Lines | Notes], list[str]]]:
        """Yield pieces, and the sessions that are gone, whenever there is enough of them."""
        ids = list(self._tasks)
        done = 0
        for start in range(0, len(ids), _SESSIONS_AT_A_TIME):
            some = ids[start : start + _SESSIONS_AT_A_TIME]
            left = await self._notes(some)
            for session_id in some:
                if "messages" in self._tasks[session_id].parts:
                    async for enough in self._lines(session_id, left):
                        if enough:
                            yield self._batch()
                done += 1
                if self._progress is not None and done % 50 == 0:
                    self._progress(done, len(ids))
        if self._progress is not None:
            self._progress(done, len(ids))

    def _batch(self) -> tuple[list[Lines | Notes], list[str]]:
        batch = (self.rest, self.gone)
        self.rest, self.gone, self._size = [], [], 0
        return batch

    async def _lines(self, session_id: str, left: Collection[str]) -> AsyncIterator[bool]:
        """Gather what is new in a log; yield after each part whether a batch is full."""
        backend = await self._store.reading()
        key = self._store.layout.key("messages", user_id=self._user_id, session_id=session_id)
        task = self._tasks[session_id]
        known = None if task.reset else self._logs.get(session_id)
        goes_on = known is not None and known.last_hash is not None
        identity = known.identity if known is not None and goes_on else None
        start = known.last if known is not None and goes_on else 0
        first = True
        while True:
            part = await backend.read_log_part(key, identity, start)
            if part is None:
                if session_id not in left and "context" in task.parts and "analyses" in task.parts:
                    self.gone.append(session_id)
                elif session_id in self._logs or not first:
                    self.rest.append(Lines(session_id, True, None, []))
                return
            lines = part.lines
            reset = first or part.start != start or part.identity != identity
            if first and goes_on and known is not None and part.identity == identity and part.start == start:
                if lines and lines[0][0] == known.last and line_hash(lines[0][1]) == known.last_hash:
                    lines, reset = lines[1:], False
                else:
                    goes_on, identity, start = False, None, 0
                    continue
            self.rest.append(Lines(session_id, reset, part.identity, lines, task.log_stamp))
            self._size += part.end - part.start + 200 * len(lines)
            first = False
            yield self._size >= _BATCH_BYTES
            if not part.more:
                return
            identity, start = part.identity, part.end

    async def _notes(self, session_ids: Sequence[str]) -> set[str]:
        """Gather the contexts and analyses of some sessions; return which of them have any."""
        by_session: dict[str, list[Note]] = {}
        wanted: dict[HitKind, list[str]] = {
            "context": [each for each in session_ids if "context" in self._tasks[each].parts],
            "analysis": [each for each in session_ids if "analyses" in self._tasks[each].parts],
        }
        texts = await searched.contexts(self._store, self._user_id, wanted["context"])
        found = searched.analyses(self._store, self._documents, self._user_id, wanted["analysis"])
        texts += [text async for text in found]
        for text in texts:
            note = Note(text.kind, text.filename or "", text.timestamp, text.text)
            by_session.setdefault(text.session_id, []).append(note)
        for session_id in session_ids:
            task = self._tasks[session_id]
            kinds: list[HitKind] = ["context"] if "context" in task.parts else []
            kinds += ["analysis"] if "analyses" in task.parts else []
            notes = by_session.get(session_id, [])
            if kinds and (notes or session_id in self._logs or task.context_stamp is not None):
                self.rest.append(Notes(session_id, tuple(kinds), notes, task.context_stamp))
        return set(by_session)
