"""Finding: search by reading everything, in memory that does not grow with it.

What matches is decided by `search/query.py`; here is what gets searched, and in which order it comes.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, cast, get_args

import msgspec

from .. import codec
from ..errors import IntegrityError, ValidationError
from ..models import HitKind, SearchHit, microseconds, parse_timestamp
from ..search import Query, Relevance
from ..search.texts import Filters, Found, is_same, message_text
from . import searched
from .documents import Documents
from .indexing import SMALL_TEXTS, Indexing
from .searched import Text
from .store import Store, logger

if TYPE_CHECKING:
    from ..search.database import IndexFile

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


# So much of a query or of its hits is dealt with at once; more goes to a thread.
_SHORT_QUERY = 1000
_FEW_HITS = 50
_FEW_BYTES = 1 << 16

_ATTEMPTS = 4
"""Of answering by an index that turns out to be behind the files."""


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

    def __init__(self, store: Store, documents: Documents, indexing: Indexing) -> None:
        self._store = store
        self._config = store.config
        self._layout = store.layout
        self._documents = documents
        self._indexing = indexing

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
        given: object = query
        if isinstance(given, str) and len(given) < _SHORT_QUERY and given.isascii():
            parsed = Query.parse(query, config.full_text_search_min_word_length)
        else:
            parsed = await asyncio.to_thread(Query.parse, query, config.full_text_search_min_word_length)
        await self._store.reading()
        if not parsed or not limit or not scope.kinds:
            return []

        wanted = _Wanted(user_id, session_id, parsed, scope, order == "relevance", limit, offset)
        return await self._answer(wanted)

    async def _answer(self, wanted: _Wanted) -> list[SearchHit]:
        """Answer by the index where there is one, or is much to read; otherwise by reading."""
        indexing = self._indexing
        exists = await indexing.exists(wanted.user_id)
        # A session on its own is small, as a rule; whether it is, reading it tells.
        if not exists or wanted.session_id is not None:
            try:
                return await self._scan(wanted, SMALL_TEXTS if await indexing.is_possible(wanted.user_id) else None)
            except _TooMuch:
                pass
        if not exists and await indexing.build(wanted.user_id) is None:
            return await self._scan(wanted)
        hits = await self._by_index(wanted)
        return await self._scan(wanted) if hits is None else hits

    async def _scan(self, wanted: _Wanted, most: int | None = None) -> list[SearchHit]:
        """Answer by reading everything, or raise _TooMuch when it is more than `most` texts."""
        user_id, scope = wanted.user_id, wanted.scope
        if wanted.session_id is None:
            session_ids = await self._store.ids("session", user_id=user_id)
        else:
            session_ids = [wanted.session_id]
        relevance = None
        if wanted.relevance:
            # Twice, for no text can be ranked before all are known, and remembering all hits takes memory for each.
            relevance = Relevance(wanted.query)
            counting = _Counting(wanted.query, scope, relevance)
            await self._go_through(user_id, session_ids, scope, counting, most)
        selecting = _Selecting(wanted.query, scope, relevance, wanted.limit + wanted.offset)
        await self._go_through(user_id, session_ids, scope, selecting, most)
        return await asyncio.to_thread(selecting.hits, user_id, wanted.offset)

    # --- by the index --------------------------------------------------------------------------------

    async def _by_index(self, wanted: _Wanted) -> list[SearchHit] | None:
        """Answer by the index; None if it cannot be used."""
        from ..search.database import IndexAbsent, IndexDamaged, IndexUnusable

        scope = wanted.scope
        filters = Filters(
            kinds=frozenset(scope.kinds),
            session_id=wanted.session_id,
            roles=scope.roles,
            since=None if scope.since is None else microseconds(scope.since),
            until=None if scope.until is None else microseconds(scope.until),
        )
        rebuilt = False
        for _ in range(_ATTEMPTS):
            file = await self._indexing.current(wanted.user_id)
            if file is None:
                return None
            try:
                found = await self._indexing.look(partial(_find, file, file.generation, wanted, filters))
            except IndexDamaged as error:
                self._indexing.fall_back(file, error)
                if rebuilt or self._store.read_only or await self._indexing.build(wanted.user_id) is None:
                    return None
                rebuilt = True
                continue
            except IndexAbsent:
                continue  # it was deleted or replaced
            except IndexUnusable as error:
                self._indexing.fall_back(file, error)
                return None
            hits = await self._hits(wanted, found)
            wrong = {item.session_id for item, hit in zip(found, hits, strict=True) if hit is None}
            if not wrong:
                return [hit for hit in hits if hit is not None]
            if not await self._indexing.doubt(wanted.user_id, file, wrong):
                return None
        return None

    async def _hits(self, wanted: _Wanted, found: Sequence[Found]) -> list[SearchHit | None]:
        """Return what the files say of what was found; None for what is not there as it was taken in."""
        user_id = wanted.user_id
        backend = await self._store.reading()
        keys: dict[str, str] = {}
        for item in found:
            if item.session_id not in keys:
                keys[item.session_id] = self._layout.key("messages", user_id=user_id, session_id=item.session_id)
        lines = await backend.read_log_at(
            [(keys[item.session_id], item.offset, item.length) for item in found if item.kind == "message"]
        )
        notes = await self._notes(user_id, found)

        def make() -> list[SearchHit | None]:
            rest = iter(lines)
            hits: list[SearchHit | None] = []
            for item in found:
                if item.kind == "message":
                    hits.append(_message_hit(wanted, item, next(rest)))
                else:
                    hits.append(_note_hit(wanted, item, notes.get((item.kind, item.session_id, item.filename))))
            return hits

        quick = len(found) <= _FEW_HITS and not notes and sum(item.length for item in found) <= _FEW_BYTES
        if quick and all(line is None or line.isascii() for line in lines):
            return make()
        return await asyncio.to_thread(make)

    async def _notes(self, user_id: str, found: Sequence[Found]) -> dict[tuple[str, str, str], Text]:
        ids = {
            kind: sorted({item.session_id for item in found if item.kind == kind}) for kind in ("context", "analysis")
        }
        texts = await searched.contexts(self._store, user_id, ids["context"]) if ids["context"] else []
        if ids["analysis"]:
            read = searched.analyses(self._store, self._documents, user_id, ids["analysis"])
            texts += [text async for text in read]
        return {(text.kind, text.session_id, text.filename or ""): text for text in texts}

    # --- reading -------------------------------------------------------------------------------------

    async def _go_through(
        self,
        user_id: str,
        session_ids: Sequence[str],
        scope: _Scope,
        look: Callable[[list[_Lines | Text]], None],
        most: int | None,
    ) -> None:
        """Have `look` see everything in scope, many records at a time, in a thread."""
        if most is not None and len(session_ids) > most:
            raise _TooMuch
        batch: list[_Lines | Text] = []
        texts = size = total = 0
        async with aclosing(self._everything(user_id, session_ids, scope)) as pieces:
            async for piece in pieces:
                batch.append(piece)
                texts += piece.count
                total += piece.count
                if most is not None and total > most:
                    raise _TooMuch
                size += piece.size
                if texts >= _BATCH_TEXTS or size >= _BATCH_BYTES:
                    await asyncio.to_thread(look, batch)
                    batch = []
                    texts = size = 0
        await asyncio.to_thread(look, batch)

    async def _everything(
        self, user_id: str, session_ids: Sequence[str], scope: _Scope
    ) -> AsyncGenerator[_Lines | Text, None]:
        for start in range(0, len(session_ids), _SESSIONS_AT_A_TIME):
            some = session_ids[start : start + _SESSIONS_AT_A_TIME]
            if "context" in scope.kinds:
                for text in await searched.contexts(self._store, user_id, some):
                    yield text
            if "analysis" in scope.kinds:
                async with aclosing(searched.analyses(self._store, self._documents, user_id, some)) as texts:
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


class _TooMuch(Exception):
    """There is so much to read that an index should answer."""


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


class _Wanted(msgspec.Struct, frozen=True):
    """A search whose arguments were checked."""

    user_id: str
    session_id: str | None
    query: Query
    scope: _Scope
    relevance: bool
    limit: int
    offset: int


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


# --- finding, in a thread ----------------------------------------------------------------------------


def _find(file: IndexFile, generation: int, wanted: _Wanted, filters: Filters) -> list[Found]:
    from ..search.database import IndexAbsent
    from ..search.matches import find

    with file.reading() as connection:
        if file.generation != generation and not file.read_only:
            raise IndexAbsent("it was replaced meanwhile")
        count = wanted.limit + wanted.offset
        return find(file, connection, wanted.query, filters, relevance=wanted.relevance, count=count)[wanted.offset :]


def _message_hit(wanted: _Wanted, found: Found, line: bytes | None) -> SearchHit | None:
    if line is None:
        return None
    try:
        message = codec.decode_message(line)
    except IntegrityError:
        return None
    text = message_text(message, content=wanted.scope.content, metadata=wanted.scope.metadata)
    if not is_same(found, text, message.timestamp, message.role):
        return None
    return SearchHit(
        kind="message",
        user_id=wanted.user_id,
        session_id=found.session_id,
        timestamp=message.timestamp,
        snippet=wanted.query.snippet(text),
        score=found.score,
        message=message,
        filename=None,
    )


def _note_hit(wanted: _Wanted, found: Found, text: Text | None) -> SearchHit | None:
    if text is None or not is_same(found, text.text, text.timestamp):
        return None
    return SearchHit(
        kind=text.kind,
        user_id=wanted.user_id,
        session_id=text.session_id,
        timestamp=text.timestamp,
        snippet=wanted.query.snippet(text.text),
        score=found.score,
        message=None,
        filename=text.filename,
    )


# --- looking, in a thread ----------------------------------------------------------------------------


class _Looking:
    """Goes through batches of records."""

    def __init__(self, query: Query, scope: _Scope) -> None:
        self.query = query
        self.scope = scope

    def decode(self, lines: _Lines, position: int, line: bytes) -> Text:
        """Return what is searched of the message in a line."""
        message = codec.decode_message(line)
        text = message_text(message, content=self.scope.content, metadata=self.scope.metadata)
        return Text("message", lines.session_id, lines.key, message.timestamp, text, position, message)


class _Counting(_Looking):
    """Gathers what ranking has to know of all texts."""

    def __init__(self, query: Query, scope: _Scope, relevance: Relevance) -> None:
        super().__init__(query, scope)
        self.relevance = relevance

    def __call__(self, batch: list[_Lines | Text]) -> None:
        for piece in batch:
            if isinstance(piece, Text):
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
        self.heap: list[tuple[_Key, Text]] = []  # the last of them at the top; no two keys are the same

    def __call__(self, batch: list[_Lines | Text]) -> None:
        for piece in batch:
            if isinstance(piece, Text):
                self.consider(piece)
                continue
            for place, line in enumerate(piece.lines, piece.position):
                if self.query.may_be_in(line):
                    self.consider(self.decode(piece, place, line))

    def consider(self, text: Text) -> None:
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
