"""Estimates of orders of convergence, with confidence intervals, from errors on several grids."""

from __future__ import annotations

import enum
import math
from collections import Counter
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cldsde.linear.checks import check_positive

from .plain import Array, plain
from .regression import is_steady, local_orders, log_slope, turns

_MODEL = 1e-3  # relative error of every expansion of an error, however smooth it looks
_COARSE = "disagrees with finer levels"


class Verdict(enum.StrEnum):
    """Outcome of the comparison of a measured order with a declared one."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"


@dataclass(frozen=True)
class Level:
    """One grid: its step size, its error, and whether the estimate uses it."""

    step: float
    error: float  #: NaN if the solver diverged.
    standard_error: float  #: 0 for an exact error.
    kept: bool  #: Whether the estimate uses the level.
    reason: str = ""  #: Reason why the level was dropped; empty if it is kept.


@dataclass(frozen=True)
class OrderEstimate:
    """A measured order of convergence; see `estimate_order` for its options."""

    order: float  #: NaN if fewer than 3 levels are left.
    low: float  #: Lower end of the confidence interval.
    high: float  #: Upper end of the confidence interval.
    expected: float | None
    tolerance: float
    confidence: float
    #: Order, low and high between neighbouring kept levels, from the coarsest. These intervals
    #: cover sampling and rounding errors only.
    local_orders: tuple[tuple[float, float, float], ...]
    levels: tuple[Level, ...]  #: All levels, from the coarsest.
    verdict: Verdict | None  #: None without ``expected``.
    message: str  #: The outcome in a sentence.

    @property
    def exceeds(self) -> bool:
        """Whether the whole interval is above ``expected + tolerance``."""
        return self.expected is not None and self.low > self.expected + self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Fields and `exceeds` in types of strict JSON: lists for tuples, None for NaN."""
        return {**plain(self), "exceeds": self.exceeds}

    def __str__(self) -> str:
        if math.isnan(self.order):
            measured = "no order"
        else:
            measured = f"{self.order:.2f} [{self.low:.2f}, {self.high:.2f}]"
        if self.expected is None:
            return measured
        return f"{measured}, declared {self.expected:g}: {self.verdict}"


def estimate_order(
    steps: ArrayLike,
    errors: ArrayLike,
    standard_errors: ArrayLike | None = None,
    *,
    expected: float | None = None,
    tolerance: float = 0.25,
    confidence: float = 0.95,
    rounding: ArrayLike | None = None,
    spacing: float = 0.5,
) -> OrderEstimate:
    """Estimate the order p of errors :math:`e(h) = C h^p (1 + O(h^q))`, with an interval.

    The order is the slope of log e on log h. Levels in rounding errors or noise, and coarse levels
    that disagree with finer ones, are dropped. See :doc:`/reference/measuring` for all rules, the
    verdicts, and the cases in which the interval covers p.

    Parameters
    ----------
    steps
        Step sizes ``(n,)``, positive and decreasing; usually halved from level to level.
    errors
        Magnitudes of the errors ``(n,)``. One that is not finite drops its level.
    standard_errors
        Standard errors of the errors, ``(n,)`` or one for all. None: 0, for exact errors. Levels
        are assumed to be independent.
    expected
        Declared order to compare with.
    tolerance
        Largest shortfall from ``expected``, and largest half-width of an interval, that pass.
    confidence
        Confidence level of the intervals, in (0, 1).
    rounding
        Bounds on the rounding errors of ``errors``, ``(n,)`` or one for all. None:
        :math:`10 · 2^{-52}/h`, for solutions of size 1.
    spacing
        q, the distance between the powers of h in the error's expansion. 1/2 covers most methods.
        1 gives a narrower interval. Take 1 for one-step methods for ODEs (Hairer et al. 1993,
        II.8), and for moments of solvers of SDEs with smooth coefficients (Talay and Tubaro 1990).

    Raises
    ------
    ValueError
        If lengths differ, steps are not positive and decreasing, an error, a standard error or a
        rounding error is negative, or an option is out of its range.

    Examples
    --------
    >>> h = [1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128]
    >>> print(estimate_order(h, [0.3 * x * (1 + x) for x in h], expected=1))
    0.99 [0.95, 1.04], declared 1: PASS
    >>> print(estimate_order(h, [0.3 * x for x in h], expected=1.5))
    1.00 [0.96, 1.04], declared 1.5: FAIL
    """
    levels = _checked_levels(steps, errors, standard_errors, rounding)
    _check_options(expected, tolerance, confidence, spacing)
    quantile = -NormalDist().inv_cdf((1 - confidence) / 2)
    reasons = _reasons(levels, tolerance, quantile)
    kept = levels[:, [not reason for reason in reasons]]
    order, low, high = _interval(kept, spacing, confidence, quantile)
    verdict, relation = _judge(low, high, expected, tolerance)
    message = _message(order, low, high, relation, reasons)
    usable = levels[:, [reason in ("", _COARSE) for reason in reasons]]
    if expected is not None and (fault := _fault(usable, expected, tolerance, quantile, verdict)):
        verdict, message = Verdict.FAIL, fault
    return OrderEstimate(
        order=order,
        low=low,
        high=high,
        expected=None if expected is None else float(expected),
        tolerance=float(tolerance),
        confidence=float(confidence),
        local_orders=_local_intervals(kept, quantile),
        levels=_as_levels(levels, reasons),
        verdict=verdict,
        message=message,
    )


