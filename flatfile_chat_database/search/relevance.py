"""How relevant a text is to a query. No I/O."""

from __future__ import annotations

import math
from typing import Final

from .query import Measure, Query


class Relevance:
    """Okapi BM25 over the texts that were searched.

    score = Σ idf(t) · f(t) · (k1 + 1) / (f(t) + k1 · (1 - b + b · length / average length)),
    idf(t) = ln((N - n(t) + 0.5) / (n(t) + 0.5)), but at least 10⁻⁶

    where f(t) counts the term in the text, n(t) the texts that hold the term, and N all texts; lengths are numbers of
    tokens. The weights are those of SQLite's FTS5, idf's lower bound included, with the sign turned: more is better.

    S. E. Robertson, S. Walker, S. Jones, M. M. Hancock-Beaulieu, M. Gatford: Okapi at TREC-3 (1994); S. Robertson, H.
    Zaragoza: The Probabilistic Relevance Framework: BM25 and Beyond (2009); idf after K. Spärck Jones: A statistical
    interpretation of term specificity and its application in retrieval (1972).
    """

    K1: Final = 1.2
    B: Final = 0.75
    LEAST_IDF: Final = 1e-6

    def __init__(self, query: Query) -> None:
        self._texts = 0
        self._tokens = 0
        self._holding = [0] * len(query.terms)

    @classmethod
    def of(cls, query: Query, texts: int, tokens: int, holding: list[int]) -> Relevance:
        """Make one of texts that were counted elsewhere: their number, that of tokens, and of texts with each term."""
        relevance = cls(query)
        relevance._texts, relevance._tokens, relevance._holding = texts, tokens, list(holding)
        return relevance

    def add(self, measure: Measure) -> None:
        """Count a text, whether or not it matches."""
        self._texts += 1
        self._tokens += measure.length
        for place, frequency in enumerate(measure.frequencies):
            if frequency:
                self._holding[place] += 1

    def score(self, measure: Measure) -> float:
        """Return the relevance of a text among those that were counted."""
        average = self._tokens / self._texts if self._tokens else 1.0
        weight = self.K1 * (1 - self.B + self.B * measure.length / average)
        return math.fsum(
            self._idf(holding) * frequency * (self.K1 + 1) / (frequency + weight)
            for holding, frequency in zip(self._holding, measure.frequencies, strict=True)
            if frequency
        )

    def _idf(self, holding: int) -> float:
        return max(self.LEAST_IDF, math.log((self._texts - holding + 0.5) / (holding + 0.5)))
