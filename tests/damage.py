"""A healthy store, and one sample of every kind of damage that `check` knows.

`build` makes the store through the public API. A sample then damages it: on every backend through the six methods, or
on flat files by plain file access. Each says where `check` must report what.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Awaitable, Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatfile_chat_database.backends.base import StorageBackend
from flatfile_chat_database.codec import MAX_LINE_BYTES
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.layout import Layout
from flatfile_chat_database.models import Message, SituationalContext
from flatfile_chat_database.storage import StorageManager

USER = "alice"
SESSION = "chat_session_20260131_120000"
OTHER_SESSION = "chat_session_20260131_130000"
PANEL = "panel_20260131_120000"
TIME = "2026-01-31T12:00:00.000000+00:00"
REPORT = b"%PDF-1.7 the report"

LAYOUT = Layout(StorageConfig())
NAMES = {"user_id": USER, "session_id": SESSION}

PROFILE = LAYOUT.key("user", user_id=USER)
OWN_PERSONA = LAYOUT.key("persona", user_id=USER, persona_id="tutor")
METADATA = LAYOUT.key("session", **NAMES)
LOG = LAYOUT.key("messages", **NAMES)
CONTEXT = LAYOUT.key("context", **NAMES)
DOCUMENTS = LAYOUT.key("documents", **NAMES)
BLOB = LAYOUT.key("document", **NAMES, document="report.pdf")
NOTES = LAYOUT.key("document", **NAMES, document="notes.txt")
ANALYSIS = LAYOUT.key("analysis", **NAMES, document="report.pdf")
PANEL_METADATA = LAYOUT.key("panel", panel_id=PANEL)
PANEL_LOG = LAYOUT.key("panel_messages", panel_id=PANEL)
STORE = LAYOUT.key("store")


async def build(storage: StorageManager) -> None:
    """Fill an empty store with one of everything, and a second session that nothing happens to."""
    await storage.create_user(USER, {"language": "en"})
    await storage.save_persona("analyst", {"name": "Analyst"})
    await storage.save_persona("tutor", {"name": "Tutor"}, USER)
    for session_id in (SESSION, OTHER_SESSION):
        await storage.create_session(USER, "Reading files", session_id=session_id, created_at=TIME)
        for number in range(5):
            message = Message("user", f"Line {number}, 张三", id=f"m{number}", timestamp=TIME)
            await storage.add_message(USER, session_id, message)
        await storage.save_document(USER, session_id, "report.pdf", REPORT, {"pages": 1})
        await storage.save_document(USER, session_id, "notes.txt", b"notes")
        await storage.update_document_analysis(USER, session_id, "report.pdf", {"summary": "short"})
        await storage.update_context(USER, session_id, SituationalContext("Files", timestamp=TIME))
        await storage.save_context_snapshot(USER, session_id, SituationalContext("Earlier", timestamp=TIME))
    await storage.create_panel("team", ["analyst", "critic"], panel_id=PANEL)
    for number in range(3):
        await storage.add_panel_message(PANEL, Message("analyst", f"Point {number}", id=f"p{number}", timestamp=TIME))
    await storage.save_panel_insight(PANEL, {"text": "agreed"})
    await storage.create_session(USER, "Deleted", session_id="deleted")
    await storage.add_message(USER, "deleted", Message("user", "gone", id="d0", timestamp=TIME))
    await storage.delete_session(USER, "deleted")


@dataclass(frozen=True, eq=False)
class Sample:
    """One way to damage a store."""

    name: str
    found: tuple[tuple[str, str], ...]
    """What `check` must report: kind and key. A key ending in `*` stands for all that begin so."""
    on_backend: Callable[[StorageBackend], Awaitable[None]] | None = None
    on_files: Callable[[Path], None] | None = None
    harmless: bool = False
    repaired: bool = True
    """Whether `check(fix=True)` mends it; what it does not mend needs a person."""
    gone: Set[str] = frozenset()
    """Keys that a repair takes out of their place."""
    new: Set[str] = frozenset()
    """Keys that a repair makes."""
    changed: Set[str] = frozenset()
    """Keys that a repair writes anew."""

    def __str__(self) -> str:
        return self.name

    async def inflict(self, backend: StorageBackend, root: Path) -> None:
        """Damage the store."""
        if self.on_backend is not None:
            await self.on_backend(backend)
        if self.on_files is not None:
            self.on_files(root)


def line(record_id: str, **fields: Any) -> bytes:
    """Return a line of a log as a person might write it."""
    record = {"id": record_id, "role": "user", "content": "by hand", "timestamp": TIME} | fields
    return json.dumps(record).encode() + b"\n"


def insert(key: str, position: int, new: bytes) -> Callable[[StorageBackend], Awaitable[None]]:
    """Put bytes before the line at a position of a log."""

    async def damage(backend: StorageBackend) -> None:
        data = await backend.read(key)
        assert data is not None
        whole = data.splitlines(keepends=True)
        await backend.write(key, b"".join([*whole[:position], new, *whole[position:]]))

    return damage


def cut(key: str, size: int) -> Callable[[StorageBackend], Awaitable[None]]:
    """Leave only the first bytes of a document."""

    async def damage(backend: StorageBackend) -> None:
        data = await backend.read(key)
        assert data is not None
        assert len(data) > size
        await backend.write(key, data[:size])

    return damage


def edit(key: str, change: Callable[[dict[str, Any]], object]) -> Callable[[StorageBackend], Awaitable[None]]:
    """Change a document as an editor does."""

    async def damage(backend: StorageBackend) -> None:
        data = await backend.read(key)
        assert data is not None
        content = json.loads(data)
        change(content)
        await backend.write(key, json.dumps(content).encode())

    return damage


def write(key: str, data: bytes) -> Callable[[StorageBackend], Awaitable[None]]:
    """Write bytes to a key."""

    async def damage(backend: StorageBackend) -> None:
        await backend.write(key, data)

    return damage


def remove(*keys: str) -> Callable[[StorageBackend], Awaitable[None]]:
    """Remove keys."""

    async def damage(backend: StorageBackend) -> None:
        for key in keys:
            assert await backend.delete(key)

    return damage


def report_entry(content: dict[str, Any]) -> dict[str, Any]:
    """Return what the document metadata says of the report."""
    entry: dict[str, Any] = content["documents"]["report.pdf"]
    return entry


async def compress_and_cut(backend: StorageBackend) -> None:
    """Store the report compressed, and cut the end of it off."""
    import gzip

    packed = LAYOUT.key("document", **NAMES, document="report.pdf.gz")
    await backend.write(packed, gzip.compress(REPORT)[:-4])
    await backend.delete(BLOB)
    await backend.delete(ANALYSIS)
    await edit(DOCUMENTS, lambda content: report_entry(content).update(path=packed, compression="gzip"))(backend)


def tear(path: str, tail: bytes = b'{"id":"torn","role":"us') -> Callable[[Path], None]:
    """Leave half a line at the end of a log, as a process does that dies while it writes."""

    def damage(root: Path) -> None:
        with (root / path).open("ab") as log:
            log.write(tail)

    return damage


def leave_temporary(root: Path) -> None:
    """Leave an unfinished file of two days ago."""
    path = (root / METADATA).with_name(".01234567-89ab-7def-8123-456789abcdef.tmp")
    path.write_bytes(b"unfinished")
    path.chmod(0o600)
    old = time.time() - 2 * 86400
    os.utime(path, (old, old))


def folder_for_context(root: Path) -> None:
    """Put a folder, with something in it, where the context should be."""
    (root / CONTEXT).unlink()
    (root / CONTEXT).mkdir(0o700)
    (root / CONTEXT / "stray.json").write_bytes(b"{}")
    (root / CONTEXT / "stray.json").chmod(0o600)


def link_context(root: Path) -> None:
    """Put a symbolic link where the context should be."""
    outside = root.parent / "outside.json"
    (root / CONTEXT).rename(outside)
    (root / CONTEXT).symlink_to(outside)


def pipe_for_context(root: Path) -> None:
    """Put a pipe where the context should be; opening one waits for ever."""
    (root / CONTEXT).unlink()
    os.mkfifo(root / CONTEXT, 0o600)


def wrong_name(root: Path) -> None:
    """Leave a file whose name holds a line break."""
    path = root / "users" / "a\nb"
    path.write_bytes(b"?")
    path.chmod(0o600)


QUARANTINED = LAYOUT.key("quarantine", item="0.bin")
STRAY = f"{LAYOUT.folder('session', **NAMES)}/notes by hand.txt"
BOB_LOG = LAYOUT.key("messages", user_id="bob", session_id="s1")
BOB_SESSION = LAYOUT.key("session", user_id="bob", session_id="s1")
BOB = LAYOUT.key("user", user_id="bob")
OWN_PERSONAS = LAYOUT.parent("persona", user_id="carol")
BESIDE = {
    "the users": f"{LAYOUT.users}/readme.txt",
    "the sessions": f"{LAYOUT.parent('session', user_id=USER)}/profile.json.bak",
    "the panels": f"{LAYOUT.panels}/important.tmp",
}
ORPHAN = LAYOUT.key("document", **NAMES, document="report~7.pdf")
ORPHAN_ANALYSIS = LAYOUT.key("analysis", **NAMES, document="report~7.pdf")
INSIGHT = LAYOUT.key("insight", panel_id=PANEL, insight_id="insight_x")
FOREIGN = LAYOUT.trash_folder("old things")

EVERYWHERE = [
    Sample("bad line", (("bad-line", LOG),), insert(LOG, 2, b'{"id":"m9","role":"us\n'), changed={LOG}),
    Sample("glued lines", (("bad-line", LOG),), insert(LOG, 5, line("m8")[:-9] + line("m9")), changed={LOG}),
    Sample("not UTF-8", (("bad-line", LOG),), insert(LOG, 0, b'{"id":"\xff"}\n'), changed={LOG}),
    Sample("no role", (("bad-line", LOG),), insert(LOG, 1, line("m9", role="")), changed={LOG}),
    Sample("NaN", (("bad-line", LOG),), insert(LOG, 1, line("m9", metadata={"x": float("nan")})), changed={LOG}),
    Sample(
        "two bad lines",
        (("bad-line", PANEL_LOG), ("bad-line", PANEL_LOG)),
        insert(PANEL_LOG, 1, b"?\n?\n"),
        changed={PANEL_LOG},
    ),
    Sample("NUL bytes", (("nul-bytes", LOG),), insert(LOG, 3, b"\0" * 5000 + b"\n"), changed={LOG}),
    Sample("NULs before a line", (("nul-bytes", LOG),), insert(LOG, 3, b"\0" * 9 + line("m9")), changed={LOG}),
    Sample(
        "oversized line",
        (("oversized-line", LOG),),
        insert(LOG, 2, line("m9", content="x" * MAX_LINE_BYTES)),
        changed={LOG},
    ),
    Sample("the same id twice", (("duplicate-id", LOG),), insert(LOG, 4, line("m1")), changed={LOG}),
    Sample("no timestamp", (("bad-timestamp", LOG),), insert(LOG, 0, line("m9", timestamp="soon")), changed={LOG}),
    Sample(
        "naive timestamp of a session",
        (("bad-timestamp", METADATA),),
        edit(METADATA, lambda content: content.update(updated_at="2026-01-31T12:00:00")),
        changed={METADATA},
    ),
    Sample(
        "no upload time",
        (("bad-timestamp", DOCUMENTS),),
        edit(DOCUMENTS, lambda content: report_entry(content).update(uploaded_at="")),
        changed={DOCUMENTS},
    ),
    Sample("half a session", (("damaged-document", METADATA),), cut(METADATA, 40), changed={METADATA}),
    Sample("empty profile", (("damaged-document", PROFILE),), cut(PROFILE, 0), changed={PROFILE}),
    Sample("half a panel", (("damaged-document", PANEL_METADATA),), cut(PANEL_METADATA, 9), changed={PANEL_METADATA}),
    Sample(
        "context without summary",
        (("damaged-document", CONTEXT),),
        edit(CONTEXT, lambda content: content.pop("summary")),
        gone={CONTEXT},
    ),
    Sample(
        "persona that is a list", (("damaged-document", OWN_PERSONA),), write(OWN_PERSONA, b"[]"), gone={OWN_PERSONA}
    ),
    Sample("half an analysis", (("damaged-document", ANALYSIS),), cut(ANALYSIS, 5), gone={ANALYSIS}),
    Sample(
        "half of the document metadata",
        (("damaged-document", DOCUMENTS),),
        cut(DOCUMENTS, 50),
        changed={DOCUMENTS},
    ),
    Sample(
        "entry of a document without size",
        (("damaged-document", DOCUMENTS),),
        edit(DOCUMENTS, lambda content: report_entry(content).pop("size")),
        gone={BLOB, ANALYSIS},
        changed={DOCUMENTS},
    ),
    Sample(
        "entry of a document outside",
        (("damaged-document", DOCUMENTS), ("orphan-file", BLOB), ("orphan-analysis", ANALYSIS)),
        edit(DOCUMENTS, lambda content: report_entry(content).update(path="../../../etc/..")),
        gone={BLOB, ANALYSIS},
        changed={DOCUMENTS},
    ),
    Sample(
        "entry of a document in an unknown compression",
        (("damaged-document", DOCUMENTS),),
        edit(DOCUMENTS, lambda content: report_entry(content).update(compression="rot13")),
        gone={BLOB, ANALYSIS},
        changed={DOCUMENTS},
    ),
    Sample(
        "entry of a document under another name",
        (("misplaced", DOCUMENTS),),
        edit(DOCUMENTS, lambda content: report_entry(content).update(filename="other.pdf")),
        repaired=False,
    ),
    Sample(
        "insight without a time",
        (("bad-timestamp", INSIGHT),),
        write(INSIGHT, b'{"id": "insight_x", "text": "by hand"}'),
        changed={INSIGHT},
    ),
    Sample(
        "session of another user",
        (("misplaced", METADATA),),
        edit(METADATA, lambda content: content.update(user_id="mallory")),
        repaired=False,
    ),
    Sample("session without its metadata", (("missing-session", METADATA),), remove(METADATA), new={METADATA}),
    Sample("user without a profile", (("missing-user", PROFILE),), remove(PROFILE), new={PROFILE}),
    Sample(
        "log from nowhere",
        (("missing-session", BOB_SESSION), ("missing-user", BOB)),
        write(BOB_LOG, line("b0")),
        new={BOB_SESSION, BOB},
    ),
    Sample(
        "panel without its metadata", (("missing-panel", PANEL_METADATA),), remove(PANEL_METADATA), new={PANEL_METADATA}
    ),
    Sample("document without its file", (("missing-file", BLOB),), remove(BLOB), gone={ANALYSIS}, changed={DOCUMENTS}),
    Sample(
        "longer file", (("wrong-size", BLOB),), write(BLOB, REPORT + b"?"), gone={BLOB, ANALYSIS}, changed={DOCUMENTS}
    ),
    Sample(
        "other file of the same size",
        (("wrong-hash", BLOB),),
        write(BLOB, REPORT[::-1]),
        gone={BLOB, ANALYSIS},
        changed={DOCUMENTS},
    ),
    Sample(
        "compressed file without its end",
        (("wrong-hash", f"{BLOB}.gz"),),
        compress_and_cut,
        gone={f"{BLOB}.gz"},
        changed={DOCUMENTS},
    ),
    Sample("file without metadata", (("orphan-file", ORPHAN),), write(ORPHAN, b"?"), harmless=True, gone={ORPHAN}),
    Sample(
        "analysis without document",
        (("orphan-analysis", ORPHAN_ANALYSIS),),
        write(ORPHAN_ANALYSIS, b"{}"),
        harmless=True,
        gone={ORPHAN_ANALYSIS},
    ),
    Sample("stray file", (("unknown-key", STRAY),), write(STRAY, b"?"), harmless=True, repaired=False),
    Sample("stray file at the top", (("unknown-key", "README"),), write("README", b"?"), harmless=True, repaired=False),
    Sample("stray trash", (("foreign-trash", FOREIGN),), write(f"{FOREIGN}/x", b"?"), harmless=True, repaired=False),
    Sample("quarantine", (("quarantined", QUARANTINED),), write(QUARANTINED, b"?"), harmless=True, repaired=False),
    *(
        Sample(f"stray file beside {what}", (("unknown-key", key),), write(key, b"?"), harmless=True, repaired=False)
        for what, key in BESIDE.items()
    ),
    Sample("file for a fixed folder", (("wrong-kind", OWN_PERSONAS),), write(OWN_PERSONAS, b"?"), gone={OWN_PERSONAS}),
    Sample("half a store file", (("damaged-store-file", STORE),), cut(STORE, 30), changed={STORE}),
    Sample("another store file", (("damaged-store-file", STORE),), write(STORE, b"{}"), changed={STORE}),
    Sample(
        "newer store",
        (("newer-format", STORE),),
        edit(STORE, lambda content: content.update(format_version=2)),
        repaired=False,
    ),
]
"""Damage that every backend can hold."""

FLAT = [
    Sample("torn tail", (("torn-tail", LOG),), on_files=tear(LOG), changed={LOG}),
    Sample("last line without its end", (("torn-tail", LOG),), on_files=tear(LOG, line("m9")[:-1]), changed={LOG}),
    Sample("NULs at the end", (("torn-tail", PANEL_LOG),), on_files=tear(PANEL_LOG, b"\0" * 4096), changed={PANEL_LOG}),
    Sample(
        "temporary file",
        (("temporary-file", f"{METADATA.rpartition('/')[0]}/*"),),
        on_files=leave_temporary,
        harmless=True,
    ),
    Sample(
        "folder for the context",
        (("wrong-kind", CONTEXT),),
        on_files=folder_for_context,
        gone={f"{CONTEXT}/stray.json"},
    ),
    Sample("pipe for the context", (("wrong-kind", CONTEXT),), on_files=pipe_for_context, repaired=False),
    Sample("link for the context", (("symbolic-link", CONTEXT),), on_files=link_context, repaired=False),
    Sample("name with a line break", (("wrong-name", "users/a*"),), on_files=wrong_name, repaired=False),
    Sample(
        "open to others", (("loose-permissions", LOG),), on_files=lambda root: (root / LOG).chmod(0o644), harmless=True
    ),
]
"""Damage that only files can have."""
