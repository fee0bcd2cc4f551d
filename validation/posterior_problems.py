"""Inverse problems whose posterior is known exactly: mixtures of Gaussians, linear observations."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from cldsde.linear.checks import check_positive
from cldsde.linear.kappa import times_of_kappa
from cldsde.linear.sde import LinearSDE
from cldsde.messages import Named
from cldsde.score import GaussianMixture, Observation
from cldsde.solvers.grids import root_times

_END_LEVEL = 0.1


@dataclass(frozen=True, eq=False)
class PosteriorProblem:
    """Data whose distribution is a mixture of Gaussians, and a linear observation of them."""

    name: str  #: Name in reports.
    data: GaussianMixture
    observation: Observation  #: Observation of data of shape ``(D,)``.

    @cached_property
    def posterior(self) -> GaussianMixture:
        """The exact posterior."""
        return self.data.condition(self.observation)

    def times(self, sde: LinearSDE, steps: int) -> Tensor:
        """Grid (`root_times`) that ends where the state hardly blurs the posterior any more.

        There the noise of the best estimate of the data from the state is a tenth of the
        posterior's smallest standard deviation. The noise of the data component widens this
        deviation by half a per cent under VP. For an observation with the noise 0.1 it widens it by
        2 % under CLD, and by up to 10 % under HOLD.
        """
        smallest = float(torch.linalg.eigvalsh(self.posterior.covariances).min())
        end = times_of_kappa(sde, -0.5 * math.log(_END_LEVEL**2 * smallest))
        return root_times(1.0, float(end), steps)

    def observe(self, generator: torch.Generator) -> tuple[Tensor, PosteriorProblem]:
        """Draw data ``(1, D)`` and the same problem with an observation of them."""
        x = self.data.sample(1, generator=generator, dtype=torch.float64)
        seen = self.observation
        y = seen.forward(x)
        y = (y + seen.noise_std * _normals(generator, *y.shape))[0]
        return x, replace(self, observation=seen.with_y(y))


def posterior_problems(noise_std: float = 0.1) -> dict[str, PosteriorProblem]:
    """Problems with exact posteriors, by name.

    ``"two modes"``: both coordinates of two modes in the plane are observed by their sum, which
    tells little of the mode. ``"wide modes"`` and ``"narrow modes"``: 25 components in eight
    dimensions that overlap or do not, two numbers observed. ``"mask"``: smooth series of 64
    numbers, of which every eighth is observed. ``"one Gaussian"``: four dimensions seen through a
    square matrix, for which moment matching is exact.

    Parameters
    ----------
    noise_std
        Standard deviation of the observation's noise, > 0; ValueError otherwise. Numbers of the
        data have about unit variance.
    """
    check_positive(noise_std, "noise_std")
    made = (
        _two_modes(noise_std),
        _many_modes("wide modes", 0.3, noise_std),
        _many_modes("narrow modes", 0.1, noise_std),
        _masked_series(noise_std),
        _one_gaussian(noise_std),
    )
    return Named({problem.name: problem for problem in made})


def _normals(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")


def _draw(data: GaussianMixture) -> Tensor:
    """One of the first draws of the data, which is explained by several components."""
    return data.sample(1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)[0]


def _two_modes(noise_std: float) -> PosteriorProblem:
    means = torch.tensor([[-1.0, 0.8], [1.0, -0.6]], dtype=torch.float64, device="cpu")
    covariances = torch.tensor(
        [[[0.09, 0.03], [0.03, 0.16]], [[0.16, -0.04], [-0.04, 0.09]]], device="cpu"
    )
    data = GaussianMixture([0.6, 0.4], means, covariances.double())
    y = torch.tensor([0.2], dtype=torch.float64, device="cpu")
    return PosteriorProblem("two modes", data, Observation.matrix([[1.0, 1.0]], y, noise_std))


def _many_modes(name: str, width: float, noise_std: float) -> PosteriorProblem:
    g = torch.Generator().manual_seed(25)
    means, A = _normals(g, 25, 8), _normals(g, 2, 8) / math.sqrt(8)
    covariances = width**2 * torch.eye(8, device="cpu").expand(25, 8, 8)
    data = GaussianMixture([1.0] * 25, means, covariances)
    y = A @ _draw(data) + noise_std * _normals(g.manual_seed(102), 2)
    return PosteriorProblem(name, data, Observation.matrix(A, y, noise_std))


def _masked_series(noise_std: float) -> PosteriorProblem:
    place = torch.arange(64, dtype=torch.float64, device="cpu")
    distance = (place - place.unsqueeze(1)).abs()
    # Correlated over 8 places, about two waves and a line.
    covariances = 0.7 * (-distance / 8.0).exp().expand(3, 64, 64)
    wave = (place * math.pi / 32).sin()
    means = 0.5 * torch.stack([wave, -wave, place / 32 - 1])
    data = GaussianMixture([1.0, 1.0, 1.0], means, covariances)
    y = _draw(data) + noise_std * _normals(torch.Generator().manual_seed(164), 64)
    return PosteriorProblem("mask", data, Observation.mask(place % 8 == 4, y, noise_std))


def _one_gaussian(noise_std: float) -> PosteriorProblem:
    root = _normals(torch.Generator().manual_seed(4), 4, 4) / 2
    covariance = root @ root.mT + 0.1 * torch.eye(4, device="cpu")
    data = GaussianMixture([1.0], [[0.0] * 4], covariance.unsqueeze(0))
    # Each number of y is a number of x plus half the next: a matrix unlike its transpose.
    ones = torch.ones(4, dtype=torch.float64, device="cpu")
    A = ones.diag() + 0.5 * ones[1:].diag(1)
    y = torch.tensor([0.5, -0.5, 1.0, 0.0], dtype=torch.float64, device="cpu")
    return PosteriorProblem("one Gaussian", data, Observation.matrix(A, y, noise_std))
