r"""Probability flow of a single data point, as a rotation, at many times at once.

In coordinates in which z_τ is standard normal, z_τ − Ψz_0 = L_τ y, the flow is a rotation,

.. math:: y' = Ω y, \qquad Ω = \mathrm{triu}(N, 1) − \mathrm{triu}(N, 1)^⊤, \quad
          N = L^{-1} F L + \tfrac12 L^{-1} G (L^{-1} G)^⊤.

Its rates grow like 1/τ towards τ = 0, so panels are uniform in log τ. On a panel Ω is a polynomial
through 16 Gauss nodes. A Picard iteration solves the equation, and integrating the Legendre series
of Ω y gives the rotation at any time of the panel. Panels are halved until their series converge.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cldsde.linear.blocks import block_product
from cldsde.linear.dynamics import Dynamics
from cldsde.linear.schedule import gauss_legendre
from cldsde.linear.series import balancing_scale, legendre_matrices

RootAt = Callable[[Tensor], Tensor]
"""Function of times that returns the root L of the distribution given the start."""

_NODES = 16
_LOG_PANEL = 0.35  # panel length in log τ for which the series of a rate 1/τ converges to rounding
_FLOOR = 1e-10  # one panel is enough below this fraction of the latest time: the flow is regular
_MAX_PANELS = 4096


def whitened_matrices(
    dynamics: Dynamics, root_at: RootAt, times: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Ω, ½ggᵀ and g = L⁻¹G at times ``(*)``: ``(*, k, k)``, ``(*, k, k)`` and ``(*, k, r)``."""
    root = root_at(times)
    g = torch.linalg.solve_triangular(root, dynamics.diffusion(times), upper=False)
    N = torch.linalg.solve_triangular(root, dynamics.drift(times) @ root, upper=False)
    dissipation = 0.5 * g @ g.mT
    index = torch.arange(dynamics.components, device="cpu")
    upper = (N + dissipation) * (index.unsqueeze(1) < index)
    return upper - upper.mT, dissipation, g


def flow_rotations(dynamics: Dynamics, root_at: RootAt, times: Tensor) -> Tensor:
    """Rotations ``(n, k, k)`` from the latest time to each of ``(n,)`` times in any order, n ≥ 1.

    Raise ValueError if the flow rotates too fast to be resolved.
    """
    k = dynamics.components
    if k == 1:
        return torch.ones(len(times), 1, 1, dtype=torch.float64, device="cpu")
    edges, series = _resolved(dynamics, root_at, times)
    eye = torch.eye(k, dtype=torch.float64, device="cpu").unsqueeze(-1)
    # Over a whole panel only the constant term of the series has a nonzero integral. Form the
    # products of all panels from the latest on by doubling.
    whole, step = eye + series[:, :, 0], 1
    while step < whole.shape[-1]:
        longer = block_product(whole[..., step:], whole[..., :-step])
        whole, step = torch.cat([whole[..., :step], longer], dim=-1), 2 * step
    panel = (times.detach() <= edges[1:-1, None]).sum(0)
    first, last = edges[panel], edges[panel + 1]
    # If all times are equal, their one panel has no length, and the rotation is the identity.
    x = (2 * times - first - last) / torch.where(first > last, last - first, -1.0)
    # ∫₋₁ˣ Pₘ = (Pₘ₊₁ − Pₘ₋₁) / (2m + 1), and x + 1 for m = 0.
    before, here = torch.ones_like(x), x
    turned = series[:, :, 0].index_select(-1, panel) * ((x + 1) / 2)
    for m in range(1, _NODES):
        after = ((2 * m + 1) * x * here - m * before) / (m + 1)
        term = series[:, :, m].index_select(-1, panel)
        turned = turned + term * ((after - before) / (4 * m + 2))
        before, here = here, after
    start = torch.cat([eye, whole[..., :-1]], dim=-1).index_select(-1, panel)
    return (start + block_product(turned, start)).movedim(-1, 0)


