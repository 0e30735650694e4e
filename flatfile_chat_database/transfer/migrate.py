"""Copying a whole store to another place, whatever the two are made of.

All keys are copied in order, their bytes as they are. While it lasts, the target holds a note of which store is being
copied there, and no `system/config.json`: that comes last, in the commit that takes the note away, so a target that is
not whole is never taken for a store. Beside the note stands a mark of eight bytes for everything that was put there,
written before it is; while something takes several commits, a mark of its key. What the target has at a key and the
source has not, or has otherwise, was put there by the migration if its mark is known; then it is replaced or removed.
Anything else was put there by somebody, and stays.

Whoever runs a migration again begins anew: what is equal is passed over, so nothing has to be remembered of how far it
came. At the end all of both stores is read once more and compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Final, Literal, cast

from .. import codec
from ..backends.base import Snapshot, StorageBackend
from ..backends.changes import ABSENT, Absent, Put, RemoveTree
from ..backends.places import refuse_nested, same_store, store_id
from ..backends.rules import version_of
from ..config import NAMING_FIELDS, StorageConfig
from ..errors import ConfigurationError, ConflictError, NotFoundError
from ..layout import Layout
from ..models import new_id, utc_now
from ..records.store import Store
from .ahead import ahead
from .putting import BATCH_BYTES, Look, Putting
from .tally import Content, Keys, Tally, under_way

_Sized = tuple[str, int]
"""A key, and how many bytes are there."""

Progress = Callable[[int, int], None]
"""Told how many steps are done, of how many: for each key two or three, to copy and to compare it."""

_NAMES = ("source", "target")

_RUN_BYTES = 2 << 20
"""So much is read at a time; what is larger by itself is streamed."""
_RUN_KEYS = 256
_ODD_KEYS = 1000
"""So many keys that only the target has are gathered before it is looked up whose they are."""
_LOOK_BYTES = 1000
"""What a key takes besides its bytes, about."""
_MARK_BYTES: Final = 8


@dataclass(slots=True)
class MigrationReport:
    """What a migration did, or with `dry_run` would do."""

    store_id: str
    dry_run: bool
    found: Tally = field(default_factory=Tally)
    """What the source holds: keys, bytes, how many of what, which of it is damaged (and copied as it is)."""
    copied: int = 0
    """Keys that were not in the target."""
    continued: int = 0
    """Logs of which the target had the beginning."""
    replaced: int = 0
    """Keys that this migration had put there and that have changed in the source since."""
    removed: int = 0
    """Keys that this migration had put there and that the source has no more."""
    equal: int = 0
    """Keys that were in the target already."""
    foreign: Keys = field(default_factory=Keys)
    """Keys at which the target holds what is not the migration's; they are left as they are."""
    differing: Keys = field(default_factory=Keys)
    """Keys that were not equal when both stores were compared at the end, for what was copied is not there."""
    changed: int = 0
    """Keys that changed in the source while they were copied; run the migration again."""
    finished: bool = False
    """Whether the target is a store now, with all that the source holds."""


async def migrate(
    source: StorageBackend, target: StorageBackend, *, dry_run: bool = False, progress: Progress | None = None
) -> MigrationReport:
    """Copy all of one store to an empty place, or go on with that; see `MigrationReport`.

    Both are opened if they are not. The target cannot be used as a store before `finished`. The source may be written
    meanwhile: what changed is counted, and copied by the next call.

    Args:
        source: The store; nothing is written to it.
        target: Where nothing is, or what an earlier call has begun; with `dry_run` nothing is written to it.
        progress: Called with how much is done, and of how much.

    Raises:
        NotFoundError: There is no store at the source.
        ConfigurationError: Both are the same store, their configurations have different names for things, or the
            source is itself the target of a migration that is not finished.
        ConflictError: The target holds something else, or has been used since a migration to it was finished.
    """
    return await _Migration(source, target, dry_run=dry_run, progress=progress).run()


