"""Interpolants x_t = alpha x_0 + sigma n: kernels to 40 digits, singular ends, checks."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import mpmath as mp
import pytest
import torch

from cldsde import VPSDE, CosineVP, LinearSDE, RectifiedFlow
from cldsde.linear.log_snr import times_of_log_snr
from cldsde.linear.signal_noise import SignalNoiseDynamics
from tolerances import KERNEL, rounding

DIGITS = 40

TABLE = [float(x) for x in torch.cumprod(1 - torch.linspace(1e-3, 0.3, 12).double(), 0)]
ENDING = [0.99, 0.8, 0.3, 0.0]


def angle_of(table: list[float]) -> Callable[[Any], Any]:
    """The angle of a table, linear between its times."""

    def angle(t):
        n = len(table)
        knots = [mp.mpf(0)] + [mp.atan2(mp.sqrt(1 - mp.mpf(a)), mp.sqrt(mp.mpf(a))) for a in table]
        i = min(int(mp.floor(t * n)), n - 1)
        return knots[i] + (knots[i + 1] - knots[i]) * (t * n - i)

    return angle


class Exact:
    """alpha and sigma in mpmath, and what follows from them by the plain formulas."""

    def __init__(self, signal: Callable[[Any], Any], noise: Callable[[Any], Any]) -> None:
        self.signal, self.noise = signal, noise

    def transition(self, s: float, t: float) -> tuple[float, float]:
        with mp.workdps(DIGITS + 20):
            s, t = mp.mpf(s), mp.mpf(t)
            psi = self.signal(t) / self.signal(s)
            return float(psi), float(mp.sqrt(self.noise(t) ** 2 - (psi * self.noise(s)) ** 2))

    def posterior(self, s: float, t: float, level: float) -> tuple[float, float, float]:
        """Phi, the weight of x_0 and the deviation (math: Song et al. 2021, equation 7)."""
        with mp.workdps(DIGITS + 20):
            s, t = mp.mpf(s), mp.mpf(t)
            a, b, c, d = self.signal(s), self.signal(t), self.noise(s), self.noise(t)
            # e^{-H}, H = kappa(s) - kappa(t), which is 0 if nothing is left at t.
            kept = (b / a * c / d) ** (mp.mpf(level) ** 2)
            phi = c / d * kept
            return float(phi), float(a - phi * b), float(c * mp.sqrt(1 - kept**2))

    def slopes(self, t: Any) -> tuple[Any, Any]:
        """F and G^2."""
        rate = mp.diff(lambda u: mp.log(self.signal(u)), t)
        return rate, mp.diff(lambda u: self.noise(u) ** 2, t) - 2 * rate * self.noise(t) ** 2

    def log_snr(self, t: float) -> float:
        with mp.workdps(DIGITS):
            return float(mp.log(self.signal(mp.mpf(t)) / self.noise(mp.mpf(t))))


def vp_signal(t: torch.Tensor) -> torch.Tensor:
    return torch.exp(-2 * t**2 - t)


def vp_noise(t: torch.Tensor) -> torch.Tensor:
    return torch.sqrt(-torch.expm1(-4 * t**2 - 2 * t))


def falling_signal(t: torch.Tensor) -> torch.Tensor:
    return (1 - t) ** 2


def root_noise(t: torch.Tensor) -> torch.Tensor:
    return torch.sqrt(0.04 + 2 * t)


CASES: dict[str, tuple[LinearSDE, Exact]] = {
    "rectified flow": (RectifiedFlow(), Exact(lambda t: 1 - t, lambda t: t)),
    "cosine": (
        CosineVP(),
        Exact(lambda t: mp.sin(mp.pi * (1 - t) / 2), lambda t: mp.sin(mp.pi * t / 2)),
    ),
    "linear functions": (
        LinearSDE.from_signal_noise(lambda t: 1 - t, lambda t: 1 * t),
        Exact(lambda t: 1 - t, lambda t: t),
    ),
    "VP functions": (
        LinearSDE.from_signal_noise(vp_signal, vp_noise),
        Exact(lambda t: mp.exp(-2 * t**2 - t), lambda t: mp.sqrt(1 - mp.exp(-4 * t**2 - 2 * t))),
    ),
    "uncertain start": (
        LinearSDE.from_signal_noise(falling_signal, root_noise),
        Exact(lambda t: (1 - t) ** 2, lambda t: mp.sqrt(mp.mpf(0.04) + 2 * t)),
    ),
    "table": (
        VPSDE.from_alphas_cumprod(TABLE),
        Exact(lambda t: mp.cos(angle_of(TABLE)(t)), lambda t: mp.sin(angle_of(TABLE)(t))),
    ),
    "table to zero": (
        VPSDE.from_alphas_cumprod(ENDING),
        Exact(
            # Not cos, of which 40 digits leave 1e-41 at the end in place of 0.
            lambda t: mp.sin(mp.pi / 2 - angle_of(ENDING)(t)) if t < 1 else mp.mpf(0),
            lambda t: mp.sin(angle_of(ENDING)(t)),
        ),
    ),
}
every_case = pytest.mark.parametrize("name", list(CASES))
SINGULAR = ["rectified flow", "cosine", "linear functions", "uncertain start", "table to zero"]

GAPS = [1e-8, 1e-6, 1e-4, 1e-2, 0.1, 0.5, 1.0]
PAIRS = [(s, s + gap) for s in (0.0, 1e-8, 1e-4, 0.25, 0.3, 0.9) for gap in GAPS if s + gap <= 1]
# Up to the end, and across a knot of the tables, which is no rounded number.
PAIRS += [(1 - gap, 1.0) for gap in GAPS[:-1]] + [(0.25 - 1e-9, 0.25 + 1e-9)]


def tensor(value: Any) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def assert_close(found, expected, where=PAIRS):
    """Within the promise for kernels, relative; zero only if zero is expected."""
    wanted = tensor(expected)
    wrong = (found.flatten() - wanted).abs() > KERNEL * wanted.abs()
    assert not wrong.any(), [
        (where[i], float(found.flatten()[i]), expected[i]) for i in wrong.nonzero().flatten()
    ]


@every_case
def test_kernels_agree_with_the_reference(name):
    sde, exact = CASES[name]
    kernel = sde.transition(*tensor(PAIRS).unbind(-1))
    expected = [exact.transition(*pair) for pair in PAIRS]
    assert_close(kernel.mean, [mean for mean, _ in expected])
    assert_close(kernel.root, [root for _, root in expected])
    times = [1e-8, 1e-3, 0.2, 0.7, 1 - 1e-8, 1.0]
    marginal, found = sde.marginal(tensor(times)), sde.log_snr(tensor(times[:-1]))
    with mp.workdps(DIGITS):
        assert_close(marginal.mean, [float(exact.signal(mp.mpf(t))) for t in times], times)
        assert_close(marginal.root, [float(exact.noise(mp.mpf(t))) for t in times], times)
    # Data with a spread of their own.
    steps = [exact.transition(0.0, t) for t in times]
    spread = sde.marginal(tensor(times), [[0.3]])
    assert_close(spread.root, [math.hypot(root, 0.3**0.5 * psi) for psi, root in steps], times)
    # A logarithm has the relative error of its argument as an absolute one.
    assert (found - tensor([exact.log_snr(t) for t in times[:-1]])).abs().max() <= KERNEL


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0, 2.0])
@every_case
def test_the_posterior_family_agrees_with_the_reference(name, level):
    sde, exact = CASES[name]
    pairs = [(s, t) for s, t in PAIRS if s > 0]
    found = sde.posterior(*tensor(pairs).unbind(-1), stochasticity=level)
    states, weights, roots = zip(*(exact.posterior(*pair, level) for pair in pairs), strict=True)
    assert_close(found.state, list(states), pairs)
    assert_close(found.root, list(roots), pairs)
    # The weight of x_0 is a difference of numbers of the size of alpha, for every process.
    assert (found.initial.flatten() - tensor(weights)).abs().max() <= KERNEL


@every_case
def test_drift_and_diffusion_are_those_of_the_kernels(name):
    """F = (log alpha)' and G^2 = (sigma^2)' - 2 F sigma^2, by mpmath's derivatives."""
    sde, exact = CASES[name]
    times = [0.05, 0.31, 0.77, 0.999]
    with mp.workdps(DIGITS):
        rates, squares = zip(*(exact.slopes(mp.mpf(t)) for t in times), strict=True)
        noise = [float(mp.sqrt(x)) for x in squares]
        # Of data with a spread of their own.
        start, spread = exact.noise(mp.mpf(0)) ** 2, mp.mpf(0.3)

        def deviation(t):
            return mp.sqrt(exact.signal(t) ** 2 * (spread - start) + exact.noise(t) ** 2)

        slopes = [float(mp.diff(deviation, mp.mpf(t))) for t in times]
    assert_close(sde.dynamics.rates(tensor(times), tensor(0.3))[1], slopes, times)
    assert_close(sde.drift(tensor(times)), [float(x) for x in rates], times)
    assert_close(sde.diffusion(tensor(times)), noise, times)


