"""All settings, in one flat dataclass that validates itself, and `load_config`, which gathers them.

The library never reads the environment by itself; `load_config` and the command line do.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import os
import re
import typing
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from .addresses import at_home
from .errors import ConfigurationError

T = TypeVar("T")

ENVIRONMENT_PREFIX = "CHATDB_"

MAX_MESSAGE_SIZE_BYTES = 16 * 1024 * 1024
"""No configuration can allow more, so that a reader knows which line of a log is too long to be a message."""

DURABILITIES = ("full", "normal", "os")

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,98}[A-Za-z0-9_-]|[A-Za-z0-9_]")
_PREFIX = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_STAMP = re.compile(r"[a-z0-9_-]{1,60}")
_SUFFIX = re.compile(r"\.[a-z0-9._-]{0,20}[a-z0-9]")
_EXTENSION = re.compile(r"\.[^./\\\s\x00-\x1f]{1,20}")
_NEAR = 0.65
"""From 0 to 1, how like a known name an unknown one must be to be taken for a slip of the pen."""
_LISTED = "docs/configuration.md lists all settings."
_WINDOWS_DEVICE = re.compile(r"(?i)(con|prn|aux|nul|conin|conout|com\d|lpt\d)(\..*)?")


def _checked(kind: type[T]) -> type[T]:
    """Have a dataclass of settings refuse a keyword that is no field, and check what is set later.

    Not written in the class itself: type checkers take a `__setattr__` there to mean that any name may be set.
    """
    construct = kind.__init__

    @functools.wraps(construct)
    def __init__(self: T, *args: Any, **values: Any) -> None:
        for name in values:
            _require_known(name, "setting")
        construct(self, *args, **values)

    cast("Any", kind).__init__ = __init__
    cast("Any", kind).__setattr__ = _set
    return kind


def _set(config: StorageConfig, name: str, value: Any) -> None:
    if config._complete:
        _require_known(name, "setting")
        value = _plain(name, value)
        _check_type(name, value, _field_types()[name])
        changed = copy.copy(config)
        object.__setattr__(changed, name, value)
        _check_values(changed)
    object.__setattr__(config, name, value)


@_checked
@dataclass
class StorageConfig:
    """Settings of a store. They are checked when the object is made, and each again when it is set later.

    A StorageManager takes them as they are when it is made; what is set afterwards may have no effect on it.

    Raises:
        ConfigurationError: There is no such setting, or a value has the wrong type or cannot work; the message names
            the field.
    """

    # --- Storage locations ---------------------------------------------------------------------------
    storage_base_path: str = "./data"
    """The store's folder, when `storage_url` is empty. A leading `~` or `~user` is the home folder."""
    user_data_directory_name: str = "users"
    """Folder of all users; empty puts users at the top of the store."""
    panel_sessions_directory_name: str = "panel_sessions"
    """Folder of all panels."""
    global_personas_directory_name: str = "personas_global"
    """Folder of the personas that all users share."""
    system_config_directory_name: str = "system"
    """Folder of the store's own files: format, lock, trash, quarantine, index."""

    # --- File naming patterns ------------------------------------------------------------------------
    session_id_prefix: str = "chat_session"
    """What generated session ids begin with."""
    panel_id_prefix: str = "panel"
    """What generated panel ids begin with."""
    session_timestamp_format: str = "%Y%m%d_%H%M%S"
    """`strftime` format of the UTC time in session and panel ids."""
    context_snapshot_timestamp_format: str = "%Y%m%d_%H%M%S"
    """`strftime` format of the UTC time in the names of context snapshots and insights; must sort by time."""

    # --- File names ----------------------------------------------------------------------------------
    user_profile_filename: str = "profile.json"
    """Of a user's profile."""
    session_metadata_filename: str = "session.json"
    """Of a session's title, times and metadata."""
    messages_filename: str = "messages.jsonl"
    """Of the log of a session or panel."""
    situational_context_filename: str = "situational_context.json"
    """Of a session's current context."""
    document_metadata_filename: str = "metadata.json"
    """Of what is known of a session's documents."""

    # --- Storage limits ------------------------------------------------------------------------------
    max_message_size_bytes: int = 1_048_576
    """Of one message as it stands in the log, in UTF-8; at most 16 MiB."""
    max_document_size_bytes: int = 104_857_600
    """Of the content as it is given."""
    max_messages_per_session: int = 100_000
    """Of a panel as well."""
    max_sessions_per_user: int = 1_000
    """What is in the trash does not count."""
    max_context_history_snapshots: int = 100
    """The newest this many are kept."""

    # --- Performance settings ------------------------------------------------------------------------
    message_pagination_default_limit: int = 100
    """How many messages a call returns that names no `limit`."""
    session_list_default_limit: int = 50
    """How many sessions, users or panels a list has that names no `limit`."""
    search_results_default_limit: int = 20
    """How many hits a search returns that names no `limit`."""
    jsonl_read_buffer_size: int = 8192
    """Bytes read at a time from a log."""
    max_open_files: int = 256
    """File descriptors that stay open between calls."""

    # --- Durability ----------------------------------------------------------------------------------
    durability: str = "full"
    """When a write returns: `full`, once it is on disk; `normal`, at once, and a power cut may take the last second;
    `os`, at once, and the system writes it to disk when it likes. At every level a process that dies takes nothing."""
    journal_max_bytes: int = 67_108_864
    """The journal is folded into the files when it has grown to this size, or the store is closed."""
    journal_max_age_seconds: float = 60.0
    """The journal of a store at rest is folded into the files after this time."""

    # --- Behavior settings ---------------------------------------------------------------------------
    atomic_write_temp_suffix: str = ".tmp"
    """What the names of unfinished files end in."""
    backup_before_delete: bool = True
    """Whether deleted things go to the trash, from which `undelete` brings them back."""
    auto_cleanup_empty_directories: bool = True
    """Whether a folder goes with the last thing in it."""
    validate_json_on_read: bool = True
    """Cross-check what is read: ids against the place, timestamps. Decoding itself is always strict."""

    # --- Search configuration ------------------------------------------------------------------------
    search_include_message_content: bool = True
    """Whether a search looks into what messages say."""
    search_include_context: bool = True
    """Whether a search that names no `kinds` finds contexts."""
    search_include_metadata: bool = False
    """Whether a search looks into the metadata of messages."""
    search_index_path: str = ""
    """Folder of the indexes, which may be deleted at any moment; empty means inside the store. Several stores may share
    one."""
    full_text_search_min_word_length: int = 3
    """Shorter words of a query are ignored when a longer one stands beside them."""

    # --- Panel configuration -------------------------------------------------------------------------
    panel_max_personas: int = 10
    """More are refused when a panel is made."""
    panel_insight_retention_days: int = 90
    """Older insights go when `prune` is called, never by themselves."""
    panel_message_threading_enabled: bool = True
    """Whether messages of panels may have a `parent_id`."""

    # --- Document handling ---------------------------------------------------------------------------
    allowed_document_extensions: list[str] = field(
        default_factory=lambda: [".pdf", ".txt", ".md", ".json", ".csv", ".png", ".jpg", ".jpeg"]
    )
    """Which files may be saved, by the end of the name, in any case."""
    document_storage_subdirectory_name: str = "documents"
    """Folder of a session's documents."""
    document_analysis_subdirectory_name: str = "analysis"
    """Folder of their analyses, in that of the documents."""
    document_compression_threshold_bytes: int = 0
    """Documents of at least this size are stored gzip-compressed; 0 compresses none."""

    # --- Context management --------------------------------------------------------------------------
    context_history_subdirectory_name: str = "context_history"
    """Folder of a session's earlier contexts."""
    context_summary_max_length: int = 500
    """In characters."""
    context_key_points_max_count: int = 10
    """A context with more key points is refused."""
    context_confidence_threshold: float = 0.7
    """A context below this does not replace the current one."""

    # --- Beyond the specification --------------------------------------------------------------------
    storage_url: str = field(default="", repr=False)  # may hold a password
    """Which backend and where, for instance `file:/srv/chats`, `sqlite:~/chats.db`, `postgresql://user@host/database`,
    `s3://bucket/prefix`, `memory:`, `mirrored:` with two of them, or `cached:` with one and a cache; empty means files
    under `storage_base_path`."""
    trash_retention_days: int = 30
    """Older trash goes when `prune` is called, never by itself."""
    lock_timeout_seconds: float = 30.0
    """How long a write waits for another process before it fails."""
    database_connect_timeout_seconds: float = 10.0
    """How long connecting to a database server may take, for each host of the URL; 0 sets no limit."""
    database_timeout_seconds: float = 60.0
    """How long one statement in a database server may take; 0 sets no limit."""
    database_pool_size: int = 16
    """Connections to a database server for readers, at most; streams hold one each, from the first item to the last."""
    database_partitions: int = 0
    """Of a new store in PostgreSQL: into how many partitions messages go, by a hash of their owner; 0 makes none."""
    object_store_connect_timeout_seconds: float = 5.0
    """How long connecting to an object store may take; 0 sets no limit."""
    object_store_timeout_seconds: float = 30.0
    """How long one request to an object store may take; 0 sets no limit."""
    object_store_retries: int = 3
    """How often a request to an object store that failed is made again, with growing pauses."""
    object_store_single_writer: bool = False
    """Write to an object store that ignores the conditions of writes, where a second writer would overwrite what the
    first wrote: only one process may ever write."""
    watch_poll_seconds: float = 0.25
    """How often whoever watches looks where nothing tells what other processes write; at least 0.01."""
    cache_timeout_seconds: float = 0.01
    """How long a read waits for the cache before it asks the store; more than 0."""
    cache_lease_seconds: float = 0.5
    """So often a node looks in the store whether the cache may be used; who writes and cannot reach the cache waits as
    long, once. From 0.01 to 10; of several nodes, who opens the cache says how long all may go without looking."""
    cache_entry_seconds: float = 300.0
    """How long the cache keeps an answer at most; so late is seen what is changed past the cache."""
    cache_entry_max_bytes: int = 262_144
    """Larger documents and pages are not kept in the cache."""
    allow_network_file_system: bool = False
    """Write to a store on NFS, SMB or the like, where several hosts can damage it."""

    _complete: ClassVar[bool] = False

    def __post_init__(self) -> None:
        # Whatever makes the object also comes here, `dataclasses.replace` for instance.
        hints = _field_types()
        for name in _field_names():
            value = _plain(name, getattr(self, name))
            _check_type(name, value, hints[name])
            object.__setattr__(self, name, value)
        _check_values(self)
        object.__setattr__(self, "_complete", True)


