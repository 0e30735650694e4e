"""Two stores at once: the contract, and nothing lost when one is down, a writer dies, or the stores are switched."""

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from click.testing import CliRunner

from flatfile_chat_database import Message, StorageConfig, StorageManager
from flatfile_chat_database.backends import copying, writers
from flatfile_chat_database.backends.alike import Alike
from flatfile_chat_database.backends.base import Capability, StorageBackend
from flatfile_chat_database.backends.changes import Append, Change, Delete, Move, Outcome, Put, RemoveTree, Require
from flatfile_chat_database.backends.flatfile import FlatfileBackend
from flatfile_chat_database.backends.memory import MemoryBackend
from flatfile_chat_database.backends.mirrored import MirroredBackend
from flatfile_chat_database.backends.opening import open_backend
from flatfile_chat_database.backends.sqlite import SqliteBackend
from flatfile_chat_database.check import check
from flatfile_chat_database.cli import cli
from flatfile_chat_database.errors import ConfigurationError, ConflictError, NotFoundError, UnavailableError
from flatfile_chat_database.layout import Layout
from flatfile_chat_database.testing.case import LOG, line
from flatfile_chat_database.testing.contract import BackendContract
from flatfile_chat_database.transfer import backup
from flatfile_chat_database.transfer.migrate import migrate

from . import postgres
from .backdoors import Files

pytestmark = pytest.mark.slow  # nothing in it depends on the version of Python, and a sample uses a mirror

LAYOUT = Layout(StorageConfig())
OWN = f"{LAYOUT.mirror}/"
DOCUMENT = "users/ada/a.json"
CHAT = LAYOUT.key("messages", user_id="ada", session_id="s")


@pytest.mark.slow
class TestMirroredMemory(BackendContract):
    """Two dictionaries."""

    capabilities = frozenset({Capability.SNAPSHOTS})

    @pytest.fixture(autouse=True)
    def medium(self) -> None:
        self.datas: list[dict[str, bytes]] = [{}, {}]

    def make_backend(self, config: StorageConfig) -> StorageBackend:
        stores = []
        for data in self.datas:
            store = MemoryBackend(config)
            store._data, store._keys = data, sorted(data)
            stores.append(store)
        return MirroredBackend(config, *stores)

    def peek(self, key: str) -> bytes | None:
        return self.datas[0].get(key)

    def poke(self, key: str, data: bytes) -> None:
        self.datas[0][key] = data

    def peek_keys(self) -> list[str]:
        return [key for key in self.datas[0] if not key.startswith(OWN)]


@pytest.mark.slow
@pytest.mark.whole
class TestMirroredFiles(Files, BackendContract):
    """Files and SQLite; too long for every run, for every case takes both."""

    capabilities = FlatfileBackend.capabilities & SqliteBackend.capabilities

    @pytest.fixture(autouse=True)
    def medium(self, tmp_path: Path) -> None:
        self.root = tmp_path / "store"
        self.other = tmp_path / "other.sqlite3"

    def make_backend(self, config: StorageConfig) -> StorageBackend:
        return MirroredBackend(config, FlatfileBackend(config, self.root), SqliteBackend(config, str(self.other)))

    def peek_keys(self) -> list[str]:
        return [key for key in super().peek_keys() if not key.startswith(OWN)]


# --- two stores --------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody wait long for the second store."""
    monkeypatch.setattr(copying, "_RETRY_SECONDS", (0.02, 0.05))
    monkeypatch.setattr(writers, "LEFT_SECONDS", 1.5)


class Second(MemoryBackend):
    """A store that can be down, or slow."""

    down = False
    slow = 0.0
    held: "Held | None" = None

    async def commit(self, changes: Sequence[Change]) -> list[Outcome]:
        await asyncio.sleep(self.slow)
        if self.held is not None:
            async with self.held.looking(changes):
                return await super().commit(changes)
        if self.down:
            raise UnavailableError("It is down.")
        return await super().commit(changes)

    async def read(self, key: str) -> bytes | None:
        if self.down:
            raise UnavailableError("It is down.")
        return await super().read(key)


class Held:
    """Holds the first commit that a condition picks, until it is let go."""

    def __init__(self, picks: Callable[[Change], bool]) -> None:
        self.picks = picks
        self.came = threading.Event()
        self.arrived = False
        self._go = threading.Event()
        self._done = threading.Event()

    @asynccontextmanager
    async def looking(self, changes: Sequence[Change]) -> AsyncIterator[None]:
        mine = not self.came.is_set() and any(map(self.picks, changes))
        if mine:
            self.came.set()
            await asyncio.to_thread(self._go.wait, 20)
        try:
            yield
            self.arrived = self.arrived or mine
        finally:
            if mine:
                self._done.set()

    async def wait(self) -> None:
        assert await asyncio.to_thread(self.came.wait, 20)

    async def let_go(self) -> bool:
        """Return whether the commit arrives."""
        self._go.set()
        assert await asyncio.to_thread(self._done.wait, 20)
        return self.arrived


def contents(store: MemoryBackend) -> dict[str, bytes]:
    return {key: data for key, data in list(store._data.items()) if not key.startswith(OWN)}


@asynccontextmanager
async def mirrored(old: StorageBackend, new: StorageBackend) -> AsyncIterator[MirroredBackend]:
    backend = MirroredBackend(StorageConfig(), old, new)
    await backend.open()
    try:
        yield backend
    finally:
        await backend.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - it is another thread that makes it so
            await asyncio.sleep(0.01)


def again(store: MemoryBackend) -> MemoryBackend:
    """Return a new handle on a store in memory."""
    other = type(store)(StorageConfig())
    other._data, other._keys = store._data, store._keys
    other._lock = store._lock  # a change is made of what is there, by whichever of the two
    return other


