"""What `check` finds in a damaged store, what reading gives around the damage, and what a repair leaves."""

import ast
import asyncio
import errno
import json
import logging
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flatfile_chat_database.backends.base import StorageBackend
from flatfile_chat_database.backends.changes import Change
from flatfile_chat_database.backends.flatfile import FlatfileBackend
from flatfile_chat_database.backends.flatfile.files import Files
from flatfile_chat_database.backends.opening import open_backend
from flatfile_chat_database.check import HARMLESS, KINDS, Report, check
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.errors import ConfigurationError, ConflictError, IntegrityError
from flatfile_chat_database.layout import Shape
from flatfile_chat_database.models import Message, Problem, SituationalContext
from flatfile_chat_database.records.damage import DocumentFiles, lines
from flatfile_chat_database.records.quarantine import Quarantine
from flatfile_chat_database.storage import StorageManager

from . import damage
from .damage import EVERYWHERE, FLAT, LAYOUT, OTHER_SESSION, PANEL, SESSION, TIME, USER, Sample, build

if TYPE_CHECKING:
    from .conftest import MakeStorage

DOCS = Path(__file__).parent.parent / "docs" / "check.md"

pytestmark = pytest.mark.damage


async def contents(backend: StorageBackend) -> dict[str, bytes]:
    """Return everything that is stored."""
    found = {key: await backend.read(key) for key in await backend.list_keys("")}
    return {key: data for key, data in found.items() if data is not None}


def is_quarantine(key: str) -> bool:
    return key.startswith(f"{LAYOUT.quarantine}/")


def places(report: Report) -> Counter[tuple[str, str]]:
    return Counter((problem.kind, problem.key) for problem in report)


def expect_found(report: Report, sample: Sample) -> None:
    """Fail unless the report has exactly the problems of the sample."""
    left = [(problem.kind, problem.key) for problem in report]
    for kind, key in sample.found:
        match = next((found for found in left if found == (kind, key)), None)
        if key.endswith("*"):
            match = next((found for found in left if found[0] == kind and found[1].startswith(key[:-1])), None)
        assert match is not None, f"{kind} at {key} is not among {left}"
        left.remove(match)
    assert left == []


def expect_kept(before: dict[str, bytes], after: dict[str, bytes]) -> None:
    """Fail if bytes that were in their place before are neither there nor in the quarantine."""
    items = {key for key in after if is_quarantine(key) and key not in before and key.endswith(".bin")}
    assert {json.loads(after[f"{key.removesuffix('.bin')}.json"])["key"] for key in items} <= before.keys()
    set_aside = [after[key] for key in items]
    for key, data in before.items():
        if after.get(key) == data:
            continue
        place = LAYOUT.parse(key)
        if key in after and place is not None and place.entry.shape is Shape.LOG:
            lost = Counter(data.split(b"\n")) - Counter(after[key].split(b"\n"))
            assert all(any(line in item for item in set_aside) for line in lost), f"{key} lost {lost}"
        else:
            assert data in set_aside, f"{key} is gone"


async def prepared(make_storage: "MakeStorage", sample: Sample, root: Path) -> StorageBackend:
    """Return the backend of a store that the sample has damaged."""
    storage = make_storage()
    await build(storage)
    report = await check(storage.backend)
    assert report.problems == [], "the store is damaged before anything happened to it"
    await sample.inflict(storage.backend, root)
    return storage.backend


# --- the corpus ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sample", EVERYWHERE, ids=str)
async def test_damage_is_found_where_it_is(make_storage: "MakeStorage", store_path: Path, sample: Sample) -> None:
    await found_and_repaired(make_storage, store_path, sample)


@pytest.mark.parametrize("sample", FLAT, ids=str)
async def test_damage_of_files_is_found_where_it_is(
    flat_storage: "MakeStorage", store_path: Path, sample: Sample
) -> None:
    await found_and_repaired(flat_storage, store_path, sample)


class NotOwner(Files):
    """Files that belong to somebody else: whoever may read them all the same cannot repair their permissions."""

    def set_mode(self, path: str, mode: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), path)


async def test_permissions_of_another_owner_are_named_left_and_hinder_nothing(
    flat_storage: "MakeStorage", store_path: Path
) -> None:
    storage = flat_storage()
    await build(storage)
    await storage.close()
    (store_path / damage.LOG).chmod(0o644)
    with (store_path / damage.LOG).open("ab") as log:
        log.write(b"half a line")
    backend = FlatfileBackend(StorageConfig(), store_path, files=NotOwner())
    report = await check(backend, fix=True)
    await backend.close()
    detail = "Others may open it (mode 0644). Its permissions could not be repaired: Operation not permitted."
    assert Problem("loose-permissions", damage.LOG, detail, harmless=True) in report.problems
    assert [problem.fixed for problem in report if problem.kind == "torn-tail"] == [True]
    assert report.clean


