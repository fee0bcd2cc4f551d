"""Linear algebra of stacks of small k×k blocks: triangularisation, products, exponentials.

Coefficients of a linear SDE are stacks of tiny matrices, one per time. LAPACK would be called once
per matrix. The functions here run over the whole stack at once, with the stack in the *last* axes
("stack-last": ``(k, n, *stack)``), so that every operation is a long vector operation. All of them
are differentiable. None wakes torch's thread pool for a few hundred matrices, which takes
milliseconds on a busy machine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root of x ≥ 0 with the derivative 0 at x = 0 instead of infinity."""
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def exponential_rest(y: Tensor) -> Tensor:
    """Compute y + e^{−y} − 1 ≥ 0, by the series y²/2 − y³/6 + … for small y."""
    series = torch.zeros_like(y)
    for n in range(20, 1, -1):
        series = (1 - series) * y / n if n > 2 else y * y / 2 * (1 - series)
    return torch.where(y.abs() < 1, series, y + torch.expm1(-y))


def lower_factor(root: Tensor) -> Tensor:
    """Lower-triangular L with L Lᵀ = R Rᵀ and diagonal ≥ 0, without forming R Rᵀ.

    R is ``(k, n, *stack)`` and L ``(k, k, *stack)``. This is an LQ factorisation by Householder
    reflections from the right. The rounding error of each row of R is relative to the row's own
    size. Moving the largest entry of the pivot row to the front extends this to the columns (Cox
    and Higham 1998, *Stability of Householder QR factorization for weighted least squares
    problems*). Entries of kernels over short times scale with different powers of time; every
    diagonal entry still has full relative accuracy.
    """
    k, n = root.shape[:2]
    if n < k:
        root = torch.cat([root, root.new_zeros(k, k - n, *root.shape[2:])], dim=1)
    zero = torch.zeros_like(root[0, :1])
    columns = []
    for i in range(k - 1):
        # root holds the rows i … k−1 that are still to be triangularised.
        largest, where = _largest(root[0])
        blank = largest == 0
        if bool(blank.any()):
            # A row of zeros uses up a column of zeros, so that the rows below keep all others.
            root = torch.cat([root, torch.zeros_like(root[:, :1])], dim=1)
            where = torch.where(blank, root.shape[1] - 1, where)
        where = where.expand(k - i, *where.shape)
        head = root.gather(1, where)
        rest = root.scatter(1, where, root[:, :1])[:, 1:]
        # Divide the pivot row by its largest entry, so that it neither overflows nor underflows.
        # Its lead is then ±1. A row of zeros gets the unit 1, the lead 1 and the diagonal entry 0.
        unit = largest + blank
        lead = head[0] / unit + blank
        tail = rest[0] / unit
        size = (lead.square() + tail.square().sum(0, keepdim=True)).sqrt()
        # The reflector is (lead + sign·size, tail), its square 2·(lead + sign·size)·sign·size.
        sign = lead.detach()
        turned = sign * size
        first = lead + turned
        head, rest = head[1:], rest[1:]
        projection = first * head + (tail * rest).sum(1, keepdim=True)
        projection = projection / (first * turned)
        # The reflection maps the pivot to −sign·size·e₀. Flip the sign to make it positive.
        column = sign * (first * projection - head)
        columns.append(torch.cat([zero] * i + [largest * size, *column]))
        root = rest - tail * projection
    # The last row has nothing to eliminate, so only its norm is needed.
    largest = root[0].detach().abs().amax(0, keepdim=True)
    unit = largest + (largest == 0).to(largest)
    size = safe_sqrt((root[0] / unit).square().sum(0, keepdim=True))
    columns.append(torch.cat([zero] * (k - 1) + [unit * size]))
    return torch.stack(columns, dim=1)


def _largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest absolute value along axis 0 and its index, both with axis 0 kept.

    `Tensor.max` would open a parallel region whatever the size.
    """
    return x.detach().abs().topk(1, dim=0)


def block_product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product of two stack-last stacks, ``(k, l, *stack)`` by ``(l, m, *stack)``."""
    return (a.unsqueeze(2) * b.unsqueeze(0)).sum(1)


def block_solve(a: Tensor, b: Tensor) -> Tensor:
    """Solution X of A X = B for ``(*, k, k)`` and ``(*, k, m)``, whose leading axes broadcast.

    Gaussian elimination with partial pivoting, over the whole stack at once.
    """
    k = a.shape[-1]
    stack = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
    rows = torch.cat([x.expand(*stack, *x.shape[-2:]) for x in (a, b)], dim=-1)
    rows = rows.movedim((-2, -1), (0, 1))
    pivots = []
    for _ in range(k - 1):
        # rows holds the remaining equations in the remaining unknowns.
        _, where = _largest(rows[:, 0])
        where = where.unsqueeze(1).expand(1, *rows.shape[1:])
        head = rows.gather(0, where)
        rest = rows.scatter(0, where, rows[:1])[1:]
        pivots.append(head[0])
        rows = rest[:, 1:] - rest[:, :1] / head[:, :1] * head[:, 1:]
    solution = rows[:, 1:] / rows[:, :1]
    for i in range(k - 2, -1, -1):
        unknowns = k - 1 - i
        known = (pivots[i][1 : 1 + unknowns, None] * solution).sum(0)
        row = (pivots[i][1 + unknowns :] - known) / pivots[i][0]
        solution = torch.cat([row.unsqueeze(0), solution])
    return solution.movedim((0, 1), (-2, -1))


def block_exp(a: Tensor) -> Tensor:
    """Matrix exponential of ``(*, k, k)`` by scaling and squaring of a Taylor series."""
    norm = float(a.detach().abs().sum(-2).max()) if a.numel() else 0.0
    halvings = max(0, math.ceil(math.log2(norm))) if norm > 0 else 0
    a = a * 0.5**halvings
    term = total = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    # The norm is at most 1, so the remainder is below 1/21! < 2e-20.
    for n in range(1, 21):
        term = term @ a / n
        total = total + term
    for _ in range(halvings):
        total = total @ total
    return total


def stack_first(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Reorder ``(k, l, n)`` to the public layout ``(*shape, k, l)``."""
    return blocks.movedim(-1, 0).reshape(*shape, *blocks.shape[:2])


def flatten_data(z: Tensor) -> Tensor:
    """State ``(B, k, *D)`` as ``(B, k, D₁·…)``, also without data axes or samples."""
    return z.reshape(*z.shape[:2], math.prod(z.shape[2:]))


def per_sample(x: Tensor, like: Tensor) -> Tensor:
    """Reshape one number per sample, ``(B,)``, so that it broadcasts with ``(B, *E)``."""
    return x.reshape(-1, *(1,) * (like.ndim - 1))


def apply_blocks(blocks: Tensor, z: Tensor) -> Tensor:
    """Apply blocks ``(k', k)`` or ``(B, k', k)`` to the component axis of a state ``(B, k, *D)``.

    The result ``(B, k', *D)`` has the dtype and device of the state.
    """
    blocks = blocks.to(z)
    # Use products and sums, because matrix products lose precision under autocast and TF32.
    entries = blocks.reshape(*blocks.shape, *(1,) * (z.ndim - 2))
    row = blocks.ndim - 2
    parts = entries.unbind(row + 1)
    out = parts[0] * z[:, :1]
    for column in range(1, z.shape[1]):
        out = torch.addcmul(out, parts[column], z[:, column : column + 1])
    return out
