"""Panels: conversations of several personas, with snapshots of those, and the insights that come of them."""

import asyncio
import json
import logging
from typing import Any

import pytest

from flatfile_chat_database import (
    ConflictError,
    IntegrityError,
    Message,
    NotFoundError,
    StorageLimitExceeded,
    StorageManager,
    UnavailableError,
    ValidationError,
)

from .clock import FixedClock
from .conftest import MakeStorage
from .contents import ILLEGAL_IDS, NOT_JSON, key_of, unchanged

# --- creating ------------------------------------------------------------------------------------------


async def test_a_panel_comes_back_as_it_was_created(make_storage: MakeStorage) -> None:
    storage = make_storage(clock=FixedClock())
    panel_id = await storage.create_panel("focus_group", ["a", "b"], {"rounds": 3})
    assert panel_id == "panel_20260131_120000"
    panel = await storage.get_panel(panel_id)
    assert panel is not None
    assert (panel.id, panel.type, panel.personas) == (panel_id, "focus_group", ["a", "b"])
    assert (panel.created_at, panel.config) == ("2026-01-31T12:00:00.000000+00:00", {"rounds": 3})
    assert panel.version
    assert await storage.panel_exists(panel_id)


async def test_panels_of_the_same_second_get_ids_in_order(make_storage: MakeStorage) -> None:
    storage, other = make_storage(clock=FixedClock()), make_storage(clock=FixedClock())
    made = [await (other if n % 2 else storage).create_panel("x", ["a"]) for n in range(4)]
    assert made == ["panel_20260131_120000", *(f"panel_20260131_120000_{n:03}" for n in range(1, 4))]


async def test_panels_created_at_once_all_get_their_own_id(make_storage: MakeStorage) -> None:
    storage, other = make_storage(), make_storage()
    made = await asyncio.gather(*((other if n % 2 else storage).create_panel("x", ["a"]) for n in range(20)))
    assert len(set(made)) == 20
    assert await storage.count_panels() == 20


async def test_the_prefix_and_the_folder_come_of_the_configuration(make_storage: MakeStorage) -> None:
    storage = make_storage(
        panel_id_prefix="round",
        panel_sessions_directory_name="rounds",
        session_timestamp_format="%Y",
        clock=FixedClock(),
    )
    assert await storage.create_panel("x", ["a"]) == "round_2026"
    assert await storage.backend.exists("rounds/round_2026/panel.json")


async def test_a_given_id_is_kept_and_cannot_be_given_twice(storage: StorageManager) -> None:
    assert await storage.create_panel("x", ["a"], panel_id="My Panel/1") == "My Panel/1"
    async with unchanged(storage):
        with pytest.raises(ConflictError, match="The panel 'My Panel/1' exists already"):
            await storage.create_panel("y", ["b"], panel_id="My Panel/1")
    panel = await storage.get_panel("My Panel/1")
    assert panel is not None
    assert panel.type == "x"


async def test_global_personas_are_kept_as_they_were_when_the_panel_was_made(storage: StorageManager) -> None:
    await storage.create_user("ada")
    await storage.save_persona("critic", {"name": "then"})
    await storage.save_persona("own", {"name": "of ada"}, "ada")
    panel_id = await storage.create_panel("x", ["critic", "own", "free"])
    await storage.save_persona("critic", {"name": "now"})
    await storage.save_persona("free", {"name": "later"})
    assert await storage.get_panel_personas(panel_id) == [{"id": "critic", "name": "then"}]
    await storage.delete_persona("critic")
    assert await storage.get_panel_personas(panel_id) == [{"id": "critic", "name": "then"}]


async def test_snapshots_come_by_id(storage: StorageManager) -> None:
    for persona_id in ("c", "a", "b"):
        await storage.save_persona(persona_id, {})
    panel_id = await storage.create_panel("x", ["c", "a", "b"])
    assert [persona["id"] for persona in await storage.get_panel_personas(panel_id)] == ["a", "b", "c"]


@pytest.mark.parametrize("bad", [None, 7, "", b"x", "\ud800"])
async def test_a_bad_type_is_refused(storage: StorageManager, bad: Any) -> None:
    async with unchanged(storage):
        with pytest.raises(ValidationError, match="panel_type"):
            await storage.create_panel(bad, ["a"])


