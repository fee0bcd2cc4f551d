"""Steps of a linear SDE for callers that see one component and bring the data predictions.

A sampler of another library holds x = α x_0 + σ n on the path of its network. A process with mean
factor ψ and covariance Σ = L Lᵀ given x_0 needs no more. With g = L⁻¹ψ/|L⁻¹ψ| its state is

    z = L (g x/σ + w),    w ⟂ g,    w ~ N(0, I − g gᵀ) independent of x_0 and n.

`PathSteps` draws w at its first step, and keeps it.
"""

from __future__ import annotations

import hashlib
import math
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cldsde.linear.covariance import triangular_inverse
from cldsde.linear.kappa import kappa_range, times_of_kappa
from cldsde.linear.random import Generators, standard_normal
from cldsde.linear.sde import LinearSDE
from cldsde.score import Conversion, ReverseProcess
from cldsde.solvers import ExponentialEuler
from cldsde.solvers.base import GridSolver, Memory, Solver, check_solver
from cldsde.solvers.combine import Block, add_to, as_blocks, combine
from cldsde.solvers.noise import NoiseSource, SampleNoise
from cldsde.solvers.recommended import AnnouncedScore, solvers_of_levels

# A level this close in κ to an end of the process counts as that end.
_ROUNDING = 1e-6
# Keeps the streams apart from others of the same seeds.
_KEY = 0x70697065


class PathSteps:
    """Steps between noise levels of a network's path, with a solver of a reverse process.

    Parameters
    ----------
    sde, solver
        The process and its solver, see `check_steppable`. A solver that does not apply, or a
        process with more noise than a level at all times, raises a ValueError.
    kappa
        κ = log(α/σ) of the levels, ``(n + 1,)`` float64, increasing. The first may be −∞: nothing
        of the data is left. If the last is ∞, the last step returns the data prediction.
    signal, noise
        α and σ of the path at the levels, ``(n + 1,)`` float64.

    Notes
    -----
    If the first levels have more noise than the process reaches, deterministic steps of order 1 on
    the path (DDIM) lead to the first level that it reaches.
    """

    def __init__(
        self, sde: LinearSDE, solver: Solver, kappa: Tensor, signal: Tensor, noise: Tensor
    ) -> None:
        self.sde, self.solver = sde, check_steppable(solver)
        self.ends_at_data = bool(kappa[-1] == math.inf)
        self._signal, self._noise = signal.tolist(), noise.tolist()
        reach, _ = kappa_range(sde)
        #: Index of the first level that the process reaches.
        self.first = int((kappa < reach - _ROUNDING).sum())
        reached = slice(self.first, -1 if self.ends_at_data else None)
        levels = kappa[reached]
        #: Times of the process at the levels that it reaches, float64.
        self.times = times_of_kappa(sde, levels.clamp(min=reach), sde.regular_until)
        below = sde.kappa(self.times) < levels - _ROUNDING
        if bool(below.any()):
            raise ValueError(
                f"process must have noise levels down to σ = {float((-levels[-1]).exp()):.4g}; "
                f"{sde!r} has none below σ = {float((-sde.kappa(self.times[-1])).exp()):.4g}"
            )
        self._process = ReverseProcess(sde, AnnouncedScore())
        self._tables: dict[int, Any] = {}
        self._blocks = _Blocks.at(sde, self.times, noise[reached])
        self._prepared(0)
        self.reset()

    def reset(self) -> None:
        """Forget the state, before other samples."""
        self._next: int | None = None
        self._state: Tensor | None = None
        self._memory: Memory = ()
        self._origin = 0
        self._returned: tuple[Tensor, Tensor] | None = None

    def step(self, i: int, x: Tensor, data: Tensor, noise: NoiseSource) -> Tensor:
        """Advance x ``(B, *D)`` from level i to level i + 1, with the data prediction at x.

        A start at any level is a start from x, and a jump to another level is a new start. Between
        two steps, callers may change x: the state then has the new x and the old w.
        """
        if i != self._next:
            self.reset()
        self._next = i + 1
        exact = torch.promote_types(x.dtype, torch.float32)
        data = data.to(exact)
        if i + 2 == len(self._signal) and self.ends_at_data:
            return data.to(x.dtype, copy=True)
        if i < self.first:
            share = self._noise[i + 1] / self._noise[i]
            mixed: Tensor = (
                share * x.to(exact) + (self._signal[i + 1] - share * self._signal[i]) * data
            )
            return mixed.to(x.dtype)
        j, blocks = i - self.first, self._blocks
        if self._state is None:
            z = self._started(j, x.to(exact).unsqueeze(1), noise)
        else:
            z = self._changed(j, x)
        given = _Given(data.unsqueeze(1), blocks.score[self._origin :])
        tables, number = self._prepared(self._origin), j - self._origin
        self._state, self._memory = self.solver.step(z, self._memory, tables, number, given, noise)
        found = combine((blocks.seen[j + 1], self._state))[:, 0].to(x.dtype)
        self._returned = found, found.clone()
        self._version = None if found.is_inference() else found._version
        return found

    def _started(self, j: int, x: Tensor, noise: NoiseSource) -> Tensor:
        """State at time j with a new w."""
        self._origin = j
        terms = [(self._blocks.of_x[j], x)]
        if (rows := self.sde.components - 1) > 0:
            like = x.expand(-1, rows + 1, *(-1,) * (x.ndim - 2))
            terms.append((self._blocks.of_rest[j], noise.normal(like, rows)))
        return combine(*terms)

    def _changed(self, j: int, x: Tensor) -> Tensor:
        """State at time j with the x that the caller passes."""
        assert self._state is not None
        assert self._returned is not None
        z, (returned, copy) = self._state, self._returned
        # The object and its version tell without waiting for the device that x is the same.
        if x is returned and self._version is not None and x._version == self._version:
            return z
        if x.shape != copy.shape:
            raise ValueError(
                f"sample must keep its shape {tuple(copy.shape)} between steps; got "
                f"{tuple(x.shape)}. Start again with set_timesteps"
            )
        change = (x.to(z) - copy.to(z)).unsqueeze(1)
        return add_to(z.clone(), (self._blocks.of_x[j], change))

    def _prepared(self, origin: int) -> Any:
        """Tables of the solver for the times from an index on; None if there is no step."""
        times = self.times[origin:]
        if origin not in self._tables and len(times) > 1:
            with torch.inference_mode(False), torch.no_grad():
                self._tables[origin] = self.solver.prepare(self._process, times)
        return self._tables.get(origin)


