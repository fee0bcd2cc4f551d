"""Exact answers that are sampled once on a problem and shared by all solvers."""

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

__all__ = ["FlowCase", "PathCase"]

_NODES = 6  # of a quadrature over a cell


class FlowCase:
    """Start states of a problem and where the probability flow takes them.

    With Gaussian data the flow is known; for mixtures the reference is scipy's method of order 8 at
    a tolerance of 1e-13.

    Parameters
    ----------
    problem
        The problem.
    samples
        Number of states.
    generator
        Where they come from.

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
    ends = torch.tensor([problem.start, problem.end], dtype=torch.float64)
    return GaussianReference(problem, ends).flow(start, problem.start, problem.end)


def _numerical_flow(problem: Problem, start: Tensor) -> Tensor:
    from scipy.integrate import solve_ivp  # slow to import, and seldom wanted

    def slope(x: float, flat: Any) -> Any:
        # In log t the flow near the data is as smooth as elsewhere.
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
    """Brownian paths over a grid with what a solver sees of them, and the exact ends.

    Of each cell are drawn jointly the increment of w, its integral over time, the integral that the
    process makes of it and, with Gaussian data of one dimension, where the reverse SDE is linear,
    what noise adds to its solution. Moments are those of `GaussianReference`; transitions within a
    cell are the package's, which are checked by themselves.

    Parameters
    ----------
    problem
        The problem.
    times
        Decreasing grid, the finest to be solved on.
    samples
        Number of paths.
    generator
        Where they come from.

    Attributes
    ----------
    start
        States ``(samples, k, D)`` at the start of the paths.
    end
        States where they end; None unless the data are Gaussian of one dimension.
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
        eye = torch.eye(m, dtype=torch.float64).expand(cells, _NODES, m, m)
        forth = sde.transition_matrix(nodes, t.unsqueeze(1).expand(-1, _NODES))
        # The time integral in units of the cell, so that all rows are of one size.
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
            xi = torch.randn(size, dtype=torch.float64, generator=generator)
            drawn = apply_blocks(roots[i], xi)
            self._increments.append(drawn[:, :m].clone())
            self._time_integrals.append(length[i] * drawn[:, m : 2 * m])
            self._integrals.append(drawn[:, 2 * m : 2 * m + k].clone())
            if exact is not None:
                z = exact.step(i, z) + drawn[:, 2 * m + k :]
        if exact is not None:
            self.end = z

    def draws(self, noise: PathNoise, every: int) -> list[Tensor]:
        """The normals of a solver that steps over so many cells at a time."""
        draws = []
        for i, first in enumerate(range(0, len(self._increments), every)):
            cells = range(first, first + every)
            increment = torch.stack([self._increments[cell] for cell in cells]).sum(0)
            draw = torch.zeros(
                len(increment), noise.integral.shape[1], increment.shape[2], dtype=torch.float64
            )
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
                    # What has come so far goes on for the rest of the step.
                    rest = self.times[cell + 1] - end
                    total = total + self._time_integrals[cell] + rest * self._increments[cell]
                draw = draw + apply_blocks(noise.time_integral[i], total)
            draws.append(draw)
        return draws


class _ExactSteps:
    """The reverse SDE with Gaussian data: Φ_1(u, τ) = Σ_u Ψ(τ, u)ᵀ Σ_τ⁻¹ and its means."""

    def __init__(self, problem: Problem, times: Tensor, nodes: Tensor) -> None:
        self._sde = problem.sde
        self._reference = GaussianReference(problem, torch.cat([times, nodes.flatten()]))
        self._times = times
        t, u = times[:-1], times[1:]
        self.back = self._reverse(u.unsqueeze(1), nodes)
        self._move = self._reverse(u, t)

    def step(self, i: int, z: Tensor) -> Tensor:
        """Without the noise."""
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
