"""The reverse process: signs, clocks, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from cldsde import CLD, GaussianMixture, LinearSDE, ReverseProcess
from score import exact
from score.exact import EPS, FAMILIES

every_family = pytest.mark.parametrize("name", list(FAMILIES))


def recorder(driven: int) -> tuple[Any, list[torch.Tensor]]:
    """A score of ones, and the times at which it was asked."""
    asked: list[torch.Tensor] = []

    def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        asked.append(t)
        return torch.ones(len(z), driven, *z.shape[2:], dtype=z.dtype)

    return score, asked


class TestDrift:
    """drift and probability_flow, in the forward clock."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("axes", [(), (3,), (1, 2, 2)])
    @every_family
    def test_drifts_are_the_formulas(self, name: str, axes: Any, dtype: torch.dtype) -> None:
        sde, t = FAMILIES[name](), 0.3
        k = sde.components
        z = torch.randn(4, k, *axes, generator=torch.Generator().manual_seed(0)).to(dtype)
        full = torch.randn(4, k, *axes, generator=torch.Generator().manual_seed(1)).to(dtype)
        driven = full[:, list(sde.driven)]
        process = ReverseProcess(sde, lambda z, t: driven)
        F, G = sde.drift(t), sde.diffusion(t)
        flow = torch.einsum("ij,bj...->bi...", F, z.double())
        # The rows of the score that are not driven do not matter.
        pull = torch.einsum("ij,bj...->bi...", G @ G.mT, full.double())
        size = float(flow.abs().max() + pull.abs().max())
        tolerance = 8 * k * torch.finfo(dtype).eps * size
        for found, expected in (
            (process.drift(z, t), flow - pull),
            (process.probability_flow(z, t), flow - pull / 2),
        ):
            assert found.dtype == dtype
            assert found.shape == z.shape
            assert (found.double() - expected).abs().max() <= tolerance

    @every_family
    def test_the_probability_flow_keeps_the_marginals(self, name: str) -> None:
        # Continuity: dp/dt + div(p f) = 0, that is d log p / dt + div f + f . grad log p = 0.
        sde, data, t = FAMILIES[name](), exact.mixture(), 0.4
        process = ReverseProcess(sde, data.score(sde))
        z = exact.states(sde, data, t, n=3)
        flow = process.probability_flow(z, t)
        jacobian = torch.func.jacrev(lambda z: process.probability_flow(z, t))(z)
        divergence = torch.einsum("biabia->b", jacobian.reshape(3, sde.components, 2, *z.shape))
        leaf = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(data.log_prob(sde, leaf, t).sum(), leaf)
        transport = (flow * gradient).sum((1, 2))
        h = 1e-3
        stencil = [(-2, 1 / 12), (-1, -2 / 3), (1, 2 / 3), (2, -1 / 12)]
        slope = sum(w * data.log_prob(sde, z, t + i * h) for i, w in stencil) / h
        residual = slope + divergence + transport
        # Central differences of fourth order: h^4 / 30 times the fifth derivative, which is some
        # rate^5 with rates up to 32 here, so below 1e-6; relative to the size of the terms.
        scale = divergence.abs() + transport.abs() + 1
        assert (residual.abs() <= 1e-5 * scale).all()

    @every_family
    def test_half_the_score_lies_between_forward_and_reverse_drift(self, name: str) -> None:
        sde, data = FAMILIES[name](), exact.mixture()
        z = exact.states(sde, data, 0.4)
        process = ReverseProcess(sde, data.score(sde))
        forward = torch.einsum("ij,bjd->bid", sde.drift(0.4), z)
        middle = (forward + process.drift(z, 0.4)) / 2
        # A few roundings of the terms.
        tolerance = 32 * EPS * float(middle.abs().max() + forward.abs().max())
        assert torch.allclose(process.probability_flow(z, 0.4), middle, rtol=0, atol=tolerance)

    @every_family
    def test_times_may_differ_between_samples(self, name: str) -> None:
        sde, data = FAMILIES[name](), exact.mixture()
        t = torch.tensor([1.0, 0.05, 0.4], dtype=torch.float64)
        z = exact.states(sde, data, t, n=3)
        process = ReverseProcess(sde, data.score(sde))
        for method in (process.drift, process.probability_flow):
            together = method(z, t)
            for i, single in enumerate(t.tolist()):
                alone = method(z[i : i + 1], single)
                tolerance = exact.rounding(sde, single) * float(alone.abs().max() + 1) * 100
                assert torch.allclose(together[i : i + 1], alone, rtol=0, atol=tolerance)

    @every_family
    def test_the_diffusion_is_that_of_the_forward_process(self, name: str) -> None:
        sde = FAMILIES[name]()
        process = ReverseProcess(sde, lambda z, t: z)
        t = torch.tensor([0.1, 0.9], dtype=torch.float64)
        assert torch.equal(process.diffusion(t), sde.diffusion(t))

    @pytest.mark.parametrize(
        "method", ["drift", "probability_flow", "data_prediction", "full_score"]
    )
    def test_the_score_is_asked_once_at_one_time_a_sample(self, method: str) -> None:
        score, asked = recorder(1)
        z = torch.zeros(4, 2, 3)
        getattr(ReverseProcess(CLD(), score), method)(z, 0.25)
        assert [t.tolist() for t in asked] == [[0.25] * 4]
        assert asked[0].dtype == z.dtype
        t = torch.tensor([0.25, 0.5, 0.75, 1.0])
        getattr(ReverseProcess(CLD(), score), method)(z, t)
        assert asked[1].tolist() == t.tolist()


