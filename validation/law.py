"""Whether a solver samples the right law where the score bends and data have several dimensions."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cldsde.solvers import solve
from cldsde.solvers.authoring import Solver
from cldsde.solvers.grids import quadratic_times

from .checks import Check
from .order_estimate import Verdict
from .problems import Problem

__all__ = ["LawCase", "law_check"]

_BATCHES = 20  # of a solver's samples
_EXACT = 20  # exact samples for each of a solver's
_ERRORS = 5  # standard errors: of a thousand statistics one in a thousand runs falls out
_SLACK = 2  # what is left out where an error is extrapolated from two grids
_WIDE = 0.5  # of what one sample scatters: an extrapolated error above it says too little
_LOOKS = 3  # at pairs of grids, each twice as fine as the one before
_MISPLACED = 0.15  # share of a law that a solver without an order may have elsewhere
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
    scatter
        Standard deviations of what one sample adds to the statistics.
    floor, spread
        Mean and standard deviation of the sliced Wasserstein-2 distance of two exact samples.
    size
        Standard deviation of the law, over directions: its distance from a point.
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
        self.scatter = found.std(0) * math.sqrt(samples / _BATCHES)
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
        self.size = float(self.reference.var(0).mean().sqrt())

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

    def misplaced(self, projected: Tensor) -> float:
        """Share of the law that is elsewhere: Kolmogorov's distance, over directions."""
        found = []
        for own, exact in zip(projected.T.contiguous(), self.reference.T.contiguous(), strict=True):
            at = torch.cat([own, exact])
            shares = [torch.searchsorted(x, at, right=True) / len(x) for x in (own, exact)]
            found.append((shares[0] - shares[1]).abs().max())
        return float(torch.stack(found).square().mean().sqrt())

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


class _Comparison(NamedTuple):
    """Statistics of a solver on two grids against the exact ones; the last one is the distance."""

    ratio: Tensor  # of what the finer grid is off to what is allowed
    allowed: Tensor
    growth: Tensor  # of the error from the coarser to the finer grid, in standard errors
    wide: bool  # whether an extrapolated error is as large as the law itself


