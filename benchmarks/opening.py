"""Opening a store of 1,000 users with 100 sessions each, and reading one page."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

from flatfile_chat_database import StorageManager

from .corpus import Texts
from .machine import work_folder
from .ours import configuration, create_many_sessions
from .result import Bar, Result, Table
from .rounds import ROUNDS, settle

USERS, SESSIONS, MESSAGES = 1_000, 100, 10
ROUNDS_IN_ALL = 4 * ROUNDS  # one is a few milliseconds, and each opens other sessions

FAST = Bar(most=50)
NO_SCAN = Bar(most=0)


def run(*, quick: bool) -> Result:
    """Measure milliseconds from the call of StorageManager to the messages, and count the folders that were listed."""
    users, sessions, rounds = (5, 4, 2) if quick else (USERS, SESSIONS, ROUNDS_IN_ALL)
    with work_folder() as folder:
        config = configuration(folder)
        asyncio.run(_create(folder))
        create_many_sessions(folder, config, users, sessions, Texts().take(MESSAGES))
        watch = _Watch(folder / config.user_data_directory_name)
        times, listed = [], []
        settle(quick=quick)  # once: what is read stays as it is, and to sync so many files takes long
        for number in range(rounds + 1):
            user, session = number * 7919 % users, number * 31 % sessions
            watch.listed = 0
            milliseconds = asyncio.run(_open(folder, f"user-{user}", f"session-{session}"))
            if number:  # the first one was to warm up
                times.append(milliseconds)
                listed.append(float(watch.listed))
        watch.stop()
    table = Table()
    what = f"opening {users:,} × {sessions:,} sessions and reading a page"
    table.measure(what, "ms", times, FAST)
    table.measure("folders of users that were listed meanwhile", "folders", listed, NO_SCAN)
    return Result(
        "opening",
        f"a store of {users * sessions:,} sessions, closed before; its first page in a process that has opened others",
        table.rows,
        table.beyond,
        [],
        {"milliseconds": times, "folders listed": listed},
    )


async def _create(folder: Path) -> None:
    async with StorageManager(configuration(folder)) as storage:
        await storage.create_user("first")


async def _open(folder: Path, user: str, session: str) -> float:
    began = time.perf_counter()
    async with StorageManager(configuration(folder)) as storage:
        messages = await storage.get_messages(user, session)
        ended = time.perf_counter()
    if len(messages) != MESSAGES:
        raise SystemExit(f"{session} of {user} has {len(messages)} messages instead of {MESSAGES}.")
    return (ended - began) * 1000


class _Watch:
    """Counts the folders below one that Python lists, in whatever thread."""

    def __init__(self, folder: Path) -> None:
        self.listed = 0
        self._folder = os.path.realpath(folder)
        self._is_on = True
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if self._is_on and event in ("os.listdir", "os.scandir"):
            place = arguments[0]
            if isinstance(place, str) and os.path.realpath(place).startswith(self._folder):
                self.listed += 1

    def stop(self) -> None:
        """Count no more; Python cannot remove a hook."""
        self._is_on = False
