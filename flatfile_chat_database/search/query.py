"""What a search query means: which texts match it, how they rank, and what is shown of them. No I/O.

These rules are final. An index may answer faster; it must answer the same.

Normalisation. Text is compared in one form, `normalise`:

1. `™` and `℠` become spaces, which keeps NFKC from gluing "TM" to the word before;
2. NFKC, then full case folding, so `ﬁ` is `fi`, full-width `Ａ` is `a`, `ß` is `ss`, and `ς` is `σ`;
3. what is invisible or mere decoration goes: soft hyphens, joiners, direction marks, variation selectors, tags,
   Hangul fillers, the Arabic tatweel, the skin tones of emoji. U+200B stays: it separates words;
4. combining marks (categories Mn, Mc, Me) stay only in words of scripts from U+0700 on that have words, as vowel signs
   of Hindi and Thai do. They go after every character below U+0700, once decomposed by NFD (accents of Latin, Greek and
   Cyrillic, niqqud, harakat, the hamza on a carrier), and where they stand on no letter or on a CJK character. The
   voicing marks of Kana always stay: `か` is not `が`;
5. NFC.

So letters that are no letter with an accent stay what they are: `ø`, `ł`, `đ`, and the Turkish dotless `ı`, while `İ`
becomes `i`. Russian `й` and `ё` become `и` and `е`.

Tokens. Normalised text is a sequence of tokens:

- a word is a maximal run of letters, digits and marks (categories L*, N*, M*) that are not CJK. Of a longer word only
  the first `MAX_WORD` characters count. A run of Thai, Lao, Khmer or Burmese letters is one word: these scripts do not
  separate words, and we have no dictionary;
- every Han, Kana and Hangul character is a token of its own, iteration and prolonged sound marks among them;
- every other symbol of category So, which emoji are, is a token of its own;
- everything else separates tokens and has no other meaning: punctuation, the underscore, line breaks, NUL, lone
  surrogates, private and unassigned characters.

A token holds no ASCII but `a`-`z` and `0`-`9`, so SQLite's FTS5 with its `ascii` tokenizer, given the tokens of a
text with a space between them, makes exactly these tokens again; and `MAX_WORD` characters stay far below the 32,768
bytes at which FTS5 cuts a token.

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

Relevance. See `Relevance`.

Characters have the properties that this Python's `unicodedata` gives them, but for the ranges of CJK, which are listed
here; an index should remember `unicodedata.unidata_version` and start anew when it changes.
"""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Final, Literal

import msgspec

from ..errors import ValidationError

MAX_WORD: Final = 1000
"""Characters of a word that count; the rest of what is hardly a word (base64, a run of Thai) is passed over."""

MAX_TERMS: Final = 100
"""Terms of a query that count, so that a pasted book is a query like any other."""

MAX_PHRASE: Final = 100
"""Tokens of a phrase or run that count."""

SNIPPET_WIDTH: Final = 160
"""Characters of text in a snippet, about."""

_OPEN, _CLOSE, _CUT = "«", "»", "…"

_CJK: Final = (
    "\u1100-\u11ff\ua960-\ua97c\uac00-\ud7a3\ud7b0-\ud7fb"  # Hangul
    "\u3031-\u3035\u3041-\u3096\u3099\u309a\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"  # Kana
    "\U0001aff0-\U0001affe\U0001b000-\U0001b16f"  # Kana of history
    "\u2e80-\u2fd5\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Han
    "\U00016fe2\U00016fe3\U00020000-\U0003ffff"
)
_IGNORED: Final = (
    "\u00ad\u034f\u061c\u0640\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200c-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f"
    "\ufeff\ufff0-\ufff8\U0001f3fb-\U0001f3ff\U000e0000-\U000e0fff"
)
_VOICING: Final = "\u3099\u309a"

