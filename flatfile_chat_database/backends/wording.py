"""What a backend with a text search of its own keeps of the messages in logs, and is asked by.

Words are lexemes, texts that only have to be equal or to begin alike; what they are made of is for whoever keeps them
to decide, and to name: words of one `edition` are of one making. What is found holds all that is asked for, but maybe
in no order that matters, so whoever asks looks at the records themselves.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import msgspec


class Behind(msgspec.Struct, frozen=True):
    """A log that has records whose words are not kept."""

    key: str
    identity: str
    """Of the log: one that only grows keeps it."""
    kept: int
    """From the first one on, so many have theirs."""
    can_be_kept: bool
    """False where the log is damaged: then its records have to be read."""


class State(msgspec.Struct, frozen=True):
    """How far the words of a folder are kept."""

    cursor: str
    """Of the changes that were looked at; empty if the backend cannot tell."""
    behind: list[Behind]


class RecordWords(msgspec.Struct, frozen=True):
    """The words of one record."""

    moment: int | None
    """Its time in microseconds since 1970, UTC; None if it has none that can be read."""
    tokens: int
    """How many words there are, repeated ones too."""
    lexemes: frozenset[str]


class LogWords(msgspec.Struct, frozen=True):
    """The words of neighbouring records of a log."""

    key: str
    identity: str
    first: int
    """Position of the first."""
    records: Sequence[RecordWords]


class Wanted(msgspec.Struct, frozen=True):
    """Which records are looked for."""

    edition: str
    folder: str
    """Their logs are below it."""
    fresh: str | None = None
    """A cursor of `changes` of a moment when no words below the folder were missing."""
    key: str | None = None
    """Or only this log."""
    lexemes: tuple[tuple[str, bool], ...] = ()
    """Each has all of these; True: one that begins so will do."""
    since: int | None = None
    """Not earlier, in microseconds."""
    until: int | None = None
    """Earlier."""


class Candidate(msgspec.Struct, frozen=True):
    """A record that has what is wanted."""

    key: str
    position: int
    line: bytes
    moment: int | None
    is_kept: bool
    """Whether its words are kept."""


class Sums(msgspec.Struct, frozen=True):
    """Of the records that are wanted."""

    records: int
    tokens: int
    is_exact: bool
    """Whether all of them have the words for certain."""


class Words(Protocol):
    """Keeps words of messages and finds messages by them. Only logs that the map calls messages have words.

    A record that was changed or removed has lost its words, and so have all others of its log. Errors are those of the
    backend.
    """

    async def behind(self, edition: str, folder: str, since: str | None, key: str | None = None) -> State:
        """Return which logs below `folder` have records whose words are not kept.

        Args:
            edition: Of the words.
            folder: Of the logs.
            since: A cursor of `changes`: only logs that changed since are looked at; all, if it is None or of no use.
            key: Only this log.
        """
        ...

    async def keep(self, edition: str, logs: Sequence[LogWords]) -> None:
        """Keep words of records.

        Those are left out whose log is another by now, and those that do not follow on what is kept.
        """

    async def drop(self, folder: str) -> None:
        """Forget the words, of every edition, of all records below `folder`."""

    def find(self, wanted: Wanted) -> AsyncIterator[list[Candidate]]:
        """Yield the records that may have the words which are wanted, of one state of the store, in runs.

        First come those whose words are not kept, then those without a time, then the newest ones.
        """
        ...

    async def sums(self, wanted: Wanted) -> Sums:
        """Return how many records have the words which are wanted, and how many words these have, as far as kept."""
        ...
