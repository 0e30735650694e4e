"""What a scenario measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Result:
    """A table of figures with a sentence that says what was done."""

    scenario: str
    what: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    beyond: list[str] = field(default_factory=list)
    """What is beyond its limit, a sentence each; `--check` fails because of it."""

    def __str__(self) -> str:
        lines = [f"{self.scenario}: {self.what}"]
        if self.rows:
            names = list(self.rows[0])
            cells = [names, *([_text(row[name]) for name in names] for row in self.rows)]
            widths = [max(len(row[column]) for row in cells) for column in range(len(names))]
            for first, *others in cells:
                columns = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
                lines.append("  ".join(["", first.ljust(widths[0]), *columns]))
        lines += [f"  TOO SLOW: {sentence}" for sentence in self.beyond]
        return "\n".join(lines)


def _text(value: Any) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that a share (0 to 1) of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)
