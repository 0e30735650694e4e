"""StorageManager: everything an application does with the store, one method each.

A thin façade: each method hands over to the record module of its noun in `records/`.

Rules that hold for every method, on every backend:

- Creating what exists and deleting what is absent return False. Reading what is absent returns None or nothing, so an
  unknown user or session reads as empty: `user_exists` and `session_exists` tell. Writing below, or updating, what is
  absent raises NotFoundError. Where nothing else is said of them, `add_…`, `save_…` and `update_…` only return True:
  what hinders them is raised.
- `limit=None` means the configured default, 0 none; `offset` skips.
- Input that cannot be stored raises ValidationError, over a limit StorageLimitExceeded; nothing has changed then.
- Damaged entries of a list are passed over with a warning; `strict=True` raises IntegrityError instead. A message of
  which only the timestamp cannot be read is returned, with the warning: it counts, and has its position. Warnings go to
  the logger `flatfile_chat_database`.
- Times that are given are ISO 8601 with an offset from UTC, such as "2026-01-31T12:00:00+00:00".
- Updating something with nothing checks the arguments and writes nothing.
- When a method that writes has returned, what it wrote is as durable as the setting `durability` says; at "full", the
  default, it is on disk. Cancelling one never leaves half a change.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterable, AsyncIterator, Callable, Collection, Iterable
from datetime import datetime
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from .backends.base import StorageBackend
from .backends.opening import open_backend
from .config import StorageConfig
from .errors import ConfigurationError, NotFoundError
from .models import (
    Document,
    HitKind,
    Message,
    MessagePage,
    Panel,
    PruneReport,
    PurgeReceipt,
    SearchHit,
    Session,
    SituationalContext,
    TrashEntry,
    User,
    new_id,
    utc_now,
)
from .records.contexts import Contexts
from .records.documents import Documents
from .records.export import export_all
from .records.messages import Messages, panel_log, session_log
from .records.panels import Panels
from .records.personas import Personas
from .records.sessions import Sessions
from .records.store import Store
from .records.trash import Trash
from .records.users import Users

if TYPE_CHECKING:
    from .records.finding import Finding
    from .records.indexing import Indexing
    from .records.listing import Listing
    from .records.watching import Watch, Watching
    from .records.wording import Wording


class StorageManager:
    """An open chat store. Works at once, opens on first use; close it, or use it with `async with`.

    One object may be used from several threads and event loops.
    """

    def __init__(
        self,
        config: StorageConfig | None = None,
        *,
        backend: StorageBackend | None = None,
        read_only: bool = False,
        clock: Callable[[], datetime] = utc_now,
        id_source: Callable[[], str] = new_id,
    ) -> None:
        """Choose a store; no I/O happens before the first call.

        Args:
            config: All settings; the defaults when left out. The environment is not read.
            backend: A backend to use instead of the one that `config` names; it is not closed by `close`.
            read_only: Refuse every write with UnavailableError.
            clock: Returns the current, aware time; for tests.
            id_source: Returns a new unique id; for tests.

        Raises:
            ConfigurationError: `config` is no StorageConfig, a path for instance, or names no backend.
        """
        if config is not None and not isinstance(config, StorageConfig):
            raise ConfigurationError(
                f"config must be a StorageConfig, not {type(config).__name__}.",
                hint="For a folder, pass StorageConfig(storage_base_path=...).",
            )
        self.config = config or (backend.config if backend is not None else StorageConfig())
        self._owns_backend = backend is None
        store = Store(
            self.config, backend or open_backend(self.config), read_only=read_only, clock=clock, new_id=id_source
        )
        self._store = store
        self.base_path = Path(self.config.storage_base_path)
        """The folder of the store, when it is one of files."""
        root = getattr(store.backend, "root", None)
        if isinstance(root, str) and (backend is not None or self.config.storage_url):
            self.base_path = Path(root)
        self._messages = Messages(store)
        self._personas = Personas(store)
        self._users = Users(store)
        self._sessions = Sessions(store, lambda: self._listing)
        self._documents = Documents(store)
        self._contexts = Contexts(store)
        self._panels = Panels(store, self._personas)
        self._trash = Trash(store, self._documents, self._panels)

    def __repr__(self) -> str:
        return f"<StorageManager {self._store.backend!r}{' read-only' if self._store.read_only else ''}>"

    async def __aenter__(self) -> Self:
        backend = await self._store.reading()
        await backend.open()  # says so if it was closed: what was opened once is not looked at again
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of files and threads; calling it again does nothing. A backend that was passed in stays open."""
        try:
            if "_watching" in vars(self):
                await self._watching.close()
            if "_indexing" in vars(self):
                await self._indexing.close()
        finally:
            if self._owns_backend:
                await self._store.close()

    @cached_property
    def _watching(self) -> Watching:
        from .records.watching import Watching  # few need it

        return Watching(self._store, self._messages)

    @cached_property
    def _finding(self) -> Finding:
        from .records.finding import Finding  # its tables of characters would slow down every start

        return Finding(self._store, Documents(self._store.uncached), self._indexing, self._wording)

    @cached_property
    def _wording(self) -> Wording:
        from .records.wording import Wording  # the same

        return Wording(self._store)

    @cached_property
    def _listing(self) -> Listing:
        from .records.listing import Listing  # the same

        return Listing(self._store, self._indexing)

    @cached_property
    def _indexing(self) -> Indexing:
        from .records.indexing import Indexing  # the same

        return Indexing(self._store, Documents(self._store.uncached))

    @property
    def backend(self) -> StorageBackend:
        """The backend that holds the bytes."""
        return self._store.backend

    def statistics(self) -> dict[str, int]:
        """Return counters: the backend's, such as bytes read and flushes, and those of the search indexes.

        `index_fallbacks` counts how often an index could not be used, so that the files were read instead; a warning
        says why.
        """
        counters = self._store.backend.statistics()
        return counters | (self._indexing.counters if "_indexing" in vars(self) else {})

    # === User Management ===

    async def create_user(self, user_id: str, profile: dict[str, Any] | None = None) -> bool:
        """Create a user. Return False if there is one of this id."""
        return await self._users.create(user_id, profile)

    async def get_user(self, user_id: str) -> User | None:
        """Return a user with times and version."""
        return await self._users.get(user_id)

    async def get_user_profile(self, user_id: str) -> dict[str, Any] | None:
        """Return a user's profile."""
        user = await self._users.get(user_id)
        return None if user is None else user.profile

    async def update_user_profile(
        self, user_id: str, updates: dict[str, Any], *, expected_version: str | None = None
    ) -> bool:
        """Merge `updates` into the profile at its top level.

        Raises:
            ConflictError: The user's `version` is not `expected_version` any more.
        """
        return await self._users.update(user_id, updates, expected_version)

    async def list_users(self, limit: int | None = None, offset: int = 0, *, strict: bool = False) -> list[User]:
        """Return users by id; the default limit is that of sessions."""
        return await self._users.list(limit, offset, strict=strict)

    async def count_users(self) -> int:
        """Return the number of users."""
        return await self._users.count()

    async def user_exists(self, user_id: str) -> bool:
        """Return whether there is such a user."""
        return await self._users.exists(user_id)

    async def delete_user(self, user_id: str) -> bool:
        """Delete a user with all that is theirs; into the trash with `backup_before_delete`."""
        deleted = await self._trash.delete("user", user_id=user_id)
        if deleted:
            await self._indexing.remove(user_id)
        return deleted

    # === Session Management ===

    def generate_session_id(self) -> str:
        """Return a session id for this second, as `create_session` makes it."""
        return self._sessions.generate_id()

    async def create_session(
        self,
        user_id: str,
        title: str | None = None,
        *,
        session_id: str | None = None,
        metadata: dict[str, Any] | None = None,
        created_at: str | None = None,
    ) -> str:
        """Create a session and return its id.

        Args:
            user_id: The owner, who must exist.
            title: None becomes "".
            session_id: An id of the caller's choice instead of a generated one.
            metadata: JSON of the caller's.
            created_at: When the chat began, with an offset from UTC, for imports; now when left out.

        Raises:
            ConflictError: There is a session of the given id.
            IntegrityError: There is none, but messages or files of one that lost its metadata.
            StorageLimitExceeded: The user has `max_sessions_per_user` sessions.
        """
        return await self._sessions.create(user_id, title, session_id, metadata, created_at)

    async def get_session(self, user_id: str, session_id: str) -> Session | None:
        """Return a session's metadata."""
        return await self._sessions.get(user_id, session_id)

    async def update_session(
        self, user_id: str, session_id: str, updates: dict[str, Any], *, expected_version: str | None = None
    ) -> bool:
        """Set `title`, `metadata` or both.

        Raises:
            ConflictError: The session's `version` is not `expected_version` any more.
        """
        return await self._sessions.update(user_id, session_id, updates, expected_version)

    async def list_sessions(
        self, user_id: str, limit: int | None = None, offset: int = 0, *, strict: bool = False
    ) -> list[Session]:
        """Return a user's sessions, most recently updated first."""
        return await self._sessions.list(user_id, limit, offset, strict=strict)

    async def count_sessions(self, user_id: str) -> int:
        """Return the number of a user's sessions."""
        return await self._sessions.count(user_id)

    async def session_exists(self, user_id: str, session_id: str) -> bool:
        """Return whether there is such a session."""
        return await self._sessions.exists(user_id, session_id)

    async def delete_session(self, user_id: str, session_id: str) -> bool:
        """Delete a session with all that is in it; into the trash with `backup_before_delete`."""
        return await self._trash.delete("session", user_id=user_id, session_id=session_id)

    # === Message Management ===

    async def add_message(self, user_id: str, session_id: str, message: Message) -> bool:
        """Append a message. One that is there already under its id is left as it is; the answer is True all the same.

        Raises:
            ValidationError: Another message has this id, or a field does not fit.
            StorageLimitExceeded: The message is too large or the session full.
        """
        await self._messages.append(session_log(user_id, session_id), (message,))
        return True

    async def add_messages(self, user_id: str, session_id: str, messages: Iterable[Message]) -> int:
        """Append several messages, all or none; return how many were new."""
        return await self._messages.add(session_log(user_id, session_id), messages)

    async def get_messages(
        self, user_id: str, session_id: str, limit: int | None = None, offset: int = 0, *, strict: bool = False
    ) -> list[Message]:
        """Return messages oldest first, from `offset`; a negative offset counts from the end.

        Without both these are the oldest 100 (see `message_pagination_default_limit`); `offset=-100` gives the newest
        hundred, and `stream_messages` yields all.

        An offset of before the first message begins with the first: `limit` messages come all the same.
        """
        return await self._messages.get(session_log(user_id, session_id), limit, offset, strict=strict)

    async def page_messages(
        self,
        user_id: str,
        session_id: str,
        *,
        limit: int | None = None,
        before: str | None = None,
        after: str | None = None,
        strict: bool = False,
    ) -> MessagePage:
        """Return the newest page, or the one before or after the message of an id; oldest first.

        `has_more` tells whether the log goes on, to older messages, or with `after` to newer ones. So all pages, the
        newest first:

            page = await storage.page_messages(user_id, session_id)
            while page.has_more:
                page = await storage.page_messages(user_id, session_id, before=page.messages[0].id)

        Raises:
            NotFoundError: The message of `before` or `after` does not exist.
        """
        return await self._messages.page(session_log(user_id, session_id), limit, before, after, strict=strict)

    def stream_messages(self, user_id: str, session_id: str, *, strict: bool = False) -> AsyncIterator[Message]:
        """Yield all messages oldest first, in memory that does not grow with their number."""
        return self._messages.stream(session_log(user_id, session_id), strict=strict)

    def watch_session(self, user_id: str, session_id: str, *, cursor: str | None = None, last: int = 0) -> Watch:
        """Yield new messages of a session as they come, whoever writes them: `async for arrival in …`.

        Each comes once, in the order of the log, as an `Arrival` with the message and a cursor. A cursor that was
        stored goes on behind its message, after any time and in any process. A session that is not there is waited for,
        and one that was deleted is as well. A message that is changed after it was delivered does not come again; one
        that is removed is not missed, and what takes its place is new.

        Args:
            user_id: The owner of the session.
            session_id: The session.
            cursor: Where to go on; `BEGINNING` for all there is. None begins with what comes from now on.
            last: Without a cursor: begin with so many that are there already.

        Raises:
            ValidationError: The cursor is none, or is of something else; while watching, as the following.
            PlaceLostError: Nothing that was delivered last is in the log any more, for it was cleared, cut by many
                messages, or made anew. The error's cursor begins this log again.
            UnavailableError: The medium has been out of reach for `lock_timeout_seconds`.
            ClosedError: The store was closed.
        """
        return self._watching.log(session_log(user_id, session_id), cursor, last)

    def watch_user(self, user_id: str, *, cursor: str | None = None) -> Watch:
        """Yield new messages of all sessions of a user, those that are made meanwhile too; see `watch_session`.

        Messages of one session come in their order, those of several in any. A cursor has about 20 characters for each
        session with messages.
        """
        return self._watching.user(user_id, cursor)

    async def get_message(self, user_id: str, session_id: str, message_id: str) -> Message | None:
        """Return one message."""
        return await self._messages.find(session_log(user_id, session_id), message_id)

    async def count_messages(self, user_id: str, session_id: str) -> int:
        """Return the number of messages in a session."""
        return await self._messages.count(session_log(user_id, session_id))

    async def message_exists(self, user_id: str, session_id: str, message_id: str) -> bool:
        """Return whether the session holds such a message."""
        return await self._messages.find(session_log(user_id, session_id), message_id) is not None

    async def update_message(self, user_id: str, session_id: str, message_id: str, updates: dict[str, Any]) -> bool:
        """Change a message in its place; every field but `id` may be given, `metadata` is replaced whole."""
        return await self._messages.update(session_log(user_id, session_id), message_id, updates)

    async def delete_message(self, user_id: str, session_id: str, message_id: str) -> bool:
        """Remove a message for good."""
        return await self._messages.delete(session_log(user_id, session_id), message_id)

    async def pop_message(self, user_id: str, session_id: str) -> Message | None:
        """Remove and return the newest message."""
        return await self._messages.pop(session_log(user_id, session_id))

    async def clear_messages(self, user_id: str, session_id: str) -> int:
        """Remove all messages of a session for good; return how many there were."""
        return await self._messages.clear(session_log(user_id, session_id))

    async def search_messages(self, user_id: str, query: str, session_id: str | None = None) -> list[Message]:
        """Return the newest messages that hold every word of `query`; see `search` for the rules."""
        kinds: tuple[HitKind, ...] = ("message",)
        hits = await self._finding.search(query, user_id=user_id, session_id=session_id, kinds=kinds)
        return [hit.message for hit in hits if hit.message is not None]

    async def search(
        self,
        query: str,
        *,
        user_id: str,
        session_id: str | None = None,
        kinds: Collection[HitKind] | None = None,
        roles: Collection[str] | None = None,
        since: str | None = None,
        until: str | None = None,
        order: Literal["time", "relevance"] = "time",
        limit: int | None = None,
        offset: int = 0,
    ) -> list[SearchHit]:
        """Find messages, contexts and document analyses of a user.

        Words match whole, all of them must be there, case and accents do not matter. `word*` matches a beginning,
        `"two words"` a phrase, and Chinese, Japanese and Korean text a run of any length. Words shorter than
        `full_text_search_min_word_length` are passed over if a longer one stands beside them. Any text is a legal
        query; one without words finds nothing.

        Args:
            query: What to look for.
            user_id: Whose chats.
            session_id: Only in this session.
            kinds: Only these kinds of hit; those that the configuration includes when left out. What of a message is
                searched (`search_include_message_content`, `search_include_metadata`) the configuration always says.
            roles: Only messages of these roles; contexts and analyses have none.
            since: Only from this ISO 8601 time on, with an offset from UTC.
            until: Only before this ISO 8601 time, with an offset from UTC.
            order: "time" (newest first; `score` is 0.0 then) or "relevance" (BM25, best first). Where many texts match
                and an index answers, only the newest 2,000 are put in order of relevance; the others follow them,
                newest first.
            limit: At most this many; `search_results_default_limit` when left out.
            offset: Skip this many.
        """
        return await self._finding.search(
            query,
            user_id=user_id,
            session_id=session_id,
            kinds=kinds,
            roles=roles,
            since=since,
            until=until,
            order=order,
            limit=limit,
            offset=offset,
        )

    async def reindex(
        self, user_id: str | None = None, *, progress: Callable[[str, int, int], None] | None = None
    ) -> int:
        """Drop the search index of a user, or of every user who has one, and build it anew; return how many were built.

        Never needed for what was changed through the library. What was changed in the files by hand is found after it.
        Indexes come into being by themselves when a history is long; one may be asked for before.

        Args:
            user_id: Whose; of all who have one when left out.
            progress: Is told the user, and how many of how many sessions were taken in.

        Raises:
            NotFoundError: There is no such user.
            UnavailableError: The store was opened read-only, has no place for indexes, or cannot be written.
        """
        await self._store.writing()
        if user_id is not None and not await self._users.exists(user_id):
            raise NotFoundError(f"The user {user_id!r} does not exist.")
        by_words = await self._wording.is_possible()
        count = 0
        for each in [user_id] if user_id is not None else await self._store.ids("user"):
            if by_words:
                await self._wording.rebuild(each)
                await self._indexing.remove(each)
            elif user_id is not None or await self._indexing.exists(each):
                await self._indexing.rebuild(each, progress)
            else:
                continue
            count += 1
        return count

    # === Document Management ===

    async def save_document(
        self,
        user_id: str,
        session_id: str,
        filename: str,
        content: bytes | os.PathLike[str] | AsyncIterable[bytes],
        metadata: dict[str, Any] | None = None,
    ) -> str:
        """Save a file and return its path relative to the store. A file of the same name is replaced.

        The replacement has another path, so that readers of the old one are not disturbed: keep the name, not the path.

        Args:
            user_id: The session's owner.
            session_id: Where it belongs.
            filename: A plain name with an allowed extension.
            content: Bytes, a path to read from, or an async iterator of chunks.
            metadata: JSON of the caller's.

        Raises:
            ValidationError: The name holds a path or has another extension.
            StorageLimitExceeded: The content is over `max_document_size_bytes`.
        """
        return await self._documents.save(user_id, session_id, filename, content, metadata)

    async def get_document(self, user_id: str, session_id: str, filename: str) -> bytes | None:
        """Return a file's content."""
        return await self._documents.read(user_id, session_id, filename)

    def stream_document(self, user_id: str, session_id: str, filename: str) -> AsyncIterator[bytes]:
        """Yield a file's content in chunks; raise NotFoundError before the first if there is none."""
        return self._documents.stream(user_id, session_id, filename)

    async def get_document_info(self, user_id: str, session_id: str, filename: str) -> Document | None:
        """Return a file's metadata and analysis."""
        return await self._documents.get(user_id, session_id, filename)

    async def list_documents(self, user_id: str, session_id: str, *, strict: bool = False) -> list[Document]:
        """Return the metadata of a session's files, by name."""
        return await self._documents.list(user_id, session_id, strict=strict)

    async def count_documents(self, user_id: str, session_id: str) -> int:
        """Return the number of a session's files."""
        return await self._documents.count(user_id, session_id)

    async def document_exists(self, user_id: str, session_id: str, filename: str) -> bool:
        """Return whether the session has such a file."""
        return await self._documents.exists(user_id, session_id, filename)

    async def update_document_analysis(
        self, user_id: str, session_id: str, filename: str, analysis: dict[str, Any]
    ) -> bool:
        """Merge `analysis` into what is known of a file, by key."""
        return await self._documents.update_analysis(user_id, session_id, filename, analysis)

    async def delete_document(self, user_id: str, session_id: str, filename: str) -> bool:
        """Delete a file with its analysis; into the trash with `backup_before_delete`."""
        return await self._trash.delete("document", user_id=user_id, session_id=session_id, filename=filename)

    # === Context Management ===

    async def update_context(self, user_id: str, session_id: str, context: SituationalContext) -> bool:
        """Replace the current context. One below `context_confidence_threshold` is refused with False."""
        return await self._contexts.update(user_id, session_id, context)

    async def get_context(self, user_id: str, session_id: str) -> SituationalContext | None:
        """Return the current context."""
        return await self._contexts.get(user_id, session_id)

    async def context_exists(self, user_id: str, session_id: str) -> bool:
        """Return whether the session has a current context."""
        return await self._contexts.exists(user_id, session_id)

    async def delete_context(self, user_id: str, session_id: str) -> bool:
        """Remove the current context for good; the history stays."""
        return await self._contexts.delete(user_id, session_id)

    async def save_context_snapshot(self, user_id: str, session_id: str, context: SituationalContext) -> bool:
        """Add a context to the history, which keeps the newest `max_context_history_snapshots`.

        Return False if it keeps none at all.
        """
        return await self._contexts.save_snapshot(user_id, session_id, context)

    async def get_context_history(
        self, user_id: str, session_id: str, limit: int | None = None, *, strict: bool = False
    ) -> list[SituationalContext]:
        """Return the newest `limit` snapshots (all when None), oldest first."""
        return await self._contexts.history(user_id, session_id, limit, strict=strict)

    async def count_context_history(self, user_id: str, session_id: str) -> int:
        """Return the number of snapshots in the history."""
        return await self._contexts.count_history(user_id, session_id)

    # === Panel Management ===

    async def create_panel(
        self,
        panel_type: str,
        personas: list[str],
        config: dict[str, Any] | None = None,
        *,
        panel_id: str | None = None,
    ) -> str:
        """Create a panel and return its id. Global personas among `personas` are kept as they are now.

        Raises:
            ConflictError: There is a panel of the given id.
            IntegrityError: There is none, but messages or insights of one that lost its metadata.
            StorageLimitExceeded: There are more than `panel_max_personas`.
        """
        return await self._panels.create(panel_type, personas, config, panel_id)

    async def get_panel(self, panel_id: str) -> Panel | None:
        """Return a panel's metadata."""
        return await self._panels.get(panel_id)

    async def update_panel(
        self, panel_id: str, updates: dict[str, Any], *, expected_version: str | None = None
    ) -> bool:
        """Set the panel's `config`."""
        return await self._panels.update(panel_id, updates, expected_version)

    async def list_panels(self, limit: int | None = None, offset: int = 0, *, strict: bool = False) -> list[Panel]:
        """Return panels, newest first; the default limit is that of sessions."""
        return await self._panels.list(limit, offset, strict=strict)

    async def count_panels(self) -> int:
        """Return the number of panels."""
        return await self._panels.count()

    async def panel_exists(self, panel_id: str) -> bool:
        """Return whether there is such a panel."""
        return await self._panels.exists(panel_id)

    async def delete_panel(self, panel_id: str) -> bool:
        """Delete a panel with all that is in it; into the trash with `backup_before_delete`."""
        return await self._trash.delete("panel", panel_id=panel_id)

    async def get_panel_personas(self, panel_id: str, *, strict: bool = False) -> list[dict[str, Any]]:
        """Return the panel's personas as they were when it was made, by id."""
        return await self._panels.personas(panel_id, strict=strict)

    async def add_panel_message(self, panel_id: str, message: Message) -> bool:
        """Append a message to a panel; see `add_message`.

        Raises:
            ValidationError: It has a `parent_id` although `panel_message_threading_enabled` is off.
        """
        await self._messages.append(panel_log(panel_id), (message,))
        return True

    async def add_panel_messages(self, panel_id: str, messages: Iterable[Message]) -> int:
        """Append several messages to a panel, all or none; return how many were new."""
        return await self._messages.add(panel_log(panel_id), messages)

    async def get_panel_messages(
        self, panel_id: str, limit: int | None = None, offset: int = 0, *, strict: bool = False
    ) -> list[Message]:
        """Return a panel's messages; see `get_messages`."""
        return await self._messages.get(panel_log(panel_id), limit, offset, strict=strict)

    async def page_panel_messages(
        self,
        panel_id: str,
        *,
        limit: int | None = None,
        before: str | None = None,
        after: str | None = None,
        strict: bool = False,
    ) -> MessagePage:
        """Return a page of a panel's messages; see `page_messages`."""
        return await self._messages.page(panel_log(panel_id), limit, before, after, strict=strict)

    def stream_panel_messages(self, panel_id: str, *, strict: bool = False) -> AsyncIterator[Message]:
        """Yield all messages of a panel; see `stream_messages`."""
        return self._messages.stream(panel_log(panel_id), strict=strict)

    def watch_panel(self, panel_id: str, *, cursor: str | None = None, last: int = 0) -> Watch:
        """Yield new messages of a panel as they come; see `watch_session`."""
        return self._watching.log(panel_log(panel_id), cursor, last)

    async def get_panel_message(self, panel_id: str, message_id: str) -> Message | None:
        """Return one message of a panel."""
        return await self._messages.find(panel_log(panel_id), message_id)

    async def count_panel_messages(self, panel_id: str) -> int:
        """Return the number of messages in a panel."""
        return await self._messages.count(panel_log(panel_id))

    async def panel_message_exists(self, panel_id: str, message_id: str) -> bool:
        """Return whether the panel holds such a message."""
        return await self._messages.find(panel_log(panel_id), message_id) is not None

    async def update_panel_message(self, panel_id: str, message_id: str, updates: dict[str, Any]) -> bool:
        """Change a panel's message in its place; see `update_message`."""
        return await self._messages.update(panel_log(panel_id), message_id, updates)

    async def delete_panel_message(self, panel_id: str, message_id: str) -> bool:
        """Remove a panel's message for good."""
        return await self._messages.delete(panel_log(panel_id), message_id)

    async def pop_panel_message(self, panel_id: str) -> Message | None:
        """Remove and return a panel's newest message."""
        return await self._messages.pop(panel_log(panel_id))

    async def clear_panel_messages(self, panel_id: str) -> int:
        """Remove all messages of a panel for good; return how many there were."""
        return await self._messages.clear(panel_log(panel_id))

    async def save_panel_insight(self, panel_id: str, insight: dict[str, Any]) -> bool:
        """Save an insight or conclusion under a new id."""
        return await self._panels.save_insight(panel_id, insight)

    async def list_panel_insights(
        self, panel_id: str, limit: int | None = None, *, strict: bool = False
    ) -> list[dict[str, Any]]:
        """Return the newest `limit` insights (all when None) with their "id", oldest first."""
        return await self._panels.insights(panel_id, limit, strict=strict)

    async def get_panel_insight(self, panel_id: str, insight_id: str) -> dict[str, Any] | None:
        """Return one insight with its "id"."""
        return await self._panels.insight(panel_id, insight_id)

    async def panel_insight_exists(self, panel_id: str, insight_id: str) -> bool:
        """Return whether the panel has such an insight."""
        return await self._panels.insight_exists(panel_id, insight_id)

    async def count_panel_insights(self, panel_id: str) -> int:
        """Return the number of a panel's insights."""
        return await self._panels.count_insights(panel_id)

    async def delete_panel_insight(self, panel_id: str, insight_id: str) -> bool:
        """Delete an insight; into the trash with `backup_before_delete`."""
        return await self._trash.delete("insight", panel_id=panel_id, insight_id=insight_id)

    # === Persona Management ===

    async def save_persona(self, persona_id: str, data: dict[str, Any], user_id: str | None = None) -> bool:
        """Save a global persona, or a user's own, replacing the one of this id."""
        return await self._personas.save(persona_id, data, user_id)

    async def get_persona(self, persona_id: str, user_id: str | None = None) -> dict[str, Any] | None:
        """Return a persona with its "id"; a user's own overrides the global one."""
        return await self._personas.get(persona_id, user_id)

    async def list_personas(self, user_id: str | None = None, *, strict: bool = False) -> list[dict[str, Any]]:
        """Return the global personas, with a user's own added and overriding, by id."""
        return await self._personas.list(user_id, strict=strict)

    async def count_personas(self, user_id: str | None = None) -> int:
        """Return how many personas `list_personas` finds."""
        return await self._personas.count(user_id)

    async def persona_exists(self, persona_id: str, user_id: str | None = None) -> bool:
        """Return whether `get_persona` finds one."""
        return await self._personas.exists(persona_id, user_id)

    async def delete_persona(self, persona_id: str, user_id: str | None = None) -> bool:
        """Delete a global persona, or a user's own; into the trash with `backup_before_delete`."""
        if user_id is None:
            return await self._trash.delete("persona", persona_id=persona_id)
        return await self._trash.delete("persona", user_id=user_id, persona_id=persona_id)

    # === Trash, Retention and Export ===

    async def list_trash(self) -> list[TrashEntry]:
        """Return what was deleted and can come back, newest first."""
        return await self._trash.list()

    async def undelete(self, trash_id: str) -> bool:
        """Put a trash entry back in its place.

        Raises:
            NotFoundError: There is no such entry, its content is gone, or what it belongs to.
            ConflictError: Something else is in its place now.
        """
        return await self._trash.undelete(trash_id)

    async def purge(
        self,
        *,
        trash_id: str | None = None,
        user_id: str | None = None,
        session_id: str | None = None,
        filename: str | None = None,
        panel_id: str | None = None,
        persona_id: str | None = None,
        insight_id: str | None = None,
    ) -> PurgeReceipt:
        """Remove something for good from wherever it is, in its place, in the trash and in the quarantine.

        Name one trash entry; or a user, a user's session, a file of a session, a panel, an insight of a panel, or a
        persona (global, or a user's own) by their ids.

        What an interrupted upload left behind has no filename yet. It goes with its session; otherwise
        `chatdb check --fix` takes it away, the quarantine or, after a day, for good. Damaged metadata that a repair set
        aside tells of all files of its session, so it goes with the session too, and not with one file.

        Raises:
            ValidationError: The ids given name nothing that can be purged.
            NotFoundError: It is nowhere.
        """
        names = {
            "trash_id": trash_id,
            "user_id": user_id,
            "session_id": session_id,
            "filename": filename,
            "panel_id": panel_id,
            "persona_id": persona_id,
            "insight_id": insight_id,
        }
        given = {name: value for name, value in names.items() if value is not None}
        owner = await self._trash.owner(given)
        if owner is None or self._store.read_only:
            return await self._trash.purge(given)
        # An index may keep words of what was taken out of it, so it goes: before, for the purge may be cut short, and
        # after, for a search may have made it anew meanwhile.
        await self._indexing.remove(owner)
        receipt = await self._trash.purge(given)
        await self._indexing.remove(owner)
        return receipt

    async def prune(self, *, dry_run: bool) -> PruneReport:
        """Remove panel insights and trash that are older than the configuration keeps them.

        Nothing else ever removes them. With `dry_run` only report what would go.
        """
        return await self._trash.prune(dry_run=dry_run)

    async def export_all_data(self) -> dict[str, list[dict[str, Any]]]:
        """Return everything in memory as flat, JSON-serialisable lists, ready for database tables.

        The lists are "users", "sessions", "messages", "documents" (metadata) and "personas" (of every scope).
        """
        return await export_all(
            self._store, self._users, self._sessions, self._messages, self._documents, self._personas
        )
