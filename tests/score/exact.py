"""Dense references in high precision: the kD-dimensional law of a state that started as a mixture.

A state (k, *D) is flattened row by row, component c and direction d at c D + d. Given component i
of the mixture it is normal with mean psi (x) m_i and covariance Sigma_t (x) I + psi psi^T (x) C_i,
psi = Psi(t, 0) e_0. Kernels are taken from the process, rounded as they are, and used as exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mpmath as mp
import numpy as np
import torch
from torch import nn

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, GaussianMixture, LinearSDE, SubVPSDE
from cldsde.score.times import KnownTimes

DIGITS = 50
EPS = torch.finfo(torch.float64).eps

FAMILIES: dict[str, Callable[[], LinearSDE]] = {
    "VP": VPSDE,
    "sub-VP": SubVPSDE,
    "VE": lambda: VESDE(0.05, 20.0),
    "CLD": CLD,
    "CLD, underdamped": lambda: CLD(friction=0.5),
    "CLD, overdamped": lambda: CLD(friction=2.0, beta=(0.5, 8.0)),
    "CLD, position noise": lambda: CLD(position_noise=0.3),
    "PSLD": PSLD,
    "HOLD": HOLD,
}


def mixture(kind: str = "regular") -> GaussianMixture:
    """Three components in the plane; "degenerate": a point, a line, and a regular one."""
    rng = np.random.default_rng(7)
    means = rng.standard_normal((3, 2))
    roots = 0.5 * rng.standard_normal((3, 2, 2))
    if kind == "degenerate":
        roots[0] = 0.0
        roots[1, :, 1] = 0.0
    if kind == "points":
        roots[:] = 0.0
    return GaussianMixture([0.2, 0.5, 1.3], means.tolist(), (roots @ roots.mT).tolist())


class _Component(NamedTuple):
    log_weight: Any
    residual: Any  # z - psi (x) m
    solved: Any  # S^-1 residual
    log_density: Any
    gain: Any  # C psi^T, D x kD
    mean: Any


class Dense(NamedTuple):
    """Exact values at one state."""

    log_prob: float
    score: torch.Tensor  # (k, D), all rows
    posterior_mean: torch.Tensor  # (D,)


def dense(sde: LinearSDE, data: GaussianMixture, z: torch.Tensor, t: float) -> Dense:
    """Log-density, full score and E[x_0 | z_t = z] at one state ``(k, D)``."""
    k, dimension = sde.components, data.dimension
    kernel = sde.marginal(t)
    with mp.workdps(DIGITS):
        root = mp.matrix(kernel.root.tolist())
        sigma, psi = root * root.T, mp.matrix(kernel.mean[:, 0].tolist())
        state = mp.matrix(z.double().flatten().tolist())
        parts = []
        for weight, mean, covariance in zip(
            data.weights.tolist(), data.means.tolist(), data.covariances.tolist(), strict=True
        ):
            S = mp.matrix(k * dimension)
            gain = mp.matrix(dimension, k * dimension)
            residual = state.copy()
            for a in range(k):
                for i in range(dimension):
                    row = a * dimension + i
                    residual[row] -= psi[a] * mean[i]
                    for j in range(dimension):
                        gain[j, row] = mp.mpf(covariance[j][i]) * psi[a]
                        for b in range(k):
                            S[row, b * dimension + j] = psi[a] * psi[b] * covariance[i][j]
                            if i == j:
                                S[row, b * dimension + j] += sigma[a, b]
            factor = mp.cholesky(S)
            solved = mp.cholesky_solve(S, residual)
            log_det = 2 * sum(mp.log(factor[i, i]) for i in range(k * dimension))
            quadratic = (residual.T * solved)[0]
            log_density = -(quadratic + log_det + k * dimension * mp.log(2 * mp.pi)) / 2
            parts.append(
                _Component(mp.log(weight), residual, solved, log_density, gain, mp.matrix(mean))
            )
        terms = [mp.exp(part.log_weight + part.log_density) for part in parts]
        total = mp.fsum(terms)
        score, posterior = mp.matrix(k * dimension, 1), mp.matrix(dimension, 1)
        for term, part in zip(terms, parts, strict=True):
            share = term / total
            score -= share * part.solved
            posterior += share * (part.mean + part.gain * part.solved)
        rows = torch.tensor([float(x) for x in score], dtype=torch.float64)
        prediction = torch.tensor([float(x) for x in posterior], dtype=torch.float64)
        return Dense(float(mp.log(total)), rows.reshape(k, dimension), prediction)


def states(
    sde: LinearSDE, data: GaussianMixture, t: Any, n: int = 4, seed: int = 0
) -> torch.Tensor:
    """States ``(n, k, D)`` drawn from p_t, float64."""
    g = torch.Generator().manual_seed(seed)
    x = data.sample(n, generator=g, dtype=torch.float64)
    return sde.perturb(x, t, generator=g)[0]


def rounding(sde: LinearSDE, t: Any, size: float = 4.0) -> float:
    """Relative error of a score or a density at states of the given size, drawn from p_t.

    The residual z - psi m is rounded relative to its terms, not to itself, which is as short as a
    row of the root; the triangular solves lose eps times the condition number of the root, its rows
    scaled to unit size, for scaling rows is exact. 32 covers the number of operations.
    """
    root = sde.marginal(t).root
    rows = torch.linalg.vector_norm(root, dim=-1, keepdim=True)
    condition = float(torch.linalg.cond(root / rows).max())
    return 32 * EPS * (condition + size / float(rows.min()))


def known(*times: float) -> KnownTimes:
    """Times as solvers know them before they evaluate the score."""
    return KnownTimes(torch.tensor(times, dtype=torch.float64))


class Constant(nn.Module):
    """A network (state, clock) -> ``value`` in the shape of the driven components."""

    def __init__(self, sde: LinearSDE, value: float = 0.0) -> None:
        super().__init__()
        self.components, self.driven, self.value = sde.components, len(sde.driven), value

    def forward(self, z: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        assert clock.shape == (len(z),)
        channels = z.shape[1] // self.components * self.driven
        return z.new_full((len(z), channels, *z.shape[2:]), self.value)
