"""The write-ahead journal: what is about to be done to the files, durable before any of it is done.

A segment is a file of lines. The first is its header. Then come batches, one after the other: a line that lists the
steps, and the bytes that they write, one step's after the other's, closed by a newline:

    {"format":1,"segment":"0190…"}
    {"crc":"5a0f3c11","bytes":171,"synced":49,"steps":[{"op":"append","key":"users/…/messages.jsonl","bytes":170,…}]}
    {"id":"0190…","role":"user","content":"Hello", …}

The checksum (CRC-32 as in zlib, begun with that of the header, so that no other segment's batch passes) covers the
line and the bytes. `synced` is how far the segment was known to be durable when the batch was written. So a batch
that is damaged tells what it is: if a later one says that it had been durable, it is real damage, and the choice what
to do is a person's; if none does, it was being written when the power went, and nobody was told of it.

Room for batches is reserved ahead, for a file that does not grow is flushed in half the time; what is reserved and not
used reads as NULs. On disk, do not change without another format number.
"""

from __future__ import annotations

import contextlib
import errno
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from ...errors import IntegrityError, ValidationError
from ...layout import Layout
from ...models import new_id
from ..rules import check_key
from .files import Files
from .folders import Folders
from .syncs import Syncs
from .tree import Tree

FORMAT = 1

_FIRST_RESERVE = 1 << 16
_LARGEST_RESERVE = 1 << 20
_READ_BYTES = 1 << 16
_LARGEST_LINE = 1 << 24
_HISTORY_BYTES = 8 << 20
_BEGINNING = b'{"crc":"'
_LINE_BEGINNING = re.compile(rb'\n\{"crc":"[0-9a-f]{8}","bytes":\d')
_CRC_END = len(_BEGINNING) + 8

Op = Literal["put", "append", "install", "delete", "move", "remove"]


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing to do to the files; it can be done again without harm."""

    op: Op
    """`put` a document whole, `append` to a log, `install` a finished file under its name, `delete` a file, `move` a
    file or folder, `remove` a folder with all that is in it."""
    key: str
    """What is written, deleted or removed, or the target of a move."""
    bytes: int = 0
    """How many bytes of the batch belong to it."""
    at: int = 0
    """append: where they stand in the log. install: the size of the finished file."""
    source: str = ""
    """install: where the finished file is. move: what is moved. remove: the name it has while it is removed."""
    was: str | None = None
    """put: the version of the document that is replaced; None for a new one."""
    before: int = -1
    """install, delete: the size of the file that goes; -1 for none."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What is done as one."""

    start: int
    end: int
    synced: int
    steps: list[Step]
    payload: bytes

    def parts(self) -> Iterator[tuple[Step, bytes]]:
        """Yield each step with its bytes."""
        offset = 0
        for step in self.steps:
            yield step, self.payload[offset : offset + step.bytes]
            offset += step.bytes


class _Header(msgspec.Struct):
    format: int
    segment: str


class _Body(msgspec.Struct):
    bytes: int
    synced: int
    steps: list[Step]


class Past(msgspec.Struct, frozen=True):
    """What a segment held that is gone."""

    segment: str
    end: int
    keys: list[str]


_encoder = msgspec.json.Encoder()
_header_decoder = msgspec.json.Decoder(_Header)
_body_decoder = msgspec.json.Decoder(_Body)
_past_decoder = msgspec.json.Decoder(Past)


def encode_batch(seed: int, synced: int, steps: Sequence[Step], payload: bytes) -> bytes:
    """Return the bytes of a batch; `seed` is the checksum of the segment's header."""
    rest = _encoder.encode(_Body(len(payload), synced, list(steps)))
    if len(rest) > _LARGEST_LINE // 2:
        raise ValidationError("So many changes are too much for one commit.", hint="Make them in several commits.")
    crc = zlib.crc32(payload, zlib.crc32(rest, seed))
    return b'%s%08x",%s\n%s\n' % (_BEGINNING, crc, rest[1:], payload)


