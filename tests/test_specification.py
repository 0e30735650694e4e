"""The specification's contract: its code blocks, copied word for word, against the package.

Its usage examples run as they stand; only their surroundings are prepared. Its class and function definitions are
executed and compared with ours: names, order of parameters, defaults, types. We may have more, never less.
"""

import asyncio
import dataclasses
import inspect
import json
import os
import re
import textwrap
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Union  # noqa: UP035 - as the specification writes them

import pytest

import flatfile_chat_database as package
from flatfile_chat_database import StorageConfig, StorageManager, load_config

from .conftest import problems

# --- the specification -----------------------------------------------------------------------------------

# 4.1
MODELS = r'''
@dataclass
class Message:
    """Individual chat message"""
    id: str                     # Unique message ID
    role: str                   # "user", "assistant", or persona_id
    content: str                # Message content
    timestamp: str              # ISO format timestamp
    attachments: List[str]      # File references
    metadata: Dict[str, Any]    # Additional data

@dataclass
class Session:
    """Chat session metadata"""
    id: str                     # Session ID (format: chat_session_YYYYMMDD_HHMMSS)
    user_id: str                # Owner of the session
    title: str                  # Human-readable title
    created_at: str             # ISO format timestamp
    updated_at: str             # ISO format timestamp
    metadata: Dict[str, Any]    # Session configuration

@dataclass
class Panel:
    """Multi-persona panel session"""
    id: str                     # Panel ID (format: panel_YYYYMMDD_HHMMSS)
    type: str                   # "multi_persona", "focus_group", etc.
    personas: List[str]         # Active persona IDs
    created_at: str             # ISO format timestamp
    config: Dict[str, Any]      # Panel configuration

@dataclass
class SituationalContext:
    """Conversation context snapshot"""
    summary: str                # Context summary
    key_points: List[str]       # Important points
    entities: Dict[str, List[str]]  # Extracted entities
    timestamp: str              # When context was captured
    confidence: float           # Context confidence score

@dataclass
class Document:
    """Document metadata"""
    filename: str               # Original filename
    path: str                   # Storage path
    mime_type: str              # Content type
    size: int                   # File size in bytes
    uploaded_at: str            # Upload timestamp
    analysis: Dict[str, Any]    # Analysis results
'''

# 6.2
CONFIG = r'''
@dataclass
class StorageConfig:
    """Main configuration for storage system"""

    # Storage locations
    storage_base_path: str = "./data"
    user_data_directory_name: str = "users"  # Not just "users" - be specific
    panel_sessions_directory_name: str = "panel_sessions"
    global_personas_directory_name: str = "personas_global"
    system_config_directory_name: str = "system"

    # File naming patterns
    session_id_prefix: str = "chat_session"
    panel_id_prefix: str = "panel"
    session_timestamp_format: str = "%Y%m%d_%H%M%S"
    context_snapshot_timestamp_format: str = "%Y%m%d_%H%M%S"

    # File names
    user_profile_filename: str = "profile.json"
    session_metadata_filename: str = "session.json"
    messages_filename: str = "messages.jsonl"
    situational_context_filename: str = "situational_context.json"
    document_metadata_filename: str = "metadata.json"

    # Storage limits
    max_message_size_bytes: int = 1_048_576  # 1MB
    max_document_size_bytes: int = 104_857_600  # 100MB
    max_messages_per_session: int = 100_000
    max_sessions_per_user: int = 1_000
    max_context_history_snapshots: int = 100

    # Performance settings
    message_pagination_default_limit: int = 100
    session_list_default_limit: int = 50
    search_results_default_limit: int = 20
    jsonl_read_buffer_size: int = 8192

    # Behavior settings
    atomic_write_temp_suffix: str = ".tmp"
    backup_before_delete: bool = True
    auto_cleanup_empty_directories: bool = True
    validate_json_on_read: bool = True

    # Search configuration
    search_include_message_content: bool = True
    search_include_context: bool = True
    search_include_metadata: bool = False
    full_text_search_min_word_length: int = 3

    # Panel configuration
    panel_max_personas: int = 10
    panel_insight_retention_days: int = 90
    panel_message_threading_enabled: bool = True

    # Document handling
    allowed_document_extensions: List[str] = field(default_factory=lambda: [
        ".pdf", ".txt", ".md", ".json", ".csv", ".png", ".jpg", ".jpeg"
    ])
    document_storage_subdirectory_name: str = "documents"
    document_analysis_subdirectory_name: str = "analysis"

    # Context management
    context_history_subdirectory_name: str = "context_history"
    context_summary_max_length: int = 500
    context_key_points_max_count: int = 10
    context_confidence_threshold: float = 0.7

@dataclass
class DevelopmentConfig(StorageConfig):
    """Development environment overrides"""
    storage_base_path: str = "./dev_data"
    validate_json_on_read: bool = True
    backup_before_delete: bool = True

@dataclass
class ProductionConfig(StorageConfig):
    """Production environment overrides"""
    storage_base_path: str = "/var/lib/chatdb/data"
    validate_json_on_read: bool = False  # Performance
    message_pagination_default_limit: int = 50
    search_results_default_limit: int = 10
'''

