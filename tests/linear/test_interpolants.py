"""Interpolants x_t = alpha x_0 + sigma n: singular ends, levels, checks."""

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

SINGULAR = ["rectified flow", "cosine", "linear functions", "uncertain start", "table to zero"]


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


@pytest.mark.parametrize("name", ["rectified flow", "cosine", "VP functions"])
def test_accumulated_noise_is_the_integral(name):
    sde, exact = INTERPOLANTS[name]
    pairs = [(0.0, 0.3), (0.2, 0.2 + 1e-8), (0.1, 0.999), (0.5, 1 - 1e-6)]
    expected = []
    with mp.workdps(40):
        for s, t in pairs:
            cuts = [s, *(1 - (1 - s) / 10**k for k in range(1, 6) if 1 - (1 - s) / 10**k < t), t]
            cuts = [*map(mp.mpf, cuts)] if t - s > 1e-3 else [mp.mpf(s), mp.mpf(t)]
            expected.append(float(mp.quad(lambda u: exact.slopes(u)[1][0], cuts)))
    assert_close(sde.accumulated_noise(*tensor(pairs).unbind(-1)), expected)


def test_functions_that_oscillate_have_exact_kernels_over_long_steps():
    omega = 120 * math.pi
    sde = LinearSDE.from_signal_noise(
        torch.ones_like, lambda t: t + 0.9 * torch.sin(omega * t) / omega
    )
    exact = SignalNoise(lambda t: mp.mpf(1), lambda t: t + mp.mpf(0.9) * mp.sin(omega * t) / omega)
    pairs = [(0.5, 0.64), (0.5, 0.501)]
    found = sde.transition(*tensor(pairs).unbind(-1)).root
    assert_close(found, [float(exact.transition(*pair).root[0]) for pair in pairs])


@pytest.mark.parametrize("entries", [7, 1000])
def test_a_table_preserves_the_variance(entries):
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, entries, dtype=torch.float64), 0)
    sde = VPSDE.from_alphas_cumprod(table)
    assert float(sde.prior.covariance) == 1.0
    assert torch.equal(sde.stationary_covariance, torch.eye(1, dtype=torch.float64))


@pytest.mark.parametrize("name", SINGULAR)
def test_a_signal_that_vanishes_has_a_latest_regular_time(name):
    sde, _ = INTERPOLANTS[name]
    assert float(sde.transition(0.5, 1.0).mean) == 0.0
    assert float(sde.log_snr(1.0)) == -math.inf
    assert sde.regular_until < 1
    # A log-SNR of minus five, bisected to a thousandth of 1 - t and rounded to another.
    resolution = 5e-3
    assert float(sde.log_snr(sde.regular_until)) == pytest.approx(-5, abs=resolution)
    assert sde.drift(sde.regular_until).isfinite().all()
    for call in (sde.drift, sde.diffusion):
        with pytest.raises(ValueError, match="of this process diverges at t = 1; take t ≤"):
            call(1.0)
    with pytest.raises(ValueError, match="diffusion of this process diverges at t = 1"):
        sde.accumulated_noise(0.5, 1.0)


ALMOST_ZERO = [
    lambda t: torch.cos(math.pi / 2 * t),
    lambda t: torch.cos(math.pi / 2 * t) ** 2,
    lambda t: torch.cos(math.pi / 2 * t) - 2e-16 * t,
]


@pytest.mark.parametrize("signal", ALMOST_ZERO)
def test_a_signal_that_vanishes_but_for_rounding_vanishes(signal):
    sde = LinearSDE.from_signal_noise(signal, lambda t: 1 * t)
    assert sde.regular_until < 1
    assert float(sde.transition(0.3, 1.0).mean) == 0.0
    assert float(sde.log_snr(1.0)) == -math.inf


@pytest.mark.parametrize("noise", [0.3, 1.0, 50.0])
def test_the_latest_regular_time_has_a_log_ratio_of_minus_five(noise):
    sde = LinearSDE.from_signal_noise(lambda t: 1 - t, lambda t: noise * t)
    left = 1 / (1 + math.exp(5) / noise)  # 1 − t at log((1 − t)/(noise t)) = −5
    # It is bisected to a thousandth and rounded up to four digits.
    resolution = 2e-3
    assert left <= 1 - sde.regular_until <= left + resolution * left


def test_ends_that_are_regular_or_almost_so():
    sde = LinearSDE.from_signal_noise(lambda t: 1 - torch.sqrt(t) / 2, lambda t: 1 * t)
    with pytest.raises(ValueError, match=r"the drift .* diverges at t = 0; take t > 0$"):
        sde.drift(0.0)
    sde = LinearSDE.from_signal_noise(lambda t: 1 - t * (1 - 1e-12), lambda t: 1 * t)
    # The rest of the signal at the end, 1e-12, moves the time by as much of 1 - t = 7e-3.
    assert sde.regular_until == pytest.approx(RectifiedFlow().regular_until, rel=KERNEL)
    # It is what 1 - 1e-12 leaves of 1, to its rounding.
    assert float(sde.transition(0.5, 1.0).mean) == pytest.approx(2e-12, rel=rounding(4, 1e12))
    steady = LinearSDE.from_signal_noise(lambda t: torch.exp(-20 * t), lambda t: t.sqrt())
    assert steady.regular_until == 1.0


