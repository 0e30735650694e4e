"""What a database with a text search of its own keeps of a text, and asks for by a query. No I/O.

A lexeme is a token, cut where a database would refuse it, or two neighbouring CJK characters, for single ones are in
too many texts to find anything by. Which texts hold all lexemes of a query is therefore only a first choice, without a
gap: each of them has to be looked at with `Query.matches`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final

import msgspec

from .query import Term
from .tokens import KINDS

LONGEST: Final = 500
"""Characters of a lexeme: PostgreSQL takes 2,046 bytes (https://www.postgresql.org/docs/15/textsearch-limitations.html)."""


class Lexeme(msgspec.Struct, frozen=True):
    """Something that is asked for."""

    text: str
    prefix: bool = False
    """Whether one that begins so will do."""


def lexemes(tokens: Sequence[str]) -> set[str]:
    """Return what is kept of a text of these tokens."""
    found = {token[:LONGEST] for token in tokens}
    if not all(map(str.isascii, found)):
        found.update(_pairs(tokens))
    return found


def asked_for(terms: Iterable[Term]) -> list[Lexeme]:
    """Return what every text holds that holds these terms, without repetition."""
    found: dict[Lexeme, None] = {}
    for term in terms:
        if term.prefix:
            found[Lexeme(term.tokens[0][:LONGEST], prefix=True)] = None
            continue
        pairs = _pairs(term.tokens)
        covered = set("".join(pairs))
        for text in (*pairs, *(token[:LONGEST] for token in term.tokens if token not in covered)):
            found[Lexeme(text)] = None
    return list(found)


def is_exact(term: Term) -> bool:
    """Tell whether every text that holds what is asked for by a term holds the term."""
    return len(term.tokens) == 1 and len(term.tokens[0]) < LONGEST


def _pairs(tokens: Sequence[str]) -> list[str]:
    return [
        first + second
        for first, second in pairwise(tokens)
        if len(first) == 1 == len(second) and KINDS[first] == "cjk" == KINDS[second]
    ]
