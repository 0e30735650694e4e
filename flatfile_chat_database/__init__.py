"""Flatfile Chat Database: durable chat history in plain JSON and JSONL files.

Inside a coroutine:

    from flatfile_chat_database import Message, StorageManager

    async with StorageManager() as storage:
        await storage.create_user("ada")
        session_id = await storage.create_session("ada", "First chat")
        await storage.add_message("ada", session_id, Message("user", "Hello"))
"""

from .backends.base import StorageBackend
from .config import DevelopmentConfig, ProductionConfig, StorageConfig, load_config
from .errors import (
    ClosedError,
    ConfigurationError,
    ConflictError,
    DurabilityError,
    IntegrityError,
    NotFoundError,
    StorageError,
    StorageLimitExceeded,
    UnavailableError,
    ValidationError,
)
from .models import (
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
from .storage import StorageManager

__all__ = [
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
    "load_config",
]
