"""One session with one writer, who awaits each append before the next."""

from __future__ import annotations

import asyncio
from pathlib import Path

from .appending import race
from .machine import work_folder
from .ours import OURS, Ours
from .peers import Contestant, open_peer
from .result import Bar, Result, Table, median

MESSAGES = 2_000
"""A round."""

BARS = {
    "sqlite3 through asyncio.to_thread": Bar(least=1.0, aim=1.5),
    "OpenAI Agents SQLiteSession": None,
    "asyncio and those calls, without a store": None,
}


def run(*, quick: bool) -> Result:
    """Measure messages a second."""
    with work_folder() as folder:
        return asyncio.run(_measure(folder, quick=quick))


async def _measure(folder: Path, *, quick: bool) -> Result:
    messages = 50 if quick else MESSAGES
    ours = Ours(folder / "ours", 1)
    await ours.create()
    contestants: dict[str, Contestant] = {OURS: ours}
    contestants |= {name: peer for name in BARS if (peer := open_peer(name, folder, 1)) is not None}
    rates, notes = await race(contestants, 1, messages, {}, quick=quick)
    table = Table()
    for name, bar in BARS.items():
        table.compare("one session, one writer", "messages/s", rates[OURS], name, rates.get(name), bar)
    return Result(
        "single",
        f"one session whose writer awaits each append, {messages:,} messages a round",
        table.rows,
        table.beyond,
        notes,
        rates,
        {name: median(values) for name, values in rates.items()},
        table.missing,
    )
