"""Doing again what the journal says, however much of it has been done.

Only what can be explained by the journal is overwritten: what a file held before, at some moment between, or a part of
that with NULs where the disk did not get to it. Anything else was put there by somebody after the journal was written
(an edit by hand, a newer or older copy from elsewhere): it stays, what the journal has goes to the quarantine, and a
warning says so. What is explained is written whether or not it looks right, for the system may hold in memory what a
failed sync has kept from the disk.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from ... import codec
from ..rules import version_of
from .files import Files
from .folders import Folders
from .journal import Batch, Step
from .logs import scan_lines
from .plan import exists, read
from .syncs import Syncs
from .tree import Item, Tree

logger = logging.getLogger("flatfile_chat_database")

_SCAN_BYTES = 1 << 20
_PAGE = 512
_HOPELESS = frozenset(
    (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTEMPTY)
)
"""Errors that trying again does not mend."""

SetAside = Callable[[str, Iterable[bytes], str, int], None]
"""Puts bytes into the quarantine: the key that they belong to, the bytes, the reason, the offset they had."""


@dataclass(slots=True)
class Fate:
    """What becomes of one file."""

    whole: bytes | None = None
    """The whole content, where the journal has it."""
    gone: bool = False
    source: str = ""
    """A finished file that gets this name."""
    length: int = 0
    """Of the finished file."""
    regions: list[tuple[int, bytes]] = field(default_factory=list)
    """What is appended to what the journal does not have whole: where, and what."""
    absent: bool = False
    """Whether the file may be absent before."""
    hashes: set[str] = field(default_factory=set)
    """Versions that the file may have before."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Sizes, from and to, that the file may have before, where its content is not known."""
    versions: list[bytes] = field(default_factory=list)
    """Contents that it had between."""

    def take(self, step: Step, data: bytes) -> None:
        """Go on with the next step."""
        match step.op:
            case "put":
                self.absent = self.absent or step.was is None
                if step.was is not None:  # not only at first: a person may have edited it between
                    self.hashes.add(step.was)
                self._pass()
                self.whole, self.gone = data, False
            case "append":
                self._append(step.at, data)
            case "install":
                self.absent = self.absent or step.before < 0
                self.sizes.append((step.before, step.before))
                self._pass()
                self.whole, self.gone, self.regions = None, False, []
                self.source, self.length = step.source, step.at
            case "delete":
                self.sizes.append((step.before, step.before))
                self._pass()
                self.whole, self.gone, self.regions, self.source = None, True, [], ""
                self.absent = True
            case _:
                raise ValueError(step.op)

    def _pass(self) -> None:
        """Remember the content so far as one that the file may have."""
        if self.whole is not None:
            self.versions.append(self.whole)
        self.sizes += [(at, at + len(data)) for at, data in self.regions]

    def _append(self, at: int, data: bytes) -> None:
        if at == 0:
            self.absent = True
        if self.gone and at == 0:
            self.whole, self.gone = data, False
        elif self.whole is not None and at <= len(self.whole):
            if self.whole[at : at + len(data)] != data:
                self.versions.append(self.whole)
                self.whole = self.whole[:at] + data
        elif self.regions and self.regions[-1][0] <= at <= self.regions[-1][0] + len(self.regions[-1][1]):
            begin, known = self.regions[-1]
            if known[at - begin : at - begin + len(data)] != data:  # the same again comes from a copied segment
                self.regions[-1] = begin, known[: at - begin] + data
        else:
            self.regions.append((at, data))


