"""The derived index against the scan: the same answers on random histories in six scripts, whatever happens between."""

import contextlib
import logging
import random
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flatfile_chat_database.backends.base import StorageBackend
from flatfile_chat_database.backends.flatfile import FlatfileBackend
from flatfile_chat_database.backends.sqlite import SqliteBackend
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.errors import IntegrityError
from flatfile_chat_database.models import Message, SearchHit, SituationalContext
from flatfile_chat_database.records import finding, listing
from flatfile_chat_database.search import rows
from flatfile_chat_database.search.intake import _AT_ONCE
from flatfile_chat_database.storage import StorageManager

from .recording import KEYS, RecordingBackend

EXAMPLES = 2000
"""Queries that are compared, at least."""
EPISODES = 25

WORDS = (
    *("the", "a", "of", "python", "Café", "naïve", "Straße", "ångström", "Ørsted", "x1", "it", "over", "overture"),
    *("привет", "мир", "ёлка", "Київ", "программа", "в", "и"),
    *("مرحبا", "العالم", "كِتَاب", "שלום", "עוֹלָם", "في"),
    *("電影", "手机", "中文", "我", "喜欢", "看電影"),
    *("カタカナ", "ひらがな", "が", "か", "ｶﾞ", "コンピュータ"),
    *("한국어", "안녕하세요", "말", "국어"),
    *("😀", "👨‍👩‍👧", "❤️", "👍🏽", "iPhone手机", "ﬁne", "Ａ", "foo_bar", "e\u0301te", "don't", "a.b", "C++"),
)
SPACES = (" ", " ", " ", ", ", "\n", "-", "", "! ", "。", "\u200b", "\u200f", '"', "*")
GARBAGE = ('"', "*", "AND", "NEAR(", "()", "\0", "\ud800", "", " ", "OR 1=1", "col:x", "^", "“„", "a*b", "ab*c")


