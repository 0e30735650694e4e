"""Damage: what can be wrong with a stored record, judged by the rules by which records are read."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from .. import codec
from ..backends.base import StorageBackend
from ..backends.changes import Absent, Change, Put
from ..backends.rules import version_of
from ..errors import IntegrityError, NotFoundError, ValidationError
from ..layout import Layout, Place
from ..models import Panel, Session, SituationalContext, User, now, parse_timestamp
from .content import GZIP, outgoing
from .metadata import GZIP_SUFFIX, DocumentEntry, mime_type_of, segment_in
from .quarantine import Quarantine
from .store import IDS, TIMES

_MODELS: Final[Mapping[str, type[Any]]] = {
    "user": User,
    "session": Session,
    "panel": Panel,
    "context": SituationalContext,
    "context_snapshot": SituationalContext,
}


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong."""

    kind: str
    """One of `check.KINDS`."""
    detail: str


def is_timestamp(value: object) -> bool:
    """Tell whether a stored value can be read as a timestamp."""
    try:
        parse_timestamp(value)
    except ValidationError:
        return False
    return True


# --- documents ---------------------------------------------------------------------------------------


def document_damage(place: Place, key: str, data: bytes) -> list[Damage]:
    """Return what is wrong with a document that stands at `place`."""
    name = place.entry.name
    try:
        content = codec.decode_object(data, key)
        if name in _MODELS:
            codec.decode_as(_MODELS[name], content, key)
    except IntegrityError as error:
        return [Damage("damaged-document", error.message)]
    found = []
    for item, placeholder in IDS.get(name, {}).items():
        here = place.names[placeholder]
        if content.get(item) != here:
            detail = f"Its {item} is {content.get(item)!a:.200}, but this is the place of {here!a}."
            found.append(Damage("misplaced", detail))
    for item in TIMES.get(name, ()):
        if not is_timestamp(content.get(item)):
            detail = f"Its {item} is {content.get(item)!a:.80}, which is no timestamp."
            found.append(Damage("bad-timestamp", detail))
    return found


def with_timestamps(place: Place, content: Mapping[str, Any], moment: str) -> dict[str, Any]:
    """Return a document's content with another of its timestamps, or `moment`, where one is no timestamp."""
    names = TIMES.get(place.entry.name, ())
    good = [content[name] for name in names if is_timestamp(content.get(name))]
    return {**content} | {name: [*good, moment][0] for name in names if not is_timestamp(content.get(name))}


# --- logs --------------------------------------------------------------------------------------------


class LogJudge:
    """Says of each line of one log, given in order, what is wrong with it."""

    def __init__(self) -> None:
        self.records = 0
        """Lines that are messages."""
        self.timestamp = ""
        """The last good one."""
        self._ids: set[str] = set()

    def __call__(self, offset: int, size: int, line: bytes | None) -> Damage | None:
        """Judge a line at `offset`; `line` is None if it is too long to be a message."""
        place = f"The line at byte {offset} ({size} bytes)"
        if line is None:
            return Damage("oversized-line", f"{place} is longer than any message.")
        if not line.strip():
            return None
        if b"\0" in line:
            return Damage("nul-bytes", f"{place} has NUL bytes in it.")
        try:
            message = codec.decode_message(line)
        except IntegrityError as error:
            return Damage("bad-line", f"{place} is no message: {error.message.partition(': ')[2]}")
        self.records += 1
        if message.id in self._ids:
            return Damage("duplicate-id", f"{place} has the id {message.id!a:.100}, as an earlier one has.")
        self._ids.add(message.id)
        if not is_timestamp(message.timestamp):
            detail = f"{place} has the timestamp {message.timestamp!a:.80}, which is none."
            return Damage("bad-timestamp", detail)
        self.timestamp = message.timestamp
        return None


async def lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[tuple[int, int, bytes | None]]:
    """Yield offset, size and bytes of each complete line; None for the bytes of one too long to be a message."""
    offset = size = 0
    pending = bytearray()
    async for chunk in chunks:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            size += len(end)
            yield offset, size, None if size > codec.MAX_LINE_BYTES else bytes(pending) + end
            offset += size + 1
            size = 0
            pending.clear()
        size += len(rest)
        if size > codec.MAX_LINE_BYTES:
            pending.clear()
        else:
            pending += rest


