"""The examples run as they are, and the chat survives a kill."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: str, cwd: Path, typed: str = "") -> str:
    """Run an example to its end and return what it printed."""
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=cwd,
        input=typed,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_the_quickstart_runs_twice_and_keeps_both_chats(tmp_path: Path) -> None:
    assert run("quickstart.py", cwd=tmp_path).splitlines()[:2] == [
        "user: How do I read a file in Python?",
        "assistant: Use open(), best in a with block.",
    ]
    assert "2 chats so far" in run("quickstart.py", cwd=tmp_path)
    assert len(list((tmp_path / "data").rglob("messages.jsonl"))) == 2


def test_the_quickstart_is_ten_lines() -> None:
    text = (EXAMPLES / "quickstart.py").read_text()
    body = text.partition("async with")[0].count("\n"), len(text.splitlines())
    assert body[1] - body[0] <= 11


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"quickstart.py", "chat_app.py"}


# --- the chat ------------------------------------------------------------------------------------------


def chat(tmp_path: Path, *lines: str) -> str:
    """Type lines into the chat, to the end of input."""
    return run("chat_app.py", "--store", str(tmp_path / "chats"), cwd=tmp_path, typed="\n".join(lines) + "\n")


def test_the_assistant_remembers_a_name_also_next_time_and_in_a_new_chat(tmp_path: Path) -> None:
    said = chat(tmp_path, "Hello", "My name is Grace", "what is my name?")
    assert "Nice to meet you, Grace." in said
    assert "You are Grace." in said
    said = chat(tmp_path, "do you remember my name?", "/new Second", "What's my name?", "/quit", "never read")
    assert "Back in 'Hello', Grace." in said
    assert said.count("You are Grace.") == 3  # once from the history
    assert said.endswith("Your chat is kept.\n")
    contexts = [json.loads(path.read_bytes()) for path in tmp_path.rglob("situational_context.json")]
    assert [context["entities"] for context in contexts] == [{"name": ["Grace"]}] * 2


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("I am tired", "I am sorry that you are tired. What happened?"),
        ("I want my own boat", "What would change if you had your own boat?"),
        ("Because I like you", "Is that the whole reason?"),
        ("你好", "你好！今天想聊什么？"),
        ("My name is Zoë!", "Nice to meet you, Zoë. I will remember that."),
        ("{0} {name} %s", "Tell me more."),
    ],
)
def test_the_assistant_answers_by_its_rules(tmp_path: Path, said: str, answer: str) -> None:
    assert f"assistant: {answer}" in chat(tmp_path, said)


def test_the_commands_of_the_chat(tmp_path: Path) -> None:
    said = chat(
        tmp_path,
        "I have a boat",
        "/search boat",
        "/search zebra",
        "/history 1",
        "/sessions",
        "/help",
        "/wrong",
        "",
        "/panel",
    )
    assert "user: I have a «boat»" in said
    assert "0 found." in said
    assert "* chat_session_" in said and "I have a boat" in said
    assert "/panel QUESTION" in said
    assert "There is no /wrong." in said
    assert "Ask something:" in said
    assert len(list(tmp_path.rglob("messages.jsonl"))) == 1


def test_a_panel_of_three_answers_and_its_insight_is_kept(tmp_path: Path) -> None:
    said = chat(tmp_path, "/panel Should I learn to sail?", "/panel Should I learn to sail?")
    for name in ("Olive (optimist): ", "Sven (sceptic): ", "Eva (engineer): "):
        assert said.count(name) == 2
    assert said.count("Insight: Try “learn to sail” small") == 2
    panels = sorted((tmp_path / "chats" / "panel_sessions").iterdir())
    assert len(panels) == 2
    for panel in panels:
        assert len((panel / "messages.jsonl").read_text().splitlines()) == 4
        (insight,) = (panel / "insights").iterdir()
        assert json.loads(insight.read_bytes())["question"] == "Should I learn to sail?"


def test_what_was_typed_cannot_steer_the_terminal(tmp_path: Path) -> None:
    said = chat(tmp_path, "I like \x1b[31mred\u202e", "/history", "/search red*") + chat(tmp_path, "")
    assert "\x1b" not in said and "\u202e" not in said
    assert "\\u001b[31mred\\u202e" in said


class Talking:
    """A chat that is running."""

    def __init__(self, tmp_path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / "chat_app.py"), "--store", str(tmp_path / "chats")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        # A chat that says nothing must not hang the test.
        self._watchdog = threading.Timer(60, self.process.kill)
        self._watchdog.start()

    def type(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def kill(self) -> None:
        self._watchdog.cancel()
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def talk(tmp_path: Path) -> Iterator[list[Talking]]:
    running: list[Talking] = []
    yield running
    for talking in running:
        talking.kill()


def test_a_chat_that_is_killed_goes_on_where_it_stopped(tmp_path: Path, talk: list[Talking]) -> None:
    first = Talking(tmp_path)
    talk.append(first)
    assert first.read() == "A new chat. Type /help for the commands."
    first.type("My name is Grace")
    assert first.read() == "assistant: Nice to meet you, Grace. I will remember that."
    first.type("I feel fine")
    answer = first.read()
    first.kill()  # kill -9

    second = Talking(tmp_path)
    talk.append(second)
    assert [second.read() for _ in range(5)] == [
        "Back in 'My name is Grace', Grace.",
        "  user: My name is Grace",
        "  assistant: Nice to meet you, Grace. I will remember that.",
        "  user: I feel fine",
        f"  {answer}",
    ]
    second.type("What is my name?")
    assert second.read() == "assistant: You are Grace."


def test_a_question_that_was_stored_but_not_answered_is_answered_on_return(tmp_path: Path) -> None:
    chat(tmp_path, "Hello")
    (log,) = tmp_path.rglob("messages.jsonl")
    lines = log.read_text().splitlines(keepends=True)
    log.write_text(lines[0])  # as after a kill between hearing and answering
    said = chat(tmp_path, "/quit")
    assert said.splitlines() == [
        "Back in 'Hello'.",
        "  user: Hello",
        "assistant: Hello! What is on your mind?",
        "Your chat is kept.",
    ]
