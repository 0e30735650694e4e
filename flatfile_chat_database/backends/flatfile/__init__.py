"""Plain files: the engine that keeps a store in a folder that people can read.

- files.py: every system call that touches storage; oserrors.py: what the system's errors mean to a caller
- tree.py: walking the folder: keys, children, and what does not belong there
- logs.py: reading JSONL logs, with offsets.py (where their records are); blobs.py: streaming files in and out; memo.py:
  results kept until their files change
- engine.py: making a batch of jobs.py durable: plan.py and drafts.py (its conditions and its steps), ledger.py and
  journal.py (what is written first, and where), openlogs.py and wholes.py (what it does to the files), folders.py,
  syncs.py, lock.py
- checkpoint.py: folding the journal into the files; recovery.py and replay.py: doing it again after a death;
  history.py: what changed since a moment
- snapshots.py: one state of a store that is being written
- backend.py: the contract's async face over all of these
"""

import sys

if sys.platform == "win32":
    raise ImportError("The flat-file backend is not tested on Windows yet; use storage_url='memory:' or WSL.")

from .backend import FlatfileBackend

__all__ = ["FlatfileBackend"]
