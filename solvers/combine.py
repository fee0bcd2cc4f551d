"""Linear combinations of a state's components with coefficients known in advance.

A step of every solver here is a few products of small constant blocks with the component axis.
The blocks live on the host as float64 numbers and reach the device as scalar arguments of fused
multiply–add kernels: no transfer, no synchronisation, nothing done for coefficients that are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Block", "as_blocks", "combine", "per_sample"]

Block = list[list[float]]
"""A k×m block as rows of Python floats."""


def as_blocks(table: Tensor) -> list[Block]:
    """Rows of a float64 table ``(n, k, m)`` as blocks of Python floats."""
    blocks: list[Block] = table.tolist()
    return blocks


def combine(*terms: tuple[Block, Tensor]) -> Tensor:
    """Σ block · tensor over the component axis.

    Parameters
    ----------
    terms
        Pairs of a k×m block and a tensor ``(B, m, *D)``; at least one.

    Returns
    -------
    Tensor
        ``(B, k, *D)``, of its own memory.
    """
    block, tensor = terms[0]
    # `out=` records no gradient and cannot be traced.
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.stack([_row(row, terms) for row in range(len(block))], dim=1)
    out = tensor.new_empty(len(tensor), len(block), *tensor.shape[2:])
    for row in range(len(block)):
        _row(row, terms, out=out[:, row])
    return out


def _row(row: int, terms: tuple[tuple[Block, Tensor], ...], out: Tensor | None = None) -> Tensor:
    total: Tensor | None = None
    for block, tensor in terms:
        for column, coefficient in enumerate(block[row]):
            if coefficient == 0.0:
                continue
            if total is None:
                total = torch.mul(tensor[:, column], coefficient, out=out)
            else:
                total.add_(tensor[:, column], alpha=coefficient)
    if total is None:
        like = terms[0][1]
        total = out.zero_() if out is not None else like.new_zeros(len(like), *like.shape[2:])
    return total


def per_sample(x: Tensor, like: Tensor) -> Tensor:
    """A number a sample ``(B,)``, on the device of states and shaped to multiply them."""
    column = x.to(like.device) if x.dtype == torch.bool else x.to(like)
    return column.reshape(-1, *(1,) * (like.ndim - 1))
