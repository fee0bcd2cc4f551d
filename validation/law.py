"""Whether a solver samples the right law where the score bends and data have several dimensions."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import torch
from torch import Tensor

from cldsde.solvers import Integrator, Solver, solve
from cldsde.solvers.grids import quadratic_times

from .checks import Check
from .order_estimate import Verdict
from .problems import Problem

__all__ = ["LawCase", "law_check"]

_BATCHES = 20  # of a solver's samples
_EXACT = 10  # exact samples for each of a solver's
_ERRORS = 5  # standard errors: of a thousand statistics one in a thousand runs falls out
_SLACK = 2  # what is left out where an error is extrapolated from two grids
_DIRECTIONS = 32


class LawCase:
    """Statistics of the exact law of a mixture at the end, as samples of one size have them.

    Parameters
    ----------
    problem
        A mixture.
    samples
        Number of samples of a solver, a multiple of 20.
    generator
        Where exact samples come from.

    Attributes
    ----------
    names
        Of the statistics: means and covariances of the state, and shares and standard deviations of
        the modes, each with the points that are nearest to its mean.
    expected, error
        Mean of the statistics, and the standard error of a solver's difference from it.
    floor, spread
        Mean and standard deviation of the sliced Wasserstein-2 distance of two exact samples.
    """

    def __init__(self, problem: Problem, samples: int, generator: torch.Generator) -> None:
        self.samples, self._problem = samples, problem
        size = problem.sde.components * problem.dimension
        modes = range(1, len(problem.data.weights) + 1)
        self._upper = torch.triu_indices(size, size)
        self.names = [
            *(f"mean {i}" for i in range(1, size + 1)),
            *(f"covariance {i + 1},{j + 1}" for i, j in self._upper.T.tolist()),
            *(f"share of mode {i}" for i in modes),
            *(f"spread of mode {i}" for i in modes),
        ]
        exact = [problem.sample(samples, generator, at=problem.end) for _ in range(_EXACT)]
        found = torch.cat([self._batches(z) for z in exact])
        self.expected = found.mean(0)
        self.error = found.std(0) * math.sqrt(1 / _BATCHES + 1 / len(found))
        if problem.dimension == 1:
            self._directions = torch.ones(1, 1, dtype=torch.float64)
        else:
            draw = torch.randn(
                problem.dimension, _DIRECTIONS, dtype=torch.float64, generator=generator
            )
            self._directions = draw / draw.norm(dim=0)
        self.reference = self.projected(exact[0])
        distances = torch.tensor([self.distance(self.projected(z)) for z in exact[1:]])
        self.floor, self.spread = float(distances.mean()), float(distances.std())

    def statistics(self, z: Tensor) -> Tensor:
        """Means over batches of the statistics of states ``(samples, k, D)``."""
        return self._batches(z).mean(0)

    def projected(self, z: Tensor) -> Tensor:
        """The data of states on each direction, sorted."""
        return (z[:, 0] @ self._directions).sort(0).values

    def distance(self, projected: Tensor, other: Tensor | None = None) -> float:
        """Sliced Wasserstein-2 distance of two samples, by default to an exact one."""
        other = self.reference if other is None else other
        return float((projected - other).square().mean().sqrt())

    def _batches(self, z: Tensor) -> Tensor:
        """Statistics ``(batches, statistics)`` of batches, not of all: roots are biased alike."""
        problem = self._problem
        batched = z.reshape(_BATCHES, -1, *z.shape[1:])
        flat = batched.flatten(2)
        means = flat.mean(1)
        centred = flat - means.unsqueeze(1)
        covariances = centred.mT @ centred / flat.shape[1]
        centres = float(problem.sde.marginal(problem.end).mean[0, 0]) * problem.data.means.to(z)
        squares = (batched[:, :, 0].unsqueeze(2) - centres).square().mean(-1)
        distance, mode = squares.min(-1)
        member = torch.nn.functional.one_hot(mode, len(centres)).to(z)
        count = member.sum(1)
        spread = ((member * distance.unsqueeze(-1)).sum(1) / count.clamp_min(1)).sqrt()
        upper = covariances[:, self._upper[0], self._upper[1]]
        return torch.cat([means, upper, count / flat.shape[1], spread], dim=1)


def law_check(
    name: str,
    solver: Solver | Integrator,
    problem: Problem,
    case: LawCase,
    g: torch.Generator,
    began: float,
    *,
    steps: int,
) -> Check:
    """Whether samples of a solver are of the law at the end, but for the error of its order.

    Each statistic of a `LawCase` may be off by twice what the difference of two grids says is left
    at the finer one, for the order that the solver declares, and by 5 standard errors of both. Of
    solvers that choose their times two tolerances take the place of grids.

    Parameters
    ----------
    name, solver, problem
        What is checked, and where.
    case
        The exact law.
    g
        Source of starts and noise.
    began
        When the clock was started.
    steps
        Steps of the finer grid; the other has half.
    """
    facts = solver.facts
    start, seed = problem.sample(case.samples, g), int(torch.randint(2**62, (), generator=g))
    ends, evaluations = [], 0
    for fine in (False, True):
        taken = _with_tolerance(solver, 1 if fine else 4) if facts.adaptive else solver
        times = quadratic_times(problem.start, problem.end, steps if fine else steps // 2)
        noise = torch.Generator().manual_seed(seed)
        found = solve(problem.process, taken, start, times, generator=noise)
        if not found.success:
            raise ArithmeticError(found.message)
        ends.append(found.state)
        evaluations = found.nfev
    # Where nothing is declared, the lowest order of the usual ones.
    order = facts.weak_order or facts.ode_order or 0.5
    # The error of a step is held to the tolerance, so that four times the tolerance are at least
    # twice the step for a method whose error estimate is of order 2 or less, and what it leaves
    # halves.
    left = 1 / (2 ** (1 if facts.adaptive else order) - 1)
    coarse, fine_ = (case.statistics(z) for z in ends)
    # What is left has an error, too, that of a difference of two samples.
    errors = case.error * math.sqrt(1 + 2 * left**2)
    allowed = _ERRORS * errors + _SLACK * left * (coarse - fine_).abs()
    ratios = (fine_ - case.expected).abs() / allowed
    projected = [case.projected(z) for z in ends]
    distance = case.distance(projected[1])
    between = max(case.distance(*projected) ** 2 - case.floor**2, 0.0) ** 0.5
    limit = case.floor + _ERRORS * case.spread + _SLACK * left * between
    worst = int(ratios.argmax())
    modes = len(problem.data.weights)
    off = float((fine_ / case.expected - 1)[-modes:].square().mean().sqrt())
    passed = bool((ratios <= 1).all()) and distance <= limit
    message = (
        f"sliced W₂ {distance:.2g} ({case.floor:.2g} between exact samples), "
        f"spread of modes off by {off:.1%} with {evaluations} evaluations; "
        + ("" if passed else "not the law: ")
        + f"{case.names[worst]} is {float(fine_[worst]):.4g}, exactly "
        f"{float(case.expected[worst]):.4g} ± {float(allowed[worst]):.1g}"
    )
    return Check(
        kind="law",
        subject=name,
        problem=problem.name,
        declared=limit,
        measured=distance,
        verdict=Verdict.PASS if passed else Verdict.FAIL,
        message=message,
        seconds=time.perf_counter() - began,
    )


def _with_tolerance(solver: Solver | Integrator, factor: float) -> Any:
    """The same solver at a multiple of its tolerances."""
    try:
        rtol, atol = solver.rtol, solver.atol  # type: ignore[union-attr]
        return dataclasses.replace(solver, rtol=factor * rtol, atol=factor * atol)  # type: ignore[type-var]
    except (AttributeError, TypeError) as error:
        msg = "it is adaptive, so it must be a dataclass with fields rtol and atol"
        raise TypeError(msg) from error
