"""Processes given by functions of time: two matrices, or the signal and noise of interpolants."""

import copy
import math
import pickle
from typing import Any

import mpmath as mp
import pytest
import torch

from cldsde import VPSDE, CosineVP, LinearSDE, RectifiedFlow
from cldsde.linear.log_snr import times_of_log_snr
from cldsde.linear.signal_noise import SignalNoiseDynamics
from probes import tensor
from references.interpolants import INTERPOLANTS, SignalNoise
from tolerances import KERNEL, rounding


@pytest.mark.parametrize(("cut", "where"), [(0.99, (0.0, 1e-8)), (0.9999, (0.0, 1.0))])
def test_processes_that_nearly_diverge_are_resolved(cut, where):
    # x_t = (1 - u) x_0 + u n at u = cut t, whose drift diverges at u = 1.
    sde = LinearSDE.from_functions(
        lambda t: (-cut / (1 - cut * t)).reshape(1, 1),
        lambda t: torch.sqrt(2 * cut**2 * t / (1 - cut * t)).reshape(1, 1),
    )
    kernel = sde.transition(*where)
    with mp.workdps(40):
        s, t = (mp.mpf(cut) * mp.mpf(x) for x in where)
        mean = (1 - t) / (1 - s)
        variance = float(t**2 - (mean * s) ** 2)
    # The functions subtract 1 - cut t: eps / (1 - cut) <= 2e-12 a value, and values are averaged.
    assert kernel.mean.item() == pytest.approx(float(mean), rel=KERNEL, abs=0)
    assert kernel.covariance.item() == pytest.approx(variance, rel=KERNEL, abs=0)


# A rate, and its integral.
ROUGH: dict[str, tuple[Any, Any]] = {
    "jump": (lambda t: torch.where(t < 0.3, -1.0, -5.0).double(), lambda: -5 + 4 * mp.mpf(0.3)),
    "kink": (lambda t: -(t - 0.3).abs(), lambda: -(mp.mpf(0.3) ** 2 + (1 - mp.mpf(0.3)) ** 2) / 2),
    "square root": (lambda t: -t.sqrt(), lambda: -mp.mpf(2) / 3),
    "bump": (
        lambda t: -torch.exp(-(((t - 0.377) / 0.004) ** 2)),
        lambda: -mp.sqrt(mp.pi) * mp.mpf(0.004),
    ),
    "high power": (lambda t: -(t**9), lambda: -mp.mpf(1) / 10),
    "stiff": (lambda t: -300 * (1 + t), lambda: mp.mpf(-450)),
}


@pytest.mark.parametrize("name", list(ROUGH))
def test_functions_need_not_be_smooth_everywhere(name):
    rate, integral = ROUGH[name]
    sde = LinearSDE.from_functions(lambda t: rate(t).reshape(1, 1), lambda t: [[1.0]])
    with mp.workdps(40):
        total = integral()
        expected = float(mp.exp(total))
    # The condition number of the exponential is its argument.
    tolerance = KERNEL * max(1.0, abs(float(total)))
    assert sde.transition(0.0, 1.0).mean.item() == pytest.approx(expected, rel=tolerance, abs=0)


def numeric_drift(t: torch.Tensor) -> list[list[float]]:
    return [[-math.exp(float(t))]]


def growing_diffusion(t: torch.Tensor) -> torch.Tensor:
    return (1 + t).reshape(1, 1)


OF_FUNCTIONS = LinearSDE.from_functions(numeric_drift, growing_diffusion)
COPIED = [INTERPOLANTS[name][0] for name in ("rectified flow", "cosine", "table", "VP functions")]


@pytest.mark.parametrize("sde", [OF_FUNCTIONS, *COPIED])
def test_processes_of_named_functions_can_be_copied_and_pickled(sde):
    t = tensor([1e-6, 0.3, 0.9])
    for duplicate in (copy.deepcopy(sde), pickle.loads(pickle.dumps(sde))):
        assert torch.equal(duplicate.marginal(t).mean, sde.marginal(t).mean)
        assert torch.equal(duplicate.marginal(t).root, sde.marginal(t).root)


def test_a_prior_may_be_given_and_lists_be_returned():
    sde = LinearSDE.from_functions(lambda t: [[-0.5]], lambda t: [[1.0]], prior_covariance=[[4.0]])
    assert sde.prior.covariance.item() == 4.0
    mean = sde.transition(0.0, 1.0).mean.item()
    assert mean == pytest.approx(math.exp(-0.5), rel=rounding(), abs=0)
    assert sde.marginal(torch.empty(0, dtype=torch.float64)).mean.shape == (0, 1, 1)


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
def test_log_snr_and_slopes_of_standard_deviations_agree_with_the_reference(name):
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
    assert (sde.log_snr(tensor(times)) - tensor(levels)).abs().max() <= KERNEL


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
    assert float(sde.log_snr(1.0)) == -math.inf
    assert sde.regular_until < 1
    # Minus five, by 1 - t to a thousandth, rounded down by another; twice that if α is a square.
    resolution = 4e-3
    assert -5 <= float(sde.log_snr(sde.regular_until)) <= -5 + resolution
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
    steady = LinearSDE.from_signal_noise(lambda t: torch.exp(-20 * t), lambda t: t.sqrt())
    assert steady.regular_until == 1.0


def test_interpolants_have_priors_and_levels():
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    for sde in (CosineVP(), VPSDE.from_alphas_cumprod(table[:7]), VPSDE.from_alphas_cumprod(table)):
        assert float(sde.prior.covariance) == float(sde.stationary_covariance) == 1.0
    assert CosineVP().stationary_reversal is not None
    assert RectifiedFlow().stationary_covariance is None
    assert float(RectifiedFlow().prior.covariance) == 1.0
    # A square root, squared.
    initial = float(INTERPOLANTS["uncertain start"][0].initial_covariance)
    assert initial == pytest.approx(0.04, rel=rounding(2), abs=0)
    levels = tensor([-9.0, -3.0, 0.0, 2.0, 8.0])
    # t = 1 / (1 + e^kappa); rounding of log t, and of t near 1.
    found = times_of_log_snr(RectifiedFlow(), levels)
    assert (found - torch.sigmoid(-levels)).abs().max() <= rounding(4)


def test_an_exact_gain_serves_functions_that_are_not_smooth():
    def noise(t):
        return torch.where(t < 0.31, t, 2 * t - 0.31)

    dynamics = SignalNoiseDynamics(torch.ones_like, noise, gain=lambda s, t: noise(t) - noise(s))
    found = float(LinearSDE(dynamics).transition(0.0, 0.5).root)
    assert found == pytest.approx(0.69, rel=rounding(), abs=0)
