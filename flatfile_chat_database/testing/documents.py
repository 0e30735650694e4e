"""Cases of the contract: keys, documents, and listing them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from ..backends.base import StorageBackend
from ..backends.changes import ABSENT, Absent, Append, Delete, Edit, Move, Put, RemoveTree, Require, Truncate
from ..errors import StorageError, UnavailableError, ValidationError
from .case import LOG, BackendCase, all_of, chunks, largest_file, leaves_damage, line, lines
from .sentences import says

MODULE = "backends.base"

GOOD_KEYS = (
    "a",
    "a.b",
    "a-b",
    "ab/c",
    "ab/c d",
    "ab/C",
    "ab/~",
    "ab/%2e%2e",
    "ab/..b",
    "ab/b..",
    "ab/...",
    "ab/.hidden",
    "ab/-rf",
    "ab/con",
    "ab/nul.txt",
    "ab/note.tmp",
    "ab/note.tmp~",
    "ab/trailing ",
    "ab/trailing.",
    'ab/:*?"<>|',
    "ab/$HOME;`id`",
    "ab/'quoted'",
    "ab/张三",
    "ab/\u00e9",
    "ab/e\u0301",  # the same in another form of Unicode
    "ab/ß",
    "ab/ss",
    "ab/\u200d\ufe0f",
    "ab/🙂",
    "ab/\ufffd",
    "ab/" + "x" * 200,
    "deep/" * 10 + "key",
)
"""Legal keys, all to be kept apart and as they are."""

BAD_KEYS = (
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "../a",
    "a/..",
    "a/../b",
    "./a",
    "a/.",
    "a/./b",
    "a\\b",
    "..\\a",
    "C:\\a",
    "a\0",
    "\0",
    "a/\0b",
    "a\n",
    "a\r\nb",
    "a\tb",
    "a\x1b[2J",
    "a\x7f",
    "a\x85b",
    "a\ud800",
    "a/\udcff/b",
)
"""What is no key."""

ON_KEYS: dict[str, Callable[[StorageBackend, str], Awaitable[object]]] = {
    "read": lambda backend, key: backend.read(key),
    "write": lambda backend, key: backend.write(key, b"x"),
    "append": lambda backend, key: backend.append(key, b"x\n"),
    "delete": lambda backend, key: backend.delete(key),
    "exists": lambda backend, key: backend.exists(key),
    "read_many": lambda backend, key: backend.read_many(["a", key]),
    "read_log": lambda backend, key: backend.read_log(key),
    "stream_log": lambda backend, key: all_of(backend.stream_log(key)),
    "read_log_as": lambda backend, key: backend.read_log_as(key, bytes.strip),
    "stream_log_as": lambda backend, key: all_of(backend.stream_log_as(key, bytes.strip)),
    "count_log": lambda backend, key: backend.count_log(key),
    "find_record": lambda backend, key: backend.find_record(key, "m0"),
    "newest_records": lambda backend, key: backend.newest_records([key]),
    "write_blob": lambda backend, key: backend.write_blob(key, chunks(b"x")),
    "read_blob": lambda backend, key: all_of(backend.read_blob(key)),
    "set_aside": lambda backend, key: backend.set_aside(key, "a test"),
    "Require": lambda backend, key: backend.commit([Require(key, "It")]),
    "Absent": lambda backend, key: backend.commit([Absent(key)]),
    "Put": lambda backend, key: backend.commit([Put(key, b"x")]),
    "Put if absent": lambda backend, key: backend.commit([Put(key, b"x", ABSENT)]),
    "Delete": lambda backend, key: backend.commit([Delete(key)]),
    "Append": lambda backend, key: backend.commit([Append(key, lines(1))]),
    "Edit": lambda backend, key: backend.commit([Edit(key, "m0", line("m0"), None)]),
    "Truncate": lambda backend, key: backend.commit([Truncate(key)]),
    "Move from": lambda backend, key: backend.commit([Move(key, "target")]),
    "Move to": lambda backend, key: backend.commit([Move("source", key)]),
    "RemoveTree": lambda backend, key: backend.commit([RemoveTree(key)]),
}
"""Every way to name a key."""

ON_BROKEN = {name: call for name, call in ON_KEYS.items() if name not in ("Move from", "Move to", "RemoveTree")}


class DocumentCases(BackendCase):
    """Keys, documents, and listing them."""

    # --- keys ----------------------------------------------------------------------------------------

    @says(
        MODULE,
        "Keys are relative paths: `/`-separated segments, none of them empty, `.` or `..`, without control "
        "characters, backslashes and lone surrogates.",
    )
    async def test_every_legal_key_holds_its_own_bytes(self) -> None:
        store = await self.open()
        for key in GOOD_KEYS:
            await store.write(key, key.encode())
        assert {key: await store.read(key) for key in GOOD_KEYS} == {key: key.encode() for key in GOOD_KEYS}
        assert await store.list_keys("") == sorted(GOOD_KEYS)
        assert self.contents() == {key: key.encode() for key in GOOD_KEYS}
        for key in GOOD_KEYS:
            assert await store.delete(key)
        assert self.contents() == {}

    @says(MODULE, "Any other key raises ValidationError.")
    @pytest.mark.parametrize("call", ON_KEYS.values(), ids=ON_KEYS)
    async def test_what_is_no_key_is_refused_by_every_method(
        self, call: Callable[[StorageBackend, str], Awaitable[object]]
    ) -> None:
        store = await self.open()
        await store.write("kept", b"x")
        for key in BAD_KEYS:
            with pytest.raises(ValidationError):
                await call(store, key)
        assert self.contents() == {"kept": b"x"}

    @leaves_damage
    @says(
        MODULE,
        "A medium that cannot be read or written raises UnavailableError; what cannot be read is never reported "
        "as absent.",
    )
    async def test_a_medium_that_fails_is_not_taken_for_an_empty_one(self) -> None:
        if not self.break_folder("broken"):
            return
        store = await self.open()
        for name, call in ON_BROKEN.items():
            try:
                answer = await call(store, "broken/thing")
            except UnavailableError:
                continue
            pytest.fail(f"{name} answers {answer!r} although the medium fails")
        with pytest.raises(UnavailableError):
            await store.list_keys("broken/")
        with pytest.raises(UnavailableError):
            await store.list_children("broken")
        with pytest.raises(UnavailableError):
            await store.list_folders("broken")
        assert await store.write("other/thing", b"x"), "what is beside the damage still works"
        assert await store.read("other/thing") == b"x"

    # --- documents -----------------------------------------------------------------------------------

    @says("StorageBackend.read", "Return the bytes at `key`, or None if there are none.")
    async def test_reading_returns_the_bytes_or_none(self) -> None:
        self.poke("a/b", bytes(range(256)))
        self.poke("a/empty", b"")
        store = await self.open()
        assert await store.read("a/b") == bytes(range(256))
        assert await store.read("a/empty") == b""
        assert await store.read("a/c") is None
        assert await store.read("a") is None
        assert await store.read("c/d/e/f") is None

    @says("StorageBackend.read", "The bytes are those of one whole write, never a mixture.")
    @says("StorageBackend.write", "A reader sees the old bytes or the new ones.")
    async def test_readers_beside_a_writer_see_whole_writes_only(self) -> None:
        store = await self.open()
        versions = [bytes([65 + number]) * (1 + 50_000 * (number % 5)) for number in range(25)]
        await store.write("a/b", versions[0])
        seen: list[bytes | None] = []
        writing = True

        async def read(handle: StorageBackend) -> None:
            while writing:
                seen.append(await handle.read("a/b"))
                seen.extend(await handle.read_many(["a/b"]))
                seen.append(b"".join(await all_of(handle.read_blob("a/b"))))
                await asyncio.sleep(0)

        readers = [asyncio.create_task(read(store)) for _ in range(3)]
        for version in versions:
            await store.write("a/b", version)
            await asyncio.sleep(0)
        writing = False
        await asyncio.gather(*readers)
        assert len(seen) > 3
        assert set(seen) <= set(versions)

    @says("StorageBackend.write", "Replace the bytes at `key` whole, or create them.", "Return True.")
    async def test_writing_creates_and_replaces_whole(self) -> None:
        store = await self.open()
        for data in (b"long " * 10_000, b"short", b"", bytes(range(256)), b"half a line", b"\n"):
            assert await store.write("a/b", data) is True
            assert self.peek("a/b") == data
        assert self.peek_keys() == ["a/b"]

    @says("StorageBackend.write", "When an error is raised the old bytes are there.")
    async def test_a_write_that_fails_leaves_the_old_bytes(self) -> None:
        store = await self.open()
        await store.write("a/b", b"old")
        with largest_file(1 << 20):
            try:
                await store.write("a/b", b"new" * (1 << 20))
            except StorageError:
                expected = b"old"
            else:
                expected = b"new" * (1 << 20)  # this medium has no such limit
            assert await store.read("a/b") == expected
        assert self.contents() == {"a/b": expected}

    @says("StorageBackend.delete", "Remove what is at `key`.", "Return whether there was anything.")
    async def test_deleting_removes_one_key_and_tells_whether_it_was_there(self) -> None:
        store = await self.open()
        for key in ("a/b", "a/c", "a-d", "d"):
            await store.write(key, b"")
        assert await store.delete("a/b") is True
        assert await store.delete("a/b") is False
        assert await store.delete("a") is False
        assert await store.delete("x/y") is False
        assert sorted(self.peek_keys()) == ["a-d", "a/c", "d"]

    @says("StorageBackend.exists", "Return whether there are bytes at `key`.", "A folder is no key.")
    async def test_only_a_key_exists(self) -> None:
        self.poke("a/b/c", b"")
        store = await self.open()
        assert await store.exists("a/b/c") is True
        assert await store.exists("a/b") is False
        assert await store.exists("a") is False
        assert await store.exists("a/b/cd") is False

    @says("StorageBackend.read_many", "Return what `read` would for each key, in the order of `keys`.")
    async def test_many_documents_come_in_the_order_asked_for(self) -> None:
        store = await self.open()
        names = [f"a/{number}" for number in range(50)]
        for name in names[::2]:
            await store.write(name, name.encode())
        asked = [*names[::-1], "a/0", "a/0", "a"]
        assert await store.read_many(asked) == [await store.read(name) for name in asked]
        assert await store.read_many([]) == []

    # --- lists ---------------------------------------------------------------------------------------

    @says(
        "StorageBackend.list_keys",
        'Return all keys that begin with the text `prefix`, sorted by code point; "" lists every key.',
    )
    async def test_a_prefix_is_a_text_and_not_a_folder(self) -> None:
        keys = ["a", "a b", "a-b", "a.b/c", "ab/c", "ab/cd", "ab/c-d/e", "ab/d/e", "b", "é/\ufffd", "é/🙂", "张三/a"]
        for key in [key for key in keys if key != "a"]:
            self.poke(key, b"x")
        store = await self.open()
        await store.write("a", b"x")
        prefixes = {key[:length] for key in keys for length in range(len(key) + 1)} | {"ab/c/", "x", "a/", "b/b"}
        for prefix in sorted(prefixes):
            assert await store.list_keys(prefix) == [key for key in sorted(keys) if key.startswith(prefix)], prefix
        for odd in ("\ud800", "a\0", "ab/\udfff", "\\"):
            assert await store.list_keys(odd) == [], "no key has such a character"
            async with store.snapshot() as shown:
                assert await all_of(shown.keys(odd)) == []

    @says("StorageBackend.list_keys", "A backend's own files (locks, temporary files) are not among them.")
    async def test_a_backend_does_not_list_files_of_its_own(self) -> None:
        store = await self.open()
        expected = {"a/b", LOG, "a/blob"}

        async def listing() -> None:
            for _ in range(20):
                assert set(await store.list_keys("")) <= expected
                await asyncio.sleep(0)

        async def slow() -> AsyncIterator[bytes]:
            for _ in range(20):
                await asyncio.sleep(0)
                yield b"x" * 100_000

        work = [store.write("a/b", b"x" * 100_000), store.append(LOG, line("m0")), store.write_blob("a/blob", slow())]
        await asyncio.gather(listing(), *work)
        assert set(await store.list_keys("")) == expected

    @says(
        "StorageBackend.list_children",
        "Return the segments that follow `folder` in the keys below it, without repetition, sorted by code point.",
        '"" is the store itself.',
        "A folder that is absent has no children.",
    )
    async def test_children_are_the_next_segments(self) -> None:
        keys = ["a/b/c", "a/b/d", "a/bb", "a/b-b/x", "a/\ufffd", "a/🙂", "ab/c", "b"]
        for key in keys:
            self.poke(key, b"x")
        store = await self.open()
        for folder in ("", "a", "a/b", "a/b-b", "ab", "c", "x/y/z"):
            start = f"{folder}/" if folder else ""
            below = [key.removeprefix(start).split("/")[0] for key in keys if key.startswith(start)]
            assert await store.list_children(folder) == sorted(set(below)), folder

    @says(
        "StorageBackend.list_folders",
        "Return those children of `folder` that have keys below them, sorted by code point.",
        '"" is the store itself.',
        "A folder that is absent has none.",
        "A child that is a key is not among them.",
    )
    async def test_folders_are_children_with_keys_below_them(self) -> None:
        keys = ["a/b/c", "a/b/d", "a/bb", "a/b-b/x", "a/\ufffd/y", "a/🙂/y", "a/🙂/z/z", "ab/c", "b"]
        for key in keys:
            self.poke(key, b"x")
        store = await self.open()
        for folder in ("", "a", "a/b", "a/b-b", "a/🙂", "ab", "c", "x/y/z"):
            start = f"{folder}/" if folder else ""
            below = [key.removeprefix(start).split("/") for key in keys if key.startswith(start)]
            assert await store.list_folders(folder) == sorted({parts[0] for parts in below if len(parts) > 1}), folder

    @says("StorageBackend.list_folders", "An empty folder that the medium keeps may be.")
    @pytest.mark.parametrize("clean", [True, False])
    async def test_an_emptied_folder_is_listed_at_most(self, clean: bool) -> None:
        store = await self.open(auto_cleanup_empty_directories=clean)
        for key in ("a/b/c", "a/d/e", "f"):
            await store.write(key, b"x")
        await store.delete("a/b/c")
        folders = await store.list_folders("a")
        assert [folder for folder in folders if await store.list_keys(f"a/{folder}/")] == ["d"]
        assert set(folders) <= {"b", "d"}

    @says("StorageBackend.list_children", "An empty folder that the medium keeps may be among the children.")
    @pytest.mark.parametrize("clean", [True, False])
    async def test_an_emptied_folder_is_a_child_at_most(self, clean: bool) -> None:
        store = await self.open(auto_cleanup_empty_directories=clean)
        for key in ("a/b/c", "a/d", "e"):
            await store.write(key, b"x")
        await store.delete("a/b/c")
        assert await _children_with_keys(store, "a") == ["d"]
        assert await store.list_children("a/b") == []
        assert await store.list_keys("") == ["a/d", "e"]
        await store.commit([RemoveTree("a")])
        assert await _children_with_keys(store, "") == ["e"]


async def _children_with_keys(store: StorageBackend, folder: str) -> list[str]:
    start = f"{folder}/" if folder else ""
    children = await store.list_children(folder)
    return [
        child for child in children if await store.exists(start + child) or await store.list_keys(f"{start}{child}/")
    ]
