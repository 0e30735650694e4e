"""What goes into an archive, in its order, in memory that does not grow: an SQLite file without a name."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from ..errors import UnavailableError
from ..layout import Layout
from .archive import Kind, look_at
from .report import Keys


class Listing:
    """The keys of a store that an archive takes, by their rank; every method blocks."""

    def __init__(self, layout: Layout, kind: Kind, user: str | None) -> None:
        self._layout = layout
        self._kind = kind
        self._user = user
        self._table = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._table.execute("PRAGMA journal_mode = OFF")
        self._table.execute(
            "CREATE TABLE listed (rank TEXT PRIMARY KEY, key TEXT NOT NULL, size INTEGER NOT NULL) WITHOUT ROWID"
        )
        self.files = 0
        self.records = 0
        """Files but the store's own."""
        self.bytes = 0
        self.left_out = Keys()
        """Keys that the map has no place for."""

    def close(self) -> None:
        """Forget all of it."""
        self._table.close()

    def add(self, sized: Iterable[tuple[str, int]]) -> None:
        """Take keys, with the number of bytes at each, as far as the archive is to have them."""
        rows = []
        for key, size in sized:
            sight = look_at(self._layout, key)
            if sight is None:
                if not self._layout.is_of_front(key):
                    self.left_out.add(key)
                continue
            if self._kind == "export" and not sight.is_living:
                continue
            if self._user is not None and sight.entry != "store" and sight.names.get("user_id") != self._user:
                continue
            rows.append((sight.rank, key, size))
            self.files += 1
            self.records += sight.entry != "store"
            self.bytes += size
        try:
            self._table.execute("BEGIN")
            self._table.executemany("INSERT INTO listed VALUES (?, ?, ?)", rows)
            self._table.execute("COMMIT")
        except sqlite3.Error as error:
            raise UnavailableError(
                f"The list of what goes into the archive: {error}.", hint="Is the folder for temporary files full?"
            ) from error

    def after(self, rank: str | None, count: int) -> list[tuple[str, str, int]]:
        """Return rank, key and size of the first `count` entries behind a rank."""
        where, values = ("", ()) if rank is None else ("WHERE rank > ?", (rank,))
        return self._table.execute(
            f"SELECT rank, key, size FROM listed {where} ORDER BY rank LIMIT ?", (*values, count)
        ).fetchall()
