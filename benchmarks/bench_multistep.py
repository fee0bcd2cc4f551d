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


# Of the same coefficients, to which tests hold ours; for DEIS of the same kind.
RIVALS = {
    "DPM-Solver++(2M), ODE": (
        {"weights": "published"},
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++"},
    ),
    "DPM-Solver++(2M), SDE": (
        {"weights": "published", "stochasticity": 1.0},
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++"},
    ),
    "UniPC-2": ({"weights": "published", "corrector": True}, "UniPCMultistepScheduler", {}),
    "DEIS-2": ({"prediction": "noise"}, "DEISMultistepScheduler", {}),
}


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", RIVALS)
def test_multistep(race, batch, name):
    diffusers = pytest.importorskip("diffusers")
    options, kind, settings = RIVALS[name]
    start = torch.randn(batch, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    solver = solvers.ExponentialMultistep(order=2, variable="log_snr", **options)
    process, times = ReverseProcess(SDE, NoNoise()), solvers.root_times(SDE.T, 1e-3, STEPS)
    scheduler = getattr(diffusers, kind)(solver_order=2, **settings)
    noise = {"generator": generator} if name.endswith("SDE") else {}

    def by_diffusers():
        scheduler.set_timesteps(STEPS)
        x = start[:, 0]
        for t in scheduler.timesteps:
            x = scheduler.step(x.neg(), t, x, **noise).prev_sample

    race(
        f"{name}, {batch} × 3 × 32 × 32, score: free",
        {
            "cldsde": partial(solvers.solve, process, solver, start, times, generator=generator),
            "diffusers": by_diffusers,
        },
        unit="step",
        units=STEPS,
    )
