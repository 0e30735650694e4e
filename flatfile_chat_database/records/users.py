"""Users and their profiles."""

from __future__ import annotations

import builtins
from typing import Any

from .. import codec
from ..backends.changes import ABSENT, Put
from ..errors import ConflictError
from ..models import User
from .store import Store, called


class Users:
    """Reads and changes users."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def create(self, user_id: str, profile: dict[str, Any] | None) -> bool:
        """Create a user; return False if there is one."""
        now = self._store.now()
        content = {
            "user_id": user_id,
            "created_at": now,
            "updated_at": now,
            "profile": {} if profile is None else codec.check_object(profile, "profile"),
        }
        put = Put(self._key(user_id), codec.encode_document(content), ABSENT)
        backend = await self._store.writing()
        try:
            await backend.commit([put])
        except ConflictError:
            return False
        return True

    async def get(self, user_id: str) -> User | None:
        """Return a user."""
        return await self._store.load_as(self._key(user_id), self._make)

    async def update(self, user_id: str, updates: dict[str, Any], expected_version: str | None) -> bool:
        """Merge `updates` into the profile."""
        key = self._key(user_id)
        updates = codec.own_object(updates, "updates")

        def change(content: dict[str, Any]) -> dict[str, Any]:
            profile = self._make(key, content, "").profile
            return content | {"updated_at": self._store.now(), "profile": profile | updates} if updates else content

        await self._store.update(key, change, what=called("user", user_id=user_id), expected_version=expected_version)
        return True

    async def list(self, limit: int | None, offset: int, *, strict: bool = False) -> builtins.list[User]:
        """Return users by id."""
        limit, offset = self._store.page(limit, offset, self._store.config.session_list_default_limit)
        return await self._store.load_page(await self._keys(), self._make, limit, offset, strict=strict)

    async def count(self) -> int:
        """Return the number of users."""
        return await self._store.count(await self._keys())

    async def exists(self, user_id: str) -> bool:
        """Return whether there is such a user."""
        key = self._key(user_id)
        return await (await self._store.reading()).exists(key)

    def _key(self, user_id: str) -> str:
        return self._store.layout.key("user", user_id=user_id)

    async def _keys(self) -> builtins.list[str]:
        return [self._key(user_id) for user_id in sorted(await self._store.ids("user"))]

    def _make(self, key: str, content: dict[str, Any], version: str) -> User:
        user = codec.decode_as(User, content, key)
        user.version = version
        self._store.cross_check("user", key, content)
        return user