class Segment:
    """One open file of the journal."""

    def __init__(self, files: Files, number: int, key: str, descriptor: int) -> None:
        """Read the header of an open segment.

        Raises:
            IntegrityError: It has another format, or none.
        """
        self.number = number
        self.key = key
        self._files = files
        self.descriptor = descriptor
        line, newline, _ = files.read(descriptor, 4096, 0).partition(b"\n")
        try:
            header = _header_decoder.decode(line) if newline else None
        except ValueError:
            header = None
        if header is None:
            raise IntegrityError(
                f"{key} is no segment of a journal.", key=key, hint="Run `chatdb check --fix`, which sets it aside."
            )
        if header.format != FORMAT:
            raise IntegrityError(
                f"{key} has format {header.format} of the journal; this version reads {FORMAT}.",
                key=key,
                hint="Open the store once with the version that wrote it, and close it.",
            )
        self.id = header.segment
        self.start = len(line) + 1
        self.seed = zlib.crc32(line)
        self.end = self.start
        """Where the next batch begins."""
        self.synced = 0
        """Up to where this process has seen it durable."""
        self._reserved = files.status_of(descriptor).size

    def close(self) -> None:
        self._files.close(self.descriptor)

    def write(self, steps: Sequence[Step], payload: bytes, *, ahead: bool) -> int:
        """Write a batch at the end; return its size. It counts once `end` is moved behind it.

        With `ahead`, room for later ones is reserved as well.

        Raises:
            OSError: It could not be written; as far as can be told nothing of it is there.
        """
        data = encode_batch(self.seed, self.synced, steps, payload)
        end = self.end + len(data)
        try:
            if end > self._reserved and ahead:
                self._reserve(end)
            self._files.write_all_at(self.descriptor, data, self.end)
        except OSError:
            self.cut()
            raise
        return len(data)

    def _reserve(self, end: int) -> None:
        more = min(max(_FIRST_RESERVE, end // 8), _LARGEST_RESERVE)
        try:
            self._files.reserve(self.descriptor, self._reserved, end - self._reserved + more)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            more = 0  # this file system cannot
        self._reserved = end + more

    def cut(self) -> None:
        """Remove what stands behind the end."""
        self._files.truncate(self.descriptor, self.end)
        self._reserved = self.end

    def is_gone(self) -> bool:
        """Tell whether the file has been removed."""
        return self._files.status_of(self.descriptor).links == 0

    def has_more(self) -> bool:
        """Tell whether anything stands behind the end."""
        return self._files.read(self.descriptor, 1, self.end) not in (b"", b"\0")

    def batches(self, start: int) -> Iterator[Batch]:
        """Yield the whole batches from an offset on.

        Raises:
            IntegrityError: One that was durable is damaged.
        """
        while (batch := self._batch(start)) is not None:
            yield batch
            start = batch.end
        later = self._later_claim(start)
        if later is not None:
            raise IntegrityError(
                f"{self.key}: the batch at byte {start} is damaged, and there are later ones.",
                key=self.key,
                hint="Run `chatdb check --fix`: it sets the segment aside and does all that can still be read of it.",
            )

    def headers(self, start: int, end: int | None = None) -> Iterator[tuple[int, list[Step]]]:
        """Yield the end and the steps of the batches between two offsets, without reading or checking their bytes."""
        while (end is None or start < end) and (found := self._body(start)) is not None:
            body, _, begin = found
            start = begin + body.bytes + 1
            yield start, body.steps

    def salvage(self) -> Iterator[Batch]:
        """Yield every batch that is whole, also behind damaged ones."""
        start: int | None = self.start
        while start is not None:
            batch = self._batch(start)
            if batch is not None:
                yield batch
                start = batch.end
            else:
                start = next((place for place in self._beginnings(start + 1) if self._batch(place)), None)

    def _body(self, start: int) -> tuple[_Body, bytes, int] | None:
        """Return what the line at an offset says, the bytes that its checksum covers, and where its bytes begin."""
        size = _READ_BYTES
        while True:
            data = self._files.read(self.descriptor, size, start)
            if not data.startswith(_BEGINNING):
                return None
            line, newline, _ = data.partition(b"\n")
            if newline:
                break
            if len(data) < size or size >= _LARGEST_LINE:
                return None
            size *= 4
        rest = b"{" + line[_CRC_END + 2 :]
        try:
            body = _body_decoder.decode(rest)
        except (ValueError, RecursionError):
            return None
        return (body, line, start + len(line) + 1) if body.bytes >= 0 else None

    def _batch(self, start: int) -> Batch | None:
        """Return the batch at an offset, or None if there is no whole one."""
        found = self._body(start)
        if found is None:
            return None
        body, line, begin = found
        if sum(step.bytes for step in body.steps) != body.bytes:
            return None
        payload = self._files.read(self.descriptor, body.bytes + 1, begin)
        if len(payload) != body.bytes + 1 or payload[-1:] != b"\n":
            return None
        payload = payload[:-1]
        crc = zlib.crc32(payload, zlib.crc32(b"{" + line[_CRC_END + 2 :], self.seed))
        if line[len(_BEGINNING) : _CRC_END] != b"%08x" % crc:
            return None
        if not all(_is_possible(step) for step in body.steps):
            return None
        return Batch(start, begin + body.bytes + 1, body.synced, body.steps, payload)

    def _beginnings(self, start: int) -> Iterator[int]:
        """Yield where lines that may begin a batch stand behind an offset."""
        offset, rest = start, b""
        while data := self._files.read(self.descriptor, 1 << 20, offset):
            text = rest + data
            for match in _LINE_BEGINNING.finditer(text):
                yield offset - len(rest) + match.start() + 1
            rest = text[-40:]
            offset += len(data)

    def _later_claim(self, start: int) -> int | None:
        """Return the place of a whole batch behind an offset that says that the offset had been durable."""
        for place in self._beginnings(start + 1):
            batch = self._batch(place)
            if batch is not None and batch.synced > start:
                return place
        return None


class Journal:
    """The segments of a store, in order; the newest takes the batches."""

    def __init__(self, files: Files, tree: Tree, folders: Folders, layout: Layout, syncs: Syncs) -> None:
        self._files = files
        self._tree = tree
        self._folders = folders
        self._layout = layout
        self._syncs = syncs
        self.current: Segment | None = None
        self._has_durable_folder = False

    def numbers(self) -> list[int]:
        """Return the numbers of the segments that there are, oldest first."""
        try:
            names = self._files.list_folder(self._tree.path(self._layout.journal))
        except FileNotFoundError:
            return []
        found = (self._layout.segment_number(name) for name, kind in names if kind == "file")
        return sorted(number for number in found if number is not None)

    def key(self, number: int) -> str:
        """Return where a segment is."""
        return self._layout.segment(number)

    def open(self, number: int) -> Segment:
        """Open a segment."""
        key = self.key(number)
        descriptor = self._files.open_to_change(self._tree.path(key))
        try:
            return Segment(self._files, number, key, descriptor)
        except BaseException:
            self._files.close(descriptor)
            raise

    def create(self, batches: Iterable[Batch] = ()) -> Segment:
        """Make a segment that holds copies of some batches; it is durable, with its name, when this returns."""
        self._folders.make(self._layout.journal)
        number = max(self.numbers(), default=0) + 1
        key = self._layout.segment(number)
        temporary = self._tree.temporary(key)
        line = _encoder.encode(_Header(FORMAT, new_id()))
        seed = zlib.crc32(line)
        descriptor = self._files.create(temporary)
        try:
            try:
                data = line + b"\n" + b"".join(encode_batch(seed, 0, batch.steps, batch.payload) for batch in batches)
                self._files.write_all(descriptor, data)
                self._syncs.file(descriptor)
            finally:
                self._files.close(descriptor)
            self._files.rename(temporary, self._tree.path(key))
        except BaseException:
            with contextlib.suppress(OSError):
                self._files.remove(temporary)
            raise
        if self._has_durable_folder:
            self._syncs.folder(self._layout.journal)
        else:
            self._syncs.folders_of([key])
            self._has_durable_folder = True
        segment = self.open(number)
        segment.end = segment.synced = len(data)
        return segment

    def remove(self, numbers: Iterable[int]) -> None:
        """Remove segments, oldest first, and make that durable."""
        keys = [self._layout.segment(number) for number in sorted(numbers)]
        for key in keys:
            with contextlib.suppress(FileNotFoundError):
                self._files.remove(self._tree.path(key))
        if keys:
            self._syncs.folder(self._layout.journal)

    def find(self, segment_id: str) -> Segment | None:
        """Open the segment with an id, newest first."""
        for number in reversed(self.numbers()):
            with contextlib.suppress(FileNotFoundError, IntegrityError):
                segment = self.open(number)
                if segment.id == segment_id:
                    return segment
                segment.close()
        return None

    # --- what the segments held that are gone --------------------------------------------------------

    def remember(self, pasts: Sequence[Past]) -> None:
        """Note, durably, what segments held that are about to be removed.

        A note that cannot be made must not be missed among others, so then all of them go: whoever asks for what
        changed since a segment that is not noted looks at everything.
        """
        path = self._tree.path(self._layout.journal_history)
        try:
            try:
                descriptor = self._files.open_to_append(path)
            except FileNotFoundError:
                descriptor = self._files.create_to_append(path)
            try:
                if self._files.status_of(descriptor).size > _HISTORY_BYTES:
                    self._files.truncate(descriptor, 0)
                self._files.write_all(descriptor, b"".join(_encoder.encode(past) + b"\n" for past in pasts))
                self._syncs.file(descriptor)
            finally:
                self._files.close(descriptor)
        except OSError:
            self.forget_pasts()
        self._syncs.folder(self._layout.journal)

    def forget_pasts(self) -> None:
        """Remove the list of what segments held; what stands in its way stays, and is no list."""
        with contextlib.suppress(FileNotFoundError, IsADirectoryError, PermissionError):
            self._files.remove(self._tree.path(self._layout.journal_history))

    def pasts(self) -> list[Past]:
        """Return what is known of segments that are gone, oldest first."""
        try:
            descriptor = self._files.open_to_read(self._tree.path(self._layout.journal_history))
        except FileNotFoundError:
            return []
        try:
            if self._files.status_of(descriptor).kind != "file":
                return []
            data = self._files.read(descriptor, 4 * _HISTORY_BYTES, 0)
        finally:
            self._files.close(descriptor)
        found: list[Past] = []
        for line in data.split(b"\n")[:-1]:
            try:
                found.append(_past_decoder.decode(line))
            except ValueError:  # a power cut took a part, so what came before does not lead up to now any more
                found.clear()
        return found


def keys_of(steps: Iterable[Step]) -> set[str]:
    """Return the keys that steps change."""
    return {key for step in steps for key in ((step.key, step.source) if step.op == "move" else (step.key,))}


def _is_possible(step: Step) -> bool:
    """Tell whether a step can be one of ours: a journal may have been written by anybody."""
    try:
        check_key(step.key)
        if step.source:
            check_key(step.source)
    except ValidationError:
        return False
    return step.bytes >= 0 and step.at >= 0 and (step.op not in ("install", "move", "remove") or bool(step.source))
