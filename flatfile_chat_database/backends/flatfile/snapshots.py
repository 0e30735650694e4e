"""One state of a store that others go on writing to.

Every file gets a second name, a hard link in a folder of the snapshot's own, and a catalogue notes its key and size. A
document is replaced by another file and a log only grows or is replaced, so the bytes up to that size stay as they are
under the second name. This goes on beside all writers; what they changed meanwhile, as the journal tells, is taken
again; and only for what changed in the last moments the store's lock is held. So writers wait for a few files, however
large the store is.

It costs a name for each file, and no copy of its bytes except for a log that ends in half a line, which a writer would
cut, and where the file system has no hard links. Memory does not grow with the store: the catalogue is a file of SQLite
in the same folder. Whoever is killed leaves the folder behind, which `check` finds as a temporary file.
"""

from __future__ import annotations

import contextlib
import errno
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from ...errors import ClosedError, IntegrityError, UnavailableError
from ...layout import Shape
from ..base import Snapshot, StorageBackend
from ..readers import InThread
from ..rules import begins_no_key, check_key, not_found
from .files import Files
from .history import History
from .oserrors import mapped
from .tree import Item, Tree

T = TypeVar("T")

_IN_A_FOLDER = 4096
_CHUNK_BYTES = 1 << 20
_KEYS_AT_ONCE = 1000
_FEW_KEYS = 64
"""As many are taken while writers wait; more are taken before, beside them."""
_ROUNDS = 8
_TABLE = """
CREATE TABLE held (
    key TEXT PRIMARY KEY,
    number INTEGER NOT NULL,
    size INTEGER NOT NULL,
    inode INTEGER NOT NULL,
    seen INTEGER NOT NULL
) WITHOUT ROWID
"""


