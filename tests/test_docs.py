"""The documentation tells the truth: its code runs, its links lead somewhere, its generated pages are fresh."""

import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from click.testing import CliRunner

from flatfile_chat_database import StorageConfig, StorageManager
from flatfile_chat_database.check import check
from flatfile_chat_database.cli import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def in_a_coroutine(code: str) -> str:
    """Return a program that runs code which awaits."""
    return f"import asyncio\nasync def main():\n{textwrap.indent(code, '    ')}\nasyncio.run(main())"


def test_the_generated_pages_are_fresh() -> None:
    finished = subprocess.run(
        [sys.executable, str(ROOT / "tools/docs.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


def test_the_program_in_the_readme_runs_and_writes_what_the_readme_shows(tmp_path: Path) -> None:
    program, more = blocks(ROOT / "README.md", "python")
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "user: How do I read a file in Python?\nassistant: Use open(), best in a with block.\n"
    [log] = tmp_path.glob("data/users/ada/*/messages.jsonl")
    [shown] = blocks(ROOT / "README.md", "console")

    more = f"from flatfile_chat_database import StorageManager\n{in_a_coroutine(more)}"
    finished = subprocess.run([sys.executable, "-c", more], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert finished.stdout == f"{log.parent.name} How do I «read» a «file» in Python?\n"

    def without_what_differs(text: str) -> str:
        return re.sub(r'"(id|timestamp)":"[^"]*"', r'"\1":""', text)

    assert without_what_differs(shown).endswith(without_what_differs(log.read_text(encoding="utf-8")))


def test_the_program_in_the_page_on_watching_prints_what_the_page_shows(tmp_path: Path) -> None:
    [program] = blocks(ROOT / "docs/watching.md", "python")
    [shown] = blocks(ROOT / "docs/watching.md", "console")
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (finished.stdout, finished.stderr) == (shown, "")


def test_the_examples_of_the_configuration_run(tmp_path: Path) -> None:
    examples = blocks(ROOT / "docs/configuration.md", "python")
    [content] = re.findall(r"object such as `(.*)`", (ROOT / "docs/configuration.md").read_text(encoding="utf-8"))
    (tmp_path / "chat.json").write_text(content, encoding="utf-8")
    program = "\n".join(f"{example}print(storage.base_path, storage.config.durability)" for example in examples)
    finished = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout == f"{tmp_path}/chats full\n/srv/chats normal\n"


WRITER = """
import asyncio, sys
from flatfile_chat_database import Message, StorageConfig, StorageManager

async def main():
    config = StorageConfig(storage_base_path=sys.argv[1], journal_max_bytes=20_000, lock_timeout_seconds=60)
    async with StorageManager(config) as storage:
        await storage.create_user("ada")
        sessions = [await storage.create_session("ada", session_id=f"s{n}") for n in range(3)]
        for session in sessions:  # so that copying takes a while
            await storage.save_document("ada", session, "large.txt", bytes(20_000_000))
        for number in range(100_000):
            batch = [Message("user", f"{number}") for _ in range(2)]
            await storage.add_messages("ada", sessions[number % 3], batch)
            await storage.save_document("ada", sessions[number % 3], "a.txt", b"x" * number)
            print(number, flush=True)

asyncio.run(main())
"""


@pytest.mark.slow
async def test_a_copy_of_a_store_at_work_is_whole(tmp_path: Path) -> None:
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    [pack] = re.findall(r"^    (flock .*)$", text, re.MULTILINE)
    [unpack] = re.findall(r"^    (tar .*)$", text, re.MULTILINE)
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, "chats"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        try:
            for number in range(3):
                acknowledged = [int(writer.stdout.readline()) for _ in range(40)][-1]
                packed = subprocess.run(shlex.split(pack), cwd=tmp_path, capture_output=True, text=True, check=False)
                for line in packed.stderr.splitlines():
                    assert re.search(r"(\.tmp|/documents): file changed|\.tmp: File removed|Exiting with", line), line
                assert packed.returncode in (0, 1)
                copy = tmp_path / f"copy{number}"
                copy.mkdir(mode=0o700)
                subprocess.run(shlex.split(unpack.replace("chats", copy.name)), cwd=tmp_path, check=True)
                await expect_whole(copy, acknowledged)
        finally:
            writer.kill()


async def expect_whole(copy: Path, acknowledged: int) -> None:
    """Fail unless a copy holds every batch up to one that is not older than the acknowledged one, and nothing else."""
    async with StorageManager(StorageConfig(storage_base_path=str(copy))) as storage:
        found = [message for n in range(3) for message in await storage.get_messages("ada", f"s{n}", 10**9)]
        numbers = sorted(int(message.content) for message in found)
        assert numbers == [n for n in range(numbers[-1] + 1) for _ in range(2)]
        assert numbers[-1] >= acknowledged
        for session in range(min(3, acknowledged)):
            assert await storage.get_document("ada", f"s{session}", "a.txt") is not None
        # What a document that was being saved leaves behind.
        assert {problem.kind for problem in await check(storage.backend)} <= {"temporary-file", "orphan-file"}


def test_every_command_that_the_readme_shows_is_one() -> None:
    lines = re.findall(r"^    chatdb (.*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        name, *arguments = shlex.split(line)
        command = cli.commands[name]
        # Parsing alone: a missing file is no concern of the README.
        arguments = [str(ROOT / "README.md") if argument.endswith(".jsonl.gz") else argument for argument in arguments]
        with command.make_context(name, arguments):
            pass


@pytest.mark.slow
def test_the_commands_of_the_page_on_moving_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those without a server; `mirror` as the page has it, with the URL of both stores in a variable."""
    monkeypatch.chdir(tmp_path)
    chats = '{"id": "first", "messages": [{"role": "user", "content": "Hello"}]}\n'
    (tmp_path / "chats.jsonl").write_text(chats, encoding="utf-8")

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(cli, arguments, prog_name="chatdb")
        assert result.exit_code == 0, (arguments, result.output)
        return result.stdout

    run("--store", "chats", "import", "chats.jsonl", "--format", "openai-jsonl", "--user", "ada")
    text = (ROOT / "docs/moving.md").read_text(encoding="utf-8")
    [mirror] = re.findall(r"^    MIRROR=(.*)$", text, re.MULTILINE)
    lines = [
        line.replace('"$MIRROR"', mirror)
        for line in re.findall(r"^    chatdb (.*)$", text, re.MULTILINE)
        if "postgresql:" not in line
    ]
    assert len(lines) == 15
    for line in lines:
        run(*shlex.split(line))
    for place in ("restored", "sqlite:restored.db", "ada/store", "sqlite:chats.db", "back", "sqlite:new.db"):
        assert run("--store", place, "ls", "ada") == run("--store", "chats", "ls", "ada"), place


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_target_that_the_documentation_names_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        for name in re.findall(r"`make ([a-z]+)", page.read_text(encoding="utf-8")):
            assert name in targets, f"{page.name} names make {name}"


def test_the_docstring_of_the_package_runs(tmp_path: Path) -> None:
    import flatfile_chat_database

    code = textwrap.dedent((flatfile_chat_database.__doc__ or "").partition("Inside a coroutine:")[2])
    subprocess.run([sys.executable, "-c", in_a_coroutine(code)], cwd=tmp_path, check=True, capture_output=True)
    assert list(tmp_path.glob("data/users/ada/*/messages.jsonl"))
