"""Likelihoods by the probability flow, dequantisation, and bits per dimension."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from cldsde import CLD, HOLD, VPSDE, GaussianMixture, LinearSDE, ReverseProcess
from cldsde.score import bits_per_dim, dequantise, flow_log_prob, log_likelihood
from cldsde.score.likelihood import Likelihood
from probes import Recording, generator
from score.cases import PROCESSES, TWO, states
from tolerances import EPS, EPS32, rounding, standard_error

CRITICAL, VP = PROCESSES["CLD"], PROCESSES["VP"]
NAMES = ["sub-VP", "VE", "PSLD", "HOLD", "first of two driven", "first and last driven"]

MEAN = np.array([0.3, -0.5])
COVARIANCE = np.array([[0.5, 0.3], [0.3, 0.4]])
GAUSSIAN = GaussianMixture([1.0], [MEAN.tolist()], [COVARIANCE.tolist()])
ANGLES = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
RING = GaussianMixture(
    [1.0] * 8, torch.stack([ANGLES.cos(), ANGLES.sin()], 1), 0.04 * torch.eye(2).expand(8, 2, 2)
)
LINE = GaussianMixture([0.3, 0.7], [[-1.0], [1.0]], [[[0.1]], [[0.2]]])
X = torch.tensor([[0.4, -0.8], [1.3, 0.2]], dtype=torch.float64)

STAGES = {"dopri5": 6, "dopri8": 12, "bosh3": 3, "adaptive_heun": 2}
SOLVER = 4e-3  # `accuracy` of the default tolerances: 40 steps, numbers below 9
COARSE = 10 * SOLVER  # of ten times these tolerances


def ring(sde=CRITICAL):
    return ReverseProcess(sde, RING.score(sde))


def accuracy(found, tol, method="dopri5"):
    """Sum of the local errors of all steps for rtol = atol = tol.

    A step changes each number y by tol (1 + |y|) at most: in the integral directly, in the state
    times the score, which is no longer than the whitened state.
    """
    size = max(float(found.divergence.abs().max()), float(found.latent.abs().max()))
    return found.nfev / STAGES[method] * tol * (1 + size)


class TestFlow:
    @pytest.mark.one_in(3)
    @pytest.mark.parametrize(
        ("name", "t", "tol", "method"),
        [
            *((name, 0.3, 1e-5, "dopri5") for name in NAMES),
            ("VP", 0.01, 1e-7, "dopri5"),
            ("CLD", 0.0, 1e-5, "dopri5"),
            ("CLD", 0.5, 1e-8, "dopri8"),
            ("CLD", 0.5, 1e-4, "bosh3"),
            ("CLD", 0.5, 1e-4, "adaptive_heun"),
        ],
    )
    def test_the_density_changes_as_the_density_of_the_data(self, name, t, tol, method):
        sde = PROCESSES[name]
        z = states(sde, RING, t, n=3)
        found = flow_log_prob(ring(sde), z, t, rtol=tol, atol=tol, method=method)
        change = RING.log_prob(sde, z, t) - RING.log_prob(sde, found.latent, 1.0)
        assert (found.divergence - change).abs().max() <= accuracy(found, tol, method)
        # The prior of the model is not p_T.
        assert torch.equal(found.log_prob, sde.prior.log_prob(found.latent) + found.divergence)

    def test_many_dimensions_are_traced_in_parts(self):
        # More rows than are pulled back at once, and no multiple of it.
        size, t = 150, 0.2
        weights = torch.linspace(0.5, 2.0, size, dtype=torch.float64)
        z = torch.randn(2, 1, size, generator=generator(), dtype=torch.float64)
        found = flow_log_prob(ReverseProcess(VP, lambda z, t: -weights * z), z, t)
        # −½β D + ½β Σ weights, integrated.
        clock = 0.1 * 0.8 + 0.5 * 19.9 * (1 - 0.2**2)
        expected = torch.full_like(found.divergence, 0.5 * clock * (float(weights.sum()) - size))
        assert torch.allclose(found.divergence, expected, rtol=rounding(1000), atol=0)

    def test_a_difficult_sample_keeps_its_accuracy_in_a_batch(self):
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

    @pytest.mark.parametrize(("name", "data"), [("VP", RING), ("PSLD", LINE)])
    def test_the_mean_over_all_signs_is_the_trace(self, name, data):
        # Two driven numbers have two pairs of opposite vectors, and opposite ones one value.
        # Vectors for more components, or drawn anew on the path, would give more values.
        sde, t, tol = PROCESSES[name], 0.2, 1e-4
        z, process = states(sde, data, t, n=1), ReverseProcess(sde, data.score(sde))
        exact = flow_log_prob(process, z, t, rtol=tol, atol=tol)
        options = {"divergence": "hutchinson", "rtol": tol, "atol": tol}
        many = flow_log_prob(process, z.expand(32, -1, -1), t, generator=generator(), **options)
        tolerance = accuracy(exact, tol) + accuracy(many, tol)
        low, high = many.divergence.min(), many.divergence.max()
        assert high - low > 10 * tolerance
        nearest = torch.minimum(many.divergence - low, high - many.divergence)
        assert nearest.max() <= tolerance
        assert abs(float((low + high) / 2 - exact.divergence)) <= tolerance
        assert 0.5 <= many.nfev / exact.nfev <= 2


class TestEvaluations:
    @pytest.mark.covering
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(("name", "divergence"), [("VP", "hutchinson"), ("CLD", "exact")])
    def test_every_evaluation_is_counted_and_within_the_interval(self, name, divergence, dtype):
        sde, t = PROCESSES[name], 0.1
        score, z = Recording(RING.score(sde)), states(sde, RING, t, n=3).to(dtype)
        options = {"divergence": divergence, "rtol": 1e-3, "atol": 1e-3}
        found = flow_log_prob(ReverseProcess(sde, score), z, t, **options)
        assert score.calls == found.nfev
        times = torch.stack(score.times)
        assert {x.dtype for x in [times, *score.states]} == {dtype}
        assert times.min() == torch.tensor(t, dtype=dtype)
        # The last stage is at T, or one rounding before it.
        assert 1 - EPS <= times.max() <= 1
        assert (times == times[:, :1]).all()
        assert found.log_prob.dtype == found.latent.dtype == torch.float64
        assert torch.equal(score.states[0], z)

    @pytest.mark.parametrize("t", [0.0, 0.999])
    def test_a_long_first_step_does_not_leave_the_interval(self, t):
        # So slow a flow that the solver probes at t + 0.01 |z| / |velocity| = t + 10.
        sde = LinearSDE.from_matrices([[-1e-3]], [[1e-2]], prior_covariance=[[1.0]])
        score = Recording(lambda z, t: -z)
        z = torch.ones(2, 1, 1, dtype=torch.float64)
        flow_log_prob(ReverseProcess(sde, score), z, t, rtol=1.0, atol=1.0)
        times = torch.stack(score.times)
        assert t <= times.min() <= times.max() <= 1

    def test_the_result_has_no_gradients_and_needs_no_gradient_mode(self):
        network = nn.Linear(2, 2).double()
        process = ReverseProcess(CRITICAL, lambda z, t: network(z[:, 1:]) - z[:, 1:])
        z = states(CRITICAL, RING, 0.1).requires_grad_()
        found = flow_log_prob(process, z, 0.1)
        assert not any(x.requires_grad for x in (found.log_prob, found.latent))
        assert network.weight.grad is z.grad is None
        with torch.no_grad():
            assert torch.equal(flow_log_prob(process, z, 0.1).log_prob, found.log_prob)

    def test_the_limit_of_evaluations_is_exact(self):
        z, coarse = torch.zeros(2, 2, 2, dtype=torch.float64), {"rtol": 1e-3, "atol": 1e-3}
        needed = flow_log_prob(ring(), z, 0.8, **coarse).nfev
        assert flow_log_prob(ring(), z, 0.8, max_nfev=needed, **coarse).nfev == needed
        score = Recording(RING.score(CRITICAL))
        with pytest.raises(RuntimeError, match=f"max_nfev = {needed - 1} evaluations"):
            flow_log_prob(ReverseProcess(CRITICAL, score), z, 0.8, max_nfev=needed - 1, **coarse)
        assert score.calls == needed - 1


def process_of(drift, root, beta):
    own = [[0.0, 0.0], [0.0, 0.1]]
    return LinearSDE.from_matrices(drift, root, beta, initial_covariance=own)


# Processes that forget their data but for e^-10: then the model is p_t itself.
FORGETFUL = {
    "VP": VPSDE(0.1, 40.0),
    "CLD": CLD(8.0),
    "CLD at rest": CLD(8.0, velocity_scale=0.0),
    "HOLD": HOLD(8.0),
    "CLD, γ = 1": CLD(8.0, velocity_scale=1.0),
    "correlated": process_of([[-1.0, 2.0], [-1.0, -2.0]], [[0.7, 0.0], [0.9, 1.1]], 8.0),
    "noise in the data": process_of([[-2.0, 1.0], [-1.0, 0.0]], [[2.0], [0.0]], 16.0),
}
WEIGHTED = ["CLD", "noise in the data"]  # by importance
T_MIN, SAMPLES = 1e-3, 100


def likelihood(name, x=X, data=GAUSSIAN, samples=SAMPLES, **options):
    sde, options = FORGETFUL[name], {"rtol": 1e-4, "atol": 1e-4, **options}
    process = ReverseProcess(sde, data.score(sde))
    return log_likelihood(process, x, T_MIN, samples=samples, generator=generator(), **options)


def directions(name):
    """The data's entries (B,), and mean and covariance of the state, in each eigen-direction."""
    variances, axes = np.linalg.eigh(COVARIANCE)
    kernel = FORGETFUL[name].marginal(T_MIN)
    psi, sigma = kernel.mean[:, 0].numpy(), kernel.covariance.numpy()
    for x, mean, variance in zip((X.numpy() @ axes).T, MEAN @ axes, variances, strict=True):
        yield x, mean * psi, sigma + variance * np.outer(psi, psi)


