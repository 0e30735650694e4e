"""Commits of several keys, decided by one object, and what stands at a key meanwhile.

A commit begins with its *intent*, an object that says "prepared". Then the head of each of its keys is replaced by one
that is locked: it holds the old head, the new one, and the name of the intent. When all are locked the intent is
replaced by one that says "done"; that is the commit. Whoever meets a locked head asks its intent: once it says "done"
the new head counts, before that, and if it says "undone", the old one. So nothing is half done for anybody, and whoever
comes later finishes it. An intent that says "prepared" for too long is of a process that died: whoever has to write
there replaces it by one that says "undone". No clock but one's own is asked.

What is removed is replaced by a head that stands for nothing, which is removed itself at once: no server need have a
removal on a condition.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

import msgspec

from ...errors import DurabilityError, IntegrityError, StorageError, UnavailableError
from ...models import new_id
from .forms import GONE, Head, Manifest, Places, going, locked, read_head
from .objects import Objects

_TURNS = 40
_PATIENCE_SECONDS = 5.0
"""So long a commit may be prepared, or a removal under way, before somebody else ends it."""
_PAUSE_SECONDS = 0.02

State = Literal["prepared", "done", "undone"]


class Intent(msgspec.Struct):
    """What is decided of a commit, and the keys that it locks."""

    state: State
    keys: list[str]


_decoder = msgspec.json.Decoder(Intent)
_encoder = msgspec.json.Encoder()


class Locks:
    """Looks at the objects at keys, and through those that are locked. Its methods block."""

    def __init__(self, objects: Objects, places: Places) -> None:
        self._objects = objects
        self._places = places

    # --- looking -------------------------------------------------------------------------------------

    def at(self, key: str) -> Head | None:
        """Return what stands at a key now; it may stand for nothing, or be locked, but is never the lock itself."""
        before = None
        for _ in range(_TURNS):
            found = self._objects.get(key)
            if found is None:
                return None
            head = read_head(found.data, found.etag)
            if head.manifest is None or head.manifest.chatdb != "locked":
                return head
            intent = self.intent(head.manifest.intent)
            if intent is None and found.etag != before:
                before = found.etag  # it is ended: either the head is replaced by now, or it came too late
                continue
            return _through(head, head.manifest, intent is not None and intent[0].state == "done")
        raise UnavailableError(f"{key} is changed faster than it can be read.", key=key, hint="Retry.")

    def settled(self, key: str) -> Head | None:
        """Return what stands at a key once it may be replaced; end what others do there, if they do not.

        Raises:
            UnavailableError: It is locked again and again, or cannot be unlocked.
        """
        try:
            return self._settled(key)
        except DurabilityError as error:  # of a write that is in any case what others have decided
            raise UnavailableError(f"{key} cannot be unlocked. {error.message}", key=key, hint="Retry.") from None

    def _settled(self, key: str) -> Head | None:
        began: dict[str, float] = {}
        for _ in range(_TURNS * 20):
            found = self._objects.get(key)
            if found is None:
                return None
            head = read_head(found.data, found.etag)
            manifest = head.manifest
            if manifest is None or manifest.chatdb not in ("gone", "locked") or found.data == GONE:
                return head
            is_known, now = found.etag in began, time.monotonic()
            waited = now - began.setdefault(found.etag, now)
            if manifest.chatdb == "gone":  # somebody is about to remove it, or died at that
                if waited > 2 * _PATIENCE_SECONDS:
                    self._objects.replace(key, GONE, found.etag)
            elif (intent := self.intent(manifest.intent)) is None:
                if is_known:  # it is ended, and this came too late; otherwise it would be replaced by now
                    self._roll(key, head, manifest, is_done=False)
                    continue
            elif intent[0].state != "prepared":
                self._roll(key, head, manifest, is_done=intent[0].state == "done")
                continue
            elif waited > _PATIENCE_SECONDS:
                self.decide(manifest.intent, intent[0], intent[1], "undone")
                continue
            time.sleep(_PAUSE_SECONDS)
        raise UnavailableError(f"{key} is locked by other commits all the time.", key=key, hint="Retry.")

    def _roll(self, key: str, head: Head, manifest: Manifest, *, is_done: bool) -> None:
        """Replace a locked head by what counts, unless somebody else has."""
        raw = manifest.new if is_done else manifest.old
        if raw is None:
            self.remove(key, head.etag)
        else:
            self._objects.replace(key, raw, head.etag)

    # --- intents -------------------------------------------------------------------------------------

    def _path(self, name: str) -> str:
        return f"{self._places.intents}/{name}"

    def intent(self, name: str) -> tuple[Intent, str] | None:
        """Return an intent and its ETag; None if there is none.

        Raises:
            IntegrityError: It is damaged.
        """
        found = self._objects.get(self._path(name))
        if found is None:
            return None
        try:
            return _decoder.decode(found.data), found.etag
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            path = self._path(name)
            raise IntegrityError(f"The intent {path} is damaged.", key=path, hint="Remove it by hand.") from None

    def begin(self, keys: Sequence[str]) -> tuple[str, Intent, str]:
        """Write a new intent; return its name, itself, and its ETag.

        Raises:
            UnavailableError: It is not written, or not known to be, which is the same: nothing is locked by it.
        """
        name, intent = new_id(), Intent("prepared", list(keys))
        try:
            etag = self._objects.create(self._path(name), _encoder.encode(intent))
        except DurabilityError as error:
            raise UnavailableError(f"{self._path(name)} cannot be written: {error.message}", hint="Retry.") from None
        if etag is None:
            raise UnavailableError(f"{self._path(name)} is there already.", hint="Retry.")
        return name, intent, etag

    def lock(self, key: str, name: str, head: Head | None, new: bytes | None) -> str | None:
        """Lock a key whose head was looked at; return the ETag of the lock, None if somebody else was there."""
        if head is None:
            return self._objects.create(key, locked(name, None, new))
        old = head.raw if head.is_there else None
        return self._objects.replace(key, locked(name, old, new), head.etag)

    def decide(self, name: str, intent: Intent, etag: str, state: State) -> bool:
        """Say what becomes of a commit; return False if somebody else has said it."""
        return self._objects.replace(self._path(name), _encoder.encode(Intent(state, intent.keys)), etag) is not None

    def unlock(self, key: str, name: str, *, is_done: bool) -> None:
        """Put what counts in the place of a key's lock, if it is still there."""
        found = self._objects.get(key)
        if found is None:
            return
        head = read_head(found.data, found.etag)
        if head.manifest is not None and head.manifest.chatdb == "locked" and head.manifest.intent == name:
            self._roll(key, head, head.manifest, is_done=is_done)

    def end(self, name: str, keys: Sequence[str], *, is_done: bool) -> None:
        """Unlock all keys of a commit that is decided, and remove its intent."""
        self._objects.together(lambda key: self.unlock(key, name, is_done=is_done), keys)
        self._objects.delete([self._path(name)])

    def names(self) -> list[str]:
        """Return the names of all intents."""
        found = (each for run in self._objects.listed(self._places.intents) for each in run)
        return [each.path.rpartition("/")[2] for each in found]

    def keys(self) -> set[str]:
        """Return the keys of all commits that are not ended; `verify` tells of intents that cannot be read."""
        found: set[str] = set()
        for name in self.names():
            with suppress(IntegrityError):
                intent = self.intent(name)
                found.update(intent[0].keys if intent is not None else ())
        return found

    def finish(self, name: str) -> bool:
        """End a commit that is decided; return False if it is not, or ended already."""
        found = self.intent(name)
        if found is None or found[0].state == "prepared":
            return False
        self.end(name, found[0].keys, is_done=found[0].state == "done")
        return True

    def give_up(self, name: str) -> bool:
        """End a commit whose process has died, whatever it had done."""
        found = self.intent(name)
        if found is not None and found[0].state == "prepared":
            self.decide(name, found[0], found[1], "undone")
        return self.finish(name)

    # --- what is gone --------------------------------------------------------------------------------

    def remove(self, key: str, etag: str) -> bool:
        """Replace a head by one that stands for nothing, and remove that; return False if another head is there.

        Nobody creates anything here before it is gone, unless this takes long: then it is left where it is.
        """
        began = time.monotonic()
        if self._objects.replace(key, going(new_id()), etag) is None:
            return False
        if time.monotonic() - began < _PATIENCE_SECONDS / 2:
            with suppress(StorageError):  # it stands for nothing all the same
                self._objects.delete_once(key)
        return True

    def bury(self, key: str) -> None:
        """Remove a head that has stood for nothing for long."""
        found = self._objects.get(key)
        if found is not None and not read_head(found.data, found.etag).is_there:
            self.remove(key, found.etag)


def _through(lock: Head, manifest: Manifest, is_done: bool) -> Head:
    """Return the head that counts behind a lock; its ETag is that of the lock, which is what may be replaced."""
    raw = manifest.new if is_done else manifest.old
    head = read_head(GONE if raw is None else raw, lock.etag)
    return msgspec.structs.replace(head, is_locked=True)
