"""Loops written by hand for CLD with β = 4, M = 1/4 and Γ = 1: what one would write without cldsde.

Position and velocity have memory of their own, which is what makes small states fast, and every
operation is in place. The score is called as cldsde calls it, so that ratios compare loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["euler_maruyama", "probability_flow"]

BETA, INVERSE_MASS, FRICTION = 4.0, 4.0, 1.0


@torch.no_grad()
def euler_maruyama(
    score: Callable[[Tensor, int], Tensor],
    start: Tensor,
    times: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """States ``(B, 2, *D)`` at the end of a decreasing grid; ``score(z, i)`` is of its time i."""
    state = torch.stack([start[:, 0], start[:, 1]])
    x, v = state
    z = state.transpose(0, 1)
    noise, old = torch.empty_like(v), torch.empty_like(v)
    damping, drive = BETA * FRICTION * INVERSE_MASS, 2 * FRICTION * BETA
    for i, h in enumerate((-times.diff()).tolist()):
        pull = score(z, i)[:, 0]
        noise.normal_(generator=generator)
        old.copy_(v)
        v.mul_(1 + damping * h).add_(x, alpha=BETA * h).add_(pull, alpha=drive * h)
        v.add_(noise, alpha=math.sqrt(drive * h))
        x.add_(old, alpha=-BETA * INVERSE_MASS * h)
    return z


def probability_flow(shape: tuple[int, int, int]) -> Callable[[float, np.ndarray], np.ndarray]:
    """dz/dt where the score is the velocity, for `scipy.integrate.solve_ivp`."""
    damping, drive = BETA * FRICTION * INVERSE_MASS, FRICTION * BETA

    def flow(t: float, y: np.ndarray) -> np.ndarray:
        z = y.reshape(shape)
        out = np.empty_like(z)
        np.multiply(z[:, 1], BETA * INVERSE_MASS, out=out[:, 0])
        np.multiply(z[:, 1], -damping - drive, out=out[:, 1])
        out[:, 1] -= BETA * z[:, 0]
        return out.ravel()

    return flow
