"""Archives that lie: none of them changes anything, and each is refused with what is wrong with which member."""

import asyncio
import io
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flatfile_chat_database.backends.base import StorageBackend
from flatfile_chat_database.backends.opening import open_backend
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.errors import StorageError
from flatfile_chat_database.models import Message
from flatfile_chat_database.storage import StorageManager
from flatfile_chat_database.transfer import Limits, import_archive, packing, restore

from .archives import (
    FILES,
    LOG,
    NAMES,
    OWN,
    SESSION,
    USER,
    Draft,
    block,
    flipped,
    gz,
    member,
    message,
    of_tarfile,
    padded,
    pretty,
    record,
    sums,
    tar_of,
    with_member,
    zst,
)

pytestmark = pytest.mark.slow  # nothing in it depends on the version of Python

Make = Callable[[], bytes]
TAR = Draft().tar()
TRASH = "system/trash/20260131_120000_000000_session_0a1b2c3d"
DOCUMENTS = "users/eve/chat/documents"


def named(name: str | bytes) -> Make:
    """Put one more member with some name into an archive that is right but for that."""
    return lambda: with_member(member(name, b"x"))


def listed(key: str, data: bytes = b"x", **more: Any) -> Make:
    """Put one more file into an archive, at its place in the order, listed and counted as it should be."""

    def make() -> bytes:
        files = sorted([*FILES.items(), (key, data)], key=lambda each: rank(each[0]))
        return Draft(files=files, **more).packed()

    return make


def rank(key: str) -> str:
    """Return what the order of an archive is by."""
    if key.startswith("users/"):
        key = re.sub("/(profile|session).json$", "/\x01", key).replace("/messages.jsonl", "/\x02")
    return "" if key == OWN else key


def kind(letter: bytes, link: bytes = b"", size: int = 0) -> Make:
    return lambda: with_member(block(b"store/users/eve/chat/x", size, letter, link=link) + padded(bytes(size)))


def extended(*records: bytes, name: bytes = b"store/users/eve/profile.json", letter: bytes = b"x") -> Make:
    """Put an extended header before a file."""
    data = b"".join(records)
    return lambda: with_member(
        block(b"././@PaxHeader", len(data), letter) + padded(data) + block(name, 1) + padded(b"x")
    )


def header(**fields: Any) -> Make:
    return lambda: Draft(header=fields).packed()


def manifest(**fields: Any) -> Make:
    return lambda: Draft(manifest=fields).packed()


def header_text(text: bytes) -> Make:
    return lambda: Draft(header_text=text).packed()


def manifest_text(text: bytes) -> Make:
    return lambda: Draft(manifest_text=text).packed()


def checksums(*members: tuple[str, bytes]) -> Make:
    return lambda: Draft(checksums=list(members)).packed()


def without(name: str) -> Make:
    return lambda: gz(tar_of([each for each in Draft().members() if each[0] != name]))


def other_header(**changes: Any) -> bytes:
    """Return the text of a right header, with raw JSON in the place of values."""
    text = Draft().members()[0][1].decode()
    for name, value in changes.items():
        replace = partial(_with_value, value)
        text, count = re.subn(rf'("{name}": )[^\n]*?(,?)\n', replace, text, count=1)
        assert count
    return text.encode()


def _with_value(value: str, match: re.Match[str]) -> str:
    return f"{match[1]}{value}{match[2]}\n"


def at(name: str, within: int = 0) -> int:
    """Return the offset of a member's bytes in the tar."""
    return TAR.index(name.encode() + b"\0") + 512 + within


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in Draft().members():
            archive.writestr(name, data)
    return out.getvalue()


def alike(one: str, other: str) -> Make:
    """Two documents whose names are the same for some file systems."""

    def make() -> bytes:
        more = [(f"{DOCUMENTS}/{name}", b"x") for name in sorted((one, other))]
        head = list(FILES.items())
        return Draft(files=[*head, *more], counts=Draft().counts | {"document": 2}).packed()

    return make


LIMITS = Limits()
LINES = b"".join(sums(key, data) for key, data in FILES.items())
FIRST = "checksums/00000001.sha256"
DEEP = b"[" * 100_000 + b"]" * 100_000

