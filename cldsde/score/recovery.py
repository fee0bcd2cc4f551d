r"""What a score of the driven components says about the rest of the state.

Given the law z_t | x_0 ~ N(ψ x_0, Σ_t), the score of the true marginal obeys
Σ_t s = −(z − ψ x̂₀) with x̂₀ = E[x_0 | z_t]: k·D numbers with only D unknowns. Whitened by the root
L_t, with w = L⁻¹z, c = L⁻¹ψ and the predicted noise n = −L_ddᵀ s_d of a trailing driven set d,

.. math:: w_d − n = c_d\,\hat x_0 \quad⇒\quad \hat x_0 = \frac{c_d^⊤ (w_d − n)}{c_d^⊤ c_d}.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.sde import LinearSDE

__all__ = ["DataPrediction", "check_trailing"]


def check_trailing(sde: LinearSDE) -> None:
    """Raise ValueError unless the driven components are the last ones of the state."""
    k, driven = sde.components, sde.driven
    if driven != tuple(range(k - len(driven), k)):
        msg = (
            f"the driven components must be the last of the {k}; got {driven}. "
            "Order the components of the process so that noise enters the trailing ones"
        )
        raise ValueError(msg)


# At this ratio of the noise in x̂₀ to that of the best estimate the driven rows have lost x_0.
# Well-damped processes stay below 4, and underdamped ones pass through infinity.
_LARGEST_AMPLIFICATION = 20.0


class DataPrediction(NamedTuple):
    """Coefficients of x̂₀ = E[x_0 | z_t] in the state and the driven score.

    Attributes
    ----------
    state
        ``(*, 1, k)`` float64.
    score
        ``(*, 1, len(driven))`` float64.
    """

    state: Tensor
    score: Tensor

    @classmethod
    def at(cls, sde: LinearSDE, t: Tensor) -> DataPrediction:
        """Coefficients at times t > 0.

        Parameters
        ----------
        sde
            The forward process; its driven components must be the last ones.
        t
            Float64 times of any shape.

        Raises
        ------
        ValueError
            If the law given x_0 has no density at some time, or the driven score does not
            determine x_0, as at isolated times of an underdamped process.
        """
        check_trailing(sde)
        kernel = sde.marginal(t)
        root, psi = kernel.root, kernel.mean[..., :1]
        if bool((root.diagonal(dim1=-2, dim2=-1) <= 0).any()):
            msg = f"t: the law given x_0 has no density at t = {float(t.min()):g}; take t > 0"
            raise ValueError(msg)
        first = sde.driven[0]
        whitened = torch.linalg.solve_triangular(root, psi, upper=False)
        signal = whitened[..., first:, :]
        power = signal.square().sum((-2, -1), keepdim=True)
        amplification = (whitened.square().sum((-2, -1), keepdim=True) / power).sqrt().squeeze()
        worst = float(amplification.max())
        if worst != worst:  # noqa: PLR0124
            msg = (
                f"t: nothing of x_0 is left in the state at t = {float(t.max()):g}; "
                "end earlier or lower beta"
            )
            raise ValueError(msg)
        if not worst <= _LARGEST_AMPLIFICATION:
            where = float(t.flatten()[amplification.flatten().argmax()])
            msg = (
                f"the score of the driven components {sde.driven} does not determine x_0 at "
                f"t = {where:g}: it would amplify noise {worst:.3g} times. Underdamped processes "
                "have such times; use critical damping or more"
            )
            raise ValueError(msg)
        # c_dᵀ [L⁻¹]_d: solve Lᵀ y = (0, c_d).
        padded = torch.cat([torch.zeros_like(whitened[..., :first, :]), signal], dim=-2)
        state = torch.linalg.solve_triangular(root.mT, padded, upper=True).mT / power
        score = (root[..., first:, first:] @ signal).mT / power
        return cls(state, score)

    def __call__(self, z: Tensor, score: Tensor) -> Tensor:
        """x̂₀ ``(B, *D)`` from a state ``(B, k, *D)`` and the driven score at it."""
        return (apply_blocks(self.state, z) + apply_blocks(self.score, score))[:, 0]
