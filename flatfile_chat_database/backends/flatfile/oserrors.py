"""What the system's errors mean to a caller."""

from __future__ import annotations

import errno

from ...errors import UnavailableError

_HINTS = {
    errno.ENOSPC: "Free some space; nothing that was acknowledged is lost.",
    errno.EDQUOT: "Free some space or raise the quota; nothing that was acknowledged is lost.",
    errno.EROFS: "The file system is read-only.",
    errno.EACCES: "Give this user access to the store's folder.",
    errno.EPERM: "Give this user access to the store's folder.",
    errno.ENOTDIR: "A file stands where a folder should be.",
    errno.EISDIR: "A folder stands where a file should be.",
    errno.ELOOP: "Symbolic links in a store are not followed.",
    errno.EMFILE: "Raise the limit of open files, or lower max_open_files.",
    errno.ENFILE: "The system has too many open files.",
    errno.ENAMETOOLONG: "Use shorter names, or a store closer to the root of the file system.",
}


class mapped:
    """Turn OSError into UnavailableError that names `key`, keeping the cause."""

    __slots__ = ("_key",)

    def __init__(self, key: str | None = None) -> None:
        self._key = key

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, OSError):
            raise unavailable(error, self._key) from error


def told(error: Exception, key: str | None) -> Exception:
    """Return what a caller is told of an error: a system's as UnavailableError, any other as it is."""
    return unavailable(error, key) if isinstance(error, OSError) else error


def unavailable(error: OSError, key: str | None) -> UnavailableError:
    """Return what a system's error means to a caller."""
    place = key or (error.filename if isinstance(error.filename, str) else "")
    text = f"{error.strerror or error}."
    return UnavailableError(f"{place}: {text}" if place else text, key=key, hint=_HINTS.get(error.errno or 0))