def law_check(
    name: str,
    solver: Solver,
    problem: Problem,
    case: LawCase,
    g: torch.Generator,
    began: float,
    *,
    steps: int,
) -> Check:
    """Whether samples of a solver are of the law at the end, but for the error of its order.

    Each statistic of a `LawCase`, and the distance between samples, may be off by twice what the
    difference of two grids says is left at the finer one, for the order that the solver declares,
    and by 5 standard errors of both. It fails, too, where an error grows from the coarser to the
    finer grid by more than 5 standard errors: the difference of the two would cover it. Where the
    difference says too little, as it is as large as the law, finer grids are looked at, and where
    they do not help the check comes to no conclusion. Of solvers that choose their times two
    tolerances take the place of grids.

    A solver that declares no order is held to the law as a whole: at most 15 % of it, as seen along
    a direction, may be elsewhere.

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
    evaluations = 0

    def run(n: int, factor: float = 1) -> Tensor:
        nonlocal evaluations
        taken = _with_tolerance(solver, factor) if facts.adaptive else solver
        times = quadratic_times(problem.start, problem.end, n)
        noise = torch.Generator().manual_seed(seed)
        found = solve(problem.process, taken, start, times, generator=noise, warn=False)
        if not found.success:
            raise ArithmeticError(found.message)
        evaluations = found.nfev
        return found.state

    # A method of a strong order has at least that order in law.
    order = facts.weak_order or facts.ode_order or facts.strong_order
    if order is None and not facts.adaptive:
        fine = run(steps)
        share = case.misplaced(case.projected(fine))
        ratio, verdict = share / _MISPLACED, Verdict.PASS if share <= _MISPLACED else Verdict.FAIL
        text = (
            "declares no order and is held to the law as a whole: "
            f"{share:.1%} of it is elsewhere, {_MISPLACED:.0%} at most"
        )
    else:
        # The error of a step is held to the tolerance, so that four times the tolerance are at
        # least twice the step for a method whose error estimate is of order 2 or less, and what it
        # leaves halves.
        left = 1 / (2 ** (1 if facts.adaptive or order is None else order) - 1)
        coarse, fine = run(steps // 2, 4), run(steps)
        compared = _compared(case, coarse, fine, left)
        looks = 1 if facts.adaptive else _LOOKS
        while _judge(compared) is Verdict.INCONCLUSIVE and looks > 1:
            looks, steps = looks - 1, 2 * steps
            coarse, fine = fine, run(steps)
            compared = _compared(case, coarse, fine, left)
        ratio, verdict = float(compared.ratio.max()), _judge(compared)
        text = _in_words(case, coarse, fine, compared)
    distance = case.distance(case.projected(fine))
    modes = len(problem.data.weights)
    off = float((case.statistics(fine) / case.expected - 1)[-modes:].square().mean().sqrt())
    return Check(
        kind="law",
        subject=name,
        problem=problem.name,
        declared=None,
        measured=ratio,
        verdict=verdict,
        message=(
            f"sliced W₂ {distance:.2g} ({case.floor:.2g} between exact samples), spread of modes "
            f"off by {off:.1%} with {evaluations} evaluations; {text}"
        ),
        seconds=time.perf_counter() - began,
    )


def _compared(case: LawCase, coarse: Tensor, fine: Tensor, left: float) -> _Comparison:
    first, second = (case.statistics(z) for z in (coarse, fine))
    apart = (first - second).abs()
    # What is left has an error, too, that of a difference of two samples.
    errors = case.error * math.sqrt(1 + 2 * left**2)
    off, before = ((found - case.expected).abs() for found in (second, first))
    projected = [case.projected(z) for z in (coarse, fine)]
    between = max(case.distance(*projected) ** 2 - case.floor**2, 0.0) ** 0.5
    distances = [case.distance(p) for p in projected]
    limit = case.floor + _ERRORS * case.spread + _SLACK * left * between
    allowed = _with(_ERRORS * errors + _SLACK * left * apart, limit)
    growth = _with((off - before) / case.error, (distances[1] - distances[0]) / case.spread)
    extrapolated = _SLACK * left * _with(apart / case.scatter, between / case.size)
    return _Comparison(
        ratio=_with(off, distances[1]) / allowed,
        allowed=allowed,
        growth=growth,
        wide=not bool((extrapolated <= _WIDE).all()),
    )


def _with(statistics: Tensor, distance: float) -> Tensor:
    return torch.cat([statistics, statistics.new_tensor([distance])])


def _judge(compared: _Comparison) -> Verdict:
    # What is not a number is in no order: it fails.
    near = bool((compared.ratio <= 1).all() and (compared.growth <= _ERRORS).all())
    if not near:
        return Verdict.FAIL
    return Verdict.INCONCLUSIVE if compared.wide else Verdict.PASS


def _in_words(case: LawCase, coarse: Tensor, fine: Tensor, compared: _Comparison) -> str:
    """The statistic that is nearest to its limit, or beyond it."""
    names = [*case.names, "sliced W₂"]
    exact = _with(case.expected, 0.0)
    first, second = (
        _with(case.statistics(z), case.distance(case.projected(z))) for z in (coarse, fine)
    )
    worst, grown = int(compared.ratio.argmax()), int(compared.growth.argmax())
    if not float(compared.growth[grown]) <= _ERRORS:
        i, text = grown, f"not the law: errors grow as steps shrink, {names[grown]} is "
        text += f"{float(second[i]):.4g} and {float(first[i]):.4g} with half the steps, "
        return text + f"exactly {float(exact[i]):.4g}"
    text = f"{names[worst]} is {float(second[worst]):.4g}, exactly {float(exact[worst]):.4g} "
    text += f"± {float(compared.allowed[worst]):.1g}"
    verdict = _judge(compared)
    if verdict is Verdict.FAIL:
        return f"not the law: {text}"
    return (
        text if verdict is Verdict.PASS else f"grids differ by as much as the law is wide: {text}"
    )


def _with_tolerance(solver: Solver, factor: float) -> Any:
    """The same solver at a multiple of its tolerances."""
    try:
        rtol, atol = solver.rtol, solver.atol  # type: ignore[attr-defined]
        return dataclasses.replace(solver, rtol=factor * rtol, atol=factor * atol)  # type: ignore[type-var]
    except (AttributeError, TypeError) as error:
        msg = "it is adaptive, so it must be a dataclass with fields rtol and atol"
        raise TypeError(msg) from error
