"""Taylor series of linear differential equations, with full relative accuracy of each term.

A function on a panel is sampled at Gauss nodes and represented by its coefficients in the
orthonormal Legendre polynomials p_j of x ∈ [0, 1]. Consider a part of the panel with the relative
length ρ. Around its end the function is a series in y ∈ [0, 1], the time before the end. Term p is
of order ρ^p. Such series are formed, multiplied and integrated term by term, so that every term
keeps its digits however short the part is. Function values would lose them, because they are equal
to leading order.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from cldsde.linear.schedule import gauss_legendre

NODES = 16
TERMS = 36
"""Number of terms of a product."""

_EPS = torch.finfo(torch.float64).eps


def legendre(values: Tensor) -> Tensor:
    """Legendre coefficients ``(p, NODES, a, b)`` of a function from its values at Gauss nodes."""
    series: Tensor = _transform() @ values.flatten(2)
    return series.reshape(values.shape)


def without_rounding(series: Tensor, rounding: Tensor) -> Tensor:
    """Set Legendre coefficients below the rounding error of the values to zero, entry by entry.

    Otherwise a derivative of order j would amplify the rounding error by NODES^2j. The gradients of
    all coefficients are kept. ``rounding`` ``(p,)`` is the rounding error of a time relative to the
    length of its panel.
    """
    size = series.detach().abs()
    order = torch.arange(NODES, device="cpu", dtype=torch.float64).reshape(-1, 1, 1)
    slope = (order * size).sum(1, keepdim=True)
    noise = 4 * _EPS * size.amax(1, keepdim=True) + rounding.reshape(-1, 1, 1, 1) * slope
    return series - torch.where(size <= noise, series.detach(), 0.0)


def taylor(series: Tensor, end: Tensor, length: Tensor) -> Tensor:
    """Taylor terms of f(end − length y) in powers of y, from the Legendre coefficients of f.

    Both series are ``(p, NODES, a, b)``. ``end`` and ``length`` ``(p,)`` are in units of the panel.
    """
    # Powers of y in p_j(x): u p_j = b_{j+1} p_{j+1} + b_j p_{j−1} with u = 2x − 1.
    b = _recurrence()
    u, step = (2 * end - 1).unsqueeze(0), 2 * length.unsqueeze(0)
    last = torch.zeros(NODES, len(end), device="cpu", dtype=torch.float64)
    row = torch.cat([torch.ones_like(u), last[1:]])
    rows = [row]
    for j in range(1, NODES):
        raised = torch.cat([torch.zeros_like(u), step * row[:-1]])
        row, last = (u * row - raised - b[j - 1] * last) / b[j], row
        rows.append(row)
    terms: Tensor = torch.stack(rows).permute(2, 1, 0) @ series.flatten(2)
    return terms.reshape(series.shape)


def transition_series(F: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """Taylor terms of Y(y) = Ψ(end, end − h y), which solves Y' = Y F with Y(0) = I, and of Y G.

    They are ``(p, TERMS, k, k)``, whose sum is Ψ, and ``(p, TERMS, k, r)``. ``F`` and ``G`` are the
    terms of hF, ``(p, NODES, k, k)``, and of G, ``(p, NODES, k, r)``.
    """
    p, _, k, _ = F.shape
    # Term n of a product with Y is the latest terms of Y, side by side, times the stacked factors.
    factors = torch.cat([F, G], dim=-1).flip(1).flatten(1, 2)
    recent = torch.eye(k, device="cpu", dtype=torch.float64).expand(p, k, k)
    Y, driven = [recent], []
    for n in range(1, TERMS + 1):
        product = recent @ factors[:, -recent.shape[-1] :]
        driven.append(product[..., k:])
        if n < TERMS:
            Y.append(product[..., :k] / n)
            full = recent.shape[-1] == NODES * k
            recent = torch.cat([recent[..., k:] if full else recent, Y[-1]], dim=-1)
    return torch.stack(Y, dim=1), torch.stack(driven, dim=1)


def basis(x: Tensor) -> Tensor:
    """Polynomials p_0 … p_{NODES−1} at points ``(n,)`` of [0, 1], ``(n, NODES)``."""
    b = _recurrence()
    u = 2 * x - 1
    values = [torch.ones_like(x), u / b[1]]
    for j in range(2, NODES):
        values.append((u * values[-1] - b[j - 1] * values[-2]) / b[j])
    return torch.stack(values, dim=-1)


@lru_cache
@torch.inference_mode(False)
def _recurrence() -> Tensor:
    """b_j = j/√(4j² − 1) for j < NODES."""
    b = [j / math.sqrt(4 * j * j - 1) for j in range(1, NODES)]
    return torch.tensor([0.0, *b], device="cpu", dtype=torch.float64)


@lru_cache
@torch.inference_mode(False)
def _transform() -> Tensor:
    """Matrix from values at the Gauss nodes to coefficients, ``(NODES, NODES)``."""
    values = basis(gauss_legendre(NODES)[0])
    # Compute the Christoffel weights here, because numpy's have an error of some units in the last
    # place.
    return values.T / values.square().sum(1)