async def found_and_repaired(make: "MakeStorage", root: Path, sample: Sample) -> None:
    backend = await prepared(make, sample, root)
    before = await contents(backend)

    report = await check(backend)
    expect_found(report, sample)
    assert not any(problem.fixed for problem in report)
    assert report.clean == sample.harmless
    assert await contents(backend) == before, "a check without fix changed something"

    report = await check(backend, fix=True)
    fixed = [problem for problem in report if problem.fixed]
    assert bool(fixed) == sample.repaired
    assert report.clean == (sample.harmless or sample.repaired)
    after = await contents(backend)
    expect_kept(before, after)
    kept = {key: data for key, data in after.items() if key in before and not is_quarantine(key)}
    assert before.keys() - after.keys() - sample.changed == sample.gone
    assert {key for key in after.keys() - before.keys() if not is_quarantine(key)} == sample.new
    assert {key for key, data in kept.items() if data != before[key]} <= sample.changed

    report = await check(backend, fix=True)
    if sample.repaired:
        assert report.clean
        assert {problem.kind for problem in report} <= {"quarantined"}
    assert await contents(backend) == after, "a second repair changed something"


def test_every_kind_has_a_sample() -> None:
    sampled = {kind for sample in (*EVERYWHERE, *FLAT) for kind, _ in sample.found}
    assert KINDS.keys() - sampled == {
        "unreadable",  # test_a_file_that_cannot_be_read_hides_nothing_else
        "unfinished-batch",  # the crash tests kill a writer in a batch
        "damaged-journal",  # tests/test_journal.py
        "damaged-database",  # tests/test_sqlite_faults.py
        "leftover",  # tests/test_sqlite.py
        "damaged-object",  # tests/test_s3.py
        "unfinished-commit",  # tests/test_s3_together.py
    }


def test_every_kind_is_explained() -> None:
    explained = re.findall(r"^\| `([a-z-]+)` \|", DOCS.read_text(), re.MULTILINE)
    assert len(explained) == len(set(explained))
    assert set(explained) == KINDS.keys()


def test_what_the_page_calls_harmless_is_harmless() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \|([^|]*)\|", DOCS.read_text(), re.MULTILINE)
    assert {kind for kind, text in rows if text.rstrip().endswith("Harmless.")} == HARMLESS


