"""The solver, grid, start and end that measurements recommend for a process and its budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cldsde.linear.checks import as_grid_times, two_increasing
from cldsde.linear.kappa import times_of_kappa, vp_time
from cldsde.linear.sde import LinearSDE
from cldsde.messages import counted
from cldsde.score import ReverseProcess

from .base import Solver
from .exponential_multistep import ExponentialMultistep
from .grids import root_times, times_of_vp_powers, vp_times
from .planning import Plan, plan
from .sscs import SSCS
from .stochastic_heun import StochasticHeun

# κ = ½ log SNR at the start and end of sampling, for data with a standard deviation of about 1. At
# the start the noise hides the data. At the end the data prediction removes the remaining noise.
_KAPPA = (-3.3, 3.3)
# A direction of the data with variance v is lost if sampling starts at σ² ≪ v. The strongest
# direction of D numbers is their mean, with v = D·Var(mean), so that σ² follows D. It also follows
# the number of evaluations: more of them resolve a longer way, and the error of the start,
# (v/(v + σ²))², falls as fast as a solver's of order 2. The constant is σ²/(D·evaluations).
_FIRST_VARIANCE = 1 / 40


@dataclass(frozen=True)
class Recipe:
    """A solver with its way to denoise at the end, and the cases that it is for."""

    solver: Solver
    denoise: Literal[True, False, "step"]  #: See `solve`.
    most_steps: float = math.inf  #: Largest number of steps.
    most_components: float = math.inf  #: Largest number of components of the process.
    grid: Callable[..., Tensor] = root_times  #: Function grid(sde, start, end, n).
    ends: tuple[float, float] = _KAPPA  #: κ at the start, or less for large data, and at the end.


# κ of five evaluations, fitted to a CLD network of Fashion-MNIST by CMA-ES. More or fewer
# evaluations take levels between them.
_FITTED_LEVELS = (-3.0, -1.35, -0.33, 0.6, 2.35)

_FEW = 8  # largest number of steps of order 3


def fitted_times(sde: LinearSDE, T: float, eps: float, n: int) -> Tensor:
    """Grid of n steps on the fitted levels, interpolated and stretched to T and eps.

    Both are linear in the square root of VP's time.
    """
    knots = torch.tensor(_FITTED_LEVELS, dtype=torch.float64, device="cpu")
    roots = vp_time(knots).sqrt().tolist()
    shares = np.interp(np.linspace(0, 1, n + 1), np.linspace(0, 1, len(roots)), roots)
    shares = (shares - roots[0]) / (roots[-1] - roots[0])
    return times_of_vp_powers(sde, T, eps, torch.as_tensor(shares, device="cpu"), 0.5)


_in_vp_time = partial(ExponentialMultistep, variable="vp_time")

# At equal κ, all processes of one component have the samples of VP, so they share its grids. The
# early ends of few steps have smaller Fréchet distances on networks of digits and Fashion-MNIST.
RECOMMENDED = (
    Recipe(_in_vp_time(order=3, stochasticity=0.5), True, 4, 1, fitted_times, (-3.3, 1.7)),
    Recipe(_in_vp_time(order=3, stochasticity=0.5), True, _FEW, 1, fitted_times, (-3.3, 2.6)),
    Recipe(_in_vp_time(order=2, stochasticity=1.0, corrector=True), True, math.inf, 1, vp_times),
    Recipe(_in_vp_time(order=3, stochasticity=1.0), True, 5, math.inf, fitted_times, (-3.0, 1.7)),
    Recipe(ExponentialMultistep(order=3, stochasticity=1.0), True, _FEW, ends=(-3.3, 3.0)),
    Recipe(ExponentialMultistep(order=2, stochasticity=1.0, corrector=True), True),
    Recipe(SSCS(), denoise="step"),
    Recipe(StochasticHeun(), denoise="step"),
)
"""Solvers in order of preference; the first for the process and number of steps is used.

