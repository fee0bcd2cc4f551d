"""Bayes' rule for mixtures of Gaussians under a linear observation."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def condition_gaussians(
    means: Tensor, covariances: Tensor, A: Tensor, y: Tensor, noise_std: float
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Evidence, means and covariances of Gaussians given y = A x + s n.

    .. math::
        S = A C A^⊤ + s^2 I, \quad K = C A^⊤ S^{-1}, \quad m' = m + K (y − A m), \quad
        C' = (I − K A) C (I − K A)^⊤ + s^2 K K^⊤

    This is Joseph's form of C', which stays positive semi-definite for small s.

    Parameters
    ----------
    means, covariances
        ``(n, D)`` and ``(n, D, D)``, float64.
    A, y
        ``(m, D)`` and ``(m,)``, float64.
    noise_std
        Standard deviation s of the noise.

    Returns
    -------
    log_evidence, means, covariances : tuple of Tensor
        log N(y; A m, S) ``(n,)``, means m' ``(n, D)`` and covariances C' ``(n, D, D)``.

    Raises
    ------
    ValueError
        If y has no density. Without noise this happens if rows of A are linearly dependent or zero
        on the data.
    """
    cross = covariances @ A.mT
    S = A @ cross + noise_std**2 * torch.eye(len(A), dtype=A.dtype, device="cpu")
    roots, faults = torch.linalg.cholesky_ex(S)
    if bool(faults.any()):
        raise ValueError(
            f"noise_std of the observation must be larger, because y has no density under the "
            f"mixture; got {noise_std:g}"
        )
    residual = y - means @ A.mT
    whitened = torch.linalg.solve_triangular(roots, residual.unsqueeze(-1), upper=False)
    volume = roots.diagonal(dim1=1, dim2=2).log().sum(1) + 0.5 * len(A) * math.log(2 * math.pi)
    gain = torch.cholesky_solve(cross.mT, roots).mT
    rest = torch.eye(A.shape[1], dtype=A.dtype, device="cpu") - gain @ A
    moved = means + (gain @ residual.unsqueeze(-1)).squeeze(-1)
    shrunk = rest @ covariances @ rest.mT + noise_std**2 * gain @ gain.mT
    log_evidence = -0.5 * whitened.square().sum((1, 2)) - volume
    return log_evidence, moved, (shrunk + shrunk.mT) / 2
