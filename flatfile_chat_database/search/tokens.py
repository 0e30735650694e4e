"""What texts and queries are compared as: one form of text, and tokens of it. No I/O.

These rules are final, like those of `query.py`.

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

Characters have the properties that this Python's `unicodedata` gives them, but for the ranges of CJK, which are listed
here; an index should remember `unicodedata.unidata_version` and start anew when it changes.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable
from typing import Final, Literal

import msgspec

MAX_WORD: Final = 1000
"""Characters of a word that count; the rest of what is hardly a word (base64, a run of Thai) is passed over."""

_CJK: Final = (
    "\u1100-\u11ff\ua960-\ua97c\uac00-\ud7a3\ud7b0-\ud7fb"  # Hangul
    "\u3031-\u3035\u3041-\u3096\u3099\u309a\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"  # Kana
    "\U0001aff0-\U0001affe\U0001b000-\U0001b16f"  # Kana of history
    "\u2e80-\u2fd5\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Han
    "\U00016fe2\U00016fe3\U00020000-\U0003ffff"
)
IGNORED: Final = (
    "\u00ad\u034f\u061c\u0640\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200c-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f"
    "\ufeff\ufff0-\ufff8\U0001f3fb-\U0001f3ff\U000e0000-\U000e0fff"
)
VOICING: Final = "\u3099\u309a"

_CJK_CHARACTER = re.compile(f"[{_CJK}]")
IGNORED_CHARACTERS = re.compile(f"[{IGNORED}]+")


# --- normalisation -----------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Return `text` in the form in which texts and queries are compared; doing it again changes nothing."""
    if text.isascii():
        return text.lower()
    if "™" in text or "℠" in text:
        text = text.replace("™", " ").replace("℠", " ")
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text).casefold())
    marks = combining_marks()
    if marks.suspect.search(text) is not None:
        # What joiners kept apart may have another order now that they are gone, hence NFD again.
        text = marks.dropped.sub("", unicodedata.normalize("NFD", IGNORED_CHARACTERS.sub("", text)))
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
def combining_marks() -> _Marks:
    """Gather the combining marks; 20 ms, so not on import."""
    codes = [
        code
        for code in range(0x20000)  # planes 0 and 1; the rest are variation selectors
        if unicodedata.category(chr(code))[0] == "M" and chr(code) not in VOICING
    ]
    marks = character_class(codes)
    # `re` looks at ranges beyond the BMP one by one, so one range for all of them, which leaves out emoji, comes first.
    suspect = character_class(code for code in codes if code < 0x10000) + "\U00010000-\U0001efff"
    bearer = rf"(?![\0-\u06ff{_CJK}])[^\W_]"
    dropped = f"[{suspect}](?<=[{marks}])(?<![{marks}](?s:.))(?<!{bearer}(?s:.))[{marks}]*"
    return _Marks(marks, re.compile(dropped), re.compile(f"[{IGNORED}{suspect}]"))


def character_class(codes: Iterable[int]) -> str:
    """Write code points, given in order, as the inside of a regular expression's `[…]`."""
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)


# --- tokens ------------------------------------------------------------------------------------------

Kind = Literal["word", "cjk", "symbol", "star", "separator"]


class _Kinds(dict[str, Kind]):
    """What each character of normalised text is, found out once."""

    def __missing__(self, character: str) -> Kind:
        category = unicodedata.category(character)
        kind: Kind = "separator"
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
        kind = KINDS[character]
        spaced = character if kind == "word" else f" {character} " if kind in ("cjk", "symbol") else " "
        self[code] = spaced
        return spaced


KINDS = _Kinds()
_SPACING = _Spacing()
_ASCII_SPACING: Final = bytes(
    ord(chr(code).lower()) if code < 0x80 and chr(code).isalnum() else 0x20 for code in range(256)
)


def tokenise(text: str) -> list[str]:
    """Return the tokens of a text."""
    return split(text if text.isascii() else normalise(text))


def spaced(text: str) -> str:
    """Return the tokens of a text with a space between, in two thirds of the time of putting them together."""
    if len(text) > MAX_WORD or not text.isascii():
        return " ".join(tokenise(text))
    found = text.encode().translate(_ASCII_SPACING).decode()
    while "  " in found:
        found = found.replace("  ", " ")
    return found.strip()


def count_spaced(text: str) -> int:
    """Return the number of tokens that stand in a text with a space between."""
    return text.count(" ") + 1 if text else 0


def split(normal: str) -> list[str]:
    """Return the tokens of text that is normalised, or only ASCII."""
    if normal.isascii():  # half the time of the other way, and the usual case
        tokens = normal.encode().translate(_ASCII_SPACING).decode().split()
    else:
        tokens = normal.translate(_SPACING).split()
    return tokens if len(normal) <= MAX_WORD else [token[:MAX_WORD] for token in tokens]
