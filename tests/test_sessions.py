"""Sessions: their metadata, ids, order and limits."""

import asyncio
import json
import logging
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from flatfile_chat_database import (
    ConflictError,
    IntegrityError,
    Message,
    NotFoundError,
    Session,
    StorageConfig,
    StorageLimitExceeded,
    StorageManager,
    UnavailableError,
    ValidationError,
)
from flatfile_chat_database.backends.changes import Change, Outcome
from flatfile_chat_database.backends.memory import MemoryBackend

from .clock import FixedClock
from .conftest import MakeStorage
from .contents import ILLEGAL_IDS, NOT_JSON, contents, key_of, unchanged

NOON = "2026-01-31T12:00:00.000000+00:00"


async def titles(storage: StorageManager, **arguments: Any) -> list[str]:
    return [session.title for session in await storage.list_sessions("ada", **arguments)]


# --- creating and reading ------------------------------------------------------------------------------


async def test_a_new_session_has_what_was_given(make_storage: MakeStorage) -> None:
    storage = make_storage(clock=FixedClock())
    await storage.create_user("ada")
    session_id = await storage.create_session("ada", "Python help", metadata={"model": "m", "n": [1]})
    assert session_id == "chat_session_20260131_120000"
    assert await storage.get_session("ada", session_id) == Session(
        id=session_id,
        user_id="ada",
        title="Python help",
        created_at=NOON,
        updated_at=NOON,
        metadata={"model": "m", "n": [1]},
    )
    assert await storage.session_exists("ada", session_id) is True


async def test_a_session_without_a_title_has_an_empty_one(storage: StorageManager) -> None:
    await storage.create_user("ada")
    session = await storage.get_session("ada", await storage.create_session("ada"))
    assert session is not None and session.title == "" and session.metadata == {}


async def test_the_file_of_a_session_is_the_one_that_the_layout_documents(make_storage: MakeStorage) -> None:
    storage = make_storage(clock=FixedClock())
    await storage.create_user("ada")
    await storage.create_session("ada", "Hello", metadata={"a": 1})
    data = await storage.backend.read("users/ada/chat_session_20260131_120000/session.json")
    assert list(json.loads(data or b"").items()) == [
        ("id", "chat_session_20260131_120000"),
        ("user_id", "ada"),
        ("title", "Hello"),
        ("created_at", NOON),
        ("updated_at", NOON),
        ("metadata", {"a": 1}),
    ]


async def test_an_absent_session_is_none_and_reading_creates_nothing(storage: StorageManager) -> None:
    assert await storage.get_session("ada", "s") is None
    assert await storage.list_sessions("ada") == []
    assert await storage.count_sessions("ada") == 0
    assert await storage.session_exists("ada", "s") is False
    assert await contents(storage) == {}


async def test_creating_a_session_for_an_absent_user_is_an_error_and_creates_nothing(storage: StorageManager) -> None:
    await storage.create_user("ada")
    async with unchanged(storage):
        with pytest.raises(NotFoundError, match="The user 'nobody' does not exist"):
            await storage.create_session("nobody")
        with pytest.raises(NotFoundError):
            await storage.create_session("nobody", session_id="mine")


async def test_a_session_belongs_to_its_user_alone(storage: StorageManager) -> None:
    await storage.create_user("ada")
    await storage.create_user("bob")
    session_id = await storage.create_session("ada", "hers")
    assert await storage.get_session("bob", session_id) is None
    assert await storage.list_sessions("bob") == []


# --- ids -----------------------------------------------------------------------------------------------


async def test_a_generated_id_tells_the_second_in_utc_by_the_configured_format(make_storage: MakeStorage) -> None:
    moment = datetime.fromisoformat("2026-02-01T01:30:05+02:00")
    storage = make_storage(
        clock=FixedClock(moment), session_id_prefix="talk", session_timestamp_format="%Y-%m-%d-%H%M%S"
    )
    await storage.create_user("ada")
    assert storage.generate_session_id() == "talk_2026-01-31-233005"
    assert await storage.create_session("ada") == "talk_2026-01-31-233005"
    parsed = datetime.strptime("2026-01-31-233005 +0000", "%Y-%m-%d-%H%M%S %z")
    assert parsed == moment.astimezone(UTC)


