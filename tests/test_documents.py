"""Documents: files that are uploaded to a session, what is known of them, and their analyses."""

import asyncio
import gzip
import hashlib
import io
import json
import logging
import os
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from flatfile_chat_database import (
    ConflictError,
    DurabilityError,
    IntegrityError,
    NotFoundError,
    StorageError,
    StorageLimitExceeded,
    StorageManager,
    UnavailableError,
    ValidationError,
)
from flatfile_chat_database.backends.changes import Change, Outcome
from flatfile_chat_database.records import content, documents
from flatfile_chat_database.records.store import Store

from .clock import FixedClock
from .conftest import MakeStorage
from .contents import NOT_JSON, contents, key_of, unchanged

SESSION = {"user_id": "ada", "session_id": "s"}
BLOCK = content.BLOCK_BYTES


@pytest.fixture
async def session(storage: StorageManager) -> StorageManager:
    """A store with one session of one user."""
    await begin(storage)
    return storage


async def begin(storage: StorageManager) -> None:
    await storage.create_user("ada")
    await storage.create_session("ada", session_id="s")


async def save(storage: StorageManager, filename: str, content: Any, **metadata: Any) -> str:
    return await storage.save_document("ada", "s", filename, content, metadata or None)


async def read(storage: StorageManager, filename: str) -> bytes | None:
    return await storage.get_document("ada", "s", filename)


async def chunks_of(*pieces: Any) -> AsyncIterator[Any]:
    for piece in pieces:
        await asyncio.sleep(0)
        yield piece


async def known(storage: StorageManager) -> dict[str, Any]:
    data = await storage.backend.read(key_of(storage, "documents", **SESSION))
    return {} if data is None else dict(json.loads(data)["documents"])


async def blobs(storage: StorageManager) -> list[str]:
    """Return the names on disk of the session's files and analyses."""
    folder = key_of(storage, "documents", **SESSION).rpartition("/")[0]
    found = await storage.backend.list_keys(f"{folder}/")
    return [key[len(folder) + 1 :] for key in found if key != key_of(storage, "documents", **SESSION)]


