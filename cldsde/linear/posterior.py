"""Posterior distribution of an earlier state given a later state and the start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks, block_solve
from cldsde.linear.covariance import joint_root, triangular_inverse
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
