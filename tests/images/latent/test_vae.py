"""The variational autoencoder: its posterior, its shapes and bounds, that it learns."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

from cldsde.images.latent import VAE, Bernoulli, DiscretisedLogistic, Posterior
from probes import generator

ROUNDING = 2.0**-24  # of single precision
SMALL: dict[str, Any] = {"channels": (8, 16), "groups": 4}

every_likelihood = pytest.mark.parametrize("likelihood", ["logistic", "bernoulli"])


def make(shape: tuple[int, ...] = (1, 8, 8), levels: int = 17, **options: Any) -> VAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VAE(shape, levels, **{**SMALL, **options})


def images(batch: int = 3, shape: tuple[int, ...] = (1, 8, 8)) -> torch.Tensor:
    return 2 * torch.rand(batch, *shape, generator=generator(1)) - 1


def posterior(dtype: torch.dtype = torch.float64, batch: int = 4) -> Posterior:
    g = generator(2)
    mean, log_std = (torch.randn(batch, 2, 3, 3, generator=g, dtype=dtype) for _ in range(2))
    return Posterior(mean, log_std)


def normal(q: Posterior) -> Independent:
    return Independent(Normal(q.mean, q.log_std.exp()), q.mean.ndim - 1)


def test_logarithms_of_a_posterior_are_those_of_the_library():
    q = posterior()
    standard = Independent(Normal(torch.zeros_like(q.mean), 1.0), 3)
    # In double precision, of sums of 18 numbers.
    torch.testing.assert_close(q.entropy(), normal(q).entropy())
    torch.testing.assert_close(q.kl_to_standard_normal(), kl_divergence(normal(q), standard))


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_divergence_does_not_cancel_if_the_posterior_is_near_the_prior(sign):
    log_std = sign * torch.logspace(-8, math.log10(5), 60)
    q = Posterior(torch.zeros(60, 1), log_std.reshape(60, 1))
    with mpmath.workdps(40):
        for got, ell in zip(q.kl_to_standard_normal().tolist(), log_std.tolist(), strict=True):
            want = (mpmath.expm1(2 * mpmath.mpf(ell)) - 2 * mpmath.mpf(ell)) / 2
            # Some roundings of factors of the series, or of the exponential.
            assert abs(got / want - 1) < 8 * ROUNDING


def test_the_divergence_of_the_prior_is_zero_with_zero_gradient():
    q = Posterior(*(torch.zeros(2, 1, 3, 3, requires_grad=True) for _ in range(2)))
    divergence = q.kl_to_standard_normal()
    gradients = torch.autograd.grad(divergence.sum(), q)
    assert divergence.tolist() == [0, 0]
    assert not any(bool(g.any()) for g in gradients)


def test_gradients_of_a_posterior_are_those_of_finite_differences():
    leaves = [part.requires_grad_() for part in posterior(batch=2)]
    sample = lambda q: q.sample(generator(5))  # noqa: E731
    for method in (Posterior.entropy, Posterior.kl_to_standard_normal, sample):
        assert torch.autograd.gradcheck(lambda *p, f=method: f(Posterior(*p)), leaves)


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
    assert vae.latent_shape == latent
    assert vae.shape == shape
    assert q.mean.shape == q.log_std.shape == z.shape == (2, *latent)
    assert vae.decode(z).shape == (2, vae.likelihood.width * shape[0], *shape[1:])
    out, mean = vae.decode(z), vae.images(z)
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


def test_a_sample_does_not_depend_on_its_batch():
    vae = make()
    x = images(5)
    together, alone = vae.encode(x), vae.encode(x[3:4])
    # Rounding of some ten layers that each sum over a hundred numbers or so.
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[3:4], b, rtol=1e-5, atol=1e-5)
    z = together.sample(generator())
    torch.testing.assert_close(
        vae.log_likelihood(x, z)[3:4], vae.log_likelihood(x[3:4], z[3:4]), rtol=1e-5, atol=0
    )


def test_under_autocast_distributions_and_posteriors_are_in_single_precision():
    vae, x = make(), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = vae.encode(x)
        z = q.sample(generator())
        assert vae.decode(z).dtype == torch.bfloat16
        results = [*q, q.kl_to_standard_normal(), vae.log_likelihood(x, z), vae.images(z)]
    assert {r.dtype for r in results} == {torch.float32}


@every_likelihood
def test_the_cpu_never_waits_for_the_device(likelihood):
    # Tensors on the device "meta" have no values: reading one is an error.
    with torch.device("meta"):
        vae = make(likelihood=likelihood)
        x = torch.ones(2, 1, 8, 8)
    q = vae.encode(x)
    z = q.sample()
    loss = q.kl_to_standard_normal() + q.entropy() - vae.log_likelihood(x, z)
    loss.sum().backward()
    assert vae.images(z).shape == (2, 1, 8, 8)
    assert all(p.grad is not None and p.device.type == "meta" for p in vae.parameters())


@every_likelihood
def test_every_weight_has_a_gradient(likelihood):
    vae, x = make(likelihood=likelihood), images()
    q = vae.encode(x)
    loss = q.kl_to_standard_normal() - vae.log_likelihood(x, q.sample(generator()))
    loss.sum().backward()
    silent = [key for key, p in vae.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert silent == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (1, 8)}, "shape: must"),
        ({"shape": (1, 8, 9)}, "channels .* divisible by 2"),
        ({"levels": 1}, "levels: must be .* got 1"),
        ({"channels": ()}, "channels: must"),
        ({"channels": (8, 0)}, "channels: must"),
        ({"channels": (4, 16)}, r"groups must divide each of the channels, \[4, 16\], into two"),
        ({"channels": (8, 18)}, r"groups must divide each of the channels, \[8, 18\], into two"),
        ({"groups": 0}, "groups: must be .* 1; got 0"),
        ({"blocks": 0}, "blocks: must be .* 1; got 0"),
        ({"blocks": True}, "blocks: must be .*; got True"),
        ({"latent_channels": 1.5}, "latent_channels: must be .*; got 1.5"),
        ({"likelihood": "normal"}, "'logistic' or 'bernoulli'; got 'normal'"),
    ],
)
def test_an_argument_out_of_range_is_rejected(options, message, monkeypatch):
    monkeypatch.setattr("cldsde.images.latent.vae.Encoder", None)
    with pytest.raises((TypeError, ValueError), match=message):
        make(**options)


def test_images_and_latent_maps_of_another_shape_are_rejected():
    vae = make()
    with pytest.raises(ValueError, match=r"x must have shape \(B, 1, 8, 8\); got \(2, 1, 8, 4\)"):
        vae.encode(torch.zeros(2, 1, 8, 4))
    with pytest.raises(ValueError, match=r"z must have shape \(B, 4, 4, 4\); got \(4, 4, 4\)"):
        vae.decode(torch.zeros(4, 4, 4))
