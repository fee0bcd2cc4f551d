"""Time grids: formulas, exact ends, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, SubVPSDE, solvers
from cldsde.solvers import karras_times, log_snr_times, logistic_times
from strategies import log_uniform

EPS = torch.finfo(torch.float64).eps


def uniform(T: float, eps: float, x: float) -> float:
    return T + x * (eps - T)


def quadratic(T: float, eps: float, x: float) -> float:
    return eps + (T - eps) * (1 - x) ** 2


def root(T: float, eps: float, x: float) -> float:
    return (math.sqrt(T) + x * (math.sqrt(eps) - math.sqrt(T))) ** 2


GRIDS: dict[str, tuple[Any, Any]] = {
    "uniform": (solvers.uniform_times, uniform),
    "quadratic": (solvers.quadratic_times, quadratic),
    "root": (solvers.root_times, root),
}
every_grid = pytest.mark.parametrize("name", list(GRIDS))


@every_grid
@given(st.integers(1, 500), log_uniform(1e-6, 0.5), log_uniform(0.6, 2.0))
def test_grids_fall_from_end_to_end(name: str, n: int, eps: float, T: float) -> None:
    times = GRIDS[name][0](T, eps, n)
    assert times.shape == (n + 1,)
    assert times.dtype == torch.float64
    assert times.device.type == "cpu"
    assert times[0].item() == T
    assert times[-1].item() == eps
    assert (times.diff() < 0).all()


@every_grid
@pytest.mark.parametrize("n", [1, 2, 7, 100])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.3])
def test_grids_are_the_formulas(name: str, n: int, eps: float) -> None:
    make, formula = GRIDS[name]
    expected = torch.tensor([formula(1.0, eps, i / n) for i in range(n + 1)], dtype=torch.float64)
    # Half a dozen roundings of numbers up to 1.
    assert torch.allclose(make(1.0, eps, n), expected, rtol=0, atol=8 * EPS)


@every_grid
def test_one_step_has_two_ends(name: str) -> None:
    assert GRIDS[name][0](1.0, 0.25, 1).tolist() == [1.0, 0.25]


@every_grid
def test_a_grid_may_end_at_zero(name: str) -> None:
    times = GRIDS[name][0](1.0, 0.0, 10)
    assert times[-1].item() == 0.0
    assert (times.diff() < 0).all()


def test_the_last_steps_are_those_that_the_names_promise() -> None:
    n, eps = 50, 1e-3
    last = {name: float(-make(1.0, eps, n).diff()[-1]) for name, (make, _) in GRIDS.items()}
    assert last["uniform"] == pytest.approx((1 - eps) / n, rel=1e-12)
    assert last["quadratic"] == pytest.approx((1 - eps) / n**2, rel=1e-12)
    # (sqrt(eps) + d)^2 - eps with d = (1 - sqrt(eps)) / n.
    d = (1 - math.sqrt(eps)) / n
    assert last["root"] == pytest.approx(2 * math.sqrt(eps) * d + d**2, rel=1e-12)


@every_grid
@pytest.mark.parametrize("n", [0, -1, -100])
def test_less_than_one_step_is_refused(name: str, n: int) -> None:
    with pytest.raises(ValueError, match=f"n must be at least 1 step; got {n}"):
        GRIDS[name][0](1.0, 1e-3, n)


@every_grid
@pytest.mark.parametrize("n", [2.0, 2.5, "2", None, True])
def test_a_number_of_steps_that_is_no_integer_is_refused(name: str, n: Any) -> None:
    with pytest.raises(TypeError, match="n must be an integer number of steps; got"):
        GRIDS[name][0](1.0, 1e-3, n)


@every_grid
def test_an_integer_of_numpy_is_an_integer(name: str) -> None:
    make = GRIDS[name][0]
    assert torch.equal(make(1.0, 1e-3, np.int64(5)), make(1.0, 1e-3, 5))


@every_grid
@pytest.mark.parametrize("eps", [1.0, 1.5, -1e-9, math.nan, math.inf, -math.inf])
def test_ends_outside_the_interval_are_refused(name: str, eps: float) -> None:
    with pytest.raises(ValueError, match=r"eps must lie in \[0, T\) with T = 1; got"):
        GRIDS[name][0](1.0, eps, 10)


@every_grid
@pytest.mark.parametrize("T", [0.0, -1.0, math.nan, math.inf])
def test_a_start_that_is_not_positive_and_finite_is_refused(name: str, T: float) -> None:
    with pytest.raises(ValueError, match="T"):
        GRIDS[name][0](T, 1e-3, 10)


@every_grid
def test_steps_below_the_resolution_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="resolution"):
        GRIDS[name][0](1.0, 1 - 4 * EPS, 1000)


@every_grid
def test_a_process_may_come_first(name: str) -> None:
    make = GRIDS[name][0]
    expected = make(1.0, 1e-3, 7)
    assert torch.equal(make(CLD(), 1.0, 1e-3, 7), expected)
    assert torch.equal(make(CLD(), 1.0, eps=1e-3, n=7), expected)


FAMILIES: dict[str, Any] = {
    "VP": VPSDE,
    "VE": lambda: VESDE(0.05, 20.0),
    "CLD": CLD,
    "PSLD": PSLD,
    "HOLD": HOLD,
}


def float64(numbers: list[float]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


every_family = pytest.mark.parametrize("family", list(FAMILIES))
SNR_GRIDS: dict[str, Any] = {
    "log_snr": log_snr_times,
    "karras": karras_times,
    "logistic": logistic_times,
}
every_snr_grid = pytest.mark.parametrize("name", list(SNR_GRIDS))


class TestSignalToNoiseGrids:
    """Grids in the signal-to-noise ratio: uniform in what they say, exact ends, refusals."""

    @pytest.mark.parametrize(("n", "eps"), [(1, 1e-3), (2, 1e-5), (10, 1e-3), (137, 1e-4)])
    @every_family
    def test_log_snr_grids_are_uniform_in_kappa(self, family: str, n: int, eps: float) -> None:
        sde = FAMILIES[family]()
        times = log_snr_times(sde, 1.0, eps, n)
        kappa = sde.log_snr(times)
        first, last = sde.log_snr(torch.tensor([1.0, eps], dtype=torch.float64))
        expected = torch.linspace(float(first), float(last), n + 1, dtype=torch.float64)
        # A time is rounded relative to itself, and t kappa' < 20: far below 1e-12 of the range.
        assert float((kappa - expected).abs().max()) <= 1e-12 * float(last - first)

    @pytest.mark.parametrize(("n", "eps"), [(1, 1e-3), (2, 1e-5), (10, 1e-3), (137, 1e-4)])
    @pytest.mark.parametrize("rho", [1.0, 7.0])
    @every_family
    def test_karras_grids_are_uniform_in_a_root_of_the_noise(
        self, family: str, rho: float, n: int, eps: float
    ) -> None:
        sde = FAMILIES[family]()
        times = karras_times(sde, 1.0, eps, n, rho)
        root = (-sde.log_snr(times) / rho).exp()
        expected = torch.linspace(float(root[0]), float(root[-1]), n + 1, dtype=torch.float64)
        # As above; the root's logarithm is kappa over rho, so that its relative error is less.
        assert torch.allclose(root, expected, rtol=1e-12, atol=0)

    @pytest.mark.parametrize(("n", "eps"), [(1, 1e-3), (2, 1e-5), (10, 1e-3), (137, 1e-4)])
    @pytest.mark.parametrize(("center", "rate"), [(0.7, 0.75), (-1.0, 0.3), (2.0, 1.0)])
    @every_family
    def test_logistic_grids_are_uniform_in_a_logistic_function(
        self, family: str, center: float, rate: float, n: int, eps: float
    ) -> None:
        sde = FAMILIES[family]()
        times = logistic_times(sde, 1.0, eps, n, center, rate)
        share = 1 / (1 + (rate * (sde.log_snr(times) - center)).exp())
        expected = torch.linspace(float(share[0]), float(share[-1]), n + 1, dtype=torch.float64)
        # As above; a logistic function is no steeper than a quarter of its argument.
        assert torch.allclose(share, expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("n", [1, 2, 9, 100])
    @every_snr_grid
    @every_family
    def test_they_fall_from_end_to_end(self, family: str, name: str, n: int) -> None:
        times = SNR_GRIDS[name](FAMILIES[family](), 0.9, 1e-4, n)
        assert times.shape == (n + 1,)
        assert times.dtype == torch.float64
        assert times.device.type == "cpu"
        assert times[0].item() == 0.9
        assert times[-1].item() == 1e-4
        assert (times.diff() < 0).all()

    def test_for_vp_kappa_is_inverted_by_the_formula_of_dpm_solver(self) -> None:
        b0, b1, eps, n = 0.1, 20.0, 1e-4, 25

        def kappa(t: float) -> float:
            return -0.5 * math.log(math.expm1(b0 * t + 0.5 * (b1 - b0) * t**2))

        def inverse(k: float) -> float:
            integral = math.log1p(math.exp(-2 * k))
            return 2 * integral / (b0 + math.sqrt(b0**2 + 2 * (b1 - b0) * integral))

        first, last = kappa(1.0), kappa(eps)
        expected = [inverse(first + i / n * (last - first)) for i in range(n + 1)]
        times = log_snr_times(VPSDE(b0, b1), 1.0, eps, n)
        # kappa is of size 5 and the kernels are right to 1e-12; d log t / d kappa <= 2.
        assert torch.allclose(times, float64(expected), rtol=1e-11, atol=0)

    @pytest.mark.parametrize("rho", [0.5, 1.0, 3.0, 7.0])
    def test_for_ve_karras_times_have_a_closed_form(self, rho: float) -> None:
        low, high, eps, n = 0.05, 20.0, 1e-2, 18
        ratio = math.log(high / low)
        last = low * math.exp(eps * ratio)
        expected = []
        for i in range(n + 1):
            root = high ** (1 / rho) + i / n * (last ** (1 / rho) - high ** (1 / rho))
            expected.append(math.log(root**rho / low) / ratio)
        times = karras_times(VESDE(low, high), 1.0, eps, n, rho)
        # log sigma is right to 1e-12 and more, and divided by a ratio of 6.
        assert torch.allclose(times, float64(expected), rtol=0, atol=1e-12)

    def test_seven_is_the_rho_of_karras(self) -> None:
        sde = VESDE(0.05, 20.0)
        assert torch.equal(karras_times(sde, 1.0, 1e-3, 8), karras_times(sde, 1.0, 1e-3, 8, 7.0))

    @every_snr_grid
    @pytest.mark.parametrize(
        "arguments", [(1.0, 1e-3, 10), (1.0, 1e-3, 10, 7.0), ("CLD", 1.0, 0, 1)]
    )
    def test_without_a_process_they_say_how_they_are_called(
        self, name: str, arguments: tuple[Any, ...]
    ) -> None:
        message = rf"{name}_times needs the process first, {name}_times\(sde, T, eps, n\); got"
        with pytest.raises(TypeError, match=message):
            SNR_GRIDS[name](*arguments)

    @every_snr_grid
    @every_family
    def test_an_end_at_zero_is_refused(self, family: str, name: str) -> None:
        with pytest.raises(ValueError, match="eps must be above 0"):
            SNR_GRIDS[name](FAMILIES[family](), 1.0, 0.0, 10)

    @every_snr_grid
    @pytest.mark.parametrize("eps", [1.0, 1.5, -1e-9, math.nan, math.inf, -math.inf])
    def test_ends_outside_the_interval_are_refused(self, name: str, eps: float) -> None:
        with pytest.raises(ValueError, match=r"eps must lie in \[0, T\) with T = 1; got"):
            SNR_GRIDS[name](CLD(), 1.0, eps, 10)

    @every_snr_grid
    @pytest.mark.parametrize("T", [0.0, -1.0, math.nan, math.inf, 1.5])
    def test_starts_outside_the_process_are_refused(self, name: str, T: float) -> None:
        with pytest.raises(ValueError, match=r"T must|t must lie"):
            SNR_GRIDS[name](CLD(), T, 1e-3, 10)

    @every_snr_grid
    @pytest.mark.parametrize("n", [0, -1])
    def test_less_than_one_step_is_refused(self, name: str, n: int) -> None:
        with pytest.raises(ValueError, match=f"n must be at least 1 step; got {n}"):
            SNR_GRIDS[name](CLD(), 1.0, 1e-3, n)

    @every_snr_grid
    @pytest.mark.parametrize("n", [2.0, "2", None, True])
    def test_a_number_of_steps_that_is_no_integer_is_refused(self, name: str, n: Any) -> None:
        with pytest.raises(TypeError, match="n must be an integer number of steps; got"):
            SNR_GRIDS[name](CLD(), 1.0, 1e-3, n)

    def test_a_logistic_grid_does_not_depend_on_the_schedule(self) -> None:
        # Two betas of the same clock at 1: the same levels, each at its own time.
        constant, linear = CLD(beta=4.0), CLD(beta=(1.0, 7.0))
        eps = 1e-2
        first = logistic_times(constant, 1.0, eps, 20)
        other = (-1 + math.sqrt(1 + 48 * eps)) / 6  # t + 3 t^2 = 4 eps
        second = logistic_times(linear, 1.0, other, 20)
        assert torch.allclose(second + 3 * second.square(), 4 * first, rtol=1e-11, atol=0)

    @pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
    def test_a_rate_that_is_not_positive_is_refused(self, rate: float) -> None:
        with pytest.raises(ValueError, match="rate must be finite and positive"):
            logistic_times(CLD(), 1.0, 1e-3, 10, rate=rate)

    @pytest.mark.parametrize("rho", [0.0, -7.0, math.nan, math.inf])
    def test_a_rho_that_is_not_positive_is_refused(self, rho: float) -> None:
        with pytest.raises(ValueError, match="rho must be finite and positive"):
            karras_times(CLD(), 1.0, 1e-3, 10, rho)

    def test_a_rho_that_is_no_number_is_refused(self) -> None:
        with pytest.raises(TypeError, match="rho must be a real number"):
            karras_times(CLD(), 1.0, 1e-3, 10, "7")  # type: ignore[arg-type]


class TestLogSnr:
    """`LinearSDE.log_snr`."""

    @pytest.mark.parametrize("make", [VPSDE, SubVPSDE, VESDE])
    def test_for_one_component_it_is_log_alpha_over_sigma(self, make: Any) -> None:
        sde, t = make(), torch.logspace(-6, 0, 25, dtype=torch.float64)
        law = sde.marginal(t)
        expected = (law.mean / law.root).log()[:, 0, 0]
        # A square, its root and two logarithms of numbers up to 1e6.
        assert torch.allclose(sde.log_snr(t), expected, rtol=0, atol=32 * EPS * 14)

    @pytest.mark.parametrize("friction", [0.5, 1.0, 2.0])
    def test_for_cld_it_has_fifty_digit_values(self, friction: float) -> None:
        beta, mass, scale = 4.0, 0.25, 0.04
        t = torch.logspace(-6, 0, 7, dtype=torch.float64)
        found = CLD(beta, mass, friction, scale).log_snr(t)
        expected = []
        with mp.workdps(50):
            # exp [[A, Q], [0, -A^T]] B = [[psi, X], [0, psi^-T]], and the noise is X psi^T.
            block = mp.matrix(4)
            block[0, 1] = 1 / mp.mpf(mass)
            block[1, 0], block[1, 1] = mp.mpf(-1), -mp.mpf(friction) / mass
            block[1, 3] = 2 * mp.mpf(friction)
            block[2, 3], block[3, 2] = mp.mpf(1), -1 / mp.mpf(mass)
            block[3, 3] = mp.mpf(friction) / mass
            for time in t.tolist():
                flow = mp.expm(block * (beta * mp.mpf(time)))
                psi, start = flow[:2, :2], mp.matrix([[0, 0], [0, mp.mpf(scale) * mass]])
                sigma = flow[:2, 2:] * psi.T + psi * start * psi.T
                signal = psi[:, 0]
                information = (signal.T * mp.inverse(sigma) * signal)[0]
                expected.append(float(mp.log(information) / 2))
        # Entries of the kernel are right to 1e-12; rows of the root, scaled to size 1, have a
        # condition number below 10.
        assert torch.allclose(found, float64(expected), rtol=0, atol=1e-11)

    @pytest.mark.parametrize(
        "make", [*FAMILIES.values(), SubVPSDE, lambda: CLD(friction=0.5), lambda: CLD(friction=2.0)]
    )
    def test_it_falls(self, make: Any) -> None:
        t = torch.logspace(-6, 0, 500, dtype=torch.float64)
        assert (make().log_snr(t).diff() < 0).all()

    @pytest.mark.parametrize("shape", [(), (3,), (2, 1, 4)])
    def test_it_has_the_shape_of_the_times(self, shape: tuple[int, ...]) -> None:
        t = torch.full(shape, 0.3)
        kappa = CLD().log_snr(t)
        assert kappa.shape == shape
        assert kappa.dtype == torch.float64
        assert CLD().log_snr(0.5).shape == ()

    @pytest.mark.parametrize("make", [VPSDE, SubVPSDE, CLD, PSLD, HOLD])
    def test_time_zero_is_refused(self, make: Any) -> None:
        with pytest.raises(ValueError, match="no density at t = 0"):
            make().log_snr(0.0)

    def test_ve_has_a_value_at_zero_for_its_data_are_noisy(self) -> None:
        # sigma_min^2 is the initial covariance.
        assert float(VESDE(0.05, 20.0).log_snr(0.0)) == pytest.approx(-math.log(0.05), rel=1e-14)

    @pytest.mark.parametrize("t", [-1e-9, 1.5, math.nan])
    def test_times_outside_the_process_are_refused(self, t: float) -> None:
        with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
            CLD().log_snr(t)


class TestTimesOfLogSNR:
    """The inverse of κ."""

    @pytest.mark.parametrize("sde", [VPSDE(), VESDE(), CLD(), PSLD(), HOLD()], ids=repr)
    def test_it_undoes_the_log_snr(self, sde: Any) -> None:
        t = torch.tensor([[1e-3, 0.02], [0.3, 1.0]], dtype=torch.float64)
        found = solvers.times_of_log_snr(sde, sde.log_snr(t))
        # κ is found to rounding; near 1 it changes by 5 or more in log t.
        assert torch.allclose(found, t, rtol=1e-10, atol=0)
        assert float(solvers.times_of_log_snr(sde, sde.log_snr(0.3))) == pytest.approx(0.3, 1e-10)

    def test_where_no_time_has_the_value_it_is_the_nearer_end(self) -> None:
        times = solvers.times_of_log_snr(VESDE(), torch.tensor([50.0, -50.0]), 0.9, 1e-4)
        assert times.tolist() == pytest.approx([1e-4, 0.9], rel=1e-12)

    @pytest.mark.parametrize(
        ("arguments", "name"),
        [
            ((math.nan,), "log_snr"),
            ((1.0, 0.5, 0.6), "eps"),
            ((1.0, 2.0), "T"),
            ((1.0, 1.0, 0.0), "eps"),
        ],
    )
    def test_what_is_refused(self, arguments: Any, name: str) -> None:
        with pytest.raises(ValueError, match=name):
            solvers.times_of_log_snr(CLD(), *arguments)
