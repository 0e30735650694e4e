"""Reading an archive, a file or a folder, and verifying it as it passes.

Nothing that it says is believed: names are only looked up in the map, sizes and counts are compared with what comes,
and what is wrong is said with the member it is in. Everything here blocks.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import tempfile
import unicodedata
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Final, Protocol

import msgspec

from ..backends.rules import check_key
from ..config import StorageConfig
from ..errors import IntegrityError, UnavailableError, ValidationError
from ..layout import Layout
from . import tar
from .archive import (
    HEADER,
    MANIFEST,
    MOST_IN_A_RUN,
    MOST_TEXT,
    STORE,
    Header,
    Manifest,
    Sight,
    Tally,
    check_names,
    checksums_name,
    decode,
    encode,
    is_checksums,
    look_at,
)
from .formats import GZIP, MOST_RATIO, said_by
from .packing import Unpacker, is_packed_otherwise, packing_of

SMALL_BYTES: Final = 4 << 20
"""Larger files are given as open temporary files."""
_CHUNK_BYTES: Final = 1 << 20


class Limits(msgspec.Struct, frozen=True):
    """What an archive may hold at most; for archives of strangers."""

    files: int = 100_000_000
    bytes_per_file: int = 1 << 40
    bytes: int = 1 << 44
    """Of all files. Room on the disk is looked at as well, before anything is written."""
    ratio: int = MOST_RATIO
    """Bytes that may come out of a compressed one, beyond the first 64 MiB."""


UNLIMITED: Final = Limits(1 << 60, 1 << 60, 1 << 60, 1 << 60)


@dataclass(frozen=True, slots=True)
class Item:
    """A file of the store, read from an archive."""

    key: str
    sight: Sight
    size: int
    data: bytes | None
    """The bytes; None if they are many."""
    file: BinaryIO | None
    """Then this has them, at its beginning, if they are kept; it is closed when the next item is asked for."""


class Source(Protocol):
    """The members of an archive, in their order."""

    def following(self) -> tuple[str, int] | None:
        """Return the name and size of the next member; None behind the last, where nothing else is."""

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes of that member; none at its end."""

    def position(self) -> tuple[int, int]:
        """Return how many bytes of the archive have been read, and how many there are."""

    def close(self) -> None:
        """Let go of it."""


def open_source(path: str, limits: Limits) -> Source:
    """Open an archive: a file, or a folder.

    Raises:
        IntegrityError: It is none.
        OSError: It cannot be read.
    """
    if os.path.isdir(path):
        return Folder(path)
    return Archive(path, limits)


def is_archive(path: str) -> bool:
    """Tell whether there is, by its beginning, an archive at a path; it may be damaged, or not of chatdb."""
    if os.path.isdir(path):
        return os.path.exists(os.path.join(path, HEADER))
    try:
        with open(path, "rb") as file:
            beginning = file.read(tar.BLOCK)
            file.seek(0)
            if packing_of(beginning) != GZIP:
                return packing_of(beginning) is not None or is_packed_otherwise(beginning)
            try:
                unpacker = Unpacker(file, name=path, most_ratio=None)
                return tar.is_header(unpacker.read(tar.BLOCK))  # or it is text, with gzip
            except IntegrityError:
                return said_by(path) == GZIP
    except OSError:
        return False


# --- a file ------------------------------------------------------------------------------------------------


