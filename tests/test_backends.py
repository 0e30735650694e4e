"""The contract of `backends/base.py`, on every backend and on the smallest one that can be written."""

import asyncio
import os
import threading
from pathlib import Path

import pytest

from flatfile_chat_database import codec
from flatfile_chat_database.backends.base import Capability, StorageBackend
from flatfile_chat_database.backends.flatfile import FlatfileBackend
from flatfile_chat_database.backends.memory import MemoryBackend
from flatfile_chat_database.backends.opening import open_backend
from flatfile_chat_database.backends.rules import check_key, mended, quarantine_keys
from flatfile_chat_database.backends.sqlite import SqliteBackend
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.errors import ConfigurationError, ValidationError
from flatfile_chat_database.testing.contract import BackendContract

from .backdoors import Files


class TestMemory(BackendContract):
    """Dictionaries. The medium is the dictionary, so every handle of a test gets the same one."""

    capabilities = frozenset({Capability.SNAPSHOTS})

    @pytest.fixture(autouse=True)
    def medium(self) -> None:
        self.data: dict[str, bytes] = {}

    def make_backend(self, config: StorageConfig) -> StorageBackend:
        backend = MemoryBackend(config)
        backend._data = self.data
        backend._keys = sorted(self.data)
        return backend

    def peek(self, key: str) -> bytes | None:
        return self.data.get(key)

    def poke(self, key: str, data: bytes) -> None:
        self.data[key] = data

    def peek_keys(self) -> list[str]:
        return list(self.data)


class SixMethods(StorageBackend):
    """The least that a backend must do: the six methods, each of which gives way to other coroutines."""

    def __init__(self, config: StorageConfig, data: dict[str, bytes]) -> None:
        super().__init__(config)
        self.data = data
        self.lock = threading.Lock()

    async def read(self, key: str) -> bytes | None:
        await _give_way()
        return self.data.get(check_key(key))

    async def write(self, key: str, data: bytes) -> bool:
        check_key(key)
        await _give_way()
        self.data[key] = data
        await _give_way()
        return True

    async def append(self, key: str, data: bytes) -> bool:
        if not data.endswith(b"\n"):
            raise ValidationError("What is appended must end in a newline.")
        check_key(key)
        await _give_way()
        with self.lock:
            before, half = mended(self.data.get(key, b""))
            if half:
                note, target = quarantine_keys(self.config)
                self.data[note] = codec.encode_document({"key": key})
                self.data[target] = half
            self.data[key] = before + data
        await _give_way()
        return True

    async def delete(self, key: str) -> bool:
        check_key(key)
        await _give_way()
        return self.data.pop(key, None) is not None

    async def exists(self, key: str) -> bool:
        await _give_way()
        return check_key(key) in self.data

    async def list_keys(self, prefix: str) -> list[str]:
        await _give_way()
        return sorted(key for key in list(self.data) if key.startswith(prefix))


async def _give_way() -> None:
    await asyncio.sleep(0)


@pytest.mark.slow  # the defaults themselves are what files and memory use, and the machine uses six methods too
class TestSixMethods(BackendContract):
    """What the contract's defaults make of six methods is a whole backend."""

    capabilities = frozenset()

    @pytest.fixture(autouse=True)
    def medium(self) -> None:
        self.data: dict[str, bytes] = {}

    def make_backend(self, config: StorageConfig) -> StorageBackend:
        return SixMethods(config, self.data)

    def peek(self, key: str) -> bytes | None:
        return self.data.get(key)

    def poke(self, key: str, data: bytes) -> None:
        self.data[key] = data

    def peek_keys(self) -> list[str]:
        return list(self.data)


@pytest.mark.disk
class TestFlatfile(Files, BackendContract):
    """Files, looked at with plain Python."""

    capabilities = frozenset(
        {
            Capability.PERSISTENT,
            Capability.PROCESSES,
            Capability.ATOMIC_APPEND,
            Capability.STREAMED_BLOBS,
            Capability.EXTENTS,
            Capability.SNAPSHOTS,
        }
    )

    @pytest.fixture(autouse=True)
    def medium(self, store_path: Path) -> None:
        self.root = store_path

    def make_backend(self, config: StorageConfig) -> StorageBackend:
        return FlatfileBackend(config, self.root)


@pytest.mark.slow
class TestFlatfileNormal(TestFlatfile):
    """The same where nobody waits for the disk."""

    def make_backend(self, config: StorageConfig) -> StorageBackend:
        config.durability = "normal"
        return FlatfileBackend(config, self.root)


@pytest.mark.slow
class TestFlatfileOs(TestFlatfile):
    """The same where the system writes when it likes."""

    def make_backend(self, config: StorageConfig) -> StorageBackend:
        config.durability = "os"
        return FlatfileBackend(config, self.root)


