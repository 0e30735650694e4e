"""Archives of chatdb built by hand, whole ones and hostile ones, without the package's own writer of archives."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from backports import zstd

from flatfile_chat_database.config import NAMING_FIELDS, StorageConfig

MOMENT = 1_700_000_000
NAMES = {name: str(getattr(StorageConfig(), name)) for name in NAMING_FIELDS}


def message(number: int, text: str = "") -> bytes:
    return (
        json.dumps(
            {
                "id": f"m{number}",
                "role": "user",
                "content": text or f"message {number}",
                "timestamp": "2026-01-31T12:00:00.000000+00:00",
                "attachments": [],
                "metadata": {},
            }
        ).encode()
        + b"\n"
    )


def document(**fields: Any) -> bytes:
    return json.dumps(fields, indent=2).encode() + b"\n"


TIME = "2026-01-31T12:00:00.000000+00:00"
OWN = "system/config.json"
USER = "users/eve/profile.json"
SESSION = "users/eve/chat/session.json"
LOG = "users/eve/chat/messages.jsonl"
FILES = {
    OWN: document(format_version=1, store_id="other", created_at=TIME, names=NAMES),
    USER: document(user_id="eve", created_at=TIME, updated_at=TIME, profile={}),
    SESSION: document(id="chat", user_id="eve", title="t", created_at=TIME, updated_at=TIME, metadata={}),
    LOG: b"".join(map(message, range(5))),
}
"""A small store, in the order of an archive."""


@dataclass
class Draft:
    """What becomes an archive; whatever is not set otherwise is right."""

    files: list[tuple[str, bytes]] = field(default_factory=lambda: list(FILES.items()))
    header: dict[str, Any] = field(default_factory=dict)
    """Fields that are others."""
    manifest: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: {"store": 1, "user": 1, "session": 1, "messages": 1})
    header_text: bytes | None = None
    manifest_text: bytes | None = None
    checksums: list[tuple[str, bytes]] | None = None

    def members(self) -> list[tuple[str, bytes]]:
        size = sum(len(data) for _, data in self.files)
        header = {
            "format": "chatdb-archive",
            "format_version": 1,
            "kind": "backup",
            "made_by": "a test",
            "created_at": TIME,
            "store_format": 1,
            "store_id": "other",
            "user": None,
            "names": NAMES,
            "files": len(self.files),
            "bytes": size,
        } | self.header
        text = self.header_text if self.header_text is not None else pretty(header)
        lines = b"".join(sums(key, data) for key, data in self.files)
        checksums = [("checksums/00000001.sha256", lines)] if self.checksums is None else self.checksums
        manifest = {
            "format": "chatdb-archive",
            "format_version": 1,
            "files": len(self.files),
            "bytes": size,
            "counts": self.counts,
            "runs": 1,
            "sha256": hashlib.sha256(text + b"".join(data for _, data in checksums)).hexdigest(),
        } | self.manifest
        last = self.manifest_text if self.manifest_text is not None else pretty(manifest)
        files = [(f"store/{key}", data) for key, data in self.files]
        return [("chatdb.json", text), *files, *checksums, ("manifest.json", last)]

    def tar(self) -> bytes:
        return tar_of(self.members())

    def packed(self) -> bytes:
        return gz(self.tar())


def pretty(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def sums(key: str, data: bytes) -> bytes:
    return f"{hashlib.sha256(data).hexdigest()}  store/{key}\n".encode()


def gz(data: bytes) -> bytes:
    return gzip.compress(data, 1, mtime=0)


def zst(data: bytes) -> bytes:
    return bytes(zstd.compress(data))


# --- tar ---------------------------------------------------------------------------------------------------


def block(name: bytes, size: int, kind: bytes = b"0", *, size_field: bytes | None = None, link: bytes = b"") -> bytes:
    """Return a header in the form that chatdb writes, but for what is asked for."""
    fields = b"".join(
        (
            name.ljust(100, b"\0")[:100],
            b"0000600\0" + b"0000000\0" * 2,
            (size_field or b"%011o\0" % size).ljust(12, b"\0"),
            b"%011o\0" % MOMENT,
            b" " * 8,
            kind,
            link.ljust(100, b"\0"),
            b"ustar\x0000",
            bytes(64),
            b"0000000\0" * 2,
        )
    ).ljust(512, b"\0")
    return fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def member(name: str | bytes, data: bytes) -> bytes:
    raw = name if isinstance(name, bytes) else name.encode()
    if len(raw) > 100:
        records = record(b"path", raw)
        short = raw[:100].decode(errors="ignore").encode()
        head = block(b"././@PaxHeader", len(records), b"x") + padded(records)
        return head + block(short, len(data)) + padded(data)
    return block(raw, len(data)) + padded(data)


def record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + len(str(len(rest)))
    while len(str(length)) + len(rest) != length:
        length += 1
    return str(length).encode() + rest


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    return b"".join(member(name, data) for name, data in members) + bytes(1024)


def with_member(raw: bytes) -> bytes:
    """Return an archive with a raw member in it, behind the first file."""
    members = Draft().members()
    head = b"".join(member(*each) for each in members[:2])
    return gz(head + raw + b"".join(member(*each) for each in members[2:]) + bytes(1024))


def of_tarfile(change: Callable[[tarfile.TarInfo], None], **arguments: Any) -> bytes:
    """Return a whole archive that Python's tarfile made, with its members changed."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", **arguments) as archive:
        for name, data in Draft().members():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = MOMENT
            change(info)
            archive.addfile(info, io.BytesIO(data))
    return gz(out.getvalue())


def flipped(data: bytes, at: int, bit: int = 1) -> bytes:
    return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