@pytest.mark.parametrize("name", ["rectified flow", "cosine", "VP functions"])
def test_accumulated_noise_is_the_integral(name):
    sde, exact = CASES[name]
    pairs = [(0.0, 0.3), (0.2, 0.2 + 1e-8), (0.1, 0.999), (0.5, 1 - 1e-6)]
    expected = []
    with mp.workdps(DIGITS):
        for s, t in pairs:
            cuts = [s, *(1 - (1 - s) / 10**k for k in range(1, 6) if 1 - (1 - s) / 10**k < t), t]
            cuts = [*map(mp.mpf, cuts)] if t - s > 1e-3 else [mp.mpf(s), mp.mpf(t)]
            expected.append(float(mp.quad(lambda u: exact.slopes(u)[1], cuts)))
    assert_close(sde.accumulated_noise(*tensor(pairs).unbind(-1)), expected, pairs)


def test_functions_that_oscillate_have_exact_kernels_over_long_steps():
    omega = 120 * math.pi
    sde = LinearSDE.from_signal_noise(
        torch.ones_like, lambda t: t + 0.9 * torch.sin(omega * t) / omega
    )
    exact = Exact(lambda t: mp.mpf(1), lambda t: t + mp.mpf(0.9) * mp.sin(omega * t) / omega)
    pairs = [(0.5, 0.64), (0.5, 0.56), (0.5, 0.501)]
    found = sde.transition(*tensor(pairs).unbind(-1)).root
    assert_close(found, [exact.transition(*pair)[1] for pair in pairs], pairs)