# --- uploaded files ----------------------------------------------------------------------------------


@dataclass
class _Metadata:
    """The shape of the document metadata."""

    documents: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Found:
    """Damage at a key, which concerns the entry `filename` of the metadata, or no single one."""

    key: str
    damage: Damage
    filename: str


class DocumentFiles:
    """A session's uploaded files, their analyses, and what the document metadata says of them."""

    def __init__(self, backend: StorageBackend, layout: Layout, names: Mapping[str, str], prefix: str) -> None:
        """Remember the session by its ids, and the folder of the trash entry that it is in, with a slash, or ""."""
        self._backend = backend
        self._layout = layout
        self._prefix = prefix
        self._names = names
        self.key = prefix + layout.key("documents", **names)
        """Of the metadata."""
        self.found: list[_Found] = []
        self.entries: dict[str, Any] = {}
        self._data: bytes | None = None
        self._content: dict[str, Any] | None = None
        self._blobs: dict[str, str] = {}  # key by name on disk
        self._analyses: dict[str, str] = {}

    async def examine(self) -> None:
        """Read the metadata and look at everything that it names, and at what it does not name."""
        folder = self._layout.folder("documents", **self._names)
        for key in await self._backend.list_keys(f"{self._prefix}{folder}/"):
            place = self._layout.parse(key[len(self._prefix) :])
            if place is not None and place.entry.name in ("document", "analysis"):
                kept = self._blobs if place.entry.name == "document" else self._analyses
                kept[place.names["document"]] = key
        self._data = await self._backend.read(self.key)
        if self._data is not None:
            try:
                content = codec.decode_object(self._data, self.key)
                self.entries = codec.decode_as(_Metadata, content, self.key).documents
                self._content = content
            except IntegrityError as error:
                self._add("damaged-document", self.key, error.message)
        for filename, entry in self.entries.items():
            await self._examine_entry(filename, entry)
        # Metadata that cannot be read says of no file that it is an orphan.
        named = set(self._blobs) if self._is_unreadable else {segment_in(entry) for entry in self.entries.values()}
        for segment, key in self._blobs.items():
            if segment not in named:
                self._add("orphan-file", key, "No document metadata names this file.")
        for segment, key in self._analyses.items():
            if segment not in named:
                self._add("orphan-analysis", key, "There is no such document.")

    async def _examine_entry(self, filename: str, entry: Any) -> None:
        name = f"{filename!a:.200}"
        try:
            document = codec.decode_as(DocumentEntry, entry, self.key)
        except IntegrityError as error:
            self._add("damaged-document", self.key, f"Its entry {name} does not fit. {error.message}", filename)
            return
        # Only the name on disk counts of a path: the session's folder may have been copied.
        segment = segment_in(entry)
        place = self._layout.parse(self._layout.folder("documents", **self._names) + f"/{segment}")
        if place is None or place.entry.name != "document":
            detail = f"Its entry {name} has the path {document.path!a:.300}, which is that of no file."
            self._add("damaged-document", self.key, detail, filename)
            return
        if document.compression not in ("", GZIP):
            detail = f"Its entry {name} has the unknown compression {document.compression!a:.40}."
            self._add("damaged-document", self.key, detail, filename)
            return
        if document.filename != filename:
            self._add("misplaced", self.key, f"Its entry {name} says it is {document.filename!a:.300}.")
        if not is_timestamp(document.uploaded_at):
            detail = f"The uploaded_at of {name} is {document.uploaded_at!a:.80}, which is no timestamp."
            self._add("bad-timestamp", self.key, detail, filename)
        key = self._prefix + self._layout.key("document", **self._names, document=segment)
        if segment not in self._blobs:
            self._add("missing-file", key, f"The file of {name} is absent.", filename)
            return
        damage = await self._compare(key, document)
        if damage is not None:
            self._add(damage.kind, key, damage.detail, filename)

    async def _compare(self, key: str, document: DocumentEntry) -> Damage | None:
        """Compare a file with what is known of it; one that is gone has no damage."""
        digest = hashlib.sha256()
        chunks = self._backend.read_blob(key)
        try:
            content = outgoing(chunks, key, size=document.size, sha256=None, compression=document.compression)
            async for block in content:
                digest.update(block)
        except NotFoundError:
            return None
        except IntegrityError as error:
            return Damage("wrong-hash" if document.compression else "wrong-size", error.message)
        if digest.hexdigest() != document.sha256:
            return Damage("wrong-hash", "It has other bytes than were saved.")
        return None

    @property
    def _is_unreadable(self) -> bool:
        """Whether there is metadata that does not decode."""
        return self._data is not None and self._content is None

    def confirm(self, earlier: DocumentFiles) -> None:
        """Forget what an earlier look at the same session did not find."""
        self.found = [found for found in self.found if found in earlier.found]

    async def repair(self, quarantine: Quarantine) -> list[Change]:
        """Return one commit that sets aside what does not fit, entries and files, and leaves the rest as it is.

        Metadata that does not decode is made anew from the files, which all stay in their places.
        """
        reasons = {found.key: found.damage.kind for found in self.found if found.damage.kind != "misplaced"}
        if not reasons:
            return []
        changed = {found.filename for found in self.found if found.damage.kind == "bad-timestamp"}
        dropped = {found.filename for found in self.found if found.damage.kind not in ("misplaced", "bad-timestamp")}
        entries = {name: entry for name, entry in self.entries.items() if name not in dropped}
        entries |= {name: entry | {"uploaded_at": now()} for name, entry in entries.items() if name in changed}
        if self._is_unreadable:
            entries = await self._entries_of_files()
        changes: list[Change] = []
        # The condition of the first change holds for all of this: nobody has written the metadata meanwhile.
        if self._data is None:
            changes.append(Absent(self.key))
        else:
            new = codec.encode_document({**(self._content or {}), "documents": entries})
            if self._is_unreadable or entries != self.entries:
                reason = reasons.get(self.key, next(iter(reasons.values())))
                changes += quarantine.copy(self.key, self._data, reason)
            changes.append(Put(self.key, new, version_of(self._data)))
        gone = {segment_in(self.entries[name]): name for name in dropped if name in self.entries}
        for entry in entries.values():
            gone.pop(segment_in(entry), None)
        for segment, key in self._blobs.items():
            if segment in gone or key in reasons:
                changes += quarantine.move(key, reasons.get(key, "damaged-document"), gone.get(segment, ""))
        for segment, key in self._analyses.items():
            if segment in gone or key in reasons:
                changes += quarantine.move(key, "orphan-analysis", gone.get(segment, ""))
        return changes

    async def _entries_of_files(self) -> dict[str, Any]:
        """Return entries that fit the files as they are, under the names that their names on disk come from."""
        entries: dict[str, Any] = {}
        for segment, key in sorted(self._blobs.items()):
            filename, compression = self._layout.document_filename(segment), ""
            if segment.endswith(GZIP_SUFFIX) and GZIP_SUFFIX not in self._backend.config.allowed_document_extensions:
                filename, compression = self._layout.document_filename(segment.removesuffix(GZIP_SUFFIX)), GZIP
            try:
                try:
                    size, sha256 = await self._measure(key, compression)
                except IntegrityError:  # it was not we who compressed it
                    filename, compression = segment, ""
                    size, sha256 = await self._measure(key, "")
            except NotFoundError:
                continue
            if filename in entries:  # an older file of this name, which nobody removed
                filename = segment
            entry = DocumentEntry(
                filename=filename,
                path=self._layout.key("document", **self._names, document=segment),
                mime_type=await asyncio.to_thread(mime_type_of, filename),
                size=size,
                uploaded_at=now(),
                metadata={},
                sha256=sha256,
                compression=compression,
            )
            entries[filename] = entry.stored()
        return entries

    async def _measure(self, key: str, compression: str) -> tuple[int, str]:
        """Return the size and the hash of a file's content."""
        digest, size = hashlib.sha256(), 0
        content = outgoing(self._backend.read_blob(key), key, size=None, sha256=None, compression=compression)
        async for block in content:
            digest.update(block)
            size += len(block)
        return size, digest.hexdigest()

    def _add(self, kind: str, key: str, detail: str, filename: str = "") -> None:
        self.found.append(_Found(key, Damage(kind, detail), filename))
