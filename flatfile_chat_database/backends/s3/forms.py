"""How the bytes at a key stand in objects.

At every key there is one object, its head. Most often it is the bytes themselves, as a file would hold them. Otherwise
it begins with a manifest, one line of JSON, and what follows that line are the last bytes of the content; what comes
before them is in parts, objects that never change, which the manifest names. A log goes on in segments: numbered
objects that are created in their order, each with the lines of one or more appends, until the log is folded into a new
manifest.

Where parts and segments are does not depend on the key, so that a head is moved as it is.
"""

from __future__ import annotations

import base64
import hashlib
import sys
from array import array
from collections.abc import Sequence
from typing import Literal

import msgspec

from ... import codec
from ...config import StorageConfig
from ...errors import IntegrityError
from ...layout import Layout

MAGIC = b'{"chatdb":'
"""What every manifest begins with, and no bytes at a key that have none."""
INDEXED_EVERY = 64
"""Of so many records of a part one has its offset in the part's index."""
PART_BYTES = 4 << 20
"""Of a part at most, but for a line that is longer."""


class Part(msgspec.Struct, array_like=True, frozen=True):
    """Bytes in an object of their own, which never changes."""

    name: str
    size: int
    records: int = 0
    """How many of its lines are records."""
    index: int = 0
    """Bytes of the index behind them; 0 if there is none, as for what is no log."""
    digest: str = ""
    """Of the bytes, as far as it is known."""
    is_whole: bool = False
    """Whether it is known that every line is a record or blank."""


class Manifest(msgspec.Struct, omit_defaults=True):
    """What a head begins with that is not the bytes themselves."""

    chatdb: Literal["log", "bytes", "gone", "locked"]
    """A log may go on in segments, bytes do not. What is gone was removed. What is locked is part of a commit of
    several keys, which is decided elsewhere."""
    generation: str = ""
    """Of a log: another one after each change that is no append."""
    parts: list[Part] = []
    through: int = 0
    """The number of the last segment that is folded into this head."""
    puts: list[str] = []
    """Segments that were folded into it, by the ids of their puts, the last ones."""
    intent: str = ""
    """Of the commit that a locked head is part of."""
    old: bytes | None = None
    """The head before that commit; None if there was nothing."""
    new: bytes | None = None
    """The head behind it."""


class Head(msgspec.Struct, frozen=True):
    """The object at a key."""

    etag: str
    raw: bytes
    manifest: Manifest | None
    """None: the object is the bytes themselves."""
    rest: bytes
    """The last bytes of the content, but for what is in segments."""
    is_locked: bool = False
    """Whether a commit is about to replace it, or another head in its place; nobody else may."""

    is_damaged: bool = False
    """Whether it begins as a manifest does and is none: it can be replaced, removed and moved, but not read."""

    def check(self, key: str) -> None:
        """Raise IntegrityError if it is damaged."""
        if self.is_damaged:
            raise IntegrityError(
                f"{key}: the manifest of its parts is damaged.", key=key, hint="Restore it from a backup, or remove it."
            )

    @property
    def version(self) -> str:
        """A text that is another one when the bytes are others.

        The ETag is, but for a lock, which stays as it is when it is decided which of its heads counts.
        """
        return f"{self.etag} {digest_of(self.raw)}" if self.is_locked else self.etag

    @property
    def is_there(self) -> bool:
        """Whether it stands for something; what is gone stands for nothing."""
        return self.manifest is None or self.manifest.chatdb != "gone"

    @property
    def is_log(self) -> bool:
        """Whether segments may follow."""
        return self.manifest is not None and self.manifest.chatdb == "log"

    @property
    def generation(self) -> str:
        """Of a log; otherwise empty, or of no meaning."""
        return self.manifest.generation if self.manifest is not None else ""

    @property
    def parts(self) -> list[Part]:
        """What comes before `rest`."""
        return self.manifest.parts if self.manifest is not None else []


class Segment(msgspec.Struct, omit_defaults=True):
    """The first line of a segment. Its other lines repeat those of segments before it, so that few hold the newest."""

    puts: list[str]
    """Made up for each segment whose lines are here, its own last, so that its writer knows it again."""
    at: int
    """Offset in the log of the first line here."""
    first: int
    """Position in the log of the first record here."""
    records: int
    """How many records are here."""
    own_at: int
    """Bytes of lines that are repeated."""
    own_records: int
    digest: str
    """Of all lines here."""
    previous: str = ""
    """The id of the put of the segment before; empty if there was none."""
    is_seal: bool = False
    """The log goes on in no further segment: whoever wrote this one is about to replace the manifest."""


_manifests = msgspec.json.Decoder(Manifest)
_segments = msgspec.json.Decoder(Segment)
_encoder = msgspec.json.Encoder()


class Places:
    """Where the objects are that are no heads, which are no keys."""

    def __init__(self, config: StorageConfig) -> None:
        self.own = Layout(config).objects
        self.intents = f"{self.own}/intents"
        self.parts = f"{self.own}/parts"
        self.probes = f"{self.own}/probes"
        self.segments = f"{self.own}/segments"

    def is_own(self, path: str) -> bool:
        """Tell whether an object is none at a key."""
        return path.startswith(f"{self.own}/")

    def part(self, name: str) -> str:
        """Return the path of a part."""
        return f"{self.parts}/{name}"

    def log(self, generation: str) -> str:
        """Return the folder of a log's segments."""
        return f"{self.segments}/{generation}"

    def segment(self, generation: str, number: int) -> str:
        """Return the path of a segment."""
        return f"{self.segments}/{generation}/{number:012d}"


