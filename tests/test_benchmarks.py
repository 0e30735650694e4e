"""Every scenario runs; what it measures is nobody's business here, what it makes of the figures is."""

import asyncio
import json
import math
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import __main__ as command
from benchmarks import corpus, latency, machine, plot, report, rounds, startup
from benchmarks.__main__ import CONTESTED, LONG, SCENARIOS, main
from benchmarks.ours import OURS, Ours, configuration, create_logs, create_many_sessions, lines
from benchmarks.peers import PEERS, SERVED, Peer, open_peer
from benchmarks.result import NOT_INSTALLED, Bar, Result, Table, number
from flatfile_chat_database import StorageManager
from flatfile_chat_database.check import check
from flatfile_chat_database.codec import decode_message

pytestmark = pytest.mark.slow  # the benchmarks are run on the main Python only

QUICK = "--quick measures nothing that --{} could use"


SQLITE, SHORT = "SQLite with an index", "the same of 1,000"
BARS: dict[str, list[tuple[str, str, float | None]]] = {
    "appending": [
        ("raw sqlite3", "≥ 8", 15),
        ("OpenAI Agents SQLiteSession", "≥ 10", None),
        ("plain system calls (floor)", "≥ 0.15", 0.3),
        ("raw sqlite3", "≥ 5", None),
    ],
    "single": [("sqlite3 through asyncio.to_thread", "≥ 1", 1.5)],
    "many": [("a turn of all: 50 / rate", "≤ 3", None)],
    "processes": [("one process alone", "≥ 1", None)],
    # The newest page, and one at a random place.
    "paging": [(SQLITE, "≥ 1", None), (SHORT, "≤ 1.3", None), (SQLITE, "≥ 1", None), (SHORT, "≤ 1.3", None)],
    "opening": [("", "≤ 50 ms", None), ("", "≤ 0 folders", None)],
    "importing": [("the same files by plain calls and one sync", "≥ 0.35", None)],
    "streaming": [("", "≥ 300,000 messages/s", None), ("", "≤ 20 MB", None)],
    "databases": [
        ("psycopg, one INSERT and COMMIT each", "≥ 3", None),
        ("OpenAI Agents SQLAlchemySession", "≥ 5", None),
        *[("the same of 1,000", "≤ 1.5", None)] * 4,
    ],
    "objects": [
        ("one put per message", "≥ 20", None),
        *[("", "≤ 3 requests", None)] * 5,
        (SHORT, "≤ 1.5", None),
    ],
    "caching": [("files alone", "≤ 1.5", None), ("S3 alone", "≥ 5", None)],
    "migrating": [
        ("", "≥ 20,000 messages/s", None),
        ("", "≥ 20,000 messages/s", None),
        ("", "≤ 200 MB", None),
    ],
    "watching": [("", "≤ 50 ms", None)] * 16,
}
"""For each scenario that compares: with what, and how much is asked for."""


# --- scenarios -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCENARIOS + LONG)
def test_a_scenario_runs_and_prints_its_rows(name: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks", name, "--quick", "--json"], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    [line] = finished.stdout.splitlines()
    result = json.loads(line)
    assert result["scenario"] == name
    assert result["rows"]
    assert len({tuple(row) for row in result["rows"]}) == 1, "the rows have different columns"
    assert result["beyond"] == [], "a quick run is not judged"
    if name in BARS:
        assert [(row["against"], row["bar"], row["aim"]) for row in result["rows"] if row["bar"]] == BARS[name]
    elsewhere = {peer for peer, where in (PEERS | SERVED).items() if where.distribution}
    assert bool(elsewhere & {row.get("against") for row in result["rows"]}) == (name in CONTESTED)
    for row in result["rows"]:
        peer = row.get("against")
        # Those are in an environment of their own, where `make test` runs the scenarios that have some.
        if peer in PEERS | SERVED and not (PEERS | SERVED)[peer].is_installed:
            assert (row["theirs"], row["ratio"]) == (NOT_INSTALLED, None)
            assert peer in result["missing"]
        elif peer:
            assert row["ratio"] > 0


def test_a_peer_that_is_not_installed_fails_only_if_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(startup, "run", lambda *, quick: Result("startup", "measured", missing=["Some Peer"]))
    assert main(["startup"]) == main(["startup", "--quick"]) == 0
    assert main(["startup", "--check"]) == main(["startup", "--quick", "--peers"]) == 1
    assert "Not installed: Some Peer." in capsys.readouterr().err


def test_a_peer_without_its_package_is_not_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(PEERS, "nobody", Peer("nothing", "Nobody", "no-such-package-of-anybody"))
    assert open_peer("nobody", tmp_path, 1) is None


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if not peer.distribution])
async def test_a_peer_stores_what_it_is_given_and_says_how_durably(name: str, tmp_path: Path) -> None:
    peer = open_peer(name, tmp_path, 2)
    assert peer is not None
    assert "flush" in peer.durability
    await peer.append(1, "user", "Hello")
    assert await peer.count() == 1
    await peer.close()


