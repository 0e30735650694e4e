"""Which states a power loss may leave of a disk, by what was done to it and what was made durable.

A crash may come after any prefix of the calls. Of the effects before it those that were synced are on the disk, and of
the others any subset, each independently of the rest: a name, a rename (both of its halves or none), a removal, a size.
Of the bytes of a write that was not synced a beginning may be there, an end, NULs instead of them, or nothing at all;
later writes may be there without earlier ones, with NULs in the gap.

With `ordered=True` the model is a file system like ext4 with ordered metadata: names and sizes reach the disk in the
order in which they were changed, any sync takes all earlier ones with it, and of each file a beginning of what was
written is there. What is wrong there as well needs no exotic disk.

All states are enumerated where there are few; otherwise a sample is drawn, the same in each run, which always has the
extremes: nothing, everything, each effect alone missing and each alone there.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from .disk import (
    ROOT,
    Choice,
    Dropped,
    Effect,
    Event,
    Made,
    Nodes,
    Resized,
    Synced,
    Write,
    lost_by_failed_syncs,
    touches,
    whole,
)

SECTOR_BYTES = 512
PAGE_BYTES = 4096
NOTHING: Choice = (0, 0, False)
_NULS: Choice = (0, 0, True)


@dataclass(frozen=True, slots=True)
class Trace:
    """What was done to a disk."""

    initial: Nodes
    log: Sequence[Event]


@dataclass(frozen=True, slots=True)
class State:
    """What a power loss after the first `point` events of a trace may leave."""

    point: int
    nodes: Nodes

    def digest(self) -> bytes:
        """Return a hash of the tree of names with the contents of all files."""
        return digest_of(self.nodes)


def digest_of(nodes: Nodes) -> bytes:
    """Return a hash of the tree of names with the contents of all files."""
    parts: list[bytes] = []
    waiting = [("", ROOT)]
    while waiting:
        path, number = waiting.pop()
        node = nodes[number]
        if node.kind == "folder":
            parts.append(b"%d:%s/%d\0" % (len(path), path.encode(), node.mode))
            waiting += [(f"{path}/{name}", node.entries[name]) for name in sorted(node.entries)]
        else:
            data = node.data.rstrip(b"\0")
            parts += (b"%d:%s=%d,%d,%d\0" % (len(path), path.encode(), node.mode, node.size, len(data)), data)
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


def states(
    trace: Trace,
    *,
    most: int = 64,
    seed: float = 0,
    ordered: bool = False,
    first: int = 0,
    last: int | None = None,
    answers: Collection[int] = (),
) -> Iterator[State]:
    """Yield states that a power loss during a trace may leave; some come more than once.

    Args:
        trace: What was done.
        most: How many states of one crash point are drawn when there are more; the extremes come in addition.
        seed: Of the sample.
        ordered: Choose the stricter model.
        first: The first crash point, as a number of events.
        last: The last crash point; the end by default.
        answers: Crash points at which somebody was told something. A sample is drawn there, at the end and before each
            sync, where the most effects are open to choice; at the points between, only a small one.
    """
    lost = lost_by_failed_syncs(trace.log)
    end = len(trace.log) if last is None else last
    covered = False  # by the states of the point behind it, which has one more effect that may be missing
    for point in range(end, first - 1, -1):
        following = trace.log[point] if point < end else None
        if covered and following is not None and not isinstance(following, Synced | Dropped):
            continue
        choosing = (_ordered if ordered else _independent)(trace, point, lost)
        covered = choosing.size <= most
        dice = random.Random(f"{seed} {point}")
        if covered:
            picked = choosing.all()
        elif following is None or isinstance(following, Synced | Dropped) or point in answers:
            picked = choosing.sample(most, dice)
        else:
            picked = choosing.few(most // 4, dice)
        for nodes in picked:
            yield State(point, nodes)


# --- any subset of what was not synced -----------------------------------------------------------------


class _Choosing:
    """The effects before a crash point, of which some may be missing."""

    def __init__(self, base: Nodes, tail: Sequence[tuple[Effect, Sequence[Choice]]]) -> None:
        """`base` is what the effects before `tail` left, of which none is open to choice."""
        self._base = base
        self._tail = tail
        self._open = [choices for _, choices in tail if len(choices) > 1]
        self.size = 1
        for choices in self._open:
            self.size *= len(choices)

    def all(self) -> Iterator[Nodes]:
        """Yield every state."""
        for chosen in itertools.product(*self._open):
            yield self._made(chosen)

    def sample(self, most: int, dice: random.Random) -> Iterator[Nodes]:
        """Yield the extremes and `most` others. The first choice of an effect is nothing, the last is all of it."""
        nothing = [choices[0] for choices in self._open]
        everything = [choices[-1] for choices in self._open]
        yield self._made(nothing)
        for index, choices in enumerate(self._open):
            for choice in choices[:-1]:
                yield self._made([*everything[:index], choice, *everything[index + 1 :]])
            for choice in choices[1:]:
                yield self._made([*nothing[:index], choice, *nothing[index + 1 :]])
        yield from self.few(most, dice)

    def few(self, most: int, dice: random.Random) -> Iterator[Nodes]:
        """Yield the state in which nothing is missing, and `most` others."""
        yield self._made([choices[-1] for choices in self._open])
        for number in range(most):
            # Whole and missing effects make more of a difference than torn ones, so those come by themselves as well.
            narrow = number % 2 == 0
            yield self._made([dice.choice((one[0], one[-1]) if narrow else one) for one in self._open])

    def _made(self, chosen: Sequence[Choice]) -> Nodes:
        nodes = dict(self._base)
        following = iter(chosen)
        for effect, choices in self._tail:
            choice = choices[0] if len(choices) == 1 else next(following)
            if choice != NOTHING or isinstance(effect, Made):
                effect.apply(nodes, choice)
        return nodes


def _independent(trace: Trace, point: int, lost: set[int]) -> _Choosing:
    unsynced: dict[int, tuple[int, ...]] = {}
    shown: set[int] = set()  # lost for good: somebody has read what is there instead
    for index in range(point):
        event = trace.log[index]
        if isinstance(event, Synced):
            if not event.failed:
                unsynced = {
                    other: nodes for other, nodes in unsynced.items() if event.node not in nodes or other in lost
                }
        elif isinstance(event, Dropped):
            shown |= {other for other in lost if other < index and event.node in touches_at(trace, other)}
        else:
            unsynced[index] = touches(event)
    # A failed sync that is still to come has lost nothing yet: what it would lose is open to choice all the same.
    base = dict(trace.initial)
    tail: list[tuple[Effect, Sequence[Choice]]] = []
    sizes: dict[int, int] = {}
    for index in range(point):
        event = trace.log[index]
        if isinstance(event, Synced | Dropped):
            continue
        choices: Sequence[Choice] = (whole(event),)
        if index in shown and index in unsynced:
            choices = (_NULS if isinstance(event, Write) else NOTHING,)
        elif index in unsynced and not isinstance(event, Made):
            known = base.get(event.node) if isinstance(event, Write) else None
            size = sizes.get(event.node, known.size if known is not None else 0) if isinstance(event, Write) else 0
            choices = _choices(event, size)
        if isinstance(event, Write):
            sizes[event.node] = max(sizes.get(event.node, 0), event.offset + len(event.data))
        elif isinstance(event, Resized):
            sizes[event.node] = event.size
        if tail or len(choices) > 1:
            tail.append((event, choices))
        else:
            event.apply(base, choices[0])
    return _Choosing(base, tail)


def touches_at(trace: Trace, index: int) -> tuple[int, ...]:
    """Return the nodes that one effect of a trace depends on."""
    event = trace.log[index]
    return () if isinstance(event, Synced | Dropped) else touches(event)


def _choices(effect: Effect, size: int) -> Sequence[Choice]:
    """Return what may be left of an unsynced effect, on a file of a size: nothing first, all of it last."""
    if not isinstance(effect, Write):
        return NOTHING, whole(effect)
    length, offset = len(effect.data), effect.offset
    cuts = {1, length // 2, length - 1}
    for unit in (SECTOR_BYTES, PAGE_BYTES):
        border = unit - offset % unit
        if border < length:
            cuts |= {border, border + (length - border - 1) // unit * unit}
    found: list[Choice] = [NOTHING]
    grows = offset + length > size
    if grows:
        found.append(_NULS)
    for cut in sorted(cut for cut in cuts if 0 < cut < length):
        found.append((0, cut, False))
        if grows and (cut + offset) % SECTOR_BYTES == 0:
            found.append((0, cut, True))
        if (cut + offset) % SECTOR_BYTES == 0:
            found.append((cut, length, True))  # the disk wrote the later sectors first
    if grows:
        found.append((0, length // 2, True))
    found.append(whole(effect))
    return found


# --- in the order of the metadata ----------------------------------------------------------------------


class _OrderedChoosing(_Choosing):
    """The states that are given as choices for the whole tail at once."""

    def __init__(self, base: Nodes, effects: Sequence[Effect], combinations: Sequence[Sequence[Choice]]) -> None:
        super().__init__(base, [])
        self._effects = effects
        self._combinations = combinations
        self.size = len(combinations)

    def all(self) -> Iterator[Nodes]:
        for combination in self._combinations:
            nodes = dict(self._base)
            for effect, choice in zip(self._effects, combination, strict=True):
                if choice != NOTHING or isinstance(effect, Made):
                    effect.apply(nodes, choice)
            yield nodes

    def few(self, most: int, dice: random.Random) -> Iterator[Nodes]:
        yield from self.sample(most, dice)

    def sample(self, most: int, dice: random.Random) -> Iterator[Nodes]:
        kept = self._combinations
        self._combinations = [kept[0], kept[-1], *dice.sample(kept, min(most, len(kept)))]
        yield from self.all()
        self._combinations = kept


def _ordered(trace: Trace, point: int, lost: set[int]) -> _Choosing:
    effects: list[Effect] = []
    synced_until: dict[int, int] = {}
    names_until = 0
    for index in range(point):
        event = trace.log[index]
        if isinstance(event, Synced):
            if not event.failed:
                names_until = len(effects)
                synced_until[event.node] = len(effects)
        elif not isinstance(event, Dropped):
            effects.append(event)
    data = {
        node: [i for i, one in enumerate(effects) if isinstance(one, Write) and one.node == node]
        for node in {one.node for one in effects if isinstance(one, Write)}
    }
    beginnings = []
    for node, indexes in data.items():
        until = sum(index < synced_until.get(node, 0) for index in indexes)
        # The last one that is there may end at a page; behind it the size may or may not be the new one.
        beginnings.append(
            [(indexes, count, torn) for count in range(until, len(indexes) + 1) for torn in (False, True)]
        )
    combinations: list[Sequence[Choice]] = []
    for names in range(names_until, len(effects) + 1):
        if names < len(effects) and isinstance(effects[names], Write | Made):
            continue  # the next end of the names is the same
        for kept in itertools.islice(itertools.product(*beginnings), 512):
            chosen = [whole(one) if isinstance(one, Made) or i < names else NOTHING for i, one in enumerate(effects)]
            for indexes, count, torn in kept:
                for position, index in enumerate(indexes):
                    chosen[index] = whole(effects[index]) if position < count else NOTHING
                    if torn and position == count:
                        chosen[index] = _torn_at_page(effects[index], grown=index < names)
            combinations.append(chosen)
    return _OrderedChoosing(dict(trace.initial), effects, combinations)


def _torn_at_page(effect: Effect, *, grown: bool) -> Choice:
    if not isinstance(effect, Write):
        return NOTHING
    border = PAGE_BYTES - effect.offset % PAGE_BYTES
    return (0, min(border, len(effect.data)) if border < len(effect.data) else 0, grown)
