r"""The law of an earlier state given a later one and the start, and the family that contains it.

Between t and s < t the processes

.. math::
    dz = \bigl[F z + \tfrac{1+λ^2}2 G G^⊤ Σ_τ^{-1} (z − Ψ(τ,0) z_0)\bigr] dτ + λ\,G\,d\bar w,
    \qquad λ ≥ 0,

run backwards, keep the law of z_τ given z_0 for every λ: λ = 1 is the Bayesian posterior
p(z_s | z_t, z_0), λ = 0 is a probability flow, and for k = 1 all of them are the family of
Song, Meng and Ermon (2021, eq. 7). They are Gaussian,

.. math:: z_s = Ψ(s,0) z_0 + Φ_λ\,(z_t − Ψ(t,0) z_0) + ζ, \qquad
          ζ ∼ N(0,\ Σ_s − Φ_λ Σ_t Φ_λ^⊤).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks, stack_first
from cldsde.linear.collocation import converged
from cldsde.linear.covariance import joint_root, triangular_inverse
from cldsde.linear.dynamics import Dynamics
from cldsde.linear.kernel import Kernel, check_kernel_shape, log_density
from cldsde.linear.random import standard_normal

__all__ = ["Posterior", "bayes", "reverse_family", "whitened_family"]

Law = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Posterior:
    """The Gaussian law z_s | z_t, z_0 ~ N(state z_t + initial z_0, root rootᵀ), s ≤ t.

    Made by `LinearSDE.posterior`. z_0 stands for the mean of the start: ``sde.embed(x0)`` where
    the law is conditioned on the data, all of z_0 where the initial covariance is zero.

    Attributes
    ----------
    state
        Φ, ``(*, k, k)`` float64 on the host.
    initial
        Ψ(s, 0) − Φ Ψ(t, 0), ``(*, k, k)``.
    root
        Lower-triangular factor of the covariance, ``(*, k, k)``, diagonal ≥ 0.
    """

    state: Tensor
    initial: Tensor
    root: Tensor

    @property
    def covariance(self) -> Tensor:
        """``root @ root.mT``, ``(*, k, k)``."""
        return self.root @ self.root.mT

    def mean(self, z_t: Tensor, z_0: Tensor) -> Tensor:
        """Mean of z_s, ``(B, k, *D)``, for states of that shape."""
        check_kernel_shape(self.state, z_t, "z_t")
        check_kernel_shape(self.state, z_0, "z_0")
        if z_t.shape != z_0.shape:
            msg = f"z_t and z_0 must have one shape; got {tuple(z_t.shape)} and {tuple(z_0.shape)}"
            raise ValueError(msg)
        return apply_blocks(self.state, z_t) + apply_blocks(self.initial, z_0)

    def sample(
        self, z_t: Tensor, z_0: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw z_s.

        Parameters
        ----------
        z_t, z_0
            ``(B, k, *D)``. A law of batch shape ``()`` serves the whole batch, one of shape
            ``(B,)`` gives each sample its own.
        generator
            Source of the normals.

        Returns
        -------
        Tensor
            ``(B, k, *D)``, in the dtype and on the device of ``z_t``.
        """
        mean = self.mean(z_t, z_0)
        noise = standard_normal(mean.shape, generator=generator, dtype=z_t.dtype, device=z_t.device)
        return mean + apply_blocks(self.root, noise)

    def log_prob(self, z_s: Tensor, z_t: Tensor, z_0: Tensor) -> Tensor:
        """Log-density of z_s given z_t and z_0, ``(B,)`` nats.

        Raises
        ------
        ValueError
            If the law has no density (s = t, or λ = 0), or the shapes do not fit.
        """
        return log_density(z_s - self.mean(z_t, z_0), self.root)


