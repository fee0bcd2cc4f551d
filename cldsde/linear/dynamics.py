"""Dynamics of a linear SDE: drift and diffusion matrices and the transitions that follow from them.

A process (`cldsde.linear.sde.LinearSDE`) holds one of these. A transition is returned as the pair
(Ψ, L) with Q = L Lᵀ. L is computed without a covariance, so no digits cancel
(:doc:`/explanation/linear-sdes`), also for t − s → 0 and for nearly degenerate distributions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from cldsde.linear.blocks import (
    block_product,
    exponential_rest,
    lower_factor,
    safe_sqrt,
    stack_first,
)
from cldsde.linear.checks import MatrixLike, Parameter, as_matrix
from cldsde.linear.covariance import joint_root
from cldsde.linear.reprs import constructor_repr
from cldsde.linear.schedule import Schedule
from cldsde.linear.series import balancing_scale, eliminate, legendre_moments, polynomials


class Dynamics(ABC):
    """Drift F(t), diffusion G(t) and transitions of one k×k block, in float64 on the CPU."""

    components: int
    driven: tuple[int, ...]
    #: Latest start time of solvers that evaluate F and G; below 1 only if F or G diverges at 1.
    regular_until: float = 1.0

    def __repr__(self) -> str:
        """Parameters in one line."""
        return constructor_repr(self)

    @abstractmethod
    def drift(self, t: Tensor) -> Tensor:
        """F(t), shape ``(*t.shape, k, k)``."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """G(t), shape ``(*t.shape, k, r)``."""

    @abstractmethod
    def transition(
        self, s: Tensor, t: Tensor, initial_root: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Ψ(t, s) and the lower-triangular root of the covariance at t, for s ≤ t of one shape.

        Both are ``(*s.shape, k, k)``. ``initial_root`` ``(k, k)`` is the root of the covariance of
        z_s; None: z_s is known.
        """

    def transition_matrix(self, s: Tensor, t: Tensor) -> Tensor:
        """Ψ(t, s) alone, ``(*s.shape, k, k)``."""
        return self.transition(s, t)[0]

    def rates(self, t: Tensor, initial_variance: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives α′ and σ′ of x_t = α x_0 + σ n at times above 0, for one component.

        ``initial_variance`` is the variance of z_0 given the data.
        """
        root = initial_variance.sqrt().reshape(1, 1)
        psi, std = self.transition(torch.zeros_like(t), t, root)
        F, G = self.drift(t), self.diffusion(t)
        std_rate = F * std + (G @ G.mT) / (2 * std)
        return (F * psi)[..., 0, 0], std_rate[..., 0, 0]

    @abstractmethod
    def noise_root(self, s: Tensor, t: Tensor) -> Tensor:
        r"""Lower-triangular root of :math:`∫_s^t G G^⊤`, ``(*s.shape, k, k)``."""

    def stationary_covariance(self) -> Tensor | None:
        """Σ∞ with F Σ∞ + Σ∞ Fᵀ + GGᵀ = 0 at all times, or None if no such covariance is known."""
        return None

    def stationary_reversal(self, covariance: Tensor) -> Dynamics | None:
        """Dynamics of the time reversal of the process with Σ∞ ``covariance``, or None."""
        del covariance
        return None


def driven_rows(*roots: Tensor) -> tuple[int, ...]:
    """Components that noise enters: rows of G with an entry that is not zero."""
    stacked = torch.cat([root.detach().reshape(-1, *root.shape[-2:]) for root in roots])
    return tuple(stacked.ne(0).any(dim=-1).any(dim=0).nonzero().flatten().tolist())


class TimeChangedDynamics(Dynamics):
    r"""Dynamics with constant matrices and a noise schedule: F(t) = β(t) A and G(t) = √β(t) Q_root.

    The transition over [s, t] depends on h = ∫_s^t β alone,

    .. math:: Ψ = e^{Ah}, \qquad Q = ∫_0^h e^{Au} \bar Q e^{A^⊤u}\,du.

    A root of Q is found without forming Q (:doc:`/explanation/linear-sdes`): from the Legendre
    coefficients of e^{Ah₀x} Q_root, x ∈ [0, 1], for a step h₀ = h/2^m with ‖A‖h₀ ≤ 1, and by m
    doublings of the step. One component has a closed form.

    Parameters
    ----------
    A, Q_root
        Finite matrices ``(k, k)`` and ``(k, r)`` with Q̄ = Q_root Q_rootᵀ. ValueError if they do not
        fit, an entry is not finite, or all of Q_root is zero.
    schedule
        β: a number, a pair (β(0), β(1)) for a linear schedule, or a `Schedule`.
    """

    # For ‖A‖h₀ ≤ 1 the Taylor remainder is below 1/21! < 1e-19, and the Legendre coefficients for
    # j ≥ 13 are below j! √(2j+1) / (2j+1)! < 4e-18.
    _DEGREES = 13
    _TAYLOR_TERMS = 21

    def __init__(
        self,
        A: MatrixLike,
        Q_root: MatrixLike,
        schedule: Schedule | Parameter | Sequence[Parameter] = 1.0,
    ) -> None:
        self.A = as_matrix(A, "A", (None, None))
        self.components = len(self.A)
        if self.A.shape[1] != self.components:
            raise ValueError(f"A must be square; got shape {tuple(self.A.shape)}")
        self.Q_root = as_matrix(Q_root, "Q_root", (self.components, None))
        self.driven = driven_rows(self.Q_root)
        if not self.driven:
            msg = "Q_root must have a nonzero entry, because without noise there is no score; got 0"
            raise ValueError(msg)
        self.schedule = Schedule.of(schedule)
        self._scale = balancing_scale(self.A.detach())
        self._constant_series = None if self.A.requires_grad else self._series()

    def _series(self) -> Tensor:
        """Terms Aʲ/j! ``(k, k, j)`` in balanced units, which minimise ‖A‖ and the squarings.

        The units are powers of two, so that scaling is exact.
        """
        A = self.A * self._scale / self._scale.unsqueeze(1)
        terms = [torch.eye(self.components, dtype=torch.float64, device="cpu")]
        for j in range(1, self._TAYLOR_TERMS):
            terms.append(A @ terms[-1] / j)
        return torch.stack(terms, dim=-1)

    @override
    def drift(self, t: Tensor) -> Tensor:
        return self.schedule.rate(t)[..., None, None] * self.A

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        return safe_sqrt(self.schedule.rate(t))[..., None, None] * self.Q_root

    @override
    def transition(
        self, s: Tensor, t: Tensor, initial_root: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        # The closed form has no derivative with respect to a at a = 0.
        if self.components == 1 and not self.A.requires_grad:
            return self._single_transition(s, t, initial_root)
        scale = self._scale
        h, halvings, most, taylor = self._halved(s, t)
        psi = polynomials(taylor, h)
        Q_root = self.Q_root / scale.unsqueeze(1)
        start = Q_root.new_zeros(self.components, 0)
        if initial_root is not None:
            start = initial_root / scale.unsqueeze(1)
        parallel = _leads_coincide(taylor, torch.cat([Q_root, start], dim=1))
        if parallel:
            root = self._eliminated_root(taylor, h, Q_root, start, halvings == 0)
        else:
            root = self._short_root(taylor, h, Q_root)
        for i in range(most):
            # One triangularisation of many columns costs less than one after each doubling.
            if i and i % 2 == 0:
                root = lower_factor(root)
            doubles = i < halvings
            root = torch.cat([torch.where(doubles, block_product(psi, root), 0.0), root], dim=1)
            psi = torch.where(doubles, block_product(psi, psi), psi)
        late = block_product(psi, start.unsqueeze(-1))
        if parallel:
            late = late * (halvings > 0)
        root = torch.cat([late, root], dim=1)
        if root.shape[1] > self.components:
            root = lower_factor(root)
        root = root * scale[:, None, None]
        return self._in_units(psi, s.shape), stack_first(root, s.shape)

    def _single_transition(
        self, s: Tensor, t: Tensor, initial_root: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Ψ = e^{ah} of one component, and the noise root ‖Q_root‖ √((e^{2ah} − 1)/2a)."""
        h = self._clock(s, t, float(self.A.abs()))
        x = self.A[0, 0] * h
        # Evaluate expm1 at −2|x| and multiply by e^{max(x, 0)}, because e^{2x} may overflow.
        y = -2 * x.abs()
        zero = y == 0
        growth = torch.where(zero, 1.0, torch.expm1(y) / torch.where(zero, 1.0, y))
        psi = x.exp()
        columns = [torch.tensordot(self.Q_root[0], safe_sqrt(h * growth) * x.clamp_min(0).exp(), 0)]
        if initial_root is not None:
            columns.append(torch.tensordot(initial_root[0], psi, 0))
        root = lower_factor(torch.cat(columns).unsqueeze(0))[0, 0]
        return psi[..., None, None], root[..., None, None]

    def _clock(self, s: Tensor, t: Tensor, norm: float) -> Tensor:
        """The integral of β from s to t; its product with ‖A‖ must be finite."""
        h = self.schedule.integral(s, t)
        if not math.isfinite(norm * float(h.detach().max()) if h.numel() else 0.0):
            msg = "the integral of β times A overflows float64; rescale A or the schedule"
            raise OverflowError(msg)
        return h

    @override
    def transition_matrix(self, s: Tensor, t: Tensor) -> Tensor:
        if self.components == 1:
            h = self._clock(s, t, float(self.A.detach().abs()))
            return (self.A * h[..., None, None]).exp()
        h, halvings, most, taylor = self._halved(s, t)
        psi = polynomials(taylor, h)
        for i in range(most):
            psi = torch.where(i < halvings, block_product(psi, psi), psi)
        return self._in_units(psi, s.shape)

    def _halved(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, int, Tensor]:
        """Clock steps h₀, halvings m ``(n,)``, the largest m, and terms Aʲ/j! in balanced units."""
        series = self._series() if self._constant_series is None else self._constant_series
        norm = float(series[..., 1].detach().abs().sum(0).max())
        h = self._clock(s, t, norm).flatten()
        # Each interval has its own number of halvings, because halving costs digits.
        halvings = torch.ceil(torch.log2((norm * h.detach()).clamp_min(1.0)))
        most = int(halvings.max()) if len(halvings) else 0
        return h * 0.5**halvings, halvings, most, series

    def _in_units(self, psi: Tensor, shape: torch.Size) -> Tensor:
        return stack_first(psi * (self._scale.unsqueeze(1) / self._scale).unsqueeze(-1), shape)

    def _short_root(self, taylor: Tensor, h: Tensor, Q_root: Tensor) -> Tensor:
        """Noise root over unhalved intervals ``(k, k, n)``: tri √h [C_0, C_1, …]."""
        moments = legendre_moments(self._DEGREES, self._TAYLOR_TERMS)
        columns = torch.einsum("ijp,jr,pq->irqp", taylor, Q_root, moments)
        return lower_factor(polynomials(columns.flatten(1, 2), h) * safe_sqrt(h))

    def _eliminated_root(
        self, taylor: Tensor, h: Tensor, Q_root: Tensor, start: Tensor, early: Tensor
    ) -> Tensor:
        """Noise root with eliminated leading terms, joined with Ψ ``start`` if ``early``."""
        r = Q_root.shape[1]
        inputs, scales = _distinct_columns(torch.cat([Q_root, start], dim=1))
        powers = h ** torch.arange(self._TAYLOR_TERMS, device="cpu").unsqueeze(1)
        series = torch.einsum("ijp,jb->ibp", taylor, inputs).unsqueeze(-1) * powers
        # An input that only the start has is one column, whatever the power.
        driving = scales[:, :r].detach().ne(0).any(1)[:, None, None]
        whole = torch.cat([series.sum(2, keepdim=True), torch.zeros_like(series[:, :, 1:])], dim=2)
        series = torch.where(driving, series, whole)
        multipliers, series = eliminate(series.flatten(1, 2))
        series = series.reshape(len(series), inputs.shape[1], self._TAYLOR_TERMS, -1)
        moments = legendre_moments(self._DEGREES, self._TAYLOR_TERMS)
        noise = torch.einsum("ibpn,pq,br->irqn", series, moments, scales[:, :r])
        spread = torch.einsum("ibn,bm->imn", series.sum(2), scales[:, r:]) * early
        columns = torch.cat([noise.flatten(1, 2) * safe_sqrt(h), spread], dim=1)
        return block_product(multipliers, lower_factor(columns))

    @override
    def noise_root(self, s: Tensor, t: Tensor) -> Tensor:
        clock = self.schedule.integral(s, t)
        return safe_sqrt(clock)[..., None, None] * lower_factor(self.Q_root)

    @override
    def stationary_covariance(self) -> Tensor | None:
        # A zero eigenvalue is computed with an error of the size of the matrix's rounding error.
        rounding = len(self.A) * torch.finfo(torch.float64).eps * float(self.A.detach().norm())
        if float(torch.linalg.eigvals(self.A.detach()).real.max()) >= -rounding:
            return None
        # (A ⊗ I + I ⊗ A) vec Σ = −vec Q̄, for the row-major vec.
        eye = torch.eye(self.components, dtype=torch.float64, device="cpu")
        operator = torch.kron(self.A, eye) + torch.kron(eye, self.A)
        noise = self.Q_root @ self.Q_root.T
        covariance: Tensor = torch.linalg.solve(operator, -noise.flatten()).reshape(noise.shape)
        return (covariance + covariance.T) / 2

    @override
    def stationary_reversal(self, covariance: Tensor) -> Dynamics:
        """Dynamics with Σ∞ Aᵀ Σ∞⁻¹ in place of A: couplings change sign, friction does not."""
        reversed_A = torch.linalg.solve(covariance, self.A @ covariance).T
        return TimeChangedDynamics(reversed_A, self.Q_root, self.schedule)


def _leads_coincide(taylor: Tensor, inputs: Tensor) -> bool:
    """Whether two rows of [A^p inputs / p!] have their first nonzero entry in the same place."""
    entries = torch.einsum("ijp,jb->ipb", taylor.detach(), inputs.detach()).flatten(1) != 0
    leads: list[int] = entries.to(torch.uint8).argmax(1).tolist()
    return len(set(leads)) < len(leads)


def _distinct_columns(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Factor columns ``(k, m)`` into distinct directions and scales.

    Columns with gradients are not merged, because merging would lose their own derivatives.
    """
    if columns.requires_grad:
        return columns, torch.eye(columns.shape[1], dtype=columns.dtype, device="cpu")
    size = columns.gather(0, columns.abs().argmax(0, keepdim=True)).squeeze(0)
    unit = columns / torch.where(size == 0, 1.0, size)
    distinct, which = torch.unique(unit, dim=1, return_inverse=True)
    scales = columns.new_zeros(distinct.shape[1], len(size))
    scales[which, torch.arange(len(size), device="cpu")] = size
    return distinct, scales


class SubVPDynamics(Dynamics):
    """Dynamics of sub-VP: F = −β/2 and GGᵀ = β (1 − e^{−2B(0,t)})."""

    components = 1
    driven = (0,)

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def _clock(self, t: Tensor) -> Tensor:
        return self.schedule.integral(torch.zeros_like(t), t)

    @override
    def drift(self, t: Tensor) -> Tensor:
        return (-0.5 * self.schedule.rate(t))[..., None, None]

    @override
    def diffusion(self, t: Tensor) -> Tensor:
        squared = -self.schedule.rate(t) * torch.expm1(-2 * self._clock(t))
        return safe_sqrt(squared)[..., None, None]

    @override
    def transition(
        self, s: Tensor, t: Tensor, initial_root: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        step = self.schedule.integral(s, t)
        # With b = B(s,t), Q = (1 − e^{−b}) (1 − e^{−B(0,s)−B(0,t)}). Use expm1 for both factors.
        variance = torch.expm1(-step) * torch.expm1(-(self._clock(s) + self._clock(t)))
        psi = torch.exp(-0.5 * step)[..., None, None]
        root = safe_sqrt(variance)[..., None, None]
        return psi, root if initial_root is None else joint_root(psi @ initial_root, root)

    @override
    def noise_root(self, s: Tensor, t: Tensor) -> Tensor:
        # ∫ β (1 − e^{−2B}) dt = f(2B(0,t)) / 2 − f(2B(0,s)) / 2, f(y) = y + e^{−y} − 1; with b for
        # 2B(s,t) the difference is [b + e^{−b} − 1 + (1 − e^{−2B(0,s)}) (1 − e^{−b})] / 2.
        b, since = 2 * self.schedule.integral(s, t), 2 * self._clock(s)
        squared = 0.5 * (exponential_rest(b) + torch.expm1(-since) * torch.expm1(-b))
        return safe_sqrt(squared)[..., None, None]
