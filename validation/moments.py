"""Exact moments of a solver: no Monte Carlo.

With Gaussian data the score is affine, so a solve is an affine map of its start and its noise,
z' = b + X z + N ξ. Its matrices are *probed* by solving from basis vectors, and mean and covariance
follow exactly:

    m' = X m + b,      C' = X C Xᵀ + N Nᵀ.

The difference to the true marginal is the solver's weak error, to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cldsde.score import ReverseProcess
from cldsde.solvers import NoiseSource, plan
from cldsde.solvers.authoring import Solver

__all__ = ["propagate_moments"]


class _CountingNoise(NoiseSource):
    """Zeros; remembers how many rows each draw asked for."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def normal(self, z: Tensor, rows: int) -> Tensor:
        self.rows.append(rows)
        return z.new_zeros(len(z), rows, *z.shape[2:])


class _BasisNoise(NoiseSource):
    """Zeros for the first samples, a unit vector of a solve's noise for each of the next.

    The last sample has twice the sum of all unit vectors.
    """

    def __init__(self, rows: list[int], first: int) -> None:
        self._rows, self._first = iter(rows), first

    def normal(self, z: Tensor, rows: int) -> Tensor:
        if next(self._rows, None) != rows:
            msg = "solver: the noise that its steps draw depends on the state"
            raise ValueError(msg)
        numbers = rows * z.shape[2]
        draw = z.new_zeros(len(z), numbers)
        draw[self._first : self._first + numbers].fill_diagonal_(1.0)
        draw[-1] = 2.0
        self._first += numbers
        return draw.view(len(z), rows, -1)


@torch.no_grad()
def propagate_moments(
    process: ReverseProcess, solver: Solver, times: Tensor, mean: Tensor, covariance: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the state that a solver produces, if the score is affine.

    Parameters
    ----------
    process
        A reverse process whose score is affine in the state: Gaussian data.
    solver
        A solver on a fixed grid.
    times
        Decreasing grid ``(n + 1,)``.
    mean
        Mean of the state at ``times[0]``, ``(k, D)``.
    covariance
        Covariance of the flattened state at ``times[0]``, ``(kD, kD)``.

    Returns
    -------
    mean, covariance : tuple of Tensor
        At ``times[-1]``, float64, ``(k, D)`` and ``(kD, kD)``.

    Raises
    ------
    TypeError
        If the solver chooses its times.
    ValueError
        If the shapes of the moments do not fit, the grid does not decrease, or the score or the
        solver's step is not affine.
    """
    sampler = plan(process, solver, times)
    if sampler.nfev is None:
        msg = f"solver must work on a fixed grid; {type(solver).__name__} chooses its own times"
        raise TypeError(msg)
    k, dimension = mean.shape if mean.ndim == 2 else (0, 0)
    size = k * dimension
    if k != process.sde.components or covariance.shape != (size, size):
        msg = (
            f"mean must be ({process.sde.components}, D) and covariance (kD, kD); "
            f"got {tuple(mean.shape)} and {tuple(covariance.shape)}"
        )
        raise ValueError(msg)

    def end(start: Tensor, noise: NoiseSource) -> Tensor:
        # If a solve diverges, the moments are not finite.
        states = start.reshape(-1, k, dimension)
        return sampler.solve(states, noise=noise, warn=False).state.flatten(1)

    m, C = mean.to(torch.float64).flatten(), covariance.to(torch.float64)
    origin, zeros = m.new_zeros(1, size), _CountingNoise()
    alone, again = end(origin, zeros), end(origin, _CountingNoise())
    if not torch.equal(alone, again) and bool(alone.isfinite().all()):
        msg = (
            "solver: the same state and noise gave two different results; does the solver draw "
            "noise outside `noise.normal`?"
        )
        raise ValueError(msg)
    # The origin, unit vectors, and a point that an affine map takes to their combination.
    states = torch.cat([origin, torch.eye(size).to(m), m.new_full((1, size), 2.0)])
    padding = m.new_zeros(sum(zeros.rows) * dimension + 1, size)
    out = end(torch.cat([states, padding]), _BasisNoise(zeros.rows, len(states)))
    b, X, N = out[0], (out[1 : 1 + size] - out[0]).T, (out[2 + size : -1] - out[0]).T
    rest = float((out[1 + size] - b - 2 * X.sum(1)).abs().max())
    bent = float((out[-1] - b - 2 * N.sum(1)).abs().max())
    # NaN passes: if a solve is not finite, neither are the moments. Rounding is 1e-15 of the
    # largest number times the steps; a score that is not affine is off by parts of that number.
    allowed = 1e-9 * float(out.abs().max())
    # A step that uses means over a batch, as a corrector's may, is another one alone.
    if bent > allowed or float((b - alone).abs().max()) > allowed:
        msg = "solver: its steps are not affine in their noise; sample its distribution instead"
        raise ValueError(msg)
    if rest > allowed:
        msg = (
            "process: its score is not affine in the state, so the solver's steps are not; take "
            "Gaussian data"
        )
        raise ValueError(msg)
    m, C = b + X @ m, X @ C @ X.T + N @ N.T
    return m.reshape(k, dimension), C
