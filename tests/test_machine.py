"""A StorageManager on each backend, used at random beside one in memory."""

import shutil
import tempfile
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from flatfile_chat_database.backends import arriving
from flatfile_chat_database.backends.s3 import appending, composing
from flatfile_chat_database.storage import StorageManager
from flatfile_chat_database.testing.machine import StorageMachine

from . import postgres, s3
from .test_backends import SixMethods


class FlatfileMachine(StorageMachine):
    """Files in a folder of their own for each example."""

    def prepare(self) -> None:
        self.folder = tempfile.mkdtemp()

    def open_storage(self, **arguments: Any) -> StorageManager:
        return StorageManager(self.config(storage_base_path=self.folder), **arguments)

    def discard(self) -> None:
        shutil.rmtree(self.folder)


class NormalMachine(FlatfileMachine):
    """The same, where nobody waits for the disk, and the journal is folded all the time."""

    def open_storage(self, **arguments: Any) -> StorageManager:
        config = self.config(storage_base_path=self.folder, durability="normal", journal_max_bytes=2000)
        return StorageManager(config, **arguments)


class DatabaseMachine(FlatfileMachine):
    """A database, whose messages are moved all the time."""

    @property
    def url(self) -> str:
        return f"sqlite:{self.folder}/chats.sqlite3"

    def open_storage(self, **arguments: Any) -> StorageManager:
        return StorageManager(self.config(storage_url=self.url), **arguments)


class SixMethodsMachine(StorageMachine):
    """The contract's defaults on the smallest backend, whose methods give way to each other."""

    def prepare(self) -> None:
        self.data: dict[str, bytes] = {}

    def open_storage(self, **arguments: Any) -> StorageManager:
        return StorageManager(self.config(), backend=SixMethods(self.config(), self.data), **arguments)


# Making a failing example smaller takes minutes, and longer than a test may run; do it by hand, with these two removed.
SETTINGS = settings(
    stateful_step_count=50, phases=[Phase.explicit, Phase.reuse, Phase.generate], report_multiple_bugs=False
)


@pytest.mark.parametrize("examples", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_flat_files_answer_as_memory_does(examples: int) -> None:
    run_state_machine_as_test(FlatfileMachine, settings=settings(SETTINGS, max_examples=examples))


@pytest.mark.slow
def test_flat_files_at_the_level_normal_answer_as_memory_does() -> None:
    run_state_machine_as_test(NormalMachine, settings=settings(SETTINGS, max_examples=20))


@pytest.mark.parametrize("examples", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_a_database_answers_as_memory_does(examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arriving, "_MOST", 3)
    run_state_machine_as_test(DatabaseMachine, settings=settings(SETTINGS, max_examples=examples))


@pytest.mark.parametrize("examples", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_six_methods_answer_as_memory_does(examples: int) -> None:
    run_state_machine_as_test(SixMethodsMachine, settings=settings(SETTINGS, max_examples=examples))


class PostgresMachine(StorageMachine):
    """The tables of one database, emptied for each example."""

    def prepare(self) -> None:
        self.url = postgres.empty_store()

    def open_storage(self, **arguments: Any) -> StorageManager:
        return StorageManager(self.config(storage_url=self.url), **arguments)


@pytest.mark.slow
def test_postgresql_answers_as_memory_does() -> None:
    run_state_machine_as_test(PostgresMachine, settings=settings(SETTINGS, max_examples=15))


class S3Machine(StorageMachine):
    """Objects below a prefix of their own for each example; logs are folded all the time."""

    def prepare(self) -> None:
        self.url = s3.empty_store()
        self.folder = tempfile.mkdtemp()

    def open_storage(self, **arguments: Any) -> StorageManager:
        return StorageManager(self.config(storage_url=self.url, search_index_path=self.folder), **arguments)

    def discard(self) -> None:
        shutil.rmtree(self.folder)


@pytest.mark.slow
def test_s3_answers_as_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appending, "_FOLDED_AFTER", 3)
    monkeypatch.setattr(composing, "KEPT_RECORDS", 2)
    run_state_machine_as_test(S3Machine, settings=settings(SETTINGS, max_examples=8))
