"""SSCS, the symmetric splitting CLD sampler, for every process with a stationary distribution."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from cldsde.linear.blocks import block_exp
from cldsde.linear.checks import check_positive, one_of
from cldsde.linear.covariance import triangular_inverse
from cldsde.linear.sde import LinearSDE
from cldsde.score import ReverseProcess

from .base import Facts
from .combine import as_blocks
from .staged import Stage, StagedSolver, Stages

ScoreStep = Literal["euler", "midpoint", "gaussian"]


_Kick = tuple[Tensor, Tensor]
"""Blocks (k×k, k×d) of z ← z + state z' + score s(z') for each step, with the previous stage z'."""


@dataclass(frozen=True, kw_only=True)
class SSCS(StagedSolver):
    r"""Symmetric splitting CLD sampler (SSCS; Dockhorn et al. 2022, §3.3 and algorithm 1).

    The reverse drift is split at the stationary score −Σ∞⁻¹z. The part without the score,
    dz = Σ∞FᵀΣ∞⁻¹ z dt + G dw, is linear and solved exactly (A). The rest is the score step (S):

    .. math::
        A(h/2):\; z ← Ψ_H z + L_H ξ, \qquad
        S(h):\; \dot z = G G^⊤ \bigl(s(z, τ) + Σ_∞^{−1} z\bigr), \qquad A(h/2).

    Options out of range raise a ValueError.

    Parameters
    ----------
    score_step
        Method for the score step.

        ``"euler"``: z ← z + ∫ GGᵀ (s(z, t) + Σ∞⁻¹z) with the score at the step's start, as
        published for constant β. It takes one evaluation and has weak order 1.

        ``"midpoint"``: the explicit midpoint rule with stages at t and t − h/2. It takes two
        evaluations and has weak order 2.

        ``"gaussian"``: the score of data N(·, ``data_variance``) is integrated exactly, with the
        coefficients at the step's middle, and the rest of the score is frozen. It takes one
        evaluation. The weak order is 2 for such Gaussian data, and 1 otherwise. It does not
        overshoot near the data as the Euler step does.
    data_variance
        Variance of one number of the data for ``score_step="gaussian"``, > 0.
    merge
        Whether the second half-step of a step and the first half-step of the next are one exact
        move. The distribution is the same. If False, each step ends at its grid time, as
        trajectories, callbacks and correctors need, and draws twice the noise.
    """

    score_step: ScoreStep = "euler"
    data_variance: float = 1.0
    merge: bool = True

    def __post_init__(self) -> None:
        one_of(self.score_step, ScoreStep, "score_step")
        check_positive(self.data_variance, "data_variance")

    @property
    def facts(self) -> Facts:
        """Facts that hold for these options."""
        midpoint = self.score_step == "midpoint"
        return Facts(
            applies_to="processes with a stationary distribution (such as VP and CLD)",
            nfe_per_step=2 if midpoint else 1,
            weak_order=2 if midpoint else 1,
            state_on_grid=not self.merge,
        )

    def prepare(self, process: ReverseProcess, times: Tensor) -> Stages:
        """Blocks of the exact moves over merged half-steps and of the score steps."""
        sde = process.sde
        reversal = sde.stationary_reversal
        if reversal is None or sde.stationary_covariance is None:
            raise ValueError(
                "SSCS needs a process with a stationary distribution, whose score it splits from "
                f"the drift; {type(sde).__name__} has none. Use StochasticHeun"
            )
        start, middle, end = times[:-1], (times[:-1] + times[1:]) / 2, times[1:]
        stops = torch.cat([times[:1], middle, times[-1:]])
        if not self.merge:
            stops = torch.cat([torch.stack([start, middle], dim=1).flatten(), times[-1:]])
        move = reversal.transition(stops[1:], stops[:-1])
        opening, closing = (
            (slice(1), slice(1, None)) if self.merge else (slice(0, None, 2), slice(1, None, 2))
        )
        precision = torch.linalg.inv(sde.stationary_covariance)
        whole = sde.accumulated_noise(end, start)
        # Euler steps of ż = N(s + Σ∞⁻¹z)
        half = [sde.accumulated_noise(middle, start)] if self.score_step == "midpoint" else []
        kicks = [(noise @ precision, noise[..., list(sde.driven)]) for noise in (*half, whole)]
        if self.score_step == "gaussian":
            kicks = [self._gaussian_kick(sde, whole, middle, precision)]
        opens = Stage(as_blocks(move.mean[opening]), noise=as_blocks(move.root[opening]))
        if self.merge:
            opens = opens._replace(state=[*opens.state, *[None] * (len(start) - 1)])
        return Stages.of(opens, *_stages(kicks, move.mean[closing], move.root[closing]))

    def _gaussian_kick(self, sde: LinearSDE, noise: Tensor, t: Tensor, precision: Tensor) -> _Kick:
        r"""Exact flow of ż = N(Λz + r), Λ = Σ∞⁻¹ − Σ_ref⁻¹, with r = s + Σ_ref⁻¹z frozen."""
        k, driven = sde.components, list(sde.driven)
        data = torch.zeros(k, k, dtype=torch.float64, device="cpu")
        data[0, 0] = self.data_variance
        eye = torch.eye(k, dtype=torch.float64, device="cpu")
        whitening = triangular_inverse(sde.marginal(t, sde.initial_covariance + data).root)
        reference = whitening.mT @ whitening
        # exp [[NΛ, N], [0, 0]] = [[e^{NΛ}, φ₁(NΛ)N], [0, I]]
        generator = torch.zeros(*noise.shape[:-2], 2 * k, 2 * k, dtype=torch.float64, device="cpu")
        generator[..., :k, :k] = noise @ (precision - reference)
        generator[..., :k, k:] = noise
        flow = block_exp(generator)[..., :k, :]
        frozen = flow[..., k:][..., driven]
        state = flow[..., :k] - eye + frozen @ reference[..., driven, :]
        return state, frozen

    def on_grid(self) -> Self:
        """The same method without merged half-steps."""
        return replace(self, merge=False)

    def evaluation_times(self, process: ReverseProcess, times: Tensor) -> Tensor:
        """The start of each step, its middle, or both, depending on ``score_step``."""
        middle = (times[:-1] + times[1:]) / 2
        if self.score_step == "midpoint":
            return torch.stack([times[:-1], middle], dim=1).flatten()
        return middle if self.score_step == "gaussian" else times[:-1]


def _stages(kicks: list[_Kick], move: Tensor, root: Tensor) -> list[Stage]:
    """Stages of the score steps, with the exact noisy move after the last one."""
    eye = torch.eye(move.shape[-1], dtype=torch.float64, device="cpu").expand_as(move)
    stages = []
    for number, (state, score) in enumerate(kicks):
        last = number == len(kicks) - 1
        after = move if last else eye
        stages.append(
            Stage(
                as_blocks(after @ (state if number else eye + state)),
                as_blocks(after @ score),
                noise=as_blocks(root) if last else None,
                base=as_blocks(after) if number else None,
            )
        )
    return stages
