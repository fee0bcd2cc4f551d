"""Exact moments of a solver's samples, without Monte Carlo.

With Gaussian data the score is affine. A solve is then an affine map of its start and its noise,
z' = b + X z + N ξ. Solving from basis vectors *probes* its matrices. Mean and covariance follow
exactly:

    m' = X m + b,      C' = X C Xᵀ + N Nᵀ.

The difference from the true marginal is the solver's weak error, up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cldsde.score import ReverseProcess
from cldsde.solvers import NoiseSource, plan
from cldsde.solvers.authoring import Solver


class _BasisNoise(NoiseSource):
    """Noise source of unit vectors, to probe a solve; it records the number of rows of each draw.

    The first samples get zeros. Each of the next samples gets one unit vector of a solve's noise.
    The last sample gets twice the sum of all unit vectors. If ``first`` is the number of samples,
    all draws are zeros.
    """

    def __init__(self, first: int) -> None:
        self.rows: list[int] = []
        self._first = first

    def normal(self, z: Tensor, rows: int) -> Tensor:
        self.rows.append(rows)
        numbers = rows * z.shape[2]
        draw = z.new_zeros(len(z), numbers)
        if self._first < len(z):
            draw[self._first : self._first + numbers].fill_diagonal_(1.0)
            draw[-1] = 2.0
            self._first += numbers
        return draw.view(len(z), rows, -1)


def check_repeated(found: Tensor, again: Tensor) -> None:
    """Raise a ValueError unless two solves of one state and noise agree, or diverged."""
    if not torch.equal(found, again) and bool(found.isfinite().all()):
        raise ValueError(
            "the same state and noise gave two different results; does the solver draw noise "
            "outside `noise.normal`?"
        )


@torch.no_grad()
def propagate_moments(
    process: ReverseProcess, solver: Solver, times: Tensor, mean: Tensor, covariance: Tensor
) -> tuple[Tensor, Tensor]:
    """Exact mean and covariance of a solver's final state, for an affine score.

    Raises a ValueError if the shapes of the moments do not fit, the grid does not decrease, or the
    score or the solver's step is not affine.

    Parameters
    ----------
    process
        A reverse process whose score is affine in the state: Gaussian data.
    solver
        A solver on a fixed grid; TypeError if it is adaptive.
    times
        Decreasing grid ``(n + 1,)``.
    mean, covariance
        Mean ``(k, D)`` and covariance ``(kD, kD)`` of the (flattened) state at ``times[0]``.

    Returns
    -------
    mean, covariance : tuple of Tensor
        Moments at ``times[-1]``, float64, ``(k, D)`` and ``(kD, kD)``.
    """
    sampler = plan(process, solver, times)
    if sampler.nfev is None:
        raise TypeError(f"solver must work on a fixed grid; {type(solver).__name__} is adaptive")
    k, dimension = mean.shape if mean.ndim == 2 else (0, 0)
    size = k * dimension
    if k != process.sde.components or covariance.shape != (size, size):
        raise ValueError(
            f"mean must be ({process.sde.components}, D) and covariance (kD, kD); "
            f"got {tuple(mean.shape)} and {tuple(covariance.shape)}"
        )

    def end(start: Tensor, noise: NoiseSource) -> Tensor:
        # Do not warn: if a solve diverges, the moments are not finite.
        states = start.reshape(-1, k, dimension)
        return sampler.solve(states, noise=noise, warn=False).state.flatten(1)

    m, C = mean.to(torch.float64).flatten(), covariance.to(torch.float64)
    origin, zeros = m.new_zeros(1, size), _BasisNoise(1)
    alone, again = end(origin, zeros), end(origin, _BasisNoise(1))
    check_repeated(alone, again)
    # Start from the origin, unit vectors, and twice their sum, which tests that the map is affine.
    states = torch.cat([origin, torch.eye(size, device="cpu").to(m), m.new_full((1, size), 2.0)])
    padding = m.new_zeros(sum(zeros.rows) * dimension + 1, size)
    units = _BasisNoise(len(states))
    out = end(torch.cat([states, padding]), units)
    if units.rows != zeros.rows:
        raise ValueError(
            "solver must draw the same noise for every state; got another number of rows. "
            "Sample its distribution instead"
        )
    b, X, N = out[0], (out[1 : 1 + size] - out[0]).T, (out[2 + size : -1] - out[0]).T
    state_error = float((out[1 + size] - b - 2 * X.sum(1)).abs().max())
    noise_error = float((out[-1] - b - 2 * N.sum(1)).abs().max())
    # NaN passes, because the moments are then NaN, too. The rounding error is 1e-15 of the largest
    # number times the steps. A score that is not affine causes errors of the size of that number.
    allowed = 1e-9 * float(out.abs().max())
    # A step that uses means over a batch, as a corrector's may, changes with the batch.
    batch_error = float((b - alone).abs().max())
    if noise_error > allowed or batch_error > allowed:
        error = max(noise_error, batch_error) / float(out.abs().max())
        raise ValueError(
            f"solver must have steps that are affine in their noise; got a relative error of "
            f"{error:.1g}. Sample its distribution instead"
        )
    if state_error > allowed:
        raise ValueError(
            "process must have a score that is affine in the state; got a relative error of "
            f"{state_error / float(out.abs().max()):.1g}. Use Gaussian data"
        )
    m, C = b + X @ m, X @ C @ X.T + N @ N.T
    return m.reshape(k, dimension), C
