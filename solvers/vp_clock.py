"""Time of the default `cldsde.VPSDE`, as a clock for every process of one component.

Processes of one component differ in clock and scale alone: at equal κ they have the same û = x/α.
Grids and polynomials in one clock make their samples the same, too. VP's clock is smooth and
extends to all κ, unlike the time of rectified flow, in which large noise is a short interval.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["log_snr_of_vp_time", "vp_time"]

_BETA_MIN, _BETA_MAX = 0.1, 20.0


def vp_time(log_snr: Tensor) -> Tensor:
    """Time t with β_min t + ½(β_max − β_min) t² = log(1 + e^{−2κ}); above 1 for κ < −5.02."""
    total = torch.nn.functional.softplus(-2 * log_snr)
    # The root of the quadratic equation in the form that does not cancel for small B.
    slope = _BETA_MAX - _BETA_MIN
    return 2 * total / (_BETA_MIN + (_BETA_MIN**2 + 2 * slope * total).sqrt())


def log_snr_of_vp_time(t: Tensor) -> Tensor:
    """κ = −½ log(e^{B(t)} − 1), the inverse of `vp_time`."""
    total = t * (_BETA_MIN + 0.5 * (_BETA_MAX - _BETA_MIN) * t)
    # log(e^B − 1) = B + log(1 − e^{−B}), which does not overflow for large B.
    return -0.5 * (total + (-torch.expm1(-total)).log())
