"""What the changes of a commit mean for a database's contents: their conditions, and what they do."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .. import codec
from ..config import StorageConfig
from .changes import ANY, Absent, Append, Change, Delete, Edit, Move, Outcome, Put, Quota, RemoveTree, Require, Truncate
from .contents import Contents, rows_of
from .rules import (
    check_edit,
    check_maximum,
    check_quota,
    check_version,
    exists_already,
    good_lines,
    half_set_aside,
    kept_and_dropped,
    mended,
    new_lines,
    not_found,
    version_of,
)


class Commits:
    """Checks and makes changes, one after the other, in one transaction."""

    def __init__(self, contents: Contents, config: StorageConfig) -> None:
        self.contents = contents
        self._config = config

    def check(self, change: Change) -> None:
        """Raise the error of a condition that does not hold."""
        contents = self.contents
        match change:
            case Require(key, what):
                if not contents.exists(key):
                    raise not_found(what, key)
            case Quota(folder):
                check_quota(change, contents.children(folder, folders_only=True))
            case Put(key, _, expected):
                if expected is not ANY:
                    check_version(key, contents.read(key), expected)
            case Append(key):
                added = new_lines(change, self._finder(change))
                if change.maximum is not None:
                    check_maximum(change, self._count(key), added)
            case Edit(key):
                lines = self._lines_in_bytes(key, strict=True)
                found = contents.find(key, change.record_id) if lines is None else None
                line = None if found is None else found[1]
                if lines is not None:
                    line = next((each for each in lines if codec.written_id(each) == change.record_id), None)
                check_edit(change, line)
            case Truncate(key, count):
                place = contents.place(key)
                if place is not None and place.kind != "log":
                    kept_and_dropped(key, mended(contents.bytes_of(key, place))[0], count)
            case Absent(target) | Move(_, target):
                if not contents.is_free(target):
                    raise exists_already(target)
            case Delete() | RemoveTree():
                pass

    def apply(self, change: Change) -> Outcome:
        """Make a change whose condition was checked; return its outcome."""
        contents = self.contents
        match change:
            case Put(key, data):
                contents.put(key, data)
                return version_of(data)
            case Delete(key):
                return contents.delete(key)
            case Append(key):
                added = new_lines(change, self._finder(change))
                if added:
                    self.extend(key, b"".join(added))
                return len(added)
            case Edit(key, record_id, _, line):
                self._edit(key, record_id, line)
                return None
            case Truncate(key, count):
                return self._truncate(key, count)
            case Move(source, target):
                keys = [key for key in (source, *contents.keys(f"{source}/")) if contents.exists(key)]
                for key in keys:
                    self._rename(key, target + key[len(source) :])
                if keys:
                    contents.changed_below(source)
                    contents.changed_below(target)
                return bool(keys)
            case RemoveTree(folder):
                removed = contents.keys(f"{folder}/")
                for key in removed:
                    contents.delete(key)
                if removed:
                    contents.changed_below(folder)
                return removed
            case Require() | Absent() | Quota():
                return None

    # --- logs ----------------------------------------------------------------------------------------

    def open_log(self, key: str) -> None:
        """Make a log that is absent; set aside half a line at the end of one that is there."""
        place = self.contents.place(key)
        if place is None:
            self.contents.put_log(key, b"")
            return
        if place.kind == "log":
            return
        data = self.contents.bytes_of(key, place)
        whole, half = mended(data)
        if half:
            for beside, kept in half_set_aside(self._config, key, len(whole), half).items():
                self.contents.put(beside, kept)
        if whole != data or rows_of(whole) is not None:
            self.contents.put_log(key, whole)

    def extend(self, key: str, data: bytes) -> None:
        """Add whole lines at the end of a log, whatever they say; it is made if it is absent."""
        self.open_log(key)
        place = self.contents.place(key)
        lines = rows_of(data) if place is not None and place.kind == "log" else None
        if lines is not None and not self.contents.lines_of(key, [*map(codec.written_id, lines)]):
            self.contents.append(key, lines)
        else:
            self.contents.put_log(key, (self.contents.read(key) or b"") + data)

    def _lines_in_bytes(self, key: str, *, strict: bool = False) -> list[bytes] | None:
        """Return the records of a log that is kept as bytes, as it is once half a line at its end is set aside."""
        place = self.contents.place(key)
        if place is None or place.kind == "log":
            return None
        return good_lines(key, mended(self.contents.bytes_of(key, place))[0], strict=strict)

    def _finder(self, append: Append) -> Callable[[str], bytes | None]:
        """Return what finds the line of a record that is to be added, asked for with all the others at once."""
        lines = self._lines_in_bytes(append.key)
        if lines is not None:
            return {codec.written_id(line): line for line in lines}.get
        found = self.contents.lines_of(append.key, append.ids or tuple(map(codec.written_id, append.lines)))
        return {record_id: line + b"\n" for record_id, line in found.items()}.get

    def _count(self, key: str) -> int:
        lines = self._lines_in_bytes(key)
        return self.contents.count(key) if lines is None else len(lines)

    def _edit(self, key: str, record_id: str, line: bytes | None) -> None:
        self.open_log(key)
        lines = self._lines_in_bytes(key)
        if lines is not None:
            self._put_lines(key, (line if codec.written_id(old) == record_id else old for old in lines))
            return
        found = self.contents.find(key, record_id)
        if found is None:  # removed by an earlier change of the same commit
            return
        position, _ = found
        if line is None:
            self.contents.remove_line(key, position)
        elif codec.written_id(line) == record_id:
            self.contents.replace_line(key, position, line)
        else:
            kept = self.contents.records(key, 0, None, strict=True)
            self._put_lines(key, (line if at == position else each + b"\n" for at, each in enumerate(kept)))

    def _put_lines(self, key: str, lines: Iterable[bytes | None]) -> None:
        self.contents.put_log(key, b"".join(line for line in lines if line is not None))

    def _truncate(self, key: str, count: int | None) -> list[bytes]:
        if not self.contents.exists(key):
            return []
        self.open_log(key)
        place = self.contents.place(key)
        if place is not None and place.kind == "log":
            return self.contents.cut(key, count)
        kept, dropped = kept_and_dropped(key, self.contents.read(key) or b"", count)
        if dropped:
            self.contents.put_log(key, kept)
        return dropped

    # --- moving --------------------------------------------------------------------------------------

    def _rename(self, source: str, target: str) -> None:
        self.contents.delete(target)  # nothing, unless an earlier change of the same commit has put something there
        self.contents.move(source, target)
