"""A flat-file backend that tells what changed: what the journal does, in the simplest way."""

from collections.abc import Sequence

from flatfile_chat_database.backends.base import Changes
from flatfile_chat_database.backends.changes import Append, Delete, Edit, Move, Outcome, Put, RemoveTree, Truncate
from flatfile_chat_database.backends.flatfile import FlatfileBackend
from flatfile_chat_database.backends.flatfile.jobs import EngineChange, Extend, Place
from flatfile_chat_database.models import new_id

KEYS: dict[str, list[str]] = {}
"""The keys that were changed, by the folder of the store, through any handle of this process."""

_ID = new_id()  # what another process wrote is not in KEYS


class RecordingBackend(FlatfileBackend):
    """Remembers the keys of every commit; a cursor is how many there were."""

    async def _commit(self, changes: Sequence[EngineChange]) -> list[Outcome]:
        try:
            return await super()._commit(changes)
        finally:
            KEYS.setdefault(self.root, []).extend(key for change in changes for key in _keys(change))

    async def changes(self, cursor: str | None) -> Changes:
        """Return the keys since a cursor."""
        await super().changes(cursor)
        keys = KEYS.setdefault(self.root, [])
        start = f"{_ID}:{self.root}:"
        if cursor is None or not cursor.startswith(start):
            return Changes(f"{start}{len(keys)}", None)
        return Changes(f"{start}{len(keys)}", frozenset(keys[int(cursor.removeprefix(start)) :]))


def _keys(change: EngineChange) -> list[str]:
    match change:
        case Move(source, target):
            return [source, target]
        case RemoveTree(folder):
            return [folder]
        case Put() | Delete() | Append() | Edit() | Truncate() | Extend() | Place():
            return [change.key]
        case _:
            return []
