"""`chatdb`: parse, call, print.

Exit codes: 0 done, 1 a problem was found or something failed, 2 the command line or the configuration is wrong,
130 interrupted. Results go to stdout; errors, warnings and progress to stderr.
"""

from __future__ import annotations

import logging
import sys

from . import keeping, looking, migrating, mirroring, moving, tables  # noqa: F401 - commands register themselves
from .frame import WarningHandler, cli

__all__ = ["cli", "main"]


def main() -> None:
    """Run `chatdb` with the arguments of the process."""
    # A terminal that cannot show a character is no reason to fail.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logger = logging.getLogger("flatfile_chat_database")
    logger.addHandler(WarningHandler())
    logger.propagate = False
    cli(prog_name="chatdb")
