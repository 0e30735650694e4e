"""Finding: search by reading everything, in memory that does not grow with it.

What matches is decided by `search/query.py`; here is what gets searched, and in which order it comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, cast, get_args

from .. import codec
from ..backends.wording import Candidate
from ..errors import IntegrityError, ValidationError
from ..models import HitKind, SearchHit, microseconds, parse_timestamp
from ..search import Query, Relevance
from ..search.texts import Filters, Found, is_same, message_text
from . import searched
from .documents import Documents
from .indexing import SMALL_TEXTS, Indexing
from .looking import Counting, Holding, LogLines, Scope, Selecting, Sought
from .noted import Noted
from .searched import Text
from .store import Store
from .wording import Times, Wording

if TYPE_CHECKING:
    from ..search.database import IndexFile

_KINDS: tuple[HitKind, ...] = get_args(HitKind)
_ORDERS = ("time", "relevance")

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

    def __init__(self, store: Store, documents: Documents, indexing: Indexing, wording: Wording) -> None:
        self._store = store
        self._wording = wording
        self._noted = Noted(store, documents)
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

        wanted = Sought(user_id, session_id, parsed, scope, order == "relevance", limit, offset)
        return await self._answer(wanted)

    async def _answer(self, wanted: Sought) -> list[SearchHit]:
        """Answer by the index where there is one, or is much to read; otherwise by reading."""
        if await self._wording.is_possible():
            return await self._by_words(wanted)
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

    async def _scan(self, wanted: Sought, most: int | None = None) -> list[SearchHit]:
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
            counting = Counting(wanted.query, scope, relevance)
            await self._go_through(user_id, session_ids, scope, counting, most)
        selecting = Selecting(wanted.query, scope, relevance, wanted.limit + wanted.offset)
        await self._go_through(user_id, session_ids, scope, selecting, most)
        return await asyncio.to_thread(selecting.hits, user_id, wanted.offset)

    # --- by the index --------------------------------------------------------------------------------

    async def _by_index(self, wanted: Sought) -> list[SearchHit] | None:
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

    async def _hits(self, wanted: Sought, found: Sequence[Found]) -> list[SearchHit | None]:
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

    # --- by words that the backend keeps -------------------------------------------------------------

    async def _by_words(self, wanted: Sought) -> list[SearchHit]:
        """Answer from those messages that may have the words, and from all contexts and analyses."""
        user_id, session_id, scope = wanted.user_id, wanted.session_id, wanted.scope
        if "message" in scope.kinds:
            await self._wording.prepare(user_id, session_id)
        relevance = await self._relevance_by_words(wanted) if wanted.relevance else None
        selecting = Selecting(wanted.query, scope, relevance, wanted.limit + wanted.offset)
        await self._look_at_notes(wanted, selecting)
        if "message" in scope.kinds:
            times = Times(
                None if scope.since is None else microseconds(scope.since),
                None if scope.until is None else microseconds(scope.until),
            )
            async with aclosing(self._wording.find(user_id, session_id, wanted.query.terms, times)) as runs:
                async for run in runs:
                    await asyncio.to_thread(selecting, self._pieces(run))
                    if run[-1].is_kept and selecting.is_full_before(run[-1].moment):
                        break
        return await asyncio.to_thread(selecting.hits, user_id, wanted.offset)

    async def _look_at_notes(self, wanted: Sought, look: Callable[[list[LogLines | Text]], None]) -> None:
        others = wanted.scope.kinds - {"message"}
        if others:
            await asyncio.to_thread(look, [*await self._noted.texts(wanted.user_id, wanted.session_id, others)])

    async def _relevance_by_words(self, wanted: Sought) -> Relevance:
        """Return what ranking has to know of all texts.

        It is gathered in several steps, so what others write meanwhile may be in some of it.
        """
        query, scope, whose = wanted.query, wanted.scope, (wanted.user_id, wanted.session_id)
        relevance = Relevance(query)
        if "message" in scope.kinds:
            from ..search.lexemes import is_exact

            sums = await self._wording.sums(*whose)
            holding = []
            for term in query.terms:
                if is_exact(term) and (found := await self._wording.sums(*whose, [term])).is_exact:
                    holding.append(found.records)
                    continue
                counting = Holding(Query([term]), scope)
                async with aclosing(self._wording.find(*whose, [term], Times())) as runs:
                    async for run in runs:
                        kept = [candidate for candidate in run if candidate.is_kept]
                        await asyncio.to_thread(counting, self._pieces(kept))
                holding.append(counting.count)
            relevance = Relevance.of(query, sums.records, sums.tokens, holding)
        counted = Counting(query, scope, relevance)
        await self._look_at_notes(wanted, counted)
        for log in await self._wording.behind(*whose) if "message" in scope.kinds else []:
            place = self._layout.parse(log.key)
            name = "" if place is None else place.names["session_id"]
            async with aclosing(self._wording.rest(log)) as unkept:
                async for lines in unkept:
                    await asyncio.to_thread(counted, [LogLines(name, log.key, 0, lines)])
        return relevance

    def _pieces(self, run: Sequence[Candidate]) -> list[LogLines | Text]:
        places = {key: self._layout.parse(key) for key in {candidate.key for candidate in run}}
        return [
            LogLines(place.names["session_id"], found.key, found.position, [found.line])
            for found in run
            if (place := places[found.key]) is not None
        ]

    # --- reading -------------------------------------------------------------------------------------

    async def _go_through(
        self,
        user_id: str,
        session_ids: Sequence[str],
        scope: Scope,
        look: Callable[[list[LogLines | Text]], None],
        most: int | None,
    ) -> None:
        """Have `look` see everything in scope, many records at a time, in a thread."""
        if most is not None and len(session_ids) > most:
            raise _TooMuch
        batch: list[LogLines | Text] = []
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
        self, user_id: str, session_ids: Sequence[str], scope: Scope
    ) -> AsyncGenerator[LogLines | Text, None]:
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

    async def _messages(self, user_id: str, session_ids: Sequence[str]) -> AsyncGenerator[LogLines, None]:
        backend = await self._store.reading()
        for start in range(0, len(session_ids), _LOGS_AT_A_TIME):
            logs = {
                session_id: self._layout.key("messages", user_id=user_id, session_id=session_id)
                for session_id in session_ids[start : start + _LOGS_AT_A_TIME]
            }
            beginnings = await asyncio.gather(*(backend.read_log(key, 0, _SHORT_LOG) for key in logs.values()))
            for (session_id, key), beginning in zip(logs.items(), beginnings, strict=True):
                if len(beginning) < _SHORT_LOG:
                    yield LogLines(session_id, key, 0, beginning)
                    continue
                # From the start again, for the log may have changed since.
                position = 0
                async with aclosing(cast("AsyncGenerator[list[bytes]]", backend.stream_log(key))) as runs:
                    async for lines in runs:
                        yield LogLines(session_id, key, position, lines)
                        position += len(lines)


class _TooMuch(Exception):
    """There is so much to read that an index should answer."""


# --- what is looked at -------------------------------------------------------------------------------


def _scope(content: bool, metadata: bool, kinds: object, roles: object, since: object, until: object) -> Scope:
    """Check the filters of a search."""
    wanted = _texts(kinds, "kinds", "message")
    unknown = sorted((wanted or frozenset()) - set(_KINDS))
    if unknown:
        raise ValidationError(f"kinds holds {unknown[0]!r:.80}.", hint=f"Possible are {', '.join(_KINDS)}.")
    scope = Scope(
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


def _find(file: IndexFile, generation: int, wanted: Sought, filters: Filters) -> list[Found]:
    from ..search.database import IndexAbsent
    from ..search.matches import find

    with file.reading() as connection:
        if file.generation != generation and not file.read_only:
            raise IndexAbsent("it was replaced meanwhile")
        count = wanted.limit + wanted.offset
        return find(file, connection, wanted.query, filters, relevance=wanted.relevance, count=count)[wanted.offset :]


def _message_hit(wanted: Sought, found: Found, line: bytes | None) -> SearchHit | None:
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


def _note_hit(wanted: Sought, found: Found, text: Text | None) -> SearchHit | None:
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
