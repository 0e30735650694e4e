"""What each process that writes to a mirrored store keeps in the first of the two, and which of them have left.

Everybody has a folder under a name that nobody else ever has: records of what the second store may lack, the marks of
what is being done without conditions, files on their way to their key, and a document that changes as long as the
process lives and has records. Whoever sees it unchanged for a while takes its writer for one that has left. It may only
have been slow: nothing rests on that but who has the work.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field

from .. import codec
from ..models import new_id
from .base import StorageBackend
from .changes import Change, Delete, Put, RemoveTree

BEAT_SECONDS = 2.0
"""So often a writer shows that it is there."""
LEFT_SECONDS = 10.0
"""After which a writer that did not is taken for one that has left."""
_NOBODY = "0"
_EVERYTHING = b'{"keys":[""]}\n'


@dataclass(slots=True)
class Kept:
    """The keys of one writer."""

    records: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)


class Writers:
    """The writers, as one of them sees the others."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.me = new_id()
        self._beats = 0
        self._seen: dict[str, tuple[bytes | None, float]] = {}

    @property
    def records(self) -> str:
        """The folder of this process's records."""
        return f"{self._folder}/{self.me}/behind"

    def busy(self) -> str:
        """Return a new key for the mark of something that has no conditions."""
        return f"{self._folder}/{self.me}/busy/{new_id()}.json"

    def staged(self) -> str:
        """Return a new key for a file on its way."""
        return f"{self._folder}/{self.me}/staged/{new_id()}"

    def beat(self) -> Change:
        """Return what shows that this process is there."""
        self._beats += 1
        return Put(self._alive(self.me), codec.encode_document({"beat": self._beats}))

    def goodbye(self) -> list[Change]:
        """Return what takes that back."""
        return [Delete(self._alive(self.me))] if self._beats else []

    def _alive(self, writer: str) -> str:
        return f"{self._folder}/{writer}/alive.json"

    async def listed(self, first: StorageBackend) -> dict[str, Kept]:
        """Return what every writer keeps in a store."""
        found: dict[str, Kept] = {}
        for key in await first.list_keys(f"{self._folder}/"):
            writer, _, rest = key[len(self._folder) + 1 :].partition("/")
            kept = found.setdefault(writer, Kept())
            if rest.startswith("behind/"):
                kept.records.append(key)
            elif rest.startswith("busy/"):
                kept.busy.append(key)
        return found

    async def left(self, first: StorageBackend, writers: Collection[str]) -> list[str]:
        """Return those that seem to have left, as far as this process has looked."""
        others = [writer for writer in writers if writer not in (self.me, _NOBODY)]
        beats = await first.read_many([self._alive(writer) for writer in others])
        now = time.monotonic()
        seen = {}
        for writer, beat in zip(others, beats, strict=True):
            before = self._seen.get(writer)
            seen[writer] = before if before is not None and before[0] == beat else (beat, now)
        self._seen = seen
        gone = [writer for writer in others if now - seen[writer][1] >= LEFT_SECONDS]
        return [*gone, *([_NOBODY] if _NOBODY in writers else [])]

    def removal(self, writer: str) -> list[Change]:
        """Return what removes all that a writer who has left keeps, but its records."""
        folder = f"{self._folder}/{writer}"
        return [Delete(self._alive(writer)), RemoveTree(f"{folder}/busy"), RemoveTree(f"{folder}/staged")]


def everything(folder: str) -> Change:
    """Return what records that the second store may lack anything; it is nobody's record, for everybody to take."""
    return Put(f"{folder}/{_NOBODY}/behind/first.json", _EVERYTHING)
