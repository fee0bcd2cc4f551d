"""Inpainting and imputation by the replacement method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from cldsde.linear.checks import as_integer, described
from cldsde.score import ReverseProcess
from cldsde.score.operators import Copies

from .base import (
    Facts,
    GridSolver,
    Memory,
    ScoreAt,
    ShiftedScore,
    Solver,
    check_solver,
    check_state_on_grid,
    evaluations_per_step,
)
from .combine import Block, as_blocks, combine
from .noise import NoiseSource


class _Tables(NamedTuple):
    inner: Any
    evaluations: int  # score evaluations of each inner step; 0 if no group is repeated
    replaces: bool  # whether the mask marks any entry
    mean: list[Block]  # of the state given the data, at each time of the grid
    root: list[Block]
    back_mean: list[Block]  # the forward transition to the start of the group, after each step
    back_root: list[Block]


@dataclass(frozen=True, eq=False, repr=False)
class Imputation(GridSolver):
    r"""Inpainting and imputation by the replacement method, around another solver.

    The method is from Y. Song et al. 2021, §5 and appendix I.2, and its repetition of steps from
    RePaint (Lugmayr et al. 2022).

    .. math:: z_t ← (1 − m)\,z_t + m\,(ψ_t x + L_t ξ), \qquad ψ_t = Ψ(t, 0) e_0,

    with the mask m and the known data x, at the start and after each step of the solver. The new
    values, and velocities if there are any, are a sample of their exact distribution given x.

    If the grid ends at t = 0, the known entries of the result are exact. Otherwise they carry the
    noise of the last time, or a small error with ``denoise=True``. `impose` sets them exactly.
    Arguments that do not fit raise a ValueError or TypeError.

    Even on fine grids the samples are not from the posterior. `PosteriorScore` with its default
    method and `sample_posterior` are closer.

    Parameters
    ----------
    solver
        A solver with a state at each time of a fixed grid, such as ``SSCS()``, whose half-steps are
        not merged then.
    known
        Known data ``(*D)``, or ``(B, *D)`` per sample; floating point and finite, in the scale of
        the data. Entries outside of the mask may hold any number.
    mask
        Boolean, broadcasts with ``known``; True for known entries.
    basis
        Orthonormal basis ``(C, C)`` of the first data axis, such as colour channels, one vector per
        row. The mask, but not ``known``, is in its coordinates. None: the axis itself.
    resample
        Number of times that each group of steps is taken, ≥ 1. Before each repetition the state
        returns along the forward process to the group's start. NFE grow by this factor.
    jump
        Number of steps in a group, ≥ 1. If noise enters the velocity alone, a jump of 1 increases
        the error, because the data hardly move over one step. For CLD and two Gaussian numbers
        about a fifth of the grid was best; for VP, 1.

    Notes
    -----
    Each replacement and each return to a group's start draws noise for the whole state. If the mask
    marks no entry, replacements draw no noise, and ``resample=1`` gives the bits of
    ``solver.on_grid()``. `solve` counts all repetitions of a group as part of its last step. No
    order is claimed, because no grid reduces the error of the replacement.

    Examples
    --------
    A time series of four values, the first two of which are known:

    >>> import torch
    >>> from cldsde import ReverseProcess, VPSDE, solvers
    >>> process = ReverseProcess(VPSDE(), lambda z, t: -z)  # values are independent N(0, 1)
    >>> g = torch.Generator().manual_seed(0)
    >>> first = torch.tensor([True, True, False, False])
    >>> imputation = solvers.Imputation(solvers.EulerMaruyama(), torch.full((4,), 0.5), first)
    >>> start = process.sde.prior.sample((8, 4), generator=g)
    >>> times = solvers.quadratic_times(1.0, 1e-3, 20)
    >>> data = solvers.solve(process, imputation, start, times, generator=g).data
    >>> imputation.impose(data)[0, :2]
    tensor([0.5000, 0.5000])
    """

    solver: Solver
    known: Tensor
    mask: Tensor
    basis: Tensor | None = None
    resample: int = 1
    jump: int = 10
    _stepper: GridSolver = field(init=False)  # the solver without merged steps
    _copies: tuple[Copies, Copies] = field(init=False)  # of the known data and the mask
    _bases: tuple[Block, Block] | None = field(init=False)  # to the coordinates of the mask, back

    def __post_init__(self) -> None:
        stepper = check_solver(self.solver).on_grid()
        check_state_on_grid(stepper, "solver", "SSCS or EulerMaruyama")
        _check_known(self.known, self.mask)
        # Copy the data, because the caller may change them.
        object.__setattr__(self, "known", self.known.clone())
        bases = None if self.basis is None else _checked_bases(self.basis, self.known.shape)
        as_integer(self.resample, 1, "resample")
        as_integer(self.jump, 1, "jump")
        object.__setattr__(self, "_stepper", stepper)
        object.__setattr__(self, "_copies", (Copies(self.known), Copies(self.mask)))
        object.__setattr__(self, "_bases", bases)

    def __repr__(self) -> str:
        basis = None if self.basis is None else tuple(self.basis.shape)
        return (
            f"Imputation(solver={self.solver!r}, known={tuple(self.known.shape)}, "
            f"mask={tuple(self.mask.shape)}, basis={basis}, resample={self.resample}, "
            f"jump={self.jump})"
        )

    @property
    def facts(self) -> Facts:
        """The inner solver's processes; no orders."""
        inner = self.solver.facts
        return Facts(applies_to=inner.applies_to, nfe_per_step=self.resample * inner.nfe_per_step)

    def part(self, samples: slice, shape: Sequence[int]) -> Self:
        """The solver for some samples: data and mask keep their rows if there is one per sample."""
        if self.known.shape == tuple(shape[1:]):
            return self
        if self.known.shape != tuple(shape):
            raise ValueError(
                f"known must have shape {tuple(shape[1:])}, or {tuple(shape)} with data per "
                f"sample; got {tuple(self.known.shape)}"
            )
        rows = self.mask.ndim == len(shape) and len(self.mask) > 1
        mask = self.mask[samples] if rows else self.mask
        return replace(self, known=self.known[samples], mask=mask)

    def prepare(self, process: ReverseProcess, times: Tensor) -> _Tables:
        """Tables of the solver, and the distribution of known data at each time of the grid."""
        solver, sde = self._stepper, process.sde
        evaluations = 0
        if self.resample > 1:
            evaluations = evaluations_per_step(solver, process, times, "solver")
        # Condition on x alone, not on z_0: the velocity at time 0 is part of the noise.
        given = sde.marginal(times)
        starts = torch.arange(len(times) - 1, device="cpu") // self.jump * self.jump
        back = sde.transition(times[1:], times[starts])
        return _Tables(
            solver.prepare(process, times),
            evaluations,
            bool(self.mask.any()),
            as_blocks(given.mean[..., :1]),
            as_blocks(given.root),
            as_blocks(back.mean),
            as_blocks(back.root),
        )

    def evaluation_times(self, process: ReverseProcess, times: Tensor) -> Tensor:
        """Evaluation times of the solver, with each group repeated ``resample`` times."""
        once = self._stepper.evaluation_times(process, times)
        if self.resample == 1:
            return once
        groups = torch.split(once.reshape(len(times) - 1, -1), self.jump)
        return torch.cat([group.repeat(self.resample, 1).flatten() for group in groups])

    def step(
        self, z: Tensor, memory: Memory, tables: _Tables, i: int, score: ScoreAt, noise: NoiseSource
    ) -> tuple[Tensor, Memory]:
        """Step and replace; at the end of a group, return to its start and repeat the group."""
        if i == 0:
            self._check_fit(z[:, 0], "state")
            z = self._replace(z, tables, 0, noise)
        first = i // self.jump * self.jump
        end = min(first + self.jump, len(tables.back_mean))
        repetitions = range(1, self.resample if i + 1 == end else 1)
        for repetition, j in ((0, i), *product(repetitions, range(first, end))):
            if repetition > 0 and j == first:
                xi = noise.normal(z, z.shape[1])
                z = combine((tables.back_mean[i], z), (tables.back_root[i], xi))
            # Earlier groups are repeated, and so is this one.
            steps_before = (self.resample - 1) * first + repetition * (end - first)
            shifted = ShiftedScore(score, tables.evaluations * steps_before)
            z, memory = self._stepper.step(z, memory, tables.inner, j, shifted, noise)
            if memory and self.resample > 1:
                raise ValueError(
                    "solver must be a one-step solver if resample is above 1; "
                    f"got {self.solver!r}. Use SSCS or EulerMaruyama"
                )
            z = self._replace(z, tables, j + 1, noise)
        return z, memory

    def impose(self, data: Tensor) -> Tensor:
        """Set the known part of data ``(B, *D)`` exactly; up to rounding if there is a basis.

        Raises a ValueError if the data do not fit ``known``.
        """
        self._check_fit(data, "data")
        known = self._copies[0].like(data).expand_as(data)
        return self._merge(data.unsqueeze(1), known.unsqueeze(1)).squeeze(1)

    def _replace(self, z: Tensor, tables: _Tables, i: int, noise: NoiseSource) -> Tensor:
        """Replace the known part of the state at time i by a new sample."""
        if not tables.replaces:
            return z
        known = self._copies[0].like(z).expand_as(z[:, 0]).unsqueeze(1)
        xi = noise.normal(z, z.shape[1])
        return self._merge(z, combine((tables.mean[i], known), (tables.root[i], xi)))

    def _merge(self, z: Tensor, known: Tensor) -> Tensor:
        """Take known entries from ``known`` and the rest from ``z``, both ``(B, k, *D)``."""
        mask = self._copies[1].like(z).expand_as(z[:, 0]).unsqueeze(1)
        if self._bases is None:
            return torch.where(mask, known, z)
        to_basis, from_basis = self._bases
        return z + _on_channels(from_basis, _on_channels(to_basis, known - z) * mask)

    def _check_fit(self, data: Tensor, name: str) -> None:
        shape = data.shape
        fits = self.known.shape in (shape, shape[1:])
        if not fits or (self.basis is not None and self.basis.shape[0] != shape[1]):
            raise ValueError(
                f"{name} must hold data of the shape of known, {tuple(self.known.shape)}, with or "
                f"without a batch axis; got {tuple(shape)}"
            )


