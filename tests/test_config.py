"""Settings: each has an effect, wrong ones are refused by name, and `load_config` gathers them in order."""

import asyncio
import copy
import dataclasses
import fcntl
import inspect
import json
import os
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from flatfile_chat_database import Message, SituationalContext, StorageManager
from flatfile_chat_database.addresses import without_password
from flatfile_chat_database.backends.cached import CachedBackend
from flatfile_chat_database.backends.flatfile.files import Files
from flatfile_chat_database.backends.memory import MemoryBackend
from flatfile_chat_database.backends.opening import open_backend
from flatfile_chat_database.backends.postgres import PostgresBackend
from flatfile_chat_database.backends.s3 import S3Backend
from flatfile_chat_database.config import (
    DevelopmentConfig,
    ProductionConfig,
    StorageConfig,
    load_config,
    set_from_text,
)
from flatfile_chat_database.errors import ClosedError, ConfigurationError, StorageError

from . import postgres
from .clock import FixedClock
from .conftest import MakeStorage

FIELDS = [field.name for field in dataclasses.fields(StorageConfig)]

# --- every field has an effect -------------------------------------------------------------------------

SESSION = "chat_session_20260131_120000"
PANEL = "panel_20260131_120000"

TREE = {
    "system/config.json",
    "system/lock",
    "system/open",
    "system/journal/00000001.jsonl",
    "users/ann/profile.json",
    "users/ann/personas/mine.json",
    f"users/ann/{SESSION}/session.json",
    f"users/ann/{SESSION}/messages.jsonl",
    f"users/ann/{SESSION}/situational_context.json",
    f"users/ann/{SESSION}/context_history/context_20260131_120000.json",
    f"users/ann/{SESSION}/documents/metadata.json",
    f"users/ann/{SESSION}/documents/note.txt",
    f"users/ann/{SESSION}/documents/analysis/note.txt.json",
    f"panel_sessions/{PANEL}/panel.json",
    f"panel_sessions/{PANEL}/messages.jsonl",
    f"panel_sessions/{PANEL}/personas/critic.json",
    f"panel_sessions/{PANEL}/insights/insight_20260131_120000.json",
    "personas_global/critic.json",
}
"""What one of everything makes on disk."""


@dataclasses.dataclass
class Bench:
    """A store to observe."""

    storage: StorageManager
    path: Path
    clock: FixedClock
    monkeypatch: pytest.MonkeyPatch

    async def session(self) -> tuple[str, str]:
        """Make a user and a session."""
        await self.storage.create_user("ann")
        return "ann", await self.storage.create_session("ann", "a title")


Observe = Callable[[Bench], Awaitable[object]]


@dataclasses.dataclass
class Effect:
    """What a field does: another value, how to look, and what is seen without and with it."""

    value: Any
    observe: Observe
    by_default: object
    then: object


async def tree(bench: Bench) -> object:
    """Make one of everything; return the files."""
    storage = bench.storage
    place = await bench.session()
    await storage.add_message(*place, Message("user", "hello"))
    await storage.save_document(*place, "note.txt", b"content " * 50)
    await storage.update_document_analysis(*place, "note.txt", {"summary": "short"})
    await storage.update_context(*place, SituationalContext("a context"))
    await storage.save_context_snapshot(*place, SituationalContext("a context"))
    await storage.save_persona("critic", {"name": "Critic"})
    await storage.save_persona("mine", {"name": "Mine"}, "ann")
    panel_id = await storage.create_panel("team", ["critic"])
    await storage.add_panel_message(panel_id, Message("critic", "hello"))
    await storage.save_panel_insight(panel_id, {"text": "agreed"})
    return {path.relative_to(bench.path).as_posix() for path in bench.path.rglob("*") if path.is_file()}


def renames(value: str, before: str, after: str) -> Effect:
    """Return the effect of a field that renames a part of the tree."""
    return Effect(value, tree, TREE, {f"/{path}".replace(before, after)[1:] for path in TREE})


async def outcome(work: Awaitable[object]) -> object:
    """Return what `work` returns, or the name of its error with that of the limit."""
    try:
        return await work
    except StorageError as error:
        return f"{type(error).__name__} {getattr(error, 'limit_name', '')}".strip()


def limits(value: int, observe: Observe, by_default: object, name: str) -> Effect:
    """Return the effect of a limit."""
    return Effect(value, observe, by_default, f"StorageLimitExceeded {name}")


async def long_message(bench: Bench) -> object:
    return await outcome(bench.storage.add_message(*await bench.session(), Message("user", "x" * 500)))


async def long_document(bench: Bench) -> object:
    return await outcome(bench.storage.save_document(*await bench.session(), "a.txt", b"x" * 500))


async def third_message(bench: Bench) -> object:
    place = await bench.session()
    await bench.storage.add_messages(*place, [Message("user", "1"), Message("user", "2")])
    return await outcome(bench.storage.add_message(*place, Message("user", "3")))


async def second_session(bench: Bench) -> object:
    await bench.session()
    return await outcome(bench.storage.create_session("ann"))


async def snapshots(bench: Bench) -> object:
    place = await bench.session()
    for number in range(4):
        await bench.storage.save_context_snapshot(*place, SituationalContext(str(number)))
    return [context.summary for context in await bench.storage.get_context_history(*place)]


async def page_of_messages(bench: Bench) -> object:
    place = await bench.session()
    await bench.storage.add_messages(*place, [Message("user", str(number)) for number in range(110)])
    return len(await bench.storage.get_messages(*place))


async def page_of_sessions(bench: Bench) -> object:
    await bench.session()
    for _ in range(55):
        await bench.storage.create_session("ann")
    return len(await bench.storage.list_sessions("ann"))


