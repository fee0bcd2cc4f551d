"""Likelihoods by the probability flow: exact densities, affine models in closed form, refusals."""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

from cldsde import (
    CLD,
    HOLD,
    PSLD,
    VESDE,
    VPSDE,
    GaussianMixture,
    LinearSDE,
    ReverseProcess,
    SubVPSDE,
)
from cldsde.score import bits_per_dim, dequantise, flow_log_prob, log_likelihood
from cldsde.score.flow_density import FlowDensity
from cldsde.score.likelihood import Likelihood
from score.exact import EPS

PROCESSES: dict[str, Any] = {
    "VP": VPSDE,
    "sub-VP": SubVPSDE,
    "VE": lambda: VESDE(0.05, 20.0),
    "CLD": CLD,
    "PSLD": PSLD,
    "HOLD": HOLD,
    "correlated noise": lambda: LinearSDE.from_matrices(
        [[-1.0, 2.0], [-1.0, -2.0]],
        [[0.7, 0.0], [0.9, 1.1]],
        4.0,
        initial_covariance=[[0.0, 0.0], [0.0, 0.1]],
    ),
    "noise in the data": lambda: LinearSDE.from_matrices(
        [[-2.0, 1.0], [-1.0, 0.0]],
        [[2.0], [0.0]],
        4.0,
        initial_covariance=[[0.0, 0.0], [0.0, 0.1]],
    ),
}
every_process = pytest.mark.parametrize("name", list(PROCESSES))

MEAN = np.array([0.3, -0.5])
COVARIANCE = np.array([[0.5, 0.3], [0.3, 0.4]])
GAUSSIAN = GaussianMixture([1.0], [MEAN.tolist()], [COVARIANCE.tolist()])
X = torch.tensor([[0.4, -0.8], [1.3, 0.2]], dtype=torch.float64)


def _ring() -> GaussianMixture:
    angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    means = torch.stack([angle.cos(), angle.sin()], dim=1)
    return GaussianMixture([1.0] * 8, means, 0.04 * torch.eye(2).expand(8, 2, 2))


RING = _ring()
DATA = {"Gaussian": GAUSSIAN, "ring": RING}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def states(sde: LinearSDE, data: GaussianMixture, t: float, n: int = 3) -> torch.Tensor:
    g = seeded()
    return sde.perturb(data.sample(n, generator=g, dtype=torch.float64), t, generator=g)[0]


STAGES = {"dopri5": 6, "dopri8": 12, "bosh3": 3, "adaptive_heun": 2}


def accuracy(found: FlowDensity, tol: float, method: str = "dopri5") -> float:
    """What local errors of rtol = atol = tol can add up to.

    A step spoils each number y by tol (1 + |y|) at most, and the errors of all steps add: in the
    integral directly, in the state times the score, which is no longer than the whitened state.
    """
    steps = found.nfev / STAGES[method]
    size = max(float(found.divergence.abs().max()), float(found.latent.abs().max()))
    return steps * tol * (1 + size)


