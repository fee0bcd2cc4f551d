"""Checks of the arguments of an order estimate."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from cldsde.linear.checks import check_positive

from .regression import Array


def checked_levels(
    steps: ArrayLike,
    errors: ArrayLike,
    standard_errors: ArrayLike | None,
    rounding: ArrayLike | None,
) -> tuple[Array, Array, Array, Array]:
    """Steps, errors, standard errors and rounding errors as arrays ``(n,)``."""
    h = np.asarray(steps, dtype=np.float64)
    if h.ndim != 1 or not len(h):
        raise ValueError(f"steps must be a sequence of step sizes; got an array of shape {h.shape}")
    if not (np.isfinite(h).all() and (h > 0).all() and (np.diff(np.log(h)) < 0).all()):
        raise ValueError(f"steps must be finite, positive and decreasing; got {h.tolist()}")
    e = np.asarray(errors, dtype=np.float64)
    if e.shape != h.shape:
        msg = f"errors must have one entry for each of {len(h)} steps; got shape {e.shape}"
        raise ValueError(msg)
    if (e < 0).any():
        raise ValueError(f"errors must be magnitudes, 0 or above; got {e.tolist()}")
    s = _one_for_each(0.0 if standard_errors is None else standard_errors, "standard_errors", h)
    floor = _one_for_each(
        10 * np.finfo(float).eps / h if rounding is None else rounding, "rounding", h
    )
    if not (s[np.isfinite(e)] >= 0).all():
        msg = f"standard_errors must be 0 or above if the error is finite; got {s.tolist()}"
        raise ValueError(msg)
    if not (floor >= 0).all():
        raise ValueError(f"rounding must be 0 or above; got {floor.tolist()}")
    return h, e, s, floor


def _one_for_each(values: ArrayLike, name: str, steps: Array) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.shape not in {(), steps.shape}:
        msg = f"{name} must be one number or {len(steps)}, as steps; got shape {array.shape}"
        raise ValueError(msg)
    return np.broadcast_to(array, steps.shape)


def check_options(
    expected: float | None, tolerance: float, confidence: float, spacing: float
) -> None:
    """Raise a ValueError if an option is out of its range."""
    if expected is not None and not (math.isfinite(expected) and expected > 0):
        raise ValueError(f"expected must be a finite, positive order or None; got {expected}")
    check_positive(tolerance, "tolerance")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1; got {confidence}")
    check_positive(spacing, "spacing")
