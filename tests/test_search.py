"""Search through StorageManager: what is searched, what comes back, and in which order."""

import json
import logging
import random
import threading
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import pytest

from flatfile_chat_database import codec
from flatfile_chat_database.backends.memory import MemoryBackend
from flatfile_chat_database.config import StorageConfig
from flatfile_chat_database.errors import ClosedError, ValidationError
from flatfile_chat_database.models import Message, SearchHit, SituationalContext
from flatfile_chat_database.records import finding
from flatfile_chat_database.search import Query
from flatfile_chat_database.storage import StorageManager

from .conftest import MakeStorage


def at(minute: int, second: int = 0) -> str:
    return f"2026-01-01T12:{minute:02}:{second:02}.000000+00:00"


def message(content: str, minute: int = 0, role: str = "user", **more: Any) -> Message:
    return Message(role, content, **{"timestamp": at(minute)} | more)


async def session(storage: StorageManager, name: str, *messages: Message, user_id: str = "ada") -> str:
    await storage.create_user(user_id)
    await storage.create_session(user_id, session_id=name)
    await storage.add_messages(user_id, name, messages)
    return name


def contents(hits: list[SearchHit]) -> list[str]:
    return [hit.message.content if hit.message else hit.snippet for hit in hits]


# --- messages ----------------------------------------------------------------------------------------


async def test_search_messages_returns_the_newest_messages_that_hold_every_word(storage: StorageManager) -> None:
    await session(storage, "s1", message("I like Python", 1), message("I like Java", 2), message("Like it? PYTHON!", 3))
    await session(storage, "s2", message("python, which I like", 2), message("Pythons", 4))
    found = await storage.search_messages("ada", "like python")
    assert [item.content for item in found] == ["Like it? PYTHON!", "python, which I like", "I like Python"]
    assert all(isinstance(item, Message) for item in found)
    assert [item.content for item in await storage.search_messages("ada", "like python", "s2")] == [
        "python, which I like"
    ]
    assert await storage.search_messages("ada", query="java", session_id="s1") == [
        (await storage.get_messages("ada", "s1"))[1]
    ]


async def test_a_hit_says_where_it_is(storage: StorageManager) -> None:
    sent = message("Where is my Straße?", 5, role="assistant", metadata={"model": "m"})
    await session(storage, "s1", sent)
    assert await storage.search("strasse", user_id="ada") == [
        SearchHit(
            kind="message",
            user_id="ada",
            session_id="s1",
            timestamp=at(5),
            snippet="Where is my «Straße»?",
            score=0.0,
            message=sent,
            filename=None,
        )
    ]


async def test_chinese_words_of_any_length_are_found(storage: StorageManager) -> None:
    await session(storage, "s1", message("你喜欢看电影吗？", 1), message("我的iPhone手机坏了", 2), message("影电", 3))
    for query, snippet in (
        ("电", ["«电»", "你喜欢看«电»影吗？"]),
        ("电影", ["你喜欢看«电影»吗？"]),
        ("喜欢看电影", ["你«喜欢看电影»吗？"]),
        ("iPhone手机", ["我的«iPhone手机»坏了"]),
        ("喜欢手机", []),
    ):
        hits = await storage.search(query, user_id="ada", session_id="s1")
        assert [hit.snippet.replace("影«电»", "«电»") for hit in hits] == snippet, query


async def test_prefixes_and_phrases_are_found(storage: StorageManager) -> None:
    await session(storage, "s1", message("New York is big", 1), message("York is new, programmers say", 2))
    assert contents(await storage.search('"new york"', user_id="ada")) == ["New York is big"]
    assert contents(await storage.search("prog*", user_id="ada")) == ["York is new, programmers say"]


async def test_any_text_is_a_legal_query(storage: StorageManager) -> None:
    await session(storage, "s1", message("role user AND near (x) col:1"))
    for query in ('"', "*", "NEAR(", "role:user", "-", "(", ")", "^", ":", "\0", "\ud800", "", "' OR 1=1 --", "{}[]\\"):
        assert isinstance(await storage.search(query, user_id="ada"), list)
    assert len(await storage.search("role:user AND (", user_id="ada")) == 1
    assert await storage.search("* \" ' ( ) - ^ :", user_id="ada") == []


