"""Run scenarios by name, or all of them."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from . import latency, machine, report, startup
from .result import Result

SCENARIOS = (
    "appending",
    "single",
    "many",
    "processes",
    "paging",
    "opening",
    "importing",
    "streaming",
    "listing",
    "searching",
    "databases",
    "migrating",
    "watching",
    "latency",
    "startup",
)

LONG = ("scaling", "objects", "caching")
"""Run only by name."""

FIRST = ("migrating",)
"""Run before the others: where many files were deleted just now, some file systems are slow to make new ones (see
docs/decisions/2026-11-27-new-files-after-many-were-deleted.md)."""

CONTESTED = ("appending", "single", "databases")
"""Those that have peers in an environment of their own."""

DOCS = Path(__file__).resolve().parent.parent / "docs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what each scenario measured; return 1 if something that was asked for does not hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"scenarios: {', '.join(SCENARIOS + LONG)}; the last three only by name",
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it runs, measures nothing")
    parser.add_argument(
        "--check",
        action="store_true",
        help="fail (exit code 1) if a figure is beyond its bar, a peer is not installed, an operation of `latency` "
        f"takes {latency.LIMIT_MS:.0f} ms or more at the 99th percentile, or the package adds more than "
        f"{startup.LIMIT_MS:.0f} ms to `startup`",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="fail (exit code 1) if a peer is not installed; without names, run only the scenarios that have peers",
    )
    parser.add_argument(
        "--report", action="store_true", help="write docs/benchmarks.md and its plot, with what this run measured"
    )
    options = parser.parse_args(arguments)
    if options.quick and (options.check or options.report):
        parser.error(f"--quick measures nothing that --{'check' if options.check else 'report'} could use")
    if options.report and options.names:
        parser.error("--report is about all scenarios: give no names")
    unknown = set(options.names) - set(SCENARIOS + LONG)
    if unknown:
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    facts = machine.facts()
    if not options.json:
        print("; ".join(f"{name}: {value}" for name, value in facts.items()))
    made: dict[str, Result] = {}
    names = options.names or (CONTESTED if options.peers else SCENARIOS)
    for name in sorted(names, key=lambda name: name not in FIRST):
        result: Result = importlib.import_module(f".{name}", __package__).run(quick=options.quick)
        if options.quick:
            result = dataclasses.replace(result, beyond=[])
        print(json.dumps(dataclasses.asdict(result)) if options.json else f"\n{result}", flush=True)
        made[name] = result
    results = [made[name] for name in names]
    if options.report:
        report.write(DOCS, results, facts)
    missing = sorted({peer for result in results for peer in result.missing})
    if missing and (options.check or options.peers):
        print(f"Not installed: {', '.join(missing)}. `make bench` installs what is needed.", file=sys.stderr)
        return 1
    return 1 if options.check and any(result.beyond for result in results) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ended, but not without tidying up
    sys.exit(main())
