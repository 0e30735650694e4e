"""One import: conversations read in a thread and stored several at a time."""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar, cast

from .. import codec
from ..config import StorageConfig
from ..errors import ConflictError, IntegrityError, StorageError, StorageLimitExceeded, ValidationError
from ..models import Message, Session
from ..storage import StorageManager
from .conversation import Conversation, is_message_of
from .plan import DIFFERS, Plan, plan
from .report import Part, Report, Skip
from .source import Source

T = TypeVar("T")

FORMATS = {"openai-jsonl": "openai_jsonl"}
"""The module of each format."""

_IN_FLIGHT = 64  # conversations being stored at once, so that the backend can share its flushes between them
_IN_FLIGHT_BYTES = 8 * 1024 * 1024
_BATCH = 64  # conversations read in one visit of the thread
_BATCH_BYTES = 2 * 1024 * 1024

_FULL = "no room for another session"
_DAMAGED = "the stored session is damaged"
_REFUSED = "the store refuses the conversation"


class Reader(Protocol):
    """Reads a format: yields what each line of a source holds, in order."""

    def __call__(self, source: Source, config: StorageConfig) -> Iterator[Conversation | Skip]:
        """Yield the conversations, and what is skipped."""
        ...


def reader(name: str) -> Reader:
    """Return the reader of one of the FORMATS."""
    return cast("Reader", importlib.import_module(f".{FORMATS[name]}", __package__).read)


async def import_file(
    storage: StorageManager,
    path: str | os.PathLike[str],
    *,
    user_id: str,
    format_name: str = "openai-jsonl",
    dry_run: bool = False,
    progress: Callable[[Report, int, int | None], None] | None = None,
) -> Report:
    """Import a file into the sessions of a user, who is created if absent and there is anything to import.

    A conversation whose session is there already is continued if it has grown since. If any of its messages is not the
    one that is stored under its id, nothing of it is added.

    Args:
        storage: Where to; with `dry_run` it may be read-only.
        path: The file.
        user_id: Whose sessions they become.
        format_name: One of FORMATS.
        dry_run: Only report what would be added. Each conversation is looked at by itself then: one that stands twice
            in the file counts twice.
        progress: Called now and then with the report so far, the bytes read, and the bytes there are (None: unknown).

    Raises:
        OSError: The file cannot be read.
        StorageError: The store cannot be written, or `user_id` cannot be a user.
    """
    source = await _in_thread(lambda: Source(path))
    try:
        items = reader(format_name)(source, storage.config)
        run = _Run(storage, user_id, dry_run)
        try:
            while batch := await _in_thread(lambda: _take(items)):
                for item in batch:
                    await run.accept(item)
                if progress is not None:
                    progress(run.report, source.position(), source.size)
            await run.finish()
        finally:
            await run.abandon()
        if progress is not None:
            progress(run.report, source.position(), source.size)
        return run.report
    finally:
        await _in_thread(source.close)