class Recorder:
    """A score that keeps the times that it is asked for."""

    def __init__(self, score: Any) -> None:
        self.score, self.times, self.states = score, [], []

    def __call__(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert t.shape == (len(z),)
        self.times.append(t.clone())
        self.states.append(z.detach().clone())
        return self.score(z, t)


class Imperfect:
    """scale · score + offset: an affine model of Gaussian data that is wrong at all times."""

    def __init__(self, score: Any, scale: float, offset: np.ndarray) -> None:
        self.score, self.scale, self.offset = score, scale, torch.from_numpy(offset)

    def __call__(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.scale * self.score(z, t) + self.offset.to(z)


class Law(NamedTuple):
    """N(mean, covariance) of the state of each eigen-direction of the data's covariance."""

    means: np.ndarray  # (D, k)
    covariances: np.ndarray  # (D, k, k)
    axes: np.ndarray  # (D, D)

    def log_prob(self, z: torch.Tensor) -> np.ndarray:
        rotated = z.numpy() @ self.axes
        return sum(
            _normal(rotated[:, :, j] - self.means[j], self.covariances[j])
            for j in range(len(self.axes))
        )

    def rotated(self, x: torch.Tensor) -> np.ndarray:
        return x.numpy() @ self.axes


def _normal(residual: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Log-density of N(0, covariance) at residuals ``(B, k)``."""
    solved = np.linalg.solve(covariance, residual.T).T
    log_det = np.linalg.slogdet(2 * np.pi * covariance)[1]
    return -0.5 * (residual * solved).sum(1) - 0.5 * log_det


def _kl(mean: Any, a: np.ndarray, b: np.ndarray) -> Any:
    """KL(N(mean, a) ‖ N(0, b)), means ``(B, k)``."""
    inverse = np.linalg.inv(b)
    log_det = np.linalg.slogdet(b)[1] - np.linalg.slogdet(a)[1]
    quadratic = np.einsum("bi,ij,bj->b", mean, inverse, mean)
    return 0.5 * (np.trace(inverse @ a) + quadratic - len(a) + log_det)


@lru_cache
def known_law(name: str, t: float, model: str) -> Law:
    return affine_law(PROCESSES[name](), t, *MODELS[model])


def affine_law(sde: LinearSDE, t: float, scale: float, offset: np.ndarray) -> Law:
    """Law of z_t under the model whose score is `Imperfect`, by ODEs for moments and flow map.

    The flow of an affine score is affine, z_T = X z_t + b, and the model's z_T is N(0, prior).
    """
    k = sde.components
    variances, axes = np.linalg.eigh(COVARIANCE)
    prior = sde.prior.covariance.numpy()
    means, covariances = [], []
    for variance, mean, shift in zip(variances, MEAN @ axes, offset @ axes, strict=True):

        def matrices(u: float) -> tuple[np.ndarray, np.ndarray]:
            G = sde.diffusion(u).numpy()
            return sde.drift(u).numpy(), G @ G.T

        def moments(u: float, y: np.ndarray) -> np.ndarray:
            F, Q = matrices(u)
            S = y[k : k + k * k].reshape(k, k)
            return np.concatenate([F @ y[:k], (F @ S + S @ F.T + Q).ravel()])

        def flow(u: float, y: np.ndarray, mean: float = mean, shift: float = shift) -> np.ndarray:
            F, Q = matrices(u)
            psi, S = y[:k], y[k : k + k * k].reshape(k, k)
            map_ = y[k + k * k :].reshape(k, k + 1)
            pull = 0.5 * scale * Q @ np.linalg.inv(S)
            driven = np.zeros(k)
            driven[list(sde.driven)] = shift
            moved = (F + pull) @ map_
            moved[:, k] -= pull @ psi * mean + 0.5 * Q @ driven
            return np.concatenate([moments(u, y[: k + k * k]), moved.ravel()])

        unit = np.eye(k)[0]
        start = sde.initial_covariance.numpy() + variance * np.outer(unit, unit)
        options = {"method": "DOP853", "rtol": 1e-11, "atol": 1e-13}
        y = np.concatenate([unit, start.ravel()])
        y = solve_ivp(moments, (0, t), y, **options).y[:, -1]
        y = np.concatenate([y, np.eye(k, k + 1).ravel()])
        map_ = solve_ivp(flow, (t, 1), y, **options).y[k + k * k :, -1].reshape(k, k + 1)
        inverse = np.linalg.inv(map_[:, :k])
        means.append(-inverse @ map_[:, k])
        covariances.append(inverse @ prior @ inverse.T)
    return Law(np.array(means), np.array(covariances), axes)


MODELS = {"exact": (1.0, np.zeros(2)), "imperfect": (0.99, np.array([0.3, -0.1]))}
every_model = pytest.mark.parametrize("model", list(MODELS))


def affine_process(sde: LinearSDE, model: str) -> ReverseProcess:
    return ReverseProcess(sde, Imperfect(GAUSSIAN.score(sde), *MODELS[model]))


def prior_mismatch(sde: LinearSDE, latent: torch.Tensor, radius: float) -> float:
    """Bound on |log p_T − log prior| at states, for data within a radius.

    p_T(z) = E N(z; ψx_0, Σ_T). Whitened by Σ_T, with c = L⁻¹ψ and w = L⁻¹z, its logarithm differs
    from that of N(0, Σ_T) by at most |cᵀw| |x_0| + |c|² |x_0|² / 2.
    """
    kernel = sde.marginal(1.0)
    inverse = torch.linalg.inv(kernel.root)
    c = (inverse @ kernel.mean[:, 0]).norm()
    w = torch.einsum("ij,bjd->bid", inverse, latent).flatten(1).norm(dim=1).max()
    rest = torch.zeros_like(latent)
    gaussian = kernel.log_prob(latent, rest) - sde.prior.log_prob(latent)
    return float(c * w * radius + 0.5 * (c * radius) ** 2 + gaussian.abs().max())


class TestFlow:
    """flow_log_prob against densities known exactly."""

    @pytest.mark.parametrize(
        ("name", "kind"),
        [*((name, "ring") for name in PROCESSES), ("VP", "Gaussian"), ("CLD", "Gaussian")],
    )
    def test_the_density_changes_as_that_of_the_data(self, name: str, kind: str) -> None:
        sde, data, t = PROCESSES[name](), DATA[kind], 0.1
        z = states(sde, data, t)
        process = ReverseProcess(sde, data.score(sde))
        expected = data.log_prob(sde, z, t)
        errors = []
        runs = [(1e-4, "dopri5"), (1e-6, "dopri5"), (1e-8, "dopri8")]
        for tol, method in runs if kind == "ring" else runs[:2]:
            found = flow_log_prob(process, z, t, rtol=tol, atol=tol, method=method)
            error = found.divergence + data.log_prob(sde, found.latent, 1.0) - expected
            errors.append(float(error.abs().max()))
            assert errors[-1] <= accuracy(found, tol, method)
            # The prior of the model is not p_T.
            prior = sde.prior.log_prob(found.latent)
            assert torch.equal(found.log_prob, prior + found.divergence)
        # A hundredth of the tolerance, a tenth of the error at least.
        for coarse, fine in pairwise(errors):
            assert fine <= coarse / 10

    @pytest.mark.parametrize("name", ["VP", "CLD"])
    def test_the_tightest_tolerance_is_met_by_the_default_method(self, name: str) -> None:
        sde, t, tol = PROCESSES[name](), 0.01, 1e-8
        z = states(sde, RING, t)
        found = flow_log_prob(ReverseProcess(sde, RING.score(sde)), z, t, rtol=tol, atol=tol)
        change = RING.log_prob(sde, z, t) - RING.log_prob(sde, found.latent, 1.0)
        assert (found.divergence - change).abs().max() <= accuracy(found, tol)

    @pytest.mark.parametrize("method", list(STAGES))
    def test_every_method_meets_the_tolerance(self, method: str) -> None:
        sde, t, tol = CLD(), 0.3, 1e-4
        z = states(sde, RING, t)
        process = ReverseProcess(sde, RING.score(sde))
        found = flow_log_prob(process, z, t, rtol=tol, atol=tol, method=method)
        change = RING.log_prob(sde, z, t) - RING.log_prob(sde, found.latent, 1.0)
        assert (found.divergence - change).abs().max() <= accuracy(found, tol, method)

    @every_model
    @every_process
    def test_the_density_of_an_affine_model_is_normal(self, name: str, model: str) -> None:
        sde, t, tol = PROCESSES[name](), 1e-3, 1e-6
        z = states(sde, GAUSSIAN, t)
        found = flow_log_prob(affine_process(sde, model), z, t, rtol=tol, atol=tol)
        law = known_law(name, t, model)
        error = np.abs(found.log_prob.numpy() - law.log_prob(z)).max()
        assert error <= accuracy(found, tol)

    def test_the_flow_starts_at_zero_where_the_data_have_a_density(self) -> None:
        sde, tol = CLD(), 1e-6
        z = states(sde, RING, 0.0)
        found = flow_log_prob(ReverseProcess(sde, RING.score(sde)), z, 0.0, rtol=tol, atol=tol)
        change = RING.log_prob(sde, z, 0.0) - RING.log_prob(sde, found.latent, 1.0)
        assert (found.divergence - change).abs().max() <= accuracy(found, tol)

    @pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
    @pytest.mark.parametrize("name", ["CLD", "HOLD"])
    def test_only_the_driven_rows_count(self, name: str, divergence: Any) -> None:
        # s = −2 last + 30 (all others): a slope in the others is no divergence.
        sde, t = PROCESSES[name](), 0.5

        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return -2 * z[:, -1:] + 30 * z[:, :-1].sum(1, keepdim=True)

        z = states(sde, RING, t)
        found = flow_log_prob(ReverseProcess(sde, score), z, t, divergence=divergence)
        G = sde.diffusion(t)
        rate = 2 * (float(sde.drift(t).trace()) + float((G @ G.mT)[-1, -1]))
        # β is constant, and a Runge–Kutta method exact for a constant integrand.
        exact = torch.full((3,), 0.5 * rate, dtype=torch.float64)
        assert torch.allclose(found.divergence, exact, rtol=1e-12)

    def test_a_score_without_a_graph_is_refused(self) -> None:
        sde = CLD()
        z = states(sde, RING, 0.5)
        process = ReverseProcess(sde, lambda z, t: -z[:, 1:].detach())
        with pytest.raises(ValueError, match="differentiable in the state"):
            flow_log_prob(process, z, 0.5)

    def test_a_network_that_ignores_the_state_has_no_divergence_of_its_own(self) -> None:
        sde = CLD()
        bias = nn.Parameter(torch.ones(2, dtype=torch.float64))
        process = ReverseProcess(sde, lambda z, t: bias.expand_as(z[:, 1:]))
        z = states(sde, RING, 0.5)
        for divergence in ("exact", "hutchinson"):
            found = flow_log_prob(process, z, 0.5, divergence=divergence)
            exact = torch.full((3,), -16.0, dtype=torch.float64)
            assert torch.allclose(found.divergence, exact, rtol=1e-12)

    @pytest.mark.parametrize("shape", [(2,), (2, 1), (1, 2), (1, 1, 2)])
    def test_several_data_axes_equal_flattened_ones(self, shape: Any) -> None:
        sde = CLD()
        z = states(sde, RING, 0.1)
        process = ReverseProcess(sde, RING.score(sde))
        flat, found = (flow_log_prob(process, state, 0.1) for state in (z, z.reshape(3, 2, *shape)))
        assert found.latent.shape == (3, 2, *shape)
        assert torch.equal(found.log_prob, flat.log_prob)

    def test_scalar_data_need_no_axis(self) -> None:
        sde = CLD()
        data = GaussianMixture([1.0], [[0.2]], [[[0.3]]])
        z = states(sde, data, 0.1)
        process = ReverseProcess(sde, data.score(sde))
        for divergence in ("exact", "hutchinson"):
            found = flow_log_prob(process, z[..., 0], 0.1, divergence=divergence)
            expected = flow_log_prob(process, z, 0.1, divergence=divergence)
            assert torch.equal(found.log_prob, expected.log_prob)

    def test_many_dimensions_are_traced_in_parts(self) -> None:
        # More rows than are pulled back at once, and no multiple of it.
        size, sde, t, tol = 150, VPSDE(), 0.2, 1e-5
        weights = torch.linspace(0.5, 2.0, size, dtype=torch.float64)
        z = torch.randn(2, 1, size, generator=seeded(), dtype=torch.float64)
        found = flow_log_prob(
            ReverseProcess(sde, lambda z, t: -weights * z), z, t, rtol=tol, atol=tol
        )
        # −½β D + ½β Σ weights, integrated.
        clock = 0.1 * 0.8 + 0.5 * 19.9 * (1 - 0.2**2)
        exact = 0.5 * clock * (float(weights.sum()) - size)
        assert torch.allclose(
            found.divergence, torch.full((2,), exact, dtype=torch.float64), rtol=1e-12
        )


class TestHutchinson:
    """One random vector of signs in place of the trace."""

    @pytest.mark.parametrize("name", ["VP", "CLD"])
    def test_the_mean_over_all_signs_is_the_trace(self, name: str) -> None:
        # Two driven numbers have two pairs of opposite vectors, and opposite ones one value.
        # Vectors for more components, or drawn anew on the path, would give more values.
        sde, t, tol, n = PROCESSES[name](), 0.05, 1e-6, 32
        process = ReverseProcess(sde, RING.score(sde))
        z = states(sde, RING, t, n=1)
        exact = flow_log_prob(process, z, t, rtol=tol, atol=tol)
        many = flow_log_prob(
            process,
            z.expand(n, -1, -1),
            t,
            divergence="hutchinson",
            rtol=tol,
            atol=tol,
            generator=seeded(),
        )
        tolerance = accuracy(exact, tol) + accuracy(many, tol)
        low, high = many.divergence.min(), many.divergence.max()
        assert high - low > 10 * tolerance
        nearest = torch.minimum(many.divergence - low, high - many.divergence)
        assert nearest.max() <= tolerance
        assert abs(float((low + high) / 2 - exact.divergence)) <= tolerance
        assert 0.5 <= many.nfev / exact.nfev <= 2

    @pytest.mark.parametrize("name", ["PSLD", "correlated noise"])
    def test_the_mean_over_draws_is_the_trace(self, name: str) -> None:
        sde, t, tol, n = PROCESSES[name](), 0.05, 1e-5, 2000
        process = ReverseProcess(sde, RING.score(sde))
        z = states(sde, RING, t, n=1)
        exact = flow_log_prob(process, z, t, rtol=tol, atol=tol)
        many = flow_log_prob(
            process,
            z.expand(n, -1, -1),
            t,
            divergence="hutchinson",
            rtol=tol,
            atol=tol,
            generator=seeded(1),
        )
        error = abs(float(many.divergence.mean() - exact.divergence))
        standard_error = float(many.divergence.std()) / math.sqrt(n)
        tolerance = accuracy(exact, tol) + accuracy(many, tol)
        assert standard_error > 0
        assert error <= 5 * standard_error + tolerance

    def test_one_number_has_one_sign(self) -> None:
        sde, t = VPSDE(), 0.01
        data = GaussianMixture([0.3, 0.7], [[-1.0], [1.0]], [[[0.1]], [[0.2]]])
        process = ReverseProcess(sde, data.score(sde))
        z = states(sde, data, t)
        exact = flow_log_prob(process, z, t)
        found = flow_log_prob(process, z, t, divergence="hutchinson", generator=seeded())
        # e² = 1: the same up to the order of products.
        assert torch.allclose(found.log_prob, exact.log_prob, rtol=1e-10, atol=1e-10)
        assert found.nfev == exact.nfev

    def test_a_seed_decides_the_signs(self) -> None:
        sde, t = CLD(), 0.1
        process = ReverseProcess(sde, RING.score(sde))
        z = states(sde, RING, t, n=8)

        def run(seed: int) -> torch.Tensor:
            return flow_log_prob(
                process, z, t, divergence="hutchinson", generator=seeded(seed)
            ).divergence

        assert torch.equal(run(0), run(0))
        assert not torch.equal(run(0), run(1))

    def test_the_log_likelihood_is_unbiased(self) -> None:
        sde, t, samples = VPSDE(), 0.05, 1000
        process = ReverseProcess(sde, RING.score(sde))
        x = torch.tensor([[0.8, 0.3]], dtype=torch.float64)
        exact = log_likelihood(process, x, t, start="replace")
        found = log_likelihood(
            process,
            x,
            t,
            start="replace",
            samples=samples,
            divergence="hutchinson",
            generator=seeded(),
        )
        error = abs(float(found.log_prob - exact.log_prob))
        # Both solved to 1e-5, in about ten steps.
        assert error <= 5 * float(found.standard_error) + 1e-3


class TestEvaluations:
    """When, how often and with what the score is asked."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
    @pytest.mark.parametrize("name", ["VP", "CLD"])
    def test_every_evaluation_is_counted_and_within_the_interval(
        self, name: str, divergence: Any, dtype: torch.dtype
    ) -> None:
        sde, t = PROCESSES[name](), 0.01
        score = Recorder(RING.score(sde))
        z = states(sde, RING, t).to(dtype)
        found = flow_log_prob(
            ReverseProcess(sde, score), z, t, divergence=divergence, generator=seeded()
        )
        assert len(score.times) == found.nfev
        times = torch.stack(score.times)
        assert times.dtype == dtype
        assert all(state.dtype == dtype for state in score.states)
        assert times.min() == torch.tensor(t, dtype=dtype)
        # The last stage lies at T, or one rounding before it.
        assert 1 - EPS <= times.max() <= 1
        assert (times == times[:, :1]).all()
        assert found.log_prob.dtype == found.latent.dtype == torch.float64
        assert torch.equal(score.states[0], z)

    @pytest.mark.parametrize("t", [0.0, 0.5, 0.999])
    def test_a_long_first_step_does_not_leave_the_interval(self, t: float) -> None:
        # So slow a flow that the solver probes at t + 0.01 |z| / |velocity| = t + 10.
        sde = LinearSDE.from_matrices([[-1e-3]], [[1e-2]], prior_covariance=[[1.0]])
        score = Recorder(lambda z, t: -z)
        z = torch.ones(2, 1, 1, dtype=torch.float64)
        found = flow_log_prob(ReverseProcess(sde, score), z, t, rtol=1.0, atol=1.0)
        times = torch.stack(score.times)
        assert t <= times.min() <= times.max() <= 1
        assert len(score.times) == found.nfev

    def test_the_likelihood_counts_evaluations_of_a_batch(self) -> None:
        sde = CLD()
        score = Recorder(RING.score(sde))
        found = log_likelihood(ReverseProcess(sde, score), X, 0.01, samples=3, generator=seeded())
        assert found.nfev == len(score.times)
        assert all(len(state) == 6 for state in score.states)

    def test_nothing_is_left_on_the_graph(self) -> None:
        sde = CLD()
        network = nn.Linear(2, 2).double()

        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return network(z[:, 1:]) - z[:, 1:]

        z = states(sde, RING, 0.1).requires_grad_()
        found = flow_log_prob(ReverseProcess(sde, score), z, 0.1)
        assert not found.log_prob.requires_grad
        assert not found.latent.requires_grad
        assert network.weight.grad is None
        assert z.grad is None

    def test_it_works_where_gradients_are_off(self) -> None:
        sde = CLD()
        process = ReverseProcess(sde, RING.score(sde))
        z = states(sde, RING, 0.1)
        expected = flow_log_prob(process, z, 0.1).log_prob
        with torch.no_grad():
            assert torch.equal(flow_log_prob(process, z, 0.1).log_prob, expected)

    def test_a_single_precision_network_gets_single_precision(self) -> None:
        torch.manual_seed(0)
        sde = CLD()
        body = nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Linear(16, 2))

        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            out = body(torch.cat([z.flatten(1), t[:, None]], dim=1))
            return out.unsqueeze(1) - 4 * z[:, 1:]

        x = X.float()
        for divergence in ("exact", "hutchinson"):
            found = log_likelihood(
                ReverseProcess(sde, score), x, 1e-3, divergence=divergence, generator=seeded()
            )
            assert found.log_prob.dtype == torch.float64
            assert found.log_prob.isfinite().all()

    def test_single_precision_data_lose_single_precision(self) -> None:
        sde, t = VPSDE(), 0.01
        process = ReverseProcess(sde, RING.score(sde))
        x = X.float()
        found = log_likelihood(process, x, t, start="replace")
        expected = log_likelihood(process, x.double(), t, start="replace")
        # The state is rounded to single precision for the score, whose slope is below 1/0.04; the
        # trace is a sum of such slopes over B = 10, beside errors of the solver of 1e-5 a step.
        assert torch.allclose(found.log_prob, expected.log_prob, rtol=0, atol=1e-3)


class TestBatches:
    """Samples do not meet."""

    def test_a_difficult_sample_keeps_its_accuracy_in_company(self) -> None:
        # A sample far out has a flow of its own; its error must not be averaged over the batch.
        sde, t, tol = VPSDE(), 0.01, 1e-5
        data = GaussianMixture([0.5, 0.5], [[-2.0], [2.0]], [[[1e-3]], [[1.0]]])
        process = ReverseProcess(sde, data.score(sde))
        z = torch.full((400, 1, 1), 2.0, dtype=torch.float64)
        z[0] = -1.9
        found = flow_log_prob(process, z, t, rtol=tol, atol=tol)
        alone = flow_log_prob(process, z[:1], t, rtol=tol, atol=tol)
        change = data.log_prob(sde, z, t) - data.log_prob(sde, found.latent, 1.0)
        assert (found.divergence - change).abs().max() <= accuracy(found, tol)
        assert found.nfev >= alone.nfev

    @pytest.mark.parametrize("name", ["VP", "CLD"])
    def test_an_order_of_samples_does_not_matter(self, name: str) -> None:
        sde, t, tol = PROCESSES[name](), 0.02, 1e-6
        process = ReverseProcess(sde, RING.score(sde))
        z = states(sde, RING, t, n=6)
        found = flow_log_prob(process, z, t, rtol=tol, atol=tol)
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        moved = flow_log_prob(process, z[order], t, rtol=tol, atol=tol)
        # The same steps, for the norm is a maximum over samples: rounding alone, which the flow
        # stretches by the ratio of widths, below 10, in each of 50 steps.
        assert torch.allclose(moved.log_prob, found.log_prob[order], rtol=0, atol=1e-9)
        assert moved.nfev == found.nfev

    def test_a_part_of_a_batch_is_found_to_the_tolerance(self) -> None:
        sde, t, tol = CLD(), 0.02, 1e-6
        process = ReverseProcess(sde, RING.score(sde))
        z = states(sde, RING, t, n=6)
        found = flow_log_prob(process, z, t, rtol=tol, atol=tol)
        part = flow_log_prob(process, z[2:3], t, rtol=tol, atol=tol)
        tolerance = accuracy(found, tol) + accuracy(part, tol)
        assert abs(float(part.log_prob - found.log_prob[2])) <= tolerance

    @pytest.mark.parametrize("samples", [1, 2])
    @pytest.mark.parametrize("start", ["perturb", "replace"])
    @pytest.mark.parametrize("name", ["VP", "CLD"])
    def test_an_empty_batch_is_no_error(self, name: str, start: Any, samples: int) -> None:
        sde = PROCESSES[name]()
        score = Recorder(RING.score(sde))
        found = log_likelihood(
            ReverseProcess(sde, score),
            X[:0],
            0.01,
            start=start,
            samples=samples,
        )
        assert found.log_prob.shape == found.standard_error.shape == (0,)
        assert found.nfev == len(score.times) == 0
        assert found.bits_per_dim().shape == (0,)


def error_of_mean(found: Likelihood, expected: np.ndarray) -> np.ndarray:
    """Distance from what is expected in standard errors, less what the solver may add."""
    excess = np.abs(found.log_prob.numpy() - expected) - SOLVER
    return excess / found.standard_error.numpy()


# rtol = atol = 1e-5 in 40 steps on numbers below 9, as in `accuracy`.
SOLVER = 4e-3


class TestReplaced:
    """The data taken for the model's x at t_min."""

    @every_model
    @pytest.mark.parametrize("name", ["VP", "sub-VP", "VE"])
    def test_without_auxiliary_components_it_is_a_value(self, name: str, model: str) -> None:
        sde, t, tol = PROCESSES[name](), 1e-3, 1e-7
        process = affine_process(sde, model)
        found = log_likelihood(process, X, t, start="replace", rtol=tol, atol=tol)
        flow = flow_log_prob(process, X.unsqueeze(1), t, rtol=tol, atol=tol)
        expected = known_law(name, t, model).log_prob(X.unsqueeze(1))
        assert np.abs(found.log_prob.numpy() - expected).max() <= accuracy(flow, tol)
        assert torch.equal(found.log_prob, flow.log_prob)
        assert found.is_bound is False
        assert found.dimension == 2
        assert found.standard_error.isnan().all()

    def test_samples_of_a_value_do_not_scatter(self) -> None:
        sde = VPSDE()
        process = ReverseProcess(sde, RING.score(sde))
        once = log_likelihood(process, X, 0.01, start="replace")
        many = log_likelihood(process, X, 0.01, start="replace", samples=3)
        weighted = log_likelihood(
            process, X, 0.01, start="replace", samples=3, importance_weighted=True
        )
        for found in (many, weighted):
            # The same states in one batch: rounding, stretched as in a permuted batch.
            assert torch.allclose(found.log_prob, once.log_prob, rtol=0, atol=1e-9)
            assert (found.standard_error <= 1e-9).all()

    @every_model
    @pytest.mark.parametrize("name", ["CLD", "HOLD", "correlated noise"])
    def test_with_auxiliary_components_it_is_a_bound(self, name: str, model: str) -> None:
        sde, t = PROCESSES[name](), 1e-3
        found = log_likelihood(
            affine_process(sde, model), X, t, start="replace", samples=500, generator=seeded()
        )
        law = known_law(name, t, model)
        r = sde.initial_covariance.numpy()[1:, 1:]
        value, gap, mean = np.zeros(2), np.zeros(2), np.zeros(2)
        for j, x in enumerate(law.rotated(X).T):
            mu, C = law.means[j], law.covariances[j]
            value += _normal((x - mu[0])[:, None], C[:1, :1])
            # v given x under the model.
            gain = C[1:, 0] / C[0, 0]
            rest = mu[1:] + np.outer(x - mu[0], gain)
            gap += _kl(rest, r, C[1:, 1:] - np.outer(gain, C[0, 1:]))
            # E log p(x, v) − E log r(v), directly.
            precision = np.linalg.inv(C)
            centre = np.column_stack([x, np.zeros((2, len(r)))]) - mu
            mean += _normal(centre, C) - 0.5 * np.trace(precision[1:, 1:] @ r)
            mean += 0.5 * (np.linalg.slogdet(2 * np.pi * r)[1] + len(r))
        # Both references solve ODEs to 1e-11; inverting C loses its condition number, below 1e5.
        assert np.allclose(mean, value - gap, rtol=0, atol=1e-4)
        assert (gap > 0).all()
        assert found.is_bound is True
        assert (error_of_mean(found, value - gap) <= 5).all()
        assert (found.log_prob.numpy() - 5 * found.standard_error.numpy() <= value + SOLVER).all()

    def test_the_gap_is_that_of_the_velocity_alone_where_the_score_is_exact(self) -> None:
        # At t_min = 1e-5 the velocity has not moved from its initial law: no gap is left.
        sde, t = CLD(), 1e-5
        process = ReverseProcess(sde, GAUSSIAN.score(sde))
        found = log_likelihood(process, X, t, start="replace", samples=200, generator=seeded())
        z = torch.cat([X.unsqueeze(1), torch.zeros(2, 1, 2, dtype=torch.float64)], dim=1)
        velocity = GAUSSIAN.conditional_log_prob(sde, z, t)
        value = GAUSSIAN.log_prob(sde, z, t) - velocity
        # KL of N(0, γM) and the velocity's law: variances differ by 2Γβt/γM < 1 %, half of whose
        # square it is, and the velocity's mean by β|x|t < 1e-4, a thousandth of its width.
        radius = 6.0
        latent = flow_log_prob(process, z, t).latent
        allowed = 1e-3 + prior_mismatch(sde, latent, radius) + SOLVER
        error = (found.log_prob - value).abs()
        assert (error <= allowed + 5 * found.standard_error).all()

    @every_model
    @pytest.mark.parametrize("name", ["CLD", "HOLD"])
    def test_weighted_by_importance_it_tends_to_the_value(self, name: str, model: str) -> None:
        # From the stationary law v has the width that it has under the model, and weights a
        # variance.
        sde = {
            "CLD": CLD(velocity_scale=1.0),
            "HOLD": HOLD(auxiliary_scale=1.0),
        }[name]
        t = 1e-3
        found = log_likelihood(
            affine_process(sde, model),
            X,
            t,
            start="replace",
            samples=500,
            importance_weighted=True,
            generator=seeded(),
        )
        law = affine_law(sde, t, *MODELS[model])
        r, value = sde.initial_covariance.numpy()[1:, 1:], np.zeros(2)
        for j, x in enumerate(law.rotated(X).T):
            C = law.covariances[j]
            value += _normal((x - law.means[j][0])[:, None], C[:1, :1])
            # Weights p(v|x)/r(v) have a fourth moment: 4/3 of r is wider than p.
            given_x = C[1:, 1:] - np.outer(C[1:, 0], C[0, 1:]) / C[0, 0]
            assert np.linalg.eigvalsh(4 * r - 3 * given_x).min() > 0
        assert (error_of_mean(found, value) <= 5).all()

    def test_the_standard_error_is_that_of_the_samples(self) -> None:
        sde, t, n = CLD(), 1e-3, 4000
        x = X[:, :1]
        data = GaussianMixture([1.0], [[0.3]], [[[0.5]]])
        process = ReverseProcess(sde, data.score(sde))
        found = log_likelihood(process, x, t, start="replace", samples=n, generator=seeded())
        # The model is p_t but for its prior: v given x is normal, and log w = a n² + b n + c in
        # the normal n of v, of variance 2a² + b².
        kernel = sde.marginal(t)
        psi = kernel.mean[:, 0]
        C = kernel.covariance + 0.5 * torch.outer(psi, psi)
        gain = C[1, 0] / C[0, 0]
        mean = 0.3 * psi[1] + gain * (x[:, 0] - 0.3 * psi[0])
        variance = C[1, 1] - gain * C[0, 1]
        r = float(sde.initial_covariance[1, 1])
        a = 0.5 * (1 - r / variance)
        b = math.sqrt(r) * mean / variance
        expected = (2 * a**2 + b**2).sqrt() / math.sqrt(n)
        # A standard deviation from n samples scatters by √(kurtosis/4n), for χ² below √(15/4n) =
        # 3 %; five times that. The prior's mismatch changes the model by 1e-3 or so.
        assert torch.allclose(found.standard_error, expected, rtol=0.2)


class TestPerturbed:
    """States drawn from the forward process, and decoded."""

    @every_model
    @pytest.mark.parametrize("name", ["VP", "CLD", "HOLD", "correlated noise", "noise in the data"])
    def test_log_weights_have_the_expected_mean(self, name: str, model: str) -> None:
        sde, t = PROCESSES[name](), 1e-3
        found = log_likelihood(affine_process(sde, model), X, t, samples=500, generator=seeded())
        law = known_law(name, t, model)
        psi, sigma, _, information = self.decoder(sde, t)
        expected = np.zeros(2)
        for j, x in enumerate(law.rotated(X).T):
            C = law.covariances[j]
            expected += _normal(np.outer(x, psi) - law.means[j], C)
            expected -= 0.5 * np.trace(np.linalg.solve(C, sigma))
            # The entropy of q and the decoder.
            expected += 0.5 * (np.linalg.slogdet(2 * np.pi * sigma)[1] + len(psi))
            expected += 0.5 * (np.log(information / (2 * np.pi)) - 1)
        assert found.is_bound is True
        assert (error_of_mean(found, expected) <= 5).all()
        assert (expected < self.value(sde, t, law)).all()

    @pytest.mark.parametrize("model", ["imperfect"])
    @pytest.mark.parametrize("name", ["VP", "CLD", "HOLD"])
    def test_weights_have_the_density_for_mean(self, name: str, model: str) -> None:
        sde, t = PROCESSES[name](), 1e-3
        found = log_likelihood(
            affine_process(sde, model),
            X,
            t,
            samples=1000,
            importance_weighted=True,
            generator=seeded(),
        )
        value = self.value(sde, t, known_law(name, t, model))
        assert (error_of_mean(found, value) <= 5).all()

    @staticmethod
    def decoder(sde: LinearSDE, t: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """ψ, Σ, g of x̃ = gz, and I."""
        kernel = sde.marginal(t)
        psi, sigma = kernel.mean[:, 0].numpy(), kernel.covariance.numpy()
        solved = np.linalg.solve(sigma, psi)
        information = float(psi @ solved)
        return psi, sigma, solved / information, information

    @classmethod
    def value(cls, sde: LinearSDE, t: float, law: Law) -> np.ndarray:
        """Log-density of x̃ under the model and the decoder's noise."""
        _, _, g, information = cls.decoder(sde, t)
        value = np.zeros(2)
        for j, x in enumerate(law.rotated(X).T):
            spread = g @ law.covariances[j] @ g + 1 / information
            value += _normal((x - g @ law.means[j])[:, None], np.array([[spread]]))
        return value

    @pytest.mark.parametrize("name", ["VP", "CLD"])
    def test_of_a_mixture_it_is_the_density_but_for_the_prior(self, name: str) -> None:
        # x̃ is the data and noise of variance 1/I, and the decoder adds as much again.
        sde, t = PROCESSES[name](), 1e-4
        process = ReverseProcess(sde, RING.score(sde))
        found = log_likelihood(
            process, X, t, samples=500, importance_weighted=True, generator=seeded()
        )
        kernel = sde.marginal(t)
        c = torch.linalg.solve_triangular(kernel.root, kernel.mean[:, :1], upper=False)
        eye = torch.eye(2, dtype=torch.float64)
        noisy = GaussianMixture(
            RING.weights, RING.means, RING.covariances + 2 * eye / c.square().sum()
        )
        point = LinearSDE.from_matrices([[0.0]], [[1.0]])
        expected = noisy.log_prob(point, X.unsqueeze(1), 0.0)
        latent = flow_log_prob(process, sde.perturb(X, t, generator=seeded())[0], t).latent
        allowed = prior_mismatch(sde, 2 * latent, 2.5) + SOLVER
        error = (found.log_prob - expected).abs()
        assert (error <= allowed + 5 * found.standard_error).all()

    def test_decoding_from_an_early_time_costs_little(self) -> None:
        # At the default t_min VP's value is the data's density but for the prior.
        sde = VPSDE()
        process = ReverseProcess(sde, RING.score(sde))
        found = log_likelihood(
            process, X, samples=300, importance_weighted=True, generator=seeded()
        )
        point = LinearSDE.from_matrices([[0.0]], [[1.0]])
        exact = RING.log_prob(point, X.unsqueeze(1), 0.0)
        latent = flow_log_prob(process, X.unsqueeze(1), 1e-5).latent
        # 2/I = 2 β t = 2e-6 beside a variance of 0.04: 2e-6 times the Laplacian of the density
        # relative to it, (|x − m|/0.04)² < 1e3 here.
        allowed = prior_mismatch(sde, 2 * latent, 2.5) + SOLVER + 2e-3
        assert ((found.log_prob - exact).abs() <= allowed + 5 * found.standard_error).all()

    @pytest.mark.parametrize("start", ["perturb", "replace"])
    def test_weighting_averages_weights(self, start: Any) -> None:
        sde, n = CLD(), 5
        process = ReverseProcess(sde, RING.score(sde))
        plain, weighted = (
            log_likelihood(
                process,
                X,
                0.01,
                start=start,
                samples=n,
                importance_weighted=flag,
                generator=seeded(),
            )
            for flag in (False, True)
        )
        assert (weighted.log_prob >= plain.log_prob).all()
        # A mean of n positive weights is no larger than n of them, each beyond its mean logarithm
        # by what the scatter allows.
        scatter = plain.standard_error * n
        assert (weighted.log_prob <= plain.log_prob + scatter).all()

    def test_data_are_kept_apart_from_samples(self) -> None:
        # Each datum's samples lie together: two data far apart have densities far apart.
        sde = CLD()
        process = ReverseProcess(sde, GAUSSIAN.score(sde))
        x = torch.tensor([[0.3, -0.5], [6.0, 6.0], [0.3, -0.5]], dtype=torch.float64)
        found = log_likelihood(process, x, 0.01, samples=50, generator=seeded()).log_prob
        assert found[1] < found[0] - 20
        assert found[1] < found[2] - 20

    def test_a_seed_decides_everything(self) -> None:
        sde = CLD()
        process = ReverseProcess(sde, RING.score(sde))

        def run(seed: int, start: Any) -> torch.Tensor:
            return log_likelihood(
                process, X, 0.4, start=start, divergence="hutchinson", generator=seeded(seed)
            ).log_prob

        for start in ("perturb", "replace"):
            assert torch.equal(run(0, start), run(0, start))
            assert not torch.equal(run(0, start), run(1, start))

    def test_velocities_that_start_at_rest_are_perturbed(self) -> None:
        sde = CLD(velocity_scale=0.0)
        process = ReverseProcess(sde, RING.score(sde))
        found = log_likelihood(process, X, 0.01, generator=seeded())
        assert found.log_prob.isfinite().all()

    def test_one_sample_has_no_scatter_and_no_warning(self) -> None:
        sde = CLD()
        process = ReverseProcess(sde, RING.score(sde))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for weighted in (False, True):
                found = log_likelihood(
                    process, X, 0.1, importance_weighted=weighted, generator=seeded()
                )
                assert found.standard_error.isnan().all()
                assert found.standard_error.shape == (2,)

    @pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 1, 1), (1, 2)])
    def test_data_may_have_any_axes(self, shape: Any) -> None:
        dimension = math.prod(shape[1:])
        data = GaussianMixture([1.0], [[0.0] * dimension], torch.eye(dimension).unsqueeze(0))
        sde = CLD()
        process = ReverseProcess(sde, data.score(sde))
        x = torch.full(shape, 0.3, dtype=torch.float64)
        for start in ("perturb", "replace"):
            found = log_likelihood(process, x, 0.4, start=start, generator=seeded())
            assert found.log_prob.shape == (shape[0],)
            assert found.dimension == dimension


