"""Bars on a logarithmic scale, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree as Xml

from .ours import OURS
from .result import number

_WIDTH, _LABELS, _RIGHT = 900, 300, 90
_BAR, _GAP, _HEAD, _FOOT = 20, 8, 44, 34
_OURS, _OTHERS, _INK, _LINES = "#0b6e4f", "#9aa5b1", "#1f2933", "#d9dee4"
_FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


def draw(charts: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Return a picture with a chart for each title and its rates, all on one scale."""
    rates = [rate for _, chart in charts for rate in chart.values()]
    lowest = math.floor(math.log10(min(rates, default=1)))
    highest = max(math.ceil(math.log10(max(rates, default=10))), lowest + 1)
    height = sum(_HEAD + len(chart) * (_BAR + _GAP) + _FOOT for _, chart in charts) + _GAP
    picture = Xml.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {_WIDTH} {height}",
            "width": str(_WIDTH),
            "height": str(height),
            "font-family": _FONT,
            "font-size": "13",
            "role": "img",
        },
    )
    Xml.SubElement(picture, "title").text = "Messages a second, by store; the scale is logarithmic"
    _rectangle(picture, 0, 0, _WIDTH, height, "#ffffff")

    def place(rate: float) -> float:
        share = (math.log10(rate) - lowest) / (highest - lowest)
        return _LABELS + share * (_WIDTH - _LABELS - _RIGHT)

    top = 0.0
    for title, chart in charts:
        _write(picture, 16, top + 26, title[:1].upper() + title[1:], size=15, weight="600")
        bars_end = top + _HEAD + len(chart) * (_BAR + _GAP)
        for power in range(lowest, highest + 1):
            x = place(10.0**power)
            _line(picture, x, top + _HEAD - 4, bars_end)
            _write(picture, x, bars_end + 16, f"{10.0**power:,.{max(0, -power)}f}", anchor="middle", size=11)
        for row, (name, rate) in enumerate(chart.items()):
            y = top + _HEAD + row * (_BAR + _GAP)
            _write(picture, _LABELS - 10, y + 15, name, anchor="end")
            _rectangle(picture, _LABELS, y, place(rate) - _LABELS, _BAR, _OURS if name.startswith(OURS) else _OTHERS)
            _write(picture, place(rate) + 8, y + 15, number(rate), weight="600")
        top = bars_end + _FOOT
    _write(picture, _WIDTH - 16, top, "messages a second, logarithmic", anchor="end", size=11)
    Xml.indent(picture)
    return Xml.tostring(picture, encoding="unicode") + "\n"


def _rectangle(parent: Xml.Element, x: float, y: float, width: float, height: float, fill: str) -> None:
    size = {"width": f"{max(width, 1):.1f}", "height": f"{height:g}"}
    Xml.SubElement(parent, "rect", {"x": f"{x:g}", "y": f"{y:g}", **size, "fill": fill})


def _line(parent: Xml.Element, x: float, top: float, bottom: float) -> None:
    ends = {"x1": f"{x:.1f}", "x2": f"{x:.1f}", "y1": f"{top:g}", "y2": f"{bottom:g}"}
    Xml.SubElement(parent, "line", {**ends, "stroke": _LINES})


def _write(
    parent: Xml.Element, x: float, y: float, text: str, *, anchor: str = "start", size: int = 13, weight: str = "400"
) -> None:
    place = {"x": f"{x:.1f}", "y": f"{y:g}", "text-anchor": anchor}
    style = {"font-size": str(size), "font-weight": weight, "fill": _INK}
    Xml.SubElement(parent, "text", {**place, **style}).text = text