def log_normal(residual, covariance):
    """Log-density of N(0, covariance) at residuals ``(B, k)``."""
    solved = np.linalg.solve(covariance, residual.T).T
    log_det = np.linalg.slogdet(2 * np.pi * covariance)[1]
    return -0.5 * (residual * solved).sum(1) - 0.5 * log_det


def assert_mean(found, expected):
    """Within 4 standard errors, and the solver's error."""
    error = np.abs(found.log_prob.numpy() - expected)
    assert (error <= 4 * found.standard_error.numpy() + COARSE).all()


class TestReplaced:
    """The data taken for the model's x at t_min."""

    def test_without_auxiliary_components_it_is_a_value(self):
        options = {"start": "replace", "samples": 1, "rtol": 1e-5, "atol": 1e-5}
        found = likelihood("VP", **options)
        expected = sum(log_normal((x - mu)[:, None], C) for x, mu, C in directions("VP"))
        assert np.abs(found.log_prob.numpy() - expected).max() <= SOLVER
        assert (found.is_bound, found.dimension) == (False, 2)
        assert found.standard_error.isnan().all()
        single = likelihood("VP", X.float(), **options)
        # Roundings of slopes below 1/0.04 over B = 10, and the solver's own error.
        error = (single.log_prob - found.log_prob).abs().max()
        assert error <= 1000 * EPS32 + SOLVER

    @pytest.mark.one_in(2)
    @pytest.mark.parametrize("name", ["correlated", "HOLD"])
    def test_with_auxiliary_components_it_is_a_bound(self, name):
        found = likelihood(name, start="replace")
        r = FORGETFUL[name].initial_covariance.numpy()[1:, 1:]
        value, mean = np.zeros(2), np.zeros(2)
        for x, mu, C in directions(name):
            value += log_normal((x - mu[0])[:, None], C[:1, :1])
            # E log p(x, v) − E log r(v).
            centre = np.column_stack([x, np.zeros((2, len(r)))]) - mu
            schur = C[1:, 1:] - np.outer(C[1:, 0], C[0, 1:]) / C[0, 0]
            mean += log_normal(centre, C) - 0.5 * np.trace(np.linalg.solve(schur, r))
            mean += 0.5 * (np.linalg.slogdet(2 * np.pi * r)[1] + len(r))
        assert found.is_bound is True
        assert_mean(found, mean)
        assert (mean < value).all()

    @pytest.mark.slow
    def test_weighted_by_importance_it_tends_to_the_value(self):
        # v starts with the width that it has under the model, so that weights have a variance.
        name = "CLD, γ = 1"
        found = likelihood(name, start="replace", importance_weighted=True)
        value = sum(log_normal((x - m[0])[:, None], C[:1, :1]) for x, m, C in directions(name))
        assert_mean(found, value)

    @pytest.mark.slow
    @pytest.mark.parametrize("weighted", [False, True])
    def test_the_standard_error_of_two_samples_is_half_of_their_difference(self, weighted):
        options = {"start": "replace", "rtol": 1e-2, "atol": 1e-2}
        found = likelihood("CLD", samples=2, importance_weighted=weighted, **options)
        logs = likelihood("CLD", X.repeat_interleave(2, 0), samples=1, **options).log_prob
        logs = logs.reshape(2, 2)
        logs = (logs - found.log_prob.unsqueeze(1)).exp() if weighted else logs
        expected, size = logs.diff(dim=1).abs().squeeze(1) / 2, float(logs.abs().max())
        assert torch.allclose(found.standard_error, expected, rtol=0, atol=rounding(16, size))


