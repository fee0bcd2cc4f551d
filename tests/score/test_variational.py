"""The evidence lower bound: affine models in closed form, and gradients of the process."""

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from scipy.integrate import quad_vec

from cldsde import CLD, GaussianMixture, LinearSDE
from cldsde.score import Conversion, TimeSampler, evidence_lower_bound
from probes import generator
from score.cases import PROCESSES
from tolerances import EPS32, rounding, standard_error

NAMES = ["VP", "VE", "CLD", "PSLD", "HOLD", "first two of three driven"]
every_process = pytest.mark.parametrize("name", NAMES)

# Data of the models: N(0.3, 0.5) in each direction.
MEAN, VARIANCE = 0.3, 0.5
X = torch.tensor([[0.4, -0.8], [1.3, 0.2]], dtype=torch.float64)
T_MIN = 1e-3
QUADRATURE = 1e-5
PRIOR = 0.07  # KL(p_T, prior) of data and states below 3: VP e^{-B/2} = 0.007, CLD less
MODELS = {"exact": (1.0, 0.0), "imperfect": (0.97, 0.3)}


def gaussian(dimension=2):
    eye = torch.eye(dimension, dtype=torch.float64)
    return GaussianMixture([1.0], [[MEAN] * dimension], VARIANCE * eye.unsqueeze(0))


def affine(sde, model):
    score, (scale, offset) = gaussian().score(sde), MODELS[model]
    return lambda z, t: scale * score(z, t) + offset


def moments(sde, t):
    kernel = sde.marginal(t)
    return kernel.mean[:, 0].numpy(), kernel.covariance.numpy()


def mean_loss(sde, model, t, x):
    """½ E ‖Gᵀ(s − s*)‖² given x, one direction: both scores are affine in the noise."""
    scale, offset = MODELS[model]
    psi, sigma = moments(sde, t)
    L = np.linalg.cholesky(sigma)
    driven = np.zeros(len(psi))
    driven[list(sde.driven)] = offset
    G = sde.diffusion(t).numpy()
    S = sigma + VARIANCE * np.outer(psi, psi)
    mean = np.outer(driven, np.ones_like(x)) - scale * np.outer(np.linalg.solve(S, psi), x - MEAN)
    noise = np.linalg.inv(L).T - scale * np.linalg.solve(S, L)
    return 0.5 * (((G.T @ mean) ** 2).sum(0) + ((G.T @ noise) ** 2).sum())


@lru_cache
def expected(name, model, t_min=T_MIN):
    """Expectation of the bound at each datum of X: closed forms and scipy's quadrature."""
    sde, x = PROCESSES[name], X.flatten().numpy()

    def loss(log_t):
        t = math.exp(log_t)
        return t * mean_loss(sde, model, t, x)

    integral, error = quad_vec(loss, math.log(t_min), 0.0, epsabs=1e-6, epsrel=1e-6)
    assert error < QUADRATURE
    return (last_terms(sde, t_min) - integral).reshape(2, 2).sum(1)


def last_terms(sde, t_min):
    """Minus the divergence from the prior and the entropy of the decoder, at each number of X."""
    psi, S = moments(sde, sde.T)
    P, x = sde.prior.covariance.numpy(), X.flatten().numpy()
    inverse = np.linalg.inv(P)
    log_det = np.linalg.slogdet(P)[1] - np.linalg.slogdet(S)[1]
    divergence = np.trace(inverse @ S) - len(S) + log_det + psi @ inverse @ psi * x**2
    psi, S = moments(sde, t_min)
    information = psi @ np.linalg.solve(S, psi)
    return -0.5 * (divergence + math.log(2 * math.pi * math.e / information))


def estimates(sde, model, n=2000, *, sampler=None, t_min=T_MIN, **options):
    """Estimates of each datum, ``(2, n)``."""
    if sampler is None:
        sampler = TimeSampler.importance(sde, t_min, data_variance=VARIANCE, weighting="likelihood")
    found = []
    for i, datum in enumerate(X):
        g = generator(i)
        t, weight = sampler.sample(n, generator=g)
        x = datum.expand(n, 2)
        found.append(
            evidence_lower_bound(model, sde, x, t, weight, t_min=t_min, generator=g, **options)
        )
    return torch.stack(found)


