"""Finding: search by reading everything, in memory that does not grow with it.

What matches is decided by `search.py`; here is what gets searched, and in which order it comes.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast, get_args

import msgspec

from .. import codec
from ..errors import IntegrityError, ValidationError
from ..models import HitKind, Message, SearchHit, SituationalContext, parse_timestamp
from ..search import Query, Relevance
from .documents import Documents
from .store import Store, logger

_KINDS: tuple[HitKind, ...] = get_args(HitKind)
_ORDERS = ("time", "relevance")
_RANKS: dict[HitKind, int] = {"analysis": 0, "context": 1, "message": 2}

# What goes to a thread at once: enough to make the way worth while, little enough to let others have their turn.
_BATCH_TEXTS = 2000
_BATCH_BYTES = 1 << 19
_SESSIONS_AT_A_TIME = 256

# Most logs are short, and to begin reading one costs more than to read it: so many are begun together, and one that
# has fewer records than this is done then.
_SHORT_LOG = 32
_LOGS_AT_A_TIME = 8


class Finding:
    """Searches the chats of a user.

    What is searched:

    - messages: their content with `search_include_message_content`, and every string among the values of their
      metadata with `search_include_metadata`; with neither there are no messages to find. Attachments, being paths, are
      not searched;
    - with `search_include_context`, or where `kinds` asks for them, the current context of each session (summary, key
      points and entities; the history is not searched), and the analyses of documents: every string among their values.

    The strings of one record are one text, a line each; names of fields are not searched. The time of a context is its
    timestamp, that of an analysis when its document was uploaded. Contexts and analyses have no role, so asking for
    roles leaves them out.

    Newest first: what stands before what is decided by the time as a moment, then by the session's id, the later one
    first, then messages, contexts, analyses in this order, then by the position in the log, the newest first, or the
    document's name, the last first. By relevance: the score, then the same. The score compares a text with all that
    were read for it: all of the user, or of the one session, of the kinds asked for, whatever their role and time.

    A record that is damaged, a time that cannot be read included, is passed over with a warning.
    """

    def __init__(self, store: Store, documents: Documents) -> None:
        self._store = store
        self._config = store.config
        self._layout = store.layout
        self._documents = documents

    async def search(
        self,
        query: str,
        *,
        user_id: str,
        session_id: str | None = None,
        kinds: Collection[HitKind] | None = None,
        roles: Collection[str] | None = None,
        since: str | None = None,
        until: str | None = None,
        order: str = "time",
        limit: int | None = None,
        offset: int = 0,
    ) -> list[SearchHit]:
        """Return the hits of a query; see `StorageManager.search`.

        Raises:
            ValidationError: An argument cannot be what it says; the message names it.
        """
        config = self._config
        scope = _scope(
            config.search_include_message_content, config.search_include_metadata, kinds, roles, since, until
        )
        if not config.search_include_context and kinds is None:
            scope.kinds -= {"context", "analysis"}
        if order not in _ORDERS:
            raise ValidationError(f"order must be one of {', '.join(_ORDERS)}, not {order!r:.80}.")
        default = config.search_results_default_limit
        checked, offset = self._store.page(limit, offset, default)
        limit = default if checked is None else checked
        if session_id is None:
            self._layout.parent("session", user_id=user_id)
        else:
            self._layout.key("session", user_id=user_id, session_id=session_id)
        parsed = await asyncio.to_thread(Query.parse, query, config.full_text_search_min_word_length)
        await self._store.reading()
        if not parsed or not limit or not scope.kinds:
            return []

        session_ids = await self._store.ids("session", user_id=user_id) if session_id is None else [session_id]
        relevance = None
        if order == "relevance":
            # Twice, for no text can be ranked before all are known, and remembering all hits takes memory for each.
            relevance = Relevance(parsed)
            await self._go_through(user_id, session_ids, scope, _Counting(parsed, scope, relevance))
        selecting = _Selecting(parsed, scope, relevance, limit + offset)
        await self._go_through(user_id, session_ids, scope, selecting)
        return await asyncio.to_thread(selecting.hits, user_id, offset)

    # --- reading -------------------------------------------------------------------------------------

    async def _go_through(
        self, user_id: str, session_ids: Sequence[str], scope: _Scope, look: Callable[[list[_Lines | _Text]], None]
    ) -> None:
        """Have `look` see everything in scope, many records at a time, in a thread."""
        batch: list[_Lines | _Text] = []
        texts = size = 0
        async with aclosing(self._everything(user_id, session_ids, scope)) as pieces:
            async for piece in pieces:
                batch.append(piece)
                texts += piece.count
                size += piece.size
                if texts >= _BATCH_TEXTS or size >= _BATCH_BYTES:
                    await asyncio.to_thread(look, batch)
                    batch = []
                    texts = size = 0
        await asyncio.to_thread(look, batch)

    async def _everything(
        self, user_id: str, session_ids: Sequence[str], scope: _Scope
    ) -> AsyncGenerator[_Lines | _Text, None]:
        for start in range(0, len(session_ids), _SESSIONS_AT_A_TIME):
            some = session_ids[start : start + _SESSIONS_AT_A_TIME]
            if "context" in scope.kinds:
                for text in await self._contexts(user_id, some):
                    yield text
            if "analysis" in scope.kinds:
                async with aclosing(self._analyses(user_id, some)) as texts:
                    async for text in texts:
                        yield text
            if "message" in scope.kinds:
                async with aclosing(self._messages(user_id, some)) as runs:
                    async for lines in runs:
                        yield lines

    async def _messages(self, user_id: str, session_ids: Sequence[str]) -> AsyncGenerator[_Lines, None]:
        backend = await self._store.reading()
        for start in range(0, len(session_ids), _LOGS_AT_A_TIME):
            logs = {
                session_id: self._layout.key("messages", user_id=user_id, session_id=session_id)
                for session_id in session_ids[start : start + _LOGS_AT_A_TIME]
            }
            beginnings = await asyncio.gather(*(backend.read_log(key, 0, _SHORT_LOG) for key in logs.values()))
            for (session_id, key), beginning in zip(logs.items(), beginnings, strict=True):
                if len(beginning) < _SHORT_LOG:
                    yield _Lines(session_id, key, 0, beginning)
                    continue
                # From the start again, for the log may have changed since.
                position = 0
                async with aclosing(cast("AsyncGenerator[list[bytes]]", backend.stream_log(key))) as runs:
                    async for lines in runs:
                        yield _Lines(session_id, key, position, lines)
                        position += len(lines)

    async def _contexts(self, user_id: str, session_ids: Sequence[str]) -> list[_Text]:
        keys = {
            self._layout.key("context", user_id=user_id, session_id=session_id): session_id
            for session_id in session_ids
        }

        def make(key: str, content: dict[str, Any], version: str) -> _Text:
            context = codec.decode_as(SituationalContext, content, key)
            strings = [context.summary, *context.key_points, *_strings(context.entities)]
            return _Text("context", keys[key], key, context.timestamp, "\n".join(strings))

        return [text for text in await self._store.load_all(list(keys), make) if text is not None]

    async def _analyses(self, user_id: str, session_ids: Sequence[str]) -> AsyncGenerator[_Text, None]:
        keys = [self._layout.key("documents", user_id=user_id, session_id=session_id) for session_id in session_ids]
        backend = await self._store.reading()
        for session_id, key, data in zip(session_ids, keys, await backend.read_many(keys), strict=True):
            if data is None:  # few sessions have documents
                continue
            try:
                documents = await self._documents.list(user_id, session_id)
            except IntegrityError as error:
                logger.warning("%s It is passed over.", error.message)
                continue
            for document in documents:
                text = "\n".join(_strings(document.analysis))
                yield _Text("analysis", session_id, key, document.uploaded_at, text, filename=document.filename)


# --- what is looked at -------------------------------------------------------------------------------


@dataclass(slots=True)
class _Scope:
    """Which records may be hits."""

    kinds: set[HitKind]
    content: bool
    """Whether the content of messages is searched."""
    metadata: bool
    roles: frozenset[str] | None
    since: datetime | None
    until: datetime | None

    def admits(self, moment: datetime) -> bool:
        return (self.since is None or self.since <= moment) and (self.until is None or moment < self.until)


class _Lines(msgspec.Struct, frozen=True):
    """Neighbouring lines of a session's log."""

    session_id: str
    key: str
    position: int
    """Of the first line."""
    lines: list[bytes]

    @property
    def count(self) -> int:
        return len(self.lines)

    @property
    def size(self) -> int:
        return sum(map(len, self.lines))


