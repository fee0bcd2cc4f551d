"""A Brownian path that can be refined, with the integrals that a linear SDE makes of it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cldsde.linear.blocks import apply_blocks
from cldsde.linear.checks import as_times, check_state
from cldsde.linear.increments import carried_increments, increment_roots, split_rotations
from cldsde.linear.random import check_generator, keyed_normals
from cldsde.linear.sde import LinearSDE, check_process

from .combine import combine
from .noise import NoiseSource, PathNoise

__all__ = ["BrownianPath"]

_HALVINGS = 20  # of a cell between given times, before a time is met exactly


@dataclass(eq=False)
class _Node:
    """An interval of the path, and how its normals become those of its halves."""

    key: int
    start: float
    end: float
    first: int  # given times that it spans; the same number twice inside a cell
    last: int
    parent: _Node | None = None
    halvings: int = 0
    root: Tensor | None = None  # J = root ξ
    rotation: Tensor | None = None  # (ξ_earlier, ξ_later) = rotation (ξ, η)
    split: float = 0.0
    children: tuple[_Node, _Node] | None = None


_Reading = list[tuple[_Node, Tensor]]
"""A linear functional of the normals of some nodes, each with its block."""


class BrownianPath(NoiseSource):
    r"""A Brownian path w for each number of a batch, the same on every grid.

    Over an interval [s, t] the path knows its increment and the integral that the process makes
    of it,

    .. math:: ΔW = w(t) − w(s), \qquad I = ∫_s^t Ψ(t, τ)\,G(τ)\,dw(τ),

    They are jointly Gaussian and add up exactly, I_{s,t} = Ψ(t, r) I_{s,r} + I_{r,t}. The path
    stores an interval as normals ξ with (ΔW, I) = L ξ. To split an interval, it rotates ξ and as
    many new normals into the normals of the halves, so that the halves have their joint
    distribution. New normals depend on a seed and the interval alone, so intervals can be queried
    in any order.

    The path splits at the given times. It reaches another time by halving the cell around it 20
    times, and then exactly; each split costs a draw. So give the finest grid that you will use.
    The order of queries matters only for times closer than a millionth of a cell.

    Solvers of the reverse process use +ΔW of each step [u, t]. With a score of zero they add noise
    from t to u; they do not undo `evolve`.

    Parameters
    ----------
    sde
        The process: G and Ψ.
    times
        ``(n + 1,)``, increasing or decreasing, in [0, T], e.g. the finest grid to be solved on; the
        path lies between its ends.
    shape
        ``(B, *D)``: samples and shape of their data.
    generator
        Source of the path's seed; the same gives the same path on any device.
    integrals
        Whether to know I. Without it there are fewer normals to draw, and the path serves solvers
        that need ΔW alone: `EulerMaruyama`, `StochasticHeun` and most methods of `TorchSDE`.
    dtype, device
        Of the results.

    Raises
    ------
    ValueError
        If the times do not increase or decrease within [0, T], or the shape is not one.

    Examples
    --------
    The same path on two grids: the strong error of Euler–Maruyama halves with the step.

    >>> import torch
    >>> from cldsde import CLD, GaussianMixture, ReverseProcess, solvers
    >>> sde = CLD()
    >>> process = ReverseProcess(sde, GaussianMixture([1.0], [[0.3]], [[[0.25]]]).score(sde))
    >>> g = torch.Generator().manual_seed(0)
    >>> start = sde.prior.sample((500, 1), generator=g)
    >>> grids = [solvers.uniform_times(sde.T, 0.1, n) for n in (1024, 128, 64)]
    >>> path = solvers.BrownianPath(sde, grids[0], (500, 1), generator=g)
    >>> ends = [
    ...     solvers.solve(process, solvers.EulerMaruyama(), start, grid, noise=path).state
    ...     for grid in grids
    ... ]
    >>> errors = [float((end - ends[0]).square().mean().sqrt()) for end in ends[1:]]
    >>> 1.6 < errors[1] / errors[0] < 2.9
    True
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
        given = as_times(times, "times", sde.T)
        if given.ndim != 1 or len(given) < 2:
            msg = f"times must be a tensor (n + 1,), n ≥ 1; got shape {tuple(given.shape)}"
            raise ValueError(msg)
        if bool(given[0] > given[-1]):
            given = given.flip(0)
        if not bool((given.diff() > 0).all()):
            msg = "times must increase or decrease"
            raise ValueError(msg)
        if not len(shape) or min(shape) < 0:
            msg = f"shape must be (B, *D); got {tuple(shape)}"
            raise ValueError(msg)
        self._sde, self._integrals = sde, integrals
        self._shape, self._dtype, self._device = tuple(shape), dtype, torch.device(device)
        self._columns = sde.diffusion(given[0]).shape[-1]
        self._size = self._columns + (sde.components if integrals else 0)
        check_generator(generator, several=False)
        on = "cpu" if generator is None else generator.device
        self._seed = int(torch.randint(2**62, (), generator=generator, device=on))
        self._times: list[float] = given.tolist()
        self._top = self._build()
        # The latest pair of halves at each depth, with the key of what they are halves of: all that
        # a walk along a grid comes back to. It takes the memory of the pair before: new memory of
        # the size of images costs as much as the sums.
        self._pairs: dict[int, tuple[int, Tensor]] = {}
        self._scratch: Tensor | None = None
        self._lock = threading.Lock()  # of these and of the tree

    def __getstate__(self) -> dict[str, Any]:
        """All but what is found again when it is asked for."""
        return {**self.__dict__, "_pairs": {}, "_scratch": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def increment(self, s: float, t: float) -> Tensor:
        """ΔW over [s, t], ``(B, m, *D)``, for s < t; m is the number of columns of G.

        Raises
        ------
        ValueError
            If s < t do not lie between the path's ends.
        """
        return self._part(s, t, slice(self._columns))

    def integral(self, s: float, t: float) -> Tensor:
        """∫Ψ(t, τ) G dw over [s, t], ``(B, k, *D)``, for s < t.

        Raises
        ------
        ValueError
            If s < t do not lie between the path's ends, or the path has no integrals.
        """
        self._check_integrals("integral")
        return self._part(s, t, slice(self._columns, None))

    def _part(self, s: float, t: float, rows: slice) -> Tensor:
        """Rows of (ΔW, I) over [s, t]."""
        eye = torch.eye(self._size, dtype=torch.float64, device="cpu")
        return self._value(self._read([(s, t)], [eye[rows]])[0])

    def evolve(self, z: Tensor, s: float, t: float) -> Tensor:
        """The process at time t > s exactly, from states ``(B, k, *D)`` at s, along the path.

        Raises
        ------
        ValueError
            If s < t do not lie between the path's ends, or the path has no integrals.
        """
        check_state(z, self._sde.components)
        moved = apply_blocks(self._sde.transition_matrix(s, t), z)
        return moved + self.integral(s, t).to(z)

    def normal(self, z: Tensor, rows: int) -> Tensor:
        """Raise RuntimeError: normals of a path belong to an interval; see `along`."""
        msg = "a BrownianPath is read along a grid; pass it to solve as noise"
        raise RuntimeError(msg)

    def along(
        self, sde: LinearSDE, times: Tensor, functionals: Callable[[], PathNoise | None]
    ) -> NoiseSource:
        """The normals of a solver's steps over a decreasing grid.

        Raises
        ------
        ValueError
            If the solver's noise is no functional of the path, the grid leaves it, or the process
            is another.
        """
        noise = functionals()
        if noise is None:
            msg = (
                "noise: the solver does not draw increments or integrals of a Brownian path; "
                "EulerMaruyama, StochasticHeun, ExponentialEuler and ReverseDiffusion do, and a "
                "solver of your own needs `path_noise`"
            )
            raise ValueError(msg)
        if noise.time_integral is not None:
            msg = "noise: BrownianPath has no integral over time, which this solver needs"
            raise ValueError(msg)
        if sde is not self._sde:
            msg = "noise: this BrownianPath was made for another process; make it with process.sde"
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
            msg = f"{what} needs a path with integrals=True"
            raise ValueError(msg)

    def _read(self, intervals: list[tuple[float, float]], blocks: list[Tensor]) -> list[_Reading]:
        """Linear functionals block · (ΔW, I) of intervals, as functionals of nodes' normals."""
        low, high = self._times[0], self._times[-1]
        for s, t in intervals:
            if not low <= s < t <= high:
                msg = (
                    f"an interval of the path must have {low:g} ≤ s < t ≤ {high:g}; got [{s}, {t}]"
                )
                raise ValueError(msg)
        with self._lock:
            self._refine(sorted({at for interval in intervals for at in interval}))
        return [
            [
                (node, block @ self._carried(node, t) @ _root(node))
                for node in self._cover(self._top, s, t)
            ]
            for (s, t), block in zip(intervals, blocks, strict=True)
        ]

    def _value(self, reading: _Reading) -> Tensor:
        """What was read, ``(B, rows, *D)``."""
        # From the latest node on, because solvers walk down in time and the path keeps the latest
        # pairs; one by one, because a pair takes the memory of the one before.
        value: Tensor | None = None
        with self._lock:
            for node, block in reversed(reading):
                part = _sum([block], [self._normals(node)])
                value = part if value is None else value.add_(part)
        assert value is not None
        return value.view(len(value), *self._shape).transpose(0, 1)

    def _carried(self, node: _Node, t: float) -> Tensor:
        """What a node contributes at a later time; one by one, as batches are rounded otherwise."""
        ends = _doubles([node.end]), _doubles([t])
        return carried_increments(self._sde, *ends, integrals=self._integrals)[0]

    def _cover(self, node: _Node, s: float, t: float) -> list[_Node]:
        """The largest nodes that make up [s, t]."""
        if node.end <= s or node.start >= t:
            return []
        if s <= node.start and node.end <= t:
            return [node]
        assert node.children is not None
        return [part for child in node.children for part in self._cover(child, s, t)]

    def _build(self) -> _Node:
        """The tree over the given times, its laws from the cells upwards."""
        top = _Node(1, self._times[0], self._times[-1], 0, len(self._times) - 1)
        levels = [[top]]
        while levels[-1]:
            levels.append([])
            for node in levels[-2]:
                if node.last - node.first > 1:
                    middle = (node.first + node.last) // 2
                    self._halve(node, self._times[middle], middle)
                    assert node.children is not None
                    levels[-1] += node.children
        self._set_roots([node for level in levels for node in level if node.children is None])
        for level in reversed(levels):
            self._set_rotations([node for node in level if node.children is not None])
        return top

    def _refine(self, stops: list[float]) -> None:
        """Split cells until every stop is the end of one."""
        frontier = [(self._top, stops)]
        while frontier:
            node, near = frontier.pop()
            inside = [at for at in near if node.start < at < node.end]
            if not inside:
                continue
            if node.children is None:
                middle = (node.start + node.end) / 2
                deep = node.halvings >= _HALVINGS or not node.start < middle < node.end
                self._halve(node, inside[0] if deep else middle)
                # One by one, as batches are rounded otherwise.
                self._set_roots(list(node.children or ()))
                self._set_rotations([node])
            frontier += [(child, inside) for child in node.children or ()]

    def _halve(self, node: _Node, split: float, middle: int | None = None) -> None:
        first, last = node.first, node.last
        ends = (first, middle, middle, last) if middle is not None else (first, first, first, first)
        halvings = node.halvings if middle is not None else node.halvings + 1
        node.split = split
        node.children = (
            _Node(2 * node.key, node.start, split, ends[0], ends[1], node, halvings),
            _Node(2 * node.key + 1, split, node.end, ends[2], ends[3], node, halvings),
        )

    def _set_roots(self, nodes: list[_Node]) -> None:
        """Roots of the joint distribution of (ΔW, I) over nodes."""
        if nodes:
            s, t = _doubles([node.start for node in nodes]), _doubles([node.end for node in nodes])
            roots = increment_roots(self._sde, s, t, integrals=self._integrals)
            for node, root in zip(nodes, roots, strict=True):
                node.root = root

    def _set_rotations(self, nodes: list[_Node]) -> None:
        """Rotations that split nodes, and their roots if none is known yet."""
        if not nodes:
            return
        halves = [child.root for node in nodes for child in node.children or ()]
        roots = torch.stack([root for root in halves if root is not None])
        split, end = (
            _doubles([node.split for node in nodes]),
            _doubles([node.end for node in nodes]),
        )
        carried = carried_increments(self._sde, split, end, integrals=self._integrals)
        rotations, joint = split_rotations(carried @ roots[::2], roots[1::2])
        for node, rotation, root in zip(nodes, rotations, joint, strict=True):
            node.rotation = rotation
            node.root = root if node.root is None else node.root

    def _normals(self, node: _Node) -> Tensor:
        """Normals of a node, ``(r, N)`` for N numbers of a batch; they last until others are asked.

        Those of a node's ancestors last longer.
        """
        depth, size, parent = node.key.bit_length(), self._size, node.parent
        # Taken out while it is written to: a sum that is interrupted leaves none.
        whole, both = self._pairs.pop(depth, (-1, None))
        if both is None:
            both = self._memory(size if parent is None else 2 * size)
        if whole != node.key >> 1:
            if parent is None:
                both.copy_(self._draw(node, node.end))
            else:
                above, fresh = self._normals(parent), self._draw(parent, parent.split)
                assert parent.rotation is not None
                _sum(parent.rotation.chunk(2, dim=1), (above, fresh), out=both)
        self._pairs[depth] = (node.key >> 1, both)
        return both[size:] if parent is not None and node.key % 2 else both[:size]

    def _draw(self, node: _Node, split: float) -> Tensor:
        """Normals of a node's own, ``(r, N)``, which last until the next are drawn."""
        # Keyed, so that no order of asking matters; the split tells apart times met exactly.
        bits = int(np.float64(split).view(np.uint64))
        key = np.random.SeedSequence([self._seed, node.key, bits])
        count = self._size * math.prod(self._shape)
        if self._scratch is None:
            precision = torch.promote_types(self._dtype, torch.float32)
            with torch.inference_mode(mode=False):
                self._scratch = torch.empty(2, 2, (count + 1) // 2, dtype=precision, device="cpu")
        drawn = keyed_normals(key, *self._scratch)[:count]
        return drawn.view(self._size, -1).to(self._device, self._dtype)

    def _memory(self, rows: int) -> Tensor:
        # Memory of inference could not be written to outside it.
        with torch.inference_mode(mode=False):
            size = rows, math.prod(self._shape)
            return torch.empty(size, dtype=self._dtype, device=self._device)


def _sum(blocks: Sequence[Tensor], normals: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """Σ block · normals, ``(rows, N)``, in the normals' precision."""
    like = normals[0]
    if out is None:
        out = like.new_empty(len(blocks[0]), like.shape[1])
    # Many rows and columns are several times faster as a product.
    if like.device.type == "cpu" and _products_are_exact(like.dtype):
        (block, *others), (first, *rest) = blocks, normals
        torch.mm(block.to(like), first, out=out)
        for block, x in zip(others, rest, strict=True):
            out.addmm_(block.to(like), x)
        return out
    terms = [(block.tolist(), x.mT) for block, x in zip(blocks, normals, strict=True)]
    return combine(*terms, out=out.mT).mT


def _products_are_exact(dtype: torch.dtype) -> bool:
    """Whether products on the host are of the precision of their factors."""
    if torch.is_autocast_enabled("cpu"):
        return False
    if dtype != torch.float32:
        return dtype == torch.float64
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set for some backends alone
        return False


def _doubles(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _root(node: _Node) -> Tensor:
    assert node.root is not None
    return node.root


class _StepNoise(NoiseSource):
    """The normals of one solve, step by step."""

    def __init__(self, path: BrownianPath, readings: list[_Reading]) -> None:
        self._path, self._coming = path, iter(readings)
        self._drawn = len(readings[0][0][1])

    def check(self, z: Tensor) -> None:
        """Reject states of another shape than the path's."""
        rows = self._drawn
        shape, (batch, *data) = (len(z), rows, *z.shape[2:]), self._path._shape
        if shape != (batch, rows, *data):
            msg = f"noise: the solver asks for shape {shape}; the path has {(batch, rows, *data)}"
            raise ValueError(msg)

    def normal(self, z: Tensor, rows: int) -> Tensor:
        """Return the normals of the next step."""
        return self._path._value(next(self._coming)).to(z)
