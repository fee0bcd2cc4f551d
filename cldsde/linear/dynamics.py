"""How a linear SDE moves: its drift and diffusion matrices and the law they give over an interval.

A process (`cldsde.linear.sde.LinearSDE`) holds one of these. Transition laws are returned as the
pair (Ψ, L) with Q = L Lᵀ, where L is built directly. A covariance is never formed, subtracted or
factorised, so nothing cancels: not for t − s → 0, where the entries of Q scale with different
powers of t − s, and not when a law is nearly degenerate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from cldsde.linear.blocks import block_product, lower_factor, safe_sqrt, stack_first
from cldsde.linear.schedule import Schedule, gauss_legendre

__all__ = ["Dynamics", "FunctionDynamics", "TimeChangedDynamics"]


class Dynamics(ABC):
    """Drift F(t), diffusion G(t) and transition law of one k×k block, in float64 on the host."""

    components: int
    driven: tuple[int, ...]

    @abstractmethod
    def drift(self, t: Tensor) -> Tensor:
        """F(t), shape ``(*t.shape, k, k)``."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """G(t), shape ``(*t.shape, k, r)``."""

    @abstractmethod
    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Ψ(t, s) and the lower-triangular root of the noise over [s, t], for s ≤ t of one shape.

        Both have shape ``(*s.shape, k, k)``.
        """

    @abstractmethod
    def stationary_covariance(self) -> Tensor | None:
        """Σ∞ with F Σ∞ + Σ∞ Fᵀ + GGᵀ = 0 at all times, or None where no such law exists."""

    @abstractmethod
    def stationary_reversal(self, covariance: Tensor) -> Dynamics | None:
        """Dynamics of the time reversal of the process at its stationary law, or None."""


def driven_rows(*roots: Tensor) -> tuple[int, ...]:
    """Components that noise enters: rows of G with an entry that is not zero."""
    stacked = torch.cat([root.detach().reshape(-1, *root.shape[-2:]) for root in roots])
    return tuple(stacked.ne(0).any(dim=-1).any(dim=0).nonzero().flatten().tolist())


class TimeChangedDynamics(Dynamics):
    r"""F(t) = β(t) A and G(t) = √β(t) Q_root with constant matrices: one clock for everything.

    The law over [s, t] depends on h = ∫_s^t β alone,

    .. math:: Ψ = e^{Ah}, \qquad Q = ∫_0^h e^{Au} \bar Q e^{A^⊤u}\,du,

    and is found by a square-root method. On a step h₀ = h/2^m short enough for ‖A‖₁h₀ ≤ 1, a
    Gauss–Legendre rule turns the integral into R Rᵀ with columns √(h₀wᵢ) e^{A h₀(1−xᵢ)} Q_root,
    whose triangular factor is taken orthogonally; then m doublings compose the step with itself,

    .. math:: L ← \mathrm{tri}[ΨL,\ L], \qquad Ψ ← Ψ².

    Parameters
    ----------
    A
        ``(k, k)`` float64.
    Q_root
        ``(k, r)`` float64, Q̄ = Q_root Q_rootᵀ.
    schedule
        β.
    """

    # Relative to the integrand the rule's error at ‖A‖h₀ ≤ 1 is below 2²⁰(10!)⁴/(21·(20!)³) < 1e-24
    # and the Taylor remainder below 1/21! < 1e-19.
    _NODES = 10
    _TAYLOR_TERMS = 21

    def __init__(self, A: Tensor, Q_root: Tensor, schedule: Schedule) -> None:
        self.A = A
        self.Q_root = Q_root
        self.schedule = schedule
        self.components = len(A)
        self.driven = driven_rows(Q_root)

    @override
    def drift(self, t: Tensor) -> Tensor:
        return self.schedule.rate(t)[..., None, None] * self.A

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        return safe_sqrt(self.schedule.rate(t))[..., None, None] * self.Q_root

    @override
    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        k, r = self.Q_root.shape
        h = self.schedule.integral(s, t).flatten()
        norm = float(self.A.detach().abs().sum(0).max())
        longest = norm * float(h.detach().max()) if len(h) else 0.0
        doublings = max(0, math.ceil(math.log2(longest))) if longest > 0 else 0
        h = h * 0.5**doublings

        terms = [torch.eye(k, dtype=torch.float64)]
        for j in range(1, self._TAYLOR_TERMS):
            terms.append(self.A @ terms[-1] / j)
        taylor = torch.stack(terms, dim=-1)
        nodes, weights = gauss_legendre(self._NODES)
        tau = h * (1 - nodes).unsqueeze(1)
        exponentials_root = torch.einsum("ijq,jr->irq", taylor, self.Q_root)
        columns = exponentials_root.reshape(k * r, -1) @ _powers(tau.flatten(), len(terms))
        columns = columns.reshape(k, r, *tau.shape) * safe_sqrt(h * weights.unsqueeze(1))
        root = lower_factor(columns.reshape(k, r * self._NODES, -1))
        psi = (taylor.reshape(k * k, -1) @ _powers(h, len(terms))).reshape(k, k, -1)
        for _ in range(doublings):
            root = lower_factor(torch.cat([block_product(psi, root), root], dim=1))
            psi = block_product(psi, psi)
        return stack_first(psi, s.shape), stack_first(root, s.shape)

    @override
    def stationary_covariance(self) -> Tensor | None:
        if float(torch.linalg.eigvals(self.A.detach()).real.max()) >= 0:
            return None
        # (A ⊗ I + I ⊗ A) vec Σ = −vec Q̄, for the row-major vec.
        eye = torch.eye(self.components, dtype=torch.float64)
        operator = torch.kron(self.A, eye) + torch.kron(eye, self.A)
        noise = self.Q_root @ self.Q_root.T
        covariance: Tensor = torch.linalg.solve(operator, -noise.flatten()).reshape(noise.shape)
        return (covariance + covariance.T) / 2

    @override
    def stationary_reversal(self, covariance: Tensor) -> Dynamics:
        """Σ∞ Aᵀ Σ∞⁻¹ in place of A: couplings change sign, friction keeps damping."""
        reversed_A = torch.linalg.solve(covariance, self.A @ covariance).T
        return TimeChangedDynamics(reversed_A, self.Q_root, self.schedule)


