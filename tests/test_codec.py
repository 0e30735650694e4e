"""Bytes on disk: what is written, what is refused, what is read back."""

import json
import math
from collections import OrderedDict
from datetime import UTC, datetime
from decimal import Decimal
from enum import IntEnum, StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatfile_chat_database import codec
from flatfile_chat_database.errors import IntegrityError, ValidationError
from flatfile_chat_database.models import Message, Session, SituationalContext

WHEN = "2026-01-31T12:00:00.000000+00:00"


def message(content: str = "hello", **fields: Any) -> Message:
    return Message(**{"role": "user", "content": content, "id": "m1", "timestamp": WHEN} | fields)


def nested(depth: int, kind: type = list) -> Any:
    value: Any = []
    for _ in range(depth - 1):
        value = [value] if kind is list else {"a": value}
    return value


# --- what is written -------------------------------------------------------------------------------------


def test_a_message_is_one_line_in_the_specifications_order() -> None:
    full = message(attachments=["a.pdf"], metadata={"z": 1, "a": [None, True, 0.5]}, parent_id="m0")
    assert codec.encode_message(full) == (
        b'{"id":"m1","role":"user","content":"hello","timestamp":"2026-01-31T12:00:00.000000+00:00",'
        b'"attachments":["a.pdf"],"metadata":{"z":1,"a":[null,true,0.5]},"parent_id":"m0"}\n'
    )


def test_a_parent_is_left_out_when_there_is_none() -> None:
    assert codec.encode_message(message()) == (
        b'{"id":"m1","role":"user","content":"hello","timestamp":"2026-01-31T12:00:00.000000+00:00",'
        b'"attachments":[],"metadata":{}}\n'
    )


def test_a_document_is_indented_for_people_and_keeps_the_order_of_its_fields() -> None:
    content = {"b": 1, "a": {"ü": ["张"]}, "empty": {}, "none": None}
    assert codec.encode_document(content).decode() == (
        '{\n  "b": 1,\n  "a": {\n    "ü": [\n      "张"\n    ]\n  },\n  "empty": {},\n  "none": null\n}\n'
    )


def test_a_context_is_stored_in_the_specifications_order() -> None:
    context = SituationalContext("s", ["k"], {"who": ["ann"]}, WHEN, 0.5)
    assert codec.context_fields(codec.check_context(context)) == {
        "summary": "s", "key_points": ["k"], "entities": {"who": ["ann"]}, "timestamp": WHEN, "confidence": 0.5,
    }  # fmt: skip
    assert list(codec.context_fields(context)) == ["summary", "key_points", "entities", "timestamp", "confidence"]


@pytest.mark.parametrize("character", ["\n", "\r", "\r\n", "\0", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_every_character_is_kept_in_one_line(character: str) -> None:
    content = f"before{character}after"
    line = codec.encode_message(message(content, metadata={content: content}))
    assert line.count(b"\n") == 1
    assert b"\0" not in line
    assert b"\r" not in line
    assert codec.decode_message(line[:-1]).content == content
    assert codec.decode_message(line).metadata == {content: content}


def test_nul_is_kept_as_an_escape_and_text_as_it_is() -> None:
    line = codec.encode_message(message("\0 张三 🙂 \u2028"))
    assert "\\u0000 张三 🙂 \u2028".encode() in line


@given(
    st.text(),
    st.dictionaries(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(10**299), 10**299)
            | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
            max_leaves=20,
        ),
        max_size=5,
    ),
)  # fmt: skip
def test_what_is_accepted_comes_back_equal_and_any_reader_reads_it(content: str, metadata: dict[str, Any]) -> None:
    checked = codec.check_message(message(content, metadata=metadata))
    line = codec.encode_message(checked)
    assert codec.decode_message(line) == checked
    assert json.loads(line)["metadata"] == metadata
    document = codec.encode_document(codec.check_object(metadata, "metadata"))
    assert codec.decode_object(document) == json.loads(document) == metadata
    assert codec.own_object(metadata, "metadata") == metadata
    assert codec.line_id(line) == codec.written_id(line) == "m1"


# --- what is refused -------------------------------------------------------------------------------------

