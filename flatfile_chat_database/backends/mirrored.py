"""Two stores at once, for a change of backend while the application goes on.

Everything is read from the first store and written to it; its answer is the caller's. What was written is then copied
to the second store, in a thread of its own: so that one may be slow or down, and nobody waits for it. Which keys it may
lack is recorded in the first store before they change (`behind.py`), so whoever finds such a record after a death goes
on with it. Which store is the first one is told by the stores themselves (`sides.py`); to switch and to fall back is
the same step, once in each direction. Why nothing is lost by that says `carrier.py`.

A store that is mirrored for the first time has everything recorded as lacking: that copies what was there before.
Every change of the first store is a commit that requires it to be open, or is marked as being under way, and waited for
before a switch looks at anything: once it is closed, it stays as it is.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from ..config import StorageConfig
from ..errors import (
    ClosedError,
    ConfigurationError,
    ConflictError,
    DurabilityError,
    IntegrityError,
    NotFoundError,
    StorageError,
    UnavailableError,
)
from ..layout import Layout
from ..models import Problem
from .base import Changes, LogPart, Snapshot, StorageBackend
from .behind import Behind, Record, removal, requirements, touched
from .carrier import Carrier
from .changes import Change, Delete, Move, Outcome, Put, RemoveTree, Require
from .comparison import Comparison, compared
from .copying import LOOK_SECONDS, Copying
from .rules import check_change, check_key, check_lines
from .shown import Shown, ended
from .sides import Sides, State, unreachable
from .turn import to_the_end
from .writers import Writers

T = TypeVar("T")


@dataclass(slots=True)
class MirrorStatus:
    """How two stores stand."""

    first: int
    """Which is read from: 0 for `from`, 1 for `to`."""
    epoch: int
    """Grows with each switch; 0 before anything was written."""
    phase: str
    records: int
    """Documents that say what the second store may lack, of every process."""
    behind: int
    """Keys and folders named in them."""
    problem: str = ""
    """Why the second store cannot be used now."""


class MirroredBackend(StorageBackend):
    """Two backends as one."""

    def __init__(self, config: StorageConfig, old: StorageBackend, new: StorageBackend) -> None:
        """Begin with `old` as the first store."""
        super().__init__(config)
        self.capabilities = old.capabilities & new.capabilities
        self.layout = Layout(config)
        self._sides = Sides(self.layout, (old, new))
        self._first = 0
        self._origin = ""
        self._state: State | None = None
        self._looked = -LOOK_SECONDS
        self._writers = Writers(self.layout.mirror_writers)
        self.behind = Behind(self._writers.records)
        self._state_lock = threading.Lock()
        self._worker: Copying | None = None
        self._closed = False
        self._under_way = 0
        self._uploads = 0
        self._idle = threading.Condition(self._state_lock)
        self.problem = ""
        """Why the second store cannot be used now."""

    def __repr__(self) -> str:
        one, other = self._sides.stores
        return f"<MirroredBackend {one!r} {other!r} first={self._first}{' closed' if self._closed else ''}>"

    # --- life ----------------------------------------------------------------------------------------

    async def open(self) -> None:
        if self._closed:
            raise ClosedError("The store is closed.", hint="Open a new StorageManager.")
        if self._looked < 0:
            try:
                await self.look()
            except IntegrityError:  # every other method says so, and `obstacles` mends it
                self._looked = time.monotonic()
            await self.first.open()

    async def close(self) -> None:
        with self._state_lock:
            self._closed, worker, self._worker = True, self._worker, None
        await asyncio.to_thread(self._finish, worker)
        for store in self._sides.stores:
            await store.close()

    def _finish(self, worker: Copying | None) -> None:
        """Wait for what was begun, and let it be copied; blocks."""
        with self._idle:
            self._idle.wait_for(lambda: not self._under_way)
            worker = worker or self._worker  # what was begun may have begun to copy
        self._end(worker)

    @staticmethod
    def _end(worker: Copying | None) -> None:
        if worker is not None:
            worker.stop()

    def statistics(self) -> dict[str, int]:
        return {**self.first.statistics(), "mirror_behind": self.behind.count}

    @property
    def first(self) -> StorageBackend:
        """The store that is read from."""
        return self._sides.stores[self._first]

    @property
    def stores(self) -> Sequence[StorageBackend]:
        """Both stores, as the URL names them."""
        return self._sides.stores

    @property
    def second(self) -> StorageBackend:
        """The store that is copied to."""
        return self._sides.stores[1 - self._first]

    async def look(self) -> None:
        """Look which store is the first one."""
        first, self._state = await self._sides.first(self._first)
        if first != self._first:
            self.behind.forget()
        self._first, self._looked = first, time.monotonic()
        self._origin = "" if self._state is None else str(self._state.epoch)

    async def _reading(self) -> StorageBackend:
        if not self._closed and self._looked >= 0 and time.monotonic() - self._looked > LOOK_SECONDS:
            await self.look()
        return self.first

    async def _writing(self) -> StorageBackend:
        """Return the first store, once it may be written."""
        deadline = time.monotonic() + self.config.lock_timeout_seconds
        pause, attempts = 0.01, 3
        while self._state is None or self._state.phase != "open":
            if self._looked < 0:
                break  # the store itself says that it is not open yet
            await self.look()
            state = self._state
            if state is None:
                try:
                    await self._sides.begin()
                except ConfigurationError:
                    raise
                except StorageError as error:
                    attempts -= 1  # it may only be that another process makes it at this moment
                    if not attempts:
                        raise unreachable(error) from error
                    await asyncio.sleep(pause)
            elif state.phase != "open" and time.time() > state.until:
                await self._sides.reopen(self._first, state)
            elif state.phase != "open":
                if time.monotonic() > deadline:
                    raise UnavailableError("The stores are being switched, which takes long.", hint="Try again.")
                await asyncio.sleep(pause)
                pause = min(pause * 2, 0.5)
        if self._worker is None:
            self._work()
        return self.first

    def _work(self) -> None:
        """See that there is somebody who copies."""
        with self._state_lock:
            if self._worker is None and self._looked >= 0:
                self._worker = Copying(self)

    # --- writing -------------------------------------------------------------------------------------

    async def commit(self, changes: Sequence[Change]) -> list[Outcome]:
        for change in changes:
            check_change(change)
        return await self._to_the_end(self._commit(list(changes)))

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        with self._state_lock:
            if self._closed:
                work.close()
                raise ClosedError("The store is closed.", hint="Open a new StorageManager.")
            self._under_way += 1
        try:
            return await to_the_end(work)
        finally:
            with self._state_lock:
                self._under_way -= 1
                self._idle.notify_all()

    async def _commit(self, changes: Sequence[Change]) -> list[Outcome]:
        names = touched(changes)

        async def work(first: StorageBackend, conditions: Sequence[Change]) -> list[Outcome]:
            return (await first.commit([*conditions, *changes]))[len(conditions) :]

        return await self._write(names, work)

    async def _write(self, names: Sequence[str], work: Callable[[StorageBackend, Sequence[Change]], Awaitable[T]]) -> T:
        """Do work on the first store that changes keys, on the condition that it is the first and they are recorded."""
        while True:
            first = await self._writing()
            is_open = self._sides.is_open
            records: list[Record] = []
            try:
                records = await self.behind.cover(first, names, [is_open]) if names else []
                return await work(first, [is_open, *requirements(records)] if names else [])
            except NotFoundError as error:
                if error.key == self._sides.open_key:
                    self._state = None  # switched, or about to be
                elif error.key in [record.key for record in records]:
                    self.behind.forget(error.key)  # another process has taken it over
                else:
                    raise
            finally:
                self.behind.release(records, names)
                if self._worker is not None:
                    self._worker.wake()

    async def write(self, key: str, data: bytes) -> bool:
        await self.commit([Put(key, bytes(data))])
        return True

    async def delete(self, key: str) -> bool:
        return bool((await self.commit([Delete(key)]))[0])

    async def append(self, key: str, data: bytes) -> bool:
        check_lines(check_key(key), data)
        return await self._to_the_end(self._beside([key], lambda first: first.append(key, data)))

    async def _beside(self, names: Sequence[str], work: Callable[[StorageBackend], Awaitable[T]]) -> T:
        """Do work that can have no conditions, once; whoever switches waits for it."""
        busy = self._writers.busy()

        async def marked(first: StorageBackend, conditions: Sequence[Change]) -> T:
            try:
                await first.commit([*conditions, Put(busy, b"{}\n")])
                result = await work(first)
                is_there = bool((await first.commit([Delete(busy)]))[0])
            except BaseException:
                self.behind.dispose(busy)
                raise
            if not is_there:  # it was not waited for any longer
                raise DurabilityError("The stores were switched while this was done, so it may be lost or done.")
            return result

        return await self._write(names, marked)

    async def write_blob(self, key: str, chunks: AsyncIterator[bytes]) -> bool:
        # Beside its key first, so that it gets there by a commit like any other, once.
        check_key(key)
        first, staged = await self._writing(), self._writers.staged()
        if await first.exists(key):
            return False
        self._uploads += 1
        places, is_new = [first], False
        try:
            await first.write_blob(staged, chunks)
            is_new = await self._to_the_end(self._adopt(places, staged, key))
            return is_new
        finally:
            self._uploads -= 1
            for place in places[:-1] if is_new else places:
                with suppress(StorageError):  # who finds that this process has left removes it
                    await place.delete(staged)

    async def _adopt(self, places: list[StorageBackend], staged: str, key: str) -> bool:
        async def work(first: StorageBackend, conditions: Sequence[Change]) -> bool:
            if first is not places[-1]:  # switched meanwhile
                before = places[-1]
                places.append(first)
                await first.write_blob(staged, before.read_blob(staged))
            try:
                await first.commit([*conditions, Require(staged, "The file"), Move(staged, key)])
            except ConflictError:
                return False
            return True

        return await self._write([key], work)

    async def verify(self, *, fix: bool = False) -> list[Problem]:
        first = await self._reading()
        found = await first.verify()
        if fix and found:
            names = [*{problem.key for problem in found if problem.kind == "torn-tail"}, f"{self.layout.quarantine}/"]
            found = await self._to_the_end(self._beside(names, lambda first: first.verify(fix=True)))
        return found

    async def obstacles(self, *, fix: bool = False) -> list[Problem]:
        found = await self.first.obstacles(fix=fix)
        return [*found, *(await self.second.obstacles(fix=fix) if not self.problem and self._worker else [])]

    # --- reading -------------------------------------------------------------------------------------

    async def is_behind(self) -> bool:
        return await (await self._reading()).is_behind()

    @property
    def origin(self) -> str:
        return self._origin

    async def read(self, key: str) -> bytes | None:
        return await (await self._reading()).read(key)

    async def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        return await (await self._reading()).read_many(keys)

    async def exists(self, key: str) -> bool:
        return await (await self._reading()).exists(key)

    async def list_keys(self, prefix: str) -> list[str]:
        return [key for key in await (await self._reading()).list_keys(prefix) if not self.layout.is_of_mirror(key)]

    async def list_children(self, folder: str) -> list[str]:
        return self._seen(folder, await (await self._reading()).list_children(folder))

    async def list_folders(self, folder: str) -> list[str]:
        return self._seen(folder, await (await self._reading()).list_folders(folder))

    async def read_folders(self, folder: str, document: str, log: str) -> list[tuple[str, bytes | None, bytes | None]]:
        return await (await self._reading()).read_folders(folder, document, log)

    async def read_log(self, key: str, start: int = 0, stop: int | None = None, *, strict: bool = False) -> list[bytes]:
        return await (await self._reading()).read_log(key, start, stop, strict=strict)

    async def stream_log(self, key: str, *, strict: bool = False) -> AsyncIterator[list[bytes]]:
        async with ended((await self._reading()).stream_log(key, strict=strict)) as runs:
            async for run in runs:
                yield run

    async def read_log_as(
        self,
        key: str,
        decode: Callable[[bytes], T | None],
        start: int = 0,
        stop: int | None = None,
        *,
        strict: bool = False,
    ) -> list[T]:
        return await (await self._reading()).read_log_as(key, decode, start, stop, strict=strict)

    async def stream_log_as(
        self, key: str, decode: Callable[[bytes], T | None], *, strict: bool = False
    ) -> AsyncIterator[Iterable[T]]:
        async with ended((await self._reading()).stream_log_as(key, decode, strict=strict)) as runs:
            async for run in runs:
                yield run

    async def count_log(self, key: str) -> int:
        return await (await self._reading()).count_log(key)

    async def find_record(self, key: str, record_id: str) -> tuple[int, bytes] | None:
        return await (await self._reading()).find_record(key, record_id)

    async def newest_records(self, keys: Sequence[str]) -> list[bytes | None]:
        return await (await self._reading()).newest_records(keys)

    async def changes(self, cursor: str | None) -> Changes:
        found = await (await self._reading()).changes(cursor)
        if found.keys is None:
            return found
        return Changes(found.cursor, frozenset(key for key in found.keys if not self.layout.is_of_mirror(key)))

    async def wait_for_change(self, keys: Sequence[str] | frozenset[str], seconds: float) -> None:
        # At once, so without a look which is the first one: it may be the other one only for as long as the next look.
        await self.first.wait_for_change(keys, min(seconds, LOOK_SECONDS))

    async def stamps(self, keys: Sequence[str]) -> list[str | None]:
        return await (await self._reading()).stamps(keys)

    async def read_log_part(self, key: str, identity: str | None, start: int) -> LogPart | None:
        return await (await self._reading()).read_log_part(key, identity, start)

    async def read_log_at(self, places: Sequence[tuple[str, int, int]]) -> list[bytes | None]:
        return await (await self._reading()).read_log_at(places)

    async def read_blob(self, key: str) -> AsyncIterator[bytes]:
        async with ended((await self._reading()).read_blob(key)) as chunks:
            async for chunk in chunks:
                yield chunk

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Snapshot]:
        async with (await self._reading()).snapshot() as shown:
            yield Shown(self, shown, self.layout.is_of_mirror)

    @asynccontextmanager
    async def still(self) -> AsyncIterator[Snapshot]:
        async with (await self._reading()).still() as shown:
            yield Shown(self, shown, self.layout.is_of_mirror)

    def _seen(self, folder: str, children: list[str]) -> list[str]:
        return [child for child in children if not self.layout.is_of_mirror(f"{folder}/{child}")]

    # --- both stores ---------------------------------------------------------------------------------

    async def status(self) -> MirrorStatus:
        """Return how the two stores stand."""
        await self.look()
        keys, names = await self.carrier().recorded()
        try:
            await self.second.open()
            await self._sides.require_copy(1 - self._first)
            problem = ""
        except StorageError as error:
            problem = error.message
        epoch, phase = (0, "new") if self._state is None else (self._state.epoch, self._state.phase)
        return MirrorStatus(self._first, epoch, phase, len(keys), len(names), problem)

    async def start(self) -> None:
        """Copy what was there before, if that was not done, and wait until the second store has everything.

        What others change all the time it has as it was when this was called, or later; the rest is on its way.

        Raises:
            ConfigurationError: The second store is another store, or the same one; nothing has changed.
            UnavailableError: The second store cannot be used now.
        """
        await self._writing()
        await self._catch_up()

    async def compare(self, *, fix: bool = False, progress: Callable[[int], None] | None = None) -> Comparison:
        """Compare every key of both stores, while others may write; with `fix` copy what differs.

        Raises:
            UnavailableError: The second store cannot be used now.
        """
        await (self._writing() if fix else self.look())
        try:
            await self.second.open()
            return await compared(self.carrier(), fix=fix, progress=progress)
        except StorageError as error:
            raise unreachable(error) from error

    async def switch(self) -> int:
        """Make the second store the first one, and the first the second; return which that is, 0 or 1.

        Others may go on writing: they wait for a moment. Called again it falls back.

        Raises:
            UnavailableError: The second store cannot be used now, or does not get all in time; nothing has changed,
                unless the message says that the switch is decided.
            ConflictError: Somebody else switches at this moment, or nobody waited any longer; nothing has changed.
        """
        await self._writing()
        await self._catch_up()  # so that the moment is short
        side, state = self._first, self._state
        if state is None or state.phase != "open":
            raise ConflictError("Somebody else is switching the stores.", hint="Look at the status, and try again.")
        closed = await self._sides.close(side, state)
        self._state = None
        try:
            async with asyncio.timeout(max(1.0, closed.until - time.time() - 5)):
                carrier, conditions = self.carrier(), [self._sides.still_closed(closed)]
                await carrier.wait_for_busy(conditions)
                await carrier.renew()  # what was begun before is refused, so what is looked at now stays
                records, restless = await carrier.drain(conditions)
                if restless:
                    raise UnavailableError(f"{restless[0]} changes in the second store meanwhile.", key=restless[0])
            await self._sides.move(side, closed, removal(records))
        except ConflictError:
            raise
        except BaseException as error:
            if not await asyncio.shield(self._undo(side, closed)):
                raise _decided(error) from error
            if isinstance(error, TimeoutError):
                raise UnavailableError("The second store did not get everything in time.", hint="Try again.") from error
            if isinstance(error, StorageError):
                raise unreachable(error) from error
            raise
        try:
            await self._sides.make_open(1 - side, closed.epoch + 1)
            await self.look()
        except StorageError as error:
            raise _decided(error) from error
        return self._first

    async def _undo(self, side: int, closed: State) -> bool:
        """Open the first store again; return False if the switch is decided already."""
        await self._sides.reopen(side, closed)
        state = await self._sides.state(side)
        return state is None or state.phase != "moved"

    async def stop(self) -> None:
        """Take out of both stores what the mirroring keeps in them; from now on use the first one alone.

        The second one still says that it is not the first.

        Raises:
            UnavailableError: The second store cannot be used now.
            ConflictError: Others go on writing to both.
        """
        await self._writing()
        if restless := await self._catch_up():
            raise ConflictError(f"{restless[0]} is being changed: somebody writes.", hint="Stop the application first.")
        with self._state_lock:
            worker, self._worker = self._worker, None
        await asyncio.to_thread(self._end, worker)
        # The first store first: if it ends there, it says nothing while the second does, and whoever mirrors them again
        # knows that the first one may have been written alone since (`Sides.make_open`).
        try:
            await self.first.commit([RemoveTree(self.layout.mirror)])
            await self._sides.leave(1 - self._first)
        except StorageError as error:
            raise unreachable(error) from error
        self._state = None
        self.behind.forget()

    async def _catch_up(self) -> list[str]:
        """Copy what all records name, while others may write; return keys that change all the time."""
        try:
            await self.look()  # another process may have switched them
            await self.second.open()
            await self._sides.mark(1 - self._first)  # one that was never copied to lacks everything, or is refused
            carrier = self.carrier()
            async with self.behind.paused():  # not the same by two at once
                await carrier.take_over(at_once=True)
                return (await carrier.drain())[1]
        except NotFoundError as error:
            if self.is_switching(error):
                self._state = None
                raise ConflictError("Somebody else is switching the stores.", hint="Try again.") from error
            raise
        except ConfigurationError:
            raise
        except StorageError as error:
            raise unreachable(error) from error

    # --- for whoever copies --------------------------------------------------------------------------

    def carrier(self) -> Carrier:
        """Return what carries from the first store to the second, in this event loop."""
        return Carrier(self.layout, self._sides, self._first, self.behind, self._writers)

    def is_switching(self, error: BaseException) -> bool:
        """Tell whether an error says that the stores are switched, or about to be."""
        return self._sides.is_refusal(error) or getattr(error, "key", None) == self._sides.open_key

    async def beat(self) -> None:
        """Show the others that this process is there, as long as it has something there."""
        if self._uploads or not self.behind.is_empty:
            with suppress(NotFoundError):  # nobody takes anything over while the store is closed
                await self.first.commit([self._sides.is_open, self._writers.beat()])

    async def say_goodbye(self) -> None:
        """Take that back."""
        if changes := self._writers.goodbye():
            await self.first.commit(changes)


def _decided(error: BaseException) -> UnavailableError:
    return UnavailableError(
        f"The switch is decided, but the store that is the first one now cannot be opened yet: {error}",
        hint="Whoever writes next opens it; look at the status.",
    )
