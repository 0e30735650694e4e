"""`chatdb`: what it prints, what it returns, and what never reaches a terminal."""

import asyncio
import gzip
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from flatfile_chat_database import Message, SituationalContext, StorageConfig, StorageManager
from flatfile_chat_database.cli import cli
from flatfile_chat_database.cli.mirroring import mirror
from flatfile_chat_database.layout import Layout
from flatfile_chat_database.terminal import block, cut, duration, json_line, one_line, table, utc, visible, width

from .characters import characters

COMMANDS = ["backup", "check", "demo", "export", "import", "ls", "reindex", "restore", "search", "show", "tail"]
CHATDB = [sys.executable, "-m", "flatfile_chat_database"]
OPENAI = ["--format", "openai-jsonl"]

HOSTILE = "a\x1b[31mred\x1b]0;title\x07\x9b2J\x7f\r\b\x00 \u202egnp.exe\u2066x\u2069\u2028\u2029\ufeff\U000e0041end"
HOSTILE_ID = "x\u202ey\u2066z\u200b"


@pytest.fixture
def store(store_path: Path) -> str:
    return str(store_path)


EVERY_COMMAND = [*cli.commands, *(f"mirror {name}" for name in mirror.commands)]


def chatdb(store: str | None, *arguments: str, **more: Any) -> Result:
    """Run a command in this process."""
    first = [] if store is None else ["--store", store]
    return CliRunner().invoke(cli, [*first, *arguments], prog_name="chatdb", **more)


