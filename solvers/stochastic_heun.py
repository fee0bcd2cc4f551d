"""Stochastic Heun's method for the reverse SDE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cldsde.linear.sde import LinearSDE
from cldsde.score import ReverseProcess

from .base import Facts, Memory, PathNoise, ScoreAt, Solver
from .combine import Block, as_blocks, combine
from .noise import NoiseSource

__all__ = ["StochasticHeun"]


class _Tables(NamedTuple):
    """Blocks of the drift h(−F z + GGᵀ s) at both ends of each step, and of its noise."""

    start_state: list[Block]
    start_score: list[Block]
    end_state: list[Block]
    end_score: list[Block]
    noise: list[Block]


@dataclass(frozen=True, kw_only=True)
class StochasticHeun(Solver):
    r"""Stochastic Heun: the drift is averaged over an Euler step's two ends, noise added once.

    .. math::
        \tilde z = z + h\,d(z, t) + N, \qquad
        z ← z + \tfrac h2 [d(z, t) + d(\tilde z, t−h)] + N, \qquad d = −F z + G G^⊤ s,

    with N of the covariance ∫GGᵀ over the step. Two score evaluations a step, weak order 2, strong
    order 1.
    """

    @property
    def facts(self) -> Facts:
        """Every linear SDE, weak order 2 at two evaluations a step."""
        return Facts(applies_to="every linear SDE", nfe_per_step=2, weak_order=2, strong_order=1)

    def prepare(self, process: ReverseProcess, times: Tensor) -> _Tables:
        """Drift blocks at both ends of each step and the root of its noise."""
        sde, start, end = process.sde, times[:-1], times[1:]
        h = (start - end)[:, None, None]
        return _Tables(
            *_drift(sde, start, h), *_drift(sde, end, h), as_blocks(sde.noise_root(end, start))
        )

    def evaluation_times(self, process: ReverseProcess, times: Tensor) -> Tensor:
        """The start of each step, then its end."""
        return torch.stack([times[:-1], times[1:]], dim=1).flatten()

    def step(
        self, z: Tensor, memory: Memory, tables: _Tables, i: int, score: ScoreAt, noise: NoiseSource
    ) -> tuple[Tensor, Memory]:
        """One step."""
        xi = noise.normal(z, len(tables.noise[i][0]))
        jump = combine((tables.noise[i], xi))
        first = score(z, 2 * i)
        start = combine((tables.start_state[i], z), (tables.start_score[i], first))
        guess = z + start + jump
        second = score(guess, 2 * i + 1)
        end = combine((tables.end_state[i], guess), (tables.end_score[i], second))
        return (start + end).mul_(0.5).add_(z).add_(jump), ()

    def path_noise(self, process: ReverseProcess, times: Tensor) -> PathNoise:
        """ΔW/√h, turned so that the root of ∫GGᵀ takes it where G of mid time does."""
        sde = process.sde
        driven = list(sde.driven)
        middle = (times[:-1] + times[1:]) / 2
        root = sde.noise_root(times[1:], times[:-1])[..., driven, :]
        left, _, right = torch.linalg.svd(
            root.mT @ sde.diffusion(middle)[..., driven, :], full_matrices=False
        )
        return PathNoise.increments(sde, times, rotation=left @ right)


def _drift(sde: LinearSDE, t: Tensor, h: Tensor) -> tuple[list[Block], list[Block]]:
    G = sde.diffusion(t)
    return as_blocks(-h * sde.drift(t)), as_blocks(h * (G @ G.mT)[..., list(sde.driven)])