def _powers(x: Tensor, n: int) -> Tensor:
    """Powers 0 … n−1 of a vector, ``(n, len(x))``, in log₂ n products."""
    powers = torch.stack([torch.ones_like(x), x])
    while len(powers) < n:
        powers = torch.cat([powers, powers * (powers[-1] * x)])
    return powers[:n]


class FunctionDynamics(Dynamics):
    r"""F(t) and G(t) given by callables that need not commute with themselves.

    [s, t] is cut into panels with ‖F‖h ≤ ½. In each, the values Yᵢ ≈ Ψ(end, τᵢ) at the 8 Gauss
    nodes solve the linear collocation system of ∂_τ Ψ(end, τ) = −Ψ(end, τ) F(τ),

    .. math:: Y_i = I + h ∑_j B_{ij} Y_j F(τ_j), \qquad B_{ij} = ∫_{c_i}^1 ℓ_j,

    of order 16, and give Ψ = I + h Σ wⱼ Yⱼ F(τⱼ) and the noise root tri[√(h wᵢ) Yᵢ G(τᵢ)].

    Parameters
    ----------
    drift
        t ``(n,)`` to ``(n, k, k)``, or one time to ``(k, k)``.
    diffusion
        t ``(n,)`` to ``(n, k, r)``, or one time to ``(k, r)``.
    end
        Largest time at which the callables are asked.
    """

    _NODES = 8
    _MAX_PANELS = 4096

    def __init__(
        self, drift: Callable[[Tensor], Tensor], diffusion: Callable[[Tensor], Tensor], end: float
    ) -> None:
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
        k = self.components
        start, span = s.flatten(), (t - s).flatten()
        longest = float(span.detach().max()) if len(span) else 0.0
        panels = max(1, math.ceil(2 * self._largest * longest))
        if panels > self._MAX_PANELS:
            msg = (
                f"drift: its norm {self._largest:g} over an interval of {longest:g} needs "
                f"{panels} panels, more than {self._MAX_PANELS}; split the interval or rescale"
            )
            raise ValueError(msg)
        h = span / panels
        psi = torch.eye(k, dtype=torch.float64).unsqueeze(-1).expand(k, k, len(h))
        root = torch.zeros(k, 0, len(h), dtype=torch.float64)
        for panel in range(panels):
            step, noise = self._panel(start + panel * h, h)
            root = lower_factor(torch.cat([block_product(step, root), noise], dim=1))
            psi = block_product(step, psi)
        return stack_first(psi, s.shape), stack_first(root, s.shape)

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


def _over_stack(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Evaluate a user's matrix function over times of any shape, one call where it broadcasts."""

    def stacked(t: Tensor) -> Tensor:
        flat = t.flatten()
        # One time at least is asked, so that the shape is known where no time is wanted.
        asked = flat if len(flat) else flat.new_zeros(1)
        values = torch.stack([_as_matrix(function(x)) for x in asked])[: len(flat)]
        return values.reshape(*t.shape, *values.shape[1:])

    return stacked


def _as_matrix(value: object) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


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
