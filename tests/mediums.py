"""Media that refuse, for real: `python -m tests.mediums CASE FOLDER` runs one case in a process of its own.

A read-only or full file system has to be mounted, which needs a mount namespace of this process's own (`unshare -m`, as
root or with `-r`); a folder without write permission needs a user whom permissions bind, which root is not.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from flatfile_chat_database.check import check
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.errors import DurabilityError, StorageError, UnavailableError
from flatfile_chat_database.layout import Layout
from flatfile_chat_database.models import Message, SituationalContext
from flatfile_chat_database.storage import StorageManager

from .damage import OTHER_SESSION, PANEL, REPORT, SESSION, USER, build

NOBODY = 65534
OWN = Layout(StorageConfig())

Change = Callable[[StorageManager], Awaitable[object]]

WRITES: dict[str, Change] = {
    "create_user": lambda storage: storage.create_user("new"),
    "update_user_profile": lambda storage: storage.update_user_profile(USER, {"language": "zh" * 4096}),
    "create_session": lambda storage: storage.create_session(USER, "new"),
    "update_session": lambda storage: storage.update_session(USER, SESSION, {"title": "new" * 4096}),
    "add_message": lambda storage: storage.add_message(USER, SESSION, Message("user", "new" * 4096)),
    "add_messages": lambda storage: storage.add_messages(USER, SESSION, [Message("user", "new" * 999)] * 3),
    "update_message": lambda storage: storage.update_message(USER, SESSION, "m1", {"content": "new" * 4096}),
    "save_document": lambda storage: storage.save_document(USER, SESSION, "new.txt", b"new" * 4096),
    "replace a document": lambda storage: storage.save_document(USER, SESSION, "report.pdf", b"new" * 4096),
    "update_document_analysis": lambda storage: storage.update_document_analysis(
        USER, SESSION, "report.pdf", {"new": "x" * 9999}
    ),
    "update_context": lambda storage: storage.update_context(USER, SESSION, SituationalContext("x" * 500)),
    "save_context_snapshot": lambda storage: storage.save_context_snapshot(USER, SESSION, SituationalContext("new")),
    "create_panel": lambda storage: storage.create_panel("new", ["analyst"]),
    "add_panel_message": lambda storage: storage.add_panel_message(PANEL, Message("critic", "new" * 4096)),
    "save_panel_insight": lambda storage: storage.save_panel_insight(PANEL, {"text": "new" * 4096}),
    "save_persona": lambda storage: storage.save_persona("new", {"name": "new"}),
}
"""Operations that write bytes."""

REMOVALS: dict[str, Change] = {
    "delete_message": lambda storage: storage.delete_message(USER, SESSION, "m1"),
    "pop_message": lambda storage: storage.pop_message(USER, SESSION),
    "clear_messages": lambda storage: storage.clear_messages(USER, SESSION),
    "delete_document": lambda storage: storage.delete_document(USER, SESSION, "report.pdf"),
    "delete_context": lambda storage: storage.delete_context(USER, SESSION),
    "delete_session": lambda storage: storage.delete_session(USER, SESSION),
    "delete_user": lambda storage: storage.delete_user(USER),
    "purge": lambda storage: storage.purge(user_id=USER),
}
"""Operations that remove."""


def files(root: Path) -> dict[str, bytes]:
    """Return every file below a folder, temporary ones too, but for the backend's own."""
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not OWN.is_own(name)}


async def expect_refused(storage: StorageManager, root: Path, changes: dict[str, Change]) -> None:
    """Fail unless every operation raises UnavailableError with a way out, and changes nothing."""
    before = files(root)
    for name, change in changes.items():
        try:
            await change(storage)
        except UnavailableError as error:
            assert error.hint, f"{name}: {error}"
        else:
            raise AssertionError(f"{name} seems to have been done")
        after = files(root)
        assert after == before, f"{name} changed {[key for key in before | after if before.get(key) != after.get(key)]}"


