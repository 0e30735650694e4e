"""A store's contents in PostgreSQL: the statements that differ, for there every statement is a trip to the server."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from ... import codec
from ...errors import IntegrityError
from ...models import new_id
from ..changes import ABSENT
from ..contents import PIECE_BYTES, Contents, Fresh, Place, rows_of
from ..gathered import Known
from ..rules import check_version
from ..tables import Spot, Table, Tables, body_of, shown
from .session import PostgresSession

_FEW = 128
"""Rows that are asked for without a cursor."""
_MOST = 2**31 - 1
"""No position is larger."""
_KEYS = "ANY(string_to_array(?, chr(10)))"
"""Keys and ids as one text, which psycopg hands over much faster than an array; no control character is in them."""


class PostgresContents(Contents):
    """What is in a store, for one transaction, or for one statement outside of any."""

    def __init__(self, connection: PostgresSession, tables: Tables) -> None:
        super().__init__(connection, tables)
        self._session = connection

    # --- reading in one statement ----------------------------------------------------------------------

    def keys(self, prefix: str) -> list[str]:
        return [] if "\0" in prefix else super().keys(prefix)

    def read(self, key: str) -> bytes | None:
        spot = self._tables.document(key)
        if spot is not None:
            rows = self._beside(
                key, "beside.body", spot.table.name, f"entry.place = 'document' AND {_is(spot)}", spot.ids
            )
        elif self.is_log(key):
            return super().read(key)
        else:
            rows = self._beside(key, "beside.data", "pieces", "beside.id = entry.pieces", (), "beside.number")
        if not rows:
            return None
        place = Place(*rows[0][:4])
        if place.kind == "document" and spot is not None and rows[0][4] is not None:
            return str(rows[0][4]).encode()
        if place.kind == "pieces" and spot is None:
            return b"".join(row[4] or b"" for row in rows)
        return self.bytes_of(key, place)

    def records(self, key: str, start: int, stop: int | None, *, strict: bool) -> list[bytes]:
        spot = self._tables.log(key)
        first, end = max(-_MOST, min(start, _MOST)), max(-_MOST, min(_MOST if stop is None else stop, _MOST))
        rows = self._beside(
            key,
            "beside.body",
            spot.table.name,
            f"entry.place = 'log' AND {_is(spot)} AND beside.position >= {_position(first)}"
            f" AND beside.position < {_position(end)}",
            (*spot.ids, first, end),
            "beside.position",
        )
        if rows and rows[0][0] != "log":
            return super().records(key, start, stop, strict=strict)
        return [row[4].encode() for row in rows if row[4] is not None]

    def find(self, key: str, record_id: str) -> tuple[int, bytes] | None:
        spot = self._tables.log(key)
        rows = self._beside(
            key,
            "beside.body, beside.position",
            spot.table.name,
            f"entry.place = 'log' AND {_is(spot)} AND beside.id = ?",
            (*spot.ids, record_id if _can_be_id(record_id) else ""),
        )
        if rows and rows[0][0] != "log":
            return super().find(key, record_id)
        return (rows[0][5], rows[0][4].encode()) if rows and rows[0][5] is not None else None

    def _beside(
        self, key: str, what: str, table: str, condition: str, values: Sequence[object], order: str = ""
    ) -> list[tuple[Any, ...]]:
        """Return the place of a key with what is in the table that holds it; no row if nothing is at the key."""
        return self._db.execute(
            f"SELECT entry.place, entry.size, entry.records, entry.pieces, {what} FROM entries AS entry "
            f"LEFT JOIN {table} AS beside ON {condition} WHERE entry.key = ? {order and f'ORDER BY {order}'}",
            (*values, key),
        )

    def lines(self, key: str, first: int, end: int) -> Iterator[bytes]:
        if end - first > _FEW:
            yield from super().lines(key, first, end)
            return
        spot = self._tables.log(key)
        for (body,) in self._db.execute(
            f"SELECT body FROM {spot.table.name} AS beside WHERE {_is(spot)} AND position >= ? AND position < ? "
            "ORDER BY position",
            (*spot.ids, first, end),
        ):
            yield body.encode()

    # --- adding in bulk --------------------------------------------------------------------------------

    def know(self, known: Known, owners: Collection[str], logs: Collection[str], *, lock: bool) -> None:
        """Learn which of some documents and logs are there; with `lock` nobody else adds to these logs meanwhile.

        The logs are locked in the order of their keys, so no two writers wait for each other.
        """
        rows = self._db.execute(
            f"""
            WITH logs AS (
                SELECT key, records FROM entries WHERE key = {_KEYS} AND place = 'log'
                {"ORDER BY key FOR UPDATE" if lock else ""}
            )
            SELECT key, records FROM logs UNION ALL SELECT key, NULL FROM entries WHERE key = {_KEYS}
            """,
            ("\n".join(logs), "\n".join(owners)),
        )
        for key, records in rows:
            if records is None:
                known.owners.add(key)
            else:
                known.records[key] = records

    def add_fresh(self, messages: Sequence[Fresh]) -> bool:
        if len(messages) == 1:
            return super().add_fresh(messages)
        rows: dict[Table, list[tuple[object, ...]]] = {}
        grown: dict[str, list[int]] = {}
        for key, position, record_id, line in messages:
            spot = self._tables.log(key)
            rows.setdefault(spot.table, []).append(_row(spot, position, record_id, line))
            sizes = grown.setdefault(key, [0, 0])
            sizes[0] += 1
            sizes[1] += len(line)
        for table, of_table in rows.items():
            if not self._session.copy(table.name, _columns(table), of_table):
                return False
        self._db.execute(
            """
            UPDATE entries SET records = entries.records + grown.records, size = entries.size + grown.size
            FROM unnest(string_to_array(?, chr(10)), string_to_array(?, ',')::integer[],
                string_to_array(?, ',')::bigint[]) AS grown(key, records, size)
            WHERE entries.key = grown.key
            """,
            (
                "\n".join(grown),
                ",".join(str(records) for records, _ in grown.values()),
                ",".join(str(size) for _, size in grown.values()),
            ),
        )
        return True

    def load(self, items: Sequence[tuple[str, bytes]]) -> None:
        """Put bytes at keys where nothing is.

        Raises:
            ConflictError: There is something at one of them.
            IntegrityError: There are rows where nothing should be.
        """
        found = self._db.execute(f"SELECT key FROM entries WHERE key = {_KEYS}", ("\n".join(key for key, _ in items),))
        taken = {key for (key,) in found}
        entries: list[tuple[object, ...]] = []
        rows: dict[Table, list[tuple[object, ...]]] = {}
        pieces: list[tuple[str, int, bytes]] = []
        for key, data in items:
            if key in taken:
                check_version(key, b"", ABSENT)
            taken.add(key)
            lines = rows_of(data) if self.is_log(key) else None
            spot = self._tables.document(key)
            text = None if spot is None else body_of(data)
            if lines is not None:
                log = self._tables.log(key)
                entries.append((key, "log", len(data), len(lines), None))
                rows.setdefault(log.table, []).extend(
                    _row(log, position, codec.written_id(line), line) for position, line in enumerate(lines)
                )
            elif spot is not None and text is not None:
                entries.append((key, "document", len(data), 0, None))
                rows.setdefault(spot.table, []).append((*spot.ids, *shown(spot.table, data), text))
            else:
                kept = new_id()
                entries.append((key, "pieces", len(data), 0, kept))
                cut = range(0, len(data), PIECE_BYTES)
                pieces.extend((kept, number, data[at : at + PIECE_BYTES]) for number, at in enumerate(cut))
        whole = self._session.copy("entries", ("key", "place", "size", "records", "pieces"), entries)
        whole = whole and self._session.copy("pieces", ("id", "number", "data"), pieces)
        for table, of_table in rows.items():
            whole = whole and self._session.copy(table.name, _columns(table), of_table)
        if not whole:
            raise IntegrityError("There are rows that the table `entries` does not count.")


def _row(spot: Spot, position: int, record_id: str, line: bytes) -> tuple[object, ...]:
    return (*spot.ids, position, record_id, *shown(spot.table, line), line[:-1].decode())


def _columns(table: Table) -> tuple[str, ...]:
    own = ("position", "id") if table.is_log else ()
    return (*table.ids, *own, *table.shown, "body")


def _is(spot: Spot) -> str:
    return " AND ".join(f"beside.{name} = ?" for name in spot.table.ids)


def _position(number: int) -> str:
    return "?" if number >= 0 else "entry.records + ?"


def _can_be_id(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)
