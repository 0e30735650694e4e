"""The map: what is stored where. No other module holds a path or a piece of a key.

A key is a relative path of `/`-separated segments. Every entry of the map has a name, a shape and a pattern;
`Layout.key` builds the key of an entry from ids and `Layout.parse` reads it back.

Ids of users, sessions, panels and personas may be any text; each becomes one segment by a reversible escape:
percent-encoding of UTF-8 bytes (RFC 3986, with lower-case digits), where lower-case ASCII letters, digits, `-`,
`_`, `.`, `@` and `+` and letters without case or decomposition stay as they are. So two ids never share a segment,
not even where a file system ignores case or normalises Unicode, and a segment is never `..`, hidden, an
option (`-rf`) or a device of Windows (`con`). On disk, do not change.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from enum import StrEnum
from functools import lru_cache

import msgspec

from .config import StorageConfig
from .errors import ConfigurationError, ValidationError

MAX_SEGMENT_BYTES = 180
"""Of an escaped id; leaves room for suffixes within the 255 bytes that file systems allow."""

# Unicode 3.2 stands in every Python unchanged, so a segment never depends on the Python that made it.
# Characters that are younger than that are escaped.
_UNICODE = unicodedata.ucd_3_2_0

_SAFE_ASCII = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.@+")
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
_PERCENT = re.compile(rb"%([0-9a-f]{2})")
_GENERATION = re.compile(r"~\d+\Z")  # a filename's own "~" is replaced
_SEGMENT = re.compile(r"[^/\x00-\x1f]{1,255}")


class Shape(StrEnum):
    """How an entry is stored."""

    DOCUMENT = "document"  # JSON, replaced whole
    LOG = "log"  # JSONL, appended
    BLOB = "blob"  # bytes as they were given


class Entry(msgspec.Struct, frozen=True):
    """One kind of thing that is stored."""

    name: str
    shape: Shape
    pattern: str
    """The key, with `{placeholders}` for ids."""
    meaning: str


class Place(msgspec.Struct, frozen=True):
    """What a key stands for."""

    entry: Entry
    names: Mapping[str, str]
    """The ids, by placeholder."""


def check_id(value: object, field_name: str) -> str:
    """Return `value` if it can name something.

    Raises:
        ValidationError: It is no string, empty, holds control characters or lone surrogates, or is longer than
            `MAX_SEGMENT_BYTES` once escaped.
    """
    if not isinstance(value, str):
        raise ValidationError(f"{field_name} must be a string, not {type(value).__name__}.")
    if not value:
        raise ValidationError(f"{field_name} must not be empty.")
    if len(value) > MAX_SEGMENT_BYTES:
        raise ValidationError(f"{field_name} is too long: {len(value)} characters.", hint="Use a shorter id.")
    segment = escape(value)
    if segment is None:
        raise ValidationError(
            f"{field_name} {value!a} holds control characters or lone surrogates.",
            hint="Use printable text.",
        )
    if len(segment.encode()) > MAX_SEGMENT_BYTES:
        raise ValidationError(
            f"{field_name} takes {len(segment.encode())} bytes once escaped; {MAX_SEGMENT_BYTES} are possible.",
            hint="Use a shorter id; upper-case letters and symbols take three bytes each.",
        )
    return value


@lru_cache(maxsize=16384)
def escape(text: str) -> str | None:
    """Return `text` as a safe segment, or None if it holds control characters or lone surrogates."""
    pieces = []
    for character in text:
        if character in _SAFE_ASCII or _stays(character):
            pieces.append(character)
        elif unicodedata.category(character) in ("Cc", "Cs"):
            return None
        else:
            pieces.append(_percent(character))
    if pieces and (pieces[0] in (".", "-") or _DEVICE.fullmatch("".join(pieces))):
        pieces[0] = _percent(pieces[0])
    if pieces and pieces[-1] == ".":
        pieces[-1] = _percent(".")
    return "".join(pieces)


@lru_cache(maxsize=16384)
def unescape(segment: str) -> str | None:
    """Return the id that `escape` (or `escape_reserved`) turned into `segment`, or None if none did."""
    try:
        text = _PERCENT.sub(_unpercent, segment.encode()).decode()
    except UnicodeError:
        return None
    if text and segment in (escape(text), _escape_first(text)):
        return text
    return None


def _escape_first(text: str) -> str | None:
    """Return the segment of an id that would otherwise be one of the layout's own names."""
    segment = escape(text)
    return segment and (segment if segment[0] == "%" else _percent(segment[0]) + segment[1:])


