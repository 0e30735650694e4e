"""Power may go at any moment: every state that the disk may then be left in is opened, and nothing is missing.

The number of states, distinct by a hash of the disk image, stands in the summary of the run (see `conftest.py`).
"""

import itertools
import logging
import random
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from flatfile_chat_database.backends.changes import Append
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.testing import scenarios
from flatfile_chat_database.testing import workloads as work
from flatfile_chat_database.testing.crashes import Trace, states
from flatfile_chat_database.testing.disk import Disk
from flatfile_chat_database.testing.histories import Operation
from flatfile_chat_database.testing.inline import OpenStore, open_flatfile
from flatfile_chat_database.testing.scenarios import Bench, Found
from flatfile_chat_database.testing.simulated import SimulatedFiles
from flatfile_chat_database.testing.trials import Laboratory, Observation

from . import mutants, toys

Record = Callable[[Iterable[bytes]], None]
Pair = tuple[Operation, Operation]

CONFIG = StorageConfig(lock_timeout_seconds=0)
FLATFILE = open_flatfile(CONFIG)
STARTS = {
    "an empty disk": Bench(FLATFILE),
    "a closed store": Bench(FLATFILE).prepared(),
    "a store whose process died": Bench(FLATFILE).prepared(closed=False),
}
CLOSED = STARTS["a closed store"]
FOLDED: dict[str, Any] = {"calls": (1, 5, 12), "syncs": range(4, 11)}
"""Before which calls of one process another one folds too, and which of its syncs fail."""
FOLDING = open_flatfile(StorageConfig(lock_timeout_seconds=0, journal_max_bytes=1))
"""Folds its journal into the files after each operation."""
NORMAL = open_flatfile(StorageConfig(lock_timeout_seconds=0, durability="normal"))
MOST = 20
"""States of one crash point where they are drawn."""
LONGER = 9
"""Workloads of two and three operations by turns that are drawn for each start and first operation."""
PAIRS = (
    (work.ADD, work.ADD),
    (work.ADD, work.ADD_THREE),
    (work.ADD_THREE, work.UPDATE_SESSION),
    (work.UPDATE_SESSION, work.EDIT),
    (work.EDIT, work.ADD),
    (work.POP, work.ADD_THREE),
    (work.ADD, work.DELETE_SESSION),
    (work.DELETE_SESSION, work.CREATE_SESSION),
    (work.PURGE, work.CREATE_SESSION),
    (work.SAVE, work.UPDATE_CONTEXT),
    (work.CLOSE, work.ADD),
)
by_pair = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].name}, {pair[1].name}")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of warnings about half lines say nothing."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def record(record_property: Callable[[str, object], None]) -> Record:
    """Return what has the images of a laboratory counted in the summary of the run."""
    return lambda digests: record_property("crash_states", "".join(digest.hex() for digest in digests))


OBSERVED: dict[OpenStore, dict[bytes, Observation | str]] = {FLATFILE: {}, FOLDING: {}, NORMAL: {}}
"""What was found in states, of which many come up in several tests. Not for a store that was spoiled on purpose."""


def sharing(open_store: OpenStore, **options: Any) -> Laboratory:
    """Return a laboratory that opens no state that another one of these has opened."""
    return Laboratory(open_store, observed=OBSERVED[open_store], **options)


def examine(laboratory: Laboratory, trials: Iterable[Found], record: Record | None = None) -> None:
    """Check trials; fail with the first state that no crash may leave."""
    for name, trial, first in trials:
        before = len(laboratory.report.violations)
        laboratory.check(trial, first=first)
        laboratory.check_death(trial)
        violations = laboratory.report.violations[before:]
        assert not violations, f"{name}: crash after event {violations[0].point}: {violations[0].reason}"
    if record is not None:
        record(laboratory.report.digests)


# --- the flat-file backend -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("operation", work.OPERATIONS, ids=lambda operation: operation.name)
@pytest.mark.parametrize("start", STARTS)
def test_nothing_is_lost_or_made_up_whenever_power_fails(start: str, operation: Operation, record: Record) -> None:
    dice = random.Random(f"{start} {operation.name}")
    others = work.OPERATIONS
    longer = [(operation, *(dice.choice(others) for _ in range(1 + number % 2))) for number in range(LONGER)]
    laboratory = sharing(FLATFILE, most=MOST)
    for operations in [(operation,), *longer]:
        examine(laboratory, scenarios.alone(STARTS[start], operations), record)


