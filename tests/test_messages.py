"""Messages of sessions and panels: adding, paging, streaming, changing."""

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from flatfile_chat_database import (
    IntegrityError,
    Message,
    MessagePage,
    NotFoundError,
    StorageConfig,
    StorageLimitExceeded,
    StorageManager,
    UnavailableError,
    ValidationError,
)
from flatfile_chat_database.backends.changes import Edit
from flatfile_chat_database.backends.memory import MemoryBackend

from .conftest import MakeStorage
from .contents import ILLEGAL_IDS, NOT_JSON, contents, key_of, nested, unchanged

NOON = "2026-01-31T12:00:00.000000+00:00"


async def begin(storage: StorageManager) -> None:
    """Make the session "s" of the user "ada"."""
    await storage.create_user("ada")
    await storage.create_session("ada", session_id="s")


async def fill(storage: StorageManager, count: int) -> None:
    """Give it messages with the ids "0", "1" … and the texts "text 0" …"""
    await begin(storage)
    added = [Message("user", f"text {n}", id=str(n), timestamp=NOON) for n in range(count)]
    assert await storage.add_messages("ada", "s", added) == count


def log_key(storage: StorageManager) -> str:
    return key_of(storage, "messages", user_id="ada", session_id="s")


async def lines(storage: StorageManager) -> list[dict[str, Any]]:
    """Return what stands in the log."""
    data = await storage.backend.read(log_key(storage)) or b""
    return [json.loads(line) for line in data.splitlines()]


def ids(messages: list[Message]) -> str:
    return " ".join(message.id for message in messages)


# --- adding --------------------------------------------------------------------------------------------


async def test_a_message_comes_back_as_it_was_given(storage: StorageManager) -> None:
    await begin(storage)
    message = Message(
        role="assistant",
        content="Grüße, 世界 \0 \u2028 🎉\n",
        attachments=["users/ada/s/documents/a.pdf"],
        metadata={"tokens": 12, "cost": 0.25, "nested": {"list": [None, True]}},
        parent_id="0",
    )
    assert await storage.add_message("ada", "s", message) is True
    assert await storage.get_messages("ada", "s") == [message]
    assert await storage.get_message("ada", "s", message.id) == message
    assert await storage.message_exists("ada", "s", message.id) is True
    assert await storage.count_messages("ada", "s") == 1


async def test_a_line_of_the_log_has_the_fields_of_the_specification_in_its_order(storage: StorageManager) -> None:
    await begin(storage)
    await storage.add_message("ada", "s", Message("user", "a\0é", id="1", timestamp=NOON))
    await storage.add_message("ada", "s", Message("user", "b", id="2", timestamp=NOON, parent_id="1"))
    assert await storage.backend.read("users/ada/s/messages.jsonl") == (
        b'{"id":"1","role":"user","content":"a\\u0000\xc3\xa9","timestamp":"2026-01-31T12:00:00.000000+00:00",'
        b'"attachments":[],"metadata":{}}\n'
        b'{"id":"2","role":"user","content":"b","timestamp":"2026-01-31T12:00:00.000000+00:00",'
        b'"attachments":[],"metadata":{},"parent_id":"1"}\n'
    )


async def test_messages_keep_the_order_in_which_they_were_added_whatever_their_time(storage: StorageManager) -> None:
    await begin(storage)
    for n, year in enumerate(("2026", "1999", "2030")):
        await storage.add_message("ada", "s", Message("user", "x", id=str(n), timestamp=f"{year}-01-01T00:00:00Z"))
    assert ids(await storage.get_messages("ada", "s")) == "0 1 2"


async def test_several_messages_are_added_as_one(storage: StorageManager) -> None:
    await fill(storage, 3)
    more = (Message("user", "more", id=str(n), timestamp=NOON) for n in range(3, 6))
    assert await storage.add_messages("ada", "s", more) == 3
    assert ids(await storage.get_messages("ada", "s")) == "0 1 2 3 4 5"


async def test_a_hundred_messages_added_at_once_are_all_there(storage: StorageManager) -> None:
    await begin(storage)
    sent = [Message("user", f"text {n}") for n in range(100)]
    assert all(await asyncio.gather(*(storage.add_message("ada", "s", message) for message in sent)))
    found = await storage.get_messages("ada", "s", limit=1000)
    assert sorted(found, key=lambda message: message.id) == sorted(sent, key=lambda message: message.id)


async def test_messages_that_one_task_adds_stay_in_its_order_among_those_of_others(storage: StorageManager) -> None:
    await begin(storage)

    async def talk(role: str) -> None:
        for n in range(20):
            await storage.add_message("ada", "s", Message(role, str(n)))

    await asyncio.gather(*(talk(role) for role in "abcde"))
    found = await storage.get_messages("ada", "s")
    for role in "abcde":
        assert [message.content for message in found if message.role == role] == [str(n) for n in range(20)]


