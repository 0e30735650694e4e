"""Users and their profiles."""

import asyncio
import json
import logging
import threading
from typing import Any

import pytest

from flatfile_chat_database import (
    ConflictError,
    IntegrityError,
    NotFoundError,
    StorageConfig,
    StorageManager,
    UnavailableError,
    ValidationError,
)
from flatfile_chat_database.backends.memory import MemoryBackend

from .clock import FixedClock
from .conftest import MakeStorage
from .contents import ILLEGAL_IDS, NOT_JSON, contents, key_of, nested, unchanged

ISLANDS = ["ada", "Ada", "../ada", "a/da", ".", "..", "-rf", "CON", "con", "张三", "é", "e\u0301", "user@example.com"]


# --- creating and reading ------------------------------------------------------------------------------


async def test_a_new_user_has_the_profile_that_was_given(storage: StorageManager) -> None:
    assert await storage.create_user("ada", {"name": "Ada", "tags": ["x"], "n": 1.5, "none": None}) is True
    assert await storage.get_user_profile("ada") == {"name": "Ada", "tags": ["x"], "n": 1.5, "none": None}


async def test_a_user_without_a_profile_has_an_empty_one(storage: StorageManager) -> None:
    await storage.create_user("ada")
    assert await storage.get_user_profile("ada") == {}


async def test_creating_a_user_who_exists_returns_false_and_changes_nothing(storage: StorageManager) -> None:
    await storage.create_user("ada", {"name": "Ada"})
    async with unchanged(storage):
        assert await storage.create_user("ada", {"name": "another"}) is False


async def test_only_one_of_many_who_create_the_same_user_succeeds(storage: StorageManager) -> None:
    results = await asyncio.gather(*(storage.create_user("ada", {"n": n}) for n in range(50)))
    assert results.count(True) == 1
    assert await storage.get_user_profile("ada") == {"n": results.index(True)}


async def test_a_store_that_another_makes_while_it_is_looked_for_is_no_other_store() -> None:
    class Raced(MemoryBackend):
        """Between the look for the store's own file and the look for one elsewhere, somebody makes it."""

        raced = False

        async def list_folders(self, parent: str) -> list[str]:
            if not self.raced:
                self.raced = True
                await StorageManager(backend=self).create_user("bob")
            return await super().list_folders(parent)

    backend = Raced(StorageConfig())
    late = StorageManager(backend=backend)
    assert await late.create_user("ada") is True
    assert [user.user_id for user in await late.list_users()] == ["ada", "bob"]
    stored = await backend.read("system/config.json")
    assert stored is not None and json.loads(stored)["store_id"] == late._store.store_id


async def test_a_user_has_times_and_a_version(make_storage: MakeStorage) -> None:
    clock = FixedClock()
    storage = make_storage(clock=clock)
    await storage.create_user("ada")
    before = await storage.get_user("ada")
    clock.advance(60)
    await storage.update_user_profile("ada", {"a": 1})
    after = await storage.get_user("ada")
    assert before is not None and after is not None
    assert before.created_at == before.updated_at == after.created_at == "2026-01-31T12:00:00.000000+00:00"
    assert after.updated_at == "2026-01-31T12:01:00.000000+00:00"
    assert before.version and after.version and before.version != after.version


async def test_the_file_of_a_user_is_the_one_that_the_layout_documents(make_storage: MakeStorage) -> None:
    storage = make_storage(clock=FixedClock())
    await storage.create_user("ada", {"name": "Ada"})
    data = await storage.backend.read("users/ada/profile.json")
    assert data is not None and data.endswith(b"\n")
    assert list(json.loads(data).items()) == [
        ("user_id", "ada"),
        ("created_at", "2026-01-31T12:00:00.000000+00:00"),
        ("updated_at", "2026-01-31T12:00:00.000000+00:00"),
        ("profile", {"name": "Ada"}),
    ]


async def test_an_absent_user_is_none_and_reading_creates_nothing(storage: StorageManager) -> None:
    assert await storage.get_user("nobody") is None
    assert await storage.get_user_profile("nobody") is None
    assert await storage.user_exists("nobody") is False
    assert await storage.list_users() == []
    assert await storage.count_users() == 0
    assert await contents(storage) == {}


