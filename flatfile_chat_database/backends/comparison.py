"""Comparing two stores key by key while others write to them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from .alike import keys_below
from .carrier import Carrier

_SHOWN = 100
_PAUSE_SECONDS = 0.1
_LOOKS = 20


@dataclass(slots=True)
class Comparison:
    """What two stores have in common."""

    keys: int = 0
    differing: list[str] = field(default_factory=list)
    """The first of the keys that are not the same in both."""
    count: int = 0
    """How many there are."""


async def compared(carrier: Carrier, *, fix: bool, progress: Callable[[int], None] | None) -> Comparison:
    """Compare every key; with `fix` copy what differs.

    Raises:
        StorageError: One of the two stores cannot be read or written.
    """
    found = Comparison()
    async for run in keys_below(carrier.first, carrier.second, ""):
        for key in run:
            if carrier.layout.is_of_mirror(key):
                continue
            found.keys += 1
            # What is on its way is no difference: a key counts if it still differs after it was waited for.
            if not await carrier.alike.is_equal(key) and not await _becomes_equal(carrier, key):
                found.count += 1
                found.differing = [*found.differing, key][:_SHOWN]
                if fix:
                    await carrier.carry([key])
        if progress is not None:
            progress(found.keys)
    return found


async def _becomes_equal(carrier: Carrier, key: str) -> bool:
    _, names = await carrier.recorded()
    if not any(key == name or (key.startswith(name) and name[-1:] in ("", "/")) for name in names):
        return await carrier.alike.is_equal(key)  # it may have arrived since
    size = await carrier.alike.size(key)
    for _ in range(_LOOKS):
        await asyncio.sleep(_PAUSE_SECONDS)
        if await carrier.alike.is_equal(key) or await carrier.alike.holds(key, size):
            return True
    return False
