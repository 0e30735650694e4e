"""Several lines are appended all or none: the beginning of each such batch is noted while it is written.

The note is made durable in the lock file before the lines are written and removed once they are durable, so whoever
takes the lock and finds one knows that its writer died, and that nobody was told of the batch. The note is bound to the
file and to the length of the batch, for a lock file may have been copied, or written by anybody: what does not fit is
left alone.
"""

from __future__ import annotations

import logging

import msgspec

from ...errors import ValidationError
from ...layout import Layout, Shape
from ..base import check_key
from .files import Files
from .lock import StoreLock
from .tree import Tree

logger = logging.getLogger("flatfile_chat_database")


class Batch(msgspec.Struct, frozen=True):
    """Lines that are being appended to a log."""

    key: str
    inode: int
    size: int
    """Of the log before."""
    length: int
    """Bytes of the batch."""


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Batch)


class Batches:
    """The batches that are being written."""

    def __init__(self, files: Files, tree: Tree, layout: Layout, lock: StoreLock) -> None:
        self._files = files
        self._tree = tree
        self._layout = layout
        self._lock = lock
        self.open = False
        """Whether a batch was begun and not ended yet."""

    def begin(self, batch: Batch) -> None:
        """Note a batch durably."""
        self._lock.note(_encoder.encode(batch) + b"\n")
        self.open = True

    def end(self) -> None:
        """Remove the notes: what was begun is durable."""
        if self.open:
            self._lock.clear_notes()
            self.open = False

    def unfinished(self) -> list[Batch]:
        """Return, under the lock, the batches that a process which died had begun and that can be told to be its."""
        notes = self._lock.notes()
        self.open = self.open or bool(notes)
        return [batch for batch in self._read(notes) if self._fits(batch)]

    def noted(self) -> bool:
        """Return, without the lock, whether there is a batch of a process at work or of a dead one."""
        return bool(self._lock.peek())

    def limit(self, key: str) -> int | None:
        """Return, without the lock, the size up to which a log may be read; None if no batch is being written to it."""
        sizes = [batch.size for batch in self._read(self._lock.peek()) if batch.key == key and self._fits(batch)]
        return min(sizes, default=None)

    def _read(self, notes: bytes) -> list[Batch]:
        found = []
        for line in notes.split(b"\n")[:-1]:  # half a note was never followed by its batch
            try:
                batch = _decoder.decode(line)
                place = self._layout.parse(check_key(batch.key))
            except (ValueError, ValidationError):
                place = None
            if place is None or place.entry.shape is not Shape.LOG:
                logger.warning("%s holds a line that is no note of a batch; it is ignored", self._lock.key)
            else:
                found.append(batch)
        return found

    def _fits(self, batch: Batch) -> bool:
        try:
            status = self._files.status(self._tree.path(batch.key))
        except FileNotFoundError:
            return False
        return status.inode == batch.inode and batch.size < status.size <= batch.size + batch.length
