"""Splitting integrators of the reverse SDE with velocity, composed from three letters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cldsde.linear.sde import LinearSDE
from cldsde.score import ReverseProcess
from cldsde.score.checks import one_of

from .base import Facts
from .combine import as_blocks
from .staged import Stage, StagedSolver, Stages

__all__ = ["Splitting"]


ScoreTime = Literal["start", "end"]


@dataclass(frozen=True, kw_only=True)
class Splitting(StagedSolver):
    r"""A word over O, A and B: the reverse SDE of a process with velocity, split in three.

    With the stationary covariance Σ∞ = diag(σ_x, σ_v) the reverse SDE of CLD and PSLD is a sum of

    .. math::
        O:&\quad dz = −\tfrac12 G G^⊤ Σ_∞^{−1} z\,dt + G\,dw \\
        A:&\quad \dot x = [(\tfrac12 G G^⊤ Σ_∞^{−1} − F) z + G G^⊤ s]_x \\
        B:&\quad \dot v = [(\tfrac12 G G^⊤ Σ_∞^{−1} − F) z + G G^⊤ s]_v

    O is an Ornstein–Uhlenbeck process for each component and solved exactly; A moves the positions
    and B kicks the velocities, each by an Euler step that is exact where its own component does not
    enter. The letters of the word act from left to right. One that occurs m times acts for 1/m of
    the step each time, over its own part of the step's clock.

    OBA, BAO, OBAB, BAOAB, OABAO and any other word with all three letters are of weak order 1:
    orders known from molecular dynamics, where the force depends on the position alone, do not
    carry over, as the score depends on the velocity too. With few evaluations and a trained score
    such words have been found useful with one evaluation a step, ``shared_score=True``, asked at
    the less noisy end, ``score_time="end"`` (Pandey, Yang and Mandt 2024); on Gaussian data they
    are less accurate than `SSCS`.

    Parameters
    ----------
    scheme
        The word.
    shared_score
        Whether the first score of a step serves all its letters.
    score_time
        Where the score is asked in a letter's part of the step, or with ``shared_score`` in the
        step: at its ``"start"`` or at its less noisy ``"end"``.

    Examples
    --------
    >>> import torch
    >>> from cldsde import CLD, GaussianMixture, ReverseProcess, solvers
    >>> sde = CLD()
    >>> process = ReverseProcess(sde, GaussianMixture([1.0], [[0.3]], [[[0.25]]]).score(sde))
    >>> start = sde.prior.sample((8, 1), generator=torch.Generator().manual_seed(0))
    >>> times = solvers.quadratic_times(sde.T, 1e-3, 50)
    >>> solvers.solve(process, solvers.Splitting(scheme="OBAB"), start, times).nfev
    100
    """

    scheme: str = "OBAB"
    shared_score: bool = False
    score_time: ScoreTime = "start"

    def __post_init__(self) -> None:
        if not isinstance(self.shared_score, bool):
            msg = f"shared_score must be True or False; got {self.shared_score!r}"
            raise TypeError(msg)
        if not isinstance(self.scheme, str) or set(self.scheme) != set("OAB"):
            msg = f"scheme must be a word with each of the letters O, A and B; got {self.scheme!r}"
            raise ValueError(msg)
        one_of(self.score_time, ScoreTime, "score_time")

    @property
    def facts(self) -> Facts:
        """Weak order 1; an evaluation for each B, where positions are noisy also for each A."""
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
        row_of, ratio = _drift_per_noise(sde, times)
        stages: list[Stage] = []
        asked = False
        for letter, start, end in self._parts(times):
            noise = sde.accumulated_noise(end, start)
            friction = 0.5 * noise / covariance
            if letter == "O":
                decay = torch.exp(-friction.diagonal(dim1=-2, dim2=-1))
                spread = (
                    covariance * -torch.expm1(-2 * friction.diagonal(dim1=-2, dim2=-1))
                ).sqrt()
                root = torch.diag_embed(spread)[..., list(sde.driven)]
                stages.append(Stage(as_blocks(torch.diag_embed(decay)), noise=as_blocks(root)))
                continue
            row = "AB".index(letter)
            state = torch.eye(2, dtype=torch.float64, device="cpu").repeat(len(start), 1, 1)
            state[:, row] += (friction - ratio * noise[:, row_of, row_of, None, None])[:, row]
            score = torch.zeros_like(state)
            score[:, row] = noise[:, row]
            stage = Stage(as_blocks(state))
            if row in sde.driven:
                blocks = as_blocks(score[..., list(sde.driven)])
                again = self.shared_score and asked
                stage = stage._replace(first=blocks) if again else stage._replace(score=blocks)
                asked = True
            stages.append(stage)
        return Stages.of(*stages)

    def evaluation_times(self, process: ReverseProcess, times: Tensor) -> Tensor:
        """Those of each letter that asks for a score, or of the step."""
        end = self.score_time == "end"
        if self.shared_score:
            return times[1:] if end else times[:-1]
        asked = [
            part[2] if end else part[1]
            for part in self._parts(times)
            if part[0] != "O" and "AB".index(part[0]) in process.sde.driven
        ]
        return torch.stack(asked, dim=1).flatten()

    def _parts(self, times: Tensor) -> list[tuple[str, Tensor, Tensor]]:
        """Each letter with the start and the end of its part of each step."""
        start, h = times[:-1], -times.diff()
        seen = dict.fromkeys(self.scheme, 0)
        parts = []
        for letter in self.scheme:
            count, before = self.scheme.count(letter), seen[letter]
            seen[letter] += 1
            after = times[1:] if before + 1 == count else start - h * ((before + 1) / count)
            parts.append((letter, start - h * (before / count), after))
        return parts


def _stationary_variances(sde: LinearSDE) -> Tensor:
    """Diagonal of Σ∞ where the process is of position and velocity and splits; raise otherwise."""
    covariance = sde.stationary_covariance
    if sde.components != 2 or sde.stationary_reversal is None or covariance is None:
        msg = (
            "Splitting needs a process of position and velocity with a stationary law; "
            f"{type(sde).__name__} has {sde.components} components"
            f"{'. Use SSCS' if sde.stationary_reversal else ' and no such law. Use StochasticHeun'}"
        )
        raise ValueError(msg)
    noise = sde.accumulated_noise(0.0, sde.T)
    scale = max(float(covariance.abs().max()), 1.0)
    if float(covariance[0, 1].abs()) > 1e-12 * scale or float(noise[0, 1]) != 0:
        msg = (
            "Splitting needs noises and stationary components that are independent; those of "
            f"{type(sde).__name__} are correlated. Use SSCS"
        )
        raise ValueError(msg)
    return covariance.diagonal()


def _drift_per_noise(sde: LinearSDE, times: Tensor) -> tuple[int, Tensor]:
    """A driven component j and F/(GGᵀ)_jj, which a change of time leaves as it is."""
    j = sde.driven[-1]
    noise = sde.diffusion(times).square().sum(-1)[:, j]
    fastest = int(noise.argmax())
    return j, sde.drift(times[fastest]) / noise[fastest]
