"""Linear combinations of a state's components with coefficients known in advance.

A step of every solver here is a few products of small constant blocks with the component axis.
The blocks live on the host as float64 numbers and reach the device as scalar arguments of fused
multiply–add kernels: no transfer, no synchronisation, nothing done for coefficients that are zero.

Between steps a state ``(B, k, *D)`` lies in memory as ``(k, B, *D)``: each component is one run of
numbers, which is what kernels are fast on. Interleaved, small data would be touched a few numbers
at a time, at two to three times the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "Block",
    "Combine",
    "CombineInTurn",
    "add_to",
    "as_blocks",
    "batch_first",
    "combine",
    "component_first",
    "per_sample",
]

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


def combine(*terms: tuple[Block, Tensor], out: Tensor | None = None) -> Tensor:
    """Σ block · tensor over the component axis.

    Parameters
    ----------
    terms
        Pairs of a k×m block and a tensor ``(B, m, *D)``; at least one.
    out
        Where to write it, ``(B, k, *D)``; not differentiable.

    Returns
    -------
    Tensor
        ``out``, or ``(B, k, *D)`` of its own memory, in the layout of the first tensor where that
        has k rows.
    """
    block, like = terms[0]
    columns = [column for _, tensor in terms for column in _apart(tensor)]
    if out is None and (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        # Sums that are to be differentiated or traced are no slices of one tensor.
        rows = range(len(block))
        return torch.cat([_sum(_products(row, terms, columns), like) for row in rows], dim=1)
    out = _empty(len(block), like) if out is None else out
    for row, total in enumerate(_apart(out)):
        _sum(_products(row, terms, columns), total, out=total)
    return out


def add_to(total: Tensor, *terms: tuple[Block, Tensor]) -> Tensor:
    """``total`` + Σ block · tensor, in the memory of ``total`` where that is not differentiated.

    What a step adds last, as its noise, need not be there while it holds what it adds first.
    """
    columns = [column for _, tensor in terms for column in _apart(tensor)]
    rows = [_products(row, terms, columns) for row in range(total.shape[1])]
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.cat(
            [_add(x.clone(), row) for x, row in zip(_apart(total), rows, strict=True)], dim=1
        )
    for x, row in zip(_apart(total), rows, strict=True):
        _add(x, row)
    return total


class CombineInTurn:
    """`combine` for a loop that keeps no old state: into two pieces of memory, in turn.

    Taking a tensor apart into its components takes as long as a sum of two of them where there are
    few numbers; here that of a state is done once.

    Parameters
    ----------
    first
        A state whose memory is one of the pieces; a result lasts until two others have been made.
    """

    def __init__(self, first: Tensor) -> None:
        self._pieces = [(first, _apart(first))]
        self._last = 0

    def __call__(self, *terms: tuple[Block, Tensor]) -> Tensor:
        """Σ block · tensor over the component axis, as `combine` has it."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return combine(*terms)
        if len(self._pieces) == 1:
            piece = torch.empty_like(self._pieces[0][0])
            self._pieces.append((piece, _apart(piece)))
        self._last = 1 - self._last
        out, totals = self._pieces[self._last]
        columns: list[Tensor] = []
        for _, tensor in terms:
            for piece, known in self._pieces:
                if tensor is piece:
                    columns += known
                    break
            else:
                columns += _apart(tensor)
        for row, total in enumerate(totals):
            _sum(_products(row, terms, columns), total, out=total)
        return out


Combine = Callable[..., Tensor]
"""`combine`, or one that writes where it is told to."""


def _apart(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views ``(B, 1, *D)`` of the components; of a single one that is the tensor, for nothing."""
    return (tensor,) if tensor.shape[1] == 1 else tensor.chunk(tensor.shape[1], dim=1)


_Product = tuple[float, Tensor]


def _products(
    row: int, terms: Sequence[tuple[Block, Tensor]], columns: Sequence[Tensor]
) -> list[_Product]:
    """What a row of all blocks adds up, without what is zero."""
    coefficients: list[float] = []
    for block, _ in terms:
        coefficients += block[row]
    return [pair for pair in zip(coefficients, columns, strict=True) if pair[0]]


def _sum(products: list[_Product], like: Tensor, out: Tensor | None = None) -> Tensor:
    """Σ coefficient · column, in memory of its own unless told where."""
    if not products or products[0][0] != 1:
        # A product with a number takes twice as long to launch as adding a multiple to zero.
        total = torch.zeros_like(like[:, :1]) if out is None else out.zero_()
    elif len(products) == 1:
        (_, column), *products = products
        return column.clone() if out is None else out.copy_(column)
    else:
        (_, column), (coefficient, other), *products = products
        total = torch.add(column, other, alpha=coefficient, out=out)
    return _add(total, products)


def _add(total: Tensor, products: Sequence[_Product]) -> Tensor:
    for coefficient, column in products:
        total.add_(column, alpha=coefficient)
    return total


def _empty(rows: int, like: Tensor) -> Tensor:
    """A state's worth of memory, in the layout of ``like`` where that has as many components."""
    if rows == like.shape[1]:
        return torch.empty_like(like)
    return like.new_empty(rows, len(like), *like.shape[2:]).transpose(0, 1)


def per_sample(x: Tensor, like: Tensor) -> Tensor:
    """A number a sample ``(B,)``, on the device of states and shaped to multiply them."""
    column = x.to(like.device) if x.dtype == torch.bool else x.to(like)
    return column.reshape(-1, *(1,) * (like.ndim - 1))
