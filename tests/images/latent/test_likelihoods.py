"""Laws of pixels: sums, high-precision references, gradients, means and samples."""

from __future__ import annotations

from itertools import product
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from cldsde.images.data import to_unit
from cldsde.images.latent import Bernoulli, DiscretisedLogistic, soft_clamp
from probes import generator

ROUNDING = 2.0**-24  # of single precision
LAWS: dict[str, Any] = {
    "logistic of 2": DiscretisedLogistic(2),
    "logistic of 17": DiscretisedLogistic(17),
    "logistic of 256": DiscretisedLogistic(256),
    "bernoulli": Bernoulli(),
}
every_law = pytest.mark.parametrize("name", list(LAWS))
every_count = pytest.mark.parametrize("levels", [2, 3, 17, 256])

# What a network may return for the logarithm of a scale, before it is bounded by ±7.
RAW_SCALES = [-1e30, -60.0, -9.0, -5.0, -2.0, 0.0, 3.0, 20.0, 1e30]
MEANS = [-1000.0, -1.3, -1.0, -0.2, 1 / 255, 0.7, 1.0, 1.1, 50.0]


def grid(levels: int) -> torch.Tensor:
    """All levels, one an image of one number."""
    return to_unit(torch.arange(levels, dtype=torch.uint8), levels).reshape(-1, 1, 1, 1)