async def test_messages_from_two_threads_with_their_own_loops_are_all_there(storage: StorageManager) -> None:
    await begin(storage)
    problems: list[BaseException] = []

    async def talk(role: str) -> None:
        await asyncio.gather(*(storage.add_message("ada", "s", Message(role, str(n))) for n in range(25)))

    def run(role: str) -> None:
        try:
            asyncio.run(talk(role))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=(role,)) for role in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert problems == []
    found = {(message.role, message.content) for message in await storage.get_messages("ada", "s")}
    assert found == {(role, str(n)) for role in "ab" for n in range(25)}


async def test_the_same_message_again_adds_nothing(storage: StorageManager) -> None:
    await begin(storage)
    message = Message("user", "Hello", metadata={"a": 1})
    await storage.add_message("ada", "s", message)
    async with unchanged(storage):
        assert await storage.add_message("ada", "s", message) is True
        later = replace(message, timestamp="2031-01-01T00:00:00+00:00")  # what a retry that builds it anew sends
        assert await storage.add_message("ada", "s", later) is True
        assert await storage.add_messages("ada", "s", [message, message]) == 0
    assert await storage.add_messages("ada", "s", [message, new := Message("user", "x"), new]) == 1
    assert await storage.count_messages("ada", "s") == 2


@pytest.mark.parametrize(
    "change", [{"content": "y"}, {"role": "assistant"}, {"metadata": {"b": 1}}, {"parent_id": "0"}], ids=str
)
async def test_another_message_under_the_same_id_is_refused_and_changes_nothing(
    storage: StorageManager, change: dict[str, Any]
) -> None:
    await begin(storage)
    message = Message("user", "x", id="1")
    await storage.add_message("ada", "s", message)
    other = replace(message, **change)
    async with unchanged(storage):
        with pytest.raises(ValidationError, match="Another message has the id '1'"):
            await storage.add_message("ada", "s", other)
        with pytest.raises(ValidationError, match="Another message has the id '1'"):
            await storage.add_messages("ada", "s", [Message("user", "new"), other])
        with pytest.raises(ValidationError, match="Another message has the id '2'"):
            await storage.add_messages("ada", "s", [Message("user", "one", id="2"), Message("user", "two", id="2")])


async def test_the_same_id_may_stand_in_two_sessions(storage: StorageManager) -> None:
    await fill(storage, 1)
    await storage.create_session("ada", session_id="t")
    assert await storage.add_message("ada", "t", Message("user", "another", id="0")) is True


async def test_adding_nothing_returns_0_but_not_to_what_does_not_exist(storage: StorageManager) -> None:
    await begin(storage)
    async with unchanged(storage):
        assert await storage.add_messages("ada", "s", []) == 0
        for user_id, session_id in (("ada", "t"), ("bob", "s")):
            for messages in ([], [Message("user", "x")]):
                with pytest.raises(NotFoundError, match=f"The session '{session_id}' of user '{user_id}'"):
                    await storage.add_messages(user_id, session_id, messages)
        with pytest.raises(NotFoundError, match="The panel 'p' does not exist"):
            await storage.add_panel_messages("p", [])


async def test_an_add_that_is_cancelled_has_happened_wholly_or_not_at_all(storage: StorageManager) -> None:
    await begin(storage)
    for turns in range(8):
        batch = [Message("user", "x", id=f"{turns}-{n}") for n in range(5)]
        task = asyncio.ensure_future(storage.add_messages("ada", "s", batch))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await storage.add_message("ada", "s", Message("user", "last", id="last"))
    found = [message.id for message in await storage.get_messages("ada", "s")]
    for turns in range(8):
        assert [x for x in found if x.startswith(f"{turns}-")] in ([], [f"{turns}-{n}" for n in range(5)])
    assert found[-1] == "last"


async def test_a_caller_who_changes_a_message_while_it_is_added_changes_nothing_stored(
    storage: StorageManager,
) -> None:
    await begin(storage)
    message = Message("user", "x", metadata={"a": [1]})
    task = asyncio.ensure_future(storage.add_message("ada", "s", message))
    await asyncio.sleep(0)
    message.metadata["a"].append(float("nan"))
    message.content = "y"
    await task
    found = await storage.get_message("ada", "s", message.id)
    assert found is not None and found.content == "x" and found.metadata == {"a": [1]}


# --- limits --------------------------------------------------------------------------------------------


