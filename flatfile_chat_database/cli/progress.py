"""The progress bar of commands that take long: how much, how fast, and how long it still takes; on stderr."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from ..terminal import visible
from .frame import Options


class Show(Protocol):
    """Moves the bar."""

    def __call__(self, done: int, total: int | None, count: int) -> None:
        """Show how far it is.

        Args:
            done: How much of `total` is done, in whatever unit both have.
            total: All of it; None if that is not known.
            count: How many things that is, for the text and the rate.
        """


def counted(count: float, unit: str) -> str:
    """Return a count with its unit: bytes as `12.3 MB`, anything else as `1,234 messages`."""
    if unit != "bytes":
        return f"{count:,.0f} {unit}"
    if count < 1000:
        return f"{count:.0f} bytes"
    power = min(int(math.log10(count)) // 3, 4)
    return f"{count / 1000**power:.1f} {' kMGT'[power]}B"


@contextmanager
def progress(description: str, unit: str, options: Options) -> Iterator[Show | None]:
    """Show a bar while something runs; give None if nobody can see it: stderr is no terminal, or JSON is wanted.

    Args:
        description: What is being done or read.
        unit: What is counted, such as `messages`; `bytes` are shown in MB.
        options: What stands before the command.
    """
    if options.json or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    began = time.monotonic()
    with bar:
        task = bar.add_task(visible(description), total=None, rate="")

        def show(done: int, total: int | None, count: int) -> None:
            rate = count / max(time.monotonic() - began, 1e-9)
            each = counted(rate, unit) if unit == "bytes" else f"{rate:,.0f}"
            bar.update(task, completed=done, total=total, rate=f"{counted(count, unit)}, {each}/s")

        yield show
