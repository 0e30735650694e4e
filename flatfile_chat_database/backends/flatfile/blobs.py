"""Streaming files in and out by chunks, in threads, safe against callers that are cancelled in the middle."""

from __future__ import annotations

import contextlib
import threading

from .files import Files
from .loading import make_folders

WRITE_BYTES = 1 << 20
"""Chunks are gathered to this size before they are written."""
READ_BYTES = 1 << 18


class BlobWriter:
    """A temporary file that grows; every method blocks.

    A caller that is cancelled may discard the file while a write of its is still at work in another thread. The lock
    lets that write end first: a descriptor closed under it could by then be another file's.
    """

    def __init__(self, files: Files, path: str) -> None:
        """Write to `path`, whose folder is made if it is missing."""
        self.path = path
        self._files = files
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._discarded = False

    def start(self) -> None:
        """Create the file."""
        with self._lock:
            if self._discarded:
                return
            try:
                self._descriptor = self._files.create(self.path)
            except FileNotFoundError:
                make_folders(self._files, self.path.rpartition("/")[0])
                self._descriptor = self._files.create(self.path)

    def write(self, data: bytes) -> None:
        """Append all of `data`."""
        with self._lock:
            if self._descriptor is not None:
                self._files.write_all(self._descriptor, data)

    def finish(self) -> None:
        """Make the bytes durable and close the file."""
        with self._lock:
            if self._descriptor is not None:
                self._files.sync(self._descriptor)
                self._close()

    def discard(self) -> None:
        """Remove the file, unless it has another name by now."""
        with self._lock:
            self._discarded = True
            # What cannot be removed is a harmless leftover, and its error would hide why the blob is discarded.
            with contextlib.suppress(OSError):
                self._close()
            with contextlib.suppress(OSError):
                self._files.remove(self.path)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            self._files.close(descriptor)


class BlobReader:
    """An open file that is read from beginning to end; every method blocks."""

    def __init__(self, files: Files, path: str) -> None:
        """Read `path`; the first read opens it."""
        self._files = files
        self._path = path
        self._lock = threading.Lock()
        self._offset = 0
        self._descriptor: int | None = None
        self._closed = False

    def read(self) -> bytes:
        """Return the next chunk, empty at the end; raise FileNotFoundError if the file is absent."""
        with self._lock:
            if self._closed:
                return b""
            if self._descriptor is None:
                self._descriptor = self._files.open_to_read(self._path)
            data = self._files.read(self._descriptor, READ_BYTES, self._offset)
            self._offset += len(data)
            return data

    def close(self) -> None:
        with self._lock:
            self._closed = True
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is not None:
                self._files.close(descriptor)
