"""Nodes of one store in S3 whose bucket is in memory, and how they meet at chosen requests."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import MemoryStore

from flatfile_chat_database.backends.s3 import S3Backend, appending, locking
from flatfile_chat_database.backends.s3.objects import Objects
from flatfile_chat_database.backends.s3.target import Target
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.errors import UnavailableError


def memory(patches: pytest.MonkeyPatch, folder: Path) -> MemoryStore:
    """Have all nodes of a test use one bucket in memory, and wait for nobody long; return it."""
    store = MemoryStore()
    patches.setenv("XDG_CACHE_HOME", str(folder))
    patches.setattr(Target, "client", lambda self, **_: store)
    patches.setattr(locking, "_PATIENCE_SECONDS", 0.1)
    patches.setattr(appending, "_SEALED_SECONDS", 0.1)
    return store


@asynccontextmanager
async def nodes(count: int, **settings: Any) -> AsyncIterator[list[S3Backend]]:
    """Open the store several times, as so many processes would."""
    opened = [S3Backend(StorageConfig(storage_url="s3://bucket/x", **settings)) for _ in range(count)]
    for each in opened:
        await each.open()
    try:
        yield opened
    finally:
        for each in opened:
            await each.close()


def paths(bucket: MemoryStore) -> list[str]:
    """Return the paths of all objects."""
    return sorted(str(each["path"]) for run in obstore.list(bucket) for each in run)


class Meeting:
    """Something that happens once, just before a node makes a request."""

    def __init__(self, patches: pytest.MonkeyPatch, node: S3Backend, method: str, words: str) -> None:
        self.happened = 0
        self._loop = asyncio.get_running_loop()
        self._action: Callable[[], Awaitable[object]] | None = None
        original = getattr(Objects, method)
        meeting = self

        def request(objects: Objects, path: Any, *arguments: Any, **more: Any) -> Any:
            asked = path if isinstance(path, str) else " ".join(path)
            if objects is node._objects and words in asked and meeting._action is not None:
                action, meeting._action = meeting._action, None
                meeting.happened += 1
                asyncio.run_coroutine_threadsafe(_done(action), meeting._loop).result(20)
            return original(objects, path, *arguments, **more)

        patches.setattr(Objects, method, request)

    def then(self, action: Callable[[], Awaitable[object]]) -> "Meeting":
        """Say what happens the next time."""
        self._action = action
        return self


async def _done(action: Callable[[], Awaitable[object]]) -> None:
    await action()


class Chaos:
    """Requests that take their time, fail, lose their answers, or end their node."""

    def __init__(self, patches: pytest.MonkeyPatch, seed: int) -> None:
        self.dead: set[Objects] = set()
        self.is_over = False
        self._dice = random.Random(seed)
        patches.setattr(Objects, "_pause", staticmethod(lambda attempt: time.sleep(0.002)))
        for method in ("_send", "delete", "delete_once", "get", "head"):
            patches.setattr(Objects, method, self._mad(getattr(Objects, method), writes=method == "_send"))

    def _mad(self, original: Any, *, writes: bool) -> Any:
        def request(objects: Objects, *arguments: Any, **more: Any) -> Any:
            number = 1.0 if self.is_over else self._dice.random()
            if objects in self.dead:
                raise UnavailableError("dead")
            if number < 0.3:
                time.sleep(0.01 * number)
            if number < 0.001:
                self.dead.add(objects)
                raise UnavailableError("dead")
            if writes and 0.3 < number < 0.31:
                raise OSError("operation timed out")
            if not writes and 0.3 < number < 0.302:
                raise UnavailableError("away")
            made = original(objects, *arguments, **more)
            if writes and 0.31 < number < 0.32:
                raise OSError("operation timed out")
            return made

        return request


async def check_whole(store: S3Backend) -> None:
    """Fail if something is wrong with a store."""
    assert [problem for problem in await store.verify() if not problem.harmless] == []
