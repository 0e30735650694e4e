"""What a query means: the rules of `search.py`, which an index has to reproduce exactly."""

import json
import math
import sqlite3
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatfile_chat_database.errors import ValidationError
from flatfile_chat_database.search import (
    MAX_PHRASE,
    MAX_TERMS,
    MAX_WORD,
    Measure,
    Query,
    Relevance,
    Term,
    normalise,
    tokenise,
)
from flatfile_chat_database.search.tokens import count_spaced, spaced

from .characters import characters

NASTY = "\u0301\u0345\u0640\u064b\u093c\u094d\u0e31\u1160\u1161\u11a8\u200b\u200c\u200d\u2060\u20e3\u302a\u3099\u309a"
NASTY += "\u00ad\ufe0f\uff9e\ufb01\ufdfa\ufe71\u2122\u3300\u0130\u0131\u00df\u1e9e\u03c2\u1fb3\u0958\u09c7\u09be"
NASTY += "\U0001f3fd\U0001f469\U0001f1e9\U000e0061\U0001d165\U0001d15e\U00011131\U00011127\0\x1f\x85\ud800\udfff"
LETTERS = 'abzAZ019 _-.,\n\t"“”«»*éÉøжйЁאبحकि字語かがカーｶﾞ한국ไทย😀☺'

hostile_text = st.one_of(
    st.text(),
    st.text(alphabet=st.characters()),
    st.text(alphabet=st.sampled_from(NASTY + LETTERS), max_size=40),
    st.text(alphabet=st.sampled_from("ab \"*'c字手"), max_size=30),
)


def slow_matches(query: Query, text: str) -> bool:
    """Match by the letter of the rules, token by token."""
    tokens = tokenise(text)

    def holds(term: Term) -> bool:
        count = len(term.tokens)
        if term.prefix:
            return any(token.startswith(term.tokens[0]) for token in tokens)
        return any(tuple(tokens[place : place + count]) == term.tokens for place in range(len(tokens)))

    return bool(query.terms) and all(holds(term) for term in query.terms)


def terms(text: str, min_word_length: int = 3) -> list[str]:
    """Return the terms of a query, readable: a space between tokens, a star behind a prefix."""
    return [" ".join(term.tokens) + "*" * term.prefix for term in Query.parse(text, min_word_length).terms]


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def bare(snippet: str) -> str:
    return snippet.replace("«", "").replace("»", "")


# --- normalisation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Hello, World!", "hello, world!"),
        ("Crème BRÛLÉE", "creme brulee"),
        ("Cre\u0300me", "creme"),
        ("Straße", "strasse"),
        ("STRAẞE", "strasse"),
        ("Ærø Łódź đ", "ærø łodz đ"),
        ("ﬁne", "fine"),
        ("ｉＰｈｏｎｅ１５", "iphone15"),
        ("İstanbul", "istanbul"),
        ("ISPARTA", "isparta"),
        ("ısparta", "ısparta"),
        ("Tiếng Việt", "tieng viet"),
        ("ΟΔΥΣΣΕΎΣ", "οδυσσευσ"),
        ("Ὀδυσσεύς", "οδυσσευσ"),
        ("Ёлка Мой", "елка мои"),
        ("שָׁלוֹם", "שלום"),
        ("שׁלום", "שלום"),
        ("السَّلَامُ", "السلام"),
        ("أحمد", "احمد"),
        ("مـــرحبا", "مرحبا"),
        ("می‌خواهم", "میخواهم"),
        ("हिन्दी", "हिन्दी"),
        ("क्‍ष", "क्ष"),
        ("น้ำ", unicodedata.normalize("NFC", unicodedata.normalize("NFKC", "น้ำ"))),
        ("がぎ", "がぎ"),
        ("ｶﾞ", "ガ"),
        ("か\u3099", "が"),
        ("か\u309a", "か\u309a"),
        ("字\u0301", "字"),
        ("한국", "한국"),
        (nfd("한국"), "한국"),
        ("co\u00adoperate", "cooperate"),
        ("👍🏽", "👍"),
        ("❤️", "❤"),
        ("1️⃣", "1"),
        ("Python™", "python "),
        ("m²", "m2"),
        ("\u0301alone", "alone"),
        ("", ""),
    ],
)
def test_text_is_compared_in_one_form(text: str, normal: str) -> None:
    assert normalise(text) == normal


