"""Places where something is made before it gets its name: all of it is there at once, or nothing.

What is unfinished has a name that says so, beside the place, and a lock that ends with its maker. Whoever comes after a
death finds the lock free and begins anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from abc import ABC, abstractmethod
from typing import BinaryIO

from ..errors import ConflictError, NotFoundError, UnavailableError


class _Staging(ABC):
    """A path, and an unfinished one beside it."""

    _FLAGS = os.O_RDWR

    def __init__(self, target: str) -> None:
        self.target = os.path.abspath(target)
        folder, name = os.path.split(self.target)
        if not name:
            raise ConflictError(f"{target} cannot be made: name a place in a folder.")
        self._folder = folder
        self.path = os.path.join(folder, f".{name}.unfinished")
        self._lock = -1

    @abstractmethod
    def _make(self) -> None:
        """Make the unfinished place; raise FileExistsError if it is there."""

    def _take(self) -> None:
        """Make the unfinished place, or take over that of somebody who died."""
        make_private_folders(self._folder)
        while True:
            with contextlib.suppress(FileExistsError):
                self._make()
            lock = os.open(self.path, self._FLAGS | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(lock)
                raise UnavailableError(
                    f"Somebody is making {self.target} at this moment.", hint="Wait for that, or choose another name."
                ) from error
            try:
                same = os.path.samestat(os.fstat(lock), os.lstat(self.path))
            except FileNotFoundError:
                same = False
            if same:
                self._lock = lock
                return
            os.close(lock)  # its maker has just finished

    def _let_go(self) -> None:
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def _sync_folder(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class NewFile(_Staging):
    """A file that is there whole or not at all, and replaces none."""

    def __init__(self, target: str) -> None:
        """Begin; raise ConflictError if there is something at `target`."""
        super().__init__(target)
        refuse_taken(self.target)
        self._take()
        self.file: BinaryIO = os.fdopen(os.dup(self._lock), "r+b")
        self.file.truncate(0)

    def _make(self) -> None:
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))

    def finish(self) -> None:
        """Make the bytes durable."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def publish(self) -> None:
        """Give it its name.

        Raises:
            ConflictError: Somebody else has made it meanwhile.
        """
        _give_name(self.path, self.target)
        self._sync_folder()

    def close(self) -> None:
        """Remove what is unfinished."""
        self.file.close()
        if self._lock >= 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        self._let_go()


class NewFolder(_Staging):
    """A folder that is there whole or not at all, and replaces none but an empty one."""

    _FLAGS = os.O_RDONLY | os.O_DIRECTORY

    def __init__(self, target: str) -> None:
        """Begin, in an empty folder; raise ConflictError if there is something at `target`."""
        super().__init__(target)
        if not is_free_for_a_folder(self.target):
            refuse_taken(self.target)
        self._take()
        self._empty()

    def _make(self) -> None:
        os.mkdir(self.path, 0o700)

    def _empty(self) -> None:
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)

    def finish(self) -> None:
        """Make all that is in it durable."""
        os.sync()  # one call, where a flush of each file would take a thousand times as long

    def publish(self) -> None:
        """Give it its name.

        Raises:
            ConflictError: Somebody else has made it meanwhile.
        """
        try:
            os.rename(self.path, self.target)
        except OSError as error:
            raise ConflictError(f"{self.target} was made by somebody else meanwhile ({error.strerror}).") from error
        self._sync_folder()
        self._let_go()

    def publish_file(self, name: str) -> None:
        """Give a file in it the name instead; nothing else that is in it stays.

        Raises:
            ConflictError: Somebody else has made one meanwhile.
        """
        _give_name(os.path.join(self.path, name), self.target)
        self._sync_folder()

    def close(self) -> None:
        """Remove what is unfinished."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
        self._let_go()


def _give_name(path: str, target: str) -> None:
    try:
        os.link(path, target)  # which, other than a renaming, replaces nothing
    except FileExistsError as error:
        raise ConflictError(f"{target} was made by somebody else meanwhile.") from error
    except OSError:  # a file system without links
        refuse_taken(target)
        os.rename(path, target)


def make_private_folders(path: str) -> None:
    """Make a folder, and those around it that are missing, for nobody else to look into."""
    if not os.path.isdir(path):
        make_private_folders(os.path.dirname(path))
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)


def is_free_for_a_folder(path: str) -> bool:
    """Tell whether a folder can be made at a path: nothing is there, or an empty folder."""
    try:
        with os.scandir(path) as entries:
            return next(entries, None) is None
    except FileNotFoundError:
        return not os.path.islink(path)
    except NotADirectoryError:
        return False


def require_folder_of(path: str) -> None:
    """Raise NotFoundError if the folder around a path is absent."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise NotFoundError(
            f"There is no folder {folder}; nothing was written.", hint="Make it first, or is its disk not mounted?"
        )


def refuse_taken(path: str) -> None:
    """Raise ConflictError if there is anything at a path."""
    if os.path.lexists(path):
        what = "is not empty" if os.path.isdir(path) else "exists already"
        raise ConflictError(f"{path} {what}; nothing was changed.", hint="Choose another name, or move it away first.")
