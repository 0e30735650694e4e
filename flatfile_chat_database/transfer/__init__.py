"""Moving whole stores: every way is to copy by the map, and to verify."""

from .adding import import_archive
from .packing import GZIP, ZSTD
from .reading import Limits, is_archive
from .report import ArchiveReport, ImportReport, Keys, Progress, RestoreReport
from .restoring import restore
from .writing import FOLDER, FORMATS, backup, export_store

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
