"""Sampling in one call, with the solver, grid, start and end that measurements recommend."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor, nn

from cldsde.linear.checks import as_grid_times, as_integer, two_increasing
from cldsde.linear.log_snr import log_snr_of_vp_time, times_of_log_snr, vp_time
from cldsde.linear.sde import LinearSDE
from cldsde.messages import counted
from cldsde.progress import progress_bar
from cldsde.score import ReverseProcess, Score, ScoreFunction

from .base import Solver, check_solver
from .exponential_multistep import ExponentialMultistep, LevelNoise, Variable
from .grids import root_times, vp_times
from .noise import SampleNoise
from .planning import Plan, plan
from .settings import SamplerSettings
from .sscs import SSCS
from .stochastic_heun import StochasticHeun

# κ = ½ log SNR at the start and end of sampling, for data with a standard deviation of about 1. At
# the start the noise hides the data. At the end the data prediction removes the remaining noise.
_LOG_SNR = (-3.3, 3.3)
# A direction of the data with variance v is lost if sampling starts at σ² ≪ v. The strongest
# direction of D numbers is their mean, with v = D·Var(mean), so that σ² follows D. It also follows
# the number of evaluations: more of them resolve a longer way, and the error of the start,
# (v/(v + σ²))², falls as fast as a solver's of order 2. The constant is σ²/(D·evaluations).
_FIRST_VARIANCE = 1 / 40
# A start below this part of the level, for at most so many evaluations, is worth a warning.
_ENOUGH, _MANY = 0.9, 20
# Samples follow the prior noticeably from κ above −2, and lose structure up to κ below 2.
_VISIBLE = 2.0

# Largest numbers of state entries and of samples in one batch.
_NUMBERS, _SAMPLES = 2**20, 4096


@dataclass(frozen=True)
class Recipe:
    """A solver with its way to denoise at the end, and the cases that it is for."""

    solver: Solver
    denoise: Literal[True, False, "step"]  #: See `solve`.
    most_steps: float = math.inf  #: Largest number of steps.
    most_components: float = math.inf  #: Largest number of components of the process.
    grid: Callable[..., Tensor] = root_times  #: Function grid(sde, start, end, n).
    ends: tuple[float, float] = _LOG_SNR  #: κ at the start, or less for large data, and at the end.


# Noise levels and λ of five evaluations, fitted to a CLD network of Fashion-MNIST by CMA-ES. More
# or fewer evaluations take levels between them.
_FITTED = LevelNoise((-3.0, -1.35, -0.33, 0.6, 2.35), (0.54, 1.29, 1.76, 1.19, 1.0))
_FITTED_STEPS = 4

# Largest number of steps of order 3. With 6 steps it gave better images than order 2. With 8 steps
# it was better for one component with half of the noise; for more components it was 0.1 worse.
_FEW = 8


def fitted_times(sde: LinearSDE, T: float, eps: float, n: int) -> Tensor:
    """Grid whose κ are spread between both ends as those of the fitted settings.

    Between the five levels the square root of VP's time is a monotone cubic of i/n.
    """
    knots = vp_time(torch.tensor(_FITTED.log_snr, dtype=torch.float64, device="cpu")).sqrt().numpy()
    shares = (knots - knots[0]) / (knots[-1] - knots[0])
    place = PchipInterpolator(np.linspace(0, 1, len(shares)), shares)(np.linspace(0, 1, n + 1))
    ends = sde.log_snr(torch.tensor([T, eps], dtype=torch.float64, device="cpu"))
    first, last = vp_time(ends).sqrt()
    roots = first + (last - first) * torch.as_tensor(place, device="cpu")
    times = times_of_log_snr(sde, log_snr_of_vp_time(roots.square()), T, eps)
    times[0], times[-1] = T, eps
    return times


def _multistep(
    order: Literal[2, 3], stochasticity: float | LevelNoise, variable: Variable = "time"
) -> Solver:
    return ExponentialMultistep(order=order, stochasticity=stochasticity, variable=variable)


RECOMMENDED = (
    Recipe(
        _multistep(3, _FITTED, "vp_time"), True, _FITTED_STEPS, grid=fitted_times, ends=(-3.0, 2.35)
    ),
    Recipe(_multistep(3, 0.5, "vp_time"), True, _FEW, most_components=1, grid=vp_times),
    Recipe(_multistep(2, 1.0, "vp_time"), True, most_components=1, grid=vp_times),
    Recipe(_multistep(3, 1.0), True, _FEW),
    Recipe(_multistep(2, 1.0), True),
    Recipe(SSCS(), denoise="step"),
    Recipe(StochasticHeun(), denoise="step"),
)
"""Solvers in order of preference; the first that applies to a process is used.