PROCESSES: dict[str, Any] = {
    **FAMILIES,
    "first two of three driven": lambda: LinearSDE.from_matrices(
        [[-1.0, 1.0, 0.0], [-1.0, -2.0, 1.0], [0.0, -1.0, -1.0]],
        [[1.0, 0.0], [0.5, 2.0], [0.0, 0.0]],
        2.0,
        initial_covariance=[[0.0, 0.0, 0.0], [0.0, 0.04, 0.02], [0.0, 0.02, 0.1]],
    ),
}
every_process = pytest.mark.parametrize("name", list(PROCESSES))
STOCHASTICITY = [0.0, 0.3, 1.0, 1.7]


class TestFamily:
    """Processes of every stochasticity, all with the marginals of the forward process."""

    @pytest.mark.parametrize("axes", [(), (3,), (1, 2, 2)])
    @pytest.mark.parametrize("stochasticity", STOCHASTICITY)
    @every_process
    def test_drift_and_diffusion_are_the_formulas(
        self, name: str, stochasticity: float, axes: Any
    ) -> None:
        sde = PROCESSES[name]()
        k, t = sde.components, torch.tensor([0.1, 0.3, 0.6, 1.0], dtype=torch.float64)
        g = torch.Generator().manual_seed(0)
        z, full = torch.randn(2, 4, k, *axes, generator=g, dtype=torch.float64)
        process = ReverseProcess(sde, lambda z, t: full[:, list(sde.driven)])
        F, G = sde.drift(t), sde.diffusion(t)
        flow = torch.einsum("bij,bj...->bi...", F, z)
        pull = 0.5 * (1 + stochasticity**2) * torch.einsum("bij,bj...->bi...", G @ G.mT, full)
        found = process.drift(z, t, stochasticity=stochasticity)
        tolerance = 8 * k * EPS * float(flow.abs().max() + pull.abs().max())
        assert torch.allclose(found, flow - pull, rtol=0, atol=tolerance)
        diffusion = process.diffusion(t, stochasticity=stochasticity)
        assert torch.equal(diffusion, stochasticity * G)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @every_process
    def test_reverse_sde_and_probability_flow_are_two_of_them(
        self, name: str, dtype: torch.dtype
    ) -> None:
        sde, data = PROCESSES[name](), exact.mixture()
        process = ReverseProcess(sde, data.score(sde))
        t = torch.tensor([0.1, 0.3, 0.6, 1.0], dtype=torch.float64)
        z = exact.states(sde, data, t).to(dtype)
        for times in (t, 0.3):
            assert torch.equal(process.drift(z, times, stochasticity=1.0), process.drift(z, times))
            assert torch.equal(
                process.drift(z, times, stochasticity=0.0), process.probability_flow(z, times)
            )
        assert torch.equal(process.diffusion(t, stochasticity=1.0), sde.diffusion(t))
        assert not process.diffusion(t, stochasticity=0.0).any()

    @pytest.mark.parametrize("t", [0.05, 0.4, 1.0])
    @pytest.mark.parametrize("stochasticity", STOCHASTICITY)
    @every_process
    def test_every_one_keeps_the_moments_of_gaussian_data(
        self, name: str, stochasticity: float, t: float
    ) -> None:
        # In the forward clock, and run backwards: with the drift a + A z and z ~ N(m, S),
        # dm/dt = a + A m and dS/dt = A S + S A^T - lambda^2 G G^T. The forward process has
        # dm/dt = F m and dS/dt = F S + S F^T + G G^T.
        sde, variance, mean = PROCESSES[name](), 0.25, 0.7
        data = GaussianMixture([1.0], [[mean]], [[[variance]]])
        process = ReverseProcess(sde, data.score(sde))
        k = sde.components
        points = torch.cat([torch.zeros(1, k), torch.eye(k)]).double().unsqueeze(-1)
        values = process.drift(points, t, stochasticity=stochasticity)[..., 0]
        offset, A = values[0], (values[1:] - values[0]).mT
        kernel = sde.marginal(t)
        psi = kernel.mean[:, 0]
        m, S = mean * psi, kernel.covariance + variance * torch.outer(psi, psi)
        F, G = sde.drift(t), process.diffusion(t, stochasticity=stochasticity)
        noise = sde.diffusion(t) @ sde.diffusion(t).mT
        # The score's matrix is an inverse of S; drifts are rounded to their terms.
        lost = 64 * EPS * float(torch.linalg.cond(S))
        pulled = (1 + stochasticity**2) * noise @ torch.linalg.inv(S)
        size = lost * float(F.abs().max() + pulled.abs().max())
        allowed = size * (1 + float(m.abs().max()))
        assert torch.allclose(offset + A @ m, F @ m, rtol=0, atol=allowed)
        found = A @ S + S @ A.mT - G @ G.mT
        expected = F @ S + S @ F.mT + noise
        assert torch.allclose(found, expected, rtol=0, atol=size * (1 + float(S.abs().max())))

    @pytest.mark.parametrize("stochasticity", STOCHASTICITY)
    @every_process
    def test_every_one_keeps_the_marginals_of_mixtures(
        self, name: str, stochasticity: float
    ) -> None:
        # Fokker-Planck, run backwards: the current of the drift and of the noise is that of the
        # flow, drift + lambda^2/2 G G^T s, whatever lambda.
        sde, data, t = PROCESSES[name](), exact.mixture("degenerate"), 0.2
        z = exact.states(sde, data, t)
        process = ReverseProcess(sde, data.score(sde))
        G = process.diffusion(t, stochasticity=stochasticity)
        score = data.score(sde, rows="all")(z, t)
        drift = process.drift(z, t, stochasticity=stochasticity)
        current = drift + 0.5 * torch.einsum("ij,bjd->bid", G @ G.mT, score)
        expected = process.probability_flow(z, t)
        # The score is the same to its rounding, weighed by (1 + lambda^2) / 2 G G^T.
        weight = (1 + stochasticity**2) * float((sde.diffusion(t) @ sde.diffusion(t).mT).max())
        size = weight * float(score.abs().max()) + float(expected.abs().max())
        assert torch.allclose(current, expected, rtol=0, atol=exact.rounding(sde, t) * size)

    @pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
    def test_stochasticity_is_finite_and_not_negative(self, value: float) -> None:
        score, asked = recorder(1)
        process = ReverseProcess(CLD(), score)
        with pytest.raises(ValueError, match="stochasticity must be finite and at least 0"):
            process.drift(torch.zeros(2, 2, 1), 0.5, stochasticity=value)
        with pytest.raises(ValueError, match="stochasticity must be finite and at least 0"):
            process.diffusion(0.5, stochasticity=value)
        assert not asked

    @pytest.mark.parametrize("value", ["1", None, True])
    def test_stochasticity_is_a_number(self, value: Any) -> None:
        with pytest.raises(TypeError, match="stochasticity must be a real number"):
            ReverseProcess(CLD(), recorder(1)[0]).drift(
                torch.zeros(2, 2, 1), 0.5, stochasticity=value
            )


