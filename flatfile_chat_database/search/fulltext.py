"""The full text of a user's messages, contexts and analyses in an index: taking it in, and finding in it.

Every text is kept as its tokens with a space between, in FTS5 and in a table: FTS5 needs it to take a text out again,
so that nothing of what was removed is found or counted, and the measures of relevance are read from it.

Messages get ids in the order in which they are taken in, sorted by time as far as that goes. A message is `highest` if
it is newer than all with lower ids; so going down the ids, the newest N are known as soon as N were seen, the last of
which is no newer than a message that is highest. Everything that came in its order is highest, and what came late
costs a longer way and no wrong answer.

The row of a message in FTS5 has the message's id with the grade of its length behind: a text of up to 63 tokens has a
grade of its own, longer ones share theirs with some of nearly the same length. So how relevant a match can be at most
is known without a look at the table, which takes most of the time that a word in few messages needs.
"""

from __future__ import annotations

import heapq
import sqlite3
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Final

import msgspec

from .. import codec
from ..backends.base import logger
from ..errors import IntegrityError, ValidationError
from ..models import microseconds, parse_timestamp
from .database import SESSION_INDEX, IndexFile
from .query import Measure, Query, Relevance, Term, tokenise
from .texts import Filters, Found, Lines, Log, Meta, Notes, Totals, line_hash, message_text

RANKED: Final = 2000
"""The newest matches that are put in order of relevance; older ones follow them, newest first."""

_GRADE_BITS = 7
_BANDS = ((64, 4), (128, 8), (256, 16), (512, 32))
"""From so many tokens on, so many lengths share a grade; the last grade has all that is longer, too."""
_SHORTEST = [*range(_BANDS[0][0]), *(first + number * width for first, width in _BANDS for number in range(16))]
"""The least number of tokens, by grade."""
_ROW = (
    f"(id << {_GRADE_BITS} | CASE WHEN tokens < {_BANDS[0][0]} THEN tokens "
    + " ".join(
        f"WHEN tokens < {2 * first} THEN {64 + 16 * number} + (tokens - {first}) / {width}"
        for number, (first, width) in enumerate(_BANDS)
    )
    + f" ELSE {len(_SHORTEST) - 1} END)"
)
"""The row in FTS5 of a row of `messages`."""
_JOINED = f"words CROSS JOIN messages AS m ON m.id = words.rowid >> {_GRADE_BITS}"

_MANY = 30_000
"""FTS5 goes through all matches before it ranks the first; where there are more, reading texts takes less time."""
_MANY_LATE = 1000

_REMEMBERED_COUNTS = 1000
_COLUMNS = "m.session, m.position, m.offset, m.length, m.moment, m.role, m.highest, m.tokens, m.text"


_Score = Callable[[int, str], float]
"""Makes a score of a text's number of tokens and its tokens."""


# --- what is known ---------------------------------------------------------------------------------------


def read_meta(connection: sqlite3.Connection) -> Meta:
    """Return what the index notes of itself."""
    return msgspec.convert(dict(connection.execute("SELECT name, value FROM meta")), Meta)


def _peak(key: tuple[Any, ...]) -> str:
    return msgspec.json.encode(key).decode()


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


