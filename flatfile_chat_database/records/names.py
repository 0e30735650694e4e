"""Ids that say when they were made: a prefix, a stamp of the second, and `_001`, `_002` … where that is taken."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime

_SUFFIX = re.compile(r"_([0-9]{3,})")


class StampedIds:
    """Makes the ids of one kind of record. On disk, do not change."""

    def __init__(self, prefix: str, pattern: str) -> None:
        """Remember what stands before the stamp, and the stamp's `strftime` format."""
        self._head = f"{prefix}_"
        self._pattern = pattern
        self._stamp = ""
        self._numbers: dict[str, int] = {}  # by folder, of the second `_stamp` only, so it stays small

    def stamp(self, moment: datetime) -> str:
        """Return the time in UTC as it stands in ids."""
        return moment.astimezone(UTC).strftime(self._pattern)

    def build(self, stamp: str, number: int = 0) -> str:
        """Return the id of a second, `number` 0, or a further one of it."""
        return f"{self._head}{stamp}_{number:03}" if number else f"{self._head}{stamp}"

    # --- ids of which only their being free counts: sessions and panels ------------------------------

    def reserve(self, folder: str, stamp: str) -> int:
        """Return the next number that this process has not tried in `folder` in this second."""
        if stamp != self._stamp:
            self._stamp, self._numbers = stamp, {}
        number = self._numbers.get(folder, -1) + 1
        self._numbers[folder] = number
        return number

    def give_back(self, folder: str, stamp: str, number: int) -> None:
        """Forget a number that was reserved and came to nothing, unless a later one is out already."""
        if stamp == self._stamp and self._numbers.get(folder) == number:
            self._numbers[folder] = number - 1

    def pass_over(self, folder: str, stamp: str, existing: Iterable[str]) -> None:
        """Reserve all numbers up to the highest one of this second among the ids that exist."""
        if stamp == self._stamp:
            highest = max((self._number(name, stamp) for name in existing), default=-1)
            self._numbers[folder] = max(highest, self._numbers.get(folder, -1))

    def _number(self, name: str, stamp: str) -> int:
        """Return the number of an id of this second, or -1 for any other."""
        if name == self.build(stamp):
            return 0
        match = _SUFFIX.fullmatch(name, len(self._head) + len(stamp))
        return int(match[1]) if match and name.startswith(self.build(stamp)) else -1

    # --- ids whose order is the order of time: snapshots and insights --------------------------------

    def following(self, existing: Iterable[str], moment: datetime) -> str:
        """Return an id that is in order after all that exist, even if the clock went back since."""
        stamp = self.stamp(moment)
        newest = max(filter(None, map(self._parse, existing)), default=("", 0))
        return self.build(stamp) if newest[0] < stamp else self.build(newest[0], newest[1] + 1)

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Sort ids from the oldest to the newest; others go where their text would be."""
        return sorted(names, key=lambda name: (*(self._parse(name) or (name.removeprefix(self._head), 0)), name))

    def _parse(self, name: str) -> tuple[str, int] | None:
        """Cut an id into stamp and number; its format sorts by time, so all stamps are equally long."""
        stamp = name[len(self._head) :][: len(self.stamp(datetime(2000, 1, 1, tzinfo=UTC)))]
        number = self._number(name, stamp)
        return (stamp, number) if stamp and number >= 0 else None