async def test_only_the_users_own_chats_are_searched(storage: StorageManager) -> None:
    await session(storage, "s1", message("mine python"))
    await session(storage, "s1", message("yours python"), user_id="bob")
    assert contents(await storage.search("python", user_id="ada")) == ["mine python"]


async def test_where_nothing_is_nothing_is_found(storage: StorageManager) -> None:
    assert await storage.search("python", user_id="nobody") == []
    await session(storage, "s1", message("python"))
    assert await storage.search("python", user_id="nobody") == []
    assert await storage.search("python", user_id="ada", session_id="nowhere") == []
    assert await storage.search_messages("nobody", "python", "nowhere") == []


async def test_what_is_changed_or_removed_is_not_found_any_more(storage: StorageManager) -> None:
    await session(storage, "s1", message("first", 1, id="1"), message("second", 2, id="2"), message("third", 3, id="3"))
    await storage.update_message("ada", "s1", "1", {"content": "changed"})
    await storage.delete_message("ada", "s1", "2")
    for query, count in (("first", 0), ("changed", 1), ("second", 0), ("third", 1)):
        assert len(await storage.search(query, user_id="ada")) == count
    await storage.clear_messages("ada", "s1")
    assert await storage.search("third", user_id="ada") == []


# --- order and paging --------------------------------------------------------------------------------


async def test_newest_first_goes_by_moments_not_by_text(storage: StorageManager) -> None:
    stamps = {
        "a": "2026-01-01T12:00:00+00:00",
        "b": "2026-01-01T12:30:00+02:00",  # 10:30
        "c": "2026-01-01T09:00:00-05:00",  # 14:00
        "d": "2026-01-01T12:00:00.000001Z",
    }
    await session(storage, "s1", *(Message("user", f"word {name}", timestamp=stamps[name]) for name in stamps))
    assert contents(await storage.search("word", user_id="ada")) == ["word c", "word d", "word a", "word b"]


async def test_of_one_moment_the_later_session_and_the_newer_position_come_first(storage: StorageManager) -> None:
    await session(storage, "s1", *(message(f"word a{number}") for number in range(12)))
    await session(storage, "s2", message("word b0"), message("word b1"))
    await storage.update_context("ada", "s2", SituationalContext("word context", timestamp=at(0)))
    expected = ["word b1", "word b0", "«word» context", *(f"word a{number}" for number in range(11, -1, -1))]
    assert contents(await storage.search("word", user_id="ada")) == expected


async def test_pages_follow_each_other(storage: StorageManager) -> None:
    for name in ("s1", "s2", "s3"):
        await session(storage, name, *(message(f"word {name} {n} {'word ' * (n % 4)}", n % 7) for n in range(15)))
    for order in ("time", "relevance"):
        every = await storage.search("word", user_id="ada", order=order, limit=1000)
        assert len(every) == 45
        paged = []
        for offset in range(0, 50, 10):
            paged += await storage.search("word", user_id="ada", order=order, limit=10, offset=offset)
        assert paged == every
        assert await storage.search("word", user_id="ada", order=order, limit=0) == []
        assert await storage.search("word", user_id="ada", order=order, offset=45) == []


async def test_the_default_limit_is_search_results_default_limit(make_storage: MakeStorage) -> None:
    await session(make_storage(), "s1", *(message(f"word {number}", number) for number in range(30)))
    for limit in (0, 3, 25):
        storage = make_storage(search_results_default_limit=limit)
        assert len(await storage.search("word", user_id="ada")) == limit
        assert len(await storage.search_messages("ada", "word")) == limit
        assert len(await storage.search("word", user_id="ada", limit=7)) == 7


