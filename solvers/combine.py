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


def combine(out: Tensor, *terms: tuple[Block, Tensor]) -> Tensor:
    """Write Σ block · tensor over the component axis into ``out`` and return it.

    Parameters
    ----------
    out
        ``(B, k, *D)``, overwritten; may not share memory with a term.
    terms
        Pairs of a k×m block and a tensor ``(B, m, *D)``.
    """
    for row in range(out.shape[1]):
        target = out[:, row]
        started = False
        for block, tensor in terms:
            for column, coefficient in enumerate(block[row]):
                if coefficient == 0.0:
                    continue
                if started:
                    target.add_(tensor[:, column], alpha=coefficient)
                else:
                    torch.mul(tensor[:, column], coefficient, out=target)
                    started = True
        if not started:
            target.zero_()
    return out


def per_sample(x: Tensor, like: Tensor) -> Tensor:
    """A number a sample ``(B,)``, on the device of states and shaped to multiply them."""
    column = x.to(like.device) if x.dtype == torch.bool else x.to(like)
    return column.reshape(-1, *(1,) * (like.ndim - 1))
