"""Hand-written solver loops for CLD with β = 4, M = 1/4 and Γ = 1, as one would without cldsde.

Every operation is in place, and constants of a uniform grid are computed once. States are
``(B, 2, *D)`` in contiguous memory, which plain functions as scores expect.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.linalg import expm
from torch import Tensor

__all__ = ["euler_maruyama", "sscs"]

BETA, INVERSE_MASS, FRICTION = 4.0, 4.0, 1.0

Score = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def euler_maruyama(
    score: Score, start: Tensor, times: Tensor, generator: torch.Generator
) -> Tensor:
    """Final states ``(B, 2, *D)`` of Euler–Maruyama on a decreasing grid."""
    z = start.clone()
    x, v = z.unbind(1)
    noise = start.new_empty(v.shape)
    damping, drive = BETA * FRICTION * INVERSE_MASS, 2 * FRICTION * BETA
    for t, h in zip(times[:-1].to(start), (-times.diff()).tolist(), strict=True):
        pull = score(z, t.expand(len(z)))[:, 0]
        noise.normal_(generator=generator)
        # v is updated with the new position, so its coefficient subtracts the position's change.
        x.add_(v, alpha=-BETA * INVERSE_MASS * h)
        v.mul_(1 + damping * h + BETA**2 * INVERSE_MASS * h**2)
        v.add_(x, alpha=BETA * h).add_(pull, alpha=drive * h)
        v.add_(noise, alpha=math.sqrt(drive * h))
    return z


@torch.no_grad()
def sscs(score: Score, start: Tensor, times: Tensor, generator: torch.Generator) -> Tensor:
    """SSCS with merged half-steps, for steps of one length."""
    h = float(times[0] - times[-1]) / (len(times) - 1)
    drive = 2 * FRICTION * BETA
    half = _move(h / 2)
    kick = np.array([[1.0, 0.0], [0.0, 1.0 + drive * INVERSE_MASS * h]])

    def step(move: tuple[np.ndarray, np.ndarray]) -> tuple[list[list[float]], list[float], list]:
        return (move[0] @ kick).tolist(), (move[0][:, 1] * drive * h).tolist(), move[1].tolist()

    state, other = start.clone(), torch.empty_like(start)
    noise = start.new_empty(2, len(start), *start.shape[2:])
    position, velocity = noise
    whole, closing = step(_move(h)), step(half)

    noise.normal_(generator=generator)
    (a, b), (c, d) = half[0].tolist()
    (r, _), (s, t) = half[1].tolist()
    x, v = state.unbind(1)
    y, w = other.unbind(1)
    torch.mul(x, a, out=y).add_(v, alpha=b).add_(position, alpha=r)
    torch.mul(x, c, out=w).add_(v, alpha=d).add_(position, alpha=s).add_(velocity, alpha=t)
    for i, time in enumerate(times[:-1].to(start)):
        state, other = other, state
        (x, v), (y, w) = state.unbind(1), other.unbind(1)
        pull = score(state, time.expand(len(state)))[:, 0]
        ((a, b), (c, d)), (p, q), ((r, _), (s, t)) = whole if i < len(times) - 2 else closing
        noise.normal_(generator=generator)
        torch.mul(x, a, out=y).add_(v, alpha=b).add_(pull, alpha=p).add_(position, alpha=r)
        torch.mul(x, c, out=w).add_(v, alpha=d).add_(pull, alpha=q)
        w.add_(position, alpha=s).add_(velocity, alpha=t)
    return other


def _move(h: float) -> tuple[np.ndarray, np.ndarray]:
    """Matrix and noise root of the stationary process, back in time by h (Van Loan 1978)."""
    F = BETA * np.array([[0.0, INVERSE_MASS], [-1.0, -FRICTION * INVERSE_MASS]])
    stationary = np.diag([1.0, 1 / INVERSE_MASS])
    back = stationary @ F.T @ np.linalg.inv(stationary)
    noise = np.diag([0.0, 2 * FRICTION * BETA])
    block = np.block([[-back, noise], [np.zeros((2, 2)), back.T]])
    exponential = expm(block * h)
    psi = exponential[2:, 2:].T
    return psi, np.linalg.cholesky(psi @ exponential[:2, 2:])
