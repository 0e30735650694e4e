"""Personas: the global ones, and those of a user, which override them."""

import asyncio
import logging
from typing import Any

import pytest

from flatfile_chat_database import IntegrityError, NotFoundError, StorageManager, UnavailableError, ValidationError

from .conftest import MakeStorage
from .contents import ILLEGAL_IDS, NOT_JSON, contents, key_of, nested, unchanged


@pytest.fixture
async def ada(storage: StorageManager) -> StorageManager:
    """A store with the user "ada"."""
    await storage.create_user("ada")
    return storage


async def ids(storage: StorageManager, user_id: str | None = None) -> list[str]:
    return [persona["id"] for persona in await storage.list_personas(user_id)]


async def test_a_global_persona_comes_back_with_its_id_first(storage: StorageManager) -> None:
    assert await storage.save_persona("critic", {"name": "Critic", "traits": {"kind": True}, "rank": 1})
    persona = await storage.get_persona("critic")
    assert persona == {"id": "critic", "name": "Critic", "traits": {"kind": True}, "rank": 1}
    assert next(iter(persona)) == "id"


async def test_a_users_own_persona_overrides_the_global_one_for_that_user_alone(ada: StorageManager) -> None:
    await ada.create_user("bob")
    await ada.save_persona("critic", {"name": "of all"})
    await ada.save_persona("critic", {"name": "of ada"}, "ada")
    assert await ada.get_persona("critic") == {"id": "critic", "name": "of all"}
    assert await ada.get_persona("critic", "ada") == {"id": "critic", "name": "of ada"}
    assert await ada.get_persona("critic", "bob") == {"id": "critic", "name": "of all"}


async def test_a_user_sees_the_global_personas_and_their_own_by_id(ada: StorageManager) -> None:
    for persona_id in ("c", "a"):
        await ada.save_persona(persona_id, {"of": "all"})
    for persona_id in ("b", "c"):
        await ada.save_persona(persona_id, {"of": "ada"}, "ada")
    assert await ada.list_personas() == [{"id": "a", "of": "all"}, {"id": "c", "of": "all"}]
    assert await ada.list_personas("ada") == [
        {"id": "a", "of": "all"},
        {"id": "b", "of": "ada"},
        {"id": "c", "of": "ada"},
    ]
    assert (await ada.count_personas(), await ada.count_personas("ada"), await ada.count_personas("bob")) == (2, 3, 2)
    assert await ada.persona_exists("b", "ada")
    assert await ada.persona_exists("a", "ada")
    assert not await ada.persona_exists("b")
    assert not await ada.persona_exists("z", "ada")


async def test_saving_a_persona_again_replaces_it(storage: StorageManager) -> None:
    await storage.save_persona("critic", {"name": "first", "more": 1})
    assert await storage.save_persona("critic", {"name": "second"})
    assert await storage.list_personas() == [{"id": "critic", "name": "second"}]


async def test_a_persona_that_was_read_can_be_saved_again_as_it_is(ada: StorageManager) -> None:
    await ada.save_persona("critic", {"name": "Critic"}, "ada")
    persona = await ada.get_persona("critic", "ada")
    assert persona is not None
    before = await contents(ada)
    await ada.save_persona("critic", persona, "ada")
    assert await contents(ada) == before


async def test_reading_what_is_absent_gives_nothing(storage: StorageManager) -> None:
    for user_id in (None, "ada"):
        assert await storage.get_persona("critic", user_id) is None
        assert await storage.list_personas(user_id) == []
        assert await storage.count_personas(user_id) == 0
        assert not await storage.persona_exists("critic", user_id)


@pytest.mark.parametrize("persona_id", ["../x", "CON", "a/b", ".", "-rf", "Ab", "ab", "é", "e\u0301", "张三", "x.json"])
async def test_hostile_ids_are_personas_of_their_own(ada: StorageManager, persona_id: str) -> None:
    for user_id in (None, "ada"):
        await ada.save_persona("other", {"n": 0}, user_id)
        await ada.save_persona(persona_id, {"of": user_id}, user_id)
        assert await ada.get_persona(persona_id, user_id) == {"id": persona_id, "of": user_id}
        assert await ids(ada, user_id) == sorted([persona_id, "other"])


