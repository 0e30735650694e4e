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

SCENARIOS = ("latency", "startup")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what each scenario measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"scenarios: {', '.join(SCENARIOS)}")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it runs, measures nothing")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(SCENARIOS)
    if unknown:
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    if not options.json:
        print(f"Python {platform.python_version()}, {platform.system()} {platform.release()}, {os.cpu_count()} cores")
    for name in options.names or SCENARIOS:
        result = importlib.import_module(f".{name}", __package__).run(quick=options.quick)
        print(json.dumps(dataclasses.asdict(result)) if options.json else f"\n{result}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
