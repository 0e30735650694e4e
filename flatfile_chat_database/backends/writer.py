"""One writer thread for an open store: it takes the changes of one turn of an event loop together.

A call joins the batch of its loop's current turn; at the end of the turn the batch is handed over as a whole, for one
hand-over per call would make the threads fight for the interpreter. Only where calls have long come one at a time is
each handed over at once. While the thread works, further batches gather, and it takes all of them at once. Jobs are
done in the order they were handed over.

Where the work needs no lock of the interpreter, a large batch of callers who all wait is done in halves: while one half
is written, the callers of the other go on and make their next. From then on they take turns by themselves.

A job belongs to the writer once it is submitted: cancelling the caller cancels the waiting, not the write.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import msgspec

from ..errors import ClosedError, DurabilityError
from .changes import Outcome

logger = logging.getLogger("flatfile_chat_database")

_LARGEST_BATCH = 1024
_LONG = 8
"""So many turns with one call each are a habit."""
_HALVED = 64
"""So many calls of a turn are worth a flush more."""
_SOON_SECONDS = 0.001
"""In which the next batch comes if a caller waits for each; what else is due can wait as long."""


class Job(msgspec.Struct, eq=False):
    """The changes of one commit, and what came of them."""

    changes: Sequence[Any]
    """Those of the contract, and what else the backend makes of them."""
    outcomes: list[Outcome] | None = None
    error: Exception | None = None


class _Waiting(Job, kw_only=True, eq=False):
    """A job, and what its caller waits for."""

    future: asyncio.Future[list[Outcome]]


class _Caller:
    """An event loop whose calls gather."""

    __slots__ = ("began", "lonely", "loop", "unanswered", "waiting", "writing")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.waiting: list[_Waiting] = []
        """The calls of its current turn."""
        self.unanswered = 0
        """Calls that were handed over."""
        self.lonely = 0
        """In how many turns on end there was one call while none was unanswered."""
        self.began = 0.0
        """When the first call of its current turn came."""
        self.writing = math.inf
        """How many seconds it took to write what its last batch was in."""


class _Batch(NamedTuple):
    """Calls that are handed over together."""

    caller: _Caller
    waiting: list[_Waiting]
    is_half: bool = False
    """Whether the next one is the other half, which is not to join it."""


class Writer:
    """Hands jobs to a function in a thread of its own, which starts with the first job."""

    def __init__(
        self,
        run: Callable[[Sequence[Job]], None],
        idle: Callable[[], float | None],
        end: Callable[[], None],
        *,
        beside_loop: bool = False,
    ) -> None:
        """Do jobs with `run`, which fills in what came of each and raises nothing; do `end` after the last.

        When there are none, do `idle`, and again after as many seconds as it says. `beside_loop` says that `run` works
        for the most part without the interpreter's lock.
        """
        self._run = run
        self._idle = idle
        self._end = end
        self._beside_loop = beside_loop
        self._queue: SimpleQueue[_Batch | None] = SimpleQueue()
        self._callers: dict[asyncio.AbstractEventLoop, _Caller] = {}
        self._thread: threading.Thread | None = None
        self._state = threading.Lock()
        self._closed = False
        # The thread holds no reference to this object, so a store that is forgotten without `close` ends it too.
        self._finalizer = weakref.finalize(self, self._queue.put, None)

    def submit(self, changes: Sequence[Any]) -> asyncio.Future[list[Outcome]]:
        """Join the current turn's batch; the future has the outcomes once they are durable."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Outcome]] = loop.create_future()
        caller = self._callers.get(loop) or self._new_caller(loop)
        caller.waiting.append(_Waiting(changes, future=future))
        if len(caller.waiting) == 1:
            caller.began = time.perf_counter()
            if caller.lonely >= _LONG and not caller.unanswered:
                self._hand_over(caller)
            else:
                loop.call_soon(self._hand_over, caller)
        return future

    def _new_caller(self, loop: asyncio.AbstractEventLoop) -> _Caller:
        for other in list(self._callers):  # a copy: other threads add theirs
            if other.is_closed():
                self._callers.pop(other, None)
        caller = self._callers[loop] = _Caller(loop)
        return caller

    def close(self) -> None:
        """Do what was handed over, then end the thread. Blocks."""
        with self._state:
            self._closed = True
            self._finalizer()
        if self._thread is not None:
            self._thread.join()

    def _hand_over(self, caller: _Caller) -> None:
        waiting, caller.waiting = caller.waiting, []
        caller.lonely = caller.lonely + 1 if len(waiting) == 1 and not caller.unanswered else 0
        batches = self._batches(caller, waiting)
        caller.unanswered += len(waiting)
        try:
            with self._state:
                if self._closed:
                    raise ClosedError("The store is closed.", hint="Open a new StorageManager.")
                if not self._finalizer.alive:
                    raise ClosedError("The store cannot be written any more: the interpreter is ending.")
                if self._thread is None:
                    # A daemon: what nobody waits for any more must not keep the interpreter from ending.
                    thread = threading.Thread(
                        target=_work,
                        args=(self._queue, self._run, self._idle, self._end),
                        name="chatdb-writer",
                        daemon=True,
                    )
                    thread.start()
                    self._thread = thread
                for batch in batches:
                    self._queue.put(batch)
        except Exception as error:  # also when no thread can be started: everybody gets an answer
            for job in waiting:
                job.error = error
            _resolve(caller, waiting)

    def _batches(self, caller: _Caller, waiting: list[_Waiting]) -> list[_Batch]:
        """Return the calls of a turn as one batch, or as two halves.

        Two cost a flush more, and the loop and the disk do not wait for each other. That is no gain where a batch takes
        twice as long to be written as its calls took to come, for then most of it is waiting for the disk.
        """
        many = self._beside_loop and len(waiting) >= _HALVED and not caller.unanswered
        if not many or caller.writing > 2 * (time.perf_counter() - caller.began):
            return [_Batch(caller, waiting)]
        half = len(waiting) // 2
        return [_Batch(caller, waiting[:half], is_half=True), _Batch(caller, waiting[half:])]


