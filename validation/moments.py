"""Exact moments of a solver: no Monte Carlo.

With Gaussian data the score is affine, so one step of a solver is an affine map of the state and
its noise, z' = b + X z + N ξ. Its matrices are *probed* by feeding basis vectors, and mean and
covariance are carried through the grid exactly:

    m ← X m + b,      C ← X C Xᵀ + N Nᵀ.

The difference to the true marginal is the solver's weak error, to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cldsde.score import ReverseProcess, TabulatedScore
from cldsde.solvers import NoiseSource, Solver
from cldsde.solvers.driver import check_arguments, checked_grid

__all__ = ["propagate_moments"]


class _CountingNoise(NoiseSource):
    """Zeros; remembers how many rows each draw asked for."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def normal(self, z: Tensor, rows: int) -> Tensor:
        self.rows.append(rows)
        return z.new_zeros(len(z), rows, *z.shape[2:])


class _BasisNoise(NoiseSource):
    """Unit vectors of the step's whole noise for the last samples but one, then twice their sum.

    Samples before have zeros.
    """

    def __init__(self, rows: list[int], dimension: int) -> None:
        size = sum(rows) * dimension
        basis = torch.cat([torch.eye(size), torch.full((1, size), 2.0)]).to(torch.float64)
        parts = torch.split(basis.reshape(len(basis), sum(rows), dimension), rows, dim=1)
        self._draws = iter(parts)

    def normal(self, z: Tensor, rows: int) -> Tensor:
        draw = next(self._draws, None)
        if draw is None or draw.shape[1] != rows:
            msg = "solver: the noise that its step draws depends on the state"
            raise ValueError(msg)
        return torch.cat([draw.new_zeros(len(z) - len(draw), *draw.shape[1:]), draw])


@torch.no_grad()
def propagate_moments(
    process: ReverseProcess, solver: Solver, times: Tensor, mean: Tensor, covariance: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the state that a solver produces, where the score is affine.

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
    ValueError
        If the shapes of the moments do not fit, the grid does not decrease, or the score or the
        solver's step is not affine.
    """
    check_arguments(process, solver)
    if not isinstance(solver, Solver):
        msg = f"solver must work on a fixed grid; {type(solver).__name__} chooses its own times"
        raise TypeError(msg)
    grid = checked_grid(times, process.sde.T)
    k, dimension = mean.shape if mean.ndim == 2 else (0, 0)
    size = k * dimension
    if k != process.sde.components or covariance.shape != (size, size):
        msg = (
            f"mean must be ({process.sde.components}, D) and covariance (kD, kD); "
            f"got {tuple(mean.shape)} and {tuple(covariance.shape)}"
        )
        raise ValueError(msg)
    tables = solver.prepare(process, grid)
    asked = solver.evaluation_times(process, grid)
    m, C = mean.to(torch.float64).flatten(), covariance.to(torch.float64)
    if isinstance(process.score, TabulatedScore):
        score = process.score.tabulate(asked, m)
    else:

        def score(z: Tensor, i: int) -> Tensor:
            return process.score(z, asked[i].expand(len(z)))

    rows = [k]  # of the state, and of the tensors that the solver hands to its next step
    for i in range(len(grid) - 1):
        count = _CountingNoise()
        size = sum(rows) * dimension
        # Origin, unit vectors, and a point that an affine map takes to their combination.
        states = torch.cat([torch.zeros(1, size), torch.eye(size), torch.full((1, size), 2.0)])
        origin = torch.split(states[:1].to(m).reshape(1, -1, dimension), rows, dim=1)
        alone, remembered = solver.step(origin[0], origin[1:], tables, i, score, count)
        draws = sum(count.rows) * dimension
        probes = torch.cat([states, torch.zeros(draws + 1, size)]).to(m)
        z, *memory = torch.split(probes.reshape(-1, sum(rows), dimension), rows, dim=1)
        noise = _BasisNoise(count.rows, dimension)
        z, kept = solver.step(z, tuple(memory), tables, i, score, noise)
        rows = [tensor.shape[1] for tensor in (z, *kept)]
        out = torch.cat([z, *kept], dim=1).flatten(1)
        b, X, N = out[0], (out[1 : 1 + size] - out[0]).T, (out[2 + size : -1] - out[0]).T
        rest = float((out[1 + size] - b - 2 * X.sum(1)).abs().max())
        # Where a step goes by means over a batch, as a corrector's may, it is another one alone.
        single = torch.cat([alone, *remembered], dim=1).flatten()
        bent = float(torch.stack([out[-1] - b - 2 * N.sum(1), b - single]).abs().max())
        # Where the step is not finite the moments will not be, either. Rounding is 1e-15 of the
        # largest number times the stages of a step; a score that bends is off by parts of it.
        if rest > 1e-9 * float(out.abs().max()):
            msg = (
                f"process: its score is not affine in the state at step {i}, so the solver's step "
                "is not; take Gaussian data"
            )
            raise ValueError(msg)
        if bent > 1e-9 * float(out.abs().max()):
            msg = f"solver: its step is not affine in its noise at step {i}; sample its law instead"
            raise ValueError(msg)
        m = b + X @ m
        C = X @ C @ X.T + N @ N.T
    size = k * dimension
    return m[:size].reshape(k, dimension), C[:size, :size]
