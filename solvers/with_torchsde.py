"""torchsde: its methods as solvers here, and processes here as its SDEs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.sde import LinearSDE
from cldsde.score import ReverseProcess

from .base import Facts, GridSolver, Memory, ScoreAt
from .combine import Block, as_blocks, combine
from .noise import NoiseSource, PathNoise
from .with_torchdiffeq import ProcessModule

__all__ = ["TorchSDE", "as_torchsde"]


class _Method(NamedTuple):
    calculus: str
    stages: tuple[float, ...]  # where in the step the drift is asked for, in order
    weak_order: float
    strong_order: float


# Orders for noise that is additive, as it is here; some are above what torchsde declares, which
# holds for any noise. "midpoint" is of weak order 2 where the score is affine, and not otherwise:
# its inner stage sees half the step's increment, whose variance is that of a quarter of the step.
_METHODS = {
    "euler": _Method("ito", (0.0,), 1, 1),
    "milstein": _Method("ito", (0.0,), 1, 1),
    "srk": _Method("ito", (0.0, 0.0, 0.75), 2, 1.5),
    "heun": _Method("stratonovich", (0.0, 1.0), 2, 1),
    "euler_heun": _Method("stratonovich", (0.0,), 1, 1),
    "midpoint": _Method("stratonovich", (0.0, 0.5), 1, 1),
}
_QUARTERS = 4  # the diffusion is asked for at quarters of a step


class _Tables(NamedTuple):
    state: list[Block]  # of the drift in the reverse clock, one for each evaluation
    score: list[Block]
    diffusion: list[Block]  # at the quarters of all steps
    times: list[float]


@dataclass(frozen=True, kw_only=True)
class TorchSDE(GridSolver):
    """The reverse SDE by a method of torchsde (Li et al. 2020; Kidger et al. 2021).

    Each step of the grid is one step of torchsde's method, so no step leaves the grid. The noise
    source of `solve` serves as its Brownian motion, so a seed gives the same bits. Orders are for
    additive noise.

    Parameters
    ----------
    method
        ``"euler"``, ``"milstein"`` (here the same), ``"srk"`` (SRA1 of Rößler 2010), ``"heun"``,
        ``"euler_heun"`` or ``"midpoint"``. Two methods are not supported: ``"log_ode"`` equals
        ``"midpoint"`` for additive noise, and ``"reversible_heun"`` is unstable near the data (with
        CLD and 320 uniform steps to 0.05 its moments are still off by a tenth).

    Examples
    --------
    >>> import torch
    >>> from cldsde import CLD, GaussianMixture, ReverseProcess, solvers
    >>> sde = CLD()
    >>> process = ReverseProcess(sde, GaussianMixture([1.0], [[0.3]], [[[0.25]]]).score(sde))
    >>> start = sde.prior.sample((8, 1), generator=torch.Generator().manual_seed(0))
    >>> times = solvers.quadratic_times(sde.T, 1e-3, 50)
    >>> solvers.solve(process, solvers.TorchSDE(method="srk"), start, times).nfev
    150
    """

    method: str = "euler"

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            names = ", ".join(map(repr, _METHODS))
            msg = f"method must be one of {names}; got {self.method!r}"
            raise ValueError(msg)

    @property
    def facts(self) -> Facts:
        """Every linear SDE; orders of the method for additive noise."""
        method = _METHODS[self.method]
        return Facts(
            applies_to="every linear SDE",
            nfe_per_step=len(method.stages),
            weak_order=method.weak_order,
            strong_order=method.strong_order,
        )

    def prepare(self, process: ReverseProcess, times: Tensor) -> _Tables:
        """Blocks of the drift at all evaluations and of the diffusion at quarters of steps."""
        sde = process.sde
        asked = self.evaluation_times(process, times)
        G = sde.diffusion(asked)
        quarters = torch.arange(_QUARTERS + 1, device="cpu") / _QUARTERS
        at = times[:-1, None] + quarters * times.diff()[:, None]
        return _Tables(
            as_blocks(-sde.drift(asked)),
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
        """Increments ΔW/√h; for ``"srk"`` also the time integral less what they tell of it."""
        plain = PathNoise.increments(process.sde, times)
        if self.method != "srk":
            return plain
        h = -times.diff()[:, None, None]
        increment, integral = plain.increment, plain.integral
        zero = torch.zeros_like(increment)
        # H = U/h − ΔW/2 is of variance h/12, see `_Increments`.
        return PathNoise(
            torch.cat([increment, -math.sqrt(3) * increment], dim=1),
            torch.cat([integral, integral], dim=1),
            torch.cat([zero, math.sqrt(12) / h * increment], dim=1),
        )

    def step(
        self, z: Tensor, memory: Memory, tables: _Tables, i: int, score: ScoreAt, noise: NoiseSource
    ) -> tuple[Tensor, Memory]:
        """One step of torchsde."""
        from torchsde._core import base_sde, methods  # slow to import, and seldom wanted

        # `torchsde.sdeint` would ask for the drift once more at each call, to look at its shape.
        method = _METHODS[self.method]
        evaluations = len(method.stages)
        reverse = _Step(method.calculus, tables, i, evaluations, score, z)
        solver = methods.select(self.method, method.calculus)(
            sde=base_sde.ForwardSDE(reverse),
            bm=_Increments(noise, z, len(tables.diffusion[0][0])),
            dt=1.0,
            adaptive=False,
            rtol=0.0,
            atol=0.0,
            dt_min=0.0,
            options={},
        )
        # torchsde's arithmetic is elementwise: a sample may lie in memory as it is.
        y, _ = solver.step(-tables.times[i], -tables.times[i + 1], z.flatten(1), ())
        return y.view_as(z), ()


class _Step:
    """The reverse SDE in the clock −t, for the evaluations of one step."""

    noise_type = "additive"

    def __init__(
        self, calculus: str, tables: _Tables, i: int, evaluations: int, score: ScoreAt, z: Tensor
    ) -> None:
        self.sde_type = calculus
        self._tables, self._i, self._score, self._like = tables, i, score, z
        self._asked = i * evaluations

    def f(self, s: float, y: Tensor) -> Tensor:
        tables, j = self._tables, self._asked
        self._asked += 1
        z = y.view_as(self._like)
        return combine((tables.state[j], z), (tables.score[j], self._score(z, j))).flatten(1)

    def g_prod(self, s: float, y: Tensor, v: Tensor) -> Tensor:
        start, end = self._tables.times[self._i], self._tables.times[self._i + 1]
        quarter = round(_QUARTERS * (start + s) / (start - end))
        G = self._tables.diffusion[self._i * (_QUARTERS + 1) + quarter]
        xi = v.view(len(v), len(G[0]), *self._like.shape[2:])
        return combine((G, xi)).flatten(1)


class _Increments:
    """A noise source as torchsde's Brownian motion, for one query over a step."""

    levy_area_approximation = "space-time"

    def __init__(self, noise: NoiseSource, z: Tensor, rows: int) -> None:
        self._noise, self._z, self._rows = noise, z, rows
        self.shape = (len(z), rows * z[:, 0].numel() // max(len(z), 1))

    def __call__(
        self, s: float, t: float, *, return_U: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        h = t - s
        xi = self._noise.normal(self._z, 2 * self._rows if return_U else self._rows)
        W = math.sqrt(h) * xi[:, : self._rows].flatten(1)
        if not return_U:
            return W
        # ∫ (W_r − W_s) dr = h (W/2 + H) with H ~ N(0, h/12) independent of W.
        H = math.sqrt(h / 12) * xi[:, self._rows :].flatten(1)
        return W, h * (0.5 * W + H)


def _pack(z: Tensor) -> Tensor:
    """States ``(B, k, *D)`` as torchsde's batch ``(B ∏D, k)``: noise does not mix data axes."""
    return z.movedim(1, -1).reshape(-1, z.shape[1])


class _TorchSDEForm(ProcessModule):
    """See `as_torchsde`."""

    noise_type = "additive"

    def __init__(
        self, process: LinearSDE | ReverseProcess, shape: Sequence[int], calculus: str
    ) -> None:
        super().__init__(process)
        if calculus not in ("ito", "stratonovich"):
            msg = f"calculus must be 'ito' or 'stratonovich'; got {calculus!r}"
            raise ValueError(msg)
        self.sde_type, self._shape = calculus, tuple(shape)
        self._reverse = isinstance(process, ReverseProcess)
        self._sde = process.sde if isinstance(process, ReverseProcess) else process

    def clock(self, times: Tensor) -> Tensor:
        """Times of the process as torchsde's increasing ones: −t for a reverse process."""
        return -times if self._reverse else times

    def pack(self, state: Tensor) -> Tensor:
        """States ``(B, k, *D)`` as torchsde's ``(B ∏D, k)``."""
        wanted = (self._sde.components, *self._shape)
        if state.ndim < 2 or state.shape[1:] != wanted:
            sizes = ", ".join(map(str, wanted))
            msg = f"state must have shape (B, {sizes}); got {tuple(state.shape)}"
            raise ValueError(msg)
        return _pack(state)

    def unpack(self, y: Tensor) -> Tensor:
        """Torchsde's ``(*, B ∏D, k)`` as states ``(*, B, k, *D)``."""
        size = y.shape[-2] // max(math.prod(self._shape), 1)
        batch = y.reshape(*y.shape[:-2], size, *self._shape, y.shape[-1])
        return batch.movedim(-1, y.ndim - 1)

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        """Drift in torchsde's clock."""
        t, z = self._time(s), self.unpack(y)
        if isinstance(self._process, ReverseProcess):
            return _pack(-self._process.drift(z, t))
        return _pack(apply_blocks(self._sde.drift(t), z))

    def g(self, s: Tensor, y: Tensor) -> Tensor:
        """Diffusion, ``(B ∏D, k, m)``."""
        return self._sde.diffusion(self._time(s)).to(y).expand(len(y), -1, -1)

    def _time(self, s: Tensor | float) -> Tensor:
        t = torch.as_tensor(s).detach().to("cpu", torch.float64)
        return -t if self._reverse else t


def as_torchsde(
    process: LinearSDE | ReverseProcess, shape: Sequence[int], *, calculus: str = "ito"
) -> _TorchSDEForm:
    """A process as the object that ``torchsde.sdeint`` integrates.

    torchsde's states are ``(batch, d)``. All numbers of the data are driven alike, so states are
    laid out as ``(B ∏D, k)`` with noise of type ``"additive"``, and no matrix grows with the square
    of the data's size. ``pack`` and ``unpack`` convert states. ``clock`` converts times: times of a
    reverse process decrease, torchsde's increase.

    Parameters
    ----------
    process
        A `LinearSDE` to run forward, or a `ReverseProcess` to run backward.
    shape
        Shape ``(*D)`` of one sample's data.
    calculus
        ``"ito"`` or ``"stratonovich"``, as torchsde's method wants; for additive noise the same.

    Raises
    ------
    TypeError
        If the process is neither.
    ValueError
        If the calculus is unknown.

    Examples
    --------
    >>> import torch, torchsde
    >>> from cldsde import CLD, GaussianMixture, ReverseProcess, solvers
    >>> sde = CLD()
    >>> process = ReverseProcess(sde, GaussianMixture([1.0], [[0.3]], [[[0.25]]]).score(sde))
    >>> form = solvers.as_torchsde(process, (1,))
    >>> start = sde.prior.sample((8, 1), generator=torch.Generator().manual_seed(0))
    >>> ts = form.clock(torch.tensor([1.0, 1e-3]))
    >>> y = torchsde.sdeint(form, form.pack(start), ts, dt=0.01, method="euler")
    >>> form.unpack(y).shape
    torch.Size([2, 8, 2, 1])
    """
    return _TorchSDEForm(process, shape, calculus)
