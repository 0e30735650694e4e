"""A store's contents through one transaction of a database: what the contract means in terms of tables.

A log is kept in rows while every line of it is a message and no id comes twice; its positions then count from 0 without
a gap. Anything else that is called a log, damaged or of another kind, is kept as the bytes it is, and read as a file
would be.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import msgspec

from .. import codec
from ..config import StorageConfig
from ..errors import ValidationError
from ..models import new_id
from .changes import ANY, Absent, Append, Change, Delete, Edit, Move, Outcome, Put, Quota, RemoveTree, Require, Truncate
from .rules import (
    check_edit,
    check_maximum,
    check_quota,
    check_version,
    exists_already,
    good_lines,
    kept_and_dropped,
    mended,
    new_lines,
    not_found,
    quarantine_keys,
    version_of,
)
from .tables import LINES, Spot, Table, Tables, body_of, shown

logger = logging.getLogger("flatfile_chat_database")

T = TypeVar("T")

PIECE_BYTES = 1 << 20
_RUN = 1000
"""Rows that are moved at a time."""
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
    version: str | None
    """Of a document or bytes."""
    records: int
    """Lines of a log in rows."""
    pieces: str | None


class Fresh(NamedTuple):
    """A message that is to come at a position of a log that is kept in rows."""

    key: str
    position: int
    id: str
    line: bytes


class Contents:
    """What is in a store, for one transaction."""

    def __init__(self, connection: Connection, tables: Tables, config: StorageConfig) -> None:
        self._db = connection
        self._tables = tables
        self._config = config

    # --- keys ----------------------------------------------------------------------------------------

    def place(self, key: str) -> Place | None:
        """Return where the bytes at a key are, or None if there are none."""
        rows = self._db.execute("SELECT place, size, version, records, pieces FROM entries WHERE key = ?", (key,))
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
        return None if place is None else self._bytes(key, place)

    def _bytes(self, key: str, place: Place) -> bytes:
        if place.kind == "pieces":
            return b"".join(self.pieces(place))
        if place.kind == "log":
            return b"".join(line + b"\n" for line in self.lines(key, 0, place.records))
        spot = cast("Spot", self._tables.document(key))
        [(body,)] = self._db.execute(f"SELECT body FROM {_of(spot)}", spot.ids)
        return str(body).encode()

    def pieces(self, place: Place) -> Iterator[bytes]:
        """Yield what is kept as bytes, piece by piece."""
        for (data,) in self._db.stream("SELECT data FROM pieces WHERE id = ? ORDER BY number", (place.pieces,)):
            yield bytes(data)

    def put(self, key: str, data: bytes) -> str:
        """Replace the bytes at a key; return their version."""
        self.delete(key)
        if self._tables.log(key).table is not LINES:
            self._put_log(key, data)
            return version_of(data)
        version = version_of(data)
        spot = self._tables.document(key)
        text = None if spot is None else body_of(data)
        if spot is None or text is None:
            self._put_bytes(key, data, version)
            return version
        columns = (*spot.table.ids, *spot.table.shown, "body")
        self._db.execute(
            f"INSERT INTO {spot.table.name} ({', '.join(columns)}) VALUES ({_marks(columns)})",
            (*spot.ids, *shown(spot.table, data), text),
        )
        self._enter(key, Place("document", len(data), version, 0, None))
        return version

    def _put_bytes(self, key: str, data: bytes, version: str) -> None:
        pieces = new_id()
        self.add_pieces(pieces, 0, (data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES)))
        self._enter(key, Place("pieces", len(data), version, 0, pieces))

    def add_pieces(self, pieces: str, first: int, data: Iterable[bytes]) -> None:
        """Keep bytes under an id, from the piece `first` on; they are at no key yet."""
        rows = ((pieces, number, piece) for number, piece in enumerate(data, first))
        self._db.run_for("INSERT INTO pieces (id, number, data) VALUES (?, ?, ?)", rows)

    def adopt(self, key: str, pieces: str, size: int, version: str) -> bool:
        """Put bytes that are kept already at a key, or drop them if that is taken; return which."""
        if self.exists(key):
            self.drop_pieces(pieces)
            return False
        self._enter(key, Place("pieces", size, version, 0, pieces))
        return True

    def drop_pieces(self, pieces: str) -> None:
        """Remove bytes that are kept under an id."""
        self._db.execute("DELETE FROM pieces WHERE id = ?", (pieces,))

    def delete(self, key: str) -> bool:
        """Remove what is at a key; return whether there was anything."""
        place = self.place(key)
        if place is None:
            return False
        if place.kind == "pieces":
            self.drop_pieces(cast("str", place.pieces))
        elif place.kind == "log":
            spot = self._tables.log(key)
            self._db.execute(f"DELETE FROM {_of(spot)}", spot.ids)
        else:
            spot = cast("Spot", self._tables.document(key))
            self._db.execute(f"DELETE FROM {_of(spot)}", spot.ids)
        self._db.execute("DELETE FROM entries WHERE key = ?", (key,))
        return True

    def _enter(self, key: str, place: Place) -> None:
        self._db.execute(
            "INSERT INTO entries (key, place, size, version, records, pieces) VALUES (?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (key) DO UPDATE SET place = excluded.place, size = excluded.size, "
            "version = excluded.version, records = excluded.records, pieces = excluded.pieces",
            (key, *msgspec.structs.astuple(place)),
        )

    # --- logs ----------------------------------------------------------------------------------------

    def records(self, key: str, start: int, stop: int | None, *, strict: bool) -> list[bytes]:
        """Return the records of a log from one position up to another, as `read_log` does."""
        place = self.place(key)
        if place is None:
            return []
        if place.kind != "log":
            return good_lines(key, self._bytes(key, place), strict=strict, newline=False)[start:stop]
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

    def run(self, key: str, start: int) -> list[bytes] | None:
        """Return some records of a log from a position on; None if it is kept as bytes."""
        place = self.place(key)
        if place is None:
            return []
        if place.kind != "log":
            return None
        run: list[bytes] = []
        size = 0
        for line in self.lines(key, start, place.records):
            run.append(line)
            size += len(line)
            if size >= _RUN_BYTES:
                break
        return run

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

    def _put_log(self, key: str, data: bytes) -> None:
        """Keep a log, which is absent now: in rows if it can be, otherwise as bytes."""
        lines = _rows_of(data)
        if lines is None:
            self._put_bytes(key, data, version_of(data))
            return
        self._enter(key, Place("log", 0, None, 0, None))
        self.append(key, lines, [codec.written_id(line) for line in lines])

    def append(self, key: str, lines: Sequence[bytes], ids: Sequence[str]) -> None:
        """Add records, whose ids are new, at the end of a log in rows."""
        place = cast("Place", self.place(key))
        spot = self._tables.log(key)
        columns = (*spot.table.ids, "position", "id", *spot.table.shown, "body")
        self._db.run_for(
            f"INSERT INTO {spot.table.name} ({', '.join(columns)}) VALUES ({_marks(columns)})",
            (
                (*spot.ids, position, record_id, *shown(spot.table, line), line[:-1].decode())
                for position, (record_id, line) in enumerate(zip(ids, lines, strict=True), place.records)
            ),
        )
        self._grew(key, len(lines), sum(map(len, lines)))

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
        self._db.run_for(
            "UPDATE entries SET records = records + ?, size = size + ? WHERE key = ?",
            [(*sizes, key) for key, sizes in grown.items()],
        )
        return True

    def _grew(self, key: str, records: int, size: int) -> None:
        self._db.execute(
            "UPDATE entries SET records = records + ?, size = size + ? WHERE key = ?", (records, size, key)
        )

    def extend(self, key: str, data: bytes) -> None:
        """Add whole lines at the end of a log, whatever they say; it is made if it is absent."""
        self.open_log(key)
        place = cast("Place", self.place(key))
        lines = _rows_of(data) if place.kind == "log" else None
        ids = [codec.written_id(line) for line in lines or ()]
        if lines is not None and not any(self.find(key, record_id) for record_id in ids):
            self.append(key, lines, ids)
        else:
            whole = self._bytes(key, place) + data
            self.delete(key)
            self._put_log(key, whole)

    def open_log(self, key: str) -> None:
        """Make a log that is absent; set aside half a line at the end of one that is there."""
        place = self.place(key)
        if place is None:
            self._enter(key, Place("log", 0, None, 0, None))
            return
        if place.kind == "log":
            return
        data = self._bytes(key, place)
        whole, half = mended(data)
        if half:
            note, target = quarantine_keys(self._config)
            reason = "half a line at the end of the log"
            facts = {"key": key, "offset": len(whole), "size": len(half), "reason": reason}
            self.put(note, codec.encode_document(facts))
            self.put(target, half)
            logger.warning("%s: %s is set aside as %s", key, reason, target)
        if whole != data or _rows_of(whole) is not None:
            self.delete(key)
            self._put_log(key, whole)

    def _finder(self, key: str) -> Callable[[str], bytes | None]:
        """Return what finds the line of a record in a log, as it is once half a line at its end is set aside."""
        place = self.place(key)
        if place is None:
            return lambda record_id: None
        if place.kind == "log":
            return lambda record_id: None if (found := self.find(key, record_id)) is None else found[1] + b"\n"
        lines = good_lines(key, mended(self._bytes(key, place))[0])
        return {codec.written_id(line): line for line in lines}.get

    def _count_mended(self, key: str) -> int:
        place = self.place(key)
        if place is None:
            return 0
        return place.records if place.kind == "log" else len(good_lines(key, mended(self._bytes(key, place))[0]))

    # --- what does not fit -----------------------------------------------------------------------------

    def torn_logs(self) -> list[str]:
        """Return the logs of the map that end in half a line."""
        rows = self._db.execute("SELECT key, pieces FROM entries WHERE place = 'pieces' AND size > 0")
        return [
            key
            for key, pieces in rows
            if self._tables.log(key).table is not LINES and not self._last_piece(pieces).endswith(b"\n")
        ]

    def _last_piece(self, pieces: str) -> bytes:
        rows = self._db.execute("SELECT data FROM pieces WHERE id = ? ORDER BY number DESC LIMIT 1", (pieces,))
        return bytes(rows[0][0]) if rows else b""

    def leftovers(self) -> list[str]:
        """Return the ids of bytes that are at no key: being written, or left by somebody who died."""
        rows = self._db.execute(
            "SELECT DISTINCT id FROM pieces WHERE id NOT IN (SELECT pieces FROM entries WHERE pieces IS NOT NULL)"
        )
        return [pieces for (pieces,) in rows]

    # --- changes -------------------------------------------------------------------------------------

    def check(self, change: Change) -> None:
        """Raise the error of a condition that does not hold."""
        match change:
            case Require(key, what):
                if not self.exists(key):
                    raise not_found(what, key)
            case Quota(folder):
                check_quota(change, self.children(folder, folders_only=True))
            case Put(key, _, expected):
                if expected is not ANY:
                    check_version(key, self.read(key), expected)
            case Append(key):
                added = new_lines(change, self._finder(key))
                if change.maximum is not None:
                    check_maximum(change, self._count_mended(key), added)
            case Edit(key):
                place = self.place(key)
                if place is None or place.kind == "log":
                    found = self.find(key, change.record_id)
                    check_edit(change, None if found is None else found[1])
                    return
                lines = good_lines(key, mended(self._bytes(key, place))[0], strict=True)
                check_edit(change, next((line for line in lines if codec.written_id(line) == change.record_id), None))
            case Truncate(key, count):
                place = self.place(key)
                if place is not None and place.kind != "log":
                    kept_and_dropped(key, mended(self._bytes(key, place))[0], count)
            case Absent(target) | Move(_, target):
                if not self.is_free(target):
                    raise exists_already(target)
            case Delete() | RemoveTree():
                pass

    def apply(self, change: Change) -> Outcome:
        """Make a change whose condition was checked; return its outcome."""
        match change:
            case Put(key, data):
                return self.put(key, data)
            case Delete(key):
                return self.delete(key)
            case Append(key):
                return self._append(change)
            case Edit(key, record_id, _, line):
                self._edit(key, record_id, line)
                return None
            case Truncate(key, count):
                return self._truncate(key, count)
            case Move(source, target):
                keys = [key for key in (source, *self.keys(f"{source}/")) if self.exists(key)]
                for key in keys:
                    self._rename(key, target + key[len(source) :])
                return bool(keys)
            case RemoveTree(folder):
                removed = self.keys(f"{folder}/")
                for key in removed:
                    self.delete(key)
                return removed
            case Require() | Absent() | Quota():
                return None

    def _append(self, append: Append) -> int:
        key = append.key
        added = new_lines(append, self._finder(key))
        if not added:
            if self.place(key) is None:
                self.open_log(key)
            return 0
        self.open_log(key)
        if cast("Place", self.place(key)).kind == "log":
            self.append(key, added, [codec.written_id(line) for line in added])
        else:
            self.extend(key, b"".join(added))
        return len(added)

    def _edit(self, key: str, record_id: str, line: bytes | None) -> None:
        self.open_log(key)
        place = cast("Place", self.place(key))
        if place.kind != "log":
            lines = good_lines(key, self._bytes(key, place))
            new = [line if codec.written_id(old) == record_id else old for old in lines]
            self.put_lines(key, [kept for kept in new if kept is not None])
            return
        spot = self._tables.log(key)
        found = self.find(key, record_id)
        if found is None:  # removed by an earlier change of the same commit
            return
        position, old = found
        if line is not None and codec.written_id(line) == record_id:
            columns = (*spot.table.shown, "body")
            self._db.execute(
                f"UPDATE {spot.table.name} SET {', '.join(f'{column} = ?' for column in columns)} "
                f"WHERE {_where(spot)} AND position = ?",
                (*shown(spot.table, line), line[:-1].decode(), *spot.ids, position),
            )
            self._grew(key, 0, len(line) - len(old) - 1)
            return
        if line is not None:
            lines = [*self.lines(key, 0, place.records)]
            self.put_lines(key, [line if at == position else old + b"\n" for at, old in enumerate(lines)])
            return
        self._db.execute(f"DELETE FROM {_of(spot)} AND position = ?", (*spot.ids, position))
        # In two steps, for no two rows may have one position in between.
        for step in ("-position", "-position - 1"):
            sign = ">" if step == "-position" else "<"
            bound = position if step == "-position" else 0
            self._db.execute(
                f"UPDATE {spot.table.name} SET position = {step} WHERE {_where(spot)} AND position {sign} ?",
                (*spot.ids, bound),
            )
        self._grew(key, -1, -len(old) - 1)

    def put_lines(self, key: str, lines: Iterable[bytes]) -> None:
        """Replace a log by lines."""
        self.delete(key)
        self._put_log(key, b"".join(lines))

    def _truncate(self, key: str, count: int | None) -> list[bytes]:
        place = self.place(key)
        if place is None:
            return []
        self.open_log(key)
        place = cast("Place", self.place(key))
        if place.kind != "log":
            kept, dropped = kept_and_dropped(key, self._bytes(key, place), count)
            if dropped:
                self.delete(key)
                self._put_log(key, kept)
            return dropped
        first = 0 if count is None else max(0, place.records - count)
        dropped = list(self.lines(key, first, place.records))
        spot = self._tables.log(key)
        self._db.execute(f"DELETE FROM {_of(spot)} AND position >= ?", (*spot.ids, first))
        self._grew(key, -len(dropped), -sum(len(line) + 1 for line in dropped))
        return dropped

    def _rename(self, source: str, target: str) -> None:
        place = cast("Place", self.place(source))
        self.delete(target)  # nothing, unless an earlier change of the same commit has put something there
        if place.kind == "log":
            self._enter(target, Place("log", 0, None, 0, None))
            for first in range(0, place.records, _RUN):
                lines = [line + b"\n" for line in self.lines(source, first, first + _RUN)]
                self.append(target, lines, [codec.written_id(line) for line in lines])
            self.delete(source)
        elif place.kind == "document" or self._tables.document(target) is not None:
            data = self._bytes(source, place)
            self.delete(source)
            self.put(target, data)
        else:
            self._db.execute("UPDATE entries SET key = ? WHERE key = ?", (target, source))


def check_lines(key: str, data: bytes) -> None:
    """Check that bytes that are to be appended are whole lines.

    Raises:
        ValidationError: They do not end in a newline.
    """
    if not data.endswith(b"\n"):
        raise ValidationError("What is appended must end in a newline.", key=key)


def _behind(prefix: str) -> str:
    """Return the smallest text that is behind every text which begins with a prefix; "" if there is none."""
    while prefix:
        code = ord(prefix[-1]) + 1
        if code <= 0x10FFFF:
            return prefix[:-1] + chr(0xE000 if code == 0xD800 else code)
        prefix = prefix[:-1]
    return ""


def _rows_of(data: bytes) -> list[bytes] | None:
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
