"""The variational autoencoder: its posterior, its shapes and bounds, that it learns."""

import math
from typing import Any

import mpmath
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

from cldsde.images.latent import VAE, Bernoulli, DiscretisedLogistic, Posterior
from cldsde.images.training_config import LatentConfig
from probes import generator
from tolerances import EPS32, rounding

SMALL: dict[str, Any] = {"channels": (8, 16), "groups": 4, "pretraining": 1}

every_likelihood = pytest.mark.parametrize("likelihood", ["logistic", "bernoulli"])


def make(shape: tuple[int, ...] = (1, 8, 8), levels: int = 17, **options: Any) -> VAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VAE(shape, levels, LatentConfig(**{**SMALL, **options}))


def images(batch: int = 3, shape: tuple[int, ...] = (1, 8, 8)) -> torch.Tensor:
    return 2 * torch.rand(batch, *shape, generator=generator(1)) - 1


def posterior(dtype: torch.dtype = torch.float64) -> Posterior:
    return Posterior(*torch.randn(2, 4, 2, 3, 3, generator=generator(2), dtype=dtype))


def test_logarithms_of_a_posterior_are_those_of_the_library():
    q = posterior()
    library = Independent(Normal(q.mean, q.log_std.exp()), 3)
    standard = Independent(Normal(torch.zeros_like(q.mean), 1.0), 3)
    for found, expected in (
        (q.entropy(), library.entropy()),
        (q.kl_to_standard_normal(), kl_divergence(library, standard)),
    ):
        torch.testing.assert_close(found, expected, rtol=rounding(18), atol=rounding(18))


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_divergence_does_not_cancel_if_the_posterior_is_near_the_prior(sign):
    log_std = sign * torch.logspace(-8, math.log10(5), 60)
    q = Posterior(torch.zeros(60, 1), log_std.reshape(60, 1))
    with mpmath.workdps(40):
        for got, ell in zip(q.kl_to_standard_normal().tolist(), log_std.tolist(), strict=True):
            want = (mpmath.expm1(2 * mpmath.mpf(ell)) - 2 * mpmath.mpf(ell)) / 2
            # Some roundings of factors of the series, or of the exponential.
            assert abs(got / want - 1) < 4 * EPS32


def test_a_sample_is_the_mean_and_a_multiple_of_normals_of_each_generator():
    q = posterior(torch.float32)
    noise = torch.randn(q.mean.shape, generator=generator(6))
    assert torch.equal(q.sample(generator(6)), q.mean + q.log_std.exp() * noise)
    together = q.sample([generator(1), generator(2)])
    halves = [Posterior(*(part[i : i + 2] for part in q)) for i in (0, 2)]
    apart = [half.sample(generator(seed)) for half, seed in zip(halves, (1, 2), strict=True)]
    assert torch.equal(together, torch.cat(apart))
    with pytest.raises(ValueError, match=r"length divides the batch of .* 3 generators"):
        q.sample([generator(i) for i in range(3)])


@pytest.mark.parametrize(
    ("shape", "channels", "latent"),
    [
        ((1, 28, 28), (8, 16), (4, 14, 14)),
        ((3, 8, 16), (8, 16, 16), (4, 2, 4)),
        ((1, 7, 5), (8,), (4, 7, 5)),
    ],
)
@every_likelihood
def test_resolution_halves_once_for_each_level_but_the_first(likelihood, shape, channels, latent):
    vae = make(shape, channels=channels, likelihood=likelihood)
    x = images(2, shape)
    q = vae.encode(x)
    z = q.sample(generator())
    out, mean = vae.decode(z), vae.images(z)
    assert (vae.latent_shape, vae.shape) == (latent, shape)
    assert q.mean.shape == q.log_std.shape == z.shape == (2, *latent)
    assert out.shape == (2, vae.likelihood.width * shape[0], *shape[1:])
    kind = DiscretisedLogistic(levels=17) if likelihood == "logistic" else Bernoulli()
    assert vae.likelihood == kind
    assert torch.equal(vae.log_likelihood(x, z), kind.log_likelihood(out, x))
    assert torch.equal(mean, kind.mean(out))
    assert mean.shape == x.shape
    assert bool((mean.abs() <= 1).all())


def test_latent_channels_and_blocks_are_as_many_as_requested():
    vae = make(latent_channels=2, blocks=2)
    blocks = [sum(isinstance(m, ResnetBlock2D) for m in part.modules()) for part in vae.children()]
    assert vae.latent_shape == (2, 4, 4)
    # Two levels of two, or of three in the decoder, and two in the middle.
    assert blocks == [6, 8]


@pytest.mark.parametrize("weight", [0.0, 1e3, 1e8])
def test_mean_and_log_std_of_the_posterior_are_bounded_by_five(weight):
    vae = make()
    nn.init.normal_(vae.encoder.conv_out.weight, std=weight, generator=generator())
    q = vae.encode(images())
    for part in q:
        assert bool((part.abs() <= 5).all())
        assert weight == 0 or part.abs().max() > 4.9
    assert bool(q.kl_to_standard_normal().isfinite().all())


@every_likelihood
def test_under_autocast_distributions_and_posteriors_are_in_single_precision(likelihood):
    vae, x = make(likelihood=likelihood), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = vae.encode(x)
        z = q.sample(generator())
        out = vae.decode(z)
        results = [*q, q.kl_to_standard_normal(), vae.log_likelihood(x, z), vae.images(z)]
    assert out.dtype == torch.bfloat16
    assert {r.dtype for r in results} == {torch.float32}
    assert torch.equal(results[-2], vae.likelihood.log_likelihood(out.float(), x))
    assert torch.equal(results[-1], vae.likelihood.mean(out.float()))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@every_likelihood
def test_every_weight_has_a_gradient_and_the_cpu_never_waits(likelihood, device):
    """Tensors on the device "meta" have no values: reading one is an error."""
    with torch.device(device):
        vae = make(likelihood=likelihood)
        x = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)
    q = vae.encode(x)
    z = q.sample(generator() if device == "cpu" else None)
    loss = q.kl_to_standard_normal() + q.entropy() - vae.log_likelihood(x, z)
    loss.sum().backward()
    assert vae.images(z).shape == (2, 1, 8, 8)
    gradients = [p.grad for p in vae.parameters()]
    assert all(g is not None and g.device.type == device for g in gradients)
    assert device == "meta" or all(bool(g.any()) for g in gradients)


def test_images_and_latent_maps_of_another_shape_are_rejected():
    vae = make()
    for function in (vae.encode, lambda x: vae.log_likelihood(x, torch.zeros(2, 4, 4, 4))):
        with pytest.raises(ValueError, match=r"x must have shape \(B, 1, 8, 8\); got \(2, 1, 8, 4"):
            function(torch.zeros(2, 1, 8, 4))
    with pytest.raises(ValueError, match=r"z must have shape \(B, 4, 4, 4\); got \(4, 4, 4\)"):
        vae.decode(torch.zeros(4, 4, 4))
    with pytest.raises(ValueError, match="x and z must have one row per image; got 3 and 1"):
        vae.log_likelihood(torch.zeros(3, 1, 8, 8), torch.zeros(1, 4, 4, 4))
