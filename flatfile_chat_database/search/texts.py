"""What goes into the full text of an index, and what comes out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Annotated, Final, NamedTuple

import msgspec

from ..codec import MAX_LINE_BYTES, ReadLine
from ..errors import ValidationError
from ..models import HitKind, Message, microseconds, parse_timestamp
from .tokens import spaced

_RANKS: Final[dict[HitKind, int]] = {"analysis": 0, "context": 1, "message": 2}
_Key = tuple[int, str, int, int, str]

_LARGEST_FILE: Final = 2**60
Size = Annotated[int, msgspec.Meta(ge=0, le=_LARGEST_FILE)]


class Meta(msgspec.Struct, frozen=True):
    """What an index notes of itself."""

    text: int = 0
    """Whether it has a full text."""
    cursor: str | None = None
    """Up to which all changes were taken in; None if the backend could not tell."""
    version: int = 0
    """Grows with each change."""
    deletions: int = 0
    timeless: int = 0
    """Whether there are texts without a time that can be read."""
    peak: str = ""


class Log(msgspec.Struct, array_like=True):
    """How far the log of a session was taken in."""

    number: int
    session_id: str
    identity: str | None
    last: Size
    """Offset of the last line."""
    last_hash: str | None
    messages: Size
    tokens: Size
    log_stamp: str | None
    context_stamp: str | None
    has_documents: int


class Lines(msgspec.Struct):
    """Lines of a session's log that are to be taken in."""

    session_id: str
    reset: bool
    """Whether what was taken in of this log before is to be dropped."""
    identity: str | None
    lines: list[tuple[int, bytes]]
    stamp: str | None = None


class Note(msgspec.Struct):
    """A context or an analysis."""

    kind: HitKind
    filename: str
    timestamp: str
    text: str


class Notes(msgspec.Struct):
    """All of some kinds that a session has; they replace what was taken in before."""

    session_id: str
    kinds: tuple[HitKind, ...]
    notes: list[Note]
    context_stamp: str | None = None


class Filters(msgspec.Struct, frozen=True):
    """Which texts may be hits."""

    kinds: frozenset[HitKind]
    session_id: str | None
    roles: frozenset[str] | None
    since: int | None
    until: int | None


class Totals(NamedTuple):
    """Sums over the texts that are compared."""

    texts: int
    tokens: int
    is_rank_blind: bool
    """Whether FTS5 gives every message that holds a term the same rank."""


class Found(msgspec.Struct):
    """A text that matches."""

    kind: HitKind
    session_id: str
    moment: int
    position: int
    offset: int
    length: int
    role: str | None
    filename: str
    text: str
    """Its tokens, with a space between."""
    tokens: int
    score: float = 0.0

    def check(self) -> None:
        """Raise ValueError if this cannot be where a text is."""
        if self.kind == "message" and not (0 <= self.offset <= _LARGEST_FILE and 0 <= self.length <= MAX_LINE_BYTES):
            raise ValueError(f"{self.length} bytes at {self.offset}")

    @property
    def key(self) -> _Key:
        """What decides of two texts which comes first: the greater one."""
        return self.moment, self.session_id, _RANKS[self.kind], self.position, self.filename


def message_text(message: Message | ReadLine, *, content: bool, metadata: bool) -> str:
    """Return all that is searched of a message, a string a line."""
    if not metadata or not message.metadata:
        return message.content if content else ""
    return "\n".join([message.content, *strings(message.metadata)] if content else strings(message.metadata))


def strings(value: object) -> Iterable[str]:
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


def line_hash(line: bytes) -> str:
    """Return what tells a line from another."""
    return hashlib.blake2b(line, digest_size=8).hexdigest()


def is_same(found: Found, text: str, timestamp: str, role: str | None = None) -> bool:
    """Tell whether what is searched of a record is still what was taken in."""
    try:
        moment = microseconds(parse_timestamp(timestamp))
    except ValidationError:
        return False
    return moment == found.moment and role == found.role and spaced(text) == found.text
