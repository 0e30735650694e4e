"""Media that refuse to work: read-only, full, unreadable, or with files and folders in each other's place."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flatfile_chat_database.backends.flatfile import FlatfileBackend
from flatfile_chat_database.backends.flatfile.files import FileKind, Files
from flatfile_chat_database.check import check
from flatfile_chat_database.errors import ConfigurationError, StorageError, UnavailableError
from flatfile_chat_database.models import Message, SituationalContext
from flatfile_chat_database.storage import StorageManager

from . import damage
from .damage import LAYOUT, OTHER_SESSION, SESSION, USER, build

if TYPE_CHECKING:
    from .conftest import FlatConfig, MakeStorage

ROOT = Path(__file__).parent.parent

pytestmark = [pytest.mark.damage, pytest.mark.slow]  # nothing in it depends on the version of Python


# --- real media, in processes of their own ---------------------------------------------------------------


def namespace() -> list[str]:
    """Return the command that runs another with mounts of its own, or skip: loudly, for a skip is no pass."""
    for command in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        probe = "mount -t tmpfs tmpfs /mnt"
        if shutil.which("unshare"):
            done = subprocess.run([*command, "sh", "-c", probe], capture_output=True, check=False)
            if done.returncode == 0:
                return command
    pytest.skip("NOT TESTED here: this process may not make a mount namespace (unshare --mount)")


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that other users reach as well, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="chatdb-medium-"))
    folder.chmod(0o755)
    store = folder / "store"
    store.mkdir(0o700)
    try:
        yield store
    finally:
        for path in [store, *store.rglob("*")]:
            if path.is_dir():
                path.chmod(0o700)
        shutil.rmtree(folder)


def run(command: list[str], case: str, place: Path) -> None:
    done = subprocess.run(
        [*command, sys.executable, "-m", "tests.mediums", case, str(place)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_folder_without_write_permission_reads_as_ever_and_refuses_every_change(place: Path) -> None:
    run([], "permissions", place)


def test_a_read_only_file_system_reads_as_ever_and_refuses_every_change(place: Path) -> None:
    run(namespace(), "read-only", place)


def test_a_full_disk_loses_nothing_refuses_the_rest_and_goes_on_when_there_is_room(place: Path) -> None:
    run(namespace(), "full", place)


# --- files and folders in each other's place -------------------------------------------------------------


async def test_a_file_where_the_store_should_be_is_an_error_for_reading_and_writing(
    flat_storage: "MakeStorage", store_path: Path
) -> None:
    store_path.write_bytes(b"a file")
    storage = flat_storage()
    with pytest.raises(ConfigurationError, match="folder"):
        await storage.list_sessions(USER)
    with pytest.raises(ConfigurationError, match="folder"):
        await storage.create_user(USER)
    assert store_path.read_bytes() == b"a file"


async def test_a_file_where_a_parent_of_the_store_should_be_is_an_error(
    flat_storage: "MakeStorage", store_path: Path
) -> None:
    store_path.write_bytes(b"a file")
    storage = flat_storage(storage_base_path=str(store_path / "below" / "store"))
    with pytest.raises(UnavailableError):
        await storage.create_user(USER)
    assert store_path.read_bytes() == b"a file"


@pytest.mark.parametrize("entry", ["user", "session", "context_snapshot", "document", "insight"])
async def test_a_file_where_a_folder_should_be_is_an_error_that_check_finds(
    flat_storage: "MakeStorage", store_path: Path, entry: str
) -> None:
    storage = flat_storage()
    await build(storage)
    names = damage.NAMES | {"snapshot_id": "x", "document": "x", "panel_id": damage.PANEL, "insight_id": "x"}
    placeholders = {"user": ["user_id"], "session": ["user_id", "session_id"]}
    own = {name: names[name] for name in placeholders.get(entry, names)}
    folder = LAYOUT.folder(entry, **own)
    shutil.rmtree(store_path / folder)
    (store_path / folder).write_bytes(b"a file")
    (store_path / folder).chmod(0o600)

    async def use() -> None:
        match entry:
            case "user" | "session":
                await storage.create_user(USER)
                await storage.create_session(USER, session_id=SESSION)
            case "context_snapshot":
                await storage.save_context_snapshot(USER, SESSION, SituationalContext("new"))
            case "document":
                await storage.save_document(USER, SESSION, "new.txt", b"new")
            case _:
                await storage.save_panel_insight(damage.PANEL, {"text": "new"})

    with pytest.raises(UnavailableError, match="folder"):
        await use()
    assert (store_path / folder).read_bytes() == b"a file"
    if entry in ("user", "session"):  # it may be a file of somebody's beside the folders: only a person can tell
        report = await check(storage.backend, fix=True)
        assert report.clean
        assert ("unknown-key", folder) in [(problem.kind, problem.key) for problem in report]
        assert (store_path / folder).read_bytes() == b"a file"
        (store_path / folder).unlink()
        await use()
        return
    report = await check(storage.backend)
    assert [(problem.kind, problem.key) for problem in report] == [("wrong-kind", folder)]
    assert (await check(storage.backend, fix=True)).clean
    assert b"a file" in [path.read_bytes() for path in (store_path / LAYOUT.quarantine).iterdir()]
    await use()
    assert (await check(storage.backend)).clean


@pytest.mark.parametrize("entry", ["user", "session", "messages", "documents"])
async def test_a_folder_where_a_file_should_be_is_an_error_found_by_check(
    flat_storage: "MakeStorage", store_path: Path, entry: str
) -> None:
    storage = flat_storage()
    await build(storage)
    names = {"user_id": USER} if entry == "user" else damage.NAMES
    path = store_path / LAYOUT.key(entry, **names)
    path.unlink()
    path.mkdir(0o700)
    changes: dict[str, Callable[[], Awaitable[object]]] = {
        "user": lambda: storage.update_user_profile(USER, {"x": 1}),
        "session": lambda: storage.update_session(USER, SESSION, {"title": "x"}),
        "messages": lambda: storage.add_message(USER, SESSION, Message("user", "new")),
        "documents": lambda: storage.save_document(USER, SESSION, "new.txt", b"new"),
    }
    with pytest.raises(StorageError):
        await changes[entry]()
    assert path.is_dir()
    report = await check(storage.backend)
    assert ("wrong-kind", LAYOUT.key(entry, **names)) in [(problem.kind, problem.key) for problem in report]
    assert len(await storage.get_messages(USER, OTHER_SESSION, strict=True)) == 5


# --- what the system does not let us read ----------------------------------------------------------------


class Refusing(Files):
    """System calls that fail for one path, as for a file of another user or on a failing disk."""

    def __init__(self, refused: Path) -> None:
        super().__init__()
        self.refused = str(refused)

    def open_to_read(self, path: str) -> int:
        self._refuse(path)
        return super().open_to_read(path)

    def open_to_append(self, path: str) -> int:
        self._refuse(path)
        return super().open_to_append(path)

    def list_folder(self, path: str) -> list[tuple[str, FileKind]]:
        self._refuse(path)
        return super().list_folder(path)

    def _refuse(self, path: str) -> None:
        if path == self.refused:
            raise PermissionError(errno.EACCES, "Permission denied", path)


@pytest.fixture
async def refusing(
    flat_storage: "MakeStorage", flat_config: "FlatConfig", store_path: Path
) -> AsyncIterator[StorageManager]:
    """A healthy store, of which `storage.backend`'s seam refuses one file: the log of SESSION unless set otherwise."""
    await build(flat_storage())
    backend = FlatfileBackend(flat_config(), store_path, files=Refusing(store_path / damage.LOG))
    yield StorageManager(flat_config(), backend=backend)
    await backend.close()