async def test_a_message_may_be_as_large_as_configured_and_not_a_byte_larger(make_storage: MakeStorage) -> None:
    line = b'{"id":"1","role":"user","content":"","timestamp":"2026-01-31T12:00:00.000000+00:00","attachments":[],'
    empty = len(line + b'"metadata":{}}')
    storage = make_storage(max_message_size_bytes=empty + 10)
    await begin(storage)
    async with unchanged(storage):
        for content in ("x" * 11, "é" * 6, "\0\0"):
            with pytest.raises(StorageLimitExceeded, match="max_message_size_bytes") as caught:
                await storage.add_message("ada", "s", Message("user", content, id="1", timestamp=NOON))
            size = empty + len(content.encode().replace(b"\0", b"\\u0000"))
            assert (caught.value.limit, caught.value.value) == (empty + 10, size)
        with pytest.raises(StorageLimitExceeded):
            await storage.add_messages("ada", "s", [Message("user", ""), Message("user", "x" * 5000)])
    assert await storage.add_message("ada", "s", Message("user", "é" * 5, id="1", timestamp=NOON)) is True
    async with unchanged(storage):
        with pytest.raises(StorageLimitExceeded, match="max_message_size_bytes"):
            await storage.update_message("ada", "s", "1", {"content": "x" * 11})
    assert await storage.update_message("ada", "s", "1", {"content": "x" * 10}) is True


async def test_a_session_holds_no_more_messages_than_configured(make_storage: MakeStorage) -> None:
    storage = make_storage(max_messages_per_session=3)
    await fill(storage, 2)
    async with unchanged(storage):
        with pytest.raises(StorageLimitExceeded, match="max_messages_per_session") as caught:
            await storage.add_messages("ada", "s", [Message("user", "x"), Message("user", "y")])
        assert (caught.value.limit, caught.value.value) == (3, 4)
    first = (await storage.get_messages("ada", "s"))[0]
    assert await storage.add_messages("ada", "s", [first, Message("user", "x")]) == 1  # one is there already
    async with unchanged(storage):
        with pytest.raises(StorageLimitExceeded):
            await storage.add_message("ada", "s", Message("user", "x"))
        assert await storage.add_message("ada", "s", first) is True
    await storage.pop_message("ada", "s")
    assert await storage.add_message("ada", "s", Message("user", "x")) is True


async def test_the_limit_holds_for_many_at_once(make_storage: MakeStorage) -> None:
    storage = make_storage(max_messages_per_session=10)
    await begin(storage)
    adding = (storage.add_message("ada", "s", Message("user", str(n))) for n in range(30))
    results = await asyncio.gather(*adding, return_exceptions=True)
    assert results.count(True) == 10
    assert sum(isinstance(result, StorageLimitExceeded) for result in results) == 20
    assert await storage.count_messages("ada", "s") == 10


# --- reading -------------------------------------------------------------------------------------------


async def test_reading_what_is_absent_finds_nothing_and_creates_nothing(storage: StorageManager) -> None:
    assert await storage.get_messages("ada", "s") == []
    assert await storage.get_messages("ada", "s", offset=-5) == []
    assert await storage.page_messages("ada", "s") == MessagePage([], False)
    assert [message async for message in storage.stream_messages("ada", "s")] == []
    assert await storage.get_message("ada", "s", "1") is None
    assert await storage.message_exists("ada", "s", "1") is False
    assert await storage.count_messages("ada", "s") == 0
    assert await storage.get_panel_messages("p") == []
    assert await storage.count_panel_messages("p") == 0
    assert await contents(storage) == {}


async def test_a_page_is_what_a_slice_of_the_list_would_be(make_storage: MakeStorage) -> None:
    storage = make_storage(message_pagination_default_limit=4)
    await fill(storage, 10)
    everything = [str(n) for n in range(10)]
    for limit in (None, 0, 1, 2, 5, 9, 10, 11, 10**20):
        for offset in (0, 1, 8, 9, 10, 11, 10**20, -1, -2, -9, -10, -11, -(10**20)):
            found = [message.id for message in await storage.get_messages("ada", "s", limit, offset)]
            assert found == everything[offset:][: 4 if limit is None else limit], (limit, offset)


async def test_a_negative_offset_alone_gives_the_newest_messages(storage: StorageManager) -> None:
    await fill(storage, 150)
    assert ids(await storage.get_messages("ada", "s", offset=-3)) == "147 148 149"
    assert len(await storage.get_messages("ada", "s")) == 100


@pytest.mark.parametrize(
    "arguments",
    [{"limit": -1}, {"limit": 1.0}, {"limit": True}, {"limit": "1"}, {"offset": None}, {"offset": 1.5}],
    ids=str,
)
async def test_a_limit_or_offset_that_is_no_whole_number_is_refused(
    storage: StorageManager, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError, match=rf"{next(iter(arguments))} must"):
        await storage.get_messages("ada", "s", **arguments)
    if "limit" in arguments:
        with pytest.raises(ValidationError, match="limit must"):
            await storage.page_messages("ada", "s", **arguments)


async def test_the_newest_page_comes_without_an_id(make_storage: MakeStorage) -> None:
    storage = make_storage(message_pagination_default_limit=3)
    await fill(storage, 5)
    for limit, expected, has_more in (
        (None, "2 3 4", True),
        (0, "", True),
        (1, "4", True),
        (4, "1 2 3 4", True),
        (5, "0 1 2 3 4", False),
        (6, "0 1 2 3 4", False),
    ):
        page = await storage.page_messages("ada", "s", limit=limit)
        assert (ids(page.messages), page.has_more) == (expected, has_more)