async def test_the_program_on_the_page_runs(make_storage: "MakeStorage", capsys: pytest.CaptureFixture[str]) -> None:
    [program] = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    storage = make_storage()
    await build(storage)
    names: dict[str, Any] = {"storage": storage}
    code = compile(program, DOCS, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    await eval(code, names)
    assert "The store is clean." in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("sample", [sample for sample in EVERYWHERE if sample.repaired], ids=str)
async def test_a_repaired_store_goes_on(make_storage: "MakeStorage", store_path: Path, sample: Sample) -> None:
    backend = await prepared(make_storage, sample, store_path)
    await check(backend, fix=True)
    storage = make_storage()
    await storage.add_message(USER, SESSION, Message("user", "after the repair", id="new"))
    await storage.add_panel_message(PANEL, Message("critic", "after the repair", id="new"))
    await storage.save_document(USER, SESSION, "report.pdf", b"anew")
    messages = await storage.get_messages(USER, SESSION, strict=True)
    assert [message.id for message in messages if message.id in ("m0", "m1", "m2", "m3", "m4", "new")] == [
        *("m0", "m1", "m2", "m3", "m4"),
        "new",
    ]
    assert len(await storage.list_sessions(USER, strict=True)) == 2
    assert {document.filename for document in await storage.list_documents(USER, SESSION, strict=True)} >= {
        "report.pdf"
    }
    assert len(await storage.get_messages(USER, OTHER_SESSION, strict=True)) == 5
    assert (await check(backend)).clean


async def test_all_damage_at_once_is_found_and_repaired(make_storage: "MakeStorage", store_path: Path) -> None:
    storage = make_storage()
    await build(storage)
    # Not those that keep a check from looking further, or that others undo.
    samples = [
        sample
        for sample in EVERYWHERE
        if not {"newer-format", "damaged-store-file", "misplaced"} & {kind for kind, _ in sample.found}
    ]
    for sample in samples:
        if not {damage.METADATA, damage.DOCUMENTS} & sample.gone:
            try:
                await sample.inflict(storage.backend, store_path)
            except (AssertionError, KeyError, ValueError):
                continue  # an earlier sample has removed or damaged what this one needs
    before = await contents(storage.backend)
    report = await check(storage.backend, fix=True)
    assert {problem.kind for problem in report} >= {"bad-line", "nul-bytes", "damaged-document", "missing-session"}
    assert report.clean
    expect_kept(before, await contents(storage.backend))
    report = await check(storage.backend)
    assert {problem.kind for problem in report} == {"quarantined", "unknown-key", "foreign-trash"}


async def test_a_damaged_file_in_the_trash_is_found_and_set_aside(make_storage: "MakeStorage") -> None:
    storage = make_storage()
    await build(storage)
    await storage.delete_document(USER, SESSION, "report.pdf")
    entry = next(entry for entry in await storage.list_trash() if entry.kind == "document")
    blob = f"{LAYOUT.trash_folder(entry.id)}/{damage.BLOB}"
    await storage.backend.write(blob, damage.REPORT[::-1])
    report = await check(storage.backend, fix=True)
    assert places(report) == {("wrong-hash", blob): 1}
    assert report.clean
    assert (await check(storage.backend)).clean
    assert not await storage.backend.exists(blob)


async def test_a_quarantine_without_readable_notes_is_reported_all_the_same(make_storage: "MakeStorage") -> None:
    storage = make_storage()
    await build(storage)
    item, note, lonely = (LAYOUT.key("quarantine", item=name) for name in ("a.bin", "a.json", "b.json"))
    for key, data in ((item, b"?"), (note, b"?"), (lonely, b"{}")):
        await storage.backend.write(key, data)
    report = await check(storage.backend)
    assert places(report) == {("quarantined", item): 1, ("quarantined", lonely): 1}
    assert report.clean


async def test_damage_in_the_trash_is_found_too(make_storage: "MakeStorage") -> None:
    storage = make_storage()
    await build(storage)
    (entry,) = await storage.list_trash()
    prefix = f"{LAYOUT.trash_folder(entry.id)}/"
    log = prefix + LAYOUT.key("messages", user_id=USER, session_id="deleted")
    await damage.insert(log, 0, b"?\n")(storage.backend)
    report = await check(storage.backend)
    assert places(report) == {("bad-line", log): 1}
    assert (await check(storage.backend, fix=True)).clean
    assert await storage.undelete(entry.id)
    assert [message.id for message in await storage.get_messages(USER, "deleted", strict=True)] == ["d0"]


# --- what reading gives around the damage --------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        b"?\n",
        b"\0" * 4096 + b"\n",
        b'{"id":"m9","role":"us\n',
        b"\xff\n",
        b"[]\n",
        b'{"id":1}\n',
        b"[" * 100_000 + b"\n",
    ],
    ids=["text", "NULs", "half", "not UTF-8", "list", "wrong type", "deep"],
)
async def test_a_bad_line_costs_itself_only(
    make_storage: "MakeStorage", caplog: pytest.LogCaptureFixture, line: bytes
) -> None:
    storage = make_storage()
    await build(storage)
    await damage.insert(damage.LOG, 2, line)(storage.backend)
    with caplog.at_level(logging.WARNING):
        messages = await storage.get_messages(USER, SESSION)
    assert [message.id for message in messages] == ["m0", "m1", "m2", "m3", "m4"]
    offset = len(b"".join((await contents(storage.backend))[damage.LOG].splitlines(keepends=True)[:2]))
    assert any(damage.LOG in record.message and str(offset) in record.message for record in caplog.records)
    assert await storage.count_messages(USER, SESSION) == 5
    assert [message.id for message in await storage.get_messages(USER, SESSION, 2, 1)] == ["m1", "m2"]
    assert [message.id for message in await storage.get_messages(USER, SESSION, offset=-1)] == ["m4"]
    assert [message.id async for message in storage.stream_messages(USER, SESSION)] == ["m0", "m1", "m2", "m3", "m4"]
    with pytest.raises(IntegrityError):
        await storage.get_messages(USER, SESSION, strict=True)
    with pytest.raises(IntegrityError):
        _ = [message async for message in storage.stream_messages(USER, SESSION, strict=True)]


async def test_a_log_with_a_bad_line_still_takes_messages(make_storage: "MakeStorage") -> None:
    storage = make_storage()
    await build(storage)
    await damage.insert(damage.LOG, 2, b"?\n")(storage.backend)
    assert await storage.add_message(USER, SESSION, Message("user", "more", id="m5"))
    assert [message.id for message in await storage.get_messages(USER, SESSION)][-1] == "m5"
    assert b"?\n" in (await contents(storage.backend))[damage.LOG]


async def test_history_with_a_bad_line_is_not_rewritten(make_storage: "MakeStorage") -> None:
    storage = make_storage()
    await build(storage)
    await damage.insert(damage.LOG, 4, b"?\n")(storage.backend)
    before = await contents(storage.backend)
    for change in (
        storage.update_message(USER, SESSION, "m1", {"content": "new"}),
        storage.delete_message(USER, SESSION, "m1"),
        storage.clear_messages(USER, SESSION),
    ):
        with pytest.raises(IntegrityError):
            await change
    assert await contents(storage.backend) == before


async def test_a_damaged_session_is_refused_and_its_neighbours_are_listed(
    make_storage: "MakeStorage", caplog: pytest.LogCaptureFixture
) -> None:
    storage = make_storage()
    await build(storage)
    await damage.cut(damage.METADATA, 40)(storage.backend)
    with pytest.raises(IntegrityError) as caught:
        await storage.get_session(USER, SESSION)
    assert caught.value.key == damage.METADATA
    with caplog.at_level(logging.WARNING):
        sessions = await storage.list_sessions(USER)
    assert [session.id for session in sessions] == [OTHER_SESSION]
    assert any(damage.METADATA in record.message for record in caplog.records)
    with pytest.raises(IntegrityError):
        await storage.list_sessions(USER, strict=True)
    with pytest.raises(IntegrityError):
        await storage.update_session(USER, SESSION, {"title": "written over"})
    assert len(await storage.get_messages(USER, SESSION)) == 5, "its messages are not damaged"