def test_normalising_any_character_twice_changes_nothing() -> None:
    assert [ascii(c) for c in characters() if normalise(normalise(c)) != normalise(c)] == []


@given(hostile_text)
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_canonically_equal_texts_have_the_same_normal_form(text: str) -> None:
    for form in ("NFC", "NFD"):
        assert normalise(unicodedata.normalize(form, text)) == normalise(text)


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_the_short_way_of_ascii_is_the_long_one(text: str) -> None:
    with_more = text + " é"  # takes the long way
    assert normalise(with_more) == normalise(text) + " e"


# --- tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The quick brown-fox, isn't it?", "the quick brown fox isn t it"),
        ("snake_case role:user 3.14 a@b.com", "snake case role user 3 14 a b com"),
        ("मुझे हिंदी पढ़ना अच्छा लगता है", "मुझे हिंदी पढ़ना अच्छा लगता है"),
        ("ภาษาไทยไม่เว้นวรรค", "ภาษาไทยไม่เว้นวรรค"),
        ("ไทย\u200bแลนด์", "ไทย แลนด์"),
        ("我喜欢电影。", "我 喜 欢 电 影"),
        ("iPhone手机15", "iphone 手 机 15"),
        ("コンピューター", "コ ン ピ ュ ー タ ー"),
        ("ｺﾝﾋﾟｭｰﾀｰ", "コ ン ピ ュ ー タ ー"),
        ("人々は", "人 々 は"),
        ("〇一〆", "〇 一 〆"),
        ("한국어 공부", "한 국 어 공 부"),
        ("か\u309a", "か \u309a"),
        ("great😀😀👍🏽!", "great 😀 😀 👍"),
        ("👩‍💻 🇩🇪", "👩 💻 🇩 🇪"),
        ("25℃ ©2024 ½", "25 ° c © 2024 1 2"),
        ("Python™ℹ️", "python i"),
        ("a\0b\ud800c\ue000d\u2028e", "a b c d e"),
        ("٣ ３ Ⅳ", "٣ 3 iv"),
        ("--- ... ***", ""),
        ("", ""),
    ],
)
def test_text_is_a_sequence_of_tokens(text: str, tokens: str) -> None:
    assert tokenise(text) == tokens.split()


def test_of_a_very_long_word_the_beginning_counts() -> None:
    assert [len(token) for token in tokenise("a" * (MAX_WORD + 5) + " b")] == [MAX_WORD, 1]
    assert Query.parse("a" * (MAX_WORD + 1), 3).matches("x " + "a" * (MAX_WORD + 2))
    assert not Query.parse("a" * (MAX_WORD + 1), 3).matches("x " + "a" * (MAX_WORD - 1))


@given(hostile_text)
def test_tokens_with_a_space_between_are_those_tokens(text: str) -> None:
    for each in (text, f"{text}{' ,' * 9}{text}", f"{text} {'a' * (MAX_WORD + 5)} {text}"):
        assert spaced(each) == " ".join(tokenise(each))
        assert count_spaced(spaced(each)) == len(tokenise(each))


@given(hostile_text)
def test_tokens_are_what_they_are_said_to_be(text: str) -> None:
    for token in tokenise(text):
        assert tokenise(token) == [token]
        assert len(token) == 1 or all(unicodedata.category(character)[0] in "LNM" for character in token)
        assert all(character in "abcdefghijklmnopqrstuvwxyz0123456789" for character in token if character.isascii())
        assert unicodedata.category(token[0])[0] != "M" or token in ("\u3099", "\u309a")