async def test_sessions_of_one_second_are_numbered_in_the_order_of_their_making(make_storage: MakeStorage) -> None:
    clock = FixedClock()
    storage = make_storage(clock=clock)
    await storage.create_user("ada")
    await storage.create_user("bob")
    made = [await storage.create_session("ada") for _ in range(3)]
    stamp = "chat_session_20260131_120000"
    assert made == [stamp, f"{stamp}_001", f"{stamp}_002"]
    assert await storage.create_session("bob") == stamp
    clock.advance(1)
    assert await storage.create_session("ada") == "chat_session_20260131_120001"
    clock.advance(-1)
    assert await storage.create_session("ada") == f"{stamp}_003"


async def test_numbers_go_on_after_a_thousand(make_storage: MakeStorage) -> None:
    storage = make_storage(clock=FixedClock())
    await storage.create_user("ada")
    stamp = storage.generate_session_id()
    for session_id in (stamp, f"{stamp}_999"):
        await storage.create_session("ada", session_id=session_id)
    assert await storage.create_session("ada") == f"{stamp}_1000"
    assert await storage.create_session("ada") == f"{stamp}_1001"


async def test_another_manager_goes_on_with_the_numbers(make_storage: MakeStorage) -> None:
    clock = FixedClock()
    one, other = make_storage(clock=clock), make_storage(clock=clock)
    await one.create_user("ada")
    made = [await manager.create_session("ada") for manager in (one, other, one, other, other)]
    assert made == sorted(set(made))


async def test_a_number_whose_session_came_to_nothing_is_used_again(make_storage: MakeStorage) -> None:
    storage = make_storage(clock=FixedClock())
    with pytest.raises(NotFoundError):
        await storage.create_session("ada")
    await storage.create_user("ada")
    assert await storage.create_session("ada") == storage.generate_session_id()


async def test_a_hundred_sessions_at_once_get_a_hundred_ids(make_storage: MakeStorage) -> None:
    storage = make_storage(clock=FixedClock())
    await storage.create_user("ada")
    made = await asyncio.gather(*(storage.create_session("ada", str(n)) for n in range(100)))
    assert len(set(made)) == 100
    assert await storage.count_sessions("ada") == 100
    assert {(s.id, s.title) for s in await storage.list_sessions("ada", 200)} == {
        (session_id, str(n)) for n, session_id in enumerate(made)
    }


async def test_two_managers_never_make_the_same_id_at_once(make_storage: MakeStorage) -> None:
    clock = FixedClock()
    managers = [make_storage(clock=clock), make_storage(clock=clock)]
    await managers[0].create_user("ada")
    made = await asyncio.gather(*(manager.create_session("ada") for manager in managers * 20))
    assert len(set(made)) == 40
    assert await managers[0].count_sessions("ada") == 40


async def test_a_given_id_is_used_as_it_is(storage: StorageManager) -> None:
    await storage.create_user("ada")
    for session_id in ("My Chat", "../x", "profile.json", "personas", "张三", "chat_session_1"):
        assert await storage.create_session("ada", session_id, session_id=session_id) == session_id
        session = await storage.get_session("ada", session_id)
        assert session is not None and session.id == session.title == session_id
    assert await storage.count_sessions("ada") == 6
    assert await storage.get_user_profile("ada") == {}


async def test_a_given_id_that_is_taken_is_a_conflict_and_changes_nothing(storage: StorageManager) -> None:
    await storage.create_user("ada")
    await storage.create_session("ada", "first", session_id="s")
    async with unchanged(storage):
        with pytest.raises(ConflictError, match="The session 's' of user 'ada' exists already"):
            await storage.create_session("ada", "second", session_id="s")


async def test_a_session_can_have_begun_before_it_was_created(storage: StorageManager) -> None:
    await storage.create_user("ada")
    session_id = await storage.create_session("ada", created_at="2020-05-06T07:08:09.5+02:00")
    session = await storage.get_session("ada", session_id)
    assert session is not None
    assert session.created_at == session.updated_at == "2020-05-06T05:08:09.500000+00:00"


