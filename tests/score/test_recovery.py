"""The data's posterior mean from the score of the driven components."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, LinearSDE, ReverseProcess, SubVPSDE
from cldsde.score import Conversion
from score import exact


def data_prediction(sde: LinearSDE, t: torch.Tensor) -> Conversion:
    return Conversion.at(sde, t, "score", "data")


RECOVERED: dict[str, Any] = {
    "VP": VPSDE,
    "sub-VP": SubVPSDE,
    "VE": lambda: VESDE(0.05, 20.0),
    "CLD, critical": CLD,
    "CLD, overdamped": lambda: CLD(friction=2.0),
    "CLD, linear": lambda: CLD((0.1, 8.0)),
    "CLD, equilibrium": lambda: CLD(velocity_scale=1.0),
    "PSLD": PSLD,
    "HOLD": HOLD,
}
every_process = pytest.mark.parametrize("name", list(RECOVERED))


@pytest.mark.parametrize("kind", ["regular", "degenerate"])
@pytest.mark.parametrize("t", [1e-3, 0.01, 0.1, 0.5, 0.9, 1.0])
@every_process
def test_the_driven_score_gives_the_posterior_mean(name: str, t: float, kind: str) -> None:
    sde, data = RECOVERED[name](), exact.mixture(kind)
    z = exact.states(sde, data, t)
    found = ReverseProcess(sde, data.score(sde)).data_prediction(z, t)
    assert found.shape == (len(z), 2)
    # The score is exact to 1e-10 in relative terms and noise in it is amplified by at most 400, the
    # gain of x0 in the predicted noise, which is reached near t = 1.
    for i in range(len(z)):
        expected = exact.dense(sde, data, z[i], t).posterior_mean
        assert torch.allclose(found[i], expected, rtol=0, atol=1e-8)


@every_process
def test_per_sample_times_equal_single_times(name: str) -> None:
    sde, data = RECOVERED[name](), exact.mixture()
    t = torch.tensor([1.0, 0.05, 0.4], dtype=torch.float64)
    z = exact.states(sde, data, t, n=3)
    process = ReverseProcess(sde, data.score(sde))
    together = process.data_prediction(z, t)
    for i, single in enumerate(t.tolist()):
        alone = process.data_prediction(z[i : i + 1], single)
        # As exact as the posterior mean above.
        assert torch.allclose(together[i : i + 1], alone, rtol=0, atol=1e-8)


@pytest.mark.parametrize("axes", [(2, 1), (1, 2)])
@every_process
def test_several_data_axes_equal_flattened_ones(name: str, axes: Any) -> None:
    sde, data = RECOVERED[name](), exact.mixture()
    z = exact.states(sde, data, 0.4)
    process = ReverseProcess(sde, data.score(sde))
    flat = process.data_prediction(z, 0.4)
    several = process.data_prediction(z.reshape(*z.shape[:2], *axes), 0.4)
    assert several.shape == (len(z), *axes)
    assert torch.equal(several.flatten(1), flat)


def test_points_are_recovered_exactly_as_time_goes_to_zero() -> None:
    data, sde = exact.mixture("points"), CLD()
    g = torch.Generator().manual_seed(0)
    x = data.sample(8, generator=g, dtype=torch.float64)
    z, _ = sde.perturb(x, 1e-3, generator=g)
    found = ReverseProcess(sde, data.score(sde)).data_prediction(z, 1e-3)
    # Points are 1000 standard deviations apart: the posterior is a point, and what is left is the
    # rounding of the score, 1e-10, times its size, 1e3, times the variance, 1e-6, and less.
    assert torch.allclose(found, x, rtol=0, atol=1e-8)


class TestRefusals:
    """Where the driven score says nothing about the data."""

    @staticmethod
    def zeros(sde: LinearSDE) -> list[float]:
        """Times at which row v of the inverse covariance, applied to psi, changes its sign."""
        t = torch.linspace(0.02, 1.0, 4001, dtype=torch.float64)
        kernel = sde.marginal(t)
        b = torch.linalg.solve(kernel.covariance, kernel.mean[..., :1])[:, 1, 0]
        at = ((b[1:] * b[:-1]) < 0).nonzero().flatten()
        return [float(t[i]) for i in at]

    @pytest.mark.parametrize("friction", [0.2, 0.4, 0.6])
    def test_an_underdamped_process_is_refused_near_the_zeros(self, friction: float) -> None:
        sde = CLD(friction=friction)
        zeros = self.zeros(sde)
        assert zeros
        for t in zeros:
            with pytest.raises(ValueError, match=r"does not determine x_0 at .*critical damping"):
                data_prediction(sde, torch.tensor(t, dtype=torch.float64))

    def test_a_critically_damped_process_has_no_zeros(self) -> None:
        assert not self.zeros(CLD())
        data_prediction(CLD(), torch.logspace(-3, 0, 50, dtype=torch.float64))

    def test_the_worst_time_of_several_is_named(self) -> None:
        sde = CLD(friction=0.4)
        zero = self.zeros(sde)[0]
        with pytest.raises(ValueError, match=rf"at t = {zero:.3}"):
            data_prediction(sde, torch.tensor([0.01, zero, 0.02], dtype=torch.float64))

    @pytest.mark.parametrize("make", [VPSDE, CLD, PSLD, HOLD])
    def test_the_start_is_refused(self, make: Any) -> None:
        sde = make()
        with pytest.raises(ValueError, match="no density at t = 0; take t > 0"):
            data_prediction(sde, torch.tensor(0.0, dtype=torch.float64))

    def test_the_refusal_comes_before_the_score_is_asked(self) -> None:
        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            pytest.fail("the score was asked")

        sde = CLD(friction=0.4)
        process = ReverseProcess(sde, score)
        with pytest.raises(ValueError, match="does not determine"):
            process.data_prediction(torch.zeros(1, 2, 1), self.zeros(sde)[0])


def test_the_amplification_that_is_refused_is_that_of_the_noise() -> None:
    # sqrt(I) / (|b_v| L_vv) against the all-rows estimate: 1.08 ... 1.62 for critical CLD.
    sde = CLD()
    for t in (1e-3, 0.1, 0.9):
        kernel = sde.marginal(t)
        psi = kernel.mean[:, 0]
        b = torch.linalg.solve(kernel.covariance, psi)
        ratio = math.sqrt(float(psi @ b)) / (abs(float(b[1])) * float(kernel.root[1, 1]))
        coefficient = data_prediction(sde, torch.tensor(t, dtype=torch.float64)).value
        # The noise n = -L_vv s has unit variance; the all-rows estimate's is 1 / sqrt(I).
        gain = float(coefficient.abs().squeeze()) / float(kernel.root[1, 1])
        # Covariances are inverted here, condition number 1e6 at t = 1e-3.
        assert gain * math.sqrt(float(psi @ b)) == pytest.approx(ratio, rel=1e-8)
        assert 1 <= ratio <= 1.7