def good(store: str | None, *arguments: str) -> str:
    result = chatdb(store, *arguments)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def objects(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def fill(store: str, scenario: Any) -> Any:
    """Run `await scenario(storage)` on the store."""

    async def run() -> Any:
        async with StorageManager(StorageConfig(storage_base_path=store)) as storage:
            return await scenario(storage)

    return asyncio.run(run())


async def two_chats(storage: StorageManager) -> list[str]:
    await storage.create_user("ada")
    await storage.create_user("张三")
    first = await storage.create_session("ada", "Python help", created_at="2026-01-02T03:04:05+00:00", session_id="s1")
    second = await storage.create_session("ada", "苏州两日游", created_at="2026-02-02T03:04:05+00:00", session_id="s2")
    await storage.add_messages(
        "ada",
        first,
        [
            Message("user", "How do I read\n\ta file?", timestamp="2026-01-02T03:04:06+00:00", id="m1"),
            Message("assistant", "Use open().", timestamp="2026-01-02T05:04:07+02:00", id="m2", attachments=["a.txt"]),
            Message("user", "Thanks", timestamp="2026-01-02T03:04:08+00:00", id="m3", parent_id="m2"),
        ],
    )
    await storage.add_message("ada", second, Message("user", "拙政园怎么走？", timestamp="2026-02-03T00:00:00+00:00"))
    return [first, second]


@pytest.fixture
def filled(store: str) -> str:
    fill(store, two_chats)
    return store


def jsonl(path: Path, *records: Any, zipped: bool = False) -> str:
    data = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    path.write_bytes(gzip.compress(data) if zipped else data)
    return str(path)


def chats(count: int) -> list[dict[str, Any]]:
    return [{"id": f"c-{n}", "messages": [{"role": "user", "content": f"Number {n}"}]} for n in range(count)]


# --- help and usage ------------------------------------------------------------------------------------


def test_every_command_and_option_has_help() -> None:
    context = click.Context(cli)
    assert sorted(cli.list_commands(context)) == [
        "backup", "check", "demo", "export", "import", "ls", "migrate", "mirror", "reindex", "restore", "schema",
        "search", "show", "tail",
    ]  # fmt: skip
    for command in [cli, *cli.commands.values()]:
        assert command.help, command.name
        for parameter in command.params:
            assert not isinstance(parameter, click.Option) or parameter.help, f"{command.name} {parameter.name}"
        result = chatdb(None, *([] if command is cli else [str(command.name)]), "--help")
        assert result.exit_code == 0
        assert result.stdout.startswith("Usage: chatdb")


def test_the_version_is_printed() -> None:
    assert re.fullmatch(r"chatdb \d+\.\d+\.\d+\n", good(None, "--version"))


def test_no_command_is_a_usage_error_that_shows_the_commands() -> None:
    result = chatdb(None)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Commands:" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command"),
        (["ls", "--nonsense"], "No such option"),
        (["ls", "--store", "x"], "--store stands before the command: chatdb --store PATH_OR_URL ls"),
        (["ls", "--store=x"], "--store stands before the command: chatdb --store PATH_OR_URL ls"),
        (["ls", "--set", "x=1"], "--set stands before the command: chatdb --set KEY=VALUE ls"),
        (["check", "--json"], "--json stands before the command: chatdb --json check"),
        (["show", "ada"], "Missing argument 'SESSION'"),
        (["search", "x"], "Missing option '--user'"),
        (["ls", "--limit", "-1"], "-1"),
        (["--store", "", "ls"], "--store must not be empty"),
        (["--store", "nosuch:thing", "ls"], "names no backend"),
        (["--store", "my.db", "ls"], "my.db would be a folder. A file of SQLite is sqlite:my.db, and a folder of that"),
        (["migrate", "/chats", "new.sqlite3"], "new.sqlite3 would be a folder. A file of SQLite is sqlite:new.sqlite3"),
        (["--set", "max_sesions_per_user=3", "ls"], "Did you mean 'max_sessions_per_user'?"),
        (["--set", "max_sessions_per_user=many", "ls"], "must be a whole number"),
        (["--set", "max_sessions_per_user", "ls"], "is not KEY=VALUE"),
        (["import", "no/such/file", *OPENAI], "does not exist"),
        (["import", ".", *OPENAI], "is a directory"),
        (["import", __file__, "--format", "nonsense"], "nonsense"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2_and_says_why(arguments: list[str], message: str) -> None:
    result = chatdb(None, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("chatdb: ")
    assert message in result.stderr


def test_the_environment_is_read_and_a_bad_variable_is_a_usage_error(
    filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATDB_STORAGE_BASE_PATH", filled)
    assert "ada" in good(None, "ls")
    monkeypatch.setenv("CHATDB_MAX_SESSIONS_PER_USER", "many")
    assert chatdb(None, "ls").exit_code == 2
    assert chatdb(None, "ls", "--help").exit_code == 0


def test_an_unknown_variable_is_a_warning_on_one_line(filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATDB_MAX_SESIONS_PER_USER", "3")
    result = chatdb(filled, "ls")
    assert result.exit_code == 0
    assert result.stderr.startswith("chatdb: warning: ")
    assert result.stderr.count("\n") == 1


def test_a_store_option_wins_over_the_environment(filled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATDB_STORAGE_URL", f"file:{tmp_path}/elsewhere")
    assert "ada" in good(filled, "ls")
    assert "ada" in good(f"file:{filled}", "ls")
    assert chatdb(None, "ls").exit_code == 1


@pytest.mark.parametrize("name", EVERY_COMMAND)
def test_the_help_of_each_command_ends_with_an_example_of_it(name: str) -> None:
    _, _, text = good(None, *name.split(), "--help").rpartition("Example")
    lines = [line.strip() for line in text.splitlines()[1:]]
    assert lines
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "chatdb" and f" {name} " in f"{line} "
        # An option that does not exist would be an error before the help is shown.
        assert good(None, *arguments, "--help").startswith(f"Usage: chatdb {name} ")


@pytest.mark.parametrize(
    "arguments", [["ls"], ["ls", "ada"], ["show", "ada", "s"], ["tail", "ada", "s"], ["search", "x", "--user", "ada"],
                  ["check"]],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["absent", "empty", "memory"])
def test_reading_an_absent_store_says_so_and_makes_none(
    store: str, store_path: Path, arguments: list[str], kind: str
) -> None:
    if kind == "empty":
        store_path.mkdir()
    result = chatdb("memory:" if kind == "memory" else store, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("chatdb: There is no chat store at ")
    assert result.stderr.count("\n") == 1
    assert store_path.exists() == (kind == "empty")
    assert not store_path.exists() or not list(store_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ls", "eve"], "There is no user 'eve'."),
        (["show", "eve", "s1"], "There is no user 'eve'."),
        (["show", "ada", "s9"], "The user 'ada' has no session 's9'."),
        (["tail", "ada", "s9"], "The user 'ada' has no session 's9'."),
        (["search", "x", "--user", "eve"], "There is no user 'eve'."),
        (["search", "x", "--user", "ada", "--session", "s9"], "The user 'ada' has no session 's9'."),
        (["ls", ""], "user_id must not be empty."),
        (["ls", "a\nb"], "control characters"),
    ],
)
def test_what_does_not_exist_is_exit_code_1_and_one_line(filled: str, arguments: list[str], message: str) -> None:
    result = chatdb(filled, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("chatdb: ") and message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_store_of_a_newer_format_is_an_error_on_one_line(filled: str) -> None:
    path = Path(filled, Layout(StorageConfig()).key("store"))
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))
    result = chatdb(filled, "ls")
    assert result.exit_code == 1
    assert "Install a newer" in result.stderr


# --- ls, show, search ----------------------------------------------------------------------------------


def test_ls_shows_users_in_aligned_columns(filled: str) -> None:
    assert good(filled, "ls").splitlines() == ["USER  SESSIONS", "ada          2", "张三         0"]


def test_ls_shows_sessions_most_recently_updated_first(filled: str) -> None:
    assert good(filled, "ls", "ada").splitlines() == [
        "SESSION  UPDATED (UTC)        MESSAGES  TITLE",
        "s2       2026-02-03 00:00:00         1  苏州两日游",
        "s1       2026-01-02 03:04:08         3  Python help",
    ]
    assert len(good(filled, "ls", "ada", "--limit", "1", "--offset", "1").splitlines()) == 2


def test_ls_as_json_has_every_field(filled: str) -> None:
    assert objects(good(filled, "--json", "ls")) == [
        {"user_id": "ada", "sessions": 2},
        {"user_id": "张三", "sessions": 0},
    ]
    first = objects(good(filled, "--json", "ls", "ada"))[0]
    assert first == {
        "id": "s2",
        "user_id": "ada",
        "title": "苏州两日游",
        "created_at": "2026-02-02T03:04:05.000000+00:00",
        "updated_at": "2026-02-03T00:00:00.000000+00:00",
        "metadata": {},
        "messages": 1,
    }


def test_ls_of_nothing_says_so_on_stderr(filled: str) -> None:
    result = chatdb(filled, "ls", "张三")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "No sessions to list.\n")


def test_ls_lists_more_than_the_default_limits(store: str) -> None:
    async def many(storage: StorageManager) -> None:
        for n in range(120):
            await storage.create_user(f"u{n:03}")
        for n in range(70):
            await storage.create_session("u000", session_id=f"s{n}")

    fill(store, many)
    assert len(good(store, "ls").splitlines()) == 121
    assert len(good(store, "ls", "u000").splitlines()) == 71


def test_show_prints_messages_with_their_lines(filled: str) -> None:
    assert good(filled, "show", "ada", "s1") == (
        "Python help\n"
        "s1, updated 2026-01-02 03:04:08 UTC\n"
        "\n"
        "user  2026-01-02 03:04:06\n"
        "  How do I read\n"
        "      a file?\n"
        "\n"
        "assistant  2026-01-02 03:04:07\n"
        "  Use open().\n"
        "  [a.txt]\n"
        "\n"
        "user  2026-01-02 03:04:08\n"
        "  Thanks\n"
    )


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ([], ["m1", "m2", "m3"]),
        (["--limit", "0"], []),
        (["--limit", "2"], ["m1", "m2"]),
        (["--offset", "1"], ["m2", "m3"]),
        (["--offset", "-2"], ["m2", "m3"]),
        (["--offset", "-2", "--limit", "1"], ["m2"]),
        (["--offset", "9"], []),
        (["--offset", "1", "--limit", "9"], ["m2", "m3"]),
    ],
)
def test_show_pages(filled: str, options: list[str], ids: list[str]) -> None:
    assert [record["id"] for record in objects(good(filled, "--json", "show", "ada", "s1", *options))] == ids


def test_show_as_json_prints_messages_as_they_are(filled: str) -> None:
    records = objects(good(filled, "--json", "show", "ada", "s1"))
    assert records[2] == {
        "id": "m3",
        "role": "user",
        "content": "Thanks",
        "timestamp": "2026-01-02T03:04:08+00:00",
        "attachments": [],
        "metadata": {},
        "parent_id": "m2",
    }
    assert "parent_id" not in records[0]


@pytest.mark.damage
def test_show_passes_over_a_damaged_line_with_a_warning_and_stops_at_it_with_strict(filled: str) -> None:
    log = Path(filled, Layout(StorageConfig()).key("messages", user_id="ada", session_id="s1"))
    first, *others = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([first, b"\x1b[31mdamage\n", *others]))
    run = subprocess.run([*CHATDB, "--store", filled, "show", "ada", "s1"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.count("2026-01-02 03:04:0")) == (0, 4)
    assert run.stderr.startswith("chatdb: warning: ") and "messages.jsonl" in run.stderr
    assert run.stderr.count("\n") == 1
    result = chatdb(filled, "show", "ada", "s1", "--strict")
    assert result.exit_code == 1
    assert "is no message" in result.stderr


def test_search_finds_english_and_chinese(filled: str) -> None:
    assert good(filled, "search", "READ file", "--user", "ada") == (
        "s1  user  2026-01-02 03:04:06\n  How do I «read» a «file»?\n"
    )
    assert "«政园»" in good(filled, "search", "政园", "--user", "ada")
    (hit,) = objects(good(filled, "--json", "search", "thanks", "--user", "ada", "--session", "s1"))
    assert (hit["kind"], hit["session_id"], hit["message"]["id"]) == ("message", "s1", "m3")


def test_search_has_a_limit_and_an_order(filled: str) -> None:
    async def more(storage: StorageManager) -> None:
        await storage.update_context("ada", "s1", SituationalContext("open open open"))

    fill(filled, more)
    assert len(objects(good(filled, "--json", "search", "open", "--user", "ada"))) == 2
    assert len(objects(good(filled, "--json", "search", "open", "--user", "ada", "--limit", "1"))) == 1
    best = objects(good(filled, "--json", "search", "open", "--user", "ada", "--order", "relevance"))
    assert [hit["score"] for hit in best] == sorted((hit["score"] for hit in best), reverse=True)


def test_search_that_finds_nothing_is_done_all_the_same(filled: str) -> None:
    result = chatdb(filled, "search", "zebra", "--user", "ada")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "Nothing found.\n")


