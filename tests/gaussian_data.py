"""Processes with the Gaussian data N(0.3, 0.25): solvers against their exact moments and flows."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch

import references
from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, GaussianMixture, LinearSDE, ReverseProcess
from cldsde.solvers.authoring import Solver
from cldsde.validation import propagate_moments
from references import Dense, dense
from references.float64 import Array

DATA = GaussianMixture([1.0], [[0.3]], [[[0.25]]])
PROCESSES: dict[str, tuple[LinearSDE, Dense]] = {
    "VP": (VPSDE(0.1, 8.0), dense(references.vp(0.1, 8.0))),
    "VE": (VESDE(0.1, 5.0), dense(references.ve(0.1, 5.0))),
    "CLD": (CLD(), dense(references.cld())),
    "CLD, linear": (CLD((1.0, 7.0)), dense(references.cld((1.0, 7.0)))),
    "PSLD": (PSLD(), dense(references.psld())),
    "HOLD": (HOLD(), dense(references.hold())),
}
# One of each process, with a schedule that is not constant where there is a choice.
EVERY = ["VP", "VE", "CLD, linear", "PSLD", "HOLD"]
# Errors c h^p (1 + d h + ...) have the slope p + d h / (2 log 2) between h and h / 2. A quarter
# leaves room for the second term; a declaration that is off by a half is further away.
SLOPE = 0.25


def reverse(name: str, wrap: Any = lambda score: score) -> ReverseProcess:
    """The reverse process with the exact score, which may be wrapped."""
    sde = PROCESSES[name][0]
    return ReverseProcess(sde, wrap(DATA.score(sde)))


def moments(
    solver: Solver, pair: tuple[LinearSDE, Dense], times: torch.Tensor, data: Any = DATA
) -> tuple[Array, Array]:
    """Moments at the end of the grid, from the exact ones at its start; the pair is of the data."""
    (sde, exact), T = pair, float(times[0])
    start = torch.from_numpy(exact.mean(T))[:, None], torch.from_numpy(exact.covariance(T))
    m, C = propagate_moments(ReverseProcess(sde, data.score(sde)), solver, times, *start)
    return m[:, 0].numpy(), C.numpy()


def moments_error(solver: Solver, name: str, times: torch.Tensor) -> float:
    """Error of the moments in a norm that is smooth in the steps: the largest entry is not."""
    (m, C), exact, end = moments(solver, PROCESSES[name], times), PROCESSES[name][1], times[-1]
    return math.hypot(*map(np.linalg.norm, (m - exact.mean(end), C - exact.covariance(end))))


@functools.cache
def moves(name: str, end: float) -> tuple[Array, float]:
    """Matrix of the flow from 1 to an end, and the most that it stretches an error on the way."""
    found = PROCESSES[name][1].flow(1.0, *np.linspace(1.0, end, 50)[1:])
    return found[-1], float(np.linalg.norm(found[-1] @ np.linalg.inv(found), 2, axis=(1, 2)).max())


def flow(z: torch.Tensor, name: str, end: float) -> torch.Tensor:
    """The exact end of the flow from the states at 1."""
    exact, (move, _) = PROCESSES[name][1], moves(name, end)
    away = z.double().numpy() - exact.mean(1.0)[:, None]
    return torch.from_numpy(exact.mean(end)[:, None] + move @ away)


def check_flow(
    found: torch.Tensor, z: torch.Tensor, name: str, end: float, steps: int, tolerance: float
) -> None:
    """Compare with the flow of states: each step errs by the tolerance at most.

    The tolerance is in units of 1 + |z|, a root mean square over all numbers that share a step
    length, and the flow stretches errors.
    """
    expected, growth = flow(z, name, end), moves(name, end)[1]
    bound = steps * tolerance * (1 + float(z.abs().max())) * math.sqrt(z.numel()) * growth
    assert (found - expected).abs().max() <= bound < 0.05 * float(expected.abs().max())
