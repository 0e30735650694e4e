"""Words of messages in PostgreSQL's own text search: a tsvector for each message, found through a GIN index.

A tsvector here is a set of lexemes without positions, made by whoever keeps them, and no configuration of the server
has a say in it. Two lexemes that no text can hold say whose it is, so that the index alone finds the messages of one
user or of one session: `=` with a digest of the edition and the folder, and `/` with one of the log. See
https://www.postgresql.org/docs/15/datatype-textsearch.html.

A row of `word_logs` has words only of messages that are in its log still: whatever changes or removes one of them
removes the row, in the same transaction, and with it all words of the log (`PostgresRows`).
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

from ...models import new_id
from ..wording import Behind, Candidate, LogWords, RecordWords, State, Sums, Wanted

if TYPE_CHECKING:
    from . import PostgresBackend
    from .contents import PostgresContents
    from .session import PostgresSession

_MOST_BYTES: Final = 500_000
"""Of the lexemes of a text; PostgreSQL takes a megabyte with what it adds. A larger text is found by every query."""
_ANY: Final = "'*'"
"""The lexeme of a text that is too large."""
_FIRST, _AT_ONCE = 64, 500
"""Candidates that are read at a time: few at first, for the newest ones are often enough."""


class PostgresWords:
    """The tables `word_logs` and `words`; see `Words`."""

    def __init__(self, backend: PostgresBackend) -> None:
        self._backend = backend

    async def behind(self, edition: str, folder: str, since: str | None, key: str | None = None) -> State:
        return await self._backend.read_by(
            lambda contents: State("", []) if contents is None else _state(contents, edition, folder, since, key)
        )

    async def keep(self, edition: str, logs: Sequence[LogWords]) -> None:
        await self._backend.write_beside(lambda session: _keep(session, edition, logs))

    async def drop(self, folder: str) -> None:
        await self._backend.write_beside(lambda session: _drop(session, folder))

    async def find(self, wanted: Wanted) -> AsyncGenerator[list[Candidate], None]:
        runs = self._backend.stream_by(lambda contents: _find(contents, wanted) if contents else iter(()))
        async with aclosing(runs):
            async for run in runs:
                yield run

    async def sums(self, wanted: Wanted) -> Sums:
        return await self._backend.read_by(lambda contents: _sums(contents, wanted) if contents else Sums(0, 0, True))


# --- reading -------------------------------------------------------------------------------------------


def _state(contents: PostgresContents, edition: str, folder: str, since: str | None, key: str | None) -> State:
    changes = contents.changes(since)
    if changes.keys is None:
        logs = None if key is None else {key}
    else:
        logs = _changed(contents, folder, changes.keys)
        if key is not None:
            logs = {key} if logs is None else logs & {key}
    return State(changes.cursor, [] if logs == set() else _behind(contents, edition, folder, logs))


def _changed(contents: PostgresContents, folder: str, keys: Collection[str]) -> set[str] | None:
    """Return the logs below a folder that may have changed with keys and folders; None: any of them."""
    logs: set[str] = set()
    for key in keys:
        if f"{folder}/".startswith(f"{key}/"):
            return None
        if key.startswith(f"{folder}/"):
            if contents.is_log(key):
                logs.add(key)
            elif not contents.is_document(key):  # a folder, maybe
                logs.update(filter(contents.is_log, contents.keys(f"{key}/")))
    return logs


def _behind(contents: PostgresContents, edition: str, folder: str, keys: Collection[str] | None) -> list[Behind]:
    values: tuple[str, ...]
    if keys is None:
        where, values = "entry.key > ? AND entry.key < ?", (f"{folder}/", f"{folder}0")
    else:
        where, values = "entry.key = ANY(string_to_array(?, chr(10)))", ("\n".join(keys),)
    rows = contents.session.execute(
        f"""
        SELECT entry.key, entry.id, coalesce(log.records, 0), entry.place = 'log'
        FROM entries AS entry LEFT JOIN word_logs AS log ON log.key = entry.key AND log.edition = ?
        WHERE entry.place <> 'document' AND {where} ORDER BY entry.key
        """,
        (edition, *values),
    )
    logs = [Behind(*row) for row in rows if contents.is_log(row[0])]
    counts = contents.counts([log.key for log in logs if log.can_be_kept])
    return [log for log in logs if counts.get(log.key) != log.kept]


def _find(contents: PostgresContents, wanted: Wanted) -> Iterator[list[Candidate]]:
    for log in _state(contents, wanted.edition, wanted.folder, wanted.fresh, wanted.key).behind:
        yield from _unkept(contents, log)
    times, values = "", []
    for operator, moment in ((">=", wanted.since), ("<", wanted.until)):
        if moment is not None:
            times += f" AND (word.moment IS NULL OR word.moment {operator} ?)"
            values.append(moment)
    statement = f"""
        SELECT log.key, word.position, word.moment FROM words AS word JOIN word_logs AS log ON log.number = word.log
        WHERE word.lexemes @@ CAST(? AS tsquery) {times}
        ORDER BY word.moment DESC NULLS FIRST, word.log, word.position
        """
    asked = (_query(wanted), *values)
    first = contents.session.execute(f"{statement} LIMIT {_FIRST}", asked)  # for a cursor takes more trips
    if first:
        yield _read(contents, first)
    if len(first) < _FIRST:
        return
    run: list[tuple[str, int, int | None]] = []
    for row in contents.session.stream(f"{statement} OFFSET {_FIRST}", asked):
        run.append(row)
        if len(run) >= _AT_ONCE:
            yield _read(contents, run)
            run = []
    if run:
        yield _read(contents, run)


def _unkept(contents: PostgresContents, log: Behind) -> Iterator[list[Candidate]]:
    """Yield the records of a log whose words are not kept."""
    position = log.kept
    for lines in contents.runs_from(log.key, position):
        yield [Candidate(log.key, position + number, line, None, False) for number, line in enumerate(lines)]
        position += len(lines)


def _read(contents: PostgresContents, run: Sequence[tuple[str, int, int | None]]) -> list[Candidate]:
    lines = contents.lines_at([(key, position) for key, position, _ in run])
    return [
        Candidate(key, position, line, moment, True)
        for (key, position, moment), line in zip(run, lines, strict=True)
        if line is not None
    ]


def _sums(contents: PostgresContents, wanted: Wanted) -> Sums:
    if not wanted.lexemes:
        where, values = _logs(wanted.folder, wanted.key, "key")
        rows = contents.session.execute(
            f"SELECT sum(records), sum(tokens), false FROM word_logs WHERE edition = ? AND {where}",
            (wanted.edition, *values),
        )
    else:
        rows = contents.session.execute(
            """
            SELECT count(*), sum(tokens), bool_or(lexemes @@ CAST(? AS tsquery))
            FROM words WHERE lexemes @@ CAST(? AS tsquery)
            """,
            (_ANY, _query(wanted)),
        )
    [(records, tokens, is_unsure)] = rows
    return Sums(int(records or 0), int(tokens or 0), not is_unsure)


def _logs(folder: str, key: str | None, column: str) -> tuple[str, tuple[str, ...]]:
    """Return a condition for the keys of logs, and its parameters."""
    if key is not None:
        return f"{column} = ?", (key,)
    return f"{column} > ? AND {column} < ?", (f"{folder}/", f"{folder}0")


def _query(wanted: Wanted) -> str:
    """Return what is wanted as a tsquery; nothing in a lexeme means anything to it."""
    asked = " & ".join(f"{_quoted(text)}{':*' if prefix else ''}" for text, prefix in wanted.lexemes)
    whose = _of_folder(wanted.edition, wanted.folder) if wanted.key is None else _of_log(wanted.edition, wanted.key)
    return f"{whose} & ({asked} | {_ANY})"


# --- writing -------------------------------------------------------------------------------------------


def _keep(session: PostgresSession, edition: str, logs: Sequence[LogWords]) -> None:
    """Keep words of those logs that are what they were."""
    keys = "\n".join(log.key for log in logs)
    identities = {log.key: log.identity for log in logs}
    session.execute(
        """
        INSERT INTO word_logs (key, edition, records, tokens)
        SELECT DISTINCT given.key, ?, 0, 0 FROM unnest(string_to_array(?, chr(10))) AS given(key)
        WHERE EXISTS (SELECT 1 FROM entries WHERE entries.key = given.key AND entries.place = 'log')
        ORDER BY given.key ON CONFLICT DO NOTHING
        """,
        (edition, keys),
    )
    found = session.execute(
        """
        SELECT log.key, log.number, log.records, entry.id FROM word_logs AS log
        JOIN entries AS entry ON entry.key = log.key AND entry.place = 'log'
        WHERE log.edition = ? AND log.key = ANY(string_to_array(?, chr(10))) ORDER BY log.key FOR UPDATE OF log
        """,
        (edition, keys),
    )
    kept = {key: [number, records, 0] for key, number, records, identity in found if identities[key] == identity}
    rows: list[tuple[object, ...]] = []
    for log in logs:
        state = kept.get(log.key)
        if state is None or log.first != state[1]:
            continue  # somebody else kept them meanwhile, or the log is another
        whose = f"{_of_folder(edition, _folder(log.key))} {_of_log(edition, log.key)}"
        for position, record in enumerate(log.records, log.first):
            rows.append((state[0], position, record.moment, record.tokens, f"{whose} {_vector(record)}"))
            state[2] += record.tokens
        state[1] += len(log.records)
    session.copy("words", ("log", "position", "moment", "tokens", "lexemes"), rows)
    session.run_for(
        "UPDATE word_logs SET records = ?, tokens = tokens + ? WHERE number = ?",
        [(records, tokens, number) for number, records, tokens in kept.values()],
    )


def _drop(session: PostgresSession, folder: str) -> None:
    """Drop words, and note it as a change of the folder: others may think that they are kept."""
    session.execute(
        """
        WITH logs AS (SELECT number FROM word_logs WHERE key > ? AND key < ? ORDER BY key FOR UPDATE)
        DELETE FROM word_logs USING logs WHERE word_logs.number = logs.number
        """,
        (f"{folder}/", f"{folder}0"),
    )
    session.execute(
        "INSERT INTO changes (transaction, id, keys) VALUES (pg_current_xact_id(), ?, ?)", (new_id(), folder)
    )


def _vector(record: RecordWords) -> str:
    """Return the lexemes of a record as a tsvector is written."""
    if sum(len(text.encode()) + 8 for text in record.lexemes) > _MOST_BYTES:
        return _ANY
    return " ".join(map(_quoted, record.lexemes))


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "''")
    return f"'{escaped}'"


def _of_folder(edition: str, folder: str) -> str:
    return f"'={_digest(edition, folder)}'"


def _of_log(edition: str, key: str) -> str:
    return f"'/{_digest(edition, key)}'"


def _folder(key: str) -> str:
    """Return the folder of the owner of a log: that of the user whose session it is."""
    return key.rpartition("/")[0].rpartition("/")[0]


def _digest(edition: str, name: str) -> str:
    return hashlib.blake2b(f"{edition}\n{name}".encode(), digest_size=12).hexdigest()
