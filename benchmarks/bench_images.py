"""Sampling of images: what of its time is not the network."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cldsde import CLD, VPSDE, MixedScore, ReverseProcess, solvers
from cldsde.images.networks import UNet, parameter_count

SHAPE, BATCH, STEPS = (1, 28, 28), 16, 10
PROCESSES = {"VP": VPSDE(), "CLD": CLD()}
SOLVERS = {
    "SSCS": solvers.SSCS(),
    "multistep": solvers.ExponentialMultistep(order=2, stochasticity=1.0),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", PROCESSES)
def test_what_of_sampling_is_not_the_network(race, name, solver):
    sde = PROCESSES[name]
    torch.manual_seed(0)
    network = UNet(SHAPE, sde.components, len(sde.driven), channels=(32, 48, 80)).eval()
    assert 0.8e6 < parameter_count(network) < 1.2e6
    process = ReverseProcess(sde, MixedScore(network, sde, 0.0, 0.25))
    state = sde.prior.sample((BATCH, *SHAPE), generator=torch.Generator().manual_seed(0))
    times = solvers.root_times(sde.T, 1e-3, STEPS)
    shown, clock = state.flatten(1, 2), torch.zeros(BATCH)

    @torch.no_grad()
    def evaluations():
        for _ in range(STEPS):
            network(shown, clock)

    race(
        f"Sampling of {name} by {solver}, {BATCH} × 28 × 28, a U-Net of 1 M",
        {
            "cldsde": partial(solvers.solve, process, SOLVERS[solver], state, times),
            "its evaluations of the network": evaluations,
        },
        at_most={"its evaluations of the network": 1.03},
        unit="evaluation",
        units=STEPS,
        rounds=3,
    )
