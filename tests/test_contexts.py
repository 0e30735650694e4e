"""Situational contexts: the current one of a session, and its history."""

import asyncio
import json
import logging
import re
from dataclasses import replace
from typing import Any

import pytest

from flatfile_chat_database import (
    IntegrityError,
    NotFoundError,
    SituationalContext,
    StorageLimitExceeded,
    StorageManager,
    UnavailableError,
    ValidationError,
)

from .clock import FixedClock
from .conftest import MakeStorage
from .contents import ILLEGAL_IDS, contents, key_of, unchanged

NOON = "2026-01-31T12:00:00.000000+00:00"
CONTEXT = SituationalContext("Files in Python", ["a beginner"], {"topics": ["I/O", "文件"]}, NOON, 0.9)


async def begin(storage: StorageManager) -> None:
    """Make the session "s" of the user "ada"."""
    await storage.create_user("ada")
    await storage.create_session("ada", session_id="s")


async def save(storage: StorageManager, *summaries: str) -> None:
    for summary in summaries:
        assert await storage.save_context_snapshot("ada", "s", SituationalContext(summary)) is True


async def history(storage: StorageManager, limit: int | None = None, **arguments: Any) -> str:
    found = await storage.get_context_history("ada", "s", limit, **arguments)
    return " ".join(context.summary for context in found)


async def snapshots(storage: StorageManager) -> list[str]:
    """Return the names of the files of the history, as `ls` shows them."""
    return await storage.backend.list_children("users/ada/s/context_history")


# --- the current one -----------------------------------------------------------------------------------


async def test_the_current_context_comes_back_as_it_was_given(storage: StorageManager) -> None:
    await begin(storage)
    assert await storage.update_context("ada", "s", CONTEXT) is True
    assert await storage.get_context("ada", "s") == CONTEXT


async def test_a_context_has_defaults_for_all_but_its_summary(storage: StorageManager) -> None:
    await begin(storage)
    await storage.update_context("ada", "s", SituationalContext("short"))
    context = await storage.get_context("ada", "s")
    assert context is not None
    assert (context.key_points, context.entities, context.confidence) == ([], {}, 1.0)
    assert context.timestamp.endswith("+00:00")


async def test_the_file_of_a_context_is_the_one_that_the_layout_documents(storage: StorageManager) -> None:
    await begin(storage)
    await storage.update_context("ada", "s", CONTEXT)
    data = await storage.backend.read("users/ada/s/situational_context.json")
    assert list(json.loads(data or b"").items()) == [
        ("summary", "Files in Python"),
        ("key_points", ["a beginner"]),
        ("entities", {"topics": ["I/O", "文件"]}),
        ("timestamp", NOON),
        ("confidence", 0.9),
    ]


async def test_an_update_replaces_the_current_context_and_makes_no_snapshot(storage: StorageManager) -> None:
    await begin(storage)
    await storage.update_context("ada", "s", CONTEXT)
    await storage.update_context("ada", "s", replace(CONTEXT, summary="new", key_points=[]))
    assert await storage.get_context("ada", "s") == replace(CONTEXT, summary="new", key_points=[])
    assert await storage.count_context_history("ada", "s") == 0


async def test_a_context_of_little_confidence_leaves_the_current_one(make_storage: MakeStorage) -> None:
    storage = make_storage(context_confidence_threshold=0.5)
    await begin(storage)
    await storage.update_context("ada", "s", CONTEXT)
    async with unchanged(storage):
        assert await storage.update_context("ada", "s", replace(CONTEXT, summary="?", confidence=0.49)) is False
        assert await storage.update_context("ada", "s", replace(CONTEXT, summary="?", confidence=0)) is False
    assert await storage.update_context("ada", "s", replace(CONTEXT, confidence=0.5)) is True
    assert await storage.update_context("ada", "s", replace(CONTEXT, confidence=1)) is True
    context = await storage.get_context("ada", "s")
    assert context is not None and context.confidence == 1.0


async def test_a_deleted_context_is_gone_and_the_history_stays(storage: StorageManager) -> None:
    await begin(storage)
    await storage.update_context("ada", "s", CONTEXT)
    await save(storage, "one")
    assert await storage.delete_context("ada", "s") is True
    assert await storage.get_context("ada", "s") is None
    assert await history(storage) == "one"
    async with unchanged(storage):
        assert await storage.delete_context("ada", "s") is False
        assert await storage.delete_context("bob", "s") is False


async def test_contexts_written_at_once_leave_a_whole_one(storage: StorageManager) -> None:
    await begin(storage)
    written = [replace(CONTEXT, summary=str(n), key_points=[str(n)] * 5) for n in range(30)]
    assert all(await asyncio.gather(*(storage.update_context("ada", "s", context) for context in written)))
    assert await storage.get_context("ada", "s") in written


