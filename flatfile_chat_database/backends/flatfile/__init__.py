"""Plain files: the engine that keeps a store in a folder that people can read.

files.py    every system call that touches storage
logs.py     reading JSONL logs, forwards and backwards, past damage
blobs.py    streaming files in and out
tree.py     walking the folder: keys, children, and what does not belong there
engine.py   making changes durable, under the store's lock
writer.py   one thread that takes the changes of one turn of the event loop as one batch
forks.py    what a forked child must let go of
backend.py  the contract's async face over all of these
"""

import sys

if sys.platform == "win32":
    raise ImportError("The flat-file backend is not tested on Windows yet; use storage_url='memory:' or WSL.")

from .backend import FlatfileBackend

__all__ = ["FlatfileBackend"]
