"""Sampling in one call, with the recommended solver, grid, start and end."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cldsde.linear.checks import as_device, as_integer
from cldsde.linear.sde import LinearSDE
from cldsde.progress import progress_bar
from cldsde.score import ReverseProcess, Score, ScoreFunction

from .base import Solver, check_solver
from .noise import SampleNoise
from .recommended import hiding_variance, recommended_plan
from .settings import SamplerSettings

# A start below this part of the level, for at most so many evaluations, is worth a warning.
_ENOUGH, _MANY = 0.9, 20
# Samples follow the prior noticeably from κ above −2, and lose structure up to κ below 2.
_VISIBLE = 2.0

# Largest numbers of state entries and of samples in one batch.
_NUMBERS, _SAMPLES = 2**20, 4096


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
    """Generate samples ``(B, *D)`` from a score, with solver and grid chosen for the process.

    The choice is for data with a standard deviation of about 1. Scale other data: for EDM's data,
    with σ_data = 0.5, take the denoiser ``2 * net(u / 2, sigma / 2)`` and halve the samples.

    The solver is the first of `RECOMMENDED` that applies to the process and number of steps.
    Sampling starts at the noise level σ with σ² = D·nfe/40 for D numbers per sample, at least at
    σ = 27 (κ = −3.3; κ = −log σ = ½ log SNR), and ends at κ = 3.3 with the data prediction. At most
    8 steps of a process of one component end at κ = 2.6. At most 4 steps of other processes start
    at least at σ = 20, and end at κ = 2.35. A score that knows the noise levels of its training,
    such as `DenoiserScore`, narrows this range.

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
        `ScoreDenoiser` that fills states up makes a sample depend on its place in the batch, and on
        the batch's size, too.
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

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If ``nfe`` allows no step, ``shape`` is not ``(B, *D)``, the grid does not decrease, or the
        solver does not apply to the process. The score has not been evaluated in these cases.
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
    The end at κ = 3.3 smooths structure finer than e^{−κ} ≈ 0.04, and the earlier ends of few steps
    finer than 0.1. If an exact score has finer structure, pass ``times`` with a smaller end.

    The settings of few steps suit networks. With an exact score of normal data of variance 1, 4 to
    9 evaluations give standard deviations up to 12 % (VP) or 22 % (CLD) too large, and 3
    evaluations give 24 % too small ones. Take at least 10.

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
    device = process.score.device if device is None else as_device(device)
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


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Check the shape ``(B, *D)`` of samples."""
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
    wanted = _ENOUGH * math.sqrt(hiding_variance(shape, min(nfe, _MANY)))
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
