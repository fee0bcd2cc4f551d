"""Orders of convergence of a solver on a reference problem."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cldsde.solvers import RecordedNoise, solve
from cldsde.solvers.authoring import Solver
from cldsde.solvers.base import check_solver
from cldsde.solvers.grids import quadratic_times, uniform_times

from .cases import FlowCase, PathCase
from .moments import propagate_moments
from .order_estimate import OrderEstimate, Verdict, estimate_order
from .problems import Problem, check_problem
from .reference import GaussianReference

__all__ = ["moment_error", "ode_order", "strong_order", "weak_order"]

Grid = Callable[[float, float, int], Tensor]

_ROUNDING = 1e-12  # of moments of size 1, ten times what their references are solved to
_EXACT_SAMPLES = 2_000_000  # ten times a solver's or more: of their error little is left
_BATCH = 10_000  # samples whose paths are held at a time
_ROUNDING_OF_A_STEP = 1e-15  # of states of size 1 to 5


def moment_error(
    solver: Solver, problem: Problem, times: Tensor, reference: GaussianReference | None = None
) -> float:
    """Largest error of the mean and covariance that a solver ends with, to rounding.

    Parameters
    ----------
    solver
        A solver on a fixed grid whose steps are affine where the score is.
    problem
        Gaussian data of one dimension.
    times
        Decreasing grid ``(n + 1,)``; the solver starts with the exact moments.
    reference
        The exact answers, if they are at hand.

    Raises
    ------
    ValueError
        If the solver does not apply, or its steps are not affine.

    Examples
    --------
    >>> from cldsde import solvers, validation
    >>> problem = validation.problems()["CLD"]
    >>> times = solvers.quadratic_times(1.0, problem.end, 100)
    >>> validation.moment_error(solvers.SSCS(), problem, times) < 5e-3
    True
    """
    if reference is None:
        reference = GaussianReference(problem, times[[0, -1]])
    found = propagate_moments(problem.process, solver, times, *reference.moments(float(times[0])))
    exact = reference.moments(float(times[-1]))
    # Not Python's max, which would drop what is not a number.
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
    """Order of a solver in law, against the order that it declares.

    With Gaussian data the moments of each level are exact and there is no sampling error, and it
    takes a moment. For mixtures they are sampled, for a minute or two: neighbouring levels share
    their start and their Brownian path, and the order is that of their differences, whose sampling
    error is small; the finest level is held against the exact moments.

    Parameters
    ----------
    solver
        A solver on a fixed grid; for mixtures one that follows a Brownian path.
    problem
        Where to measure.
    steps
        Numbers of steps, increasing; for mixtures each a divisor of the last.
    grid
        Function of (T, ε, n) that makes the grids.
    tolerance
        How far the order may be below what is declared.
    reference
        Of Gaussian data, the exact answers at the ends, if they are at hand.
    samples, generator
        Of mixtures: how many samples, and where they come from.

    Raises
    ------
    TypeError
        If the solver has no fixed grid, or for mixtures follows no Brownian path.
    ValueError
        If it does not apply to the problem, steps are not positive and increasing or, for mixtures,
        do not all divide the last, or samples are too few for a standard error.

    Examples
    --------
    >>> from cldsde import solvers, validation
    >>> estimate = validation.weak_order(solvers.SSCS(), validation.problems()["CLD"])
    >>> estimate.verdict
    <Verdict.PASS: 'PASS'>
    """
    _check_solver(solver)
    check_problem(problem)
    _check_steps(steps)
    _check_samples(samples, 20)
    grids = [grid(problem.start, problem.end, n) for n in steps]
    declared = solver.facts.weak_order
    if not problem.gaussian:
        return _sampled_weak_order(solver, problem, grids, declared, tolerance, samples, generator)
    if reference is None:
        reference = GaussianReference(problem, grids[0][[0, -1]])
    errors = [moment_error(solver, problem, times, reference) for times in grids]
    # Rounding adds up like a random walk, and goes with the size of the moments.
    ends = [float(times) for times in grids[0][[0, -1]]]
    sizes = [float(moment.abs().max()) for t in ends for moment in reference.moments(t)]
    rounding = _ROUNDING * max(1.0, *sizes)
    return estimate_order(
        [1 / n for n in steps],
        errors,
        expected=declared,
        tolerance=tolerance,
        rounding=[rounding * math.sqrt(n) for n in steps],
        spacing=1.0,
    )


def _sampled_weak_order(
    solver: Solver,
    problem: Problem,
    grids: list[Tensor],
    declared: float | None,
    tolerance: float,
    samples: int,
    generator: torch.Generator | None,
) -> OrderEstimate:
    if solver.path_noise(problem.process, grids[0]) is None:
        msg = (
            f"solver: on mixtures the weak order is measured along shared Brownian paths, which "
            f"{solver!r} does not follow; take a problem with Gaussian data"
        )
        raise TypeError(msg)
    g = generator if generator is not None else torch.Generator().manual_seed(0)
    strides = _strides([len(times) - 1 for times in grids], len(grids[-1]) - 1)
    batches = max(20, -(-samples // _BATCH))
    size = -(-samples // batches)
    values = np.zeros((len(grids), batches, 4))
    for batch in range(batches):
        paths = PathCase(problem, grids[-1], size, g)
        for level, stride in enumerate(strides):
            values[level, batch] = _observables(_along(solver, problem, paths, stride)[:, 0])
    differences = values[:-1] - values[1:]
    means = differences.mean(1)
    # Along the direction of the next coarser level, whose own noise is small beside it: a length
    # would be too long by the noise. The scatter counts how the functions vary together.
    sizes = np.sqrt((means**2).sum(-1))
    directions = means / np.where(sizes > 0, sizes, 1.0)[:, None]
    directions = np.concatenate([directions[:1], directions[:-1]])
    along = (differences * directions[:, None]).sum(-1)
    errors = np.abs(along.mean(1))
    noise = along.std(1, ddof=1) / math.sqrt(batches)
    h = [1 / (len(times) - 1) for times in grids]
    estimate = estimate_order(
        h[:-1], errors.tolist(), noise.tolist(), expected=declared, tolerance=tolerance
    )
    # Whether what the levels converge to is the law itself.
    parts = max(batches, _EXACT_SAMPLES // size)
    exact = np.stack(
        [_observables(problem.sample(size, g, at=problem.end)[:, 0]) for _ in range(parts)]
    )
    rest = np.abs(values[-1].mean(0) - exact.mean(0))
    sampling = values[-1].var(0, ddof=1) / batches + exact.var(0, ddof=1) / parts
    # Of an error of order p, 1/(2^p − 1) of the last difference is left: 2.4 of it for p = 1/2.
    doubt = 5 * np.sqrt(sampling) + 4 * errors[-1]
    if not bool((rest > doubt).any()) or estimate.verdict is Verdict.FAIL:
        return estimate
    return dataclasses.replace(
        estimate,
        verdict=None if declared is None else Verdict.FAIL,
        message=f"not the law, whatever the order is: off by {rest.max():.2g} at the finest level",
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
    """Order of a solver for the probability flow, against the order that it declares.

    The error is the root mean square over samples. Adaptive solvers are made to take even steps
    (``with_step``), which is what their order is about.

    Parameters
    ----------
    solver
        A deterministic solver.
    problem
        Where to measure.
    steps
        Numbers of steps, increasing.
    grid
        Function of (T, ε, n) that makes the grids.
    tolerance
        How far the order may be below what is declared.
    case
        Start states and their ends, if they are at hand.
    samples, generator
        Otherwise, how many start states, and where they come from.

    Raises
    ------
    ValueError
        If the solver chooses its times and cannot take even steps, it does not apply to the
        problem, or steps are not positive and increasing.
    """
    check_problem(problem)
    _check_steps(steps)
    g = generator if generator is not None else torch.Generator().manual_seed(0)
    flow = case if case is not None else FlowCase(problem, samples, g)
    facts = solver.facts

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
    """Order of a solver along Brownian paths, against the order that it declares.

    With Gaussian data the exact ends of the paths are known. For mixtures the order is that of the
    distances between neighbouring levels; it may be lower there, where the score bends. Whether the
    levels approach the right paths is then not seen: `weak_order` looks at the law.

    Parameters
    ----------
    solver
        A solver that follows a Brownian path (has ``path_noise``).
    problem
        Where to measure.
    steps
        Numbers of steps, increasing, each a divisor of the last.
    grid
        Function of (T, ε, n) that makes the finest grid; the others leave out times of it.
    tolerance
        How far the order may be below what is declared.
    case
        Paths over the finest grid, if they are at hand.
    samples, generator
        Otherwise, how many, and where they come from.

    Raises
    ------
    TypeError
        If the solver has no fixed grid or follows no Brownian path.
    ValueError
        If it does not apply to the problem, steps are not positive and increasing or do not all
        divide the finest, or samples are too few for a standard error.
    """
    _check_solver(solver)
    check_problem(problem)
    _check_steps(steps)
    if solver.path_noise(problem.process, grid(problem.start, problem.end, 1)) is None:
        msg = f"solver must follow a Brownian path for a strong order; {solver!r} does not"
        raise TypeError(msg)
    batches = 10
    _check_samples(samples if case is None else len(case.start), 2 * batches)
    g = generator if generator is not None else torch.Generator().manual_seed(0)
    finest = grid(problem.start, problem.end, steps[-1])
    paths = case if case is not None else PathCase(problem, finest, samples, g)
    strides = _strides(steps, len(paths.times) - 1)
    found = [_along(solver, problem, paths, stride) for stride in strides]
    targets = found[1:] if paths.end is None else [paths.end] * len(found)
    size = len(paths.start) // batches
    errors, spreads = [], []
    for ends, target in zip(found, targets, strict=False):
        squares = (ends - target).square().flatten(1).sum(1)
        means = squares[: batches * size].reshape(batches, size).mean(1)
        errors.append(float(means.mean().sqrt()))
        # The error of a root is that of its square over twice the root.
        spread = float(means.std() / math.sqrt(batches))
        spreads.append(spread / (2 * errors[-1]) if errors[-1] else 0.0)
    return estimate_order(
        [1 / n for n in steps[: len(errors)]],
        errors,
        spreads,
        expected=solver.facts.strong_order,
        tolerance=tolerance,
    )


def _check_steps(steps: Sequence[int]) -> None:
    numbers = list(steps)
    whole = all(isinstance(n, Integral) and int(n) > 0 for n in numbers)
    if not numbers or not whole or any(n >= m for n, m in itertools.pairwise(numbers)):
        msg = f"steps must be positive integers that increase, at least one; got {numbers}"
        raise ValueError(msg)


def _check_samples(samples: int, least: int) -> None:
    if samples < least:
        msg = f"samples must be at least {least}, for a standard error; got {samples}"
        raise ValueError(msg)


def _strides(steps: Sequence[int], cells: int) -> list[int]:
    """Over how many cells of the finest grid the steps of each level go."""
    uneven = [n for n in steps if n < 1 or cells % n]
    if uneven:
        msg = f"steps must be divisors of the finest, {cells}; got {uneven[0]}"
        raise ValueError(msg)
    return [cells // n for n in steps]


def _along(solver: Solver, problem: Problem, paths: PathCase, stride: int) -> Tensor:
    """States that a solver ends with along paths, ``(samples, k, D)``."""
    times = paths.times[::stride]
    functionals = solver.path_noise(problem.process, times)
    assert functionals is not None
    noise = RecordedNoise(paths.draws(functionals, stride))
    return solve(problem.process, solver, paths.start, times, noise=noise, warn=False).state


def _check_solver(solver: object) -> None:
    if check_solver(solver).facts.adaptive:
        msg = f"solver must work on a fixed grid; got {solver!r}"
        raise TypeError(msg)