def recommended_steps(
    sde: LinearSDE, solver: Solver | None, kappa: Tensor, signal: Tensor, noise: Tensor
) -> PathSteps:
    """Steps of `PathSteps` with a solver; None: the first recommended one that applies."""
    levels = kappa, signal, noise
    if solver is not None:
        return PathSteps(sde, solver, *levels)
    for found in solvers_of_levels(sde, kappa):
        with suppress(ValueError):  # try the next one, as `recommended_plan` does
            return PathSteps(sde, found, *levels)
    return PathSteps(sde, ExponentialEuler(), *levels)


class _Blocks(NamedTuple):
    """Blocks at each time of the process."""

    of_x: list[Block]  # L g/σ, from x to the state
    of_rest: list[Block]  # from k − 1 normals to the part of the state that x does not show
    seen: list[Block]  # σ gᵀL⁻¹, from the state to x
    score: list[tuple[Block, Block]]  # from state and data prediction to the driven score

    @classmethod
    def at(cls, sde: LinearSDE, times: Tensor, noise: Tensor) -> _Blocks:
        """Compute them from the noise σ of the path at the times."""
        root = (marginal := sde.marginal(times)).root
        whitening = triangular_inverse(root)
        signal = whitening @ marginal.mean[..., :1]
        g = signal / torch.linalg.vector_norm(signal, dim=-2, keepdim=True)
        eye = torch.eye(sde.components, dtype=torch.float64, device="cpu").expand_as(root)
        # The first column of an orthogonal basis is ±g. The others span the rest.
        basis = torch.linalg.qr(torch.cat([g, eye], dim=-1)).Q
        scale, score = noise[:, None, None], Conversion.at(sde, times, "data", "score")
        return cls(
            as_blocks(root @ g / scale),
            as_blocks(root @ basis[..., 1:]),
            as_blocks(scale * g.mT @ whitening),
            list(zip(as_blocks(score.state), as_blocks(score.value), strict=True)),
        )


class _Given(NamedTuple):
    """Score of one step from a data prediction that is known, see `ScoreAt`."""

    data: Tensor  # (B, 1, *D)
    blocks: list[tuple[Block, Block]]

    def __call__(self, z: Tensor, number: int, /) -> Tensor:
        state, value = self.blocks[number]
        return combine((state, z), (value, self.data))

    def data_prediction(self, z: Tensor, number: int, /) -> Tensor:
        return self.data


def check_steppable(solver: object) -> GridSolver:
    """Return a solver that evaluates the score once per step, at its start; raise otherwise."""
    found = check_solver(solver)
    if not (isinstance(found, GridSolver) and found.facts.score_at_start):
        raise ValueError(
            "solver must evaluate the score only at the start of a step, because the pipeline "
            f"evaluates the network once per step; {found!r} does not. Use ExponentialMultistep, "
            "Ancestral, ExponentialEuler, EulerMaruyama or ReverseDiffusion"
        )
    return found


class GeneratorNoise(NoiseSource):
    """Normals from a pipeline's generators, each of which draws for its samples."""

    def __init__(self, generator: Generators) -> None:
        self._generator = generator

    def normal(self, z: Tensor, rows: int) -> Tensor:
        """Draw ``(B, rows, *D)``."""
        shape = (len(z), rows, *z.shape[2:])
        return standard_normal(shape, generator=self._generator, dtype=z.dtype, device=z.device)


def streams_of(x: Tensor) -> SampleNoise:
    """One random stream per sample, which depends on the values of this sample alone.

    The values are read back once.
    """
    rows = x.detach().to("cpu", torch.float32).contiguous().numpy()
    digests = [hashlib.sha256(row.tobytes()).digest() for row in rows]
    return SampleNoise([int.from_bytes(found[:4], "little") for found in digests], key=_KEY)
