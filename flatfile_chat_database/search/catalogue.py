"""The catalogue of a user's sessions in an index: which there are, and when each was updated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import sqlite3


class Listed(msgspec.Struct, frozen=True, array_like=True):
    """A session as the catalogue has it."""

    session_id: str
    updated: int
    """In microseconds since 1970; see `models.microseconds`."""
    damaged: bool = False
    """Whether its document cannot be read; it counts, and is not listed."""


def replace(connection: sqlite3.Connection, sessions: Iterable[Listed]) -> None:
    """Make the catalogue anew."""
    connection.execute("DELETE FROM sessions")
    put(connection, sessions)


def put(connection: sqlite3.Connection, sessions: Iterable[Listed]) -> None:
    """Enter sessions, or what is new of them."""
    connection.executemany(
        "INSERT OR REPLACE INTO sessions VALUES (?, ?, ?)",
        ((each.session_id, each.updated, each.damaged) for each in sessions),
    )


def remove(connection: sqlite3.Connection, session_ids: Iterable[str]) -> None:
    """Take out sessions that are gone."""
    connection.executemany("DELETE FROM sessions WHERE session_id = ?", ((each,) for each in session_ids))


class Page(msgspec.Struct, frozen=True):
    """Sessions as the catalogue has them, of one moment."""

    sessions: list[Listed]
    """The most recently updated first, without those that are damaged."""
    damaged: bool
    """Whether there are damaged ones, on this page or elsewhere."""
    version: int
    """Of the catalogue; see `noted`."""


def page(connection: sqlite3.Connection, limit: int | None, offset: int) -> Page:
    """Return a page of the sessions that can be listed."""
    rows = connection.execute(
        "SELECT session_id, updated FROM sessions WHERE NOT damaged ORDER BY updated DESC, session_id DESC "
        "LIMIT ? OFFSET ?",
        (-1 if limit is None else min(limit, 2**62), min(offset, 2**62)),
    ).fetchall()
    damaged = connection.execute("SELECT EXISTS (SELECT 1 FROM sessions WHERE damaged)").fetchone()[0]
    known = noted(connection)
    return Page([msgspec.convert(row, Listed) for row in rows], bool(damaged), -1 if known is None else known[1])


def count(connection: sqlite3.Connection) -> int:
    """Return the number of sessions, damaged ones too."""
    found: int = connection.execute("SELECT count(*) FROM sessions").fetchone()[0]
    return found


def noted(connection: sqlite3.Connection) -> tuple[str, int] | None:
    """Return the cursor up to which the catalogue is right, and a number that grows with each change of it."""
    values = dict(connection.execute("SELECT name, value FROM meta WHERE name IN ('listed', 'listed_version')"))
    if "listed" not in values:
        return None
    return msgspec.convert((values["listed"], values.get("listed_version")), tuple[str, int])


def note(connection: sqlite3.Connection, cursor: str | None) -> None:
    """Note that the catalogue was changed, and up to which cursor it is right now; None: up to the same."""
    before = noted(connection)
    version = 0 if before is None else before[1] + 1
    values = [("listed_version", version)] + ([] if cursor is None else [("listed", cursor)])
    connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", values)
