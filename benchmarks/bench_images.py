"""Sampling of images: what of its time is not the network.

It is timed with a network that does nothing; tables of solver and model are part of it.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cldsde import CLD, VPSDE, MixedScore, ReverseProcess, solvers
from cldsde.images.networks import UNet, parameter_count
from problems import Nothing

SHAPE, BATCH, STEPS = (1, 28, 28), 16, 20
PROCESSES = {"VP": VPSDE(), "CLD": CLD()}
SOLVERS = {
    "SSCS": solvers.SSCS(),
    "multistep": solvers.ExponentialMultistep(order=2, stochasticity=1.0),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", PROCESSES)
def test_what_of_sampling_is_not_the_network(race, name, solver):
    sde = PROCESSES[name]
    outputs = len(sde.driven)
    network = UNet(SHAPE, sde.components, outputs, channels=(32, 48, 80)).eval()
    assert 0.8e6 < parameter_count(network) < 1.2e6
    state = sde.prior.sample((BATCH, *SHAPE), generator=torch.Generator().manual_seed(0))
    times = solvers.root_times(sde.T, 1e-3, STEPS)

    def sampling(network):
        process = ReverseProcess(sde, MixedScore(network, sde, 0.0, 0.25))
        return partial(solvers.solve, process, SOLVERS[solver], state, times)

    race(
        f"Sampling of {name} by {solver}, {BATCH} × 28 × 28",
        {
            "all but the network": sampling(Nothing(outputs)),
            "with a U-Net of 1 M": sampling(network),
        },
        at_most={"with a U-Net of 1 M": 0.03},
        unit="evaluation",
        units=STEPS,
        rounds=3,
    )
