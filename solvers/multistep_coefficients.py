"""Coefficients of exponential multistep steps, before the polynomials are chosen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cldsde.linear.blocks import block_solve
from cldsde.linear.covariance import triangular_inverse
from cldsde.linear.moves import by_steps, carried_roots, marginal_factors, moves_to_end
from cldsde.linear.schedule import gauss_legendre
from cldsde.linear.sde import LinearSDE

_NODES = 16


class Steps(NamedTuple):
    """Coefficients of the steps before the polynomials are chosen."""

    nodes: Tensor  # quadrature times along each step, (n, q); q = 0 if no step needs them
    move: Tensor  # (n, k, k)
    noise: Tensor  # (n, k, k), or no columns if the steps are deterministic
    total: Tensor  # weights of a constant prediction, (n, k, m)
    slope: Tensor  # their integrand at the nodes, times the quadrature weight, (n, q, k, m)


def lagrange(points: Tensor, at: Tensor) -> Tensor:
    """Lagrange polynomials through ``points (n, m)`` at ``(n, q)``, shape ``(n, q, m)``."""
    distance = at[:, :, None] - points[:, None]
    spacing = points[:, :, None] - points[:, None]
    factors = distance[:, :, None] / spacing[:, None]  # (n, q, m, m)
    factors.diagonal(dim1=2, dim2=3).fill_(1.0)
    return factors.prod(-1)


def curvature(points: Tensor, at: Tensor) -> Tensor:
    """Quadratic term of `lagrange` in the distance from the first of three points."""
    spacing = points[:, :, None] - points[:, None]
    spacing.diagonal(dim1=1, dim2=2).fill_(1.0)
    return (at - points[:, :1]).square()[:, :, None] / spacing.prod(-1)[:, None]


def _stops(times: Tensor, *, along: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Start, nodes and end of each step, ``(n, q + 2)``, and nodes and signed weights ``(n, q)``.

    The rule is Gauss–Legendre in log t; q is 0 unless ``along``.
    """
    x, w = gauss_legendre(_NODES) if along else torch.empty(2, 0, dtype=torch.float64, device="cpu")
    start, end = times[:-1].unsqueeze(1), times[1:].unsqueeze(1)
    length = torch.log1p((end - start) / start)
    nodes = start * torch.exp(length * x)
    return torch.cat([start, nodes, end], dim=1), nodes, length * w * nodes


def data_steps(sde: LinearSDE, times: Tensor, levels: Tensor, *, along: bool) -> Steps:
    """Coefficients Φ_λ, the noise root and the weights of x̂₀, for data predictions."""
    stops, nodes, weights = _stops(times, along=along)
    mean, root = marginal_factors(sde, stops)
    moves, noise = moves_to_end(sde, stops, root, levels)
    psi = mean[..., :1]
    G, whitening = sde.diffusion(nodes), triangular_inverse(root[:, 1:-1])
    pull = G @ (G.mT @ whitening.mT) @ (whitening @ psi[:, 1:-1])
    factor = -0.5 * (1 + levels.square())[:, None] * weights
    return Steps(
        nodes,
        moves[:, 0],
        noise,
        psi[:, -1] - moves[:, 0] @ psi[:, 0],
        factor[..., None, None] * (moves[:, 1:] @ pull),
    )


def noise_steps(sde: LinearSDE, times: Tensor, *, along: bool) -> tuple[Steps, Tensor]:
    """Coefficients Ψ(u, t) and the weights of n = −Rᵀs, and R⁻¹ at the start of each step."""
    stops, nodes, weights = _stops(times, along=along)
    _, triangular = marginal_factors(sde, stops)
    root, inverse = carried_roots(sde, stops, triangular)

    def to_end(stops: Tensor) -> tuple[Tensor]:
        if times[0] < times[-1]:
            return (sde.transition_matrix(stops[:, :-1], stops[:, -1:]),)
        psi = sde.transition_matrix(stops[:, -1:], stops[:, :-1])
        eye = torch.eye(sde.components, dtype=torch.float64, device="cpu")
        return (block_solve(psi, eye),)

    (moves,) = by_steps(to_end, stops)
    G = sde.diffusion(nodes)
    pull = G @ (inverse[:, 1:-1] @ G).mT
    steps = Steps(
        nodes,
        moves[:, 0],
        moves[:, 0, :, :0],
        root[:, -1] - moves[:, 0] @ root[:, 0],
        0.5 * weights[..., None, None] * (moves[:, 1:] @ pull),
    )
    return steps, inverse[:, 0]
