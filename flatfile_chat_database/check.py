"""Find what does not fit in a store, and repair it without losing a byte.

`check` first has the backend look at its medium, then follows the map: every document against its model and its place,
every line of every log, every uploaded file against what is known of it. It takes no lock, so it may run on a store at
work; whatever looks wrong is looked at a second time before it is reported, for a writer may just have been there.

Bytes that are not understood are never removed: a repair copies them to the quarantine in the commit that takes them
out of their place, and that commit fails if the place has changed since it was looked at. Memory grows with the keys of
one user and with the ids of one log, not with the store. Only the repair of a log holds that log as a whole.

`docs/check.md` says of each kind of problem what causes it and what the repair does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from . import codec
from .backends.base import StorageBackend
from .backends.changes import ABSENT, Delete, Put
from .backends.rules import version_of
from .errors import ConflictError, IntegrityError, NotFoundError, UnavailableError
from .layout import Layout, Place, Shape
from .models import Problem, format_timestamp, new_id, now, parse_timestamp, utc_now
from .records import trash
from .records.damage import Damage, DocumentFiles, LogJudge, document_damage, is_timestamp, lines, with_timestamps
from .records.quarantine import Quarantine
from .records.store import FORMAT_VERSION, Store

T = TypeVar("T")

KINDS: Final = {
    # What the flat-file backend finds on its medium.
    "torn-tail": "half a line at the end of a log",
    "unfinished-batch": "something in the journal that a process which died had not done to the files",
    "damaged-journal": "a journal that cannot be done again, so that the store cannot be used",
    "temporary-file": "a file that an unfinished write left behind",
    "wrong-kind": "a folder where a file should be, a file where a folder should be, or neither",
    "wrong-name": "a file whose name cannot be a key",
    "symbolic-link": "a symbolic link, which is not followed",
    "loose-permissions": "a file or folder that other users may open",
    "unreadable": "something that the system does not let us read",
    # What a database finds.
    "damaged-database": "a database that is damaged, or rows in it that contradict each other",
    "leftover": "an upload that came to nothing",
    # What an object store finds.
    "damaged-object": "an object that a log or a file is made of is missing, or not as it was written",
    "unfinished-commit": "a change of several keys that a process which died, or is at it, has not done wholly",
    # What the map and the models tell.
    "bad-line": "a line of a log that is no message",
    "nul-bytes": "a line of a log with NUL bytes in it",
    "oversized-line": "a line of a log that is longer than any message",
    "duplicate-id": "a message with the id of an earlier one in its log",
    "bad-timestamp": "a timestamp that is none",
    "damaged-document": "a document that is no JSON object, lacks a field, or has one of the wrong type",
    "misplaced": "a document that says it belongs somewhere else",
    "missing-session": "things of a session that has no metadata",
    "missing-user": "things of a user who has no profile",
    "missing-panel": "things of a panel that has no metadata",
    "missing-file": "an entry of the document metadata whose file is absent",
    "wrong-size": "an uploaded file with another size than was saved",
    "wrong-hash": "an uploaded file with other bytes than were saved",
    "orphan-file": "an uploaded file that no document metadata names",
    "orphan-analysis": "an analysis of a document that there is not",
    "unknown-key": "something that the map has no place for",
    "foreign-trash": "something in the trash that is no entry of it",
    "quarantined": "bytes that a repair set aside, waiting for a person",
    "damaged-store-file": "the store's own file is damaged",
    "newer-format": "the store was written by a newer version of this package",
}
"""Every kind of problem. Programs rely on these words: do not change."""

HARMLESS: Final = frozenset(
    [
        "unfinished-batch",
        "temporary-file",
        "leftover",
        "unfinished-commit",
        "loose-permissions",
        "orphan-file",
        "orphan-analysis",
        "unknown-key",
        "foreign-trash",
        "quarantined",
    ]
)
"""Kinds that affect no answer; a store with no others is clean."""

_COUNTED: Final = {
    "user": "users",
    "session": "sessions",
    "messages": "messages",
    "documents": "documents",
    "analysis": "analyses",
    "context": "contexts",
    "context_snapshot": "snapshots",
    "panel": "panels",
    "panel_messages": "panel messages",
    "panel_persona": "panel personas",
    "insight": "insights",
    "persona": "personas",
    "global_persona": "personas",
}
_OTHER_NAMES: Final = frozenset(["unknown-key", "wrong-kind", "missing-session", "missing-user", "missing-panel"])
"""Kinds that a configuration with other names than the store's would bring about."""

# A file is in place a moment before the metadata that names it is; a second look has to come after that moment.
_SECOND_LOOK_SECONDS = 0.2
_ATTEMPTS = 5