def test_raw_sqlite_flushes_each_commit_only_at_full(tmp_path: Path) -> None:
    says = {}
    for name in ("raw sqlite3", "raw sqlite3, synchronous=NORMAL"):
        peer = open_peer(name, tmp_path, 1)
        assert peer is not None
        says[name] = peer.durability
        asyncio.run(peer.close())
    assert list(says.values()) == [
        "WAL, synchronous=FULL, one transaction each: each commit flushed",
        "WAL, synchronous=NORMAL, one transaction each: flushed only now and then",
    ]


async def test_ours_counts_what_was_appended_to_all_sessions(tmp_path: Path) -> None:
    ours = Ours(tmp_path, 3)
    await ours.create()
    await ours.append_all([["a", "b"], ["c", "d"], ["e", "f"]])
    assert await ours.count() == 6
    assert [message.content for message in await ours.storage.get_messages("benchmark", "session-1")][1:] == ["c", "d"]
    await ours.close()


async def test_a_log_that_was_written_directly_is_a_log(tmp_path: Path) -> None:
    texts = corpus.Texts().take(250)
    sizes = await create_logs(tmp_path, {"one": texts})
    assert sizes == {"one": sum(len(line) for line in lines(texts))}
    async with StorageManager(configuration(tmp_path)) as storage:
        assert [message.content async for message in storage.stream_messages("benchmark", "one")] == texts
        assert (await check(storage.backend)).problems == []


