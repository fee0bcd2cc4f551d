"""Exponential Euler for the reverse SDE: exact linear drift, frozen score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cldsde.linear.blocks import block_solve
from cldsde.linear.covariance import joint_root
from cldsde.linear.schedule import gauss_legendre
from cldsde.score import ReverseProcess

from .base import Facts, check_regular
from .noise import PathNoise
from .staged import AffineSolver, Stages


@dataclass(frozen=True, kw_only=True)
class ExponentialEuler(AffineSolver):
    r"""Exponential Euler method: the score is frozen over each step, the linear drift is exact.

    .. math:: z ← Ψ(u,t)\,z + ∫_u^t Ψ(u,τ) G G^⊤ dτ\; s(z, t) + ζ, \qquad
              \mathrm{Cov}\,ζ = ∫_u^t Ψ(u,τ) G G^⊤ Ψ(u,τ)^⊤ dτ

    The method has weak order 1 and takes one score evaluation per step. `ExponentialMultistep`
    treats the linear part of the score exactly, too.
    """

    facts = Facts(applies_to="every linear SDE", nfe_per_step=1, weak_order=1, score_at_start=True)

    def prepare(self, process: ReverseProcess, times: Tensor) -> Stages:
        """Blocks of each step, by a Gauss–Legendre rule of 16 nodes."""
        sde, start, end = process.sde, times[:-1], times[1:]
        check_regular(sde, times, "ExponentialEuler")
        nodes, weights = gauss_legendre(16)
        span = (start - end).unsqueeze(1)
        at = end.unsqueeze(1) + span * nodes
        pulled = block_solve(sde.transition_matrix(end.unsqueeze(1), at), sde.diffusion(at))
        eye = torch.eye(sde.components, dtype=torch.float64, device="cpu")
        measure = (span * weights)[..., None, None]
        score = (measure * pulled @ sde.diffusion(at).mT).sum(1)
        columns = (measure.sqrt() * pulled).movedim(1, 2).flatten(2)
        state = block_solve(sde.transition_matrix(end, start), eye)
        return Stages.affine(state, score[..., list(sde.driven)], joint_root(columns))

    def path_noise(self, process: ReverseProcess, times: Tensor) -> PathNoise:
        """∫Ψ(u, τ) G dw = Ψ(t, u)⁻¹ I over each step."""
        (stage,) = self.prepare(process, times).stages
        root, back = (
            torch.tensor(part, dtype=torch.float64, device="cpu")
            for part in (stage.noise, stage.state)
        )
        return PathNoise.integrals(root, back)