async def test_a_damaged_profile_is_refused_and_not_written_over(make_storage: "MakeStorage") -> None:
    storage = make_storage()
    await build(storage)
    await storage.create_user("bob")
    await damage.write(damage.PROFILE, b'{"user_id": "alice"')(storage.backend)
    before = await contents(storage.backend)
    with pytest.raises(IntegrityError):
        await storage.get_user_profile(USER)
    with pytest.raises(IntegrityError):
        await storage.update_user_profile(USER, {"language": "zh"})
    assert not await storage.create_user(USER), "there is a user, if a damaged one"
    assert [user.user_id for user in await storage.list_users()] == ["bob"]
    assert await contents(storage.backend) == before


async def test_damaged_contexts_panels_and_personas_are_refused_one_by_one(make_storage: "MakeStorage") -> None:
    storage = make_storage()
    await build(storage)
    await storage.save_persona("judge", {"name": "Judge"})
    await damage.write(damage.CONTEXT, b"{}")(storage.backend)
    await damage.cut(damage.PANEL_METADATA, 10)(storage.backend)
    await damage.write(LAYOUT.key("global_persona", persona_id="analyst"), b"\0\0\0")(storage.backend)
    with pytest.raises(IntegrityError):
        await storage.get_context(USER, SESSION)
    assert await storage.get_context(USER, OTHER_SESSION) is not None
    with pytest.raises(IntegrityError):
        await storage.get_panel(PANEL)
    assert await storage.list_panels() == []
    with pytest.raises(IntegrityError):
        await storage.get_persona("analyst")
    assert [persona["id"] for persona in await storage.list_personas()] == ["judge"]
    with pytest.raises(IntegrityError):
        await storage.list_personas(strict=True)
    await storage.update_context(USER, SESSION, SituationalContext("Replaced"))
    assert await storage.get_context(USER, SESSION) is not None


@pytest.mark.parametrize("change", [b"?", None], ids=["changed", "absent"])
async def test_a_file_that_is_not_what_was_saved_is_refused(make_storage: "MakeStorage", change: bytes | None) -> None:
    storage = make_storage()
    await build(storage)
    if change is None:
        await storage.backend.delete(damage.BLOB)
    else:
        await storage.backend.write(damage.BLOB, damage.REPORT[:-1] + change)
    with pytest.raises(IntegrityError):
        await storage.get_document(USER, SESSION, "report.pdf")
    with pytest.raises(IntegrityError):
        _ = [chunk async for chunk in storage.stream_document(USER, SESSION, "report.pdf")]
    assert await storage.get_document(USER, SESSION, "notes.txt") == b"notes"
    assert await storage.get_document(USER, OTHER_SESSION, "report.pdf") == damage.REPORT


async def test_a_document_in_the_wrong_place_is_refused_unless_validation_is_off(make_storage: "MakeStorage") -> None:
    storage = make_storage()
    await build(storage)
    await damage.edit(damage.METADATA, lambda content: content.update(id="another"))(storage.backend)
    with pytest.raises(IntegrityError):
        await storage.get_session(USER, SESSION)
    trusting = make_storage(validate_json_on_read=False)
    session = await trusting.get_session(USER, SESSION)
    assert session is not None


# --- what a repair makes -------------------------------------------------------------------------------


async def test_a_session_made_anew_begins_with_its_first_message(make_storage: "MakeStorage") -> None:
    storage = make_storage()
    await build(storage)
    await storage.backend.delete(damage.METADATA)
    assert (await check(storage.backend, fix=True)).clean
    session = await storage.get_session(USER, SESSION)
    assert session is not None
    assert (session.title, session.created_at, session.metadata) == ("", TIME, {})
    assert len(await storage.get_messages(USER, SESSION)) == 5


async def test_a_panel_made_anew_has_the_personas_that_are_there(make_storage: "MakeStorage") -> None:
    storage = make_storage()
    await build(storage)
    await storage.backend.delete(damage.PANEL_METADATA)
    assert (await check(storage.backend, fix=True)).clean
    panel = await storage.get_panel(PANEL)
    assert panel is not None
    assert (panel.type, panel.personas, panel.created_at) == ("unknown", ["analyst"], TIME)


async def test_a_message_keeps_its_place_when_its_timestamp_is_repaired(make_storage: "MakeStorage") -> None:
    storage = make_storage()
    await build(storage)
    line = damage.line("m9", timestamp="yesterday", mood="kept")
    await damage.insert(damage.LOG, 3, line)(storage.backend)
    assert len(await storage.get_messages(USER, SESSION)) == 6
    assert (await check(storage.backend, fix=True)).clean
    messages = await storage.get_messages(USER, SESSION, strict=True)
    assert [message.id for message in messages] == ["m0", "m1", "m2", "m9", "m3", "m4"]
    assert messages[3].timestamp == TIME
    assert b'"mood":"kept"' in (await contents(storage.backend))[damage.LOG], "what we do not know stays"


