"""Estimated orders of convergence, on error curves whose order is known by construction."""

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from cldsde.validation.order_estimate import OrderEstimate, Verdict, estimate_order
from tolerances import EPS, rounding

STEPS = 2.0 ** -np.arange(3, 9)
ORDERS = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0]
CURVES = 1200
TOLERANCE = 0.25
# Rounding of a least-squares problem whose covariance, 1e-6 to 1, has a condition below 1e6.
REGRESSION = rounding(1, 1e6)


def half_width(estimate: OrderEstimate) -> float:
    return (estimate.high - estimate.low) / 2


def reasons(estimate: OrderEstimate) -> list[str]:
    return [level.reason for level in estimate.levels]


def random_curve(rng: np.random.Generator, kind: str) -> tuple[float, OrderEstimate]:
    """C h^p (1 + a h) with Gaussian noise of known standard error, over 4 to 7 halvings."""
    p, a = float(rng.choice(ORDERS)), rng.uniform(-2, 2)
    h = 1 / rng.choice([8, 16]) * 2.0 ** -np.arange(rng.integers(5, 9))
    error = 10 ** rng.uniform(-3, 2) * h**p * (1 + a * h)
    noise = {
        "relative": error * 10 ** rng.uniform(-3, math.log10(0.03)),
        # Between 0.3 and 4^p of the finest error: up to three levels drown.
        "constant": error[-1] * rng.uniform(0.3, 1) * 4 ** (p * rng.uniform()) + 0 * error,
    }[kind]
    measured = np.abs(error + noise * rng.standard_normal(len(h)))
    return p, estimate_order(h, measured, noise, expected=p)


# Coverage: what `estimate_order` is asked for, 90 % at a nominal 95 %. Shares and widths bound from
# below how much an interval says: the share of all curves whose interval is narrow enough for a
# verdict, and the median half-width. A one-sided error of a two-sided interval of 95 % is at a
# distance of the tolerance from the truth; 5 % leave room for how the normal quantile fits a
# logarithm.
@pytest.mark.parametrize(
    ("kind", "narrow", "median"),
    [pytest.param("relative", 0.95, 0.1, marks=pytest.mark.slow), ("constant", 0.4, TOLERANCE)],
)
def test_intervals_cover_the_true_order_and_are_narrow(kind, narrow, median):
    rng = np.random.default_rng(20)
    curves = [random_curve(rng, kind) for _ in range(CURVES)]
    known = [(order, found) for order, found in curves if not math.isnan(found.order)]
    assert len(known) >= 0.7 * CURVES
    assert np.mean([found.low <= order <= found.high for order, found in known]) >= 0.9
    widths = np.array([half_width(found) for _, found in known])
    assert np.sum(widths <= TOLERANCE) >= narrow * CURVES
    assert np.median(widths) <= median
    assert np.mean([found.verdict is Verdict.FAIL for _, found in curves]) <= 0.05
    too_high = [found.low >= order + TOLERANCE for order, found in known]
    assert np.sum(too_high & (widths <= TOLERANCE)) <= 0.05 * CURVES


# The ranges of a in 1 + a h^q that docs/reference/measuring.md states, for numbers of levels.
RANGES = [(4, 1.0, 2.0), (5, 1.0, 4.0), (8, 1.0, 4.0), (4, 0.5, 1.0), (8, 0.5, 1.0)]


@pytest.mark.parametrize(("count", "spacing", "high"), RANGES)
@pytest.mark.parametrize("order", ORDERS)
def test_intervals_cover_over_the_stated_range(order, count, spacing, high):
    x = 2.0 ** -np.arange(float(count))
    for a in np.linspace(-0.9, high, 5):
        errors = x**order * (1 + a * x**spacing)
        estimate = estimate_order(x / 16, errors, rounding=0.0, spacing=spacing)
        # Of 4 levels a correction of −0.9 leaves too few.
        if not math.isnan(estimate.order):
            assert estimate.low <= order <= estimate.high
        assert math.isnan(estimate.order) <= (count == 4 and a == -0.9)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ratio", [1.5, 4.0])
