"""What is new in a session since the last look, also after messages were removed from it: for `chatdb tail -f`."""

from __future__ import annotations

from collections import deque

from .models import Message
from .storage import StorageManager

_PAGE = 500
_REMEMBERED = 1_000  # messages by which the place is found again after some were removed


class Follower:
    """Finds the messages that are new in a log, also after some were removed from it."""

    def __init__(self, storage: StorageManager, user: str, session: str) -> None:
        self._storage = storage
        self._names = (user, session)
        self._position = 0  # of the next message
        self._seen: deque[str] = deque(maxlen=_REMEMBERED)  # the newest of those before it

    async def begin(self, count: int) -> list[Message]:
        """Return the newest `count` messages; follow what comes after them."""
        # However few are wanted, the others are what the place is found again by when the newest are removed.
        wanted = max(count, _REMEMBERED)
        newest = await self._storage.get_messages(*self._names, wanted, -wanted)
        self._position = await self._storage.count_messages(*self._names)
        self._seen.extend(message.id for message in newest)
        return newest[-count:] if count else []

    async def next(self) -> list[Message]:
        """Return what has come since, at most a page of it."""
        # The newest known message is read again: if it is not in its place, the log is not what it was.
        start = max(self._position - 1, 0)
        found = await self._storage.get_messages(*self._names, _PAGE, start)
        if self._seen:
            if not found or found[0].id != self._seen[-1]:
                return await self._find_place()
            del found[0]
        return self._advance(found)

    async def _find_place(self) -> list[Message]:
        """After a removal: go on behind the newest message that is known."""
        newest = await self._storage.get_messages(*self._names, _REMEMBERED, -_REMEMBERED)
        total = await self._storage.count_messages(*self._names)
        known = set(self._seen)
        index = next((i for i in range(len(newest) - 1, -1, -1) if newest[i].id in known), -1)
        self._position = max(total - len(newest) + index + 1, 0)
        self._seen = deque((message.id for message in newest[: index + 1]), maxlen=_REMEMBERED)
        return self._advance(newest[index + 1 :])

    def _advance(self, messages: list[Message]) -> list[Message]:
        self._position += len(messages)
        self._seen.extend(message.id for message in messages)
        return messages