async def test_what_was_there_before_and_what_is_written_come_to_the_second_store() -> None:
    old, new = MemoryBackend(StorageConfig()), Second(StorageConfig())
    storage = StorageManager(old.config, backend=old)
    await storage.create_user("ada")
    session = await storage.create_session("ada", "before")
    async with mirrored(old, new) as both:
        storage = StorageManager(both.config, backend=both)
        for number in range(20):
            await storage.add_message("ada", session, Message("user", f"number {number}"))
        gone = await storage.create_session("ada", "goes")
        await storage.delete_session("ada", gone)
        await storage.save_document("ada", session, "a.txt", b"\0 bytes")
        await storage.pop_message("ada", session)
        await both.start()
        await until(lambda: contents(new) == contents(old))
        assert (await both.compare()).count == 0
    status = await status_of(old, new)
    assert (status.first, status.epoch, status.phase, status.records, status.problem) == (0, 1, "open", 0, "")


async def status_of(old: MemoryBackend, new: MemoryBackend) -> Any:
    async with mirrored(again(old), again(new)) as both:
        return await both.status()


async def test_nobody_waits_for_a_second_store_that_is_down_and_it_catches_up() -> None:
    old, new = MemoryBackend(StorageConfig()), Second(StorageConfig())
    async with mirrored(old, new) as both:
        await both.write("users/a", b"1")
        await both.start()
        new.down = True
        for number in range(30):
            await both.commit([Append(LOG, (line(f"m{number}"),)), Put(f"users/{number}", b"x")])
        await both.commit([Delete("users/3"), Move("users/4", "users/moved")])
        await until(lambda: bool(both.problem))
        assert "users/5" not in contents(new)
        with pytest.raises(UnavailableError, match=r"second store cannot be used now: It is down\."):
            await both.switch()
        assert await both.write("users/after", b"still open")
        assert (await both.status()).problem == "It is down."
        new.down = False
        await until(lambda: contents(new) == contents(old))
        await until(lambda: not both.problem)


async def test_what_a_second_store_missed_is_recorded_for_whoever_comes_next() -> None:
    old, new = MemoryBackend(StorageConfig()), Second(StorageConfig())
    async with mirrored(old, new) as both:
        await both.write("users/a", b"1")
        await both.start()
        new.down = True
        await both.write("users/a", b"2")
        await both.append(LOG, line("m0"))
    assert contents(new)["users/a"] == b"1"
    new.down = False
    async with mirrored(again(old), again(new)) as both:
        assert (await both.status()).behind >= 2
        await both.write("users/b", b"3")
        await until(lambda: contents(new) == contents(old))


async def test_nobody_waits_for_a_second_store_that_is_slow() -> None:
    old, new = MemoryBackend(StorageConfig()), Second(StorageConfig())
    async with mirrored(old, new) as both:
        await both.start()
        new.slow = 3600.0
        async with asyncio.timeout(20):
            for number in range(50):
                await both.write(f"users/{number}", b"x")
        assert both.statistics()["mirror_behind"] > 0
        new.slow = 0.0
        assert both._worker is not None
        both._worker._until = 0.0  # it sleeps for an hour, and is not waited for
        both._worker = None


async def test_the_waiting_begins_before_any_look_at_which_store_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    async with mirrored(MemoryBackend(StorageConfig()), Second(StorageConfig())) as both:
        await both.write(DOCUMENT, b"1")

        async def look() -> None:
            await asyncio.sleep(3600)

        with monkeypatch.context() as held:
            held.setattr(both, "look", look)
            held.setattr(both, "_looked", 0.0)  # long ago
            waiting = asyncio.ensure_future(both.wait_for_change([DOCUMENT], 3600))
            await asyncio.sleep(0)
            await both.first.write(DOCUMENT, b"2")
            await asyncio.wait_for(waiting, 60)


async def test_mirroring_begins_only_with_both_stores() -> None:
    old, new = MemoryBackend(StorageConfig()), Second(StorageConfig())
    new.down = True
    both = MirroredBackend(StorageConfig(), old, new)
    with pytest.raises(UnavailableError):
        await both.open()
    assert old._data == new._data == {}


async def test_differences_made_by_hand_are_reported_and_mended() -> None:
    old, new = MemoryBackend(StorageConfig()), Second(StorageConfig())
    async with mirrored(old, new) as both:
        for number in range(10):
            await both.write(f"users/{number}", b"x" * number)
        await both.start()
        await until(lambda: not any("/behind/" in key for key in list(old._data)))
        await new.write("users/3", b"by hand")
        await new.delete("users/4")
        await new.write("users/more", b"")
        found = await both.compare()
        assert (found.keys, found.count) == (11, 3)
        assert found.differing == ["users/3", "users/4", "users/more"]
        assert (await both.compare(fix=True)).count == 3
        assert (await both.compare()).count == 0
        assert contents(new) == contents(old)


async def test_switching_and_falling_back_lose_nothing_that_writers_wrote() -> None:
    old, new = MemoryBackend(StorageConfig()), Second(StorageConfig())
    written: list[str] = []
    stop = asyncio.Event()

    async def write(both: MirroredBackend, name: str) -> None:
        number = 0
        while not stop.is_set():
            await both.commit([Append(LOG, (line(f"{name}{number}"),)), Put(f"users/{name}", b"%d" % number)])
            written.append(f"{name}{number}")
            number += 1
            await asyncio.sleep(0.001)

    async with mirrored(old, new) as one, mirrored(again(old), again(new)) as other:
        await one.start()
        writers = [asyncio.ensure_future(write(both, name)) for name, both in (("a", one), ("b", other), ("c", one))]
        firsts = []
        for _ in range(4):
            before = len(written)
            while len(written) < before + 20:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            firsts.append(await one.switch())
        stop.set()
        await asyncio.gather(*writers)
        assert firsts == [1, 0, 1, 0]
        assert (await other.status()).epoch == 5
        log = [each async for run in one.stream_log(LOG) for each in run]
        ids = [each.partition(b'"id":"')[2].partition(b'"')[0].decode() for each in log]
        assert sorted(ids) == sorted(written)
        for name in "abc":
            mine = [each for each in written if each[0] == name]
            assert [each for each in ids if each[0] == name] == mine
        await until(lambda: contents(new) == contents(old))
        assert (await other.switch()) == 1
        assert await one.read("users/a") == await new.read("users/a")
        await one.stop()
        assert [key for key in new._data if key.startswith(OWN)] == []
        assert [key for key in old._data if key.startswith(OWN)] == [LAYOUT.mirror_state]
        assert contents(new) == contents(old)


