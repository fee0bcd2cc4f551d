"""Sampling in one call, with the recommended solver, grid, start and end."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cldsde.linear.checks import as_device, as_grid_times, as_integer, check_dtype
from cldsde.linear.sde import LinearSDE
from cldsde.progress import progress_bar
from cldsde.score import ReverseProcess, Score, ScoreFunction

from .base import Solver, check_solver
from .named import find_solver
from .noise import SampleNoise
from .planning import Plan, plan
from .recommended import VISIBLE, checked_shape, hiding_variance, recommended_plan, resolved
from .settings import SamplerSettings

# A start below this part of the level, for at most so many evaluations, is worth a warning.
_ENOUGH, _MANY = 0.9, 20
# Largest numbers of state entries and of samples in one batch.
_NUMBERS, _SAMPLES = 2**20, 4096


def sample(
    sde: LinearSDE,
    score: ScoreFunction,
    shape: Sequence[int],
    *,
    nfe: int = 20,
    seed: int = 0,
    noise: SampleNoise | None = None,
    solver: Solver | str | None = None,
    times: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    batch: int | None = None,
    progress: bool = False,
    settings: SamplerSettings | None = None,
) -> Tensor:
    """Generate samples ``(B, *D)`` from a score, with solver and grid chosen for the process.

    The choice is for networks, and for data with a standard deviation of about 1. For EDM's data,
    with σ_data = 0.5, take the denoiser ``2 * net(u / 2, sigma / 2)`` and halve the samples. See
    "Which solver, grid and end?" for exact scores and large images.

    `recommend` chooses the settings: the first of `RECOMMENDED` that applies to the process and
    number of steps. If the score does not determine the data, the solver is `SSCS`.
    Sampling starts at the noise level σ with σ² = D·nfe/40 for D numbers per sample, at least at
    σ = 27 (κ = −3.3; κ = −log σ = ½ log SNR), and ends at κ = 3.3 with the data prediction. At most
    8 steps end earlier: a process of one component at κ = 2.6 (1.7 with at most 4 steps), others at
    κ = 3.0 (1.7 with at most 5 steps, which start at least at σ = 20). Structure finer than σ at
    the end is smoothed: 0.18 for κ = 1.7. Solvers other than `ExponentialMultistep`, and a given
    one, have `root_times` to κ = 3.3. A score that knows its noise levels narrows this range.

    Parameters
    ----------
    sde
        The process to sample with.
    score
        Function score(z, t), such as a `DenoiserScore`, with its network in evaluation mode. A
        `ConditionalScore` holds conditions for all B samples.
    shape
        ``(B, *D)``: number of samples and shape of one sample.
    nfe
        Largest number of network evaluations per sample, with the data prediction at the end. A
        guided step (`GuidedScore`) takes two. Ignored by adaptive solvers.
    seed
        Seed of all random numbers, ≥ 0. Each sample has a random stream of its own. Samples do not
        depend on B and ``batch``, unless by rounding, a `ScoreDenoiser` that fills states up, or a
        solver whose step sizes a batch shares.
    noise
        A random stream per sample, in place of ``seed``: ``SampleNoise(seeds)`` for B seeds.
    solver, times, settings
        Solver, or its name (`named_solvers`), in place of the recommended one, and decreasing grid
        ``(n + 1,)`` in place of ``nfe``; or settings, which have both. A data prediction follows a
        grid that ends above 0.
    device, dtype
        Device (None: of the score's parameters, or the CPU) and floating-point dtype of samples.
    batch, progress
        Number of samples in one batch (None: up to 4,096, fewer if a sample is large), and whether
        to show a progress bar on stderr.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, ``nfe`` allows no step, ``shape`` is not ``(B, *D)``, the
        grid does not decrease, or the solver does not apply. The score has not been evaluated then.
    FloatingPointError
        If a sample is not finite.

    Warns
    -----
    UserWarning
        Without given times: if sampling starts at κ > −2, or large samples below 0.9 of the level
        above, which biases them, or process or score end it before κ = 2. If a layer of the score
        is in training mode.

    Examples
    --------
    >>> import torch, cldsde
    >>> sde, data = cldsde.CLD(), cldsde.GaussianMixture([1.0], [[0.5, 1.0]], [torch.eye(2) / 4])
    >>> cldsde.sample(sde, data.score(sde), (1000, 2), nfe=10).mean(0).round(decimals=1)
    tensor([0.5000, 1.0000])
    """
    process = ReverseProcess(sde, score)
    shape = checked_shape(shape, "(B, *D)")
    nfe, seed = as_integer(nfe, 1, "nfe"), as_integer(seed, 0, "seed")
    check_dtype(dtype)
    if noise is not None:
        if not isinstance(noise, SampleNoise):
            raise TypeError(f"noise must be a SampleNoise; got {type(noise).__name__}")
        if seed:
            raise ValueError("seed and noise are alternatives; got both")
        if len(noise.seeds) != shape[0] or batch is not None:
            msg = f"noise must have one seed for each of {shape[0]} samples, and batch be None; got"
            raise ValueError(f"{msg} {len(noise.seeds)} seeds and batch={batch}")
        batch = shape[0]
    made = _planned(process, shape[1:], nfe, solver, times, settings)
    return _in_batches(
        made, shape, seed if noise is None else noise, device, dtype, batch, progress
    )


def _planned(
    process: ReverseProcess,
    shape: Sequence[int],
    nfe: int,
    solver: Solver | str | None,
    times: Tensor | None,
    settings: SamplerSettings | None,
) -> Plan:
    """The plan for samples of a shape; warn of ends or a score that bias them."""
    if solver is not None:
        solver = find_solver(solver) if isinstance(solver, str) else check_solver(solver)
    if settings is not None:
        if not isinstance(settings, SamplerSettings):
            raise TypeError(f"settings must be a SamplerSettings; got {type(settings).__name__}")
        if not (solver is None and times is None):
            raise ValueError("solver and times must be None with settings, which have both")
    if times is not None and (grid := as_grid_times(times, "times"))[0] < grid[-1]:
        raise ValueError("times must decrease, from the noise to the data")
    _warn_of_training(process.score)
    if settings is not None:
        return plan(process, settings)
    if times is not None:
        return resolved(process, solver, times)
    last = math.inf
    if solver is not None:
        made = resolved(process, solver, nfe=nfe, shape=shape)
    else:
        made, last = recommended_plan(process, nfe, shape)
    _check_ends(process.sde, made.times, shape, nfe, last)
    return made


def _in_batches(
    sampler: Plan,
    shape: Sequence[int],
    seed: int | SampleNoise,
    device: torch.device | str | None,
    dtype: torch.dtype,
    batch: int | None,
    progress: bool,
) -> Tensor:
    """Samples ``(B, *D)`` of a plan, in batches; without a size they hold `_NUMBERS` numbers."""
    sde, score = sampler.process.sde, sampler.process.score
    count, *data_shape = shape
    device = score.device if device is None else as_device(device)
    most = max(1, _NUMBERS // (sde.components * math.prod(data_shape)))
    size = min(_SAMPLES, most) if batch is None else as_integer(batch, 1, "batch")
    first_time = float(sampler.times[0])
    found = []
    with progress_bar(None, shown=progress, total=count, desc="sampling") as bar, torch.no_grad():
        for first in range(0, count, size):
            noise = seed
            if not isinstance(noise, SampleNoise):
                noise = SampleNoise(range(first, min(first + size, count)), key=noise)
            start = noise.start(sde, data_shape, dtype=dtype, device=device, t=first_time)
            batched = sampler.part(slice(first, first + size), shape)
            solution = batched.solve(start, noise=noise, warn=False)
            found.append(solution.raise_for_failure().data)
            bar.update(len(noise.seeds))
    return torch.cat(found)


def _warn_of_training(score: Score) -> None:
    """Warn if a layer of the score is in training mode."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    if any(isinstance(layer, kinds) and layer.training for layer in score.modules()):
        msg = "score has dropout or batch normalisation in training mode; call its eval() first"
        warnings.warn(msg, UserWarning, stacklevel=4)


def _check_ends(sde: LinearSDE, times: Tensor, shape: Sequence[int], nfe: int, end: float) -> None:
    """Warn if the start of sampling does not hide the data, or it ends well before κ = ``end``."""
    first, last = sde.kappa(times[[0, -1]]).tolist()
    at = f"at the start of sampling, t = {float(times[0]):.3g}: the noise level is "
    at += f"{math.exp(-first):.3g} there, and should be"
    advice = "or more. Use a larger noise schedule, or a score trained at larger noise levels"
    wanted = _ENOUGH * math.sqrt(hiding_variance(shape, min(nfe, _MANY)))
    msg = ""
    if first > -VISIBLE:
        msg = f"the noise does not hide the data {at} {math.exp(VISIBLE):.3g} {advice}"
    elif math.exp(-first) < wanted:
        msg = f"the noise does not hide the mean of data of shape {tuple(shape)} {at} {wanted:.3g} "
        msg += f"{advice}. The brightness of images may vary too little"
    elif last < min(VISIBLE, end - 0.1):
        msg = f"sampling ends at the noise level {math.exp(-last):.3g}, because process or score "
        msg += "have none below. Data lose structure finer than it"
    if msg:
        warnings.warn(msg, UserWarning, stacklevel=4)
