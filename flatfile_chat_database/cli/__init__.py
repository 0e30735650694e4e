"""`chatdb`: parse, call, print.

Exit codes: 0 done, 1 a problem was found or something failed, 2 the command line or the configuration is wrong,
130 interrupted. Results go to stdout; errors, warnings and progress to stderr.
"""

from __future__ import annotations

import logging
import sys

from . import keeping as _keeping  # commands register themselves
from . import looking as _looking
from . import migrating as _migrating
from . import mirroring as _mirroring
from . import moving as _moving
from .frame import WarningHandler, cli

__all__ = ["cli", "main"]

_ = (_keeping, _looking, _migrating, _mirroring, _moving)


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