def _stays(character: str) -> bool:
    if character < "\x80" or "\u1100" <= character <= "\u11ff":  # conjoining jamo would compose
        return False
    return (
        _UNICODE.category(character) in ("Lo", "Lm")
        and _UNICODE.normalize("NFKD", character) == character
        and _UNICODE.normalize("NFC", character) == character
    )


def _unpercent(match: re.Match[bytes]) -> bytes:
    return bytes((int(match[1], 16),))


def _percent(character: str) -> str:
    return "".join(f"%{byte:02x}" for byte in character.encode())


class Layout:
    """The map of one store; its names come from the configuration."""

    def __init__(self, config: StorageConfig) -> None:
        users = config.user_data_directory_name
        self.users = users
        self.panels = config.panel_sessions_directory_name
        self.system = config.system_config_directory_name
        top = (self.panels, config.global_personas_directory_name, self.system)
        self._refused = frozenset() if users else frozenset(name.casefold() for name in top)
        user = f"{users}/{{user_id}}" if users else "{user_id}"
        session = f"{user}/{{session_id}}"
        documents = f"{session}/{config.document_storage_subdirectory_name}"
        panel = f"{self.panels}/{{panel_id}}"
        log = config.messages_filename
        document, blob = Shape.DOCUMENT, Shape.BLOB
        self.entries = {
            entry.name: entry
            for entry in (
                Entry("store", document, f"{self.system}/config.json", "format, store id and names"),
                Entry("user", document, f"{user}/{config.user_profile_filename}", "a user's profile"),
                Entry("persona", document, f"{user}/personas/{{persona_id}}.json", "a user's own persona"),
                Entry("session", document, f"{session}/{config.session_metadata_filename}", "a session"),
                Entry("messages", Shape.LOG, f"{session}/{log}", "its messages, one a line"),
                Entry("context", document, f"{session}/{config.situational_context_filename}", "its context"),
                Entry(
                    "context_snapshot",
                    document,
                    f"{session}/{config.context_history_subdirectory_name}/{{snapshot_id}}.json",
                    "an earlier context",
                ),
                Entry(
                    "documents",
                    document,
                    f"{documents}/{config.document_metadata_filename}",
                    "what is known of its documents",
                ),
                Entry("document", blob, f"{documents}/{{document}}", "an uploaded file"),
                Entry(
                    "analysis",
                    document,
                    f"{documents}/{config.document_analysis_subdirectory_name}/{{document}}.json",
                    "a document's analysis",
                ),
                Entry("panel", document, f"{panel}/panel.json", "a panel"),
                Entry("panel_messages", Shape.LOG, f"{panel}/{log}", "its messages, one a line"),
                Entry(
                    "panel_persona",
                    document,
                    f"{panel}/personas/{{persona_id}}.json",
                    "a persona as it was when the panel was made",
                ),
                Entry("insight", document, f"{panel}/insights/{{insight_id}}.json", "an insight or conclusion"),
                Entry(
                    "global_persona",
                    document,
                    f"{config.global_personas_directory_name}/{{persona_id}}.json",
                    "a persona shared by all users",
                ),
                Entry("quarantine", blob, f"{self.system}/quarantine/{{item}}", "damaged bytes set aside"),
            )
        }
        self.leaves = _leaves(tuple(self.entries.values()))
        """Last segments of the map's own, with how what is at keys that end in them is stored: faster than `parse`."""
        self._patterns = _patterns(tuple(self.entries.values()))
        self._by_depth: dict[int, list[tuple[str, _Pattern]]] = {}
        for name, pattern in self._patterns.items():
            self._by_depth.setdefault(pattern.depth, []).append((name, pattern))
        self._own_folders = f"{self.journal}/", f"{self.index}/"
        self._own = frozenset((self.lock, self.presence, self.checkpoint_lock, self.journal, self.index))
        self._documents_own = {
            config.document_metadata_filename.casefold(),
            config.document_analysis_subdirectory_name.casefold(),
        }

    # --- keys ----------------------------------------------------------------------------------------

    def key(self, name: str, /, **names: str) -> str:
        """Build the key of an entry.

        Raises:
            ValidationError: An id cannot name anything, or is the store's own folder.
        """
        return self._patterns[name].build(names, self._refused)

    def folder(self, name: str, /, **names: str) -> str:
        """Build the folder that an entry's key stands in, without a final slash."""
        return self.key(name, **names).rpartition("/")[0]

    def parse(self, key: str) -> Place | None:
        """Return what a key stands for, or None if no entry has such a key."""
        parts = key.split("/")
        for name, pattern in self._by_depth.get(len(parts), ()):
            names = pattern.match(parts)
            if names is None or names.get("user_id") in self._refused:
                continue
            if name != "document" or self._is_document_segment(names["document"]):
                return Place(self.entries[name], names)
        return None

    def is_folder(self, key: str) -> bool:
        """Tell whether `key` is a folder with a name of the map's own; the folder of an id is none."""
        if key in (self.trash, self.quarantine):
            return True
        found = (pattern.match_folder(key) for pattern in self._patterns.values())
        return any(names is not None and names.get("user_id") not in self._refused for names in found)

    def is_in_folders(self, name: str) -> bool:
        """Tell whether each id of an entry is the name of a folder, as a session's, and not of a file."""
        return bool(self._patterns[name].behind_last)

    def parse_child(self, name: str, child: str) -> str | None:
        """Return the id that a child of the folder `parent(name, …)` stands for, or None if it is no such entry.

        `child` is one segment as the backend lists it: the name of a folder (for entries such
        as "session") or of a file (such as "insight").
        """
        text = self._patterns[name].child(child)
        return None if name == "user" and text in self._refused else text

    def leaf(self, name: str) -> str:
        """Return the last segment of an entry's keys, which must be the same in all of them."""
        return self.entries[name].pattern.rpartition("/")[2]

    def keys_below(self, name: str, folder: str, children: Iterable[str]) -> dict[str, str]:
        """Return keys of entry `name` by its last id, for those children of its `parent` folder that stand for one.

        Much faster than `key` for each, as lists of thousands need it.
        """
        pattern = self._patterns[name]
        tail = "".join(f"/{literal}" for literal in pattern.behind_last)
        ids = ((child, pattern.child(child)) for child in children)
        return {text: f"{folder}/{child}{tail}" for child, text in ids if text is not None}

    def parent(self, name: str, /, **names: str) -> str:
        """Return the folder whose children are named by the entry's last placeholder.

        For "session" that is the user's folder, for "user" the folder of all users (which may be the store
        itself, ""), for "insight" the folder of a panel's insights.
        """
        pattern = self._patterns[name]
        return pattern.build(names, self._refused, pattern.last)

    # --- documents -----------------------------------------------------------------------------------

    def document_segment(self, filename: str, generation: int) -> str:
        """Return the name on disk of an uploaded file: readable, safe, and different for each generation.

        Which name belongs to which file is in the session's document metadata, so this need not be reversible;
        the caller picks the first generation that is free (see `records/documents.py`).
        """
        stem, dot, extension = unicodedata.normalize("NFC", filename).rpartition(".")
        stem, extension = _readable(stem), _readable(extension)
        suffix = f"~{generation}" if generation else ""
        while len(f"{stem}{suffix}{dot}{extension}".encode()) > MAX_SEGMENT_BYTES:
            stem = stem[:-1]
        return f"{stem}{suffix}{dot}{extension}"

    def document_filename(self, segment: str) -> str:
        """Return the filename that a name on disk was made of, but for the characters that it replaced."""
        stem, dot, extension = segment.rpartition(".")
        return f"{_GENERATION.sub('', stem)}{dot}{extension}" if dot else _GENERATION.sub("", segment)

    def is_free_document_segment(self, segment: str) -> bool:
        """Tell whether a name on disk is none of the layout's own."""
        return segment.casefold() not in self._documents_own and not _DEVICE.fullmatch(segment.casefold())

    def _is_document_segment(self, segment: str) -> bool:
        return segment[0] not in ".%-" and self.is_free_document_segment(segment)

    # --- the flat-file backend's own files, which are no keys ----------------------------------------

    @property
    def lock(self) -> str:
        """The path of the lock file."""
        return f"{self.system}/lock"

    @property
    def presence(self) -> str:
        """The path of the file that every open store holds a shared lock on."""
        return f"{self.system}/open"

    @property
    def checkpoint_lock(self) -> str:
        """The path of the file that whoever checkpoints holds a lock on."""
        return f"{self.system}/checkpoint"

    @property
    def journal(self) -> str:
        """The folder of the journal."""
        return f"{self.system}/journal"

    @property
    def journal_history(self) -> str:
        """The path of the list of what the segments held that are gone."""
        return f"{self.journal}/history.jsonl"

    def segment(self, number: int) -> str:
        """Return the path of a segment of the journal."""
        return f"{self.journal}/{number:08d}.jsonl"

    def segment_number(self, name: str) -> int | None:
        """Return the number of a file in the folder of the journal; None if it is no segment."""
        match = re.fullmatch(r"(\d{8,})\.jsonl", name)
        return None if match is None else int(match[1])

    @property
    def index(self) -> str:
        """The folder of the derived indexes, in which nothing is a key."""
        return f"{self.system}/index"

    @property
    def objects(self) -> str:
        """The folder of an object store's own objects, in which nothing is a key."""
        return f"{self.system}/objects"

    @staticmethod
    def index_name(user_id: str) -> str:
        """Return the name of the file that holds a user's index, in `index` or elsewhere."""
        return f"{escape(check_id(user_id, 'user_id'))}.sqlite3"

    def is_own(self, path: str) -> bool:
        """Tell whether a path is one of the backend's own."""
        return path in self._own or path.startswith(self._own_folders)

    @property
    def restoring(self) -> str:
        """The key that stands in a database while a backup is put into it: what is there is no store yet."""
        return f"{self.system}/restoring.json"

    # --- trash ---------------------------------------------------------------------------------------

    @property
    def trash(self) -> str:
        """The folder of the trash; each entry is a folder in it that repeats the tree of the store."""
        return f"{self.system}/trash"

    def trash_folder(self, trash_id: str) -> str:
        """Return the folder of one trash entry; what was at `key` is in it under the same key."""
        return f"{self.trash}/{trash_id}"

    def in_trash(self, trash_id: str, key: str) -> str:
        """Return the key that what was at `key`, or the folder that `key` was, has in a trash entry."""
        folder = self.trash_folder(trash_id)
        return f"{folder}/{key}" if key else folder

    def origin(self, key: str) -> str:
        """Return the key that something had before it went to the trash; any other key is its own."""
        parsed = self.parse_trash(key)
        return key if parsed is None else parsed[1]

    def trash_id(self, kind: str, moment: datetime, unique: str) -> str:
        """Return a name for a trash entry that says when it was deleted and what it is."""
        # A hash, so that ids of any source, whatever they look like, fit the name's format.
        digest = hashlib.blake2b(unique.encode(), digest_size=4).hexdigest()
        return f"{moment:%Y%m%d_%H%M%S_%f}_{kind}_{digest}"

    def parse_trash_id(self, trash_id: str) -> tuple[datetime, str] | None:
        """Return when a trash entry was deleted, and its kind."""
        match = re.fullmatch(r"(\d{8}_\d{6}_\d{6})_([a-z]+)_[0-9a-f]{8}", trash_id)
        if match is None:
            return None
        try:
            return datetime.strptime(match[1] + "+0000", "%Y%m%d_%H%M%S_%f%z"), match[2]
        except ValueError:
            return None

    def parse_trash(self, key: str) -> tuple[str, str] | None:
        """Split a key in the trash into the entry's id and the key that it had."""
        head, slash, tail = key.removeprefix(self.trash + "/").partition("/")
        if not key.startswith(self.trash + "/") or not slash or not tail:
            return None
        return head, tail

    @property
    def quarantine(self) -> str:
        """The folder of damaged bytes that were set aside."""
        return f"{self.system}/quarantine"

    # --- a store that is being filled, or mirrored ---------------------------------------------------

    @property
    def migration(self) -> str:
        """The folder of what a migration notes in the store it fills; gone when that is whole."""
        return f"{self.system}/migration"

    @property
    def migration_note(self) -> str:
        """The key that says which store is being copied here."""
        return f"{self.migration}/note.json"

    @property
    def mirror(self) -> str:
        """The folder of what two stores that are one note in each of them."""
        return f"{self.system}/mirror"

    @property
    def mirror_state(self) -> str:
        """The key that says whether a store is the first of the two."""
        return f"{self.mirror}/state.json"

    @property
    def mirror_open(self) -> str:
        """The key that is there as long as the store may be written."""
        return f"{self.mirror}/open.json"

    @property
    def mirror_second(self) -> str:
        """The folder of the mark that is there as long as the store is the second one, and may be copied to."""
        return f"{self.mirror}/second"

    @property
    def mirror_writers(self) -> str:
        """The folder of what each process that writes keeps there, such as the record of what the other store lacks."""
        return f"{self.mirror}/writers"

    def is_of_mirror(self, key: str) -> bool:
        """Tell whether a key is one of those that the mirroring keeps for itself."""
        return key == self.mirror or key.startswith(f"{self.mirror}/")

    # --- a store with a cache in front of it ---------------------------------------------------------

    @property
    def cache_state(self) -> str:
        """The key that says whether a cache may be used."""
        return f"{self.system}/cache.json"

    def is_of_front(self, key: str) -> bool:
        """Tell whether a key is one of those that a mirror or a cache keeps in its stores; no other store has them."""
        return key == self.cache_state or self.is_of_mirror(key)

    # --- all of it -----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())


