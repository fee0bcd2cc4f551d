"""Processes given by functions of time: two matrices, or the signal and noise of interpolants."""

import math
from typing import Any

import mpmath as mp
import pytest
import torch

from cldsde import LinearSDE, RectifiedFlow
from probes import tensor
from references.interpolants import INTERPOLANTS, SignalNoise
from tolerances import KERNEL, rounding


@pytest.mark.parametrize(("cut", "t"), [(0.99, 1e-8), (0.9999, 1.0)])
def test_processes_that_nearly_diverge_are_resolved(cut, t):
    # x_t = (1 - u) x_0 + u n at u = cut t, whose drift diverges at u = 1.
    sde = LinearSDE.from_functions(
        lambda t: (-cut / (1 - cut * t)).reshape(1, 1),
        lambda t: torch.sqrt(2 * cut**2 * t / (1 - cut * t)).reshape(1, 1),
    )
    kernel = sde.transition(0.0, t)
    # The functions subtract 1 - cut t: eps / (1 - cut) <= 2e-12 a value, and values are averaged.
    assert kernel.mean.item() == pytest.approx(1 - cut * t, rel=KERNEL, abs=0)
    assert kernel.covariance.item() == pytest.approx((cut * t) ** 2, rel=KERNEL, abs=0)


# A rate, and its integral.
ROUGH: dict[str, tuple[Any, float]] = {
    "jump": (lambda t: torch.where(t < 0.3, -1.0, -5.0).double(), -3.8),
    "square root": (lambda t: -t.sqrt(), -2 / 3),
    "bump": (lambda t: -torch.exp(-(((t - 0.377) / 0.004) ** 2)), -0.004 * math.sqrt(math.pi)),
    "stiff": (lambda t: -300 * (1 + t), -450.0),
}


@pytest.mark.parametrize("name", list(ROUGH))
def test_functions_need_not_be_smooth_everywhere(name):
    rate, total = ROUGH[name]
    sde = LinearSDE.from_functions(lambda t: rate(t).reshape(1, 1), lambda t: [[1.0]])
    mean = sde.transition(0.0, 1.0).mean.item()
    # The condition number of the exponential is its argument.
    tolerance = KERNEL * max(1.0, abs(total))
    assert mean == pytest.approx(math.exp(total), rel=tolerance, abs=0)


def test_units_of_components_only_scale_a_kernel():
    def root(units):
        F = tensor([[0.0, 4.0], [-1.0, -4.0]]) * units.T / units
        G = lambda t: units.T * torch.stack([(t - 0.3).abs(), t]).diag()  # noqa: E731
        return LinearSDE.from_functions(lambda t: (1 + t) * F, G).transition(0.1, 0.9).root

    # In either unit ‖F‖ exceeds 1e6, which would need more panels than are allowed.
    for unit in (2.0**20, 2.0**-20):
        units = tensor([[unit, 1.0]])
        assert torch.equal(root(units), units.T * root(tensor([[1.0, 1.0]])))


def test_panels_follow_parameters_that_change():
    rate = tensor(1.0)
    sde = LinearSDE.from_functions(lambda t: [[-rate * (1 + t)]], lambda t: [[1.0]])
    rate.fill_(200.0)
    # The condition number of the exponential is its argument.
    expected = math.exp(-300.0)
    assert sde.transition(0.0, 1.0).mean.item() == pytest.approx(expected, rel=300 * KERNEL, abs=0)


# Interpolants ----------------------------------------------------------------------------------

SINGULAR = ["rectified flow", "cosine", "linear functions", "uncertain start", "table to zero"]
ALMOST_ZERO = [lambda t: torch.cos(math.pi / 2 * t), lambda t: torch.cos(math.pi / 2 * t) ** 2]
ALMOST_ZERO += [lambda t: torch.cos(math.pi / 2 * t) - 2e-16 * t]
VANISHING = [INTERPOLANTS[name][0] for name in SINGULAR]
VANISHING += [LinearSDE.from_signal_noise(signal, lambda t: 1 * t) for signal in ALMOST_ZERO]


