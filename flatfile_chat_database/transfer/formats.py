"""In which forms an archive can be written."""

from __future__ import annotations

import os
from typing import Final

from ..errors import ConfigurationError

FOLDER: Final = "folder"
ZSTD: Final = "tar.zst"
GZIP: Final = "tar.gz"
FORMATS: Final = (FOLDER, ZSTD, GZIP)
MOST_RATIO: Final = 1000
"""Bytes that may come out of a compressed one, beyond the first 64 MiB, where nothing else is said."""

_OTHERS: Final = (
    ".zip",
    ".7z",
    ".rar",
    ".tar",
    ".gz",
    ".zst",
    ".bz2",
    ".tbz2",
    ".xz",
    ".txz",
    ".lz4",
    ".jsonl",
    ".json",
)
"""Endings of files that are something else."""
_ENDINGS: Final = {".tar.zst": ZSTD, ".tzst": ZSTD, ".tar.gz": GZIP, ".tgz": GZIP}


def said_by(target: str | os.PathLike[str]) -> str | None:
    """Return the format that the ending of a name says; None if it says none."""
    name = os.fspath(target).lower()
    return next((kind for ending, kind in _ENDINGS.items() if name.endswith(ending)), None)


def format_of(target: str | os.PathLike[str], wanted: str | None, *, otherwise: str) -> str:
    """Return the format that is wanted, or that the ending of a name says.

    Raises:
        ConfigurationError: There is no such format, or the name ends as something else does.
    """
    if wanted is not None and wanted not in FORMATS:
        raise ConfigurationError(f"There is no format {wanted!a}.", hint=f"Use one of {', '.join(FORMATS)}.")
    name, said = os.fspath(target), said_by(target)
    chosen = wanted or said or otherwise
    other = next((ending for ending in _OTHERS if name.lower().endswith(ending)), "")
    # Not whatever comes out of a name: who unpacks it believes the name.
    if (said or chosen) != chosen or (said is None and not chosen.endswith(other)):
        raise ConfigurationError(
            f"{name!a} ends as something else does, and would be a {chosen}.",
            hint="Let it end in .tar.zst or .tar.gz, or name a folder without an ending.",
        )
    return chosen