- `ExponentialMultistep` with noise, for processes whose driven score determines the data. A step is
  one score evaluation, or two with guidance. At most 4 steps have noise levels and noise that were
  fitted to a CLD network of Fashion-MNIST (16 × 16), from κ = −3.0 to 2.35; 5 to 8 steps have
  order 3, and more have order 2. With 5 to 8 steps, processes of one component take half of the
  noise, because it enters the data directly. They differ in scale alone at equal κ, take VP's steps
  (`vp_times`) and have its samples.
- `SSCS`, for processes with a stationary distribution
- `StochasticHeun`, for every process"""


def sample(
    sde: LinearSDE,
    score: ScoreFunction,
    shape: Sequence[int],
    *,
    nfe: int = 20,
    seed: int = 0,
    solver: Solver | None = None,
    times: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    batch: int | None = None,
    progress: bool = False,
    settings: SamplerSettings | None = None,
) -> Tensor:
    """Generate samples from a score, with solver, grid, start and end chosen for the process.

    The solver is the first of `RECOMMENDED` that applies to the process and number of steps.
    Sampling starts at the noise level σ with σ² = D·nfe/40 for D numbers per sample, at least at
    σ = 27 (κ = −3.3; κ = −log σ = ½ log SNR), and ends at κ = 3.3 with the data prediction. With at
    most 4 steps it starts at least at σ = 20 and ends at κ = 2.35, see `RECOMMENDED`. A score
    that knows the noise levels of its training, such as `DenoiserScore`, narrows this range.

    Parameters
    ----------
    sde
        The process to sample with.
    score
        Function score(z, t), such as a `DenoiserScore`, a `MixedScore` or the score of a
        `GaussianMixture`. A `ConditionalScore` holds conditions for all B samples. Put a network in
        evaluation mode.
    shape
        ``(B, *D)``: number of samples and shape of one sample.
    nfe
        Largest number of network evaluations per sample, with the data prediction at the end.
        Guidance (`GuidedScore`) evaluates the network twice, so that 20 evaluations are 10 guided
        ones. Ignored by adaptive solvers.
    seed
        Seed of all random numbers, ≥ 0. Each sample of each seed has a random stream of its own:
        the first samples are the same for any B and ``batch``, up to rounding in a network. A
        `ScoreDenoiser` that fills states up makes a sample depend on its place in the batch, too.
    solver
        Solver in place of the recommended one. It ends with the data prediction if the process has
        one.
    times
        Decreasing grid ``(n + 1,)``, in place of ``nfe``.
    device
        Device of the samples. None: the device of the score's parameters, or the CPU.
    dtype
        Dtype of the states.
    batch
        Number of samples in one batch. None: up to 4,096, fewer if a sample is large.
    progress
        Show a progress bar on stderr.
    settings
        Solver and grid in place of ``nfe``, ``solver`` and ``times``.

    Returns
    -------
    Tensor
        Data ``(B, *D)`` on the device.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If ``nfe`` allows no step, ``shape`` is not ``(B, *D)``, the grid does not decrease, or the
        solver does not apply to the process. The score has not been evaluated then.
    FloatingPointError
        If a sample is not finite.

    Warns
    -----
    UserWarning
        If the process, or the noise levels of the score, end before the noise hides the data: at
        κ > −2, or for large samples at less than 0.9 of the noise level above. Samples are biased
        towards the start then; for images it is their brightness. Also if sampling ends at κ < 2,
        or a layer of the score is in training mode.

    Notes
    -----
    The end at κ = 3.3 smooths structure finer than e^{−κ} ≈ 0.04, which networks do not resolve
    accurately; the end at κ = 2.35 smooths structure finer than 0.1. If an exact score has finer
    structure, pass ``times`` with a smaller end. The data should have a standard deviation of
    about 1.

    The settings of at most 4 steps suit networks. With an exact score of Gaussian data, 5
    evaluations give standard deviations that are 33 % (VP) and 26 % (CLD) too large; take 10.

    The mean of all numbers of a sample, such as the brightness of an image, is the direction of the
    data that needs most noise to hide. At the start it has a standard deviation of 0.52. If the
    data's mean has another one, the samples' differs from it for images of 64 × 64 and more: by +4
    to +9 % for 0.25 and by −6 to −13 % for 0.7, with 20 evaluations of CLD or VP. With 10, it is up
    to 18 % too small for 0.5 and 26 % for 0.7.

    Examples
    --------
    >>> import torch, cldsde
    >>> data = cldsde.GaussianMixture([0.5, 0.5], [[-2.0, 0.0], [2.0, 1.0]], [torch.eye(2) / 4] * 2)
    >>> sde = cldsde.CLD()
    >>> x = cldsde.sample(sde, data.score(sde), (1000, 2), nfe=10)
    >>> x.shape, bool((x.mean(0) - torch.tensor([0.0, 0.5])).abs().max() < 0.3)
    (torch.Size([1000, 2]), True)
    """
    process = ReverseProcess(sde, score)
    count, *data_shape = checked_shape(shape)
    nfe, seed = as_integer(nfe, 1, "nfe"), as_integer(seed, 0, "seed")
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point type of torch; got {dtype!r}")
    if solver is not None:
        check_solver(solver)
    if settings is not None:
        if not isinstance(settings, SamplerSettings):
            raise TypeError(f"settings must be a SamplerSettings; got {type(settings).__name__}")
        if not (solver is None and times is None):
            raise ValueError("solver and times must be None with settings, which have both")
        solver, times = settings.solver, settings.times(sde)
    _warn_of_training(process.score)
    recipe, sampler = recommended_plan(
        process, nfe=nfe, solver=solver, times=times, shape=data_shape
    )
    first_time = float(sampler.times[0])
    if times is None:
        _warn_of_ends(sde, sampler.times, data_shape, nfe)
    device = process.score.device if device is None else torch.device(device)
    most = max(1, _NUMBERS // (sde.components * math.prod(data_shape)))
    size = min(_SAMPLES, most) if batch is None else as_integer(batch, 1, "batch")
    found = []
    with progress_bar(None, shown=progress, total=count, desc="sampling") as bar, torch.no_grad():
        for first in range(0, count, size):
            noise = SampleNoise(range(first, min(first + size, count)), key=seed)
            start = noise.start(sde, data_shape, dtype=dtype, device=device, t=first_time)
            batched = sampler.part(slice(first, first + size), (count, *data_shape))
            solution = batched.solve(start, noise=noise, denoise=recipe.denoise, warn=False)
            found.append(solution.raise_for_failure().data)
            bar.update(len(noise.seeds))
    return torch.cat(found)


def recommended_plan(
    process: ReverseProcess,
    *,
    nfe: int = 20,
    solver: Solver | None = None,
    times: Tensor | None = None,
    shape: Sequence[int] = (1,),
) -> tuple[Recipe, Plan]:
    """Recipe and plan that `sample` uses for a process.

    Parameters
    ----------
    process, nfe, solver, times, shape
        See `sample` and `window`.

    Raises
    ------
    ValueError
        If no recipe applies, or ``nfe`` allows no step.
    """
    components = process.sde.components
    recipes = tuple(recipe for recipe in RECOMMENDED if components <= recipe.most_components)
    if solver is not None:
        recipes = (Recipe(solver, denoise=True), Recipe(solver, denoise="step"))
    if times is not None:
        grid = as_grid_times(times, "times", process.sde.T)
        if grid[0] < grid[-1]:
            raise ValueError("times must decrease, from the noise to the data")
        if grid[-1] == 0:  # no noise is left at t = 0
            recipes = tuple(replace(recipe, denoise=False) for recipe in recipes)
    reasons = []
    for recipe in recipes:
        try:
            if times is None:
                ends = window(process, shape=shape, nfe=nfe, levels=recipe.ends)
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

    Parameters
    ----------
    process, solver, start, end
        The reverse process, its solver, first and last time.
    nfe
        Largest number of score evaluations.
    grid
        Function grid(sde, start, end, n), such as `root_times`.
    denoise
        Whether to reserve one evaluation for the data prediction at the end.

    Returns
    -------
    Tensor
        Grid ``(n + 1,)``; for an adaptive solver the two ends.

    Raises
    ------
    ValueError
        If ``nfe`` is too small for one step.
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


def window(
    process: ReverseProcess,
    start: float | None = None,
    end: float | None = None,
    shape: Sequence[int] = (1,),
    nfe: int = 20,
    levels: tuple[float, float] = _LOG_SNR,
) -> tuple[float, float]:
    """Start and end times of `sample`, see `Recipe.ends`.

    The noise levels of the score's training narrow the range, if they are known.

    Parameters
    ----------
    process
        The reverse process.
    start, end
        Times that replace the start or the end.
    shape, nfe
        Shape of one sample, and largest number of evaluations, see `sample`.
    levels
        κ of small data at the start, and at the end.

    Raises
    ------
    ValueError
        If the range is empty.
    """
    of_shape = -0.5 * math.log(_FIRST_VARIANCE * math.prod(shape) * nfe)
    low, high = min(levels[0], of_shape), levels[1]
    known = process.score.noise_levels
    if known is not None:
        known = two_increasing(known, "score.noise_levels")
        low = max(low, -math.log(known[1]) if known[1] < math.inf else -math.inf)
        high = min(high, -math.log(known[0]) if known[0] > 0 else math.inf)
    ends = torch.tensor([low, high], dtype=torch.float64, device="cpu")
    first, last = times_of_log_snr(process.sde, ends, process.sde.regular_until).tolist()
    start, end = first if start is None else start, last if end is None else end
    if not end < start:
        range_ = f". The score knows the noise levels {known}; choose a process with these levels"
        raise ValueError(
            f"the range of times to sample {process.sde!r} in is empty: it starts at {start:.4g} "
            f"and ends at {end:.4g}{range_ if known is not None else ''}"
        )
    return start, end


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape ``(B, *D)`` of samples; raise a ValueError for another one."""
    if not isinstance(shape, Sequence) or len(shape) < 2:
        msg = f"shape must be (B, *D), positive integers and at least one data axis; got {shape!r}"
        raise ValueError(msg)
    return tuple(as_integer(size, 1, "shape") for size in shape)