# --- updating ------------------------------------------------------------------------------------------


async def test_an_update_sets_title_and_metadata_and_the_time(make_storage: MakeStorage) -> None:
    clock = FixedClock()
    storage = make_storage(clock=clock)
    await storage.create_user("ada")
    session_id = await storage.create_session("ada", "old", metadata={"a": 1})
    clock.advance(1.5)
    assert await storage.update_session("ada", session_id, {"title": "new"}) is True
    session = await storage.get_session("ada", session_id)
    assert session == Session(session_id, "ada", "new", NOON, "2026-01-31T12:00:01.500000+00:00", {"a": 1})
    await storage.update_session("ada", session_id, {"metadata": {"b": 2}})
    session = await storage.get_session("ada", session_id)
    assert session is not None and session.title == "new" and session.metadata == {"b": 2}


async def test_an_update_keeps_what_a_person_wrote_into_the_file(storage: StorageManager) -> None:
    await storage.create_user("ada")
    session_id = await storage.create_session("ada")
    key = key_of(storage, "session", user_id="ada", session_id=session_id)
    stored = json.loads(await storage.backend.read(key) or b"") | {"note": "by hand", "version": "1"}
    await storage.backend.write(key, json.dumps(stored).encode())
    await storage.update_session("ada", session_id, {"title": "new"})
    assert json.loads(await storage.backend.read(key) or b"")["note"] == "by hand"
    session = await storage.get_session("ada", session_id)
    assert session is not None and session.version != "1"


async def test_updating_an_absent_session_is_an_error_and_creates_nothing(storage: StorageManager) -> None:
    await storage.create_user("ada")
    async with unchanged(storage):
        for user_id in ("ada", "nobody"):
            with pytest.raises(NotFoundError, match=f"The session 's' of user '{user_id}' does not exist"):
                await storage.update_session(user_id, "s", {"title": "x"})


@pytest.mark.parametrize(
    "updates",
    [
        {"id": "other"},
        {"user_id": "bob"},
        {"created_at": NOON},
        {"updated_at": NOON},
        {"version": "1"},
        {"colour": "red"},
        {"title": "fine", "": 1},
    ],
    ids=lambda updates: str([*updates][-1]),
)
async def test_a_field_that_is_unknown_or_never_changes_is_refused(
    storage: StorageManager, updates: dict[str, Any]
) -> None:
    await storage.create_user("ada")
    session_id = await storage.create_session("ada")
    async with unchanged(storage):
        with pytest.raises(ValidationError, match=rf"updates\.{[*updates][-1]} cannot be set"):
            await storage.update_session("ada", session_id, updates)


async def test_a_stale_version_is_a_conflict_and_changes_nothing(storage: StorageManager) -> None:
    await storage.create_user("ada")
    session_id = await storage.create_session("ada")
    session = await storage.get_session("ada", session_id)
    assert session is not None
    await storage.add_message("ada", session_id, Message("user", "Hello"))  # is no change of the document
    assert await storage.update_session("ada", session_id, {"title": "x"}, expected_version=session.version) is True
    async with unchanged(storage):
        with pytest.raises(ConflictError):
            await storage.update_session("ada", session_id, {"title": "y"}, expected_version=session.version)
    listed = (await storage.list_sessions("ada"))[0]
    assert await storage.update_session("ada", session_id, {"title": "z"}, expected_version=listed.version) is True


async def test_many_updates_at_once_leave_a_whole_session(storage: StorageManager) -> None:
    await storage.create_user("ada")
    session_id = await storage.create_session("ada")
    updates = [{"title": str(n)} if n % 2 else {"metadata": {"n": n}} for n in range(40)]
    await asyncio.gather(*(storage.update_session("ada", session_id, update) for update in updates))
    session = await storage.get_session("ada", session_id)
    assert session is not None
    assert {"title": session.title} in updates and {"metadata": session.metadata} in updates


