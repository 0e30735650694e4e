"""Cases of the contract: opening and closing, several threads, several processes."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import random
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from multiprocessing.connection import Connection

import pytest

from ..backends.base import Capability, Snapshot, StorageBackend
from ..backends.changes import Append, Change, Delete, Move, Put, RemoveTree, Truncate
from ..config import StorageConfig
from ..errors import ClosedError, IntegrityError
from .case import (
    LOG,
    BackendCase,
    all_of,
    bare,
    chunks,
    ids,
    leaves_damage,
    line,
    lines,
    needs,
    other_process,
    problems,
)
from .commits import increment
from .documents import ON_KEYS
from .sentences import says

AFTER_CLOSING: dict[str, Callable[[StorageBackend, str], Awaitable[object]]] = {
    **ON_KEYS,
    "open": lambda backend, key: backend.open(),
    "list_keys": lambda backend, key: backend.list_keys(""),
    "list_children": lambda backend, key: backend.list_children(""),
    "list_folders": lambda backend, key: backend.list_folders(""),
    "changes": lambda store, key: store.changes(None),
    "wait_for_change": lambda store, key: store.wait_for_change([key], 60),
    "stamps": lambda store, key: store.stamps([key]),
    "read_log_part": lambda store, key: store.read_log_part(key, None, 0),
    "read_log_at": lambda store, key: store.read_log_at([(key, 0, 1)]),
    "read_folders": lambda backend, key: backend.read_folders("", "d", "l"),
    "commit": lambda backend, key: backend.commit([]),
    "load": lambda backend, key: backend.load([(key, b"x")]),
    "snapshot": lambda backend, key: _shown(backend.snapshot()),
    "still": lambda backend, key: _shown(backend.still()),
    "obstacles": lambda backend, key: backend.obstacles(),
    "verify": lambda backend, key: backend.verify(),
}
"""Every method that can raise ClosedError, by name."""

_EMPTYING: list[Callable[[str], Change]] = [
    lambda f: Delete(f"{f}/g/b"),
    lambda f: Move(f"{f}/g/b", f"kept/{f}"),
    lambda f: Move(f, f"moved/{f}"),
    RemoveTree,
]
"""Changes that leave nothing in the folder of a key."""
_FILLING: dict[str, Callable[[StorageBackend, str], Awaitable[object]]] = {
    "put": lambda store, f: store.commit([Put(f"{f}/g/b", b"new")]),
    "move": lambda store, f: store.commit([Move(f"new/{f}/b", f"{f}/g/b")]),
    "move the folder": lambda store, f: store.commit([Move(f"new/{f}", f"{f}/g")]),
    "append": lambda store, f: store.append(f"{f}/g/b", b"new\n"),
    "append a record": lambda store, f: store.commit([Append(f"{f}/g/b", (line("new"),))]),
    "write_blob": lambda store, f: store.write_blob(f"{f}/g/b", chunks(b"new")),
    "write": lambda store, f: store.write(f"{f}/g/b", b"new"),
    "load": lambda store, f: store.load([(f"{f}/g/{name}", b"new") for name in ("b", *map(str, range(40)))]),
}
"""Ways to have something at a key in that folder, by name."""


async def _shown(shown: AbstractAsyncContextManager[Snapshot]) -> list[list[str]]:
    async with shown as snapshot:
        return [run async for run in snapshot.keys()]  # noqa: SIM118 - no dictionary


class HandleCases(BackendCase):
    """Opening and closing, several threads, several processes."""

    # --- opening and closing ---------------------------------------------------------------------------

    @says("StorageBackend.__init__", "Remember the configuration; do no I/O.")
    @says("StorageBackend.open", "Creates nothing on the medium.")
    async def test_nothing_is_made_before_the_first_write(self) -> None:
        config = StorageConfig(jsonl_read_buffer_size=77)
        handle = self.make_backend(config)
        self.opened.append(handle)
        assert handle.config is config
        assert self.is_untouched()
        await handle.open()
        assert await handle.list_keys("") == []
        assert await handle.list_children("") == []
        assert await handle.list_folders("") == []
        assert await handle.read("a/b") is None
        assert await handle.read_log(LOG) == []
        assert await handle.verify() == []
        assert self.is_untouched()

    @says("StorageBackend.open", "Make ready for use.", "Calling it again does nothing.")
    async def test_opening_again_does_nothing(self) -> None:
        store = await self.open()
        await store.write("a/b", b"1")
        await store.open()
        await asyncio.gather(store.open(), store.open(), store.write("a/b", b"2"))
        assert await store.read("a/b") == b"2"

    @says("StorageBackend.close", "Finish what was begun and let go of every resource.")
    async def test_closing_finishes_what_was_begun(self) -> None:
        store = await self.open()
        tasks = [asyncio.ensure_future(store.commit([Append(LOG, (line(f"m{n}"),))])) for n in range(30)]
        await asyncio.sleep(0)
        await store.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        written = (self.peek(LOG) or b"").splitlines()
        for number, result in enumerate(results):
            if isinstance(result, BaseException):
                assert isinstance(result, ClosedError)
            assert (line(f"m{number}")[:-1] in written) is not isinstance(result, BaseException)
        assert all(not isinstance(result, BaseException) for result in results), "they were begun"

    @says("StorageBackend.close", "Calling it again does nothing.")
    async def test_closing_again_does_nothing(self) -> None:
        store = await self.open()
        await store.write("a/b", b"1")
        await store.close()
        await store.close()
        await asyncio.gather(store.close(), store.close())
        unopened = self.make_backend(StorageConfig())
        await unopened.close()
        assert self.peek("a/b") == b"1"

    @says(
        "StorageBackend.obstacles",
        "Return what hinders an open store from being read and written; repair it with `fix`.",
        "While there is any that is not fixed, every method that reads or writes raises IntegrityError.",
    )
    async def test_what_hinders_a_store_stops_it_until_it_is_repaired(self) -> None:
        store = await self.open()
        await store.write("a/b", b"1")
        assert await store.obstacles() == [] and await store.obstacles(fix=True) == []
        await store.close()
        hindered = self.hinder()
        store = await self.open()
        if hindered:
            [problem] = await store.obstacles()
            assert not problem.fixed and not problem.harmless
            for call in (lambda: store.read("a/b"), lambda: store.write("a/b", b"2"), lambda: store.list_keys("")):
                with pytest.raises(IntegrityError):
                    await call()
            [problem] = await store.obstacles(fix=True)
            assert problem.fixed
            assert await store.obstacles() == []
        assert await store.read("a/b") == b"1"
        assert await store.write("a/b", b"2")

    @says(
        "StorageBackend.close",
        "Where the backend overrides this, all methods but `statistics`, `index_folder`, `words` and `is_behind` then "
        "raise ClosedError.",
    )
    @pytest.mark.parametrize("call", AFTER_CLOSING.values(), ids=AFTER_CLOSING)
    async def test_nothing_is_answered_after_closing(
        self, call: Callable[[StorageBackend, str], Awaitable[object]]
    ) -> None:
        store = await self.open()
        await store.append("a/b", lines(1)[0])
        await store.close()
        if type(store).close is not StorageBackend.close:
            with pytest.raises(ClosedError):
                await call(store, "a/b")
            assert self.contents() == {"a/b": lines(1)[0]}
        assert isinstance(store.statistics(), dict)

    async def test_the_cases_above_call_every_method(self) -> None:
        public = {name for name in vars(StorageBackend) if not name.startswith("_")}
        assert public - AFTER_CLOSING.keys() == {
            *("close", "statistics", "capabilities", "index_folder", "words", "uncached", "is_behind", "origin")
        }

    @says(
        "StorageBackend.is_behind",
        "Return whether this is a replica, which shows later than another server what that one has.",
    )
    async def test_a_store_that_is_written_is_no_replica(self) -> None:
        store = await self.open()
        await store.write("a/b", b"1")
        assert await store.is_behind() is False

    @says(
        "StorageBackend.statistics", "Return counters since `open`, by name; which there are is the backend's choice."
    )
    async def test_statistics_are_counters(self) -> None:
        store = await self.open()
        before = store.statistics()
        await store.commit([Append(LOG, lines(5))])
        await store.read_log(LOG)
        after = store.statistics()
        assert before.keys() <= after.keys()
        assert all(value >= 0 for value in after.values())
        after.clear()
        assert store.statistics().keys() >= before.keys(), "a copy"

    @leaves_damage
    @says(
        "StorageBackend.verify",
        "Return what does not fit below the map: leftovers, half lines, foreign files; repair it with `fix`.",
        "Looks at the medium, not at the meaning of keys; `check.check` does that.",
    )
    async def test_what_verify_finds_it_repairs(self) -> None:
        config = StorageConfig()
        log = f"{config.user_data_directory_name}/ann/chat/{config.messages_filename}"
        half = b"".join(lines(2)) + b'{"id":"m2",'
        self.poke(log, half)
        self.poke(f"{config.user_data_directory_name}/ann/profile.json", b"not a document")
        store = await self.open()
        found = await store.verify()
        assert self.peek(log) == half, "looking changes nothing"
        if Capability.PERSISTENT in self.capabilities:
            assert log in [problem.key for problem in found]
        assert not any(problem.fixed for problem in found)
        for problem in await store.verify(fix=True):
            assert problem.fixed or problem.harmless
        assert await problems(store) == []
        assert await store.read_log(log) == bare(lines(2))
        assert await store.read(f"{config.user_data_directory_name}/ann/profile.json") == b"not a document"

    # --- threads and event loops -----------------------------------------------------------------------

    @says(
        "StorageBackend.commit",
        "No other commit comes between the check and the change, so reading, deciding and committing with a version "
        "loses no update.",
    )
    @says("StorageBackend.append", "Appends of several callers never mix.")
    async def test_several_threads_and_event_loops_may_share_a_handle(self) -> None:
        store = await self.open()

        async def work(thread: int) -> None:
            async def one(turn: int) -> None:
                await increment(store, "a/count")
                await store.commit([Append(LOG, (line(f"{thread}-{turn}"),))])
                await store.append("a/log", line(f"{thread}-{turn}"))
                await store.write(f"a/{thread}-{turn}", b"x")
                assert await store.read(f"a/{thread}-{turn}") == b"x"

            for turn in range(0, 10, 2):
                await asyncio.gather(one(turn), one(turn + 1))

        with ThreadPoolExecutor(4) as threads:
            others = [
                asyncio.get_running_loop().run_in_executor(threads, asyncio.run, work(thread)) for thread in range(4)
            ]
            await asyncio.gather(work(4), *others)
        assert self.peek("a/count") == b"50"
        expected = sorted(f"{thread}-{turn}" for thread in range(5) for turn in range(10))
        for key in (LOG, "a/log"):
            found = [str(name) for name in ids(await store.read_log(key, strict=True))]
            assert sorted(found) == expected
            for thread in range(5):
                mine = [int(name[2:]) // 2 for name in found if name.startswith(f"{thread}-")]
                assert mine == sorted(mine)

    @says("StorageBackend.commit", "Cancelling the caller never tears a commit: it happens wholly or not at all.")
    async def test_an_event_loop_that_ends_early_blocks_nobody(self) -> None:
        store = await self.open()

        async def leave() -> None:
            tasks = [asyncio.ensure_future(increment(store, "a/count")) for _ in range(5)]
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()

        with ThreadPoolExecutor(1) as thread:
            for _ in range(5):
                leaving = asyncio.get_running_loop().run_in_executor(thread, asyncio.run, leave())
                await asyncio.gather(leaving, *(increment(store, "b/count") for _ in range(5)))
        assert self.peek("b/count") == b"25"

    # --- what survives -------------------------------------------------------------------------------

    @needs(Capability.PERSISTENT)
    @says(
        "Capability.PERSISTENT",
        "What returned is there after `close` and a new `open`, and after the process was killed.",
    )
    @says(
        "StorageBackend.commit",
        "When this returns, everything in it survives whatever the backend's capabilities promise to survive.",
    )
    async def test_everything_is_there_after_reopening(self) -> None:
        store = await self.open()
        await store.write("a/b", b"1")
        await store.append("a/log", lines(1)[0])
        await store.write_blob("a/blob", chunks(b"x" * 100_000))
        await store.commit([Put("a/c", b"2"), Append(LOG, lines(5)), Append("a/log", lines(1, 1))])
        await store.commit([Truncate(LOG, 2)])
        await store.delete("a/b")
        before = self.contents()
        await store.close()
        assert self.contents() == before
        again = await self.open()
        assert await again.list_keys("") == sorted(before)
        assert await again.read("a/c") == b"2"
        assert await again.read_log(LOG) == bare(lines(3))
        assert await again.read_log("a/log") == bare(lines(2))
        assert b"".join(await all_of(again.read_blob("a/blob"))) == b"x" * 100_000
        assert await again.commit([Append(LOG, lines(4))]) == [1], "ids are known after reopening"

    @needs(Capability.PERSISTENT)
    @says(
        "Capability.PERSISTENT",
        "What returned is there after `close` and a new `open`, and after the process was killed.",
    )
    @says(
        "StorageBackend.commit",
        "When this returns, everything in it survives whatever the backend's capabilities promise to survive.",
    )
    async def test_what_a_killed_process_was_told_is_there(self) -> None:
        told = {"append": 0, "commit": 0, "put": 0}
        with other_process(self, _write_until_killed) as (process, there):
            deadline = time.monotonic() + random.uniform(0.1, 0.4)
            there.recv()
            with contextlib.suppress(EOFError):
                while time.monotonic() < deadline or min(told.values()) == 0:
                    kind, number = there.recv()
                    told[kind] = number
            process.kill()
            process.join()
            with contextlib.suppress(EOFError):
                while True:
                    kind, number = there.recv()
                    told[kind] = number
        store = await self.open()
        assert len(await store.read_log("a/append")) >= told["append"]
        assert await store.count_log("a/commit") >= told["commit"] * 3
        assert int(await store.read("a/put") or b"0") >= told["put"]
        assert await store.append("a/append", line("after"))
        await store.verify(fix=True)

    @needs(Capability.ATOMIC_APPEND, Capability.PERSISTENT)
    @says(
        "Capability.ATOMIC_APPEND",
        "The records of one Append are there all or none, also after the process was killed.",
    )
    @pytest.mark.parametrize("seed", range(4))
    async def test_a_killed_process_leaves_no_part_of_an_append(self, seed: int) -> None:
        with other_process(self, _append_until_killed) as (process, there):
            there.recv()
            time.sleep(random.Random(seed).uniform(0.02, 0.2))
            process.kill()
            process.join()
        store = await self.open()
        await store.commit([Append(LOG, (line("after"),))])
        found = [str(name) for name in ids(await store.read_log(LOG, strict=True))]
        assert found.pop() == "after"
        assert found == [f"{batch}-{part}" for batch in range(len(found) // 20) for part in range(20)]

    # --- processes -----------------------------------------------------------------------------------

    @needs(Capability.PROCESSES)
    @says(
        "Capability.PROCESSES",
        "Several processes may have the store open; conditions of a commit hold between all of them.",
    )
    async def test_processes_lose_nothing_of_each_other(self) -> None:
        with (
            other_process(self, _count_and_append) as (_, one),
            other_process(self, _count_and_append) as (_, other),
        ):
            for number, there in enumerate((one, other)):
                there.send(number)
            store = await self.open()
            for turn in range(20):
                await increment(store, "a/count")
                await store.commit([Append(LOG, (line(f"here-{turn}"),))])
                await store.append("a/log", line(f"here-{turn}"))
                await asyncio.sleep(0.002)
            await asyncio.to_thread(one.recv)
            await asyncio.to_thread(other.recv)
        assert self.peek("a/count") == b"100"
        for key in (LOG, "a/log"):
            found = [str(name) for name in ids(await store.read_log(key, strict=True))]
            for writer, count in (("here", 20), ("0", 40), ("1", 40)):
                assert [name for name in found if name.startswith(f"{writer}-")] == [
                    f"{writer}-{turn}" for turn in range(count)
                ]
        assert await store.count_log("a/shared") == 40, "the same message from two processes is there once"

    @needs(Capability.PROCESSES)
    @says(
        "Capability.PROCESSES",
        "Several processes may have the store open; conditions of a commit hold between all of them.",
    )
    async def test_a_handle_sees_what_another_process_wrote(self) -> None:
        store = await self.open()
        await store.commit([Put("a/b", b"here"), Append(LOG, lines(2))])
        assert await store.read_log(LOG) == bare(lines(2))
        with other_process(self, _change_everything) as (_, there):
            await asyncio.to_thread(there.recv)
        assert await store.read("a/b") == b"there"
        assert await store.read_log(LOG) == bare([lines(1)[0], line("there")])
        assert await store.count_log(LOG) == 2
        assert await store.commit([Append(LOG, (line("there"), line("here")))]) == [1]
        assert await store.list_keys("") == sorted(["a/b", "new/key", LOG])

    @needs(Capability.PROCESSES)
    @says(
        "Capability.PROCESSES",
        "Several processes may have the store open; conditions of a commit hold between all of them.",
    )
    @pytest.mark.parametrize("filling", _FILLING)
    async def test_a_place_that_another_handle_emptied_is_filled_again(self, filling: str) -> None:
        store, other = await self.open(), await self.open()
        for folder, emptying in zip("abcd", _EMPTYING, strict=True):
            await store.commit([Put(f"{folder}/g/b", b"old"), Put(f"new/{folder}/b", b"new")])
            await other.commit([emptying(folder)])
            await _FILLING[filling](store, folder)
            assert b"new" in (self.peek(f"{folder}/g/b") or b"")
            await store.commit([Put("after", folder.encode())])
            assert await other.exists(f"{folder}/g/b") and await other.read("after") == folder.encode()

    def test_a_case_can_go_to_another_process(self) -> None:
        if Capability.PERSISTENT in self.capabilities:
            assert type(pickle.loads(pickle.dumps(self))) is type(self)


# --- what the other processes do -------------------------------------------------------------------------


async def _write_until_killed(case: BackendCase, store: StorageBackend, there: Connection) -> None:
    there.send("ready")
    for number in range(1, 1_000_000):
        await store.append("a/append", line(f"m{number}", "x" * 1000))
        there.send(("append", number))
        await store.commit([Append("a/commit", tuple(line(f"{number}-{part}") for part in range(3)))])
        there.send(("commit", number))
        await store.write("a/put", str(number).encode())
        there.send(("put", number))


async def _append_until_killed(case: BackendCase, store: StorageBackend, there: Connection) -> None:
    await store.commit([Append(LOG, ())])
    there.send("ready")
    for batch in range(1_000_000):
        await store.commit([Append(LOG, tuple(line(f"{batch}-{part}", "x" * 20_000) for part in range(20)))])


async def _count_and_append(case: BackendCase, store: StorageBackend, there: Connection) -> None:
    me = there.recv()
    for turn in range(40):
        await increment(store, "a/count")
        await store.commit([Append(LOG, (line(f"{me}-{turn}"),)), Append("a/shared", (line(f"m{turn}"),))])
        await store.append("a/log", line(f"{me}-{turn}"))
    there.send("done")


async def _change_everything(case: BackendCase, store: StorageBackend, there: Connection) -> None:
    await store.commit([Put("a/b", b"there"), Put("new/key", b"there"), Truncate(LOG, 1)])
    await store.commit([Append(LOG, (line("there"),))])
    there.send("done")
