"""`chatdb schema` and docs/schema.md: what they say of tables is so, and every question of the page has an answer."""

import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flatfile_chat_database import Message, StorageConfig, StorageManager
from flatfile_chat_database.backends.tables import Tables
from flatfile_chat_database.layout import Layout

from .test_cli import good

PAGE = Path(__file__).parent.parent / "docs" / "schema.md"
QUESTIONS = re.findall(r"```sql\n(.*?);\n```", PAGE.read_text("utf-8"), re.DOTALL)


@pytest.fixture
async def filled(tmp_path: Path) -> Path:
    """A SQLite store with something for every question."""
    path = tmp_path / "chats.sqlite3"
    async with StorageManager(StorageConfig(storage_url=f"sqlite:{path}")) as storage:
        for user in ("ada", "bob"):
            await storage.create_user(user)
        await storage.create_session("ada", "A title", session_id="first")
        await storage.add_messages("ada", "first", [Message("user", "hello"), Message("assistant", "hello, Ada")])
        await storage.save_document("ada", "first", "a.txt", b"text")
        await storage.save_persona("critic", {"name": "Critic"})
        panel = await storage.create_panel("debate", ["critic"])
        await storage.save_panel_insight(panel, {"text": "x"})
    return path


def ask(path: Path, statement: str) -> tuple[list[tuple[Any, ...]], tuple[str, ...]]:
    """Return the rows and the names of their columns."""
    with closing(sqlite3.connect(path)) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall(), tuple(column for column, *_ in cursor.description)


def test_the_page_has_questions() -> None:
    assert len(QUESTIONS) >= 7


@pytest.mark.parametrize("question", QUESTIONS, ids=range(len(QUESTIONS)))
def test_every_question_of_the_page_has_an_answer(filled: Path, question: str) -> None:
    rows, _ = ask(filled, question)
    assert rows


def test_tables_have_the_columns_that_the_mapping_says(filled: Path) -> None:
    for row in Tables(Layout(StorageConfig())).mapping():
        _, columns = ask(filled, f"SELECT * FROM {row.table}")
        assert columns == row.columns, row.table


def test_the_command_prints_the_mapping_for_people_and_for_programs() -> None:
    text = good(None, "schema")
    rows = [json.loads(line) for line in good(None, "--json", "schema").splitlines()]
    mapping = Tables(Layout(StorageConfig())).mapping()
    assert [row["entry"] for row in rows] == [each.entry for each in mapping]
    for row in rows:
        assert re.search(
            rf"^{row['table']} +{re.escape(row['key'])}\n +{', '.join(row['columns'])}$", text, re.MULTILINE
        )


def test_the_command_prints_statements_that_make_the_tables() -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(good(None, "schema", "--sql", "sqlite"))
        assert connection.execute("SELECT role, count(*) FROM messages GROUP BY role").fetchall() == []
