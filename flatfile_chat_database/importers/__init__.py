"""Importers: other systems' conversations become sessions of a user.

A format is a module of this package with a function `read` (see `Reader`), which is plain, blocking code that knows
nothing of the store. Every id it makes is a function of the source alone, so an import that is run again adds nothing,
and one that was killed is completed by the next.
"""

from .conversation import UNDATED, Conversation, message_id_of, session_id_of
from .report import Part, Report, Skip, Tally
from .run import FORMATS, Reader, import_file, reader
from .source import Source

__all__ = [
    "FORMATS",
    "UNDATED",
    "Conversation",
    "Part",
    "Reader",
    "Report",
    "Skip",
    "Source",
    "Tally",
    "import_file",
    "message_id_of",
    "reader",
    "session_id_of",
]
