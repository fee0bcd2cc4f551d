"""Evidence lower bounds and cross-entropies of latent variables: closed forms and gradients."""

import math

import numpy as np
import pytest
import torch

from cldsde import CLD, GaussianMixture, LinearSDE, RectifiedFlow
from cldsde.linear import Gaussian
from cldsde.score import PerturbedData, TimeSampler, cross_entropy, evidence_lower_bound
from cldsde.score.conversion import whiten
from probes import generator
from score.cases import FAMILIES
from tolerances import rounding

CASES = {name: FAMILIES[name] for name in ("VP", "sub-VP", "VE", "CLD", "PSLD", "HOLD")}
CASES |= {"CLD, γ = 1": CLD(velocity_scale=1.0), "rectified flow": RectifiedFlow()}

T_MIN = 1e-3
QUADRATURE = 1e-6  # sixty nodes integrate a function that is smooth in log t
# A linear-Gaussian autoencoder x = Wz + noise: z ~ N(0, P) a priori, N(MEAN, SCALE²) given x.
P, NOISE = 0.7, 0.25
LOADINGS = torch.tensor([[1.0, -0.5], [0.3, 0.8], [-0.4, 0.6]], dtype=torch.float64)
PRECISION = torch.eye(2, dtype=torch.float64) / P + LOADINGS.T @ LOADINGS / NOISE
# Of the posterior its mean and the diagonal of its covariance: the encoder is not exact.
X = torch.tensor([0.9, -0.4, 0.2], dtype=torch.float64)
MEAN = torch.linalg.solve(PRECISION, LOADINGS.T @ X / NOISE)
SCALE = torch.linalg.inv(PRECISION).diagonal().sqrt()
FORGOTTEN = 2e-2  # the data in the prior, and the decoder
# Differences: h² f'''/6 and eps f/h, of f up to 10³ with derivatives up to 10⁴.
STEP, DIFFERENCES = 1e-5, 1e-5


def prior_score(sde):
    return GaussianMixture([1.0], [[0.0, 0.0]], [[[P, 0.0], [0.0, P]]]).score(sde)


def covariance(sde, t, variance):
    """Covariance at t of data of a variance, one direction."""
    kernel = sde.marginal(t)
    return kernel.covariance + variance * torch.outer(kernel.mean[:, 0], kernel.mean[:, 0])


def terminal(sde):
    """Distribution of the prior at T, of which the process's own prior is the limit."""
    return Gaussian(torch.linalg.cholesky(covariance(sde, sde.T, P)))


def closed_form(sde):
    """−E log p(z) at T_MIN over z of the encoder: a sum over directions of Gaussians."""
    psi, C = sde.marginal(T_MIN).mean[:, 0], covariance(sde, T_MIN, P)
    total = 0.0
    for mean, scale in zip(MEAN, SCALE, strict=True):
        second = covariance(sde, T_MIN, float(scale) ** 2) + mean**2 * torch.outer(psi, psi)
        log_det = torch.linalg.slogdet(2 * math.pi * C).logabsdet
        total += 0.5 * float(log_det + torch.linalg.solve(C, second).trace())
    return total


def points(n):
    """±√n e_i, over which the mean of a quadratic function is its mean over n normals."""
    eye = math.sqrt(n) * torch.eye(n, dtype=torch.float64)
    return torch.cat([eye, -eye])


def cubature(sde, t_min=T_MIN, nodes=60, start=MEAN + SCALE * points(2)):  # noqa: B008
    """States and weights whose mean loss of an affine score is its expectation.

    Gauss and Legendre's nodes in log t, and points in place of normals; times vary first, then
    the points of the data.
    """
    k, D = sde.components, 2
    x, w = np.polynomial.legendre.leggauss(nodes)
    span = math.log(sde.T / t_min)
    t = t_min * torch.exp(torch.from_numpy((x + 1) / 2 * span))
    weight = nodes * torch.from_numpy(w / 2) * span * t / (sde.T - t_min)
    noise = points(k * D).reshape(-1, k, D)
    grid = (torch.arange(len(values)) for values in (start, noise, t))
    a, b, c = (index.flatten() for index in torch.meshgrid(*grid, indexing="ij"))
    times, x0, epsilon = t[c], start[a], noise[b]
    kernel = sde.marginal(times)
    whitened = whiten(sde, kernel, times)
    z = kernel.mean[:, :, :1] * x0.unsqueeze(1) + kernel.root @ epsilon
    normals = whitened.inverse[..., -len(sde.driven) :, :] @ kernel.root @ epsilon
    return PerturbedData(sde, x0, z, normals, times, kernel, "data", whitened), weight[c]


def exact_losses(pair, scale=1.0, offset=0.0):
    output = scale * prior_score(pair.sde)(pair.z, pair.t) + offset
    return pair.loss(output, "score", weighting="likelihood")


