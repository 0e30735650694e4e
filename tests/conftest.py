"""The matrix of backends, and what every test is watched for.

- `storage` and `make_storage` run a test once for each backend; `flat_storage` and `flat_config` on flat files only.
- After the test every store is closed, and checked unless the test is marked `damage`.
- Flushes return at once unless the test is marked `disk`: power does not fail here, so nobody can tell. They are
  counted, and made to fail, as ever. What other processes do is not touched.
- A test that blocks the event loop inside the package fails (`blockbuster`). What a test does by itself, such as a look
  at a file, is not watched: only calls that come through a module of the package count, and `testing/`, which reaches
  the medium by a back door on purpose, is no such module.
"""

import dataclasses
import fcntl
import gc
import importlib
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pytest
from blockbuster import BlockBuster, BlockBusterFunction
from hypothesis import HealthCheck, settings

from flatfile_chat_database.backends.base import StorageBackend
from flatfile_chat_database.backends.flatfile import files
from flatfile_chat_database.backends.memory import MemoryBackend
from flatfile_chat_database.backends.opening import open_backend
from flatfile_chat_database.check import check
from flatfile_chat_database.config import NAMING_FIELDS, StorageConfig
from flatfile_chat_database.layout import Layout
from flatfile_chat_database.models import Problem
from flatfile_chat_database.storage import StorageManager

from . import postgres

PACKAGE = "flatfile_chat_database"
pytest.register_assert_rewrite(f"{PACKAGE}.testing")
CONFIG_FIELDS = {field.name for field in dataclasses.fields(StorageConfig)}
MANAGER_ARGUMENTS = {"backend", "read_only", "clock", "id_source"}

# An example that waits for a disk has no useful deadline; "too slow" says the same of the machine.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("here"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "here")


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # programs that tests start are interrupted by it


# --- what every test is watched for --------------------------------------------------------------------


def _guard() -> BlockBuster:
    guard = BlockBuster(PACKAGE, excluded_modules=[f"{PACKAGE}.testing"])
    # What blockbuster does not know by itself.
    more = {
        os: ("fsync", "fdatasync", "open", "fstat", "lstat", "pread", "pwrite", "ftruncate", "makedirs", "scandir"),
        fcntl: ("flock", "lockf", "fcntl"),
    }
    for module, names in more.items():
        for name in names:
            if hasattr(module, name):
                guard.functions[f"{module.__name__}.{name}"] = BlockBusterFunction(
                    module, name, scanned_modules=PACKAGE, excluded_modules=[f"{PACKAGE}.testing"]
                )
    for function in guard.functions.values():  # coverage looks at a file when its first line runs, wherever that is
        function.can_block_in("coverage/files.py", "abs_file")
        function.can_block_in("coverage/collector.py", "lock_data")
    # The kernel knows it without a look at any medium.
    guard.functions["os.getcwd"].can_block_in("flatfile_chat_database/addresses.py", "absolute")
    return guard


_look_at = os.fstat  # not the watched one


class _Disk:
    """Whether flushes in this process wait for the disk."""

    waits = False


def _unless_nobody_waits(flush: Callable[[int], None]) -> Callable[[int], None]:
    def flush_or_not(descriptor: int) -> None:
        _look_at(descriptor)  # which must be open, as for a real flush
        if _Disk.waits:
            flush(descriptor)

    return flush_or_not


def _flush_all(descriptor: int) -> bool:
    _look_at(descriptor)
    return True


@pytest.fixture(scope="session", autouse=True)
def blocking_the_loop_fails() -> Iterator[None]:
    """Raise BlockingError from a blocking call of the package on an event loop's thread."""
    find = files._syncfs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", _unless_nobody_waits(os.fsync))
        patch.setattr(os, "fdatasync", _unless_nobody_waits(os.fdatasync))
        patch.setattr(files, "_syncfs", lambda: find() if _Disk.waits else _flush_all)
        guard = _guard()
        guard.activate()
        try:
            yield
        finally:
            guard.deactivate()