@given(st.lists(hostile_text, max_size=5), st.lists(st.sampled_from(["ab", "ab*", '"a b"', "手机", "é", "😀"])))
def test_sqlites_full_text_search_finds_the_same(texts: list[str], queries: list[str]) -> None:
    database = sqlite3.connect(":memory:")
    try:
        database.execute("CREATE VIRTUAL TABLE found USING fts5(tokens, content='', tokenize='ascii')")
    except sqlite3.OperationalError:
        database.close()
        pytest.skip("NOT TESTED here: this Python's SQLite has no FTS5")
    for place, text in enumerate(texts):
        database.execute("INSERT INTO found(rowid, tokens) VALUES (?, ?)", (place, " ".join(tokenise(text))))
    for text in [*queries, *texts]:
        query = Query.parse(text, 3)
        if not query:
            continue
        match = " AND ".join(f'"{" ".join(term.tokens)}"{" *" * term.prefix}' for term in query.terms)
        select = "SELECT rowid, -bm25(found) FROM found WHERE found MATCH ? ORDER BY rowid"
        rows = database.execute(select, (match,)).fetchall()
        relevance = Relevance(query)
        for other in texts:
            relevance.add(query.measure_any(other))
        measures = [(place, query.measure(other)) for place, other in enumerate(texts)]
        expected = [(place, relevance.score(measure)) for place, measure in measures if measure is not None]
        assert [place for place, _ in rows] == [place for place, _ in expected]
        assert [score for _, score in rows] == pytest.approx([score for _, score in expected], rel=1e-9)
    database.close()


# --- queries -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("hello world", ["hello", "world"]),
        ("hello hello HELLO", ["hello"]),
        ("multi-agent", ["multi", "agent"]),
        ("it's fine", ["fine"]),
        ("it's", ["it", "s"]),
        ("go", ["go"]),
        ("go fast", ["fast"]),
        ("go to it", ["go", "to", "it"]),
        ("a* go", ["a*", "go"]),
        ("go prog*", ["prog*"]),
        ("pr* python", ["python"]),
        ('go "to"', ["to"]),
        ('go "go"', ["go"]),
        ('"go" go', ["go"]),
        ('"go to" it', ["go to"]),
        ("go 手", ["手"]),
        ("hi 😀", ["hi", "😀"]),
        ("hello 😀😀", ["hello", "😀 😀"]),
        ('say "New York" now', ["say", "new york", "now"]),
        ("“New York” „big apple“ «la nuit» ＂full width＂", ["new york", "big apple", "la nuit", "full width"]),
        ('one "two three', ["one", "two", "three"]),
        ('one "" two', ["one", "two"]),
        ('"one"two"three"', ["one", "two", "three"]),
        ('a"bcd', ["bcd"]),
        ("word*", ["word*"]),
        ("ｗｏｒｄ＊", ["word*"]),
        ("wor*ld", ["wor*"]),
        ("worm*world", ["worm*", "world"]),
        ("word *", ["word"]),
        ("word**", ["word*"]),
        ("*word", ["word"]),
        ('"word*"', ["word"]),
        ('"word"*', ["word"]),
        ("手*", ["手"]),
        ("iPhone手机", ["iphone", "手 机"]),
        ("手机 电影", ["手 机", "电 影"]),
        ("手机，电影", ["手 机", "电 影"]),
        ("手机😀", ["手 机", "😀"]),
        ("C语言", ["语 言"]),
        ("AND OR NOT", ["and", "not"]),
        ("NEAR(alpha beta, 2)", ["near", "alpha", "beta"]),
        ("role:user", ["role", "user"]),
        ("^start", ["start"]),
        ("ß", ["ss"]),
        ("", []),
        ("   \n\t", []),
        ('"', []),
        ('""', []),
        ('"""', []),
        ("*", []),
        ("( ) ^ : - + { } \\ / ; '", []),
        ("\0", []),
        ("\ud800", []),
        ("\u0301", []),
    ],
)
def test_a_query_is_a_list_of_terms(query: str, expected: list[str]) -> None:
    assert terms(query) == expected


