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
# there: declaring a process calls LAPACK, and libraries start threads when they are imported.
PLANS = """
import os
import sys
import threading

import cldsde
from cldsde import solvers

named = solvers.named_solvers()
times = solvers.root_times(1.0, 1e-3, 20)
data = cldsde.GaussianMixture([1.0], [[0.3]], [[[0.25]]])


def plans():
    for process in processes:
        for name in named:
            try:
                solvers.plan(process, named[name], times)
            except ValueError:
                continue  # the solver does not apply to the process
            yield name


def prepare():
    global processes
    sdes = [cldsde.VPSDE(), cldsde.VESDE(), cldsde.CLD(), cldsde.PSLD(), cldsde.HOLD()]
    processes = [cldsde.ReverseProcess(sde, data.score(sde)) for sde in sdes]
    for _ in plans():
        pass


apart = threading.Thread(target=prepare)
apart.start()
apart.join()
threads = set(os.listdir("/proc/self/task"))
for name in plans():
    if set(os.listdir("/proc/self/task")) - threads:
        sys.exit(f"{name} has woken threads")
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux does")
def test_plans_wake_no_further_thread() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    command = [sys.executable, "-I", "-c", PLANS]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr
