"""A chat in the terminal with a small assistant made of rules, to show what a chat application does with the store.

    python examples/chat_app.py --store ./chats --user ada

It goes on where it stopped, even after `kill -9`: what was said is on disk before the answer appears. It remembers your
name in the context of the conversation, searches what was said, and asks a panel of three personas for their opinion.
Type /help for its commands.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import random
import re
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from flatfile_chat_database import (
    ConfigurationError,
    Message,
    Session,
    SituationalContext,
    StorageConfig,
    StorageError,
    StorageManager,
)

COMMANDS = """/history [N]     the last N messages (20)
/search WORDS    find what was said, in all your chats
/panel QUESTION  ask an optimist, a sceptic and an engineer
/sessions        your chats, newest first
/new [TITLE]     begin another chat
/quit            leave; the chat goes on next time"""

PERSONAS: dict[str, dict[str, Any]] = {
    "optimist": {
        "name": "Olive",
        "description": "Sees what could go well.",
        "opinions": [
            "I like it. The best case for {topic} is better than people expect.",
            "Try {topic} in the smallest form this week; you will learn more than by thinking.",
            "Most doubts about {topic} are about the first month. It gets easier after that.",
        ],
    },
    "sceptic": {
        "name": "Sven",
        "description": "Asks what it costs.",
        "opinions": [
            "What do you give up for {topic}? Nobody has said it yet.",
            "And if {topic} goes wrong, who notices first, and how?",
            "I have seen {topic} promised before. What is different this time?",
        ],
    },
    "engineer": {
        "name": "Eva",
        "description": "Wants a number before an opinion.",
        "opinions": [
            "Pick one number that {topic} must improve, measure it now, and again in two weeks.",
            "{topic}: build the cheapest version that can fail, and see whether it does.",
            "Before {topic}, write down what result would make you stop.",
        ],
    },
}

# The first rule whose pattern is found answers. {0} is what the first group matched, turned round (my -> your).
RULES: list[tuple[re.Pattern[str], list[str]]] = [
    (re.compile(pattern, re.IGNORECASE), answers)
    for pattern, answers in [
        (r"\b(?:what(?:'s| is)|do you (?:know|remember)) my name\b", ["{who}"]),
        (r"\b(?:who are you|your name|are you (?:a )?(?:bot|robot|computer|human|real))\b",
         ["I am a page of rules with a good memory.", "Nobody famous: some forty rules and a text file."]),
        (r"\bhow are you\b", ["All my files are in order, thank you. And you?", "Durable. How are you?"]),
        (r"^\s*(?:hi|hello|hey|good (?:morning|evening|afternoon))\b",
         ["Hello{comma_name}! What is on your mind?", "Hi{comma_name}. What shall we talk about?"]),
        (r"你好|您好", ["你好！今天想聊什么？"]),
        (r"谢谢", ["不客气。"]),
        (r"再见", ["再见！聊天记录都还在。"]),
        (r"[\u4e00-\u9fff]", ["我的中文还不多，不过每个字都存好了。", "请继续说，我在听。"]),
        (r"\b(?:bye|goodbye|see you|good night)\b", ["Goodbye{comma_name}! Type /quit to leave; all this stays."]),
        (r"\b(?:thanks|thank you|thx)\b", ["You are welcome{comma_name}.", "Any time."]),
        (r"^\s*because (.+)", ["Is that the whole reason?", "If it were not because {0}, what then?"]),
        (r"\bsorry\b", ["No need to be sorry.", "It is all right."]),
        (r"\b(?:shut up|stupid|idiot|useless)\b", ["I do my best with few rules. What did you expect?"]),
        (r"\bjoke\b", ["A database walks into a bar and asks two tables: may I join you?",
                       "I know one about fsync, but I would have to be sure it arrived."]),
        (r"\b(?:where|how) (?:are|is|do you (?:keep|store)).*\b(?:messages?|chats?|history|this)\b",
         ["In a text file: every line of messages.jsonl is one message. Look with cat.",
          "On your disk, as plain JSON. Delete me and they are still there."]),
        (r"\bdo you remember (.+)", ["Try /search with a word of it: I forget nothing that was said here."]),
        (r"\b(?:what can you do|help)\b", ["I listen, I ask, and I remember. Type /help for the commands."]),
        (r"\b(?:what time|what day|what date|today's date)\b", ["Every message has its time; /history shows it."]),
        (r"\bweather\b", ["I have no window. What is it like where you are?"]),
        (r"\bi (?:feel|am feeling) (.+)", ["Why do you feel {0}?", "Since when do you feel {0}?"]),
        (r"\bi(?:'m| am) (sad|tired|angry|afraid|worried|bored|stressed|lonely)\b",
         ["I am sorry that you are {0}. What happened?", "What would help when you are {0}?"]),
        (r"\bi(?:'m| am) (happy|glad|excited|proud)\b", ["That is good to hear! What made you {0}?"]),
        (r"\bi(?:'m| am) (.+)", ["What is it like to be {0}?", "How long have you been {0}?"]),
        (r"\bi (?:want|need|would like) (.+)", ["What would change if you had {0}?", "Why {0}, of all things?"]),
        (r"\bi (?:love|like|enjoy) (.+)", ["What do you like most about {0}?", "How did you come to {0}?"]),
        (r"\bi (?:hate|dislike|don'?t like) (.+)", ["What is so bad about {0}?", "Was it always like that with {0}?"]),
        (r"\bi (?:can'?t|cannot) (.+)", ["What keeps you from it? Perhaps only part of it is in the way.",
                                        "Imagine you could {0}. What would be the first step?"]),
        (r"\bi (?:don'?t|do not) know\b", ["What would you guess, if you had to?", "Who might know?"]),
        (r"\bi (?:think|believe|guess) (?:that )?(.+)", ["What makes you think {0}?", "How sure are you that {0}?"]),
        (r"\bi remember (.+)", ["What comes to mind first when you think of {0}?"]),
        (r"\bi (?:have|'ve got) (?:a |an )?(?:problem|question)s?\b", ["Tell me about it. One piece at a time."]),
        (r"\b(?:dream|dreamt|dreamed)\b", ["What do you make of that dream?"]),
        (r"\b(mother|father|mum|mom|dad|sister|brother|family|wife|husband|son|daughter)\b",
         ["Tell me more about your {0}.", "What is your {0} like?"]),
        (r"\b(friends?|colleagues?|boss|teacher|neighbou?rs?)\b", ["What does your {0} say to that?"]),
        (r"\b(work|job|office|project|deadline|meeting)\b",
         ["What takes most of your time at the {0}?", "What would a good week look like, about the {0}?"]),
        (r"\b(python|code|programming|bug|software|database)\b",
         ["What did you expect the {0} to do, and what does it do?", "Show me the smallest case. What do you see?"]),
        (r"\b(music|song|film|movie|book|game)s?\b", ["Which {0} would you take to an island?", "What is it about?"]),
        (r"\b(food|eat|hungry|lunch|dinner|breakfast|cook)\w*\b", ["What is the best thing you ate this week?"]),
        (r"\b(sleep|tired|rest|holiday|vacation|travel|trip)\w*\b", ["Where would you go if you left tomorrow?"]),
        (r"\b(money|price|expensive|rent|buy)\b", ["Is it the sum, or what it stands for?"]),
        (r"^\s*why\b", ["Why do you ask?", "What answer would surprise you?"]),
        (r"^\s*(?:can|could|would|will) you\b", ["With a few dozen rules? I can at least write it down."]),
        (r"\b(?:always|never|everyone|nobody)\b", ["Can you think of one exception?"]),
        (r"\b(?:maybe|perhaps|probably)\b", ["What would make you certain?"]),
        (r"^\s*(?:yes|yeah|yep|sure|ok|okay|right)\b", ["Good. Go on.", "I see. And then?"]),
        (r"^\s*(?:no|nope|not really)\b", ["Why not?", "All right. What else?"]),
        (r"\?\s*$", ["What do you think yourself?", "Ask the panel: /panel and your question."]),
        (r"", ["Tell me more.", "Go on{comma_name}, I am listening.", "What does that mean to you?"]),
    ]
]  # fmt: skip

NAME = re.compile(r"\b(?:my name is|call me|i am called|i'm called)\s+([^\W\d_][\w'’-]*)|我叫(\w{1,4})", re.IGNORECASE)

TURNED = {
    "i": "you", "me": "you", "my": "your", "mine": "yours", "am": "are", "i'm": "you are", "myself": "yourself",
    "you": "I", "your": "my", "yours": "mine", "you're": "I am",
}  # fmt: skip


def turn_round(text: str) -> str:
    """Say what the user said from the other side: "my dog" becomes "your dog"."""
    words = text.strip(" .!?").split()
    return " ".join(TURNED.get(word.lower(), word) for word in words)


def reply(text: str, name: str, turn: int) -> str:
    """Return the assistant's answer; `turn` makes it vary without chance, so that it can be tested."""
    told = NAME.search(text)
    if told:
        return f"Nice to meet you, {told[1] or told[2]}. I will remember that."
    found, answers = next((found, answers) for pattern, answers in RULES if (found := pattern.search(text)))
    group = turn_round(found[1]) if found.groups() and found[1] else ""
    who = f"You are {name}." if name else "You have not told me yet."
    return answers[turn % len(answers)].format(group, comma_name=f", {name}" if name else "", who=who)


