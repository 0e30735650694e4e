"""The S3 backend on Ceph: the contract, looked at with a client of the tests' own, and what only it does."""

import asyncio
import json
import logging
import socket
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from flatfile_chat_database import Message, StorageManager
from flatfile_chat_database.backends.base import Capability, StorageBackend
from flatfile_chat_database.backends.changes import (
    ABSENT,
    Append,
    Delete,
    Edit,
    Move,
    Put,
    RemoveTree,
    Require,
    Truncate,
)
from flatfile_chat_database.backends.opening import open_backend
from flatfile_chat_database.backends.s3 import S3Backend, appending
from flatfile_chat_database.backends.s3.objects import Objects
from flatfile_chat_database.check import check
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.errors import (
    ConfigurationError,
    ConflictError,
    IntegrityError,
    NotFoundError,
    StorageError,
    UnavailableError,
)
from flatfile_chat_database.testing.case import LOG, bare, ids, line, lines
from flatfile_chat_database.testing.contract import BackendContract

from . import s3
from .servers import SECRET_KEY, rclone_server

pytestmark = pytest.mark.slow


class TestS3(BackendContract):
    """Objects, looked at one by one."""

    capabilities = frozenset(
        {
            Capability.PERSISTENT,
            Capability.PROCESSES,
            Capability.ATOMIC_APPEND,
            Capability.STREAMED_BLOBS,
            Capability.EXTENTS,
        }
    )

    @pytest.fixture(autouse=True)
    def medium(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        self.url = s3.empty_store()

    def make_backend(self, config: StorageConfig) -> StorageBackend:
        config.storage_url = self.url
        return S3Backend(config)

    def peek(self, key: str) -> bytes | None:
        return s3.peek(self.url, key)

    def poke(self, key: str, data: bytes) -> None:
        s3.put(self.url, key, data)

    def peek_keys(self) -> list[str]:
        return s3.peek_keys(self.url)


# --- what only object stores do ----------------------------------------------------------------------------

OWNER = Require("users/ann/chat/session.json", "It")


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return s3.empty_store()


@asynccontextmanager
async def opened(url: str, **settings: Any) -> AsyncIterator[S3Backend]:
    backend = S3Backend(StorageConfig(storage_url=url, **settings))
    await backend.open()
    try:
        yield backend
    finally:
        await backend.close()


def requests(store: S3Backend) -> int:
    """Return how many requests were made."""
    return sum(store.statistics()[kind] for kind in ("gets", "heads", "puts", "lists", "deletes"))


async def folded(store: S3Backend, key: str = LOG) -> None:
    """Fold what is in a log's segments into its head."""
    await asyncio.to_thread(store._appender.fold, key)


async def test_people_find_what_they_know_from_files(url: str) -> None:
    async with StorageManager(StorageConfig(storage_url=url)) as storage:
        await storage.create_user("ada")
        session = await storage.create_session("ada", "Tea")
        await storage.add_message("ada", session, Message("user", "Milk first"))
        await storage.save_document("ada", session, "note.txt", b"bytes")
    keys = s3.peek_keys(url)
    assert {key for key in keys if not key.startswith("system/")} == {
        "users/ada/profile.json",
        f"users/ada/{session}/documents/metadata.json",
        f"users/ada/{session}/documents/note.txt",
        f"users/ada/{session}/messages.jsonl",
        f"users/ada/{session}/session.json",
    }
    assert s3.get(url, f"users/ada/{session}/documents/note.txt") == b"bytes"
    assert b"Milk first" in (s3.get(url, f"users/ada/{session}/messages.jsonl") or b"")


async def test_files_that_were_copied_into_a_bucket_are_a_store(url: str, tmp_path: Path) -> None:
    async with StorageManager(StorageConfig(storage_base_path=str(tmp_path / "files"))) as storage:
        await storage.create_user("ada")
        session = await storage.create_session("ada", "Tea")
        for number in range(3):
            await storage.add_message("ada", session, Message("user", f"text {number}"))
    for path in (tmp_path / "files").rglob("*.json*"):
        name = path.relative_to(tmp_path / "files").as_posix()
        if not name.startswith("system/journal"):
            s3.put(url, name, path.read_bytes())
    async with StorageManager(StorageConfig(storage_url=url)) as storage:
        await storage.add_message("ada", session, Message("user", "text 3"))
        assert [each.content for each in await storage.get_messages("ada", session)] == [f"text {n}" for n in range(4)]
        assert (await check(storage.backend)).problems == []


async def test_callers_at_once_share_a_put(url: str) -> None:
    async with opened(url) as store:
        await store.commit([Put(OWNER.key, b"{}"), Append(LOG, lines(1))])
        await store.commit([OWNER, Append(LOG, lines(1, 1))])
        before = store.statistics()
        work = [store.commit([OWNER, Append(LOG, lines(1, 2 + number))]) for number in range(100)]
        assert await asyncio.gather(*work) == [[None, 1]] * 100
        assert store.statistics()["puts"] - before["puts"] == 1
        assert await store.read_log(LOG) == bare(lines(102))
        absent = store.commit([Require("absent", "It"), Append(LOG, lines(1, 102))])
        there = store.commit([OWNER, Append(LOG, lines(1, 102))])
        results = await asyncio.gather(absent, there, return_exceptions=True)
        assert isinstance(results[0], NotFoundError) and results[1] == [None, 1]


async def test_the_newest_page_takes_three_requests_at_most(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(url) as store, opened(url) as reader:
        monkeypatch.setattr(store._appender, "fold_one", lambda: False)  # in the midst of a look it costs it two more
        for number in range(150):
            await store.commit([Append(LOG, lines(1, number))])
            if number in (65, 139):
                await folded(store)
            if number % 10 == 9:
                before = requests(reader)
                assert await reader.read_log(LOG, -101) == bare(lines(number + 1))[-101:]
                assert requests(reader) - before <= 3
        before = requests(reader)
        assert await reader.count_log(LOG) == 150
        assert await reader.newest_records([LOG]) == bare(lines(1, 149))
        assert requests(reader) - before <= 6


async def test_a_small_append_behind_a_large_one_repeats_some_of_it(url: str) -> None:
    written = [line(f"m{number}", "x" * 500) for number in range(3000)]
    async with opened(url) as store, opened(url) as reader:
        await store.commit([Append(LOG, tuple(written[:1]))])
        await store.commit([Append(LOG, tuple(written[1:2990]))])
        for number in range(2990, 3000):
            await store.commit([Append(LOG, (written[number],))])
            before = requests(reader)
            assert await reader.read_log(LOG, -101) == bare(written[: number + 1])[-101:]
            assert requests(reader) - before <= 3
        assert await reader.read_log(LOG, strict=True) == bare(written)
        assert s3.peek(url, LOG) == b"".join(written)


async def test_a_log_is_folded_and_its_pages_are_found(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = [line(f"m{number}", f"{number} " + "x" * 200) for number in range(9000)]
    async with opened(url) as store, opened(url) as reader:
        for start in range(0, 9000, 600):
            await store.commit([Append(LOG, tuple(written[start : start + 600]))])
            if start % 1800 == 0:
                await folded(store)
        await folded(store)
        facts, rest = s3.manifest(url, LOG) or ({}, b"")
        assert len(facts["parts"]) > 1 and rest == b"".join(written[-110:])
        assert len([path for path in s3.paths(url) if "/segments/" in path]) == 1, "what is folded is removed"
        for start in (0, 63, 64, 65, 4000, 8850, 8899, 8900, 8950):
            assert await reader.read_log(LOG, start, start + 100) == bare(written[start : start + 100])
        assert await reader.read_log(LOG, -100) == bare(written[-100:])
        assert await reader.find_record(LOG, "m4321") == (4321, written[4321][:-1])
        assert await reader.find_record(LOG, "m8950") == (8950, written[8950][:-1])
        assert [record async for run in reader.stream_log(LOG) for record in run] == bare(written)
        before = requests(reader)
        assert await reader.read_log(LOG, 4000, 4100) == bare(written[4000:4100])
        assert requests(reader) - before <= 3
    async with opened(url) as again:
        added = await again.commit([Append(LOG, (written[5], line("new"), written[8999]))])
        assert added == [1], "ids are known after reopening, also those in parts"
        assert await again.read_log(LOG, -2) == bare([written[-1], line("new")])
        await folded(again)
        assert await again.commit([Append(LOG, (line("new"),))]) == [0], "it is known after folding, too"
        assert await again.commit([Truncate(LOG, 1)]) == [[line("new")[:-1]]]
        await again.commit([Edit(LOG, "m4000", written[4000], None)])
        assert await again.count_log(LOG) == 8999
        assert (await again.verify()) == []


async def test_what_many_folded_and_read_at_once_is_whole(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appending, "_FOLDED_AFTER", 2)
    async with opened(url) as one, opened(url) as two, opened(url) as reader:
        is_over = False

        async def write(store: S3Backend, name: str) -> None:
            for number in range(60):
                await store.commit([Append(LOG, (line(f"{name}-{number}", "x" * 900),))])

        async def read() -> None:
            count = 0
            while not is_over:
                found = ids(await reader.read_log(LOG))
                assert len(found) == len(set(found)) >= count, "what was there once is gone"
                count = len(found)
                assert len(await reader.read_log(LOG, -5)) == min(5, count) or count < 5

        reading = asyncio.ensure_future(read())
        await asyncio.gather(write(one, "a"), write(two, "b"))
        is_over = True
        await reading
        found = [str(each) for each in ids(await reader.read_log(LOG, strict=True))]
        for name in "ab":
            assert [each for each in found if each.startswith(name)] == [f"{name}-{number}" for number in range(60)]


# --- what changes between two nodes ------------------------------------------------------------------------


async def test_appends_go_on_while_another_node_edits_cuts_and_moves(url: str) -> None:
    async with opened(url) as one, opened(url) as two:
        acknowledged = [f"old {number}" for number in range(10)]
        await one.commit([Append(LOG, (line("first", "0"), *map(line, acknowledged)))])
        popped: list[bytes] = []

        async def add() -> None:
            for number in range(60):
                assert await one.commit([Append(LOG, (line(f"m{number}"),))]) == [1]
                acknowledged.append(f"m{number}")

        async def change() -> None:
            for number in range(8):
                old = line("first", str(number))
                await two.commit([Edit(LOG, "first", old, line("first", str(number + 1)))])
                [dropped] = await two.commit([Truncate(LOG, 1)])
                assert isinstance(dropped, list)
                popped.extend(each for each in dropped if isinstance(each, bytes))

        await asyncio.gather(add(), change())
        gone = ids(popped)
        assert "first" not in gone
        left = ids(await one.read_log(LOG, strict=True))
        assert left[0] == "first"
        assert sorted(map(str, [*left[1:], *gone])) == sorted(acknowledged), "each is in the log, or was given out once"
        assert await two.read_log(LOG, 0, 1) == [line("first", "8")[:-1]]
        assert await one.verify() == []


async def test_a_log_that_is_moved_away_takes_all_that_was_acknowledged_with_it(url: str) -> None:
    async with opened(url) as one, opened(url) as two:
        for turn in range(6):
            await one.commit([Put(OWNER.key, b"{}"), Append(LOG, (line(f"{turn}-0"),))])
            acknowledged = [f"{turn}-0"]

            async def add(turn: int, acknowledged: list[str]) -> None:
                for number in range(1, 200):
                    try:
                        await one.commit([OWNER, Append(LOG, (line(f"{turn}-{number}"),))])
                    except NotFoundError:
                        return
                    acknowledged.append(f"{turn}-{number}")

            async def move(turn: int) -> None:
                await asyncio.sleep(0.01 * turn)
                await two.commit(
                    [Require(OWNER.key, "It"), Move("users/ann/chat", f"system/trash/{turn}/users/ann/chat")]
                )

            await asyncio.gather(add(turn, acknowledged), move(turn))
            moved = ids(await two.read_log(f"system/trash/{turn}/{LOG}", strict=True))
            later = ids(await two.read_log(LOG, strict=True))  # what came between the owner's check and the append
            assert [*moved, *later] == acknowledged
            await one.commit([RemoveTree("users")])
        assert await one.verify() == []


async def test_a_log_that_a_dead_process_closed_is_opened_again(url: str) -> None:
    async with opened(url) as one, opened(url) as two:
        await one.commit([Append(LOG, lines(1))])
        await one.commit([Append(LOG, lines(1, 1))])
        assert await asyncio.to_thread(two._contents.look, LOG, lambda log: log and two._appender.seal(log))
        assert await two.read_log(LOG) == bare(lines(2))
        assert await one.commit([Append(LOG, lines(1, 2))]) == [1]
        assert await two.read_log(LOG, strict=True) == bare(lines(3))
        assert await one.verify() == []


def _version(data: bytes) -> str:
    from flatfile_chat_database.backends.rules import version_of

    return version_of(data)


# --- objects that are not as they were -----------------------------------------------------------------------


async def _damaged(url: str) -> tuple[list[str], str]:
    """Make a log with parts and segments; return the paths of these, and of the newest segment."""
    async with opened(url) as store:
        await store.commit([Append(LOG, tuple(line(f"a{number}") for number in range(500)))])
        await store.commit([Append(LOG, lines(1))])
        await folded(store)
        for number in range(1, 4):
            await store.commit([Append(LOG, tuple(line(f"m{number}-{each}") for each in range(120)))])
    paths = sorted(path for path in s3.paths(url) if path.startswith(s3.OWN))
    return paths, max(path for path in paths if "/segments/" in path)


@pytest.mark.parametrize("how", ["missing", "cut", "foreign", "of another log"])
@pytest.mark.parametrize("what", ["segment", "part", "segment between"])
async def test_an_object_that_is_missing_or_damaged_is_named(url: str, what: str, how: str) -> None:
    paths, newest = await _damaged(url)
    segments = [path for path in paths if "/segments/" in path]
    path = {"segment": newest, "segment between": segments[-2]}.get(what) or next(p for p in paths if "/parts/" in p)
    data = s3.get(url, path) or b""
    if how == "missing":
        s3.delete(url, path)
    elif how == "cut":
        s3.put(url, path, data[: len(data) // 2])
    elif how == "foreign":
        s3.put(url, path, b"x" * len(data))
    else:
        s3.put(url, path, data.replace(b'"at":', b'"at":9'))
    is_noticed = not (what == "segment" and how == "missing") and not (what == "part" and how == "of another log")
    async with opened(url) as store:
        found = [problem for problem in await store.verify() if not problem.harmless]
        if is_noticed:
            assert [(problem.kind, problem.key) for problem in found] == [("damaged-object", LOG)]
            with pytest.raises(IntegrityError) as caught:
                await store.read(LOG)
            assert caught.value.key == LOG and path in str(caught.value)
        else:
            assert found == []
        assert await store.write("beside", b"x")


async def test_a_manifest_that_is_damaged_is_named(url: str) -> None:
    async with opened(url) as store:
        for data in (b'{"chatdb":', b'{"chatdb":"log"}', b'{"chatdb":"else"}\n', b'{"chatdb":7}\nrest'):
            s3.put(url, "a", data)
            with pytest.raises(IntegrityError, match="a: the manifest"):
                await store.read("a")
            assert [problem.kind for problem in await store.verify()] == ["damaged-object"]
        await store.commit([Delete("b")])
        assert await store.write("b", b'{"chatdb":"a document that begins like this"}')
        assert await store.read("b") == b'{"chatdb":"a document that begins like this"}'


async def test_what_nothing_refers_to_is_removed_when_it_is_old(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(url) as store:
        await store.write("a", b"x" * 300_000)
        s3.put(url, f"{s3.OWN}parts/abandoned", b"x")
        s3.put(url, f"{s3.OWN}segments/gone/000000000001", b"x")
        assert await store.verify() == []
        from datetime import timedelta

        from flatfile_chat_database.backends.s3 import verifying

        monkeypatch.setattr(verifying, "_ABANDONED", timedelta(seconds=-60))  # however clocks differ
        assert {problem.kind for problem in await store.verify()} == {"leftover"}
        assert all(problem.fixed for problem in await store.verify(fix=True))
        assert await store.verify() == []
        assert await store.read("a") == b"x" * 300_000


# --- stores that cannot be used ------------------------------------------------------------------------------


def shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ("s3://user:hunter2@bucket/x", "user or a password"),
        ("s3://hunter2@bucket", "user or a password"),
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("s3://b", "names no bucket"),
        ("s3://bucket/a//b", "no key"),
        ("s3://bucket/../b", "no key"),
        ("s3://bucket/x?password=hunter2", "no parameter"),
        ("s3://bucket/x?endpoint=ftp://host", "no http"),
        ("s3://bucket/x?endpoint=http://me:hunter2@host", "no http"),
        ("s3://bucket/x?region=a&region=b", "twice"),
        ("s3://bucket/x?nonsense", "names no bucket"),
        ("s3://bucket/x#y", "names no bucket"),
    ],
)
def test_a_url_that_is_wrong_is_told_without_its_secrets(wrong: str, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match) as caught:
        open_backend(StorageConfig(storage_url=wrong))
    assert "hunter2" not in shown(caught.value)


async def _refused(url: str, error: type[StorageError], match: str, **settings: Any) -> None:
    """Reading or writing there fails with this error, soon, and shows no secret."""
    backend = S3Backend(StorageConfig(storage_url=url, object_store_retries=1, **settings))
    try:
        with pytest.raises(error, match=match) as caught:
            await backend.open()
            await backend.write("a", b"x")
        assert SECRET_KEY not in shown(caught.value) and SECRET_KEY not in repr(backend)
        assert caught.value.hint
    finally:
        await backend.close()


async def test_a_bucket_that_is_missing_and_wrong_keys_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    s3.let_in()
    there = s3.url_of(s3.server())
    await _refused(s3.url_of(s3.server(), "nobucket"), ConfigurationError, "bucket does not exist")
    with monkeypatch.context() as patches:
        patches.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
        await _refused(there, ConfigurationError, "secret key")
    with monkeypatch.context() as patches:
        patches.setenv("AWS_ACCESS_KEY_ID", "nobody")
        await _refused(there, ConfigurationError, "access key")
    assert SECRET_KEY not in caplog.text and "hunter2" not in caplog.text


async def test_a_bucket_that_may_only_be_read_is_read(url: str) -> None:
    async with opened(url) as store:
        await store.commit([Put("a", b"x"), Append(LOG, lines(3))])
    with s3.read_only():
        await _refused(url, UnavailableError, "denies access")
        async with opened(url) as store:
            assert await store.read("a") == b"x"
            assert await store.read_log(LOG) == bare(lines(3))
            with pytest.raises(UnavailableError, match="denies access"):
                await store.commit([Append(LOG, lines(1, 3))])
            assert await store.read_log(LOG) == bare(lines(3))


async def test_a_server_that_is_silent_or_away_is_told_in_time(tmp_path: Path) -> None:
    s3.let_in()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"s3://{s3.BUCKET}/x?endpoint=http://127.0.0.1:{silent.getsockname()[1]}"
        await _refused(url, UnavailableError, "in time", object_store_timeout_seconds=0.3)
    await _refused(url, UnavailableError, "cannot be reached")


async def test_a_server_that_ignores_conditions_is_for_a_single_writer(tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    s3.let_in()
    with rclone_server(tmp_path) as server:
        url = s3.url_of(server, "bucket", "x")
        await _refused(url, ConfigurationError, "ignores the conditions")
        assert not [path for path in (tmp_path / "bucket").rglob("*") if path.is_file()], "nothing is left"
        config = StorageConfig(
            storage_url=url, object_store_single_writer=True, search_index_path=str(tmp_path / "index")
        )
        async with StorageManager(config) as storage:
            await storage.create_user("ada")
            assert not await storage.create_user("ada")
            session = await storage.create_session("ada")
            await asyncio.gather(
                *(storage.add_message("ada", session, Message("user", f"text {number}")) for number in range(20))
            )
            assert await storage.count_messages("ada", session) == 20
            assert len(await storage.search_messages("ada", "text")) == 20
            assert await storage.delete_session("ada", session)
            assert (await check(storage.backend)).clean


def test_without_the_extra_the_error_names_it() -> None:
    program = (
        "import sys; sys.modules['obstore'] = None\n"
        "from flatfile_chat_database import StorageConfig, StorageManager\n"
        "from flatfile_chat_database.backends.opening import open_backend\n"
        "try: open_backend(StorageConfig(storage_url='s3://bucket/x'))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "ConfigurationError" in done.stdout and "flatfile-chat-database[s3]" in done.stdout


# --- requests that fail --------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrives", [True, False])
async def test_a_put_whose_answer_is_lost_is_known_again_and_not_repeated(url: str, arrives: bool) -> None:
    send = Objects._send
    lost: list[str] = []

    def lose(self: Objects, path: str, data: bytes, mode: Any, token: str) -> str:
        if token and path not in lost:
            lost.append(path)
            if arrives:
                send(self, path, data, mode, token)
            raise OSError("connection closed before message completed")
        return send(self, path, data, mode, token)

    async with opened(url) as store, opened(url) as other:
        await other.write("ready", b"x")
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(Objects, "_send", lose)
            assert await store.commit([Put("a", b"1", ABSENT)])
            assert await store.commit([Append(LOG, lines(2))]) == [2]
            for number in range(2, 6):
                assert await store.commit([Append(LOG, lines(1, number))]) == [1]
            assert await store.append("raw", b"once\n") and await store.append("raw", b"twice\n")
            assert await store.commit([Put("a", b"2", _version(b"1")), Put("b", b"2", ABSENT)])
            assert await store.commit([Edit(LOG, "m0", lines(1)[0], line("m0", "new"))]) == [None]
            with pytest.raises(ConflictError):
                await store.commit([Put("a", b"3", ABSENT)])
        assert len(lost) > 8
        assert await other.read_many(["a", "b", "raw"]) == [b"2", b"2", b"once\ntwice\n"]
        assert await other.read_log(LOG, strict=True) == bare([line("m0", "new"), *lines(5, 1)])
        assert await other.verify() == []


async def test_the_same_bytes_from_two_writers_are_two_writes(url: str) -> None:
    async with opened(url) as one, opened(url) as two:
        results = await asyncio.gather(
            *(store.commit([Put("a", b"same", ABSENT)]) for store in (one, two) * 5), return_exceptions=True
        )
        assert sum(isinstance(result, ConflictError) for result in results) == 9


async def test_what_stands_in_a_head_is_json(url: str) -> None:
    async with opened(url) as store:
        await store.write_blob("blob", _many(b"x" * 100_000, 30))
        facts, rest = s3.manifest(url, "blob") or ({}, b"")
        assert facts["chatdb"] == "bytes" and rest == b""
        [[name, size, *_]] = facts["parts"]
        assert size == 3_000_000 and s3.get(url, f"{s3.OWN}parts/{name}") == b"x" * 3_000_000
        assert json.dumps(facts)


async def _many(piece: bytes, count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield piece
