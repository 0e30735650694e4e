"""Every scenario runs; what it measures is nobody's business here."""

import json
import subprocess
import sys

import pytest

from benchmarks import latency, startup
from benchmarks.__main__ import SCENARIOS, main
from benchmarks.result import Result


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_runs_and_prints_its_rows(name: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks", name, "--quick", "--json"], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    [line] = finished.stdout.splitlines()
    result = json.loads(line)
    assert result["scenario"] == name
    assert result["rows"]


def test_an_unknown_scenario_is_a_usage_error() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks", "nothing"], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 2
    assert "no such scenario: nothing" in finished.stderr


def test_an_import_is_measured_in_messages_and_memory() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks", "importing", "--quick", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    (row,) = json.loads(finished.stdout)["rows"]
    assert (row["conversations"], row["messages"]) == (10, 200)
    assert row["messages/s"] == pytest.approx(row["messages"] / row["seconds"])
    assert 1 < row["peak MB"] < 10_000


def test_an_operation_has_to_stay_under_its_limit() -> None:
    rows = [{"operation": name, "p99 ms": value} for name, value in (("a", 99.99), ("b", 100.0), ("c", 250.0))]
    assert [sentence.partition(":")[0] for sentence in latency.beyond(rows)] == ["b", "c"]


def test_the_start_may_reach_its_limit() -> None:
    assert startup.beyond(45.0) == []
    assert startup.beyond(45.1) == ["the package adds 45.1 ms to asyncio; it may add at most 45 ms."]


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
    assert ("TOO SLOW: it is slow." in capsys.readouterr().out) == bool(beyond)


def test_check_says_what_it_judges_and_refuses_to_judge_a_quick_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--check", "--quick"])
    assert ended.value.code == 2
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "100 ms or more at the 99th percentile" in text and "more than 45 ms" in text