# 6.3
LOAD_CONFIG = r'''
def load_config(config_path: str = None, environment: str = None) -> StorageConfig:
    """Load configuration from file and environment"""

    # Default config
    config = StorageConfig()

    # Load from JSON file if provided
    if config_path and Path(config_path).exists():
        with open(config_path) as f:
            config_dict = json.load(f)
            config = StorageConfig(**config_dict)

    # Apply environment-specific overrides
    if environment == "development":
        config = DevelopmentConfig()
    elif environment == "production":
        config = ProductionConfig()

    # Allow environment variables to override
    for field in dataclasses.fields(config):
        env_var = f"CHATDB_{field.name.upper()}"
        if env_var in os.environ:
            setattr(config, field.name, os.environ[env_var])

    return config
'''

# 6.4
USAGE = r"""
# Load configuration
config = load_config(
    config_path="./config/storage.json",
    environment=os.getenv("ENVIRONMENT", "development")
)

# Initialize storage with config
storage = StorageManager(config=config)

# Access configuration values
max_size = config.max_document_size_bytes
session_prefix = config.session_id_prefix
"""

# 7.1
MANAGER = r'''
class StorageManager:
    """Main API interface for all storage operations"""

    def __init__(self, config: StorageConfig = None):
        """Initialize storage with configuration"""
        self.config = config or StorageConfig()
        self.base_path = Path(self.config.storage_base_path)

    # === User Management ===
    async def create_user(self, user_id: str, profile: Dict = None) -> bool:
        """Create new user with optional profile"""

    async def get_user_profile(self, user_id: str) -> Optional[Dict]:
        """Retrieve user profile"""

    async def update_user_profile(self, user_id: str, updates: Dict) -> bool:
        """Update user profile"""

    # === Session Management ===
    async def create_session(self, user_id: str, title: str = None) -> str:
        """Create new chat session, returns session_id"""

    async def get_session(self, user_id: str, session_id: str) -> Optional[Session]:
        """Get session metadata"""

    async def update_session(self, user_id: str, session_id: str, updates: Dict) -> bool:
        """Update session metadata"""

    async def list_sessions(self, user_id: str, limit: int = None, offset: int = 0) -> List[Session]:
        """List user's sessions with pagination"""

    async def delete_session(self, user_id: str, session_id: str) -> bool:
        """Delete session and all associated data"""

    # === Message Management ===
    async def add_message(self, user_id: str, session_id: str, message: Message) -> bool:
        """Add message to session"""

    async def get_messages(self, user_id: str, session_id: str,
                          limit: int = None, offset: int = 0) -> List[Message]:
        """Get messages with pagination"""

    async def search_messages(self, user_id: str, query: str,
                            session_id: str = None) -> List[Message]:
        """Search messages across sessions"""

    # === Document Management ===
    async def save_document(self, user_id: str, session_id: str,
                          filename: str, content: bytes,
                          metadata: Dict = None) -> str:
        """Save document and return storage path"""

    async def get_document(self, user_id: str, session_id: str,
                         filename: str) -> Optional[bytes]:
        """Retrieve document content"""

    async def list_documents(self, user_id: str, session_id: str) -> List[Document]:
        """List all documents in session"""

    async def update_document_analysis(self, user_id: str, session_id: str,
                                     filename: str, analysis: Dict) -> bool:
        """Store document analysis results"""

    # === Context Management ===
    async def update_context(self, user_id: str, session_id: str,
                           context: SituationalContext) -> bool:
        """Update current situational context"""

    async def get_context(self, user_id: str, session_id: str) -> Optional[SituationalContext]:
        """Get current context"""

    async def save_context_snapshot(self, user_id: str, session_id: str,
                                  context: SituationalContext) -> bool:
        """Save context to history"""

    async def get_context_history(self, user_id: str, session_id: str,
                                limit: int = None) -> List[SituationalContext]:
        """Get context evolution history"""

    # === Panel Management ===
    async def create_panel(self, panel_type: str, personas: List[str],
                         config: Dict = None) -> str:
        """Create multi-persona panel session"""

    async def add_panel_message(self, panel_id: str, message: Message) -> bool:
        """Add message to panel"""

    async def get_panel_messages(self, panel_id: str,
                               limit: int = None) -> List[Message]:
        """Get panel conversation"""

    async def save_panel_insight(self, panel_id: str, insight: Dict) -> bool:
        """Save panel analysis or conclusion"""

    # === Persona Management ===
    async def save_persona(self, persona_id: str, data: Dict,
                         user_id: str = None) -> bool:
        """Save global or user persona"""

    async def get_persona(self, persona_id: str,
                        user_id: str = None) -> Optional[Dict]:
        """Get persona definition"""

    async def list_personas(self, user_id: str = None) -> List[Dict]:
        """List available personas"""
'''