def test_a_table_is_met_at_its_steps_and_preserves_the_variance():
    sde = VPSDE.from_alphas_cumprod(TABLE)
    times = torch.arange(1, 13, dtype=torch.float64) / 12
    assert_close(sde.marginal(times).mean.square(), TABLE, times.tolist())
    between = sde.transition(times[2], times[9]).mean.square()
    assert_close(between, [TABLE[9] / TABLE[2]], [0])
    for entries in (7, 1000):
        table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, entries, dtype=torch.float64), 0)
        sde = VPSDE.from_alphas_cumprod(table)
        assert float(sde.prior.covariance) == 1.0
        assert torch.equal(sde.stationary_covariance, torch.eye(1, dtype=torch.float64))


@every_case
def test_no_step_does_nothing(name):
    times = tensor([0.0, 0.3, 1.0])
    kernel = CASES[name][0].transition(times, times)
    assert torch.equal(kernel.mean, torch.ones(3, 1, 1, dtype=torch.float64))
    assert not kernel.root.any()


@pytest.mark.parametrize("name", SINGULAR)
def test_a_signal_that_vanishes_has_a_latest_regular_time(name):
    sde, _ = CASES[name]
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


@pytest.mark.parametrize(
    "signal",
    [
        lambda t: torch.cos(math.pi / 2 * t),
        lambda t: torch.cos(math.pi / 2 * t) ** 2,
        lambda t: torch.cos(math.pi / 2 * t) - 2e-16 * t,
    ],
)
def test_a_signal_that_vanishes_but_for_rounding_vanishes(signal):
    sde = LinearSDE.from_signal_noise(signal, lambda t: 1 * t)
    assert sde.regular_until < 1
    assert float(sde.transition(0.3, 1.0).mean) == 0.0
    assert float(sde.log_snr(1.0)) == -math.inf


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


def test_a_process_has_what_others_have():
    for name in ("rectified flow", "cosine", "table to zero"):
        assert float(CASES[name][0].prior.covariance) == 1.0
    assert torch.equal(CosineVP().stationary_covariance, torch.eye(1, dtype=torch.float64))
    assert CosineVP().stationary_reversal is not None
    assert RectifiedFlow().stationary_covariance is None
    # A square root, squared.
    initial = float(CASES["uncertain start"][0].initial_covariance)
    assert initial == pytest.approx(0.04, rel=rounding(2))
    levels = tensor([-9.0, -3.0, 0.0, 2.0, 8.0])
    # t = 1 / (1 + e^kappa); rounding of log t, and of t near 1.
    found = times_of_log_snr(RectifiedFlow(), levels)
    assert (found - torch.sigmoid(-levels)).abs().max() <= rounding(4)
    assert repr(RectifiedFlow()) == "RectifiedFlow()"
    assert "signal=<function vp_signal>" in repr(CASES["VP functions"][0])
    for name in ("rectified flow", "cosine", "table", "VP functions"):
        sde, _ = CASES[name]
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


@pytest.mark.parametrize(
    ("signal", "noise", "message"),
    [
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
    ],
)
def test_functions_that_are_no_interpolants_are_rejected(signal, noise, message):
    with pytest.raises(ValueError, match=message):
        LinearSDE.from_signal_noise(signal, noise)


def test_numbers_are_rejected_as_functions():
    with pytest.raises(TypeError, match=r"signal must be a function of times; got 0\.5"):
        LinearSDE.from_signal_noise(0.5, torch.sqrt)  # type: ignore[arg-type]


def test_an_exact_gain_serves_functions_that_are_not_smooth():
    def noise(t):
        return torch.where(t < 0.31, t, 2 * t - 0.31)

    dynamics = SignalNoiseDynamics(torch.ones_like, noise, gain=lambda s, t: noise(t) - noise(s))
    found = float(LinearSDE(dynamics).transition(0.0, 0.5).root)
    assert found == pytest.approx(0.69, rel=rounding())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([0.9, 0.95], "got 0.95 after 0.9 at index 1"),
        ([1.0, 0.5], "got 1 after 1 at index 0"),
        ([0.5, -0.1], "got -0.1 after 0.5 at index 1"),
        ([0.5, math.nan], "at index 1"),
        ([[0.5, 0.1]], "one axis"),
    ],
)
def test_a_table_that_does_not_fall_is_rejected(table, message):
    with pytest.raises(ValueError, match=message):
        VPSDE.from_alphas_cumprod(table)