class _Migration:
    def __init__(
        self, source: StorageBackend, target: StorageBackend, *, dry_run: bool, progress: Progress | None
    ) -> None:
        self._source = source
        self._target = target
        self._layout = Layout(source.config)
        self._report = MigrationReport("", dry_run)
        self._progress = progress
        self._done = self._steps = 0
        self._cursor: str | None = None
        self._passes = 2
        self._odd: list[Look] = []
        self._odd_bytes = 0
        self._extra: list[Content] = []

    async def run(self) -> MigrationReport:
        report, key = self._report, self._layout.key("store")
        _refuse_other_names(self._source.config, self._target.config)
        if self._source is self._target:
            raise same_store(_NAMES)
        await asyncio.to_thread(refuse_nested, self._source, self._target, _NAMES)
        await self._target.open()
        # It says so if the source is no store, of a newer format, half copied, or has other names.
        store = Store(self._source.config, self._source, read_only=True, clock=utc_now, new_id=new_id)
        await store.reading()
        own = await self._source.read(key)
        if own is None or not store.store_id:
            raise NotFoundError(
                "The source is no chat store: nothing was copied.",
                key=key,
                hint="Look whether it is the place you mean.",
            )
        report.store_id = store.store_id
        state = await self._examine_target()
        if not report.dry_run and state != "finished":
            await self._begin()
        self._cursor = (await self._source.changes(None)).cursor or None
        compares = 2 if self._cursor is None else 1  # who cannot tell what changed is read again
        self._passes = 1 if report.dry_run or state == "finished" else 1 + compares
        report.found = copied = await self._pass(writes=state != "finished", looks_at_target=state != "empty")
        if state == "finished":
            if report.equal != copied.keys or report.foreign:
                raise ConflictError(
                    "The target is a finished copy of this store, and one of the two has been used since.",
                    key=key,
                    hint="Use the copy, or migrate to an empty place.",
                )
            report.finished = True
        if report.dry_run or report.foreign or report.finished:
            return report
        await self._compare(copied)
        if not report.differing and not report.changed:
            await self._target.commit([RemoveTree(self._layout.migration), Put(key, own, ABSENT)])
            report.finished = True
        return report

    # --- the target ----------------------------------------------------------------------------------

    async def _examine_target(self) -> Literal["empty", "begun", "finished"]:
        """Return how far the target is a copy of the source; raise if it is something else."""
        own, note = await self._target.read_many([self._layout.key("store"), self._layout.migration_note])
        mine = self._report.store_id
        if own is not None:
            if store_id(own) == mine:
                return "finished"
            raise ConflictError("The target is another store.", hint="Migrate to an empty place.")
        if note is not None:
            if store_id(note) == mine:
                return "begun"
            raise ConflictError(
                "Another store is being copied to the target.",
                key=self._layout.migration_note,
                hint="Go on with that migration, or remove what is there.",
            )
        async with self._target.still() as shown:
            async with aclosing(cast("AsyncGenerator[list[str]]", shown.keys())) as runs:
                first = await anext(runs, None)
            if first:
                raise ConflictError("The target is not empty.", key=first[0], hint="Migrate to an empty place.")
        return "empty"

    async def _begin(self) -> None:
        """Note in the target that it is being filled."""
        note = self._layout.migration_note
        if await self._target.exists(note):
            return
        content = codec.encode_document({"store_id": self._report.store_id, "migration_id": new_id()})
        await self._target.commit([Absent(self._layout.key("store")), Put(note, content, ABSENT)])
        if await self._source.exists(note):
            await self._target.delete(note)
            raise same_store(_NAMES)

    # --- copying -------------------------------------------------------------------------------------

    async def _pass(self, *, writes: bool, looks_at_target: bool) -> Tally:
        """Go through both stores once, and write what is missing; return what the source holds."""
        tally = Tally()
        async with AsyncExitStack() as stack:
            # A store that tells what changed needs no snapshot to be copied: if anything did, that is found at the end.
            tells = writes and not self._report.dry_run and self._cursor is not None
            source = await stack.enter_async_context(self._source.still() if tells else self._source.snapshot())
            # Nobody else writes to it; and an empty place need not be looked at while it is filled.
            target = await stack.enter_async_context(self._target.still()) if looks_at_target else None
            await self._count(source)
            writer = Putting(self._target, self._layout, source)
            stack.push_async_callback(writer.stop)
            writing = writer if writes and not self._report.dry_run else None
            runs = await stack.enter_async_context(aclosing(ahead(self._looks(source, target))))
            async for looks, extra in runs:
                for look in looks:
                    tally.add(look.content)
                    await self._take(look, writing)
                self._extra += extra
                if len(self._extra) >= _ODD_KEYS or self._odd_bytes >= BATCH_BYTES:
                    await self._settle(writing)
                self._step(len(looks))
            await self._settle(writing)
            await writer.finish()
        return tally

    async def _take(self, look: Look, writer: Putting | None) -> None:
        report = self._report
        match look.state:
            case "absent":
                report.copied += 1
                if writer is not None:
                    await writer.copy(look)
            case "equal":
                report.equal += 1
            case "beginning":
                report.continued += 1
                if writer is not None:
                    await writer.go_on(look)
            case _:
                self._odd.append(look)
                self._odd_bytes += len(look.data or b"") + _LOOK_BYTES

    async def _settle(self, writer: Putting | None) -> None:
        """Replace and remove what the target has otherwise, if it is the migration's own."""
        report = self._report
        there = [look.old for look in self._odd if look.old is not None] + self._extra
        wanted = {mark for old in there for mark in (old.mark, under_way(old.key))}
        marks = await self._known(wanted) if wanted else set()

        def is_own(old: Content) -> bool:
            return old.mark in marks or under_way(old.key) in marks

        for look in self._odd:
            if look.old is None or not is_own(look.old):
                report.foreign.add(look.content.key)
                continue
            report.replaced += 1
            if writer is not None:
                await writer.replace(look)
        for content in self._extra:
            if not is_own(content):
                report.foreign.add(content.key)
                continue
            report.removed += 1
            if writer is not None:
                await self._target.delete(content.key)
        self._odd, self._extra, self._odd_bytes = [], [], 0

    async def _known(self, wanted: set[bytes]) -> set[bytes]:
        """Return those marks that stand beside the note."""
        found: set[bytes] = set()
        for key in await self._target.list_keys(f"{self._layout.migration}/"):
            if key != self._layout.migration_note:
                data = await self._target.read(key) or b""
                found |= wanted.intersection(_cut(data))
        return found

    # --- comparing -----------------------------------------------------------------------------------

    async def _compare(self, copied: Tally) -> None:
        """Read the target, and the source once more unless it knows what changed; if they differ, find out where."""
        async with self._target.still() as target:
            there = await self._tally(target, described=False)
            changed = (await self._source.changes(self._cursor)).keys
            if there.digest == copied.digest and changed == frozenset():
                return
            async with self._source.snapshot() as source:
                now = await self._tally(source, described=True)
                if now.digest != there.digest:
                    unequal = await self._unequal(source, target)
                    if changed or there.digest == copied.digest:  # it has what was read at first, as far as can be told
                        self._report.changed = unequal.count
                    else:
                        self._report.differing = unequal
                self._report.found = now

    async def _tally(self, snapshot: Snapshot, *, described: bool) -> Tally:
        """Hash all that is in a store; what it is and whether it is damaged is told with `described` only."""
        tally = Tally()
        async with aclosing(ahead(self._looks(snapshot, None, described=described))) as runs:
            async for looks, _ in runs:
                for look in looks:
                    tally.add(look.content)
                self._step(len(looks))
        return tally

    async def _unequal(self, source: Snapshot, target: Snapshot) -> Keys:
        """Return the keys that do not hold the same in both."""
        unequal = Keys()
        async with aclosing(ahead(self._looks(source, target))) as runs:
            async for looks, extra in runs:
                for look in looks:
                    if look.state != "equal":
                        unequal.add(look.content.key)
                for content in extra:
                    unequal.add(content.key)
        return unequal

    # --- reading -------------------------------------------------------------------------------------

    async def _count(self, source: Snapshot) -> None:
        if self._progress is not None:
            async for run in source.keys():
                self._steps += self._passes * len(run)
            self._step(0)

    def _step(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, max(self._steps, self._done))

    async def _looks(
        self, source: Snapshot, target: Snapshot | None, *, described: bool = True
    ) -> AsyncGenerator[tuple[list[Look], list[Content]], None]:
        """Yield the keys of the source in order with what the target has there, and what only the target has.

        Memory is bounded by a few runs, however many keys there are, and however large each is.
        """
        layout = self._layout if described else None
        async with aclosing(_merged(self._sized(source), self._sized(target))) as merged:
            async for mine, theirs in merged:
                for part in _parts(mine):
                    yield await self._look_at(source, target, part, theirs, layout), []
                only = theirs.keys() - dict(mine)
                if target is not None and only:
                    yield [], [await self._content(target, key) for key in sorted(only)]

    async def _sized(self, snapshot: Snapshot | None) -> AsyncGenerator[list[_Sized], None]:
        """Yield the keys that are to be copied with their sizes, in sorted runs that are not empty."""
        start, key_of_store, layout = f"{self._layout.migration}/", self._layout.key("store"), self._layout

        def is_wanted(key: str) -> bool:
            # A copy of one side of a mirror is no side of it.
            return key != key_of_store and not key.startswith(start) and not layout.is_of_front(key)

        if snapshot is not None:
            async with aclosing(cast("AsyncGenerator[list[_Sized]]", snapshot.sized())) as runs:
                async for run in runs:
                    for at in range(0, len(run), _RUN_KEYS):
                        part = run[at : at + _RUN_KEYS]
                        if kept := [each for each in part if is_wanted(each[0])]:
                            yield kept

    async def _look_at(
        self,
        source: Snapshot,
        target: Snapshot | None,
        part: Sequence[_Sized],
        theirs: Mapping[str, int],
        layout: Layout | None,
    ) -> list[Look]:
        """Look at keys that can be held together, or at one that cannot."""
        if part[0][1] > _RUN_BYTES:
            try:
                look = Look(await self._content(source, part[0][0]), None)
            except NotFoundError:  # the source has no snapshots, and it has gone meanwhile
                return []
            if target is not None and part[0][0] in theirs:
                await self._look_at_large(source, target, look)
            return [look]
        keys = [key for key, _ in part]
        looks = await asyncio.to_thread(_looked_at, layout, keys, await source.read_many(keys))
        if target is not None:
            both = {look.content.key: look for look in looks if look.content.key in theirs}
            for those in _parts([(key, theirs[key]) for key in both]):
                await self._look_at_small(target, [both[key] for key, _ in those], those[0][1])
        return looks

    async def _look_at_small(self, target: Snapshot, looks: Sequence[Look], size: int) -> None:
        """Look what the target has where the source has what can be held; `size` is that of the first."""
        if size > _RUN_BYTES:
            await self._look_at_old(target, looks[0])
            return
        for look, old in zip(looks, await target.read_many([look.content.key for look in looks]), strict=True):
            if old == look.data:
                look.state = "equal"
            elif old is not None:
                look.state, look.version, look.old = "other", version_of(old), _fed(self._layout, look.content.key, old)
                if look.old.is_log and _is_beginning(old, look.data or b""):
                    look.state = "beginning"

    async def _look_at_old(self, target: Snapshot, look: Look) -> bool:
        """Look what the target has at a key; return whether that ends in a whole line."""
        old, ends_whole = Content(self._layout, look.content.key), True
        try:
            async for chunk in target.read(look.content.key):
                old.feed(chunk)
                ends_whole = chunk.endswith(b"\n")
        except NotFoundError:  # the target has no snapshots
            return False
        is_equal = old.sha256 == look.content.sha256
        look.state, look.old = ("equal", None) if is_equal else ("other", old)
        return ends_whole

    async def _look_at_large(self, source: Snapshot, target: Snapshot, look: Look) -> None:
        """Look what the target has where the source has what is too large to be held."""
        ends_whole = await self._look_at_old(target, look)
        old = look.old
        if old is None or not old.is_log or not ends_whole or look.content.damage or old.size >= look.content.size:
            return
        left, beginning = old.size, Content(self._layout, look.content.key)
        async with aclosing(cast("AsyncGenerator[bytes]", source.read(look.content.key))) as chunks:
            async for chunk in chunks:
                beginning.feed(chunk[:left])
                left -= min(left, len(chunk))
                if not left:
                    break
        if beginning.sha256 == old.sha256:
            look.state = "beginning"

    async def _content(self, snapshot: Snapshot, key: str) -> Content:
        content = Content(self._layout, key)
        async for chunk in snapshot.read(key):
            content.feed(chunk)
        return content


