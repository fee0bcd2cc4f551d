"""Dequantisation of discrete data, and likelihoods in bits per dimension."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cldsde.linear.checks import check_at_least, check_positive, described
from cldsde.linear.random import check_generator


def bits_per_dim(log_prob: Tensor, dimension: int, bin_width: float = 1.0) -> Tensor:
    """Negative log-likelihood in bits per dimension of dequantised discrete data.

    Parameters
    ----------
    log_prob
        Log-density in nats, of any shape, which the result has, too.
    dimension
        Number D of entries of a data point.
    bin_width
        Distance between two levels in the units of the density: 2/256 for bytes scaled to [−1, 1],
        1/256 for [0, 1], and 1 for continuous data.

    Examples
    --------
    >>> import torch
    >>> round(float(bits_per_dim(torch.tensor(0.0), 3072, bin_width=2 / 256)), 12)
    7.0
    """
    check_at_least(dimension, 1, "dimension")
    check_positive(bin_width, "bin_width")
    return -log_prob / (dimension * math.log(2)) - math.log2(bin_width)


def dequantise(
    levels: Tensor,
    *,
    count: int = 256,
    low: float = -1.0,
    high: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Uniform dequantisation: (level + U) / count with U ~ U(0, 1), scaled to [low, high].

    The density of the result bounds the probability of the levels (Theis et al. 2016): pass
    ``bin_width=(high - low) / count`` to `bits_per_dim`.

    Parameters
    ----------
    levels
        Integers in 0 … count − 1, of any shape. The result has this shape, float32.
    count, low, high
        Number of levels, and ends of the scale.
    generator
        Random generator of U.

    Raises
    ------
    TypeError, ValueError
        If the levels are not integers, a level is out of range, or low ≥ high.
    """
    if not isinstance(levels, Tensor) or levels.is_floating_point() or levels.is_complex():
        raise TypeError(f"levels must be a tensor of integers; got {described(levels)}")
    check_generator(generator, several=False)
    check_at_least(count, 2, "count")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"low must be below high, and both finite; got {low} and {high}")
    if levels.numel() and not (int(levels.min()) >= 0 and int(levels.max()) < count):
        msg = f"levels must lie in 0 … {count - 1}; got {int(levels.min())} to {int(levels.max())}"
        raise ValueError(msg)
    source = levels.device if generator is None else generator.device
    uniform = torch.rand(levels.shape, generator=generator, device=source).to(levels.device)
    return low + (high - low) * (levels + uniform) / count
