"""Stochastic Heun's method for the reverse SDE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cldsde.linear.sde import LinearSDE
from cldsde.score import ReverseProcess

from .base import Facts, check_regular
from .combine import as_blocks
from .noise import PathNoise
from .staged import Stage, StagedSolver, Stages


@dataclass(frozen=True, kw_only=True)
class StochasticHeun(StagedSolver):
    r"""Stochastic Heun method: the drift is averaged over the step, the noise is added once.

    .. math::
        \tilde z = z + h\,d(z, t) + N, \qquad
        z ← z + \tfrac h2 [d(z, t) + d(\tilde z, t−h)] + N, \qquad d = −F z + G G^⊤ s,

    with noise N of covariance ∫GGᵀ over the step. It has weak order 2 and strong order 1, and takes
    two score evaluations per step.
    """

    facts = Facts(applies_to="every linear SDE", nfe_per_step=2, weak_order=2, strong_order=1)

    def prepare(self, process: ReverseProcess, times: Tensor) -> Stages:
        """Blocks of both stages of each step."""
        sde, start, end = process.sde, times[:-1], times[1:]
        check_regular(sde, times, "StochasticHeun")
        h = (start - end)[:, None, None]
        eye = torch.eye(sde.components, dtype=torch.float64, device="cpu")
        noise = sde.noise_root(end, start)
        (state, score), (end_state, end_score) = _drift(sde, start, h), _drift(sde, end, h)
        return Stages.of(
            Stage(
                as_blocks(eye + state),
                as_blocks(score),
                noise=as_blocks(noise),
                keep=(as_blocks(-0.5 * state), as_blocks(-0.5 * score)),
            ),
            Stage(
                as_blocks(eye + 0.5 * end_state),
                as_blocks(0.5 * end_score),
                base=as_blocks(eye.expand_as(state)),
            ),
        )

    def evaluation_times(self, process: ReverseProcess, times: Tensor) -> Tensor:
        """The start of each step, then its end."""
        return torch.stack([times[:-1], times[1:]], dim=1).flatten()

    def path_noise(self, process: ReverseProcess, times: Tensor) -> PathNoise:
        """ΔW/√h, rotated so that the root of ∫GGᵀ maps it in the direction of G(t − h/2)."""
        sde = process.sde
        driven = list(sde.driven)
        middle = (times[:-1] + times[1:]) / 2
        root = sde.noise_root(times[1:], times[:-1])[..., driven, :]
        left, _, right = torch.linalg.svd(
            root.mT @ sde.diffusion(middle)[..., driven, :], full_matrices=False
        )
        return PathNoise.increments(sde, times, rotation=left @ right)


def _drift(sde: LinearSDE, t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of h(−F z + GGᵀ s) for state and score."""
    G = sde.diffusion(t)
    return -h * sde.drift(t), h * (G @ G.mT)[..., list(sde.driven)]
