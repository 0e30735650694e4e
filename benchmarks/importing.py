"""`chatdb import` of generated conversations into a new store, beside the same files made by plain system calls."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .corpus import CONVERSATIONS, write_conversations
from .machine import work_folder
from .result import Bar, Result, Table, median
from .rounds import ROUNDS, settle, timed

BAR = Bar(least=0.35)

# The command, which says at the end how much memory it had.
PROGRAM = """
import atexit, sys
from flatfile_chat_database.cli import main

@atexit.register
def say():
    with open("/proc/self/status") as status:
        sys.stderr.writelines(line for line in status if line.startswith("VmHWM:"))

sys.exit(main())
"""


def run(*, quick: bool) -> Result:
    """Measure messages a second: the whole command, from the start of its process to its end."""
    conversations, rounds = (50, 1) if quick else (CONVERSATIONS, ROUNDS)
    ours: list[float] = []
    theirs: list[float] = []
    peaks: list[float] = []
    with work_folder() as folder:
        source = folder / "conversations.jsonl"
        messages = write_conversations(source, conversations)
        for number in range(rounds + 1):
            settle(quick=quick)
            store = folder / "store"
            with timed() as watch:
                peak = _import(source, store)
            command = watch.seconds
            files, folders = _read(store)
            shutil.rmtree(store)
            settle(quick=quick)
            with timed() as watch:
                _make(folder / "plain", files, folders)
            shutil.rmtree(folder / "plain")
            if number:  # the first one was to warm up
                ours.append(messages / command)
                theirs.append(messages / watch.seconds)
                peaks.append(peak / 1e6)
        size = source.stat().st_size
    table = Table()
    what = f"{conversations:,} conversations, {messages:,} messages"
    table.compare(what, "messages/s", ours, "the same files by plain calls and one sync", theirs, BAR)
    table.measure("peak memory of the command", "MB", peaks)
    return Result(
        "importing",
        f"a file of {size / 1e6:,.1f} MB, {messages:,} messages in {messages / median(ours):.1f} s",
        table.rows,
        table.beyond,
        [f"plain calls: {len(folders):,} folders and {len(files):,} files, then one sync of the file system"],
        {"chatdb import": ours, "plain calls": theirs},
    )


def _import(source: Path, store: Path) -> int:
    """Run the command; return the most memory that it had."""
    arguments = ["--store", str(store), "--set", "max_sessions_per_user=1000000", "--json"]
    arguments += ["import", "--format", "openai-jsonl", str(source)]
    finished = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, check=False, text=True)
    if finished.returncode:
        raise SystemExit(f"chatdb import failed: {finished.stderr}")
    report = json.loads(finished.stdout)
    if report["added"] != report["messages"] or report["skipped"]:
        raise SystemExit(f"The import left something out: {report}.")
    return int(finished.stderr.split()[-2]) * 1024  # VmHWM: 12345 kB


def _read(store: Path) -> tuple[list[tuple[str, bytes]], list[str]]:
    """Return the users' files as the command has left them, and their folders, outer ones first."""
    files, folders = [], []
    for place, _, names in os.walk(store / "users"):
        folders.append(os.path.relpath(place, store))
        files += [(os.path.join(folders[-1], name), Path(place, name).read_bytes()) for name in names]
    return files, folders


def _make(folder: Path, files: list[tuple[str, bytes]], folders: list[str]) -> None:
    os.mkdir(folder, 0o700)
    for name in folders:
        os.mkdir(f"{folder}/{name}", 0o700)
    for name, content in files:
        descriptor = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(descriptor, content)
        os.close(descriptor)
    os.sync()