async def test_the_note_in_the_quarantine_says_where_the_bytes_were(make_storage: "MakeStorage") -> None:
    storage = make_storage()
    await build(storage)
    await damage.insert(damage.LOG, 0, b"first\n")(storage.backend)
    await damage.insert(damage.LOG, 2, b"second\n")(storage.backend)
    offset = (await contents(storage.backend))[damage.LOG].index(b"second")
    report = await check(storage.backend, fix=True)
    assert [re.findall(r"at byte (\d+) \(", problem.detail) for problem in report] == [["0"], [str(offset)]]
    stored = await contents(storage.backend)
    (note,) = [json.loads(data) for key, data in stored.items() if is_quarantine(key) and key.endswith(".json")]
    (item,) = [data for key, data in stored.items() if is_quarantine(key) and key.endswith(".bin")]
    assert item == b"first\nsecond\n"
    assert (note["key"], note["reason"]) == (damage.LOG, "bad-line")
    assert note["lines"] == [
        {"kind": "bad-line", "offset": 0, "size": 5},
        {"kind": "bad-line", "offset": offset, "size": 6},
    ]
    (problem,) = await check(storage.backend)
    assert (problem.kind, problem.harmless) == ("quarantined", True)
    assert damage.LOG in problem.detail


async def test_a_repair_makes_no_session_for_what_it_sets_aside(make_storage: "MakeStorage") -> None:
    storage = make_storage()
    await build(storage)
    names = {"user_id": USER, "session_id": "ghost"}
    orphan = LAYOUT.key("document", **names, document="a.txt")
    stray = f"{LAYOUT.folder('session', **names)}/notes"
    await storage.backend.write(orphan, b"?")
    await storage.backend.write(stray, b"?")
    report = await check(storage.backend, fix=True)
    assert places(report) == {("orphan-file", orphan): 1, ("unknown-key", stray): 1}
    assert places(await check(storage.backend))["unknown-key", stray] == 1


async def test_one_bad_entry_leaves_the_other_documents(make_storage: "MakeStorage") -> None:
    storage = make_storage()
    await build(storage)
    await damage.edit(damage.DOCUMENTS, lambda content: content["documents"].update({"x.pdf": 5}))(storage.backend)
    assert (await check(storage.backend, fix=True)).clean
    documents = await storage.list_documents(USER, SESSION, strict=True)
    assert [document.filename for document in documents] == ["notes.txt", "report.pdf"]
    assert documents[1].analysis == {"summary": "short"}


async def test_a_store_file_is_not_made_anew_under_other_names(make_storage: "MakeStorage") -> None:
    storage = make_storage(messages_filename="log.jsonl")
    await build(storage)
    await damage.cut(damage.STORE, 10)(storage.backend)
    before = await contents(storage.backend)
    storage.backend.config = StorageConfig()
    fresh = storage.backend
    if isinstance(fresh, FlatfileBackend):
        fresh = open_backend(StorageConfig(storage_base_path=storage.config.storage_base_path))
    report = await check(fresh, fix=True)
    assert not report.clean
    assert "log.jsonl does not fit" in report.problems[0].detail
    assert not any(problem.fixed for problem in report)
    assert await contents(fresh) == before
    if fresh is not storage.backend:
        await fresh.close()


async def test_a_store_of_other_names_is_refused_by_name(make_storage: "MakeStorage") -> None:
    storage = make_storage()
    await build(storage)
    before = await contents(storage.backend)
    for name in ("messages_filename", "system_config_directory_name"):
        other = make_storage(**{name: "others"})
        with pytest.raises(ConfigurationError, match=name):
            await other.get_messages(USER, SESSION)
        with pytest.raises(ConfigurationError, match=name):
            await other.create_user("new")
    assert await contents(storage.backend) == before


async def test_a_store_of_a_newer_format_is_refused_and_left_alone(make_storage: "MakeStorage") -> None:
    storage = make_storage()
    await build(storage)
    await damage.edit(damage.STORE, lambda content: content.update(format_version=99))(storage.backend)
    before = await contents(storage.backend)
    newer = make_storage()
    with pytest.raises(ConfigurationError, match="newer"):
        await newer.get_messages(USER, SESSION)
    with pytest.raises(ConfigurationError, match="newer"):
        await newer.add_message(USER, SESSION, Message("user", "?"))
    report = await check(storage.backend, fix=True)
    assert places(report) == {("newer-format", damage.STORE): 1}
    assert await contents(storage.backend) == before


# --- reports -------------------------------------------------------------------------------------------


async def test_a_report_counts_what_was_seen(make_storage: "MakeStorage") -> None:
    storage = make_storage()
    await build(storage)
    report = await check(storage.backend)
    assert report.counts == {
        "users": 1,
        "sessions": 2,
        "messages": 10,
        "documents": 4,
        "analyses": 2,
        "contexts": 2,
        "snapshots": 2,
        "panels": 1,
        "panel messages": 3,
        "panel personas": 1,
        "insights": 1,
        "personas": 2,
        "trash": 1,
    }
    assert "10 messages" in str(report)
    assert "clean" in str(report)


async def test_an_empty_store_is_clean_and_stays_absent(make_storage: "MakeStorage", store_path: Path) -> None:
    storage = make_storage()
    report = await check(storage.backend, fix=True)
    assert report.clean
    assert report.problems == []
    assert not store_path.exists()


