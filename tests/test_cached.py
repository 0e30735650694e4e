"""A store with a cache in front of it: the contract, and nothing stale whatever happens to the cache."""

import asyncio
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast
from urllib.parse import quote

import pytest
import redis
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from flatfile_chat_database import StorageConfig, StorageManager, codec
from flatfile_chat_database.addresses import without_password
from flatfile_chat_database.backends.base import StorageBackend
from flatfile_chat_database.backends.cached import CachedBackend
from flatfile_chat_database.backends.cached import server as server_module
from flatfile_chat_database.backends.cached.server import Server
from flatfile_chat_database.backends.flatfile import FlatfileBackend
from flatfile_chat_database.backends.memory import MemoryBackend
from flatfile_chat_database.backends.opening import open_backend
from flatfile_chat_database.errors import ConfigurationError
from flatfile_chat_database.layout import Layout
from flatfile_chat_database.testing.contract import BackendContract
from flatfile_chat_database.testing.machine import StorageMachine

from .backdoors import Files
from .servers import RedisServer, free_port, missing, redis_server
from .test_machine import SETTINGS

OWN = Layout(StorageConfig()).cache_state
LEASE = 0.02
T = TypeVar("T")


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """A Redis for the tests that do not harm it."""
    with redis_server() as running:
        yield running


@pytest.fixture
def cache(server: RedisServer) -> RedisServer:
    server.call("FLUSHALL")
    return server


def opened(server: RedisServer) -> bytes:
    """Return what a store says whose cache is open."""
    run = re.search(rb"run_id:(\w+)", server.call("INFO", "server"))
    data = re.search(rb"master_replid:(\w+)", server.call("INFO", "replication"))
    assert run is not None and data is not None
    name = f"{run[1].decode()}:{data[1].decode()}"
    word = {"phase": "open", "epoch": 1, "nonce": "n", "cache": "c", "server": name, "lease": 0.5}
    return json.dumps(word).encode()


class Dictionary:
    """The hooks of `BackendCase` for a dictionary."""

    data: dict[str, bytes]

    def peek(self, key: str) -> bytes | None:
        return self.data.get(key)

    def poke(self, key: str, data: bytes) -> None:
        self.data[key] = data

    def peek_keys(self) -> list[str]:
        return list(self.data)


class Hot(CachedBackend):
    """Reads everything twice, so that the second time it comes from the cache, if it can."""

    async def open(self) -> None:
        await super().open()
        self._shelf._seconds = self._server._seconds = self._marks._seconds = 1.0  # the machine may be busy
        await asyncio.to_thread(self._server.look)

    async def _put(self) -> None:
        while self._shelf.is_putting:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0)

    async def read(self, key: str) -> bytes | None:
        await super().read(key)
        await self._put()
        return await super().read(key)

    async def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        await super().read_many(keys)
        await self._put()
        return await super().read_many(keys)

    async def read_log_as(
        self,
        key: str,
        decode: Callable[[bytes], T | None],
        start: int = 0,
        stop: int | None = None,
        *,
        strict: bool = False,
    ) -> list[T]:
        if not strict:
            await super().read_log_as(key, codec.record_line, start, stop)
            await self._put()
        return await super().read_log_as(key, decode, start, stop, strict=strict)

    async def count_log(self, key: str) -> int:
        await super().count_log(key)
        await self._put()
        return await super().count_log(key)

    async def newest_records(self, keys: Sequence[str]) -> list[bytes | None]:
        await super().newest_records(keys)
        await self._put()
        return await super().newest_records(keys)


class _Medium(Protocol):
    def make_store(self, config: StorageConfig) -> StorageBackend: ...
    def poke(self, key: str, data: bytes) -> None: ...
    def peek_keys(self) -> list[str]: ...


_made: list[CachedBackend] = []
"""Those of the test; not in the case itself, which travels to other processes."""


class Behind:
    """The hooks for a medium with a cache in front: it is open from the beginning, and forgets what is poked."""

    url: str

    @pytest.fixture(autouse=True)
    def hot(self) -> Iterator[None]:
        """Look whether what was put into the cache was taken from it."""
        _made.clear()
        yield
        found = [backend.statistics() for backend in _made]
        _made.clear()
        if any(each["cache_fills"] for each in found):
            assert any(each["cache_hits"] for each in found), "the cache has answered nothing"

    def make_backend(self, config: StorageConfig) -> StorageBackend:
        _made.append(Hot(config, cast("_Medium", self).make_store(config), self.url))
        return _made[-1]

    def poke(self, key: str, data: bytes) -> None:
        cast("_Medium", super()).poke(key, data)
        with redis.Redis.from_url(self.url) as client:
            client.flushall()

    def peek_keys(self) -> list[str]:
        return [key for key in cast("_Medium", super()).peek_keys() if key != OWN]

    def is_untouched(self) -> bool:
        return not self.peek_keys()


