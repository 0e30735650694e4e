"""Run scenarios by name, or all of them."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import sys
from collections.abc import Sequence

from . import latency, startup

SCENARIOS = ("latency", "startup", "importing", "searching", "listing")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what each scenario measured; return 1 if `--check` was asked for and something is too slow."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"scenarios: {', '.join(SCENARIOS)}")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it runs, measures nothing")
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"fail (exit code 1) if an operation of `latency` takes {latency.LIMIT_MS:.0f} ms or more at the 99th "
        f"percentile, or the package adds more than {startup.LIMIT_MS:.0f} ms to `startup`",
    )
    options = parser.parse_args(arguments)
    if options.check and options.quick:
        parser.error("--quick measures nothing that --check could judge")
    unknown = set(options.names) - set(SCENARIOS)
    if unknown:
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    if not options.json:
        print(f"Python {platform.python_version()}, {platform.system()} {platform.release()}, {os.cpu_count()} cores")
    beyond: list[str] = []
    for name in options.names or SCENARIOS:
        result = importlib.import_module(f".{name}", __package__).run(quick=options.quick)
        print(json.dumps(dataclasses.asdict(result)) if options.json else f"\n{result}", flush=True)
        beyond += result.beyond
    return 1 if options.check and beyond else 0


if __name__ == "__main__":
    sys.exit(main())