async def test_a_switch_that_was_given_up_is_undone_by_whoever_writes_next() -> None:
    old, new = MemoryBackend(StorageConfig()), Second(StorageConfig())
    async with mirrored(old, new) as both:
        await both.start()
        state = await both._sides.state(0)
        assert state is not None
        closed = await both._sides.close(0, state)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("flatfile_chat_database.backends.mirrored.time.time", lambda: closed.until + 1)
            assert await both.write("users/a", b"1")
        assert (await both.status()).phase == "open"


async def test_a_switch_that_died_after_its_decision_is_finished_by_others() -> None:
    old, new = MemoryBackend(StorageConfig()), Second(StorageConfig())
    async with mirrored(old, new) as both:
        await both.write("users/a", b"1")
        await both.start()
        state = await both._sides.state(0)
        assert state is not None
        closed = await both._sides.close(0, state)
        await both._sides.move(0, closed)
    async with mirrored(again(old), again(new)) as both:
        assert await both.write("users/b", b"2")
        assert (both.first._data, (await both.status()).epoch) == (new._data, 2)  # type: ignore[attr-defined]
        await until(lambda: contents(new) == contents(old))


async def test_who_comes_late_with_what_was_right_before_a_switch_changes_nothing() -> None:
    old, new = MemoryBackend(StorageConfig()), Second(StorageConfig())
    async with mirrored(old, new) as both:
        await both.write("users/a", b"1")
        await both.start()
        late, mark = Alike(LAYOUT, again(old), again(new)), await both._sides.mark(1)
        await both.switch()
        await both.write("users/a", b"2")
        await old.write("users/a", b"late")
        with pytest.raises(NotFoundError, match="permission to copy to this store"):
            await late.make("users/a", mark)
        assert await new.read("users/a") == b"2"


@pytest.mark.parametrize("count", [3, 3000])
async def test_a_log_that_goes_on_growing_is_continued_and_not_copied_anew(tmp_path: Path, count: int) -> None:
    old, new = FlatfileBackend(StorageConfig(), tmp_path / "old"), Second(StorageConfig())
    async with mirrored(old, new) as both:
        await both.commit([Append(LOG, tuple(line(f"m{number}", "x" * 500) for number in range(count)))])
        await both.start()
        await until(lambda: new._data.get(LOG, b"").count(b"\n") == count)
        late = Alike(LAYOUT, old, again(new))
        read, grown = old.read_blob, 0

        async def growing(key: str) -> AsyncIterator[bytes]:  # somebody writes whenever somebody looks
            nonlocal grown
            grown += 1
            await old.append(LOG, line(f"late{grown}"))
            async for chunk in read(key):
                yield chunk

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(old, "read_blob", growing)
            patch.setattr(Second, "write_blob", None)  # not needed
            await late.make(LOG, await both._sides.mark(1))
        assert 0 < grown < 5
        assert new._data[LOG] == await old.read(LOG)


async def large_log(path: Path) -> FlatfileBackend:
    """Return a store with a log that is carried in portions."""
    store = FlatfileBackend(StorageConfig(), path)
    await store.open()
    await store.commit([Append(LOG, tuple(line(f"m{number}", "x" * 500) for number in range(4000)))])
    return store


MARK = Require("mark", "The mark")


async def test_two_who_copy_a_log_at_once_in_one_process_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = await large_log(tmp_path / "old"), Second(StorageConfig())
    await new.write(MARK.key, b"")
    alike, looking, most = Alike(LAYOUT, old, new), 0, 0
    look = alike._compare_large

    async def counted(*arguments: Any) -> bool:
        nonlocal looking, most
        looking += 1
        most = max(most, looking)
        try:
            return await look(*arguments)
        finally:
            looking -= 1

    monkeypatch.setattr(alike, "_compare_large", counted)
    try:
        assert await asyncio.gather(*(alike.make(LOG, MARK) for _ in range(3))) == [True] * 3
        assert most == 1
        assert new._data[LOG] == await old.read(LOG)
    finally:
        await old.close()


async def test_who_begins_a_log_anew_looks_at_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = await large_log(tmp_path / "old"), Second(StorageConfig())
    await new.commit([Put(MARK.key, b""), Put(LOG, b"something else\n")])
    portions, commit = 0, new.commit

    async def beside(changes: Sequence[Change]) -> list[Outcome]:
        nonlocal portions
        portions += any(isinstance(change, Append) for change in changes)
        if portions == 3 and b"late" not in new._data[LOG]:  # who takes the log for equal goes on with it
            await old.append(LOG, line("late"))
            await new.append(LOG, line("late"))
        return await commit(changes)

    monkeypatch.setattr(new, "commit", beside)
    try:
        assert await Alike(LAYOUT, old, new).make(LOG, MARK)
        assert portions > 3
        assert new._data[LOG] == await old.read(LOG)
    finally:
        await old.close()


