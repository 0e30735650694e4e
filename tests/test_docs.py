"""The documentation tells the truth: its code runs, its links lead somewhere, its generated pages are fresh."""

import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from flatfile_chat_database.cli import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_generated_pages_are_fresh() -> None:
    finished = subprocess.run(
        [sys.executable, str(ROOT / "tools/docs.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


def test_the_program_in_the_readme_runs_and_writes_what_the_readme_shows(tmp_path: Path) -> None:
    [program] = blocks(ROOT / "README.md", "python")
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "user: How do I read a file in Python?\nassistant: Use open(), best in a with block.\n"
    [log] = tmp_path.glob("data/users/ada/*/messages.jsonl")
    [shown] = blocks(ROOT / "README.md", "console")

    def without_what_differs(text: str) -> str:
        return re.sub(r'"(id|timestamp)":"[^"]*"', r'"\1":""', text)

    assert without_what_differs(shown).endswith(without_what_differs(log.read_text(encoding="utf-8")))


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
    program = f"import asyncio\nasync def main():\n{textwrap.indent(code, '    ')}\nasyncio.run(main())"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)
    assert list(tmp_path.glob("data/users/ada/*/messages.jsonl"))