async def page_of_hits(bench: Bench) -> object:
    place = await bench.session()
    await bench.storage.add_messages(*place, [Message("user", "fox") for _ in range(25)])
    return len(await bench.storage.search("fox", user_id="ann"))


async def bytes_read_for_one_message(bench: Bench) -> object:
    place = await bench.session()
    await bench.storage.add_messages(*place, [Message("user", "x" * 10) for _ in range(500)])
    before = bench.storage.statistics()["bytes_read"]
    await bench.storage.get_messages(*place, limit=1, offset=0)
    read = bench.storage.statistics()["bytes_read"] - before
    assert read > 0
    return "a little" if read < 2000 else "a block or two" if read < 40_000 else "too much"


async def descriptors(bench: Bench) -> object:
    await bench.session()
    for _ in range(10):
        session_id = await bench.storage.create_session("ann")
        await bench.storage.add_message("ann", session_id, Message("user", "1"))
        await bench.storage.add_message("ann", session_id, Message("user", "2"))
    kept = bench.storage.statistics()["open_files"]
    return "few" if kept <= 6 else "many"


async def temporary_names(bench: Bench) -> object:
    place = await bench.session()
    seen: set[str] = set()

    def look() -> set[str]:
        return {path.suffix for path in bench.path.rglob("*") if path.is_file() and path.name.startswith(".")}

    async def chunks() -> AsyncIterator[bytes]:
        yield b"x" * 2_000_000
        seen.update(await asyncio.to_thread(look))
        yield b"y"

    await bench.storage.save_document(*place, "a.txt", chunks())
    return seen


async def trash_after_deleting(bench: Bench) -> object:
    place = await bench.session()
    await bench.storage.delete_session(*place)
    return [entry.kind for entry in await bench.storage.list_trash()]


async def folder_after_deleting(bench: Bench) -> object:
    await bench.session()
    await bench.storage.save_persona("mine", {}, "ann")
    await bench.storage.delete_persona("mine", "ann")
    return (bench.path / "users/ann/personas").exists()


async def session_of_somebody_else(bench: Bench) -> object:
    place = await bench.session()
    path = bench.path / "users" / place[0] / place[1] / "session.json"
    text = path.read_text()
    path.write_text(text.replace('"ann"', '"bob"'))
    seen = await outcome(bench.storage.get_session(*place))
    path.write_text(text)
    return seen if isinstance(seen, str) else getattr(seen, "title", None)


async def kinds_found(bench: Bench) -> object:
    place = await bench.session()
    await bench.storage.add_message(*place, Message("user", "a fox"))
    await bench.storage.add_message(*place, Message("user", "a bird", metadata={"animal": "fox"}))
    await bench.storage.update_context(*place, SituationalContext("about a fox"))
    return sorted(hit.kind for hit in await bench.storage.search("fox", user_id="ann"))


async def found_by_a_short_word_and_a_long_one(bench: Bench) -> object:
    place = await bench.session()
    await bench.storage.add_message(*place, Message("user", "something lazy"))
    return len(await bench.storage.search_messages("ann", "fox something"))


async def panel_of_two(bench: Bench) -> object:
    return await outcome(bench.storage.create_panel("team", ["a", "b"]))


async def insights_that_go_after_ten_days(bench: Bench) -> object:
    panel_id = await bench.storage.create_panel("team", ["a"])
    await bench.storage.save_panel_insight(panel_id, {"text": "agreed"})
    bench.clock.advance(10 * 86_400)
    return len((await bench.storage.prune(dry_run=False)).insights) + 10 * await bench.storage.count_panel_insights(
        panel_id
    )


async def trash_that_goes_after_ten_days(bench: Bench) -> object:
    await bench.session()
    await bench.storage.delete_user("ann")
    bench.clock.advance(10 * 86_400)
    return len((await bench.storage.prune(dry_run=False)).trash) + 10 * len(await bench.storage.list_trash())


async def answer_in_a_panel(bench: Bench) -> object:
    panel_id = await bench.storage.create_panel("team", ["a"])
    return await outcome(bench.storage.add_panel_message(panel_id, Message("a", "b", id="m2", parent_id="m1")))


async def extensions_taken(bench: Bench) -> object:
    place = await bench.session()
    names = ("a.txt", "a.pdf", "a.xyz", "a.XYZ", "a")
    tried = {name: await outcome(bench.storage.save_document(*place, name, b"")) for name in names}
    return [name for name, result in tried.items() if result != "ValidationError"]


async def short_summary(bench: Bench) -> object:
    context = SituationalContext("0123456789", ["one", "two"])
    return await outcome(bench.storage.update_context(*await bench.session(), context))


async def unsure_context(bench: Bench) -> object:
    place = await bench.session()
    await bench.storage.update_context(*place, SituationalContext("sure", confidence=1.0))
    taken = await bench.storage.update_context(*place, SituationalContext("less sure", confidence=0.8))
    context = await bench.storage.get_context(*place)
    assert context is not None
    return taken, context.summary


async def folder_of_the_store(bench: Bench) -> object:
    await bench.session()
    return sorted(path.name for path in bench.path.parent.iterdir() if path.is_dir())


async def folders_of_indexes(bench: Bench) -> object:
    user_id, _ = await bench.session()
    await bench.storage.reindex(user_id)
    return sorted(path.name for path in [*bench.path.glob("*/index"), bench.path.parent / "elsewhere"] if path.exists())


