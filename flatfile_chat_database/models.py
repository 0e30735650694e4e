"""The records of a chat store as plain dataclasses, and the ids and timestamps they carry.

Nothing here does I/O. A field order in this module is the order on disk: do not change it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal

from .errors import ValidationError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def utc_now() -> datetime:
    """Return the current time, aware, in UTC."""
    return datetime.now(UTC)


def format_timestamp(moment: datetime) -> str:
    """Write an aware datetime as ISO 8601 in UTC, always with six digits of a second.

    A fixed width makes stored timestamps sort as text.
    """
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def parse_timestamp(text: object, field_name: str = "timestamp") -> datetime:
    """Read an ISO 8601 timestamp that carries its offset from UTC.

    Raises:
        ValidationError: `text` is no string, no ISO 8601 date and time, or naive.
    """
    if not isinstance(text, str):
        raise ValidationError(f"{field_name} must be an ISO 8601 string, not {type(text).__name__}.")
    try:
        if "\0" in text:  # fromisoformat reads up to it and passes over the rest
            raise ValueError("embedded NUL")
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is UTC:  # most of them, and nothing is to be converted
            return moment
        if moment.tzinfo is not None:
            return moment.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ValidationError(
            f"{field_name} {text[:80]!r} is not an ISO 8601 timestamp.",
            hint="Write it as 2026-01-31T12:00:00+00:00.",
        ) from error
    raise ValidationError(f"{field_name} {text[:80]!r} has no offset from UTC.", hint="Add one, for instance +00:00.")


class _Now:
    """The current time as a stored timestamp; what does not change within a second is made once."""

    def __init__(self) -> None:
        self._second = 0, ""

    def __call__(self) -> str:
        moment = time.time_ns() // 1000
        second, text = self._second
        if not 0 <= moment - second < 1_000_000:
            second = moment // 1_000_000 * 1_000_000
            text = datetime.fromtimestamp(second // 1_000_000, UTC).isoformat()[:-6]
            self._second = second, text
        return f"{text}.{moment - second:06d}+00:00"


now = _Now()
"""Return the current time as a stored timestamp."""


def microseconds(moment: datetime) -> int:
    """Return an aware moment as microseconds since 1970, which compare like moments."""
    delta = moment - _EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


class _Uuid7Source:
    """Version 7 UUIDs (RFC 9562, section 6.2, method 1): time-ordered, strictly increasing in a process.

    A 12-bit counter, seeded at random in its lower half each millisecond, orders the ids of one
    millisecond; when it overflows, the clock is taken as one millisecond on. A clock that runs backwards is
    ignored until it has caught up. The other 62 bits come from the operating system, for many ids at a time, and a
    forked child asks anew, so it repeats nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._millisecond = 0
        self._counter = 0
        self._head = ""
        self._tails: list[str] = []
        self._hooked = False

    def __call__(self) -> str:
        with self._lock:
            if not self._tails:
                self._draw()
            millisecond = time.time_ns() // 1_000_000
            if millisecond > self._millisecond:
                self._begin(millisecond)
            elif self._counter < 0xFFF:
                self._counter += 1
            else:
                self._begin(self._millisecond + 1)
            return f"{self._head}{self._counter:03x}{self._tails.pop()}"

    def _begin(self, millisecond: int) -> None:
        self._millisecond = millisecond
        self._counter = int.from_bytes(os.urandom(2)) & 0x7FF
        text = f"{millisecond:012x}"
        self._head = f"{text[:8]}-{text[8:]}-7"

    def _begin_anew(self) -> None:
        """In a forked child: the lock may be held by a thread that is not here, and what was drawn is the parent's."""
        self._lock = threading.Lock()
        self._tails = []

    def _draw(self) -> None:
        if not self._hooked:  # asking who we are each time costs more than all the rest
            os.register_at_fork(after_in_child=self._begin_anew)
            self._hooked = True
        # The two highest bits of each are the variant of RFC 9562, section 4.1: 10.
        drawn = int.from_bytes(os.urandom(8 * _DRAWN)) & _NOT_VARIANT | _VARIANT
        text = f"{drawn:x}"
        self._tails = [f"-{text[at : at + 4]}-{text[at + 4 : at + 16]}" for at in range(0, len(text), 16)]


_DRAWN = 256
"""Ids that share a call of the operating system."""

_NOT_VARIANT = int.from_bytes(bytes([0x3F, *[0xFF] * 7]) * _DRAWN)
_VARIANT = int.from_bytes(bytes([0x80, *[0] * 7]) * _DRAWN)

new_id = _Uuid7Source()
"""Return a new unique id: a version 7 UUID in its usual text form."""


