"""OpenAI chat-completions JSONL: one conversation a line, as chat logs, fine-tuning files and batch files have it.

    {"id": "film-0", "messages": [{"role": "user", "content": "Hello"}, …]}
    {"custom_id": "request-1", "method": "POST", "url": …, "body": {"messages": […]}}

- A conversation without an id is named after its line, and one whose line is the same as an earlier line's after that
  and its number among the equal ones.
- A time is taken from `created_at`, `timestamp` or `create_time`: ISO 8601 (UTC when it has no offset) or Unix seconds.
  The session's is that of the first message, or else the conversation's own. A message without a time gets the
  session's, plus one microsecond for each message before it.
- The title is the conversation's `title`, or the beginning of its first user message.
- Content in parts becomes its texts, one below the other; no content becomes "".
- Whatever a field of the store does not hold as it was stays in the metadata, under "openai".
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from ..config import StorageConfig
from ..models import Message, format_timestamp
from .conversation import UNDATED, Conversation, message_id_of, session_id_of
from .report import Part, Skip
from .source import Source

FORMAT_NAME = "openai-jsonl"

_TIME_FIELDS = ("created_at", "timestamp", "create_time")
_ISO_DATE = re.compile(r"\d{4}-\d\d-\d\d")  # `fromisoformat` would also take digits alone, such as Unix seconds
_UNIX_SECONDS = re.compile(r"\d{9,10}(\.\d+)?")
_TITLE_LENGTH = 60


def read(source: Source, config: StorageConfig) -> Iterator[Conversation | Skip]:
    """Yield the conversation of each line, or why there is none; blank lines are nothing."""
    names = _LineNames()
    for number, line in source.lines():
        if isinstance(line, Skip):
            yield line
        elif line.strip():
            yield _read_line(number, line, config, names)


class _LineNames:
    """Names lines by what they hold: a line that stands several times in a source is as many conversations."""

    def __init__(self) -> None:
        # The only memory that grows with a source. Eight bytes of the digest are enough: two lines that share them by
        # accident get different names all the same.
        self._seen: Counter[bytes] = Counter()

    def name(self, line: bytes) -> str:
        """Return the source id of the next line that holds these bytes."""
        digest = hashlib.sha256(line)
        key = digest.digest()[:8]
        self._seen[key] += 1
        count = self._seen[key]
        return digest.hexdigest() if count == 1 else f"{digest.hexdigest()}-{count}"


def _read_line(number: int, line: bytes, config: StorageConfig, names: _LineNames) -> Conversation | Skip:
    try:
        # Decoded here: `json` would guess at UTF-16 and UTF-32.
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Skip(number, Part.LINE, "the line is not UTF-8", str(error))
    except (ValueError, RecursionError) as error:
        return Skip(number, Part.LINE, "the line is not JSON", str(error))
    if not isinstance(record, dict):
        return Skip(number, Part.LINE, "the line is not a JSON object", f"it is a {type(record).__name__}")
    source_id, given, rest = _unwrap(record)
    if not isinstance(given, list) or not given:
        return Skip(number, Part.LINE, "the line has no messages", f"its fields are {_field_names(record)}")
    if source_id is None:
        source_id = names.name(line)
    moment = _time_of(given[0]) or _time_of(record) or UNDATED
    messages: list[Message] = []
    skipped: list[Skip] = []
    for position, message in enumerate(given):
        reason = _unusable(message)
        if reason:
            skipped.append(Skip(number, Part.MESSAGE, reason, f"message {position + 1}", 1))
            continue
        timestamp = _time_of(message) or moment + timedelta(microseconds=position)
        messages.append(_message(message, message_id_of(source_id, position), timestamp))
    metadata: dict[str, Any] = {"import": {"format": FORMAT_NAME, "id": source_id}}
    title = rest.pop("title", None)
    if title is not None and not isinstance(title, str):
        rest["title"], title = title, None
    if rest:
        metadata["openai"] = rest
    return Conversation(
        line=number,
        size=len(line),
        source_id=source_id,
        session_id=session_id_of(config, moment, source_id),
        title=_first_words(messages) if title is None else title,
        created_at=format_timestamp(moment),
        messages=messages,
        metadata=metadata,
        skipped=skipped,
    )


def _unwrap(record: dict[str, Any]) -> tuple[str | None, object, dict[str, Any]]:
    """Return a conversation's id, its messages, and everything else."""
    rest = dict(record)
    body = record.get("body")
    if "messages" not in record and isinstance(body, dict) and "messages" in body:
        messages = body["messages"]
        rest["body"] = {name: value for name, value in body.items() if name != "messages"}
        names = ("custom_id", "id")
    else:
        messages = rest.pop("messages", None)
        names = ("id", "custom_id")
    for name in names:
        value = record.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            del rest[name]
            return str(value), messages, rest
    return None, messages, rest


def _unusable(message: object) -> str:
    """Return why a message cannot be stored, or ""."""
    if not isinstance(message, dict):
        return "the message is not a JSON object"
    if not isinstance(message.get("role"), str) or not message["role"]:
        return "the message has no role"
    if not isinstance(message.get("content"), str | list | None):
        return "the message's content is neither text nor a list of parts"
    return ""


def _message(given: dict[str, Any], message_id: str, moment: datetime) -> Message:
    content = given.get("content")
    rest = {name: value for name, value in given.items() if name not in ("role", "content")}
    if isinstance(content, list):
        rest["content"] = content
        content = "\n".join(_texts(content))
    return Message(
        id=message_id,
        role=given["role"],
        content=content or "",
        timestamp=format_timestamp(moment),
        metadata={"openai": rest} if rest else {},
    )


def _texts(parts: list[Any]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            yield part["text"]


def _time_of(record: object) -> datetime | None:
    """Return the time a message or a conversation carries in a form that is understood."""
    if not isinstance(record, dict):
        return None
    for name in _TIME_FIELDS:
        moment = _parse_time(record.get(name))
        if moment is not None:
            return moment
    return None


def _parse_time(value: object) -> datetime | None:
    try:
        if isinstance(value, str) and _UNIX_SECONDS.fullmatch(value):
            value = float(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            moment = datetime.fromtimestamp(value, UTC)
        elif isinstance(value, str) and _ISO_DATE.match(value):
            moment = datetime.fromisoformat(value)
            moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        else:
            return None
    except (ValueError, OverflowError, OSError):
        return None
    # Outside stand the words of other systems for "no time", such as 0001-01-01.
    return moment if 1000 <= moment.year < 9999 else None


def _first_words(messages: list[Message]) -> str:
    """Return the beginning of the first user message, on one line, cut between words where there are any."""
    text = next((m.content for m in messages if m.role == "user" and m.content.strip()), "")
    # Half of a surrogate pair makes its message unusable, not the whole conversation.
    text = " ".join(text[: 10 * _TITLE_LENGTH].encode(errors="ignore").decode().split())
    if len(text) <= _TITLE_LENGTH:
        return text
    cut = text[:_TITLE_LENGTH]
    space = cut.rfind(" ")
    return (cut[:space] if space > _TITLE_LENGTH // 2 else cut) + "…"


def _field_names(record: dict[str, Any]) -> str:
    return ", ".join(sorted(record)[:8])[:100] or "none"