async def write_while_another_process_holds_the_lock(bench: Bench) -> object:
    await bench.session()
    descriptor = os.open(bench.path / "system/lock", os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        write = asyncio.ensure_future(outcome(bench.storage.create_session("ann")))
        await asyncio.wait([write], timeout=1.5)
        waits = not write.done()
    finally:
        os.close(descriptor)
    result = await write
    return "waits" if waits else result


async def waiting_where_nothing_tells_of_changes(bench: Bench) -> object:
    backend = bench.storage.backend
    await backend.open()  # and makes nothing, so there is nothing that could tell
    waiting = asyncio.ensure_future(backend.wait_for_change([""], 3600))
    await asyncio.wait([waiting], timeout=1.5)
    looks = waiting.done()
    waiting.cancel()
    await asyncio.wait([waiting])
    return "looks again" if looks else "waits"


async def limits_in_a_server(bench: Bench) -> object:
    backend = PostgresBackend(dataclasses.replace(bench.storage.config, storage_url="postgresql://nowhere/x"))
    return backend._target.parameters["connect_timeout"], backend._target.commit_seconds, backend._streams._free


async def limits_of_a_cache(bench: Bench) -> object:
    store = MemoryBackend(bench.storage.config)
    cached = CachedBackend(bench.storage.config, store, "unix:///nowhere")
    return cached._shelf._seconds, cached._roll.lease, cached._shelf._life, cached._shelf._largest


async def limits_in_an_object_store(bench: Bench) -> object:
    backend = S3Backend(dataclasses.replace(bench.storage.config, storage_url="s3://bucket/x"))
    target = backend._target
    return target.connect_seconds, target.seconds, backend._objects._retries, target.single_writer


async def partitions_of_messages(bench: Bench) -> object:
    url = postgres.fresh_schema()
    async with StorageManager(dataclasses.replace(bench.storage.config, storage_url=url)) as storage:
        await storage.create_user("ada")
    schema = url.rpartition("%3D")[2]
    named = f"SELECT tablename FROM pg_tables WHERE schemaname = '{schema}' AND tablename LIKE 'messages%'"
    return {name for (name,) in postgres.sql(url, named)}


async def write_on_a_network_file_system(bench: Bench) -> object:
    bench.monkeypatch.setattr(Files, "file_system", lambda self, path: "nfs4")
    return await outcome(bench.storage.create_user("ann"))


async def syncs_of_a_message(bench: Bench) -> object:
    place = await bench.session()
    before = bench.storage.backend.statistics()["syncs"]
    await bench.storage.add_message(*place, Message("user", "hello"))
    return bench.storage.backend.statistics()["syncs"] - before


async def checkpoints_of_two_writes(bench: Bench) -> object:
    await bench.session()
    for _ in range(20):  # it is folded in a thread
        if bench.storage.backend.statistics().get("checkpoints"):
            return "folded"
        await asyncio.sleep(0.05)
    return "kept"


EFFECTS = {
    "storage_base_path": Effect("{tmp}/elsewhere", folder_of_the_store, ["default"], ["default", "elsewhere"]),
    "user_data_directory_name": renames("people", "/users/", "/people/"),
    "panel_sessions_directory_name": renames("panels", "/panel_sessions/", "/panels/"),
    "global_personas_directory_name": renames("shared", "/personas_global/", "/shared/"),
    "system_config_directory_name": renames("own", "/system/", "/own/"),
    "session_id_prefix": renames("talk", "/chat_session_", "/talk_"),
    "panel_id_prefix": renames("round", "/panel_2026", "/round_2026"),
    "session_timestamp_format": Effect(
        "%Y-%j-%H%M",
        tree,
        TREE,
        {path.replace(SESSION, "chat_session_2026-031-1200").replace(PANEL, "panel_2026-031-1200") for path in TREE},
    ),
    "context_snapshot_timestamp_format": Effect(
        "%Y-%m-%d-%H-%M-%S",
        tree,
        TREE,
        {
            path.replace("/context_20260131_120000", "/context_2026-01-31-12-00-00").replace(
                "/insight_20260131_120000", "/insight_2026-01-31-12-00-00"
            )
            for path in TREE
        },
    ),
    "user_profile_filename": renames("user.json", "/profile.json", "/user.json"),
    "session_metadata_filename": renames("about.json", "/session.json", "/about.json"),
    "messages_filename": renames("log.jsonl", "/messages.jsonl", "/log.jsonl"),
    "situational_context_filename": renames("now.json", "/situational_context.json", "/now.json"),
    "document_metadata_filename": renames("index.json", "/metadata.json", "/index.json"),
    "max_message_size_bytes": limits(400, long_message, True, "max_message_size_bytes"),
    "max_document_size_bytes": limits(
        499, long_document, f"users/ann/{SESSION}/documents/a.txt", "max_document_size_bytes"
    ),
    "max_messages_per_session": limits(2, third_message, True, "max_messages_per_session"),
    "max_sessions_per_user": limits(1, second_session, f"{SESSION}_001", "max_sessions_per_user"),
    "max_context_history_snapshots": Effect(2, snapshots, ["0", "1", "2", "3"], ["2", "3"]),
    "message_pagination_default_limit": Effect(7, page_of_messages, 100, 7),
    "session_list_default_limit": Effect(7, page_of_sessions, 50, 7),
    "search_results_default_limit": Effect(7, page_of_hits, 20, 7),
    "jsonl_read_buffer_size": Effect(512, bytes_read_for_one_message, "a block or two", "a little"),
    "max_open_files": Effect(2, descriptors, "many", "few"),
    "durability": Effect("os", syncs_of_a_message, 1, 0),
    "journal_max_bytes": Effect(1, checkpoints_of_two_writes, "kept", "folded"),
    "journal_max_age_seconds": Effect(0.01, checkpoints_of_two_writes, "kept", "folded"),
    "atomic_write_temp_suffix": Effect(".part", temporary_names, {".tmp"}, {".part"}),
    "backup_before_delete": Effect(False, trash_after_deleting, ["session"], []),
    "auto_cleanup_empty_directories": Effect(False, folder_after_deleting, False, True),
    "validate_json_on_read": Effect(False, session_of_somebody_else, "IntegrityError", "a title"),
    "search_include_message_content": Effect(False, kinds_found, ["context", "message"], ["context"]),
    "search_include_context": Effect(False, kinds_found, ["context", "message"], ["message"]),
    "search_include_metadata": Effect(True, kinds_found, ["context", "message"], ["context", "message", "message"]),
    "search_index_path": Effect("{tmp}/elsewhere", folders_of_indexes, ["index"], ["elsewhere"]),
    "full_text_search_min_word_length": Effect(4, found_by_a_short_word_and_a_long_one, 0, 1),
    "panel_max_personas": limits(1, panel_of_two, PANEL, "panel_max_personas"),
    "panel_insight_retention_days": Effect(3, insights_that_go_after_ten_days, 10, 1),
    "panel_message_threading_enabled": Effect(False, answer_in_a_panel, True, "ValidationError"),
    "allowed_document_extensions": Effect([".xyz"], extensions_taken, ["a.txt", "a.pdf"], ["a.xyz", "a.XYZ"]),
    "document_storage_subdirectory_name": renames("files", "/documents/", "/files/"),
    "document_analysis_subdirectory_name": renames("notes", "/analysis/", "/notes/"),
    "document_compression_threshold_bytes": Effect(
        100, tree, TREE, {path.replace("/note.txt", "/note.txt.gz") for path in TREE}
    ),
    "context_history_subdirectory_name": renames("past", "/context_history/", "/past/"),
    "context_summary_max_length": limits(9, short_summary, True, "context_summary_max_length"),
    "context_key_points_max_count": limits(1, short_summary, True, "context_key_points_max_count"),
    "context_confidence_threshold": Effect(0.9, unsure_context, (True, "less sure"), (False, "sure")),
    "storage_url": Effect("file:{tmp}/elsewhere", folder_of_the_store, ["default"], ["default", "elsewhere"]),
    "trash_retention_days": Effect(3, trash_that_goes_after_ten_days, 10, 1),
    "lock_timeout_seconds": Effect(0.2, write_while_another_process_holds_the_lock, "waits", "UnavailableError"),
    "database_connect_timeout_seconds": Effect(3.0, limits_in_a_server, (10, 60.0, 16), (3, 60.0, 16)),
    "database_timeout_seconds": Effect(6.0, limits_in_a_server, (10, 60.0, 16), (10, 6.0, 16)),
    "database_pool_size": Effect(2, limits_in_a_server, (10, 60.0, 16), (10, 60.0, 2)),
    "database_partitions": Effect(2, partitions_of_messages, {"messages"}, {"messages", "messages_0", "messages_1"}),
    "object_store_connect_timeout_seconds": Effect(
        3.0, limits_in_an_object_store, (5.0, 30.0, 3, False), (3.0, 30.0, 3, False)
    ),
    "object_store_timeout_seconds": Effect(6.0, limits_in_an_object_store, (5.0, 30.0, 3, False), (5.0, 6.0, 3, False)),
    "object_store_retries": Effect(1, limits_in_an_object_store, (5.0, 30.0, 3, False), (5.0, 30.0, 1, False)),
    "object_store_single_writer": Effect(True, limits_in_an_object_store, (5.0, 30.0, 3, False), (5.0, 30.0, 3, True)),
    "watch_poll_seconds": Effect(3600.0, waiting_where_nothing_tells_of_changes, "looks again", "waits"),
    "cache_timeout_seconds": Effect(
        1.0, limits_of_a_cache, (0.01, 0.5, 300_000, 262_144), (1.0, 0.5, 300_000, 262_144)
    ),
    "cache_lease_seconds": Effect(2.0, limits_of_a_cache, (0.01, 0.5, 300_000, 262_144), (0.01, 2.0, 300_000, 262_144)),
    "cache_entry_seconds": Effect(9.0, limits_of_a_cache, (0.01, 0.5, 300_000, 262_144), (0.01, 0.5, 9_000, 262_144)),
    "cache_entry_max_bytes": Effect(9, limits_of_a_cache, (0.01, 0.5, 300_000, 262_144), (0.01, 0.5, 300_000, 9)),
    "allow_network_file_system": Effect(True, write_on_a_network_file_system, "ConfigurationError", True),
}


@pytest.mark.parametrize("field", FIELDS)
async def test_every_field_has_an_effect(
    field: str, flat_storage: MakeStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert field in EFFECTS, f"no case shows what {field} does"
    effect = EFFECTS[field]

    async def seen(**overrides: Any) -> object:
        clock = FixedClock()
        storage = flat_storage(clock=clock, **overrides)
        with monkeypatch.context() as patches:
            return await effect.observe(Bench(storage, Path(overrides["storage_base_path"]), clock, patches))

    value = effect.value
    if isinstance(value, str):
        value = value.replace("{tmp}", str(tmp_path))
    assert value != getattr(StorageConfig(), field)
    assert await seen(storage_base_path=str(tmp_path / "default")) == effect.by_default
    assert await seen(**{"storage_base_path": str(tmp_path / "store"), field: value}) == effect.then


def test_there_are_no_cases_for_fields_that_are_gone() -> None:
    assert EFFECTS.keys() - set(FIELDS) == set()


def test_the_specifications_fields_and_defaults_are_there() -> None:
    specification = {
        "storage_base_path": "./data", "user_data_directory_name": "users",
        "panel_sessions_directory_name": "panel_sessions", "global_personas_directory_name": "personas_global",
        "system_config_directory_name": "system", "session_id_prefix": "chat_session", "panel_id_prefix": "panel",
        "session_timestamp_format": "%Y%m%d_%H%M%S", "context_snapshot_timestamp_format": "%Y%m%d_%H%M%S",
        "user_profile_filename": "profile.json", "session_metadata_filename": "session.json",
        "messages_filename": "messages.jsonl", "situational_context_filename": "situational_context.json",
        "document_metadata_filename": "metadata.json", "max_message_size_bytes": 1_048_576,
        "max_document_size_bytes": 104_857_600, "max_messages_per_session": 100_000, "max_sessions_per_user": 1_000,
        "max_context_history_snapshots": 100, "message_pagination_default_limit": 100,
        "session_list_default_limit": 50, "search_results_default_limit": 20, "jsonl_read_buffer_size": 8192,
        "atomic_write_temp_suffix": ".tmp", "backup_before_delete": True, "auto_cleanup_empty_directories": True,
        "validate_json_on_read": True, "search_include_message_content": True, "search_include_context": True,
        "search_include_metadata": False, "full_text_search_min_word_length": 3, "panel_max_personas": 10,
        "panel_insight_retention_days": 90, "panel_message_threading_enabled": True,
        "allowed_document_extensions": [".pdf", ".txt", ".md", ".json", ".csv", ".png", ".jpg", ".jpeg"],
        "document_storage_subdirectory_name": "documents", "document_analysis_subdirectory_name": "analysis",
        "context_history_subdirectory_name": "context_history", "context_summary_max_length": 500,
        "context_key_points_max_count": 10, "context_confidence_threshold": 0.7,
    }  # fmt: skip
    config = StorageConfig()
    assert {name: getattr(config, name) for name in specification} == specification


# --- values that are refused ---------------------------------------------------------------------------

WRONG: list[tuple[str, Any]] = [
    ("storage_base_path", ""),
    ("storage_base_path", "a\0b"),
    ("storage_base_path", None),
    ("storage_base_path", b"data"),
    ("user_data_directory_name", "a/b"),
    ("user_data_directory_name", ".."),
    ("user_data_directory_name", ".hidden"),
    ("user_data_directory_name", "a."),
    ("user_data_directory_name", "con"),
    ("panel_sessions_directory_name", ""),
    ("panel_sessions_directory_name", "USERS"),
    ("system_config_directory_name", "users"),
    ("global_personas_directory_name", "a b"),
    ("durability", ""),
    ("durability", "FULL"),
    ("durability", None),
    ("journal_max_bytes", -1),
    ("journal_max_bytes", 1.5),
    ("journal_max_age_seconds", -0.1),
    ("journal_max_age_seconds", float("nan")),
    ("session_id_prefix", ""),
    ("session_id_prefix", "Chat"),
    ("session_id_prefix", "../x"),
    ("panel_id_prefix", "a b"),
    ("session_timestamp_format", "%H:%M"),
    ("session_timestamp_format", "%A"),
    ("session_timestamp_format", ""),
    ("session_timestamp_format", "/"),
    ("context_snapshot_timestamp_format", "%d%m%Y"),
    ("user_profile_filename", "../profile.json"),
    ("session_metadata_filename", "messages.jsonl"),
    ("messages_filename", "a\\b"),
    ("messages_filename", "x" * 101),
    ("situational_context_filename", "documents"),
    ("document_metadata_filename", "nul"),
    ("max_message_size_bytes", -1),
    ("max_message_size_bytes", 10**9),
    ("max_document_size_bytes", 1.5),
    ("max_messages_per_session", "100"),
    ("max_sessions_per_user", True),
    ("max_context_history_snapshots", None),
    ("message_pagination_default_limit", -5),
    ("session_list_default_limit", [1]),
    ("search_results_default_limit", "x"),
    ("jsonl_read_buffer_size", 0),
    ("max_open_files", 0),
    ("atomic_write_temp_suffix", ""),
    ("atomic_write_temp_suffix", "tmp"),
    ("atomic_write_temp_suffix", "./x"),
    ("backup_before_delete", 1),
    ("auto_cleanup_empty_directories", "yes"),
    ("validate_json_on_read", None),
    ("search_include_message_content", 0),
    ("search_include_context", "true"),
    ("search_include_metadata", []),
    ("search_index_path", None),
    ("full_text_search_min_word_length", 0),
    ("panel_max_personas", -1),
    ("panel_insight_retention_days", 0.5),
    ("panel_message_threading_enabled", "no"),
    ("allowed_document_extensions", ".pdf"),
    ("allowed_document_extensions", ["pdf"]),
    ("allowed_document_extensions", [".p/df"]),
    ("allowed_document_extensions", ["." + "x" * 21]),
    ("allowed_document_extensions", [1]),
    ("allowed_document_extensions", (".pdf",)),
    ("document_storage_subdirectory_name", "Messages.jsonl"),
    ("document_analysis_subdirectory_name", "a/b"),
    ("document_compression_threshold_bytes", -1),
    ("context_history_subdirectory_name", "\ud800"),
    ("context_summary_max_length", "500"),
    ("context_key_points_max_count", -1),
    ("context_confidence_threshold", 1.1),
    ("context_confidence_threshold", float("nan")),
    ("context_confidence_threshold", "0.7"),
    ("storage_url", None),
    ("trash_retention_days", -1),
    ("lock_timeout_seconds", float("inf")),
    ("lock_timeout_seconds", -1),
    ("lock_timeout_seconds", 10**400),
    ("database_timeout_seconds", -1),
    ("database_connect_timeout_seconds", "10"),
    ("database_pool_size", 0),
    ("database_partitions", -1),
    ("object_store_connect_timeout_seconds", -1),
    ("object_store_timeout_seconds", "10"),
    ("object_store_retries", -1),
    ("object_store_single_writer", 1),
    ("watch_poll_seconds", 0),
    ("watch_poll_seconds", "0.5"),
    ("cache_timeout_seconds", -1),
    ("cache_lease_seconds", "1"),
    ("cache_entry_seconds", -1),
    ("cache_entry_max_bytes", 1.5),
    ("allow_network_file_system", "false"),
]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=[f"{field}={ascii(value)[:20]}" for field, value in WRONG])
def test_a_value_that_cannot_work_is_refused_by_the_name_of_its_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=field) as error:
        StorageConfig(**{field: value})
    assert len(str(error.value)) < 400
    for kind in (DevelopmentConfig, ProductionConfig):
        with pytest.raises(ConfigurationError):
            kind(**{field: value})


