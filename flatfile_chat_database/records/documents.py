"""Documents: uploaded files, what is known of them, and their analyses.

The bytes of a file are a blob under a name on disk of their own. Which blob belongs to which file is in the session's
document metadata, and only what that names exists: a blob is written whole before the metadata names it, and removed
in the commit that names another. An analysis is stored under the name of the blob, so a file that is replaced has none.
"""

from __future__ import annotations

import asyncio
import builtins
import io
import itertools
import os
import unicodedata
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, suppress
from pathlib import PurePosixPath
from typing import Any

from .. import codec
from ..backends.base import StorageBackend
from ..backends.changes import ABSENT, Change, Delete, Move, Put, Require
from ..backends.rules import not_found, version_of
from ..errors import (
    ConflictError,
    DurabilityError,
    IntegrityError,
    NotFoundError,
    StorageError,
    UnavailableError,
    ValidationError,
)
from ..models import Document
from .content import GZIP, Incoming, close, outgoing
from .metadata import GZIP_SUFFIX, DocumentEntry, DocumentPlace, mime_type_of
from .store import Store, called, damaged, logger

_MAX_FILENAME = 255
_TRIES = 50  # of a reader whom replacements overtake


class Documents:
    """Reads and changes the files of sessions."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._config = store.config
        self._layout = store.layout

    # --- saving --------------------------------------------------------------------------------------

    async def save(
        self, user_id: str, session_id: str, filename: str, content: object, metadata: dict[str, Any] | None
    ) -> str:
        """Save a file, replacing the one of this name with its analysis; return its path relative to the store."""
        self._check_filename(filename)
        place = DocumentPlace(self._layout, user_id, session_id)
        session = self._store.require("session", **place.names)
        own = {} if metadata is None else codec.own_object(metadata, "metadata")
        async with Incoming(
            content,
            maximum=self._config.max_document_size_bytes,
            threshold=self._config.document_compression_threshold_bytes,
        ) as incoming:
            backend = await self._store.writing()
            if not await backend.exists(session.key):
                raise not_found(session.what, session.key)
            taken = place.taken((await self._known(place))[0])
            mime_type = await asyncio.to_thread(mime_type_of, filename)
            await incoming.prepare()
            try:
                written = await self._write(backend, place, filename, incoming, taken)
            except UnavailableError as error:  # what was half written went away with its session's folder
                if await backend.exists(session.key):
                    raise
                raise not_found(session.what, session.key) from error
            entry = DocumentEntry(
                filename=filename,
                path=place.blob(written),
                mime_type=mime_type,
                size=incoming.size,
                uploaded_at=self._store.now(),
                metadata=own,
                sha256=incoming.sha256,
                compression=incoming.compression,
            )
            return await self._name(backend, place, session, entry)

    async def _write(
        self, backend: StorageBackend, place: DocumentPlace, filename: str, incoming: Incoming, taken: set[str]
    ) -> str:
        """Write the content under the first name on disk that is free, and return that."""
        # Whether a name is free is known for certain only when all is written. What can be read only once therefore
        # gets a name that nobody else will have chosen, readable but for a number.
        segments = self._segments(filename, incoming.compression, 0 if incoming.repeatable else _random_generation())
        while True:
            segment = next(segments)
            if segment.casefold() in taken:
                continue
            async with aclosing(incoming.blocks()) as blocks:
                if await backend.write_blob(place.blob(segment), blocks):
                    return segment

    async def _name(self, backend: StorageBackend, place: DocumentPlace, session: Require, entry: DocumentEntry) -> str:
        """Let the metadata name the blob that was written, instead of the one before; return its key."""
        blob = entry.path
        # Gone with its session, when that was deleted, even if there is a new one of the same id.
        uploaded = Require(blob, f"{session.what}, as it was when the upload of {entry.filename!r} began,")
        outcome_unknown = False

        async def attempt() -> str:
            nonlocal outcome_unknown
            known, version = await self._known(place)
            old = place.segment_of(known.get(entry.filename))
            changes: builtins.list[Change] = [session, uploaded]
            segment = entry.segment
            if segment.casefold() in place.taken(known):  # by a name that differs only in case, committed meanwhile
                candidates = self._segments(entry.filename, entry.compression)
                segment = await self._free_segment(backend, place, known, candidates)
                changes.append(Move(blob, place.blob(segment)))
            named = entry.stored() | {"path": place.blob(segment)}
            changes += [Delete(place.analysis(segment)), self._put(place, known | {entry.filename: named}, version)]
            if old is not None:
                changes += [Delete(place.blob(old)), Delete(place.analysis(old))]
            outcome_unknown = True
            try:
                await backend.commit(changes)
            except DurabilityError:
                raise
            except StorageError:
                outcome_unknown = False
                raise
            return place.blob(segment)

        try:
            return await self._store.retry(place.folder, attempt)
        except BaseException:
            # A blob that may be named must stay. One that stays without a name is harmless, and `check` finds it.
            if not outcome_unknown:
                with suppress(StorageError):
                    await backend.delete(blob)
            raise

    def _segments(self, filename: str, compression: object, start: int = 0) -> Iterator[str]:
        """Yield the names on disk that a file can have, without end, the most readable one first."""
        suffix = GZIP_SUFFIX if compression == GZIP else ""
        for generation in itertools.count(start):
            segment = self._layout.document_segment(filename, generation) + suffix
            if self._layout.is_free_document_segment(segment):
                yield segment

    async def _free_segment(
        self, backend: StorageBackend, place: DocumentPlace, known: dict[str, Any], candidates: Iterator[str]
    ) -> str:
        """Return the first of the names on disk that nothing has at the moment."""
        taken = place.taken(known)
        while True:
            segment = next(candidates)
            places = (place.blob(segment), place.analysis(segment))
            if segment.casefold() not in taken and not any([await _is_taken(backend, key) for key in places]):
                return segment

    def _check_filename(self, filename: object) -> None:
        text = codec.check_text(filename, "filename")
        shown = ascii(text[:_MAX_FILENAME])
        if not text:
            raise ValidationError("filename must not be empty.")
        if len(text) > _MAX_FILENAME:
            raise ValidationError(f"filename has {len(text)} characters; {_MAX_FILENAME} are possible.")
        if any(unicodedata.category(character) == "Cc" for character in text):
            raise ValidationError(f"filename {shown} holds control characters.", hint="Use printable text.")
        if "/" in text or "\\" in text or text in (".", ".."):
            raise ValidationError(f"filename {shown} holds a path.", hint="Give the plain name of the file.")
        allowed = self._config.allowed_document_extensions
        extension = PurePosixPath(text).suffix.lower()
        if extension not in {other.lower() for other in allowed}:
            raise ValidationError(
                f"filename {shown} has {f'the extension {extension!a}' if extension else 'no extension'}.",
                hint=f"Allowed are {', '.join(allowed)} (allowed_document_extensions).",
            )

    # --- reading -------------------------------------------------------------------------------------

    async def read(self, user_id: str, session_id: str, filename: str) -> bytes | None:
        """Return a file's content."""
        content = await self._open(DocumentPlace(self._layout, user_id, session_id), filename)
        if content is None:
            return None
        whole = io.BytesIO()  # hands out what it gathered without another copy
        async with aclosing(content) as blocks:
            async for block in blocks:
                whole.write(block)
        return whole.getvalue()

    async def stream(self, user_id: str, session_id: str, filename: str) -> AsyncIterator[bytes]:
        """Yield a file's content in blocks; one that is replaced or deleted meanwhile still comes whole."""
        place = DocumentPlace(self._layout, user_id, session_id)
        content = await self._open(place, filename)
        if content is None:
            raise _no_file(place, filename)
        async with aclosing(content) as blocks:
            async for block in blocks:
                yield block

    async def get(self, user_id: str, session_id: str, filename: str) -> Document | None:
        """Return what is known of a file."""
        codec.check_text(filename, "filename")
        found = await self._describe(DocumentPlace(self._layout, user_id, session_id), filename, strict=True)
        return found[0] if found else None

    async def list(self, user_id: str, session_id: str, *, strict: bool = False) -> builtins.list[Document]:
        """Return what is known of a session's files, by name."""
        return await self._describe(DocumentPlace(self._layout, user_id, session_id), None, strict=strict)

    async def count(self, user_id: str, session_id: str) -> int:
        """Return the number of a session's files."""
        return len((await self._known(DocumentPlace(self._layout, user_id, session_id)))[0])

    async def exists(self, user_id: str, session_id: str, filename: str) -> bool:
        """Return whether the session has such a file."""
        codec.check_text(filename, "filename")
        return filename in (await self._known(DocumentPlace(self._layout, user_id, session_id)))[0]

    async def _open(self, place: DocumentPlace, filename: str) -> AsyncGenerator[bytes, None] | None:
        """Begin to read a file that is in its place, or return None if there is none."""
        codec.check_text(filename, "filename")
        backend = await self._store.reading()
        missing = None
        for _ in range(_TRIES):
            entry = await self._entry(place, filename)
            if entry is None:
                return None
            blob = place.blob(entry.segment)
            chunks = backend.read_blob(blob)
            try:
                first = await anext(chunks, b"")
            except NotFoundError as error:
                if entry == missing:
                    raise _file_missing(entry, blob) from error
                missing = entry  # replaced or removed since the metadata was read; if not, it is the second time
                continue
            # A name on disk may be used again: only if the metadata still says the same is this the file it means.
            if await self._entry(place, filename) == entry:
                return outgoing(
                    chunks,
                    blob,
                    size=entry.size,
                    sha256=entry.sha256 if self._config.validate_json_on_read else None,
                    compression=entry.compression,
                    first=first,
                )
            await close(chunks)
        raise ConflictError(
            f"{called('file', **place.names, filename=filename)} is replaced faster than it can be read.",
            key=place.metadata,
            hint="Try again.",
        )

    async def _describe(self, place: DocumentPlace, filename: str | None, *, strict: bool) -> builtins.list[Document]:
        """Return the documents of a session, or one of them, with the analyses that belong to them."""
        backend = await self._store.reading()
        documents: builtins.list[Document] = []
        for _ in range(_TRIES):
            known, version = await self._known(place)
            names = sorted(known) if filename is None else [filename] * (filename in known)
            if not names:
                return []
            entries = [entry for name in names if (entry := self._readable(place, name, known[name], strict=strict))]
            keys = [place.analysis(entry.segment) for entry in entries]
            analyses = await self._store.load_all(keys, _as_it_is, strict=strict)
            documents = [
                Document(
                    filename=entry.filename,
                    path=place.blob(entry.segment),
                    mime_type=entry.mime_type,
                    size=entry.size,
                    uploaded_at=entry.uploaded_at,
                    analysis=analysis or {},
                    metadata=entry.metadata,
                    sha256=entry.sha256,
                )
                for entry, analysis in zip(entries, analyses, strict=True)
            ]
            again = await backend.read(place.metadata)
            if again is not None and version_of(again) == version:
                break  # otherwise a file was replaced, and the analyses may be those of another one
        return documents

    # --- analyses ------------------------------------------------------------------------------------

    async def update_analysis(self, user_id: str, session_id: str, filename: str, analysis: dict[str, Any]) -> bool:
        """Merge `analysis` into that of a file, by key."""
        codec.check_text(filename, "filename")
        updates = codec.own_object(analysis, "analysis")
        place = DocumentPlace(self._layout, user_id, session_id)
        session = self._store.require("session", **place.names)
        what = called("file", **place.names, filename=filename)
        await self._store.writing()
        missing = None
        while True:
            entry = await self._entry(place, filename)
            if entry is None:
                raise _no_file(place, filename)
            blob = Require(place.blob(entry.segment), what)
            try:
                await self._store.update(
                    place.analysis(entry.segment),
                    lambda present: present | updates,
                    what=what,
                    requires=(session, blob),
                    absent={},
                )
                return True
            except NotFoundError as error:
                if error.key != blob.key:
                    raise
                if entry == missing:
                    raise _file_missing(entry, blob.key) from error
                missing = entry  # replaced since the metadata was read; if not, it is the second time

    # --- removing, and the trash ---------------------------------------------------------------------

    async def remove(
        self, user_id: str, session_id: str, filename: str, *, out_of: str | None = None, into: str | None = None
    ) -> builtins.list[str] | None:
        """Remove a file with its analysis; return the keys that are gone, or None if there is no such file.

        Args:
            user_id: The session's owner.
            session_id: Whose file.
            filename: Its name.
            out_of: The trash entry to remove it from, instead of its place.
            into: The new trash entry that takes it, instead of nothing.
        """
        codec.check_text(filename, "filename")
        place = DocumentPlace(self._layout, user_id, session_id, out_of)
        metadata = place.metadata
        trash = None if into is None else DocumentPlace(self._layout, user_id, session_id, into)
        backend = await self._store.writing()

        async def attempt() -> builtins.list[str] | None:
            known, version = await self._known(place)
            if filename not in known:
                return None
            rest = {name: entry for name, entry in known.items() if name != filename}
            changes: builtins.list[Change] = [self._put(place, rest, version)]
            if trash is not None:
                changes.insert(0, self._put(trash, {filename: known[filename]}, None))
            elif out_of is not None and not rest:
                changes.append(Delete(metadata))
            segment = place.segment_of(known[filename])
            if segment is not None and trash is not None:
                changes += [
                    Move(place.blob(segment), trash.blob(segment)),
                    Move(place.analysis(segment), trash.analysis(segment)),
                ]
            elif segment is not None:
                changes += [Delete(place.blob(segment)), Delete(place.analysis(segment))]
            outcomes = await backend.commit(changes)
            return [
                change.source if isinstance(change, Move) else change.key
                for change, outcome in zip(changes, outcomes, strict=True)
                if isinstance(change, Move | Delete) and outcome
            ]

        return await self._store.retry(place.folder, attempt)

    async def filename_in_trash(self, trash_id: str, user_id: str, session_id: str) -> str | None:
        """Return the name of the one file of a trash entry, or None if it holds no such thing."""
        known, _ = await self._known(DocumentPlace(self._layout, user_id, session_id, trash_id))
        return next(iter(known)) if len(known) == 1 else None

    async def put_back(self, trash_id: str, user_id: str, session_id: str, filename: str) -> None:
        """Bring a file back from its trash entry.

        Raises:
            NotFoundError: The session or the trash entry does not exist.
            ConflictError: There is a file of this name again.
        """
        place = DocumentPlace(self._layout, user_id, session_id)
        trash = DocumentPlace(self._layout, user_id, session_id, trash_id)
        session = self._store.require("session", **place.names)
        entry_is_there = Require(trash.metadata, f"The trash entry {trash_id!r}")
        backend = await self._store.writing()

        async def attempt() -> bool:
            trashed = (await self._known(trash))[0].get(filename)
            if trashed is None:
                raise not_found(entry_is_there.what, entry_is_there.key)
            known, version = await self._known(place)
            if filename in known:
                return False
            changes: builtins.list[Change] = [session, entry_is_there]
            segment = trash.segment_of(trashed)
            if segment is not None:  # otherwise it is damaged, and was so before it was deleted
                candidates = itertools.chain([segment], self._segments(filename, trashed.get("compression")))
                new = await self._free_segment(backend, place, known, candidates)
                changes += [
                    Require(trash.blob(segment), f"The content of {filename!r} in the trash entry {trash_id!r}"),
                    Move(trash.blob(segment), place.blob(new)),
                    Move(trash.analysis(segment), place.analysis(new)),
                ]
                trashed = trashed | {"path": place.blob(new)}
            changes += [self._put(place, known | {filename: trashed}, version), Delete(trash.metadata)]
            await backend.commit(changes)
            return True

        if not await self._store.retry(place.folder, attempt):
            raise ConflictError(
                f"{called('file', **place.names, filename=filename)} exists again.",
                key=place.metadata,
                hint="Delete it first.",
            )

    # --- the metadata --------------------------------------------------------------------------------

    async def _known(self, place: DocumentPlace) -> tuple[dict[str, Any], str | None]:
        """Return the entries of a session's files as they are stored, and the version to change them by."""
        loaded = await self._store.load(place.metadata)
        if loaded is None:
            return {}, None
        entries = loaded[0].get("documents")
        if not isinstance(entries, dict):
            raise damaged(place.metadata, '"documents" is no object.')
        return entries, loaded[1]

    def _put(self, place: DocumentPlace, entries: dict[str, Any], version: str | None) -> Put:
        data = codec.encode_document({"documents": entries})
        return Put(place.metadata, data, ABSENT if version is None else version)

    async def _entry(self, place: DocumentPlace, filename: str) -> DocumentEntry | None:
        known, _ = await self._known(place)
        return self._readable(place, filename, known[filename], strict=True) if filename in known else None

    def _readable(self, place: DocumentPlace, filename: str, stored: object, *, strict: bool) -> DocumentEntry | None:
        """Return a file's entry; None, with a warning, if it is damaged and not `strict`."""
        try:
            if not isinstance(stored, dict):
                raise damaged(place.metadata, f"the entry of {filename!r} is no object.")
            entry = codec.decode_as(DocumentEntry, stored | {"filename": filename}, place.metadata)
            if place.segment_of(stored) is None:
                raise damaged(place.metadata, f"the path {entry.path!r:.200} is that of no file.")
            if entry.compression not in ("", GZIP):
                raise damaged(place.metadata, f"the compression {entry.compression!r:.40} is unknown.")
            self._store.check_fields(place.metadata, stored, {"filename": filename}, ("uploaded_at",))
        except IntegrityError as error:
            if strict:
                raise
            logger.warning("%s The file %r is passed over.", error.message, filename)
            return None
        return entry


async def _is_taken(backend: StorageBackend, key: str) -> bool:
    return await backend.exists(key) or bool(await backend.list_keys(f"{key}/"))


def _as_it_is(key: str, content: dict[str, Any], version: str) -> dict[str, Any]:
    return content


def _no_file(place: DocumentPlace, filename: str) -> NotFoundError:
    return not_found(called("file", **place.names, filename=filename), place.metadata)


def _file_missing(entry: DocumentEntry, blob: str) -> IntegrityError:
    return IntegrityError(
        f"The file {entry.filename!r} is known, but there is nothing at {blob}.",
        key=blob,
        hint="Save it again, or restore a backup.",
    )


def _random_generation() -> int:
    return int.from_bytes(os.urandom(4))
