"""Keeping the words of messages in a backend that has a text search of its own, and finding by them.

As a derived index does, a search first brings the words up to date, then asks. They are a first choice without a gap:
what is a hit is decided by `search/query.py`, from the messages themselves. Where nothing can be written, a replica for
instance, messages whose words are not kept are read.
"""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Final, cast

import msgspec

from .. import codec
from ..backends.base import Changes
from ..backends.wording import Behind, Candidate, LogWords, RecordWords, Sums, Wanted, Words
from ..errors import StorageError, ValidationError
from ..models import microseconds, parse_timestamp
from ..search import Term
from ..search.texts import message_text
from .store import Store, logger

FORMAT: Final = "1"
"""Of the words; those of another format are not looked at."""

_BATCH_BYTES = 2 << 20
_ATTEMPTS = 5
_REMEMBERED = 1000


class Wording:
    """The words of a store's messages."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._fresh: dict[str, str] = {}
        """Of users whose words were up to date: the cursor of then."""
        self.counters = {"word_updates": 0}

    async def is_possible(self) -> bool:
        """Return whether the backend keeps words."""
        return (await self._store.reading()).words() is not None

    async def _words(self) -> Words:
        words = (await self._store.reading()).words()
        assert words is not None, "asked without `is_possible`"
        return words

    async def rebuild(self, user_id: str) -> None:
        """Drop the words of a user's messages and keep them anew.

        Raises:
            UnavailableError: They cannot be written.
        """
        await self._store.writing()
        words = await self._words()
        self._fresh.pop(user_id, None)
        await words.drop(self._folder(user_id))
        behind = await words.behind(self._edition(), self._folder(user_id))
        await self._keep([log for log in behind if log.can_be_kept])

    # --- bringing up to date -------------------------------------------------------------------------

    async def catch_up(self, user_id: str, session_id: str | None = None) -> list[Behind]:
        """Keep the words of all messages of a user, or of one session; return the logs that have to be read."""
        backend = await self._store.reading()
        words = await self._words()
        changes = await backend.changes(self._fresh.get(user_id))
        folder, key = self._folder(user_id), self._key(user_id, session_id)
        logs = self._changed(folder, changes)
        if key is not None:
            logs = {key} if logs is None else logs & {key}
        behind: list[Behind] = []
        for _ in range(_ATTEMPTS if logs is None or logs else 0):
            behind = await words.behind(self._edition(), folder, logs)
            keepable = [log for log in behind if log.can_be_kept]
            if self._store.read_only or not keepable:
                break
            try:
                await self._keep(keepable)
            except StorageError as error:  # a replica, or somebody who may not write: reading will do
                logger.warning("The words of messages cannot be kept, so messages are read: %s", error.message)
                break
        if not behind and key is None and changes.cursor:
            if len(self._fresh) >= _REMEMBERED:
                self._fresh.clear()
            self._fresh[user_id] = changes.cursor
        return behind

    async def _keep(self, logs: Sequence[Behind]) -> None:
        words = await self._words()
        self.counters["word_updates"] += 1
        batch: list[LogWords] = []
        size = 0
        for log in logs:
            position = log.kept
            async with aclosing(self.rest(log)) as runs:
                async for lines in runs:
                    records = await asyncio.to_thread(self._words_of, lines)
                    batch.append(LogWords(log.key, log.identity, position, records))
                    position += len(lines)
                    size += sum(map(len, lines))
                    if size >= _BATCH_BYTES:
                        await words.keep(self._edition(), batch)
                        batch, size = [], 0
        if batch:
            await words.keep(self._edition(), batch)

    async def rest(self, log: Behind) -> AsyncGenerator[list[bytes], None]:
        """Yield the records of a log whose words are not kept."""
        backend = await self._store.reading()
        if log.kept:
            position = log.kept
            while lines := await backend.read_log(log.key, position, position + 1000):
                yield lines
                position += len(lines)
            return
        async with aclosing(cast("AsyncGenerator[list[bytes]]", backend.stream_log(log.key))) as runs:
            async for lines in runs:
                yield lines

    def _words_of(self, lines: Sequence[bytes]) -> list[RecordWords]:
        from ..search.lexemes import lexemes
        from ..search.tokens import tokenise

        config = self._store.config
        words = []
        for line in lines:
            message = codec.decode_line(line)
            tokens = tokenise(
                message_text(
                    message,
                    content=config.search_include_message_content,
                    metadata=config.search_include_metadata,
                )
            )
            try:
                moment: int | None = microseconds(parse_timestamp(message.timestamp))
            except ValidationError:
                moment = None  # what finds it passes it over, and says so
            words.append(RecordWords(moment, len(tokens), frozenset(lexemes(tokens))))
        return words

    # --- asking --------------------------------------------------------------------------------------

    def find(
        self, user_id: str, session_id: str | None, terms: Sequence[Term], asked: Times
    ) -> AsyncGenerator[list[Candidate], None]:
        """Yield messages that may hold terms, the newest first; those whose times cannot be read before."""
        return self._find(self._wanted(user_id, session_id, terms, asked))

    async def _find(self, wanted: Wanted) -> AsyncGenerator[list[Candidate], None]:
        words = await self._words()
        async with aclosing(cast("AsyncGenerator[list[Candidate]]", words.find(wanted))) as runs:
            async for run in runs:
                yield run

    async def sums(self, user_id: str, session_id: str | None, terms: Sequence[Term] = ()) -> Sums:
        """Return how many messages may hold terms, and how many words there are in them."""
        return await (await self._words()).sums(self._wanted(user_id, session_id, terms, Times()))

    def _wanted(self, user_id: str, session_id: str | None, terms: Sequence[Term], asked: Times) -> Wanted:
        from ..search.lexemes import asked_for

        return Wanted(
            self._edition(),
            self._folder(user_id),
            self._key(user_id, session_id),
            tuple((lexeme.text, lexeme.prefix) for lexeme in asked_for(terms)),
            asked.since,
            asked.until,
        )

    # --- names ---------------------------------------------------------------------------------------

    def _edition(self) -> str:
        config = self._store.config
        searched = f"{config.search_include_message_content:d}{config.search_include_metadata:d}"
        return f"{FORMAT} unicode={unicodedata.unidata_version} searched={searched}"

    def _folder(self, user_id: str) -> str:
        return self._store.layout.parent("session", user_id=user_id)

    def _key(self, user_id: str, session_id: str | None) -> str | None:
        if session_id is None:
            return None
        return self._store.layout.key("messages", user_id=user_id, session_id=session_id)

    def _changed(self, folder: str, changes: Changes) -> set[str] | None:
        """Return the logs of sessions below a folder that may have changed; None: any may have."""
        if changes.keys is None:
            return None
        start, end = f"{folder}/", f"/{self._store.layout.leaf('messages')}"
        logs = set()
        for key in changes.keys:
            if start.startswith(f"{key}/"):
                return None
            if key.startswith(start) and "/" not in key[len(start) :]:  # a session's folder
                logs.add(key + end)
            elif key.startswith(start) and key.endswith(end):
                logs.add(key)
        return logs


class Times(msgspec.Struct, frozen=True):
    """Between which moments, in microseconds."""

    since: int | None = None
    until: int | None = None
