"""Several processes and threads on one store, and processes that are killed."""

import asyncio
import threading
from pathlib import Path

import pytest

from flatfile_chat_database import Message, StorageConfig, StorageManager
from flatfile_chat_database.testing.case import fresh_processes

from . import kills

PROCESSES, THREADS, SESSIONS, EACH = 8, 4, 20, 1250  # 40,000 messages


def config(place: str) -> StorageConfig:
    """Have each of the many wait its turn, however long a busy machine lets it wait; `place` is a folder or a URL."""
    named = {"storage_url": place} if place.startswith("sqlite:") else {"storage_base_path": place}
    return StorageConfig(**named, lock_timeout_seconds=120)  # type: ignore[arg-type]


def append_from_threads(place: str, process: int, each: int) -> None:
    """Append `each` messages from each of four threads, every thread with an event loop of its own."""
    storage = StorageManager(config(place))

    async def append(thread: int) -> None:
        writer = f"{process}.{thread}"
        for start in range(0, each, 10):
            await asyncio.gather(
                *(
                    storage.add_message(
                        "ada", f"s{number % SESSIONS}", Message("user", "text", id=f"{writer}-{number}")
                    )
                    for number in range(start, min(start + 10, each))
                )
            )

    threads = [threading.Thread(target=lambda t=t: asyncio.run(append(t))) for t in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asyncio.run(storage.close())


async def prepare(place: str) -> StorageManager:
    storage = StorageManager(config(place))
    await storage.create_user("ada")
    for session in range(SESSIONS):
        await storage.create_session("ada", session_id=f"s{session}")
    return storage


async def every_message_is_there_in_its_writers_order(storage: StorageManager, each: int) -> int:
    total = 0
    last: dict[tuple[str, int], int] = {}
    for session in range(SESSIONS):
        async for message in storage.stream_messages("ada", f"s{session}", strict=True):
            writer, _, number = message.id.partition("-")
            assert int(number) % SESSIONS == session
            assert last.get((writer, session), -1) < int(number), f"{message.id} is out of order"
            last[writer, session] = int(number)
            total += 1
    assert len({writer for writer, _ in last}) == PROCESSES * THREADS
    assert total == PROCESSES * THREADS * each
    return total


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_8_processes_of_4_threads_append_40000_messages_and_none_is_lost_or_out_of_order(tmp_path: Path) -> None:
    await append_from_all(f"{tmp_path}/files", EACH)


async def test_8_processes_of_4_threads_append_1600_messages_and_none_is_lost_or_out_of_order(tmp_path: Path) -> None:
    await append_from_all(f"{tmp_path}/files", 50)


@pytest.mark.slow
async def test_8_processes_of_4_threads_append_6400_messages_to_sqlite_and_none_is_lost_or_out_of_order(
    tmp_path: Path,
) -> None:
    await append_from_all(f"sqlite:{tmp_path}/chats.sqlite3", 200)  # so many that they are moved to their places


async def append_from_all(place: str, each: int) -> None:
    storage = await prepare(place)
    starting = fresh_processes()
    processes = [
        starting.Process(target=append_from_threads, args=(place, process, each)) for process in range(PROCESSES)
    ]
    for process in processes:
        await asyncio.to_thread(process.start)
    for process in processes:
        await asyncio.to_thread(process.join)
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    await every_message_is_there_in_its_writers_order(storage, each)
    await storage.close()


@pytest.mark.slow
def test_20_kills_of_a_writing_process_lose_no_acknowledged_message(tmp_path: Path) -> None:
    report = kills.run(tmp_path, kills=20, seed=1, each=100)
    assert report.problems == [], report
    assert report.kills == 20 and report.acknowledged > 500, report


@pytest.mark.parametrize(
    ("count", "each", "seed"), [(5, 100, 4), pytest.param(15, 650, 5, marks=[pytest.mark.slow])], ids=["5", "15"]
)
def test_kills_of_a_process_that_writes_sqlite_lose_no_acknowledged_message(
    tmp_path: Path, count: int, each: int, seed: int
) -> None:
    report = kills.run(tmp_path, kills=count, seed=seed, each=each, kind="sqlite")
    print(report)
    assert report.problems == [], report
    assert report.kills == count and report.acknowledged >= count * each // 4, report


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("durability", "count", "seed"), [("full", 60, 2), ("normal", 30, 3)])
def test_many_kills_of_a_writing_process_lose_no_acknowledged_message(
    tmp_path: Path, durability: str, count: int, seed: int
) -> None:
    report = kills.run(tmp_path, kills=count, seed=seed, durability=durability)
    print(report)
    assert report.problems == [], report
    assert report.kills == count and report.acknowledged >= 330 * count and report.torn_tails >= count // 10, report
