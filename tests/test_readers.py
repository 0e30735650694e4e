"""The threads that read: handing over, cancelling, ending."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest

from flatfile_chat_database.backends.readers import Readers
from flatfile_chat_database.errors import ClosedError

SECONDS = 30


def running() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("chatdb-reader")}


def within_seconds(holds: Callable[[], bool]) -> bool:
    for _ in range(SECONDS * 100):
        if holds():
            return True
        threading.Event().wait(0.01)
    return False


async def test_work_is_done_in_a_thread_and_its_result_or_error_comes_back() -> None:
    readers = Readers(4)
    assert await readers.run(threading.current_thread) is not threading.current_thread()

    def refuse() -> None:
        raise OSError("no such thing")

    for _ in range(3):
        with pytest.raises(OSError, match="no such thing"):
            await readers.run(refuse)
    assert await readers.run(lambda: 1) == 1
    await asyncio.to_thread(readers.close)


async def test_one_caller_after_the_other_uses_one_thread_and_many_use_as_many_as_there_may_be() -> None:
    readers = Readers(4)
    assert len({await readers.run(threading.get_ident) for _ in range(50)}) == 1
    meeting = threading.Barrier(4)

    def meet() -> int:
        meeting.wait(SECONDS)
        return threading.get_ident()

    assert len(set(await asyncio.gather(*(readers.run(meet) for _ in range(4))))) == 4
    assert len(set(await asyncio.gather(*(readers.run(threading.get_ident) for _ in range(100))))) <= 4
    await asyncio.to_thread(readers.close)


async def test_what_is_cancelled_before_it_begins_is_not_done() -> None:
    readers = Readers(1)
    go = threading.Event()
    done: list[int] = []
    first = readers.run(lambda: go.wait(SECONDS))
    second, third = (readers.run(partial(done.append, number)) for number in (2, 3))
    second.cancel()
    go.set()
    await third
    assert await first and done == [3]
    await asyncio.to_thread(readers.close)


async def test_closing_does_what_was_handed_over_and_ends_the_threads() -> None:
    before = running()
    readers = Readers(2)
    done: list[int] = []
    waiting = [readers.run(partial(done.append, number)) for number in range(100)]
    await asyncio.to_thread(readers.close)
    assert sorted(done) == list(range(100)) and running() == before
    await asyncio.gather(*waiting)
    with pytest.raises(ClosedError):
        await readers.run(lambda: 1)
    await asyncio.to_thread(readers.close)


def test_threads_of_readers_that_are_forgotten_end() -> None:
    before = running()

    async def use() -> None:
        await Readers(2).run(lambda: 1)

    asyncio.run(use())
    gc.collect()
    assert within_seconds(lambda: running() <= before)


def test_a_loop_that_ended_before_the_work_did_keeps_no_thread_from_going_on() -> None:
    readers = Readers(1)
    go = threading.Event()
    left: list[asyncio.Future[bool]] = []

    async def leave() -> None:
        left.append(readers.run(lambda: go.wait(SECONDS)))

    async def come() -> int:
        return await readers.run(lambda: 1)

    asyncio.run(leave())
    go.set()
    assert asyncio.run(come()) == 1
    readers.close()


async def test_a_thread_that_cannot_be_started_is_done_without_unless_it_is_the_only_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    readers, none = Readers(4), Readers(4)
    await readers.run(lambda: 1)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        assert await asyncio.gather(*(readers.run(lambda: 1) for _ in range(10))) == [1] * 10
        with pytest.raises(ClosedError, match="can't start new thread"):
            await none.run(lambda: 1)
    assert await none.run(lambda: 1) == 1
    await asyncio.to_thread(readers.close)
    await asyncio.to_thread(none.close)


async def test_nothing_of_a_result_or_an_error_is_kept() -> None:
    class Thing:
        """Something that a weak reference can point to."""

    readers = Readers(1)
    thing = await readers.run(Thing)
    reference = weakref.ref(thing)

    def refuse() -> None:
        own = Thing()
        references.append(weakref.ref(own))
        raise OSError("refused")

    references = [reference]
    del thing
    gc.disable()  # a cycle would be found
    try:
        with suppress(OSError):
            await readers.run(refuse)
        for _ in range(500):
            if all(kept() is None for kept in references):
                return
            await asyncio.sleep(0.01)
        pytest.fail("something is kept")
    finally:
        gc.enable()
        await asyncio.to_thread(readers.close)