async def test_every_legal_id_is_an_island_of_its_own(storage: StorageManager) -> None:
    for number, user_id in enumerate(ISLANDS):
        assert await storage.create_user(user_id, {"n": number}) is True
    for number, user_id in enumerate(ISLANDS):
        assert await storage.get_user_profile(user_id) == {"n": number}
    assert [user.user_id for user in await storage.list_users()] == sorted(ISLANDS)


async def test_a_caller_who_changes_the_profile_afterwards_changes_nothing_stored(storage: StorageManager) -> None:
    profile: dict[str, Any] = {"tags": ["x"]}
    creating = asyncio.ensure_future(storage.create_user("ada", profile))
    await creating
    updates: dict[str, Any] = {"more": ["y"]}
    updating = asyncio.ensure_future(storage.update_user_profile("ada", updates))
    await asyncio.sleep(0)
    updates["more"].append(float("nan"))
    await updating
    profile["tags"].append("z")
    assert await storage.get_user_profile("ada") == {"tags": ["x"], "more": ["y"]}


# --- updating ------------------------------------------------------------------------------------------


async def test_an_update_merges_at_the_top_level(storage: StorageManager) -> None:
    await storage.create_user("ada", {"name": "Ada", "settings": {"theme": "dark", "size": 2}})
    assert await storage.update_user_profile("ada", {"settings": {"theme": "light"}, "age": 36}) is True
    assert await storage.get_user_profile("ada") == {"name": "Ada", "settings": {"theme": "light"}, "age": 36}


async def test_an_update_keeps_what_a_person_wrote_into_the_file(storage: StorageManager) -> None:
    await storage.create_user("ada")
    key = key_of(storage, "user", user_id="ada")
    stored = json.loads(await storage.backend.read(key) or b"") | {"note": "by hand"}
    await storage.backend.write(key, json.dumps(stored).encode())
    await storage.update_user_profile("ada", {"a": 1})
    assert json.loads(await storage.backend.read(key) or b"")["note"] == "by hand"


async def test_updating_an_absent_user_is_an_error_and_creates_nothing(storage: StorageManager) -> None:
    await storage.create_user("ada")
    async with unchanged(storage):
        with pytest.raises(NotFoundError, match="The user 'nobody' does not exist"):
            await storage.update_user_profile("nobody", {"a": 1})


async def test_fifty_updates_at_once_are_all_there(storage: StorageManager) -> None:
    await storage.create_user("ada")
    await asyncio.gather(*(storage.update_user_profile("ada", {f"key {n}": n}) for n in range(50)))
    assert await storage.get_user_profile("ada") == {f"key {n}": n for n in range(50)}


async def test_updates_from_two_threads_with_their_own_loops_are_all_there(storage: StorageManager) -> None:
    await storage.create_user("ada")
    problems: list[BaseException] = []

    async def update(name: str) -> None:
        for n in range(20):
            await storage.update_user_profile("ada", {f"{name} {n}": n})

    def run(name: str) -> None:
        try:
            asyncio.run(update(name))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert problems == []
    assert await storage.get_user_profile("ada") == {f"{name} {n}": n for name in ("one", "two") for n in range(20)}


async def test_a_stale_version_is_a_conflict_and_changes_nothing(storage: StorageManager) -> None:
    await storage.create_user("ada")
    user = await storage.get_user("ada")
    assert user is not None
    assert await storage.update_user_profile("ada", {"a": 1}, expected_version=user.version) is True
    async with unchanged(storage):
        with pytest.raises(ConflictError, match="has changed since it was read"):
            await storage.update_user_profile("ada", {"a": 2}, expected_version=user.version)
        with pytest.raises(ConflictError):
            await storage.update_user_profile("ada", {"a": 2}, expected_version="")
        with pytest.raises(ValidationError, match="expected_version must be a string"):
            await storage.update_user_profile("ada", {"a": 2}, expected_version=3)  # type: ignore[arg-type]


