"""Adding the records of an archive to a store that may hold things already."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from itertools import islice
from typing import BinaryIO, cast

from .. import codec
from ..backends.base import StorageBackend
from ..backends.changes import ABSENT, Append, Change, Put
from ..errors import ConflictError, NotFoundError
from ..layout import Shape
from ..models import new_id, utc_now
from ..records.store import Store
from ..storage import StorageManager
from .filling import batches, put_large, whole_lines
from .reading import Item, Limits, Reader
from .report import ImportReport, Progress
from .thread import Thread, one_thread

_LIMITS = Limits()
_ATTEMPTS = 20
_PIECE_BYTES = 1 << 20


async def import_archive(
    storage: StorageManager | StorageBackend,
    path: str | os.PathLike[str],
    *,
    dry_run: bool = False,
    limits: Limits = _LIMITS,
    progress: Progress | None = None,
) -> ImportReport:
    """Add the records of an archive, a backup or an export, to a store.

    The whole archive is verified before anything is changed. What is absent is added, a log whose beginning is there is
    continued, and what is there but differs is left and reported: also whatever else belongs to a session or panel
    whose messages differ, and the documents of a session that has others. Running it again adds nothing; one that was
    interrupted is completed by running it again. Trash, quarantine and the archive's store file are not added, and no
    limit of the configuration on how many there may be is looked at. A store that is absent is made.

    Args:
        storage: Where to.
        path: The archive, a file or a folder.
        dry_run: Only report what would be added.
        limits: What the archive may hold at most.
        progress: Called now and then with the bytes done and all bytes; verifying and adding count once each.

    Raises:
        ConfigurationError: The archive is of another version of the format, or was made with other names.
        IntegrityError: The archive is damaged, not whole, or holds what no archive holds. Nothing was changed.
        OSError: The archive cannot be read.
        UnavailableError: There is too little room, or the store cannot be written.
    """
    backend = storage.backend if isinstance(storage, StorageManager) else storage
    store = Store(backend.config, backend, read_only=dry_run, clock=utc_now, new_id=new_id)
    await store.reading()
    async with one_thread() as thread:
        await _verify(path, backend, limits, progress, thread)
        reader = await thread.opened(Reader, path, backend.config, limits)
        adding = _Adding(backend, thread, ImportReport(dry_run))
        if not dry_run:
            await store.writing()
        runs = await thread.opened(batches, reader.items())
        while batch := await thread.run(next, runs, None):
            await adding.take(batch)
            if progress is not None:
                progress(reader.header.bytes + reader.done, 2 * reader.header.bytes, reader.files)
        await adding.finish()
    return adding.report


async def _verify(
    path: str | os.PathLike[str], backend: StorageBackend, limits: Limits, progress: Progress | None, thread: Thread
) -> None:
    reader = await thread.opened(Reader, path, backend.config, limits)
    place = getattr(backend, "root", None) or os.path.dirname(getattr(backend, "path", ""))
    if place:  # not in memory, and not on another machine
        await thread.run(reader.require_room, str(place))
    items = await thread.opened(lambda: reader.items(keeps=False))
    while await thread.run(_pass_over, items):
        if progress is not None:
            progress(reader.done, 2 * reader.header.bytes, 0)


def _pass_over(items: Iterator[Item]) -> bool:
    """Go on by some files; return whether there may be more."""
    return sum(1 for _ in islice(items, 1000)) == 1000


class _Adding:
    """Compares files with a store and adds what is absent."""

    def __init__(self, backend: StorageBackend, thread: Thread, report: ImportReport) -> None:
        self.report = report
        self._backend = backend
        self._thread = thread
        self._other = ""
        """A folder, with a slash, in which the store has something else: nothing is added there."""
        self._held: Item | None = None
        """What is known of a session's documents, which is added behind them."""

    async def take(self, batch: list[Item]) -> None:
        """Add files, which come in the order of an archive."""
        living = [item for item in batch if item.sight.is_living and item.sight.entry != "store"]
        self.report.left_out += sum(not item.sight.is_living for item in batch)
        self.report.files += len(living)
        if len(living) == 1 and living[0].file is not None:
            await self._take_large(living[0], living[0].file)
        elif living:
            await self._take_small(living)

    async def finish(self) -> None:
        """Add what was held back."""
        await self._take_small([])

    # --- small files -----------------------------------------------------------------------------------

    async def _take_small(self, items: list[Item]) -> None:
        """Add files as one commit; do it again if somebody else came between."""
        for attempt in range(_ATTEMPTS):
            run = _Run(self._other, self._held)
            datas = await self._backend.read_many([item.key for item in items])
            for item, data in zip(items, datas, strict=True):
                run.take(item, data)
            if not items:
                run.let_go()
            try:
                if run.changes and not self.report.dry_run:
                    await self._backend.commit(run.changes)
                break
            except ConflictError:
                if attempt == _ATTEMPTS - 1:
                    raise
        self._other, self._held = run.other, run.held
        self._count(run)

    def _count(self, run: _Run) -> None:
        self.report.added += run.added
        self.report.continued += run.continued
        self.report.already_there += run.already_there
        for key in run.differing:
            self.report.differing.add(key)

    # --- large files -----------------------------------------------------------------------------------

    async def _take_large(self, item: Item, file: BinaryIO) -> None:
        if self._held is not None and not item.key.startswith(_folder_of(self._held)):
            await self._take_small([])
        if self._other and item.key.startswith(self._other):
            self.report.differing.add(item.key)
            return
        found = await self._compare(item, file)
        if found is None:
            self.report.added += 1
            if not self.report.dry_run:
                await self._thread.run(file.seek, 0)
                await put_large(self._backend, item, file, self._thread)
        elif found == "same":
            self.report.already_there += 1
        elif found == "longer" and await self._thread.run(_is_continuable, file):
            self.report.continued += 1
            lines = whole_lines(file)
            while not self.report.dry_run and (piece := await self._thread.run(next, lines, b"")):
                await self._backend.append(item.key, piece)
        else:
            run = _Run(_others_with(item) or self._other, self._held)
            run.differing.append(item.key)
            run.drop_held()
            self._other, self._held = run.other, run.held
            self._count(run)

    async def _compare(self, item: Item, file: BinaryIO) -> str | None:
        """Compare a file with what is stored, and leave it where both are the same.

        Return None if nothing is stored, `same` also for a log that has grown since, `longer` for a log that goes on.
        """
        is_log = item.sight.shape is Shape.LOG
        try:
            async with aclosing(cast("AsyncGenerator[bytes]", self._backend.read_blob(item.key))) as chunks:
                async for chunk in chunks:
                    read = await self._thread.run(file.read, len(chunk))
                    if read != chunk[: len(read)] or (len(read) < len(chunk) and not is_log):
                        return "other"
                    if len(read) < len(chunk):
                        return "same"
        except NotFoundError:
            return None
        at = await self._thread.run(file.tell)
        if at == item.size:
            return "same"
        return "longer" if is_log else "other"


