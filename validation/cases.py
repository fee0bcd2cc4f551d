"""Exact flows and paths of a problem, sampled once and shared by all solvers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.covariance import joint_root
from cldsde.linear.schedule import gauss_legendre
from cldsde.solvers.authoring import PathNoise

from .problems import Problem
from .reference import GaussianReference

_NODES = 6  # quadrature nodes per cell


class FlowCase:
    """Start states of a problem and the exact end states of the probability flow.

    For Gaussian data the flow is known. For mixtures the reference is scipy's method of order 8 at
    a tolerance of 1e-13.

    Attributes
    ----------
    start, end
        States ``(samples, k, D)`` at the ends of the flow.
    accuracy
        Bound on the error of ``end``.
    """

    def __init__(self, problem: Problem, samples: int, generator: torch.Generator) -> None:
        self.start = problem.sample(samples, generator)
        flow = _exact_flow if problem.exact else _numerical_flow
        self.end = flow(problem, self.start)
        self.accuracy = 1e-13 if problem.exact else 1e-12


def _exact_flow(problem: Problem, start: Tensor) -> Tensor:
    ends = torch.tensor([problem.start, problem.end], dtype=torch.float64, device="cpu")
    return GaussianReference(problem, ends).flow(start, problem.start, problem.end)


def _numerical_flow(problem: Problem, start: Tensor) -> Tensor:
    from scipy.integrate import solve_ivp  # imported here because it is slow to import

    def slope(x: float, flat: Any) -> Any:
        # As a function of log t, the flow near the data is as smooth as at other times.
        t = min(max(math.exp(x), problem.end), problem.start)
        state = torch.from_numpy(flat.copy()).reshape(start.shape)
        return t * problem.process.probability_flow(state, t).flatten().numpy()

    found = solve_ivp(
        slope,
        (math.log(problem.start), math.log(problem.end)),
        start.flatten().numpy(),
        method="DOP853",
        rtol=1e-13,
        atol=1e-13,
    )
    return torch.from_numpy(found.y[:, -1].copy()).reshape(start.shape)


class PathCase:
    """Brownian paths over a grid, with the functionals that solvers use and the exact end states.

    For each cell these are drawn jointly:

    - the increment of w, and its integral over time;
    - the stochastic integral of the process;
    - for Gaussian data of one dimension, the noise in the solution of the linear reverse SDE.

    Moments come from `GaussianReference`. Transitions within a cell come from the package, whose
    kernels are checked separately.

    Attributes
    ----------
    times
        Decreasing grid, the finest to be solved on.
    start
        States ``(samples, k, D)`` at the start of the paths.
    end
        Exact end states; None unless the data are Gaussian of one dimension.
    """

    def __init__(
        self, problem: Problem, times: Tensor, samples: int, generator: torch.Generator
    ) -> None:
        sde, k = problem.sde, problem.sde.components
        self.times = times
        self.start = problem.sample(samples, generator)
        self.end: Tensor | None = None
        t, u = times[:-1], times[1:]
        x, w = gauss_legendre(_NODES)
        length = t - u
        nodes = u.unsqueeze(1) + length.unsqueeze(1) * x
        G = sde.diffusion(nodes)
        cells, m = len(t), G.shape[-1]
        eye = torch.eye(m, dtype=torch.float64, device="cpu").expand(cells, _NODES, m, m)
        forth = sde.transition_matrix(nodes, t.unsqueeze(1).expand(-1, _NODES))
        # Divide the time integral by the cell's length, so that all rows have similar sizes.
        parts = [eye, x[:, None, None] * eye, forth @ G]
        exact = _ExactSteps(problem, times, nodes) if problem.exact else None
        if exact is not None:
            parts.append(exact.back @ G)
        functional = torch.cat(parts, dim=-2)
        columns = (length.unsqueeze(1) * w).sqrt()[..., None, None] * functional
        roots = joint_root(columns.movedim(1, 2).flatten(2))
        self._psi = sde.transition_matrix(u, t)
        self._increments: list[Tensor] = []
        self._time_integrals: list[Tensor] = []
        self._integrals: list[Tensor] = []
        size, z = (samples, functional.shape[-2], problem.dimension), self.start
        for i in range(cells):
            xi = torch.randn(size, dtype=torch.float64, generator=generator, device="cpu")
            drawn = apply_blocks(roots[i], xi)
            self._increments.append(drawn[:, :m].clone())
            self._time_integrals.append(length[i] * drawn[:, m : 2 * m])
            self._integrals.append(drawn[:, 2 * m : 2 * m + k].clone())
            if exact is not None:
                z = exact.step(i, z) + drawn[:, 2 * m + k :]
        if exact is not None:
            self.end = z

    def draws(self, noise: PathNoise, every: int) -> list[Tensor]:
        """Normals of a solver whose steps span the given number of cells."""
        draws = []
        for i, first in enumerate(range(0, len(self._increments), every)):
            cells = range(first, first + every)
            increment = torch.stack([self._increments[cell] for cell in cells]).sum(0)
            rows = noise.integral.shape[1]
            draw = increment.new_zeros(len(increment), rows, increment.shape[2])
            if noise.increment.shape[-1]:
                draw = draw + apply_blocks(noise.increment[i], increment)
            if bool(noise.integral.any()):
                integral = torch.zeros_like(self._integrals[first])
                for cell in reversed(cells):
                    integral = apply_blocks(self._psi[cell], integral) + self._integrals[cell]
                draw = draw + apply_blocks(noise.integral[i], integral)
            if noise.time_integral is not None:
                end = self.times[first + every]
                total = torch.zeros_like(increment)
                for cell in cells:
                    # The path's value at the end of the cell counts for the rest of the step.
                    rest = self.times[cell + 1] - end
                    total = total + self._time_integrals[cell] + rest * self._increments[cell]
                draw = draw + apply_blocks(noise.time_integral[i], total)
            draws.append(draw)
        return draws


class _ExactSteps:
    """Exact reverse SDE for Gaussian data: Φ_1(u, τ) = Σ_u Ψ(τ, u)ᵀ Σ_τ⁻¹ and its means."""

    def __init__(self, problem: Problem, times: Tensor, nodes: Tensor) -> None:
        self._sde = problem.sde
        self._reference = GaussianReference(problem, torch.cat([times, nodes.flatten()]))
        self._times = times
        t, u = times[:-1], times[1:]
        self.back = self._reverse(u.unsqueeze(1), nodes)
        self._move = self._reverse(u, t)

    def step(self, i: int, z: Tensor) -> Tensor:
        """Exact step without its noise."""
        mean, following = (self._reference.moments(float(s))[0] for s in self._times[i : i + 2])
        return following + apply_blocks(self._move[i], z - mean)

    def _reverse(self, end: Tensor, at: Tensor) -> Tensor:
        psi = self._sde.transition_matrix(end.expand(at.shape), at)
        found: Tensor = self._covariances(end) @ psi.mT @ torch.linalg.inv(self._covariances(at))
        return found

    def _covariances(self, at: Tensor) -> Tensor:
        k = self._sde.components
        found = [self._reference.moments(moment)[1] for moment in at.flatten().tolist()]
        return torch.stack(found).reshape(*at.shape, k, k)