@pytest.mark.slow
@by_pair
def test_what_one_process_left_undone_when_it_was_killed_does_not_harm_another_one(pair: Pair, record: Record) -> None:
    for present, every in ((True, 7), (False, 10)):
        trials = scenarios.after_a_death(CLOSED, pair[:1], pair[1:], present=present, every=every)
        examine(sharing(FLATFILE, most=2), trials, record)


@pytest.mark.slow
@by_pair
def test_a_process_may_come_between_any_two_calls_of_another(pair: Pair, record: Record) -> None:
    examine(sharing(FLATFILE, most=2), scenarios.at_each_call(CLOSED, pair[:1], pair[1:], every=3), record)


@pytest.mark.slow
@by_pair
def test_after_a_flush_that_failed_nothing_is_acknowledged_that_is_not_on_disk(pair: Pair, record: Record) -> None:
    # The other process goes on in the segment that it knows, or opens the store when nobody else is there.
    for first, present in ((pair[:1], (work.UPDATE_CONTEXT,)), (pair, ())):
        trials = scenarios.failing(CLOSED, first, (pair[0], work.ADD), present=present, every=7)
        examine(sharing(FLATFILE, most=1), trials, record)


@pytest.mark.slow
@by_pair
def test_power_may_fail_once_more_while_the_store_is_opened(pair: Pair, record: Record) -> None:
    laboratory = sharing(FLATFILE, most=2, levels=2, nested=53)
    examine(laboratory, scenarios.alone(CLOSED, pair), record)


@pytest.mark.slow
@by_pair
def test_the_journal_may_be_folded_after_each_operation(pair: Pair, record: Record) -> None:
    for late in (False, True):
        trials = scenarios.alone(CLOSED.with_store(FOLDING), (*pair, work.CLOSE), late=late)
        examine(sharing(FOLDING, most=3), trials, record)


@pytest.mark.slow
def test_two_processes_fold_the_journal_one_after_the_other(record: Record) -> None:
    trials = scenarios.folding_together(CLOSED.with_store(FOLDING), work.ADD, work.UPDATE_CONTEXT, **FOLDED)
    examine(sharing(FOLDING, most=1), trials, record)


@pytest.mark.slow
@pytest.mark.parametrize("operation", work.OPERATIONS, ids=lambda operation: operation.name)
def test_nothing_goes_wrong_on_a_disk_that_keeps_the_order_of_names_either(operation: Operation) -> None:
    laboratory = sharing(FLATFILE, most=10, ordered=True)
    examine(laboratory, scenarios.alone(CLOSED, (operation, work.ADD, work.UPDATE_SESSION)))


@pytest.mark.slow
@pytest.mark.parametrize("operation", work.OPERATIONS, ids=lambda operation: operation.name)
def test_the_level_normal_loses_the_end_and_leaves_no_holes(operation: Operation) -> None:
    # On a disk that keeps the order of names, as ext4 does: others may keep a later append and lose an earlier one,
    # and at this level the journal may be lost that would fill the hole.
    laboratory = sharing(NORMAL, most=20, ordered=True, loses=True)
    for operations in ((operation, work.ADD), (work.ADD, work.ADD_THREE, operation)):
        examine(laboratory, scenarios.alone(Bench(NORMAL).prepared(), operations))


# --- the enumerator itself -----------------------------------------------------------------------------


def test_the_states_of_a_rename_that_was_not_flushed() -> None:
    disk = Disk()
    files = SimulatedFiles(disk)
    files.write(files.create("/old"), b"old")
    disk = Disk(disk.nodes)  # all of it is on disk
    files = SimulatedFiles(disk)
    descriptor = files.create("/new")
    files.write(descriptor, b"new")
    files.sync(descriptor)
    files.rename("/new", "/old")
    found = set()
    for state in states(Trace(disk.initial, disk.log)):
        paths = Disk(state.nodes).paths()
        found.add(tuple(sorted((path, node.content()) for path, node in paths.items())))
    assert found == {
        (("/old", b"old"),),
        (("/new", b""), ("/old", b"old")),
        *((("/new", b"new"[:size]), ("/old", b"old")) for size in (1, 2, 3)),
        *((("/new", content), ("/old", b"old")) for content in (b"\0\0\0", b"n\0\0")),
        (("/old", b"new"),),
    }


def test_a_later_append_may_be_on_disk_without_an_earlier_one() -> None:
    disk = Disk()
    descriptor = SimulatedFiles(disk).create("/log")
    disk = Disk(disk.nodes)
    files = SimulatedFiles(disk)
    descriptor = files.open_to_append("/log")
    files.write(descriptor, b"one\n")
    files.write(descriptor, b"two\n")
    contents = {Disk(state.nodes).paths()["/log"].content() for state in states(Trace(disk.initial, disk.log))}
    assert {b"", b"one\n", b"\0\0\0\0two\n", b"one\ntwo\n", b"one\nt", b"on", b"\0\0\0\0"} <= contents