class _Text(msgspec.Struct, frozen=True):
    """All that is searched of one record."""

    kind: HitKind
    session_id: str
    key: str
    timestamp: str
    text: str
    position: int = 0
    message: Message | None = None
    filename: str | None = None

    count = 1

    def __str__(self) -> str:
        if self.message is not None:
            return f"The message {self.message.id!r} in {self.key}"
        return f"The {self.kind} at {self.key}"

    @property
    def size(self) -> int:
        return len(self.text)


def _scope(content: bool, metadata: bool, kinds: object, roles: object, since: object, until: object) -> _Scope:
    """Check the filters of a search."""
    wanted = _texts(kinds, "kinds", "message")
    unknown = sorted((wanted or frozenset()) - set(_KINDS))
    if unknown:
        raise ValidationError(f"kinds holds {unknown[0]!r:.80}.", hint=f"Possible are {', '.join(_KINDS)}.")
    scope = _Scope(
        kinds={kind for kind in _KINDS if wanted is None or kind in wanted},
        content=content,
        metadata=metadata,
        roles=_texts(roles, "roles", "user"),
        since=None if since is None else parse_timestamp(since, "since"),
        until=None if until is None else parse_timestamp(until, "until"),
    )
    if not content and not metadata:
        scope.kinds.discard("message")
    if scope.roles is not None:
        scope.kinds &= {"message"}
    return scope


