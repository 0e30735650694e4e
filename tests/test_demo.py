"""`chatdb demo`: it does the main job without questions, and leaves a store to look at."""

import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from flatfile_chat_database.cli import cli
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.layout import Layout

CHATDB = [sys.executable, "-m", "flatfile_chat_database"]


def chatdb(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments), prog_name="chatdb")


@pytest.fixture
def said(store_path: Path) -> str:
    result = chatdb("--store", str(store_path), "demo")
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def test_the_demo_shows_each_part_of_the_library(said: str) -> None:
    for words in (
        "notes.md, ",
        "insight: ",
        "page 3: ",
        "analysis: «csv» «Decimal»",
        "«园林»",
        "situational_context.json",
        '{"id":"',
    ):
        assert words in said


def test_the_tree_is_what_is_on_the_disk(said: str, store_path: Path) -> None:
    printed = re.search(r"^The files\n(.*?)\n\n", said, re.DOTALL | re.MULTILINE)
    assert printed is not None
    tree = [line.strip().rstrip("/") for line in printed[1].splitlines()]
    files = [path for path in store_path.rglob("*.*") if path.is_file() and path.suffix in (".json", ".jsonl", ".md")]
    layout = Layout(StorageConfig())
    files = [path for path in files if not layout.is_own(path.relative_to(store_path).as_posix())]
    assert len(files) > 15
    assert {path.name for path in files} <= set(tree)


def test_the_commands_it_suggests_work(said: str, store_path: Path) -> None:
    commands = [line.strip() for line in said.splitlines() if f" --store {store_path}" in line]
    assert len(commands) == 6
    for command in commands:
        words = shlex.split(command)
        arguments = [word for word in words[words.index("--store") :] if word != "-f"]
        result = chatdb(*arguments)
        assert (result.exit_code, result.stderr) == (0, ""), command
        assert result.stdout


def test_without_a_store_it_makes_a_new_folder_and_says_where(tmp_path: Path) -> None:
    run = subprocess.run(
        [*CHATDB, "--json", "demo"],
        env={"TMPDIR": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    made = json.loads(run.stdout)
    assert Path(made["store"]).parent == tmp_path
    assert made["found"] == {"csv decimal": 3, "园林": 1}
    assert [path.name for path in tmp_path.iterdir()] == [Path(made["store"]).name]


def test_the_store_may_be_named_on_either_side_or_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chatdb("demo", "--store", str(tmp_path / "after")).exit_code == 0
    assert (tmp_path / "after").is_dir()
    monkeypatch.setenv("CHATDB_STORAGE_BASE_PATH", str(tmp_path / "environment"))
    assert chatdb("demo").exit_code == 0
    assert (tmp_path / "environment").is_dir()


@pytest.mark.parametrize(
    ("variables", "arguments"),
    [
        ({"CHATDB_STORAGE_BASE_PATH": "./data"}, ["demo"]),
        ({"CHATDB_STORAGE_URL": "file:./data"}, ["demo"]),
        ({}, ["--store", "./data", "demo"]),
        ({}, ["--set", "storage_base_path=./data", "demo"]),
        ({}, ["demo", "--store", "./data"]),
    ],
)
def test_a_store_that_was_named_is_used_also_when_it_is_the_default_one(
    tmp_path: Path, variables: dict[str, str], arguments: list[str]
) -> None:
    run = subprocess.run([*CHATDB, *arguments], env=variables, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stderr == ""
    assert (tmp_path / "data" / "users").is_dir()


def test_an_unknown_variable_is_warned_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CHATDB_MAX_OPEN_FILE", "12")
    result = chatdb("demo")
    assert result.exit_code == 0
    assert result.stderr.startswith("chatdb: warning: ") and result.stderr.count("\n") == 1


def test_a_wrong_setting_makes_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert chatdb("--set", "max_open_files=none", "demo").exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone(said: str, store_path: Path) -> None:
    before = sorted(store_path.rglob("*"))
    result = chatdb("--store", str(store_path), "demo")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"chatdb: {store_path} is not empty. Give the demo a new folder.\n"
    assert sorted(store_path.rglob("*")) == before


def test_it_runs_in_memory_too() -> None:
    assert "A new chat store at memory:" in chatdb("--store", "memory:", "demo").stdout