@_checked
@dataclass
class DevelopmentConfig(StorageConfig):
    """Settings for a developer's machine."""

    storage_base_path: str = "./dev_data"
    validate_json_on_read: bool = True
    backup_before_delete: bool = True


@_checked
@dataclass
class ProductionConfig(StorageConfig):
    """Settings for production."""

    storage_base_path: str = "/var/lib/chatdb/data"
    validate_json_on_read: bool = False
    message_pagination_default_limit: int = 50
    search_results_default_limit: int = 10


_ENVIRONMENTS: dict[str, type[StorageConfig]] = {
    "development": DevelopmentConfig,
    "staging": StorageConfig,
    "production": ProductionConfig,
}

NAMING_FIELDS = (
    "user_data_directory_name",
    "panel_sessions_directory_name",
    "global_personas_directory_name",
    "session_id_prefix",
    "panel_id_prefix",
    "session_timestamp_format",
    "context_snapshot_timestamp_format",
    "user_profile_filename",
    "session_metadata_filename",
    "messages_filename",
    "situational_context_filename",
    "document_metadata_filename",
    "document_storage_subdirectory_name",
    "document_analysis_subdirectory_name",
    "context_history_subdirectory_name",
)
"""Fields that decide where things are; a store keeps the values it was made with."""


def load_config(
    config_path: str | os.PathLike[str] | None = None, environment: str | None = None, **overrides: Any
) -> StorageConfig:
    """Gather a configuration; a later source wins.

    Defaults, then the class of `environment`, then the JSON file, then `CHATDB_*` variables, then keywords.

    Args:
        config_path: A JSON file with an object of field names and values.
        environment: "development", "staging" or "production".
        overrides: Fields by name.

    Raises:
        ConfigurationError: The file is missing or unreadable, the environment is unknown, a key is
            unknown, or a value does not fit its field.
    """
    if environment is None:
        kind: type[StorageConfig] = StorageConfig
    elif environment in _ENVIRONMENTS:
        kind = _ENVIRONMENTS[environment]
    else:
        raise ConfigurationError(
            f"Unknown environment {environment!r}.", hint=f"Use one of: {', '.join(_ENVIRONMENTS)}."
        )
    values: dict[str, Any] = {}
    if config_path is not None:
        values |= _read_file(Path(config_path))
    values |= _read_environment()
    for name in overrides:
        _require_known(name, "keyword argument")
    values |= overrides
    return kind(**values)


