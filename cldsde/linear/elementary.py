"""Elementary functions in forms that do not cancel."""

from __future__ import annotations

import torch
from torch import Tensor


def exponential_rest(y: Tensor) -> Tensor:
    """Compute y + e^{−y} − 1 ≥ 0, by the series y²/2 − y³/6 + … for small y."""
    series = torch.zeros_like(y)
    for n in range(20, 1, -1):
        series = (1 - series) * y / n if n > 2 else y * y / 2 * (1 - series)
    return torch.where(y.abs() < 1, series, y + torch.expm1(-y))