def test_how_short_a_word_may_be_is_the_callers_choice() -> None:
    assert terms("I go home", 1) == ["i", "go", "home"]
    assert terms("I go home", 2) == ["go", "home"]
    assert terms("I go home", 5) == ["i", "go", "home"]


@pytest.mark.parametrize("query", [None, b"bytes", 7, ["list"]])
def test_a_query_must_be_a_string(query: object) -> None:
    with pytest.raises(ValidationError, match="query must be a string"):
        Query.parse(query, 3)  # type: ignore[arg-type]


def test_a_query_of_any_length_is_legal() -> None:
    book = " ".join(f"word{number}" for number in range(100_000))
    assert len(Query.parse(book, 3).terms) == MAX_TERMS
    assert Query.parse(book, 3).matches(book)
    assert [len(term.tokens) for term in Query.parse("手" * 300_000, 3).terms] == [MAX_PHRASE]
    assert not Query.parse('"' * 1_000_000, 3)
    assert len(Query.parse("a b " * 250_000, 3).terms) == 2


def test_a_query_shows_its_terms() -> None:
    assert repr(Query.parse('say* "New York"', 3)) == "<Query 'say'* 'new york'>"


MATCHES = [
    # English
    ("python", "I like Python.", True),
    ("python", "I like Pythons.", False),
    ("python*", "I like Pythons.", True),
    ("like python", "Python, as I like it", True),
    ("like java", "I like Python", False),
    ('"like python"', "I like Python", True),
    ('"like python"', "Python, as I like it", False),
    ('"like python"', "Do you like... Python?", True),
    ('"lik python"', "I like Python", False),
    ("don't", "I don’t know", True),
    ("multi-agent", "an agent, then multi", True),
    # accents, German, Turkish
    ("cafe", "Das Café", True),
    ("café", "the CAFE", True),
    ("strasse", "Lange Straße 5", True),
    ("Straße", "LANGE STRASSE", True),
    ("istanbul", "İSTANBUL", True),
    ("isparta", "ISPARTA", True),
    ("ısparta", "ISPARTA", False),  # what a Turkish reader would expect, English text rules out
    ("ısparta", "ısparta", True),
    ("smørrebrød", "Smorrebrod", False),
    # Greek, Russian
    ("οδυσσευς", "Ο ΟΔΥΣΣΕΥΣ", True),
    ("ΟΔΥΣΣΕΥΣ", "ο Οδυσσέας και ο Οδυσσεύς", True),
    ("ёлка", "Новогодняя елка", True),
    ("привет", "ПРИВЕТ!", True),
    ("приве", "ПРИВЕТ!", False),
    # Hebrew, Arabic
    ("שלום", "שָׁלוֹם עולם", True),
    ("שָׁלוֹם", "שלום", True),
    ("السلام", "السَّلَامُ عَلَيْكُمْ", True),
    ("احمد", "أحمد", True),
    # Hindi, Thai
    ("हिंदी", "मुझे हिंदी पसंद है", True),
    ("हद", "मुझे हिंदी पसंद है", False),
    ("हिं*", "मुझे हिंदी पसंद है", True),
    ("ภาษาไทย", "ภาษาไทย ง่าย", True),
    ("ไทย", "ภาษาไทย ง่าย", False),  # one word, for we have no dictionary
    ("ภาษา*", "ภาษาไทย ง่าย", True),
    # Chinese, Japanese, Korean
    ("电", "我喜欢看电影", True),
    ("电影", "我喜欢看电影", True),
    ("影电", "我喜欢看电影", False),
    ("喜欢电影", "我喜欢看电影", False),
    ("看电影吗", "你今天看电影吗？", True),
    ("喜欢 电影", "我喜欢看电影", True),
    ("iphone 手机", "我的iPhone手机坏了", True),
    ("iPhone手机", "手机是iPhone", True),
    ('"iPhone手机"', "手机是iPhone", False),
    ("コンピュータ", "コンピューター", True),
    ("コンピューター", "コンピュータ", False),
    ("日本語", "日本語を勉強する", True),
    ("ﾆﾎﾝ", "ニホン", True),
    ("かき", "がき", False),
    ("한국", "저는 한국어를 공부해요", True),
    ("국한", "저는 한국어를 공부해요", False),
    # emoji, full width
    ("😀", "great😀", True),
    ("👍", "👍🏽", True),
    ("👍🏿", "👍🏽", True),
    ("❤", "I ❤️ you", True),
    ("👩‍💻", "👩🏽‍💻 at work", True),
    ("👩‍💻", "💻👩", False),
    ("iphone15", "ｉＰｈｏｎｅ１５", True),
    # nothing
    ("", "anything", False),
    ("...", "...", False),
    ("word", "", False),
]


