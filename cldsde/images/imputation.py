"""Images of which a part is known: inpainting, colourisation, imputation in general.

The replacement method of Song et al. (2021, §5 and appendix I.2): a sampler goes on as if nothing
were known, and after each of its steps the known part of the state is replaced by a draw from its
exact law at that time given the data, so that the rest is drawn to fit it. Where a process has a
velocity, that of the known part is replaced, too.

What is drawn for the rest is not its law given the known part, however fine the grid: a sampler's
step looks at the known part through the noise of its time, drawn anew each time, and nothing that
comes later makes up for it. Of two Gaussian pixels of correlation 0.8 the unknown one goes 0.62 of
the way to its conditional mean. Where steps are repeated, it goes further (Lugmayr et al. 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from cldsde.score import ReverseProcess
from cldsde.solvers.authoring import (
    Block,
    Facts,
    GridSolver,
    Memory,
    NoiseSource,
    ScoreAt,
    ShiftedScore,
    Solver,
    as_blocks,
    check_solver,
    combine,
)

__all__ = ["Imputation", "grey_basis"]


def grey_basis() -> Tensor:
    """Orthonormal basis of the three channels whose first vector is grey, for colourisation.

    Returns
    -------
    Tensor
        ``(3, 3)`` float64, a basis vector a row: (1, 1, 1)/√3, (1, −1, 0)/√2, (1, 1, −2)/√6.
    """
    rows = [[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]]
    basis = torch.tensor(rows, dtype=torch.float64)
    return basis / basis.square().sum(1, keepdim=True).sqrt()


class _Tables(NamedTuple):
    inner: Any
    solver: GridSolver  # with its state on the grid
    evaluations: int  # of each inner step, where steps are repeated
    starts: list[int]  # of each step, the first of its group
    replaces: bool  # whether anything is known
    bases: tuple[Block, Block] | None
    mean: list[Block]  # the law given the data, at each time of the grid
    root: list[Block]
    back_mean: list[Block]  # the forward transition to the start of the group, after each step
    back_root: list[Block]


@dataclass(frozen=True, eq=False, repr=False)
class Imputation(GridSolver):
    r"""A solver that draws what is unknown of images, around what is known of them.

    .. math:: z_t ← (1 − m)\,z_t + m\,(ψ_t x + L_t ξ), \qquad ψ_t = Ψ(t, 0) e_0,

    with the mask m and the known data x, at the start and after each step of another solver.
    The state at a time of the grid is that after the replacement; a state that `solve` keeps or
    returns of the start itself is as it was given.

    Known data come back exactly where the grid ends at t = 0; otherwise with the noise of the last
    time, or, where ``denoise=True``, near to what they were. `impose` puts them in place.

    Parameters
    ----------
    solver
        A solver on a fixed grid, e.g. ``SSCS()``. One that merges moves across grid times makes
        them apart.
    known
        ``(C, H, W)`` or one a sample ``(B, C, H, W)``, floating point and finite, in the scale of
        the data; of an image only what the mask marks is looked at. On the device of the states, or
        it is copied there at every step.
    mask
        Boolean, broadcasts with ``(C, H, W)``; True where data are known.
    basis
        ``(C, C)``, an orthonormal basis of the channels, a vector a row: the mask, but not
        ``known``, is in its coordinates. For colourisation `grey_basis`, with the mask True in
        channel 0 alone, ``torch.tensor([True, False, False])[:, None, None]``, and any image of the
        right greys. None is the channels themselves.
    resample
        How often each group of steps is made, ≥ 1: before it is made again the state goes back
        along the forward process to where the group began. Evaluations grow with it.
    jump
        Steps of a group, ≥ 1. Where noise enters the velocity alone one does harm: over a step
        the data hardly move, and the solver's own error adds up. For CLD and two Gaussian pixels
        about a fifth of the grid was best; for VP, 1.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If shapes do not fit, ``known`` is not finite, the basis is not orthonormal, ``resample`` is
        or ``jump`` is below 1, or the solver's state between two steps belongs to no grid time.

    Notes
    -----
    Noise of a whole state is drawn for each replacement, before the first step and after each, and
    for each way back. If the mask marks nothing, none is drawn for replacements, and without
    repetitions the samples are those of ``solver``, with its moves made apart, to the bit.

    All repetitions of a group are made with its last step. No orders are claimed: no grid reduces
    the error of the replacement.

    References
    ----------
    Y. Song et al., *Score-based generative modeling through stochastic differential equations*,
    2021. A. Lugmayr et al., *RePaint: Inpainting using denoising diffusion probabilistic models*,
    2022.

    Examples
    --------
    >>> import torch
    >>> from cldsde import ReverseProcess, VPSDE, solvers
    >>> process = ReverseProcess(VPSDE(), lambda z, t: -z)  # pixels are independent N(0, 1)
    >>> g = torch.Generator().manual_seed(0)
    >>> left = torch.tensor([True, True, False, False])
    >>> imputation = Imputation(solvers.EulerMaruyama(), torch.full((1, 1, 4), 0.5), left)
    >>> start = process.sde.prior.sample((8, 1, 1, 4), generator=g)
    >>> times = solvers.quadratic_times(1.0, 1e-3, 20)
    >>> data = solvers.solve(process, imputation, start, times, generator=g).data
    >>> imputation.impose(data)[0, 0, 0, :2]
    tensor([0.5000, 0.5000])
    """

    solver: Solver
    known: Tensor
    mask: Tensor
    basis: Tensor | None = None
    resample: int = 1
    jump: int = 10

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        _check_solver(self.solver)
        image = _check_known(self.known, self.mask)
        if self.basis is not None:
            _check_basis(self.basis, image[0])
        for name, count in (("resample", self.resample), ("jump", self.jump)):
            if isinstance(count, bool) or not isinstance(count, int):
                msg = f"{name} must be an integer; got {count!r}"
                raise TypeError(msg)
            if count < 1:
                msg = f"{name} must be at least 1; got {count}"
                raise ValueError(msg)

    def __repr__(self) -> str:
        """Facts in one line."""
        basis = None if self.basis is None else tuple(self.basis.shape)
        return (
            f"Imputation(solver={self.solver!r}, known={tuple(self.known.shape)}, "
            f"mask={tuple(self.mask.shape)}, basis={basis}, resample={self.resample}, "
            f"jump={self.jump})"
        )

    @property
    def facts(self) -> Facts:
        """Where it applies, as its solver does, and its evaluations; no orders."""
        inner = self.solver.facts
        return Facts(applies_to=inner.applies_to, nfe_per_step=self.resample * inner.nfe_per_step)

    def prepare(self, process: ReverseProcess, times: Tensor) -> _Tables:
        """Tables of the solver, and the law of known data at each time of the grid.

        Raises
        ------
        ValueError
            If the solver does not apply to the process, or steps that are to be repeated differ in
            their number of evaluations.
        """
        solver, sde = self._stepper(), process.sde
        inner = solver.prepare(process, times)
        asked, steps = len(solver.evaluation_times(process, times)), len(times) - 1
        if self.resample > 1 and asked % steps:
            msg = (
                "solver must ask for the score equally often in each step where resample is above "
                f"1; {self.solver!r} asks {asked} times in {steps} steps"
            )
            raise ValueError(msg)
        # Given x, not z_0: what the velocity was at time 0 is part of the noise.
        law = sde.marginal(times)
        starts = torch.arange(steps) // self.jump * self.jump
        back = sde.transition(times[1:], times[starts])
        return _Tables(
            inner,
            solver,
            asked // steps,
            starts.tolist(),
            bool(self.mask.any()),
            self._bases(),
            as_blocks(law.mean[..., :1]),
            as_blocks(law.root),
            as_blocks(back.mean),
            as_blocks(back.root),
        )

    def evaluation_times(self, process: ReverseProcess, times: Tensor) -> Tensor:
        """Those of the solver, group by group, each as often as it is made."""
        asked = self._stepper().evaluation_times(process, times)
        if self.resample == 1:
            return asked
        rows = asked.reshape(len(times) - 1, -1)
        groups = [rows[i : i + self.jump] for i in range(0, len(rows), self.jump)]
        return torch.cat([group.repeat(self.resample, 1).flatten() for group in groups])

    def step(
        self, z: Tensor, memory: Memory, tables: _Tables, i: int, score: ScoreAt, noise: NoiseSource
    ) -> tuple[Tensor, Memory]:
        """Step and replace; at the end of a group, go back and make it again, as often as asked.

        Raises
        ------
        ValueError
            If the state does not fit ``known``, or steps are to be repeated by a solver that hands
            something from one step to the next.
        """
        if i == 0:
            self._check_fit(z[:, 0], "state")
            z = self._replace(z, tables, 0, noise)
        first = tables.starts[i]
        z, memory = self._inner_step(z, memory, tables, i, 0, score, noise)
        if self.resample == 1 or (i + 1 < len(tables.starts) and tables.starts[i + 1] == first):
            return z, memory
        for again in range(1, self.resample):
            xi = noise.normal(z, z.shape[1])
            z = combine((tables.back_mean[i], z), (tables.back_root[i], xi))
            for j in range(first, i + 1):
                z, memory = self._inner_step(z, memory, tables, j, again, score, noise)
        return z, memory

    def _inner_step(
        self,
        z: Tensor,
        memory: Memory,
        tables: _Tables,
        i: int,
        again: int,
        score: ScoreAt,
        noise: NoiseSource,
    ) -> tuple[Tensor, Memory]:
        """A step of the solver and the replacement after it, in a repetition of its group."""
        first, steps = tables.starts[i], len(tables.starts)
        length = min(self.jump, steps - first)
        shift = tables.evaluations * ((self.resample - 1) * first + again * length)
        shifted = ShiftedScore(score, shift)
        z, memory = tables.solver.step(z, memory, tables.inner, i, shifted, noise)
        if memory and self.resample > 1:
            msg = (
                "solver must be a one-step solver where resample is above 1; "
                f"got {self.solver!r}. Use SSCS or EulerMaruyama"
            )
            raise ValueError(msg)
        return self._replace(z, tables, i + 1, noise), memory

    def impose(self, data: Tensor) -> Tensor:
        """Images with the known part in its place, exactly; in a basis, to rounding.

        Parameters
        ----------
        data
            Images ``(B, C, H, W)``, such as the ``data`` of a solution.

        Returns
        -------
        Tensor
            ``(B, C, H, W)``.

        Raises
        ------
        ValueError
            If the images do not fit ``known``.
        """
        self._check_fit(data, "data")
        known = self.known.to(data).expand_as(data)
        return self._merge(data.unsqueeze(1), known.unsqueeze(1), self._bases()).squeeze(1)

    def _replace(self, z: Tensor, tables: _Tables, i: int, noise: NoiseSource) -> Tensor:
        """The state at time i with its known part drawn anew."""
        if not tables.replaces:
            return z
        known = self.known.to(z).expand_as(z[:, 0]).unsqueeze(1)
        xi = noise.normal(z, z.shape[1])
        drawn = combine((tables.mean[i], known), (tables.root[i], xi))
        return self._merge(z, drawn, tables.bases)

    def _merge(self, z: Tensor, known: Tensor, bases: tuple[Block, Block] | None) -> Tensor:
        """What is known of ``known``, the rest of ``z``; both ``(B, k, C, H, W)``."""
        mask = self.mask.to(z.device)
        if bases is None:
            return torch.where(mask, known, z)
        to_basis, from_basis = bases
        return z + _on_channels(from_basis, _on_channels(to_basis, known - z) * mask)

    def _stepper(self) -> GridSolver:
        """The solver with its state on the grid, which it was checked to be able to."""
        return cast("GridSolver", self.solver.on_grid())

    def _bases(self) -> tuple[Block, Block] | None:
        """To the basis and from it, on the host."""
        return None if self.basis is None else (self.basis.tolist(), self.basis.mT.tolist())

    def _check_fit(self, data: Tensor, name: str) -> None:
        wanted = (len(data), *self.known.shape[-3:])
        if data.shape != wanted or (self.known.ndim == 4 and len(self.known) != len(data)):
            msg = (
                f"{name} must hold images that fit those of known, {tuple(self.known.shape)}; "
                f"got {tuple(data.shape)}"
            )
            raise ValueError(msg)


def _on_channels(block: Block, x: Tensor) -> Tensor:
    """Apply a block to the channels of ``(B, k, C, H, W)``."""
    return combine((block, x.transpose(1, 2))).transpose(1, 2)


def _check_solver(solver: object) -> None:
    stepper = check_solver(solver).on_grid()
    if not (stepper.facts.state_on_grid and hasattr(stepper, "step")):
        msg = (
            "solver must leave a state at each grid time, where known data are put in; "
            f"{solver!r} does not. Use SSCS or EulerMaruyama"
        )
        raise ValueError(msg)


def _check_known(known: object, mask: object) -> torch.Size:
    """The shape of an image, if what is known of it can be."""
    if not isinstance(known, Tensor) or not known.is_floating_point():
        got = known.dtype if isinstance(known, Tensor) else type(known).__name__
        msg = f"known must be a floating-point tensor; got {got}"
        raise TypeError(msg)
    if known.ndim not in (3, 4):
        msg = f"known must be (C, H, W) or (B, C, H, W); got {tuple(known.shape)}"
        raise ValueError(msg)
    if not bool(known.isfinite().all()):
        msg = "known must be finite, where the mask is False, too; put any number there"
        raise ValueError(msg)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        msg = f"mask must be a boolean tensor, True where data are known; got {got}"
        raise TypeError(msg)
    image = known.shape[-3:]
    if not _broadcasts(mask.shape, image):
        msg = f"mask must broadcast with {tuple(image)}; got {tuple(mask.shape)}"
        raise ValueError(msg)
    return image


def _broadcasts(shape: torch.Size, image: torch.Size) -> bool:
    sizes = zip(reversed(shape), reversed(image), strict=False)
    return len(shape) <= len(image) and all(a in (1, b) for a, b in sizes)


def _check_basis(basis: object, channels: int) -> None:
    if not isinstance(basis, Tensor) or not basis.is_floating_point():
        msg = f"basis must be a floating-point tensor or None; got {basis!r}"
        raise TypeError(msg)
    if basis.shape != (channels, channels):
        msg = f"basis must be {(channels, channels)}, a vector a row; got {tuple(basis.shape)}"
        raise ValueError(msg)
    rows = basis.detach().cpu().to(torch.float64)
    error = float((rows @ rows.mT - torch.eye(channels, dtype=torch.float64)).abs().max())
    # Rounding to single precision makes up to 2·eps of it.
    if not error <= 4 * torch.finfo(torch.float32).eps:
        msg = f"basis must be orthonormal; its vectors' products are off by {error:.2g}"
        raise ValueError(msg)
