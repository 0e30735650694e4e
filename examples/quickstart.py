"""The ten lines to begin with. Run it twice: the first chat is still there."""

import asyncio

from flatfile_chat_database import Message, StorageManager


async def main() -> None:
    async with StorageManager() as storage:  # files under ./data
        await storage.create_user("ada")
        session = await storage.create_session("ada", "My first chat")
        await storage.add_message("ada", session, Message("user", "How do I read a file in Python?"))
        await storage.add_message("ada", session, Message("assistant", "Use open(), best in a with block."))
        for message in await storage.get_messages("ada", session):
            print(f"{message.role}: {message.content}")
        print(f"{await storage.count_sessions('ada')} chats so far, the newest in {session}")


asyncio.run(main())
