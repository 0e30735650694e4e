"""Every public operation with every changing system call failing in turn: an error, and all or nothing on disk."""

import asyncio
import errno
import functools
import itertools
import re
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from flatfile_chat_database import Message, SituationalContext, StorageConfig, StorageManager
from flatfile_chat_database.backends.flatfile import FlatfileBackend
from flatfile_chat_database.check import check
from flatfile_chat_database.errors import DurabilityError, StorageError
from flatfile_chat_database.layout import Layout
from flatfile_chat_database.testing.faults import FaultyFiles

from .clock import FixedClock

OWN = Layout(StorageConfig())
STAMP = "2026-01-31T12:00:00.000000+00:00"


def message(number: int, size: int = 40) -> Message:
    return Message("user", "x" * size, id=f"m{number}", timestamp=STAMP)


async def prepare(storage: StorageManager) -> None:
    """Make the store that every operation begins with."""
    await storage.create_user("ada", {"name": "Ada"})
    await storage.create_session("ada", "One", session_id="s")
    await storage.create_session("ada", "Empty", session_id="empty")
    await storage.add_messages("ada", "s", [message(number) for number in range(5)])
    await storage.save_document("ada", "s", "a.txt", b"old bytes")
    await storage.update_document_analysis("ada", "s", "a.txt", {"summary": "old"})
    await storage.save_persona("critic", {"tone": "sharp"})
    await storage.create_panel("team", ["critic"], panel_id="p")
    await storage.save_context_snapshot("ada", "s", SituationalContext("before", timestamp=STAMP))
    await storage.delete_session("ada", await storage.create_session("ada", "Deleted", session_id="gone"))


PARTIAL: dict[str, set[str]] = {
    "save_document, new": set(),
    "save_document, again": set(),
    "delete_document": {"missing-file"},
    "create_panel": {"missing-panel"},
    "purge": set(),
}
"""Operations of several files, which an unknown outcome may leave in between, and what `check` says of that."""


async def undelete(storage: StorageManager) -> bool:
    [entry] = await storage.list_trash()
    return await storage.undelete(entry.id)


OPERATIONS: dict[str, Callable[[StorageManager], Awaitable[object]]] = {
    "create_user": lambda storage: storage.create_user("bob", {"name": "Bob"}),
    "update_user_profile": lambda storage: storage.update_user_profile("ada", {"age": 36}),
    "create_session": lambda storage: storage.create_session("ada", "Two"),
    "add_message to a log": lambda storage: storage.add_message("ada", "s", message(9, 5000)),
    "add_message, the first": lambda storage: storage.add_message("ada", "empty", message(9)),
    "add_messages": lambda storage: storage.add_messages("ada", "s", [message(number) for number in range(7, 10)]),
    "update_message": lambda storage: storage.update_message("ada", "s", "m2", {"content": "changed"}),
    "delete_message": lambda storage: storage.delete_message("ada", "s", "m2"),
    "pop_message": lambda storage: storage.pop_message("ada", "s"),
    "clear_messages": lambda storage: storage.clear_messages("ada", "s"),
    "save_document, new": lambda storage: storage.save_document("ada", "s", "b.txt", b"bytes" * 100),
    "save_document, again": lambda storage: storage.save_document("ada", "s", "a.txt", b"new bytes"),
    "update_document_analysis": lambda storage: storage.update_document_analysis("ada", "s", "a.txt", {"more": 1}),
    "delete_document": lambda storage: storage.delete_document("ada", "s", "a.txt"),
    "update_context": lambda storage: storage.update_context("ada", "s", SituationalContext("now", timestamp=STAMP)),
    "save_context_snapshot": lambda storage: storage.save_context_snapshot(
        "ada", "s", SituationalContext("then", timestamp=STAMP)
    ),
    "create_panel": lambda storage: storage.create_panel("team", ["critic"]),
    "save_panel_insight": lambda storage: storage.save_panel_insight("p", {"text": "so"}),
    "save_persona": lambda storage: storage.save_persona("critic", {"tone": "mild"}),
    "delete_persona": lambda storage: storage.delete_persona("critic"),
    "delete_session": lambda storage: storage.delete_session("ada", "s"),
    "undelete": undelete,
    "delete_user": lambda storage: storage.delete_user("ada"),
    "purge": lambda storage: storage.purge(user_id="ada"),
}