@pytest.fixture(autouse=True)
def nobody_waits_for_the_disk(request: pytest.FixtureRequest, blocking_the_loop_fails: None) -> None:
    """Let flushes in this process return at once, but not in a test of the disk."""
    _Disk.waits = request.node.get_closest_marker("disk") is not None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail what is skipped where CI runs: only a capability that a backend does not declare is no omission."""
    report = yield
    if os.environ.get("CI") and report.skipped and "does not declare" not in str(report.longrepr):
        report.outcome = "failed"
        report.longrepr = f"skipped although CI must run it: {report.longrepr}"
    return report


# --- the matrix ----------------------------------------------------------------------------------------


ON_POSTGRESQL = {"test_messages", "test_search", "test_sessions", "test_watching"}
"""Modules whose tests run on a PostgreSQL server as well: those whose answers come from its own statements. What a
backend may answer at all is shown by the contract and the state machine, and a server takes time. With the option
`--whole-matrix` all of them do."""


def pytest_configure(config: pytest.Config) -> None:
    """Import the tests in another order in each process.

    pytest rewrites a module when it is imported for the first time, and keeps what came of it. In the same order all of
    several processes would rewrite the same one at the same time.
    """
    whole = all(Path(argument).is_dir() for argument in config.args)
    if whole and (worker := getattr(config, "workerinput", None)) is not None:
        names = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py"))
        first = len(names) * int(worker["workerid"].removeprefix("gw")) // int(worker["workercount"])
        for name in names[first:] + names[:first]:
            importlib.import_module(f"{__package__}.{name}")


def pytest_collection_finish() -> None:
    """Keep the collector of garbage from walking through ten thousand tests again and again."""
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that runs every test of the matrix on every backend."""
    parser.addoption("--whole-matrix", action="store_true", help="run every test of the matrix on PostgreSQL as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only the whole matrix runs; begin with what has a time-out of its own because it takes longest."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)  # so that none is alone with it at the end
    if not config.getoption("--whole-matrix"):
        left_out = [item for item in items if item.get_closest_marker("whole")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker("whole")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what uses `backend_name` once for each backend."""
    if "backend_name" in metafunc.fixturenames:
        # What the manager does by itself it does in the same way on all of them, so another Python shows it on files.
        # What a backend does by itself on another Python is shown by the contract, the machine and the samples.
        names: list[Any] = ["flatfile", *(pytest.param(name, marks=pytest.mark.slow) for name in ("memory", "sqlite"))]
        whole = metafunc.config.getoption("--whole-matrix")
        if whole or metafunc.module.__name__.rpartition(".")[2] in ON_POSTGRESQL:
            names.append(pytest.param("postgres", marks=pytest.mark.slow))
        metafunc.parametrize("backend_name", names)


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    """The folder of the flat-file store; it does not exist before the first write."""
    return tmp_path / "store"


class MakeStorage(Protocol):
    """`make_storage` and `flat_storage`."""

    def __call__(self, **overrides: Any) -> StorageManager:
        """Return a new manager; config fields go to StorageConfig, other keywords to StorageManager."""
        ...


class _Stores:
    """The managers of one test, and the store that they share."""

    def __init__(self, backend_name: str, store_path: Path) -> None:
        self.backend_name = backend_name
        self.store_path = store_path
        self.managers: list[StorageManager] = []
        self.memory: MemoryBackend | None = None

    @cached_property
    def url(self) -> str:
        """The URL of the store in a database."""
        if self.backend_name == "postgres":
            return postgres.empty_store()
        return f"sqlite:{self.store_path}/chats.sqlite3"

    def config(self, **overrides: Any) -> StorageConfig:
        return StorageConfig(**{"storage_base_path": str(self.store_path)} | overrides)

    def make(self, **overrides: Any) -> StorageManager:
        unknown = overrides.keys() - CONFIG_FIELDS - MANAGER_ARGUMENTS
        assert not unknown, f"neither config fields nor arguments of StorageManager: {unknown}"
        config = self.config(**{name: value for name, value in overrides.items() if name in CONFIG_FIELDS})
        arguments = {name: value for name, value in overrides.items() if name in MANAGER_ARGUMENTS}
        if self.backend_name == "memory" and not config.storage_url:
            if self.memory is None:
                self.memory = MemoryBackend(config)
            arguments.setdefault("backend", self.memory)
        if self.backend_name in ("sqlite", "postgres") and not config.storage_url:
            config.storage_url = self.url
        manager = StorageManager(config, **arguments)
        self.managers.append(manager)
        return manager

    async def close(self) -> None:
        for manager in self.managers:
            await manager.close()

    async def check(self) -> None:
        """Fail if the store, seen by a fresh handle, has problems."""
        backend = await self._reopen()
        if backend is not None:
            try:
                assert await problems(backend) == []
            finally:
                await backend.close()

    async def _reopen(self) -> StorageBackend | None:
        configs = [manager.config for manager in self.managers] or [self.config()]
        if self.backend_name == "memory":
            if self.memory is None:
                return None
            contents = {key: await self.memory.read(key) for key in await self.memory.list_keys("")}
            self.memory.config = _config_of_store(configs, contents.get)
            return self.memory
        if not self.store_path.exists() and self.backend_name != "postgres":
            return None
        if self.backend_name in ("sqlite", "postgres"):
            backend = open_backend(dataclasses.replace(configs[0], storage_url=self.url))
            await backend.open()
            contents = {key: await backend.read(key) for config in configs if (key := Layout(config).key("store"))}
            await backend.close()
            config = _config_of_store(configs, contents.get)
            return open_backend(dataclasses.replace(config, storage_url=self.url))

        def read(key: str) -> bytes | None:
            path = self.store_path / key
            return path.read_bytes() if path.exists() else None

        config = _config_of_store(configs, read)
        return open_backend(dataclasses.replace(config, storage_url="", storage_base_path=str(self.store_path)))


def _config_of_store(configs: list[StorageConfig], read: Callable[[str], bytes | None]) -> StorageConfig:
    """Return the configuration that the store was made with: some tests open one with other names as well."""
    for config in configs:
        data = read(Layout(config).key("store"))
        if data is not None:
            names = json.loads(data)["names"]
            if all(names.get(name, getattr(config, name)) == getattr(config, name) for name in NAMING_FIELDS):
                return config
    return configs[0]


async def problems(backend: StorageBackend) -> list[Problem]:
    """Return what `check` finds that no healthy store has; what a crash may leave behind is harmless."""
    left_by_crashes = ("temporary-file", "quarantined", "loose-permissions")
    return [problem for problem in await check(backend) if problem.kind not in left_by_crashes]


async def _stores(request: pytest.FixtureRequest, backend_name: str, store_path: Path) -> AsyncIterator[_Stores]:
    stores = _Stores(backend_name, store_path)
    yield stores
    await stores.close()
    if request.node.get_closest_marker("damage") is None:
        await stores.check()
    if stores.memory is not None:
        await stores.memory.close()


@pytest.fixture
async def make_storage(
    request: pytest.FixtureRequest, backend_name: str, store_path: Path
) -> AsyncIterator[MakeStorage]:
    """Make managers on one store of each backend in turn; see MakeStorage."""
    async for stores in _stores(request, backend_name, store_path):
        yield stores.make


@pytest.fixture
def storage(make_storage: MakeStorage) -> StorageManager:
    """A manager with the default configuration, on each backend in turn."""
    return make_storage()


@pytest.fixture
async def flat_storage(request: pytest.FixtureRequest, store_path: Path) -> AsyncIterator[MakeStorage]:
    """Make managers on one flat-file store; see MakeStorage."""
    async for stores in _stores(request, "flatfile", store_path):
        yield stores.make


class FlatConfig(Protocol):
    """`flat_config`."""

    def __call__(self, **overrides: Any) -> StorageConfig:
        """Return a configuration for the store at `store_path`."""
        ...


@pytest.fixture
def flat_config(store_path: Path) -> FlatConfig:
    """Make configurations for the flat-file store that `flat_storage` uses."""
    return _Stores("flatfile", store_path).config


# --- crash states --------------------------------------------------------------------------------------

LEAST_CRASH_STATES = 20_000
"""Distinct disk images that a whole run of `test_crashes.py` opens, at least."""


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Count the crash states over all processes of the run; a run of all their tests that has too few fails."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):
        return
    digests: set[str] = set()
    tests: set[str] = set()
    for report in reporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "crash_states" and report.when == "call":
                digests.update(value[start : start + 32] for start in range(0, len(value), 32))
                tests.add(report.nodeid)
    session.config.stash[CRASH_STATES] = (len(digests), len(tests))
    if len(tests) >= CRASH_TESTS and len(digests) < LEAST_CRASH_STATES:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


CRASH_STATES = pytest.StashKey[tuple[int, int]]()
CRASH_TESTS = 107
"""How many tests count crash states."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print how many crash states were opened."""
    states, tests = config.stash.get(CRASH_STATES, (0, 0))
    if tests:
        terminalreporter.write_line(
            f"{states:,} crash states, distinct by hash of the disk image, in {tests} of {CRASH_TESTS} tests"
        )
