"""The rules that every backend shares: what a legal key and a legal change are, and what each condition means."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import cast

from .. import codec
from ..config import StorageConfig
from ..errors import ConflictError, IntegrityError, NotFoundError, StorageLimitExceeded, ValidationError
from ..layout import Layout
from ..models import new_id
from .changes import ABSENT, ANY, AbsentVersion, AnyVersion, Append, Change, Edit, Move, Quota, RemoveTree, Require

logger = logging.getLogger("flatfile_chat_database")

_KEY_SEGMENT = r"(?!\.\.?(/|\Z))[^/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]+"
_IN_NO_KEY = re.compile(r"[\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_SURROGATE = re.compile("[\\ud800-\\udfff]")
_KEY = re.compile(f"{_KEY_SEGMENT}(/{_KEY_SEGMENT})*")


@lru_cache(maxsize=16384)
def check_key(key: str) -> str:
    """Return `key` if it is one; see `base.py`.

    Raises:
        ValidationError: It is not.
    """
    if not _KEY.fullmatch(key):
        raise ValidationError(
            f"{ascii(key)[:200]} is no key.", hint="Keys are relative paths without empty, '.' and '..' segments."
        )
    return key


def begins_no_key(text: str) -> bool:
    """Tell whether a character is in a text that is in no key; a database may refuse to be asked for it."""
    return _IN_NO_KEY.search(text) is not None


def is_text(text: str) -> bool:
    """Tell whether a text can be written as UTF-8: half a surrogate pair cannot."""
    return text.isascii() or _SURROGATE.search(text) is None


def check_change(change: Change) -> None:
    """Check what a change names and carries, whatever the store holds.

    Raises:
        ValidationError: A key is none, a line is not exactly one line, or a record whose id is known is no UTF-8.
    """
    kind = type(change)
    if kind is Require:  # this and the next are those of every message
        check_key(cast("Require", change).key)
        return
    if kind is Append:
        append = cast("Append", change)
        check_key(append.key)
        if append.ids and len(append.ids) != len(append.lines):
            raise ValidationError("An Append has an id for every line, or none.", key=append.key)
        for line in append.lines:
            _check_line(append.key, line)
        if append.ids:
            for line in append.lines:
                _check_text(append.key, line)
            if not all(map(is_text, append.ids)):
                raise ValidationError("An id has half a surrogate pair in it, which no text has.", key=append.key)
        return
    keys: tuple[str, ...]
    match change:
        case Move(source, target):
            keys = source, target
        case Quota(folder):
            keys = (folder,) if folder else ()
        case RemoveTree(folder):
            keys = (folder,)
        case Edit(key):
            keys = (key,)
            if change.line is not None:
                _check_line(key, change.line)
                _check_text(key, change.line)
        case _:
            keys = (change.key,)
    for key in keys:
        check_key(key)


def _check_line(key: str, line: bytes) -> None:
    if len(line) < 2 or line.find(b"\n") != len(line) - 1:
        raise ValidationError("A record must be one line that ends in a newline.", key=key)


def _check_text(key: str, line: bytes) -> None:
    if not line.isascii():
        try:
            line.decode()
        except UnicodeDecodeError as error:
            raise ValidationError(
                f"A record must be UTF-8; byte {error.start} of the line is not.", key=key
            ) from None  # which would quote the line


def check_lines(key: str, data: bytes) -> None:
    """Raise ValidationError unless what is to be appended to a log ends in a newline."""
    if not data.endswith(b"\n"):
        raise ValidationError("What is appended must end in a newline.", key=key)


def version_of(data: bytes) -> str:
    """Return the version of a document that holds `data`: a hash of its bytes, so it survives a copy."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def check_version(key: str, data: bytes | None, expected: str | AnyVersion | AbsentVersion) -> None:
    """Raise ConflictError unless a document that holds `data` (None: is absent) is as expected."""
    if expected is ABSENT:
        if data is not None:
            raise exists_already(key)
    elif expected is not ANY and (data is None or version_of(data) != expected):
        raise ConflictError(
            f"{key} has changed since it was read.", key=key, hint="Read it again and repeat the change."
        )


def exists_already(key: str) -> ConflictError:
    """Return the error for a target that is taken."""
    return ConflictError(f"Something is at {key} already.", key=key)


def not_found(what: str, key: str) -> NotFoundError:
    """Return the error for something that is absent."""
    return NotFoundError(f"{what} does not exist.", key=key)


def check_quota(quota: Quota, folders: Collection[str], coming: Collection[str] = ()) -> None:
    """Raise StorageLimitExceeded if a folder with these folders in it, and those to come, is full."""
    count = len(folders) + sum(name not in folders for name in coming)
    count -= sum(name in folders or name in coming for name in quota.ignoring)
    if count >= quota.maximum:
        raise StorageLimitExceeded(limit_name=quota.limit_name, limit=quota.maximum, value=count + 1, key=quota.folder)