# --- small things --------------------------------------------------------------------------------------


def _looked_at(layout: Layout | None, keys: Sequence[str], datas: Sequence[bytes | None]) -> list[Look]:
    found = zip(keys, datas, strict=True)  # None: the source has no snapshots, and it has gone meanwhile
    return [Look(_fed(layout, key, data), data) for key, data in found if data is not None]


def _fed(layout: Layout | None, key: str, data: bytes) -> Content:
    content = Content(layout, key)
    content.feed(data)
    return content


async def _merged(
    ones: AsyncGenerator[list[_Sized], None], others: AsyncGenerator[list[_Sized], None]
) -> AsyncGenerator[tuple[list[_Sized], dict[str, int]], None]:
    """Merge two sorted streams of keys with their sizes: yield those of both up to some key, and so on."""
    async with aclosing(ones), aclosing(others):
        one, other = await anext(ones, None), await anext(others, None)
        while one is not None or other is not None:
            last = min(run[-1][0] for run in (one, other) if run is not None)
            mine = [each for each in one or () if each[0] <= last]
            theirs = [each for each in other or () if each[0] <= last]
            yield mine, dict(theirs)
            if one is not None:
                one = one[len(mine) :] or await anext(ones, None)
            if other is not None:
                other = other[len(theirs) :] or await anext(others, None)


def _parts(sized: Sequence[_Sized]) -> Iterator[list[_Sized]]:
    """Cut keys into parts that can be held at once; what cannot is a part by itself."""
    part: list[_Sized] = []
    left = _RUN_BYTES
    for each in sized:
        if part and each[1] > left:
            yield part
            part, left = [], _RUN_BYTES
        part.append(each)
        left -= each[1]
    if part:
        yield part


def _is_beginning(old: bytes, new: bytes) -> bool:
    """Tell whether a log can be had from another by appending whole lines."""
    return len(old) < len(new) and new.startswith(old) and old[-1:] in (b"", b"\n") and new.endswith(b"\n")


def _cut(marks: bytes) -> Iterator[bytes]:
    return (marks[at : at + _MARK_BYTES] for at in range(0, len(marks), _MARK_BYTES))


def _refuse_other_names(one: StorageConfig, other: StorageConfig) -> None:
    for name in (*NAMING_FIELDS, "system_config_directory_name"):
        if getattr(one, name) != getattr(other, name):
            raise ConfigurationError(
                f"{name} is {getattr(one, name)!r} for the source, and {getattr(other, name)!r} for the target.",
                hint="A store keeps the names it was made with.",
            )