@pytest.mark.parametrize(("query", "text", "expected"), MATCHES)
def test_a_query_matches_the_texts_that_hold_every_term(query: str, text: str, expected: bool) -> None:
    assert Query.parse(query, 3).matches(text) is expected
    assert slow_matches(Query.parse(query, 3), text) is expected


@given(hostile_text, hostile_text, st.integers(1, 6))
def test_any_query_on_any_text_does_what_the_rules_say(query: str, text: str, min_word_length: int) -> None:
    parsed = Query.parse(query, min_word_length)
    assert parsed.matches(text) is slow_matches(parsed, text)
    assert (parsed.measure(text) is not None) is parsed.matches(text)


@given(st.lists(st.sampled_from(["ab", "AB", "abc", "b", "é", "É", "手", "机", "\\u0061b", "\n", " ", '"', "*", "-"])))
def test_the_quick_look_never_changes_an_answer(parts: list[str]) -> None:
    text = "".join(parts)
    for query in ("ab", "abc b", "e", "é", "手机", '"ab abc"', "a*", text):
        parsed = Query.parse(query, 2)
        assert parsed.matches(text) is slow_matches(parsed, text)
        if parsed.matches(text):
            for ensure_ascii in (True, False):
                assert parsed.may_be_in(json.dumps({"content": text}, ensure_ascii=ensure_ascii).encode())


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])), st.text())
def test_a_line_of_json_that_may_not_match_does_not(text: str, query: str) -> None:
    for asked in (query, *tokenise(text)):
        parsed = Query.parse(asked, 3)
        if parsed.matches(text):
            for ensure_ascii in (True, False):
                assert parsed.may_be_in(json.dumps([text], ensure_ascii=ensure_ascii).encode())


def test_a_line_without_the_word_is_passed_over_unread() -> None:
    assert not Query.parse("python", 3).may_be_in(b'{"content":"I like Java"}')
    assert not Query.parse("", 3).may_be_in("ÿ".encode())


@given(hostile_text, st.integers(1, 6))
def test_every_text_is_found_by_each_of_its_words(text: str, min_word_length: int) -> None:
    for token in tokenise(text):
        assert Query.parse(token, min_word_length).matches(text)
        assert Query.parse(f'"{token}"', min_word_length).matches(text)


@given(hostile_text)
def test_every_text_is_found_by_itself(text: str) -> None:
    plain = "".join(" " if character in '"“”„«»*＂＊' else character for character in text)
    assert Query.parse(plain, 3).matches(text) is bool(tokenise(text))


