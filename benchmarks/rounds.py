"""Contestants in turn, so that whatever the machine does meanwhile happens to all of them."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager

Contest = Callable[[], Awaitable[float]]

ROUNDS = 5


async def interleave(contests: Mapping[str, Contest], *, quick: bool, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Run each contest once to warm up, then A B C, A B C …; return the figures of each, a round each."""
    for contest in contests.values():
        await contest()
    figures: dict[str, list[float]] = {name: [] for name in contests}
    for _ in range(1 if quick else rounds):
        for name, contest in contests.items():
            settle(quick=quick)
            figures[name].append(await contest())
    return figures


def settle(*, quick: bool) -> None:
    """Leave nothing of what was before to whoever comes next: neither garbage nor unwritten pages."""
    if not quick:
        gc.unfreeze()
        gc.collect()
        gc.freeze()  # nor a collector that walks through the objects of every other contestant
        os.sync()


class Stopwatch:
    """Seconds of the block that `timed` surrounds."""

    seconds = 0.0


@contextmanager
def timed() -> Iterator[Stopwatch]:
    """Measure a block."""
    watch = Stopwatch()
    began = time.perf_counter()
    yield watch
    watch.seconds = time.perf_counter() - began