def printable(text: str) -> str:
    """Return `text` without anything that could steer the terminal: what was stored may be hostile."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in text)


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    print(printable(text), flush=True)


class Chat:
    """One user's conversation, kept in a store."""

    def __init__(self, storage: StorageManager, user: str) -> None:
        self.storage = storage
        self.user = user
        self.session = ""
        self.name = ""

    # --- the conversation ----------------------------------------------------------------------------

    async def resume(self) -> None:
        """Go on with the newest session, or begin the first one."""
        await self.storage.create_user(self.user)
        sessions = await self.storage.list_sessions(self.user, limit=1)
        if not sessions:
            await self.begin("")
            say("A new chat. Type /help for the commands.")
            return
        await self._continue(sessions[0])

    async def _continue(self, session: Session) -> None:
        self.session = session.id
        context = await self.storage.get_context(self.user, self.session)
        names = context.entities.get("name", []) if context else []
        self.name = names[0] if names else ""
        last = await self.storage.get_messages(self.user, self.session, limit=4, offset=-4)
        say(f"Back in {session.title or session.id!r}{f', {self.name}' if self.name else ''}.")
        for message in last:
            say(f"  {message.role}: {message.content}")
        if last and last[-1].role == "user":  # we were killed between hearing and answering
            await self._answer(last[-1])

    async def begin(self, title: str) -> None:
        """Begin a session; what is known of the user comes along."""
        self.session = await self.storage.create_session(self.user, title)
        if self.name:
            await self._remember("A new chat")

    async def hear(self, text: str) -> None:
        """Keep what the user says, then answer it."""
        message = Message("user", text)
        await self.storage.add_message(self.user, self.session, message)
        await self._answer(message)

    async def _answer(self, message: Message) -> None:
        told = NAME.search(message.content)
        if told:
            self.name = told[1] or told[2]
            await self._remember(f"{self.name} introduced themselves")
        turn = await self.storage.count_messages(self.user, self.session)
        session = await self.storage.get_session(self.user, self.session)
        if session is not None and not session.title:
            await self.storage.update_session(self.user, self.session, {"title": message.content[:60]})
        text = reply(message.content, self.name, turn // 2)
        await self.storage.add_message(self.user, self.session, Message("assistant", text, parent_id=message.id))
        say(f"assistant: {text}")

    async def _remember(self, summary: str) -> None:
        context = SituationalContext(summary, [f"The user is called {self.name}"], {"name": [self.name]})
        await self.storage.update_context(self.user, self.session, context)
        await self.storage.save_context_snapshot(self.user, self.session, context)

    # --- commands ------------------------------------------------------------------------------------

    async def history(self, argument: str) -> None:
        """Print the newest messages."""
        count = int(argument) if argument.isdecimal() else 20
        for message in await self.storage.get_messages(self.user, self.session, count, -count if count else 0):
            say(f"  {message.timestamp[:19].replace('T', ' ')}  {message.role}: {message.content}")

    async def search(self, argument: str) -> None:
        """Print where words were said."""
        hits = await self.storage.search(argument, user_id=self.user, kinds=["message"], limit=10)
        for hit in hits:
            say(f"  {hit.timestamp[:10]}  {hit.message.role if hit.message else hit.kind}: {hit.snippet}")
        say(f"{len(hits)} found.")

    async def sessions(self, argument: str) -> None:
        """Print the user's sessions."""
        for session in await self.storage.list_sessions(self.user):
            count = await self.storage.count_messages(self.user, session.id)
            mark = "*" if session.id == self.session else " "
            say(f"{mark} {session.id}  {count:>4} messages  {session.title}")

    async def new(self, argument: str) -> None:
        """Begin another session."""
        await self.begin(argument)
        say("A new chat.")

    async def panel(self, argument: str) -> None:
        """Ask the personas, and keep their answers and the insight."""
        if not argument:
            say("Ask something: /panel Should I learn to sail?")
            return
        for persona_id, persona in PERSONAS.items():
            if not await self.storage.persona_exists(persona_id):
                await self.storage.save_persona(persona_id, persona)
        panel = await self.storage.create_panel("advice", list(PERSONAS), {"session_id": self.session})
        question = Message("user", argument)
        await self.storage.add_panel_message(panel, question)
        topic = topic_of(argument)
        dice = random.Random(argument)  # the same question gets the same answers
        for persona in await self.storage.get_panel_personas(panel):
            opinion = dice.choice(persona["opinions"]).format(topic=topic)
            opinion = opinion[0].upper() + opinion[1:]
            await self.storage.add_panel_message(panel, Message(persona["id"], opinion, parent_id=question.id))
            say(f"  {persona['name']} ({persona['id']}): {opinion}")
        conclusion = f"Try {topic} small, name its price, and measure one number."
        await self.storage.save_panel_insight(panel, {"question": argument, "conclusion": conclusion})
        for insight in await self.storage.list_panel_insights(panel):
            say(f"  Insight: {insight['conclusion']}")

    async def help(self, argument: str) -> None:
        """Print the commands."""
        say(COMMANDS)

    def command(self, name: str) -> Callable[[str], Coroutine[Any, Any, None]] | None:
        """Return what a command does."""
        return {
            "/history": self.history,
            "/search": self.search,
            "/panel": self.panel,
            "/sessions": self.sessions,
            "/new": self.new,
            "/help": self.help,
        }.get(name)


def topic_of(question: str) -> str:
    """Return what a question is about, ready for the middle of a sentence."""
    lead = r"^(?:should|shall|can|could|would|will|do|does|is|are)\s+(?:i|we|you|they|it)\s+|[?!.\s]+$"
    words = re.sub(lead, "", question.strip(), flags=re.IGNORECASE)
    return f"“{words or question}”"


def read_line() -> str | None:
    """Return what the user types, or None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def main() -> None:
    """Chat until /quit, the end of input or Ctrl-C."""
    parser = argparse.ArgumentParser(description="Chat with a small rule-based assistant that remembers.")
    parser.add_argument("--store", default="./data", help="the folder of the chats (default: ./data)")
    parser.add_argument("--user", default="me", help="who you are (default: me)")
    options = parser.parse_args()
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its line editing
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # what is no UTF-8 is no reason to end a chat

    # `input` waits outside the event loop, on the main thread, where Ctrl-C reaches it; the runner keeps one loop.
    with asyncio.Runner() as runner:
        try:
            storage = StorageManager(StorageConfig(storage_base_path=options.store))
        except ConfigurationError as error:
            sys.exit(f"chat_app: {error}")
        chat = Chat(storage, options.user)
        try:
            runner.run(chat.resume())
            while (line := read_line()) is not None and line != "/quit":
                name, _, argument = line.partition(" ")
                action = chat.command(name)
                if action is not None:
                    runner.run(action(argument.strip()))
                elif name.startswith("/"):
                    say(f"There is no {name}. Type /help.")
                elif line:
                    runner.run(chat.hear(line))
        except KeyboardInterrupt:
            say("")
        except StorageError as error:
            sys.exit(f"chat_app: {options.store}: {error}")
        finally:
            runner.run(storage.close())
    say("Your chat is kept.")


if __name__ == "__main__":
    main()
