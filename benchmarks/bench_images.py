"""Overhead of sampling images: the time outside of the network, including the solver's tables."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cldsde import CLD, VPSDE, MixedScore, ReverseProcess, solvers
from problems import Nothing, unet

SHAPE, BATCH, STEPS = (1, 28, 28), 16, 20
PROCESSES = {"VP": VPSDE(), "CLD": CLD()}
SOLVERS = {
    "SSCS": solvers.SSCS(),
    "multistep 2, stochasticity 1": solvers.ExponentialMultistep(stochasticity=1.0),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", PROCESSES)
def test_sampling(race, name, solver):
    sde = PROCESSES[name]
    state = sde.prior.sample((BATCH, *SHAPE), generator=torch.Generator().manual_seed(0))
    times = solvers.root_times(sde.T, 1e-3, STEPS)

    def sampling(network):
        process = ReverseProcess(sde, MixedScore(network.eval(), sde, 0.0, 0.25))
        return partial(solvers.solve, process, SOLVERS[solver], state, times)

    race(
        f"{name}, {solver}, {BATCH} × 28 × 28",
        {
            "all but the network": sampling(Nothing(len(sde.driven))),
            "with a U-Net of 1 M": sampling(unet(sde, SHAPE)),
        },
        at_most={"with a U-Net of 1 M": 0.02},
        unit="evaluation",
        units=STEPS,
        rounds=3,
    )