def test_a_report_is_clean_when_what_is_left_is_harmless_or_fixed() -> None:
    harmless = Problem("quarantined", "k", "d", harmless=True)
    fixed = Problem("bad-line", "k", "d", fixed=True)
    broken = Problem("bad-line", "k", "d")
    assert Report([harmless, fixed]).clean
    assert not Report([harmless, broken]).clean
    assert "attention: 1" in str(Report([harmless, broken]))


async def test_a_store_with_its_users_at_the_top_is_checked_as_well(make_storage: "MakeStorage") -> None:
    storage = make_storage(user_data_directory_name="")
    await build(storage)
    report = await check(storage.backend)
    assert report.problems == []
    assert report.counts["messages"] == 10
    key = f"{USER}/{SESSION}/session.json"
    await storage.backend.delete(key)
    report = await check(storage.backend, fix=True)
    assert places(report) == {("missing-session", key): 1}
    assert (await check(storage.backend)).problems == []


# --- lines ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
async def test_lines_are_the_same_however_the_log_is_cut(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatfile_chat_database.codec.MAX_LINE_BYTES", 10)
    data = b"\nfirst\n\n\0\0\n0123456789\n0123456789a\nvery much longer than that\nlast\nhalf"

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(data), size):
            yield data[start : start + size]

    found = [item async for item in lines(chunks())]
    whole = data.split(b"\n")[:-1]
    assert [line for _, _, line in found] == [line if len(line) <= 10 else None for line in whole]
    assert [data[offset : offset + length] for offset, length, _ in found] == whole


# --- a store at work -----------------------------------------------------------------------------------


async def test_a_store_at_work_has_no_problems(make_storage: "MakeStorage") -> None:
    storage = make_storage()
    await build(storage)
    done = asyncio.Event()

    async def work(number: int) -> None:
        count = 0
        while not done.is_set():
            count += 1
            session_id = await storage.create_session(USER, "short", session_id=f"w{number}_{count}")
            await storage.add_messages(USER, session_id, [Message("user", "x" * 5000) for _ in range(3)])
            await storage.save_document(USER, session_id, "a.txt", b"a" * 3000)
            await storage.update_document_analysis(USER, session_id, "a.txt", {"n": count})
            await storage.save_document(USER, session_id, "a.txt", b"b")
            await storage.pop_message(USER, session_id)
            await storage.delete_session(USER, session_id)
            await storage.purge(user_id=USER, session_id=session_id)

    workers = [asyncio.create_task(work(number)) for number in range(4)]
    reports = []
    try:
        for _ in range(10):
            reports.append(await check(storage.backend, fix=True))
            await asyncio.sleep(0.01)
    finally:
        done.set()
        await asyncio.gather(*workers)
    assert [problem for report in reports for problem in report if not problem.harmless] == []
    assert [problem for problem in await check(storage.backend) if not problem.harmless] == []


@pytest.mark.parametrize(
    ("key", "harm", "kind"),
    [
        (damage.CONTEXT, damage.write(damage.CONTEXT, b"?"), "damaged-document"),
        (damage.DOCUMENTS, damage.cut(damage.DOCUMENTS, 9), "damaged-document"),
        (damage.METADATA, damage.remove(damage.METADATA), "missing-session"),
    ],
    ids=["context", "document metadata", "session"],
)
async def test_what_somebody_mends_during_the_repair_is_left_alone(
    make_storage: "MakeStorage",
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    harm: Callable[[StorageBackend], Awaitable[None]],
    kind: str,
) -> None:
    storage = make_storage()
    await build(storage)
    backend = storage.backend
    before = await contents(backend)
    await harm(backend)
    commit = backend.commit

    async def commit_after_another(changes: Any) -> Any:
        monkeypatch.setattr(backend, "commit", commit)
        await backend.write(key, before[key])
        return await commit(changes)

    monkeypatch.setattr(backend, "commit", commit_after_another)
    report = await check(backend, fix=True)
    assert (kind, False) in [(problem.kind, problem.fixed) for problem in report]
    assert not any(problem.fixed for problem in report)
    assert await contents(backend) == before
    assert (await check(backend)).problems == []