async def test_by_relevance_the_best_comes_first(storage: StorageManager) -> None:
    texts = ["python in a long text about other things", "python python python", "python now", *["other"] * 5]
    await session(storage, "s1", *(message(text, number) for number, text in enumerate(texts)))
    hits = await storage.search("python", user_id="ada", order="relevance")
    assert contents(hits) == ["python python python", "python now", "python in a long text about other things"]
    scores = [hit.score for hit in hits]
    assert scores == sorted(scores, reverse=True) and scores[-1] > 0


async def test_of_one_relevance_the_newest_comes_first(storage: StorageManager) -> None:
    await session(storage, "s1", message("python one", 5), message("python two", 9), message("python six", 7))
    hits = await storage.search("python", user_id="ada", order="relevance")
    assert contents(hits) == ["python two", "python six", "python one"]


async def test_role_and_time_do_not_change_a_score(storage: StorageManager) -> None:
    texts = ["python", "python python", "java", "more java", "and c"]
    await session(storage, "s1", *(message(text, n, role=f"role{n % 2}") for n, text in enumerate(texts)))
    every = await storage.search("python", user_id="ada", order="relevance")
    some = await storage.search("python", user_id="ada", order="relevance", roles=["role0"], until=at(1))
    assert some == [hit for hit in every if hit.message and hit.message.content == "python"]


# --- filters -----------------------------------------------------------------------------------------


async def test_roles_choose_messages(storage: StorageManager) -> None:
    await session(
        storage, "s1", message("word u", 1), message("word a", 2, role="assistant"), message("word c", 3, role="critic")
    )
    await storage.update_context("ada", "s1", SituationalContext("word x", timestamp=at(4)))
    for roles, expected in (
        (None, ["«word» x", "word c", "word a", "word u"]),
        (["user"], ["word u"]),
        ({"assistant", "critic"}, ["word c", "word a"]),
        (("nobody",), []),
        ((), []),
    ):
        assert contents(await storage.search("word", user_id="ada", roles=roles)) == expected


async def test_since_is_included_and_until_is_not(storage: StorageManager) -> None:
    await session(storage, "s1", *(message(f"word {minute}", minute) for minute in range(6)))
    for since, until, expected in (
        (at(4), None, ["word 5", "word 4"]),
        (None, at(2), ["word 1", "word 0"]),
        (at(2), at(4), ["word 3", "word 2"]),
        ("2026-01-01T14:02:00+02:00", "2026-01-01T14:02:00.000001+02:00", ["word 2"]),
        (at(3), at(3), []),
        (at(4), at(1), []),
    ):
        assert contents(await storage.search("word", user_id="ada", since=since, until=until)) == expected


async def everything(storage: StorageManager) -> None:
    """Store one record of each kind with the word in it."""
    await session(
        storage, "s1", message("word of a message", 1, metadata={"note": ["hidden word", {"deep": "treasure"}]})
    )
    context = SituationalContext(
        "word of a context", ["a key point"], {"people": ["Ada Lovelace"], "level": ["beginner"]}, timestamp=at(2)
    )
    await storage.update_context("ada", "s1", context)
    await storage.save_document("ada", "s1", "report.txt", b"word in the file itself")
    analysis = {"summary": "word of an analysis", "parts": [{"mood": "positive"}, 7, None, True], "word_count": 5}
    await storage.update_document_analysis("ada", "s1", "report.txt", analysis)


async def test_contexts_and_analyses_are_found(storage: StorageManager) -> None:
    await everything(storage)
    hits = await storage.search("word", user_id="ada")
    assert [(hit.kind, hit.snippet, hit.filename) for hit in hits] == [
        ("analysis", "«word» of an analysis positive", "report.txt"),
        ("context", "«word» of a context a key point Ada Lovelace beginner", None),
        ("message", "«word» of a message", None),
    ]
    document = await storage.get_document_info("ada", "s1", "report.txt")
    assert document is not None
    assert [hit.timestamp for hit in hits] == [document.uploaded_at, at(2), at(1)]
    assert [hit.message is None for hit in hits] == [True, True, False]
    for query, kind in (("key point", "context"), ("lovelace", "context"), ("positive", "analysis")):
        assert [hit.kind for hit in await storage.search(query, user_id="ada")] == [kind]
    for query in ("people", "mood", "count", "itself", "report", "hidden"):  # names of fields, files, metadata
        assert await storage.search(query, user_id="ada") == []