# --- lists ---------------------------------------------------------------------------------------------


async def test_sessions_are_listed_most_recently_updated_first(make_storage: MakeStorage) -> None:
    clock = FixedClock()
    storage = make_storage(clock=clock)
    await storage.create_user("ada")
    made = {}
    for title in ("one", "two", "three"):
        made[title] = await storage.create_session("ada", title)
        clock.advance(10)
    assert await titles(storage) == ["three", "two", "one"]
    await storage.update_session("ada", made["two"], {"metadata": {"a": 1}})
    assert await titles(storage) == ["two", "three", "one"]


async def test_a_message_updates_its_session_without_a_change_of_its_document(make_storage: MakeStorage) -> None:
    clock = FixedClock()
    storage = make_storage(clock=clock)
    await storage.create_user("ada")
    one = await storage.create_session("ada", "one")
    clock.advance(10)
    await storage.create_session("ada", "two")
    key = key_of(storage, "session", user_id="ada", session_id=one)
    before = await storage.backend.read(key)
    later = "2026-01-31T14:00:00+01:00"  # an hour after noon in UTC
    await storage.add_message("ada", one, Message("user", "Hello", timestamp=later))
    assert await titles(storage) == ["one", "two"]
    session = await storage.get_session("ada", one)
    assert session is not None and session.updated_at == "2026-01-31T13:00:00.000000+00:00"
    assert session == (await storage.list_sessions("ada"))[0]
    assert await storage.backend.read(key) == before


async def test_an_old_message_does_not_take_a_session_back_in_time(make_storage: MakeStorage) -> None:
    storage = make_storage(clock=FixedClock())
    await storage.create_user("ada")
    session_id = await storage.create_session("ada")
    await storage.add_message("ada", session_id, Message("user", "Hello", timestamp="1999-01-01T00:00:00+00:00"))
    session = await storage.get_session("ada", session_id)
    assert session is not None and session.updated_at == NOON


async def test_sessions_come_in_pages(make_storage: MakeStorage) -> None:
    clock = FixedClock()
    storage = make_storage(clock=clock, session_list_default_limit=3)
    await storage.create_user("ada")
    for n in range(7):
        await storage.create_session("ada", str(n))
        clock.advance(1)
    assert await titles(storage) == ["6", "5", "4"]
    assert await titles(storage, offset=3) == ["3", "2", "1"]
    assert await titles(storage, offset=6) == ["0"]
    assert await titles(storage, offset=7) == []
    assert await titles(storage, limit=0) == []
    assert await titles(storage, limit=100) == list("6543210")
    assert await titles(storage, limit=2, offset=1) == ["5", "4"]


@pytest.mark.parametrize(
    "arguments",
    [{"limit": -1}, {"limit": 2.0}, {"limit": True}, {"offset": -1}, {"offset": None}, {"offset": "0"}],
    ids=str,
)
async def test_a_limit_or_offset_that_is_no_count_is_refused(
    storage: StorageManager, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError, match=rf"{next(iter(arguments))} must"):
        await storage.list_sessions("ada", **arguments)


class CountingBackend(MemoryBackend):
    """Counts what it is asked."""

    def __init__(self, config: StorageConfig) -> None:
        super().__init__(config)
        self.asked: list[str] = []
        self._inside = False

    async def _count(self, name: str, call: Any) -> Any:
        if self._inside:  # of another call
            return await call
        self.asked.append(name)
        self._inside = True
        try:
            return await call
        finally:
            self._inside = False

    async def read(self, key: str) -> bytes | None:
        return await self._count("read", super().read(key))  # type: ignore[no-any-return]

    async def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        return await self._count("read_many", super().read_many(keys))  # type: ignore[no-any-return]

    async def list_folders(self, folder: str) -> list[str]:
        return await self._count("list_folders", super().list_folders(folder))  # type: ignore[no-any-return]

    async def newest_records(self, keys: Sequence[str]) -> list[bytes | None]:
        return await self._count("newest_records", super().newest_records(keys))  # type: ignore[no-any-return]

    async def commit(self, changes: Sequence[Change]) -> list[Outcome]:
        return await self._count("commit", super().commit(changes))  # type: ignore[no-any-return]


