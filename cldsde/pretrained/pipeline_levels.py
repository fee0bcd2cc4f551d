"""Noise levels of a pipeline, from a grid of the process or from a scheduler of diffusers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cldsde.linear.checks import as_integer
from cldsde.linear.log_snr import log_snr_range, times_of_log_snr
from cldsde.linear.sde import LinearSDE
from cldsde.pretrained.conventions import LEAST_LOG_SNR, Convention
from cldsde.solvers import SamplerSettings, root_times

# Values of κ at which the process starts and ends. Noise hides the brightness of large images only
# from κ = −5. From κ = −3.3 the brightness of 64 × 64 images shrinks by a fifth.
_FIRST_LOG_SNR, _LAST_LOG_SNR = -5.0, 3.3
# Noise hides data with a standard deviation of 1 from here on.
_HIDDEN = -2.0
# Noisier levels of a network within this distance in κ of the start are not worth an evaluation:
# latents of both have the same distribution to 1 in 1,000.
_NEAR = 0.1
_ROUNDING = 1e-6
# A step of this length in κ does not change single precision.
_NO_LENGTH = 1e-6
# Deviation from an even spacing, relative to the largest value, that rounding may explain.
_UNEVEN = 1e-3


def window(
    sde: LinearSDE, convention: Convention, start: float | None, end: float | None
) -> tuple[float, float]:
    """Times at which a process starts and ends; raise ValueError outside of a network's levels."""
    noisiest, last = convention.ends
    default = max(_FIRST_LOG_SNR, noisiest, log_snr_range(sde)[0]), min(_LAST_LOG_SNR, last)
    ends = torch.tensor([*default, last, noisiest], dtype=torch.float64, device="cpu")
    *times, low, high = times_of_log_snr(sde, ends, sde.regular_until).tolist()
    if end is None and float(sde.log_snr(times[1])) < default[1] - _ROUNDING:
        raise ValueError(
            f"process must have noise levels down to σ = {math.exp(-default[1]):.4g}; {sde!r} has "
            f"none below σ = {math.exp(-float(sde.log_snr(times[1]))):.4g}. Give an end"
        )
    found = [x if y is None else float(y) for x, y in zip(times, (start, end), strict=True)]
    for name, t in zip(("start", "end"), found, strict=True):
        kappa = float(sde.log_snr(t)) if 0 < t <= sde.regular_until else math.nan
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
                f"{name} must be evenly spaced with grid='root_times', which takes their number "
                f"only; got {values.tolist()}. Use grid='scheduler'"
            )
        n = len(values)
    return as_integer(n, 1, "num_inference_steps")


def levels_of_grid(
    sde: LinearSDE,
    convention: Convention,
    ends: tuple[float, float],
    n: int | None,
    given: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """κ of n evaluations on the process's root grid and of the data, and times of the scheduler.

    If the network knows more noise than the start of the grid has, the first is its noisiest level.
    """
    n, (start, end), noisiest = _number_of_steps(n, given), ends, convention.ends[0]
    lead = [noisiest] if noisiest < float(sde.log_snr(start)) - _NEAR else []
    points = n - len(lead)
    if points > 1:
        grid = root_times(start, end, points - 1)
    else:
        grid = torch.full((points,), start, dtype=torch.float64, device="cpu")
    first, last = (torch.tensor(x, dtype=torch.float64, device="cpu") for x in (lead, [math.inf]))
    levels = torch.cat([first, sde.log_snr(grid), last])
    return levels, convention.times(levels[:-1]).float()


def levels_of_settings(
    settings: SamplerSettings, convention: Convention, n: int | None, given: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """κ of settings and of the data, and times of the scheduler.

    A network that knows pure noise, as flow matching does, begins there.
    """
    n, (noisiest, last) = _number_of_steps(n, given), convention.ends
    levels = [noisiest] * (noisiest == -math.inf) + list(settings.log_snr)
    if n != len(levels):
        msg = f"num_inference_steps must be {len(levels)}, the number of levels in the settings"
        raise ValueError(f"{msg}{' and 1' * (len(levels) > settings.nfe)}; got {n}")
    if levels[0] > _HIDDEN:
        raise ValueError(
            f"log_snr of the settings must start at {_HIDDEN:g} or less, because latents start as "
            f"noise; got {settings.log_snr}"
        )
    if not (noisiest - _ROUNDING <= levels[0] and levels[-1] <= last + _ROUNDING):
        raise ValueError(
            f"log_snr of the settings must be levels that the network knows, from {noisiest:.4g} "
            f"to {last:.4g}; got {settings.log_snr}"
        )
    found = torch.tensor([*levels, math.inf], dtype=torch.float64, device="cpu")
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
            f"grid must be 'root_times' for {name}, whose steps evaluate the network "
            f"{scheduler.order} times; got 'scheduler'"
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
        found = convention.log_snr(times.double())
        final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
        last = 0.5 * torch.tensor([final], dtype=torch.float64, device="cpu").logit()
        # DDIM may end with a step of no length at index 0, which changes nothing.
        levels = torch.cat([found, last.clamp(min=found[-1] + _NO_LENGTH)])
        levels = torch.where(levels <= LEAST_LOG_SNR, -math.inf, levels)
    # PNDM repeats a level.
    new = torch.cat([torch.tensor([True], device="cpu"), levels[1:] != levels[:-1]])
    levels, times = levels[new], times[new[: len(times)]]
    if len(levels) != len(times) + 1 or not bool((levels.diff() > 0).all()):
        raise ValueError(
            f"grid must be 'root_times' for {name} with these options, because its noise does not "
            "decrease with each step; got 'scheduler'"
        )
    return levels, times
