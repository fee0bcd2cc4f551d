"""The settings that measurements recommend for a process and its number of evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from cldsde.linear.checks import as_grid_times, as_integer, two_increasing
from cldsde.linear.kappa import times_of_kappa, vp_time
from cldsde.linear.sde import LinearSDE
from cldsde.messages import counted
from cldsde.score import ReverseProcess, Score

from .base import Solver
from .exponential_multistep import ExponentialMultistep
from .grids import root_times, times_of_vp_powers, vp_times
from .planning import Plan, plan
from .settings import SamplerSettings
from .sscs import SSCS
from .stochastic_heun import StochasticHeun

# κ = ½ log SNR at the start and end of sampling, for data with a standard deviation of about 1. At
# the start the noise hides the data. At the end the data prediction removes the remaining noise.
_KAPPA = (-3.3, 3.3)
VISIBLE = 2.0  #: Samples follow the prior from κ above −2, and lose structure up to κ below 2.
_SAME = 1e-4  # in κ, of levels that are rounded to float32
# A direction of the data with variance v is lost if sampling starts at σ² ≪ v. The strongest
# direction of D numbers is their mean, with v = D·Var(mean), so that σ² follows D. It also follows
# the number of evaluations: more of them resolve a longer way, and the error of the start,
# (v/(v + σ²))², falls as fast as a solver's of order 2. The constant is σ²/(D·evaluations).
_FIRST_VARIANCE = 1 / 40


@dataclass(frozen=True)
class Choice:
    """A solver, its grid and ends, and the cases for which measurements recommend them."""

    solver: ExponentialMultistep
    most_steps: float = math.inf  #: Largest number of steps.
    most_components: float = math.inf  #: Largest number of components of the process.
    grid: Callable[..., Tensor] = root_times  #: Function grid(start, end, n, sde=…).
    ends: tuple[float, float] = _KAPPA  #: κ at the start, or less for large data, and at the end.


# κ of five evaluations, fitted to a CLD network of Fashion-MNIST by CMA-ES. More or fewer
# evaluations take levels between them.
_FITTED_LEVELS = (-3.0, -1.35, -0.33, 0.6, 2.35)

_FEW = 8  # largest number of steps of order 3


def fitted_times(T: float, eps: float, n: int, *, sde: LinearSDE) -> Tensor:
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
    Choice(_in_vp_time(order=3, stochasticity=0.5), 4, 1, fitted_times, (-3.3, 1.7)),
    Choice(_in_vp_time(order=3, stochasticity=0.5), _FEW, 1, fitted_times, (-3.3, 2.6)),
    Choice(_in_vp_time(order=2, stochasticity=1.0, corrector=True), math.inf, 1, vp_times),
    Choice(_in_vp_time(order=3, stochasticity=1.0), 5, math.inf, fitted_times, (-3.0, 1.7)),
    Choice(ExponentialMultistep(order=3, stochasticity=1.0), _FEW, ends=(-3.3, 3.0)),
    Choice(ExponentialMultistep(order=2, stochasticity=1.0, corrector=True)),
)
"""Choices in order of preference; the first for the process and number of steps is used.

