"""PostgreSQL servers that are killed, restarted, cut off, full, or that follow another one."""

import asyncio
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from flatfile_chat_database import Message, StorageManager
from flatfile_chat_database.backends.changes import Append, Require
from flatfile_chat_database.backends.postgres import PostgresBackend, listening
from flatfile_chat_database.backends.postgres.session import PostgresSession
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.errors import DurabilityError, UnavailableError
from flatfile_chat_database.testing.case import LOG, all_of, fresh_processes, line

from . import postgres
from .load import SESSIONS, Load
from .servers import PostgresServer, postgres_replica, postgres_server

pytestmark = pytest.mark.slow

# --- killed and restarted under load ---------------------------------------------------------------------


async def test_a_server_that_is_killed_under_load_loses_nothing_that_was_acknowledged() -> None:
    with postgres_server(durable=True) as server:
        async with StorageManager(StorageConfig(storage_url=server.url())) as storage:
            load = Load(storage)
            await load.prepare()
            tasks = [asyncio.ensure_future(load.run(writer)) for writer in load.acknowledged]
            for end in (server.kill, server.stop, server.kill, server.kill):
                await load.more(150)
                await asyncio.to_thread(end)
                await asyncio.to_thread(server.start)
            await load.more(150)
            load.is_over = True
            await asyncio.gather(*tasks)
            assert load.refused + load.unknown
            await load.verify()


async def test_a_restart_is_noticed_by_no_reader() -> None:
    with postgres_server() as server:
        async with StorageManager(StorageConfig(storage_url=server.url())) as storage:
            await storage.create_user("ada")
            session = await storage.create_session("ada")
            await storage.add_message("ada", session, Message("user", "text"))
            assert await storage.count_messages("ada", session) == 1
            for _ in range(2):
                server.stop()
                with pytest.raises(UnavailableError):
                    await storage.count_messages("ada", session)
                with pytest.raises(UnavailableError):
                    await storage.add_message("ada", session, Message("user", "lost"))
                server.start()
                found = await asyncio.gather(*(storage.get_messages("ada", session) for _ in range(8)))
                assert [len(page) for page in found] == [1] * 8
                assert len(await all_of(storage.stream_messages("ada", session))) == 1
            server.stop()
            server.start()
            assert await storage.add_message("ada", session, Message("user", "on a new connection"))


# --- cut off ------------------------------------------------------------------------------------------------


class Proxy:
    """Stands between clients and a server; cuts the connection when a client says something."""

    def __init__(self, port: int) -> None:
        self._server = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.words: list[bytes] = []
        """What is waited for; each of them once."""
        self.passes_it_on = False
        """Whether the server hears it first."""
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server))
                threading.Thread(target=self._talk, args=(client, server), daemon=True).start()
                threading.Thread(target=self._answer, args=(server, client), daemon=True).start()

    def _talk(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError), client, server:
            while data := client.recv(1 << 16):
                if self.words and self.words[0] in data:
                    del self.words[0]
                    client.shutdown(socket.SHUT_RDWR)
                    if self.passes_it_on:
                        server.sendall(data)
                        while server.recv(1 << 16):  # to the end of what it does
                            server.shutdown(socket.SHUT_WR)
                    else:
                        server.shutdown(socket.SHUT_RDWR)  # or the server would wait for the rest of it
                    return
                server.sendall(data)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(1 << 16):
                client.sendall(data)


@contextmanager
def proxied() -> Iterator[tuple[Proxy, str]]:
    url = postgres.empty_store()
    port = postgres.server().port
    proxy = Proxy(port)
    try:
        yield proxy, url.replace(f":{port}", f":{proxy.port}")
    finally:
        proxy.close()


