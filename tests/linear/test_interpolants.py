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
from hypothesis import given

from cldsde import VPSDE, CosineVP, LinearSDE, RectifiedFlow
from cldsde.linear.log_snr import times_of_log_snr
from cldsde.linear.signal_noise import SignalNoiseDynamics
from strategies import intervals

DIGITS = 40
# Kernels are a few roundings of quantities that do not cancel; quadratures of smooth functions end
# at rounding. Measured: 3e-15.
TOLERANCE = 1e-12

TABLE = [float(x) for x in torch.cumprod(1 - torch.linspace(1e-3, 0.3, 12).double(), 0)]
ENDING = [0.99, 0.8, 0.3, 0.0]


def angle_of(table: list[float]) -> Callable[[Any], Any]:
    """The angle of a table, linear between its times."""

    def angle(t: Any) -> Any:
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


def assert_close(found: torch.Tensor, expected: list[float], where: Any = PAIRS) -> None:
    """Within the tolerance, relative; zero only where zero is expected."""
    wanted = tensor(expected)
    error = (found.flatten() - wanted).abs()
    wrong = error > TOLERANCE * wanted.abs()
    assert not bool(wrong.any()), [
        (where[i], float(found.flatten()[i]), expected[i]) for i in wrong.nonzero().flatten()
    ]


