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
from score.cases import FAMILIES, PROCESSES
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
DECODER = 2e-3  # noise of variance 1/I < 1e-3 P: half of it for each direction, twice
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


@pytest.mark.parametrize("prediction", ["score", "noise", "data"])
@pytest.mark.parametrize("name", ["VP", "CLD", "HOLD"])
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


@pytest.mark.parametrize("name", ["VP", "VE", "CLD", "PSLD", "HOLD", "first two of three driven"])
def test_a_control_variate_with_the_moments_of_the_data_leaves_no_variance(name):
    # At this time 1 + s²I is small enough to be seen in every term.
    sde, n, t_min, mean = PROCESSES[name], 20, 0.1, 0.3
    x = torch.tensor([[0.4, -0.8], [1.3, 0.2]], dtype=torch.float64)
    pair, weight = cubature(sde, t_min, start=x)
    data = GaussianMixture([1.0], [[mean, mean]], P * torch.eye(2, dtype=torch.float64)[None])
    losses = pair.loss(data.score(sde)(pair.z, pair.t), "score", weighting="likelihood")
    expected = -cross_entropy(pair, losses, weight, t_min=t_min, of="data").reshape(2, -1).mean(1)
    sampler = TimeSampler.importance(sde, t_min, weighting="likelihood")
    t, weight = sampler.sample(2 * n, generator=generator())
    options = {"t_min": t_min, "data_mean": mean, "data_variance": P, "generator": generator()}
    many = x.repeat_interleave(n, 0).unsqueeze(1)  # images of one row
    found = evidence_lower_bound(data.score(sde), sde, many, t, weight, **options).reshape(2, n)
    assert (found - expected[:, None]).abs().max() <= QUADRATURE


@pytest.mark.parametrize("name", ["VP", "CLD", "HOLD"])
def test_a_control_variate_cancels_the_rounding_errors_of_the_model(name):
    """In single precision they exceed the losses at small times by orders of magnitude."""
    sde, n, t_min, mean = CASES[name], 1000, 1e-5, 0.3
    data = GaussianMixture([1.0], [[mean]], [[[P]]])
    t, weight = TimeSampler.importance(sde, t_min, weighting="likelihood").quantiles(
        (torch.arange(n, dtype=torch.float64) + 0.5) / n
    )
    options = {"t_min": t_min, "data_mean": mean, "data_variance": P, "generator": generator(1)}

    def spread(dtype):
        x0 = data.sample(n, generator=generator(), dtype=dtype)
        found = evidence_lower_bound(data.score(sde), sde, x0, t, weight, **options)
        normal = torch.distributions.Normal(mean, math.sqrt(P))
        return float((found - normal.log_prob(x0.double()).squeeze(1)).std())

    # The sum of terms of at most 4 nats is rounded.
    assert spread(torch.float32) <= spread(torch.float64) + rounding(32, 4.0, torch.float32)


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
    assert exact - QUADRATURE <= data <= exact + DECODER
    assert (state - velocity - exact > 0.4) == (scale == 0.04)


LANGEVIN = torch.tensor([[0.0, 4.0], [-1.0, -4.0]], dtype=torch.float64)
KICK = torch.tensor([[0.0], [math.sqrt(2.0)]], dtype=torch.float64)
OWN = torch.diag(torch.tensor([0.0, 0.1])).double()
LEARNT = {
    "all entries of the matrices": (
        lambda p: LinearSDE.from_matrices(
            p[:4].reshape(2, 2), p[4:].reshape(2, 2), 4.0, initial_covariance=OWN
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
    "schedule": (
        lambda p: LinearSDE.from_functions(
            lambda t: (p[0] + p[1] * t) * LANGEVIN,
            lambda t: (p[0] + p[1] * t).sqrt() * KICK,
            initial_covariance=OWN,
            prior_covariance=torch.eye(2).double(),
        ),
        [3.0, 2.0],
    ),
}


@pytest.mark.parametrize("case", LEARNT)
def test_gradients_reach_process_model_and_data_and_agree_with_differences(case):
    make, values = LEARNT[case]
    t = torch.tensor([0.011, 0.05, 0.3, 0.9], dtype=torch.float64)
    x = torch.tensor([[0.5, -1.0], [0.1, 0.2], [2.0, 1.0], [0.0, -0.3]], dtype=torch.float64)
    weight = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)

    def bound(parameters):
        sde, scale, shift = make(parameters[:-2]), parameters[-2], parameters[-1]

        def model(z, t):
            rows = [-(i + 1) * scale * z.sum(1).tanh() for i in range(len(sde.driven))]
            return torch.stack(rows, dim=1) + t[:, None, None]

        options = {"t_min": 0.01, "generator": generator()}
        return evidence_lower_bound(model, sde, x + shift, t, weight, **options).sum()

    values = torch.tensor([*values, 1.3, 0.1], dtype=torch.float64, requires_grad=True)
    options = {"eps": STEP, "rtol": DIFFERENCES, "atol": DIFFERENCES}
    assert torch.autograd.gradcheck(bound, values, **options, fast_mode=True)
