"""Export: everything in the store as flat rows, ready for database tables."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

from ..errors import IntegrityError
from .documents import Documents
from .messages import Messages, session_log
from .personas import Personas
from .sessions import Sessions
from .store import Store, logger
from .users import Users

_ALL = sys.maxsize  # None would be the default limit


async def export_all(
    store: Store, users: Users, sessions: Sessions, messages: Messages, documents: Documents, personas: Personas
) -> dict[str, list[dict[str, Any]]]:
    """Return all users, sessions, messages, documents and personas; what is damaged is passed over with a warning.

    A row begins with the ids of what it belongs to. What is damaged hides nothing below it: the sessions of a user
    whose profile cannot be read are there.
    """
    rows: dict[str, list[dict[str, Any]]] = {
        "users": [_row(user) for user in await users.list(_ALL, 0)],
        "sessions": [],
        "messages": [],
        "documents": [],
        "personas": [{"user_id": None, **persona} for persona in await personas.list_scope(None)],
    }
    for user_id in sorted(await store.ids("user")):
        rows["sessions"] += [_row(session) for session in await sessions.list(user_id, _ALL, 0)]
        rows["personas"] += [{"user_id": user_id, **persona} for persona in await personas.list_scope(user_id)]
        for session_id in sorted(await store.ids("session", user_id=user_id)):
            owner = {"user_id": user_id, "session_id": session_id}
            position = 0
            async for message in messages.stream(session_log(user_id, session_id)):
                rows["messages"].append({**owner, "position": position, **_row(message)})
                position += 1
            try:
                found = await documents.list(user_id, session_id)
            except IntegrityError as error:  # of the metadata: it is all that says which files there are
                logger.warning("%s The documents of the session are passed over.", error.message)
                continue
            rows["documents"] += [{**owner, **_row(document)} for document in found]
    return rows


def _row(record: Any) -> dict[str, Any]:
    """Return a record's stored fields; a version is of the store and not of the data."""
    return {item.name: getattr(record, item.name) for item in fields(record) if item.name != "version"}
