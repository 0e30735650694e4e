"""The PostgreSQL backend: the contract, looked at with SQL, and what only it does."""

import pytest

from flatfile_chat_database.backends.base import Capability, StorageBackend
from flatfile_chat_database.backends.postgres import PostgresBackend
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.testing.contract import BackendContract

from . import postgres

pytestmark = pytest.mark.slow


class TestPostgres(BackendContract):
    """The tables of one database, looked at with SQL of the tests' own."""

    capabilities = frozenset(
        {Capability.PERSISTENT, Capability.PROCESSES, Capability.ATOMIC_APPEND, Capability.STREAMED_BLOBS}
    )

    @pytest.fixture(autouse=True)
    def medium(self) -> None:
        self.url = postgres.empty_store()

    def make_backend(self, config: StorageConfig) -> StorageBackend:
        config.storage_url = self.url
        return PostgresBackend(config)

    def peek(self, key: str) -> bytes | None:
        return postgres.peek(self.url, key)

    def poke(self, key: str, data: bytes) -> None:
        postgres.poke(self.url, key, data)

    def peek_keys(self) -> list[str]:
        return postgres.peek_keys(self.url)
