"""Searching among a million messages of one user: building the index, finding by relevance and by time, a new message.

The peer is SQLite's FTS5 as its documentation shows it: a contentless table of the same normalised texts, `MATCH` with
`ORDER BY bm25(…) LIMIT 20` in a thread, and the same lines read from the same logs by the same backend.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from flatfile_chat_database import Message, StorageConfig, StorageManager, codec
from flatfile_chat_database.layout import Layout
from flatfile_chat_database.models import format_timestamp
from flatfile_chat_database.search import tokenise

from .result import Result, median, percentile

USER = "ada"
SHARES = {"0.05 %": 0.0005, "1 %": 0.01, "30 %": 0.3}
LIMITS_MS = {"0.05 %": 5.0, "1 %": 10.0, "30 %": 20.0}
RATIOS = {"0.05 %": 0.8, "1 %": 1.0, "30 %": 5.0}
BUILD_RATIO = 0.6
NEW_MESSAGE_MS = 10.0

_SYLLABLES = [first + second for first in "bdfghklmnprstvz" for second in "aei"]


def run(*, quick: bool) -> Result:
    """Measure milliseconds a search, messages a second of a build, and the ratio to FTS5."""
    with tempfile.TemporaryDirectory(prefix="chatdb-benchmark-") as folder:
        return asyncio.run(_measure(Path(folder), quick=quick))


async def _measure(folder: Path, *, quick: bool) -> Result:
    sessions, messages, rounds = (20, 3_000, 2) if quick else (1_000, 1_000_000, 15)
    config = StorageConfig(storage_base_path=str(folder / "store"), max_messages_per_session=10_000_000)
    async with StorageManager(config) as storage:
        await storage.create_user(USER)
        words = await asyncio.to_thread(_write, folder / "store", config, sessions, messages)
        peer = _Peer(storage, folder / "peer.sqlite3")
        await asyncio.to_thread(peer.gather, folder / "store", config, sessions)
        rows: list[dict[str, Any]] = []
        theirs, ours = [], []
        for _ in range(1 if quick else 3):
            theirs.append(await asyncio.to_thread(peer.build))
            began = time.perf_counter()
            await storage.reindex(USER)
            ours.append(time.perf_counter() - began)
        rows.append(_row("build, messages/s", messages / median(ours), messages / median(theirs), higher=True))
        for name, share in SHARES.items():
            chosen = sorted(words, key=lambda word: abs(words[word] / messages - share))[: 1 if share > 0.1 else 5]
            rows += await _searches(storage, peer, name, chosen, rounds)
        rows.append(await _new_messages(storage, 3 if quick else 100, sessions))
    what = f"{messages:,} messages of one user in {sessions:,} sessions, warm, medians; FTS5 with bm25 beside it"
    return Result("searching", what, rows, [] if quick else beyond(rows))


async def _searches(
    storage: StorageManager, peer: _Peer, name: str, words: list[str], rounds: int
) -> list[dict[str, Any]]:
    ways: dict[str, Callable[[str], Awaitable[Any]]] = {
        "fts5": peer.search,
        "relevance": lambda word: storage.search(word, user_id=USER, order="relevance"),
        "time": lambda word: storage.search(word, user_id=USER),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 2):
        for word in words:
            for way, search in ways.items():  # interleaved, so that what slows the machine slows all
                began = time.perf_counter()
                found = await search(word)
                if turn >= 2:
                    times[way].append((time.perf_counter() - began) * 1000)
                assert found, f"{word!r} was not found"
    fts5 = median(times["fts5"])
    return [
        _row(f"by relevance, words in {name}", median(times["relevance"]), fts5),
        _row(f"by time, words in {name}", median(times["time"]), fts5),
    ]


async def _new_messages(storage: StorageManager, count: int, sessions: int) -> dict[str, Any]:
    times = []
    for number in range(count):
        word = f"fresh{number}x{time.time_ns()}"
        await storage.add_message(USER, f"s{number * 7 % sessions}", Message("user", f"a {word} message"))
        began = time.perf_counter()
        found = await storage.search(word, user_id=USER)
        times.append((time.perf_counter() - began) * 1000)
        assert len(found) == 1
    return _row("a new message, p50", percentile(times, 0.5), None)


def _row(what: str, ours: float, theirs: float | None, *, higher: bool = False) -> dict[str, Any]:
    ratio = None if theirs is None else ours / theirs if higher else theirs / ours
    return {
        "what": what,
        "ours": ours,
        "fts5": "" if theirs is None else theirs,
        "ratio": "" if ratio is None else ratio,
    }


def beyond(rows: list[dict[str, Any]]) -> list[str]:
    """Return a sentence for each bar that is missed."""
    by_name = {row["what"]: row for row in rows}
    missed = []
    build = by_name["build, messages/s"]
    if build["ratio"] < BUILD_RATIO:
        missed.append(f"The build has {build['ratio']:.2f} of the speed of FTS5; it has to have {BUILD_RATIO}.")
    for name in SHARES:
        row = by_name[f"by relevance, words in {name}"]
        if row["ours"] >= LIMITS_MS[name]:
            missed.append(f"{row['what']}: {row['ours']:.1f} ms; it has to be under {LIMITS_MS[name]:.0f} ms.")
        if row["ratio"] < RATIOS[name]:
            missed.append(f"{row['what']}: {row['ratio']:.2f} times as fast as FTS5; {RATIOS[name]} is asked.")
    new = by_name["a new message, p50"]
    if new["ours"] >= NEW_MESSAGE_MS:
        missed.append(f"A new message is found in {new['ours']:.1f} ms; it has to be under {NEW_MESSAGE_MS:.0f} ms.")
    return missed


# --- the corpus ------------------------------------------------------------------------------------------


def vocabulary(size: int) -> list[str]:
    """Return different words of one to four syllables, short ones first."""
    found: list[str] = []
    for count in range(1, 5):
        for parts in itertools.product(_SYLLABLES, repeat=count):
            found.append("".join(parts))
            if len(found) == size:
                return found
    return found


def texts(count: int, seed: int) -> Iterator[str]:
    """Yield texts of 60 to 100 characters with the word frequencies of natural text (Zipf, Mandelbrot)."""
    pick = random.Random(seed)
    words = vocabulary(50_000)
    weights = list(itertools.accumulate(1 / (rank + 2.7) for rank in range(len(words))))
    for _ in range(count):
        chosen = pick.choices(words, cum_weights=weights, k=pick.randint(11, 17))
        yield " ".join(chosen).capitalize() + "."


def _write(root: Path, config: StorageConfig, sessions: int, messages: int) -> Counter[str]:
    """Write sessions as files; return in how many messages each word is."""
    layout = Layout(config)
    counts: Counter[str] = Counter()
    text = texts(messages, 1)
    begin = datetime(2025, 1, 1, tzinfo=UTC)
    for number in range(sessions):
        name = f"s{number}"
        moment = begin + timedelta(hours=7 * number)
        content = {"id": name, "user_id": USER, "title": f"Chat {number}", "metadata": {}}
        content |= {"created_at": format_timestamp(moment), "updated_at": format_timestamp(moment)}
        document = root / layout.key("session", user_id=USER, session_id=name)
        document.parent.mkdir(mode=0o700)
        document.write_bytes(codec.encode_document(content))
        lines = []
        for line in range(messages // sessions):
            said = next(text)
            counts.update(set(tokenise(said)))
            moment += timedelta(seconds=37)
            role = "assistant" if line % 2 else "user"
            lines.append(codec.encode_message(Message(role, said, timestamp=format_timestamp(moment))))
        log = root / layout.key("messages", user_id=USER, session_id=name)
        log.write_bytes(b"".join(lines))
        for path in (document, log):
            os.chmod(path, 0o600)
    return counts


# --- the peer --------------------------------------------------------------------------------------------


class _Peer:
    """Plain FTS5 over the same texts, and the places of their lines."""

    def __init__(self, storage: StorageManager, path: Path) -> None:
        self._backend = storage.backend
        self._path = path
        self._rows: list[str] = []
        self._places: list[tuple[str, int, int]] = []
        self._connection: sqlite3.Connection | None = None

    def gather(self, root: Path, config: StorageConfig, sessions: int) -> None:
        """Normalise every message, which is not measured."""
        layout = Layout(config)
        for number in range(sessions):
            key = layout.key("messages", user_id=USER, session_id=f"s{number}")
            offset = 0
            for line in (root / key).read_bytes().splitlines(keepends=True):
                self._rows.append(" ".join(tokenise(codec.decode_message(line).content)))
                self._places.append((key, offset, len(line) - 1))
                offset += len(line)

    def build(self) -> float:
        """Insert all rows into a new table; return the seconds."""
        if self._connection is not None:
            self._connection.close()
            self._path.unlink()
        connection = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
        connection.execute("PRAGMA journal_mode=OFF")
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute("PRAGMA cache_size=-65536")
        began = time.perf_counter()
        connection.execute("CREATE VIRTUAL TABLE fts USING fts5 (text, content='', tokenize='ascii')")
        connection.execute("BEGIN")
        connection.executemany("INSERT INTO fts (rowid, text) VALUES (?, ?)", enumerate(self._rows))
        connection.execute("COMMIT")
        seconds = time.perf_counter() - began
        self._connection = connection
        return seconds

    async def search(self, word: str) -> list[Message]:
        """Return the best 20 messages."""
        rows = await asyncio.to_thread(self._find, word)
        lines = await self._backend.read_log_at([self._places[row] for (row,) in rows])
        return [codec.decode_message(line) for line in lines if line is not None]

    def _find(self, word: str) -> list[tuple[int]]:
        assert self._connection is not None
        query = "SELECT rowid FROM fts WHERE fts MATCH ? ORDER BY bm25(fts) LIMIT 20"
        return self._connection.execute(query, (f'"{word}"',)).fetchall()
