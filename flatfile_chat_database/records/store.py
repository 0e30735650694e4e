"""The open store that all records share: its backend, map, clock and ids, and the store's own file."""

from __future__ import annotations

import asyncio
import copy
import logging
import weakref
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, TypeVar

from .. import codec
from ..backends.base import StorageBackend
from ..backends.changes import ABSENT, Absent, Change, Outcome, Put, Require
from ..backends.rules import check_version, not_found, version_of
from ..config import NAMING_FIELDS, StorageConfig
from ..errors import (
    ConfigurationError,
    ConflictError,
    IntegrityError,
    StorageError,
    UnavailableError,
    ValidationError,
)
from ..layout import Layout
from ..models import format_timestamp, parse_timestamp
from .names import StampedIds

logger = logging.getLogger("flatfile_chat_database")

T = TypeVar("T")

Make = Callable[[str, dict[str, Any], str], T]
"""Makes a record of a document's key, content and version; raises IntegrityError if it is damaged."""

FORMAT_VERSION = 1
"""Of what is on disk. A store of a newer version is refused, one of an older version is read."""

IDS: Final[Mapping[str, Mapping[str, str]]] = {
    "user": {"user_id": "user_id"},
    "session": {"id": "session_id", "user_id": "user_id"},
    "panel": {"id": "panel_id"},
    "persona": {"id": "persona_id"},
    "global_persona": {"id": "persona_id"},
    "panel_persona": {"id": "persona_id"},
    "insight": {"id": "insight_id"},
}
"""The ids that documents repeat, by entry: the field, and the placeholder in the key."""

TIMES: Final[Mapping[str, tuple[str, ...]]] = {
    "user": ("created_at", "updated_at"),
    "session": ("created_at", "updated_at"),
    "panel": ("created_at",),
    "insight": ("created_at",),
    "context": ("timestamp",),
    "context_snapshot": ("timestamp",),
}
"""The fields that hold timestamps, by entry."""

LONG_AGO = datetime.min.replace(tzinfo=UTC)
"""Before every stored time."""

_ATTEMPTS = 100
"""Of a change that others come before, until they are told so."""

_RUN = 256
"""Documents read at a time where a page may not need them all."""


