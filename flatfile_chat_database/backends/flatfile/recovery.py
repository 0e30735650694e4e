"""Doing the journal again after a death, whole or in part."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence

from ...errors import IntegrityError
from .files import Files
from .folders import Folders
from .journal import Batch, Journal, Past, Segment, keys_of
from .plan import read
from .replay import Replay
from .syncs import Syncs
from .tree import Tree
from .wholes import Wholes


class Recovery:
    """Reads segments and does what they say; who calls it holds the store's lock."""

    def __init__(
        self,
        files: Files,
        tree: Tree,
        folders: Folders,
        journal: Journal,
        syncs: Syncs,
        wholes: Wholes,
        *,
        settle: Callable[[Segment], None],
    ) -> None:
        """Call `settle` with the segment whose end is where the next writer goes on, before it is removed."""
        self._settle = settle
        self._files = files
        self._tree = tree
        self._folders = folders
        self._journal = journal
        self._syncs = syncs
        self._wholes = wholes

    def replay(self, batches: Iterable[Batch]) -> Replay:
        """Return what does batches again."""
        replay = Replay(self._files, self._tree, self._folders, self._syncs, self._wholes.set_aside, self._wholes.put)
        for batch in batches:
            replay.add(batch)
        return replay

    def redo(self, numbers: Sequence[int]) -> None:
        """Do segments again, all of which has been done before, for a sync of that may have failed."""
        batches: list[Batch] = []
        for number in numbers:
            segment = self._journal.open(number)
            try:
                batches += segment.batches(segment.start)
            finally:
                segment.close()
        self.replay(batches).run()

    def run(self, numbers: Sequence[int]) -> None:
        """Do all of the journal again: nobody else is at work, and who was may have lost power.

        Raises:
            IntegrityError: A segment is damaged, or of another format; nothing has changed.
        """
        batches: list[Batch] = []
        pasts: list[Past] = []
        for number in numbers:
            segment = self._journal.open(number)
            try:
                self._files.drop_cache(segment.descriptor)
                some = list(segment.batches(segment.start))
                batches += some
                pasts.append(_past(segment, some))
            finally:
                segment.close()
        self._run(numbers, batches, pasts)

    def _run(self, numbers: Sequence[int], batches: Sequence[Batch], pasts: Sequence[Past]) -> None:
        """Do batches again, make that durable, and remove the segments that they came from."""
        # A flush that failed told only the dead, so what is done has to be durable anew before.
        fresh = self._journal.create(batches)
        try:
            replay = self.replay(batches)
            replay.run()
            replay.cut_tails()
            self._syncs.files(replay.keys)
            self._journal.remember([*pasts, _past(fresh, batches)])
            self._settle(fresh)
            self._journal.remove([*numbers, fresh.number])
        finally:
            fresh.close()
        self._files.count("recoveries")

    # --- a damaged journal ---------------------------------------------------------------------------

    def damage(self) -> list[tuple[str, str]]:
        """Return what hinders the journal from being done again: the file, and what is wrong with it."""
        found = []
        for number in self._journal.numbers():
            try:
                segment = self._journal.open(number)
                try:
                    for _ in segment.batches(segment.start):
                        pass
                finally:
                    segment.close()
            except FileNotFoundError:  # folded meanwhile
                continue
            except IntegrityError as error:
                found.append((str(error.key), error.message))
        return found

    def salvage(self) -> None:
        """Set all segments aside, and do again what can be read of them."""
        numbers = self._journal.numbers()
        batches: list[Batch] = []
        for number in numbers:
            key = self._journal.key(number)
            whole = read(self._files, self._tree, key) or b""
            self._wholes.set_aside(key, [whole.rstrip(b"\0")], "a segment of a damaged journal", 0)
            with contextlib.suppress(IntegrityError):
                segment = self._journal.open(number)
                try:
                    batches += segment.salvage()
                finally:
                    segment.close()
        self._journal.forget_pasts()  # what they changed is not known any more
        self._run(numbers, batches, [])


def _past(segment: Segment, batches: Sequence[Batch]) -> Past:
    """Return what is to be known of a segment with these batches once it is gone."""
    keys = {key for batch in batches for key in keys_of(batch.steps)}
    return Past(segment.id, max([segment.end, *(batch.end for batch in batches)]), sorted(keys))
