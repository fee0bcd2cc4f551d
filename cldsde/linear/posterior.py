r"""Distribution of an earlier state given a later one and the start, and a family around it.

Between t and s < t the processes

.. math::
    dz = \bigl[F z + \tfrac{1+λ^2}2 G G^⊤ Σ_τ^{-1} (z − Ψ(τ,0) z_0)\bigr] dτ + λ\,G\,d\bar w,
    \qquad λ ≥ 0,

run backwards in time, have the same distribution of z_τ given z_0 for every stochasticity λ. λ = 1
is the Bayesian posterior p(z_s | z_t, z_0), and λ = 0 is a probability flow. For k = 1 this is the
family of Song, Meng and Ermon (2021, eq. 7). Φ_λ is the transition matrix of the bracket from t to
s, for z − Ψ(τ,0) z_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks, block_solve, safe_sqrt, stack_first
from cldsde.linear.collocation import collocate, converged
from cldsde.linear.covariance import joint_root, triangular_inverse
from cldsde.linear.dynamics import Dynamics
from cldsde.linear.flow import RootAt, whitened_matrices
from cldsde.linear.kernel import Kernel, check_kernel_shape, log_density
from cldsde.linear.random import standard_normal


@dataclass(frozen=True, eq=False)
class Posterior:
    """Posterior z_s | z_t, z_0 ~ N(state z_t + initial z_0, root rootᵀ) of an earlier state, s ≤ t.

    Create it with `LinearSDE.posterior`. z_0 is the mean of the start: ``sde.embed(x0)`` if the
    posterior is conditioned on the data, or all of z_0 if the initial covariance is zero.
    ``state``, ``initial`` and the lower-triangular ``root`` are ``(*, k, k)``, float64 on the CPU.

    Examples
    --------
    >>> import torch
    >>> from cldsde import CLD
    >>> sde, x0 = CLD(), torch.zeros(8, 3)
    >>> posterior = sde.posterior(0.4, 0.5)
    >>> posterior.sample(torch.randn(8, 2, 3), sde.embed(x0)).shape
    torch.Size([8, 2, 3])
    """

    state: Tensor  #: Φ, ``(*, k, k)``.
    initial: Tensor  #: Ψ(s, 0) − Φ Ψ(t, 0), ``(*, k, k)``.
    root: Tensor  #: Lower-triangular factor of the covariance, ``(*, k, k)``, diagonal ≥ 0.

    @property
    def covariance(self) -> Tensor:
        """``root @ root.mT``, ``(*, k, k)``."""
        return self.root @ self.root.mT

    def mean(self, z_t: Tensor, z_0: Tensor) -> Tensor:
        """Mean of z_s, ``(B, k, *D)``, for states of that shape."""
        check_kernel_shape(self.state, z_t=z_t, z_0=z_0)
        return apply_blocks(self.state, z_t) + apply_blocks(self.initial, z_0)

    def sample(
        self, z_t: Tensor, z_0: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw z_s ``(B, k, *D)`` for states of that shape, in the dtype and on the device of z_t.

        A posterior for one pair of times, shape ``()``, is used for all samples. A posterior of
        shape ``(B,)`` has one pair of times per sample.
        """
        mean = self.mean(z_t, z_0)
        noise = standard_normal(mean.shape, generator=generator, dtype=z_t.dtype, device=z_t.device)
        return mean + apply_blocks(self.root, noise)

    def log_prob(self, z_s: Tensor, z_t: Tensor, z_0: Tensor) -> Tensor:
        """Log-density of z_s given z_t and z_0, ``(B,)`` nats.

        Raises a ValueError if there is no density (s = t, or λ = 0), or the shapes do not fit.
        """
        mean = self.mean(z_t, z_0)
        check_kernel_shape(self.state, z_s=z_s, z_t=z_t)
        return log_density(z_s - mean, self.root)


