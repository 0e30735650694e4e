"""Keeping the words of messages in a backend that has a text search of its own, and finding by them.

Words are a first choice without a gap: what is a hit is decided by `search/query.py`, from the messages themselves. A
search finds those that have the words, and with them, in the same state of the store, all whose words are not kept. So
they need not be kept at once: it is done before a search that would have many to read. Where nothing can be written, as
in a replica, they are read.
"""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Final, cast

import msgspec

from .. import codec
from ..backends.wording import Behind, Candidate, LogWords, RecordWords, State, Sums, Wanted, Words
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
_FEW = 200
"""So many messages are read sooner than their words are kept."""


class Wording:
    """The words of a store's messages."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._fresh: dict[str, str] = {}
        """Of users whose words were up to date: the cursor of then."""
        self._unkept: dict[str, int] = {}
        """How many messages without words the last search had to read."""
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
        folder = self._folder(user_id)
        self._fresh.pop(user_id, None)
        await words.drop(folder)
        state = await words.behind(self._edition(), folder, None)
        await self._keep([log for log in state.behind if log.can_be_kept])

    # --- bringing up to date -------------------------------------------------------------------------

    async def prepare(self, user_id: str, session_id: str | None) -> None:
        """Keep the words of a user's messages, if a search would have many to read without."""
        if user_id in self._fresh and self._unkept.get(user_id, 0) < _FEW:
            return
        words = await self._words()
        folder, key = self._folder(user_id), self._key(user_id, session_id)
        state, since = State("", []), self._fresh.get(user_id)
        for _ in range(_ATTEMPTS):
            state = await words.behind(self._edition(), folder, since, key)
            keepable = [log for log in state.behind if log.can_be_kept]
            if self._store.read_only or not keepable:
                break
            try:
                await self._keep(keepable)
            except StorageError as error:  # a replica, a store that is locked: reading will do
                logger.warning("The words of messages cannot be kept, so messages are read: %s", error.message)
                break
        if not state.behind and key is None and state.cursor:
            if len(self._fresh) >= _REMEMBERED:
                self._fresh.clear()
            self._fresh[user_id] = state.cursor
            self._unkept.pop(user_id, None)

    async def behind(self, user_id: str, session_id: str | None) -> list[Behind]:
        """Return the logs with messages whose words are not kept."""
        words, fresh, key = await self._words(), self._fresh.get(user_id), self._key(user_id, session_id)
        return (await words.behind(self._edition(), self._folder(user_id), fresh, key)).behind

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
        backend = await self._store.uncached.reading()
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

    async def find(
        self, user_id: str, session_id: str | None, terms: Sequence[Term], times: Times
    ) -> AsyncGenerator[list[Candidate], None]:
        """Yield messages that may hold terms: first those that nothing is known of, then the newest."""
        words = await self._words()
        unkept = 0
        found = words.find(self._wanted(user_id, session_id, terms, times))
        async with aclosing(cast("AsyncGenerator[list[Candidate]]", found)) as runs:
            async for run in runs:
                unkept += sum(not candidate.is_kept for candidate in run)
                self._unkept[user_id] = unkept
                yield run

    async def sums(self, user_id: str, session_id: str | None, terms: Sequence[Term] = ()) -> Sums:
        """Return how many messages may hold terms, and how many words there are in them."""
        return await (await self._words()).sums(self._wanted(user_id, session_id, terms, Times()))

    def _wanted(self, user_id: str, session_id: str | None, terms: Sequence[Term], times: Times) -> Wanted:
        from ..search.lexemes import asked_for

        return Wanted(
            self._edition(),
            self._folder(user_id),
            self._fresh.get(user_id),
            self._key(user_id, session_id),
            tuple((lexeme.text, lexeme.prefix) for lexeme in asked_for(terms)),
            times.since,
            times.until,
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


class Times(msgspec.Struct, frozen=True):
    """Between which moments, in microseconds."""

    since: int | None = None
    until: int | None = None
