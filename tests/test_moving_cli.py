"""The commands that move whole stores."""

import json
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from flatfile_chat_database.models import Message
from flatfile_chat_database.storage import StorageManager

from .archives import FILES, LOG, Draft, message
from .test_cli import chatdb, fill, good, objects, two_chats


@pytest.fixture
def filled(tmp_path: Path) -> str:
    store = str(tmp_path / "store")
    fill(store, two_chats)
    return store


def test_a_store_goes_to_a_backup_to_a_database_to_an_export_and_back(filled: str, tmp_path: Path) -> None:
    backup, export = str(tmp_path / "b.tar.gz"), str(tmp_path / "export")
    assert "backup, tar.gz" in good(filled, "backup", backup)
    database = f"sqlite:{tmp_path}/chats.db"
    assert "The store is clean." in good(database, "restore", backup)
    assert "export, folder" in good(database, "export", export)
    other = str(tmp_path / "other")
    text = good(other, "import", export)
    assert f"imported into {other}" in text
    assert "nothing imported" in good(other, "import", backup)
    assert good(other, "ls", "ada") == good(filled, "ls", "ada")
    assert good(other, "show", "ada", "s1") == good(filled, "show", "ada", "s1")


def test_json_tells_the_same(filled: str, tmp_path: Path) -> None:
    path = str(tmp_path / "b.tar.gz")
    (written,) = objects(good(filled, "--json", "backup", path))
    assert written["files"] == 7 and written["counts"] == {"store": 1, "user": 2, "session": 2, "messages": 2}
    assert written["path"] == path and written["size"] == os.path.getsize(path)
    assert written["left_out"] == {"count": 0, "examples": []}
    (restored,) = objects(good(str(tmp_path / "new"), "--json", "restore", path))
    assert restored["files"] == 7 and restored["problems"] == []
    (imported,) = objects(good(str(tmp_path / "new"), "--json", "import", "--dry-run", path))
    assert (imported["already_there"], imported["added"], imported["dry_run"]) == (6, 0, True)


def test_an_export_of_a_user_in_a_form_that_is_named(filled: str, tmp_path: Path) -> None:
    path = str(tmp_path / "chats")
    assert "export, tar.gz" in good(filled, "export", "--user", "ada", "--format", "tar.gz", path)
    result = chatdb(filled, "export", "--user", "eve", str(tmp_path / "eve"))
    assert (result.exit_code, result.stderr) == (1, "chatdb: There is no user 'eve'. `chatdb ls` lists them.\n")
    other = str(tmp_path / "other")
    good(other, "import", "--format", "chatdb", path)
    assert [user["user_id"] for user in objects(good(other, "--json", "ls"))] == ["ada"]


def test_what_differs_is_named_and_the_exit_code_says_so(tmp_path: Path) -> None:
    store, path = str(tmp_path / "store"), tmp_path / "archive"
    path.write_bytes(Draft().packed())
    good(store, "import", str(path))
    path.write_bytes(Draft(files=[*(FILES | {LOG: message(9)}).items()]).packed())
    result = chatdb(store, "import", str(path))
    assert result.exit_code == 1
    assert f"left as it is: {LOG}" in result.stdout and "nothing imported" in result.stdout


def test_a_damaged_store_is_restored_damaged_and_the_exit_code_says_so(tmp_path: Path) -> None:
    path = tmp_path / "archive"
    path.write_bytes(Draft(files=[*(FILES | {LOG: b"no message\n"}).items()]).packed())
    result = chatdb(str(tmp_path / "store"), "restore", str(path))
    assert result.exit_code == 1
    assert "bad-line" in result.stdout and "Problems that need attention: 1." in result.stdout


