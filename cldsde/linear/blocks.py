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
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


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
    for i in range(k - 1):
        # root holds rows i … k−1 of what is left to be triangularised.
        largest, where = root[0].detach().abs().max(0, keepdim=True)
        if bool((largest == 0).any()):
            # A row of zeros takes a column of zeros, and leaves all others to the rows below.
            root = torch.cat([root, torch.zeros_like(root[:, :1])], dim=1)
            where = torch.where(largest == 0, root.shape[1] - 1, where)
        where = where.expand(k - i, *where.shape)
        head = root.gather(1, where)
        root = root.scatter(1, where, root[:, :1])
        # In units of its largest entry the pivot row neither overflows nor underflows. A row of
        # zeros gets the unit 1 and a lead of 1, and its diagonal entry is 0 · size.
        blank = (largest == 0).to(largest)
        unit = largest + blank
        lead = head[0] / unit + blank
        tail = root[0, 1:] / unit
        size = (lead.square() + tail.square().sum(0, keepdim=True)).sqrt()
        # The reflector is (lead + sign·size, tail), its square 2·size·(size + |lead|).
        sign = lead.detach().sign()
        first = lead + sign * size
        rest_head, rest = head[1:], root[1:, 1:]
        projection = first * rest_head + (tail * rest).sum(1, keepdim=True)
        projection = projection / (size * (size + lead.abs()))
        # The pivot goes to −sign·size·e₀; the sign of the column is turned to make it positive.
        column = -sign * (rest_head - first * projection)
        columns.append(torch.cat([zero] * i + [largest * size, *column]))
        root = rest - tail * projection
    # Nothing is left to eliminate from the last row: only its norm is needed.
    largest = root[0].detach().abs().amax(0, keepdim=True)
    unit = largest + (largest == 0).to(largest)
    size = safe_sqrt((root[0] / unit).square().sum(0, keepdim=True))
    columns.append(torch.cat([zero] * (k - 1) + [unit * size]))
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
    blocks = blocks.to(z)
    # Products and sums, not a matrix product: those run in reduced precision under autocast and
    # where TF32 is allowed.
    entries = blocks.reshape(*blocks.shape, *(1,) * (z.ndim - 2))
    row = blocks.ndim - 2
    parts = entries.unbind(row + 1)
    out = parts[0] * z[:, :1]
    for column in range(1, z.shape[1]):
        out = torch.addcmul(out, parts[column], z[:, column : column + 1])
    return out