async def test_pages_before_an_id_end_just_before_it(storage: StorageManager) -> None:
    await fill(storage, 5)
    for before, limit, expected, has_more in (
        ("4", 2, "2 3", True),
        ("2", 2, "0 1", False),
        ("1", 2, "0", False),
        ("0", 2, "", False),
        ("4", 0, "", True),
        ("0", 0, "", False),
        ("3", None, "0 1 2", False),
    ):
        page = await storage.page_messages("ada", "s", limit=limit, before=before)
        assert (ids(page.messages), page.has_more) == (expected, has_more)


async def test_pages_after_an_id_begin_just_after_it(storage: StorageManager) -> None:
    await fill(storage, 5)
    for after, limit, expected, has_more in (
        ("0", 2, "1 2", True),
        ("2", 2, "3 4", False),
        ("3", 2, "4", False),
        ("4", 2, "", False),
        ("3", 0, "", True),
        ("4", 0, "", False),
        ("1", None, "2 3 4", False),
    ):
        page = await storage.page_messages("ada", "s", limit=limit, after=after)
        assert (ids(page.messages), page.has_more) == (expected, has_more)


async def test_paging_back_from_the_newest_page_meets_every_message_once(storage: StorageManager) -> None:
    await fill(storage, 23)
    page = await storage.page_messages("ada", "s", limit=5)
    found = page.messages
    while page.has_more:
        page = await storage.page_messages("ada", "s", limit=5, before=found[0].id)
        found = page.messages + found
    assert ids(found) == " ".join(map(str, range(23)))


async def test_a_page_beside_an_unknown_id_is_an_error(storage: StorageManager) -> None:
    await fill(storage, 2)
    for session_id, missing in (("s", "The message '7'"), ("t", "The session 't' of user 'ada'")):
        with pytest.raises(NotFoundError, match=f"{missing} does not exist"):
            await storage.page_messages("ada", session_id, before="7")
        with pytest.raises(NotFoundError, match=f"{missing} does not exist"):
            await storage.page_messages("ada", session_id, after="7")
    with pytest.raises(NotFoundError, match="The panel 'p' does not exist"):
        await storage.page_panel_messages("p", after="7")
    with pytest.raises(ValidationError, match="before and after"):
        await storage.page_messages("ada", "s", before="1", after="0")
    with pytest.raises(ValidationError, match="before"):
        await storage.page_messages("ada", "s", before=1)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="after"):
        await storage.page_messages("ada", "s", after="")


async def test_a_stream_yields_every_message_in_order(storage: StorageManager) -> None:
    await fill(storage, 250)
    found = [message async for message in storage.stream_messages("ada", "s")]
    assert ids(found) == " ".join(map(str, range(250)))


async def test_a_stream_that_is_left_early_leaves_nothing_open(storage: StorageManager) -> None:
    await fill(storage, 250)
    stream = storage.stream_messages("ada", "s")
    assert (await anext(stream)).id == "0"
    await stream.aclose()  # type: ignore[attr-defined]
    assert ids(await storage.get_messages("ada", "s", 1)) == "0"


async def test_a_stream_takes_from_the_backend_no_more_than_it_yields() -> None:
    taken: list[int] = []

    class Endless(MemoryBackend):
        async def stream_log(self, key: str, *, strict: bool = False) -> AsyncIterator[list[bytes]]:
            for run in range(1_000_000):
                taken.append(run)
                line = f'{{"id":"{run}","role":"user","content":"","timestamp":"{NOON}"}}'
                yield [line.encode()]

    storage = StorageManager(backend=Endless(StorageConfig(storage_url="memory:")))
    async for message in storage.stream_messages("ada", "s"):
        if message.id == "3":
            break
    assert taken == [0, 1, 2, 3]


# --- changing ------------------------------------------------------------------------------------------


async def test_a_message_is_changed_in_its_place(storage: StorageManager) -> None:
    await fill(storage, 3)
    updates: dict[str, Any] = {
        "role": "assistant",
        "content": "new",
        "timestamp": "2030-01-01T00:00:00+00:00",
        "attachments": ["a"],
        "metadata": {"b": 2},
        "parent_id": "0",
    }
    assert await storage.update_message("ada", "s", "1", updates) is True
    found = await storage.get_messages("ada", "s")
    assert ids(found) == "0 1 2"
    assert found[1] == Message(id="1", **updates)
    assert await storage.get_message("ada", "s", "1") == found[1]
    assert await storage.update_message("ada", "s", "1", {"parent_id": None, "metadata": {}}) is True
    assert "parent_id" not in (await lines(storage))[1]
    assert (await storage.get_messages("ada", "s"))[1].metadata == {}