@pytest.mark.parametrize(("field", "value"), WRONG, ids=[f"{field}={ascii(value)[:20]}" for field, value in WRONG])
def test_a_value_that_cannot_work_is_refused_when_it_is_set_later_too(field: str, value: Any) -> None:
    for kind in (StorageConfig, DevelopmentConfig, ProductionConfig):
        config = kind()
        with pytest.raises(ConfigurationError) as made:
            kind(**{field: value})
        with pytest.raises(ConfigurationError) as later:
            setattr(config, field, value)
        assert str(later.value) == str(made.value)
        assert config == kind(), "it keeps the value it had"


def test_a_setting_can_be_changed_later(tmp_path: Path) -> None:
    config = ProductionConfig()
    config.max_open_files = 12
    config.storage_base_path = tmp_path  # type: ignore[assignment]
    config.messages_filename = "log.jsonl"
    config.session_metadata_filename = "messages.jsonl"  # free now
    same = ProductionConfig(
        max_open_files=12,
        storage_base_path=str(tmp_path),
        messages_filename="log.jsonl",
        session_metadata_filename="messages.jsonl",
    )
    assert config == same == copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == dataclasses.replace(config)
    for other in (copy.copy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
        with pytest.raises(ConfigurationError, match="max_open_files"):
            other.max_open_files = 0
        other.max_open_files = 13
    assert config.max_open_files == 12


@pytest.mark.parametrize("kind", [StorageConfig, DevelopmentConfig, ProductionConfig])
def test_a_setting_that_there_is_not_is_refused_with_the_nearest_name(kind: type[StorageConfig]) -> None:
    wrong: dict[str, Any] = {"max_open_file": 12}
    with pytest.raises(ConfigurationError, match=r"'max_open_file'.*Did you mean 'max_open_files'\?"):
        kind(**wrong)
    config = kind()
    with pytest.raises(ConfigurationError, match=r"'max_open_file'.*Did you mean 'max_open_files'\?"):
        config.max_open_file = 12  # type: ignore[attr-defined]
    assert not hasattr(config, "max_open_file")


def test_the_constructor_shows_its_settings() -> None:
    for kind in (StorageConfig, DevelopmentConfig, ProductionConfig):
        assert list(inspect.signature(kind).parameters) == FIELDS


def test_every_field_has_a_wrong_value() -> None:
    assert {field for field, _ in WRONG} == set(FIELDS)


def test_a_path_may_be_a_path_object(tmp_path: Path) -> None:
    assert StorageConfig(storage_base_path=tmp_path).storage_base_path == str(tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({"storage_base_path": "a/b"}, "a/b"),
        ({"storage_base_path": "a", "storage_url": "file:{tmp}/b%20c"}, "{tmp}/b c"),
        ({"storage_base_path": "a", "storage_url": "memory:"}, "a"),
    ],
)
def test_the_base_path_of_a_manager_is_where_its_files_are(
    settings: dict[str, Any], folder: str, tmp_path: Path
) -> None:
    config = StorageConfig(**{name: text.replace("{tmp}", str(tmp_path)) for name, text in settings.items()})
    assert StorageManager(config).base_path == Path(folder.replace("{tmp}", str(tmp_path)))