def new_lines(append: Append, find: Callable[[str], bytes | None]) -> list[bytes]:
    """Return the lines of an Append that its log does not hold yet; see `new_records`."""
    return list(new_records(append, find).values())


def new_records(append: Append, find: Callable[[str], bytes | None]) -> dict[str, bytes]:
    """Return the lines of an Append that its log does not hold yet, in their order, by id.

    Args:
        append: The change.
        find: Returns the log's line with an id, or None.

    Raises:
        ValidationError: The log, or the Append itself, has another message under the same id.
    """
    added: dict[str, bytes] = {}
    for record_id, line in zip(append.ids or map(codec.written_id, append.lines), append.lines, strict=True):
        existing = added.get(record_id) or find(record_id)
        if existing is None:
            added[record_id] = line
        elif not codec.same_message(existing, line):
            raise ValidationError(
                f"Another message has the id {record_id!r} already.",
                key=append.key,
                hint="Use a new id, or update_message to change it.",
            )
    return added


def check_maximum(append: Append, count: int, added: Collection[object]) -> None:
    """Raise StorageLimitExceeded if a log of `count` records would grow over its maximum."""
    if append.maximum is not None and added and count + len(added) > append.maximum:
        raise StorageLimitExceeded(
            limit_name=append.limit_name, limit=append.maximum, value=count + len(added), key=append.key
        )


def check_edit(edit: Edit, line: bytes | None) -> None:
    """Raise the error of an Edit whose record now has this line (None: is not there)."""
    if line is None:
        raise not_found(f"The message {edit.record_id!r}", edit.key)
    if line.rstrip(b"\n") != edit.expected.rstrip(b"\n"):
        raise ConflictError(
            f"The message {edit.record_id!r} has changed since it was read.",
            key=edit.key,
            hint="Read it again and repeat the change.",
        )


def good_lines(key: str, data: bytes, *, strict: bool = False, newline: bool = True, offset: int = 0) -> list[bytes]:
    """Return the lines of a log that are records; see `StorageBackend.read_log` for the others.

    Lines keep their newline unless `newline` is False. `data` begins at a byte offset of the log.
    """
    lines = []
    for line in data.split(b"\n")[:-1]:
        if codec.line_id(line) is not None:
            lines.append(line + b"\n" if newline else line)
        elif line.strip():
            report_bad_line(key, offset, strict=strict)
        offset += len(line) + 1
    return lines


def report_bad_line(key: str, offset: int, *, strict: bool) -> None:
    """Warn of a line that is no record, or raise IntegrityError when `strict`."""
    text = f"{key}: the line at byte {offset} is no message"
    if strict:
        raise IntegrityError(f"{text}.", key=key, hint="Run `chatdb check` to see all damage.")
    logger.warning("%s; it is passed over", text)


def quarantine_keys(config: StorageConfig) -> tuple[str, str]:
    """Return new keys for a note on something that is set aside, and for its bytes."""
    layout, item = Layout(config), new_id()
    return layout.key("quarantine", item=f"{item}.json"), layout.key("quarantine", item=f"{item}.bin")


def half_set_aside(config: StorageConfig, key: str, offset: int, half: bytes) -> dict[str, bytes]:
    """Return the documents in which half a line at the end of a log is kept, by key; warn of it."""
    note, target = quarantine_keys(config)
    reason = "half a line at the end of the log"
    facts = {"key": key, "offset": offset, "size": len(half), "reason": reason}
    logger.warning("%s: %s is set aside as %s", key, reason, target)
    return {note: codec.encode_document(facts), target: half}


def mended(data: bytes) -> tuple[bytes, bytes]:
    """Split a log into its whole lines and half a line at its end; see `StorageBackend.append`."""
    end = data.rfind(b"\n") + 1
    if codec.line_id(data[end:]) is not None:
        return data + b"\n", b""
    return data[:end], data[end:]


def kept_and_dropped(key: str, data: bytes, count: int | None) -> tuple[bytes, list[bytes]]:
    """Split a log's bytes for a Truncate: what stays, and the records that go, oldest first, without newlines."""
    lines = data.split(b"\n")[:-1]
    dropped: list[bytes] = []
    while lines and (count is None or len(dropped) < count):
        line = lines.pop()
        if codec.line_id(line) is not None:
            dropped.append(line)
        elif line.strip():
            report_bad_line(key, len(b"\n".join([*lines, b""])), strict=True)
    return b"".join(line + b"\n" for line in lines), dropped[::-1]