HOSTILE: dict[str, tuple[Make, str]] = {
    # Not an archive, or not all of one.
    "an empty file": (lambda: b"", "no archive of chatdb"),
    "other bytes": (lambda: b"\x00\x01\x02" * 1000, "no archive of chatdb"),
    "a tar that is not compressed": (lambda: TAR, "no archive of chatdb"),
    "a zip": (zipped, "no archive of chatdb"),
    "compressed text": (lambda: gz(b"hello\n" * 1000), "header"),
    "compressed nothing": (lambda: gz(b""), "truncated"),
    "the first half": (lambda: Draft().packed()[: len(Draft().packed()) // 2], "truncated"),
    "all but the last byte": (lambda: Draft().packed()[:-1], "truncated"),
    "the first half of a zst": (lambda: zst(TAR)[: len(zst(TAR)) // 2], "truncated|damaged"),
    "a tar that ends in a header": (lambda: gz(TAR[:700]), "truncated"),
    "a tar that ends in a file": (lambda: gz(TAR[: at("store/" + LOG, 10)]), "messages.jsonl.*truncated"),
    "a tar that ends behind a file": (lambda: gz(TAR[: TAR.index(b"checksums/")]), "truncated"),
    "a tar that ends before the manifest": (lambda: gz(TAR[: TAR.index(b"manifest.json")] + bytes(1024)), "truncated"),
    "a tar without its end": (lambda: gz(TAR[:-1024]), "truncated"),
    "a tar with half of its end": (lambda: gz(TAR[:-512]), "truncated"),
    "only the end of a tar": (lambda: gz(bytes(1024)), "begins with nothing"),
    # Flipped bits.
    "a bit in the compressed data": (lambda: flipped(Draft().packed(), 400), "damaged|member|archive"),
    "a bit in the sum of the compressed data": (lambda: flipped(Draft().packed(), -6), "damaged"),
    "a bit in a zst": (lambda: flipped(zst(TAR), 300), "damaged|member|archive"),
    "a bit in a file": (lambda: gz(flipped(TAR, at("store/" + LOG, 30))), "messages.jsonl.*damaged"),
    "a bit in the name of a file": (lambda: gz(flipped(TAR, at("store/" + USER, -512 + 12))), "profile.*damaged|sum"),
    "a bit in the header": (lambda: gz(flipped(TAR, at("chatdb.json", 100))), "chatdb.json|manifest.json"),
    "a bit in the hashes": (lambda: gz(flipped(TAR, at(FIRST, 3))), "damaged"),
    "a bit in the manifest": (lambda: gz(flipped(TAR, at("manifest.json", 60))), "manifest.json"),
    "a bit between members": (lambda: gz(flipped(TAR, at("store/" + USER, len(FILES[USER])))), "between"),
    "a bit in the end": (lambda: gz(flipped(TAR, len(TAR) - 100)), "goes on behind"),
    # More than one archive.
    "two archives, each compressed": (lambda: Draft().packed() * 2, "follows"),
    "two archives in one zst": (lambda: zst(TAR) * 2, "follows"),
    "two tars, compressed together": (lambda: gz(TAR * 2), "follows"),
    "something behind the compressed data": (lambda: Draft().packed() + b"x", "follows"),
    "something behind the tar": (lambda: gz(TAR + bytes(512)), "follows"),
    "a member behind the manifest": (lambda: gz(TAR[:-1024] + member("more", b"x") + bytes(1024)), "follows"),
    # Names.
    "a name that leaves its folder": (named("../evil"), r"evil: no archive"),
    "a key that leaves its folder": (named("store/../evil"), r"\.\./evil: no key"),
    "a key that leaves it later": (named("store/users/eve/../../../evil"), "no key"),
    "an absolute name": (named("/etc/passwd"), "passwd: no archive"),
    "an absolute key": (named("store//etc/passwd"), "no key"),
    "a dot in a key": (named("store/./users/eve/profile.json"), "no key"),
    "a drive": (named("C:/evil"), "no archive"),
    "a drive in a key": (named("store/C:/evil"), "no place"),
    "a backslash": (named("store/users\\eve\\profile.json"), "no key"),
    "a control character": (named("store/users/e\x1bve/profile.json"), "no key"),
    "a newline": (named("store/users/e\nve/profile.json"), "no key"),
    "no UTF-8": (named(b"store/users/\xff\xfe/profile.json"), "cannot be read"),
    "a surrogate": (named(b"store/users/\xed\xa0\x80/profile.json"), "cannot be read"),
    "no name": (named(""), "no archive"),
    "a folder for a name": (named("store/"), "no key"),
    "a file that no store has": (listed("evil.txt"), "evil.txt.*no place"),
    "a hidden file": (listed("users/eve/.bashrc"), "bashrc.*no place"),
    "the lock": (listed("system/lock"), "no place"),
    "the journal": (listed("system/journal/00000001.jsonl"), "no place"),
    "the index": (listed("system/index/eve.sqlite3"), "no place"),
    "an unfinished restore": (listed("system/restoring.json"), "no place"),
    "an unfinished write": (listed("users/eve/.01a2173f-ddb4-749b-9d43-df0ffeb457fb.tmp"), "no place"),
    "a user in capitals": (listed("users/EVE/profile.json"), "no place"),
    "a user that is a device": (listed("users/con/profile.json"), "no place"),
    "a user that is decomposed": (listed("users/e\u0301/profile.json"), "no place"),
    "a user too long": (listed(f"users/{'a' * 200}/profile.json"), "no place"),
    "a file where a folder is": (listed("users/eve/chat"), "no place"),
    "something else in the trash": (listed("system/trash/x/users/eve/profile.json"), "no place"),
    "the trash in the trash": (listed(f"{TRASH}/{TRASH}/users/eve/profile.json"), "no place"),
    "a store in the trash": (listed(f"{TRASH}/{OWN}"), "no place"),
    # Twice.
    "a file twice": (
        lambda: Draft(files=[*FILES.items(), (LOG, FILES[LOG])]).packed(), "messages.jsonl.*twice"
    ),
    "a file too late": (
        lambda: Draft(files=[(OWN, FILES[OWN]), (SESSION, FILES[SESSION]), (USER, FILES[USER])]).packed(), "too late"
    ),
    "names that differ in case": (alike("Report.txt", "report.txt"), "same as that of"),
    "names that differ in form": (alike("e\u0301.txt", "\xe9.txt"), "same as that of"),
    "names that differ in width": (alike("\uff41.txt", "a.txt"), "same as that of"),
    # What is no file.
    "a hard link": (kind(b"1", b"store/system/config.json"), "a hard link"),
    "a symbolic link": (kind(b"2", b"/etc/passwd"), "a symbolic link"),
    "a character device": (kind(b"3"), "a character device"),
    "a block device": (kind(b"4"), "a block device"),
    "a folder": (kind(b"5"), "a folder"),
    "a pipe": (kind(b"6"), "a pipe"),
    "a contiguous file": (kind(b"7"), "a contiguous file"),
    "a sparse file": (kind(b"S"), "a sparse file"),
    "a volume": (kind(b"V"), "a volume label"),
    "a file in the old form": (kind(b"\0"), "old form"),
    "a kind that nobody knows": (kind(b"Z"), "not one that chatdb writes"),
    "a long name of GNU": (kind(b"L", size=20), "a long name of GNU"),
    "a long link of GNU": (kind(b"K", size=20), "a long link name of GNU"),
    "a global extended header": (extended(record(b"path", b"x"), letter=b"g"), "a global extended header"),
    "a second name": (extended(record(b"path", b"store/system/lock")), "not one that chatdb writes"),
    "a second name that leaves": (extended(record(b"path", b"../../evil")), "not one that chatdb writes"),
    "a second size": (extended(record(b"size", b"0")), "not one that chatdb writes"),
    "a second size, negative": (extended(record(b"size", b"-1")), "not one that"),
    "a size of a thousand digits": (extended(record(b"size", b"9" * 5000)), "."),
    "two second names": (extended(record(b"path", b"a"), record(b"path", b"b")), "'path'"),
    "a link in an extended header": (extended(record(b"linkpath", b"/etc/passwd")), "'linkpath'"),
    "a sparse map of GNU": (extended(record(b"GNU.sparse.map", b"0,1")), "'GNU.sparse.map'"),
    "an extended header that lies about itself": (extended(b"99 path=x\n"), "not one that"),
    "an extended header without an end": (extended(b"11 path=xyz"), "damaged"),
    "a large extended header": (extended(record(b"path", b"x" * 10_000)), "an extended header of"),
    "an extended header before another": (
        lambda: with_member((block(b"././@PaxHeader", 0, b"x")) * 2 + member("x", b"x")),
        "PaxHeader: its header is not one",
    ),
    "a size in base 256": (
        lambda: with_member(block(b"store/x", 0, size_field=b"\x80" + bytes(10) + b"\x01")), "where a number should be"
    ),
    "a negative size": (lambda: with_member(block(b"store/x", 0, size_field=b"\xff" * 12)), "number should be"),
    "a size that is no number": (lambda: with_member(block(b"store/x", 0, size_field=b"0000000009x")), "number"),
    "a size with digits of ten": (lambda: with_member(block(b"store/x", 0, size_field=b"00000000099")), "for a number"),
    "a size too large": (lambda: gz(TAR[:1536] + block(b"store/" + OWN.encode(), 1 << 30) + TAR[2048:]), "."),
    "a size too small": (
        lambda: gz(b"".join([member(*Draft().members()[0]), block(b"store/" + OWN.encode(), 3), padded(FILES[OWN])])),
        "between|header",
    ),
    "headers of another program": (lambda: of_tarfile(lambda info: None, format=tarfile.GNU_FORMAT), "not one that"),
    "headers with an owner": (
        lambda: of_tarfile(lambda info: setattr(info, "uname", "root"), format=tarfile.USTAR_FORMAT), "not one that"
    ),
    "a set-uid file": (
        lambda: of_tarfile(lambda info: setattr(info, "mode", 0o4755), format=tarfile.USTAR_FORMAT), "not one that"
    ),
    # What the archive says of itself.
    "no header": (without("chatdb.json"), "begins with 'store/"),
    "no hashes": (without(FIRST), "hashes of the last files are missing"),
    "no file": (without("store/" + LOG), "messages.jsonl|other files"),
    "a newer format": (header(format_version=2), "has format 2; this version reads 1"),
    "a format of long ago": (header(format_version=0), "has format 0"),
    "another format": (header(format="zip"), "'zip'"),
    "a kind that there is not": (header(kind="virus"), "chatdb.json"),
    "a header that is no JSON": (header_text(b"\x00\x01"), "chatdb.json"),
    "a header that is a list": (header_text(b"[]\n"), "chatdb.json"),
    "a header that is deep": (header_text(DEEP), "chatdb.json"),
    "a header that is large": (header_text(b" " * (5 << 20)), "chatdb.json.*allowed"),
    "a header that is no UTF-8": (header_text(b'{"format": "\xff"}'), "chatdb.json"),
    "a header twice in one": (header_text(Draft().members()[0][1] * 2), "chatdb.json"),
    "a header in another form": (header_text(b" " + Draft().members()[0][1]), "not in the form"),
    "a number that is none": (header_text(other_header(files="NaN")), "chatdb.json"),
    "a number without end": (header_text(other_header(files="1e999")), "chatdb.json"),
    "a number of a thousand digits": (header_text(other_header(files="9" * 5000)), "chatdb.json"),
    "a number below nothing": (header(bytes=-1), "chatdb.json"),
    "a number that is a text": (header(files="4"), "chatdb.json"),
    "a number that is true": (header(files=True), "chatdb.json"),
    "a version that is a number with a point": (header(format_version=1.5), "chatdb.json"),
    "a field that nobody knows": (header(evil=1), "chatdb.json.*evil"),
    "names that differ": (header(names=NAMES | {"messages_filename": "../x"}), r"messages_filename='../x'"),
    "names that are missing": (header(names={}), "is missing"),
    "names that there are not": (header(names=NAMES | {"evil": "x"}), "evil is no such name"),
    "names that are numbers": (header(names=NAMES | {"messages_filename": 1}), "chatdb.json"),
    "more bytes than anybody has": (header(bytes=1 << 50), "announces"),
    "more bytes than the disk has": (header(bytes=1 << 43), "room"),
    "more files than allowed": (header(files=1 << 40), "announces"),
    "fewer files than there are": (header(files=3), "more files or bytes than chatdb.json says"),
    "fewer bytes than there are": (header(bytes=10), "more files or bytes than chatdb.json says"),
    "more files than there are": (header(files=5), "announces more files"),
    "another number of files": (manifest(files=5), "manifest.json: files"),
    "another number of bytes": (manifest(bytes=5), "manifest.json: bytes"),
    "other counts": (manifest(counts={"user": 4}), "manifest.json: counts"),
    "another number of runs": (manifest(runs=2), "manifest.json: runs"),
    "another hash of all": (manifest(sha256="0" * 64), "manifest.json: sha256"),
    "a hash that is none": (manifest(sha256="x"), "manifest.json"),
    "a manifest of another version": (manifest(format_version=9), "has format 9"),
    "a manifest that is no JSON": (manifest_text(b"}"), "manifest.json"),
    "a manifest that is deep": (manifest_text(b'{"format": ' + DEEP + b"}"), "manifest.json"),
    "a manifest with NaN": (manifest_text(b'{"format": "chatdb-archive", "format_version": NaN}'), "manifest.json"),
    "a manifest that is large": (manifest_text(b" " * (5 << 20)), "manifest.json.*allowed"),
    "a manifest before the hashes": (
        lambda: gz(tar_of([each for each in Draft().members() if each[0] != FIRST] + [(FIRST, LINES)])), "missing"
    ),
    "another hash": (checksums((FIRST, LINES[:66] + b"x" + LINES[67:])), "damaged"),
    "a hash too many": (checksums((FIRST, LINES + sums("x", b""))), "damaged|other files"),
    "a hash too few": (checksums((FIRST, LINES[: LINES.rindex(b"\n", 0, -1) + 1])), "damaged|other files"),
    "hashes of another name": (checksums(("checksums/00000002.sha256", LINES)), "00000001.sha256 should come"),
    "hashes that leave their folder": (checksums(("checksums/../evil", LINES)), "should come"),
    "hashes of nothing": (checksums((FIRST, LINES), ("checksums/00000002.sha256", b"")), "hashes of no files"),
    "hashes that are large": (checksums((FIRST, LINES + b" " * (5 << 20))), "allowed"),
    "an export with a trash": (
        listed(f"{TRASH}/users/eve/chat/session.json", header={"kind": "export"}), "nothing of the trash|is an export"
    ),
    "an export of a user with others": (header(kind="export", user="bob"), "is an export|'bob'"),
}  # fmt: skip


def config_of(backend: str, place: Path) -> StorageConfig:
    if backend == "sqlite":
        return StorageConfig(storage_url=f"sqlite:{place}/chats.db")
    return StorageConfig(storage_base_path=str(place / "chats"))


async def contents(backend: StorageBackend) -> dict[str, bytes | None]:
    return {key: await backend.read(key) for key in await backend.list_keys("")}


@pytest.fixture(scope="module", params=["flatfile", "sqlite"])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A store that nothing may change, made once for each backend."""
    place = tmp_path_factory.mktemp("kept")

    async def make() -> None:
        async with StorageManager(config_of(request.param, place)) as storage:
            await storage.create_user("ann")
            await storage.add_message("ann", await storage.create_session("ann", "chat"), Message("user", "hello"))

    asyncio.run(make())
    return request.param, place


@pytest.mark.parametrize("case", HOSTILE)
async def test_a_hostile_archive_is_refused_and_changes_nothing(
    case: str, kept: tuple[str, Path], tmp_path: Path
) -> None:
    make, expected = HOSTILE[case]
    path = tmp_path / "archive"
    path.write_bytes(make())
    await refused(path, expected, kept, tmp_path)


async def refused(path: Path, expected: str, kept: tuple[str, Path], tmp_path: Path, limits: Limits = LIMITS) -> None:
    """Restore and import an archive, each in vain."""
    name, place = kept
    with pytest.raises(StorageError) as error:
        await restore(path, config_of(name, tmp_path), limits=limits)
    assert re.search(expected, str(error.value)), f"restore says: {error.value}"
    assert [each for each in os.listdir(tmp_path) if each not in ("archive", "folder")] == [], "something is left"

    backend = open_backend(config_of(name, place))
    await backend.open()
    try:
        before = await contents(backend)
        with pytest.raises(StorageError) as error:
            await import_archive(backend, path, limits=limits)
        assert re.search(expected, str(error.value)), f"import says: {error.value}"
        assert await contents(backend) == before
    finally:
        await backend.close()


async def test_the_archive_that_all_are_made_of_is_taken(kept: tuple[str, Path], tmp_path: Path) -> None:
    for number, data in enumerate((Draft().packed(), zst(TAR))):
        path = tmp_path / f"archive{number}"
        path.write_bytes(data)
        target = tmp_path / str(number)
        target.mkdir()
        report = await restore(path, config_of(kept[0], target))
        assert report.problems == []
        backend = open_backend(config_of(kept[0], target))
        await backend.open()
        assert await contents(backend) == FILES
        await backend.close()


def test_there_are_many_hostile_archives() -> None:
    assert len(HOSTILE) >= 60
    archives = [make() for make, _ in HOSTILE.values()]
    assert len(set(archives)) == len(archives)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(files=3), "announces 4 files; 3 are allowed"),
        (Limits(bytes=100), "announces .* bytes; 100 are allowed"),
        (Limits(bytes_per_file=200), r"store/.*; 200 are allowed"),
    ],
)
async def test_limits_hold(limits: Limits, expected: str, kept: tuple[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "archive"
    path.write_bytes(Draft().packed())
    await refused(path, expected, kept, tmp_path, limits)


@pytest.mark.parametrize("pack", [gz, zst])
async def test_a_bomb_is_stopped_while_it_goes_off(
    pack: Callable[[bytes], bytes], kept: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_SLACK_BYTES", 1 << 16)
    bomb = [*FILES.items(), (f"{DOCUMENTS}/bomb.txt", bytes(3 << 20))]
    path = tmp_path / "archive"
    path.write_bytes(pack(Draft(files=bomb, counts=Draft().counts | {"document": 1}).tar()))
    await refused(path, "More than 50 bytes come out", kept, tmp_path, Limits(ratio=50))


async def test_a_window_of_gigabytes_is_not_given(kept: tuple[str, Path], tmp_path: Path) -> None:
    from backports import zstd

    options: dict[int, int] = {
        zstd.CompressionParameter.window_log: 27,
        zstd.CompressionParameter.content_size_flag: 0,
    }
    compressor = zstd.ZstdCompressor(options=options)
    path = tmp_path / "archive"
    path.write_bytes(compressor.compress(TAR) + compressor.flush())
    await refused(path, "damaged", kept, tmp_path)


# --- folders -------------------------------------------------------------------------------------------


def unpack(folder: Path) -> None:
    for name, data in Draft().members():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def replaced_by(make: Callable[[Path], object], name: str = f"store/{LOG}") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def linked_folder(folder: Path) -> None:
    (folder / "store/users").rename(folder.parent / "elsewhere")
    (folder / "store/users").symlink_to(folder.parent / "elsewhere")


def rewritten(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a symbolic link for a file": (replaced_by(lambda path: path.symlink_to("/etc/passwd")), "a symbolic link"),
    "a symbolic link for the header": (
        replaced_by(lambda path: path.symlink_to("/etc/passwd"), "chatdb.json"), "a symbolic link"
    ),
    "a symbolic link for a folder": (linked_folder, "a symbolic link"),
    "a pipe for a file": (replaced_by(os.mkfifo), "neither a file nor a folder"),
    "a folder for a file": (replaced_by(Path.mkdir), "no file"),
    "a file that is missing": (replaced_by(lambda path: None), "missing"),
    "a file too many": (lambda folder: (folder / "store/evil").write_bytes(b""), "files in the folder"),
    "another file": (lambda folder: (folder / "store" / LOG).write_bytes(message(7)), "chatdb.json says|damaged|other"),
    "a file of the same length": (
        lambda folder: (folder / "store" / LOG).write_bytes(FILES[LOG].replace(b"message", b"massage")), "damaged"
    ),
    "no header": (lambda folder: (folder / "chatdb.json").unlink(), "chatdb.json.*missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json.*missing"),
    "no hashes": (lambda folder: (folder / FIRST).unlink(), "."),
    "hashes that name other places": (rewritten(FIRST, b"0" * 64 + b"  /etc/passwd\n"), "names no file"),
    "hashes that leave the folder": (rewritten(FIRST, b"0" * 64 + b"  store/../../../etc/passwd\n"), "no key"),
    "hashes that are no text": (rewritten(FIRST, b"0" * 64 + b"  \xff\xff\n"), "names no file"),
    "hashes without end": (rewritten(FIRST, b"x" * (5 << 20)), "too long"),
    "hashes of too many": (rewritten(FIRST, LINES * 1000), "too long"),
    "a file twice": (rewritten(FIRST, LINES * 2), "twice|too late|more files"),
    "another header": (rewritten("chatdb.json", pretty({"format": "chatdb-archive"})), "chatdb.json"),
    "another manifest": (rewritten("manifest.json", json.dumps([]).encode()), "manifest.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
async def test_a_hostile_folder_is_refused_and_changes_nothing(
    case: str, kept: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    change, expected = FOLDERS[case]
    folder = tmp_path_factory.mktemp("hostile") / "folder"
    unpack(folder)
    change(folder)
    await refused(folder, expected, kept, tmp_path)


async def test_the_folder_that_all_are_made_of_is_taken(kept: tuple[str, Path], tmp_path: Path) -> None:
    unpack(tmp_path / "folder")
    assert (await restore(tmp_path / "folder", config_of(kept[0], tmp_path))).problems == []
