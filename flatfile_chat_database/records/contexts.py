"""Situational contexts: the current one of a session, and its history."""

from __future__ import annotations

from typing import Any

from .. import codec
from ..backends.changes import ABSENT, Delete, Put
from ..errors import StorageLimitExceeded
from ..models import SituationalContext
from .names import StampedIds
from .store import Store

_PREFIX = "context"  # of snapshot ids; on disk, do not change


class Contexts:
    """Reads and changes contexts."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._config = store.config
        self._ids = StampedIds(_PREFIX, store.config.context_snapshot_timestamp_format)

    # --- the current one -----------------------------------------------------------------------------

    async def update(self, user_id: str, session_id: str, context: SituationalContext) -> bool:
        """Replace the current context; refuse one of little confidence with False."""
        session = self._store.require("session", user_id=user_id, session_id=session_id)
        put = Put(self._key(user_id, session_id), self._encode(context))
        sure = context.confidence >= self._config.context_confidence_threshold
        await (await self._store.writing()).commit([session, put] if sure else [session])
        return sure

    async def get(self, user_id: str, session_id: str) -> SituationalContext | None:
        """Return the current context."""
        return await self._store.load_as(self._key(user_id, session_id), self._make)

    async def exists(self, user_id: str, session_id: str) -> bool:
        """Return whether there is a current context."""
        key = self._key(user_id, session_id)
        return await (await self._store.reading()).exists(key)

    async def delete(self, user_id: str, session_id: str) -> bool:
        """Remove the current context; return whether there was one."""
        delete = Delete(self._key(user_id, session_id))
        return bool((await (await self._store.writing()).commit([delete]))[0])

    # --- history -------------------------------------------------------------------------------------

    async def save_snapshot(self, user_id: str, session_id: str, context: SituationalContext) -> bool:
        """Add a context to the history and remove what it has no more room for; return False if it has none at all."""
        names = {"user_id": user_id, "session_id": session_id}
        session = self._store.require("session", **names)
        data = self._encode(context)
        room = self._config.max_context_history_snapshots
        backend = await self._store.writing()
        if room == 0:
            await backend.commit([session])
            return False

        async def attempt() -> None:
            existing = await self._history(user_id, session_id)
            new = self._ids.following(existing, self._store.clock())
            old = existing[: max(0, len(existing) + 1 - room)]
            drops = [Delete(self._snapshot_key(user_id, session_id, snapshot_id)) for snapshot_id in old]
            await backend.commit([session, Put(self._snapshot_key(user_id, session_id, new), data, ABSENT), *drops])

        await self._store.retry(self._store.layout.parent("context_snapshot", **names), attempt)
        return True

    async def history(
        self, user_id: str, session_id: str, limit: int | None, *, strict: bool = False
    ) -> list[SituationalContext]:
        """Return the newest `limit` snapshots, oldest first."""
        limit, _ = self._store.page(limit, 0, None)
        ids = await self._history(user_id, session_id)
        newest_first = [self._snapshot_key(user_id, session_id, snapshot_id) for snapshot_id in reversed(ids)]
        return (await self._store.load_page(newest_first, self._make, limit, strict=strict))[::-1]

    async def count_history(self, user_id: str, session_id: str) -> int:
        """Return the number of snapshots."""
        return len(await self._history(user_id, session_id))

    # --- names, checks, bytes ------------------------------------------------------------------------

    def _key(self, user_id: str, session_id: str) -> str:
        return self._store.layout.key("context", user_id=user_id, session_id=session_id)

    def _snapshot_key(self, user_id: str, session_id: str, snapshot_id: str) -> str:
        names = {"user_id": user_id, "session_id": session_id, "snapshot_id": snapshot_id}
        return self._store.layout.key("context_snapshot", **names)

    async def _history(self, user_id: str, session_id: str) -> list[str]:
        """Return the ids of all snapshots, oldest first."""
        found = await self._store.ids("context_snapshot", user_id=user_id, session_id=session_id)
        return self._ids.in_order(found)

    def _encode(self, context: SituationalContext) -> bytes:
        codec.check_context(context)
        for field, value, limit_name, limit in (
            ("summary", len(context.summary), "context_summary_max_length", self._config.context_summary_max_length),
            (
                "key_points",
                len(context.key_points),
                "context_key_points_max_count",
                self._config.context_key_points_max_count,
            ),
        ):
            if value > limit:
                unit = "characters" if field == "summary" else "entries"
                raise StorageLimitExceeded(
                    f"context.{field} has {value} {unit}; {limit} are possible.",
                    limit_name=limit_name,
                    limit=limit,
                    value=value,
                )
        return codec.encode_document(codec.context_fields(context))

    def _make(self, key: str, content: dict[str, Any], version: str) -> SituationalContext:
        context = codec.decode_as(SituationalContext, content, key)
        self._store.cross_check("context", key, content)
        return context
