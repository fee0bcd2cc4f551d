"""Noise levels of a pipeline, from a grid of the process or from a scheduler of diffusers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cldsde.linear.checks import as_float64, as_integer
from cldsde.linear.kappa import kappa_range, times_of_kappa
from cldsde.linear.sde import LinearSDE
from cldsde.pretrained.conventions import LEAST_KAPPA, Convention
from cldsde.solvers import SamplerSettings, root_times
from cldsde.solvers.recommended import choices_of, hiding_variance

_ROOT = -5.0, 3.3  # κ at which `root_times` starts and ends
_LATENTS = 4, 128, 128  # a scheduler does not know the shape, and starts as for this one
_HIDDEN = -2.0  # κ from which on noise hides data with a standard deviation of 1
_WHOLE = 0.99  # variance of a path's noise that is as good as 1, which the first latents have
_ROUNDING = 1e-6
_NO_LENGTH = 1e-6  # a step in κ that does not change single precision
# Deviation from an even spacing, relative to the largest value, that rounding may explain.
_UNEVEN = 1e-3


def window(
    sde: LinearSDE,
    convention: Convention,
    given: tuple[float | None, float | None],
    levels: tuple[float, float] = _ROOT,
) -> tuple[float, float]:
    """Start and end times, by default at κ of ``levels`` or the nearest that the network knows.

    Raises a ValueError if the network does not know a given time, or the process ends with noise.
    """
    noisiest, last = convention.ends
    default = max(levels[0], noisiest, kappa_range(sde)[0]), min(levels[1], last)
    ends = as_float64([*default, last, noisiest])
    *times, low, high = times_of_kappa(sde, ends, sde.regular_until).tolist()
    if given[1] is None and float(sde.kappa(times[1])) < default[1] - _ROUNDING:
        raise ValueError(
            f"process must have noise levels down to σ = {math.exp(-default[1]):.4g}; {sde!r} has "
            f"none below σ = {math.exp(-float(sde.kappa(times[1]))):.4g}. Give an end"
        )
    found = [x if y is None else float(y) for x, y in zip(times, given, strict=True)]
    for name, t in zip(("start", "end"), found, strict=True):
        kappa = float(sde.kappa(t)) if 0 < t <= sde.regular_until else math.nan
        if not noisiest - _ROUNDING <= kappa <= last + _ROUNDING:
            raise ValueError(
                f"{name} must be a time of {sde!r} at which the network knows the noise level, "
                f"from {low:.4g} to {high:.4g}; got {t:g}"
            )
    if not found[1] < found[0]:
        raise ValueError(f"end must be below start, {found[0]:.4g}; got {found[1]:.4g}")
    return found[0], found[1]


def _number_of_steps(n: int | None, given: Mapping[str, Any]) -> int:
    """Number of steps, from itself or from the evenly spaced times that a pipeline passes."""
    for name in ("timesteps", "sigmas"):
        if name not in given:
            continue
        values = torch.as_tensor(given[name], dtype=torch.float64, device="cpu").flatten()
        uneven = values.diff().diff().abs() > _UNEVEN * values.abs().max()
        if bool((values.diff() >= 0).any()):
            raise ValueError(
                f"{name} must decrease, from the noise to the data; got {values.tolist()}. The "
                "pipeline needs its own scheduler"
            )
        if bool(uneven.any()):
            raise ValueError(
                f"{name} must be evenly spaced unless grid is 'scheduler', because only their "
                f"number is used; got {values.tolist()}"
            )
        n = len(values)
    return as_integer(n, 1, "num_inference_steps")


def levels_of_grid(
    sde: LinearSDE,
    convention: Convention,
    ends: tuple[float | None, float | None],
    n: int | None,
    given: Mapping[str, Any],
    *,
    recommended: bool,
) -> tuple[Tensor, Tensor]:
    """κ of n evaluations and of the data, and times of the scheduler.

    The grid is the recommended one for the number of steps, or `root_times`. ``ends`` are times or
    None. If the noise of the path at the start has less variance than a pipeline's first latents,
    the first level is the network's noisiest.
    """
    n, noisiest = _number_of_steps(n, given), convention.ends[0]
    levels = _ROOT
    grid: Callable[..., Tensor] = root_times
    if recommended:
        choice = choices_of(sde, n - 1)[0]
        levels = -0.5 * math.log(hiding_variance(_LATENTS, n)), choice.ends[1]
        grid = choice.grid
    start, end = window(sde, convention, ends, levels)
    level = sde.kappa(as_float64([start]))
    leads = noisiest < float(level) - _ROUNDING and convention.scales(level)[1].item() ** 2 < _WHOLE
    steps = n - leads - 1
    one = [end] if leads else [start]  # a start after the noisiest level would be wasted
    times = grid(start, end, steps, sde=sde) if steps > 0 else as_float64(one[: steps + 1])
    found = torch.cat([as_float64([noisiest] * leads), sde.kappa(times), as_float64([math.inf])])
    return found, convention.times(found[:-1]).float()


def levels_of_settings(
    settings: SamplerSettings, convention: Convention, n: int | None, given: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """κ of settings and of the data, and times of the scheduler.

    A network that knows pure noise, as flow matching does, begins there. Without n and times it is
    the number of levels.
    """
    noisiest, last = convention.ends
    levels = [noisiest] * (noisiest == -math.inf) + list(settings.kappa)
    steps = len(levels) - (not settings.denoise)
    n = steps if n is None and not given else _number_of_steps(n, given)
    if n != steps:
        msg = f"num_inference_steps must be {steps}, the number of levels in the settings"
        raise ValueError(f"{msg}{' and 1' * (steps > settings.nfe)}; got {n}")
    if levels[0] > _HIDDEN:
        raise ValueError(
            f"kappa of the settings must start at {_HIDDEN:g} or less, because latents start as "
            f"noise; got {settings.kappa}"
        )
    if not (noisiest - _ROUNDING <= levels[0] and levels[-1] <= last + _ROUNDING):
        raise ValueError(
            f"kappa of the settings must be levels that the network knows, from {noisiest:.4g} "
            f"to {last:.4g}; got {settings.kappa}"
        )
    found = as_float64([*levels, *[math.inf] * settings.denoise])
    return found, convention.times(found[:-1]).float()


def levels_of_scheduler(
    scheduler: Any, convention: Convention, n: int | None, given: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """κ of the steps and of the end of a scheduler of diffusers, and its times.

    Its ``set_timesteps`` is called with n and the given arguments.
    """
    name = type(scheduler).__name__
    if getattr(scheduler, "order", 1) != 1:
        raise ValueError(
            f"grid must not be 'scheduler' for {name}, whose steps evaluate the network "
            f"{scheduler.order} times"
        )
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    if unknown := [key for key in given if key not in accepted]:
        msg = f"{unknown[0]} must be None for {name}, which does not take it; got {dict(given)}"
        raise ValueError(msg)
    count = {} if n is None else {"num_inference_steps": n}
    scheduler.set_timesteps(device="cpu", **count, **given)
    times, sigmas = scheduler.timesteps, getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) == len(times) + 1:
        noise = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
        levels = (torch.log1p(-noise) if convention.table is None else 0.0) - noise.log()
    else:
        found = convention.kappa(times.double())
        final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
        last = 0.5 * as_float64([final]).logit()
        # DDIM may end with a step of no length at index 0, which changes nothing.
        levels = torch.cat([found, last.clamp(min=found[-1] + _NO_LENGTH)])
        levels = torch.where(levels <= LEAST_KAPPA, -math.inf, levels)
    # PNDM repeats a level.
    new = torch.cat([torch.tensor([True], device="cpu"), levels[1:] != levels[:-1]])
    levels, times = levels[new], times[new[: len(times)]]
    if len(levels) != len(times) + 1 or not bool((levels.diff() > 0).all()):
        raise ValueError(
            f"grid must not be 'scheduler' for {name} with these options, because its noise does "
            "not decrease with each step"
        )
    return levels, times
