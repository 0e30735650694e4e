"""Moving whole stores: every way is to copy by the map, and to verify.

The names are loaded when they are first used: most programs move no store, and none should wait for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adding import import_archive
    from .formats import FOLDER, FORMATS, GZIP, ZSTD
    from .reading import Limits, is_archive
    from .report import ArchiveReport, ImportReport, Keys, Progress, RestoreReport
    from .restoring import restore
    from .writing import backup, export_store

__all__ = [
    "FOLDER",
    "FORMATS",
    "GZIP",
    "ZSTD",
    "ArchiveReport",
    "ImportReport",
    "Keys",
    "Limits",
    "Progress",
    "RestoreReport",
    "backup",
    "export_store",
    "import_archive",
    "is_archive",
    "restore",
]

_MODULES = {
    "adding": ("import_archive",),
    "formats": ("FOLDER", "FORMATS", "GZIP", "ZSTD"),
    "reading": ("Limits", "is_archive"),
    "report": ("ArchiveReport", "ImportReport", "Keys", "Progress", "RestoreReport"),
    "restoring": ("restore",),
    "writing": ("backup", "export_store"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