async def test_a_change_keeps_what_a_person_wrote_into_the_line(storage: StorageManager) -> None:
    await fill(storage, 1)
    by_hand = {"note": "by hand", "role": "user", "id": "h", "timestamp": NOON, "content": "x", "stars": 1.5}
    await storage.backend.append(log_key(storage), json.dumps(by_hand).encode() + b"\n")
    assert await storage.update_message("ada", "s", "h", {"content": "y"}) is True
    assert (await lines(storage))[1] == by_hand | {"content": "y"}
    assert list((await lines(storage))[1]) == list(by_hand)


async def test_changing_an_absent_message_is_an_error_and_changes_nothing(storage: StorageManager) -> None:
    await fill(storage, 1)
    async with unchanged(storage):
        with pytest.raises(NotFoundError, match="The message '7' does not exist"):
            await storage.update_message("ada", "s", "7", {"content": "x"})
        with pytest.raises(NotFoundError, match="The session 't' of user 'ada' does not exist"):
            await storage.update_message("ada", "t", "0", {"content": "x"})
        with pytest.raises(NotFoundError, match="The panel 'p' does not exist"):
            await storage.update_panel_message("p", "0", {"content": "x"})


async def test_many_changes_of_a_message_at_once_are_all_there(storage: StorageManager) -> None:
    await fill(storage, 2)
    fields: list[dict[str, Any]] = [
        {"role": "r"},
        {"content": "c"},
        {"attachments": ["a"]},
        {"metadata": {"m": 1}},
        {"parent_id": "p"},
        {"timestamp": "2030-01-01T00:00:00+00:00"},
    ]
    await asyncio.gather(*(storage.update_message("ada", "s", "0", update) for update in fields * 5))
    expected: dict[str, Any] = {}
    for update in fields:
        expected |= update
    assert await storage.get_message("ada", "s", "0") == Message(id="0", **expected)


async def test_changes_and_additions_at_once_lose_nothing(storage: StorageManager) -> None:
    await fill(storage, 5)
    await asyncio.gather(
        *(storage.add_message("ada", "s", Message("user", "x", id=f"new {n}")) for n in range(20)),
        *(storage.update_message("ada", "s", str(n), {"content": "changed"}) for n in range(4)),
        storage.delete_message("ada", "s", "4"),
    )
    found = await storage.get_messages("ada", "s")
    assert [message.content for message in found] == ["changed"] * 4 + ["x"] * 20
    assert {message.id for message in found[4:]} == {f"new {n}" for n in range(20)}


async def test_a_change_is_repeated_when_another_process_was_faster() -> None:
    class Meddling(MemoryBackend):
        """Changes the message between the first look at it and the commit."""

        meddled = False

        async def commit(self, changes: Any) -> Any:
            if isinstance(changes[-1], Edit) and not self.meddled:
                self.meddled = True
                edit = changes[-1]
                await super().commit([structs.replace(edit, line=edit.expected.replace(b'"user"', b'"other"') + b"\n")])
            return await super().commit(changes)

    for call in ("update", "delete"):
        storage = StorageManager(backend=Meddling(StorageConfig(storage_url="memory:")))
        await fill(storage, 2)
        if call == "update":
            assert await storage.update_message("ada", "s", "0", {"content": "x"}) is True
            found = await storage.get_message("ada", "s", "0")
            assert found is not None and (found.role, found.content) == ("other", "x")
        else:
            assert await storage.delete_message("ada", "s", "0") is True
            assert ids(await storage.get_messages("ada", "s")) == "1"


async def test_deleting_what_another_process_was_faster_to_delete_returns_false() -> None:
    class Meddling(MemoryBackend):
        """Deletes the message between the look at it and the commit."""

        async def commit(self, changes: Any) -> Any:
            if isinstance(changes[-1], Edit):
                await super().commit(changes)
            return await super().commit(changes)

    storage = StorageManager(backend=Meddling(StorageConfig(storage_url="memory:")))
    await fill(storage, 2)
    assert await storage.delete_message("ada", "s", "0") is False
    assert ids(await storage.get_messages("ada", "s")) == "1"


async def test_a_deleted_message_is_gone_and_deleting_it_again_returns_false(storage: StorageManager) -> None:
    await fill(storage, 3)
    assert await storage.delete_message("ada", "s", "1") is True
    assert ids(await storage.get_messages("ada", "s")) == "0 2"
    assert await storage.get_message("ada", "s", "1") is None
    assert all(b"text 1" not in (data or b"") for data in (await contents(storage)).values())
    async with unchanged(storage):
        assert await storage.delete_message("ada", "s", "1") is False
        assert await storage.delete_message("ada", "t", "1") is False
        assert await storage.delete_panel_message("p", "1") is False


async def test_of_many_who_delete_a_message_one_has_done_it(storage: StorageManager) -> None:
    await fill(storage, 3)
    results = await asyncio.gather(*(storage.delete_message("ada", "s", "1") for _ in range(10)))
    assert sorted(results) == [False] * 9 + [True]
    assert ids(await storage.get_messages("ada", "s")) == "0 2"


