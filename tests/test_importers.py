"""Importing OpenAI chat-completions JSONL: what is read, what it becomes, and what is said of the rest."""

import asyncio
import dataclasses
import gzip
import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatfile_chat_database import IntegrityError, Message, StorageConfig, StorageManager, UnavailableError
from flatfile_chat_database.importers import (
    UNDATED,
    Conversation,
    Part,
    Report,
    Skip,
    Source,
    import_file,
    reader,
    session_id_of,
)
from flatfile_chat_database.layout import Layout

from .conftest import MakeStorage

read = reader("openai-jsonl")
CONFIG = StorageConfig()


def say(*contents: str) -> list[dict[str, Any]]:
    """Return messages of a user and an assistant in turn."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def conversation(source_id: str, *contents: str) -> dict[str, Any]:
    return {"id": source_id, "messages": say(*contents)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chats.jsonl"


def write(path: Path, *lines: Any) -> Path:
    """Write each line: bytes as they are, everything else as JSON."""
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


def found(path: Path, config: StorageConfig = CONFIG, **arguments: Any) -> list[Conversation | Skip]:
    source = Source(path, **arguments)
    try:
        return list(read(source, config))
    finally:
        source.close()


def only(path: Path, *lines: Any) -> Conversation:
    """Return the one conversation that the lines hold."""
    (item,) = found(write(path, *lines))
    assert isinstance(item, Conversation)
    return item


async def run(storage: StorageManager, path: Path, **arguments: Any) -> Report:
    return await import_file(storage, path, user_id=arguments.pop("user_id", "local"), **arguments)


async def contents(storage: StorageManager, user_id: str = "local") -> dict[str, list[str]]:
    """Return the contents of all messages by session."""
    return {
        session.id: [message.content for message in await storage.get_messages(user_id, session.id)]
        for session in await storage.list_sessions(user_id, 10_000)
    }


def reasons(report: Report) -> dict[str, int]:
    return {reason: tally.count for reason, tally in report.skipped.items()}


# --- what is read --------------------------------------------------------------------------------------


def test_ids_are_made_of_the_source_id_and_the_position(path: Path) -> None:
    item = only(path, conversation("film-0", "Hello", "Hi"))
    assert hashlib.sha256(b"film-0").hexdigest().startswith("6fad5dc4fb1d")
    assert item.session_id == "chat_session_19700101_000000_6fad5dc4fb1d"
    assert [message.id for message in item.messages] == ["6fad5dc4fb1d-000000", "6fad5dc4fb1d-000001"]


def test_session_ids_follow_the_configured_names(path: Path) -> None:
    config = StorageConfig(session_id_prefix="talk", session_timestamp_format="%Y-%m-%d")
    (item,) = found(write(path, conversation("a", "Hello")), config)
    assert isinstance(item, Conversation)
    assert item.session_id.startswith("talk_1970-01-01_")


def test_a_conversation_without_an_id_is_named_after_its_line(path: Path) -> None:
    one, other = found(write(path, {"messages": say("a")}, {"id": "", "messages": say("a")}))
    assert isinstance(one, Conversation) and isinstance(other, Conversation)
    assert one.source_id == hashlib.sha256(json.dumps({"messages": say("a")}).encode()).hexdigest()
    assert one.session_id != other.session_id


def test_equal_conversations_without_an_id_have_names_of_their_own_which_do_not_depend_on_their_neighbours(
    path: Path,
) -> None:
    equal, other = {"messages": say("a")}, {"messages": say("b")}
    together, apart = (
        found(write(path, equal, equal, equal)),
        found(write(path, equal, other, equal, b"no JSON", equal)),
    )
    names = [item.source_id for item in together if isinstance(item, Conversation)]
    assert names == [names[0], f"{names[0]}-2", f"{names[0]}-3"]
    assert len({item.session_id for item in together if isinstance(item, Conversation)}) == 3
    del apart[3], apart[1]
    assert [item.source_id for item in apart if isinstance(item, Conversation)] == names


def test_a_number_is_an_id_like_its_digits(path: Path) -> None:
    assert only(path, {"id": 17, "messages": say("a")}).source_id == "17"


def test_a_batch_file_is_unwrapped_and_the_rest_of_it_kept(path: Path) -> None:
    line = {"custom_id": "r-1", "method": "POST", "url": "/v1", "body": {"model": "m", "messages": say("Hello")}}
    item = only(path, line)
    assert item.source_id == "r-1"
    assert [message.content for message in item.messages] == ["Hello"]
    assert item.metadata == {
        "import": {"format": "openai-jsonl", "id": "r-1"},
        "openai": {"method": "POST", "url": "/v1", "body": {"model": "m"}},
    }


@pytest.mark.parametrize(
    ("fields", "timestamp"),
    [
        ({"created_at": "2024-05-06T07:08:09.5+02:00"}, "2024-05-06T05:08:09.500000+00:00"),
        ({"created_at": "2024-05-06T07:08:09Z"}, "2024-05-06T07:08:09.000000+00:00"),
        ({"timestamp": "2024-05-06 07:08:09"}, "2024-05-06T07:08:09.000000+00:00"),
        ({"timestamp": "2024-05-06"}, "2024-05-06T00:00:00.000000+00:00"),
        ({"create_time": 1714979289}, "2024-05-06T07:08:09.000000+00:00"),
        ({"create_time": 1714979289.25}, "2024-05-06T07:08:09.250000+00:00"),
        ({"create_time": "1714979289"}, "2024-05-06T07:08:09.000000+00:00"),
        ({"created_at": None, "create_time": 1714979289}, "2024-05-06T07:08:09.000000+00:00"),
    ],
)
def test_the_time_of_the_first_message_is_the_session_s(path: Path, fields: Any, timestamp: str) -> None:
    item = only(path, {"id": "a", "messages": [{"role": "user", "content": "x", **fields}]})
    assert item.messages[0].timestamp == item.created_at == timestamp
    assert item.session_id.startswith(f"chat_session_{timestamp[:10].replace('-', '')}_")
    assert item.messages[0].metadata == {"openai": fields}


@pytest.mark.parametrize(
    "value",
    ["yesterday", "", True, [], {}, 1e300, -1e18, 10**30, "0001-01-01T00:00:00", "9999-12-31T23:59:59.999999Z",
     "2024-13-40", "1712010112345", 1712010112345],
)  # fmt: skip
def test_a_time_that_is_not_understood_is_none_but_kept(path: Path, value: Any) -> None:
    item = only(path, {"id": "a", "messages": [{"role": "user", "content": "x", "timestamp": value}]})
    assert item.created_at == "1970-01-01T00:00:00.000000+00:00"
    assert item.messages[0].metadata == {"openai": {"timestamp": value}}


@pytest.mark.parametrize("place", [{"created_at": "2024-05-06"}, {"create_time": 1714953600}])
def test_a_conversation_s_own_time_is_taken_when_its_first_message_has_none(path: Path, place: dict[str, Any]) -> None:
    item = only(path, {"id": "a", "messages": say("a", "b"), **place})
    assert item.created_at == item.messages[0].timestamp == "2024-05-06T00:00:00.000000+00:00"
    assert item.messages[1].timestamp == "2024-05-06T00:00:00.000001+00:00"
    assert item.metadata["openai"] == place
    first, second = say("a", "b")
    item = only(path, {"id": "a", "messages": [first | {"timestamp": "2023-01-01"}, second], **place})
    assert item.created_at == "2023-01-01T00:00:00.000000+00:00"


def test_messages_without_a_time_follow_each_other_by_a_microsecond(path: Path) -> None:
    messages = say("a", "b", "c")
    messages[0]["create_time"] = 1714979289
    item = only(path, {"id": "a", "messages": messages})
    assert [message.timestamp[17:26] for message in item.messages] == ["09.000000", "09.000001", "09.000002"]


@pytest.mark.parametrize(
    ("message", "content", "kept"),
    [
        ({"content": "plain"}, "plain", {}),
        ({"content": None, "tool_calls": [{"id": "t"}]}, "", {"openai": {"tool_calls": [{"id": "t"}]}}),
        ({"tool_call_id": "t"}, "", {"openai": {"tool_call_id": "t"}}),
        ({"content": "x", "name": "Ada"}, "x", {"openai": {"name": "Ada"}}),
        ({"content": []}, "", {"openai": {"content": []}}),
        (
            {"content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}, "b"]},
            "a\nb",
            {"openai": {"content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}, "b"]}},
        ),
    ],
)
def test_what_is_no_plain_text_is_kept_in_the_metadata(path: Path, message: Any, content: str, kept: Any) -> None:
    item = only(path, {"id": "a", "messages": [{"role": "tool", **message}]})
    assert (item.messages[0].role, item.messages[0].content) == ("tool", content)
    assert item.messages[0].metadata == kept


@pytest.mark.parametrize(
    ("given_title", "messages", "title"),
    [
        (None, say("Hello there"), "Hello there"),
        (
            None,
            [{"role": "system", "content": "Be kind"}, {"role": "user", "content": " \n two\n lines "}],
            "two lines",
        ),
        (None, [{"role": "assistant", "content": "Hi"}], ""),
        (None, say("word " * 30), "word word word word word word word word word word word word…"),
        (None, say("字" * 100), "字" * 60 + "…"),
        (None, say("half \ud83d pair"), "half pair"),
        ("Given", say("Hello"), "Given"),
    ],
)
def test_a_title_is_given_or_the_beginning_of_what_the_user_said(
    path: Path, given_title: str | None, messages: Any, title: str
) -> None:
    assert only(path, {"id": "a", "messages": messages, "title": given_title}).title == title


def test_a_title_that_is_no_text_is_kept_with_the_rest(path: Path) -> None:
    item = only(path, {"id": "a", "messages": say("Hello"), "title": 3, "model": "m"})
    assert item.title == "Hello"
    assert item.metadata["openai"] == {"title": 3, "model": "m"}


def test_only_a_newline_ends_a_line(path: Path) -> None:
    text = json.dumps(conversation("a", "one\u2028two\u0085three\x0b"), ensure_ascii=False).encode()
    assert only(path, text).messages[0].content == "one\u2028two\u0085three\x0b"


def test_a_byte_order_mark_blank_lines_and_carriage_returns_are_nothing(path: Path) -> None:
    line = json.dumps(conversation("a", "x")).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n \n" + line.replace(b'"a"', b'"b"'))
    items = found(path)
    assert [(item.line, item.source_id) for item in items if isinstance(item, Conversation)] == [(1, "a"), (4, "b")]
    assert len(items) == 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "\xff"}', "the line is not UTF-8"),
        (b'{"id": "a", "messages": [', "the line is not JSON"),
        (b"\x00\x00\x00\x00", "the line is not JSON"),
        (b"[" * 100_000, "the line is not JSON"),
        (b"9" * 10_000, "the line is not JSON"),
        (b"[1]", "the line is not a JSON object"),
        (b'"text"', "the line is not a JSON object"),
        (b"{}", "the line has no messages"),
        (b'{"messages": []}', "the line has no messages"),
        (b'{"messages": {"role": "user"}}', "the line has no messages"),
        (b'{"custom_id": "x", "response": {"body": {}}}', "the line has no messages"),
    ],
)
def test_a_bad_line_is_skipped_with_its_reason_and_number(path: Path, line: bytes, reason: str) -> None:
    before, skip, after = found(write(path, conversation("a", "x"), line, conversation("b", "y")))
    assert isinstance(before, Conversation) and isinstance(after, Conversation)
    assert isinstance(skip, Skip)
    assert (skip.line, skip.part, skip.reason) == (2, Part.LINE, reason)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("text", "the message is not a JSON object"),
        ({"content": "x"}, "the message has no role"),
        ({"role": "", "content": "x"}, "the message has no role"),
        ({"role": 3, "content": "x"}, "the message has no role"),
        ({"role": "user", "content": 3}, "the message's content is neither text nor a list of parts"),
        ({"role": "user", "content": {"a": 1}}, "the message's content is neither text nor a list of parts"),
    ],
)
def test_a_bad_message_is_skipped_and_its_neighbours_keep_their_ids(path: Path, message: Any, reason: str) -> None:
    good = only(path, conversation("a", "x", "y", "z"))
    messages = say("x", "y", "z")
    messages[1] = message
    item = only(path, {"id": "a", "messages": messages})
    assert [message.id for message in item.messages] == [good.messages[0].id, good.messages[2].id]
    assert [(skip.line, skip.part, skip.reason, skip.messages) for skip in item.skipped] == [
        (1, Part.MESSAGE, reason, 1)
    ]


def test_a_line_that_is_too_long_is_passed_over_without_being_kept(path: Path) -> None:
    long = conversation("long", "x" * 3_000_000)
    items = found(write(path, conversation("a", "x"), long, conversation("b", "y")), max_line_bytes=1_000)
    assert [item.line for item in items] == [1, 2, 3]
    assert isinstance(items[1], Skip)
    assert items[1].reason == "the line is longer than 1,000 bytes"
    assert isinstance(items[2], Conversation)


def test_a_line_of_exactly_the_longest_length_is_read(path: Path) -> None:
    line = json.dumps(conversation("a", "x")).encode()
    for end in (b"\n", b""):
        path.write_bytes(line + end)
        assert isinstance(found(path, max_line_bytes=len(line))[0], Conversation)
        assert isinstance(found(path, max_line_bytes=len(line) - 1)[0], Skip)


def test_gzip_is_known_by_its_bytes_whatever_the_name(tmp_path: Path) -> None:
    line = json.dumps(conversation("a", "x")).encode() + b"\n"
    (tmp_path / "zipped.jsonl").write_bytes(gzip.compress(line))
    (tmp_path / "plain.jsonl.gz").write_bytes(line)
    for name in ("zipped.jsonl", "plain.jsonl.gz"):
        (item,) = found(tmp_path / name)
        assert isinstance(item, Conversation)
    (tmp_path / "empty").write_bytes(b"")
    assert found(tmp_path / "empty") == []


def test_a_damaged_gzip_file_gives_what_stands_before_the_damage(path: Path) -> None:
    lines = [json.dumps(conversation(str(n), "x" * 50 + str(n))).encode() + b"\n" for n in range(2_000)]
    path.write_bytes(gzip.compress(b"".join(lines))[:-2_000])
    *good, last = found(path)
    assert len(good) > 500
    assert isinstance(last, Skip)
    assert last.reason == "the compressed file is damaged from here on"


def test_memory_does_not_grow_with_the_file(path: Path) -> None:
    line = json.dumps(conversation("a", "x" * 10_000)).encode() + b"\n"
    with path.open("wb") as file:
        for _ in range(2_000):
            file.write(line)
    source = Source(path)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read(source, CONFIG)) == 2_000
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
        source.close()


# --- what is stored ------------------------------------------------------------------------------------


async def test_an_import_stores_each_conversation_as_a_session(storage: StorageManager, path: Path) -> None:
    report = await run(storage, write(path, conversation("a", "x", "y"), conversation("b", "z")))
    assert (report.conversations, report.sessions_added) == (2, 2)
    assert (report.messages, report.added, report.already_there, report.skipped) == (3, 3, 0, {})
    assert sorted((await contents(storage)).values()) == [["x", "y"], ["z"]]
    session = (await storage.list_sessions("local"))[0]
    assert session.created_at == "1970-01-01T00:00:00.000000+00:00"
    assert session.metadata["import"]["format"] == "openai-jsonl"


async def test_a_second_import_adds_nothing(storage: StorageManager, path: Path) -> None:
    write(path, *(conversation(str(n), "x", "y") for n in range(200)))
    await run(storage, path)
    before = {key: await storage.backend.read(key) for key in await storage.backend.list_keys("")}
    report = await run(storage, path)
    assert (report.conversations, report.sessions_added, report.added, report.already_there) == (200, 0, 0, 400)
    assert {key: await storage.backend.read(key) for key in await storage.backend.list_keys("")} == before


async def test_an_import_that_was_interrupted_is_completed_by_the_next(
    storage: StorageManager, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, *(conversation(str(n), "x", "y") for n in range(200)))
    original = StorageManager.add_messages
    calls = 0

    async def failing(self: StorageManager, *arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > 70:
            raise UnavailableError("The disk is full.")
        return await original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StorageManager, "add_messages", failing)
        with pytest.raises(UnavailableError, match="disk is full"):
            await run(storage, path)
    assert 0 < sum(map(len, (await contents(storage)).values())) < 400  # sessions without messages among them
    report = await run(storage, path)
    assert report.added + report.already_there == 400
    assert list((await contents(storage)).values()) == [["x", "y"]] * 200


@pytest.mark.slow
async def test_a_cancelled_import_stops_and_leaves_nothing_running(make_storage: MakeStorage, path: Path) -> None:
    storage = make_storage(max_sessions_per_user=300)
    write(path, *(conversation(str(n), "x") for n in range(600)))
    task: asyncio.Task[Report] = asyncio.create_task(run(storage, path, progress=lambda *_: task.cancel()))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert await storage.count_sessions("local") < 300
    await run(storage, path)
    assert await storage.count_sessions("local") == 300  # the limit


async def test_several_conversations_are_stored_at_once_but_not_all(
    storage: StorageManager, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, *(conversation(str(n), "x") for n in range(300)))
    original = StorageManager.add_messages
    running = most = 0

    async def counting(self: StorageManager, *arguments: Any) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return await original(self, *arguments)
        finally:
            running -= 1

    monkeypatch.setattr(StorageManager, "add_messages", counting)
    assert (await run(storage, path)).added == 300
    assert most <= 64
    if "flatfile" in repr(storage).lower():  # the memory backend never waits
        assert most > 10


async def test_sessions_over_the_limit_are_skipped_with_the_setting_to_raise(
    make_storage: MakeStorage, path: Path
) -> None:
    storage = make_storage(max_sessions_per_user=3)
    write(path, *(conversation(str(n), "x", "y") for n in range(10)))
    report = await run(storage, path)
    assert (report.conversations, report.added, report.messages_skipped) == (10, 6, 14)
    ((reason, tally),) = report.skipped.items()
    assert (reason, tally.part, tally.count, tally.limit_name) == (
        "no room for another session",
        Part.CONVERSATION,
        7,
        "max_sessions_per_user",
    )
    assert len(tally.examples) == 5
    again = await run(storage, path)  # those that fill the store are still found
    assert (again.added, again.already_there, again.messages_skipped) == (0, 6, 14)
    wider = await run(make_storage(max_sessions_per_user=10), path)
    assert (wider.added, wider.already_there, wider.skipped) == (14, 6, {})


async def test_only_the_messages_over_a_limit_are_skipped(make_storage: MakeStorage, path: Path) -> None:
    storage = make_storage(max_message_size_bytes=1_000, max_messages_per_session=5)
    texts = ["a", "b", "x" * 2_000, "c", "d", "e", "f", "y" * 2_000]
    report = await run(storage, write(path, conversation("long", *texts), conversation("other", "z")))
    assert (report.messages, report.added) == (9, 6)
    assert reasons(report) == {
        "the message is over max_message_size_bytes": 2,
        "the message is over max_messages_per_session": 1,
    }
    assert sorted((await contents(storage)).values()) == [["a", "b", "c", "d", "e"], ["z"]]


async def test_what_the_store_refuses_is_skipped_alone(storage: StorageManager, path: Path) -> None:
    deep: Any = []
    for _ in range(200):
        deep = [deep]
    messages = say("a", "half \ud83d", "c", "d", "e")
    messages[3]["score"] = float("nan")
    messages[4]["tool_calls"] = deep
    report = await run(storage, write(path, {"id": "a", "messages": messages}))
    assert reasons(report) == {"the store refuses the message": 3}
    assert (
        report.skipped["the store refuses the message"].examples[0].detail.startswith("message.content holds the lone")
    )
    assert list((await contents(storage)).values()) == [["a", "c"]]


async def test_a_conversation_that_the_store_refuses_is_skipped_alone(storage: StorageManager, path: Path) -> None:
    bad = conversation("bad", "x", "y") | {"temperature": float("inf")}
    report = await run(storage, write(path, bad, conversation("half \udc00", "x"), conversation("good", "z")))
    assert reasons(report) == {"the store refuses the conversation": 2}
    assert (report.conversations, report.messages, report.messages_skipped) == (3, 4, 3)
    assert list((await contents(storage)).values()) == [["z"]]


async def test_a_conversation_of_which_nothing_can_be_stored_makes_no_session(
    storage: StorageManager, path: Path
) -> None:
    report = await run(storage, write(path, {"id": "a", "messages": [{"role": "user", "content": 3}]}))
    assert (report.conversations, report.messages, report.added) == (1, 1, 0)
    assert await storage.count_sessions("local") == 0


DIFFERS = "the conversation differs from the one that was imported before"
LATE = "the message would come after its successors: delete the session and import again"


async def foreseen_and_done(storage: StorageManager, path: Path) -> Report:
    """Import, and see that a dry run has said the same."""
    foreseen = await run(storage, path, dry_run=True)
    done = await run(storage, path)
    assert facts(foreseen) == facts(done)
    return done


async def test_a_conversation_that_has_changed_in_the_source_is_reported_and_left(
    storage: StorageManager, path: Path
) -> None:
    await run(storage, write(path, conversation("a", "x", "y", "z")))
    report = await foreseen_and_done(storage, write(path, conversation("a", "x", "CHANGED", "z", "new")))
    assert (report.messages, report.added, report.already_there, report.messages_skipped) == (4, 0, 2, 2)
    assert reasons(report) == {DIFFERS: 1}
    (example,) = report.skipped[DIFFERS].examples
    assert example.detail == f"message 2 is not the one in {session_id_of(CONFIG, UNDATED, 'a')}"
    assert list((await contents(storage)).values()) == [["x", "y", "z"]]


async def test_another_conversation_of_the_same_name_is_not_mixed_into_the_first(
    storage: StorageManager, path: Path
) -> None:
    await run(storage, write(path, conversation("1", "A0", "A1")))
    for _ in range(2):
        report = await foreseen_and_done(storage, write(path, conversation("1", "B0", "B1", "B2", "B3")))
        assert (report.added, report.already_there, report.messages_skipped) == (0, 0, 4)
        assert reasons(report) == {DIFFERS: 1}
    assert list((await contents(storage)).values()) == [["A0", "A1"]]


async def test_a_conversation_that_has_grown_is_continued(storage: StorageManager, path: Path) -> None:
    await run(storage, write(path, conversation("a", "x")))
    for texts in ("xy", "xyzw", "xy"):
        report = await foreseen_and_done(storage, write(path, conversation("a", *texts)))
        assert report.skipped == {}
    assert list((await contents(storage)).values()) == [["x", "y", "z", "w"]]


async def test_another_conversation_that_comes_at_the_same_time_is_not_mixed_in(
    storage: StorageManager, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StorageManager.add_messages

    async def overtaken(self: StorageManager, user_id: str, session_id: str, messages: list[Message]) -> int:
        monkeypatch.setattr(StorageManager, "add_messages", original)
        theirs = [dataclasses.replace(message, content="theirs") for message in messages[:2]]
        await self.add_messages(user_id, session_id, theirs)
        return await self.add_messages(user_id, session_id, messages)

    monkeypatch.setattr(StorageManager, "add_messages", overtaken)
    report = await run(storage, write(path, conversation("a", *"vwxyz")))
    assert reasons(report) == {DIFFERS: 1}
    assert (report.messages, report.added, report.messages_skipped) == (5, 0, 5)
    assert list((await contents(storage)).values()) == [["theirs", "theirs"]]


async def test_a_message_that_was_left_out_is_not_appended_behind_its_successors(
    make_storage: MakeStorage, path: Path
) -> None:
    write(path, conversation("a", "one", "two" * 200, "three", "four" * 200))
    report = await run(make_storage(max_message_size_bytes=300), path)
    assert reasons(report) == {"the message is over max_message_size_bytes": 2}
    storage = make_storage()
    report = await foreseen_and_done(storage, path)
    assert (report.added, report.already_there, reasons(report)) == (1, 2, {LATE: 1})
    assert report.skipped[LATE].examples[0].detail == "message 2"
    assert list((await contents(storage)).values()) == [["one", "three", "four" * 200]]
    write(path, conversation("a", "one", "two" * 200))  # nor when the source has lost them
    assert reasons(await foreseen_and_done(storage, path)) == {LATE: 1}
    write(path, conversation("a", "one", "two" * 200, "three", "four" * 200))
    for session in await storage.list_sessions("local"):
        await storage.delete_session("local", session.id)
    assert (await foreseen_and_done(storage, path)).added == 4


async def test_messages_of_the_user_s_own_are_no_successors(storage: StorageManager, path: Path) -> None:
    await run(storage, write(path, conversation("a", "x")))
    (session,) = await storage.list_sessions("local")
    start = (await storage.get_messages("local", session.id))[0].id.partition("-")[0]
    for name in (f"{start}-later", f"{start}-9", "000000000000-000009", "no number"):
        await storage.add_message("local", session.id, Message("user", name, id=name))
    report = await foreseen_and_done(storage, write(path, conversation("a", "x", "y")))
    assert (report.added, report.already_there, report.skipped) == (1, 1, {})


async def test_equal_conversations_without_an_id_are_each_imported(storage: StorageManager, path: Path) -> None:
    write(path, {"messages": say("a")}, {"messages": say("a")}, {"messages": say("b")})
    report = await foreseen_and_done(storage, path)
    assert (report.sessions_added, report.added, report.already_there) == (3, 3, 0)
    report = await foreseen_and_done(storage, path)
    assert (report.sessions_added, report.added, report.already_there) == (0, 0, 3)


async def test_of_an_id_that_stands_twice_the_first_comes_first(storage: StorageManager, path: Path) -> None:
    report = await run(storage, write(path, *(conversation("a", "x", str(n)) for n in range(20))))
    assert list((await contents(storage)).values()) == [["x", "0"]]
    assert (report.added, report.already_there, report.messages_skipped) == (2, 19, 19)


async def test_a_session_of_another_source_is_left_alone(storage: StorageManager, path: Path) -> None:
    await storage.create_user("local")
    session_id = session_id_of(CONFIG, UNDATED, "a")
    await storage.create_session("local", session_id=session_id, metadata={"import": {"id": "other"}})
    report = await run(storage, write(path, conversation("a", "x")))
    foreseen = await run(storage, path, dry_run=True)
    assert reasons(report) == reasons(foreseen) == {"another conversation has its session id": 1}
    assert await contents(storage) == {session_id: []}


async def test_a_session_that_an_import_made_may_be_changed_by_its_user(storage: StorageManager, path: Path) -> None:
    await run(storage, write(path, conversation("a", "x")))
    (session,) = await storage.list_sessions("local")
    await storage.update_session("local", session.id, {"title": "Mine", "metadata": {}})
    await storage.add_message("local", session.id, Message("user", "and more"))
    report = await run(storage, path)
    assert (report.already_there, report.skipped) == (1, {})
    assert await contents(storage) == {session.id: ["x", "and more"]}


@pytest.mark.damage
async def test_a_conversation_whose_session_is_damaged_is_skipped_alone(storage: StorageManager, path: Path) -> None:
    await run(storage, write(path, conversation("a", "x", "y"), conversation("b", "z")))
    session_id = session_id_of(CONFIG, UNDATED, "a")
    key = Layout(CONFIG).key("session", user_id="local", session_id=session_id)
    await storage.backend.write(key, b"{")
    for dry_run in (True, False):
        report = await run(storage, path, dry_run=dry_run)
        assert reasons(report) == {"the stored session is damaged": 1}
        assert (report.messages, report.already_there, report.messages_skipped) == (3, 1, 2)


async def test_a_store_that_is_damaged_under_way_skips_what_is_left(
    storage: StorageManager, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(self: StorageManager, *arguments: Any) -> int:
        raise IntegrityError("The log is damaged.")

    monkeypatch.setattr(StorageManager, "add_messages", failing)
    report = await run(storage, write(path, conversation("a", "x", "y")))
    assert reasons(report) == {"the stored session is damaged": 1}
    assert (report.messages, report.messages_skipped) == (2, 2)


# --- dry runs ------------------------------------------------------------------------------------------

MIXED = [
    conversation("a", "x", "y"),
    b"no JSON",
    conversation("b", "x" * 2_000, "z"),
    {"messages": [*say("a"), {"role": "user", "content": 3}]},
    conversation("c", *"abcdefgh"),
    conversation("d", "half \ud83d", "whole"),
    conversation("e", "no room") | {"score": float("nan")},
    conversation("f", "no room"),
]


def facts(report: Report) -> dict[str, Any]:
    """Return a report without the words of each case."""
    fields = dataclasses.asdict(report) | {"dry_run": None}
    for tally in fields["skipped"].values():
        tally["examples"] = [example["line"] for example in tally["examples"]]
    return fields


async def test_a_dry_run_reports_what_an_import_does_and_writes_nothing(make_storage: MakeStorage, path: Path) -> None:
    limits = {"max_message_size_bytes": 1_000, "max_messages_per_session": 5}
    storage = make_storage(**limits)
    await storage.backend.open()
    for lines in (MIXED[:2], MIXED, MIXED):  # into nothing, on top of a part, on top of it all
        write(path, *lines)
        before = await storage.backend.list_keys("")
        foreseen = await run(make_storage(read_only=True, **limits), path, dry_run=True)
        assert await storage.backend.list_keys("") == before
        done = await run(storage, path)
        assert foreseen.dry_run and not done.dry_run
        assert facts(foreseen) == facts(done)


async def test_a_dry_run_foresees_how_many_conversations_find_no_room(make_storage: MakeStorage, path: Path) -> None:
    # Which ones find room is not foreseen: they are created at the same time.
    write(path, *(conversation(str(number), "x") for number in range(20)))
    foreseen = await run(make_storage(read_only=True, max_sessions_per_user=5), path, dry_run=True)
    done = await run(make_storage(max_sessions_per_user=5), path)
    assert (foreseen.added, done.added) == (5, 5)
    assert (
        [tally.count for tally in foreseen.skipped.values()] == [tally.count for tally in done.skipped.values()] == [15]
    )


async def test_a_dry_run_makes_no_user(storage: StorageManager, path: Path) -> None:
    report = await run(storage, write(path, conversation("a", "x")), dry_run=True)
    assert (report.dry_run, report.added) == (True, 1)
    assert await storage.count_users() == 0


# --- the report ----------------------------------------------------------------------------------------


async def test_progress_is_told_with_bytes(storage: StorageManager, path: Path) -> None:
    write(path, *(conversation(str(n), "x") for n in range(150)))
    told: list[tuple[int, int, int | None]] = []
    await run(storage, path, progress=lambda report, at, size: told.append((report.added, at, size)))
    assert told[-1] == (150, path.stat().st_size, path.stat().st_size)
    assert len(told) >= 3
    assert [at for _, at, _ in told] == sorted(at for _, at, _ in told)


parts = st.lists(
    st.one_of(
        st.binary(max_size=30).filter(lambda line: b"\n" not in line),
        st.builds(lambda n, texts: conversation(str(n), *texts), st.integers(0, 5), st.lists(st.text(max_size=5))),
        st.builds(lambda value: {"messages": value}, st.lists(st.one_of(st.none(), st.just(say("a")[0])))),
    ),
    max_size=8,
)


@given(parts)
def test_every_message_is_counted_once(tmp_path_factory: pytest.TempPathFactory, lines: list[Any]) -> None:
    path = tmp_path_factory.mktemp("import") / "lines"
    given_messages = sum(len(line["messages"]) for line in lines if isinstance(line, dict))

    async def scenario() -> None:
        async with StorageManager(StorageConfig(storage_url="memory:")) as storage:
            first = await run(storage, write(path, *lines))
            assert first.messages == given_messages
            foreseen = await run(storage, path, dry_run=True)
            second = await run(storage, path)
            assert facts(foreseen) == facts(second)
            assert (second.messages, second.added) == (given_messages, 0)
            assert second.messages_skipped == first.messages_skipped

    asyncio.run(scenario())