The page "Which solver, grid and end?" has them in a table."""

_FALLBACKS = (SSCS(), StochasticHeun())  # for processes whose score does not determine the data


def recommend(
    process: ReverseProcess | LinearSDE,
    nfe: int,
    *,
    shape: Sequence[int] | None = None,
    levels: tuple[float, float] | None = None,
    guidance: bool = False,
    start: float | None = None,
    end: float | None = None,
    network: str = "",
) -> SamplerSettings:
    """Settings that measurements recommend for a process and a number of evaluations.

    `sample` uses them. The choice is for networks, and for data with a standard deviation of about
    1; `sample` describes it.

    Parameters
    ----------
    process
        The process, or a `ReverseProcess`, whose score knows its noise levels and guidance.
    nfe
        Largest number of network evaluations per sample.
    shape
        ``(*D)`` of one sample, or of its latent variables. Large data start with more noise. None:
        small data.
    levels
        Smallest and largest noise level σ that the network knows, for data x_0 + σ n.
    guidance
        Whether each step takes two evaluations.
    start, end
        Times at which sampling starts and ends, in place of the recommended ones.
    network
        Name that the settings keep.

    Raises
    ------
    TypeError, ValueError
        If an argument is not allowed, ``nfe`` allows no step, or the data cannot be computed from
        the score of the process, so that no `ExponentialMultistep` applies.

    Examples
    --------
    >>> from cldsde import VPSDE, solvers
    >>> print(solvers.recommend(VPSDE(), 3, shape=(3, 64, 64)))
    VPSDE(beta_min=0.1, beta_max=20.0): order 3, in vp_time, 3 evaluations
    | level | κ | σ | λ |
    | ---: | ---: | ---: | ---: |
    | 1 | -3.413 | 30.36 | 0.5 |
    | 2 | -0.6022 | 1.826 | 0.5 |
    | 3 | 1.7 | 0.1827 | data prediction |
    """
    if isinstance(process, ReverseProcess):
        if levels is not None or guidance:
            name = "guidance" if levels is None else "levels"
            raise ValueError(f"{name} must be left out for a ReverseProcess, whose score knows it")
    else:
        process = ReverseProcess(process, AnnouncedScore(levels, 2 if guidance else 1))
    nfe = as_integer(nfe, 1, "nfe")
    data_shape = (1,) if shape is None else checked_shape(shape)
    found, _ = recommended_plan(process, nfe, data_shape, start, end)
    if found.settings is None:
        raise ValueError(
            f"process must be one that ExponentialMultistep applies to; {process.sde!r} is sampled "
            f"by {found.solver!r}"
        )
    return replace(found.settings, network=network)


class AnnouncedScore(Score):
    """A score that says what it can do, and is not evaluated."""

    predicts_data = True

    def __init__(self, levels: tuple[float, float] | None = None, each: int = 1) -> None:
        super().__init__()
        if levels is not None:
            self.noise_levels = two_increasing(levels, "levels")
        self._each = each

    def forward(self, z: Tensor, t: Any, **options: Any) -> NoReturn:
        """Raise NotImplementedError."""
        raise NotImplementedError

    def evaluations(self, t: Tensor) -> Tensor:
        """Number of network evaluations per call at each time."""
        return torch.full(t.shape, self._each, device="cpu")


def checked_shape(shape: Sequence[int], axes: str = "(*D)") -> tuple[int, ...]:
    """Check the shape ``(*D)`` of one sample, or ``(B, *D)`` of several."""
    if not isinstance(shape, Sequence) or len(shape) < axes.count(",") + 1:
        msg = f"shape must be {axes}, positive integers and at least one data axis; got {shape!r}"
        raise ValueError(msg)
    return tuple(as_integer(size, 1, "shape") for size in shape)


def choices_of(sde: LinearSDE, steps: float) -> list[Choice]:
    """The recommended choices for the components of a process and a number of steps."""
    return [x for x in RECOMMENDED if sde.components <= x.most_components and steps <= x.most_steps]


def solvers_of_levels(sde: LinearSDE, kappa: Tensor) -> list[ExponentialMultistep]:
    """The recommended solvers on levels ``(n + 1,)`` that are given; the first that applies counts.

    A part of a sampling has few steps, but may have long ones, for which order 3 is unstable.
    """
    whole = bool(kappa[0] <= -VISIBLE) and bool(kappa[-1] == math.inf)
    n = len(kappa) - 2 if whole else math.inf  # steps before the data prediction
    # Off its fitted levels, which their end tells, the choice for several components is worse from
    # 5 steps on.
    return [
        choice.solver
        for choice in choices_of(sde, n)
        if sde.components == 1
        or n <= 4
        or choice.grid is root_times
        or abs(float(kappa[-2]) - choice.ends[1]) < _SAME
    ]


def recommended_plan(
    process: ReverseProcess,
    nfe: int = 20,
    shape: Sequence[int] = (1,),
    start: float | None = None,
    end: float | None = None,
) -> tuple[Plan, float]:
    """The plan that `sample` uses for a process, and κ at which it should end.

    Raises a ValueError if no solver applies, or ``nfe`` allows no step.
    """
    # Leave out choices for fewer steps than any grid has, before their grids are made.
    points = torch.arange(1, 65, dtype=torch.float64, device="cpu") / 64
    most = int(process.score.evaluations(process.sde.regular_until * points).max())
    choices: list[Choice | Solver] = [*choices_of(process.sde, (nfe - most) // most), *_FALLBACKS]
    reasons = []
    for choice in choices:
        solver, grid, levels = (
            (choice.solver, choice.grid, choice.ends)
            if isinstance(choice, Choice)
            else (choice, root_times, _KAPPA)
        )
        try:
            ends = window(process, start, end, shape=shape, nfe=nfe, levels=levels)
            times = fit_grid(process, solver, *ends, nfe, grid=grid, denoise=True)
            if isinstance(choice, Choice):
                if len(times) - 1 > choice.most_steps:
                    continue
                settings = SamplerSettings.of(process.sde, choice.solver, times)
                return plan(process, settings), levels[1]
            return plan(process, solver, times, denoise="step"), levels[1]
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(reasons[0])


def resolved(
    process: ReverseProcess,
    solver: Solver | None,
    times: Tensor | None = None,
    *,
    nfe: int = 20,
    shape: Sequence[int] = (1,),
) -> Plan:
    """The plan of a solver, by default on `root_times` over the range of `window`.

    None: the first recommended solver that applies to the given times. The data prediction ends a
    grid above 0, or for processes without one a step.
    """
    if times is None:
        assert solver is not None
        ends = window(process, shape=shape, nfe=nfe)
        times = fit_grid(process, solver, *ends, nfe, denoise=True)
    grid = as_grid_times(times, "times")
    chosen = [choice.solver for choice in choices_of(process.sde, len(grid) - 1)]
    first: ValueError | None = None
    for each in (*chosen, *_FALLBACKS) if solver is None else (solver,):
        # No noise is left at t = 0.
        for denoise in (False,) if grid[-1] == 0 else (True, "step"):
            try:
                return plan(process, each, grid, denoise=denoise)
            except ValueError as error:
                first = first or error
    assert first is not None
    raise first


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

    ``grid`` is a function grid(start, end, n, sde=…). ``denoise`` reserves an evaluation for the
    data prediction at the end. An adaptive solver gets the two ends. Raises a ValueError if ``nfe``
    is too small for one step.
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
        times: Tensor = grid(start, end, n, sde=process.sde)
        needed = costs(times)
        excess = int(needed.sum()) - budget
        if excess <= 0:
            return times
        # With guidance in intervals, a shorter grid may have a guided step more or less at each end
        # of an interval. Skip only grids that are too long in any case.
        n -= max(1, excess // (per_step * int(needed.max())) - 4)
    least = int(costs(grid(start, end, 1, sde=process.sde)).sum()) + reserved
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
