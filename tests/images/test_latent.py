"""Latent models: distributions of pixels, and the variational autoencoder."""

import math
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

from cldsde.images.data import to_unit
from cldsde.images.latent import VAE, Bernoulli, DiscretisedLogistic, Posterior, soft_clamp
from cldsde.images.training_config import LatentConfig
from probes import generator
from tolerances import EPS32, rounding

ROUNDING = EPS32 / 2  # of single precision
DISTRIBUTIONS: dict[str, Any] = {
    "logistic of 2": DiscretisedLogistic(levels=2),
    "logistic of 17": DiscretisedLogistic(levels=17),
    "logistic of 256": DiscretisedLogistic(levels=256),
    "bernoulli": Bernoulli(),
}
every_distribution = pytest.mark.parametrize("given", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
every_count = pytest.mark.parametrize("levels", [2, 3, 17, 256])

# Outputs of a network for the logarithm of a scale, before it is bounded by ±7.
RAW_SCALES = [-1e30, -60.0, -9.0, -5.0, -2.0, 0.0, 3.0, 20.0, 1e30]
MEANS = [-1000.0, -1.3, -1.0, -0.2, 1 / 255, 0.7, 1.0, 1.1, 50.0]


def grid(levels: int) -> torch.Tensor:
    """All levels, one per image of one number."""
    return to_unit(torch.arange(levels, dtype=torch.uint8), levels).reshape(-1, 1, 1, 1)


def output(*numbers: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Outputs ``(B, parameters, 1, 1)`` of tables of numbers, one per parameter."""
    columns = torch.broadcast_tensors(*(torch.as_tensor(n, dtype=dtype) for n in numbers))
    return torch.stack([c.flatten() for c in columns], 1)[..., None, None]


@pytest.mark.parametrize("raw", RAW_SCALES)
@every_count
def test_the_mean_is_that_of_the_probabilities(levels, raw):
    given, x = DiscretisedLogistic(levels=levels), grid(levels).double()
    scale = float(soft_clamp(torch.tensor(raw, dtype=torch.float64), 7).exp())
    for m in MEANS:
        out = output(m, raw, dtype=torch.float64)
        p = given.log_likelihood(out.expand(levels, -1, 1, 1), x).exp()
        want = (p * x.flatten()).sum()
        tolerance = rounding(45 * levels) + 2 * ROUNDING * (1 + 1 / scale)
        torch.testing.assert_close(given.mean(out).squeeze(), want, rtol=0, atol=tolerance)
        single = given.mean(out.float()).squeeze()
        assert -1 <= single <= 1
        # Sums of `levels` numbers of at most 1, beside the rounding of the mean in units of s.
        tolerance += ROUNDING * (levels + 24 + 4 * (1 + abs(m)) / scale)
        torch.testing.assert_close(single.double(), want, rtol=0, atol=tolerance)


@every_count
def test_a_logistic_logarithm_is_within_its_bound_of_the_exact_one(levels):
    n, rng = 150, np.random.default_rng(levels)
    raw = rng.uniform(-14, 8, n).astype(np.float32)
    level = rng.integers(0, levels, n)
    scale = np.exp(7 * np.tanh(raw / 7))
    # Means about the level, within some scales or far away.
    far = rng.choice([0.0, 1.0, 1.0, 30.0], n)
    mean = np.where(far, 2 * level / (levels - 1) - 1 + far * scale * rng.normal(size=n), 0.4)
    mean = mean.astype(np.float32)
    got = DiscretisedLogistic(levels=levels).log_likelihood(output(mean, raw), grid(levels)[level])
    numbers = zip(got.tolist(), level.tolist(), mean.tolist(), raw.tolist(), strict=True)
    with mpmath.workdps(40):
        for ours, j, m, r in numbers:
            want, s = _logistic(levels, j, m, r)
            bound = 24 * abs(want) + 4 * (1 + (1 + abs(m)) / s)
            assert abs(ours - want) < ROUNDING * bound, (j, m, r)


def _logistic(levels: int, level: int, mean: float, raw: float) -> tuple[Any, Any]:
    """Logarithm of the probability, by its definition in many digits, and the scale."""
    scale = mpmath.exp(7 * mpmath.tanh(mpmath.mpf(raw) / 7))
    above = (mpmath.mpf(2 * level + 1) / (levels - 1) - 1 - mean) / scale
    below = (mpmath.mpf(2 * level - 1) / (levels - 1) - 1 - mean) / scale
    if above + below > 0:
        # 1 − σ(a) = σ(−a): from the side of small probabilities.
        above, below, level = -below, -above, levels - 1 - level
    low = 0 if level == 0 else 1 / (1 + mpmath.exp(-below))
    high = 1 if level == levels - 1 else 1 / (1 + mpmath.exp(-above))
    return mpmath.log(high - low), scale


def test_a_bernoulli_logarithm_is_within_its_bound_of_the_exact_one():
    rng = np.random.default_rng(0)
    # Beyond ±87 e^{−|logit|} is no normal number.
    logit = rng.normal(size=200) * np.repeat([0.1, 3.0, 10.0, 60.0], 50)
    logit = logit.clip(-85, 85).astype(np.float32)
    x = rng.uniform(-1, 1, 200).astype(np.float32)
    x[::3] = np.sign(x[::3])
    got = Bernoulli().log_likelihood(output(logit), output(x))
    with mpmath.workdps(40):
        for ours, v, a in zip(got.tolist(), x.tolist(), logit.tolist(), strict=True):
            white = (mpmath.mpf(v) + 1) / 2
            want = -white * mpmath.log1p(mpmath.exp(-a)) - (1 - white) * mpmath.log1p(mpmath.exp(a))
            rounding_of_white = 0 if abs(v) == 1 else abs(a)
            assert abs(ours - want) < ROUNDING * (16 * abs(want) + rounding_of_white), (v, a)
    mean = 2 * torch.tensor(logit).double().sigmoid() - 1
    found = Bernoulli().mean(output(logit)).flatten().double()
    torch.testing.assert_close(found, mean, rtol=0, atol=4 * ROUNDING)


@every_distribution
def test_a_log_likelihood_is_the_sum_over_an_image(given):
    out = torch.randn(5, 2 * given.width, 3, 4, generator=generator(1))
    x = torch.randint(0, given.levels, (5, 2, 3, 4), generator=generator(2), dtype=torch.uint8)
    x = to_unit(x, given.levels)
    single = out.unflatten(1, (given.width, 2)).movedim(1, -1).reshape(-1, given.width, 1, 1)
    apart = given.log_likelihood(single, x.reshape(-1, 1, 1, 1)).double().reshape(5, -1).sum(1)
    # Rounding of a sum of 24 numbers.
    found = given.log_likelihood(out, x).double()
    torch.testing.assert_close(found, apart, rtol=24 * ROUNDING, atol=0)


@every_distribution
def test_values_and_gradients_are_finite_at_extremes(given):
    means, raws = torch.tensor([*MEANS, 1e20, -1e20]), torch.tensor(RAW_SCALES)
    numbers = torch.cartesian_prod(*(means, raws)[-given.width :]).reshape(-1, given.width, 1, 1)
    out = numbers.repeat(given.levels, 1, 1, 1).requires_grad_()
    log_p = given.log_likelihood(out, grid(given.levels).repeat_interleave(len(numbers), 0))
    assert bool((log_p.isfinite() & (log_p <= 0)).all())
    assert bool(torch.autograd.grad(log_p.sum(), out)[0].isfinite().all())


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


def test_a_sample_is_the_mean_and_a_multiple_of_normals():
    q = posterior(torch.float32)
    noise = torch.randn(q.mean.shape, generator=generator(6))
    assert torch.equal(q.sample(generator(6)), q.mean + q.log_std.exp() * noise)


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
    assert mean.shape == x.shape
    assert bool((mean.abs() <= 1).all())


def test_latent_channels_and_blocks_are_as_many_as_requested():
    vae = make(latent_channels=2, blocks=2)
    assert vae.latent_shape == (2, 4, 4)
    # The decoder has one more on each level.
    assert [len(part.resnets) for part in vae.encoder.down_blocks] == [2, 2]
    assert [len(part.resnets) for part in vae.decoder.up_blocks] == [3, 3]


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