class TestPerturbed:
    """States drawn from the forward process, and decoded."""

    @pytest.mark.one_in(3)
    @pytest.mark.parametrize("name", ["VP", "CLD at rest", "HOLD", *WEIGHTED, "correlated"])
    def test_weights_have_the_density_for_mean_and_their_logarithms_a_bound(self, name):
        found = likelihood(name, importance_weighted=name in WEIGHTED)
        kernel = FORGETFUL[name].marginal(T_MIN)
        psi, sigma = kernel.mean[:, 0].numpy(), kernel.covariance.numpy()
        solved = np.linalg.solve(sigma, psi)
        information = float(psi @ solved)
        g, value, bound = solved / information, np.zeros(2), np.zeros(2)
        for x, mu, C in directions(name):
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
        assert_mean(found, value if name in WEIGHTED else bound)


def asserting(z, t):
    raise AssertionError("underflow, says the score")


@pytest.mark.parametrize(
    ("score", "error", "message"),
    [
        (lambda z, t: z, ValueError, r"score must return shape \(2, 1, 2\)"),
        (lambda z, t: -z[:, 1:].detach(), ValueError, "differentiable in the state"),
        (lambda z, t: z[:, 1:] * math.nan, FloatingPointError, r"not finite at t = 0\.25"),
        (asserting, AssertionError, "^underflow, says the score"),
        # √|v| has the value 0 and no slope at v = 0.
        (lambda z, t: z[:, 1:].abs().sqrt(), RuntimeError, "cannot be met"),
    ],
)
def test_unusable_scores_are_errors(score, error, message):
    process = ReverseProcess(CRITICAL, score)
    with pytest.raises(error, match=message):
        flow_log_prob(process, torch.zeros(2, 2, 2, dtype=torch.float64), 0.25)