@pytest.mark.parametrize("bad", [None, "ab", ("a",), {"a"}, 7])
async def test_personas_that_are_no_list_are_refused(storage: StorageManager, bad: Any) -> None:
    async with unchanged(storage):
        with pytest.raises(ValidationError, match="personas must be a list of ids"):
            await storage.create_panel("x", bad)


@pytest.mark.parametrize("bad", [*ILLEGAL_IDS.values()], ids=[*ILLEGAL_IDS])
async def test_illegal_ids_are_refused_everywhere(storage: StorageManager, bad: Any) -> None:
    async with unchanged(storage):
        with pytest.raises(ValidationError, match=r"personas\[1\]"):
            await storage.create_panel("x", ["a", bad])
        if bad is not None:
            with pytest.raises(ValidationError, match="panel_id"):
                await storage.create_panel("x", ["a"], panel_id=bad)
        for call in (
            storage.get_panel(bad),
            storage.panel_exists(bad),
            storage.update_panel(bad, {"config": {}}),
            storage.delete_panel(bad),
            storage.get_panel_personas(bad),
            storage.save_panel_insight(bad, {}),
            storage.list_panel_insights(bad),
            storage.count_panel_insights(bad),
        ):
            with pytest.raises(ValidationError, match="panel_id"):
                await call
        for insight_call in (storage.get_panel_insight("p", bad), storage.delete_panel_insight("p", bad)):
            with pytest.raises(ValidationError, match="insight_id"):
                await insight_call


async def test_a_panel_has_at_least_one_persona_and_none_twice(storage: StorageManager) -> None:
    async with unchanged(storage):
        with pytest.raises(ValidationError, match="personas must not be empty"):
            await storage.create_panel("x", [])
        with pytest.raises(ValidationError, match=r"personas\[2\] is 'a' again"):
            await storage.create_panel("x", ["a", "b", "a"])


async def test_a_panel_has_at_most_as_many_personas_as_the_configuration_allows(make_storage: MakeStorage) -> None:
    storage = make_storage(panel_max_personas=2)
    await storage.create_panel("x", ["a", "b"])
    async with unchanged(storage):
        with pytest.raises(StorageLimitExceeded, match="panel_max_personas") as raised:
            await storage.create_panel("x", ["a", "b", "c"])
    assert (raised.value.limit_name, raised.value.limit, raised.value.value) == ("panel_max_personas", 2, 3)


@pytest.mark.parametrize("bad", [*NOT_JSON.values()], ids=[*NOT_JSON])
async def test_a_config_that_is_no_json_object_is_refused(storage: StorageManager, bad: Any) -> None:
    panel_id = await storage.create_panel("x", ["a"])
    async with unchanged(storage):
        with pytest.raises(ValidationError, match="config"):
            await storage.create_panel("x", ["a"], bad)
        with pytest.raises(ValidationError, match="config"):
            await storage.update_panel(panel_id, {"config": bad})


# --- reading and changing ------------------------------------------------------------------------------


async def test_panels_are_listed_newest_first(make_storage: MakeStorage) -> None:
    clock = FixedClock()
    storage = make_storage(clock=clock, session_list_default_limit=3)
    made = []
    for panel_id in ("b", "a", "d", "c"):
        made.append(await storage.create_panel("x", ["a"], panel_id=panel_id))
        clock.advance(0.5)
    assert [panel.id for panel in await storage.list_panels()] == ["c", "d", "a"]
    assert [panel.id for panel in await storage.list_panels(10)] == made[::-1]
    assert [panel.id for panel in await storage.list_panels(2, 1)] == ["d", "a"]
    assert await storage.list_panels(0) == []
    assert await storage.list_panels(5, 4) == []
    assert await storage.count_panels() == 4


async def test_panels_of_one_moment_are_listed_by_id(make_storage: MakeStorage) -> None:
    storage = make_storage(clock=FixedClock())
    for panel_id in ("b", "c", "a"):
        await storage.create_panel("x", ["a"], panel_id=panel_id)
    assert [panel.id for panel in await storage.list_panels()] == ["c", "b", "a"]


@pytest.mark.parametrize("bad", [-1, 1.5, "1", True])
async def test_a_bad_limit_or_offset_is_refused(storage: StorageManager, bad: Any) -> None:
    for call in (storage.list_panels(bad), storage.list_panels(1, bad), storage.list_panel_insights("p", bad)):
        with pytest.raises(ValidationError, match=r"limit|offset"):
            await call