async def test_an_update_that_is_cancelled_has_happened_or_not(storage: StorageManager) -> None:
    await storage.create_user("ada", {"old": True})
    for turns in range(6):
        task = asyncio.ensure_future(storage.update_user_profile("ada", {"n": turns, "m": turns}))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        profile = await storage.get_user_profile("ada")
        assert profile is not None and profile["old"] is True
        assert profile.get("n") == profile.get("m")
    assert await storage.update_user_profile("ada", {"still": "works"}) is True


# --- lists ---------------------------------------------------------------------------------------------


async def test_users_are_listed_by_id_in_pages(make_storage: MakeStorage) -> None:
    storage = make_storage(session_list_default_limit=3)
    for name in ("d", "B", "a", "c", "e"):
        await storage.create_user(name)
    listed = [user.user_id for user in await storage.list_users(limit=10)]
    assert listed == ["B", "a", "c", "d", "e"]
    assert [user.user_id for user in await storage.list_users()] == listed[:3]
    assert [user.user_id for user in await storage.list_users(offset=3)] == listed[3:]
    assert [user.user_id for user in await storage.list_users(2, 1)] == listed[1:3]
    assert await storage.list_users(0) == []
    assert await storage.list_users(5, 5) == []
    assert await storage.count_users() == 5
    assert await storage.user_exists("B") is True


@pytest.mark.damage
async def test_a_page_is_right_also_far_behind_and_among_folders_without_a_user(storage: StorageManager) -> None:
    for number in range(300):
        await storage.create_user(f"{number:03}")
    for number in range(0, 300, 3):  # what a person might leave behind
        await storage.backend.delete(key_of(storage, "user", user_id=f"{number:03}"))
        await storage.backend.write(key_of(storage, "context", user_id=f"{number:03}", session_id="s"), b"{}\n")
    page = await storage.list_users(3, 197)
    assert [user.user_id for user in page] == ["296", "298", "299"]
    assert await storage.count_users() == 200


@pytest.mark.parametrize("limit", [-1, 1.0, "1", True], ids=repr)
async def test_a_limit_that_is_no_count_is_refused(storage: StorageManager, limit: Any) -> None:
    with pytest.raises(ValidationError, match="limit must"):
        await storage.list_users(limit)


@pytest.mark.parametrize("offset", [-1, None, 1.5, False], ids=repr)
async def test_an_offset_that_is_no_count_is_refused(storage: StorageManager, offset: Any) -> None:
    with pytest.raises(ValidationError, match="offset must"):
        await storage.list_users(5, offset)


# --- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("user_id", ILLEGAL_IDS.values(), ids=ILLEGAL_IDS)
async def test_an_illegal_id_is_refused_everywhere_and_changes_nothing(storage: StorageManager, user_id: Any) -> None:
    await storage.create_user("ada")
    async with unchanged(storage):
        for call in (
            storage.create_user(user_id),
            storage.get_user(user_id),
            storage.get_user_profile(user_id),
            storage.update_user_profile(user_id, {}),
            storage.user_exists(user_id),
            storage.create_session(user_id),
            storage.list_sessions(user_id),
            storage.count_sessions(user_id),
        ):
            with pytest.raises(ValidationError, match="user_id"):
                await call


@pytest.mark.parametrize("profile", NOT_JSON.values(), ids=NOT_JSON)
async def test_a_profile_that_is_no_json_object_is_refused_and_changes_nothing(
    storage: StorageManager, profile: Any
) -> None:
    await storage.create_user("ada")
    async with unchanged(storage):
        with pytest.raises(ValidationError, match="profile"):
            await storage.create_user("bob", profile)
        with pytest.raises(ValidationError, match="updates"):
            await storage.update_user_profile("ada", profile)


async def test_a_profile_nested_10_000_deep_is_refused_and_changes_nothing(storage: StorageManager) -> None:
    await storage.create_user("ada")
    async with unchanged(storage):
        with pytest.raises(ValidationError, match="nested deeper"):
            await storage.create_user("bob", nested(10_000))
    assert await storage.create_user("bob", nested(90)) is True
    assert await storage.get_user_profile("bob") == nested(90)