def output(*numbers: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Outputs ``(B, parameters, 1, 1)`` of tables of numbers, one a parameter."""
    columns = torch.broadcast_tensors(*(torch.as_tensor(n, dtype=dtype) for n in numbers))
    return torch.stack([c.flatten() for c in columns], 1)[..., None, None]


def outputs_of(law: Any, batch: int, spread: float = 1.0) -> torch.Tensor:
    shape = (batch, 2 * law.width, 3, 4)
    return spread * torch.randn(shape, generator=generator(1))


def images_of(law: Any, batch: int) -> torch.Tensor:
    levels = getattr(law, "levels", 2)
    g = generator(2)
    return to_unit(torch.randint(0, levels, (batch, 2, 3, 4), generator=g).to(torch.uint8), levels)


# Values.


@pytest.mark.parametrize("raw", RAW_SCALES)
@pytest.mark.parametrize("mean", MEANS)
@every_count
def test_probabilities_sum_to_one(levels, mean, raw):
    law = DiscretisedLogistic(levels)
    x = grid(levels).double()
    log_p = law.log_likelihood(output(mean, raw, dtype=torch.float64).expand(levels, -1, 1, 1), x)
    # Edges of neighbours may differ by the rounding of levels of size 1 in single precision, which
    # is seen in units of the scale and weighted with the density, at most 1/4 each.
    scale = float(soft_clamp(torch.tensor(raw, dtype=torch.float64), 7).exp())
    assert abs(log_p.exp().sum().item() - 1) < levels * 1e-14 + ROUNDING / scale


@pytest.mark.parametrize("raw", RAW_SCALES)
@every_count
def test_probabilities_sum_to_one_to_the_bound_of_single_precision(levels, raw):
    law = DiscretisedLogistic(levels)
    log_p = law.log_likelihood(output(0.3, raw).expand(levels, -1, 1, 1), grid(levels))
    p, scale = log_p.double().exp(), float(soft_clamp(torch.tensor(raw), 7).exp())
    # The bound that the notes of the class state, of each probability.
    bound = ROUNDING * (p * (24 * log_p.abs() + 4 + 4 * 1.3 / scale)).sum()
    assert abs(p.sum() - 1) < bound


@every_count
def test_a_logistic_logarithm_is_within_its_bound_of_the_exact_one(levels):
    rng = np.random.default_rng(levels)
    raw = rng.uniform(-14, 8, 300).astype(np.float32)
    level = rng.integers(0, levels, 300)
    scale = np.exp(7 * np.tanh(raw / 7))
    # Means about the level, within some scales or far away.
    far = rng.choice([0.0, 1.0, 1.0, 30.0], 300)
    mean = np.where(far, 2 * level / (levels - 1) - 1 + far * scale * rng.normal(size=300), 0.4)
    mean = mean.astype(np.float32)
    x = grid(levels)[level]
    got = DiscretisedLogistic(levels).log_likelihood(output(mean, raw), x)
    with mpmath.workdps(40):
        for ours, j, m, r in zip(got.tolist(), level.tolist(), mean, raw, strict=True):
            want, s = _logistic(levels, j, float(m), float(r))
            bound = 24 * abs(want) + 4 * (1 + (1 + abs(float(m))) / s)
            assert abs(ours - want) < ROUNDING * bound, (j, m, r)


def _logistic(levels: int, level: int, mean: float, raw: float) -> tuple[Any, Any]:
    """Logarithm of the probability, by its definition in many digits, and the scale."""
    scale = mpmath.exp(7 * mpmath.tanh(mpmath.mpf(raw) / 7))
    above = (mpmath.mpf(2 * level + 1) / (levels - 1) - 1 - mean) / scale
    below = (mpmath.mpf(2 * level - 1) / (levels - 1) - 1 - mean) / scale
    if above + below > 0:
        # 1 − σ(a) = σ(−a): from the side where probabilities are small.
        above, below, level = -below, -above, levels - 1 - level
    low = 0 if level == 0 else 1 / (1 + mpmath.exp(-below))
    high = 1 if level == levels - 1 else 1 / (1 + mpmath.exp(-above))
    return mpmath.log(high - low), scale


def test_a_bernoulli_logarithm_is_within_its_bound_of_the_exact_one():
    rng = np.random.default_rng(0)
    # Beyond ±87 e^{−|logit|} is no normal number.
    logit = rng.normal(size=400) * np.repeat([0.1, 3.0, 10.0, 60.0], 100)
    logit = logit.clip(-85, 85).astype(np.float32)
    x = rng.uniform(-1, 1, 400).astype(np.float32)
    x[::3] = np.sign(x[::3])
    got = Bernoulli().log_likelihood(output(logit), output(x))
    with mpmath.workdps(40):
        for ours, v, a in zip(got.tolist(), x.tolist(), logit.tolist(), strict=True):
            white = (mpmath.mpf(v) + 1) / 2
            want = -white * mpmath.log1p(mpmath.exp(-a)) - (1 - white) * mpmath.log1p(mpmath.exp(a))
            rounding_of_white = 0 if abs(v) == 1 else abs(a)
            assert abs(ours - want) < ROUNDING * (16 * abs(want) + rounding_of_white), (v, a)


def test_bernoulli_of_grey_levels_is_the_expectation_over_black_and_white():
    law, logits = Bernoulli(), output([-3.0, 0.2, 5.0], dtype=torch.float64)
    black, white = (law.log_likelihood(logits, torch.full_like(logits, v)) for v in (-1.0, 1.0))
    # Two levels: a law, whose probabilities sum to 1 but for some roundings.
    torch.testing.assert_close(black.exp() + white.exp(), torch.ones(3).double())
    grey = law.log_likelihood(logits, torch.full_like(logits, -0.5))
    torch.testing.assert_close(grey, 0.75 * black + 0.25 * white)


def test_a_logistic_law_of_two_levels_is_bernoulli():
    # P(white) = 1 − σ((0 − μ)/s) = σ(μ/s).
    mean, raw = torch.tensor([-0.4, 0.1, 2.0]).double(), torch.tensor([-2.0, 0.3, 1.0]).double()
    logit = mean / soft_clamp(raw, 7).exp()
    for x in (-1.0, 1.0):
        image = torch.full((3, 1, 1, 1), x).double()
        torch.testing.assert_close(
            DiscretisedLogistic(2).log_likelihood(output(mean, raw, dtype=torch.float64), image),
            Bernoulli().log_likelihood(output(logit, dtype=torch.float64), image),
        )


@every_law
def test_a_log_likelihood_is_the_sum_over_an_image(name):
    law = LAWS[name]
    out, x = outputs_of(law, 5), images_of(law, 5)
    together = law.log_likelihood(out, x)
    assert together.shape == (5,)
    c = x.shape[1]
    single = torch.zeros(5, dtype=torch.float64)
    for i, h, w in product(range(c), range(3), range(4)):
        single += law.log_likelihood(
            out[:, i::c, h, w, None, None], x[:, i, h, w, None, None, None]
        )
    # Rounding of a sum of 24 numbers.
    torch.testing.assert_close(together.double(), single, rtol=24 * ROUNDING, atol=0)


@every_law
def test_half_precision_is_computed_in_single(name):
    law = LAWS[name]
    out, x = outputs_of(law, 3).to(torch.bfloat16), images_of(law, 3)
    for half, single in (
        (law.log_likelihood(out, x), law.log_likelihood(out.float(), x)),
        (law.mean(out), law.mean(out.float())),
    ):
        assert half.dtype == torch.float32
        assert torch.equal(half, single)


# Gradients.


@every_law
def test_gradients_are_those_of_finite_differences(name):
    law = LAWS[name]
    out, x = outputs_of(law, 2).double().requires_grad_(), images_of(law, 2).double()
    assert torch.autograd.gradcheck(lambda o: law.log_likelihood(o, x), out)


@every_count
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_finite_at_extremes(levels, dtype):
    means, raws = torch.tensor([*MEANS, 1e20, -1e20]), torch.tensor(RAW_SCALES)
    numbers = torch.cartesian_prod(means, raws).to(dtype)
    out = numbers[..., None, None].repeat(levels, 1, 1, 1).requires_grad_()
    x = grid(levels).to(dtype).repeat_interleave(len(numbers), 0)
    log_p = DiscretisedLogistic(levels).log_likelihood(out, x)
    (gradient,) = torch.autograd.grad(log_p.sum(), out)
    assert bool(log_p.isfinite().all())
    assert bool((log_p <= 0).all())
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("x", [-1.0, 0.3, 1.0])
def test_a_bernoulli_gradient_is_finite_at_extremes(x):
    logits = output([-1e30, -200.0, 0.0, 200.0, 1e30]).requires_grad_()
    log_p = Bernoulli().log_likelihood(logits, torch.full((5, 1, 1, 1), x))
    (gradient,) = torch.autograd.grad(log_p.sum(), logits)
    assert bool(log_p.isfinite().all())
    # d log p / d logit = w − π.
    want = (x + 1) / 2 - logits.detach().sigmoid()
    torch.testing.assert_close(gradient, want, rtol=0, atol=4 * ROUNDING)


# Means.


@pytest.mark.parametrize("raw", RAW_SCALES)
@every_count
def test_the_mean_is_that_of_the_probabilities(levels, raw):
    law, means = DiscretisedLogistic(levels), torch.tensor(MEANS).double()
    x = grid(levels).double()
    for m in means:
        out = output(m, raw, dtype=torch.float64)
        p = law.log_likelihood(out.expand(levels, -1, 1, 1), x).exp()
        want = (p * x.flatten()).sum()
        # The tolerance of the sum of probabilities: levels rounded to single precision.
        scale = float(soft_clamp(torch.tensor(raw, dtype=torch.float64), 7).exp())
        tolerance = levels * 1e-14 + 2 * ROUNDING * (1 + 1 / scale)
        torch.testing.assert_close(law.mean(out).squeeze(), want, rtol=0, atol=tolerance)
        single = law.mean(out.float()).squeeze()
        assert -1 <= single <= 1
        # Sums of `levels` numbers of at most 1, beside the rounding of the mean in units of s.
        tolerance += ROUNDING * (levels + 24 + 4 * (1 + abs(float(m))) / scale)
        torch.testing.assert_close(single.double(), want, rtol=0, atol=tolerance)


# The interface.


def test_channels_are_those_of_the_parameters():
    assert (DiscretisedLogistic(256).width, Bernoulli().width) == (2, 1)


@every_law
def test_laws_are_values(name):
    law = LAWS[name]
    assert law == type(law)(*vars(law).values())
    assert hash(law) == hash(type(law)(*vars(law).values()))


@every_law
def test_the_host_never_waits_for_the_device(name):
    # Tensors on the device "meta" have no values: a look at one is an error.
    law = LAWS[name]
    out, x = outputs_of(law, 2).to("meta"), images_of(law, 2).to("meta")
    assert law.log_likelihood(out, x).shape == (2,)
    assert law.mean(out).shape == x.shape


@every_law
def test_an_output_of_another_shape_is_refused(name):
    law = LAWS[name]
    x = images_of(law, 2)
    for wrong in (outputs_of(law, 1), outputs_of(law, 2)[:, :-1], outputs_of(law, 2)[..., :1]):
        with pytest.raises(ValueError, match="output must have shape"):
            law.log_likelihood(wrong, x)


# The soft clamp.


@pytest.mark.parametrize("bound", [5.0, 7.0])
def test_a_soft_clamp_has_slope_one_at_zero_and_stays_within_its_bound(bound):
    x = torch.tensor([0.0, 1e-3, 2.0, 1e4, -1e30], dtype=torch.float64, requires_grad=True)
    y = soft_clamp(x, bound)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert (y[0], slope[0]) == (0, 1)
    assert bool((y.abs() <= bound).all())
    # b tanh(x/b) = x − x³/(3b²) + …
    assert abs(y[1].item() - 1e-3) < 1e-9 / (3 * bound**2) * 1.001
    assert bool((slope >= 0).all())
    assert bool(slope.isfinite().all())
