"""What a search query means: which texts match it, and what is shown of them. No I/O.

These rules are final. An index may answer faster; it must answer the same. What texts and queries are made of is in
`tokens.py`; how relevant a match is, in `relevance.py`.

Queries. The query is normalised like a text. In it,

- text between two quotation marks (any of `"` `“` `”` `„` `«` `»`, in full width too) is a phrase: its tokens must
  stand in the text one directly after the other, whole and in that order. Quotation marks pair in the order they come;
  the last of an odd number only separates, and so does a pair without a token between;
- outside of quotation marks, a word with `*` directly behind it is a prefix: a word of the text begins with it;
- any other word must be a word of the text;
- neighbouring CJK characters are a run, and so are neighbouring symbols: a phrase each. `iPhone手机` is the word
  `iphone` and the run `手机`;
- everything else separates. There are no operators: AND, OR, NEAR, `-`, `:` and `^` are text like any other.

Words, prefixes, phrases and runs are the terms of the query. A word or prefix outside of quotation marks that is
shorter than `min_word_length` characters, normalised, is ignored if a word or prefix that is not, a phrase or a CJK run
stands beside it. Of a phrase or run the first `MAX_PHRASE` tokens count; repeated terms count once, and the first
`MAX_TERMS` count. A text matches if it holds every term, anywhere; nothing matches a query without terms.

Between the tokens of a phrase any separators may stand, line breaks too: a record's text is all of its strings, one a
line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Final

import msgspec

from ..errors import ValidationError
from .excerpt import SNIPPET_WIDTH, excerpt, token_spans, word_spans
from .tokens import KINDS, MAX_WORD, normalise, split, tokenise

MAX_TERMS: Final = 100
"""Terms of a query that count, so that a pasted book is a query like any other."""

MAX_PHRASE: Final = 100
"""Tokens of a phrase or run that count."""

_QUOTATION_MARK = re.compile('["“”„«»]')


class Term(msgspec.Struct, frozen=True):
    """Something that a text must hold: consecutive tokens, the only one of which may be a prefix."""

    tokens: tuple[str, ...]
    prefix: bool = False

    @property
    def needle(self) -> str:
        """What to look for in lined-up tokens."""
        return " " + " ".join(self.tokens) + ("" if self.prefix else " ")


class Measure(msgspec.Struct, frozen=True):
    """What the relevance of a text depends on."""

    length: int
    """Number of tokens."""
    frequencies: tuple[int, ...]
    """How often each term of the query occurs, in the order of its terms."""


class Query:
    """A parsed query. The module's docstring has the rules."""

    __slots__ = ("_needles", "_tokens", "terms")

    def __init__(self, terms: Iterable[Term]) -> None:
        """Keep terms in their order; repeated ones, and those after `MAX_TERMS`, do not count."""
        self.terms = tuple(dict.fromkeys(terms))[:MAX_TERMS]
        self._needles = tuple(term.needle for term in self.terms)
        # The longest is the rarest, as a rule, so most texts fail at the first.
        self._tokens = tuple(sorted({token for term in self.terms for token in term.tokens}, key=len, reverse=True))

    @classmethod
    def parse(cls, text: str, min_word_length: int) -> Query:
        """Read a query; any string is one.

        Raises:
            ValidationError: `text` is no string.
        """
        if not isinstance(text, str):
            raise ValidationError(f"query must be a string, not {type(text).__name__}.")
        short: set[Term] = set()
        terms: dict[Term, None] = {}  # in order
        sufficient = False  # whether some term lets the short ones be ignored
        for kind, term in _terms(normalise(text)):
            if kind == "word" and len(term.tokens[0]) < min_word_length:
                if term not in terms:  # as a phrase it counts
                    short.add(term)
                    terms[term] = None
                continue
            short.discard(term)
            terms[term] = None
            sufficient = sufficient or kind != "symbol"
            if sufficient and len(terms) - len(short) >= MAX_TERMS:
                break
        return cls(term for term in terms if not (sufficient and term in short))

    def __repr__(self) -> str:
        return f"<Query {' '.join(''.join((repr(' '.join(t.tokens)), '*' * t.prefix)) for t in self.terms)}>"

    def __bool__(self) -> bool:
        """Whether there is anything to look for."""
        return bool(self.terms)

    def matches(self, text: str) -> bool:
        """Tell whether `text` holds every term."""
        return self._lined_up(text) is not None

    def measure(self, text: str) -> Measure | None:
        """Return what the relevance of a text depends on, or None if it does not match."""
        lined_up = self._lined_up(text)
        return None if lined_up is None else self._measure(lined_up)

    def measure_any(self, text: str) -> Measure:
        """Return the same also for a text that does not match, for `Relevance.add`."""
        return self._measure(_line_up(tokenise(text)))

    def frequencies(self, tokens: str) -> tuple[int, ...]:
        """Return how often each term occurs in a text, of whose tokens `tokens` is made, with a space between."""
        lined_up = f" {tokens} "
        return tuple([_count(needle, lined_up) for needle in self._needles])

    def may_be_in(self, line: bytes) -> bool:
        """Tell whether the JSON in `line` may hold a string that matches; False is certain, and quickly found.

        Only text that is ASCII and spells no character as `\\u…` shows its words at once. Other escapes, such as `\\n`,
        may put a letter before a word but take none away.
        """
        if b"\\u" in line or not line.isascii():
            return bool(self.terms)
        normal = line.lower().decode("ascii")
        return bool(self.terms) and all(token in normal for token in self._tokens)

    def _lined_up(self, text: str) -> str | None:
        """Return the lined-up tokens of a text that matches."""
        if not self.terms:
            return None
        normal = normalise(text)
        # A token is always a part of the normalised text, which is much quicker to look at than to take apart.
        for token in self._tokens:
            if token not in normal:
                return None
        lined_up = _line_up(split(normal))
        return lined_up if all(needle in lined_up for needle in self._needles) else None

    def _measure(self, lined_up: str) -> Measure:
        length = lined_up.count(" ") - 1 if len(lined_up) > 2 else 0
        return Measure(length, tuple(_count(needle, lined_up) for needle in self._needles))

    # --- snippets ------------------------------------------------------------------------------------

    def snippet(self, text: str, width: int = SNIPPET_WIDTH) -> str:
        """Return an excerpt around the first hit, on one line, every hit between `«` and `»`.

        `…` stands where text was cut off. A text without a hit gives its beginning.
        """
        return excerpt(text, self._hits(text, width), width)

    def _hits(self, text: str, width: int) -> list[tuple[int, int]]:
        """Return where the first hit is, and every other that begins within `width` characters of it.

        The first is the one whose last token comes first.
        """
        if len(self.terms) == 1 and text.isascii():
            [term] = self.terms
            if len(term.tokens) == 1 and not term.prefix and len(term.tokens[0]) < MAX_WORD:
                return word_spans(term.tokens[0], text.lower())
        by_last: dict[str, list[Term]] = {}
        for term in self.terms:
            by_last.setdefault("" if term.prefix else term.tokens[-1], []).append(term)
        prefixes = by_last.pop("", [])
        longest = max((len(term.tokens) for term in self.terms), default=0)
        tokens: list[str] = []
        spans: list[tuple[int, int]] = []
        hits: list[tuple[int, int]] = []
        beyond = 0
        for token, start, end in token_spans(text):
            tokens.append(token)
            spans.append((start, end))
            for term in by_last.get(token, ()):
                count = len(term.tokens)
                if tuple(tokens[-count:]) == term.tokens:
                    hits.append((spans[-count][0], end))
            if prefixes and any(token.startswith(term.tokens[0]) for term in prefixes):
                hits.append((start, end))
            if hits and start > hits[0][1] + width:
                beyond += 1
                if beyond >= longest:
                    break
        return hits