def contents(folder: Path) -> dict[str, bytes]:
    """Return what a person would see: every file but temporary ones, the backend's own and the quarantine."""
    found = {}
    for path in sorted(folder.rglob("*")):
        key = path.relative_to(folder).as_posix()
        if path.is_file() and "/." not in f"/{key}" and not OWN.is_own(key) and "quarantine" not in key:
            found[re.sub(r"_[0-9a-f]{8}/", "_unique/", key)] = path.read_bytes()
    return found


def open_store(folder: Path, files: FaultyFiles) -> StorageManager:
    numbers = itertools.count()
    return StorageManager(
        StorageConfig(),
        backend=FlatfileBackend(StorageConfig(), folder, files=files),
        clock=FixedClock(),
        id_source=lambda: f"00000000-0000-7000-8000-{next(numbers):012x}",
    )


ON_EVERY_PYTHON = ("create_user", "add_message to a log")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ON_EVERY_PYTHON else pytest.mark.slow) for name in OPERATIONS]
)
async def test_whichever_call_fails_an_operation_raises_and_leaves_the_store_as_before_or_after(
    name: str, tmp_path: Path
) -> None:
    operation = OPERATIONS[name]
    template = tmp_path / "template"
    storage = open_store(template, FaultyFiles())
    await prepare(storage)
    await storage.backend.close()
    before = await asyncio.to_thread(contents, template)

    async def attempt(folder: Path, fault: Callable[[FaultyFiles], None]) -> tuple[Exception | None, int]:
        files = FaultyFiles()
        storage = open_store(folder, files)
        await storage.get_user("ada")  # opens
        error: Exception | None = None
        fault(files)
        try:
            await operation(storage)
        except Exception as raised:
            error = raised
        calls = len(files.calls)
        files.watch([])
        await storage.backend.close()
        return error, calls

    whole = tmp_path / "whole"
    await asyncio.to_thread(shutil.copytree, template, whole)
    error, calls = await attempt(whole, FaultyFiles.watch)
    after = await asyncio.to_thread(contents, whole)
    assert error is None
    assert calls > 2

    faults = [(errno.EIO, False), (errno.ENOSPC, True)]
    for call, (code, forever) in itertools.product(range(1, calls + 1), faults):
        where = f"{name}, call {call} of {calls}, {errno.errorcode[code]}, {'forever' if forever else 'once'}"
        folder = tmp_path / "store"
        await asyncio.to_thread(shutil.copytree, template, folder)
        error, _ = await attempt(folder, functools.partial(FaultyFiles.fail, call=call, error=code, forever=forever))
        assert error is None or isinstance(error, StorageError), where
        reopened = open_store(folder, FaultyFiles())
        await reopened.create_user("mender")  # the next write finishes or takes back what was left
        report = await check(reopened.backend)
        kinds = {problem.kind for problem in report.problems if not problem.harmless}
        allowed = PARTIAL.get(name, set()) if isinstance(error, DurabilityError) else set()
        assert kinds <= allowed, f"{where}: {report}"
        await reopened.backend.close()
        found = await asyncio.to_thread(contents, folder)
        assert [found.pop(key) for key in list(found) if key.startswith("users/mender/")]
        if forever:  # a file that was written could not even be removed
            for problem in report.problems:
                if problem.kind == "orphan-file":
                    found.pop(problem.key, None)
        if error is None:
            assert found == after, where
        elif not isinstance(error, DurabilityError):
            assert found == before, f"{where}: {error}"
        else:
            assert found in (before, after) or name in PARTIAL, f"{where}: {error}"
        await asyncio.to_thread(shutil.rmtree, folder)
