"""Gaussian mixtures under linear SDEs: the kD-dimensional distribution, and guidance.

A state (k, *D) is flattened row by row, component c and direction d at c D + d. Given component i
of the mixture it is normal with mean psi (x) m_i and covariance Sigma_t (x) I + psi psi^T (x) C_i,
psi = Psi(t, 0) e_0. Kernels are arguments: a `references.Kernel`, or a kernel of the package, whose
rounded numbers are used as exact.
"""

from typing import Any, NamedTuple

import mpmath as mp
import numpy as np
import torch
from torch.distributions import MultivariateNormal

from cldsde import GaussianMixture
from cldsde.score import Observation
from references.kernels import matrix

MIXTURE_DIGITS = 50


class Mixed(NamedTuple):
    """Exact values at one state."""

    log_prob: float
    score: torch.Tensor  # (k, D), all rows
    posterior_mean: torch.Tensor  # (D,)


def mixed(kernel: Any, data: GaussianMixture, z: torch.Tensor) -> Mixed:
    """Log-density, full score and E[x_0 | z_t = z] at a state ``(k, D)`` of the marginal."""
    k, D = len(z), data.dimension
    with mp.workdps(MIXTURE_DIGITS):
        root, psi = matrix(kernel.root), matrix(kernel.mean)[:, 0]
        blocks, signal = kron(root * root.T, mp.eye(D)), kron(psi, mp.eye(D))
        state = mp.matrix(z.double().flatten().tolist())
        terms, scores, predictions = [], [], []
        members = (x.tolist() for x in (data.weights, data.means, data.covariances))
        for weight, m, C in zip(*members, strict=True):
            mean, spread = mp.matrix(m), matrix(C)
            S = blocks + signal * spread * signal.T
            residual = state - signal * mean
            solved = mp.cholesky_solve(S, residual)
            factor = mp.cholesky(S)
            log_det = 2 * mp.fsum(mp.log(factor[i, i]) for i in range(k * D))
            quadratic = (residual.T * solved)[0]
            log_density = -(quadratic + log_det + k * D * mp.log(2 * mp.pi)) / 2
            terms.append(weight * mp.exp(log_density))
            scores.append(-solved)
            predictions.append(mean + spread * signal.T * solved)
        total = mp.fsum(terms)
        score, prediction = (
            sum((t / total * x for t, x in zip(terms, xs, strict=True)), 0 * xs[0])
            for xs in (scores, predictions)
        )
        rows, means = (
            torch.tensor([float(x) for x in v], dtype=torch.float64) for v in (score, prediction)
        )
        return Mixed(float(mp.log(total)), rows.reshape(k, D), means)


def kron(a: Any, b: Any) -> Any:
    """Kronecker product of mpmath matrices."""
    return mp.matrix(np.kron(*(np.array(matrix.tolist()) for matrix in (a, b))).tolist())


def denoised(data: GaussianMixture, u: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """E[x_0 | x_0 + σ n = u], by dense matrices; ``(B, D)`` for levels ``(B,)``."""
    C, w = data.covariances, data.weights
    total = C + sigma.double().reshape(-1, 1, 1, 1).square() * torch.eye(data.dimension).double()
    off = u.double().unsqueeze(1) - data.means
    log_weights = w.log() + MultivariateNormal(torch.zeros_like(off), total).log_prob(off)
    each = data.means + (C @ torch.linalg.solve(total, off.unsqueeze(-1)))[..., 0]
    return (log_weights.softmax(1).unsqueeze(-1) * each).sum(1).to(u.dtype)


def wide_mixture() -> tuple[GaussianMixture, Observation]:
    """Five overlapping components in eight dimensions, three numbers observed."""
    g = torch.Generator().manual_seed(11)
    root = torch.randn(5, 8, 8, generator=g, dtype=torch.float64) / 8
    covariances = root @ root.mT + 0.05 * torch.eye(8)
    means = torch.randn(5, 8, generator=g, dtype=torch.float64)
    A = torch.randn(3, 8, generator=g, dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0])
    y = A @ means[1] + 0.1 * torch.randn(3, generator=g, dtype=torch.float64)
    return GaussianMixture(weights, means, covariances), Observation.matrix(A, y, 0.1)


def guided_prediction(
    data: GaussianMixture, seen: Observation, kernel: Any, z: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cov[x_0 | û], E[x_0 | û, y], its moment matching, and log N(y; A D, A V Aᵀ + s²I).

    By û = ψᵀΣ⁻¹z / ψᵀΣ⁻¹ψ and Bayes' rule for each component; states (B, k, D).
    """
    psi, precision = kernel.mean[:, 0], torch.linalg.inv(kernel.covariance)
    q = psi @ precision @ psi
    u = torch.einsum("k,bkd->bd", precision @ psi / q, z)
    A, y, eye = seen.dense((data.dimension,)), seen.y.double(), torch.eye(data.dimension).double()
    noise = seen.noise_std**2 * torch.eye(len(A)).double()
    normal, w, m, C = MultivariateNormal, data.weights, data.means, data.covariances
    S, u = C + eye / q, u[:, None]
    gain = C @ torch.linalg.inv(S)
    E, V = m + torch.einsum("nij,bnj->bni", gain, u - m), (gain + gain.mT) / (2 * q)
    R = A @ V @ A.T + noise
    pull = torch.linalg.solve(R, A @ V)
    exact = E + torch.einsum("bnr,nrd->bnd", y - E @ A.T, pull)
    logs = w.log() + normal(m, S).log_prob(u)
    rho, rho_y = logs.softmax(1), (logs + normal(E @ A.T, R).log_prob(y)).softmax(1)
    D = torch.einsum("bn,bnd->bd", rho, E)
    second = torch.einsum("bn,bni,bnj->bij", rho, E, E) + torch.einsum("bn,nij->bij", rho, V)
    V = second - D[:, :, None] * D[:, None]
    R = A @ V @ A.T + noise
    weight = torch.linalg.solve(R, (y - D @ A.T).unsqueeze(-1))
    matched = D + (V @ A.T @ weight).squeeze(-1)
    log_likelihood = normal(D @ A.T, (R + R.mT) / 2).log_prob(y)
    return V, torch.einsum("bn,bnd->bd", rho_y, exact), matched, log_likelihood
