"""Looking at records, in a thread: which match, how many hold what, and which come first."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from datetime import datetime

import msgspec

from .. import codec
from ..errors import ValidationError
from ..models import HitKind, SearchHit, microseconds, parse_timestamp
from ..search import Query, Relevance
from ..search.texts import message_text
from .searched import Text
from .store import logger

_RANKS: dict[HitKind, int] = {"analysis": 0, "context": 1, "message": 2}


@dataclass(slots=True)
class Scope:
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


class Sought(msgspec.Struct, frozen=True):
    """A search whose arguments were checked."""

    user_id: str
    session_id: str | None
    query: Query
    scope: Scope
    relevance: bool
    limit: int
    offset: int


class LogLines(msgspec.Struct, frozen=True):
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


class Looking:
    """Goes through batches of records."""

    def __init__(self, query: Query, scope: Scope) -> None:
        self.query = query
        self.scope = scope

    def decode(self, lines: LogLines, position: int, line: bytes) -> Text:
        """Return what is searched of the message in a line."""
        message = codec.decode_message(line)
        text = message_text(message, content=self.scope.content, metadata=self.scope.metadata)
        return Text("message", lines.session_id, lines.key, message.timestamp, text, position, message)


class Counting(Looking):
    """Gathers what ranking has to know of all texts."""

    def __init__(self, query: Query, scope: Scope, relevance: Relevance) -> None:
        super().__init__(query, scope)
        self.relevance = relevance

    def __call__(self, batch: list[LogLines | Text]) -> None:
        for piece in batch:
            if isinstance(piece, Text):
                self.relevance.add(self.query.measure_any(piece.text))
                continue
            for place, line in enumerate(piece.lines, piece.position):
                self.relevance.add(self.query.measure_any(self.decode(piece, place, line).text))


class Holding(Looking):
    """Counts the messages that match."""

    count = 0

    def __call__(self, batch: list[LogLines | Text]) -> None:
        for piece in batch:
            if isinstance(piece, LogLines):
                for place, line in enumerate(piece.lines, piece.position):
                    self.count += self.query.matches(self.decode(piece, place, line).text)


_Key = tuple[float, datetime, str, int, int, str]


class Selecting(Looking):
    """Keeps the first `count` hits of those seen so far."""

    def __init__(self, query: Query, scope: Scope, relevance: Relevance | None, count: int) -> None:
        super().__init__(query, scope)
        self.relevance = relevance
        self.count = count
        self.heap: list[tuple[_Key, Text]] = []  # the last of them at the top; no two keys are the same

    def __call__(self, batch: list[LogLines | Text]) -> None:
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

    def is_full_before(self, moment: int | None) -> bool:
        """Tell whether there are enough that nothing which is not later than a moment can be among the first."""
        if self.relevance is not None or moment is None or len(self.heap) < self.count:
            return False
        return microseconds(self.heap[0][0][1]) > moment

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