class TestKernels:
    """Against the plain formulas in 60 digits."""

    @every_case
    def test_transition_agrees_with_the_reference(self, name: str) -> None:
        sde, exact = CASES[name]
        kernel = sde.transition(*tensor(PAIRS).unbind(-1))
        laws = [exact.transition(*pair) for pair in PAIRS]
        assert_close(kernel.mean, [mean for mean, _ in laws])
        assert_close(kernel.root, [root for _, root in laws])

    @every_case
    def test_marginal_is_the_interpolant(self, name: str) -> None:
        sde, exact = CASES[name]
        times = [1e-8, 1e-3, 0.2, 0.7, 1 - 1e-8, 1.0]
        law = sde.marginal(tensor(times))
        with mp.workdps(DIGITS):
            assert_close(law.mean, [float(exact.signal(mp.mpf(t))) for t in times], times)
            assert_close(law.root, [float(exact.noise(mp.mpf(t))) for t in times], times)

    @every_case
    @pytest.mark.parametrize("level", [0.0, 0.3, 1.0, 2.0])
    def test_posterior_family_agrees_with_the_reference(self, name: str, level: float) -> None:
        sde, exact = CASES[name]
        pairs = [(s, t) for s, t in PAIRS if s > 0]
        law = sde.posterior(*tensor(pairs).unbind(-1), stochasticity=level)
        expected = [exact.posterior(*pair, level) for pair in pairs]
        assert_close(law.state, [phi for phi, _, _ in expected], pairs)
        assert_close(law.root, [root for _, _, root in expected], pairs)
        # The weight of x_0 is a difference, as that of every process is: of the size of alpha.
        error = law.initial.flatten() - tensor([weight for _, weight, _ in expected])
        assert float(error.abs().max()) <= TOLERANCE

    @every_case
    def test_log_snr_is_the_log_of_the_ratio(self, name: str) -> None:
        sde, exact = CASES[name]
        times = [1e-8, 1e-3, 0.2, 0.7, 1 - 1e-8]
        found = sde.log_snr(tensor(times))
        # A logarithm has the relative error of its argument as an absolute one.
        error = (found - tensor([exact.log_snr(t) for t in times])).abs()
        assert float(error.max()) <= TOLERANCE
        if name in SINGULAR:
            assert float(sde.log_snr(1.0)) == -math.inf

    @every_case
    def test_drift_and_diffusion_are_those_of_the_kernels(self, name: str) -> None:
        """F = (log alpha)' and G^2 = (sigma^2)' - 2 F sigma^2, by mpmath's derivatives."""
        sde, exact = CASES[name]
        times = [0.05, 0.31, 0.77, 0.999]
        drift, noise = [], []
        with mp.workdps(DIGITS):
            for t in map(mp.mpf, times):
                rate = mp.diff(lambda u: mp.log(exact.signal(u)), t)
                drift.append(float(rate))
                squared = mp.diff(lambda u: exact.noise(u) ** 2, t) - 2 * rate * exact.noise(t) ** 2
                noise.append(float(mp.sqrt(squared)))
        assert_close(sde.drift(tensor(times)), drift, times)
        assert_close(sde.diffusion(tensor(times)), noise, times)

    @pytest.mark.parametrize("name", ["rectified flow", "cosine", "VP functions"])
    def test_accumulated_noise_is_the_integral(self, name: str) -> None:
        sde, exact = CASES[name]
        pairs = [(0.0, 0.3), (0.2, 0.2 + 1e-8), (0.1, 0.999), (0.5, 1 - 1e-6)]
        expected = []
        with mp.workdps(DIGITS):

            def squared(u: Any) -> Any:
                rate = mp.diff(lambda x: mp.log(exact.signal(x)), u)
                return mp.diff(lambda x: exact.noise(x) ** 2, u) - 2 * rate * exact.noise(u) ** 2

            for s, t in pairs:
                cuts = [s, *(1 - (1 - s) / 10**k for k in range(1, 6) if 1 - (1 - s) / 10**k < t)]
                cuts = [*map(mp.mpf, cuts), mp.mpf(t)] if t - s > 1e-3 else [mp.mpf(s), mp.mpf(t)]
                expected.append(float(mp.quad(squared, cuts)))
        assert_close(sde.accumulated_noise(*tensor(pairs).unbind(-1)), expected, pairs)

    @given(intervals(points=3))
    @every_case
    def test_transitions_compose(self, name: str, where: Any) -> None:
        s, r, t = where
        sde, _ = CASES[name]
        first, second, whole = sde.transition(s, r), sde.transition(r, t), sde.transition(s, t)
        # Products and sums of positive numbers, each to a few roundings.
        assert abs(float(second.mean @ first.mean - whole.mean)) <= TOLERANCE
        composed = float(second.mean) ** 2 * float(first.covariance) + float(second.covariance)
        assert composed == pytest.approx(float(whole.covariance), rel=TOLERANCE)

    def test_functions_that_oscillate_have_exact_kernels_over_long_steps(self) -> None:
        def noise(t: torch.Tensor) -> torch.Tensor:
            return t + 0.9 * torch.sin(120 * math.pi * t) / (120 * math.pi)

        sde = LinearSDE.from_signal_noise(torch.ones_like, noise)
        starts, ends = tensor([0.5, 0.5, 0.5]), tensor([0.64, 0.56, 0.501])
        with mp.workdps(DIGITS):
            levels = [
                [
                    t + mp.mpf(0.9) * mp.sin(120 * mp.mpf(math.pi) * t) / (120 * mp.mpf(math.pi))
                    for t in map(mp.mpf, times.tolist())
                ]
                for times in (starts, ends)
            ]
            expected = [float(mp.sqrt(b**2 - a**2)) for a, b in zip(*levels, strict=True)]
        assert_close(sde.transition(starts, ends).root, expected, [0, 1, 2])

    def test_a_table_is_met_at_its_steps(self) -> None:
        sde = VPSDE.from_alphas_cumprod(TABLE)
        times = torch.arange(1, 13, dtype=torch.float64) / 12
        assert_close(sde.marginal(times).mean.square(), TABLE, times.tolist())
        between = sde.transition(times[2], times[9]).mean.square()
        assert_close(between, [TABLE[9] / TABLE[2]], [0])

    def test_no_step_does_nothing(self) -> None:
        for sde, _ in CASES.values():
            kernel = sde.transition(tensor([0.0, 0.3, 1.0]), tensor([0.0, 0.3, 1.0]))
            assert torch.equal(kernel.mean, torch.ones(3, 1, 1, dtype=torch.float64))
            assert not bool(kernel.root.any())


