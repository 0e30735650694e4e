"""What every case of the contract suite stands on: handles on the backend, and a back door to its medium."""

from __future__ import annotations

import asyncio
import functools
import inspect
import multiprocessing
import os
import resource
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any, ClassVar, TypeVar

import pytest

from .. import codec
from ..backends.base import Capability, StorageBackend
from ..config import StorageConfig
from ..models import Message, Problem

T = TypeVar("T")
Case = TypeVar("Case", bound=Callable[..., object])

LOG = "users/ann/chat/messages.jsonl"
"""A log that cases use."""

_WHEN = "2026-01-31T12:00:00.000000+00:00"


def needs(*capabilities: Capability) -> Callable[[Case], Case]:
    """Skip a case where the backend does not declare all of these."""

    def note(case: Case) -> Case:
        case.__needs__ = needed_by(case) | set(capabilities)  # type: ignore[attr-defined]
        return case

    return note


def needed_by(case: object) -> set[Capability]:
    """Return the capabilities that a case needs."""
    return set(getattr(case, "__needs__", ()))


def leaves_damage(case: Case) -> Case:
    """Note that a case leaves its store damaged, so it is not verified afterwards."""
    case.__leaves_damage__ = True  # type: ignore[attr-defined]
    return case


class BackendCase(ABC):
    """The hooks that a backend's tests fill in, and how a case is run.

    A case is an async method; it is run in an event loop of its own, so the suite needs no pytest plugin. The instance
    is pickled into other processes: hold no open files in it.
    """

    capabilities: ClassVar[frozenset[Capability]]
    """What the backend declares. A case that needs another one is skipped, and no case for another reason."""

    @abstractmethod
    def make_backend(self, config: StorageConfig) -> StorageBackend:
        """Return a new handle, not yet opened, on the medium of this test; each test has a fresh medium."""

    @abstractmethod
    def peek(self, key: str) -> bytes | None:
        """Return the bytes at `key` from the medium itself, without the backend; None if there are none."""

    @abstractmethod
    def poke(self, key: str, data: bytes) -> None:
        """Put bytes at `key` on the medium itself, without the backend, while no handle is open."""

    @abstractmethod
    def peek_keys(self) -> list[str]:
        """Return all keys that the medium itself holds, without the backend's own files; in any order."""

    def is_untouched(self) -> bool:
        """Return whether nothing at all was made on the medium yet."""
        return not self.peek_keys()

    def break_folder(self, folder: str) -> bool:
        """Make everything at and below `folder`, which is absent, unreadable and unwritable.

        Return False if the medium is one that cannot fail, as memory is.
        """
        return False

    def hinder(self) -> bool:
        """Do to the medium, while no handle is open, what hinders a store from being read and written.

        Return False if there is no such thing.
        """
        return False

    # --- running a case ------------------------------------------------------------------------------

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        for name, member in list(vars(cls).items()):
            if name.startswith("test_") and inspect.iscoroutinefunction(member):
                setattr(cls, name, _runner(member))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_handles"}

    async def open(self, **overrides: Any) -> StorageBackend:
        """Return a new open handle, closed after the case; `overrides` are fields of its configuration."""
        handle = self.make_backend(StorageConfig(**overrides))
        self.opened.append(handle)
        await handle.open()
        return handle

    @property
    def opened(self) -> list[StorageBackend]:
        """The handles that were opened in this case."""
        handles: list[StorageBackend] = vars(self).setdefault("_handles", [])
        return handles

    def contents(self) -> dict[str, bytes | None]:
        """Return all that the medium holds, by the back door."""
        return {key: self.peek(key) for key in self.peek_keys()}

    async def run_case(self, case: Callable[..., Awaitable[None]], arguments: dict[str, Any]) -> None:
        """Run a case, close its handles, and look whether it left the store whole."""
        try:
            await case(self, **arguments)
        finally:
            for handle in self.opened:
                await handle.close()
        if not getattr(case, "__leaves_damage__", False):
            handle = self.make_backend(StorageConfig())
            await handle.open()
            try:
                assert await problems(handle) == []
            finally:
                await handle.close()


def _runner(case: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(case)
    def run(self: BackendCase, **arguments: Any) -> None:
        missing = sorted(needed_by(case) - self.capabilities)
        if missing:
            pytest.skip(f"{type(self).__name__} does not declare {', '.join(missing)}")
        try:
            asyncio.run(self.run_case(case, arguments))
        except pytest.skip.Exception as error:
            pytest.fail(f"a case may be skipped only for a capability that is not declared: {error}")

    return run


async def problems(backend: StorageBackend) -> list[Problem]:
    """Return what `verify` finds that is not harmless."""
    return [problem for problem in await backend.verify() if not problem.harmless]


# --- what cases are made of ------------------------------------------------------------------------------


def line(message_id: str, content: str = "", **fields: Any) -> bytes:
    """Return the line of a message, with its newline."""
    fields.setdefault("timestamp", _WHEN)
    return codec.encode_message(Message("user", content, id=message_id, **fields))


def lines(count: int, start: int = 0) -> tuple[bytes, ...]:
    """Return the lines of messages with the ids "m0", "m1", …"""
    return tuple(line(f"m{number}", f"message {number}") for number in range(start, start + count))


def bare(written: tuple[bytes, ...] | list[bytes]) -> list[bytes]:
    """Return lines as `read_log` does: without newlines."""
    return [each.removesuffix(b"\n") for each in written]


def ids(records: list[bytes]) -> list[str | None]:
    """Return the ids of lines."""
    return [codec.line_id(record) for record in records]


async def all_of(items: AsyncIterator[T]) -> list[T]:
    """Gather what an async iterator yields."""
    return [item async for item in items]


async def chunks(*pieces: bytes) -> AsyncIterator[bytes]:
    """Yield pieces of a blob."""
    for piece in pieces:
        yield piece


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let writes beyond this size of a file fail in this process, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- other processes -----------------------------------------------------------------------------------

Job = Callable[[BackendCase, StorageBackend, Connection], Awaitable[None]]


def fresh_processes() -> ForkServerContext:
    """Return what starts processes that have no threads, handles or files of this one.

    They are forked from one that has loaded the modules of all cases that this one knows, and done nothing with them:
    to load them anew takes a second. Their environment is the one that was there when this was used first.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(sorted({kind.__module__ for kind in _kinds(BackendCase)}))
    return context


def _kinds(kind: type[Any]) -> Iterator[type[Any]]:
    yield kind
    for narrower in kind.__subclasses__():
        yield from _kinds(narrower)


@contextmanager
def other_process(case: BackendCase, job: Job) -> Iterator[tuple[BaseProcess, Connection]]:
    """Run `job`, a function of a module, with a handle of its own in a new process; kill it if it does not end."""
    context = fresh_processes()
    here, there = context.Pipe()
    process = context.Process(target=_run_job, args=(case, job, there, dict(os.environ)))
    process.start()
    there.close()
    try:
        yield process, here
        process.join(60)
        assert process.exitcode is not None, "the other process does not end"
    finally:
        process.kill()
        process.join()
        here.close()
        process.close()


def _run_job(case: BackendCase, job: Job, there: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)

    async def run() -> None:
        handle = case.make_backend(StorageConfig())
        await handle.open()
        await job(case, handle, there)
        await handle.close()

    asyncio.run(run())
    there.close()
