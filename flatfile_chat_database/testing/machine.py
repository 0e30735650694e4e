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

_USER_IDS = ["ann", "Ann", "../x", "张三", "a" * 60]
_USERS = st.sampled_from(_USER_IDS)
_ILLEGAL = st.sampled_from(["", "a\0", "\ud800", "x" * 500])
_PERSONAS = st.sampled_from(["critic", "Critic", "../p"])
_WORDS = ["the quick brown fox", "Über die Straße", "张三在上海", "naïve café", "it", "fox", "\u2028 \0 end", ""]
_TEXTS = st.lists(st.sampled_from(_WORDS), min_size=1, max_size=3).map(" ".join)
_QUERIES = st.sampled_from(["fox", "QUICK fox", '"brown fox"', "qui*", "上海", "strasse", "cafe", "it", "", "zebra"])
_NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(-1e300, 1e300))
_VALUES = st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXTS)
_JSON = st.dictionaries(st.sampled_from(["a", "b", "name", "fox"]), st.one_of(_VALUES, st.lists(_VALUES)), max_size=3)
_MESSAGE_IDS = st.sampled_from([f"m{number}" for number in range(40)])
_WHICH = st.one_of(st.integers(0, 4), st.integers(0, 40))
_LIMITS = st.one_of(st.none(), st.integers(0, 6))
_OFFSETS = st.integers(-6, 6)
_FILE_NAMES = ["a.txt", "A.txt", "a~1.txt", "Ü (1).pdf", "張.md"]
_FILES = st.sampled_from(_FILE_NAMES)
_CONTENTS = st.sampled_from([b"", b"short", b"the same again " * 60, bytes(range(256)) * 3])
_VERSIONS = st.sampled_from([None, None, "current", "stale"])