NOT_JSON: dict[str, Any] = {
    "NaN": math.nan,
    "infinity": math.inf,
    "minus infinity": -math.inf,
    "a lone surrogate": "\ud800",
    "half an emoji": "\ud83d",
    "bytes": b"x",
    "a tuple": (1, 2),
    "a set": {1, 2},
    "a frozenset": frozenset(),
    "a date": datetime(2026, 1, 31, tzinfo=UTC),
    "a decimal": Decimal("1.5"),
    "a complex number": 1j,
    "an object": object(),
    "a class": dict,
    "a generator": (number for number in [1]),
    "a message": message(),
    "a number as key": {1: "a"},
    "None as key": {None: "a"},
    "a tuple as key": {(1, 2): "a"},
    "a surrogate as key": {"\udfff": 1},
    "an integer of 400 digits": 10**400,
    "a negative one": -(10**400),
}


@pytest.mark.parametrize("value", NOT_JSON.values(), ids=NOT_JSON)
@pytest.mark.parametrize("around", [lambda v: {"deep": v}, lambda v: {"list": [1, {"deep": [v]}]}], ids=["", "nested"])
def test_what_json_cannot_hold_is_refused_with_its_place(value: Any, around: Any) -> None:
    for check in (codec.check_object, codec.own_object):
        with pytest.raises(ValidationError, match=r"metadata\.(deep|list)"):
            check(around(value), "metadata")
    with pytest.raises(ValidationError, match=r"message\.metadata\."):
        codec.check_message(message(metadata=around(value)))


@pytest.mark.parametrize("kind", [list, dict])
def test_a_hundred_levels_are_taken_and_no_more(kind: type) -> None:
    codec.check_json(nested(codec.MAX_DEPTH, kind), "metadata")
    for depth in (codec.MAX_DEPTH + 1, 10_000):
        with pytest.raises(ValidationError, match="nested deeper than 100"):
            codec.check_json(nested(depth, kind), "metadata")
    fitting = {"a": nested(codec.MAX_DEPTH - 1, kind)}
    assert codec.decode_object(codec.encode_document(codec.check_object(fitting, "metadata"))) == fitting


def test_an_object_that_holds_itself_is_refused() -> None:
    endless: dict[str, Any] = {}
    endless["again"] = endless
    with pytest.raises(ValidationError, match="nested deeper"):
        codec.check_object(endless, "metadata")


@pytest.mark.parametrize("value", [None, [], "x", 1, (("a", 1),), OrderedDict, b"{}"], ids=repr)
def test_only_a_dict_is_an_object(value: Any) -> None:
    with pytest.raises(ValidationError, match=r"^metadata must be a dict"):
        codec.check_object(value, "metadata")


class Mood(StrEnum):
    GLAD = "glad"


class Level(IntEnum):
    HIGH = 3


class Marked(str):
    __slots__ = ()


def test_values_of_a_subclass_are_written_as_what_they_are() -> None:
    content = {"enum": Mood.GLAD, "number": Level.HIGH, "text": Marked("x"), "ordered": OrderedDict(a=1)}
    plain = {"enum": "glad", "number": 3, "text": "x", "ordered": {"a": 1}}
    assert codec.decode_object(codec.encode_document(codec.check_object(content, "metadata"))) == plain
    own = codec.own_object(content, "metadata")
    assert own == plain
    assert [type(value) for value in own.values()] == [str, int, str, dict]


def test_an_own_object_does_not_change_with_the_callers() -> None:
    content: dict[str, Any] = {"a": [1]}
    own = codec.own_object(content, "metadata")
    content["a"].append(2)
    assert own == {"a": [1]}


BAD_FIELDS: dict[str, list[Any]] = {
    "id": ["", "a\0", "a\n", "\x7f", "\x85", "x" * 513, "\ud800", None, 7],
    "role": ["", None, 7, "\ud800", b"user", ["user"]],
    "content": [None, 7, b"x", "\udfff", ["x"], {"type": "text"}],
    "timestamp": ["", None, "2026-01-31", "2026-01-31T12:00:00", 1767225600],
    "attachments": [None, "a.pdf", ("a.pdf",), [1], [None], ["\ud800"], {"a"}],
    "metadata": [None, [], "x", {1: 2}, {"a": math.nan}],
    "parent_id": ["", "a\0", 7, "x" * 513, "\ud800"],
}


@pytest.mark.parametrize(("field", "value"), [(name, value) for name, values in BAD_FIELDS.items() for value in values])
def test_a_message_that_does_not_fit_is_refused_by_the_name_of_its_field(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=rf"message\.{field}"):
        codec.check_message(Message(**{"role": "user", "content": "", "timestamp": WHEN, field: value}))


