"""The messages of logs in SQLite: new ones where they arrive, and some thousands at a time moved to where they belong.

A message that goes straight to its place touches pages of its own in the table and in each index, so a batch of a
hundred, each for another log, writes several hundred pages. Here it goes to the end of `arrivals`, a small table in the
order of arrival, and later with many others to `records`, which is sorted by log and position; `arriving.py` does both.
People read the views `messages`, `panel_messages` and `lines`, which show both tables.

A row's `place` is the number of its log, 32 bits to the left, plus its position: whole numbers sort a table of SQLite
best. The rows of a log in `arrivals` come behind those in `records`. Ids are unique in each, and none is put in
`arrivals` that is in `records`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from .arriving import adding, runs
from .rows import Fresh, LogRows, Repeated, asking, marks, runs_of, whole

_BITS: Final = 32
_LAST: Final = (1 << _BITS) - 1
_MANY: Final = 64
"""So many new messages of one log fill pages of their own: they go straight to their place."""

_COLUMNS = {"messages": ("user_id", "session_id"), "panel_messages": ("panel_id",)}
"""What tells in `logs` whose a log is, by table."""

_NEWEST = "(SELECT max(place) FROM {} WHERE place BETWEEN log << 32 AND (log << 32) + 4294967295)"
_FREE = """
(SELECT 1 + max(coalesce((SELECT max(log) FROM logs), 0), coalesce((SELECT max(place) FROM records), 0) >> 32,
    coalesce((SELECT max(place) FROM arrivals), 0) >> 32))
"""
"""The number of a new log: above all, so that rows which have lost theirs do not become its messages."""
_COUNT = f"""
SELECT log, coalesce({_NEWEST.format("arrivals")}, {_NEWEST.format("records")}) FROM logs WHERE key = ?
"""
# Not `?1`: Python 3.12 takes a numbered parameter for a named one, and warns.
_LINES = """
SELECT place, body FROM records WHERE place BETWEEN ? AND ?
UNION ALL SELECT place, body FROM arrivals WHERE place BETWEEN ? AND ? ORDER BY place
"""
_FIND = """
SELECT place, body FROM records WHERE id = ? AND place >> 32 = ?
UNION ALL SELECT place, body FROM arrivals WHERE id = ? AND place >> 32 = ?
"""
_LINES_OF = """
SELECT id, body FROM records WHERE id IN ({0}) AND place >> 32 = ?
UNION ALL SELECT id, body FROM arrivals WHERE id IN ({0}) AND place >> 32 = ?
"""
_SIZE = """
SELECT sum(length(CAST(body AS BLOB)) + 1) FROM (
    SELECT body FROM records WHERE place BETWEEN ? AND ? UNION ALL
    SELECT body FROM arrivals WHERE place BETWEEN ? AND ?)