class Replay:
    """Batches to be done again, in order."""

    def __init__(
        self,
        files: Files,
        tree: Tree,
        folders: Folders,
        syncs: Syncs,
        set_aside: SetAside,
        write: Callable[[str, bytes], None],
    ) -> None:
        """Keep what contradicts the journal with `set_aside`; replace documents with `write`."""
        self._files = files
        self._tree = tree
        self._folders = folders
        self._syncs = syncs
        self._set_aside = set_aside
        self._write = write
        self._structural: list[Step] = []
        self._fates: dict[str, Fate] = {}

    def add(self, batch: Batch) -> None:
        """Take in the next batch."""
        for step, data in batch.parts():
            if step.op in ("move", "remove"):
                self._structural.append(step)
            else:
                self._fates.setdefault(step.key, Fate()).take(step, data)

    @property
    def keys(self) -> set[str]:
        """What it concerns."""
        return {*self._fates, *(step.key for step in self._structural), *(step.source for step in self._structural)}

    @property
    def is_structural(self) -> bool:
        """Whether folders are moved or removed."""
        return bool(self._structural)

    def run(self, keys: Collection[str] | None = None) -> None:
        """Do it all, or only what concerns some keys."""
        for step in self._structural:
            if step.op == "move":
                self.move(step)
            else:
                self.remove(step)
        for key, fate in self._fates.items():
            if keys is None or key in keys:
                try:
                    self._do(key, fate)
                except OSError as error:
                    if error.errno not in _HOPELESS:
                        raise
                    # One file that cannot be written must not stop all others; its bytes are kept.
                    logger.warning("%s: %s", key, error.strerror)
                    self._refuse(key, [fate.whole or b"", *(data for _, data in fate.regions)], 0)

    def cut_tails(self) -> None:
        """Set aside what stands behind the appends of the journal from the first line on that the disk did not get."""
        for key, fate in self._fates.items():
            if fate.regions or fate.whole is not None or fate.source:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    self._cut_tail(key, fate)

    # --- folders -------------------------------------------------------------------------------------

    def move(self, step: Step) -> None:
        """Move a file or folder, if it is not done."""
        source, target = self._tree.path(step.source), self._tree.path(step.key)
        try:
            self._files.status(source)
        except FileNotFoundError:
            return
        with contextlib.suppress(FileNotFoundError):
            if self._files.status(target).kind != "folder" or self._tree.holds_files(step.key):
                logger.warning("%s stays where it is: something is at %s already", step.source, step.key)
                return
            self._tree.remove(Item(step.key, "folder"))
        self._folders.forget(step.source)

        def rename() -> None:
            # What is moved must not become durable in a folder that is not: it would be gone from both places.
            self._syncs.folders_of([step.key])
            self._files.rename(source, target)

        self._folders.fill(step.key.rpartition("/")[0], rename)
        self._syncs.folder(step.key.rpartition("/")[0])  # before the folder goes that it was in
        self._folders.emptied(step.source)

    def remove(self, step: Step) -> None:
        """Remove a folder with all that is in it."""
        # Renamed first, so that half of it is never seen under its name.
        with contextlib.suppress(FileNotFoundError):
            self._folders.forget(step.key)
            self._files.rename(self._tree.path(step.key), self._tree.path(step.source))
        with contextlib.suppress(FileNotFoundError):
            self._files.status(self._tree.path(step.source))
            self._tree.remove(Item(step.source, "folder"))
        self._folders.emptied(step.key)

    # --- files ---------------------------------------------------------------------------------------

    def _do(self, key: str, fate: Fate) -> None:
        path = self._tree.path(key)
        if fate.source and exists(self._files, self._tree, fate.source):
            size = self._size(key)
            if not (fate.absent if size is None else self._has_size(size, fate)):
                self._refuse(key, [read(self._files, self._tree, fate.source) or b""], 0)
                self._files.remove(self._tree.path(fate.source))
                return
            self._folders.make(key.rpartition("/")[0])
            self._files.rename(self._tree.path(fate.source), path)
        if fate.gone:
            size = self._size(key)
            if size is not None and (
                self._has_size(size, fate) or self._explains(read(self._files, self._tree, key), fate)
            ):
                self._files.remove(path)
                self._folders.emptied(key)
        elif fate.whole is not None:
            if self._explains(read(self._files, self._tree, key), fate):
                self._write(key, fate.whole)
            else:
                self._refuse(key, [fate.whole], 0)
        for at, data in fate.regions:
            self._append(key, at, data, fate)

    def _append(self, key: str, at: int, data: bytes, fate: Fate) -> None:
        path = self._tree.path(key)
        try:
            descriptor = self._files.open_to_change(path)
        except FileNotFoundError:
            if at > 0 or not fate.absent:
                self._refuse(key, [data], at)
                return
            descriptor = self._folders.fill(key.rpartition("/")[0], lambda: self._files.create(path))
        try:
            size = self._files.status_of(descriptor).size
            if size < at or not _is_part(self._files.read(descriptor, len(data), at), data):
                self._refuse(key, [data], at)
                return
            try:
                self._files.write_all_at(descriptor, data, at)
            except OSError:
                with contextlib.suppress(OSError):
                    self._files.truncate(descriptor, size)
                raise
        finally:
            self._files.close(descriptor)

    def _size(self, key: str) -> int | None:
        try:
            return self._files.status(self._tree.path(key)).size
        except FileNotFoundError:
            return None

    def _has_size(self, size: int, fate: Fate) -> bool:
        """Tell whether a file of a size may be one of those that the journal speaks of."""
        if any(least <= size <= most for least, most in fate.sizes):
            return True
        return any(size <= len(version) for version in fate.versions)  # the disk may have a part of what is new

    def _explains(self, found: bytes | None, fate: Fate) -> bool:
        if found is None:
            return fate.absent
        whole = fate.whole or b""
        if version_of(found) in fate.hashes or any(least <= len(found) <= most for least, most in fate.sizes):
            return True
        return any(_is_part(found, version) and len(found) <= len(version) for version in (*fate.versions, whole))

    def _refuse(self, key: str, pieces: Iterable[bytes], offset: int) -> None:
        reason = "what the journal has does not fit the file: somebody changed it, or copied another one here"
        self._set_aside(key, pieces, reason, offset)

    # --- tails ---------------------------------------------------------------------------------------

    def _cut_tail(self, key: str, fate: Fate) -> None:
        if fate.regions:
            start = fate.regions[-1][0] + len(fate.regions[-1][1])
        else:
            start = len(fate.whole) if fate.whole is not None else fate.length
        descriptor = self._files.open_to_change(self._tree.path(key))
        try:
            size = self._files.status_of(descriptor).size
            if size <= start or not self._is_log(key, fate):
                return
            good = start
            for run in scan_lines(self._files, descriptor, start, size, _SCAN_BYTES):
                for offset, end, line in run:
                    if line is None or (b"\0" in line and codec.line_id(line) is None):
                        good = offset
                        break
                    good = end
                else:
                    continue
                break
            if good < size:
                pieces: Iterator[bytes] = map(partial(self._read, descriptor, size), range(good, size, _SCAN_BYTES))
                self._set_aside(key, pieces, "what a power cut left of lines that were not flushed", good)
                self._files.truncate(descriptor, good)
        finally:
            self._files.close(descriptor)

    def _read(self, descriptor: int, size: int, offset: int) -> bytes:
        return self._files.read(descriptor, min(_SCAN_BYTES, size - offset), offset)

    def _is_log(self, key: str, fate: Fate) -> bool:
        return bool(fate.regions) or self._tree.is_log(key)


def _is_part(found: bytes, whole: bytes) -> bool:
    """Tell whether bytes are those of `whole`, with NULs where the disk did not get to them."""
    if found == whole[: len(found)]:
        return True
    if len(found) > len(whole):
        return False
    for start in range(0, len(found), _PAGE):
        piece, expected = found[start : start + _PAGE], whole[start : start + len(found)][:_PAGE]
        if piece != expected[: len(piece)] and any(
            one not in (0, other) for one, other in zip(piece, expected, strict=False)
        ):
            return False
    return True
