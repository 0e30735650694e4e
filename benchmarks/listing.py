"""Listing 50 of many sessions of a user, the most recently updated first."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flatfile_chat_database import Message, StorageConfig, StorageManager, codec
from flatfile_chat_database.layout import Layout
from flatfile_chat_database.models import format_timestamp

from .result import Result, median, percentile

USER = "ada"
LIMIT_MS = 2.0


def run(*, quick: bool) -> Result:
    """Measure milliseconds from call to return."""
    with tempfile.TemporaryDirectory(prefix="chatdb-benchmark-") as folder:
        return asyncio.run(_measure(Path(folder), quick=quick))


async def _measure(folder: Path, *, quick: bool) -> Result:
    sessions, rounds = (300, 3) if quick else (10_000, 200)
    config = StorageConfig(storage_base_path=str(folder / "store"), max_sessions_per_user=1_000_000)
    rows = []
    async with StorageManager(config) as storage:
        await storage.create_user(USER)
        await asyncio.to_thread(_write, folder / "store", config, sessions)
        began = time.perf_counter()
        await storage.list_sessions(USER, 50)
        rows.append({"what": "first, without a catalogue", "median ms": (time.perf_counter() - began) * 1000})
        await storage.list_sessions(USER, 50)
    async with StorageManager(config) as storage:
        began = time.perf_counter()
        await storage.list_sessions(USER, 50)
        rows.append({"what": "first of a process, with a catalogue", "median ms": (time.perf_counter() - began) * 1000})
        for what, offset in (("newest 50", 0), ("50 from the middle", sessions // 2)):
            times = []
            for _ in range(rounds):
                began = time.perf_counter()
                assert len(await storage.list_sessions(USER, 50, offset)) == 50
                times.append((time.perf_counter() - began) * 1000)
            rows.append({"what": what, "median ms": median(times[2:]), "p99 ms": percentile(times[2:], 0.99)})
        times = []
        for number in range(rounds // 4 + 1):
            await storage.add_message(USER, f"s{number}", Message("user", "again"))
            began = time.perf_counter()
            [newest] = await storage.list_sessions(USER, 1)
            times.append((time.perf_counter() - began) * 1000)
            assert newest.id == f"s{number}"
        rows.append({"what": "newest 1 after a message", "median ms": median(times), "p99 ms": percentile(times, 0.99)})
    for row in rows:
        row.setdefault("p99 ms", "")
    what = f"50 of {sessions:,} sessions of a user"
    warm = rows[2]["median ms"]
    missed = [f"The newest 50 take {warm:.1f} ms; it has to be under {LIMIT_MS:.0f} ms."]
    return Result("listing", what, rows, missed if not quick and isinstance(warm, float) and warm >= LIMIT_MS else [])


def _write(root: Path, config: StorageConfig, sessions: int) -> None:
    layout = Layout(config)
    begin = datetime(2025, 1, 1, tzinfo=UTC)
    for number in range(sessions):
        name = f"s{number}"
        moment = begin + timedelta(minutes=number * 7919 % sessions)
        content = {"id": name, "user_id": USER, "title": f"Chat {number}", "metadata": {"topic": "testing"}}
        content |= {"created_at": format_timestamp(moment), "updated_at": format_timestamp(moment)}
        document = root / layout.key("session", user_id=USER, session_id=name)
        document.parent.mkdir(mode=0o700)
        document.write_bytes(codec.encode_document(content))
        log = root / layout.key("messages", user_id=USER, session_id=name)
        later = format_timestamp(moment + timedelta(seconds=30))
        log.write_bytes(codec.encode_message(Message("user", f"Hello {number}", timestamp=later)))
        for path in (document, log):
            os.chmod(path, 0o600)
            os.utime(path, (moment.timestamp(), moment.timestamp()))
