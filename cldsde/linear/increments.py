"""Joint covariance of Brownian increments and the stochastic integrals of a linear SDE.

Over [s, t] they are J = (ΔW, I) with ΔW = w(t) − w(s) and I = ∫Ψ(t, τ) G(τ) dw(τ), or ΔW alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cldsde.linear.covariance import joint_root
from cldsde.linear.schedule import gauss_legendre
from cldsde.linear.sde import LinearSDE

_PANELS, _NODES = 4, 16  # smallest number of panels, nodes per panel


def increment_roots(sde: LinearSDE, s: Tensor, t: Tensor, *, integrals: bool) -> Tensor:
    """Roots of the covariance of J over intervals ``(n,)``, ``(n, r, r)``."""
    x, w = gauss_legendre(_NODES)
    span = (t - s).unsqueeze(1)
    # Choose panels so short that Ψ changes little over each.
    probes = s.unsqueeze(1) + span * torch.linspace(0, 1, 9, dtype=torch.float64, device="cpu")
    change = float((sde.drift(probes).abs().sum(-2).amax(-1).amax(1) * (t - s)).max())
    panels = max(_PANELS, math.ceil(change))
    x = ((torch.arange(panels, device="cpu").unsqueeze(1) + x) / panels).flatten()
    w = (w / panels).repeat(panels)
    at = torch.minimum(s.unsqueeze(1) + span * x, t.unsqueeze(1))
    G = sde.diffusion(at)
    functional = torch.eye(G.shape[-1], dtype=torch.float64, device="cpu").expand(*at.shape, -1, -1)
    if integrals:
        functional = torch.cat([functional, sde.transition_matrix(at, t.unsqueeze(1)) @ G], dim=-2)
    columns = (span * w).sqrt()[..., None, None] * functional
    return joint_root(columns.movedim(1, 2).flatten(2))


def carried_increments(sde: LinearSDE, s: Tensor, t: Tensor, *, integrals: bool) -> Tensor:
    """Matrix ``(n, r, r)`` by which J up to s enters J up to t, for times ``(n,)``."""
    columns = sde.diffusion(t[0]).shape[-1]
    size = columns + (sde.components if integrals else 0)
    carried = torch.eye(size, dtype=torch.float64, device="cpu").repeat(len(s), 1, 1)
    if integrals:
        carried[:, columns:, columns:] = sde.transition_matrix(s, t)
    return carried


def split_rotations(earlier: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
    """Rotations that map the normals of an interval and fresh normals to normals of its halves.

    Parameters
    ----------
    earlier, later
        Roots of the contributions of the two halves to J of the whole interval, ``(n, r, r)``.

    Returns
    -------
    rotation, root : tuple of Tensor
        Rotations ``(n, 2r, 2r)``, and roots of J of the whole intervals, ``(n, r, r)``.
    """
    size = earlier.shape[-1]
    # [earlier, later] = [root, 0] Oᵀ
    joint = torch.cat([earlier, later], dim=-1)
    rotation, upper = torch.linalg.qr(joint.mT, mode="complete")
    upper = upper[..., :size, :]
    sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    rotation[..., :size] *= sign.unsqueeze(-2)
    return rotation, (sign.unsqueeze(-1) * upper).mT
