"""Estimated orders of convergence, on error curves whose order is known by construction."""

from __future__ import annotations

import functools
import json
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cldsde.validation.order_estimate import OrderEstimate, Verdict, estimate_order

Array = np.ndarray[Any, np.dtype[np.float64]]

STEPS = 2.0 ** -np.arange(3, 9)
ORDERS = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0]
CURVES = 1200
TOLERANCE = 0.25


def half_width(estimate: OrderEstimate) -> float:
    return (estimate.high - estimate.low) / 2


def reasons(estimate: OrderEstimate) -> list[str]:
    return [level.reason for level in estimate.levels]


class Curve(NamedTuple):
    order: float
    estimate: OrderEstimate


def random_curve(rng: np.random.Generator, kind: str) -> Curve:
    """C h^p (1 + a h) with Gaussian noise of known standard error, over 4 to 7 halvings."""
    p, a = rng.choice(ORDERS), rng.uniform(-2, 2)
    h = 1 / rng.choice([8, 16]) * 2.0 ** -np.arange(rng.integers(5, 9))
    error = 10 ** rng.uniform(-3, 2) * h**p * (1 + a * h)
    if kind == "exact":
        noise = np.zeros_like(error)
    elif kind == "relative":
        noise = error * 10 ** rng.uniform(-3, math.log10(0.03))
    else:  # between 0.3 and 4^p of the finest error: up to three levels drown
        noise = np.full_like(error, error[-1] * rng.uniform(0.3, 1) * 4 ** (p * rng.uniform()))
    measured = np.abs(error + noise * rng.standard_normal(len(h)))
    return Curve(float(p), estimate_order(h, measured, noise, expected=float(p)))


@functools.cache
def random_curves(kind: str) -> tuple[Curve, ...]:
    rng = np.random.default_rng(20)
    return tuple(random_curve(rng, kind) for _ in range(CURVES))


# Coverage: what `estimate_order` is asked for, 90 % at a nominal 95 %. Shares and widths bound from
# below how much an interval says: the share of all curves whose interval is narrow enough for a
# verdict, and the median half-width.
@pytest.mark.parametrize(
    ("kind", "narrow", "median"),
    [("exact", 0.95, 0.05), ("relative", 0.95, 0.1), ("constant", 0.4, TOLERANCE)],
)
def test_intervals_cover_the_true_order_and_are_narrow(kind, narrow, median):
    curves = [curve for curve in random_curves(kind) if not math.isnan(curve.estimate.order)]
    covered = [curve.estimate.low <= curve.order <= curve.estimate.high for curve in curves]
    widths = [half_width(curve.estimate) for curve in curves]
    assert np.mean(covered) >= 0.9
    assert len(curves) >= 0.7 * CURVES
    assert np.sum(np.array(widths) <= TOLERANCE) >= narrow * CURVES
    assert np.median(widths) <= median


@pytest.mark.parametrize("kind", ["exact", "relative", "constant"])
def test_the_true_order_hardly_ever_fails_and_one_higher_by_a_half_hardly_ever_passes(kind):
    # A one-sided error of a two-sided interval of 95 %, at a distance of the tolerance from the
    # truth; 5 % leave room for how the normal quantile fits a logarithm.
    curves = random_curves(kind)
    failed = [curve.estimate.verdict is Verdict.FAIL for curve in curves]
    passed = [
        half_width(curve.estimate) <= TOLERANCE and curve.estimate.low >= curve.order + 0.5 - 0.25
        for curve in curves
    ]
    assert np.mean(failed) <= 0.05
    assert np.mean(passed) <= 0.05