# --- history -------------------------------------------------------------------------------------------


async def test_the_history_is_oldest_first_and_a_limit_takes_the_newest(make_storage: MakeStorage) -> None:
    clock = FixedClock()
    storage = make_storage(clock=clock)
    await begin(storage)
    for summary in "abcde":
        await save(storage, summary)
        clock.advance(1)
    assert await history(storage) == "a b c d e"
    assert await history(storage, 2) == "d e"
    assert await history(storage, 0) == ""
    assert await history(storage, 99) == "a b c d e"
    assert await storage.count_context_history("ada", "s") == 5
    assert await storage.get_context("ada", "s") is None


async def test_a_snapshot_comes_back_as_it_was_given_whatever_its_confidence(storage: StorageManager) -> None:
    await begin(storage)
    unsure = replace(CONTEXT, confidence=0.1)
    assert await storage.save_context_snapshot("ada", "s", unsure) is True
    assert await storage.get_context_history("ada", "s") == [unsure]


async def test_snapshots_are_named_after_their_second_and_numbered_within_it(make_storage: MakeStorage) -> None:
    clock = FixedClock()
    storage = make_storage(clock=clock)
    await begin(storage)
    await save(storage, "a", "b", "c")
    clock.advance(1)
    await save(storage, "d")
    assert await snapshots(storage) == [
        "context_20260131_120000.json",
        "context_20260131_120000_001.json",
        "context_20260131_120000_002.json",
        "context_20260131_120001.json",
    ]


async def test_the_names_of_snapshots_follow_the_configured_format(make_storage: MakeStorage) -> None:
    storage = make_storage(clock=FixedClock(), context_snapshot_timestamp_format="%Y-%jt%H-%M-%S")
    await begin(storage)
    await save(storage, "a", "b")
    assert await snapshots(storage) == ["context_2026-031t12-00-00.json", "context_2026-031t12-00-00_001.json"]
    assert await history(storage) == "a b"


async def test_the_order_stays_right_when_the_clock_goes_back(make_storage: MakeStorage) -> None:
    clock = FixedClock()
    storage = make_storage(clock=clock)
    await begin(storage)
    await save(storage, "a")
    clock.advance(-3600)
    await save(storage, "b", "c")
    assert await history(storage) == "a b c"
    clock.advance(7200)
    await save(storage, "d")
    assert await history(storage) == "a b c d"
    assert (await snapshots(storage))[-1] == "context_20260131_130000.json"


async def test_numbers_are_ordered_as_numbers(make_storage: MakeStorage) -> None:
    storage = make_storage(clock=FixedClock())
    await begin(storage)
    await save(storage, "a")
    for number in ("_999", "_1000"):
        key = key_of(
            storage, "context_snapshot", user_id="ada", session_id="s", snapshot_id=f"context_20260131_120000{number}"
        )
        data = json.dumps({"summary": number, "key_points": [], "entities": {}, "timestamp": NOON, "confidence": 1})
        await storage.backend.write(key, data.encode())
    await save(storage, "last")
    assert await history(storage) == "a _999 _1000 last"
    assert "context_20260131_120000_1001.json" in await snapshots(storage)


async def test_the_history_keeps_the_newest_of_the_configured_number(make_storage: MakeStorage) -> None:
    clock = FixedClock()
    storage = make_storage(clock=clock, max_context_history_snapshots=3)
    await begin(storage)
    await save(storage, "a", "b", "c")
    clock.advance(1)
    await save(storage, "d", "e")
    assert await history(storage) == "c d e"
    assert await storage.count_context_history("ada", "s") == 3
    fewer = make_storage(clock=clock, max_context_history_snapshots=2)
    await save(fewer, "f")
    assert await history(storage) == "e f"


async def test_a_history_of_no_length_keeps_nothing_and_says_so(make_storage: MakeStorage) -> None:
    storage = make_storage(max_context_history_snapshots=0)
    await begin(storage)
    async with unchanged(storage):
        assert await storage.save_context_snapshot("ada", "s", CONTEXT) is False
        with pytest.raises(NotFoundError):
            await storage.save_context_snapshot("ada", "t", CONTEXT)
    assert await storage.get_context_history("ada", "s") == []


async def test_snapshots_saved_at_once_are_all_there(make_storage: MakeStorage) -> None:
    storage = make_storage(clock=FixedClock())
    await begin(storage)
    saving = (storage.save_context_snapshot("ada", "s", SituationalContext(f"{n:02}")) for n in range(50))
    assert all(await asyncio.gather(*saving))
    assert sorted((await history(storage)).split()) == [f"{n:02}" for n in range(50)]