def test_the_base_path_is_that_of_a_backend_that_was_passed_in(tmp_path: Path) -> None:
    config = StorageConfig(storage_base_path=str(tmp_path / "a"))
    for other in (config, StorageConfig(storage_base_path=str(tmp_path / "b"))):
        assert StorageManager(other, backend=open_backend(config)).base_path == tmp_path / "a"
    assert StorageManager(config, backend=MemoryBackend(config)).base_path == tmp_path / "a"


def test_a_whole_number_will_do_for_a_number() -> None:
    assert StorageConfig(context_confidence_threshold=1, lock_timeout_seconds=0).context_confidence_threshold == 1


def test_secrets_do_not_print() -> None:
    assert "secret" not in repr(StorageConfig(storage_url="file:secret"))


# --- load_config ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("CHATDB_"):
            monkeypatch.delenv(name)


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "chatdb.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_without_anything_the_defaults_are_loaded() -> None:
    assert load_config() == StorageConfig()


@pytest.mark.parametrize(
    ("environment", "kind"),
    [("development", DevelopmentConfig), ("staging", StorageConfig), ("production", ProductionConfig)],
)
def test_an_environment_names_a_class(environment: str, kind: type[StorageConfig]) -> None:
    assert load_config(environment=environment) == kind()
    assert type(load_config(environment=environment)) is kind


