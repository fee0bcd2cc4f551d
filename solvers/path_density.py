r"""Log-density of the path that a stochastic solver takes.

A step adds Gaussian noise last, z' = m(z, …) + L ξ with ξ ~ N(0, 1) in each data dimension, so that

.. math::
    \log p(z' \mid \text{past}) = −\tfrac12 \lVert W (z' − m) \rVert^2 − D \log\det L
    − \tfrac12 r D \log 2π,

with D data dimensions, the rank r of L and W L Lᵀ Wᵀ = 1. If r < k, as for Euler–Maruyama under
CLD, the density is on the range of L, and det L is the product of its singular values above zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cldsde.linear.covariance import joint_root, triangular_inverse

from .combine import Block, combine

_RANK = 1e-10  # singular values below this fraction of the largest one count as zero


class PathDensity:
    """Gaussian densities of the steps of a grid, from L of each step, k×r blocks.

    Raises a ValueError if a step adds no noise.
    """

    def __init__(self, roots: Sequence[Block], times: Tensor) -> None:
        self._steps = []
        for i, block in enumerate(roots):
            root = torch.tensor(block, dtype=torch.float64, device="cpu")
            whitening, log_scale = _whitened(root)
            if not len(whitening):
                end = float(times[i + 1])
                advice = "end above t = 0" if end == 0 else "take a stochasticity above 0 there"
                raise ValueError(
                    f"log_prob must be False for these times: the step from t = "
                    f"{float(times[i]):g} to {end:g} adds no noise and has no density; {advice}"
                )
            constant = log_scale + 0.5 * len(whitening) * math.log(2 * math.pi)
            self._steps.append((whitening.tolist(), (whitening @ root).tolist(), constant))

    def log_prob(self, i: int, z: Tensor, drawn: Tensor) -> Tensor:
        """Log-density of the end of step i, ``(B,)`` nats, as a function of the step's mean alone.

        z ``(B, k, *D)`` is the end with the graph of the mean, and ``drawn`` is ξ ``(B, r, *D)``.
        """
        whitening, unit, constant = self._steps[i]
        wide = torch.promote_types(z.dtype, torch.float32)
        terms = [(unit, drawn.to(wide))]
        if z.requires_grad:
            # This term is zero. Its derivative is the derivative by the mean at a fixed end.
            terms.append((whitening, (z.detach() - z).to(wide)))
        residual = combine(*terms)
        size = math.prod(z.shape[2:])
        return -0.5 * residual.square().flatten(1).sum(1) - size * constant


def _whitened(root: Tensor) -> tuple[Tensor, float]:
    """W ``(r, k)`` with W L Lᵀ Wᵀ = 1, and the log-determinant of L on its range."""
    k, columns = root.shape
    lower = joint_root(root)
    diagonal = lower.diagonal()
    if columns >= k and bool((diagonal > _RANK * torch.linalg.vector_norm(lower, dim=1)).all()):
        return triangular_inverse(lower), float(diagonal.log().sum())
    U, sizes, _ = torch.linalg.svd(root, full_matrices=False)
    kept = sizes > _RANK * sizes[0] if len(sizes) else sizes > 0
    sizes = sizes[kept]
    return U[:, kept].T / sizes.unsqueeze(1), float(sizes.log().sum())
