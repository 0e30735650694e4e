"""What a transaction changed, as a row of the table `changes` of a database in which one comes after another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from ..models import new_id

_SWEEP: Final = 256
"""Of so many transactions one looks for notes that are to be forgotten."""
REMEMBERED_BYTES: Final = 8 << 20
"""Of the names of keys that were changed."""


class Note(NamedTuple):
    """One transaction."""

    number: int
    """Counts transactions from 1."""
    id: str
    """Of this one: a file that was put back from a copy gets others under the same numbers."""
    bytes: int
    """Of the names in this note and in all before it."""
    keys: str
    """The names of keys and folders that were changed, each on a line of its own."""

    @property
    def sweeps(self) -> bool:
        """Whether this transaction is one of the few that look for notes which are to be forgotten."""
        return self.number % _SWEEP == 0


def note_after(number: int, total: int, changed: Iterable[str]) -> Note:
    """Return the note that follows the one of a number, behind so many bytes in all."""
    keys = "\n".join(sorted(changed))
    return Note(number + 1, new_id(), total + len(keys), keys)
