"""Euler–Maruyama for the reverse SDE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cldsde.score import ReverseProcess

from .base import Facts, check_regular
from .noise import PathNoise
from .staged import AffineSolver, Stages


@dataclass(frozen=True, kw_only=True)
class EulerMaruyama(AffineSolver):
    r"""Euler–Maruyama method: drift and diffusion are frozen at the start of each step.

    .. math:: z ← z + h\,[−F(t) z + G G^⊤ s(z, t)] + \sqrt h\,G(t)\,ξ

    The method has weak order 1 and strong order 1, because the noise is additive, and takes one
    score evaluation per step.
    """

    facts = Facts(
        applies_to="every linear SDE",
        nfe_per_step=1,
        weak_order=1,
        strong_order=1,
        score_at_start=True,
    )

    def prepare(self, process: ReverseProcess, times: Tensor) -> Stages:
        """Blocks I − hF, h GGᵀ and √h G of each step."""
        sde = process.sde
        check_regular(sde, times, "EulerMaruyama")
        start, h = times[:-1], -times.diff()[:, None, None]
        F, G = sde.drift(start), sde.diffusion(start)
        state = torch.eye(sde.components, dtype=torch.float64, device="cpu") - h * F
        return Stages.affine(state, h * (G @ G.mT)[..., list(sde.driven)], h.sqrt() * G)

    def path_noise(self, process: ReverseProcess, times: Tensor) -> PathNoise:
        """ΔW/√h."""
        return PathNoise.increments(process.sde, times)
