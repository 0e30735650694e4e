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

_ENDINGS: Final = {".tar.zst": ZSTD, ".tzst": ZSTD, ".tar.gz": GZIP, ".tgz": GZIP}


def format_of(target: str | os.PathLike[str], wanted: str | None, *, otherwise: str) -> str:
    """Return the format that is wanted, or that the ending of a name says.

    Raises:
        ConfigurationError: There is no such format.
    """
    if wanted is not None and wanted not in FORMATS:
        raise ConfigurationError(f"There is no format {wanted!a}.", hint=f"Use one of {', '.join(FORMATS)}.")
    name = os.fspath(target)
    return wanted or next((kind for ending, kind in _ENDINGS.items() if name.endswith(ending)), otherwise)
