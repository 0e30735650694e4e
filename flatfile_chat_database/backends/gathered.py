"""New messages of many callers, put into a database by one statement.

The commonest of all commits, a message for a log that there is, is taken out of the batch and gathered; whatever is not
exactly that is done by itself, after what was gathered before it.
"""

from __future__ import annotations

from .changes import Append, Require
from .contents import Contents
from .rows import Fresh
from .writer import Job


class Known:
    """What the writer remembers of logs from batch to batch, as long as nobody else writes."""

    def __init__(self) -> None:
        self.owners: set[str] = set()
        """Keys of documents that are there."""
        self.records: dict[str, int] = {}
        """How many records there are in each log that is kept in rows."""

    def forget(self) -> None:
        """Forget all of it: somebody else wrote, or something else than messages was written."""
        self.owners.clear()
        self.records.clear()


class Repeated(Exception):
    """One of the messages is in its log already, so each commit has to be looked at by itself."""


def message_of(job: Job) -> tuple[Require, Append] | None:
    """Return what a commit of one new message consists of; None if it is another kind of commit."""
    if len(job.changes) != 2:
        return None
    require, append = job.changes
    if type(require) is not Require or type(append) is not Append or len(append.ids) != 1 or "\0" in append.ids[0]:
        return None
    return require, append


class Gathered:
    """The messages of one transaction that are still to be written."""

    def __init__(self, contents: Contents, known: Known) -> None:
        self._contents = contents
        self._known = known
        self._jobs: list[Job] = []
        self._messages: list[Fresh] = []

    def take(self, job: Job) -> bool:
        """Take a commit of one new message, and tell so; False if it is another kind of commit."""
        message = message_of(job)
        if message is None:
            return False
        require, append = message
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
        if append.maximum is not None and position >= append.maximum:
            return False
        known.records[append.key] = position + 1
        self._messages.append(Fresh(append.key, position, append.ids[0], append.lines[0]))
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
        for job in self._jobs:
            job.outcomes = [None, 1]
        self._messages.clear()
        self._jobs.clear()