def _warn_of_training(score: Score) -> None:
    """Warn if a layer of the score is in training mode."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    if any(isinstance(layer, kinds) and layer.training for layer in score.modules()):
        msg = "score has dropout or batch normalisation in training mode; call its eval() first"
        warnings.warn(msg, UserWarning, stacklevel=3)


def _warn_of_ends(sde: LinearSDE, times: Tensor, shape: Sequence[int], nfe: int) -> None:
    """Warn if the start of sampling does not hide the data, or its end leaves noise."""
    first, last = sde.log_snr(times[[0, -1]]).tolist()
    at = f"at the start of sampling, t = {float(times[0]):.3g}: the noise level is "
    at += f"{math.exp(-first):.3g} there, and should be"
    advice = "or more. Use a larger noise schedule, or a score trained at larger noise levels"
    wanted = _ENOUGH * math.sqrt(_FIRST_VARIANCE * math.prod(shape) * min(nfe, _MANY))
    msg = ""
    if first > -_VISIBLE:
        msg = f"the noise does not hide the data {at} {math.exp(_VISIBLE):.3g} {advice}"
    elif math.exp(-first) < wanted:
        msg = f"the noise does not hide the mean of data of shape {tuple(shape)} {at} {wanted:.3g} "
        msg += f"{advice}. The brightness of images may vary too little"
    elif last < _VISIBLE:
        msg = f"sampling ends at the noise level {math.exp(-last):.3g}, because process or score "
        msg += "have none below. Data lose structure finer than it"
    if msg:
        warnings.warn(msg, UserWarning, stacklevel=3)
