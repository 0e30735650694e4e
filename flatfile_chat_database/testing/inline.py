"""The flat-file backend without threads and without an event loop: the same calls in the same order in every run.

with repeatable():
    store = open_flatfile(StorageConfig())(SimulatedFiles(Disk()))
    store.commit([...])
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar, cast

from .. import models
from ..backends.changes import Change, Outcome
from ..backends.flatfile.backend import FlatfileBackend
from ..backends.flatfile.jobs import EngineChange
from ..backends.readers import Readers
from ..backends.writer import Job
from ..config import StorageConfig
from ..layout import Layout, Place
from .histories import Contents
from .simulated import SimulatedFiles

T = TypeVar("T")

ROOT_FOLDER = "/data/store"
"""Where the store is on a simulated disk."""


# --- an event loop on which nothing waits ---------------------------------------------------------------


class _InlineLoop:
    """An event loop on which everything has happened already: work is done at once, and time passes at once."""

    def get_debug(self) -> bool:
        return False

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=_LOOP)

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        done: asyncio.Future[T] = asyncio.Future(loop=_LOOP)
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:
        callback(*args)
        return asyncio.Handle(callback, args, _LOOP)

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        callback(*args)
        return asyncio.TimerHandle(0.0, callback, args, _LOOP)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        return None


_LOOP = cast(asyncio.AbstractEventLoop, _InlineLoop())


def finish(work: Awaitable[T]) -> T:
    """Return what is waited for, all of which is done inline."""
    outer = asyncio._get_running_loop()  # another process may work in the middle of one's work
    asyncio._set_running_loop(_LOOP)
    try:
        next(work.__await__())
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        asyncio._set_running_loop(outer)
    raise RuntimeError("It waits for something that nobody does.")


class _InlineExecutor:
    """In place of a pool of threads: work is done when it is submitted."""

    def __init__(self, *_: object, **__: object) -> None:
        return None

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        done: Future[T] = Future()
        try:
            done.set_result(work(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done

    def shutdown(self, *_: object, **__: object) -> None:
        return None


class _InlineReaders:
    """In place of the threads that read: work is done when it is handed over."""

    def __init__(self, *_: object) -> None:
        return None

    def run(self, work: Callable[[], T]) -> asyncio.Future[T]:
        return _LOOP.run_in_executor(None, work)

    def close(self) -> None:
        return None


class _InlineThread:
    """In place of a thread: its work is done when it is started, or, if it is `late`, when somebody waits for it."""

    def __init__(self, target: Callable[..., object], args: tuple[object, ...], *, late: bool, **_: object) -> None:
        self._work: Callable[[], object] | None = lambda: target(*args)
        self._late = late

    def start(self) -> None:
        if not self._late:
            self.join()

    def is_alive(self) -> bool:
        return self._work is not None

    def join(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work()


class _Threading:
    """In place of the module."""

    def __init__(self, *, late: bool) -> None:
        self.Thread = functools.partial(_InlineThread, late=late)
        self.Lock = threading.Lock


@contextlib.contextmanager
def repeatable(first: int = 0, *, late: bool = False) -> Iterator[None]:
    """Let the backends start no threads, and take their unique ids (names of temporary files) from a counter.

    What a thread would do is done at once, or, when it is a long work and `late`, only when somebody waits for it.
    Making the map again for every store would take longer than all that is done with most stores, so they share it.
    """
    numbers = itertools.count(first)
    new: dict[str, object] = {
        "new_id": lambda: str(uuid.UUID(int=next(numbers))),
        "ThreadPoolExecutor": _InlineExecutor,
        "Readers": _InlineReaders,
        "Layout": _layout,
        "threading": _Threading(late=late),
    }
    for module, name, _ in _replaceable():
        setattr(module, name, new[name])
    try:
        yield
    finally:
        for module, name, original in _replaceable():
            setattr(module, name, original)


@functools.cache
def _replaceable() -> list[tuple[Any, str, object]]:
    """Return where the modules of the flat-file backend name what would differ between runs, and what they name."""
    originals: dict[str, object] = {
        "new_id": models.new_id,
        "ThreadPoolExecutor": ThreadPoolExecutor,
        "Readers": Readers,
        "Layout": Layout,
        "threading": threading,
    }
    return [
        (module, attribute, value)
        for name, module in sorted(sys.modules.items())
        if name.startswith(__package__.rpartition(".")[0] + ".backends")
        for attribute, value in vars(module).items()
        if originals.get(attribute) is value and value is not None
    ]


def _layout(config: StorageConfig) -> Layout:
    return _layout_of(_Same(config))


class _Same:
    """A configuration as a key: the same only as itself."""

    def __init__(self, config: StorageConfig) -> None:
        self.config = config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.config is self.config

    def __hash__(self) -> int:
        return id(self.config)


class _Map(Layout):
    """A map that remembers what keys stand for: thousands of stores have the same ones."""

    def __init__(self, config: StorageConfig) -> None:
        super().__init__(config)
        self._places: dict[str, Place | None] = {}

    def parse(self, key: str) -> Place | None:
        if key not in self._places:
            self._places[key] = super().parse(key)
        return self._places[key]


@functools.lru_cache(maxsize=64)
def _layout_of(same: _Same) -> Layout:
    return _Map(same.config)


# --- stores under test ---------------------------------------------------------------------------------


class Store(Protocol):
    """An open store, used by one process."""

    def commit(self, changes: Sequence[Change]) -> list[Outcome]:
        """Make changes as one."""

    def write_blob(self, key: str, data: bytes) -> None:
        """Write a blob."""

    def contents(self) -> Contents:
        """Return all keys that a user sees, with their bytes."""

    def quarantine(self) -> list[bytes]:
        """Return what was set aside."""

    def problems(self) -> list[str]:
        """Look at the whole store, finish and repair what an earlier process left, and return what is wrong still."""

    def close(self) -> None:
        """Finish and let go."""


OpenStore = Callable[[SimulatedFiles], Store]


class InlineBackend(FlatfileBackend):
    """A flat-file backend that writes in the caller's thread."""

    async def _commit(self, changes: Sequence[EngineChange]) -> list[Outcome]:
        job = Job(changes)
        self._engine.run([job])
        if job.error is not None:
            raise job.error
        return job.outcomes or []

    def close_now(self) -> None:
        """Finish and let go."""
        self._engine.close()


