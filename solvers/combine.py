"""Linear combinations of a state's components with coefficients known in advance.

A step of every solver here is a few products of small constant blocks with the component axis.
The blocks are float64 numbers on the CPU. They reach the device as scalar arguments of fused
multiply–add kernels, without a transfer or a synchronisation. Zero coefficients cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Block = list[list[float]]
"""A k×m block as rows of Python floats."""


def as_blocks(table: Tensor) -> list[Block]:
    """Rows of a float64 table ``(n, k, m)`` as blocks of Python floats."""
    blocks: list[Block] = table.tolist()
    return blocks


def combine(*terms: tuple[Block, Tensor], out: Tensor | None = None) -> Tensor:
    """Σ block · tensor over the component axis, ``(B, k, *D)``.

    ``terms`` are one or more pairs of a k×m block and a tensor ``(B, m, *D)``. ``out`` is a tensor
    to write to and return, not differentiable. None: a new contiguous tensor.
    """
    block, like = terms[0]
    rows = _products(len(block), terms)
    if out is None and _functional():
        return torch.cat([_sum(row, like) for row in rows], dim=1)
    if out is None:
        out = like.new_empty(like.shape[0], len(block), *like.shape[2:])
    for total, row in zip(_columns(out), rows, strict=True):
        _sum(row, like, out=total)
    return out


def add_to(total: Tensor, *terms: tuple[Block, Tensor]) -> Tensor:
    """``total`` + Σ block · tensor, written to ``total`` unless gradients are recorded.

    A step that adds its noise last can free the score before it draws the noise.
    """
    rows = _products(total.shape[1], terms)
    if _functional():
        sums = [_add(x.clone(), row) for x, row in zip(_columns(total), rows, strict=True)]
        return torch.cat(sums, dim=1)
    for x, row in zip(_columns(total), rows, strict=True):
        _add(x, row)
    return total


def _functional() -> bool:
    """Whether sums are differentiated or traced, so that writing to slices is not allowed."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def _columns(tensor: Tensor) -> Sequence[Tensor]:
    """Views ``(B, 1, *D)`` of the components."""
    return (tensor,) if tensor.shape[1] == 1 else tensor.chunk(tensor.shape[1], dim=1)


_Product = tuple[float, Tensor]


def _products(count: int, terms: Sequence[tuple[Block, Tensor]]) -> list[list[_Product]]:
    """Pairs of coefficient and component for each row, without zero coefficients."""
    columns = [column for _, tensor in terms for column in _columns(tensor)]
    rows = ([c for block, _ in terms for c in block[row]] for row in range(count))
    return [[pair for pair in zip(row, columns, strict=True) if pair[0]] for row in rows]


def _sum(products: list[_Product], like: Tensor, out: Tensor | None = None) -> Tensor:
    """Σ coefficient · column, in a new tensor or in ``out``."""
    if not products:
        return torch.zeros_like(like[:, :1]) if out is None else out.zero_()
    (first, column), *rest = products
    if first == 1 and rest:
        (second, other), *rest = rest
        return _add(torch.add(column, other, alpha=second, out=out), rest)
    return _add(torch.mul(column, first, out=out), rest)


def _add(total: Tensor, products: Sequence[_Product]) -> Tensor:
    for coefficient, column in products:
        total.add_(column, alpha=coefficient)
    return total