def _checked_levels(
    steps: ArrayLike,
    errors: ArrayLike,
    standard_errors: ArrayLike | None,
    rounding: ArrayLike | None,
) -> Array:
    """Levels ``(4, n)``: steps, errors, standard errors and rounding errors."""
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

    def one_for_each(values: ArrayLike, name: str) -> Array:
        array = np.asarray(values, dtype=np.float64)
        if array.shape not in {(), h.shape}:
            msg = f"{name} must be one number or {len(h)}, as steps; got shape {array.shape}"
            raise ValueError(msg)
        return np.broadcast_to(array, h.shape)

    s = one_for_each(0.0 if standard_errors is None else standard_errors, "standard_errors")
    floor = one_for_each(10 * np.finfo(float).eps / h if rounding is None else rounding, "rounding")
    if not (s[np.isfinite(e)] >= 0).all():
        msg = f"standard_errors must be 0 or above if the error is finite; got {s.tolist()}"
        raise ValueError(msg)
    if not (floor >= 0).all():
        raise ValueError(f"rounding must be 0 or above; got {floor.tolist()}")
    return np.stack([h, e, s, floor])


def _check_options(
    expected: float | None, tolerance: float, confidence: float, spacing: float
) -> None:
    if expected is not None and not (math.isfinite(expected) and expected > 0):
        raise ValueError(f"expected must be a finite, positive order or None; got {expected}")
    check_positive(tolerance, "tolerance")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1; got {confidence}")
    check_positive(spacing, "spacing")


def _reasons(levels: Array, tolerance: float, quantile: float) -> list[str]:
    """Reasons why levels are dropped; empty for a level that is kept."""
    _, e, s, floor = levels
    names = ["not finite", "below rounding", "below 3 standard errors"]
    reasons: list[str] = np.select([~np.isfinite(e), e <= floor, e / 3 < s], names, "").tolist()
    usable = np.flatnonzero([not reason for reason in reasons])
    x, y, variances = _logarithms(levels[:, usable])
    for i, coarsest in enumerate(usable[:-2]):
        local, covariance = local_orders(x[i:], y[i:], variances[i:])
        spread = covariance[0, 0] + covariance.diagonal() - 2 * covariance[0]
        allowed = tolerance + quantile * np.sqrt(spread[1:])
        if (np.abs(local[1:] - local[0]) <= allowed).all():
            break
        reasons[coarsest] = _COARSE
    return reasons


def _logarithms(levels: Array) -> tuple[Array, Array, Array]:
    """Logarithms of steps and errors, and the variances of the latter."""
    h, e, s, floor = levels
    return np.log(h), np.log(e), (s / e) ** 2 + (floor / 3 / e) ** 2 + _MODEL**2