class TestProcess:
    """What else a process has."""

    @pytest.mark.parametrize("name", ["rectified flow", "cosine", "table to zero"])
    def test_the_prior_is_standard_normal_and_tells_nothing_of_the_data(self, name: str) -> None:
        sde, _ = CASES[name]
        assert float(sde.prior.covariance) == 1.0
        assert float(sde.transition(0.5, 1.0).mean) == 0.0

    def test_a_variance_preserving_path_has_a_stationary_law(self) -> None:
        assert torch.equal(CosineVP().stationary_covariance, torch.eye(1, dtype=torch.float64))
        assert CosineVP().stationary_reversal is not None
        assert RectifiedFlow().stationary_covariance is None

    @pytest.mark.parametrize("entries", [7, 20, 1000])
    def test_every_table_preserves_the_variance(self, entries: int) -> None:
        table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, entries, dtype=torch.float64), 0)
        sde = VPSDE.from_alphas_cumprod(table)
        assert float(sde.prior.covariance) == 1.0
        assert torch.equal(sde.stationary_covariance, torch.eye(1, dtype=torch.float64))

    def test_noise_at_the_start_is_the_initial_covariance(self) -> None:
        sde, _ = CASES["uncertain start"]
        # A square root, squared.
        assert float(sde.initial_covariance) == pytest.approx(0.04, rel=4e-16)

    @pytest.mark.parametrize("name", SINGULAR)
    def test_the_latest_regular_time_has_a_log_snr_of_minus_five(self, name: str) -> None:
        sde, _ = CASES[name]
        assert sde.regular_until < 1
        # Bisected to a thousandth of 1 - t and rounded to another.
        assert float(sde.log_snr(sde.regular_until)) == pytest.approx(-5, abs=5e-3)
        assert sde.drift(sde.regular_until).isfinite().all()

    @pytest.mark.parametrize(
        "signal",
        [
            lambda t: torch.cos(math.pi / 2 * t),
            lambda t: torch.cos(math.pi / 2 * t) ** 2,
            lambda t: torch.cos(math.pi / 2 * t) - 2e-16 * t,
        ],
    )
    def test_a_signal_that_vanishes_but_for_rounding_vanishes(self, signal: Any) -> None:
        sde = LinearSDE.from_signal_noise(signal, lambda t: 1 * t)
        assert sde.regular_until < 1
        assert float(sde.transition(0.3, 1.0).mean) == 0.0
        assert float(sde.log_snr(1.0)) == -math.inf
        with pytest.raises(ValueError, match="diverges at t = 1"):
            sde.drift(1.0)

    def test_where_the_drift_diverges_at_the_start_the_message_says_so(self) -> None:
        sde = LinearSDE.from_signal_noise(lambda t: 1 - torch.sqrt(t) / 2, lambda t: 1 * t)
        with pytest.raises(ValueError, match=r"the drift .* diverges at t = 0; take t > 0$"):
            sde.drift(0.0)

    def test_a_signal_that_almost_vanishes_is_not_regular_at_the_end(self) -> None:
        sde = LinearSDE.from_signal_noise(lambda t: 1 - t * (1 - 1e-12), lambda t: 1 * t)
        assert sde.regular_until == pytest.approx(RectifiedFlow().regular_until, rel=1e-9)
        # It is what 1 - 1e-12 leaves of 1, to its rounding.
        assert float(sde.transition(0.5, 1.0).mean) == pytest.approx(2e-12, rel=1e-3)

    def test_a_signal_that_falls_steadily_is_regular_to_the_end(self) -> None:
        sde = LinearSDE.from_signal_noise(lambda t: torch.exp(-20 * t), lambda t: t.sqrt())
        assert sde.regular_until == 1.0

    def test_times_of_log_snr_invert_it(self) -> None:
        levels = tensor([-9.0, -3.0, 0.0, 2.0, 8.0])
        found = times_of_log_snr(RectifiedFlow(), levels)
        # t = 1 / (1 + e^kappa); rounding of log t, and of t near 1.
        assert float((found - torch.sigmoid(-levels)).abs().max()) <= 1e-15

    @pytest.mark.parametrize("name", ["drift", "diffusion"])
    def test_what_diverges_says_until_when_it_is_finite(self, name: str) -> None:
        with pytest.raises(
            ValueError, match=rf"{name} of this process diverges at t = 1; take t ≤"
        ):
            getattr(RectifiedFlow(), name)(1.0)
        with pytest.raises(ValueError, match="diffusion of this process diverges at t = 1"):
            RectifiedFlow().accumulated_noise(0.5, 1.0)

    def test_copies_and_pickles_are_alike(self) -> None:
        table = VPSDE.from_alphas_cumprod(TABLE)
        for sde in (RectifiedFlow(), CosineVP(), table, CASES["VP functions"][0]):
            for other in (copy.deepcopy(sde), pickle.loads(pickle.dumps(sde))):
                assert torch.equal(other.transition(0.2, 0.7).root, sde.transition(0.2, 0.7).root)

    def test_it_is_shown_by_its_constructor(self) -> None:
        assert repr(RectifiedFlow()) == "RectifiedFlow()"
        assert "signal=<function vp_signal>" in repr(CASES["VP functions"][0])