class Store:
    """A backend that is opened on first use, with everything that gives its bytes a meaning."""

    def __init__(
        self,
        config: StorageConfig,
        backend: StorageBackend,
        *,
        read_only: bool,
        clock: Callable[[], datetime],
        new_id: Callable[[], str],
    ) -> None:
        self.config = config
        self.layout = Layout(config)
        self.clock = clock
        self.new_id = new_id
        self.read_only = read_only
        self.store_id = ""
        """Of the store's own file; "" as long as there is none."""
        self._backend = backend
        self._opened = False
        self._created = False
        self._turns: weakref.WeakValueDictionary[tuple[int, str], asyncio.Lock] = weakref.WeakValueDictionary()

    @property
    def backend(self) -> StorageBackend:
        """The backend, opened or not."""
        return self._backend

    @property
    def uncached(self) -> Store:
        """The same store past a cache in front of it, to read what is kept: a cache may be behind what `changes` says.

        It says so before the write is acknowledged; what was kept would stay old.
        """
        if self._backend.uncached is self._backend:
            return self
        other = copy.copy(self)
        other._backend = self._backend.uncached
        return other

    def now(self) -> str:
        """Return the clock's time as a stored timestamp."""
        return format_timestamp(self.clock())

    async def reading(self) -> StorageBackend:
        """Return the backend, opened and checked to be a store that this configuration can read."""
        if not self._opened:
            await self._backend.open()
            if await self._examine():  # never back to False: another caller may have made it meanwhile
                self._created = True
            self._opened = True
        return self._backend

    async def identity(self) -> str:
        """Return the id of the store; "" as long as nobody has made it."""
        backend = await self.reading()
        if not self.store_id and await backend.exists(self.layout.key("store")):  # another process made it meanwhile
            await self._examine()
        return self.store_id

    @property
    def ready(self) -> StorageBackend | None:
        """The backend, if it needs no waiting to be written."""
        return self._backend if self._created and self._opened and not self.read_only else None

    async def writing(self) -> StorageBackend:
        """Return the backend of a store that exists and may be written.

        Raises:
            UnavailableError: The store was opened read-only.
        """
        if self.read_only:
            raise UnavailableError("The store was opened read-only.", hint="Open it without read_only=True.")
        if self._created:
            return self._backend
        backend = await self.reading()
        if not self._created:
            await self._create()
            self._created = True
        return backend

    async def commit(self, changes: Sequence[Change]) -> list[Outcome]:
        """Make changes as one, after opening or making the store if that is still to be done."""
        return await (await self.writing()).commit(changes)

    async def _examine(self) -> bool:
        """Check the store's own file; return whether there is one."""
        key = self.layout.key("store")
        data = await self._backend.read(key)
        if data is None:
            await self._refuse_other_system_folder()
            if await self._backend.exists(self.layout.migration_note):
                raise _unfinished(self.layout.migration_note)
            return False
        content = codec.decode_object(data, key)
        found = content.get("format_version")
        if not isinstance(found, int) or isinstance(found, bool) or not isinstance(content.get("names"), dict):
            raise ConfigurationError(f"{key} does not describe a chat store.", key=key)
        if found > FORMAT_VERSION:
            raise ConfigurationError(
                f"The store has format {found}; this version reads up to {FORMAT_VERSION}.",
                key=key,
                hint="Install a newer flatfile_chat_database.",
            )
        self.store_id = str(content.get("store_id", ""))
        for name in NAMING_FIELDS:
            stored = content["names"].get(name, getattr(self.config, name))
            if stored != getattr(self.config, name):
                raise ConfigurationError(
                    f"The store was made with {name}={stored!r}, not {getattr(self.config, name)!r}.",
                    key=key,
                    hint="A store keeps the names it was made with.",
                )
        return True

    async def _refuse_other_system_folder(self) -> None:
        """A store opened under another `system_config_directory_name` would seem new; find the file it has."""
        for child in await self._backend.list_folders(""):
            if child == self.config.system_config_directory_name:
                continue  # somebody makes the store at this moment; whoever comes second learns it in `_create`
            key = f"{child}/{self.layout.key('store').rpartition('/')[2]}"
            data = await self._backend.read(key) if await self._backend.exists(key) else None
            if data is not None and b'"store_id"' in data and b'"format_version"' in data:
                raise ConfigurationError(
                    f"The store was made with system_config_directory_name={child!r}, "
                    f"not {self.config.system_config_directory_name!r}.",
                    key=key,
                    hint="A store keeps the names it was made with.",
                )

    async def _create(self) -> None:
        content: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "store_id": self.new_id(),
            "created_at": self.now(),
            "names": {name: getattr(self.config, name) for name in NAMING_FIELDS},
        }
        try:
            note = Absent(self.layout.migration_note)  # which may have begun since this store was found empty
            await self._backend.commit([note, Put(self.layout.key("store"), codec.encode_document(content), ABSENT)])
            self.store_id = content["store_id"]
        except ConflictError as error:  # another process was first; its names count
            if not await self._examine():
                raise error

    # --- reading documents ---------------------------------------------------------------------------

    async def load(self, key: str) -> tuple[dict[str, Any], str] | None:
        """Return a document's content and version, or None if it is absent.

        Raises:
            IntegrityError: It is damaged.
        """
        data = await (await self.reading()).read(key)
        return None if data is None else (codec.decode_object(data, key), version_of(data))

    async def load_as(self, key: str, make: Make[T]) -> T | None:
        """Return the record that `make` makes of a document, or None if it is absent."""
        loaded = await self.load(key)
        return None if loaded is None else make(key, *loaded)

    async def load_all(self, keys: Sequence[str], make: Make[T], *, strict: bool = False) -> list[T | None]:
        """Return the records of many documents in the order of `keys`; None for those that are absent or damaged.

        Raises:
            IntegrityError: One is damaged, and `strict` is true; otherwise a warning names it.
        """
        records: list[T | None] = []
        for key, data in zip(keys, await (await self.reading()).read_many(keys), strict=True):
            record = None
            if data is not None:
                try:
                    record = self.made(key, data, make)
                except IntegrityError as error:
                    if strict:
                        raise
                    logger.warning("%s It is passed over.", error.message)
            records.append(record)
        return records

    def made(self, key: str, data: bytes, make: Make[T]) -> T:
        """Return the record of a document's bytes.

        Raises:
            IntegrityError: It is damaged.
        """
        return make(key, codec.decode_object(data, key), version_of(data))

    async def load_page(
        self, keys: Sequence[str], make: Make[T], limit: int | None, offset: int = 0, *, strict: bool = False
    ) -> list[T]:
        """Return the first `limit` records (None: all) after `offset` ones, in the order of `keys`.

        What is absent or damaged does not count. No more is read than it takes.
        """
        end = len(keys) if limit is None else offset + limit
        found: list[T] = []
        for start in range(0, len(keys) if limit != 0 else 0, _RUN):
            loaded = await self.load_all(keys[start : start + _RUN], make, strict=strict)
            found += [record for record in loaded if record is not None]
            if len(found) >= end:
                break
        return found[offset:end]

    async def ids(self, entry: str, /, **names: str) -> list[str]:
        """Return the ids in the folder of an entry's siblings; whether each has its document is not looked at."""
        found = (self.layout.parse_child(entry, child) for child in await self.children(entry, **names))
        return [text for text in found if text is not None]

    async def children(self, entry: str, /, folder: str | None = None, **names: str) -> list[str]:
        """Return what may be the names of an entry and its siblings: of folders, or of files.

        `folder` is where to look instead of their own place. A stray file beside the folders is none of them.
        """
        backend = await self.reading()
        place = self.layout.parent(entry, **names) if folder is None else folder
        return await (backend.list_folders if self.layout.is_in_folders(entry) else backend.list_children)(place)

    async def count(self, keys: Sequence[str]) -> int:
        """Return how many of the documents exist, damaged ones too."""
        backend = await self.reading()
        count = 0
        for start in range(0, len(keys), _RUN):
            count += sum(data is not None for data in await backend.read_many(keys[start : start + _RUN]))
        return count

    def cross_check(
        self, entry: str, key: str, content: Mapping[str, Any], names: Mapping[str, str] | None = None
    ) -> None:
        """Check a document of an entry by `IDS` and `TIMES`, if the configuration says so.

        `names` are the ids in its key, for a caller who knows them.

        Raises:
            IntegrityError: It says that it belongs elsewhere, or holds no timestamp where one should be.
        """
        if not self.config.validate_json_on_read:
            return
        if names is None:
            place = self.layout.parse(key)
            names = {} if place is None else place.names
        ids = {field: names[name] for field, name in IDS.get(entry, {}).items() if name in names}
        self.check_fields(key, content, ids, TIMES.get(entry, ()))

    def check_fields(
        self, key: str, content: Mapping[str, Any], ids: Mapping[str, str], times: Iterable[str] = ()
    ) -> None:
        """Check a document's ids against its place, and that its timestamps are some, if the configuration says so.

        Raises:
            IntegrityError: A field of `ids` has another value, or one of `times` holds no timestamp.
        """
        if not self.config.validate_json_on_read:
            return
        for name, expected in ids.items():
            if content.get(name) != expected:
                found = f"{content.get(name)!r:.200}"
                raise damaged(key, f"its {name} is {found}, but this is the place of {expected!r}.")
        for name in times:
            try:
                parse_timestamp(content.get(name), name)
            except ValidationError as error:
                raise damaged(key, error.message) from error

    # --- changing documents --------------------------------------------------------------------------

    async def update(
        self,
        key: str,
        change: Callable[[dict[str, Any]], dict[str, Any]],
        *,
        what: str,
        expected_version: str | None = None,
        requires: Sequence[Change] = (),
        absent: dict[str, Any] | None = None,
    ) -> str:
        """Change a document without losing what another does to it meanwhile; return its new version.

        Args:
            key: The document.
            change: Returns the new content of the present one, without changing that, or the present one itself if
                there is nothing to change, so that nothing is written; may be called again.
            what: What the document is, for the error if there is none.
            expected_version: Raise ConflictError unless the document has this version.
            requires: Further changes and conditions of the same commit; they come before the document's.
            absent: What stands for the content of a document that does not exist yet.

        Raises:
            NotFoundError: The document does not exist, and `absent` is None.
        """
        if expected_version is not None and not isinstance(expected_version, str):
            raise ValidationError(f"expected_version must be a string, not {type(expected_version).__name__}.")
        backend = await self.writing()

        async def attempt() -> str:
            loaded = await self.load(key)
            if loaded is None and absent is None:
                raise not_found(what, key)
            content, version = loaded or (absent or {}, ABSENT)
            expected = version if expected_version is None else expected_version
            new = change(content)
            if new is content:
                check_version(key, await backend.read(key), expected)
                return str(expected)
            put = Put(key, codec.encode_document(new), expected)
            return str((await backend.commit([*requires, put]))[-1])

        if expected_version is None:
            return await self.retry(key, attempt)
        return await attempt()

    async def retry(self, key: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """Repeat an attempt to read, decide and commit until nothing came between, and return what it returns.

        Tasks of one event loop that change the same `key` take turns, so that a hundred of them do not all try a
        hundred times. `attempt` must read anew what its commit compares with.

        Raises:
            ConflictError: Something is in the way that is not at or below `key`, or every attempt met a conflict.
        """
        loop = id(asyncio.get_running_loop())
        async with self._turns.setdefault((loop, key), asyncio.Lock()):
            for _ in range(_ATTEMPTS - 1):
                try:
                    return await attempt()
                except ConflictError as error:
                    if error.key != key and not str(error.key).startswith(f"{key}/"):
                        raise
            return await attempt()

    async def create_stamped(
        self, entry: str, ids: StampedIds, changes: Callable[[str], Sequence[Change]], /, **names: str
    ) -> str:
        """Commit `changes(id)`, one of which fails if the id is taken, with the first free id; return the id."""
        backend = await self.writing()
        folder = self.layout.parent(entry, **names)
        while True:
            stamp = ids.stamp(self.clock())
            number = ids.reserve(folder, stamp)
            new = ids.build(stamp, number)
            try:
                await backend.commit(changes(new))
                return new
            except ConflictError:
                ids.pass_over(folder, stamp, await self.ids(entry, **names))
            except StorageError:
                ids.give_back(folder, stamp, number)
                raise

    # --- arguments -----------------------------------------------------------------------------------

    def require(self, entry: str, /, **names: str) -> Require:
        """Return the condition that the owner of something exists: a user, a session or a panel."""
        return Require(self.layout.key(entry, **names), called(entry, **names))

    @staticmethod
    def page(limit: int | None, offset: int, default: int | None, *, from_end: bool = False) -> tuple[int | None, int]:
        """Return checked `limit` and `offset`; a `limit` of None becomes `default`.

        Raises:
            ValidationError: One is no whole number, or is negative; `from_end` allows a negative offset.
        """
        for name, value in (("limit", limit), ("offset", offset)):
            if value is None and name == "limit":
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValidationError(f"{name} must be a whole number, not {value!r:.80}.")
            if value < 0 and (name == "limit" or not from_end):
                raise ValidationError(f"{name} must not be negative, but is {value}.")
        return default if limit is None else limit, offset

    async def close(self) -> None:
        """Close the backend."""
        await self._backend.close()


def _unfinished(key: str) -> ConfigurationError:
    return ConfigurationError(
        "This store is the target of a migration that is not finished.",
        key=key,
        hint="Run `chatdb migrate` again until it says that all is there.",
    )


def called(entry: str, /, **names: str) -> str:
    """Return what an error calls something, such as "The session 'x' of user 'y'"."""
    *owners, (_, own) = names.items()
    of = "".join(f" of {name.removesuffix('_id')} {value!r}" for name, value in reversed(owners))
    return f"The {entry.replace('_', ' ')} {own!r}{of}"


@lru_cache(maxsize=4096)  # a list asks again and again for the same times
def moment_of(timestamp: str) -> datetime:
    """Return a stored time; one that is none counts as long ago, for it is not here that it is looked for."""
    try:
        return parse_timestamp(timestamp)
    except ValidationError:
        return LONG_AGO


def left_behind(what: str, key: str | None) -> IntegrityError:
    """Return the error for a place that holds things of something whose own document is gone."""
    return IntegrityError(
        f"{what} does not exist, but there are things of it.",
        key=key,
        hint="Run `chatdb check --fix`, which makes it anew, or use another id.",
    )


def damaged(key: str, problem: str) -> IntegrityError:
    """Return the error for a document that decodes but cannot be right."""
    return IntegrityError(
        f"The document at {key} is damaged: {problem}", key=key, hint="Run `chatdb check` to see all damage."
    )