async def test_snapshots_saved_at_once_by_two_managers_are_all_there(make_storage: MakeStorage) -> None:
    clock = FixedClock()
    managers = [make_storage(clock=clock), make_storage(clock=clock)]
    await begin(managers[0])
    saving = (managers[n % 2].save_context_snapshot("ada", "s", SituationalContext(f"{n:02}")) for n in range(20))
    assert all(await asyncio.gather(*saving))
    assert sorted((await history(managers[0])).split()) == [f"{n:02}" for n in range(20)]


async def test_reading_what_is_absent_finds_nothing_and_creates_nothing(storage: StorageManager) -> None:
    assert await storage.get_context("ada", "s") is None
    assert await storage.get_context_history("ada", "s") == []
    assert await storage.count_context_history("ada", "s") == 0
    assert await contents(storage) == {}


async def test_writing_into_an_absent_session_is_an_error_and_creates_nothing(storage: StorageManager) -> None:
    await begin(storage)
    unsure = replace(CONTEXT, confidence=0.1)
    async with unchanged(storage):
        for user_id, session_id in (("ada", "t"), ("bob", "s")):
            for call in (
                storage.update_context(user_id, session_id, CONTEXT),
                storage.update_context(user_id, session_id, unsure),
                storage.save_context_snapshot(user_id, session_id, CONTEXT),
            ):
                with pytest.raises(NotFoundError, match=f"The session '{session_id}' of user '{user_id}'"):
                    await call


# --- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "limit_name", "value"),
    [
        ({"summary": "é" * 21}, "context_summary_max_length", 21),
        ({"key_points": ["x"] * 3}, "context_key_points_max_count", 3),
        ({"summary": "x" * 21, "confidence": 0.1}, "context_summary_max_length", 21),
    ],
    ids=["summary", "key points", "unsure"],
)
async def test_a_context_over_a_limit_is_refused_and_changes_nothing(
    make_storage: MakeStorage, changes: dict[str, Any], limit_name: str, value: int
) -> None:
    storage = make_storage(context_summary_max_length=20, context_key_points_max_count=2)
    await begin(storage)
    await storage.update_context("ada", "s", replace(CONTEXT, summary="é" * 20, key_points=["x"] * 2))
    context = replace(CONTEXT, **changes)
    async with unchanged(storage):
        for call in (
            storage.update_context("ada", "s", context),
            storage.save_context_snapshot("ada", "s", context),
        ):
            with pytest.raises(StorageLimitExceeded, match=limit_name) as caught:
                await call
            assert (caught.value.limit_name, caught.value.value) == (limit_name, value)


@pytest.mark.parametrize(
    "changes",
    [
        {"summary": None},
        {"summary": "\ud800"},
        {"key_points": "text"},
        {"key_points": [1]},
        {"entities": []},
        {"entities": {"a": "text"}},
        {"entities": {1: ["a"]}},
        {"entities": {"a": ["\ud800"]}},
        {"timestamp": "now"},
        {"timestamp": "2026-01-01T00:00:00"},
        {"confidence": 1.1},
        {"confidence": -0.1},
        {"confidence": float("nan")},
        {"confidence": "1"},
        {"confidence": True},
        {"confidence": None},
    ],
    ids=ascii,
)
async def test_a_context_with_a_field_that_does_not_fit_is_refused_and_changes_nothing(
    storage: StorageManager, changes: dict[str, Any]
) -> None:
    await begin(storage)
    context = replace(CONTEXT, **changes)
    async with unchanged(storage):
        for call in (
            storage.update_context("ada", "s", context),
            storage.save_context_snapshot("ada", "s", context),
        ):
            with pytest.raises(ValidationError, match=rf"context\.{next(iter(changes))}"):
                await call


async def test_what_is_no_context_is_refused_and_changes_nothing(storage: StorageManager) -> None:
    await begin(storage)
    value: Any
    async with unchanged(storage):
        for value in (None, "text", {"summary": "x"}):
            with pytest.raises(ValidationError, match="must be a SituationalContext"):
                await storage.update_context("ada", "s", value)
            with pytest.raises(ValidationError, match="must be a SituationalContext"):
                await storage.save_context_snapshot("ada", "s", value)