async def test_kinds_choose_what_is_found(storage: StorageManager) -> None:
    await everything(storage)
    choices: list[tuple[Any, list[str]]] = [
        (["message"], ["message"]),
        (("context", "analysis"), ["analysis", "context"]),
        ({"analysis"}, ["analysis"]),
        ([], []),
    ]
    for kinds, expected in choices:
        for order in ("time", "relevance"):
            hits = await storage.search("word", user_id="ada", kinds=kinds, order=order)
            assert sorted(hit.kind for hit in hits) == expected
    assert await storage.search("word", user_id="ada", kinds=["context"], roles=["user"]) == []


async def test_only_the_current_context_is_found(storage: StorageManager) -> None:
    await everything(storage)
    await storage.save_context_snapshot("ada", "s1", SituationalContext("archived"))
    await storage.update_context("ada", "s1", SituationalContext("replaced"))
    assert await storage.search("archived", user_id="ada") == []
    assert [hit.kind for hit in await storage.search("replaced", user_id="ada")] == ["context"]
    assert [hit.kind for hit in await storage.search("word", user_id="ada")] == ["analysis", "message"]
    await storage.delete_context("ada", "s1")
    assert await storage.search("replaced", user_id="ada") == []


async def test_the_analysis_of_a_replaced_document_is_not_found(storage: StorageManager) -> None:
    await everything(storage)
    await storage.save_document("ada", "s1", "report.txt", b"other")
    assert [hit.kind for hit in await storage.search("word", user_id="ada")] == ["context", "message"]


# --- configuration -----------------------------------------------------------------------------------


async def test_each_search_setting_says_what_is_searched(make_storage: MakeStorage) -> None:
    await everything(make_storage())
    kinds = {
        (True, True): ["analysis", "context", "message"],
        (True, False): ["message"],
        (False, True): ["analysis", "context"],
        (False, False): [],
    }
    for (content, context), expected in kinds.items():
        storage = make_storage(search_include_message_content=content, search_include_context=context)
        assert [hit.kind for hit in await storage.search("word", user_id="ada")] == expected
        for kind in ("message", "context", "analysis"):
            hits = await storage.search("word", user_id="ada", kinds=[kind])
            found = kind in expected or kind != "message"  # the configuration decides only where `kinds` is left out
            assert [hit.kind for hit in hits] == [kind] * found


async def test_metadata_of_messages_is_searched_if_the_configuration_says_so(make_storage: MakeStorage) -> None:
    await everything(make_storage())
    storage = make_storage(search_include_metadata=True)
    assert [hit.snippet for hit in await storage.search("hidden treasure", user_id="ada")] == [
        "word of a message «hidden» word «treasure»"
    ]
    assert await storage.search("deep", user_id="ada") == []
    only = make_storage(search_include_metadata=True, search_include_message_content=False)
    assert [hit.snippet for hit in await only.search("treasure", user_id="ada")] == ["hidden word «treasure»"]
    assert [hit.kind for hit in await only.search("message", user_id="ada")] == []
    assert await make_storage().search("treasure", user_id="ada") == []


async def test_short_words_are_ignored_beside_longer_ones(make_storage: MakeStorage) -> None:
    await session(make_storage(), "s1", message("go home"), message("stay home"))
    assert len(await make_storage().search("go home", user_id="ada")) == 2
    assert len(await make_storage().search("go", user_id="ada")) == 1
    assert len(await make_storage(full_text_search_min_word_length=2).search("go home", user_id="ada")) == 1