async def expect_readable(storage: StorageManager) -> None:
    """Fail unless what `build` stored can be read."""
    assert len(await storage.get_messages(USER, SESSION, strict=True)) >= 5
    assert len(await storage.get_messages(USER, OTHER_SESSION, strict=True)) == 5
    assert len(await storage.list_sessions(USER, strict=True)) == 2
    assert await storage.get_document(USER, SESSION, "report.pdf") == REPORT
    assert len(await storage.search_messages(USER, "line")) >= 10


async def read_only(root: Path, make_read_only: Callable[[Path], None]) -> None:
    """A store whose folder may not be written reads as ever, refuses every change, and stays as it is."""
    storage = StorageManager(StorageConfig(storage_base_path=str(root)))
    await build(storage)
    await check(storage.backend)
    await expect_readable(storage)  # imports what is needed, before this process may not read it any more
    await storage.close()
    make_read_only(root)
    for arguments in ({}, {"read_only": True}):
        storage = StorageManager(StorageConfig(storage_base_path=str(root)), **arguments)  # type: ignore[arg-type]
        await expect_readable(storage)
        await expect_refused(storage, root, WRITES | REMOVALS)
        await expect_readable(storage)
        report = await check(storage.backend)
        assert report.problems == [], str(report)
        await storage.close()


def forbid(root: Path) -> None:
    """Take all write permission away, and become somebody whom that binds."""
    as_root = os.geteuid() == 0
    for path in [root, *root.rglob("*")]:
        if as_root:
            os.chown(path, NOBODY, NOBODY)
        path.chmod(0o500 if path.is_dir() else 0o400)
    if as_root:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def mount_read_only(root: Path) -> None:
    """Mount the folder onto itself, read-only."""
    subprocess.run(["mount", "--bind", str(root), str(root)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(root)], check=True)


async def full(place: Path) -> None:
    """A full disk loses nothing that was acknowledged, refuses the rest, and takes writes again when there is room."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(place)], check=True)
    reserve = place / "reserve"
    reserve.write_bytes(b"x" * 650_000)  # rewriting the log takes as much room again
    root = place / "store"
    storage = StorageManager(StorageConfig(storage_base_path=str(root)))
    await build(storage)
    acknowledged: list[str] = []
    try:
        while True:
            message = Message("user", "x" * 3000)
            await storage.add_message(USER, SESSION, message)
            acknowledged.append(message.id)
    except (UnavailableError, DurabilityError) as error:  # the journal took it, or did not
        assert "space" in str(error), str(error)
    assert len(acknowledged) > 50, len(acknowledged)

    async def expect_acknowledged() -> None:
        messages = await storage.get_messages(USER, SESSION, 10_000, strict=True)
        assert [message.id for message in messages[5:]][: len(acknowledged)] == acknowledged

    await expect_acknowledged()
    with contextlib.suppress(StorageError):
        await storage.create_user("settle")  # before which what is in the journal is done, if it was not
    fill(place / "filler")
    await expect_refused(storage, root, WRITES)
    await expect_readable(storage)
    assert [problem.kind for problem in await check(storage.backend) if not problem.harmless] == []

    reserve.unlink()
    await storage.add_message(USER, SESSION, Message("user", "room again"))
    await expect_acknowledged()
    for name, change in WRITES.items():
        assert await change(storage) is not None, name
    assert (await check(storage.backend)).problems == []
    await storage.close()


def fill(path: Path) -> None:
    """Take the last byte of the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        while True:
            os.write(descriptor, b"x" * 512)
    except OSError:
        pass
    finally:
        os.close(descriptor)


CASES: dict[str, Callable[[Path], Awaitable[None]]] = {
    "permissions": lambda place: read_only(place, forbid),
    "read-only": lambda place: read_only(place, mount_read_only),
    "full": full,
}


async def main(case: str, place: str) -> None:
    """Run one case."""
    await CASES[case](Path(place))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
