"""The changes and conditions of a commit. Their docstrings are part of the contract; see `base.py`."""

from __future__ import annotations

from enum import Enum
from typing import Final

import msgspec


class AnyVersion(Enum):
    ANY = "any"


class AbsentVersion(Enum):
    ABSENT = "absent"


ANY: Final = AnyVersion.ANY
"""No condition on what a document holds now."""
ABSENT: Final = AbsentVersion.ABSENT
"""The document must not exist."""


class Require(msgspec.Struct, frozen=True, gc=False):
    """Condition: the document `key` exists; otherwise NotFoundError saying that `what` does not exist."""

    key: str
    what: str


class Absent(msgspec.Struct, frozen=True):
    """Condition: nothing is at or below `key`; otherwise ConflictError."""

    key: str


class Quota(msgspec.Struct, frozen=True):
    """Condition: `folder` has fewer than `maximum` folders in it besides those named in `ignoring`.

    They are those that `list_folders` returns. Otherwise StorageLimitExceeded with `limit_name`. Counted before the
    commit changes anything.
    """

    folder: str
    maximum: int
    limit_name: str
    ignoring: frozenset[str] = frozenset()


class Put(msgspec.Struct, frozen=True):
    """Replace a document whole. Condition: its version is `expected`; otherwise ConflictError.

    Outcome: the new version.
    """

    key: str
    data: bytes
    expected: str | AnyVersion | AbsentVersion = ANY


class Delete(msgspec.Struct, frozen=True):
    """Remove one document, log or blob. Outcome: whether it was there."""

    key: str


class Append(msgspec.Struct, frozen=True, gc=False):
    """Append records to a log, in order, one line each; a log that is absent begins with them.

    A record whose id the log holds already (or an earlier record of this Append) is passed over when both are the same
    message. Conditions: no such record is a different message, otherwise ValidationError; the log would not hold more
    than `maximum` records, otherwise StorageLimitExceeded with `limit_name`.
    Outcome: how many records were added.
    """

    key: str
    lines: tuple[bytes, ...]
    maximum: int | None = None
    limit_name: str = ""
    ids: tuple[str, ...] = ()
    """The ids of the lines, for a caller who knows them; else they are read from the lines."""


class Edit(msgspec.Struct, frozen=True):
    """Replace the record `record_id` of a log in its place, or drop it when `line` is None.

    Conditions: the log holds the record, otherwise NotFoundError; the record's line is `expected`, otherwise
    ConflictError; every line of the log is a record or blank, otherwise IntegrityError, for what cannot be read must
    not be rewritten. Outcome: None.
    """

    key: str
    record_id: str
    expected: bytes
    line: bytes | None


class Truncate(msgspec.Struct, frozen=True):
    """Drop the newest `count` records of a log, or all when None.

    Condition: every line that goes is a record or blank, otherwise IntegrityError.
    Outcome: the dropped lines, oldest first; empty for a log that is empty or absent.
    """

    key: str
    count: int | None = None


class Move(msgspec.Struct, frozen=True):
    """Move the key `source`, or everything below the folder `source`, to `target`.

    Condition: nothing is at or below `target`, otherwise ConflictError. Outcome: whether there was anything to move.
    """

    source: str
    target: str


class RemoveTree(msgspec.Struct, frozen=True):
    """Remove everything below a folder. Outcome: the keys that were removed, sorted."""

    folder: str


Change = Require | Absent | Quota | Put | Delete | Append | Edit | Truncate | Move | RemoveTree
Outcome = None | bool | int | str | list[bytes] | list[str]