# --- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": None}, "query must be a string"),
        ({"query": b"word"}, "query must be a string"),
        ({"user_id": ""}, "user_id must not be empty"),
        ({"user_id": 7}, "user_id must be a string"),
        ({"user_id": "a\0b"}, "user_id"),
        ({"session_id": ""}, "session_id must not be empty"),
        ({"session_id": "\ud800"}, "session_id"),
        ({"kinds": "message"}, "kinds must be a collection of strings, not str"),
        ({"kinds": ["panel"]}, "kinds holds 'panel'. Possible are message, context, analysis"),
        ({"kinds": [7]}, "an element of kinds must be a string"),
        ({"kinds": 7}, "kinds must be a collection"),
        ({"roles": "user"}, "roles must be a collection of strings, not str"),
        ({"roles": [None]}, "an element of roles must be a string"),
        ({"since": "yesterday"}, "since 'yesterday' is not an ISO 8601 timestamp"),
        ({"since": "2026-01-01T12:00:00"}, "since .* has no offset"),
        ({"until": 7}, "until must be an ISO 8601 string"),
        ({"order": "random"}, "order must be one of time, relevance"),
        ({"order": None}, "order must be"),
        ({"limit": -1}, "limit must not be negative"),
        ({"limit": 1.5}, "limit must be a whole number"),
        ({"limit": True}, "limit must be a whole number"),
        ({"offset": -1}, "offset must not be negative"),
        ({"offset": None}, "offset must be a whole number"),
    ],
)
async def test_an_argument_that_cannot_be_is_refused(
    storage: StorageManager, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        await storage.search(**{"query": "word", "user_id": "ada"} | arguments)


async def test_a_closed_store_finds_nothing(make_storage: MakeStorage, store_path: Any) -> None:
    storage = make_storage(storage_url="memory:")
    await storage.create_user("ada")
    await storage.close()
    with pytest.raises(ClosedError):
        await storage.search("word", user_id="ada")


# --- damage ------------------------------------------------------------------------------------------


@pytest.mark.damage
async def test_what_is_damaged_is_passed_over_with_a_warning(
    storage: StorageManager, caplog: pytest.LogCaptureFixture
) -> None:
    await everything(storage)
    await session(storage, "s2", message("word before", 1))
    await session(storage, "s3", message("word elsewhere", 2))
    for place in ("s2", "s3"):
        await storage.update_context("ada", place, SituationalContext("word too", timestamp=at(3)))
        await storage.save_document("ada", place, "a.txt", b"text")
        await storage.update_document_analysis("ada", place, "a.txt", {"text": "word three"})
    layout, backend = storage._store.layout, storage.backend
    log = layout.key("messages", user_id="ada", session_id="s2")
    undated = codec.encode_message(message("word without a time", id="undated", timestamp=at(1)))
    await backend.append(log, undated.replace(at(1).encode(), b"yesterday") + b"no word of JSON\n")
    await backend.append(log, codec.encode_message(message("word after", 4)))
    context = layout.key("context", user_id="ada", session_id="s2")
    await backend.write(context, b'{"summary": "word", "timestamp": 7}')
    other_context = layout.key("context", user_id="ada", session_id="s3")
    await backend.write(other_context, json.dumps({"summary": "word", "timestamp": "never"}).encode())
    documents = layout.key("documents", user_id="ada", session_id="s2")
    await backend.write(documents, b"{")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "flatfile_chat_database"):
        hits = await storage.search("word", user_id="ada", since="2000-01-01T00:00:00Z")
    assert sorted(hit.snippet for hit in hits) == [
        "«word» after",
        "«word» before",
        "«word» elsewhere",
        "«word» of a context a key point Ada Lovelace beginner",
        "«word» of a message",
        "«word» of an analysis positive",
        "«word» three",
    ]
    warned = "\n".join(record.getMessage() for record in caplog.records)
    for place in (f"'undated' in {log}", f"{log}: the line at byte", context, other_context, documents):
        assert place in warned


# --- how it works ------------------------------------------------------------------------------------


