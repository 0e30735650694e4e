"""Finding texts in an index: which match a query, the newest or the most relevant first.

Going down the ids of messages, the newest N are known as soon as N were seen, the last of which is no newer than a
message that is `highest`: newer than all with lower ids. Everything that came in its order is highest, and what came
late costs a longer way and no wrong answer.
"""

from __future__ import annotations

import heapq
import sqlite3
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec

from .database import IndexFile
from .query import Measure, Query, Term
from .relevance import Relevance
from .rows import BANDS, GRADE_BITS, SHORTEST, read_logs, read_meta
from .texts import Filters, Found, Log, Totals

RANKED: Final = 2000
"""The newest matches that are put in order of relevance; older ones follow them, newest first."""

_JOINED = f"words CROSS JOIN messages AS m ON m.id = words.rowid >> {GRADE_BITS}"

_MANY = 30_000
"""FTS5 goes through all matches before it ranks the first; where there are more, reading texts takes less time."""
_MANY_LATE = 1000

_REMEMBERED_COUNTS = 1000
_COLUMNS = "m.session, m.position, m.offset, m.length, m.moment, m.role, m.highest, m.tokens, m.text"


_Score = Callable[[int, str], float]
"""Makes a score of a text's number of tokens and its tokens."""


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
            (rows[-1][0] >> GRADE_BITS if rows else 0, _MANY_LATE),
        ).fetchall()
        if late and (
            len(late) == _MANY_LATE or not {row >> GRADE_BITS for row, _ in rows}.isdisjoint(row[0] for row in late)
        ):
            return None
        return rows

    def _best_graded(self, rows: list[tuple[int, float]], score: _Score, count: int) -> list[Found]:
        """Return the most relevant of messages; the text is read of those only that can be among them."""
        alike: dict[tuple[float, int], list[int]] = {}
        grades = len(SHORTEST) - 1
        for row, rank in rows:
            alike.setdefault((rank, row & grades), []).append(row >> GRADE_BITS)
        texts: dict[float, str] = {}
        bounds = []
        for (rank, grade), ids in alike.items():
            if rank not in texts:
                texts[rank] = self._at(ids[0]).text
            bounds.append((score(SHORTEST[grade], texts[rank]), grade, ids))
        bounds.sort(key=lambda bound: bound[0], reverse=True)
        found: list[Found] = []
        best: list[float] = []  # a heap of the highest scores
        for most, grade, ids in bounds:
            if len(best) == count and best[0] > most:
                break
            # Of messages of one length those that come first will do.
            for number in ids[:count] if grade < BANDS[0][0] else ids:
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
                "SELECT count(*) FROM words WHERE words MATCH ? AND rowid >= ?", (match, (until + 1) << GRADE_BITS)
            ).fetchone()[0]
            if len(counts) >= _REMEMBERED_COUNTS:
                counts.clear()
            counts[match] = (deletions, highest, count)
        return int(count)


def expression(terms: Iterable[Term]) -> str:
    """Return the terms of a query for FTS5. A token holds no quotation mark, so nothing in it means anything else."""
    return " AND ".join(f'"{" ".join(term.tokens)}"{" *" if term.prefix else ""}' for term in terms)
