"""Which backend a configuration names."""

from __future__ import annotations

import dataclasses
import importlib
from typing import cast

from ..addresses import at_home
from ..config import StorageConfig
from ..errors import ConfigurationError
from .base import StorageBackend

_PAIRS = "mirrored:?from=URL&to=URL, cached:?store=URL&cache=URL"
"""How those are written that name two."""
_FORMS = {
    "file": "file:relative/path or file:/absolute/path",
    "sqlite": "sqlite:path/to/file or sqlite:/absolute/path",
    "postgresql": "postgresql://user@host/database",
    "s3": "s3://bucket/prefix",
    "memory": "memory:",
}
"""How URLs of each scheme are written."""


def open_backend(config: StorageConfig) -> StorageBackend:
    """Make the backend that the configuration names; do no I/O.

    `storage_url` is empty (files under `storage_base_path`), `file:relative`, `file:/absolute`, `file:~/in-home`, the
    same with `sqlite:` for a file of SQLite, or `memory:`; the path is percent-decoded, and a `?` in it must be `%3F`.
    Or it is a URL of PostgreSQL as its own tools take it, `postgresql://user@host/database`, or a bucket of an object
    store, `s3://bucket/prefix`. `mirrored:?from=URL&to=URL` is two stores at once, and `cached:?store=URL&cache=URL`
    one with a Redis or Valkey in front of it; the URLs in them are percent-encoded.

    Raises:
        ConfigurationError: The URL's scheme is unknown or its form is wrong, or an extra is missing.
    """
    from urllib.parse import unquote  # half of what it imports is of no use to a store

    scheme, colon, rest = config.storage_url.partition(":")
    if not config.storage_url:
        return _make("flatfile", "FlatfileBackend", config, config.storage_base_path)
    if scheme in ("file", "sqlite") and "?" in rest:
        # Never a part of the name: whoever writes `sqlite:chats.db?mode=ro` means something else by it.
        raise ConfigurationError(
            f"storage_url has parameters, of which {scheme}: takes none.",
            hint="Leave out what begins with the question mark; one that belongs to the path is %3F.",
        )
    path = unquote(rest)
    if path.startswith("///"):  # file:///absolute, as browsers write it
        path = path[2:]
    if colon and scheme in ("file", "sqlite") and path and not path.startswith("//") and "\0" not in path:
        module, name = ("flatfile", "FlatfileBackend") if scheme == "file" else ("sqlite", "SqliteBackend")
        return _make(module, name, config, at_home("storage_url", path))
    if colon and scheme == "memory" and not rest:
        return _make("memory", "MemoryBackend", config)
    if scheme in ("postgresql", "postgres") and rest.startswith("//"):
        return _make("postgres", "PostgresBackend", config)
    if scheme == "s3" and rest.startswith("//"):
        return _make("s3", "S3Backend", config)
    if colon and scheme == "mirrored":
        stores = [
            open_backend(dataclasses.replace(config, storage_url=url)) for url in _named(rest, "from", "to", "mirrored")
        ]
        return _make("mirrored", "MirroredBackend", config, *stores)
    if colon and scheme == "cached":
        url, cache = _named(rest, "store", "cache", "cached")
        store = open_backend(dataclasses.replace(config, storage_url=url))
        return _make("cached", "CachedBackend", config, store, cache)
    if colon and scheme in (*_FORMS, "postgres"):
        raise ConfigurationError(
            f"storage_url names no backend: {_wrong_form(scheme, path)}.",
            hint=f"Write {_FORMS.get(scheme, _FORMS['postgresql'])}.",
        )
    raise ConfigurationError(
        f"storage_url with the scheme {scheme[:20]!r} names no backend.",
        hint=f"Use {', '.join(_FORMS.values())}, or two of them: {_PAIRS}.",
    )


def _wrong_form(scheme: str, path: str) -> str:
    """Return what is wrong with a URL of a scheme that we know; what follows the scheme may be a password."""
    if scheme in ("postgresql", "postgres"):
        return "behind postgresql: stand two slashes"
    if scheme == "memory":
        return "behind memory: stands nothing"
    if path.startswith("//"):
        return f"behind two slashes stands a host, and {scheme} has none; a path begins right behind the colon"
    return f"behind {scheme}: stands a path, {'without a NUL character' if path else 'which is missing'}"


def _named(rest: str, one: str, other: str, scheme: str) -> tuple[str, str]:
    """Return the two URLs that a `mirrored:` or a `cached:` URL names."""
    from urllib.parse import parse_qs

    try:
        found = parse_qs(rest.removeprefix("?"), strict_parsing=True)
        [first], [second] = found.pop(one), found.pop(other)
    except (ValueError, KeyError):
        found, first, second = {"": []}, "", ""
    # A cache is in front of everything else, and a mirror in front of all but that.
    inner = ("cached:",) if scheme == "cached" else ("cached:", "mirrored:")
    if not found and first == second:
        raise ConfigurationError(
            f"storage_url with the scheme {scheme!r} names the same place twice.",
            hint=f"Give {one} and {other} one each.",
        )
    if found or any(url.startswith(inner) or ":" not in url for url in (first, second)):
        what = "a store and its cache" if scheme == "cached" else "two stores"
        raise ConfigurationError(
            f"storage_url with the scheme {scheme!r} names {what}.",
            hint=f"Use {scheme}:?{one}=URL&{other}=URL, both percent-encoded; a folder is file:path.",
        )
    return first, second


def _make(module: str, name: str, *arguments: object) -> StorageBackend:
    kind = getattr(importlib.import_module(f".{module}", __package__), name)
    return cast("StorageBackend", kind(*arguments))