# 7.2
BACKEND = r'''
class StorageBackend(ABC):
    """Abstract backend interface for storage operations"""

    def __init__(self, config: StorageConfig):
        self.config = config

    @abstractmethod
    async def read(self, key: str) -> Optional[bytes]:
        """Read data by key"""

    @abstractmethod
    async def write(self, key: str, data: bytes) -> bool:
        """Write data with key"""

    @abstractmethod
    async def append(self, key: str, data: bytes) -> bool:
        """Append data to existing key"""

    @abstractmethod
    async def delete(self, key: str) -> bool:
        """Delete data by key"""

    @abstractmethod
    async def exists(self, key: str) -> bool:
        """Check if key exists"""

    @abstractmethod
    async def list_keys(self, prefix: str) -> List[str]:
        """List all keys with prefix"""
'''

# 8.4 Error Handling
ERRORS = r"""
class StorageError(Exception): pass
class NotFoundError(StorageError): pass
class ValidationError(StorageError): pass
class IntegrityError(StorageError): pass
class ConfigurationError(StorageError): pass
class StorageLimitExceeded(StorageError): pass
"""

# 9.1
CHAT = r"""
# Initialize storage with configuration
config = StorageConfig(
    storage_base_path="/var/myapp/data",
    max_messages_per_session=50000,
    message_pagination_default_limit=200
)
storage = StorageManager(config=config)

# Create user and session
await storage.create_user("john_doe")
session_id = await storage.create_session("john_doe", "Python Help")

# Chat interaction
user_msg = Message(role="user", content="How do I read a file in Python?")
await storage.add_message("john_doe", session_id, user_msg)

assistant_msg = Message(role="assistant", content="You can use the open() function...")
await storage.add_message("john_doe", session_id, assistant_msg)
"""

# "8.2" of section 9
DOCUMENT = r"""
# Upload document
doc_path = await storage.save_document(
    "john_doe", session_id, "report.pdf", pdf_bytes
)

# Store analysis
await storage.update_document_analysis(
    "john_doe", session_id, "report.pdf",
    {"summary": "Quarterly report", "sentiment": "positive"}
)
"""

# "8.3" of section 9
PANEL = r"""
# Create panel
panel_id = await storage.create_panel(
    "analysis_team",
    ["analyst_ai", "critic_ai", "summarizer_ai"]
)

# Panel discussion
msg = Message(role="analyst_ai", content="Based on the data...")
await storage.add_panel_message(panel_id, msg)
"""

# "8.4" of section 9
CONTEXT = r"""
# Update context
context = SituationalContext(
    summary="Discussing Python file operations",
    key_points=["User is beginner", "Needs simple examples"],
    entities={"topics": ["file I/O", "Python"], "level": ["beginner"]}
)
await storage.update_context("john_doe", session_id, context)
"""

# 9.2
EXPORT = r'''
async def export_all_data(self) -> Dict:
    """Export all data in database-ready format"""
    return {
        "users": [...],
        "sessions": [...],
        "messages": [...],
        "documents": [...],
        "personas": [...]
    }
'''


# --- definitions -----------------------------------------------------------------------------------------


def define(code: str) -> dict[str, Any]:
    """Execute definitions of the specification and return what they define."""
    ours = {name: getattr(package, name) for name in package.__all__}
    words = {
        "ABC": ABC,
        "Any": Any,
        "Dict": Dict,  # noqa: UP006
        "List": List,  # noqa: UP006
        "Optional": Optional,
        "Path": Path,
        "abstractmethod": abstractmethod,
        "dataclass": dataclass,
        "field": field,
    }
    names = ours | words
    exec(code, names)
    return {name: value for name, value in names.items() if name != "__builtins__" and value is not ours.get(name)}


