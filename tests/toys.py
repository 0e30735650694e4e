"""A store of a hundred lines that does each step of a durable write by the book, or leaves one out."""

import contextlib
from collections.abc import Sequence
from typing import Literal

from flatfile_chat_database.backends.changes import Append, Change, Outcome, Put
from flatfile_chat_database.testing.histories import Contents
from flatfile_chat_database.testing.inline import ROOT_FOLDER, OpenStore
from flatfile_chat_database.testing.simulated import SimulatedFiles

Mistake = Literal[
    "truncate in place",
    "rename without fsync",
    "no directory sync",
    "no parent-directory sync after mkdir",
    "append without fsync",
    "no directory sync after creating the log",
]
"""The six of reliability.md, M8."""


class Toy:
    """Documents and logs, one file each."""

    def __init__(self, files: SimulatedFiles, mistake: Mistake | None) -> None:
        self._files = files
        self._mistake = mistake

    def commit(self, changes: Sequence[Change]) -> list[Outcome]:
        for change in changes:
            if isinstance(change, Put):
                self._put(change.key, change.data)
            elif isinstance(change, Append):
                self._append(change.key, b"".join(change.lines))
        return [None for _ in changes]

    def write_blob(self, key: str, data: bytes) -> None:
        self._put(key, data)

    def contents(self) -> Contents:
        found = {}
        for path in self._walk(ROOT_FOLDER):
            if not path.endswith(".tmp"):
                found[path[len(ROOT_FOLDER) + 1 :]] = self._read(path)
        return {key: data for key, data in found.items() if data or not key.endswith(".jsonl")}  # an empty log is none

    def quarantine(self) -> list[bytes]:
        return []

    def problems(self) -> list[str]:
        for path in self._walk(ROOT_FOLDER):
            if path.endswith(".jsonl"):
                self._mend(path)
        return []

    def close(self) -> None:
        return None

    # --- writing -------------------------------------------------------------------------------------

    def _put(self, key: str, data: bytes) -> None:
        path = f"{ROOT_FOLDER}/{key}"
        self._make_folder(path.rpartition("/")[0])
        if self._mistake == "truncate in place" and self._exists(path):
            descriptor = self._files.open_to_change(path)
            self._files.truncate(descriptor, 0)
            self._files.write(descriptor, data)
            self._files.sync(descriptor)
            self._files.close(descriptor)
            return
        with contextlib.suppress(FileNotFoundError):
            self._files.remove(f"{path}.tmp")
        descriptor = self._files.create(f"{path}.tmp")
        self._files.write(descriptor, data)
        if self._mistake != "rename without fsync":
            self._files.sync(descriptor)
        self._files.close(descriptor)
        self._files.rename(f"{path}.tmp", path)
        if self._mistake != "no directory sync":
            self._files.sync_folder(path.rpartition("/")[0])

    def _append(self, key: str, data: bytes) -> None:
        path = f"{ROOT_FOLDER}/{key}"
        if not self._exists(path):
            self._make_folder(path.rpartition("/")[0])
            self._files.close(self._files.create(path))
            if self._mistake not in ("no directory sync", "no directory sync after creating the log"):
                self._files.sync_folder(path.rpartition("/")[0])
        self._mend(path)
        descriptor = self._files.open_to_append(path)
        self._files.write(descriptor, data)
        if self._mistake != "append without fsync":
            self._files.sync(descriptor)
        self._files.close(descriptor)

    def _mend(self, path: str) -> None:
        data = self._read(path)
        if not data.endswith(b"\n") and data:
            descriptor = self._files.open_to_append(path)
            self._files.truncate(descriptor, data.rfind(b"\n") + 1)
            self._files.sync(descriptor)
            self._files.close(descriptor)

    def _make_folder(self, path: str) -> None:
        if self._exists(path):
            return
        parent = path.rpartition("/")[0]
        self._make_folder(parent)
        self._files.make_folder(path)
        if self._mistake not in ("no directory sync", "no parent-directory sync after mkdir"):
            self._files.sync_folder(parent)

    # --- reading -------------------------------------------------------------------------------------

    def _exists(self, path: str) -> bool:
        try:
            self._files.status(path)
        except FileNotFoundError:
            return False
        return True

    def _read(self, path: str) -> bytes:
        descriptor = self._files.open_to_read(path)
        try:
            return self._files.read(descriptor, 1 << 20, 0)
        finally:
            self._files.close(descriptor)

    def _walk(self, folder: str) -> list[str]:
        found = []
        if self._exists(folder):
            for name, kind in self._files.list_folder(folder):
                found += self._walk(f"{folder}/{name}") if kind == "folder" else [f"{folder}/{name}"]
        return found


def open_toy(mistake: Mistake | None = None) -> OpenStore:
    return lambda files: Toy(files, mistake)
