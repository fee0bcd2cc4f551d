"""Algebra of stacks of small k×k blocks: orthogonal triangularisation, powers, application.

Coefficients of a linear SDE are stacks of tiny matrices, one per time. LAPACK would be called
once per matrix; the functions here run over the whole stack at once, with the stack in the
*last* axes ("stack-last": ``(k, n, *stack)``), so that every operation is a long vector
operation. All of them are differentiable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "apply_blocks",
    "block_product",
    "flatten_data",
    "lower_factor",
    "safe_sqrt",
    "stack_first",
]


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root of x ≥ 0 whose derivative at 0 is taken as 0 instead of infinity."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def lower_factor(root: Tensor) -> Tensor:
    """Lower-triangular L with L Lᵀ = R Rᵀ and diagonal ≥ 0, without forming R Rᵀ.

    Householder reflections from the right: an LQ factorisation whose Q is dropped. Each row of R
    is perturbed relative to its own size, and bringing the largest entry of the pivot row to the
    front extends that to the columns: kernels over short times, whose entries scale with
    different powers of time, keep the relative accuracy of every diagonal entry.

    Parameters
    ----------
    root
        R, shape ``(k, n, *stack)``, real floating point.

    Returns
    -------
    Tensor
        L, shape ``(k, k, *stack)``.

    References
    ----------
    A. J. Cox and N. J. Higham, *Stability of Householder QR factorization for weighted least
    squares problems*, 1998.
    """
    k, n = root.shape[:2]
    if n < k:
        root = torch.cat([root, root.new_zeros(k, k - n, *root.shape[2:])], dim=1)
    zero = torch.zeros_like(root[0, :1])
    columns = []
    for i in range(k):
        # root holds rows i … k−1 of what is left to be triangularised.
        largest, where = root[0].detach().abs().max(0, keepdim=True)
        head = root.gather(1, where.expand(len(root), *where.shape))
        root = root.scatter(1, where.expand(len(root), *where.shape), root[:, :1])
        # In units of its largest entry the pivot row neither overflows nor underflows.
        unit = torch.where(largest > 0, largest, 1.0)
        tail = root[0, 1:] / unit
        lead = head[0] / unit
        size = safe_sqrt(lead.square() + tail.square().sum(0, keepdim=True))
        sign = torch.where(head[0] < 0, -1.0, 1.0)
        # The reflector is (lead + sign·size, tail), its square 2·size·(size + |lead|).
        first = lead + sign * size
        inverse = 1.0 / torch.where(largest > 0, size * (size + lead.abs()), 1.0)
        rest_head, rest = head[1:], root[1:, 1:]
        projection = inverse * (first * rest_head + (tail * rest).sum(1, keepdim=True))
        # The pivot goes to −sign·size·e₀; the sign of the column is turned to make it positive.
        column = -sign * (rest_head - first * projection)
        columns.append(torch.cat([zero] * i + [unit * size] + [*column]))
        root = rest - tail * projection
    return torch.stack(columns, dim=1)


def block_product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product of two stack-last stacks, ``(k, l, *stack)`` by ``(l, m, *stack)``."""
    return (a.unsqueeze(2) * b.unsqueeze(0)).sum(1)


def stack_first(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Reorder ``(k, l, n)`` to the public layout ``(*shape, k, l)``."""
    return blocks.movedim(-1, 0).reshape(*shape, *blocks.shape[:2])


def flatten_data(z: Tensor) -> Tensor:
    """State ``(B, k, *D)`` as ``(B, k, D₁·…)``, also where there are no data axes or no samples."""
    return z.reshape(*z.shape[:2], math.prod(z.shape[2:]))


def apply_blocks(blocks: Tensor, z: Tensor) -> Tensor:
    """Apply k'×k blocks to the component axis of a state, in the state's dtype and device.

    Parameters
    ----------
    blocks
        ``(k', k)``, shared by the batch, or ``(B, k', k)``.
    z
        State ``(B, k, *D)``.

    Returns
    -------
    Tensor
        ``(B, k', *D)``.
    """
    flat = flatten_data(z)
    return torch.matmul(blocks.to(flat), flat).reshape(len(z), blocks.shape[-2], *z.shape[2:])
