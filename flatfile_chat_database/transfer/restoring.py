"""Making a store of a backup: in a place of its own first, verified, and only then offered."""

from __future__ import annotations

import os
from dataclasses import replace

from .. import codec
from ..backends.base import StorageBackend
from ..backends.changes import ABSENT, Delete, Put, RemoveTree
from ..backends.opening import open_backend
from ..backends.turn import to_the_end
from ..check import check
from ..config import StorageConfig
from ..errors import ConfigurationError, ConflictError
from ..layout import Layout
from ..models import format_timestamp, utc_now
from .filling import batches, put_large
from .reading import Item, Limits, Reader
from .report import Progress, RestoreReport
from .staging import NewFolder, refuse_taken
from .thread import Thread, one_thread

_LIMITS = Limits()


async def restore(
    path: str | os.PathLike[str],
    target: StorageConfig | StorageBackend,
    *,
    limits: Limits = _LIMITS,
    progress: Progress | None = None,
) -> RestoreReport:
    """Make a store of a backup, on any backend, in a place that is empty.

    Nothing is offered before all of it is there and every hash is right: files are made in a folder beside the place
    and renamed, and so is a file of SQLite. Any other store is filled in place, gets the file that makes it a store
    last, and is emptied again if something is wrong; if that is not possible, for the process was killed, the next
    `restore` empties it. Then `check` looks at it.

    Args:
        path: The backup, a file or an unpacked one.
        target: Where to: a configuration that names an empty place, or the backend of an empty store.
        limits: What the archive may hold at most.
        progress: Called now and then with the bytes done and all bytes.

    Raises:
        ConfigurationError: The archive is an export, of another version of the format, or was made with other names.
        ConflictError: The target is not empty.
        IntegrityError: The archive is damaged, not whole, or holds what no backup holds. Nothing was changed.
        OSError: The archive cannot be read, or the target cannot be written.
        UnavailableError: There is too little room, or the target cannot be written.
    """
    async with one_thread() as thread:
        if not isinstance(target, StorageConfig):
            return await _restore_in_place(path, target, limits, progress, thread)
        backend = await thread.run(open_backend, target)
        # Where nobody else can see it before it has its name.
        if (root := getattr(backend, "root", None)) is not None:
            return await _restore_files(path, target, str(root), limits, progress, thread)
        if (file := getattr(backend, "path", None)) is not None:
            return await _restore_database_file(path, target, str(file), limits, progress, thread)
        try:
            return await _restore_in_place(path, backend, limits, progress, thread)
        finally:
            await backend.close()


async def _restore_files(
    path: str | os.PathLike[str],
    config: StorageConfig,
    root: str,
    limits: Limits,
    progress: Progress | None,
    thread: Thread,
) -> RestoreReport:
    reader = await thread.opened(_open, path, config, limits)
    await thread.run(reader.require_room, root)
    folder = await thread.opened(NewFolder, root)
    reader.temporary_folder = os.path.dirname(root)
    # What is not durable yet is nobody's store yet; all of it is made durable at the end.
    made = replace(config, storage_url="", storage_base_path=folder.path, durability="os")
    await _fill_new(await thread.run(open_backend, made), reader, thread, progress)
    await thread.run(folder.finish)
    await thread.run(folder.publish)
    return await _checked(await thread.run(open_backend, config), reader)


async def _restore_database_file(
    path: str | os.PathLike[str],
    config: StorageConfig,
    file: str,
    limits: Limits,
    progress: Progress | None,
    thread: Thread,
) -> RestoreReport:
    reader = await thread.opened(_open, path, config, limits)
    for ending in ("", "-wal", "-shm", "-index"):  # an index beside it would be of another store
        await thread.run(refuse_taken, file + ending)
    await thread.run(reader.require_room, os.path.dirname(file))
    folder = await thread.opened(NewFolder, file)
    reader.temporary_folder = os.path.dirname(file)
    made = replace(config, storage_url=f"sqlite:{_quoted(folder.path)}/new")
    await _fill_new(await thread.run(open_backend, made), reader, thread, progress)
    await thread.run(folder.finish)
    await thread.run(folder.publish_file, "new")
    return await _checked(await thread.run(open_backend, config), reader)


def _quoted(path: str) -> str:
    from urllib.parse import quote

    return quote(path)


async def _restore_in_place(
    path: str | os.PathLike[str],
    backend: StorageBackend,
    limits: Limits,
    progress: Progress | None,
    thread: Thread,
) -> RestoreReport:
    """Fill a store that others may see, with a mark in it that says that it is none yet."""
    reader = await thread.opened(_open, path, backend.config, limits)
    await backend.open()
    layout = Layout(backend.config)
    await _clear_unfinished(backend, layout)
    if children := await backend.list_children(""):
        raise ConflictError(
            f"The store is not empty: there is {children[0]!a} in it. Nothing was changed.",
            hint="Restore into an empty one; `import` adds a backup to a store.",
        )
    mark = codec.encode_document({"began_at": format_timestamp(utc_now())})
    await backend.commit([Put(layout.restoring, mark, ABSENT)])
    try:
        own = await _fill(backend, reader, thread, progress, keeps_back=layout.key("store"))
        await backend.commit([*(Put(item.key, item.data or b"", ABSENT) for item in own), Delete(layout.restoring)])
    except BaseException:
        await to_the_end(_clear_unfinished(backend, layout))
        raise
    return await _checked(backend, reader, closes=False)


async def _clear_unfinished(backend: StorageBackend, layout: Layout) -> None:
    """Remove what a restore left that came to nothing: everything beside its mark, and then the mark."""
    if not await backend.exists(layout.restoring) or await backend.exists(layout.key("store")):
        return
    for child in await backend.list_children(""):
        if child != layout.system:
            await backend.commit([RemoveTree(child)])
    await backend.commit([RemoveTree(layout.trash)])
    await backend.commit([RemoveTree(layout.quarantine)])
    await backend.commit([Delete(layout.restoring)])


def _open(path: str | os.PathLike[str], config: StorageConfig, limits: Limits) -> Reader:
    reader = Reader(path, config, limits)
    if reader.header.kind != "backup":
        reader.close()
        raise ConfigurationError(
            "The archive is an export, not a backup.", hint="Use `import`, which adds its records to a store."
        )
    return reader


async def _fill_new(backend: StorageBackend, reader: Reader, thread: Thread, progress: Progress | None) -> None:
    """Fill a store that nobody sees, and close it."""
    await backend.open()
    try:
        await _fill(backend, reader, thread, progress)
    finally:
        await backend.close()


async def _fill(
    backend: StorageBackend, reader: Reader, thread: Thread, progress: Progress | None, keeps_back: str | None = None
) -> list[Item]:
    """Put all files of an archive into an empty store; return those that are kept back."""
    kept: list[Item] = []
    runs = await thread.opened(batches, reader.items())
    while batch := await thread.run(next, runs, None):
        kept += [item for item in batch if item.key == keeps_back]
        batch = [item for item in batch if item.key != keeps_back]
        if len(batch) == 1 and batch[0].file is not None:
            await put_large(backend, batch[0], batch[0].file, thread)
        elif batch:
            await backend.load([(item.key, item.data or b"") for item in batch])
        if progress is not None:
            progress(reader.done, reader.header.bytes, reader.files)
    return kept


async def _checked(backend: StorageBackend, reader: Reader, *, closes: bool = True) -> RestoreReport:
    try:
        problems = (await check(backend)).problems
    finally:
        if closes:
            await backend.close()
    return RestoreReport(reader.files, reader.done, reader.counts, problems)