async def test_a_log_that_cannot_be_read_is_never_taken_for_empty(refusing: StorageManager, store_path: Path) -> None:
    before = (store_path / damage.LOG).read_bytes()
    for read in (refusing.get_messages, refusing.count_messages):
        with pytest.raises(UnavailableError) as caught:
            await read(USER, SESSION)
        assert caught.value.key == damage.LOG
    for change in (
        refusing.add_message(USER, SESSION, Message("user", "new")),
        refusing.pop_message(USER, SESSION),
        refusing.clear_messages(USER, SESSION),
        refusing.delete_message(USER, SESSION, "m1"),
        refusing.update_message(USER, SESSION, "m1", {"content": "new"}),
    ):
        with pytest.raises(UnavailableError):
            await change
    assert (store_path / damage.LOG).read_bytes() == before
    assert len(await refusing.get_messages(USER, OTHER_SESSION)) == 5


@pytest.mark.parametrize("fix", [False, True])
@pytest.mark.parametrize(
    "key",
    [damage.LOG, damage.METADATA, damage.PROFILE, damage.DOCUMENTS, damage.BLOB, damage.PANEL_METADATA, damage.STORE],
)
async def test_a_file_that_cannot_be_read_hides_nothing_else(
    refusing: StorageManager, store_path: Path, key: str, fix: bool
) -> None:
    backend = refusing.backend
    await backend.open()
    other = LAYOUT.key("messages", user_id=USER, session_id=OTHER_SESSION)
    with (store_path / other).open("ab") as log:
        log.write(b"?\n")
    before = (store_path / key).read_bytes()
    files = backend._files  # type: ignore[attr-defined]
    files.refused = str(store_path / key)
    report = await check(backend, fix=fix)
    assert {(problem.kind, problem.key) for problem in report} == {("unreadable", key), ("bad-line", other)}
    assert not report.clean
    assert any(problem.fixed for problem in report) == (fix and key != damage.STORE), "its format is not known"
    assert (store_path / key).read_bytes() == before
    files.refused = ""
    assert (await check(backend, fix=True)).clean


