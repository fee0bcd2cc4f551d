"""Simulation-based calibration of posterior samplers, by ranks of the truth."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cldsde.linear import CLD, LinearSDE
from cldsde.score import ReverseProcess

from .posterior_methods import PosteriorSampler, posterior_methods
from .posterior_problems import PosteriorProblem


@dataclass(frozen=True, eq=False)
class Calibration:
    """Ranks of the truth among posterior samples, which are uniform for an exact sampler."""

    #: ``(draws, D + m)`` in [0, 1]: ranks of the D numbers of the data, then of the m numbers of
    #: A x.
    ranks: Tensor = field(repr=False)
    p_values: Tensor  #: ``(D + m,)``: p-values of the Kolmogorov–Smirnov test for uniformity.

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
    """Simulation-based calibration: test a posterior sampler without the exact posterior.

    Data are drawn and observed, and the sampler is run on each observation. If the sampler is
    exact, the truth has the distribution of the samples. Its rank among them is then uniform, for
    every number of the data and of A x.

    Parameters
    ----------
    method, sde, steps, seed
        See `posterior_error`.
    problem
        The problem. Its y is not used, because each draw has an observation of its own.
    draws, samples
        Numbers of data points drawn, and of posterior samples per data point.

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
        mass = x.new_full((len(x),), 1 / len(x)) if weights is None else weights
        below = (_numbers(drawn, x) < _numbers(drawn, truth)).double()
        # The truth has one of samples + 1 ranks; a uniform number makes the rank continuous.
        jitter = torch.rand(below.shape[1], generator=g, dtype=torch.float64, device="cpu")
        rows.append((samples * (mass.double() @ below) + jitter) / (samples + 1))
    ranks = torch.stack(rows)
    p_values = [float(kstest(column.numpy(), "uniform").pvalue) for column in ranks.mT]
    return Calibration(ranks, torch.tensor(p_values, dtype=torch.float64, device="cpu"))


def _numbers(problem: PosteriorProblem, x: Tensor) -> Tensor:
    x = x.double()
    return torch.cat([x, problem.observation.forward(x)], 1)
