"""How times grow with the batch, the dimension, the components and the grid."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cldsde import CLD, HOLD, VPSDE, ReverseProcess, solvers

PROCESSES = {"VP": VPSDE(), "CLD": CLD(), "HOLD": HOLD()}


class LastScore:
    """The last component, a view, for the processes that noise enters there."""

    def __call__(self, z, t):
        return z[:, -1:]

    def tabulate(self, times, like):
        return lambda z, i: z[:, -1:]


def measure(race, name, batch, shape, steps):
    sde = PROCESSES[name]
    generator = torch.Generator().manual_seed(0)
    start = sde.prior.sample((batch, *shape), generator=generator)
    process, times = ReverseProcess(sde, LastScore()), solvers.uniform_times(sde.T, 1e-3, steps)
    run = partial(solvers.solve, process, state=start, times=times, generator=generator)
    size = " × ".join(map(str, (batch, sde.components, *shape)))
    race(
        f"{name}, {size}, {steps} steps, score: free",
        {
            "SSCS": partial(run, solver=solvers.SSCS()),
            "Euler–Maruyama": partial(run, solver=solvers.EulerMaruyama()),
            "multistep": partial(run, solver=solvers.ExponentialMultistep(stochasticity=1.0)),
        },
        unit="step",
        units=steps,
        rounds=5,
    )


@pytest.mark.parametrize("batch", [1, 64, 4096, 65_536])
def test_batch(race, batch):
    measure(race, "CLD", batch, (2,), 100)


@pytest.mark.parametrize("dimension", [1, 64, 3072])
def test_dimension(race, dimension):
    measure(race, "CLD", 64, (dimension,), 100)


@pytest.mark.parametrize("name", PROCESSES)
def test_components(race, name):
    measure(race, name, 4096, (3,), 100)


@pytest.mark.parametrize("steps", [10, 1000])
def test_steps(race, steps):
    measure(race, "CLD", 64, (3,), steps)


@pytest.mark.parametrize("batch", [1, 64, 4096])
def test_adaptive_steps(race, batch):
    sde = PROCESSES["CLD"]
    start = sde.prior.sample((batch, 2), generator=torch.Generator().manual_seed(0))
    process, ends = ReverseProcess(sde, LastScore()), solvers.uniform_times(sde.T, 1e-3, 1)
    nfev = {}

    def run(pace):
        solver = solvers.ProbabilityFlow(rtol=1e-4, atol=1e-4, pace=pace)
        nfev[pace] = solvers.solve(process, solver, start, ends).nfev

    race(
        f"dopri5, CLD, {batch} × 2 × 2, score: free, one step size",
        {"batch": partial(run, "batch"), "sample": partial(run, "sample")},
        unit="evaluation",
        units=nfev.__getitem__,
        rounds=5,
    )


@pytest.mark.parametrize("steps", [10, 100, 1000])
@pytest.mark.parametrize("name", PROCESSES)
def test_tables(race, name, steps):
    sde = PROCESSES[name]
    process, times = ReverseProcess(sde, LastScore()), solvers.root_times(sde.T, 1e-3, steps)
    race(
        f"Tables for {steps} steps, {name}",
        {
            "multistep ODE": partial(solvers.ExponentialMultistep().prepare, process, times),
            "multistep SDE": partial(
                solvers.ExponentialMultistep(stochasticity=1.0).prepare, process, times
            ),
            "SSCS": partial(solvers.SSCS().prepare, process, times),
            "Euler–Maruyama": partial(solvers.EulerMaruyama().prepare, process, times),
        },
        unit="grid",
        rounds=5,
    )
