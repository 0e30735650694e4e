"""The messages of logs that are kept in rows, one a line: every statement on the tables of messages.

Positions of a log count from 0 without a gap, and no id comes twice. How many there are is told by the newest row, so
that a new message changes nothing but the tables of messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec

from .. import codec
from ..errors import IntegrityError
from .rules import logger
from .tables import LINES, Spot, Table, Tables, shown

T = TypeVar("T")

AT_ONCE = 200
"""Keys that one statement asks for: a database allows only so many parameters."""


class Connection(Protocol):
    """One connection to a database; parameters of statements are written `?`."""

    position_of: str
    """The function that tells where in a text another one begins."""
    size_of_body: str
    """The number of bytes of the column `body`, as an expression."""
    size_of_data: str
    """The same of the column `data`."""

    def execute(self, statement: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Run a statement; return all its rows."""

    def run_for(self, statement: str, rows: Iterable[Sequence[object]]) -> int:
        """Run a statement for each of several rows of parameters; return how many rows it changed in all."""

    def stream(self, statement: str, parameters: Sequence[object]) -> Iterator[tuple[Any, ...]]:
        """Run a statement; yield its rows without holding all of them."""


class Repeated(Exception):
    """A message is in its log already; nothing that the transaction wrote may stay."""


class Fresh(msgspec.Struct, frozen=True, gc=False):
    """A message that is to come at a position of a log that is kept in rows."""

    key: str
    position: int
    id: str
    line: bytes