async def test_popping_removes_and_returns_the_newest_message(storage: StorageManager) -> None:
    await fill(storage, 2)
    assert await storage.pop_message("ada", "s") == Message("user", "text 1", id="1", timestamp=NOON)
    assert ids(await storage.get_messages("ada", "s")) == "0"
    popped = await storage.pop_message("ada", "s")
    assert popped is not None and popped.id == "0"
    async with unchanged(storage):
        assert await storage.pop_message("ada", "s") is None
        assert await storage.pop_message("ada", "t") is None
        assert await storage.pop_panel_message("p") is None
    await storage.add_message("ada", "s", Message("user", "again", id="0"))
    assert await storage.count_messages("ada", "s") == 1


async def test_pops_at_once_return_each_message_once(storage: StorageManager) -> None:
    await fill(storage, 10)
    popped = await asyncio.gather(*(storage.pop_message("ada", "s") for _ in range(12)))
    assert sorted(message.id for message in popped if message is not None) == sorted(map(str, range(10)))


async def test_clearing_removes_all_messages_and_leaves_the_session(storage: StorageManager) -> None:
    await fill(storage, 7)
    assert await storage.clear_messages("ada", "s") == 7
    assert await storage.get_messages("ada", "s") == []
    assert await storage.session_exists("ada", "s") is True
    async with unchanged(storage):
        assert await storage.clear_messages("ada", "s") == 0
        assert await storage.clear_messages("ada", "t") == 0
        assert await storage.clear_panel_messages("p") == 0
    await storage.add_message("ada", "s", Message("user", "again"))
    assert await storage.count_messages("ada", "s") == 1


# --- bad input -----------------------------------------------------------------------------------------

BAD_FIELDS: dict[str, dict[str, Any]] = {
    "empty role": {"role": ""},
    "role no string": {"role": 7},
    "role None": {"role": None},
    "role lone surrogate": {"role": "\ud800"},
    "content no string": {"content": b"x"},
    "content None": {"content": None},
    "content lone surrogate": {"content": "a\udfff"},
    "timestamp naive": {"timestamp": "2026-01-31T12:00:00"},
    "timestamp no time": {"timestamp": "now"},
    "timestamp number": {"timestamp": 0},
    "attachments text": {"attachments": "a"},
    "attachments of numbers": {"attachments": [1]},
    "parent_id empty": {"parent_id": ""},
    "parent_id number": {"parent_id": 1},
    "parent_id control character": {"parent_id": "a\0"},
    **{f"metadata {name}": {"metadata": value} for name, value in NOT_JSON.items()},
    "metadata nested 10,000 deep": {"metadata": nested(10_000)},
}
BAD_IDS: dict[str, Any] = {
    "empty": "",
    "number": 7,
    "None": None,
    "control character": "a\x1b[2J",
    "lone surrogate": "\ud800",
    "too long": "x" * 513,
}


@pytest.mark.parametrize("fields", BAD_FIELDS.values(), ids=BAD_FIELDS)
async def test_a_message_with_a_field_that_does_not_fit_is_refused_and_changes_nothing(
    storage: StorageManager, fields: dict[str, Any]
) -> None:
    await fill(storage, 1)
    name = next(iter(fields))
    message = Message(**{"role": "user", "content": "x"} | fields)
    async with unchanged(storage):
        with pytest.raises(ValidationError, match=rf"message\.{name}"):
            await storage.add_message("ada", "s", message)
        with pytest.raises(ValidationError, match=rf"message\.{name}"):
            await storage.add_messages("ada", "s", [Message("user", "good"), message])
        with pytest.raises(ValidationError, match=rf"(message|updates)\.{name}|updates is nested"):
            await storage.update_message("ada", "s", "0", fields)


@pytest.mark.parametrize("message_id", BAD_IDS.values(), ids=BAD_IDS)
async def test_an_illegal_message_id_is_refused_everywhere_and_changes_nothing(
    storage: StorageManager, message_id: Any
) -> None:
    await fill(storage, 1)
    async with unchanged(storage):
        for call in (
            storage.add_message("ada", "s", Message("user", "x", id=message_id)),
            storage.get_message("ada", "s", message_id),
            storage.message_exists("ada", "s", message_id),
            storage.update_message("ada", "s", message_id, {"content": "x"}),
            storage.delete_message("ada", "s", message_id),
        ):
            with pytest.raises(ValidationError, match=r"message\.id|message_id"):
                await call


@pytest.mark.parametrize("name", ["id", "user_id", "", "Content"])
async def test_a_field_that_is_unknown_or_never_changes_is_refused(storage: StorageManager, name: str) -> None:
    await fill(storage, 1)
    async with unchanged(storage):
        with pytest.raises(ValidationError, match=rf"updates\.{name} cannot be set"):
            await storage.update_message("ada", "s", "0", {"content": "x", name: "0"})


