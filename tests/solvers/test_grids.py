"""Time grids: formulas, exact ends, the inverse of the log-SNR, and rejected arguments."""

from __future__ import annotations

import math
from typing import Any

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import references
from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, LinearSDE, SubVPSDE, solvers
from cldsde.solvers import karras_times, log_snr_times, logistic_times
from probes import few_examples
from strategies import log_uniform, shapes
from tolerances import EPS, KERNEL, rounding

PLAIN: dict[str, tuple[Any, Any]] = {
    "uniform": (solvers.uniform_times, lambda T, eps, x: T + x * (eps - T)),
    "quadratic": (solvers.quadratic_times, lambda T, eps, x: eps + (T - eps) * (1 - x) ** 2),
    "root": (
        solvers.root_times,
        lambda T, eps, x: (math.sqrt(T) + x * (math.sqrt(eps) - math.sqrt(T))) ** 2,
    ),
}
SNR: dict[str, Any] = {"log_snr": log_snr_times, "karras": karras_times, "logistic": logistic_times}
FAMILIES: dict[str, LinearSDE] = {
    "VP": VPSDE(),
    "VE": VESDE(0.05, 20.0),
    "CLD": CLD(),
    "PSLD": PSLD(),
    "HOLD": HOLD(),
}

every_plain_grid = pytest.mark.parametrize("name", list(PLAIN))
every_snr_grid = pytest.mark.parametrize("name", list(SNR))
every_family = pytest.mark.parametrize("family", list(FAMILIES))