def classes(code: str) -> dict[str, type[Any]]:
    return {name: value for name, value in define(code).items() if inspect.isclass(value) and value is not ABC}


def same_type(theirs: Any, ours: Any) -> bool:
    """Tell whether two annotations mean the same; what the specification leaves open (`Dict`) may be anything."""
    kind, other = typing.get_origin(theirs) or theirs, typing.get_origin(ours) or ours
    if kind in (Union, types.UnionType):
        arms, others = typing.get_args(theirs), typing.get_args(ours)
        return len(arms) == len(others) and all(any(same_type(arm, one) for one in others) for arm in arms)
    if kind is not other:
        return False
    arguments = typing.get_args(theirs)
    return not arguments or all(map(same_type, arguments, typing.get_args(ours)))


def same_call(theirs: Callable[..., Any], ours: Callable[..., Any]) -> None:
    """Check that whoever calls `theirs` can call `ours` in just the same way."""
    assert inspect.iscoroutinefunction(ours) == inspect.iscoroutinefunction(theirs)
    wanted = list(inspect.signature(theirs).parameters.values())
    found = list(inspect.signature(ours).parameters.values())
    for one, other in zip(wanted, found, strict=False):
        assert (other.name, other.kind, other.default) == (one.name, one.kind, one.default)
    assert len(found) >= len(wanted)
    for more in found[len(wanted) :]:
        assert more.default is not more.empty or more.kind is more.VAR_KEYWORD, f"{more} must be optional"
    result = typing.get_type_hints(theirs).get("return")
    if result is not None:
        assert same_type(result, typing.get_type_hints(ours)["return"])


MODEL_CLASSES, CONFIG_CLASSES, ERROR_CLASSES = (
    {name: kind for name, kind in classes(code).items() if kind.__module__ == "builtins"}
    for code in (MODELS, CONFIG, ERRORS)
)
METHODS = {
    (kind.__name__, name): method
    for code in (MANAGER, BACKEND)
    for kind in classes(code).values()
    if kind.__name__ in ("StorageManager", "StorageBackend")
    for name, method in vars(kind).items()
    if inspect.isfunction(method)
}


def test_the_copied_blocks_define_what_the_specification_counts() -> None:
    assert len(MODEL_CLASSES) == 5
    assert len(CONFIG_CLASSES) == 3
    assert len(ERROR_CLASSES) == 6
    assert len(METHODS) == 27 + 7  # __init__ counts


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_a_model_has_the_fields_in_their_order_and_types(name: str) -> None:
    theirs, ours = MODEL_CLASSES[name], getattr(package, name)
    wanted = [item.name for item in dataclasses.fields(theirs)]
    found = [item.name for item in dataclasses.fields(ours)]
    assert found[: len(wanted)] == wanted
    hints = typing.get_type_hints(ours)
    for field_name, kind in typing.get_type_hints(theirs).items():
        assert same_type(kind, hints[field_name]), field_name


@pytest.mark.parametrize("name", CONFIG_CLASSES)
def test_a_configuration_has_the_fields_with_their_defaults_and_types(name: str) -> None:
    theirs, ours = CONFIG_CLASSES[name], getattr(package, name)
    assert issubclass(ours, StorageConfig)
    wanted = [item.name for item in dataclasses.fields(theirs)]
    assert [item.name for item in dataclasses.fields(ours) if item.name in wanted] == wanted
    hints = typing.get_type_hints(ours)
    for field_name, kind in typing.get_type_hints(theirs).items():
        assert same_type(kind, hints[field_name]), field_name
        assert getattr(ours(), field_name) == getattr(theirs(), field_name), field_name


@pytest.mark.parametrize("name", ERROR_CLASSES)
def test_an_error_has_the_base_of_the_specification(name: str) -> None:
    base = ERROR_CLASSES[name].__bases__[0].__name__
    assert issubclass(getattr(package, name), getattr(package, base, Exception))


@pytest.mark.parametrize(("kind", "name"), METHODS, ids=".".join)
def test_a_method_can_be_called_as_the_specification_writes_it(kind: str, name: str) -> None:
    same_call(METHODS[kind, name], getattr(getattr(package, kind), name))


def test_the_backend_has_six_abstract_methods() -> None:
    assert package.StorageBackend.__abstractmethods__ == define(BACKEND)["StorageBackend"].__abstractmethods__
    assert len(package.StorageBackend.__abstractmethods__) == 6


def test_load_config_can_be_called_as_the_specification_writes_it() -> None:
    same_call(define(LOAD_CONFIG)["load_config"], load_config)


