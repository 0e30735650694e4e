"""What is handed to the engine: the changes of one commit, and what came of them.

Beside the changes of the contract there are a few that only this backend makes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..changes import Change, Move, Quota, RemoveTree
from ..writer import Job


@dataclass(frozen=True, slots=True)
class Place:
    """Internal change: give a finished temporary file its name, or remove it if that is taken. Outcome: which."""

    temporary: str
    key: str
    loaded: bool = False
    """Whether the file is durable with its temporary name, and a name that is taken raises ConflictError."""


@dataclass(frozen=True, slots=True)
class Extend:
    """Internal change: append bytes that are whole lines, whatever they say."""

    key: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Mend:
    """Internal change: set aside half a line at the end of a log. Outcome: whether there was one."""

    key: str


@dataclass(frozen=True, slots=True)
class Hold:
    """Internal change, alone in its job: do something while nobody writes and all that was committed is in the files.

    Everybody who writes waits for it.
    """

    work: Callable[[], None]


EngineChange = Change | Place | Extend | Mend | Hold


def is_structural(job: Job) -> bool:
    """Tell whether a job moves or removes folders, or holds writers up, and so is nothing to be done with others."""
    return any(isinstance(change, Move | RemoveTree | Hold) for change in job.changes)


def key_of(change: EngineChange) -> str:
    """Return the key that a change is about."""
    match change:
        case Move(source):
            return source
        case Quota(folder) | RemoveTree(folder):
            return folder
        case Hold():
            return ""
        case _:
            return change.key
