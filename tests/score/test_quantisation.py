"""Dequantisation, and bits per dimension."""

import math

import pytest
import torch

from cldsde.score import bits_per_dim, dequantise
from cldsde.score.likelihood import Likelihood
from probes import generator
from tolerances import EPS32, rounding, standard_error


@pytest.mark.parametrize("dimension", [1, 7, 3072])
@pytest.mark.parametrize(("width", "bits"), [(1.0, 0.0), (1 / 256, 8.0), (2 / 256, 7.0)])
def test_bytes_cost_eight_bits_less_the_density(dimension, width, bits):
    log_prob = torch.tensor([0.0, math.log(2) * dimension], dtype=torch.float64)
    expected = torch.tensor([bits, bits - 1], dtype=torch.float64)
    found = bits_per_dim(log_prob, dimension, width)
    assert torch.allclose(found, expected, rtol=rounding(4), atol=rounding(4))
    likelihood = Likelihood(log_prob, log_prob, is_bound=True, dimension=dimension, nfev=1)
    assert torch.equal(likelihood.bits_per_dim(width), found)


@pytest.mark.parametrize("options", [{}, {"count": 2, "low": 0.0, "high": 3.0}])
def test_levels_are_spread_evenly_over_their_bins(options):
    n, defaults = 50_000, {"count": 256, "low": -1.0, "high": 1.0}
    count, low, high = {**defaults, **options}.values()
    levels = torch.randint(0, count, (n,), generator=generator(1))
    x = dequantise(levels, **options, generator=generator())
    shift = (x.double() - low) / (high - low) * count - levels
    rounded = 2 * count * EPS32  # single precision at the ends, in bins
    assert -rounded <= shift.min() <= shift.max() <= 1 + rounded
    for power in (1, 2, 3):
        std = math.sqrt(1 / (2 * power + 1) - 1 / (power + 1) ** 2)
        error = abs(float((shift**power).mean()) - 1 / (power + 1))
        assert error <= standard_error(std, n) + rounded
    correlation = torch.corrcoef(torch.stack([shift, levels.double()]))[0, 1]
    assert abs(float(correlation)) <= standard_error(1.0, n)
