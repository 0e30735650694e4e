"""Random use of a StorageManager, on any store, beside the same use of one in memory: every answer must agree.

    class Machine(StorageMachine):
        def prepare(self):
            self.folder = tempfile.mkdtemp()

        def open_storage(self, **arguments):
            return StorageManager(self.config(storage_base_path=self.folder), **arguments)

        def discard(self):
            shutil.rmtree(self.folder)

    TestMachine = Machine.TestCase

Both are given the same clock and the same ids, so even the bytes that they store must be the same in the end. The
store under test is closed and opened again now and then.
"""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from ..backends.memory import MemoryBackend
from ..check import check
from ..config import StorageConfig
from ..errors import StorageError
from ..models import Message, SituationalContext
from ..storage import StorageManager

Call = Callable[[StorageManager], Awaitable[Any]]

_USERS = st.sampled_from(["ann", "Ann", "../x", "张三", "a" * 60])
_ILLEGAL = st.sampled_from(["", "a\0", "\ud800", "x" * 500])
_USERS_OR_NOT = st.one_of(_USERS, _USERS, _USERS, _USERS, _ILLEGAL)
_WORDS = ["the quick brown fox", "Über die Straße", "张三在上海", "naïve café", "it", "fox", "\u2028 \0 end", ""]
_TEXTS = st.lists(st.sampled_from(_WORDS), max_size=3).map(" ".join)
_QUERIES = st.sampled_from(["fox", "QUICK fox", '"brown fox"', "qui*", "上海", "strasse", "cafe", "it", "", "zebra"])
_VALUES = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), _TEXTS)
_JSON = st.dictionaries(st.sampled_from(["a", "b", "name", "fox"]), st.one_of(_VALUES, st.lists(_VALUES)), max_size=3)
_MESSAGE_IDS = st.sampled_from([f"m{number}" for number in range(20)])
_NUMBERS = st.integers(0, 40)
_LIMITS = st.one_of(st.none(), st.integers(0, 6))
_OFFSETS = st.integers(-6, 6)
_FILES = st.sampled_from(["a.txt", "A.txt", "a~1.txt", "metadata.json", "Ü (1).pdf", "x.exe", "../a.txt", "張.md"])
_CONTENTS = st.sampled_from([b"", b"short", b"the same again " * 60, bytes(range(256)) * 3, b"x" * 3000])
_MINUTES = st.sampled_from([0, 0, 0, 1, 1, 30, 60 * 24 * 40, -7])


@st.composite
def _messages(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "id": draw(_MESSAGE_IDS),
        "role": draw(st.sampled_from(["user", "assistant", "critic", "user", ""])),
        "content": draw(st.one_of(_TEXTS, _TEXTS, _TEXTS, st.sampled_from(["x" * 2000, "\udfff"]))),
        "metadata": draw(_JSON),
        "attachments": draw(st.lists(st.sampled_from(["a.txt", "b"]), max_size=2)),
        "parent_id": draw(st.one_of(st.none(), st.none(), _MESSAGE_IDS)),
    }


@st.composite
def _contexts(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "summary": draw(st.one_of(_TEXTS, st.just("x" * 600))),
        "key_points": draw(st.lists(_TEXTS, max_size=3)),
        "entities": draw(st.dictionaries(st.sampled_from(["who", "where"]), st.lists(_TEXTS, max_size=2), max_size=2)),
        "confidence": draw(st.sampled_from([0.0, 0.7, 0.9, 1.0, 1.0, 1.5])),
    }