class TestFullScore:
    """All rows from the driven ones."""

    @pytest.mark.parametrize("t", [0.05, 0.4, 1.0])
    @pytest.mark.parametrize("name", [n for n in PROCESSES if n != "CLD, underdamped"])
    def test_it_is_that_of_the_mixture(self, name: str, t: float) -> None:
        sde, data = PROCESSES[name](), exact.mixture("degenerate")
        z = exact.states(sde, data, t)
        found = ReverseProcess(sde, data.score(sde)).full_score(z, t)
        expected = data.score(sde, rows="all")(z, t)
        assert found.shape == z.shape
        # The noise is right to the rounding of a score and amplified by at most 4, and the inverse
        # root makes a score of it.
        stretch = float(torch.linalg.matrix_norm(torch.linalg.inv(sde.marginal(t).root), 2))
        tolerance = 4 * exact.rounding(sde, t) * stretch + 1e-9 * float(expected.abs().max())
        assert (found - expected).abs().max() <= tolerance

    @pytest.mark.parametrize("name", ["VP", "VE", "CLD", "CLD, overdamped", "HOLD"])
    def test_its_driven_row_is_the_score(self, name: str) -> None:
        # One number a dimension determines x_0, and nothing is fitted.
        sde, t = PROCESSES[name](), 0.3
        g = torch.Generator().manual_seed(0)
        z, score = torch.randn(2, 4, 1, 3, generator=g, dtype=torch.float64)
        z = z.expand(4, sde.components, 3)
        full = ReverseProcess(sde, lambda z, t: score).full_score(z, t)
        # Through the root and back.
        tolerance = exact.rounding(sde, t) * float(score.abs().max())
        assert torch.allclose(full[:, list(sde.driven)], score, rtol=0, atol=tolerance)

    def test_the_score_of_another_process_is_refused(self) -> None:
        data = exact.mixture()
        with pytest.raises(ValueError, match="score belongs to another process"):
            ReverseProcess(CLD(), data.score(CLD(friction=2.0)))
        ReverseProcess(CLD(), data.score(CLD()))

    def test_the_start_is_refused(self) -> None:
        process = ReverseProcess(CLD(), recorder(1)[0])
        with pytest.raises(ValueError, match="no density at t = 0"):
            process.full_score(torch.zeros(2, 2, 1), 0.0)