@pytest.mark.parametrize("bad", ILLEGAL_IDS.values(), ids=ILLEGAL_IDS)
async def test_an_illegal_id_is_refused_everywhere_and_changes_nothing(storage: StorageManager, bad: Any) -> None:
    await begin(storage)
    async with unchanged(storage):
        for user_id, session_id, field in ((bad, "s", "user_id"), ("ada", bad, "session_id")):
            for call in (
                storage.update_context(user_id, session_id, CONTEXT),
                storage.get_context(user_id, session_id),
                storage.delete_context(user_id, session_id),
                storage.save_context_snapshot(user_id, session_id, CONTEXT),
                storage.get_context_history(user_id, session_id),
                storage.count_context_history(user_id, session_id),
            ):
                with pytest.raises(ValidationError, match=field):
                    await call


@pytest.mark.parametrize("limit", [-1, 1.0, True, "1"], ids=repr)
async def test_a_limit_that_is_no_count_is_refused(storage: StorageManager, limit: Any) -> None:
    with pytest.raises(ValidationError, match="limit must"):
        await storage.get_context_history("ada", "s", limit)


async def test_a_read_only_store_refuses_every_change(make_storage: MakeStorage) -> None:
    writer = make_storage()
    await begin(writer)
    await writer.update_context("ada", "s", CONTEXT)
    storage = make_storage(read_only=True)
    async with unchanged(storage):
        for call in (
            storage.update_context("ada", "s", CONTEXT),
            storage.save_context_snapshot("ada", "s", CONTEXT),
            storage.delete_context("ada", "s"),
        ):
            with pytest.raises(UnavailableError, match="read-only"):
                await call
    assert await storage.get_context("ada", "s") == CONTEXT


# --- damage --------------------------------------------------------------------------------------------


def document(**changes: Any) -> bytes:
    fields = {"summary": "x", "key_points": [], "entities": {}, "timestamp": NOON, "confidence": 1.0}
    return json.dumps(fields | changes).encode()


DAMAGED = {
    "half written": document()[:-20],
    "empty": b"",
    "a list": b"[]",
    "no summary": b"{}",
    "entities that are a list": document(entities=[]),
    "confidence that is text": document(confidence="high"),
}
CONTRADICTING = {"no timestamp": document(timestamp="then"), "naive timestamp": document(timestamp=NOON[:19])}


@pytest.mark.damage
@pytest.mark.parametrize("data", (DAMAGED | CONTRADICTING).values(), ids=DAMAGED | CONTRADICTING)
async def test_a_damaged_context_is_reported_and_can_be_replaced(storage: StorageManager, data: bytes) -> None:
    await begin(storage)
    key = key_of(storage, "context", user_id="ada", session_id="s")
    await storage.backend.write(key, data)
    async with unchanged(storage):
        with pytest.raises(IntegrityError, match=re.escape(key)):
            await storage.get_context("ada", "s")
    assert await storage.update_context("ada", "s", CONTEXT) is True  # it replaces the whole document
    assert await storage.get_context("ada", "s") == CONTEXT


@pytest.mark.damage
@pytest.mark.parametrize("data", (DAMAGED | CONTRADICTING).values(), ids=DAMAGED | CONTRADICTING)
async def test_the_history_goes_on_without_a_damaged_snapshot(
    make_storage: MakeStorage, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    storage = make_storage(clock=FixedClock())
    await begin(storage)
    await save(storage, "a", "b", "c", "d")
    key = key_of(storage, "context_snapshot", user_id="ada", session_id="s", snapshot_id="context_20260131_120000_002")
    await storage.backend.write(key, data)
    async with unchanged(storage):
        with caplog.at_level(logging.WARNING, "flatfile_chat_database"):
            assert await history(storage) == "a b d"
            assert await history(storage, 2) == "b d"
        assert key in caplog.text
        with pytest.raises(IntegrityError, match=re.escape(key)):
            await history(storage, strict=True)


@pytest.mark.damage
@pytest.mark.parametrize("data", CONTRADICTING.values(), ids=CONTRADICTING)
async def test_without_validate_json_on_read_a_timestamp_is_not_checked(make_storage: MakeStorage, data: bytes) -> None:
    storage = make_storage(validate_json_on_read=False)
    await begin(storage)
    await storage.backend.write(key_of(storage, "context", user_id="ada", session_id="s"), data)
    context = await storage.get_context("ada", "s")
    assert context is not None and context.summary == "x"


async def test_a_context_exists_or_not(storage: StorageManager) -> None:
    await storage.create_user("ada")
    await storage.create_session("ada", session_id="s")
    assert await storage.context_exists("ada", "s") is False
    assert await storage.context_exists("ada", "t") is False
    await storage.update_context("ada", "s", SituationalContext("about"))
    assert await storage.context_exists("ada", "s") is True
    await storage.delete_context("ada", "s")
    assert await storage.context_exists("ada", "s") is False
