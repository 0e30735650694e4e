"""Taking the texts of a user's messages, contexts and analyses into an index.

Every text is kept as its tokens with a space between, in FTS5 and in a table: FTS5 needs it to take a text out again,
so that nothing of what was removed is found or counted, and the measures of relevance are read from it.

Messages get ids in the order in which they are taken in, sorted by time as far as that goes. A message is `highest` if
it is newer than all with lower ids; see `matches.py` for what that is good for.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Final

import msgspec

from .. import codec
from ..backends.base import logger
from ..errors import IntegrityError, ValidationError
from ..models import microseconds, parse_timestamp
from .database import SESSION_INDEX
from .rows import ROW, read_logs, read_meta, write_meta
from .texts import Lines, Log, Notes, line_hash, message_text
from .tokens import count_spaced, spaced

_AT_ONCE: Final = 25
"""Rows a statement, which takes two thirds of the time of a statement each."""
_PUT_ASIDE: Final = "INSERT INTO incoming VALUES {}"
_ASIDE: Final = "(NULL, ?, ?, ?, ?, ?, ?, NULL, ?, ?)"


class Intake:
    """Takes texts into an index, within one transaction of its connection."""

    def __init__(self, connection: sqlite3.Connection, *, content: bool, metadata: bool, fresh: bool = False) -> None:
        """Begin; a `fresh` index has no messages yet, and gets them in order of time when `finish` is called."""
        self._connection = connection
        self._content = content
        self._metadata = metadata
        self._fresh = fresh
        if fresh:
            connection.execute("PRAGMA temp.page_size = 65536")  # it is written and read in order: fewer system calls
            connection.execute("CREATE TEMP TABLE incoming AS SELECT * FROM messages")
            for table in ("words", "note_words"):
                connection.execute(f"INSERT INTO {table} ({table}, rank) VALUES ('hashsize', 33554432)")

    def take(self, pieces: Iterable[Lines | Notes]) -> None:
        """Take in lines and notes; of one log in their order."""
        rows: dict[int, list[tuple[Any, ...]]] = {}  # by the number of the log
        for piece in pieces:
            if isinstance(piece, Notes):
                self._notes(piece)
                continue
            number, new = self._lines(piece)
            if self._fresh:  # at once, while they are in the processor's cache
                self._put_aside(new)
                continue
            if piece.reset:
                rows.pop(number, None)
            rows.setdefault(number, []).extend(new)
        if any(rows.values()):
            self._insert([row for some in rows.values() for row in some])

    def _put_aside(self, rows: list[tuple[Any, ...]]) -> None:
        """Let rows wait for `finish`."""
        whole = len(rows) - len(rows) % _AT_ONCE
        groups = (chain.from_iterable(rows[start : start + _AT_ONCE]) for start in range(0, whole, _AT_ONCE))
        self._connection.executemany(_PUT_ASIDE.format(", ".join([_ASIDE] * _AT_ONCE)), map(tuple, groups))
        self._connection.executemany(_PUT_ASIDE.format(_ASIDE), rows[whole:])

    def finish(self) -> None:
        """Put what a fresh index was given in its order."""
        connection = self._connection
        connection.execute(
            "INSERT INTO messages SELECT NULL, i.session, i.position, i.offset, i.length, i.moment, i.role, "
            "i.moment IS NOT NULL, i.tokens, i.text FROM incoming AS i JOIN logs ON logs.number = i.session "
            "ORDER BY i.moment, logs.session_id, i.position"
        )
        connection.execute("DROP TABLE incoming")
        connection.execute(f"INSERT INTO words (rowid, text) SELECT {ROW}, text FROM messages ORDER BY id")
        peak = connection.execute(
            "SELECT moment, session_id, position FROM messages JOIN logs ON number = session WHERE highest "
            "ORDER BY id DESC LIMIT 1"
        ).fetchone()
        write_meta(connection, peak=_peak(peak or (-(2**62), "", 0)), deletions=0, text=1)

    def drop(self, session_ids: Iterable[str]) -> None:
        """Take out everything of sessions that are gone."""
        for session_id, log in read_logs(self._connection, list(session_ids)).items():
            self._remove_messages(log)
            self._remove_notes(log.number, ("context", "analysis"))
            self._connection.execute("DELETE FROM logs WHERE session_id = ?", (session_id,))

    def _log(self, session_id: str) -> Log:
        found = read_logs(self._connection, [session_id])
        if not found:
            self._connection.execute(
                "INSERT INTO logs VALUES (NULL, ?, NULL, 0, NULL, 0, 0, NULL, NULL, 0)", (session_id,)
            )
            found = read_logs(self._connection, [session_id])
        return found[session_id]

    def _lines(self, piece: Lines) -> tuple[int, list[tuple[Any, ...]]]:
        """Take out what a piece replaces; return the number of its log, and the rows that are to be put in."""
        log = self._log(piece.session_id)
        if piece.reset:
            self._remove_messages(log)
            log.messages = log.tokens = 0
            log.last, log.last_hash = 0, None
        rows = []
        position = log.messages
        for offset, line in piece.lines:
            try:
                message = codec.decode_line(line)
            except IntegrityError:  # what reads the log passes it over, and says so
                continue
            text = spaced(message_text(message, content=self._content, metadata=self._metadata))
            try:
                moment: int | None = microseconds(parse_timestamp(message.timestamp))
            except ValidationError as error:
                moment = None
                self._timeless(f"The message {message.id!r} of session {piece.session_id!r}", error)
            count = count_spaced(text)
            log.tokens += count
            rows.append((log.number, position, offset, len(line), moment, message.role, count, text))
            position += 1
        log.messages = position
        if piece.lines:
            log.last, line = piece.lines[-1]
            log.last_hash = line_hash(line)
        self._connection.execute(
            "UPDATE logs SET identity = ?, last = ?, last_hash = ?, messages = ?, tokens = ?, log_stamp = ? "
            "WHERE number = ?",
            (piece.identity, log.last, log.last_hash, log.messages, log.tokens, piece.stamp, log.number),
        )
        return log.number, rows

    def _timeless(self, what: str, error: ValidationError) -> None:
        """Note that a text has no time that can be read, so that it counts and is never a hit."""
        logger.warning("%s is damaged: %s It is passed over.", what, error.message)
        write_meta(self._connection, timeless=1)

    def _insert(self, rows: list[tuple[Any, ...]]) -> None:
        connection = self._connection
        numbers = sorted({row[0] for row in rows})
        marks = ",".join("?" * len(numbers))
        names = dict(connection.execute(f"SELECT number, session_id FROM logs WHERE number IN ({marks})", numbers))
        peak = msgspec.json.decode(read_meta(connection).peak, type=tuple[int, str, int])
        rows.sort(key=lambda row: (row[4] is not None, row[4] or 0, names[row[0]], row[1]))
        first = (connection.execute("SELECT max(id) FROM messages").fetchone()[0] or 0) + 1
        placed = []
        for number, row in enumerate(rows, first):
            key = (row[4], names[row[0]], row[1])
            highest = row[4] is not None and key > peak
            if highest:
                peak = key
            placed.append((number, *row[:6], highest, *row[6:]))
        connection.executemany("INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", placed)
        connection.execute(
            f"INSERT INTO words (rowid, text) SELECT {ROW}, text FROM messages WHERE id >= ? ORDER BY id", (first,)
        )
        write_meta(connection, peak=_peak(peak))

    def _remove_messages(self, log: Log) -> None:
        if not log.messages:
            return
        if self._fresh:
            self._connection.execute("DELETE FROM incoming WHERE session = ?", (log.number,))
            return
        self._connection.execute(SESSION_INDEX)
        self._connection.execute(
            "INSERT INTO words (words, rowid, text) "
            f"SELECT 'delete', {ROW}, text FROM messages WHERE session = ? ORDER BY id",
            (log.number,),
        )
        self._connection.execute("DELETE FROM messages WHERE session = ?", (log.number,))
        self._connection.execute("UPDATE meta SET value = value + 1 WHERE name = 'deletions'")

    def _notes(self, piece: Notes) -> None:
        log = self._log(piece.session_id)
        self._remove_notes(log.number, piece.kinds)
        for note in piece.notes:
            text = spaced(note.text)
            try:
                moment: int | None = microseconds(parse_timestamp(note.timestamp))
            except ValidationError as error:
                moment = None
                self._timeless(f"The {note.kind} of session {piece.session_id!r}", error)
            cursor = self._connection.execute(
                "INSERT INTO notes VALUES (NULL, ?, ?, ?, ?, ?, ?)",
                (log.number, note.kind, note.filename, moment, count_spaced(text), text),
            )
            self._connection.execute("INSERT INTO note_words (rowid, text) VALUES (?, ?)", (cursor.lastrowid, text))
        if "analysis" in piece.kinds:
            has = any(note.kind == "analysis" for note in piece.notes)
            self._connection.execute("UPDATE logs SET has_documents = ? WHERE number = ?", (has, log.number))
        if "context" in piece.kinds:
            self._connection.execute(
                "UPDATE logs SET context_stamp = ? WHERE number = ?", (piece.context_stamp, log.number)
            )

    def _remove_notes(self, number: int, kinds: Sequence[str]) -> None:
        for kind in kinds:
            rows = self._connection.execute(
                "SELECT id, text FROM notes WHERE session = ? AND kind = ?", (number, kind)
            ).fetchall()
            self._connection.executemany(
                "INSERT INTO note_words (note_words, rowid, text) VALUES ('delete', ?, ?)", rows
            )
            self._connection.executemany("DELETE FROM notes WHERE id = ?", ((row[0],) for row in rows))


def _peak(key: tuple[Any, ...]) -> str:
    return msgspec.json.encode(key).decode()
