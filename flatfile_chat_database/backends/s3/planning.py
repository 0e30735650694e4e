"""What a commit comes to: for each key, which head is to be replaced by which.

All conditions are looked at first, on what is there now. Then the changes are made in order, but only here, so that
what is left is one step for each key (`Step`), to be done on the condition that its head is still the one that was
looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ... import codec
from ...config import StorageConfig
from ...errors import StorageLimitExceeded
from .. import rules
from ..changes import (
    ABSENT,
    ANY,
    Absent,
    Append,
    Change,
    Delete,
    Edit,
    Move,
    Outcome,
    Put,
    Quota,
    RemoveTree,
    Require,
    Truncate,
)
from .appending import Tail
from .composing import Composer
from .contents import Contents, Log
from .forms import Head, Manifest, Part, hash_of, write_head

_CROWD = 16
"""As long as a folder has room for so many more, nobody looks whether others have filled it meanwhile."""
_LOOKED_AT_ONCE = 8


class Adopt(msgspec.Struct, frozen=True):
    """Put a blob that is in parts already where nothing is. Outcome: whether nothing was."""

    key: str
    parts: Sequence[Part]


class Mend(msgspec.Struct, frozen=True):
    """Set half a line at the end of a log aside. Outcome: None."""

    key: str


class Withdraw(msgspec.Struct, frozen=True):
    """Take lines out of a log again, if they are still there as they were put. Outcome: those that were.

    If none is left the log goes as well: it may have begun with them.
    """

    key: str
    lines: frozenset[bytes]


class Step(msgspec.Struct, frozen=True):
    """What is to be done at one key."""

    key: str
    head: Head | None
    """The head that was looked at, which is to be replaced, whether or not it stands for something."""
    after: bytes | None
    """The head that replaces it; None stands for nothing."""


class Standing:
    """What is at a key, as this commit leaves it."""

    def __init__(self, key: str, head: Head | None) -> None:
        self.key = key
        self.head = head
        """The head that is there now."""
        self.kind = "same"
        """Or "bytes", "log", "taken", "gone": what became of it."""
        self.data = b""
        """The new bytes."""
        self.kept: list[Part] = []
        """Parts that come before the new bytes of a log."""
        self.origin: Standing | None = None
        """Where what was taken comes from."""
        self.must_be_still = False
        """Nothing must be appended between looking and replacing."""

    @property
    def is_there(self) -> bool:
        """Whether there is anything."""
        if self.kind == "same":
            return self.head is not None and self.head.is_there
        return self.kind != "gone"


class Plan:
    """The changes of one commit, made on a picture of the store."""

    def __init__(self, contents: Contents, config: StorageConfig, known: dict[str, Head | None]) -> None:
        """Begin with what is there; `known` are heads that need not be looked at again, and gets those that are."""
        self._known = known
        self._contents = contents
        self._config = config
        self._standings: dict[str, Standing] = {}
        self._logs: dict[str, Log] = {}
        self.composer = Composer(contents)
        self.trees: set[str] = set()
        """Folders that are emptied."""
        self.required: set[str] = set()
        """Keys at which there must be something."""
        self.absent: set[str] = set()
        """Keys at which there must be nothing, but for what this commit puts there."""
        self.targets: set[str] = set()
        """Folders to which a tree is moved: there must be nothing else in them."""
        self.quotas: list[Quota] = []
        """Those of folders that are nearly full."""
        self.unneeded: list[Part] = []
        """Parts that this commit was given, and has no place for."""

    # --- looking -------------------------------------------------------------------------------------

    def prepare(self, changes: Sequence[Change | Adopt | Mend | Withdraw]) -> None:
        """Get the heads that these changes ask for, many at once."""
        keys: set[str] = set()
        for change in changes:
            if isinstance(change, Put | Edit | Truncate | Append | Require | Adopt | Mend | Withdraw | Delete):
                keys.add(change.key)
        self._get(sorted(keys))

    def at(self, key: str) -> Standing:
        """Return what is at a key now."""
        found = self._standings.get(key)
        if found is None:
            self._get([key])
            found = self._standings[key]
        return found

    def _log(self, standing: Standing) -> Log:
        assert standing.head is not None
        if standing.key not in self._logs:
            self._logs[standing.key] = Log(self._contents, standing.key, standing.head)
        return self._logs[standing.key]

    def content(self, standing: Standing) -> bytes:
        """Return the bytes at a key, as this commit leaves them so far."""
        match standing.kind:
            case "gone":
                return b""
            case "bytes":
                return standing.data
            case "taken":
                assert standing.origin is not None
                return self._log(standing.origin).content()
            case "log":
                parts = (self._contents.part(standing.key, part) for part in standing.kept)
                return b"".join([*parts, standing.data])
        return self._log(standing).content() if standing.is_there else b""

    def _below(self, folder: str) -> list[str]:
        """Return the keys below a folder, as this commit leaves it so far."""
        found = set(self._contents.keys(f"{folder}/"))
        for key, standing in self._standings.items():
            if key.startswith(f"{folder}/"):
                (found.add if standing.is_there else found.discard)(key)
        return sorted(found)

    def _there(self, keys: Sequence[str]) -> list[str]:
        """Return those keys at which there is something: a list may have others, which are only locked."""
        self._get(keys)
        return [key for key in keys if self.at(key).is_there]

    def _has_any(self, folder: str) -> bool:
        """Tell whether there is anything in a folder; locked keys of those who died are taken away."""
        for run in self._contents.listed(f"{folder}/"):
            for start in range(0, len(run), _LOOKED_AT_ONCE):
                if self._there([each.path for each in run[start : start + _LOOKED_AT_ONCE]]):
                    return True
        return False

    # --- conditions ----------------------------------------------------------------------------------

    def check(self, change: Change | Adopt | Mend | Withdraw) -> None:
        """Raise the error of a condition that does not hold; before any change is made."""
        match change:
            case Require(key, what):
                self.required.add(key)
                if not self.at(key).is_there:
                    raise rules.not_found(what, key)
            case Quota(folder):
                folders = self._contents.children(folder, folders_only=True)
                try:
                    rules.check_quota(change, folders)
                except StorageLimitExceeded:  # some of them may be emptied, and not removed yet
                    rules.check_quota(change, self._contents.live_folders(folder))
                if len(folders) + _CROWD >= change.maximum:
                    self.quotas.append(change)
            case Put(key, _, expected):
                if expected is ABSENT:
                    if self.at(key).is_there:
                        raise rules.exists_already(key)
                elif expected is not ANY:
                    standing = self.at(key)
                    rules.check_version(key, self.content(standing) if standing.is_there else None, expected)
            case Append(key):
                self._new_lines(change)
            case Edit(key):
                if self._place_of(change) is not None:
                    return
                lines = rules.good_lines(key, rules.mended(self.content(self.at(key)))[0], strict=True)
                found = next((line for line in lines if codec.written_id(line) == change.record_id), None)
                rules.check_edit(change, found)
            case Truncate(key, count):
                if not self._cut(self.at(key), count):
                    rules.kept_and_dropped(key, rules.mended(self.content(self.at(key)))[0], count)
            case Absent(target) | Move(_, target):
                self.absent.add(target)
                if self.at(target).is_there or self._has_any(target):
                    raise rules.exists_already(target)

    def _new_lines(self, change: Append) -> list[bytes]:
        standing = self.at(change.key)
        if standing.kind == "same" and standing.head is not None and standing.head.is_log:
            log = self._log(standing)
            tail = Tail(self._contents, log)

            def find(record_id: str) -> bytes | None:
                found = log.find(record_id) if hash_of(record_id) in tail.ids else None
                return None if found is None else found[1]

            lines = rules.new_lines(change, find)
            rules.check_maximum(change, tail.records, lines)
            return lines
        before = rules.good_lines(change.key, rules.mended(self.content(standing))[0])
        lines = rules.new_lines(change, {codec.written_id(line): line for line in reversed(before)}.get)
        rules.check_maximum(change, len(before), lines)
        return lines

    def _cut(self, standing: Standing, count: int | None) -> tuple[bytes, list[bytes]] | None:
        """Cut the newest records of a log off; None unless they are all behind its parts."""
        if (
            count is None
            or standing.kind != "same"
            or standing.head is None
            or not standing.head.parts
            or not self._log(standing).is_indexed
        ):
            return None
        log = self._log(standing)
        if not log.head.is_log or log.count() - log.recent_first < count:
            return None
        return rules.kept_and_dropped(standing.key, log.recent, count)

    def _place_of(self, change: Edit) -> tuple[int, list[bytes]] | None:
        """Return in which part of a log a record is, and the good lines there; behind the parts is one more.

        None unless every part is known to be whole, and the record is as expected: then all of the log is looked at.
        """
        standing = self.at(change.key)
        head = standing.head
        if standing.kind != "same" or head is None or not head.is_log or not head.parts:
            return None
        log = self._log(standing)
        if not log.is_indexed or not all(part.is_whole for part in head.parts):
            return None
        found = log.find(change.record_id)
        if found is None or found[1] != change.expected.rstrip(b"\n"):
            return None
        recent = rules.good_lines(change.key, log.recent, strict=True, offset=log.recent_at)
        number, first = 0, 0
        while number < len(head.parts) and found[0] >= first + head.parts[number].records:
            first += head.parts[number].records
            number += 1
        if number == len(head.parts):
            return number, recent
        return number, rules.good_lines(change.key, self._contents.part(change.key, head.parts[number]))

    @staticmethod
    def _changed(lines: Sequence[bytes], change: Edit) -> list[bytes]:
        new = (change.line if codec.written_id(old) == change.record_id else old for old in lines)
        return [line for line in new if line is not None]

    # --- changes -------------------------------------------------------------------------------------

    def apply(self, change: Change | Adopt | Mend | Withdraw) -> Outcome:
        """Make a change whose condition was looked at; return its outcome."""
        match change:
            case Put(key, data, expected):
                standing = self.at(key)
                standing.must_be_still |= expected not in (ANY, ABSENT)
                standing.kind, standing.data = "bytes", data
                return rules.version_of(data)
            case Adopt(key, parts):
                standing = self.at(key)
                if standing.is_there:
                    self.unneeded += parts
                    return False
                head = Head("", write_head(Manifest("bytes", parts=list(parts)), b""), None, b"")
                standing.kind, standing.origin = "taken", Standing(key, head)
                return True
            case Delete(key):
                standing = self.at(key)
                was_there = standing.is_there
                standing.kind, standing.data = "gone", b""
                return was_there
            case Append():
                return self._append(change)
            case Mend(key):
                standing = self.at(key)
                self._set_half_aside(standing, self.content(standing))
                return None
            case Withdraw(key, lines):
                standing = self.at(key)
                all_lines = self.content(standing).split(b"\n")
                found = [line for line in all_lines if line + b"\n" in lines]
                if found:
                    left = b"\n".join(line for line in all_lines if line + b"\n" not in lines)
                    self._rewrite(standing, left)
                    if not left:
                        standing.kind = "gone"
                return [line + b"\n" for line in found]
            case Edit(key):
                standing, place = self.at(key), self._place_of(change)
                if place is not None:
                    parts = self._log(standing).head.parts
                    self._rewrite(standing, b"".join(self._changed(place[1], change)), parts[: place[0]], place[0])
                    return None
                data, half = rules.mended(self.content(standing))
                new = self._changed(rules.good_lines(key, data), change)
                self._rewrite(standing, b"".join(new) + half)
                return None
            case Truncate(key, count):
                return self._truncate(self.at(key), count)
            case Move(source, target):
                return self._move(source, target)
            case RemoveTree(folder):
                self.trees.add(folder)
                keys = self._there(self._below(folder))
                for key in keys:
                    standing = self.at(key)
                    standing.kind, standing.data = "gone", b""
                return keys
        return None

    def _get(self, keys: Sequence[str]) -> None:
        wanted = [key for key in keys if key not in self._known]
        settled = self._contents.objects.together(self._contents.locks.settled, wanted)
        for key, head in zip(wanted, settled, strict=True):
            self._known[key] = head
        for key in keys:
            if key not in self._standings:
                self._standings[key] = Standing(key, self._known[key])

    def _append(self, change: Append) -> int:
        standing = self.at(change.key)
        if standing.kind == "same" and standing.head is not None and standing.head.is_log:
            lines, log = self._new_lines(change), self._log(standing)
            if lines:
                self._rewrite(standing, log.recent + b"".join(lines), log.head.parts)
            return len(lines)
        content = self._set_half_aside(standing, self.content(standing))
        before = {codec.written_id(line): line for line in reversed(rules.good_lines(change.key, content))}
        lines = rules.new_lines(change, before.get)
        if lines:
            self._rewrite(standing, content + b"".join(lines))
        return len(lines)

    def _set_half_aside(self, standing: Standing, content: bytes) -> bytes:
        whole, half = rules.mended(content)
        if half:
            for place, data in rules.half_set_aside(self._config, standing.key, len(whole), half).items():
                kept = self.at(place)
                kept.kind, kept.data = "bytes", data
        if whole != content and standing.is_there:
            self._rewrite(standing, whole)
        return whole

    def _rewrite(self, standing: Standing, data: bytes, kept: Sequence[Part] = (), changed: int | None = None) -> None:
        standing.must_be_still = True
        standing.kind = "log" if not data or data.endswith(b"\n") else "bytes"
        standing.data, standing.kept = data, list(kept)
        if changed is not None and changed < len(self._log(standing).head.parts):  # what comes behind it stays
            log = self._log(standing)
            standing.kept += self.composer.parts(data)
            standing.kept += log.head.parts[changed + 1 :]
            standing.data = log.recent

    def _truncate(self, standing: Standing, count: int | None) -> list[bytes]:
        found = self._cut(standing, count)
        if found is not None:
            kept, dropped = found
            if dropped:
                self._rewrite(standing, kept, self._log(standing).head.parts)
            return dropped
        data, half = rules.mended(self.content(standing))
        kept, dropped = rules.kept_and_dropped(standing.key, data, count)
        if dropped:
            self._rewrite(standing, kept + half)
        return dropped

    def _move(self, source: str, target: str) -> bool:
        keys = self._there([*self._below(source), source])
        if any(key != source for key in keys):
            self.trees.add(source)
            self.targets.add(target)
        self._get([target + key[len(source) :] for key in keys])
        for key in keys:
            old, new = self.at(key), self.at(target + key[len(source) :])
            if new.kind == "same" and new.is_there:  # it has come since the target was looked at
                raise rules.exists_already(target)
            if old.kind == "same" and old.head is not None:
                new.kind, new.origin = "taken", Standing(key, old.head)
                old.must_be_still = True
            elif old.kind == "taken":
                new.kind, new.origin = "taken", old.origin
            else:
                new.kind, new.data = "bytes", self.content(old)
                new.kept, new.origin = [], None
                old.must_be_still = True
            old.kind, old.data = "gone", b""
        return bool(keys)

    # --- what is left to do --------------------------------------------------------------------------

    def still(self) -> list[Log]:
        """Return the logs that must not go on before they are replaced, as they were looked at."""
        return [
            self._log(standing)
            for standing in self._standings.values()
            if standing.must_be_still and standing.head is not None and standing.head.is_log
        ]

    def steps(self) -> list[Step]:
        """Return what is to be done."""
        found = []
        for key, standing in self._standings.items():
            if standing.kind == "same":
                continue
            after = None if standing.kind == "gone" else self._head(standing)
            if after is not None or (standing.head is not None and standing.head.is_there):
                found.append(Step(key, standing.head, after))
        return found

    def _head(self, standing: Standing) -> bytes:
        key = standing.key
        match standing.kind:
            case "taken":
                origin = standing.origin
                assert origin is not None and origin.head is not None
                if not origin.head.is_log:
                    return origin.head.raw
                log = self._log(origin)
                return self.composer.log(key, log.recent, log.head.parts, puts=log.puts)
            case "log":
                return self.composer.log(key, standing.data, standing.kept, puts=self._puts(standing))
            case _:
                return self.composer.any(key, standing.data)

    def _puts(self, standing: Standing) -> list[str]:
        """Return the ids of the puts that are in a log that is made anew."""
        return self._log(standing).puts if standing.head is not None and standing.head.is_log else []
