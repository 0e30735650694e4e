"""Walking the store's folder: which keys there are, and what lies there that is no key."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from ...layout import Layout, Shape
from ...models import Problem, new_id
from ..rules import begins_no_key, check_key
from .files import PRIVATE_FILE, PRIVATE_FOLDER, FileKind, Files

_TEMPORARY_AGE_SECONDS = 24 * 3600
"""A younger temporary file may belong to a writer at work."""


@dataclass(frozen=True, slots=True)
class Item:
    """Something in the store's folder."""

    path: str
    """Relative to the store."""
    kind: FileKind


class Tree:
    """The folder of a store, seen as keys."""

    def __init__(self, files: Files, root: str, layout: Layout, temporary_suffix: str) -> None:
        self._files = files
        self._root = root
        self._layout = layout
        self._suffix = temporary_suffix
        self._temporary = re.compile(r"\.[0-9a-f-]{36}" + re.escape(temporary_suffix))

    def path(self, key: str) -> str:
        """Return the path of a key; "" is the store's folder."""
        return f"{self._root}/{key}" if key else self._root

    def temporary(self, key: str) -> str:
        """Return a new path for unfinished bytes beside `key`."""
        return f"{self.path(key.rpartition('/')[0])}/.{new_id()}{self._suffix}"

    def is_temporary(self, name: str) -> bool:
        """Tell whether a name is one that the engine gives to unfinished files and to folders being removed."""
        return self._temporary.fullmatch(name) is not None

    def children(self, folder: str) -> list[str]:
        """Return the names in a folder that are segments of keys, sorted; none if it is absent."""
        return sorted(
            item.path.rpartition("/")[2] for item in self._list(folder) if item.kind != "link" and self._is_key(item)
        )

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders in a folder that are segments of keys, sorted; none if it is absent."""
        return sorted(
            item.path.rpartition("/")[2] for item in self._list(folder) if item.kind == "folder" and self._is_key(item)
        )

    def keys(self, prefix: str) -> list[str]:
        """Return the keys that begin with `prefix`, sorted by code point."""
        if begins_no_key(prefix):
            return []
        folder, _, start = prefix.rpartition("/")
        if folder and not _is_segment(folder):  # nothing outside the store, and nothing that no key can begin with
            return []
        found: list[str] = []
        try:
            items = self._list(folder)
        except NotADirectoryError:  # nothing is below a file
            return []
        for item in items:
            if not item.path.startswith(prefix) and not prefix.startswith(item.path + "/"):
                continue
            if item.kind == "folder":
                if not self.is_temporary(_name(item)):
                    found += self.keys_below(item.path)
            elif item.kind == "file" and self._is_key(item):
                found.append(item.path)
        return sorted(key for key in found if key.startswith(prefix)) if start or folder else sorted(found)

    def keys_in_order(self, prefix: str, folder: str = "") -> Iterator[str]:
        """Yield the keys that begin with `prefix`, sorted by code point, without holding more than those of a folder.

        A folder stands where its keys do, which go on with a slash behind its name.
        """
        items = self._list(folder)
        for item in sorted(items, key=lambda item: f"{item.path}/" if item.kind == "folder" else item.path):
            if item.kind == "folder":
                below = f"{item.path}/"
                if (below.startswith(prefix) or prefix.startswith(below)) and not self.is_temporary(_name(item)):
                    yield from self.keys_in_order(prefix, item.path)
            elif item.kind == "file" and item.path.startswith(prefix) and self._is_key(item):
                yield item.path

    def keys_below(self, folder: str) -> Iterator[str]:
        """Yield the keys below a folder, in no order, without holding all of them."""
        for item in self.walk(folder):
            if item.kind == "file" and self._is_key(item):
                yield item.path

    def is_key(self, path: str) -> bool:
        """Tell whether a file at `path` would be at a key."""
        return self._is_key(Item(path, "file"))

    def holds_files(self, folder: str) -> bool:
        """Tell whether anything but folders and unfinished files is below a folder."""
        try:
            return any(
                item.kind != "folder" and not self.is_temporary(item.path.rpartition("/")[2])
                for item in self.walk(folder)
            )
        except NotADirectoryError:
            return False

    def walk(self, folder: str, refused: Callable[[str, OSError], None] | None = None) -> Iterator[Item]:
        """Yield everything below a folder, not following symbolic links; a folder comes before what is in it.

        A folder that cannot be listed raises OSError, or is given to `refused` and passed over.
        """
        try:
            items = self._list(folder)
        except OSError as error:
            if refused is None:
                raise
            refused(folder, error)
            return
        for item in items:
            yield item
            if item.kind == "folder":
                if self.is_temporary(item.path.rpartition("/")[2]):
                    continue
                yield from self.walk(item.path, refused)

    def problems(self, *, fix: bool) -> Iterator[Problem]:
        """Yield what does not belong in the folder, except for the insides of logs; mend what `fix` may mend."""
        now = time.time_ns()
        refused: list[Problem] = []

        def refuse(folder: str, error: OSError) -> None:
            refused.append(Problem("unreadable", folder, f"The folder cannot be listed: {error.strerror}."))

        for item in self.walk("", refuse):
            name = item.path.rpartition("/")[2]
            place = item.path.encode(errors="backslashreplace").decode()
            if self.is_temporary(name):
                try:
                    age = now - self._files.status(self.path(item.path)).modified
                except FileNotFoundError:
                    continue  # its writer has finished
                old = age > _TEMPORARY_AGE_SECONDS * 1_000_000_000
                detail, fixed = "An unfinished write left it behind.", False
                if fix and old:
                    detail, fixed = _mended(partial(self.remove, item), detail, "It could not be removed")
                yield Problem("temporary-file", place, detail, fixed=fixed, harmless=True)
                continue
            if item.kind == "link":
                yield Problem("symbolic-link", place, "Symbolic links in a store are not followed.")
            elif item.kind == "other":
                yield Problem("wrong-kind", place, "It is neither a file nor a folder.")
            elif not _is_segment(name):
                yield Problem("wrong-name", place, "No key has such a name.")
            else:
                if item.kind == "folder" and self._layout.parse(item.path):
                    yield Problem("wrong-kind", place, "A folder stands where a file should be.")
                yield from self._loose(item, place, fix=fix)
        yield from refused

    def remove(self, item: Item) -> None:
        """Remove a file, or a folder with everything in it."""
        if item.kind == "folder":
            for inner in self._list(item.path):
                self.remove(inner)
            self._files.remove_folder(self.path(item.path))
        else:
            self._files.remove(self.path(item.path))

    def logs(self) -> Iterator[str]:
        """Yield the keys of all logs in folders that can be listed."""
        for item in self.walk("", lambda *_: None):
            if item.kind == "file" and self.is_log(item.path):
                yield item.path

    def is_log(self, key: str) -> bool:
        """Tell whether a key is that of a log."""
        return self.shape(key) is Shape.LOG

    def shape(self, key: str) -> Shape | None:
        """Return how what is at a key is stored; None if the map has no place for it."""
        place = self._layout.parse(key)
        return None if place is None else place.entry.shape

    def likely_shape(self, key: str) -> Shape | None:
        """Return the same faster, and also for a key that only ends as those of the map do."""
        return self._layout.leaves.get(key.rpartition("/")[2]) or self.shape(key)

    @property
    def quarantine(self) -> str:
        """The folder of what was set aside."""
        return self._layout.quarantine

    def _loose(self, item: Item, place: str, *, fix: bool) -> Iterator[Problem]:
        try:
            mode = self._files.status(self.path(item.path)).mode
        except FileNotFoundError:
            return
        if not mode & 0o077:
            return
        detail, fixed = f"Others may open it (mode {mode:04o}).", False
        if fix:
            wanted = PRIVATE_FOLDER if item.kind == "folder" else PRIVATE_FILE
            work = partial(self._files.set_mode, self.path(item.path), wanted)
            detail, fixed = _mended(work, detail, "Its permissions could not be repaired")
        yield Problem("loose-permissions", place, detail, fixed=fixed, harmless=True)

    def _list(self, folder: str) -> list[Item]:
        try:
            names = self._files.list_folder(self.path(folder))
        except FileNotFoundError:
            return []
        start = f"{folder}/" if folder else ""
        return [Item(start + name, kind) for name, kind in sorted(names)]

    def _is_key(self, item: Item) -> bool:
        name = item.path.rpartition("/")[2]
        return not self._layout.is_own(item.path) and not self.is_temporary(name) and _is_segment(name)


def _mended(work: Callable[[], None], detail: str, otherwise: str) -> tuple[str, bool]:
    """Mend something harmless; return what to say of it, and whether it is mended.

    What the system refuses, as it does to whoever does not own the file, hinders nothing else.
    """
    try:
        work()
    except OSError as error:
        return f"{detail} {otherwise}: {error.strerror}.", False
    return detail, True


def _name(item: Item) -> str:
    return item.path.rpartition("/")[2]


def _is_segment(name: str) -> bool:
    try:
        name.encode()
        check_key(name)
    except ValueError:  # ValidationError, or a name that is no UTF-8
        return False
    return True