def wide_curve(rng: np.random.Generator, spacing: float, kind: str) -> Curve:
    """C h^p (1 + a h) whose correction at the coarsest level is between −0.9 and 4.

    Levels cover four octaves or more, twice as dense or not; then a correction is at most twice
    the error, as over few octaves a large one looks like another power.
    """
    dense = kind.startswith("dense")
    p = float(rng.choice([*ORDERS, 8.0]))
    ratio, count = (2**0.5, rng.integers(8, 13)) if dense else (2.0, rng.integers(5, 9))
    x = ratio ** -np.arange(float(count))
    error = 10 ** rng.uniform(-3, 2) * x**p * (1 + rng.uniform(-0.9, 2 if dense else 4) * x)
    relative = 10 ** rng.uniform(-3, math.log10(0.03)) if kind.endswith("noisy") else 0.0
    measured = np.abs(error * (1 + relative * rng.standard_normal(len(x))))
    h = x / rng.choice([8, 16])
    return Curve(
        p,
        estimate_order(
            h, measured, relative * error, expected=p + 0.5, rounding=0.0, spacing=spacing
        ),
    )


# As above; an order declared too high by a half is at a distance of the tolerance from one that
# passes, and the true order may fall short of the declared one by no more than that.
@pytest.mark.parametrize("kind", ["halved", "dense", "halved, noisy", "dense, noisy"])
@pytest.mark.parametrize("spacing", [0.5, 1.0])
def test_intervals_cover_the_true_order_whatever_precedes_it(spacing, kind):
    rng = np.random.default_rng(21)
    curves = [wide_curve(rng, spacing, kind) for _ in range(CURVES // 2)]
    known = [curve for curve in curves if not math.isnan(curve.estimate.order)]
    assert len(known) >= 0.9 * len(curves)
    assert np.mean([c.estimate.low <= c.order <= c.estimate.high for c in known]) >= 0.9
    assert np.mean([c.estimate.verdict is Verdict.PASS for c in curves]) <= 0.05
    assert np.mean([c.estimate.high < c.order - TOLERANCE for c in known]) <= 0.05


# Rule 2 takes levels for exact that have no standard errors, and drops some that are only unlucky.
@pytest.mark.parametrize("count", [4, 6])
def test_noise_that_no_standard_error_tells_of_widens_the_interval(count):
    rng, x = np.random.default_rng(22), 2.0 ** -np.arange(float(count))
    curves = [
        estimate_order(x / 16, x * (1 + 0.05 * rng.standard_normal(count)), expected=1)
        for _ in range(CURVES // 2)
    ]
    known = [curve for curve in curves if not math.isnan(curve.order)]
    assert len(known) >= 0.85 * len(curves)
    assert np.mean([curve.low <= 1 <= curve.high for curve in known]) >= 0.8
    assert np.mean([curve.verdict is Verdict.FAIL for curve in curves]) <= 0.02


def test_errors_that_go_up_and_down_without_standard_errors_do_not_stop_falling():
    errors = STEPS * [1, 0.8, 1.2, 0.9, 0.7, 1.3]
    assert "stop decreasing" not in estimate_order(STEPS, errors, expected=1).message
    # The same last order, and a smooth curve.
    errors = STEPS * [1, 1, 1, 1, 1, 1.3 / 0.7]
    assert "stop decreasing" in estimate_order(STEPS, errors, expected=1).message


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("correction", [lambda x: 1 + 0.3 * x, np.exp, lambda x: 1 / (1 + x)])
def test_whole_powers_give_narrower_intervals_that_still_cover(order, correction):
    errors = 0.3 * STEPS**order * correction(STEPS / STEPS[0])
    half, whole = (estimate_order(STEPS, errors, spacing=q) for q in (0.5, 1.0))
    assert half_width(whole) < half_width(half)
    assert whole.low <= order <= whole.high


def test_half_powers_are_what_the_estimate_allows_for_unless_told():
    errors = STEPS * (1 + STEPS)
    assert estimate_order(STEPS, errors) == estimate_order(STEPS, errors, spacing=0.5)


# Corrections other than 1 + a h: in half powers, in even powers, in all powers.
@pytest.mark.parametrize(
    "correction",
    [
        lambda x: 1 + 0.5 * np.sqrt(x),
        lambda x: 1 - 0.5 * np.sqrt(x),
        lambda x: 1 + 0.5 * x**2,
        lambda x: 1 - 0.5 * x**2,
        np.exp,
        lambda x: 1 / (1 + x),
    ],
    ids=["plus root", "minus root", "plus square", "minus square", "exponential", "reciprocal"],
)
@pytest.mark.parametrize("order", ORDERS)
def test_exact_curves_with_other_corrections_are_covered(order, correction):
    estimate = estimate_order(
        STEPS, 0.3 * STEPS**order * correction(STEPS / STEPS[0]), expected=order
    )
    assert estimate.low <= order <= estimate.high
    assert estimate.verdict is Verdict.PASS


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ratio", [1.5, 2.0, 4.0])
def test_a_pure_power_gives_its_exponent(order, ratio):
    steps = ratio ** -np.arange(5.0)
    estimate = estimate_order(steps, 7 * steps**order, rounding=0.0, expected=order)
    # Rounding of a least-squares problem whose covariance, 1e-6 to 1, has a condition below 1e6.
    assert estimate.order == pytest.approx(order, abs=1e6 * 2**-52)
    assert [p for p, _, _ in estimate.local_orders] == pytest.approx([order] * 4)
    assert estimate.verdict is Verdict.PASS
    assert not any(reasons(estimate))


def test_irregular_steps_are_allowed():
    steps = np.array([0.1, 0.07, 0.03, 0.02, 0.013])
    estimate = estimate_order(steps, steps**2 * (1 + steps), expected=2)
    assert estimate.low <= 2 <= estimate.high
    assert estimate.verdict is Verdict.PASS


def test_the_scale_of_steps_and_errors_does_not_matter():
    errors = 0.3 * STEPS * (1 + STEPS)
    first = estimate_order(STEPS, errors, 0.01 * errors, rounding=0.0)
    second = estimate_order(1e3 * STEPS, 1e-9 * errors, 1e-11 * errors, rounding=0.0)
    # Condition times rounding, as above.
    assert [second.order, second.low, second.high] == pytest.approx(
        [first.order, first.low, first.high], abs=1e6 * 2**-52
    )


def test_standard_errors_widen_the_interval_as_a_regression_does():
    errors = np.array([0.2, 0.1, 0.05])
    exact = estimate_order(STEPS[:3], errors)
    noisy = estimate_order(STEPS[:3], errors, [0.02, 0.0, 0.0])
    noisier = estimate_order(STEPS[:3], errors, [0.02, 0.01, 0.005])
    assert half_width(exact) < half_width(noisy) < half_width(noisier)
    # z √(2 · 0.1²) / log 2 for neighbours with 10 % each; 0.001² is added to each variance.
    p, low, high = noisier.local_orders[1]
    assert (high - low) / 2 == pytest.approx(
        1.959964 * math.sqrt(2) * math.hypot(0.1, 1e-3) / math.log(2), rel=1e-4
    )
    assert (low + high) / 2 == pytest.approx(p)


def test_a_higher_confidence_widens_the_interval():
    errors = 0.3 * STEPS
    low, high = (estimate_order(STEPS, errors, confidence=c) for c in (0.68, 0.95))
    assert high.order == low.order
    assert half_width(high) / half_width(low) == pytest.approx(1.959964 / 0.994458, rel=1e-5)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_an_order_declared_too_high_by_a_half_fails(order, noise):
    errors = 0.3 * STEPS**order * (1 + STEPS)
    estimate = estimate_order(STEPS, errors, noise * errors, expected=order + 0.5)
    assert estimate.verdict is Verdict.FAIL
    assert not estimate.exceeds
    assert "below the declared" in estimate.message


def test_an_order_above_the_declared_one_passes_and_exceeds_it():
    estimate = estimate_order(STEPS, STEPS**2, expected=1)
    assert estimate.verdict is Verdict.PASS
    assert estimate.exceeds
    assert "above the declared" in estimate.message


def test_a_wide_interval_never_passes():
    errors = STEPS**2
    estimate = estimate_order(STEPS, errors, 0.3 * errors, expected=0.5)
    assert estimate.low >= 0.5 - TOLERANCE
    assert half_width(estimate) > TOLERANCE
    assert estimate.verdict is Verdict.INCONCLUSIVE
    assert "uncertain" in estimate.message


def test_a_narrow_interval_about_the_limit_is_inconclusive():
    estimate = estimate_order(STEPS, STEPS, expected=1.25)
    assert half_width(estimate) <= TOLERANCE
    assert estimate.verdict is Verdict.INCONCLUSIVE


positive = st.floats(1e-12, 1e3)


@given(
    errors=st.lists(positive, min_size=6, max_size=6),
    noise=st.lists(st.floats(0, 0.4), min_size=6, max_size=6),
    expected=st.none() | st.floats(0.1, 6),
    tolerance=st.floats(0.01, 1),
)
def test_verdicts_partition_the_intervals(errors, noise, expected, tolerance):
    standard_errors = np.array(errors) * noise
    check_partition(
        estimate_order(STEPS, errors, standard_errors, expected=expected, tolerance=tolerance)
    )


@given(
    order=st.floats(0.3, 5),
    slope=st.floats(-2, 2),
    noise=st.floats(0, 0.1),
    expected=st.none() | st.floats(0.1, 6),
    tolerance=st.floats(0.01, 1),
)
def test_verdicts_partition_the_intervals_of_smooth_curves(
    order, slope, noise, expected, tolerance
):
    errors = STEPS**order * (1 + slope * STEPS)
    check_partition(
        estimate_order(STEPS, errors, noise * errors, expected=expected, tolerance=tolerance)
    )


def stops_falling(estimate: OrderEstimate) -> bool:
    """Whether the last local order is too low, less so where the finest error is the larger one."""
    if not estimate.local_orders:
        return False
    usable = [x for x in estimate.levels if x.reason in ("", "disagrees with finer levels")]
    first, last = usable[0], usable[-1]
    noise = 1.959964 * math.hypot(
        *(first.standard_error, last.standard_error),
        *(10 * np.finfo(float).eps / level.step / 3 for level in (first, last)),
    )
    allowed = 1 if last.error - first.error > noise else 2
    return estimate.local_orders[-1][2] < estimate.expected - allowed * estimate.tolerance


def check_partition(estimate: OrderEstimate) -> None:
    kept = sum(level.kept for level in estimate.levels)
    assert math.isnan(estimate.order) == (kept < 3)
    assert all(level.kept == (not level.reason) for level in estimate.levels)
    assert len(estimate.local_orders) == max(kept - 1, 0)
    if estimate.expected is None:
        assert estimate.verdict is None
        assert not estimate.exceeds
        return
    least = estimate.expected - estimate.tolerance
    below, above = estimate.high < least, estimate.low >= least
    narrow = half_width(estimate) <= estimate.tolerance
    assert not (below and above)
    stuck = stops_falling(estimate)
    assert (estimate.verdict is Verdict.FAIL) == (below or stuck)
    assert (estimate.verdict is Verdict.PASS) == (above and narrow and not stuck)
    assert not (estimate.exceeds and below)
    assert estimate.low <= estimate.order <= estimate.high or math.isnan(estimate.order)


@given(
    noise=st.lists(st.floats(-0.02, 0.02), min_size=6, max_size=6),
    order=st.sampled_from(ORDERS),
)
def test_the_verdict_gets_no_better_with_a_higher_declared_order(noise, order):
    errors = STEPS**order * (1 + np.array(noise))
    rank = {Verdict.PASS: 0, Verdict.INCONCLUSIVE: 1, Verdict.FAIL: 2}
    ranks = [
        rank[estimate_order(STEPS, errors, 0.01 * errors, expected=expected).verdict]
        for expected in (order - 0.4, order, order + 0.2, order + 0.3, order + 1)
    ]
    assert ranks == sorted(ranks)


def test_saturation_at_rounding_is_dropped():
    steps = 2.0 ** -np.arange(3, 13)
    rounding = np.finfo(float).eps * np.random.default_rng(0).uniform(0.5, 1, len(steps)) / steps
    errors = 0.01 * steps**4 + rounding
    estimate = estimate_order(steps, errors, expected=4)
    dropped = errors <= 10 * np.finfo(float).eps / steps
    assert dropped.any()
    assert [reason == "below rounding" for reason in reasons(estimate)] == dropped.tolist()
    assert estimate.low <= 4 <= estimate.high
    assert estimate.verdict is Verdict.PASS


def test_rounding_may_be_given_per_level_or_once():
    errors = STEPS**2
    once = estimate_order(STEPS, errors, rounding=float(errors[-2]))
    levels = estimate_order(STEPS, errors, rounding=np.full(6, errors[-2]))
    assert reasons(once) == [""] * 4 + ["below rounding"] * 2
    assert once == levels


def test_a_larger_bound_on_rounding_widens_the_interval():
    errors = STEPS**2
    widths = [half_width(estimate_order(STEPS, errors, rounding=r)) for r in (0.0, 1e-6, 1e-5)]
    assert widths == sorted(set(widths))


def test_an_error_of_zero_is_below_rounding():
    estimate = estimate_order(STEPS, [*STEPS[:-1], 0.0], rounding=0.0, expected=1)
    assert reasons(estimate) == [""] * 5 + ["below rounding"]
    assert estimate.verdict is Verdict.PASS


def test_levels_that_drown_in_noise_are_dropped():
    errors = STEPS**2
    estimate = estimate_order(STEPS, errors, errors[-2] / 2, expected=2)
    assert reasons(estimate) == [""] * 4 + ["below 3 standard errors"] * 2
    assert estimate.low <= 2 <= estimate.high


def test_coarse_levels_that_diverge_are_dropped():
    errors = STEPS.copy()
    errors[:3] = math.nan, math.inf, 1e30
    noise = 1e-3 * errors
    estimate = estimate_order(STEPS, errors, noise, expected=1)
    assert reasons(estimate) == ["not finite"] * 2 + ["disagrees with finer levels"] + [""] * 3
    assert estimate.low <= 1 <= estimate.high
    assert estimate.verdict is Verdict.PASS


@pytest.mark.parametrize("order", [1.0, 2.0])
def test_coarse_levels_before_the_asymptotic_range_are_dropped(order):
    steps = 2.0 ** -np.arange(10)
    estimate = estimate_order(steps, steps**order / (1 + 8 * steps) ** order, expected=order)
    assert reasons(estimate)[0] == "disagrees with finer levels"
    assert estimate.low <= order <= estimate.high
    assert estimate.verdict is Verdict.PASS


# A constant of three times what vanishes leaves a last local order of log2((2^p + 3) / 4), and of
# log2((4^p + 9) / 10) / 2 if the two add in squares: 0.14 or less for p = 0.5, 3.4 or less for
# p = 5, and always below p by more than the tolerance.
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("count", [4, 5, 6])
@pytest.mark.parametrize("multiple", [3.0, 10.0, 100.0, 1e4])
def test_errors_that_stop_at_a_constant_do_not_pass(order, count, multiple):
    steps = STEPS[:count]
    vanishing = (steps / steps[-1]) ** order / multiple * 1e-4
    for errors in (vanishing + 1e-4, np.hypot(vanishing, 1e-4)):
        estimate = estimate_order(steps, errors, expected=order)
        assert estimate.verdict in {Verdict.INCONCLUSIVE, Verdict.FAIL}
    assert estimate_order(steps, vanishing, expected=order).verdict is Verdict.PASS


def test_a_sudden_constant_leaves_no_order_or_a_low_one():
    errors = np.maximum(STEPS**2, STEPS[-3] ** 2)
    estimate = estimate_order(STEPS, errors, expected=2)
    assert estimate.verdict is Verdict.FAIL
    assert estimate.order == pytest.approx(0, abs=1e-6)
    errors = np.maximum(STEPS**2, STEPS[-2] ** 2)
    estimate = estimate_order(STEPS, errors, expected=2)
    assert math.isnan(estimate.order)
    assert estimate.verdict is Verdict.FAIL
    assert "stop decreasing: the last local order is 0.00" in estimate.message
    # Where the last order is not so low, there are too few levels to tell.
    errors = STEPS ** [2.0, 2, 2, 2, 1, 1] * [1, 1, 1, 1, STEPS[4], STEPS[4] * 0.75]
    estimate = estimate_order(STEPS, errors, expected=1.5)
    assert estimate.verdict is Verdict.INCONCLUSIVE
    assert estimate.message == (
        "An order needs 3 levels, and 2 of 6 levels can be used (disagrees with finer levels: 4)."
    )


@pytest.mark.parametrize(
    "errors",
    [[1e3, 1e8, 1e20, 1e60], [1.0, 2, 8, 64], [1e-3, 1e-3, 1e-3, 1], [1.0, math.nan, 2, 5]],
)
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_errors_that_grow_as_steps_shrink_fail(errors, noise):
    estimate = estimate_order(STEPS[:4], errors, noise * np.array(errors), expected=0.5)
    assert estimate.verdict is Verdict.FAIL
    assert estimate.message.startswith("The errors grow as steps shrink")
    assert estimate_order(STEPS, 1 / STEPS, expected=0.5).verdict is Verdict.FAIL


def test_errors_that_grow_within_their_noise_do_not_fail():
    errors = np.array([1.0, 1.1, 1.05, 1.2])
    noisy = estimate_order(STEPS[:4], errors, 0.3 * errors, expected=0.5)
    assert noisy.verdict is Verdict.INCONCLUSIVE
    assert estimate_order(STEPS[:4], errors, 0.001 * errors, expected=0.5).verdict is Verdict.FAIL
    # Nor what is below rounding.
    rounded = estimate_order(STEPS[:4], errors, expected=0.5, rounding=2.0)
    assert rounded.verdict is Verdict.INCONCLUSIVE


def test_errors_that_vanish_at_the_coarsest_level_do_not_fail():
    """C h (1 − h/h_1) changes its sign there."""
    errors = STEPS * (1 - STEPS / STEPS[0]) + 1e-6
    estimate = estimate_order(STEPS, errors, expected=1)
    assert errors[-1] > errors[0]
    assert estimate.verdict is Verdict.PASS


# A constant c times the finest of the errors that vanish leaves a last local order of
# log2((2^p + c)/(1 + c)): below p − 1/2 for c = 3/2 or more.
@pytest.mark.parametrize("order", [1.0, 2.0])
@pytest.mark.parametrize("count", [4, 5, 6])
@pytest.mark.parametrize("constant", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("spacing", [0.5, 1.0])
def test_a_constant_that_errors_stop_at_fails(order, count, constant, spacing):
    steps = STEPS[:count]
    vanishing = (steps / steps[-1]) ** order * 1e-4
    errors = vanishing + constant * vanishing[-1]
    assert math.log2((2**order + constant) / (1 + constant)) < order - 2 * TOLERANCE
    estimate = estimate_order(steps, errors, expected=order, spacing=spacing)
    assert estimate.verdict is Verdict.FAIL


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_than_three_levels_are_inconclusive(count):
    estimate = estimate_order(STEPS[:count], STEPS[:count], expected=1)
    assert all(math.isnan(x) for x in (estimate.order, estimate.low, estimate.high))
    assert estimate.verdict is Verdict.INCONCLUSIVE
    assert str(estimate) == "no order, declared 1: INCONCLUSIVE"


def test_without_a_declared_order_there_is_no_verdict():
    estimate = estimate_order(STEPS, STEPS)
    assert estimate.verdict is None
    assert estimate.expected is None
    assert not estimate.exceeds
    assert str(estimate) == "1.00 [0.98, 1.02]"
    assert str(estimate_order(STEPS[:2], STEPS[:2])) == "no order"


def test_an_estimate_prints_in_one_line():
    estimate = estimate_order(STEPS, STEPS**1.5, expected=1.5)
    assert str(estimate) == "1.50 [1.48, 1.52], declared 1.5: PASS"
    assert repr(estimate).startswith("OrderEstimate(order=1.")
    assert estimate.message == (
        "The order 1.50 [1.48, 1.52], from 6 of 6 levels, is at most 0.25 below the declared 1.5."
    )


@pytest.mark.parametrize("expected", [None, 1.0])
@pytest.mark.parametrize("first", [STEPS[0], math.nan, math.inf, 0.0])
@pytest.mark.parametrize("count", [2, 6])
def test_estimates_go_to_strict_json_and_back(count, first, expected):
    errors = STEPS[:count].copy()
    errors[0] = first
    estimate = estimate_order(STEPS[:count], errors, 0.01 * errors, expected=expected)
    plain = json.loads(estimate.to_json())
    assert plain == estimate.to_dict()
    assert plain["order"] == (None if math.isnan(estimate.order) else estimate.order)
    assert plain["verdict"] == (None if expected is None else str(estimate.verdict))
    assert plain["exceeds"] is estimate.exceeds
    assert [level["step"] for level in plain["levels"]] == STEPS[:count].tolist()
    assert plain["levels"][0]["error"] == (float(first) if math.isfinite(first) else None)


def test_estimates_are_of_plain_python_types():
    estimate = estimate_order(STEPS, STEPS, expected=np.float64(1), tolerance=np.float64(0.25))
    level = estimate.levels[0]
    numbers = [
        *(estimate.order, estimate.low, estimate.high, estimate.expected, estimate.tolerance),
        *(estimate.confidence, *estimate.local_orders[0]),
        *(level.step, level.error, level.standard_error),
    ]
    assert {type(number) for number in numbers} == {float}
    assert type(level.kept) is bool
    assert hash(estimate) == hash(estimate_order(STEPS, STEPS, expected=1))


def test_arguments_are_left_as_they_were():
    steps, errors, noise = STEPS.copy(), STEPS**2, STEPS**2 / 100
    estimate_order(steps, errors, noise, rounding=noise)
    assert (steps == STEPS).all()
    assert (errors == STEPS**2).all()
    assert (noise == STEPS**2 / 100).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": []}, "steps"),
        ({"steps": 0.1}, "steps"),
        ({"steps": [[0.1, 0.05, 0.02]]}, "steps"),
        ({"steps": [0.1, 0.1, 0.05]}, "steps"),
        ({"steps": [0.05, 0.1, 0.2]}, "steps"),
        ({"steps": [0.1, 0.05, 0.0]}, "steps"),
        ({"steps": [0.1, 0.05, -0.1]}, "steps"),
        ({"steps": [math.inf, 0.1, 0.05]}, "steps"),
        ({"steps": [0.1, math.nan, 0.05]}, "steps"),
        ({"errors": [0.1, 0.05]}, "errors"),
        ({"errors": 0.1}, "errors"),
        ({"errors": [0.1, -0.05, 0.02]}, "errors"),
        ({"errors": [0.1, -math.inf, 0.02]}, "errors"),
        ({"standard_errors": [0.1, 0.1]}, "standard_errors"),
        ({"standard_errors": -0.1}, "standard_errors"),
        ({"standard_errors": [0.1, math.nan, 0.1]}, "standard_errors"),
        ({"rounding": [1e-9, 1e-9]}, "rounding"),
        ({"rounding": -1e-9}, "rounding"),
        ({"rounding": math.nan}, "rounding"),
        ({"expected": 0.0}, "expected"),
        ({"expected": math.nan}, "expected"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"tolerance": math.inf}, "tolerance"),
        ({"confidence": 0.0}, "confidence"),
        ({"confidence": 1.0}, "confidence"),
        ({"confidence": math.nan}, "confidence"),
        ({"spacing": 0.0}, "spacing"),
        ({"spacing": -1.0}, "spacing"),
        ({"spacing": math.inf}, "spacing"),
        ({"spacing": math.nan}, "spacing"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    valid = {"steps": [0.1, 0.05, 0.025], "errors": [0.1, 0.05, 0.025]}
    with pytest.raises(ValueError, match=rf"^{message} must "):
        estimate_order(**(valid | arguments))


@pytest.mark.parametrize("small", [0.1, 0.2, 0.3])
def test_a_small_leading_term_under_a_large_one_is_not_taken_for_an_order_between(small):
    """h² under h³: local orders are far from 2 on these grids and turn before they get there."""
    steps = 1 / np.array([64.0, 128, 256, 512])
    errors = 10 * (small / 50 * steps**2 + steps**3 * (1 - 12 * steps))
    estimate = estimate_order(steps, errors, expected=2.75, spacing=1.0, rounding=0.0)
    assert estimate.verdict is not Verdict.PASS


def from_local_orders(orders: list[float]) -> Array:
    """Errors at `STEPS` with these orders between neighbours."""
    return np.exp2(-np.cumsum([0.0, *orders]))


# Changes of local orders against what errors of 0.1 % make of them: 0.007 of a change, and twice as
# much of a change of changes.
@pytest.mark.parametrize(
    ("orders", "steady"),
    [
        ([1.1, 1.05, 1.025, 1.0125, 1.006], True),
        ([1.0, 1.1, 1.05, 1.03, 1.02], False),  # turns, by less and less
        ([1.0, 1.02, 1.07, 1.13, 1.24], False),  # goes one way, by more and more
        ([1.0, 1.003, 1.0, 1.003, 1.0], True),  # turns within what the model leaves open
    ],
)
def test_whole_powers_are_for_local_orders_that_go_one_way_by_less_and_less(orders, steady):
    errors = from_local_orders(orders)
    whole, half = (estimate_order(STEPS, errors, spacing=q, rounding=0.0) for q in (1.0, 0.5))
    assert reasons(whole) == [""] * 6
    assert (half_width(whole) < half_width(half)) is steady


def test_the_interval_widens_with_the_residuals():
    """Twice the wiggle has twice the residuals, and where they rule, twice the width."""
    wiggle = np.array([1, -1, 1, -1, 1, -1])
    none, once, twice = (
        half_width(estimate_order(STEPS, STEPS * np.exp(size * wiggle), rounding=0.0))
        for size in (0.0, 0.02, 0.04)
    )
    assert once > 2 * none
    assert twice == pytest.approx(2 * once, rel=1e-6)


# The ranges that the notes of `estimate_order` state, at their ends and within.
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(
    ("count", "spacing", "power", "high"),
    [
        *((4, 1.0, 1.0, 2.0), (5, 1.0, 1.0, 4.0), (6, 1.0, 1.0, 4.0), (8, 1.0, 1.0, 4.0)),
        *((4, 0.5, 0.5, 1.0), (5, 0.5, 0.5, 1.0), (6, 0.5, 0.5, 1.0), (8, 0.5, 0.5, 1.0)),
    ],
)
def test_intervals_cover_over_the_stated_range(order, share, count, spacing, power, high):
    x = 2.0 ** -np.arange(float(count))
    a = -0.9 + share * (high + 0.9)
    estimate = estimate_order(x / 16, x**order * (1 + a * x**power), rounding=0.0, spacing=spacing)
    # Of 4 levels a correction of −0.9 leaves too few.
    if not math.isnan(estimate.order):
        assert estimate.low <= order <= estimate.high
    assert math.isnan(estimate.order) <= (count == 4 and share == 0.0)


def test_whole_powers_are_given_up_where_local_orders_turn():
    steps = STEPS
    smooth = steps * (1 + steps)
    turning = smooth * np.exp(0.02 * np.array([0, 1, -1, 1, -1, 1]))
    for errors, same in ((smooth, False), (turning, True)):
        whole, half = (estimate_order(steps, errors, spacing=q, rounding=0.0) for q in (1.0, 0.5))
        assert ((whole.low, whole.high) == (half.low, half.high)) is same
