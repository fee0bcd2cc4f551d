"""The interface of solvers: options, a declaration of what they promise, tables and a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from cldsde.linear.sde import LinearSDE
from cldsde.progress import progress_bar
from cldsde.score import ReverseProcess
from cldsde.score.reverse import KnownScore
from cldsde.score.times import KnownTimes

from .combine import Block
from .noise import NoiseSource, PathNoise
from .path_density import DrawnNoise, PathDensity

__all__ = [
    "DATA_DETERMINED",
    "Callback",
    "Facts",
    "GridSolver",
    "Integration",
    "Memory",
    "Run",
    "ScoreAt",
    "ShiftedScore",
    "Solver",
    "check_regular",
    "check_same_kind",
    "check_solver",
]

Memory = tuple[Tensor, ...]
"""Tensors ``(B, rows, *D)`` that a step passes to the next step.

They are affine in state and noise if the score is affine."""


class ScoreAt(Protocol):
    """Score of the driven components at a state, at the evaluation time of the given number."""

    def __call__(self, z: Tensor, number: int, /) -> Tensor:
        """Score ``(B, d, *D)``."""
        ...

    def data_prediction(self, z: Tensor, number: int, /) -> Tensor:
        """E[x_0 | z_t] ``(B, 1, *D)`` by the score's own method."""
        ...


@dataclass(frozen=True)
class ShiftedScore:
    """A score whose evaluations are counted from a given number on, for solvers within solvers."""

    score: ScoreAt
    shift: int

    def __call__(self, z: Tensor, number: int, /) -> Tensor:
        """Score ``(B, d, *D)``."""
        return self.score(z, self.shift + number)

    def data_prediction(self, z: Tensor, number: int, /) -> Tensor:
        """E[x_0 | z_t] ``(B, 1, *D)`` by the score's own method."""
        return self.score.data_prediction(z, self.shift + number)


Callback = Callable[[int, Any, Tensor], object]
"""Function that `solve` calls after each step: number of steps so far, time, state."""

DATA_DETERMINED = (
    "every linear SDE whose driven score determines the data "
    "(not underdamped with noise in one component)"
)
"""Processes for solvers that derive the data, or the full score, from the driven score."""


@dataclass(frozen=True)
class Facts:
    """Requirements and claimed orders of a solver; documentation and order tests read them."""

    applies_to: str  #: The processes that it works for, in words.
    nfe_per_step: int  #: Score evaluations per step; `Splitting` takes more if positions are noisy.
    weak_order: float | None = None  #: Order in distribution for the reverse SDE, if claimed.
    strong_order: float | None = None  #: Order along paths for the reverse SDE, if claimed.
    ode_order: float | None = None  #: Order for the probability flow; None if stochastic.
    #: Whether `GridSolver.step` ends at a grid time, so that another method may work on the state.
    state_on_grid: bool = True
    #: Whether it chooses its times between the grid's ends, by fields ``rtol`` and ``atol``.
    adaptive: bool = False
    #: Whether it also runs on increasing grids, from data to noise.
    encodes: bool = False


@dataclass(frozen=True, eq=False)
class Run:
    """Arguments of one integration."""

    process: ReverseProcess
    tables: Any  #: What `Solver.prepare` returned.
    asked: KnownTimes | None  #: What `Solver.evaluation_times` returned.
    state: Tensor  #: States ``(B, k, *D)`` at ``times[0]``; not to be changed.
    times: Tensor  #: Float64 grid ``(n + 1,)`` on the CPU; it increases only if the solver encodes.
    stops: Tensor  #: Times after ``times[0]`` at which states are wanted, the last time included.
    noise: NoiseSource
    callback: Callback | None  #: Called after each step or attempt; returns whether to stop.
    progress: bool  #: Whether to show a progress bar on stderr.
    density: PathDensity | None = None  #: Of the steps, if their log-densities are wanted.


@dataclass(frozen=True, eq=False)
class Integration:
    """Result of `Solver.integrate`."""

    state: Tensor  #: Last states, ``(B, k, *D)``.
    states: Tensor  #: States at the stops, ``(S, B, k, *D)``; NaN if a sample did not reach one.
    nfev: Tensor  #: Score evaluations of each sample, ``(B,)`` int64 on the CPU.
    success: Tensor  #: Which samples arrived, ``(B,)`` bool on the CPU.
    message: str
    stopped: bool = False  #: Whether the callback asked to stop.
    stats: dict[str, Any] = field(default_factory=dict)
    log_probs: Tensor | None = None  #: Log-densities of the steps ``(n, B)``, if wanted.


class Solver(ABC):
    """A solver, on a grid that is given or with steps that it chooses.

    A subclass is a frozen, keyword-only dataclass whose fields are its options; an option out of
    range is a ValueError. Solvers on a fixed grid derive from `GridSolver`.
    """

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """Requirements and claimed orders with these options."""

    @abstractmethod
    def prepare(self, process: ReverseProcess, times: Tensor) -> Any:
        """Tables for a grid ``(n + 1,)``: all that depends on process and grid alone.

        Raises
        ------
        ValueError
            If the solver does not apply to the process; says why and what to use.
        """

    def evaluation_times(self, process: ReverseProcess, times: Tensor) -> Tensor | None:
        """Times of score evaluations over a grid, in order; None if the solver chooses them."""
        return None

    @abstractmethod
    def integrate(self, run: Run) -> Integration:
        """Take states from ``run.times[0]`` to ``run.times[-1]``."""

    def path_noise(self, process: ReverseProcess, times: Tensor) -> PathNoise | None:
        """Normals of each step as functionals of a Brownian path; None if they are not."""
        return None

    def noise_roots(self, tables: Any) -> Sequence[Block] | None:
        """Roots L of steps z' = m + L ξ, whose mean m does not depend on their one draw ξ.

        k×r blocks, one per step; None if a step is not of this form.

        Parameters
        ----------
        tables
            What `prepare` returned.
        """
        return None

    def on_grid(self) -> Self:
        """The same method with its state at each grid time, where another method may work on it."""
        return self

    def with_step(self, h: float) -> Solver:
        """The same adaptive method with steps of length h and no control of its error.

        Raises
        ------
        ValueError
            If the solver is not adaptive.
        """
        msg = f"solver must be adaptive to take steps of one length; got {self!r}"
        raise ValueError(msg)


