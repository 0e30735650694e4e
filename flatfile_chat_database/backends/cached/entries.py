"""What stands in the cache: under which names, in which form, and the scripts that read and change it there.

For each key of the store there is one hash, with a random generation and what was read under it: a document, pages of
a log, their number. A reader who finds nothing takes the generation, or makes one, reads from the store, and puts what
it found on the condition that the generation is still the same. Who writes marks the hash before: it loses all it has,
and its generation is none that anything can be put under, until the marks of all who write are gone or so old that they
are dead. After, the hash is removed. Generations are random, so one that was lost by eviction, expiry or a flush never
comes again.

A hash belongs to an owner, the first two segments of its key, and to the store; both have generations of their own,
which its own is bound to. Whoever moves or removes a folder marks its owner, or the store, instead of keys that nobody
can list.

Values have a mark, a checksum over their place and what they hold, and a kind. What is not as it should be is removed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

from ... import codec

T = TypeVar("T")

DOCUMENT, COUNT, WHOLE = "d", "n", "w"
"""Fields of a hash: the document, the number of records, all records."""

_MAGIC = b"\xcdc1"
_HEAD = len(_MAGIC) + 5
_ABSENT, _BYTES, _RECORDS, _NUMBER = b"-", b"b", b"r", b"#"

MARKED = b"!"
"""The generation of what is being written."""
MOST_FIELDS = 24
"""In one hash: generation, what it is bound to, and so many answers less two."""
OWNER_LIVES = 2
"""Times as long as a hash an owner keeps its generation, from when a hash was last made or looked for in vain."""
MARK_MILLISECONDS = 600_000
"""After which who has marked something and not come back is dead."""
_MOST_SCOPES = 200
"""More are marked by their owners, or the store."""

_SHARED = """
local time
local function now()
  if not time then local t = redis.call('TIME') time = t[1] * 1000 + math.floor(t[2] / 1000) end
  return time
end
local function marked(key)
  local all = redis.call('HGETALL', key)
  for i = 1, #all, 2 do
    if string.sub(all[i], 1, 1) == 't' and (tonumber(all[i + 1]) or 0) > now() then return true end
  end
  return false
end
local function generation(key)
  local found = redis.pcall('HGET', key, 'g')
  if type(found) == 'table' then redis.call('DEL', key) return false end
  return found
end
"""

LOOK = (
    _SHARED
    + """
local fresh, life, owners = ARGV[1], ARGV[2], ARGV[3]
local function kept(key)
  local found = generation(key)
  if found == '!' then
    if marked(key) then return false end
    redis.call('DEL', key)
    found = false
  end
  if not found then
    redis.call('HSET', key, 'g', fresh)
    found = fresh
  end
  redis.call('PEXPIRE', key, owners)
  return found