def _texts(value: object, name: str, example: str) -> frozenset[str] | None:
    if value is None:
        return None
    if isinstance(value, str | bytes) or not isinstance(value, Collection):
        raise ValidationError(
            f"{name} must be a collection of strings, not {type(value).__name__}.", hint=f'For instance ("{example}",).'
        )
    for element in value:
        codec.check_text(element, f"an element of {name}")
    return frozenset(value)


def _strings(value: object) -> Iterator[str]:
    """Yield every string among the values of some JSON, in order."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, list):
            stack += reversed(item)
        elif isinstance(item, dict):
            stack += reversed(item.values())


# --- looking, in a thread ----------------------------------------------------------------------------


class _Looking:
    """Goes through batches of records."""

    def __init__(self, query: Query, scope: _Scope) -> None:
        self.query = query
        self.scope = scope

    def decode(self, lines: _Lines, position: int, line: bytes) -> _Text:
        """Return what is searched of the message in a line."""
        message = codec.decode_message(line)
        strings = [message.content] if self.scope.content else []
        if self.scope.metadata:
            strings += _strings(message.metadata)
        return _Text("message", lines.session_id, lines.key, message.timestamp, "\n".join(strings), position, message)


class _Counting(_Looking):
    """Gathers what ranking has to know of all texts."""

    def __init__(self, query: Query, scope: _Scope, relevance: Relevance) -> None:
        super().__init__(query, scope)
        self.relevance = relevance

    def __call__(self, batch: list[_Lines | _Text]) -> None:
        for piece in batch:
            if isinstance(piece, _Text):
                self.relevance.add(self.query.measure_any(piece.text))
                continue
            for place, line in enumerate(piece.lines, piece.position):
                self.relevance.add(self.query.measure_any(self.decode(piece, place, line).text))


_Key = tuple[float, datetime, str, int, int, str]


class _Selecting(_Looking):
    """Keeps the first `count` hits of those seen so far."""

    def __init__(self, query: Query, scope: _Scope, relevance: Relevance | None, count: int) -> None:
        super().__init__(query, scope)
        self.relevance = relevance
        self.count = count
        self.heap: list[tuple[_Key, _Text]] = []  # the last of them at the top; no two keys are the same

    def __call__(self, batch: list[_Lines | _Text]) -> None:
        for piece in batch:
            if isinstance(piece, _Text):
                self.consider(piece)
                continue
            for place, line in enumerate(piece.lines, piece.position):
                if self.query.may_be_in(line):
                    self.consider(self.decode(piece, place, line))

    def consider(self, text: _Text) -> None:
        roles = self.scope.roles
        if roles is not None and (text.message is None or text.message.role not in roles):
            return
        score = 0.0
        if self.relevance is not None:
            measure = self.query.measure(text.text)
            if measure is None:
                return
            score = self.relevance.score(measure)
        elif not self.query.matches(text.text):
            return
        try:
            moment = parse_timestamp(text.timestamp)
        except ValidationError as error:
            logger.warning("%s is damaged: %s It is passed over.", text, error.message)
            return
        if not self.scope.admits(moment):
            return
        key = (score, moment, text.session_id, _RANKS[text.kind], text.position, text.filename or "")
        if len(self.heap) < self.count:
            heapq.heappush(self.heap, (key, text))
        elif key > self.heap[0][0]:
            heapq.heapreplace(self.heap, (key, text))

    def hits(self, user_id: str, offset: int) -> list[SearchHit]:
        """Return the hits that were kept, without the first `offset`."""
        best = sorted(self.heap, key=lambda entry: entry[0], reverse=True)
        return [
            SearchHit(
                kind=text.kind,
                user_id=user_id,
                session_id=text.session_id,
                timestamp=text.timestamp,
                snippet=self.query.snippet(text.text),
                score=key[0],
                message=text.message,
                filename=text.filename,
            )
            for key, text in best[offset:]
        ]