async def test_a_folder_that_cannot_be_listed_hides_nothing_else(refusing: StorageManager, store_path: Path) -> None:
    backend = refusing.backend
    await backend.open()
    folder = LAYOUT.folder("user", user_id=USER)
    backend._files.refused = str(store_path / folder)  # type: ignore[attr-defined]
    report = await check(backend, fix=True)
    assert [(problem.kind, problem.key) for problem in report] == [("unreadable", folder)]
    assert report.counts["panels"] == 1
    with pytest.raises(UnavailableError):
        await refusing.list_sessions(USER)


# --- a line that is far too long ---------------------------------------------------------------------------


async def test_a_line_of_50_megabytes_costs_itself_only_and_little_memory(
    flat_storage: "MakeStorage", store_path: Path
) -> None:
    storage = flat_storage()
    await build(storage)
    log = store_path / damage.LOG
    whole = log.read_bytes().splitlines(keepends=True)
    giant = damage.line("giant", content="x" * 50_000_000)
    log.write_bytes(b"".join([*whole[:2], giant, *whole[2:]]))
    os.chmod(log, 0o600)
    tracemalloc.start()
    try:
        messages = await storage.get_messages(USER, SESSION)
        newest = await storage.get_messages(USER, SESSION, offset=-1)
        assert await storage.count_messages(USER, SESSION) == 5
        assert await storage.add_message(USER, SESSION, Message("user", "more", id="m5"))
        report = await check(storage.backend)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [message.id for message in messages] == ["m0", "m1", "m2", "m3", "m4"]
    assert [message.id for message in newest] == ["m4"]
    assert [(problem.kind, problem.key) for problem in report] == [("oversized-line", damage.LOG)]
    assert peak < 40 << 20  # the longest line that is kept, some two times, and less than this one
    assert (await check(storage.backend, fix=True)).clean
    assert [message.id for message in await storage.get_messages(USER, SESSION, strict=True)][-1] == "m5"
    assert giant in [path.read_bytes() for path in (store_path / LAYOUT.quarantine).glob("*.bin")]
