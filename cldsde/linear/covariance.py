"""Triangular roots of covariances."""

from __future__ import annotations

import torch
from torch import Tensor

from cldsde.linear.blocks import lower_factor, safe_sqrt
from cldsde.linear.checks import MatrixLike, as_matrix


def covariance_root(covariance: MatrixLike, name: str, k: int) -> Tensor:
    """Lower-triangular root of a positive semi-definite k×k matrix, exact for diagonal matrices.

    Raise an error about ``name`` unless ``covariance`` is such a matrix.
    """
    matrix = as_matrix(covariance, name, (k, k))
    diagonal = matrix.diagonal()
    if not matrix.requires_grad and bool((diagonal >= 0).all() & (matrix == diagonal.diag()).all()):
        return diagonal.sqrt().diag()
    # Divide by the standard deviations, so that every entry has the same rounding error.
    std = safe_sqrt(diagonal.clamp_min(0))
    units = torch.where(std > 0, std, 1.0)
    correlation = matrix / units / units.unsqueeze(1)
    plain = correlation.detach()
    if float((plain - plain.T).abs().max()) > 1e-12:
        raise ValueError(f"{name} must be symmetric; got {matrix.tolist()}")
    smallest = float(torch.linalg.eigvalsh(plain).min())
    null = diagonal.detach() <= 0
    if bool(plain[null].any()) or smallest < -1e-12 * k:
        raise ValueError(f"{name} must be positive semi-definite; got {matrix.tolist()}")
    return _semidefinite_cholesky(correlation) * units.unsqueeze(1)


def _semidefinite_cholesky(matrix: Tensor) -> Tensor:
    """Lower factor of a positive semi-definite matrix of unit scale; null columns are zero."""
    columns = []
    rest = matrix
    for i in range(len(matrix)):
        pivot = rest[i, i]
        null = pivot.detach() <= 1e-14
        column = torch.where(null, 0.0, rest[:, i] / safe_sqrt(torch.where(null, 1.0, pivot)))
        # Eliminated entries are zero up to rounding.
        column = torch.cat([column.new_zeros(i), column[i:]])
        columns.append(column)
        rest = rest - column.unsqueeze(1) * column
    return torch.stack(columns, dim=1)


def joint_root(*columns: Tensor) -> Tensor:
    """Lower-triangular L ``(*, k, k)`` with L Lᵀ = Σ C Cᵀ over C ``(*, k, m)``, diagonal ≥ 0.

    The leading axes broadcast. The sum is never formed.
    """
    shape = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
        *(c.shape[:-2] for c in columns)
    )
    joined = torch.cat([c.expand(*shape, *c.shape[-2:]) for c in columns], dim=-1)
    return lower_factor(joined.movedim((-2, -1), (0, 1))).movedim((0, 1), (-2, -1))


def triangular_inverse(root: Tensor) -> Tensor:
    """Inverse of lower-triangular blocks ``(*, k, k)`` with a positive diagonal."""
    eye = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    inverse: Tensor = torch.linalg.solve_triangular(root, eye, upper=False)
    return inverse