def float64(numbers: list[float]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def check_grid(times: torch.Tensor, T: float, eps: float, n: int) -> None:
    """Float64 times on the CPU that fall from one exact end to the other."""
    assert (times.shape, times.dtype, times.device.type) == ((n + 1,), torch.float64, "cpu")
    assert (times[0].item(), times[-1].item()) == (T, eps)
    assert (times.diff() < 0).all()


@every_plain_grid
@given(st.integers(1, 500), st.one_of(st.just(0.0), log_uniform(1e-6, 0.5)), log_uniform(0.6, 2.0))
def test_plain_grids_are_their_formulas(name: str, n: int, eps: float, T: float) -> None:
    make, formula = PLAIN[name]
    times = make(T, eps, n)
    check_grid(times, T, eps, n)
    expected = float64([formula(T, eps, i / n) for i in range(n + 1)])
    assert torch.allclose(times, expected, rtol=0, atol=rounding(8, 2.0))


@every_plain_grid
def test_a_process_may_come_first_and_numpy_integers_are_integers(name: str) -> None:
    make = PLAIN[name][0]
    expected = make(1.0, 1e-3, 7)
    assert torch.equal(make(CLD(), 1.0, 1e-3, 7), expected)
    assert torch.equal(make(CLD(), 1.0, eps=1e-3, n=7), expected)
    assert torch.equal(make(1.0, 1e-3, np.int64(7)), expected)


# Functions of kappa in which the grids are uniform, with their options.
SCALES: dict[str, tuple[Any, Any]] = {
    "log_snr": (st.just(()), lambda kappa: kappa),
    "karras": (st.tuples(st.floats(0.5, 8.0)), lambda kappa, rho: (-kappa / rho).exp()),
    "logistic": (
        st.tuples(st.floats(-1.0, 2.0), st.floats(0.3, 1.0)),
        lambda kappa, center, rate: 1 / (1 + (rate * (kappa - center)).exp()),
    ),
}


@every_snr_grid
@every_family
@few_examples
@given(st.data(), st.integers(1, 40), log_uniform(1e-5, 1e-2))
def test_grids_in_the_signal_to_noise_ratio_are_uniform_in_their_scale(
    name: str, family: str, data: st.DataObject, n: int, eps: float
) -> None:
    (options, scale), sde = SCALES[name], FAMILIES[family]
    drawn = data.draw(options)
    times = SNR[name](sde, 1.0, eps, n, *drawn)
    check_grid(times, 1.0, eps, n)
    found = scale(sde.log_snr(times), *drawn)
    expected = torch.linspace(float(found[0]), float(found[-1]), n + 1, dtype=torch.float64)
    # A time is rounded relative to itself and t kappa' < 20, so that kappa is off by 20 eps; the
    # scales are no steeper, relative to their size.
    assert (found - expected).abs().max() <= KERNEL * float(found.abs().max())


def test_for_vp_kappa_is_inverted_by_the_formula_of_dpm_solver() -> None:
    b0, b1, eps, n = 0.1, 20.0, 1e-4, 25

    def kappa(t: float) -> float:
        return -0.5 * math.log(math.expm1(b0 * t + 0.5 * (b1 - b0) * t**2))

    def inverse(k: float) -> float:
        integral = math.log1p(math.exp(-2 * k))
        return 2 * integral / (b0 + math.sqrt(b0**2 + 2 * (b1 - b0) * integral))

    first, last = kappa(1.0), kappa(eps)
    expected = [inverse(first + i / n * (last - first)) for i in range(n + 1)]
    times = log_snr_times(VPSDE(b0, b1), 1.0, eps, n)
    # kappa is of size 5, and d log t / d kappa <= 2.
    assert torch.allclose(times, float64(expected), rtol=10 * KERNEL, atol=0)


@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_for_ve_karras_times_have_a_closed_form(rho: float) -> None:
    low, high, eps, n = 0.05, 20.0, 1e-2, 18
    ratio = math.log(high / low)
    last = low * math.exp(eps * ratio)
    roots = [
        high ** (1 / rho) + i / n * (last ** (1 / rho) - high ** (1 / rho)) for i in range(n + 1)
    ]
    expected = [math.log(root**rho / low) / ratio for root in roots]
    options = () if rho == 7.0 else (rho,)  # 7 is the default
    times = karras_times(VESDE(low, high), 1.0, eps, n, *options)
    assert torch.allclose(times, float64(expected), rtol=0, atol=KERNEL)


def test_a_logistic_grid_does_not_depend_on_the_schedule() -> None:
    # Two betas of the same clock at 1: the same levels, each at its own time.
    constant, linear = CLD(beta=4.0), CLD(beta=(1.0, 7.0))
    eps = 1e-2
    first = logistic_times(constant, 1.0, eps, 20)
    other = (-1 + math.sqrt(1 + 48 * eps)) / 6  # t + 3 t^2 = 4 eps
    second = logistic_times(linear, 1.0, other, 20)
    assert torch.allclose(second + 3 * second.square(), 4 * first, rtol=10 * KERNEL, atol=0)


@pytest.mark.parametrize("make", [*(grid for grid, _ in PLAIN.values()), *SNR.values()])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.0, 1e-3, 0), ValueError, "n must be at least 1 step; got 0"),
        ((1.0, 1e-3, -100), ValueError, "n must be at least 1 step; got -100"),
        ((1.0, 1e-3, 2.0), TypeError, "n must be an integer number of steps; got"),
        ((1.0, 1e-3, "2"), TypeError, "n must be an integer number of steps; got"),
        ((1.0, 1e-3, True), TypeError, "n must be an integer number of steps; got"),
        ((1.0, 1.0, 10), ValueError, r"eps must lie in \[0, T\) with T = 1; got"),
        ((1.0, -1e-9, 10), ValueError, r"eps must lie in \[0, T\) with T = 1; got"),
        ((1.0, math.nan, 10), ValueError, r"eps must lie in \[0, T\) with T = 1; got"),
        ((0.0, 1e-3, 10), ValueError, "T must|t must lie"),
        ((-0.5, 1e-3, 10), ValueError, "T must|t must lie"),
        ((math.nan, 1e-3, 10), ValueError, "T must|t must lie"),
        ((math.inf, 1e-3, 10), ValueError, "T must|t must lie"),
        ((1.5, 1e-3, 10), ValueError, r"t must lie in \[0, 1\]|T must|times? must"),
        ((1.0, 1 - 4 * EPS, 1000), ValueError, "1000 steps .* below the resolution"),
    ],
    ids=str,
)
def test_bad_arguments_are_rejected(
    make: Any, arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    if arguments[0] == 1.5 and make in [grid for grid, _ in PLAIN.values()]:
        assert make(*arguments)[0] == 1.5  # without a process any end is allowed
        return
    first = (CLD(),) if make in SNR.values() else ()
    with pytest.raises(error, match=message):
        make(*first, *arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: logistic_times(CLD(), 1.0, 1e-3, 9, rate=0.0), ValueError, "rate must be finite"),
        (lambda: karras_times(CLD(), 1.0, 1e-3, 9, -7.0), ValueError, "rho must be finite"),
        (lambda: karras_times(CLD(), 1.0, 1e-3, 9, math.inf), ValueError, "rho must be finite"),
        (lambda: karras_times(CLD(), 1.0, 1e-3, 9, "7"), TypeError, "rho must be a real number"),  # type: ignore[arg-type]
        (lambda: log_snr_times(VESDE(), 1.0, 0.0, 9), ValueError, "eps must be above 0"),
        (lambda: karras_times(1.0, 1e-3, 9), TypeError, r"karras_times needs the process first"),  # type: ignore[arg-type,call-arg]
        (lambda: log_snr_times("CLD", 1.0, 0, 1), TypeError, r"\(sde, T, eps, n\); got"),  # type: ignore[arg-type]
        (lambda: VPSDE().log_snr(0.0), ValueError, "no density at t = 0"),
        (lambda: HOLD().log_snr(0.0), ValueError, "no density at t = 0"),
        (lambda: CLD().log_snr(-1e-9), ValueError, r"t must lie in \[0, 1\]"),
        (lambda: CLD().log_snr(math.nan), ValueError, r"t must lie in \[0, 1\]"),
        *[
            (lambda x=x: solvers.times_of_log_snr(CLD(), x), TypeError, "log_snr must be a number")
            for x in ("3", [[1.0], [2.0, 3.0]], np.ones(3)[::-1])
        ],
        (lambda: solvers.times_of_log_snr(CLD(), math.nan), ValueError, "log_snr"),
        (lambda: solvers.times_of_log_snr(CLD(), 1.0, 0.5, 0.6), ValueError, "eps"),
        (lambda: solvers.times_of_log_snr(CLD(), 1.0, 2.0), ValueError, "T"),
        (lambda: solvers.times_of_log_snr(CLD(), 1.0, 1.0, 0.0), ValueError, "eps"),
    ],
)
def test_bad_options_are_rejected(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


class TestLogSnr:
    """`LinearSDE.log_snr` and its inverse."""

    @pytest.mark.parametrize("make", [VPSDE, SubVPSDE, VESDE])
    def test_for_one_component_it_is_log_alpha_over_sigma(self, make: Any) -> None:
        sde, t = make(), torch.logspace(-6, 0, 25, dtype=torch.float64)
        kernel = sde.marginal(t)
        expected = (kernel.mean / kernel.root).log()[:, 0, 0]
        # A square, its root and two logarithms of numbers up to 1e6.
        assert torch.allclose(sde.log_snr(t), expected, rtol=0, atol=rounding(32, 14.0))

    @pytest.mark.parametrize("friction", [0.5, 1.0, 2.0])
    def test_for_cld_it_has_fifty_digit_values(self, friction: float) -> None:
        t = torch.logspace(-6, 0, 7, dtype=torch.float64)
        expected = []
        with mp.workdps(references.DIGITS):
            for time in t.tolist():
                kernel = references.cld(4.0, friction=friction).marginal(time)
                signal = kernel[0][:, 0]
                information = (signal.T * mp.inverse(kernel[1]) * signal)[0]
                expected.append(float(mp.log(information) / 2))
        # Rows of the root, scaled to size 1, have a condition number below 10.
        found = CLD(4.0, friction=friction).log_snr(t)
        assert torch.allclose(found, float64(expected), rtol=0, atol=10 * KERNEL)

    @pytest.mark.parametrize("sde", [*FAMILIES.values(), SubVPSDE(), CLD(friction=0.5)], ids=repr)
    def test_it_falls(self, sde: LinearSDE) -> None:
        t = torch.logspace(-6, 0, 500, dtype=torch.float64)
        assert (sde.log_snr(t).diff() < 0).all()

    @given(shapes())
    def test_it_has_the_shape_of_the_times(self, shape: tuple[int, ...]) -> None:
        kappa = CLD().log_snr(torch.full(shape, 0.3))
        assert (kappa.shape, kappa.dtype) == (shape, torch.float64)

    def test_ve_has_a_value_at_zero_because_its_data_are_noisy(self) -> None:
        found = float(VESDE(0.05, 20.0).log_snr(0.0))
        assert found == pytest.approx(-math.log(0.05), rel=rounding())

    @every_family
    def test_its_inverse_undoes_it(self, family: str) -> None:
        sde, t = FAMILIES[family], torch.tensor([[1e-3, 0.02], [0.3, 1.0]], dtype=torch.float64)
        found = solvers.times_of_log_snr(sde, sde.log_snr(t))
        # Near 1 kappa changes by 5 or more in log t, elsewhere by less than 1e2.
        assert torch.allclose(found, t, rtol=100 * KERNEL, atol=0)
        assert solvers.times_of_log_snr(sde, sde.log_snr(0.3)).shape == ()

    def test_beyond_its_range_the_inverse_is_the_nearer_end(self) -> None:
        times = solvers.times_of_log_snr(VESDE(), torch.tensor([50.0, -50.0]), 0.9, 1e-4)
        assert times.tolist() == pytest.approx([1e-4, 0.9], rel=KERNEL)
