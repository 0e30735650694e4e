"""Each common operation, one at a time, beside 100 sessions that keep appending durable messages."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from flatfile_chat_database import Message, SituationalContext, StorageConfig, StorageManager

from .result import Result, median, percentile

TEXT = "The quick brown fox jumps over the lazy dog, and then it rests for a while. " * 4  # 308 characters

LIMIT_MS = 100.0
"""The 99th percentile of every operation stays under it."""


def run(*, quick: bool) -> Result:
    """Measure milliseconds from call to return; every write is durable on return."""
    with tempfile.TemporaryDirectory(prefix="chatdb-benchmark-") as folder:
        return asyncio.run(_measure(Path(folder), quick=quick))


async def _measure(folder: Path, *, quick: bool) -> Result:
    appending, sessions, page, calls = (5, 20, 100, 5) if quick else (100, 1000, 100, 200)
    config = StorageConfig(storage_base_path=str(folder / "store"), max_messages_per_session=10_000_000)
    async with StorageManager(config) as storage:
        await _prepare(storage, appending, sessions, page)
        ended = asyncio.Event()
        appended = 0

        async def append(number: int) -> None:
            nonlocal appended
            while not ended.is_set():
                await storage.add_message("writer", f"w{number}", Message("user", TEXT))
                appended += 1

        writers = [asyncio.ensure_future(append(number)) for number in range(appending)]
        began = time.perf_counter()
        panel = await storage.create_panel("team", ["a", "b", "c"])
        operations: dict[str, Callable[[], Awaitable[object]]] = {
            "create_session": lambda: storage.create_session("creator", "New"),
            "add_message": lambda: storage.add_message("reader", "s0", Message("user", TEXT)),
            "get_messages, a page of 100": lambda: storage.get_messages("reader", "s0", 100, -100),
            "list_sessions, 50 of 1,000": lambda: storage.list_sessions("reader", 50),
            "update_context": lambda: storage.update_context("reader", "s0", SituationalContext("Now", ["a point"])),
            "get_context": lambda: storage.get_context("reader", "s0"),
            "create_panel": lambda: storage.create_panel("team", ["a", "b", "c"]),
            "add_panel_message": lambda: storage.add_panel_message(panel, Message("a", TEXT)),
            "get_panel_messages": lambda: storage.get_panel_messages(panel),
        }
        rows = []
        for name, operation in operations.items():
            times = []
            for _ in range(calls):
                start = time.perf_counter()
                await operation()
                times.append((time.perf_counter() - start) * 1000)
            rows.append(
                {
                    "operation": name,
                    "calls": calls,
                    "median ms": median(times),
                    "p99 ms": percentile(times, 0.99),
                    "max ms": max(times),
                }
            )
        rate = appended / (time.perf_counter() - began)
        ended.set()
        await asyncio.gather(*writers)
    what = f"beside {appending} sessions that appended {rate:,.0f} messages a second meanwhile"
    return Result("latency", what, rows, beyond(rows))


def beyond(rows: list[dict[str, Any]]) -> list[str]:
    """Return a sentence for each operation that is not under the limit."""
    return [
        f"{row['operation']}: {row['p99 ms']:.1f} ms at the 99th percentile; it has to be under {LIMIT_MS:.0f} ms."
        for row in rows
        if row["p99 ms"] >= LIMIT_MS
    ]


async def _prepare(storage: StorageManager, appending: int, sessions: int, page: int) -> None:
    for user in ("writer", "reader", "creator"):
        await storage.create_user(user)
    await asyncio.gather(*(storage.create_session("writer", session_id=f"w{n}") for n in range(appending)))
    await asyncio.gather(*(storage.create_session("reader", f"Chat {n}", session_id=f"s{n}") for n in range(sessions)))
    for n in range(sessions):
        count = 10 * page if n == 0 else 3
        await storage.add_messages("reader", f"s{n}", [Message("user", TEXT) for _ in range(count)])