def test_a_pure_power_gives_its_exponent(order, ratio):
    steps = ratio ** -np.arange(5.0)
    estimate = estimate_order(steps, 7 * steps**order, rounding=0.0, expected=order)
    orders = [estimate.order, *(p for p, _, _ in estimate.local_orders)]
    assert orders == pytest.approx([order] * 5, abs=REGRESSION)
    assert estimate.verdict is Verdict.PASS
    assert not any(reasons(estimate))


def test_standard_errors_widen_the_interval_as_a_regression_does():
    errors = np.array([0.2, 0.1, 0.05])
    exact = estimate_order(STEPS[:3], errors)
    noisy = estimate_order(STEPS[:3], errors, [0.02, 0.0, 0.0])
    noisier = estimate_order(STEPS[:3], errors, [0.02, 0.01, 0.005])
    assert half_width(exact) < half_width(noisy) < half_width(noisier)
    # z √(2 · 0.1²) / log 2 for neighbours with 10 % each; 0.001² is added to each variance.
    p, low, high = noisier.local_orders[1]
    expected = NormalDist().inv_cdf(0.975) * math.sqrt(2) * math.hypot(0.1, 1e-3) / math.log(2)
    assert (high - low) / 2 == pytest.approx(expected, rel=REGRESSION, abs=0)
    assert (low + high) / 2 == pytest.approx(p, rel=REGRESSION, abs=0)
    # A confidence scales the width by the normal quantile.
    low, high = (half_width(estimate_order(STEPS, STEPS, confidence=c)) for c in (0.68, 0.95))
    quantiles = [NormalDist().inv_cdf((1 + c) / 2) for c in (0.68, 0.95)]
    assert high / low == pytest.approx(quantiles[1] / quantiles[0], rel=REGRESSION, abs=0)


FINE = 2.0 ** -np.arange(3, 13)
DIVERGING = np.array([math.nan, math.inf, 1e30, *STEPS[3:]])
LATE = 2.0 ** -np.arange(10)
NOISY, ROUNDED, INFINITE = "below 3 standard errors", "below rounding", ["not finite"] * 2
DISAGREES = "disagrees with finer levels"
# Steps, errors, options, reasons why levels are dropped, order.
DROPPED: list[Any] = [
    (FINE, 0.01 * FINE**4 + EPS / FINE, {}, [""] * 6 + [ROUNDED] * 4, 4),
    (STEPS, [*STEPS[:-1], 0.0], {"rounding": 0.0}, [""] * 5 + [ROUNDED], 1),
    (STEPS, STEPS**2, {"standard_errors": STEPS[-2] ** 2 / 2}, [""] * 4 + [NOISY] * 2, 2),
    (STEPS, DIVERGING, {"standard_errors": DIVERGING / 1e3}, [*INFINITE, DISAGREES, *[""] * 3], 1),
    (LATE, LATE / (1 + 8 * LATE), {}, [DISAGREES] * 4 + [""] * 6, 1),
]


@pytest.mark.parametrize(("steps", "errors", "options", "dropped", "order"), DROPPED)
def test_levels_that_say_nothing_are_dropped(steps, errors, options, dropped, order):
    estimate = estimate_order(steps, errors, expected=order, **options)
    assert reasons(estimate) == dropped
    assert estimate.low <= order <= estimate.high
    assert estimate.verdict is Verdict.PASS


