"""What is searched besides messages: contexts and analyses as texts."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec

from .. import codec
from ..errors import IntegrityError
from ..models import HitKind, Message, SituationalContext
from ..search.texts import strings
from .documents import Documents
from .store import Store, logger


class Text(msgspec.Struct, frozen=True):
    """All that is searched of one record."""

    kind: HitKind
    session_id: str
    key: str
    timestamp: str
    text: str
    position: int = 0
    message: Message | None = None
    filename: str | None = None

    count = 1

    def __str__(self) -> str:
        if self.message is not None:
            return f"The message {self.message.id!r} in {self.key}"
        return f"The {self.kind} at {self.key}"

    @property
    def size(self) -> int:
        return len(self.text)


async def contexts(store: Store, user_id: str, session_ids: Sequence[str]) -> list[Text]:
    """Return the current contexts of sessions that have one; damaged ones are passed over with a warning."""
    keys = {store.layout.key("context", user_id=user_id, session_id=each): each for each in session_ids}

    def make(key: str, content: dict[str, Any], version: str) -> Text:
        context = codec.decode_as(SituationalContext, content, key)
        parts = [context.summary, *context.key_points, *strings(context.entities)]
        return Text("context", keys[key], key, context.timestamp, "\n".join(parts))

    return [text for text in await store.uncached.load_all(list(keys), make) if text is not None]


async def analyses(
    store: Store, documents: Documents, user_id: str, session_ids: Sequence[str]
) -> AsyncGenerator[Text, None]:
    """Yield the analyses of all documents of sessions; damaged ones are passed over with a warning."""
    keys = [store.layout.key("documents", user_id=user_id, session_id=session_id) for session_id in session_ids]
    backend = await store.uncached.reading()
    for session_id, key, data in zip(session_ids, keys, await backend.read_many(keys), strict=True):
        if data is None:  # few sessions have documents
            continue
        try:
            found = await documents.list(user_id, session_id)
        except IntegrityError as error:
            logger.warning("%s It is passed over.", error.message)
            continue
        for document in found:
            text = "\n".join(strings(document.analysis))
            yield Text("analysis", session_id, key, document.uploaded_at, text, filename=document.filename)
