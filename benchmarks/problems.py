"""Processes and scores that the benchmarks share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cldsde import GaussianMixture

__all__ = ["Nothing", "VelocityScore", "gaussian", "ring"]


def gaussian() -> GaussianMixture:
    """One Gaussian in two dimensions, correlated and off centre."""
    return GaussianMixture([1.0], [[0.3, -0.2]], [[[0.25, 0.1], [0.1, 0.16]]])


def ring(modes: int = 8) -> GaussianMixture:
    """Narrow modes on a circle."""
    angle = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
    means = torch.stack([angle.cos(), angle.sin()], dim=1)
    return GaussianMixture([1.0] * modes, means, 0.01 * torch.eye(2).expand(modes, 2, 2))


class VelocityScore:
    """The score that costs nothing: the velocity itself, a view; what is timed is the solver."""

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        return z[:, 1:]

    def tabulate(self, times: Tensor, like: Tensor) -> VelocityScore:
        return self


class Nothing(nn.Module):
    """A network of images that does nothing: the driven part of the state, times a parameter."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs, self.scale = outputs, nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor, clock: Tensor) -> Tensor:
        del clock
        return self.scale * z[:, -self.outputs :]
