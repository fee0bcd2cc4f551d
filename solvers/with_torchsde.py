"""Methods of torchsde as solvers of the reverse SDE."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cldsde.linear.checks import one_of
from cldsde.score import ReverseProcess

from .base import Facts, GridSolver, Memory, ScoreAt, check_regular
from .combine import Block, as_blocks, combine
from .noise import NoiseSource, PathNoise


class _Method(NamedTuple):
    calculus: str
    stages: tuple[float, ...]  # times of the drift evaluations as fractions of the step, in order
    weak_order: float
    strong_order: float


# Orders for additive noise. Some are higher than torchsde declares, which states orders for any
# noise. "midpoint" has weak order 2 only if the score is affine: its inner stage uses half of the
# step's increment, whose variance belongs to a quarter of the step.
_METHODS = {
    "euler": _Method("ito", (0.0,), 1, 1),
    "milstein": _Method("ito", (0.0,), 1, 1),
    "srk": _Method("ito", (0.0, 0.0, 0.75), 2, 1.5),
    "heun": _Method("stratonovich", (0.0, 1.0), 2, 1),
    "euler_heun": _Method("stratonovich", (0.0,), 1, 1),
    "midpoint": _Method("stratonovich", (0.0, 0.5), 1, 1),
}
_QUARTERS = 4  # torchsde evaluates the diffusion at quarters of a step


class _Tables(NamedTuple):
    state: list[Block]  # of the drift in the reverse clock, one for each evaluation
    score: list[Block]
    diffusion: list[Block]  # at the quarters of all steps
    times: list[float]


@dataclass(frozen=True, kw_only=True)
class TorchSDE(GridSolver):
    """Solver of the reverse SDE by a method of torchsde (Li et al. 2020; Kidger et al. 2021).

    Each step of the grid is one step of torchsde's method, so no step leaves the grid. The Brownian
    motion comes from the noise source of `solve`, so a seed gives the same bits. Orders are for
    additive noise.

    Parameters
    ----------
    method
        ``"euler"``, ``"milstein"`` (the same for additive noise), ``"srk"`` (SRA1 of Rößler 2010),
        ``"heun"``, ``"euler_heun"`` or ``"midpoint"``. Two methods are not supported: ``"log_ode"``
        equals ``"midpoint"`` for additive noise, and ``"reversible_heun"`` is unstable near the
        data. With CLD and 320 uniform steps to 0.05 its moments have an error of a tenth. Methods
        that are not supported raise a ValueError.
    """

    method: str = "euler"

    def __post_init__(self) -> None:
        one_of(self.method, tuple(_METHODS), "method")

    @property
    def facts(self) -> Facts:
        """Every linear SDE; orders of the method for additive noise."""
        method = _METHODS[self.method]
        return Facts(
            applies_to="every linear SDE",
            nfe_per_step=len(method.stages),
            weak_order=method.weak_order,
            strong_order=method.strong_order,
            score_at_start=method.stages == (0.0,),
        )

    def prepare(self, process: ReverseProcess, times: Tensor) -> _Tables:
        """Blocks of the drift at all evaluations and of the diffusion at quarters of steps."""
        sde = process.sde
        check_regular(sde, times, "TorchSDE")
        score_times = self.evaluation_times(process, times)
        G = sde.diffusion(score_times)
        quarters = torch.arange(_QUARTERS + 1, device="cpu") / _QUARTERS
        at = times[:-1, None] + quarters * times.diff()[:, None]
        return _Tables(
            as_blocks(-sde.drift(score_times)),
            as_blocks((G @ G.mT)[..., list(sde.driven)]),
            as_blocks(sde.diffusion(at.clamp(times[-1], times[0])).flatten(0, 1)),
            times.tolist(),
        )

    def evaluation_times(self, process: ReverseProcess, times: Tensor) -> Tensor:
        """The method's stages of each step."""
        start, h = times[:-1], -times.diff()
        stages = [times[1:] if c == 1 else start - c * h for c in _METHODS[self.method].stages]
        return torch.stack(stages, dim=1).flatten()

    def path_noise(self, process: ReverseProcess, times: Tensor) -> PathNoise:
        """Increments ΔW/√h; for ``"srk"`` also the part of ∫w dt that is independent of them."""
        plain = PathNoise.increments(process.sde, times)
        if self.method != "srk":
            return plain
        h = -times.diff()[:, None, None]
        increment, integral = plain.increment, plain.integral
        # H = U/h − ΔW/2 has variance h/12, see `_Step`.
        return PathNoise(
            torch.cat([increment, -math.sqrt(3) * increment], dim=1),
            torch.cat([integral, integral], dim=1),
            torch.cat([torch.zeros_like(increment), math.sqrt(12) / h * increment], dim=1),
        )

    def step(
        self, z: Tensor, memory: Memory, tables: _Tables, i: int, score: ScoreAt, noise: NoiseSource
    ) -> tuple[Tensor, Memory]:
        """Take one step of torchsde's method."""
        # Import here, because torchsde is slow to import and seldom needed.
        from torchsde._core import base_sde, methods

        # Call the method directly: `torchsde.sdeint` evaluates the drift once more to check shapes.
        method = _METHODS[self.method]
        reverse = _Step(method.calculus, tables, i, i * len(method.stages), score, noise, z)
        solver = methods.select(self.method, method.calculus)(
            sde=base_sde.ForwardSDE(reverse),
            bm=reverse,
            dt=1.0,
            adaptive=False,
            rtol=0.0,
            atol=0.0,
            dt_min=0.0,
            options={},
        )
        # torchsde's arithmetic is elementwise, so flattening a sample does not change it.
        y, _ = solver.step(-tables.times[i], -tables.times[i + 1], z.flatten(1), ())
        return y.view_as(z), ()


@dataclass(eq=False)
class _Step:
    """The reverse SDE in the time −t and its Brownian motion, as torchsde expects them."""

    sde_type: str
    tables: _Tables
    i: int
    evaluation: int  # index of the next score evaluation
    score: ScoreAt
    noise: NoiseSource
    like: Tensor
    noise_type = "additive"
    levy_area_approximation = "space-time"

    @property
    def shape(self) -> tuple[int, int]:
        rows, z = len(self.tables.diffusion[0][0]), self.like
        return len(z), rows * z[:, 0].numel() // max(len(z), 1)

    def f(self, s: float, y: Tensor) -> Tensor:
        tables, j = self.tables, self.evaluation
        self.evaluation += 1
        z = y.view_as(self.like)
        return combine((tables.state[j], z), (tables.score[j], self.score(z, j))).flatten(1)

    def g_prod(self, s: float, y: Tensor, v: Tensor) -> Tensor:
        start, end = self.tables.times[self.i], self.tables.times[self.i + 1]
        quarter = round(_QUARTERS * (start + s) / (start - end))
        G = self.tables.diffusion[self.i * (_QUARTERS + 1) + quarter]
        xi = v.view(len(v), len(G[0]), *self.like.shape[2:])
        return combine((G, xi)).flatten(1)

    def __call__(
        self, s: float, t: float, *, return_U: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Increment of the Brownian motion, and its integral; torchsde asks once per step."""
        h, rows = t - s, len(self.tables.diffusion[0][0])
        xi = self.noise.normal(self.like, 2 * rows if return_U else rows)
        W = math.sqrt(h) * xi[:, :rows].flatten(1)
        if not return_U:
            return W
        # ∫ (W_r − W_s) dr = h (W/2 + H) with H ~ N(0, h/12) independent of W.
        H = math.sqrt(h / 12) * xi[:, rows:].flatten(1)
        return W, h * (0.5 * W + H)
