"""What an import did: every message counted once, and why something was skipped."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

_EXAMPLES = 5  # of each reason


class Part(StrEnum):
    """What a skip concerns."""

    LINE = "line"
    CONVERSATION = "conversation"
    MESSAGE = "message"


@dataclass(frozen=True, slots=True)
class Skip:
    """Something that is not imported."""

    line: int
    """Of the source, from 1."""
    part: Part
    reason: str
    """The same words for the same reason; skips are counted by it."""
    detail: str = ""
    """What is special in this case."""
    messages: int = 0
    """How many messages are lost by it."""
    limit_name: str = ""
    """The setting to raise, when a limit is the reason."""


@dataclass(slots=True)
class Tally:
    """All skips of one reason."""

    part: Part
    count: int = 0
    messages: int = 0
    limit_name: str = ""
    examples: list[Skip] = field(default_factory=list)
    """The first few."""


@dataclass(slots=True)
class Report:
    """What an import did or, with `dry_run`, would do.

    Every message that was read is counted once: added, already there, or skipped.
    """

    dry_run: bool = False
    conversations: int = 0
    """That were read, whatever became of them."""
    sessions_added: int = 0
    added: int = 0
    """Messages."""
    already_there: int = 0
    """Messages that an earlier import has added."""
    skipped: dict[str, Tally] = field(default_factory=dict)
    """By reason, in the order of their first case."""

    @property
    def messages_skipped(self) -> int:
        """Return how many messages of known number were skipped."""
        return sum(tally.messages for tally in self.skipped.values())

    @property
    def messages(self) -> int:
        """Return how many messages were read."""
        return self.added + self.already_there + self.messages_skipped

    def skip(self, skip: Skip) -> None:
        """Count a skip, and keep it if it is one of the first of its reason."""
        tally = self.skipped.setdefault(skip.reason, Tally(skip.part, limit_name=skip.limit_name))
        tally.count += 1
        tally.messages += skip.messages
        # Conversations that are stored at once may fail out of order.
        tally.examples = sorted([*tally.examples, skip], key=lambda example: example.line)[:_EXAMPLES]
