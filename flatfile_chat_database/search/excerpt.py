"""What is shown of a text: an excerpt around the first of the places that were looked for. No I/O."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Final

from .tokens import (
    IGNORED,
    IGNORED_CHARACTERS,
    KINDS,
    MAX_WORD,
    VOICING,
    Kind,
    character_class,
    combining_marks,
    normalise,
)

SNIPPET_WIDTH: Final = 160
"""Characters of text in a snippet, about."""

_OPEN, _CLOSE, _CUT = "«", "»", "…"
_ASCII_WORD = re.compile("[a-z0-9]+")


def excerpt(text: str, hits: Sequence[tuple[int, int]], width: int) -> str:
    """Return about `width` characters around the first hit, on one line, every hit between `«` and `»`.

    `…` stands where text was cut off. A text without a hit gives its beginning.
    """
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


# --- places in the original text ---------------------------------------------------------------------


@functools.cache
def _going_on() -> re.Pattern[str]:
    """Return a pattern of characters that cannot be normalised without what is before them; 30 ms, so not on import.

    What begins with any other character has a normal form of its own, which neither joins nor marks what is before it.
    """
    marks = combining_marks().characters
    is_mark = re.compile(f"[{marks}]").match
    joining = {chr(code) for code in range(0x1160, 0x1200)}  # letters that compose with the one before
    decomposable = []
    for code in range(0x20000):
        if decomposition := unicodedata.decomposition(chr(code)).split():
            decomposable.append(code)
            if len(decomposition) == 2 and decomposition[0][0] != "<":
                joining.add(chr(int(decomposition[1], 16)))

    def goes_on(character: str) -> bool:
        first = IGNORED_CHARACTERS.sub("", unicodedata.normalize("NFKD", character))[:1]
        return first == "" or first in joining or is_mark(first) is not None

    codes = {code for code in decomposable if goes_on(chr(code))} | {ord(character) for character in joining}
    return re.compile(f"[{IGNORED}{VOICING}{marks}{character_class(sorted(codes))}]")


@functools.cache
def _cluster() -> re.Pattern[str]:
    """Return a pattern that cuts text into pieces that can be normalised one by one."""
    return re.compile(f"(?s:.){_going_on().pattern}*")


def _normal_pieces(cluster: str) -> tuple[tuple[Kind, str], ...]:
    """Return the runs of one kind in what a cluster becomes; single-character tokens one by one."""
    pieces: list[tuple[Kind, str]] = []
    for kind, characters in groupby(normalise(cluster), key=KINDS.__getitem__):
        if kind in ("cjk", "symbol"):
            pieces += [(kind, character) for character in characters]
        else:
            pieces.append((kind, "".join(characters)))
    return tuple(pieces)


_known_pieces = functools.lru_cache(maxsize=8192)(_normal_pieces)


def token_spans(text: str) -> Iterator[tuple[str, int, int]]:
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


def word_spans(word: str, text: str) -> list[tuple[int, int]]:
    """Return where a word that is not too long is in normalised ASCII text, in a tenth of the time of `token_spans`."""
    found = []
    start = text.find(word)
    while start >= 0:
        end = start + len(word)
        if not (text[end : end + 1].isalnum() or (start and text[start - 1].isalnum())):
            found.append((start, end))
        start = text.find(word, end)
    return found
