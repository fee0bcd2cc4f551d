"""Likelihoods by the probability flow: exact densities, and affine models in closed form."""

from __future__ import annotations

import math
from functools import lru_cache, partial
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
from cldsde.score import flow_log_prob, log_likelihood
from cldsde.score.flow_density import FlowDensity
from cldsde.score.likelihood import Likelihood
from probes import Recording, generator
from score.cases import assert_rejected, each, states
from tolerances import EPS, EPS32, rounding


def of_matrices(drift: Any, root: Any) -> LinearSDE:
    own = [[0.0, 0.0], [0.0, 0.1]]
    return LinearSDE.from_matrices(drift, root, 4.0, initial_covariance=own)


PROCESSES: dict[str, LinearSDE] = {
    "VP": VPSDE(),
    "sub-VP": SubVPSDE(),
    "VE": VESDE(0.05, 20.0),
    "CLD": CLD(),
    "CLD at rest": CLD(velocity_scale=0.0),
    "PSLD": PSLD(),
    "HOLD": HOLD(),
    "correlated": of_matrices([[-1.0, 2.0], [-1.0, -2.0]], [[0.7, 0.0], [0.9, 1.1]]),
    "noise in the data": of_matrices([[-2.0, 1.0], [-1.0, 0.0]], [[2.0], [0.0]]),
}
VP, CRITICAL = PROCESSES["VP"], PROCESSES["CLD"]

MEAN = np.array([0.3, -0.5])
COVARIANCE = np.array([[0.5, 0.3], [0.3, 0.4]])
GAUSSIAN = GaussianMixture([1.0], [MEAN.tolist()], [COVARIANCE.tolist()])
ANGLES = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
RING = GaussianMixture(
    [1.0] * 8, torch.stack([ANGLES.cos(), ANGLES.sin()], 1), 0.04 * torch.eye(2).expand(8, 2, 2)
)
LINE = GaussianMixture([0.3, 0.7], [[-1.0], [1.0]], [[[0.1]], [[0.2]]])
BIAS = nn.Parameter(torch.ones(2, dtype=torch.float64))
X = torch.tensor([[0.4, -0.8], [1.3, 0.2]], dtype=torch.float64)
Z = torch.zeros(2, 2, 2, dtype=torch.float64)

STAGES = {"dopri5": 6, "dopri8": 12, "bosh3": 3, "adaptive_heun": 2}
SOLVER = 4e-3  # `accuracy` of the default tolerances: 40 steps, numbers below 9
PERMUTED = 1e-9  # rounding, which each of 50 steps stretches by at most 10 (ratio of widths)


def ring(sde: LinearSDE = CRITICAL) -> ReverseProcess:
    return ReverseProcess(sde, RING.score(sde))


def accuracy(found: FlowDensity, tol: float, method: str = "dopri5") -> float:
    """Sum of the local errors of all steps for rtol = atol = tol.

    A step changes each number y by tol (1 + |y|) at most: in the integral directly, in the state
    times the score, which is no longer than the whitened state.
    """
    steps = found.nfev / STAGES[method]
    size = max(float(found.divergence.abs().max()), float(found.latent.abs().max()))
    return steps * tol * (1 + size)


def imperfect(sde: LinearSDE) -> ReverseProcess:
    """A model of `GAUSSIAN` with an affine score that is wrong at all times."""
    score, offset = GAUSSIAN.score(sde), torch.from_numpy(OFFSET)
    return ReverseProcess(sde, lambda z, t: SCALE * score(z, t) + offset.to(z))


SCALE, OFFSET = 0.99, np.array([0.3, -0.1])


