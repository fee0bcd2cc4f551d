"""How a linear SDE moves: its drift and diffusion matrices and the law they give over an interval.

A process (`cldsde.linear.sde.LinearSDE`) holds one of these. Transition laws are returned as the
pair (Ψ, L) with Q = L Lᵀ, where L is built directly. A covariance is never formed, subtracted or
factorised, so nothing cancels: not for t − s → 0, where the entries of Q scale with different
powers of t − s, and not when a law is nearly degenerate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from typing_extensions import override

from cldsde.linear.blocks import block_product, lower_factor, safe_sqrt, stack_first
from cldsde.linear.checks import MatrixLike, as_matrix
from cldsde.linear.schedule import Schedule, gauss_legendre

__all__ = ["Dynamics", "TimeChangedDynamics", "driven_rows"]


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
        ``(k, k)``.
    Q_root
        ``(k, r)``, Q̄ = Q_root Q_rootᵀ.
    schedule
        β: a number, a pair (β(0), β(1)) for a linear schedule, or a `Schedule`.

    Raises
    ------
    ValueError
        If A is not square, the matrices do not fit, an entry is not finite, or all of Q_root is
        zero.
    """

    # Relative to the integrand the rule's error at ‖A‖h₀ ≤ 1 is below 2²⁰(10!)⁴/(21·(20!)³) < 1e-24
    # and the Taylor remainder below 1/21! < 1e-19.
    _NODES = 10
    _TAYLOR_TERMS = 21

    def __init__(
        self, A: MatrixLike, Q_root: MatrixLike, schedule: Schedule | float | Sequence[float] = 1.0
    ) -> None:
        self.A = as_matrix(A, "A", (None, None))
        self.components = len(self.A)
        if self.A.shape[1] != self.components:
            msg = f"A must be square; got shape {tuple(self.A.shape)}"
            raise ValueError(msg)
        self.Q_root = as_matrix(Q_root, "Q_root", (self.components, None))
        self.driven = driven_rows(self.Q_root)
        if not self.driven:
            msg = "Q_root must have an entry that is not zero; without noise there is no score"
            raise ValueError(msg)
        self.schedule = Schedule.of(schedule)
        self._scale = _balancing_scale(self.A.detach())

    @override
    def drift(self, t: Tensor) -> Tensor:
        return self.schedule.rate(t)[..., None, None] * self.A

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        return safe_sqrt(self.schedule.rate(t))[..., None, None] * self.Q_root

    @override
    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        k, r = self.Q_root.shape
        # In balanced units ‖A‖ is smallest, and so is the number of squarings. Powers of two are
        # exact.
        scale = self._scale
        A = self.A * scale / scale.unsqueeze(1)
        Q_root = self.Q_root / scale.unsqueeze(1)

        h = self.schedule.integral(s, t).flatten()
        norm = float(A.detach().abs().sum(0).max())
        longest = norm * float(h.detach().max()) if len(h) else 0.0
        if not math.isfinite(longest):
            msg = "the clock of the process overflows float64; rescale A or the schedule"
            raise OverflowError(msg)
        doublings = max(0, math.ceil(math.log2(longest))) if longest > 0 else 0
        h = h * 0.5**doublings

        terms = [torch.eye(k, dtype=torch.float64)]
        for j in range(1, self._TAYLOR_TERMS):
            terms.append(A @ terms[-1] / j)
        taylor = torch.stack(terms, dim=-1)
        # Powers of h(1 − xᵢ) are powers of h times powers of 1 − xᵢ.
        node_powers = _node_powers(self._NODES, self._TAYLOR_TERMS)
        columns = torch.einsum("ijp,jr,pq->irqp", taylor, Q_root, node_powers)
        table = torch.cat([taylor.reshape(k * k, -1), columns.reshape(k * r * self._NODES, -1)])
        values = table @ _powers(h, self._TAYLOR_TERMS)
        psi = values[: k * k].reshape(k, k, -1)
        root = lower_factor(values[k * k :].reshape(k, r * self._NODES, -1) * safe_sqrt(h))
        for _ in range(doublings):
            root = lower_factor(torch.cat([block_product(psi, root), root], dim=1))
            psi = block_product(psi, psi)
        psi = psi * (scale.unsqueeze(1) / scale).unsqueeze(-1)
        root = root * scale[:, None, None]
        return stack_first(psi, s.shape), stack_first(root, s.shape)

    @override
    def stationary_covariance(self) -> Tensor | None:
        # An eigenvalue of zero comes out as one of the size of the matrix's rounding.
        rounding = len(self.A) * torch.finfo(torch.float64).eps * float(self.A.detach().norm())
        if float(torch.linalg.eigvals(self.A.detach()).real.max()) >= -rounding:
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


@lru_cache
def _node_powers(nodes: int, n: int) -> Tensor:
    """√wᵢ (1 − xᵢ)^p for the Gauss–Legendre rule on [0, 1], ``(n, nodes)``."""
    x, weights = gauss_legendre(nodes)
    return _powers(1 - x, n) * weights.sqrt()


def _balancing_scale(A: Tensor) -> Tensor:
    """Powers of two d for which D⁻¹AD has rows and columns of like size (Osborne 1960)."""
    size = A.abs().clone()
    size.fill_diagonal_(0)
    scale = torch.ones(len(A), dtype=torch.float64)
    for _ in range(8):
        for i in range(len(A)):
            row, column = float(size[i].sum()), float(size[:, i].sum())
            if row > 0 and column > 0:
                factor = 2.0 ** round(math.log2(row / column) / 2)
                scale[i] *= factor
                size[i] /= factor
                size[:, i] *= factor
    return scale
