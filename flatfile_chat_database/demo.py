"""`chatdb demo`: the main things the library does, one after the other, in a store that stays to be looked at."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from typing import Any

from .layout import Layout
from .models import Message, SituationalContext
from .storage import StorageManager
from .terminal import block, cut, one_line, visible

Say = Callable[[str], None]

_ENGLISH = (
    ("user", "Hi! I have a CSV file of 2 GB with sales. How do I add up one column in Python?"),
    ("assistant", "Read it line by line, so that it never sits in memory: the csv module gives you one row at a time."),
    ("user", "Do I need pandas for that?"),
    ("assistant", "Not for a sum. csv.DictReader and a running total are enough, and start in milliseconds."),
    ("user", "Some amounts have a comma in them, like \"1,299.00\"."),
    ("assistant", "Then csv reads them right because of the quotes; remove the comma before you call Decimal(amount)."),
    ("user", "Why Decimal and not float?"),
    ("assistant", "Money: 0.1 + 0.2 is 0.30000000000000004 as floats, and exactly 0.3 as Decimals."),
    ("user", "It works, 41 seconds. Can I make it faster?"),
    ("assistant", "Look up the column's index once and use csv.reader; building a dict for each row is what costs."),
    ("user", "14 seconds. Thank you!"),
    ("assistant", "You are welcome. Shall I write down what we found in your notes?"),
)  # fmt: skip

_CHINESE = (
    ("user", "周末想去苏州玩两天，有什么推荐？"),
    ("assistant", "第一天可以看园林：拙政园和留园，早上八点以前到，人最少。"),
    ("user", "晚上住在哪里比较方便？"),
    ("assistant", "平江路附近，沿着河走十分钟就是博物馆，晚上还能听评弹。"),
    ("user", "有什么好吃的？"),
    ("assistant", "早饭吃一碗面，秋天别忘了大闸蟹。"),
)

_NOTES = """# Adding up a large CSV file

