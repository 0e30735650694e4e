"""Looking at a file without asking for its times, which `os.stat` always does.

Since Linux 6.13, ext4, xfs, btrfs and tmpfs give a file whose times were asked for finer ones at its next change
(multigrain timestamps: filesystems/multigrain-ts.rst in the kernel's documentation). That is a change of the inode with
every write, not with every tick of the clock, and each flush has to wait until it is in the file system's own journal.

The call is statx(2), its structure that of linux/stat.h.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading

_AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW = 0x100
_STATX_INO = 0x100
_STATX_SIZE = 0x200
_BYTES = 256
_fields = struct.Struct("=32xQQ88xII").unpack_from
"""Inode, size, and the two numbers of the device."""

_ENCODING = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()


class _Answer(threading.local):
    """Where the system puts what it found, for each thread."""

    def __init__(self) -> None:
        self.data = bytearray(_BYTES)
        self.address = ctypes.addressof((ctypes.c_char * _BYTES).from_buffer(self.data))


class Statx:
    """The system call; one object serves any number of threads."""

    def __init__(self) -> None:
        """Find the call in the C library.

        Raises:
            AttributeError: This one has none.
        """
        self._call = ctypes.CDLL(None, use_errno=True).statx
        self._call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]
        self._answer = _Answer()

    def __call__(self, path: str) -> tuple[int, int, int]:
        """Return device, inode and size of a path itself, not of what a symbolic link points to."""
        answer = self._answer
        name = path.encode(*_ENCODING)
        if self._call(_AT_FDCWD, name, _AT_SYMLINK_NOFOLLOW, _STATX_INO | _STATX_SIZE, answer.address) != 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), path)
        inode, size, major, minor = _fields(answer.data)
        return os.makedev(major, minor), inode, size
