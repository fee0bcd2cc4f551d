"""Simulation-based calibration: ranks of the truth among posterior samples."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cldsde.linear import CLD, LinearSDE
from cldsde.score import ReverseProcess

from .posterior_methods import PosteriorSampler, posterior_methods
from .posterior_problems import PosteriorProblem

__all__ = ["Calibration", "calibration_ranks"]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Ranks of the truth among posterior samples, which are uniform if the sampler is exact.

    Attributes
    ----------
    ranks
        ``(draws, D + m)`` in [0, 1]: of the D numbers of the data, then of the m of A x.
    p_values
        ``(D + m,)``, of the Kolmogorov–Smirnov test of each for uniformity.
    """

    ranks: Tensor = field(repr=False)
    p_values: Tensor

    @property
    def p_value(self) -> float:
        """Smallest p-value times their number (Bonferroni), at most 1."""
        return min(1.0, float(self.p_values.min()) * len(self.p_values))


def calibration_ranks(
    method: str | PosteriorSampler,
    problem: PosteriorProblem,
    *,
    sde: LinearSDE | None = None,
    draws: int = 100,
    samples: int = 50,
    steps: int = 50,
    seed: int = 0,
) -> Calibration:
    """Test a posterior sampler where the exact posterior is not needed: by simulation.

    Data are drawn, observed, and sampled given the observation. If the samples are from the
    posterior, the truth is one more of them: its rank among them is uniform, in every number of the
    data and of A x.

    Parameters
    ----------
    method
        A name of `posterior_methods`, or a sampler of one's own.
    problem
        Its y is not used: each draw has one of its own.
    sde
        The forward process; None is `CLD`.
    draws
        Data that are drawn.
    samples
        Posterior samples of each.
    steps
        Steps of the grid, as in `posterior_error`.
    seed
        Of all that is drawn.

    References
    ----------
    S. Talts et al., *Validating Bayesian inference algorithms with simulation-based calibration*,
    2018.
    """
    from scipy.stats import kstest  # slow to import

    sampler = posterior_methods()[method].sampler if isinstance(method, str) else method
    sde = CLD() if sde is None else sde
    times = problem.times(sde, steps)
    process = ReverseProcess(sde, problem.data.score(sde))
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(draws):
        truth, drawn = problem.observe(g)
        found = sampler(process, drawn.observation, times, samples, g)
        x, weights = found if isinstance(found, tuple) else (found, None)
        mass = torch.full((len(x),), 1 / len(x)) if weights is None else weights
        below = (_numbers(drawn, x) < _numbers(drawn, truth)).double()
        # The truth takes one of samples + 1 places; a uniform number makes its rank continuous.
        jitter = torch.rand(below.shape[1], generator=g, dtype=torch.float64)
        rows.append((samples * (mass.double() @ below) + jitter) / (samples + 1))
    ranks = torch.stack(rows)
    p_values = [float(kstest(column.numpy(), "uniform").pvalue) for column in ranks.mT]
    return Calibration(ranks, torch.tensor(p_values, dtype=torch.float64))


def _numbers(problem: PosteriorProblem, x: Tensor) -> Tensor:
    x = x.double()
    return torch.cat([x, problem.observation.forward(x)], 1)
