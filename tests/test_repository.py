"""A lock without addresses, no trace of a machine, a light import, a true `__all__`."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import flatfile_chat_database

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flatfile_chat_database"
TARGETS = {
    "help", "demo", "test", "check", "docs", "coverage", "servers", "bench", "soak", "lock", "format", "clean",
}  # fmt: skip


LOCKS = {"requirements.lock": "dev", "requirements-bench.lock": "bench"}
"""With the group of dependencies that is in each, beside those of the package."""


def locked_requirements(lock: str) -> dict[str, str]:
    """Return each requirement of a lock by its name, with its continuation lines."""
    requirements: dict[str, str] = {}
    name = ""
    for line in (ROOT / lock).read_text().splitlines():
        if start := re.match(r"([\w.-]+)==", line):
            name = start[1]
            requirements[name] = line
        elif line.strip() and not line.lstrip().startswith("#"):
            assert name and line.startswith(" "), f"not part of a requirement: {line}"
            requirements[name] += line
    return requirements


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_no_address(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert re.findall(r"\S+://\S*|--(?:extra-)?index-url.*|--find-links.*", text) == []


@pytest.mark.parametrize("lock", LOCKS)
def test_every_requirement_of_a_lock_has_hashes(lock: str) -> None:
    requirements = locked_requirements(lock)
    assert requirements
    assert [name for name, text in requirements.items() if "--hash=sha256:" not in text] == []


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_covers_every_declared_dependency(lock: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared: list[str] = [*project["project"]["dependencies"], *project["dependency-groups"][LOCKS[lock]]]
    if lock == "requirements.lock":
        for extra in project["project"]["optional-dependencies"].values():
            declared += extra
    names = {re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", text)[0]).lower() for text in declared}
    assert names - locked_requirements(lock).keys() == set()


def test_what_is_only_compared_with_is_not_in_the_lock_of_developers() -> None:
    assert {"openai-agents", "langchain-community", "agent-framework-core"}.isdisjoint(
        locked_requirements("requirements.lock")
    )


def repository_files() -> list[Path]:
    """Return what is committed or could be: tracked files, and new ones that are not ignored."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("NOT TESTED here: this is no checkout, so there is no list of its files")
    # In a container the checkout often belongs to somebody else, whom git would not trust.
    command = [
        "git",
        "-c",
        "safe.directory=*",
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = [ROOT / name for name in listing.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def test_no_file_holds_a_path_of_a_machine_or_the_name_of_a_registry() -> None:
    # In two pieces each, so that this file does not hold them.
    folders = ["/" + "root/", "/" + "work/", "/" + "opt/pypi", "../" + "shared", "." + "library/", f"{ROOT}/"]
    hosts = ["pypi" + ".org", "python" + "hosted.org", "registry" + ".npmjs", "deb" + ".debian.org"]
    hosts += ["static" + ".crates.io", "proxy" + ".golang.org"]
    # A folder counts only where it starts a path: one of ours may have a subfolder of the same name.
    needle = re.compile("|".join([rf"(?<![\w.-]){re.escape(f)}" for f in folders] + [re.escape(h) for h in hosts]))
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in repository_files()
        for number, line in enumerate(path.read_bytes().decode(errors="replace").split("\n"), 1)
        if (match := needle.search(line))
    ]
    assert found == []


def test_make_alone_lists_every_target() -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("NOT TESTED here: make is not installed")
    # A make above this one would otherwise hand down its flags and its job server.
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    run = subprocess.run([make], cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    listed = dict(line.split(maxsplit=1) for line in run.stdout.splitlines()[1:])
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert listed.keys() == TARGETS == set(phony[1].split())


def test_importing_the_package_loads_neither_a_database_nor_the_command_line() -> None:
    heavy = ["sqlite3", "_sqlite3", "click", "rich"]
    program = f"import sys; from flatfile_chat_database import *; print([m for m in {heavy} if m in sys.modules])"
    # Measuring coverage loads sqlite3 before the first line of the program.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    assert run.stdout.strip() == "[]"


def test_every_public_name_can_be_imported() -> None:
    names = flatfile_chat_database.__all__
    assert len(names) == len(set(names))
    for name in names:
        found = getattr(flatfile_chat_database, name)
        assert name.isupper() or found.__module__.startswith("flatfile_chat_database.")
    assert set(names) <= set(dir(flatfile_chat_database))
    with pytest.raises(AttributeError, match="no attribute 'Mesage'"):
        flatfile_chat_database.Mesage  # noqa: B018


def test_the_public_names_are_sorted() -> None:
    def constants_classes_functions(name: str) -> tuple[int, str]:
        return (0 if name.isupper() else 1 if name[0].isupper() else 2), name

    names = list(flatfile_chat_database.__all__)
    assert names == sorted(names, key=constants_classes_functions)


def test_what_has_no_underscore_and_is_no_module_is_a_public_name() -> None:
    present = {
        name
        for name, value in vars(flatfile_chat_database).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert present - set(flatfile_chat_database.__all__) == set()


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
