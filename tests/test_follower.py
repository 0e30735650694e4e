"""Following a session: each new message once and in order, whatever is removed meanwhile."""

import pytest

from flatfile_chat_database import Message, StorageManager, follower
from flatfile_chat_database.follower import Follower


@pytest.fixture
async def session(storage: StorageManager) -> str:
    """Make a session of `ada` with the messages m0 to m9."""
    await storage.create_user("ada")
    session_id = await storage.create_session("ada")
    await append(storage, session_id, *(f"m{n}" for n in range(10)))
    return session_id


async def append(storage: StorageManager, session_id: str, *names: str) -> None:
    await storage.add_messages("ada", session_id, [Message("user", name, id=name) for name in names])


def ids(messages: list[Message]) -> list[str]:
    return [message.id for message in messages]


@pytest.mark.parametrize(("count", "expected"), [(0, []), (1, ["m9"]), (3, ["m7", "m8", "m9"])])
async def test_it_begins_with_the_newest_messages(
    storage: StorageManager, session: str, count: int, expected: list[str]
) -> None:
    assert ids(await Follower(storage, "ada", session).begin(count)) == expected


async def test_it_begins_with_all_messages_when_more_are_wanted_than_there_are_or_than_it_remembers(
    storage: StorageManager, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(await Follower(storage, "ada", session).begin(5_000)) == 10
    monkeypatch.setattr(follower, "_REMEMBERED", 4)
    following = Follower(storage, "ada", session)
    assert len(await following.begin(8)) == 8
    await append(storage, session, "n")
    assert ids(await following.next()) == ["n"]


@pytest.mark.parametrize("count", [0, 1, 10])
async def test_it_goes_on_with_what_comes(storage: StorageManager, session: str, count: int) -> None:
    following = Follower(storage, "ada", session)
    await following.begin(count)
    assert await following.next() == []
    await append(storage, session, "n1", "n2")
    assert ids(await following.next()) == ["n1", "n2"]
    assert await following.next() == []


@pytest.mark.parametrize("count", [0, 1, 10])
@pytest.mark.parametrize("popped", [1, 3])
async def test_what_was_there_is_never_new_after_a_pop(
    storage: StorageManager, session: str, count: int, popped: int
) -> None:
    following = Follower(storage, "ada", session)
    await following.begin(count)
    for _ in range(popped):
        await storage.pop_message("ada", session)
    assert await following.next() == []
    await append(storage, session, "n1")
    assert ids(await following.next()) == ["n1"]


@pytest.mark.parametrize("count", [0, 1, 10])
async def test_what_takes_the_place_of_removed_messages_between_two_looks_is_new(
    storage: StorageManager, session: str, count: int
) -> None:
    following = Follower(storage, "ada", session)
    await following.begin(count)
    await storage.pop_message("ada", session)
    await storage.delete_message("ada", session, "m2")
    await append(storage, session, "n1", "n2", "n3")
    assert ids(await following.next()) == ["n1", "n2", "n3"]


@pytest.mark.parametrize("count", [0, 1, 10])
async def test_after_a_clear_everything_is_new(storage: StorageManager, session: str, count: int) -> None:
    following = Follower(storage, "ada", session)
    await following.begin(count)
    await storage.clear_messages("ada", session)
    await append(storage, session, *(f"p{n}" for n in range(15)))  # more than before
    assert ids(await following.next()) == [f"p{n}" for n in range(15)]
    await storage.clear_messages("ada", session)
    assert await following.next() == []
    await append(storage, session, "q")  # fewer than before
    assert ids(await following.next()) == ["q"]


async def test_a_session_that_is_not_there_yet_is_followed_from_its_first_message(storage: StorageManager) -> None:
    following = Follower(storage, "ada", "later")
    assert await following.begin(10) == []
    assert await following.next() == []
    await storage.create_user("ada")
    await storage.create_session("ada", session_id="later")
    assert await following.next() == []
    await append(storage, "later", "first", "second")
    assert ids(await following.next()) == ["first", "second"]


async def test_many_new_messages_come_a_page_at_a_time(
    storage: StorageManager, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "_PAGE", 4)
    following = Follower(storage, "ada", session)
    await following.begin(0)
    await append(storage, session, *(f"n{n}" for n in range(6)))
    assert ids(await following.next()) == ["n0", "n1", "n2"]
    assert ids(await following.next()) == ["n3", "n4", "n5"]
    assert await following.next() == []