async def test_sessions_that_were_written_directly_are_sessions(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    async with StorageManager(config) as storage:
        await storage.create_user("first")
    create_many_sessions(tmp_path, config, 2, 3, ["Hello", "Good day"])
    async with StorageManager(config) as storage:
        assert await storage.count_users() == 3
        assert await storage.count_sessions("user-1") == 3
        assert [message.content for message in await storage.get_messages("user-1", "session-2")] == [
            "Hello",
            "Good day",
        ]
        assert (await check(storage.backend)).problems == []


async def test_contests_take_turns_after_a_first_one_that_does_not_count() -> None:
    order: list[str] = []

    def contest(name: str) -> rounds.Contest:
        async def run() -> float:
            order.append(name)
            return len(order)

        return run

    figures = await rounds.interleave({"a": contest("a"), "b": contest("b")}, quick=False, rounds=3)
    assert order == ["a", "b"] * 4
    assert figures == {"a": [3, 5, 7], "b": [4, 6, 8]}
    assert rounds.ROUNDS >= 5


# --- corpus ----------------------------------------------------------------------------------------------


def test_the_corpus_has_the_size_of_the_real_one_and_its_lengths() -> None:
    conversations = list(corpus.conversations())
    counts = [len(conversation.texts) for conversation in conversations]
    assert (len(conversations), sum(counts)) == (corpus.CONVERSATIONS, corpus.MESSAGES) == (12_174, 223_756)
    assert len({conversation.id for conversation in conversations}) == 12_174
    assert min(counts) >= 4 and max(counts) <= 40 and all(count % 2 == 0 for count in counts)
    sizes = sorted(len(text) for conversation in conversations for text in conversation.texts)
    assert 35 <= sizes[len(sizes) // 2] <= 42
    assert 100 <= sizes[int(len(sizes) * 0.95)] <= 125
    assert sizes[0] >= 1 and sizes[-1] < 600


def test_the_corpus_is_the_same_everywhere() -> None:
    program = (
        "import hashlib; from benchmarks.corpus import conversations; "
        "print(hashlib.sha256(''.join(c.line() for c in conversations(300)).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert digests == {"c1f723b4f9d46d859df34f2567577bd51e41cbaffdcec5fbba653aaa04d41b51"}


def test_another_seed_gives_other_texts() -> None:
    assert corpus.Texts(1).take(20) == corpus.Texts(1).take(20)
    assert corpus.Texts(1).take(20) != corpus.Texts(2).take(20)


def test_words_follow_zipf() -> None:
    texts = corpus.Texts(3).take(50_000)
    counts = Counter(word for text in texts for word in text.split())
    frequencies = [count for _, count in counts.most_common(2_000)]
    # Between rank 10 and rank 1,000, a word of ten times the rank is about a tenth as frequent.
    slope = math.log10(frequencies[1_000 - 1] / frequencies[10 - 1]) / 2
    assert -1.15 < slope < -0.85
    holding = Counter(word for text in texts for word in set(text.split()))
    shares = [holding[word] / len(texts) for word, _ in counts.most_common(1_000)]
    assert 0.25 < shares[0] < 0.35
    assert any(0.008 < share < 0.012 for share in shares)
    assert any(0.0004 < share < 0.0012 for share in shares)
    assert len(set(texts)) > 40_000


def test_the_vocabulary_has_no_word_twice_and_begins_with_short_ones() -> None:
    words = corpus.vocabulary()
    assert len(words) == len(set(words)) == 30_000
    assert max(map(len, words[:300])) <= 5 < max(map(len, words))
    assert all(re.fullmatch("[a-z]+", word) for word in words)


def test_a_conversation_is_a_line_that_can_be_imported() -> None:
    (first,) = islice(corpus.conversations(), 1)
    line = json.loads(first.line())
    assert line["id"] == "conversation-00000"
    assert [message["content"] for message in line["messages"]] == first.texts
    assert [message["role"] for message in line["messages"]][:3] == ["user", "assistant", "user"]


def test_an_impossible_number_of_messages_is_refused() -> None:
    with pytest.raises(ValueError, match="10 conversations cannot have 1000 messages"):
        list(corpus.conversations(10, 1000))


def test_lines_are_messages_a_second_apart() -> None:
    first, second = [decode_message(line) for line in lines(["a", "b"])]
    assert (first.role, second.role) == ("user", "assistant")
    assert first.id < second.id
    assert first.timestamp[:19] == "2026-01-01T00:00:00" and second.timestamp[:19] == "2026-01-01T00:00:01"


# --- figures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bar", "value", "holds"),
    [
        (Bar(least=8), 8.0, True),
        (Bar(least=8), 7.99, False),
        (Bar(most=1.3), 1.3, True),
        (Bar(most=1.3), 1.31, False),
        (Bar(most=0), 0.0, True),
        (Bar(least=1, aim=1.5), 1.2, True),
    ],
)
def test_a_bar_may_be_reached_but_not_crossed(bar: Bar, value: float, holds: bool) -> None:
    assert bar.holds(value) is holds


def test_a_ratio_is_that_of_the_medians_and_its_spread_that_of_the_rounds() -> None:
    table = Table()
    table.compare("appends", "messages/s", [100, 90, 110], "peer", [10, 30, 20], Bar(least=6, aim=9))
    [row] = table.rows
    assert (row["ours"], row["theirs"], row["ratio"]) == (100, 20, 5.0)
    assert (row["spread"], row["bar"], row["aim"]) == ("3.00 to 10.00", "≥ 6", 9)
    assert table.beyond == ["appends, against peer: 5.00 ×; it has to be at least 6 ×."]


def test_where_lower_is_better_the_ratio_still_says_how_many_times_as_fast() -> None:
    table = Table()
    table.compare("a page", "ms", [2, 2, 2], "peer", [3, 4, 5], Bar(least=1), lower_is_better=True)
    assert table.rows[0]["ratio"] == 2.0
    assert table.rows[0]["spread"] == "1.50 to 2.50"
    assert table.beyond == []


def test_a_relation_says_how_many_times_as_much_ours_is() -> None:
    table = Table()
    table.relate("a page of many", "ms", [3, 3, 3], "of few", [2, 2, 2], Bar(most=1.3))
    assert table.rows[0]["ratio"] == 1.5
    assert table.beyond == ["a page of many, against of few: 1.50 ×; it has to be at most 1.3 ×."]


def test_a_figure_of_its_own_is_judged_by_its_median() -> None:
    table = Table()
    table.measure("opening", "ms", [40, 60, 49], Bar(most=50))
    table.measure("streaming", "messages/s", [299_999.0], Bar(least=300_000))
    assert [row["bar"] for row in table.rows] == ["≤ 50 ms", "≥ 300,000 messages/s"]
    assert table.beyond == ["streaming: 299,999 messages/s; it has to be at least 300,000 messages/s."]


def test_a_peer_that_is_not_installed_is_said_to_be_so() -> None:
    table = Table()
    table.compare("appends", "messages/s", [100.0], "peer", None, Bar(least=6))
    assert table.rows[0]["theirs"] == NOT_INSTALLED
    assert table.rows[0]["ratio"] is None
    assert (table.missing, table.beyond) == (["peer"], [])


@pytest.mark.parametrize(
    ("value", "text"),
    [(123456.7, "123,457"), (123.45, "123.5"), (1.234, "1.23"), (0.0123, "0.0123"), (0.0, "0.00"), (-2.5, "-2.50")],
)
def test_a_figure_has_as_many_digits_as_it_deserves(value: float, text: str) -> None:
    assert number(value) == text


def test_an_operation_has_to_stay_under_its_limit() -> None:
    rows = [{"operation": name, "p99 ms": value} for name, value in (("a", 99.99), ("b", 100.0), ("c", 250.0))]
    assert [sentence.partition(":")[0] for sentence in latency.beyond(rows)] == ["b", "c"]


def test_the_start_may_reach_its_limit() -> None:
    assert startup.beyond(45.0) == []
    assert startup.beyond(45.1) == ["the package adds 45.1 ms to asyncio; it may add at most 45 ms."]


# --- command ---------------------------------------------------------------------------------------------


def test_an_unknown_scenario_is_a_usage_error() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks", "nothing"], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 2
    assert "no such scenario: nothing" in finished.stderr


@pytest.mark.parametrize(
    ("beyond", "arguments", "code"),
    [([], ["--check"], 0), (["it is slow."], ["--check"], 1), (["it is slow."], [], 0)],
)
def test_check_fails_when_something_is_beyond_its_limit(
    beyond: list[str],
    arguments: list[str],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(startup, "run", lambda *, quick: Result("startup", "measured", [{"ms": 1.0}], beyond))
    assert main(["startup", *arguments]) == code
    assert ("BEYOND ITS LIMIT: it is slow." in capsys.readouterr().out) == bool(beyond)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--check", "--quick"], QUICK.format("check")),
        (["--report", "--quick"], QUICK.format("report")),
        (["--report", "single"], "--report is about all scenarios: give no names"),
    ],
)
def test_a_judgement_or_a_page_needs_a_whole_run(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_help_says_what_check_judges(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "100 ms or more at the 99th percentile" in text and "more than 45 ms" in text


# --- page ------------------------------------------------------------------------------------------------


def a_result(*beyond: str) -> Result:
    table = Table()
    table.compare("100 sessions | at once", "messages/s", [40_000, 41_000, 42_000], "raw sqlite3", [4_000] * 3, Bar(8))
    rates = {OURS: 41_000.0, "raw sqlite3 <&>": 4_000.0, "floor": 130_000.0}
    return Result("appending", "many at once", table.rows, list(beyond), ["each commit flushed"], {}, rates)


def test_a_report_is_written_by_a_whole_run_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "SCENARIOS", ("startup",))
    monkeypatch.setattr(command, "DOCS", tmp_path)
    monkeypatch.setattr(startup, "run", lambda *, quick: a_result("it is slow."))
    assert main(["startup"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert main(["--report", "--json"]) == 0
    page = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert (
        "| 100 sessions \\| at once | messages/s | 41,000 | raw sqlite3 | 4,000 | 10.25 | 10.00 to 10.50 | ≥ 8 |  |"
        in page
    )
    assert "- it is slow." in page and "- each commit flushed" in page and "    make bench" in page
    assert "![Messages a second, by store; the scale is logarithmic](benchmarks.svg)" in page
    for name, value in machine.facts().items():
        assert f"| {name} | {value} |" in page
    assert (tmp_path / "benchmarks.svg").exists()


def test_a_page_says_when_every_bar_was_reached() -> None:
    page = report.page([a_result()], {"Python": "3"})
    assert "In this run, every figure was within its bar." in page
    assert "## Appending\n\nMany at once.\n" in page


def test_the_longer_bar_is_the_faster_store() -> None:
    picture = ElementTree.fromstring(plot.draw([("at once", a_result().rates), ("alone", {OURS: 2_000.0})]))
    space = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in picture.iter(f"{space}text")]
    for text in (
        "At once",
        "Alone",
        OURS,
        "raw sqlite3 <&>",
        "41,000",
        "130,000",
        "1,000",
        "messages a second, logarithmic",
    ):
        assert text in texts
    background, *bars = picture.iter(f"{space}rect")
    assert background.get("fill") == "#ffffff"
    ours, raw, floor, alone = [float(bar.get("width", "0")) for bar in bars]
    assert alone < raw < ours < floor
    assert bars[0].get("fill") == bars[3].get("fill") != bars[1].get("fill")
    # On a scale of logarithms, ten times as fast is as much longer everywhere.
    assert ours - raw == pytest.approx((floor - raw) * math.log(41_000 / 4_000) / math.log(130_000 / 4_000), abs=0.5)


def test_facts_name_the_machine_and_every_peer() -> None:
    facts = machine.facts()
    assert {"processor", "kernel", "file system", "Python", "SQLite", "date"} <= facts.keys()
    assert {"openai-agents", "langchain-community", "agent-framework-core"} <= facts.keys()
    assert machine.file_system("/proc") == "proc"


def test_nothing_is_measured_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with machine.work_folder() as folder:
        assert machine.file_system(folder) not in machine.IN_MEMORY
    monkeypatch.setattr(machine, "file_system", lambda path: "tmpfs")
    with pytest.raises(SystemExit, match="set TMPDIR"), machine.work_folder():
        pass
