"""The S3 backend on Ceph: the contract, looked at with a client of the tests' own, and what only it does."""

from pathlib import Path

import pytest

from flatfile_chat_database.backends.base import Capability, StorageBackend
from flatfile_chat_database.backends.s3 import S3Backend
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.testing.contract import BackendContract

from . import s3

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