class _Clock:
    """The clock of both stores."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


class _Ids:
    """Ids that are the same for both stores in the same step, however many either took before."""

    def __init__(self) -> None:
        self.step = 0
        self._taken = 0

    def begin(self, step: int) -> None:
        self.step, self._taken = step, 0

    def __call__(self) -> str:
        self._taken += 1
        return str(uuid.UUID(int=self.step << 64 | self._taken))


class StorageMachine(RuleBasedStateMachine):
    """Drives a store and its model; a subclass says where the store is."""

    def __init__(self) -> None:
        super().__init__()
        self.prepare()
        self._loop = asyncio.Runner()
        self._clock = _Clock()
        self._ids = (_Ids(), _Ids())
        self._steps = 0
        self._memory = MemoryBackend(self.config())
        self._model = StorageManager(self.config(), backend=self._memory, clock=self._clock, id_source=self._ids[1])
        self._store = self._open()
        self._sessions: list[tuple[str, str]] = []
        self._panels: list[str] = []

    # --- for the subclass ------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make a fresh place for the store of one example."""

    @abstractmethod
    def open_storage(self, **arguments: Any) -> StorageManager:
        """Return a new manager with `config()` and these arguments on the place of this example."""
        raise NotImplementedError

    def discard(self) -> None:
        """Remove the place of this example."""

    def config(self, **overrides: Any) -> StorageConfig:
        """Return the configuration of both stores: small limits, so that they are reached."""
        limits: dict[str, Any] = {
            "max_sessions_per_user": 4,
            "max_messages_per_session": 12,
            "max_message_size_bytes": 1500,
            "max_document_size_bytes": 2000,
            "document_compression_threshold_bytes": 500,
            "max_context_history_snapshots": 3,
            "panel_max_personas": 3,
            "message_pagination_default_limit": 5,
            "session_list_default_limit": 3,
            "jsonl_read_buffer_size": 100,
            "panel_insight_retention_days": 30,
            "trash_retention_days": 30,
        }
        return StorageConfig(**limits | overrides)

    # --- both at once ----------------------------------------------------------------------------------

    def _open(self) -> StorageManager:
        return self.open_storage(clock=self._clock, id_source=self._ids[0])

    def _both(self, call: Call) -> Any:
        """Make a call on both stores; return what the one under test returned, or None if it raised."""
        self._steps += 1
        answers = []
        for storage, ids in zip((self._store, self._model), self._ids, strict=True):
            ids.begin(self._steps)
            answers.append(self._loop.run(_answer(call, storage)))
        assert answers[0] == answers[1], f"the store answers {answers[0]}, the model {answers[1]}"
        return answers[0][1]

    def teardown(self) -> None:
        """Compare all that both hold, and look whether the store is whole."""
        try:
            self._both(lambda s: s.export_all_data())
            self._both(_everything)
            self.open_again()
            self._both(_everything)
            report = self._loop.run(_checked(self._store))
            assert report == []
        finally:
            self._loop.run(self._store.close())
            self._loop.close()
            self.discard()

    def _session(self, number: int) -> tuple[str, str]:
        return self._sessions[number % len(self._sessions)] if self._sessions else ("ann", "none")

    def _panel(self, number: int) -> str:
        return self._panels[number % len(self._panels)] if self._panels else "none"

    # --- time and reopening ------------------------------------------------------------------------------

    @initialize(users=st.lists(_USERS, min_size=1, max_size=3, unique=True))
    def begin(self, users: list[str]) -> None:
        for user_id in users:
            self.create_user(user_id, None)
            self.create_session(user_id, None, None, None)

    @rule(minutes=_MINUTES)
    def time_passes(self, minutes: int) -> None:
        self._clock.now += timedelta(minutes=minutes)

    @rule()
    def open_again(self) -> None:
        self._loop.run(self._store.close())
        self._store = self._open()

    # --- users -------------------------------------------------------------------------------------------

    @rule(user_id=_USERS_OR_NOT, profile=st.one_of(st.none(), _JSON))
    def create_user(self, user_id: str, profile: dict[str, Any] | None) -> None:
        self._both(lambda s: s.create_user(user_id, profile))

    @rule(user_id=_USERS_OR_NOT, updates=_JSON, version=st.sampled_from([None, "current", "stale"]))
    def update_user(self, user_id: str, updates: dict[str, Any], version: str | None) -> None:
        async def update(storage: StorageManager) -> object:
            user = await storage.get_user(user_id)
            expected = user.version if user is not None and version == "current" else version
            return await storage.update_user_profile(user_id, updates, expected_version=expected)

        self._both(update)

    @rule(user_id=_USERS_OR_NOT, limit=_LIMITS, offset=_OFFSETS)
    def look_at_users(self, user_id: str, limit: int | None, offset: int) -> None:
        self._both(lambda s: s.list_users(limit, offset))
        self._both(lambda s: s.count_users())
        self._both(lambda s: s.get_user(user_id))
        self._both(lambda s: s.get_user_profile(user_id))
        self._both(lambda s: s.user_exists(user_id))
        self._both(lambda s: s.list_sessions(user_id, limit, offset))
        self._both(lambda s: s.count_sessions(user_id))

    @rule(user_id=_USERS)
    def delete_user(self, user_id: str) -> None:
        self._both(lambda s: s.delete_user(user_id))

    # --- sessions ----------------------------------------------------------------------------------------

    @rule(
        user_id=_USERS,
        title=st.one_of(st.none(), _TEXTS),
        session_id=st.one_of(st.none(), st.sampled_from(["mine", "personas", "../y"]), _ILLEGAL),
        metadata=st.one_of(st.none(), _JSON),
    )
    def create_session(
        self, user_id: str, title: str | None, session_id: str | None, metadata: dict[str, Any] | None
    ) -> None:
        made = self._both(lambda s: s.create_session(user_id, title, session_id=session_id, metadata=metadata))
        if isinstance(made, str):
            self._sessions.append((user_id, made))

    @rule(
        session=_NUMBERS,
        updates=st.one_of(
            st.fixed_dictionaries({}, optional={"title": _TEXTS, "metadata": _JSON}), st.just({"id": "other"})
        ),
        version=st.sampled_from([None, "current", "stale"]),
    )
    def update_session(self, session: int, updates: dict[str, Any], version: str | None) -> None:
        place = self._session(session)

        async def update(storage: StorageManager) -> object:
            found = await storage.get_session(*place)
            expected = found.version if found is not None and version == "current" else version
            return await storage.update_session(*place, updates, expected_version=expected)

        self._both(update)

    @rule(session=_NUMBERS)
    def look_at_a_session(self, session: int) -> None:
        place = self._session(session)
        self._both(lambda s: s.get_session(*place))
        self._both(lambda s: s.session_exists(*place))
        self._both(lambda s: s.count_messages(*place))
        self._both(lambda s: s.get_context(*place))
        self._both(lambda s: s.list_documents(*place))

    @rule(session=_NUMBERS)
    def delete_session(self, session: int) -> None:
        place = self._session(session)
        self._both(lambda s: s.delete_session(*place))

    # --- messages of sessions and panels -------------------------------------------------------------------

    def _log(self, number: int) -> tuple[str, tuple[str, ...]]:
        """Return which messages are meant: the middle of the methods' names, and the ids."""
        if number % 3 == 0 and self._panels:
            return "panel_", (self._panel(number),)
        return "", self._session(number)

    def _message(self, fields: dict[str, Any]) -> Message:
        return Message(timestamp=self._clock().isoformat(), **fields)

    @rule(log=_NUMBERS, fields=_messages())
    def add_message(self, log: int, fields: dict[str, Any]) -> None:
        kind, names = self._log(log)
        message = self._message(fields)
        self._both(lambda s: getattr(s, f"add_{kind}message")(*names, message))

    @rule(log=_NUMBERS, many=st.lists(_messages(), max_size=5))
    def add_messages(self, log: int, many: list[dict[str, Any]]) -> None:
        kind, names = self._log(log)
        messages = [self._message(fields) for fields in many]
        self._both(lambda s: getattr(s, f"add_{kind}messages")(*names, messages))

    @rule(
        log=_NUMBERS,
        message_id=_MESSAGE_IDS,
        fields=_messages(),
        which=st.sets(st.sampled_from(["id", "role", "content", "metadata", "parent_id", "attachments"]), max_size=3),
    )
    def update_message(self, log: int, message_id: str, fields: dict[str, Any], which: set[str]) -> None:
        kind, names = self._log(log)
        updates = {name: value for name, value in fields.items() if name in which}
        self._both(lambda s: getattr(s, f"update_{kind}message")(*names, message_id, updates))

    @rule(log=_NUMBERS, message_id=_MESSAGE_IDS)
    def delete_message(self, log: int, message_id: str) -> None:
        kind, names = self._log(log)
        self._both(lambda s: getattr(s, f"delete_{kind}message")(*names, message_id))

    @rule(log=_NUMBERS)
    def pop_message(self, log: int) -> None:
        kind, names = self._log(log)
        self._both(lambda s: getattr(s, f"pop_{kind}message")(*names))

    @rule(log=_NUMBERS)
    def clear_messages(self, log: int) -> None:
        kind, names = self._log(log)
        self._both(lambda s: getattr(s, f"clear_{kind}messages")(*names))

    @rule(log=_NUMBERS, message_id=_MESSAGE_IDS, limit=_LIMITS, offset=_OFFSETS)
    def look_at_messages(self, log: int, message_id: str, limit: int | None, offset: int) -> None:
        kind, names = self._log(log)
        self._both(lambda s: getattr(s, f"get_{kind}messages")(*names, limit, offset))
        self._both(lambda s: getattr(s, f"get_{kind}message")(*names, message_id))
        self._both(lambda s: getattr(s, f"count_{kind}messages")(*names))
        page = f"page_{kind}messages"
        self._both(lambda s: getattr(s, page)(*names, limit=limit))
        self._both(lambda s: getattr(s, page)(*names, limit=limit, before=message_id))
        self._both(lambda s: getattr(s, page)(*names, limit=limit, after=message_id))
        self._both(lambda s: _all(getattr(s, f"stream_{kind}messages")(*names)))

    # --- documents ---------------------------------------------------------------------------------------

    @rule(session=_NUMBERS, name=_FILES, content=_CONTENTS, metadata=st.one_of(st.none(), _JSON), stream=st.booleans())
    def save_document(
        self, session: int, name: str, content: bytes, metadata: dict[str, Any] | None, stream: bool
    ) -> None:
        place = self._session(session)

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(content), 700):
                yield content[start : start + 700]

        self._both(lambda s: s.save_document(*place, name, pieces() if stream else content, metadata))

    @rule(session=_NUMBERS, name=_FILES)
    def look_at_a_document(self, session: int, name: str) -> None:
        place = self._session(session)
        self._both(lambda s: s.get_document(*place, name))
        self._both(lambda s: s.get_document_info(*place, name))
        self._both(lambda s: s.document_exists(*place, name))
        self._both(lambda s: s.count_documents(*place))
        self._both(lambda s: s.list_documents(*place))
        self._both(lambda s: _joined(s.stream_document(*place, name)))

    @rule(session=_NUMBERS, name=_FILES, analysis=_JSON)
    def analyse_a_document(self, session: int, name: str, analysis: dict[str, Any]) -> None:
        place = self._session(session)
        self._both(lambda s: s.update_document_analysis(*place, name, analysis))

    @rule(session=_NUMBERS, name=_FILES)
    def delete_document(self, session: int, name: str) -> None:
        place = self._session(session)
        self._both(lambda s: s.delete_document(*place, name))

    # --- contexts ----------------------------------------------------------------------------------------

    @rule(session=_NUMBERS, fields=_contexts(), snapshot=st.booleans())
    def keep_a_context(self, session: int, fields: dict[str, Any], snapshot: bool) -> None:
        place = self._session(session)
        context = SituationalContext(timestamp=self._clock().isoformat(), **fields)
        if snapshot:
            self._both(lambda s: s.save_context_snapshot(*place, context))
        else:
            self._both(lambda s: s.update_context(*place, context))

    @rule(session=_NUMBERS, limit=_LIMITS)
    def look_at_contexts(self, session: int, limit: int | None) -> None:
        place = self._session(session)
        self._both(lambda s: s.get_context(*place))
        self._both(lambda s: s.get_context_history(*place, limit))
        self._both(lambda s: s.count_context_history(*place))

    @rule(session=_NUMBERS)
    def delete_context(self, session: int) -> None:
        place = self._session(session)
        self._both(lambda s: s.delete_context(*place))

    # --- panels and personas -----------------------------------------------------------------------------

    @rule(
        personas=st.lists(st.sampled_from(["critic", "Critic", "../p", "nobody"]), max_size=4),
        config=st.one_of(st.none(), _JSON),
        panel_id=st.sampled_from([None, None, "round", "Round"]),
    )
    def create_panel(self, personas: list[str], config: dict[str, Any] | None, panel_id: str | None) -> None:
        made = self._both(lambda s: s.create_panel("team", personas, config, panel_id=panel_id))
        if isinstance(made, str):
            self._panels.append(made)

    @rule(panel=_NUMBERS, config=_JSON)
    def update_panel(self, panel: int, config: dict[str, Any]) -> None:
        self._both(lambda s: s.update_panel(self._panel(panel), {"config": config}))

    @rule(panel=_NUMBERS, limit=_LIMITS, offset=_OFFSETS)
    def look_at_panels(self, panel: int, limit: int | None, offset: int) -> None:
        panel_id = self._panel(panel)
        self._both(lambda s: s.list_panels(limit, offset))
        self._both(lambda s: s.count_panels())
        self._both(lambda s: s.get_panel(panel_id))
        self._both(lambda s: s.panel_exists(panel_id))
        self._both(lambda s: s.get_panel_personas(panel_id))
        self._both(lambda s: s.list_panel_insights(panel_id, limit))
        self._both(lambda s: s.count_panel_insights(panel_id))

    @rule(panel=_NUMBERS)
    def delete_panel(self, panel: int) -> None:
        self._both(lambda s: s.delete_panel(self._panel(panel)))

    @rule(panel=_NUMBERS, insight=_JSON)
    def save_insight(self, panel: int, insight: dict[str, Any]) -> None:
        self._both(lambda s: s.save_panel_insight(self._panel(panel), insight))

    @rule(panel=_NUMBERS, number=_NUMBERS)
    def delete_insight(self, panel: int, number: int) -> None:
        panel_id = self._panel(panel)
        insights = self._both(lambda s: s.list_panel_insights(panel_id)) or [{"id": "none"}]
        insight_id = insights[number % len(insights)]["id"]
        self._both(lambda s: s.get_panel_insight(panel_id, insight_id))
        self._both(lambda s: s.delete_panel_insight(panel_id, insight_id))

    @rule(
        persona_id=st.sampled_from(["critic", "Critic", "../p", ""]), data=_JSON, user_id=st.one_of(st.none(), _USERS)
    )
    def save_persona(self, persona_id: str, data: dict[str, Any], user_id: str | None) -> None:
        self._both(lambda s: s.save_persona(persona_id, data, user_id))
        self._both(lambda s: s.get_persona(persona_id, user_id))

    @rule(persona_id=st.sampled_from(["critic", "Critic", "../p"]), user_id=st.one_of(st.none(), _USERS))
    def look_at_personas(self, persona_id: str, user_id: str | None) -> None:
        self._both(lambda s: s.get_persona(persona_id, user_id))
        self._both(lambda s: s.persona_exists(persona_id, user_id))
        self._both(lambda s: s.list_personas(user_id))
        self._both(lambda s: s.count_personas(user_id))

    @rule(persona_id=st.sampled_from(["critic", "Critic", "../p"]), user_id=st.one_of(st.none(), _USERS))
    def delete_persona(self, persona_id: str, user_id: str | None) -> None:
        self._both(lambda s: s.delete_persona(persona_id, user_id))

    # --- trash and search --------------------------------------------------------------------------------

    @rule(number=_NUMBERS, purge=st.booleans())
    def take_from_the_trash(self, number: int, purge: bool) -> None:
        entries = self._both(lambda s: s.list_trash())
        trash_id = entries[number % len(entries)]["id"] if entries else "none"
        if purge:
            self._both(lambda s: s.purge(trash_id=trash_id))
        else:
            self._both(lambda s: s.undelete(trash_id))

    @rule(session=_NUMBERS, what=st.sampled_from(["user", "session", "document", "panel", "persona"]), name=_FILES)
    def purge(self, session: int, what: str, name: str) -> None:
        user_id, session_id = self._session(session)
        names = {
            "user": {"user_id": user_id},
            "session": {"user_id": user_id, "session_id": session_id},
            "document": {"user_id": user_id, "session_id": session_id, "filename": name},
            "panel": {"panel_id": self._panel(session)},
            "persona": {"persona_id": "critic"},
        }[what]
        self._both(lambda s: s.purge(**names))

    @rule(dry_run=st.booleans())
    def prune(self, dry_run: bool) -> None:
        self._both(lambda s: s.prune(dry_run=dry_run))

    @rule(
        user_id=_USERS,
        query=_QUERIES,
        session=st.one_of(st.none(), _NUMBERS),
        limit=_LIMITS,
        order=st.sampled_from(["time", "relevance"]),
    )
    def search(self, user_id: str, query: str, session: int | None, limit: int | None, order: Any) -> None:
        session_id = None
        if session is not None:
            user_id, session_id = self._session(session)
        self._both(lambda s: s.search_messages(user_id, query, session_id))
        self._both(lambda s: s.search(query, user_id=user_id, session_id=session_id, limit=limit, order=order))
        self._both(lambda s: s.search(query, user_id=user_id, kinds=["context", "analysis"], session_id=session_id))


# --- what answers are compared by ------------------------------------------------------------------------


async def _answer(call: Call, storage: StorageManager) -> tuple[str, Any]:
    """Return an answer as plain values, versions included; of an error its type and the key it is about."""
    try:
        return "value", _plain(await call(storage))
    except StorageError as error:
        return f"{type(error).__name__} {error.key or ''}", None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


async def _all(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


async def _joined(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join(await _all(chunks))


async def _everything(storage: StorageManager) -> dict[str, bytes | None]:
    """Return every byte that a store holds."""
    await storage.count_users()  # opens it
    return {key: await storage.backend.read(key) for key in await storage.backend.list_keys("")}


async def _checked(storage: StorageManager) -> list[Any]:
    return [problem for problem in await check(storage.backend) if not problem.harmless]