The page "Which solver, grid and end?" has them in a table."""


def recipes_of(sde: LinearSDE, steps: float) -> list[Recipe]:
    """The recommended recipes for the components of a process and a number of steps."""
    return [x for x in RECOMMENDED if sde.components <= x.most_components and steps <= x.most_steps]


def recommended_plan(
    process: ReverseProcess,
    *,
    nfe: int = 20,
    solver: Solver | None = None,
    times: Tensor | None = None,
    shape: Sequence[int] = (1,),
    start: float | None = None,
    end: float | None = None,
) -> tuple[Recipe, Plan]:
    """Recipe and plan that `sample` uses for a process; see `sample` and `window`.

    Raises a ValueError if no recipe applies, or ``nfe`` allows no step.
    """
    recipes = recipes_of(process.sde, 1)
    if solver is not None:
        recipes = [Recipe(solver, denoise=True), Recipe(solver, denoise="step")]
    if times is not None:
        grid = as_grid_times(times, "times")
        if grid[0] < grid[-1]:
            raise ValueError("times must decrease, from the noise to the data")
        if grid[-1] == 0:  # no noise is left at t = 0
            recipes = [replace(recipe, denoise=False) for recipe in recipes]
    elif solver is None:
        # Leave out recipes for fewer steps than any grid has, before their grids are made.
        points = torch.arange(1, 65, dtype=torch.float64, device="cpu") / 64
        most = int(process.score.evaluations(process.sde.regular_until * points).max())
        recipes = recipes_of(process.sde, (nfe - most) // most)
    reasons = []
    for recipe in recipes:
        try:
            if times is None:
                ends = window(process, start, end, shape=shape, nfe=nfe, levels=recipe.ends)
                grid = fit_grid(process, recipe.solver, *ends, nfe, grid=recipe.grid, denoise=True)
            else:
                grid = times
            if len(grid) - 1 > recipe.most_steps:
                continue
            made = plan(process, recipe.solver, grid)
            made.check_denoise(recipe.denoise)
        except ValueError as error:
            reasons.append(str(error))
            continue
        return recipe, made
    raise ValueError(reasons[0])


def fit_grid(
    process: ReverseProcess,
    solver: Solver,
    start: float,
    end: float,
    nfe: int,
    *,
    grid: Any = root_times,
    denoise: bool = False,
) -> Tensor:
    """The longest grid on which a solver evaluates the score at most ``nfe`` times.

    ``grid`` is a function grid(sde, start, end, n). ``denoise`` reserves an evaluation for the data
    prediction at the end. An adaptive solver gets the two ends. Raises a ValueError if ``nfe`` is
    too small for one step.
    """
    if solver.facts.adaptive:
        return torch.tensor([start, end], dtype=torch.float64, device="cpu")
    evaluations = process.score.evaluations
    last = torch.tensor(end, dtype=torch.float64, device="cpu")
    reserved = int(evaluations(last)) if denoise else 0
    budget = nfe - reserved

    def costs(times: Tensor) -> Tensor:
        score_times = solver.evaluation_times(process, times)
        return evaluations(times[:0] if score_times is None else score_times)

    per_step = max(1, solver.facts.nfe_per_step)
    n = budget // per_step
    while n >= 1:
        times: Tensor = grid(process.sde, start, end, n)
        needed = costs(times)
        excess = int(needed.sum()) - budget
        if excess <= 0:
            return times
        # With guidance in intervals, a shorter grid may have a guided step more or less at each end
        # of an interval. Skip only grids that are too long in any case.
        n -= max(1, excess // (per_step * int(needed.max())) - 4)
    least = int(costs(grid(process.sde, start, end, 1)).sum()) + reserved
    given = f"{counted(nfe, 'evaluation')} {'is' if nfe == 1 else 'are'}"
    raise ValueError(
        f"{given} too few for a step of {type(solver).__name__}"
        f"{' and the data prediction at its end' if denoise else ''}; increase nfe to at least "
        f"{least}"
    )


def hiding_variance(shape: Sequence[int], nfe: int) -> float:
    """Noise variance σ² from which data of a shape are sampled with ``nfe`` evaluations."""
    return _FIRST_VARIANCE * math.prod(shape) * nfe


def window(
    process: ReverseProcess,
    start: float | None = None,
    end: float | None = None,
    shape: Sequence[int] = (1,),
    nfe: int = 20,
    levels: tuple[float, float] = _KAPPA,
) -> tuple[float, float]:
    """Start and end times of `sample`, or the given ones in their place.

    ``levels`` are κ of small data at the start, and at the end. The start depends on the shape of a
    sample and the number of evaluations. The noise levels of the score's training narrow the range,
    if they are known. Raises a ValueError if the range is empty.
    """
    of_shape = -0.5 * math.log(hiding_variance(shape, nfe))
    low, high = min(levels[0], of_shape), levels[1]
    known = process.score.noise_levels
    if known is not None:
        known = two_increasing(known, "score.noise_levels")
        low = max(low, -math.log(known[1]))
        high = min(high, -math.log(known[0]) if known[0] > 0 else math.inf)
    ends = torch.tensor([low, high], dtype=torch.float64, device="cpu")
    first, last = times_of_kappa(process.sde, ends, process.sde.regular_until).tolist()
    start, end = first if start is None else start, last if end is None else end
    if not end < start:
        range_ = f". The score knows the noise levels {known}; choose a process with these levels"
        raise ValueError(
            f"the range of times to sample {process.sde!r} in is empty: it starts at {start:.4g} "
            f"and ends at {end:.4g}{range_ if known is not None else ''}"
        )
    return start, end
