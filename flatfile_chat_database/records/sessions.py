"""Chat sessions: their metadata, and when something last happened in them."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from .. import codec
from ..backends.changes import ABSENT, Absent, Change, Put, Quota
from ..errors import ConflictError, IntegrityError, ValidationError
from ..models import Session, format_timestamp, microseconds, parse_timestamp
from ..search.catalogue import Listed
from .names import StampedIds
from .store import LONG_AGO, Make, Store, called, left_behind, logger, moment_of

if TYPE_CHECKING:
    from .listing import Listing

_CHANGEABLE = ("title", "metadata")
_MOST_SEEN = 20_000


class _Seen(msgspec.Struct, frozen=True):
    """What a list found the last time: a session's document and its newest line, and what they say."""

    data: bytes
    line: bytes | None
    updated: datetime
    session: Session
    metadata: bytes | None
    """The session's metadata as JSON, to make anew for each caller; None if there is none."""


class Sessions:
    """Reads and changes sessions."""

    def __init__(self, store: Store, listing: Callable[[], Listing]) -> None:
        """Read and change the sessions of a store; `listing` gives the catalogues when they are needed."""
        self._store = store
        self._listing = listing
        self._ids = StampedIds(store.config.session_id_prefix, store.config.session_timestamp_format)
        self._seen: dict[str, _Seen] = {}  # by key

    def generate_id(self) -> str:
        """Return the id of this second."""
        return self._ids.build(self._ids.stamp(self._store.clock()))

    async def create(
        self,
        user_id: str,
        title: str | None,
        session_id: str | None,
        metadata: dict[str, Any] | None,
        created_at: str | None,
    ) -> str:
        """Create a session and return its id."""
        moment = self._store.clock() if created_at is None else parse_timestamp(created_at, "created_at")
        fields = {
            "title": "" if title is None else codec.check_text(title, "title"),
            "created_at": format_timestamp(moment),
            "updated_at": format_timestamp(moment),
            "metadata": {} if metadata is None else codec.own_object(metadata, "metadata"),
        }
        user = self._store.require("user", user_id=user_id)
        quota = self._quota(user_id)
        place = self._store.layout.folder

        def changes(new: str) -> Sequence[Change]:
            content = {"id": new, "user_id": user_id, **fields}
            put = Put(self._key(user_id, new), codec.encode_document(content), ABSENT)
            # A name that is taken is the caller's first problem, a full folder the next. What a session that lost its
            # document has left is never taken over.
            return user, put, Absent(place("session", user_id=user_id, session_id=new)), quota

        if session_id is None:
            return await self._store.create_stamped("session", self._ids, changes, user_id=user_id)
        conditions = changes(session_id)
        backend = await self._store.writing()
        try:
            await backend.commit(conditions)
        except ConflictError as error:
            what = called("session", user_id=user_id, session_id=session_id)
            if not await self.exists(user_id, session_id):
                raise left_behind(what, error.key) from error
            raise ConflictError(
                f"{what} exists already.", key=error.key, hint="Use another id, or update_session."
            ) from error
        return session_id

    async def get(self, user_id: str, session_id: str) -> Session | None:
        """Return a session."""
        key = self._key(user_id, session_id)
        session = await self._store.load_as(key, self._make(user_id, {key: session_id}))
        if session is None:
            return None
        return (await self._with_newest([session]))[0]

    async def update(
        self, user_id: str, session_id: str, updates: dict[str, Any], expected_version: str | None
    ) -> bool:
        """Set `title`, `metadata` or both."""
        key = self._key(user_id, session_id)
        updates = codec.own_object(updates, "updates")
        for name in updates:
            if name not in _CHANGEABLE:
                raise ValidationError(
                    f"updates.{name:.80} cannot be set: a session has no such field, or it never changes.",
                    hint=f"Fields that can be set: {', '.join(_CHANGEABLE)}.",
                )
        if "title" in updates:
            codec.check_text(updates["title"], "updates.title")
        if "metadata" in updates:
            codec.check_object(updates["metadata"], "updates.metadata")
        make = self._make(user_id, {key: session_id})

        def change(content: dict[str, Any]) -> dict[str, Any]:
            make(key, content, "")  # what is damaged must not be written over
            return content | updates | {"updated_at": self._store.now()} if updates else content

        what = called("session", user_id=user_id, session_id=session_id)
        await self._store.update(key, change, what=what, expected_version=expected_version)
        return True

    async def list(
        self, user_id: str, limit: int | None, offset: int, *, strict: bool = False
    ) -> builtins.list[Session]:
        """Return a user's sessions, most recently updated first."""
        limit, offset = self._store.page(limit, offset, self._store.config.session_list_default_limit)
        make = self._making(user_id)
        if not strict:  # which is asked for in order to look at everything
            page = await self._listing().page(user_id, limit, offset, partial(self._look, make=make, strict=False))
            if page is not None:
                return [_shown(seen) for seen in page]
        begun = None if strict else await self._listing().begin(user_id)
        rows, damaged = await self._read_all(user_id, make, strict=strict)
        listed = [Listed(session_id, microseconds(seen.updated)) for _, session_id, seen in rows]
        await self._listing().keep(user_id, [*listed, *(Listed(each, 0, True) for each in damaged)], begun)
        return [_shown(seen) for _, _, seen in rows[offset:][:limit]]

    async def _read_all(
        self, user_id: str, make: Make[Session], *, strict: bool
    ) -> tuple[builtins.list[tuple[datetime, str, _Seen]], builtins.list[str]]:
        """Return all sessions (when, id, what was seen), the most recently updated first; and the damaged ones."""
        layout, backend = self._store.layout, await self._store.reading()
        folder = layout.parent("session", user_id=user_id)
        found = await backend.read_folders(folder, layout.leaf("session"), layout.leaf("messages"))
        keys = layout.keys_below("session", folder, [child for child, _, _ in found])
        rows = []
        damaged = []
        for child, data, line in found:
            session_id = layout.parse_child("session", child)
            if session_id is None or data is None:
                continue
            seen = self._look(keys[session_id], data, line, make=make, strict=strict)
            if seen is None:
                damaged.append(session_id)
            else:
                rows.append((seen.updated, session_id, seen))
        rows.sort(key=lambda row: row[:2], reverse=True)
        return rows, damaged

    def _look(self, key: str, data: bytes, line: bytes | None, *, make: Make[Session], strict: bool) -> _Seen | None:
        """Return when a session was updated; None if it is damaged. What has not changed is not read again."""
        seen = self._seen.get(key)
        if seen is None or seen.data != data or seen.line != line:
            try:
                session = self._updated(self._store.made(key, data, make), line)
            except IntegrityError as error:
                if strict:
                    raise
                logger.warning("%s It is passed over.", error.message)
                return None
            if len(self._seen) >= _MOST_SEEN:
                self._seen.clear()
            metadata = codec.encode_line(session.metadata) if session.metadata else None
            seen = self._seen[key] = _Seen(data, line, moment_of(session.updated_at), session, metadata)
        return seen

    async def count(self, user_id: str) -> int:
        """Return the number of a user's sessions."""
        look = partial(self._look, make=self._making(user_id), strict=False)
        count = await self._listing().count(user_id, look)
        if count is not None:
            return count
        ids = await self._store.ids("session", user_id=user_id)
        return await self._store.count([self._key(user_id, session_id) for session_id in ids])

    async def exists(self, user_id: str, session_id: str) -> bool:
        """Return whether there is such a session."""
        key = self._key(user_id, session_id)
        return await (await self._store.reading()).exists(key)

    def _key(self, user_id: str, session_id: str) -> str:
        return self._store.layout.key("session", user_id=user_id, session_id=session_id)

    def _quota(self, user_id: str) -> Quota:
        layout = self._store.layout
        own = (layout.key("user", user_id=user_id), layout.parent("persona", user_id=user_id))
        return Quota(
            layout.parent("session", user_id=user_id),
            self._store.config.max_sessions_per_user,
            "max_sessions_per_user",
            frozenset(key.rpartition("/")[2] for key in own),
        )

    def _make(self, user_id: str, places: Mapping[str, str]) -> Make[Session]:
        """Return what reads a session's document; `places` says which session belongs at which key."""

        def make(key: str, content: dict[str, Any], version: str) -> Session:
            session = codec.decode_as(Session, content, key)
            session.version = version
            self._store.cross_check("session", key, content, {"session_id": places[key], "user_id": user_id})
            return session

        return make

    def _making(self, user_id: str) -> Make[Session]:
        """Return what reads the document of any session of a user."""
        layout = self._store.layout
        start = len(layout.parent("session", user_id=user_id)) + 1

        def make(key: str, content: dict[str, Any], version: str) -> Session:
            session = codec.decode_as(Session, content, key)
            session.version = version
            session_id = layout.parse_child("session", key[start:].partition("/")[0])
            names = {"user_id": user_id} if session_id is None else {"session_id": session_id, "user_id": user_id}
            self._store.cross_check("session", key, content, names)
            return session

        return make

    async def _with_newest(self, sessions: builtins.list[Session]) -> builtins.list[Session]:
        """Give each session the time of its newest message, if that is later than its own."""
        layout = self._store.layout
        logs = [layout.key("messages", user_id=item.user_id, session_id=item.id) for item in sessions]
        lines = await (await self._store.reading()).newest_records(logs)
        return [self._updated(session, line) for session, line in zip(sessions, lines, strict=True)]

    def _updated(self, session: Session, line: bytes | None) -> Session:
        newest = LONG_AGO if line is None else moment_of(codec.decode_message(line).timestamp)
        if newest > moment_of(session.updated_at):
            session.updated_at = format_timestamp(newest)
        return session


def _shown(seen: _Seen) -> Session:
    """Return a session of the caller's own."""
    session = seen.session
    return Session(
        session.id,
        session.user_id,
        session.title,
        session.created_at,
        session.updated_at,
        {} if seen.metadata is None else codec.decode_object(seen.metadata),
        session.version,
    )
