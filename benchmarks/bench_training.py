"""A training step: all of it, and what of it is not the network.

Times, kernels, noise, targets and weights are timed with a network that does nothing; the optimiser
and the average of the weights belong to neither.
"""

from __future__ import annotations

import pytest
import torch

from cldsde import CLD, VPSDE, MixedScore
from cldsde.images.networks import UNet, parameter_count
from cldsde.score import PerturbedData, TimeSampler
from problems import Nothing

SHAPE, BATCH = (1, 16, 16), 64
PROCESSES = {"VP": VPSDE(), "CLD": CLD()}


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
def test_what_of_a_training_step_is_not_the_network(race, name):
    sde = PROCESSES[name]
    network = UNet(SHAPE, sde.components, len(sde.driven), channels=(32, 48, 80))
    assert 0.8e6 < parameter_count(network) < 1.2e6
    race(
        f"Training step of {name}, {BATCH} images of 16 × 16",
        {
            "all but the network": make_step(sde, Nothing(len(sde.driven))),
            "with a U-Net of 1 M": make_step(sde, network),
        },
        at_most={"with a U-Net of 1 M": 0.03},
        unit="step",
    )