def bayes(step: Kernel, earlier: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
    r"""Φ and noise root of the Bayesian posterior, from the roots L_s, L_t and the step s to t.

    With Ψ and L_Q of the step, an orthogonal triangularisation of the joint law gives both,

    .. math:: \mathrm{tri}\begin{pmatrix} ΨL_s & L_Q \\ L_s & 0 \end{pmatrix}
              = \begin{pmatrix} L_t & 0 \\ Φ L_t & L_P \end{pmatrix},

    with rounding relative to L_s. A short step leaves L_P far below L_s; there the information
    form is used, with X = Ψ⁻¹L_Q and Y = L_s⁻¹X,

    .. math:: P = X (I + Y^⊤ Y)^{-1} X^⊤, \qquad Φ = Ψ^{-1} (I − Q Σ_t^{-1}).

    Both hold everywhere; neither subtracts covariances.
    """
    k = later.shape[-1]
    eye = torch.eye(k, dtype=torch.float64)
    lower = torch.cat([earlier, torch.zeros_like(earlier)], dim=-1)
    upper = torch.cat([step.mean @ earlier, step.root], dim=-1)
    joint = joint_root(torch.cat([upper, lower], dim=-2))
    long_state = torch.linalg.solve_triangular(later, joint[..., k:, :k], upper=False, left=False)
    long_root = joint[..., k:, k:]

    with torch.no_grad():
        regular = (earlier.diagonal(dim1=-2, dim2=-1) > 0).all(-1)[..., None, None]
        back = torch.linalg.solve(step.mean, step.root)
        whitened = torch.where(regular, earlier, eye)
        size = torch.linalg.solve_triangular(whitened, back, upper=False).square().sum((-2, -1))
        short = regular & (size <= 1.0)[..., None, None]  # false where Ψ⁻¹ overflowed
    psi = torch.where(short, step.mean, eye)
    noise = torch.where(short, step.root, 0.0)
    X = torch.linalg.solve(psi, noise)
    Y = torch.linalg.solve_triangular(torch.where(short, earlier, eye), X, upper=False)
    factor = joint_root(eye, Y.mT)
    short_root = joint_root(torch.linalg.solve_triangular(factor.mT, X, upper=True, left=False))
    whitening = triangular_inverse(torch.where(short, later, eye))
    gain = noise @ (noise.mT @ whitening.mT) @ whitening
    short_state = torch.linalg.solve(psi, eye - gain)
    return torch.where(short, short_state, long_state), torch.where(short, short_root, long_root)


def reverse_family(
    dynamics: Dynamics, law: Law, s: Tensor, t: Tensor, stochasticity: float
) -> tuple[Tensor, Tensor]:
    """Φ_λ and noise root over [s, t], ``(*s.shape, k, k)``; see `whitened_family`."""
    move, noise = whitened_family(dynamics, law, s, t, stochasticity)
    earlier = law(s)
    state = torch.linalg.solve_triangular(law(t), earlier @ move, upper=False, left=False)
    return state, joint_root(earlier @ noise)


def whitened_family(
    dynamics: Dynamics, law: Law, s: Tensor, t: Tensor, stochasticity: float
) -> tuple[Tensor, Tensor]:
    r"""Transition matrix and noise root in coordinates in which z_τ is standard normal.

    With z_τ − Ψz_0 = L_τ y and g = L⁻¹G the reverse process is

    .. math:: dy = \bigl(Ω + \tfrac{λ^2}2 g g^⊤\bigr) y\,dτ + λ\,g\,d\bar w, \qquad
              Ω = \mathrm{triu}(N, 1) − \mathrm{triu}(N, 1)^⊤, \quad
              N = L^{-1} F L + \tfrac12 g g^⊤,

    a rotation and a contraction whose rates are those of log τ however degenerate L is; it is
    integrated by collocation on panels that are even in log τ.

    Parameters
    ----------
    dynamics
        F and G.
    law
        Times ``(n, q)`` to the root L of the law given the start.
    s, t
        Times of one shape, s ≤ t.
    stochasticity
        λ ≥ 0.
    """
    flat_s, flat_t = s.flatten(), t.flatten()

    def matrices(times: Tensor) -> tuple[Tensor, Tensor]:
        root = law(times)
        g = torch.linalg.solve_triangular(root, dynamics.diffusion(times), upper=False)
        N = torch.linalg.solve_triangular(root, dynamics.drift(times) @ root, upper=False)
        dissipation = 0.5 * g @ g.mT
        upper = (N + dissipation).triu(1)
        return upper - upper.mT + stochasticity**2 * dissipation, stochasticity * g

    span = flat_t - flat_s
    # Where s = 0 the law is regular, and times below 1e-10 t need no finer panels.
    floor = torch.where(flat_s > 0, 0.0, 1e-10 * flat_t)
    log_ratio = torch.log1p(span / (flat_s + floor)).clamp_min(1e-12)
    unit = span / torch.expm1(log_ratio)

    def edges(panels: int) -> tuple[Tensor, Tensor]:
        # s (t/s)^{i/p}, i = p … 1, and the lengths between them, without subtracting times.
        i = torch.arange(panels, 0, -1, dtype=torch.float64).unsqueeze(1) / panels
        starts = flat_s + unit * torch.expm1(log_ratio * i)
        lengths = unit * torch.exp(log_ratio * i) * torch.expm1(-log_ratio / panels)
        return starts, lengths

    widest = float(log_ratio.detach().max()) if len(log_ratio) else 0.0
    factors = converged(matrices, edges, max(1, math.ceil(widest)))
    if factors is None:
        msg = "t: the reverse process varies too fast between s and t to be resolved"
        raise ValueError(msg)
    move, noise = factors
    return stack_first(move, s.shape), stack_first(noise, s.shape)
