"""Writers that go on while a server is killed, cut off or replaced, and what must be there afterwards."""

from __future__ import annotations

import asyncio

from flatfile_chat_database import Message, StorageManager
from flatfile_chat_database.errors import DurabilityError, UnavailableError

WRITERS, SESSIONS = 12, 3


class Load:
    """Writers that go on, whatever becomes of the server; each repeats what was not acknowledged."""

    def __init__(self, storage: StorageManager) -> None:
        self.storage = storage
        self.acknowledged: dict[str, list[str]] = {f"w{number}": [] for number in range(WRITERS)}
        self.unknown = self.refused = 0
        self.is_over = False
        self.grew = asyncio.Condition()

    async def prepare(self) -> None:
        """Make the user and the sessions."""
        await self.storage.create_user("ada")
        for session in range(SESSIONS):
            await self.storage.create_session("ada", session_id=f"s{session}")

    async def run(self, writer: str) -> None:
        session = f"s{int(writer[1:]) % SESSIONS}"
        number = 0
        while not self.is_over:
            message = Message("user", "text", id=f"{writer}-{number}")
            try:
                await self.storage.add_message("ada", session, message)
            except DurabilityError:
                self.unknown += 1
            except UnavailableError:
                self.refused += 1
                await asyncio.sleep(0.01)  # the server is away
            else:
                self.acknowledged[writer].append(message.id)
                number += 1
                async with self.grew:
                    self.grew.notify_all()

    async def more(self, count: int) -> None:
        """Wait until so many more messages were acknowledged."""
        goal = sum(map(len, self.acknowledged.values())) + count
        async with self.grew:
            await self.grew.wait_for(lambda: sum(map(len, self.acknowledged.values())) >= goal)

    async def verify(self) -> None:
        """Every acknowledged message is there once, in its writer's order, and no other one."""
        found: dict[str, list[str]] = {writer: [] for writer in self.acknowledged}
        for session in range(SESSIONS):
            ids = [message.id async for message in self.storage.stream_messages("ada", f"s{session}", strict=True)]
            assert len(ids) == len(set(ids)) == await self.storage.count_messages("ada", f"s{session}")
            for name in ids:
                found[name.partition("-")[0]].append(name)
        assert found == self.acknowledged
        count = sum(map(len, found.values()))
        print(f"{count:,} acknowledged, all there; {self.refused:,} refused, {self.unknown:,} unknown and repeated")
