"""1,000 sessions at once: how long an append may take when everybody writes."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from flatfile_chat_database import Message, StorageManager

from .corpus import ROLES, Texts
from .machine import work_folder
from .ours import USER, configuration, create_sessions, names
from .result import Bar, Result, Table, median, percentile
from .rounds import ROUNDS, settle, timed

SESSIONS = 1_000
MESSAGES = 30
"""For each session and round."""

BAR = Bar(most=3)
"""A fair queue serves each session once in (sessions / rate); nobody waits for more than this many turns."""


def run(*, quick: bool) -> Result:
    """Measure milliseconds from call to return, and the rate of all of them."""
    with work_folder() as folder:
        return asyncio.run(_measure(folder, quick=quick))


async def _measure(folder: Path, *, quick: bool) -> Result:
    sessions, messages, rounds = (50, 5, 1) if quick else (SESSIONS, MESSAGES, ROUNDS)
    texts = Texts()
    rates, turns, slowest = [], [], []
    async with StorageManager(configuration(folder)) as storage:
        own = names(sessions)
        await create_sessions(storage, own)
        for number in range(rounds + 1):
            settle(quick=quick)
            said = [texts.take(messages) for _ in own]
            times: list[float] = []
            with timed() as watch:
                await asyncio.gather(
                    *(_write(storage, name, lines, times) for name, lines in zip(own, said, strict=True))
                )
            if number:  # the first one was to warm up
                rates.append(sessions * messages / watch.seconds)
                turns.append(sessions / rates[-1] * 1000)
                slowest.append(percentile(times, 0.99))
    table = Table()
    table.relate("99th percentile of an append", "ms", slowest, f"a turn of all: {sessions:,} / rate", turns, BAR)
    return Result(
        "many",
        f"{sessions:,} sessions at once, each awaiting its own appends, {median(rates):,.0f} messages/s in all",
        table.rows,
        table.beyond,
        [],
        {"messages/s": rates, "99th percentile ms": slowest},
    )


async def _write(storage: StorageManager, session: str, texts: list[str], times: list[float]) -> None:
    for number, text in enumerate(texts):
        began = time.perf_counter()
        await storage.add_message(USER, session, Message(ROLES[number % 2], text))
        times.append((time.perf_counter() - began) * 1000)
