"""Predictor–corrector sampling: Langevin steps between the steps of a predictor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cldsde.linear.checks import as_integer, check_positive, one_of
from cldsde.score import Conversion, ReverseProcess

from .base import (
    DATA_DETERMINED,
    Facts,
    GridSolver,
    Memory,
    ScoreAt,
    ShiftedScore,
    check_regular,
    check_solver,
    check_state_on_grid,
    evaluations_per_step,
)
from .noise import NoiseSource, PathNoise
from .staged import AffineSolver, Stages

Norm = Literal["sample", "batch"]


class _Tables(NamedTuple):
    predictor: Any
    predictor_evaluations: int  # per step
    driven: tuple[int, ...]  # components that the corrector changes
    scale: list[float]  # α of each step


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
        state = 2 * eye - kernel.mean + kernel.covariance @ full.state
        return Stages.affine(state, kernel.covariance @ full.value, kernel.root)

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
        return Stages.affine(posterior.state + pull @ data.state, pull @ data.value, posterior.root)


@dataclass(frozen=True, kw_only=True)
class Langevin:
    r"""Langevin corrector: steps that preserve the marginal distribution at a fixed time.

    .. math:: z_d ← z_d + η\,s + \sqrt{2η}\,ξ, \qquad η = 2α \left(r \frac{‖ξ‖}{‖s‖}\right)^2

    on the driven components d (Song et al. 2021, algorithms 4 and 5). The distribution is preserved
    to first order in η. For a process with velocity the steps sample the distribution of the
    velocity given the data, which has the same score. α is the squared transition Ψ(t, u)² of the
    next step for one component (1 for VE, α_t²/α_u² for VP), and 1 for several components. Options
    out of range raise a ValueError.

    Parameters
    ----------
    snr
        r > 0, the signal-to-noise ratio of a step.
    steps
        Number of corrector steps at each time, ≥ 1; each takes one score evaluation.
    norm
        ``"sample"``: one step size per sample, independent of the batch. ``"batch"``: one step size
        for all, from the batch means of the norms, as published. With few dimensions take
        ``"batch"``, because the score of a single sample may nearly vanish, which makes its step
        far too long.
    """

    snr: float = 0.16
    steps: int = 1
    norm: Norm = "sample"

    def __post_init__(self) -> None:
        check_positive(self.snr, "snr")
        as_integer(self.steps, 1, "steps")
        one_of(self.norm, Norm, "norm")

    def correct(
        self, z: Tensor, driven: tuple[int, ...], scale: float, s: Tensor, xi: Tensor
    ) -> Tensor:
        """Take one step from a state, with the score and normals ``(B, len(driven), *D)``."""
        sizes = [torch.linalg.vector_norm(x, dim=list(range(1, x.ndim))) for x in (xi, s)]
        if self.norm == "batch":
            sizes = [size.mean().expand(len(z)) for size in sizes]
        # A vanishing score sets no scale for the step, so its norm is bounded from below.
        ratio = sizes[0] / sizes[1].clamp_min(1e-6 * sizes[0])
        eta = (2 * scale * (self.snr * ratio).square()).reshape(-1, *(1,) * (z.ndim - 2))
        spread = (2 * eta).sqrt()
        out = z.clone()
        for row, component in enumerate(driven):
            out[:, component].addcmul_(eta, s[:, row]).addcmul_(spread, xi[:, row])
        return out


@dataclass(frozen=True)
class PredictorCorrector(GridSolver):
    """Predictor–corrector sampler: at each time corrector steps, then one predictor step.

    It is from Y. Song et al. 2021, §4.2 and appendix G. Options of other types raise a TypeError.

    Parameters
    ----------
    predictor
        A one-step solver, such as `ReverseDiffusion` (published for VE), `Ancestral` or
        `EulerMaruyama`. If its state between two steps belongs to no grid time, as for `SSCS`, a
        ValueError is raised.
    corrector
        `Langevin` steps.
    """

    predictor: GridSolver = field(default_factory=ReverseDiffusion)
    corrector: Langevin = field(default_factory=Langevin)

    def __post_init__(self) -> None:
        check_solver(self.predictor, "predictor")
        advice = "ReverseDiffusion, Ancestral or EulerMaruyama"
        check_state_on_grid(self.predictor, "predictor", advice)
        if not isinstance(self.corrector, Langevin):
            raise TypeError(f"corrector must be a Langevin(...); got {self.corrector!r}")

    @property
    def facts(self) -> Facts:
        """Processes of the predictor; no orders, because no grid reduces the corrector's error."""
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
        evaluations = evaluations_per_step(self.predictor, process, times, "predictor")
        return _Tables(predictor, evaluations, sde.driven, scale.tolist())

    def evaluation_times(self, process: ReverseProcess, times: Tensor) -> Tensor:
        """For each step its start, for the corrector, then the predictor's times."""
        corrector = times[:-1].unsqueeze(1).expand(-1, self.corrector.steps)
        predictor = self.predictor.evaluation_times(process, times).reshape(len(corrector), -1)
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
