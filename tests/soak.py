"""Long runs that are started by hand: `make soak`. Their figures stand in docs/reliability.md."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from . import kills


def main() -> int:
    """Kill a writing process many times and print what was seen."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=main.__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chatdb-soak-") as folder:
        report = kills.run(Path(folder), kills=options.kills, seed=options.seed)
    print(f"{report} in {time.monotonic() - began:.0f} s")
    for problem in (report.problems or [])[:20]:
        print(problem)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
