"""What a person sees: text that cannot steer a terminal, aligned columns, times in UTC, and JSON that is safe to print.

Chats hold whatever a model or a stranger wrote. An escape sequence in it could rewrite the screen or the clipboard, and
a bidirectional control could show one thing for another, so nothing stored is printed but through this module.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence

from .errors import ValidationError
from .models import parse_timestamp

_GAP = "  "
_TAB = 4
_INDENT = "  "

# Format characters that words in some scripts and emoji are spelled with; all others are invisible and may mislead.
_JOINERS = frozenset("\u200c\u200d")


def _steers(character: str) -> bool:
    if " " <= character <= "~":
        return False
    category = unicodedata.category(character)
    return category in ("Cc", "Cs", "Zl", "Zp") or (category == "Cf" and character not in _JOINERS)


def visible(text: str) -> str:
    """Return `text` on one line, with control, bidirectional and other invisible characters as visible escapes."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(c) if _steers(c) else c for c in text)


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(character, f"\\x{code:02x}")
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def one_line(text: str) -> str:
    """Return `text` with each run of white space as one space; for titles and excerpts, where lines do not matter."""
    return visible(" ".join(text.split()))


def block(text: str) -> str:
    """Return `text` indented, with its lines kept; tabs become spaces."""
    lines = text.replace("\r\n", "\n").split("\n")
    return "\n".join((_INDENT + visible(line.expandtabs(_TAB))).rstrip() for line in lines)


def utc(timestamp: str) -> str:
    """Return a stored timestamp as a person reads it, in UTC; as it stands if it is none."""
    try:
        return f"{parse_timestamp(timestamp):%Y-%m-%d %H:%M:%S}"
    except ValidationError:
        return visible(timestamp)


def duration(seconds: float) -> str:
    """Return a length of time such as `4.2 s` or `3 min 20 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


# --- columns -------------------------------------------------------------------------------------------


def width(text: str) -> int:
    """Return how many columns of a terminal `text` takes: two for a wide character, none for a combining one."""
    if text.isascii():
        return len(text)
    return sum(_width(character) for character in text)


def _width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, columns: int) -> str:
    """Return `text` cut to `columns`, with an ellipsis where something is left out."""
    if width(text) <= columns:
        return text
    kept: list[str] = []
    used = 1  # the ellipsis
    for character in text:
        used += _width(character)
        if used > columns:
            break
        kept.append(character)
    return "".join(kept) + "…"


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), columns: int | None = None
) -> list[str]:
    """Return lines of aligned columns, the head first.

    Args:
        head: Names of the columns.
        rows: Visible text.
        right: Columns aligned to the right.
        columns: The terminal's width, to which the last column is cut.
    """
    widths = [max(width(row[index]) for row in [head, *rows]) for index in range(len(head))]
    if columns is not None:
        before = sum(widths[:-1]) + len(_GAP) * (len(widths) - 1)
        widths[-1] = min(widths[-1], max(columns - before, width(head[-1])))
    lines = []
    for row in [head, *rows]:
        cells = [cut(cell, widths[index]) for index, cell in enumerate(row)]
        for index, cell in enumerate(cells):
            blank = " " * (widths[index] - width(cell))
            cells[index] = blank + cell if index in right else cell + blank
        lines.append(_GAP.join(cells).rstrip())
    return lines


# --- JSON ----------------------------------------------------------------------------------------------


def json_line(value: object) -> str:
    """Return a JSON value on one line, in which no character steers a terminal."""
    text = json.dumps(value, ensure_ascii=False, separators=(", ", ": "))
    if text.isascii() and text.isprintable():
        return text
    # Such characters stand only inside strings, where an escape means the same.
    return "".join(json.dumps(c)[1:-1] if _steers(c) else c for c in text)
