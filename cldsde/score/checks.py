"""Argument checks of the score layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import get_args


def one_of(value: object, allowed: object, name: str) -> None:
    """Raise ValueError unless ``value`` is in a tuple of strings, or in a Literal type."""
    options = allowed if isinstance(allowed, tuple) else get_args(allowed)
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}; got {value!r}")


def two_increasing(value: object, name: str) -> tuple[float, float]:
    """Check and return two increasing real numbers, of which the second may be infinite.

    Raises
    ------
    ValueError
        If ``value`` is anything else.
    """
    pair = tuple(value) if isinstance(value, Sequence) else ()
    if len(pair) != 2 or not all(isinstance(x, Real) for x in pair) or not pair[0] < pair[1]:
        raise ValueError(f"{name} must be two increasing numbers; got {value!r}")
    low, high = float(pair[0]), float(pair[1])
    if not math.isfinite(low):
        raise ValueError(f"{name} must start with a finite number; got {value!r}")
    return low, high