async def test_what_was_equal_is_looked_at_again_under_a_new_mark(tmp_path: Path) -> None:
    old, new = await large_log(tmp_path / "old"), Second(StorageConfig())
    async with mirrored(old, new) as both:
        await both.start()
        carrier = both.carrier()
        await carrier.carry([LOG])
        whole = await old.read(LOG) or b""
        await new.write(LOG, whole[: whole.find(b"\n") + 1])  # somebody began it anew, and died
        await carrier.renew()  # as whoever takes over his records does
        await carrier.carry([LOG])
        assert new._data[LOG] == whole


class Restless(MemoryBackend):
    """A store to which somebody else writes whenever it is looked at, and copies that to the second one as well."""

    other: MemoryBackend | None = None
    written = 0

    async def read_blob(self, key: str) -> AsyncIterator[bytes]:
        if self.other is not None and key in (LOG, DOCUMENT):
            await self._write(key, self.other)
        async for chunk in super().read_blob(key):
            yield chunk

    async def _write(self, key: str, other: MemoryBackend) -> None:
        self.written += 1
        if key == LOG:
            await self.append(LOG, line(f"late{self.written}"))
            await other.write(LOG, self._data[LOG])
        else:
            await self.write(DOCUMENT, b"%d" % self.written)


@pytest.mark.parametrize("key", [LOG, DOCUMENT])
@pytest.mark.parametrize("size", [10, 1 << 21])
async def test_a_store_that_somebody_changes_without_a_rest_is_mirrored_and_switched(key: str, size: int) -> None:
    old, new = Restless(StorageConfig()), Second(StorageConfig())
    await old.open()
    await old.commit([Put(DOCUMENT, b"0" * size), Append(LOG, (line("m1", "x" * size),))])
    before = old._data[key]
    async with mirrored(old, new) as both:
        old.other = new
        await both.start()
        assert old.written > 1 and both.problem == ""
        assert new._data[LOG].startswith(old._data[LOG][:size]) and new._data[DOCUMENT] != b"0" * size
        assert (await both.status()).behind > 0  # it is not said to be equal
        if key == LOG:
            assert (await both.compare()).differing in ([], [DOCUMENT])
        with pytest.raises(ConflictError, match="is being changed: somebody writes"):
            await both.stop()
        old.other = None
        await both.commit([Put(key, before) if key == DOCUMENT else Append(LOG, (line("last"),))])
        assert await both.switch() == 1
        assert contents(old) == contents(new)


async def test_what_the_mirroring_keeps_in_a_store_is_no_news_to_who_looks_at_it_alone(tmp_path: Path) -> None:
    both = open_backend(StorageConfig(storage_url=url_of(tmp_path)))
    async with StorageManager(both.config, backend=both) as storage:
        await storage.create_user("ada")
    await both.close()  # or what it still copies is seen half written
    for side in (f"file:{tmp_path / 'old'}", f"sqlite:{tmp_path / 'new'}"):
        backend = open_backend(StorageConfig(storage_url=side))
        await backend.open()
        try:
            assert await backend.list_keys(OWN)
            assert list(await check(backend)) == []
            name = side.partition(":")[0]
            assert (await backup(backend, tmp_path / f"{name}.tar.gz")).left_out.count == 0
            copy = FlatfileBackend(StorageConfig(), tmp_path / f"copy-of-{name}")
            report = await migrate(backend, copy)
            assert report.finished and report.found.keys == 1
            assert not await copy.list_keys(OWN)  # or it would be taken for a side of a mirror
            await copy.close()
        finally:
            await backend.close()


# --- whatever is late ---------------------------------------------------------------------------------------


