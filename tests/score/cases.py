"""Processes, mixtures and states that the tests of scores share."""

from __future__ import annotations

from typing import Any

import mpmath as mp
import numpy as np
import torch
from torch import nn

from cldsde import CLD, HOLD, PSLD, VESDE, VPSDE, GaussianMixture, LinearSDE, SubVPSDE
from cldsde.score.times import KnownTimes, PlannedTime
from probes import generator
from references.kernels import Matrix, matrix
from references.mixtures import MIXTURE_DIGITS
from tolerances import rounding

THREE = [[0.0, 0.0, 0.0], [0.0, 0.04, 0.02], [0.0, 0.02, 0.1]]
FAMILIES: dict[str, LinearSDE] = {
    "VP": VPSDE(),
    "sub-VP": SubVPSDE(),
    "VE": VESDE(0.05, 20.0),
    "CLD": CLD(),
    "CLD, underdamped": CLD(friction=0.5),
    "CLD, overdamped": CLD(friction=2.0, beta=(0.5, 8.0)),
    "CLD, position noise": CLD(position_noise=0.3),
    "PSLD": PSLD(),
    "HOLD": HOLD(),
}
# Driven components that are not the last ones.
REORDERED: dict[str, LinearSDE] = {
    "middle of three driven": LinearSDE.from_matrices(
        [[0.0, 1.0, 0.0], [-1.0, -2.0, 0.0], [0.0, 1.0, -1.0]], [[0.0], [2.0], [0.0]], 4.0
    ),
    # Moved to the end by a cycle, which is not its own inverse.
    "first two of three driven": LinearSDE.from_matrices(
        [[-1.0, 1.0, 0.0], [-1.0, -2.0, 1.0], [0.0, -1.0, -1.0]],
        [[1.0, 0.0], [0.5, 2.0], [0.0, 0.0]],
        2.0,
        initial_covariance=THREE,
    ),
    "first and last driven": LinearSDE.from_matrices(
        [[-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0], [0.0, -1.0, -2.0]],
        [[1.0, 0.5], [0.0, 0.0], [0.5, 2.0]],
        2.0,
        initial_covariance=THREE,
    ),
}
# Its driven score does not determine the data at some times.
UNDERDAMPED = LinearSDE.from_matrices(
    [[0, 4.0], [-4.0, -1.0]], [[0.0], [2**0.5]], 5.0, initial_covariance=[[0, 0], [0, 0.04]]
)
PROCESSES = {**FAMILIES, **REORDERED}
COMMON = {name: FAMILIES[name] for name in ("VP", "VE", "CLD", "PSLD", "HOLD")}

# Two modes and three in the plane, and three on the line.
TWO = GaussianMixture(
    [0.3, 0.7], [[-1.0, 0.5], [1.0, 0.0]], [[[0.3, 0.1], [0.1, 0.2]], [[0.25, 0.0], [0.0, 0.5]]]
)
MODES = GaussianMixture(
    [0.3, 0.3, 0.4], [[-1.0, 0.2], [0.8, 0.8], [0.4, -1.0]], [[[0.04, 0.0], [0.0, 0.09]]] * 3
)
LINE = GaussianMixture([0.5, 0.2, 0.3], [[-1.0], [0.2], [1.2]], [[[0.35**2]]] * 3)


def mixture(kind: str = "regular") -> GaussianMixture:
    """Three components in the plane; "degenerate": a point, a line and a regular one."""
    rng = np.random.default_rng(7)
    means = rng.standard_normal((3, 2))
    roots = 0.5 * rng.standard_normal((3, 2, 2))
    if kind == "degenerate":
        roots[0] = 0.0
        roots[1, :, 1] = 0.0
    if kind == "points":
        roots[:] = 0.0
    return GaussianMixture([0.2, 0.5, 1.3], means.tolist(), (roots @ roots.mT).tolist())


def states(sde: LinearSDE, data: GaussianMixture, t: Any, n: int = 4) -> torch.Tensor:
    """States ``(n, k, D)`` of the marginal, float64."""
    g = generator()
    x = data.sample(n, generator=g, dtype=torch.float64)
    return sde.perturb(x, t, generator=g)[0]


def inverted(kernel: Any) -> tuple[Matrix, Matrix, Matrix]:
    """psi, Sigma^-1 and Sigma^-1 psi of a kernel's numbers, in 50 digits."""
    with mp.workdps(MIXTURE_DIGITS):
        root, psi = matrix(kernel.root), matrix(kernel.mean)[:, 0]
        precision = mp.inverse(root * root.T)
        return psi, precision, precision * psi


def condition(root: torch.Tensor) -> float:
    """Condition number of a root, its rows scaled to unit size: scaling rows is exact."""
    return float(torch.linalg.cond(root / root.norm(dim=-1, keepdim=True)).max())


def score_rounding(sde: LinearSDE, t: Any, size: float = 4.0) -> float:
    """Relative error of a score or a density at states of the given size.

    The residual z - psi m is rounded relative to its terms, not to itself, which is as short as a
    row of the root; the triangular solves lose the condition number of the root.
    """
    root = sde.marginal(t).root
    return rounding(32, condition(root) + size / float(root.norm(dim=-1).min()))


def known(*times: float) -> KnownTimes:
    """Times as solvers know them before they evaluate the score."""
    return KnownTimes(torch.tensor(times, dtype=torch.float64))


def called(score: Any, z: Any, at: PlannedTime, **options: Any) -> Any:
    """The score at a planned time, as solvers call it."""
    return score(z, at.argument, planned=at, **options)


def normal_denoiser(u: torch.Tensor, sigma: Any, variance: torch.Tensor) -> torch.Tensor:
    """E[x_0 | x_0 + σ n = u] of normal data, with one variance or one for each sample."""
    variance, sigma = (x.reshape(-1, *(1,) * (u.ndim - 1)) for x in (variance, sigma))
    return u * variance / (variance + sigma**2)


class Counting:
    """`normal_denoiser`, which counts its calls and their samples."""

    def __init__(self) -> None:
        self.calls = self.samples = 0

    def __call__(self, u: torch.Tensor, sigma: Any, variance: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.samples += len(u)
        return normal_denoiser(u, sigma, variance)


class Constant(nn.Module):
    """A network (state, clock) -> ``value`` in the shape of the driven components."""

    def __init__(self, sde: LinearSDE, value: float = 0.0) -> None:
        super().__init__()
        self.components, self.driven, self.value = sde.components, len(sde.driven), value

    def forward(self, z: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        assert clock.shape == (len(z),)
        channels = z.shape[1] // self.components * self.driven
        return z.new_full((len(z), channels, *z.shape[2:]), self.value)
