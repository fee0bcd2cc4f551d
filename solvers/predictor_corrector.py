"""Predictor–corrector sampling: Langevin steps between the steps of another solver."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cldsde.linear.checks import check_positive
from cldsde.score import ReverseProcess
from cldsde.score.checks import one_of

from .base import Facts, GridSolver, Memory, ScoreAt, ShiftedScore, check_regular, check_solver
from .noise import NoiseSource
from .predictors import ReverseDiffusion

__all__ = ["Langevin", "PredictorCorrector"]


Norm = Literal["sample", "batch"]


class _Tables(NamedTuple):
    predictor: Any
    predictor_evaluations: int  # of each step
    driven: tuple[int, ...]  # components that the corrector moves
    scale: list[float]  # α of each step


@dataclass(frozen=True, kw_only=True)
class Langevin:
    r"""Langevin steps that leave the law at a time alone, to first order in their size.

    .. math:: z_d ← z_d + η\,s + \sqrt{2η}\,ξ, \qquad η = 2α \left(r \frac{‖ξ‖}{‖s‖}\right)^2

    on the driven components d (Song et al. 2021, algorithms 4 and 5). For a process with velocity
    these are steps for the law of the velocity given the data, which have the same score. α is the
    squared transition Ψ(t, u)² of the coming step for one component (1 for VE, α_t²/α_u² for VP),
    and 1 for more.

    Parameters
    ----------
    snr
        r > 0, the signal-to-noise ratio of a step.
    steps
        Steps at each time, each with an evaluation of the score.
    norm
        ``"sample"``: step sizes of each sample, which do not depend on the batch. ``"batch"``: one
        step size, from the batch means of the norms, as published. With few dimensions take the
        latter: there the score of a single sample may nearly vanish, and its step be far too long.
    """

    snr: float = 0.16
    steps: int = 1
    norm: Norm = "sample"

    def __post_init__(self) -> None:
        check_positive(self.snr, "snr")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            msg = f"steps must be a positive integer; got {self.steps!r}"
            raise ValueError(msg)
        one_of(self.norm, Norm, "norm")

    def correct(
        self, z: Tensor, driven: tuple[int, ...], scale: float, s: Tensor, xi: Tensor
    ) -> Tensor:
        """One step from a state, with the score and normals ``(B, len(driven), *D)``."""
        sizes = [torch.linalg.vector_norm(x, dim=list(range(1, x.ndim))) for x in (xi, s)]
        if self.norm == "batch":
            sizes = [size.mean().expand(len(z)) for size in sizes]
        # Where there is next to no score there is no scale for the step; it stays finite.
        ratio = sizes[0] / sizes[1].clamp_min(1e-6 * sizes[0])
        eta = (2 * scale * (self.snr * ratio).square()).reshape(-1, *(1,) * (z.ndim - 2))
        spread = (2 * eta).sqrt()
        out = z.clone()
        for row, component in enumerate(driven):
            out[:, component].addcmul_(eta, s[:, row]).addcmul_(spread, xi[:, row])
        return out


@dataclass(frozen=True)
class PredictorCorrector(GridSolver):
    """Corrector steps at each time of the grid, then the predictor's step to the next.

    Parameters
    ----------
    predictor
        A one-step solver: `ReverseDiffusion`, as published for VE, `Ancestral`, `EulerMaruyama` …
    corrector
        `Langevin`.

    Raises
    ------
    TypeError
        If the predictor is no solver or the corrector no `Langevin`.
    ValueError
        If the predictor's state between two steps belongs to no grid time, as that of `SSCS`.
    """

    predictor: GridSolver = field(default_factory=ReverseDiffusion)
    corrector: Langevin = field(default_factory=Langevin)

    def __post_init__(self) -> None:
        check_solver(self.predictor, "predictor")
        if not (self.predictor.facts.state_on_grid and hasattr(self.predictor, "step")):
            msg = (
                "predictor must leave a state at each grid time, where the corrector works; "
                f"{self.predictor!r} does not. Use ReverseDiffusion, Ancestral or EulerMaruyama"
            )
            raise ValueError(msg)
        if not isinstance(self.corrector, Langevin):
            msg = f"corrector must be a Langevin(...); got {self.corrector!r}"
            raise TypeError(msg)

    @property
    def facts(self) -> Facts:
        """Those of the predictor; the corrector has an error of its own that no grid reduces."""
        inner = self.predictor.facts
        return Facts(
            applies_to=inner.applies_to, nfe_per_step=inner.nfe_per_step + self.corrector.steps
        )

    def prepare(self, process: ReverseProcess, times: Tensor) -> _Tables:
        """Tables of the predictor, and the corrector's α of each step."""
        sde = process.sde
        check_regular(sde, times, "PredictorCorrector")
        scale = torch.ones(len(times) - 1, dtype=torch.float64, device="cpu")
        if sde.components == 1:
            scale = sde.transition_matrix(times[1:], times[:-1]).square().flatten()
        predictor = self.predictor.prepare(process, times)
        asked = len(self.predictor.evaluation_times(process, times))
        if asked % (len(times) - 1):
            msg = (
                "predictor must ask for the score equally often in each step; "
                f"{self.predictor!r} asks {asked} times in {len(times) - 1} steps, as it may where "
                "the grid ends at 0"
            )
            raise ValueError(msg)
        return _Tables(predictor, asked // (len(times) - 1), sde.driven, scale.tolist())

    def evaluation_times(self, process: ReverseProcess, times: Tensor) -> Tensor:
        """The start of each step for the corrector, then the predictor's times."""
        steps = len(times) - 1
        corrector = times[:-1].unsqueeze(1).expand(-1, self.corrector.steps)
        predictor = self.predictor.evaluation_times(process, times).reshape(steps, -1)
        return torch.cat([corrector, predictor], dim=1).flatten()

    def step(
        self, z: Tensor, memory: Memory, tables: _Tables, i: int, score: ScoreAt, noise: NoiseSource
    ) -> tuple[Tensor, Memory]:
        """Correct, then predict."""
        inner = tables.predictor_evaluations
        first = i * (self.corrector.steps + inner)
        for k in range(self.corrector.steps):
            s = score(z, first + k)
            xi = noise.normal(z, len(tables.driven))
            z = self.corrector.correct(z, tables.driven, tables.scale[i], s, xi)
            del s, xi
        shifted = ShiftedScore(score, first + self.corrector.steps - i * inner)
        return self.predictor.step(z, memory, tables.predictor, i, shifted, noise)
