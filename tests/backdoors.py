"""Back doors to the media of backends, for the contract suite."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.layout import Layout

_LAYOUT = Layout(StorageConfig())
_OF_A_SNAPSHOT = re.compile(r"\.[0-9a-f-]{36}\.tmp/")


class Files:
    """The hooks of `BackendCase` for a folder of files, looked at with plain Python."""

    root: Path

    def peek(self, key: str) -> bytes | None:
        path = self.root / key
        return path.read_bytes() if path.is_file() else None

    def poke(self, key: str, data: bytes) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def peek_keys(self) -> list[str]:
        found = []
        for folder, _, names in os.walk(self.root):  # which bears with folders that vanish meanwhile
            found += [Path(folder, name).relative_to(self.root).as_posix() for name in names]
        return sorted(path for path in found if not _LAYOUT.is_own(path) and not _OF_A_SNAPSHOT.match(path))

    def is_untouched(self) -> bool:
        return not self.root.exists()

    def hinder(self) -> bool:
        self.root.joinpath("system/journal").mkdir(exist_ok=True)
        (self.root / "system/journal/00000001.jsonl").write_text("no journal\n")
        return True

    def break_folder(self, folder: str) -> bool:
        path = self.root / folder
        path.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(path.name, path)  # leads to itself, and is an error even for root
        return True


def records_of(data: bytes) -> list[dict[str, Any]] | None:
    """Return the messages of a log that has nothing else in it."""
    try:
        records = [json.loads(line) for line in data.splitlines()]
        whole = data.endswith(b"\n") and all(
            isinstance(record["id"], str) and record["id"] and record["role"] for record in records
        )
        return records if whole and len({record["id"] for record in records}) == len(records) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
