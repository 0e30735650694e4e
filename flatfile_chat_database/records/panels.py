"""Panels: conversations of several personas, with snapshots of those, and the insights that come of them."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from .. import codec
from ..backends.changes import ABSENT, Absent, Change, Delete, Put
from ..errors import ConflictError, StorageLimitExceeded, ValidationError
from ..layout import check_id
from ..models import Panel, parse_timestamp
from .names import StampedIds
from .personas import Personas
from .store import Store, called, left_behind, logger, moment_of

_INSIGHT_PREFIX = "insight"  # on disk, do not change


class Panels:
    """Reads and changes panels."""

    def __init__(self, store: Store, personas: Personas) -> None:
        self._store = store
        self._personas = personas
        config = store.config
        self._ids = StampedIds(config.panel_id_prefix, config.session_timestamp_format)
        self._insight_ids = StampedIds(_INSIGHT_PREFIX, config.context_snapshot_timestamp_format)

    async def create(
        self, panel_type: str, personas: builtins.list[str], config: dict[str, Any] | None, panel_id: str | None
    ) -> str:
        """Create a panel with snapshots of the global personas in it, and return its id."""
        if not codec.check_text(panel_type, "panel_type"):
            raise ValidationError("panel_type must not be empty.", hint='Use "multi_persona", for instance.')
        members = self._check_personas(personas)
        own = {} if config is None else codec.own_object(config, "config")
        if panel_id is not None:
            self._key(panel_id)
        backend = await self._store.writing()
        snapshots = {member: await self._personas.get(member, None) for member in members}

        def changes(new: str) -> Sequence[Change]:
            created_at = self._store.now()
            content = {"id": new, "type": panel_type, "personas": members, "created_at": created_at, "config": own}
            puts = [
                Put(self._snapshot_key(new, member), codec.encode_document(snapshot))
                for member, snapshot in snapshots.items()
                if snapshot is not None
            ]
            put = Put(self._key(new), codec.encode_document(content), ABSENT)
            return put, Absent(self._store.layout.folder("panel", panel_id=new)), *puts

        if panel_id is None:
            return await self._store.create_stamped("panel", self._ids, changes)
        try:
            await backend.commit(changes(panel_id))
        except ConflictError as error:
            what = called("panel", panel_id=panel_id)
            if not await self.exists(panel_id):
                raise left_behind(what, error.key) from error
            raise ConflictError(
                f"{what} exists already.", key=error.key, hint="Use another id, or update_panel."
            ) from error
        return panel_id

    async def get(self, panel_id: str) -> Panel | None:
        """Return a panel."""
        return await self._store.load_as(self._key(panel_id), self._make)

    async def update(self, panel_id: str, updates: dict[str, Any], expected_version: str | None) -> bool:
        """Set the panel's `config`."""
        key = self._key(panel_id)
        updates = codec.own_object(updates, "updates")
        for name, value in updates.items():
            if name != "config":
                raise ValidationError(
                    f"updates.{name:.80} cannot be set: a panel has no such field, or it never changes.",
                    hint="Only config can be set.",
                )
            codec.check_object(value, "updates.config")

        def change(content: dict[str, Any]) -> dict[str, Any]:
            self._make(key, content, "")  # what is damaged must not be written over
            return content | updates if updates else content

        await self._store.update(
            key, change, what=called("panel", panel_id=panel_id), expected_version=expected_version
        )
        return True

    async def list(self, limit: int | None, offset: int, *, strict: bool = False) -> builtins.list[Panel]:
        """Return panels, newest first."""
        limit, offset = self._store.page(limit, offset, self._store.config.session_list_default_limit)
        found = await self._store.load_all(await self._keys(), self._make, strict=strict)
        panels = [panel for panel in found if panel is not None]
        panels.sort(key=lambda panel: (moment_of(panel.created_at), panel.id), reverse=True)
        return panels[offset:][:limit]

    async def count(self) -> int:
        """Return the number of panels."""
        return await self._store.count(await self._keys())

    async def exists(self, panel_id: str) -> bool:
        """Return whether there is such a panel."""
        key = self._key(panel_id)
        return await (await self._store.reading()).exists(key)

    async def personas(self, panel_id: str, *, strict: bool = False) -> builtins.list[dict[str, Any]]:
        """Return the snapshots of the panel's personas, by id."""
        ids = sorted(await self._store.ids("panel_persona", panel_id=panel_id))
        keys = [self._snapshot_key(panel_id, persona_id) for persona_id in ids]
        found = await self._store.load_all(keys, self._make_snapshot, strict=strict)
        return [persona for persona in found if persona is not None]

    def _check_personas(self, personas: object) -> builtins.list[str]:
        if not isinstance(personas, list):
            raise ValidationError(f"personas must be a list of ids, not {type(personas).__name__}.")
        limit = self._store.config.panel_max_personas
        if len(personas) > limit:
            raise StorageLimitExceeded(
                f"personas has {len(personas)} entries; {limit} are possible.",
                limit_name="panel_max_personas",
                limit=limit,
                value=len(personas),
            )
        if not personas:
            raise ValidationError("personas must not be empty.", hint="A panel has at least one persona.")
        members = [check_id(persona_id, f"personas[{index}]") for index, persona_id in enumerate(personas)]
        for index, persona_id in enumerate(members):
            if persona_id in members[:index]:
                raise ValidationError(f"personas[{index}] is {persona_id!r} again.", hint="Name each persona once.")
        return members

    # --- insights ------------------------------------------------------------------------------------

    async def save_insight(self, panel_id: str, insight: dict[str, Any]) -> bool:
        """Save an insight under a new id.

        A `created_at` in it is kept, so that an import keeps its times; an `id` cannot be chosen.
        """
        panel = self._store.require("panel", panel_id=panel_id)
        content = codec.own_object(insight, "insight")
        if "id" in content:
            raise ValidationError("insight.id cannot be chosen.", hint="Leave it out; the insight gets a new one.")
        if "created_at" in content:
            parse_timestamp(content["created_at"], "insight.created_at")
        backend = await self._store.writing()

        async def attempt() -> None:
            existing = await self._store.ids("insight", panel_id=panel_id)
            new = self._insight_ids.following(existing, self._store.clock())
            data = codec.encode_document({"id": new, "created_at": self._store.now()} | content)
            await backend.commit([panel, Put(self._insight_key(panel_id, new), data, ABSENT)])

        await self._store.retry(self._store.layout.parent("insight", panel_id=panel_id), attempt)
        return True

    async def insights(
        self, panel_id: str, limit: int | None, *, strict: bool = False
    ) -> builtins.list[dict[str, Any]]:
        """Return the newest `limit` insights (all when None), oldest first."""
        limit, _ = self._store.page(limit, 0, None)
        keys = await self._insight_keys(panel_id)
        return (await self._store.load_page(keys[::-1], self._make_insight, limit, strict=strict))[::-1]

    async def insight(self, panel_id: str, insight_id: str) -> dict[str, Any] | None:
        """Return one insight."""
        return await self._store.load_as(self._insight_key(panel_id, insight_id), self._make_insight)

    async def insight_exists(self, panel_id: str, insight_id: str) -> bool:
        """Return whether there is such an insight."""
        key = self._insight_key(panel_id, insight_id)
        return await (await self._store.reading()).exists(key)

    async def count_insights(self, panel_id: str) -> int:
        """Return the number of a panel's insights."""
        return len(await self._insight_keys(panel_id))

    async def prune_insights(self, until: datetime, *, dry_run: bool) -> builtins.list[str]:
        """Remove the insights of all panels that were made at `until` or before; return their keys.

        An insight that is damaged, or has no time, stays.
        """
        backend = await (self._store.reading() if dry_run else self._store.writing())
        gone = []
        for panel_id in sorted(await self._store.ids("panel")):
            keys = await self._insight_keys(panel_id)
            insights = await self._store.load_all(keys, self._make_insight)
            old = [key for key, insight in zip(keys, insights, strict=True) if insight and _is_old(key, insight, until)]
            if not dry_run and old:
                outcomes = await backend.commit([Delete(key) for key in old])
                old = [key for key, was_there in zip(old, outcomes, strict=True) if was_there]
            gone += old
        return gone

    # --- keys and bytes ------------------------------------------------------------------------------

    def _key(self, panel_id: str) -> str:
        return self._store.layout.key("panel", panel_id=panel_id)

    def _snapshot_key(self, panel_id: str, persona_id: str) -> str:
        return self._store.layout.key("panel_persona", panel_id=panel_id, persona_id=persona_id)

    def _insight_key(self, panel_id: str, insight_id: str) -> str:
        return self._store.layout.key("insight", panel_id=panel_id, insight_id=insight_id)

    async def _keys(self) -> builtins.list[str]:
        return [self._key(panel_id) for panel_id in await self._store.ids("panel")]

    async def _insight_keys(self, panel_id: str) -> builtins.list[str]:
        """Return the keys of all insights, oldest first."""
        ids = self._insight_ids.in_order(await self._store.ids("insight", panel_id=panel_id))
        return [self._insight_key(panel_id, insight_id) for insight_id in ids]

    def _make(self, key: str, content: dict[str, Any], version: str) -> Panel:
        panel = codec.decode_as(Panel, content, key)
        panel.version = version
        self._store.cross_check("panel", key, content)
        return panel

    def _make_snapshot(self, key: str, content: dict[str, Any], version: str) -> dict[str, Any]:
        self._store.cross_check("panel_persona", key, content)
        return self._id_at(key, "persona_id") | content

    def _make_insight(self, key: str, content: dict[str, Any], version: str) -> dict[str, Any]:
        self._store.cross_check("insight", key, content)
        return self._id_at(key, "insight_id") | content

    def _id_at(self, key: str, name: str) -> dict[str, str]:
        """Return the id that a document at this key has in it."""
        place = self._store.layout.parse(key)
        return {"id": place.names[name]} if place is not None else {}


def _is_old(key: str, insight: dict[str, Any], until: datetime) -> bool:
    try:
        return parse_timestamp(insight.get("created_at"), "created_at") <= until
    except ValidationError as error:  # met only where validate_json_on_read is off
        logger.warning("%s: %s It is kept.", key, error.message)
        return False