def assert_mean(found, wanted):
    """Within 4 standard errors; times are stratified, which only lessens them."""
    error = (found.mean(1) - torch.from_numpy(wanted)).abs()
    assert (error <= standard_error(1.0, found.shape[1]) * found.std(1)).all()


class TestExpectation:
    """The mean of the estimate against closed forms."""

    @pytest.mark.parametrize("model", MODELS)
    @every_process
    def test_the_mean_is_the_bound(self, name, model):
        sde = PROCESSES[name]
        assert_mean(estimates(sde, affine(sde, model)), expected(name, model))

    @every_process
    def test_a_control_variate_with_the_moments_of_the_data_leaves_no_variance(self, name):
        sde, options = PROCESSES[name], {"data_mean": MEAN, "data_variance": VARIANCE}
        # At this time 1 + s²I is small enough to be seen in every term.
        found = estimates(sde, affine(sde, "exact"), 20, t_min=0.1, **options)
        error = (found - torch.from_numpy(expected(name, "exact", 0.1)).unsqueeze(1)).abs()
        assert error.max() <= 10 * QUADRATURE

    @every_process
    def test_without_weight_prior_and_decoder_are_left(self, name):
        sde = PROCESSES[name]
        found = evidence_lower_bound(gaussian().score(sde), sde, X, 0.5, 0.0, t_min=T_MIN)
        wanted = torch.from_numpy(last_terms(sde, T_MIN).reshape(2, 2).sum(1))
        # A covariance is inverted here.
        lost = rounding(16, float(torch.linalg.cond(sde.marginal(T_MIN).covariance)))
        assert torch.allclose(found, wanted, rtol=lost, atol=lost)

    @pytest.mark.parametrize("t", [T_MIN, 0.03, 1.0])
    @every_process
    def test_at_each_time_the_loss_is_exact(self, name, t):
        sde, n = PROCESSES[name], 2000
        score, x = affine(sde, "imperfect"), X[:1].expand(n, 2)
        with_loss, without = (
            evidence_lower_bound(score, sde, x, t, weight, t_min=T_MIN, generator=generator())
            for weight in (1.0, 0.0)
        )
        losses = (without - with_loss) / (1 - T_MIN)
        wanted = mean_loss(sde, "imperfect", t, X[0].numpy()).sum()
        assert_mean(losses.unsqueeze(0), np.array([wanted]))

    @pytest.mark.parametrize("density", [torch.ones_like, lambda t: 1 / t])
    def test_the_mean_does_not_depend_on_the_density_of_times(self, density):
        sampler, sde = TimeSampler(density, 0.02), PROCESSES["CLD"]
        found = estimates(sde, affine(sde, "imperfect"), sampler=sampler, t_min=0.02)
        assert_mean(found, expected("CLD", "imperfect", 0.02))

    @pytest.mark.parametrize("prediction", ["noise", "data"])
    def test_the_kind_of_prediction_does_not_matter(self, prediction):
        sde = PROCESSES["CLD"]
        score = gaussian().score(sde)

        def model(z, t):
            return Conversion.at(sde, t, "score", prediction)(z, score(z, t))

        found = estimates(sde, model, 50, prediction=prediction)
        lost = rounding(16, float(torch.linalg.cond(sde.marginal(T_MIN).covariance)))
        assert torch.allclose(found, estimates(sde, score, 50), rtol=lost, atol=lost)

    @pytest.mark.parametrize("name", ["VP", "CLD"])
    def test_at_an_early_end_it_is_the_density_of_the_data(self, name):
        sde = PROCESSES[name]
        found = estimates(sde, gaussian().score(sde), t_min=1e-5)
        point = LinearSDE.from_matrices([[0.0]], [[1.0]])
        value = gaussian().log_prob(point, X.unsqueeze(1), 0.0)
        error = standard_error(1.0, found.shape[1]) * found.std(1)
        # The decoder at 1e-5 costs less than 2D/(s² I), beside the prior.
        assert ((found.mean(1) - value).abs() <= error + PRIOR).all()