@given(hostile_text, st.data())
def test_every_text_is_found_by_any_phrase_of_it(text: str, data: st.DataObject) -> None:
    tokens = tokenise(text)
    start = data.draw(st.integers(0, len(tokens)))
    stop = data.draw(st.integers(start, len(tokens)))
    phrase = Query.parse(f'"{" ".join(tokens[start:stop])}"', 3)
    assert phrase.matches(text) is (start < stop)


# --- snippets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "text", "snippet"),
    [
        ("python", "I like Python.", "I like «Python»."),
        ("like python", "I like Python. Python likes me.", "I «like» «Python». «Python» likes me."),
        ('"like python"', "I like...\n\tPython", "I «like... Python»"),
        ("pyth*", "Pythons and Python", "«Pythons» and «Python»"),
        ("cafe", "Das Cafe\u0301 am Eck", "Das «Cafe\u0301» am Eck"),
        ("strasse", "Lange Straße 5", "Lange «Straße» 5"),
        ("电影", "我喜欢看电影。", "我喜欢看«电影»。"),
        ("iPhone手机", "我的iPhone手机坏了", "我的«iPhone手机»坏了"),
        ("喜欢 欢看", "我喜欢看电影", "我«喜欢看»电影"),
        ("हिंदी", "मुझे हिंदी पसंद है", "मुझे «हिंदी» पसंद है"),
        ("👍", "ok 👍🏽!", "ok «👍🏽»!"),
        ("株式会社", "㍿です", "«㍿»です"),
        ("ﾆﾎﾝ", "ニホン", "«ニホン»"),
        ("가", "가", "«가»"),
        ("가", nfd("각가나"), nfd("각«가»나")),
        ("missing", "No such word here", "No such word here"),
        ("word", "", ""),
    ],
)
def test_a_snippet_marks_what_was_found(query: str, text: str, snippet: str) -> None:
    assert Query.parse(query, 3).snippet(text) == snippet


def test_a_snippet_of_a_long_text_shows_the_words_around_the_first_hit() -> None:
    text = " ".join(f"word{number}" for number in range(1000))
    snippet = Query.parse("word500", 3).snippet(text)
    assert snippet.startswith("…word4") and snippet.endswith("…") and " «word500» " in snippet
    assert 130 <= len(snippet) <= 165
    assert bare(snippet).strip("…") in text
    assert Query.parse("word999", 3).snippet(text).endswith("word998 «word999»")
    assert Query.parse("word0", 3).snippet(text).startswith("«word0» word1 ")
    assert Query.parse("nowhere", 3).snippet(text).startswith("word0 word1 ")


def test_a_snippet_of_chinese_text_may_begin_anywhere() -> None:
    snippet = Query.parse("电影", 3).snippet("我们都喜欢听音乐" * 50 + "电影" + "今天天气很好" * 50)
    assert snippet.startswith("…") and snippet.endswith("…") and "«电影»" in snippet
    assert len(snippet) == 160 + 4


def test_a_snippet_never_parts_a_mark_from_its_letter() -> None:
    text = "e\u0301" * 500
    snippet = Query.parse("missing", 3).snippet(text)
    assert bare(snippet).strip("…").count("e") == bare(snippet).count("\u0301") == 80
    family = "👩\u200d👩\u200d👧"
    snippet = Query.parse("missing", 3).snippet("x" + family * 100)
    assert snippet.strip("…").endswith("👧")


def test_a_snippet_of_text_without_a_gap_is_cut_somewhere() -> None:
    for character in ("a", "\u0301"):
        snippet = Query.parse("missing", 3).snippet("x" + character * 500)
        assert snippet == "x" + character * 159 + "…"


def test_hits_outside_of_a_snippet_are_not_marked() -> None:
    text = "x " * 100 + "word " + "x " * 55 + "word word " + "x " * 100
    assert Query.parse("word", 3).snippet(text).count("«word»") == 2  # of three