_CJK_CHARACTER = re.compile(f"[{_CJK}]")
_IGNORED_CHARACTERS = re.compile(f"[{_IGNORED}]+")
_QUOTATION_MARK = re.compile('["“”„«»]')
_ASCII_WORD = re.compile("[a-z0-9]+")


# --- normalisation -----------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Return `text` in the form in which texts and queries are compared; doing it again changes nothing."""
    if text.isascii():
        return text.lower()
    if "™" in text or "℠" in text:
        text = text.replace("™", " ").replace("℠", " ")
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text).casefold())
    marks = _marks()
    if marks.suspect.search(text) is not None:
        # What joiners kept apart may have another order now that they are gone, hence NFD again.
        text = marks.dropped.sub("", unicodedata.normalize("NFD", _IGNORED_CHARACTERS.sub("", text)))
    return unicodedata.normalize("NFC", text)


class _Marks(msgspec.Struct, frozen=True):
    """Combining marks, those of voicing aside."""

    characters: str
    """All of them, as the inside of a regular expression's `[…]`."""
    dropped: re.Pattern[str]
    """A run of marks that goes."""
    suspect: re.Pattern[str]
    """A character that goes, or might; without one there is nothing to do."""


@functools.cache
def _marks() -> _Marks:
    """Gather the combining marks; 20 ms, so not on import."""
    codes = [
        code
        for code in range(0x20000)  # planes 0 and 1; the rest are variation selectors
        if unicodedata.category(chr(code))[0] == "M" and chr(code) not in _VOICING
    ]
    marks = _character_class(codes)
    # `re` looks at ranges beyond the BMP one by one, so one range for all of them, which leaves out emoji, comes first.
    suspect = _character_class(code for code in codes if code < 0x10000) + "\U00010000-\U0001efff"
    bearer = rf"(?![\0-\u06ff{_CJK}])[^\W_]"
    dropped = f"[{suspect}](?<=[{marks}])(?<![{marks}](?s:.))(?<!{bearer}(?s:.))[{marks}]*"
    return _Marks(marks, re.compile(dropped), re.compile(f"[{_IGNORED}{suspect}]"))


def _character_class(codes: Iterable[int]) -> str:
    """Write code points, given in order, as the inside of a regular expression's `[…]`."""
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)


# --- tokens ------------------------------------------------------------------------------------------

_Kind = Literal["word", "cjk", "symbol", "star", "separator"]


class _Kinds(dict[str, _Kind]):
    """What each character of normalised text is, found out once."""

    def __missing__(self, character: str) -> _Kind:
        category = unicodedata.category(character)
        kind: _Kind = "separator"
        if _CJK_CHARACTER.match(character):
            kind = "cjk"
        elif category[0] in "LNM":
            kind = "word"
        elif category == "So":
            kind = "symbol"
        elif character == "*":
            kind = "star"
        self[character] = kind
        return kind