"""


class StagedRows(LogRows):
    """Rows in `logs`, `records` and `arrivals`."""

    # --- reading -------------------------------------------------------------------------------------

    def _look(self, key: str) -> tuple[int, int] | None:
        """Return the place of a log's first row, and how many there are; None if no log has the key."""
        rows = self._db.execute(_COUNT, (key,))
        if not rows:
            return None
        log, newest = rows[0]
        base = log << _BITS
        return base, 0 if newest is None else newest - base + 1

    def count(self, key: str) -> int:
        found = self._look(key)
        return 0 if found is None else found[1]

    def size(self, key: str) -> int:
        base, count = self._look(key) or (0, 0)
        [(size,)] = self._db.execute(_SIZE, 2 * (base, base + count - 1))
        return int(size or 0)

    def _counted(self) -> Iterator[tuple[str, int, int]]:
        rows = self._db.execute(
            "SELECT key, count(*), max(place) - (log << 32) + 1 FROM logs JOIN "
            "(SELECT place FROM records UNION ALL SELECT place FROM arrivals) ON log = place >> 32 GROUP BY log"
        )
        yield from rows

    def strays(self) -> list[str]:
        rows = self._db.execute(
            "SELECT place >> 32 AS number, count(*) FROM "
            "(SELECT place FROM records UNION ALL SELECT place FROM arrivals) "
            "WHERE number NOT IN (SELECT log FROM logs) GROUP BY number ORDER BY number"
        )
        return [f"There are {count} messages of log {number}, which is not in `logs`." for number, count in rows]

    def lines(self, key: str, first: int, end: int) -> Iterator[bytes]:
        base, _ = self._look(key) or (0, 0)
        rows = self._db.stream(_LINES, 2 * (base + first, base + end - 1))
        yield from whole(key, ((place - base, body) for place, body in rows), first, end)

    def find(self, key: str, record_id: str) -> tuple[int, bytes] | None:
        found = self._look(key)
        rows = [] if found is None else self._db.execute(_FIND, 2 * (record_id, found[0] >> _BITS))
        return (rows[0][0] & _LAST, rows[0][1].encode()) if rows else None

    def lines_of(self, key: str, ids: Sequence[str]) -> dict[str, bytes]:
        base, count = self._look(key) or (0, 0)
        found: dict[str, bytes] = {}
        for some in runs_of(ids if count else ()):
            rows = self._db.execute(_LINES_OF.format(marks(some)), 2 * (*some, base >> _BITS))
            found.update((record_id, body.encode()) for record_id, body in rows)
        return found

    def newest(self, keys: Sequence[str]) -> dict[str, tuple[int, bytes]]:
        found: dict[str, tuple[int, bytes]] = {}
        for table in ("arrivals", "records"):
            for some in runs_of([key for key in keys if key not in found]):
                asked = asking(("key",), ((key,) for key in some))
                rows = self._db.execute(
                    f"{asked.text} SELECT wanted.number, t.place, t.body "
                    f"FROM wanted CROSS JOIN logs CROSS JOIN {table} AS t "
                    f"WHERE logs.key = wanted.key AND t.place = {_NEWEST.format(table)}",
                    asked.values,
                )
                for number, place, body in rows:
                    found[some[number]] = place & _LAST, body.encode()
        return found

    def at(self, places: Sequence[tuple[str, int]]) -> list[bytes | None]:
        found: list[bytes | None] = [None] * len(places)
        for some in runs_of(list(enumerate(places))):
            asked = asking(("key", "position"), (place for _, place in some))
            for table in ("records", "arrivals"):
                rows = self._db.execute(
                    f"{asked.text} SELECT wanted.number, t.body FROM wanted CROSS JOIN logs CROSS JOIN {table} AS t "
                    "WHERE logs.key = wanted.key AND t.place = (logs.log << 32) + wanted.position",
                    asked.values,
                )
                for number, body in rows:
                    found[some[number][0]] = body.encode()
        return found

    # --- writing -------------------------------------------------------------------------------------

    def open(self, key: str) -> None:
        table = self._tables.log(key).table.name
        names = ("key", *_COLUMNS.get(table, ()))
        values = (key, *(self._tables.log(key).ids if len(names) > 1 else ()))
        self._db.execute(
            f"INSERT INTO logs (log, {', '.join(names)}) VALUES ({_FREE}, {', '.join('?' * len(names))})", values
        )

    def add(self, messages: Sequence[Fresh]) -> bool:
        if go_straight(messages):
            return self._add_many(messages)
        try:
            for run in runs(messages):
                self._db.execute(*adding(run))
        except Repeated:
            return False
        return True

    def _add_many(self, messages: Sequence[Fresh]) -> bool:
        """Add messages of one log to those that are in their place already."""
        base = self._settle(messages[0].key)
        rows = [(base + message.position, message.id, message.line[:-1].decode()) for message in messages]
        statement = "INSERT INTO records (place, id, body) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
        return self._db.run_for(statement, rows) == len(rows)

    def _settle(self, key: str) -> int:
        """Move all messages of a log to their place; return that of the first."""
        [(log,)] = self._db.execute("SELECT log FROM logs WHERE key = ?", (key,))
        base = int(log) << _BITS
        span = (base, base + _LAST)
        self._db.execute(
            "INSERT INTO records SELECT place, id, body FROM arrivals WHERE place BETWEEN ? AND ? ORDER BY place", span
        )
        self._db.execute("DELETE FROM arrivals WHERE place BETWEEN ? AND ?", span)
        return base

    def replace(self, key: str, position: int, line: bytes) -> None:
        base = self._settle(key)
        self._db.execute("UPDATE records SET body = ? WHERE place = ?", (line[:-1].decode(), base + position))

    def remove(self, key: str, position: int) -> None:
        base = self._settle(key)
        self._db.execute("DELETE FROM records WHERE place = ?", (base + position,))
        # In two steps, for no two rows may have one place in between.
        move = "UPDATE records SET place = {} WHERE place BETWEEN ? AND ?"
        self._db.execute(move.format("-place"), (base + position, base + _LAST))
        self._db.execute(move.format("-place - 1"), (-base - _LAST, -base - position))

    def cut(self, key: str, first: int) -> None:
        base = self._settle(key)
        self._db.execute("DELETE FROM records WHERE place BETWEEN ? AND ?", (base + first, base + _LAST))

    def drop(self, key: str) -> None:
        for (log,) in self._db.execute("SELECT log FROM logs WHERE key = ?", (key,)):
            span = (log << _BITS, (log << _BITS) + _LAST)
            self._db.execute("DELETE FROM records WHERE place BETWEEN ? AND ?", span)
            self._db.execute("DELETE FROM arrivals WHERE place BETWEEN ? AND ?", span)
            self._db.execute("DELETE FROM logs WHERE log = ?", (log,))

    def move(self, source: str, target: str) -> None:
        spot = self._tables.log(target)
        owner = dict(zip(_COLUMNS.get(spot.table.name, ()), spot.ids, strict=False))
        values = [owner.get(name) for name in ("user_id", "session_id", "panel_id")]
        self._db.execute(
            "UPDATE logs SET key = ?, user_id = ?, session_id = ?, panel_id = ? WHERE key = ?",
            (target, *values, source),
        )


def go_straight(messages: Sequence[Fresh]) -> bool:
    """Tell whether messages are so many of one log that they go to their place and not where they arrive."""
    return len(messages) >= _MANY and len({message.key for message in messages}) == 1
