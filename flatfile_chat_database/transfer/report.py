"""What came of moving a store, and how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..models import Problem

Progress = Callable[[int, int | None, int], None]
"""Called now and then, in any thread, with the bytes that are done, all bytes (None: not known yet), and the files."""

MOST_EXAMPLES = 20
"""Keys that a report names; it counts all."""


@dataclass(slots=True)
class Keys:
    """Some keys: how many, and the first of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, key: str) -> None:
        """Count a key, and name it if there are few."""
        self.count += 1
        if len(self.examples) < MOST_EXAMPLES:
            self.examples.append(key)


@dataclass(slots=True)
class ArchiveReport:
    """What was written by `backup` or `export_store`."""

    path: str
    """The file or folder."""
    kind: str
    """"backup" or "export"."""
    format: str
    """"folder", "tar.zst" or "tar.gz"."""
    files: int
    bytes: int
    """Of the records."""
    size: int
    """Bytes that the archive takes; those of the records if it is a folder."""
    counts: dict[str, int]
    """How many files there are of each entry of the map, and in the trash."""
    left_out: Keys
    """Keys that the map has no place for, which are not in the archive."""


@dataclass(slots=True)
class RestoreReport:
    """What was put back by `restore`."""

    files: int
    bytes: int
    counts: dict[str, int]
    problems: list[Problem]
    """What `check` says of the restored store; what is damaged in a store is damaged in its backup."""

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong that affects an answer."""
        return all(problem.harmless or problem.fixed for problem in self.problems)


@dataclass(slots=True)
class ImportReport:
    """What was added by `import_archive`."""

    dry_run: bool
    """Whether nothing was written; the report tells what would be."""
    files: int = 0
    """In the archive, of those that can be added."""
    added: int = 0
    """Files that were absent."""
    continued: int = 0
    """Logs whose beginning was there already."""
    already_there: int = 0
    """Files that are the same, and logs that have grown since."""
    differing: Keys = field(default_factory=Keys)
    """What is another one in the store, and what belongs to a session or panel of which that is true; left as it is."""
    left_out: int = 0
    """Files of the archive's trash and quarantine, which belong to no other store."""
