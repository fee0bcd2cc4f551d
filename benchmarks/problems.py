"""Scores that the benchmarks share: plain functions ``score(z, t)``, a mixture and networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cldsde import GaussianMixture, LinearSDE
from cldsde.images.networks import UNet, parameter_count

__all__ = ["Nothing", "free", "linear", "mlp", "ring", "unet"]

Score = Callable[[Tensor, Tensor], Tensor]


def linear(sde: LinearSDE, dimension: int) -> Score:
    """Score of the process's stationary distribution, by one matrix product."""
    precision = torch.linalg.inv(sde.stationary_covariance)[list(sde.driven)]
    matrix = -torch.kron(precision, torch.eye(dimension)).T.float().contiguous()
    return lambda z, t: (z.flatten(1) @ matrix).view(len(z), -1, dimension)


def mlp(sde: LinearSDE, dimension: int) -> Score:
    """A network of 64 units in each of two layers, with random weights."""
    sizes = (sde.components * dimension + 1, 64, 64, len(sde.driven) * dimension)
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    network = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])

    def score(z: Tensor, t: Tensor) -> Tensor:
        return network(torch.cat([z.flatten(1), t.unsqueeze(1)], 1)).view(len(z), -1, dimension)

    return score


def free(sde: LinearSDE) -> Score:
    """A view of the last components, so that only the solver takes time."""
    return lambda z, t: z[:, -len(sde.driven) :]


def ring(modes: int = 8) -> GaussianMixture:
    """Narrow modes on a circle."""
    angle = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
    means = torch.stack([angle.cos(), angle.sin()], dim=1)
    return GaussianMixture([1.0] * modes, means, 0.01 * torch.eye(2).expand(modes, 2, 2))


class Nothing(nn.Module):
    """A network for images that takes almost no time: the last components times a parameter."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs, self.scale = outputs, nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor, clock: Tensor) -> Tensor:
        return self.scale * z[:, -self.outputs :]


def unet(sde: LinearSDE, shape: tuple[int, ...]) -> UNet:
    """A U-Net of about a million parameters."""
    network = UNet(shape, sde.components, len(sde.driven), channels=(32, 48, 80))
    assert 0.8e6 < parameter_count(network) < 1.2e6
    return network