async def test_a_copy_that_is_late_with_a_deletion_is_refused_once_a_switch_has_begun() -> None:
    old, new = MemoryBackend(StorageConfig()), Second(StorageConfig())
    slow = again(new)
    assert isinstance(slow, Second)
    async with mirrored(old, slow) as one, mirrored(again(old), new) as other:
        await one.write(DOCUMENT, b"1")
        await one.start()
        await other.start()
        slow.held = Held(lambda change: change == Delete(DOCUMENT))
        await one.delete(DOCUMENT)
        await slow.held.wait()
        await other.write(DOCUMENT, b"1")  # the same bytes: no version tells it from before
        move = other._sides.move

        async def late(*arguments: Any) -> None:
            assert slow.held is not None
            assert not await slow.held.let_go()
            await move(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(other._sides, "move", late)
            assert await other.switch() == 1
        assert await other.read(DOCUMENT) == b"1"
        await until(lambda: contents(old) == contents(new) == {DOCUMENT: b"1"})


async def test_a_copy_of_a_process_that_dies_is_refused_once_another_has_taken_its_record() -> None:
    old, new = MemoryBackend(StorageConfig()), Second(StorageConfig())
    slow = again(new)
    assert isinstance(slow, Second)
    async with mirrored(again(old), new) as other:
        await other.write(DOCUMENT, b"1")
        await other.start()
        one = MirroredBackend(StorageConfig(), old, slow)
        await one.open()
        slow.held = Held(lambda change: change == Delete(DOCUMENT))
        await one.delete(DOCUMENT)
        await slow.held.wait()
        await other.write(DOCUMENT, b"1")
        await other.start()
        assert not await slow.held.let_go()  # and then it may die as well
        assert contents(new) == contents(old) == {DOCUMENT: b"1"}
        await one.close()


async def test_a_large_file_that_is_late_does_not_come_back_after_a_switch() -> None:
    old, new = MemoryBackend(StorageConfig()), Second(StorageConfig())
    slow = again(new)
    async with mirrored(old, slow) as one, mirrored(again(old), new) as other:
        await one.write("users/x", b"")
        await one.start()
        await other.start()
        came, go = threading.Event(), threading.Event()
        write_blob = slow.write_blob

        async def late(key: str, chunks: AsyncIterator[bytes]) -> bool:
            if not came.is_set():
                came.set()
                await asyncio.to_thread(go.wait, 20)
            return await write_blob(key, chunks)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(slow, "write_blob", late)
            await one.write_blob("users/big", pieces(b"z" * (1 << 20), b"z"))
            assert await asyncio.to_thread(came.wait, 20)
            assert await other.switch() == 1
            assert await other.exists("users/big")
            await other.delete("users/big")
            go.set()
            await until(lambda: one.first is slow and one.behind.count == other.behind.count == 0)
        assert not await other.exists("users/big")
        await until(lambda: contents(old) == contents(new))


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


async def test_an_append_under_way_is_waited_for_by_a_switch_and_done_once() -> None:
    old, new = MemoryBackend(StorageConfig()), Second(StorageConfig())
    async with mirrored(old, new) as one, mirrored(again(old), again(new)) as other:
        await one.write("users/x", b"")
        await one.start()
        await other.start()
        append, came, go = old.append, asyncio.Event(), asyncio.Event()

        async def slow(key: str, data: bytes) -> bool:
            await append(key, data)
            came.set()
            return await go.wait()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(old, "append", slow)
            appending = asyncio.ensure_future(one.append(LOG, line("m0")))
            await came.wait()
            switching = asyncio.ensure_future(other.switch())
            await until(lambda: LAYOUT.mirror_open not in old._data)
            go.set()
            assert await appending
        assert await switching == 1
        assert new._data[LOG] == old._data[LOG] == line("m0")


async def test_a_file_that_is_uploaded_while_the_stores_are_switched_arrives() -> None:
    old, new = MemoryBackend(StorageConfig()), Second(StorageConfig())
    async with mirrored(old, new) as one, mirrored(again(old), again(new)) as other:
        await one.write("users/x", b"")
        await one.start()

        async def chunks() -> AsyncIterator[bytes]:
            yield b"one"
            assert await other.switch() == 1
            yield b"two"

        assert await one.write_blob("users/big", chunks())
        assert new._data["users/big"] == b"onetwo"
        assert not await one.write_blob("users/big", chunks())
        await until(lambda: contents(old) == contents(new))
        assert [key for key in [*old._data, *new._data] if "/staged/" in key] == []


@pytest.mark.parametrize("reached", [0, 1])
async def test_a_stop_that_died_half_way_loses_nothing_that_was_written_alone(reached: int) -> None:
    old, new = MemoryBackend(StorageConfig()), Second(StorageConfig())
    async with mirrored(old, new) as both:
        await both.write("users/a", b"1")
        await both.start()
        await both.switch()
        await both.start()
    await again((old, new)[reached]).commit([RemoveTree(LAYOUT.mirror)])
    alone = again(new)
    await alone.write("users/alone", b"2")
    await alone.delete("users/a")
    async with mirrored(again(old), again(new)) as both:
        await both.write("users/b", b"3")
        await both.start()
        assert (await both.compare()).count == 0
        assert await both.switch() == 0
        assert contents(old) == contents(new) == {"users/alone": b"2", "users/b": b"3"}


async def test_a_stop_that_does_not_reach_the_second_store_loses_nothing_either() -> None:
    old, new = MemoryBackend(StorageConfig()), Second(StorageConfig())
    async with mirrored(old, new) as both:
        await both.write("users/a", b"1")
        await both.start()
        commit = new.commit

        async def fail(changes: Sequence[Change]) -> list[Outcome]:
            if RemoveTree(LAYOUT.mirror_writers) in changes:
                raise UnavailableError("It is down.")
            return await commit(changes)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(new, "commit", fail)
            with pytest.raises(UnavailableError, match="It is down"):
                await both.stop()
    await again(old).write("users/alone", b"2")
    async with mirrored(again(old), again(new)) as both:
        await both.start()
        assert contents(new) == contents(old) == {"users/a": b"1", "users/alone": b"2"}
        await both.stop()
        assert [key for key in [*old._data, *new._data] if key.startswith(OWN)] == [LAYOUT.mirror_state]
    async with mirrored(again(old), again(new)) as both:
        await both.start()
        await both.write("users/again", b"3")
        await until(lambda: contents(new) == contents(old))


@pytest.mark.parametrize("switched", [False, True])
async def test_a_process_that_was_forgotten_goes_on_with_the_store_that_was_kept(*, switched: bool) -> None:
    old, new = MemoryBackend(StorageConfig()), Second(StorageConfig())
    async with mirrored(old, new) as both:
        await both.write("users/a", b"1")
        await both.start()
        if switched:
            await both.switch()
        await both.stop()
    kept = again(new if switched else old)
    await kept.write("users/a", b"2")
    await kept.write("users/b", b"2")
    async with mirrored(again(old), again(new)) as forgotten:
        assert await forgotten.read("users/a") == b"2"
        await forgotten.write("users/c", b"3")
        await until(lambda: contents(new) == contents(old))
        assert contents(old) == {"users/a": b"2", "users/b": b"2", "users/c": b"3"}


@pytest.mark.parametrize("swapped", [False, True])
async def test_a_store_that_was_left_is_not_made_as_one_that_is_empty_or_another(
    tmp_path: Path, *, swapped: bool
) -> None:
    urls = {name: f"file:{tmp_path / name}" for name in ("left", "kept", "another", "none")}

    def both_of(one: str, other: str) -> str:
        names = (other, one) if swapped else (one, other)
        return f"mirrored:?from={quote(urls[names[0]], safe='')}&to={quote(urls[names[1]], safe='')}"

    for name in ("left", "another"):
        async with StorageManager(StorageConfig(storage_url=urls[name])) as storage:
            await storage.create_user(name)
    url = f"mirrored:?from={quote(urls['left'], safe='')}&to={quote(urls['kept'], safe='')}"
    async with StorageManager(StorageConfig(storage_url=url)) as storage:
        both = storage.backend
        assert isinstance(both, MirroredBackend)
        await both.start()
        assert await both.switch() == 1
        await both.stop()
    for name in ("none", "another"):
        with pytest.raises(ConfigurationError, match=r"was left for another one .* Nothing was changed"):
            async with StorageManager(StorageConfig(storage_url=both_of("left", name))) as storage:
                await storage.create_user("eve")
    for name in ("left", "kept"):
        async with StorageManager(StorageConfig(storage_url=urls[name])) as storage:
            assert [user.user_id for user in await storage.list_users()] == ["left"]
    async with StorageManager(StorageConfig(storage_url=urls["another"])) as storage:
        assert [user.user_id for user in await storage.list_users()] == ["another"]
    async with StorageManager(StorageConfig(storage_url=both_of("left", "kept"))) as storage:
        await storage.create_user("eve")
    async with StorageManager(StorageConfig(storage_url=urls["kept"])) as storage:
        assert [user.user_id for user in await storage.list_users()] == ["eve", "left"]


async def test_a_switch_that_is_decided_is_not_said_to_have_changed_nothing() -> None:
    old, new = MemoryBackend(StorageConfig()), Second(StorageConfig())
    async with mirrored(old, new) as both:
        await both.write("users/a", b"1")
        await both.start()

        async def fail(*_: object) -> None:
            raise UnavailableError("It is down.")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(both._sides, "make_open", fail)
            with pytest.raises(UnavailableError, match="The switch is decided, but"):
                await both.switch()
        assert await both.write("users/b", b"2")
        assert (await both.status()).first == 1


async def test_a_commit_of_many_keys_keeps_its_records_while_it_writes_them() -> None:
    old, new = MemoryBackend(StorageConfig()), Second(StorageConfig())
    async with mirrored(old, new) as both:
        await both.write("users/0", b"")
        await both.start()
        commit, records = old.commit, 0

        async def retiring(changes: Sequence[Change]) -> list[Outcome]:
            nonlocal records
            outcomes = await commit(changes)
            if any(isinstance(change, Put) and "/behind/" in change.key for change in changes):
                records += 1
                both.behind.retire(at_once=True)
            return outcomes

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(old, "commit", retiring)
            await both.commit([Put(f"users/{number}", b"") for number in range(2000)])
        assert records <= 5


# --- how it gets there --------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [line("m4"), line("m4", "another")], ids=["the same", "another"])
@pytest.mark.parametrize("size", [1, 300_000], ids=["small", "large"])
async def test_a_log_that_holds_an_id_twice_is_copied_as_it_is(tmp_path: Path, second: bytes, size: int) -> None:
    old = FlatfileBackend(StorageConfig(), tmp_path / "old")
    new = SqliteBackend(StorageConfig(), str(tmp_path / "new"))
    async with mirrored(old, new) as both:
        await both.commit([Append(LOG, tuple(line(f"m{number}", "x" * size) for number in range(5)))])
        await both.start()
        await both.append(LOG, second)
        await both.start()
        assert (await both.compare()).count == 0
        assert await both.switch() == 1
        assert (await new.read(LOG) or b"").count(b"\n") == 6


@pytest.mark.parametrize("turned", [False, True])
async def test_a_large_log_is_kept_in_rows_and_only_grows(tmp_path: Path, turned: bool) -> None:
    files = FlatfileBackend(StorageConfig(), tmp_path / "old")
    database = SqliteBackend(StorageConfig(), str(tmp_path / "new"))
    old, new = (database, files) if turned else (files, database)
    async with mirrored(old, new) as both:
        await both.commit([Append(CHAT, tuple(line(f"m{number}", "x" * 500) for number in range(4000)))])
        await both.start()
        assert await database._in_thread(lambda contents: contents and contents.place(CHAT).kind) == "log"  # type: ignore[union-attr]
        async with asyncio.timeout(20):
            while (await both.carrier().recorded())[0]:  # noqa: ASYNC110 - it is another thread that copies
                await asyncio.sleep(0.01)
        copied: list[Change] = []
        commit = new.commit

        async def noted(changes: Sequence[Change]) -> list[Outcome]:
            outcomes = await commit(changes)  # it may be refused once, for the mark is another by now
            copied.extend(change for change in changes if getattr(change, "key", "") == CHAT)
            return outcomes

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(new, "commit", noted)
            await both.commit([Append(CHAT, (line("late"),))])
            await until(lambda: not both.behind.count)
        assert copied == [Append(CHAT, (line("late"),))]
        assert await new.read(CHAT) == await old.read(CHAT)


async def test_no_store_keeps_a_state_for_as_long_as_the_other_is_filled(tmp_path: Path) -> None:
    old, new = MemoryBackend(StorageConfig()), Second(StorageConfig())
    for number in range(50):
        await old.write(f"users/{number}", b"x")
    shown, filled = 0, 0

    def watched(store: MemoryBackend) -> Callable[[], Any]:
        still = store.still

        @asynccontextmanager
        async def counted() -> AsyncIterator[Any]:
            nonlocal shown
            async with still() as state:
                shown += 1
                yield state
                shown -= 1

        return counted

    def picks(change: Change) -> bool:
        nonlocal filled
        if isinstance(change, Put) and change.key.startswith("users/"):
            filled += 1
            assert not shown
        return False

    new.held = Held(picks)
    with pytest.MonkeyPatch.context() as patch:
        for store in (old, new):
            patch.setattr(store, "still", watched(store))
        async with mirrored(old, new) as both:
            await both.start()
    assert filled >= 50
    assert contents(new) == contents(old)


# --- processes ---------------------------------------------------------------------------------------------

WRITER = """
import asyncio, sys
from flatfile_chat_database.backends.opening import open_backend
from flatfile_chat_database.backends.changes import Append, Put
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.testing.case import LOG, line

async def main():
    url, name, count = sys.argv[1:]
    both = open_backend(StorageConfig(storage_url=url))
    await both.open()
    for number in range(int(count)):
        put = Put(f"users/{name}{number % 7}", b"%d" % number)
        await both.commit([Append(LOG, (line(f"{name}{number}", "x" * 50),)), put])
        print(f"{name}{number}", flush=True)
    await both.close()

asyncio.run(main())
"""


def url_of(tmp_path: Path) -> str:
    one, other = quote(f"file:{tmp_path / 'old'}", safe=""), quote(f"sqlite:{tmp_path / 'new'}", safe="")
    return f"mirrored:?from={one}&to={other}"


def writer(url: str, name: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, url, name, str(count)], stdout=subprocess.PIPE, text=True, bufsize=1
    )


