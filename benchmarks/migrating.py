"""`chatdb migrate` of generated conversations from files to PostgreSQL and back: the whole command, verified."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.servers import PostgresServer, is_postgres_installed, postgres_server

from .corpus import CONVERSATIONS, write_conversations
from .importing import PROGRAM
from .machine import work_folder
from .result import Bar, Result, Table, median
from .rounds import settle, timed

BAR = Bar(least=20_000)
MEMORY = Bar(most=200)
ROUNDS = 3


def run(*, quick: bool) -> Result:
    """Measure messages a second: the whole command, from the start of its process to its end."""
    if not is_postgres_installed():
        raise SystemExit("PostgreSQL is not installed: `make servers` installs it.")
    with work_folder() as folder, postgres_server(durable=True) as server:
        return _measure(folder, server, quick=quick)


def _measure(folder: Path, server: PostgresServer, *, quick: bool) -> Result:
    conversations, rounds = (50, 1) if quick else (CONVERSATIONS, ROUNDS)
    source = folder / "conversations.jsonl"
    messages = write_conversations(source, conversations)
    store = folder / "store"
    _chatdb(store, "--set", "max_sessions_per_user=1000000", "import", "--format", "openai-jsonl", str(source))
    there: list[float] = []
    back: list[float] = []
    peaks: list[float] = []
    for number in range(rounds + 1):
        name = f"round{number}"
        server.sql(f"CREATE DATABASE {name}")
        for rates, ends in ((there, (store, server.url(name))), (back, (server.url(name), folder / name))):
            settle(quick=quick)
            with timed() as watch:
                peak = _chatdb(None, "migrate", *map(str, ends))
            if number:  # the first one was to warm up
                rates.append(messages / watch.seconds)
                peaks.append(peak / 1e6)
        server.sql(f"DROP DATABASE {name}")
    table = Table()
    table.measure("files to PostgreSQL", "messages/s", there, BAR)
    table.measure("PostgreSQL to files", "messages/s", back, BAR)
    table.measure("peak memory of the command", "MB", peaks, MEMORY)
    return Result(
        "migrating",
        f"{messages:,} messages in {conversations:,} conversations, {messages / median(there):.1f} s there and "
        f"{messages / median(back):.1f} s back",
        table.rows,
        table.beyond,
        ["each with a verification of every key by its hash"],
        {"files to PostgreSQL": there, "PostgreSQL to files": back},
    )


def _chatdb(store: Path | None, *arguments: str) -> int:
    """Run a command; return the most memory that it had."""
    options = ["--json"] if store is None else ["--store", str(store), "--json"]
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, *options, *arguments], capture_output=True, check=False, text=True
    )
    if finished.returncode:
        raise SystemExit(f"chatdb {' '.join(arguments)} failed: {finished.stderr}")
    json.loads(finished.stdout.splitlines()[-1])
    return int(finished.stderr.split()[-2]) * 1024  # VmHWM: 12345 kB
