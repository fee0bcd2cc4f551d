"""Exact posterior of Gaussian modes given a linear observation."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from cldsde.score.observation import Observation, check_observation


def conditioned(
    means: Tensor, covariances: Tensor, observation: Observation
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Log-evidence ``(n,)``, means and covariances of the modes given y = A x + s n.

    .. math::
        S = A C A^⊤ + s^2 I, \quad K = C A^⊤ S^{-1}, \quad m' = m + K (y − A m), \quad
        C' = (I − K A) C (I − K A)^⊤ + s^2 K K^⊤

    This is Joseph's form of C', which stays positive semi-definite for small s. Without noise,
    y has no density if rows of A are linearly dependent or zero on the data.
    """
    dimension = means.shape[1]
    shape = check_observation(observation).shape or (dimension,)
    if math.prod(shape) != dimension:
        raise ValueError(
            f"observation must be of data of {dimension} numbers, the mixture's "
            f"dimension; got data of shape {tuple(shape)}"
        )
    observation.check(shape, dtype=torch.float64)
    A = observation.dense(shape)
    y = observation.y.to("cpu", torch.float64).flatten()
    if len(y) != len(A):
        raise ValueError(
            f"observation must hold one y of {len(A)} numbers to condition on; "
            f"got shape {tuple(observation.y.shape)}"
        )
    means, covariances = means.detach().cpu(), covariances.cpu()
    noise_std, eye = observation.noise_std, partial(torch.eye, dtype=A.dtype, device="cpu")
    cross = covariances @ A.mT
    roots, faults = torch.linalg.cholesky_ex(A @ cross + noise_std**2 * eye(len(A)))
    if bool(faults.any()):
        raise ValueError(
            f"noise_std of the observation must be larger, because y has no density under the "
            f"mixture; got {noise_std:g}"
        )
    residual = y - means @ A.mT
    whitened = torch.linalg.solve_triangular(roots, residual.unsqueeze(-1), upper=False)
    volume = roots.diagonal(dim1=1, dim2=2).log().sum(1) + 0.5 * len(A) * math.log(2 * math.pi)
    gain = torch.cholesky_solve(cross.mT, roots).mT
    rest = eye(A.shape[1]) - gain @ A
    moved = means + (gain @ residual.unsqueeze(-1)).squeeze(-1)
    shrunk = rest @ covariances @ rest.mT + noise_std**2 * gain @ gain.mT
    log_evidence = -0.5 * whitened.square().sum((1, 2)) - volume
    return log_evidence, moved, (shrunk + shrunk.mT) / 2