def _interval(
    levels: Array, spacing: float, confidence: float, quantile: float
) -> tuple[float, float, float]:
    """Order by regression, and the ends of its interval; NaN for fewer than 3 levels."""
    count = levels.shape[1]
    if count < 3:
        return math.nan, math.nan, math.nan
    points = _logarithms(levels)
    if not is_steady(*points, quantile):
        spacing = min(spacing, 0.5)
    order, std, excess = log_slope(*points, spacing)
    # A variance that is estimated from residuals has an uncertainty of its own.
    if excess > 1 and not (levels[2] > 0).all():
        from scipy.stats import t  # imported here because it is slow to import

        quantile = float(t.ppf((1 + confidence) / 2, count - 2))
    return order, order - quantile * std, order + quantile * std


def _local_intervals(levels: Array, quantile: float) -> tuple[tuple[float, float, float], ...]:
    """Local orders, and the ends of their intervals."""
    local, covariance = local_orders(*_logarithms(levels))
    margins = quantile * np.sqrt(covariance.diagonal())
    lows, highs = local - margins, local + margins
    return tuple(zip(local.tolist(), lows.tolist(), highs.tolist(), strict=True))


def _as_levels(levels: Array, reasons: list[str]) -> tuple[Level, ...]:
    """Levels as a part of the result."""
    numbers = np.where(np.isfinite(levels[:3]), levels[:3], math.nan).T.tolist()
    return tuple(
        Level(step, error, std, kept=not reason, reason=reason)
        for (step, error, std), reason in zip(numbers, reasons, strict=True)
    )


def _judge(
    low: float, high: float, expected: float | None, tolerance: float
) -> tuple[Verdict | None, str]:
    """Verdict on an interval, and how it lies to the declared order."""
    if expected is None:
        return None, "has no declared order to be compared with"
    least = expected - tolerance
    if high < least:
        return Verdict.FAIL, f"is more than {tolerance:g} below the declared {expected:g}"
    if (high - low) / 2 > tolerance:
        return Verdict.INCONCLUSIVE, f"is uncertain by more than {tolerance:g}"
    if low > expected + tolerance:
        return Verdict.PASS, f"is more than {tolerance:g} above the declared {expected:g}"
    if low >= least:
        return Verdict.PASS, f"is at most {tolerance:g} below the declared {expected:g}"
    relation = f"may be more than {tolerance:g} below the declared {expected:g}, or not"
    return Verdict.INCONCLUSIVE, relation


def _fault(
    levels: Array, expected: float, tolerance: float, quantile: float, verdict: Verdict | None
) -> str:
    """Fault that the last local order shows beyond the verdict; empty if there is none."""
    if levels.shape[1] < 2:
        return ""
    _, e, s, floor = levels[:, [0, -1]]
    grown = e[1] - e[0] > quantile * math.hypot(*s, *(floor / 3))
    ((last, _, limit),) = _local_intervals(levels[:, -2:], quantile)
    if not levels[2].any() and turns(*_logarithms(levels), quantile):
        return ""  # the levels have noise without known standard errors
    if grown and limit < expected - tolerance:
        return f"The errors grow as steps shrink; the last local order is {last:.2f}."
    if limit < expected - 2 * tolerance and verdict is not Verdict.FAIL:
        return (
            f"The errors stop decreasing: the last local order is {last:.2f}, more than "
            f"{2 * tolerance:g} below the declared {expected:g}."
        )
    return ""


def _message(order: float, low: float, high: float, relation: str, reasons: list[str]) -> str:
    used = f"{reasons.count('')} of {len(reasons)} levels"
    if math.isnan(order):
        counts = Counter(reason for reason in reasons if reason)
        why = ", ".join(f"{reason}: {count}" for reason, count in counts.items())
        return f"An order needs 3 levels, and {used} can be used{why and f' ({why})'}."
    return f"The order {order:.2f} [{low:.2f}, {high:.2f}], from {used}, {relation}."