class FlatfileStore:
    """The flat-file backend, without threads and without an event loop."""

    def __init__(self, config: StorageConfig, files: SimulatedFiles, backend: type[InlineBackend]) -> None:
        self._layout = _layout(config)
        self._backend = backend(config, ROOT_FOLDER, files=files)
        self._disk = files.disk
        self._seen: tuple[int, Contents] | None = None
        finish(self._backend.open())

    def commit(self, changes: Sequence[Change]) -> list[Outcome]:
        return finish(self._backend.commit(changes))

    def write_blob(self, key: str, data: bytes) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            yield data

        finish(self._backend.write_blob(key, chunks()))

    def contents(self) -> Contents:
        found = self._all()
        aside = self._layout.folder("quarantine", item="x")
        return {key: data for key, data in found.items() if not key.startswith(f"{aside}/")}

    def quarantine(self) -> list[bytes]:
        aside = self._layout.folder("quarantine", item="x")
        return [data for key, data in self._all().items() if key.startswith(f"{aside}/") and key.endswith(".bin")]

    def _all(self) -> Contents:
        moment = len(self._disk.log)
        if self._seen is None or self._seen[0] != moment:
            self._seen = moment, self._read_all()
        return dict(self._seen[1])

    def _read_all(self) -> Contents:
        keys = finish(self._backend.list_keys(""))
        datas = finish(self._backend.read_many(keys))
        return {key: data for key, data in zip(keys, datas, strict=True) if data is not None}

    def problems(self) -> list[str]:
        found = finish(self._backend.verify(fix=True))
        return [f"{one.kind} {one.key}: {one.detail}" for one in found if not one.harmless and not one.fixed]

    def close(self) -> None:
        self._backend.close_now()


def open_flatfile(config: StorageConfig, backend: type[InlineBackend] = InlineBackend) -> OpenStore:
    """Return what opens a flat-file store on simulated files."""
    return lambda files: FlatfileStore(config, files, backend)