def _rarely(usual: st.SearchStrategy[Any], odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw from `odd` about once in forty times."""
    return st.integers(0, 39).flatmap(lambda number: odd if number == 23 else usual)


_ANY_JSON = _rarely(_JSON, st.sampled_from([{"a": float("nan")}, {1: "a"}, {"a": {"b", "c"}}, {"id": "other"}]))


@st.composite
def _messages(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "id": draw(_rarely(st.none(), _MESSAGE_IDS)),
        "role": draw(_rarely(st.sampled_from(["user", "assistant", "critic"]), st.just(""))),
        "content": draw(_rarely(_TEXTS, st.sampled_from(["x" * 2000, "\udfff"]))),
        "metadata": draw(_ANY_JSON),
        "attachments": draw(st.lists(st.sampled_from(["a.txt", "b"]), max_size=2)),
        "parent_id": draw(_rarely(st.none(), _MESSAGE_IDS)),
    }


@st.composite
def _contexts(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "summary": draw(_rarely(_TEXTS, st.just("x" * 600))),
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
        self._model = self._open_model()
        self._store = self._open()
        self._sessions: list[tuple[str, str]] = []
        self._panels: list[str] = []
        self._messages = 0

    # --- for the subclass ------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make a fresh place for the store of one example."""

    @abstractmethod
    def open_storage(self, **arguments: Any) -> StorageManager:
        """Return a new manager with `config()` and these arguments on the place of this example."""

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

    def _open_model(self) -> StorageManager:
        return StorageManager(self.config(), backend=self._memory, clock=self._clock, id_source=self._ids[1])

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

    # --- the beginning, time and reopening -------------------------------------------------------------

    @initialize(users=st.lists(_USERS, min_size=1, max_size=3, unique=True), message=_messages(), context=_contexts())
    def begin(self, users: list[str], message: dict[str, Any], context: dict[str, Any]) -> None:
        self.save_persona("critic", {"name": "fox"}, None)
        self.create_panel(["critic"], None, None)
        for number, user_id in enumerate(users):
            self.create_user(user_id, {"name": user_id})
            self.create_session(user_id, "a title", None, None)
            self.add_messages(3 * number + 1, [message, message | {"id": "again"}])
            self.save_document(number, "a.txt", b"content", None, stream=False)
            self.analyse_a_document(number, "a.txt", {"summary": "the fox"})
            self.keep_a_context(number, context, snapshot=False)

    @rule(minutes=st.sampled_from([0, 1, 30, 60 * 24 * 40, -7]))
    def time_passes(self, minutes: int) -> None:
        self._clock.now += timedelta(minutes=minutes)

    @rule()
    def open_again(self) -> None:
        self._loop.run(self._store.close())
        self._store = self._open()
        self._model = self._open_model()  # a new manager remembers no id of this second; see records/names.py

    # --- users -------------------------------------------------------------------------------------------

    @rule(user_id=_rarely(_USERS, _ILLEGAL), profile=st.one_of(st.none(), _ANY_JSON))
    def create_user(self, user_id: str, profile: dict[str, Any] | None) -> None:
        self._both(lambda s: s.create_user(user_id, profile))

    @rule(user_id=_USERS, updates=_ANY_JSON, version=_VERSIONS)
    def update_user(self, user_id: str, updates: dict[str, Any], version: str | None) -> None:
        async def update(storage: StorageManager) -> object:
            user = await storage.get_user(user_id)
            expected = user.version if user is not None and version == "current" else version
            return await storage.update_user_profile(user_id, updates, expected_version=expected)

        self._both(update)

    @rule(user_id=_rarely(_USERS, _ILLEGAL), limit=_LIMITS, offset=_OFFSETS)
    def look_at_users(self, user_id: str, limit: int | None, offset: int) -> None:
        self._both(lambda s: s.list_users(limit, offset))
        self._both(lambda s: s.count_users())
        self._both(lambda s: s.get_user(user_id))
        self._both(lambda s: s.get_user_profile(user_id))
        self._both(lambda s: s.user_exists(user_id))
        self._both(lambda s: s.list_sessions(user_id, limit, offset))
        self._both(lambda s: s.count_sessions(user_id))

    # --- sessions ----------------------------------------------------------------------------------------

    @rule(
        user_id=_USERS,
        title=st.one_of(st.none(), _TEXTS),
        session_id=st.one_of(st.none(), st.none(), _rarely(st.sampled_from(["mine", "personas", "../y"]), _ILLEGAL)),
        metadata=st.one_of(st.none(), _ANY_JSON),
    )
    def create_session(
        self, user_id: str, title: str | None, session_id: str | None, metadata: dict[str, Any] | None
    ) -> None:
        made = self._both(lambda s: s.create_session(user_id, title, session_id=session_id, metadata=metadata))
        if isinstance(made, str):
            self._sessions.append((user_id, made))

    @rule(
        session=_WHICH,
        updates=_rarely(
            st.fixed_dictionaries({}, optional={"title": _TEXTS, "metadata": _ANY_JSON}), st.just({"id": "other"})
        ),
        version=_VERSIONS,
    )
    def update_session(self, session: int, updates: dict[str, Any], version: str | None) -> None:
        place = self._session(session)

        async def update(storage: StorageManager) -> object:
            found = await storage.get_session(*place)
            expected = found.version if found is not None and version == "current" else version
            return await storage.update_session(*place, updates, expected_version=expected)

        self._both(update)

    @rule(session=_WHICH)
    def look_at_a_session(self, session: int) -> None:
        place = self._session(session)
        self._both(lambda s: s.get_session(*place))
        self._both(lambda s: s.session_exists(*place))
        self._both(lambda s: s.count_messages(*place))
        self._both(lambda s: s.get_context(*place))
        self._both(lambda s: s.context_exists(*place))
        self._both(lambda s: s.list_documents(*place))

    # --- messages of sessions and panels -------------------------------------------------------------------

    def _log(self, number: int) -> tuple[str, tuple[str, ...]]:
        """Return which messages are meant: the middle of the methods' names, and the ids."""
        if number % 4 == 0 and self._panels:
            return "panel_", (self._panel(number // 4),)
        return "", self._session(number // 4)

    def _id_in(self, kind: str, names: tuple[str, ...], number: int) -> str:
        """Return the id of a message that is there, now and then of one that is not."""
        messages = self._both(lambda s: getattr(s, f"get_{kind}messages")(*names, 100)) or ()
        return str(messages[number]["id"]) if number < len(messages) else f"m{number}"

    @rule(log=_WHICH, many=st.lists(_messages(), min_size=1, max_size=6))
    def add_messages(self, log: int, many: list[dict[str, Any]]) -> None:
        kind, names = self._log(log)
        messages = []
        for fields in many:
            self._messages += fields["id"] is None
            message_id = fields["id"] or f"m{self._messages % 40}"
            messages.append(Message(timestamp=self._clock().isoformat(), **fields | {"id": message_id}))
        if len(messages) == 1:
            self._both(lambda s: getattr(s, f"add_{kind}message")(*names, messages[0]))
        else:
            self._both(lambda s: getattr(s, f"add_{kind}messages")(*names, messages))

    @rule(
        log=_WHICH,
        how=st.sampled_from(["update", "update", "update", "delete", "delete", "pop", "pop", "clear"]),
        which=_WHICH,
        fields=_messages(),
        names_of_fields=st.sets(st.sampled_from(["role", "content", "metadata", "parent_id"]), min_size=1),
    )
    def change_messages(
        self, log: int, how: str, which: int, fields: dict[str, Any], names_of_fields: set[str]
    ) -> None:
        kind, names = self._log(log)
        message_id = self._id_in(kind, names, which)
        if how == "update":
            updates = {name: fields[name] for name in sorted(names_of_fields)}
            self._both(lambda s: getattr(s, f"update_{kind}message")(*names, message_id, updates))
        elif how == "delete":
            self._both(lambda s: getattr(s, f"delete_{kind}message")(*names, message_id))
        elif how == "pop":
            self._both(lambda s: getattr(s, f"pop_{kind}message")(*names))
        else:
            self._both(lambda s: getattr(s, f"clear_{kind}messages")(*names))

    @rule(log=_WHICH, which=_WHICH, limit=_LIMITS, offset=_OFFSETS)
    def look_at_messages(self, log: int, which: int, limit: int | None, offset: int) -> None:
        kind, names = self._log(log)
        message_id = self._id_in(kind, names, which)
        self._both(lambda s: getattr(s, f"get_{kind}messages")(*names, limit, offset))
        self._both(lambda s: getattr(s, f"get_{kind}message")(*names, message_id))
        self._both(lambda s: getattr(s, f"count_{kind}messages")(*names))
        page = f"page_{kind}messages"
        self._both(lambda s: getattr(s, page)(*names, limit=limit))
        self._both(lambda s: getattr(s, page)(*names, limit=limit, before=message_id))
        self._both(lambda s: getattr(s, page)(*names, limit=limit, after=message_id))
        self._both(lambda s: _all(getattr(s, f"stream_{kind}messages")(*names)))

    # --- documents ---------------------------------------------------------------------------------------

    @rule(
        session=_WHICH,
        name=_rarely(_FILES, st.sampled_from(["metadata.json", "x.exe", "../a.txt", "", "a.txt/"])),
        content=_rarely(_CONTENTS, st.just(b"x" * 3000)),
        metadata=st.one_of(st.none(), _ANY_JSON),
        stream=st.booleans(),
    )
    def save_document(
        self, session: int, name: str, content: bytes, metadata: dict[str, Any] | None, stream: bool
    ) -> None:
        place = self._session(session)

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(content), 700):
                yield content[start : start + 700]

        self._both(lambda s: s.save_document(*place, name, pieces() if stream else content, metadata))

    @rule(session=_WHICH, name=_FILES, analysis=_ANY_JSON)
    def analyse_a_document(self, session: int, name: str, analysis: dict[str, Any]) -> None:
        place = self._session(session)
        self._both(lambda s: s.update_document_analysis(*place, name, analysis))

    @rule(session=_WHICH, name=_FILES)
    def look_at_a_document(self, session: int, name: str) -> None:
        place = self._session(session)
        self._both(lambda s: s.get_document(*place, name))
        self._both(lambda s: s.get_document_info(*place, name))
        self._both(lambda s: s.document_exists(*place, name))
        self._both(lambda s: s.count_documents(*place))
        self._both(lambda s: s.list_documents(*place))
        self._both(lambda s: _joined(s.stream_document(*place, name)))

    # --- contexts ----------------------------------------------------------------------------------------

    @rule(session=_WHICH, fields=_contexts(), snapshot=st.booleans())
    def keep_a_context(self, session: int, fields: dict[str, Any], snapshot: bool) -> None:
        place = self._session(session)
        context = SituationalContext(timestamp=self._clock().isoformat(), **fields)
        if snapshot:
            self._both(lambda s: s.save_context_snapshot(*place, context))
        else:
            self._both(lambda s: s.update_context(*place, context))

    @rule(session=_WHICH, limit=_LIMITS)
    def look_at_contexts(self, session: int, limit: int | None) -> None:
        place = self._session(session)
        self._both(lambda s: s.get_context(*place))
        self._both(lambda s: s.get_context_history(*place, limit))
        self._both(lambda s: s.count_context_history(*place))

    # --- panels and personas -----------------------------------------------------------------------------

    @rule(
        personas=st.lists(st.sampled_from(["critic", "Critic", "../p", "nobody"]), max_size=4, unique=True),
        config=st.one_of(st.none(), _ANY_JSON),
        panel_id=st.sampled_from([None, None, "round", "Round"]),
    )
    def create_panel(self, personas: list[str], config: dict[str, Any] | None, panel_id: str | None) -> None:
        made = self._both(lambda s: s.create_panel("team", personas, config, panel_id=panel_id))
        if isinstance(made, str):
            self._panels.append(made)

    @rule(panel=_WHICH, insight=_ANY_JSON, config=st.one_of(st.none(), _ANY_JSON))
    def change_a_panel(self, panel: int, insight: dict[str, Any], config: dict[str, Any] | None) -> None:
        panel_id = self._panel(panel)
        self._both(lambda s: s.save_panel_insight(panel_id, insight))
        if config is not None:
            self._both(lambda s: s.update_panel(panel_id, {"config": config}))

    @rule(panel=_WHICH, limit=_LIMITS, offset=_OFFSETS)
    def look_at_panels(self, panel: int, limit: int | None, offset: int) -> None:
        panel_id = self._panel(panel)
        self._both(lambda s: s.list_panels(limit, offset))
        self._both(lambda s: s.count_panels())
        self._both(lambda s: s.get_panel(panel_id))
        self._both(lambda s: s.panel_exists(panel_id))
        self._both(lambda s: s.get_panel_personas(panel_id))
        self._both(lambda s: s.count_panel_insights(panel_id))
        for insight in self._both(lambda s: s.list_panel_insights(panel_id, limit)) or ():
            self._both(lambda s, name=insight["id"]: s.get_panel_insight(panel_id, name))  # type: ignore[misc]
            self._both(lambda s, name=insight["id"]: s.panel_insight_exists(panel_id, name))  # type: ignore[misc]

    @rule(persona_id=_rarely(_PERSONAS, _ILLEGAL), data=_ANY_JSON, user_id=st.one_of(st.none(), _USERS))
    def save_persona(self, persona_id: str, data: dict[str, Any], user_id: str | None) -> None:
        self._both(lambda s: s.save_persona(persona_id, data, user_id))

    @rule(persona_id=_PERSONAS, user_id=st.one_of(st.none(), _USERS))
    def look_at_personas(self, persona_id: str, user_id: str | None) -> None:
        self._both(lambda s: s.get_persona(persona_id, user_id))
        self._both(lambda s: s.persona_exists(persona_id, user_id))
        self._both(lambda s: s.list_personas(user_id))
        self._both(lambda s: s.count_personas(user_id))

    # --- deleting and the trash ----------------------------------------------------------------------------

    @rule(
        what=st.sampled_from(["user", "session", "document", "document", "context", "panel", "insight", "persona"]),
        which=_WHICH,
        name=_FILES,
        persona_id=_PERSONAS,
        of_user=st.booleans(),
    )
    def delete(self, what: str, which: int, name: str, persona_id: str, of_user: bool) -> None:
        user_id, session_id = self._session(which)
        panel_id = self._panel(which)
        insights = (what == "insight" and self._both(lambda s: s.list_panel_insights(panel_id))) or [{"id": "none"}]
        calls: dict[str, Call] = {
            "user": lambda s: s.delete_user(user_id),
            "session": lambda s: s.delete_session(user_id, session_id),
            "document": lambda s: s.delete_document(user_id, session_id, name),
            "context": lambda s: s.delete_context(user_id, session_id),
            "panel": lambda s: s.delete_panel(panel_id),
            "insight": lambda s: s.delete_panel_insight(panel_id, insights[which % len(insights)]["id"]),
            "persona": lambda s: s.delete_persona(persona_id, user_id if of_user else None),
        }
        self._both(calls[what])

    @rule(which=_WHICH, purge=_rarely(st.just(False), st.just(True)))
    def take_from_the_trash(self, which: int, purge: bool) -> None:
        entries = self._both(lambda s: s.list_trash())
        trash_id = entries[which % len(entries)]["id"] if entries else "none"
        if purge:
            self._both(lambda s: s.purge(trash_id=trash_id))
        else:
            self._both(lambda s: s.undelete(trash_id))

    @rule(which=_WHICH, what=st.sampled_from(["user", "session", "document", "panel", "persona"]), name=_FILES)
    def purge(self, which: int, what: str, name: str) -> None:
        user_id, session_id = self._session(which)
        names = {
            "user": {"user_id": user_id},
            "session": {"user_id": user_id, "session_id": session_id},
            "document": {"user_id": user_id, "session_id": session_id, "filename": name},
            "panel": {"panel_id": self._panel(which)},
            "persona": {"persona_id": "critic"},
        }[what]
        self._both(lambda s: s.purge(**names))

    @rule(dry_run=st.booleans())
    def prune(self, dry_run: bool) -> None:
        self._both(lambda s: s.prune(dry_run=dry_run))

    # --- search ------------------------------------------------------------------------------------------

    @rule(
        query=_QUERIES,
        session=_WHICH,
        whole_user=st.booleans(),
        limit=_LIMITS,
        order=st.sampled_from(["time", "relevance"]),
    )
    def search(self, query: str, session: int, whole_user: bool, limit: int | None, order: Any) -> None:
        user_id, found = self._session(session)
        session_id = None if whole_user else found
        self._both(lambda s: s.search_messages(user_id, query, session_id))
        self._both(lambda s: s.search(query, user_id=user_id, session_id=session_id, limit=limit, order=order))
        self._both(lambda s: s.search(query, user_id=user_id, session_id=session_id, kinds=["context", "analysis"]))


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
