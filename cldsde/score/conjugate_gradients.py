"""Conjugate gradients for a batch of systems whose matrices may fail to be positive."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["conjugate_gradients", "dot", "per_sample"]

Operator = Callable[[Tensor], Tensor]
"""A linear map of a batch ``(B, *E)`` that acts on each sample alone."""


def conjugate_gradients(
    apply: Callable[[Tensor], tuple[Tensor, Tensor]],
    safe: Operator,
    b: Tensor,
    *,
    iterations: int,
) -> Tensor:
    """Solve R x = b for each sample of a batch.

    A learnt Jacobian makes R neither symmetric nor positive. A sample stops, with the x that it
    has, when the curvature pᵀRp of its direction p falls below a bound from the theory. If that
    happens in the first direction, x is the first step for the matrix of ``safe``.

    Parameters
    ----------
    apply
        A direction p to R p and the bound on pᵀRp of each sample, ``(B,)``.
    safe
        A positive definite matrix in place of R.
    b
        ``(B, *E)``.
    iterations
        Most applications of R; fewer if every sample has converged to the precision of its dtype.

    Returns
    -------
    Tensor
        ``(B, *E)``.
    """
    x, residual, direction = torch.zeros_like(b), b, b
    square = dot(b, b)
    # In its own units: a relative residual of 2e-12 in float64, 7e-6 in float32.
    small = square * torch.finfo(b.dtype).eps ** 1.5
    active = square > 0
    for i in range(iterations):
        if not bool(active.any()):
            break
        moved, least = apply(direction)
        curvature = dot(direction, moved)
        # Written so that NaN is a fault, too.
        sound = curvature > least
        if i == 0 and not bool((sound | ~active).all()):
            first = dot(direction, safe(direction))
            curvature = torch.where(sound, curvature, first)
            step = torch.where(active, square / curvature, 0.0)
        else:
            step = torch.where(active & sound, square / curvature, 0.0)
        x = x + per_sample(step, b) * direction
        active = active & sound
        residual = residual - per_sample(torch.where(active, step, 0.0), b) * moved.nan_to_num()
        new = dot(residual, residual)
        active = active & (new > small)
        ratio = torch.where(active, new / square, 0.0)
        direction = residual + per_sample(ratio, b) * direction
        square = new
    return x


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """Numbers ``(B,)``, or one, in a shape that multiplies a batch ``(B, *E)``."""
    return value.reshape(-1, *(1,) * (like.ndim - 1))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample, ``(B,)``."""
    return (a * b).flatten(1).sum(1)