@dataclass(slots=True)
class Message:
    """One message of a session or a panel.

    `Message("user", "Hello")` is enough; every other field has a default.
    """

    id: str = field(default_factory=new_id, kw_only=True)
    """Unique in its log; a time-ordered UUID unless given. Adding the same id again adds nothing."""
    role: str
    """"user", "assistant", a persona id, or any other non-empty string."""
    content: str
    timestamp: str = field(default_factory=now, kw_only=True)
    """ISO 8601 with an offset."""
    attachments: list[str] = field(default_factory=list, kw_only=True)
    """References to files, for instance the paths that `save_document` returns."""
    metadata: dict[str, Any] = field(default_factory=dict, kw_only=True)
    parent_id: str | None = field(default=None, kw_only=True)
    """The message this one answers, for threads and branches; left out of the JSON when None."""


@dataclass(slots=True)
class User:
    """A user and their profile."""

    user_id: str
    created_at: str
    updated_at: str
    profile: dict[str, Any] = field(default_factory=dict)
    version: str = field(default="", compare=False)
    """What `expected_version=` of an update takes; not stored."""


@dataclass(slots=True)
class Session:
    """A chat session's metadata."""

    id: str
    user_id: str
    title: str
    created_at: str
    updated_at: str
    """The later of the session's own last update and its newest message."""
    metadata: dict[str, Any] = field(default_factory=dict)
    version: str = field(default="", compare=False)
    """What `expected_version=` of an update takes; not stored."""


@dataclass(slots=True)
class Panel:
    """A multi-persona panel's metadata."""

    id: str
    type: str
    personas: list[str]
    created_at: str
    config: dict[str, Any] = field(default_factory=dict)
    version: str = field(default="", compare=False)
    """What `expected_version=` of an update takes; not stored."""


@dataclass(slots=True)
class SituationalContext:
    """What a conversation is about at one moment."""

    summary: str
    key_points: list[str] = field(default_factory=list)
    entities: dict[str, list[str]] = field(default_factory=dict)
    timestamp: str = field(default_factory=now)
    confidence: float = 1.0
    """From 0 to 1."""


@dataclass(slots=True)
class Document:
    """An uploaded file's metadata."""

    filename: str
    path: str
    """The key of the file, relative to the store."""
    mime_type: str
    size: int
    """Bytes of the content as it was given, whether or not it is stored compressed."""
    uploaded_at: str
    analysis: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""
    """Hex digest of the content as it was given."""


@dataclass(frozen=True, slots=True)
class MessagePage:
    """Neighbouring messages of one log, oldest first."""

    messages: list[Message]
    has_more: bool
    """Whether the log goes on in the direction that was asked for: to newer messages with `after`, else to older
    ones."""


BEGINNING: Final = "beginning"
"""The cursor of whoever wants to be told of every message, from the first one on."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message that a watch delivers."""

    message: Message
    """As it was when it was read, with up to 63 others; changed later, it does not come again."""
    session_id: str | None
    """Whose it is; None in a panel."""
    panel_id: str | None
    """Whose it is; None in a session."""
    place: Callable[[], str] = field(repr=False, compare=False)
    """Makes the cursor, which is long for a user with many sessions."""

    @property
    def cursor(self) -> str:
        """Text to store: with it the same method goes on behind this message, in another process and another year."""
        return self.place()


HitKind = Literal["message", "context", "analysis"]


@dataclass(frozen=True, slots=True)
class SearchHit:
    """One place where a query was found."""

    kind: HitKind
    """ "message", "context" or "analysis"."""
    user_id: str
    session_id: str
    timestamp: str
    snippet: str
    """An excerpt of the text, with the words that were found between `«` and `»`."""
    score: float
    """Relevance (BM25): higher is better; comparable within one result only. 0.0 when ordered by time."""
    message: Message | None = None
    """Set when `kind` is "message"."""
    filename: str | None = None
    """The document's name, set when `kind` is "analysis"."""


@dataclass(frozen=True, slots=True)
class TrashEntry:
    """Something deleted that `undelete` can bring back."""

    id: str
    kind: str
    """ "user", "session", "panel", "persona", "insight" or "document"."""
    names: Mapping[str, str]
    """The ids that name it, for instance `{"user_id": …, "session_id": …}`."""
    deleted_at: str


@dataclass(frozen=True, slots=True)
class PurgeReceipt:
    """What a purge removed for good."""

    names: Mapping[str, str]
    """The ids that were given."""
    keys: list[str]
    """Every key that is gone, the trash's among them."""
    purged_at: str


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What a prune removed, or would remove."""

    dry_run: bool
    insights: list[str]
    """Keys of panel insights older than `panel_insight_retention_days`."""
    trash: list[str]
    """Ids of trash entries older than `trash_retention_days`."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a store that does not fit."""

    kind: str
    """A stable word for programs, such as "torn-tail"; `docs/check.md` lists them."""
    key: str
    """Where it is, relative to the store."""
    detail: str
    """One sentence for people."""
    fixed: bool = False
    """Whether this run repaired it."""
    harmless: bool = False
    """A leftover that affects no answer, such as an old temporary file; the store still counts as clean."""
