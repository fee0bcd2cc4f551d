"""Schedules: rates, clocks that do not cancel, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath as mp
import pytest
import torch
from hypothesis import given

from cldsde import CLD, VESDE, VPSDE, LinearSDE, Schedule
from linear import reference
from strategies import intervals, schedules

EPS = torch.finfo(torch.float64).eps
PAIRS = [(s, s + gap) for s in (0.0, 1e-4, 0.3) for gap in (1e-12, 1e-8, 1e-3, 0.7)]
PAIRS += [(1 - gap, 1.0) for gap in (1e-12, 1e-8, 0.1)] + [(0.0, 1.0), (0.3, 0.3)]


def tensor(value: Any) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def assert_clock(schedule: Schedule, exact: reference.Clock, tolerance: float) -> None:
    """The integral over every pair, relative to the exact one, the pair taken as rounded."""
    s, t = tensor(PAIRS).unbind(-1)
    found = schedule.integral(s, t)
    with mp.workdps(40):
        for pair, value in zip(PAIRS, found.tolist(), strict=True):
            expected = exact(mp.mpf(pair[0]), mp.mpf(pair[1]))
            assert abs(mp.mpf(value) - expected) <= tolerance * expected, pair


# Constant and linear rates: t - s is rounded once, and only positive numbers are added and
# multiplied after it, fewer than eight of them.
@pytest.mark.parametrize("rate", [4.0, 1, 0.1, (0.1, 20.0), (8.0, 0.0), (0.0, 1e-3), (3, 3)])
def test_numbers_and_pairs_are_integrated_to_rounding(rate: Any) -> None:
    assert_clock(Schedule.of(rate), reference.clock_of(rate), 8 * EPS)


@pytest.mark.parametrize(("low", "high"), [(0.01, 50.0), (0.1, 0.2), (1e-3, 1e3)])
def test_the_geometric_clock_does_not_cancel(low: float, high: float) -> None:
    def exact(s: Any, t: Any) -> Any:
        ratio = mp.mpf(high) / mp.mpf(low)
        return mp.mpf(low) ** 2 * (ratio ** (2 * t) - ratio ** (2 * s))

    # exp and expm1 turn the absolute error of their argument, at most 2 log(high/low), into a
    # relative one.
    slope = 2 * math.log(high / low)
    assert_clock(Schedule.geometric(low, high), exact, 8 * (1 + slope) * EPS)


SMOOTH: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[Any, Any], Any]]] = {
    "squared sine": (
        lambda t: 1 + torch.sin(3 * t) ** 2,
        reference.squared_sine_clock(1.0, 3.0),
    ),
    "decay": (lambda t: torch.exp(-5 * t), lambda s, t: (mp.exp(-5 * s) - mp.exp(-5 * t)) / 5),
    "parabola": (lambda t: t**2, lambda s, t: (t**3 - s**3) / 3),
    "peak": (
        lambda t: 1 / (1 + 25 * (t - 0.5) ** 2),
        lambda s, t: (mp.atan(5 * t - mp.mpf("2.5")) - mp.atan(5 * s - mp.mpf("2.5"))) / 5,
    ),
}


@pytest.mark.parametrize("name", list(SMOOTH))
def test_a_rate_without_integral_is_integrated_numerically(name: str) -> None:
    # 128 positive terms; a term carries the rounding of its node, and the rates here change by at
    # most a factor (1 + 10 |dt|) over dt. The rule itself is exact to 1e-20 on panels of 1/8.
    rate, exact = SMOOTH[name]
    assert_clock(Schedule(rate), exact, 32 * EPS)


COSINES = [(0.008, 0.9946), (0.0, 0.9), (0.008, 0.999999), (0.3, 1e-3)]


def cosine_mean(offset: float, stop: float, t: Any) -> Any:
    """cos theta(t) / cos theta(0) with theta(t) = (stop t + offset) / (1 + offset) pi / 2."""
    quarter = mp.pi / 2 / (1 + mp.mpf(offset))
    return mp.cos(quarter * (stop * t + offset)) / mp.cos(quarter * offset)


@pytest.mark.parametrize(("offset", "stop"), COSINES)
def test_the_cosine_clock_is_minus_twice_the_log_of_its_mean(offset: float, stop: float) -> None:
    def exact(s: Any, t: Any) -> Any:
        stop_exact = mp.mpf(stop)
        means = (cosine_mean(offset, stop_exact, u) for u in (s, t))
        return 2 * mp.log(next(means) / next(means))

    # The angle of s is rounded to eps, and the rate there has a relative slope of 1 / cos(angle)
    # times 1 / sin(angle): it is 2e5 where the schedule ends 2e-6 before the quarter turn, and
    # the sine cancels with the span, except where the offset is zero and s is not small.
    quarter = math.pi / 2 / (1 + offset)
    slope = 1 / math.cos(quarter * (stop + offset))
    assert_clock(Schedule.cosine(offset, stop), exact, 8 * (1 + slope) * EPS)


@pytest.mark.parametrize(("offset", "stop"), COSINES)
def test_the_cosine_rate_is_the_slope_of_its_clock(offset: float, stop: float) -> None:
    beta = Schedule.cosine(offset, stop)
    with mp.workdps(30):
        for t in (0.0, 1e-4, 0.3, 0.9, 1.0):
            mean = lambda u: mp.log(cosine_mean(offset, mp.mpf(stop), u))  # noqa: E731
            slope = -2 * mp.diff(mean, mp.mpf(t))
            # The angle is good to eps, the tangent near a quarter turn to eps / cos(angle).
            angle = math.pi / 2 / (1 + offset) * (stop * t + offset)
            error = abs(beta.rate(tensor(t)).item() - slope)
            assert error <= 8 * EPS / math.cos(angle) * abs(slope) + mp.mpf(10) ** -20


def test_the_cosine_schedule_gives_a_process_its_mean() -> None:
    sde = VPSDE(schedule=Schedule.cosine())
    times = [1e-8, 1e-3, 0.3, 0.7, 0.999, 1.0]
    means = sde.marginal(tensor(times)).mean.flatten().tolist()
    variances = sde.marginal(tensor(times)).covariance.flatten().tolist()
    with mp.workdps(30):
        for t, mean, variance in zip(times, means, variances, strict=True):
            exact = cosine_mean(0.008, mp.mpf(0.9946), mp.mpf(t))
            # The mean is small at the end: eps over cos(angle) = 0.0085, and four doublings.
            assert abs(mean - exact) <= 2000 * EPS * exact
            assert abs(variance - (1 - exact**2)) <= 2000 * EPS * (1 - exact**2)
    assert means[-1] == pytest.approx(0.0084, abs=5e-5)


def test_cld_takes_the_cosine_schedule() -> None:
    # Alone the clock counts: the law is that of a constant rate over as much of it.
    beta = Schedule.cosine()
    s, t = tensor([0.0, 0.2, 0.9]), tensor([1e-3, 0.5, 1.0])
    clock = beta.integral(s, t)
    ours = CLD(beta=beta).transition(s, t)
    theirs = CLD(beta=16.0).transition(torch.zeros_like(clock), clock / 16)
    assert torch.allclose(ours.mean, theirs.mean, rtol=0, atol=1e-13)
    assert torch.allclose(ours.root, theirs.root, rtol=0, atol=1e-13)


@pytest.mark.parametrize("offset", [-1e-9, -1.0, math.nan, math.inf])
def test_a_cosine_offset_below_zero_is_refused(offset: float) -> None:
    with pytest.raises(ValueError, match="offset must be finite and at least 0"):
        Schedule.cosine(offset)


@pytest.mark.parametrize("stop", [0.0, -0.5, 1.0, 1.5, math.nan])
def test_a_cosine_stop_outside_its_range_is_refused(stop: float) -> None:
    with pytest.raises(ValueError, match="stop must lie in"):
        Schedule.cosine(stop=stop)


def test_a_given_integral_is_used() -> None:
    asked = []

    def integral(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        asked.append((s, t))
        return (t - s) * (t + s)

    schedule = Schedule(lambda t: 2 * t, integral)
    asked.clear()
    s, t = torch.tensor([0.25, 0.5], dtype=torch.float64)
    assert schedule.integral(s, t).item() == 0.1875
    assert asked == [(s, t)]


def test_an_integral_of_another_rate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"integral of rate over .*, 1\.5; got 5"):
        Schedule(lambda t: 1 + t, lambda s, t: 5 * (t - s))


def test_a_rate_that_the_quadrature_does_not_resolve_needs_its_integral() -> None:
    with pytest.raises(ValueError, match="Pass integral"):
        Schedule(lambda t: torch.exp(-(((t - 0.5) / 1e-3) ** 2)))


@given(schedules(), intervals(points=3))
def test_integrals_add(rate: Any, where: Any) -> None:
    s, r, t = (tensor(x) for x in where)
    beta = Schedule.of(rate)
    whole = beta.integral(s, t)
    parts = beta.integral(s, r) + beta.integral(r, t)
    # Each of the three is good to 8 eps of itself.
    assert (parts - whole).abs() <= 24 * EPS * whole


@pytest.mark.parametrize("rate", [3.0, (1.0, 2.0), Schedule(lambda t: 1 + t)])
def test_rates_and_integrals_keep_the_shape_of_time(rate: Any) -> None:
    beta = Schedule.of(rate)
    s, t = torch.zeros(2, 1, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    assert beta.rate(t).shape == (3,)
    assert beta.integral(s, t).shape == (2, 3)
    assert beta.rate(tensor(0.5)).shape == ()


def test_the_ends_of_a_pair_are_the_rates_at_the_ends() -> None:
    beta = Schedule.of((0.1, 20.0))
    assert beta.rate(tensor([0.0, 1.0])).tolist() == [0.1, 20.0]


def test_a_schedule_is_taken_as_it_is() -> None:
    beta = Schedule.of(2.0)
    assert Schedule.of(beta) is beta


def test_a_pair_may_be_a_list_or_a_tensor() -> None:
    t = tensor([0.0, 0.3, 1.0])
    expected = Schedule.of((1.0, 3.0)).rate(t)
    assert torch.equal(Schedule.of([1.0, 3.0]).rate(t), expected)
    assert torch.equal(Schedule.of(tensor([1.0, 3.0])).rate(t), expected)


def test_the_clock_of_ve_is_the_difference_of_variances() -> None:
    # Two powers of 5000 on either side: 2 log 5000 = 17 times eps, and a few.
    sde = VESDE()
    variance = sde.transition(0.25, 0.75).covariance.item()
    expected = 0.01**2 * (5000.0**1.5 - 5000.0**0.5)
    assert variance == pytest.approx(expected, rel=64 * EPS)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf, (-1.0, 1.0), (1.0, -1e-9)])
def test_rates_that_are_not_positive_and_finite_are_refused(rate: Any) -> None:
    with pytest.raises(ValueError, match="beta"):
        Schedule.of(rate)


@pytest.mark.parametrize("rate", [(0.0, 0.0), (1.0, math.nan), (math.inf, 1.0)])
def test_pairs_without_a_finite_positive_rate_are_refused(rate: Any) -> None:
    with pytest.raises(ValueError, match="beta"):
        Schedule.of(rate)


@pytest.mark.parametrize("value", ["linear", "12", None, (1.0, 2.0, 3.0), (1.0,), {}, 1j])
def test_what_is_no_schedule_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="number, a pair"):
        Schedule.of(value)


WRONG_RATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "negative in the middle": lambda t: (t - 0.5) ** 2 - 1e-4,
    "negative at the end": lambda t: 1 - 1.001 * t,
    "NaN": lambda t: torch.sqrt(t - 0.1),
    "infinite": lambda t: 1 / t,
}


@pytest.mark.parametrize("name", list(WRONG_RATES))
def test_a_rate_that_is_negative_or_not_finite_somewhere_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"finite and not negative on \[0, 1\]; got .* at t = "):
        Schedule(WRONG_RATES[name])


@pytest.mark.parametrize(
    "rate", [lambda t: 3.0, lambda t: t.sum(), lambda t: t[:, None], lambda t: t[1:]]
)
def test_a_rate_of_another_shape_is_refused(rate: Any) -> None:
    with pytest.raises(ValueError, match="shape of its argument"):
        Schedule(rate)


@pytest.mark.parametrize("rate", [3.0, (0.1, 20.0), None])
def test_a_rate_that_is_no_function_is_refused(rate: Any) -> None:
    with pytest.raises(TypeError, match=r"must be functions|Schedule\.of"):
        Schedule(rate)


def test_a_process_takes_a_schedule() -> None:
    # The same clock in two forms, and two kernels: a few roundings each.
    given_pair = LinearSDE.from_matrices([[-0.5]], [[1.0]], (1.0, 3.0))
    own = LinearSDE.from_matrices([[-0.5]], [[1.0]], Schedule(lambda t: 1 + 2 * t))
    ours, theirs = own.transition(0.2, 0.9), given_pair.transition(0.2, 0.9)
    assert ours.mean.item() == pytest.approx(theirs.mean.item(), rel=64 * EPS)
    assert ours.root.item() == pytest.approx(theirs.root.item(), rel=64 * EPS)


def test_functions_of_numbers_are_refused_as_rates() -> None:
    with pytest.raises(ValueError, match="rate must accept a tensor of times"):
        Schedule(lambda t: torch.tensor(math.exp(t)))


def test_a_function_is_no_schedule_yet() -> None:
    with pytest.raises(TypeError, match=r"as Schedule\(rate\) for a function"):
        Schedule.of(torch.exp)  # type: ignore[arg-type]