async def contents_of(backend: StorageBackend) -> dict[str, bytes | None]:
    keys = [key for key in await backend.list_keys("") if not key.startswith(OWN)]
    return dict(zip(keys, await backend.read_many(keys), strict=True))


@pytest.mark.slow
async def test_writers_that_are_killed_leave_nothing_behind_that_is_not_copied(tmp_path: Path) -> None:
    url = url_of(tmp_path)
    said: list[str] = []
    for cycle in range(2):
        programs = [writer(url, f"{name}{cycle}-", 100_000) for name in "pq"]
        for program in programs:
            assert program.stdout is not None
            said += [(await asyncio.to_thread(program.stdout.readline)).strip() for _ in range(10 + 15 * cycle)]
        for program in programs:
            program.send_signal(signal.SIGKILL)
        for program in programs:
            rest = (await asyncio.to_thread(program.communicate))[0]
            said += rest.split("\n")[:-1]
    backend = open_backend(StorageConfig(storage_url=url))
    await backend.open()
    assert isinstance(backend, MirroredBackend)
    try:
        await backend.start()
        assert (await backend.compare()).count == 0
        assert await contents_of(backend.first) == await contents_of(backend.second)
        ids = {each.partition(b'"id":"')[2].partition(b'"')[0].decode() for each in await backend.read_log(LOG)}
        assert set(said) - {""} <= ids
    finally:
        await backend.close()


