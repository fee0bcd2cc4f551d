"""Plans are made by one thread, whatever number torch may use.

Coefficients are small: a second thread has nothing to do, but on a machine with busy neighbours
every call that waits for it costs milliseconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# torch starts threads with the first operation that is given to several, for each thread of Python
# apart, and keeps them. So the plans are made in a subprocess. All else is done in another thread
# there: declaring the process calls LAPACK, and libraries start threads when they are imported.
PLANS = """
import os
import sys
import threading

import cldsde
from cldsde import solvers

named = solvers.named_solvers()
times = solvers.root_times(1.0, 1e-3, 20)


def plan(name):
    try:
        solvers.plan(process, named[name], times)
    except ValueError:
        pass  # the solver does not apply to the process


def prepare():
    global process
    sde = getattr(cldsde, sys.argv[1])()
    data = cldsde.GaussianMixture([1.0], [[0.3]], [[[0.25]]])
    process = cldsde.ReverseProcess(sde, data.score(sde))
    for name in named:
        plan(name)


apart = threading.Thread(target=prepare)
apart.start()
apart.join()
threads = set(os.listdir("/proc/self/task"))
for name in named:
    plan(name)
    if set(os.listdir("/proc/self/task")) - threads:
        sys.exit(f"{name} has woken threads")
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux does")
@pytest.mark.parametrize("process", ["VPSDE", "VESDE", "CLD", "PSLD", "HOLD"])
def test_plans_wake_no_further_thread(process: str) -> None:
    command = [sys.executable, "-I", "-c", PLANS, process]
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=100
    )
    assert result.returncode == 0, result.stderr
