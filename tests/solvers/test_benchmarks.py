"""The benchmarks run: each race once, nothing measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import report

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_the_results_of_the_documentation_make_a_table_and_miss_no_target() -> None:
    found = json.loads((FOLDER.parent / "docs" / "data" / "benchmarks.json").read_text())
    table = report.table(found)
    assert all(race["question"] in table for race in found["races"])
    assert not [line for race in found["races"] for line in report.missed(race)]


@pytest.mark.slow
def test_every_race_runs() -> None:
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        "--benchmark-disable",
        "-k",
        "not 200000",
        str(FOLDER),
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-3000:]