class LogRows:
    """The rows of a store's logs, for one transaction. A log is named by its key; it has no rows where it is absent."""

    def __init__(self, connection: Connection, tables: Tables) -> None:
        self._db = connection
        self._tables = tables

    # --- reading -------------------------------------------------------------------------------------

    def count(self, key: str) -> int:
        """Return how many rows a log has."""
        spot = self._tables.log(key)
        rows = self._db.execute(f"SELECT position FROM {of(spot)} ORDER BY position DESC LIMIT 1", spot.ids)
        return rows[0][0] + 1 if rows else 0

    def size(self, key: str) -> int:
        """Return how many bytes a log has with its newlines; reads all of it."""
        spot = self._tables.log(key)
        [(size,)] = self._db.execute(f"SELECT sum({self._db.size_of_body} + 1) FROM {of(spot)}", spot.ids)
        return int(size or 0)

    def sizes(self, keys: Sequence[str]) -> dict[str, int]:
        """Return how many bytes each of some logs has with its newlines."""
        return {key: self.size(key) for key in keys}

    def whole_logs(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return all bytes of each of some logs.

        Raises:
            IntegrityError: A line is not there.
        """
        return {key: b"".join(line + b"\n" for line in self.lines(key, 0, self.count(key))) for key in keys}

    def keys(self) -> set[str]:
        """Return the keys of all logs that have rows."""
        return {key for key, _, _ in self._counted()}

    def gaps(self) -> list[str]:
        """Return the keys of the logs in which a position has no row."""
        return sorted(key for key, rows, behind in self._counted() if rows != behind)

    def strays(self) -> list[str]:
        """Return what is wrong with rows that are of no log at all."""
        return []

    def _counted(self) -> Iterator[tuple[str, int, int]]:
        """Yield for each log its key, how many rows it has, and the position behind the last one."""
        for entry, table in (*self._tables.by_entry.items(), ("", LINES)):
            if table.is_log:
                names = ", ".join(table.ids)
                counted = f"SELECT count(*), max(position) + 1, {names} FROM {table.name} GROUP BY {names}"
                for rows, behind, *ids in self._db.execute(counted):
                    yield self._tables.key_of(entry, ids) if entry else ids[0], rows, behind

    def lines(self, key: str, first: int, end: int) -> Iterator[bytes]:
        """Yield lines by position, without their newlines.

        Raises:
            IntegrityError: One of them is not there.
        """
        spot = self._tables.log(key)
        rows = self._db.stream(
            f"SELECT position, body FROM {of(spot)} AND position >= ? AND position < ? ORDER BY position",
            (*spot.ids, first, end),
        )
        yield from whole(key, rows, first, end)

    def find(self, key: str, record_id: str) -> tuple[int, bytes] | None:
        """Return position and line of a record."""
        spot = self._tables.log(key)
        rows = self._db.execute(f"SELECT position, body FROM {of(spot)} AND id = ?", (*spot.ids, record_id))
        return (rows[0][0], rows[0][1].encode()) if rows else None

    def lines_of(self, key: str, ids: Sequence[str]) -> dict[str, bytes]:
        """Return the lines of those records of a log that are there, by id."""
        spot = self._tables.log(key)
        found: dict[str, bytes] = {}
        for some in runs_of(ids):
            rows = self._db.execute(f"SELECT id, body FROM {of(spot)} AND id IN ({marks(some)})", (*spot.ids, *some))
            found.update((record_id, body.encode()) for record_id, body in rows)
        return found

    def newest(self, keys: Sequence[str]) -> dict[str, tuple[int, bytes]]:
        """Return position and line of the newest record of each log that has one."""
        found: dict[str, tuple[int, bytes]] = {}
        for table, spots in self._by_table(keys).items():
            same = same_ids(table)
            last = f"(SELECT position FROM {table.name} AS n WHERE {same} ORDER BY position DESC LIMIT 1)"
            statement = f"FROM wanted LEFT JOIN {table.name} AS t ON {same.replace('n.', 't.')} AND t.position = {last}"
            for some in runs_of(list(spots.items())):
                asked = asking(table.ids, (spot.ids for _, spot in some))
                rows = self._db.execute(
                    f"{asked.text} SELECT wanted.number, t.position, t.body {statement}", asked.values
                )
                for number, position, body in rows:
                    if body is not None:
                        found[some[number][0]] = position, body.encode()
        return found

    def at(self, places: Sequence[tuple[str, int]]) -> list[bytes | None]:
        """Return the lines at some positions of logs, in order; None where there is none."""
        found: list[bytes | None] = [None] * len(places)
        by_table: dict[Table, list[tuple[int, tuple[object, ...]]]] = {}
        for number, (key, position) in enumerate(places):
            spot = self._tables.log(key)
            by_table.setdefault(spot.table, []).append((number, (*spot.ids, position)))
        for table, wanted in by_table.items():
            same = f"{same_ids(table).replace('n.', 't.')} AND t.position = wanted.position"
            for some in runs_of(wanted):
                asked = asking((*table.ids, "position"), (values for _, values in some))
                rows = self._db.execute(
                    f"{asked.text} SELECT wanted.number, t.body FROM wanted LEFT JOIN {table.name} AS t ON {same}",
                    asked.values,
                )
                for number, body in rows:
                    found[some[number][0]] = None if body is None else body.encode()
        return found

    def _by_table(self, keys: Iterable[str]) -> dict[Table, dict[str, Spot]]:
        found: dict[Table, dict[str, Spot]] = {}
        for key in keys:
            spot = self._tables.log(key)
            found.setdefault(spot.table, {})[key] = spot
        return found

    # --- writing -------------------------------------------------------------------------------------

    def open(self, key: str) -> None:
        """Make a log that is absent."""

    def add(self, messages: Sequence[Fresh]) -> bool:
        """Add messages at the ends of their logs; return False if one of them is there already.

        Then the transaction has to be rolled back.
        """
        rows: dict[Table, list[tuple[object, ...]]] = {}
        for message in messages:
            spot = self._tables.log(message.key)
            rows.setdefault(spot.table, []).append(row_of(spot, message.position, message.id, message.line))
        for table, of_table in rows.items():
            columns = table.columns
            added = self._db.run_for(
                f"INSERT INTO {table.name} ({', '.join(columns)}) VALUES ({marks(columns)}) ON CONFLICT DO NOTHING",
                of_table,
            )
            if added != len(of_table):
                return False
        return True

    def replace(self, key: str, position: int, line: bytes) -> None:
        """Put another line of the same id in the place of one."""
        spot = self._tables.log(key)
        columns = (*spot.table.shown, "body")
        self._db.execute(
            f"UPDATE {spot.table.name} SET {', '.join(f'{column} = ?' for column in columns)} "
            f"WHERE {where(spot)} AND position = ?",
            (*shown(spot.table, line), line[:-1].decode(), *spot.ids, position),
        )

    def remove(self, key: str, position: int) -> None:
        """Remove one line; those behind it move up."""
        spot = self._tables.log(key)
        self._db.execute(f"DELETE FROM {of(spot)} AND position = ?", (*spot.ids, position))
        # In two steps, for no two rows may have one position in between.
        move = f"UPDATE {spot.table.name} SET position = {{}} WHERE {where(spot)} AND position {{}} ?"
        self._db.execute(move.format("-position", ">"), (*spot.ids, position))
        self._db.execute(move.format("-position - 1", "<"), (*spot.ids, 0))

    def cut(self, key: str, first: int) -> None:
        """Remove the lines from a position on."""
        spot = self._tables.log(key)
        self._db.execute(f"DELETE FROM {of(spot)} AND position >= ?", (*spot.ids, first))

    def drop(self, key: str) -> None:
        """Remove all lines, and the log."""
        spot = self._tables.log(key)
        self._db.execute(f"DELETE FROM {of(spot)}", spot.ids)

    def move(self, source: str, target: str) -> None:
        """Give a log another key, at which nothing is."""
        self.open(target)
        fresh = (
            Fresh(target, at, codec.written_id(line), line + b"\n")
            for at, line in enumerate(self.lines(source, 0, self.count(source)))
        )
        while some := list(islice(fresh, AT_ONCE)):
            if not self.add(some):
                raise twice(target)
        self.drop(source)


def row_of(spot: Spot, position: int, record_id: str, line: bytes) -> tuple[object, ...]:
    """Return the row of a message, its columns in the order of the table's."""
    return (*spot.ids, position, record_id, *shown(spot.table, line), line[:-1].decode())


def whole(key: str, rows: Iterable[Sequence[Any]], first: int, end: int) -> Iterator[bytes]:
    """Yield the lines of rows of position and line, which are to be all from one position up to another.

    Raises:
        IntegrityError: One of them is not there.
    """
    wanted = first
    for position, body in rows:
        if position != wanted:
            break
        yield body.encode()
        wanted += 1
    if wanted < end:
        raise missing(key, wanted)


def missing(key: str, position: int) -> IntegrityError:
    """Return the error for a row that should be there."""
    return IntegrityError(f"{key}: the message at position {position} is missing from its table.", key=key)


def good_rows(key: str, lines: Iterable[bytes], first: int, *, strict: bool) -> list[bytes]:
    """Return the lines of rows that are messages; the others, which somebody changed by hand, as `read_log` does."""
    good = []
    for position, line in enumerate(lines, first):
        if codec.line_id(line) is not None:
            good.append(line)
            continue
        text = f"{key}: the row at position {position} is no message"
        if strict:
            raise IntegrityError(f"{text}.", key=key, hint="Run `chatdb check` to see all damage.")
        logger.warning("%s; it is passed over", text)
    return good


def twice(key: str) -> IntegrityError:
    """Return the error for rows that contradict each other."""
    return IntegrityError(f"{key} has two rows of one message, or of one position.", key=key)


class Asked(NamedTuple):
    """The beginning of a statement that has a table `wanted` of what is asked for, and its parameters."""

    text: str
    values: list[object]


def asking(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Asked:
    """Return a table `wanted` of these columns, and of `number`, which counts the rows from 0."""
    values: list[object] = []
    parts: list[str] = []
    row_marks = marks(columns)
    for number, row in enumerate(rows):
        parts.append(f"({number}, {row_marks})")
        values += row
    return Asked(f"WITH wanted (number, {', '.join(columns)}) AS (VALUES {', '.join(parts)})", values)


def runs_of(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield items, as many at a time as one statement asks for."""
    for start in range(0, len(items), AT_ONCE):
        yield items[start : start + AT_ONCE]


def same_ids(table: Table) -> str:
    """Return the condition that a row `n` of a table belongs to a row of `wanted`."""
    return " AND ".join(f"n.{name} = wanted.{name}" for name in table.ids)


def where(spot: Spot) -> str:
    """Return the condition that a row is of a spot's owner."""
    return " AND ".join(f"{name} = ?" for name in spot.table.ids)


def of(spot: Spot) -> str:
    """Return the rows of a spot's owner, as a statement names them."""
    return f"{spot.table.name} WHERE {where(spot)}"


def marks(columns: Sequence[object]) -> str:
    """Return as many marks for parameters as there are columns."""
    return ", ".join("?" * len(columns))
