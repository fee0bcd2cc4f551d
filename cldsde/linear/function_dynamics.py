"""Linear SDEs whose drift and diffusion are given as functions of time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from cldsde.linear.blocks import block_product, lower_factor, safe_sqrt, stack_first
from cldsde.linear.checks import as_float64
from cldsde.linear.dynamics import Dynamics, driven_rows
from cldsde.linear.schedule import gauss_legendre

__all__ = ["FunctionDynamics"]


class FunctionDynamics(Dynamics):
    r"""F(t) and G(t) given by callables that need not commute with themselves.

    [s, t] is cut into panels with ‖F‖h ≤ ½, and their number is doubled until Ψ and the root no
    longer change by 1e-12 of a row's size. In each, the values Yᵢ ≈ Ψ(end, τᵢ) at the 8 Gauss
    nodes solve the linear collocation system of ∂_τ Ψ(end, τ) = −Ψ(end, τ) F(τ),

    .. math:: Y_i = I + h ∑_j B_{ij} Y_j F(τ_j), \qquad B_{ij} = ∫_{c_i}^1 ℓ_j,

    of order 16, and give Ψ = I + h Σ wⱼ Yⱼ F(τⱼ) and the noise root tri[√(h wᵢ) Yᵢ G(τᵢ)].

    Parameters
    ----------
    drift
        A time, a 0-dimensional float64 tensor, to ``(k, k)``.
    diffusion
        A time to ``(k, r)``.
    end
        Largest time at which the callables are asked.
    """

    _NODES = 8
    _MAX_PANELS = 4096

    def __init__(
        self, drift: Callable[[Tensor], Tensor], diffusion: Callable[[Tensor], Tensor], end: float
    ) -> None:
        for name, function in (("drift", drift), ("diffusion", diffusion)):
            if not callable(function):
                msg = f"{name} must be a callable of a time; got {function!r}"
                raise TypeError(msg)
        self._drift = _over_stack(drift)
        self._diffusion = _over_stack(diffusion)
        grid = torch.linspace(0, end, 257, dtype=torch.float64)
        F, G = self._drift(grid), self._diffusion(grid)
        for name, values in (("drift", F), ("diffusion", G)):
            if values.ndim != 3 or values.shape[0] != len(grid):
                msg = (
                    f"{name}: the callable must return one matrix a time; got {tuple(values.shape)}"
                )
                raise ValueError(msg)
            if not bool(values.detach().isfinite().all()):
                bad = grid[~values.detach().isfinite().all(-1).all(-1)][0]
                msg = (
                    f"{name}: the callable must be finite on [0, {end:g}]; it is not at t = {bad:g}"
                )
                raise ValueError(msg)
        if F.shape[1] != F.shape[2]:
            msg = f"drift: the callable must return square matrices; got {tuple(F.shape[1:])}"
            raise ValueError(msg)
        if G.shape[1] != F.shape[1]:
            msg = (
                f"diffusion: the callable must return matrices with as many rows as the drift, "
                f"{F.shape[1]}; got {tuple(G.shape[1:])}"
            )
            raise ValueError(msg)
        self.components = F.shape[1]
        self.driven = driven_rows(G)
        self._largest = float(F.detach().abs().sum(1).max())

    @override
    def drift(self, t: Tensor) -> Tensor:
        return self._drift(t)

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        return self._diffusion(t)

    @override
    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        start, span = s.flatten(), (t - s).flatten()
        longest = float(span.detach().max()) if len(span) else 0.0
        panels = max(1, math.ceil(2 * self._largest * longest))
        previous = self._compose(start, span, panels)
        while 2 * panels <= self._MAX_PANELS:
            panels *= 2
            psi, root = self._compose(start, span, panels)
            if _close(psi, previous[0]) and _close(root, previous[1]):
                return stack_first(psi, s.shape), stack_first(root, s.shape)
            previous = psi, root
        msg = (
            f"drift, diffusion: they vary too fast over an interval of {longest:g} to be resolved "
            f"by {self._MAX_PANELS} panels; take shorter intervals or smoother functions"
        )
        raise ValueError(msg)

    def _compose(self, start: Tensor, span: Tensor, panels: int) -> tuple[Tensor, Tensor]:
        k, h = self.components, span / panels
        psi = torch.eye(k, dtype=torch.float64).unsqueeze(-1).expand(k, k, len(h))
        root = torch.zeros(k, 0, len(h), dtype=torch.float64)
        for panel in range(panels):
            step, noise = self._panel(start + panel * h, h)
            root = lower_factor(torch.cat([block_product(step, root), noise], dim=1))
            psi = block_product(step, psi)
        return psi, root

    def _panel(self, start: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Ψ ``(k, k, n)`` over [start, start + h] and columns of a noise root ``(k, m, n)``."""
        n, q, k = len(h), self._NODES, self.components
        nodes, weights = gauss_legendre(q)
        times = start.unsqueeze(1) + h.unsqueeze(1) * nodes
        F, G = self._drift(times), self._diffusion(times)
        # Unknowns Y transposed and stacked: Yᵢᵀ − h Σⱼ Bᵢⱼ Fⱼᵀ Yⱼᵀ = I.
        hF = h[:, None, None, None] * F
        coupling = torch.einsum("ij,njab->nibja", _tail_integrals(q), hF)
        coupling = coupling.reshape(n, q * k, q * k)
        eye = torch.eye(q * k, dtype=torch.float64)
        identities = torch.eye(k, dtype=torch.float64).repeat(q, 1)
        Y = torch.linalg.solve(eye - coupling, identities.expand(n, -1, -1))
        Y = Y.reshape(n, q, k, k).transpose(-1, -2)
        psi = torch.eye(k, dtype=torch.float64) + torch.einsum("j,njab,njbc->nac", weights, Y, hF)
        columns = safe_sqrt(h[:, None] * weights)[..., None, None] * (Y @ G)
        noise = columns.movedim(1, 2).flatten(2)
        return psi.movedim(0, -1), noise.movedim(0, -1)

    @override
    def stationary_covariance(self) -> None:
        return None

    @override
    def stationary_reversal(self, covariance: Tensor) -> None:
        return None