async def test_a_log_that_never_rests_is_left_to_the_next_check(
    make_storage: "MakeStorage", monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = make_storage()
    await build(storage)
    backend = storage.backend
    await damage.insert(damage.LOG, 2, b"?\n")(backend)

    async def always_too_late(changes: Any) -> Any:
        raise ConflictError

    with monkeypatch.context() as patch:
        patch.setattr(backend, "commit", always_too_late)
        report = await check(backend, fix=True)
    assert [(problem.kind, problem.fixed) for problem in report] == [("bad-line", False)]
    assert (await check(backend, fix=True)).clean


async def test_what_is_deleted_during_a_check_is_no_problem(
    make_storage: "MakeStorage", monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = make_storage()
    await build(storage)
    backend = storage.backend
    list_keys = backend.list_keys
    user = LAYOUT.folder("user", user_id=USER)

    async def list_then_delete(prefix: str) -> list[str]:
        keys = await list_keys(prefix)
        if prefix == f"{user}/":
            monkeypatch.setattr(backend, "list_keys", list_keys)
            await storage.delete_session(USER, SESSION)
        return keys

    monkeypatch.setattr(backend, "list_keys", list_then_delete)
    report = await check(backend, fix=True)
    assert report.problems == []
    assert report.counts["sessions"] == 1


async def test_a_message_that_comes_while_its_log_is_repaired_is_kept(
    make_storage: "MakeStorage", monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = make_storage()
    await build(storage)
    backend = storage.backend
    await damage.insert(damage.LOG, 2, b"?\n")(backend)
    commit = backend.commit

    async def commit_after_another(changes: Any) -> Any:
        monkeypatch.setattr(backend, "commit", commit)
        await backend.append(damage.LOG, damage.line("late"))
        return await commit(changes)

    monkeypatch.setattr(backend, "commit", commit_after_another)
    report = await check(backend, fix=True)
    assert [(problem.kind, problem.fixed) for problem in report] == [("bad-line", True)]
    messages = await storage.get_messages(USER, SESSION, strict=True)
    assert [message.id for message in messages] == ["m0", "m1", "m2", "m3", "m4", "late"]


@pytest.mark.parametrize("fix", [False, True])
async def test_what_looks_wrong_for_a_moment_is_not_reported(
    make_storage: "MakeStorage", monkeypatch: pytest.MonkeyPatch, fix: bool
) -> None:
    storage = make_storage()
    await build(storage)
    backend = storage.backend
    read, read_blob, list_keys = backend.read, backend.read_blob, backend.list_keys
    looks: Counter[str] = Counter()

    def first(key: str) -> bool:
        looks[key] += 1
        return looks[key] == 1

    async def changing(key: str) -> bytes | None:
        return b"{" if first(key) and key == damage.METADATA else await read(key)

    async def changing_log(key: str) -> AsyncIterator[bytes]:
        if first(key) and key in (damage.LOG, damage.BLOB):
            yield b"?\n"
        async for chunk in read_blob(key):
            yield chunk

    async def changing_list(prefix: str) -> list[str]:
        keys = await list_keys(prefix)
        return [key for key in keys if key != damage.NOTES] if first(prefix) and "documents" in prefix else keys

    before = await contents(backend)
    monkeypatch.setattr(backend, "read", changing)
    monkeypatch.setattr(backend, "read_blob", changing_log)
    monkeypatch.setattr(backend, "list_keys", changing_list)
    assert (await check(backend, fix=fix)).problems == []
    assert min(looks[key] for key in (damage.METADATA, damage.LOG, damage.BLOB)) >= 2
    monkeypatch.undo()
    assert await contents(backend) == before


async def test_only_what_was_wrong_twice_is_repaired(
    make_storage: "MakeStorage", monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = make_storage()
    await build(storage)
    backend = storage.backend
    list_keys = backend.list_keys
    await backend.write(damage.ORPHAN, b"?")
    appeared = LAYOUT.key("document", **damage.NAMES, document="appeared.txt")
    looks = 0

    async def appearing(prefix: str) -> list[str]:
        nonlocal looks
        looks += prefix == f"{LAYOUT.folder('documents', **damage.NAMES)}/"
        if looks == 2:
            await backend.write(appeared, b"being saved")
        return await list_keys(prefix)

    monkeypatch.setattr(backend, "list_keys", appearing)
    assert places(await check(backend, fix=True)) == {("orphan-file", damage.ORPHAN): 1}
    assert await backend.exists(appeared)


async def test_an_upload_that_is_about_to_be_named_is_no_orphan(make_storage: "MakeStorage") -> None:
    storage = make_storage()
    await build(storage)
    backend = storage.backend
    commit = backend.commit
    written = asyncio.Event()

    async def slow(changes: Any) -> Any:
        if any(getattr(change, "key", "") == damage.DOCUMENTS for change in changes):
            written.set()
            await asyncio.sleep(0.1)
        return await commit(changes)

    backend.commit = slow  # type: ignore[method-assign]
    saving = asyncio.create_task(storage.save_document(USER, SESSION, "new.txt", b"new"))
    await written.wait()
    report = await check(backend, fix=True)
    await saving
    assert report.problems == []
    assert await storage.get_document(USER, SESSION, "new.txt") == b"new"


async def test_a_log_is_checked_in_memory_that_does_not_grow_with_it(make_storage: "MakeStorage") -> None:
    storage = make_storage(max_messages_per_session=10**6)
    await build(storage)
    read: list[int] = []
    backend = storage.backend
    read_blob = backend.read_blob

    async def counted(key: str) -> AsyncIterator[bytes]:
        async for chunk in read_blob(key):
            read.append(len(chunk))
            yield chunk

    backend.read_blob = counted  # type: ignore[method-assign]
    await damage.write(damage.LOG, b"".join(damage.line(f"n{n}", content="x" * 900) for n in range(20_000)))(backend)
    assert (await check(backend)).counts["messages"] == 20_005
    if isinstance(backend, FlatfileBackend):
        assert max(read) <= 1 << 20


# --- stray files ---------------------------------------------------------------------------------------


async def test_stray_files_beside_folders_hide_nothing_and_count_for_nothing(make_storage: "MakeStorage") -> None:
    storage = make_storage(max_sessions_per_user=3)
    await build(storage)
    await storage.delete_session(USER, "deleted")
    healthy = await seen(storage)
    for key in (*damage.BESIDE.values(), "README", f"{LAYOUT.trash}/readme.txt"):
        await storage.backend.write(key, b"by hand")
    assert await seen(storage) == healthy
    assert await storage.create_session(USER)
    report = await check(storage.backend, fix=True)
    assert report.clean
    assert {problem.kind for problem in report} == {"unknown-key", "foreign-trash"}
    assert await storage.backend.read(damage.BESIDE["the panels"]) == b"by hand"


async def seen(storage: StorageManager) -> list[object]:
    """Return what lists and searches answer."""
    return [
        await storage.list_users(strict=True),
        await storage.count_users(),
        await storage.list_sessions(USER, strict=True),
        await storage.count_sessions(USER),
        await storage.list_panels(strict=True),
        await storage.count_panels(),
        await storage.list_trash(),
        await storage.search("line", user_id=USER),
        await storage.export_all_data(),
    ]


async def test_a_store_begins_beside_stray_files(make_storage: "MakeStorage") -> None:
    storage = make_storage()
    await storage.backend.open()
    await storage.backend.write("README", b"by hand")
    assert await storage.create_user("ann")


# --- uploaded files ------------------------------------------------------------------------------------


async def test_a_first_upload_that_is_named_while_it_is_repaired_stays(
    make_storage: "MakeStorage", monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = make_storage()
    await storage.create_user(USER)
    await storage.create_session(USER, session_id="s")
    assert await storage.save_document(USER, "s", "a.txt", b"acknowledged")
    metadata = LAYOUT.key("documents", user_id=USER, session_id="s")
    named = await storage.backend.read(metadata)
    assert named is not None
    await storage.backend.delete(metadata)
    repair = DocumentFiles.repair

    async def late(self: DocumentFiles, quarantine: Quarantine) -> list[Change]:
        changes = await repair(self, quarantine)
        await storage.backend.write(metadata, named)
        return changes

    monkeypatch.setattr(DocumentFiles, "repair", late)
    report = await check(storage.backend, fix=True)
    assert [(problem.kind, problem.fixed) for problem in report] == [("orphan-file", False)]
    assert await storage.get_document(USER, "s", "a.txt") == b"acknowledged"


@pytest.mark.parametrize("change", [lambda data: data + b"}", lambda data: b'{"documents": []}'], ids=["typo", "list"])
async def test_damaged_document_metadata_is_made_anew_from_the_files(
    make_storage: "MakeStorage", change: Callable[[bytes], bytes]
) -> None:
    storage = make_storage(document_compression_threshold_bytes=100)
    await storage.create_user(USER)
    await storage.create_session(USER, session_id="s")
    files = {"a.txt": b"a", "A.txt": b"A", "long.md": b"again " * 100, "Ü 張.pdf": b"?"}
    for filename, content in files.items():
        await storage.save_document(USER, "s", filename, content, {"of": filename})
    await storage.update_document_analysis(USER, "s", "a.txt", {"words": 1})
    backend = storage.backend
    metadata = LAYOUT.key("documents", user_id=USER, session_id="s")
    again = LAYOUT.key("document", user_id=USER, session_id="s", document="a~7.txt")
    no_gzip = LAYOUT.key("document", user_id=USER, session_id="s", document="b.txt.gz")
    await backend.write(again, b"an older one")
    await backend.write(no_gzip, b"?")
    before = await contents(backend)
    damaged = change(before[metadata])
    await backend.write(metadata, damaged)
    report = await check(backend, fix=True)
    assert report.clean
    assert places(report) == {("damaged-document", metadata): 1}
    after = await contents(backend)
    assert {key: data for key, data in after.items() if not is_quarantine(key)}.keys() == before.keys()
    assert damaged in [data for key, data in after.items() if is_quarantine(key)]
    for filename, content in (files | {"a~7.txt": b"an older one", "b.txt.gz": b"?"}).items():
        assert await storage.get_document(USER, "s", filename) == content
    info = {document.filename: document for document in await storage.list_documents(USER, "s", strict=True)}
    assert info["a.txt"].analysis == {"words": 1}
    assert (info["long.md"].mime_type, info["long.md"].size, info["long.md"].metadata) == ("text/markdown", 600, {})
    assert (await check(backend)).clean


async def test_what_a_check_makes_anew_has_its_time_in_the_form_of_all_others(make_storage: "MakeStorage") -> None:
    storage = make_storage()
    await storage.create_user("bob")
    await storage.backend.write(damage.BOB_LOG, damage.line("b0", timestamp="2026-01-31T13:00:00+01:00"))
    assert (await check(storage.backend, fix=True)).clean
    session = await storage.get_session("bob", "s1")
    assert session is not None
    assert (session.created_at, session.updated_at) == (TIME, TIME)