@pytest.mark.slow  # what depends on Python is the client of the server, which the machine below and a sample use
class TestCachedMemory(Behind, Dictionary, BackendContract):
    """A dictionary behind Redis."""

    capabilities = MemoryBackend.capabilities

    @pytest.fixture(autouse=True)
    def medium(self, cache: RedisServer) -> None:
        self.url = cache.url
        self.data = {OWN: opened(cache)}

    def make_store(self, config: StorageConfig) -> StorageBackend:
        store = MemoryBackend(config)
        store._data, store._keys = self.data, sorted(self.data)
        return store


@pytest.mark.slow
class TestCachedFiles(Behind, Files, BackendContract):
    """Files behind Redis."""

    capabilities = FlatfileBackend.capabilities

    @pytest.fixture(autouse=True)
    def medium(self, cache: RedisServer, tmp_path: Path) -> None:
        self.url = cache.url
        self.root = tmp_path / "store"
        Files.poke(self, OWN, opened(cache))
        (self.root / OWN).chmod(0o600)
        (self.root / OWN).parent.chmod(0o700)
        self.root.chmod(0o700)

    def make_store(self, config: StorageConfig) -> StorageBackend:
        return FlatfileBackend(config, self.root)


# --- as memory does --------------------------------------------------------------------------------------


class CachedMachine(StorageMachine):
    """A dictionary behind Redis, whose cache is open from the beginning."""

    cache: RedisServer

    def prepare(self) -> None:
        self.data = {OWN: opened(self.cache)}
        self.cache.call("FLUSHALL")

    def open_storage(self, **arguments: Any) -> StorageManager:
        config = self.config(cache_timeout_seconds=1.0)
        store = MemoryBackend(config)
        store._data, store._keys = self.data, sorted(self.data)
        return StorageManager(config, backend=CachedBackend(config, store, self.cache.url), **arguments)


@pytest.mark.parametrize("examples", [3, pytest.param(15, marks=pytest.mark.slow)])
def test_a_store_behind_a_cache_answers_as_memory_does(server: RedisServer, examples: int) -> None:
    kind = type("Machine", (CachedMachine,), {"cache": server})
    run_state_machine_as_test(kind, settings=settings(SETTINGS, max_examples=examples))


# --- how it is named -------------------------------------------------------------------------------------


def test_a_url_names_a_store_and_its_cache() -> None:
    url = "cached:?store=memory%3A&cache=rediss%3A%2F%2Fme%3Atop%2520secret%40host%3A1234%2F2"
    backend = open_backend(StorageConfig(storage_url=url))
    assert repr(backend) == "<CachedBackend <MemoryBackend keys=0> <Server 'rediss://me:***@host:1234/2'>>"
    assert "secret" not in without_password(url)
    assert isinstance(backend, CachedBackend)
    assert backend.store is backend.uncached


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("cached:", "names a store and its cache"),
        ("cached:?store=memory%3A", "names a store and its cache"),
        ("cached:?store=memory%3A&cache=redis%3A%2F%2Fh&more=x", "names a store and its cache"),
        ("cached:?store=cached%3A&cache=redis%3A%2F%2Fh", "names a store and its cache"),
        ("mirrored:?from=memory%3A&to=cached%3A%3Fx", "names two stores"),
        ("cached:?store=ftp%3Ax&cache=redis%3A%2F%2Fh", "'ftp' names no backend"),
        ("cached:?store=memory%3A&cache=http%3A%2F%2Fme%3Asecret%40h", "The URL of the cache cannot be understood"),
        ("cached:?store=memory%3A&cache=redis%3A%2F%2Fme%3Asecret%40h%3Aport", "cannot be understood"),
        ("cached:?store=memory%3A&cache=redis%3A%2F%2Fme%3Asecret%40h%3Fno_such%3D1", "cannot be understood"),
    ],
)
def test_a_url_that_names_no_cache_is_refused_without_its_password(url: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem) as caught:
        open_backend(StorageConfig(storage_url=url))
    assert "secret" not in f"{caught.value} {caught.value.__cause__}"


def test_without_the_client_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['redis'] = None\n"
        "from flatfile_chat_database import StorageConfig, StorageManager\n"
        "StorageManager(StorageConfig(storage_url='cached:?store=memory%3A&cache=redis%3A%2F%2Fh'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'flatfile-chat-database[redis]'" in done.stderr


