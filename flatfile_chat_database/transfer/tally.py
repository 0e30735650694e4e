"""What goes through a transfer: how much of what, its hash, and what of it is damaged."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from .. import codec
from ..errors import IntegrityError
from ..layout import Layout, Shape

KINDS: Final = {
    "user": "users",
    "session": "sessions",
    "messages": "messages",
    "document": "documents",
    "analysis": "analyses",
    "context": "contexts",
    "context_snapshot": "snapshots",
    "panel": "panels",
    "panel_messages": "panel messages",
    "insight": "insights",
    "persona": "personas",
    "global_persona": "personas",
    "quarantine": "quarantined",
}
"""What entries of the map are counted as; of logs, their lines are. What has no name here counts as a key only."""

TRASH: Final = "in the trash"
"""What keys in the trash are counted as, whatever they are."""

_NOT_ASKED: Final = (False, "", False)

SHOWN: Final = 100
"""So many keys of a kind are named; all are counted."""


@dataclass(slots=True)
class Keys:
    """How many keys, and the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, key: str) -> None:
        """Take in a key."""
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(key)

    def __bool__(self) -> bool:
        return self.count > 0


class Content:
    """The bytes at one key, looked at in pieces of any size."""

    def __init__(self, layout: Layout | None, key: str) -> None:
        """Begin with no bytes; without a map they are hashed and counted, and what they are is not asked."""
        self.key = key
        self.size = 0
        self.lines = 0
        """Newlines in it, if it is a log."""
        self.is_log, self.kind, self._is_document = _NOT_ASKED if layout is None else _described(layout, key)
        self._hash = hashlib.sha256()
        self._sealed = 0, b""
        self._damage = ""
        self._begun: list[bytes] = []  # of a line, or a document as a whole
        self._begun_size = 0
        self._checked = 0

    def feed(self, data: bytes) -> None:
        """Take in the next bytes."""
        self._hash.update(data)
        self.size += len(data)
        if self.is_log:
            self._feed_lines(data)
        elif self._is_document:
            self._hold(data)

    def _feed_lines(self, data: bytes) -> None:
        self.lines += data.count(b"\n")
        first, *others = data.split(b"\n")
        if not others:
            self._hold(first)
            return
        self._hold(first)
        lines = [b"".join(self._begun), *others[:-1]]
        if not self._damage and codec.read_lines(lines) is not None:  # nearly always, and faster than one by one
            self._checked += len(lines)
        else:
            for line in lines:
                self._check_line(line)
        self._begun, self._begun_size = [], 0
        self._hold(others[-1])

    def _hold(self, data: bytes) -> None:
        self._begun_size += len(data)
        if self._begun_size <= codec.MAX_LINE_BYTES + 1:
            self._begun.append(data)

    def _check_line(self, line: bytes) -> None:
        if not self._damage and codec.line_id(line) is None and line.strip():
            self._damage = f"line {self._checked + 1} is no message"
        self._checked += 1

    @property
    def damage(self) -> str:
        """What is wrong with it, as far as it can be told by itself; "" if nothing is."""
        if self._damage or not self._begun_size:
            return self._damage or ("it is empty" if self._is_document and not self.size else "")
        if self.is_log:
            return "it ends in half a line"
        try:
            codec.decode_object(b"".join(self._begun), self.key)
        except IntegrityError:
            return "it is no JSON object"
        return ""

    @property
    def sha256(self) -> bytes:
        """The hash of the bytes."""
        return self._hash.digest()

    @property
    def seal(self) -> bytes:
        """The hash of the key with that of the bytes."""
        if self._sealed[0] != self.size or not self._sealed[1]:
            self._sealed = self.size, hashlib.sha256(self.key.encode() + b"\0" + self.sha256).digest()
        return self._sealed[1]

    @property
    def mark(self) -> bytes:
        """Eight bytes that stand for these bytes at this key."""
        return self.seal[:8]


def under_way(key: str) -> bytes:
    """Return eight bytes that stand for any bytes at this key, while they are being put there."""
    return hashlib.sha256(key.encode() + b"\0").digest()[:8]


@dataclass(slots=True)
class Tally:
    """All of it together."""

    keys: int = 0
    bytes: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    """How many users, sessions, messages …"""
    damaged: dict[str, str] = field(default_factory=dict)
    """Keys, and what is wrong with each; the first of them."""
    damaged_count: int = 0
    _sum: int = 0

    def add(self, content: Content) -> None:
        """Take in what is at a key."""
        self.keys += 1
        self.bytes += content.size
        if content.kind:
            number = content.lines if content.is_log and content.kind != TRASH else 1
            self.counts[content.kind] = self.counts.get(content.kind, 0) + number
        self._sum += int.from_bytes(content.seal)
        if damage := content.damage:
            self.damaged_count += 1
            if len(self.damaged) < SHOWN:
                self.damaged[content.key] = damage

    @property
    def digest(self) -> str:
        """One number for every key with the SHA-256 of its bytes, whatever order they came in."""
        return f"{self._sum % (1 << 256):064x}"


def _described(layout: Layout, key: str) -> tuple[bool, str, bool]:
    """Return whether a key is a log, what it is counted as, and whether it is a document."""
    trash = layout.parse_trash(key)
    place = layout.parse(key if trash is None else trash[1])
    if place is None:
        return False, "" if trash is None else TRASH, False
    shape = place.entry.shape
    kind = KINDS.get(place.entry.name, "") if trash is None else TRASH
    return shape is Shape.LOG, kind, shape is Shape.DOCUMENT
