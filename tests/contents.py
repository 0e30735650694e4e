"""What a store holds, byte for byte, so that a test can say that nothing has changed."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from flatfile_chat_database import StorageManager
from flatfile_chat_database.layout import Layout


async def contents(storage: StorageManager) -> dict[str, bytes | None]:
    """Return all keys of a store with their bytes."""
    backend = storage.backend
    await backend.open()
    return {key: await backend.read(key) for key in await backend.list_keys("")}


@asynccontextmanager
async def unchanged(storage: StorageManager) -> AsyncIterator[None]:
    """Fail if the block changes, adds or removes a single byte of the store."""
    before = await contents(storage)
    yield
    assert await contents(storage) == before


def key_of(storage: StorageManager, entry: str, **names: str) -> str:
    """Return where something is stored."""
    return Layout(storage.config).key(entry, **names)


ILLEGAL_IDS = {
    "empty": "",
    "10,000 characters": "x" * 10_000,
    "too long once escaped": "é" * 60,
    "NUL": "a\0b",
    "newline": "a\nb",
    "lone surrogate": "a\ud800",
    "number": 7,
    "None": None,
    "bytes": b"ada",
}
"""What no user, session, panel or persona can be called."""

NOT_JSON = {
    "not a number": {"a": float("nan")},
    "infinity": {"a": [1.0, float("inf")]},
    "a set": {"a": {1, 2}},
    "bytes": {"a": b"x"},
    "a key that is a number": {"a": {1: "x"}},
    "a lone surrogate": {"a": "\udfff"},
    "a lone surrogate in a key": {"\ud800": 1},
    "a list instead of an object": ["a"],
    "text instead of an object": "a",
}
"""What is no JSON object."""


def nested(depth: int) -> dict[str, object]:
    """Return an object nested so deep."""
    value: dict[str, object] = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value
