"""How processes meet: alone, one after a dead one, two at once, and with a flush that fails.

Each function yields trials to be checked, with the crash point from which on a trial is new. Where there are many calls
or syncs to choose from, `every` takes only each n-th.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from .disk import Nodes, Synced
from .histories import Contents, Operation
from .inline import OpenStore, repeatable
from .simulated import SimulatedFiles
from .trials import Process, Trial
from .workloads import CLOSE, PREPARE

_LONGEST = 10_000
"""Calls of one operation; more would be an endless loop."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What trials begin with."""

    open_store: OpenStore
    nodes: Nodes | None = None
    before: Sequence[Contents] = ({},)
    whole_commits: bool = True
    files: type[SimulatedFiles] = SimulatedFiles

    def trial(self) -> Trial:
        """Return a new trial."""
        return Trial(
            self.open_store,
            nodes=self.nodes,
            before=self.before,
            whole_commits=self.whole_commits,
            files=self.files,
        )

    def with_store(self, open_store: OpenStore) -> Bench:
        """Return a bench like this one, whose store is opened otherwise."""
        return replace(self, open_store=open_store)

    def with_files(self, files: type[SimulatedFiles]) -> Bench:
        """Return a bench like this one, with other system calls."""
        return replace(self, files=files)

    def prepared(self, *, closed: bool = True) -> Bench:
        """Return a bench on which `PREPARE` was done, all on disk; the store was closed, or its process died."""
        with repeatable(1 << 32):
            trial = Trial(self.open_store, whole_commits=self.whole_commits)
            process = trial.start()
            for operation in PREPARE:
                process.do(operation)
            if closed:
                process.do(CLOSE)
            process.files.kill()
        after = trial.history.allowed(len(trial.disk.log) + 1)
        return replace(self, nodes=dict(trial.disk.nodes), before=after)


Found = tuple[str, Trial, int]
"""The name of a trial, the trial, and the first crash point that no other trial has."""


def alone(bench: Bench, operations: Sequence[Operation], *, late: bool = False) -> Iterator[Found]:
    """One process does operations in a row; its other threads work at once, or only when it waits for them."""
    with repeatable(late=late):
        trial = bench.trial()
        process = trial.start()
        begun = 0
        for number, operation in enumerate(operations):
            begun = len(trial.disk.log) if number else 0
            process.do(operation)
    yield _name(operations), trial, begun


def alternating(bench: Bench, operations: Sequence[Operation]) -> Iterator[Found]:
    """Two processes take turns."""
    with repeatable():
        trial = bench.trial()
        processes = trial.start(), trial.start()
        for number, operation in enumerate(operations):
            processes[number % 2].do(operation)
    yield f"in turns: {_name(operations)}", trial, 0


def after_a_death(
    bench: Bench, first: Sequence[Operation], second: Sequence[Operation], *, present: bool = True, every: int = 1
) -> Iterator[Found]:
    """A process is killed at each of the calls of its last operation; another one, `present` or new, goes on."""
    for call in range(every, _LONGEST, every):
        with repeatable():
            trial = bench.trial()
            one, other = trial.start(), trial.start()
            if present:
                other.open()
            for operation in first[:-1]:
                one.do(operation)
            point = _do_until(trial, one, first[-1], call, one.files.kill)
            if point is None:
                return
            for operation in second:
                other.do(operation)
        yield f"{_name(first)}, killed at call {call}, then {_name(second)}", trial, point


def at_each_call(
    bench: Bench, one: Sequence[Operation], other: Sequence[Operation], *, every: int = 1
) -> Iterator[Found]:
    """While a process does its last operation another one does all of its own, before one of the calls."""
    for call in range(every, _LONGEST, every):
        with repeatable():
            trial = bench.trial()
            first, second = trial.start(), trial.start()
            second.open()
            for operation in one[:-1]:
                first.do(operation)
            point = _do_until(trial, first, one[-1], call, _all(second, other))
            if point is None:
                return
        yield f"{_name(one)}, and before call {call}: {_name(other)}", trial, point


def failing(
    bench: Bench,
    first: Sequence[Operation],
    second: Sequence[Operation],
    *,
    present: Sequence[Operation] = (),
    every: int = 1,
) -> Iterator[Found]:
    """Each sync in turn fails; the process goes on as far as it may and ends, and another one does the rest.

    The other one may have been at work before, with the operations `present`.
    """
    for number in range(every, _LONGEST, every):
        with repeatable():
            trial = bench.trial()
            one, other = trial.start(), trial.start()
            for operation in present:
                other.do(operation)
            one.files.failing_syncs = frozenset([number])
            for operation in first:
                one.do(operation)
            if one.files.syncs < number:
                return
            one.do(CLOSE)
            one.files.kill()
            for operation in second:
                other.do(operation)
        point = next(index for index, event in enumerate(trial.disk.log) if isinstance(event, Synced) and event.failed)
        yield f"{_name(first)}, sync {number} fails, then {_name(second)}", trial, point


def folding_together(
    bench: Bench, one: Operation, other: Operation, *, calls: Iterable[int], syncs: Iterable[int]
) -> Iterator[Found]:
    """Two processes fold the journal at once, and for one of them a sync fails.

    The store must be one that folds after each operation. The first process folds when it is closed; before one of its
    `calls` the other one does its operation and closes as well, and one of its `syncs` fails.
    """
    syncs = list(syncs)
    for call in calls:
        for number in syncs:
            with repeatable(late=True):
                trial = bench.trial()
                first, second = trial.start(), trial.start()
                second.open()
                first.do(one)
                second.files.failing_syncs = frozenset([second.files.syncs + number])
                point = _do_until(trial, first, CLOSE, call, _all(second, (other, CLOSE)))
            if point is None:
                return
            yield f"{one.name} is folded, and before call {call} {other.name}, whose sync {number} fails", trial, point


def _do_until(
    trial: Trial, process: Process, operation: Operation, call: int, work: Callable[[], object]
) -> int | None:
    """Do an operation, and some work before one of its calls; return when that was, None if it has not so many."""
    point: int | None = None

    def happen() -> None:
        nonlocal point
        point = len(trial.disk.log)
        work()

    process.at(call, happen)
    process.do(operation)
    process.files.before = None
    return point


def _all(process: Process, operations: Sequence[Operation]) -> Callable[[], object]:
    return lambda: [process.do(operation) for operation in operations]


def _name(operations: Sequence[Operation]) -> str:
    return ", ".join(operation.name for operation in operations)