# --- import --------------------------------------------------------------------------------------------


def test_import_makes_the_store_and_reports(store: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "chats.jsonl.gz", *chats(1_234), zipped=True)
    options = ["--set", "max_sessions_per_user=2000"]
    lines = good(store, *options, "import", path, *OPENAI).splitlines()
    assert lines[0] == f"{path}: imported into {store} for local"
    assert lines[1:6] == [
        "  conversations        1,234",
        "  messages             1,234",
        "  added                1,234",
        "  already there            0",
        "  skipped                  0",
    ]
    assert re.fullmatch(r"\d+\.\d s, [\d,]+ messages/s", lines[6])
    again = objects(good(store, "--json", *options, "import", path, *OPENAI))[0]
    assert (again["added"], again["already_there"], again["skipped"]) == (0, 1_234, {})


def test_import_for_another_user_and_a_second_format_of_line(store: str, tmp_path: Path) -> None:
    good(store, "import", jsonl(tmp_path / "a", *chats(2)), *OPENAI, "--user", "张三")
    assert good(store, "ls").splitlines()[1:] == ["张三         2"]


def test_import_does_not_advise_what_would_put_messages_out_of_order(store: str, tmp_path: Path) -> None:
    texts = ("one", "two" * 200, "three")
    path = jsonl(tmp_path / "a", {"id": "1", "messages": [{"role": "user", "content": text} for text in texts]})
    result = chatdb(store, "--set", "max_message_size_bytes=300", "import", path, *OPENAI)
    assert "  to raise the limit: delete the session, then chatdb --set max_message_size_bytes=…\n" in result.stdout
    result = chatdb(store, "import", path, *OPENAI)
    assert result.exit_code == 1
    assert (
        "skipped 1 message: the message would come after its successors: delete the session and import again\n"
        "  line 1: message 2\n"
    ) in result.stdout