def bayes(step: Kernel, earlier: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
    r"""Φ and noise root of the Bayesian posterior, from the roots L_s, L_t and the step s to t.

    With Ψ and L_Q of the step, an orthogonal triangularisation of the joint distribution gives
    both. The earlier state is in units of its own root,

    .. math:: \mathrm{tri}\begin{pmatrix} ΨL_s & L_Q \\ I & 0 \end{pmatrix}
              = \begin{pmatrix} L_t & 0 \\ W & R \end{pmatrix}, \qquad
              Φ = L_s W L_t^{-1}, \quad L_P = L_s R,

    with rounding relative to L_s. For a short step L_P is far smaller than L_s, so the information
    form is used, with X = Ψ⁻¹L_Q and Y = L_s⁻¹X,

    .. math:: P = X (I + Y^⊤ Y)^{-1} X^⊤, \qquad Φ = Ψ^{-1} (I − Q Σ_t^{-1}).

    Neither form subtracts covariances. If a step renews one direction and hardly changes another,
    the row of the second direction is accurate relative to L_s only.
    """
    k = later.shape[-1]
    eye = torch.eye(k, dtype=torch.float64, device="cpu")
    lower = torch.cat([eye, torch.zeros_like(eye)], dim=-1).expand(*earlier.shape[:-1], 2 * k)
    upper = torch.cat([step.mean @ earlier, step.root], dim=-1)
    joint = joint_root(torch.cat([upper, lower], dim=-2))
    moved = earlier @ joint[..., k:, :k]
    long_state = torch.linalg.solve_triangular(later, moved, upper=False, left=False)
    # Triangularise again, because the product lacks a root's diagonal if L_s is singular.
    long_root = joint_root(earlier @ joint[..., k:, k:])

    # ‖L_t⁻¹L_Q‖² is the share of the noise in Σ_t. It is at least 1 if Ψ or L_s is singular.
    share = torch.linalg.solve_triangular(later, step.root, upper=False).square().sum((-2, -1))
    short = (share <= 0.5)[..., None, None]
    psi = torch.where(short, step.mean, eye)
    noise = torch.where(short, step.root, 0.0)
    whitening = triangular_inverse(torch.where(short, later, eye))
    gain = noise @ (noise.mT @ whitening.mT) @ whitening
    solved = block_solve(psi, torch.cat([noise, eye - gain], dim=-1))
    X, short_state = solved[..., :k], solved[..., k:]
    Y = torch.linalg.solve_triangular(torch.where(short, earlier, eye), X, upper=False)
    factor = joint_root(eye, Y.mT)
    short_root = joint_root(torch.linalg.solve_triangular(factor.mT, X, upper=True, left=False))
    return torch.where(short, short_state, long_state), torch.where(short, short_root, long_root)


def reverse_family(
    dynamics: Dynamics, root_at: RootAt, s: Tensor, t: Tensor, stochasticity: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Φ_λ and noise root over [s, t], ``(*s.shape, k, k)``, for s ≤ t and λ ≥ 0 of one shape.

    In coordinates in which z_τ is standard normal, z_τ − Ψz_0 = L_τ y with L from ``root_at``, and
    with g = L⁻¹G the reverse process is

    .. math:: dy = \bigl(Ω + \tfrac{λ^2}2 g g^⊤\bigr) y\,dτ + λ\,g\,d\bar w,

    a rotation, with Ω as in `cldsde.linear.flow`, and a contraction. However degenerate L becomes
    as τ → 0, their rates grow only like 1/τ if β is a power of τ there. Collocation integrates them
    on panels of similar change.
    """
    earlier, later = root_at(s), root_at(t)
    if dynamics.components == 1:
        move, noise = _single_family(dynamics, earlier, later, s, t, stochasticity)
    else:
        flat = s.flatten(), t.flatten(), stochasticity.reshape(-1, 1, 1, 1)
        family = _collocated_family(dynamics, root_at, *flat)
        move, noise = (stack_first(x, s.shape) for x in family)
    state = torch.linalg.solve_triangular(later, earlier @ move, upper=False, left=False)
    return state, earlier @ noise


def _collocated_family(
    dynamics: Dynamics, root_at: RootAt, s: Tensor, t: Tensor, level: Tensor
) -> tuple[Tensor, Tensor]:
    """Transition and noise root of y over intervals ``(n,)``, ``(k, k, n)``."""

    def reverse(times: Tensor) -> tuple[Tensor, Tensor]:
        rotation, dissipation, g = whitened_matrices(dynamics, root_at, times)
        return rotation + level.square() * dissipation, level * g

    def fastest(times: Tensor) -> Tensor:
        rotation, dissipation, _ = whitened_matrices(dynamics, root_at, times)
        return rotation + level.detach().square().max() * dissipation

    panels, edges = _panels(fastest, s, t)
    factors = converged(lambda count: collocate(reverse, *edges(count)), panels)
    if factors is None:
        raise ValueError(
            "stochasticity is too large to resolve the reverse process between s and t; got up to "
            f"{float(level.detach().max()):g}. Take a smaller one or a shorter interval"
        )
    return factors


def _single_family(
    dynamics: Dynamics, earlier: Tensor, later: Tensor, s: Tensor, t: Tensor, stochasticity: Tensor
) -> tuple[Tensor, Tensor]:
    """Transition e^{−λ²H} and noise √(1 − e^{−2λ²H}) for one component.

    H = κ(s) − κ(t), which is ∞ if Ψ(t, s) = 0.
    """
    psi, noise = dynamics.transition(s, t)
    kept, share = psi * earlier / later, (noise / later).square()
    # e^{−2H} equals kept² and 1 − share. Over short steps only the second form keeps the digits.
    short = share < 0.5
    gone = kept == 0
    far = torch.where(gone, 1e300, -torch.where(gone, 1.0, kept).log())
    H = torch.where(short, -0.5 * torch.log1p(-torch.where(short, share, 0.0)), far)
    contracted = stochasticity.square()[..., None, None] * H
    return torch.exp(-contracted), safe_sqrt(-torch.expm1(-2 * contracted))


def _panels(
    drift: Callable[[Tensor], Tensor], s: Tensor, t: Tensor
) -> tuple[int, Callable[[int], tuple[Tensor, Tensor]]]:
    """First number of panels from t down to s, and their edges as a function of the number.

    Panels of each interval ``(n,)`` are uniform in ∫ (‖drift‖ + 1/τ) dτ.
    """
    if not len(t):
        return 1, lambda panels: (s.expand(panels, -1), s.expand(panels, -1))
    with torch.no_grad():
        # If s = 0, the distribution is regular, and times below 1e-10 t need no finer panels.
        latest = t.clamp_min(1e-300)
        floor = torch.where(s > 0, s, 1e-10 * t).clamp_min(1e-300)
        low, high = float(floor.min().log()), float(latest.max().log())
        knots = torch.linspace(low, high + 1e-9, 257, dtype=torch.float64, device="cpu")
        tau = knots.exp().clamp_max(t.max())
        rate = 1 + drift(tau.unsqueeze(0))[0].norm(dim=(-2, -1)) * tau
        work = torch.zeros_like(knots)
        work[1:] = (0.5 * (rate[1:] + rate[:-1]) * knots.diff()).cumsum(0)
        first = _interpolate(knots, work, floor.log())
        last = _interpolate(knots, work, latest.log())
        total = float((last - first).max())

    def edges(panels: int) -> tuple[Tensor, Tensor]:
        share = torch.arange(panels + 1, dtype=torch.float64, device="cpu").unsqueeze(1) / panels
        with torch.no_grad():
            times = _interpolate(work, knots, last.lerp(first, share)).exp()
            fraction = ((times - s) / (t - s)).clamp(0, 1)
            # Over short intervals the rate is constant, and the division is ill-conditioned.
            fraction = torch.where(t - s <= 1e-3 * t, 1 - share, fraction)
            fraction[0], fraction[-1] = 1.0, 0.0
        span = t - s
        return s + span * fraction[:-1], span * fraction.diff(dim=0)

    return max(1, math.ceil(total / 4)), edges


def _interpolate(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Piecewise linear y(x) for increasing knots x."""
    i = torch.searchsorted(x, at.contiguous()).clamp(1, len(x) - 1)
    fraction = ((at - x[i - 1]) / (x[i] - x[i - 1])).clamp(0, 1)
    return y[i - 1].lerp(y[i], fraction)
