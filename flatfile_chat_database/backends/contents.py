"""A store's contents through one transaction of a database: every statement that reads or writes its tables.

A log is kept in rows while every line of it is a message and no id comes twice; its positions then count from 0 without
a gap. Anything else that is called a log, damaged or of another kind, is kept as the bytes it is, and read as a file
would be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from .. import codec
from ..errors import IntegrityError
from ..models import new_id
from .rules import good_lines
from .tables import LINES, Spot, Table, Tables, body_of, shown

PIECE_BYTES = 1 << 20
_GROW = "UPDATE entries SET records = records + ?, size = size + ? WHERE key = ?"
_RUN_BYTES = 1 << 18
"""Of records that are streamed at a time, about."""


class Connection(Protocol):
    """One connection to a database; parameters of statements are written `?`."""

    position_of: str
    """The function that tells where in a text another one begins."""

    def execute(self, statement: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Run a statement; return all its rows."""

    def run_for(self, statement: str, rows: Iterable[Sequence[object]]) -> int:
        """Run a statement for each of several rows of parameters; return how many rows it changed in all."""

    def stream(self, statement: str, parameters: Sequence[object]) -> Iterator[tuple[Any, ...]]:
        """Run a statement; yield its rows without holding all of them."""


class Place(msgspec.Struct, frozen=True):
    """Where the bytes at a key are."""

    kind: str
    """document: in a row; log: in a row for each line; pieces: as bytes."""
    size: int
    records: int = 0
    """Lines of a log in rows."""
    pieces: str | None = None
    """The id of bytes."""


class Fresh(NamedTuple):
    """A message that is to come at a position of a log that is kept in rows."""

    key: str
    position: int
    id: str
    line: bytes


