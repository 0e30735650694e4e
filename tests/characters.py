"""Characters to try one by one."""

import sys
import unicodedata


def characters() -> list[str]:
    """Return every character that has a meaning, and some of the million that have none: one is as good as another."""
    return [
        character
        for code, character in enumerate(map(chr, range(sys.maxunicode + 1)))
        if code % 97 == 0 or unicodedata.category(character) not in ("Cn", "Co")
    ]
