"""Checks of noise levels σ against the range of a network's training."""

from __future__ import annotations

from torch import Tensor

__all__ = ["checked_levels", "outside_levels"]

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
