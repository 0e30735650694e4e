"""Which table of a database holds what: one for each entry of the map that means something to a person.

The placeholders of an entry's key are columns and the primary key, so every primary key begins with the owner, a user
or a panel. The JSON stands in `body` as it was given; what people ask for is in columns of its own beside it.

Four tables know no map. `entries` names every key, and where its bytes are; `pieces` holds bytes that are no row
anywhere else: uploaded files, the trash, what is no JSON; `lines` holds the messages of logs that are not in their
place, as those in the trash; `changes` names the keys that each of the last transactions changed, for whoever derives
something from them. In SQLite the tables of messages are views; see `staged.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from .. import codec
from ..errors import IntegrityError
from ..layout import Layout, Shape

_NAMES = {
    "user": "users",
    "persona": "personas",
    "session": "sessions",
    "messages": "messages",
    "context": "contexts",
    "context_snapshot": "context_snapshots",
    "documents": "documents",
    "analysis": "analyses",
    "panel": "panels",
    "panel_messages": "panel_messages",
    "panel_persona": "panel_personas",
    "insight": "insights",
    "global_persona": "global_personas",
}
"""The table of each entry that has one."""

_MESSAGE = ("role", "content", "timestamp")
_SHOWN: Mapping[str, tuple[str, ...]] = {
    "user": ("created_at", "updated_at"),
    "persona": ("name",),
    "session": ("title", "created_at", "updated_at"),
    "messages": _MESSAGE,
    "context": ("summary", "timestamp"),
    "context_snapshot": ("summary", "timestamp"),
    "panel": ("type", "created_at"),
    "panel_messages": _MESSAGE,
    "panel_persona": ("name",),
    "insight": ("created_at",),
    "global_persona": ("name",),
}
"""Fields of the JSON that have columns."""


class Table(msgspec.Struct, frozen=True):
    """One table of documents or of messages."""

    name: str
    ids: tuple[str, ...]
    """The columns that say whose it is, in the order of the primary key."""
    shown: tuple[str, ...]
    """The columns that repeat what is in the body."""
    is_log: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """All of them, in their order."""
        return (*self.ids, *(("position", "id") if self.is_log else ()), *self.shown, "body")


class Mapped(msgspec.Struct, frozen=True):
    """Where a database keeps what has a file."""

    entry: str
    """The name in the map."""
    pattern: str
    """The key, with `{placeholders}` for ids."""
    meaning: str
    table: str
    columns: tuple[str, ...]


_REMEMBERED = 16384
"""Keys of logs whose tables are known without looking at the map again."""

LINES = Table("lines", ("key",), (), is_log=True)


class Spot(msgspec.Struct, frozen=True):
    """The table of a key, and the values of the columns that say whose it is."""

    table: Table
    ids: tuple[str, ...]


class Tables:
    """The tables of one store; its map comes from the configuration."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._logs: dict[str, Spot] = {}
        self.by_entry = {
            entry.name: Table(
                _NAMES[entry.name],
                tuple(re.findall(r"\{(\w+)\}", entry.pattern)),
                _SHOWN.get(entry.name, ()),
                is_log=entry.shape is Shape.LOG,
            )
            for entry in layout
            if entry.name in _NAMES
        }

    def mapping(self) -> list[Mapped]:
        """Return for each entry of the map where its bytes are, if they are whole; otherwise they are in `pieces`."""
        found = []
        for entry in self._layout:
            table = self.by_entry.get(entry.name)
            name, columns = ("pieces", ("id", "number", "data")) if table is None else (table.name, table.columns)
            found.append(Mapped(entry.name, entry.pattern, entry.meaning, name, columns))
        return found

    def document(self, key: str) -> Spot | None:
        """Return where the document at `key` belongs; None if there is no table for it."""
        spot = self.spot(key)
        return None if spot is None or spot.table.is_log else spot

    def log(self, key: str) -> Spot:
        """Return where the messages of the log at `key` belong."""
        spot = self._logs.get(key)
        if spot is None:
            spot = self.spot(key)
            if spot is None or not spot.table.is_log:
                spot = Spot(LINES, (key,))
            if len(self._logs) >= _REMEMBERED:
                self._logs.clear()
            self._logs[key] = spot
        return spot

    def key_of(self, entry: str, ids: Sequence[str]) -> str:
        """Return the key of a document's row."""
        return self._layout.key(entry, **dict(zip(self.by_entry[entry].ids, ids, strict=True)))

    def spot(self, key: str) -> Spot | None:
        """Return where the document or the messages at `key` belong; None if there is no table for them."""
        place = self._layout.parse(key)
        table = None if place is None else self.by_entry.get(place.entry.name)
        if place is None or table is None:
            return None
        return Spot(table, tuple(place.names[name] for name in table.ids))


def body_of(data: bytes) -> str | None:
    """Return a document's bytes as text for a table, or None if they are no JSON object and have to stay bytes."""
    try:
        codec.decode_object(data)
        text = data.decode()
    except (ValueError, IntegrityError):
        return None
    return None if "\0" in text else text


def shown(table: Table, data: bytes) -> tuple[str | None, ...]:
    """Return the values of a table's shown columns for a JSON object.

    A column shows text only; U+0000, which PostgreSQL cannot hold, is shown as U+FFFD.
    """
    if table.shown == _MESSAGE:
        message = codec.decode_line(data)
        return _text(message.role), _text(message.content), _text(message.timestamp)
    if not table.shown:
        return ()
    content: dict[str, Any] = codec.decode_object(data)
    found = (content.get(name) for name in table.shown)
    return tuple(_text(value) if isinstance(value, str) else None for value in found)


def _text(value: str) -> str:
    return value.replace("\0", "\ufffd") if "\0" in value else value
