"""Likelihoods of images under score models."""

import json
import math

import pytest
import torch

from cldsde import CLD, VPSDE, GaussianMixture, MixedScore
from cldsde.images.evaluate import likelihood
from cldsde.score import ReverseProcess, dequantise
from image_data import noise
from tolerances import rounding


def gaussian(dimension: int = 4, spread: float = 0.3) -> GaussianMixture:
    covariance = spread**2 * torch.eye(dimension, dtype=torch.float64)
    return GaussianMixture([1.0], torch.zeros(1, dimension), covariance.unsqueeze(0))


def closed_form(images, *, levels, seed, scale="bins", spread=0.3):
    """Bits of N(0, spread²) at the images as they are dequantised."""
    end = 1.0 if scale == "bins" else levels / (levels - 1)
    generator = torch.Generator().manual_seed(seed)
    x = dequantise(images, count=levels, low=-end, high=end, generator=generator).double()
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), spread)
    nats = -normal.log_prob(x).flatten(1).mean(1) - math.log(2 * end / levels)
    return nats / math.log(2)


@pytest.mark.parametrize(
    ("levels", "scale"),
    [(256, "bins"), pytest.param(17, "bins", marks=pytest.mark.slow), (17, "ends")],
)
def test_bits_of_a_gaussian_are_those_of_its_density(levels, scale):
    images, sde = noise(6, 0, (1, 2, 2), top=levels), VPSDE()
    process = ReverseProcess(sde, gaussian().score(sde))
    how = {"levels": levels, "scale": scale, "seed": 5}
    found = likelihood(process, images, **how, batch=4, divergence="exact")
    exact = closed_form(images, **how)
    # The prior is the distribution at T up to e^{−B/2} = 0.007 of the mean, squared in the density;
    # t_min = 1e-5 adds 1e-6 to a variance of 0.09, the ODE's tolerance 1e-5 nats a datum.
    prior = 0.007**2 + 1e-5 / 0.09
    assert found["bits_per_dim"] == pytest.approx(float(exact.mean()), abs=prior)
    # The standard error of the mean over images, each of which has an error of that size.
    error = float(exact.std()) / math.sqrt(6)
    assert found["standard_error"] == pytest.approx(error, abs=prior)
    assert not found["is_bound"]
    assert "exact up to its tolerance" in found["quantity"]
    json.dumps(found)
    # The Jacobian is diagonal: random signs give its trace without noise.
    estimated = likelihood(process, images, **how, divergence="hutchinson")
    close = pytest.approx(found["bits_per_dim"], abs=rounding(80, dtype=torch.float32))
    assert estimated["bits_per_dim"] == close


def test_bound_of_langevin_diffusion_is_above_the_bits_of_the_density():
    images = noise(40, 0, (1, 2, 2))
    sde = CLD()
    found = likelihood(gaussian().score(sde), images, seed=1, t_min=1e-2)
    exact = closed_form(images, levels=256, seed=1)
    assert found["is_bound"]
    assert "negative lower bound" in found["quantity"]
    # The bound holds in expectation; the standard error has its noise and the noise of the data.
    # With an exact score the gap is between q(z|x) and the posterior, small against a bit.
    gap = found["bits_per_dim"] - float(exact.mean())
    assert -3 * found["standard_error"] < gap < 0.5


def test_one_image_has_no_standard_error_and_the_seed_decides():
    images, score = noise(1, 0, (1, 2, 2)), gaussian().score(VPSDE())
    loose = {"rtol": 1e-2, "atol": 1e-2}
    first, same, other = (likelihood(score, images, seed=seed, **loose) for seed in (0, 0, 1))
    assert first["standard_error"] is None
    assert first == same
    assert first["bits_per_dim"] != other["bits_per_dim"]


def test_scores_that_have_no_likelihood_are_rejected():
    images, training = noise(3, 0, (1, 2, 2)), MixedScore(torch.nn.Linear(1, 1), VPSDE(), 0.0, 1.0)
    with pytest.raises(TypeError, match="model must be a ReverseProcess, or a Score"):
        likelihood(3, images)
    with pytest.raises(ValueError, match=r"evaluation mode; call \.eval\(\)"):
        likelihood(training, images)
    with pytest.raises(ValueError, match="needs a process without"):
        likelihood(gaussian().score(CLD()), images, kind="exact")