async def test_a_burst_of_sessions_takes_one_commit_each_and_a_list_of_them_three_calls() -> None:
    backend = CountingBackend(StorageConfig(storage_url="memory:"))
    storage = StorageManager(backend=backend, clock=FixedClock())
    await storage.create_user("ada")
    backend.asked.clear()
    for _ in range(100):
        await storage.create_session("ada")
    assert backend.asked == ["commit"] * 100
    backend.asked.clear()
    assert len(await storage.list_sessions("ada", 100)) == 100
    assert backend.asked == ["list_folders", "read_many", "newest_records"]
    again = StorageManager(backend=backend, clock=FixedClock())
    backend.asked.clear()
    assert await again.create_session("ada") == f"{again.generate_session_id()}_100"
    assert backend.asked.count("commit") == 2 and len(backend.asked) == 4


async def test_ids_are_right_when_the_second_passes_while_they_are_made() -> None:
    clock = FixedClock()

    class Slow(MemoryBackend):
        """Lets a second pass, and another session be made, before the next commit."""

        slow = False

        async def commit(self, changes: Sequence[Change]) -> list[Outcome]:
            if self.slow:
                self.slow = False
                clock.advance(1)
                await storage.create_session("ada", "meanwhile")
            return await super().commit(changes)

    backend = Slow(StorageConfig(storage_url="memory:"))
    storage = StorageManager(backend=backend, clock=clock)
    await storage.create_user("ada")
    backend.slow = True
    with pytest.raises(NotFoundError):
        await storage.create_session("nobody")
    first = storage.generate_session_id()
    assert await StorageManager(backend=backend, clock=clock).create_session("ada") == f"{first}_001"
    other = StorageManager(backend=backend, clock=clock)
    backend.slow = True  # the id of this second is taken, and the next second has begun when that is found out
    assert await other.create_session("ada") == f"{storage.generate_session_id()}_001"
    assert await storage.count_sessions("ada") == 4


# --- limits --------------------------------------------------------------------------------------------


async def test_a_user_has_no_more_sessions_than_configured(make_storage: MakeStorage) -> None:
    storage = make_storage(max_sessions_per_user=2)
    await storage.create_user("ada")
    await storage.create_user("bob")
    await storage.save_persona("helper", {"name": "Helper"}, "ada")  # what else is in the folder does not count
    await storage.create_session("ada", session_id="one")
    await storage.create_session("ada", session_id="two")
    async with unchanged(storage):
        for session_id in (None, "three"):
            with pytest.raises(StorageLimitExceeded, match="max_sessions_per_user") as caught:
                await storage.create_session("ada", session_id=session_id)
            assert (caught.value.limit_name, caught.value.limit, caught.value.value) == ("max_sessions_per_user", 2, 3)
        with pytest.raises(ConflictError):  # says more than that there is no room
            await storage.create_session("ada", session_id="two")
    await storage.create_session("bob")
    assert await storage.count_sessions("ada") == 2


async def test_the_limit_holds_for_many_at_once(make_storage: MakeStorage) -> None:
    storage = make_storage(max_sessions_per_user=5)
    await storage.create_user("ada")
    results = await asyncio.gather(*(storage.create_session("ada") for _ in range(20)), return_exceptions=True)
    assert sum(isinstance(result, str) for result in results) == 5
    assert sum(isinstance(result, StorageLimitExceeded) for result in results) == 15
    assert await storage.count_sessions("ada") == 5