- read it line by line with `csv.reader`, never whole
- look up the column's index once
- amounts are money: `Decimal`, after removing the commas
- 41 s became 14 s
"""

_PERSONAS: dict[str, dict[str, Any]] = {
    "optimist": {"name": "Olive", "description": "Sees what could go well, and says what to try first."},
    "sceptic": {"name": "Sven", "description": "Asks what it costs and what happens when it breaks."},
    "engineer": {"name": "Eva", "description": "Wants a number before an opinion."},
}

_PANEL = (
    ("optimist", "Yes: people can open their own history in an editor, and that builds trust."),
    ("sceptic", "And when two programs write at the same time, or the power fails in the middle of a line?"),
    ("engineer", "Then we need one writer at a time and a flush before we say done. I would measure both first."),
)


async def run_demo(storage: StorageManager, place: str, program: str, say: Say) -> dict[str, Any]:
    """Fill an empty store, saying each step, and return what was made.

    Args:
        storage: An empty store.
        place: What to call it: the folder or URL.
        program: How the user calls `chatdb`.
        say: Prints a line.
    """
    say(f"A new chat store at {visible(place)}")

    _step(say, "Two users, a chat in English and one in Chinese")
    await storage.create_user("ada", {"name": "Ada", "language": "en"})
    await storage.create_user("小林", {"name": "小林", "language": "zh"})
    english = await storage.create_session("ada", "A large CSV file")
    chinese = await storage.create_session("小林", "去苏州玩")
    for role, content in _ENGLISH:  # as a chat application does it: one by one, each durable when it returns
        await storage.add_message("ada", english, Message(role, content))
    await storage.add_messages("小林", chinese, [Message(role, content) for role, content in _CHINESE])
    _messages(say, await storage.get_messages("ada", english, limit=2))
    _messages(say, await storage.get_messages("小林", chinese, limit=2))

    _step(say, "A document with its analysis")
    path = await storage.save_document("ada", english, "notes.md", _NOTES.encode(), {"source": "demo"})
    await storage.update_document_analysis("ada", english, "notes.md", {"topics": ["csv", "Decimal"], "bullets": 4})
    document = await storage.get_document_info("ada", english, "notes.md")
    if document is not None:
        say(f"  {visible(document.filename)}, {document.size} bytes, analysis {document.analysis}")

    _step(say, "What the conversation is about: the current context, and its history")
    early = SituationalContext("Ada adds up a CSV file", ["2 GB, one column"], {"language": ["Python"]})
    late = SituationalContext(
        "Ada's CSV sum went from 41 to 14 seconds",
        ["csv.reader instead of DictReader", "Decimal for money"],
        {"language": ["Python"], "modules": ["csv", "decimal"]},
        confidence=0.9,
    )
    for context in (early, late):
        await storage.update_context("ada", english, context)
        await storage.save_context_snapshot("ada", english, context)
    for context in await storage.get_context_history("ada", english):
        say(f"  {visible(context.summary)}")

    _step(say, "A panel of three personas, and the insight it came to")
    for persona_id, persona in _PERSONAS.items():
        await storage.save_persona(persona_id, persona)
    panel = await storage.create_panel("focus_group", list(_PERSONAS), {"topic": "chat history in plain files"})
    question = Message("user", "Should a chat application keep its history in plain text files?")
    answers = [Message(role, content, parent_id=question.id) for role, content in _PANEL]
    await storage.add_panel_messages(panel, [question, *answers])
    await storage.save_panel_insight(
        panel, {"conclusion": "Plain files, if every write is flushed and measured", "agree": list(_PERSONAS)}
    )
    _messages(say, await storage.get_panel_messages(panel))
    for insight in await storage.list_panel_insights(panel):
        say(f"  insight: {visible(insight['conclusion'])}")

    _step(say, "Back through Ada's chat, five messages a page, newest page first")
    page = await storage.page_messages("ada", english, limit=5)
    number = 1
    while True:
        first, last = page.messages[0], page.messages[-1]
        say(f"  page {number}: {_excerpt(first)}")
        say(f"      … to {_excerpt(last)}")
        if not page.has_more:
            break
        page = await storage.page_messages("ada", english, limit=5, before=first.id)
        number += 1

    found = {}
    for user_id, query in (("ada", "csv decimal"), ("小林", "园林")):
        _step(say, f"Search {visible(user_id)}'s chats for {query}")
        hits = await storage.search(query, user_id=user_id)
        found[query] = len(hits)
        for hit in hits:
            say(f"  {hit.kind}: {one_line(hit.snippet)}")

    _step(say, "The files")
    _tree(say, await storage.backend.list_keys(""))
    log = Layout(storage.config).key("messages", user_id="ada", session_id=english)
    _step(say, f"The first lines of {visible(log)}")
    for line in await storage.backend.read_log(log, 0, 3):
        say(f"  {visible(line.decode())}")

    chatdb = f"{program} --store {shlex.quote(visible(place))}"
    _step(say, "Everything is still there. Try")
    for command in (
        "ls",
        "ls ada",
        f"show ada {english}",
        f"tail -f ada {english}",
        "search 园林 --user 小林",
        "check",
    ):
        say(f"  {chatdb} {command}")
    return {"store": place, "sessions": {"ada": english, "小林": chinese}, "document": path, "panel": panel} | {
        "found": found
    }


def _step(say: Say, title: str) -> None:
    say("")
    say(title)


def _messages(say: Say, messages: Iterable[Message]) -> None:
    for message in messages:
        say(f"  {visible(message.role)}:")
        say(block(block(message.content)))


def _excerpt(message: Message) -> str:
    return cut(f"{visible(message.role)}: {one_line(message.content)}", 70)


def _tree(say: Say, keys: list[str]) -> None:
    """Print keys as a tree of folders and files."""
    shown: list[str] = []
    for key in keys:
        parts = key.split("/")
        common = 0
        while common < min(len(shown), len(parts) - 1) and shown[common] == parts[common]:
            common += 1
        for depth in range(common, len(parts)):
            slash = "/" if depth < len(parts) - 1 else ""
            say(f"  {'  ' * depth}{visible(parts[depth])}{slash}")
        shown = parts[:-1]