class Archive:
    """A compressed tar stream."""

    def __init__(self, path: str, limits: Limits) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed by `close`
        try:
            status = os.fstat(self._file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValidationError(f"{path} is no file.", hint="Name an archive of chatdb, or the folder of one.")
            self._size = status.st_size
            self._stream = Unpacker(self._file, name=path, most_ratio=limits.ratio)
        except BaseException:
            self._file.close()
            raise
        self._name = "The archive"
        self._left = 0
        self._padding = 0
        self._moment: int | None = None

    def following(self) -> tuple[str, int] | None:
        self._pass(self._left)
        if any(tar.exactly(self._stream, self._padding, "a member")):
            raise IntegrityError(f"{self._name}: something stands between this member and the next.")
        self._padding = 0
        found = tar.read_header(self._stream)
        if found is None:
            if self._stream.read(1):
                raise IntegrityError("Something follows the end of the archive: two archives in one?")
            return None
        self._name, self._left, moment = found
        if moment != (self._moment if self._moment is not None else moment):
            raise IntegrityError(f"{self._name}: the time of the member is another one than of those before it.")
        self._moment = moment
        self._padding = len(tar.padding(self._left))
        return self._name, self._left

    def read(self, size: int) -> bytes:
        wanted = min(size, self._left)
        if not wanted:
            return b""
        data = self._stream.read(wanted)
        if not data:
            raise IntegrityError(f"{self._name}: the archive ends in the middle of this member: it is truncated.")
        self._left -= len(data)
        return data

    def _pass(self, size: int) -> None:
        while size:
            size -= len(self.read(min(size, _CHUNK_BYTES)))

    def position(self) -> tuple[int, int]:
        return self._stream.taken, self._size

    def close(self) -> None:
        self._file.close()


# --- a folder ----------------------------------------------------------------------------------------------


class Folder:
    """An archive that was written, or unpacked, as a folder. Nothing in it is followed that is no plain file."""

    def __init__(self, path: str) -> None:
        self._root = os.path.abspath(path)
        self._names = self._members()
        self._file: BinaryIO | None = None
        self._left = 0
        self._name = ""
        self._read = 0
        self._found = 0
        self._size = 0

    def _members(self) -> Iterator[str]:
        """Yield the names in the order in which they stand in an archive: hashes tell which files are before them."""
        self._refuse_others()
        yield HEADER
        number = 1
        while os.path.lexists(os.path.join(self._root, checksums_name(number))):
            with self._opened(checksums_name(number)) as file:
                text = file.read(MOST_TEXT + 1)
            lines = text.split(b"\n")[:-1]
            if len(text) > MOST_TEXT or len(lines) > MOST_IN_A_RUN:
                raise IntegrityError(f"{checksums_name(number)}: it is too long.")
            for line in lines:
                try:
                    name = line[66:].decode()
                except UnicodeDecodeError:
                    name = ""
                if not name.startswith(STORE):
                    raise IntegrityError(f"{checksums_name(number)}: {ascii(line)[1:200]} names no file of the store.")
                yield name
            yield checksums_name(number)
            number += 1
        yield MANIFEST

    def _refuse_others(self) -> None:
        """Count what is there, so that nothing is there that is in no list; refuse what is no file and no folder."""
        pending = [""]
        while pending:
            folder = pending.pop()
            with os.scandir(os.path.join(self._root, folder)) as entries:
                for entry in entries:
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(name)
                    elif entry.is_file(follow_symlinks=False):
                        self._found = self._found + 1
                        self._size += entry.stat(follow_symlinks=False).st_size
                    else:
                        what = "a symbolic link" if entry.is_symlink() else "neither a file nor a folder"
                        raise IntegrityError(f"{ascii(name)[1:-1]}: it is {what}; only files are taken.")

    def following(self) -> tuple[str, int] | None:
        self._close_member()
        name = next(self._names, None)
        if name is None:
            if self._read != self._found:
                raise IntegrityError(
                    f"There are {self._found:,} files in the folder, and {self._read:,} in its lists.",
                    hint="Take out what does not belong to it.",
                )
            return None
        self._read += 1
        if name.startswith(STORE):
            _check_member(name)
        self._name = name
        self._file = self._open(name)
        self._left = os.fstat(self._file.fileno()).st_size
        return name, self._left

    @contextmanager
    def _opened(self, name: str) -> Iterator[BinaryIO]:
        file = self._open(name)
        try:
            yield file
        finally:
            file.close()

    def _open(self, name: str) -> BinaryIO:
        """Open a member, following no symbolic link on the way to it."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        *folders, last = name.split("/")
        place = os.open(self._root, flags & ~os.O_NOFOLLOW | os.O_DIRECTORY)
        try:
            for folder in folders:
                outer, place = place, os.open(folder, flags | os.O_DIRECTORY, dir_fd=place)
                os.close(outer)
            descriptor = os.open(last, flags | os.O_NONBLOCK, dir_fd=place)
        except OSError as error:
            if error.errno == errno.ENOENT:
                hint = (
                    "It is no backup and no export; a store is copied by `chatdb migrate`." if name == HEADER else None
                )
                raise IntegrityError(f"{name}: the file is missing.", hint=hint) from error
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise IntegrityError(f"{name}: a symbolic link is in its place, or on the way to it.") from error
            raise UnavailableError(f"{name}: {error.strerror}.") from error
        finally:
            os.close(place)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise IntegrityError(f"{name}: it is no file.")
        return os.fdopen(descriptor, "rb")

    def read(self, size: int) -> bytes:
        if self._file is None or not self._left:
            return b""
        data = self._file.read(min(size, self._left))
        if not data:
            raise IntegrityError(f"{self._name}: it became shorter while it was read.")
        self._left -= len(data)
        return data

    def position(self) -> tuple[int, int]:
        return 0, self._size

    def _close_member(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        self._close_member()


# --- verifying ---------------------------------------------------------------------------------------------


class Reader:
    """The files of an archive, each given as it comes; only when all have come is it known that they are right."""

    def __init__(self, path: str | os.PathLike[str], config: StorageConfig, limits: Limits) -> None:
        """Open the archive and read what it says of itself.

        Raises:
            IntegrityError: It is no archive, or damaged.
            ConfigurationError: It is of another version, or was made with other names.
            OSError: It cannot be read.
        """
        self._layout = Layout(config)
        self._limits = limits
        self._source = open_source(os.fspath(path), limits)
        try:
            self.header, self._tally = self._begin(os.fspath(path), config)
        except BaseException:
            self._source.close()
            raise
        self.temporary_folder: str | None = None
        """Where large files are kept until they are read; the system's folder if it is None."""
        self._rank: str | None = None
        self._folder = ""
        self._folded: dict[str, str] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the archive."""
        self._source.close()

    @property
    def counts(self) -> dict[str, int]:
        """How many files of each entry have come."""
        return self._tally.counts

    @property
    def done(self) -> int:
        """How many bytes of files have come."""
        return self._tally.bytes

    @property
    def files(self) -> int:
        """How many files have come."""
        return self._tally.files

    def _begin(self, path: str, config: StorageConfig) -> tuple[Header, Tally]:
        try:
            member = self._source.following()
        except IntegrityError as error:
            text = f"{path} is no archive of chatdb, or damaged at its beginning. {error.message}"
            raise IntegrityError(text, hint=error.hint) from error
        if member is None or member[0] != HEADER:
            found = "nothing" if member is None else ascii(member[0])
            raise IntegrityError(f"{path} is no archive of chatdb: it begins with {found}, not with {HEADER}.")
        data = self._text(*member)
        header = decode(HEADER, data, Header)
        if encode(header) != data:
            raise IntegrityError(f"{HEADER}: it is not in the form in which chatdb writes it.")
        check_names(header, config)
        for name, limit in (("files", self._limits.files), ("bytes", self._limits.bytes)):
            if (value := getattr(header, name)) > limit:
                raise IntegrityError(f"{HEADER}: it announces {value:,} {name}; {limit:,} are allowed.")
        return header, Tally(data)

    def require_room(self, folder: str) -> None:
        """Refuse an archive whose files do not fit on the disk.

        Raises:
            UnavailableError: There is too little room.
        """
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder) or "."
        status = os.statvfs(folder)
        room = status.f_bavail * status.f_frsize
        if self.header.bytes > room:
            raise UnavailableError(
                f"The files take {self.header.bytes:,} bytes, and {folder} has room for {room:,}.",
                hint="Make room, or choose another place. Nothing was changed.",
            )

    def items(self, *, keeps: bool = True) -> Generator[Item]:
        """Yield the files; raise when something is wrong, at the end at the latest.

        Without `keeps` large files are only looked at, and nobody gets their bytes.

        Raises:
            IntegrityError: The archive is not whole, or holds what does not belong there.
        """
        while True:
            member = self._source.following()
            if member is None:
                raise IntegrityError(f"The archive ends without {MANIFEST}: it is truncated.")
            name, size = member
            if name.startswith(STORE):
                yield from self._item(name, size, keeps=keeps)
            elif is_checksums(name):
                self._end_run(name, size)
            elif name == MANIFEST:
                self._end(size)
                return
            else:
                raise IntegrityError(f"{ascii(name)[1:-1]}: no archive of chatdb has such a member.")

    def _item(self, name: str, size: int, *, keeps: bool) -> Iterator[Item]:
        key, sight = self._allowed(name, size)
        digest = hashlib.sha256()
        if size <= SMALL_BYTES:
            data = b"".join(self._chunks())
            digest.update(data)
            self._tally.add(key, sight.entry, size, digest.hexdigest())
            yield Item(key, sight, size, data, None)
            return
        if not keeps:
            for chunk in self._chunks():
                digest.update(chunk)
            self._tally.add(key, sight.entry, size, digest.hexdigest())
            yield Item(key, sight, size, None, None)
            return
        with tempfile.TemporaryFile(prefix="chatdb-", dir=self.temporary_folder) as file:
            for chunk in self._chunks():
                digest.update(chunk)
                file.write(chunk)
            file.seek(0)
            self._tally.add(key, sight.entry, size, digest.hexdigest())
            yield Item(key, sight, size, None, file)

    def _allowed(self, name: str, size: int) -> tuple[str, Sight]:
        key = _check_member(name)
        sight = look_at(self._layout, key)
        if sight is None:
            raise IntegrityError(f"{name}: the map of a store has no place for it.")
        if self.header.kind == "export" and not sight.is_living:
            raise IntegrityError(f"{name}: an export has nothing of the trash and the quarantine.")
        user = self.header.user
        if user is not None and sight.entry != "store" and sight.names.get("user_id") != user:
            raise IntegrityError(f"{name}: it is nothing of the user {user!a}, whose export this is.")
        if self._rank is not None and sight.rank <= self._rank:
            what = "it comes twice" if sight.rank == self._rank else "it comes too late in the order of members"
            raise IntegrityError(f"{name}: {what}.")
        self._rank = sight.rank
        self._refuse_alike(name, key, sight)
        if size > self._limits.bytes_per_file:
            raise IntegrityError(f"{name}: it has {size:,} bytes; {self._limits.bytes_per_file:,} are allowed.")
        if self._tally.files + 1 > self.header.files or self._tally.bytes + size > self.header.bytes:
            raise IntegrityError(
                f"{name}: with it there are more files or bytes than {HEADER} says "
                f"({self.header.files:,} files, {self.header.bytes:,} bytes)."
            )
        if self._tally.in_run >= MOST_IN_A_RUN:
            raise IntegrityError(f"{name}: hashes are missing before it.")
        return key, sight

    def _refuse_alike(self, name: str, key: str, sight: Sight) -> None:
        """Refuse names that are one where a file system ignores case or normalises Unicode; ids never are."""
        if not sight.is_named_by_others:
            return
        folder, _, last = key.rpartition("/")
        if folder != self._folder:
            self._folder, self._folded = folder, {}
        other = self._folded.setdefault(folded(last), last)
        if other != last:
            raise IntegrityError(f"{name}: on some file systems its name is the same as that of {other!a}.")

    def _chunks(self) -> Iterator[bytes]:
        while chunk := self._source.read(_CHUNK_BYTES):
            yield chunk

    def _text(self, name: str, size: int) -> bytes:
        if size > MOST_TEXT:
            raise IntegrityError(f"{name}: it has {size:,} bytes; {MOST_TEXT:,} are allowed.")
        return b"".join(self._chunks())

    def _end_run(self, name: str, size: int) -> None:
        if not self._tally.in_run:
            raise IntegrityError(f"{ascii(name)[1:-1]}: hashes of no files.")
        expected_name, expected = self._tally.end_run()
        if name != expected_name:
            raise IntegrityError(f"{ascii(name)[1:-1]}: hashes in {expected_name} should come here.")
        data = self._text(name, size)
        if data == expected:
            return
        for line, wanted in zip(data.split(b"\n"), expected.split(b"\n"), strict=False):
            if line != wanted:
                member = wanted[66:].decode() or ascii(line[66:].decode(errors="replace"))[1:-1]
                raise IntegrityError(f"{member}: its bytes or its name are not those that {name} lists: damaged.")
        raise IntegrityError(f"{name}: it lists other files than those before it.")

    def _end(self, size: int) -> None:
        if self._tally.in_run:
            raise IntegrityError(f"{MANIFEST}: the hashes of the last files are missing.")
        data = self._text(MANIFEST, size)
        found, wanted = decode(MANIFEST, data, Manifest), self._tally.manifest()
        for field in Manifest.__struct_fields__:
            if getattr(found, field) != getattr(wanted, field):
                raise IntegrityError(
                    f"{MANIFEST}: {field} is {str(getattr(found, field))[:100]!a}, but what came before it makes "
                    f"{str(getattr(wanted, field))[:100]!a}."
                )
        if (wanted.files, wanted.bytes) != (self.header.files, self.header.bytes):
            raise IntegrityError(f"{HEADER}: it announces more files or bytes than there are.")
        if self._source.following() is not None:
            raise IntegrityError(f"Something follows {MANIFEST}, which is the end of an archive.")


def folded(name: str) -> str:
    """Return what is equal for names that some file system takes for one."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).casefold()


def _check_member(name: str) -> str:
    """Return the key of a member.

    Raises:
        IntegrityError: It is none.
    """
    try:
        return check_key(name.removeprefix(STORE))
    except ValidationError as error:
        raise IntegrityError(
            f"{ascii(name)[1:-1]}: no key has such a name; it could leave the place where it belongs."
        ) from error


def verify(path: str | os.PathLike[str], config: StorageConfig, limits: Limits = UNLIMITED) -> Header:
    """Read an archive to its end and return what it says of itself.

    Raises:
        IntegrityError: It is damaged.
    """
    with Reader(path, config, limits) as reader:
        for _ in reader.items(keeps=False):
            pass
        return reader.header
