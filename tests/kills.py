"""A process that writes messages and is killed, again and again; what it acknowledged must be there.

`run` is used by the test suite and, with larger numbers, by `tests.soak`.
"""

import asyncio
import hashlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from flatfile_chat_database import Message, StorageConfig, StorageManager
from flatfile_chat_database.backends.flatfile import FlatfileBackend
from flatfile_chat_database.backends.flatfile.files import Files
from flatfile_chat_database.backends.flatfile.lock import Mark
from flatfile_chat_database.check import check
from flatfile_chat_database.testing.case import fresh_processes

from . import s3

SESSIONS = 12
CYCLES_PER_STORE = 10


@dataclass
class Report:
    """What a run saw; `problems` must be empty."""

    kills: int = 0
    acknowledged: int = 0
    torn_tails: int = 0
    unfinished_batches: int = 0
    largest: int = 0
    problems: list[str] | None = None

    def __str__(self) -> str:
        return (
            f"{self.kills} kills, {self.acknowledged:,} acknowledged messages of up to {self.largest:,} bytes, "
            f"{self.torn_tails} torn tails and {self.unfinished_batches} unfinished batches seen, "
            f"{len(self.problems or [])} problems"
        )


def config(folder: Path, kind: str, durability: str = "full") -> StorageConfig:
    if kind == "sqlite":
        return StorageConfig(storage_url=f"sqlite:{folder}/chats.sqlite3")
    if kind.startswith("s3:"):
        s3.let_in()
        return StorageConfig(storage_url=kind.replace("STORE", folder.name), search_index_path=str(folder / "index"))
    return StorageConfig(storage_base_path=str(folder), durability=durability, journal_max_bytes=4_000_000)


