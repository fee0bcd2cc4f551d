"""The cross-entropy of latent variables and a model: closed forms, bounds, gradients."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from cldsde import CLD, GaussianMixture, MixedScore
from cldsde.linear import Gaussian
from cldsde.score import PerturbedData, TimeSampler, cross_entropy, evidence_lower_bound
from cldsde.score.conversion import whiten
from probes import generator
from score.cases import FAMILIES
from tolerances import rounding, standard_error

EQUILIBRIUM = CLD(velocity_scale=1.0)
PROCESSES = {name: FAMILIES[name] for name in ("VP", "sub-VP", "VE", "CLD", "PSLD", "HOLD")}
PROCESSES["CLD, γ = 1"] = EQUILIBRIUM
every_process = pytest.mark.parametrize("name", PROCESSES)

T_MIN = 1e-3
QUADRATURE = 1e-6  # sixty nodes integrate a function that is smooth in log t
# A linear-Gaussian autoencoder x = Wz + noise: z ~ N(0, P) a priori, N(MEAN, SCALE²) given x.
P = 0.7
LOADINGS = torch.tensor([[1.0, -0.5], [0.3, 0.8], [-0.4, 0.6]], dtype=torch.float64)
NOISE = 0.25
X = torch.tensor([0.9, -0.4, 0.2], dtype=torch.float64)
PRECISION = torch.eye(2, dtype=torch.float64) / P + LOADINGS.T @ LOADINGS / NOISE
# Of the posterior its mean and the diagonal of its covariance: the encoder is not exact.
MEAN = torch.linalg.solve(PRECISION, LOADINGS.T @ X / NOISE)
SCALE = torch.linalg.inv(PRECISION).diagonal().sqrt()


def prior_score(sde):
    eye = torch.eye(2, dtype=torch.float64)
    return GaussianMixture([1.0], [[0.0, 0.0]], P * eye.unsqueeze(0)).score(sde)


def covariance(sde, t, variance):
    """Covariance at t of data of a variance, one direction."""
    kernel = sde.marginal(t)
    return kernel.covariance + variance * torch.outer(kernel.mean[:, 0], kernel.mean[:, 0])


def terminal(sde):
    """Distribution of the prior at T, of which the process's own prior is the limit."""
    return Gaussian(torch.linalg.cholesky(covariance(sde, sde.T, P)))


def closed_form(sde, t=T_MIN):
    """−E log p_t(z) over z of the encoder carried to t: a sum over directions of Gaussians."""
    psi, C = sde.marginal(t).mean[:, 0], covariance(sde, t, P)
    total = torch.zeros((), dtype=torch.float64)
    for mean, scale in zip(MEAN, SCALE, strict=True):
        second = covariance(sde, t, float(scale) ** 2) + mean**2 * torch.outer(psi, psi)
        log_det = torch.linalg.slogdet(2 * math.pi * C).logabsdet
        total += 0.5 * (log_det + torch.linalg.solve(C, second).trace())
    return float(total)


def cubature(sde, nodes=60):
    """States and weights whose mean loss of an affine score is its expectation.

    Gauss and Legendre's nodes in log t, and points ±√n e_i in place of n normals, over which the
    mean of a quadratic function is the mean over the normals.
    """
    k, D = sde.components, len(MEAN)
    x, w = np.polynomial.legendre.leggauss(nodes)
    span = math.log(sde.T / T_MIN)
    t = T_MIN * torch.exp(torch.from_numpy((x + 1) / 2 * span))
    weight = nodes * torch.from_numpy(w / 2) * span * t / (sde.T - T_MIN)

    def points(n):
        eye = math.sqrt(n) * torch.eye(n, dtype=torch.float64)
        return torch.cat([eye, -eye])

    start, noise = MEAN + SCALE * points(D), points(k * D).reshape(-1, k, D)
    a, b, c = torch.meshgrid(
        torch.arange(nodes), torch.arange(len(start)), torch.arange(len(noise)), indexing="ij"
    )
    times, x0, epsilon = t[a.flatten()], start[b.flatten()], noise[c.flatten()]
    kernel = sde.marginal(times)
    whitened = whiten(sde, kernel, times)
    z = kernel.mean[:, :, :1] * x0.unsqueeze(1) + kernel.root @ epsilon
    normals = whitened.noise @ epsilon
    pair = PerturbedData(sde, x0, z, normals, times, kernel, "data", whitened)
    return pair, weight[a.flatten()]


def exact_losses(pair):
    output = prior_score(pair.sde)(pair.z, pair.t)
    return pair.loss(output, "score", weighting="likelihood")


@every_process
def test_for_a_linear_gaussian_autoencoder_it_is_the_closed_form(name):
    sde = PROCESSES[name]
    pair, weight = cubature(sde)
    options = {"t_min": T_MIN, "prior": terminal(sde)}
    found = cross_entropy(pair, exact_losses(pair), weight, **options).mean()
    assert float(found) == pytest.approx(closed_form(sde), abs=QUADRATURE)
    # The score of no other prior of this process: the remaining error is a mean square.
    output = 0.95 * prior_score(sde)(pair.z, pair.t) + 0.1
    losses = pair.loss(output, "score", weighting="likelihood")
    imperfect = cross_entropy(pair, losses, weight, **options).mean()
    assert float(imperfect) > closed_form(sde) + 1000 * QUADRATURE


