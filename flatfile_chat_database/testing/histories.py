"""What a store may hold after a crash, by what was asked of it and what it answered.

A store's contents are a dictionary of bytes by key: documents, blobs and logs alike. An operation that was acknowledged
has happened; one that failed has not; one that was at work, or whose outcome is unknown, has happened wholly or not at
all. Operations that overlapped may have happened in either order. `History.allowed` tries all of these and returns the
contents that come out, so there is nothing to it that could be as wrong as the store.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from .. import codec
from ..backends.changes import (
    ABSENT,
    ANY,
    Absent,
    Append,
    Change,
    Delete,
    Edit,
    Move,
    Put,
    RemoveTree,
    Require,
    Truncate,
)
from ..backends.rules import version_of

Contents = dict[str, bytes]
"""What a store holds, by key."""

Answer = Literal["done", "failed", "unknown"]


class Blob(msgspec.Struct, frozen=True):
    """Write a blob under a key of its own."""

    key: str
    data: bytes


class Close(msgspec.Struct, frozen=True):
    """Close the store; the next operation opens it again."""


Step = Change | Blob | Close


class Operation(msgspec.Struct, frozen=True):
    """Something that is asked of a store: one commit, perhaps after a blob was written for it."""

    name: str
    steps: tuple[Step, ...]

    @property
    def changes(self) -> list[Change]:
        """Those steps that make up the commit."""
        return [step for step in self.steps if not isinstance(step, Blob | Close)]


@dataclass(slots=True)
class Asked:
    """An operation, when it was at work, and what was answered. Times are numbers of events on the disk."""

    operation: Operation
    begun: int
    ended: int | None = None
    answer: Answer = "unknown"

    def is_acknowledged(self, point: int) -> bool:
        """Whether it was acknowledged before a crash at `point`."""
        return self.answer == "done" and self.ended is not None and self.ended <= point

    def may_have_happened(self, point: int) -> bool:
        """Whether it may have left something by then."""
        return self.answer != "failed" and self.begun < point


@dataclass(slots=True)
class History:
    """All that was asked of a store since it held one of several contents."""

    before: list[Contents]
    asked: list[Asked] = field(default_factory=list)
    whole_commits: bool = True
    """Whether a commit of several changes that was not acknowledged has happened wholly or not at all."""
    _known: dict[tuple[tuple[int, bool], ...], list[Contents]] = field(default_factory=dict)

    def allowed(self, point: int) -> list[Contents]:
        """Return the contents that a store may have after a crash at `point`."""
        key = tuple(
            (number, asked.is_acknowledged(point))
            for number, asked in enumerate(self.asked)
            if asked.may_have_happened(point)
        )
        if key not in self._known:
            found: list[Contents] = []
            for contents in self.before:
                for order in self._orders(key):
                    for after in self._after(contents, order, dict(key)):
                        if after not in found:
                            found.append(after)
            self._known[key] = found
        return self._known[key]

    def survivors(self, point: int, floor: int) -> dict[str, set[bytes | None]]:
        """Return for each key what may be left of it when only what ended before `floor` has to be there.

        That is the promise of the level `normal`: of each log a beginning, of each document one of its versions.
        """
        found: dict[str, set[bytes | None]] = {}
        everything: list[Contents] = []
        for moment in range(floor, point + 1):
            everything += [contents for contents in self.allowed(moment) if contents not in everything]
        for key in set().union(*everything):
            found[key] = {contents.get(key) for contents in everything}
        return found

    def _orders(self, key: Sequence[tuple[int, bool]]) -> Iterator[tuple[int, ...]]:
        """Yield the orders in which those that happened may have happened."""
        numbers = [number for number, _ in key]
        optional = [number for number, acknowledged in key if not acknowledged]
        for count in range(len(optional) + 1):
            for missing in itertools.combinations(optional, count):
                there = [number for number in numbers if number not in missing]
                for order in itertools.permutations(there):
                    if all(not self._precedes(later, one) for one, later in itertools.combinations(order, 2)):
                        yield order

    def _precedes(self, one: int, other: int) -> bool:
        ended = self.asked[one].ended
        return ended is not None and ended <= self.asked[other].begun and one < other

    def _after(self, contents: Contents, order: Sequence[int], acknowledged: dict[int, bool]) -> list[Contents]:
        possible = [contents]
        for number in order:
            operation = self.asked[number].operation
            following: list[Contents] = []
            for one in possible:
                after = apply(one, operation.steps)
                if after is not None:
                    following.append(after)
                if not acknowledged[number]:
                    following += self._parts(one, operation)
            possible = following
        return possible

    def _parts(self, contents: Contents, operation: Operation) -> list[Contents]:
        """Return what an operation that was at work may have left in part, if it may."""
        found = []
        if not self.whole_commits and apply(contents, operation.steps) is not None:
            for count in range(1, len(operation.steps)):
                for steps in itertools.combinations(operation.steps, count):
                    after = apply(contents, steps)
                    if after is not None:
                        found.append(after)
        return found


def apply(contents: Contents, steps: Sequence[Step]) -> Contents | None:
    """Return the contents after some steps, or None if a condition of theirs does not hold."""
    after = dict(contents)
    for step in steps:
        if not _hold(after, step):
            return None
        _apply(after, step)
    return after


def _hold(contents: Contents, step: Step) -> bool:
    match step:
        case Require(key):
            return key in contents
        case Put(key, _, expected) if expected is ABSENT:
            return key not in contents
        case Put(key, _, expected) if expected is not ANY:
            return key in contents and version_of(contents[key]) == expected
        case Absent(key) | Move(_, key):
            return not any(_is_at_or_below(other, key) for other in contents)
        case Edit(key, record_id, expected):
            return any(codec.line_id(line) == record_id and line + b"\n" == expected for line in _lines(contents, key))
    return True


def _apply(contents: Contents, step: Step) -> None:
    match step:
        case Put(key, data):
            contents[key] = data
        case Blob(key, data):
            contents.setdefault(key, data)
        case Delete(key):
            contents.pop(key, None)
        case Append(key, lines):
            known = {codec.line_id(line) for line in _lines(contents, key)}
            new = [line for line in lines if codec.line_id(line) not in known]
            if new:
                contents[key] = contents.get(key, b"") + b"".join(new)
        case Edit(key, record_id, _, line):
            kept = [(line if codec.line_id(old) == record_id else old + b"\n") or b"" for old in _lines(contents, key)]
            contents[key] = b"".join(kept)
        case Truncate(key, count):
            if key in contents and count != 0:
                old = _lines(contents, key)
                contents[key] = b"".join(one + b"\n" for one in old[: max(0, len(old) - (count or len(old)))])
        case Move(source, target):
            for key in [key for key in contents if _is_at_or_below(key, source)]:
                contents[target + key[len(source) :]] = contents.pop(key)
        case RemoveTree(folder):
            for key in [key for key in contents if key.startswith(f"{folder}/")]:
                del contents[key]


def _lines(contents: Contents, key: str) -> list[bytes]:
    return contents.get(key, b"").split(b"\n")[:-1]


def _is_at_or_below(key: str, place: str) -> bool:
    return key == place or key.startswith(f"{place}/")
