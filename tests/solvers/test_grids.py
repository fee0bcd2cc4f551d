"""Time grids: their formulas, exact ends, and the inverse of the log-SNR."""

import math

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import references
from cldsde import CLD, VPSDE, RectifiedFlow, solvers
from cldsde.linear.kappa import kappa_of_vp_time, times_of_kappa, vp_time
from cldsde.solvers import kappa_times, karras_times, logistic_times
from probes import few_examples, tensor
from score.cases import COMMON
from strategies import log_uniform
from tolerances import KERNEL, rounding

PLAIN = {
    "uniform": (solvers.uniform_times, lambda T, eps, x: T + x * (eps - T)),
    "quadratic": (solvers.quadratic_times, lambda T, eps, x: eps + (T - eps) * (1 - x) ** 2),
    "root": (
        solvers.root_times,
        lambda T, eps, x: (math.sqrt(T) + x * (math.sqrt(eps) - math.sqrt(T))) ** 2,
    ),
}
SNR = {"kappa": kappa_times, "karras": karras_times, "logistic": logistic_times}

every_plain_grid = pytest.mark.parametrize("name", list(PLAIN))
every_family = pytest.mark.parametrize("family", list(COMMON))


def check_grid(times, T, eps, n):
    """Float64 times on the CPU that fall from one exact end to the other."""
    assert (times.shape, times.dtype, times.device.type) == ((n + 1,), torch.float64, "cpu")
    assert (times[0].item(), times[-1].item()) == (T, eps)
    assert (times.diff() < 0).all()


@every_plain_grid
@given(st.integers(1, 500), st.one_of(st.just(0.0), log_uniform(1e-6, 0.5)), log_uniform(0.6, 2.0))
def test_plain_grids_are_their_formulas(name, n, eps, T):
    make, formula = PLAIN[name]
    times = make(T, eps, n)
    check_grid(times, T, eps, n)
    expected = tensor([formula(T, eps, i / n) for i in range(n + 1)])
    assert torch.allclose(times, expected, rtol=0, atol=rounding(8, 2.0))


@every_plain_grid
def test_a_process_changes_nothing_and_numpy_integers_are_integers(name):
    make = PLAIN[name][0]
    expected = make(1.0, 1e-3, 7)
    assert torch.equal(make(1.0, 1e-3, 7, sde=CLD()), expected)
    assert torch.equal(make(1.0, 1e-3, np.int64(7)), expected)


# Functions of kappa in which the grids are uniform, with their options.
SCALES = {
    "kappa": (st.just(()), lambda kappa: kappa),
    "karras": (st.tuples(st.floats(0.5, 8.0)), lambda kappa, rho: (-kappa / rho).exp()),
    "logistic": (
        st.tuples(st.floats(-1.0, 2.0), st.floats(0.3, 1.0)),
        lambda kappa, center, rate: 1 / (1 + (rate * (kappa - center)).exp()),
    ),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", list(SNR))
@every_family
@few_examples
@given(st.data(), st.integers(1, 40), log_uniform(1e-5, 1e-2))
def test_grids_in_the_signal_to_noise_ratio_are_uniform_in_their_scale(name, family, data, n, eps):
    (options, scale), sde = SCALES[name], COMMON[family]
    drawn = data.draw(options)
    times = SNR[name](1.0, eps, n, *drawn, sde=sde)
    check_grid(times, 1.0, eps, n)
    found = scale(sde.kappa(times), *drawn)
    expected = torch.linspace(float(found[0]), float(found[-1]), n + 1, dtype=torch.float64)
    # A time is rounded relative to itself and t kappa' < 20, so that kappa is off by 20 eps; the
    # scales are no steeper, relative to their size.
    assert (found - expected).abs().max() <= KERNEL * float(found.abs().max())


@pytest.mark.parametrize("friction", [0.5, 1.0, 2.0])
def test_kappa_has_exact_values_for_cld(friction):
    t, expected = torch.logspace(-6, 0, 7, dtype=torch.float64), []
    with mp.workdps(references.DIGITS):
        for time in t.tolist():
            kernel = references.cld(4.0, friction=friction).marginal(time)
            signal = kernel[0][:, 0]
            information = (signal.T * mp.inverse(kernel[1]) * signal)[0]
            expected.append(float(mp.log(information) / 2))
    # Rows of the root, scaled to size 1, have a condition number below 10.
    found = CLD(4.0, friction=friction).kappa(t)
    assert torch.allclose(found, tensor(expected), rtol=0, atol=10 * KERNEL)


@every_family
def test_times_of_kappa_are_its_inverse(family):
    sde, t = COMMON[family], torch.tensor([[1e-3, 0.02], [0.3, 1.0]], dtype=torch.float64)
    found = solvers.times_of_kappa(sde, sde.kappa(t))
    # Near 1 kappa changes by 5 or more in log t, elsewhere by less than 1e2.
    assert torch.allclose(found, t, rtol=100 * KERNEL, atol=0)
    assert (found.shape, found.dtype) == (t.shape, torch.float64)
    assert solvers.times_of_kappa(sde, sde.kappa(0.3)).shape == ()
    # Beyond the range of κ it is the nearer end.
    ends = solvers.times_of_kappa(sde, tensor([50.0, -50.0]), 0.9, 1e-4)
    assert torch.allclose(ends, tensor([1e-4, 0.9]), rtol=KERNEL, atol=0)


@pytest.mark.parametrize("sde", [VPSDE(), RectifiedFlow(), CLD()], ids=["VP", "flow", "CLD"])
def test_vp_times_are_uniform_in_a_power_of_vps_time(sde):
    first, last = times_of_kappa(sde, tensor([-5.0, 3.3])).tolist()
    found = times_of_kappa(VPSDE(), sde.kappa(solvers.vp_times(first, last, 9, sde=sde))) ** 0.75
    expected = torch.linspace(float(found[0]), float(found[-1]), 10, dtype=torch.float64)
    # κ of a rounded time of rectified flow near 1 has digits of 1 − t = e^{−5} only.
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding(2**12))


@given(st.floats(-30.0, 10.0))
@few_examples
def test_vp_time_is_inverted(kappa):
    """The condition of B in κ is at most 2(1 + |κ|), also where e^B overflows."""
    kappa = tensor(kappa)
    bound = rounding(64, 1 + abs(kappa))
    assert abs(float(kappa_of_vp_time(vp_time(kappa)) - kappa)) <= bound
    if kappa > VPSDE().kappa(1.0):
        assert abs(float(VPSDE().kappa(vp_time(kappa)) - kappa)) <= bound