# --- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "session_id",
    [value for value in ILLEGAL_IDS.values() if value is not None],
    ids=[name for name in ILLEGAL_IDS if name != "None"],
)
async def test_an_illegal_id_is_refused_everywhere_and_changes_nothing(
    storage: StorageManager, session_id: Any
) -> None:
    await storage.create_user("ada")
    async with unchanged(storage):
        for call in (
            storage.create_session("ada", session_id=session_id),
            storage.get_session("ada", session_id),
            storage.update_session("ada", session_id, {}),
            storage.session_exists("ada", session_id),
        ):
            with pytest.raises(ValidationError, match="session_id"):
                await call


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"title": 7}, "title"),
        ({"title": b"x"}, "title"),
        ({"title": "\ud800"}, "title"),
        ({"created_at": "yesterday"}, "created_at"),
        ({"created_at": "2026-01-01T00:00:00"}, "created_at"),
        ({"created_at": 1.0}, "created_at"),
    ],
    ids=str,
)
async def test_a_field_that_does_not_fit_is_refused_and_changes_nothing(
    storage: StorageManager, arguments: dict[str, Any], field: str
) -> None:
    await storage.create_user("ada")
    session_id = await storage.create_session("ada")
    async with unchanged(storage):
        with pytest.raises(ValidationError, match=field):
            await storage.create_session("ada", **arguments)
        if field == "title":
            with pytest.raises(ValidationError, match=field):
                await storage.update_session("ada", session_id, arguments)
    with pytest.raises(ValidationError, match=r"updates\.title must be a string"):
        await storage.update_session("ada", session_id, {"title": None})


@pytest.mark.parametrize("metadata", NOT_JSON.values(), ids=NOT_JSON)
async def test_metadata_that_is_no_json_object_is_refused_and_changes_nothing(
    storage: StorageManager, metadata: Any
) -> None:
    await storage.create_user("ada")
    session_id = await storage.create_session("ada")
    async with unchanged(storage):
        with pytest.raises(ValidationError, match="metadata"):
            await storage.create_session("ada", metadata=metadata)
        with pytest.raises(ValidationError, match=r"updates\.metadata|of updates"):
            await storage.update_session("ada", session_id, {"metadata": metadata})
        with pytest.raises(ValidationError, match="updates"):
            await storage.update_session("ada", session_id, metadata)


async def test_a_read_only_store_refuses_to_create_and_to_update(make_storage: MakeStorage) -> None:
    writer = make_storage()
    await writer.create_user("ada")
    session_id = await writer.create_session("ada")
    storage = make_storage(read_only=True)
    async with unchanged(storage):
        for call in (
            storage.create_session("ada"),
            storage.create_session("ada", session_id="s"),
            storage.update_session("ada", session_id, {"title": "x"}),
        ):
            with pytest.raises(UnavailableError, match="read-only"):
                await call
    assert await storage.count_sessions("ada") == 1


# --- damage --------------------------------------------------------------------------------------------


def document(**changes: Any) -> bytes:
    fields = {"id": "s", "user_id": "ada", "title": "", "created_at": NOON, "updated_at": NOON, "metadata": {}}
    return json.dumps(fields | changes).encode()


DAMAGED = {
    "half written": document()[:-30],
    "empty": b"",
    "text": b'"session"',
    "a title that is a number": document(title=7),
    "metadata that is a list": document(metadata=[]),
}
CONTRADICTING = {
    "another id": document(id="t"),
    "another user": document(user_id="bob"),
    "no timestamp": document(created_at="then"),
    "a naive timestamp": document(updated_at="2026-01-01T00:00:00"),
}


