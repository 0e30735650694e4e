"""Cursors: how far a watch has got, as a text that whoever watches can store.

A cursor says of a log how many messages are behind it, and has checks of the ids of the newest of those, by which the
place is verified, and found again when messages before it were removed. Nothing else of a log is needed, so cursors
work on every backend, and go with a store that is moved to another one.

What is in the bytes, in base64 (RFC 4648, section 5) without padding; do not change it, for people store it:

    version  1 byte
    scope    6 bytes, of the store's id and of what is watched
    spots    their number, and of each: 6 bytes of the session's name (of a user's watch only),
             the position plus one (0 if it is not known), the number of checks, 5 bytes of each check
    check    4 bytes, of all that

Numbers are in LEB128: seven bits a byte, the lowest first.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from hashlib import blake2b

import msgspec

from .. import codec
from ..errors import ValidationError

CHECKS = 8
"""Of a spot: so many messages can be removed from the end before the place is lost."""
FULL_SPOTS = 32
"""Of a user: the sessions of the newest messages have all their checks in a cursor, the others one."""

_VERSION = 1
_SCOPE_BYTES = 6
_NAME_BYTES = 6
_CHECK_BYTES = 5
_SUM_BYTES = 4
_MOST_CHARACTERS = 4_000_000
_MOST_NUMBER_BYTES = 7
_ALPHABET = re.compile(r"[A-Za-z0-9_-]+\Z")


class Spot(msgspec.Struct, frozen=True):
    """A place in a log: behind some of its messages."""

    position: int | None
    """How many are before it; None if that is not known: then it is behind the one of the first check."""
    checks: tuple[bytes, ...]
    """Of the ids of the newest ones before it, the newest first."""

    def behind(self, line: bytes) -> Spot:
        """Return the place behind the message that comes next."""
        position = None if self.position is None else self.position + 1
        return Spot(position, (check_of(line), *self.checks[: CHECKS - 1]))


START = Spot(0, ())
"""The place before the first message."""


def check_of(line: bytes) -> bytes:
    """Return the check of the id in a message's line."""
    return _hashed(_CHECK_BYTES, codec.written_id(line))


def name_of(session_id: str) -> bytes:
    """Return what stands for a session in the cursor of a user."""
    return _hashed(_NAME_BYTES, session_id)


def scope_of(store_id: str, *names: str) -> bytes:
    """Return what stands for a store and what is watched in it."""
    return _hashed(_SCOPE_BYTES, store_id, *names)


def encode(scope: bytes, spots: Mapping[bytes, Spot]) -> str:
    """Write a cursor; `spots` are by the names of sessions, those of the newest messages last, or one by b""."""
    data = bytearray((_VERSION,)) + scope + _number(len(spots))
    full = len(spots) - FULL_SPOTS
    for count, (name, spot) in enumerate(spots.items()):
        checks = spot.checks if count >= full else spot.checks[:1]
        data += name + _number(0 if spot.position is None else spot.position + 1) + bytes((len(checks),))
        data += b"".join(checks)
    data += blake2b(data, digest_size=_SUM_BYTES).digest()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decode(cursor: str, scope: bytes, unmade: bytes, *, named: bool) -> dict[bytes, Spot]:
    """Read a cursor of this scope, or of `unmade`, that of a store before it was made, when nothing was in it.

    Raises:
        ValidationError: It is no cursor, or is of something else.
    """
    data = _bytes_of(cursor)
    if data is None:
        raise ValidationError(
            "cursor is none that a watch gave, or only a part of one.",
            hint='Give the whole text of an earlier cursor, "beginning" for all messages, or none for those to come.',
        )
    try:
        spots = dict(_spots(data, named=named))
    except (IndexError, ValueError):
        spots = None
    found = bytes(data[1 : 1 + _SCOPE_BYTES])
    if spots is None or (found != scope and (found != unmade or any(spot != START for spot in spots.values()))):
        raise ValidationError(
            "cursor is of another store, or of another user, session or panel.",
            hint='Give a cursor of what is watched, "beginning" for all messages, or none for those to come.',
        )
    return spots


def _bytes_of(cursor: str) -> bytes | None:
    """Return what is in a cursor, without its check; None if it is none."""
    if len(cursor) > _MOST_CHARACTERS or not _ALPHABET.match(cursor):
        return None
    try:
        data = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
    except (ValueError, binascii.Error):
        return None
    body, found = data[:-_SUM_BYTES], data[-_SUM_BYTES:]
    if len(body) <= _SCOPE_BYTES or body[0] != _VERSION:
        return None
    return body if blake2b(body, digest_size=_SUM_BYTES).digest() == found else None


def _spots(data: bytes, *, named: bool) -> Iterator[tuple[bytes, Spot]]:
    """Yield the spots of a cursor; raise ValueError or IndexError if they are not what they should be."""
    count, at = _read_number(data, 1 + _SCOPE_BYTES)
    for _ in range(count):
        name = data[at : at + _NAME_BYTES * named]
        number, at = _read_number(data, at + len(name))
        checks, at = data[at], at + 1
        end = at + checks * _CHECK_BYTES
        if end > len(data) or checks > CHECKS or (number == 1) is not (checks == 0):
            raise ValueError
        cut = tuple(data[start : start + _CHECK_BYTES] for start in range(at, end, _CHECK_BYTES))
        yield name, Spot(number - 1 if number else None, cut)
        at = end
    if at != len(data) or (not named and count != 1):
        raise ValueError


def _number(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)


def _read_number(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for count in range(_MOST_NUMBER_BYTES):
        byte = data[at + count]
        value |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return value, at + count + 1
    raise ValueError


def _hashed(size: int, *texts: str) -> bytes:
    return blake2b("\0".join(texts).encode(), digest_size=size).digest()