@pytest.mark.parametrize("arrives", [True, False])
async def test_a_connection_that_is_lost_in_commit_leaves_the_outcome_open_and_a_retry_is_safe(arrives: bool) -> None:
    with proxied() as (proxy, url):
        async with StorageManager(StorageConfig(storage_url=url)) as storage:
            await storage.create_user("ada")
            session = await storage.create_session("ada")
            await storage.add_message("ada", session, Message("user", "first"))
            messages = [Message("user", f"text {number}") for number in range(5)]
            proxy.words, proxy.passes_it_on = [b"COMMIT"], arrives
            work = [storage.add_message("ada", session, message) for message in messages]
            results = await asyncio.gather(*work, return_exceptions=True)
            assert [type(result) for result in results] == [DurabilityError] * 5, results
            for message in messages:
                await storage.add_message("ada", session, message)
            found = [message.content for message in await storage.get_messages("ada", session)]
            assert found == ["first", *(message.content for message in messages)]


@pytest.mark.parametrize("word", [b"BEGIN", b"pg_advisory_xact_lock", b"COPY", b"INTO changes"])
async def test_a_connection_that_is_lost_before_commit_is_made_anew_and_nobody_notices(word: bytes) -> None:
    with proxied() as (proxy, url):
        async with StorageManager(StorageConfig(storage_url=url)) as storage:
            await storage.create_user("ada")
            session = await storage.create_session("ada")
            await storage.add_message("ada", session, Message("user", "first"))
            proxy.words = [word]
            work = [storage.add_message("ada", session, Message("user", f"text {number}")) for number in range(5)]
            assert await asyncio.gather(*work) == [True] * 5
            assert proxy.words == []
            assert await storage.count_messages("ada", session) == 6


async def test_a_read_whose_connection_is_lost_is_done_again() -> None:
    with proxied() as (proxy, url):
        async with StorageManager(StorageConfig(storage_url=url)) as storage:
            await storage.create_user("ada")
            session = await storage.create_session("ada")
            await storage.add_message("ada", session, Message("user", "first"))
            proxy.words = [b"messages"]
            assert await storage.count_messages("ada", session) == 1
            assert len(await storage.get_messages("ada", session)) == 1
            assert proxy.words == []


async def test_a_read_whose_connection_is_lost_before_there_is_a_store_is_done_again() -> None:
    url = postgres.fresh_schema()
    store = PostgresBackend(StorageConfig(storage_url=url))
    await store.open()
    ends = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE application_name = 'chatdb'"
    for _ in range(2):
        assert await store.read("a") is None
        assert (True,) in postgres.sql(url, ends)
    other = PostgresBackend(StorageConfig(storage_url=url))
    await other.open()
    await other.write("a", b"x")
    assert await store.read("a") == b"x", "the store that was made meanwhile is found"
    await store.close()
    await other.close()


async def test_a_commit_that_no_standby_confirmed_in_time_is_not_acknowledged() -> None:
    with postgres_server(durable=True) as server:
        owner = Require("users/ann/chat/session.json", "It")
        store = PostgresBackend(StorageConfig(storage_url=server.url(), database_timeout_seconds=0.3))
        await store.open()
        await store.write(owner.key, b"{}")
        await store.commit([Append(LOG, (line("m0"),))])
        server.sql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        server.sql("SELECT pg_reload_conf()")
        while server.sql("SHOW synchronous_standby_names") != "nobody":
            pass
        with pytest.raises(DurabilityError, match="synchronous replication"):
            await store.commit([owner, Append(LOG, (line("m1"),), ids=("m1",))])
        assert await store.count_log(LOG) == 2, "here it is, but nowhere else"
        await store.close()


# --- many processes -----------------------------------------------------------------------------------------


def append(url: str, process: int, each: int) -> None:
    async def run() -> None:
        async with StorageManager(StorageConfig(storage_url=url)) as storage:

            async def one(session: int) -> None:
                for number in range(each):
                    message = Message("user", "text", id=f"{process}.{session}-{number}")
                    await storage.add_message("ada", f"s{session}", message)
                    if number % 20 == 0:  # something that locks the whole store
                        await storage.update_session("ada", f"s{session}", {"title": f"{process}"})

            await asyncio.gather(*(one(session) for session in range(SESSIONS)))

    asyncio.run(run())