def test_only_the_six_are_needed() -> None:
    required = {"read", "write", "append", "delete", "exists", "list_keys"}
    assert StorageBackend.__abstractmethods__ == required
    assert {name for name in vars(SixMethods) if not name.startswith("_")} == required


# --- which backend -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("file:relative/path", "relative/path"),
        ("file:/absolute/path", "/absolute/path"),
        ("file:///absolute/path", "/absolute/path"),
        ("file:with%20space%3F", "with space?"),
        ("file:%E5%BC%A0", "张"),
        ("file:.", "."),
    ],
)
def test_a_file_url_names_a_folder(url: str, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    backend = open_backend(StorageConfig(storage_url=url, storage_base_path="/elsewhere"))
    assert isinstance(backend, FlatfileBackend)
    assert backend.root == os.path.realpath(root)


def test_without_a_url_the_store_is_the_base_path(tmp_path: Path) -> None:
    backend = open_backend(StorageConfig(storage_base_path=str(tmp_path / "store")))
    assert isinstance(backend, FlatfileBackend)
    assert backend.root == os.path.realpath(tmp_path / "store")
    assert list(tmp_path.iterdir()) == [], "no I/O before the first write"


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:relative/chats.db", "relative/chats.db"),
        ("sqlite:/absolute/chats.db", "/absolute/chats.db"),
        ("sqlite:///absolute/chats.db", "/absolute/chats.db"),
        ("sqlite:with%20space%3F.db", "with space?.db"),
    ],
)
def test_a_sqlite_url_names_a_file(url: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    backend = open_backend(StorageConfig(storage_url=url))
    assert isinstance(backend, SqliteBackend)
    assert backend.path == os.path.realpath(path)
    assert list(tmp_path.iterdir()) == [], "no I/O before the first write"


def test_memory_is_a_url_as_well() -> None:
    assert isinstance(open_backend(StorageConfig(storage_url="memory:")), MemoryBackend)


@pytest.mark.parametrize(
    "url",
    [
        "file:", "file://", "file://host/path", "file:a%00b", "memory:x", "memory", "ftp://host/x", "sqlite:",
        "sqlite:a%00b", "sqlite://host/x.db", "mysql://user:secret@host/db",
        "postgresql:host", "postgres:", "s3:bucket", "S3://bucket", "/a/path", "C:\\chats", ":", "FILE:x",
    ],
)  # fmt: skip
def test_a_url_that_names_no_backend_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ConfigurationError, match="names no backend") as error:
        open_backend(StorageConfig(storage_url=url))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("url", ["sqlite:chats.db?mode=ro", "file:chats?secret=1", "sqlite:?", "file:/a/b%20c?"])
def test_a_path_takes_no_parameters(url: str) -> None:
    with pytest.raises(ConfigurationError, match=f"parameters, of which {url.partition(':')[0]}: takes none") as error:
        open_backend(StorageConfig(storage_url=url))
    assert "%3F" in str(error.value) and "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("postgresql:me:secret@host", "behind postgresql: stand two slashes. Write postgresql://user@host/database."),
        ("postgres:host", "behind postgresql: stand two slashes. Write postgresql://user@host/database."),
        ("sqlite://secret", "stands a host, and sqlite has none; a path begins right behind the colon. Write sqlite:"),
        ("file://secret/x", "stands a host, and file has none; a path begins right behind the colon. Write file:"),
        ("sqlite:", "behind sqlite: stands a path, which is missing. Write sqlite:path/to/file or sqlite:/absolute"),
        ("memory:secret", "behind memory: stands nothing. Write memory:."),
    ],
)
def test_a_url_of_another_form_is_told_its_own(url: str, advice: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        open_backend(StorageConfig(storage_url=url))
    assert advice in str(error.value) and "secret" not in str(error.value)


async def test_a_file_in_place_of_a_folder_and_the_other_way_round_is_told_what_to_write(tmp_path: Path) -> None:
    file, folder = tmp_path / "chats", tmp_path / "folder"
    file.touch()
    folder.mkdir()
    for url, advice in [
        (
            f"file:{file}",
            f"{file} is a file, and a store of files is a folder. A store in one file of SQLite is sqlite:",
        ),
        (f"sqlite:{folder}", f"{folder} is a folder, and a store of SQLite is a file. Name a file in it, as sqlite:"),
    ]:
        backend = open_backend(StorageConfig(storage_url=url))
        with pytest.raises(ConfigurationError) as error:
            await backend.open()
            await backend.write("users/a", b"x")
        assert advice in str(error.value)
        await backend.close()
