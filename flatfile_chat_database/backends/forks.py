"""What a forked child must let go of.

A child inherits descriptors, and with them its parent's hold on the store's lock; Python offers no way to find the open
stores again but to remember them. They are held weakly.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class LetsGo(Protocol):
    """Something that a forked child must not use."""

    def let_go_after_fork(self) -> None:
        """Close what was inherited."""


_open: weakref.WeakSet[LetsGo] = weakref.WeakSet()
_lock = threading.Lock()
_hooked = threading.Event()


def remember(store: LetsGo) -> None:
    """Have `store` let go in every child that is forked from now on."""
    with _lock:
        if not _hooked.is_set():
            os.register_at_fork(after_in_child=_let_go)
            _hooked.set()
        _open.add(store)


def _let_go() -> None:
    for store in list(_open):
        store.let_go_after_fork()
    _open.clear()
