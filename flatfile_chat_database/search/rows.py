"""What the tables of an index hold beside texts: where a message is in FTS5, and what is noted of it all.

The row of a message in FTS5 has the message's id with the grade of its length behind: a text of up to 63 tokens has a
grade of its own, longer ones share theirs with some of nearly the same length. So how relevant a match can be at most
is known without a look at the table, which takes most of the time that a word in few messages needs.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection

import msgspec

from .texts import Log, Meta

GRADE_BITS = 7
BANDS = ((64, 4), (128, 8), (256, 16), (512, 32))
"""From so many tokens on, so many lengths share a grade; the last grade has all that is longer, too."""
SHORTEST = [*range(BANDS[0][0]), *(first + number * width for first, width in BANDS for number in range(16))]
"""The least number of tokens, by grade."""
ROW = (
    f"(id << {GRADE_BITS} | CASE WHEN tokens < {BANDS[0][0]} THEN tokens "
    + " ".join(
        f"WHEN tokens < {2 * first} THEN {64 + 16 * number} + (tokens - {first}) / {width}"
        for number, (first, width) in enumerate(BANDS)
    )
    + f" ELSE {len(SHORTEST) - 1} END)"
)
"""The row in FTS5 of a row of `messages`."""


def read_meta(connection: sqlite3.Connection) -> Meta:
    """Return what the index notes of itself."""
    return msgspec.convert(dict(connection.execute("SELECT name, value FROM meta")), Meta)


def write_meta(connection: sqlite3.Connection, **values: object) -> None:
    """Note something of the index itself."""
    connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", values.items())


def read_logs(connection: sqlite3.Connection, session_ids: Collection[str] | None = None) -> dict[str, Log]:
    """Return what was taken in of some sessions, or of all, by session."""
    if session_ids is None:
        rows = connection.execute("SELECT * FROM logs").fetchall()
    else:
        found = (connection.execute("SELECT * FROM logs WHERE session_id = ?", (each,)) for each in session_ids)
        rows = [row for cursor in found for row in cursor]
    return {log.session_id: log for log in msgspec.convert(rows, list[Log])}