@pytest.mark.parametrize("name", ["VP", "HOLD"])
def test_its_estimate_at_importance_sampled_times_scatters_little(name):
    sde, n = PROCESSES[name], 10_000
    sampler = TimeSampler.importance(sde, T_MIN, data_variance=P, weighting="likelihood")
    t, weight = sampler.sample(n, generator=generator())
    x0 = MEAN + SCALE * torch.randn(n, 2, generator=generator(1), dtype=torch.float64)
    pair = PerturbedData.draw(sde, x0, t, generator=generator(2))
    losses = exact_losses(pair)
    found = cross_entropy(pair, losses, weight, t_min=T_MIN, prior=terminal(sde))
    error = standard_error(float(found.std()), n)
    assert float(found.mean()) == pytest.approx(closed_form(sde), abs=error)
    # Two squared normals have a coefficient of variation of 1.
    integrand = weight * losses
    assert float(integrand.std() / integrand.mean()) < 1.5


def test_the_default_prior_is_the_process_s_own():
    pair, weight = cubature(EQUILIBRIUM, 8)
    own, same = (
        cross_entropy(pair, torch.zeros(len(weight)), weight, t_min=T_MIN, prior=prior)
        for prior in (None, Gaussian(EQUILIBRIUM.prior.root))
    )
    assert torch.equal(own, same)


@pytest.mark.parametrize("name", ["VP", "CLD", "HOLD"])
def test_the_evidence_lower_bound_has_a_decoder_in_place_of_an_entropy(name):
    sde, n = PROCESSES[name], 16
    score, t = prior_score(sde), torch.linspace(0.01, 1, n, dtype=torch.float64)
    x0 = torch.randn(n, 2, generator=generator(), dtype=torch.float64)
    bound = evidence_lower_bound(score, sde, x0, t, 0.7, t_min=T_MIN, generator=generator(1))
    pair = PerturbedData.draw(sde, x0, t, generator=generator(1))
    losses = exact_losses(pair)
    found = cross_entropy(pair, losses, 0.7, t_min=T_MIN)
    kernel = sde.marginal(T_MIN)
    psi = kernel.mean[:, 0]
    information = psi @ torch.linalg.solve(kernel.covariance, psi)
    entropy = torch.linalg.slogdet(2 * math.pi * math.e * kernel.covariance).logabsdet
    expected = entropy - math.log(2 * math.pi * math.e) + information.log()
    lost = rounding(16, float(torch.linalg.cond(kernel.covariance)))
    assert torch.allclose(found + bound, expected.expand(n), rtol=lost, atol=lost)
    assert torch.equal(cross_entropy(pair, losses, 0.7, t_min=T_MIN, of="data"), -bound)


@pytest.mark.parametrize("scale", [0.04, 1.0])
def test_for_the_data_a_velocity_out_of_equilibrium_leaves_no_gap(scale):
    """The state less the velocity's entropy, and the data, against −E log p(z_0)."""
    sde = CLD(velocity_scale=scale)
    pair, weight = cubature(sde)
    options = {"t_min": T_MIN, "prior": terminal(sde)}
    state, data = (
        float(cross_entropy(pair, exact_losses(pair), weight, of=of, **options).mean())
        for of in ("state", "data")
    )
    velocity = math.log(2 * math.pi * math.e * scale * 0.25)
    exact = math.log(2 * math.pi * P) + 0.5 * float((MEAN**2 + SCALE**2).sum()) / P
    # Decoding adds noise of variance 1/I, below 1e-3 of P: half of it for each direction, twice.
    assert exact - QUADRATURE <= data <= exact + 2e-3
    assert (state - velocity - exact > 0.4) == (scale == 0.04)


@pytest.mark.parametrize("mixing", [None, -1.0])
@pytest.mark.parametrize("name", ["VP", "CLD", "PSLD", "HOLD"])
def test_gradients_reach_the_encoder(name, mixing):
    """Through the states, as the training of latent models takes them."""
    sde, n = PROCESSES[name], 32

    class Network(nn.Module):
        def forward(self, z, clock):
            driven = (z.sum(1, keepdim=True) + clock[:, None]).sin() + 0.1 * z[:, :1]
            return driven.expand(-1, 2 * len(sde.driven))

    logits = None if mixing is None else torch.full((2,), mixing)
    model = MixedScore(Network(), sde, 0.0, 1.0, mixing_logits=logits)
    sampler = TimeSampler.importance(sde, T_MIN, weighting="likelihood")
    t, weight = sampler.sample(n, generator=generator(1))

    def bound(encoder):
        """Cross-entropy less the entropy of the encoder, at given normals."""
        mean, log_scale = encoder[:2], encoder[2:]
        eta = torch.randn(n, 2, generator=generator(), dtype=torch.float64)
        x0 = mean + log_scale.exp() * eta
        pair = PerturbedData.draw(sde, x0, t, generator=generator(2))
        losses = model.loss(pair, weighting="likelihood")
        return cross_entropy(pair, losses, weight, t_min=T_MIN).mean() - log_scale.sum()

    encoder = torch.tensor([0.3, -0.5, -0.7, 0.1], dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(bound, encoder)
    # Differences: h² f'''/6 and eps f/h, of f near 10³ with derivatives near 10⁴.
    h, tolerance = 1e-5, 1e-5
    for found, step in zip(gradient, h * torch.eye(4).double(), strict=True):
        with torch.no_grad():
            wanted = float(bound(encoder + step) - bound(encoder - step)) / (2 * h)
        assert float(found) == pytest.approx(wanted, rel=tolerance, abs=tolerance)
