"""Single objects of a bucket: how they are got, created, replaced on a condition, listed and removed.

The client never tries again by itself, for a put that is repeated blindly cannot tell whether what it meets is its own.
Here a read is tried again, and so is a put whose outcome is unknown, but only once the object was looked at: each put
has an id in the object's metadata, by which it is known again.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import S3Store

from ...errors import ConfigurationError, StorageError, UnavailableError
from ...models import new_id
from .faults import is_absent, is_beyond, may_pass, told, unknown, was_refused, was_sent
from .target import Target

T = TypeVar("T")

_AT_ONCE = 16
"""Requests that are under way for one caller."""
_FIRST_PAUSE_SECONDS = 0.05
_REMOVED_AT_ONCE = 1000
"""Objects that one request may remove; S3 takes no more."""
_TOKEN = "chatdb-put"
"""The name of a put's id in an object's metadata."""
_process: dict[str, int] = {}
"""The process in which clients work."""
_FAILURES = (BaseError, OSError)
_END = "\U0010ffff"
"""Sorts behind whatever may follow a prefix."""


class Stored(NamedTuple):
    """An object's bytes, and what names this version of them."""

    data: bytes
    etag: str


class Listed(NamedTuple):
    """An object in a list."""

    path: str
    size: int
    etag: str
    modified: datetime


