"""A conversation as it will be stored, and the ids that are made of its source alone."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ..config import StorageConfig
from ..models import Message
from .report import Skip

UNDATED = datetime(1970, 1, 1, tzinfo=UTC)
"""The time of a conversation whose source has none."""

_POSITION = re.compile(r"[0-9]{6,9}")


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as it will be stored."""

    line: int
    size: int
    """Bytes of the source it was made of."""
    source_id: str
    session_id: str
    title: str
    created_at: str
    messages: list[Message]
    metadata: dict[str, Any]
    skipped: list[Skip]
    """Messages of it that cannot be stored."""


def digest_of(source_id: str) -> str:
    """Return the 12 hex digits that stand for a source id in all that is made of it. On disk, do not change."""
    return hashlib.sha256(source_id.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def session_id_of(config: StorageConfig, moment: datetime, source_id: str) -> str:
    """Return the id of the session of a conversation. On disk, do not change."""
    stamp = moment.astimezone(UTC).strftime(config.session_timestamp_format)
    return f"{config.session_id_prefix}_{stamp}_{digest_of(source_id)}"


def message_id_of(source_id: str, position: int) -> str:
    """Return the id of the message at a position, from 0, of a conversation. On disk, do not change."""
    return f"{digest_of(source_id)}-{position:06}"


def position_of(message_id: str) -> int:
    """Return the position that `message_id_of` put into an id."""
    return int(message_id.rpartition("-")[2])


def is_message_of(source_id: str, message_id: str) -> bool:
    """Tell whether `message_id_of` makes this id of this conversation."""
    start, _, position = message_id.rpartition("-")
    return start == digest_of(source_id) and _POSITION.fullmatch(position) is not None