class GridSolver(Solver):
    """A solver on a fixed grid.

    `prepare` makes its tables once for a grid, in float64. `step` is tensor arithmetic only and may
    look at nothing but its arguments.
    """

    @abstractmethod
    def evaluation_times(self, process: ReverseProcess, times: Tensor) -> Tensor:
        """Times at which the score is evaluated over a grid, float64, in the order of their use."""

    @abstractmethod
    def step(
        self, z: Tensor, memory: Memory, tables: Any, i: int, score: ScoreAt, noise: NoiseSource
    ) -> tuple[Tensor, Memory]:
        """Advance the state from ``times[i]`` to ``times[i + 1]``.

        Parameters
        ----------
        z
            State ``(B, k, *D)``; not to be changed.
        memory
            What the step before returned, ``()`` at the first; one-step solvers return ``()``.
        tables
            What `prepare` returned.
        i
            Number of the step.
        score, noise
            Where the score and standard normals come from.
        """

    def integrate(self, run: Run) -> Integration:
        """Step through the grid."""
        assert run.asked is not None
        score = KnownScore(run.process, run.asked, run.state)
        times, stops = run.times.tolist(), set(run.stops.tolist())
        # A copy, so that a score that writes to its argument does not change the caller's state.
        z = run.state.clone(memory_format=torch.contiguous_format)
        memory: Memory = ()
        saved: list[Tensor] = []
        log_probs: list[Tensor] = []
        drawn = None if run.density is None else DrawnNoise(run.noise)
        noise, stopped = drawn or run.noise, False
        for i in progress_bar(range(len(times) - 1), shown=run.progress, desc=type(self).__name__):
            # Pass the only reference, so that `step` can free the state.
            held = [z]
            del z
            z, memory = self._checked(
                self.step(held.pop(), memory, run.tables, i, score, noise), run.state
            )
            if run.density is not None and drawn is not None:
                log_probs.append(run.density.log_prob(i, z, drawn.last))
                z = z.detach()  # the path is given
            if times[i + 1] in stops:
                saved.append(z if i + 2 == len(times) else z.clone())
            if run.callback is not None and run.callback(i + 1, times[i + 1], z.contiguous()):
                stopped = i + 2 < len(times)
                break
        missing = [torch.full_like(z, torch.nan)] * (len(stops) - len(saved))
        states = [*saved, *missing]
        return Integration(
            state=z,
            states=z.unsqueeze(0) if len(states) == 1 and saved else torch.stack(states),
            nfev=torch.full((len(z),), score.nfev, device="cpu"),
            success=torch.full((len(z),), not stopped, device="cpu"),
            message=f"stopped by the callback after {i + 1} steps"
            if stopped
            else "reached the end of the grid",
            stopped=stopped,
            log_probs=torch.stack(log_probs) if log_probs else None,
            stats={"steps": i + 1},
        )

    def _checked(self, made: Any, like: Tensor) -> tuple[Tensor, Memory]:
        """What `step` returned, if it is a state and a memory."""
        if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], tuple)):
            msg = (
                f"{type(self).__name__}.step must return (state, memory) with memory a tuple of "
                f"tensors, () if there is none; got {type(made).__name__}"
            )
            raise TypeError(msg)
        z = made[0]
        check_same_kind(z, like, f"{type(self).__name__}.step")
        return z, made[1]


def check_regular(sde: LinearSDE, times: Tensor, solver: str) -> None:
    """Raise ValueError if a grid starts too near a time at which drift and diffusion diverge."""
    end, until = float(times.max()), sde.regular_until
    # Times may have been rounded, to float32 or to the digits that a message shows.
    if end - until > 1e-2 * (sde.T - until):
        msg = (
            f"times must not reach t = {end:.15g} for {solver}, because drift and diffusion "
            f"diverge at t = {sde.T:g}; take t ≤ {until:.15g}, or ExponentialMultistep"
        )
        raise ValueError(msg)


def check_same_kind(z: object, like: Tensor, name: str) -> None:
    """Raise ValueError unless a method returned a state like another."""
    kind = (like.dtype, like.device)
    if isinstance(z, Tensor) and z.shape == like.shape and (z.dtype, z.device) == kind:
        return
    got = (tuple(z.shape), z.dtype, z.device) if isinstance(z, Tensor) else type(z).__name__
    msg = (
        f"{name} must return a state of shape {tuple(like.shape)} and {like.dtype} on "
        f"{like.device}; got {got}"
    )
    raise ValueError(msg)


def check_solver(solver: object, name: str = "solver") -> Solver:
    """Return the argument if it is a `Solver`, raise TypeError otherwise."""
    if not isinstance(solver, Solver):
        hint = " (write it with parentheses)" if isinstance(solver, type) else ""
        msg = f"{name} must be a solver, such as SSCS(); got {solver!r}{hint}"
        raise TypeError(msg)
    return solver