def set_from_text(assignments: typing.Iterable[str]) -> dict[str, Any]:
    """Turn `KEY=VALUE` texts, as a command line has them, into keyword arguments for `load_config`.

    Raises:
        ConfigurationError: A text has no `=`, its key is unknown, or its value does not fit.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigurationError(f"{assignment!r} is not KEY=VALUE.")
        _require_known(name, "setting")
        values[name] = _convert(name, text)
    return values


def _nearest(name: str, known: Iterable[str]) -> str:
    """Return the one of `known` that was probably meant, or ""; a wild guess is worse than none."""
    import difflib  # only errors need it

    return next(iter(difflib.get_close_matches(name.lower(), known, n=1, cutoff=_NEAR)), "")


def _suggestion(name: str, known: Iterable[str], otherwise: str | None = None) -> str | None:
    near = _nearest(name, known)
    return f"Did you mean {near!r}?" if near else otherwise


@functools.cache
def _field_types() -> dict[str, Any]:
    return typing.get_type_hints(StorageConfig)


@functools.cache
def _field_names() -> tuple[str, ...]:
    return tuple(item.name for item in dataclasses.fields(StorageConfig))


def _plain(name: str, value: Any) -> Any:
    """Return a path as the string that it stands for, and everything else as it is."""
    if name not in ("storage_base_path", "search_index_path") or not isinstance(value, str | os.PathLike):
        return value
    path = os.fspath(value)
    return at_home(name, path) if isinstance(path, str) else path


def _require_known(name: str, source: str) -> None:
    known = _field_names()
    if name not in known:
        raise ConfigurationError(f"Unknown {source} {name!r}.", hint=_suggestion(name, known, _LISTED))


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigurationError(f"The configuration file {str(path)!r} does not exist.") from error
    except OSError as error:
        raise ConfigurationError(f"The configuration file {str(path)!r} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"The configuration file {str(path)!r} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"The configuration file {str(path)!r} must hold a JSON object.")
    for name in content:
        _require_known(name, f"key in {str(path)!r}")
    return content


def _read_environment() -> dict[str, Any]:
    known = {ENVIRONMENT_PREFIX + name.upper(): name for name in _field_names()}
    values: dict[str, Any] = {}
    for variable, text in os.environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        if variable in known:
            values[known[variable]] = _convert(known[variable], text)
        else:
            # Compared without the prefix, which all have in common.
            near = _nearest(variable.removeprefix(ENVIRONMENT_PREFIX), known.values())
            more = f"; did you mean {ENVIRONMENT_PREFIX}{near.upper()}?" if near else "."
            warnings.warn(f"The environment variable {variable} is no setting{more}", stacklevel=3)
    return values


def _convert(name: str, text: str) -> Any:
    """Read the text of a variable or a `--set` as the field's type."""
    expected = _field_types()[name]
    if expected is str:
        return text
    if expected is bool:
        lowered = text.strip().lower()
        if lowered in ("true", "1", "yes"):
            return True
        if lowered in ("false", "0", "no"):
            return False
        raise ConfigurationError(f"{name} must be true or false, not {text!r}.")
    try:
        if expected in (int, float):
            return expected(text)
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        kind = {int: "a whole number", float: "a number"}.get(expected, "JSON")
        raise ConfigurationError(f"{name} must be {kind}, not {text!r}.") from error


