"""Whether two processes are the same, by numbers: their names and arguments do not matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cldsde.linear.sde import LinearSDE, check_process

_TIMES = 127  # irregular times, beside those near 0
_NUMBERS = 6
_DIGITS = 9  # decimals that are kept; the numbers are of the order of 1 to 100
# Equal processes that are computed in two ways differ by 1e-12 of each number. Coefficients that
# differ by this part of themselves on a thousandth of the times differ by more than this.
_SAME = 5e-9
_KNOWN: WeakKeyDictionary[LinearSDE, tuple[float, ...]] = WeakKeyDictionary()

Fingerprint = tuple[float, ...]
"""Numbers that tell a process from others, see `fingerprint`."""


def fingerprint(sde: LinearSDE) -> Fingerprint:
    """Numbers of a process that other processes do not share, whatever its class is called.

    They are weighted sums of F, G, Ψ(t, 0) and the covariance of z_t given the data, at irregular
    times from 1e-8 to the last at which F and G are finite.
    """
    if check_process(sde) not in _KNOWN:
        with torch.inference_mode(False), torch.no_grad():
            _KNOWN[sde] = _projected(_features(sde))
    return _KNOWN[sde]


def same_process(first: LinearSDE | Fingerprint, second: LinearSDE | Fingerprint) -> bool:
    """Whether two processes have the same F and G at all times, and initial covariance.

    Numbers that identify a process, as sampler settings keep them, stand for it. The dimension and
    dtype of the data, the prior and the name of the class do not matter.
    """
    if first is second:
        return True
    a, b = (fingerprint(x) if isinstance(x, LinearSDE) else x for x in (first, second))
    return len(a) == len(b) and all(
        math.isclose(x, y, rel_tol=_SAME, abs_tol=_SAME) for x, y in zip(a, b, strict=True)
    )


def _features(sde: LinearSDE) -> Tensor:
    """F, G, transition and covariance in units in which rounding is alike, ``(times, m)``."""
    steps = torch.arange(1, _TIMES + 1, dtype=torch.float64, device="cpu")
    early = 10 ** torch.linspace(-8, -1, 15, dtype=torch.float64, device="cpu")
    # Multiples of the golden ratio are spread evenly, at no regular distance.
    share = torch.cat([early, (steps * (math.sqrt(5) - 1) / 2).frac()])
    t = share * sde.regular_until
    covariance = sde.marginal(t).covariance
    spread = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    floor = torch.finfo(torch.float64).tiny
    correlation = covariance / (spread[..., None] * spread[..., None, :]).clamp_min(floor)
    blocks = (
        *(sde.drift(t).asinh(), sde.diffusion(t).asinh()),  # they may diverge at the last time
        *(sde.transition_matrix(torch.zeros_like(t), t), correlation.tril(-1)),
        (spread.clamp_min(floor).log() / 10).unsqueeze(-1),
        sde.initial_covariance.expand_as(covariance),
    )
    return torch.cat([block.flatten(1) for block in blocks], dim=1)


def _projected(features: Tensor) -> Fingerprint:
    """Weighted sums of features, after the number of components and of columns of G."""
    n = features.numel()
    place = torch.arange(1, n + 1, dtype=torch.float64, device="cpu")
    order = torch.arange(1, _NUMBERS + 1, dtype=torch.float64, device="cpu")
    weights = (place.square() * order[:, None].sqrt()).cos()
    sums = weights @ features.flatten() / math.sqrt(n)
    return (float(features.shape[1]), *(round(x, _DIGITS) for x in sums.tolist()))


def as_fingerprint(process: LinearSDE | Sequence[float]) -> Fingerprint:
    """Fingerprint of a process, or checked numbers of one; raise TypeError for anything else."""
    if isinstance(process, LinearSDE):
        return fingerprint(process)
    numbers = isinstance(process, Sequence) and all(isinstance(x, int | float) for x in process)
    if not numbers or len(process) != _NUMBERS + 1:
        raise TypeError(
            f"process must be a LinearSDE or the numbers that identify it; got {process!r}"
        )
    return tuple(map(float, process))
