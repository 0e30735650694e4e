"""A store with a cache in front of it: the contract, and nothing stale whatever happens to the cache."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, cast

import pytest
import redis

from flatfile_chat_database import StorageConfig
from flatfile_chat_database.backends.base import StorageBackend
from flatfile_chat_database.backends.cached import CachedBackend
from flatfile_chat_database.backends.flatfile import FlatfileBackend
from flatfile_chat_database.backends.memory import MemoryBackend
from flatfile_chat_database.layout import Layout
from flatfile_chat_database.testing.contract import BackendContract

from .backdoors import Files
from .servers import RedisServer, redis_server

OWN = Layout(StorageConfig()).cache_state
LEASE = 0.02


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
    assert run is not None
    return json.dumps({"phase": "open", "epoch": 1, "cache": "c", "server": run[1].decode()}).encode()


class Dictionary:
    """The hooks of `BackendCase` for a dictionary."""

    data: dict[str, bytes]

    def peek(self, key: str) -> bytes | None:
        return self.data.get(key)

    def poke(self, key: str, data: bytes) -> None:
        self.data[key] = data

    def peek_keys(self) -> list[str]:
        return list(self.data)


class _Medium(Protocol):
    def poke(self, key: str, data: bytes) -> None: ...
    def peek_keys(self) -> list[str]: ...


class Behind:
    """The hooks for a medium with a cache in front: it is open from the beginning, and forgets what is poked."""

    url: str

    def make_store(self, config: StorageConfig) -> StorageBackend:
        raise NotImplementedError

    def make_backend(self, config: StorageConfig) -> StorageBackend:
        return CachedBackend(config, self.make_store(config), self.url)

    def poke(self, key: str, data: bytes) -> None:
        cast("_Medium", super()).poke(key, data)
        with redis.Redis.from_url(self.url) as client:
            client.flushall()

    def peek_keys(self) -> list[str]:
        return [key for key in cast("_Medium", super()).peek_keys() if key != OWN]

    def is_untouched(self) -> bool:
        return not self.peek_keys()


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
