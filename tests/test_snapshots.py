"""What the snapshot of files does that the contract does not tell: how it holds them, and what it leaves behind."""

import errno
import os
from pathlib import Path

import pytest

from flatfile_chat_database.backends.flatfile import FlatfileBackend
from flatfile_chat_database.backends.flatfile import snapshots as module
from flatfile_chat_database.backends.flatfile.files import Files
from flatfile_chat_database.backends.sqlite import SqliteBackend
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.errors import ClosedError, IntegrityError, UnavailableError
from flatfile_chat_database.layout import Layout
from flatfile_chat_database.testing.case import LOG, all_of, lines
from flatfile_chat_database.testing.snapshots import contents


class Refusing(Files):
    """A file system that refuses a call."""

    def __init__(self, call: str, error: int) -> None:
        super().__init__()
        self.refused = 0
        self.is_refusing = False

        def refuse(*_: object) -> None:
            if not self.is_refusing or (call == "make_folder" and ".tmp" not in str(_[0])):
                kept(*_)
                return
            self.refused += 1
            raise OSError(error, os.strerror(error))

        kept = getattr(self, call)
        setattr(self, call, refuse)


async def opened(root: Path, files: Files | None = None) -> FlatfileBackend:
    backend = FlatfileBackend(StorageConfig(), root, files=files)
    await backend.open()
    await backend.load([(f"users/ann/{number}.json", b"%d" % number) for number in range(5)])
    await backend.append(LOG, b"".join(lines(3)))
    return backend


def below(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}


@pytest.mark.parametrize("error", [errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EXDEV])
async def test_where_there_are_no_links_files_are_copied(error: int, store_path: Path) -> None:
    files = Refusing("link", error)
    files.is_refusing = True
    backend = await opened(store_path, files)
    before = {key: await backend.read(key) for key in await backend.list_keys("")}
    async with backend.snapshot() as shown:
        assert files.refused >= len(before)
        await backend.append(LOG, lines(1, 3)[0])
        await backend.write("users/ann/1.json", b"new")
        assert await contents(shown) == before
    await backend.close()


async def test_what_is_linked_takes_no_room_and_goes(store_path: Path) -> None:
    backend = await opened(store_path)
    before = below(store_path)
    path = store_path / LOG
    async with backend.snapshot():
        assert path.stat().st_nlink == 2
        assert [problem.kind for problem in await backend.verify()] == ["temporary-file"]
    assert path.stat().st_nlink == 1
    assert below(store_path) == before
    await backend.close()


async def test_a_medium_that_nobody_writes_to_is_read_as_it_is(store_path: Path) -> None:
    files = Refusing("make_folder", errno.EROFS)
    backend = await opened(store_path, files)
    files.is_refusing = True
    async with backend.snapshot() as shown:
        assert len(await contents(shown)) == 6
    assert files.refused == 1
    await backend.close()


async def test_whoever_may_not_write_is_told_so(store_path: Path) -> None:
    files = Refusing("make_folder", errno.EACCES)
    backend = await opened(store_path, files)
    files.is_refusing = True
    with pytest.raises(UnavailableError, match="needs to make a folder"):
        async with backend.snapshot():
            pass
    await backend.close()


async def test_a_folder_that_cannot_be_listed_is_named(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files()
    backend = await opened(store_path, files)
    whole = files.list_folder

    def refuse(path: str) -> object:
        if path.endswith("/users"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return whole(path)

    monkeypatch.setattr(files, "list_folder", refuse)
    with pytest.raises(UnavailableError, match=r"/users: Permission denied\. Give this user access"):
        async with backend.snapshot():
            pass
    await backend.close()


async def test_a_history_that_is_lost_makes_it_look_at_everything(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = await opened(store_path)
    await backend.close()  # what is in the journal would be done again
    backend = FlatfileBackend(StorageConfig(), store_path)
    await backend.open()
    take = module.Frozen._take
    changed: list[str] = []

    def then_change(self: module.Frozen, key: str) -> None:
        take(self, key)
        if key == "users/ann/4.json" and not changed:
            changed.append(key)
            (store_path / ".new").write_bytes(b"changed")
            os.rename(store_path / ".new", store_path / "users/ann/0.json")
            os.unlink(store_path / "users/ann/1.json")
            (store_path / Layout(StorageConfig()).lock).write_bytes(b"")

    monkeypatch.setattr(module.Frozen, "_take", then_change)
    async with backend.snapshot() as shown:
        found = await contents(shown)
    assert changed and found["users/ann/0.json"] == b"changed" and "users/ann/1.json" not in found
    await backend.close()


async def test_a_log_cut_by_hand_is_not_shown_short(store_path: Path) -> None:
    backend = await opened(store_path)
    async with backend.snapshot() as shown:
        os.truncate(store_path / LOG, 10)
        with pytest.raises(IntegrityError, match="became shorter"):
            await all_of(shown.read(LOG))
    await backend.close()


@pytest.mark.parametrize("kind", ["files", "sqlite"])
async def test_a_snapshot_that_has_ended_shows_nothing(kind: str, store_path: Path) -> None:
    backend = (
        SqliteBackend(StorageConfig(), str(store_path / "chats.db")) if kind == "sqlite" else await opened(store_path)
    )
    await backend.open()
    await backend.write("a", b"b")
    async with backend.snapshot() as shown:
        pass
    with pytest.raises(ClosedError, match="has ended"):
        await all_of(shown.read("a"))
    with pytest.raises(ClosedError, match="has ended"):
        await shown.read_many(["a"])
    await backend.close()


async def test_a_log_in_rows_is_read_many_lines_at_a_time(store_path: Path) -> None:
    backend = SqliteBackend(StorageConfig(), str(store_path / "chats.db"))
    await backend.open()
    await backend.load([(LOG, b"".join(lines(500)))])
    assert await all_of(backend.read_blob(LOG)) == [b"".join(lines(500))]
    async with backend.snapshot() as shown:
        assert await all_of(shown.read(LOG)) == [b"".join(lines(500))]
    await backend.close()
