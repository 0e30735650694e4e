"""What a database keeps of a text finds every text that matches."""

from hypothesis import given
from hypothesis import strategies as st

from flatfile_chat_database.search import MAX_WORD, Query, Term, tokenise
from flatfile_chat_database.search.lexemes import LONGEST, Lexeme, asked_for, is_exact, lexemes

ALPHABET = "ab é Ω電影看か\"'*-_\n😀ﬁß\u0300"


def holds(kept: set[str], query: Query) -> bool:
    """Tell whether a text is found, as a database does it."""
    return all(
        any(text.startswith(asked.text) for text in kept) if asked.prefix else asked.text in kept
        for asked in asked_for(query.terms)
    )


@given(st.text(ALPHABET, max_size=30), st.text(ALPHABET, max_size=8))
def test_what_matches_is_found(text: str, query: str) -> None:
    parsed = Query.parse(query, 1)
    if parsed.matches(text):
        assert holds(lexemes(tokenise(text)), parsed)


@given(st.text(ALPHABET, max_size=30), st.text(ALPHABET, max_size=8))
def test_an_exact_term_finds_nothing_else(text: str, query: str) -> None:
    for term in Query.parse(query, 1).terms:
        alone = Query([term])
        if is_exact(term):
            assert holds(lexemes(tokenise(text)), alone) == alone.matches(text)


def test_neighbouring_characters_are_asked_for_in_pairs() -> None:
    assert asked_for(Query.parse("看電影 iphone", 3).terms) == [Lexeme("看電"), Lexeme("電影"), Lexeme("iphone")]
    assert asked_for(Query.parse("電", 3).terms) == [Lexeme("電")]
    assert asked_for(Query.parse('"the 電 影 end" wor*', 3).terms) == [
        Lexeme("電影"),
        Lexeme("the"),
        Lexeme("end"),
        Lexeme("wor", prefix=True),
    ]


def test_words_that_are_too_long_are_cut_on_both_sides() -> None:
    word = "x" * MAX_WORD
    assert lexemes([word]) == {"x" * LONGEST}
    assert asked_for([Term((word,))]) == [Lexeme("x" * LONGEST)]
    assert asked_for([Term((word,), prefix=True)]) == [Lexeme("x" * LONGEST, prefix=True)]
    assert not is_exact(Term((word,)))
    assert max(len(text.encode()) for text in lexemes(["\U00020000" * MAX_WORD])) <= 2046