async def test_subclasses_of_json_types_are_stored_as_what_they_hold(storage: StorageManager) -> None:
    class Text(str):
        __slots__ = ()

    class Number(float):
        __slots__ = ()

    class Count(int):
        __slots__ = ()

    await storage.create_user("ada", {"text": Text("x"), "number": Number(1.5), "count": Count(3)})
    assert await storage.get_user_profile("ada") == {"text": "x", "number": 1.5, "count": 3}


async def test_a_read_only_store_refuses_to_create_and_to_update(make_storage: MakeStorage) -> None:
    await make_storage().create_user("ada")
    storage = make_storage(read_only=True)
    async with unchanged(storage):
        for call in (storage.create_user("bob"), storage.update_user_profile("ada", {"a": 1})):
            with pytest.raises(UnavailableError, match="read-only"):
                await call
    assert await storage.get_user_profile("ada") == {}


# --- damage --------------------------------------------------------------------------------------------

DAMAGED = {
    "half written": b'{"user_id": "bob", "cre',
    "empty": b"",
    "a list": b"[]\n",
    "no times": b'{"user_id": "bob", "profile": {}}\n',
    "a profile that is a list": b'{"user_id": "bob", "created_at": "2026-01-01T00:00:00+00:00", '
    b'"updated_at": "2026-01-01T00:00:00+00:00", "profile": []}\n',
    "NUL bytes": b"\0" * 64,
}
CONTRADICTING = {
    "another id": b'{"user_id": "eve", "created_at": "2026-01-01T00:00:00+00:00", '
    b'"updated_at": "2026-01-01T00:00:00+00:00", "profile": {}}\n',
    "no timestamp": b'{"user_id": "bob", "created_at": "yesterday", '
    b'"updated_at": "2026-01-01T00:00:00+00:00", "profile": {}}\n',
    "a naive timestamp": b'{"user_id": "bob", "created_at": "2026-01-01T00:00:00+00:00", '
    b'"updated_at": "2026-01-01T00:00:00", "profile": {}}\n',
}


@pytest.mark.damage
@pytest.mark.parametrize("data", (DAMAGED | CONTRADICTING).values(), ids=DAMAGED | CONTRADICTING)
async def test_a_damaged_profile_is_reported_never_taken_for_absent_or_written_over(
    storage: StorageManager, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    await storage.create_user("ada")
    key = key_of(storage, "user", user_id="bob")
    await storage.backend.write(key, data)
    async with unchanged(storage):
        for call in (
            storage.get_user("bob"),
            storage.get_user_profile("bob"),
            storage.update_user_profile("bob", {"a": 1}),
            storage.list_users(strict=True),
        ):
            with pytest.raises(IntegrityError, match=key):
                await call
        assert await storage.create_user("bob") is False
        with caplog.at_level(logging.WARNING, "flatfile_chat_database"):
            assert [user.user_id for user in await storage.list_users()] == ["ada"]
        assert key in caplog.text
        assert await storage.user_exists("bob") is True
        assert await storage.count_users() == 2


@pytest.mark.damage
@pytest.mark.parametrize("data", CONTRADICTING.values(), ids=CONTRADICTING)
async def test_without_validate_json_on_read_a_profile_is_not_cross_checked(
    make_storage: MakeStorage, data: bytes
) -> None:
    storage = make_storage(validate_json_on_read=False)
    await storage.create_user("ada")
    await storage.backend.write(key_of(storage, "user", user_id="bob"), data)
    assert await storage.get_user_profile("bob") == {}


@pytest.mark.damage
@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
async def test_without_validate_json_on_read_a_profile_must_still_decode(
    make_storage: MakeStorage, data: bytes
) -> None:
    storage = make_storage(validate_json_on_read=False)
    await storage.create_user("ada")
    await storage.backend.write(key_of(storage, "user", user_id="bob"), data)
    with pytest.raises(IntegrityError):
        await storage.get_user_profile("bob")


async def test_updating_a_profile_with_nothing_writes_nothing(storage: StorageManager) -> None:
    await storage.create_user("ada", {"a": 1})
    async with unchanged(storage):
        assert await storage.update_user_profile("ada", {}) is True
        with pytest.raises(ConflictError):
            await storage.update_user_profile("ada", {}, expected_version="0")
        with pytest.raises(NotFoundError):
            await storage.update_user_profile("bob", {})
