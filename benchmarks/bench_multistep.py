"""Multistep sampling of a VP process: ours against diffusers' schedulers, with a free network."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cldsde import VPSDE, ReverseProcess, solvers

STEPS, SHAPE = 50, (3, 32, 32)
SDE = VPSDE()


class NoNoise:
    """The score that costs one operation."""

    def __call__(self, z, t):
        return z.neg()

    def tabulate(self, times, like):
        return lambda z, i: z.neg()


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("noisy", [False, True], ids=["ODE", "SDE"])
def test_dpm_solver_2m(race, batch, noisy):
    diffusers = pytest.importorskip("diffusers")
    start = torch.randn(batch, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    solver = solvers.ExponentialMultistep(
        order=2, stochasticity=float(noisy), variable="log_snr", weights="published"
    )
    process, times = ReverseProcess(SDE, NoNoise()), solvers.root_times(SDE.T, 1e-3, STEPS)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++" if noisy else "dpmsolver++"
    )

    def by_diffusers():
        scheduler.set_timesteps(STEPS)
        x = start[:, 0]
        for t in scheduler.timesteps:
            x = scheduler.step(x.neg(), t, x, generator=generator).prev_sample

    race(
        f"DPM-Solver++(2M), {'SDE' if noisy else 'ODE'}, {batch} × 3 × 32 × 32, score: free",
        {
            "cldsde": partial(solvers.solve, process, solver, start, times, generator=generator),
            "diffusers": by_diffusers,
        },
        unit="step",
        units=STEPS,
    )