async def test_reading_what_is_absent_gives_nothing(storage: StorageManager) -> None:
    assert await storage.get_panel("p") is None
    assert not await storage.panel_exists("p")
    assert await storage.list_panels() == []
    assert await storage.count_panels() == 0
    assert await storage.get_panel_personas("p") == []
    assert await storage.list_panel_insights("p") == []
    assert await storage.get_panel_insight("p", "i") is None
    assert await storage.count_panel_insights("p") == 0


async def test_the_config_of_a_panel_is_replaced(storage: StorageManager) -> None:
    panel_id = await storage.create_panel("x", ["a"], {"old": 1})
    before = await storage.get_panel(panel_id)
    assert before is not None
    assert await storage.update_panel(panel_id, {"config": {"new": 2}})
    after = await storage.get_panel(panel_id)
    assert after is not None
    assert (after.config, after.created_at, after.personas) == ({"new": 2}, before.created_at, ["a"])
    assert after.version != before.version


async def test_a_stale_version_is_refused(storage: StorageManager) -> None:
    panel_id = await storage.create_panel("x", ["a"])
    stale = await storage.get_panel(panel_id)
    assert stale is not None
    await storage.update_panel(panel_id, {"config": {"n": 1}}, expected_version=stale.version)
    async with unchanged(storage):
        with pytest.raises(ConflictError):
            await storage.update_panel(panel_id, {"config": {"n": 2}}, expected_version=stale.version)


@pytest.mark.parametrize("field", ["id", "type", "personas", "created_at", "version", "colour"])
async def test_nothing_else_of_a_panel_can_be_set(storage: StorageManager, field: str) -> None:
    panel_id = await storage.create_panel("x", ["a"])
    async with unchanged(storage):
        with pytest.raises(ValidationError, match=rf"updates\.{field} cannot be set"):
            await storage.update_panel(panel_id, {"config": {"a": 1}, field: "x"})


async def test_writing_below_what_is_absent_raises(storage: StorageManager) -> None:
    await storage.create_panel("x", ["a"], panel_id="other")
    async with unchanged(storage):
        for call in (
            storage.update_panel("p", {"config": {}}),
            storage.save_panel_insight("p", {"text": "x"}),
            storage.add_panel_message("p", Message("a", "x")),
        ):
            with pytest.raises(NotFoundError, match="The panel 'p' does not exist"):
                await call


async def test_a_store_that_is_opened_read_only_keeps_its_panels(make_storage: MakeStorage) -> None:
    writer = make_storage()
    panel_id = await writer.create_panel("x", ["a"])
    reader = make_storage(read_only=True)
    assert await reader.panel_exists(panel_id)
    async with unchanged(writer):
        for call in (
            reader.create_panel("x", ["a"]),
            reader.update_panel(panel_id, {"config": {}}),
            reader.save_panel_insight(panel_id, {}),
            reader.delete_panel(panel_id),
        ):
            with pytest.raises(UnavailableError):
                await call


# --- insights ------------------------------------------------------------------------------------------


async def test_insights_come_back_with_id_and_time_oldest_first(make_storage: MakeStorage) -> None:
    clock = FixedClock()
    storage = make_storage(clock=clock)
    panel_id = await storage.create_panel("x", ["a"])
    for text in ("one", "two"):
        assert await storage.save_panel_insight(panel_id, {"text": text})
    clock.advance(1)
    await storage.save_panel_insight(panel_id, {"text": "three"})
    found = await storage.list_panel_insights(panel_id)
    assert found == [
        {"id": "insight_20260131_120000", "created_at": "2026-01-31T12:00:00.000000+00:00", "text": "one"},
        {"id": "insight_20260131_120000_001", "created_at": "2026-01-31T12:00:00.000000+00:00", "text": "two"},
        {"id": "insight_20260131_120001", "created_at": "2026-01-31T12:00:01.000000+00:00", "text": "three"},
    ]
    assert [list(insight)[:2] for insight in found] == [["id", "created_at"]] * 3
    assert await storage.list_panel_insights(panel_id, 2) == found[1:]
    assert await storage.list_panel_insights(panel_id, 0) == []
    assert await storage.get_panel_insight(panel_id, "insight_20260131_120000_001") == found[1]
    assert await storage.get_panel_insight(panel_id, "insight_20260131_120002") is None
    assert await storage.count_panel_insights(panel_id) == 3