def _resolved(dynamics: Dynamics, root_at: RootAt, times: Tensor) -> tuple[Tensor, Tensor]:
    """Decreasing edges of panels, and the Legendre series of hΩY on each, ``(k, k, 16, panels)``.

    Y is the rotation from the start of the panel.
    """
    low, high = (float(x) for x in times.detach().aminmax())
    edges = _first_edges(dynamics, low, high)
    nodes, _ = gauss_legendre(_NODES)
    while len(edges) <= _MAX_PANELS:
        h = edges.diff()
        rotation, _, _ = whitened_matrices(
            dynamics, root_at, edges[:-1].unsqueeze(1) + h.unsqueeze(1) * nodes
        )
        omega = rotation.movedim((0, 1), (-1, -2)) * h
        angle = (0.5 * omega.detach().square().sum((0, 1))).sqrt().amax(0)
        # The terms of a Picard iteration grow to e^angle before they decrease.
        resolved = angle <= 4
        if bool(resolved.all()):
            series = _slope_series(omega, float(angle.max()))
            tail = series.detach()[:, :, -2:].abs().amax((0, 1, 2))
            resolved = tail <= 1e-13
            if bool(resolved.all()):
                return edges, series
        middle = ((edges[1:] + edges[:-1]) / 2)[~resolved]
        edges = torch.cat([edges, middle]).sort(descending=True).values
    raise ValueError(
        f"drift is too fast between t = {low:g} and {high:g} to resolve the rotation of the "
        "probability flow; use a process with slower rates"
    )


def _first_edges(dynamics: Dynamics, low: float, high: float) -> Tensor:
    """Decreasing edges of panels uniform in log τ; panels with ‖F‖h > 3 are divided."""
    floor = max(low, _FLOOR * high, 1e-300)
    count = max(1, math.ceil(math.log(max(high / floor, 1.0)) / _LOG_PANEL))
    share = torch.arange(count + 1, dtype=torch.float64, device="cpu") / count
    edges = high * (floor / max(high, floor)) ** share
    edges[0] = high
    edges = torch.cat([edges[:-1], edges.new_tensor([floor, low] if low < floor else [low])])
    F = dynamics.drift(edges[:-1]).detach()
    scale = balancing_scale(F.abs().amax(0))
    rate = (F * scale / scale.unsqueeze(1)).square().sum((-2, -1)).sqrt()
    parts = (rate * -edges.diff() / 3).ceil().clamp(1, _MAX_PANELS).tolist()
    divided = [
        start + (end - start) * i / n
        for start, end, n in zip(edges[:-1].tolist(), edges[1:].tolist(), parts, strict=True)
        for i in range(int(n))
    ]
    return edges.new_tensor([*divided, low])


def _slope_series(omega: Tensor, angle: float) -> Tensor:
    """Legendre series of ΩY with Y' = ΩY, Y = 1 at the start, for Ω ``(k, k, 16, panels)``."""
    transform, integrals = legendre_matrices(_NODES)
    if len(omega) == 2:  # rotations of the plane commute
        turned = _contract(integrals, omega[:1, 1:])[0, 0]
        cos, sin = turned.cos(), turned.sin()
        Y = torch.stack([torch.stack([cos, sin]), torch.stack([-sin, cos])])
        return _contract(transform, block_product(omega, Y))
    few = max(1, 32768 // (_NODES**2 * len(omega) ** 2))  # keep below the size that wakes threads
    slopes = [_picard(part, integrals, angle) for part in torch.split(omega, few, dim=-1)]
    return torch.cat([_contract(transform, slope) for slope in slopes], dim=-1)


def _picard(omega: Tensor, integrals: Tensor, angle: float) -> Tensor:
    """ΩY at the nodes, iterated until the next term is below rounding."""
    slope, term, m = omega, 1.0, 0
    while term > 1e-17:
        m += 1
        term *= angle / m
        slope = omega + block_product(omega, _contract(integrals, slope))
    return slope


def _contract(matrix: Tensor, values: Tensor) -> Tensor:
    """Apply a matrix ``(m, q)`` to the node axis of ``(k, k, q, panels)``."""
    return (matrix[:, :, None] * values.unsqueeze(2)).sum(3)
