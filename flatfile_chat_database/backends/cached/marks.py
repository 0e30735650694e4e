"""Telling the cache what is going to be written, and what has been: all that comes at a time in one message."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, cast

import msgspec

from ...errors import StorageError
from ..changes import Outcome
from ..writer import Job, Writer
from .entries import CLEAR, MARK, MARK_MILLISECONDS, Names
from .roll import Word
from .server import Server, Unusable

_PATIENCE = 4
"""Times as long as a reader waits."""
_MOST_TOLD = 1000
"""Names in one message; more are told as "anything"."""
_MOST_MARKED = 256
"""Keys in one message, unless one write has more: while it does them, the server answers nobody."""


class Mark(msgspec.Struct):
    """What somebody writes."""

    word: Word
    names: Names
    scopes: list[str]
    touched: list[str]
    token: str
    ends: bool = False


class Marks:
    """Marks and clears in a thread of its own."""

    def __init__(self, server: Server, seconds: float) -> None:
        self._server = server
        self._seconds = _PATIENCE * seconds
        self._writer = Writer(self._run, lambda: None, lambda: None)
        self._start = os.urandom(6).hex()
        self._numbers = itertools.count()

    def mark(self, word: Word, touched: Sequence[str]) -> Mark:
        """Return the mark of a write of keys and folders."""
        names = Names(word.cache, word.opening)
        token = f"{self._start}{next(self._numbers)}"
        return Mark(word, names, names.scopes(touched), list(touched), token)

    async def begin(self, mark: Mark) -> bool:
        """Put a mark; return False if the cache could not be reached, and may have it or not."""
        return await self._tell(mark)

    async def end(self, mark: Mark) -> bool:
        """Drop what was marked, remove the mark and tell everybody; return False as `begin` does."""
        mark.ends = True
        return await self._tell(mark)

    async def _tell(self, mark: Mark) -> bool:
        if not self._server.is_up:
            return False
        future = self._writer.submit([mark])
        # The thread may have to connect first, which a server that hangs makes a matter of seconds.
        timer = asyncio.get_running_loop().call_later(2 * self._seconds, _give_up, future)
        try:
            return bool((await future)[0])
        except (StorageError, RuntimeError):  # it is closed, or there are no more threads
            return False
        finally:
            timer.cancel()

    def close(self) -> None:
        """Do what was asked for, and end; blocks."""
        self._writer.close()

    # --- in the thread -------------------------------------------------------------------------------

    def _run(self, jobs: Sequence[Job]) -> None:
        by_run: dict[str, list[Job]] = {}
        for job in jobs:
            job.outcomes = [False]
            by_run.setdefault(cast("Mark", job.changes[0]).word.server, []).append(job)
        for run, some in by_run.items():
            begun = [job for job in some if not job.changes[0].ends]
            ended = [job for job in some if job.changes[0].ends]
            _ = self._done(run, MARK, begun) and self._done(run, CLEAR, ended)

    def _done(self, run: str, script: str, jobs: Sequence[Job]) -> bool:
        """Do jobs in as few messages as the server should get; return whether all were done."""
        for some in _parts(jobs):
            if not self._call(run, script, some, [MARK_MILLISECONDS] if script is MARK else _news(some)):
                return False  # the others would wait in vain for what does not answer
            for job in some:
                job.outcomes = [True]
        return True

    def _call(self, run: str, script: str, jobs: Sequence[Job], arguments: list[Any]) -> bool:
        marks: list[Mark] = [job.changes[0] for job in jobs]
        keys = [key for mark in marks for key in mark.scopes]
        tokens = [mark.token for mark in marks for _ in mark.scopes]
        for last in (False, True):
            try:
                self._server.call(run, script, keys, arguments + tokens, self._seconds)
                return True
            except Unusable:  # a connection that the server has ended says no more than that
                if last or not self._server.look():
                    break
        return False


def _give_up(future: asyncio.Future[list[Outcome]]) -> None:
    if not future.done():
        future.set_result([False])


def _parts(jobs: Sequence[Job]) -> Iterator[Sequence[Job]]:
    """Yield jobs in parts that are for so many keys."""
    start = size = 0
    for at, job in enumerate(jobs):
        count = len(job.changes[0].scopes)
        if size and size + count > _MOST_MARKED:
            yield jobs[start:at]
            start, size = at, 0
        size += count
    if size:
        yield jobs[start:]


def _news(jobs: Sequence[Job]) -> list[Any]:
    """Return the channel and the message of what has changed."""
    told = sorted({name for job in jobs for name in job.changes[0].touched})
    channel = jobs[0].changes[0].names.channel
    return [channel, "\n".join(told) if len(told) <= _MOST_TOLD else ""]
