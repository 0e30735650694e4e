"""Stores in a PostgreSQL server that the tests of one process share; looked at with statements of the tests' own.

Making tables takes longer than most tests, so a test gets the tables of the one before it, emptied. Whoever alters
tables takes a schema of its own (`fresh_schema`).
"""

from __future__ import annotations

import atexit
import itertools
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg

from flatfile_chat_database.backends import sql as scripts
from flatfile_chat_database.backends.postgres.target import warned
from flatfile_chat_database.backends.tables import Tables
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.layout import Layout

from .backdoors import records_of
from .servers import PostgresServer, postgres_server

SCRIPT = Path(scripts.__path__[0], "postgres_0001.sql")
TABLES = Tables(Layout(StorageConfig()))

_servers: dict[int, PostgresServer] = {}
_connections: dict[tuple[int, str], psycopg.Connection[Any]] = {}
_numbers = itertools.count()


def server() -> PostgresServer:
    """Return the server of this process; it starts with the first call, and stops when the process ends."""
    found = _servers.get(os.getpid())
    if found is None:
        stack = ExitStack()
        found = _servers[os.getpid()] = stack.enter_context(postgres_server())
        atexit.register(stack.close)
    return found


def connection(url: str) -> psycopg.Connection[Any]:
    """Return this process's own connection to a database."""
    place = os.getpid(), url
    if place not in _connections:
        _connections[place] = psycopg.connect(url, autocommit=True)
    return _connections[place]


def sql(url: str, *statements: str) -> list[tuple[Any, ...]]:
    """Run statements; return the rows of the last one."""
    rows: list[tuple[Any, ...]] = []
    for statement in statements:
        cursor = connection(url).execute(statement)
        rows = cursor.fetchall() if cursor.description else []
    return rows


def empty_store() -> str:
    """Return the URL of a store that nobody uses, with nothing in it."""
    url = server().url()
    warned.add(url)
    ends = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = 'postgres'"
    )
    there = sql(url, ends, "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'")
    if there:
        sql(url, *(f"DELETE FROM {name}" for (name,) in there if name != "chat_store"))
    else:
        sql(url, SCRIPT.read_text("utf-8"), "INSERT INTO chat_store VALUES (1, 'flatfile_chat_database')")
    return url


def fresh_schema() -> str:
    """Return the URL of a new schema without tables."""
    name = f"s{next(_numbers)}"
    sql(server().url(), f"CREATE SCHEMA {name}")
    return server().url(options=f"-csearch_path%3D{name}")


# --- the back door ---------------------------------------------------------------------------------------


def peek(url: str, key: str) -> bytes | None:
    """Return the bytes at a key."""
    found = connection(url).execute("SELECT place, id FROM entries WHERE key = %s", (key,)).fetchone()
    if found is None:
        return None
    if found[0] == "pieces":
        rows = connection(url).execute("SELECT data FROM pieces WHERE id = %s ORDER BY number", found[1:])
        return b"".join(data for (data,) in rows)
    spot = TABLES.log(key) if found[0] == "log" else TABLES.document(key)
    assert spot is not None
    where = " AND ".join(f"{name} = %s" for name in spot.table.ids)
    order = " ORDER BY position" if found[0] == "log" else ""
    statement: Any = f"SELECT body FROM {spot.table.name} WHERE {where}{order}"
    end = b"\n" if found[0] == "log" else b""
    return b"".join(body.encode() + end for (body,) in connection(url).execute(statement, spot.ids))


def poke(url: str, key: str, data: bytes) -> None:
    """Put bytes at a key."""
    cursor = connection(url).cursor()
    records = records_of(data) if key.endswith(".jsonl") else None
    row: tuple[object, ...]
    if records is None:
        cut = ((f"poked {key}", at, data[at : at + 100_000]) for at in range(0, len(data), 100_000))
        cursor.executemany("INSERT INTO pieces VALUES (%s, %s, %s)", cut)
        row = (key, "pieces", len(data), f"poked {key}")
    else:
        lines = data.decode().split("\n")
        spot = TABLES.log(key)
        columns = ", ".join((*spot.table.ids, "position", "id", "body"))
        marks = ", ".join(["%s"] * (len(spot.ids) + 3))
        statement: Any = f"INSERT INTO {spot.table.name} ({columns}) VALUES ({marks})"
        cursor.executemany(statement, [(*spot.ids, n, record["id"], lines[n]) for n, record in enumerate(records)])
        row = (key, "log", None, f"poked {key}")
    cursor.execute("INSERT INTO entries (key, place, size, id) VALUES (%s, %s, %s, %s)", row)


def peek_keys(url: str) -> list[str]:
    """Return all keys."""
    return [key for (key,) in connection(url).execute("SELECT key FROM entries")]