@pytest.mark.parametrize("name", CASES)
def test_for_a_linear_gaussian_autoencoder_it_is_the_closed_form(name):
    sde = CASES[name]
    pair, weight = cubature(sde)
    exact, imperfect = (
        float(cross_entropy(pair, losses, weight, t_min=T_MIN, prior=terminal(sde)).mean())
        for losses in (exact_losses(pair), exact_losses(pair, 0.95, 0.1))
    )
    assert exact == pytest.approx(closed_form(sde), abs=QUADRATURE)
    # The score of no other prior of this process: the remaining error is a mean square.
    assert imperfect > exact + 1000 * QUADRATURE


@pytest.mark.parametrize(("name", "prediction"), [("VP", "score"), ("HOLD", "data")])
def test_the_evidence_lower_bound_has_a_decoder_in_place_of_an_entropy(name, prediction):
    sde, n = CASES[name], 16
    x0 = torch.randn(n, 2, generator=generator(), dtype=torch.float64)
    t = torch.linspace(0.01, 1, n, dtype=torch.float64)
    model = lambda z, t: z[:, 0] if prediction == "data" else z[:, -1:]  # noqa: E731
    options = {"t_min": T_MIN, "prediction": prediction, "generator": generator(1)}
    bound = evidence_lower_bound(model, sde, x0, t, 0.7, **options)
    pair = PerturbedData.draw(sde, x0, t, generator=generator(1))
    losses = pair.loss(model(pair.z, t), prediction, weighting="likelihood")
    found = cross_entropy(pair, losses, 0.7, t_min=T_MIN)
    kernel = sde.marginal(T_MIN)
    psi = kernel.mean[:, 0]
    information = psi @ torch.linalg.solve(kernel.covariance, psi)
    entropy = torch.linalg.slogdet(2 * math.pi * math.e * kernel.covariance).logabsdet
    expected = entropy - math.log(2 * math.pi * math.e) + information.log()
    lost = rounding(16, float(torch.linalg.cond(kernel.covariance)) + float(found.max()))
    assert torch.allclose(found + bound, expected.expand(n), rtol=lost, atol=lost)
    assert torch.equal(cross_entropy(pair, losses, 0.7, t_min=T_MIN, of="data"), -bound)


@pytest.mark.parametrize("name", ["VP", "VE", "CLD", "PSLD", "HOLD"])
def test_a_control_variate_with_the_moments_of_the_data_leaves_no_variance(name):
    """The bound is then the density, but for the prior and the decoder.

    In single precision the rounding errors of the model cancel. By themselves they exceed the
    losses at small times by orders of magnitude.
    """
    sde, n, t_min, mean = CASES[name], 1000, 1e-5, 0.3
    data = GaussianMixture([1.0], [[mean]], [[[P]]])
    t, weight = TimeSampler.importance(sde, t_min, weighting="likelihood").quantiles(
        (torch.arange(n, dtype=torch.float64) + 0.5) / n
    )
    options = {"t_min": t_min, "data_mean": mean, "data_variance": P, "generator": generator(1)}

    def error(dtype):
        x0 = data.sample(n, generator=generator(), dtype=dtype)
        found = evidence_lower_bound(data.score(sde), sde, x0, t, weight, **options)
        normal = torch.distributions.Normal(mean, math.sqrt(P))
        return found - normal.log_prob(x0.double()).squeeze(1)

    double, single = map(error, (torch.float64, torch.float32))
    assert double.abs().max() <= FORGOTTEN
    # The sum of terms of at most 4 nats is rounded.
    assert single.std() <= double.std() + rounding(32, 4.0, torch.float32)


def learnt_process(p):
    """A process whose matrices, initial distribution and prior are parameters."""
    return LinearSDE.from_matrices(
        p[:4].reshape(2, 2),
        p[4:8].reshape(2, 2),
        4.0,
        initial_covariance=torch.diag(torch.stack([0 * p[8], p[8] ** 2])),
        prior_covariance=torch.diag(p[9:11] ** 2),
    )


def test_gradients_reach_process_model_and_data_and_agree_with_differences():
    t = torch.tensor([0.011, 0.05, 0.3, 0.9], dtype=torch.float64)
    x = torch.tensor([[0.5, -1.0], [0.1, 0.2], [2.0, 1.0], [0.0, -0.3]], dtype=torch.float64)
    weight = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)

    def bound(parameters):
        sde, scale, shift = learnt_process(parameters), parameters[-2], parameters[-1]

        def model(z, t):
            rows = [-(i + 1) * scale * z.sum(1).tanh() for i in range(len(sde.driven))]
            return torch.stack(rows, dim=1) + t[:, None, None]

        options = {"t_min": 0.01, "generator": generator()}
        return evidence_lower_bound(model, sde, x + shift, t, weight, **options).sum()

    matrices = [-1.0, 2.0, -1.0, -2.0, 0.7, 0.1, 0.9, 1.1]
    values = [*matrices, 0.2, 1.1, 0.6, 1.3, 0.1]
    values = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    options = {"eps": STEP, "rtol": DIFFERENCES, "atol": DIFFERENCES}
    assert torch.autograd.gradcheck(bound, values, **options, fast_mode=True)
