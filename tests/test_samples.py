"""A little of everything on each backend: what shows that a driver and this Python get along.

The other Pythons run no more than this of the backends that need a server.
"""

from collections.abc import Callable
from urllib.parse import quote

import pytest

from flatfile_chat_database import Message, StorageConfig, StorageManager
from flatfile_chat_database.check import check

from . import postgres, s3
from .servers import redis_server

PLACES: dict[str, Callable[[str], str]] = {
    "file": lambda folder: f"file:{folder}/store",
    "sqlite": lambda folder: f"sqlite:{folder}/chats.sqlite3",
    "postgres": lambda _: postgres.empty_store(),
    "s3": lambda _: s3.empty_store(),
    "mirrored": lambda folder: (
        f"mirrored:?from={quote(f'file:{folder}/store', safe='')}&to={quote(f'sqlite:{folder}/new.sqlite3', safe='')}"
    ),
}


async def use(url: str, folder: str) -> None:
    """Write, read, search, change and delete, with a second handle that sees what the first one left."""
    config = StorageConfig(storage_url=url, search_index_path=f"{folder}/index")
    async with StorageManager(config) as storage:
        await storage.create_user("ada", {"name": "Ada"})
        session = await storage.create_session("ada", "One", session_id="s")
        await storage.add_messages("ada", session, [Message("user", f"word {number}") for number in range(30)])
        assert await storage.save_document("ada", session, "a.txt", b"bytes" * 1000)
    async with StorageManager(config) as storage:
        page = await storage.get_messages("ada", "s", 5, -5)
        assert [message.content for message in page] == [f"word {number}" for number in range(25, 30)]
        assert await storage.update_message("ada", "s", page[0].id, {"content": "changed"})
        assert await storage.delete_message("ada", "s", page[1].id)
        assert await storage.count_messages("ada", "s") == 29
        [hit] = await storage.search("changed", user_id="ada")
        assert hit.message is not None and hit.message.id == page[0].id
        assert [each.id for each in await storage.list_sessions("ada")] == ["s"]
        assert await storage.delete_session("ada", "s")
        assert (await check(storage.backend)).clean


@pytest.mark.parametrize("name", PLACES)
async def test_a_store_is_written_read_searched_and_checked(name: str, tmp_path: object) -> None:
    await use(PLACES[name](str(tmp_path)), str(tmp_path))


@pytest.mark.parametrize("kind", ["redis", "valkey"])
async def test_a_store_behind_a_cache_is_written_read_searched_and_checked(kind: str, tmp_path: object) -> None:
    with redis_server(kind=kind) as server:
        store, cache = quote(f"file:{tmp_path}/store", safe=""), quote(server.url, safe="")
        await use(f"cached:?store={store}&cache={cache}", str(tmp_path))
