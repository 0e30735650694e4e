"""Flatfile Chat Database: durable chat history in plain JSON and JSONL files.

Inside a coroutine:

    from flatfile_chat_database import Message, StorageManager

    async with StorageManager() as storage:
        await storage.create_user("ada")
        session_id = await storage.create_session("ada", "First chat")
        await storage.add_message("ada", session_id, Message("user", "Hello"))
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from .backends.base import StorageBackend
    from .config import DevelopmentConfig, ProductionConfig, StorageConfig, load_config
    from .errors import (
        ClosedError,
        ConfigurationError,
        ConflictError,
        DurabilityError,
        IntegrityError,
        NotFoundError,
        PlaceLostError,
        StorageError,
        StorageLimitExceeded,
        UnavailableError,
        ValidationError,
    )
    from .models import (
        BEGINNING,
        Arrival,
        Document,
        Message,
        MessagePage,
        Panel,
        Problem,
        PruneReport,
        PurgeReceipt,
        SearchHit,
        Session,
        SituationalContext,
        TrashEntry,
        User,
    )
    from .records.watching import Watch
    from .storage import StorageManager

__all__ = [
    "BEGINNING",
    "Arrival",
    "ClosedError",
    "ConfigurationError",
    "ConflictError",
    "DevelopmentConfig",
    "Document",
    "DurabilityError",
    "IntegrityError",
    "Message",
    "MessagePage",
    "NotFoundError",
    "Panel",
    "PlaceLostError",
    "Problem",
    "ProductionConfig",
    "PruneReport",
    "PurgeReceipt",
    "SearchHit",
    "Session",
    "SituationalContext",
    "StorageBackend",
    "StorageConfig",
    "StorageError",
    "StorageLimitExceeded",
    "StorageManager",
    "TrashEntry",
    "UnavailableError",
    "User",
    "ValidationError",
    "Watch",
    "load_config",
]

# Loaded when a name is first asked for: so whoever stops a command while it begins is not shown where it was.
_MODULES = {
    "backends.base": ("StorageBackend",),
    "config": ("DevelopmentConfig", "ProductionConfig", "StorageConfig", "load_config"),
    "errors": (
        "ClosedError",
        "ConfigurationError",
        "ConflictError",
        "DurabilityError",
        "IntegrityError",
        "NotFoundError",
        "PlaceLostError",
        "StorageError",
        "StorageLimitExceeded",
        "UnavailableError",
        "ValidationError",
    ),
    "records.watching": ("Watch",),
    "storage": ("StorageManager",),
}
"""Where public names are; all others are in `models`."""


def __getattr__(name: str) -> typing.Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = next((module for module, names in _MODULES.items() if name in names), "models")
    value = globals()[name] = getattr(importlib.import_module(f".{module}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
