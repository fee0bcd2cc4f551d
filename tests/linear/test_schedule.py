"""Schedules: rates, and clocks that do not cancel."""

import math
from typing import Any

import mpmath as mp
import pytest
import torch

from cldsde import Schedule
from probes import tensor
from references import clock_of
from references.kernels import variance_clock
from tolerances import rounding

PAIRS = [(s, s + gap) for s in (0.0, 1e-4, 0.3) for gap in (1e-12, 1e-8, 1e-3, 0.7)]
PAIRS += [(1 - gap, 1.0) for gap in (1e-12, 1e-8, 0.1)] + [(0.0, 1.0), (0.3, 0.3)]


def cosine(offset: float, stop: float) -> tuple[Schedule, Any, float]:
    """The mean is cos theta(t) / cos theta(0), theta(t) = (stop t + offset) / (1 + offset) pi/2."""

    def integral(s, t):
        quarter = mp.pi / 2 / (1 + mp.mpf(offset))
        first, last = (mp.cos(quarter * (mp.mpf(stop) * u + offset)) for u in (s, t))
        return 2 * mp.log(first / last)

    # The angle is good to eps, and the rate there has a relative slope of 1 / cos(angle) at most:
    # it is 2e5 if the schedule ends 2e-6 before the quarter turn.
    slope = 1 / math.cos(math.pi / 2 / (1 + offset) * (stop + offset))
    return Schedule.cosine(offset, stop), integral, rounding(8, 1 + slope)


# Schedule, its exact clock, and the rounding of the clock. Constant and linear rates: t - s is
# rounded once, and fewer than eight positive numbers are added and multiplied after it. Geometric:
# exp and expm1 turn the absolute error of their argument, at most 2 log(high / low), into a
# relative one. By quadrature: 128 positive terms, each with the rounding of its node; the rates
# change by at most a factor (1 + 10 |dt|) over dt, and the rule is exact to 1e-20 on panels of 1/8.
CLOCKS: dict[str, tuple[Schedule, Any, float]] = {
    **{
        f"{rate}": (Schedule.of(rate), clock_of(rate).integral, rounding(8))
        for rate in (4.0, 1, (0.1, 20.0), (8.0, 0.0), (3, 3))
    },
    **{
        f"geometric {pair}": (
            Schedule.geometric(*pair),
            variance_clock(*pair).integral,
            rounding(8, 1 + 2 * math.log(pair[1] / pair[0])),
        )
        for pair in ((0.01, 50.0), (0.1, 0.2), (1e-3, 1e3))
    },
    "peak": (
        Schedule(lambda t: 1 / (1 + 25 * (t - 0.5) ** 2)),
        lambda s, t: (mp.atan(5 * t - mp.mpf("2.5")) - mp.atan(5 * s - mp.mpf("2.5"))) / 5,
        rounding(32),
    ),
    **{
        f"cosine {pair}": cosine(*pair)
        for pair in ((0.008, 0.9946), (0.0, 0.9), (0.008, 0.999999), (0.3, 1e-3))
    },
}


@pytest.mark.parametrize("name", list(CLOCKS))
def test_the_clock_and_its_slope_agree_with_the_closed_form(name):
    schedule, exact, tolerance = CLOCKS[name]
    found = schedule.integral(*tensor(PAIRS).unbind(-1))
    with mp.workdps(40):
        for pair, value in zip(PAIRS, found.tolist(), strict=True):
            expected = exact(*map(mp.mpf, pair))
            assert abs(mp.mpf(value) - expected) <= tolerance * expected, pair
        for t in (1e-4, 0.3, 0.9, 1.0):
            slope = mp.diff(lambda u: exact(mp.mpf(0), u), mp.mpf(t))
            # mpmath differentiates to half of its digits.
            error = abs(mp.mpf(schedule.rate(tensor(t)).item()) - slope)
            assert error <= tolerance * abs(slope) + mp.mpf(10) ** -18


def test_a_given_integral_is_used():
    near = 1 + 2.0**-30  # nearer than the check can tell
    schedule = Schedule(torch.ones_like, lambda s, t: near * (t - s))
    assert schedule.integral(*tensor([0.25, 0.5])).item() == near / 4