def test_an_unknown_divergence_is_rejected_before_noise_is_drawn():
    g = generator(0)
    before = g.get_state()
    process = ReverseProcess(CLD(), TWO.score(CLD()))
    for weighted in (False, True):
        with pytest.raises(ValueError, match="divergence must be one of 'exact', 'hutchinson'"):
            log_likelihood(
                process,
                torch.zeros(2, 2, dtype=torch.float64),
                divergence="foo",
                importance_weighted=weighted,
                generator=g,
            )
    assert torch.equal(g.get_state(), before)


# Dequantisation and bits per dimension


@pytest.mark.parametrize("dimension", [1, 7, 3072])
@pytest.mark.parametrize(("width", "bits"), [(1.0, 0.0), (1 / 256, 8.0), (2 / 256, 7.0)])
def test_bytes_cost_eight_bits_less_the_density(dimension, width, bits):
    log_prob = torch.tensor([0.0, math.log(2) * dimension], dtype=torch.float64)
    expected = torch.tensor([bits, bits - 1], dtype=torch.float64)
    found = bits_per_dim(log_prob, dimension, width)
    assert torch.allclose(found, expected, rtol=rounding(4), atol=rounding(4))
    result = Likelihood(log_prob, log_prob, is_bound=True, dimension=dimension, nfev=1)
    assert torch.equal(result.bits_per_dim(width), found)


@pytest.mark.parametrize("options", [{}, {"count": 2, "low": 0.0, "high": 3.0}])
def test_levels_are_spread_evenly_over_their_bins(options):
    n, defaults = 50_000, {"count": 256, "low": -1.0, "high": 1.0}
    count, low, high = {**defaults, **options}.values()
    levels = torch.randint(0, count, (n,), generator=generator(1))
    x = dequantise(levels, **options, generator=generator())
    shift = (x.double() - low) / (high - low) * count - levels
    rounded = 2 * count * EPS32  # single precision at the ends, in bins
    assert -rounded <= shift.min() <= shift.max() <= 1 + rounded
    for power in (1, 2, 3):
        std = math.sqrt(1 / (2 * power + 1) - 1 / (power + 1) ** 2)
        error = abs(float((shift**power).mean()) - 1 / (power + 1))
        assert error <= standard_error(std, n) + rounded
    correlation = torch.corrcoef(torch.stack([shift, levels.double()]))[0, 1]
    assert abs(float(correlation)) <= standard_error(1.0, n)
