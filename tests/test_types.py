"""The types of the package, checked by mypy."""

import subprocess
import sys
from pathlib import Path

import pytest

import cldsde

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(cldsde.__file__).parent


@pytest.mark.skipif(
    not (PACKAGE / "solvers").exists(), reason="mypy does not see an editable installation"
)
def test_mypy_finds_no_error_in_the_installed_package(tmp_path):
    options = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", tmp_path / "cache"]
    command = [sys.executable, "-m", "mypy", *options, "-p", "cldsde"]
    # In the repository mypy would take the folder cldsde/ for the whole package.
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