@pytest.mark.parametrize(
    "messages",
    [None, 7, Message("user", "x"), "text", [None], [{"role": "user"}]],
    ids=["None", "7", "Message", "text", "[None]", "[dict]"],
)
async def test_what_is_no_message_is_refused_and_changes_nothing(storage: StorageManager, messages: Any) -> None:
    await begin(storage)
    async with unchanged(storage):
        with pytest.raises(ValidationError, match="message"):
            await storage.add_messages("ada", "s", messages)


@pytest.mark.parametrize("bad", ILLEGAL_IDS.values(), ids=ILLEGAL_IDS)
async def test_an_illegal_user_or_session_id_is_refused_everywhere(storage: StorageManager, bad: Any) -> None:
    await fill(storage, 1)
    async with unchanged(storage):
        for user_id, session_id, field in ((bad, "s", "user_id"), ("ada", bad, "session_id")):
            for call in (
                storage.add_message(user_id, session_id, Message("user", "x")),
                storage.get_messages(user_id, session_id),
                storage.page_messages(user_id, session_id),
                anext(storage.stream_messages(user_id, session_id)),
                storage.count_messages(user_id, session_id),
                storage.get_message(user_id, session_id, "0"),
                storage.update_message(user_id, session_id, "0", {"content": "x"}),
                storage.delete_message(user_id, session_id, "0"),
                storage.pop_message(user_id, session_id),
                storage.clear_messages(user_id, session_id),
            ):
                with pytest.raises(ValidationError, match=field):
                    await call


async def test_a_read_only_store_refuses_every_change(make_storage: MakeStorage) -> None:
    await fill(make_storage(), 2)
    storage = make_storage(read_only=True)
    async with unchanged(storage):
        for call in (
            storage.add_message("ada", "s", Message("user", "x")),
            storage.add_messages("ada", "s", []),
            storage.update_message("ada", "s", "0", {"content": "x"}),
            storage.delete_message("ada", "s", "0"),
            storage.pop_message("ada", "s"),
            storage.clear_messages("ada", "s"),
        ):
            with pytest.raises(UnavailableError, match="read-only"):
                await call
    assert ids(await storage.get_messages("ada", "s")) == "0 1"


# --- damage --------------------------------------------------------------------------------------------

BAD_LINES = {
    "no JSON": b"half a li\n",
    "a number": b"7\n",
    "no content": b'{"id":"9","role":"user","timestamp":"2026-01-01T00:00:00Z"}\n',
    "an empty id": b'{"id":"","role":"user","content":"x","timestamp":"2026-01-01T00:00:00Z"}\n',
    "NUL bytes": b"\0" * 100 + b"\n",
    "no UTF-8": b'{"id":"9","role":"user","content":"\xff","timestamp":"2026-01-01T00:00:00Z"}\n',
}


async def put_between(storage: StorageManager, line: bytes) -> None:
    """Put a line between the messages "1" and "2"."""
    await fill(storage, 4)
    good = (await storage.backend.read(log_key(storage)) or b"").splitlines(keepends=True)
    await storage.backend.write(log_key(storage), b"".join([*good[:2], line, *good[2:]]))