async def test_insights_stay_in_order_when_the_clock_goes_back(make_storage: MakeStorage) -> None:
    clock = FixedClock()
    storage = make_storage(clock=clock)
    panel_id = await storage.create_panel("x", ["a"])
    for n in range(3):
        await storage.save_panel_insight(panel_id, {"n": n})
        clock.advance(-10)
    assert [insight["n"] for insight in await storage.list_panel_insights(panel_id)] == [0, 1, 2]


async def test_insights_saved_at_once_are_all_there(make_storage: MakeStorage) -> None:
    storage, other = make_storage(), make_storage()
    panel_id = await storage.create_panel("x", ["a"])
    await asyncio.gather(*((other if n % 2 else storage).save_panel_insight(panel_id, {"n": n}) for n in range(16)))
    assert sorted(insight["n"] for insight in await storage.list_panel_insights(panel_id)) == list(range(16))


async def test_an_insight_keeps_the_time_that_it_is_given(storage: StorageManager) -> None:
    panel_id = await storage.create_panel("x", ["a"])
    await storage.save_panel_insight(panel_id, {"created_at": "2020-05-01T10:00:00+02:00", "text": "imported"})
    (insight,) = await storage.list_panel_insights(panel_id)
    assert insight["created_at"] == "2020-05-01T10:00:00+02:00"


@pytest.mark.parametrize("bad", ["yesterday", "2020-05-01T10:00:00", 7, None])
async def test_an_insight_with_a_time_that_is_none_is_refused(storage: StorageManager, bad: Any) -> None:
    panel_id = await storage.create_panel("x", ["a"])
    async with unchanged(storage):
        with pytest.raises(ValidationError, match=r"insight\.created_at"):
            await storage.save_panel_insight(panel_id, {"created_at": bad})


async def test_the_id_of_an_insight_cannot_be_chosen(storage: StorageManager) -> None:
    panel_id = await storage.create_panel("x", ["a"])
    async with unchanged(storage):
        with pytest.raises(ValidationError, match=r"insight\.id cannot be chosen"):
            await storage.save_panel_insight(panel_id, {"id": "mine"})


@pytest.mark.parametrize("bad", [*NOT_JSON.values(), None], ids=[*NOT_JSON, "None"])
async def test_an_insight_that_is_no_json_object_is_refused(storage: StorageManager, bad: Any) -> None:
    panel_id = await storage.create_panel("x", ["a"])
    async with unchanged(storage):
        with pytest.raises(ValidationError, match="insight"):
            await storage.save_panel_insight(panel_id, bad)


# --- damage --------------------------------------------------------------------------------------------

GOOD = b'"type": "x", "personas": ["a"], "config": {}'