@pytest.mark.damage
@pytest.mark.parametrize("data", (DAMAGED | CONTRADICTING).values(), ids=DAMAGED | CONTRADICTING)
async def test_a_damaged_session_is_reported_and_lists_go_on_without_it(
    storage: StorageManager, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    await storage.create_user("ada")
    await storage.create_session("ada", "good")
    key = key_of(storage, "session", user_id="ada", session_id="s")
    await storage.backend.write(key, data)
    async with unchanged(storage):
        for call in (
            storage.get_session("ada", "s"),
            storage.update_session("ada", "s", {"title": "x"}),
            storage.list_sessions("ada", strict=True),
        ):
            with pytest.raises(IntegrityError, match=re.escape(key)):
                await call
        with caplog.at_level(logging.WARNING, "flatfile_chat_database"):
            assert await titles(storage) == ["good"]
        assert key in caplog.text
        with pytest.raises(ConflictError):
            await storage.create_session("ada", session_id="s")
        assert await storage.session_exists("ada", "s") is True
        assert await storage.count_sessions("ada") == 2


@pytest.mark.damage
@pytest.mark.parametrize("data", CONTRADICTING.values(), ids=CONTRADICTING)
async def test_without_validate_json_on_read_a_session_is_not_cross_checked(
    make_storage: MakeStorage, data: bytes
) -> None:
    storage = make_storage(validate_json_on_read=False)
    await storage.create_user("ada")
    await storage.backend.write(key_of(storage, "session", user_id="ada", session_id="s"), data)
    assert await storage.get_session("ada", "s") is not None
    assert len(await storage.list_sessions("ada", strict=True)) == 1


@pytest.mark.damage
async def test_a_folder_without_a_session_document_is_no_session(storage: StorageManager) -> None:
    await storage.create_user("ada")
    log = key_of(storage, "messages", user_id="ada", session_id="s")
    await storage.backend.append(log, b'{"id":"1","role":"user","content":"x","timestamp":"2026-01-01T00:00:00Z"}\n')
    assert await storage.get_session("ada", "s") is None
    assert await storage.list_sessions("ada", strict=True) == []
    assert await storage.count_sessions("ada") == 0
    assert await storage.session_exists("ada", "s") is False
    with pytest.raises(NotFoundError):
        await storage.add_message("ada", "s", Message("user", "Hello"))


@pytest.mark.damage
async def test_a_damaged_message_does_not_hide_its_session(storage: StorageManager) -> None:
    await storage.create_user("ada")
    session_id = await storage.create_session("ada", "good")
    log = key_of(storage, "messages", user_id="ada", session_id=session_id)
    await storage.backend.append(log, b'{"id":"1","role":"user","content":"x","timestamp":"soon"}\nhalf a li\n')
    assert await titles(storage) == ["good"]
    assert await storage.get_session("ada", session_id) is not None


async def test_updating_a_session_with_nothing_writes_nothing(storage: StorageManager) -> None:
    await storage.create_user("ada")
    await storage.create_session("ada", session_id="s")
    session = await storage.get_session("ada", "s")
    assert session is not None
    async with unchanged(storage):
        assert await storage.update_session("ada", "s", {}) is True
        assert await storage.update_session("ada", "s", {}, expected_version=session.version) is True
        with pytest.raises(ConflictError):
            await storage.update_session("ada", "s", {}, expected_version="0")
        with pytest.raises(NotFoundError):
            await storage.update_session("ada", "t", {})


@pytest.mark.damage
async def test_what_a_session_without_metadata_left_is_not_taken_over(make_storage: MakeStorage) -> None:
    storage = make_storage(clock=FixedClock())
    await storage.create_user("ada")
    session_id = await storage.create_session("ada")
    await storage.add_message("ada", session_id, Message("user", "old"))
    await storage.backend.delete(key_of(storage, "session", user_id="ada", session_id=session_id))
    async with unchanged(storage):
        with pytest.raises(IntegrityError, match=r"(?s)there are things of it.*check --fix"):
            await storage.create_session("ada", session_id=session_id)
    assert await make_storage(clock=FixedClock()).create_session("ada") == f"{session_id}_001"


# --- conflicts -----------------------------------------------------------------------------------------


async def test_a_change_that_others_always_come_before_ends_in_the_conflict(storage: StorageManager) -> None:
    attempts = []

    async def attempt() -> None:
        attempts.append(1)
        raise ConflictError("It is changed all the time.", key="a/b")

    for key in ("a/b", "a"):
        attempts.clear()
        with pytest.raises(ConflictError, match="all the time"):
            await storage._store.retry(key, attempt)
        assert len(attempts) == 100


async def test_what_is_in_the_way_elsewhere_is_not_tried_again(storage: StorageManager) -> None:
    attempts = []

    async def attempt() -> None:
        attempts.append(1)
        raise ConflictError("Something else is there.", key="a/bc")

    with pytest.raises(ConflictError, match="Something else"):
        await storage._store.retry("a/b", attempt)
    assert len(attempts) == 1
