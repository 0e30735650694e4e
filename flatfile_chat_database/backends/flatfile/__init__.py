"""Plain files: the engine that keeps a store in a folder that people can read.

- files.py: every system call that touches storage; oserrors.py: what the system's errors mean to a caller
- tree.py: walking the folder: keys, children, and what does not belong there
- logs.py: reading JSONL logs; blobs.py: streaming files in and out; memo.py: results kept until their files change
- engine.py: making changes durable, a batch at a time, with lock.py (the store's lock), folders.py (folders durable up
  to the root) and openlogs.py (what is known of the logs that are appended to)
- writer.py: one thread that takes the changes of one turn of the event loop as one batch
- forks.py: what a forked child must let go of
- backend.py: the contract's async face over all of these
"""

import sys

if sys.platform == "win32":
    raise ImportError("The flat-file backend is not tested on Windows yet; use storage_url='memory:' or WSL.")

from .backend import FlatfileBackend

__all__ = ["FlatfileBackend"]
