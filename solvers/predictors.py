"""Predictors of discrete diffusion models, for any process: reverse diffusion and ancestral."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cldsde.score import Conversion, ReverseProcess

from .base import DATA_DETERMINED, Facts, check_regular
from .combine import as_blocks
from .noise import PathNoise
from .staged import AffineSolver, Stage, Stages

__all__ = ["Ancestral", "ReverseDiffusion"]


@dataclass(frozen=True, kw_only=True)
class ReverseDiffusion(AffineSolver):
    r"""Reverse diffusion sampling (Song et al. 2021, appendix E), for any block process.

    .. math:: z ← (2I − Ψ(t,u))\,z + Q(u,t)\,s(z, t) + L_Q\,ξ

    with the forward process's transition from u to t, discretised by the grid that is given. All
    rows of the score take part; those that noise does not drive follow from the driven ones. One
    evaluation a step, weak order 1; meant for one component, poor for processes with velocity.
    """

    @property
    def facts(self) -> Facts:
        """Every process whose driven score determines the rest, weak order 1."""
        return Facts(
            applies_to=DATA_DETERMINED,
            nfe_per_step=1,
            weak_order=1,
        )

    def prepare(self, process: ReverseProcess, times: Tensor) -> Stages:
        """Blocks of each step."""
        sde, start, end = process.sde, times[:-1], times[1:]
        check_regular(sde, times, "ReverseDiffusion")
        kernel = sde.transition(end, start)
        full = Conversion.at(sde, start, "score", "full_score")
        eye = torch.eye(sde.components, dtype=torch.float64, device="cpu")
        stage = Stage(
            as_blocks(2 * eye - kernel.mean + kernel.covariance @ full.state),
            as_blocks(kernel.covariance @ full.value),
            noise=as_blocks(kernel.root),
        )
        return Stages.of(stage)

    def path_noise(self, process: ReverseProcess, times: Tensor) -> PathNoise:
        """The forward transition's noise."""
        root = process.sde.transition(times[1:], times[:-1]).root
        return PathNoise.integrals(root, torch.eye(len(root[0]), dtype=torch.float64, device="cpu"))


@dataclass(frozen=True, kw_only=True)
class Ancestral(AffineSolver):
    r"""Ancestral sampling: draw from p(z_u | z_t, x_0) with the data prediction for x_0.

    The posterior of the forward process (`LinearSDE.posterior`) at x̂_0(z, t); for VP the sampler of
    DDPM (Ho, Jain and Abbeel 2020). One evaluation a step, weak order 1, exact in one step where
    the data are one point: `ExponentialMultistep` of order 1 and stochasticity 1.
    """

    @property
    def facts(self) -> Facts:
        """Every process whose driven score determines the data, weak order 1."""
        return Facts(
            applies_to=DATA_DETERMINED,
            nfe_per_step=1,
            weak_order=1,
        )

    def prepare(self, process: ReverseProcess, times: Tensor) -> Stages:
        """Blocks of each step."""
        sde, start, end = process.sde, times[:-1], times[1:]
        check_regular(sde, times, "Ancestral")
        law = sde.posterior(end, start)
        data = Conversion.at(sde, start, "score", "data")
        pull = law.initial[..., :1]
        stage = Stage(
            as_blocks(law.state + pull @ data.state),
            as_blocks(pull @ data.value),
            noise=as_blocks(law.root),
        )
        return Stages.of(stage)