def test_what_is_left_out_is_a_warning(filled: str, tmp_path: Path) -> None:
    Path(filled, "notes.txt").write_text("mine")
    result = chatdb(filled, "backup", str(tmp_path / "b"))
    assert result.exit_code == 0
    assert result.stderr == "chatdb: warning: 1 files are not in it, for no store has such: notes.txt.\n"


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["backup", "{}/b.tar.gz"], 1, "There is no chat store"),
        (["export", "{}/e"], 1, "There is no chat store"),
        (["restore", "{}/absent"], 2, "does not exist"),
        (["restore", "{}/text"], 1, "/text is no archive of chatdb"),
        (["--store", "memory:", "restore", "{}/archive"], 2, "memory: ends with the command"),
        (["--store", "memory:", "import", "{}/archive"], 2, "memory: ends with the command"),
        (["--store", "memory:", "import", "--format", "openai-jsonl", "{}/text"], 2, "memory: ends with the command"),
        (["migrate", "{}/store", "memory:"], 2, "memory: ends with the command"),
        (["migrate", "{}/store", "{}/other"], 1, "The source is no chat store: nothing was copied. Look"),
        (["--store", "{}/text/store", "restore", "{}/archive"], 1, "Not a directory. A file stands where a folder"),
        (["--store", f"{{}}/{'x' * 256}", "restore", "{}/archive"], 1, "File name too long. Choose a shorter name."),
        (["import", "{}/text"], 2, "name their form with --format, such as openai-jsonl"),
        (["import", "{}/repacked.tar.gz"], 1, "If another program packed it again, unpack it into an empty folder"),
        (["restore", "{}/repacked.tar.gz"], 1, "If another program packed it again, unpack it into an empty folder"),
        (["import", "{}/a.zip"], 1, "no archive of chatdb: it is a .zip"),
        (["restore", "{}/a.zip"], 1, "no archive of chatdb: it is a .zip"),
        (["import", "{}/a.tar"], 1, "no archive of chatdb: it is a tar that is not compressed"),
        (["import", "{}/cut.tar.gz"], 1, "truncated"),
        (["restore", "{}"], 1, "It is no backup and no export; a store is copied by `chatdb migrate`"),
        (["import", "{}"], 2, "is a folder, but no export of chatdb"),
        (["import", "--format", "openai-jsonl", "{}"], 2, "is a directory"),
        (["import", "--format", "chatdb", "{}/text"], 1, "no archive of chatdb"),
        (["import", "--user", "ada", "{}/archive"], 2, "--user"),
        (["backup", "--format", "folder", "{}/b"], 2, "'folder' is not one of"),
        (["restore", "--max-ratio", "0", "{}/archive"], 2, "--max-ratio"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments: list[str], code: int, expected: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(json.dumps("text"))
    (tmp_path / "archive").write_bytes(Draft().packed())
    (tmp_path / "cut.tar.gz").write_bytes(Draft().packed()[:12])
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        zipped.writestr("chatdb.json", "{}")
    with tarfile.open(tmp_path / "a.tar", "w") as plain, tarfile.open(tmp_path / "repacked.tar.gz", "w:gz") as packed:
        plain.add(tmp_path / "text", "chatdb.json")
        packed.add(tmp_path / "text", "chatdb.json")
    before = sorted(os.listdir(tmp_path))
    result = chatdb(str(tmp_path / "store"), *(each.format(tmp_path) for each in arguments))
    assert result.exit_code == code, result.output
    assert expected in result.stderr and result.stderr.startswith("chatdb: ")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("command", "name", "options", "becomes"),
    [
        ("backup", "b.zip", [], "tar.zst"),
        ("backup", "b.tar", [], "tar.zst"),
        ("backup", "b.gz", [], "tar.zst"),
        ("backup", "b.tar.zst", ["--format", "tar.gz"], "tar.gz"),
        ("backup", "b.zst", ["--format", "tar.gz"], "tar.gz"),
        ("export", "e.ZIP", [], "folder"),
        ("export", "e.json", [], "folder"),
        ("export", "e.tar.gz", ["--format", "folder"], "folder"),
    ],
)
def test_a_name_that_lies_is_refused(
    command: str, name: str, options: list[str], becomes: str, filled: str, tmp_path: Path
) -> None:
    result = chatdb(filled, command, *options, str(tmp_path / name))
    assert result.exit_code == 1, result.output
    assert f"ends as something else does, and would be a {becomes}. Let it end in .tar.zst or .tar.gz" in result.stderr
    assert os.listdir(tmp_path) == ["store"]


@pytest.mark.parametrize(
    ("name", "options"), [("b.TAR.GZ", []), ("b.gz", ["--format", "tar.gz"]), ("b.zst", []), ("v1.2", []), ("b", [])]
)
def test_a_name_that_says_nothing_or_the_truth_is_taken(
    name: str, options: list[str], filled: str, tmp_path: Path
) -> None:
    made = good(filled, "backup", *options, str(tmp_path / name))
    assert f": backup, {'tar.gz' if 'gz' in name.lower() else 'tar.zst'}, " in made
    assert "nothing imported" in good(filled, "import", str(tmp_path / name))


@pytest.mark.parametrize("command", ["backup", "export"])
def test_an_archive_makes_no_folder_around_it(command: str, filled: str, tmp_path: Path) -> None:
    result = chatdb(filled, command, str(tmp_path / "disk" / "monday"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"chatdb: There is no folder {tmp_path / 'disk'}; nothing was written. Make it first, or is its disk not "
        "mounted?\n"
    )
    assert os.listdir(tmp_path) == ["store"]


def test_a_name_with_an_escape_steers_no_terminal(filled: str, tmp_path: Path) -> None:
    path = str(tmp_path / "b\x1b[31m.tar.gz")
    for command in ("backup", "import"):
        assert "\x1b" not in good(filled, command, path)


def test_a_backup_of_a_store_that_others_have_open(filled: str, tmp_path: Path) -> None:
    async def scenario(storage: StorageManager) -> None:
        await storage.add_message("ada", "s1", Message("user", "not folded into the files yet", id="fresh"))

        import asyncio

        await asyncio.to_thread(good, filled, "backup", str(tmp_path / "b"))

    fill(filled, scenario)
    good(str(tmp_path / "new"), "restore", str(tmp_path / "b"))
    assert "not folded into the files yet" in good(str(tmp_path / "new"), "show", "ada", "s1")
