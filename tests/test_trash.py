"""Trash: what was deleted comes back, what is purged is gone for good, and what is old goes when it is pruned."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from flatfile_chat_database import (
    ConflictError,
    IntegrityError,
    Message,
    NotFoundError,
    SituationalContext,
    StorageLimitExceeded,
    StorageManager,
    UnavailableError,
    ValidationError,
)
from flatfile_chat_database.backends.changes import Change, Outcome
from flatfile_chat_database.check import check

from .clock import FixedClock
from .conftest import MakeStorage
from .contents import ILLEGAL_IDS, contents, key_of, unchanged

INSIGHT = "insight_20260131_120000"
KINDS: dict[str, dict[str, str]] = {
    "user": {"user_id": "ada"},
    "session": {"user_id": "ada", "session_id": "s"},
    "document": {"user_id": "ada", "session_id": "s", "filename": "a.txt"},
    "panel": {"panel_id": "p"},
    "insight": {"panel_id": "p", "insight_id": INSIGHT},
    "global persona": {"persona_id": "critic"},
    "persona": {"user_id": "ada", "persona_id": "critic"},
}
of_every_kind = pytest.mark.parametrize(
    "kind",
    [kind if kind in ("session", "document") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
PLACES = {
    "user": "users/ada/",
    "session": "users/ada/s/",
    "document": "users/ada/s/documents/",
    "panel": "panel_sessions/p/",
    "insight": f"panel_sessions/p/insights/{INSIGHT}.json",
    "global persona": "personas_global/critic.json",
    "persona": "users/ada/personas/critic.json",
}
"""Where everything is that goes with a thing; of the documents, only what is called `a.txt`."""


async def fill(storage: StorageManager) -> None:
    """Make one of everything, and neighbours whose names begin alike."""
    await storage.save_persona("critic", {"of": "all"})
    await storage.save_persona("critic2", {"of": "all"})
    for user_id in ("ada", "ada2"):
        await storage.create_user(user_id, {"name": user_id})
        await storage.save_persona("critic", {"of": user_id}, user_id)
        for session_id in ("s", "s2"):
            await storage.create_session(user_id, "title", session_id=session_id)
            await storage.add_messages(user_id, session_id, [Message("user", "hello"), Message("assistant", "hi")])
            await storage.update_context(user_id, session_id, SituationalContext("about"))
            await storage.save_context_snapshot(user_id, session_id, SituationalContext("before"))
            for filename in ("a.txt", "b.txt"):
                await storage.save_document(user_id, session_id, filename, filename.encode(), {"of": user_id})
                await storage.update_document_analysis(user_id, session_id, filename, {"words": 1})
    for panel_id in ("p", "p2"):
        await storage.create_panel("x", ["critic"], panel_id=panel_id)
        await storage.add_panel_message(panel_id, Message("critic", "well"))
        await storage.save_panel_insight(panel_id, {"text": "so"})


@pytest.fixture
def clock() -> FixedClock:
    """The clock of `full`."""
    return FixedClock()


@pytest.fixture
async def full(make_storage: MakeStorage, clock: FixedClock) -> StorageManager:
    """A store with one of everything."""
    storage = make_storage(clock=clock)
    await fill(storage)
    return storage


async def delete(storage: StorageManager, kind: str, **other: str) -> bool:
    names = KINDS[kind] | other
    calls: dict[str, Callable[[], Awaitable[bool]]] = {
        "user": lambda: storage.delete_user(**names),
        "session": lambda: storage.delete_session(**names),
        "document": lambda: storage.delete_document(**names),
        "panel": lambda: storage.delete_panel(**names),
        "insight": lambda: storage.delete_panel_insight(**names),
        "global persona": lambda: storage.delete_persona(**names),
        "persona": lambda: storage.delete_persona(**names),
    }
    return await calls[kind]()


async def trash_ids(storage: StorageManager) -> list[str]:
    return [entry.id for entry in await storage.list_trash()]


async def meanings(storage: StorageManager) -> dict[str, Any]:
    """Return everything in the store: what JSON documents say, whatever the order of their fields; other bytes."""

    def meaning(data: bytes | None) -> Any:
        try:
            return json.loads(data or b"")
        except ValueError:
            return data

    return {key: meaning(data) for key, data in (await contents(storage)).items()}


def belongs(kind: str, key: str) -> bool:
    """Tell whether a key goes with a thing when that is deleted."""
    if kind == "document":
        return key in (f"{PLACES[kind]}a.txt", f"{PLACES[kind]}analysis/a.txt.json")
    return key.startswith(PLACES[kind])


# --- deleting and bringing back ------------------------------------------------------------------------


@of_every_kind
async def test_what_was_deleted_comes_back_as_it_was(full: StorageManager, clock: FixedClock, kind: str) -> None:
    before = await meanings(full)
    clock.advance(1)
    assert await delete(full, kind)
    after = await meanings(full)
    assert {key for key in before if key not in after} == {key for key in before if belongs(kind, key)}
    changed = {key for key in before if key in after and before[key] != after[key]}
    assert changed == ({"users/ada/s/documents/metadata.json"} if kind == "document" else set())
    (entry,) = await full.list_trash()
    assert entry.kind == kind.removeprefix("global ")
    assert [*entry.names.items()] == [*KINDS[kind].items()]
    assert entry.deleted_at == "2026-01-31T12:00:01.000000+00:00"
    assert await full.undelete(entry.id)
    assert await meanings(full) == before
    assert await full.list_trash() == []


@of_every_kind
async def test_without_a_backup_what_was_deleted_is_gone_for_good(make_storage: MakeStorage, kind: str) -> None:
    storage = make_storage(backup_before_delete=False, clock=FixedClock())
    await fill(storage)
    before = await meanings(storage)
    assert await delete(storage, kind)
    after = await meanings(storage)
    assert after.keys() == {key for key in before if not belongs(kind, key)}
    assert await storage.list_trash() == []
    assert not await delete(storage, kind)


@pytest.mark.parametrize("backup", [True, False])
@of_every_kind
async def test_deleting_what_is_absent_does_nothing(make_storage: MakeStorage, kind: str, backup: bool) -> None:
    storage = make_storage(backup_before_delete=backup)
    await fill(storage)
    await storage.create_user("empty")
    async with unchanged(storage):
        for name in KINDS[kind]:
            if name != "insight_id" or kind == "insight":
                assert not await delete(storage, kind, **{name: "absent"})
        if "session_id" in KINDS[kind]:
            assert not await delete(storage, kind, user_id="empty")


@of_every_kind
async def test_of_two_that_delete_the_same_at_once_one_did_it(
    make_storage: MakeStorage, clock: FixedClock, kind: str
) -> None:
    storage, other = make_storage(clock=clock), make_storage(clock=clock)
    await fill(storage)
    before = await meanings(storage)
    assert sorted(await asyncio.gather(delete(storage, kind), delete(other, kind))) == [False, True]
    (trash_id,) = await trash_ids(storage)
    answers = await asyncio.gather(storage.undelete(trash_id), other.undelete(trash_id), return_exceptions=True)
    assert sorted(type(answer).__name__ for answer in answers) == ["NotFoundError", "bool"], answers
    assert True in answers
    assert await meanings(storage) == before


async def test_the_global_persona_stays_when_a_user_deletes_their_own(full: StorageManager) -> None:
    await full.delete_persona("critic", "ada")
    assert await full.get_persona("critic", "ada") == {"id": "critic", "of": "all"}
    assert not await full.delete_persona("critic", "ada")
    assert await full.get_persona("critic") == {"id": "critic", "of": "all"}


async def test_nothing_can_be_written_below_what_was_deleted(full: StorageManager) -> None:
    await full.delete_session("ada", "s")
    await full.delete_panel("p")
    async with unchanged(full):
        for call in (
            full.add_message("ada", "s", Message("user", "late")),
            full.save_panel_insight("p", {"text": "late"}),
            full.update_document_analysis("ada", "s", "a.txt", {"late": 1}),
        ):
            with pytest.raises(NotFoundError):
                await call


async def test_a_message_is_in_the_session_or_refused_when_that_is_deleted_at_once(full: StorageManager) -> None:
    async def add(number: int) -> bool:
        try:
            return await full.add_message("ada", "s", Message("user", str(number), id=str(number)))
        except NotFoundError:
            return False

    *added, deleted = await asyncio.gather(
        *(add(number) for number in range(5)), full.delete_session("ada", "s"), return_exceptions=False
    )
    added += await asyncio.gather(*(add(number) for number in range(5, 8)))
    assert deleted
    await full.undelete((await trash_ids(full))[0])
    there = {message.id for message in await full.get_messages("ada", "s")}
    assert {str(number) for number, was_added in enumerate(added) if was_added} == {
        identity for identity in there if len(identity) == 1
    }


@pytest.mark.damage
@pytest.mark.parametrize("backup", [True, False])
async def test_a_folder_without_its_main_document_counts_as_absent(make_storage: MakeStorage, backup: bool) -> None:
    storage = make_storage(backup_before_delete=backup)
    await fill(storage)
    await storage.backend.delete(key_of(storage, "session", user_id="ada", session_id="s"))
    async with unchanged(storage):
        assert not await storage.delete_session("ada", "s")


@pytest.mark.parametrize("user_id", ["../x", "CON", "a/b", "-rf", "Ab", "profile.json", "personas", "é", "张三"])
async def test_hostile_ids_go_to_the_trash_and_come_back(make_storage: MakeStorage, user_id: str) -> None:
    storage = make_storage()
    await storage.create_user(user_id)
    await storage.create_session(user_id, session_id=user_id)
    await storage.save_document(user_id, user_id, "a.txt", b"x")
    await storage.save_persona(user_id, {}, user_id)
    await storage.create_panel("x", ["a"], panel_id=user_id)
    before = await meanings(storage)
    for call in (
        storage.delete_document(user_id, user_id, "a.txt"),
        storage.delete_persona(user_id, user_id),
        storage.delete_session(user_id, user_id),
        storage.delete_panel(user_id),
        storage.delete_user(user_id),
    ):
        assert await call
    entries = await storage.list_trash()
    assert {entry.kind for entry in entries} == {"user", "session", "document", "panel", "persona"}
    assert {value for entry in entries for value in entry.names.values()} == {user_id, "a.txt"}
    for entry in entries:
        await storage.undelete(entry.id)
    assert await meanings(storage) == before


@of_every_kind
async def test_the_trash_works_with_users_at_the_top_of_the_store(make_storage: MakeStorage, kind: str) -> None:
    storage = make_storage(user_data_directory_name="", clock=FixedClock())
    await fill(storage)
    before = await meanings(storage)
    assert await delete(storage, kind)
    (entry,) = await storage.list_trash()
    assert (entry.kind, entry.names) == (kind.removeprefix("global "), KINDS[kind])
    await storage.undelete(entry.id)
    assert await meanings(storage) == before
    await delete(storage, kind)
    (entry,) = await storage.list_trash()
    await storage.purge(trash_id=entry.id)
    assert (await meanings(storage)).keys() < before.keys()


async def test_bad_input_does_not_even_begin_a_store(storage: StorageManager) -> None:
    bad: Any = ""
    for call in (
        storage.delete_user(bad),
        storage.delete_document(bad, "s", "a.txt"),
        storage.delete_persona("x", bad),
        storage.save_document("ada", bad, "a.txt", b"x"),
        storage.save_document("ada", "s", "a.txt", 7),  # type: ignore[arg-type]
        storage.update_document_analysis("ada", bad, "a.txt", {}),
        storage.create_panel("x", [bad]),
        storage.create_panel("x", ["a"], panel_id=bad),
        storage.save_panel_insight(bad, {}),
        storage.save_persona(bad, {}),
        storage.undelete(7),  # type: ignore[arg-type]
        storage.purge(user_id=bad),
        storage.purge(user_id="ada", session_id=bad, filename="a.txt"),
        storage.purge(trash_id=7),  # type: ignore[arg-type]
        storage.prune(dry_run=bad),
    ):
        with pytest.raises(ValidationError):
            await call
    assert await contents(storage) == {}


@pytest.mark.parametrize("bad", [*ILLEGAL_IDS.values()], ids=[*ILLEGAL_IDS])
async def test_illegal_ids_are_refused(full: StorageManager, bad: Any) -> None:
    async with unchanged(full):
        for call in (
            full.delete_user(bad),
            full.delete_session("ada", bad),
            full.delete_document("ada", bad, "a.txt"),
            full.delete_panel(bad),
            full.delete_persona(bad),
        ):
            with pytest.raises(ValidationError, match="_id"):
                await call
        for filename in (7, None, "\ud800"):
            with pytest.raises(ValidationError, match="filename"):
                await full.delete_document("ada", "s", filename)  # type: ignore[arg-type]


async def test_a_store_that_is_opened_read_only_shows_its_trash_and_keeps_it(
    full: StorageManager, make_storage: MakeStorage
) -> None:
    await full.delete_panel("p")
    (trash_id,) = await trash_ids(full)
    reader = make_storage(read_only=True, trash_retention_days=0)
    assert await trash_ids(reader) == [trash_id]
    assert (await reader.prune(dry_run=True)).trash == [trash_id]
    async with unchanged(full):
        for call in (
            reader.delete_user("ada"),
            reader.delete_document("ada", "s", "a.txt"),
            reader.undelete(trash_id),
            reader.purge(trash_id=trash_id),
            reader.purge(user_id="ada"),
            reader.prune(dry_run=False),
        ):
            with pytest.raises(UnavailableError, match="read-only"):
                await call


# --- the list ------------------------------------------------------------------------------------------


async def test_the_trash_is_listed_newest_first(full: StorageManager, clock: FixedClock) -> None:
    for kind in KINDS:
        clock.advance(1)
        if kind not in ("user", "session", "panel"):
            assert await delete(full, kind)
    for kind in ("session", "user", "panel"):
        clock.advance(0.000001)
        assert await delete(full, kind)
    expected = ["panel", "user", "session", "persona", "persona", "insight", "document"]
    assert [entry.kind for entry in await full.list_trash()] == expected
    assert await full.list_trash() == sorted(await full.list_trash(), key=lambda entry: entry.deleted_at, reverse=True)


async def test_the_same_thing_deleted_twice_is_in_the_trash_twice(full: StorageManager, clock: FixedClock) -> None:
    await full.delete_panel("p")
    clock.advance(1)
    await full.create_panel("second", ["critic"], panel_id="p")
    await full.delete_panel("p")
    newer, older = await trash_ids(full)
    await full.undelete(older)
    panel = await full.get_panel("p")
    assert panel is not None
    assert panel.type == "x"
    assert await trash_ids(full) == [newer]


@pytest.mark.damage
async def test_what_is_no_trash_entry_is_passed_over_with_a_warning(
    full: StorageManager, caplog: pytest.LogCaptureFixture
) -> None:
    await full.delete_panel("p")
    (trash_id,) = await trash_ids(full)
    stamp = "20260101_000000_000000"
    foreign = {
        "system/trash/notes.txt": b"?",
        "system/trash/20261399_000000_000000_user_01234567/users/x/profile.json": b"{}",
        f"system/trash/{stamp}_spaceship_01234567/x": b"?",
        f"system/trash/{stamp}_user_01234567/somewhere/else": b"?",
        f"system/trash/{stamp}_user_01234568/users/a/profile.json": b"{}",
        f"system/trash/{stamp}_user_01234568/users/b/profile.json": b"{}",
        f"system/trash/{stamp}_document_01234567/users/a/s/documents/a.txt": b"?",
        f"system/trash/{stamp}_document_01234568/users/a/s/documents/metadata.json": b"{",
    }
    for key, data in foreign.items():
        await full.backend.write(key, data)
    with caplog.at_level(logging.WARNING):
        assert await trash_ids(full) == [trash_id]
    for name in {key.split("/")[2] for key in foreign}:
        assert name in caplog.text
    async with unchanged(full):
        with pytest.raises(IntegrityError):
            await full.undelete(f"{stamp}_document_01234568")
        with pytest.raises(NotFoundError):
            await full.undelete(f"{stamp}_user_01234567")
        caplog.clear()
        report = await full.prune(dry_run=True)
    assert "notes.txt" in caplog.text
    assert not {"notes.txt", f"{stamp}_spaceship_01234567"} & {*report.trash}


# --- what cannot come back -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "unknown",
    ["", "x", "..", "../users", "20260131_120000_000000_panel_0123456g", "20260131_120000_000000_panel_01234567"],
)
async def test_an_unknown_trash_entry_is_not_found(full: StorageManager, unknown: str) -> None:
    async with unchanged(full):
        with pytest.raises(NotFoundError, match=r"The trash entry .* does not exist"):
            await full.undelete(unknown)
        with pytest.raises(NotFoundError, match="The trash entry"):
            await full.purge(trash_id=unknown)


@pytest.mark.parametrize("bad", [None, 7, b"x"])
async def test_a_trash_id_that_is_no_string_is_refused(full: StorageManager, bad: Any) -> None:
    async with unchanged(full):
        with pytest.raises(ValidationError, match="trash_id must be a string"):
            await full.undelete(bad)
        if bad is not None:
            with pytest.raises(ValidationError, match="trash_id must be a string"):
                await full.purge(trash_id=bad)


@pytest.mark.parametrize(
    ("kind", "owner", "message"),
    [
        ("session", "user", "The user 'ada' does not exist"),
        ("persona", "user", "The user 'ada' does not exist"),
        ("document", "session", "The session 's' of user 'ada' does not exist"),
        ("insight", "panel", "The panel 'p' does not exist"),
    ],
)
async def test_nothing_comes_back_to_an_owner_who_is_gone(
    full: StorageManager, clock: FixedClock, kind: str, owner: str, message: str
) -> None:
    before = await meanings(full)
    await delete(full, kind)
    clock.advance(1)
    await delete(full, owner)
    of_owner, own = await trash_ids(full)
    async with unchanged(full):
        with pytest.raises(NotFoundError, match=message):
            await full.undelete(own)
    await full.undelete(of_owner)
    await full.undelete(own)
    assert await meanings(full) == before


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "insight"])
async def test_nothing_comes_back_where_something_else_is(full: StorageManager, kind: str) -> None:
    await delete(full, kind)
    again: dict[str, Callable[[], Awaitable[Any]]] = {
        "user": lambda: full.create_user("ada"),
        "session": lambda: full.create_session("ada", session_id="s"),
        "document": lambda: full.save_document("ada", "s", "a.txt", b"other"),
        "panel": lambda: full.create_panel("x", ["a"], panel_id="p"),
        "global persona": lambda: full.save_persona("critic", {}),
        "persona": lambda: full.save_persona("critic", {}, "ada"),
    }
    await again[kind]()
    (trash_id,) = await trash_ids(full)
    async with unchanged(full):
        with pytest.raises(ConflictError, match=r"exists again\. Delete it first"):
            await full.undelete(trash_id)


@pytest.mark.damage
async def test_what_was_left_in_the_place_of_a_thing_is_named_when_that_cannot_come_back(full: StorageManager) -> None:
    await full.delete_session("ada", "s")
    (trash_id,) = await trash_ids(full)
    await full.backend.write("users/ada/s/documents/late.txt", b"x")
    async with unchanged(full):
        with pytest.raises(ConflictError, match=r"The session 's' of user 'ada' has left something .*check --fix"):
            await full.undelete(trash_id)


@pytest.mark.damage
async def test_a_file_whose_entry_is_damaged_goes_to_the_trash_and_comes_back_as_it_is(full: StorageManager) -> None:
    key = key_of(full, "documents", user_id="ada", session_id="s")
    content = json.loads(await full.backend.read(key) or b"")
    content["documents"]["a.txt"] = 7
    await full.backend.write(key, json.dumps(content).encode())
    before = await meanings(full)
    assert await full.delete_document("ada", "s", "a.txt")
    await full.undelete((await trash_ids(full))[0])
    assert await meanings(full) == before


async def test_limits_do_not_keep_anything_from_coming_back(make_storage: MakeStorage) -> None:
    storage = make_storage(max_sessions_per_user=1)
    await storage.create_user("ada")
    await storage.create_session("ada", session_id="s")
    await storage.delete_session("ada", "s")
    await storage.create_session("ada", session_id="t")
    await storage.undelete((await trash_ids(storage))[0])
    assert await storage.count_sessions("ada") == 2
    with pytest.raises(StorageLimitExceeded):
        await storage.create_session("ada")


@pytest.mark.parametrize("threshold", [0, 1])
async def test_a_document_whose_name_on_disk_was_taken_meanwhile_comes_back_under_another(
    make_storage: MakeStorage, threshold: int
) -> None:
    storage = make_storage(document_compression_threshold_bytes=threshold)
    await storage.create_user("ada")
    await storage.create_session("ada", session_id="s")
    await storage.save_document("ada", "s", "a:b.txt", b"first", {"n": 1})
    await storage.update_document_analysis("ada", "s", "a:b.txt", {"of": "first"})
    await storage.delete_document("ada", "s", "a:b.txt")
    taken = await storage.save_document("ada", "s", "a?b.txt", b"second")
    await storage.undelete((await trash_ids(storage))[0])
    document = await storage.get_document_info("ada", "s", "a:b.txt")
    assert document is not None
    assert document.path != taken
    assert document.path.endswith(".gz") == bool(threshold)
    assert (document.metadata, document.analysis) == ({"n": 1}, {"of": "first"})
    assert await storage.get_document("ada", "s", "a:b.txt") == b"first"
    assert await storage.get_document("ada", "s", "a?b.txt") == b"second"
    assert await storage.list_trash() == []


async def test_a_document_can_be_deleted_again_and_again(full: StorageManager, clock: FixedClock) -> None:
    for number in range(3):
        await full.save_document("ada", "s", "a.txt", b"%d" % number)
        clock.advance(1)
        assert await full.delete_document("ada", "s", "a.txt")
    _, middle, _ = await trash_ids(full)
    await full.undelete(middle)
    assert await full.get_document("ada", "s", "a.txt") == b"1"


# --- purging -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deleted", [False, True])
@of_every_kind
async def test_a_purge_removes_a_thing_from_its_place_or_the_trash_and_says_what_is_gone(
    full: StorageManager, clock: FixedClock, kind: str, deleted: bool
) -> None:
    before = await meanings(full)
    if deleted:
        await delete(full, kind)
        clock.advance(1)
    had = await meanings(full)
    receipt = await full.purge(**KINDS[kind])
    after = await meanings(full)
    assert after.keys() == {key for key in before if not belongs(kind, key)}
    assert receipt.keys == sorted(had.keys() - after.keys())
    assert receipt.names == KINDS[kind]
    assert receipt.purged_at == f"2026-01-31T12:00:0{int(deleted)}.000000+00:00"
    async with unchanged(full):
        with pytest.raises(NotFoundError, match="is nowhere"):
            await full.purge(**KINDS[kind])


async def test_a_purge_of_a_user_leaves_no_trace_of_them(full: StorageManager, clock: FixedClock) -> None:
    for kind in ("document", "persona", "session", "user"):
        await delete(full, kind)
        clock.advance(1)
    await full.create_user("ada", {"name": "again"})
    await full.purge(user_id="ada")
    assert not any("/ada/" in key for key in await contents(full))
    assert await full.list_trash() == []
    assert await full.user_exists("ada2")


async def test_a_purge_of_a_session_reaches_into_every_trash_entry(full: StorageManager, clock: FixedClock) -> None:
    await full.delete_document("ada", "s", "a.txt")
    clock.advance(1)
    await full.delete_session("ada", "s")
    clock.advance(1)
    await full.create_session("ada", session_id="s")
    await full.delete_user("ada")
    receipt = await full.purge(user_id="ada", session_id="s")
    assert len({key.split("/")[2] for key in receipt.keys}) == 3
    assert not any("/ada/s/" in key for key in await contents(full))
    (entry,) = await full.list_trash()
    await full.undelete(entry.id)
    assert [session.id for session in await full.list_sessions("ada")] == ["s2"]


async def test_a_purge_of_a_document_reaches_into_every_trash_entry(full: StorageManager, clock: FixedClock) -> None:
    await full.save_document("ada", "s", "a.txt", b"secret")
    for kind in ("document", "session", "user"):
        await delete(full, kind)
        clock.advance(1)
        await full.create_user("ada")
        if not await full.session_exists("ada", "s"):
            await full.create_session("ada", session_id="s")
        await full.save_document("ada", "s", "a.txt", b"secret")
        await full.update_document_analysis("ada", "s", "a.txt", {"a": "secret"})
    receipt = await full.purge(user_id="ada", session_id="s", filename="a.txt")
    assert sum(key.endswith((".txt", ".txt.json")) for key in receipt.keys) == 7
    assert not any(b"secret" in (data or b"") for data in (await contents(full)).values())
    kinds = {entry.kind: entry for entry in await full.list_trash()}
    assert kinds.keys() == {"session", "user"}
    await full.delete_session("ada", "s")
    await full.undelete(kinds["session"].id)
    assert [document.filename for document in await full.list_documents("ada", "s")] == ["b.txt"]


async def test_a_purge_of_a_global_persona_leaves_those_of_users_and_snapshots(full: StorageManager) -> None:
    await full.delete_persona("critic", "ada2")
    await full.purge(persona_id="critic")
    assert await full.get_persona("critic") is None
    assert await full.get_persona("critic", "ada") == {"id": "critic", "of": "ada"}
    assert await full.get_panel_personas("p") == [{"id": "critic", "of": "all"}]
    assert len(await full.list_trash()) == 1


async def test_a_purge_of_a_trash_entry_takes_that_alone(full: StorageManager, clock: FixedClock) -> None:
    await full.delete_panel("p")
    clock.advance(1)
    await full.create_panel("again", ["a"], panel_id="p")
    await full.delete_panel("p2")
    newer, older = await trash_ids(full)
    before = await meanings(full)
    receipt = await full.purge(trash_id=older)
    assert receipt.keys == sorted(key for key in before if f"/{older}/" in key)
    assert (await meanings(full)).keys() == before.keys() - {*receipt.keys}
    assert await trash_ids(full) == [newer]


@pytest.mark.damage
async def test_a_purge_takes_what_was_set_aside_in_the_quarantine_with_it(full: StorageManager) -> None:
    for user_id in ("ada", "ada2"):
        await full.backend.set_aside(key_of(full, "context", user_id=user_id, session_id="s"), "damaged")
        await full.backend.set_aside(f"users/{user_id}/s/documents/b.txt", "damaged")
        await full.backend.set_aside(key_of(full, "session", user_id=user_id, session_id="s2"), "damaged")
    await full.delete_panel("p")
    (trash_id,) = await trash_ids(full)
    await full.backend.set_aside(f"system/trash/{trash_id}/panel_sessions/p/panel.json", "damaged")
    await full.backend.write("system/quarantine/note.json", b"{")
    await full.backend.write("system/quarantine/other.bin", b"?")

    async def quarantined() -> int:
        return len(await full.backend.list_keys("system/quarantine/"))

    assert await quarantined() == 16
    receipt = await full.purge(user_id="ada", session_id="s")
    assert sum(key.startswith("system/quarantine/") for key in receipt.keys) == 4
    await full.purge(user_id="ada")
    await full.purge(panel_id="p")
    assert await quarantined() == 8
    await full.purge(user_id="ada2", session_id="s2")
    assert await quarantined() == 6


@pytest.mark.damage
async def test_what_is_only_in_the_quarantine_can_be_purged(full: StorageManager) -> None:
    key = key_of(full, "global_persona", persona_id="critic")
    await full.backend.set_aside(key, "damaged")
    receipt = await full.purge(persona_id="critic")
    assert [key.startswith("system/quarantine/") for key in receipt.keys] == [True, True]


@pytest.mark.damage
async def test_a_purge_of_a_file_takes_what_was_set_aside_of_it_and_nothing_of_others(full: StorageManager) -> None:
    for filename in ("a.txt", "b.txt"):
        await full.backend.set_aside(key_of(full, "analysis", user_id="ada", session_id="s", document=filename), "bad")
    await full.delete_document("ada", "s", "a.txt")
    await full.save_document("ada", "s", "a.txt", b"anew")
    await full.update_document_analysis("ada", "s", "a.txt", {"a": 1})
    await full.backend.set_aside(key_of(full, "documents", user_id="ada2", session_id="s"), "bad")
    receipt = await full.purge(user_id="ada", session_id="s", filename="a.txt")
    assert sum(key.startswith("system/quarantine/") for key in receipt.keys) == 2
    assert len(await full.backend.list_keys("system/quarantine/")) == 4


async def test_a_purge_finds_what_is_deleted_while_it_works(
    full: StorageManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = full.backend.commit
    deleted = False

    async def overtake(changes: Sequence[Change]) -> list[Outcome]:
        nonlocal deleted
        if not deleted:
            deleted = True
            await full.delete_user("ada")
        return await commit(changes)

    monkeypatch.setattr(full.backend, "commit", overtake)
    await full.purge(user_id="ada")
    assert not any("/ada/" in key for key in await contents(full))


@pytest.mark.parametrize(
    "names",
    [
        {"session_id": "s"},
        {"filename": "a.txt"},
        {"session_id": "s", "filename": "a.txt"},
        {"user_id": "ada", "filename": "a.txt"},
        {"user_id": "ada", "panel_id": "p"},
        {"panel_id": "p", "persona_id": "critic"},
        {"trash_id": "x", "user_id": "ada"},
        {"user_id": "ada", "session_id": "s", "persona_id": "critic"},
    ],
)
async def test_names_that_do_not_go_together_are_refused(full: StorageManager, names: dict[str, str]) -> None:
    async with unchanged(full):
        with pytest.raises(
            ValidationError, match=r"names nothing that can be purged\. Possible are: trash_id; user_id;"
        ):
            await full.purge(**names)


async def test_a_purge_of_nothing_says_what_to_name(full: StorageManager) -> None:
    with pytest.raises(ValidationError, match=r"^purge needs to be told what\. Possible are: trash_id; user_id;"):
        await full.purge()


@pytest.mark.parametrize("bad", [value for value in ILLEGAL_IDS.values() if value is not None])
async def test_a_purge_by_illegal_ids_is_refused(full: StorageManager, bad: Any) -> None:
    async with unchanged(full):
        for names in (
            {"user_id": bad},
            {"user_id": "ada", "session_id": bad},
            {"user_id": bad, "session_id": "s", "filename": "a.txt"},
            {"panel_id": bad},
            {"persona_id": bad},
        ):
            with pytest.raises(ValidationError, match="_id"):
                await full.purge(**names)
        with pytest.raises(ValidationError, match="filename"):
            await full.purge(user_id="ada", session_id="s", filename=7)  # type: ignore[arg-type]


@of_every_kind
async def test_a_purge_of_what_is_nowhere_changes_nothing(full: StorageManager, kind: str) -> None:
    async with unchanged(full):
        for name in KINDS[kind]:
            with pytest.raises(NotFoundError, match="is nowhere"):
                await full.purge(**{**KINDS[kind], name: "absent"})


# --- pruning -------------------------------------------------------------------------------------------


async def test_insights_and_trash_are_kept_as_long_as_the_configuration_says(make_storage: MakeStorage) -> None:
    clock = FixedClock()
    storage = make_storage(clock=clock, panel_insight_retention_days=2, trash_retention_days=1)
    await storage.create_panel("x", ["a"], panel_id="p")
    await storage.create_panel("x", ["a"], panel_id="q")
    for panel_id in ("p", "q"):
        await storage.save_panel_insight(panel_id, {"n": 1})
    clock.advance(86_400)
    await storage.save_panel_insight("p", {"n": 2})
    await storage.delete_panel("q")
    (trash_id,) = await trash_ids(storage)

    async def prune(seconds: float) -> tuple[list[str], list[str]]:
        clock.advance(seconds)
        before = await contents(storage)
        foreseen = await storage.prune(dry_run=True)
        assert await contents(storage) == before
        report = await storage.prune(dry_run=False)
        assert (foreseen.dry_run, report.dry_run) == (True, False)
        assert (report.insights, report.trash) == (foreseen.insights, foreseen.trash)
        return report.insights, report.trash

    assert await prune(86_399) == ([], [])
    first = "panel_sessions/p/insights/insight_20260131_120000.json"
    assert await prune(1) == ([first], [trash_id])
    assert await prune(0) == ([], [])
    assert [insight["n"] for insight in await storage.list_panel_insights("p")] == [2]
    assert await storage.list_trash() == []
    assert (await prune(86_400))[0] == ["panel_sessions/p/insights/insight_20260201_120000.json"]
    assert await storage.panel_exists("p")


async def test_an_insight_is_as_old_as_its_created_at_says(make_storage: MakeStorage) -> None:
    storage = make_storage(clock=FixedClock(), panel_insight_retention_days=30)
    await storage.create_panel("x", ["a"], panel_id="p")
    await storage.save_panel_insight("p", {"created_at": "2020-01-01T00:00:00+01:00", "text": "imported"})
    await storage.save_panel_insight("p", {"text": "new"})
    await storage.prune(dry_run=False)
    assert [insight["text"] for insight in await storage.list_panel_insights("p")] == ["new"]


async def test_with_0_days_a_prune_keeps_nothing(make_storage: MakeStorage) -> None:
    storage = make_storage(clock=FixedClock(), panel_insight_retention_days=0, trash_retention_days=0)
    await storage.create_panel("x", ["a"], panel_id="p")
    await storage.save_panel_insight("p", {"n": 1})
    await storage.delete_panel_insight("p", INSIGHT)
    await storage.save_panel_insight("p", {"n": 2})
    report = await storage.prune(dry_run=False)
    assert (len(report.insights), len(report.trash)) == (1, 1)
    assert await storage.count_panel_insights("p") == 0
    assert await storage.list_trash() == []


async def test_more_days_than_dates_have_keep_everything(make_storage: MakeStorage) -> None:
    for days in (10**6, 10**12):
        storage = make_storage(panel_insight_retention_days=days, trash_retention_days=days)
        await storage.create_panel("x", ["a"])
        await storage.delete_panel((await storage.list_panels())[0].id)
        report = await storage.prune(dry_run=False)
        assert (report.insights, report.trash) == ([], [])


async def test_nothing_disappears_without_a_prune(full: StorageManager, clock: FixedClock) -> None:
    await full.delete_session("ada", "s")
    clock.advance(86_400 * 10_000)
    await fill_again(full)
    assert len(await full.list_trash()) == 1
    assert INSIGHT in [insight["id"] for insight in await full.list_panel_insights("p")]


async def fill_again(storage: StorageManager) -> None:
    await storage.save_panel_insight("p", {"text": "much later"})
    await storage.delete_document("ada", "s2", "a.txt")
    await storage.undelete((await trash_ids(storage))[0])


@pytest.mark.damage
@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("damage", [b"{", f'{{"id": "{INSIGHT}", "created_at": "yesterday"}}'.encode()])
async def test_a_damaged_insight_is_kept_and_hides_no_other(
    make_storage: MakeStorage, damage: bytes, validate: bool, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FixedClock()
    storage = make_storage(clock=clock, validate_json_on_read=validate)
    await storage.create_panel("x", ["a"], panel_id="p")
    for n in range(2):
        await storage.save_panel_insight("p", {"n": n})
    key = key_of(storage, "insight", panel_id="p", insight_id=INSIGHT)
    await storage.backend.write(key, damage)
    clock.advance(86_400 * 1000)
    with caplog.at_level(logging.WARNING):
        report = await storage.prune(dry_run=False)
    assert report.insights == [f"panel_sessions/p/insights/{INSIGHT}_001.json"]
    assert key in caplog.text
    assert await storage.backend.read(key) == damage


@pytest.mark.parametrize("bad", [None, 1, "yes"])
async def test_whether_a_prune_is_a_dry_run_must_be_said(full: StorageManager, bad: Any) -> None:
    async with unchanged(full):
        with pytest.raises(ValidationError, match="dry_run must be True or False"):
            await full.prune(dry_run=bad)


# --- what is in the way, or is missing -------------------------------------------------------------------


@pytest.mark.damage
@pytest.mark.parametrize(
    "stray", ["documents/analysis/a.txt.json", "documents/a.txt/x", "documents/analysis/a.txt.json/x"]
)
async def test_a_document_comes_back_beside_whatever_stands_in_its_place(full: StorageManager, stray: str) -> None:
    await full.delete_document("ada", "s", "a.txt")
    await full.backend.write(f"users/ada/s/{stray}", b"{}")
    assert await asyncio.wait_for(full.undelete((await trash_ids(full))[0]), 20)
    assert await full.get_document("ada", "s", "a.txt") == b"a.txt"
    info = await full.get_document_info("ada", "s", "a.txt")
    assert info is not None
    assert info.analysis == {"words": 1}
    assert await full.backend.read(f"users/ada/s/{stray}") == b"{}"


@pytest.mark.damage
async def test_a_document_whose_content_is_gone_does_not_come_back(full: StorageManager) -> None:
    await full.delete_document("ada", "s", "a.txt")
    (trash_id,) = await trash_ids(full)
    await full.backend.delete(f"system/trash/{trash_id}/users/ada/s/documents/a.txt")
    async with unchanged(full):
        with pytest.raises(NotFoundError, match=r"content of 'a\.txt' in the trash entry"):
            await full.undelete(trash_id)
    assert not await full.document_exists("ada", "s", "a.txt")


async def test_empty_folders_in_the_trash_are_nothing_to_warn_of(
    make_storage: MakeStorage, caplog: pytest.LogCaptureFixture
) -> None:
    storage = make_storage(auto_cleanup_empty_directories=False)
    await fill(storage)
    await storage.delete_session("ada", "s")
    assert await storage.undelete((await trash_ids(storage))[0])
    with caplog.at_level(logging.WARNING):
        assert await storage.list_trash() == []
    assert caplog.text == ""


@pytest.mark.damage
async def test_a_purge_takes_a_damaged_file_that_a_check_set_aside(full: StorageManager) -> None:
    for session_id in ("s", "s2"):
        for filename in ("a.txt", "b.txt"):
            await full.backend.write(
                f"users/ada/{session_id}/documents/{filename}", f"{session_id} {filename}".encode()
            )
    assert (await check(full.backend, fix=True)).clean
    receipt = await full.purge(user_id="ada", session_id="s", filename="a.txt")
    assert len(receipt.keys) == 4, "the file and its analysis, each with a note"
    left = (await contents(full)).values()
    assert [text in left for text in (b"s a.txt", b"s b.txt", b"s2 a.txt", b"s2 b.txt")] == [False, True, True, True]
    with pytest.raises(NotFoundError):
        await full.purge(user_id="ada", session_id="s", filename="a.txt")


@pytest.mark.damage
async def test_a_purge_of_a_session_takes_the_lines_that_a_check_set_aside(full: StorageManager) -> None:
    log = key_of(full, "messages", user_id="ada", session_id="s")
    await full.add_message("ada", "s", Message("user", "SECRET"))
    await full.backend.write(log, (await full.backend.read(log) or b"") * 2)
    assert (await check(full.backend, fix=True)).clean
    await full.purge(user_id="ada", session_id="s")
    assert [key for key, data in (await contents(full)).items() if b"SECRET" in (data or b"")] == []
