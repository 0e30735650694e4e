"""PostgreSQL's own text search: what is kept, when it is lost, and that nobody finds less by it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from flatfile_chat_database import Message, StorageConfig, StorageManager
from flatfile_chat_database.backends.postgres import PostgresBackend
from flatfile_chat_database.backends.postgres.target import _LOCK
from flatfile_chat_database.backends.wording import LogWords, RecordWords, Wanted
from flatfile_chat_database.records.wording import Wording

from . import postgres

pytestmark = pytest.mark.slow

FOLDER = "users/ada"


@pytest.fixture
def url() -> str:
    return postgres.empty_store()


def opened(url: str, *, read_only: bool = False, **settings: Any) -> StorageManager:
    return StorageManager(StorageConfig(storage_url=url, **settings), read_only=read_only)


async def fill(storage: StorageManager, *contents: str, session_id: str = "chat") -> None:
    await storage.create_user("ada")
    await storage.create_session("ada", session_id=session_id)
    await storage.add_messages("ada", session_id, [Message("user", content) for content in contents])


async def found(storage: StorageManager, query: str, **more: Any) -> list[str]:
    return [hit.message.content for hit in await storage.search(query, user_id="ada", **more) if hit.message]


def kept(url: str) -> list[tuple[Any, ...]]:
    return postgres.sql(url, "SELECT key, records, tokens FROM word_logs ORDER BY key")


# --- kept and lost -------------------------------------------------------------------------------------------


async def test_words_are_kept_by_the_first_search_and_added_to_by_the_next(url: str) -> None:
    async with opened(url) as storage:
        await fill(storage, "green tea", "black tea")
        assert kept(url) == []
        assert await found(storage, "tea") == ["black tea", "green tea"]
        assert kept(url) == [("users/ada/chat/messages.jsonl", 2, 4)]
        await storage.add_message("ada", "chat", Message("user", "white tea, 烏龍茶"))
        assert await found(storage, "烏龍") == ["white tea, 烏龍茶"]
        assert kept(url) == [("users/ada/chat/messages.jsonl", 2, 4)]  # a few are read
        await storage.add_messages("ada", "chat", [Message("user", f"tea {n}") for n in range(200)])
        assert len(await found(storage, "tea", limit=1000)) == 203
        assert await found(storage, "烏龍") == ["white tea, 烏龍茶"]
        assert kept(url) == [("users/ada/chat/messages.jsonl", 203, 409)]
        assert await found(storage, "coffee") == []


@pytest.mark.parametrize("change", ["update", "delete", "pop", "clear", "session", "user"])
async def test_what_is_changed_or_removed_is_out_of_the_words_at_once(url: str, change: str) -> None:
    async with opened(url) as storage, opened(url) as other:
        await fill(storage, "first secret", "second secret")
        assert len(await found(other, "secret")) == 2
        [first, second] = await storage.get_messages("ada", "chat")
        left = ["first secret"]
        match change:
            case "update":
                await storage.update_message("ada", "chat", second.id, {"content": "harmless"})
            case "delete":
                await storage.delete_message("ada", "chat", first.id)
                left = ["second secret"]
            case "pop":
                await storage.pop_message("ada", "chat")
            case "clear":
                await storage.clear_messages("ada", "chat")
                left = []
            case "session":
                await storage.delete_session("ada", "chat")
                left = []
            case "user":
                await storage.delete_user("ada")
                left = []
        assert kept(url) == []
        assert postgres.sql(url, "SELECT count(*) FROM words") == [(0,)]
        assert await found(other, "secret") == await found(storage, "secret") == left


async def test_a_text_with_too_many_words_for_the_database_is_found(url: str) -> None:
    words = [f"word{number:07}" for number in range(60_000)]
    async with opened(url, max_message_size_bytes=4_000_000) as storage:
        await fill(storage, " ".join(words), "word0000007 alone")
        assert len(await found(storage, "word0000007")) == 2
        assert len(await found(storage, "word0059999")) == 1
        assert await found(storage, "word0060000") == []
        [first, second] = await storage.search("word0000007", user_id="ada", order="relevance")
        assert first.message is not None
        assert first.message.content == "word0000007 alone"
        assert first.score > second.score


async def test_what_is_searched_of_a_message_makes_words_of_its_own(url: str) -> None:
    async with opened(url) as storage, opened(url, search_include_metadata=True) as other:
        await storage.create_user("ada")
        await storage.create_session("ada", session_id="chat")
        await storage.add_message("ada", "chat", Message("user", "content", metadata={"topic": "hidden"}))
        for _ in range(2):
            assert await found(storage, "hidden") == []
            assert await found(other, "hidden") == ["content"]
        assert len(kept(url)) == 2


async def test_reindex_makes_them_anew(url: str) -> None:
    async with opened(url) as storage:
        await fill(storage, "green tea", "black tea")
        await found(storage, "tea")
        postgres.sql(url, "UPDATE words SET lexemes = ''")  # by hand
        assert await found(storage, "tea") == []
        assert await storage.reindex("ada") == 1
        assert await found(storage, "tea") == ["black tea", "green tea"]
        async with opened(url) as other:
            assert await found(other, "green") == ["green tea"]
            assert await storage.reindex() == 1
            assert await found(other, "green") == ["green tea"]


# --- nodes ---------------------------------------------------------------------------------------------------


async def test_many_nodes_that_search_at_once_keep_words_once(url: str) -> None:
    nodes = [opened(url) for _ in range(4)]
    try:
        for number in range(30):
            await fill(nodes[0], *(f"tea number{n}" for n in range(40)), session_id=f"s{number:02}")
        answers = await asyncio.gather(*(found(node, "number39", limit=1000) for node in nodes))
        assert [len(answer) for answer in answers] == [30] * 4
        assert [row[1:] for row in kept(url)] == [(40, 80)] * 30
        assert postgres.sql(url, "SELECT count(*) FROM words") == [(1200,)]
    finally:
        for node in nodes:
            await node.close()


async def test_who_may_only_read_reads_what_has_no_words(url: str) -> None:
    async with opened(url) as storage:
        await fill(storage, "green tea", "black tea")
        await found(storage, "tea")
        await storage.add_message("ada", "chat", Message("user", "white tea"))
        async with opened(url, read_only=True) as reader:
            for order in ("time", "relevance"):
                assert sorted(await found(reader, "tea", order=order)) == ["black tea", "green tea", "white tea"]
                scores = [hit.score for hit in await reader.search("white tea", user_id="ada", order=order)]
                assert scores == [hit.score for hit in await storage.search("white tea", user_id="ada", order=order)]
        assert kept(url)[0][1] == 2


def after_preparing(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Awaitable[object]]) -> None:
    """Do something between what a search does beforehand and its look at the words."""
    prepare = Wording.prepare

    async def prepare_and_work(wording: Wording, user_id: str, session_id: str | None) -> None:
        await prepare(wording, user_id, session_id)
        monkeypatch.setattr(Wording, "prepare", prepare)
        await work()

    monkeypatch.setattr(Wording, "prepare", prepare_and_work)


@pytest.mark.parametrize("order", ["time", "relevance"])
async def test_a_search_misses_nothing_while_somebody_edits(
    url: str, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    async with opened(url) as storage, opened(url) as other:
        await fill(storage, *(f"tea number{n}" for n in range(100)))
        [first, *_] = await storage.get_messages("ada", "chat")
        after_preparing(monkeypatch, lambda: other.update_message("ada", "chat", first.id, {"content": "hot tea"}))
        answer = await found(storage, "tea", limit=1000, order=order)
        assert sorted(answer) == sorted(["hot tea", *(f"tea number{n}" for n in range(1, 100))])
        assert kept(url) == []


async def test_a_search_finds_nothing_twice_while_somebody_keeps_words(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(url) as storage, opened(url, read_only=True) as reader:
        await fill(storage, *(f"tea number{n}" for n in range(20)))
        after_preparing(monkeypatch, lambda: found(storage, "tea"))
        assert len(await found(reader, "tea", limit=1000)) == 20


async def test_nobody_waits_for_words_that_cannot_be_kept_now(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flatfile_chat_database.backends.postgres._PATIENCE_MILLISECONDS", 50)
    [(number,)] = postgres.sql(url, "SELECT oid::bigint FROM pg_namespace WHERE nspname = current_schema()")
    async with opened(url) as storage:
        await fill(storage, "green tea", "black tea")
        with postgres.connection(url).transaction():
            postgres.sql(url, f"SELECT pg_advisory_xact_lock({_LOCK | number})")  # as somebody's long write does
            answers = await asyncio.gather(*(found(storage, "tea") for _ in range(8)))
        assert answers == [["black tea", "green tea"]] * 8
        assert "cannot be kept" in caplog.text
        assert kept(url) == []


async def test_words_of_a_log_that_was_replaced_meanwhile_are_not_kept(url: str) -> None:
    async with opened(url) as storage:
        await fill(storage, "green tea", "black tea")
        backend = storage.backend
        assert isinstance(backend, PostgresBackend)
        words = backend.words()
        [behind] = (await words.behind("1", FOLDER, None)).behind
        record = RecordWords(1, 1, frozenset({"tea"}))
        late = LogWords(behind.key, behind.identity, 0, [record, record])
        wanted = Wanted("1", FOLDER, lexemes=(("tea", False),))

        await words.keep("1", [LogWords(behind.key, behind.identity, 1, [record])])  # what comes before is not kept
        assert (await words.sums(wanted)).records == 0
        await storage.clear_messages("ada", "chat")
        await storage.add_messages("ada", "chat", [Message("user", "one"), Message("user", "two")])
        await words.keep("1", [late])
        assert (await words.sums(wanted)).records == 0
        [behind] = (await words.behind("1", FOLDER, None)).behind
        await words.keep("1", [LogWords(behind.key, behind.identity, 0, [record, record])] * 2)
        assert (await words.sums(wanted)).records == 2
        assert (await words.behind("1", FOLDER, None)).behind == []
        assert [log.key for log in (await words.behind("2", FOLDER, None)).behind] == [behind.key]


async def test_nothing_in_a_lexeme_means_anything(url: str) -> None:
    texts = ["'", "\\", "a'b", "a & b", "!a", "a:*", "<->", "%s", "''", "\\'"]
    async with opened(url) as storage:
        await fill(storage, *texts)
        backend = storage.backend
        assert isinstance(backend, PostgresBackend)
        words = backend.words()
        [behind] = (await words.behind("1", FOLDER, None)).behind
        records = [RecordWords(number, 1, frozenset({text})) for number, text in enumerate(texts)]
        await words.keep("1", [LogWords(behind.key, behind.identity, 0, records)])
        for number, text in enumerate(texts):
            runs = [run async for run in words.find(Wanted("1", FOLDER, lexemes=((text, False),)))]
            assert [[each.position for each in run] for run in runs] == [[number]]