class TestShapes:
    def test_single_precision_data_lose_single_precision(self):
        sde, t_min = CLD(), 1e-5
        sampler = TimeSampler.importance(sde, t_min, weighting="likelihood")
        t, weight = sampler.sample(2000, generator=generator())
        x = X[:1].expand(2000, 2)
        found = evidence_lower_bound(
            gaussian().score(sde), sde, x.float(), t, weight, t_min=t_min, generator=generator()
        )
        assert found.dtype == torch.float32
        # States are rounded relative to x, hundreds of times the noise at t_min.
        wanted = torch.from_numpy(expected("CLD", "exact", t_min))[0]
        error = standard_error(float(found.double().std()), 2000) + 1e4 * EPS32
        assert float(found.double().mean()) == pytest.approx(float(wanted), abs=error)


def learnt(p):
    """CLD with a rate, a mass and a friction to learn."""
    beta, mass, friction = p
    zero = torch.zeros((), dtype=torch.float64)
    A = torch.stack(
        [torch.stack([zero, beta / mass]), torch.stack([-beta, -beta * friction / mass])]
    )
    root = torch.stack([zero, (2 * friction * beta).sqrt()]).unsqueeze(1)
    return LinearSDE.from_matrices(A, root, 1.0, initial_covariance=[[0.0, 0.0], [0.0, 0.01]])


LANGEVIN = torch.tensor([[0.0, 4.0], [-1.0, -4.0]], dtype=torch.float64)
KICK = torch.tensor([[0.0], [math.sqrt(2.0)]], dtype=torch.float64)
LEARNT = {
    "Langevin": (learnt, [4.0, 0.25, 1.0]),
    "all entries of the matrices": (
        lambda p: LinearSDE.from_matrices(
            p[:4].reshape(2, 2),
            p[4:].reshape(2, 2),
            4.0,
            initial_covariance=[[0.0, 0.0], [0.0, 0.1]],
        ),
        [-1.0, 2.0, -1.0, -2.0, 0.7, 0.1, 0.9, 1.1],
    ),
    "initial distribution and prior": (
        lambda p: LinearSDE.from_matrices(
            LANGEVIN,
            KICK,
            4.0,
            initial_covariance=torch.diag(torch.stack([0 * p[0], p[0] ** 2])),
            prior_covariance=torch.diag(p[1:] ** 2),
        ),
        [0.2, 1.1, 0.6],
    ),
    "one component": (
        lambda p: LinearSDE.from_matrices(-p[:1].reshape(1, 1), p[1:].reshape(1, 1), (0.1, 20.0)),
        [0.5, 1.0],
    ),
    "schedule": (
        lambda p: LinearSDE.from_functions(
            lambda t: (p[0] + p[1] * t) * LANGEVIN,
            lambda t: (p[0] + p[1] * t).sqrt() * KICK,
            initial_covariance=[[0.0, 0.0], [0.0, 0.01]],
            prior_covariance=[[1.0, 0.0], [0.0, 0.25]],
        ),
        [3.0, 2.0],
    ),
}


@pytest.mark.parametrize("case", LEARNT)
def test_gradients_of_process_and_model_agree_with_differences(case):
    make, values = LEARNT[case]
    t = torch.tensor([0.011, 0.05, 0.3, 0.9], dtype=torch.float64)
    x = torch.tensor([[0.5, -1.0], [0.1, 0.2], [2.0, 1.0], [0.0, -0.3]], dtype=torch.float64)
    weight = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)

    def bound(parameters):
        sde, scale = make(parameters[:-1]), parameters[-1]

        def model(z, t):
            rows = [-(i + 1) * scale * z.sum(1).tanh() for i in range(len(sde.driven))]
            return torch.stack(rows, dim=1) + t[:, None, None]

        return evidence_lower_bound(
            model, sde, x, t, weight, t_min=0.01, generator=generator()
        ).sum()

    parameters = torch.tensor([*values, 1.3], dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(bound, parameters)
    # Central differences: h² f'''/6, and eps f/h, of f near 100 and parameters near 1.
    h, tolerance = 1e-5, 1e-5
    for step, found in zip(h * torch.eye(len(parameters)).double(), gradient, strict=True):
        numeric = float(bound(parameters + step) - bound(parameters - step)) / (2 * h)
        assert float(found) == pytest.approx(numeric, rel=tolerance, abs=tolerance)