@pytest.mark.slow
async def test_processes_go_on_writing_while_the_command_switches(tmp_path: Path) -> None:
    url = url_of(tmp_path)
    programs = [writer(url, name, 60) for name in "pq"]
    for program in programs:
        assert program.stdout is not None
        await asyncio.to_thread(program.stdout.readline)
    runner = CliRunner()
    for _ in range(3):
        result = await asyncio.to_thread(runner.invoke, cli, ["--store", url, "mirror", "switch"])
        assert result.exit_code == 0, result.output
    said = []
    for program in programs:
        said += (await asyncio.to_thread(program.communicate))[0].split()
        assert program.returncode == 0
    assert len(said) == 2 * 59
    backend = open_backend(StorageConfig(storage_url=url))
    await backend.open()
    assert isinstance(backend, MirroredBackend)
    try:
        await backend.start()
        assert (await backend.status()).first == 1
        assert await contents_of(backend.first) == await contents_of(backend.second)
        assert await backend.count_log(LOG) == 120
    finally:
        await backend.close()


@pytest.mark.slow
async def test_files_are_mirrored_to_postgresql_and_back(tmp_path: Path) -> None:
    target = quote(postgres.empty_store(), safe="")
    url = f"mirrored:?from={quote(f'file:{tmp_path}/old', safe='')}&to={target}"
    alone = open_backend(StorageConfig(storage_url=f"file:{tmp_path}/old"))
    async with StorageManager(alone.config, backend=alone) as storage:
        await storage.create_user("ada")
        session = await storage.create_session("ada", "before")
        await storage.add_message("ada", session, Message("user", "first"))
    both = open_backend(StorageConfig(storage_url=url))
    assert isinstance(both, MirroredBackend)
    async with StorageManager(both.config, backend=both) as storage:
        await both.start()
        await storage.add_message("ada", session, Message("user", "second"))
        await storage.save_document("ada", session, "a.txt", b"\0" * (1 << 21))
        await both.start()
        assert (await both.compare()).count == 0
        assert await both.switch() == 1
        await storage.add_message("ada", session, Message("user", "third"))
        await storage.save_document("ada", session, "b.txt", b"\1")
        assert await both.switch() == 0
        assert [message.content for message in await storage.get_messages("ada", session)] == [
            "first",
            "second",
            "third",
        ]
        assert (await both.compare()).count == 0
        await both.stop()
        assert await contents_of(both.first) == await contents_of(both.second)


# --- a second store that is none to be copied to ------------------------------------------------------------


async def a_store(url: str, user: str) -> None:
    async with StorageManager(StorageConfig(storage_url=url)) as storage:
        await storage.create_user(user)


def of_two(one: str, other: str) -> StorageConfig:
    return StorageConfig(storage_url=f"mirrored:?from={quote(one, safe='')}&to={quote(other, safe='')}")


@pytest.mark.parametrize("first", ["a store", "nothing"])
@pytest.mark.parametrize("kind", ["file", "sqlite"])
async def test_a_second_store_that_is_another_store_is_left_as_it_is(first: str, kind: str, tmp_path: Path) -> None:
    one, other = f"file:{tmp_path}/one", f"{kind}:{tmp_path}/other"
    if first == "a store":
        await a_store(one, "ada")
    await a_store(other, "eve")
    config = of_two(one, other)
    for _ in range(2):
        async with StorageManager(config) as storage:
            with pytest.raises(ConfigurationError, match="is not empty, and is no copy of the first one"):
                await storage.create_user("new")
        backend = open_backend(config)
        assert isinstance(backend, MirroredBackend)
        await backend.open()
        assert "no copy of the first one" in (await backend.status()).problem
        with pytest.raises(ConfigurationError, match="the right way round"):
            await backend.start()
        await backend.close()
    for url, users in ((one, ["ada"] if first == "a store" else []), (other, ["eve"])):
        async with StorageManager(StorageConfig(storage_url=url)) as storage:
            assert [user.user_id for user in await storage.list_users()] == users
            assert LAYOUT.mirror not in await storage.backend.list_children("system")


