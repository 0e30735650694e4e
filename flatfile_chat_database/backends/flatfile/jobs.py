"""What is handed to the engine: the changes of one commit, and what came of them.

Beside the changes of the contract there are a few that only this backend makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from ..changes import Change, Move, Outcome, Quota, RemoveTree


@dataclass(frozen=True, slots=True)
class Place:
    """Internal change: give a finished temporary file its name, or remove it if that is taken. Outcome: which."""

    temporary: str
    key: str


@dataclass(frozen=True, slots=True)
class Extend:
    """Internal change: append bytes that are whole lines, whatever they say."""

    key: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Mend:
    """Internal change: set aside half a line at the end of a log. Outcome: whether there was one."""

    key: str


EngineChange = Change | Place | Extend | Mend


class Job(msgspec.Struct, eq=False):
    """The changes of one commit, and what came of them."""

    changes: Sequence[EngineChange]
    outcomes: list[Outcome] | None = None
    error: Exception | None = None

    @property
    def is_structural(self) -> bool:
        """Whether it moves or removes folders, and so has to be alone in the journal."""
        return any(isinstance(change, Move | RemoveTree) for change in self.changes)


def key_of(change: EngineChange) -> str:
    """Return the key that a change is about."""
    match change:
        case Move(source):
            return source
        case Quota(folder) | RemoveTree(folder):
            return folder
        case _:
            return change.key
