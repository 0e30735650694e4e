"""Every scenario runs; what it measures is nobody's business here."""

import json
import subprocess
import sys

import pytest

from benchmarks.__main__ import SCENARIOS


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
