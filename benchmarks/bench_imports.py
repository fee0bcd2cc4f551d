"""Time of ``import cldsde``, compared with the import of torch alone."""

from __future__ import annotations

import subprocess
import sys

import pytest


def importing(module):
    command = [sys.executable, "-I", "-c", f"import {module}"]
    return lambda: subprocess.run(command, check=True)


@pytest.mark.parametrize("threads", ["default threads"], indirect=True)
def test_import(race):
    # Wall time, because the processor time of subprocesses is not counted.
    race("import cldsde", {"cldsde": importing("cldsde"), "torch": importing("torch")}, rounds=5)