def test_import_reports_what_it_skipped_and_returns_1(store: str, tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    jsonl(path, *chats(3))
    path.write_bytes(b"\x1b[31mno JSON\n" * 7 + path.read_bytes())
    result = chatdb(store, "--set", "max_sessions_per_user=1", "import", str(path), *OPENAI)
    assert result.exit_code == 1
    *lines, _, last = result.stdout.splitlines()
    assert last == "Skipped in all: 7 lines, 2 conversations."
    assert lines[6:] == [
        "skipped 7 lines: the line is not JSON",
        *[f"  line {n}: Expecting value: line 1 column 1 (char 0)" for n in range(1, 6)],
        "  and 2 more",
        "skipped 2 conversations: no room for another session",
        *[
            f"  line {n}: 2 exceeds the limit of 1 (max_sessions_per_user). Raise max_sessions_per_user in the "
            "configuration if this is wanted."
            for n in (9, 10)
        ],
        "  to raise the limit: chatdb --set max_sessions_per_user=…",
    ]


@pytest.mark.parametrize("content", [b"", b"no JSON\n", b'{"messages": [7]}\n'])
def test_import_of_nothing_makes_no_store(store: str, store_path: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    result = chatdb(store, "import", str(path), *OPENAI)
    assert result.exit_code == (1 if content else 0)
    assert f"{path}: nothing imported into {store} for local\n" in result.stdout
    assert not store_path.exists()


def test_a_dry_run_writes_nothing(store: str, store_path: Path, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a", *chats(3))
    assert "would be imported" in good(store, "import", path, *OPENAI, "--dry-run")
    assert not store_path.exists()
    assert "  added                    3" in good("memory:", "import", path, *OPENAI, "--dry-run")


@pytest.mark.slow
def test_an_import_that_is_killed_is_completed_by_the_next(store: str, tmp_path: Path) -> None:
    records = [
        {"id": f"c-{n}", "messages": [{"role": "user", "content": f"{n}-{m}"} for m in range(10)]} for n in range(800)
    ]
    path = jsonl(tmp_path / "chats.jsonl", *records)
    command = [*CHATDB, "--store", store, "--set", "max_sessions_per_user=5000", "--json", "import", path, *OPENAI]
    logs = Path(store, "users", "local")
    for least in (50, 200, 400):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            wait_until(lambda wanted=least: logs.is_dir() and len(os.listdir(logs)) > wanted)
            process.kill()
    (report,) = objects(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert report["added"] + report["already_there"] == 8_000
    assert report["already_there"] > 0 and report["skipped"] == {}

    async def whole(storage: StorageManager) -> None:
        sessions = await storage.list_sessions("local", 10_000)
        assert len(sessions) == 800
        for session in sessions:
            messages = await storage.get_messages("local", session.id)
            number = session.metadata["import"]["id"].removeprefix("c-")
            assert [message.content for message in messages] == [f"{number}-{m}" for m in range(10)]

    fill(store, whole)
    assert chatdb(store, "check").exit_code == 0


def test_an_interrupted_import_is_exit_code_130(store: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "chats.jsonl", *chats(900))
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(
        [*CHATDB, "--store", store, "import", str(tmp_path / "pipe"), *OPENAI], stderr=subprocess.PIPE, text=True
    ) as process:
        with open(tmp_path / "pipe", "wb", buffering=0) as pipe:
            pipe.write(Path(path).read_bytes())
            wait_until(lambda: Path(store, "users", "local").is_dir())
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert process.stderr is not None
        error = process.stderr.read()
        assert error == "chatdb: Interrupted. What was imported stays; run it again, and it goes on.\n"
        assert process.wait(20) == 130


@pytest.mark.parametrize("module", ["click", "flatfile_chat_database.storage", "flatfile_chat_database.cli.keeping"])
def test_a_command_that_is_interrupted_while_it_begins_says_so_in_one_line(module: str) -> None:
    program = f"""if True:
        import sys
        class Stopping:
            def find_spec(self, name, path=None, target=None):
                if name == {module!r}:
                    raise KeyboardInterrupt
        sys.meta_path.insert(0, Stopping())
        from flatfile_chat_database.cli import main
        main()
    """
    run = subprocess.run([sys.executable, "-c", program, "ls"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "chatdb: Interrupted.\n")


@pytest.mark.parametrize("more", [[], ["--json"]])
@pytest.mark.parametrize(
    ("place", "arguments", "left"),
    [
        ("transfer.writing.backup", ["backup", "{}/b"], "Nothing has the name yet; run it again, which begins anew."),
        ("transfer.writing.export_store", ["export", "{}/e"], "Nothing has the name yet; run it again, which begins"),
        (
            "transfer.restoring.restore",
            ["restore", "{}/file"],
            "There is no store yet; run it again, which begins anew",
        ),
        (
            "transfer.adding.import_archive",
            ["import", "--format", "chatdb", "{}/file"],
            "What was imported stays; run it",
        ),
        ("cli.migrating.migrate", ["migrate", "{}/store", "{}/new"], "What was copied stays, and is no store yet; run"),
    ],
)
def test_a_transfer_that_is_interrupted_says_what_it_leaves(
    place: str,
    arguments: list[str],
    left: str,
    more: list[str],
    filled: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(f"flatfile_chat_database.{place}", interrupted)
    result = chatdb(filled, *more, *(each.format(tmp_path) for each in arguments))
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.startswith(f"chatdb: Interrupted. {left}") and result.stderr.count("\n") == 1


# --- check ---------------------------------------------------------------------------------------------


def test_check_of_a_good_store_is_0(filled: str) -> None:
    assert "The store is clean." in good(filled, "check")


def test_check_as_json_ends_with_the_counts_and_whether_the_store_is_clean(filled: str) -> None:
    (summary,) = objects(good(filled, "--json", "check"))
    assert summary["clean"] is True
    assert (summary["counts"]["users"], summary["counts"]["sessions"], summary["counts"]["messages"]) == (2, 2, 4)


@pytest.mark.damage
def test_check_reports_damage_with_1_and_repairs_it_with_fix(filled: str) -> None:
    log = Path(filled, Layout(StorageConfig()).key("messages", user_id="ada", session_id="s1"))
    log.write_bytes(log.read_bytes() + b'{"id": "half')
    result = chatdb(filled, "check")
    assert result.exit_code == 1
    assert "torn-tail" in result.stdout
    problem, summary = objects(chatdb(filled, "--json", "check").stdout)
    assert (problem["kind"], problem["fixed"]) == ("torn-tail", False)
    assert (summary["clean"], summary["counts"]["users"]) == (False, 2)
    assert chatdb(filled, "check", "--fix").exit_code == 0
    assert chatdb(filled, "check").exit_code == 0


@pytest.mark.damage
def test_check_can_look_at_a_store_whose_own_file_is_damaged(filled: str) -> None:
    Path(filled, Layout(StorageConfig()).key("store")).write_text("{")
    assert chatdb(filled, "ls").exit_code == 1
    result = chatdb(filled, "check")
    assert result.exit_code == 1
    assert "damaged-store-file" in result.stdout


@pytest.mark.damage
def test_a_name_with_a_newline_makes_no_line_of_its_own_in_a_report(filled: str) -> None:
    lines = good(filled, "check").splitlines()
    Path(filled, "x\nThe store is clean.\nDAMAGE").write_text("")
    Path(filled, Layout(StorageConfig()).key("store")).write_text("{")
    result = chatdb(filled, "check")
    assert "The store is clean." in lines and "The store is clean." not in result.stdout.splitlines()
    assert result.stdout.count("\n") == 4
    assert "x\\nThe store is clean.\\nDAMAGE" in result.stdout


# --- tail ----------------------------------------------------------------------------------------------


def wait_until(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@contextmanager
def following(store: str, *arguments: str, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `tail -f` into a file."""
    with (
        output.open("wb") as file,
        subprocess.Popen(
            [*CHATDB, "--store", store, "--json", "tail", "-f", *arguments], stdout=file, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def test_tail_prints_the_newest(filled: str) -> None:
    for count, ids in ((0, []), (2, ["m2", "m3"]), (9, ["m1", "m2", "m3"])):
        assert [
            record["id"] for record in objects(good(filled, "--json", "tail", "-n", str(count), "ada", "s1"))
        ] == ids


def test_tail_follows_through_appends_removals_and_a_clear_and_ends_quietly(filled: str, tmp_path: Path) -> None:
    output = tmp_path / "output"

    def ids() -> list[str]:
        return [record["id"] for record in objects(output.read_text())]

    with following(filled, "-n", "1", "ada", "s1", output=output) as process:
        wait_until(lambda: ids() == ["m3"])

        async def append(storage: StorageManager, *new: str) -> None:
            await storage.add_messages("ada", "s1", [Message("user", name, id=name) for name in new])

        fill(filled, lambda storage: append(storage, "n1", "n2"))
        wait_until(lambda: ids() == ["m3", "n1", "n2"])

        async def pop(storage: StorageManager) -> None:
            await storage.pop_message("ada", "s1")
            await storage.delete_message("ada", "s1", "m1")
            await append(storage, "n3")

        fill(filled, pop)
        wait_until(lambda: ids() == ["m3", "n1", "n2", "n3"])

        async def clear(storage: StorageManager) -> None:
            await storage.clear_messages("ada", "s1")
            await append(storage, "p1", "p2", "p3", "p4", "p5", "p6", "p7", "p8")

        fill(filled, clear)
        wait_until(lambda: output.read_text().endswith("\n") and '"p8"' in output.read_text())
        before, warning, after = re.split("(chatdb: warning: .*\n)", output.read_text())
        assert [record["id"] for record in objects(before)] == ["m3", "n1", "n2", "n3"]
        assert [record["id"] for record in objects(after)] == [f"p{n}" for n in range(1, 9)]
        assert "cleared, cut or made anew" in warning and "printed from its beginning" in warning
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


@pytest.mark.parametrize("user", ["ada", "nobody"])
def test_tail_says_that_it_waits_for_a_session_that_does_not_exist_yet(filled: str, tmp_path: Path, user: str) -> None:
    output = tmp_path / "output"
    waiting = f"chatdb: waiting for the session 'later' of the user '{user}' …"
    with following(filled, user, "later", output=output) as process:
        wait_until(lambda: output.read_text().splitlines() == [waiting])
        time.sleep(0.5)
        assert process.poll() is None

        async def begin(storage: StorageManager) -> None:
            await storage.create_user(user)
            await storage.create_session(user, session_id="later")
            await storage.add_message(user, "later", Message("user", "Hello", id="first"))

        fill(filled, begin)
        wait_until(lambda: [record["id"] for record in objects(output.read_text().partition("\n")[2])] == ["first"])


def test_tail_follows_all_sessions_of_a_user_and_goes_on_from_a_cursor(filled: str, tmp_path: Path) -> None:
    output = tmp_path / "output"

    def printed() -> list[dict[str, Any]]:
        return objects(output.read_text().rpartition("\n")[0])

    async def write(storage: StorageManager, *names: str) -> None:
        for name in names:
            session = f"of {name}"
            await storage.create_session("ada", session_id=session)
            await storage.add_message("ada", session, Message("user", name, id=name))

    with following(filled, "ada", "--cursor", "beginning", output=output):
        wait_until(lambda: len(printed()) == 4)
        fill(filled, lambda storage: write(storage, "n1", "n2"))
        wait_until(lambda: len(printed()) == 6)
        assert sorted(record["session_id"] for record in printed()) == ["of n1", "of n2", "s1", "s1", "s1", "s2"]
        cursors = [record["cursor"] for record in printed()]
    fill(filled, lambda storage: write(storage, "n3"))
    for cursor, count in ((cursors[3], 3), (cursors[4], 2), (cursors[5], 1)):
        with following(filled, "ada", "--cursor", cursor, output=output):
            wait_until(lambda count=count: len(printed()) == count)
            assert "n3" in {record["id"] for record in printed()}
    with following(filled, "ada", "s1", "--cursor", cursors[4], output=output) as process:
        assert process.wait(30) == 1
    assert "cursor is of another store, or of another user, session or panel" in output.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ada"], "Name a SESSION, or follow all of them with -f."),
        (["ada", "s1", "--cursor", "x"], "--cursor needs -f."),
        (["-f", "ada", "-n", "3"], "-n cannot be given without a SESSION."),
        (["-f", "ada", "s1", "-n", "3", "--cursor", "x"], "-n cannot be given with --cursor."),
    ],
)
def test_tail_says_what_does_not_go_together(filled: str, arguments: list[str], message: str) -> None:
    result = chatdb(filled, "tail", *arguments)
    assert result.exit_code == 2 and message in result.stderr


# --- terminals and pipes -------------------------------------------------------------------------------


def steering(text: str) -> set[str]:
    """Return the characters of `text` that a terminal could be steered by."""
    kinds = {c: unicodedata.category(c) for c in {*text}}
    found = {c for c, kind in kinds.items() if kind in ("Cc", "Cs", "Zl", "Zp") and c not in "\r\n"}
    return found | {c for c, kind in kinds.items() if kind == "Cf" and c not in "\u200c\u200d"}


def on_terminal(*command: str) -> tuple[int, str]:
    """Run a command on a terminal of its own; return its exit code and all that the terminal was sent."""
    process, terminal = pty.fork()
    if process == 0:
        try:
            os.execvpe(command[0], list(command), os.environ | {"TERM": "xterm", "COLUMNS": "100"})
        finally:
            os._exit(127)
    sent = bytearray()
    try:
        while select.select([terminal], [], [], 30)[0]:
            try:
                sent += os.read(terminal, 65536)
            except OSError:  # Linux says so when the other side is closed
                break
    finally:
        os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), sent.decode()


async def hostile_chat(storage: StorageManager) -> None:
    await storage.create_user(HOSTILE_ID)
    await storage.create_session(HOSTILE_ID, HOSTILE, session_id=HOSTILE_ID)
    message = Message(HOSTILE, f"word {HOSTILE}\nsecond {HOSTILE}", attachments=[HOSTILE])
    await storage.add_message(HOSTILE_ID, HOSTILE_ID, message)


DONE = "== done =="
ONE_AFTER_THE_OTHER = f"""
import json, sys
from flatfile_chat_database.cli import main

for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit:
        pass
    print({DONE!r}, flush=True)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")
@pytest.mark.parametrize("as_json", [False, True])
def test_stored_control_characters_never_reach_a_terminal(store: str, tmp_path: Path, as_json: bool) -> None:
    fill(store, hostile_chat)
    bad = tmp_path / "evil\x1b[31m\u202e.jsonl"
    bad.write_bytes(b'\xff\x1b[31m\n{"\x1b": 1}\n{"\\u001b[31m\\u202e": 1}\n')
    first = ["--store", store, *(["--json"] if as_json else [])]
    commands = [
        ["ls"],
        ["ls", HOSTILE_ID],
        ["show", HOSTILE_ID, HOSTILE_ID],
        ["tail", HOSTILE_ID, HOSTILE_ID],
        ["search", "word", "--user", HOSTILE_ID],
        ["check"],
        ["show", HOSTILE_ID, "absent\x1b[31m\u202e"],
        ["ls", "absent\u202e"],
        ["nonsense\x1b[31m\u202e"],
        ["import", str(bad), *OPENAI],
        ["import", str(bad) + "absent", *OPENAI],
    ]
    code, sent = on_terminal(sys.executable, "-c", ONE_AFTER_THE_OTHER, json.dumps([first + each for each in commands]))
    *all_sent, rest = sent.split(DONE)
    assert (code, rest, len(all_sent)) == (0, "\r\n", len(commands))
    for command, sent in zip(commands, all_sent, strict=True):
        assert sent.strip()
        # What the program itself may send: styles (never red, which is what was stored), and the progress bar's moves.
        sent = re.sub(r"\x1b\[(?!31m)[\d;]*m|\x1b\[(?:\?25[lh]|\d*[AGK])", "", sent)
        assert steering(sent) == set(), command


def test_the_head_is_dim_on_a_terminal_only(filled: str) -> None:
    assert "\x1b[2m" in on_terminal(*CHATDB, "--store", filled, "ls")[1]
    assert "\x1b" not in on_terminal("env", "NO_COLOR=1", *CHATDB, "--store", filled, "ls")[1]
    assert "\x1b" not in good(filled, "ls")


def test_json_output_holds_what_was_stored(store: str) -> None:
    fill(store, hostile_chat)
    output = good(store, "--json", "show", HOSTILE_ID, HOSTILE_ID)
    assert steering(output) == set()
    (record,) = objects(output)
    assert (record["role"], record["attachments"]) == (HOSTILE, [HOSTILE])


def test_import_shows_a_progress_bar_on_a_terminal(store: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "chats.jsonl", *chats(900))
    code, sent = on_terminal(*CHATDB, "--store", store, "import", path, *OPENAI)
    assert code == 0
    assert "messages, " in sent and "/s" in sent
    assert "  added                  900" in sent


def test_a_reader_that_stops_early_is_no_failure(store: str) -> None:
    async def long(storage: StorageManager) -> None:
        await storage.create_user("ada")
        await storage.create_session("ada", session_id="s")
        await storage.add_messages("ada", "s", [Message("user", "x" * 1_000) for _ in range(2_000)])

    fill(store, long)
    command = f"{' '.join(CHATDB)} --store {store} show ada s | head -n 1; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.count("\n") == 1


def test_a_full_disk_behind_stdout_is_an_error(filled: str) -> None:
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [*CHATDB, "--store", filled, "ls"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert run.returncode == 1
    assert run.stderr == "chatdb: No space left on device. Free some space, or name another place.\n"


def test_output_in_a_narrow_encoding_is_no_failure(filled: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    run = subprocess.run([*CHATDB, "--store", filled, "ls"], capture_output=True, env=environment, check=True)
    assert rb"\u5f20\u4e09" in run.stdout


def test_the_installed_program_and_the_module_are_the_same(filled: str) -> None:
    program = Path(sys.executable).parent / "chatdb"
    assert program.exists(), "the package is not installed in this environment"
    one = subprocess.run([str(program), "--store", filled, "ls"], capture_output=True, check=True)
    other = subprocess.run([*CHATDB, "--store", filled, "ls"], capture_output=True, check=True)
    assert one.stdout == other.stdout


def test_reindex_builds_the_index_of_a_user_and_those_that_are_there(filled: str) -> None:
    [user] = [json.loads(line)["user_id"] for line in chatdb(filled, "--json", "ls").stdout.splitlines()][:1]
    assert chatdb(filled, "reindex").stdout.startswith("Indexes built: 0 ")
    assert chatdb(filled, "reindex", user).stdout.startswith("Indexes built: 1 ")
    assert json.loads(chatdb(filled, "--json", "reindex").stdout)["indexes"] == 1
    result = chatdb(filled, "reindex", "nobody")
    assert result.exit_code == 1
    assert "nobody" in result.stderr


def test_rich_is_loaded_only_for_a_progress_bar(filled: str) -> None:
    program = (
        "import sys; from flatfile_chat_database.cli import cli\n"
        f"cli(['--store', {filled!r}, 'ls'], standalone_mode=False)\n"
        "print([name for name in ('rich', 'sqlite3') if name in sys.modules])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.endswith("[]\n")


# --- text ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_character_that_steers_a_terminal_is_visible_as_itself() -> None:
    everything = "".join(characters())
    for escape in (visible, one_line, json_line):
        assert steering(escape(everything)) == set()
    assert steering(block(everything)) == set()
    without_pairs = "".join(c for c in everything if not "\udc00" <= c <= "\udfff")
    assert json.loads(json_line(without_pairs)) == without_pairs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("naïve 张三 👩\u200d🚀", "naïve 张三 👩\u200d🚀"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\x9b\u202e\U000e0041", "\\x9b\\u202e\\U000e0041"),
        ("a\tb\nc\r", "a\\tb\\nc\\r"),
        ("\ud83d", "\\ud83d"),
    ],
)
def test_escapes_are_readable(text: str, expected: str) -> None:
    assert visible(text) == expected


def test_blocks_keep_their_lines() -> None:
    assert block("a\r\n\n\tb\rc") == "  a\n\n      b\\rc"
    assert one_line(" a\n\tb\u2028c ") == "a b c"


def test_columns_are_aligned_by_what_a_terminal_shows() -> None:
    assert (width("abc"), width("张三"), width("e\u0301"), width("👩\u200d🚀")) == (3, 4, 1, 4)
    assert table(("A", "N", "T"), [("张三", "1", "x"), ("b", "22", "yy")], right=[1]) == [
        "A      N  T",
        "张三   1  x",
        "b     22  yy",
    ]
    assert table(("A", "T"), [("a", "x" * 50)], columns=20)[1] == "a  " + "x" * 16 + "…"
    assert (cut("abc", 3), cut("abcd", 3), cut("张三李四", 6)) == ("abc", "ab…", "张三…")


def test_times_are_shown_in_utc_and_lengths_in_words() -> None:
    assert utc("2026-01-02T03:04:05.5+02:00") == "2026-01-02 01:04:05"
    assert utc("yes\x1bterday") == "yes\\x1bterday"
    assert (duration(4.21), duration(200)) == ("4.2 s", "3 min 20 s")