@pytest.mark.parametrize("value", [None, {}, "hello", ("user", "hello"), Message])
def test_only_a_message_is_one(value: Any) -> None:
    with pytest.raises(ValidationError, match="must be a Message"):
        codec.check_message(value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("summary", None), ("summary", "\ud800"), ("key_points", "a"), ("key_points", [1]), ("entities", []),
        ("entities", {"a": "b"}), ("entities", {"a": [1]}), ("entities", {1: []}), ("timestamp", "yesterday"),
        ("confidence", -0.1), ("confidence", 1.1), ("confidence", math.nan), ("confidence", "1"), ("confidence", True),
        ("confidence", None),
    ],
)  # fmt: skip
def test_a_context_that_does_not_fit_is_refused_by_the_name_of_its_field(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=rf"context\.{field}"):
        codec.check_context(SituationalContext(**{"summary": "s", field: value}))
    with pytest.raises(ValidationError, match="must be a SituationalContext"):
        codec.check_context({"summary": "s"})


# --- what is read ----------------------------------------------------------------------------------------


def test_a_line_written_by_hand_is_read() -> None:
    line = b' { "content" : "hi\\u0021", "role":"user" , "timestamp": "2026-01-31T12:00:00Z", "id" : "h", "x": [1] } '
    read = codec.decode_message(line)
    assert read == Message("user", "hi!", id="h", timestamp="2026-01-31T12:00:00Z")
    assert codec.line_id(line) == codec.written_id(line) == "h"


NOT_MESSAGES = [
    b"",
    b" ",
    b"null",
    b"[]",
    b"{}",
    b'"text"',
    b"not json",
    b'{"id":"m","role":"user","content":"c"}',
    b'{"id":"m","role":"user","timestamp":"t"}',
    b'{"id":"m","content":"c","timestamp":"t"}',
    b'{"role":"user","content":"c","timestamp":"t"}',
    b'{"id":"","role":"user","content":"c","timestamp":"t"}',
    b'{"id":"m","role":"","content":"c","timestamp":"t"}',
    b'{"id":7,"role":"user","content":"c","timestamp":"t"}',
    b'{"id":"m","role":"user","content":7,"timestamp":"t"}',
    b'{"id":"m","role":"user","content":"c","timestamp":"t","attachments":[1]}',
    b'{"id":"m","role":"user","content":"c","timestamp":"t","metadata":[]}',
    b'{"id":"m","role":"user","content":"c","timestamp":"t","metadata":{"a":NaN}}',
    b'{"id":"m","role":"user","content":"c","timestamp":"t","metadata":{"a":1e400}}',
    b'{"id":"m","role":"user","content":"\xff","timestamp":"t"}',
    b'{"id":"m","role":"user","content":"\\ud800","timestamp":"t"}',
    b'{"id":"m","role":"user","content":"\xed\xa0\x80","timestamp":"t"}',
    b'{"id":"m","role":"user","content":"a\nb","timestamp":"t"}',
    b'{"id":"m","role":"user","content":"c","timestamp":"t"',
    b'{"id":"m","role":"user","content":"c","timestamp":"t"}}',
    b'{"id":"m","role":"user","content":"c","timestamp":"t"}{"id":"m","role":"user","content":"c","timestamp":"t"}',
    b"\0" * 50,
    b"[" * 100_000,
    b'{"id":"m","role":"user","content":"c","timestamp":"t","metadata":{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}}",
    b"\xef\xbb\xbf" + codec.encode_message(message()),
]


@pytest.mark.parametrize("line", NOT_MESSAGES, ids=[ascii(line)[2:42] for line in NOT_MESSAGES])
def test_what_is_no_message_is_damage(line: bytes) -> None:
    assert codec.line_id(line) is None
    with pytest.raises(IntegrityError, match="no message"):
        codec.decode_message(line)


TIMES = [WHEN, "2026-01-31T12:00:00Z", "2026-01-31T13:00:00+01:00"]
NOT_TIMES = ["2026-01-31T12:00:00", "2026-02-31", "", WHEN + "\0"]


