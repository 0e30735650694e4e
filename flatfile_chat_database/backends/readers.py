"""A few threads that do the blocking work of readers, each piece of it in one hop.

`ThreadPoolExecutor` with a loop's `run_in_executor` does the same with two futures, several locks and two more turns of
the loop, which takes longer than reading a page.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Awaitable, Callable
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from ..errors import ClosedError

T = TypeVar("T")

_Job = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Any]", Callable[[], Any]]


class InThread(Protocol):
    """Does blocking work in a thread."""

    def __call__(self, work: Callable[[], T]) -> Awaitable[T]: ...


class Readers:
    """Threads that start when there is work and none of them is free."""

    def __init__(self, most: int) -> None:
        """Start no more than `most` threads."""
        self._most = most
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._free: deque[None] = deque(maxlen=most)  # an entry for each thread that waits
        self._threads: list[threading.Thread] = []
        self._state = threading.Lock()
        # The threads hold no reference to this object, so a store that is forgotten without `close` ends them too.
        self._finalizer = weakref.finalize(self, self._queue.put, None)

    def run(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Do `work` in a thread; cancelling the future keeps it from being begun, but does not stop it.

        Raises:
            ClosedError: No thread works any more.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        with self._state:
            if not self._finalizer.alive:
                raise ClosedError("The store cannot be read any more: it is closed, or the interpreter is ending.")
            try:
                self._free.pop()
            except IndexError:
                if len(self._threads) < self._most:
                    self._start()
            self._queue.put((loop, future, work))
        return future

    def close(self) -> None:
        """Do what was handed over, then end the threads. Blocks."""
        with self._state:
            self._finalizer()
        for thread in self._threads:
            thread.join()

    def _start(self) -> None:
        # A daemon: what nobody waits for any more must not keep the interpreter from ending.
        name = f"chatdb-reader_{len(self._threads)}"
        thread = threading.Thread(target=_work, args=(self._queue, self._free), name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the interpreter is ending, and starts no thread any more
            if not self._threads:
                raise ClosedError(f"The store cannot be read any more: {error}.") from error
        else:
            self._threads.append(thread)


def _work(queue: SimpleQueue[_Job | None], free: deque[None]) -> None:
    while (job := queue.get()) is not None:
        _do(*job, free)
        del job  # while waiting for the next one, keep nothing of it
    queue.put(None)  # for the next thread


def _do(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], work: Callable[[], Any], free: deque[None]
) -> None:
    result: object = None
    problem: BaseException | None = None
    try:
        if not future.cancelled():
            result = work()
    except BaseException as error:  # it is the caller's, and the thread goes on
        problem = error
    free.append(None)  # first, so that a caller who goes on at once finds this thread
    try:
        loop.call_soon_threadsafe(_resolve, future, result, problem)
    except RuntimeError:  # the loop is closed: nobody waits any more
        return
    finally:
        del future, problem  # an error refers to this frame, which would wait for the garbage collector


def _resolve(future: asyncio.Future[Any], result: object, problem: BaseException | None) -> None:
    if future.done():  # cancelled
        return
    if problem is not None:
        future.set_exception(problem)
    else:
        future.set_result(result)
