"""How many messages a second several nodes write to one PostgreSQL, for each way to lock; prints the figures of
`docs/decisions/2026-11-26-messages-lock-their-logs.md`.

    python -m benchmarks.nodes [MILLISECONDS]

With a number, a standby confirms each COMMIT that much later.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import sys
import time
from contextlib import nullcontext
from multiprocessing.connection import Connection

from flatfile_chat_database import Message, StorageConfig, StorageManager
from flatfile_chat_database.backends.postgres import PostgresBackend
from tests.servers import PostgresServer, postgres_replica, postgres_server

SESSIONS, EACH, ROUNDS = 25, 16, 5
CONTENT = "what people say to each other " * 12


def node(url: str, number: int, locks_store: bool, pipe: Connection) -> None:
    if locks_store:
        PostgresBackend._run_messages = lambda self, jobs: False  # type: ignore[method-assign]
    user = f"u{number}"

    async def run() -> None:
        async with StorageManager(StorageConfig(storage_url=url)) as storage:
            await storage.create_user(user)
            for session in range(SESSIONS):
                await storage.create_session(user, session_id=f"s{session}")
                await storage.add_message(user, f"s{session}", Message("user", "the first"))

            async def write(session: int) -> None:
                for _ in range(EACH):
                    await storage.add_message(user, f"s{session}", Message("user", CONTENT))

            for _ in range(ROUNDS):
                pipe.send(None)
                pipe.recv()
                await asyncio.gather(*(write(session) for session in range(SESSIONS)))
            pipe.send(None)

    asyncio.run(run())


def rate(server: PostgresServer, nodes: int, *, locks_store: bool) -> float:
    """Return messages a second, the median of the rounds."""
    server.sql("DROP SCHEMA public CASCADE")
    server.sql("CREATE SCHEMA public")
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(nodes)]
    processes = [
        context.Process(target=node, args=(server.url(), number, locks_store, pipe))
        for number, (_, pipe) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    seconds = []
    for pipe, _ in pipes:
        pipe.recv()
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for pipe, _ in pipes:
            pipe.send(None)
        for pipe, _ in pipes:
            pipe.recv()
        seconds.append(time.perf_counter() - start)
    for process in processes:
        process.join()
    return nodes * SESSIONS * EACH / statistics.median(seconds)


def main() -> None:
    delay = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    with postgres_server(durable=True) as server:
        server.sql(f"ALTER SYSTEM SET recovery_min_apply_delay = '{delay}ms'")  # for the copy that is made of it
        with postgres_replica(server, "standby") if delay else nullcontext():
            if delay:
                server.sql("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
                server.sql("ALTER SYSTEM SET synchronous_commit = 'remote_apply'")
                server.sql("SELECT pg_reload_conf()")
            for nodes in (1, 2, 4):
                for locks_store in (True, False, True, False):
                    what = "store" if locks_store else "logs"
                    found = rate(server, nodes, locks_store=locks_store)
                    print(f"{nodes} nodes, locking the {what}: {found:,.0f} a second")


if __name__ == "__main__":
    main()