def test_a_later_source_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = "message_pagination_default_limit"
    path = written(tmp_path, {limit: 3})
    assert getattr(load_config(), limit) == 100
    assert getattr(load_config(environment="production"), limit) == 50
    assert getattr(load_config(path, "production"), limit) == 3
    monkeypatch.setenv(f"CHATDB_{limit.upper()}", "4")
    assert getattr(load_config(path, "production"), limit) == 4
    assert getattr(load_config(path, "production", message_pagination_default_limit=5), limit) == 5
    assert load_config(path, "production").storage_base_path == "/var/lib/chatdb/data"


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("storage_base_path", "/srv/chats", "/srv/chats"),
        ("storage_base_path", "007", "007"),
        ("user_data_directory_name", "", ""),
        ("max_open_files", "12", 12),
        ("max_open_files", " 12 ", 12),
        ("lock_timeout_seconds", "0.5", 0.5),
        ("lock_timeout_seconds", "3", 3.0),
        ("backup_before_delete", "true", True),
        ("backup_before_delete", "False", False),
        ("backup_before_delete", "1", True),
        ("backup_before_delete", "0", False),
        ("backup_before_delete", "YES", True),
        ("backup_before_delete", "no", False),
        ("allowed_document_extensions", '[".pdf", ".xyz"]', [".pdf", ".xyz"]),
        ("allowed_document_extensions", "[]", []),
    ],
)
def test_a_variable_and_a_setting_are_read_as_the_fields_type(
    field: str, text: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"CHATDB_{field.upper()}", text)
    loaded = getattr(load_config(), field)
    assert (loaded, type(loaded)) == (value, type(value))
    assert set_from_text([f"{field}={text}"]) == {field: value}


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("max_open_files", "many"), ("max_open_files", "1.5"), ("max_open_files", ""), ("max_open_files", "0"),
        ("lock_timeout_seconds", "soon"), ("lock_timeout_seconds", "nan"), ("backup_before_delete", "maybe"),
        ("backup_before_delete", ""), ("allowed_document_extensions", ".pdf"), ("allowed_document_extensions", "{}"),
        ("allowed_document_extensions", "[1]"), ("allowed_document_extensions", "[" * 100_000),
    ],
)  # fmt: skip
def test_a_variable_that_does_not_fit_its_field_is_refused_by_name(
    field: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"CHATDB_{field.upper()}", text)
    with pytest.raises(ConfigurationError, match=field):
        load_config()
    with pytest.raises(ConfigurationError, match=field):
        load_config(**set_from_text([f"{field}={text}"]))


