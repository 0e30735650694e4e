"""Short workloads: what the records of a store commit, as operations to record, and where they begin."""

from __future__ import annotations

from .. import codec
from ..backends.changes import (
    ABSENT,
    Absent,
    Append,
    Change,
    Delete,
    Edit,
    Move,
    Put,
    Quota,
    RemoveTree,
    Require,
    Truncate,
)
from ..config import StorageConfig
from ..layout import Layout
from ..models import Message
from .histories import Blob, Close, Operation

_STAMP = "2026-01-31T12:00:00.000000+00:00"
_LAYOUT = Layout(StorageConfig())
_USER, _SESSION, _FILE = "ada", "s", "a.txt"
_IDS = {"user_id": _USER, "session_id": _SESSION}
_LARGE = 700
"""Characters: a message longer than a sector of a disk."""

USER = _LAYOUT.key("user", user_id=_USER)
SESSION = _LAYOUT.key("session", **_IDS)
LOG = _LAYOUT.key("messages", **_IDS)
CONTEXT = _LAYOUT.key("context", **_IDS)
DOCUMENT = _LAYOUT.key("document", **_IDS, document=_FILE)
METADATA = _LAYOUT.key("documents", **_IDS)
PLACE = _LAYOUT.folder("session", **_IDS)
TRASH = _LAYOUT.trash_folder("t")


def line(number: int, size: int = 8) -> bytes:
    """Return a message as a line of a log."""
    return codec.encode_message(Message("user", "x" * size, id=f"m{number}", timestamp=_STAMP))


def document(**fields: object) -> bytes:
    """Return the bytes of a document."""
    return codec.encode_document(dict(fields))


_USER_EXISTS = Require(USER, "The user")
_SESSION_EXISTS = Require(SESSION, "The session")


def _commit(name: str, *changes: Change | Blob) -> Operation:
    return Operation(name, changes)


CREATE_USER = _commit("create user", Put(USER, document(user_id=_USER), ABSENT))
CREATE_SESSION = _commit(
    "create session",
    _USER_EXISTS,
    Put(SESSION, document(id=_SESSION), ABSENT),
    Absent(PLACE + "/nothing"),
    Quota(_LAYOUT.parent("session", **_IDS), 1000, "max_sessions_per_user"),
)
ADD = _commit("add message", _SESSION_EXISTS, Append(LOG, (line(1),)))
ADD_LARGE = _commit("add large message", _SESSION_EXISTS, Append(LOG, (line(2, _LARGE),)))
ADD_THREE = _commit("add three messages", _SESSION_EXISTS, Append(LOG, (line(3), line(4), line(5))))
UPDATE_SESSION = _commit("update session", Put(SESSION, document(id=_SESSION, title="Another")))
EDIT = _commit("update message", _SESSION_EXISTS, Edit(LOG, "m0", line(0), line(0, 30)))
DROP = _commit("delete message", _SESSION_EXISTS, Edit(LOG, "m0", line(0), None))
POP = _commit("pop message", _SESSION_EXISTS, Truncate(LOG, 1))
CLEAR = _commit("clear messages", Truncate(LOG, None))
DELETE_SESSION = _commit("delete session", _SESSION_EXISTS, Move(PLACE, f"{TRASH}/{PLACE}"))
UNDELETE = _commit("undelete", Require(f"{TRASH}/{SESSION}", "The entry"), Move(f"{TRASH}/{PLACE}", PLACE))
PURGE = _commit("purge", RemoveTree(PLACE), RemoveTree(TRASH))
SAVE = _commit(
    "save document",
    Blob(DOCUMENT, b"bytes of a document"),
    _SESSION_EXISTS,
    Require(DOCUMENT, "The blob"),
    Put(METADATA, document(files=[_FILE])),
)
UPDATE_CONTEXT = _commit("update context", _SESSION_EXISTS, Put(CONTEXT, document(summary="now")))
CLEAR_CONTEXT = _commit("clear context", Delete(CONTEXT))
CLOSE = Operation("close", (Close(),))

PREPARE = (
    CREATE_USER,
    CREATE_SESSION,
    _commit("add the first message", _SESSION_EXISTS, Append(LOG, (line(0),))),
    _commit("set the context", _SESSION_EXISTS, Put(CONTEXT, document(summary="before"))),
)
"""What makes the store that most workloads begin with."""

OPERATIONS = (
    *(CREATE_USER, CREATE_SESSION, ADD, ADD_LARGE, ADD_THREE, UPDATE_SESSION, EDIT, DROP, POP, CLEAR, DELETE_SESSION),
    *(UNDELETE, PURGE, SAVE, UPDATE_CONTEXT, CLEAR_CONTEXT, CLOSE),
)
