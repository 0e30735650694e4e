"""Power may go at any moment: every state that the disk may then be left in is opened, and nothing is missing.

The number of states, distinct by a hash of the disk image, stands in the summary of the run (see `conftest.py`).
"""

import itertools
import logging
import random
import typing
from collections.abc import Iterable, Iterator

import pytest

from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.testing import scenarios
from flatfile_chat_database.testing import workloads as work
from flatfile_chat_database.testing.crashes import Trace, states
from flatfile_chat_database.testing.disk import Disk
from flatfile_chat_database.testing.histories import Operation
from flatfile_chat_database.testing.inline import open_flatfile
from flatfile_chat_database.testing.scenarios import Bench, Found
from flatfile_chat_database.testing.simulated import SimulatedFiles
from flatfile_chat_database.testing.trials import Laboratory

from . import mutants, toys

CONFIG = StorageConfig(lock_timeout_seconds=0)
FLATFILE = open_flatfile(CONFIG)
STARTS = {
    "an empty disk": Bench(FLATFILE),
    "a closed store": Bench(FLATFILE).prepared(),
    "a store whose process died": Bench(FLATFILE).prepared(closed=False),
}
MOST = 30
"""States of one crash point where they are drawn."""
TRIPLES = 12
"""Workloads of three operations that are drawn for each start and first operation."""
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


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of warnings about half lines say nothing."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def examine(laboratory: Laboratory, trials: Iterable[Found], record: typing.Any = None) -> None:
    """Check trials; fail with the first state that no crash may leave."""
    for name, trial, first in trials:
        before = len(laboratory.report.violations)
        laboratory.check(trial, first=first)
        laboratory.check_death(trial)
        violations = laboratory.report.violations[before:]
        assert not violations, f"{name}: crash after event {violations[0].point}: {violations[0].reason}"
    if record is not None:
        record("crash_states", "".join(digest.hex() for digest in laboratory.report.digests))


# --- the flat-file backend -----------------------------------------------------------------------------


@pytest.mark.parametrize("operation", work.OPERATIONS, ids=lambda operation: operation.name)
@pytest.mark.parametrize("start", STARTS)
def test_nothing_is_lost_or_made_up_whenever_power_fails(
    start: str, operation: Operation, record_property: typing.Any
) -> None:
    bench = STARTS[start]
    dice = random.Random(f"{start} {operation.name}")
    pairs = [(operation, second) for second in work.OPERATIONS]
    triples = [(*dice.choice(pairs), dice.choice(work.OPERATIONS)) for _ in range(TRIPLES)]
    laboratory = Laboratory(FLATFILE, most=MOST)
    for operations in [(operation,), *pairs, *triples]:
        examine(laboratory, scenarios.alone(bench, operations), record_property)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].name}, {pair[1].name}")
def test_what_one_process_left_undone_when_it_was_killed_does_not_harm_another_one(
    pair: tuple[Operation, Operation], record_property: typing.Any
) -> None:
    laboratory = Laboratory(FLATFILE, most=10)
    for present in (True, False):
        trials = scenarios.after_a_death(STARTS["a closed store"], pair[:1], pair[1:], present=present)
        examine(laboratory, trials, record_property)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].name}, {pair[1].name}")
def test_a_process_may_come_between_any_two_calls_of_another(
    pair: tuple[Operation, Operation], record_property: typing.Any
) -> None:
    laboratory = Laboratory(FLATFILE, most=10)
    examine(laboratory, scenarios.at_each_call(STARTS["a closed store"], pair[:1], pair[1:]), record_property)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].name}, {pair[1].name}")
def test_after_a_flush_that_failed_nothing_is_acknowledged_that_is_not_on_disk(
    pair: tuple[Operation, Operation], record_property: typing.Any
) -> None:
    laboratory = Laboratory(FLATFILE, most=20)
    examine(laboratory, scenarios.failing(STARTS["a closed store"], pair, (*pair, work.ADD)), record_property)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].name}, {pair[1].name}")
def test_power_may_fail_once_more_while_the_store_is_opened(
    pair: tuple[Operation, Operation], record_property: typing.Any
) -> None:
    laboratory = Laboratory(FLATFILE, most=10, levels=2, nested=7)
    examine(laboratory, scenarios.alone(STARTS["a closed store"], pair), record_property)


def test_nothing_goes_wrong_on_a_disk_that_keeps_the_order_of_names_either() -> None:
    laboratory = Laboratory(FLATFILE, most=50, ordered=True)
    for pair in itertools.islice(itertools.product(work.OPERATIONS, repeat=2), 0, None, 3):
        examine(laboratory, scenarios.alone(STARTS["a closed store"], pair))


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
    Operation("add three", work.ADD_THREE.steps[1:]),
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
    laboratory = Laboratory(FLATFILE, most=60, stop=True)
    for bench in STARTS.values():
        spoilt = bench.with_files(mutants.SEAM[name])
        for operations in itertools.product((work.CREATE_USER, work.ADD, work.UPDATE_SESSION, work.CLOSE), repeat=3):
            for _, trial, _ in scenarios.alone(spoilt, operations):
                laboratory.check(trial)
            if laboratory.report.violations:
                return
    pytest.fail(f"not caught in {laboratory.report}")