class Episode:
    """One store, and what happens to it."""

    def __init__(self, root: Path, seed: int, kind: str) -> None:
        self.random = random.Random(seed)
        self.root = root
        self.config = StorageConfig(storage_base_path=str(root), search_include_metadata=seed % 3 == 0)
        self.backend = self._open(kind)
        self.index = Path(self.backend.index_folder() or "")
        self.storage = StorageManager(self.config, backend=self.backend)
        self.other = StorageManager(self.config, backend=self.backend)
        self.scanning = StorageManager(self.config, backend=self.backend)
        self.sessions: list[str] = []
        self.number = 0

    def _open(self, kind: str) -> StorageBackend:
        if kind == "sqlite":
            return SqliteBackend(self.config, str(self.root / "chats.sqlite3"))
        return (RecordingBackend if kind == "telling" else FlatfileBackend)(self.config, self.root)

    async def close(self) -> None:
        for storage in (self.storage, self.other, self.scanning):
            await storage.close()
        await self.backend.close()
        KEYS.pop(str(self.root), None)

    def text(self, most: int = 12) -> str:
        pick = self.random
        return "".join(pick.choice(WORDS) + pick.choice(SPACES) for _ in range(pick.randint(0, most)))

    def time(self) -> str:
        pick = self.random
        if pick.random() < 0.5:
            return f"2026-01-01T{pick.randint(0, 23):02}:00:00+0{pick.randint(0, 3)}:00"
        self.number += 1
        return f"2026-01-02T00:{self.number // 60 % 60:02}:{self.number % 60:02}Z"

    def message(self) -> Message:
        metadata = {"note": self.text(3), "deep": [{"x": self.text(2)}, 7]} if self.random.random() < 0.3 else {}
        role = self.random.choice(("user", "assistant", "critic"))
        return Message(role, self.text(), timestamp=self.time(), metadata=metadata)

    async def session(self) -> str:
        self.number += 1
        name = f"s{self.random.randint(0, 9)}{self.number}"
        await self.storage.create_session("ada", session_id=name)
        self.sessions.append(name)
        return name

    # --- what happens --------------------------------------------------------------------------------

    async def change(self) -> None:
        """Do one thing through the library."""
        name = self.random.choice(self.sessions) if self.sessions else await self.session()
        storage = self.random.choice((self.storage, self.other, self.scanning))
        messages = await storage.get_messages("ada", name, 1000)
        kind = self.random.choice(
            [
                "append",
                "append",
                "append",
                "many",
                "many",
                "new",
                "update",
                "delete",
                "pop",
                "clear",
                "context",
                "analysis",
                "remove",
                "undelete",
            ]
        )
        if kind == "append":
            await storage.add_message("ada", name, self.message())
        elif kind == "many":
            await storage.add_messages("ada", name, [self.message() for _ in range(self.random.randint(1, 8))])
        elif kind == "new":
            await storage.add_messages("ada", await self.session(), [self.message() for _ in range(3)])
        elif kind == "update" and messages:
            # Twice, and of one length, so that the file system may give the same numbers out again.
            message = self.random.choice(messages)
            for _ in range(2):
                content = "".join(self.random.sample(message.content, len(message.content)))
                await storage.update_message("ada", name, message.id, {"content": content})
        elif kind == "delete" and messages:
            await storage.delete_message("ada", name, self.random.choice(messages).id)
        elif kind == "pop":
            await storage.pop_message("ada", name)
            if self.random.random() < 0.5:
                await storage.add_messages("ada", name, [self.message(), self.message()])
        elif kind == "clear" and self.random.random() < 0.3:
            await storage.clear_messages("ada", name)
        elif kind == "context":
            context = SituationalContext(self.text(), [self.text(3)], {"people": [self.text(2)]}, timestamp=self.time())
            await storage.update_context("ada", name, context)
        elif kind == "analysis":
            filename = self.random.choice(("a.txt", "b.txt"))
            await storage.save_document("ada", name, filename, b"x" * self.random.randint(1, 9))
            if self.random.random() < 0.8:
                await storage.update_document_analysis("ada", name, filename, {"summary": self.text()})
            if self.random.random() < 0.2:
                await storage.delete_document("ada", name, filename)
        elif kind == "remove":
            await storage.delete_session("ada", name)
            self.sessions.remove(name)
        elif kind == "undelete":
            for entry in await storage.list_trash():
                if entry.kind == "session" and entry.names["session_id"] not in self.sessions:
                    await storage.undelete(entry.id)
                    self.sessions.append(entry.names["session_id"])
                    break

    def edit_by_hand(self) -> bool:
        """Change a log as a person with an editor would; return whether there was one."""
        logs = [path for path in self.root.glob("users/ada/*/messages.jsonl") if path.stat().st_size]
        if not logs:
            return False
        path = self.random.choice(logs)
        lines = path.read_text().splitlines(keepends=True)
        place = self.random.randrange(len(lines))
        kind = self.random.choice(("swap", "drop", "word", "bad"))
        if kind == "drop":
            del lines[place]
        elif kind == "swap":
            self.random.shuffle(lines)
        elif kind == "bad":
            lines.insert(place, "no message\n")
        else:
            old, new = self.random.sample(WORDS, 2)
            lines[place] = lines[place].replace(old, new.replace('"', ""))
        if self.random.random() < 0.5:
            path.write_text("".join(lines))
        else:
            beside = path.with_suffix(".new")
            beside.write_text("".join(lines))
            beside.rename(path)
        return True

    def harm(self) -> None:
        """Do something to the index that anybody may do."""
        files = list(self.index.glob("*"))
        kind = self.random.choice(("delete", "delete all", "garbage", "cut"))
        for path in files:
            if kind == "delete all" or (kind == "delete" and path.suffix == ".sqlite3"):
                path.unlink()
            elif kind == "garbage" and path.suffix == ".sqlite3":
                path.unlink()
                path.write_bytes(self.random.randbytes(5000))
            elif kind == "cut" and path.suffix == ".sqlite3":
                data = path.read_bytes()
                path.unlink()
                path.write_bytes(data[: len(data) // 2])

    # --- what is compared ----------------------------------------------------------------------------

    def query(self) -> tuple[str, dict[str, Any]]:
        pick = self.random
        kind = pick.choice(["word", "word", "words", "words", "phrase", "prefix", "run", "mixed", "garbage"])
        word = pick.choice(WORDS)
        query = {
            "word": word,
            "words": f"{word} {pick.choice(WORDS)}",
            "phrase": f'"{word}{pick.choice(SPACES[:6])}{pick.choice(WORDS)}"',
            "prefix": f"{word[: pick.randint(1, 4)]}*",
            "run": "".join(pick.choice(("電", "影", "看", "カ", "ナ", "국", "어")) for _ in range(pick.randint(1, 3))),
            "mixed": self.text(3) + pick.choice(("", "*", '"')),
            "garbage": pick.choice(GARBAGE) + pick.choice(("", word)),
        }[kind]
        arguments: dict[str, Any] = {"user_id": "ada", "order": pick.choice(("time", "relevance"))}
        arguments["limit"] = pick.choice((3, 20, 1000))
        if pick.random() < 0.2:
            arguments["offset"] = pick.randint(0, 5)
        if pick.random() < 0.2 and self.sessions:
            arguments["session_id"] = pick.choice(self.sessions)
        if pick.random() < 0.2:
            arguments["roles"] = pick.sample(("user", "assistant", "critic"), pick.randint(1, 2))
        if pick.random() < 0.2:
            arguments["kinds"] = pick.sample(("message", "context", "analysis"), pick.randint(1, 2))
        for name in ("since", "until"):
            if pick.random() < 0.2:
                arguments[name] = self.time()
        return query, arguments


@contextlib.contextmanager
def sizes(texts: int, sessions: int) -> Iterator[None]:
    """Have the index used from other sizes on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finding, "SMALL_TEXTS", texts)
        patch.setattr(listing, "SMALL_SESSIONS", sessions)
        yield


def shown(hits: list[SearchHit]) -> list[tuple[Any, ...]]:
    return [
        (hit.kind, hit.session_id, hit.timestamp, hit.message.id if hit.message else hit.filename, hit.snippet,
         round(hit.score, 9))
        for hit in hits
    ]  # fmt: skip


async def compare(episode: Episode) -> None:
    """Ask the index and the scan one question, and fail unless they agree."""
    query, arguments = episode.query()
    storage = episode.random.choice((episode.storage, episode.other))
    with sizes(-1, 0):
        found = shown(await storage.search(query, **arguments))
    wanted = await scan(episode.scanning, query, arguments)
    assert found == shown(wanted), (query, arguments)


async def scan(storage: StorageManager, query: str, arguments: dict[str, Any]) -> list[SearchHit]:
    """Search by reading, whether or not there is an index."""
    with pytest.MonkeyPatch.context() as patch, sizes(10**9, 10**9):
        patch.setattr(storage._indexing, "exists", _nothing)
        return await storage.search(query, **arguments)


async def _nothing(user_id: str) -> bool:
    return False


async def episode(root: Path, seed: int, kind: str, examples: int) -> dict[str, int]:
    """Let things happen to a store, and compare after each; return counters."""
    run = Episode(root, seed, kind)
    try:
        await run.storage.create_user("ada")
        for _ in range(4):
            await run.storage.add_messages("ada", await run.session(), [run.message() for _ in range(6)])
        for _ in range(examples // 4):
            for _ in range(run.random.randint(0, 2)):
                with contextlib.suppress(IntegrityError):  # of a log with a bad line, which no edit touches
                    await run.change()
            if run.random.random() < 0.05:
                run.harm()
            if run.random.random() < 0.05 and run.edit_by_hand():
                await edited(run)
            for _ in range(4):
                await compare(run)
            if run.random.random() < 0.2:
                await compare_lists(run)
        return run.storage.statistics()
    finally:
        await run.close()


async def edited(run: Episode) -> None:
    """After an edit by hand the index returns nothing that is not in the files; after `reindex` it finds everything."""
    for _ in range(3):
        query, arguments = run.query()
        arguments |= {"order": "time", "limit": 1000, "offset": 0}
        with sizes(-1, 0):
            found = shown(await run.storage.search(query, **arguments))
        wanted = shown(await scan(run.scanning, query, arguments))
        assert set(found) <= set(wanted), (query, arguments)
    await run.storage.reindex("ada")


async def compare_lists(run: Episode) -> None:
    """The catalogue lists what the files hold."""
    with sizes(-1, 0):
        listed = await run.storage.list_sessions("ada", 3, run.random.randint(0, 2) * 0)
        count = await run.storage.count_sessions("ada")
    everything = await run.scanning.list_sessions("ada", 1000, strict=True)
    assert [(each.id, each.updated_at) for each in listed] == [(each.id, each.updated_at) for each in everything[:3]]
    assert count == len(everything)


@pytest.mark.slow
async def test_texts_of_every_length_rank_as_reading_everything_ranks_them(tmp_path: Path) -> None:
    pick = random.Random(7)
    storage = StorageManager(StorageConfig(storage_base_path=str(tmp_path)))

    def message(day: int) -> Message:
        length = round(1500 ** pick.random()) if pick.random() < 0.7 else pick.randint(1, 20)
        text = " ".join(pick.choices(("often", "seldom", "other"), (30, 1 if length > 9 else 0.1, 900), k=length))
        return Message(
            "user", text, timestamp=f"2026-01-{day:02}T{pick.randint(0, 23):02}:{pick.randint(0, 59):02}:00Z"
        )

    async def add(session: str, day: int) -> None:
        messages = sorted((message(day) for _ in range(150)), key=lambda each: each.timestamp)
        await storage.add_messages("ada", session, messages)

    async def compare_some() -> None:
        for query in ("often", "seldom", "sel*", '"often often"', "often seldom", "other"):
            for limit, offset in ((1, 0), (7, 0), (20, 5), (1000, 0)):
                arguments: dict[str, Any] = {"user_id": "ada", "order": "relevance", "limit": limit, "offset": offset}
                with sizes(-1, 0):
                    found = shown(await storage.search(query, **arguments))
                assert found == shown(await scan(storage, query, arguments)), (query, arguments)

    await storage.create_user("ada")
    for session in ("one", "two", "three"):
        await storage.create_session("ada", session_id=session)
        await add(session, 10)
    await compare_some()
    await add("two", 11)  # newer than all
    await compare_some()
    await add("three", 9)  # late
    await compare_some()
    await storage.delete_session("ada", "three")
    await compare_some()
    assert storage.statistics()["index_builds"] == 1
    await storage.close()


async def test_sessions_of_any_number_of_messages_are_built_whole(tmp_path: Path) -> None:
    """A build puts rows aside many at a time, and what is left over one by one."""
    counts = [0, 1, _AT_ONCE - 1, _AT_ONCE, _AT_ONCE + 1, 2 * _AT_ONCE, 2 * _AT_ONCE + 7]
    async with StorageManager(StorageConfig(storage_base_path=str(tmp_path))) as storage:
        await storage.create_user("ada")
        for number, count in enumerate(counts):
            await storage.create_session("ada", session_id=f"s{number}")
            messages = [Message("user", f"apple w{place}") for place in range(count)]
            if messages:
                await storage.add_messages("ada", f"s{number}", messages)
        for order in ("time", "relevance"):
            arguments: dict[str, Any] = {"user_id": "ada", "order": order, "limit": 1000, "offset": 0}
            for query, expected in (("apple", sum(counts)), ("w0", 6), (f"w{_AT_ONCE}", 3)):
                with sizes(-1, 0):
                    found = shown(await storage.search(query, **arguments))
                assert len(found) == expected
                assert found == shown(await scan(storage, query, arguments))
        assert storage.statistics()["index_builds"] == 1


async def test_the_best_is_found_also_where_texts_of_any_frequency_have_one_rank(tmp_path: Path) -> None:
    """Three words on average: `bm25` of an FTS5 that knows no lengths says nothing then."""
    async with StorageManager(StorageConfig(storage_base_path=str(tmp_path))) as storage:
        await storage.create_user("ada")
        await storage.create_session("ada", session_id="s")
        texts = ["apple apple apple", "apple pie now", *["one two three"] * 8]
        await storage.add_messages("ada", "s", [Message("user", text) for text in texts])
        arguments: dict[str, Any] = {"user_id": "ada", "order": "relevance", "limit": 1, "offset": 0}
        with sizes(-1, 0):
            found = shown(await storage.search("apple", **arguments))
        assert found == shown(await scan(storage, "apple", arguments))


def test_a_grade_holds_the_lengths_from_its_least_to_that_of_the_next() -> None:
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE messages (id, tokens)")
    lengths = [*range(2000), 10**6, 2**60]
    connection.executemany("INSERT INTO messages VALUES (5, ?)", ((length,) for length in lengths))
    shortest = rows.SHORTEST
    for length, (row,) in zip(lengths, connection.execute(f"SELECT {rows.ROW} FROM messages"), strict=True):
        assert row >> 7 == 5
        grade = row & 127
        assert shortest[grade] <= length
        assert grade == 127 or length < shortest[grade + 1]
        assert length >= 64 or shortest[grade] == length
    connection.close()


@pytest.mark.slow
@pytest.mark.parametrize("part", [*range(5), "sqlite"])
async def test_the_index_answers_as_reading_everything_does(
    part: int | str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "flatfile_chat_database")
    began = time.monotonic()
    totals: dict[str, int] = {}
    episodes = EPISODES // 5
    for number in range(episodes):
        seed = (part if isinstance(part, int) else 5) * episodes + number
        kind = part if isinstance(part, str) else ("telling", "silent")[seed % 2]
        for name, count in (await episode(tmp_path / str(seed), seed, kind, EXAMPLES // EPISODES)).items():
            totals[name] = totals.get(name, 0) + count
    print(f"{EXAMPLES // 5} queries compared in {time.monotonic() - began:.1f} s, {totals['index_builds']} builds")
    assert totals["index_builds"] > 0
