"""Samplers of a posterior that are measured beside each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from cldsde.messages import Named
from cldsde.score import GaussianMixture, Observation, PosteriorScore, ReverseProcess
from cldsde.score.mixture import MixtureScore
from cldsde.score.posterior_score import PosteriorMethod as _Approximation
from cldsde.solvers import ExponentialMultistep, Imputation, sample_posterior, solve

PosteriorSampler = Callable[
    [ReverseProcess, Observation, Tensor, int, torch.Generator], Tensor | tuple[Tensor, Tensor]
]
"""sampler(process, observation, times, n, generator) to samples ``(n, D)``, or to samples and their
weights ``(n,)``. The process has the exact score of the data, without the observation."""

_SOLVER = ExponentialMultistep(order=2, stochasticity=1.0)


@dataclass(frozen=True, kw_only=True)
class PosteriorMethod:
    """A posterior sampler and its claim."""

    sampler: PosteriorSampler
    #: For which data it claims the exact posterior: all, a single Gaussian, or none.
    exact: Literal["always", "gaussian", "never"]


def posterior_methods() -> dict[str, PosteriorMethod]:
    """The package's samplers of a posterior, by name.

    - ``"exact"``: the score of `GaussianMixture.condition` on the multistep solver; only the
      solver's error remains.
    - ``"twisted"``: `sample_posterior`, n particles in one run.
    - ``"moments"`` (three iterations), ``"pigdm"``, ``"dps"``: `PosteriorScore` on that solver.
    - ``"replacement"``: `Imputation` of the observed directions on that solver.
    """
    samplers = {
        "exact": PosteriorMethod(sampler=_exact, exact="always"),
        "twisted": PosteriorMethod(sampler=_twisted, exact="always"),
        "moments": PosteriorMethod(sampler=guided("moments"), exact="gaussian"),
        "pigdm": PosteriorMethod(sampler=guided("pigdm"), exact="never"),
        "dps": PosteriorMethod(sampler=guided("dps"), exact="never"),
        "replacement": PosteriorMethod(sampler=_replacement, exact="never"),
    }
    return Named(samplers)


def _start(process: ReverseProcess, n: int, g: torch.Generator) -> Tensor:
    size = (n, _data(process).dimension)
    return process.sde.prior.sample(size, generator=g, dtype=torch.float64)


def _data(process: ReverseProcess) -> GaussianMixture:
    return cast("MixtureScore", process.score).data


def _variance(process: ReverseProcess) -> float:
    """Mean variance of the numbers of the data."""
    data = _data(process)
    mean = data.weights @ data.means
    within = data.covariances.diagonal(dim1=1, dim2=2)
    return float((data.weights @ (within + (data.means - mean).square())).mean())


def _exact(
    process: ReverseProcess, observation: Observation, times: Tensor, n: int, g: torch.Generator
) -> Tensor:
    posterior = _data(process).condition(observation)
    reverse = ReverseProcess(process.sde, posterior.score(process.sde))
    return solve(reverse, _SOLVER, _start(process, n, g), times, generator=g).data


def guided(
    method: _Approximation,
    mistake: Callable[[Observation], Observation] = lambda observation: observation,
    **options: Any,
) -> PosteriorSampler:
    """`PosteriorScore` with these options, given the observation with a mistake, if any."""

    def sampler(
        process: ReverseProcess, observation: Observation, times: Tensor, n: int, g: torch.Generator
    ) -> Tensor:
        given = {"data_variance": _variance(process), **options}
        seen = mistake(observation)
        score = PosteriorScore(process.score, seen, method, sde=process.sde, **given)
        start, reverse = _start(process, n, g), ReverseProcess(process.sde, score)
        # That a method diverges is a result.
        return solve(reverse, _SOLVER, start, times, generator=g, warn=False).data

    return sampler


def _twisted(
    process: ReverseProcess, observation: Observation, times: Tensor, n: int, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    found = sample_posterior(
        process,
        observation,
        times,
        particles=n,
        generator=g,
        data_variance=_variance(process),
        dtype=torch.float64,
    )
    return found.samples, found.weights


def _replacement(
    process: ReverseProcess, observation: Observation, times: Tensor, n: int, g: torch.Generator
) -> Tensor:
    """Replace the observed directions of the state, as if y had no noise."""
    start = _start(process, n, g)
    left, singular, basis = torch.linalg.svd(observation.dense(start.shape[2:]))
    seen = torch.arange(len(basis), device="cpu") < len(singular)
    known = basis[: len(singular)].mT @ (left.mT @ observation.y.to(left) / singular)
    solver = Imputation(_SOLVER, known, seen, basis=basis)
    return solve(process, solver, start, times, generator=g, warn=False).data
