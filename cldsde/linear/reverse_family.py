r"""Family of reverse processes with the same distributions given the start, by Gauss collocation.

Between t and s < t the processes

.. math::
    dz = \bigl[F z + \tfrac{1+λ^2}2 G G^⊤ Σ_τ^{-1} (z − Ψ(τ,0) z_0)\bigr] dτ + λ\,G\,d\bar w,
    \qquad λ ≥ 0,

run backwards in time, have the same distribution of z_τ given z_0 for every stochasticity λ. For
k = 1 this is the family of Song, Meng and Ermon (2021, eq. 7). Φ_λ is the transition matrix of the
bracket from t to s, for z − Ψ(τ,0) z_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from cldsde.linear.blocks import block_product, lower_factor, safe_sqrt, stack_first
from cldsde.linear.dynamics import Dynamics
from cldsde.linear.flow import RootAt, whitened_matrices
from cldsde.linear.schedule import gauss_legendre
from cldsde.linear.series import legendre_matrices

Matrices = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Function of times ``(*, n, q)`` that returns drift ``(*, n, q, k, k)`` and diffusion
``(*, n, q, k, r)``."""

_NODES = 8
_MAX_PANELS = 4096
_AT_ONCE = 4096  # largest number of intervals, over all panels, whose matrices are in memory


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
    """Transition and noise root of y over intervals ``(n,)``, ``(k, k, n)``.

    Panels are doubled until these change by less than 1e-12 of each row's size.
    """

    def reverse(level: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        rotation, dissipation, g = whitened_matrices(dynamics, root_at, times)
        return rotation + level.square() * dissipation, level * g

    panels, edges = _similar_panels(partial(reverse, level.detach().max()), s, t)
    matrices = partial(reverse, level)
    most = max(_MAX_PANELS, 8 * panels)
    fine = collocate(matrices, *edges(panels))
    while 2 * panels <= most:
        panels *= 2
        coarse, fine = fine, collocate(matrices, *edges(panels))
        if all(map(_close, fine, coarse)):
            return fine
    raise ValueError(
        "stochasticity is too large to resolve the reverse process between s and t; got up to "
        f"{float(level.detach().max()):g}. Take a smaller one or a shorter interval"
    )


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


def _similar_panels(
    matrices: Matrices, s: Tensor, t: Tensor
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
        drift, _ = matrices(tau.unsqueeze(0))
        rate = 1 + drift[0].norm(dim=(-2, -1)) * tau
        work = torch.zeros_like(knots)
        work[1:] = (0.5 * (rate[1:] + rate[:-1]) * knots.diff()).cumsum(0)
        first, last = (_interpolate(at.log(), knots, work) for at in (floor, latest))
        total = float((last - first).max())

    def edges(panels: int) -> tuple[Tensor, Tensor]:
        share = torch.arange(panels + 1, dtype=torch.float64, device="cpu").unsqueeze(1) / panels
        with torch.no_grad():
            times = _interpolate(last.lerp(first, share), work, knots).exp()
            fraction = ((times - s) / (t - s)).clamp(0, 1)
            # Over short intervals the rate is constant, and the division is ill-conditioned.
            fraction = torch.where(t - s <= 1e-3 * t, 1 - share, fraction)
            fraction[0], fraction[-1] = 1.0, 0.0
        span = t - s
        return s + span * fraction[:-1], span * fraction.diff(dim=0)

    return max(1, math.ceil(total / 4)), edges


def _interpolate(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Piecewise linear y(x) for increasing knots x; numpy's needs tensors with storage."""
    i = torch.searchsorted(x, at.contiguous()).clamp(1, len(x) - 1)
    fraction = ((at - x[i - 1]) / (x[i] - x[i - 1])).clamp(0, 1)
    return y[i - 1].lerp(y[i], fraction)


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
