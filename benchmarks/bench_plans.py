"""Planning 20 steps with every named solver, on an idle machine and beside a busy process."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from functools import partial

import pytest

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, ReverseProcess, solvers
from cldsde.solvers.named import validated_solvers
from problems import free

PROCESSES = {"VP": VPSDE(), "VE": VESDE(), "CLD": CLD(), "PSLD": PSLD(), "HOLD": HOLD()}

pytestmark = pytest.mark.parametrize("threads", ["default threads"], indirect=True)


@contextlib.contextmanager
def busy_neighbour():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
        try:
            yield
        finally:
            neighbour.kill()


LOADS = {"idle": contextlib.nullcontext, "one busy neighbour": busy_neighbour}


def limit(process, solver):
    return 25e-3 if process == "HOLD" or solver == "multistep-3-corrector" else 10e-3


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("process", PROCESSES)
def test_planning(race, process, load):
    sde = PROCESSES[process]
    reverse, times = ReverseProcess(sde, free(sde)), solvers.root_times(sde.T, 1e-3, 20)
    rivals = {}
    for name, solver in validated_solvers().items():
        rivals[name] = partial(solvers.plan, reverse, solver, times)
        try:
            rivals[name]()
        except ValueError:  # the solver does not apply to the process
            del rivals[name]
    with LOADS[load]():
        race(
            f"{process}, {load}",
            rivals,
            below={name: limit(process, name) for name in rivals},
            unit="plan",
            rounds=20,
        )
