"""Export: everything in the store as flat rows."""

import json
import logging

import pytest

from flatfile_chat_database import Message, StorageManager

from .clock import FixedClock
from .conftest import MakeStorage
from .contents import key_of, unchanged


async def test_an_empty_store_has_the_five_lists(storage: StorageManager) -> None:
    assert await storage.export_all_data() == {
        "users": [],
        "sessions": [],
        "messages": [],
        "documents": [],
        "personas": [],
    }


async def test_every_record_is_a_flat_row_with_the_ids_of_what_it_belongs_to(make_storage: MakeStorage) -> None:
    storage = make_storage(clock=FixedClock())
    now = "2026-01-31T12:00:00.000000+00:00"
    await storage.create_user("ada", {"theme": "dark"})
    await storage.create_session("ada", "Title", session_id="s", metadata={"model": "x"})
    await storage.add_messages(
        "ada",
        "s",
        [
            Message("user", "a \u0000 b", id="m1", timestamp=now, attachments=["f"], metadata={"k": [1, None]}),
            Message("assistant", "你好", id="m2", timestamp=now, parent_id="m1"),
        ],
    )
    await storage.save_document("ada", "s", "a.txt", b"content", {"pages": 1})
    await storage.update_document_analysis("ada", "s", "a.txt", {"summary": "s"})
    await storage.save_persona("critic", {"name": "of all"})
    await storage.save_persona("critic", {"name": "of ada"}, "ada")
    exported = await storage.export_all_data()
    assert exported == {
        "users": [{"user_id": "ada", "created_at": now, "updated_at": now, "profile": {"theme": "dark"}}],
        "sessions": [
            {
                "id": "s",
                "user_id": "ada",
                "title": "Title",
                "created_at": now,
                "updated_at": now,
                "metadata": {"model": "x"},
            }
        ],
        "messages": [
            {
                "user_id": "ada",
                "session_id": "s",
                "position": 0,
                "id": "m1",
                "role": "user",
                "content": "a \u0000 b",
                "timestamp": now,
                "attachments": ["f"],
                "metadata": {"k": [1, None]},
                "parent_id": None,
            },
            {
                "user_id": "ada",
                "session_id": "s",
                "position": 1,
                "id": "m2",
                "role": "assistant",
                "content": "你好",
                "timestamp": now,
                "attachments": [],
                "metadata": {},
                "parent_id": "m1",
            },
        ],
        "documents": [
            {
                "user_id": "ada",
                "session_id": "s",
                "filename": "a.txt",
                "path": "users/ada/s/documents/a.txt",
                "mime_type": "text/plain",
                "size": 7,
                "uploaded_at": now,
                "analysis": {"summary": "s"},
                "metadata": {"pages": 1},
                "sha256": "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73",
            }
        ],
        "personas": [
            {"user_id": None, "id": "critic", "name": "of all"},
            {"user_id": "ada", "id": "critic", "name": "of ada"},
        ],
    }
    assert json.loads(json.dumps(exported)) == exported


async def test_default_limits_cut_nothing_off(make_storage: MakeStorage) -> None:
    storage = make_storage(message_pagination_default_limit=2, session_list_default_limit=2)
    for user_id in ("ada", "bob", "eve"):
        await storage.create_user(user_id)
        for number in range(3):
            session_id = await storage.create_session(user_id, session_id=f"s{number}")
            await storage.add_messages(user_id, session_id, [Message("user", str(n)) for n in range(5)])
            for name in ("b.txt", "a.txt", "c.txt"):
                await storage.save_document(user_id, session_id, name, b"x")
        for persona_id in ("x", "y", "z"):
            await storage.save_persona(persona_id, {}, user_id)
    exported = await storage.export_all_data()
    assert {name: len(rows) for name, rows in exported.items()} == {
        "users": 3,
        "sessions": 9,
        "messages": 45,
        "documents": 27,
        "personas": 9,
    }
    of_one = [row for row in exported["messages"] if (row["user_id"], row["session_id"]) == ("bob", "s1")]
    assert [(row["position"], row["content"]) for row in of_one] == [(n, str(n)) for n in range(5)]


async def test_a_persona_of_an_export_can_be_saved_as_it_is(storage: StorageManager, make_storage: MakeStorage) -> None:
    await storage.create_user("ada")
    await storage.save_persona("critic", {"name": "of all"})
    await storage.save_persona("critic", {"name": "of ada"}, "ada")
    for row in (await storage.export_all_data())["personas"]:
        await storage.save_persona(row["id"], row, row["user_id"])
    assert await storage.get_persona("critic", "ada") == {"id": "critic", "user_id": "ada", "name": "of ada"}


async def test_an_export_changes_nothing_and_leaves_out_the_trash(storage: StorageManager) -> None:
    await storage.create_user("ada")
    await storage.create_session("ada", session_id="s")
    await storage.delete_session("ada", "s")
    async with unchanged(storage):
        exported = await storage.export_all_data()
    assert (len(exported["users"]), exported["sessions"]) == (1, [])


@pytest.mark.damage
async def test_what_is_damaged_is_passed_over_and_hides_nothing_else(
    storage: StorageManager, caplog: pytest.LogCaptureFixture
) -> None:
    for user_id in ("ada", "bob"):
        await storage.create_user(user_id)
        for session_id in ("s", "t"):
            await storage.create_session(user_id, session_id=session_id)
            await storage.add_messages(user_id, session_id, [Message("user", "x"), Message("user", "y")])
            await storage.save_document(user_id, session_id, "a.txt", b"x")
    await storage.save_persona("critic", {})
    await storage.save_persona("other", {})
    damaged = [
        key_of(storage, "user", user_id="ada"),
        key_of(storage, "session", user_id="ada", session_id="s"),
        key_of(storage, "documents", user_id="bob", session_id="s"),
        key_of(storage, "global_persona", persona_id="critic"),
    ]
    for key in damaged:
        await storage.backend.write(key, b"{")
    log = key_of(storage, "messages", user_id="bob", session_id="t")
    good = await storage.backend.read(log)
    await storage.backend.write(log, b"garbage\n" + (good or b""))
    with caplog.at_level(logging.WARNING):
        exported = await storage.export_all_data()
    assert {name: len(rows) for name, rows in exported.items()} == {
        "users": 1,
        "sessions": 3,
        "messages": 8,
        "documents": 3,
        "personas": 1,
    }
    assert [row["position"] for row in exported["messages"] if (row["user_id"], row["session_id"]) == ("bob", "t")] == [
        0,
        1,
    ]
    for key in [*damaged, log]:
        assert key in caplog.text
