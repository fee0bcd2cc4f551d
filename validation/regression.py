"""Local orders of convergence, and the regression that docs/reference/measuring.md describes."""

from __future__ import annotations

import math

import numpy as np

from .plain import Array


def local_orders(x: Array, y: Array, variances: Array) -> tuple[Array, Array]:
    """Slopes between neighbours, and their covariance matrix."""
    differences = np.diff(np.eye(len(x)), axis=0) / np.diff(x)[:, None]
    return differences @ y, (differences * variances) @ differences.T


def is_steady(x: Array, y: Array, variances: Array, quantile: float) -> bool:
    """Whether local orders are monotonic with decreasing changes, up to their sampling errors."""
    changes, noise = _changes(x, y, variances, quantile)
    growth = np.diff(np.abs(changes))
    grows = bool((growth > noise[1:] + noise[:-1]).any())
    return not (grows or turns(x, y, variances, quantile))


def turns(x: Array, y: Array, variances: Array, quantile: float) -> bool:
    """Whether local orders go up and down by more than their sampling errors."""
    changes, noise = _changes(x, y, variances, quantile)
    seen = np.sign(changes) * (np.abs(changes) > noise)
    return bool((seen > 0).any() and (seen < 0).any())


def _changes(x: Array, y: Array, variances: Array, quantile: float) -> tuple[Array, Array]:
    """Changes of local orders, and the half-widths of their intervals."""
    local, covariance = local_orders(x, y, variances)
    differences = np.diff(np.eye(len(local)), axis=0)
    spread = differences @ covariance @ differences.T
    return np.diff(local), quantile * np.sqrt(spread.diagonal())


def log_slope(x: Array, y: Array, variances: Array, spacing: float) -> tuple[float, float, float]:
    """Slope of y on x by generalised least squares, its standard deviation, and χ²/(n − 2)."""
    power = np.exp(spacing * (x - x[0]))
    u = np.outer(power, power) / 4
    root = np.linalg.cholesky(np.diag(variances) + u / (1 - u))
    columns = np.stack([np.ones_like(x), x - x[0], y - y[0]], axis=1)
    one, regressor, response = np.linalg.solve(root, columns).T
    regressor, response = (z - one * (one @ z) / (one @ one) for z in (regressor, response))
    information = regressor @ regressor
    slope = regressor @ response / information
    residuals = response - slope * regressor
    excess = float(residuals @ residuals) / (len(x) - 2)
    return float(slope), math.sqrt(max(1.0, excess) / float(information)), excess
