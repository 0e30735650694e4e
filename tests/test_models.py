"""Records, their ids and their timestamps."""

import os
import re
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatfile_chat_database.errors import ValidationError
from flatfile_chat_database.models import (
    Document,
    Message,
    Panel,
    Session,
    SituationalContext,
    User,
    _Uuid7Source,
    format_timestamp,
    new_id,
    now,
    parse_timestamp,
    utc_now,
)

# --- ids -----------------------------------------------------------------------------------------------


def test_ids_are_unique_and_in_order_over_many_threads() -> None:
    def take(count: int) -> list[str]:
        return [new_id() for _ in range(count)]

    with ThreadPoolExecutor(4) as threads:
        taken = list(threads.map(take, [25_000] * 4))
    for of_one_thread in taken:
        assert of_one_thread == sorted(of_one_thread)
    assert len({name for of_one_thread in taken for name in of_one_thread}) == 100_000


def test_an_id_is_a_version_7_uuid_of_this_moment() -> None:
    before = time.time_ns() // 1_000_000
    text = _Uuid7Source()()
    after = time.time_ns() // 1_000_000
    parsed = uuid.UUID(text)
    assert (str(parsed), parsed.version, parsed.variant) == (text, 7, uuid.RFC_4122)
    assert before <= parsed.int >> 80 <= after


def test_ids_stay_in_order_when_the_clock_goes_back_or_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = 1_700_000_000_000_000_000
    source = _Uuid7Source()
    taken = []
    for step in (0, 0, -5_000_000_000, -1_000_000, 0, 2_000_000, -(10**18)):
        monkeypatch.setattr(time, "time_ns", lambda step=step: moment + step)
        taken += [source() for _ in range(10)]
    assert taken == sorted(set(taken))


def test_ids_stay_in_order_when_there_are_more_than_the_counter_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_000_000_000)
    source = _Uuid7Source()
    taken = [source() for _ in range(20_000)]
    assert taken == sorted(set(taken))
    assert all(uuid.UUID(text).version == 7 for text in taken)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # the point: other threads may run
def test_a_forked_child_repeats_no_id() -> None:
    new_id()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - runs in the child
        os.write(write, "\n".join(new_id() for _ in range(1000)).encode())
        os._exit(0)
    os.close(write)
    mine = {new_id() for _ in range(1000)}
    with os.fdopen(read) as lines:
        theirs = set(lines.read().split())
    os.waitpid(child, 0)
    assert len(theirs) == 1000
    assert not mine & theirs


def test_ids_of_one_moment_differ_in_what_is_random() -> None:
    source = _Uuid7Source()
    taken = [uuid.UUID(source()).int & (1 << 62) - 1 for _ in range(1000)]
    assert len(set(taken)) == 1000
    for bit in range(62):
        assert 350 < sum(number >> bit & 1 for number in taken) < 650, f"bit {bit} is not random"


# --- timestamps ----------------------------------------------------------------------------------------


def test_a_timestamp_always_has_the_same_form() -> None:
    for text in (now(), format_timestamp(utc_now()), format_timestamp(datetime(2026, 1, 31, tzinfo=UTC))):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", text)


def test_a_timestamp_is_written_in_utc() -> None:
    east = timezone(timedelta(hours=5, minutes=45))
    assert format_timestamp(datetime(2026, 1, 31, 5, 0, tzinfo=east)) == "2026-01-30T23:15:00.000000+00:00"


@given(st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.timezones()))
def test_a_timestamp_comes_back_and_sorts_as_its_moment(moment: datetime) -> None:
    text = format_timestamp(moment)
    assert parse_timestamp(text) == moment.astimezone(UTC)
    later = moment.astimezone(UTC) + timedelta(microseconds=1)
    assert text < format_timestamp(later)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-01-31T12:00:00Z", datetime(2026, 1, 31, 12, tzinfo=UTC)),
        ("2026-01-31T12:00:00+00:00", datetime(2026, 1, 31, 12, tzinfo=UTC)),
        ("2026-01-31T12:00:00.5+02:00", datetime(2026, 1, 31, 10, 0, 0, 500_000, tzinfo=UTC)),
        ("2026-01-31 12:00:00-08:00", datetime(2026, 1, 31, 20, tzinfo=UTC)),
        ("20260131T120000Z", datetime(2026, 1, 31, 12, tzinfo=UTC)),
        ("1970-01-01T00:00:00Z", datetime(1970, 1, 1, tzinfo=UTC)),
    ],
)
def test_iso_8601_with_an_offset_is_read(text: str, moment: datetime) -> None:
    assert parse_timestamp(text) == moment


@pytest.mark.parametrize(
    "text",
    [
        "", "now", "2026-01-31", "2026-01-31T12:00:00", "2026-13-31T12:00:00Z", "2026-02-30T12:00:00Z",
        "2026-01-31T25:00:00Z", "2026-01-31T12:00:00+99:00", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00",
        "1767225600", "31 January 2026", "2026-01-31T12:00:00Z\0", "\ud800", " 2026-01-31T12:00:00Z", "x" * 100_000,
        None, 1767225600, 1.5, b"2026-01-31T12:00:00Z", datetime(2026, 1, 31, tzinfo=UTC), True,
    ],
    ids=lambda value: ascii(value)[:40],
)  # fmt: skip
def test_what_is_no_timestamp_is_refused_by_name(text: object) -> None:
    with pytest.raises(ValidationError, match=r"^message\.timestamp ") as error:
        parse_timestamp(text, "message.timestamp")
    assert len(str(error.value)) < 300


# --- records -------------------------------------------------------------------------------------------


def test_records_have_the_specifications_fields_in_its_order() -> None:
    def names(kind: type) -> list[str]:
        return [field.name for field in fields(kind)]

    assert names(Message)[:6] == ["id", "role", "content", "timestamp", "attachments", "metadata"]
    assert names(Session)[:6] == ["id", "user_id", "title", "created_at", "updated_at", "metadata"]
    assert names(Panel)[:5] == ["id", "type", "personas", "created_at", "config"]
    assert names(SituationalContext) == ["summary", "key_points", "entities", "timestamp", "confidence"]
    assert names(Document)[:6] == ["filename", "path", "mime_type", "size", "uploaded_at", "analysis"]


def test_a_message_needs_a_role_and_a_content_only() -> None:
    before = utc_now()
    message = Message("user", "Hello")
    assert message == Message(role="user", content="Hello", id=message.id, timestamp=message.timestamp)
    assert (message.attachments, message.metadata, message.parent_id) == ([], {}, None)
    assert before <= parse_timestamp(message.timestamp) <= utc_now()
    assert Message("user", "Hello").id > message.id


def test_defaults_are_not_shared() -> None:
    one, other = Message("user", ""), Message("user", "")
    one.metadata["a"] = 1
    one.attachments.append("a")
    assert (other.metadata, other.attachments) == ({}, [])


def test_a_record_takes_no_other_field() -> None:
    with pytest.raises(AttributeError):
        Message("user", "").contents = "x"  # type: ignore[attr-defined]


def test_two_records_are_equal_whatever_their_version() -> None:
    user = User("ann", now(), now(), {"a": 1}, version="1")
    assert user == replace(user, version="2")
    assert user != replace(user, profile={})