def test_export_all_data_can_be_called_as_the_specification_writes_it() -> None:
    same_call(define(EXPORT)["export_all_data"], StorageManager.export_all_data)


# --- examples --------------------------------------------------------------------------------------------


async def run(code: str, /, **names: Any) -> dict[str, Any]:
    """Run an example as the body of a coroutine; return its variables."""
    body = textwrap.indent(code, "    ")
    exec(f"async def example():\n{body}\n    return dict(locals())", names)
    names |= await names["example"]()
    return names


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take the settings out of the environment."""
    for name in list(os.environ):
        if name == "ENVIRONMENT" or name.startswith("CHATDB_"):
            monkeypatch.delenv(name)
    yield


async def test_the_usage_examples_run_one_after_the_other(backend_name: str, store_path: Path) -> None:
    # The only thing that is not the specification's is where the store is.
    elsewhere: dict[str, Any] = {"storage_url": "memory:"}
    if backend_name != "memory":
        elsewhere = {"storage_url": f"file:{store_path}"}
    names = {name: getattr(package, name) for name in package.__all__}
    names["StorageConfig"] = partial(StorageConfig, **elsewhere)

    names = await run(CHAT, **names)
    storage, session_id = names["storage"], names["session_id"]
    try:
        assert isinstance(storage, StorageManager)
        assert storage.config.storage_base_path == "/var/myapp/data"
        assert storage.config.max_messages_per_session == 50000
        assert re.fullmatch(r"chat_session_\d{8}_\d{6}", session_id)
        assert await storage.get_messages("john_doe", session_id) == [names["user_msg"], names["assistant_msg"]]
        session = await storage.get_session("john_doe", session_id)
        assert session is not None and session.title == "Python Help"

        names = await run(DOCUMENT, **names, pdf_bytes=b"%PDF-1.7 a report")
        assert await storage.get_document("john_doe", session_id, "report.pdf") == b"%PDF-1.7 a report"
        (document,) = await storage.list_documents("john_doe", session_id)
        assert document.path == names["doc_path"]
        assert document.analysis == {"summary": "Quarterly report", "sentiment": "positive"}

        names = await run(PANEL, **names)
        assert re.fullmatch(r"panel_\d{8}_\d{6}", names["panel_id"])
        assert await storage.get_panel_messages(names["panel_id"]) == [names["msg"]]
        panel = await storage.get_panel(names["panel_id"])
        assert panel is not None and panel.personas == ["analyst_ai", "critic_ai", "summarizer_ai"]

        names = await run(CONTEXT, **names)
        assert await storage.get_context("john_doe", session_id) == names["context"]

        exported = await storage.export_all_data()
        (lists,) = re.findall(r"return (\{.*?\})", EXPORT, re.DOTALL)
        assert list(exported) == re.findall(r'"(\w+)"', lists)
        assert json.loads(json.dumps(exported)) == exported
        assert await problems(storage.backend) == []
    finally:
        await storage.close()
    assert not Path("/var/myapp").exists()


def configure() -> dict[str, Any]:
    """Run the example of configuration, which stands outside of any coroutine, and return its variables."""
    names = {"load_config": load_config, "os": os, "StorageManager": StorageManager}
    exec(USAGE, names)
    return names


@pytest.mark.usefixtures("no_settings")
def test_the_configuration_example_runs(backend_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config").mkdir()
    settings = {"max_document_size_bytes": 1000, "storage_url": "memory:" if backend_name == "memory" else ""}
    Path("config/storage.json").write_text(json.dumps(settings))
    names = configure()
    assert isinstance(names["config"], package.DevelopmentConfig)
    assert names["max_size"] == 1000
    assert names["session_prefix"] == "chat_session"

    async def use(storage: StorageManager) -> None:
        async with storage:
            assert storage.base_path == Path("dev_data")
            assert await storage.create_user("ada") is True

    asyncio.run(use(names["storage"]))
    assert Path("dev_data").exists() == (backend_name != "memory")


@pytest.mark.usefixtures("no_settings")
def test_the_environment_of_the_configuration_example_can_be_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENVIRONMENT", "production")
    Path("config").mkdir()
    Path("config/storage.json").write_text('{"session_id_prefix": "talk", "storage_url": "memory:"}')
    names = configure()
    assert isinstance(names["config"], package.ProductionConfig)
    assert names["config"].message_pagination_default_limit == 50
    assert names["session_prefix"] == "talk"


def test_generate_session_id_has_the_format_of_the_specification() -> None:
    storage = StorageManager(StorageConfig(storage_url="memory:"))
    assert re.fullmatch(r"chat_session_\d{8}_\d{6}", storage.generate_session_id())
