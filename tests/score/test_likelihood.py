"""Likelihoods by the probability flow, dequantisation, and bits per dimension."""

import math
from functools import partial

import pytest
import torch
from torch.distributions import MultivariateNormal

from cldsde import CLD, HOLD, VPSDE, GaussianMixture, LinearSDE, ReverseProcess
from cldsde.score import dequantise, flow_log_prob, log_likelihood
from cldsde.score.likelihood import Likelihood
from probes import Recording, generator
from score.cases import PROCESSES, states
from tolerances import EPS, EPS32, rounding, standard_error

CRITICAL, VP = PROCESSES["CLD"], PROCESSES["VP"]
NAMES = ["sub-VP", "VE", "PSLD", "HOLD", "middle of three driven", "first and last driven"]

GAUSSIAN = GaussianMixture([1.0], [[0.3, -0.5]], [[[0.5, 0.3], [0.3, 0.4]]])
MEAN, COVARIANCE, EYE = GAUSSIAN.means[0], GAUSSIAN.covariances[0], torch.eye(2).double()
ANGLES = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
RING = GaussianMixture(
    [1.0] * 8, torch.stack([ANGLES.cos(), ANGLES.sin()], 1), 0.04 * torch.eye(2).expand(8, 2, 2)
)
LINE = GaussianMixture([0.3, 0.7], [[-1.0], [1.0]], [[[0.1]], [[0.2]]])
X = torch.tensor([[0.4, -0.8], [1.3, 0.2]], dtype=torch.float64)

STAGES = {"dopri5": 6, "dopri8": 12, "bosh3": 3, "adaptive_heun": 2}
SOLVER = 4e-3  # `accuracy` of the default tolerances: 40 steps, numbers below 9
COARSE = 10 * SOLVER  # of ten times these tolerances


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
        process = ReverseProcess(sde, RING.score(sde))
        found = flow_log_prob(process, z, t, rtol=tol, atol=tol, method=method)
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
    @pytest.mark.parametrize(
        ("name", "divergence", "dtype"),
        [("VP", "hutchinson", torch.float64), ("CLD", "exact", torch.float32)],
    )
    def test_every_evaluation_is_counted_and_within_the_interval(self, name, divergence, dtype):
        sde, t = PROCESSES[name], 0.1
        score, z = Recording(RING.score(sde)), states(sde, RING, t, n=3).to(dtype)
        options = {"divergence": divergence, "rtol": 1e-3, "atol": 1e-3}
        measure = partial(flow_log_prob, ReverseProcess(sde, score), z, t, **options)
        found = measure(generator=generator())
        assert score.calls == found.nfev
        times = torch.stack(score.times)
        assert {x.dtype for x in [times, *score.states]} == {dtype}
        assert times.min() == torch.tensor(t, dtype=dtype)
        # The last stage is at T, or one rounding before it.
        assert 1 - EPS <= times.max() <= 1
        assert (times == times[:, :1]).all()
        assert found.log_prob.dtype == found.latent.dtype == torch.float64
        assert torch.equal(score.states[0], z)
        score.times.clear()
        with pytest.raises(RuntimeError, match=f"max_nfev = {found.nfev - 1} evaluations"):
            measure(max_nfev=found.nfev - 1, generator=generator())
        assert score.calls == found.nfev - 1

    @pytest.mark.parametrize("t", [0.0, 0.999])
    def test_a_long_first_step_does_not_leave_the_interval(self, t):
        # So slow a flow that the solver probes at t + 0.01 |z| / |velocity| = t + 10.
        sde = LinearSDE.from_matrices([[-1e-3]], [[1e-2]], prior_covariance=[[1.0]])
        score = Recording(lambda z, t: -z)
        z = torch.ones(2, 1, 1, dtype=torch.float64)
        flow_log_prob(ReverseProcess(sde, score), z, t, rtol=1.0, atol=1.0)
        times = torch.stack(score.times)
        assert t <= times.min() <= times.max() <= 1


OWN = [[0.0, 0.0], [0.0, 0.1]]
# Processes that forget their data but for e^-10: then the model is p_t itself.
FORGETFUL = {
    "VP": VPSDE(0.1, 40.0),
    "CLD": CLD(8.0),
    "CLD at rest": CLD(8.0, velocity_scale=0.0),
    "HOLD": HOLD(8.0),
    "correlated": LinearSDE.from_matrices(
        [[-1.0, 2.0], [-1.0, -2.0]], [[0.7, 0.0], [0.9, 1.1]], 8.0, initial_covariance=OWN
    ),
    "noise in the data": LinearSDE.from_matrices(
        [[-2.0, 1.0], [-1.0, 0.0]], [[2.0], [0.0]], 16.0, initial_covariance=OWN
    ),
}
WEIGHTED = ["CLD", "noise in the data"]  # by importance
T_MIN, SAMPLES = 1e-3, 100


def likelihood(name, x=X, samples=SAMPLES, **options):
    sde, options = FORGETFUL[name], {"rtol": 1e-4, "atol": 1e-4, **options}
    process = ReverseProcess(sde, GAUSSIAN.score(sde))
    return log_likelihood(process, x, T_MIN, samples=samples, generator=generator(), **options)