@pytest.mark.parametrize("timestamp", TIMES + NOT_TIMES, ids=ascii)
@pytest.mark.parametrize("looked_at", [True, False])
def test_many_lines_are_the_messages_that_each_of_them_is(timestamp: str, looked_at: bool) -> None:
    doubted: list[Message] = []
    decode = codec.MessageDecoder(doubted.append if looked_at else None)
    written = [message(id=str(n), timestamp=WHEN, metadata={"n": n}, parent_id="0") for n in range(5)]
    written[3].timestamp = timestamp
    lines = [codec.encode_message(each)[:-1] for each in written]
    many = decode.many(lines)
    assert doubted == []
    assert [decode(line) for line in lines] == written
    assert many == (None if looked_at and timestamp in NOT_TIMES else written)  # to come to `doubt` one by one
    assert decode.many([]) == []


@pytest.mark.parametrize("line", NOT_MESSAGES, ids=[ascii(line)[2:42] for line in NOT_MESSAGES])
def test_among_many_lines_none_passes_that_is_no_message(line: bytes) -> None:
    good = codec.encode_message(message())[:-1]
    assert codec.MessageDecoder(None).many([good, line, good]) is None


def test_a_line_longer_than_any_message_is_damage() -> None:
    short = codec.encode_message(message(""))
    fitting = codec.encode_message(message("x" * (codec.MAX_LINE_BYTES - len(short) + 1)))[:-1]
    assert len(fitting) == codec.MAX_LINE_BYTES
    assert codec.line_id(fitting) == "m1"
    longer = fitting.replace(b"xx", b"xxx", 1)
    assert codec.line_id(longer) is None
    with pytest.raises(IntegrityError):
        codec.decode_message(longer)


def test_of_a_key_given_twice_every_reader_takes_the_same() -> None:
    line = b'{"id":"m1","role":"user","content":"1","timestamp":"t","id":"m2","content":"2"}'
    assert codec.line_id(line) == codec.decode_message(line).id == json.loads(line)["id"] == "m2"
    assert codec.written_id(line) == "m2"
    assert codec.decode_message(line).content == "2"
    assert codec.decode_object(b'{"a":1,"a":2}') == {"a": 2}


@pytest.mark.parametrize("name", ['quo"te', "back\\slash", "tab\\t", "张三", "\u2028", "🙂", "é", "{}", "x" * 512])
def test_the_id_of_a_written_line_is_found_whatever_it_is(name: str) -> None:
    line = codec.encode_message(message(id=codec.check_message_id(name, "message.id")))
    assert codec.written_id(line) == codec.line_id(line) == name


def test_a_message_is_the_same_whenever_it_says_it_was_sent() -> None:
    line = codec.encode_message(message(metadata={"a": 1, "b": 2}))
    later = codec.encode_message(message(metadata={"b": 2, "a": 1}, timestamp="2030-01-01T00:00:00Z"))
    assert codec.same_message(line, line)
    assert codec.same_message(line, later)
    for other in (message("other"), message(role="critic"), message(metadata={"a": 1}), message(parent_id="m0")):
        assert not codec.same_message(line, codec.encode_message(other))


BAD_DOCUMENTS = [
    b"",
    b"null",
    b"[]",
    b"1",
    b"{",
    b"{}}",
    b'{"a":NaN}',
    b'{"a":"\xff"}',
    b"\0\0",
    b"{1:2}",
    b"[" * 10**5,
]


@pytest.mark.parametrize("data", BAD_DOCUMENTS, ids=[ascii(data[:12]) for data in BAD_DOCUMENTS])
def test_a_damaged_document_is_named(data: bytes) -> None:
    with pytest.raises(IntegrityError, match="The document at a/b is damaged") as error:
        codec.decode_object(data, "a/b")
    assert error.value.key == "a/b"
    assert error.value.hint is not None


def test_a_document_with_a_field_too_few_or_of_another_type_is_damaged() -> None:
    whole = {"id": "s", "user_id": "ann", "title": "t", "created_at": WHEN, "updated_at": WHEN, "metadata": {}}
    assert codec.decode_as(Session, whole | {"new field": 1}, "a/b") == Session(**whole)  # type: ignore[arg-type]
    for name in ("id", "title", "created_at"):
        for damaged in ({key: value for key, value in whole.items() if key != name}, whole | {name: 7}):
            with pytest.raises(IntegrityError, match=name) as error:
                codec.decode_as(Session, damaged, "a/b")
            assert error.value.key == "a/b"