def _work(
    queue: SimpleQueue[_Batch | None],
    run: Callable[[Sequence[Job]], None],
    idle: Callable[[], float | None],
    end: Callable[[], None],
) -> None:
    while True:
        batch = _next(queue, idle)
        batches: list[_Batch] = []
        size = 0
        ended = batch is None
        while batch is not None:
            batches.append(batch)
            size += len(batch.waiting)
            if size >= _LARGEST_BATCH or batch.is_half:
                break
            try:
                batch = queue.get_nowait()
            except Empty:
                break
            ended = batch is None
        if batches:
            jobs = batches[0].waiting if len(batches) == 1 else [job for each in batches for job in each.waiting]
            began = time.perf_counter()
            for start in range(0, len(jobs), _LARGEST_BATCH):
                _run_or_fail(run, jobs[start : start + _LARGEST_BATCH])
            seconds = time.perf_counter() - began
            for each in batches:
                each.caller.writing = seconds
                _answer(each.caller, each.waiting)
        if ended:
            end()
            return


def _next(queue: SimpleQueue[_Batch | None], idle: Callable[[], float | None]) -> _Batch | None:
    """Wait for what is handed over, and do what is due meanwhile."""
    with suppress(Empty):
        return queue.get(timeout=_SOON_SECONDS)
    while True:
        try:
            seconds = idle()
        except Exception:  # the thread has to live on, for others wait for it
            logger.exception("What the writer does when it has nothing to do failed")
            seconds = None
        try:
            return queue.get(timeout=seconds)
        except Empty:
            continue


def _run_or_fail(run: Callable[[Sequence[Job]], None], jobs: Sequence[Job]) -> None:
    """Do jobs; whatever happens every one of them ends, for its caller waits, and the thread goes on."""
    try:
        run(jobs)
    except BaseException as error:
        for job in jobs:
            job.outcomes = None
            job.error = job.error or DurabilityError(  # without its text, which may quote what was written
                f"The writer failed with {type(error).__name__}. {DurabilityError.__doc__}"
            )


def _answer(caller: _Caller, waiting: list[_Waiting]) -> None:
    # The loop is closed: nobody waits any more, and the jobs are done.
    with suppress(RuntimeError):
        caller.loop.call_soon_threadsafe(_resolve, caller, waiting)


def _resolve(caller: _Caller, waiting: list[_Waiting]) -> None:
    caller.unanswered -= len(waiting)
    for job in waiting:
        future = job.future
        if future.done():  # cancelled
            continue
        if job.error is not None:
            future.set_exception(job.error)
        else:
            future.set_result(job.outcomes or [])