async def test_four_processes_that_append_to_the_same_sessions_lose_and_mix_nothing() -> None:
    url = postgres.empty_store()
    async with StorageManager(StorageConfig(storage_url=url)) as storage:
        await storage.create_user("ada")
        for session in range(SESSIONS):
            await storage.create_session("ada", session_id=f"s{session}")
        context = fresh_processes()
        processes = [context.Process(target=append, args=(url, number, 60)) for number in range(4)]
        for process in processes:
            process.start()
        counts: list[int] = []
        while any(process.is_alive() for process in processes):
            pages = [await storage.get_messages("ada", "s0", limit=None)]
            counts.append(len(pages[0]))
            assert len({message.id for message in pages[0]}) == counts[-1], "a page shows one state"
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        assert counts == sorted(counts)
        for session in range(SESSIONS):
            found = await all_of(storage.stream_messages("ada", f"s{session}", strict=True))
            for writer in range(4):
                mine = [message.id for message in found if message.id.startswith(f"{writer}.")]
                assert mine == [f"{writer}.{session}-{number}" for number in range(60)]
        rows = "SELECT count(*), max(position) + 1 FROM messages GROUP BY session_id"
        assert postgres.sql(url, rows) == [(240, 240)] * SESSIONS


# --- a full disk, and a replica -----------------------------------------------------------------------------


@contextmanager
def small_disk(server: PostgresServer) -> Iterator[Path]:
    """A file system of a few megabytes, which takes root to mount."""
    folder = server.folder / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True, capture_output=True)
    try:
        shutil.chown(folder, "postgres", "postgres")
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(server: PostgresServer, folder: Path | None) -> None:
    if folder is not None:
        server.sql(f"CREATE TABLESPACE small LOCATION '{folder}'")
        server.sql("ALTER TABLE messages SET TABLESPACE small")
        (folder / "filler").write_bytes(bytes(shutil.disk_usage(folder).free))
        return
    # Without a disk that can be filled, the server says what it would say.
    server.sql(
        "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN RAISE EXCEPTION 'no space left on device' USING ERRCODE = 'disk_full'; END$$"
    )
    server.sql("CREATE TRIGGER full_disk BEFORE INSERT ON messages EXECUTE FUNCTION full_disk()")


def empty(server: PostgresServer, folder: Path | None) -> None:
    if folder is not None:
        (folder / "filler").unlink()
    else:
        server.sql("DROP TRIGGER full_disk ON messages")


def can_mount(server: PostgresServer) -> bool:
    if os.geteuid() != 0:
        return False
    try:
        with small_disk(server):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        with suppress(OSError):
            (server.folder / "small").rmdir()


async def test_a_server_whose_disk_is_full_says_so_and_goes_on_when_there_is_space_again() -> None:
    with postgres_server() as server:
        mounts = can_mount(server)
        async with StorageManager(StorageConfig(storage_url=server.url())) as storage:
            await storage.create_user("ada")
            session = await storage.create_session("ada")
            with small_disk(server) if mounts else nothing() as folder:
                fill(server, folder)
                large = [Message("user", os.urandom(30_000).hex()) for _ in range(20)]
                work = [storage.add_message("ada", session, message) for message in large]
                results = await asyncio.gather(*work, return_exceptions=True)
                refused = [result for result in results if result is not True]
                assert refused and all(isinstance(result, UnavailableError) for result in refused), results
                assert "disk is full" in str(refused[0])
                assert await storage.count_messages("ada", session) == len(large) - len(refused)
                empty(server, folder)
                for message in large:
                    await storage.add_message("ada", session, message)
                assert await storage.count_messages("ada", session) == len(large)
                if folder is not None:
                    server.sql("ALTER TABLE messages SET TABLESPACE pg_default")
                    server.sql("DROP TABLESPACE small")


@contextmanager
def nothing() -> Iterator[None]:
    yield None