@lru_cache(maxsize=64)
def _patterns(entries: tuple[Entry, ...]) -> Mapping[str, _Pattern]:
    """Return the patterns of entries by name, made once for all stores that have the same names."""
    _refuse_shared_names(entries)
    by_name = {entry.name: entry for entry in entries}
    return {name: _Pattern(entry, by_name) for name, entry in by_name.items()}


def _refuse_shared_names(entries: Iterable[Entry]) -> None:
    """Refuse names of the configuration that put two entries in one place, or one where another has its folder."""
    for one, other in itertools.combinations(entries, 2):
        shorter, longer = sorted((one.pattern.casefold().split("/"), other.pattern.casefold().split("/")), key=len)
        if longer[: len(shorter)] == shorter:
            raise ConfigurationError(
                f"{one.name!r} at {one.pattern} and {other.name!r} at {other.pattern} would be in each other's place.",
                hint="Choose other file and folder names.",
            )


class _Pattern:
    """One entry's pattern, cut into segments."""

    def __init__(self, entry: Entry, entries: Mapping[str, Entry]) -> None:
        self._entry = entry
        self._segments: list[tuple[str, str]] = []  # (placeholder or "", literal or suffix)
        for segment in entry.pattern.split("/"):
            match = re.fullmatch(r"\{(\w+)\}(.*)", segment)
            self._segments.append((match[1], match[2]) if match else ("", segment))
        self.depth = len(self._segments)
        self._literals = [(at, literal) for at, (placeholder, literal) in enumerate(self._segments) if not placeholder]
        # Names of the layout that stand beside each placeholder; an id that looks like one is escaped further.
        self._reserved: list[frozenset[str]] = []
        for depth in range(len(self._segments)):
            before = entry.pattern.split("/")[:depth]
            beside = [other.pattern.split("/") for other in entries.values()]
            self._reserved.append(
                frozenset(
                    parts[depth].casefold()
                    for parts in beside
                    if parts[:depth] == before and len(parts) > depth and "{" not in parts[depth]
                )
            )

    def build(self, names: Mapping[str, str], refused: frozenset[str], depth: int | None = None) -> str:
        """Build the first `depth` segments of the key, or all of it."""
        parts = []
        for (placeholder, literal), reserved in zip(self._segments[:depth], self._reserved, strict=False):
            if not placeholder:
                parts.append(literal)
                continue
            if placeholder in ("document", "item"):
                parts.append(_check_segment(names[placeholder], placeholder) + literal)
                continue
            text = check_id(names[placeholder], placeholder)
            segment = str(escape(text))
            if segment + literal in reserved:
                if segment in refused:
                    raise ValidationError(
                        f"{placeholder} {text!r} is the name of one of the store's own folders.",
                        hint="Set user_data_directory_name, or use another id.",
                    )
                segment = str(_escape_first(text))
            parts.append(segment + literal)
        return "/".join(parts)

    @property
    def last(self) -> int:
        """The depth of the last placeholder."""
        return max(depth for depth, (placeholder, _) in enumerate(self._segments) if placeholder)

    @property
    def behind_last(self) -> list[str]:
        """The segments behind the last placeholder's."""
        return [literal for _, literal in self._segments[self.last + 1 :]]

    def match(self, parts: list[str]) -> dict[str, str] | None:
        """Return the ids in the segments of a key that has as many as this pattern, or None if it is none of it."""
        # The names of the map first, which tell nearly all other keys before ids are read.
        return None if any(parts[at] != literal for at, literal in self._literals) else self._match(parts)

    def match_folder(self, key: str) -> dict[str, str] | None:
        """Return the ids in the key of a folder that is no id's and that keys of this pattern stand in, or None."""
        parts = key.split("/")
        if len(parts) >= len(self._segments) or self._segments[len(parts) - 1][0]:
            return None
        return self._match(parts)

    def _match(self, parts: list[str]) -> dict[str, str] | None:
        names: dict[str, str] = {}
        for depth, part in enumerate(parts):
            placeholder, literal = self._segments[depth]
            if not placeholder:
                if part != literal:
                    return None
                continue
            text = self._read(depth, part)
            if text is None:
                return None
            names[placeholder] = text
        return names

    def child(self, child: str) -> str | None:
        return self._read(self.last, child)

    def _read(self, depth: int, part: str) -> str | None:
        placeholder, literal = self._segments[depth]
        if not part.endswith(literal) or len(part) == len(literal):
            return None
        segment = part[: len(part) - len(literal)]
        if placeholder in ("document", "item"):
            return segment if _SEGMENT.fullmatch(segment) else None
        text = unescape(segment)
        if text is None:
            return None
        # Only the segment that `build` makes counts: `profile.json` is no session, `%70rofile.json` is.
        canonical = escape(text)
        if canonical is not None and canonical + literal in self._reserved[depth]:
            canonical = _escape_first(text)
        return text if segment == canonical else None


@lru_cache(maxsize=64)
def _leaves(entries: tuple[Entry, ...]) -> Mapping[str, Shape]:
    """Return what `Layout.leaves` is, made once for all stores that have the same names."""
    found: dict[str, set[Shape]] = {}
    for entry in entries:
        found.setdefault(entry.pattern.rpartition("/")[2], set()).add(entry.shape)
    return {leaf: min(shapes) for leaf, shapes in found.items() if "{" not in leaf and len(shapes) == 1}


def _check_segment(segment: str, placeholder: str) -> str:
    if not _SEGMENT.fullmatch(segment) or segment in (".", ".."):
        raise ValidationError(f"{placeholder} {ascii(segment)[:200]} is no file name.")
    return segment


def _readable(text: str) -> str:
    kept = "".join(c if c.isalnum() or c in " ._-()+,@" else "_" for c in text)
    kept = kept.rstrip(". ")
    return f"_{kept}" if not kept or kept[0] in " .-" or _DEVICE.fullmatch(kept.casefold()) else kept
