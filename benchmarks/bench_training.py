"""Duration of a training step, and its overhead outside of the network.

The overhead (times, kernels, noise, targets and weights) is measured with a network that takes
almost no time. The optimiser and the average of the weights are not included.
"""

from __future__ import annotations

import pytest
import torch

from cldsde import CLD, VPSDE, MixedScore
from cldsde.score import PerturbedData, TimeSampler
from problems import Nothing, unet

SHAPE, BATCH = (1, 16, 16), 64
PROCESSES = {"VP": VPSDE(), "CLD": CLD()}

pytestmark = pytest.mark.parametrize("threads", ["one thread"], indirect=True)


def make_step(sde, network):
    model = MixedScore(network, sde, 0.0, 0.25)
    sampler = TimeSampler(model.residual_variance, 1e-3)
    data = torch.rand(BATCH, *SHAPE) * 2 - 1
    generator = torch.Generator().manual_seed(0)

    def step():
        t, weight = sampler.sample(BATCH, generator=generator)
        pair = PerturbedData.draw(sde, data, t, generator=generator)
        losses = model.loss(pair)
        network.zero_grad()
        (weight.to(losses) * losses).mean().backward()

    return step


@pytest.mark.parametrize("name", PROCESSES)
def test_training_step(race, name):
    sde = PROCESSES[name]
    race(
        f"Training step of {name}, {BATCH} images of 16 × 16",
        {
            "all but the network": make_step(sde, Nothing(len(sde.driven))),
            "with a U-Net of 1 M": make_step(sde, unet(sde, SHAPE)),
        },
        at_most={"with a U-Net of 1 M": 0.03},
        unit="step",
    )
