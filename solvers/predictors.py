"""Reverse diffusion and ancestral sampling, the predictors of discrete diffusion models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cldsde.score import Conversion, ReverseProcess

from .base import DATA_DETERMINED, Facts, check_regular
from .combine import as_blocks
from .noise import PathNoise
from .staged import AffineSolver, Stage, Stages


@dataclass(frozen=True, kw_only=True)
class ReverseDiffusion(AffineSolver):
    r"""Reverse diffusion sampling (Song et al. 2021, appendix E), also for several components.

    .. math:: z ← (2I − Ψ(t,u))\,z + Q(u,t)\,s(z, t) + L_Q\,ξ

    with the matrix Ψ, the covariance Q and its root L_Q of the forward transition from u to t. The
    full score follows from the driven score. The method has weak order 1 and takes one score
    evaluation per step. It was designed for one component and is inaccurate with velocities.
    """

    facts = Facts(applies_to=DATA_DETERMINED, nfe_per_step=1, weak_order=1, score_at_start=True)

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
        """Noise of the forward transition."""
        root = process.sde.transition(times[1:], times[:-1]).root
        return PathNoise.integrals(root, torch.eye(len(root[0]), dtype=torch.float64, device="cpu"))


@dataclass(frozen=True, kw_only=True)
class Ancestral(AffineSolver):
    r"""Ancestral sampling: draw from p(z_u | z_t, x_0) with the data prediction for x_0.

    Each step samples the posterior of the forward process (`LinearSDE.posterior`) at x̂_0(z, t). For
    VP this is the sampler of DDPM (Ho, Jain and Abbeel 2020). The method has weak order 1 and takes
    one score evaluation per step. It equals ``ExponentialMultistep(order=1, stochasticity=1.0)``,
    and is exact in one step if the data are a single point.
    """

    facts = Facts(applies_to=DATA_DETERMINED, nfe_per_step=1, weak_order=1, score_at_start=True)

    def prepare(self, process: ReverseProcess, times: Tensor) -> Stages:
        """Blocks of each step."""
        sde, start, end = process.sde, times[:-1], times[1:]
        check_regular(sde, times, "Ancestral")
        posterior = sde.posterior(end, start)
        data = Conversion.at(sde, start, "score", "data")
        pull = posterior.initial[..., :1]
        stage = Stage(
            as_blocks(posterior.state + pull @ data.state),
            as_blocks(pull @ data.value),
            noise=as_blocks(posterior.root),
        )
        return Stages.of(stage)
