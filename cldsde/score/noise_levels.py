"""Noise levels σ as arguments of denoisers: reading them, and checks of the trained range."""

from __future__ import annotations

import torch
from torch import Tensor

from cldsde.linear.checks import as_float64

__all__ = ["checked_levels", "outside_levels", "read_levels"]

# Levels beyond the end of the range by less than this relative error count as the end, because
# times in single precision have such errors.
_ROUNDING = 1e-4


def outside_levels(levels: Tensor, low: float, high: float) -> Tensor:
    """Which noise levels lie outside of a range, apart from rounding."""
    return ~((levels >= low * (1 - _ROUNDING)) & (levels <= high * (1 + _ROUNDING)))


def checked_levels(levels: Tensor, low: float, high: float) -> Tensor:
    """Return noise levels clamped to the range of training.

    Raises
    ------
    ValueError
        If a level lies outside, apart from rounding.
    """
    outside = outside_levels(levels, low, high)
    if bool(outside.any()):
        msg = (
            f"sigma must lie in [{low:.6g}, {high:.6g}], the noise levels of the network's "
            f"training; got {float(levels[outside][0]):.6g}"
        )
        raise ValueError(msg)
    return levels.clamp(low, high)


def read_levels(sigma: Tensor | float, u: Tensor) -> Tensor:
    """Noise levels as float64 on the CPU, ``()`` if the batch shares one."""
    known = getattr(sigma, "known", None)
    levels = known.value if known is not None else as_float64(sigma).detach().cpu()
    if levels.shape not in (torch.Size([]), torch.Size([len(u)])):
        msg = f"sigma must be one level or have shape ({len(u)},); got {tuple(levels.shape)}"
        raise ValueError(msg)
    return levels
