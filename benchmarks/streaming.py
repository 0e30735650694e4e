"""A log of 1,000,000 messages through the iterator, in a process of its own."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

from flatfile_chat_database import StorageManager

from .corpus import Texts
from .machine import work_folder
from .ours import USER, configuration, create_logs, forget_peak, memory_bytes, peak_bytes
from .result import Bar, Result, Table
from .rounds import ROUNDS, settle

MESSAGES = 1_000_000

FAST = Bar(least=300_000)
SMALL = Bar(most=20)


def run(*, quick: bool) -> Result:
    """Measure messages a second, and by how much the process's memory grew from the first message on."""
    messages, rounds = (2_000, 1) if quick else (MESSAGES, ROUNDS)
    rates, growths = [], []
    with work_folder() as folder:
        sizes = asyncio.run(create_logs(folder, {"warm": Texts().take(1_000), "long": Texts(2).take(messages)}))
        for number in range(rounds + 1):
            settle(quick=quick)
            finished = subprocess.run(
                [sys.executable, "-m", __name__, str(folder)], stdout=subprocess.PIPE, check=True, text=True
            )
            answer = json.loads(finished.stdout)
            if answer["messages"] != messages:
                raise SystemExit(f"The iterator yielded {answer['messages']:,} messages instead of {messages:,}.")
            if number:  # the first one was to warm up
                rates.append(messages / answer["seconds"])
                growths.append(answer["growth"] / 1e6)
    table = Table()
    table.measure(f"streaming {messages:,} messages", "messages/s", rates, FAST)
    table.measure("growth of the peak of memory", "MB", growths, SMALL)
    return Result(
        "streaming",
        f"a log of {sizes['long'] / 1e6:,.1f} MB through `stream_messages`, each round in a new process",
        table.rows,
        table.beyond,
        [],
        {"messages/s": rates, "growth MB": growths},
    )


async def _stream(folder: Path) -> dict[str, float]:
    async with StorageManager(configuration(folder)) as storage:
        async for _ in storage.stream_messages(USER, "warm"):
            pass
        forget_peak()
        before = memory_bytes()
        count = 0
        began = time.perf_counter()
        async for _ in storage.stream_messages(USER, "long"):
            count += 1
        seconds = time.perf_counter() - began
        return {"messages": count, "seconds": seconds, "growth": peak_bytes() - before}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_stream(Path(sys.argv[1])))))