def _on_channels(block: Block, x: Tensor) -> Tensor:
    """Apply a block to the first data axis of ``(B, k, C, …)``."""
    return combine((block, x.transpose(1, 2))).transpose(1, 2)


def _check_known(known: object, mask: object) -> None:
    if not isinstance(known, Tensor) or not known.is_floating_point():
        raise TypeError(f"known must be a floating-point tensor; got {described(known)}")
    if known.ndim < 1:
        raise ValueError("known must have shape (*D) or (B, *D); got a single number")
    if not bool(known.isfinite().all()):
        msg = "known must be finite, also outside of the mask; got NaN or infinity. Put 0 there"
        raise ValueError(msg)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        msg = f"mask must be a boolean tensor, True for known entries; got {described(mask)}"
        raise TypeError(msg)
    sizes = zip(reversed(mask.shape), reversed(known.shape), strict=False)
    if mask.ndim > known.ndim or not all(a in (1, b) for a, b in sizes):
        msg = f"mask must broadcast with known, {tuple(known.shape)}; got {tuple(mask.shape)}"
        raise ValueError(msg)


def _checked_bases(basis: object, known: torch.Size) -> tuple[Block, Block]:
    """Blocks to the coordinates of an orthonormal basis, and back."""
    if not isinstance(basis, Tensor) or not basis.is_floating_point():
        raise TypeError(f"basis must be a floating-point tensor or None; got {basis!r}")
    if basis.ndim != 2 or basis.shape[0] != basis.shape[1] or basis.shape[0] not in known[:2]:
        raise ValueError(
            f"basis must be (C, C) for the first data axis of known, {tuple(known)}, one vector "
            f"per row; got {tuple(basis.shape)}"
        )
    rows = basis.detach().cpu().to(torch.float64)
    eye = torch.eye(len(rows), dtype=torch.float64, device="cpu")
    error = float((rows @ rows.mT - eye).abs().max())
    # Rounding the vectors to single precision causes an error of up to 2·eps.
    if not error <= 4 * torch.finfo(torch.float32).eps:
        msg = f"basis must be orthonormal; got products of its vectors with an error of {error:.2g}"
        raise ValueError(msg)
    return basis.tolist(), basis.mT.tolist()
