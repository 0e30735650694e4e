"""The document metadata: what is known of a session's uploaded files, and where they are."""

from __future__ import annotations

import mimetypes
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from ..errors import ValidationError
from ..layout import Layout

GZIP_SUFFIX = ".gz"
"""Behind the name on disk of a compressed file. On disk, do not change."""


@dataclass(frozen=True, slots=True)
class DocumentEntry:
    """What the metadata says of one file. On disk, do not change."""

    filename: str
    path: str
    mime_type: str
    size: int
    uploaded_at: str
    metadata: dict[str, Any]
    sha256: str
    compression: str = ""  # left out when empty

    @property
    def segment(self) -> str:
        """The name on disk."""
        return self.path.rpartition("/")[2]

    def stored(self) -> dict[str, Any]:
        """Return what the metadata holds of it."""
        return {name: value for name, value in asdict(self).items() if name != "compression" or value}


@dataclass(frozen=True, slots=True)
class DocumentPlace:
    """The documents of one session: in their place, or in a trash entry."""

    layout: Layout
    user_id: str
    session_id: str
    trash_id: str | None = None

    @property
    def names(self) -> dict[str, str]:
        return {"user_id": self.user_id, "session_id": self.session_id}

    @property
    def folder(self) -> str:
        """The folder that everything here is in."""
        return self._at(self.layout.folder("documents", **self.names))

    @property
    def metadata(self) -> str:
        return self._at(self.layout.key("documents", **self.names))

    def blob(self, segment: str) -> str:
        return self._at(self.layout.key("document", **self.names, document=segment))

    def analysis(self, segment: str) -> str:
        return self._at(self.layout.key("analysis", **self.names, document=segment))

    def _at(self, key: str) -> str:
        return key if self.trash_id is None else self.layout.in_trash(self.trash_id, key)

    def segment_of(self, entry: object) -> str | None:
        """Return a file's name on disk, or None if its entry is too damaged to say.

        The rest of the path is that of this place, whatever the entry says: a session's folder may have been copied.
        """
        segment = segment_in(entry)
        with suppress(ValidationError):
            found = self.layout.parse(self.layout.key("document", **self.names, document=segment))
            return segment if found is not None and found.entry.name == "document" else None
        return None

    def taken(self, entries: dict[str, Any]) -> set[str]:
        """Return the names on disk that are in use, as a file system that ignores case sees them."""
        return {segment.casefold() for entry in entries.values() if (segment := self.segment_of(entry))}


def segment_in(entry: object) -> str:
    """Return the name on disk that an entry gives, whether or not it can be one; "" if it gives none."""
    path = entry.get("path") if isinstance(entry, dict) else None
    return path.rpartition("/")[2] if isinstance(path, str) else ""


@lru_cache(maxsize=1)
def _mime_types() -> dict[str, str]:
    # Reads the system's own tables as well (so call it in a thread), but into another table than this one: the answer
    # does not depend on the machine. Python 3.11 and 3.12 do not know Markdown.
    return {".md": "text/markdown"} | mimetypes.MimeTypes().types_map[True]


def mime_type_of(filename: str) -> str:
    """Return the type that a file's name says it has. Reads files the first time: call it in a thread."""
    return _mime_types().get(PurePosixPath(filename).suffix.lower(), "application/octet-stream")