async def rewrite(storage: StorageManager, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the metadata by the back door."""
    entries = await known(storage)
    changed = change(entries)
    await storage.backend.write(
        key_of(storage, "documents", **SESSION),
        json.dumps({"documents": entries if changed is None else changed}).encode(),
    )


# --- saving and reading --------------------------------------------------------------------------------


async def test_a_saved_file_is_read_back_byte_for_byte(session: StorageManager) -> None:
    everything = bytes(range(256)) * 5
    await save(session, "report.pdf", everything)
    assert await read(session, "report.pdf") == everything


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_bytes_of_every_kind_are_saved(session: StorageManager, kind: type[Any]) -> None:
    await save(session, "a.txt", kind(b"content"))
    assert await read(session, "a.txt") == b"content"


async def test_bytes_that_are_changed_while_they_are_saved_are_saved_as_they_were_given(
    session: StorageManager,
) -> None:
    given = bytearray(b"before")
    saving = asyncio.ensure_future(save(session, "a.txt", given))
    await asyncio.sleep(0)
    given[:] = b"behind"
    await saving
    assert await read(session, "a.txt") == b"before"


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
@pytest.mark.parametrize("source", ["bytes", "path", "stream"])
@pytest.mark.parametrize("threshold", [0, 1])
async def test_every_source_of_any_size_comes_back_whole_compressed_or_not(
    make_storage: MakeStorage, tmp_path: Path, size: int, source: str, threshold: int
) -> None:
    storage = make_storage(document_compression_threshold_bytes=threshold)
    await begin(storage)
    given = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    (tmp_path / "given").write_bytes(given)
    sources = {"bytes": given, "path": tmp_path / "given", "stream": chunks_of(given[: size // 3], given[size // 3 :])}
    await save(storage, "a.txt", sources[source])
    assert await read(storage, "a.txt") == given
    assert b"".join([block async for block in storage.stream_document("ada", "s", "a.txt")]) == given
    document = await storage.get_document_info("ada", "s", "a.txt")
    assert document is not None
    assert (document.size, document.sha256) == (size, hashlib.sha256(given).hexdigest())


async def test_a_stream_of_single_bytes_and_one_of_a_giant_chunk_come_back_whole(session: StorageManager) -> None:
    await save(session, "small.txt", chunks_of(*(b"%d" % (number % 10) for number in range(500))))
    await save(session, "giant.txt", chunks_of(b"", b"g" * (2 * BLOCK + 5), bytearray(b"!"), memoryview(b"?")))
    assert await read(session, "small.txt") == b"0123456789" * 50
    assert await read(session, "giant.txt") == b"g" * (2 * BLOCK + 5) + b"!?"


async def test_saving_returns_the_key_of_the_file_relative_to_the_store(session: StorageManager) -> None:
    path = await save(session, "report.pdf", b"content")
    assert path == "users/ada/s/documents/report.pdf"
    assert await session.backend.read(path) == b"content"
    assert [document.path for document in await session.list_documents("ada", "s")] == [path]


async def test_what_is_known_of_a_file_is_returned(make_storage: MakeStorage) -> None:
    clock = FixedClock()
    storage = make_storage(clock=clock)
    await begin(storage)
    clock.advance(60)
    await save(storage, "notes.md", b"# Notes", pages=1, tags=["a"])
    document = await storage.get_document_info("ada", "s", "notes.md")
    assert document is not None
    assert document.filename == "notes.md"
    assert document.mime_type == "text/markdown"
    assert document.size == 7
    assert document.uploaded_at == "2026-01-31T12:01:00.000000+00:00"
    assert document.metadata == {"pages": 1, "tags": ["a"]}
    assert document.analysis == {}
    assert document.sha256 == hashlib.sha256(b"# Notes").hexdigest()


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        ("a.pdf", "application/pdf"),
        ("a.TXT", "text/plain"),
        ("a.md", "text/markdown"),
        ("a.json", "application/json"),
        ("a.csv", "text/csv"),
        ("a.png", "image/png"),
        ("a.jpg", "image/jpeg"),
        ("a.jpeg", "image/jpeg"),
        ("a.chatdb", "application/octet-stream"),
    ],
)
async def test_the_mime_type_comes_of_the_extension_on_every_machine_alike(
    make_storage: MakeStorage, filename: str, expected: str
) -> None:
    extensions = [".pdf", ".txt", ".md", ".json", ".csv", ".png", ".jpg", ".jpeg", ".chatdb"]
    storage = make_storage(allowed_document_extensions=extensions)
    await begin(storage)
    await save(storage, filename, b"x")
    assert [document.mime_type for document in await storage.list_documents("ada", "s")] == [expected]


async def test_files_are_listed_by_name_and_counted(session: StorageManager) -> None:
    for filename in ("b.txt", "ä.txt", "a.txt", "B.txt"):
        await save(session, filename, b"x")
    assert [document.filename for document in await session.list_documents("ada", "s")] == sorted(
        ["b.txt", "ä.txt", "a.txt", "B.txt"]
    )
    assert await session.count_documents("ada", "s") == 4
    assert await session.document_exists("ada", "s", "ä.txt")
    assert not await session.document_exists("ada", "s", "c.txt")


async def test_reading_what_is_absent_gives_nothing(session: StorageManager) -> None:
    for user_id, session_id, filename in (("ada", "s", "a.txt"), ("ada", "t", "a.txt"), ("bob", "s", "../a")):
        assert await session.get_document(user_id, session_id, filename) is None
        assert await session.get_document_info(user_id, session_id, filename) is None
        assert not await session.document_exists(user_id, session_id, filename)
        assert await session.list_documents(user_id, session_id) == []
        assert await session.count_documents(user_id, session_id) == 0
        with pytest.raises(NotFoundError, match="does not exist"):
            await anext(aiter(session.stream_document(user_id, session_id, filename)))


async def test_files_can_be_read_but_not_changed_read_only(make_storage: MakeStorage) -> None:
    writer = make_storage()
    await begin(writer)
    await save(writer, "a.txt", b"content")
    reader = make_storage(read_only=True)
    assert await read(reader, "a.txt") == b"content"
    async with unchanged(writer):
        with pytest.raises(UnavailableError, match="read-only"):
            await save(reader, "b.txt", b"x")
        with pytest.raises(UnavailableError, match="read-only"):
            await reader.update_document_analysis("ada", "s", "a.txt", {"a": 1})
        with pytest.raises(UnavailableError, match="read-only"):
            await reader.delete_document("ada", "s", "a.txt")


# --- names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filename", "problem"),
    [
        ("", "must not be empty"),
        ("a/b.txt", "holds a path"),
        ("../a.txt", "holds a path"),
        ("/etc/passwd.txt", "holds a path"),
        ("a\\b.txt", "holds a path"),
        (".", "holds a path"),
        ("..", "holds a path"),
        ("a\0.txt", "control characters"),
        ("a\n.txt", "control characters"),
        ("a\x9b.txt", "control characters"),
        ("a\ud800.txt", "lone surrogate"),
        ("a" * 252 + ".txt", "has 256 characters; 255 are possible"),
        ("x" * 10_000, "10000 characters"),
        ("a.exe", r"has the extension '\.exe'"),
        ("a.txt.exe", r"has the extension '\.exe'"),
        ("a", "has no extension"),
        (".txt", "has no extension"),
        ("a.txt ", r"has the extension '\.txt '"),
        (7, "must be a string, not int"),
        (None, "must be a string, not NoneType"),
        (b"a.txt", "must be a string, not bytes"),
    ],
)
async def test_a_bad_filename_is_refused_before_the_content_is_read(
    session: StorageManager, filename: Any, problem: str
) -> None:
    taken = []

    async def never() -> AsyncIterator[bytes]:
        taken.append(1)
        yield b"x"

    async with unchanged(session):
        with pytest.raises(ValidationError, match=f"filename.*{problem}"):
            await session.save_document("ada", "s", filename, never())
    assert taken == []


async def test_a_forbidden_extension_is_answered_with_those_that_are_allowed(make_storage: MakeStorage) -> None:
    storage = make_storage(allowed_document_extensions=[".Foo", ".tar"])
    await begin(storage)
    with pytest.raises(ValidationError, match=r"Allowed are \.Foo, \.tar \(allowed_document_extensions\)"):
        await save(storage, "a.txt", b"x")
    await save(storage, "a.FOO", b"x")
    assert await read(storage, "a.FOO") == b"x"


HOSTILE_FILENAMES = [
    "metadata.json",
    "METADATA.json",
    "metadata~1.json",
    "analysis.txt",
    "a.txt",
    "A.txt",
    "a .txt",
    "a:.txt",
    "a?.txt",
    "a*.txt",
    "a_.txt",
    "é.txt",
    "e\u0301.txt",
    "con.txt",
    "-rf.txt",
    "...txt",
    " .txt",
    "%2e%2e.txt",
    "~.txt",
    "张三.pdf",
    "a\u202etxt.pdf",
    "x" * 251 + ".txt",
    "张" * 251 + ".txt",
    "\u2028.txt",
    "🦊.png",
]


@pytest.mark.parametrize("threshold", [0, 1])
async def test_hostile_names_are_files_of_their_own(make_storage: MakeStorage, threshold: int) -> None:
    storage = make_storage(document_compression_threshold_bytes=threshold)
    await begin(storage)
    for number, filename in enumerate(HOSTILE_FILENAMES):
        await save(storage, filename, b"content %d" % number)
    for number, filename in enumerate(HOSTILE_FILENAMES):
        assert await read(storage, filename) == b"content %d" % number
    found = await storage.list_documents("ada", "s", strict=True)
    assert [document.filename for document in found] == sorted(HOSTILE_FILENAMES)
    names = [document.path.rpartition("/")[2].casefold() for document in found]
    assert len(set(names)) == len(HOSTILE_FILENAMES)
    assert "metadata.json" not in names
    assert all(len(name.encode()) < 240 for name in names)


async def test_a_file_can_have_the_name_of_the_metadata_under_every_configuration(make_storage: MakeStorage) -> None:
    storage = make_storage(document_metadata_filename="known.json", document_analysis_subdirectory_name="found.txt")
    await begin(storage)
    await save(storage, "known.json", b"1")
    await save(storage, "found.txt", b"2")
    await storage.update_document_analysis("ada", "s", "found.txt", {"a": 1})
    assert (await read(storage, "known.json"), await read(storage, "found.txt")) == (b"1", b"2")
    assert await blobs(storage) == ["found.txt/found~1.txt.json", "found~1.txt", "known~1.json"]


async def test_the_names_of_the_folders_come_of_the_configuration(make_storage: MakeStorage) -> None:
    storage = make_storage(document_storage_subdirectory_name="files", document_analysis_subdirectory_name="about")
    await begin(storage)
    assert await save(storage, "a.txt", b"x") == "users/ada/s/files/a.txt"
    await storage.update_document_analysis("ada", "s", "a.txt", {"a": 1})
    assert await blobs(storage) == ["a.txt", "about/a.txt.json"]


# --- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [None, 7, [b"a"], io.BytesIO(b"a"), object(), (b for b in [b"a"])])
async def test_content_of_another_type_is_refused(session: StorageManager, bad: Any) -> None:
    async with unchanged(session):
        with pytest.raises(ValidationError, match="content must be bytes, a path or an async iterable of bytes"):
            await save(session, "a.txt", bad)


async def test_text_as_content_is_refused_with_what_to_do(session: StorageManager) -> None:
    async with unchanged(session):
        with pytest.raises(ValidationError, match=r"not str\. Pass text\.encode\(\).*pathlib\.Path"):
            await save(session, "a.txt", "some text")


@pytest.mark.parametrize("bad", ["text", None, 7, [1]])
async def test_a_chunk_that_is_no_bytes_is_refused_and_leaves_nothing(session: StorageManager, bad: Any) -> None:
    await save(session, "a.txt", b"before")
    async with unchanged(session):
        with pytest.raises(ValidationError, match=f"content yielded a {type(bad).__name__}, not bytes"):
            await save(session, "a.txt", chunks_of(b"x" * (BLOCK + 1), bad))


async def test_an_error_of_the_stream_comes_through_and_leaves_nothing(session: StorageManager) -> None:
    async def breaking() -> AsyncIterator[bytes]:
        yield b"x" * (2 * BLOCK)
        raise ZeroDivisionError("the caller's own")

    await save(session, "a.txt", b"before")
    async with unchanged(session):
        with pytest.raises(ZeroDivisionError, match="the caller's own"):
            await save(session, "a.txt", breaking())
    assert await read(session, "a.txt") == b"before"


@pytest.mark.parametrize("bad", [*NOT_JSON.values()], ids=[*NOT_JSON])
async def test_metadata_that_is_no_json_object_is_refused(session: StorageManager, bad: Any) -> None:
    async with unchanged(session):
        with pytest.raises(ValidationError, match="metadata"):
            await session.save_document("ada", "s", "a.txt", b"x", bad)


async def test_a_path_that_cannot_be_read_is_refused(session: StorageManager, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    for path, problem in (
        (tmp_path / "absent.txt", "No such file"),
        (tmp_path, "no plain file"),
        (pipe, "no plain file"),
        (Path("a\0b"), "null (byte|character)"),
    ):
        async with unchanged(session):
            with pytest.raises(ValidationError, match=f"content: the file .* cannot be read: .*{problem}"):
                await save(session, "a.txt", path)


async def test_a_path_that_stops_to_be_readable_is_refused(
    session: StorageManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"x" * BLOCK)

    class Failing(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(io, "FileIO", Failing)
    async with unchanged(session):
        with pytest.raises(ValidationError, match="cannot be read: Input/output error"):
            await save(session, "a.txt", tmp_path / "a")


async def test_saving_below_what_is_absent_raises_before_the_content_is_read(session: StorageManager) -> None:
    taken = []

    async def never() -> AsyncIterator[bytes]:
        taken.append(1)
        yield b"x"

    async with unchanged(session):
        for user_id, session_id in (("ada", "t"), ("bob", "s")):
            with pytest.raises(NotFoundError, match=f"The session '{session_id}' of user '{user_id}' does not exist"):
                await session.save_document(user_id, session_id, "a.txt", never())
    assert taken == []


# --- limits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["bytes", "path", "short stream", "long stream"])
async def test_content_over_the_limit_is_refused_and_the_file_before_it_stays(
    make_storage: MakeStorage, tmp_path: Path, source: str
) -> None:
    limit = 3 * BLOCK
    storage = make_storage(max_document_size_bytes=limit)
    await begin(storage)
    await save(storage, "a.txt", b"x" * limit)
    (tmp_path / "big").write_bytes(b"y" * (limit + 1))
    sources: dict[str, Any] = {
        "bytes": b"y" * (limit + 1),
        "path": tmp_path / "big",
        "short stream": chunks_of(b"y" * (limit + 1)),
        "long stream": chunks_of(*[b"y" * 1000] * (limit // 1000 + 1)),
    }
    async with unchanged(storage):
        with pytest.raises(StorageLimitExceeded) as raised:
            await save(storage, "a.txt", sources[source])
        assert (raised.value.limit_name, raised.value.limit) == ("max_document_size_bytes", limit)
        assert raised.value.value > limit
    assert await read(storage, "a.txt") == b"x" * limit


async def test_an_endless_stream_is_left_soon_after_the_limit(make_storage: MakeStorage) -> None:
    storage = make_storage(max_document_size_bytes=BLOCK)
    await begin(storage)
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1000
            yield bytes(1000)

    async with unchanged(storage):
        with pytest.raises(StorageLimitExceeded):
            await save(storage, "a.txt", endless())
    assert taken < 3 * BLOCK


async def test_a_file_that_grows_while_it_is_read_is_held_to_the_limit(
    make_storage: MakeStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = make_storage(max_document_size_bytes=1000)
    await begin(storage)
    (tmp_path / "a").write_bytes(b"x" * 1001)
    monkeypatch.setattr(content, "_size_of_file", lambda path: 1000)
    async with unchanged(storage):
        with pytest.raises(StorageLimitExceeded):
            await save(storage, "a.txt", tmp_path / "a")


async def test_the_limit_counts_the_content_as_given_and_not_as_compressed(make_storage: MakeStorage) -> None:
    storage = make_storage(max_document_size_bytes=5000, document_compression_threshold_bytes=1)
    await begin(storage)
    await save(storage, "a.txt", bytes(5000))
    with pytest.raises(StorageLimitExceeded):
        await save(storage, "a.txt", bytes(5001))


# --- memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0, 1])
async def test_20_megabytes_pass_through_in_little_memory(flat_storage: MakeStorage, threshold: int) -> None:
    storage = flat_storage(document_compression_threshold_bytes=threshold)
    await begin(storage)
    await save(storage, "warm.txt", b"warm")
    block = os.urandom(50_000)

    async def stream() -> AsyncIterator[bytes]:
        for _ in range(400):
            yield block

    tracemalloc.start()
    try:
        await save(storage, "big.txt", stream())
        saved = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        digest = hashlib.sha256()
        async for part in storage.stream_document("ada", "s", "big.txt"):
            digest.update(part)
        streamed = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert digest.hexdigest() == hashlib.sha256(block * 400).hexdigest()
    assert saved < 6_000_000
    assert streamed < 6_000_000


async def test_a_file_is_read_from_its_path_in_little_memory(flat_storage: MakeStorage, tmp_path: Path) -> None:
    storage = flat_storage()
    await begin(storage)
    await save(storage, "warm.txt", b"warm")
    (tmp_path / "big").write_bytes(os.urandom(20_000_000))
    tracemalloc.start()
    try:
        await save(storage, "big.txt", tmp_path / "big")
        saved = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        whole = await read(storage, "big.txt")
        got = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert whole == (tmp_path / "big").read_bytes()
    assert saved < 6_000_000
    assert got < 30_000_000  # once, and the blocks on the way


# --- compression ---------------------------------------------------------------------------------------


async def test_content_from_the_threshold_on_is_stored_as_gzip(make_storage: MakeStorage) -> None:
    storage = make_storage(document_compression_threshold_bytes=1000)
    await begin(storage)
    assert await save(storage, "small.txt", b"s" * 999) == "users/ada/s/documents/small.txt"
    path = await save(storage, "large.txt", b"l" * 1000)
    assert path == "users/ada/s/documents/large.txt.gz"
    stored = await storage.backend.read(path)
    assert stored is not None
    assert len(stored) < 100
    assert gzip.decompress(stored) == b"l" * 1000
    entries = await known(storage)
    assert "compression" not in entries["small.txt"]
    assert entries["large.txt"]["compression"] == "gzip"
    assert entries["large.txt"]["size"] == 1000


async def test_the_same_content_is_compressed_to_the_same_bytes(make_storage: MakeStorage) -> None:
    storage = make_storage(document_compression_threshold_bytes=1)
    await begin(storage)
    first = await storage.backend.read(await save(storage, "a.txt", b"content" * 100))
    assert await storage.backend.read(await save(storage, "b.txt", b"content" * 100)) == first


async def test_nothing_is_compressed_by_default(session: StorageManager) -> None:
    path = await save(session, "a.txt", bytes(100_000))
    assert await session.backend.read(path) == bytes(100_000)


async def test_a_compressed_file_stays_readable_when_compression_is_switched_off(make_storage: MakeStorage) -> None:
    storage = make_storage(document_compression_threshold_bytes=1)
    await begin(storage)
    await save(storage, "a.txt", b"content")
    assert await read(make_storage(), "a.txt") == b"content"


async def test_a_file_called_gz_and_a_compressed_one_are_two(make_storage: MakeStorage) -> None:
    plain = make_storage(allowed_document_extensions=[".txt", ".gz"])
    await begin(plain)
    await save(plain, "a.txt.gz", b"plain")
    squeezed = make_storage(document_compression_threshold_bytes=1)
    assert await save(squeezed, "a.txt", b"squeezed") == "users/ada/s/documents/a~1.txt.gz"
    assert await read(plain, "a.txt.gz") == b"plain"
    assert await read(plain, "a.txt") == b"squeezed"


# --- replacing -----------------------------------------------------------------------------------------


async def test_saving_a_name_again_replaces_the_file_and_clears_its_analysis(session: StorageManager) -> None:
    await save(session, "a.txt", b"first", version=1)
    await session.update_document_analysis("ada", "s", "a.txt", {"summary": "of the first"})
    await save(session, "a.txt", b"second")
    document = await session.get_document_info("ada", "s", "a.txt")
    assert document is not None
    assert (document.metadata, document.analysis, document.size) == ({}, {}, 6)
    assert await read(session, "a.txt") == b"second"
    assert await blobs(session) == ["a~1.txt"]
    await save(session, "a.txt", b"third")
    assert await blobs(session) == ["a.txt"]


async def test_many_saves_of_one_name_at_once_leave_one_of_them_whole(make_storage: MakeStorage) -> None:
    storage, other = make_storage(), make_storage()
    await begin(storage)
    given = [bytes([number]) * (BLOCK if number % 2 else 100) for number in range(12)]

    async def one(number: int) -> None:
        content: Any = given[number] if number % 3 else chunks_of(given[number], given[number])
        await save(other if number % 2 else storage, "a.txt", content, number=number)

    await asyncio.gather(*(one(number) for number in range(12)))
    document = await storage.get_document_info("ada", "s", "a.txt")
    assert document is not None
    number = document.metadata["number"]
    assert await read(storage, "a.txt") == given[number] * (1 if number % 3 else 2)
    assert len(await blobs(storage)) == 1


async def test_many_files_saved_at_once_are_all_there(make_storage: MakeStorage) -> None:
    storage, other = make_storage(), make_storage()
    await begin(storage)
    await asyncio.gather(
        *(save(other if number % 2 else storage, f"{number}.txt", b"%d" % number) for number in range(20))
    )
    assert await storage.count_documents("ada", "s") == 20
    assert [await read(other, f"{number}.txt") for number in range(20)] == [b"%d" % number for number in range(20)]


async def test_names_that_differ_only_in_case_get_different_names_on_disk_even_at_once(
    session: StorageManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_blob = session.backend.write_blob
    both = asyncio.Event()
    written = []

    async def wait_for_both(key: str, chunks: AsyncIterator[bytes]) -> bool:
        answer = await write_blob(key, chunks)
        written.append(key)
        if len(written) == 2:
            both.set()
        await both.wait()
        return answer

    monkeypatch.setattr(session.backend, "write_blob", wait_for_both)
    paths = await asyncio.gather(save(session, "A.txt", b"upper"), save(session, "a.txt", b"lower"))
    assert len({path.casefold() for path in paths}) == 2
    assert sorted(written) != sorted(paths)
    assert (await read(session, "A.txt"), await read(session, "a.txt")) == (b"upper", b"lower")
    assert sorted(f"users/ada/s/documents/{name}" for name in await blobs(session)) == sorted(paths)


@pytest.mark.damage
async def test_what_stands_under_a_name_without_being_known_is_never_overwritten(
    session: StorageManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = "users/ada/s/documents/a.txt"
    await session.backend.write(foreign, b"foreign")
    assert await save(session, "a.txt", b"mine") == "users/ada/s/documents/a~1.txt"
    assert await session.backend.read(foreign) == b"foreign"


@pytest.mark.damage
async def test_a_stream_whose_name_on_disk_is_taken_before_its_end_has_to_be_sent_again(
    session: StorageManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = "users/ada/s/documents/a~5.txt"

    async def overtaken() -> AsyncIterator[bytes]:
        yield bytes(2 * BLOCK)
        await session.backend.write(foreign, b"foreign")
        yield bytes(2 * BLOCK)

    monkeypatch.setattr(documents, "_random_generation", lambda: 5)
    with pytest.raises(ConflictError, match="Send it again"):
        await save(session, "a.txt", overtaken())
    assert await blobs(session) == ["a~5.txt"]
    assert await session.list_documents("ada", "s") == []
    monkeypatch.undo()
    path = await save(session, "a.txt", chunks_of(bytes(2 * BLOCK)))
    assert await session.backend.read(path) == bytes(2 * BLOCK)
    assert await session.backend.read(foreign) == b"foreign"


async def test_a_file_that_is_replaced_while_it_is_streamed_still_comes_whole(session: StorageManager) -> None:
    old = os.urandom(4 * BLOCK)
    await save(session, "a.txt", old)
    stream = session.stream_document("ada", "s", "a.txt")
    parts = [await anext(aiter(stream))]
    await save(session, "a.txt", b"new")
    await save(session, "a.txt", b"newer")
    await session.delete_document("ada", "s", "a.txt")
    parts += [part async for part in stream]
    assert b"".join(parts) == old
    assert all(len(part) <= BLOCK for part in parts)


async def test_a_stream_can_be_left_early(session: StorageManager) -> None:
    await save(session, "a.txt", os.urandom(4 * BLOCK))
    async for part in session.stream_document("ada", "s", "a.txt"):
        assert part
        break
    assert await session.delete_document("ada", "s", "a.txt")


@pytest.mark.parametrize("times", [1, 2, 3])
async def test_a_reader_that_a_replacement_overtakes_reads_the_new_file(
    session: StorageManager, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    await save(session, "a.txt", b"the first content")
    read_blob = session.backend.read_blob
    overtaken = False

    async def overtake(key: str) -> AsyncIterator[bytes]:
        nonlocal overtaken
        if not overtaken:
            overtaken = True
            for number in range(times):  # after two of them the name on disk is the same again
                await save(session, "a.txt", b"new %d" % number)
        async for chunk in read_blob(key):
            yield chunk

    monkeypatch.setattr(session.backend, "read_blob", overtake)
    assert await read(session, "a.txt") == b"new %d" % (times - 1)


async def test_a_reader_that_a_deletion_overtakes_finds_nothing(
    session: StorageManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    await save(session, "a.txt", b"content")
    read_blob = session.backend.read_blob

    async def overtake(key: str) -> AsyncIterator[bytes]:
        await session.delete_document("ada", "s", "a.txt")
        async for chunk in read_blob(key):
            yield chunk

    monkeypatch.setattr(session.backend, "read_blob", overtake)
    assert await read(session, "a.txt") is None


async def test_a_reader_that_is_overtaken_for_ever_gives_up(
    session: StorageManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    await save(session, "a.txt", b"content")
    read_blob = session.backend.read_blob

    async def overtake(key: str) -> AsyncIterator[bytes]:
        chunks = [chunk async for chunk in read_blob(key)]
        await save(session, "a.txt", b"anew")
        for chunk in chunks:
            yield chunk

    monkeypatch.setattr(session.backend, "read_blob", overtake)
    monkeypatch.setattr(documents, "_TRIES", 3)
    with pytest.raises(ConflictError, match="replaced faster than it can be read"):
        await read(session, "a.txt")


async def test_a_list_never_shows_the_analysis_of_another_file(
    session: StorageManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    await save(session, "a.txt", b"first")
    read_many = session.backend.read_many
    overtaken = False

    async def overtake(keys: Sequence[str]) -> list[bytes | None]:
        nonlocal overtaken
        if not overtaken:
            overtaken = True
            await save(session, "a.txt", b"second")
            await save(session, "a.txt", b"third")
            await session.update_document_analysis("ada", "s", "a.txt", {"of": "third"})
        return await read_many(keys)

    monkeypatch.setattr(session.backend, "read_many", overtake)
    (document,) = await session.list_documents("ada", "s")
    assert (document.size, document.analysis) == (5, {"of": "third"})
    assert document.sha256 == hashlib.sha256(b"third").hexdigest()


# --- failures on the way -------------------------------------------------------------------------------


async def test_an_upload_that_is_cancelled_leaves_nothing(session: StorageManager) -> None:
    await save(session, "a.txt", b"before")
    reached = asyncio.Event()

    async def stalling() -> AsyncIterator[bytes]:
        yield b"x" * (2 * BLOCK)
        reached.set()
        await asyncio.Event().wait()

    async with unchanged(session):
        upload = asyncio.ensure_future(save(session, "a.txt", stalling()))
        await reached.wait()
        upload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await upload
    assert await read(session, "a.txt") == b"before"


async def test_an_upload_that_is_cancelled_while_it_waits_for_another_leaves_nothing(
    session: StorageManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    retry = Store.retry
    go, both = asyncio.Event(), asyncio.Event()
    waiting = []

    async def slow(store: Store, key: str, attempt: Callable[[], Awaitable[Any]]) -> Any:
        async def wait() -> Any:
            await go.wait()
            return await attempt()

        waiting.append(key)
        if len(waiting) == 2:
            both.set()
        return await retry(store, key, wait)

    monkeypatch.setattr(Store, "retry", slow)
    first = asyncio.ensure_future(save(session, "a.txt", b"first"))
    second = asyncio.ensure_future(save(session, "b.txt", b"second"))
    await both.wait()
    assert await blobs(session) == ["a.txt", "b.txt"]
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    go.set()
    await first
    assert await blobs(session) == ["a.txt"]


async def test_a_medium_that_refuses_the_content_is_reported_and_nothing_has_changed(
    session: StorageManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(key: str, chunks: AsyncIterator[bytes]) -> bool:
        raise UnavailableError("No space left on device.")

    monkeypatch.setattr(session.backend, "write_blob", refuse)
    async with unchanged(session):
        with pytest.raises(UnavailableError, match="No space left"):
            await save(session, "a.txt", b"content")


@pytest.mark.parametrize("error", [UnavailableError, IntegrityError])
async def test_a_file_that_cannot_be_named_is_removed_again(
    session: StorageManager, monkeypatch: pytest.MonkeyPatch, error: type[StorageError]
) -> None:
    await save(session, "a.txt", b"before")
    commit = session.backend.commit

    async def fail(changes: Sequence[Change]) -> list[Outcome]:
        if len(changes) > 1:
            raise error("as the test wants it")
        return await commit(changes)

    monkeypatch.setattr(session.backend, "commit", fail)
    async with unchanged(session):
        with pytest.raises(error, match="as the test wants it"):
            await save(session, "a.txt", b"after")


async def test_a_file_that_may_have_been_named_is_not_removed(
    session: StorageManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = session.backend.commit

    async def unsure(changes: Sequence[Change]) -> list[Outcome]:
        await commit(changes)
        raise DurabilityError()

    monkeypatch.setattr(session.backend, "commit", unsure)
    if session.backend.__class__.__name__ == "MemoryBackend":  # its blobs are documents, committed as such
        monkeypatch.setattr(session.backend, "write_blob", _plain_write_blob(session))
    with pytest.raises(DurabilityError):
        await save(session, "a.txt", b"content")
    monkeypatch.undo()
    assert await read(session, "a.txt") == b"content"


def _plain_write_blob(storage: StorageManager) -> Callable[[str, AsyncIterator[bytes]], Any]:
    async def write_blob(key: str, chunks: AsyncIterator[bytes]) -> bool:
        return await storage.backend.write(key, b"".join([chunk async for chunk in chunks]))

    return write_blob


async def test_a_session_that_is_deleted_during_an_upload_gets_no_file(session: StorageManager) -> None:
    async def deleting() -> AsyncIterator[bytes]:
        yield b"x" * (2 * BLOCK)
        assert await session.delete_session("ada", "s")
        yield b"y" * (2 * BLOCK)

    with pytest.raises(NotFoundError, match="The session 's' of user 'ada'"):
        await save(session, "a.txt", deleting())
    assert await blobs(session) == []
    (entry,) = await session.list_trash()
    await session.undelete(entry.id)
    assert await session.list_documents("ada", "s") == []


# --- analyses ------------------------------------------------------------------------------------------


async def test_analyses_are_merged_by_key_and_returned_with_the_file(session: StorageManager) -> None:
    await save(session, "a.txt", b"x")
    assert await session.update_document_analysis("ada", "s", "a.txt", {"a": 1, "b": {"c": 2}})
    assert await session.update_document_analysis("ada", "s", "a.txt", {"b": [3], "d": None})
    assert await session.update_document_analysis("ada", "s", "a.txt", {})
    document = await session.get_document_info("ada", "s", "a.txt")
    assert document is not None
    assert document.analysis == {"a": 1, "b": [3], "d": None}
    assert await session.list_documents("ada", "s") == [document]
    assert await blobs(session) == ["a.txt", "analysis/a.txt.json"]


async def test_no_analysis_of_many_at_once_is_lost(make_storage: MakeStorage) -> None:
    storage, other = make_storage(), make_storage()
    await begin(storage)
    await save(storage, "a.txt", b"x")
    await asyncio.gather(
        *(
            (other if number % 2 else storage).update_document_analysis("ada", "s", "a.txt", {str(number): number})
            for number in range(16)
        )
    )
    document = await storage.get_document_info("ada", "s", "a.txt")
    assert document is not None
    assert document.analysis == {str(number): number for number in range(16)}


async def test_an_analysis_of_what_is_absent_is_refused(session: StorageManager) -> None:
    await save(session, "a.txt", b"x")
    async with unchanged(session):
        with pytest.raises(NotFoundError, match=r"The file 'b\.txt' of session 's' of user 'ada' does not exist"):
            await session.update_document_analysis("ada", "s", "b.txt", {"a": 1})
        with pytest.raises(NotFoundError):
            await session.update_document_analysis("ada", "t", "a.txt", {"a": 1})


@pytest.mark.parametrize("bad", [*NOT_JSON.values(), None], ids=[*NOT_JSON, "None"])
async def test_an_analysis_that_is_no_json_object_is_refused(session: StorageManager, bad: Any) -> None:
    await save(session, "a.txt", b"x")
    async with unchanged(session):
        with pytest.raises(ValidationError, match="analysis"):
            await session.update_document_analysis("ada", "s", "a.txt", bad)


async def test_an_analysis_that_a_replacement_overtakes_goes_to_the_new_file(
    session: StorageManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    await save(session, "a.txt", b"first")
    exists = False
    commit = session.backend.commit

    async def overtake(changes: Sequence[Change]) -> list[Outcome]:
        nonlocal exists
        if not exists:
            exists = True
            await save(session, "a.txt", b"second")
        return await commit(changes)

    monkeypatch.setattr(session.backend, "commit", overtake)
    await session.update_document_analysis("ada", "s", "a.txt", {"a": 1})
    (document,) = await session.list_documents("ada", "s")
    assert document.analysis == {"a": 1}
    assert await blobs(session) == ["analysis/a~1.txt.json", "a~1.txt"]


# --- damage --------------------------------------------------------------------------------------------


def compressed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


@pytest.mark.damage
@pytest.mark.parametrize(
    ("threshold", "damage", "problem"),
    [
        (0, b"conten", "it has 6 bytes, but 7 were saved"),
        (0, b"content!", "it is longer than the 7 bytes"),
        (0, b"CONTENT", "its SHA-256 is not that"),
        (0, b"", "it has 0 bytes"),
        (1, b"garbage", "cannot be read"),
        (1, b"", "has no end"),
        (1, compressed(b"content")[:-1], "has no end"),
        (1, compressed(b"content")[:-5] + b"12345", "cannot be read"),
        (1, compressed(b"content") + b"!", "more behind the end"),
        (1, compressed(b"content") + compressed(b"content"), "more behind the end"),
        (1, compressed(bytes(50_000_000)), "it is longer than the 7 bytes"),
        (1, compressed(b"CONTENT"), "its SHA-256 is not that"),
    ],
)
async def test_a_file_that_is_not_what_was_saved_is_not_handed_out(
    make_storage: MakeStorage, threshold: int, damage: bytes, problem: str
) -> None:
    storage = make_storage(document_compression_threshold_bytes=threshold)
    await begin(storage)
    path = await save(storage, "a.txt", b"content")
    await save(storage, "b.txt", b"neighbour")
    await storage.backend.write(path, damage)
    with pytest.raises(IntegrityError, match=f"The file at {path} is damaged: .*{problem}"):
        await read(storage, "a.txt")
    with pytest.raises(IntegrityError, match=problem):
        async for _ in storage.stream_document("ada", "s", "a.txt"):
            pass
    assert await read(storage, "b.txt") == b"neighbour"


@pytest.mark.damage
async def test_hashes_are_compared_only_if_the_configuration_says_so_and_sizes_always(
    make_storage: MakeStorage,
) -> None:
    storage = make_storage(validate_json_on_read=False)
    await begin(storage)
    path = await save(storage, "a.txt", b"content")
    await storage.backend.write(path, b"CONTENT")
    assert await read(storage, "a.txt") == b"CONTENT"
    await storage.backend.write(path, b"CONTEN")
    with pytest.raises(IntegrityError, match="it has 6 bytes"):
        await read(storage, "a.txt")


@pytest.mark.damage
async def test_a_file_that_is_known_but_missing_is_reported_as_damage(session: StorageManager) -> None:
    await session.backend.delete(await save(session, "a.txt", b"content"))
    with pytest.raises(
        IntegrityError, match=r"'a\.txt' is known, but there is nothing at users/ada/s/documents/a\.txt"
    ):
        await read(session, "a.txt")
    with pytest.raises(IntegrityError, match="is known, but there is nothing"):
        await session.update_document_analysis("ada", "s", "a.txt", {"a": 1})
    assert await session.document_exists("ada", "s", "a.txt")
    await save(session, "a.txt", b"again")
    assert await read(session, "a.txt") == b"again"


@pytest.mark.damage
async def test_a_file_of_a_session_without_metadata_gets_no_analysis(session: StorageManager) -> None:
    await save(session, "a.txt", b"content")
    await session.backend.delete(key_of(session, "session", **SESSION))
    async with unchanged(session):
        with pytest.raises(NotFoundError, match="The session 's' of user 'ada' does not exist"):
            await session.update_document_analysis("ada", "s", "a.txt", {"a": 1})


@pytest.mark.damage
@pytest.mark.parametrize("damage", [b"{", b"[]", b"", b'{"documents": []}', b"{}", b'{"documents": {"a.txt": '])
async def test_damaged_metadata_is_never_taken_for_none(session: StorageManager, damage: bytes) -> None:
    await save(session, "a.txt", b"x")
    await session.backend.write(key_of(session, "documents", **SESSION), damage)
    async with unchanged(session):
        for call in (
            lambda: save(session, "b.txt", b"x"),
            lambda: read(session, "a.txt"),
            lambda: session.list_documents("ada", "s"),
            lambda: session.count_documents("ada", "s"),
            lambda: session.document_exists("ada", "s", "a.txt"),
            lambda: session.update_document_analysis("ada", "s", "a.txt", {}),
            lambda: session.delete_document("ada", "s", "a.txt"),
        ):
            with pytest.raises(IntegrityError, match=r"documents/metadata\.json is damaged"):
                await call()


DAMAGED_ENTRIES: dict[str, Any] = {
    "no object": 7,
    "a field is missing": {"filename": "a.txt"},
    "a field has another type": {"size": "1"},
    "the path of the metadata": {"path": "users/ada/s/documents/metadata.json"},
    "the path of the analyses": {"path": "users/ada/s/documents/analysis"},
    "a path that goes up": {"path": ".."},
    "no path": {"path": ""},
    "an unknown compression": {"compression": "rot13"},
    "another filename": {"filename": "z.txt"},
    "no timestamp": {"uploaded_at": "yesterday"},
}


@pytest.mark.damage
@pytest.mark.parametrize("damage", [*DAMAGED_ENTRIES.values()], ids=[*DAMAGED_ENTRIES])
async def test_a_damaged_entry_hides_none_of_its_neighbours(
    session: StorageManager, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await save(session, "a.txt", b"x")
    await save(session, "b.txt", b"y")

    def break_it(entries: dict[str, Any]) -> None:
        whole = isinstance(damage, dict) and len(damage) == 1 and "filename" not in damage
        entries["a.txt"] = entries["a.txt"] | damage if whole or damage == {"filename": "z.txt"} else damage

    await rewrite(session, break_it)
    with caplog.at_level(logging.WARNING):
        assert [document.filename for document in await session.list_documents("ada", "s")] == ["b.txt"]
    assert "a.txt" in caplog.text
    with pytest.raises(IntegrityError):
        await session.list_documents("ada", "s", strict=True)
    with pytest.raises(IntegrityError):
        await session.get_document_info("ada", "s", "a.txt")
    with pytest.raises(IntegrityError):
        await read(session, "a.txt")
    assert await read(session, "b.txt") == b"y"
    await save(session, "a.txt", b"mended")
    assert await read(session, "a.txt") == b"mended"
    assert await read(session, "b.txt") == b"y"


@pytest.mark.damage
async def test_a_damaged_entry_can_be_deleted(session: StorageManager) -> None:
    await save(session, "a.txt", b"x")
    await rewrite(session, lambda entries: {"a.txt": 7})
    assert await session.delete_document("ada", "s", "a.txt")
    assert await session.list_documents("ada", "s") == []


@pytest.mark.damage
async def test_ids_and_times_of_an_entry_are_checked_only_if_the_configuration_says_so(
    make_storage: MakeStorage,
) -> None:
    storage = make_storage(validate_json_on_read=False)
    await begin(storage)
    await save(storage, "a.txt", b"x")
    await rewrite(storage, lambda entries: entries["a.txt"].update(filename="z.txt", uploaded_at="yesterday"))
    (document,) = await storage.list_documents("ada", "s", strict=True)
    assert (document.filename, document.uploaded_at) == ("a.txt", "yesterday")


@pytest.mark.damage
async def test_a_damaged_analysis_does_not_hide_its_file_from_the_list(
    session: StorageManager, caplog: pytest.LogCaptureFixture
) -> None:
    await save(session, "a.txt", b"x")
    await session.update_document_analysis("ada", "s", "a.txt", {"a": 1})
    await session.backend.write(key_of(session, "analysis", **SESSION, document="a.txt"), b"{")
    with caplog.at_level(logging.WARNING):
        (document,) = await session.list_documents("ada", "s")
    assert document.analysis == {}
    assert "analysis/a.txt.json is damaged" in caplog.text
    with pytest.raises(IntegrityError):
        await session.list_documents("ada", "s", strict=True)
    with pytest.raises(IntegrityError):
        await session.get_document_info("ada", "s", "a.txt")
    async with unchanged(session):
        with pytest.raises(IntegrityError):
            await session.update_document_analysis("ada", "s", "a.txt", {"b": 2})
    assert await read(session, "a.txt") == b"x"


async def test_fields_that_a_person_added_to_another_entry_stay(session: StorageManager) -> None:
    await save(session, "a.txt", b"x")
    await rewrite(session, lambda entries: entries["a.txt"].update(colour="green"))
    await save(session, "b.txt", b"y")
    assert (await known(session))["a.txt"]["colour"] == "green"


async def test_the_store_is_the_same_after_a_file_was_saved_and_deleted_for_good(make_storage: MakeStorage) -> None:
    storage = make_storage(backup_before_delete=False)
    await begin(storage)
    await save(storage, "a.txt", b"x")
    await storage.delete_document("ada", "s", "a.txt")
    before = await contents(storage)
    await save(storage, "b.txt", b"y")
    await storage.update_document_analysis("ada", "s", "b.txt", {"a": 1})
    assert await storage.delete_document("ada", "s", "b.txt")
    assert await contents(storage) == before
