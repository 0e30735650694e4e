"""Personas: the global ones, and those of a user, which override them."""

from __future__ import annotations

import builtins
from typing import Any

from .. import codec
from ..backends.changes import Change, Put
from ..errors import ValidationError
from ..layout import check_id
from .store import Store


class Personas:
    """Reads and changes personas. Each is a flat JSON object that begins with its "id"."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def save(self, persona_id: str, data: dict[str, Any], user_id: str | None) -> bool:
        """Save a global persona, or a user's own, replacing the one of this id."""
        key = self.key(persona_id, user_id)
        content = codec.own_object(data, "data")
        # An export gives both beside the data, so neither may say something else there.
        for name, value in (("id", persona_id), ("user_id", user_id)):
            if content.get(name, value) != value:
                raise ValidationError(
                    f"data.{name} is {content[name]!r:.200}, but the persona is saved with {name}={value!r}.",
                    hint="Leave it out of the data.",
                )
        changes: builtins.list[Change] = [Put(key, codec.encode_document({"id": persona_id} | content))]
        if user_id is not None:
            changes.insert(0, self._store.require("user", user_id=user_id))
        await (await self._store.writing()).commit(changes)
        return True

    async def get(self, persona_id: str, user_id: str | None) -> dict[str, Any] | None:
        """Return a user's own persona, or else the global one."""
        if user_id is not None:
            own = await self._store.load_as(self.key(persona_id, user_id), self._make)
            if own is not None:
                return own
        return await self._store.load_as(self.key(persona_id, None), self._make)

    async def list(self, user_id: str | None, *, strict: bool = False) -> builtins.list[dict[str, Any]]:
        """Return the global personas, with a user's own added and overriding, by id."""
        keys = await self._keys(user_id)
        found = await self._store.load_all([keys[persona_id] for persona_id in sorted(keys)], self._make, strict=strict)
        return [persona for persona in found if persona is not None]

    async def list_scope(self, user_id: str | None) -> builtins.list[dict[str, Any]]:
        """Return a user's own personas alone, or the global ones, by id."""
        ids = sorted(await self._scope(user_id))
        found = await self._store.load_all([self.key(persona_id, user_id) for persona_id in ids], self._make)
        return [persona for persona in found if persona is not None]

    async def count(self, user_id: str | None) -> int:
        """Return how many personas there are for a user, or for all."""
        return len(await self._keys(user_id))

    async def exists(self, persona_id: str, user_id: str | None) -> bool:
        """Return whether there is such a persona for a user, or for all."""
        keys = [self.key(persona_id, scope) for scope in {user_id, None}]
        backend = await self._store.reading()
        return any([await backend.exists(key) for key in keys])

    def key(self, persona_id: str, user_id: str | None) -> str:
        """Return the key of a user's own persona, or of a global one."""
        check_id(persona_id, "persona_id")
        if user_id is None:
            return self._store.layout.key("global_persona", persona_id=persona_id)
        return self._store.layout.key("persona", user_id=user_id, persona_id=persona_id)

    async def _scope(self, user_id: str | None) -> builtins.list[str]:
        if user_id is None:
            return await self._store.ids("global_persona")
        return await self._store.ids("persona", user_id=user_id)

    async def _keys(self, user_id: str | None) -> dict[str, str]:
        """Return the key of each persona that a user sees, or that all see, by id."""
        scopes = (None,) if user_id is None else (None, user_id)
        return {persona_id: self.key(persona_id, scope) for scope in scopes for persona_id in await self._scope(scope)}

    def _make(self, key: str, content: dict[str, Any], version: str) -> dict[str, Any]:
        place = self._store.layout.parse(key)
        ids = {"id": place.names["persona_id"]} if place is not None else {}
        self._store.cross_check("persona", key, content)
        return ids | content
