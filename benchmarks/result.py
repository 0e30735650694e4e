"""What a scenario measured, and whether it is enough."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

NOT_INSTALLED = "not installed"


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure has to reach: at least or at most so much."""

    least: float | None = None
    most: float | None = None
    aim: float | None = None
    """What it should reach; to miss it is no failure."""

    def __str__(self) -> str:
        return f"≥ {self.least:,g}" if self.least is not None else f"≤ {self.most:,g}"

    def holds(self, value: float) -> bool:
        """Tell whether the figure is good enough."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def sentence(self, what: str, value: float, unit: str) -> str:
        """Say what is wrong with a figure for which the bar does not hold."""
        limit = f"at least {self.least:,g}" if self.least is not None else f"at most {self.most:,g}"
        return f"{what}: {number(value)}{unit}; it has to be {limit}{unit}."


@dataclass(frozen=True, slots=True)
class Result:
    """A table of figures with a sentence that says what was done."""

    scenario: str
    what: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    beyond: list[str] = field(default_factory=list)
    """What is beyond its limit, a sentence each; `--check` fails because of it."""
    notes: list[str] = field(default_factory=list)
    """How it was measured, a sentence each."""
    rounds: dict[str, list[float]] = field(default_factory=dict)
    """Every round of every contestant, for whoever does not trust a median."""
    rates: dict[str, float] = field(default_factory=dict)
    """What the plot shows: messages a second, by contestant."""
    missing: list[str] = field(default_factory=list)
    """Peers that are not installed here."""

    def __str__(self) -> str:
        lines = [f"{self.scenario}: {self.what}"]
        if self.rows:
            cells = self.cells()
            widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
            for first, *others in cells:
                columns = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
                lines.append("  ".join(["", first.ljust(widths[0]), *columns]).rstrip())
        lines += [f"  ({note})" for note in self.notes]
        lines += [f"  BEYOND ITS LIMIT: {sentence}" for sentence in self.beyond]
        return "\n".join(lines)

    def cells(self) -> list[list[str]]:
        """Return the table as text: names of the columns first."""
        names = list(self.rows[0])
        return [names, *([_text(row[name]) for name in names] for row in self.rows)]


class Table:
    """Gathers the rows of a scenario that compares, and what is wrong with them."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.beyond: list[str] = []
        self.missing: list[str] = []

    def compare(
        self,
        what: str,
        unit: str,
        ours: Sequence[float],
        peer: str,
        theirs: Sequence[float] | None,
        bar: Bar | None = None,
        *,
        lower_is_better: bool = False,
    ) -> None:
        """Add a row whose figure is how many times as good ours is: ratio of medians, and the range over the rounds.

        Args:
            what: What was done.
            unit: Of both figures.
            ours: A figure for each round.
            peer: With what it is compared.
            theirs: Its figure in each of the same rounds; None if it is not installed.
            bar: For the ratio.
            lower_is_better: The figures are times and not rates.
        """
        if theirs is None:
            self.missing.append(peer)
            self._add(what, unit, median(ours), peer, NOT_INSTALLED, None, "", bar)
            return
        ratios = [their / our if lower_is_better else our / their for our, their in zip(ours, theirs, strict=True)]
        middle = median(theirs) / median(ours) if lower_is_better else median(ours) / median(theirs)
        self._add(what, unit, median(ours), peer, median(theirs), middle, span(ratios), bar)
        self._judge(f"{what}, against {peer}", middle, " ×", bar)

    def relate(
        self, what: str, unit: str, ours: Sequence[float], other: str, others: Sequence[float], bar: Bar | None = None
    ) -> None:
        """Add a row whose figure is our own divided by another: how much longer, for instance."""
        ratio = median(ours) / median(others)
        ratios = [our / their for our, their in zip(ours, others, strict=True)]
        self._add(what, unit, median(ours), other, median(others), ratio, span(ratios), bar)
        self._judge(f"{what}, against {other}", ratio, " ×", bar)

    def measure(self, what: str, unit: str, ours: Sequence[float], bar: Bar | None = None) -> None:
        """Add a row whose figure is compared with nothing but its bar."""
        self._add(what, unit, median(ours), "", None, None, span(ours), bar, bar_unit=f" {unit}")
        self._judge(what, median(ours), f" {unit}", bar)

    def _add(
        self,
        what: str,
        unit: str,
        ours: float,
        peer: str,
        theirs: float | str | None,
        ratio: float | None,
        spread: str,
        bar: Bar | None,
        bar_unit: str = "",
    ) -> None:
        self.rows.append(
            {
                "what": what,
                "unit": unit,
                "ours": ours,
                "against": peer,
                "theirs": theirs,
                "ratio": ratio,
                "spread": spread,
                "bar": "" if bar is None else f"{bar}{bar_unit}",
                "aim": None if bar is None else bar.aim,
            }
        )

    def _judge(self, what: str, value: float, unit: str, bar: Bar | None) -> None:
        if bar is not None and not bar.holds(value):
            self.beyond.append(bar.sentence(what, value, unit))


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return number(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def number(value: float) -> str:
    """Return a figure with as many digits as it deserves."""
    size = abs(value)
    return f"{value:,.{0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 0.1 or not size else 4}f}"


def span(values: Sequence[float]) -> str:
    """Return the lowest and the highest."""
    return f"{number(min(values))} to {number(max(values))}"


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that a share (0 to 1) of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)