@pytest.mark.parametrize("kind", ["redis", "valkey"])
async def test_a_password_is_used_and_never_told(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with redis_server(kind=kind, port=True) as own:
        own.call("CONFIG", "SET", "requirepass", "top secret")
        for password, works in (("wrong%20secret", False), ("top%20secret", True)):
            url = own.url.replace("redis://", f"redis://:{password}@")
            storage_url = f"cached:?store={quote(f'file:{tmp_path}')}&cache={quote(url, safe='')}"
            config = StorageConfig(storage_url=storage_url, cache_lease_seconds=0.05, cache_timeout_seconds=1.0)
            async with StorageManager(config) as storage:
                await storage.create_user(password)
                async with asyncio.timeout(20):
                    while not (storage.backend.statistics()["cache_hits"] if works else caplog.text):
                        assert await storage.get_user_profile(password) == {}
                        await asyncio.sleep(0.01)
    assert "cannot be used now" in caplog.text
    assert "secret" not in caplog.text


def self_signed(folder: Path) -> tuple[str, str]:
    """Return the files of a certificate of loopback, and of its key."""
    program = shutil.which("openssl") or missing("openssl", "apt-get install openssl")
    certificate, key = str(folder / "certificate"), str(folder / "key")
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=localhost"]
    files = ["-keyout", key, "-out", certificate, "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([program, "req", *kind, *files], check=True, capture_output=True)
    return certificate, key


def connections(server: RedisServer) -> int:
    """Return how many a server has got, with this one."""
    found = re.search(rb"total_connections_received:(\d+)", server.call("INFO", "stats"))
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("is_known", [True, False])
async def test_a_server_is_reached_over_tls_if_its_certificate_is_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_known: bool
) -> None:
    port = free_port()
    certificate, key = self_signed(tmp_path)
    tls = ("--tls-port", str(port), "--tls-cert-file", certificate, "--tls-key-file", key, "--tls-auth-clients", "no")
    with redis_server(settings=tls) as own:
        own.call("ACL", "SETUSER", "me", "on", ">top secret", "~*", "&*", "+@all")
        store = MemoryBackend(StorageConfig(cache_timeout_seconds=1.0))
        await store.write(OWN, opened(own))
        known = f"?ssl_ca_certs={quote(certificate)}" if is_known else ""
        node = CachedBackend(store.config, store, f"rediss://me:top%20secret@127.0.0.1:{port}/0{known}")
        await node.open()
        try:
            assert bool(await asyncio.to_thread(node._server.look)) is is_known
            await node.write("large", large := b"x" * 200_000)
            for _ in range(2):
                assert await node.read("large") == large
                async with asyncio.timeout(20):
                    while node._shelf.is_putting or node._news.is_heard is not is_known:
                        await node.wait_for_change(["nothing"], 0.001)
            assert node.statistics()["cache_hits"] == is_known
            before = connections(own) if is_known else 0
            for _ in range(5):
                await node.read("large")
            assert not is_known or connections(own) == before + 1, "each read has made a connection"
        finally:
            await node.close()
    assert ("certificate verify failed" in caplog.text) is not is_known
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    "answer",
    [
        b"-ERR unknown command 'HELLO', with args beginning with: %b\r\n",
        b"-ERR unknown command `HELLO`, with args beginning with: %b\r\n",
        b"-WRONGPASS %b\r\n",
        b"500 what is %b\r\n",
        b"%b",
    ],
)
def test_a_server_that_repeats_what_it_was_told_tells_no_password(
    answer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def repeat() -> None:
            with listening.accept()[0] as connection:
                connection.sendall(answer % connection.recv(1000).replace(b"\r\n", b" "))

        repeating = threading.Thread(target=repeat)
        repeating.start()
        server = Server(f"redis://me:sesame@127.0.0.1:{listening.getsockname()[1]}", 1.0)
        assert server.look() == ""
        repeating.join()
    assert "cannot be used now" in caplog.text
    assert "sesame" not in f"{caplog.text} {server.problem}"


def test_a_server_that_never_ends_what_it_says_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_GREETING_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            with listening.accept()[0] as connection, suppress(OSError):
                connection.sendall(b"+")
                while True:
                    connection.sendall(b"x")
                    time.sleep(0.01)

        dripping = threading.Thread(target=drip)
        dripping.start()
        server = Server(f"redis://127.0.0.1:{listening.getsockname()[1]}", 1.0)
        assert server.look() == ""
        assert server.problem
        dripping.join()
