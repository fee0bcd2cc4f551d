"""Where the tolerances of the suite come from: one constant or function per source.

A test compares with a bound made here, or with a constant of its own file that says its source.
"""

from __future__ import annotations

import math

import torch

EPS = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps

KERNEL = 1e-12
"""The package's promise for kernels: Psi and Sigma by norm, the diagonal of the root by entry."""


def rounding(
    operations: float = 16, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> float:
    """Error of so many operations on numbers of the size ``scale``: a multiple of eps.

    For a relative tolerance the scale is the condition number of the operations.
    """
    return operations * torch.finfo(dtype).eps * scale


def standard_error(std: float, samples: int, number: float = 4.0) -> float:
    """``number`` standard errors of a mean; with 4, one comparison fails for 6e-5 of all seeds."""
    return number * std / math.sqrt(samples)


def standard_error_of_variance(variance: float, samples: int, number: float = 4.0) -> float:
    """``number`` standard errors of the variance of normal samples, variance * sqrt(2 / n)."""
    return standard_error(variance * math.sqrt(2), samples, number)


def order_of(step: float, order: float, constant: float = 1.0) -> float:
    """Error that a method's order predicts for steps of this size: C h^p."""
    return float(constant * step**order)