end
local store, answers = kept(KEYS[1]), {}
for i = 2, #KEYS, 2 do
  local key, owner, answer = KEYS[i + 1], store and kept(KEYS[i]), false
  if owner then
    local bound, found = store .. owner, redis.pcall('HMGET', key, 'g', 's', unpack(ARGV, 4))
    if found.err then found = {} end
    if found[1] ~= '!' or not marked(key) then
      if not found[1] or found[2] ~= bound then
        redis.call('DEL', key)
        redis.call('HSET', key, 'g', fresh, 's', bound)
        redis.call('PEXPIRE', key, life)
        answer = {fresh, bound}
      else
        answer = found
      end
    end
  end
  answers[#answers + 1] = answer
end
return answers
"""
)
"""KEYS: store, then owner and hash of each key. ARGV: a new generation, milliseconds of hashes, of owners, fields.
Returns for each key false if it is being written, else its generation, what it is bound to, and the fields it has."""

FILL = """
local found = redis.pcall('HMGET', KEYS[3], 'g', 's')
if found.err or found[1] ~= ARGV[1] or found[2] ~= ARGV[2] then return 0 end
local store, owner = redis.call('HGET', KEYS[1], 'g'), redis.call('HGET', KEYS[2], 'g')
if not store or not owner or store .. owner ~= ARGV[2] then return 0 end
if redis.call('HLEN', KEYS[3]) >= tonumber(ARGV[3]) then return 0 end
return redis.call('HSET', KEYS[3], ARGV[4], ARGV[5])
"""
"""KEYS: store, owner, hash. ARGV: generation, what it is bound to, most fields, field, value."""

MARK = (
    _SHARED
    + """
for i, key in ipairs(KEYS) do
  if generation(key) ~= '!' then
    redis.call('DEL', key)
    redis.call('HSET', key, 'g', '!')
  end
  redis.call('HSET', key, 't' .. ARGV[i + 1], now() + ARGV[1])
  redis.call('PEXPIRE', key, ARGV[1])
end
return #KEYS
"""
)
"""KEYS: hashes. ARGV: milliseconds, then the token of who marks each."""

CLEAR = (
    _SHARED
    + """
for i, key in ipairs(KEYS) do
  redis.pcall('HDEL', key, 't' .. ARGV[i + 2])
  if generation(key) ~= '!' or not marked(key) then redis.call('DEL', key) end
end
if ARGV[1] ~= '' then redis.call('PUBLISH', ARGV[1], ARGV[2]) end
return #KEYS
"""
)
"""KEYS: hashes. ARGV: channel, message, then the token of who has marked each."""

SCRIPTS = (LOOK, FILL, MARK, CLEAR)


class Names:
    """The names in one opening of the cache of a store."""

    def __init__(self, cache: str, opening: str = "") -> None:
        self._of = (cache, opening)
        self._start = f"chatdb:{cache}:{opening}:"
        self.store = f"{self._start}s"
        self.channel = f"chatdb:{cache}:news"

    def are_of(self, cache: str, opening: str) -> bool:
        """Tell whether they are those of an opening of a cache."""
        return self._of == (cache, opening)

    def owner(self, key: str) -> str:
        """Name the owner of a key, or of what is in a folder of at least two segments."""
        return f"{self._start}o:{'/'.join(key.split('/', 2)[:2])}"

    def key(self, key: str) -> str:
        """Name the hash of a key."""
        return f"{self._start}k:{key}"

    def scopes(self, touched: Iterable[str]) -> list[str]:
        """Name what has to be marked for keys that change, and for folders, which end in a slash."""
        keys, owners = set(), set()
        for name in touched:
            if not name.endswith("/"):
                keys.add(name)
            elif name.count("/") > 1:
                owners.add(self.owner(name))
            else:
                return [self.store]
        if len(keys) > _MOST_SCOPES:
            owners |= {self.owner(key) for key in keys}
            keys.clear()
        if len(owners) > _MOST_SCOPES:
            return [self.store]
        return [*(self.key(key) for key in sorted(keys)), *sorted(owners)]


class Damaged(ValueError):
    """A value is none of ours, or not what it was."""


def _packed(name: str, field: str, kind: bytes, payload: bytes) -> bytes:
    return b"".join((_MAGIC, _checksum(name, field, kind, payload), kind, payload))


def _checksum(name: str, field: str, kind: bytes, payload: bytes) -> bytes:
    place = zlib.crc32(f"{name}\n{field}\n".encode())
    return zlib.crc32(payload, zlib.crc32(kind, place)).to_bytes(4)


def _unpacked(name: str, field: str, value: object) -> tuple[bytes, bytes]:
    if not isinstance(value, bytes) or len(value) < _HEAD or not value.startswith(_MAGIC):
        raise Damaged
    kind, payload = value[_HEAD - 1 : _HEAD], value[_HEAD:]
    if _checksum(name, field, kind, payload) != value[len(_MAGIC) : _HEAD - 1]:
        raise Damaged
    return kind, payload


def pack_document(name: str, data: bytes | None) -> bytes:
    """Return the value of a document in the hash `name`; None if it is absent."""
    return _packed(name, DOCUMENT, _ABSENT if data is None else _BYTES, data or b"")


def unpack_document(name: str, value: object) -> bytes | None:
    """Return what `pack_document` has packed.

    Raises:
        Damaged: It is something else.
    """
    kind, payload = _unpacked(name, DOCUMENT, value)
    if kind == _ABSENT and not payload:
        return None
    if kind != _BYTES:
        raise Damaged
    return payload


def pack_records(name: str, field: str, lines: Sequence[bytes]) -> bytes:
    """Return the value of lines, which have no newlines."""
    return _packed(name, field, _RECORDS, b"\n".join((b"%d" % len(lines), *lines, b"")))


def unpack_records(name: str, field: str, value: object) -> list[bytes]:
    """Return what `pack_records` has packed.

    Raises:
        Damaged: It is something else.
    """
    return _lines(name, field, value)[0].split(b"\n")[:-1]


def unpack_decoded(name: str, field: str, value: object, decode: Callable[[bytes], T | None]) -> list[T]:
    """Return what `decode` makes of what `pack_records` has packed, likewise; all at once where it can."""
    text, count = _lines(name, field, value)
    whole = getattr(decode, "whole", None)
    if whole is not None and text and len(text) <= codec.MAX_LINE_BYTES:
        found: list[T] | None = whole(text, count)
        if found is not None:
            return found
    return decoded(text.split(b"\n")[:-1], decode)


def _lines(name: str, field: str, value: object) -> tuple[bytes, int]:
    """Return lines with their newlines, and how many they are: counting them takes as long as reading them."""
    kind, payload = _unpacked(name, field, value)
    count, _, text = payload.partition(b"\n")
    if kind != _RECORDS or not count.isdigit() or (text and not text.endswith(b"\n")):
        raise Damaged
    return text, int(count)


def pack_count(name: str, count: int) -> bytes:
    """Return the value of a number of records."""
    return _packed(name, COUNT, _NUMBER, b"%d" % count)


def unpack_count(name: str, value: object) -> int:
    """Return what `pack_count` has packed.

    Raises:
        Damaged: It is something else.
    """
    kind, payload = _unpacked(name, COUNT, value)
    if kind != _NUMBER or not payload.isdigit():
        raise Damaged
    return int(payload)


def page_field(start: int, stop: int | None) -> str:
    """Name the field of a page of a log."""
    return f"p{start}:{'' if stop is None else stop}"


def is_whole(start: int, stop: int | None, count: int) -> bool:
    """Tell whether a page of so many records is surely all of its log."""
    if start >= 0:
        return start == 0 and (stop is None or 0 <= count < stop)
    return stop is None and count < -start


def decoded(lines: list[bytes], decode: Callable[[bytes], T | None]) -> list[T]:
    """Return what `decode` makes of lines, all at once where it can."""
    if decode is codec.record_line:
        return cast("list[T]", lines)
    many = getattr(decode, "many", None)
    if many is not None and sum(map(len, lines)) <= codec.MAX_LINE_BYTES:  # and so each of them
        found: list[T] | None = many(lines)
        if found is not None:
            return found
    return [record for line in lines if (record := decode(line)) is not None]


class WithLine:
    """Makes of a line what `decode` makes of it, and keeps the line."""

    def __init__(self, decode: Callable[[bytes], Any]) -> None:
        self._decode = decode
        self._many = getattr(decode, "many", None)

    def __call__(self, line: bytes) -> tuple[bytes, Any] | None:
        made = self._decode(line)
        return None if made is None else (line.removesuffix(b"\n"), made)

    def many(self, lines: Sequence[bytes]) -> list[tuple[bytes, Any]] | None:
        """Make all at once, or return None."""
        made = None if self._many is None else self._many(lines)
        if made is None:
            return None
        return [(line.removesuffix(b"\n"), each) for line, each in zip(lines, made, strict=True)]
