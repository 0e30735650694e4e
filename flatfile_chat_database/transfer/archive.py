"""The format of an archive: which members there are, in which order, and what they say. On disk, do not change.

    chatdb.json                    what the archive is, what is to come, and who made it
    store/users/ada/user.json      the files of the store under their keys, owners before what is theirs
    …
    checksums/00000001.sha256      hashes of the files before it, as `sha256sum -c` reads them
    store/…                        and so on
    manifest.json                  counts, and the hashes of all hashes; without it an archive is not whole

As a folder these are files, as an archive they are members of a tar stream in this order. Either can be verified with
`sha256sum -c checksums/*`, and `store/` in it is a store of files by itself.

A reader verifies everything as it passes, in memory that does not grow: `files` and `bytes` are announced at the start,
hashes come after a thousand files at most, and keys come in one order, so none can come twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Final, Literal, TypeVar

import msgspec

from ..config import NAMING_FIELDS, StorageConfig
from ..errors import ConfigurationError, IntegrityError, ValidationError
from ..layout import Layout, Shape

HEADER: Final = "chatdb.json"
MANIFEST: Final = "manifest.json"
STORE: Final = "store/"
_CHECKSUMS: Final = "checksums/"
FORMAT: Final = "chatdb-archive"
VERSION: Final = 1
"""Of the format. A reader refuses any other."""

MOST_IN_A_RUN: Final = 1000
"""Files whose hashes stand together."""
MOST_TEXT: Final = 4 << 20
"""Bytes of a header, a manifest or hashes."""

Kind = Literal["backup", "export"]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Hash = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Text = Annotated[str, msgspec.Meta(max_length=1000)]

T = TypeVar("T")


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an archive is; its first member."""

    format: Literal["chatdb-archive"]
    format_version: Count
    kind: Kind
    """backup: all of a store. export: its living records, or those of one user."""
    made_by: Text
    created_at: Text
    store_format: Count
    store_id: Text
    user: Text | None
    """Whose records they are; None: everybody's."""
    names: dict[Text, Text]
    """The fields of the configuration that keys depend on."""
    files: Count
    """To come."""
    bytes: Count
    """Of these files."""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an archive held; its last member."""

    format: Literal["chatdb-archive"]
    format_version: Count
    files: Count
    bytes: Count
    counts: dict[Text, Count]
    """Files by entry of the map, and in the trash."""
    runs: Count
    """Members with hashes."""
    sha256: Hash
    """Of chatdb.json and all members with hashes, in their order."""


class _Version(msgspec.Struct, frozen=True):
    format: str
    format_version: int


def encode(record: Header | Manifest) -> bytes:
    """Return the text of a header or manifest."""
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"


def decode(name: str, data: bytes, kind: type[T]) -> T:
    """Return what a member says.

    Raises:
        ConfigurationError: It is of another version of the format.
        IntegrityError: It is none.
    """
    try:
        found = msgspec.json.decode(data, type=_Version)
        if found.format != FORMAT:
            raise IntegrityError(f"{name}: it says that it is {found.format[:50]!a}, not {FORMAT!r}.")
        if found.format_version != VERSION:
            raise ConfigurationError(
                f"{name}: the archive has format {found.format_version}; this version reads {VERSION}.",
                hint="Use the version of flatfile_chat_database that made it, or a newer one.",
            )
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityError(f"{name}: it is not what stands there in an archive: {error}.") from error


def names_of(config: StorageConfig) -> dict[str, str]:
    """Return the fields of a configuration that keys depend on."""
    return {name: str(getattr(config, name)) for name in NAMING_FIELDS}


def check_names(header: Header, config: StorageConfig) -> None:
    """Refuse an archive whose keys mean something else here.

    Raises:
        ConfigurationError: A name is another one.
    """
    wanted = names_of(config)
    for name in sorted(header.names.keys() ^ wanted.keys()):
        raise ConfigurationError(f"{HEADER}: names: {name} is {'missing' if name in wanted else 'no such name'}.")
    for name, value in wanted.items():
        if header.names[name] != value:
            raise ConfigurationError(
                f"The archive was made with {name}={header.names[name]!r}, not {value!r}.",
                hint=f"Set {name} to that: a store keeps the names it was made with.",
            )


# --- hashes ------------------------------------------------------------------------------------------------


def checksums_name(number: int) -> str:
    """Return the name of the member with the hashes of a run, counted from 1."""
    return f"{_CHECKSUMS}{number:08d}.sha256"


def is_checksums(name: str) -> bool:
    """Tell whether a member holds hashes."""
    return name.startswith(_CHECKSUMS)


def checksums_line(key: str, digest: str) -> bytes:
    """Return the line of a file among the hashes."""
    return f"{digest}  {STORE}{key}\n".encode()


class Tally:
    """What is counted while an archive is written or read, to be compared with its manifest."""

    def __init__(self, header: bytes) -> None:
        self.files = 0
        self.bytes = 0
        self.counts: dict[str, int] = {}
        self._runs = 0
        self._lines: list[bytes] = []
        self._all = hashlib.sha256(header)

    def add(self, key: str, entry: str, size: int, digest: str) -> None:
        """Count a file."""
        self.files += 1
        self.bytes += size
        self.counts[entry] = self.counts.get(entry, 0) + 1
        self._lines.append(checksums_line(key, digest))

    @property
    def in_run(self) -> int:
        """How many files have come since the last hashes."""
        return len(self._lines)

    def end_run(self) -> tuple[str, bytes]:
        """Return the name and the text of the hashes of the files since the last ones."""
        self._runs += 1
        text = b"".join(self._lines)
        self._lines.clear()
        self._all.update(text)
        return checksums_name(self._runs), text

    def manifest(self) -> Manifest:
        """Return the manifest of what was counted."""
        digest = self._all.hexdigest()
        return Manifest(FORMAT, VERSION, self.files, self.bytes, self.counts, self._runs, digest)


# --- what may be in an archive, and where ------------------------------------------------------------------

_OWNERS: Final = frozenset(("user", "session", "panel", "documents"))
_LOGS: Final = frozenset(("messages", "panel_messages"))
_NAMED_BY_OTHERS: Final = frozenset(("document", "analysis", "quarantine"))
"""Entries whose names are no ids, which could be equal where a file system ignores case."""
TRASH: Final = "trash"
_NOT_LIVING: Final = frozenset((TRASH, "quarantine"))


class Sight(msgspec.Struct, frozen=True):
    """How a key is seen: what it is, where it comes among others."""

    entry: str
    """Of the map, or `trash`."""
    shape: Shape
    names: Mapping[str, str]
    rank: str
    """Keys come in this order, by code point: owners first, then their logs, then what else is theirs."""
    is_named_by_others: bool

    @property
    def is_living(self) -> bool:
        """Whether it is a record that the library answers with."""
        return self.entry not in _NOT_LIVING


def look_at(layout: Layout, key: str) -> Sight | None:
    """Return what a key is; None if the map has no place for it."""
    inner = key
    in_trash = layout.parse_trash(key)
    if in_trash is not None:
        trash_id, inner = in_trash
        if layout.parse_trash_id(trash_id) is None:
            return None
    place = layout.parse(inner)
    if place is None or (in_trash is not None and place.entry.name in ("store", "quarantine")):
        return None
    name = place.entry.name
    try:
        if layout.key(name, **place.names) != inner:
            return None
    except ValidationError:  # longer than any id
        return None
    folder = key.rpartition("/")[0]
    rank = key
    if in_trash is None and name == "store":
        rank = ""
    elif in_trash is None and name in _OWNERS:
        rank = f"{folder}/\x01"  # no key has control characters
    elif in_trash is None and name in _LOGS:
        rank = f"{folder}/\x02"
    return Sight(
        TRASH if in_trash is not None else name, place.entry.shape, place.names, rank, name in _NAMED_BY_OTHERS
    )