class _Run:
    """One import: stores conversations, several at a time."""

    def __init__(self, storage: StorageManager, user_id: str, dry_run: bool) -> None:
        self.report = Report(dry_run)
        self._storage = storage
        self._user_id = user_id
        self._store = self._foresee if dry_run else self._write
        self._tasks: dict[asyncio.Task[None], Conversation] = {}
        self._room = 0  # sessions that still fit, for a dry run
        self._begun = False

    async def _begin(self) -> None:
        """Make the user, once there is something to store: a file without a usable line leaves no trace."""
        self._begun = True
        if not self.report.dry_run:
            await self._storage.create_user(self._user_id)
        elif await self._storage.user_exists(self._user_id):
            self._room = -await self._storage.count_sessions(self._user_id)
        self._room += self._storage.config.max_sessions_per_user

    async def accept(self, item: Conversation | Skip) -> None:
        """Begin to store a conversation as soon as there is room for it."""
        if isinstance(item, Skip):
            self.report.skip(item)
            return
        self.report.conversations += 1
        for skip in item.skipped:
            self.report.skip(skip)
        if not item.messages:
            return
        if not self._begun:
            await self._begin()
        while self._tasks and not self._fits(item):
            done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            self._collect(done)
        self._tasks[asyncio.create_task(self._store(item))] = item

    def _fits(self, item: Conversation) -> bool:
        running = self._tasks.values()
        return (
            len(running) < _IN_FLIGHT
            and sum(other.size for other in running) + item.size <= _IN_FLIGHT_BYTES
            # A source that has an id twice: the first comes first, or two runs could differ.
            and all(other.session_id != item.session_id for other in running)
        )

    async def finish(self) -> None:
        """Wait for all that was begun."""
        while self._tasks:
            done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            self._collect(done)

    def _collect(self, done: Iterable[asyncio.Task[None]]) -> None:
        for task in done:
            del self._tasks[task]
            task.result()

    async def abandon(self) -> None:
        """After an error or a cancellation: let nothing go on in the background."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    # --- storing -------------------------------------------------------------------------------------

    async def _write(self, conversation: Conversation) -> None:
        stored = await self._ensure_session(conversation)
        if stored is not None:
            await self._add(conversation, self._follow(plan(conversation, stored)))

    def _follow(self, made: Plan) -> list[Message]:
        """Report what a plan leaves out; return the messages to append."""
        self.report.already_there += made.already_there
        for skip in made.skips:
            self.report.skip(skip)
        return made.new

    async def _ensure_session(self, conversation: Conversation) -> dict[str, Message] | None:
        """Create the session, or find the one that an earlier run has made.

        Return what is stored of the conversation, or None if it is skipped.
        """
        try:
            await self._storage.create_session(
                self._user_id,
                conversation.title,
                session_id=conversation.session_id,
                metadata=conversation.metadata,
                created_at=conversation.created_at,
            )
        except (ConflictError, StorageLimitExceeded) as error:
            # A full store may say so before it looks whether the session is one of those that fill it.
            refusal = error
        except ValidationError as error:
            self._skip_all(conversation, _REFUSED, error)
            return None
        else:
            self.report.sessions_added += 1
            return {}
        try:
            session = await self._storage.get_session(self._user_id, conversation.session_id)
            if session is None:
                self._skip_all(conversation, _FULL, refusal)
                return None
            return await self._stored(conversation, session)
        except IntegrityError as error:
            self._skip_all(conversation, _DAMAGED, error)
            return None

    async def _stored(self, conversation: Conversation, session: Session) -> dict[str, Message] | None:
        """Return what a session holds of a conversation by id; None if it was made from another, as far as is known."""
        mark = session.metadata.get("import")
        if isinstance(mark, dict) and mark.get("id") != conversation.source_id:
            error = ConflictError(f"{session.id} was made from {mark.get('id')!r}, not {conversation.source_id!r}.")
            self._skip_all(conversation, "another conversation has its session id", error)
            return None
        return {
            message.id: message
            async for message in self._storage.stream_messages(self._user_id, session.id)
            if is_message_of(conversation.source_id, message.id)
        }

    async def _add(self, conversation: Conversation, messages: list[Message]) -> None:
        """Add messages as one batch; when the store refuses it, find the culprits by halving."""
        batches = [messages] if messages else []  # the next one last
        while batches:
            batch = batches.pop()
            left = len(batch) + sum(map(len, batches))
            try:
                added = await self._storage.add_messages(self._user_id, conversation.session_id, batch)
            except IntegrityError as error:
                self._skip_all(conversation, _DAMAGED, error, left)
                return
            except ValidationError as error:
                if len(batch) > 1:
                    middle = len(batch) // 2
                    batches += [batch[middle:], batch[:middle]]
                elif await self._is_there(conversation, batch[0]):
                    # Another process has imported another conversation of this name a moment ago.
                    self._skip_all(conversation, DIFFERS, error, left)
                    return
                else:
                    self._skip_one(conversation, error)
                continue
            self.report.added += added
            self.report.already_there += len(batch) - added

    async def _is_there(self, conversation: Conversation, message: Message) -> bool:
        try:
            return await self._storage.get_message(self._user_id, conversation.session_id, message.id) is not None
        except IntegrityError:
            return True

    async def _foresee(self, conversation: Conversation) -> None:
        """Count what `_write` would do."""
        config = self._storage.config
        stored: dict[str, Message] | None = {}
        count = 0
        try:
            codec.check_text(conversation.title, "title")
            codec.check_object(conversation.metadata, "metadata")
            session = await self._storage.get_session(self._user_id, conversation.session_id)
            if session is not None:
                stored = await self._stored(conversation, session)
                count = await self._storage.count_messages(self._user_id, conversation.session_id)
        except (ValidationError, IntegrityError) as error:
            reason = _REFUSED if isinstance(error, ValidationError) else _DAMAGED
            self._skip_all(conversation, reason, error)
            return
        if stored is None:
            return
        if session is None and self._room <= 0:
            full = StorageLimitExceeded(
                limit_name="max_sessions_per_user",
                limit=config.max_sessions_per_user,
                value=config.max_sessions_per_user + 1,
            )
            self._skip_all(conversation, _FULL, full)
            return
        if session is None:
            self._room -= 1
            self.report.sessions_added += 1
        for message in self._follow(plan(conversation, stored)):
            try:
                line = codec.encode_message(codec.check_message(message))
                for name, limit, value in (
                    ("max_message_size_bytes", config.max_message_size_bytes, len(line) - 1),
                    ("max_messages_per_session", config.max_messages_per_session, count + 1),
                ):
                    if value > limit:
                        raise StorageLimitExceeded(limit_name=name, limit=limit, value=value)
            except ValidationError as error:
                self._skip_one(conversation, error)
                continue
            count += 1
            self.report.added += 1

    def _skip_all(
        self, conversation: Conversation, reason: str, error: StorageError, messages: int | None = None
    ) -> None:
        """Skip the conversation, or what is left of it: so many messages."""
        limit_name = error.limit_name if isinstance(error, StorageLimitExceeded) else ""
        messages = len(conversation.messages) if messages is None else messages
        self.report.skip(Skip(conversation.line, Part.CONVERSATION, reason, str(error), messages, limit_name))

    def _skip_one(self, conversation: Conversation, error: ValidationError) -> None:
        limit_name, reason = "", "the store refuses the message"
        if isinstance(error, StorageLimitExceeded):
            limit_name = error.limit_name
            reason = f"the message is over {limit_name}"
        self.report.skip(Skip(conversation.line, Part.MESSAGE, reason, str(error), 1, limit_name))


def _take(items: Iterator[Conversation | Skip]) -> list[Conversation | Skip]:
    """Read the next few items, bounded in number and size."""
    batch: list[Conversation | Skip] = []
    size = 0
    for item in items:
        batch.append(item)
        size += item.size if isinstance(item, Conversation) else 0
        if len(batch) == _BATCH or size >= _BATCH_BYTES:
            break
    return batch


async def _in_thread(work: Callable[[], T]) -> T:
    """Do blocking work in a thread, and do not leave before it is done, even when cancelled."""
    job = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        await asyncio.wait([job])
        raise
