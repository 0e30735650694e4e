"""Searching: what a query means, and the derived index that answers it without reading everything.

What a query means needs tables of characters, which would slow down every start, so it is imported when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .excerpt import SNIPPET_WIDTH
    from .query import MAX_PHRASE, MAX_TERMS, Measure, Query, Term
    from .relevance import Relevance
    from .tokens import MAX_WORD, normalise, tokenise

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

_MODULES = {
    "MAX_WORD": "tokens",
    "SNIPPET_WIDTH": "excerpt",
    "Relevance": "relevance",
    "normalise": "tokens",
    "tokenise": "tokens",
}
"""Where names are that are not in `query.py`."""


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(importlib.import_module(f".{_MODULES.get(name, 'query')}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
