"""Long runs that are started by hand: `make soak`. Their figures stand in docs/reliability.md."""

import argparse
import itertools
import logging
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.testing import scenarios
from flatfile_chat_database.testing.inline import open_flatfile
from flatfile_chat_database.testing.scenarios import Bench, Found
from flatfile_chat_database.testing.trials import Laboratory
from flatfile_chat_database.testing.workloads import ADD, OPERATIONS, UPDATE_CONTEXT

from . import kills


def crashes(states: int, seed: int) -> tuple[str, list[str]]:
    """Open crash states of random workloads until there were enough; return what was seen, and what was wrong."""
    logging.disable(logging.WARNING)
    dice = random.Random(seed)
    opens = [
        open_flatfile(StorageConfig(lock_timeout_seconds=0)),
        open_flatfile(StorageConfig(lock_timeout_seconds=0, journal_max_bytes=1)),
    ]
    benches = [
        bench for one in opens for bench in (Bench(one), Bench(one).prepared(), Bench(one).prepared(closed=False))
    ]
    digests: set[bytes] = set()
    problems: list[str] = []
    checked = workloads = 0
    while len(digests) < states and len(problems) < 20:
        bench = dice.choice(benches)
        one, other = dice.choices(OPERATIONS, k=2), dice.choices(OPERATIONS, k=2)
        late, every = dice.random() < 0.5, dice.randint(2, 9)
        present = dice.choice([(), (UPDATE_CONTEXT,), (ADD,)])
        trials: Iterator[Found] = dice.choice(
            [
                scenarios.alone(bench, (*one, other[0]), late=late),
                scenarios.alternating(bench, (*one, other[0])),
                scenarios.after_a_death(bench, one, other, present=bool(present), every=every),
                scenarios.at_each_call(bench, one, other, every=every),
                scenarios.failing(bench, one, other, present=present, every=every),
            ]
        )
        laboratory = Laboratory(bench.open_store, most=20, seed=dice.random(), levels=2, nested=97)
        for name, trial, first in itertools.islice(trials, 12):
            known = len(laboratory.report.violations)
            laboratory.check(trial, first=first)
            laboratory.check_death(trial)
            problems += [f"{name}: {found.point}: {found.reason}" for found in laboratory.report.violations[known:]]
        digests |= laboratory.report.digests
        checked += laboratory.report.checked
        workloads += 1
    seen = f"{workloads:,} workloads, {checked:,} crash states checked, {len(digests):,} distinct by hash"
    return f"{seen}, {len(problems)} problems", problems


def main() -> int:
    """Kill a writing process many times, open many states that a power loss may leave, and print what was seen."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=main.__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--states", type=int, default=200_000, help="crash states to open")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    problems: list[str] = []
    if options.kills:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="chatdb-soak-") as folder:
            report = kills.run(Path(folder), kills=options.kills, seed=options.seed, each=1500)
        print(f"{report} in {time.monotonic() - began:.0f} s")
        problems += report.problems or []
    if options.states:
        began = time.monotonic()
        seen, found = crashes(options.states, options.seed)
        print(f"{seen} in {time.monotonic() - began:.0f} s")
        problems += found
    for problem in problems[:20]:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
