"""Transition kernels of linear SDEs with time-dependent matrices, by Gauss collocation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cldsde.linear.blocks import block_product, lower_factor, safe_sqrt
from cldsde.linear.schedule import gauss_legendre
from cldsde.linear.series import legendre_matrices

Matrices = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Function of times ``(*, n, q)`` that returns drift ``(*, n, q, k, k)`` and diffusion
``(*, n, q, k, r)``."""

_NODES = 8
_MAX_PANELS = 4096
_AT_ONCE = 4096  # largest number of intervals, over all panels, whose matrices are in memory


def converged(
    transition: Callable[[int], tuple[Tensor, Tensor]], panels: int
) -> tuple[Tensor, Tensor] | None:
    """Double ``panels`` until a transition changes by less than 1e-12 of each row's size.

    ``transition`` maps the number of panels to Ψ and the noise root, ``(k, k, n)`` stack-last. The
    result is None if it has not converged.
    """
    previous = transition(panels)
    most = max(_MAX_PANELS, 8 * panels)
    while 2 * panels <= most:
        panels *= 2
        psi, root = transition(panels)
        if _close(psi, previous[0]) and _close(root, previous[1]):
            return psi, root
        previous = psi, root
    return None


def collocate(matrices: Matrices, starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    r"""Transition over consecutive panels, of order 16 in their length.

    In each panel the values Yᵢ ≈ Ψ(end, τᵢ) at the 8 Gauss nodes solve the linear collocation
    system of ∂_τ Ψ(end, τ) = −Ψ(end, τ) F(τ),

    .. math:: Y_i = I + h ∑_j B_{ij} Y_j F(τ_j), \qquad B_{ij} = ∫_{c_i}^1 ℓ_j,

    and give Ψ = I + h Σ wⱼ Yⱼ F(τⱼ) and the noise root tri[√(|h| wᵢ) Yᵢ G(τᵢ)], ``(k, k, n)``
    stack-last. ``matrices`` returns F and G at times ``(m, n, 8)``. ``starts`` and ``lengths`` are
    ``(panels, n)``; a negative length integrates backwards in time.
    """
    steps = _panels(matrices, starts, lengths)
    psi, noise = next(steps)
    root = lower_factor(noise)
    for step, noise in steps:
        root = lower_factor(torch.cat([block_product(step, root), noise], dim=1))
        psi = block_product(step, psi)
    return psi, root


def _panels(matrices: Matrices, starts: Tensor, lengths: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `_panel` for one row of panels after the other; many rows are computed at once."""
    rows = max(1, _AT_ONCE // max(1, starts.shape[1]))
    for few in zip(torch.split(starts, rows), torch.split(lengths, rows), strict=True):
        steps, noises = _panel(matrices, *few)
        yield from zip(steps.unbind(-2), noises.unbind(-2), strict=True)


def _panel(matrices: Matrices, start: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Ψ ``(k, k, *)`` over [start, start + h] and columns of a noise root ``(k, m, *)``."""
    nodes, weights = gauss_legendre(_NODES)
    F, G = matrices(start.unsqueeze(-1) + h.unsqueeze(-1) * nodes)
    *stack, q, k, _ = F.shape
    # Unknowns Y transposed and stacked: Yᵢᵀ − h Σⱼ Bᵢⱼ Fⱼᵀ Yⱼᵀ = I.
    hF = h[..., None, None, None] * F
    tails = weights - legendre_matrices(_NODES)[1]  # B
    coupling = torch.einsum("ij,...jab->...ibja", tails, hF)
    eye = torch.eye(q * k, device="cpu", dtype=torch.float64)
    identities = torch.eye(k, device="cpu", dtype=torch.float64).repeat(q, 1)
    system = eye - coupling.reshape(*stack, q * k, q * k)
    Y = torch.linalg.solve(system, identities.expand(*stack, -1, -1))
    Y = Y.reshape(*stack, q, k, k).transpose(-1, -2)
    psi = torch.eye(k, device="cpu", dtype=torch.float64) + torch.einsum(
        "j,...jab,...jbc->...ac", weights, Y, hF
    )
    columns = safe_sqrt(h.abs()[..., None] * weights)[..., None, None] * (Y @ G)
    columns = columns.transpose(-3, -2).flatten(-2)
    return psi.movedim((-2, -1), (0, 1)), columns.movedim((-2, -1), (0, 1))


def _close(fine: Tensor, coarse: Tensor) -> bool:
    """Whether two stacks agree row by row; the finer one, of order 16, is then converged."""
    error = (fine - coarse).detach().abs().amax(1)
    return bool((error <= 1e-12 * fine.detach().abs().amax(1)).all())
