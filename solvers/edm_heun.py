"""EDM's stochastic sampler: Heun's method in the noise level, with churn."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cldsde.linear.checks import check_at_least, check_positive
from cldsde.linear.kappa import times_of_kappa
from cldsde.linear.sde import LinearSDE
from cldsde.score import ReverseProcess

from .base import Facts, check_regular
from .combine import Block, as_blocks
from .staged import Stage, StagedSolver, Stages


@dataclass(frozen=True, kw_only=True)
class EDMHeun(StagedSolver):
    r"""EDM's Heun sampler: probability flow in the noise level σ, with optional churn.

    Scale the data to x̂ = x/α, with the noise level σ = std(x | x_0)/α. Then the flow of every
    process of one component is dx̂/dσ = (x̂ − D)/σ with the data prediction D (Karras et al. 2022,
    eq. 1 and algorithm 2). If σ lies in ``churn_range``, a step first raises the level to

    .. math::
        \hat σ = σ\,(1 + γ), \qquad γ = \min(\text{churn}/n, \sqrt2 − 1).

    It adds noise of variance (σ̂² − σ²) times ``noise_scale`` squared. Heun's method then goes to
    the next level. If the grid ends at level 0, the last step is an Euler step, which returns the
    data prediction. The first step has no churn, so that the score is never evaluated above the
    first level of the grid.

    Churn is exact in distribution, so the error is Heun's alone, of order 2 for any churn.
    A ``noise_scale`` other than 1 compensates for errors of a network, and with an exact score
    samples another distribution. Options out of range raise a ValueError.

    Parameters
    ----------
    churn
        S_churn ≥ 0; 0 is the probability flow.
    churn_range
        Noise levels (S_min, S_max) between which churn is applied.
    noise_scale
        S_noise > 0, scale of the churn's noise.
    """

    churn: float = 0.0
    churn_range: tuple[float, float] = (0.0, math.inf)
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        check_at_least(self.churn, 0.0, "churn")
        check_positive(self.noise_scale, "noise_scale")
        ends = self.churn_range
        numbers = isinstance(ends, tuple) and all(isinstance(end, int | float) for end in ends)
        if not (numbers and len(ends) == 2 and 0 <= ends[0] <= ends[1]):
            msg = f"churn_range must be (S_min, S_max) with 0 ≤ S_min ≤ S_max; got {ends!r}"
            raise ValueError(msg)

    @property
    def facts(self) -> Facts:
        """Processes of one component; order 2 for the flow or in distribution."""
        noisy = self.churn > 0
        return Facts(
            applies_to="processes of one component (such as VP, VE and flows)",
            nfe_per_step=2,
            weak_order=2 if noisy and self.noise_scale == 1 else None,
            ode_order=None if noisy else 2,
            encodes=not noisy,
        )

    def prepare(self, process: ReverseProcess, times: Tensor) -> Stages:
        """Blocks of all steps."""
        sde = process.sde
        if sde.components != 1:
            raise ValueError(
                f"EDMHeun needs a process of one component; {type(sde).__name__} has "
                f"{sde.components}. Use ExponentialMultistep, with stochasticity=1.0 for noise"
            )
        check_regular(sde, times, "EDMHeun")
        raised = self._raised(sde, times)
        alpha, level = _levels(sde, times)
        alpha_hat, level_hat = _levels(sde, raised)
        following, low = alpha[1:], level[1:]
        # The standard deviation of the state is α σ, so that dx̂/dσ = −(α σ) s.
        slope_hat, slope = -alpha_hat * level_hat, -following * low
        step = low - level_hat
        added = (level_hat.square() - level[:-1].square()).clamp_min(0).sqrt()
        added = torch.where(raised > times[:-1], added, 0.0)

        def blocks(x: Tensor) -> list[Block]:
            return as_blocks(x[:, None, None])

        churned, at_data = (added > 0).tolist(), (low == 0).tolist()
        churn, onward = blocks(alpha_hat / alpha[:-1]), blocks(following / alpha_hat)
        nothing: Block = [[0.0]]
        return Stages.of(
            Stage(
                [block if some else None for block, some in zip(churn, churned, strict=True)],
                noise=blocks(alpha_hat * self.noise_scale * added),
            ),
            Stage(onward, blocks(following * step * slope_hat)),
            Stage(
                [None if done else nothing for done in at_data],
                blocks(following * step * slope * 0.5),
                base=onward,
                first=blocks(following * step * slope_hat * 0.5),
            ),
        )

    def evaluation_times(self, process: ReverseProcess, times: Tensor) -> Tensor:
        """Times of the raised level and of the end of each step, except for level 0."""
        both = torch.stack([self._raised(process.sde, times), times[1:]], dim=1).flatten()
        at_data = float(_levels(process.sde, times[-1:])[1]) == 0
        return both[:-1] if at_data else both

    def _raised(self, sde: LinearSDE, times: Tensor) -> Tensor:
        """Times of the levels after churn, at which Heun's steps start."""
        start = times[:-1]
        if self.churn == 0:
            return start
        log_level = -sde.kappa(start)
        low, high = (math.log(end) if end else -math.inf for end in self.churn_range)
        # A level at an end of the range belongs to it, whatever its rounding.
        inside = (log_level >= low - 1e-12) & (log_level <= high + 1e-12)
        gamma = min(self.churn / len(start), math.sqrt(2) - 1)
        wanted = log_level + math.log1p(gamma)
        raised = times_of_kappa(sde, -wanted, float(start[0]), float(start[-1]))
        return torch.where(inside & (raised > start), raised, start)


def _levels(sde: LinearSDE, times: Tensor) -> tuple[Tensor, Tensor]:
    """α and the noise level σ = std/α of one component."""
    marginal = sde.marginal(times)
    alpha = marginal.mean[..., 0, 0]
    return alpha, marginal.root[..., 0, 0] / alpha