class Frozen:
    """The files of a snapshot; every method blocks."""

    def __init__(self, files: Files, tree: Tree, history: History) -> None:
        self._files = files
        self._tree = tree
        self._history = history
        self._folder = tree.temporary("snapshot")
        self._catalogue: sqlite3.Connection | None = None
        self._cursor = ""
        self._taken: list[tuple[str, int, int, int, int]] = []
        """Rows that are not in the catalogue yet."""
        self._count = 0
        self._looks = 0
        self._has_ended = False
        self._lock = threading.RLock()  # a caller who is cancelled ends it while a thread may still be at it

    def begin(self) -> bool:
        """Take all files, and those that change meanwhile again; return False where there is nothing to freeze.

        That is where there is no store, or one on a medium that nobody can write to.

        Raises:
            UnavailableError: The folder of the store does not let us write.
        """
        with self._lock:
            self._check()
            try:
                self._files.status(self._tree.path(""))
                self._files.make_folder(self._folder)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EROFS):
                    return False
                if error.errno in (errno.EACCES, errno.EPERM):
                    raise UnavailableError(
                        f"A snapshot needs to make a folder in the store, which is refused: {error.strerror}.",
                        hint="Make it as somebody who may write to the store.",
                    ) from error
                raise
            self._catalogue = sqlite3.connect(
                f"{self._folder}/catalogue", isolation_level=None, check_same_thread=False
            )
            for setting in ("journal_mode = OFF", "synchronous = OFF", "locking_mode = EXCLUSIVE"):
                self._execute(f"PRAGMA {setting}")
            self._execute(_TABLE)
            self._execute("BEGIN")
            self._cursor = self._history.changes(None).cursor
            self._take_all()
            for _ in range(_ROUNDS):
                keys = self._changed()
                if keys is not None and len(keys) <= _FEW_KEYS:
                    self._take_again(keys)
                    break
                self._take_changed(keys)
            return True

    def settle(self) -> None:
        """Take what has changed since; nobody writes meanwhile."""
        with self._lock:
            self._check()
            self._take_changed(self._changed())
            self._take_again([self._tree.quarantine])  # what is set aside is not in the journal

    def end(self) -> None:
        """Let go of all of it."""
        self._has_ended = True  # so that whoever is at it stops
        with self._lock, mapped():
            catalogue, self._catalogue = self._catalogue, None
            if catalogue is not None:
                catalogue.close()
            with contextlib.suppress(FileNotFoundError):
                self._tree.remove(Item(self._folder[len(self._tree.path("")) + 1 :], "folder"))

    # --- taking files --------------------------------------------------------------------------------

    def _changed(self) -> frozenset[str] | None:
        changes = self._history.changes(self._cursor or None)
        self._cursor = changes.cursor
        return changes.keys

    def _take_changed(self, keys: frozenset[str] | None) -> None:
        if keys is None:
            self._take_all()
        else:
            self._take_again(keys)

    def _take_all(self) -> None:
        """Look at all files; take those that are not held as they are now."""
        self._looks += 1
        for key in self._tree.keys_below(""):
            self._check()
            rows = self._looks > 1 and self._execute("SELECT size, inode FROM held WHERE key = ?", (key,))
            if rows:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    _, inode, size = self._files.measure(self._tree.path(key))
                    if rows == [(size, inode)]:  # the link keeps the inode from being given to another file
                        self._execute("UPDATE held SET seen = ? WHERE key = ?", (self._looks, key))
                        continue
                self._drop("key = ?", key)
            self._take(key)
        self._drop("seen < ?", self._looks)

    def _take_again(self, keys: Iterable[str]) -> None:
        """Take what is at and below keys, instead of what is held of it."""
        for key in keys:
            self._drop("key = ?", key)
            self._drop("key > ? AND key < ?", f"{key}/", f"{key}0")
            try:
                kind = self._files.status(self._tree.path(key)).kind
            except (FileNotFoundError, NotADirectoryError):
                continue
            if kind == "folder":
                for below in self._tree.keys_below(key):
                    self._take(below)
            elif kind == "file" and self._tree.is_key(key):
                self._take(key)

    def _take(self, key: str) -> None:
        number = self._count
        self._count += 1
        if number % _IN_A_FOLDER == 0:
            self._files.make_folder(f"{self._folder}/{number // _IN_A_FOLDER}")
        try:
            size, inode = self._hold(key, self._place(number))
        except (FileNotFoundError, NotADirectoryError):  # gone meanwhile
            return
        self._taken.append((key, number, size, inode, self._looks))
        if len(self._taken) >= _KEYS_AT_ONCE:
            self._note()

    def _hold(self, key: str, place: str) -> tuple[int, int]:
        """Keep the bytes at a key in `place`; return how many they are, and which inode has them, -1 for a copy."""
        try:
            self._files.link(self._tree.path(key), place)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise
            # Not possible on this file system, too many names already, or not allowed for another owner's file.
            return self._copy(key, place), -1
        _, inode, size = self._files.measure(place)
        if size and not self._is_replaced_whole(key) and not self._ends_in_newline(place, size):
            self._files.remove(place)
            return self._copy(key, place), -1
        return size, inode

    def _is_replaced_whole(self, key: str) -> bool:
        return self._tree.likely_shape(key) in (Shape.DOCUMENT, Shape.BLOB)

    def _ends_in_newline(self, place: str, size: int) -> bool:
        descriptor = self._files.open_to_read(place)
        try:
            return self._files.read(descriptor, 1, size - 1) == b"\n"
        finally:
            self._files.close(descriptor)

    def _copy(self, key: str, place: str) -> int:
        source = self._files.open_to_read(self._tree.path(key))
        try:
            target = self._files.create(place)
            try:
                offset = 0
                while data := self._files.read(source, _CHUNK_BYTES, offset):
                    self._files.write_all(target, data)
                    offset += len(data)
                return offset
            finally:
                self._files.close(target)
        finally:
            self._files.close(source)

    def _drop(self, condition: str, *values: object) -> None:
        for (number,) in self._execute(f"SELECT number FROM held WHERE {condition}", values):
            self._files.remove(self._place(number))
        self._execute(f"DELETE FROM held WHERE {condition}", values)

    def _place(self, number: int) -> str:
        return f"{self._folder}/{number // _IN_A_FOLDER}/{number}"

    # --- reading -------------------------------------------------------------------------------------

    def sized_keys(self, prefix: str, after: str) -> list[tuple[str, int]]:
        """Return the first keys behind `after` that begin with `prefix`, sorted, with the bytes at each."""
        if begins_no_key(prefix):
            return []
        with self._lock:
            start = max(prefix, after)
            rows = self._execute(
                "SELECT key, size FROM held WHERE key >= ? AND key > ? ORDER BY key LIMIT ?",
                (start, after, _KEYS_AT_ONCE),
            )
            return [(key, size) for key, size in rows if key.startswith(prefix)]

    def read(self, key: str, offset: int = 0, most: int | None = None) -> bytes | None:
        """Return the bytes at a key from `offset` on, at most so many; None if it is absent.

        Raises:
            IntegrityError: The file has become shorter, by hand.
        """
        with self._lock, mapped(key):
            rows = self._execute("SELECT number, size FROM held WHERE key = ?", (key,))
            if not rows:
                return None
            number, size = rows[0]
            wanted = max(0, size - offset if most is None else min(most, size - offset))
            descriptor = self._files.open_to_read(self._place(number))
            try:
                data = self._files.read(descriptor, wanted, offset)
                while len(data) < wanted:
                    more = self._files.read(descriptor, wanted - len(data), offset + len(data))
                    if not more:
                        raise IntegrityError(f"{key} became shorter while it was read.", key=key)
                    data += more
                return data
            finally:
                self._files.close(descriptor)

    def _execute(self, statement: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Do a statement on the catalogue, with all that was taken in it."""
        if self._taken:
            self._note()
        with self._catalogued() as catalogue:
            return catalogue.execute(statement, parameters).fetchall()

    def _note(self) -> None:
        taken, self._taken = self._taken, []
        with self._catalogued() as catalogue:
            catalogue.executemany("INSERT INTO held VALUES (?, ?, ?, ?, ?)", taken)

    @contextlib.contextmanager
    def _catalogued(self) -> Iterator[sqlite3.Connection]:
        if self._catalogue is None:
            raise ClosedError("The snapshot has ended.")
        try:
            yield self._catalogue
        except sqlite3.Error as error:
            raise UnavailableError(f"The catalogue of the snapshot: {error}.", hint="Is the disk full?") from error

    def _check(self) -> None:
        if self._has_ended:
            raise ClosedError("The snapshot has ended.")


class FlatfileSnapshot(Snapshot):
    """What the contract wants of a snapshot, over files that are held."""

    def __init__(self, backend: StorageBackend, frozen: Frozen, in_thread: InThread) -> None:
        super().__init__(backend)
        self._frozen = frozen
        self._in_thread = in_thread

    async def sized(self, prefix: str = "") -> AsyncIterator[list[tuple[str, int]]]:
        after = ""
        while run := await self._in_thread(partial(self._frozen.sized_keys, prefix, after)):
            yield run
            after = run[-1][0]

    async def read(self, key: str) -> AsyncIterator[bytes]:
        check_key(key)
        offset = 0
        while data := await self._in_thread(partial(self._frozen.read, key, offset, _CHUNK_BYTES)):
            yield data
            offset += len(data)
        if data is None:
            raise not_found(f"The file {key}", key)

    async def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        return await self._in_thread(lambda: [self._frozen.read(key) for key in keys])
