"""The page about speed, docs/benchmarks.md, with its plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from . import plot
from .result import Result

PAGE, PLOT = "benchmarks.md", "benchmarks.svg"

BEFORE = """\
<!-- Written by `make bench`; run it instead of editing. -->

Measured by one run of

    make bench

on the machine below, with the peers from their released packages (`requirements-bench.lock`), each used as its own
documentation shows, with long-lived objects. What is compared takes turns (A B C, A B C …) on the same disk, with the
same texts from a generator that has the lengths and word frequencies of real conversations. The first turn warms up and
is not counted; before each turn garbage is collected and the pages of the disk are written. Figures are medians of the
turns. `ratio` is how many times as fast ours is or, where its bar is an upper one (≤), how many times as long it takes;
`spread` is the lowest and the highest of it, turn by turn, or of the figure itself where nothing is compared. Absolute
figures belong to this machine, ratios less so."""


def write(folder: Path, results: Sequence[Result], facts: Mapping[str, str]) -> None:
    """Write the page and the plot into a folder."""
    charts = [(result.what, result.rates) for result in results if result.rates]
    (folder / PLOT).write_text(plot.draw(charts), encoding="utf-8")
    (folder / PAGE).write_text(page(results, facts), encoding="utf-8")


def page(results: Sequence[Result], facts: Mapping[str, str]) -> str:
    """Return the page."""
    beyond = [sentence for result in results for sentence in result.beyond]
    parts = ["# Benchmarks", BEFORE, _table([["machine", ""], *([name, value] for name, value in facts.items())])]
    if beyond:
        parts.append("In this run, these figures were beyond their bars:")
        parts.append("\n".join(f"- {sentence}" for sentence in beyond))
    else:
        parts.append("In this run, every figure was within its bar.")
    parts.append(f"![Messages a second, by store; the scale is logarithmic]({PLOT})")
    for result in results:
        parts += [f"## {result.scenario.capitalize()}", f"{_sentence(result.what)}"]
        if result.rows:
            parts.append(_table(result.cells()))
        if result.notes:
            parts.append("\n".join(f"- {note}" for note in result.notes))
    return "\n\n".join(parts) + "\n"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _table(rows: Sequence[Sequence[str]]) -> str:
    heads, *others = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [
        heads,
        ["---", *("---:" if _is_figure(others, column) else "---" for column in range(1, len(heads)))],
        *others,
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _is_figure(rows: Sequence[Sequence[str]], column: int) -> bool:
    return any(row[column][:1].isdigit() for row in rows) and " " not in rows[0][column]