def test_an_unknown_variable_is_a_warning_that_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATDB_MAX_OPEN_FILE", "12")
    with pytest.warns(UserWarning, match="CHATDB_MAX_OPEN_FILE is no setting; did you mean CHATDB_MAX_OPEN_FILES"):
        assert load_config() == StorageConfig()


def test_variables_of_others_are_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATDBX_MAX_OPEN_FILES", "12")
    monkeypatch.setenv("chatdb_max_open_files", "12")
    monkeypatch.setenv("MAX_OPEN_FILES", "12")
    assert load_config() == StorageConfig()


def test_the_library_never_reads_the_environment_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATDB_MAX_OPEN_FILES", "12")
    assert StorageConfig().max_open_files == 256
    assert StorageManager().config.max_open_files == 256


def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    path = written(tmp_path, {"max_open_file": 12})
    with pytest.raises(ConfigurationError, match=r"'max_open_file'.*Did you mean 'max_open_files'\?") as error:
        load_config(path)
    assert str(path) in str(error.value)
    with pytest.raises(ConfigurationError, match=r"'max_open_file'.*Did you mean 'max_open_files'\?"):
        load_config(max_open_file=12)
    with pytest.raises(ConfigurationError, match=r"'max_open_file'.*Did you mean 'max_open_files'\?"):
        set_from_text(["max_open_file=12"])
    with pytest.raises(ConfigurationError, match="KEY=VALUE"):
        set_from_text(["max_open_files"])
    with pytest.raises(ConfigurationError, match=r"Unknown setting ''\. docs/configuration\.md lists all settings\."):
        set_from_text(["=1"])


@pytest.mark.parametrize(
    ("value", "suggestion"),
    [
        ("fast", None),
        ("none", None),
        ("disk", None),
        ("on", None),
        ("ful", "full"),
        ("FULL", "full"),
        ("norm", "normal"),
    ],
)
def test_a_durability_is_suggested_only_if_it_is_really_near(value: str, suggestion: str | None) -> None:
    with pytest.raises(ConfigurationError, match="durability must be one of full, normal, os") as error:
        StorageConfig(durability=value)
    assert error.value.hint == (suggestion and f"Did you mean {suggestion!r}?")


