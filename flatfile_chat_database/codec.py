"""Model to bytes and back: JSON documents, JSONL lines, and the checks that what comes in is JSON at all.

Written JSON is UTF-8 without NaN, infinities and lone surrogates (RFC 8259). Documents are indented for people; a
message is one line. U+0000 is kept as the escape `\\u0000`. Field names and their order are on disk: do not change.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec

from .config import MAX_MESSAGE_SIZE_BYTES
from .errors import IntegrityError, ValidationError
from .models import Message, SituationalContext, parse_timestamp

T = TypeVar("T")

MAX_DEPTH = 100
"""Nesting of user data; far below what any JSON reader takes."""

MAX_LINE_BYTES = MAX_MESSAGE_SIZE_BYTES
"""A longer line of a log is damage, so that no file can make a reader hold more than this at once."""

_MAX_INTEGER = 10**300
_MAX_MESSAGE_ID = 512
_LINE_ID = re.compile(rb'\{"id":"([^"\\]*)"[,}]')


class _MessageLine(msgspec.Struct, omit_defaults=True):
    """A message as written: the specification's fields in its order, `parent_id` only if there is one."""

    id: str
    role: str
    content: str
    timestamp: str
    attachments: list[str]
    metadata: dict[str, Any]
    parent_id: str | None = None


class ReadLine(msgspec.Struct, gc=False):
    """A message as read: a person who writes a line by hand may leave out what is empty."""

    id: str
    role: str
    content: str
    timestamp: str
    attachments: list[str] = []
    metadata: dict[str, Any] = {}
    parent_id: str | None = None


def _plain(value: object) -> object:
    """Write a subclass of a JSON type (`numpy.float64`, a marked-up string) as the value it holds."""
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    raise TypeError(f"{type(value).__name__} is not JSON")  # what came in was checked, so this is a bug


_encoder = msgspec.json.Encoder(enc_hook=_plain)
_decode_line = msgspec.json.Decoder(ReadLine).decode
_decode_lines = msgspec.json.Decoder(list[ReadLine]).decode
_new = object.__new__
_from_iso = datetime.fromisoformat
_object_decoder = msgspec.json.Decoder(dict[str, Any])
_DECODE_ERRORS = (ValueError, RecursionError)  # msgspec's DecodeError and UnicodeDecodeError are ValueErrors


# --- checks on what comes in -------------------------------------------------------------------------


def check_json(value: object, name: str) -> None:
    """Check that `value` can be written as JSON and read back equal.

    Raises:
        ValidationError: Something in it is not a dict with string keys, list, string, finite number, bool or None;
            it is nested deeper than `MAX_DEPTH`; or it holds a lone surrogate. The message gives the path.
    """
    stack: list[tuple[object, str, int]] = [(value, name, 0)]
    while stack:
        item, path, depth = stack.pop()
        if item is None or isinstance(item, bool):
            continue
        if isinstance(item, str):
            check_text(item, path)
        elif isinstance(item, int):
            if not -_MAX_INTEGER < item < _MAX_INTEGER:
                raise ValidationError(f"{path} is an integer of more than 300 digits.", hint="Send it as text.")
        elif isinstance(item, float):
            if not math.isfinite(item):
                raise ValidationError(f"{path} is {item}, which JSON cannot hold.", hint="Use None or text.")
        elif isinstance(item, dict | list):
            if depth == MAX_DEPTH:
                raise ValidationError(f"{name} is nested deeper than {MAX_DEPTH} levels.", hint="Flatten it.")
            if isinstance(item, list):
                stack += [(element, f"{path}[{index}]", depth + 1) for index, element in enumerate(item)]
                continue
            for key, element in item.items():
                if not isinstance(key, str):
                    raise ValidationError(f"{path} has the key {key!r:.80}, which is not a string.")
                check_text(key, f"a key of {path}")
                stack.append((element, f"{path}.{key:.40}", depth + 1))
        else:
            raise ValidationError(
                f"{path} is a {type(item).__name__}, which is not JSON.",
                hint="Use dict, list, str, int, float, bool or None.",
            )


def check_object(value: object, name: str) -> dict[str, Any]:
    """Return `value` if it is a JSON object; see `check_json`."""
    if not isinstance(value, dict):
        raise ValidationError(f"{name} must be a dict, not {type(value).__name__}.")
    check_json(value, name)
    return value


def own_object(value: object, name: str) -> dict[str, Any]:
    """Return a plain copy of a JSON object, which the caller cannot change while a write waits; see `check_json`."""
    return decode_object(_encoder.encode(check_object(value, name)))


def check_text(value: object, name: str) -> str:
    """Return `value` if it is a string without lone surrogates."""
    if not isinstance(value, str):
        raise ValidationError(f"{name} must be a string, not {type(value).__name__}.")
    if not value.isascii():  # in no time, and true of most
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValidationError(
                f"{name} holds the lone surrogate {value[error.start]!a}.", hint="Send valid Unicode text."
            ) from error
    return value