def _close(fine: Tensor, coarse: Tensor) -> bool:
    """Whether two stacks agree row by row; the finer one, of order 16, is then exact."""
    error = (fine - coarse).detach().abs().amax(1)
    return bool((error <= 1e-12 * fine.detach().abs().amax(1)).all())


def _over_stack(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Evaluate a user's function of one time over times of any shape."""

    def stacked(t: Tensor) -> Tensor:
        flat = t.flatten()
        # One time at least is asked, so that the shape is known where no time is wanted.
        asked = flat if len(flat) else flat.new_zeros(1)
        values = torch.stack([as_float64(function(x)) for x in asked])[: len(flat)]
        return values.reshape(*t.shape, *values.shape[1:])

    return stacked


def _tail_integrals(n: int) -> Tensor:
    """B with Bᵢⱼ = ∫_{cᵢ}^1 ℓⱼ for the Lagrange basis ℓ at the n Gauss nodes c of [0, 1]."""
    nodes, weights = gauss_legendre(n)
    # ℓⱼ on [cᵢ, 1] is a polynomial of degree n − 1: the same rule, moved there, integrates it.
    points = nodes.unsqueeze(1) + (1 - nodes).unsqueeze(1) * nodes
    differences = points.unsqueeze(-1) - nodes
    basis = torch.empty(n, n, n, dtype=torch.float64)
    for j in range(n):
        others = [m for m in range(n) if m != j]
        basis[..., j] = (differences[..., others] / (nodes[j] - nodes[others])).prod(-1)
    return (1 - nodes).unsqueeze(1) * torch.einsum("q,iqj->ij", weights, basis)
