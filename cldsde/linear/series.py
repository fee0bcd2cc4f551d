"""Polynomials, Gaussian elimination and balancing for series of transition matrices."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from cldsde.linear.schedule import gauss_legendre


def polynomials(coefficients: Tensor, x: Tensor) -> Tensor:
    """Evaluate polynomials with coefficients ``(*, p)``, lowest first, at ``(n,)``: ``(*, n)``.

    Horner's scheme is used, because a matrix product with the powers of x would wake the thread
    pool.
    """
    *lower, value = coefficients.unsqueeze(-1).unbind(-2)
    for coefficient in reversed(lower):
        value = torch.addcmul(coefficient, value, x)
    return value


def eliminate(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Factor rows ``(k, m, n)`` as M E by Gaussian elimination with column pivoting.

    M ``(k, k, n)`` is unit lower triangular. In each column that holds the largest entry of a row
    of E, the rows below are zero. Entries do not grow, because a multiplier times the row is no
    larger than the entry that it removes.
    """
    k, _, n = rows.shape
    eye = torch.eye(k, dtype=rows.dtype, device="cpu")
    multipliers = [eye[:, j, None].expand(k, n) for j in range(k)]
    for i in range(k - 1):
        lead = rows[i].detach().abs().argmax(0)
        pivot = rows[i].gather(0, lead.unsqueeze(0))
        blank = pivot == 0
        where = lead.expand(k - i - 1, 1, n)
        below = rows[i + 1 :].gather(1, where)
        factor = torch.where(blank, 0.0, below.squeeze(1) / torch.where(blank, 1.0, pivot))
        rest = rows[i + 1 :] - factor.unsqueeze(1) * rows[i]
        # Set the eliminated entries to zero, because their rounding error may exceed the next term.
        rest = rest.scatter(1, where, torch.where(blank, below, 0.0))
        rows = torch.cat([rows[: i + 1], rest])
        multipliers[i] = torch.cat([multipliers[i][: i + 1], factor])
    return torch.stack(multipliers, dim=1), rows


@lru_cache
@torch.inference_mode(False)
def legendre_moments(degrees: int, n: int) -> Tensor:
    """∫ x^p P_j(x) dx over [0, 1] for orthonormal Legendre polynomials, ``(n, degrees)``.

    The value is √(2j+1) p!² / ((p−j)! (p+j+1)!) for j ≤ p, and zero for j > p.
    """
    f = math.factorial
    rows = [
        [
            math.sqrt(2 * j + 1) * f(p) ** 2 / (f(p - j) * f(p + j + 1)) if j <= p else 0.0
            for j in range(degrees)
        ]
        for p in range(n)
    ]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


@lru_cache
@torch.inference_mode(False)
def legendre_matrices(n: int) -> tuple[Tensor, Tensor]:
    """Matrices from values at n Gauss nodes of [0, 1] to Legendre series, and to integrals from 0.

    The integrals end at each node. The series is in P_m(2x − 1), which are not normalised.
    """
    nodes, weights = gauss_legendre(n)
    x = 2 * nodes - 1
    P = torch.from_numpy(np.polynomial.legendre.legvander(x.tolist(), n)).T
    size = 2 * torch.arange(n, dtype=torch.float64, device="cpu") + 1
    transform = size.unsqueeze(1) * weights * P[:-1]
    rises = torch.cat([x.unsqueeze(0) + 1, P[2:] - P[:-2]]).T
    return transform, (rises / (2 * size)) @ transform


def balancing_scale(A: Tensor) -> Tensor:
    """Powers of two d for which D⁻¹AD has rows and columns of similar norms (Osborne 1960)."""
    # Not `numpy()`: inside transforms of `torch.func` tensors have no storage.
    size = np.array(A.abs().tolist())
    np.fill_diagonal(size, 0.0)
    scale = np.ones(len(size))
    for _ in range(8):
        before = scale.copy()
        for i in range(len(size)):
            row, column = size[i].sum(), size[:, i].sum()
            factor = 2.0 ** round(math.log2(row / column) / 2) if row > 0 and column > 0 else 1.0
            scale[i] *= factor
            size[i] /= factor
            size[:, i] *= factor
        if (scale == before).all():
            break
    return torch.from_numpy(scale)