def test_no_name_is_suggested_for_one_that_is_like_none(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: dict[str, Any] = {"path": "./chats"}
    with pytest.raises(ConfigurationError, match=r"'path'\. docs/configuration\.md lists all settings\."):
        StorageConfig(**wrong)
    monkeypatch.setenv("CHATDB_HOST", "x")
    with pytest.warns(UserWarning, match=r"CHATDB_HOST is no setting\.$"):
        load_config()


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for config in (StorageConfig(storage_base_path="~/chats"), StorageConfig(storage_url="file:~/chats")):
        assert StorageManager(config).base_path == tmp_path / "chats"
    config = StorageConfig(search_index_path="~")
    config.storage_base_path = "~root/chats"
    assert config.search_index_path == str(tmp_path)
    assert config.storage_base_path == f"{os.path.expanduser('~root')}/chats"
    assert StorageConfig(storage_base_path="./~/chats").storage_base_path == "./~/chats"


@pytest.mark.parametrize("field", ["storage_base_path", "search_index_path", "storage_url"])
def test_the_home_of_nobody_is_refused(field: str) -> None:
    url = "file:" if field == "storage_url" else ""
    settings: dict[str, Any] = {field: f"{url}~nosuchuser/chats"}
    with pytest.raises(ConfigurationError, match=rf"{field} begins with '~nosuchuser'.*Begin with '\./'"):
        StorageManager(StorageConfig(**settings))


def test_a_manager_of_a_path_says_what_to_pass() -> None:
    wrong: Any = "./chats"
    with pytest.raises(ConfigurationError, match=r"not str\. .*StorageConfig\(storage_base_path=\.\.\.\)"):
        StorageManager(wrong)


@pytest.mark.parametrize("url", ["", "memory:"])
async def test_a_manager_that_was_closed_is_not_entered_again(tmp_path: Path, url: str) -> None:
    storage = StorageManager(StorageConfig(storage_base_path=str(tmp_path), storage_url=url))
    async with storage:
        pass
    with pytest.raises(ClosedError, match="Open a new StorageManager"):
        async with storage:
            pass


def test_an_unknown_environment_is_refused() -> None:
    for environment in ("prod", "", "Production", "default"):
        with pytest.raises(ConfigurationError, match="development, staging, production"):
            load_config(environment=environment)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("max_open_files: 12", "not JSON"),
        ("[]", "JSON object"),
        ("null", "JSON object"),
        ('{"max_open_files": "12"}', "max_open_files must be a whole number"),
        ('{"max_open_files": NaN}', "max_open_files must be a whole number"),
        ('{"storage_base_path": null}', "storage_base_path must be a string"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(content: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        load_config(written(tmp_path, content))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chatdb.json"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigurationError, match="not JSON"):
        load_config(path)


def test_a_file_that_is_missing_or_unreadable_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.json' does not exist"):
        load_config(tmp_path / "nowhere.json")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_config(tmp_path)
    with pytest.raises(ConfigurationError):
        load_config("a\0b")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("", ""),
        ("file:/srv/chats", "file:/srv/chats"),
        ("postgresql://db/chats", "postgresql://db/chats"),
        ("postgresql://db:5432,other:5433/chats", "postgresql://db:5432,other:5433/chats"),
        ("postgresql://ada@db/chats", "postgresql://ada@db/chats"),
        ("postgresql://ada:hunter2@db:5432/chats", "postgresql://ada:***@db:5432/chats"),
        ("postgresql://ada:hun@ter/2?x#y@db/chats", "postgresql://ada:***@db/chats"),
        ("redis://:hunter2@cache", "redis://:***@cache"),
        ("postgresql:///chats?user=ada&password=hunter2&x=1", "postgresql:///chats?user=ada&password=***&x=1"),
        ("postgresql:///chats?pass%77ord=hunter2", "postgresql:///chats?pass%77ord=***"),
        ("postgresql://db/x?sslPassword=hunter2", "postgresql://db/x?sslPassword=***"),
        ("file:x?cache=redis%3A%2F%2F%3Ahunter2%40h", "file:x?cache=***"),
        (
            "mirrored:?from=file%3Achats&to=postgresql%3A%2F%2Fada%3Ahunter2%40db%2Fchats",
            "mirrored:?from=file%3Achats&to=postgresql%3A%2F%2Fada%3A***%40db%2Fchats",
        ),
        (
            "mirrored:?to=postgresql%3A%2F%2F%2Fx%3Fpassword%3Dhunter2",
            "mirrored:?to=postgresql%3A%2F%2F%2Fx%3Fpassword%3D***",
        ),
        ("mirrored:?to=postgresql%3A%2F%2Fada%3Ahunter2%2540x%40db", "mirrored:?to=postgresql%3A%2F%2Fada%3A***%40db"),
        (
            "mirrored:?from=mirrored%3A%3Fto%3Dredis%253A%252F%252F%253Ahunter2%2540h",
            "mirrored:?from=mirrored%3A%3Fto%3Dredis%253A%252F%252F%253A***%2540h",
        ),
        ("mirrored:?to=postgresql://ada:hunter2@db", "mirrored:?to=postgresql%3A%2F%2Fada%3A***%40db"),
        ("mirrored:postgresql://ada:hunter2@db", "mirrored:postgresql://ada:***@db"),
        (
            "cached:?store=memory%3A&cache=redis%3A%2F%2Fhunter2%40h",
            "cached:?store=memory%3A&cache=redis%3A%2F%2F***%40h",
        ),
        ("redis://hunter2@h:1/2?db=3", "redis://***@h:1/2?db=3"),
        ("rediss://h?credential=hunter2&x", "rediss://h?credential=***&x"),
        ("unix:///tmp/socket?db=1", "unix:///tmp/socket?db=1"),
        (
            "cached:?store=memory%3A&cache=redis%253A%252F%252Fada%253Ahunter2%2540h%253Fdb%253D1",
            "cached:?store=memory%3A&cache=redis%3A%2F%2Fada%3A***%40h%3Fdb%3D1",
        ),
        (
            "cached:?store=memory:&cache=rediss://h?ssl_keyfile=/k&ssl_password=hunter2",
            "cached:?store=memory%3A&cache=rediss%3A%2F%2Fh%3Fssl_keyfile%3D***&ssl_password=***",
        ),
        (
            "cached:?store=memory%3A&cache=redis://h?a=1&credential=hunter2",
            "cached:?store=memory%3A&cache=redis%3A%2F%2Fh%3Fa%3D***&credential=***",
        ),
        ("postgresql://db/x?options=-csearch_path%3Dname", "postgresql://db/x?options=-csearch_path%3Dname"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert without_password(url) == shown


def test_a_storage_url_of_a_wrong_type_is_not_shown() -> None:
    with pytest.raises(ConfigurationError) as caught:
        StorageConfig(storage_url=b"postgresql://ada:hunter2@db")  # type: ignore[arg-type]
    assert "hunter2" not in str(caught.value)
