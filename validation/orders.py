"""Weak, strong and ODE orders of convergence of a solver on a reference problem."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cldsde.linear.checks import as_integer, check_callable
from cldsde.solvers import RecordedNoise, solve
from cldsde.solvers.authoring import Solver
from cldsde.solvers.base import check_solver
from cldsde.solvers.grids import quadratic_times, uniform_times

from .cases import FlowCase, PathCase
from .moments import propagate_moments
from .order_estimate import OrderEstimate, Verdict, estimate_order
from .problems import Problem, check_problem
from .reference import GaussianReference

Grid = Callable[[float, float, int], Tensor]

_ROUNDING = 1e-12  # error of moments of size 1, ten times the tolerance of their references
_EXACT_SAMPLES = 2_000_000  # at least ten times a solver's samples, so that their error is small
_BATCH = 10_000  # largest number of samples whose paths are in memory
_ROUNDING_OF_A_STEP = 1e-15  # for states of size 1 to 5


def moment_error(
    solver: Solver, problem: Problem, times: Tensor, reference: GaussianReference | None = None
) -> float:
    """Largest error of a solver's final mean and covariance, exact up to rounding.

    Parameters
    ----------
    solver
        A solver on a fixed grid whose steps are affine if the score is; ValueError if they are not,
        or if the solver does not apply to the problem.
    problem
        Gaussian data of one dimension.
    times
        Decreasing grid ``(n + 1,)``. The solver starts from the exact moments.
    reference
        The exact moments, if they have been computed already.
    """
    if reference is None:
        reference = GaussianReference(problem, times[[0, -1]])
    found = propagate_moments(problem.process, solver, times, *reference.moments(float(times[0])))
    exact = reference.moments(float(times[-1]))
    # Use torch's max, because Python's max would ignore NaN.
    errors = [(a - b).flatten() for a, b in zip(found, exact, strict=True)]
    return float(torch.cat(errors).abs().max())


def weak_order(
    solver: Solver,
    problem: Problem,
    *,
    steps: Sequence[int] = (32, 64, 128, 256, 512),
    grid: Grid = uniform_times,
    tolerance: float = 0.25,
    reference: GaussianReference | None = None,
    samples: int = 200_000,
    generator: torch.Generator | None = None,
) -> OrderEstimate:
    """Measure a solver's weak order (order in distribution), and compare it with the declared one.

    With Gaussian data the moments of each level are exact, and the measurement takes a moment. For
    mixtures the moments are sampled, which takes a minute or two. Neighbouring levels then share
    their start and their Brownian path, so that their differences have a small sampling error and
    determine the order. The finest level is compared with exact moments.

    Parameters
    ----------
    solver
        A solver on a fixed grid; for mixtures a solver with ``path_noise``.
    problem
        The reference problem.
    steps
        Numbers of steps, increasing; for mixtures each a divisor of the last.
    grid
        Function of (T, ε, n) that returns a grid.
    tolerance
        Largest shortfall from the declared order.
    reference
        For Gaussian data: the exact moments at the ends, if they have been computed already.
    samples, generator
        For mixtures: number of samples, and their random generator.

    Raises
    ------
    TypeError
        If the solver is adaptive, or lacks ``path_noise`` for a mixture.
    ValueError
        If the solver does not apply to the problem, steps are not positive and increasing, samples
        are too few for a standard error, or for mixtures a number of steps does not divide the
        last.

    Examples
    --------
    >>> from cldsde import solvers, validation
    >>> problem = validation.problems()["CLD"]
    >>> validation.weak_order(solvers.SSCS(), problem, steps=(32, 64, 128)).verdict
    <Verdict.PASS: 'PASS'>
    """
    _check_arguments(solver, problem, steps, grid)
    _check_samples(samples, 20)
    grids = [grid(problem.start, problem.end, n) for n in steps]
    if not problem.gaussian:
        g = generator if generator is not None else torch.Generator().manual_seed(0)
        return _sampled_weak_order(solver, problem, steps, grids[-1], tolerance, samples, g)
    if reference is None:
        reference = GaussianReference(problem, grids[0][[0, -1]])
    errors = [moment_error(solver, problem, times, reference) for times in grids]
    # Rounding errors add up like a random walk, in proportion to the size of the moments.
    ends = [float(times) for times in grids[0][[0, -1]]]
    sizes = [float(moment.abs().max()) for t in ends for moment in reference.moments(t)]
    rounding = _ROUNDING * max(1.0, *sizes)
    return estimate_order(
        [1 / n for n in steps],
        errors,
        expected=solver.facts.weak_order,
        tolerance=tolerance,
        rounding=[rounding * math.sqrt(n) for n in steps],
        spacing=1.0,
    )


def _sampled_weak_order(
    solver: Solver,
    problem: Problem,
    steps: Sequence[int],
    finest: Tensor,
    tolerance: float,
    samples: int,
    g: torch.Generator,
) -> OrderEstimate:
    if solver.path_noise(problem.process, finest) is None:
        raise TypeError(
            f"solver must have `path_noise` for a weak order on mixtures, which is measured along "
            f"shared Brownian paths; got {solver!r}. Use a problem with Gaussian data"
        )
    _check_divisors(steps, steps[-1])
    declared = solver.facts.weak_order
    batches = max(20, -(-samples // _BATCH))
    size = -(-samples // batches)
    values = np.zeros((len(steps), batches, 4))
    for batch in range(batches):
        paths = PathCase(problem, finest, size, g)
        for level, n in enumerate(steps):
            values[level, batch] = _observables(_along(solver, problem, paths, n)[:, 0])
    differences = values[:-1] - values[1:]
    means = differences.mean(1)
    # Project on the direction of the next coarser level, whose noise is relatively small. Noise
    # would bias a norm upwards. The spread of the projections includes correlations of the
    # functions.
    sizes = np.sqrt((means**2).sum(-1))
    directions = means / np.where(sizes > 0, sizes, 1.0)[:, None]
    directions = np.concatenate([directions[:1], directions[:-1]])
    along = (differences * directions[:, None]).sum(-1)
    errors = np.abs(along.mean(1))
    noise = along.std(1, ddof=1) / math.sqrt(batches)
    h = [1 / n for n in steps[:-1]]
    estimate = estimate_order(h, errors, noise, expected=declared, tolerance=tolerance)
    # Check that the levels converge to the exact distribution.
    parts = max(batches, _EXACT_SAMPLES // size)
    exact = np.stack(
        [_observables(problem.sample(size, g, at=problem.end)[:, 0]) for _ in range(parts)]
    )
    rest = np.abs(values[-1].mean(0) - exact.mean(0))
    sampling = values[-1].var(0, ddof=1) / batches + exact.var(0, ddof=1) / parts
    # An error of order p is the last difference times 1/(2^p − 1), which is 2.4 for p = 1/2.
    doubt = 5 * np.sqrt(sampling) + 4 * errors[-1]
    if not bool((rest > doubt).any()) or estimate.verdict is Verdict.FAIL:
        return estimate
    return dataclasses.replace(
        estimate,
        verdict=None if declared is None else Verdict.FAIL,
        message=(
            f"wrong distribution, whatever the order is: error {rest.max():.2g} at the finest level"
        ),
    )


def _observables(x: Tensor) -> Any:
    """Means of smooth functions of the data, over samples and dimensions."""
    functions = (x, x.square(), torch.cos(2 * x), torch.exp(-x.square()))
    return np.array([float(f.mean()) for f in functions])


def ode_order(
    solver: Solver,
    problem: Problem,
    *,
    steps: Sequence[int] = (16, 32, 64, 128, 256, 512),
    grid: Grid = quadratic_times,
    tolerance: float = 0.25,
    case: FlowCase | None = None,
    samples: int = 200,
    generator: torch.Generator | None = None,
) -> OrderEstimate:
    """Measure a solver's order for the probability-flow ODE, and compare it with the declared one.

    The error is the root mean square over samples. Adaptive solvers take steps of one length
    (``with_step``), because their order refers to such steps.

    Parameters
    ----------
    solver
        A deterministic solver. ValueError as in `weak_order`, and if the solver declares a weak or
        strong order, or is adaptive and cannot take steps of one length.
    problem, steps, grid, tolerance
        See `weak_order`.
    case
        Start states and their exact end states, if they have been computed already.
    samples, generator
        Otherwise the number of start states, and their random generator.
    """
    _check_arguments(solver, problem, steps, grid, adaptive=True)
    as_integer(samples, 1, "samples")
    facts = solver.facts
    if not facts.adaptive and (facts.weak_order, facts.strong_order) != (None, None):
        raise ValueError(f"solver must be deterministic; {solver!r} has a weak or strong order")
    g = generator if generator is not None else torch.Generator().manual_seed(0)
    flow = case if case is not None else FlowCase(problem, samples, g)

    errors = []
    for n in steps:
        times, taken = grid(problem.start, problem.end, n), solver
        if facts.adaptive:
            taken = solver.with_step((problem.start - problem.end) / n)
        found = solve(problem.process, taken, flow.start, times, warn=False)
        error = (found.state - flow.end).square().mean().sqrt() if found.success else math.nan
        errors.append(float(error))
    return estimate_order(
        [1 / n for n in steps],
        errors,
        expected=facts.ode_order,
        tolerance=tolerance,
        rounding=[flow.accuracy + _ROUNDING_OF_A_STEP * math.sqrt(n) for n in steps],
        spacing=1.0,
    )


def strong_order(
    solver: Solver,
    problem: Problem,
    *,
    steps: Sequence[int] = (32, 64, 128, 256),
    grid: Grid = uniform_times,
    tolerance: float = 0.25,
    case: PathCase | None = None,
    samples: int = 2000,
    generator: torch.Generator | None = None,
) -> OrderEstimate:
    """Measure a solver's strong order along Brownian paths, and compare it with the declared one.

    With Gaussian data the exact ends of the paths are known. For mixtures the order follows from
    distances between neighbouring levels. It may be lower there, because the score is nonlinear.
    These distances do not show whether the levels converge to the right paths; `weak_order` checks
    the distribution. Raises the errors that `weak_order` raises for mixtures.

    Parameters
    ----------
    solver
        A solver with ``path_noise``.
    problem, tolerance
        See `weak_order`.
    steps
        Numbers of steps, increasing, each a divisor of the last.
    grid
        Function of (T, ε, n) that returns the finest grid; the others are subsets of it.
    case
        Paths over the finest grid, if they have been computed already.
    samples, generator
        Otherwise the number of paths, and their random generator.
    """
    _check_arguments(solver, problem, steps, grid)
    if solver.path_noise(problem.process, grid(problem.start, problem.end, 1)) is None:
        raise TypeError(f"solver must have `path_noise` for a strong order; {solver!r} has none")
    batches = 10
    _check_samples(samples if case is None else len(case.start), 2 * batches)
    _check_divisors(steps, steps[-1] if case is None else len(case.times) - 1)
    g = generator if generator is not None else torch.Generator().manual_seed(0)
    finest = grid(problem.start, problem.end, steps[-1])
    paths = case if case is not None else PathCase(problem, finest, samples, g)
    found = [_along(solver, problem, paths, n) for n in steps]
    targets = found[1:] if paths.end is None else [paths.end] * len(found)
    size = len(paths.start) // batches
    errors, spreads = [], []
    for ends, target in zip(found, targets, strict=False):
        squares = (ends - target).square().flatten(1).sum(1)
        means = squares[: batches * size].reshape(batches, size).mean(1)
        errors.append(float(means.mean().sqrt()))
        # The error of a root is the error of its square divided by twice the root.
        spread = float(means.std() / math.sqrt(batches))
        spreads.append(spread / (2 * errors[-1]) if errors[-1] else 0.0)
    return estimate_order(
        [1 / n for n in steps[: len(errors)]],
        errors,
        spreads,
        expected=solver.facts.strong_order,
        tolerance=tolerance,
    )


def _check_arguments(
    solver: Solver, problem: Problem, steps: Sequence[int], grid: Grid, *, adaptive: bool = False
) -> None:
    if check_solver(solver).facts.adaptive and not adaptive:
        raise TypeError(f"solver must work on a fixed grid; got {solver!r}")
    check_problem(problem)
    check_callable(grid, "grid", "a function of (T, ε, n)")
    numbers = list(steps) if isinstance(steps, Iterable) else []
    whole = all(isinstance(n, Integral) and int(n) > 0 for n in numbers)
    if not numbers or not whole or any(n >= m for n, m in itertools.pairwise(numbers)):
        msg = f"steps must be positive integers that increase, at least one; got {steps}"
        raise ValueError(msg)


def _check_samples(samples: int, least: int) -> None:
    if as_integer(samples, 0, "samples") < least:
        raise ValueError(f"samples must be at least {least}, for a standard error; got {samples}")


def _check_divisors(steps: Sequence[int], finest: int) -> None:
    if uneven := [n for n in steps if finest % n]:
        raise ValueError(f"steps must be divisors of the finest, {finest}; got {uneven[0]}")


def _along(solver: Solver, problem: Problem, paths: PathCase, steps: int) -> Tensor:
    """Final states of a solver along given paths, ``(samples, k, D)``."""
    stride = (len(paths.times) - 1) // steps
    times = paths.times[::stride]
    functionals = solver.path_noise(problem.process, times)
    assert functionals is not None
    noise = RecordedNoise(paths.draws(functionals, stride))
    return solve(problem.process, solver, paths.start, times, noise=noise, warn=False).state
