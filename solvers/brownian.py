"""Brownian path that can be refined, with the stochastic integrals of a linear SDE."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import as_times, check_state
from cldsde.linear.identity import same_process
from cldsde.linear.increments import IncrementTree, Interval
from cldsde.linear.random import check_generator, keyed_normals
from cldsde.linear.sde import LinearSDE, check_process

from .combine import combine
from .noise import NoiseSource, PathNoise

_Reading = list[tuple[Interval, Tensor]]
"""A linear functional of the normals of some intervals, each with its block."""


class BrownianPath(NoiseSource):
    r"""Brownian path w for each number of a batch, the same on every grid.

    Over an interval [s, t] the path has an increment and a stochastic integral of the process,

    .. math:: ΔW = w(t) − w(s), \qquad I = ∫_s^t Ψ(t, τ)\,G(τ)\,dw(τ).

    They are jointly Gaussian and add up exactly, I_{s,t} = Ψ(t, r) I_{s,r} + I_{r,t}. Intervals can
    be queried in any order. The result does not depend on the order, except for queried times
    closer to each other than a millionth of a cell. A cell lies between two given times.

    The path splits at the given times. To reach another time, it bisects the cell around that time
    up to 20 times and then splits exactly there. Each split costs a draw, so pass the finest grid
    that you will use. The page "Adaptive steps and Brownian bridges" has an example.

    As ``noise`` of `solve` it serves several grids or solvers. Solvers of the reverse process use
    +ΔW of each step [u, t]. With a score of zero they add noise from t to u; they do not undo
    `evolve`.

    Parameters
    ----------
    sde
        The process, which defines G and Ψ.
    times
        ``(n + 1,)``, increasing or decreasing, in [0, T], e.g. the finest grid to be solved on. The
        path lies between its ends. Other times raise a ValueError.
    shape
        ``(B, *D)``: number of samples and shape of one sample's data.
    generator
        Source of the path's seed. The same seed gives the same path on any device.
    integrals
        Whether the path includes I. Without it the path draws fewer normals, and serves solvers
        that need ΔW alone: `EulerMaruyama`, `StochasticHeun` and most methods of `TorchSDE`.
    dtype, device
        Dtype and device of the results.
    """

    def __init__(
        self,
        sde: LinearSDE,
        times: Tensor,
        shape: Sequence[int],
        *,
        generator: torch.Generator | None = None,
        integrals: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        check_process(sde)
        given = as_times(times, "times")
        if given.ndim != 1 or len(given) < 2:
            msg = f"times must be a tensor (n + 1,), n ≥ 1; got shape {tuple(given.shape)}"
            raise ValueError(msg)
        if bool(given[0] > given[-1]):
            given = given.flip(0)
        if not bool((given.diff() > 0).all()):
            raise ValueError("times must increase or decrease")
        if not len(shape) or min(shape) < 0:
            raise ValueError(f"shape must be (B, *D); got {tuple(shape)}")
        self._sde, self._integrals = sde, integrals
        self._shape, self._dtype, self._device = tuple(shape), dtype, torch.device(device)
        check_generator(generator, several=False)
        on = "cpu" if generator is None else generator.device
        self._seed = int(torch.randint(2**62, (), generator=generator, device=on))
        self._tree = IncrementTree(sde, given, integrals=integrals)
        self._size, self._columns = self._tree.size, self._tree.columns
        # Keep the latest pair of halves at each depth, with the key of their parent, because a walk
        # along a grid returns to no others. A new pair reuses the memory of the previous pair:
        # allocating memory for images takes as long as the sums.
        self._pairs: dict[int, tuple[int, Tensor]] = {}
        self._scratch: Tensor | None = None
        self._lock = threading.Lock()  # guards the pairs, the scratch memory and the tree

    def __getstate__(self) -> dict[str, Any]:
        """State without the cached normals, which are drawn again when needed."""
        return {**self.__dict__, "_pairs": {}, "_scratch": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def increment(self, s: float, t: float) -> Tensor:
        """ΔW over [s, t], ``(B, m, *D)``, for s < t; m is the number of columns of G.

        Raises a ValueError unless s < t lie between the path's ends.
        """
        return self._part(s, t, slice(self._columns))

    def integral(self, s: float, t: float) -> Tensor:
        """∫Ψ(t, τ) G dw over [s, t], ``(B, k, *D)``, for s < t.

        Raises the error of `increment`, or a ValueError if the path has no integrals.
        """
        self._check_integrals("integral")
        return self._part(s, t, slice(self._columns, None))

    def _part(self, s: float, t: float, rows: slice) -> Tensor:
        """Rows of (ΔW, I) over [s, t]."""
        eye = torch.eye(self._size, dtype=torch.float64, device="cpu")
        return self._value(self._read([(s, t)], [eye[rows]])[0])

    def _read(self, intervals: list[tuple[float, float]], blocks: list[Tensor]) -> list[_Reading]:
        with self._lock:
            return self._tree.read(intervals, blocks)

    def evolve(self, z: Tensor, s: float, t: float) -> Tensor:
        """Exact solution of the forward process at t > s, from states ``(B, k, *D)`` at s.

        Raises the errors of `integral`.
        """
        check_state(z, self._sde.components)
        return apply_blocks(self._sde.transition_matrix(s, t), z) + self.integral(s, t).to(z)

    def normal(self, z: Tensor, rows: int) -> Tensor:
        """Raise RuntimeError, because normals of a path belong to an interval; see `along`."""
        msg = "a BrownianPath has no normals without an interval; pass it to solve(..., noise=path)"
        raise RuntimeError(msg)

    def along(
        self, sde: LinearSDE, times: Tensor, functionals: Callable[[], PathNoise | None]
    ) -> NoiseSource:
        """Noise source for the steps of one solver over a decreasing grid."""
        noise = functionals()
        if noise is None:
            raise ValueError(
                "noise must not be a BrownianPath for this solver, which does not draw increments "
                "or integrals of one; use EulerMaruyama, StochasticHeun, ExponentialEuler or "
                "ReverseDiffusion, or define `path_noise` on your own solver"
            )
        if noise.time_integral is not None:
            raise ValueError(
                "noise must not be a BrownianPath for this solver, which needs ∫(τ − u) dw over a "
                "step; use TorchSDE(method='heun') or StochasticHeun"
            )
        if not same_process(sde, self._sde):
            msg = f"noise must be a BrownianPath of {sde!r}; got one of {self._sde!r}"
            raise ValueError(msg)
        if bool(noise.integral.any()):
            self._check_integrals("noise of this solver")
        blocks = noise.integral.new_zeros(*noise.integral.shape[:2], self._size)
        blocks[..., : noise.increment.shape[-1]] = noise.increment
        if self._integrals:
            blocks[..., self._columns :] = noise.integral
        ends = times.tolist()
        steps = list(zip(ends[1:], ends[:-1], strict=True))
        return _StepNoise(self, self._read(steps, list(blocks)))

    def _check_integrals(self, what: str) -> None:
        if not self._integrals:
            msg = f"{what} needs a BrownianPath with integrals=True; got integrals=False"
            raise ValueError(msg)

    def _value(self, reading: _Reading) -> Tensor:
        """Evaluate a reading, ``(B, rows, *D)``."""
        # Start at the latest node, because solvers walk down in time and the path keeps the latest
        # pairs. Add nodes one by one, because a pair reuses the memory of the previous pair.
        with self._lock:
            parts = (_sum([block], [self._normals(node)]) for node, block in reversed(reading))
            value = functools.reduce(Tensor.add_, parts)
        return value.view(len(value), *self._shape).transpose(0, 1)

    def _normals(self, node: Interval) -> Tensor:
        """Normals of a node, ``(r, N)`` for N numbers of a batch.

        They stay valid until the normals of another node of the same depth are computed.
        """
        depth, size, parent = node.key.bit_length(), self._size, node.parent
        # Remove the pair while it is written to, so that an interrupted sum leaves no wrong pair.
        whole, both = self._pairs.pop(depth, (-1, None))
        if both is None:
            shape = size if parent is None else 2 * size, math.prod(self._shape)
            # A tensor allocated in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                both = torch.empty(shape, dtype=self._dtype, device=self._device)
        if whole != node.key >> 1:
            if parent is None:
                both.copy_(self._draw(node, node.end))
            else:
                above, fresh = self._normals(parent), self._draw(parent, parent.children[0].end)
                _sum(parent.rotation.chunk(2, dim=1), (above, fresh), out=both)
        self._pairs[depth] = (node.key >> 1, both)
        return both[size:] if parent is not None and node.key % 2 else both[:size]

    def _draw(self, node: Interval, split: float) -> Tensor:
        """Fresh normals of a node, ``(r, N)``, valid until the next draw."""
        # Seed the draw by node and split time, so that the order of queries does not matter.
        bits = int(np.float64(split).view(np.uint64))
        stream = np.random.PCG64DXSM(np.random.SeedSequence([self._seed, node.key, bits]))
        count = self._size * math.prod(self._shape)
        if self._scratch is None:
            size = 2, 2, 1, (count + 1) // 2
            precision = torch.promote_types(self._dtype, torch.float32)
            with torch.inference_mode(False):
                self._scratch = torch.empty(size, dtype=precision, device="cpu")
        drawn = keyed_normals([stream], *self._scratch).flatten()[:count]
        return drawn.view(self._size, -1).to(self._device, self._dtype)


def _sum(blocks: Sequence[Tensor], normals: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """Σ block · normals, ``(rows, N)``, in the normals' precision."""
    like = normals[0]
    if out is None:
        out = like.new_empty(len(blocks[0]), like.shape[1])
    # On the CPU a matrix product is several times faster than a sum over rows and columns.
    if like.device.type == "cpu" and _products_are_exact(like.dtype):
        (block, *others), (first, *rest) = blocks, normals
        torch.mm(block.to(like), first, out=out)
        for block, x in zip(others, rest, strict=True):
            out.addmm_(block.to(like), x)
        return out
    terms = [(block.tolist(), x.mT) for block, x in zip(blocks, normals, strict=True)]
    return combine(*terms, out=out.mT).mT


def _products_are_exact(dtype: torch.dtype) -> bool:
    """Whether matrix products on the CPU have the full precision of their factors."""
    if torch.is_autocast_enabled("cpu"):
        return False
    if dtype != torch.float32:
        return dtype == torch.float64
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # the precision was set per backend, and has no single value
        return False


class _StepNoise(NoiseSource):
    """Normals of one solve, one draw per step."""

    def __init__(self, path: BrownianPath, readings: list[_Reading]) -> None:
        self._path, self._coming = path, iter(readings)

    def check(self, z: Tensor) -> None:
        shape = (len(z), *z.shape[2:])
        if shape != self._path._shape:
            raise ValueError(
                f"noise must have shape {shape}, (B, *D) of the states; got a BrownianPath of "
                f"shape {self._path._shape}"
            )

    def normal(self, z: Tensor, rows: int) -> Tensor:
        return self._path._value(next(self._coming)).to(z)