# --- taking in -------------------------------------------------------------------------------------------


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
                self._connection.executemany("INSERT INTO incoming VALUES (NULL, ?, ?, ?, ?, ?, ?, NULL, ?, ?)", new)
                continue
            if piece.reset:
                rows.pop(number, None)
            rows.setdefault(number, []).extend(new)
        if any(rows.values()):
            self._insert([row for some in rows.values() for row in some])

    def finish(self) -> None:
        """Put what a fresh index was given in its order."""
        connection = self._connection
        connection.execute(
            "INSERT INTO messages SELECT NULL, i.session, i.position, i.offset, i.length, i.moment, i.role, "
            "i.moment IS NOT NULL, i.tokens, i.text FROM incoming AS i JOIN logs ON logs.number = i.session "
            "ORDER BY i.moment, logs.session_id, i.position"
        )
        connection.execute("DROP TABLE incoming")
        connection.execute(f"INSERT INTO words (rowid, text) SELECT {_ROW}, text FROM messages ORDER BY id")
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
            tokens = tokenise(message_text(message, content=self._content, metadata=self._metadata))
            try:
                moment: int | None = microseconds(parse_timestamp(message.timestamp))
            except ValidationError as error:
                moment = None
                self._timeless(f"The message {message.id!r} of session {piece.session_id!r}", error)
            count = len(tokens)
            log.tokens += count
            rows.append((log.number, position, offset, len(line), moment, message.role, count, " ".join(tokens)))
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
            f"INSERT INTO words (rowid, text) SELECT {_ROW}, text FROM messages WHERE id >= ? ORDER BY id", (first,)
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
            f"SELECT 'delete', {_ROW}, text FROM messages WHERE session = ? ORDER BY id",
            (log.number,),
        )
        self._connection.execute("DELETE FROM messages WHERE session = ?", (log.number,))
        self._connection.execute("UPDATE meta SET value = value + 1 WHERE name = 'deletions'")

    def _notes(self, piece: Notes) -> None:
        log = self._log(piece.session_id)
        self._remove_notes(log.number, piece.kinds)
        for note in piece.notes:
            tokens = tokenise(note.text)
            try:
                moment: int | None = microseconds(parse_timestamp(note.timestamp))
            except ValidationError as error:
                moment = None
                self._timeless(f"The {note.kind} of session {piece.session_id!r}", error)
            text = " ".join(tokens)
            cursor = self._connection.execute(
                "INSERT INTO notes VALUES (NULL, ?, ?, ?, ?, ?, ?)",
                (log.number, note.kind, note.filename, moment, len(tokens), text),
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


# --- finding ---------------------------------------------------------------------------------------------


def find(
    file: IndexFile, connection: sqlite3.Connection, query: Query, filters: Filters, *, relevance: bool, count: int
) -> list[Found]:
    """Return the first `count` texts that match, in order: see `records/finding.py`."""
    found = _Finder(file, connection, query, filters).find(relevance=relevance, count=count)
    for item in found:
        item.check()
    return found


class _Finder:
    def __init__(self, file: IndexFile, connection: sqlite3.Connection, query: Query, filters: Filters) -> None:
        self._file = file
        self._connection = connection
        self._query = query
        self._filters = filters
        self._meta = read_meta(connection)
        self._log: Log | None = None
        self._names: dict[int, str] = {}

    def find(self, *, relevance: bool, count: int) -> list[Found]:
        filters = self._filters
        if filters.session_id is not None:
            self._log = read_logs(self._connection, [filters.session_id]).get(filters.session_id)
            if self._log is None:
                return []
        if relevance and count <= RANKED and filters.since is None and "message" in filters.kinds:
            quick = self._best(count)
            if quick is not None:
                return quick
        wanted = max(count, RANKED) if relevance else count
        found: list[Found] = []
        complete = True
        if "message" in filters.kinds:
            found, complete = self._messages(wanted)
        if filters.kinds - {"message"}:
            found += self._notes()
            found.sort(key=lambda item: item.key, reverse=True)
            found = found[:wanted]
        if relevance and found:
            self._rank(found[:RANKED], known=len(found) if complete else None)
            best = sorted(found[:RANKED], key=lambda item: (item.score, item.key), reverse=True)
            found[:RANKED] = best
            if count > RANKED:
                self._rank(found[RANKED:], known=len(found) if complete else None)
        return found[:count]

    # --- matches, newest first -----------------------------------------------------------------------

    def _messages(self, count: int) -> tuple[list[Found], bool]:
        """Return the newest matching messages, newest first, and whether they are all that there are."""
        cursor = self._matching(_COLUMNS)
        rows = cursor.fetchmany(count)
        complete = len(rows) < count
        since = self._filters.since
        if not all(row[6] for row in rows) or (since is not None and rows and rows[-1][4] < since):
            rows = self._in_order(cursor, rows, count)
        return [self._found(row) for row in rows], complete and self._is_everything

    @property
    def _is_everything(self) -> bool:
        """Whether every text that matches is a hit, so that counting hits counts the texts that hold a term."""
        filters = self._filters
        if (filters.roles, filters.since, filters.until) != (None, None, None):
            return False
        return not self._meta.timeless

    def _matching(self, columns: str) -> sqlite3.Cursor:
        """Select matching messages, the one that was taken in last first; `since` is the caller's to look at."""
        filters = self._filters
        conditions = ["words MATCH ?", "m.moment IS NOT NULL"]
        values: list[Any] = [expression(self._query.terms)]
        if self._log is not None:
            conditions.append("m.session = ?")
            values.append(self._log.number)
        if filters.roles is not None:
            conditions.append(f"m.role IN ({','.join('?' * len(filters.roles))})")
            values += sorted(filters.roles)
        if filters.until is not None:
            conditions.append("m.moment < ?")
            values.append(filters.until)
        return self._connection.execute(
            f"SELECT {columns} FROM {_JOINED} WHERE {' AND '.join(conditions)} ORDER BY words.rowid DESC",
            values,
        )

    def _in_order(self, cursor: sqlite3.Cursor, first: list[tuple[Any, ...]], count: int) -> list[tuple[Any, ...]]:
        """Return the newest rows where some came late, or are older than asked for."""
        since = self._filters.since
        heap: list[tuple[tuple[int, str, int], tuple[Any, ...]]] = []
        for rows in (first, cursor):
            for row in rows:
                key = (row[4], self._name(row[0]), row[1])
                if since is None or row[4] >= since:
                    if len(heap) < count:
                        heapq.heappush(heap, (key, row))
                    elif key > heap[0][0]:
                        heapq.heapreplace(heap, (key, row))
                elif row[6]:
                    break
                if row[6] and len(heap) == count and heap[0][0] >= key:
                    break
            else:
                continue
            break
        return [row for _, row in sorted(heap, reverse=True)]

    def _found(self, row: tuple[Any, ...]) -> Found:
        session, position, offset, length, moment, role, _, tokens, text = row
        return Found("message", self._name(session), moment, position, offset, length, role, "", text, tokens)

    def _notes(self) -> list[Found]:
        filters = self._filters
        if filters.roles is not None:
            return []
        rows = self._connection.execute(
            "SELECT n.kind, n.session, n.moment, n.filename, n.text, n.tokens "
            "FROM note_words CROSS JOIN notes AS n ON n.id = note_words.rowid "
            "WHERE note_words MATCH ? AND n.moment IS NOT NULL",
            (expression(self._query.terms),),
        )
        return [
            Found(kind, self._name(session), moment, 0, 0, 0, None, filename, text, tokens)
            for kind, session, moment, filename, text, tokens in rows
            if kind in filters.kinds
            and (self._log is None or session == self._log.number)
            and (filters.since is None or moment >= filters.since)
            and (filters.until is None or moment < filters.until)
        ]

    def _name(self, number: int) -> str:
        name = self._names.get(number)
        if name is None:
            row = self._connection.execute("SELECT session_id FROM logs WHERE number = ?", (number,)).fetchone()
            name = self._names[number] = msgspec.convert(row[0], str)
        return name

    # --- relevance -----------------------------------------------------------------------------------

    def _at(self, number: int) -> Found:
        """Return a message by its id."""
        row = self._connection.execute(f"SELECT {_COLUMNS} FROM messages AS m WHERE id = ?", (number,)).fetchone()
        return self._found(row)

    def _best(self, count: int) -> list[Found] | None:
        """Return the most relevant of few enough texts, of which all but the best are looked at in passing only.

        None if there are more than are ranked, and some of them came late, so that the newest have to be found first.
        """
        notes = self._notes() if self._filters.kinds - {"message"} else []
        graded = self._graded()
        read = [] if graded is not None else self._matching("m.tokens, m.text, m.highest, m.id").fetchmany(RANKED)
        number = len(read if graded is None else graded)
        complete = number < RANKED
        if (not complete and not all(row[2] for row in read)) or (notes and number + len(notes) > RANKED):
            return None
        score = self._scoring(number + len(notes) if complete and self._is_everything else None)
        found = self._best_read(read, score, count) if graded is None else self._best_graded(graded, score, count)
        for item in notes:
            item.score = score(item.tokens, item.text)
        found += notes
        found.sort(key=lambda item: (item.score, item.key), reverse=True)
        return found[:count]

    def _best_read(self, rows: list[tuple[Any, ...]], score: _Score, count: int) -> list[Found]:
        """Return the most relevant of messages of which tokens, text, `highest` and id were read."""
        scores = list(map(score, [row[0] for row in rows], [row[1] for row in rows]))
        order = sorted(range(len(rows)), key=scores.__getitem__, reverse=True)  # of equal ones the first stays first
        if len(order) <= count or all(row[2] for row in rows):
            chosen = order[:count]
        else:
            least = scores[order[count - 1]]
            chosen = [number for number in order if scores[number] >= least]
        found = []
        for number in chosen:
            item = self._at(rows[number][3])
            item.score = scores[number]
            found.append(item)
        return found

    def _graded(self) -> list[tuple[int, float]] | None:
        """Return the newest matches, newest first, as rows of FTS5 with its rank; None if that does not tell enough.

        This FTS5 knows no lengths, so two messages have the same rank only if a single term is in both equally often,
        unless three tokens is what messages have on average: then its `bm25` divides what it counts by the same count.
        """
        filters = self._filters
        if len(self._query.terms) > 1 or self._log is not None or (filters.roles, filters.until) != (None, None):
            return None
        match = expression(self._query.terms)
        if self._counted(match) > _MANY or self._totals().is_rank_blind:
            return None
        rows = self._connection.execute(
            "SELECT rowid, bm25(words) FROM words WHERE words MATCH ? ORDER BY rowid DESC LIMIT ?", (match, RANKED)
        ).fetchall()
        late = self._connection.execute(
            "SELECT id FROM messages WHERE NOT highest AND id >= ? LIMIT ?",
            (rows[-1][0] >> _GRADE_BITS if rows else 0, _MANY_LATE),
        ).fetchall()
        if late and (
            len(late) == _MANY_LATE or not {row >> _GRADE_BITS for row, _ in rows}.isdisjoint(row[0] for row in late)
        ):
            return None
        return rows

    def _best_graded(self, rows: list[tuple[int, float]], score: _Score, count: int) -> list[Found]:
        """Return the most relevant of messages; the text is read of those only that can be among them."""
        alike: dict[tuple[float, int], list[int]] = {}
        grades = len(_SHORTEST) - 1
        for row, rank in rows:
            alike.setdefault((rank, row & grades), []).append(row >> _GRADE_BITS)
        texts: dict[float, str] = {}
        bounds = []
        for (rank, grade), ids in alike.items():
            if rank not in texts:
                texts[rank] = self._at(ids[0]).text
            bounds.append((score(_SHORTEST[grade], texts[rank]), grade, ids))
        bounds.sort(key=lambda bound: bound[0], reverse=True)
        found: list[Found] = []
        best: list[float] = []  # a heap of the highest scores
        for most, grade, ids in bounds:
            if len(best) == count and best[0] > most:
                break
            # Of messages of one length those that come first will do.
            for number in ids[:count] if grade < _BANDS[0][0] else ids:
                item = self._at(number)
                item.score = score(item.tokens, item.text)
                found.append(item)
                if len(best) < count:
                    heapq.heappush(best, item.score)
                else:
                    heapq.heappushpop(best, item.score)
        return found

    def _rank(self, found: Iterable[Found], *, known: int | None) -> None:
        """Give texts their score; `known` is how many texts match the query, if that is known."""
        score = self._scoring(known)
        for item in found:
            item.score = score(item.tokens, item.text)

    def _scoring(self, known: int | None) -> _Score:
        """Return what makes a score of a text's number of tokens and its tokens."""
        query = self._query
        totals = self._totals()
        if len(query.terms) == 1 and known is not None:
            holding = [known]
        else:
            holding = [self._count(term) for term in query.terms]
        relevance = Relevance.of(query, totals.texts, totals.tokens, holding)
        scores: dict[tuple[int, tuple[int, ...]], float] = {}  # most texts have few lengths and frequencies
        frequencies = query.frequencies

        def score(length: int, text: str) -> float:
            key = (length, frequencies(text))
            found = scores.get(key)
            if found is None:
                found = scores[key] = relevance.score(Measure(*key))
            return found

        if len(query.terms) > 1:
            return score
        needle = query.terms[0].needle
        known_scores: dict[tuple[int, int], float] = {}

        def score_of_one(length: int, text: str) -> float:
            lined_up = f" {text} "
            frequency, place = 0, lined_up.find(needle)
            while place >= 0:
                frequency += 1
                place = lined_up.find(needle, place + 1)
            found = known_scores.get((length, frequency))
            if found is None:
                found = known_scores[length, frequency] = relevance.score(Measure(length, (frequency,)))
            return found

        return score_of_one  # the usual case: one word in thousands of texts

    def _totals(self) -> Totals:
        """Return what is known of all texts that are compared; the last answer is remembered."""
        asked = (self._meta.version, self._filters.kinds, self._filters.session_id)
        if self._file.totals is None or self._file.totals[0] != asked:
            self._file.totals = (asked, self._summed())
        return self._file.totals[1]

    def _summed(self) -> Totals:
        texts = tokens = 0
        is_rank_blind = False
        where, values = ("WHERE number = ?", (self._log.number,)) if self._log is not None else ("", ())
        if "message" in self._filters.kinds:
            row = self._connection.execute(
                "SELECT coalesce(sum(messages), 0), coalesce(sum(tokens), 0), coalesce(max(messages), 0), "
                f"coalesce(max(tokens), 0) FROM logs {where}",  # a text is more than any number, and counts as 0
                values,
            ).fetchone()
            texts, tokens, *_ = msgspec.convert(row, tuple[int, int, int, int])
            is_rank_blind = tokens == 3 * texts  # 1 - b + b * D / average is 0 with the b of FTS5, 0.75, and its D, -1
        kinds = sorted(self._filters.kinds - {"message"})
        if kinds:
            where = where.replace("WHERE number", "AND session")
            marks = ",".join("?" * len(kinds))
            row = self._connection.execute(
                f"SELECT count(*), coalesce(sum(tokens), 0) FROM notes WHERE kind IN ({marks}) {where}",
                (*kinds, *values),
            ).fetchone()
            texts, tokens = texts + row[0], tokens + row[1]
        return Totals(texts, tokens, is_rank_blind)

    def _count(self, term: Term) -> int:
        """Return how many of the texts that are compared hold a term."""
        match = expression([term])
        count = 0
        if "message" in self._filters.kinds:
            if self._log is None:
                count = self._counted(match)
            else:
                count = self._connection.execute(
                    f"SELECT count(*) FROM {_JOINED} WHERE words MATCH ? AND m.session = ?",
                    (match, self._log.number),
                ).fetchone()[0]
        if self._filters.kinds - {"message"}:
            rows = self._connection.execute(
                "SELECT n.kind, n.session FROM note_words CROSS JOIN notes AS n ON n.id = note_words.rowid "
                "WHERE note_words MATCH ?",
                (match,),
            )
            count += sum(
                kind in self._filters.kinds and (self._log is None or session == self._log.number)
                for kind, session in rows
            )
        return count

    def _counted(self, match: str) -> int:
        """Count a term in all messages; what was counted once is counted on from there."""
        counts = self._file.counts
        deletions = self._meta.deletions
        highest = self._connection.execute("SELECT coalesce(max(id), 0) FROM messages").fetchone()[0]
        known, until, count = counts.get(match, (deletions, 0, 0))
        if known != deletions or until > highest:
            until = count = 0
        if until < highest:
            count += self._connection.execute(
                "SELECT count(*) FROM words WHERE words MATCH ? AND rowid >= ?", (match, (until + 1) << _GRADE_BITS)
            ).fetchone()[0]
            if len(counts) >= _REMEMBERED_COUNTS:
                counts.clear()
            counts[match] = (deletions, highest, count)
        return int(count)


def expression(terms: Iterable[Term]) -> str:
    """Return the terms of a query for FTS5. A token holds no quotation mark, so nothing in it means anything else."""
    return " AND ".join(f'"{" ".join(term.tokens)}"{" *" if term.prefix else ""}' for term in terms)
