"""Exact flows and paths of a problem, sampled once and shared by all solvers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.covariance import joint_root
from cldsde.linear.schedule import gauss_legendre
from cldsde.solvers.authoring import PathNoise

from .plain import Array
from .problems import Problem
from .reference import GaussianReference, dop853

_NODES = 6  # quadrature nodes per cell


class FlowCase:
    """Start states ``(samples, k, D)`` and the exact end states of the probability flow.

    For Gaussian data the flow is known. For mixtures the reference is scipy's method of order 8 at
    a tolerance of 1e-13. ``accuracy`` bounds the error of the end states.
    """

    def __init__(self, problem: Problem, samples: int, generator: torch.Generator) -> None:
        self.start = problem.sample(samples, generator)
        if problem.exact:
            ends = torch.tensor([problem.start, problem.end], dtype=torch.float64, device="cpu")
            reference = GaussianReference(problem, ends)
            self.end = reference.flow(self.start, problem.start, problem.end)
            self.accuracy = 1e-13
        else:
            self.end = _numerical_flow(problem, self.start)
            self.accuracy = 1e-12


def _numerical_flow(problem: Problem, start: Tensor) -> Tensor:
    def slope(x: float, state: Array) -> Array:
        # As a function of log t, the flow near the data is as smooth as at other times.
        t = min(max(math.exp(x), problem.end), problem.start)
        flow: Array = problem.process.probability_flow(torch.from_numpy(state.copy()), t).numpy()
        return t * flow

    ends = math.log(problem.start), math.log(problem.end)
    return torch.from_numpy(dop853(slope, *ends, start.numpy(), atol=1e-13))


class PathCase:
    """Brownian paths over a grid, with the functionals that solvers use and the exact end states.

    For each cell these are drawn jointly:

    - the increment of w, and its integral over time;
    - the stochastic integral of the process;
    - for Gaussian data of one dimension, the noise in the solution of the linear reverse SDE.

    Moments come from `GaussianReference`. Transitions within a cell come from the package, whose
    kernels are checked separately. ``times`` is the finest grid to be solved on. ``start`` are the
    states ``(samples, k, D)`` at its start. ``end`` are the exact end states; None unless the data
    are Gaussian of one dimension.
    """

    def __init__(
        self, problem: Problem, times: Tensor, samples: int, generator: torch.Generator
    ) -> None:
        sde = problem.sde
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
        if problem.exact:
            means, moves, back = _exact_steps(problem, times, nodes)
            parts.append(back @ G)
        columns = (length.unsqueeze(1) * w).sqrt()[..., None, None] * torch.cat(parts, dim=-2)
        roots = joint_root(columns.movedim(1, 2).flatten(2))
        self._psi = sde.transition_matrix(u, t)
        # For each cell the increment, its integral over time, and the stochastic integral.
        self._cells: list[tuple[Tensor, Tensor, Tensor]] = []
        rows, z = [part.shape[-2] for part in parts], self.start
        size = (samples, sum(rows), problem.dimension)
        for i in range(cells):
            xi = torch.randn(size, dtype=torch.float64, generator=generator, device="cpu")
            drawn = torch.split(apply_blocks(roots[i], xi), rows, dim=1)
            self._cells.append((drawn[0].clone(), length[i] * drawn[1], drawn[2].clone()))
            if problem.exact:
                z = means[i + 1] + apply_blocks(moves[i], z - means[i]) + drawn[3]
        if problem.exact:
            self.end = z

    def draws(self, noise: PathNoise, every: int) -> list[Tensor]:
        """Normals of a solver whose steps span the given number of cells."""
        draws = []
        for i, first in enumerate(range(0, len(self._cells), every)):
            increments, time_integrals, integrals = zip(
                *self._cells[first : first + every], strict=True
            )
            increment = torch.stack(increments).sum(0)
            rows = noise.integral.shape[1]
            draw = increment.new_zeros(len(increment), rows, increment.shape[2])
            if noise.increment.shape[-1]:
                draw = draw + apply_blocks(noise.increment[i], increment)
            if bool(noise.integral.any()):
                integral = torch.zeros_like(integrals[0])
                for cell in reversed(range(every)):
                    integral = apply_blocks(self._psi[first + cell], integral) + integrals[cell]
                draw = draw + apply_blocks(noise.integral[i], integral)
            if noise.time_integral is not None:
                total = torch.zeros_like(increment)
                for cell in range(every):
                    # The path's value at the end of the cell counts for the rest of the step.
                    rest = self.times[first + cell + 1] - self.times[first + every]
                    total = total + time_integrals[cell] + rest * increments[cell]
                draw = draw + apply_blocks(noise.time_integral[i], total)
            draws.append(draw)
        return draws


def _exact_steps(problem: Problem, times: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exact reverse SDE for Gaussian data: its means, and Φ_1(u, τ) = Σ_u Ψ(τ, u)ᵀ Σ_τ⁻¹.

    Φ_1 is given from start to end of each cell, and from its nodes to its end.
    """
    reference = GaussianReference(problem, times)
    means, covariances = map(torch.stack, zip(*map(reference.moments, times.tolist()), strict=True))
    after = covariances[1:].unsqueeze(1)
    before = torch.cat([times[:-1].unsqueeze(1), nodes], dim=1)
    kernel = problem.sde.transition(times[1:].unsqueeze(1).expand(before.shape), before)
    psi = kernel.mean
    moves = after @ psi.mT @ torch.linalg.inv(psi @ after @ psi.mT + kernel.covariance)
    return means, moves[:, 0], moves[:, 1:]
