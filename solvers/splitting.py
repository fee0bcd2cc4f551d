"""Splitting integrators for the reverse SDE with velocity, composed from three letters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cldsde.linear.checks import one_of
from cldsde.linear.sde import LinearSDE
from cldsde.messages import counted
from cldsde.score import ReverseProcess

from .base import Facts
from .combine import as_blocks
from .staged import Stage, StagedSolver, Stages

ScoreTime = Literal["start", "end"]


@dataclass(frozen=True, kw_only=True)
class Splitting(StagedSolver):
    r"""Splitting integrators such as OBAB and BAOAB, for processes with a velocity.

    With the stationary covariance Σ∞ = diag(σ_x, σ_v) the reverse SDE of CLD and PSLD is a sum of

    .. math::
        O:&\quad dz = −\tfrac12 G G^⊤ Σ_∞^{−1} z\,dt + G\,dw \\
        A:&\quad \dot x = [(\tfrac12 G G^⊤ Σ_∞^{−1} − F) z + G G^⊤ s]_x \\
        B:&\quad \dot v = [(\tfrac12 G G^⊤ Σ_∞^{−1} − F) z + G G^⊤ s]_v

    O is an Ornstein–Uhlenbeck process for each component and is solved exactly. A updates the
    positions and B the velocities, each by an Euler step. The letters of the scheme act from left
    to right. A letter that occurs m times acts for 1/m of the step each time, over its own part of
    the step.

    Every scheme with all three letters has weak order 1. For few evaluations and a trained score,
    Pandey, Rudolph and Mandt (2024) recommend one evaluation per step at the less noisy end:
    ``shared_score=True`` and ``score_time="end"``. On Gaussian data these schemes are less accurate
    than `SSCS` with as many evaluations. Options out of range raise a ValueError, and a
    ``shared_score`` that is no bool a TypeError.

    Parameters
    ----------
    scheme
        Word over the letters O, A and B, with each of them at least once.
    shared_score
        Whether all letters of a step use the first score of the step.
    score_time
        Time of the score evaluation within a letter's part of the step, or with ``shared_score``
        within the step: its ``"start"``, or its less noisy ``"end"``.
    """

    scheme: str = "OBAB"
    shared_score: bool = False
    score_time: ScoreTime = "start"

    def __post_init__(self) -> None:
        if not isinstance(self.shared_score, bool):
            raise TypeError(f"shared_score must be True or False; got {self.shared_score!r}")
        if not isinstance(self.scheme, str) or set(self.scheme) != set("OAB"):
            msg = f"scheme must contain each of the letters O, A and B; got {self.scheme!r}"
            raise ValueError(msg)
        one_of(self.score_time, ScoreTime, "score_time")

    @property
    def facts(self) -> Facts:
        """Weak order 1; one evaluation per B, and per A too if positions are driven."""
        return Facts(
            applies_to="processes of position and velocity with independent stationary "
            "components (CLD, PSLD)",
            nfe_per_step=1 if self.shared_score else self.scheme.count("B"),
            weak_order=1,
        )

    def prepare(self, process: ReverseProcess, times: Tensor) -> Stages:
        """Blocks of each letter."""
        sde = process.sde
        covariance = _stationary_variances(sde)
        driven = sde.driven[-1]
        rate = sde.diffusion(times).square().sum(-1)[:, driven]
        fastest = int(rate.argmax())
        # F/(GGᵀ)_jj of a driven component j does not depend on the noise schedule.
        ratio = sde.drift(times[fastest]) / rate[fastest]
        eye = torch.eye(2, dtype=torch.float64, device="cpu")
        stages: list[Stage] = []
        evaluated = False
        for letter, start, end in self._parts(times):
            noise = sde.accumulated_noise(end, start)
            friction = 0.5 * noise / covariance
            if letter == "O":
                damping = friction.diagonal(dim1=-2, dim2=-1)
                spread = (covariance * -torch.expm1(-2 * damping)).sqrt()
                root = torch.diag_embed(spread)[..., list(sde.driven)]
                decay = torch.diag_embed(torch.exp(-damping))
                stages.append(Stage(as_blocks(decay), noise=as_blocks(root)))
                continue
            row = "AB".index(letter)
            own = eye[:, row : row + 1]  # selects the letter's row
            pull = friction - ratio * noise[:, driven, driven, None, None]
            stage = Stage(as_blocks(eye + own * pull))
            if row in sde.driven:
                blocks = as_blocks(own * noise[..., list(sde.driven)])
                reuse = self.shared_score and evaluated
                stage = stage._replace(first=blocks) if reuse else stage._replace(score=blocks)
                evaluated = True
            stages.append(stage)
        return Stages.of(*stages)

    def evaluation_times(self, process: ReverseProcess, times: Tensor) -> Tensor:
        """One time per letter that needs a score, or per step with ``shared_score``."""
        end = self.score_time == "end"
        if self.shared_score:
            return times[1:] if end else times[:-1]
        score_times = [
            part[2] if end else part[1]
            for part in self._parts(times)
            if part[0] != "O" and "AB".index(part[0]) in process.sde.driven
        ]
        return torch.stack(score_times, dim=1).flatten()

    def _parts(self, times: Tensor) -> list[tuple[str, Tensor, Tensor]]:
        """Each letter with start and end times of its part of each step, ``(n,)``."""
        start, h = times[:-1], -times.diff()
        parts = []
        for i, letter in enumerate(self.scheme):
            count, before = self.scheme.count(letter), self.scheme[:i].count(letter)
            after = times[1:] if before + 1 == count else start - h * ((before + 1) / count)
            parts.append((letter, start - h * (before / count), after))
        return parts


def _stationary_variances(sde: LinearSDE) -> Tensor:
    """Diagonal of Σ∞; raise ValueError if the process does not split."""
    covariance = sde.stationary_covariance
    if sde.components != 2 or sde.stationary_reversal is None or covariance is None:
        stationary = sde.stationary_reversal is not None
        raise ValueError(
            "Splitting needs a process of position and velocity with a stationary distribution; "
            f"{type(sde).__name__} has {counted(sde.components, 'component')}"
            f"{'. Use SSCS' if stationary else ' and no such distribution. Use StochasticHeun'}"
        )
    noise = sde.accumulated_noise(0.0, 1.0)
    scale = max(float(covariance.abs().max()), 1.0)
    if float(covariance[0, 1].abs()) > 1e-12 * scale or float(noise[0, 1]) != 0:
        raise ValueError(
            "Splitting needs independent noises and independent stationary components; "
            f"{type(sde).__name__} has correlated ones. Use SSCS"
        )
    return covariance.diagonal()