def test_a_hit_longer_than_a_snippet_is_cut() -> None:
    phrase = " ".join(["longer"] * 60)
    snippet = Query.parse(f'"{phrase}"', 3).snippet(f"before {phrase} after")
    assert snippet.startswith("before «longer longer") and snippet.endswith("»…")
    assert len(snippet) <= 165


@given(hostile_text, hostile_text, st.integers(20, 60))
def test_a_snippet_holds_only_the_text_and_its_marks(query: str, text: str, width: int) -> None:
    for asked in (query, *tokenise(text)[:3]):
        parsed = Query.parse(asked, 3)
        snippet = parsed.snippet(text, width)
        assert len(snippet) <= 3 * width + 2
        flat = " ".join(bare(text).split())
        core = " ".join(bare(snippet.removeprefix("…").removesuffix("…")).split())
        assert core in flat or "…" in text
        if parsed.matches(text):
            assert "«" in snippet and "»" in snippet
            if len(text) <= width:
                assert bare(snippet).split() == bare(text).split()


@given(hostile_text)
def test_what_a_snippet_marks_is_a_hit(text: str) -> None:
    text = bare(text)
    for token in tokenise(text)[:5]:
        query = Query.parse(f'"{token}"', 3)
        snippet = query.snippet(text, width=10_000)
        marked = [part.partition("»")[0] for part in snippet.split("«")[1:]]
        assert marked and all(query.matches(part) for part in marked)


# --- relevance ---------------------------------------------------------------------------------------


def ranked(query: str, texts: list[str]) -> list[str]:
    parsed = Query.parse(query, 3)
    relevance = Relevance(parsed)
    for text in texts:
        relevance.add(parsed.measure_any(text))
    scores = {text: relevance.score(parsed.measure_any(text)) for text in texts if parsed.matches(text)}
    return sorted(scores, key=lambda text: -scores[text])


FILLER = ["nothing of the kind", "something else", "and so on", "the rest is silence"]


def test_more_of_a_word_and_a_shorter_text_rank_higher() -> None:
    texts = ["python and much else in this text", "python python", "python", *FILLER]
    assert ranked("python", texts) == ["python python", "python", "python and much else in this text"]


def test_a_rare_word_weighs_more_than_a_common_one() -> None:
    texts = ["common common rare", "common rare rare", "common one", "common two", "common three", *FILLER, *"abcde"]
    assert ranked("common rare", texts)[0] == "common rare rare"


def test_a_score_is_bm25() -> None:
    query = Query.parse("python", 3)
    relevance = Relevance(query)
    for length, frequency in ((10, 2), (20, 0), (30, 0), (40, 0)):
        relevance.add(Measure(length, (frequency,)))
    idf = math.log((4 - 1 + 0.5) / (1 + 0.5))
    expected = idf * 2 * 2.2 / (2 + 1.2 * (1 - 0.75 + 0.75 * 10 / 25))
    assert relevance.score(Measure(10, (2,))) == pytest.approx(expected)


def test_a_word_in_most_texts_still_counts_a_little() -> None:
    query = Query.parse("the", 3)
    relevance = Relevance(query)
    for _ in range(10):
        relevance.add(Measure(5, (1,)))
    assert 0 < relevance.score(Measure(5, (1,))) < relevance.score(Measure(5, (2,))) < 1e-5


def test_repetitions_of_a_word_and_a_phrase_are_all_counted() -> None:
    assert Query.parse("aaa", 3).measure("aaa aaa, aaa") == Measure(3, (3,))
    assert Query.parse('"aaa aaa"', 3).measure("aaa aaa, aaa") == Measure(3, (2,))
    assert Query.parse("aa*", 2).measure("aaa aab b") == Measure(3, (2,))
    assert Query.parse("哈哈", 3).measure("哈哈哈") == Measure(3, (2,))
    assert Query.parse("aaa", 3).measure_any("") == Measure(0, (0,))
    assert Query.parse("aaa", 3).measure("b") is None
