"""`chatdb import` of generated conversations into a new store, in a process of its own."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flatfile_chat_database import StorageConfig, StorageManager
from flatfile_chat_database.importers import import_file

from .result import Result

TEXT = "The quick brown fox jumps over the lazy dog, and then it rests for a while. " * 4  # 308 characters
MESSAGES = 20  # in each conversation


def run(*, quick: bool) -> Result:
    """Measure the import alone: from opening the file until all of it is durable."""
    conversations = 10 if quick else 5_000
    with tempfile.TemporaryDirectory(prefix="chatdb-benchmark-") as folder:
        source = Path(folder, "conversations.jsonl")
        _generate(source, conversations)
        finished = subprocess.run(
            [sys.executable, "-m", __name__, str(source), str(Path(folder, "store"))],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        size = source.stat().st_size
    what = f"a file of {size / 1e6:,.1f} MB with {MESSAGES} messages a conversation"
    return Result("importing", what, [json.loads(finished.stdout)])


def _generate(path: Path, conversations: int) -> None:
    with path.open("w") as file:
        for number in range(conversations):
            messages = [
                {"role": ("user", "assistant")[n % 2], "content": f"{number}, {n}: {TEXT}"} for n in range(MESSAGES)
            ]
            file.write(json.dumps({"id": f"conversation-{number}", "messages": messages}) + "\n")


def _import(source: str, store: str) -> dict[str, Any]:
    async def work() -> dict[str, Any]:
        config = StorageConfig(storage_base_path=store, max_sessions_per_user=10_000_000)
        began = time.perf_counter()
        async with StorageManager(config) as storage:
            report = await import_file(storage, source, user_id="local")
        seconds = time.perf_counter() - began
        if report.skipped:
            raise SystemExit(f"The import skipped something: {', '.join(report.skipped)}.")
        return {
            "conversations": report.conversations,
            "messages": report.added,
            "seconds": seconds,
            "messages/s": report.added / seconds,
            "peak MB": _peak_bytes() / 1e6,
        }

    return asyncio.run(work())


def _peak_bytes() -> int:
    """Return the most memory that this process ever had."""
    # Not `getrusage`: its figure also counts the process that this one was forked from, whose peak may be higher.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no VmHWM: the peak memory cannot be measured here.")


if __name__ == "__main__":
    print(json.dumps(_import(*sys.argv[1:])))