@pytest.mark.damage
@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
async def test_a_bad_line_is_reported_and_never_hides_its_neighbours(
    storage: StorageManager, line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    await put_between(storage, line)
    async with unchanged(storage):
        with caplog.at_level(logging.WARNING, "flatfile_chat_database"):
            assert ids(await storage.get_messages("ada", "s")) == "0 1 2 3"
        assert log_key(storage) in caplog.text
        assert ids(await storage.get_messages("ada", "s", 2, 1)) == "1 2"
        assert ids([message async for message in storage.stream_messages("ada", "s")]) == "0 1 2 3"
        assert ids((await storage.page_messages("ada", "s", before="2")).messages) == "0 1"
        assert await storage.count_messages("ada", "s") == 4
        with pytest.raises(IntegrityError, match=log_key(storage)):
            await storage.get_messages("ada", "s", strict=True)
        with pytest.raises(IntegrityError, match=log_key(storage)):
            await storage.page_messages("ada", "s", strict=True)
        with pytest.raises(IntegrityError, match=log_key(storage)):
            [message async for message in storage.stream_messages("ada", "s", strict=True)]


@pytest.mark.damage
@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
async def test_a_log_with_a_bad_line_takes_more_but_is_never_rewritten(storage: StorageManager, line: bytes) -> None:
    await put_between(storage, line)
    assert await storage.add_message("ada", "s", Message("user", "x", id="4", timestamp=NOON)) is True
    popped = await storage.pop_message("ada", "s")  # takes nothing from before the bad line
    assert popped is not None and popped.id == "4"
    async with unchanged(storage):
        for call in (
            storage.update_message("ada", "s", "0", {"content": "x"}),
            storage.delete_message("ada", "s", "0"),
            storage.clear_messages("ada", "s"),
        ):
            with pytest.raises(IntegrityError, match=log_key(storage)):
                await call


@pytest.mark.damage
async def test_a_message_without_a_valid_time_is_damage_that_hides_and_shifts_nothing(
    make_storage: MakeStorage, caplog: pytest.LogCaptureFixture
) -> None:
    storage = make_storage()
    await put_between(storage, b'{"id":"t","role":"user","content":"x","timestamp":"2026-01-01T00:00:00"}\n')
    async with unchanged(storage):
        with caplog.at_level(logging.WARNING, "flatfile_chat_database"):
            assert ids(await storage.get_messages("ada", "s")) == "0 1 t 2 3"
            assert ids((await storage.page_messages("ada", "s")).messages) == "0 1 t 2 3"
            assert ids([message async for message in storage.stream_messages("ada", "s")]) == "0 1 t 2 3"
            assert ids(await storage.get_messages("ada", "s", limit=1, offset=2)) == "t"
            paged, page = [], await storage.page_messages("ada", "s", limit=1, after="0")
            while page.messages:
                paged += page.messages
                assert page.has_more == (len(paged) < 4)
                page = await storage.page_messages("ada", "s", limit=1, after=paged[-1].id)
            assert ids(paged) == "1 t 2 3"
            assert await storage.count_messages("ada", "s") == 5
        assert "'t'" in caplog.text and log_key(storage) in caplog.text
        with pytest.raises(IntegrityError, match="'t'"):
            await storage.get_messages("ada", "s", strict=True)
        with pytest.raises(IntegrityError, match="'t'"):
            await storage.get_message("ada", "s", "t")
        trusting = make_storage(validate_json_on_read=False)
        assert ids(await trusting.get_messages("ada", "s", strict=True)) == "0 1 t 2 3"
    assert await storage.update_message("ada", "s", "t", {"timestamp": NOON}) is True
    assert ids(await storage.get_messages("ada", "s", strict=True)) == "0 1 t 2 3"


@pytest.mark.damage
async def test_of_two_lines_with_one_id_the_first_is_the_message_and_deleting_it_removes_both(
    storage: StorageManager,
) -> None:
    await put_between(storage, b'{"id":"0","role":"user","content":"twin","timestamp":"2026-01-01T00:00:00Z"}\n')
    message = await storage.get_message("ada", "s", "0")
    assert message is not None and message.content == "text 0"
    assert await storage.update_message("ada", "s", "0", {"content": "new"}) is True
    assert await asyncio.wait_for(storage.delete_message("ada", "s", "0"), 10) is True
    assert ids(await storage.get_messages("ada", "s")) == "1 2 3"


# --- panels --------------------------------------------------------------------------------------------


async def test_a_panel_has_messages_as_a_session_has(make_storage: MakeStorage) -> None:
    storage = make_storage(max_messages_per_session=4)
    panel = await storage.create_panel("debate", ["one", "two"])
    first = Message("one", "Hello", id="0")
    assert await storage.add_panel_message(panel, first) is True
    more = [Message("two", "Hi", id="1", parent_id="0"), Message("one", "So", id="2"), Message("two", "x", id="3")]
    assert await storage.add_panel_messages(panel, more) == 3
    assert await storage.get_panel_messages(panel) == [first, *more]
    assert ids(await storage.get_panel_messages(panel, 2, -3)) == "1 2"
    page = await storage.page_panel_messages(panel, limit=2, after="0")
    assert (ids(page.messages), page.has_more) == ("1 2", True)
    assert [message async for message in storage.stream_panel_messages(panel)] == [first, *more]
    assert await storage.get_panel_message(panel, "1") == more[0]
    async with unchanged(storage):
        with pytest.raises(StorageLimitExceeded, match="max_messages_per_session"):
            await storage.add_panel_message(panel, Message("one", "too many"))
    assert await storage.update_panel_message(panel, "2", {"content": "new"}) is True
    changed = await storage.get_panel_message(panel, "2")
    assert changed is not None and changed.content == "new"
    assert await storage.delete_panel_message(panel, "0") is True
    popped = await storage.pop_panel_message(panel)
    assert popped is not None and popped.id == "3"
    assert await storage.count_panel_messages(panel) == 2
    assert await storage.clear_panel_messages(panel) == 2


async def test_with_threading_off_a_panel_message_has_no_parent(make_storage: MakeStorage) -> None:
    storage = make_storage(panel_message_threading_enabled=False)
    panel = await storage.create_panel("debate", ["one"])
    await storage.add_panel_message(panel, Message("one", "Hello", id="0"))
    await begin(storage)
    answer = Message("one", "Yes", parent_id="0")
    calls: list[Callable[[], Any]] = [
        lambda: storage.add_panel_message(panel, answer),
        lambda: storage.add_panel_messages(panel, [Message("one", "x"), answer]),
        lambda: storage.update_panel_message(panel, "0", {"parent_id": "0"}),
    ]
    async with unchanged(storage):
        for call in calls:
            with pytest.raises(ValidationError, match="panel_message_threading_enabled"):
                await call()
    assert await storage.update_panel_message(panel, "0", {"parent_id": None}) is True
    assert await storage.add_message("ada", "s", answer) is True  # the rule is about panels
