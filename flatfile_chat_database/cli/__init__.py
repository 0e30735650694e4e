"""`chatdb`: parse, call, print.

Exit codes: 0 done, 1 a problem was found or something failed, 2 the command line or the configuration is wrong,
130 interrupted. Results go to stdout; errors, warnings and progress to stderr.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .commands import cli

__all__ = ["cli", "main"]


def main() -> None:
    """Run `chatdb` with the arguments of the process."""
    try:
        from .commands import run  # not above: it takes a moment, and may be interrupted
    except KeyboardInterrupt:
        sys.stderr.write("chatdb: Interrupted.\n")
        sys.exit(130)
    run()


def __getattr__(name: str) -> Any:
    if name != "cli":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .commands import cli

    return cli
