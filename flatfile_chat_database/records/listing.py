"""Listing the sessions of a user from the catalogue in their index, so that what is not shown is not read.

A store that has no place for indexes, as one on a server has none, keeps its catalogues in the memory of each process.

What is shown is read from its files, and compared: a row that was changed by hand is put right and the page is made
again. A session that appeared or vanished by hand is seen when the backend cannot tell what changed, and by `reindex`;
by other processes that have their catalogue in memory, when they begin anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec

from ..models import microseconds
from ..search.catalogue import Listed
from .indexing import SMALL_SESSIONS, Indexing, building
from .store import Store

if TYPE_CHECKING:
    import sqlite3
    from datetime import datetime

    from ..backends.base import Changes
    from ..search import catalogue
    from ..search.database import IndexFile

_ATTEMPTS = 4
_MOST_USERS = 10_000
_REMEMBERED_KEYS = 10_000
_REMEMBERED_PAGES = 20
_REMEMBERED_ROWS = 1000


class Seen(Protocol):
    """What a session's files say."""

    @property
    def updated(self) -> datetime:
        """When it was updated."""
        ...


SeenT = TypeVar("SeenT", bound=Seen)

Look = Callable[[str, bytes, bytes | None], SeenT | None]
"""Makes of a session's key, its document and the newest line of its log what is to be shown; None if it is damaged."""


class Begun(msgspec.Struct, frozen=True):
    """How things were before all sessions of a user were read."""

    cursor: str
    noted: tuple[str, int] | None
    """See `catalogue.noted`; None where there was no catalogue."""