def _is_continuable(file: BinaryIO) -> bool:
    """Tell whether a file stands at the beginning of a line, and only whole messages follow; leave it there."""
    at = file.tell()
    file.seek(at - 1 if at else 0)
    if at and file.read(1) != b"\n":
        return False
    good = all(
        line.endswith(b"\n") and codec.line_id(line[:-1]) is not None
        for line in iter(lambda: file.readline(codec.MAX_LINE_BYTES + 2), b"")
    )
    file.seek(at)
    return good


class _Run:
    """What one commit adds."""

    def __init__(self, other: str, held: Item | None) -> None:
        self.other = other
        self.held = held
        self.changes: list[Change] = []
        self.added = self.continued = self.already_there = 0
        self.differing: list[str] = []

    def take(self, item: Item, stored: bytes | None) -> None:
        """Compare a file with what is stored at its key."""
        if self.held is not None and not item.key.startswith(_folder_of(self.held)):
            self.let_go()
        data = item.data or b""
        if self.other and item.key.startswith(self.other) and stored != data:
            self.differing.append(item.key)
        elif stored is None and item.sight.entry == "documents":
            self.held = item
        elif stored is None:
            self.added += 1
            self.changes.append(Put(item.key, data, ABSENT))
        elif stored == data or (item.sight.shape is Shape.LOG and stored.startswith(data)):
            self.already_there += 1
        elif item.sight.shape is Shape.LOG and data.startswith(stored) and (lines := _messages(stored, data)):
            self.continued += 1
            self.changes.append(Append(item.key, lines))
        else:
            self.differing.append(item.key)
            self.other = _others_with(item) or self.other
            self.drop_held()

    def let_go(self) -> None:
        """Add what was held back: all that it tells of is there."""
        if self.held is not None:
            self.added += 1
            self.changes.append(Put(self.held.key, self.held.data or b"", ABSENT))
            self.held = None

    def drop_held(self) -> None:
        """Leave the documents of a session alone, for one of them differs."""
        if self.held is not None:
            self.differing.append(self.held.key)
            self.other = _folder_of(self.held)
            self.held = None


def _messages(stored: bytes, data: bytes) -> tuple[bytes, ...]:
    """Return the messages that a log has beyond what is stored; none if it has anything else there."""
    if stored and not stored.endswith(b"\n"):
        return ()
    lines = tuple(line + b"\n" for line in data[len(stored) :].split(b"\n")[:-1])
    whole = data.endswith(b"\n") and all(codec.line_id(line[:-1]) is not None for line in lines)
    return lines if whole else ()


def _folder_of(item: Item) -> str:
    return item.key.rpartition("/")[0] + "/"


def _others_with(item: Item) -> str:
    """Return the folder in which nothing is added when this file differs: that of a session, panel or documents."""
    is_deciding = item.sight.shape is Shape.LOG or item.sight.entry == "documents"
    return _folder_of(item) if is_deciding else ""
