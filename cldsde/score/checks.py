"""Checks of the arguments of scores."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from cldsde.linear.checks import TimeLike, as_times
from cldsde.linear.sde import LinearSDE

__all__ = ["check_process", "one_of", "score_times"]


def check_process(sde: object) -> None:
    """Raise TypeError unless ``sde`` is a `LinearSDE`, ready for use."""
    if not isinstance(sde, LinearSDE):
        hint = " (write it with parentheses)" if isinstance(sde, type) else ""
        got = sde.__name__ if isinstance(sde, type) else type(sde).__name__
        msg = f"sde must be a LinearSDE; got {got}{hint}"
        raise TypeError(msg)
    if not hasattr(sde, "dynamics"):
        msg = f"sde: {type(sde).__name__} has to call super().__init__ with its dynamics"
        raise TypeError(msg)


def score_times(t: TimeLike, z: Tensor) -> Tensor:
    """Times of a score call in float64 on the host, ``()`` where the batch shares one.

    Parameters
    ----------
    t
        One time or ``(B,)``. A ``(B,)`` tensor expanded from one number (stride 0) is known to
        be shared without looking at its values.
    z
        The state, ``(B, k, *D)``.

    Raises
    ------
    ValueError
        If t has another shape or a time lies outside [0, 1].
    """
    if isinstance(t, Tensor) and t.ndim == 1 and t.stride() == (0,) and len(t) == len(z) > 0:
        t = t[0]
    times = as_times(t, "t", 1.0)
    if times.shape not in (torch.Size([]), torch.Size([len(z)])):
        msg = f"t must be one time or have shape ({len(z)},); got {tuple(times.shape)}"
        raise ValueError(msg)
    return times


def one_of(value: object, allowed: object, name: str) -> None:
    """Raise ValueError unless ``value`` is one of the strings of a Literal type."""
    options = get_args(allowed)
    if value not in options:
        msg = f"{name} must be one of {', '.join(map(repr, options))}; got {value!r}"
        raise ValueError(msg)
