"""Check of a solver's sampled distribution on mixtures, where the score is nonlinear."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cldsde.solvers import solve
from cldsde.solvers.authoring import Solver
from cldsde.solvers.grids import quadratic_times

from .checks import Outcome
from .order_estimate import Verdict
from .problems import Problem

_BATCHES = 20  # batches of a solver's samples
_EXACT = 20  # number of exact sample sets of the size of a solver's
_ERRORS = 5  # allowed standard errors: with 1,000 statistics one run in 1,000 fails by chance
_SLACK = 2  # safety factor of an error that is extrapolated from two grids
_WIDE = 0.5  # largest conclusive _SLACK · extrapolated error, in units of a sample's spread
_PAIRS = 3  # number of pairs of grids, each twice as fine as the previous pair
_MISPLACED = 0.15  # allowed Kolmogorov distance of a solver that declares no order
_DIRECTIONS = 32


class DistributionCase:
    """Statistics of the exact distribution of a mixture at ε, for samples of one size.

    The statistics are means and covariances of the state, and weights and standard deviations of
    the modes. A point belongs to the mode with the nearest mean. The number of samples is a
    multiple of 20.
    """

    def __init__(self, problem: Problem, samples: int, generator: torch.Generator) -> None:
        self.samples, self._problem = samples, problem
        size = problem.sde.components * problem.dimension
        modes = range(1, len(problem.data.weights) + 1)
        self._upper = torch.triu_indices(size, size, device="cpu")
        self.names = [
            *(f"mean {i}" for i in range(1, size + 1)),
            *(f"covariance {i + 1},{j + 1}" for i, j in self._upper.T.tolist()),
            *(f"share of mode {i}" for i in modes),
            *(f"spread of mode {i}" for i in modes),
        ]
        exact = [problem.sample(samples, generator, at=problem.end) for _ in range(_EXACT)]
        found = torch.cat([self._batches(z) for z in exact])
        self.expected = found.mean(0)
        # The standard error of a solver's difference, and the spread of a single sample's part.
        self.error = found.std(0) * math.sqrt(1 / _BATCHES + 1 / len(found))
        self.scatter = found.std(0) * math.sqrt(samples / _BATCHES)
        if problem.dimension == 1:
            self._directions = torch.ones(1, 1, dtype=torch.float64, device="cpu")
        else:
            shape = problem.dimension, _DIRECTIONS
            draw = torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")
            self._directions = draw / draw.norm(dim=0)
        self.reference = self.projected(exact[0])
        distances = torch.tensor([self.distance(z) for z in exact[1:]], device="cpu")
        self.floor, self.spread = float(distances.mean()), float(distances.std())
        self.size = float(self.reference.var(0).mean().sqrt())

    def statistics(self, z: Tensor) -> Tensor:
        """Means over batches of the statistics of states ``(samples, k, D)``."""
        return self._batches(z).mean(0)

    def projected(self, z: Tensor) -> Tensor:
        """Projections of the data on each direction, sorted."""
        return (z[:, 0] @ self._directions).sort(0).values

    def distance(self, z: Tensor, other: Tensor | None = None) -> float:
        """Sliced Wasserstein-2 distance of two samples, by default to an exact one."""
        projected = self.reference if other is None else self.projected(other)
        return float((self.projected(z) - projected).square().mean().sqrt())

    def misplaced(self, z: Tensor) -> float:
        """Kolmogorov distance to an exact sample, root mean square over directions."""
        both = [x.T.contiguous() for x in (self.projected(z), self.reference)]
        at = torch.cat(both, dim=1)
        own, exact = (torch.searchsorted(x, at, right=True) / x.shape[1] for x in both)
        return float((own - exact).abs().amax(1).square().mean().sqrt())

    def _batches(self, z: Tensor) -> Tensor:
        """Statistics of each batch, ``(batches, statistics)``.

        Exact samples use batches of the same size, so that the bias of roots cancels.
        """
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
    """Statistics of a solver on two grids compared with exact ones; the last is the distance."""

    coarse: Tensor
    fine: Tensor
    allowed: Tensor  # allowed error on the finer grid
    ratio: Tensor  # error on the finer grid divided by the allowed error
    growth: Tensor  # growth of the error from the coarser to the finer grid, in standard errors
    verdict: Verdict


def distribution_check(
    solver: Solver, problem: Problem, case: DistributionCase, g: torch.Generator, *, steps: int
) -> Outcome:
    """Check that a solver samples the exact distribution, up to the error of its declared order.

    The tutorial "Validate a solver" describes the check.
    """
    facts = solver.facts
    start = problem.sample(case.samples, g)
    seed = int(torch.randint(2**62, (), generator=g, device="cpu"))
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

    # The weak order is at least as high as the strong order.
    order = facts.weak_order or facts.ode_order or facts.strong_order
    if order is None and not facts.adaptive:
        fine = run(steps)
        share = case.misplaced(fine)
        ratio, verdict = share / _MISPLACED, Verdict.PASS if share <= _MISPLACED else Verdict.FAIL
        text = (
            "declares no order and is compared with the distribution as a whole: Kolmogorov "
            f"distance {share:.1%}, allowed {_MISPLACED:.0%}"
        )
    else:
        # The tolerance bounds the error of a step. With an error estimate of order 2 or less, four
        # times the tolerance means at least twice the step, so the remaining error halves.
        left = 1 / (2 ** (1 if facts.adaptive or order is None else order) - 1)
        coarse, fine = run(steps // 2, 4), run(steps)
        compared = _compared(case, coarse, fine, left)
        pairs = 1 if facts.adaptive else _PAIRS
        while compared.verdict is Verdict.INCONCLUSIVE and pairs > 1:
            pairs, steps = pairs - 1, 2 * steps
            coarse, fine = fine, run(steps)
            compared = _compared(case, coarse, fine, left)
        ratio, verdict = float(compared.ratio.max()), compared.verdict
        text = _in_words(case, compared)
    modes = len(problem.data.weights)
    off = float((case.statistics(fine) / case.expected - 1)[-modes:].square().mean().sqrt())
    message = (
        f"sliced W₂ {case.distance(fine):.2g} ({case.floor:.2g} between exact samples), error of "
        f"the modes' spread {off:.1%} with {evaluations} evaluations; {text}"
    )
    return Outcome(None, ratio, verdict, message)


def _compared(case: DistributionCase, coarse: Tensor, fine: Tensor, left: float) -> _Comparison:
    first, second = (_with(case.statistics(z), case.distance(z)) for z in (coarse, fine))
    exact = _with(case.expected, 0.0)
    before, off = (first - exact).abs(), (second - exact).abs()
    apart = (first - second).abs()
    apart[-1] = max(case.distance(coarse, fine) ** 2 - case.floor**2, 0.0) ** 0.5
    # The extrapolated error has the sampling error of a difference of two samples.
    noise = _with(case.error * math.sqrt(1 + 2 * left**2), case.spread)
    allowed = _with(0 * case.expected, case.floor) + _ERRORS * noise + _SLACK * left * apart
    ratio, growth = off / allowed, (off - before) / _with(case.error, case.spread)
    extrapolated = _SLACK * left * (apart / _with(case.scatter, case.size))
    # An error that grows fails, because the difference of the grids would hide it. Comparisons with
    # NaN are False, so NaN fails, too.
    if not bool((ratio <= 1).all() and (growth <= _ERRORS).all()):
        verdict = Verdict.FAIL
    elif bool((extrapolated <= _WIDE).all()):
        verdict = Verdict.PASS
    else:
        verdict = Verdict.INCONCLUSIVE
    return _Comparison(first, second, allowed, ratio, growth, verdict)


def _with(statistics: Tensor, distance: float) -> Tensor:
    return torch.cat([statistics, statistics.new_tensor([distance])])


def _in_words(case: DistributionCase, compared: _Comparison) -> str:
    """Describe the statistic that is nearest to its limit, or beyond it."""
    grown = not float(compared.growth.max()) <= _ERRORS
    i = int((compared.growth if grown else compared.ratio).argmax())
    exact = float(_with(case.expected, 0.0)[i])
    text = f"{[*case.names, 'sliced W₂'][i]} is {float(compared.fine[i]):.4g}"
    if grown:
        return (
            f"wrong distribution: errors grow as steps shrink; {text}, and "
            f"{float(compared.coarse[i]):.4g} with half the steps; the exact value is {exact:.4g}"
        )
    text += f", the exact value is {exact:.4g} ± {float(compared.allowed[i]):.1g}"
    if compared.verdict is Verdict.FAIL:
        return f"wrong distribution: {text}"
    if compared.verdict is Verdict.PASS:
        return text
    return f"the estimated error exceeds a quarter of the distribution's width: {text}"


def _with_tolerance(solver: Solver, factor: float) -> Any:
    """The same solver at a multiple of its tolerances."""
    try:
        rtol, atol = solver.rtol, solver.atol  # type: ignore[attr-defined]
        return dataclasses.replace(solver, rtol=factor * rtol, atol=factor * atol)  # type: ignore[type-var]
    except (AttributeError, TypeError) as error:
        raise TypeError(
            "an adaptive solver must be a dataclass with fields rtol and atol; got "
            f"{type(solver).__name__}"
        ) from error