def assert_close(found, expected):
    """Within the promise for kernels, relative."""
    wanted = tensor(expected)
    assert ((found.flatten() - wanted).abs() <= KERNEL * wanted.abs()).all()


@pytest.mark.parametrize("name", list(INTERPOLANTS))
def test_kappa_and_slopes_of_standard_deviations_agree_with_the_reference(name):
    sde, exact = INTERPOLANTS[name]
    times = [0.05, 0.31, 0.77, 0.999]
    with mp.workdps(40):
        start, spread = exact.noise(mp.mpf(0)) ** 2, mp.mpf(0.3)

        def deviation(t):  # of data with a spread of their own
            return mp.sqrt(exact.signal(t) ** 2 * (spread - start) + exact.noise(t) ** 2)

        slopes = [float(mp.diff(deviation, mp.mpf(t))) for t in times]
        levels = [float(mp.log(exact.signal(t) / exact.noise(t))) for t in map(mp.mpf, times)]
    assert_close(sde.dynamics.rates(tensor(times), tensor(0.3))[1], slopes)
    # A logarithm has the relative error of its argument as an absolute one.
    assert (sde.kappa(tensor(times)) - tensor(levels)).abs().max() <= KERNEL


def test_functions_that_oscillate_have_exact_kernels_over_long_steps():
    # The noise grows so little that all kernels are found by quadrature.
    omega = 120 * math.pi
    sde = LinearSDE.from_signal_noise(
        torch.ones_like, lambda t: 1 + (t + (omega * t).sin() / omega) / 128
    )
    exact = SignalNoise(lambda t: mp.mpf(1), lambda t: 1 + (t + mp.sin(omega * t) / omega) / 128)
    pairs = [(0.0, 1.0), (0.5, 0.64), (0.5, 0.501)]
    found = sde.transition(*tensor(pairs).unbind(-1)).root
    assert_close(found, [float(exact.transition(*pair).root[0]) for pair in pairs])


@pytest.mark.parametrize("sde", VANISHING)
def test_a_signal_that_vanishes_but_for_rounding_has_a_latest_regular_time(sde):
    assert float(sde.transition(0.5, 1.0).mean) == 0.0
    assert float(sde.kappa(1.0)) == -math.inf
    assert sde.regular_until < 1
    # Minus five, by 1 - t to a thousandth, rounded down by another; twice that if α is a square.
    resolution = 4e-3
    assert -5 <= float(sde.kappa(sde.regular_until)) <= -5 + resolution
    assert sde.drift(sde.regular_until).isfinite().all()
    for call in (sde.drift, sde.diffusion):
        with pytest.raises(ValueError, match="of this process diverges at t = 1; take t ≤"):
            call(1.0)
    with pytest.raises(ValueError, match="diffusion of this process diverges at t = 1"):
        sde.accumulated_noise(0.5, 1.0)


def test_ends_that_are_regular_or_almost_so():
    sde = LinearSDE.from_signal_noise(lambda t: 1 - torch.sqrt(t) / 2, lambda t: 1 * t)
    with pytest.raises(ValueError, match=r"the drift .* diverges at t = 0; take t > 0$"):
        sde.drift(0.0)
    sde = LinearSDE.from_signal_noise(lambda t: 1 - t * (1 - 1e-12), lambda t: 1 * t)
    # The rest of the signal at the end, 1e-12, moves the time by as much of 1 - t = 7e-3.
    assert sde.regular_until == pytest.approx(RectifiedFlow().regular_until, rel=KERNEL, abs=0)
    # It is what 1 - 1e-12 leaves of 1, to its rounding.
    mean = float(sde.transition(0.5, 1.0).mean)
    assert mean == pytest.approx(2e-12, rel=rounding(4, 1e12), abs=0)
