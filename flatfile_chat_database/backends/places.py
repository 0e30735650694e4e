"""Whether two stores, of which one is to become as the other, have places of their own, and what each says it is."""

from __future__ import annotations

import os

from .. import codec
from ..errors import ConfigurationError, IntegrityError
from .base import StorageBackend


def refuse_nested(one: StorageBackend, other: StorageBackend, names: tuple[str, str]) -> None:
    """Refuse two stores of which one has the place of the other, or a place in its folder; blocks.

    Only places in the file system are looked at: of two servers nobody can tell by their names.

    Args:
        names: What errors call the two.

    Raises:
        ConfigurationError: They have not.
    """
    places = [getattr(each, "root", None) or getattr(each, "path", None) for each in (one, other)]
    paths = [os.path.realpath(place) for place in places if isinstance(place, str)]
    if len(paths) < 2:
        return
    if paths[0] == paths[1]:
        raise same_store(names)
    for inner, outer in ((1, 0), (0, 1)):
        if paths[inner].startswith(f"{paths[outer]}{os.sep}"):
            raise ConfigurationError(
                f"The {names[inner]} lies in the {names[outer]}'s folder, {paths[outer]}.",
                hint="Name a place beside it.",
            )


def same_store(names: tuple[str, str]) -> ConfigurationError:
    """Return the error for two stores that are one."""
    return ConfigurationError(f"The {names[0]} and the {names[1]} are the same store.", hint="Name another place.")


def store_id(document: bytes | None) -> str:
    """Return the id of the store that a document speaks of; "" if it is absent or damaged."""
    try:
        return "" if document is None else str(codec.decode_object(document).get("store_id", ""))
    except IntegrityError:
        return ""


def is_copy(one: bytes | None, other: bytes | None) -> bool:
    """Tell whether the own files of two stores, None if absent, are of one store and its copy."""
    return one is not None and (one == other or store_id(one) == store_id(other) != "")