def number_of(path: str) -> int:
    """Return the number of a segment; 0 for what has none."""
    name = path.rpartition("/")[2]
    return int(name) if len(name) == 12 and name.isdecimal() else 0


# --- heads -----------------------------------------------------------------------------------------------


def read_head(raw: bytes, etag: str) -> Head:
    """Read the object at a key, damaged or not."""
    if not raw.startswith(MAGIC):
        return Head(etag, raw, None, raw)
    line, newline, rest = raw.partition(b"\n")
    try:
        manifest = _manifests.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        manifest = None
    if manifest is None or not newline:
        return Head(etag, raw, None, raw, is_damaged=True)
    return Head(etag, raw, manifest, rest)


def write_head(manifest: Manifest | None, rest: bytes) -> bytes:
    """Return the object for a key. What would be taken for a manifest gets one."""
    if manifest is None:
        if not rest.startswith(MAGIC):
            return rest
        manifest = Manifest("bytes")
    return _encoder.encode(manifest) + b"\n" + rest


def locked(intent: str, old: bytes | None, new: bytes | None) -> bytes:
    """Return the head of a key that a commit of several is about to change."""
    return write_head(Manifest("locked", intent=intent, old=old, new=new), b"")


GONE = write_head(Manifest("gone"), b"")
"""What stands at a key from which something was removed, until it is removed itself. To create something there is to
replace it."""


def going(token: str) -> bytes:
    """Return what stands there when that is about to be removed; nobody else has the token."""
    return write_head(Manifest("gone", token), b"")


GOING_BYTES = len(going("-" * 36))
"""Of that, so that it is noticed in a list."""


# --- segments --------------------------------------------------------------------------------------------


def seal(previous: str) -> bytes:
    """Return the object that stands where the next segment of a log would be, behind a certain one."""
    nothing = Segment([], 0, 0, 0, 0, 0, digest="", previous=previous, is_seal=True)
    return write_segment(nothing, b"")


def write_segment(segment: Segment, lines: bytes) -> bytes:
    """Return the object of a segment."""
    segment.digest = digest_of(lines)
    return _encoder.encode(segment) + b"\n" + lines


def read_segment(key: str, path: str, data: bytes) -> tuple[Segment, bytes]:
    """Read a segment of the log at `key`.

    Raises:
        IntegrityError: It is none, or not as it was written.
    """
    line, _, lines = data.partition(b"\n")
    try:
        segment = _segments.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise damaged(key, path, "is no segment of a log") from None
    if segment.digest != digest_of(lines) or not (segment.puts or segment.is_seal):
        raise damaged(key, path, "is not as it was written")
    return segment, lines


def damaged(key: str, path: str, what: str) -> IntegrityError:
    """Return the error for an object that a log is made of."""
    return IntegrityError(f"{key}: the object {path} {what}.", key=key, hint="Run `chatdb check` to see all damage.")


def digest_of(lines: bytes) -> str:
    """Return a text by which bytes are known again."""
    return hashlib.blake2b(lines, digest_size=12).hexdigest()


# --- what is known of lines ----------------------------------------------------------------------------


class Index(msgspec.Struct):
    """What is behind the lines of a part: where its records are, and which ids they have."""

    every: int
    offsets: list[int]
    """Of every `every`th record, from the first one."""
    ids: str
    """Hashes of eight bytes, in the order of the records."""

    def hashes(self) -> array[int]:
        """Return the hashes of the ids."""
        found = array("Q")
        found.frombytes(base64.b85decode(self.ids))
        return _little(found)


_indexes = msgspec.json.Decoder(Index)


def _little(numbers: array[int]) -> array[int]:
    """Turn numbers of this machine into those that are stored, or back."""
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def hash_of(record_id: str) -> int:
    """Return a number for an id, which another id has as good as never."""
    digest = hashlib.blake2b(record_id.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class Lines(msgspec.Struct):
    """What lines of a log hold."""

    records: int
    offsets: list[int]
    hashes: array[int]
    is_whole: bool


def look_at(data: bytes) -> Lines:
    """Look at whole lines of a log."""
    offsets, hashes, offset, is_whole = [], array("Q"), 0, True
    for line in data.split(b"\n")[:-1]:
        record_id = codec.line_id(line)
        if record_id is not None:
            if len(hashes) % INDEXED_EVERY == 0:
                offsets.append(offset)
            hashes.append(hash_of(record_id))
        elif line.strip():
            is_whole = False
        offset += len(line) + 1
    return Lines(len(hashes), offsets, hashes, is_whole)


def write_part(name: str, data: bytes) -> tuple[Part, bytes]:
    """Return what a manifest says of lines of a log, and the object that they are in, with their index behind them."""
    found = look_at(data)
    ids = base64.b85encode(_little(found.hashes[:]).tobytes()).decode()
    index = _encoder.encode(Index(INDEXED_EVERY, found.offsets, ids)) + b"\n"
    return Part(name, len(data), found.records, len(index), digest_of(data), found.is_whole), data + index


def read_index(key: str, path: str, data: bytes) -> Index:
    """Read the index of a part.

    Raises:
        IntegrityError: It is none.
    """
    try:
        return _indexes.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise damaged(key, path, "has no index") from None


def cut(data: bytes, most: int) -> Sequence[bytes]:
    """Cut whole lines into pieces of at most so many bytes, but for lines that are longer."""
    pieces, start = [], 0
    while len(data) - start > most:
        end = data.rfind(b"\n", start, start + most) + 1
        if end <= start:
            end = data.find(b"\n", start) + 1 or len(data)
        pieces.append(data[start:end])
        start = end
    if start < len(data):
        pieces.append(data[start:])
    return pieces
