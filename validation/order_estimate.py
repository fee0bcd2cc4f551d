"""Estimates of orders of convergence, with confidence intervals, from errors on several grids."""

from __future__ import annotations

import enum
import json
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

    def to_json(self) -> str:
        """`to_dict` as a JSON text."""
        return json.dumps(self.to_dict(), allow_nan=False)

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
    r"""Estimate the order p of errors :math:`e(h) = C h^p (1 + O(h^q))`, with an interval.

    Parameters
    ----------
    steps
        Step sizes ``(n,)``, positive and decreasing; usually halved from level to level.
    errors
        Magnitudes of the errors ``(n,)``. A level whose error is not finite, from a solver that
        diverged, is dropped.
    standard_errors
        Standard errors ``(n,)`` of the errors, or one for all. None: 0, for exact errors. Levels
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
        With 1 the interval is narrower. It holds for one-step methods for ordinary differential
        equations, and for moments of solvers of SDEs with smooth coefficients [1]_ [2]_.

    Raises
    ------
    ValueError
        If lengths differ, steps are not positive and decreasing, an error, a standard error or a
        rounding error is negative, or an option is out of its range.

    Notes
    -----
    The logarithm of the error at level i has the variance

    .. math:: v_i = (s_i/e_i)^2 + (ρ_i/3e_i)^2 + 0.001^2

    with the standard error s, the rounding error ρ, and 0.1 % for the error of the expansion.

    1. Levels are dropped whose error is not finite, at most ρ, or below 3 s.
    2. The local order of the two coarsest levels, :math:`Δ\log e/Δ\log h`, is compared with all
       finer local orders. If it differs by more than ``tolerance`` plus the half-width of the
       difference's interval, the coarsest level is dropped. This is repeated.
    3. If fewer than 3 levels are left, there is no order.
    4. The order is the slope of :math:`\log e` on :math:`\log h` by generalised least squares. Its
       covariance matrix is

       .. math:: V_{ij} = v_i δ_{ij} + \frac{u_{ij}}{1 - u_{ij}},
                 \qquad u_{ij} = \frac14 \left(\frac{h_i h_j}{h_1^2}\right)^q,

       with :math:`h_1` the coarsest kept step. The second part is the covariance of
       :math:`\sum_{k≥1} c_k (h/h_1)^{kq}` with independent :math:`c_k` of standard deviation
       :math:`2^{-k}`. It models the pre-asymptotic terms. If the errors are precise enough, the
       regression extrapolates these terms away. One leading term makes local orders monotonic with
       decreasing changes. If they are not, q is at most 1/2.
    5. The interval is the normal interval, widened by :math:`\sqrt{χ^2/(n - 2)}` if the residuals'
       :math:`χ^2` exceeds n − 2. In that case, unless all levels have standard errors, Student's
       distribution with n − 2 degrees of freedom is used.

    The verdict is

    - FAIL if the interval lies below ``expected - tolerance``;
    - PASS if it lies above ``expected - tolerance``, and its half-width is at most ``tolerance``;
    - INCONCLUSIVE otherwise.

    An order above the declared order passes, because many solvers are better than declared on easy
    problems. The verdict is also FAIL in two cases, which concern the interval of the last local
    order of the levels that rule 1 leaves:

    - It lies below ``expected - 2 * tolerance``: errors stop decreasing above rounding and noise.
      An exception are levels without standard errors whose local orders go up and down like noise.
    - It lies below ``expected - tolerance``, and the finest error exceeds the coarsest
      significantly: errors grow.

    For exact errors :math:`C h^p (1 + a (h/h_1)^r)` on halved steps, the interval covers p in these
    cases:

    - r = 1, 5 levels or more: a from −0.9 to 4;
    - r = 1, 4 levels: a up to 2;
    - r = 1/2 and q = 1/2: a up to 1.

    Pass standard errors if there are any. With unknown noise of 5 % at each of 4 to 8 levels, an
    interval of 95 % covers p in about 85 of 100 cases.

    The interval says nothing about finer grids than the measured ones. An error that approaches a
    constant well below the finest level is not detected.

    References
    ----------
    .. [1] Hairer, Nørsett and Wanner (1993), Solving Ordinary Differential Equations I, II.8.
    .. [2] Talay and Tubaro (1990), Expansion of the global error for numerical schemes solving
       stochastic differential equations, Stochastic Analysis and Applications 8, 483–509.

    Examples
    --------
    >>> h = [1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128]
    >>> print(estimate_order(h, [0.3 * x * (1 + x) for x in h], expected=1))
    0.99 [0.95, 1.04], declared 1: PASS
    >>> print(estimate_order(h, [0.3 * x for x in h], expected=1.5))
    1.00 [0.96, 1.04], declared 1.5: FAIL
    """
    h, e, s, floor = _checked_levels(steps, errors, standard_errors, rounding)
    if expected is not None and not (math.isfinite(expected) and expected > 0):
        raise ValueError(f"expected must be a finite, positive order or None; got {expected}")
    check_positive(tolerance, "tolerance")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1; got {confidence}")
    check_positive(spacing, "spacing")
    quantile = -NormalDist().inv_cdf((1 - confidence) / 2)
    reasons = [_reason(*level) for level in zip(e, s, floor, strict=True)]
    kept = usable = np.flatnonzero([not reason for reason in reasons])
    x, y = np.log(h), np.log(np.where(np.isfinite(e) & (e > 0), e, 1.0))

    variances = np.zeros_like(e)
    variances[kept] = (s[kept] / e[kept]) ** 2 + (floor[kept] / 3 / e[kept]) ** 2 + _MODEL**2
    while len(kept) >= 3:
        local, covariance = local_orders(x[kept], y[kept], variances[kept])
        spread = covariance[0, 0] + covariance.diagonal() - 2 * covariance[0]
        allowed = tolerance + quantile * np.sqrt(spread[1:])
        if (np.abs(local[1:] - local[0]) <= allowed).all():
            break
        reasons[kept[0]] = "disagrees with finer levels"
        kept = kept[1:]

    order = low = high = math.nan
    if len(kept) >= 3:
        if not is_steady(x[kept], y[kept], variances[kept], quantile):
            spacing = min(spacing, 0.5)
        order, std, excess = log_slope(x[kept], y[kept], variances[kept], spacing)
        # A variance that is estimated from residuals has an uncertainty of its own.
        if excess <= 1 or bool((s[kept] > 0).all()):
            half_width = quantile * std
        else:
            from scipy.stats import t  # imported here because it is slow to import

            half_width = float(t.ppf((1 + confidence) / 2, len(kept) - 2)) * std
        low, high = order - half_width, order + half_width
    local, covariance = local_orders(x[kept], y[kept], variances[kept])
    margins = quantile * np.sqrt(covariance.diagonal())
    lows, highs = local - margins, local + margins
    verdict, relation = _judge(low, high, expected, tolerance)
    message = _message(order, low, high, relation, reasons)
    if expected is not None and len(local):
        ends = usable[[0, -1]]
        noise = quantile * math.hypot(*s[ends], *(floor[ends] / 3))
        grown = e[ends[1]] - e[ends[0]] > noise
        # Rule 2 drops coarse levels only, so the last two levels are the same as for rule 1.
        limit = highs[-1]
        if not s[usable].any() and turns(x[usable], y[usable], variances[usable], quantile):
            limit = math.inf  # the levels have noise without known standard errors
        fault = _fault(local[-1], limit, grown, expected, tolerance)
        if fault and (grown or verdict is not Verdict.FAIL):
            verdict, message = Verdict.FAIL, fault
    numbers = np.stack([h, *(np.where(np.isfinite(x), x, math.nan) for x in (e, s))], 1)
    return OrderEstimate(
        order=order,
        low=low,
        high=high,
        expected=None if expected is None else float(expected),
        tolerance=float(tolerance),
        confidence=float(confidence),
        local_orders=tuple(zip(local.tolist(), lows.tolist(), highs.tolist(), strict=True)),
        levels=tuple(
            Level(step, error, std, kept=not reason, reason=reason)
            for (step, error, std), reason in zip(numbers.tolist(), reasons, strict=True)
        ),
        verdict=verdict,
        message=message,
    )


def _checked_levels(
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
    return h, e, s, floor


def _reason(error: float, standard_error: float, floor: float) -> str:
    """Reason why a level cannot be used, independent of the other levels; empty if it can."""
    if not math.isfinite(error):
        return "not finite"
    if error <= floor:
        return "below rounding"
    return "below 3 standard errors" if error / 3 < standard_error else ""


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


def _fault(last: float, limit: float, grown: bool, expected: float, tolerance: float) -> str:
    """Fault that the last local order and its upper limit show, independent of the slope."""
    if grown and limit < expected - tolerance:
        return f"The errors grow as steps shrink; the last local order is {last:.2f}."
    if limit < expected - 2 * tolerance:
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
