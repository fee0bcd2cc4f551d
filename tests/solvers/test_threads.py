"""Plans are made by one thread, whatever number torch may use.

Coefficients are small: a second thread has nothing to do, but on a machine with busy neighbours
every call that waits for it costs milliseconds.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# torch starts threads with the first operation that is given to several, for each thread of Python
# apart, and keeps them. So the plans are made in a subprocess. All else is done in another thread
# there: declaring a process calls LAPACK, and libraries start threads when they are imported.


PLANS = """
import contextlib
import itertools
import os
import sys
import threading

import cldsde
from cldsde import solvers

times, processes = solvers.root_times(1.0, 1e-3, 20), []


def plans():
    for process, solver in itertools.product(processes, solvers.named_solvers().values()):
        with contextlib.suppress(ValueError):  # the solver does not apply to the process
            yield solvers.plan(process, solver, times).solver


def prepare():
    data = cldsde.GaussianMixture([1.0], [[0.3]], [[[0.25]]])
    for sde in (cldsde.VPSDE(), cldsde.VESDE(), cldsde.CLD(), cldsde.PSLD(), cldsde.HOLD()):
        processes.append(cldsde.ReverseProcess(sde, data.score(sde)))
    list(plans())


apart = threading.Thread(target=prepare)
apart.start()
apart.join()
threads = set(os.listdir("/proc/self/task"))
for solver in plans():
    if set(os.listdir("/proc/self/task")) - threads:
        sys.exit(f"{solver} has woken threads")
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux does")
def test_plans_wake_no_further_thread():
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    command = [sys.executable, "-I", "-c", PLANS]
    subprocess.run(command, check=True, env=environment, timeout=300)