class _Spacing(dict[int, str]):
    """For `str.translate`: characters of words stay, single-character tokens get spaces, separators become one."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kind = _KINDS[character]
        spaced = character if kind == "word" else f" {character} " if kind in ("cjk", "symbol") else " "
        self[code] = spaced
        return spaced


_KINDS = _Kinds()
_SPACING = _Spacing()
_ASCII_SPACING: Final = bytes(
    ord(chr(code).lower()) if code < 0x80 and chr(code).isalnum() else 0x20 for code in range(256)
)


def tokenise(text: str) -> list[str]:
    """Return the tokens of a text."""
    return _split(text if text.isascii() else normalise(text))


def _split(normal: str) -> list[str]:
    """Return the tokens of text that is normalised, or only ASCII."""
    if normal.isascii():  # half the time of the other way, and the usual case
        tokens = normal.encode().translate(_ASCII_SPACING).decode().split()
    else:
        tokens = normal.translate(_SPACING).split()
    return tokens if len(normal) <= MAX_WORD else [token[:MAX_WORD] for token in tokens]


def _line_up(tokens: Iterable[str]) -> str:
    """Return tokens as one string, with a space before, between and after them, in which terms can be looked for."""
    return f" {' '.join(tokens)} "


# --- queries -----------------------------------------------------------------------------------------


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
        lined_up = _line_up(_split(normal))
        return lined_up if all(needle in lined_up for needle in self._needles) else None

    def _measure(self, lined_up: str) -> Measure:
        length = lined_up.count(" ") - 1 if len(lined_up) > 2 else 0
        return Measure(length, tuple(_count(needle, lined_up) for needle in self._needles))

    # --- snippets ------------------------------------------------------------------------------------

    def snippet(self, text: str, width: int = SNIPPET_WIDTH) -> str:
        """Return an excerpt around the first hit, on one line, every hit between `«` and `»`.

        `…` stands where text was cut off. A text without a hit gives its beginning.
        """
        hits = self._hits(text, width)
        first = hits[0] if hits else (0, 0)
        start, end = _window(text, first, width)
        pieces = [_CUT] if start else []
        place = start
        for hit_start, hit_end in _merge(hits):
            if hit_end <= start or hit_start >= end:
                continue
            pieces += [
                text[place : max(hit_start, start)],
                _OPEN,
                text[max(hit_start, start) : min(hit_end, end)],
                _CLOSE,
            ]
            place = min(hit_end, end)
        pieces += [text[place:end], _CUT if end < len(text) else ""]
        return " ".join("".join(pieces).split())

    def _hits(self, text: str, width: int) -> list[tuple[int, int]]:
        """Return where the first hit is, and every other that begins within `width` characters of it.

        The first is the one whose last token comes first.
        """
        if len(self.terms) == 1 and text.isascii():
            [term] = self.terms
            if len(term.tokens) == 1 and not term.prefix and len(term.tokens[0]) < MAX_WORD:
                return _words(term.tokens[0], text.lower())
        by_last: dict[str, list[Term]] = {}
        for term in self.terms:
            by_last.setdefault("" if term.prefix else term.tokens[-1], []).append(term)
        prefixes = by_last.pop("", [])
        longest = max((len(term.tokens) for term in self.terms), default=0)
        tokens: list[str] = []
        spans: list[tuple[int, int]] = []
        hits: list[tuple[int, int]] = []
        beyond = 0
        for token, start, end in _spans(text):
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
            if tokens := _split(part):
                yield "phrase", Term(tuple(tokens[:MAX_PHRASE]))
        else:
            yield from _loose_terms(part)


def _loose_terms(part: str) -> Iterator[tuple[str, Term]]:
    """Yield the terms outside of quotation marks."""
    word = ""
    for kind, characters in groupby(part, key=_KINDS.__getitem__):
        if word:
            yield "word", Term((word,), prefix=kind == "star")
            word = ""
        if kind == "word":
            word = "".join(characters)[:MAX_WORD]
        elif kind in ("cjk", "symbol"):
            yield kind, Term(tuple(characters)[:MAX_PHRASE])
    if word:
        yield "word", Term((word,))


def _count(needle: str, lined_up: str) -> int:
    """Count how often a term stands in lined-up tokens; neighbours share the space between them."""
    count = 0
    place = lined_up.find(needle)
    while place >= 0:
        count += 1
        place = lined_up.find(needle, place + 1)
    return count


# --- places in the original text ---------------------------------------------------------------------


@functools.cache
def _going_on() -> re.Pattern[str]:
    """Return a pattern of characters that cannot be normalised without what is before them; 30 ms, so not on import.

    What begins with any other character has a normal form of its own, which neither joins nor marks what is before it.
    """
    marks = _marks().characters
    is_mark = re.compile(f"[{marks}]").match
    joining = {chr(code) for code in range(0x1160, 0x1200)}  # letters that compose with the one before
    decomposable = []
    for code in range(0x20000):
        if decomposition := unicodedata.decomposition(chr(code)).split():
            decomposable.append(code)
            if len(decomposition) == 2 and decomposition[0][0] != "<":
                joining.add(chr(int(decomposition[1], 16)))

    def goes_on(character: str) -> bool:
        first = _IGNORED_CHARACTERS.sub("", unicodedata.normalize("NFKD", character))[:1]
        return first == "" or first in joining or is_mark(first) is not None

    codes = {code for code in decomposable if goes_on(chr(code))} | {ord(character) for character in joining}
    return re.compile(f"[{_IGNORED}{_VOICING}{marks}{_character_class(sorted(codes))}]")


@functools.cache
def _cluster() -> re.Pattern[str]:
    """Return a pattern that cuts text into pieces that can be normalised one by one."""
    return re.compile(f"(?s:.){_going_on().pattern}*")


def _normal_pieces(cluster: str) -> tuple[tuple[_Kind, str], ...]:
    """Return the runs of one kind in what a cluster becomes; single-character tokens one by one."""
    pieces: list[tuple[_Kind, str]] = []
    for kind, characters in groupby(normalise(cluster), key=_KINDS.__getitem__):
        if kind in ("cjk", "symbol"):
            pieces += [(kind, character) for character in characters]
        else:
            pieces.append((kind, "".join(characters)))
    return tuple(pieces)


_known_pieces = functools.lru_cache(maxsize=8192)(_normal_pieces)


def _spans(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield the tokens of a text, each with the start and the end of what it was made of."""
    if text.isascii():
        for match in _ASCII_WORD.finditer(text.lower()):
            yield match[0][:MAX_WORD], match.start(), match.end()
        return
    word: list[str] = []
    word_start = word_end = 0
    for cluster in _cluster().finditer(text):
        start, end = cluster.span()
        # A cluster may be as long as the text; only usual ones are worth remembering.
        for kind, characters in (_known_pieces if end - start < 8 else _normal_pieces)(cluster[0]):
            if kind == "word":
                if not word:
                    word_start = start
                word.append(characters)
                word_end = end
                continue
            if word:
                yield "".join(word)[:MAX_WORD], word_start, word_end
                word.clear()
            if kind in ("cjk", "symbol"):
                yield characters, start, end
    if word:
        yield "".join(word)[:MAX_WORD], word_start, word_end


def _words(word: str, text: str) -> list[tuple[int, int]]:
    """Return where a word that is not too long is in normalised ASCII text, in a tenth of the time of `_spans`."""
    found = []
    start = text.find(word)
    while start >= 0:
        end = start + len(word)
        if not (text[end : end + 1].isalnum() or (start and text[start - 1].isalnum())):
            found.append((start, end))
        start = text.find(word, end)
    return found


def _merge(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return spans in order, those that overlap or touch made one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _window(text: str, hit: tuple[int, int], width: int) -> tuple[int, int]:
    """Choose what to show of a text: a quarter of the width before the hit, cut between words where one is near."""
    if len(text) <= width:
        return 0, len(text)
    near = width // 8
    start = max(0, min(hit[0] - width // 4, len(text) - width))
    end = min(len(text), start + width)
    if start:
        gap = re.search(r"\s", text[start - 1 : min(start + near, hit[0])])
        start = start + gap.start() if gap else _between_clusters(text, start)
    if end < len(text):
        tail = text[max(end - near, min(hit[1], end)) : end + 1]
        gap = re.search(r"\s\S*\Z", tail)
        end = end + 1 - len(tail) + gap.start() if gap else _between_clusters(text, end)
    return start, end


def _between_clusters(text: str, place: int) -> int:
    """Return a place, `place` or shortly before it, that separates no mark and no joined emoji from what is before."""
    if text.isascii():
        return place
    for near in range(place, max(place - 16, 0), -1):
        if text[near - 1] != "\u200d" and not _going_on().match(text[near]):
            return near
    return place


# --- relevance ---------------------------------------------------------------------------------------


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