async def test_a_second_store_that_takes_the_place_of_the_one_before_is_looked_at_as_well(tmp_path: Path) -> None:
    one, other = f"file:{tmp_path}/one", f"file:{tmp_path}/other"
    await a_store(one, "ada")
    await a_store(other, "eve")
    async with StorageManager(of_two(one, f"file:{tmp_path}/before")) as storage:
        await storage.create_user("bob")
    backend = open_backend(of_two(one, other))
    assert isinstance(backend, MirroredBackend)
    await backend.open()
    with pytest.raises(ConfigurationError, match="no copy of the first one"):
        await backend.start()
    await backend.close()
    async with StorageManager(StorageConfig(storage_url=other)) as storage:
        assert [user.user_id for user in await storage.list_users()] == ["eve"]
    empty = open_backend(of_two(one, f"file:{tmp_path}/empty"))
    assert isinstance(empty, MirroredBackend)
    await empty.open()
    await empty.start()
    assert (await empty.compare()).count == 0
    await empty.close()
    async with StorageManager(StorageConfig(storage_url=f"file:{tmp_path}/empty")) as storage:
        assert [user.user_id for user in await storage.list_users()] == ["ada", "bob"]


async def test_a_second_store_that_holds_something_but_no_store_is_left_as_it_is(tmp_path: Path) -> None:
    await a_store(f"file:{tmp_path}/one", "ada")
    lost = tmp_path / "other/users/eve/profile.json"
    lost.parent.mkdir(parents=True)
    lost.write_bytes(b"{}")
    async with StorageManager(of_two(f"file:{tmp_path}/one", f"file:{tmp_path}/other")) as storage:
        with pytest.raises(ConfigurationError, match="no copy of the first one"):
            await storage.create_user("new")
    assert lost.read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("one", "other", "problem"),
    [
        ("file:{}/a", "file:{}/./a", "are the same store"),
        ("sqlite:{}/a/x.db", "sqlite:{}/a/./x.db", "are the same store"),
        ("file:{}/a", "file:{}/a/b", "second store lies in the first store's folder"),
        ("file:{}/a/b", "file:{}/a", "first store lies in the second store's folder"),
    ],
)
async def test_stores_in_one_place_are_no_two(one: str, other: str, problem: str, tmp_path: Path) -> None:
    config = of_two(one.format(tmp_path), other.format(tmp_path))
    await a_store(one.format(tmp_path), "ada")
    before = sorted(tmp_path.rglob("*.json"))
    async with StorageManager(config) as storage:
        with pytest.raises(ConfigurationError, match=problem):
            await storage.create_user("new")
    assert sorted(tmp_path.rglob("*.json")) == before


async def test_two_names_of_one_server_are_no_two_stores() -> None:
    """Of those only what is written there can tell."""
    one = MemoryBackend(StorageConfig())
    other = MemoryBackend(StorageConfig())
    other._data = one._data
    await one.write("users/ann/profile.json", b"1")
    async with mirrored(one, other) as both:
        with pytest.raises(ConfigurationError, match="are the same store"):
            await both.write("users/ann/profile.json", b"2")
    assert contents(one) == {"users/ann/profile.json": b"1"}
    assert not [key for key in one._data if LAYOUT.is_of_mirror(key)]


# --- the URL and the commands ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rest",
    ["", "?", "?from=file:a", "?from=file:a&to=b", "?from=b&to=file:a", "?from=file:a&to=sqlite:b&x=1", "x"],
)
def test_a_mirrored_url_names_two_stores(rest: str) -> None:
    with pytest.raises(ConfigurationError, match="names two stores"):
        open_backend(StorageConfig(storage_url=f"mirrored:{rest}"))


def test_a_mirrored_url_names_no_store_twice() -> None:
    with pytest.raises(ConfigurationError, match=r"the same place twice\. Give from and to one each"):
        open_backend(StorageConfig(storage_url="mirrored:?from=file:a&to=file:a"))


def test_the_commands(tmp_path: Path) -> None:
    url = url_of(tmp_path)

    async def prepare() -> None:
        async with StorageManager(StorageConfig(storage_base_path=str(tmp_path / "old"))) as storage:
            await storage.create_user("ada")

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["--store", url, "mirror", *arguments], prog_name="chatdb")
        return result.exit_code, result.output

    code, text = run("start")
    assert (code, text) == (1, f"chatdb: There is no chat store at file:{tmp_path}/old. Look at `from` in the URL.\n")
    assert list(tmp_path.iterdir()) == []
    asyncio.run(prepare())
    code, text = run("start")
    assert (code, f"first   file:{tmp_path / 'old'}\n" in text, "epoch 1" in text) == (0, True, True), text
    assert run("compare") == (0, "Compared: 2 keys, of which 0 differ.\n")
    assert run("switch") == (0, f"The first store is sqlite:{tmp_path / 'new'} now.\n")
    code, text = run("status")
    assert (code, text.startswith(f"first   sqlite:{tmp_path / 'new'}\n")) == (0, True)
    (tmp_path / "old/users/ada/profile.json").write_bytes(b"{}")
    assert run("compare") == (
        1,
        "differs  users/ada/profile.json\nCompared: 2 keys, of which 1 differ.\n",
    )
    assert run("compare", "--fix")[0] == 0
    assert run("stop") == (0, f"The mirroring has ended. The store is sqlite:{tmp_path / 'new'}.\n")
    result = CliRunner().invoke(cli, ["--store", str(tmp_path / "old"), "mirror", "status"])
    assert (result.exit_code, "must be mirrored" in result.output) == (2, True)
