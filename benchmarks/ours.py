"""This package, measured through its public interface."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from flatfile_chat_database import Message, StorageConfig, StorageManager
from flatfile_chat_database.codec import encode_document, encode_message
from flatfile_chat_database.layout import Layout
from flatfile_chat_database.models import format_timestamp

from .corpus import ROLES
from .peers import Contestant

OURS = "Flatfile Chat Database"
OURS_NORMAL = "Flatfile Chat Database, durability=normal"

USER = "benchmark"
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)

HAS_LEVELS = "durability" in {field.name for field in dataclasses.fields(StorageConfig)}
"""Whether the store can promise less than that what is acknowledged is durable."""


def configuration(folder: Path, durability: str = "full", url: str = "") -> StorageConfig:
    """Return the default settings, with room for as many messages and sessions as a scenario wants."""
    levels: dict[str, Any] = {"durability": durability} if HAS_LEVELS else {}
    return StorageConfig(
        storage_base_path=str(folder),
        storage_url=url,
        max_messages_per_session=100_000_000,
        max_sessions_per_user=1_000_000,
        **levels,
    )


def names(sessions: int) -> list[str]:
    """Return ids of sessions."""
    return [f"session-{number}" for number in range(sessions)]


class Ours(Contestant):
    """One StorageManager; each message by `add_message`."""

    def __init__(self, folder: Path, sessions: int, durability: str = "full", url: str = "") -> None:
        super().__init__(folder, sessions)
        self._level = durability
        self._names = names(sessions)
        self.storage = StorageManager(configuration(folder, durability, url))

    @property
    def durability(self) -> str:
        """Say what the level promises."""
        if self._level == "full":
            return "durability=full: each acknowledged message flushed"
        return f"durability={self._level}: flushed in the background, at most a second may be lost"

    async def create(self) -> None:
        """Make the sessions and their logs."""
        await create_sessions(self.storage, self._names)

    async def append(self, session: int, role: str, text: str) -> None:
        """Add one message."""
        await self.storage.add_message(USER, self._names[session], Message(role, text))

    async def count(self) -> int:
        """Read all messages."""
        count = 0
        for name in self._names:
            async for _ in self.storage.stream_messages(USER, name):
                count += 1
        return count - self.sessions  # without those that `create` made the logs with

    async def close(self) -> None:
        """Close the store."""
        await self.storage.close()


async def create_sessions(storage: StorageManager, sessions: Sequence[str]) -> None:
    """Make sessions with one message each, so that their logs are there."""
    await storage.create_user(USER)
    for name in sessions:
        await storage.create_session(USER, session_id=name)
        await storage.add_message(USER, name, Message("system", "made"))


async def create_logs(folder: Path, logs: dict[str, Iterable[str]]) -> dict[str, int]:
    """Make a store whose sessions hold these texts, the logs written directly; return how many bytes each has."""
    config = configuration(folder)
    async with StorageManager(config) as storage:
        await create_sessions(storage, list(logs))
    sizes = {}
    for name, texts in logs.items():
        path = folder / Layout(config).key("messages", user_id=USER, session_id=name)
        with path.open("wb") as file:
            file.writelines(lines(texts))
        sizes[name] = path.stat().st_size
    return sizes


def lines(texts: Iterable[str]) -> Iterator[bytes]:
    """Yield the line of a log for each text, a second apart."""
    for number, text in enumerate(texts):
        moment = BEGAN + timedelta(seconds=number)
        name = f"019b7700-0000-7000-8000-{number:012x}"  # as long as the ids that messages get by themselves
        yield encode_message(Message(ROLES[number % 2], text, id=name, timestamp=format_timestamp(moment)))


def create_many_sessions(folder: Path, config: StorageConfig, users: int, sessions: int, texts: Sequence[str]) -> None:
    """Write many users' sessions, each with the same messages, directly into a store that is closed."""
    layout = Layout(config)
    stamp = format_timestamp(BEGAN)
    dates = {"created_at": stamp, "updated_at": stamp}
    log = b"".join(lines(texts))

    def create(user: str) -> None:
        os.makedirs(folder / layout.parent("session", user_id=user))
        profile = encode_document({"user_id": user, **dates, "profile": {}})
        _write(f"{folder}/{layout.key('user', user_id=user)}", profile)
        for session in names(sessions):
            document = encode_document({"id": session, "user_id": user, "title": "", **dates, "metadata": {}})
            os.mkdir(f"{folder}/{layout.folder('session', user_id=user, session_id=session)}")
            _write(f"{folder}/{layout.key('session', user_id=user, session_id=session)}", document)
            _write(f"{folder}/{layout.key('messages', user_id=user, session_id=session)}", log)

    mask = os.umask(0o077)  # as private as the store makes them
    with ThreadPoolExecutor() as threads:
        for _ in threads.map(create, [f"user-{number}" for number in range(users)]):
            pass
    os.umask(mask)


def _write(path: str, content: bytes) -> None:
    with open(path, "wb", buffering=0) as file:
        file.write(content)


def peak_bytes() -> int:
    """Return the most memory that this process had since it began or since `forget_peak`."""
    # Not `getrusage`: its figure also counts the process that this one was forked from, whose peak may be higher.
    return _status("VmHWM")


def memory_bytes() -> int:
    """Return the memory that this process has now."""
    return _status("VmRSS")


def forget_peak() -> None:
    """Begin the measurement of the peak anew."""
    with suppress(PermissionError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {name}: memory cannot be measured on {os.uname().sysname}.")
