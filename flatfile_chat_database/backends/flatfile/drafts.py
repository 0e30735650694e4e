"""The steps of a plan with the bytes that each writes, before they are in the journal."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ..writer import Job
from .journal import Op, Step


class Draft(msgspec.Struct, eq=False):
    """A step, and the bytes it writes."""

    op: Op
    key: str
    pieces: Sequence[bytes] = ()
    at: int = 0
    source: str = ""
    was: str | None = None
    before: int = -1
    staged: bool = False
    """install: whether the finished file was made by the plan, and goes with it."""
    job: Job | None = None
    """Whose it is."""


def steps_of(drafts: Sequence[Draft]) -> tuple[list[Step], list[bytes]]:
    """Return the steps of drafts, and the bytes of each; what is appended to one log becomes one step."""
    if len(drafts) == 1:
        data = b"".join(drafts[0].pieces)
        return [_step(drafts[0], data)], [data]
    merged: list[tuple[Draft, list[bytes]]] = []
    appended: dict[str, list[bytes]] = {}
    for draft in drafts:
        pieces = list(draft.pieces)
        if draft.op == "append" and (earlier := appended.setdefault(draft.key, pieces)) is not pieces:
            earlier += pieces
        else:
            merged.append((draft, pieces))
    parts = [pieces[0] if len(pieces) == 1 else b"".join(pieces) for _, pieces in merged]
    return [_step(draft, data) for (draft, _), data in zip(merged, parts, strict=True)], parts


def _step(draft: Draft, data: bytes) -> Step:
    if draft.op == "append":
        return Step("append", draft.key, len(data), draft.at)
    return Step(draft.op, draft.key, len(data), draft.at, draft.source, draft.was, draft.before)
