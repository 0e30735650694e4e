"""Messages: the logs of sessions and panels."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import fields
from typing import Any, cast

import msgspec

from .. import codec
from ..backends.changes import Append, Change, Edit, Outcome, Require, Truncate
from ..backends.rules import not_found
from ..errors import IntegrityError, NotFoundError, StorageLimitExceeded, ValidationError
from ..models import Message, MessagePage, parse_timestamp
from .store import Store

logger = logging.getLogger("flatfile_chat_database")

_FIELDS = tuple(item.name for item in fields(Message))


class LogName(msgspec.Struct, frozen=True):
    """Whose messages."""

    entry: str
    """The log in the layout."""
    owner: str
    """The entry of the document without which there is no such log."""
    ids: tuple[str, ...]

    @property
    def names(self) -> dict[str, str]:
        """The ids by placeholder."""
        return dict(zip(_PLACEHOLDERS[self.owner], self.ids, strict=True))

    @property
    def is_panel(self) -> bool:
        """Whether the rules of panels hold."""
        return self.owner == "panel"


_PLACEHOLDERS = {"session": ("user_id", "session_id"), "panel": ("panel_id",)}


def session_log(user_id: str, session_id: str) -> LogName:
    """Name the messages of a session."""
    return LogName("messages", "session", (user_id, session_id))


def panel_log(panel_id: str) -> LogName:
    """Name the messages of a panel."""
    return LogName("panel_messages", "panel", (panel_id,))


_REMEMBERED_LOGS = 16384


class Messages:
    """Reads and changes logs of messages."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._config = store.config
        self._places: dict[LogName, tuple[str, Require]] = {}

    # --- writing -------------------------------------------------------------------------------------

    async def add(self, log: LogName, messages: Iterable[Message]) -> int:
        """Append messages, all or none; return how many were new."""
        if type(messages) not in (list, tuple) and not isinstance(messages, Iterable):
            raise ValidationError(f"messages must be several Message objects, not {type(messages).__name__}.")
        outcomes = await self.append(log, messages)
        return cast("int", outcomes[1]) if len(outcomes) > 1 else 0

    def append(self, log: LogName, messages: Iterable[Message]) -> Awaitable[list[Outcome]]:
        """Append messages; the last outcome is how many were new, unless there were none at all."""
        # No coroutine: each one between the caller and the writer is paid for with every message.
        key, owner = self._place(log)
        lines: list[bytes] = []
        ids: list[str] = []
        for message in messages:
            codec.check_message(message)
            if message.parent_id is not None:
                self._check_thread(log, message.parent_id)
            lines.append(self._check_size(key, codec.encode_message(message)))
            ids.append(message.id)
        changes: tuple[Change, ...] = (owner,)
        if lines:
            maximum = self._config.max_messages_per_session
            changes = owner, Append(key, tuple(lines), maximum, "max_messages_per_session", tuple(ids))
        backend = self._store.ready
        return backend.commit(changes) if backend is not None else self._store.commit(changes)

    async def update(self, log: LogName, message_id: str, updates: dict[str, Any]) -> bool:
        """Change a message in its place."""
        key, owner = self._place(log)
        codec.check_message_id(message_id, "message_id")
        updates = codec.own_object(updates, "updates")
        for name in updates:
            if name == "id" or name not in _FIELDS:
                raise ValidationError(
                    f"updates.{name:.80} cannot be set: a message has no such field, or it never changes.",
                    hint=f"Fields that can be set: {', '.join(_FIELDS[1:])}.",
                )
        self._check_thread(log, updates.get("parent_id"))
        backend = await self._store.writing()

        async def edit(line: bytes) -> None:
            # What stands in the line beside the fields of a message was put there by a person, and stays.
            content = codec.decode_object(line, key) | updates
            if content.get("parent_id") is None:
                content.pop("parent_id", None)
            codec.check_message(Message(**{name: content[name] for name in _FIELDS if name in content}))
            new = self._check_size(key, codec.encode_line(content))
            await backend.commit([owner, Edit(key, message_id, line, new)])

        if not await self._change(key, message_id, edit):
            await backend.commit([owner])  # says so if it is the session that does not exist
            raise not_found(f"The message {message_id!r}", key)
        return True

    async def delete(self, log: LogName, message_id: str) -> bool:
        """Remove a message; return whether there was one."""
        key = self._key(log)
        codec.check_message_id(message_id, "message_id")
        backend = await self._store.writing()

        async def drop(line: bytes) -> None:
            await backend.commit([Edit(key, message_id, line, None)])

        try:
            return await self._change(key, message_id, drop)
        except NotFoundError:  # another was faster
            return False

    async def pop(self, log: LogName) -> Message | None:
        """Remove and return the newest message."""
        dropped = await self._truncate(log, 1)
        return codec.decode_message(dropped[-1]) if dropped else None

    async def clear(self, log: LogName) -> int:
        """Remove all messages; return how many there were."""
        return len(await self._truncate(log, None))

    async def _truncate(self, log: LogName, count: int | None) -> list[bytes]:
        outcome = await (await self._store.writing()).commit([Truncate(self._key(log), count)])
        return cast("list[bytes]", outcome[0])

    async def _change(self, key: str, message_id: str, commit: Callable[[bytes], Awaitable[None]]) -> bool:
        """Commit a change to a message's line until nothing came between; return whether there is one."""
        backend = await self._store.writing()

        async def attempt() -> bool:
            found = await backend.find_record(key, message_id)
            if found is not None:
                await commit(found[1])
            return found is not None

        return await self._store.retry(key, attempt)

    # --- reading -------------------------------------------------------------------------------------

    async def get(self, log: LogName, limit: int | None, offset: int, *, strict: bool = False) -> list[Message]:
        """Return messages oldest first from `offset`, which counts from the end if it is negative."""
        key = self._key(log)
        limit = self._limit(limit)
        _, start = self._store.page(limit, offset, None, from_end=True)
        backend = await self._store.reading()
        if not limit:
            return []
        stop: int | None = start + limit
        if start < 0 <= start + limit:
            stop = None  # all there is from there on: no need to know where the log begins
        elif start < 0:
            start = max(0, await backend.count_log(key) + start)
            stop = start + limit
        return await backend.read_log_as(key, self.decoder(key, strict=strict), start, stop, strict=strict)

    async def page(
        self, log: LogName, limit: int | None, before: str | None, after: str | None, *, strict: bool = False
    ) -> MessagePage:
        """Return the newest page, or the one before or after a message."""
        key = self._key(log)
        limit = self._limit(limit)
        if before is not None and after is not None:
            raise ValidationError("before and after cannot both be given.", hint="Ask for one page at a time.")
        decode = self.decoder(key, strict=strict)
        backend = await self._store.reading()
        if after is not None:
            start = await self._position(log, after, "after") + 1
            found = await backend.read_log_as(key, decode, start, start + limit + 1, strict=strict)
            more, found = len(found) > limit, found[:limit]
        elif before is not None:
            stop = await self._position(log, before, "before")
            start = max(0, stop - limit)
            more = start > 0
            found = await backend.read_log_as(key, decode, start, stop, strict=strict) if limit else []
        else:
            found = await backend.read_log_as(key, decode, -limit - 1, strict=strict)
            more, found = len(found) > limit, found[max(0, len(found) - limit) :]
        return MessagePage(found, more)

    async def stream(self, log: LogName, *, strict: bool = False) -> AsyncIterator[Message]:
        """Yield all messages, oldest first."""
        key = self._key(log)
        backend = await self._store.reading()
        stream = backend.stream_log_as(key, self.decoder(key, strict=strict), strict=strict)
        async with aclosing(cast("AsyncGenerator[Iterable[Message]]", stream)) as runs:
            async for run in runs:
                for message in run:
                    yield message

    async def find(self, log: LogName, message_id: str) -> Message | None:
        """Return one message.

        Raises:
            IntegrityError: It has no valid timestamp.
        """
        key = self._key(log)
        codec.check_message_id(message_id, "message_id")
        found = await (await self._store.reading()).find_record(key, message_id)
        return None if found is None else self.decoder(key, strict=True)(found[1])

    async def count(self, log: LogName) -> int:
        """Return the number of messages."""
        key = self._key(log)
        return await (await self._store.reading()).count_log(key)

    async def _position(self, log: LogName, message_id: str, name: str) -> int:
        codec.check_message_id(message_id, name)
        key, owner = self._place(log)
        backend = await self._store.reading()
        found = await backend.find_record(key, message_id)
        if found is None and not await backend.exists(owner.key):
            raise not_found(owner.what, owner.key)
        if found is None:
            raise not_found(f"The message {message_id!r}", key)
        return found[0]

    # --- names, checks, lines ------------------------------------------------------------------------

    def _place(self, log: LogName) -> tuple[str, Require]:
        """Return the key of a log and the condition that its owner exists."""
        try:
            place = self._places.get(log)
        except TypeError:  # an id that has no hash is none, as the layout is about to say
            place = None
        if place is None:
            names = log.names
            place = self._store.layout.key(log.entry, **names), self._store.require(log.owner, **names)
            if len(self._places) >= _REMEMBERED_LOGS:
                self._places.clear()
            self._places[log] = place
        return place

    def _key(self, log: LogName) -> str:
        return self._place(log)[0]

    def _limit(self, limit: int | None) -> int:
        default = self._config.message_pagination_default_limit
        checked, _ = self._store.page(limit, 0, default)
        return default if checked is None else checked

    def _check_thread(self, log: LogName, parent_id: object) -> None:
        if parent_id is not None and log.is_panel and not self._config.panel_message_threading_enabled:
            raise ValidationError(
                "message.parent_id cannot be given: the messages of panels have no threads.",
                hint="Set panel_message_threading_enabled if this is wanted.",
            )

    def _check_size(self, key: str, line: bytes) -> bytes:
        size, limit = len(line) - 1, self._config.max_message_size_bytes
        if size > limit:
            raise StorageLimitExceeded(
                f"The message has {size} bytes as a line of its log; {limit} are possible.",
                limit_name="max_message_size_bytes",
                limit=limit,
                value=size,
                key=key,
            )
        return line

    def decoder(self, key: str, *, strict: bool) -> Callable[[bytes], Message | None]:
        """Return what makes messages of a log's lines.

        One of which only the timestamp cannot be read is a message all the same: it has a position, and counts.
        """
        if not self._config.validate_json_on_read:
            return codec.MessageDecoder(None)

        def doubt(message: Message) -> None:
            try:
                parse_timestamp(message.timestamp)
            except ValidationError as error:
                damage = f"The message {message.id!r} in {key} is damaged: {error.message}"
                if strict:
                    raise IntegrityError(damage, key=key, hint="Run `chatdb check` to see all damage.") from error
                logger.warning("%s", damage)

        return codec.MessageDecoder(doubt)
