"""What one server is outgrown with: replicas that are read, another server when one dies, and partitions."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from flatfile_chat_database import Message, StorageManager
from flatfile_chat_database.check import check
from flatfile_chat_database.config import StorageConfig

from . import postgres
from .load import Load
from .servers import PostgresServer, postgres_replica, postgres_server

pytestmark = pytest.mark.slow


@asynccontextmanager
async def opened(url: str, *, read_only: bool = False, **settings: int) -> AsyncIterator[StorageManager]:
    config = StorageConfig(storage_url=url)
    for name, value in settings.items():
        setattr(config, name, value)
    async with StorageManager(config, read_only=read_only) as storage:
        yield storage


def both(first: PostgresServer, second: PostgresServer, attributes: str) -> str:
    """Return a URL of two servers, one of which is chosen by what it is."""
    hosts = f"127.0.0.1:{first.port},127.0.0.1:{second.port}"
    return f"postgresql://postgres@{hosts}/postgres?target_session_attrs={attributes}"


# --- replicas ----------------------------------------------------------------------------------------------


async def test_a_replica_answers_everything_that_is_asked_of_it() -> None:
    with postgres_server(durable=True) as primary, postgres_replica(primary, "second", durable=True) as replica:
        # Then what was acknowledged can be read on the replica at once.
        primary.sql("ALTER SYSTEM SET synchronous_standby_names = 'second'")
        primary.sql("ALTER SYSTEM SET synchronous_commit = 'remote_apply'")
        primary.sql("SELECT pg_reload_conf()")
        async with (
            opened(both(primary, replica, "read-write")) as storage,
            opened(both(primary, replica, "standby"), read_only=True) as reader,
        ):
            await storage.create_user("ada", {"name": "Ada"})
            session = await storage.create_session("ada", "Engines")
            for number in range(20):
                await storage.add_message("ada", session, Message("user", f"engine alpha{number}"))
                assert await reader.count_messages("ada", session) == number + 1
            assert await reader.get_messages("ada", session) == await storage.get_messages("ada", session)
            assert [each.id for each in await reader.list_sessions("ada")] == [session]
            assert await reader.get_user_profile("ada") == {"name": "Ada"}
            # Nobody has kept their words yet, and a replica cannot: they are read.
            for order in ("time", "relevance"):
                told = [hit.message for hit in await reader.search("engine alpha7", user_id="ada", order=order)]
                assert [message.content for message in told if message] == ["engine alpha7"]
                assert told == [
                    hit.message for hit in await storage.search("engine alpha7", user_id="ada", order=order)
                ]
            assert await check(reader.backend) == await check(storage.backend)


# --- failover ----------------------------------------------------------------------------------------------


async def test_when_a_server_dies_and_its_replica_takes_over_nothing_acknowledged_is_lost() -> None:
    with postgres_server(durable=True) as primary, postgres_replica(primary, "second", durable=True) as replica:
        primary.sql("ALTER SYSTEM SET synchronous_standby_names = 'second'")
        primary.sql("SELECT pg_reload_conf()")
        async with opened(both(primary, replica, "read-write"), database_connect_timeout_seconds=2) as storage:
            load = Load(storage)
            await load.prepare()
            tasks = [asyncio.ensure_future(load.run(writer)) for writer in load.acknowledged]
            await load.more(300)
            await asyncio.to_thread(primary.kill)
            replica.sql("ALTER SYSTEM SET synchronous_standby_names = ''")
            await asyncio.to_thread(replica.promote)
            await load.more(300)
            load.is_over = True
            await asyncio.gather(*tasks)
            assert load.refused + load.unknown
            await load.verify()


# --- partitions --------------------------------------------------------------------------------------------


async def test_messages_are_in_partitions_by_their_owner() -> None:
    url = postgres.fresh_schema()
    async with opened(url, database_partitions=4) as storage:
        for number in range(40):
            user = f"user-{number}"
            await storage.create_user(user)
            for _ in range(2):
                session = await storage.create_session(user)
                await storage.add_messages(user, session, [Message("user", f"said {n}") for n in range(5)])
                await storage.add_message(user, session, Message("assistant", "alone"))
        panel = await storage.create_panel("debate", ["a", "b"])
        await storage.add_panel_message(panel, Message("a", "first"))

        assert [each.content for each in await storage.get_messages("user-7", session)] == []
        [own, _] = await storage.list_sessions("user-7")
        page = await storage.get_messages("user-7", own.id)
        assert [each.content for each in page] == [*(f"said {n}" for n in range(5)), "alone"]
        await storage.update_message("user-7", own.id, page[1].id, {"content": "said again"})
        await storage.delete_message("user-7", own.id, page[0].id)
        assert [hit.snippet for hit in await storage.search("again", user_id="user-7")] == ["said «again»"]
        assert await storage.delete_session("user-7", own.id)
        assert (await check(storage.backend)).clean

    shares = dict(postgres.sql(url, "SELECT tableoid::regclass::text, count(*) FROM messages GROUP BY 1"))
    assert sum(shares.values()) == 40 * 12 - 6
    assert {name.rpartition(".")[2] for name in shares} == {f"messages_{number}" for number in range(4)}
    # Whoever asks for one owner asks one partition, however many there are.
    plan = postgres.sql(url, "EXPLAIN SELECT body FROM messages WHERE user_id = 'user-7' AND session_id = 'x'")
    asked = {name for (line,) in plan for name in re.findall(r"\bmessages_\d", line)}
    assert len(asked) == 1
