"""The contexts and analyses of users, remembered for as long as the backend says that none has changed.

There are few of them, and they are short; to find out that there is none takes a look at every session. Where a derived
index keeps them this is not needed.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import msgspec

from ..backends.base import Changes
from ..models import HitKind
from . import searched
from .documents import Documents
from .searched import Text
from .store import Store

_MOST_USERS: Final = 100
_MOST_CHARACTERS: Final = 4_000_000
"""Of the texts of one user that are remembered."""
_SESSIONS_AT_A_TIME: Final = 256


class _Remembered(msgspec.Struct):
    cursor: str
    texts: list[Text]


class Noted:
    """What is searched besides messages."""

    def __init__(self, store: Store, documents: Documents) -> None:
        self._store = store
        self._documents = documents
        self._users: dict[str, _Remembered] = {}

    async def texts(self, user_id: str, session_id: str | None, kinds: Collection[HitKind]) -> list[Text]:
        """Return the contexts and analyses of a user, or of one session."""
        if session_id is not None:
            return await self._read(user_id, [session_id], kinds)
        backend = await self._store.reading()
        known = self._users.get(user_id)
        changes = await backend.changes(None if known is None else known.cursor)
        if known is None or self._concern(user_id, changes):
            ids = await self._store.ids("session", user_id=user_id)
            known = _Remembered(changes.cursor, await self._read(user_id, ids, ("context", "analysis")))
            if changes.cursor and sum(text.size for text in known.texts) <= _MOST_CHARACTERS:
                if len(self._users) >= _MOST_USERS:
                    self._users.clear()
                self._users[user_id] = known
        known.cursor = changes.cursor
        return [text for text in known.texts if text.kind in kinds]

    async def _read(self, user_id: str, session_ids: list[str], kinds: Collection[HitKind]) -> list[Text]:
        texts: list[Text] = []
        for start in range(0, len(session_ids), _SESSIONS_AT_A_TIME):
            some = session_ids[start : start + _SESSIONS_AT_A_TIME]
            if "context" in kinds:
                texts += await searched.contexts(self._store, user_id, some)
            if "analysis" in kinds:
                texts += [text async for text in searched.analyses(self._store, self._documents, user_id, some)]
        return texts

    def _concern(self, user_id: str, changes: Changes) -> bool:
        """Tell whether a context or an analysis of a user may have changed, or their sessions."""
        if changes.keys is None:
            return True
        layout = self._store.layout
        start = f"{layout.parent('session', user_id=user_id)}/"
        unconcerned = (layout.leaf("messages"), layout.leaf("session"))
        return any(
            start.startswith(f"{key}/") or (key.startswith(start) and key.rpartition("/")[2] not in unconcerned)
            for key in changes.keys
        )
