"""Other ways to store messages, each used as its own documentation shows: one module a peer."""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from .contestant import Contestant

__all__ = ["PEERS", "SERVED", "Contestant", "Peer", "open_peer", "open_served"]


@dataclass(frozen=True, slots=True)
class Peer:
    """Where to find one."""

    module: str
    name: str
    """Of the class."""
    distribution: str = ""
    """The package that has to be installed; empty if Python is enough."""

    @property
    def is_installed(self) -> bool:
        """Whether it can be measured here."""
        try:
            return not self.distribution or bool(importlib.metadata.version(self.distribution))
        except importlib.metadata.PackageNotFoundError:
            return False


PEERS = {
    "raw sqlite3": Peer("sqlite", "Raw"),
    "raw sqlite3, synchronous=NORMAL": Peer("sqlite", "RawNormal"),
    "sqlite3 through asyncio.to_thread": Peer("sqlite", "Threaded"),
    "OpenAI Agents SQLiteSession": Peer("openai_agents", "OpenAIAgents", "openai-agents"),
    "LangChain FileChatMessageHistory": Peer("langchain", "LangChain", "langchain-community"),
    "Agent Framework FileHistoryProvider": Peer("agent_framework", "AgentFramework", "agent-framework-core"),
    "plain system calls (floor)": Peer("system_calls", "SystemCalls"),
    "asyncio and those calls, without a store": Peer("bare_asyncio", "BareAsyncio"),
}

SERVED = {
    "psycopg, one INSERT and COMMIT each": Peer("postgres", "Raw", "psycopg"),
    "OpenAI Agents SQLAlchemySession": Peer("openai_sqlalchemy", "OpenAISQLAlchemy", "openai-agents"),
    "ADK DatabaseSessionService": Peer("google_adk", "GoogleADK", "google-adk"),
}
"""Those that need a PostgreSQL."""


def open_peer(name: str, folder: Path, sessions: int) -> Contestant | None:
    """Open a peer on a new folder of its own, with so many sessions; None if it is not installed."""
    return _open(PEERS[name], folder, sessions)


def open_served(name: str, folder: Path, sessions: int, url: str) -> Contestant | None:
    """Open a peer on an empty database of PostgreSQL; None if it is not installed."""
    return _open(SERVED[name], folder, sessions, url)


def _open(peer: Peer, folder: Path, sessions: int, *more: str) -> Contestant | None:
    if not peer.is_installed:
        return None
    place = folder / peer.name
    place.mkdir()
    kind = getattr(importlib.import_module(f".{peer.module}", __package__), peer.name)
    contestant = kind(place, sessions, *more)
    assert isinstance(contestant, Contestant)
    return contestant
