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

# Some ten layers that each sum over a hundred numbers.
LAYERS = rounding(100, dtype=torch.float32)
SMALL: dict[str, Any] = {"channels": (8, 16), "groups": 4, "pretraining": 1}

every_likelihood = pytest.mark.parametrize("likelihood", ["logistic", "bernoulli"])


def make(shape: tuple[int, ...] = (1, 8, 8), levels: int = 17, **options: Any) -> VAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VAE(shape, levels, LatentConfig(**{**SMALL, **options}))


def images(batch: int = 3, shape: tuple[int, ...] = (1, 8, 8)) -> torch.Tensor:
    return 2 * torch.rand(batch, *shape, generator=generator(1)) - 1


def posterior(dtype: torch.dtype = torch.float64, batch: int = 4) -> Posterior:
    return Posterior(*torch.randn(2, batch, 2, 3, 3, generator=generator(2), dtype=dtype))


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


def test_the_divergence_of_the_prior_is_zero_with_zero_gradient():
    q = Posterior(*(torch.zeros(2, 1, 3, 3, requires_grad=True) for _ in range(2)))
    divergence = q.kl_to_standard_normal()
    assert divergence.tolist() == [0, 0]
    assert not any(bool(g.any()) for g in torch.autograd.grad(divergence.sum(), q))


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
    out, mean = vae.decode(z), vae.images(z)
    assert vae.latent_shape == latent
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


def test_a_sample_does_not_depend_on_its_batch():
    vae, x = make(), images(5)
    q, z = vae.encode(x), vae.encode(x).sample(generator())
    together, alone = (*q, vae.log_likelihood(x, z)), (*vae.encode(x[3:4]),)
    alone += (vae.log_likelihood(x[3:4], z[3:4]),)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[3:4], b, rtol=LAYERS, atol=LAYERS)


def test_under_autocast_distributions_and_posteriors_are_in_single_precision():
    vae, x = make(), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = vae.encode(x)
        z = q.sample(generator())
        assert vae.decode(z).dtype == torch.bfloat16
        results = [*q, q.kl_to_standard_normal(), vae.log_likelihood(x, z), vae.images(z)]
    assert {r.dtype for r in results} == {torch.float32}


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (1, 8, 9)}, "channels .* divisible by 2"),
        ({"levels": 1}, "levels: must be .* got 1"),
        *(({"channels": x}, "channels.*: must") for x in ((), (8, 0))),
        *(({"channels": x}, "groups must divide each of the ch") for x in ((4, 16), (8, 18))),
        *(({key: 0}, f"{key}: must be .* 1; got 0") for key in ("groups", "blocks")),
        ({"blocks": True}, "blocks: must be .*; got True"),
        ({"latent_channels": 1.5}, "latent_channels: must be .*; got 1.5"),
        ({"likelihood": "normal"}, "'logistic' or 'bernoulli'; got 'normal'"),
    ],
)
def test_an_argument_out_of_range_is_rejected(options, message, monkeypatch):
    monkeypatch.setattr("cldsde.images.latent.Encoder", None)
    with pytest.raises((TypeError, ValueError), match=message):
        make(**options)