def _check_type(name: str, value: object, expected: Any) -> None:
    if expected is float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        good = good and -1e300 < cast("float", value) < 1e300  # false for NaN, and true for no integer past all floats
    elif expected is int:
        good = isinstance(value, int) and not isinstance(value, bool)
    elif expected in (bool, str):
        good = isinstance(value, expected)
    else:
        good = isinstance(value, list) and all(isinstance(element, str) for element in value)
    if not good:
        shown = "a value of another type" if name == "storage_url" else repr(str(value)[:80])  # it may hold a password
        words = {float: "a finite number", int: "a whole number", bool: "true or false", str: "a string"}
        raise ConfigurationError(f"{name} must be {words.get(expected, 'a list of strings')}, not {shown}.")


def _check_values(config: StorageConfig) -> None:
    """Check what the types do not say; names are checked because keys are built of them."""
    if not config.storage_base_path or "\0" in config.storage_base_path:
        raise ConfigurationError("storage_base_path must be a path: not empty, and without NUL characters.")
    for name in _field_names():
        value = getattr(config, name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            least, most = _LEAST.get(name, 0), _MOST.get(name, math.inf)
            if not least <= value <= most:
                bound = f"at least {least}" if value < least else f"at most {most}"
                raise ConfigurationError(f"{name} must be {bound}, not {value}.")
        elif name.endswith(("_directory_name", "_subdirectory_name", "_filename")):
            _check_segment(name, value)
    if config.durability not in DURABILITIES:
        raise ConfigurationError(
            f"durability must be one of {', '.join(DURABILITIES)}, not {config.durability[:80]!r}.",
            hint=_suggestion(config.durability, DURABILITIES),
        )
    if config.max_message_size_bytes > MAX_MESSAGE_SIZE_BYTES:
        raise ConfigurationError(
            f"max_message_size_bytes must be at most {MAX_MESSAGE_SIZE_BYTES}, not {config.max_message_size_bytes}.",
            hint="Keep larger content as a document.",
        )
    if config.context_confidence_threshold > 1:
        raise ConfigurationError(
            f"context_confidence_threshold must be from 0 to 1, not {config.context_confidence_threshold}."
        )
    for name, pattern in (
        ("session_id_prefix", _PREFIX),
        ("panel_id_prefix", _PREFIX),
        ("atomic_write_temp_suffix", _SUFFIX),
    ):
        if not pattern.fullmatch(getattr(config, name)):
            raise ConfigurationError(
                f"{name} {getattr(config, name)!r} must match {pattern.pattern} to be safe in a file name."
            )
    for extension in config.allowed_document_extensions:
        if not _EXTENSION.fullmatch(extension):
            raise ConfigurationError(
                f"allowed_document_extensions: {extension!r} must be a dot and letters, such as '.pdf'."
            )
    _check_stamp_format("session_timestamp_format", config.session_timestamp_format)
    _check_stamp_format("context_snapshot_timestamp_format", config.context_snapshot_timestamp_format, sortable=True)
    for names in (
        (
            "user_data_directory_name",
            "panel_sessions_directory_name",
            "global_personas_directory_name",
            "system_config_directory_name",
        ),
        (
            "session_metadata_filename",
            "messages_filename",
            "situational_context_filename",
            "document_storage_subdirectory_name",
            "context_history_subdirectory_name",
        ),
    ):
        seen: dict[str, str] = {}
        for name in names:
            other = seen.setdefault(getattr(config, name).casefold(), name)
            if other != name:
                raise ConfigurationError(f"{name} and {other} must differ, also in more than case.")


_LEAST = {
    "database_pool_size": 1,
    "jsonl_read_buffer_size": 1,
    "max_open_files": 1,
    "full_text_search_min_word_length": 1,
    "watch_poll_seconds": 0.01,
    "cache_timeout_seconds": 0.001,
    "cache_lease_seconds": 0.01,
}
"""What a number must be at least, where it is not 0."""
MOST_LEASE_SECONDS = 10.0
_MOST = {"cache_lease_seconds": MOST_LEASE_SECONDS}
"""What a number may be at most, where it has a bound."""


def _check_segment(name: str, value: str) -> None:
    if value == "" and name == "user_data_directory_name":
        return
    if not _SEGMENT.fullmatch(value) or _WINDOWS_DEVICE.fullmatch(value):
        raise ConfigurationError(
            f"{name} {value[:80]!r} must be a plain file name of letters, digits, '.', '_' and '-'."
        )


def _check_stamp_format(name: str, value: str, *, sortable: bool = False) -> None:
    moments = [datetime(2009, 12, 31, 23, 59, 59, tzinfo=UTC), datetime(2010, 1, 1, 0, 0, 0, tzinfo=UTC)]
    moments += [datetime(2010, 1, 1, 10, 0, 0, tzinfo=UTC), datetime(2010, 1, 2, 9, 0, 0, tzinfo=UTC)]
    moments += [datetime(2010, 10, 2, 9, 0, 0, tzinfo=UTC), datetime(2011, 2, 1, 8, 0, 0, tzinfo=UTC)]
    try:
        stamps = [moment.strftime(value) for moment in moments]
    except ValueError as error:
        raise ConfigurationError(f"{name} {value!r} is no strftime format: {error}.") from error
    if not all(_STAMP.fullmatch(stamp) for stamp in stamps):
        raise ConfigurationError(
            f"{name} {value!r} makes {stamps[0]!r}; only lower-case letters, digits, '_' and '-' are safe."
        )
    if sortable and stamps != sorted(stamps):
        raise ConfigurationError(
            f"{name} {value!r} does not sort by time; begin with the year and end with the second."
        )
