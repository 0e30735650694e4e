"""Generated conversations with the statistics of real ones, the same on every machine for a seed.

Modelled on task dialogues between people and assistants: 12,174 conversations with 223,756 messages, 4 to 40 in each,
in turn by user and assistant; the length of a message is log-normal (median 40 characters, one in twenty over 115);
words follow Zipf's law as Mandelbrot refined it, the most frequent one standing in about a third of all messages. The
words themselves are invented, the frequent ones short, so nothing here was written by anybody.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CONVERSATIONS = 12_174
MESSAGES = 223_756
"""In all those conversations."""

ROLES = ("user", "assistant")

_VOCABULARY = 30_000
_POOL = 1 << 19  # words drawn once; a message is a run of them from a random place, which is ten times as fast
_CHARACTERS_A_WORD = 5.1  # with the space behind it
_MEDIAN_CHARACTERS, _SIGMA, _MOST_CHARACTERS = 40, 0.64, 450
_FEWEST_PAIRS, _MOST_PAIRS, _PAIRS_DEVIATION = 2, 20, 2.76
_SYLLABLES = tuple(
    start + vowel + end
    for start in ("", "b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "w")
    for vowel in "aeiou"
    for end in ("", "n", "r", "s", "t")
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """One generated conversation."""

    id: str
    texts: list[str]

    def line(self) -> str:
        """Return it as a line of OpenAI chat-completions JSONL."""
        messages = [{"role": role, "content": text} for role, text in zip(itertools.cycle(ROLES), self.texts)]
        return json.dumps({"id": self.id, "messages": messages}) + "\n"


class Texts:
    """An endless stream of texts."""

    def __init__(self, seed: int = 1) -> None:
        self._random = random.Random(seed)
        words = vocabulary()
        # Zipf-Mandelbrot: the share of the word at a rank is 1 / (rank + 2.7) ** 1.07.
        weights = itertools.accumulate((rank + 2.7) ** -1.07 for rank in range(1, len(words) + 1))
        self._pool = self._random.choices(words, cum_weights=list(weights), k=_POOL)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        characters = min(_MOST_CHARACTERS, _MEDIAN_CHARACTERS * math.exp(self._random.gauss(0, _SIGMA)))
        count = max(1, round(characters / _CHARACTERS_A_WORD))
        start = int(self._random.random() * (_POOL - count))
        return " ".join(self._pool[start : start + count])

    def take(self, count: int) -> list[str]:
        """Return the next `count` texts."""
        return list(itertools.islice(self, count))


def vocabulary() -> list[str]:
    """Return the words, the most frequent first."""
    # Not random: all words of one syllable, then of two and more, each length in an order that mixes the sounds.
    words: dict[str, None] = {}
    for syllables in itertools.count(1):
        size = len(_SYLLABLES) ** syllables
        step = int(size * 0.618) | 1
        while math.gcd(step, size) != 1:
            step += 2
        for number in range(min(size, _VOCABULARY)):
            place, parts = number * step % size, []
            for _ in range(syllables):
                place, syllable = divmod(place, len(_SYLLABLES))
                parts.append(_SYLLABLES[syllable])
            words["".join(parts)] = None
            if len(words) == _VOCABULARY:
                return list(words)
    raise AssertionError("unreachable: the count of syllables has no end")


def conversations(count: int = CONVERSATIONS, messages: int | None = None, seed: int = 1) -> Iterator[Conversation]:
    """Yield `count` conversations with `messages` messages in all (default: as many for each as in the whole)."""
    if messages is None:
        messages = 2 * round(count * MESSAGES / CONVERSATIONS / 2)
    texts = Texts(seed)
    for number, pairs in enumerate(_pairs(count, messages // 2, seed)):
        yield Conversation(f"conversation-{number:05}", texts.take(2 * pairs))


def _pairs(count: int, total: int, seed: int) -> list[int]:
    """Return how many pairs of messages each conversation has."""
    numbers = random.Random(seed)
    mean = total / count
    if not _FEWEST_PAIRS <= mean <= _MOST_PAIRS:
        raise ValueError(f"{count} conversations cannot have {2 * total} messages")
    pairs = [min(_MOST_PAIRS, max(_FEWEST_PAIRS, round(numbers.gauss(mean, _PAIRS_DEVIATION)))) for _ in range(count)]
    missing = total - sum(pairs)
    while missing:
        place, step = numbers.randrange(count), 1 if missing > 0 else -1
        if _FEWEST_PAIRS <= pairs[place] + step <= _MOST_PAIRS:
            pairs[place] += step
            missing -= step
    return pairs


def write_conversations(path: Path, count: int = CONVERSATIONS) -> int:
    """Write a file to import; return how many messages it holds."""
    messages = 0
    with path.open("w", encoding="utf-8") as file:
        for conversation in conversations(count):
            file.write(conversation.line())
            messages += len(conversation.texts)
    return messages
