"""All commands, and what is set up before one of them runs."""

from __future__ import annotations

import logging
import sys

from . import keeping, looking, migrating, mirroring, moving, tables  # noqa: F401 - commands register themselves
from .frame import WarningHandler, cli

__all__ = ["cli", "run"]


def run() -> None:
    """Run `chatdb` with the arguments of the process."""
    # A terminal that cannot show a character is no reason to fail.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logger = logging.getLogger("flatfile_chat_database")
    logger.addHandler(WarningHandler())
    logger.propagate = False
    cli(prog_name="chatdb")
