"""Several processes with 100 sessions each on one store, beside one process alone."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from flatfile_chat_database import StorageManager

from .corpus import Texts
from .machine import work_folder
from .ours import USER, Ours, configuration
from .result import Bar, Result, Table
from .rounds import ROUNDS, settle

PROCESSES = 8
SESSIONS = 100
MESSAGES = 100
"""For each session and round."""

BAR = Bar(least=1.0)


def run(*, quick: bool) -> Result:
    """Measure messages a second, from the first begin to the last end, and read every message afterwards."""
    processes, sessions, messages, rounds = (2, 5, 5, 1) if quick else (PROCESSES, SESSIONS, MESSAGES, ROUNDS)
    rates: dict[str, list[float]] = {"one": [], "all": []}
    with work_folder() as folder:
        with (
            Workers(folder / "one", 1, sessions, messages) as one,
            Workers(folder / "all", processes, sessions, messages) as several,
        ):
            for number in range(rounds + 1):
                for name, workers in (("one", one), ("all", several)):
                    settle(quick=quick)
                    rate = workers.append()
                    if number:  # the first one was to warm up
                        rates[name].append(rate)
        for name, count in (("one", 1), ("all", processes)):
            asyncio.run(verify(folder / name, count, sessions, messages * (rounds + 1)))
    table = Table()
    table.compare(
        f"{processes} processes on one store", "messages/s", rates["all"], "one process alone", rates["one"], BAR
    )
    return Result(
        "processes",
        f"{processes} processes, each with {sessions} sessions that await their own appends; "
        "afterwards each message was read, once and in its order",
        table.rows,
        table.beyond,
        [],
        {f"{processes} processes": rates["all"], "one process": rates["one"]},
    )


class Workers:
    """Processes that hold one store open and append when they are told to."""

    def __init__(self, folder: Path, processes: int, sessions: int, messages: int, url: str = "") -> None:
        self._messages = processes * sessions * messages
        self._processes = []
        for number in range(processes):
            arguments = [str(folder), str(number), str(sessions), str(messages), url]
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", __name__, *arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            self._answer(self._processes[-1])  # it is ready: the next one finds the store and the user made

    def append(self) -> float:
        """Have all of them append at once; return the rate."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("append\n")
            process.stdin.flush()
        spans = [self._answer(process) for process in self._processes]
        return self._messages / (max(end for _, end in spans) - min(begin for begin, _ in spans))

    def _answer(self, process: subprocess.Popen[str]) -> tuple[float, float]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"A process of the benchmark ended with exit code {process.wait()}.")
        begin, end = json.loads(line)
        return begin, end

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            if process.wait() and kind is None:
                raise SystemExit(f"A process of the benchmark ended with exit code {process.returncode}.")


class _Worker(Ours):
    """Ours, with sessions of this process's own."""

    def __init__(self, folder: Path, number: int, sessions: int, url: str) -> None:
        super().__init__(folder, sessions, url=url)
        self._names = _names(number, sessions)


def _names(number: int, sessions: int) -> list[str]:
    return [f"process-{number}-session-{session}" for session in range(sessions)]


async def _work(folder: str, number: str, sessions: str, messages: str, url: str) -> None:
    worker = _Worker(Path(folder), int(number), int(sessions), url)
    await worker.create()
    print(json.dumps([0, 0]), flush=True)
    texts = Texts(int(number))
    said = 0
    while await asyncio.to_thread(sys.stdin.readline):
        # Numbered, so that whoever reads them can tell whether one is missing, doubled or not in its place.
        batch = [
            [f"{said + n} {text}" for n, text in enumerate(texts.take(int(messages)))] for _ in range(int(sessions))
        ]
        said += int(messages)
        began = time.monotonic()
        await worker.append_all(batch)
        print(json.dumps([began, time.monotonic()]), flush=True)
    await worker.close()


async def verify(folder: Path, processes: int, sessions: int, messages: int, url: str = "") -> None:
    """Read every message: each session holds its own, each once, in order."""
    async with StorageManager(configuration(folder, url=url), read_only=True) as storage:
        for number in range(processes):
            for name in _names(number, sessions):
                found = [message.content.partition(" ")[0] async for message in storage.stream_messages(USER, name)]
                if found[1:] != [str(n) for n in range(messages)]:
                    raise SystemExit(f"{name} holds other messages than were acknowledged.")


if __name__ == "__main__":
    asyncio.run(_work(*sys.argv[1:]))
