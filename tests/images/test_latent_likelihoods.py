"""Distributions of pixels: sums, high-precision references, gradients and means."""

from itertools import product
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from cldsde.images.data import to_unit
from cldsde.images.latent import Bernoulli, DiscretisedLogistic, soft_clamp
from probes import generator
from tolerances import EPS32, order_of, rounding

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


def pair_of(given: Any, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random outputs and images."""
    out = torch.randn(batch, 2 * given.width, 3, 4, generator=generator(1))
    levels = getattr(given, "levels", 2)
    x = torch.randint(0, levels, (batch, 2, 3, 4), generator=generator(2))
    return out, to_unit(x.to(torch.uint8), levels)


@pytest.mark.parametrize("raw", RAW_SCALES)
@every_count
def test_probabilities_sum_to_one_and_have_their_mean(levels, raw):
    given, x = DiscretisedLogistic(levels=levels), grid(levels).double()
    log_p = given.log_likelihood(output(0.3, raw).expand(levels, -1, 1, 1), x.float()).double()
    scale = float(soft_clamp(torch.tensor(raw, dtype=torch.float64), 7).exp())
    # The bound in the notes of the class, for each probability in single precision.
    bound = ROUNDING * (log_p.exp() * (24 * log_p.abs() + 4 + 4 * 1.3 / scale)).sum()
    assert abs(log_p.exp().sum() - 1) < bound
    for m in MEANS:
        out = output(m, raw, dtype=torch.float64)
        p = given.log_likelihood(out.expand(levels, -1, 1, 1), x).exp()
        # Edges of neighbours may differ by the rounding of levels of size 1 in single precision.
        # The error is in units of the scale and weighted with the density, at most 1/4 each.
        tolerance = rounding(45 * levels) + ROUNDING / scale
        assert abs(p.sum().item() - 1) < tolerance
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


def test_bernoulli_is_a_distribution_of_two_levels_and_an_expectation_for_grey_ones():
    given, logits = Bernoulli(), output([-3.0, 0.2, 5.0], dtype=torch.float64)
    black, white, grey = (
        given.log_likelihood(logits, torch.full_like(logits, v)) for v in (-1.0, 1.0, -0.5)
    )
    # A logistic of two levels: P(white) = 1 − σ((0 − μ)/s) = σ(μ/s).
    mean, raw = torch.tensor([-0.4, 0.1, 2.0]).double(), torch.tensor([-2.0, 0.3, 1.0]).double()
    logit = output(mean / soft_clamp(raw, 7).exp(), dtype=torch.float64)
    pairs = [(black.exp() + white.exp(), torch.ones(3).double())]
    pairs += [(grey, 0.75 * black + 0.25 * white)]
    for x in (-1.0, 1.0):
        image, out = torch.full((3, 1, 1, 1), x).double(), output(mean, raw, dtype=torch.float64)
        logistic = DiscretisedLogistic(levels=2).log_likelihood(out, image)
        pairs += [(logistic, given.log_likelihood(logit, image))]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=rounding(32), atol=rounding(4))


@every_distribution
def test_a_log_likelihood_is_the_sum_over_an_image(given):
    out, x = pair_of(given, 5)
    together = given.log_likelihood(out, x)
    assert together.shape == (5,)
    single = torch.zeros(5, dtype=torch.float64)
    for i, h, w in product(range(2), range(3), range(4)):
        one = out[:, i::2, h, w, None, None], x[:, i, h, w, None, None, None]
        single += given.log_likelihood(*one)
    # Rounding of a sum of 24 numbers.
    torch.testing.assert_close(together.double(), single, rtol=24 * ROUNDING, atol=0)


@every_distribution
def test_half_precision_is_computed_in_single(given):
    out, x = pair_of(given, 3)
    out = out.to(torch.bfloat16)
    for function in (lambda o: given.log_likelihood(o, x), given.mean):
        assert function(out).dtype == torch.float32
        assert torch.equal(function(out), function(out.float()))


@every_distribution
def test_gradients_are_those_of_finite_differences(given):
    out, x = (part.double() for part in pair_of(given, 2))
    assert torch.autograd.gradcheck(lambda o: given.log_likelihood(o, x), out.requires_grad_())


@every_count
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_finite_at_extremes(levels, dtype):
    means, raws = torch.tensor([*MEANS, 1e20, -1e20]), torch.tensor(RAW_SCALES)
    numbers = torch.cartesian_prod(means, raws).to(dtype)
    out = numbers[..., None, None].repeat(levels, 1, 1, 1).requires_grad_()
    x = grid(levels).to(dtype).repeat_interleave(len(numbers), 0)
    log_p = DiscretisedLogistic(levels=levels).log_likelihood(out, x)
    assert bool((log_p.isfinite() & (log_p <= 0)).all())
    assert bool(torch.autograd.grad(log_p.sum(), out)[0].isfinite().all())


@pytest.mark.parametrize("x", [-1.0, 0.3, 1.0])
def test_a_bernoulli_gradient_is_finite_at_extremes(x):
    logits = output([-1e30, -200.0, 0.0, 200.0, 1e30]).requires_grad_()
    log_p = Bernoulli().log_likelihood(logits, torch.full((5, 1, 1, 1), x))
    (gradient,) = torch.autograd.grad(log_p.sum(), logits)
    assert bool(log_p.isfinite().all())
    # d log p / d logit = w − π.
    want = (x + 1) / 2 - logits.detach().sigmoid()
    torch.testing.assert_close(gradient, want, rtol=0, atol=4 * ROUNDING)


@every_distribution
def test_the_cpu_never_waits_for_the_device(given):
    # Tensors on the device "meta" have no values: reading one is an error.
    out, x = (part.to("meta") for part in pair_of(given, 2))
    assert given.log_likelihood(out, x).shape == (2,)
    assert given.mean(out).shape == x.shape


@pytest.mark.parametrize("levels", [1, 257, 2.0])
def test_wrong_numbers_of_levels_are_rejected(levels):
    with pytest.raises(ValueError, match="levels: must be"):
        DiscretisedLogistic(levels=levels)


@pytest.mark.parametrize("bound", [5.0, 7.0])
def test_a_soft_clamp_has_slope_one_at_zero_and_stays_within_its_bound(bound):
    x = torch.tensor([0.0, 1e-3, 2.0, 1e4, -1e30], dtype=torch.float64, requires_grad=True)
    y = soft_clamp(x, bound)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert (y[0], slope[0]) == (0, 1)
    assert bool((y.abs() <= bound).all())
    # b tanh(x/b) = x − x³/(3b²) + …
    assert abs(y[1].item() - x[1].item()) < order_of(1e-3, 3, 1.001 / (3 * bound**2))
    assert bool((slope.isfinite() & (slope >= 0)).all())