async def test_a_replica_is_read_and_refuses_writes() -> None:
    with postgres_server() as server:
        async with StorageManager(StorageConfig(storage_url=server.url())) as storage:
            await storage.create_user("ada")
            session = await storage.create_session("ada")
            await storage.add_message("ada", session, Message("user", "text"))
        with postgres_replica(server, "copy") as replica:
            async with StorageManager(StorageConfig(storage_url=replica.url()), read_only=True) as storage:
                assert [message.content for message in await storage.get_messages("ada", session)] == ["text"]
            async with StorageManager(StorageConfig(storage_url=replica.url())) as storage:
                with pytest.raises(UnavailableError, match="target_session_attrs=read-write"):
                    await storage.add_message("ada", session, Message("user", "text"))
                with pytest.raises(UnavailableError, match="target_session_attrs=read-write"):
                    await storage.create_user("eve")


async def test_a_replica_that_is_watched_is_asked_once_whether_it_can_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    connections = 0

    class Counted(PostgresSession):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            nonlocal connections
            connections += 1
            super().__init__(*arguments, **named)

    monkeypatch.setattr(listening, "PostgresSession", Counted)
    with postgres_server() as server:
        async with StorageManager(StorageConfig(storage_url=server.url())) as storage:
            await storage.create_user("ada")
            session = await storage.create_session("ada")
            with postgres_replica(server, "copy") as replica:
                config = StorageConfig(storage_url=replica.url(), watch_poll_seconds=0.02)
                async with (
                    StorageManager(config, read_only=True) as copy,
                    copy.watch_session("ada", session) as watch,
                ):
                    lookout = vars(copy.backend)["_lookout"]
                    async with asyncio.timeout(60):
                        while not connections or lookout._threads:  # noqa: ASYNC110 - a thread is about to end
                            await asyncio.sleep(0.01)
                    for number in range(5):
                        await storage.add_message("ada", session, Message("user", "text", id=f"m{number}"))
                        assert (await asyncio.wait_for(anext(watch), 60)).message.id == f"m{number}"
    assert connections == 1


async def test_a_cursor_is_none_on_a_server_that_took_the_place_of_another() -> None:
    with postgres_server() as server:
        store = PostgresBackend(StorageConfig(storage_url=server.url()))
        await store.open()
        await store.write("first", b"x")
        with postgres_replica(server, "copy") as replica, psycopg.connect(server.url()) as other:
            other.execute("INSERT INTO changes VALUES (pg_current_xact_id(), 'late', 'late')")
            await store.write("seen", b"x")
            at = server.sql("SELECT pg_current_wal_flush_lsn()")
            while replica.sql(f"SELECT pg_last_wal_replay_lsn() >= '{at}'") != "t":
                pass
            copy = PostgresBackend(StorageConfig(storage_url=replica.url()))
            await copy.open()
            cursor = (await store.changes(None)).cursor
            assert (await copy.changes(cursor)).keys is not None, "one that only follows has the same changes"
            replica.sql("ALTER SYSTEM SET primary_conninfo = ''")
            replica.sql("SELECT pg_reload_conf()")
            while replica.sql("SELECT count(*) FROM pg_stat_wal_receiver") != "0":
                pass
            other.commit()  # which the replica never gets
            changes = await store.changes(cursor)
            assert changes.keys is not None and "late" in changes.keys
            replica.promote()
            assert (await copy.changes(changes.cursor)).keys is None
            await copy.close()
        await store.close()


# --- forks ---------------------------------------------------------------------------------------------------


async def test_a_child_that_was_forked_leaves_its_parents_connections_alone() -> None:
    url = postgres.empty_store()
    store = PostgresBackend(StorageConfig(storage_url=url))
    await store.open()
    await store.write("a", b"x")
    used = "SELECT array_agg(pid ORDER BY pid) FROM pg_stat_activity WHERE application_name = 'chatdb'"
    before = postgres.sql(url, used)
    child = os.fork()
    if child == 0:
        code = 1
        with suppress(BaseException):
            store._free.clear()
            code = 0
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert await store.read("a") == b"x"
    assert await store.write("a", b"y")
    assert postgres.sql(url, used) == before
    await store.close()