def log_normal(residual: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Log-density of N(0, covariance) at residuals ``(B, k)``."""
    solved = np.linalg.solve(covariance, residual.T).T
    log_det = np.linalg.slogdet(2 * np.pi * covariance)[1]
    return -0.5 * (residual * solved).sum(1) - 0.5 * log_det


class Model(NamedTuple):
    """N(mean, covariance) of the state in each eigen-direction of the data's covariance."""

    means: np.ndarray  # (D, k)
    covariances: np.ndarray  # (D, k, k)
    axes: np.ndarray  # (D, D)

    def log_prob(self, z: torch.Tensor) -> np.ndarray:
        rotated = z.numpy() @ self.axes
        return sum(log_normal(rotated[:, :, j] - m, C) for j, (m, C) in enumerate(self.parts))

    @property
    def parts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return list(zip(self.means, self.covariances, strict=True))

    def directions(self, x: torch.Tensor) -> Any:
        """For each direction the data's entries ``(B,)``, the model's mean and covariance."""
        return ((x, *part) for x, part in zip((x.numpy() @ self.axes).T, self.parts, strict=True))


@lru_cache
def modelled(sde: LinearSDE, t: float) -> Model:
    """Distribution of z_t under `imperfect`, by ODEs for moments and flow map.

    The flow of an affine score is affine, z_T = X z_t + b, and the model's z_T is N(0, prior).
    """
    k = sde.components
    variances, axes = np.linalg.eigh(COVARIANCE)
    prior = sde.prior.covariance.numpy()
    means, covariances = [], []
    for variance, mean, shift in zip(variances, MEAN @ axes, OFFSET @ axes, strict=True):

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
            pull = 0.5 * SCALE * Q @ np.linalg.inv(S)
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
    return Model(np.array(means), np.array(covariances), axes)


class TestFlow:
    """`flow_log_prob` against densities known exactly."""

    @pytest.mark.parametrize(
        ("name", "t", "tol", "method"),
        [
            *((name, 0.1, 1e-5, "dopri5") for name in PROCESSES),
            ("VP", 0.01, 1e-8, "dopri5"),
            ("CLD", 0.0, 1e-6, "dopri5"),
            ("CLD", 0.3, 1e-8, "dopri8"),
            ("CLD", 0.3, 1e-4, "bosh3"),
            ("CLD", 0.3, 1e-4, "adaptive_heun"),
        ],
    )
    def test_the_density_changes_as_the_density_of_the_data(
        self, name: str, t: float, tol: float, method: str
    ) -> None:
        sde = PROCESSES[name]
        z = states(sde, RING, t, n=3)
        found = flow_log_prob(ring(sde), z, t, rtol=tol, atol=tol, method=method)
        change = RING.log_prob(sde, z, t) - RING.log_prob(sde, found.latent, 1.0)
        assert (found.divergence - change).abs().max() <= accuracy(found, tol, method)
        # The prior of the model is not p_T.
        prior = sde.prior.log_prob(found.latent)
        assert torch.equal(found.log_prob, prior + found.divergence)

    @pytest.mark.parametrize("name", PROCESSES)
    def test_the_density_of_an_affine_model_is_normal(self, name: str) -> None:
        sde, t, tol = PROCESSES[name], 1e-3, 1e-6
        z = states(sde, GAUSSIAN, t, n=3)
        found = flow_log_prob(imperfect(sde), z, t, rtol=tol, atol=tol)
        error = np.abs(found.log_prob.numpy() - modelled(sde, t).log_prob(z)).max()
        assert error <= accuracy(found, tol)

    @pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
    @pytest.mark.parametrize(
        ("score", "slope"),
        [
            (lambda z: -2 * z[:, -1:] + 30 * z[:, :-1].sum(1, keepdim=True), -2.0),
            (lambda z: BIAS.expand_as(z[:, -1:]), 0.0),
        ],
    )
    @pytest.mark.parametrize("name", ["CLD", "HOLD"])
    def test_the_divergence_has_the_slopes_of_the_driven_rows(
        self, name: str, score: Any, slope: float, divergence: Any
    ) -> None:
        sde, t = PROCESSES[name], 0.5
        process = ReverseProcess(sde, lambda z, t: score(z))
        found = flow_log_prob(process, states(sde, RING, t, n=3), t, divergence=divergence)
        G = sde.diffusion(t)
        rate = 2 * (float(sde.drift(t).trace()) - 0.5 * slope * float((G @ G.mT)[-1, -1]))
        # β is constant, and a Runge-Kutta method exact for a constant integrand.
        expected = torch.full((3,), 0.5 * rate, dtype=torch.float64)
        assert torch.allclose(found.divergence, expected, rtol=rounding(1000), atol=0)

    def test_many_dimensions_are_traced_in_parts(self) -> None:
        # More rows than are pulled back at once, and no multiple of it.
        size, t = 150, 0.2
        weights = torch.linspace(0.5, 2.0, size, dtype=torch.float64)
        z = torch.randn(2, 1, size, generator=generator(), dtype=torch.float64)
        found = flow_log_prob(ReverseProcess(VP, lambda z, t: -weights * z), z, t)
        # −½β D + ½β Σ weights, integrated.
        clock = 0.1 * 0.8 + 0.5 * 19.9 * (1 - 0.2**2)
        exact = 0.5 * clock * (float(weights.sum()) - size)
        expected = torch.full((2,), exact, dtype=torch.float64)
        assert torch.allclose(found.divergence, expected, rtol=rounding(1000), atol=0)

    def test_a_difficult_sample_keeps_its_accuracy_in_a_batch(self) -> None:
        # The error of the sample far out must not be averaged over the batch.
        t, tol = 0.01, 1e-5
        data = GaussianMixture([0.5, 0.5], [[-2.0], [2.0]], [[[1e-3]], [[1.0]]])
        process = ReverseProcess(VP, data.score(VP))
        z = torch.full((400, 1, 1), 2.0, dtype=torch.float64)
        z[0] = -1.9
        found = flow_log_prob(process, z, t, rtol=tol, atol=tol)
        change = data.log_prob(VP, z, t) - data.log_prob(VP, found.latent, 1.0)
        assert (found.divergence - change).abs().max() <= accuracy(found, tol)
        assert found.nfev >= flow_log_prob(process, z[:1], t, rtol=tol, atol=tol).nfev

    def test_samples_do_not_depend_on_their_batch(self) -> None:
        t, tol, order = 0.02, 1e-6, torch.tensor([3, 0, 5, 1, 4, 2])
        z = states(CRITICAL, RING, t, n=6)
        found, moved, part = (
            flow_log_prob(ring(), batch, t, rtol=tol, atol=tol) for batch in (z, z[order], z[2:3])
        )
        assert torch.allclose(moved.log_prob, found.log_prob[order], rtol=0, atol=PERMUTED)
        assert moved.nfev == found.nfev
        # Other steps, which meet the same tolerance.
        tolerance = accuracy(found, tol) + accuracy(part, tol)
        assert abs(float(part.log_prob - found.log_prob[2])) <= tolerance


class TestHutchinson:
    @pytest.mark.parametrize(("name", "data"), [("VP", RING), ("CLD", RING), ("PSLD", LINE)])
    def test_the_mean_over_all_signs_is_the_trace(self, name: str, data: GaussianMixture) -> None:
        # Two driven numbers have two pairs of opposite vectors, and opposite ones one value.
        # Vectors for more components, or drawn anew on the path, would give more values.
        sde, t, tol = PROCESSES[name], 0.05, 1e-6
        z, process = states(sde, data, t, n=1), ReverseProcess(sde, data.score(sde))
        exact = flow_log_prob(process, z, t, rtol=tol, atol=tol)
        options: Any = {"divergence": "hutchinson", "rtol": tol, "atol": tol}
        many = flow_log_prob(process, z.expand(32, -1, -1), t, generator=generator(), **options)
        tolerance = accuracy(exact, tol) + accuracy(many, tol)
        low, high = many.divergence.min(), many.divergence.max()
        assert high - low > 10 * tolerance
        nearest = torch.minimum(many.divergence - low, high - many.divergence)
        assert nearest.max() <= tolerance
        assert abs(float((low + high) / 2 - exact.divergence)) <= tolerance
        assert 0.5 <= many.nfev / exact.nfev <= 2


class TestEvaluations:
    """Times, dtypes and number of the evaluations of the score."""

    @pytest.mark.parametrize(
        ("name", "divergence", "dtype"),
        [
            ("VP", "hutchinson", torch.float32),
            ("CLD", "exact", torch.float32),
            ("CLD", "exact", torch.float64),
        ],
    )
    def test_every_evaluation_is_counted_and_within_the_interval(
        self, name: str, divergence: Any, dtype: torch.dtype
    ) -> None:
        sde, t = PROCESSES[name], 0.01
        score, z = Recording(RING.score(sde)), states(sde, RING, t, n=3).to(dtype)
        found = flow_log_prob(ReverseProcess(sde, score), z, t, divergence=divergence)
        assert score.calls == found.nfev
        times = torch.stack(score.times)
        assert times.dtype == dtype
        assert all(state.dtype == dtype for state in score.states)
        assert times.min() == torch.tensor(t, dtype=dtype)
        # The last stage is at T, or one rounding before it.
        assert 1 - EPS <= times.max() <= 1
        assert (times == times[:, :1]).all()
        assert found.log_prob.dtype == found.latent.dtype == torch.float64
        assert torch.equal(score.states[0], z)

    @pytest.mark.parametrize("t", [0.0, 0.999])
    def test_a_long_first_step_does_not_leave_the_interval(self, t: float) -> None:
        # So slow a flow that the solver probes at t + 0.01 |z| / |velocity| = t + 10.
        sde = LinearSDE.from_matrices([[-1e-3]], [[1e-2]], prior_covariance=[[1.0]])
        score = Recording(lambda z, t: -z)
        z = torch.ones(2, 1, 1, dtype=torch.float64)
        flow_log_prob(ReverseProcess(sde, score), z, t, rtol=1.0, atol=1.0)
        times = torch.stack(score.times)
        assert t <= times.min() <= times.max() <= 1

    def test_the_likelihood_counts_evaluations_of_a_batch(self) -> None:
        score = Recording(RING.score(CRITICAL))
        found = log_likelihood(ReverseProcess(CRITICAL, score), X, 0.1, samples=3)
        assert found.nfev == score.calls
        assert all(len(state) == 6 for state in score.states)

    def test_the_result_has_no_gradients_and_needs_no_gradient_mode(self) -> None:
        network = nn.Linear(2, 2).double()
        process = ReverseProcess(CRITICAL, lambda z, t: network(z[:, 1:]) - z[:, 1:])
        z = states(CRITICAL, RING, 0.1).requires_grad_()
        found = flow_log_prob(process, z, 0.1)
        assert not found.log_prob.requires_grad
        assert not found.latent.requires_grad
        assert network.weight.grad is None
        assert z.grad is None
        with torch.no_grad():
            assert torch.equal(flow_log_prob(process, z, 0.1).log_prob, found.log_prob)

    def test_single_precision_data_lose_single_precision(self) -> None:
        x = X.float()
        found, expected = (
            log_likelihood(ring(VP), data, 0.01, start="replace").log_prob
            for data in (x, x.double())
        )
        assert found.dtype == torch.float64
        # Roundings of slopes below 1/0.04 over B = 10, and the solver's own error.
        assert torch.allclose(found, expected, rtol=0, atol=1000 * EPS32 + SOLVER)

    @pytest.mark.parametrize(("name", "start"), [("VP", "replace"), ("CLD", "perturb")])
    def test_an_empty_batch_is_not_evaluated(self, name: str, start: Any) -> None:
        score = Recording(RING.score(PROCESSES[name]))
        process = ReverseProcess(PROCESSES[name], score)
        found = log_likelihood(process, X[:0], 0.01, start=start, samples=2)
        assert found.log_prob.shape == found.standard_error.shape == (0,)
        assert found.nfev == score.calls == 0
        assert found.bits_per_dim().shape == (0,)

    @pytest.mark.parametrize("axes", [(), (2,), (1, 2), (2, 1, 1)])
    def test_data_may_have_any_axes(self, axes: Any) -> None:
        size = math.prod(axes)
        data = GaussianMixture([1.0], [[0.2] * size], 0.3 * torch.eye(size).unsqueeze(0))
        process = ReverseProcess(CRITICAL, data.score(CRITICAL))
        z = states(CRITICAL, data, 0.5, n=3)
        flat, found = (flow_log_prob(process, s, 0.5) for s in (z, z.reshape(3, 2, *axes)))
        assert found.latent.shape == (3, 2, *axes)
        assert torch.equal(found.log_prob, flat.log_prob)
        for start in ("perturb", "replace"):
            found = log_likelihood(process, z[:, 0].reshape(3, *axes), 0.5, start=start)
            assert found.log_prob.shape == (3,)
            assert found.dimension == size


def assert_mean(found: Likelihood, expected: np.ndarray) -> None:
    """Within 4 standard errors, and the solver's error."""
    error = np.abs(found.log_prob.numpy() - expected)
    assert (error <= 4 * found.standard_error.numpy() + SOLVER).all()


class TestReplaced:
    """The data taken for the model's x at t_min."""

    @pytest.mark.parametrize("name", ["VP", "VE"])
    def test_without_auxiliary_components_it_is_a_value(self, name: str) -> None:
        sde, t, tol = PROCESSES[name], 1e-3, 1e-6
        found = log_likelihood(imperfect(sde), X, t, start="replace", rtol=tol, atol=tol)
        flow = flow_log_prob(imperfect(sde), X.unsqueeze(1), t, rtol=tol, atol=tol)
        expected = modelled(sde, t).log_prob(X.unsqueeze(1))
        assert np.abs(found.log_prob.numpy() - expected).max() <= accuracy(flow, tol)
        assert found.is_bound is False
        assert found.dimension == 2
        assert found.standard_error.isnan().all()

    @pytest.mark.parametrize("name", ["CLD", "HOLD", "correlated"])
    def test_with_auxiliary_components_it_is_a_bound(self, name: str) -> None:
        sde, t = PROCESSES[name], 1e-3
        found = log_likelihood(
            imperfect(sde), X, t, start="replace", samples=300, generator=generator()
        )
        r = sde.initial_covariance.numpy()[1:, 1:]
        value, mean = np.zeros(2), np.zeros(2)
        for x, mu, C in modelled(sde, t).directions(X):
            value += log_normal((x - mu[0])[:, None], C[:1, :1])
            # E log p(x, v) − E log r(v).
            centre = np.column_stack([x, np.zeros((2, len(r)))]) - mu
            mean += log_normal(centre, C) - 0.5 * np.trace(np.linalg.solve(C[1:, 1:], r))
            schur = C[1:, 1:] - np.outer(C[1:, 0], C[0, 1:]) / C[0, 0]
            mean += 0.5 * np.trace(np.linalg.solve(C[1:, 1:], r) - np.linalg.solve(schur, r))
            mean += 0.5 * (np.linalg.slogdet(2 * np.pi * r)[1] + len(r))
        assert found.is_bound is True
        assert_mean(found, mean)
        assert (mean < value).all()

    @pytest.mark.parametrize(
        "sde", [CLD(velocity_scale=1.0), HOLD(auxiliary_scale=1.0)], ids=["CLD", "HOLD"]
    )
    def test_weighted_by_importance_it_tends_to_the_value(self, sde: LinearSDE) -> None:
        # v starts with the width that it has under the model, so that weights have a variance.
        t, value = 1e-3, np.zeros(2)
        found = log_likelihood(
            imperfect(sde),
            X,
            t,
            start="replace",
            samples=300,
            importance_weighted=True,
            generator=generator(),
        )
        for x, mu, C in modelled(sde, t).directions(X):
            value += log_normal((x - mu[0])[:, None], C[:1, :1])
        assert_mean(found, value)

    def test_the_standard_error_is_the_scatter_of_the_samples(self) -> None:
        t, n = 1e-3, 4000
        x, data = X[:, :1], GaussianMixture([1.0], [[0.3]], [[[0.5]]])
        process = ReverseProcess(CRITICAL, data.score(CRITICAL))
        found = log_likelihood(process, x, t, start="replace", samples=n, generator=generator())
        # v given x is normal, and log w = a n² + b n + c in the normal n of v, of variance
        # 2a² + b². The model is p_t but for its prior, which changes it by 1e-3 or so.
        kernel = CRITICAL.marginal(t)
        psi = kernel.mean[:, 0]
        C = kernel.covariance + 0.5 * torch.outer(psi, psi)
        gain = C[1, 0] / C[0, 0]
        mean = 0.3 * psi[1] + gain * (x[:, 0] - 0.3 * psi[0])
        variance = C[1, 1] - gain * C[0, 1]
        r = float(CRITICAL.initial_covariance[1, 1])
        a, b = 0.5 * (1 - r / variance), math.sqrt(r) * mean / variance
        expected = (2 * a**2 + b**2).sqrt() / math.sqrt(n)
        # A standard deviation scatters by √(kurtosis/4n), for χ² below √(15/4n) = 3 %: five times.
        assert torch.allclose(found.standard_error, expected, rtol=0.16, atol=0)


class TestPerturbed:
    """States drawn from the forward process, and decoded."""

    @pytest.mark.parametrize(
        ("name", "weighted"),
        [
            *((name, False) for name in ("VP", "CLD", "CLD at rest", "HOLD", "correlated")),
            *((name, True) for name in ("VP", "CLD", "noise in the data")),
        ],
    )
    def test_weights_have_the_density_for_mean_and_their_logarithms_a_bound(
        self, name: str, weighted: bool
    ) -> None:
        sde, t = PROCESSES[name], 1e-3
        found = log_likelihood(
            imperfect(sde),
            X,
            t,
            samples=300,
            importance_weighted=weighted,
            generator=generator(),
        )
        kernel = sde.marginal(t)
        psi, sigma = kernel.mean[:, 0].numpy(), kernel.covariance.numpy()
        solved = np.linalg.solve(sigma, psi)
        information = float(psi @ solved)
        g, value, bound = solved / information, np.zeros(2), np.zeros(2)
        for x, mu, C in modelled(sde, t).directions(X):
            # x̃ = g·z under the model, and the decoder's noise.
            spread = np.array([[g @ C @ g + 1 / information]])
            value += log_normal((x - g @ mu)[:, None], spread)
            bound += log_normal(np.outer(x, psi) - mu, C)
            bound -= 0.5 * np.trace(np.linalg.solve(C, sigma))
            # The entropy of q and the decoder.
            bound += 0.5 * (np.linalg.slogdet(2 * np.pi * sigma)[1] + len(psi))
            bound += 0.5 * (np.log(information / (2 * np.pi)) - 1)
        assert found.is_bound is True
        assert (bound < value).all()
        assert_mean(found, value if weighted else bound)

    def test_by_default_it_is_the_density_of_a_mixture_but_for_the_prior(self) -> None:
        process = ring(VP)
        found = log_likelihood(
            process, X, samples=300, importance_weighted=True, generator=generator()
        )
        point = LinearSDE.from_matrices([[0.0]], [[1.0]])
        exact = RING.log_prob(point, X.unsqueeze(1), 0.0)
        # |log p_T − log prior| ≤ c |w| |x_0| + c² |x_0|²/2, c = ψ/σ at T, for |x_0| < 2.5. Decoding
        # adds 2/I = 2e-6 to a variance of 0.04: times the Laplacian, (|x − m|/0.04)² < 1e3.
        c = float(VP.marginal(1.0).mean)
        w = float(2 * flow_log_prob(process, X.unsqueeze(1), 1e-5).latent.norm(dim=-1).max())
        allowed = 2.5 * c * w + 0.5 * (2.5 * c) ** 2 + SOLVER + 2e-3
        assert ((found.log_prob - exact).abs() <= allowed + 4 * found.standard_error).all()

    def test_samples_stay_with_their_datum(self) -> None:
        process = ReverseProcess(CRITICAL, GAUSSIAN.score(CRITICAL))
        x = torch.tensor([[0.3, -0.5], [6.0, 6.0], [0.3, -0.5]], dtype=torch.float64)
        found = log_likelihood(process, x, 0.01, samples=20, generator=generator()).log_prob
        assert found[1] < min(found[0], found[2]) - 20

    @pytest.mark.parametrize(
        ("name", "start", "divergence"),
        [("CLD", "perturb", "exact"), ("CLD", "replace", "exact"), ("VP", "replace", "hutchinson")],
    )
    def test_a_seed_decides_all_noise(self, name: str, start: Any, divergence: Any) -> None:
        first, again, other = (
            log_likelihood(
                ring(PROCESSES[name]),
                X,
                0.4,
                start=start,
                divergence=divergence,
                generator=generator(seed),
            ).log_prob
            for seed in (0, 0, 1)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    @pytest.mark.parametrize("weighted", [False, True])
    def test_one_sample_has_no_scatter(self, weighted: bool) -> None:
        found = log_likelihood(ring(), X, 0.1, importance_weighted=weighted)
        assert found.standard_error.shape == (2,)
        assert found.standard_error.isnan().all()


AT_REST = LinearSDE.from_matrices(
    [[-1.0, 1.0, 0.0], [-1.0, -1.0, 1.0], [0.0, -1.0, -1.0]],
    [[1.0], [1.0], [1.0]],
    initial_covariance=[[0, 0, 0], [0, 1.0, 0], [0, 0, 0]],
)


def of_flow(**changes: Any) -> Any:
    return flow_log_prob(**{"process": ring(), "z": Z, "t": 0.1, **changes})


def of_data(**changes: Any) -> Any:
    return log_likelihood(**{"process": ring(), "x0": X, "t_min": 0.1, **changes})


NAN, INF = math.nan, math.inf
BOTH: list[tuple[Any, dict[str, Any], str]] = [
    (ValueError, {"rtol": 0.0}, "rtol must be"),
    (ValueError, {"atol": NAN}, "atol must be"),
    (ValueError, {"divergence": "skilling"}, "divergence must be one of 'exact', 'hutchinson'"),
    (ValueError, {"method": "rk4"}, "method must be one of 'dopri5'"),
    (ValueError, {"max_nfev": 0}, "max_nfev"),
    (RuntimeError, {"max_nfev": 7}, "max_nfev = 7 evaluations"),
    (TypeError, {"process": None}, "process must be a ReverseProcess; got"),
]
WEIGHTED = partial(of_data, importance_weighted=True, divergence="hutchinson")
REPLACED = partial(of_data, start="replace")
RESTING = [ring(sde) for sde in (CLD(velocity_scale=0.0), HOLD(auxiliary_scale=0.0), AT_REST)]
REJECTED = [
    *((partial(f, **options), error, m) for f in (of_flow, of_data) for error, options, m in BOTH),
    *each(of_flow, ValueError, "t must lie in", t=[-0.1, 1.0, NAN]),
    *each(of_data, ValueError, "t_min must lie in", t_min=[0.0, 1.0, NAN]),
    *each(of_flow, ValueError, "z must be finite", z=[Z + NAN, Z - INF]),
    *each(of_data, ValueError, "must be finite", x0=[X + NAN, X - INF]),
    *each(of_flow, ValueError, "got", z=map(torch.zeros, [(2, 1, 2), (2,), (2, 2, 3)])),
    *each(of_data, ValueError, "got", x0=map(torch.zeros, [(2, 3), (2, 2, 2), (2,)])),
    *each(of_flow, TypeError, "floating-point", z=[Z.long(), None, [[0.0]]]),
    *each(of_data, TypeError, "floating-point", x0=[X.long(), X[0, 0], None]),
    (partial(of_data, x0=X[:, :0]), ValueError, "at least one number per data point"),
    (partial(of_data, start="both"), ValueError, "start must be one of 'perturb', 'replace'"),
    *each(of_data, ValueError, "samples must be", samples=[0, True, 1.0]),
    (WEIGHTED, ValueError, "divergence must be 'exact' with importance_weighted=True"),
    *each(REPLACED, ValueError, "needs auxiliary", process=RESTING),
]


@pytest.mark.parametrize(("call", "error", "message"), REJECTED)
def test_bad_arguments_are_rejected(call: Any, error: Any, message: str) -> None:
    assert_rejected(call, error, message)


class TestFailures:
    """Scores without a likelihood, and tolerances that cannot be met."""

    @pytest.mark.parametrize(
        ("score", "error", "message"),
        [
            (lambda z, t: z, ValueError, r"score must return shape \(2, 1, 2\)"),
            (lambda z, t: -z[:, 1:].detach(), ValueError, "differentiable in the state"),
            (lambda z, t: z[:, 1:] * NAN, FloatingPointError, r"not finite at t = 0\.25"),
            (
                lambda z, t: torch.where(t[:, None, None] > 0.5, INF, -z[:, 1:]),
                FloatingPointError,
                r"not finite at t = 0\.[5-9]",
            ),
            # √|v| has the value 0 and no slope at v = 0.
            (lambda z, t: z[:, 1:].abs().sqrt(), RuntimeError, "cannot be met"),
        ],
    )
    def test_unusable_scores_are_errors(self, score: Any, error: Any, message: str) -> None:
        assert_rejected(
            partial(of_flow, process=ReverseProcess(CRITICAL, score), t=0.25), error, message
        )

    def test_assertions_of_the_score_are_passed_on(self) -> None:
        def score(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            raise AssertionError("mine")

        with pytest.raises(AssertionError, match="mine"):
            of_flow(process=ReverseProcess(CRITICAL, score))

    def test_the_limit_of_evaluations_is_exact(self) -> None:
        needed = of_flow().nfev
        assert of_flow(max_nfev=needed).nfev == needed
        score = Recording(RING.score(CRITICAL))
        with pytest.raises(RuntimeError, match=f"max_nfev = {needed - 1} evaluations"):
            of_flow(process=ReverseProcess(CRITICAL, score), max_nfev=needed - 1)
        assert score.calls == needed - 1

    @pytest.mark.parametrize("tol", [1e-50, 1e-300])
    def test_a_tolerance_below_rounding_is_an_error(self, tol: float) -> None:
        with pytest.raises(RuntimeError, match=r"cannot be met|max_nfev"):
            of_flow(z=Z + 1, rtol=tol, atol=tol, max_nfev=2000)