class TestRefusals:
    """What is no reverse process, no state and no time."""

    @pytest.mark.parametrize("sde", [CLD, None, "CLD"])
    def test_the_process_has_to_be_a_linear_sde(self, sde: Any) -> None:
        with pytest.raises(TypeError, match="sde must be a LinearSDE; got"):
            ReverseProcess(sde, lambda z, t: z)

    @pytest.mark.parametrize("score", [None, 1.0, torch.zeros(2)])
    def test_the_score_has_to_be_a_function(self, score: Any) -> None:
        with pytest.raises(TypeError, match="score must be a callable"):
            ReverseProcess(CLD(), score)

    @pytest.mark.parametrize(
        "method", ["drift", "probability_flow", "data_prediction", "full_score"]
    )
    @pytest.mark.parametrize(
        ("z", "t", "error"),
        [
            (torch.zeros(2, 3, 1), 0.5, ValueError),
            (torch.zeros(2), 0.5, ValueError),
            (torch.zeros(2, 2, 1, dtype=torch.int64), 0.5, TypeError),
            (None, 0.5, TypeError),
            (torch.zeros(2, 2, 1), 1.5, ValueError),
            (torch.zeros(2, 2, 1), math.nan, ValueError),
            (torch.zeros(2, 2, 1), torch.full((3,), 0.5), ValueError),
            (torch.zeros(2, 2, 1), "0.5", TypeError),
        ],
    )
    def test_states_and_times_that_do_not_fit_are_refused_before_the_score_is_asked(
        self, method: str, z: Any, t: Any, error: type[Exception]
    ) -> None:
        score, asked = recorder(1)
        with pytest.raises(error, match="must"):
            getattr(ReverseProcess(CLD(), score), method)(z, t)
        assert not asked

    @pytest.mark.parametrize(
        "method", ["drift", "probability_flow", "data_prediction", "full_score"]
    )
    @pytest.mark.parametrize("shape", [(3, 2, 1), (3, 1, 2), (1, 1, 1), (3, 1)])
    def test_a_score_of_another_shape_is_refused(self, method: str, shape: Any) -> None:
        process = ReverseProcess(CLD(), lambda z, t: torch.zeros(shape))
        with pytest.raises(ValueError, match=r"score must return shape \(3, 1, 1\)"):
            getattr(process, method)(torch.zeros(3, 2, 1), 0.5)

    def test_a_process_without_density_still_has_a_drift(self) -> None:
        # The formulas need no density; x_0 does.
        sde = LinearSDE.from_matrices([[-1.0, 0.0], [0.0, -1.0]], [[0.0], [1.0]])
        process = ReverseProcess(sde, recorder(1)[0])
        assert process.drift(torch.zeros(2, 2, 1), 0.5).shape == (2, 2, 1)
        with pytest.raises(ValueError, match="no density"):
            process.data_prediction(torch.zeros(2, 2, 1), 0.5)