def model_at_the_end(sde):
    """Signal ψ and noise Σ of the model's states at T_MIN, and the density of all their numbers."""
    kernel = sde.marginal(T_MIN)
    psi, sigma = kernel.mean[:, :1], kernel.covariance
    spread = torch.kron(sigma, EYE) + torch.kron(psi @ psi.mT, COVARIANCE)
    return psi, sigma, MultivariateNormal(torch.kron(psi[:, 0], MEAN), spread)


def relative_entropy(model, mean, covariance):
    """E log p(y) − E log q(y) over q = N(mean, covariance ⊗ 1), for means (B, kD)."""
    q = torch.kron(covariance, EYE)
    spread = torch.linalg.solve(model.covariance_matrix, q).trace()
    # Entries without noise are not drawn, and have no entropy.
    drawn = q[q.diagonal() > 0][:, q.diagonal() > 0]
    entropy = 0.5 * torch.logdet(2 * math.pi * math.e * drawn)
    return model.log_prob(mean) - 0.5 * spread + entropy


def assert_mean(found, expected):
    """Within 4 standard errors, and the solver's error."""
    error = (found.log_prob - expected).abs()
    assert (error <= 4 * found.standard_error + COARSE).all()


class TestReplaced:
    """The data taken for the model's x at t_min."""

    def test_without_auxiliary_components_it_is_a_value(self):
        found = likelihood("VP", start="replace", samples=1, rtol=1e-5, atol=1e-5)
        expected = model_at_the_end(FORGETFUL["VP"])[2].log_prob(X)
        assert (found.log_prob - expected).abs().max() <= SOLVER
        assert (found.is_bound, found.dimension) == (False, 2)
        assert found.standard_error.isnan().all()

    @pytest.mark.one_in(2)
    @pytest.mark.parametrize("name", ["correlated", "HOLD"])
    def test_with_auxiliary_components_it_is_a_bound(self, name):
        sde, found = FORGETFUL[name], likelihood(name, start="replace")
        _, _, model = model_at_the_end(sde)
        of_data = MultivariateNormal(model.mean[:2], model.covariance_matrix[:2, :2])
        states = torch.cat([X, torch.zeros(2, len(model.mean) - 2)], 1)
        bound = relative_entropy(model, states, sde.initial_covariance)
        assert found.is_bound is True
        assert_mean(found, bound)
        assert (bound < of_data.log_prob(X)).all()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ["VP", "CLD at rest", "HOLD", *WEIGHTED, "correlated"])
def test_weights_have_the_density_for_mean_and_their_logarithms_a_bound(name):
    """States drawn from the forward process, and decoded."""
    found = likelihood(name, importance_weighted=name in WEIGHTED)
    psi, sigma, model = model_at_the_end(FORGETFUL[name])
    information = (psi.mT @ torch.linalg.solve(sigma, psi)).squeeze()
    # The estimate of the data has the noise 1/information, and so has the decoder.
    value = MultivariateNormal(MEAN, COVARIANCE + 2 / information * EYE).log_prob(X)
    bound = relative_entropy(model, torch.kron(psi.mT, X), sigma)
    bound += (information / (2 * math.pi * math.e)).log()
    assert found.is_bound is True
    assert (bound < value).all()
    assert_mean(found, value if name in WEIGHTED else bound)


def asserting(z, t):
    raise AssertionError("underflow, says the score")


@pytest.mark.parametrize(
    ("score", "error", "message"),
    [
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


# Dequantisation and bits per dimension


def test_bytes_cost_eight_bits_less_the_density():
    log_prob = torch.tensor([0.0, math.log(2) * 3072], dtype=torch.float64)
    result = Likelihood(log_prob, log_prob, is_bound=True, dimension=3072, nfev=1)
    for width, bits in ((1.0, 0.0), (1 / 256, 8.0), (2 / 256, 7.0)):
        expected = [bits, bits - 1]
        assert result.bits_per_dim(width).tolist() == pytest.approx(expected, abs=rounding())


def test_levels_are_spread_evenly_over_their_bins():
    n, count, low, high = 50_000, 2, 0.0, 3.0
    levels = torch.randint(0, count, (n,), generator=generator(1))
    x = dequantise(levels, count=count, low=low, high=high, generator=generator())
    shift = (x.double() - low) / (high - low) * count - levels
    rounded = 2 * count * EPS32  # single precision at the ends, in bins
    assert -rounded <= shift.min() <= shift.max() <= 1 + rounded
    assert abs(float(shift.mean()) - 1 / 2) <= standard_error(math.sqrt(1 / 12), n) + rounded
    assert abs(float((shift**2).mean()) - 1 / 3) <= standard_error(math.sqrt(4 / 45), n) + rounded
    correlation = torch.corrcoef(torch.stack([shift, levels.double()]))[0, 1]
    assert abs(float(correlation)) <= standard_error(1.0, n)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_standard_error_of_two_samples_is_half_of_their_difference(weighted):
    loose = {"rtol": 1e-2, "atol": 1e-2}
    found = likelihood("CLD", samples=2, importance_weighted=weighted, **loose)
    logs = likelihood("CLD", X.repeat_interleave(2, 0), samples=1, **loose).log_prob.reshape(2, 2)
    logs = (logs - found.log_prob.unsqueeze(1)).exp() if weighted else logs
    expected, size = logs.diff(dim=1).abs().squeeze(1) / 2, float(logs.abs().max())
    assert torch.allclose(found.standard_error, expected, rtol=0, atol=rounding(16, size))
