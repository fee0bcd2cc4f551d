"""Conjugate gradients for a batch of systems whose matrices may not be positive definite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cldsde.linear.blocks import per_sample
from cldsde.score.operators import Operator


def conjugate_gradients(
    apply: Callable[[Tensor], tuple[Tensor, Tensor]], safe: Operator, b: Tensor, *, iterations: int
) -> Tensor:
    """Solve R x = b for each sample of a batch ``(B, *E)`` with at most ``iterations`` products.

    With a learnt Jacobian R may be neither symmetric nor positive definite. ``apply`` returns R p
    of a direction p, and the theoretical bound on its curvature pᵀRp of each sample, ``(B,)``. A
    sample stops with its current x when the curvature falls below this bound. If this happens in
    the first direction, x is the first step for the positive definite matrix of ``safe``.
    """
    x, residual, direction = torch.zeros_like(b), b, b
    square = dot(b, b)
    # The relative residual is then 2e-12 in float64 and 7e-6 in float32.
    small = square * torch.finfo(b.dtype).eps ** 1.5
    active = square > 0
    for i in range(iterations):
        if not bool(active.any()):
            break
        moved, least = apply(direction)
        curvature = dot(direction, moved)
        # This comparison is False for NaN, which counts as a failure, too.
        sound = active & (curvature > least)
        stepping = sound
        if i == 0 and not torch.equal(sound, active):
            stepping = active
            curvature = torch.where(sound, curvature, dot(direction, safe(direction)))
        step = torch.where(stepping, square / curvature, 0.0)
        x = x + per_sample(step, b) * direction
        active = sound
        residual = residual - per_sample(torch.where(active, step, 0.0), b) * moved.nan_to_num()
        new = dot(residual, residual)
        active = active & (new > small)
        ratio = torch.where(active, new / square, 0.0)
        direction = residual + per_sample(ratio, b) * direction
        square = new
    return x


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample, ``(B,)``."""
    return (a * b).flatten(1).sum(1)