GROWING = np.array([1.0, 1.1, 1.05, 1.2])
# Errors, options, declared order, verdict, and words of the message.
VERDICTS: list[Any] = [
    (STEPS**2, {}, 1, Verdict.PASS, "above the declared"),
    (STEPS, {}, 1.25, Verdict.INCONCLUSIVE, "may be more than 0.25 below"),
    (STEPS, {"tolerance": 0.5}, 1.25, Verdict.PASS, "at most 0.5 below the declared 1.25"),
    (0.3 * STEPS * (1 + STEPS), {}, 1.5, Verdict.FAIL, "below the declared"),
    (STEPS**2, {"standard_errors": 0.3 * STEPS**2}, 0.5, Verdict.INCONCLUSIVE, "uncertain"),
    (GROWING, {"standard_errors": 1e-3 * GROWING}, 0.5, Verdict.FAIL, "errors grow"),
    (GROWING, {"standard_errors": 0.3 * GROWING}, 0.5, Verdict.INCONCLUSIVE, ""),
    # C h (1 − h/h_1) changes its sign at the coarsest level.
    (STEPS * (1 - STEPS / STEPS[0]) + 1e-6, {}, 1, Verdict.PASS, ""),
    (np.maximum(STEPS**2, STEPS[-2] ** 2), {}, 2, Verdict.FAIL, "the last local order is 0.00"),
    # Errors that go up and down do not stop falling; with the same last order a smooth curve does.
    (STEPS * [1, 1, 1, 1, 1, 1.3 / 0.7], {}, 1, Verdict.FAIL, "stop decreasing"),
    (STEPS * [1, 0.8, 1.2, 0.9, 0.7, 1.3], {}, 1, Verdict.INCONCLUSIVE, ""),
    # Residuals of six levels: with the quantile of a normal distribution this would pass.
    (STEPS * [1, 1.007, 0.993, 1.014, 0.986, 1], {}, 1, Verdict.INCONCLUSIVE, "uncertain"),
    ([0.1, 0.05], {}, 1, Verdict.INCONCLUSIVE, "An order needs 3 levels"),
]


@pytest.mark.parametrize(("errors", "options", "expected", "verdict", "words"), VERDICTS)
def test_verdicts_and_their_messages(errors, options, expected, verdict, words):
    estimate = estimate_order(STEPS[: len(errors)], errors, expected=expected, **options)
    assert estimate.verdict is verdict
    assert words in estimate.message
    assert estimate.exceeds or "above" not in words


WRONG: dict[str, list[Any]] = {
    "steps": [[], 0.1, [0.1, 0.1, 0.05], [0.05, 0.1, 0.2], [0.1, 0.05, 0.0], [0.1, math.nan, 0.05]],
    "errors": [[0.1, 0.05], [0.1, -0.05, 0.02]],
    "standard_errors": [[0.1, 0.1], -0.1],
    **{name: [-1.0, math.nan] for name in ("rounding", "expected", "tolerance", "spacing")},
    "confidence": [0.0, 1.0],
}


@pytest.mark.parametrize(("name", "value"), [(name, x) for name, xs in WRONG.items() for x in xs])
def test_wrong_arguments_are_named(name, value):
    valid = {"steps": [0.1, 0.05, 0.025], "errors": [0.1, 0.05, 0.025]}
    with pytest.raises(ValueError, match=rf"^{name} must "):
        estimate_order(**(valid | {name: value}))


# Changes of local orders against what errors of 0.1 % make of them: 0.007 of a change, and twice as
# much of a change of changes.
LOCAL_ORDERS = [
    ([1.1, 1.05, 1.025, 1.0125, 1.006], True),
    ([1.0, 1.1, 1.05, 1.03, 1.02], False),  # turns, by less and less
    ([1.0, 1.02, 1.07, 1.13, 1.24], False),  # goes one way, by more and more
    ([1.0, 1.003, 1.0, 1.003, 1.0], True),  # turns within what the model leaves open
]


@pytest.mark.parametrize(("orders", "steady"), LOCAL_ORDERS)
def test_whole_powers_are_for_local_orders_that_go_one_way_by_less_and_less(orders, steady):
    errors = np.exp2(-np.cumsum([0.0, *orders]))
    whole, half = (estimate_order(STEPS, errors, spacing=q, rounding=0.0) for q in (1.0, 0.5))
    assert reasons(whole) == [""] * 6
    assert (half_width(whole) < half_width(half)) is steady
