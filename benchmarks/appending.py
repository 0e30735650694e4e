"""100 sessions at once, each awaiting its own appends, beside the peers with the same sessions and the same bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from .corpus import Texts
from .machine import work_folder
from .ours import HAS_LEVELS, OURS, OURS_NORMAL, OURS_SQLITE, Ours
from .peers import PEERS, Contestant, open_peer
from .peers.system_calls import SystemCalls
from .result import Bar, Result, Table, median
from .rounds import Contest, interleave, timed

SESSIONS = 100
MESSAGES = 400
"""For each session and round; a round is 40,000."""

FEWER = {
    "sqlite3 through asyncio.to_thread": 100,
    "OpenAI Agents SQLiteSession": 100,
    "LangChain FileChatMessageHistory": 10,
    "Agent Framework FileHistoryProvider": 10,
}
"""Whose round would take too long has so many; the first two are as fast with more, and the last two slower."""

BARS = {
    "raw sqlite3": Bar(least=8, aim=15),
    "OpenAI Agents SQLiteSession": Bar(least=10),
    "plain system calls (floor)": Bar(least=0.15, aim=0.3),
}

SQLITE_BAR = Bar(least=5)
"""Of our store in SQLite, beside raw `sqlite3`."""


def run(*, quick: bool) -> Result:
    """Measure messages a second."""
    with work_folder() as folder:
        return asyncio.run(_measure(folder, quick=quick))


async def _measure(folder: Path, *, quick: bool) -> Result:
    sessions, messages = (10, 10) if quick else (SESSIONS, MESSAGES)
    contestants = await open_all(folder, sessions)
    rates, notes = await race(contestants, sessions, messages, FEWER, quick=quick)
    table = Table()
    for peer in PEERS:
        ours = OURS
        if peer == "raw sqlite3, synchronous=NORMAL":
            if not HAS_LEVELS:
                continue
            ours = OURS_NORMAL
        what = f"{sessions} sessions at once" if ours == OURS else f"{sessions} sessions at once, durability=normal"
        table.compare(what, "messages/s", rates[ours], peer, rates.get(peer), BARS.get(peer))
    what = f"{sessions} sessions at once, in SQLite"
    table.compare(what, "messages/s", rates[OURS_SQLITE], "raw sqlite3", rates.get("raw sqlite3"), SQLITE_BAR)
    notes += [
        f"{name}: {sessions * FEWER[name]:,} messages a round, because it is slow"
        for name in contestants
        if FEWER.get(name, messages) < messages
    ]
    return Result(
        "appending",
        f"{sessions} sessions, each awaiting its own appends, {sessions * messages:,} messages a round",
        table.rows,
        table.beyond,
        notes,
        rates,
        {name: median(values) for name, values in rates.items()},
        table.missing,
    )


async def open_all(folder: Path, sessions: int) -> dict[str, Contestant]:
    """Open our store at each level and every peer that is installed, ours first."""
    contestants: dict[str, Contestant] = {}
    for name, level in ((OURS, "full"), (OURS_NORMAL, "normal")):
        if level == "full" or HAS_LEVELS:
            contestants[name] = ours = Ours(folder / f"ours-{level}", sessions, level)
            await ours.create()
    contestants[OURS_SQLITE] = ours = Ours(folder / "ours-sqlite", sessions, url=f"sqlite:{folder}/ours.sqlite3")
    await ours.create()
    for name in PEERS:
        if name == "raw sqlite3, synchronous=NORMAL" and not HAS_LEVELS:
            continue
        peer = open_peer(name, folder, sessions)
        if peer is not None:
            contestants[name] = peer
    return contestants


async def race(
    contestants: Mapping[str, Contestant], sessions: int, messages: int, fewer: Mapping[str, int], *, quick: bool
) -> tuple[dict[str, list[float]], list[str]]:
    """Have contestants append to many sessions at once, in turn, and close them; each must have what it was given.

    Return the messages a second of each round, and what each promises of a message.
    """
    texts = Texts()
    stored = dict.fromkeys(contestants, 0)

    def contest(name: str, contestant: Contestant) -> Contest:
        count = min(messages, fewer.get(name, messages))

        async def append() -> float:
            said = [texts.take(count) for _ in range(sessions)]
            if isinstance(contestant, SystemCalls):
                contestant.prepare(said)
            with timed() as watch:
                await contestant.append_all(said)
            stored[name] += sessions * count
            return sessions * count / watch.seconds

        return append

    rates = await interleave({name: contest(name, each) for name, each in contestants.items()}, quick=quick)
    notes = [f"{name}: {contestant.durability}" for name, contestant in contestants.items()]
    for name, contestant in contestants.items():
        count = await contestant.count()
        await contestant.close()
        if count != stored[name]:
            raise SystemExit(f"{name} was given {stored[name]:,} messages and has {count:,}.")
    return rates, notes
