"""Symmetric splitting CLD sampler, for every process with a stationary law."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from cldsde.score import ReverseProcess

from .base import Facts, Memory, ScoreAt, Solver
from .combine import Block, as_blocks, combine
from .noise import NoiseSource

__all__ = ["SSCS"]


class _Tables(NamedTuple):
    mean: list[Block]  # n + 1 exact moves: first half-step, merged neighbours, last half-step
    root: list[Block]
    score: list[Block]
    pull: list[Block]


@dataclass(frozen=True, kw_only=True)
class SSCS(Solver):
    r"""Symmetric splitting of the reverse SDE (Dockhorn et al. 2022, §3.3 and algorithm 1).

    The reverse drift is split at the stationary score −Σ∞⁻¹z. What is left without the network,
    dz = Σ∞FᵀΣ∞⁻¹ z dt + G dw, is linear and moved exactly (A); the rest is a kick by the score (S):

    .. math::
        A(h/2):\; z ← Ψ_H z + L_H ξ, \qquad
        S(h):\; z ← z + ∫_{t−h}^{t} G G^⊤ \bigl(s(z, t) + Σ_∞^{−1} z\bigr), \qquad A(h/2),

    with the score at the step's start, as published, and the noise accumulated over the step, which
    for the published constant β is h GGᵀ. The second half-step of a step and the first
    of the next are one exact move over the union of their clocks: the same law with half the
    noise. One score evaluation a step.

    Weak order 1: the kick is an Euler step, and symmetry of the splitting does not raise its
    order. Its error constant for CLD is about 2.5 times smaller than that of `EulerMaruyama` on
    grids refined near the data.
    """

    facts: ClassVar[Facts] = Facts(
        applies_to="processes with a stationary law under a time change (VP, CLD, PSLD, HOLD)",
        nfe_per_step=1,
        weak_order=1,
    )

    def prepare(self, process: ReverseProcess, times: Tensor) -> _Tables:
        """Exact moves over merged half-steps, and blocks of the kick at each step's start.

        Raises
        ------
        ValueError
            If the process has no stationary law to split at.
        """
        sde = process.sde
        reversal = sde.stationary_reversal
        if reversal is None or sde.stationary_covariance is None:
            msg = (
                "SSCS needs a process with a stationary law under a time change, to split its "
                f"score from the drift; {type(sde).__name__} has none. Use EulerMaruyama"
            )
            raise ValueError(msg)
        middle = (times[:-1] + times[1:]) / 2
        stops = torch.cat([times[:1], middle, times[-1:]])
        move = reversal.transition(stops[1:], stops[:-1])
        score = sde.accumulated_noise(times[1:], times[:-1])
        stationary = torch.linalg.solve(sde.stationary_covariance, score, left=False)
        return _Tables(
            as_blocks(move.mean),
            as_blocks(move.root),
            as_blocks(score[..., list(sde.driven)]),
            as_blocks(torch.eye(sde.components, dtype=torch.float64) + stationary),
        )

    def evaluation_times(self, times: Tensor) -> Tensor:
        """The start of each step."""
        return times[:-1]

    def step(
        self, z: Tensor, memory: Memory, tables: _Tables, i: int, score: ScoreAt, noise: NoiseSource
    ) -> tuple[Tensor, Memory]:
        """Exact move, kick; after the last kick the closing exact move."""
        z = self._move(z, tables, i, noise)
        kick = score(z, i)
        z = combine(torch.empty_like(z), (tables.pull[i], z), (tables.score[i], kick))
        if i == len(tables.score) - 1:
            z = self._move(z, tables, i + 1, noise)
        return z, ()

    def _move(self, z: Tensor, tables: _Tables, i: int, noise: NoiseSource) -> Tensor:
        xi = noise.normal(z, z.shape[1])
        return combine(torch.empty_like(z), (tables.mean[i], z), (tables.root[i], xi))