class TestGradients:
    """Parameters of alpha and sigma that are learnt."""

    def test_kernels_are_differentiable_in_what_functions_have_learnt(self) -> None:
        def root(rate: torch.Tensor) -> torch.Tensor:
            sde = LinearSDE.from_signal_noise(lambda t: (1 - t) ** rate, lambda t: t**rate)
            # One by quadrature, one by differences.
            s, t = tensor([0.30, 0.30]), tensor([0.31, 1.0])
            return torch.cat([sde.transition(s, t).root.flatten(), sde.diffusion(s).flatten()])

        assert torch.autograd.gradcheck(root, tensor(1.3).requires_grad_())

    def test_kernels_are_differentiable_in_a_table(self) -> None:
        def root(table: torch.Tensor) -> torch.Tensor:
            sde = VPSDE.from_alphas_cumprod(table)
            return sde.transition(tensor([0.0, 0.2, 0.4]), tensor([0.3, 0.9, 0.9])).root

        assert torch.autograd.gradcheck(root, tensor([0.9, 0.5, 0.2, 0.01]).requires_grad_())


class Cubed(torch.autograd.Function):
    """A function without a derivative of its own."""

    @staticmethod
    def forward(ctx: Any, t: torch.Tensor) -> torch.Tensor:
        return t**3


class TestRejections:
    """Functions that are no interpolants."""

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
    def test_what_is_no_interpolant_is_rejected(
        self, signal: Any, noise: Any, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            LinearSDE.from_signal_noise(signal, noise)

    def test_what_is_no_function_is_rejected(self) -> None:
        with pytest.raises(TypeError, match=r"signal must be a function of times; got 0\.5"):
            LinearSDE.from_signal_noise(0.5, torch.sqrt)  # type: ignore[arg-type]

    def test_an_exact_gain_serves_functions_that_are_not_smooth(self) -> None:
        def noise(t: torch.Tensor) -> torch.Tensor:
            return torch.where(t < 0.31, t, 2 * t - 0.31)

        dynamics = SignalNoiseDynamics(
            torch.ones_like, noise, gain=lambda s, t: noise(t) - noise(s)
        )
        assert float(LinearSDE(dynamics).transition(0.0, 0.5).root) == pytest.approx(0.69)

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
    def test_a_table_that_does_not_fall_is_rejected(self, table: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            VPSDE.from_alphas_cumprod(table)