class TestBits:
    """Bits a dimension and dequantisation."""

    @pytest.mark.parametrize("dimension", [1, 7, 3072])
    def test_bytes_cost_eight_bits_less_what_is_known(self, dimension: int) -> None:
        # log₂ 256 and log₂ 128 are exact.
        log_prob = torch.tensor([0.0, math.log(2) * dimension], dtype=torch.float64)
        for width, bits in ((1.0, 0.0), (1 / 256, 8.0), (2 / 256, 7.0)):
            found = bits_per_dim(log_prob, dimension, width)
            expected = torch.tensor([bits, bits - 1], dtype=torch.float64)
            assert torch.allclose(found, expected, rtol=4 * EPS, atol=4 * EPS)

    def test_a_likelihood_converts_itself(self) -> None:
        log_prob = torch.tensor([-3.0, 5.0], dtype=torch.float64)
        unknown = torch.full((2,), math.nan)
        found = Likelihood(log_prob, unknown, is_bound=True, dimension=6, nfev=1)
        assert torch.equal(found.bits_per_dim(), bits_per_dim(log_prob, 6))
        assert torch.equal(found.bits_per_dim(2 / 256), bits_per_dim(log_prob, 6, 2 / 256))

    @pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (0.0, 256.0)])
    def test_a_density_that_is_constant_in_bins_counts_levels(
        self, low: float, high: float
    ) -> None:
        # p(level) = 2^−b: the density is p / width, and the bits come out as b in any scale.
        width = (high - low) / 256
        bits = torch.tensor([1.0, 3.0, 12.0], dtype=torch.float64)
        log_prob = -bits * math.log(2) - math.log(width)
        assert torch.allclose(bits_per_dim(log_prob, 1, width), bits, rtol=1e-14)

    def test_over_its_bin_a_density_averages_to_the_probability_of_the_level(self) -> None:
        # N(0, 0.3²) over 16 levels; 5 standard errors.
        n, level, scale = 20_000, 9, 0.3
        levels = torch.full((n,), level)
        x = dequantise(levels, count=16, generator=seeded()).double()
        density = (-0.5 * (x / scale) ** 2).exp() / (scale * math.sqrt(2 * math.pi))
        low, high = -1 + level / 8, -1 + (level + 1) / 8

        def below(value: float) -> float:
            return 0.5 * (1 + math.erf(value / (scale * math.sqrt(2))))

        probability = density.mean() * (2 / 16)
        error = abs(float(probability) - (below(high) - below(low)))
        assert error <= 5 * float(density.std()) / math.sqrt(n) * (2 / 16)
        # Jensen: bits of the density bound those of the level.
        bits = bits_per_dim(density.log(), 1, 2 / 16).mean()
        assert float(bits) >= -math.log2(below(high) - below(low)) - 1e-4

    @pytest.mark.parametrize(("count", "low", "high"), [(256, -1.0, 1.0), (2, 0.0, 1.0)])
    def test_levels_are_spread_evenly_over_their_bins(
        self, count: int, low: float, high: float
    ) -> None:
        n = 50_000
        levels = torch.randint(0, count, (n,), generator=seeded(1))
        x = dequantise(levels, count=count, low=low, high=high, generator=seeded())
        assert x.dtype == torch.float32
        shift = (x.double() - low) / (high - low) * count - levels
        # Single precision at 1 over a bin.
        rounding = count * 1.2e-7 * 2
        assert shift.min() >= -rounding
        assert shift.max() <= 1 + rounding
        for power in (1, 2, 3):
            values = shift**power
            error = abs(float(values.mean()) - 1 / (power + 1))
            assert error <= 5 * float(values.std()) / math.sqrt(n) + rounding
        # Independent of the level.
        correlation = float(torch.corrcoef(torch.stack([shift, levels.double()]))[0, 1])
        assert abs(correlation) <= 5 / math.sqrt(n)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
    @pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3, 4, 4)])
    def test_levels_may_have_any_shape(self, shape: Any, dtype: torch.dtype) -> None:
        levels = torch.full(shape, 255, dtype=torch.int64)
        x = dequantise(levels.clamp(max=127).to(dtype), generator=seeded())
        assert x.shape == shape
        assert x.dtype == torch.float32
        if x.numel():
            # Level 127 is the last below the middle.
            assert -2 / 256 - 1e-7 <= float(x.min()) <= float(x.max()) <= 1e-7

    def test_the_ends_of_the_scale_are_those_of_bytes(self) -> None:
        levels = torch.tensor([0, 255], dtype=torch.uint8).expand(1000, 2)
        x = dequantise(levels, generator=seeded())
        assert x.min() >= -1
        assert x.max() <= 1
        assert x[:, 0].max() <= -1 + 2 / 256
        assert x[:, 1].min() >= 1 - 2 / 256

    def test_a_seed_decides_the_noise(self) -> None:
        levels = torch.arange(8)
        assert torch.equal(
            dequantise(levels, generator=seeded()), dequantise(levels, generator=seeded())
        )
        assert not torch.equal(
            dequantise(levels, generator=seeded()), dequantise(levels, generator=seeded(1))
        )
        torch.manual_seed(3)
        first = dequantise(levels)
        assert not torch.equal(first, dequantise(levels))

    @pytest.mark.parametrize("levels", [torch.zeros(2), torch.zeros(2).cfloat(), [1, 2], None, 3])
    def test_levels_that_are_no_integers_are_refused(self, levels: Any) -> None:
        with pytest.raises(TypeError, match="levels must be a tensor of integers"):
            dequantise(levels)

    @pytest.mark.parametrize(
        ("levels", "options", "message"),
        [
            ([0, 256], {}, r"levels must lie in 0 … 255; got 0 to 256"),
            ([-1, 0], {}, "levels must lie in"),
            ([2], {"count": 2}, "levels must lie in"),
            ([0], {"count": 1}, "count must be"),
            ([0], {"low": 1.0, "high": 1.0}, "low"),
            ([0], {"low": 2.0, "high": 1.0}, "low"),
            ([0], {"low": -math.inf}, "low"),
            ([0], {"low": math.nan}, "low"),
            ([0], {"high": math.nan}, "low|high"),
            ([0], {"high": math.inf}, "low|high"),
        ],
    )
    def test_what_is_no_scale_is_refused(self, levels: Any, options: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            dequantise(torch.tensor(levels), **options)

    @pytest.mark.parametrize(
        ("dimension", "width"), [(0, 1.0), (-1, 1.0), (1, 0.0), (1, -1.0), (1, math.inf)]
    )
    def test_bits_of_nothing_are_refused(self, dimension: int, width: float) -> None:
        with pytest.raises(ValueError, match=r"dimension|bin_width"):
            bits_per_dim(torch.zeros(1), dimension, width)


def _process(name: str = "CLD") -> ReverseProcess:
    sde = PROCESSES[name]()
    return ReverseProcess(sde, RING.score(sde))


Z = torch.zeros(2, 2, 2, dtype=torch.float64)


class TestRefusals:
    """What has no likelihood."""

    @pytest.mark.parametrize("t", [-0.1, 1.0, 1.5, math.nan, math.inf])
    def test_times_that_leave_no_flow_are_refused(self, t: float) -> None:
        with pytest.raises(ValueError, match="t must lie in"):
            flow_log_prob(_process(), Z, t)
        for start in ("perturb", "replace"):
            with pytest.raises(ValueError, match="t_min must lie in"):
                log_likelihood(_process(), X, t, start=start)

    def test_data_have_no_time_to_start_from_at_zero(self) -> None:
        with pytest.raises(ValueError, match="t_min must lie in"):
            log_likelihood(_process(), X, 0.0)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_states_that_are_not_finite_are_refused(self, value: float) -> None:
        z, x = Z.clone(), X.clone()
        z[1, 0, 1] = x[1, 0] = value
        with pytest.raises(ValueError, match="must be finite"):
            flow_log_prob(_process(), z, 0.1)
        for start in ("perturb", "replace"):
            with pytest.raises(ValueError, match="finite"):
                log_likelihood(_process(), x, 0.1, start=start)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_score_that_is_not_finite_names_the_time(self, bad: float) -> None:
        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.where(t[:, None, None] > 0.5, bad, -z[:, 1:])

        with pytest.raises(FloatingPointError, match=r"not finite at t = 0\.[5-9]"):
            flow_log_prob(ReverseProcess(CLD(), score), Z, 0.25)
        constant = ReverseProcess(CLD(), lambda z, t: torch.full_like(z[:, 1:], bad))
        with pytest.raises(FloatingPointError, match=r"not finite at t = 0\.25"):
            flow_log_prob(constant, Z, 0.25)

    def test_a_score_whose_slope_is_not_finite_is_no_density(self) -> None:
        # √|v| has the value 0 and no slope at v = 0: the divergence is not finite.
        process = ReverseProcess(CLD(), lambda z, t: z[:, 1:].abs().sqrt())
        with pytest.raises((FloatingPointError, RuntimeError)):
            flow_log_prob(process, Z, 0.25)

    @pytest.mark.parametrize("limit", [1, 2, 7, 20])
    def test_too_few_evaluations_are_an_error(self, limit: int) -> None:
        score = Recorder(RING.score(CLD()))
        with pytest.raises(RuntimeError, match=f"max_nfev = {limit} evaluations"):
            flow_log_prob(ReverseProcess(CLD(), score), Z, 0.01, max_nfev=limit)
        assert len(score.times) == limit
        with pytest.raises(RuntimeError, match=f"max_nfev = {limit} evaluations"):
            log_likelihood(_process(), X, 0.01, max_nfev=limit)

    def test_as_many_evaluations_as_are_needed_are_enough(self) -> None:
        needed = flow_log_prob(_process(), Z, 0.1).nfev
        assert flow_log_prob(_process(), Z, 0.1, max_nfev=needed).nfev == needed
        with pytest.raises(RuntimeError, match="max_nfev"):
            flow_log_prob(_process(), Z, 0.1, max_nfev=needed - 1)

    @pytest.mark.parametrize("tol", [1e-50, 1e-300])
    def test_a_tolerance_below_rounding_is_an_error(self, tol: float) -> None:
        with pytest.raises(RuntimeError, match=r"cannot be met|max_nfev"):
            flow_log_prob(_process(), Z + 1, 0.1, rtol=tol, atol=tol, max_nfev=2000)

    @pytest.mark.parametrize("name", ["rtol", "atol"])
    @pytest.mark.parametrize("value", [0.0, -1e-5, math.nan, math.inf])
    def test_tolerances_are_positive(self, name: Any, value: float) -> None:
        with pytest.raises(ValueError, match=f"{name} must be"):
            flow_log_prob(_process(), Z, 0.1, **{name: value})
        with pytest.raises(ValueError, match=f"{name} must be"):
            log_likelihood(_process(), X, 0.1, **{name: value})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"divergence": "skilling"}, "divergence must be one of 'exact', 'hutchinson'"),
            ({"method": "rk4"}, "method must be one of 'dopri5'"),
            ({"method": "scipy_solver"}, "method must be one of"),
            ({"max_nfev": 0}, "max_nfev"),
        ],
    )
    def test_unknown_options_are_refused(self, options: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            flow_log_prob(_process(), Z, 0.1, **options)
        with pytest.raises(ValueError, match=message):
            log_likelihood(_process(), X, 0.1, **options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"start": "both"}, "start must be one of 'perturb', 'replace'"),
            ({"samples": 0}, "samples"),
            (
                {"importance_weighted": True, "divergence": "hutchinson"},
                "divergence must be 'exact' with importance_weighted=True",
            ),
        ],
    )
    def test_what_is_no_likelihood_is_refused(self, options: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            log_likelihood(_process(), X, 0.1, **options)

    @pytest.mark.parametrize(
        "sde",
        [
            CLD(velocity_scale=0.0),
            PSLD(velocity_scale=0.0),
            HOLD(auxiliary_scale=0.0),
            LinearSDE.from_matrices(
                [[-1.0, 1.0, 0.0], [-1.0, -1.0, 1.0], [0.0, -1.0, -1.0]],
                [[1.0], [1.0], [1.0]],
                initial_covariance=[[0, 0, 0], [0, 1.0, 0], [0, 0, 0]],
            ),
        ],
        ids=["CLD", "PSLD", "HOLD", "one of two"],
    )
    def test_velocities_that_start_at_rest_cannot_be_replaced(self, sde: LinearSDE) -> None:
        process = ReverseProcess(sde, RING.score(sde))
        with pytest.raises(ValueError, match="start='replace' needs auxiliary components"):
            log_likelihood(process, X, 0.1, start="replace")

    @pytest.mark.parametrize("shape", [(2, 1, 2), (2, 3, 2), (2,), (2, 2, 3)])
    def test_states_that_do_not_fit_are_refused(self, shape: Any) -> None:
        with pytest.raises(ValueError, match="got"):
            flow_log_prob(_process(), torch.zeros(shape), 0.1)

    @pytest.mark.parametrize("z", [torch.zeros(2, 2, 2, dtype=torch.int64), None, [[0.0]]])
    def test_states_of_another_type_are_refused(self, z: Any) -> None:
        with pytest.raises(TypeError, match="floating-point"):
            flow_log_prob(_process(), z, 0.1)

    @pytest.mark.parametrize(
        "x", [torch.zeros(2, 2, dtype=torch.int64), torch.zeros(()), None, [[0.0]]]
    )
    def test_data_of_another_type_are_refused(self, x: Any) -> None:
        with pytest.raises(TypeError, match="floating-point"):
            log_likelihood(_process(), x, 0.1)

    @pytest.mark.parametrize("x", [torch.zeros(2, 3), torch.zeros(2, 2, 2), torch.zeros(2)])
    def test_data_that_do_not_fit_are_refused(self, x: torch.Tensor) -> None:
        with pytest.raises(ValueError, match="got"):
            log_likelihood(_process(), x, 0.1)

    @pytest.mark.parametrize("process", [None, CLD(), RING.score(CLD())])
    def test_a_model_has_a_process_and_a_score(self, process: Any) -> None:
        with pytest.raises(TypeError, match="process must be a ReverseProcess; got"):
            flow_log_prob(process, Z, 0.1)
        with pytest.raises(TypeError, match="process must be a ReverseProcess; got"):
            log_likelihood(process, X, 0.1)

    def test_a_score_of_another_shape_is_refused(self) -> None:
        process = ReverseProcess(CLD(), lambda z, t: z)
        with pytest.raises(ValueError, match=r"score must return shape \(2, 1, 2\)"):
            flow_log_prob(process, Z, 0.1)

    def test_an_assertion_of_the_score_is_its_own(self) -> None:
        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            raise AssertionError("mine")

        with pytest.raises(AssertionError, match="mine"):
            flow_log_prob(ReverseProcess(CLD(), score), Z, 0.1)
