"""A store's contents through one transaction of a database: every statement that reads or writes its tables.

A log is kept in rows while every line of it is a message and no id comes twice; its positions then count from 0 without
a gap. Anything else that is called a log, damaged or of another kind, is kept as the bytes it is, and read as a file
would be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from .. import codec
from ..errors import IntegrityError
from ..models import new_id
from .base import Changes, LogPart
from .notes import REMEMBERED_BYTES, Note, note_after
from .rows import Connection, Fresh, LogRows, asking, good_rows, marks, of, runs_of, same_ids, twice
from .rules import begins_no_key, good_lines, is_text
from .tables import LINES, Table, Tables, body_of, shown

PIECE_BYTES = 1 << 20
_RUN_BYTES = 1 << 18
"""Of records that are streamed at a time, about."""
_PART_BYTES = 1 << 20
_LONGEST_NUMBER = 18


class Place(msgspec.Struct, frozen=True):
    """Where the bytes at a key are."""

    kind: str
    """document: in a row; log: in a row for each line; pieces: as bytes."""
    size: int | None
    """Of a document or of bytes."""
    id: str
    """Of these bytes: whatever replaces them has another one. A log in rows that only grows keeps it."""


class Contents:
    """What is in a store, for one transaction."""

    def __init__(self, connection: Connection, tables: Tables, rows: LogRows) -> None:
        self._db = connection
        self._tables = tables
        self._rows = rows
        self.changed: set[str] = set()
        """Keys and folders that were changed, until they are noted."""

    # --- keys ----------------------------------------------------------------------------------------

    def place(self, key: str) -> Place | None:
        """Return where the bytes at a key are, or None if there are none."""
        rows = self._db.execute("SELECT place, size, id FROM entries WHERE key = ?", (key,))
        return Place(*rows[0]) if rows else None

    def places(self, keys: Sequence[str]) -> dict[str, Place]:
        """Return where the bytes at keys are, without those where there are none."""
        found: dict[str, Place] = {}
        for some in runs_of(keys):
            rows = self._db.execute(f"SELECT key, place, size, id FROM entries WHERE key IN ({marks(some)})", some)
            found.update((key, Place(*place)) for key, *place in rows)
        return found

    def exists(self, key: str) -> bool:
        """Tell whether there are bytes at a key."""
        return bool(self._db.execute("SELECT 1 FROM entries WHERE key = ?", (key,)))

    def keys(self, prefix: str) -> list[str]:
        """Return all keys that begin with a text, sorted."""
        if begins_no_key(prefix):
            return []
        if not prefix:
            return [key for (key,) in self._db.execute("SELECT key FROM entries ORDER BY key")]
        rows = self._db.execute(
            "SELECT key FROM entries WHERE key >= ? AND key < ? ORDER BY key", (prefix, _behind(prefix))
        )
        return [key for (key,) in rows]

    def sized_keys(self, prefix: str, after: str, count: int) -> list[tuple[str, int]]:
        """Return the first `count` keys behind `after` that begin with a text, sorted, with the bytes at each."""
        if begins_no_key(prefix):
            return []
        end = "AND key < ?" if prefix else "AND ? = ''"
        rows = self._db.execute(
            f"SELECT key, size FROM entries WHERE key >= ? AND key > ? {end} ORDER BY key LIMIT {count:d}",
            (prefix, after, _behind(prefix)),
        )
        sizes = self._rows.sizes([key for key, size in rows if size is None])
        return [(key, sizes[key] if size is None else size) for key, size in rows]

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
            size = 0
            for (data,) in self._db.stream("SELECT data FROM pieces WHERE id = ? ORDER BY number", (place.id,)):
                size += len(data)
                yield bytes(data)
            if size != place.size:
                raise IntegrityError(f"{key} has {place.size} bytes; {size} are in the table `pieces`.", key=key)
        elif place.kind == "log":
            for line in self._rows.lines(key, 0, self._rows.count(key)):
                yield line + b"\n"
        else:
            spot = self._tables.document(key)
            rows = [] if spot is None else self._db.execute(f"SELECT body FROM {of(spot)}", spot.ids)
            if not rows:
                raise _in_no_table(key)
            yield rows[0][0].encode()

    def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the bytes at keys, in order; with a statement for each table, not for each key."""
        places = self.places(keys)
        found: dict[str, bytes] = {}
        documents: dict[Table, list[tuple[str, tuple[str, ...]]]] = {}
        found.update(self._rows.whole_logs([key for key, place in places.items() if place.kind == "log"]))
        for key, place in places.items():
            if place.kind == "log":
                continue
            spot = self._tables.document(key) if place.kind == "document" else None
            if spot is None:
                found[key] = self.bytes_of(key, place)
            else:
                documents.setdefault(spot.table, []).append((key, spot.ids))
        for table, wanted in documents.items():
            bodies = self.bodies(table, [ids for _, ids in wanted])
            for (key, _), body in zip(wanted, bodies, strict=True):
                if body is None:
                    raise _in_no_table(key)
                found[key] = body.encode()
        return [found.get(key) for key in keys]

    def bodies(self, table: Table, ids: Sequence[tuple[str, ...]]) -> list[str | None]:
        """Return the documents of some owners in a table, in order; None where there is none."""
        found: list[str | None] = []
        for some in runs_of(ids):
            asked = asking(table.ids, some)
            rows = self._db.execute(
                f"{asked.text} SELECT n.body FROM wanted LEFT JOIN {table.name} AS n ON {same_ids(table)} "
                "ORDER BY wanted.number",
                asked.values,
            )
            found += (body for (body,) in rows)
        return found

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
            f"INSERT INTO {spot.table.name} ({', '.join(columns)}) VALUES ({marks(columns)})",
            (*spot.ids, *shown(spot.table, data), text),
        )
        self._enter(key, Place("document", len(data), new_id()))

    def _put_bytes(self, key: str, data: bytes) -> None:
        pieces = new_id()
        self.add_pieces(pieces, 0, (data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES)))
        self._enter(key, Place("pieces", len(data), pieces))

    def add_pieces(self, pieces: str, first: int, data: Iterable[bytes]) -> None:
        """Keep bytes under an id, from the piece `first` on; they are at no key yet."""
        rows = ((pieces, number, piece) for number, piece in enumerate(data, first))
        self._db.run_for("INSERT INTO pieces (id, number, data) VALUES (?, ?, ?)", rows)

    def adopt(self, key: str, pieces: str, size: int) -> bool:
        """Put bytes that are kept already at a key, or drop them if that is taken; return which."""
        if self.exists(key):
            self.drop_pieces(pieces)
            return False
        self._enter(key, Place("pieces", size, pieces))
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
            self.drop_pieces(place.id)
        elif place.kind == "log":
            self._rows.drop(key)
        elif (spot := self._tables.document(key)) is not None:
            self._db.execute(f"DELETE FROM {of(spot)}", spot.ids)
        self._db.execute("DELETE FROM entries WHERE key = ?", (key,))
        self.changed.add(key)
        return True

    def move(self, source: str, target: str) -> None:
        """Give what is at a key another one, at which nothing is."""
        place = self.place(source)
        if place is None:
            return
        if place.kind == "log":
            self._rows.move(source, target)
        elif place.kind == "document" or self.is_log(target) or self._tables.document(target) is not None:
            self.put(target, self.bytes_of(source, place))
            self.delete(source)
            return
        self._db.execute("UPDATE entries SET key = ? WHERE key = ?", (target, source))
        self.changed |= {source, target}

    def _enter(self, key: str, place: Place) -> None:
        self._db.execute(
            "INSERT INTO entries (key, place, size, id) VALUES (?, ?, ?, ?)", (key, *msgspec.structs.astuple(place))
        )
        self.changed.add(key)

    # --- logs ----------------------------------------------------------------------------------------

    def records(
        self,
        key: str,
        start: int,
        stop: int | None,
        *,
        strict: bool,
        judged: Callable[[list[bytes]], bool] | None = None,
    ) -> list[bytes]:
        """Return the records of a log from one position up to another, as `read_log` does.

        Where `judged` says that all of some lines are messages, they are not looked at again.
        """
        place = self.place(key)
        if place is None:
            return []
        if place.kind != "log":
            return good_lines(key, self.bytes_of(key, place), strict=strict, newline=False)[start:stop]
        first, end, _ = slice(start, stop).indices(self._rows.count(key))
        lines = list(self._rows.lines(key, first, end)) if first < end else []
        return lines if judged is not None and judged(lines) else good_rows(key, lines, first, strict=strict)

    def runs(self, key: str, *, strict: bool) -> Iterator[list[bytes]]:
        """Yield the records of a log in runs, as `stream_log` does."""
        place = self.place(key)
        if place is None:
            return
        if place.kind != "log":
            yield from self._runs_of_bytes(key, place, strict=strict)
            return
        run: list[bytes] = []
        first = size = 0
        for position, line in enumerate(self._rows.lines(key, 0, self._rows.count(key)), 1):
            run.append(line)
            size += len(line)
            if size >= _RUN_BYTES:
                yield good_rows(key, run, first, strict=strict)
                run, first, size = [], position, 0
        if run:
            yield good_rows(key, run, first, strict=strict)

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
        return self._rows.count(key) if place.kind == "log" else len(self.records(key, 0, None, strict=False))

    def find(self, key: str, record_id: str) -> tuple[int, bytes] | None:
        """Return position and line of a record."""
        place = self.place(key)
        if place is None or place.kind != "log":
            lines = self.records(key, 0, None, strict=False) if place is not None else []
            return next(((at, line) for at, line in enumerate(lines) if codec.line_id(line) == record_id), None)
        return self._rows.find(key, record_id) if is_text(record_id) else None

    def lines_of(self, key: str, ids: Sequence[str]) -> dict[str, bytes]:
        """Return the lines of those records of a log in rows that are there, by id."""
        return self._rows.lines_of(key, list(filter(is_text, ids)))

    def newest(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the newest record of each log, in order."""
        places = self.places(keys)
        rows = self._rows.newest([key for key, place in places.items() if place.kind == "log"])
        found = {key: line for key, (_, line) in rows.items()}
        for key, place in places.items():
            if place.kind != "log" and (last := self.records(key, -1, None, strict=False)):
                found[key] = last[0]
        return [found.get(key) for key in keys]

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
        self._enter(key, Place("log", None, new_id()))
        self._rows.open(key)
        self.append(key, lines)

    def append(self, key: str, lines: Sequence[bytes]) -> None:
        """Add records, whose ids are new, at the end of a log in rows.

        Raises:
            IntegrityError: There are rows where nothing should be.
        """
        first = self._rows.count(key)
        fresh = [Fresh(key, at, codec.written_id(line), line) for at, line in enumerate(lines, first)]
        if not self.add_fresh(fresh):
            raise twice(key)

    def add_fresh(self, messages: Sequence[Fresh]) -> bool:
        """Add messages at the ends of their logs; return False if one of them is there already.

        Then the transaction has to be rolled back.
        """
        self.changed.update(message.key for message in messages)
        return self._rows.add(messages)

    def replace_line(self, key: str, position: int, line: bytes) -> None:
        """Put another line of the same id in the place of one."""
        self._rows.replace(key, position, line)
        self._rewritten(key)

    def remove_line(self, key: str, position: int) -> None:
        """Remove one line; those behind it move up."""
        self._rows.remove(key, position)
        self._rewritten(key)

    def cut(self, key: str, count: int | None) -> list[bytes]:
        """Remove the newest lines of a log in rows (None: all), and return them."""
        end = self._rows.count(key)
        first = 0 if count is None else max(0, end - count)
        gone = list(self._rows.lines(key, first, end))
        if gone:
            self._rows.cut(key, first)
            self._rewritten(key)
        return gone

    def _rewritten(self, key: str) -> None:
        self._db.execute("UPDATE entries SET id = ? WHERE key = ?", (new_id(), key))
        self.changed.add(key)

    # --- what a derived index needs --------------------------------------------------------------------

    def changed_below(self, folder: str) -> None:
        """Note a folder in place of every key in it."""
        start = f"{folder}/"
        self.changed = {key for key in self.changed if not key.startswith(start)}
        self.changed.add(folder)

    def note_changes(self) -> Note | None:
        """Note which keys this transaction changed, at its end; return the note if the next one follows from it.

        Transactions that write come one after the other, so the numbers are in their order.
        """
        if not self.changed:
            return None
        newest = self._db.execute("SELECT number, bytes FROM changes ORDER BY number DESC LIMIT 1")
        number, total = newest[0] if newest else (0, 0)
        note = note_after(number, total, self.changed)
        self.changed.clear()
        self._db.execute("INSERT INTO changes (number, id, bytes, keys) VALUES (?, ?, ?, ?)", note)
        if note.sweeps:
            behind = "SELECT min(number) FROM changes WHERE bytes >= ?"
            self._db.execute(f"DELETE FROM changes WHERE number < ({behind})", (note.bytes - REMEMBERED_BYTES,))
        return note

    def changes(self, cursor: str | None) -> Changes:
        """Return what changed since a cursor, as the contract has it."""
        newest = self._db.execute("SELECT number, id FROM changes ORDER BY number DESC LIMIT 1")
        if not newest:
            return Changes("", None)
        now = f"{newest[0][0]} {newest[0][1]}"
        if cursor == now:
            return Changes(now, frozenset())
        number, _, written = (cursor or "").partition(" ")
        if not number.isascii() or not number.isdecimal() or len(number) > _LONGEST_NUMBER:
            return Changes(now, None)
        # By its id, too: a file that was put back from a copy has other changes under the same numbers.
        if self._db.execute("SELECT id FROM changes WHERE number = ?", (int(number),)) != [(written,)]:
            return Changes(now, None)
        rows = self._db.execute("SELECT keys FROM changes WHERE number > ?", (int(number),))
        return Changes(now, frozenset(key for (keys,) in rows for key in keys.split("\n")))

    def stamps(self, keys: Sequence[str]) -> list[str | None]:
        """Return a text for each key that is another one when its bytes are changed."""
        places = self.places(keys)
        newest = self._rows.newest([key for key, place in places.items() if place.kind == "log"])
        return [
            None if (place := places.get(key)) is None else f"{place.id} {newest[key][0] + 1 if key in newest else 0}"
            for key in keys
        ]

    def log_part(self, key: str, identity: str | None, start: int) -> LogPart | None:
        """Return some lines of a log: from a position on where it is kept in rows, from a byte on where it is not."""
        place = self.place(key)
        if place is None:
            return None
        if place.kind != "log":
            return _part_of_bytes(self.bytes_of(key, place), place.id, identity, start)
        count = self._rows.count(key)
        if place.id != identity or start > count:
            start = 0
        lines: list[tuple[int, bytes]] = []
        size = 0
        for position, line in enumerate(self._rows.lines(key, start, count), start):
            lines.append((position, line))
            size += len(line)
            if size >= _PART_BYTES:
                break
        end = start + len(lines)
        return LogPart(place.id, start, end, lines, more=end < count)

    def log_places(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes | None]:
        """Return the bytes of each place (key, offset, length), in order; None where there are not so many."""
        places = self.places(list({key for key, _, _ in wanted}))
        rows = [(key, offset) for key, offset, _ in wanted if key in places and places[key].kind == "log"]
        lines = dict(zip(rows, self._rows.at(rows), strict=True))
        datas = {key: self.bytes_of(key, place) for key, place in places.items() if place.kind != "log"}
        found: list[bytes | None] = []
        for key, offset, length in wanted:
            piece = datas[key][offset : offset + length] if key in datas else lines.get((key, offset))
            found.append(piece if piece is not None and len(piece) == length else None)
        return found

    # --- what does not fit -----------------------------------------------------------------------------

    def contradictions(self) -> list[tuple[str, str]]:
        """Return keys whose rows are not there, and rows that have no key, each with what is wrong."""
        kept: dict[str, set[str]] = {"document": set(), "log": set(), "pieces": set()}
        for key, kind in self._db.execute("SELECT key, place FROM entries"):
            kept[kind].add(key)
        documents: dict[str, str] = {}
        for entry, table in self._tables.by_entry.items():
            if not table.is_log:
                rows = self._db.execute(f"SELECT {', '.join(table.ids)} FROM {table.name}")
                documents.update((self._tables.key_of(entry, ids), table.name) for ids in rows)
        found = [(key, _in_no_table(key).message) for key in kept["document"] - documents.keys()]
        found += [(key, f"A row of `{documents[key]}` has no key.") for key in documents.keys() - kept["document"]]
        found += [(key, f"There are messages of {key}, which is no log.") for key in self._rows.keys() - kept["log"]]
        found += [("", text) for text in self._rows.strays()]
        for key in self._rows.gaps():
            try:
                for _ in self._rows.lines(key, 0, self._rows.count(key)):
                    pass
            except IntegrityError as error:
                found.append((key, error.message))
        sizes = self._db.execute(
            f"SELECT key, size, (SELECT sum({self._db.size_of_data}) FROM pieces WHERE pieces.id = entries.id) "
            "FROM entries WHERE place = 'pieces'"
        )
        found += [
            (key, f"It has {size} bytes; {held or 0} are in the table `pieces`.")
            for key, size, held in sizes
            if size != (held or 0)
        ]
        return sorted(found)

    def torn_logs(self) -> list[str]:
        """Return the logs of the map that end in half a line."""
        rows = self._db.execute("SELECT key, id FROM entries WHERE place = 'pieces' AND size > 0")
        return [key for key, pieces in rows if self.is_log(key) and not self._last_piece(pieces).endswith(b"\n")]

    def _last_piece(self, pieces: str) -> bytes:
        rows = self._db.execute("SELECT data FROM pieces WHERE id = ? ORDER BY number DESC LIMIT 1", (pieces,))
        return bytes(rows[0][0]) if rows else b""

    def leftovers(self) -> list[str]:
        """Return the ids of bytes that are at no key: being written, or left by somebody who died."""
        rows = self._db.execute(
            "SELECT DISTINCT id FROM pieces WHERE id NOT IN (SELECT id FROM entries WHERE place = 'pieces')"
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
    found = read_rows(data)
    return None if found is None else [f"{line}\n".encode() for line, _ in found]


def read_rows(data: bytes) -> list[tuple[str, codec.ReadLine]] | None:
    """Return the lines of a log, without their newlines, and what they say; None if it cannot be kept in rows."""
    if data and not data.endswith(b"\n"):
        return None
    records = codec.read_lines(data.split(b"\n")[:-1])
    if records is None:
        return None
    ids = {record.id for record in records}
    # PostgreSQL cannot hold U+0000, and what is a row in one database is one in all of them.
    if len(ids) < len(records) or "\0" in "".join(ids):
        return None
    try:
        text = data.decode()
    except UnicodeDecodeError:  # in a field that no message has, which was passed over
        return None
    return None if "\0" in text else list(zip(text.split("\n")[:-1], records, strict=True))


def _in_no_table(key: str) -> IntegrityError:
    return IntegrityError(f"{key} is in the table `entries`, but in no other.", key=key)


def _part_of_bytes(data: bytes, found: str, identity: str | None, start: int) -> LogPart:
    whole = data.rfind(b"\n") + 1
    if found != identity or start > whole:
        start = 0
    lines: list[tuple[int, bytes]] = []
    offset = start
    while offset < whole and (not lines or offset - start < _PART_BYTES):
        end = data.index(b"\n", offset)
        lines.append((offset, data[offset:end]))
        offset = end + 1
    return LogPart(found, start, offset, lines, more=offset < whole)