class Contents:
    """What is in a store, for one transaction."""

    def __init__(self, connection: Connection, tables: Tables) -> None:
        self._db = connection
        self._tables = tables

    # --- keys ----------------------------------------------------------------------------------------

    def place(self, key: str) -> Place | None:
        """Return where the bytes at a key are, or None if there are none."""
        rows = self._db.execute("SELECT place, size, records, pieces FROM entries WHERE key = ?", (key,))
        return Place(*rows[0]) if rows else None

    def exists(self, key: str) -> bool:
        """Tell whether there are bytes at a key."""
        return bool(self._db.execute("SELECT 1 FROM entries WHERE key = ?", (key,)))

    def keys(self, prefix: str) -> list[str]:
        """Return all keys that begin with a text, sorted."""
        if not prefix:
            return [key for (key,) in self._db.execute("SELECT key FROM entries ORDER BY key")]
        rows = self._db.execute(
            "SELECT key FROM entries WHERE key >= ? AND key < ? ORDER BY key", (prefix, _behind(prefix))
        )
        return [key for (key,) in rows]

    def sized_keys(self, prefix: str, after: str, count: int) -> list[tuple[str, int]]:
        """Return the first `count` keys behind `after` that begin with a text, sorted, with the bytes at each."""
        end = "AND key < ?" if prefix else "AND ? = ''"
        rows = self._db.execute(
            f"SELECT key, size FROM entries WHERE key >= ? AND key > ? {end} ORDER BY key LIMIT {count:d}",
            (prefix, after, _behind(prefix)),
        )
        return [(key, size) for key, size in rows]

    def children(self, folder: str, *, folders_only: bool = False) -> list[str]:
        """Return the segments that follow a folder in the keys below it, sorted; those with keys below them only."""
        start = f"{folder}/" if folder else ""
        # From each key to the first one behind the folder it is in: as many steps as children, not as keys. Behind
        # "a/…" comes "a0", for "0" is next to "/"; behind "a" comes "a" with a character too small to be in a key.
        end = "AND entries.key < ?" if start else "AND ? = ''"
        slash = f"{self._db.position_of}(substr(found.key, {len(start) + 1}), '/')"
        rows = self._db.execute(
            f"""
            WITH RECURSIVE found(key) AS (
                SELECT min(entries.key) FROM entries WHERE entries.key >= ? {end}
                UNION ALL
                SELECT (SELECT min(entries.key) FROM entries
                        WHERE entries.key >= CASE WHEN {slash} = 0 THEN found.key || ?
                            ELSE substr(found.key, 1, {len(start)} + {slash} - 1) || '0' END
                        {end})
                FROM found WHERE found.key IS NOT NULL
            )
            SELECT key FROM found WHERE key IS NOT NULL
            """,
            (start, _behind(start), "\x01", _behind(start)),
        )
        parts = (key[len(start) :].partition("/") for (key,) in rows)
        return sorted({child for child, rest, _ in parts if rest or not folders_only})

    def is_free(self, key: str) -> bool:
        """Tell whether nothing is at or below a key."""
        below = "SELECT 1 FROM entries WHERE key > ? AND key < ? LIMIT 1"
        return not self.exists(key) and not self._db.execute(below, (f"{key}/", f"{key}0"))

    # --- bytes ---------------------------------------------------------------------------------------

    def read(self, key: str) -> bytes | None:
        """Return the bytes at a key."""
        place = self.place(key)
        return None if place is None else self.bytes_of(key, place)

    def bytes_of(self, key: str, place: Place) -> bytes:
        """Return the bytes at a key whose place is known.

        Raises:
            IntegrityError: They are not there.
        """
        return b"".join(self.pieces_of(key, place))

    def pieces_of(self, key: str, place: Place) -> Iterator[bytes]:
        """Yield the bytes at a key piece by piece."""
        if place.kind == "pieces":
            for (data,) in self._db.stream("SELECT data FROM pieces WHERE id = ? ORDER BY number", (place.pieces,)):
                yield bytes(data)
        elif place.kind == "log":
            for line in self.lines(key, 0, place.records):
                yield line + b"\n"
        else:
            spot = self._tables.document(key)
            rows = [] if spot is None else self._db.execute(f"SELECT body FROM {_of(spot)}", spot.ids)
            if not rows:
                raise IntegrityError(f"{key} is in the table `entries`, but in no other.", key=key)
            yield rows[0][0].encode()

    def put(self, key: str, data: bytes) -> None:
        """Replace the bytes at a key."""
        self.delete(key)
        if self.is_log(key):
            self.put_log(key, data)
            return
        spot = self._tables.document(key)
        text = None if spot is None else body_of(data)
        if spot is None or text is None:
            self._put_bytes(key, data)
            return
        columns = (*spot.table.ids, *spot.table.shown, "body")
        self._db.execute(
            f"INSERT INTO {spot.table.name} ({', '.join(columns)}) VALUES ({_marks(columns)})",
            (*spot.ids, *shown(spot.table, data), text),
        )
        self._enter(key, Place("document", len(data)))

    def _put_bytes(self, key: str, data: bytes) -> None:
        pieces = new_id()
        self.add_pieces(pieces, 0, (data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES)))
        self._enter(key, Place("pieces", len(data), pieces=pieces))

    def add_pieces(self, pieces: str, first: int, data: Iterable[bytes]) -> None:
        """Keep bytes under an id, from the piece `first` on; they are at no key yet."""
        rows = ((pieces, number, piece) for number, piece in enumerate(data, first))
        self._db.run_for("INSERT INTO pieces (id, number, data) VALUES (?, ?, ?)", rows)

    def adopt(self, key: str, pieces: str, size: int) -> bool:
        """Put bytes that are kept already at a key, or drop them if that is taken; return which."""
        if self.exists(key):
            self.drop_pieces(pieces)
            return False
        self._enter(key, Place("pieces", size, pieces=pieces))
        return True

    def drop_pieces(self, pieces: str) -> None:
        """Remove bytes that are kept under an id."""
        self._db.execute("DELETE FROM pieces WHERE id = ?", (pieces,))

    def delete(self, key: str) -> bool:
        """Remove what is at a key; return whether there was anything."""
        place = self.place(key)
        if place is None:
            return False
        spot = self._tables.log(key) if place.kind == "log" else self._tables.document(key)
        if place.pieces is not None:
            self.drop_pieces(place.pieces)
        elif spot is not None:
            self._db.execute(f"DELETE FROM {_of(spot)}", spot.ids)
        self._db.execute("DELETE FROM entries WHERE key = ?", (key,))
        return True

    def move_bytes(self, source: str, target: str) -> bool:
        """Give bytes another key, if they may stay bytes there; return whether they did."""
        if self.is_log(target) or self._tables.document(target) is not None:
            return False
        moved = self._db.run_for("UPDATE entries SET key = ? WHERE key = ? AND place = 'pieces'", [(target, source)])
        return bool(moved)

    def _enter(self, key: str, place: Place) -> None:
        self._db.execute(
            "INSERT INTO entries (key, place, size, records, pieces) VALUES (?, ?, ?, ?, ?)",
            (key, *msgspec.structs.astuple(place)),
        )

    # --- logs ----------------------------------------------------------------------------------------

    def records(self, key: str, start: int, stop: int | None, *, strict: bool) -> list[bytes]:
        """Return the records of a log from one position up to another, as `read_log` does."""
        place = self.place(key)
        if place is None:
            return []
        if place.kind != "log":
            return good_lines(key, self.bytes_of(key, place), strict=strict, newline=False)[start:stop]
        first, end, _ = slice(start, stop).indices(place.records)
        return list(self.lines(key, first, end)) if first < end else []

    def lines(self, key: str, first: int, end: int) -> Iterator[bytes]:
        """Yield lines of a log in rows by position, without their newlines."""
        spot = self._tables.log(key)
        rows = self._db.stream(
            f"SELECT body FROM {_of(spot)} AND position >= ? AND position < ? ORDER BY position",
            (*spot.ids, first, end),
        )
        for (body,) in rows:
            yield body.encode()

    def runs(self, key: str, *, strict: bool) -> Iterator[list[bytes]]:
        """Yield the records of a log in runs, as `stream_log` does."""
        place = self.place(key)
        if place is None:
            return
        if place.kind != "log":
            yield from self._runs_of_bytes(key, place, strict=strict)
            return
        run: list[bytes] = []
        size = 0
        for line in self.lines(key, 0, place.records):
            run.append(line)
            size += len(line)
            if size >= _RUN_BYTES:
                yield run
                run, size = [], 0
        if run:
            yield run

    def _runs_of_bytes(self, key: str, place: Place, *, strict: bool) -> Iterator[list[bytes]]:
        begun: list[bytes] = []  # of a line that is longer than a piece
        offset = 0
        for piece in self.pieces_of(key, place):
            end = piece.rfind(b"\n") + 1
            if not end:
                begun.append(piece)
                continue
            whole = b"".join([*begun, piece[:end]])
            if run := good_lines(key, whole, strict=strict, newline=False, offset=offset):
                yield run
            begun = [piece[end:]]
            offset += len(whole)

    def count(self, key: str) -> int:
        """Return the number of records of a log."""
        place = self.place(key)
        if place is None:
            return 0
        return place.records if place.kind == "log" else len(self.records(key, 0, None, strict=False))

    def find(self, key: str, record_id: str) -> tuple[int, bytes] | None:
        """Return position and line of a record."""
        place = self.place(key)
        if place is None or place.kind != "log":
            lines = self.records(key, 0, None, strict=False) if place is not None else []
            return next(((at, line) for at, line in enumerate(lines) if codec.line_id(line) == record_id), None)
        spot = self._tables.log(key)
        rows = self._db.execute(f"SELECT position, body FROM {_of(spot)} AND id = ?", (*spot.ids, record_id))
        return (rows[0][0], rows[0][1].encode()) if rows else None

    def newest(self, key: str) -> bytes | None:
        """Return the newest record of a log."""
        found = self.records(key, -1, None, strict=False)
        return found[0] if found else None

    def is_log(self, key: str) -> bool:
        """Tell whether the map has a log at a key."""
        return self._tables.log(key).table is not LINES

    def put_log(self, key: str, data: bytes) -> None:
        """Replace a log: kept in rows if it can be, otherwise as bytes."""
        self.delete(key)
        lines = rows_of(data)
        if lines is None:
            self._put_bytes(key, data)
            return
        self._enter(key, Place("log", 0))
        self.append(key, lines)

    def append(self, key: str, lines: Sequence[bytes]) -> None:
        """Add records, whose ids are new, at the end of a log in rows.

        Raises:
            IntegrityError: There are rows where nothing should be.
        """
        place = self.place(key)
        first = 0 if place is None else place.records
        fresh = [Fresh(key, at, codec.written_id(line), line) for at, line in enumerate(lines, first)]
        if not self.add_fresh(fresh):
            raise IntegrityError(f"{key} has rows that the table `entries` does not count.", key=key)

    def add_fresh(self, messages: Sequence[Fresh]) -> bool:
        """Add messages at the ends of their logs; return False if one of them is there already.

        Then the transaction has to be rolled back.
        """
        rows: dict[Table, list[tuple[object, ...]]] = {}
        grown: dict[str, list[int]] = {}
        for key, position, record_id, line in messages:
            spot = self._tables.log(key)
            values = (*spot.ids, position, record_id, *shown(spot.table, line), line[:-1].decode())
            rows.setdefault(spot.table, []).append(values)
            sizes = grown.setdefault(key, [0, 0])
            sizes[0] += 1
            sizes[1] += len(line)
        for table, of_table in rows.items():
            columns = (*table.ids, "position", "id", *table.shown, "body")
            added = self._db.run_for(
                f"INSERT INTO {table.name} ({', '.join(columns)}) VALUES ({_marks(columns)}) ON CONFLICT DO NOTHING",
                of_table,
            )
            if added != len(of_table):
                return False
        self._db.run_for(_GROW, [(*sizes, key) for key, sizes in grown.items()])
        return True

    def replace_line(self, key: str, position: int, old: bytes, line: bytes) -> None:
        """Put another line of the same id in the place of one; `old` is without its newline."""
        spot = self._tables.log(key)
        columns = (*spot.table.shown, "body")
        self._db.execute(
            f"UPDATE {spot.table.name} SET {', '.join(f'{column} = ?' for column in columns)} "
            f"WHERE {_where(spot)} AND position = ?",
            (*shown(spot.table, line), line[:-1].decode(), *spot.ids, position),
        )
        self._db.execute(_GROW, (0, len(line) - len(old) - 1, key))

    def remove_line(self, key: str, position: int, old: bytes) -> None:
        """Remove one line; those behind it move up."""
        spot = self._tables.log(key)
        self._db.execute(f"DELETE FROM {_of(spot)} AND position = ?", (*spot.ids, position))
        # In two steps, for no two rows may have one position in between.
        move = f"UPDATE {spot.table.name} SET position = {{}} WHERE {_where(spot)} AND position {{}} ?"
        self._db.execute(move.format("-position", ">"), (*spot.ids, position))
        self._db.execute(move.format("-position - 1", "<"), (*spot.ids, 0))
        self._db.execute(_GROW, (-1, -len(old) - 1, key))

    def cut(self, key: str, first: int) -> list[bytes]:
        """Remove the lines of a log in rows from a position on, and return them."""
        spot = self._tables.log(key)
        behind = f"{_of(spot)} AND position >= ?"
        rows = self._db.execute(f"SELECT body FROM {behind} ORDER BY position", (*spot.ids, first))
        gone = [body.encode() for (body,) in rows]
        self._db.execute(f"DELETE FROM {behind}", (*spot.ids, first))
        self._db.execute(_GROW, (-len(gone), -sum(len(line) + 1 for line in gone), key))
        return gone

    # --- what does not fit -----------------------------------------------------------------------------

    def torn_logs(self) -> list[str]:
        """Return the logs of the map that end in half a line."""
        rows = self._db.execute("SELECT key, pieces FROM entries WHERE place = 'pieces' AND size > 0")
        return [key for key, pieces in rows if self.is_log(key) and not self._last_piece(pieces).endswith(b"\n")]

    def _last_piece(self, pieces: str) -> bytes:
        rows = self._db.execute("SELECT data FROM pieces WHERE id = ? ORDER BY number DESC LIMIT 1", (pieces,))
        return bytes(rows[0][0]) if rows else b""

    def leftovers(self) -> list[str]:
        """Return the ids of bytes that are at no key: being written, or left by somebody who died."""
        rows = self._db.execute(
            "SELECT DISTINCT id FROM pieces WHERE id NOT IN (SELECT pieces FROM entries WHERE pieces IS NOT NULL)"
        )
        return [pieces for (pieces,) in rows]


def _behind(prefix: str) -> str:
    """Return the smallest text that is behind every text which begins with a prefix; "" if there is none."""
    while prefix:
        code = ord(prefix[-1]) + 1
        if code <= 0x10FFFF:
            return prefix[:-1] + chr(0xE000 if code == 0xD800 else code)
        prefix = prefix[:-1]
    return ""


def rows_of(data: bytes) -> list[bytes] | None:
    """Return the lines of a log, with their newlines, if it can be kept in rows, otherwise None."""
    if data and not data.endswith(b"\n"):
        return None
    lines = [line + b"\n" for line in data.split(b"\n")[:-1]]
    ids = [codec.line_id(line[:-1]) for line in lines]
    return None if None in ids or len(set(ids)) < len(ids) else lines


def _where(spot: Spot) -> str:
    return " AND ".join(f"{name} = ?" for name in spot.table.ids)


def _of(spot: Spot) -> str:
    return f"{spot.table.name} WHERE {_where(spot)}"


def _marks(columns: Sequence[str]) -> str:
    return ", ".join("?" * len(columns))
