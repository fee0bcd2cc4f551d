"""Distributions of pixels: sums, high-precision references and means."""

from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from cldsde.images.data import to_unit
from cldsde.images.latent import Bernoulli, DiscretisedLogistic, soft_clamp
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