def check_texts(value: object, name: str) -> list[str]:
    """Return `value` if it is a list of such strings."""
    if not isinstance(value, list):
        raise ValidationError(f"{name} must be a list of strings, not {type(value).__name__}.")
    for index, element in enumerate(value):
        check_text(element, f"{name}[{index}]")
    return value


def check_message(message: object) -> Message:
    """Return `message` if every field of it can be stored.

    Raises:
        ValidationError: It is no Message, or a field does not fit; the message names the field.
    """
    if not isinstance(message, Message):
        raise ValidationError(f"message must be a Message, not {type(message).__name__}.")
    check_message_id(message.id, "message.id")
    if not check_text(message.role, "message.role"):
        raise ValidationError("message.role must not be empty.", hint='Use "user", "assistant" or a persona id.')
    check_text(message.content, "message.content")
    if not _is_usual_time(message.timestamp):
        parse_timestamp(message.timestamp, "message.timestamp")
    if message.attachments or type(message.attachments) is not list:
        check_texts(message.attachments, "message.attachments")
    if message.metadata or type(message.metadata) is not dict:
        check_object(message.metadata, "message.metadata")
    if message.parent_id is not None:
        check_message_id(message.parent_id, "message.parent_id")
    return message


def _is_usual_time(text: object) -> bool:
    """Tell whether this is a timestamp in UTC, most of them in a fifth of the time that `parse_timestamp` takes."""
    try:
        return _from_iso(text).tzinfo is UTC and "\0" not in text  # type: ignore[arg-type, operator]
    except (TypeError, ValueError):
        return False


def check_message_id(value: object, name: str) -> str:
    """Return `value` if it can be a message's id: printable text of 1 to 512 characters."""
    if type(value) is str and value.isascii() and value.isprintable() and 0 < len(value) <= _MAX_MESSAGE_ID:
        return value  # most ids, in a tenth of the time
    text = check_text(value, name)
    if not text:
        raise ValidationError(f"{name} must not be empty.")
    if len(text) > _MAX_MESSAGE_ID:
        raise ValidationError(f"{name} has {len(text)} characters; {_MAX_MESSAGE_ID} are possible.")
    if any(character < " " or "\x7f" <= character < "\xa0" for character in text):
        raise ValidationError(f"{name} {text!a} holds control characters.", hint="Use printable text.")
    return text


def check_context(context: object) -> SituationalContext:
    """Return `context` if every field of it can be stored; limits are the caller's.

    Raises:
        ValidationError: It is no SituationalContext, or a field does not fit; the message names the field.
    """
    if not isinstance(context, SituationalContext):
        raise ValidationError(f"context must be a SituationalContext, not {type(context).__name__}.")
    check_text(context.summary, "context.summary")
    check_texts(context.key_points, "context.key_points")
    for name, entities in check_object(context.entities, "context.entities").items():
        check_texts(entities, f"context.entities.{name:.40}")
    parse_timestamp(context.timestamp, "context.timestamp")
    confidence: object = context.confidence
    if not isinstance(confidence, int | float) or isinstance(confidence, bool) or not 0 <= confidence <= 1:
        raise ValidationError(f"context.confidence must be a number from 0 to 1, not {confidence!r:.40}.")
    return context


# --- messages ----------------------------------------------------------------------------------------


def encode_message(message: Message) -> bytes:
    """Write a checked message as one line, newline included."""
    line = _encoder.encode(
        _MessageLine(
            message.id,
            message.role,
            message.content,
            message.timestamp,
            message.attachments,
            message.metadata,
            message.parent_id,
        )
    )
    return line + b"\n"


def encode_line(content: dict[str, Any]) -> bytes:
    """Write a checked JSON object as one line, newline included."""
    return _encoder.encode(content) + b"\n"


def decode_line(line: bytes) -> ReadLine:
    """Read a line of a log, in less time than `decode_message`.

    Raises:
        IntegrityError: The line is no message.
    """
    try:
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"it has {len(line)} bytes")
        record = _decode_line(line)
    except _DECODE_ERRORS as error:
        raise IntegrityError(f"A line is no message: {error}.") from error
    if not record.id or not record.role:
        raise IntegrityError("A line is no message: its id or role is empty.")
    return record


def decode_message(line: bytes) -> Message:
    """Read a line of a log as a message.

    Raises:
        IntegrityError: The line is no message.
    """
    message = timed_message(None, line)
    if message is None:
        decode_line(line)  # says what is wrong
        raise IntegrityError("A line is no message.")
    return message


def timed_message(doubt: Callable[[Message], None] | None, line: bytes) -> Message | None:
    """Return the message of a line of a log, or None if the line is no message.

    `doubt` is given a message whose timestamp is not of the usual form in UTC, and may raise.
    """
    made = None if len(line) > MAX_LINE_BYTES else _messages([line])
    if made is None:
        return None
    [message] = made
    if doubt is not None and not _is_usual_time(message.timestamp):
        doubt(message)
    return message


def _messages(lines: Sequence[bytes]) -> list[Message] | None:
    """Return the messages of lines that are short enough, or None if one of them is none."""
    # Every message that is read comes through here; a loop for each step is faster than all steps in one.
    try:
        records = list(map(_decode_line, lines))
    except _DECODE_ERRORS:
        return None
    return _messages_of(records)


