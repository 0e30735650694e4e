"""Two stores at once: the contract, and nothing lost when one is down, a writer dies, or the stores are switched."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from click.testing import CliRunner

from flatfile_chat_database import Message, StorageConfig, StorageManager
from flatfile_chat_database.backends import copying
from flatfile_chat_database.backends.alike import Alike
from flatfile_chat_database.backends.base import Capability, StorageBackend, open_backend
from flatfile_chat_database.backends.changes import Append, Change, Delete, Move, Outcome, Put
from flatfile_chat_database.backends.flatfile import FlatfileBackend
from flatfile_chat_database.backends.memory import MemoryBackend
from flatfile_chat_database.backends.mirrored import MirroredBackend
from flatfile_chat_database.backends.sqlite import SqliteBackend
from flatfile_chat_database.cli import cli
from flatfile_chat_database.errors import ConfigurationError, UnavailableError
from flatfile_chat_database.layout import Layout
from flatfile_chat_database.testing.case import LOG, line
from flatfile_chat_database.testing.contract import BackendContract

LAYOUT = Layout(StorageConfig())
OWN = f"{LAYOUT.mirror}/"


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
class TestMirroredFiles(BackendContract):
    """Files and SQLite."""

    capabilities = FlatfileBackend.capabilities & SqliteBackend.capabilities

    @pytest.fixture(autouse=True)
    def medium(self, tmp_path: Path) -> None:
        self.root = tmp_path / "store"
        self.other = tmp_path / "other.sqlite3"

    def make_backend(self, config: StorageConfig) -> StorageBackend:
        return MirroredBackend(config, FlatfileBackend(config, self.root), SqliteBackend(config, str(self.other)))

    def peek(self, key: str) -> bytes | None:
        path = self.root / key
        return path.read_bytes() if path.is_file() else None

    def poke(self, key: str, data: bytes) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def peek_keys(self) -> list[str]:
        paths = (path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if not path.is_dir())
        return sorted(path for path in paths if not LAYOUT.is_own(path) and not path.startswith((OWN, ".")))

    def is_untouched(self) -> bool:
        return not self.root.exists()

    def hinder(self) -> bool:
        self.root.joinpath("system/journal").mkdir(exist_ok=True)
        (self.root / "system/journal/00000001.jsonl").write_text("no journal\n")
        return True

    def break_folder(self, folder: str) -> bool:
        path = self.root / folder
        path.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(path.name, path)
        return True


# --- two stores --------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody wait long for the second store."""
    monkeypatch.setattr(copying, "_RETRY_SECONDS", (0.02, 0.05))


class Second(MemoryBackend):
    """A store that can be down, or slow."""

    down = False
    slow = 0.0

    async def commit(self, changes: Sequence[Change]) -> list[Outcome]:
        await asyncio.sleep(self.slow)
        if self.down:
            raise UnavailableError("It is down.")
        return await super().commit(changes)

    async def read(self, key: str) -> bytes | None:
        if self.down:
            raise UnavailableError("It is down.")
        return await super().read(key)


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
        await until(lambda: not any(key.startswith(LAYOUT.mirror_records) for key in list(old._data)))
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
        assert [key for key in [*old._data, *new._data] if key.startswith(OWN)] == []
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
        with pytest.MonkeyPatch.context() as patch:

            async def die(*_: object) -> None:
                raise KeyboardInterrupt

            patch.setattr(both._sides, "make_open", die)
            with pytest.raises(KeyboardInterrupt):
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
        late = Alike(LAYOUT, again(old), again(new))
        await both.switch()
        await both.write("users/a", b"2")
        await old.write("users/a", b"late")
        with pytest.raises(Exception, match="permission to copy to this store"):
            await late.make("users/a")
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
            await late.make(LOG)
        assert 0 < grown < 5
        assert new._data[LOG] == await old.read(LOG)


# --- processes ---------------------------------------------------------------------------------------------

WRITER = """
import asyncio, sys
from flatfile_chat_database.backends.base import open_backend
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
    for cycle in range(6):
        programs = [writer(url, f"{name}{cycle}-", 100_000) for name in "pq"]
        for program in programs:
            assert program.stdout is not None
            said += [(await asyncio.to_thread(program.stdout.readline)).strip() for _ in range(15 + 7 * cycle)]
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
    programs = [writer(url, name, 400) for name in "pq"]
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
    assert len(said) == 2 * 399
    backend = open_backend(StorageConfig(storage_url=url))
    await backend.open()
    assert isinstance(backend, MirroredBackend)
    try:
        await backend.start()
        assert (await backend.status()).first == 1
        assert await contents_of(backend.first) == await contents_of(backend.second)
        assert await backend.count_log(LOG) == 800
    finally:
        await backend.close()


# --- the URL and the commands ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rest",
    ["", "?", "?from=file:a", "?from=file:a&to=file:a", "?from=file:a&to=b", "?from=file:a&to=sqlite:b&x=1", "x"],
)
def test_a_mirrored_url_names_two_stores(rest: str) -> None:
    with pytest.raises(ConfigurationError, match="names two stores"):
        open_backend(StorageConfig(storage_url=f"mirrored:{rest}"))


def test_the_commands(tmp_path: Path) -> None:
    url = url_of(tmp_path)

    async def prepare() -> None:
        async with StorageManager(StorageConfig(storage_base_path=str(tmp_path / "old"))) as storage:
            await storage.create_user("ada")

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["--store", url, "mirror", *arguments], prog_name="chatdb")
        return result.exit_code, result.output

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
