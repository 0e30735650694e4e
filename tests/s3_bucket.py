"""A bucket in memory whose ETags are those of S3: of the bytes, so that the same bytes have the same one again.

`obstore.store.MemoryStore` counts instead, which hides what comes of that.
"""

import builtins
import hashlib
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
from obstore.exceptions import AlreadyExistsError, PreconditionError


class Answer(msgspec.Struct):
    """What there is, as the client hands it out."""

    data: bytes
    meta: dict[str, Any]
    attributes: Mapping[str, str]

    def bytes(self) -> bytes:
        """Return all bytes."""
        return self.data

    def stream(self, min_chunk_size: int) -> Iterator[builtins.bytes]:
        """Yield them in chunks."""
        for start in range(0, len(self.data), min_chunk_size):
            yield self.data[start : start + min_chunk_size]


class Bucket:
    """Takes the place of the module `obstore` where the backend uses it; which client asks is no matter."""

    def __init__(self) -> None:
        self._objects: dict[str, Answer] = {}
        self._lock = threading.Lock()

    def get(self, _: object, path: str, options: dict[str, Any] | None = None) -> Answer:
        """Return an object, or what comes behind an offset."""
        with self._lock:
            found = self._objects.get(path)
        if found is None:
            raise FileNotFoundError(path)
        return found if options is None else Answer(found.data[options["range"]["offset"] :], found.meta, {})

    def get_range(self, _: object, path: str, *, start: int, length: int) -> bytes:
        """Return some bytes of an object."""
        return self.get(_, path).data[start : start + length]

    def head(self, _: object, path: str) -> dict[str, Any]:
        """Return what is known of an object."""
        return self.get(_, path).meta

    def list(
        self, _: object, folder: str | None, *, offset: str | None, chunk_size: int
    ) -> Iterator[builtins.list[dict[str, Any]]]:
        """Return objects in runs."""
        found = [each for each in self._below(folder) if offset is None or each["path"] > offset]
        return iter([found[start : start + chunk_size] for start in range(0, len(found), chunk_size)])

    def list_with_delimiter(self, _: object, folder: str | None) -> dict[str, Any]:
        """Return the folders and the objects in a folder."""
        start = len(folder) + 1 if folder else 0
        names = [(each, each["path"][start:].partition("/")) for each in self._below(folder)]
        folders = {each["path"][:start] + name for each, (name, slash, _) in names if slash}
        return {"common_prefixes": sorted(folders), "objects": [each for each, (_, slash, _) in names if not slash]}

    def put(
        self, _: object, path: str, data: bytes, *, mode: Any, use_multipart: bool, attributes: dict[str, str]
    ) -> dict[str, str]:
        """Write an object on a condition."""
        with self._lock:
            there = self._objects.get(path)
            if mode == "create" and there is not None:
                raise AlreadyExistsError(path)
            if isinstance(mode, dict) and there is None:
                raise FileNotFoundError(path)
            if isinstance(mode, dict) and there is not None and there.meta["e_tag"] != mode["e_tag"]:
                raise PreconditionError(path)
            etag = f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'
            meta = {"path": path, "size": len(data), "e_tag": etag, "last_modified": datetime.now(UTC)}
            self._objects[path] = Answer(bytes(data), meta, attributes)
            return {"e_tag": etag}

    def delete(self, _: object, paths: str | builtins.list[str]) -> None:
        """Remove objects, whether they are there or not."""
        with self._lock:
            for path in [paths] if isinstance(paths, str) else paths:
                self._objects.pop(path, None)

    def _below(self, folder: str | None) -> builtins.list[dict[str, Any]]:
        with self._lock:
            found = [each.meta for path, each in self._objects.items() if not folder or path.startswith(f"{folder}/")]
        return sorted(found, key=lambda meta: str(meta["path"]))