class Listing:
    """The catalogues of a store's users."""

    def __init__(self, store: Store, indexing: Indexing) -> None:
        self._store = store
        self._indexing = indexing
        self._large: dict[str, bool] = {}
        self._keys: dict[tuple[str, str], str] = {}  # of sessions; to make one takes longer than to read one

    async def page(self, user_id: str, limit: int | None, offset: int, look: Look[SeenT]) -> list[SeenT] | None:
        """Return what the files of a page of sessions say, or None if all files have to be read."""
        if not await self._is_large(user_id) or (file := await self._indexing.catalogue(user_id)) is None:
            return None
        from ..search import catalogue
        from ..search.database import IndexAbsent, IndexUnusable

        def read() -> catalogue.Page:
            with file.reading() as connection:
                return catalogue.page(connection, limit, offset)

        try:
            for _ in range(_ATTEMPTS):
                if not await self._catch_up(user_id, file, look):
                    return None
                generation = file.generation
                page = file.pages.get((limit, offset))
                if page is None:
                    page = await self._indexing.look(read)
                    if file.generation != generation and not file.read_only:
                        continue
                    if len(file.pages) < _REMEMBERED_PAGES and len(page.sessions) <= _REMEMBERED_ROWS:
                        file.pages[limit, offset] = page
                if page.damaged:
                    return None
                ids = [each.session_id for each in page.sessions]
                states = await self._states(user_id, ids, look)
                rows = [row for row in states if not isinstance(row, bool)]
                if [microseconds(row.updated) for row in rows] == [each.updated for each in page.sessions]:
                    return rows
                await self._enter(user_id, file, ids, look, page.version, None)
        except IndexAbsent:
            return None
        except IndexUnusable as error:
            self._indexing.fall_back(file, error)
        return None

    async def count(self, user_id: str, look: Look[SeenT]) -> int | None:
        """Return the number of a user's sessions, or None if the files have to be counted."""
        if not await self._is_large(user_id) or (file := await self._indexing.catalogue(user_id)) is None:
            return None
        from ..search import catalogue
        from ..search.database import IndexAbsent, IndexUnusable

        def read() -> int:
            with file.reading() as connection:
                return catalogue.count(connection)

        try:
            if await self._catch_up(user_id, file, look):
                generation = file.generation
                found = await self._indexing.look(read)
                return found if file.generation == generation or file.read_only else None
        except IndexAbsent:
            return None
        except IndexUnusable as error:
            self._indexing.fall_back(file, error)
        return None

    async def begin(self, user_id: str) -> Begun | None:
        """Return how things are before all files of a large user are read, for `keep`; None if that is no use."""
        if not self._large.get(user_id):
            return None
        file = await self._indexing.catalogue(user_id)
        if file is None or file.read_only or file.listed is not None:  # it is right, and only does not say enough
            return None
        from ..search import catalogue
        from ..search.database import IndexAbsent, IndexUnusable

        def noted() -> tuple[str, int] | None:
            with file.reading() as connection:
                return catalogue.noted(connection)

        try:
            before = await asyncio.to_thread(noted)
        except IndexAbsent:
            before = None
        except IndexUnusable as error:
            self._indexing.fall_back(file, error)
            return None
        cursor = (await (await self._store.reading()).changes(None)).cursor
        return Begun(cursor, before) if cursor else None

    async def keep(self, user_id: str, listed: Sequence[Listed], begun: Begun | None) -> None:
        """Enter all of a user's sessions, as they were read since `begin`; remember how many there are."""
        if len(self._large) >= _MOST_USERS:
            self._large.clear()
        self._large[user_id] = len(listed) >= SMALL_SESSIONS
        if begun is None or not self._large[user_id] or (file := await self._indexing.catalogue(user_id)) is None:
            return
        from ..search import catalogue
        from ..search.database import IndexAbsent, IndexUnusable

        def enter(connection: sqlite3.Connection) -> None:
            catalogue.replace(connection, listed)
            catalogue.note(connection, begun.cursor)

        def write() -> bool:
            with file.writing() as connection:
                if catalogue.noted(connection) != begun.noted:
                    return False  # what others entered meanwhile may be newer than what was read here
                enter(connection)
            return True

        try:
            try:
                if not await asyncio.to_thread(write):
                    return
            except IndexAbsent:
                async with building(file) as build:
                    await asyncio.to_thread(build.work, enter, build.connection)
                    await asyncio.to_thread(build.install)
                await asyncio.to_thread(file.close)
                file.forget()
                backend = await self._store.reading()
                if self._concerning(user_id, await backend.changes(begun.cursor)) is None:
                    await asyncio.to_thread(file.remove)  # the user was deleted, and so was their index, meanwhile
                    return
            file.pages.clear()
            file.listed = begun.cursor
        except IndexUnusable as error:
            self._indexing.fall_back(file, error)

    # --- keeping it up to date -----------------------------------------------------------------------

    async def _is_large(self, user_id: str) -> bool:
        large = self._large.get(user_id)
        if large is None:
            large = self._large[user_id] = await self._indexing.exists(user_id)
        return large

    async def _catch_up(self, user_id: str, file: IndexFile, look: Look[SeenT]) -> bool:
        """Enter what changed; return False if the catalogue has to be made anew."""
        from ..search import catalogue

        backend = await self._store.reading()

        def noted() -> tuple[str, int] | None:
            with file.reading() as connection:
                return catalogue.noted(connection)

        if (cursor := file.listed) is not None:
            generation = file.generation
            changes = await backend.changes(cursor)
            if changes.cursor and self._concerning(user_id, changes) == [] and file.generation == generation:
                file.listed = changes.cursor
                return True
        for _ in range(_ATTEMPTS):
            base = await asyncio.to_thread(noted)
            if base is None:
                file.listed = None
                return False
            changes = await backend.changes(base[0])
            concerned = self._concerning(user_id, changes)
            if concerned is None or not changes.cursor:
                file.listed = None
                return False
            file.pages.clear()
            if not concerned or await self._enter(user_id, file, concerned, look, base[1], changes.cursor):
                file.listed = changes.cursor
                return True
        return False

    def _concerning(self, user_id: str, changes: Changes) -> list[str] | None:
        """Return the sessions of a user whose place in the list may have changed; None: any may have."""
        if changes.keys is None:
            return None
        layout = self._store.layout
        start = f"{layout.parent('session', user_id=user_id)}/"
        leaves = ("", layout.leaf("session"), layout.leaf("messages"))
        found: set[str] = set()
        for key in changes.keys:
            if key.startswith(start):
                child, _, rest = key[len(start) :].partition("/")
                session_id = layout.parse_child("session", child)
                if session_id is not None and rest in leaves:
                    found.add(session_id)
            elif start.startswith(f"{key}/"):
                return None
        return sorted(found)

    async def _states(self, user_id: str, session_ids: Sequence[str], look: Look[SeenT]) -> list[SeenT | bool]:
        """Return what the files of sessions say; True for one that is damaged, False for one that is absent."""
        layout = self._store.layout
        backend = await self._store.uncached.reading()
        keys = [self._key(user_id, each) for each in session_ids]
        tail = layout.leaf("messages")
        logs = [f"{key.rpartition('/')[0]}/{tail}" for key in keys]
        documents = await backend.read_many(keys)
        lines = await backend.newest_records(logs)
        states: list[SeenT | bool] = []
        for key, data, line in zip(keys, documents, lines, strict=True):
            seen = None if data is None else look(key, data, line)
            states.append(data is not None if seen is None else seen)
        return states

    def _key(self, user_id: str, session_id: str) -> str:
        key = self._keys.get((user_id, session_id))
        if key is None:
            if len(self._keys) >= _REMEMBERED_KEYS:
                self._keys.clear()
            key = self._store.layout.key("session", user_id=user_id, session_id=session_id)
            self._keys[user_id, session_id] = key
        return key

    async def _enter(
        self,
        user_id: str,
        file: IndexFile,
        session_ids: Sequence[str],
        look: Look[SeenT],
        version: int,
        cursor: str | None,
    ) -> bool:
        """Enter what the files of sessions say; return False if the catalogue is not of that version any more."""
        from ..search import catalogue
        from ..search.database import IndexUnusable

        if file.read_only:
            raise IndexUnusable("it is behind, and the store was opened read-only")
        states = await self._states(user_id, session_ids, look)
        rows = [
            Listed(session_id, 0 if isinstance(state, bool) else microseconds(state.updated), state is True)
            for session_id, state in zip(session_ids, states, strict=True)
            if state is not False
        ]
        gone = [session_id for session_id, state in zip(session_ids, states, strict=True) if state is False]

        def write() -> bool:
            with file.writing() as connection:
                noted = catalogue.noted(connection)
                if noted is None or noted[1] != version:
                    return False
                catalogue.put(connection, rows)
                catalogue.remove(connection, gone)
                catalogue.note(connection, cursor)
            return True

        file.pages.clear()
        try:
            return await asyncio.to_thread(write)
        finally:
            file.pages.clear()  # one that was read meanwhile, too
