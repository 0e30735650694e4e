"""Where and on what is measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from .peers import PEERS

IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")


@contextmanager
def work_folder() -> Iterator[Path]:
    """Provide a folder on a disk and remove it afterwards; the same disk for all contestants.

    A flush costs nothing in a file system that is kept in memory, so there nothing would be measured.
    """
    for parent in (tempfile.gettempdir(), "/var/tmp"):
        if file_system(parent) not in IN_MEMORY:
            with tempfile.TemporaryDirectory(prefix="chatdb-benchmark-", dir=parent) as folder:
                yield Path(folder)
            return
    raise SystemExit("The folder for temporary files is kept in memory: set TMPDIR to a folder on a disk.")


def file_system(path: str | os.PathLike[str]) -> str:
    """Return the type of the file system that holds a folder, "ext4" for instance."""
    found, depth = "unknown", -1
    real = os.path.realpath(path)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, behind = line.partition(" - ")
        place = fields.split()[4].encode().decode("unicode_escape")  # a space in it is written \040
        if (real + "/").startswith(place.rstrip("/") + "/") and len(place) >= depth:
            found, depth = behind.split()[0], len(place)
    return found


def facts() -> dict[str, str]:
    """Return what a reader has to know of this machine to judge the figures."""
    with work_folder() as folder:
        disk = file_system(folder)
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "file system": disk,
        "Python": platform.python_version(),
        "SQLite": sqlite3.sqlite_version,
        **{peer.distribution: _version(peer.distribution) for peer in PEERS.values() if peer.distribution},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