@pytest.mark.damage
@pytest.mark.parametrize(
    "damage",
    [
        b"{",
        b"[]",
        b"",
        b'{"id": "p"}',
        b'{"id": "q", "created_at": "2026-01-31T12:00:00+00:00", ' + GOOD + b"}",
        b'{"id": "p", "created_at": "yesterday", ' + GOOD + b"}",
    ],
)
async def test_a_damaged_panel_is_not_handed_out_and_hides_no_other(
    storage: StorageManager, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    for panel_id in ("p", "q"):
        await storage.create_panel("x", ["a"], panel_id=panel_id)
    key = key_of(storage, "panel", panel_id="p")
    await storage.backend.write(key, damage)
    with caplog.at_level(logging.WARNING):
        assert [panel.id for panel in await storage.list_panels()] == ["q"]
    assert key in caplog.text
    async with unchanged(storage):
        for call in (
            storage.get_panel("p"),
            storage.list_panels(strict=True),
            storage.update_panel("p", {"config": {}}),
        ):
            with pytest.raises(IntegrityError, match=key):
                await call


@pytest.mark.damage
async def test_a_damaged_insight_or_snapshot_hides_no_other(
    storage: StorageManager, caplog: pytest.LogCaptureFixture
) -> None:
    for persona_id in ("a", "b"):
        await storage.save_persona(persona_id, {})
    await storage.create_panel("x", ["a", "b"], panel_id="p")
    for n in range(2):
        await storage.save_panel_insight("p", {"n": n})
    first, _ = await storage.list_panel_insights("p")
    key = key_of(storage, "insight", panel_id="p", insight_id=first["id"])
    await storage.backend.write(key, b"{")
    await storage.backend.write(key_of(storage, "panel_persona", panel_id="p", persona_id="a"), b'{"id": "z"}')
    with caplog.at_level(logging.WARNING):
        assert [insight["n"] for insight in await storage.list_panel_insights("p")] == [1]
        assert [insight["n"] for insight in await storage.list_panel_insights("p", 1)] == [1]
        assert [persona["id"] for persona in await storage.get_panel_personas("p")] == ["b"]
    assert key in caplog.text
    for call in (
        storage.get_panel_insight("p", first["id"]),
        storage.list_panel_insights("p", strict=True),
        storage.get_panel_personas("p", strict=True),
    ):
        with pytest.raises(IntegrityError):
            await call


@pytest.mark.damage
async def test_a_panel_of_a_damaged_persona_is_not_created(storage: StorageManager) -> None:
    await storage.save_persona("a", {})
    await storage.backend.write(key_of(storage, "global_persona", persona_id="a"), b"{")
    async with unchanged(storage):
        with pytest.raises(IntegrityError):
            await storage.create_panel("x", ["a"])


@pytest.mark.damage
async def test_ids_and_times_of_a_panel_are_checked_only_if_the_configuration_says_so(
    make_storage: MakeStorage,
) -> None:
    storage = make_storage(validate_json_on_read=False)
    await storage.create_panel("x", ["a"], panel_id="p")
    damage = b'{"id": "q", "created_at": "yesterday", ' + GOOD + b"}"
    await storage.backend.write(key_of(storage, "panel", panel_id="p"), damage)
    panel = await storage.get_panel("p")
    assert panel is not None
    assert panel.created_at == "yesterday"


async def test_panels_are_listed_by_the_moment_whatever_its_offset(make_storage: MakeStorage) -> None:
    storage = make_storage()
    for panel_id, created_at in (("p1", "2030-01-01T00:00:00+14:00"), ("p2", "2029-12-31T12:00:00+00:00")):
        await storage.create_panel("x", ["a"], panel_id=panel_id)
        key = key_of(storage, "panel", panel_id=panel_id)
        content = json.loads(await storage.backend.read(key) or b"")
        await storage.backend.write(key, json.dumps(content | {"created_at": created_at}).encode())
    assert [panel.id for panel in await storage.list_panels()] == ["p2", "p1"]


async def test_updating_a_panel_with_nothing_writes_nothing(storage: StorageManager) -> None:
    await storage.create_panel("x", ["a"], panel_id="p")
    async with unchanged(storage):
        assert await storage.update_panel("p", {}) is True
        with pytest.raises(ConflictError):
            await storage.update_panel("p", {}, expected_version="0")
        with pytest.raises(NotFoundError):
            await storage.update_panel("q", {})


@pytest.mark.damage
async def test_what_a_panel_without_metadata_left_is_not_taken_over(make_storage: MakeStorage) -> None:
    storage = make_storage(clock=FixedClock())
    panel_id = await storage.create_panel("x", ["a"])
    await storage.add_panel_message(panel_id, Message("user", "old"))
    await storage.backend.delete(key_of(storage, "panel", panel_id=panel_id))
    async with unchanged(storage):
        with pytest.raises(IntegrityError, match=r"(?s)there are things of it.*check --fix"):
            await storage.create_panel("x", ["a"], panel_id=panel_id)
    assert await make_storage(clock=FixedClock()).create_panel("x", ["a"]) == f"{panel_id}_001"


async def test_a_message_and_an_insight_of_a_panel_exist_or_not(storage: StorageManager) -> None:
    await storage.create_panel("x", ["a"], panel_id="p")
    await storage.add_panel_message("p", Message("user", "hello", id="m"))
    await storage.save_panel_insight("p", {"text": "so"})
    (insight,) = await storage.list_panel_insights("p")
    assert await storage.panel_message_exists("p", "m") is True
    assert await storage.panel_insight_exists("p", insight["id"]) is True
    for panel_id, other in (("p", "other"), ("q", "m"), ("q", insight["id"])):
        assert await storage.panel_message_exists(panel_id, other) is False
        assert await storage.panel_insight_exists(panel_id, other) is False
    with pytest.raises(ValidationError):
        await storage.panel_insight_exists("p", "")
