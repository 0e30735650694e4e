"""Writing archives: `backup`, all of a store in one file, and `export_store`, its living records for other programs."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from importlib import metadata
from typing import Any, BinaryIO, Final, Protocol, cast

from ..backends.base import Snapshot, StorageBackend
from ..errors import ConfigurationError, IntegrityError, NotFoundError
from ..layout import Layout
from ..models import format_timestamp, new_id, utc_now
from ..records.store import FORMAT_VERSION, Store
from ..storage import StorageManager
from . import tar
from .archive import (
    FORMAT,
    HEADER,
    MANIFEST,
    MOST_IN_A_RUN,
    STORE,
    VERSION,
    Header,
    Kind,
    Tally,
    encode,
    look_at,
    names_of,
)
from .formats import FOLDER, GZIP, ZSTD, format_of
from .listing import Listing
from .packing import Packer, best
from .reading import verify
from .report import ArchiveReport, Progress
from .staging import NewFile, NewFolder, make_private_folders, require_folder_of
from .thread import Thread, one_thread

_AT_ONCE_BYTES: Final = 1 << 20
_AT_ONCE: Final = 256
"""Small files that are read and written together."""
_MOST_IN_A_RUN_BYTES: Final = 64 << 20


async def backup(
    storage: StorageManager | StorageBackend,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002 - the word that everybody looks for
    progress: Progress | None = None,
) -> ArchiveReport:
    """Write everything that is in a store to one file, as it is in one moment, while others go on writing.

    What was acknowledged before the call is in it, and every commit wholly or not at all. Trash and quarantine are in
    it, search indexes are not: they are made anew. The file is written beside its place, made durable, read again and
    verified, and only then gets its name; `restore` makes a store of it and `import_archive` adds it to one.

    Args:
        storage: What to back up.
        path: The file, which must not exist.
        format: `tar.zst` or `tar.gz`; left out, it is what the ending of `path` says, otherwise `tar.zst` if Zstandard
            is installed.
        progress: Called now and then with the bytes done and all bytes; writing and verifying count once each.

    Raises:
        ConfigurationError: There is no such format, `path` ends as something else does, or it needs the extra `zstd`.
        ConflictError: There is something at `path`.
        IntegrityError: What the store says of a file is wrong, or what was written cannot be read again.
        NotFoundError: There is no store, or no folder for the file.
        OSError: The file cannot be written.
    """
    packing = format_of(path, format, otherwise=best())
    if packing == FOLDER:
        raise ConfigurationError("A backup is one file.", hint=f"Use {ZSTD} or {GZIP}; `export` can make a folder.")
    return await _write(storage, os.fspath(path), packing, "backup", None, progress)


async def export_store(
    storage: StorageManager | StorageBackend,
    target: str | os.PathLike[str],
    *,
    user_id: str | None = None,
    format: str | None = None,  # noqa: A002
    progress: Progress | None = None,
) -> ArchiveReport:
    """Write the living records of a store, or of one of its users, to a folder or a file, as they are in one moment.

    What is in the trash or the quarantine is left out. In a folder the records stand as plain files under `store/`, in
    the layout of a store of files; `checksums/` can be verified with `sha256sum -c`. `import_archive` adds them to
    another store.

    Args:
        storage: What to export.
        target: The folder, which must be absent or empty, or the file, which must not exist.
        user_id: Whose records; everybody's, with panels and global personas, when left out.
        format: `folder`, `tar.zst` or `tar.gz`; left out, it is what the ending of `target` says, otherwise `folder`.
        progress: Called now and then with the bytes done and all bytes.

    Raises:
        ConfigurationError: There is no such format, `target` ends as something else does, or it needs the extra `zstd`.
        ConflictError: There is something at `target`.
        IntegrityError: What the store says of a file is wrong.
        NotFoundError: There is no store, no such user, or no folder for the target.
        OSError: The target cannot be written.
        ValidationError: `user_id` can name nobody.
    """
    if user_id is not None:
        Layout(storage.config).key("user", user_id=user_id)
    chosen = format_of(target, format, otherwise=FOLDER)
    return await _write(storage, os.fspath(target), chosen, "export", user_id, progress)


# --- where it is written to --------------------------------------------------------------------------------


class Sink(Protocol):
    """Where the members of an archive go; every method blocks."""

    path: str
    """Of what is unfinished."""

    def begin(self, name: str, size: int) -> None:
        """Begin a member."""

    def write(self, data: bytes) -> None:
        """Add to the member."""

    def end(self) -> None:
        """End the member."""

    def finish(self) -> int:
        """Make all of it durable behind the last member; return how many bytes it takes."""

    def publish(self) -> None:
        """Give it its name."""

    def close(self) -> None:
        """Let go of it; without its name nothing of it is left."""


class TarSink:
    """A compressed tar stream in a file."""

    def __init__(self, target: str, packing: str, moment: int) -> None:
        self._new = NewFile(target)
        try:
            self._packer = Packer(self._new.file, packing)
        except BaseException:
            self._new.close()
            raise
        self.path = self._new.path
        self._moment = moment
        self._size = 0

    def begin(self, name: str, size: int) -> None:
        self._size = size
        self._packer.write(tar.header(name, size, self._moment))

    def write(self, data: bytes) -> None:
        self._packer.write(data)

    def end(self) -> None:
        self._packer.write(tar.padding(self._size))

    def finish(self) -> int:
        self._packer.write(tar.end())
        self._packer.finish()
        self._new.finish()
        return os.path.getsize(self.path)

    def publish(self) -> None:
        self._new.publish()

    def close(self) -> None:
        self._new.close()


class FolderSink:
    """Plain files in a folder."""

    def __init__(self, target: str) -> None:
        self._new = NewFolder(target)
        self.path = self._new.path
        self._file: BinaryIO | None = None
        self._folder = ""
        self._size = 0

    def begin(self, name: str, size: int) -> None:
        path = os.path.join(self.path, name)
        folder = os.path.dirname(path)
        if folder != self._folder:
            make_private_folders(folder)
            self._folder = folder
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.fdopen(os.open(path, flags, 0o600), "wb")
        self._size += size

    def write(self, data: bytes) -> None:
        if self._file is not None:
            self._file.write(data)

    def end(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def finish(self) -> int:
        self._new.finish()
        return self._size

    def publish(self) -> None:
        self._new.publish()

    def close(self) -> None:
        self.end()
        self._new.close()


class Writer:
    """Puts members into a sink, with hashes and a manifest; every method blocks."""

    def __init__(self, sink: Sink, layout: Layout, header: Header) -> None:
        self._sink = sink
        self._layout = layout
        text = encode(header)
        self._tally = Tally(text)
        self._run_bytes = 0
        self._digest: Any = None
        self._key, self._size, self._left = "", 0, 0
        self._member(HEADER, text)

    @property
    def done(self) -> tuple[int, int]:
        """Bytes and files that are written."""
        return self._tally.bytes, self._tally.files

    @property
    def counts(self) -> dict[str, int]:
        """Files by entry of the map."""
        return self._tally.counts

    def whole(self, items: Sequence[tuple[str, int, bytes]]) -> None:
        """Write small files: key, size and bytes of each."""
        for key, size, data in items:
            self.begin(key, size)
            self.write(data)
            self.end()

    def begin(self, key: str, size: int) -> None:
        """Begin a file."""
        self._key, self._size, self._left = key, size, size
        self._digest = hashlib.sha256()
        self._sink.begin(STORE + key, size)

    def write(self, data: bytes) -> None:
        """Add to the file.

        Raises:
            IntegrityError: It is longer than was said.
        """
        self._left -= len(data)
        if self._left < 0:
            raise _wrong_size(self._key, self._size)
        self._digest.update(data)
        self._sink.write(data)

    def end(self) -> None:
        """End the file.

        Raises:
            IntegrityError: It is shorter than was said.
        """
        if self._left:
            raise _wrong_size(self._key, self._size)
        self._sink.end()
        sight = look_at(self._layout, self._key)
        self._tally.add(self._key, "" if sight is None else sight.entry, self._size, self._digest.hexdigest())
        self._run_bytes += self._size
        if self._tally.in_run >= MOST_IN_A_RUN or self._run_bytes >= _MOST_IN_A_RUN_BYTES:
            self._end_run()

    def finish(self) -> int:
        """Write what stands behind the files; return the size of the archive."""
        if self._tally.in_run:
            self._end_run()
        self._member(MANIFEST, encode(self._tally.manifest()))
        return self._sink.finish()

    def _end_run(self) -> None:
        self._run_bytes = 0
        self._member(*self._tally.end_run())

    def _member(self, name: str, data: bytes) -> None:
        self._sink.begin(name, len(data))
        self._sink.write(data)
        self._sink.end()


def _wrong_size(key: str, size: int) -> IntegrityError:
    return IntegrityError(
        f"{key} does not have the {size:,} bytes that the store says.", key=key, hint="Run `chatdb check`."
    )


# --- all of it ---------------------------------------------------------------------------------------------


async def _write(
    storage: StorageManager | StorageBackend,
    target: str,
    chosen: str,
    kind: Kind,
    user: str | None,
    progress: Progress | None,
) -> ArchiveReport:
    backend = storage.backend if isinstance(storage, StorageManager) else storage
    store = Store(backend.config, backend, read_only=True, clock=utc_now, new_id=new_id)
    await store.reading()
    await asyncio.to_thread(require_folder_of, target)  # not made: a backup is not to land beside a disk that is absent
    layout = store.layout
    moment = utc_now()
    async with backend.snapshot() as shown, one_thread() as thread:
        listing = await thread.opened(Listing, layout, kind, user)
        await _list(shown, listing, thread)
        if not listing.records and user is not None:
            raise NotFoundError(f"There is no user {user!a}.", hint="`chatdb ls` lists them.")
        if not listing.files:
            raise NotFoundError("There is no chat store to write to an archive.")
        header = Header(
            format=FORMAT,
            format_version=VERSION,
            kind=kind,
            made_by=f"flatfile-chat-database {await thread.run(metadata.version, 'flatfile-chat-database')}",
            created_at=format_timestamp(moment),
            store_format=FORMAT_VERSION,
            store_id=store.store_id,
            user=user,
            names=names_of(backend.config),
            files=listing.files,
            bytes=listing.bytes,
        )
        sink: Sink
        if chosen == FOLDER:
            sink = await thread.opened(FolderSink, target)
        else:
            sink = await thread.opened(TarSink, target, chosen, int(moment.timestamp()))
        writer = await thread.run(Writer, sink, layout, header)
        total = listing.bytes * (2 if kind == "backup" else 1)
        await _copy(shown, listing, writer, thread, progress, total)
        size = await thread.run(writer.finish)
        if kind == "backup":
            await thread.run(verify, sink.path, backend.config)
        await thread.run(sink.publish)
        if progress is not None:
            progress(total, total, listing.files)
    return ArchiveReport(
        path=target,
        kind=kind,
        format=chosen,
        files=listing.files,
        bytes=listing.bytes,
        size=size,
        counts=writer.counts,
        left_out=listing.left_out,
    )


async def _list(shown: Snapshot, listing: Listing, thread: Thread) -> None:
    async with aclosing(cast("AsyncGenerator[list[tuple[str, int]]]", shown.sized())) as runs:
        async for run in runs:
            await thread.run(listing.add, run)


async def _copy(
    shown: Snapshot, listing: Listing, writer: Writer, thread: Thread, progress: Progress | None, total: int
) -> None:
    async with aclosing(_groups(listing, thread)) as groups:
        async for group in groups:
            if len(group) == 1 and group[0][1] > _AT_ONCE_BYTES:
                await _copy_large(shown, *group[0], writer, thread)
            else:
                datas = await shown.read_many([key for key, _ in group])
                items = []
                for (key, size), data in zip(group, datas, strict=True):
                    if data is None:
                        raise IntegrityError(f"{key} is listed, but not there.", key=key, hint="Run `chatdb check`.")
                    items.append((key, size, data))
                await thread.run(writer.whole, items)
            if progress is not None:
                done, files = writer.done
                progress(done, total, files)


async def _copy_large(shown: Snapshot, key: str, size: int, writer: Writer, thread: Thread) -> None:
    await thread.run(writer.begin, key, size)
    async with aclosing(cast("AsyncGenerator[bytes]", shown.read(key))) as chunks:
        async for chunk in chunks:
            await thread.run(writer.write, chunk)
    await thread.run(writer.end)


async def _groups(listing: Listing, thread: Thread) -> AsyncGenerator[list[tuple[str, int]]]:
    """Yield keys with their sizes in the order of the archive: several small ones, or one that is large."""
    async with aclosing(cast("AsyncGenerator[tuple[str, int]]", _listed(listing, thread))) as listed:
        group: list[tuple[str, int]] = []
        size_of_all = 0
        async for key, size in listed:
            if group and (size_of_all + size > _AT_ONCE_BYTES or len(group) == _AT_ONCE):
                yield group
                group, size_of_all = [], 0
            group.append((key, size))
            size_of_all += size
        if group:
            yield group


async def _listed(listing: Listing, thread: Thread) -> AsyncIterator[tuple[str, int]]:
    rank: str | None = None
    while page := await thread.run(listing.after, rank, 1000):
        for _, key, size in page:
            yield key, size
        rank = page[-1][0]
