"""Where a store is, as a text: paths that stay what they mean, and URLs without what must not be shown."""

from __future__ import annotations

import os
import re

from .errors import ConfigurationError

_CREDENTIALS = re.compile(r"(://[^/?#@:]*):.*@", re.DOTALL)
_LONE_CREDENTIAL = re.compile(r"^((?:redis|rediss|unix)://)[^/?#@:]+@")
_OF_CACHES = re.compile(r"(?:redis|rediss|unix):")
_NAMED = ("from", "to", "store", "cache")
_PARAMETER = re.compile(r"([?&][^=&]*)=([^&]*)")
_SECRET = re.compile(r"(?i)pass|secret|token|^[^=]*%|@|%40")


def at_home(name: str, path: str) -> str:
    """Return a path with the home folder in place of a leading `~` or `~user`.

    Raises:
        ConfigurationError: There is no such user; the message names the field `name`.
    """
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.partition("/")[0]
        raise ConfigurationError(
            f"{name} begins with {user[:80]!r}, and there is no home folder of such a user.",
            hint="Begin with './' for a folder of that name.",
        )
    return expanded


def without_password(url: str) -> str:
    """Return a URL as it may be shown: stars in the place of passwords, and of what may be one.

    What is between the first colon behind `//` and the last `@` is taken for one, for a password that is not
    percent-encoded may hold any character; so are the values of parameters that have such a name or an `@`. In the URL
    of a cache a name alone before the `@` may be one, and any parameter but the database. The URLs that a `mirrored:`
    or a `cached:` URL names are shown in the same way, and nothing else that is in it, for it may be half of one.
    """
    scheme, colon, rest = url.partition(":")
    if colon and scheme in ("mirrored", "cached"):
        from urllib.parse import quote, unquote_plus  # half of what it imports is of no use to a store

        def shown(found: re.Match[str]) -> str:
            if found[1][1:] not in _NAMED:
                return f"{found[1]}=***"
            text = unquote_plus(found[2])
            while ":" not in text and (more := unquote_plus(text)) != text:  # it was encoded twice
                text = more
            return f"{found[1]}={quote(without_password(text), safe='*')}"

        return _CREDENTIALS.sub(r"\1:***@", f"{scheme}:{_PARAMETER.sub(shown, rest)}")
    url = _LONE_CREDENTIAL.sub(r"\1***@", _CREDENTIALS.sub(r"\1:***@", url))
    is_cache = _OF_CACHES.match(url)

    def is_secret(found: re.Match[str]) -> bool:
        return bool(_SECRET.search(found[0])) or (is_cache is not None and found[1][1:] != "db")

    return _PARAMETER.sub(lambda found: f"{found[1]}=***" if is_secret(found) else found[0], url)


def absolute(path: str) -> str:
    """Return a path that means the same after the working directory has changed; nothing on the medium is asked."""
    return os.path.normpath(path if os.path.isabs(path) else os.path.join(os.getcwd(), path))