TOY_WORK = (
    Operation("put", (work.UPDATE_SESSION.steps[0],)),
    Operation("add", work.ADD.steps[1:]),
    Operation("put again", work.UPDATE_CONTEXT.steps[1:]),
    Operation("put another", (work.CREATE_USER.steps[0], *work.UPDATE_CONTEXT.steps[1:])),
    Operation("add another", (Append(work.LOG, (work.line(6),)),)),
)


def faults_of_toy(mistake: toys.Mistake | None, *, ordered: bool = False) -> Laboratory:
    open_toy = toys.open_toy(mistake)
    laboratory = Laboratory(open_toy, most=100, ordered=ordered)
    for count in range(1, len(TOY_WORK) + 1):
        for _, trial, first in scenarios.alone(Bench(open_toy, whole_commits=False), TOY_WORK[:count]):
            laboratory.check(trial, first=first)
    return laboratory


@pytest.mark.parametrize("ordered", [False, True])
def test_a_store_that_goes_by_the_book_passes(ordered: bool) -> None:
    report = faults_of_toy(None, ordered=ordered).report
    assert report.violations == []
    assert len(report.digests) > 20


@pytest.mark.parametrize("mistake", typing.get_args(toys.Mistake))
def test_a_step_that_the_toy_leaves_out_is_caught(mistake: toys.Mistake) -> None:
    assert faults_of_toy(mistake).report.violations


@pytest.mark.parametrize("name", mutants.SEAM)
def test_a_call_that_does_nothing_under_the_backend_is_caught(name: str) -> None:
    files = mutants.SEAM[name]
    trials = itertools.chain(
        scenarios.alone(CLOSED.with_files(files), (work.EDIT,)),
        scenarios.alone(
            Bench(FLATFILE, files=files),
            (work.CREATE_USER, work.CREATE_SESSION, work.ADD, work.UPDATE_SESSION, work.CLOSE),
        ),
    )
    assert is_caught(trials, Laboratory(FLATFILE, most=20, stop=True))


def plain() -> Iterator[Found]:
    """Yield what shows most mistakes."""
    for operations in ((work.ADD_THREE,), (work.UPDATE_SESSION,)):
        yield from scenarios.alone(CLOSED, operations)
    yield from scenarios.alone(Bench(FLATFILE), (work.CREATE_USER, work.CREATE_SESSION, work.ADD, work.CLOSE))


EXPOSING: dict[str, tuple[Callable[[], Iterable[Found]], Callable[[], Laboratory]]] = {
    "finishing a dead peer's records first": (
        lambda: scenarios.after_a_death(CLOSED, (work.ADD,), (work.ADD_THREE,)),
        lambda: Laboratory(FLATFILE, most=10, stop=True),
    ),
    "writing them again before flushing": (
        lambda: scenarios.failing(CLOSED, (work.ADD,), (work.ADD,), present=(work.UPDATE_CONTEXT,)),
        lambda: Laboratory(FLATFILE, most=10, stop=True),
    ),
    "flushing in recovery": (plain, lambda: Laboratory(FLATFILE, most=10, stop=True, levels=2, nested=3)),
    "one checkpoint at a time": (
        lambda: scenarios.folding_together(CLOSED.with_store(FOLDING), work.ADD, work.UPDATE_CONTEXT, **FOLDED),
        lambda: Laboratory(FOLDING, most=4, stop=True),
    ),
    "structural changes under the lock": (
        lambda: scenarios.at_each_call(CLOSED, (work.DELETE_SESSION,), (work.ADD,)),
        lambda: Laboratory(FLATFILE, most=10, stop=True),
    ),
}
"""What shows that a rule was left out, where the plain workloads do not."""


@pytest.mark.slow
@pytest.mark.parametrize("name", mutants.RULES)
def test_a_rule_of_the_journal_that_is_left_out_is_caught(name: str) -> None:
    trials, laboratory = EXPOSING.get(name, (plain, lambda: Laboratory(FLATFILE, most=10, stop=True)))
    with mutants.RULES[name]():
        assert is_caught(trials(), laboratory())


def is_caught(trials: Iterable[Found], laboratory: Laboratory) -> bool:
    return any(laboratory.check(trial).violations for _, trial, _ in trials)
