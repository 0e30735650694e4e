"""New messages of many callers, put into a database by one statement.

The commonest of all commits, a message or a few for a log that there is, is taken out of the batch and gathered; what
is not exactly that is done by itself, after what was gathered before it.
"""

from __future__ import annotations

from collections.abc import Sequence

from .changes import Append, Require
from .contents import Contents
from .notes import Note
from .rows import Fresh, Repeated
from .writer import Job

_FEW_OF_ONE_COMMIT = 32
"""Messages; of more it is faster to look together whether they are there already."""


class Known:
    """What the writer remembers of logs from batch to batch, as long as nobody else writes."""

    def __init__(self) -> None:
        self.owners: set[str] = set()
        """Keys of documents that are there."""
        self.records: dict[str, int] = {}
        """How many records there are in each log that is kept in rows."""
        self.note: Note | None = None
        """The newest, where the next one follows from it."""

    def forget(self) -> None:
        """Forget all of it: somebody else wrote, or something else than messages was written."""
        self.owners.clear()
        self.records.clear()
        self.note = None

    def wrote(self, messages: Sequence[Fresh], note: Note) -> None:
        """Remember messages that are in their logs now, and the note of their transaction."""
        for message in messages:
            self.records[message.key] = message.position + 1
        self.note = note

    def fresh(self, jobs: Sequence[Job]) -> list[Fresh] | None:
        """Return the messages of jobs if each is a few for a log that is known; remembers nothing of them."""
        owners, records = self.owners, self.records
        messages: list[Fresh] = []
        ends: dict[str, int] = {}
        for job in jobs:
            found = messages_of(job)
            if found is None:
                return None
            require, append = found
            position = ends.get(append.key)
            if position is None:
                position = records.get(append.key)
            if position is None or require.key not in owners or not has_room(append, position):
                return None
            ends[append.key] = line_up(append, position, messages)
        return messages


def messages_of(job: Job) -> tuple[Require, Append] | None:
    """Return what a commit of a few new messages consists of; None if it is another kind of commit."""
    if len(job.changes) != 2:
        return None
    require, append = job.changes
    if type(require) is not Require or type(append) is not Append:
        return None
    ids = append.ids
    return (require, append) if 0 < len(ids) <= _FEW_OF_ONE_COMMIT and "\0" not in "".join(ids) else None


def has_room(append: Append, position: int) -> bool:
    """Tell whether messages that come at a position of their log are not too many for it."""
    return append.maximum is None or position + len(append.ids) <= append.maximum


def line_up(append: Append, position: int, messages: list[Fresh]) -> int:
    """Add messages that come at a position of their log to others; return the position behind them."""
    key, lines = append.key, append.lines
    for at, record_id in enumerate(append.ids):
        messages.append(Fresh(key, position + at, record_id, lines[at]))
    return position + len(lines)


def tell(jobs: Sequence[Job]) -> None:
    """Tell the callers of commits of a few new messages that all of them are written."""
    for job in jobs:
        job.outcomes = [None, len(job.changes[1].ids)]


class Gathered:
    """The messages of one transaction that are still to be written."""

    def __init__(self, contents: Contents, known: Known) -> None:
        self._contents = contents
        self._known = known
        self._jobs: list[Job] = []
        self._messages: list[Fresh] = []

    def take(self, job: Job) -> bool:
        """Take a commit of a few new messages, and tell so; False if it is another kind of commit."""
        found = messages_of(job)
        if found is None:
            return False
        require, append = found
        known = self._known
        if require.key not in known.owners:
            if not self._contents.exists(require.key):
                return False
            known.owners.add(require.key)
        position = known.records.get(append.key)
        if position is None:
            place = self._contents.place(append.key)
            if place is None or place.kind != "log":
                return False
            position = self._contents.count(append.key)
        if not has_room(append, position):
            return False
        known.records[append.key] = line_up(append, position, self._messages)
        self._jobs.append(job)
        return True

    def flush(self) -> None:
        """Write what was taken.

        Raises:
            Repeated: Nothing that the transaction wrote may stay.
        """
        if not self._messages:
            return
        if not self._contents.add_fresh(self._messages):
            raise Repeated
        tell(self._jobs)
        self._messages.clear()
        self._jobs.clear()