def _messages_of(records: list[ReadLine]) -> list[Message] | None:
    messages: list[Message] = []
    for record in records:
        if not record.id or not record.role:
            return None
        message: Message = _new(Message)  # half the time of Message(…), and less than msgspec takes for a dataclass
        message.id = record.id
        message.role = record.role
        message.content = record.content
        message.timestamp = record.timestamp
        message.attachments = record.attachments
        message.metadata = record.metadata
        message.parent_id = record.parent_id
        messages.append(message)
    return messages


class MessageDecoder:
    """Makes the messages of lines: called with one, it returns what `timed_message` does."""

    def __init__(self, doubt: Callable[[Message], None] | None) -> None:
        """Give `doubt` the messages whose timestamps are not of the usual form; None: look at no timestamp."""
        self._doubt = doubt

    def __call__(self, line: bytes) -> Message | None:
        return timed_message(self._doubt, line)

    def many(self, lines: Sequence[bytes]) -> list[Message] | None:
        """Return the messages of many lines in less time, or None if one of them has to be looked at by itself.

        None of the lines may be longer than `MAX_LINE_BYTES`; they may have their newlines.
        """
        return self._without_doubt(_messages(lines))

    def whole(self, text: bytes, count: int) -> list[Message] | None:
        """Return the messages of so many lines, each with its newline, as `many` does, in less time.

        All of them together must not be longer than `MAX_LINE_BYTES`.
        """
        try:
            records = _decode_lines(b"[%b]" % text[:-1].replace(b"\n", b","))
        except _DECODE_ERRORS:
            return None
        if len(records) != count:
            return None
        return self._without_doubt(_messages_of(records))

    def _without_doubt(self, messages: list[Message] | None) -> list[Message] | None:
        if messages and self._doubt is not None and not _are_times([message.timestamp for message in messages]):
            return None
        return messages


def _are_times(texts: list[str]) -> bool:
    """Tell whether all of these are timestamps, in little time if they are in UTC."""
    try:
        zones = [moment.tzinfo for moment in map(_from_iso, texts)]
        if zones.count(UTC) == len(zones) and "\0" not in "".join(texts):
            return True
    except ValueError:
        pass
    try:
        for text in texts:
            parse_timestamp(text)
    except ValidationError:
        return False
    return True


def line_id(line: bytes) -> str | None:
    """Return the id of a line of a log, or None if the line is no message."""
    if len(line) > MAX_LINE_BYTES:
        return None
    try:
        record = _decode_line(line)
    except _DECODE_ERRORS:
        return None
    return record.id if record.id and record.role else None


def read_lines(lines: Sequence[bytes]) -> list[ReadLine] | None:
    """Return what lines of a log say, or None if one of them is no message."""
    if any(len(line) > MAX_LINE_BYTES for line in lines):
        return None
    try:
        records = list(map(_decode_line, lines))
    except _DECODE_ERRORS:
        return None
    return records if all(record.id and record.role for record in records) else None


def record_line(line: bytes) -> bytes | None:
    """Return a line of a log itself, or None if it is no message."""
    return None if line_id(line) is None else line


def written_id(line: bytes) -> str:
    """Return the id of a line that is a message, as fast as it can be told."""
    match = _LINE_ID.match(line)
    if match is not None and line.count(b'"id":') == 1:  # given twice by hand, the last one counts
        return match[1].decode()
    return str(decode_object(line)["id"])


def same_message(one: bytes, other: bytes) -> bool:
    """Tell whether two lines hold the same message, whenever each says it was sent.

    A retry that builds its message anew under the same id has another default timestamp; the first one stands.
    """
    if one == other:
        return True
    first, second = decode_message(one), decode_message(other)
    second.timestamp = first.timestamp
    return first == second


# --- documents ---------------------------------------------------------------------------------------


def encode_document(content: dict[str, Any]) -> bytes:
    """Write a checked JSON object, indented, with a final newline."""
    return msgspec.json.format(_encoder.encode(content), indent=2) + b"\n"


def decode_object(data: bytes, key: str | None = None) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        IntegrityError: The bytes are no JSON object; the message names `key`.
    """
    try:
        return _object_decoder.decode(data)
    except _DECODE_ERRORS as error:
        place = f" at {key}" if key else ""
        raise IntegrityError(
            f"The document{place} is damaged: {error}.", key=key, hint="Run `chatdb check` to see all damage."
        ) from error


def context_fields(context: SituationalContext) -> dict[str, Any]:
    """Return a checked context as the object that is stored."""
    return {item.name: getattr(context, item.name) for item in fields(context)}


def decode_as(kind: type[T], content: dict[str, Any], key: str) -> T:
    """Make a model of a stored object; unknown fields are passed over.

    Raises:
        IntegrityError: A field is missing or has the wrong type.
    """
    try:
        return msgspec.convert(content, kind)
    except _DECODE_ERRORS as error:
        raise IntegrityError(
            f"The document at {key} is damaged: {error}.", key=key, hint="Run `chatdb check` to see all damage."
        ) from error