class Objects:
    """The objects below the prefix of a store. Its methods block; they may be called in any thread."""

    def __init__(self, target: Target, retries: int, probes: str) -> None:
        """Speak to a server; do no I/O.

        Args:
            target: Where.
            retries: How often a request is made again.
            probes: The folder for objects with which it is found out what the server can do.
        """
        self.name = target.name
        self.counters = {"gets": 0, "heads": 0, "puts": 0, "lists": 0, "deletes": 0, "bytes_in": 0, "bytes_out": 0}
        self._target = target
        self._retries = retries
        self.probes = probes
        self._client: S3Store | None = None
        self._patient: S3Store | None = None
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._inside = threading.local()
        self._state = threading.Lock()
        self._probing = threading.Lock()
        self._quotes: bool | None = None
        """Whether ETags go into conditions with their quotes; None: not found out yet."""
        self._is_conditional = True

    def close(self) -> None:
        """End the threads."""
        with self._state:
            pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.shutdown()

    # --- reading -------------------------------------------------------------------------------------

    def get(self, path: str) -> Stored | None:
        """Return an object; None if there is none."""

        def read() -> Stored:
            answer = obstore.get(self._speak(), path)
            return Stored(bytes(answer.bytes()), answer.meta["e_tag"] or "")

        found = self._read("gets", read)
        self._count("bytes_in", len(found.data) if found else 0)
        return found

    def get_range(self, path: str, start: int, length: int) -> bytes | None:
        """Return so many bytes of an object, fewer at its end; None if there is none."""
        if not length:
            return b""

        def read() -> bytes:
            try:
                return bytes(obstore.get_range(self._speak(), path, start=start, length=length))
            except _FAILURES as error:
                if is_beyond(error):
                    return b""
                raise

        found = self._read("gets", read)
        self._count("bytes_in", len(found or b""))
        return found

    def head(self, path: str) -> Listed | None:
        """Return what is known of an object without its bytes; None if there is none."""
        found = self._read("heads", lambda: _listed(obstore.head(self._speak(), path)))
        if found is None:  # an answer without a body does not tell whether it is the object or the bucket that is gone
            found = self._read("gets", lambda: _listed(obstore.get(self._speak(), path).meta))
        return found

    def stream(self, path: str, chunk_bytes: int, etag: str | None = None) -> Iterator[bytes] | None:
        """Return an object's bytes in chunks, all from one request if none fails; None if there is none.

        Nor is there one if it is not of the version that is asked for.
        """
        self._speak()  # which tells whether it can be spoken to at all
        with self._state:
            if self._patient is None:
                self._patient = self._target.client(patient=True)
        answer = self._ask(path, 0)
        if answer is None or etag not in (None, answer.meta["e_tag"] or ""):
            return None
        return self._chunks(path, answer, chunk_bytes)

    def _ask(self, path: str, start: int) -> Any:
        client = self._patient
        assert client is not None
        if not start:
            return self._read("gets", lambda: obstore.get(client, path))
        return self._read("gets", lambda: obstore.get(client, path, options={"range": {"offset": start}}))

    def _chunks(self, path: str, answer: Any, chunk_bytes: int) -> Iterator[bytes]:
        etag, size, got, failures = answer.meta["e_tag"], answer.meta["size"], 0, 0
        chunks = iter(answer.stream(min_chunk_size=chunk_bytes))
        while got < size:
            try:
                chunk = bytes(next(chunks))
            except StopIteration:
                return
            except _FAILURES as error:
                failures += 1
                if failures > self._retries or not may_pass(error):
                    raise self._told(error) from None
                self._pause(failures)
                answer = self._ask(path, got)
                if answer is None or answer.meta["e_tag"] != etag:
                    raise self._told(error) from None  # it is another object now
                chunks = iter(answer.stream(min_chunk_size=chunk_bytes))
                continue
            got += len(chunk)
            self._count("bytes_in", len(chunk))
            yield chunk

    def listed(self, folder: str, after: str = "", until: str | None = None) -> Iterator[list[Listed]]:
        """Yield the objects below a folder ("" is the store) in runs, sorted by code point.

        Only those whose path comes behind `after`, and not behind `until`. A run is a request.
        """
        start = after
        while True:
            found = self._read("lists", lambda: self._page(folder, start))  # noqa: B023 - it is called at once
            run, is_last = found or ([], True)
            yield [each for each in run if until is None or each.path <= until]
            if is_last or (until is not None and run[-1].path > until):
                return
            start = run[-1].path

    def _page(self, folder: str, after: str) -> tuple[list[Listed], bool]:
        pages = iter(obstore.list(self._speak(), folder or None, offset=after or None, chunk_size=_REMOVED_AT_ONCE))
        page = [_listed(each) for each in next(pages, [])]
        page.sort(key=lambda each: each.path)
        return page, len(page) < _REMOVED_AT_ONCE

    def children(self, folder: str) -> tuple[list[str], list[Listed]]:
        """Return the paths of folders in a folder, and the objects in it."""
        found = self._read("lists", lambda: obstore.list_with_delimiter(self._speak(), folder or None))
        assert found is not None
        return list(found["common_prefixes"]), [_listed(each) for each in found["objects"]]

    def _read(self, kind: str, read: Callable[[], T]) -> T | None:
        """Do a request that changes nothing, again if need be; None: what it names is absent."""
        for attempt in range(self._retries + 1):
            self._count(kind)
            try:
                return read()
            except _FAILURES as error:
                if is_absent(error):
                    return None
                if attempt == self._retries or not may_pass(error):
                    raise self._told(error) from None
            self._pause(attempt)
        raise AssertionError

    # --- writing -------------------------------------------------------------------------------------

    def create(self, path: str, data: bytes, *, is_final: bool = False) -> str | None:
        """Make an object where none is, and return its ETag; return None, having changed nothing, if one is there.

        One that is final is never replaced by anybody.
        """
        return self._put(path, data, None, is_final=is_final)

    def replace(self, path: str, data: bytes, etag: str) -> str | None:
        """Replace one version of an object, and return the new ETag; None if that is not what is there now.

        Raises:
            DurabilityError: It is not known whether it was done; later it may be, as long as that version is there.
        """
        return self._put(path, data, etag, is_final=False)

    def put(self, path: str, data: bytes | bytearray) -> None:
        """Write an object whose name nobody else uses."""
        self.prepare_to_write()
        for attempt in range(self._retries + 1):
            try:
                self._send(path, data, "overwrite", "")
                return
            except _FAILURES as error:
                if attempt == self._retries or not may_pass(error):
                    raise self._told(error) from None
            self._pause(attempt)

    def _put(self, path: str, data: bytes, etag: str | None, *, is_final: bool) -> str | None:
        self.prepare_to_write()
        token, may_be_there = new_id(), False
        reason: StorageError | None = None
        for attempt in range(self._retries + 1):
            if not self._is_conditional:
                there = self.head(path)
                if (there and there.etag) != etag:
                    return None
            try:
                return self._send(path, data, self._condition(etag), token)
            except (AlreadyExistsError, PreconditionError) as error:
                if not may_be_there:
                    return None
                reason = reason or self._told(error)
            except _FAILURES as error:
                is_absent_now = isinstance(error, FileNotFoundError) and etag is not None and is_absent(error)
                if is_absent_now and not may_be_there:
                    return None  # there is no version to replace
                reason = self._told(error)
                if not may_pass(error) and not is_absent_now:
                    raise (unknown(reason) if may_be_there else reason) from None
                may_be_there |= was_sent(error) and not was_refused(error)
            self._pause(attempt)
            if may_be_there:
                try:
                    own, now = self._own(path, data, token)
                except StorageError:
                    raise unknown(reason) from None
                if own is not None:
                    return own
                if now != etag:
                    if is_final and now is not None:
                        return None
                    raise unknown(reason)  # it may have been there, and somebody replaced it
        assert reason is not None
        # What was sent may be on its way still, and arrive when nobody looks any more.
        raise unknown(reason) if may_be_there else reason

    def _own(self, path: str, data: bytes, token: str) -> tuple[str | None, str | None]:
        """Return an object's ETag if a put made it, otherwise None; and its ETag in any case."""

        def read() -> tuple[str | None, str | None]:
            answer = obstore.get(self._speak(), path)
            etag, is_own = answer.meta["e_tag"] or "", dict(answer.attributes).get(_TOKEN) == token
            if not self._is_conditional:  # nor, maybe, has it metadata, but there is no other writer
                is_own = bytes(answer.bytes()) == data
            return etag if is_own else None, etag

        return self._read("gets", read) or (None, None)

    def _send(self, path: str, data: bytes | bytearray, mode: Any, token: str) -> str:
        self._count("puts")
        self._count("bytes_out", len(data))
        made = obstore.put(self._speak(), path, data, mode=mode, use_multipart=False, attributes={_TOKEN: token})
        return made["e_tag"] or ""

    def _condition(self, etag: str | None) -> Any:
        if not self._is_conditional:
            return "overwrite"
        if etag is None:
            return "create"
        return {"e_tag": etag if self._quotes else etag.strip('"')}

    def now(self) -> datetime:
        """Return the time by the server's clock."""
        path = f"{self.probes}/{new_id()}"
        self.put(path, b"")
        found = self.head(path)
        self.delete([path])
        assert found is not None
        return found.modified

    def delete(self, paths: Sequence[str]) -> None:
        """Remove objects whose names nobody uses again; those that are absent are no matter."""
        for start in range(0, len(paths), _REMOVED_AT_ONCE):
            part = list(paths[start : start + _REMOVED_AT_ONCE])
            self._read("deletes", lambda: obstore.delete(self._speak(), part))  # noqa: B023 - it is called at once

    def delete_once(self, path: str) -> None:
        """Remove an object, and do not try again if it is not known whether it went."""
        self._count("deletes")
        try:
            obstore.delete(self._speak(), path)
        except _FAILURES as error:
            if not is_absent(error):
                raise self._told(error) from None

    # --- what the server can do ----------------------------------------------------------------------

    def prepare_to_write(self) -> None:
        """Find out, once, whether the server honours conditions, and how it wants ETags.

        Raises:
            ConfigurationError: It does not, and others may write.
        """
        if self._is_probed():
            return
        with self._probing:
            for attempt in range(self._retries + 1):
                if self._is_probed():
                    return
                try:
                    self._probe()
                except UnavailableError:
                    if attempt == self._retries:
                        raise
                    self._pause(attempt)

    def _is_probed(self) -> bool:
        return self._quotes is not None

    def _probe(self) -> None:
        path = f"{self.probes}/{new_id()}"
        etag = self._try(path, b"1", "create")
        if etag is None:  # a name that nobody else can have made
            raise ConfigurationError(f"{self.name}: the server says that a new object exists already.")
        try:
            if self._try(path, b"2", "create") is not None:
                self._without_conditions()
                return
            for quotes in (True, False):
                asked = etag if quotes else etag.strip('"')
                new = self._try(path, b"3", {"e_tag": asked})
                if new is not None:
                    wrong = etag if quotes else etag.strip('"')  # which it was before
                    if self._try(path, b"4", {"e_tag": wrong}) is not None:
                        break
                    self._quotes = quotes
                    return
            self._without_conditions()
        finally:
            with suppress(StorageError):
                self.delete([path])

    def _try(self, path: str, data: bytes, mode: Any) -> str | None:
        try:
            return self._send(path, data, mode, "")
        except (AlreadyExistsError, PreconditionError):
            return None
        except _FAILURES as error:
            raise self._told(error) from None

    def _without_conditions(self) -> None:
        if not self._target.single_writer:
            raise ConfigurationError(
                f"{self.name}: the server ignores the conditions of writes, so that two writers would overwrite each "
                "other's.",
                hint="Use a server that honours If-Match and If-None-Match, or set object_store_single_writer if no "
                "other process ever writes there.",
            )
        self._is_conditional, self._quotes = False, True

    # --- helpers -------------------------------------------------------------------------------------

    def together(self, work: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
        """Do some work for each of several items, many at once; return what came of each, or raise the first error.

        What is done for an item may come here again; then its items are taken one after the other.
        """
        if getattr(self._inside, "pool", False):
            return [work(item) for item in items]
        return self._spread("chatdb-s3", work, items)

    def at_once(self, looks: Sequence[Callable[[], Any]]) -> list[Any]:
        """Do a few things at once that need a request or two each, also where things are done together.

        What is done here must not come here again.
        """
        return self._spread("chatdb-s3-looks", lambda look: look(), looks)

    def _spread(self, name: str, work: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
        if len(items) < 2:
            return [work(item) for item in items]
        with self._state:
            if name not in self._pools:
                self._pools[name] = ThreadPoolExecutor(_AT_ONCE, name, self._enter_pool)
            pool = self._pools[name]
        others = [pool.submit(work, item) for item in items[1:]]
        try:
            return [work(items[0]), *(each.result() for each in others)]
        finally:
            for each in others:
                each.cancel()

    def _enter_pool(self) -> None:
        self._inside.pool = True

    def _speak(self) -> S3Store:
        if _process.setdefault("id", os.getpid()) != os.getpid():  # the threads of the client are the parent's
            raise ConfigurationError(
                f"{self.name}: an object store cannot be used in a process that was forked from one that used it.",
                hint='Start processes with "spawn" or "forkserver", or open the store in the child only.',
            )
        if self._client is None:
            with self._state:
                if self._client is None:
                    self._client = self._target.client()
        return self._client

    def _count(self, name: str, number: int = 1) -> None:
        with self._state:
            self.counters[name] += number

    def _told(self, error: Exception) -> StorageError:
        return told(error, self.name)

    @staticmethod
    def _pause(attempt: int) -> None:
        time.sleep(_FIRST_PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1.0))


def _listed(meta: Any) -> Listed:
    return Listed(meta["path"], meta["size"], meta["e_tag"] or "", meta["last_modified"])
