"""Searching: what a query means, and the derived index that answers it without reading everything."""

from .query import (
    MAX_PHRASE,
    MAX_TERMS,
    MAX_WORD,
    SNIPPET_WIDTH,
    Measure,
    Query,
    Relevance,
    Term,
    normalise,
    tokenise,
)

__all__ = [
    "MAX_PHRASE",
    "MAX_TERMS",
    "MAX_WORD",
    "SNIPPET_WIDTH",
    "Measure",
    "Query",
    "Relevance",
    "Term",
    "normalise",
    "tokenise",
]
