"""The quarantine: bytes that are not understood, each item with a note of where they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import codec
from ..backends.base import StorageBackend
from ..backends.changes import Change, Move, Put
from ..backends.rules import quarantine_keys
from ..config import StorageConfig
from ..errors import IntegrityError
from ..layout import Layout


class Quarantine:
    """Makes the changes that set bytes aside, each with a note of where they were and why they are not there now."""

    def __init__(self, config: StorageConfig) -> None:
        self._config = config

    def copy(self, key: str, data: bytes, reason: str, **facts: Any) -> list[Change]:
        """Keep a copy of bytes that the same commit takes out of their place."""
        note, target = quarantine_keys(self._config)
        return [self._note(note, key, reason, facts), Put(target, data)]

    def move(self, key: str, reason: str, filename: str = "") -> list[Change]:
        """Move a file as it is, whatever its size; `filename` is that of the document that it belongs to."""
        note, target = quarantine_keys(self._config)
        return [self._note(note, key, reason, {"filename": filename} if filename else {}), Move(key, target)]

    async def items_from(self, backend: StorageBackend, is_meant: Callable[[str, str], bool]) -> list[str]:
        """Return the keys of the items, notes among them, that are meant.

        `is_meant` is asked with what a note says: the key that the bytes were at, and their document's filename or "".
        """
        layout = Layout(self._config)
        keys: dict[str, list[str]] = {}
        for item in await backend.list_children(layout.quarantine):
            key = layout.key("quarantine", item=item)
            keys.setdefault(key.rpartition(".")[0], []).append(key)
        found: list[str] = []
        for stem, own in keys.items():
            note = await backend.read(f"{stem}.json")
            if note is None:
                continue
            try:
                said = codec.decode_object(note)
            except IntegrityError:  # a note that cannot be read says nothing of where its bytes were
                continue
            if isinstance(said.get("key"), str) and is_meant(said["key"], str(said.get("filename", ""))):
                found += own
        return found

    @staticmethod
    def _note(note: str, key: str, reason: str, facts: dict[str, Any]) -> Put:
        return Put(note, codec.encode_document({"key": key, "reason": reason, **facts}))