def test_interpolants_have_priors_levels_representations_and_copies():
    for name in ("rectified flow", "cosine", "table to zero"):
        assert float(INTERPOLANTS[name][0].prior.covariance) == 1.0
    assert torch.equal(CosineVP().stationary_covariance, torch.eye(1, dtype=torch.float64))
    assert CosineVP().stationary_reversal is not None
    assert RectifiedFlow().stationary_covariance is None
    # A square root, squared.
    initial = float(INTERPOLANTS["uncertain start"][0].initial_covariance)
    assert initial == pytest.approx(0.04, rel=rounding(2))
    levels = tensor([-9.0, -3.0, 0.0, 2.0, 8.0])
    # t = 1 / (1 + e^kappa); rounding of log t, and of t near 1.
    found = times_of_log_snr(RectifiedFlow(), levels)
    assert (found - torch.sigmoid(-levels)).abs().max() <= rounding(4)
    assert repr(RectifiedFlow()) == "RectifiedFlow()"
    assert "signal=<function vp_signal>" in repr(INTERPOLANTS["VP functions"][0])
    for name in ("rectified flow", "cosine", "table", "VP functions"):
        sde, _ = INTERPOLANTS[name]
        for other in (copy.deepcopy(sde), pickle.loads(pickle.dumps(sde))):
            assert torch.equal(other.transition(0.2, 0.7).root, sde.transition(0.2, 0.7).root)


def test_kernels_are_differentiable_in_functions_and_tables():
    def learnt(rate):
        sde = LinearSDE.from_signal_noise(lambda t: (1 - t) ** rate, lambda t: t**rate)
        # One by quadrature, one by differences.
        s, t = tensor([0.30, 0.30]), tensor([0.31, 1.0])
        return torch.cat([sde.transition(s, t).root.flatten(), sde.diffusion(s).flatten()])

    def tabled(table):
        sde = VPSDE.from_alphas_cumprod(table)
        return sde.transition(tensor([0.0, 0.2, 0.4]), tensor([0.3, 0.9, 0.9])).root

    assert torch.autograd.gradcheck(learnt, tensor(1.3).requires_grad_())
    assert torch.autograd.gradcheck(tabled, tensor([0.9, 0.5, 0.2, 0.01]).requires_grad_())


class Cubed(torch.autograd.Function):
    """A function without a derivative of its own."""

    @staticmethod
    def forward(ctx: Any, t: torch.Tensor) -> torch.Tensor:
        return t**3


NO_INTERPOLANTS: list[tuple[Any, Any, str]] = [
    (lambda t: 1 - t, lambda t: 0.1 * (1 - t) ** 2 + 0 * t, "noise must be positive"),
    (lambda t: 1 / (1 - t), lambda t: t, "signal must be finite on .0, 1.; got inf at t"),
    (lambda t: torch.cos(3 * t), lambda t: t, "signal must be positive before t = 1"),
    (lambda t: 0.9 - t / 2, lambda t: t, "signal must be 1 at t = 0.*got 0.9"),
    (lambda t: 1 - t / 2, lambda t: t - 0.1, "noise must be not negative; got -0.1"),
    (lambda t: 1 + 0 * t, lambda t: t * (1.5 - t), "α/σ that decreases"),
    (lambda t: 1.0, lambda t: t, "signal must return float64 of the shape"),
    (lambda t: 1 - t, lambda t: t.float(), "noise must return float64"),
    (lambda t: 1 - t, lambda t: torch.where(t < 0.31, t, 2 * t - 0.31), "smooth near"),
    (lambda t: 1 - t, math.sqrt, "noise must accept a tensor of times"),
    (lambda t: 1 - t, Cubed.apply, "noise must consist of torch's operations"),
    (0.5, torch.sqrt, r"signal must be a function of times; got 0\.5"),
]


@pytest.mark.parametrize(("signal", "noise", "message"), NO_INTERPOLANTS)
def test_functions_that_are_no_interpolants_are_rejected(signal, noise, message):
    with pytest.raises((ValueError, TypeError), match=message):
        LinearSDE.from_signal_noise(signal, noise)


def test_an_exact_gain_serves_functions_that_are_not_smooth():
    def noise(t):
        return torch.where(t < 0.31, t, 2 * t - 0.31)

    dynamics = SignalNoiseDynamics(torch.ones_like, noise, gain=lambda s, t: noise(t) - noise(s))
    found = float(LinearSDE(dynamics).transition(0.0, 0.5).root)
    assert found == pytest.approx(0.69, rel=rounding())


TABLES = [
    ([0.9, 0.95], "got 0.95 after 0.9 at index 1"),
    ([1.0, 0.5], "got 1 after 1 at index 0"),
    ([0.5, -0.1], "got -0.1 after 0.5 at index 1"),
    ([0.5, math.nan], "at index 1"),
    ([[0.5, 0.1]], "one axis"),
]


@pytest.mark.parametrize(("table", "message"), TABLES)
def test_a_table_that_does_not_fall_is_rejected(table, message):
    with pytest.raises(ValueError, match=message):
        VPSDE.from_alphas_cumprod(table)
