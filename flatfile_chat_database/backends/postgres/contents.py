"""A store's contents in PostgreSQL: the statements that differ, for there every statement is a trip to the server."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ... import codec
from ...errors import IntegrityError
from ...models import new_id
from ..base import Changes
from ..changes import ABSENT
from ..contents import PIECE_BYTES, Contents, Place, read_rows
from ..gathered import Known
from ..rows import Fresh, LogRows, good_rows, of, row_of, same_ids, whole
from ..rules import check_version, is_text
from ..tables import Spot, Table, Tables, body_of, shown
from .session import PostgresSession

_FEW = 128
"""Rows that are asked for without a cursor."""
_MOST = 2**31 - 1
"""No position is larger."""
_SWEEP = 256
"""Of so many transactions one, about, looks for changes that are to be forgotten."""
_FORGOTTEN = "forgotten"
"""In the place of an id, with the number from which on changes are kept."""
_TIMELINE = """
CASE WHEN pg_is_in_recovery() THEN (SELECT to_hex(timeline_id) FROM pg_control_checkpoint())
    ELSE lower(ltrim(substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8), '0')) END
"""
"""Of a primary the one that it writes: its control file tells of it only after a checkpoint."""
_REMEMBERED_CHANGES = 20_000
"""Transactions whose changes are kept."""
_LINES_AT_ONCE = 32
"""Lines of a log in one text: a text has at most 1 GB, and a line may have 16 MB."""
_ESCAPES = (("\\", "\\\\"), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t"), ("\0", "\ufffd"))
_ESCAPED = re.compile(r"[\\\t\r]").search
_SNAPSHOT = re.compile(r"([0-9]+)(?::([0-9]+):([0-9]+(?:,[0-9]+)*)?)?").fullmatch
"""The oldest transaction that was not over; the one that comes next, and all before that which were not over."""
_DIGITS = 19
"""Of a number of a transaction, which has 64 bits."""
_LISTED = "string_to_array(?, chr(10))"
"""Keys or ids as one text, which psycopg hands over much faster than an array; no control character is in them."""


class PostgresRows(LogRows):
    """The rows of a store's logs."""

    def __init__(self, connection: PostgresSession, tables: Tables) -> None:
        super().__init__(connection, tables)
        self._session = connection

    def lines(self, key: str, first: int, end: int) -> Iterator[bytes]:
        if end - first > _FEW:
            yield from super().lines(key, first, end)
            return
        spot = self._tables.log(key)
        rows = self._db.execute(
            f"SELECT position, body FROM {of(spot)} AND position >= ? AND position < ? ORDER BY position",
            (*spot.ids, first, end),
        )
        yield from whole(key, rows, first, end)

    def counts(self, keys: Collection[str]) -> dict[str, int]:
        """Return how many rows logs have; a statement for each table."""
        found: dict[str, int] = {}
        for table, spots in self._by_table(keys).items():
            asked = _asked(table, [spot.ids for spot in spots.values()])
            newest = f"SELECT n.position + 1 FROM {table.name} AS n WHERE {same_ids(table)}"
            rows = self._db.execute(
                f"SELECT ({newest} ORDER BY n.position DESC LIMIT 1) FROM {asked.text} ORDER BY number", asked.values
            )
            found.update((key, count or 0) for key, (count,) in zip(spots, rows, strict=True))
        return found

    def lines_of(self, key: str, ids: Sequence[str]) -> dict[str, bytes]:
        spot = self._tables.log(key)
        rest = spot.ids[1:]
        rows = self._db.execute(
            f"SELECT found.id, found.body FROM unnest(CAST(? AS text[])) AS wanted (id) "
            f"CROSS JOIN LATERAL ({_from_id(spot.table, 'wanted.id')}) AS found "
            f"WHERE {_is_of(spot.table, 'found')} found.id = wanted.id",
            ([record_id for record_id in ids if "\0" not in record_id], *spot.ids, *rest),
        )  # not as one text: an id may hold a newline
        return {record_id: body.encode() for record_id, body in rows}

    def at(self, places: Sequence[tuple[str, int]]) -> list[bytes | None]:
        found: list[bytes | None] = [None] * len(places)
        by_table: dict[Table, list[tuple[int, tuple[str, ...]]]] = {}
        for number, (key, position) in enumerate(places):
            spot = self._tables.log(key)
            by_table.setdefault(spot.table, []).append((number, (*spot.ids, str(position))))
        for table, wanted in by_table.items():
            lists = ", ".join([_LISTED] * len(table.ids))
            rows = self._db.execute(
                f"SELECT found.body FROM unnest({lists}, CAST({_LISTED} AS integer[])) WITH ORDINALITY "
                f"AS wanted ({', '.join(table.ids)}, position, number) LEFT JOIN LATERAL "
                f"(SELECT n.position, n.body FROM {table.name} AS n WHERE {same_ids(table)} "
                "AND n.position >= wanted.position ORDER BY n.position LIMIT 1) AS found "
                "ON found.position = wanted.position ORDER BY wanted.number",
                ["\n".join(column) for column in zip(*(values for _, values in wanted), strict=True)],
            )
            for (number, _), (body,) in zip(wanted, rows, strict=True):
                found[number] = None if body is None else body.encode()
        return found

    def newest(self, keys: Sequence[str]) -> dict[str, tuple[int, bytes]]:
        found: dict[str, tuple[int, bytes]] = {}
        for table, spots in self._by_table(keys).items():
            asked = _asked(table, [spot.ids for spot in spots.values()])
            rows = self._db.execute(
                f"SELECT newest.position, newest.body FROM {asked.text} LEFT JOIN LATERAL "
                f"(SELECT n.position, n.body FROM {table.name} AS n WHERE {same_ids(table)} "
                "ORDER BY n.position DESC LIMIT 1) AS newest ON true ORDER BY wanted.number",
                asked.values,
            )
            for key, (position, body) in zip(spots, rows, strict=True):
                if body is not None:
                    found[key] = position, body.encode()
        return found

    def sizes(self, keys: Sequence[str]) -> dict[str, int]:
        """Return the sizes of logs; a statement for each table."""
        found = dict.fromkeys(keys, 0)
        for table, spots in self._by_table(keys).items():
            named, asked = list(spots), _asked(table, [spot.ids for spot in spots.values()])
            rows = self._db.execute(
                f"SELECT wanted.number, sum({self._db.size_of_body} + 1) FROM {asked.text} "
                f"JOIN {table.name} AS n ON {same_ids(table)} GROUP BY wanted.number",
                asked.values,
            )
            found.update((named[number - 1], int(size)) for number, size in rows)
        return found

    def whole_logs(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return the bytes of logs; a statement for each table, in which a row is some lines of a log in one text."""
        found: dict[str, list[str]] = {key: [] for key in keys}
        for table, spots in self._by_table(keys).items():
            named, asked = list(spots), _asked(table, [spot.ids for spot in spots.values()])
            rows = self._db.execute(
                "SELECT wanted.number, count(*), min(position), max(position), "
                f"string_agg(body, chr(10) ORDER BY position) FROM {asked.text} "
                f"JOIN {table.name} AS n ON {same_ids(table)} "
                f"GROUP BY wanted.number, position / {_LINES_AT_ONCE} ORDER BY wanted.number, min(position)",
                asked.values,
            )
            ends: dict[int, int] = {}
            for number, count, first, last, text in rows:
                key, end = named[number - 1], ends.get(number, 0)
                if first != end or last + 1 - first != count:
                    for _ in self.lines(key, 0, self.count(key)):  # says which one is missing
                        pass
                ends[number] = last + 1
                found[key].append(f"{text}\n")
        return {key: "".join(texts).encode() for key, texts in found.items()}

    def add(self, messages: Sequence[Fresh]) -> bool:
        if len(messages) == 1:  # for which COPY takes longer
            return super().add(messages)
        rows: dict[Table, list[tuple[object, ...]]] = {}
        for message in messages:
            spot = self._tables.log(message.key)
            rows.setdefault(spot.table, []).append(row_of(spot, message.position, message.id, message.line))
        return self.copy(rows)

    # Whoever changes or removes a message takes the words of its log away: they are kept anew when they are wanted.

    def replace(self, key: str, position: int, line: bytes) -> None:
        super().replace(key, position, line)
        self._drop_words(key)

    def remove(self, key: str, position: int) -> None:
        super().remove(key, position)
        self._drop_words(key)

    def cut(self, key: str, first: int) -> None:
        super().cut(key, first)
        self._drop_words(key)

    def drop(self, key: str) -> None:
        super().drop(key)
        self._drop_words(key)

    def _drop_words(self, key: str) -> None:
        self._db.execute("DELETE FROM word_logs WHERE key = ?", (key,))

    def copy(self, rows: dict[Table, list[tuple[object, ...]]]) -> bool:
        """Add rows to tables; return False, and let the transaction fail, if one is there already."""
        return all(self._session.copy(table.name, table.columns, of_table) for table, of_table in rows.items())


class PostgresContents(Contents):
    """What is in a store, for one transaction, or for one statement outside of any."""

    def __init__(self, connection: PostgresSession, tables: Tables) -> None:
        self._log_rows = PostgresRows(connection, tables)
        super().__init__(connection, tables, self._log_rows)
        self.session = connection

    def is_in_recovery(self) -> bool:
        """Tell whether the server is a replica, or not up to date yet."""
        [(found,)] = self._db.execute("SELECT pg_is_in_recovery()")
        return bool(found)

    # --- reading many in few statements ----------------------------------------------------------------

    def places(self, keys: Sequence[str]) -> dict[str, Place]:
        rows = self._db.execute(
            f"SELECT key, place, size, id FROM entries WHERE key = ANY({_LISTED})", ("\n".join(keys),)
        )
        return {key: Place(*place) for key, *place in rows}

    def bodies(self, table: Table, ids: Sequence[tuple[str, ...]]) -> list[str | None]:
        asked = _asked(table, ids)
        rows = self._db.execute(
            f"SELECT n.body FROM {asked.text} LEFT JOIN {table.name} AS n ON {same_ids(table)} ORDER BY wanted.number",
            asked.values,
        )
        return [body for (body,) in rows]

    # --- reading in one statement ----------------------------------------------------------------------

    def read(self, key: str) -> bytes | None:
        spot = self._tables.document(key)
        if spot is not None:
            body = f"entry.place = 'document' AND {_is(spot)}"
            rows = self._beside(key, "beside.body", f"{spot.table.name} AS beside ON {body}", spot.ids)
        elif self.is_log(key):
            return super().read(key)
        else:
            data = "pieces AS beside ON entry.place = 'pieces' AND beside.id = entry.id"
            rows = self._beside(key, "beside.data", data, (), "beside.number")
        if not rows:
            return None
        place = Place(*rows[0][:3])
        if place.kind == "document" and spot is not None and rows[0][3] is not None:
            return str(rows[0][3]).encode()
        if place.kind == "pieces" and spot is None:
            found = b"".join(row[3] or b"" for row in rows)
            if len(found) == place.size:
                return found
        return self.bytes_of(key, place)

    def records(
        self,
        key: str,
        start: int,
        stop: int | None,
        *,
        strict: bool,
        judged: Callable[[list[bytes]], bool] | None = None,
    ) -> list[bytes]:
        spot = self._tables.log(key)
        first, end = max(-_MOST, min(start, _MOST)), max(-_MOST, min(_MOST if stop is None else stop, _MOST))
        # OFFSET keeps the planner from making one join of it all: without statistics it takes a log for one row, reads
        # the whole of it, and only then looks at which positions were asked for.
        page = (
            f"SELECT position, body FROM {of(spot)} AND position >= {_from_end(first)} AND position < {_from_end(end)} "
            "ORDER BY position OFFSET 0"
        )
        rows = self._beside(
            key,
            "newest.count, beside.position, beside.body",
            f"LATERAL ({_count(spot)}) AS newest ON entry.place = 'log' "
            f"LEFT JOIN LATERAL ({page}) AS beside ON entry.place = 'log'",
            (*spot.ids, *spot.ids, first, end),
            "beside.position",
        )
        if rows and rows[0][0] != "log":
            return super().records(key, start, stop, strict=strict, judged=judged)
        begin, behind, _ = slice(start, stop).indices(rows[0][3] or 0 if rows else 0)
        lines = list(whole(key, (row[4:] for row in rows if row[4] is not None), begin, behind))
        return lines if judged is not None and judged(lines) else good_rows(key, lines, begin, strict=strict)

    def count(self, key: str) -> int:
        spot = self._tables.log(key)
        rows = self._beside(key, "newest.count", f"LATERAL ({_count(spot)}) AS newest ON entry.place = 'log'", spot.ids)
        if rows and rows[0][0] != "log":
            return super().count(key)
        return int(rows[0][3] or 0) if rows else 0

    def find(self, key: str, record_id: str) -> tuple[int, bytes] | None:
        spot = self._tables.log(key)
        wanted = record_id if is_text(record_id) and "\0" not in record_id else ""
        rows = self._beside(
            key,
            "beside.position, beside.body",
            f"LATERAL ({_from_id(spot.table, '?')}) AS beside "
            f"ON entry.place = 'log' AND {_is_of(spot.table, 'beside')} beside.id = ?",
            (*spot.ids, wanted, *spot.ids[1:], wanted),
        )
        if rows and rows[0][0] != "log":
            return super().find(key, record_id)
        return (rows[0][3], rows[0][4].encode()) if rows and rows[0][3] is not None else None

    def _beside(
        self, key: str, what: str, joined: str, values: Sequence[object], order: str = ""
    ) -> list[tuple[Any, ...]]:
        """Return the place of a key with what is in the table that holds it; no row if nothing is at the key."""
        return self._db.execute(
            f"SELECT entry.place, entry.size, entry.id, {what} FROM entries AS entry LEFT JOIN {joined} "
            f"WHERE entry.key = ? {order and f'ORDER BY {order}'}",
            (*values, key),
        )

    def counts(self, keys: Collection[str]) -> dict[str, int]:
        """Return how many records logs in rows have."""
        return self._log_rows.counts(keys) if keys else {}

    def is_document(self, key: str) -> bool:
        """Tell whether the map has a document with a table at a key."""
        return self._tables.document(key) is not None

    def runs_from(self, key: str, position: int) -> Iterator[list[bytes]]:
        """Yield the records of a log from a position on, in runs."""
        place = self.place(key)
        if place is None or place.kind != "log":
            yield from self.runs(key, strict=False)
            return
        end = self._log_rows.count(key)
        for start in range(position, end, _FEW):
            run = list(self._log_rows.lines(key, start, min(end, start + _FEW)))
            yield good_rows(key, run, start, strict=False)

    def lines_at(self, places: Sequence[tuple[str, int]]) -> list[bytes | None]:
        """Return the lines at some positions of logs in rows, in order; None where there is none."""
        return self._log_rows.at(places)

    # --- what changed ----------------------------------------------------------------------------------

    def note_changes(self) -> None:  # others write at the same time, so none follows from it
        if not self.changed:
            return
        names = "\n".join(sorted(self.changed))
        self.changed.clear()
        # Transactions that notify commit one after the other, so it is done only while somebody listens; without the
        # keys, for a payload is bounded, and whoever is woken asks for them.
        lock, channel = self.session.listeners, self.session.channel
        self._db.execute(
            "INSERT INTO changes (transaction, id, keys) VALUES (pg_current_xact_id(), ?, ?) RETURNING CASE WHEN "
            f"pg_try_advisory_lock{lock} THEN pg_advisory_unlock{lock}::text ELSE pg_notify('{channel}', '')::text END",
            (new_id(), names),
        )
        if random.randrange(_SWEEP) == 0:
            self._forget_changes()

    def _forget_changes(self) -> None:
        """Remove old changes, and keep how far that went.

        A cursor from before may still want one of them, of a transaction that ended late. Several nodes may be at it:
        they wait for each other at the row that tells how far.
        """
        rows = self._db.execute(
            "INSERT INTO changes (transaction, id, keys) "
            f"SELECT transaction, ?, '' FROM changes ORDER BY transaction DESC OFFSET {_REMEMBERED_CHANGES} LIMIT 1 "
            "ON CONFLICT (id) DO UPDATE SET transaction = greatest(changes.transaction, excluded.transaction) "
            "RETURNING transaction::text",
            (_FORGOTTEN,),
        )
        for (number,) in rows:
            self._db.execute("DELETE FROM changes WHERE transaction < ?::xid8", (number,))

    def changes(self, cursor: str | None) -> Changes:
        """Return what changed since a cursor, as the contract has it.

        A cursor says which transactions were not over when it was made, so what was changed by one that ends late is
        told, and nothing else again; a replica knows only the oldest one, and tells some things twice. It names a
        change that was seen as well, which is not there in a database that was put back from a copy, and the server,
        for its numbers are its own, with the timeline: one that took the place of another may lack what that one's
        readers saw.
        """
        [(now, server, newest)] = self._db.execute(
            f"""
            SELECT CASE WHEN pg_is_in_recovery()
                    THEN regexp_replace(pg_current_snapshot()::text, ':.*', '') ELSE pg_current_snapshot()::text END,
                (SELECT system_identifier FROM pg_control_system())::text || '.' || {_TIMELINE} || '.'
                    || 'changes'::regclass::oid::text,
                (SELECT id FROM changes WHERE id <> ? ORDER BY transaction DESC, id DESC LIMIT 1)
            """,
            (_FORGOTTEN,),
        )
        if newest is None:
            return Changes("", None)
        found = Changes(f"{server} {now} {newest}", None)
        if not cursor or cursor.count(" ") != 2 or not cursor.startswith(f"{server} ") or "\0" in cursor:
            return found
        _, known, seen = cursor.split(" ")
        numbers = _SNAPSHOT(known)
        if numbers is None or any(len(number) > _DIGITS for number in re.split("[:,]", known)):
            return found
        oldest, following, under_way = numbers[1], numbers[2] or numbers[1], numbers[3] or ""
        rows = self._db.execute(
            "SELECT id, keys FROM changes WHERE id = ? OR transaction >= ?::xid8 "
            f"AND (id = ? OR transaction >= ?::xid8 OR transaction::text = ANY({_LISTED}))",
            (seen, oldest, _FORGOTTEN, following, under_way.replace(",", "\n")),
        )
        ids = {found_id for found_id, _ in rows}
        if seen not in ids or _FORGOTTEN in ids:
            return found
        told = (keys for found_id, keys in rows if found_id != seen)
        return Changes(found.cursor, frozenset(key for keys in told for key in keys.split("\n")))

    # --- adding in bulk --------------------------------------------------------------------------------

    def know(self, known: Known, owners: Collection[str], logs: Collection[str], *, lock: bool) -> None:
        """Learn which of some documents and logs are there; with `lock` nobody else adds to these logs meanwhile.

        The logs are locked in the order of their keys, so no two writers wait for each other.
        """
        rows = self._db.execute(
            f"""
            WITH logs AS (
                SELECT key FROM entries WHERE key = ANY({_LISTED}) AND place = 'log'
                {"ORDER BY key FOR NO KEY UPDATE" if lock else ""}
            )
            SELECT key, true FROM logs UNION ALL SELECT key, false FROM entries WHERE key = ANY({_LISTED})
            """,
            ("\n".join(logs), "\n".join(owners)),
        )
        known.owners.update(key for key, is_log in rows if not is_log)
        # Not in the same statement: that would see the rows as they were before it waited for a lock.
        known.records.update(self._log_rows.counts([key for key, is_log in rows if is_log]))

    def load(self, items: Sequence[tuple[str, bytes]]) -> None:
        """Put bytes at keys where nothing is.

        Raises:
            ConflictError: There is something at one of them.
            IntegrityError: There are rows where nothing should be.
        """
        found = self._db.execute(
            f"SELECT key FROM entries WHERE key = ANY({_LISTED})", ("\n".join(key for key, _ in items),)
        )
        taken = {key for (key,) in found}
        entries: list[tuple[object, ...]] = []
        rows: dict[Table, list[str]] = {}
        pieces: list[tuple[str, int, bytes]] = []
        for key, data in items:
            if key in taken:
                check_version(key, b"", ABSENT)
            taken.add(key)
            spot = self._tables.spot(key)
            if spot is not None and spot.table.is_log and (lines := read_rows(data)) is not None:
                entries.append((key, "log", None, new_id()))
                rows.setdefault(spot.table, []).extend(_copied_log(spot, lines))
            elif spot is not None and not spot.table.is_log and (text := body_of(data)) is not None:
                entries.append((key, "document", len(data), new_id()))
                rows.setdefault(spot.table, []).append(_copied((*spot.ids, *shown(spot.table, data), text)))
            else:
                kept = new_id()
                entries.append((key, "pieces", len(data), kept))
                cut = range(0, len(data), PIECE_BYTES)
                pieces.extend((kept, number, data[at : at + PIECE_BYTES]) for number, at in enumerate(cut))
        self.changed |= taken
        fits = self.session.copy("entries", ("key", "place", "size", "id"), entries)
        fits = fits and self.session.copy("pieces", ("id", "number", "data"), pieces)
        fits = fits and all(
            self.session.copy_text(table.name, table.columns, "".join(of_table).encode())
            for table, of_table in rows.items()
        )
        if not fits:
            raise IntegrityError("There are rows that the table `entries` does not name.")


# One message is asked for as the first one from a place on, in the order of one index. A planner without statistics, or
# one that multiplies those of a user with those of a session as if they had nothing to do with each other, takes a log
# for one row. Then any index that begins with the owner of a log seems as good, and all of the log may be read to find
# one message. Only one index gives this order, and to sort seems dear.


def _from_id(table: Table, record_id: str) -> str:
    """Return the first message of a log, or of one behind it, whose id is not below `record_id`."""
    owner, *rest = table.ids
    order = ", ".join((*rest, "id"))
    return (
        f"SELECT {order}, position, body FROM {table.name} WHERE {owner} = ? "
        f"AND ({order}) >= ({'?, ' * len(rest)}{record_id}) ORDER BY {order} LIMIT 1"
    )


def _is_of(table: Table, name: str) -> str:
    """Return the condition, with AND behind it, that what `_from_id` found is of that log."""
    return "".join(f"{name}.{column} = ? AND " for column in table.ids[1:])


def _count(spot: Spot) -> str:
    return f"SELECT position + 1 AS count FROM {of(spot)} ORDER BY position DESC LIMIT 1"


def _copied(values: Sequence[str | None]) -> str:
    """Return a row as COPY reads it."""
    return "\t".join(["\\N" if value is None else _escaped(value) for value in values]) + "\n"


def _copied_log(spot: Spot, lines: Sequence[tuple[str, codec.ReadLine]]) -> Iterator[str]:
    """Yield the rows of a log as COPY reads them; migrations and restores spend most of their time here."""
    owner = "\t".join(map(_escaped, spot.ids))
    if spot.table.shown and not any(_ESCAPED(line) for line, _ in lines):
        # What JSON writes without a backslash holds no character that COPY has to be told of.
        for position, (line, record) in enumerate(lines):
            yield (f"{owner}\t{position}\t{record.id}\t{record.role}\t{record.content}\t{record.timestamp}\t{line}\n")
        return
    for position, (line, record) in enumerate(lines):
        values = [_escaped(record.id)]
        if spot.table.shown:
            values += (_escaped(record.role), _escaped(record.content), _escaped(record.timestamp))
        values.append(_escaped(line))
        yield f"{owner}\t{position}\t" + "\t".join(values) + "\n"


def _escaped(text: str) -> str:
    """Return a value as COPY reads it; U+0000, which PostgreSQL cannot hold, is shown as U+FFFD."""
    for character, written in _ESCAPES:
        if character in text:
            text = text.replace(character, written)
    return text


class _Asked(NamedTuple):
    """What stands behind FROM for some owners, numbered from 1, and its parameters."""

    text: str
    values: list[str]


def _asked(table: Table, owners: Iterable[tuple[str, ...]]) -> _Asked:
    """Return a table `wanted` of owners, as arrays, which is one statement for any number of them."""
    lists = ", ".join([_LISTED] * len(table.ids))
    return _Asked(
        f"unnest({lists}) WITH ORDINALITY AS wanted ({', '.join(table.ids)}, number)",
        ["\n".join(ids) for ids in zip(*owners, strict=True)],
    )


def _is(spot: Spot) -> str:
    return " AND ".join(f"beside.{name} = ?" for name in spot.table.ids)


def _from_end(number: int) -> str:
    return "?" if number >= 0 else "newest.count + ?"
