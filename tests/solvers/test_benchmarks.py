"""The benchmarks run: each race once, nothing measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_every_race_runs() -> None:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--benchmark-disable", str(FOLDER)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-3000:]
