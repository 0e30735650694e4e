"""What `import flatfile_chat_database` adds to `import asyncio`, each in a fresh interpreter, in turn."""

from __future__ import annotations

import os
import subprocess
import sys

from .result import Result, median

STATEMENTS = {"import asyncio": "import asyncio", "import flatfile_chat_database": "import flatfile_chat_database"}

LIMIT_MS = 45.0
"""The package adds at most this."""

PROGRAM = """
import sys, time
began = time.perf_counter()
{statement}
print((time.perf_counter() - began) * 1000)
"""


def run(*, quick: bool) -> Result:
    """Measure milliseconds within the interpreter, from before the import to after it."""
    rounds = 3 if quick else 31
    # As after an installation: with bytecode that an earlier run has written.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for statement in STATEMENTS.values():
        subprocess.run([sys.executable, "-c", statement], check=True, env=environment)
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(rounds):
        for name, statement in STATEMENTS.items():
            program = PROGRAM.format(statement=statement)
            finished = subprocess.run(
                [sys.executable, "-c", program], capture_output=True, check=True, text=True, env=environment
            )
            times[name].append(float(finished.stdout))
    rows = [
        {"statement": name, "rounds": rounds, "median ms": median(values), "min ms": min(values), "max ms": max(values)}
        for name, values in times.items()
    ]
    asyncio_alone, ours = (median(values) for values in times.values())
    added = ours - asyncio_alone
    return Result("startup", f"the package adds {added:.1f} ms (medians) to asyncio", rows, beyond(added))


def beyond(added: float) -> list[str]:
    """Return a sentence if the package adds more milliseconds than it may."""
    if added <= LIMIT_MS:
        return []
    return [f"the package adds {added:.1f} ms to asyncio; it may add at most {LIMIT_MS:.0f} ms."]