def content(message_id: str) -> str:
    """Return the content that belongs to an id: its last part is the size."""
    size = int(message_id.rpartition("-")[2])
    seed = hashlib.sha256(message_id.encode()).hexdigest()
    return (seed * (size // len(seed) + 1))[:size]


def size_of_next(dice: random.Random, *, tearing: bool) -> int:
    """Draw a size from 100 bytes to 200 KB: mostly small, as in real chats, or mostly large."""
    large = dice.random() < (0.8 if tearing else 0.02)
    return dice.randint(9_000, 200_000) if large else dice.randint(100, 1_500)


def is_tearing(cycle: int) -> bool:
    return cycle % 2 == 1


class Unsynced(Files):
    """System calls that do not wait for the disk."""

    def sync(self, descriptor: int) -> None:
        self.count("syncs")

    def sync_folder(self, path: str) -> None:
        self.count("syncs")


def write_until_killed(folder: str, cycle: int, seed: int, pipe: int, kind: str, durability: str) -> None:
    """Write messages to all sessions at once; tell the pipe the id of each that was acknowledged.

    Every second cycle is for tearing: large messages and batches, and no waiting for the disk, for a kill, other than
    a power cut, takes nothing from the system's cache; and the kill comes when a log is seen to end in half a line.
    """
    tearing = is_tearing(cycle)

    async def write(storage: StorageManager, session: int) -> None:
        dice = random.Random(f"{seed}-{session}")
        for number in range(1_000_000):
            batch = dice.choice([1, 1, 10]) if tearing else dice.choice([1, 1, 1, 1, 1, 1, 1, 1, 1, 3])
            sizes = [size_of_next(dice, tearing=tearing) for _ in range(batch)]
            ids = [f"{cycle}-{session}-{number}.{part}.{batch}-{size}" for part, size in enumerate(sizes)]
            await storage.add_messages("ada", f"s{session}", [Message("user", content(i), id=i) for i in ids])
            os.write(pipe, "".join(f"{i}\n" for i in ids).encode())

    async def main() -> None:
        settings = config(Path(folder), kind, durability)
        backend = None
        if kind == "files":
            backend = FlatfileBackend(settings, folder, files=Unsynced() if tearing else Files())
        storage = StorageManager(settings, backend=backend)
        await asyncio.gather(*(write(storage, session) for session in range(SESSIONS)))

    asyncio.run(main())


def run(
    folder: Path, *, kills: int, seed: int, each: int = 650, kind: str = "files", durability: str = "full"
) -> Report:
    """Kill a writer `kills` times and look each time whether all that it acknowledged is there.

    `kind` is "files", "sqlite", or a URL of S3 with STORE in it.

    Each kill comes after a number of acknowledgements that is drawn, `each` on average and a fifth where messages are
    large: what is proved does not depend on the speed of the machine.
    """
    report = Report(problems=[])
    dice = random.Random(seed)
    starting = fresh_processes()
    for first in range(0, kills, CYCLES_PER_STORE):
        store = folder / f"store{first}"
        asyncio.run(_prepare(store, kind))
        acknowledged: list[str] = []
        for cycle in range(first, min(first + CYCLES_PER_STORE, kills)):
            reading, writing = os.pipe()
            os.set_inheritable(writing, True)
            process = starting.Process(
                target=_child, args=(str(store), cycle, dice.randrange(1 << 30), _Handle(writing), kind, durability)
            )
            process.start()
            os.close(writing)
            logs = list(store.glob("users/ada/*/messages.jsonl")) if is_tearing(cycle) else []
            least = dice.randint(1, 2 * each // (5 if is_tearing(cycle) else 1))
            acknowledged += _collect(reading, process.pid or 0, least, dice.uniform(0, 0.01), logs)
            process.join()
            report.kills += 1
            torn = [path for path in store.glob("users/ada/*/messages.jsonl") if _ends_in_half(path)]
            report.torn_tails += len(torn)
            report.unfinished_batches += kind == "files" and _has_unfinished(store)
        report.acknowledged += len(acknowledged)
        report.largest = max([report.largest, *(int(i.rpartition("-")[2]) for i in acknowledged)])
        asyncio.run(_verify(store, kind, acknowledged, report))
        shutil.rmtree(store, ignore_errors=True)
    return report


def _has_unfinished(store: Path) -> bool:
    """Tell whether the journal has something that was not done to the files, whole or not."""
    mark = Mark.decode((store / "system/lock").read_bytes())
    for segment in store.glob("system/journal/0*.jsonl"):
        data = segment.read_bytes()
        if mark is not None and f'"{mark.segment}"'.encode() in data[:200]:
            return data[mark.applied : mark.applied + 1] not in (b"", b"\0")
    return False


class _Handle:
    """A descriptor that travels to a process as multiprocessing sends it."""

    def __init__(self, descriptor: int) -> None:
        from multiprocessing import reduction

        self._sent = reduction.DupFd(descriptor)

    def take(self) -> int:
        return int(self._sent.detach())


def _child(folder: str, cycle: int, seed: int, pipe: _Handle, kind: str, durability: str) -> None:
    write_until_killed(folder, cycle, seed, pipe.take(), kind, durability)


def _collect(reading: int, process: int, least: int, seconds: float, logs: list[Path]) -> list[str]:
    """Read acknowledgements; kill the process some time after there are `least`; return them all.

    If `logs` are given the kill waits for the moment that one of them ends in half a line, but not for ever.
    """
    text = b""
    count = 0
    deadline = None
    killed = False
    os.set_blocking(reading, False)
    while True:
        try:
            piece = os.read(reading, 1 << 16)
            if not piece:
                break
            text += piece
            count += piece.count(b"\n")
            if deadline is None and count >= least:
                deadline = time.monotonic() + seconds
        except BlockingIOError:
            if deadline is None or killed or time.monotonic() < deadline:
                time.sleep(0.0005)
        if not killed and deadline is not None and time.monotonic() >= deadline:
            torn = not logs or time.monotonic() >= deadline + 1 or any(_ends_in_half(path) for path in logs)
            if torn:
                os.kill(process, signal.SIGKILL)
                killed = True
    os.close(reading)
    # An acknowledgement is written whole or, if the process died there, not read as one.
    return text.decode().split("\n")[:-1]


async def _prepare(store: Path, kind: str) -> None:
    async with StorageManager(config(store, kind)) as storage:
        await storage.create_user("ada")
        for session in range(SESSIONS):
            await storage.create_session("ada", session_id=f"s{session}")


async def _verify(store: Path, kind: str, acknowledged: list[str], report: Report) -> None:
    problems = report.problems if report.problems is not None else []
    async with StorageManager(config(store, kind)) as storage:
        for session in range(SESSIONS):  # the next write mends what the dead left
            await storage.add_message("ada", f"s{session}", Message("user", "mended", id=f"mend-{session}"))
        found: Counter[str] = Counter()
        batches: Counter[tuple[int, int, int, int]] = Counter()
        for session in range(SESSIONS):
            last = (-1, -1, -1)
            async for message in storage.stream_messages("ada", f"s{session}", strict=True):
                if message.id.startswith("mend-"):
                    continue
                found[message.id] += 1
                if message.content != content(message.id):
                    problems.append(f"{message.id} has other content")
                cycle, _, place, _ = message.id.split("-")
                number, part, batch = map(int, place.split("."))
                order = (int(cycle), number, part)
                if order <= last:
                    problems.append(f"{message.id} is out of order")
                last = order
                batches[int(cycle), session, number, batch] += 1
        problems += [
            f"only {count} messages of the batch {batch}" for batch, count in batches.items() if count != batch[3]
        ]
        problems += [f"{i} was acknowledged and is lost" for i in acknowledged if not found[i]]
        problems += [f"{i} is there {count} times" for i, count in found.items() if count > 1]
        result = await check(storage.backend)
        if not result.clean:
            problems.append(str(result))


def _ends_in_half(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return False
        file.seek(size - 1)
        return file.read(1) != b"\n"
