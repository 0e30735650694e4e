"""Trash: deleting things so that they can come back, and removing them for good."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from ..backends.changes import Change, Delete, Move, RemoveTree, Require
from ..errors import ConflictError, IntegrityError, NotFoundError, ValidationError
from ..models import PruneReport, PurgeReceipt, TrashEntry, format_timestamp
from .documents import Documents
from .panels import Panels
from .quarantine import Quarantine
from .store import Store, called, logger

_OWNERS: Final = {"session": "user", "persona": "user", "insight": "panel"}
_TREES: Final = ("user", "session", "panel")
"""Kinds that are a folder with all that is in it."""

# How to find out what a trash entry holds: the entries of the layout on the way down, and the id at each step.
_WAYS: Final[Mapping[str, tuple[tuple[tuple[str, str], ...], ...]]] = {
    "user": ((("user", "user_id"),),),
    "session": ((("user", "user_id"), ("session", "session_id")),),
    "document": ((("user", "user_id"), ("session", "session_id")),),
    "panel": ((("panel", "panel_id"),),),
    "insight": ((("panel", "panel_id"), ("insight", "insight_id")),),
    "persona": ((("user", "user_id"), ("persona", "persona_id")), (("global_persona", "persona_id"),)),
}
KINDS: Final = frozenset(_WAYS)
"""Of trash entries. On disk, do not change."""

_PURGEABLE: Final[Mapping[frozenset[str], str]] = {
    frozenset({"trash_id"}): "trash",
    frozenset({"user_id"}): "user",
    frozenset({"user_id", "session_id"}): "session",
    frozenset({"user_id", "session_id", "filename"}): "document",
    frozenset({"panel_id"}): "panel",
    frozenset({"panel_id", "insight_id"}): "insight",
    frozenset({"persona_id"}): "persona",
    frozenset({"user_id", "persona_id"}): "persona",
}


@dataclass(frozen=True, slots=True)
class _Thing:
    """Something that can be deleted as one."""

    key: str
    """The document without which it does not exist."""
    place: str
    """All of it: a folder, or the same as `key`."""
    what: str
    owner: Require | None
    """Without which it cannot be put back."""

    @property
    def is_tree(self) -> bool:
        return self.place != self.key


class Trash:
    """Deletes, brings back and removes things for good."""

    def __init__(self, store: Store, documents: Documents, panels: Panels) -> None:
        self._store = store
        self._layout = store.layout
        self._documents = documents
        self._panels = panels

    async def delete(self, kind: str, **names: str) -> bool:
        """Delete something, into the trash if the configuration keeps one; return whether there was such a thing."""
        keep = self._store.config.backup_before_delete
        if kind == "document":
            return await self._documents.remove(**names, into=self._new_id(kind) if keep else None) is not None
        thing = self._thing(kind, names)
        backend = await self._store.writing()
        change: Change = RemoveTree(thing.place) if thing.is_tree else Delete(thing.key)
        if keep:
            change = Move(thing.place, self._layout.in_trash(self._new_id(kind), thing.place))
        try:
            await backend.commit([Require(thing.key, thing.what), change])
        except NotFoundError:
            return False
        return True

    async def list(self) -> builtins.list[TrashEntry]:
        """Return what can come back, newest first. What is no trash entry is passed over with a warning."""
        backend = await self._store.reading()
        entries = []
        for trash_id in reversed(await self._ids()):  # they begin with the time
            try:
                entry = await self._entry(trash_id)
            except IntegrityError as error:
                logger.warning("%s The trash entry %s is passed over.", error.message, trash_id)
                continue
            if entry is not None:
                entries.append(entry)
            elif await backend.list_keys(f"{self._layout.trash_folder(trash_id)}/"):  # and did not just come back
                self._pass_over(trash_id)
        return entries

    async def undelete(self, trash_id: str) -> bool:
        """Put a trash entry back in its place. Limits do not count: it was within them once."""
        self._parse(trash_id)
        backend = await self._store.writing()
        entry = await self._entry(trash_id)
        if entry is None:
            raise NotFoundError(f"The trash entry {trash_id!r:.100} does not exist.")
        if entry.kind == "document":
            await self._documents.put_back(trash_id, **entry.names)
            return True
        thing = self._thing(entry.kind, entry.names)
        changes: builtins.list[Change] = [
            Require(self._layout.in_trash(trash_id, thing.key), f"The trash entry {trash_id!r}"),
            Move(self._layout.in_trash(trash_id, thing.place), thing.place),
        ]
        if thing.owner is not None:
            changes.insert(1, thing.owner)
        try:
            await backend.commit(changes)
        except ConflictError as error:
            if await backend.exists(thing.key):
                raise ConflictError(f"{thing.what} exists again.", key=error.key, hint="Delete it first.") from error
            raise ConflictError(
                f"{thing.what} has left something in its place.", key=error.key, hint="Run `chatdb check --fix`."
            ) from error
        return True

    # --- for good ------------------------------------------------------------------------------------

    async def purge(self, names: Mapping[str, str]) -> PurgeReceipt:
        """Remove something for good from its place, from every trash entry and from the quarantine.

        Snapshots of a persona in panels are the panels' and stay. A trash entry that is purged by its id takes nothing
        with it that is elsewhere.
        """
        kind = _PURGEABLE.get(frozenset(names))
        if kind is None:
            possible = "; ".join(" and ".join(sorted(each, reverse=True)) for each in _PURGEABLE)
            wrong = f"{', '.join(names)} names nothing that can be purged."
            raise ValidationError(wrong if names else "purge needs to be told what.", hint=f"Possible are: {possible}.")
        if kind == "trash":
            what = f"The trash entry {names['trash_id']!r:.100}"
            gone = await self._purge_entry(names["trash_id"])
        elif kind == "document":
            what = called("file", **names)
            gone = await self._purge_document(names)
        else:
            thing = self._thing(kind, names)
            what = thing.what
            gone = await self._purge_thing(thing)
        if not gone:
            raise NotFoundError(f"{what} is nowhere: not in its place, nor in the trash, nor in the quarantine.")
        return PurgeReceipt(names=dict(names), keys=sorted(gone), purged_at=self._store.now())

    async def owner(self, names: Mapping[str, str]) -> str | None:
        """Return the user whom what `names` name belongs to, or None if it is no user's."""
        if "trash_id" not in names:
            return names.get("user_id")
        try:
            entry = await self._entry(names["trash_id"])
        except IntegrityError:  # the purge itself looks at no metadata
            found = await self._names(names["trash_id"], "document")
            return None if found is None else found["user_id"]
        return None if entry is None else entry.names.get("user_id")

    async def prune(self, *, dry_run: bool) -> PruneReport:
        """Remove insights and trash that have reached the age up to which they are kept; 0 days keep nothing."""
        if not isinstance(dry_run, bool):
            raise ValidationError(f"dry_run must be True or False, not {dry_run!r:.80}.")
        config = self._store.config
        await (self._store.reading() if dry_run else self._store.writing())
        until = self._days_ago(config.panel_insight_retention_days)
        insights = await self._panels.prune_insights(until, dry_run=dry_run)
        until = self._days_ago(config.trash_retention_days)
        trash = []
        for trash_id in await self._ids():
            parsed = self._parse(trash_id)
            if parsed is None or parsed[0] > until:
                continue
            if dry_run or await self._commit([RemoveTree(self._layout.trash_folder(trash_id))]):
                trash.append(trash_id)
        return PruneReport(dry_run=dry_run, insights=insights, trash=trash)

    async def _purge_entry(self, trash_id: str) -> builtins.list[str]:
        if self._parse(trash_id) is None:
            return []
        folder = self._layout.trash_folder(trash_id)
        return await self._commit(
            [RemoveTree(folder), *await self._quarantined(lambda key, _: key.startswith(f"{folder}/"))]
        )

    async def _purge_thing(self, thing: _Thing) -> builtins.list[str]:
        gone: builtins.list[str] = []
        changes: builtins.list[Change] = [RemoveTree(thing.place) if thing.is_tree else Delete(thing.key)]
        # In one commit, so that what comes back from the trash meanwhile is caught in its place; once more, for what
        # went into the trash before it.
        while changes := changes + await self._copies(thing):
            gone += await self._commit(changes)
            changes = []
        return gone + await self._commit(
            await self._quarantined(lambda key, _: _is_within(self._layout.origin(key), thing.place))
        )

    async def _copies(self, thing: _Thing) -> builtins.list[Change]:
        """Return what removes a thing from every trash entry that it is in."""
        backend = await self._store.reading()
        changes: builtins.list[Change] = []
        for trash_id in await self._ids():
            copy = self._layout.in_trash(trash_id, thing.place)
            if thing.is_tree and await backend.list_keys(f"{copy}/"):
                changes.append(RemoveTree(copy))
            elif not thing.is_tree and await backend.exists(copy):
                changes.append(Delete(copy))
        return changes

    async def _purge_document(self, names: Mapping[str, str]) -> builtins.list[str]:
        gone = await self._documents.remove(**names) or []
        for trash_id in await self._ids():
            gone += await self._documents.remove(**names, out_of=trash_id) or []
        session = {"user_id": names["user_id"], "session_id": names["session_id"]}
        metadata = self._layout.key("documents", **session)
        folder = self._layout.folder("documents", **session)
        places = {self._layout.origin(key) for key in gone} - {metadata}  # which tells of other files, too

        def is_meant(key: str, filename: str) -> bool:
            key = self._layout.origin(key)
            return key in places or (filename == names["filename"] and _is_within(key, folder))

        return gone + await self._commit(await self._quarantined(is_meant))

    async def _quarantined(self, is_meant: Callable[[str, str], bool]) -> builtins.list[Change]:
        """Return what removes the items of the quarantine that are meant; see `Quarantine.items_from`."""
        quarantine = Quarantine(self._store.config)
        return [Delete(key) for key in await quarantine.items_from(await self._store.reading(), is_meant)]

    async def _commit(self, removals: builtins.list[Change]) -> builtins.list[str]:
        """Commit removals and return the keys that are gone."""
        gone: builtins.list[str] = []
        outcomes = await (await self._store.writing()).commit(removals) if removals else []
        for removal, outcome in zip(removals, outcomes, strict=True):
            if isinstance(outcome, list):
                gone += map(str, outcome)
            elif isinstance(removal, Delete) and outcome:
                gone.append(removal.key)
        return gone

    # --- names ---------------------------------------------------------------------------------------

    def _thing(self, kind: str, names: Mapping[str, str]) -> _Thing:
        key = self._layout.key("global_persona" if kind == "persona" and "user_id" not in names else kind, **names)
        *outer, _ = names
        owner = self._store.require(_OWNERS[kind], **{name: names[name] for name in outer}) if outer else None
        return _Thing(
            key=key,
            place=self._layout.folder(kind, **names) if kind in _TREES else key,
            what=called(kind, **names),
            owner=owner,
        )

    def _new_id(self, kind: str) -> str:
        return self._layout.trash_id(kind, self._store.clock().astimezone(UTC), self._store.new_id())

    async def _ids(self) -> builtins.list[str]:
        """Return the names of the trash entries, oldest first; what has another name is left alone, with a warning."""
        ids = []
        backend = await self._store.reading()
        folders = set(await backend.list_folders(self._layout.trash))
        for child in await backend.list_children(self._layout.trash):
            if child not in folders or self._parse(child) is None:
                self._pass_over(child)
            else:
                ids.append(child)
        return ids

    def _pass_over(self, child: str) -> None:
        logger.warning("%s is no trash entry; it is passed over", self._layout.trash_folder(child))

    def _parse(self, trash_id: object) -> tuple[datetime, str] | None:
        if not isinstance(trash_id, str):
            raise ValidationError(f"trash_id must be a string, not {type(trash_id).__name__}.")
        parsed = self._layout.parse_trash_id(trash_id)
        return parsed if parsed is not None and parsed[1] in KINDS else None

    async def _entry(self, trash_id: str) -> TrashEntry | None:
        """Return what a trash entry is, or None if there is none of this id.

        Raises:
            IntegrityError: It holds a file whose metadata is damaged.
        """
        parsed = self._parse(trash_id)
        if parsed is None:
            return None
        moment, kind = parsed
        names = await self._names(trash_id, kind)
        if names is not None and kind == "document":
            filename = await self._documents.filename_in_trash(trash_id, **names)
            names = None if filename is None else names | {"filename": filename}
        return None if names is None else TrashEntry(trash_id, kind, names, format_timestamp(moment))

    async def _names(self, trash_id: str, kind: str) -> dict[str, str] | None:
        """Follow the folders of a trash entry down to what it holds; return the ids on the way."""
        for way in _WAYS[kind]:
            names: dict[str, str] = {}
            for entry, name in way:
                folder = self._layout.in_trash(trash_id, self._layout.parent(entry, **names))
                children = await self._store.children(entry, folder=folder)
                found = [self._layout.parse_child(entry, child) for child in children]
                ids = [text for text in found if text is not None]
                if len(ids) != 1:
                    break
                names[name] = ids[0]
            else:
                return names
        return None

    def _days_ago(self, days: int) -> datetime:
        try:
            return self._store.clock() - timedelta(days=days)
        except OverflowError:  # longer ago than dates reach: nothing is as old as that
            return datetime.min.replace(tzinfo=UTC)


def _is_within(key: str, place: str) -> bool:
    return key == place or key.startswith(f"{place}/")
