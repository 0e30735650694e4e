"""The one statement by which new messages arrive in SQLite, by itself or as a whole transaction.

A connection that writes has a temporary view `arriving`. For each row that is inserted into it a trigger does what a
transaction consists of: look whether others wrote, add a message, note what was changed, and move what has arrived to
its place if that has become much. So one call of SQLite does all of it, for which Python's lock is given away once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Final

from .notes import Note
from .rows import Fresh

MOST_ADDED: Final = 1024
"""Messages of one statement."""
MOST_BYTES: Final = 1 << 20
"""Of their lines, for a statement keeps what it was given last; a longer one goes by itself."""
REPEATED: Final = "repeated"
"""The text of the error where a message is in its log already."""

_MOST: Final = 4096
"""Arrivals; more are moved. A larger table is cheaper to keep and dearer to move at a time."""
_FEW: Final = 64
_STEP: Final = 64
"""More than a few rows are filled up to a multiple, or a large program would be kept for each number of them."""

# A message changed no row if it is in its log already, or if there is no such log. The plus takes the column's affinity
# away, with which SQLite does not look into the second column of the index: an id that many logs have would be looked
# for in all of them.
_SCRIPT: Final = """
CREATE TEMP VIEW IF NOT EXISTS arriving AS
    SELECT 0 AS seen, 0 AS key, 0 AS position, 0 AS id, 0 AS body, 0 AS number, 0 AS change, 0 AS bytes, 0 AS keys;

CREATE TEMP TRIGGER IF NOT EXISTS arriving_begins INSTEAD OF INSERT ON arriving WHEN NEW.seen IS NOT NULL BEGIN
    SELECT RAISE(ABORT, 'others wrote') WHERE (SELECT data_version FROM pragma_data_version) IS NOT NEW.seen;
END;

CREATE TEMP TRIGGER IF NOT EXISTS arriving_message INSTEAD OF INSERT ON arriving WHEN NEW.body IS NOT NULL BEGIN
    INSERT INTO arrivals (place, id, body)
        SELECT (logs.log << 32) + NEW.position, NEW.id, NEW.body FROM logs
        WHERE logs.key = NEW.key
            AND NOT EXISTS (SELECT 1 FROM records WHERE records.id = NEW.id AND records.place >> 32 = +logs.log)
        ON CONFLICT DO NOTHING;
    SELECT RAISE(ABORT, '{repeated}') WHERE changes() = 0;
END;

CREATE TEMP TRIGGER IF NOT EXISTS arriving_ends INSTEAD OF INSERT ON arriving
WHEN NEW.keys IS NOT NULL AND (SELECT max(number) FROM arrivals) > {most} BEGIN
    INSERT INTO records SELECT place, id, body FROM arrivals ORDER BY place;
    DELETE FROM arrivals;
END;

CREATE TEMP TRIGGER IF NOT EXISTS arriving_is_noted INSTEAD OF INSERT ON arriving WHEN NEW.number IS NOT NULL BEGIN
    INSERT INTO changes (number, id, bytes, keys) VALUES (NEW.number, NEW.change, NEW.bytes, NEW.keys);
END;
"""
_COLUMNS = "(seen, key, position, id, body, number, change, bytes, keys)"
_BEGIN = "(?, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL)"
_MESSAGE = "(NULL, ?, ?, ?, ?, NULL, NULL, NULL, NULL)"
_MARKS = _MESSAGE.count("?")
_END = "(NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, '')"
_NOTED_END = "(NULL, NULL, NULL, NULL, NULL, ?, ?, ?, ?)"

Statement = tuple[str, list[object]]
"""With its parameters."""


def preparing() -> str:
    """Return the statements that make a connection ready for those of this module."""
    return _SCRIPT.format(most=_MOST, repeated=REPEATED)


def adding(messages: Sequence[Fresh]) -> Statement:
    """Return what adds messages to their logs within a transaction."""
    values = _values(messages)
    return _insert(len(values) // _MARKS, as_transaction=False), values


def fits(messages: Sequence[Fresh]) -> bool:
    """Tell whether messages are not too many for one statement."""
    return len(messages) <= MOST_ADDED and sum([len(message.line) for message in messages]) <= MOST_BYTES


def runs(messages: Sequence[Fresh]) -> Iterator[Sequence[Fresh]]:
    """Yield messages, as many at a time as go into one statement."""
    start = size = 0
    for at, message in enumerate(messages):
        size += len(message.line)
        if at > start and (at - start >= MOST_ADDED or size > MOST_BYTES):
            yield messages[start:at]
            start, size = at, len(message.line)
    if messages:
        yield messages[start:]


def transaction(seen: int, messages: Sequence[Fresh], note: Note) -> Statement:
    """Return what adds messages to their logs, and notes it, as a transaction of its own.

    It fails if another connection has written since SQLite's `data_version` was `seen`.
    """
    values = _values(messages)
    return _insert(len(values) // _MARKS, as_transaction=True), [seen, *values, *note]


@lru_cache(maxsize=256)
def _insert(count: int, *, as_transaction: bool) -> str:
    rows = [_MESSAGE] * count
    rows = [_BEGIN, *rows, _NOTED_END] if as_transaction else [*rows, _END]
    return f"INSERT INTO arriving {_COLUMNS} VALUES {', '.join(rows)}"


def _values(messages: Sequence[Fresh]) -> list[object]:
    values: list[object] = []
    for message in messages:
        values += (message.key, message.position, message.id, message.line[:-1].decode())
    if len(messages) > _FEW:
        values += [None] * (_MARKS * (-len(messages) % _STEP))  # rows for which no trigger does anything
    return values
