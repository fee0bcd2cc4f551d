"""Loops written by hand for CLD with β = 4, M = 1/4 and Γ = 1: what one would write without cldsde.

Position and velocity have memory of their own, which is what makes small states fast, and every
operation is in place; what is constant over a grid of even steps is found once. The score is called
as cldsde calls it, so that ratios compare loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.linalg import expm
from torch import Tensor

__all__ = ["euler_maruyama", "probability_flow", "probability_flow_in_torch", "sscs"]

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
    noise = torch.empty_like(v)
    damping, drive = BETA * FRICTION * INVERSE_MASS, 2 * FRICTION * BETA
    for i, h in enumerate((-times.diff()).tolist()):
        pull = score(z, i)[:, 0]
        noise.normal_(generator=generator)
        # The velocity sees the new position, with a coefficient that undoes what v did to it.
        x.add_(v, alpha=-BETA * INVERSE_MASS * h)
        v.mul_(1 + damping * h + BETA**2 * INVERSE_MASS * h**2)
        v.add_(x, alpha=BETA * h).add_(pull, alpha=drive * h)
        v.add_(noise, alpha=math.sqrt(drive * h))
    return z


@torch.no_grad()
def sscs(
    score: Callable[[Tensor, int], Tensor],
    start: Tensor,
    times: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """The same with half-steps of neighbours merged, for steps of one length."""
    h = float(times[0] - times[-1]) / (len(times) - 1)
    drive = 2 * FRICTION * BETA
    half = _move(h / 2)
    kick = np.array([[1.0, 0.0], [0.0, 1.0 + drive * INVERSE_MASS * h]])

    def step(move: tuple[np.ndarray, np.ndarray]) -> tuple[list[list[float]], list[float], list]:
        return (move[0] @ kick).tolist(), (move[0][:, 1] * drive * h).tolist(), move[1].tolist()

    state = torch.stack([start[:, 0], start[:, 1]])
    other, noise = torch.empty_like(state), torch.empty_like(state)
    position, velocity = noise
    whole, closing = step(_move(h)), step(half)

    noise.normal_(generator=generator)
    (a, b), (c, d) = half[0].tolist()
    (r, _), (s, t) = half[1].tolist()
    x, v = state
    y, w = other
    y.zero_().add_(x, alpha=a).add_(v, alpha=b).add_(position, alpha=r)
    w.zero_().add_(x, alpha=c).add_(v, alpha=d).add_(position, alpha=s).add_(velocity, alpha=t)
    for i in range(len(times) - 1):
        state, other = other, state
        (x, v), (y, w) = state, other
        pull = score(state.transpose(0, 1), i)[:, 0]
        ((a, b), (c, d)), (p, q), ((r, _), (s, t)) = whole if i < len(times) - 2 else closing
        noise.normal_(generator=generator)
        y.zero_().add_(x, alpha=a).add_(v, alpha=b).add_(pull, alpha=p).add_(position, alpha=r)
        w.zero_().add_(x, alpha=c).add_(v, alpha=d).add_(pull, alpha=q)
        w.add_(position, alpha=s).add_(velocity, alpha=t)
    return other.transpose(0, 1)


def _move(h: float) -> tuple[np.ndarray, np.ndarray]:
    """Matrix and noise root of the stationary process, back in time by h (Van Loan 1978)."""
    F = BETA * np.array([[0.0, INVERSE_MASS], [-1.0, -FRICTION * INVERSE_MASS]])
    law = np.diag([1.0, 1 / INVERSE_MASS])
    back = law @ F.T @ np.linalg.inv(law)
    noise = np.diag([0.0, 2 * FRICTION * BETA])
    block = np.block([[-back, noise], [np.zeros((2, 2)), back.T]])
    exponential = expm(block * h)
    psi = exponential[2:, 2:].T
    return psi, np.linalg.cholesky(psi @ exponential[:2, 2:])


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


def probability_flow_in_torch(t: Tensor, z: Tensor) -> Tensor:
    """The same, for `torchdiffeq.odeint`."""
    out = torch.empty_like(z)
    x, v = z.unbind(1)
    dx, dv = out.unbind(1)
    torch.mul(v, BETA * INVERSE_MASS, out=dx)
    torch.mul(v, -BETA * FRICTION * INVERSE_MASS - FRICTION * BETA, out=dv).sub_(x, alpha=BETA)
    return out
