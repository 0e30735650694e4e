"""The folders of a store while it is written: made when needed, removed when empty.

The names of what is in the store become durable at the next checkpoint; that of the store itself at once.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from typing import TypeVar

from .files import Files, FileStatus
from .tree import Tree

T = TypeVar("T")

_REMEMBERED = 100_000
_COUNTED = 100


class Folders:
    """Folders that the writer has seen."""

    def __init__(self, files: Files, tree: Tree, *, clean_up: bool) -> None:
        """Remove folders that a removal leaves empty if `clean_up` says so."""
        self._files = files
        self._tree = tree
        self._clean_up = clean_up
        self._known: set[str] = set()
        self._inside: dict[str, tuple[FileStatus, set[str]]] = {}
        self._filled: dict[str, tuple[FileStatus, set[str]]] = {}

    def make(self, folder: str) -> None:
        """Make a folder and its parents."""
        if folder in self._known:
            return
        if folder:
            parent = folder.rpartition("/")[0]
            self.make(parent)
            beside = self._inside_if_unchanged(parent)
            try:
                self._files.make_folder(self._tree.path(folder))
            except FileExistsError:
                self._filled.pop(parent, None)  # it may have been empty, and is about to be filled
                if self._files.status(self._tree.path(folder)).kind != "folder":
                    raise NotADirectoryError(errno.ENOTDIR, "Not a directory", folder) from None
            except FileNotFoundError:  # the parent is gone, though it was there before
                self._known.clear()
                self.make(folder)
                return
            else:
                if beside is not None:
                    status = self._files.status(self._tree.path(parent))
                    beside.add(folder.rpartition("/")[2])
                    self._inside[parent] = (status, beside)
        else:
            self._make_root()
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known.add(folder)

    def fill(self, folder: str, work: Callable[[], T]) -> T:
        """Make a folder and do what needs it; once more if another process has cleaned it away since it was seen."""
        self.make(folder)
        try:
            return work()
        except FileNotFoundError:
            self.forget()
            self.make(folder)
            return work()

    def _make_root(self) -> None:
        """Make the store's own folder and sync each new name on the way."""
        missing: list[str] = []
        place = self._tree.path("")
        while place not in ("", "/"):
            try:
                if self._files.status(place).kind == "file":
                    raise NotADirectoryError(errno.ENOTDIR, "Not a directory", place)
                break
            except FileNotFoundError:
                missing.append(place)
                place = place.rpartition("/")[0]
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                self._files.make_folder(folder)
        # One that is there may have been made by a process that died before its name was durable.
        for folder in missing or [self._tree.path("")]:
            with contextlib.suppress(PermissionError):
                self._files.sync_folder(folder.rpartition("/")[0] or "/")

    def emptied(self, key: str) -> None:
        """Remove the folders that the removal of `key` left empty, if that is wanted."""
        folder = key.rpartition("/")[0]
        while self._clean_up and folder:
            try:
                self._files.remove_folder(self._tree.path(folder))
            except FileNotFoundError:
                pass
            except OSError:  # it is not empty, or it stays for another reason: an empty folder harms nobody
                return
            self._known.discard(folder)
            folder = folder.rpartition("/")[0]

    def forget(self, folder: str | None = None) -> None:
        """Forget a folder that has gone and what was below it, or every folder."""
        self._known = {
            known
            for known in self._known
            if folder is not None and known != folder and not known.startswith(f"{folder}/")
        }

    def inside(self, folder: str) -> set[str]:
        """Return the folders in a folder; remembered until it changes, for a quota counts them often."""
        names = self._inside_if_unchanged(folder)
        if names is None:
            try:
                status = self._files.status(self._tree.path(folder))
            except FileNotFoundError:
                return set()
            names = set(self._tree.folders(folder))
            if len(self._inside) >= _COUNTED:
                del self._inside[next(iter(self._inside))]
            self._inside[folder] = (status, names)
        return names

    def filled(self, folder: str) -> set[str]:
        """Return the folders in a folder that are not empty; remembered until a folder comes or goes, or is filled."""
        try:
            status = self._files.status(self._tree.path(folder))
        except FileNotFoundError:
            return set()
        known = self._filled.get(folder)
        if known is None or known[0] != status:
            names = {
                name for name in self._tree.folders(folder) if self._tree.holds_files(f"{folder}/{name}".lstrip("/"))
            }
            if len(self._filled) >= _COUNTED:
                del self._filled[next(iter(self._filled))]
            known = self._filled[folder] = status, names
        return known[1]

    def were_filled(self) -> None:
        """Forget which folders are empty: something was written."""
        self._filled.clear()

    def _inside_if_unchanged(self, folder: str) -> set[str] | None:
        if folder not in self._inside:
            return None
        status, names = self._inside[folder]
        try:
            return names if self._files.status(self._tree.path(folder)) == status else None
        except FileNotFoundError:
            return None
