"""Tools for tests of solvers: states to start from, and scores and contexts that watch."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import nn

from cldsde import LinearSDE, solvers
from cldsde.solvers.base import Solver
from cldsde.solvers.named import validated_solvers
from tolerances import standard_error

# For properties that are parametrised besides: a few examples of each case are many.
few_examples = settings(max_examples=max(3, settings.default.max_examples // 10))
# Options of multistep solvers as published, and schemes of splitting.
PUBLISHED = {"variable": "kappa", "weights": "published"}
WORDS = ["OBA", "BAO", "OBAB", "BAOAB", "OABAO", "BOAOB", "ABOBAOB"]


def name_of_case(case: object) -> str:
    """A case in words without addresses, which differ between the processes of pytest-xdist."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(case))


def named_solvers(tolerance: float = 0.1) -> dict[str, Solver]:
    """Named solvers, one of each kind; adaptive ones with a tolerance that needs few attempts."""
    loose = {"rtol": tolerance, "atol": tolerance}
    return {
        name: dataclasses.replace(solver, **loose) if solver.facts.adaptive else solver
        for name, solver in validated_solvers().items()
    }


def tensor(value: Any) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def normals(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def norm(matrices: torch.Tensor) -> float:
    """Largest spectral norm."""
    return float(torch.linalg.matrix_norm(matrices, 2).max())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(
    sde: LinearSDE, shape: tuple[int, ...] = (3, 2), dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """States of the prior, always the same."""
    return sde.prior.sample(shape, generator=generator(9), dtype=dtype)


def check_normal(z: torch.Tensor, covariance: torch.Tensor, mean: Any = 0.0) -> None:
    """Samples ``(n, k)`` have the moments of a normal distribution, within 5 standard errors.

    The variances of sample moments are S_ii of a mean, S_ii S_jj + S_ij^2 of a covariance.
    """
    variance, error, away = covariance.diagonal(), standard_error(1.0, len(z), 5), z - mean
    assert (away.mean(0).abs() <= error * variance.sqrt()).all()
    spread = (variance[:, None] * variance + covariance**2).sqrt()
    assert ((away.mT @ away / len(z) - covariance).abs() <= error * spread).all()


def hidden_times(sde: LinearSDE) -> list[float]:
    """Times at which the driven row of Sigma^-1 psi changes its sign: the score hides x_0."""
    t = torch.linspace(0.02, 1.0, 4001, dtype=torch.float64)
    kernel = sde.marginal(t)
    b = torch.linalg.solve(kernel.covariance, kernel.mean[..., :1])[:, sde.driven[0], 0]
    return t[:-1][(b[1:] * b[:-1]) < 0].tolist()


def untouchable(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A score that must not be evaluated."""
    pytest.fail("the score was evaluated")


class Smooth(nn.Module):
    """A smooth nonlinear score that acts on each number alone, as large as the prior's at T."""

    def __init__(self, sde: LinearSDE) -> None:
        super().__init__()
        self.driven = sde.driven
        self.spread = float(sde.prior.covariance.diagonal().max())
        self.slope = nn.Parameter(torch.ones((), dtype=torch.float64, device="cpu"))

    def forward(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        driven = torch.stack([z[:, i] for i in self.driven], dim=1)
        clock = t.reshape(-1, *(1,) * (z.ndim - 1))
        return 0.1 * driven.sin() - self.slope * driven / (0.3 + self.spread * clock.square())


class Recording:
    """A plain score that remembers the states and times that it was evaluated at."""

    def __init__(self, score: Any) -> None:
        self.score = score
        self.given: list[torch.Tensor] = []  # the states themselves, which nobody may change
        self.states: list[torch.Tensor] = []
        self.times: list[torch.Tensor] = []

    def __call__(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.given.append(z)
        self.states.append(z.clone())
        self.times.append(t.clone())
        result: torch.Tensor = self.score(z, t)
        return result

    @property
    def calls(self) -> int:
        return len(self.times)


def noting(calls: list[Any]) -> Any:
    """A callback that adds its arguments to a list."""

    def note(step: int, t: Any, z: torch.Tensor) -> None:
        state = z.view(-1).view(z.shape).clone()  # states are in one piece
        calls.append((step, t.clone() if isinstance(t, torch.Tensor) else t, state))

    return note


class Recorder(solvers.NoiseSource):
    """Normals of a source, and a record of them, which sources may share."""

    def __init__(self, source: Any = None, draws: list[torch.Tensor] | None = None) -> None:
        self.source = source or solvers.FreshNoise(generator(4))
        self.draws = [] if draws is None else draws

    def normal(self, z: torch.Tensor, rows: int) -> torch.Tensor:
        self.draws.append(self.source.normal(z, rows))
        return self.draws[-1]


class Own(solvers.NoiseSource):
    """A user's source that returns the draw that it was made with."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def normal(self, z: torch.Tensor, rows: int) -> Any:
        return self.draw
