"""What becomes of each message of a conversation, given what its session holds of it already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .. import codec
from ..errors import ValidationError
from ..models import Message
from .conversation import Conversation, position_of
from .report import Part, Skip

DIFFERS = "the conversation differs from the one that was imported before"
LATE = "the message would come after its successors: delete the session and import again"


@dataclass(slots=True)
class Plan:
    """What to do with the messages of a conversation; each is counted once."""

    new: list[Message] = field(default_factory=list)
    """To append, in order."""
    already_there: int = 0
    skips: list[Skip] = field(default_factory=list)


def plan(conversation: Conversation, stored: Mapping[str, Message]) -> Plan:
    """Decide which messages follow those that an earlier import has stored, by their ids.

    A log only grows at its end, and an id says no more than where a message stands in a conversation of that name. So a
    message whose successor is stored already stays out, and if one that is stored is another than the source's, then
    this is another conversation, or an edited one, and nothing of it is appended to the stored one.
    """
    made = Plan()
    last = max((position_of(name) for name in stored), default=-1)
    different: list[int] = []
    for message in conversation.messages:
        position = position_of(message.id)
        known = stored.get(message.id)
        try:
            line = codec.encode_message(codec.check_message(message))
        except ValidationError:
            line = None  # the store says why when it is asked to append it
        if known is not None:
            if line is not None and codec.same_message(codec.encode_message(known), line):
                made.already_there += 1
            else:
                different.append(position)
        elif position < last and line is not None:
            made.skips.append(Skip(conversation.line, Part.MESSAGE, LATE, f"message {position + 1}", 1))
        else:
            made.new.append(message)
    if different:
        left = len(conversation.messages) - made.already_there
        detail = f"message {different[0] + 1} is not the one in {conversation.session_id}"
        return Plan([], made.already_there, [Skip(conversation.line, Part.CONVERSATION, DIFFERS, detail, left)])
    return made
