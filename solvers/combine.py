"""Linear combinations of a state's components with coefficients known in advance.

A step of every solver here is a few products of small constant blocks with the component axis.
The blocks live on the host as float64 numbers and reach the device as scalar arguments of fused
multiply–add kernels: no transfer, no synchronisation, nothing done for coefficients that are zero.

Between steps a state ``(B, k, *D)`` lies in memory as ``(k, B, *D)``: each component is one run of
numbers, which is what kernels are fast on. Interleaved, small data would be touched a few numbers
at a time, at two to three times the cost.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Block", "as_blocks", "batch_first", "combine", "component_first", "per_sample"]

Block = list[list[float]]
"""A k×m block as rows of Python floats."""


def as_blocks(table: Tensor) -> list[Block]:
    """Rows of a float64 table ``(n, k, m)`` as blocks of Python floats."""
    blocks: list[Block] = table.tolist()
    return blocks


def component_first(z: Tensor) -> Tensor:
    """A copy of a state ``(B, k, *D)`` with each component in one piece."""
    return torch.stack(z.unbind(1)).transpose(0, 1)


def batch_first(z: Tensor) -> Tensor:
    """A state ``(B, k, *D)`` with each sample in one piece, as most code expects it."""
    return z if z.is_contiguous() else torch.stack(z.unbind(1), dim=1)


def combine(*terms: tuple[Block, Tensor]) -> Tensor:
    """Σ block · tensor over the component axis.

    Parameters
    ----------
    terms
        Pairs of a k×m block and a tensor ``(B, m, *D)``; at least one.

    Returns
    -------
    Tensor
        ``(B, k, *D)``, of its own memory; in the layout of the first tensor where that has k rows.
    """
    block, like = terms[0]
    rows = len(block)
    # Sums that are to be differentiated or traced are no slices of one tensor.
    apart = torch.is_grad_enabled() or torch.compiler.is_compiling()
    if apart:
        totals = [like.new_zeros(like.shape[:1] + like.shape[2:]) for _ in block]
    else:
        # In the layout of a state, where the first tensor is one.
        out = torch.zeros_like(like) if rows == like.shape[1] else _zeros(rows, like)
        totals = list(out.unbind(1))
    columns = [column for _, tensor in terms for column in tensor.unbind(1)]
    for row, total in enumerate(totals):
        coefficients = [number for block, _ in terms for number in block[row]]
        # From zero on: a product with a number takes twice as long to launch as adding a multiple.
        for coefficient, column in zip(coefficients, columns, strict=True):
            if coefficient:
                total.add_(column, alpha=coefficient)
    return torch.stack(totals).transpose(0, 1) if apart else out


def _zeros(rows: int, like: Tensor) -> Tensor:
    return like.new_zeros(rows, len(like), *like.shape[2:]).transpose(0, 1)


def per_sample(x: Tensor, like: Tensor) -> Tensor:
    """A number a sample ``(B,)``, on the device of states and shaped to multiply them."""
    column = x.to(like.device) if x.dtype == torch.bool else x.to(like)
    return column.reshape(-1, *(1,) * (like.ndim - 1))