# --- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [*ILLEGAL_IDS.values()], ids=[*ILLEGAL_IDS])
async def test_an_illegal_id_is_refused_everywhere(ada: StorageManager, bad: Any) -> None:
    async with unchanged(ada):
        for user_id in (None, "ada"):
            for call in (
                ada.save_persona(bad, {}, user_id),
                ada.get_persona(bad, user_id),
                ada.persona_exists(bad, user_id),
                ada.delete_persona(bad, user_id),
            ):
                with pytest.raises(ValidationError, match="persona_id"):
                    await call
        if bad is not None:
            for user_call in (ada.save_persona("x", {}, bad), ada.get_persona("x", bad), ada.list_personas(bad)):
                with pytest.raises(ValidationError, match="user_id"):
                    await user_call


@pytest.mark.parametrize("bad", [*NOT_JSON.values(), None, nested(10_000)], ids=[*NOT_JSON, "None", "10,000 deep"])
async def test_data_that_is_no_json_object_is_refused(ada: StorageManager, bad: Any) -> None:
    await ada.save_persona("critic", {"name": "before"})
    async with unchanged(ada):
        with pytest.raises(ValidationError, match="data"):
            await ada.save_persona("critic", bad)


@pytest.mark.parametrize(("name", "value"), [("id", "other"), ("id", 7), ("user_id", "bob"), ("user_id", None)])
async def test_data_that_contradicts_the_place_is_refused(ada: StorageManager, name: str, value: Any) -> None:
    async with unchanged(ada):
        with pytest.raises(ValidationError, match=rf"data\.{name} is .* Leave it out"):
            await ada.save_persona("critic", {name: value}, "ada")


async def test_a_persona_of_a_user_who_does_not_exist_is_refused(storage: StorageManager) -> None:
    await storage.save_persona("critic", {})
    async with unchanged(storage):
        with pytest.raises(NotFoundError, match="The user 'bob' does not exist"):
            await storage.save_persona("critic", {}, "bob")
    assert await storage.get_persona("critic", "bob") == {"id": "critic"}


async def test_a_store_that_is_opened_read_only_keeps_its_personas(make_storage: MakeStorage) -> None:
    writer = make_storage()
    await writer.save_persona("critic", {})
    reader = make_storage(read_only=True)
    assert await ids(reader) == ["critic"]
    async with unchanged(writer):
        with pytest.raises(UnavailableError):
            await reader.save_persona("other", {})


async def test_personas_saved_at_once_are_all_there(make_storage: MakeStorage) -> None:
    storage, other = make_storage(), make_storage()
    await asyncio.gather(*((other if n % 2 else storage).save_persona(f"{n:02}", {"n": n}) for n in range(20)))
    assert await storage.list_personas() == [{"id": f"{n:02}", "n": n} for n in range(20)]


# --- damage --------------------------------------------------------------------------------------------


@pytest.mark.damage
@pytest.mark.parametrize("damage", [b"{", b"[]", b"", b'{"id": "other"}', b"{}"])
async def test_a_damaged_persona_is_not_handed_out_and_hides_no_other(
    ada: StorageManager, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    await ada.save_persona("critic", {"of": "all"})
    await ada.save_persona("critic", {"of": "ada"}, "ada")
    await ada.save_persona("helper", {})
    key = key_of(ada, "persona", user_id="ada", persona_id="critic")
    await ada.backend.write(key, damage)
    with caplog.at_level(logging.WARNING):
        assert await ids(ada, "ada") == ["helper"]
    assert key in caplog.text
    with pytest.raises(IntegrityError, match="critic"):
        await ada.get_persona("critic", "ada")
    with pytest.raises(IntegrityError, match="critic"):
        await ada.list_personas("ada", strict=True)
    assert await ids(ada) == ["critic", "helper"]
    await ada.save_persona("critic", {"of": "ada again"}, "ada")
    assert await ada.get_persona("critic", "ada") == {"id": "critic", "of": "ada again"}


@pytest.mark.damage
async def test_the_id_of_a_persona_is_checked_only_if_the_configuration_says_so(make_storage: MakeStorage) -> None:
    storage = make_storage(validate_json_on_read=False)
    await storage.save_persona("critic", {})
    await storage.backend.write(key_of(storage, "global_persona", persona_id="critic"), b'{"name": "by hand"}')
    assert await storage.get_persona("critic") == {"id": "critic", "name": "by hand"}