async def test_search_finds_what_a_comparison_of_all_finds(make_storage: MakeStorage) -> None:
    chance = random.Random(7)
    words = ["apple", "Äpfel", "pear", "pears", "电影", "手机", "NEW", "york", "it", "go", "😀"]
    sent: list[tuple[str, Message]] = []
    storage = make_storage()
    for name in ("s1", "s2", "s3"):
        messages = [
            message(
                " ".join(chance.choices(words, k=chance.randrange(1, 9))), chance.randrange(50), chance.choice("ua")
            )
            for _ in range(60)
        ]
        await session(storage, name, *messages)
        sent += [(name, item) for item in messages]
    # At each moment the later session first, in it the later message: the reverse of how they were sent.
    newest_first = sorted(sent, key=lambda pair: pair[1].timestamp)[::-1]
    choices: list[dict[str, Any]]
    choices = [{}, {"roles": ["u"]}, {"since": at(10), "until": at(30)}, {"session_id": "s2"}]
    for query in (
        "apple",
        "apfel",
        "pear*",
        "new york",
        '"new york"',
        "电",
        "电影手机",
        "it go",
        "go apple",
        "😀 pear",
    ):
        for filters in choices:
            parsed = Query.parse(query, 3)
            expected = [
                item.id
                for name, item in newest_first
                if parsed.matches(item.content)
                and item.role in filters.get("roles", ["u", "a"])
                and at(0) <= filters.get("since", at(0)) <= item.timestamp < filters.get("until", at(59))
                and name == filters.get("session_id", name)
            ]
            hits = await storage.search(query, user_id="ada", limit=1000, **filters)
            assert [hit.message.id for hit in hits if hit.message] == expected
            ranked = await storage.search(query, user_id="ada", limit=1000, order="relevance", **filters)
            assert {hit.message.id for hit in ranked if hit.message} == set(expected)


async def test_texts_are_looked_at_in_other_threads(storage: StorageManager, monkeypatch: pytest.MonkeyPatch) -> None:
    await session(storage, "s1", message("word"))
    threads = set()
    matches = Query.matches

    def watched(self: Query, text: str) -> bool:
        threads.add(threading.current_thread())
        return matches(self, text)

    monkeypatch.setattr(Query, "matches", watched)
    assert len(await storage.search("word", user_id="ada")) == 1
    assert threads and threading.main_thread() not in threads


async def test_many_small_batches_find_the_same(storage: StorageManager, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        await session(storage, f"s{number}", *(message(f"word {number} {place}", place) for place in range(5)))
        await storage.update_context("ada", f"s{number}", SituationalContext(f"word {number}", timestamp=at(number)))
    expected = await storage.search("word", user_id="ada", limit=100)
    assert len(expected) == 30
    monkeypatch.setattr(finding, "_BATCH_TEXTS", 2)
    monkeypatch.setattr(finding, "_SESSIONS_AT_A_TIME", 3)
    monkeypatch.setattr(finding, "_LOGS_AT_A_TIME", 2)
    assert await storage.search("word", user_id="ada", limit=100) == expected
    monkeypatch.setattr(finding, "_SHORT_LOG", 5)
    assert await storage.search("word", user_id="ada", limit=100) == expected


class _Endless(MemoryBackend):
    """A log that is far larger than what is in memory of it."""

    async def read_log(self, key: str, start: int = 0, stop: int | None = None, *, strict: bool = False) -> list[bytes]:
        return (await anext(aiter(self.stream_log(key))))[start:stop]

    async def stream_log(self, key: str, *, strict: bool = False) -> AsyncIterator[list[bytes]]:
        for minute in range(40):
            yield [
                codec.encode_message(message(f"word {number} " + "filler " * 1000, minute)).rstrip(b"\n")
                for number in range(40)
            ]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["time", "relevance"])
async def test_memory_does_not_grow_with_what_is_searched(order: Any) -> None:
    storage = StorageManager(backend=_Endless(StorageConfig(storage_url="memory:")))
    await storage.search("warm up", user_id="ada", session_id="s1")
    tracemalloc.start()
    try:
        hits = await storage.search("word", user_id="ada", session_id="s1", order=order, limit=20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(hits) == 20
    assert hits[0].timestamp == at(39)
    assert peak < 4_000_000  # of 11 MB that were searched
