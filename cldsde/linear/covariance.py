"""Roots of covariances that are given, and of those that grow by a rank-one term."""

from __future__ import annotations

import torch
from torch import Tensor

from cldsde.linear.blocks import lower_factor, safe_sqrt
from cldsde.linear.checks import MatrixLike, as_matrix

__all__ = ["covariance_root", "joint_root", "triangular_inverse"]


def covariance_root(covariance: MatrixLike, name: str, k: int) -> Tensor:
    """Lower-triangular root of a positive semi-definite k×k matrix, exact where it is diagonal.

    Raises
    ------
    TypeError
        If ``covariance`` is no matrix of numbers.
    ValueError
        If it is not k×k, finite, symmetric and positive semi-definite; the message calls it
        ``name``.
    """
    matrix = as_matrix(covariance, name, (k, k))
    scale = float(matrix.detach().abs().max())
    if float((matrix - matrix.T).detach().abs().max()) > 1e-12 * scale:
        msg = f"{name} must be symmetric; got {matrix.tolist()}"
        raise ValueError(msg)
    diagonal = matrix.diagonal()
    is_diagonal = not bool((matrix - diagonal.diag()).detach().any())
    if is_diagonal and not matrix.requires_grad and bool((diagonal >= 0).all()):
        return safe_sqrt(diagonal).diag()
    values, vectors = torch.linalg.eigh(matrix)
    if float(values.detach().min()) < -1e-12 * scale:
        msg = f"{name} must be positive semi-definite; its eigenvalues are {values.tolist()}"
        raise ValueError(msg)
    if float(values.detach().min()) > 1e-8 * scale:
        factor: Tensor = torch.linalg.cholesky(matrix)
        return factor
    return lower_factor(vectors * safe_sqrt(values.clamp_min(0)))


def joint_root(*columns: Tensor) -> Tensor:
    """Lower-triangular L with L Lᵀ = Σ C Cᵀ over the given C, found without forming a sum.

    Parameters
    ----------
    columns
        Tensors ``(*, k, m)`` whose leading axes broadcast.

    Returns
    -------
    Tensor
        ``(*, k, k)``, diagonal ≥ 0.
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