@dataclass(slots=True)
class Report:
    """What `check` found."""

    problems: list[Problem] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys([*_COUNTED.values(), "trash"], 0))
    """How many users, sessions, messages … were seen; what is in the trash counts as trash only."""

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong that affects an answer and was not repaired."""
        return all(problem.harmless or problem.fixed for problem in self.problems)

    def __iter__(self) -> Iterator[Problem]:
        return iter(self.problems)

    def __str__(self) -> str:
        counts = [f"{count:,} {name}" for name, count in self.counts.items() if count]
        text = [f"Looked at {', '.join(counts) or 'an empty store'}."]
        for problem in self.problems:
            state = "fixed" if problem.fixed else "harmless" if problem.harmless else "DAMAGE"
            text.append(f"{state:8}  {problem.kind:18}  {problem.key}: {problem.detail}")
        damage = sum(not problem.harmless and not problem.fixed for problem in self.problems)
        text.append(f"Problems that need attention: {damage:,}." if damage else "The store is clean.")
        return "\n".join(text)


async def check(backend: StorageBackend, *, fix: bool = False) -> Report:
    """Look at everything in a store and report what does not fit; repair it with `fix`.

    A repair that was interrupted can be repeated, and what was repaired is not reported again.

    Args:
        backend: Where the store is; opened if it is not.
        fix: Repair what can be repaired without guessing.

    Raises:
        ConfigurationError: The store was made with other names than the backend's configuration has.
        UnavailableError: A repair could not be written.
    """
    await backend.open()
    run = _Check(backend, fix=fix)
    if await run.can_be_used() and await run.store_file():
        await run.everything()
    return run.report


@dataclass(slots=True)
class _Owner:
    """A session, a panel, a user, or none of them, with the keys that belong directly to it."""

    prefix: str
    """The folder of a trash entry with a slash, or "" outside the trash."""
    names: dict[str, str]
    """The ids that name it."""
    places: dict[str, Place] = field(default_factory=dict)


class _Check:
    """One run over one store."""

    def __init__(self, backend: StorageBackend, *, fix: bool) -> None:
        self.report = Report()
        self._backend = backend
        self._layout = Layout(backend.config)
        self._quarantine = Quarantine(backend.config)
        self._fix = fix
        self._reported: set[str] = set()  # keys that cannot be what they should be, so that nobody reads them

    # --- the store as a whole ------------------------------------------------------------------------

    async def can_be_used(self) -> bool:
        """Look at what hinders the store from being used; return whether nothing does any more."""
        found = await self._backend.obstacles(fix=self._fix)
        self.report.problems += found
        return all(problem.fixed for problem in found)

    async def store_file(self) -> bool:
        """Look at the store's own file; return whether the rest can be understood."""
        key = self._layout.key("store")
        try:
            data = await self._backend.read(key)
        except (IntegrityError, UnavailableError) as error:
            self._fix = False  # in a store of unknown format nothing may be changed
            self._report("unreadable", key, error.message)
            return True
        damage = None if data is None else _store_file_damage(data)
        if data is None or damage is None:
            await self._store().reading()  # raises if the names differ
            return True
        if damage.kind == "newer-format":
            self._report(damage.kind, key, damage.detail)
            return False
        await self._replace_store_file(key, data, damage)
        return True

    async def _replace_store_file(self, key: str, data: bytes, damage: Damage) -> None:
        """Make the store's own file anew, if all the rest shows that the configured names are the store's."""
        if not self._fix:
            self._report(damage.kind, key, damage.detail)
            return
        look = _Check(self._backend, fix=False)
        await look.everything()
        strange = next((problem.key for problem in look.report if problem.kind in _OTHER_NAMES), None)
        if strange is not None:
            self._fix = False
            why = f"Nothing is repaired, for {strange} does not fit the configured names."
            self._report(damage.kind, key, f"{damage.detail} {why}")
            return
        self._report(damage.kind, key, damage.detail)
        if await self._set_aside(key, data, damage.kind):
            await self._store().writing()
            self._mark_fixed(damage.kind, key)

    def _store(self) -> Store:
        return Store(self._backend.config, self._backend, read_only=False, clock=utc_now, new_id=new_id)

    async def everything(self) -> None:
        """Look at all keys, those of one user, panel or trash entry at a time."""
        waiting = await self._keys_below(self._layout.quarantine)
        for problem in await self._guarded("", self._backend.verify(fix=self._fix)) or []:
            self.report.problems.append(problem)
            if not problem.fixed and not problem.harmless:
                self._reported.add(problem.key)
        await self._waiting(waiting)
        async for prefix, keys in self._groups():
            await self._group(prefix, keys)

    async def _groups(self) -> AsyncIterator[tuple[str, list[str]]]:
        layout = self._layout
        for top in await self._children(""):
            if top not in (layout.users, layout.panels, layout.system) or await self._backend.exists(top):
                yield "", await self._keys_at(top)
                continue
            for child in await self._children(top):
                folder = f"{top}/{child}"
                if folder == layout.trash and not await self._backend.exists(folder):
                    for entry in await self._children(folder):
                        keys = await self._keys_at(layout.trash_folder(entry))
                        if self._is_trash(entry, keys):
                            yield f"{layout.trash_folder(entry)}/", keys
                elif folder != layout.quarantine or await self._backend.exists(folder):
                    yield "", await self._keys_at(folder)

    async def _children(self, folder: str) -> list[str]:
        return await self._guarded(folder, self._backend.list_children(folder)) or []

    async def _keys_below(self, folder: str) -> list[str]:
        return await self._guarded(folder, self._backend.list_keys(f"{folder}/")) or []

    async def _keys_at(self, folder: str) -> list[str]:
        return [folder] if await self._backend.exists(folder) else await self._keys_below(folder)

    async def _group(self, prefix: str, keys: Sequence[str]) -> None:
        """Look at keys that belong together, owner by owner; sessions before their user."""
        owners: dict[tuple[str, ...], _Owner] = {}
        for key in keys:
            place = self._layout.parse(key[len(prefix) :])
            if place is None or (prefix and place.entry.name in ("store", "quarantine")):
                await self._unknown(prefix, key)
                continue
            names = {name: place.names[name] for name in ("user_id", "session_id", "panel_id") if name in place.names}
            owners.setdefault(tuple(names.values()), _Owner(prefix, names)).places[key] = place
        for ids in sorted(owners, key=len, reverse=True):
            await self._owner(owners[ids])
        if not prefix:
            for user_id in sorted({owner.names["user_id"] for owner in owners.values() if "user_id" in owner.names}):
                await self._missing("user", user_id=user_id)

    async def _owner(self, owner: _Owner) -> None:
        for key, place in owner.places.items():
            if place.entry.shape is Shape.LOG:
                await self._log(key, place)
            elif place.entry.shape is Shape.DOCUMENT and place.entry.name not in ("store", "documents"):
                await self._document(key, place)
        if any(place.entry.name in ("documents", "document", "analysis") for place in owner.places.values()):
            await self._files(owner)
        if not owner.prefix and "session_id" in owner.names:
            await self._missing("session", **owner.names)
        elif not owner.prefix and "panel_id" in owner.names:
            await self._missing("panel", **owner.names)

    # --- what the map does not know ------------------------------------------------------------------

    async def _unknown(self, prefix: str, key: str) -> None:
        if not prefix and self._layout.is_of_front(key):
            return  # one of two stores that are mirrored, looked at by itself
        parts = key[len(prefix) :].split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            if self._layout.parse(folder) is not None:
                await self._folder_for_file(prefix + folder)
                return
        if self._layout.is_folder(key[len(prefix) :]):
            await self._file_for_folder(key)
        elif key not in self._reported:
            self._report("unknown-key", key, "The map has no such place; it is left alone.")

    async def _file_for_folder(self, key: str) -> None:
        if key not in self._reported:
            self._report("wrong-kind", key, "A file stands where a folder should be.")
            self._reported.add(key)
        if self._fix:
            await self._backend.set_aside(key, "wrong-kind")
            self._mark_fixed("wrong-kind", key)

    async def _folder_for_file(self, folder: str) -> None:
        if folder not in self._reported:
            self._report("wrong-kind", folder, "A folder stands where a file should be.")
            self._reported.add(folder)
        if self._fix:
            for key in await self._backend.list_keys(f"{folder}/"):
                await self._backend.set_aside(key, "wrong-kind")
            # The folder goes with the last file in it, unless something else is there or the configuration keeps it.
            parent, _, name = folder.rpartition("/")
            if name not in await self._backend.list_children(parent):
                self._mark_fixed("wrong-kind", folder)

    def _is_trash(self, entry: str, keys: Sequence[str]) -> bool:
        parsed = self._layout.parse_trash_id(entry)
        folder = self._layout.trash_folder(entry)
        if parsed is not None and parsed[1] in trash.KINDS and folder not in keys:
            self.report.counts["trash"] += bool(keys)
            return True
        if keys:
            self._report("foreign-trash", folder, "The trash has no entry of such a name; it is left alone.")
        return False

    async def _waiting(self, keys: Sequence[str]) -> None:
        """Note what is in the quarantine, each item once."""
        present = set(keys)
        for key in keys:
            stem, _, ending = key.rpartition(".")
            if ending == "json" and f"{stem}.bin" in present:
                continue
            detail = "Set aside; look at it, then remove it."
            note = await self._read(f"{stem}.json") if f"{stem}.json" in present else None
            if note is not None:
                try:
                    content = codec.decode_object(note)
                    detail = f"Set aside from {content.get('key')!a:.300}: {content.get('reason')!a:.100}."
                except IntegrityError:
                    detail = "Set aside, with a note that cannot be read."
            self._report("quarantined", key, detail)

    # --- logs ----------------------------------------------------------------------------------------

    async def _log(self, key: str, place: Place) -> None:
        found = await self._look(key, self._examine_log)
        if found is None:
            return
        self._count(key, place, found[1])
        self._report_all(key, found[0])
        if found[0] and self._fix and await self._repair_log(key):
            for damage in found[0]:
                self._mark_fixed(damage.kind, key)

    async def _examine_log(self, key: str) -> tuple[list[Damage], int]:
        judge = LogJudge()
        found = []
        try:
            async for offset, size, line in lines(self._backend.read_blob(key)):
                damage = judge(offset, size, line)
                if damage is not None:
                    found.append(damage)
        except NotFoundError:  # deleted since it was listed
            return [], 0
        return found, judge.records

    async def _repair_log(self, key: str) -> bool:
        """Take out lines that are no messages or repeat an id; give a timestamp to those that have none."""
        for _ in range(_ATTEMPTS):
            data = await self._backend.read(key)
            if data is None:
                return True
            judge = LogJudge()
            kept: list[bytes] = []
            aside: list[bytes] = []
            notes: list[dict[str, Any]] = []
            *whole, tail = data.split(b"\n")
            offset = 0
            for line in whole:
                damage = judge(offset, len(line), line if len(line) <= codec.MAX_LINE_BYTES else None)
                if damage is None:
                    kept.append(line + b"\n")
                else:
                    aside.append(line + b"\n")
                    notes.append({"kind": damage.kind, "offset": offset, "size": len(line)})
                    if damage.kind == "bad-timestamp":
                        message = codec.decode_object(line, key) | {"timestamp": judge.timestamp or now()}
                        kept.append(codec.encode_line(message))
                offset += len(line) + 1
            if not aside:
                return True
            keep = self._quarantine.copy(key, b"".join(aside), notes[0]["kind"], lines=notes)
            try:
                await self._backend.commit([*keep, Put(key, b"".join([*kept, tail]), version_of(data))])
            except ConflictError:
                continue
            return True
        return False

    # --- documents -----------------------------------------------------------------------------------

    async def _document(self, key: str, place: Place) -> None:
        async def examine(key: str) -> tuple[list[Damage], int]:
            data = await self._backend.read(key)
            return ([], 0) if data is None else (document_damage(place, key, data), 1)

        found = await self._look(key, examine)
        if found is None:
            return
        self._count(key, place, found[1])
        self._report_all(key, found[0])
        kinds = {damage.kind for damage in found[0]} & {"damaged-document", "bad-timestamp"}
        data = await self._read(key) if kinds and self._fix else None
        if data is None:
            return
        replacement = None
        if "damaged-document" not in kinds:
            content = with_timestamps(place, codec.decode_object(data, key), now())
            replacement = codec.encode_document(content)
        if await self._set_aside(key, data, min(kinds), replacement):
            for kind in kinds:
                self._mark_fixed(kind, key)

    # --- uploaded files ------------------------------------------------------------------------------

    async def _files(self, owner: _Owner) -> None:
        """Compare a session's document metadata, uploaded files and analyses with each other."""
        look = DocumentFiles(self._backend, self._layout, owner.names, owner.prefix)
        await self._guarded(look.key, look.examine())
        if look.found:
            await asyncio.sleep(_SECOND_LOOK_SECONDS)
            again = DocumentFiles(self._backend, self._layout, owner.names, owner.prefix)
            await self._guarded(look.key, again.examine())
            again.confirm(look)
            look = again
        if not owner.prefix:
            self.report.counts["documents"] += len(look.entries)
        for found in look.found:
            self._report(found.damage.kind, found.key, found.damage.detail)
        changes = await look.repair(self._quarantine) if self._fix else []
        if changes:
            try:
                await self._backend.commit(changes)
            except ConflictError:  # somebody is at work there; the next check sees what is left
                return
            for found in look.found:
                if found.damage.kind != "misplaced":
                    self._mark_fixed(found.damage.kind, found.key)

    # --- what everything else belongs to -------------------------------------------------------------

    async def _missing(self, entry: str, **names: str) -> None:
        """Report an owner whose own document is absent although it owns something; make one anew."""
        key = self._layout.key(entry, **names)
        if key in self._reported or await self._backend.exists(key):
            return
        below = await self._keys_below(self._layout.folder(entry, **names))
        # Whoever was being created has a document by now; who was being deleted has nothing else either.
        if not any(self._layout.parse(other) for other in below) or await self._backend.exists(key):
            return
        self._report(f"missing-{entry}", key, f"There are things of this {entry}, but not the {entry} itself.")
        if not self._fix:
            return
        content = await self._new_owner(entry, names)
        try:
            await self._backend.commit([Put(key, codec.encode_document(content), ABSENT)])
        except ConflictError:
            return
        self._mark_fixed(f"missing-{entry}", key)

    async def _new_owner(self, entry: str, names: Mapping[str, str]) -> dict[str, Any]:
        moment = now()
        if entry == "user":
            return {**names, "created_at": moment, "updated_at": moment, "profile": {}}
        log = self._layout.key("messages" if entry == "session" else "panel_messages", **names)
        for line in await self._backend.read_log(log, 0, 1):
            timestamp = codec.decode_message(line).timestamp
            moment = format_timestamp(parse_timestamp(timestamp)) if is_timestamp(timestamp) else moment
        if entry == "session":
            times = {"created_at": moment, "updated_at": moment}
            return {"id": names["session_id"], "user_id": names["user_id"], "title": "", **times, "metadata": {}}
        children = await self._backend.list_children(self._layout.parent("panel_persona", **names))
        personas = [self._layout.parse_child("panel_persona", child) for child in children]
        return {
            "id": names["panel_id"],
            "type": "unknown",
            "personas": [persona for persona in personas if persona is not None],
            "created_at": moment,
            "config": {},
        }

    # --- looking and reporting -----------------------------------------------------------------------

    async def _look(
        self, key: str, examine: Callable[[str], Awaitable[tuple[list[Damage], int]]]
    ) -> tuple[list[Damage], int] | None:
        """Examine a key, and again if there is damage; return what both looks saw, and how many records there are."""
        first = await self._guarded(key, examine(key))
        if first is None or not first[0]:
            return first
        again = await self._guarded(key, examine(key))
        return again and ([damage for damage in again[0] if damage in first[0]], again[1])

    async def _read(self, key: str) -> bytes | None:
        return await self._guarded(key, self._backend.read(key))

    async def _guarded(self, key: str, reading: Awaitable[T]) -> T | None:
        """Return what is read; report what cannot be, once."""
        try:
            return await reading
        except (IntegrityError, UnavailableError) as error:
            key = (error.key or key).rstrip("/")
            if key not in self._reported:
                self._report("unreadable", key, error.message)
                self._reported.add(key)
            return None

    def _count(self, key: str, place: Place, records: int) -> None:
        if not key.startswith(f"{self._layout.trash}/"):
            self.report.counts[_COUNTED[place.entry.name]] += records

    def _report(self, kind: str, key: str, detail: str) -> None:
        self.report.problems.append(Problem(kind, key, detail, harmless=kind in HARMLESS))

    def _report_all(self, key: str, found: Sequence[Damage]) -> None:
        for damage in found:
            self._report(damage.kind, key, damage.detail)

    def _mark_fixed(self, kind: str, key: str) -> None:
        self.report.problems = [
            replace(problem, fixed=True) if (problem.kind, problem.key) == (kind, key) else problem
            for problem in self.report.problems
        ]

    async def _set_aside(self, key: str, data: bytes, reason: str, replacement: bytes | None = None) -> bool:
        """Put a document into the quarantine, and `replacement` in its place; return False if it has changed."""
        changes = [*self._quarantine.copy(key, data, reason), Put(key, replacement or data, version_of(data))]
        if replacement is None:
            changes.append(Delete(key))  # the Put before it is there for its condition
        try:
            await self._backend.commit(changes)
        except ConflictError:
            return False
        return True


def _store_file_damage(data: bytes) -> Damage | None:
    try:
        content = codec.decode_object(data)
    except IntegrityError as error:
        return Damage("damaged-store-file", error.message)
    version = content.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or not isinstance(content.get("names"), dict):
        return Damage("damaged-store-file", "It does not describe a chat store.")
    if version > FORMAT_VERSION:
        return Damage("newer-format", f"The store has format {version}; this version reads up to {FORMAT_VERSION}.")
    return None