def _terms(normal: str) -> Iterator[tuple[str, Term]]:
    """Yield the terms of a normalised query, each with its kind."""
    parts = _QUOTATION_MARK.split(normal)
    for place, part in enumerate(parts):
        if place % 2 and place < len(parts) - 1:
            if tokens := split(part):
                yield "phrase", Term(tuple(tokens[:MAX_PHRASE]))
        else:
            yield from _loose_terms(part)


def _loose_terms(part: str) -> Iterator[tuple[str, Term]]:
    """Yield the terms outside of quotation marks."""
    word = ""
    for kind, characters in groupby(part, key=KINDS.__getitem__):
        if word:
            yield "word", Term((word,), prefix=kind == "star")
            word = ""
        if kind == "word":
            word = "".join(characters)[:MAX_WORD]
        elif kind in ("cjk", "symbol"):
            yield kind, Term(tuple(characters)[:MAX_PHRASE])
    if word:
        yield "word", Term((word,))


def _line_up(tokens: Iterable[str]) -> str:
    """Return tokens as one string, with a space before, between and after them, in which terms can be looked for."""
    return f" {' '.join(tokens)} "


def _count(needle: str, lined_up: str) -> int:
    """Count how often a term stands in lined-up tokens; neighbours share the space between them."""
    count = 0
    place = lined_up.find(needle)
    while place >= 0:
        count += 1
        place = lined_up.find(needle, place + 1)
    return count
